"""Images from disk, and the order in which training sees them.

    Dataset   the images at a path; item i is an image with its label, captions and key. DIR can hold any of
              these; the format is detected:
        npy      images.npy (N, H, W, C) uint8; optional labels.npy, captions.jsonl, meta.json {"classes": [...]}
        tar      shards of KEY.jpg (png, ...) with KEY.txt, KEY.cls or KEY.json, as img2dataset and webdataset write
        parquet  shards with image {bytes, path} or bytes, label, text or caption, as the Hugging Face hub has them
        folder   image files; sub-folders are classes; captions in KEY.txt, KEY.caption or KEY.json beside KEY.jpg, or
                 in metadata.jsonl, .csv or .parquet {file_name, text, label}
              and, beside any of them, classes.json: a list of names, or {index: name}.
        Semantic maps (a pixel is its class, 255 unknown) are KEY.map.png beside KEY.jpg, maps.npy (N, H, W), or a
        parquet column map; map_classes.json names the classes. Objects are a field or column
        objects: {"bbox": [[x, y, w, h] in pixels, ...], "categories": [...]}; object_classes.json names numbers.
        A path may be an fsspec URL of tar or parquet shards, s3://bucket/set/*.tar: see data/shards.py.
    Stream    its items as one endless sequence: position p is an item of epoch p // N, every epoch a new permutation.
    Buckets   streams of several sizes as one sequence, where each optimizer step is of one size.
    loader    the micro-batches of one rank from the sequence, starting at any step.

Everything random is a pure function of (seed, position): there is no state to save, and the sequence is the same for
any number of processes and workers. To read a tar of images:

    ds = Dataset("data/imagenette128", "train", image_size=128)
    stream = Stream(ds, seed=1, crop="random", flip=True)
    for batch in loader(stream, 0, 1000, batch_size=12): ...

Contents of a folder, and how fast it is decoded: python -m data.dataset DIR --image_size=256
"""

import argparse
import contextlib
import copy
import errno
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from checkpoint import POINTER, UserError, reject
from data import forms
from data.forms import HELD_OUT, IMAGES, NAMES, OWN, SPLITS, TALLIES
from data.shards import Indexes, Remote, StoredIndexes, digest

VISIBLE = 0.2  # share of a box's area that must be inside the crop, else the object is left out
GROUP_BYTES = 256 * 2**20  # parquet row groups kept per worker
WINDOW = 32  # shards that are shuffled together, where there are more
TIMEOUT = 600  # seconds after which a worker that returns no batch ends the run


class BadImage(ValueError):
    """An item that cannot be read or decoded; the message is "key: reason", on one line."""

    def __init__(self, message):
        super().__init__(printable(" ".join(message.split())))


