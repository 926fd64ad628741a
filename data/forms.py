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
import importlib
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
from pathlib import Path

import numpy as np
from PIL import ContainerIO, Image

from checkpoint import POINTER, check_fetched, check_pointer, reading, reject

Image.preinit()  # the common formats first: they are tried in this order
Image.init()  # all of Pillow's formats but stubs without a decoder, and EPS, which runs ghostscript
FORMATS = [name for name in Image.ID if name not in ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")]
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
COLUMNS = 11  # label; file, offset, size of the image; of the map; offset, size of the record; width, height
NOWHERE = (0, 0, 0)  # size 0: the item has no such part
TALLIES = ("labels", "captions", "maps", "objects")  # what is counted: items that have one
NO_BYTES = "rows without the bytes of an image"  # but, perhaps, its path


class Index:
    """The items of one shard: label, (file, offset, size) of image and map, and a record: JSON {key, text, objects}.

    `file` counts in `files`; -1 is the file that the key names. In parquet the image is (0, row group, row), the map
    (0, 0, 1 if there is such a column). A label is an int, or a class name, numbered in sorted order. `names[i]` is
    label i in words, `split` one of SPLITS, `prefix` the beginning of all keys. The header is what is known without the
    rows: the number of items, how many have a label, a caption, a map, objects (of all, of those held out), and what
    was left out, {reason: [count, example]}.
    """

    def __init__(self, split="", files=(), prefix="", names=(), left=None, **more):
        self.left = Left() if left is None else left
        self.header = dict(split=split, files=list(files), prefix=prefix, names=list(names), named=False, **more)
        self.header |= dict(left=self.left, repeated=0)
        self.keys, self.labels, self.where, self.stamps = [], [], array("q"), []
        self.records, self.has = bytearray(), []  # JSON of all items; whether each has TALLIES

    def add(self, key, image, map=NOWHERE, stamp="", label=None, text=None, objects=None, size=(0, 0)):
        """One item; text: its captions, objects: as in JSON; stamp: changes when the image does; size: 0 if unknown."""
        number = class_of(label)
        if number is None and str(label).strip() not in ("None", "", "nan", "-1", "-1.0"):
            self.left.add("labels that are no class", f"{key}: {label}")
        record = {"text": captions} if (captions := captions_of(text)) else {}
        try:
            boxes = objects_of(objects)
            kept = [box for box in boxes if box[1][2] > 0 and box[1][3] > 0]
            record |= {"objects": kept} if kept else {}
            if len(kept) < len(boxes):
                self.left.add("boxes without area", key, len(boxes) - len(kept))
        except Exception as e:  # JSON of any shape
            self.left.add("items whose objects do not read", f"{key}: {e or type(e).__name__}")
        data = json.dumps({"key": key} | record).encode()
        self.keys.append(os.fsencode(key))
        self.labels.append(number)
        self.where.extend((*image, *map, len(self.records), len(data), *size))
        self.has.append((number is not None, "text" in record, map[2] > 0, "objects" in record))
        self.records += data
        self.stamps.append(stamp)

    def arrays(self, stamp=""):
        """(header, arrays): arrays is dict(rows (n, COLUMNS) int64, records: JSON as uint8, held: the rows with
        crc32(key) % 100 == 0, else the one with the least); stamp: changes when the shard does.
        """
        header, labels = self.header, self.labels
        header["named"] = any(isinstance(label, str) for label in labels)
        if header["named"]:
            header["names"] = by_value({str(label) for label in labels if label is not None})
            number = {name: i for i, name in enumerate(header["names"])}
            labels = [None if label is None else number[str(label)] for label in labels]
        labels = np.array([-1 if label is None else label for label in labels], dtype=np.int64)
        rows = np.column_stack([labels, np.array(self.where, dtype=np.int64).reshape(-1, COLUMNS - 1)])
        keys = [os.fsencode(header["prefix"]) + key for key in self.keys]
        crc = np.array([zlib.crc32(key) for key in keys], dtype=np.int64)
        digest = hashlib.blake2b(b"\n".join(keys), digest_size=16)
        digest.update(rows[:, 2:4].tobytes() + repr((stamp, self.stamps)).encode())
        held = np.flatnonzero(crc % 100 == 0)
        has = np.array(self.has, dtype=np.int64).reshape(-1, len(TALLIES))
        header |= dict(n=len(rows), held=len(held), least=int(crc.min(initial=2**32)), digest=digest.hexdigest())
        held = held if len(held) or not len(crc) else np.array([crc.argmin()])
        header |= {name: [int(total), int(of)] for name, total, of in zip(TALLIES, has.sum(0), has[held].sum(0))}
        header |= dict(highest=int(labels.max(initial=-1)), distinct=len(np.unique(labels[labels >= 0])))
        return header, dict(rows=rows, records=np.frombuffer(bytes(self.records), np.uint8), held=held)


class Left(dict):
    """What is left out: {reason: (count, example)}."""

    def add(self, reason, example, count=1):
        before, first = self.get(reason, (0, example))
        self[reason] = before + count, first

    def add_file(self, path):
        """A file of a format that is not read."""
        self.add(f"{os.path.splitext(path)[1].lower() or 'other'} files", path)


def unread(paths, headers):
    """The Left of files beside those that shards or arrays, by their headers, are read from."""
    read = {name for header in headers for name in header["files"]}
    # img2dataset writes KEY.parquet and KEY_stats.json beside KEY.tar
    stems = {os.path.splitext(path)[0] for path in read if path.lower().endswith(("tar", "parquet"))}
    read |= {stem + ending for stem in stems for ending in (".parquet", "_stats.json")}
    left = Left()
    for path in paths:
        if path not in read and os.path.basename(path) not in OWN:
            left.add_file(path)
    return left


# --- a folder of images ---


def index_folder(root, paths):
    """One Index for each run of paths that have the same split."""
    left = Left()
    images, parts, about = read_folder(root, paths, left)
    first = [path.split("/")[0].lower() if "/" in path else "" for path in images]
    # train/ and val/ are splits; train/ among airplane/ and boat/ is a class
    is_split = set(first) - {""} <= set(SPLITS) or ("train" in first and set(first) & set(HELD_OUT))
    split_of = [name if is_split and name in SPLITS else "" for name in first]
    below = [nfc(path[len(split) :].lstrip("/")) for path, split in zip(images, split_of)]  # starts with its class
    # as on the Hugging Face hub, labels in metadata go first, and a single folder of images with captions is no class
    folders = {path.split("/")[0] for path in below if "/" in path}
    has_labels = any("label" in values for values in about.values())
    if has_labels or (any(about.values()) and len(folders) == 1) or is_sharded(below):
        folders = {}
    number, names = number_classes(folders)
    indexes = [Index(split_of[0] if images else "", names=names, left=left)]
    for path, split, rest in zip(images, split_of, below):
        if indexes[-1].header["split"] != split:
            indexes.append(Index(split, names=names))
        size, stamp = stat(f"{root}/{path}")
        map_where, files = NOWHERE, indexes[-1].header["files"]
        if map_path := parts.get(path, {}).get(".map.png"):
            map_where = len(files), 0, stat(f"{root}/{map_path}")[0]
            files.append(map_path)
        label = {"label": number[rest.split("/")[0]]} if number and "/" in rest else {}
        indexes[-1].add(path, (-1, 0, size), map_where, stamp, **label | about.get(path, {}))
    return indexes


def read_folder(root, paths, left):
    """(images, {image: {ending: path}} of the files beside it, {image: {label, text, objects}} from these files and
    metadata).
    """
    images = [path for path in paths if path.lower().endswith(IMAGES)]
    by_name, by_stem = {}, {}  # images by their normal path, with and without extension
    for path in images:
        by_name.setdefault(normal(path), []).append(path)
        by_stem.setdefault(os.path.splitext(normal(path))[0], []).append(path)
    maps = {path for path in images if path.lower().endswith(".map.png") and normal(path)[:-8] in by_stem}
    images = [path for path in images if path not in maps]  # KEY.map.png without KEY.* is an image
    parts, tables, others = {}, [], sorted(set(paths) - set(images))
    for path in others:
        name = os.path.basename(path)
        ending = next((ending for ending in SIDECARS if name.lower().endswith(ending)), None)
        if name.lower() in METADATA:
            tables.append(path)
        elif ending and name not in OWN:
            stem = path[: -len(ending)]
            owners = by_name.get(normal(stem)) or by_stem.get(normal(stem + ending)[: -len(ending)], [])
            if len(owners) == 1:  # KEY.jpg.txt or KEY.txt
                parts.setdefault(owners[0], {})[ending] = path
            else:
                why = "beside several images of one name" if owners else "without an image"
                left.add(f"{ending} files {why}", path)
        elif name not in OWN:
            left.add_file(path)
    about = read_metadata(root, tables, by_name, left)
    for path, beside in parts.items():

        def read(ending, beside=beside):
            try:
                with open(f"{root}/{beside[ending]}", "rb") as f:
                    return f.read()
            except OSError as e:
                left.add(f"{ending} files that cannot be read ({e.strerror})", beside[ending])
                return b""

        about[path] = describe(os.path.splitext(path)[0], beside, read, left) | about.get(path, {})
    return images, parts, about


def normal(path):
    """A path as it is compared: normalized Unicode, slashes, the extension in lower case."""
    stem, extension = os.path.splitext(os.path.normpath(nfc(path.replace("\\", "/"))))
    return stem + extension.lower()


def nfc(text):
    """Normalized Unicode: macOS writes some letters as two characters."""
    return unicodedata.normalize("NFC", text)


def is_sharded(paths):
    """Whether all folders are shards of img2dataset, as 00000/000000012.jpg."""
    inside = [path.split("/") for path in paths if "/" in path]
    return all(re.fullmatch(r"\d{5,}", first) and re.match(rf"{first}\d+\.", last) for first, *_, last in inside)


def number_classes(folders):
    """({folder: number}, names): a whole number is its own number, unless they are ids far apart."""
    folders = by_value(folders)
    of = {int(name): name for name in folders if name.isdecimal()}
    if not folders or not all(map(str.isdecimal, folders)) or is_far_apart(max(of), len(of)):
        return {name: i for i, name in enumerate(folders)}, folders
    return {name: int(name) for name in folders}, [of.get(i, str(i)) for i in range(max(of) + 1)]


def is_far_apart(highest, count):
    """Whether `count` numbers up to `highest` are ids rather than classes."""
    return highest >= max(1000, 10 * count)


def by_value(names):
    """Sorted: whole numbers by value, then words."""
    return sorted(names, key=lambda name: (int(name) if name.isdecimal() else math.inf, name))


def read_metadata(root, tables, by_name, left):
    """{image: {label, text, objects}} from all metadata files; several lines of an image add their captions."""
    about, named = {}, None
    for table in tables:
        for record in read_table(f"{root}/{table}", left):
            name = field(record, FILES)
            if not isinstance(name, str):
                left.add("lines of metadata without file_name", table)
                continue
            path = os.path.normpath(os.path.join(os.path.dirname(table), name))
            named, images = name, by_name.get(normal(path), [])
            images = [path] if path in images else images
            if len(images) != 1:
                left.add(f"lines of metadata {'that fit several images' if images else 'without an image'}", name)
                continue
            found, before = found_in(record), about.get(images[0], {})
            if not found:
                left.add("lines of metadata without text or label", name)
            if "label" in before and "label" in found and before["label"] != found["label"]:
                left.add("labels in metadata unlike those of an earlier line", name)
            texts = dict.fromkeys(before.get("text", []) + found.get("text", []))
            about[images[0]] = found | before | ({"text": list(texts)} if texts else {})
    if named and not about:
        what = f"names only files that are not here, such as {named}"
        reject(f"{root}/{tables[0]}", what, "give file_name relative to this file")
    return about


def read_table(path, left):
    """The records of a metadata file: JSON lines, CSV or parquet."""
    if path.lower().endswith(".parquet"):
        return open_parquet(path).read(use_threads=False).to_pylist()
    if path.lower().endswith(".jsonl"):
        return json_lines(path)
    text = read_text(path) or "\n"  # of an empty file the first line is empty
    with reading(path, "is not CSV", "correct it"):
        # the delimiter and quotes that give the first line a name of FILES
        for quote, delimiter in itertools.product("\"'", ",;\t|"):
            options = dict(delimiter=delimiter, quotechar=quote, skipinitialspace=True)
            names, *rows = csv.reader(io.StringIO(text, newline=""), **options)
            names = [name.strip() for name in names]
            if field(dict.fromkeys(names, 1), FILES):
                break
        else:
            rows = [names, *rows]
    last = len(names) - 1
    for row in rows:
        if len(row) > len(names) and names[last].lower() in CAPTIONS:  # a caption that has delimiters and no quotes
            row[last:] = [f"{delimiter} ".join(row[last:])]
        elif len(row) > len(names):
            left.add("lines of metadata with more fields than columns", row[0])
            row.clear()
    return [dict(zip(names, map(str.strip, row))) for row in rows if row]


def stat(path):
    """(size, modification time in ns), zeros for a dangling link."""
    try:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except FileNotFoundError:
        return 0, 0


def header_size(file):
    """(width, height) of an image file, upright, without decoding it; (0, 0) if it does not open."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return upright_size(image, Image.Image.getexif(image))  # PNG's own getexif decodes the image
    except Exception:  # of many types
        return 0, 0


def upright_size(image, exif):
    """(width, height) of a PIL image once it is upright: EXIF's orientations 5 to 8 are rotated by 90 degrees."""
    return image.size[::-1] if exif.get(0x0112) in (5, 6, 7, 8) else image.size


def list_files(root):
    """Every file under root as a sorted relative path; links are followed, hidden files left out."""
    first, found = os.path.realpath(root), []
    for folder, folders, files in os.walk(root, followlinks=True):
        inside = folder[len(root) :].strip("/")
        if os.path.islink(folder) and os.path.realpath(folder) in map(os.path.realpath, Path(first, inside).parents):
            folders.clear()  # a link that leads back up would never end
            continue
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX", "__pycache__", "@eaDir"))]
        found += [f"{inside}/{name}".lstrip("/") for name in files if not name.startswith(".")]
    return sorted(found)


# --- tar and parquet shards, arrays ---


def found_in(record):
    """{label, text, objects}: those that JSON, or a row of a table, has."""
    found = dict(label=field(record, LABELS), text=captions_of(record), objects=field(record, OBJECTS))
    # pandas writes gaps as NaN, which is not itself
    return {name: value for name, value in found.items() if value == value and value not in (None, [])}


def describe(key, parts, read, left):
    """{label, text, objects}, those that an item has, from the bytes read(ending) of its parts."""
    texts = {}
    for ending in (".txt", ".caption", ".json", ".cls"):
        data = read(ending) if ending in parts else b""
        if data.startswith(POINTER):
            left.add("git-lfs pointers", key + ending)
        elif data:
            texts[ending] = decode(data).strip()
    try:
        found = found_in(json.loads(texts.get(".json", "{}")))
    except (ValueError, RecursionError):
        left.add(".json files that are not JSON", f"{key}.json")
        found = {}
    if text := texts.get(".txt") or texts.get(".caption"):
        found["text"] = text
    return found | ({"label": texts[".cls"]} if ".cls" in texts else {})


def index_tar(open_shard, shard, sized=False):
    """The Index of a tar file, which open_shard(shard) opens; sized: with the sizes of images, in twice the time."""
    index = Index(shard_split(shard), [shard], f"{shard[:-4]}/")
    with open_shard(shard) as f:
        check_pointer(f, shard)
        for key, parts in tar_samples(f, index):
            image = next((parts[ending] for ending in parts if ending in IMAGES), None)
            for ending in parts:
                if image is None or (parts[ending] != image and ending not in SIDECARS):
                    why = "without" if image is None else "beside"
                    index.left.add(f"tar members {why} an image", key + ending)

            def read(ending, parts=parts):
                f.seek(parts[ending][1])
                return f.read(parts[ending][2])

            if image is not None:
                about = describe(key, parts, read, index.left)
                size = header_size(ContainerIO.ContainerIO(f, *image[1:])) if sized else (0, 0)
                index.add(key, image, parts.get(".map.png", NOWHERE), size=size, **about)
    if not index.keys and not index.left:
        index.left.add("empty tar files", shard)
    return index


def tar_samples(f, index):
    """(key, {extension: (0, offset, size)}) of each sample; the key ends at the first dot, as in webdataset, unless no
    image has that key: img_22.05.png.
    """
    end, samples = os.fstat(f.fileno()).st_size, {}
    for number, member in enumerate(tar_members(f, end, index)):
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = name.partition(".")
        if member.isfile() and stem and member.offset_data + member.size <= end:
            key = f"{folder}/{stem}" if folder else stem
            files = samples.setdefault(nfc(key), [])
            files.append((number, key, "." + extension.lower(), (0, member.offset_data, member.size)))
        elif not member.isdir():
            why = "that are links" if not member.isfile() else "cut short" if stem else "that are hidden"
            index.left.add(f"tar members {why}", member.name)
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
    while True:
        f.seek(at)
        while (block := f.read(2**20)) and not block.strip(b"\0"):
            at += len(block)
        at += (len(block) - len(block.lstrip(b"\0"))) // 512 * 512
        if at >= end:
            return
        f.seek(at)
        begin, reason = at, ""
        try:
            with tarfile.open(fileobj=f, mode="r:") as tar:
                yield from tar
                at = tar.offset
        except tarfile.TarError as e:
            reason = f" ({e})"
        if at == begin:  # not a header
            shard = index.header["files"][0]
            index.left.add(f"bytes that are not tar{reason}", f"{shard} from byte {at}", end - at)
            return


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
    for _, run in itertools.groupby(enumerate(files), lambda pair: pair[1][0] - pair[0]):  # adjacent members
        samples = [{}]
        for _, (_, _, extension, where) in run:
            if extension in samples[-1]:
                samples.append({})
            samples[-1][extension] = where
        is_clear = len({tuple(sample) for sample in samples}) == 1
        for sample in samples:
            parts = sample if is_clear else {end: where for end, where in sample.items() if end in IMAGES}
            for extension in sample.keys() - parts.keys():
                index.left.add("tar members that fit several images", key + extension)
            if parts:
                yield key, parts


def index_parquet(open_shard, shard):
    file = open_shard(shard)
    path, f = file.name, open_parquet(file.name, file)
    schema, rows = f.schema_arrow, f.metadata.num_rows

    def column(names, types=""):
        """The first column that has one of these names, and whose type matches."""
        named = (name for wanted in names for name in schema.names if name.lower() == wanted)
        return next((name for name in named if re.search(types, str(schema.field(name).type))), None)

    pixels, maps = (column(names, "^(large_|fixed_size_)?binary|^struct.*binary") for names in (PIXELS, MAPS))
    about = [name for name in schema.names if name.lower() in (*LABELS, *CAPTIONS, *OBJECTS)]
    prefix, names = f"{shard[:-8]}/", hub_names(f, column(LABELS))
    index = Index(shard_split(shard), [shard], prefix, names, columns=dict(image=pixels, map=maps))
    if (other := column(MAPS)) and not maps:
        index.left.add("maps that are no encoded images", f"column {other} of {schema.field(other).type}", rows)
    if pixels is None:
        index.left.add(NO_BYTES, f"{shard} has {', '.join(schema.names)}", rows)
        return index
    if others := [] if about else [name for name in schema.names if name not in (pixels, maps)]:
        index.left.add("columns that are neither captions nor labels", f"{shard}: {others[0]}", len(others))
    if rows > 8 * os.fstat(file.fileno()).st_size:  # keys of so many would fill the memory
        reject(path, f"declares {rows} rows, so it is damaged", "fetch it again")
    number = 0
    for group in range(f.num_row_groups):
        with reading(path, "is damaged", "fetch it again"):
            values = f.read_row_group(group, columns=about, use_threads=False).to_pylist()
            missing = rows_without_bytes(f, group, pixels)
        for row in range(f.metadata.row_group(group).num_rows):
            if row in missing:
                index.left.add(NO_BYTES, f"{prefix}{number:06d}")
            else:
                map_where = 0, 0, int(maps is not None)
                index.add(f"{number:06d}", (0, group, row), map_where, **found_in(values[row]))
            number += 1
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

    def beside(name, read):
        return read(f"{root}/{folder}{name}") if os.path.exists(f"{root}/{folder}{name}") else None

    images, labels, maps = open_npy(f"{root}/{path}"), beside("labels.npy", open_npy), beside("maps.npy", open_npy)
    records = beside("captions.jsonl", lambda path: list(json_lines(path)))
    good_shape = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
    if images.dtype != np.uint8 or not good_shape or not images.flags.c_contiguous:
        remedy = "make it uint8 (N,H,W,C), C 1, 3 or 4, in C order"
        reject(f"{root}/{path}", f"is {images.dtype} {images.shape}", remedy)
    if maps is not None and (maps.dtype != np.uint8 or maps.shape != images.shape[:3] or not maps.flags.c_contiguous):
        remedy = f"make it uint8 {images.shape[:3]}, in C order"
        reject(f"{root}/{folder}maps.npy", f"is {maps.dtype} {maps.shape}", remedy)
    labels = None if labels is None else labels.reshape(-1).tolist()
    for name, values in (("labels.npy", labels), ("captions.jsonl", records)):
        if values is not None and len(values) != len(images):
            reject(f"{root}/{folder}{name}", f"has {len(values)} entries, not {len(images)}", "give one for each image")
    size = images.nbytes // max(len(images), 1)
    area = size // math.prod(images.shape[3:])  # bytes of a map
    files = [path, folder + "captions.jsonl", folder + "maps.npy", folder + "labels.npy"]
    index = Index(folder.rstrip("/").lower(), files, folder, shape=images.shape[1:])
    for i in range(len(images)):
        map_where = NOWHERE if maps is None else (2, maps.offset + i * area, area)
        about = found_in(records[i]) if records else {}
        about |= {"label": labels[i]} if labels else {}
        index.add(f"{i:08d}", (0, images.offset + i * size, size), map_where, **about)
    index.stamps.append(stat(f"{root}/{path}"))
    return index


def shard_split(path):
    """The split that a shard belongs to: its folder train/ or val/, or its name, as in val-00000.tar."""
    *folders, name = path.lower().split("/")
    named = re.match(r"(train|validation|valid|val|test)(?![a-z])", name)
    return next((folder for folder in folders if folder in SPLITS), named[1] if named else "")


# --- text, labels and objects, .npy and parquet, which may be damaged ---


def decode(data):
    """bytes as text: UTF-8 or UTF-16, else cp1252; a byte order mark is no part of it."""
    encoding = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in data[:2]:  # UTF-16 of a Latin letter, without the mark
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def read_text(path):
    with reading(path, "cannot be read", "correct or remove it"), open(path, "rb") as f:
        check_pointer(f, path)
        return decode(f.read())


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
    """list of str from a caption, a JSON object that holds one, or a list of these; or from an object that holds it."""
    value = field(value, CAPTIONS) if isinstance(value, dict) else value
    texts = [
        field(text, CAPTIONS) if isinstance(text, dict) else text
        for text in (value if isinstance(value, list) else [value])
    ]
    texts = [decode(text) if isinstance(text, bytes) else text for text in texts]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    return [text.encode(errors="replace").decode() for text in texts]  # JSON may have half an emoji, which is no text


def class_of(label):
    """An int or a name from a label; None if it is no class."""
    label = decode(label) if isinstance(label, bytes) else label  # parquet of some writers
    if isinstance(label, str):
        label = nfc(label.strip())
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
            with reading(f"{path} line {number}", "is not JSON", "correct or delete it"):
                value = json.loads(line)
            yield value


def read_classes(path):
    """Class names from JSON: a list, an object {index: name} or {name: index}, or {"classes": list}."""
    with reading(path, "is not JSON", "correct it, or remove it"):
        names = json.loads(read_text(path))
    if isinstance(names, dict) and not path.endswith("meta.json"):
        if all(isinstance(number, int) for number in names.values()):  # class_to_idx of torchvision
            names = {str(number): name for name, number in names.items()}
        if "classes" not in names and not any(map(str.isdecimal, names)):
            reject(path, "has no list of names", "give a list, {number: name} or {name: number}")
    if isinstance(names, dict):
        count = 1 + max((int(i) for i in names if re.fullmatch("[0-9]{1,9}", i)), default=-1)
        if count > 100 * len(names) + 100_000:
            reject(path, f"names {len(names)} classes up to number {count - 1}", "number them from 0")
        names = names.get("classes", [names.get(str(i), str(i)) for i in range(count)])
    return [nfc(str(name)) for name in names] if isinstance(names, list) else []


def open_npy(path):
    """The array in a .npy file, mapped."""
    check_fetched(path)
    with reading(path, "does not load as .npy", "write it again"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        reject(path, "is an .npz", "write one array as .npy")
    return array


def need(module, why):
    """An optional module."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        reject(why, f"needs {package}, which is not installed", f"pip install {package}")


def open_parquet(path, file=None):
    parquet = need("pyarrow.parquet", path)
    file = file or open(path, "rb")
    check_pointer(file, path)
    with reading(path, "does not open as parquet", "fetch or write it again"):
        f = parquet.ParquetFile(file, pre_buffer=False)
        f.schema_arrow.names  # noqa: B018  where some damage shows
        return f


def hub_names(f, column):
    """Class names of a parquet file's column, which the Hugging Face hub keeps in the schema; [] without."""
    names = parse((f.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    for name in ("info", "features", column, "names"):
        names = names.get(name) if isinstance(names, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []
