"""CIFAR-10: 50,000 + 10,000 photos of 32 x 32 pixels in ten classes (Krizhevsky 2009).

    python data/cifar10/prepare.py --download=True   # fetches the 170 MB binary version, checks it, makes the shards
    python data/cifar10/prepare.py --source=FILE     # from cifar-10-binary.tar.gz
    python data/cifar10/prepare.py --source=DIR      # from the hub's parquet: `hf download --repo-type dataset
                                                     # uoft-cs/cifar10 --local-dir DIR`, or another of that form
Source: https://www.cs.toronto.edu/~kriz/cifar.html. Licence: none stated; for research.
Size: 170 MB fetched, 245 MB made (of the hub's parquet about as much). Time: half a minute on two cores.
On disk: train-*.tar, val-*.tar (the test set) of PNG, classes.json, meta.json, dropped.jsonl, sheet.png.
Equal images are kept (there are a few), so that the counts are the published ones.
"""

import os
import sys
import tarfile

import numpy as np

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from data.dataset import PIXELS, shard_part
from data.prepare import fetch, make, need_source, parquet_files, parquet_rows, run

source = ""  # cifar-10-binary.tar.gz, or a folder of parquet files
download = False  # fetch it to data/cifar10/raw
out_dir = "data/cifar10"  # where the shards go
size = 32  # side in pixels
crop = "none"  # or center; they are square
quality = 0  # of JPEG; 0: PNG, nothing is lost; parquet with JPEG in it stays as it is
min_side = 1  # pixels; images with a shorter side are dropped
drop_duplicates = False  # the first of equal images is kept
shard_mb = 256.0  # size of a shard
workers = 2  # processes that decode and compress; 0: none but this

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "md5:c32a1d4ab5d03f1284b67883e8d87530"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue plane


def from_binary(path):
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            name = os.path.basename(member.name)
            if not name.endswith("_batch.bin") and not name.startswith("data_batch_"):
                continue
            data = np.frombuffer(tar.extractfile(member).read(), np.uint8)
            if len(data) % RECORD:
                raise ValueError(f"{path}: {name} has {len(data)} bytes, no multiple of {RECORD}: fetch it again")
            for i, row in enumerate(data.reshape(-1, RECORD)):
                image = np.ascontiguousarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0))
                split = "val" if name.startswith("test") else "train"
                yield dict(key=f"{name[:-4]}/{i:05d}", image=image, split=split, label=int(row[0]))


def from_parquet(files):
    for path in files:
        name = os.path.basename(path)
        split = "train" if shard_part(name) == "train" else "val"
        for row, image, record in parquet_rows(path, PIXELS, ["label"]):
            yield dict(
                key=f"{name.removesuffix('.parquet')}/{row:05d}", image=image, split=split, label=record["label"]
            )


def prepare(cfg):
    if cfg.download and not cfg.source:
        cfg.source = fetch(URL, "data/cifar10/raw/cifar-10-binary.tar.gz", MD5)
    source = need_source(cfg, "cifar-10-binary.tar.gz or a folder of parquet files, or add --download=True")
    files = parquet_files(source)
    if not files and os.path.isdir(source):
        raise ValueError(f"{source} has no parquet files: set source to cifar-10-binary.tar.gz, or to their folder")
    make(from_parquet(files) if files else from_binary(source), cfg, CLASSES)


if __name__ == "__main__":
    run(prepare, globals())
