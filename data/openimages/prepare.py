"""Open Images V7: photos from Flickr with boxes of 600 classes (Kuznetsova et al. 2020), through FiftyOne's zoo.

    python data/openimages/prepare.py --download=True --n_train=100000        # pip install fiftyone
    python data/openimages/prepare.py --download=True --n_train=20000 --only=Cat,Dog
    python data/openimages/prepare.py --source=DIR                            # what the zoo, or you, fetched before

DIR has the layout of the zoo, by default ~/fiftyone/open-images-v7 (FIFTYONE_DATASET_ZOO_DIR moves it):
{train,validation}/data/ID.jpg, labels/detections.csv (ImageID, LabelName, XMin, XMax, YMin, YMax, ...) and
metadata/classes.csv. A *captions*.jsonl in labels/, {image_id, caption} as in Localized Narratives, gives captions.
Source: https://storage.googleapis.com/openimages/web/index.html. License: images CC BY 2.0, annotations CC BY 4.0.
Size: all 1,743,042 training photos are 513 GB, 41,620 of validation 12 GB; made at 256 pixels about 45 KB each
(estimate). Time: that of the download. On disk: train-*.tar, val-*.tar (of its validation split),
object_classes.json, bpe.tiktoken if there are captions, meta.json, dropped.jsonl; the objects of an image are in
KEY.json, in pixels of the resized image, for layout-to-image training.
"""

import csv
import glob
import json
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import reject
from data.forms import field, json_lines
from data.prepare import check_source, list_images, need, pack, run, save

source = ""  # folder with train/ and validation/, in the layout of the zoo
download = False  # fetch what is missing with FiftyOne
n_train = 100000  # >= 0: most training photos to fetch and use; 0 for all
n_val = 5000  # >= 0: most validation photos; 0 for all
only = ""  # only photos with one of these classes, with commas between, as Cat,Dog
out_dir = "data/openimages"  # folder for the shards
min_side = 64  # >= 0: images with a shorter side are dropped
vocab_size = 8192  # 0 or >= 256: most tokens of a tokenizer trained on the captions; 0 trains none
workers = 8  # >= 0: processes that decode and resize; 0 uses only this one
# further settings, the same for all data sets: see data/prepare.py

SPLITS = (("train", "train"), ("validation", "val"))


def fetch_zoo(cfg):
    """Fetch what is missing with FiftyOne's zoo; returns its folder."""
    zoo = need("fiftyone.zoo", "--download=True")
    for (split, _), n in zip(SPLITS, (cfg.n_train, cfg.n_val)):
        options = dict(label_types=["detections"], max_samples=n or None)
        if cfg.only:
            options["classes"] = [name.strip() for name in cfg.only.split(",")]
        _, folder = zoo.download_zoo_dataset("open-images-v7", split=split, **options)
    return os.path.dirname(folder) if os.path.basename(folder) in ("train", "validation") else folder


def read_names(source):
    """{"/m/01yrx": "Cat", ...} of the first classes.csv below source."""
    names = {}
    for path in sorted(glob.glob(f"{glob.escape(source)}/**/metadata/classes.csv", recursive=True))[:1]:
        with open(path, newline="", encoding="utf-8", errors="replace") as f:
            names = {row[0]: row[1] for row in csv.reader(f) if len(row) > 1 and row[0].startswith("/")}
    return names


def read_objects(path, ids, names):
    """{image id: objects as data/prepare.py takes them} of the images in ids."""
    found = {}
    if not os.path.exists(path):
        return found
    with open(path, newline="", encoding="utf-8", errors="replace") as f:
        reader = csv.DictReader(f)
        try:
            for row in reader:
                if row["ImageID"] in ids:
                    x0, y0, x1, y1 = (float(row[name]) for name in ("XMin", "YMin", "XMax", "YMax"))
                    objects = found.setdefault(row["ImageID"], dict(bbox=[], categories=[], unit="image"))
                    objects["bbox"].append((x0, y0, x1 - x0, y1 - y0))
                    objects["categories"].append(names.get(row["LabelName"], row["LabelName"]))
        except (ValueError, TypeError, KeyError, csv.Error) as e:
            reject(path, f"line {reader.line_num} cannot be read ({type(e).__name__}: {e})", "download it again")
    return found


def read_captions(folder, ids):
    captions = {}
    for path in sorted(glob.glob(f"{glob.escape(folder)}/*captions*.jsonl")):
        for record in json_lines(path):
            key, caption = field(record, ["image_id"]), field(record, ["caption"])
            if isinstance(key, str) and key in ids and isinstance(caption, str) and caption.strip():
                captions.setdefault(key, []).append(caption.strip())
    return captions


def read_split(cfg, source, folder, names, n):
    """[(key, image, its objects or None)] of the photos of a split, at most n."""
    images = {os.path.splitext(path)[0]: image for path, image in list_images(f"{source}/{folder}/data")}
    objects = read_objects(f"{source}/{folder}/labels/detections.csv", images, names)
    only = {name.strip() for name in cfg.only.split(",") if name.strip()}
    keys = [key for key in images if not only or (key in objects and only & set(objects[key]["categories"]))]
    return [(key, images[key], objects.get(key)) for key in (keys[:n] if n else keys)]


def items(splits, source):
    for folder, split, photos in splits:
        captions = read_captions(f"{source}/{folder}/labels", {key for key, *_ in photos})
        for key, image, objects in photos:
            item = dict(key=key, image=image, split=split)
            if key in captions:
                item["text"] = captions[key]
            if objects:
                item["objects"] = objects
            yield item


def prepare(cfg):
    source = fetch_zoo(cfg) if cfg.download and not cfg.source else cfg.source
    check_source(source, "a folder with train/data/*.jpg, or add --download=True")
    splits, names = [], read_names(source)
    for (folder, split), n in zip(SPLITS, (cfg.n_train, cfg.n_val)):
        if os.path.isdir(f"{source}/{folder}/data"):
            splits.append((folder, split, read_split(cfg, source, folder, names, n)))
    if not splits:
        reject(source, "has neither train/data nor validation/data", "set --source to open-images-v7")
    pack(items(splits, source), cfg, total=sum(len(photos) for *_, photos in splits))
    if names:
        save(f"{cfg.out_dir}/object_classes.json", json.dumps(sorted(set(names.values())), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(prepare, globals())
