"""What every data/<name>/prepare.py does with the images it found: decode, resize, pack into tar shards. No data set.

    items   an iterator of {"key": str, "image": ..., "split": "train", ...}: the image is bytes, a path, (path, offset,
            size), an array (H, W, 3) or a function that gives one of these; other fields (label, text, ...) are kept.
            The split, where the source has none of its own, is "val" if crc32(key) % 100 == 0, as in data/dataset.py
            An item with "drop": "unsafe: ..." is left out for that reason, listed and counted like those below.
    make    turns them, in their order and whatever the number of workers, into
                train-00000.tar ...  shards of KEY.jpg and KEY.json; KEY is the item's number, the JSON has its own key
                classes.json         names of the labels, where there are some
                bpe.tiktoken         a tokenizer trained on the captions, where there are some
                dropped.jsonl        what was left out: broken, tiny, huge and duplicate images, each with the reason
                sheet.png            64 of the images, to look at
                meta.json            counts, checksums and settings; it comes last
    run     the command around it: settings, and errors in one line

Killed at any point and run again, it continues with the first shard that has not got its name yet, and the outcome is
the same, byte for byte. There is no index file: data/dataset.py makes its own when it first opens the shards.
"""

import base64
import collections
import errno
import functools
import hashlib
import heapq
import http.client
import importlib
import io
import itertools
import json
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import types
import unicodedata
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image, ImageDraw

from configurator import configure
from data.dataset import IMAGES, captions_of, crop_square, hub_names, is_lack, list_files, open_parquet, to_rgb
from data.shards import fcntl, rename

SPLITS = ("train", "val", "test")
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million, the limit of data/dataset.py too: more is taken for a bomb
START_ANEW = "to start anew, remove *.tar, *.json, bpe.tiktoken and .prepare there"
STATE = ".prepare"  # folder in out_dir with what is known of finished shards, until meta.json says it all
BATCH = 16  # images that a worker gets at a time
BPE_CAPTIONS = 2_000_000  # most captions that the tokenizer is trained on
# settings that do not change what is made
NOT_CONTENT = ("workers", "out_dir", "download", "verify", "repack", "threads")

# -- the command -------------------------------------------------------------------------------------------------------


def run(prepare, scope):
    """prepare(cfg) with the settings of a script and of the command line; what is wrong ends it with one line."""
    cfg = types.SimpleNamespace(**configure(scope))
    try:
        prepare(cfg)
    except (ValueError, OSError, ImportError) as e:
        full = "; make room, the same command continues" if getattr(e, "errno", 0) == errno.ENOSPC else ""
        sys.exit(f"prepare.py: {e}{full}")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as e:
        sys.exit(f"prepare.py: an archive in {getattr(cfg, 'source', '')} is damaged ({e}): fetch it again")
    except MemoryError:
        sys.exit("prepare.py: out of memory: set fewer workers; the same command continues")
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped; the same command continues")


def need(module, why, package=None):
    """An optional module, or an ImportError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"{why} needs {module}: pip install {package or module.split('.')[0]}") from None


def need_source(cfg, what):
    """cfg.source, which must be there."""
    if not cfg.source:
        raise ValueError(f"source is not set: --source={what}")
    if not os.path.exists(cfg.source):
        raise ValueError(f"source {cfg.source} is not there: set it to {what}")
    return cfg.source


# -- files -------------------------------------------------------------------------------------------------------------


def write(path, content):
    """Saves an array, a picture, bytes, text or a generator's lines: under a temporary name, on disk, then renamed."""
    with open(f"{path}.tmp", "wb") as f:
        if isinstance(content, np.ndarray):
            np.save(f, content)
        elif isinstance(content, Image.Image):
            content.save(f, "PNG")
        elif isinstance(content, types.GeneratorType):
            f.writelines(line.encode() for line in content)
        else:
            f.write(content.encode() if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())
    rename(f"{path}.tmp", path)


