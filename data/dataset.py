"""
Images from disk, and the order in which training sees them.

    Dataset   opens what it finds at a path and gives item i: image, label, captions, key. By looking, it knows
        npy      images.npy (N, H, W, C) uint8; if wanted labels.npy, captions.jsonl, meta.json {"classes": [...]}
        tar      shards of KEY.jpg (png, ...) with KEY.txt, KEY.cls or KEY.json, as img2dataset and webdataset write
        parquet  shards with image {bytes, path} or bytes, label, text or caption, as the Hugging Face hub has them
        folder   image files; sub-folders are classes; if wanted metadata.jsonl {file_name, text, label}
              and, beside any of them, classes.json: a list of names, or {index: name}.
        Semantic maps (a pixel is its class, 255 unknown) are KEY.map.png beside KEY.jpg, maps.npy (N, H, W), or a
        parquet column map; map_classes.json names the classes. Objects are a field or column
        objects: {"bbox": [[x, y, w, h] in pixels, ...], "categories": [...]}; object_classes.json names numbers.
        A path may be an fsspec URL of tar or parquet shards, s3://bucket/set/*.tar: see data/shards.py.
    Stream    makes of it one endless sequence: position p is an item of epoch p // N, every epoch a new permutation.
    loader    cuts the sequence into micro-batches, for this rank, from any step on; starts dead workers again.

Everything random is a pure function of (seed, position): there is no state to save, and the sequence is the same for
any number of processes and workers. To read a tar of images:

    ds = Dataset("data/imagenette128", "train", image_size=128)
    stream = Stream(ds, seed=1, crop="random", flip=True)
    for batch in loader(stream, 0, 1000, batch_size=12): ...

What is in a folder, and how fast it decodes: python -m data.dataset DIR --image_size=256
"""

import contextlib
import errno
import faulthandler
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from data.shards import FILES, SIDECAR, Index, Remote, Table, as_runs, open_table, read_arrays, spread, write_whole

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif")
HELD_OUT = ("val", "validation", "valid", "test")  # names that mean validation; where several are present, the first
PARTS = ("", "train", *HELD_OUT)  # where an item lies: a split folder, shards named so, or neither
CAPTIONS = ("text", "caption", "captions", "txt")  # the fields that hold captions, in JSON and parquet
LABELS = ("label", "labels", "cls")
PIXELS = ("image", "img", "jpg", "jpeg", "png", "webp")  # the parquet column that holds the image
MAPS = ("map", "segmentation", "annotation")  # and that with semantic maps
OBJECTS, CATEGORIES = ("objects",), ("categories", "category")
VISIBLE = 0.2  # share of a box's area that must lie inside the crop, else the object is not there
NAMES = ("classes.json", "meta.json", "map_classes.json", "object_classes.json")
PASSING = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)  # read again
GROUP_BYTES = 256 * 2**20  # parquet row groups kept per worker


