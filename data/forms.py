"""The formats of a data set: the items of a folder, a tar or parquet shard, or an array as one `Index` each.

    index_folder(root, paths)      image files; sub-folders are classes
    index_tar(open, shard)         KEY.jpg with KEY.txt, KEY.cls, KEY.json, KEY.map.png, as webdataset and img2dataset
    index_parquet(open, shard)     columns image, label, text, map, objects, as on the Hugging Face hub
    index_npy(root, path)          images.npy, with labels.npy, captions.jsonl, maps.npy

Nothing is decoded here. Damaged files are rejected; what is left out of them is counted.
"""

import hashlib
import json
import math
import os
import re
import tarfile
import zlib
from array import array

import numpy as np

from checkpoint import reject

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif")
HELD_OUT = ("val", "validation", "valid", "test")  # names of validation splits; the first that is present counts
SPLITS = ("", "train", *HELD_OUT)  # a split folder, shards named so, or neither
CAPTIONS = ("text", "caption", "captions", "txt")  # the fields that hold captions, in JSON and parquet
LABELS = ("label", "labels", "cls")
PIXELS = ("image", "img", "jpg", "jpeg", "png", "webp")  # the parquet column that holds the image
MAPS = ("map", "segmentation", "annotation")  # the parquet column that holds semantic maps
OBJECTS = ("objects",)
NAMES = ("classes.json", "meta.json", "map_classes.json", "object_classes.json")
PARTS = ("image", "text", "record", "map")  # parts of an item, each at (file, offset, size)
COLUMNS = ("label", *(f"{part}_{name}" for part in PARTS for name in ("file", "at", "size")))
NOWHERE = (0, 0, 0)  # size 0: the item has no such part
TALLIES = ("labels", "captions", "maps", "objects")  # what is counted: items that have one


class Index:
    """The items of one shard: key, label, and (file, offset, size) of image, text, record (JSON) and map.

    `file` counts in `files`; -1 is the file that the key names (for a map: KEY.map.png). In parquet the image is
    (0, row group, row), the others (0, 0, 1 if there is such a column). A label is an int, or a class name, numbered in
    sorted order. `names[i]` is label i in words, `split` one of SPLITS, `prefix` the beginning of all keys. The header
    is what is known without the rows: the number of items, how many have a label, a caption, a map, objects (of all, of
    those held out, of the one with the least crc32), and what was left out, {reason: [count, example]}.
    """

    def __init__(self, split="", files=(), prefix="", names=(), **more):
        self.header = dict(split=split, files=list(files), prefix=prefix, names=list(names), named=False, **more)
        self.header["left"] = {}
        self.keys, self.labels, self.where, self.stamps = [], [], array("q"), []
        self.captions, self.objects = bytearray(), bytearray()  # whether each item has any

    def add(self, key, image, label=None, text=NOWHERE, record=NOWHERE, map=NOWHERE, captions=0, objects=0, stamp=""):
        """One item; captions, objects: whether it has any; stamp: changes when the image does."""
        if isinstance(label, str):
            label = int(label) if re.fullmatch(r"\s*-?\d{1,9}\s*", label) else label.strip() or None
        elif isinstance(label, float):  # a column with gaps; NaN is no label
            label = int(label) if label.is_integer() else None
        is_label = isinstance(label, str) or (isinstance(label, int) and 0 <= label < 2**31)
        self.keys.append(os.fsencode(key))
        self.labels.append(label if is_label else None)
        self.where.extend((*image, *text, *record, *map))
        self.stamps.append(stamp)
        self.captions.append(bool(captions))
        self.objects.append(bool(objects))

    def leave_out(self, reason, example):
        count, first = self.header["left"].get(reason, (0, example))
        self.header["left"][reason] = (count + 1, first)

    def arrays(self, stamp=""):
        """(header, arrays): arrays is dict(keys uint8, ends of each in it (n,), rows (n,) with fields COLUMNS, held:
        the rows with crc32(key) % 100 == 0); stamp: changes when the shard does.
        """
        header, labels = self.header, self.labels
        header["named"] = any(isinstance(label, str) for label in labels)
        if header["named"]:
            header["names"] = sorted({str(label) for label in labels if label is not None})
            number = {name: i for i, name in enumerate(header["names"])}
            labels = [None if label is None else number[str(label)] for label in labels]
        columns = np.array(self.where, dtype=np.int64).reshape(-1, len(COLUMNS) - 1)
        columns = np.column_stack([[-1 if label is None else label for label in labels], columns]).astype(np.int64)
        low, high = columns.min(0, initial=0), columns.max(0, initial=0)
        types = [np.promote_types(np.min_scalar_type(a), np.min_scalar_type(b)) for a, b in zip(low, high)]
        rows = np.empty(len(columns), dtype=list(zip(COLUMNS, types)))  # each field in as few bytes as possible
        for name, column in zip(COLUMNS, columns.T):
            rows[name] = column
        full = [os.fsencode(header["prefix"]) + key for key in self.keys]
        crc = np.array([zlib.crc32(key) for key in full], dtype=np.int64)
        digest = hashlib.blake2b(b"\n".join(full), digest_size=16)
        digest.update(columns[:, 2:4].tobytes() + repr((stamp, self.stamps)).encode())
        held = np.flatnonzero(crc % 100 == 0)
        least = [int(crc.min()), int(crc.argmin())] if len(crc) else [2**32, 0]  # crc32, row
        has = np.stack([columns[:, 0] >= 0, np.array(self.captions), columns[:, -1] > 0, np.array(self.objects)])
        for name, of in zip(TALLIES, has):
            header[name] = [int(of.sum()), int(of[held].sum()), int(of[least[1] :][:1].sum())]
        header |= dict(n=len(rows), held=len(held), least=least, digest=digest.hexdigest())
        header["highest"] = int(columns[:, 0].max(initial=-1))
        keys, ends = np.frombuffer(b"".join(self.keys), np.uint8), np.cumsum([len(key) for key in self.keys])
        return header, dict(keys=keys, ends=ends.astype(np.int64), rows=rows, held=held)


