"""ART500K: half a million works of art, by artist, movement, medium and more (Mao, Cheung and She 2017).

    python data/art500k/prepare.py --source=DIR
    python data/art500k/prepare.py --source=DIR --group=Medium    # the folders below Medium/ are the classes

DIR has the unpacked images: GROUP/NAME/TITLE##ID.jpg, of the groups Artists1, Artists2, "Art Movement", Medium.
Source: https://deepart.hkust.edu.hk/ART500K/art500k.html. License: non-commercial research only.
Size: not measured. Time: that of reading it. Some of its files are broken, and a work is in several groups: broken
and very small files are dropped, and of identical ones the first is kept, that of the chosen group before others.
On disk: train-*.tar, val-*.tar (one in a hundred), classes.json (the names in the chosen group; works of other groups
have no label), bpe.tiktoken, meta.json, dropped.jsonl. A caption is the title, with the folder's name.
"""

import os
import re
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import reject
from data.prepare import check_source, list_images, pack, run

source = ""  # folder of the groups
out_dir = "data/art500k"  # folder for the shards
group = "Art Movement"  # the group whose folders are the classes
min_side = 64  # >= 0: images with a shorter side are dropped
min_bytes = 5000  # >= 0: files with fewer bytes are dropped
vocab_size = 8192  # 0 or >= 256: most tokens of a tokenizer trained on the captions; 0 trains none
# further settings, the same for all data sets: see data/prepare.py


def folders_of(path):
    """(group, name) of GROUP/NAME/TITLE##ID.jpg, wherever GROUP is; "" for what is missing."""
    folders = ["", "", *path.split("/")[:-1]]
    return folders[-2], folders[-1]


def items(images, classes, group):
    for path, image in images:
        group_here, name = folders_of(path)
        title = re.sub(r"\s+", " ", os.path.basename(path).rpartition(".")[0].split("##")[0].replace("_", " ")).strip()
        item = dict(key=path, image=image, group=group_here, text=[", ".join(filter(None, (title, name)))])
        if group_here == group:
            item["label"] = classes.index(name)
        yield item


def prepare(cfg):
    images = list_images(check_source(cfg.source, "the folder of Artists1, Art Movement, Medium and so on"))
    images.sort(key=lambda pair: (folders_of(pair[0])[0] != cfg.group, pair[0]))
    groups = {folders_of(path) for path, _ in images}
    classes = sorted(name for group, name in groups if group == cfg.group)
    if not classes:
        there = ", ".join(sorted({group for group, _ in groups} - {""})[:9]) or "none"
        reject(cfg.source, f"no images in a group {cfg.group!r}, only in {there}", "set --group to one of them")
    pack(items(images, classes, cfg.group), cfg, classes, len(images))


if __name__ == "__main__":
    run(prepare, globals())
