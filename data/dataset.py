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
    Stream    makes of it one endless sequence: position p is an item of epoch p // N, every epoch a new permutation.
    loader    cuts the sequence into micro-batches, for this rank, from any step on.

Everything random is a pure function of (seed, position): there is no state to save, and the sequence is the same for
any number of processes and workers. To read a tar of images:

    ds = Dataset("data/imagenette128", "train", image_size=128)
    stream = Stream(ds, seed=1, crop="random", flip=True)
    for batch in loader(stream, 0, 1000, batch_size=12): ...
"""

import errno
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import tarfile
import tempfile
import threading
import zlib
from array import array
from collections import OrderedDict

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif")
HELD_OUT = ("val", "validation", "valid", "test")  # names that mean validation; where several are present, the first
PARTS = ("", "train", *HELD_OUT)  # where an item lies: a split folder, shards named so, or neither
CAPTIONS = ("text", "caption", "captions", "txt")  # the fields that hold captions, in JSON and parquet
LABELS = ("label", "labels", "cls")
PIXELS = ("image", "img", "jpg", "jpeg", "png", "webp")  # the parquet column that holds the image
MAPS = ("map", "segmentation", "annotation")  # and that with semantic maps
OBJECTS, CATEGORIES = ("objects",), ("categories", "category")
VISIBLE = 0.2  # share of a box's area that must lie inside the crop, else the object is not there
GROUP_BYTES = 256 * 2**20  # parquet row groups kept per worker


def is_lack(error):
    """Whether it is this process that lacks memory or file handles: then what it reads may well be good."""
    return isinstance(error, MemoryError) or getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class BadImage(ValueError):
    """An item that cannot be read or decoded; the message is "key: reason", on one line."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))


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
# the index: where every item lies, in a few flat arrays (small for millions of items, shared by forked workers)

NO_TEXT, PLAIN_TEXT, JSON_TEXT, PARQUET_TEXT = range(4)


class Index:
    """
    One row an item: `key`; `label` (int, or a class name to be numbered); `part`, one of PARTS; `image`, where its
    bytes lie: (file, offset, size); `text`, where its captions lie: (kind, file, offset, size). file counts in `files`,
    and -1 is the file that the key names; in parquet it is (file, row group, row). `names[i]` is label i in words.
    `beside`, in tar and npy: (offset, size) of the item's map and of its JSON, size 0 where there is none.
    """

    def __init__(self, files=(), names=()):
        self.files, self.names = list(files), list(names)
        self.keys, self.labels, self.parts, self.image, self.text = [], [], array("b"), array("q"), array("q")
        self.beside = array("q")

    def add(self, key, part, image, label=None, text=(NO_TEXT, 0, 0, 0), beside=(0, 0, 0, 0)):
        if isinstance(label, str):
            label = int(label) if re.fullmatch(r"\s*-?\d+\s*", label) else label.strip() or None
        elif isinstance(label, float):  # a column with gaps; NaN is no label
            label = int(label) if label.is_integer() else None
        self.keys.append(os.fsencode(key))
        self.labels.append(label if isinstance(label, int | str) else None)
        self.parts.append(PARTS.index(part))
        self.image.extend(image)
        self.text.extend(text)
        self.beside.extend(beside)

    def arrays(self):
        labels, names = self.labels, self.names
        if any(isinstance(label, str) for label in labels):  # class names are numbered in sorted order
            names = sorted({str(label) for label in labels if label is not None})
            number = {name: i for i, name in enumerate(names)}
            labels = [None if label is None else number[str(label)] for label in labels]
        return dict(
            files=np.array(self.files, dtype=np.str_),
            names=np.array(names, dtype=np.str_),
            keys=np.array(self.keys, dtype=np.bytes_),
            labels=np.array([-1 if label is None else max(label, -1) for label in labels], dtype=np.int64),
            parts=np.array(self.parts, dtype=np.int8),
            image=np.array(self.image, dtype=np.int64).reshape(-1, 3),
            text=np.array(self.text, dtype=np.int64).reshape(-1, 4),
            beside=np.array(self.beside, dtype=np.int64).reshape(-1, 4),
        )


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
    index = Index(tables, classes)
    for path, split, below in zip(images, split_of, inner):
        label, text = described.get(path, (None, (NO_TEXT, 0, 0, 0)))
        label = number.get(below.split("/")[0]) if classes and "/" in below else label
        size = os.path.getsize(f"{root}/{path}") if os.path.exists(f"{root}/{path}") else 0  # 0: a dangling link
        index.add(path, split, (-1, 0, size), label, text)
    return index


