"""Pack images from any source into tar shards, as data/dataset.py reads them. Knows no data set.

A data set's own prepare.py yields items, always in the same order:

    {"key": str, "image": ..., "split": "train", "label": 3, "text": ["a cat"], ...}

image: encoded bytes, a path, (path, offset, size), a uint8 array (H, W, 3), or a function that returns one of these.
split: if absent, "val" where crc32(key) % 100 == 0, else "train", as in data/dataset.py.
drop: if present, the reason why the item is left out ("unsafe: NSFW").
All other fields are kept.

Its last line is run(prepare, globals()), which adds the settings below to its own. `pack` converts the images in
parallel and writes to out_dir

    train-00000.tar ...  shards of KEY.jpg and KEY.json, where KEY is the item's position; the JSON has its own key
    classes.json         names of the labels, if there are labels
    bpe.tiktoken         a tokenizer trained on the captions, if there are captions
    dropped.jsonl        what was left out (broken, tiny, huge and duplicate images), each with the reason
    meta.json            the settings; when everything is done, also the counts

A shard is complete or absent. Run again after an interruption, the same command continues behind the complete shards.
"""

import base64
import collections
import contextlib
import functools
import glob
import hashlib
import http.client
import io
import itertools
import json
import multiprocessing.connection
import os
import signal
import tarfile
import threading
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image
from tqdm import tqdm

import checkpoint
from checkpoint import UserError, reject, write_whole
from common import check_same_settings, install_excepthook
from configurator import configure, find_settings
from data.dataset import BadImage, as_bad_image, crop_box, to_mode
from data.forms import IMAGES, PIXELS, captions_of, hub_names, image_bytes, list_files, need, open_parquet, parse

SPLITS = ("train", "val", "test")
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million, also the limit of data/dataset.py; larger ones may be bombs
MAX_BYTES = 2**30  # of a file in an archive, unpacked
BATCH = 16  # images that a worker converts at a time
BPE_CAPTIONS = 2_000_000  # most captions that the tokenizer is trained on
NOT_CONTENT = ("workers", "out_dir", "download", "verify", "repack", "threads")  # settings that change no shard

# settings of every script that packs; a script's own of the same name takes its place
size = 256  # >= 1: short side in pixels; smaller images are not enlarged
crop = "none"  # none | center: none keeps the aspect ratio, center cuts the middle square
quality = 95  # in [0, 100]: of JPEG; 0 writes PNG
min_side = 32  # >= 0: images with a shorter side are dropped
drop_duplicates = True  # keep only the first of identical images; takes about 100 bytes of memory an image
shard_mb = 256.0  # > 0: size of a shard
workers = 4  # >= 0: processes that decode and resize; 0 uses only this one


def run(prepare, scope, packs=True):
    """Call prepare(cfg) with the settings of a script (scope: its globals()) and, if it packs, of this file.

    A UserError is printed in one line.
    """
    install_excepthook()
    prepare(configure(scope, more=find_settings(globals()) if packs else None))


# --- files ---


def save(path, content):
    """Write an array (as .npy) or text; the file is complete or absent."""
    is_text = isinstance(content, str)
    write_whole(path, lambda file: file.write(content.encode()) if is_text else np.save(file, content))


def is_made(folder, meta):
    """Whether folder/meta.json equals meta. If not it is deleted, as the files that it describes will be replaced."""
    path = f"{folder}/meta.json"
    if os.path.exists(path):
        if checkpoint.read_json(path, "delete it") == json.loads(json.dumps(meta)):  # tuples become lists
            print(f"{folder}: up to date")
            return True
        os.remove(path)
    os.makedirs(folder, exist_ok=True)
    return False


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "md5").hexdigest()


def fetch(url, path, md5):
    """Download url to path, unless it is there, and check its md5; a partial download (PATH.part) is continued."""
    if os.path.exists(path) and digest(path) == md5:
        return path
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.part"
    have = os.path.getsize(part) if os.path.exists(part) else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as response:
            have = have if response.status == 206 else 0  # 200: the server starts over
            size = have + int(response.headers.get("Content-Length", 0))
            bar = tqdm(desc=os.path.basename(path), total=size, initial=have, unit="B", unit_scale=True, disable=None)
            with bar, open(part, "ab" if have else "wb") as file:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
        if os.path.getsize(part) < size:
            raise OSError(f"the connection ended after {os.path.getsize(part)} of {size} bytes")
    except (OSError, http.client.HTTPException) as e:
        if getattr(e, "code", 0) != 416:  # 416: nothing is left to send
            reject(url, f"download failed ({e})", f"run again to continue, or save the file as {path} yourself")
    if digest(part) != md5:
        os.remove(part)
        reject(url, f"the downloaded file is not the published one (md5 {md5})", "run again, or use another source")
    os.replace(part, path)
    return path