# --- a folder of images ---


def index_folder(root, paths):
    """One Index for each run of paths that have the same split."""
    images = [path for path in paths if path.lower().endswith(IMAGES)]
    stems = {os.path.splitext(path)[0] for path in images}
    maps = {path for path in images if path.endswith(".map.png") and path.removesuffix(".map.png") in stems}
    images = [path for path in images if path not in maps]  # KEY.map.png without KEY.* is an image
    tables = [path for path in paths if os.path.basename(path) == "metadata.jsonl"]
    described = read_metadata(root, tables)
    if described and described.keys().isdisjoint(images):
        reject(f"{root}/{tables[0]}", "names no image here", "give each file_name relative to metadata.jsonl")
    tops = {path.split("/")[0] for path in images if "/" in path}
    # train/ and val/ are splits; train/ among airplane/ and boat/ is a class
    is_split = tops <= set(SPLITS) or ("train" in tops and tops & set(HELD_OUT))
    split_of = [path.split("/")[0] if is_split and path.split("/")[0] in SPLITS else "" for path in images]
    # without its split, a path starts with its class; as on the Hugging Face hub, labels in metadata.jsonl go first,
    # and a single folder next to it is no class
    below = [path[len(split) :].lstrip("/") for path, split in zip(images, split_of)]
    classes = sorted({path.split("/")[0] for path in below if "/" in path})
    if any(label is not None for label, *_ in described.values()) or (described and len(classes) == 1):
        classes = []
    number = {name: i for i, name in enumerate(classes)}
    indexes = []
    for path, split, rest in zip(images, split_of, below):
        label, record, captions, objects = described.pop(path, (None, NOWHERE, 0, 0))
        label = number[rest.split("/")[0]] if classes and "/" in rest else label
        size, stamp = stat(f"{root}/{path}")
        map_path = os.path.splitext(path)[0] + ".map.png"
        map_size, map_stamp = stat(f"{root}/{map_path}") if map_path in maps else (0, 0)
        if not indexes or indexes[-1].header["split"] != split:
            indexes.append(Index(split, tables, names=classes))
        index = indexes[-1]
        index.add(path, (-1, 0, size), label, NOWHERE, record, (-1, 0, map_size), captions, objects, stamp)
    if indexes:
        for name in described:
            indexes[0].leave_out("in metadata.jsonl, but no image here", name)
        for path in paths:
            if not path.lower().endswith(IMAGES) and path not in tables and os.path.basename(path) not in NAMES:
                indexes[0].leave_out("not an image", path)
    return indexes


def read_metadata(root, tables):
    """{path: (label, where its line is, has captions, has objects)} of all metadata.jsonl."""
    described = {}
    for number, name in enumerate(tables):
        for at, size, record in json_lines(f"{root}/{name}"):
            if not isinstance(field(record, ["file_name"]), str):
                reject(f"{root}/{name}", "has a line without file_name", "make each {file_name, text, label}")
            path = os.path.normpath(os.path.join(os.path.dirname(name), record["file_name"]))
            has = len(captions_of(record)), field(record, OBJECTS) is not None
            described[path] = field(record, LABELS), (number, at, size), *has
    return described


