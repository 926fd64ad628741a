"""The formats of a data set: the items of a folder, a tar or parquet shard, or an array as one `Index` each.

    index_folder(root, paths)      image files with KEY.txt, KEY.json, metadata.jsonl or .csv; sub-folders are classes
    index_tar(open, shard)         KEY.jpg with KEY.txt, KEY.cls, KEY.json, KEY.map.png, as webdataset and img2dataset
    index_parquet(open, shard)     columns image, label, text, map, objects, as on the Hugging Face hub
    index_npy(root, path)          images.npy, with labels.npy, captions.jsonl, maps.npy

No image is decoded here. Labels, captions and objects are read once, into the index; what is left out is counted.
"""

import codecs
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import tarfile
import unicodedata
import zlib
from array import array

import numpy as np
from PIL import Image

from checkpoint import reject

Image.init()  # all of Pillow's formats but stubs without a decoder, and EPS, which runs ghostscript
FORMATS = sorted(Image.OPEN.keys() - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
IMAGES = tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in FORMATS))
HELD_OUT = ("val", "validation", "valid", "test")  # names of validation splits; the first that is present counts
SPLITS = ("", "train", *HELD_OUT)  # a split folder, shards named so, or neither
CAPTIONS = ("text", "caption", "captions", "txt", "prompt")  # the fields that hold captions, in JSON, CSV and parquet
LABELS = ("label", "labels", "cls")
PIXELS = ("image", "img", "jpg", "jpeg", "png", "webp")  # the parquet column that holds the image
MAPS = ("map", "segmentation", "annotation")  # the parquet column that holds semantic maps
OBJECTS = ("objects",)
FILES = ("file_name", "filename", "file", "image", "path")  # the field of metadata that names the image
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
SIDECARS = (".txt", ".caption", ".json", ".cls", ".map.png")  # parts of an item beside KEY.jpg
NAMES = ("classes.json", "meta.json", "map_classes.json", "object_classes.json")
OWN = (*NAMES, "prepare.py", "dropped.jsonl", "bpe.tiktoken", "prompts.txt", "sheet.png")  # what prepare.py leaves
COLUMNS = (
    "label",
    "image_file",
    "image_at",
    "image_size",
    "map_file",
    "map_at",
    "map_size",
    "record_at",
    "record_size",
)
ARRAYS = ("keys", "ends", "rows", "records", "held")  # of Index.arrays
NOWHERE = (0, 0, 0)  # size 0: the item has no such part
TALLIES = ("labels", "captions", "maps", "objects")  # what is counted: items that have one
POINTER = b"version https://git-lfs"