def from_hub(repo, patterns):
    """Fetch files of a data set on the Hugging Face hub; returns their folder, in the cache below HF_HOME."""
    hub = need("huggingface_hub", "--download=True")
    remedy = "run again to continue; some sets need `hf auth login` and their terms accepted"
    with reading(repo, "download failed", remedy):
        return hub.snapshot_download(repo, repo_type="dataset", allow_patterns=patterns)


# --- sources ---


def check_source(source, what, setting="source"):
    """source itself, which must exist; what: description of what it has to be."""
    if not os.path.exists(source):
        reject(f"{setting} {source!r}", "no such file or folder", f"set --{setting} to {what}")
    return source


def reading(path, what="cannot be read, or is damaged", remedy="download it again"):
    """Context in which errors of damaged files become one line."""
    return checkpoint.reading(path, what, remedy)


def parquet_files(source):
    """The parquet files of a folder, sorted, or the one that source is."""
    if os.path.isfile(source):
        return [source] if source.endswith(".parquet") else []
    return [f"{source}/{name}" for name in list_files(source) if name.endswith(".parquet")]


def parquet_names(path, column):
    """Class names of a column, which the Hugging Face hub keeps in the file's schema; [] if there are none."""
    return hub_names(open_parquet(path), column)


def parquet_rows(path, columns=None):
    """(row number, function that returns the encoded image, dict of these columns) of each row; None: all the others.

    PIXELS are the names that the image's column may have.
    """
    f = open_parquet(path)
    there = f.schema_arrow.names
    pixels = next((name for name in PIXELS if name in there), PIXELS[0])
    columns = [name for name in there if name != pixels] if columns is None else list(columns)
    if missing := [name for name in (*columns, pixels) if name not in there]:
        reject(path, f"no column {missing[0]!r}, only {', '.join(there)}", "check that it is the right file")
    row = 0
    for group in range(f.num_row_groups):
        with reading(path, "damaged"):
            table = f.read_row_group(group, [pixels, *columns], use_threads=False)  # threads do not survive a fork
            records = table.select(columns).to_pylist() if columns else [{}] * table.num_rows
        for at, record in enumerate(records):
            yield row, functools.partial(parquet_image, table.column(pixels), at), record
            row += 1


def parquet_image(column, at):
    value = image_bytes(column[at].as_py())
    return value if isinstance(value, bytes) else b""  # a path in it is not followed


def list_images(source):
    """(path inside source, image) of every image file, sorted; source is a folder, or a .zip or .tar file.

    Images in a .zip are functions that the main process calls.
    """
    if source.endswith(".zip"):
        with reading(source):
            archive = zipfile.ZipFile(source)
        found = {m.filename: functools.partial(unzip, archive, m) for m in archive.infolist()}
    elif source.endswith(".tar"):
        with reading(source), tarfile.open(source, "r:") as tar:
            found = {m.name: (source, m.offset_data, m.size) for m in tar}
    elif os.path.isdir(source):
        found = {path: f"{source}/{path}" for path in list_files(source)}
    else:
        reject(source, "not a folder, .zip or .tar", "unpack it and set --source to the folder")
    names = sorted(name for name in found if name.lower().endswith(IMAGES) and "__MACOSX" not in name)
    return [(name, found[name]) for name in names]


def unzip(archive, info):
    if info.file_size > MAX_BYTES:
        reject(info.filename, f"unpacks to {info.file_size} bytes", "remove it from the archive")
    return archive.read(info)


def find_file(source, *names):
    """The path of the first of these files anywhere in the folder source (or beside the file source), else None."""
    folder = source if os.path.isdir(source) else os.path.dirname(source) or "."
    there = {os.path.basename(path): f"{folder}/{path}" for path in reversed(list_files(folder))}
    return next((there[name] for name in names if name in there), None)


def in_fraction(key, fraction):
    """Whether a key is in this fraction of all keys; a smaller fraction is a subset of a larger one."""
    return zlib.crc32(b"fraction " + os.fsencode(key)) < fraction * 2**32