def is_lack(error):
    """Whether it is this process that lacks memory or file handles: then what it reads may well be good."""
    return isinstance(error, MemoryError) or getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class BadImage(ValueError):
    """An item that cannot be read or decoded; the message is "key: reason", on one line."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))


@contextlib.contextmanager
def named(key, what="{}"):
    """What goes wrong within is a BadImage, unless this process is to blame; what: what is said around the reason."""
    try:
        yield
    except Exception as e:  # a damaged file can raise anything
        if is_lack(e):
            raise
        is_foreign = isinstance(e, UnidentifiedImageError)  # its own message has an address in it
        reason = "not an image that Pillow can read" if is_foreign else str(e) or type(e).__name__
        raise BadImage(f"{key}: {what.format(reason)}") from None


# -----------------------------------------------------------------------------
# stateless randomness


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
    """
    Where a seeded permutation of range(n) sends index, an int or an int64 array, in O(1) memory.

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
    if np.size(index) and not 0 <= low <= high < n:
        raise ValueError(f"index {low}..{high} is outside range({n})")
    if not isinstance(index, np.ndarray):
        x = feistel(int(index))
        while x >= n:
            x = feistel(x)
        return x
    x = feistel(index.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = feistel(x[outside])
    return x.astype(np.int64)


# -----------------------------------------------------------------------------
# pixels


def to_rgb(image):
    """Any PIL image as 8-bit RGB: first frame, upright (EXIF), transparency on white, 16-bit grey scaled to 8."""
    image.load()  # bad pixels are an error ...
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # ... bad EXIF is not
        pass
    if image.mode.startswith("I"):  # I;16, I;16B, I (16-bit PNG in older Pillow); PIL's own convert clips them at 255
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop_square(width, height, crop="center", u=None):
    """(x, y, side) of the square that is cut from a picture; see Dataset.pixels."""
    short = min(width, height)
    if crop == "random":
        side = max(round(short * (0.5 + 0.5 * u[0])), 1)
        return int((width - side + 1) * u[1]), int((height - side + 1) * u[2]), side
    return (width - short) // 2, (height - short) // 2, short


def to_tensor(image):
    """PIL RGB -> float32 (3, H, W) in [-1, 1]."""
    x = torch.from_numpy(np.array(image, dtype=np.float32))  # (H, W, 3)
    return (x / 127.5 - 1).permute(2, 0, 1).contiguous()


# -----------------------------------------------------------------------------
# what is in a folder or a shard: an Index of each, see data/shards.py

NO_TEXT, PLAIN_TEXT, JSON_TEXT, PARQUET_TEXT = range(4)


def index_folder(root, images, tables):
    tops = {path.split("/")[0] for path in images if "/" in path}
    # train/ and val/ are splits; train/ among airplane/ and boat/ is a class
    is_split = tops <= set(PARTS) or ("train" in tops and tops & set(HELD_OUT))
    splits = tops & set(PARTS) if is_split else set()
    described = {}  # path -> (label, where its line is)
    for number, name in enumerate(tables):
        for at, size, record in json_lines(f"{root}/{name}"):
            if not isinstance(field(record, ["file_name"]), str):
                raise ValueError(f"{root}/{name} has a line without file_name: make each {{file_name, text, label}}")
            path = os.path.normpath(os.path.join(os.path.dirname(name), record["file_name"]))
            described[path] = field(record, LABELS), (JSON_TEXT, number, at, size)
    if described and described.keys().isdisjoint(images):
        raise ValueError(f"{root}: metadata.jsonl names no image here: give each file_name relative to metadata.jsonl")
    # without its split, a path starts with its class; as on the Hugging Face hub, labels in metadata.jsonl go first,
    # and a lone images/ beside it is no class
    split_of = [path.split("/")[0] if path.split("/")[0] in splits else "" for path in images]
    inner = [path[len(split) :].lstrip("/") for path, split in zip(images, split_of)]
    classes = sorted({path.split("/")[0] for path in inner if "/" in path})
    if any(label is not None for label, _ in described.values()) or (described and len(classes) == 1):
        classes = []
    number = {name: i for i, name in enumerate(classes)}
    parts = []  # an Index a run of paths of the same split
    for path, split, below in zip(images, split_of, inner):
        label, text = described.get(path, (None, (NO_TEXT, 0, 0, 0)))
        label = number.get(below.split("/")[0]) if classes and "/" in below else label
        size = os.path.getsize(f"{root}/{path}") if os.path.exists(f"{root}/{path}") else 0  # 0: a dangling link
        if not parts or parts[-1].part != split:
            parts.append(Index(split, tables, names=classes))
        parts[-1].add(path, (-1, 0, size), label, text)
    return parts


def index_tar(opened, shard):
    """opened(shard) is its file."""
    index, samples = Index(shard_part(shard), [shard], f"{shard[:-4]}/"), {}  # samples: key -> {ending: (offset, size)}
    with opened(shard) as f:
        index.content = end = os.fstat(f.fileno()).st_size
        try:
            with tarfile.open(fileobj=f, mode="r:") as tar:
                for member in tar:
                    folder, _, name = member.name.removeprefix("./").rpartition("/")
                    stem, _, extension = name.partition(".")  # webdataset: the key ends at the first dot
                    if member.isfile() and stem and member.offset_data + member.size <= end:
                        sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                        sample["." + extension.lower()] = (member.offset_data, member.size)
        except tarfile.TarError as e:
            print(f"{f.name} is damaged ({e}): it is read up to there, {len(samples)} items")
        for key, parts in samples.items():
            image = next((parts[extension] for extension in parts if extension in IMAGES), None)
            if image is None:
                continue
            label, text = None, (NO_TEXT, 0, 0, 0)
            if ".json" in parts:
                f.seek(parts[".json"][0])
                label = field(parse(f.read(parts[".json"][1])), LABELS)
                text = (JSON_TEXT, 0, *parts[".json"])
            if ".cls" in parts:
                f.seek(parts[".cls"][0])
                label = f.read(parts[".cls"][1]).decode("utf-8", "replace")
            if ".txt" in parts:
                text = (PLAIN_TEXT, 0, *parts[".txt"])
            beside = (*parts.get(".map.png", (0, 0)), *parts.get(".json", (0, 0)))
            index.add(key, (0, *image), label, text, beside)
    return index


def index_parquet(opened, shard):
    file = opened(shard)
    f, size, path = open_parquet(file.name, file), os.fstat(file.fileno()).st_size, file.name
    columns = f.schema_arrow.names
    if not any(name in columns for name in PIXELS):
        raise ValueError(f"{path} has the columns {columns}: call the one with the images {PIXELS[0]!r}")
    label = next((name for name in LABELS if name in columns), None)
    if f.metadata.num_rows > 8 * size:  # it would be a list of as many
        raise ValueError(f"{path} declares {f.metadata.num_rows} rows: it is damaged, fetch it again")
    try:
        labels = f.read(columns=[label], use_threads=False).column(0).to_pylist() if label else []
    except Exception as e:  # of many kinds, and several lines
        raise ValueError(f"{path} is damaged ({' '.join(str(e).split())}): fetch it again") from None
    index = Index(shard_part(shard), [shard], f"{shard.removesuffix('.parquet')}/", hub_names(f, label), size)
    kind = PARQUET_TEXT if any(name in columns for name in CAPTIONS) else NO_TEXT
    rows = [(g, row) for g in range(f.num_row_groups) for row in range(f.metadata.row_group(g).num_rows)]
    for i, where in enumerate(rows):
        index.add(f"{i:06d}", (0, *where), labels[i] if label else None, (kind, 0, *where))
    return index


def index_npy(root, paths):
    parts = []
    for path in paths:
        folder = path.removesuffix("images.npy")
        images, labels, texts, maps = open_npy(f"{root}/{path}"), None, None, None
        good_shape = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
        if images.dtype != np.uint8 or not good_shape or not images.flags.c_contiguous:
            have = f"{images.dtype} {images.shape}"
            raise ValueError(f"{root}/{path} is {have}: make it uint8 (N,H,W,C), C 1, 3 or 4, in C order")
        if os.path.exists(f"{root}/{folder}labels.npy"):
            labels = open_npy(f"{root}/{folder}labels.npy").reshape(-1).tolist()
        if os.path.exists(f"{root}/{folder}captions.jsonl"):
            lines = json_lines(f"{root}/{folder}captions.jsonl")
            texts = [(JSON_TEXT, 1, at, size) for at, size, _ in lines]
        for name, values in (("labels.npy", labels), ("captions.jsonl", texts)):
            if values is not None and len(values) != len(images):
                raise ValueError(f"{root}/{folder}{name} has {len(values)} entries, not {len(images)}: one an image")
        if os.path.exists(f"{root}/{folder}maps.npy"):
            maps = open_npy(f"{root}/{folder}maps.npy")
            if maps.dtype != np.uint8 or maps.shape != images.shape[:3] or not maps.flags.c_contiguous:
                have = f"{maps.dtype} {maps.shape}"
                raise ValueError(f"{root}/{folder}maps.npy is {have}: make it uint8 {images.shape[:3]}, in C order")
        size = images.nbytes // max(len(images), 1)
        area = size // math.prod(images.shape[3:])  # bytes of a map
        index = Index(folder.rstrip("/"), [path, folder + "captions.jsonl", folder + "maps.npy"], folder)
        for i in range(len(images)):
            where = (0, images.offset + i * size, size)
            text = texts[i] if texts else (NO_TEXT, 0, 0, 0)
            beside = (0, 0, 0, 0) if maps is None else (maps.offset + i * area, area, 0, 0)
            index.add(f"{i:08d}", where, labels[i] if labels else None, text, beside)
        parts.append(index)
    return parts


def list_files(root):
    """Every file under root as a sorted relative path; links are followed, hidden files left out."""
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up would never end
            folders[:], files = [], []
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        inside = folder[len(root) :].strip("/")
        found += [f"{inside}/{name}".lstrip("/") for name in files if not name.startswith(".")]
    return sorted(found)


def shard_part(path):
    """The part that a shard belongs to: its folder train/ or val/, or its name, as in val-00000.tar."""
    *folders, name = path.split("/")
    named = re.match(r"(train|validation|valid|val|test)(?![a-z])", name)
    return next((folder for folder in folders if folder in PARTS), named[1] if named else "")


def parse(text):
    """JSON, or {} where it is damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {}


def field(record, names):
    """The first of these fields that a JSON object has, else None."""
    record = record if isinstance(record, dict) else {}
    return next((record[name] for name in names if record.get(name) is not None), None)


def captions_of(value):
    """list of str from a caption, a list of them, or a JSON object that holds either."""
    value = field(value, CAPTIONS) if isinstance(value, dict) else value
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text]


def json_lines(path):
    """(offset, size, value) of every line that is not blank."""
    at = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield at, len(line), json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise ValueError(f"{path} line {number} is not JSON ({e}): mend or delete it") from None
            at += len(line)


def read_classes(path):
    """Class names from JSON: a list, an object {index: name}, or {"classes": list}."""
    try:
        with open(path, encoding="utf-8") as f:
            names = json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({e}): mend it, or remove it") from None
    if isinstance(names, dict):
        count = 1 + max((int(i) for i in names if re.fullmatch("[0-9]{1,9}", i)), default=-1)
        if count > 100 * len(names) + 100_000:
            raise ValueError(f"{path} names {len(names)} classes up to number {count - 1}: number them from 0")
        names = names.get("classes", [names.get(str(i), str(i)) for i in range(count)])
    return [str(name) for name in names] if isinstance(names, list) else []


def read_sidecar(shard, about, keys, table):
    """The Index of a shard from what stands beside it, which may lie: all that can be is made anew."""
    if table[:, FILES].any() or table.min(initial=-1) < -1:
        raise ValueError(f"{shard}{SIDECAR} leads to other files")
    index = Index(shard_part(shard), [shard], os.path.splitext(shard)[0] + "/", about["names"], about["content"])
    for key, (label, *numbers) in zip(keys, table.astype(np.int64).tolist()):
        if any(min(numbers[at : at + 2]) < 0 or sum(numbers[at : at + 2]) > about["content"] for at in (1, 5, 7, 9)):
            raise ValueError(f"{shard}{SIDECAR} leads out of {shard}")
        word = about["names"][label] if about["named"] and label >= 0 else label
        index.add(os.fsdecode(key), numbers[:3], word, numbers[3:7], numbers[7:])
    return index


def open_npy(path):
    """The array in a .npy file, mapped; ValueError says what is wrong with the file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.ndarray):
            return array
        reason = "it is an .npz"
    except Exception as e:  # headers are read as Python's literals, which fail in many ways
        reason = " ".join((str(e) or type(e).__name__).split())[:200]
    raise ValueError(f"{path} does not load as .npy ({reason}): write it again") from None