class Index:
    """The items of one shard: key, label, (file, offset, size) of image and map, and a record of captions and objects.

    `file` counts in `files`; -1 is the file that the key names (for a map: KEY.map.png). In parquet the image is
    (0, row group, row), the map (0, 0, 1 if there is such a column). A label is an int, or a class name, numbered in
    sorted order. `names[i]` is label i in words, `split` one of SPLITS, `prefix` the beginning of all keys. The header
    is what is known without the rows: the number of items, how many have a label, a caption, a map, objects (of all, of
    those held out), and what was left out, {reason: [count, example]}.
    """

    def __init__(self, split="", files=(), prefix="", names=(), **more):
        self.header = dict(
            split=split, files=list(files), prefix=prefix, names=list(names), named=False, left={}, repeated=0
        )
        self.header |= more
        self.keys, self.labels, self.where, self.stamps = [], [], array("q"), []
        self.records, self.has = bytearray(), []  # JSON {text, objects} of all items; whether each has those

    def add(self, key, image, map=NOWHERE, label=None, text=None, objects=None, stamp=""):
        """One item; text: its captions, or JSON with them; objects: as in JSON; stamp: changes when the image does."""
        number = class_of(label)
        if number is None and str(label).strip() not in ("None", "", "nan", "-1", "-1.0"):
            self.leave_out("labels that are no class", f"{key}: {label}")
        record = {"text": captions} if (captions := captions_of(text)) else {}
        try:
            boxes = objects_of(objects)
            kept = [box for box in boxes if box[1][2] > 0 and box[1][3] > 0]
            record |= {"objects": kept} if kept else {}
            if len(kept) < len(boxes):
                self.leave_out("boxes without area", key, len(boxes) - len(kept))
        except Exception as e:  # JSON of any shape
            self.leave_out("items whose objects do not read", f"{key}: {e or type(e).__name__}")
        data = json.dumps(record).encode() if record else b""
        self.keys.append(os.fsencode(key))
        self.labels.append(number)
        self.where.extend((*image, *map, len(self.records), len(data)))
        self.has.append((number is not None, "text" in record, map[2] > 0, "objects" in record))
        self.records += data
        self.stamps.append(stamp)

    def leave_out(self, reason, example, count=1):
        leave_out(self.header["left"], reason, example, count)

    def arrays(self, stamp=""):
        """(header, arrays): arrays is dict(keys uint8, ends of each in it (n,), rows (n,) with fields COLUMNS, records:
        JSON as uint8, held: the rows with crc32(key) % 100 == 0, else the one with the least); stamp: changes when the
        shard does.
        """
        header, labels = self.header, self.labels
        header["named"] = any(isinstance(label, str) for label in labels)
        if header["named"]:
            header["names"] = by_value({str(label) for label in labels if label is not None})
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
        has = np.array(self.has, dtype=np.int64).reshape(-1, len(TALLIES))
        header |= dict(n=len(rows), held=len(held), least=int(crc.min(initial=2**32)), digest=digest.hexdigest())
        held = held if len(held) or not len(crc) else np.array([crc.argmin()])
        header |= {name: [int(total), int(of)] for name, total, of in zip(TALLIES, has.sum(0), has[held].sum(0))}
        header |= dict(highest=int(columns[:, 0].max(initial=-1)), distinct=len(set(labels) - {None}))
        keys, ends = np.frombuffer(b"".join(self.keys), np.uint8), np.cumsum([len(key) for key in self.keys])
        records = np.frombuffer(bytes(self.records), np.uint8)
        return header, dict(keys=keys, ends=ends.astype(np.int64), rows=rows, records=records, held=held)


def leave_out(left, reason, example, count=1):
    before, first = left.get(reason, (0, example))
    left[reason] = before + count, first


def leave_out_file(left, path):
    """Counts a file of a format that is not read, by its extension."""
    leave_out(left, f"{os.path.splitext(path)[1].lower() or 'other'} files", path)


# --- a folder of images ---


def index_folder(root, paths):
    """One Index for each run of paths that have the same split."""
    left = {}
    images, parts, about = read_folder(root, paths, left)
    tops = {path.split("/")[0] for path in images if "/" in path}
    # train/ and val/ are splits; train/ among airplane/ and boat/ is a class
    is_split = tops <= set(SPLITS) or ("train" in tops and tops & set(HELD_OUT))
    split_of = [path.split("/")[0] if is_split and path.split("/")[0] in SPLITS else "" for path in images]
    below = [path[len(split) :].lstrip("/") for path, split in zip(images, split_of)]  # starts with its class
    # as on the Hugging Face hub, labels in metadata go first, and a single folder of images with captions is no class
    classes = {path.split("/")[0] for path in below if "/" in path}
    has_labels = any(label is not None for label, *_ in about.values())
    if has_labels or (about and len(classes) == 1) or is_sharded(below):
        classes = {}
    number, names = number_classes(classes)
    indexes = [Index(split_of[0] if images else "", names=names, left=left)]
    for path, split, rest in zip(images, split_of, below):
        label, captions, objects = about.get(path, (None, [], None))
        label = number[rest.split("/")[0]] if number and "/" in rest else label
        size, stamp = stat(f"{root}/{path}")
        map_path = parts.get(path, {}).get(".map.png")
        map_size = stat(f"{root}/{map_path}")[0] if map_path else 0
        if indexes[-1].header["split"] != split:
            indexes.append(Index(split, names=names))
        indexes[-1].add(path, (-1, 0, size), (-1, 0, map_size), label, captions, objects, stamp)
    return indexes


