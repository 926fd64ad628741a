"""CelebA-HQ: 30,000 faces of 1024 x 1024 pixels, made of CelebA's (Karras et al. 2018).

    python data/celebahq/prepare.py --source=DIR
    python data/celebahq/prepare.py --source=DIR --size=512

DIR holds what CelebAMask-HQ.zip of https://github.com/switchablenorms/CelebAMask-HQ unpacks to (CelebA-HQ-img/0.jpg,
CelebA-HQ-to-CelebA-mapping.txt, CelebAMask-HQ-attribute-anno.txt) or the images alone, or it is the zip itself.
With the mapping and, beside it, CelebA's list_eval_partition.txt the split is CelebA's; otherwise one in a hundred is
held out. Licence: non-commercial research only. Size: 3 GB fetched, 1.5 GB made at 256 pixels
(estimate). Time: minutes (estimate).
On disk: train-*.tar, val-*.tar (and test-*.tar), bpe.tiktoken where there are attributes (the captions list them),
meta.json, dropped.jsonl, sheet.png.
"""

import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from data.celeba.prepare import described, read_attributes, read_table
from data.prepare import find_file, list_images, make, need_source, run

source = ""  # folder that CelebAMask-HQ.zip unpacks to, or the zip, or a folder of images
out_dir = "data/celebahq"  # where the shards go
size = 256  # side in pixels
crop = "none"  # or center; they are square
quality = 95  # of JPEG; 0: PNG
min_side = 32  # pixels; images with a shorter side are dropped
drop_duplicates = True  # the first of equal images is kept
vocab_size = 512  # most tokens of a tokenizer trained on the captions; 0: none
shard_mb = 256.0  # size of a shard
workers = 4  # processes that decode and resize; 0: none but this


def items(images, splits, attributes):
    for path, image in images:
        name = os.path.basename(path)
        number = os.path.splitext(name)[0]
        item = dict(key=number, image=image)
        if number in splits:
            item["split"] = splits[number]
        if attributes.get(name):
            item |= dict(attributes=attributes[name], text=[described(attributes[name])])
        yield item


def prepare(cfg):
    source = need_source(cfg, "a folder with the images, or CelebAMask-HQ.zip")
    images = [(path, image) for path, image in list_images(source) if "mask-anno" not in path]  # faces, no masks
    mapping = find_file(source, "CelebA-HQ-to-CelebA-mapping.txt")
    partition = find_file(source, "list_eval_partition.txt", "list_eval_partition.csv")
    table = find_file(source, "CelebAMask-HQ-attribute-anno.txt")
    splits = {}
    if mapping and partition:
        of_celeba = read_table(partition)[0]
        with open(mapping, errors="replace") as f:  # idx orig_idx orig_file
            rows = [line.split() for line in f]
        part = {"0": "train", "1": "val", "2": "test"}
        rows = [row for row in rows if len(row) == 3 and row[2] in of_celeba]
        if odd := [row[2] for row in rows if of_celeba[row[2]][0] not in part]:
            raise ValueError(f"{partition} has {odd[0]} in no part of 0, 1, 2: fetch it again")
        splits = {row[0]: part[of_celeba[row[2]][0]] for row in rows}
    make(items(images, splits, read_attributes(table)[0] if table else {}), cfg, total=len(images))


if __name__ == "__main__":
    run(prepare, globals())