# --- one image ---


def read_bytes(image):
    """Encoded bytes (or an array, as it is) from an item's image."""
    if isinstance(image, bytes | np.ndarray):
        return image
    path, offset, size = (image, 0, -1) if isinstance(image, str) else image
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(size)


def convert(image, record, size, crop, quality, min_side, min_bytes):
    """Shrink an image to `size` on its short side and encode it.

    Returns (reason to drop it or "", encoded bytes, ".jpg" or ".png", record with the original size, and boxes moved).
    """
    nothing = b"", "", {}
    try:
        with as_bad_image("broken"), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            data = read_bytes(image)
            if not len(data):
                raise ValueError("0 bytes")
            if len(data) < min_bytes:
                return f"tiny: {len(data)} bytes, less than min_bytes={min_bytes}", *nothing
            try:
                image = Image.fromarray(data) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data))
            except Image.DecompressionBombError:  # Pillow does not open these
                return f"huge: more than {2 * MAX_PIXELS} pixels", *nothing
            width, height = image.size
            if width * height > MAX_PIXELS:
                return f"huge: {width} x {height}, more than {MAX_PIXELS} pixels", *nothing
            if min(width, height) < min_side:
                return f"tiny: {width} x {height}, less than min_side={min_side}", *nothing
            return "", *shrink(image, data, record, size, crop, quality)
    except BadImage as e:
        return str(e), *nothing


def shrink(image, data, record, size, crop, quality):
    """(encoded bytes, ending, record) of a PIL image; data: its encoded bytes."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF is ignored, as in to_mode
        orientation = 1
    is_jpeg = image.format == "JPEG"
    is_plain = is_jpeg and image.mode == "RGB" and orientation in (0, 1)
    width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
    if is_jpeg:
        image.draft(None, (2 * size, 2 * size))  # decodes large ones at 1/2, 1/4 or 1/8
    image = to_mode(image)
    if not is_jpeg:  # Pillow gives the upright size of a TIFF from the start, of others only now
        width, height = image.size
    x, y, w, h = crop_box(width, height, (1, 1)) if crop == "center" else (0, 0, width, height)
    scale = min(1, size / min(w, h))  # never enlarged
    target = (max(round(w * scale), 1), max(round(h * scale), 1))
    record = dict(record, width=width, height=height)
    if record.get("objects"):
        record["objects"] = in_crop(record["objects"], (width, height), (x, y, w, h), target)
    if is_plain and target == (width, height):
        return bytes(data), ".jpg", record  # as it is: compressing again would only harm
    u, v = image.width / width, image.height / height  # less than 1 after draft
    box = (x * u, y * v, min((x + w) * u, image.width), min((y + h) * v, image.height))
    if image.size != target or box != (0, 0, *target):
        image = image.resize(target, Image.Resampling.LANCZOS, box)
    file = io.BytesIO()
    if quality:
        image.save(file, "JPEG", quality=quality, subsampling=0)  # color at full resolution
    else:
        image.save(file, "PNG")
    return file.getvalue(), ".jpg" if quality else ".png", record


def in_crop(objects, size, crop, target):
    """Objects with their boxes in pixels of the crop (x, y, w, h) of an image of this size, resized to target."""
    objects, (x, y, w, h) = dict(objects), crop
    u, v = size if objects.pop("unit", "pixel") == "image" else (1, 1)  # boxes as shares of the image
    p, q = target[0] / w, target[1] / h
    boxes = [((a * u - x) * p, (b * v - y) * q, c * u * p, d * v * q) for a, b, c, d in objects["bbox"]]
    return objects | dict(bbox=[[round(value, 2) for value in box] for box in boxes])


def start_worker():
    """Ctrl-C is for the main process; when that is killed, its workers end too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel

    def wait():
        multiprocessing.connection.wait([parent])
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def convert_batch(convert, batch):
    return [convert(image, record) for image, record in batch]


def convert_all(convert, work, workers):
    """Yield (tag, convert(image, record)) for each (tag, image, record), in order; reads 4 batches a worker ahead."""
    if not workers:
        for tag, image, record in work:
            yield tag, convert(image, record)
        return
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        batches = iter(lambda: list(itertools.islice(work, BATCH)), [])
        submitted = ((batch, pool.submit(convert_batch, convert, [rest for _, *rest in batch])) for batch in batches)
        waiting = collections.deque(itertools.islice(submitted, 4 * workers))
        while waiting:
            batch, future = waiting.popleft()
            yield from zip((tag for tag, *_ in batch), future.result())
            waiting.extend(itertools.islice(submitted, 1))
    except BrokenProcessPool:
        raise UserError("a worker process died (out of memory?); set fewer workers and run again to continue") from None
    finally:
        pool.shutdown(cancel_futures=True)