def is_made(folder, meta):
    """Whether folder/meta.json is meta; if not, it is removed, as what it tells of will be overwritten."""
    path = f"{folder}/meta.json"
    if os.path.exists(path):
        with open(path) as f:
            if json.load(f) == meta:
                print(f"{folder}: already there")
                return True
        os.remove(path)
    os.makedirs(folder, exist_ok=True)
    return False


def digest(path, kind="sha256"):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, kind).hexdigest()


def progress(**options):
    return need("tqdm", "the progress bar").tqdm(dynamic_ncols=True, mininterval=0.5, **options)


def fetch(url, path, checksum="", tries=5):
    """Downloads url to path unless it is there; what a broken connection left in PATH.part is continued.

    checksum is "md5:..." or "sha256:...", or "" where none is published. A file that differs is an error, and removed.
    """
    kind, _, wanted = checksum.partition(":")
    if os.path.exists(path) and (not wanted or digest(path, kind) == wanted):
        return path
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.part"
    for attempt in range(tries):
        have = os.path.getsize(part) if os.path.exists(part) else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                have = have if response.status == 206 else 0  # 200: the server begins anew, and so do we
                rest = int(response.headers.get("Content-Length", -1))
                bar = progress(desc=os.path.basename(path), unit="B", unit_scale=True, initial=have)
                bar.total = have + rest if rest >= 0 else None
                with bar, open(part, "ab" if have else "wb") as f:
                    while chunk := response.read(2**20):
                        f.write(chunk)
                        bar.update(len(chunk))
                    f.flush()
                    os.fsync(f.fileno())
                if rest >= 0 and os.path.getsize(part) < have + rest:
                    raise OSError(f"the connection ended after {os.path.getsize(part)} of {have + rest} bytes")
            break
        except (OSError, http.client.HTTPException) as e:
            if isinstance(e, urllib.error.HTTPError) and e.code == 416:  # nothing is left to send
                break
            fatal = isinstance(e, urllib.error.HTTPError) and e.code < 500 and e.code != 429
            if fatal or attempt == tries - 1:
                raise ValueError(f"{url}: {e}: run again to continue, or put the file at {path} yourself") from None
            time.sleep(2**attempt)
    if wanted and digest(part, kind) != wanted:
        os.remove(part)
        raise ValueError(f"{url}: what came is not the original file ({checksum}): run again, or fetch it elsewhere")
    rename(part, path)
    return path


def from_hub(repo, patterns):
    """The folder, in the cache below HF_HOME, with a data set repository's files; those not there are downloaded."""
    hub = need("huggingface_hub", "--download=True")
    try:
        return hub.snapshot_download(repo, repo_type="dataset", allow_patterns=patterns)
    except Exception as e:  # many kinds, of three packages
        first = (str(e) or type(e).__name__).strip().splitlines()[0]
        raise ValueError(
            f"{repo} did not come ({first}): run again to continue; some sets need their terms accepted on the "
            "hub and `hf auth login`"
        ) from None


# -- sources that several data sets share ------------------------------------------------------------------------------


def parquet_files(source):
    """The parquet files of a folder, sorted, or the one that source is."""
    if os.path.isfile(source):
        return [source] if source.endswith(".parquet") else []
    found = [f"{folder}/{name}" for folder, _, names in os.walk(source, followlinks=True) for name in names]
    return sorted(path for path in found if path.endswith(".parquet"))


def parquet_names(path, column):
    """Class names of a column, which the Hugging Face hub keeps in the file's schema; [] without."""
    return hub_names(open_parquet(path), column)


def parquet_rows(path, image, columns):
    """(row number, function that gives the image, dict of the other columns) of each row; images are read when asked.

    image: the names that the image's column may have.
    """
    f = open_parquet(path)
    there = f.schema_arrow.names
    name = next((name for name in image if name in there), None)
    missing = [column for column in columns if column not in there] + ([] if name else list(image[:1]))
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}, it has {', '.join(there)}: is it the right file?")
    row = 0
    for group in range(f.num_row_groups):
        pixels = functools.cache(functools.partial(_parquet_column, f, group, name))  # lives as long as its rows
        try:
            others = f.read_row_group(group, columns=list(columns), use_threads=False).to_pylist()
        except Exception as e:  # of many kinds, and several lines
            raise ValueError(f"{path} is damaged ({' '.join(str(e).split())}): fetch it again") from None
        for at in range(f.metadata.row_group(group).num_rows):
            yield row, functools.partial(_parquet_cell, pixels, at), others[at] if columns else {}
            row += 1