def read_folder(root, paths, left):
    """(images, {image: {ending: path}} of what lies beside them, {image: (label, captions, objects)})."""
    images = [path for path in paths if path.lower().endswith(IMAGES)]
    by_name, by_stem = {}, {}  # images by their normal path, with and without extension
    for path in images:
        by_name.setdefault(normal(path), []).append(path)
        by_stem.setdefault(os.path.splitext(normal(path))[0], []).append(path)
    maps = {path for path in images if path.lower().endswith(".map.png") and normal(path)[:-8] in by_stem}
    images = [path for path in images if path not in maps]  # KEY.map.png without KEY.* is an image
    there, parts, tables = set(images), {}, []
    for path in paths:
        name = os.path.basename(path)
        ending = next((ending for ending in SIDECARS if name.lower().endswith(ending)), None)
        if name.lower() in METADATA:
            tables.append(path)
        elif path in there or name in OWN:
            continue
        elif ending is None:
            leave_out_file(left, path)
        else:
            stem = path[: -len(ending)]
            owners = by_name.get(normal(stem)) or by_stem.get(normal(stem + ending)[: -len(ending)], [])
            if len(owners) == 1:  # KEY.jpg.txt or KEY.txt
                parts.setdefault(owners[0], {})[ending] = path
            else:
                why = "beside several images of one name" if owners else "without an image"
                leave_out(left, f"{ending} files {why}", path)
    about = read_metadata(root, tables, by_name, left)
    for path, beside in parts.items():

        def read(ending, beside=beside):
            with open(f"{root}/{beside[ending]}", "rb") as f:
                return f.read()

        pairs = zip(about.get(path, (None, [], None)), describe(path, beside, read, left))
        about[path] = tuple(other if one in (None, []) else one for one, other in pairs)  # metadata goes first
    return images, parts, {path: values for path, values in about.items() if values != (None, [], None)}


def normal(path):
    """A path as it is compared: normalized Unicode, slashes, the extension in lower case."""
    stem, extension = os.path.splitext(os.path.normpath(unicodedata.normalize("NFC", path.replace("\\", "/"))))
    return stem + extension.lower()


def is_sharded(paths):
    """Whether all folders are shards of img2dataset, as 00000/000000012.jpg."""
    inside = [path.split("/") for path in paths if "/" in path]
    return all(re.fullmatch(r"\d{5,}", first) and re.match(rf"{first}\d+\.", last) for first, *_, last in inside)


def number_classes(folders):
    """({folder: number}, names): a whole number is its own number, unless they are ids far apart."""
    folders = by_value(folders)
    numbers = [int(name) for name in folders if name.isascii() and name.isdigit()]
    if not folders or len(set(numbers)) < len(folders) or is_far_apart(max(numbers), len(numbers)):
        return {name: i for i, name in enumerate(folders)}, folders
    names = [str(i) for i in range(max(numbers) + 1)]
    for number, name in zip(numbers, folders):
        names[number] = name
    return dict(zip(folders, numbers)), names


def is_far_apart(highest, count):
    """Whether `count` numbers up to `highest` are ids rather than classes."""
    return highest >= max(1000, 10 * count)


def by_value(names):
    """Sorted: whole numbers by value, then words."""
    is_number = lambda name: name.isascii() and name.isdigit()  # noqa: E731
    return sorted(names, key=lambda name: (0, int(name), name) if is_number(name) else (1, 0, name))


def read_metadata(root, tables, by_name, left):
    """{image: (label, captions, objects)} of all metadata files; several lines of an image add their captions."""
    about, named = {}, None
    for table in tables:
        for record in read_table(f"{root}/{table}"):
            name = field(record, FILES)
            if not isinstance(name, str):
                leave_out(left, "lines of metadata without file_name", table)
                continue
            path = os.path.normpath(os.path.join(os.path.dirname(table), name))
            named, found = name, by_name.get(normal(path), [])
            found = [path] if path in found else found
            if len(found) != 1:
                why = "that fit several images" if found else "without an image"
                leave_out(left, f"lines of metadata {why}", name)
                continue
            label, captions, objects = about.get(found[0], (None, [], None))
            other = field(record, LABELS)
            if label is not None and other not in (None, label):
                leave_out(left, "labels in metadata unlike an earlier line", name)
            captions = captions + [caption for caption in captions_of(record) if caption not in captions]
            objects = field(record, OBJECTS) if objects is None else objects
            about[found[0]] = other if label is None else label, captions, objects
    if named and not about:
        reject(f"{root}/{tables[0]}", f"names no image here, as {named}", "give file_name relative to this file")
    return about