def printable(text):
    """text, with escapes for the bytes of file names that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def as_bad_image(key, what="{}"):
    """Context in which any error becomes a BadImage; what: its message, with {} for the reason."""
    try:
        yield
    except Exception as e:  # a damaged file can raise anything
        if isinstance(e, MemoryError) or getattr(e, "errno", 0) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # this process lacks memory or file handles: the file may be good
        is_foreign = isinstance(e, UnidentifiedImageError)  # its own message has an address in it
        reason = "not an image that Pillow can read" if is_foreign else str(e) or type(e).__name__
        raise BadImage(f"{key}: {what.format(reason)}") from None


# --- stateless randomness ---


def seed_of(*parts):
    """A 63-bit seed: a pure function of the parts (numbers, strings), the same on every machine."""
    parts = tuple(part.item() if hasattr(part, "item") else part for part in parts)  # np.int64(3) and 3 are one part
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def uniform(*parts):
    """A number in [0, 1): a pure function of the parts."""
    return (seed_of(*parts) >> 10) / 2**53


@functools.lru_cache(maxsize=64)
def _round_keys(seed):
    return [seed_of(seed, "round", r) for r in range(6)]


def permute(index, n, seed):
    """index, an int or an int64 array, under a seeded permutation of range(n), in O(1) memory.

    A six-round Feistel network permutes the smallest 2^(2k) >= n; what falls outside range(n) is sent through again
    until it falls inside (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    k = (max(n - 1, 1).bit_length() + 1) // 2  # bits in half a word
    half, word = 2**k - 1, 2**64 - 1

    def feistel(x):  # the same lines for an int and for a uint64 array
        left, right = x >> k, x & half
        for key in _round_keys(seed):
            h = ((right ^ key) * 0xBF58476D1CE4E5B9) & word  # mixing as in splitmix64
            h = ((h ^ (h >> 29)) * 0x94D049BB133111EB) & word
            left, right = right, left ^ ((h ^ (h >> 32)) & half)
        return (left << k) | right

    low, high = (index.min(), index.max()) if isinstance(index, np.ndarray) and index.size else (index, index)
    assert not np.size(index) or 0 <= low <= high < n, f"index {low}..{high} is outside range({n})"
    if not isinstance(index, np.ndarray):
        x = feistel(int(index))
        while x >= n:
            x = feistel(x)
        return x
    x = feistel(index.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = feistel(x[outside])
    return x.astype(np.int64)


# --- pixels ---


def check_size(image):
    """Raise ValueError if a PIL image, not decoded yet, has more pixels than PIL's limit: it may be a bomb."""
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is over PIL.Image.MAX_IMAGE_PIXELS")


def to_mode(image, mode="RGB"):
    """Any PIL image as 8-bit L, RGB or RGBA: first frame, upright (EXIF), transparency on white but in RGBA, 16-bit
    gray scaled to 8, floats in [0, 1] to 0..255. Raises UserError for other floats and 32-bit integers, whose scale is
    unknown.
    """
    image.load()  # bad pixels are an error ...
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # ... bad EXIF is not
        pass
    if image.mode[0] in "IF":  # PIL's own convert clips them at 255
        gray = np.asarray(image).astype(np.float64)
        top = 65535 if is_16_bit else 1
        if image.mode == "I" and not is_16_bit or not (0 <= gray.min() and gray.max() <= top):
            what = "32-bit integers" if image.mode == "I" else "floats"
            raise UserError(f"{what} of {gray.min():g} to {gray.max():g}: save 8 or 16 bits, or floats in [0, 1]")
        return Image.fromarray((gray * (255 / top)).round().astype(np.uint8)).convert(mode)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def crop_box(width, height, sides, crop="center", u=None):
    """(x, y, w, h) of what is cut from an image for `sides`, (height, width) of the result; see Dataset.pixels."""
    if width * sides[0] > height * sides[1]:
        w, h = max(round(height * sides[1] / sides[0]), 1), height
    else:
        w, h = width, max(round(width * sides[0] / sides[1]), 1)
    if crop == "random":
        w, h = (max(round(side * (0.5 + 0.5 * u[0])), 1) for side in (w, h))
        return int((width - w + 1) * u[1]), int((height - h + 1) * u[2]), w, h
    return (width - w) // 2, (height - h) // 2, w, h


def crop_and_resize(image, sides, crop="center", u=None, resample=Image.Resampling.LANCZOS):
    """The `crop_box` of a PIL image, resized to `sides`; LANCZOS is antialiased."""
    x, y, w, h = crop_box(*image.size, sides, crop, u)
    image = image.crop((x, y, x + w, y + h))
    return image if (h, w) == sides else image.resize(sides[::-1], resample)


def to_tensor(image):
    """PIL L, RGB or RGBA -> float32 (C, H, W) in [-1, 1]."""
    x = torch.from_numpy(np.atleast_3d(np.array(image, dtype=np.float32)))  # (H, W, C)
    return (x / 127.5 - 1).permute(2, 0, 1).contiguous()


# --- the dataset ---


class Item(NamedTuple):
    """Location of an item."""

    key: str
    label: int  # class number, -1 for none
    header: dict  # of its shard, see data.forms.Index
    where: dict  # of image and map: (file, offset, size)
    record: dict  # {"text": captions, "objects": [[name, box], ...]}, those that it has, and the key in its shard


class Dataset:
    """Images at a path: ds[i] -> dict(image float32 (C,H,W) in [-1,1], label int or -1, text list of str, key str).

    image_size: a side in pixels, or (height, width), kept as sides = (H, W).  image_mode: L, RGB or RGBA, see to_mode.

    split: "train"; "val", which is the folder val/ (validation, valid, test), or shards named so, or, where there are
    none, the items with crc32(key) % 100 == 0, at least one; "all"; or one of those names itself. An item that does not
    decode raises BadImage. `counts` has the numbers of this split's images, labels, captions, maps and objects. Parquet
    is read by row groups: beyond some hundred MB, a shuffled set is read faster as tar.
    """

    def __init__(self, path, split="train", image_size=256, cache_dir="cache", cache_gb=64.0, image_mode="RGB"):
        assert split in ("all", *SPLITS[1:]), f"split {split!r}: choose train, val, test or all"
        sides = (image_size,) if isinstance(image_size, int) else image_size
        assert len(sides) in (1, 2) and min(sides) > 0, f"image_size {image_size!r}: give pixels, such as 256"
        self.path, self.sides, self.image_mode = str(path), (sides[0], sides[-1]), image_mode
        self.remote = Remote(self.path, cache_dir, cache_gb) if "://" in self.path else None
        if self.remote:
            self.root, paths = self.remote.folder, self.remote.names
            self.remote.copy(NAMES)
        elif os.path.isdir(self.path):
            self.root, paths = self.path, forms.list_files(self.path)
        elif os.path.exists(self.path):
            self.root, paths = os.path.dirname(self.path) or ".", [os.path.basename(self.path)]
        else:
            remedy = "pass --dataset=DIR, a folder of images or shards, or images.npy"
            reject(f"dataset {self.path}", "does not exist", remedy)
        self.format, self._indexes, self._left = self._index(paths, cache_dir)
        self.headers = self._indexes.headers
        if not any(header["n"] for header in self.headers):
            looked = "looked for images.npy, and in sub-folders too for *.tar, *.parquet and images that Pillow reads"
            if self.format == "parquet":
                looked = "put the encoded images, not their paths, into a column 'image'"
            looked = "looked for *.tar and *.parquet: remote images have to be in shards" if self.remote else looked
            if os.path.exists(f"{self.root}/prepare.py"):  # such as data/openimages, before it is run
                looked = f"run {self.root}/prepare.py (its docstring says how), or pass --dataset=DIR"
            found = f", left out: {', '.join(left)}" if (left := self._left_out()) else ""
            reject(f"dataset {self.path}", f"({self.format}) holds no images{found}", looked)
        self._set_split(split)
        self._name_classes()
        self._opened = OrderedDict()  # shard of this split -> its index, last used last
        self._groups = OrderedDict()  # parquet: (file, row group, name) -> column, last used last

    def _set_split(self, split):
        self._part, counts = self._choose_split(split)
        self.split, self.counts, self.shards = split, self._count(split), list(counts)
        self.bounds = np.cumsum([0, *counts.values()])  # (shards + 1,) int64: items before each shard
        if not len(self):
            splits = {header["split"] for header in self.headers if header["n"]} - {""}
            there = " and ".join(sorted(splits)) or "no split folders"
            remedy = "rename one to train, or pass its path" if split == "train" else "ask for those, or all"
            reject(f"dataset {self.path}", f"has no {split} images, it has {there}", remedy)

    def in_split(self, split):
        """The Dataset of another split; the path is not indexed again."""
        other = copy.copy(self)
        for name in ("fingerprint", "map_classes", "object_classes"):  # of one split, where they have been computed
            vars(other).pop(name, None)
        other._set_split(split)
        return other

    def __getstate__(self):  # a worker opens its own files
        return self.__dict__ | dict(_opened=OrderedDict(), _groups=OrderedDict())

    def __len__(self):
        return int(self.bounds[-1])

    def __getitem__(self, i):
        return dict(image=self.pixels(i), **self.meta(i))

    def __str__(self):
        """One line: what was opened, of all splits, and what was left out."""
        held_out = [split for split in HELD_OUT if any(h["n"] and h["split"] == split for h in self.headers)]
        counts = {split: self._count(split) for split in ("train", *(held_out or ["val"]))}
        sizes, shards = {split: count["images"] for split, count in counts.items()}, len(self.headers)
        of_all, of_train = self._count("all"), counts["train"]
        total, where = of_all["images"], f" in {shards} shards" if self.format in ("tar", "parquet") else ""
        splits = ", ".join(f"{split} {size}" for split, size in sizes.items())
        parts = [f"{self.format}, {total} images{where} ({splits})"]
        distinct = sum(header["distinct"] for header in self.headers)  # at most
        if not self.classes and forms.is_far_apart(self.num_classes - 1, distinct):
            labels = self._occurring(range(shards))
            parts.append(f"labels up to {labels[-1]}, of which {len(labels)} occur")
        elif self.num_classes:
            names = ", ".join(self.classes[:5] + ["..."] * (len(self.classes) > 5))
            parts.append(f"{self.num_classes} classes" + (f" ({names})" if names else ""))
        for name in TALLIES:
            if of_all[name] or name in ("labels", "captions"):
                part = f" (train {of_train[name]} of {of_train['images']})" if 0 < of_all[name] < total else ""
                parts.append(f"{name} on {of_all[name]} of {total}{part}")
        repeated = sum(header["repeated"] for header in self.headers)
        parts += [f"{repeated} keys repeated (files side by side are one item)"] if repeated else []
        left = self._left_out()
        outside = sum(h["n"] for h in self.headers if not h["split"])
        if outside and any(h["n"] and h["split"] == "train" for h in self.headers):
            left.append(f"{outside} images outside of {' and '.join(['train', *held_out])}")
        return printable(f"{self.path}: {', '.join(parts)}" + (f"; left out: {', '.join(left)}" if left else ""))

    def _left_out(self):
        """What lies at the path and is not read: a phrase for each reason, with a count and an example."""
        left = forms.Left(self._left)
        for header in self.headers:
            for reason, (count, example) in header["left"].items():
                left.add(reason, example, count)
        return [f"{count} {reason} ({example})" for reason, (count, example) in left.items()]

    # finding files, choosing a split

    def _index(self, paths, cache_dir):
        """(format, indexes, what is left out): of images.npy, else of the shards, unless there are as many image files
        outside of them, else of the folder.
        """
        npy = [path for path in paths if path.lower() in [f"{split}/images.npy".lstrip("/") for split in SPLITS]]
        if npy and not self.remote:
            indexes = Indexes([forms.index_npy(self.root, path) for path in npy])
            return "npy", indexes, forms.unread(paths, indexes.headers)
        form, shards, stamps = self._find_shards(paths)
        left = forms.Left()
        if shards:
            origin = self.path if self.remote else os.path.realpath(self.path)
            index = functools.partial(getattr(forms, f"index_{form}"), self._open_file)
            folder = f"{cache_dir}/index-{digest('v10', form, origin)}"
            indexes = StoredIndexes(folder, list(zip(shards, stamps)), index)
            n = sum(header["n"] for header in indexes.headers)
            images = [path for path in paths if path.lower().endswith(IMAGES) and os.path.basename(path) not in OWN]
            if self.remote or not images or n > len(images):
                return form, indexes, forms.unread(paths, indexes.headers)
            why = "with no more images than there are outside" if n else "without images"
            left.add(f".{form} files {why}", shards[0], len(shards))
        others = sorted(set(paths) - set(shards))
        return "folder", Indexes([] if self.remote else forms.index_folder(self.root, others)), left

    def _find_shards(self, paths):
        """(form, shards, their sizes and times): the tar or the parquet files, whichever have more bytes."""
        shards = [path for path in paths if os.path.basename(path).lower() not in forms.METADATA]
        by_form = {form: [path for path in shards if path.lower().endswith(f".{form}")] for form in ("tar", "parquet")}
        with ThreadPoolExecutor(16) as pool:  # on a network each takes a while
            stamp = self.remote.stamps.get if self.remote else lambda name: forms.stat(f"{self.root}/{name}")
            stamps = {form: list(pool.map(stamp, shards)) for form, shards in by_form.items()}
        form = max(stamps, key=lambda form: (sum(size or 0 for size, *_ in stamps[form]), len(stamps[form])))
        return form, by_form[form], stamps[form]

    def _choose_split(self, split):
        """(part, {shard: number of its items}) of a split.

        part: "all" items of these shards, or only their "train" or "val" part, where no shards are held out.
        """
        present = {header["split"] for header in self.headers if header["n"]}
        held_out = next((name for name in HELD_OUT if name in present), None)
        training = "train" if "train" in present else ""
        wanted = {"train": training, "val": held_out or training}.get(split, split)
        sizes = {s: h["n"] for s, h in enumerate(self.headers) if h["n"] and (split == "all" or h["split"] == wanted)}
        if split not in ("train", "val") or held_out or sum(sizes.values()) < 2:
            return "all", sizes
        held = {s: self.headers[s]["held"] for s in sizes}
        if not any(held.values()):  # few items: the one with the smallest crc32 is held out
            held[min(sizes, key=lambda s: self.headers[s]["least"])] = 1
        counts = {s: held[s] if split == "val" else sizes[s] - held[s] for s in sizes}
        return split, {s: count for s, count in counts.items() if count}

    def _count(self, split):
        """{"images": how many a split has, "labels": how many of them have one, ...}"""
        part, sizes = self._choose_split(split)
        counts = dict(images=sum(sizes.values())) | dict.fromkeys(TALLIES, 0)
        for s, size in sizes.items():
            header = self.headers[s]
            for name in TALLIES:
                total, held = header[name]
                counts[name] += held if part == "val" else total - held if size < header["n"] else total
        return counts

    def _open_shard(self, k):
        """(arrays, numbers of the rows) of the k-th shard of this split."""
        if k not in self._opened:
            self._opened[k] = self._load_shard(k)
            while len(self._opened) > 2 * WINDOW:
                self._opened.popitem(last=False)
        self._opened.move_to_end(k)
        return self._opened[k]

    def _load_shard(self, k):
        header, arrays = self.headers[self.shards[k]], self._indexes.load(self.shards[k])
        rows, count = np.arange(header["n"]), self.bounds[k + 1] - self.bounds[k]
        if self._part == "val":
            rows = rows[arrays["held"]]
        elif count < header["n"]:  # some are held out
            rows = np.delete(rows, arrays["held"])
        return arrays, rows

    def _item(self, i):
        """Item i of this split."""
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} is outside a dataset of {len(self)}")
        k = int(np.searchsorted(self.bounds, i, "right")) - 1
        (arrays, rows), header = self._open_shard(k), self.headers[self.shards[k]]
        label, *places, begin, size, _, _ = arrays["rows"][rows[i - self.bounds[k]]].tolist()
        record = json.loads(arrays["records"][begin : begin + size].tobytes())
        if self._class_of and label >= 0:
            label = self._class_of[header["names"][label] if header["named"] else str(label)]
        where = dict(image=places[:3], map=places[3:])
        return Item(header["prefix"] + record["key"], label, header, where, record)

    @functools.cached_property
    def fingerprint(self):
        """Hash of the images, not of their path: format, split, keys, sizes, modification times, and of local files 256
        samples of 4 KB. It does not see an edit that keeps size and time, outside of those samples.
        """
        h = hashlib.blake2b(repr((self.format, self.split, len(self))).encode(), digest_size=16)
        for s in self.shards:
            h.update(self.headers[s]["digest"].encode())
        files = range(len(self)) if self.format == "folder" else self.shards
        files = files[:: -(-len(files) // 256)]
        for file in () if self.remote else files:
            name = self.key(file) if self.format == "folder" else self.headers[file]["files"][0]
            with contextlib.suppress(OSError), open(f"{self.root}/{name}", "rb") as f:
                size, samples = os.path.getsize(f.name), 256 // len(files)
                for k in range(samples):  # the first one has the EXIF tags
                    f.seek(size * k // samples)
                    h.update(f.read(4096))
        return h.hexdigest()

    # names

    def _listed_names(self, *files):
        """The names in the first of these files that has some, [] where none has."""
        folders = [os.path.join(self.root, split) for split in SPLITS]
        if os.path.basename(os.path.abspath(self.root)) in SPLITS:  # the path is itself a split folder
            folders.append(os.path.dirname(os.path.abspath(self.root)))
        files = [os.path.join(folder, name) for folder in folders for name in files]
        return next((names for path in files if os.path.exists(path) and (names := forms.read_classes(path))), [])

    def _name_classes(self):
        """Sets classes, num_classes, and _class_of: {label or word of an index, as str: class}, {} for itself."""
        headers = self.headers
        if is_named := any(header["named"] for header in headers):  # then all labels are words
            numbers = self._occurring(s for s, header in enumerate(headers) if not header["named"])
            named = (name for header in headers if header["named"] for name in header["names"])
            names = forms.by_value({*named, *map(str, numbers)})
            highest = len(names) - 1
        else:
            names = next((header["names"] for header in headers if header["names"]), [])
            highest = max(header["highest"] for header in headers)
        self.classes = self._listed_names("classes.json", "meta.json") or names
        number = {name: i for i, name in reversed(list(enumerate(self.classes)))}
        words = [name for name in names if not name.isdecimal()]
        order = list(range(len(names)))  # order[i]: the class of names[i]
        if number.keys() >= set(names):
            order = [number[name] for name in names]
        elif len(names) != len(self.classes) or {*map(str.lower, words)} & {*map(str.lower, number)}:
            # as many names, all of them others, are the same classes, renamed
            what = f"has {len(names)} classes, classes.json {len(self.classes)}, and "
            what += f"{min(set(names) - number.keys())!r} is not among them"
            reject(f"dataset {self.path}", what, "list the same names, or {number: name} with one for each class")
        is_renumbered = order != list(range(len(names)))
        if self.classes and highest >= len(names if is_renumbered else self.classes):
            what = f"has label {highest} but only {len(self.classes)} class names"
            reject(f"dataset {self.path}", what, "add the others")
        self.num_classes = max(len(self.classes), highest + 1) if highest >= 0 else 0
        labels = names if is_named else map(str, range(len(names)))
        self._class_of = dict(zip(labels, order)) if is_named or is_renumbered else {}

    def _occurring(self, shards):
        """The labels in the indexes of these shards, sorted."""
        found = (np.unique(self._indexes.load(s)["rows"][:, 0]) for s in shards if self.headers[s]["labels"][0])
        return sorted({label for labels in found for label in labels.tolist() if label >= 0})

    # items

    def key(self, i):
        return self._item(i).key

    def meta(self, i):
        """dict(label, text, key) of item i, without its pixels."""
        item = self._item(i)
        return dict(label=item.label, text=item.record.get("text", []), key=item.key)

    def encoded(self, i):
        """The stored file of image i, as bytes; of npy its pixels."""
        item = self._item(i)
        with as_bad_image(item.key):
            return self._read(item, "image")

    def _open_image(self, item, part="image"):
        """The image or map of an item as PIL, decoded when it is used; None if it has no map."""
        data = self._read(item, part)
        if self.format == "npy" and data:
            shape = list(item.header["shape"])  # [H, W, C] or [H, W]
            shape = shape[:2] if part == "map" or shape[2:] == [1] else shape
            return Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape))
        return Image.open(io.BytesIO(data), formats=forms.FORMATS) if data else None

    def image(self, i):
        """Image i as PIL in image_mode, uncropped."""
        item = self._item(i)
        with as_bad_image(item.key), self._open_image(item) as image:
            check_size(image)
            return to_mode(image, self.image_mode)

    def pixels(self, i, crop="center", flip=False, u=None):
        """Image i as float32 (C,H,W) in [-1,1]: a rectangle of that shape cut from it, resized to H x W, up or down.

        crop "center" takes the largest one; "random" one of 0.5 to 1 of its sides (as latent-diffusion does), size and
        position from u = (size, x, y), three numbers in [0, 1).
        """
        image = to_tensor(crop_and_resize(self.image(i), self.sides, crop, u))
        return image.flip(-1) if flip else image

    def size(self, i):
        """(width, height) of image i, upright; only a PNG is decoded, whose EXIF may follow its pixels."""
        item = self._item(i)
        with as_bad_image(item.key), self._open_image(item) as image:
            return forms.upright_size(image, image.getexif())

    def in_buckets(self, multiple):
        """A Dataset for each of `bucket_sizes` that is nearest to some images, of those."""
        if self.format not in ("folder", "tar"):
            reject(f"dataset {self.path}", f"({self.format}) has no sizes for buckets", "use a folder or tar shards")
        whole = copy.copy(self)  # with sizes in its indexes, which nothing else needs
        if self.format == "tar":
            index = functools.partial(self._indexes.index, sized=True)
            whole._indexes = StoredIndexes(f"{self._indexes.folder}-sizes", self._indexes.jobs, index)
        sizes = bucket_sizes(self.sides, multiple)
        buckets = [Bucket(whole, sizes, number) for number in range(len(sizes))]
        counts = np.zeros((len(buckets), len(self.shards) + 1), np.int64)
        for k in range(len(self.shards)):
            arrays, rows = whole._open_shard(k)
            if self.format == "folder":
                with ThreadPoolExecutor(16) as pool:
                    files = [f"{self.root}/{self.key(i)}" for i in range(*self.bounds[k : k + 2])]
                    arrays["rows"][rows, -2:] = list(pool.map(forms.header_size, files))
            counts[:, k + 1] = [len(bucket._open_shard(k)[1]) for bucket in buckets]
        for bucket, count in zip(buckets, counts):
            bucket.bounds = np.cumsum(count)
        if not counts.any():
            reject(f"dataset {self.path}", "has no image whose size can be read", "look at the data")
        return [bucket for bucket in buckets if len(bucket)]

    # semantic maps and objects

    def _map(self, i):
        """The map of item i as 8-bit PIL, None if it has none."""
        item = self._item(i)
        with as_bad_image(item.key, "its map does not read ({})"):
            image = self._open_image(item, "map")
            if image is not None and image.mode not in ("L", "P", "1"):
                raise ValueError(f"mode {image.mode}: save one channel, 8-bit gray or palette, a pixel its class")
            # the palette's indices, not its colors
            return None if image is None else Image.fromarray(np.array(image, dtype=np.uint8))

    def map(self, i, crop="center", flip=False, u=None):
        """The semantic map of image i, (H,W) int64, -1 unknown, cut as `pixels` cuts the image; resizing is nearest."""
        image = self._map(i)
        if image is None:
            raise BadImage(f"{self.key(i)}: it has no map")
        if image.size != self.size(i):
            raise BadImage(f"{self.key(i)}: its map is {image.size}, the image {self.size(i)}: make them the same size")
        image = crop_and_resize(image, self.sides, crop, u, Image.Resampling.NEAREST)
        classes = torch.from_numpy(np.array(image, dtype=np.int64))
        classes[classes == 255] = -1
        return classes.flip(-1) if flip else classes

    @functools.cached_property
    def map_names(self):
        """Names of the maps' classes, [] without map_classes.json."""
        return self._listed_names("map_classes.json")

    @functools.cached_property
    def map_classes(self):
        """Number of classes of the maps: of map_classes.json, else of 500 maps, spread over all."""
        if self.map_names:
            return len(self.map_names)
        highest, bad = [], []
        for i in self._spread(500):
            try:
                if image := self._map(i):
                    classes = np.array(image)
                    highest.append(int(classes[classes < 255].max(initial=0)))
            except BadImage as e:
                bad.append(str(e))
        if bad and not highest:
            reject(f"dataset {self.path}", f"none of {len(bad)} maps reads ({bad[0]})", "correct them")
        return 1 + max(highest, default=-1)

    def objects(self, i):
        """[(name, [x, y, w, h] in pixels of the upright image), ...] of item i."""
        item, names = self._item(i), self._object_names
        objects = item.record.get("objects", [])
        if unknown := [name for name, _ in objects if names and isinstance(name, int) and name not in names]:
            what = f"object class {unknown[0]} is not among {len(names)}"
            raise BadImage(f"{item.key}: {what}: name all in object_classes.json")
        return [(names.get(name, str(name).strip()), box) for name, box in objects]

    def boxes(self, i, flip=False, crop="center", u=None):
        """Objects of item i: [(name, x0, y0, x1, y1), ...] in shares of the crop that `pixels` takes, y downwards.

        Boxes are clipped to the crop; those of which less than VISIBLE is inside are left out.
        """
        objects, visible = self.objects(i), []
        x, y, width, height = crop_box(*self.size(i), self.sides, crop, u) if objects else (0, 0, 1, 1)
        for name, (left, top, w, h) in objects:
            x0, x1 = (min(max(v - x, 0), width) for v in (left, left + w))
            y0, y1 = (min(max(v - y, 0), height) for v in (top, top + h))
            x0, x1 = (width - x1, width - x0) if flip else (x0, x1)
            if w > 0 and h > 0 and (x1 - x0) * (y1 - y0) >= VISIBLE * w * h:
                visible.append((name, x0 / width, y0 / height, x1 / width, y1 / height))
        return visible

    @functools.cached_property
    def _object_names(self):
        """{number: name} of objects' classes that are numbers."""
        return dict(enumerate(self._listed_names("object_classes.json", "classes.json")))

    @functools.cached_property
    def object_classes(self):
        """Names of the objects' classes: those of object_classes.json, else of 10000 items, spread over all."""
        if listed := self._listed_names("object_classes.json"):
            return listed
        names = set()
        for i in self._spread(10000):
            with contextlib.suppress(BadImage):
                names.update(name for name, _ in self.objects(i))
        return sorted(names)

    def _spread(self, n):
        """At most n items, spread over all."""
        return range(0, len(self), -(-len(self) // n))

    # reading

    def _open_file(self, name):
        return self.remote.open(name) if self.remote else open(f"{self.root}/{name}", "rb")

    def _read(self, item, part):
        """The encoded image or map of an item; None if it has no map."""
        file, at, size = item.where[part]
        if not size and part == "map":
            return None
        if self.format == "parquet":
            _, group, row = item.where["image"]
            data = forms.image_bytes(self._cell(item.header["columns"][part], item.header["files"][0], group, row))
        else:
            name = item.header["files"][file] if file >= 0 else item.key
            with self._open_file(name) as f:  # opened each time, so that workers share no file position
                f.seek(at)
                data = f.read(size)
            if len(data) < size:
                raise ValueError(f"{name} ends after {at + len(data)} bytes, the index says {at + size}")
        if not data and part == "image":
            raise ValueError("it has 0 bytes")
        if data and data.startswith(POINTER):
            raise ValueError("a git-lfs pointer: fetch the file itself (git lfs pull)")
        return data

    def _cell(self, column, file, group, row):
        """One parquet cell; some row groups are kept."""
        cached = (file, group, column)
        if cached not in self._groups:
            f = forms.open_parquet(file, self._open_file(file))
            # no threads: pyarrow's pool does not outlive a fork
            self._groups[cached] = f.read_row_group(group, columns=[column], use_threads=False).column(0)
            while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > GROUP_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(cached)
        return self._groups[cached][row].as_py()

    def prefetch(self, shards):
        """Starts to fetch remote shards, by number; each process starts at another, so that they share the work."""
        names = [self.headers[self.shards[k]]["files"][0] for k in shards]
        at = os.getpid() % max(len(names), 1)
        self.remote.prefetch(names[at:] + names[:at])


class Bucket(Dataset):
    """The images of a Dataset whose shape is nearest to sizes[number] of `bucket_sizes`, as images of that size."""

    def __init__(self, whole, sizes, number):
        self.__dict__.update(whole.__getstate__())
        self.whole, self.sizes, self.number, self.sides = whole, sizes, number, sizes[number]

    @property
    def fingerprint(self):
        return f"{self.whole.fingerprint} {self.number} of {self.sizes}"

    def _load_shard(self, k):
        arrays, rows = self.whole._open_shard(k)
        rows = rows[arrays["rows"][rows, -1] > 0]  # the others do not open
        width, height = np.log(arrays["rows"][rows, -2:]).T
        shapes = [math.log(w / h) for h, w in self.sizes]
        return arrays, rows[np.abs((width - height)[:, None] - shapes).argmin(1) == self.number]

    def image_sizes(self):
        """[[width, height], ...] of the images."""
        shards = (self._open_shard(k) for k in range(len(self.shards)))
        return [size for arrays, rows in shards for size in arrays["rows"][rows, -2:].tolist()]


def bucket_sizes(sides, multiple):
    """[(height, width), ...] of about the area of `sides`, no side more than twice the other: multiples of `multiple`,
    at least 1/16 of the side of a square apart.
    """
    area, sizes = sides[0] * sides[1], set()
    step = multiple * math.ceil(area**0.5 / 16 / multiple)
    for side in range(step, int((2 * area) ** 0.5) + 1, step):
        other = max(round(area / side / step), 1) * step
        sizes |= {(side, other), (other, side)}
    return sorted(size for size in sizes if max(size) <= 2 * min(size))


def train_and_validation(path, *options):
    """The training and validation images at a path; the same where there are too few to set any aside."""
    train = Dataset(path, "train", *options)
    try:
        return train, train.in_split("val")
    except ValueError:
        return train, train


# --- the endless sequence and its micro-batches ---


class Stream(torch.utils.data.Dataset):
    """stream[p] -> dict(image, label, text, caption, key, index, flip, bad): the endless sequence over N items.

    Position p is item permute(p % N) of epoch p // N; of more than WINDOW shards, the shards are permuted, and then the
    items of WINDOW shards at a time, so that few files are read at a time. Crop, flip and which caption depend on
    (seed, p) only. An item that does not decode is reported in bad and replaced by a function of (seed, p).
    With train=False: the items in their own order, center crop, no flip, first caption.
    """

    def __init__(self, dataset, seed, crop="center", flip=False, train=True):
        assert crop in ("center", "random"), f"crop {crop!r}: choose center or random"
        self.dataset, self.seed, self.train = dataset, seed, train
        self.crop, self.flip = (crop, flip) if train else ("center", False)
        self.is_windowed = train and len(dataset.shards) > WINDOW
        self._orders, self._prefetched = {}, None

    def _order(self, epoch):
        """(order, ends), (shards,) each: an epoch's permutation of the shards; ends[k] items are in the first k + 1."""
        if epoch not in self._orders:
            sizes = np.diff(self.dataset.bounds)
            order = permute(np.arange(len(sizes)), len(sizes), seed_of(self.seed, epoch, "shards"))
            latest = list(self._orders.items())[-1:]  # around the end of an epoch two are in use
            self._orders = dict(latest) | {epoch: (order, np.cumsum(sizes[order]))}
        return self._orders[epoch]

    def _window(self, epoch, at):
        """The window of position `at` of an epoch: (its first shard in the order, items before it, items in it)."""
        if not self.is_windowed:
            return 0, 0, len(self.dataset)
        _, ends = self._order(epoch)
        first = int(np.searchsorted(ends, at, "right")) // WINDOW * WINDOW
        before = int(ends[first - 1]) if first else 0
        return first, before, int(ends[first : first + WINDOW][-1]) - before

    def span(self, p):
        """(first, count) of the positions whose items may replace that of p: its window, else an epoch."""
        epoch, at = divmod(int(p), len(self.dataset))
        _, before, size = self._window(epoch, at)
        return (epoch * len(self.dataset) if self.is_windowed else 0) + before, size

    def item(self, p, attempt=0):
        """(index, epoch) of position p; attempt k > 0: of its k-th replacement, from the same window."""
        epoch, at = divmod(int(p), len(self.dataset))
        if not self.train and not attempt:
            return at, epoch
        first, before, size = self._window(epoch, at)
        if attempt:
            inside = seed_of(self.seed, "replace", p, attempt) % size
        else:
            seed = seed_of(self.seed, epoch, "window", first) if self.is_windowed else seed_of(self.seed, epoch)
            inside = permute(at - before, size, seed)
        if not self.is_windowed:
            return inside, epoch
        order, ends = self._order(epoch)
        k = np.searchsorted(ends, before + inside, "right")
        return int(self.dataset.bounds[order[k] + 1] - ends[k]) + before + inside, epoch

    def _prefetch(self, p):
        """Fetches the remote shards of the window after that of position p, in the background."""
        epoch, at = divmod(int(p), len(self.dataset))
        first, *_ = self._window(epoch, at)
        if self._prefetched != (epoch, first):
            self._prefetched = epoch, first
            following = self._order(epoch)[0][first + WINDOW :]
            self.dataset.prefetch((following if len(following) else self._order(epoch + 1)[0])[:WINDOW])

    def pick(self, p, attempt=0):
        """Position p without its pixels: dict(index, epoch, flip, u, text, caption, label, key).

        text is one str, caption number `caption` of the item, "" where it has none; u positions a random crop; attempt
        k > 0 is for the k-th replacement.
        """
        index, epoch = self.item(p, attempt)
        meta = self.dataset.meta(index)
        texts = meta["text"] or [""]
        caption = seed_of(self.seed, "text", p) % len(texts) if self.train else 0
        return dict(
            index=index,
            epoch=epoch,
            flip=self.flip and uniform(self.seed, "flip", p) < 0.5,
            u=tuple(uniform(self.seed, "crop", p, axis) for axis in "sxy") if self.crop == "random" else None,
            text=texts[caption],
            caption=caption,
            label=meta["label"],
            key=meta["key"],
        )

    def __getitem__(self, p):
        if self.is_windowed and self.dataset.remote:
            self._prefetch(p)

        def read(attempt):
            picked = self.pick(p, attempt)
            return picked | dict(image=self.dataset.pixels(picked["index"], self.crop, picked["flip"], picked["u"]))

        return first_good(read, self.dataset)


class Buckets(torch.utils.data.Dataset):
    """[p] of several streams as one endless sequence: each optimizer step, images_per_step positions, is of one stream.

    streams: of Dataset.in_buckets, perhaps as LatentCache or WithCondition. Each has steps in proportion to its images,
    in an order that is a new permutation every epoch, a function of the seed.
    """

    def __init__(self, streams, seed, images_per_step):
        self.streams, self.seed, self.images_per_step = streams, seed, images_per_step
        self.counts = np.array([len(stream.dataset) for stream in streams])

    def __str__(self):
        buckets = [stream.dataset for stream in self.streams]
        sizes = ", ".join(f"{len(bucket)} images at {bucket.sides[0]}x{bucket.sides[1]}" for bucket in buckets)
        left = len(buckets[0].whole) - self.counts.sum()
        return f"buckets: {sizes}" + (f"; left out: {left} that do not open" if left else "")

    def _place(self, step):
        """(stream, number of its step) of an optimizer step."""

        def before(epoch):  # steps of each stream
            return epoch * self.counts // self.images_per_step

        epoch = step * self.images_per_step // int(self.counts.sum())  # or a later one, as `before` rounds down
        while before(epoch + 1).sum() <= step:
            epoch += 1
        first, after = before(epoch), before(epoch + 1)
        ends = np.cumsum(after - first)
        place = permute(step - int(first.sum()), int(ends[-1]), seed_of(self.seed, epoch, "buckets"))
        number = np.searchsorted(ends, place, "right")
        return self.streams[number], int(after[number] - ends[number] + place)

    def sides(self, step):
        """(H, W) of the images of an optimizer step."""
        return self._place(step)[0].dataset.sides

    def __getitem__(self, p):
        step, slot = divmod(int(p), self.images_per_step)
        stream, number = self._place(step)
        return stream[number * self.images_per_step + slot]


def first_good(read, dataset):
    """read(attempt) | dict(bad) of the first attempt that raises no BadImage; bad: the messages of those before."""
    bad = []
    for attempt in range(100):
        try:
            item = read(attempt)
            return item | dict(bad=bad + item.get("bad", []))
        except BadImage as e:
            bad.append(str(e))
    some = "; ".join(list(dict.fromkeys(bad))[:3])
    reject(f"dataset {dataset.path}", f"all {len(bad)} images tried are bad ({some})", "replace or remove them")


def step_positions(step, micro, batch_size, grad_accum=1, rank=0, world=1):
    """One rank's positions for one micro-batch: slots (micro * world + rank) * batch_size + j of the global batch."""
    first = step * batch_size * grad_accum * world + (micro * world + rank) * batch_size
    return list(range(first, first + batch_size))


def collate(samples):
    """Samples -> dict(image (B,C,H,W), label and index (B,) int64, flip (B,) bool, text, key and bad: lists of str).

    Where samples have a condition, a dict of tensors (see data/tasks.py), these are stacked too.
    """
    batch = dict(
        image=torch.stack([sample["image"] for sample in samples]),
        label=torch.tensor([sample["label"] for sample in samples], dtype=torch.int64),
        index=torch.tensor([sample["index"] for sample in samples], dtype=torch.int64),
        flip=torch.tensor([sample["flip"] for sample in samples], dtype=torch.bool),
        text=[sample["text"] for sample in samples],
        key=[sample["key"] for sample in samples],
        bad=[line for sample in samples for line in sample["bad"]],
    )
    if "condition" in samples[0]:
        names = samples[0]["condition"]
        batch["condition"] = {name: torch.stack([sample["condition"][name] for sample in samples]) for name in names}
    return batch


def loader(stream, start_step, max_steps, batch_size, grad_accum=1, rank=0, world=1, workers=0, collate_fn=collate):
    """An iterator over this rank's collated micro-batches of steps start_step .. max_steps - 1."""
    steps = ((step, micro) for step in range(start_step, max_steps) for micro in range(grad_accum))
    positions = (step_positions(step, micro, batch_size, grad_accum, rank, world) for step, micro in steps)
    return in_batches(stream, positions, collate_fn, workers)


def in_batches(items, positions, collate_fn, workers=0):
    """An iterator over collate_fn([items[p] for p in some]) for each `some` of positions, in order."""
    if workers and len(tempfile.gettempdir()) > 70:  # a worker's socket there would be over the system's 103 or 107
        reject(f"TMPDIR={tempfile.gettempdir()}", "is too long for the sockets of workers", "set one of 70 characters")
    batches = torch.utils.data.DataLoader(
        items,
        batch_sampler=positions,
        collate_fn=collate_fn,
        num_workers=workers,  # PyTorch gives each worker one thread
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        timeout=TIMEOUT if workers else 0,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # for the workers' seed: the global generator is not advanced
    )
    return iter(batches)  # workers start here, not at the first batch


def begin_worker(number):
    """Blocks SIGINT and SIGTERM in a worker, except a SIGTERM that the training process itself sends.

    Ctrl-C, torchrun and slurm send both to all processes, but the training process still needs its workers: it saves
    before it ends.
    """

    def wait():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    about = "Describe a data set and measure how fast it is read."
    parser = argparse.ArgumentParser(prog="python -m data.dataset", description=about)
    parser.add_argument("path")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--buckets", type=int, default=0, help="report buckets with sides that are multiples of this")
    parser.add_argument("--seconds", type=float, default=10, help="how long to decode")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        ds = Dataset(args.path, "all", args.image_size)
        print(ds)
        if args.buckets:
            buckets = ds.in_buckets(args.buckets)
            sizes = [(size, bucket.sides) for bucket in buckets for size in bucket.image_sizes()]
            total = sum(math.prod(size) for size, _ in sizes)
            lost = 1 - sum(math.prod(crop_box(*size, ds.sides)[2:]) for size, _ in sizes) / total
            lost_in_buckets = 1 - sum(math.prod(crop_box(*size, sides)[2:]) for size, sides in sizes) / total
            print(Buckets([Stream(bucket, 0) for bucket in buckets], 0, 1))
            print(f"cropping loses {lost:.1%} of the pixels, in buckets {lost_in_buckets:.1%}")
        stream, count, bad, began, worked = Stream(ds, 0), 0, 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < args.seconds:
            bad += len(stream[count]["bad"])
            count += 1
    except UserError as e:
        sys.exit(f"data.dataset: {e}")
    per_core, rate = count / (time.process_time() - worked), count / (time.perf_counter() - began)
    print(f"{per_core:.0f} images/s per core at {args.image_size} px, {rate:.0f} with reading; {bad} bad of {count}")