def stat(path):
    """(size, modification time in ns), zeros for a dangling link."""
    try:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except FileNotFoundError:
        return 0, 0


def list_files(root):
    """Every file under root as a sorted relative path; links are followed, hidden files left out."""
    found, above = [], {root: ()}  # above: the real folders on the way to a folder
    for folder, folders, files in os.walk(root, followlinks=True):
        real, way = os.path.realpath(folder), above.pop(folder)
        if real in way:  # a link that leads back up would never end
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        above |= {os.path.join(folder, name): (*way, real) for name in folders}
        inside = folder[len(root) :].strip("/")
        found += [f"{inside}/{name}".lstrip("/") for name in files if not name.startswith(".")]
    return sorted(found)


# --- tar and parquet shards, arrays ---


def index_tar(open_shard, shard):
    """open_shard(shard) is its file."""
    index = Index(shard_split(shard), [shard], f"{shard[:-4]}/")
    with open_shard(shard) as f:
        for key, parts in tar_samples(f, index):
            image = next((parts[extension] for extension in parts if extension in IMAGES), None)
            if image is None:
                index.leave_out("without an image", f"{key}{next(iter(parts))}")
                continue

            def read(extension, parts=parts):
                f.seek(parts[extension][1])
                return f.read(parts[extension][2])

            record = parse(read(".json")) if ".json" in parts else {}
            label = read(".cls").decode("utf-8", "replace") if ".cls" in parts else field(record, LABELS)
            others = (parts.get(extension, NOWHERE) for extension in (".txt", ".json", ".map.png"))
            captions = parts.get(".txt", NOWHERE)[2] or captions_of(record)
            index.add(key, image, label, *others, captions, field(record, OBJECTS) is not None)
    return index


def tar_samples(f, index):
    """(key, {extension: (0, offset, size)}) of each sample; the key ends at the first dot, as in webdataset."""
    end, samples, repeated = os.fstat(f.fileno()).st_size, {}, set()
    try:
        with tarfile.open(fileobj=f, mode="r:") as tar:
            for number, member in enumerate(tar):
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isfile() and stem and member.offset_data + member.size <= end:
                    key, extension = f"{folder}/{stem}" if folder else stem, "." + extension.lower()
                    files = samples.setdefault(key, [])
                    if any(extension == other or {extension, other} <= set(IMAGES) for _, other, _ in files):
                        repeated.add(key)
                    files.append((number, extension, (0, member.offset_data, member.size)))
                elif member.isfile():
                    index.leave_out("hidden, or cut short", member.name)
    except tarfile.TarError as e:
        index.leave_out(f"after damage ({e})", "the rest")
        print(f"{f.name} is damaged ({e}): it is read up to there, {len(samples)} items", flush=True)
    for key, files in samples.items():
        sample, last = {}, -1
        for number, extension, where in files:
            if key in repeated and number != last + 1 and sample:  # then a sample is what is adjacent
                yield key, sample
                sample = {}
            sample[extension], last = where, number
        yield key, sample


def index_parquet(open_shard, shard):
    file = open_shard(shard)
    path, f = file.name, open_parquet(file.name, file)
    columns, schema = f.schema_arrow.names, f.schema_arrow
    if not any(name in columns for name in PIXELS):
        reject(path, f"has the columns {columns}", f"call the one with the images {PIXELS[0]!r}")
    if f.metadata.num_rows > 8 * os.fstat(file.fileno()).st_size:  # keys of so many would fill the memory
        reject(path, f"declares {f.metadata.num_rows} rows, so it is damaged", "fetch it again")
    label, text, objects, maps = (
        next((name for name in names if name in columns), None) for names in (LABELS, CAPTIONS, OBJECTS, MAPS)
    )
    has_maps = maps and re.match("(large_)?binary|struct", str(schema.field(maps).type))  # not some other column
    index = Index(shard_split(shard), [shard], f"{shard.removesuffix('.parquet')}/", hub_names(f, label))
    others = [(0, 0, int(bool(there))) for there in (text, objects, has_maps)]
    wanted = [name for name in (label, text) if name]
    for group in range(f.num_row_groups):
        try:
            table = f.read_row_group(group, columns=wanted, use_threads=False)
            labels, texts = (table[name].to_pylist() if name else None for name in (label, text))
        except Exception as e:  # of many types
            reject(path, f"is damaged ({e})", "fetch it again")
        for row in range(f.metadata.row_group(group).num_rows):
            captions = captions_of(texts[row]) if text else 0
            key, value = f"{len(index.keys):06d}", labels[row] if label else None
            index.add(key, (0, group, row), value, *others, captions, objects)
    return index


