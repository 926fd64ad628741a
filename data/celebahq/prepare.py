"""CelebA-HQ: 30,000 faces of 1024 x 1024 pixels, made of CelebA's (Karras et al. 2018).

    python data/celebahq/prepare.py --source=DIR
    python data/celebahq/prepare.py --source=DIR --size=512

DIR has what CelebAMask-HQ.zip of https://github.com/switchablenorms/CelebAMask-HQ unpacks to (CelebA-HQ-img/0.jpg,
CelebA-HQ-to-CelebA-mapping.txt, CelebAMask-HQ-attribute-anno.txt) or the images only, or is the zip itself.
With the mapping and, beside it, CelebA's list_eval_partition.txt the split is CelebA's; otherwise one in a hundred is
held out. License: non-commercial research only. Size: 3 GB to download, 1.5 GB made at 256 pixels (estimate).
Time: minutes (estimate).
On disk: train-*.tar, val-*.tar (and test-*.tar), bpe.tiktoken if there are attributes (the captions list them),
meta.json, dropped.jsonl.
"""

import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from data.celeba.prepare import described, read_attributes, read_partition
from data.prepare import check_source, find_file, list_images, pack, run

source = ""  # folder that CelebAMask-HQ.zip unpacks to, or the zip, or a folder of images
out_dir = "data/celebahq"  # folder for the shards
vocab_size = 512  # 0 or >= 256: most tokens of a tokenizer trained on the captions; 0 trains none
# further settings, the same for all data sets: see data/prepare.py


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
    source = check_source(cfg.source, "a folder with the images, or CelebAMask-HQ.zip")
    images = [(path, image) for path, image in list_images(source) if "mask-anno" not in path]
    mapping = find_file(source, "CelebA-HQ-to-CelebA-mapping.txt")
    partition = find_file(source, "list_eval_partition.txt", "list_eval_partition.csv")
    table = find_file(source, "CelebAMask-HQ-attribute-anno.txt")
    splits = {}
    if mapping and partition:
        of_celeba = read_partition(partition)
        with open(mapping, errors="replace") as f:  # idx orig_idx orig_file
            rows = [line.split() for line in f]
        splits = {row[0]: of_celeba[row[2]] for row in rows if len(row) == 3 and row[2] in of_celeba}
    pack(items(images, splits, read_attributes(table)[0] if table else {}), cfg, total=len(images))


if __name__ == "__main__":
    run(prepare, globals())
