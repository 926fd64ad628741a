"""Open Images V7: photos from Flickr with boxes of 600 classes (Kuznetsova et al. 2020), through FiftyOne's zoo.

    python data/openimages/prepare.py --download=True --n_train=100000        # pip install fiftyone
    python data/openimages/prepare.py --download=True --n_train=20000 --only=Cat,Dog
    python data/openimages/prepare.py --source=DIR                            # what the zoo, or you, fetched before

DIR is laid out as the zoo does it, by default in ~/fiftyone/open-images-v7 (FIFTYONE_DATASET_ZOO_DIR moves it):
{train,validation}/data/ID.jpg, labels/detections.csv (ImageID, LabelName, XMin, XMax, YMin, YMax, ...) and
metadata/classes.csv. A *captions*.jsonl in labels/, {image_id, caption} as in Localized Narratives, gives captions.
Source: https://storage.googleapis.com/openimages/web/index.html. Licence: images CC BY 2.0, annotations CC BY 4.0.
Size: all 1,743,042 training photos are 513 GB, 41,620 of validation 12 GB; made at 256 pixels about 45 KB each
(estimate). Time: that of the download. On disk: train-*.tar, val-*.tar (of its validation split),
object_classes.json, bpe.tiktoken where there are captions, meta.json, dropped.jsonl, sheet.png; the objects of an image
are in KEY.json, in pixels of the resized image, for layout-to-image and box-conditioned training.
"""

import csv
import glob
import json
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from data.dataset import field, json_lines
from data.prepare import list_images, make, need, need_source, run, write

source = ""  # folder with train/ and validation/, as the zoo lays them out
download = False  # fetch with FiftyOne what is not there yet
n_train = 100000  # most training photos to fetch and use; 0: all
n_val = 5000  # most validation photos; 0: all
only = ""  # only photos with one of these classes, with commas between: Cat,Dog
out_dir = "data/openimages"  # where the shards go
size = 256  # short side in pixels; smaller images stay as they are
crop = "none"  # keeps the ratio of the sides; center: the middle square
quality = 95  # of JPEG; 0: PNG
min_side = 64  # pixels; images with a shorter side are dropped
drop_duplicates = True  # the first of equal images is kept
vocab_size = 8192  # most tokens of a tokenizer trained on the captions; 0: none
shard_mb = 256.0  # size of a shard
workers = 8  # processes that decode and resize; 0: none but this

SPLITS = (("train", "train"), ("validation", "val"))


def fetch_zoo(cfg):
    """The folder in which FiftyOne's zoo keeps what it fetched; it continues by itself with what is missing."""
    zoo = need("fiftyone.zoo", "--download=True")
    for (split, _), n in zip(SPLITS, (cfg.n_train, cfg.n_val)):
        options = dict(label_types=["detections"], max_samples=n or None)
        if cfg.only:
            options["classes"] = [name.strip() for name in cfg.only.split(",")]
        _, folder = zoo.download_zoo_dataset("open-images-v7", split=split, **options)
    return os.path.dirname(folder) if os.path.basename(folder) in ("train", "validation") else folder


def read_names(source):
    """{/m/01yrx: Cat, ...} of the first classes.csv below source."""
    names = {}
    for path in sorted(glob.glob(f"{glob.escape(source)}/**/metadata/classes.csv", recursive=True))[:1]:
        with open(path, newline="", encoding="utf-8", errors="replace") as f:
            names = {row[0]: row[1] for row in csv.reader(f) if len(row) > 1 and row[0].startswith("/")}
    return names


def read_boxes(path, ids, names):
    """{image id: [(class name, x0, y0, x1, y1) in shares of the image]} for the images that are there."""
    boxes = {}
    if not os.path.exists(path):
        return boxes
    with open(path, newline="", encoding="utf-8", errors="replace") as f:
        reader = csv.DictReader(f)
        columns = ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax")
        if missing := [name for name in columns if name not in (reader.fieldnames or [])]:
            raise ValueError(f"{path} has no column {missing[0]}: fetch it again")
        try:
            for row in reader:
                if row["ImageID"] in ids:
                    box = tuple(float(row[name]) for name in columns[2:])
                    boxes.setdefault(row["ImageID"], []).append((names.get(row["LabelName"], row["LabelName"]), *box))
        except (ValueError, TypeError, csv.Error) as e:
            raise ValueError(f"{path} does not read about line {reader.line_num} ({e}): fetch it again") from None
    return boxes


def read_captions(folder, ids):
    captions = {}
    for path in sorted(glob.glob(f"{glob.escape(folder)}/*captions*.jsonl")):
        for _, _, record in json_lines(path):
            key, caption = field(record, ["image_id"]), field(record, ["caption"])
            if isinstance(key, str) and key in ids and isinstance(caption, str) and caption.strip():
                captions.setdefault(key, []).append(caption.strip())
    return captions


def items(splits, source, names):
    for folder, split, images in splits:
        ids = {os.path.splitext(path)[0] for path, _ in images}
        boxes = read_boxes(f"{source}/{folder}/labels/detections.csv", ids, names)
        captions = read_captions(f"{source}/{folder}/labels", ids)
        for path, image in images:
            key = os.path.splitext(path)[0]
            item = dict(key=key, image=image, split=split)
            if key in captions:
                item["text"] = captions[key]
            if key in boxes:
                item["objects"] = dict(
                    bbox=[(x0, y0, x1 - x0, y1 - y0) for _, x0, y0, x1, y1 in boxes[key]],
                    categories=[name for name, *_ in boxes[key]],
                    unit="image",
                )
            yield item


def prepare(cfg):
    if cfg.download and not cfg.source:
        cfg.source = fetch_zoo(cfg)
    source = need_source(cfg, "a folder with train/data/*.jpg, or add --download=True")
    splits, names, only = [], read_names(source), {name.strip() for name in cfg.only.split(",") if name.strip()}
    for (folder, split), n in zip(SPLITS, (cfg.n_train, cfg.n_val)):
        if os.path.isdir(f"{source}/{folder}/data"):
            images = list_images(f"{source}/{folder}/data")
            if only:  # others may lie there, of an earlier call
                ids = {os.path.splitext(path)[0] for path, _ in images}
                boxes = read_boxes(f"{source}/{folder}/labels/detections.csv", ids, names)
                having = {key for key, found in boxes.items() if only & {name for name, *_ in found}}
                images = [(path, image) for path, image in images if os.path.splitext(path)[0] in having]
            splits.append((folder, split, images[:n] if n else images))
    if not splits:
        raise ValueError(f"{source} has neither train/data nor validation/data: set source to open-images-v7")
    os.makedirs(cfg.out_dir, exist_ok=True)
    if names:
        write(f"{cfg.out_dir}/object_classes.json", json.dumps(sorted(set(names.values())), ensure_ascii=False) + "\n")
    make(items(splits, source, names), cfg, total=sum(len(images) for *_, images in splits))


if __name__ == "__main__":
    run(prepare, globals())