def hub_names(f, column):
    """Class names of a parquet file's column, which the Hugging Face hub keeps in the schema; [] without."""
    told = parse((f.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    for name in ("info", "features", column, "names"):
        told = field(told, [name])
    return [str(name) for name in told] if isinstance(told, list) else []


def open_parquet(path, file=None):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        f = pyarrow.parquet.ParquetFile(file or path, pre_buffer=False)
        f.schema_arrow.names  # noqa: B018  where some damage shows
        return f
    except Exception as e:  # of many kinds
        reason = " ".join(str(e).split())
        raise ValueError(f"{path} does not open as parquet ({reason}): fetch or write it again") from None


def open_in(root, name):
    return open(f"{root}/{name}", "rb")


# -----------------------------------------------------------------------------
# the dataset


class Dataset:
    """
    Images at a path: ds[i] -> dict(image float32 (3,S,S) in [-1,1], label int or -1, text list of str, key str).

    split: "train"; "val", which is the folder val/ (validation, valid, test), or shards named so, or, where there are
    none, the items with crc32(key) % 100 == 0, at least one; "all"; or one of those names itself. An item that does not
    decode raises BadImage. Parquet is read by row groups: beyond some hundred MB, a shuffled set is read faster as tar.
    """

    def __init__(self, path, split="train", image_size=256, cache="cache", cache_gb=64.0):
        self.path, self.split, self.image_size = str(path), split, image_size
        if split not in ("all", *PARTS[1:]):
            raise ValueError(f"split {split!r} is not known: choose train, val, test or all")
        if not isinstance(image_size, int) or image_size <= 0:
            raise ValueError(f"image_size {image_size!r} is not a positive whole number: give pixels, such as 256")
        self.remote = Remote(self.path, cache, cache_gb) if "://" in self.path else None
        if self.remote:
            self.root, paths, self._open = self.remote.folder, self.remote.names, self.remote.open
            self.remote.copy(NAMES)
        elif not os.path.exists(self.path):
            remedy = "pass --dataset=DIR, a folder of images, tar or parquet shards, or images.npy"
            raise FileNotFoundError(f"dataset {self.path} is not there: {remedy}")
        else:
            self.root = self.path if os.path.isdir(self.path) else os.path.dirname(self.path) or "."
            paths = list_files(self.root) if os.path.isdir(self.path) else [os.path.basename(self.path)]
            self._open = functools.partial(open_in, self.root)
        npy = [path for path in paths if path in [f"{part}/images.npy".lstrip("/") for part in PARTS]]
        tars = [path for path in paths if path.endswith(".tar")]
        tables = [path for path in paths if path.endswith(".parquet")]
        shards = tars or tables  # tar first: img2dataset writes a table beside every one
        if shards and (self.remote or not npy):
            self.form, indexed = ("tar", index_tar) if tars else ("parquet", index_parquet)
            self._index = functools.partial(indexed, self._open)
            place = self.path if self.remote else os.path.realpath(self.path)
            jobs = list(zip(shards, self._stamps(shards)))
            self.table = open_table(cache, (self.form, place), jobs, self._arrays)
        elif npy and not self.remote:
            self.form, self.table = "npy", Table.of([index.arrays() for index in index_npy(self.root, npy)])
        else:
            images = [path for path in paths if path.lower().endswith(IMAGES)]
            maps = {path for path in images if path.endswith(".map.png")}
            if maps:  # a map is no image, unless it stands alone
                stems = {os.path.splitext(path)[0] for path in images}
                images = [path for path in images if path not in maps or path.removesuffix(".map.png") not in stems]
            metadata = [path for path in paths if os.path.basename(path) == "metadata.jsonl"]
            indexes = [] if self.remote else index_folder(self.root, images, metadata)
            self.form, self.table = "folder", Table.of([index.arrays() for index in indexes])
        if not self.table:
            if os.path.exists(f"{self.root}/prepare.py"):  # data/openimages, say, as it comes
                line = f"dataset {self.path} is not made yet: run {self.root}/prepare.py (its docstring says how)"
                raise FileNotFoundError(f"{line}, or pass --dataset=DIR, a folder of images or shards")
            looked = f"looked for images.npy, *.tar, *.parquet and {' '.join(IMAGES)}, in sub-folders too"
            looked = "looked for *.tar and *.parquet: images from afar have to be in shards" if self.remote else looked
            raise FileNotFoundError(f"dataset {self.path} ({self.form}) holds no images: {looked}")
        self.files, self.window = self.table.files, 32 if self.remote else 0
        self.classes, self._renumbered = self._name_classes(self.table.names, self.table.highest)
        self.num_classes = max(len(self.classes), self.table.highest + 1) if self.table.highest >= 0 else 0
        self.fingerprint, self.text_fingerprint = self._fingerprint("digest_of"), self._fingerprint("texts_of")
        self._groups = OrderedDict()  # parquet: (file, row group, names) -> column, the latest last

    def __getstate__(self):  # a worker maps its own
        kept = {name: value for name, value in self.__dict__.items() if name != "_runs"}
        return kept | {"_groups": OrderedDict()}

    def _stamps(self, shards):
        """What tells the state of each shard from an earlier one."""
        if self.remote:
            return [self.remote.stamps[shard] for shard in shards]

        def stamp(shards):
            stats = [os.stat(f"{self.root}/{shard}") for shard in shards]
            return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

        with ThreadPoolExecutor(16) as pool:  # on a network each takes a while
            return sum(pool.map(stamp, [shards[at : at + 500] for at in range(0, len(shards), 500)]), [])

    def _arrays(self, shard):
        """The Index of a shard, as arrays: beside one from afar it may lie ready."""
        if self.remote and (content := self.remote.small(shard + SIDECAR)):
            with contextlib.suppress(Exception):
                arrays = read_arrays(io.BytesIO(content))
                about = json.loads(str(arrays["about"]))
                if (about["files"], about["content"]) == ([shard], self.remote.sizes[shard]):
                    return read_sidecar(shard, about, arrays["keys"].tolist(), arrays["table"]).arrays()
            print(f"{shard}{SIDECAR} is not the index of {shard} as it is: the shard is read")
        return self._index(shard).arrays()

    def write_sidecars(self):
        """SHARD.index.npz beside each local shard, for those who read it from afar; how many."""
        if self.remote or self.form not in ("tar", "parquet"):
            raise ValueError(f"{self.path} is not a folder of shards here: write their indexes where they lie")

        def write(shard):
            write_whole(f"{self.root}/{shard}{SIDECAR}", lambda f: np.savez_compressed(f, **self._arrays(shard)))

        return len(list(spread(write, self.files)))

    def _given_names(self, *files):
        """The names in the first of these files that has some, [] where none has."""
        folders = [os.path.join(self.root, part) for part in PARTS]
        if os.path.basename(os.path.abspath(self.root)) in PARTS:  # the path is itself a split folder
            folders.append(os.path.dirname(os.path.abspath(self.root)))
        files = [os.path.join(folder, name) for folder in folders for name in files]
        return next((classes for path in files if os.path.exists(path) and (classes := read_classes(path))), [])

    def _name_classes(self, names, highest):
        """Class names, and the number of each of `names` among them where there is a classes.json in another order."""
        given, renumbered = self._given_names("classes.json", "meta.json") or names, None
        if names and set(names) <= set(given):
            renumbered = [given.index(name) for name in names] if names != given else None
        elif names and len(names) != len(given):  # where as many, they are the same in other words
            counts, odd = f"{len(names)} classes, classes.json {len(given)}", min(set(names) - set(given))
            raise ValueError(f"{self.path} has {counts}, and {odd!r} is not among them: add what is missing")
        if given and highest >= len(names if renumbered else given):
            raise ValueError(f"{self.path} has label {highest} but only {len(given)} class names: add the others")
        return given, renumbered

    @functools.cached_property
    def _runs(self):
        """The rows of the table that this split has, as runs; see shards.as_runs."""
        starts, parts = np.array(self.table.starts), np.array(self.table.part_of)
        present = set(parts[starts[1:] > starts[:-1]].tolist())
        held_out = next((part for part in HELD_OUT if part in present), None)
        if self.split == "all":
            chosen = parts == parts
        elif self.split == "train" and held_out:
            chosen = parts == ("train" if "train" in present else "")
        elif self.split in HELD_OUT and (held_out or self.split != "val"):
            chosen = parts == (held_out if self.split == "val" else self.split)
        else:
            return self.table.runs[self.split]
        runs = as_runs(starts[:-1][chosen], starts[1:][chosen])
        if not runs[1, -1]:
            there = " and ".join(part for part in PARTS if part and part in present) or "no split folders"
            raise ValueError(f"dataset {self.path} has no {self.split} images, it has {there}: ask for those, or all")
        return runs

    @functools.cached_property
    def bounds(self):
        """How many items of this split come before each shard, (shards + 1,) int64."""
        (first, before), starts = self._runs, np.array(self.table.starts)
        run = np.searchsorted(first[:-1], starts, "right") - 1
        inside = np.minimum(starts - first[run], before[run + 1] - before[run])
        return np.where(run < 0, 0, before[run] + inside)

    def _rows(self, i):
        """Rows of the table of items i, an int or an array."""
        first, before = self._runs
        run = np.searchsorted(before, i, "right") - 1
        return first[run] + i - before[run]

    def _fingerprint(self, digests):
        """Hash of what is indexed, wherever it lies: form, split, keys, sizes, and content where sizes say nothing.

        With digests="texts_of", of where captions lie.
        """
        h = hashlib.blake2b(repr((self.form, self.split, len(self))).encode(), digest_size=16)
        for shard in np.flatnonzero(np.diff(self.bounds)):
            h.update(getattr(self.table, digests)[shard].encode())
        if self.form == "npy" and digests == "digest_of":
            for i in range(0, len(self), -(-len(self) // 64)):
                key, _, where, _, _ = self.place(i)
                h.update(self._read(key, *where))
        return h.hexdigest()

    def __len__(self):
        return int(self._runs[1][-1])

    def __getitem__(self, i):
        return dict(image=self.pixels(i), **self.meta(i))

    def place(self, i):
        """(key, label, image, text, beside) of item i: where all of it lies, see shards.Index."""
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} is outside a dataset of {len(self)}")
        key, (label, *where) = self.table[int(self._rows(i))]
        label = self._renumbered[label] if self._renumbered and label >= 0 else label
        return os.fsdecode(key), label, where[:3], where[3:7], where[7:]

    def key(self, i):
        return self.place(i)[0]

    def fetch(self, shards):
        """Begins to fetch shards from afar, by number, those first that other processes do not."""
        names = [self.files[self.table.base[s]] for s in shards if self.bounds[s] < self.bounds[s + 1]]
        at = os.getpid() % max(len(names), 1)
        self.remote.ahead(names[at:] + names[:at])

    @property
    def labels(self):
        """The label of each item, (N,) int64, -1 where it has none."""
        labels = self.table.labels(self._rows(np.arange(len(self))))
        return np.where(labels >= 0, np.array(self._renumbered)[labels], -1) if self._renumbered else labels

    def meta(self, i):
        """dict(label, text, key) of item i, without its pixels."""
        key, label, _, (kind, *where), _ = self.place(i)
        text = None
        with named(key, "its caption does not read ({})"):
            if kind == PARQUET_TEXT:
                text = self._cell(CAPTIONS, *where)
            elif kind == JSON_TEXT:
                text = json.loads(self._read(key, *where))
            elif kind == PLAIN_TEXT:
                text = self._read(key, *where).decode("utf-8", "replace").strip()
        return dict(label=label, text=captions_of(text), key=key)

    def rgb(self, i):
        """The whole of image i as PIL RGB."""
        key, _, where, _, _ = self.place(i)
        with named(key):
            if self.form == "npy":
                shape = np.load(f"{self.root}/{self.files[where[0]]}", mmap_mode="r").shape[1:]
                image = np.frombuffer(self._read(key, *where), np.uint8).reshape(shape)
                return to_rgb(Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image))
            data = self._cell(PIXELS, *where) if self.form == "parquet" else self._read(key, *where)
            data = data["bytes"] if isinstance(data, dict) else data
            if not data:
                raise ValueError("it has 0 bytes")
            with Image.open(io.BytesIO(data)) as image:
                if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} is over PIL.Image.MAX_IMAGE_PIXELS")
                return to_rgb(image)

    def pixels(self, i, crop="center", flip=False, u=None):
        """
        Image i as float32 (3,S,S) in [-1,1]: a square cut from it and resized to S = image_size, up or down.

        crop "center" takes the whole short side; "random" a square of 0.5 to 1 of it (as latent-diffusion does), placed
        by u = (side, x, y), three numbers in [0, 1).
        """
        image = self.rgb(i)
        x, y, side = crop_square(*image.size, crop, u)
        image = image.crop((x, y, x + side, y + side))
        if side != self.image_size:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS)  # antialiased
        image = to_tensor(image)
        return image.flip(-1) if flip else image

    # semantic maps and objects

    def size(self, i):
        """(width, height) of image i, upright; its pixels are not decoded."""
        key, _, (file, offset, size), _, _ = self.place(i)
        if self.form == "npy":
            height, width = np.load(f"{self.root}/{self.files[file]}", mmap_mode="r").shape[1:3]
            return width, height

        def head(most):
            with named(key):
                data = self._cell(PIXELS, file, offset, size) if self.form == "parquet" else None
                data = self._read(key, file, offset, min(size, most)) if data is None else data
                with Image.open(io.BytesIO(data["bytes"] if isinstance(data, dict) else data)) as image:
                    turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 lie on their side
                    return image.size[::-1] if turned else image.size

        with contextlib.suppress(BadImage):
            return head(2**16)  # what is asked is nearly always at the beginning
        return head(size)

    def _map(self, i):
        """The map of item i as 8-bit PIL, or None where there is none."""
        key, _, (file, *where), _, (offset, size, *_) = self.place(i)
        with named(key, "its map does not read ({})"):
            data, path = b"", f"{self.root}/{os.path.splitext(key)[0]}.map.png"
            if self.form == "npy" and size:
                data = np.frombuffer(self._read(key, file + 2, offset, size), np.uint8)
                return Image.fromarray(data.reshape(self.size(i)[::-1]))
            if self.form == "tar" and size:
                data = self._read(key, file, offset, size)
            elif self.form == "folder" and os.path.exists(path):
                with open(path, "rb") as f:
                    data = f.read()
            elif self.form == "parquet":
                data = self._cell(MAPS, file, *where)
                data = data["bytes"] if isinstance(data, dict) and "bytes" in data else data
            if not isinstance(data, bytes) or not data:  # a column called so may hold other things
                return None
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            if image.mode not in ("L", "P", "1"):
                raise ValueError(f"mode {image.mode}: save it as 8-bit grey or palette, a pixel its class")
            return Image.fromarray(np.array(image, dtype=np.uint8))  # the palette's indices, not its colors

    def map(self, i, crop="center", flip=False, u=None):
        """The semantic map of image i, (S,S) int64, -1 unknown, cut as `pixels` cuts the image; resizing is nearest."""
        image = self._map(i)
        if image is None:
            raise BadImage(f"{self.key(i)}: it has no map")
        if image.size != self.size(i):
            raise BadImage(f"{self.key(i)}: its map is {image.size}, the picture {self.size(i)}: make them as large")
        x, y, side = crop_square(*image.size, crop, u)
        image = image.crop((x, y, x + side, y + side))
        image = image.resize((self.image_size, self.image_size), Image.Resampling.NEAREST)
        classes = torch.from_numpy(np.array(image, dtype=np.int64))
        classes[classes == 255] = -1
        return classes.flip(-1) if flip else classes

    @functools.cached_property
    def has_maps(self):
        return any(image is not None for image in self._some(self._map, 64))

    @functools.cached_property
    def map_names(self):
        """Names of the maps' classes, [] without map_classes.json."""
        return self._given_names("map_classes.json")

    @functools.cached_property
    def map_classes(self):
        """How many classes the maps have: those in map_classes.json, else what 500 maps, spread over all, have."""
        found = (np.array(image) for image in self._some(self._map, 500) if image is not None)
        return len(self.map_names) or 1 + max((int(image[image < 255].max(initial=0)) for image in found), default=-1)

    def _objects(self, i):
        """[(name, [x, y, w, h] in pixels of the upright image), ...] of item i."""
        key, _, image, (kind, *where), (*_, offset, size) = self.place(i)
        with named(key, "its objects do not read ({})"):
            if self.form == "parquet":
                objects = self._cell(OBJECTS, *image)
            elif self.form == "tar" and size:
                objects = field(json.loads(self._read(key, image[0], offset, size)), OBJECTS)
            else:
                objects = field(json.loads(self._read(key, *where)), OBJECTS) if kind == JSON_TEXT else None
            if objects is None:
                return []
            names, boxes = field(objects, CATEGORIES), [[float(v) for v in box] for box in objects["bbox"]]
            if len(names) != len(boxes) or any(len(box) != 4 for box in boxes):
                raise ValueError(f"{len(names)} categories, {len(boxes)} boxes: give [x, y, w, h] and a category each")
            numbered = dict(enumerate(self._object_names))
            return [(numbered.get(name, str(name).strip()), box) for name, box in zip(names, boxes)]

    def boxes(self, i, flip=False, crop="center", u=None):
        """
        Objects of item i: [(name, x0, y0, x1, y1), ...] in shares of the square that `pixels` cuts, y downwards.

        Boxes are clipped to the square; those of which less than VISIBLE is inside are left out.
        """
        objects, seen = self._objects(i), []
        x, y, side = crop_square(*self.size(i), crop, u) if objects else (0, 0, 1)
        for name, (left, top, w, h) in objects:
            x0, x1 = (min(max(v - x, 0), side) for v in (left, left + w))
            y0, y1 = (min(max(v - y, 0), side) for v in (top, top + h))
            x0, x1 = (side - x1, side - x0) if flip else (x0, x1)
            if w > 0 and h > 0 and (x1 - x0) * (y1 - y0) >= VISIBLE * w * h:
                seen.append((name, x0 / side, y0 / side, x1 / side, y1 / side))
        return seen

    @functools.cached_property
    def has_objects(self):
        return any(self._some(self._objects, 64))

    @functools.cached_property
    def _object_names(self):
        return self._given_names("object_classes.json") or self._given_names("classes.json")

    @functools.cached_property
    def object_classes(self):
        """Names of the objects' classes: object_classes.json, else all that occur in 10000 items, spread over all."""
        given = self._given_names("object_classes.json")
        return given or sorted({name for objects in self._some(self._objects, 10000) for name, _ in objects})

    def _some(self, read, n):
        """read(i) of at most n items, spread over all, but for those that do not read."""
        for i in range(0, len(self), -(-len(self) // n)):
            try:
                yield read(i)
            except BadImage:
                pass

    def _read(self, key, file, offset, size):
        """Bytes of a file; opened each time, so that workers share no file position and shards may be many."""
        name = self.files[file] if file >= 0 else key
        for wait in (0.1, 1, None):
            try:
                with self._open(name) as f:
                    f.seek(offset)
                    data = f.read(size)
                break
            except OSError as e:
                if wait is None or e.errno not in PASSING:
                    raise
                time.sleep(wait)
        if len(data) < size:
            raise ValueError(f"{name} ends after {offset + len(data)} bytes, the index says {offset + size}")
        return data

    def _cell(self, names, file, group, row):
        """One parquet cell, of the first column called one of names, None without one; some row groups are kept."""
        place = (file, group, names)
        if place not in self._groups:
            f = open_parquet(self.files[file], self._open(self.files[file]))
            column = next((name for name in names if name in f.schema_arrow.names), None)
            if column is None:
                return None
            # no threads: pyarrow's pool does not outlive a fork
            self._groups[place] = f.read_row_group(group, columns=[column], use_threads=False).column(0)
            while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > GROUP_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(place)
        return self._groups[place][row].as_py()


# -----------------------------------------------------------------------------
# the endless sequence, and its cut into micro-batches


class Stream(torch.utils.data.Dataset):
    """
    stream[p] -> dict(image, label, text, caption, key, index, flip, bad): the endless sequence over N items.

    Position p is item permute(p % N) of epoch p // N; with window = W > 0, the shards are permuted, and then the items
    of W shards at a time, so that what is read lies in few files (W is 32 for shards from afar, else 0). Crop, flip and
    which caption depend on (seed, p) alone. An item that does not decode is named in bad and replaced by another, a
    function of (seed, p) too. With train=False: the items in their own order, centre crop, no flip, first caption.
    """

    def __init__(self, dataset, seed, crop="center", flip=False, train=True, window=None):
        if crop not in ("center", "random"):
            raise ValueError(f"crop {crop!r} is not known: choose center or random")
        self.dataset, self.seed, self.train = dataset, seed, train
        self.crop, self.flip = (crop, flip) if train else ("center", False)
        self.window = (dataset.window if window is None else window) if train else 0
        self._orders, self._begun = {}, None

    def _window(self, epoch, at):
        """(first, before, size, order, ends): the window of position `at` of an epoch begins at its first-th shard,
        after `before` items, and has `size`; order (S,) the shards, ends (S,) how many items come before each's end."""
        if epoch not in self._orders:
            bounds, seed = self.dataset.bounds, seed_of(self.seed, epoch, "shards")
            order = permute(np.arange(len(bounds) - 1), len(bounds) - 1, seed)
            latest = list(self._orders.items())[-1:]  # at its end an epoch and the next are asked for
            self._orders = dict(latest) | {epoch: (order, np.cumsum(np.diff(bounds)[order]))}
        order, ends = self._orders[epoch]
        first = int(np.searchsorted(ends, at, "right")) // self.window * self.window
        before = int(ends[first - 1]) if first else 0
        return first, before, int(ends[first : first + self.window][-1]) - before, order, ends

    def item(self, p, attempt=0):
        """(index, epoch) of position p; of its attempt-th stand-in, which in a window is of the same one."""
        epoch, at = divmod(int(p), len(self.dataset))
        if not self.window:
            if attempt:
                return seed_of(self.seed, "replace", p, attempt) % len(self.dataset), epoch
            return permute(at, len(self.dataset), seed_of(self.seed, epoch)) if self.train else at, epoch
        first, before, size, order, ends = self._window(epoch, at)
        inside = permute(at - before, size, seed_of(self.seed, epoch, "window", first))
        inside = seed_of(self.seed, "replace", p, attempt) % size if attempt else inside
        k = np.searchsorted(ends, before + inside, "right")
        return int(self.dataset.bounds[order[k] + 1] - ends[k]) + before + inside, epoch

    def _fetch_ahead(self, p):
        """From afar, in the background: the shards of the window after that of position p."""
        epoch, at = divmod(int(p), len(self.dataset))
        first, *_, order, _ = self._window(epoch, at)
        if self._begun != (epoch, first):
            self._begun = epoch, first
            following = order[first + self.window :][: self.window]
            self.dataset.fetch(following if len(following) else self._window(epoch + 1, 0)[3][: self.window])

    def draw(self, p, attempt=0):
        """
        All that is decided for position p before any pixel is read: dict(index, epoch, flip, u, text, caption, label,
        key).

        text is one str, the item's caption number `caption`, "" where there is none; u places a random crop; attempt
        k > 0 is the k-th stand-in.
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
        bad = []
        if self.window and self.dataset.remote:
            self._fetch_ahead(p)
        for attempt in range(100):
            try:
                drawn = self.draw(p, attempt)
                image = self.dataset.pixels(drawn["index"], self.crop, drawn["flip"], drawn["u"])
            except BadImage as e:
                bad.append(str(e))
                continue
            names = ("label", "text", "caption", "key", "index", "flip")
            return dict(image=image, bad=bad, **{name: drawn[name] for name in names})
        some = "; ".join(list(dict.fromkeys(bad))[:3])
        raise ValueError(f"all {len(bad)} images tried in {self.dataset.path} are bad ({some}): look at the data")


def step_positions(step, micro, batch_size, grad_accum=1, rank=0, world=1):
    """One rank's positions for one micro-batch: slots (micro * world + rank) * batch_size + j of the global batch."""
    first = step * batch_size * grad_accum * world + (micro * world + rank) * batch_size
    return list(range(first, first + batch_size))


def collate(samples):
    """Samples -> dict(image (B,3,S,S), label and index (B,) int64, flip (B,) bool, text, key and bad: lists of str).

    Where samples have a condition, a dict of tensors (see data/tasks.py), or a context, a tensor (the text's, from a
    cache), these are stacked too.
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
    if "context" in samples[0]:
        batch["context"] = torch.stack([sample["context"] for sample in samples])
    if "condition" in samples[0]:
        names = samples[0]["condition"]
        batch["condition"] = {name: torch.stack([sample["condition"][name] for sample in samples]) for name in names}
    return batch


def _begin_worker(number):
    """In a worker: SIGINT is for the trainer, SIGTERM ends it when it comes from there; SIGUSR1 shows its stack."""

    def wait():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])  # a fork server may have them open
        faulthandler.register(signal.SIGUSR1, 2, all_threads=True)
        threading.Thread(target=wait, daemon=True).start()


def loader(
    stream, start_step, max_steps, batch_size, grad_accum=1, rank=0, world=1, workers=0, collate_fn=collate, **options
):
    """This rank's collated micro-batches of steps start_step .. max_steps - 1; options: of in_batches, which see."""

    def positions(n):
        step, micro = divmod(n, grad_accum)
        return step_positions(start_step + step, micro, batch_size, grad_accum, rank, world)

    total = max(max_steps - start_step, 0) * grad_accum
    return in_batches(stream, positions, total, collate_fn, workers, rank, **options)


def in_batches(stream, positions, total, collate_fn, workers=0, rank=0, timeout=600, restarts=3):
    """
    An iterator over collate_fn([stream[p] for p in positions(n)]) for n < total, in order.

    A worker that dies, or gives no batch for `timeout` seconds in which no shard is fetched from afar either (then its
    stack is shown), is named, and all are started again from the first batch that has not come: the sequence stays the
    same. RuntimeError after `restarts` in a row.
    """
    workers = workers if total else 0
    if workers and len(tempfile.gettempdir()) > 70:  # a worker's socket there would be over the system's 103 or 107
        long = f"TMPDIR={tempfile.gettempdir()} is too long for the sockets of data workers"
        raise ValueError(f"{long}: set one of at most 70 characters, or workers=0")
    remote = getattr(getattr(stream, "images", getattr(stream, "dataset", None)), "remote", None)

    def begin(first, prefetch=2):
        batches = torch.utils.data.DataLoader(
            stream,
            batch_sampler=map(positions, range(first, total)),
            collate_fn=collate_fn,
            num_workers=workers,  # torch gives each one thread
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=prefetch if workers else None,
            timeout=min(timeout, 1) if workers else 0,  # so often it is looked whether all workers live
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # torch draws a seed for the workers: not from the global generator
        )
        if not hasattr(signal, "pthread_sigmask"):
            return iter(batches)
        # Ctrl-C, and torchrun's and slurm's SIGTERM, reach workers too, but are meant for the trainer, which saves and
        # stops: so workers are born with both blocked. And torch would have a dead worker raise RuntimeError wherever
        # the trainer is just then; here it is noticed when its batch is due.
        before, on_death = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM]), None
        if threading.current_thread() is threading.main_thread():
            on_death = signal.getsignal(signal.SIGCHLD)
            if getattr(on_death, "__module__", "").startswith("torch."):  # of a plain DataLoader before
                on_death = signal.SIG_DFL
        try:
            return iter(batches)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if on_death is not None:
                signal.signal(signal.SIGCHLD, on_death)

    def deliver(batches):
        done = first = failures = 0
        due = time.monotonic() + timeout
        while done < total:
            fault, is_late = None, False
            try:
                batch = next(batches)
            except Exception as e:
                is_late = str(e).startswith("DataLoader timed out")
                for wait in (0, 0 if is_late else 0.5):  # a broken connection is seen before the death that broke it
                    time.sleep(wait)
                    if fallen := [k for k, worker in enumerate(batches._workers) if worker.exitcode is not None]:
                        break
                if not fallen and not is_late:
                    raise
                if not fallen and time.monotonic() < due:
                    continue
                if not fallen and remote and remote.is_fetching(timeout):
                    print(
                        f"rank {rank} has waited {timeout} s for shards that are being fetched: it goes on", flush=True
                    )
                    due = time.monotonic() + timeout
                    continue
                number = fallen[0] if fallen else (done - first) % workers  # they take turns
                worker = batches._workers[number]
                code = -worker.exitcode if fallen else 0
                fault = f"gave no batch for {timeout} s"
                if fallen:
                    fault = f"was killed by {signal.Signals(code).name}" if code > 0 else f"ended with status {-code}"
                    fault += " (out of memory?)" if code == 9 else ""
                held = [n for n in range(done, min(done + 2 * workers, total)) if (n - first) % workers == number]
                held = ", ".join(f"{positions(n)[0]}..{positions(n)[-1]}" for n in held)
                fault = f"worker {number} (pid {worker.pid}) of rank {rank} {fault}, with positions {held}"
                failures += 1
            if fault is None:
                yield batch
                done, failures, due = done + 1, 0, time.monotonic() + timeout
                continue
            if not fallen and hasattr(signal, "SIGUSR1"):
                os.kill(worker.pid, signal.SIGUSR1)  # its stack, to stderr
                time.sleep(0.5)
            for worker in batches._workers:
                worker.kill()
            for worker in batches._workers:
                worker.join(5)
            if failures > restarts:
                raise RuntimeError(f"{fault}, {failures} times in a row: look at these images, or take fewer workers")
            print(f"{fault}: starting workers again, {failures} of {restarts}", flush=True)
            # what a worker had ready dies with it: one at a time, so that a bad batch cannot take others along
            batches, first, due = begin(done, 1 if failures > 1 else 2), done, time.monotonic() + timeout

    batches = begin(0)  # workers start here, not when the first batch is asked for
    return deliver(batches) if workers else batches


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m data.dataset", description="What a data set is, and how fast.")
    parser.add_argument("path")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10, help="to decode for")
    parser.add_argument("--sidecars", action="store_true", help="write SHARD.index.npz, for those who read from afar")
    asked = parser.parse_args()
    if not os.environ.get("TRACEBACK"):
        sys.tracebacklimit = 0  # a mistake is one line, as in the training scripts
    opened = time.perf_counter()
    ds = Dataset(asked.path, "all", asked.image_size)
    opened, classes = time.perf_counter() - opened, ", ".join(ds.classes[:5]) + (", ..." if len(ds.classes) > 5 else "")
    kinds = f"{ds.num_classes} classes{f' ({classes})' if classes else ''}" if ds.num_classes else "no labels"
    shards = f" in {len(ds.files)} shards" if ds.form in ("tar", "parquet") else ""
    print(f"{ds.path}: {ds.form}, {len(ds)} images{shards}, {kinds}; opened in {opened:.2f} s")
    if asked.sidecars:
        print(f"{ds.write_sidecars()} indexes written beside the shards")
    torch.set_num_threads(1)
    stream, count, bad = Stream(ds, 0), 0, 0
    began, begun = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < asked.seconds and count < 10 * len(ds):
        bad += len(stream[count]["bad"])
        count += 1
    took, worked = time.perf_counter() - began, time.process_time() - begun
    per_core = f"{count / worked:.0f} images/s per core at {ds.image_size} px"
    print(f"{per_core}, {count / took:.0f} with reading and what else this machine does; {bad} bad of {count}")