def _parquet_column(f, group, name):
    return f.read_row_group(group, columns=[name], use_threads=False).column(0)  # pyarrow's pool does not fork


def _parquet_cell(pixels, at):
    value = pixels()[at].as_py()
    value = value.get("bytes") if isinstance(value, dict) else value
    return value or b""


def list_images(source):
    """(path inside source, image) of every image file, sorted; source is a folder, or a .zip or .tar with the files.

    Images in a .zip are functions: it is read by this process alone, in passing.
    """
    if source.endswith(".zip"):
        archive = zipfile.ZipFile(source)
        names = sorted(name for name in archive.namelist() if name.lower().endswith(IMAGES) and "__MACOSX" not in name)
        return [(name, functools.partial(archive.read, name)) for name in names]
    if source.endswith(".tar"):
        with tarfile.open(source, "r:") as tar:
            return sorted((m.name, (source, m.offset_data, m.size)) for m in tar if m.name.lower().endswith(IMAGES))
    if not os.path.isdir(source):
        raise ValueError(f"{source} is no folder, .zip or .tar: unpack it, and set source to the folder")
    return [(path, f"{source}/{path}") for path in list_files(source) if path.lower().endswith(IMAGES)]


def find_file(source, *names):
    """The path of the first of these files that lies anywhere below the folder source (or beside it), else None."""
    folder = source if os.path.isdir(source) else os.path.dirname(source) or "."
    there = {os.path.basename(path): f"{folder}/{path}" for path in reversed(list_files(folder))}
    return next((there[name] for name in names if name in there), None)


def in_fraction(key, fraction):
    """Whether a key is among the fraction of all keys that is kept: a function of the key, and nested."""
    return zlib.crc32(b"fraction " + os.fsencode(key)) < fraction * 2**32