def is_new(image, seen):
    """Add the hash of encoded bytes to the set `seen`; returns whether it was not there."""
    size = len(seen)
    seen.add(hashlib.blake2b(image, digest_size=8).digest())
    return len(seen) > size


# --- tokenizer ---


def train_bpe(captions, vocab_size):
    """Byte-level BPE in tiktoken's text form: a line 'base64(token) rank' each, the 256 bytes first, then merges."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from convert import byte_letters
    from text import SPLIT_PATTERN

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    byte_of = byte_letters()
    by_rank = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merged = [bytes(byte_of[c] for c in token) for token in by_rank if len(token) > 1]
    tokens = [bytes([b]) for b in range(256)] + merged
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


# --- shards ---


def read_shard(path):
    """(position, open image file, record) of each sample of a shard that `pack` wrote."""
    with tarfile.open(path, "r:") as tar:
        members = iter(tar)
        for image, record in zip(members, members):
            yield int(image.name.split(".")[0]), tar.extractfile(image), json.load(tar.extractfile(record))


class Writer:
    """Writes the shards of one split, behind those that are there, whose images it adds to `seen`.

    The shard being filled is in memory, so that on disk all are complete.
    """

    def __init__(self, out_dir, split, shard_bytes, seen):
        self.out_dir, self.split, self.shard_bytes = out_dir, split, shard_bytes
        self.shards, self.count = [], 0
        self.next, self.last = 0, ""  # first position after the complete shards, and the key before it
        while os.path.exists(path := f"{out_dir}/{self.name}"):
            for position, image, record in read_shard(path):
                self.next, self.last, self.count = position + 1, record["key"], self.count + 1
                is_new(image.read(), seen)
            self.shards.append(self.name)
        self.open()

    @property
    def name(self):
        return f"{self.split}-{len(self.shards):05d}.tar"

    def open(self):
        self.buffer = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.buffer, mode="w", format=tarfile.GNU_FORMAT)

    def add(self, position, image, ending, record):
        text = json.dumps(record, ensure_ascii=False).encode(errors="replace")
        for name, content in ((f"{position:09d}{ending}", image), (f"{position:09d}.json", text)):
            member = tarfile.TarInfo(name)  # no time, no owner: the same bytes each time
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))
        self.count += 1
        if self.tar.offset >= self.shard_bytes:
            self.close()

    def close(self):
        """Write the shard to disk and open the next."""
        if self.tar.offset:
            self.tar.close()
            write_whole(f"{self.out_dir}/{self.name}", lambda file: file.write(self.buffer.getbuffer()))
            self.shards.append(self.name)
            self.open()


REMEDY = "delete *.tar, *.json, *.jsonl and bpe.tiktoken there, or set another out_dir"


def begin(out_dir, settings):
    """Check that out_dir belongs to these settings; returns its meta.json if everything is done."""
    path = f"{out_dir}/meta.json"
    if not os.path.exists(path):
        if shards := glob.glob(f"{glob.escape(out_dir)}/*-[0-9][0-9][0-9][0-9][0-9].tar"):
            reject(shards[0], "was not made by this command", REMEDY)
        os.makedirs(out_dir, exist_ok=True)
        save(path, json.dumps({"settings": settings}))
    meta = checkpoint.read_json(path, REMEDY)
    before = meta.get("settings", {})
    check_same_settings(out_dir, before, dict.fromkeys(before) | settings, then="then", remedy=REMEDY)
    return meta if all(os.path.exists(f"{out_dir}/{name}") for name in meta.get("shards", ["-"])) else None


def numbered(items, writers, out_dir, bar):
    """Yield ((position, split, item), image, record) of the items that are in no complete shard."""
    expected = {writer.next - 1: writer.last for writer in writers.values() if writer.shards}
    changed = "the source is not the one that this folder was begun with"
    for position, item in enumerate(items):
        key = item["key"]
        if expected.pop(position, key) != key:
            reject(out_dir, f"{changed} (item {position} is {key})", REMEDY)
        split = item.get("split") or ("val" if zlib.crc32(os.fsencode(key)) % 100 == 0 else "train")
        if position < writers[split].next:
            bar.update()
            continue
        image, item = b"" if item.get("drop") else item["image"], dict(item)
        if callable(image):
            try:
                with as_bad_image("broken"):
                    image = image()
            except BadImage as e:
                image, item["drop"] = b"", str(e)
        record = {name: value for name, value in item.items() if name not in ("image", "split", "drop")}
        yield (position, split, item), image, record
    if expected:
        reject(out_dir, f"{changed} (fewer items)", REMEDY)


def trim_dropped(path, writers):
    """Keep the lines of an earlier run about items before the end of the complete shards; the others come again."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(path) as f:
        lines = f.readlines()
    records = map(parse, lines)  # a full disk cuts lines off
    save(path, "".join(line for line, r in zip(lines, records) if r and r["position"] < writers[r["split"]].next))