def read_table(path):
    """The records of a metadata file: JSON lines, CSV or parquet."""
    if path.lower().endswith(".parquet"):
        return open_parquet(path).read(use_threads=False).to_pylist()
    if path.lower().endswith(".jsonl"):
        return json_lines(path)
    text = read_text(path)
    # the delimiter and quotes that give the first line a name of FILES
    for quote, delimiter in itertools.product("\"'", ",;\t|"):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quotechar=quote, skipinitialspace=True)
        names = [name.strip() for name in next(reader, [])]
        if field(dict.fromkeys(names, 1), FILES):
            break
    try:
        rows = list(reader)
    except csv.Error as e:
        reject(path, f"is not CSV ({e})", "correct it")
    # a caption in the last column may have delimiters and no quotes
    last = len(names) - 1
    rows = [row[:last] + [f"{delimiter} ".join(row[last:])] if len(row) > len(names) else row for row in rows]
    return [dict(zip(names, row)) for row in rows if row]


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
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX", "__pycache__"))]
        above |= {os.path.join(folder, name): (*way, real) for name in folders}
        inside = folder[len(root) :].strip("/")
        found += [f"{inside}/{name}".lstrip("/") for name in files if not name.startswith(".")]
    return sorted(found)


# --- tar and parquet shards, arrays ---


def describe(key, parts, read, left):
    """(label, captions, objects) of an item from the bytes read(ending) of those of its parts that are SIDECARS."""
    data = {ending: read(ending) for ending in parts if ending in SIDECARS and ending != ".map.png"}
    for ending in [ending for ending in data if data[ending].startswith(POINTER)]:
        leave_out(left, "git-lfs pointers", key + ending)
        del data[ending]
    record = {}
    if ".json" in data:
        try:
            record = json.loads(decode(data[".json"]))
        except (ValueError, RecursionError):
            leave_out(left, ".json files that are not JSON", key)
    text = next((text for end in (".txt", ".caption") if end in data and (text := decode(data[end]).strip())), record)
    label = decode(data[".cls"]) if ".cls" in data else field(record, LABELS)
    return label, captions_of(text), field(record, OBJECTS)


def index_tar(open_shard, shard):
    """open_shard(shard) is its file."""
    index = Index(shard_split(shard), [shard], f"{shard[:-4]}/")
    with open_shard(shard) as f:
        check_pointer(f, shard)
        for key, parts in tar_samples(f, index):
            image = next((parts[ending] for ending in parts if ending in IMAGES), None)
            for ending in parts:
                if image is None:
                    index.leave_out("tar members without an image", key + ending)
                elif parts[ending] != image and ending not in SIDECARS:
                    index.leave_out("tar members beside an image", key + ending)

            def read(ending, parts=parts):
                f.seek(parts[ending][1])
                return f.read(parts[ending][2])

            if image is not None:
                about = describe(key, parts, read, index.header["left"])
                index.add(key, image, parts.get(".map.png", NOWHERE), *about)
    return index


def tar_samples(f, index):
    """(key, {extension: (0, offset, size)}) of each sample; the key ends at the first dot, as in webdataset, unless no
    image has that key: img_22.05.png.
    """
    end, samples = os.fstat(f.fileno()).st_size, {}
    for number, member in enumerate(tar_members(f, end, index)):
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = name.partition(".")
        if not member.isfile() or not stem or member.offset_data + member.size > end:
            why = (
                "cut short" if member.isfile() and stem else "that are hidden" if member.isfile() else "that are links"
            )
            if not member.isdir():
                index.leave_out(f"tar members {why}", member.name)
            continue
        key = f"{folder}/{stem}" if folder else stem
        files = samples.setdefault(unicodedata.normalize("NFC", key), [])
        files.append((number, key, "." + extension.lower(), (0, member.offset_data, member.size)))
    for files in samples.values():
        groups = {"": files}
        if not any(extension in IMAGES for _, _, extension, _ in files):
            groups = {}
            for number, key, extension, where in files:
                middle = re.sub(r"(\.map)?\.[^.]*$", "", extension)
                part = number, key + middle, extension[len(middle) :], where
                groups.setdefault(middle, []).append(part)
        for group in groups.values():
            yield from samples_of_key(group, index)


