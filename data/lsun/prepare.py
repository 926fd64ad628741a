"""LSUN: scenes (bedroom, church_outdoor, ...; 126 thousand to 3 million photos each) from lmdb (Yu et al. 2015).

    python data/lsun/prepare.py --source=DIR                                  # all categories that are there
    python data/lsun/prepare.py --source=DIR --categories=bedroom --fraction=0.1

DIR has bedroom_train_lmdb/, bedroom_val_lmdb/, church_outdoor_train_lmdb/, ..., which the zips of
`python download.py -c bedroom` of https://github.com/fyu/lsun unpack to. Reading them needs lmdb: pip install lmdb.
Source: https://www.yf.io/p/lsun. License: none stated; for research. Size: bedroom 43 GB, church_outdoor 2.3 GB to
download; made at quality 95, 45 KB an image, three times as much (estimate). Time: 400 images/s and core.
On disk: train-*.tar, val-*.tar (the published 300 a category), classes.json (the categories), meta.json, dropped.jsonl.
"""

import functools
import os
import re
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import reject
from data.prepare import check_source, in_fraction, need, pack, reading, run

source = ""  # folder with CATEGORY_train_lmdb/ and CATEGORY_val_lmdb/
out_dir = "data/lsun/shards"  # folder for the shards
categories = ""  # which, with commas between; empty for all that are there
fraction = 1.0  # in (0, 1]: of the training images; a smaller fraction is a subset of a larger one
workers = 8  # >= 0: processes that decode and resize; 0 uses only this one
# further settings, the same for all data sets: see data/prepare.py


def get(env, key):
    with env.begin(write=False) as transaction:
        return transaction.get(key)


def items(lmdb, source, folders, classes, fraction):
    for category, split in folders:
        path = f"{source}/{category}_{split}_lmdb"
        with reading(path, "damaged", "unpack it again"):
            env = lmdb.open(path, readonly=True, lock=False, readahead=False, max_readers=1)
            with env.begin(write=False) as transaction:
                for key in transaction.cursor().iternext(keys=True, values=False):
                    name = f"{category}/{key.decode(errors='replace')}"
                    if split == "val" or in_fraction(name, fraction):
                        image = functools.partial(get, env, key)
                        yield dict(key=name, image=image, split=split, label=classes.index(category))


def prepare(cfg):
    source = check_source(cfg.source, "the folder with bedroom_train_lmdb and others like it")
    found = [re.fullmatch(r"(\w+)_(train|val)_lmdb", name) for name in sorted(os.listdir(source))]
    folders = [(match[1], match[2]) for match in found if match]
    there = sorted({category for category, _ in folders})
    wanted = sorted(name.strip() for name in cfg.categories.split(",") if name.strip()) or there
    missing = [name for name in wanted if name not in there]
    if missing or not there:
        what = f"no folder {(missing or ['bedroom'])[0]}_train_lmdb, only {', '.join(there) or 'none of that form'}"
        reject(source, what, "unpack the zips there")
    folders, lmdb = [folder for folder in folders if folder[0] in wanted], need("lmdb", "reading LSUN")
    pack(items(lmdb, source, folders, wanted, cfg.fraction), cfg, wanted)


if __name__ == "__main__":
    run(prepare, globals())