def index_tar(root, shards):
    print(f"indexing {len(shards)} tar shards of {root} (once: the index is kept in cache/)")
    index = Index(shards)
    for number, shard in enumerate(shards):
        samples, end = {}, os.path.getsize(f"{root}/{shard}")  # key -> {extension: (offset, size)}
        try:
            with tarfile.open(f"{root}/{shard}", "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.removeprefix("./").rpartition("/")
                    stem, _, extension = name.partition(".")  # webdataset: the key ends at the first dot
                    if member.isfile() and stem and member.offset_data + member.size <= end:
                        sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                        sample["." + extension.lower()] = (member.offset_data, member.size)
        except tarfile.TarError as e:
            print(f"{root}/{shard} is damaged ({e}): it is read up to there, {len(samples)} items")
        with open(f"{root}/{shard}", "rb") as f:
            for key, parts in samples.items():
                image = next((parts[extension] for extension in parts if extension in IMAGES), None)
                if image is None:
                    continue
                label, text = None, (NO_TEXT, 0, 0, 0)
                if ".json" in parts:
                    f.seek(parts[".json"][0])
                    label = field(parse(f.read(parts[".json"][1])), LABELS)
                    text = (JSON_TEXT, number, *parts[".json"])
                if ".cls" in parts:
                    f.seek(parts[".cls"][0])
                    label = f.read(parts[".cls"][1]).decode("utf-8", "replace")
                if ".txt" in parts:
                    text = (PLAIN_TEXT, number, *parts[".txt"])
                beside = (*parts.get(".map.png", (0, 0)), *parts.get(".json", (0, 0)))
                index.add(f"{shard[:-4]}/{key}", shard_part(shard), (number, *image), label, text, beside)
    return index


def index_parquet(root, shards):
    index = Index(shards)
    for number, shard in enumerate(shards):
        f = open_parquet(f"{root}/{shard}")
        columns = f.schema_arrow.names
        if not any(name in columns for name in PIXELS):
            raise ValueError(f"{root}/{shard} has the columns {columns}: call the one with the images {PIXELS[0]!r}")
        label = next((name for name in LABELS if name in columns), None)
        if f.metadata.num_rows > 8 * os.path.getsize(f"{root}/{shard}"):  # it would be a list of as many
            raise ValueError(f"{root}/{shard} declares {f.metadata.num_rows} rows: it is damaged, fetch it again")
        try:
            labels = f.read(columns=[label], use_threads=False).column(0).to_pylist() if label else []
        except Exception as e:  # of many kinds, and several lines
            raise ValueError(f"{root}/{shard} is damaged ({' '.join(str(e).split())}): fetch it again") from None
        index.names = index.names or hub_names(f, label)
        kind = PARQUET_TEXT if any(name in columns for name in CAPTIONS) else NO_TEXT
        rows = [(g, row) for g in range(f.num_row_groups) for row in range(f.metadata.row_group(g).num_rows)]
        for i, where in enumerate(rows):
            key, where = f"{shard.removesuffix('.parquet')}/{i:06d}", (number, *where)
            index.add(key, shard_part(shard), where, labels[i] if label else None, (kind, *where))
    return index


def index_npy(root, paths):
    index = Index()
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
            texts = [(JSON_TEXT, len(index.files) + 1, at, size) for at, size, _ in lines]
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
        for i in range(len(images)):
            where = (len(index.files), images.offset + i * size, size)
            text = texts[i] if texts else (NO_TEXT, 0, 0, 0)
            beside = (0, 0, 0, 0) if maps is None else (maps.offset + i * area, area, 0, 0)
            index.add(f"{folder}{i:08d}", folder.rstrip("/"), where, labels[i] if labels else None, text, beside)
        index.files += [path, folder + "captions.jsonl", folder + "maps.npy"]
    return index


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


def open_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        f = pyarrow.parquet.ParquetFile(path, pre_buffer=False)
        f.schema_arrow.names  # noqa: B018  where some damage shows
        return f
    except Exception as e:  # of many kinds
        reason = " ".join(str(e).split())
        raise ValueError(f"{path} does not open as parquet ({reason}): fetch or write it again") from None


def cached(stamp, build):
    """build() -> dict of arrays, kept in cache/ under a hash of stamp; built each time where that cannot be written."""
    path = f"cache/index-{seed_of('v2', *stamp):016x}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            return {name: kept[name] for name in kept.files}
    except Exception:  # not there, or cut short
        arrays = build()
    try:
        os.makedirs("cache", exist_ok=True)
        with tempfile.NamedTemporaryFile(dir="cache", suffix=".tmp", delete=False) as f:
            try:
                np.savez(f, **arrays)
                f.flush()
                os.fsync(f.fileno())  # on the disk before its name is
            except OSError:
                os.remove(f.name)
                raise
        os.replace(f.name, path)  # atomic: other ranks read the whole file or none
    except OSError:
        pass
    return arrays


# -----------------------------------------------------------------------------
# the dataset


class Dataset:
    """
    Images at a path: ds[i] -> dict(image float32 (3,S,S) in [-1,1], label int or -1, text list of str, key str).

    split: "train"; "val", which is the folder val/ (validation, valid, test), or shards named so, or, where there are
    none, the items with crc32(key) % 100 == 0, at least one; "all"; or one of those names itself. An item that does not
    decode raises BadImage. Parquet is read by row groups: beyond some hundred MB, a shuffled set is read faster as tar.
    """

    def __init__(self, path, split="train", image_size=256):
        self.path, self.split, self.image_size = str(path), split, image_size
        if split not in ("all", *PARTS[1:]):
            raise ValueError(f"split {split!r} is not known: choose train, val, test or all")
        if not isinstance(image_size, int) or image_size <= 0:
            raise ValueError(f"image_size {image_size!r} is not a positive whole number: give pixels, such as 256")
        if not os.path.exists(self.path):
            remedy = "pass --dataset=DIR, a folder of images, tar or parquet shards, or images.npy"
            raise FileNotFoundError(f"dataset {self.path} is not there: {remedy}")
        self.root = self.path if os.path.isdir(self.path) else os.path.dirname(self.path) or "."
        paths = list_files(self.root) if os.path.isdir(self.path) else [os.path.basename(self.path)]
        npy = [path for path in paths if path in [f"{part}/images.npy".lstrip("/") for part in PARTS]]
        tars = [path for path in paths if path.endswith(".tar")]
        tables = [path for path in paths if path.endswith(".parquet")]
        images = [path for path in paths if path.lower().endswith(IMAGES)]
        maps = {path for path in images if path.endswith(".map.png")}
        if maps:  # a map is no image, unless it stands alone
            stems = {os.path.splitext(path)[0] for path in images}
            images = [path for path in images if path not in maps or path.removesuffix(".map.png") not in stems]
        if npy:
            self.form, arrays = "npy", index_npy(self.root, npy).arrays()
        elif tars:  # before parquet: img2dataset writes a table beside every tar
            stats = [os.stat(f"{self.root}/{path}") for path in tars]
            stamp = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(tars, stats)]
            stamp = [os.path.realpath(self.root), *stamp]
            self.form, arrays = "tar", cached(stamp, lambda: index_tar(self.root, tars).arrays())
        elif tables:
            self.form, arrays = "parquet", index_parquet(self.root, tables).arrays()
        else:
            metadata = [path for path in paths if os.path.basename(path) == "metadata.jsonl"]
            self.form, arrays = "folder", index_folder(self.root, images, metadata).arrays()
        if not len(arrays["keys"]):
            looked = f"looked for images.npy, *.tar, *.parquet and {' '.join(IMAGES)}, in sub-folders too"
            raise FileNotFoundError(f"dataset {self.path} ({self.form}) holds no images: {looked}")
        self.files, self.keys, self.image, self.text = (arrays[name] for name in ("files", "keys", "image", "text"))
        self.labels, self.classes = self._name_classes(arrays["labels"], arrays["names"].tolist())
        self.num_classes = max(len(self.classes), int(self.labels.max()) + 1) if self.labels.max() >= 0 else 0
        chosen = self._choose(arrays["parts"])
        self.keys, self.labels = self.keys[chosen], self.labels[chosen]
        self.image, self.text = self.image[chosen], self.text[chosen]
        self.beside = arrays["beside"][chosen]
        self.fingerprint = self._fingerprint()
        self._groups = OrderedDict()  # parquet: (file, row group, names) -> column, the latest last

    def _given_names(self, *files):
        """The names in the first of these files that has some, [] where none has."""
        folders = [os.path.join(self.root, part) for part in PARTS]
        if os.path.basename(os.path.abspath(self.root)) in PARTS:  # the path is itself a split folder
            folders.append(os.path.dirname(os.path.abspath(self.root)))
        files = [os.path.join(folder, name) for folder in folders for name in files]
        return next((classes for path in files if os.path.exists(path) and (classes := read_classes(path))), [])

    def _name_classes(self, labels, names):
        """Labels and class names, in the order of classes.json where there is one."""
        given = self._given_names("classes.json", "meta.json") or names
        if names and set(names) <= set(given):
            order = np.array([given.index(name) for name in names])
            labels = np.where(labels >= 0, order[labels], -1)
        elif names and len(names) != len(given):  # where as many, they are the same in other words
            counts, odd = f"{len(names)} classes, classes.json {len(given)}", min(set(names) - set(given))
            raise ValueError(f"{self.path} has {counts}, and {odd!r} is not among them: add what is missing")
        if given and labels.max() >= len(given):
            raise ValueError(f"{self.path} has label {labels.max()} but only {len(given)} class names: add the others")
        return labels, given

    def _choose(self, parts):
        """Which rows of the whole index this split has."""
        present = [part for number, part in enumerate(PARTS) if (parts == number).any()]
        held_out = next((part for part in HELD_OUT if part in present), None)
        pool = np.flatnonzero(parts == PARTS.index("train" if "train" in present else ""))
        if self.split == "all":
            chosen = np.arange(len(parts))
        elif self.split == "train" and held_out:
            chosen = pool
        elif self.split in HELD_OUT and (held_out or self.split != "val"):
            chosen = np.flatnonzero(parts == PARTS.index(held_out if self.split == "val" else self.split))
        else:
            crc = np.array([zlib.crc32(key) for key in self.keys[pool]])
            held = crc % 100 == 0
            held[crc.argmin()] |= not held.any()  # few images: one is held out all the same
            chosen = pool[held == (self.split == "val")] if len(pool) > 1 else pool
        if not len(chosen):
            there = " and ".join(part for part in present if part) or "no split folders"
            raise ValueError(f"dataset {self.path} has no {self.split} images, it has {there}: ask for those, or all")
        return chosen

    def _fingerprint(self):
        """Hash of what is indexed, wherever it lies: form, split, keys, sizes, and content where sizes say nothing."""
        h = hashlib.blake2b(repr((self.form, self.split, len(self))).encode(), digest_size=16)
        for at in range(0, len(self), 2**16):
            h.update(b"\n".join(self.keys[at : at + 2**16].tolist()))
        h.update(self.image[:, 1:].tobytes())
        if self.form == "parquet":
            h.update(repr([os.path.getsize(f"{self.root}/{name}") for name in self.files]).encode())
        if self.form == "npy":
            for i in range(0, len(self), -(-len(self) // 64)):
                h.update(self._read(i, *self.image[i]))
        return h.hexdigest()

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        return dict(image=self.pixels(i), **self.meta(i))

    def key(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} is outside a dataset of {len(self)}")
        return os.fsdecode(self.keys[i])

    def meta(self, i):
        """dict(label, text, key) of item i, without its pixels."""
        key, (kind, *where) = self.key(i), self.text[i].tolist()
        try:
            text = None
            if kind == PARQUET_TEXT:
                text = self._cell(CAPTIONS, *where)
            elif kind == JSON_TEXT:
                text = json.loads(self._read(i, *where))
            elif kind == PLAIN_TEXT:
                text = self._read(i, *where).decode("utf-8", "replace").strip()
        except Exception as e:
            if is_lack(e):
                raise
            raise BadImage(f"{key}: its caption does not read ({e})") from None
        return dict(label=int(self.labels[i]), text=captions_of(text), key=key)

    def rgb(self, i):
        """The whole of image i as PIL RGB."""
        key, where = self.key(i), self.image[i].tolist()
        try:
            if self.form == "npy":
                shape = np.load(f"{self.root}/{self.files[where[0]]}", mmap_mode="r").shape[1:]
                image = np.frombuffer(self._read(i, *where), np.uint8).reshape(shape)
                return to_rgb(Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image))
            data = self._cell(PIXELS, *where) if self.form == "parquet" else self._read(i, *where)
            data = data["bytes"] if isinstance(data, dict) else data
            if not data:
                raise ValueError("it has 0 bytes")
            with Image.open(io.BytesIO(data)) as image:
                if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} is over PIL.Image.MAX_IMAGE_PIXELS")
                return to_rgb(image)
        except UnidentifiedImageError:
            raise BadImage(f"{key}: not an image that Pillow can read") from None
        except Exception as e:  # a damaged file can raise anything
            if is_lack(e):
                raise
            raise BadImage(f"{key}: {str(e) or type(e).__name__}") from None

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
        if self.form == "npy":
            height, width = np.load(f"{self.root}/{self.files[self.image[i, 0]]}", mmap_mode="r").shape[1:3]
            return width, height
        key, where = self.key(i), self.image[i].tolist()
        try:
            data = self._cell(PIXELS, *where) if self.form == "parquet" else self._read(i, *where)
            with Image.open(io.BytesIO(data["bytes"] if isinstance(data, dict) else data)) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 lie on their side
                return image.size[::-1] if turned else image.size
        except UnidentifiedImageError:
            raise BadImage(f"{key}: not an image that Pillow can read") from None
        except Exception as e:
            if is_lack(e):
                raise
            raise BadImage(f"{key}: {str(e) or type(e).__name__}") from None

    def _map(self, i):
        """The map of item i as 8-bit PIL, or None where there is none."""
        key, (file, *where), (offset, size) = self.key(i), self.image[i].tolist(), self.beside[i, :2].tolist()
        try:
            data, path = b"", f"{self.root}/{os.path.splitext(key)[0]}.map.png"
            if self.form == "npy" and size:
                data = np.frombuffer(self._read(i, file + 2, offset, size), np.uint8)
                return Image.fromarray(data.reshape(self.size(i)[::-1]))
            if self.form == "tar" and size:
                data = self._read(i, file, offset, size)
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
        except UnidentifiedImageError:  # its own message has an address in it
            raise BadImage(f"{key}: its map is not an image that Pillow can read") from None
        except Exception as e:
            if is_lack(e):
                raise
            raise BadImage(f"{key}: its map does not read ({str(e) or type(e).__name__})") from None

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
        key, (kind, *where) = self.key(i), self.text[i].tolist()
        try:
            if self.form == "parquet":
                objects = self._cell(OBJECTS, *self.image[i].tolist())
            elif self.form == "tar" and self.beside[i, 3]:
                objects = field(json.loads(self._read(i, int(self.image[i, 0]), *self.beside[i, 2:].tolist())), OBJECTS)
            else:
                objects = field(json.loads(self._read(i, *where)), OBJECTS) if kind == JSON_TEXT else None
            if objects is None:
                return []
            names, boxes = field(objects, CATEGORIES), [[float(v) for v in box] for box in objects["bbox"]]
            if len(names) != len(boxes) or any(len(box) != 4 for box in boxes):
                raise ValueError(f"{len(names)} categories, {len(boxes)} boxes: give [x, y, w, h] and a category each")
            numbered = dict(enumerate(self._object_names))
            return [(numbered.get(name, str(name).strip()), box) for name, box in zip(names, boxes)]
        except Exception as e:
            if is_lack(e):
                raise
            raise BadImage(f"{key}: its objects do not read ({e})") from None

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

    def _read(self, i, file, offset, size):
        """Bytes of a file; opened each time, so that workers share no file position and shards may be many."""
        with open(f"{self.root}/{self.files[file] if file >= 0 else os.fsdecode(self.keys[i])}", "rb") as f:
            f.seek(offset)
            return f.read(size)

    def _cell(self, names, file, group, row):
        """One parquet cell, of the first column called one of names, None without one; some row groups are kept."""
        place = (file, group, names)
        if place not in self._groups:
            f = open_parquet(f"{self.root}/{self.files[file]}")
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
    stream[p] -> dict(image, label, text, key, index, flip, bad): the endless sequence over a dataset of N items.

    Position p is item permute(p % N) of epoch p // N. Crop, flip and which caption depend on (seed, p) alone. An item
    that does not decode is named in bad and replaced by another, itself a function of (seed, p). With train=False: the
    items in their own order, centre crop, no flip, first caption.
    """

    def __init__(self, dataset, seed, crop="center", flip=False, train=True):
        if crop not in ("center", "random"):
            raise ValueError(f"crop {crop!r} is not known: choose center or random")
        self.dataset, self.seed, self.train = dataset, seed, train
        self.crop, self.flip = (crop, flip) if train else ("center", False)

    def item(self, p):
        """(index, epoch) of position p."""
        epoch, at = divmod(int(p), len(self.dataset))
        return permute(at, len(self.dataset), seed_of(self.seed, epoch)) if self.train else at, epoch

    def draw(self, p, attempt=0):
        """
        All that is decided for position p before any pixel is read: dict(index, epoch, flip, u, text, label, key).

        text is one str, "" where there is none; u places a random crop; attempt k > 0 is the k-th stand-in.
        """
        index, epoch = self.item(p)
        if attempt:
            index = seed_of(self.seed, "replace", p, attempt) % len(self.dataset)
        meta = self.dataset.meta(index)
        texts = meta["text"] or [""]
        return dict(
            index=index,
            epoch=epoch,
            flip=self.flip and uniform(self.seed, "flip", p) < 0.5,
            u=tuple(uniform(self.seed, "crop", p, axis) for axis in "sxy") if self.crop == "random" else None,
            text=texts[seed_of(self.seed, "text", p) % len(texts) if self.train else 0],
            label=meta["label"],
            key=meta["key"],
        )

    def __getitem__(self, p):
        bad = []
        for attempt in range(100):
            try:
                drawn = self.draw(p, attempt)
                image = self.dataset.pixels(drawn["index"], self.crop, drawn["flip"], drawn["u"])
            except BadImage as e:
                bad.append(str(e))
                continue
            return dict(
                image=image, bad=bad, **{name: drawn[name] for name in ("label", "text", "key", "index", "flip")}
            )
        some = "; ".join(list(dict.fromkeys(bad))[:3])
        raise ValueError(f"all {len(bad)} images tried in {self.dataset.path} are bad ({some}): look at the data")


def step_positions(step, micro, batch_size, grad_accum=1, rank=0, world=1):
    """One rank's positions for one micro-batch: slots (micro * world + rank) * batch_size + j of the global batch."""
    first = step * batch_size * grad_accum * world + (micro * world + rank) * batch_size
    return list(range(first, first + batch_size))


