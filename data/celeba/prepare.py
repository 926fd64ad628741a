"""CelebA: 202,599 faces of 178 x 218 pixels, aligned, with 40 yes-no attributes (Liu et al. 2015).

    python data/celeba/prepare.py --source=DIR
    python data/celeba/prepare.py --source=DIR --attribute=Smiling   # that attribute is the class

DIR has, from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, img_align_celeba.zip (or the folder that it unpacks to)
and, anywhere below, list_eval_partition.txt and list_attr_celeba.txt (or Kaggle's .csv of them).
License: non-commercial research only. Size: 1.4 GB to download, 1.9 GB made. Time: minutes (estimate).
On disk: train-*.tar, val-*.tar, test-*.tar (the published split), classes.json if attribute is set, bpe.tiktoken,
meta.json, dropped.jsonl. The caption of a face lists its attributes: "smiling, young".
"""

import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import UserError, reject
from data.prepare import check_source, find_file, list_images, pack, run

source = ""  # folder with img_align_celeba.zip or img_align_celeba/, and the lists
out_dir = "data/celeba"  # folder for the shards
attribute = ""  # which of the 40 is the label (1 yes, 0 no)
size = 178  # >= 1: short side in pixels
crop = "center"  # none | center: center cuts the middle square, as most papers do (of 178 pixels, or 140 or 148)
vocab_size = 512  # 0 or >= 256: most tokens of a tokenizer trained on the captions; 0 trains none
# further settings, the same for all data sets: see data/prepare.py

PART = {"0": "train", "1": "val", "2": "test"}


def read_table(path):
    """{first word of a line: the others} of one of the lists, and the header's words; commas are spaces."""
    with open(path, errors="replace") as f:
        lines = [line.replace(",", " ").split() for line in f]
    lines = [line for line in lines if len(line) > 1]
    is_row = [line[0].split(".")[0].isdigit() for line in lines]
    header = next((line for line, yes in zip(lines, is_row) if not yes), [])
    return {line[0]: line[1:] for line, yes in zip(lines, is_row) if yes}, header


def read_partition(path):
    """{file name: train, val or test} of list_eval_partition."""
    rows, _ = read_table(path)
    if odd := [name for name, row in rows.items() if row[0] not in PART]:
        reject(path, f"{odd[0]} is in none of the parts 0, 1, 2", "download it again")
    return {name: PART[row[0]] for name, row in rows.items()}


def read_attributes(path):
    """{file name: [names of the attributes that the face has]}, and all names."""
    rows, names = read_table(path)
    names = names[1:] if names and names[0] == "image_id" else names
    if any(len(row) != len(names) for row in rows.values()) or not rows:
        reject(path, f"not a table of {len(names)} attributes", "download it again")
    return {key: [name for name, value in zip(names, row) if value == "1"] for key, row in rows.items()}, names


def described(attributes):
    return ", ".join(sorted(name.replace("_", " ").lower() for name in attributes))


def items(images, splits, attributes, attribute):
    for path, image in images:
        name = os.path.basename(path)
        item = dict(key=os.path.splitext(name)[0], image=image)
        if splits:
            if name not in splits:
                reject(path, "not in list_eval_partition", "download that again")
            item["split"] = splits[name]
        if name in attributes:
            item["attributes"] = attributes[name]
            item["text"] = [described(attributes[name])] if attributes[name] else []
            if attribute:
                item["label"] = int(attribute in attributes[name])
        yield item


def prepare(cfg):
    source = check_source(cfg.source, "a folder with img_align_celeba.zip and the lists")
    images = list_images(source)
    if archive := not images and find_file(source, "img_align_celeba.zip"):
        images = list_images(archive)
    partition = find_file(source, "list_eval_partition.txt", "list_eval_partition.csv")
    table = find_file(source, "list_attr_celeba.txt", "list_attr_celeba.csv")
    splits = read_partition(partition) if partition else {}
    attributes, names = read_attributes(table) if table else ({}, [])
    if cfg.attribute and cfg.attribute not in names:
        raise UserError(f"--attribute={cfg.attribute} is not in list_attr_celeba: {', '.join(names) or 'no such file'}")
    classes = [f"not {cfg.attribute}", cfg.attribute] if cfg.attribute else []
    pack(items(images, splits, attributes, cfg.attribute), cfg, classes, len(images))


if __name__ == "__main__":
    run(prepare, globals())
