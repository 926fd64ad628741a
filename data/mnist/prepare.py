"""Turns the four original MNIST files into 32 x 32 pictures with labels: the digits 0 to 9, grey, padded by 2.

python data/mnist/prepare.py --download=True    # fetches 11 MB into data/mnist/raw, then makes train and val
python data/mnist/prepare.py --source=DIR       # from train-images-idx3-ubyte.gz and its three sisters in DIR
"""

import gzip
import hashlib
import http.client
import json
import math
import os
import sys
import urllib.request
import zlib

import numpy as np

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from configurator import configure
from data.prepare import is_made, write

source = "data/mnist/raw"  # folder of the four .gz files
download = False  # fetch those that are not in source, or damaged there
mirror = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # from here
out_dir = "data/mnist"  # train, val and classes.json go here

PAD = 2  # pixels on each side: 28 -> 32, which halves cleanly
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


def fetch(source, mirror):
    """Brings the files that are not yet in source, or not as they should be."""
    os.makedirs(source, exist_ok=True)
    for name, md5 in MD5.items():
        path, url = os.path.join(source, name), mirror.rstrip("/") + "/" + name
        if os.path.exists(path):
            with open(path, "rb") as f:
                if hashlib.md5(f.read()).hexdigest() == md5:
                    continue
        print(f"fetching {url}", flush=True)
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                data = response.read()
        except (OSError, http.client.HTTPException) as e:
            raise ValueError(f"{url}: {e}: try again, or put the file in {source} yourself") from e
        if hashlib.md5(data).hexdigest() != md5:
            raise ValueError(f"{url}: the {len(data)} bytes that came are not the original file: set another mirror")
        write(path, data)


def read_idx(path, ndim):
    """The array of bytes with ndim dimensions in a gzipped idx file: 00 00 08 ndim, big-endian sizes, the bytes."""
    if not os.path.exists(path):
        raise ValueError(
            f"{path} is missing: add --download=True, or set source to a folder with the files of {mirror}"
        )
    try:
        with gzip.open(path) as f:
            raw = f.read()
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path} does not unpack ({e}): fetch it again") from e
    if raw[:4] != bytes([0, 0, 8, ndim]) or len(raw) < 4 + 4 * ndim:
        raise ValueError(f"{path} begins with {raw[:4].hex()}, not 000008{ndim:02x} and {ndim} sizes: fetch it again")
    shape = np.frombuffer(raw, ">u4", ndim, offset=4).tolist()
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim)
    if len(data) != math.prod(shape):
        raise ValueError(f"{path} holds {len(data)} bytes for an array of {shape}: fetch it again")
    return data.reshape(shape)


def read_split(source, prefix):
    """images (N, 32, 32, 1) and labels (N,), both uint8, of the two files that begin with prefix."""
    images = read_idx(os.path.join(source, f"{prefix}-images-idx3-ubyte.gz"), 3)
    labels = read_idx(os.path.join(source, f"{prefix}-labels-idx1-ubyte.gz"), 1)
    if images.shape != (len(labels), 28, 28):
        raise ValueError(
            f"{source}: {len(labels)} {prefix} labels for images {images.shape}, want (N, 28, 28): fetch both"
        )
    if labels.max(initial=0) > 9:
        raise ValueError(f"{source}: a {prefix} label is {labels.max()}, want 0 to 9: fetch it again")
    return np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD)))[..., None], labels


def prepare(source, out_dir):
    """Makes train and val below out_dir where they are not there already."""
    for split, prefix in (("train", "train"), ("val", "t10k")):
        images, labels = read_split(source, prefix)
        folder = os.path.join(out_dir, split)
        meta = dict(split=split, count=len(images), size=images.shape[1], crc32=zlib.crc32(images))
        if is_made(folder, meta):
            continue
        write(os.path.join(folder, "images.npy"), images)
        write(os.path.join(folder, "labels.npy"), labels.astype(np.int64))
        write(os.path.join(out_dir, "classes.json"), json.dumps([str(digit) for digit in range(10)]).encode())
        write(os.path.join(folder, "meta.json"), json.dumps(meta).encode())
        print(f"{folder}: {len(images)} pictures of {images.shape[1]} x {images.shape[2]}")


if __name__ == "__main__":
    configure(globals())
    try:
        if download:
            fetch(source, mirror)
        prepare(source, out_dir)
    except (ValueError, OSError) as e:
        sys.exit(f"prepare.py: {e}")