def collate(samples):
    """Samples -> dict(image (B,3,S,S), label and index (B,) int64, flip (B,) bool, text, key and bad: lists of str).

    Where samples have a condition, a dict of tensors (see data/tasks.py), it is stacked too.
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


def _heed_the_parent(worker):
    """In a worker, where SIGTERM is blocked: end when it comes from the parent, and for nobody else."""

    def wait():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def loader(stream, start_step, max_steps, batch_size, grad_accum=1, rank=0, world=1, workers=0, collate_fn=collate):
    """An iterator over this rank's collated micro-batches of steps start_step .. max_steps - 1, in order."""
    is_linux = hasattr(signal, "sigwaitinfo")
    steps = ((step, micro) for step in range(start_step, max_steps) for micro in range(grad_accum))
    batches = torch.utils.data.DataLoader(
        stream,
        batch_sampler=(step_positions(*at, batch_size, grad_accum, rank, world) for at in steps),
        collate_fn=collate_fn,
        num_workers=workers,  # torch gives each one thread
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_heed_the_parent if is_linux else None,
        generator=torch.Generator(),  # torch draws a seed for the workers: not from the global generator
    )
    if not is_linux:
        return iter(batches)
    # Ctrl-C, and torchrun's and slurm's SIGTERM, reach workers too, but are meant for the trainer, which saves and
    # stops: a worker that died would crash it before that. So workers are born with both blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        return iter(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
