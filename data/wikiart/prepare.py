"""WikiArt: 81,444 paintings with style (27), genre (11) and artist (129), from the Hugging Face hub's parquet.

    python data/wikiart/prepare.py --download=True    # 34 GB to the hub's cache (HF_HOME), then the shards
    hf download --repo-type dataset huggan/wikiart --local-dir DIR; python data/wikiart/prepare.py --source=DIR
    python data/wikiart/prepare.py --source=DIR --label=artist

Source: https://huggingface.co/datasets/huggan/wikiart (of the ArtGAN project, of wikiart.org). License: non-commercial
research only; the paintings' own vary. Size: 34 GB to download, about 4 GB made at 256 pixels (estimate).
Time: half an hour of one core (estimate).
On disk: train-*.tar, val-*.tar (one in a hundred), classes.json (of the chosen label), bpe.tiktoken, meta.json,
dropped.jsonl. A caption is "landscape by claude monet, impressionism", of what is known; all three are also in each
KEY.json.
"""

import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import reject
from data.forms import PIXELS
from data.prepare import check_source, from_hub, pack, parquet_files, parquet_names, parquet_rows, run

source = ""  # folder of the parquet files
download = False  # fetch them to the hub's cache (HF_HOME)
out_dir = "data/wikiart"  # folder for the shards
label = "style"  # style | genre | artist: which of them is the class
size = 256  # >= 1: short side in pixels; smaller images are not enlarged
crop = "none"  # none | center: none keeps the aspect ratio, center cuts the middle square
quality = 95  # in [0, 100]: of JPEG; 0 writes PNG
min_side = 64  # >= 0: images with a shorter side are dropped
drop_duplicates = True  # keep only the first of identical images
vocab_size = 1024  # 0 or >= 256: most tokens of a tokenizer trained on the captions; 0 trains none
shard_mb = 256.0  # > 0: size of a shard
workers = 4  # >= 0: processes that decode and resize; 0 uses only this one

COLUMNS = ("style", "genre", "artist")


def caption(style, genre, artist):
    """What is known of a painting in words; the hub's names include "Unknown Genre"."""
    style, genre, artist = (
        "" if name.lower().startswith("unknown") else name.replace("_", " ").replace("-", " ").lower()
        for name in (style, genre, artist)
    )
    words = f"{genre or 'painting'}{f' by {artist}' if artist else ''}"
    return f"{words}, {style}" if style else words


def items(files, names, label):
    for path in files:
        stem = os.path.basename(path).removesuffix(".parquet")
        for row, image, record in parquet_rows(path, PIXELS, COLUMNS):
            known = {}
            for column in COLUMNS:
                value = record[column]
                if isinstance(value, int) and names[column]:
                    value = names[column][value] if 0 <= value < len(names[column]) else "unknown"
                known[column] = str(value)
            item = dict(key=f"{stem}/{row:06d}", image=image, text=[caption(**known)], **known)
            if isinstance(record[label], int):
                item["label"] = record[label]
            yield item


def prepare(cfg):
    source = cfg.source
    if cfg.download and not source:
        source = from_hub("huggan/wikiart", ["data/*.parquet"])
    files = parquet_files(check_source(source, "a folder of huggan/wikiart's parquet files, or add --download=True"))
    if not files:
        reject(source, "no parquet files", "set --source to their folder")
    names = {column: parquet_names(files[0], column) for column in COLUMNS}
    pack(items(files, names, cfg.label), cfg, names[cfg.label])


if __name__ == "__main__":
    run(prepare, globals())