def tar_members(f, end, index):
    """The members of a tar file, and of the tars that are joined to it."""
    at = 0
    while at < end:
        f.seek(at)
        begin, reason = at, ""
        try:
            with tarfile.open(fileobj=f, mode="r:") as tar:
                yield from tar
                at = tar.offset
        except tarfile.TarError as e:
            reason = f" ({e})"
        if at == begin:  # not a header
            index.leave_out(f"bytes that are not tar{reason}", f"from byte {at}", end - at)
            return
        f.seek(at)
        while (block := f.read(2**20)) and not block.strip(b"\0"):
            at += len(block)
        at += (len(block) - len(block.lstrip(b"\0"))) // 512 * 512


def samples_of_key(files, index):
    """(key, {extension: where}) of each sample among the files [(number, key, extension, where), ...] of one key.

    Where the key is repeated, adjacent files are a sample; those that could belong to several images to none.
    """
    key, extensions = files[0][1], [extension for _, _, extension, _ in files]
    images = [extension for extension in extensions if extension in IMAGES]
    if len(set(extensions)) == len(files) and len(images) < 2:
        yield key, {extension: where for _, _, extension, where in files}
        return
    index.header["repeated"] += 1
    runs, last = [], -2
    for number, _, extension, where in files:
        if number != last + 1:
            runs.append([{}])
        if extension in runs[-1][-1]:
            runs[-1].append({})
        runs[-1][-1][extension] = where
        last = number
    for run in runs:
        is_clear = len({tuple(sample) for sample in run}) == 1
        for sample in run:
            parts = sample if is_clear else {end: where for end, where in sample.items() if end in IMAGES}
            for extension in sample.keys() - parts.keys():
                index.leave_out("tar members that fit several images", key + extension)
            if parts:
                yield key, parts


def index_parquet(open_shard, shard):
    file = open_shard(shard)
    check_pointer(file, shard)
    path, f = file.name, open_parquet(file.name, file)
    schema = f.schema_arrow

    def column(names, types=""):
        """The first column that is called one of these names, of one of these types."""
        named = (name for wanted in names for name in schema.names if name.lower() == wanted)
        return next((name for name in named if re.search(types, str(schema.field(name).type))), None)

    pixels, maps = (column(names, "^(large_|fixed_size_)?binary|^struct.*binary") for names in (PIXELS, MAPS))
    label, text, objects = column(LABELS), column(CAPTIONS), column(OBJECTS)
    names = hub_names(f, label)
    index = Index(shard_split(shard), [shard], f"{shard[:-8]}/", names, columns=dict(image=pixels, map=maps))
    if pixels is None:
        what = "whose images are paths, without bytes" if column(PIXELS) else f"without images, only {schema.names}"
        index.leave_out(f"rows of parquet {what}", shard, f.metadata.num_rows)
        return index
    if f.metadata.num_rows > 8 * os.fstat(file.fileno()).st_size:  # keys of so many would fill the memory
        reject(path, f"declares {f.metadata.num_rows} rows, so it is damaged", "fetch it again")
    wanted, row_number = [name for name in (label, text, objects) if name], 0
    for group in range(f.num_row_groups):
        try:
            rows = f.read_row_group(group, columns=wanted, use_threads=False).to_pylist() if wanted else None
            missing = rows_without_bytes(f, group, pixels)
        except Exception as e:  # of many types
            reject(path, f"is damaged ({e})", "fetch it again")
        for row in range(f.metadata.row_group(group).num_rows):
            key, values = f"{row_number:06d}", rows[row] if rows else {}
            row_number += 1
            if row in missing:
                index.leave_out(
                    "rows of parquet with a path or nothing for the image's bytes", f"{index.header['prefix']}{key}"
                )
                continue
            about = (values.get(name) for name in (label, text, objects))
            index.add(key, (0, group, row), (0, 0, int(maps is not None)), *about)
    return index


def rows_without_bytes(f, group, pixels):
    """The rows of a parquet row group whose image is null; only where its statistics count some is the image read."""
    about = f.metadata.row_group(group)
    leaves = [about.column(i) for i in range(about.num_columns)]
    leaf = next((leaf for leaf in leaves if leaf.path_in_schema in (pixels, f"{pixels}.bytes")), None)
    if not (leaf and leaf.statistics and leaf.statistics.null_count):
        return set()
    cells = f.read_row_group(group, columns=[leaf.path_in_schema], use_threads=False).column(0).to_pylist()
    return {row for row, cell in enumerate(cells) if not image_bytes(cell)}


