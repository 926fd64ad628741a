"""MNIST: 60,000 + 10,000 handwritten digits of 28 x 28 pixels (LeCun et al. 1998).

    python data/mnist/prepare.py --download=True    # fetches 11 MB into data/mnist/raw, then makes train and val
    python data/mnist/prepare.py --source=DIR       # DIR has train-images-idx3-ubyte.gz and the other three files

On disk: {train,val}/images.npy (N, 28, 28, 1) uint8, labels.npy; classes.json.
28 can be halved twice, by autoencoder, unet_patch and the U-Net's levels together; --image_size=32 enlarges the digits.
"""

import gzip
import json
import math
import os
import sys
import zlib

import numpy as np

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import reject
from data.prepare import MAX_BYTES, check_source, fetch, is_made, reading, run, save

source = "data/mnist/raw"  # folder of the four .gz files
download = False  # fetch the files that are missing or damaged
mirror = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # where from
out_dir = "data/mnist"  # folder for train, val and classes.json

MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


def read_idx(path, ndim):
    """The uint8 array in a gzipped idx file: 00 00 08 ndim, big-endian sizes, the bytes."""
    check_source(path, f"a folder with the files of {mirror}, or add --download=True")
    with reading(path), gzip.open(path) as f:
        raw = f.read(MAX_BYTES)
    shape = np.frombuffer(raw[4 : 4 + 4 * ndim].ljust(4 * ndim, b"\0"), ">u4").tolist()
    data = np.frombuffer(raw[4 + 4 * ndim :], np.uint8)
    if raw[:4] != bytes([0, 0, 8, ndim]) or len(data) != math.prod(shape):
        reject(path, f"{len(data)} bytes after the header {raw[:4].hex()} of {shape}", "download it again")
    return data.reshape(shape)


def read_split(source, prefix):
    """images (N, 28, 28, 1) and labels (N,), both uint8, of the two files that begin with prefix."""
    images = read_idx(f"{source}/{prefix}-images-idx3-ubyte.gz", 3)
    labels = read_idx(f"{source}/{prefix}-labels-idx1-ubyte.gz", 1)
    if images.shape != (len(labels), 28, 28) or labels.max(initial=0) > 9:
        what = f"{prefix} images are {images.shape}, and {len(labels)} labels up to {labels.max(initial=0)}"
        reject(source, what, "download both files again")
    return images[..., None], labels


def prepare(cfg):
    if cfg.download:
        for name, md5 in MD5.items():
            fetch(f"{cfg.mirror.rstrip('/')}/{name}", f"{cfg.source}/{name}", md5)
    for split, prefix in (("train", "train"), ("val", "t10k")):
        images, labels = read_split(cfg.source, prefix)
        folder = f"{cfg.out_dir}/{split}"
        meta = dict(split=split, count=len(images), size=images.shape[1], crc32=zlib.crc32(images))
        if is_made(folder, meta):
            continue
        save(f"{folder}/images.npy", images)
        save(f"{folder}/labels.npy", labels.astype(np.int64))
        save(f"{cfg.out_dir}/classes.json", json.dumps([str(digit) for digit in range(10)]))
        save(f"{folder}/meta.json", json.dumps(meta))
        print(f"{folder}: {len(images)} images of {images.shape[1]} x {images.shape[2]}")


if __name__ == "__main__":
    run(prepare, globals(), packs=False)
