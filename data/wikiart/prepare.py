"""WikiArt: 81,444 paintings with style (27), genre (11) and artist (129) (of the ArtGAN project, of wikiart.org).

    python data/wikiart/prepare.py --download=True    # 34 GB to the hub's cache (HF_HOME), then the shards
    hf download --repo-type dataset huggan/wikiart --local-dir DIR; python data/wikiart/prepare.py --source=DIR
    python data/wikiart/prepare.py --source=wikiart.zip --label=artist    # or the folder that it unpacks to

Source: the Hugging Face hub's parquet, https://huggingface.co/datasets/huggan/wikiart, or the archive of
https://github.com/cs-chan/ArtGAN, STYLE/ARTIST_TITLE.jpg, whose names have every artist but no genre.
License: non-commercial research only; the paintings' own vary. Size: 34 GB to download, about 4 GB made at 256 pixels
(estimate). Time: half an hour of one core (estimate).
On disk: train-*.tar, val-*.tar (one in a hundred), classes.json (of the chosen label), bpe.tiktoken, meta.json,
dropped.jsonl. A caption is "landscape by claude monet, impressionism", of what is known; that is also in each
KEY.json.
"""

import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import reject
from data.prepare import check_source, from_hub, list_images, pack, parquet_files, parquet_names, parquet_rows, run

source = ""  # folder of the parquet files, or of the styles' folders, or wikiart.zip
download = False  # fetch them to the hub's cache (HF_HOME)
out_dir = "data/wikiart"  # folder for the shards
label = "style"  # style | genre | artist: which of them is the class
min_side = 64  # >= 0: images with a shorter side are dropped
vocab_size = 1024  # 0 or >= 256: most tokens of a tokenizer trained on the captions; 0 trains none
# further settings, the same for all data sets: see data/prepare.py

COLUMNS = ("style", "genre", "artist")


def caption(style, artist, genre="unknown"):
    """What is known of a painting in words; the hub's names include "Unknown Genre"."""
    style, genre, artist = (
        "" if name.lower().startswith("unknown") else name.replace("_", " ").replace("-", " ").lower()
        for name in (style, genre, artist)
    )
    words = f"{genre or 'painting'}{f' by {artist}' if artist else ''}"
    return f"{words}, {style}" if style else words


def from_parquet(files, names, label):
    """(key, image, {column: name}, label) of each painting."""
    for path in files:
        stem = os.path.basename(path).removesuffix(".parquet")
        for row, image, record in parquet_rows(path, COLUMNS):
            known = {}
            for column in COLUMNS:
                value = record[column]
                if isinstance(value, int) and names[column]:
                    value = names[column][value] if 0 <= value < len(names[column]) else "unknown"
                known[column] = str(value)
            yield f"{stem}/{row:06d}", image, known, record[label]


def of_path(path):
    """The style and the artist of STYLE/ARTIST_TITLE.jpg."""
    folder, name = os.path.split(path)
    return dict(style=os.path.basename(folder), artist=name.partition("_")[0])


def items(paintings):
    for key, image, known, label in paintings:
        item = dict(key=key, image=image, text=[caption(**known)], **known)
        if isinstance(label, int):
            item["label"] = label
        yield item


def prepare(cfg):
    label = cfg.label
    source = cfg.source or (from_hub("huggan/wikiart", ["data/*.parquet"]) if cfg.download else "")
    check_source(source, "the parquet files of huggan/wikiart or the archive's folders, or add --download=True")
    if files := parquet_files(source):
        names = {column: parquet_names(files[0], column) for column in COLUMNS}
        classes, paintings, total = names[label], from_parquet(files, names, label), None
    else:
        if label == "genre":
            reject(source, "the archive has style and artist, not genre", "set --label to one of those")
        images = [(path, image, of_path(path)) for path, image in list_images(source)]
        if not any(known["style"] for *_, known in images):
            reject(source, "no images in folders of styles", "set --source to the folder of Baroque, Cubism and so on")
        classes, total = sorted({known[label] for *_, known in images} - {""}), len(images)
        number = {name: i for i, name in enumerate(classes)}
        paintings = ((path, image, known, number.get(known[label])) for path, image, known in images)
    pack(items(paintings), cfg, classes, total)


if __name__ == "__main__":
    run(prepare, globals())
