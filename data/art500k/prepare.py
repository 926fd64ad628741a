"""ART500K: half a million works of art, by artist, movement, medium and more (Mao, Cheung and She 2017).

    python data/art500k/prepare.py --source=DIR
    python data/art500k/prepare.py --source=DIR --group=Medium    # the folders below Medium/ are the classes

DIR holds the unpacked images: GROUP/NAME/TITLE##ID.jpg, of the groups Artists1, Artists2, "Art Movement", Medium.
Source: https://deepart.hkust.edu.hk/ART500K/art500k.html. Licence: non-commercial research only.
Size: not measured. Time: that of reading it. Some of its files are broken, and a work lies in several groups: broken
ones are dropped, and of equal ones the first is kept, that of the chosen group before others.
On disk: train-*.tar, val-*.tar (one in a hundred), classes.json (the names in the chosen group; works of other groups
have no label), bpe.tiktoken, meta.json, dropped.jsonl, sheet.png. A caption is the title, with the folder's name.
"""

import os
import re
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from data.prepare import list_images, make, need_source, run

source = ""  # folder of the groups
out_dir = "data/art500k"  # where the shards go
group = "Art Movement"  # the group whose folders are the classes
size = 256  # short side in pixels; smaller images stay as they are
crop = "none"  # keeps the ratio of the sides; center: the middle square
quality = 95  # of JPEG; 0: PNG
min_side = 64  # pixels; images with a shorter side are dropped
drop_duplicates = True  # the first of equal images is kept
vocab_size = 8192  # most tokens of a tokenizer trained on the captions; 0: none
shard_mb = 256.0  # size of a shard
workers = 4  # processes that decode and resize; 0: none but this


def place(path):
    """(group, name) of GROUP/NAME/TITLE##ID.jpg, wherever GROUP lies; "" for what is missing."""
    folders = ["", "", *path.split("/")[:-1]]
    return folders[-2], folders[-1]


def items(images, classes, group):
    for path, image in images:
        where, name = place(path)
        title = re.sub(r"\s+", " ", os.path.basename(path).rpartition(".")[0].split("##")[0].replace("_", " ")).strip()
        item = dict(key=path, image=image, group=where, text=[", ".join(filter(None, (title, name)))])
        if where == group:
            item["label"] = classes.index(name)
        yield item


def prepare(cfg):
    images = list_images(need_source(cfg, "the folder of Artists1, Art Movement, Medium and so on"))
    images.sort(key=lambda pair: (place(pair[0])[0] != cfg.group, pair[0]))
    classes = sorted({place(path)[1] for path, _ in images if place(path)[0] == cfg.group})
    if not classes:
        there = ", ".join(sorted({place(path)[0] for path, _ in images} - {""})[:9]) or "none"
        raise ValueError(
            f"{cfg.source} has no group {cfg.group!r} with images, it has {there}: set group to one of them"
        )
    make(items(images, classes, cfg.group), cfg, classes, len(images))


if __name__ == "__main__":
    run(prepare, globals())