def index_npy(root, path):
    folder = path.removesuffix("images.npy")
    images, labels, lines, maps = open_npy(f"{root}/{path}"), None, None, None
    good_shape = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
    if images.dtype != np.uint8 or not good_shape or not images.flags.c_contiguous:
        remedy = "make it uint8 (N,H,W,C), C 1, 3 or 4, in C order"
        reject(f"{root}/{path}", f"is {images.dtype} {images.shape}", remedy)
    if os.path.exists(f"{root}/{folder}labels.npy"):
        labels = open_npy(f"{root}/{folder}labels.npy").reshape(-1).tolist()
    if os.path.exists(f"{root}/{folder}captions.jsonl"):
        lines = list(json_lines(f"{root}/{folder}captions.jsonl"))
    for name, values in (("labels.npy", labels), ("captions.jsonl", lines)):
        if values is not None and len(values) != len(images):
            reject(f"{root}/{folder}{name}", f"has {len(values)} entries, not {len(images)}", "give one for each image")
    if os.path.exists(f"{root}/{folder}maps.npy"):
        maps = open_npy(f"{root}/{folder}maps.npy")
        if maps.dtype != np.uint8 or maps.shape != images.shape[:3] or not maps.flags.c_contiguous:
            remedy = f"make it uint8 {images.shape[:3]}, in C order"
            reject(f"{root}/{folder}maps.npy", f"is {maps.dtype} {maps.shape}", remedy)
    size = images.nbytes // max(len(images), 1)
    area = size // math.prod(images.shape[3:])  # bytes of a map
    files = [path, folder + "captions.jsonl", folder + "maps.npy", folder + "labels.npy"]
    index = Index(folder.rstrip("/"), files, folder, shape=images.shape[1:])
    index.stamps.append(stat(f"{root}/{path}"))
    for i in range(len(images)):
        at, length, value = lines[i] if lines else (0, 0, None)
        map_where = NOWHERE if maps is None else (2, maps.offset + i * area, area)
        where, has = (0, images.offset + i * size, size), (captions_of(value), field(value, OBJECTS) is not None)
        index.add(f"{i:08d}", where, labels[i] if labels else None, NOWHERE, (1, at, length), map_where, *has)
    return index


def shard_split(path):
    """The split that a shard belongs to: its folder train/ or val/, or its name, as in val-00000.tar."""
    *folders, name = path.split("/")
    named = re.match(r"(train|validation|valid|val|test)(?![a-z])", name)
    return next((folder for folder in folders if folder in SPLITS), named[1] if named else "")


# --- JSON, .npy and parquet, which may be damaged ---


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
                    reject(f"{path} line {number}", f"is not JSON ({e})", "correct or delete it")
            at += len(line)


def read_classes(path):
    """Class names from JSON: a list, an object {index: name}, or {"classes": list}."""
    try:
        with open(path, encoding="utf-8") as f:
            names = json.load(f)
    except (ValueError, RecursionError) as e:
        reject(path, f"is not JSON ({e})", "correct it, or remove it")
    if isinstance(names, dict):
        count = 1 + max((int(i) for i in names if re.fullmatch("[0-9]{1,9}", i)), default=-1)
        if count > 100 * len(names) + 100_000:
            reject(path, f"names {len(names)} classes up to number {count - 1}", "number them from 0")
        names = names.get("classes", [names.get(str(i), str(i)) for i in range(count)])
    return [str(name) for name in names] if isinstance(names, list) else []


def open_npy(path):
    """The array in a .npy file, mapped."""
    reason = "it is an .npz"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.ndarray):
            return array
    except Exception as e:  # headers are read as Python's literals, which fail in many ways
        reason = (str(e) or type(e).__name__)[:200]
    reject(path, f"does not load as .npy ({reason})", "write it again")


def open_parquet(path, file=None):
    try:
        import pyarrow.parquet
    except ImportError:
        reject(path, "is parquet, which needs pyarrow", "pip install pyarrow")
    try:
        f = pyarrow.parquet.ParquetFile(file or path, pre_buffer=False)
        f.schema_arrow.names  # noqa: B018  where some damage shows
        return f
    except Exception as e:  # of many types
        reject(path, f"does not open as parquet ({e})", "fetch or write it again")


def hub_names(f, column):
    """Class names of a parquet file's column, which the Hugging Face hub keeps in the schema; [] without."""
    names = parse((f.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    for name in ("info", "features", column, "names"):
        names = field(names, [name])
    return [str(name) for name in names] if isinstance(names, list) else []