def tar_samples(path):
    """(key, {extension: (offset, size)}) of each sample of a webdataset shard, whose files lie side by side."""
    key, sample, end = None, {}, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # which it would keep
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isfile() and stem and member.offset_data + member.size <= end:
                    if sample and (folder, stem) != key:
                        yield "/".join(filter(None, key)), sample
                        sample = {}
                    key = folder, stem
                    sample["." + extension.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as e:
        print(f"{path} is damaged ({e}): it is read up to there")
    if sample:
        yield "/".join(filter(None, key)), sample


# -- one image ---------------------------------------------------------------------------------------------------------


def read_image(image):
    """Bytes (or an array, as it is) from what an item gives as its image."""
    if isinstance(image, bytes | np.ndarray):
        return image
    path, offset, size = (image, 0, -1) if isinstance(image, str) else image
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(size)


def convert(image, record, how):
    """(reason to drop it or "", file's bytes, its ending, record with sizes and moved boxes); how: size, crop, ..."""
    try:
        data = read_image(image)
        if isinstance(data, np.ndarray):
            picture = Image.fromarray(data)
        elif not data:
            return "broken: it has 0 bytes", b"", "", {}
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                picture = Image.open(io.BytesIO(data))
        width, height = picture.size
        if width * height > MAX_PIXELS:
            return f"huge: {width} x {height}, more than {MAX_PIXELS} pixels", b"", "", {}
        if min(width, height) < how["min_side"]:
            return f"tiny: {width} x {height}, less than min_side={how['min_side']}", b"", "", {}
        try:
            orientation = picture.getexif().get(0x0112, 1)
        except Exception:  # damaged EXIF is none, as in to_rgb
            orientation = 1
        is_jpeg = picture.format == "JPEG"
        keep = is_jpeg and picture.mode == "RGB" and orientation in (0, 1)
        if is_jpeg:
            picture.draft(None, (2 * how["size"], 2 * how["size"]))  # decodes huge ones at 1/2, 1/4 or 1/8
        picture = to_rgb(picture)
        if not is_jpeg:  # of a TIFF Pillow tells the upright size from the start
            width, height = picture.size
        elif orientation in (5, 6, 7, 8):
            width, height = height, width
        x, y, w, h = 0, 0, width, height
        if how["crop"] == "center":
            x, y, w = crop_square(width, height)
            h = w
        scale = min(1, how["size"] / min(w, h))  # never larger than it was
        target = (max(round(w * scale), 1), max(round(h * scale), 1))
        record = dict(record, width=width, height=height)
        if record.get("objects"):
            objects = dict(record["objects"])
            u, v = (width, height) if objects.pop("unit", "pixel") == "image" else (1, 1)  # boxes in shares of it
            p, q = target[0] / w, target[1] / h
            boxes = [((a * u - x) * p, (b * v - y) * q, c * u * p, d * v * q) for a, b, c, d in objects["bbox"]]
            record["objects"] = objects | dict(bbox=[[round(value, 2) for value in box] for box in boxes])
        if keep and target == (width, height):
            return "", bytes(data), ".jpg", record  # as it is: to compress it again would only harm
        u, v = picture.width / width, picture.height / height  # less than 1 after draft
        box = (x * u, y * v, min((x + w) * u, picture.width), min((y + h) * v, picture.height))
        if picture.size != target or box != (0, 0, *target):
            picture = picture.resize(target, Image.Resampling.LANCZOS, box)
        file = io.BytesIO()
        if how["quality"]:
            picture.save(file, "JPEG", quality=how["quality"], subsampling=0)  # colour at full resolution
        else:
            picture.save(file, "PNG")
        return "", file.getvalue(), ".jpg" if how["quality"] else ".png", record
    except Image.DecompressionBombError:  # twice MAX_PIXELS: Pillow does not even open it
        return f"huge: more than {2 * MAX_PIXELS} pixels", b"", "", {}
    except Image.UnidentifiedImageError:
        return "broken: not an image that Pillow can read", b"", "", {}
    except Exception as e:  # a damaged file can raise anything
        if is_lack(e):
            raise
        return f"broken: {' '.join((str(e) or type(e).__name__).split())[:200]}", b"", "", {}


def convert_all(batch, how):
    return [convert(*work, how) for work in batch]


def _start_worker():
    """Ctrl-C is for the parent; and where that is killed, its workers end too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel

    def wait():
        multiprocessing.connection.wait([parent])
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def converted(work, how, workers):
    """(tag, convert(image, record)) for each (tag, image, record), in their order; it looks ahead a little."""
    if not workers:
        for tag, image, record in work:
            yield tag, convert(image, record, how)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    waiting = collections.deque()
    try:
        while True:
            batch = list(itertools.islice(work, BATCH))
            if batch:
                tags, images = [tag for tag, *_ in batch], [rest for _, *rest in batch]
                waiting.append((tags, pool.submit(convert_all, images, how)))
            while waiting and (len(waiting) > 4 * workers or not batch):
                tags, result = waiting.popleft()
                yield from zip(tags, result.result())
            if not batch:
                return
    except BrokenProcessPool:
        raise ValueError(
            "a worker died, out of memory perhaps: run it again, it continues; try fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


class Seen:
    """A set of 64-bit hashes that takes 9 bytes for each: most of them lie in one sorted array."""

    def __init__(self):
        self.old, self.recent = np.empty(0, np.uint64), set()

    def add(self, value):
        """Adds value; whether it is new."""
        at = np.searchsorted(self.old, np.uint64(value))
        if value in self.recent or (at < len(self.old) and self.old[at] == value):
            return False
        self.recent.add(value)
        if len(self.recent) > max(2**20, len(self.old) // 16):
            self.update(())
        return True

    def update(self, values):
        recent = np.array(list(self.recent), np.uint64)
        self.old, self.recent = np.unique(np.concatenate([self.old, recent, np.array(values, np.uint64)])), set()


# -- captions ----------------------------------------------------------------------------------------------------------


@functools.cache
def script(character):
    """LATIN, CYRILLIC, CJK, HIRAGANA, ...: the first word of its Unicode name."""
    return unicodedata.name(character, "unnamed").split()[0]


def caption_counts(texts):
    """Counts of one image's captions: how many it has, their lengths in words and characters, their scripts."""
    counts = {name: collections.Counter() for name in ("an image", "words", "characters", "scripts")}
    counts["an image"][str(len(texts))] += 1
    for text in texts:
        counts["words"][str(len(text.split()))] += 1
        counts["characters"][str(len(text))] += 1
        letters = collections.Counter(script(c) for c in text if c.isalpha())
        counts["scripts"][letters.most_common(1)[0][0] if letters else "none"] += 1
    return counts


def quantiles(counts):
    """{"least": ..., "5 %": ..., "median": ..., "95 %": ..., "most": ...} of {value: how often}."""
    values = sorted((int(value), n) for value, n in counts.items())
    reached = list(itertools.accumulate(n for _, n in values))
    shares = {"least": 0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1}
    return {
        name: next(value for (value, _), n in zip(values, reached) if n >= share * reached[-1])
        for name, share in shares.items()
    }


def describe_captions(counts):
    """Quantiles of the captions' lengths, and the share of each script (of most of a caption's letters) in percent."""
    total = sum(counts["scripts"].values())
    shares = {name: round(100 * n / total, 2) for name, n in counts["scripts"].most_common()}
    return {name: quantiles(counts[name]) for name in ("an image", "words", "characters")} | {"scripts": shares}


def train_bpe(captions, vocab_size):
    """Byte-level BPE in tiktoken's text form: a line 'base64(token) rank' each, the 256 bytes first, then merges."""
    if vocab_size < 256:
        raise ValueError(f"vocab_size={vocab_size} does not hold the 256 bytes: set it to 256 or more")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from text import SPLIT_PATTERN

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    # GPT-2 writes bytes as printable characters: those that print as themselves, the other 68 in order from 256 on
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    byte_of = {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(others)}
    by_rank = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merged = [bytes(byte_of[c] for c in token) for token in by_rank if len(token) > 1]
    tokens = [bytes([b]) for b in range(256)] + merged
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


# -- shards ------------------------------------------------------------------------------------------------------------


class Shards:
    """The shards of one split: those that are finished, with what is known of them, and the one being written."""

    def __init__(self, out_dir, split, max_bytes):
        self.out_dir, self.split, self.max_bytes = out_dir, split, max_bytes
        self.finished, self.next, self.last = {}, 0, ""  # next: position of the first item that is in none of them
        self.hashes = [np.empty(0, np.uint64)]  # of the images in those that were finished before
        while os.path.exists(f"{out_dir}/{self.name}") and os.path.exists(self.state_path(self.name)):
            state = self.read_state(self.name)
            self.next, self.last = state["next"], state["last"]
            self.hashes.append(np.array([int(h, 16) for h in state["hashes"]], np.uint64))
            self.finished[self.name] = {part: state[part] for part in ("count", "bytes", "sha256")}
        self.begin()

    @property
    def name(self):
        return f"{self.split}-{len(self.finished):05d}.tar"

    def state_path(self, name):
        return f"{self.out_dir}/{STATE}/{name}.json"

    def read_state(self, name):
        with open(self.state_path(name)) as f:
            return json.load(f)

    def dropped(self):
        """Lines on the images that were dropped, in the order of the items."""
        for name in self.finished:
            yield from self.read_state(name)["dropped"]
        yield from self.state["dropped"]

    def begin(self):
        self.tar = None
        self.state = dict(count=0, labels={}, captions={}, hashes=[], dropped=[])

    def add(self, position, item, data, ending, record, code):
        """Writes one image; a shard that is full gets its name."""
        if self.tar is None:
            self.file = open(f"{self.out_dir}/{self.name}.tmp", "ab")
            try:
                if fcntl:  # not flock, which the workers would have too
                    fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(f"another process writes to {self.out_dir}: let it, or set another out_dir") from None
            except OSError:  # a file system without locks
                pass
            self.file.seek(self.file.truncate(0))  # what a killed run left
            self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.GNU_FORMAT)
        text = json.dumps({"key": item["key"], **record}, ensure_ascii=False).encode(errors="replace")
        for name, content in ((f"{position:09d}{ending}", data), (f"{position:09d}.json", text)):
            member = tarfile.TarInfo(name)  # no time, no owner: the same bytes each time
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))
        self.state["count"] += 1
        self.state["hashes"].append(f"{code:016x}")
        label = record.get("label")
        if label is not None:
            self.state["labels"][str(label)] = self.state["labels"].get(str(label), 0) + 1
        if texts := captions_of(record):
            for name, counter in caption_counts(texts).items():
                total = self.state["captions"].setdefault(name, {})
                for value, n in counter.items():
                    total[value] = total.get(value, 0) + n
        if self.tar.offset >= self.max_bytes:
            self.finish(position + 1, item["key"])

    def drop(self, position, key, reason):
        self.state["dropped"].append(dict(position=position, key=key, split=self.split, reason=reason))

    def finish(self, position, last):
        """Gives the open shard its name: all items before this position, the last of that key, are done."""
        if self.tar is None:
            return
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        path = f"{self.out_dir}/{self.name}"
        self.state |= dict(next=position, last=last, bytes=os.path.getsize(f"{path}.tmp"), sha256=digest(f"{path}.tmp"))
        write(self.state_path(self.name), json.dumps(self.state))
        rename(f"{path}.tmp", path)  # the name is the mark that it is done
        self.finished[self.name] = {part: self.state[part] for part in ("count", "bytes", "sha256")}
        self.next, self.last = position, last
        self.begin()


