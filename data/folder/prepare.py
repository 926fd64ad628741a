"""Any folder of images, with or without captions and classes, as tar shards.

    python data/folder/prepare.py --source=DIR --out_dir=data/mine
    python data/folder/prepare.py --source=DIR --out_dir=data/mine --size=512 --vocab_size=8192

DIR is anything that data/dataset.py reads: images in folders (sub-folders are classes; train/ and val/ are splits;
captions in KEY.txt or KEY.json beside KEY.jpg, or in metadata.jsonl or .csv), tar shards of KEY.jpg with KEY.json, .txt
or .cls, or parquet. It can be trained on without this; this makes it small and fast, and leaves out broken and
duplicate images, and semantic maps.
Source and license: yours. Size: about 45 KB an image at 256 pixels and quality 95. Time: 200 JPEG
of 500 x 375 a second and core, 50 of 1024 x 768, 26 PNG of 1024 x 1024.
On disk: train-*.tar, val-*.tar (the images that data/dataset.py would hold out of DIR), test-*.tar if DIR has test/
beside val/, classes.json if there are classes, bpe.tiktoken if there are captions, meta.json, dropped.jsonl.
"""

import functools
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import reject
from data.dataset import BadImage, Dataset
from data.prepare import check_source, pack, run

source = ""  # folder of images, of tar shards or of parquet files
out_dir = "data/folder/shards"  # folder for the shards
vocab_size = 4096  # 0 or >= 256: most tokens of a tokenizer trained on the captions; 0 trains none
# further settings, the same for all data sets: see data/prepare.py


def items(splits):
    for split, dataset in splits.items():
        for i in range(len(dataset)):
            item = dict(key=dataset.key(i), image=functools.partial(dataset.encoded, i), split=split)
            try:
                meta, objects = dataset.meta(i), dataset.objects(i)
            except BadImage as e:
                yield item | dict(drop=f"broken: {e}")
                continue
            if meta["label"] >= 0:
                item["label"] = meta["label"]
            if meta["text"]:
                item["text"] = meta["text"]
            if objects:
                item["objects"] = dict(bbox=[box for _, box in objects], categories=[name for name, _ in objects])
            yield item


def prepare(cfg):
    source = check_source(cfg.source, "a folder of images, of tar shards or of parquet files")
    if os.path.realpath(cfg.out_dir).startswith(os.path.realpath(source) + os.sep):
        reject(cfg.out_dir, "is inside the source, whose images the shards would become", "set another --out_dir")
    everything = Dataset(source, "all")
    print(everything)
    if everything.format == "npy":
        reject(source, "has images.npy", "train on it as it is")
    if everything.counts["maps"]:
        print(f"{source}: the semantic maps are left out; for task=semantic train on it as it is")
    splits = {split: everything.in_split(split) for split in ("train", "val")[: len(everything)]}  # of one image no val
    there = {header["split"] for header in everything.headers if header["n"]}
    if "test" in there and there - {"", "train", "test"}:  # test/ beside val/; else test/ is val
        splits["test"] = everything.in_split("test")
    pack(items(splits), cfg, everything.classes, len(everything))


if __name__ == "__main__":
    run(prepare, globals())
