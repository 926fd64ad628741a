"""CIFAR-10: 50,000 + 10,000 photos of 32 x 32 pixels in ten classes (Krizhevsky 2009).

    python data/cifar10/prepare.py --download=True   # fetches the 170 MB binary version, checks it, makes the shards
    python data/cifar10/prepare.py --source=FILE     # from cifar-10-binary.tar.gz
    python data/cifar10/prepare.py --source=DIR      # from the hub's parquet: `hf download --repo-type dataset
                                                     # uoft-cs/cifar10 --local-dir DIR`, or another of that form
Source: https://www.cs.toronto.edu/~kriz/cifar.html. License: none stated; for research.
Size: 170 MB to download, 245 MB made (from the hub's parquet about as much). Time: half a minute on two cores.
On disk: train-*.tar, val-*.tar (the test set) of PNG, classes.json, meta.json, dropped.jsonl.
Identical images are kept (there are a few), so that the counts are the published ones.
"""

import os
import sys
import tarfile

import numpy as np

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import reject
from data.forms import shard_split
from data.prepare import check_source, fetch, pack, parquet_files, parquet_rows, reading, run

source = ""  # cifar-10-binary.tar.gz, or a folder of parquet files
download = False  # fetch it to data/cifar10/raw
out_dir = "data/cifar10"  # folder for the shards
size = 32  # >= 1: side in pixels
quality = 0  # in [0, 100]: of JPEG; 0 writes PNG, which is lossless; JPEG in parquet stays as it is
min_side = 1  # >= 0: images with a shorter side are dropped
drop_duplicates = False  # keep only the first of identical images
workers = 2  # >= 0: processes that decode and compress; 0 uses only this one
# further settings, the same for all data sets: see data/prepare.py

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue plane


def from_binary(path):
    with reading(path), tarfile.open(path, "r:gz") as tar:
        for member in tar:
            name = os.path.basename(member.name)
            if not name.endswith("_batch.bin") and not name.startswith("data_batch_"):
                continue
            if member.size % RECORD or member.size > 10_000 * RECORD:
                reject(path, f"{name} has {member.size} bytes, not up to 10000 x {RECORD}", "download it again")
            data = np.frombuffer(tar.extractfile(member).read(), np.uint8)
            for i, row in enumerate(data.reshape(-1, RECORD)):
                image = np.ascontiguousarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0))
                split = "val" if name.startswith("test") else "train"
                yield dict(key=f"{name[:-4]}/{i:05d}", image=image, split=split, label=int(row[0]))


def from_parquet(files):
    for path in files:
        name = os.path.basename(path).removesuffix(".parquet")
        split = "train" if shard_split(name) == "train" else "val"
        for row, image, record in parquet_rows(path, ["label"]):
            yield dict(key=f"{name}/{row:05d}", image=image, split=split, label=record["label"])


def prepare(cfg):
    source = cfg.source or (fetch(URL, "data/cifar10/raw/cifar-10-binary.tar.gz", MD5) if cfg.download else "")
    check_source(source, "cifar-10-binary.tar.gz or a folder of parquet files, or add --download=True")
    files = parquet_files(source)
    if not files and os.path.isdir(source):
        reject(source, "no parquet files", "set --source to cifar-10-binary.tar.gz or to their folder")
    pack(from_parquet(files) if files else from_binary(source), cfg, CLASSES)


if __name__ == "__main__":
    run(prepare, globals())