def pack(items, cfg, classes=(), total=None, **about):
    """Write everything that the top of this file lists to cfg.out_dir; returns meta.json as a dict.

    cfg has out_dir, size, crop, quality, min_side, shard_mb, workers, perhaps min_bytes, drop_duplicates, vocab_size.
    classes: names of the labels.  total: number of items, for the progress bar.  about: more fields for meta.json.
    """
    out, seen = cfg.out_dir, set()
    settings = json.loads(json.dumps({name: value for name, value in cfg.items() if name not in NOT_CONTENT}))
    if meta := begin(out, settings):
        print(f"{out}: up to date")
        return meta
    writers = {split: Writer(out, split, cfg.shard_mb * 1e6, seen) for split in SPLITS}
    if complete := sum(len(writer.shards) for writer in writers.values()):
        print(f"{out}: {complete} shards are complete, continuing")
    trim_dropped(f"{out}/dropped.jsonl", writers)
    how = {name: cfg[name] for name in ("size", "crop", "quality", "min_side")}
    to_size = functools.partial(convert, **how, min_bytes=cfg.get("min_bytes", 0))
    bar = tqdm(desc=out, total=total, unit=" images", disable=None)
    with bar, open(f"{out}/dropped.jsonl", "a", buffering=1) as dropped:  # a line is there before the shard behind it
        work = numbered(items, writers, out, bar)
        for (position, split, item), (reason, image, ending, record) in convert_all(to_size, work, cfg.workers):
            reason = item.get("drop") or reason
            if not reason and cfg.get("drop_duplicates", True) and not is_new(image, seen):
                reason = "duplicate: an earlier image gives the same file"
            if reason:
                line = dict(position=position, split=split, key=item["key"], reason=reason)
                dropped.write(json.dumps(line) + "\n")
            else:
                writers[split].add(position, image, ending, record)
            bar.update()
    for writer in writers.values():
        writer.close()
    return finish(cfg, settings, {split: writer for split, writer in writers.items() if writer.shards}, classes, about)


def finish(cfg, settings, writers, classes, about):
    """Write what comes after the shards, and report."""
    out = cfg.out_dir
    with open(f"{out}/dropped.jsonl") as f:
        reasons = collections.Counter(json.loads(line)["reason"].split(":")[0] for line in f)
    lost = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"
    if not writers:
        reject(out, f"no images left (dropped: {lost}; see dropped.jsonl there)", "check the source and the settings")
    if classes:
        save(f"{out}/classes.json", json.dumps([str(name) for name in classes], ensure_ascii=False) + "\n")
    if cfg.get("vocab_size", 0):
        training = writers.get("train") or next(iter(writers.values()))
        records = (record for name in training.shards for _, _, record in read_shard(f"{out}/{name}"))
        captions = list(itertools.islice((text for record in records for text in captions_of(record)), BPE_CAPTIONS))
        if captions:
            save(f"{out}/bpe.tiktoken", train_bpe(captions, cfg.vocab_size))
    meta = dict(
        count=sum(writer.count for writer in writers.values()),
        splits={split: writer.count for split, writer in writers.items()},
        dropped=dict(sorted(reasons.items())),
        **about,
        settings=settings,
        shards=[name for writer in writers.values() for name in writer.shards],
    )
    save(f"{out}/meta.json", json.dumps(meta, indent=1, ensure_ascii=False) + "\n")
    counts = ", ".join(f"{count} {split}" for split, count in meta["splits"].items())
    print(f"{out}: {counts} images in {len(meta['shards'])} shards; dropped: {lost}")
    return meta