def image_bytes(cell):
    """The encoded image in a cell of parquet: bytes, or {bytes, path}."""
    return cell.get("bytes") if isinstance(cell, dict) else cell


def index_npy(root, path):
    folder = path.removesuffix("images.npy")
    images, labels, records, maps = open_npy(f"{root}/{path}"), None, None, None
    good_shape = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
    if images.dtype != np.uint8 or not good_shape or not images.flags.c_contiguous:
        remedy = "make it uint8 (N,H,W,C), C 1, 3 or 4, in C order"
        reject(f"{root}/{path}", f"is {images.dtype} {images.shape}", remedy)
    if os.path.exists(f"{root}/{folder}labels.npy"):
        labels = open_npy(f"{root}/{folder}labels.npy").reshape(-1).tolist()
    if os.path.exists(f"{root}/{folder}captions.jsonl"):
        records = list(json_lines(f"{root}/{folder}captions.jsonl"))
    for name, values in (("labels.npy", labels), ("captions.jsonl", records)):
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
    for i in range(len(images)):
        record = records[i] if records else None
        map_where = NOWHERE if maps is None else (2, maps.offset + i * area, area)
        about = labels[i] if labels else None, record, field(record, OBJECTS)
        index.add(f"{i:08d}", (0, images.offset + i * size, size), map_where, *about)
    index.stamps.append(stat(f"{root}/{path}"))
    return index


def shard_split(path):
    """The split that a shard belongs to: its folder train/ or val/, or its name, as in val-00000.tar."""
    *folders, name = path.split("/")
    named = re.match(r"(train|validation|valid|val|test)(?![a-z])", name)
    return next((folder for folder in folders if folder in SPLITS), named[1] if named else "")


# --- text, labels and objects, .npy and parquet, which may be damaged ---


def decode(data):
    """bytes as text: UTF-8, UTF-16 or UTF-32, else cp1252; a byte order mark is no part of it."""
    boms = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
    boms |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = next((name for bom, name in boms.items() if data.startswith(bom)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in data[:2]:  # UTF-16 of a Latin letter, without the mark
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def read_text(path):
    with open(path, "rb") as f:
        check_pointer(f, path)
        return decode(f.read())


def check_pointer(f, path):
    """Rejects an open file that git-lfs has not fetched; else its position is the beginning."""
    if f.read(len(POINTER)) == POINTER:
        reject(path, "is a git-lfs pointer", "fetch the file itself: git lfs pull")
    f.seek(0)


def parse(text):
    """JSON, or {} where it is damaged."""
    try:
        return json.loads(decode(text) if isinstance(text, bytes) else text)
    except (ValueError, RecursionError):
        return {}


def field(record, names):
    """The first of these fields, in any case, that a JSON object has, else None."""
    record = {str(name).lower(): value for name, value in record.items()} if isinstance(record, dict) else {}
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)


def captions_of(value):
    """list of str from a caption, a list of them, or a JSON object that holds either."""
    value = field(value, CAPTIONS) if isinstance(value, dict) else value
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text.strip()]


def class_of(label):
    """An int or a name from a label; None if it is no class."""
    if isinstance(label, str):
        label = label.strip()
        label = int(float(label)) if re.fullmatch(r"-?\d{1,9}(\.0*)?", label) else label or None
    elif isinstance(label, float):  # a column with gaps
        label = int(label) if label.is_integer() else None
    return label if isinstance(label, str) or (isinstance(label, int) and 0 <= label < 2**31) else None


def objects_of(value):
    """[(name or number, [x, y, w, h]), ...] of {"bbox": [...], "categories": [...]}; ValueError where they differ."""
    if value is None:
        return []
    names, boxes = field(value, ["categories", "category"]) or [], [[float(v) for v in box] for box in value["bbox"]]
    if len(names) != len(boxes) or any(len(box) != 4 for box in boxes):
        raise ValueError(f"{len(names)} categories, {len(boxes)} boxes: give [x, y, w, h] and a category each")
    return list(zip(names, boxes))


def json_lines(path):
    """The value of every line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as e:
                reject(f"{path} line {number}", f"is not JSON ({e})", "correct or delete it")


def read_classes(path):
    """Class names from JSON: a list, an object {index: name}, or {"classes": list}."""
    try:
        names = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as e:
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
    with open(path, "rb") as f:
        check_pointer(f, path)
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
        names = names.get(name) if isinstance(names, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []
