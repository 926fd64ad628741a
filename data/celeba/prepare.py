"""CelebA: 202,599 faces of 178 x 218 pixels, aligned, with 40 yes-no attributes (Liu et al. 2015).

    python data/celeba/prepare.py --source=DIR
    python data/celeba/prepare.py --source=DIR --attribute=Smiling   # that attribute is the class

DIR holds, of https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, img_align_celeba.zip (or what it unpacks to) and,
somewhere below, list_eval_partition.txt and list_attr_celeba.txt (or the .csv that Kaggle made of them).
Licence: non-commercial research only. Size: 1.4 GB fetched, 1.9 GB made. Time: minutes (estimate).
On disk: train-*.tar, val-*.tar, test-*.tar (the published split), classes.json if attribute is set, bpe.tiktoken,
meta.json, dropped.jsonl, sheet.png. The caption of a face lists the attributes that it has: "smiling, young".
"""

import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from data.prepare import find_file, list_images, make, need_source, run

source = ""  # folder with img_align_celeba.zip or img_align_celeba/, and the lists
out_dir = "data/celeba"  # where the shards go
attribute = ""  # which of the 40 is the label: 1 yes, 0 no
size = 178  # short side in pixels
crop = "center"  # the middle square, as most papers do (of 178 pixels, 140 or 148 are usual too); none keeps the ratio
quality = 95  # of JPEG; 0: PNG
min_side = 32  # pixels; images with a shorter side are dropped
drop_duplicates = True  # the first of equal images is kept
vocab_size = 512  # most tokens of a tokenizer trained on the captions; 0: none
shard_mb = 256.0  # size of a shard
workers = 4  # processes that decode and resize; 0: none but this


def read_table(path):
    """{first word of a line: the others} of one of the lists, and the header's words; commas are spaces."""
    with open(path, errors="replace") as f:
        lines = [line.replace(",", " ").split() for line in f]
    rows = {line[0]: line[1:] for line in lines if len(line) > 1 and line[0].split(".")[0].isdigit() and line[1:]}
    header = next((line for line in lines if len(line) > 1 and not line[0].split(".")[0].isdigit()), [])
    return rows, header


def read_attributes(path):
    """{file name: [names of the attributes that the face has]}, and all names."""
    rows, names = read_table(path)
    names = names[1:] if names and names[0] == "image_id" else names
    if any(len(row) != len(names) for row in rows.values()) or not rows:
        raise ValueError(f"{path} is not a table of {len(names)} attributes: fetch it again")
    return {key: [name for name, value in zip(names, row) if value == "1"] for key, row in rows.items()}, names


def described(has):
    return ", ".join(sorted(name.replace("_", " ").lower() for name in has))


def items(images, splits, attributes, attribute):
    for path, image in images:
        name = os.path.basename(path)
        item = dict(key=os.path.splitext(name)[0], image=image)
        if splits:
            if name not in splits:
                raise ValueError(f"{name} is not in list_eval_partition: fetch that again")
            if splits[name][0] not in ("0", "1", "2"):
                raise ValueError(f"list_eval_partition has {name} in no part of 0, 1, 2: fetch that again")
            item["split"] = ("train", "val", "test")[int(splits[name][0])]
        if name in attributes:
            item["attributes"] = attributes[name]
            item["text"] = [described(attributes[name])] if attributes[name] else []
            if attribute:
                item["label"] = int(attribute in attributes[name])
        yield item


def prepare(cfg):
    source = need_source(cfg, "a folder with img_align_celeba.zip and the lists")
    archive = find_file(source, "img_align_celeba.zip") if os.path.isdir(source) else source
    images = list_images(source)
    images = images if images or not archive else list_images(archive)
    partition = find_file(source, "list_eval_partition.txt", "list_eval_partition.csv")
    table = find_file(source, "list_attr_celeba.txt", "list_attr_celeba.csv")
    splits = read_table(partition)[0] if partition else {}
    attributes, names = read_attributes(table) if table else ({}, [])
    if cfg.attribute and cfg.attribute not in names:
        raise ValueError(f"attribute {cfg.attribute!r} is not known: list_attr_celeba has {', '.join(names) or 'none'}")
    classes = [f"not {cfg.attribute}", cfg.attribute] if cfg.attribute else []
    make(items(images, splits, attributes, cfg.attribute), cfg, classes, len(images))


if __name__ == "__main__":
    run(prepare, globals())
