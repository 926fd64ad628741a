"""LSUN: scenes (bedroom, church_outdoor, ...; 126 thousand to 3 million photos each) from lmdb (Yu et al. 2015).

    python data/lsun/prepare.py --source=DIR                                  # all categories that are there
    python data/lsun/prepare.py --source=DIR --categories=bedroom --fraction=0.1

DIR holds bedroom_train_lmdb/, bedroom_val_lmdb/, church_outdoor_train_lmdb/, ..., which the zips of
`python download.py -c bedroom` of https://github.com/fyu/lsun unpack to. Reading them needs lmdb: pip install lmdb.
Source: https://www.yf.io/p/lsun. Licence: none stated; for research. Size: bedroom 43 GB, church_outdoor 2.3 GB
fetched; made at quality 95, 45 KB an image, three times as much (estimate). Time: 400 images/s and core.
On disk: train-*.tar, val-*.tar (the published 300 a category), classes.json (the categories), meta.json, dropped.jsonl,
sheet.png.
"""

import functools
import os
import re
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from data.prepare import in_fraction, make, need, need_source, run

source = ""  # folder with CATEGORY_train_lmdb/ and CATEGORY_val_lmdb/
out_dir = "data/lsun/shards"  # where the shards go
categories = ""  # which, with commas between; all that are there without
fraction = 1.0  # of the training images; a smaller fraction is a part of a larger one
size = 256  # short side in pixels
crop = "none"  # keeps the ratio of the sides; center: the middle square
quality = 95  # of JPEG; 0: PNG
min_side = 32  # pixels; images with a shorter side are dropped
drop_duplicates = True  # the first of equal images is kept
shard_mb = 256.0  # size of a shard
workers = 8  # processes that decode and resize; 0: none but this


def get(env, key):
    with env.begin(write=False) as transaction:
        return transaction.get(key)


def items(source, folders, classes, fraction):
    lmdb = need("lmdb", "reading LSUN")
    for category, split in folders:
        path = f"{source}/{category}_{split}_lmdb"
        try:
            env = lmdb.open(path, readonly=True, lock=False, readahead=False, max_readers=1)
        except lmdb.Error as e:
            raise ValueError(f"{path} does not open ({e}): unpack it again") from None
        with env.begin(write=False) as transaction:
            for key in transaction.cursor().iternext(keys=True, values=False):
                name = f"{category}/{key.decode(errors='replace')}"
                if split == "val" or in_fraction(name, fraction):
                    yield dict(
                        key=name, image=functools.partial(get, env, key), split=split, label=classes.index(category)
                    )


def prepare(cfg):
    source = need_source(cfg, "the folder with bedroom_train_lmdb and others like it")
    found = [re.fullmatch(r"(\w+)_(train|val)_lmdb", name) for name in sorted(os.listdir(source))]
    folders = [(match[1], match[2]) for match in found if match]
    there = sorted({category for category, _ in folders})
    wanted = [name.strip() for name in cfg.categories.split(",") if name.strip()] or there
    if missing := [name for name in wanted if name not in there]:
        raise ValueError(
            f"{source} has no {missing[0]}_train_lmdb, it has {', '.join(there) or 'none'}: unpack it there"
        )
    if not there:
        raise ValueError(f"{source} has no folder like bedroom_train_lmdb: unpack the zips there")
    wanted = sorted(wanted)
    need("lmdb", "reading LSUN")
    make(items(source, [f for f in folders if f[0] in wanted], wanted, cfg.fraction), cfg, wanted)


if __name__ == "__main__":
    run(prepare, globals())