def samples(path, wanted=None):
    """(image's bytes, record) of the samples of one of our shards, or of those with these numbers in it."""
    with open(path, "rb") as f:
        for number, (_, sample) in enumerate(tar_samples(path)):
            if wanted is not None and number not in wanted:
                continue
            parts = []
            for ending in sorted(sample, key=".json".__eq__):  # the record last
                f.seek(sample[ending][0])
                parts.append(f.read(sample[ending][1]))
            yield parts[0], json.loads(parts[1])


def contact_sheet(out_dir, shards, classes, columns=8, cell=132):
    """64 images from all over the shards ({name: count}), with their class or first caption below."""
    counts = list(shards.items())
    counts = counts[:: -(-len(counts) // 8)]
    chosen = []
    for name, count in counts:
        chosen += samples(
            f"{out_dir}/{name}", set(np.linspace(0, count - 1, -(-64 // len(counts))).astype(int).tolist())
        )
    chosen = chosen[:64]
    sheet = Image.new("RGB", (columns * cell, -(-len(chosen) // columns) * (cell + 28)), "gray")
    pen = ImageDraw.Draw(sheet)
    for k, (data, record) in enumerate(chosen):
        x, y = k % columns * cell, k // columns * (cell + 28)
        with Image.open(io.BytesIO(data)) as picture:
            picture = picture.convert("RGB")
        picture.thumbnail((cell - 4, cell - 4), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x + 2 + (cell - 4 - picture.width) // 2, y + 2))
        label, words = record.get("label"), " ".join(captions_of(record)[:1])
        if not words and isinstance(label, int):
            words = classes[label] if 0 <= label < len(classes) else str(label)
        words = words.encode("ascii", "replace").decode()  # Pillow's own font has little else
        pen.text((x + 2, y + cell - 2), f"{words[:21]}\n{words[21:42]}", fill="white")
    return sheet


def check_settings(cfg):
    if cfg.size < 1 or cfg.crop not in ("none", "center"):
        raise ValueError(f"size={cfg.size}, crop={cfg.crop}: set a side in pixels, and none or center")
    if not 0 <= cfg.quality <= 100 or cfg.min_side < 0 or cfg.shard_mb <= 0 or cfg.workers < 0:
        given = f"quality={cfg.quality}, min_side={cfg.min_side}, shard_mb={cfg.shard_mb}, workers={cfg.workers}"
        raise ValueError(f"{given}: set quality to 0..100, shard_mb above 0, and none below 0")
    vocab_size = getattr(cfg, "vocab_size", 0)
    if vocab_size and vocab_size < 256:
        raise ValueError(f"vocab_size={vocab_size} does not hold the 256 bytes: set it to 256 or more, or 0 for none")


def look_around(cfg, settings):
    """Whether cfg.out_dir holds what these settings make; otherwise it is empty, or what they began, or an error."""
    out, state = cfg.out_dir, f"{cfg.out_dir}/{STATE}/settings.json"
    there = sorted(os.listdir(out)) if os.path.isdir(out) else []
    shards = [name for name in there if re.fullmatch(rf"({'|'.join(SPLITS)})-\d{{5}}\.tar", name)]
    marks = [path for path in (f"{out}/meta.json", state) if os.path.exists(path)]
    if shards and not marks:
        raise ValueError(f"{out}/{shards[0]} is of unknown origin: remove the shards there, or set another out_dir")
    for path in marks:
        with open(path) as f:
            kept = json.load(f)
        before = kept.get("settings") or {}
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed:
            a, b = before.get(changed[0]), settings.get(changed[0])
            raise ValueError(
                f"{out} was made with {changed[0]}={a}, now it is {b}: {START_ANEW}, or set another out_dir"
            )
    if os.path.exists(f"{out}/meta.json"):
        with open(f"{out}/meta.json") as f:
            for name, shard in json.load(f)["shards"].items():
                path = f"{out}/{name}"
                if not os.path.exists(path) or os.path.getsize(path) != shard["bytes"]:
                    raise ValueError(f"{path} is not the {shard['bytes']} bytes it was: {START_ANEW}")
        shutil.rmtree(f"{out}/{STATE}", ignore_errors=True)
        print(f"{out}: already there")
        return True
    os.makedirs(f"{out}/{STATE}", exist_ok=True)
    write(state, json.dumps({"settings": settings}))
    return False


def make(items, cfg, classes=(), total=None, **about):
    """Writes all that the top of this file lists below cfg.out_dir; returns meta.json as a dict.

    items: an iterator, or a function that gives one, called only where there is something to do. classes: names of the
    labels, or a function that gives them once the items have passed. about: more for meta.json. cfg: out_dir, size,
    crop ("none" or "center"), quality (0: PNG), min_side, shard_mb, workers, and perhaps drop_duplicates (default True)
    and vocab_size (0: no tokenizer); a new run with other settings is an error.
    """
    check_settings(cfg)
    settings = {name: value for name, value in vars(cfg).items() if name not in NOT_CONTENT}
    settings = json.loads(json.dumps(settings))  # tuples are lists there
    if look_around(cfg, settings):
        with open(f"{cfg.out_dir}/meta.json") as f:
            return json.load(f)
    shards = {split: Shards(cfg.out_dir, split, cfg.shard_mb * 1e6) for split in SPLITS}
    seen, drop_duplicates = Seen(), getattr(cfg, "drop_duplicates", True)
    if drop_duplicates:
        seen.update(np.concatenate([part for of in shards.values() for part in of.hashes]))
    resumed = {of.next - 1: of.last for of in shards.values() if of.finished}
    if resumed:
        names = sum(len(of.finished) for of in shards.values())
        print(f"{cfg.out_dir}: {names} shards are finished, it continues")
    how = dict(size=cfg.size, crop=cfg.crop, quality=cfg.quality, min_side=cfg.min_side)
    position, last, bar = -1, "", progress(total=total, unit=" images", desc=cfg.out_dir)

    def work():
        nonlocal position, last
        for position, item in enumerate(items() if callable(items) else items):
            last = item["key"]
            if position in resumed and resumed[position] != last:
                raise ValueError(f"the source has changed since {cfg.out_dir} was begun: {START_ANEW}")
            split = item.get("split") or ("val" if zlib.crc32(os.fsencode(last)) % 100 == 0 else "train")
            if position < shards[split].next:
                bar.update()
                continue
            image = b"" if item.get("drop") else item["image"]
            if callable(image):
                try:
                    image = image()
                except Exception as e:
                    if is_lack(e):
                        raise
                    image = b""  # convert says so
            record = {name: value for name, value in item.items() if name not in ("key", "image", "split", "drop")}
            yield (position, split, item), image, record

    with bar:
        for (at, split, item), (reason, data, ending, record) in converted(work(), how, cfg.workers):
            reason = item.get("drop") or reason
            code = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
            if not reason and drop_duplicates and not seen.add(code):
                reason = "duplicate: an image before it gives the same file"
            if reason:
                shards[split].drop(at, item["key"], reason)
            else:
                shards[split].add(at, item, data, ending, record, code)
            bar.update()
    if position < max(resumed, default=-1):
        raise ValueError(f"the source has fewer images than when {cfg.out_dir} was begun: {START_ANEW}")
    return finish(cfg, settings, shards, position + 1, last, classes, about)


def finish(cfg, settings, shards, count, last, classes, about):
    """The last shards, and all the other files."""
    out = cfg.out_dir
    for of in shards.values():
        of.finish(count, last)
    states = {name: state for of in shards.values() for name, state in of.finished.items()}
    reasons, first = collections.Counter(), []

    def lines():
        for line in heapq.merge(*(of.dropped() for of in shards.values()), key=lambda line: line["position"]):
            reasons[line["reason"].split(":")[0]] += 1
            first[:] = first or [line["reason"]]
            yield json.dumps(line) + "\n"

    write(f"{out}/dropped.jsonl", lines())
    if not states:
        why = f"all {count} were dropped, as {out}/dropped.jsonl says: {first[0]}" if first else "none found"
        raise ValueError(f"no images for {out}, {why}: look at the source and the settings")
    classes = [str(name) for name in (classes() if callable(classes) else classes)]
    labels, captions = collections.Counter(), {}
    for of in shards.values():
        for state in map(of.read_state, of.finished):
            labels.update(state["labels"])
            for name, counts in state["captions"].items():
                captions.setdefault(name, collections.Counter()).update(counts)
    if classes:
        write(f"{out}/classes.json", json.dumps(classes, ensure_ascii=False) + "\n")
    training = [name for name in states if name.startswith("train")] or list(states)
    if captions and getattr(cfg, "vocab_size", 0):
        texts = (text for name in training for _, record in samples(f"{out}/{name}") for text in captions_of(record))
        write(f"{out}/bpe.tiktoken", train_bpe(itertools.islice(texts, BPE_CAPTIONS), cfg.vocab_size))
    write(f"{out}/sheet.png", contact_sheet(out, {name: states[name]["count"] for name in training}, classes))
    meta = dict(count=sum(state["count"] for state in states.values()), size=cfg.size)
    meta["splits"] = {
        split: sum(s["count"] for s in of.finished.values()) for split, of in shards.items() if of.finished
    }
    meta["dropped"] = dict(sorted(reasons.items()))
    if labels:
        names = {
            label: classes[int(label)] if label.isdigit() and int(label) < len(classes) else label for label in labels
        }
        twice = {name for name, n in collections.Counter(names.values()).items() if n > 1}  # ImageNet has two cranes
        names = {label: f"{name} ({label})" if name in twice else name for label, name in names.items()}
        meta["images_of_class"] = {names[label]: labels[label] for label in sorted(labels, key=lambda i: (len(i), i))}
    if captions:
        meta["captions"] = describe_captions(captions)
    meta |= about
    meta["settings"] = settings
    meta["shards"] = states
    write(f"{out}/meta.json", json.dumps(meta, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(f"{out}/{STATE}")
    size = sum(state["bytes"] for state in states.values())
    parts = ", ".join(f"{n} {split}" for split, n in meta["splits"].items())
    print(f"{out}: {parts} images in {len(states)} shards, {size / 1e6:.1f} MB")
    lost = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    print(f"{reasons.total()} dropped{f': {lost}; {out}/dropped.jsonl lists them' if lost else ''}")
    for name, values in meta.get("captions", {}).items():
        print(f"captions, {name}: {', '.join(f'{what} {value}' for what, value in list(values.items())[:8])}")
    print(f"look at {out}/sheet.png")
    return meta
