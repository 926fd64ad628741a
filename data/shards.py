"""
Where every item of a data set lies: one small index a shard, joined in one table that all processes of a machine map;
and shards that lie elsewhere, of which the last used are kept on disk.

    Index    of one shard, made item by item
    table    of all shards, kept in CACHE/index-.../: made once, in parallel, a killed one goes on where it was
    Remote   files behind an fsspec URL, as local files

data/dataset.py tells what is in a shard; nothing here knows of images.
"""

import bisect
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import zlib
from array import array

import numpy as np

try:
    import fcntl
except ImportError:  # no POSIX system: nothing is locked
    fcntl = None

COLUMNS = ("label", "file", "at", "size", "text_kind", "text_file", "text_at", "text_size", "map_at", "map_size")
COLUMNS += ("json_at", "json_size")
FILES = (1, 5)  # those that count in `files`
SIDECAR = ".index.npz"  # SHARD.index.npz beside a remote shard is its index
VERSIONS = ("ETag", "etag", "md5", "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created")
UNUSED = 30 * 24 * 3600  # seconds after which a table that nobody opens is removed


def digest(*parts):
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


# -----------------------------------------------------------------------------
# one shard


class Index:
    """
    One row an item: `key` without `prefix`; `label` (int, or a class name to be numbered); `image`, where its bytes
    lie: (file, offset, size); `text`, where its captions lie: (kind, file, offset, size). file counts in `files`, -1 is
    the file that the key names; in parquet it is (file, row group, row). `names[i]` is label i in words; `part` is the
    split that the shard belongs to. `beside`, in tar and npy: (offset, size) of the item's map and of its JSON, size 0
    where there is none. `content` stands for what keys, offsets and sizes do not tell.
    """

    def __init__(self, part="", files=(), prefix="", names=(), content=""):
        self.part, self.files, self.prefix, self.names, self.content = part, list(files), prefix, list(names), content
        self.keys, self.labels, self.numbers = [], [], array("q")

    def add(self, key, image, label=None, text=(0, 0, 0, 0), beside=(0, 0, 0, 0)):
        if isinstance(label, str):
            label = int(label) if re.fullmatch(r"\s*-?\d{1,9}\s*", label) else label.strip() or None
        elif isinstance(label, float):  # a column with gaps; NaN is no label
            label = int(label) if label.is_integer() else None
        is_label = isinstance(label, str) or (isinstance(label, int) and 0 <= label < 2**31)
        self.keys.append(os.fsencode(key).rstrip(b"\0"))  # as numpy has them
        self.labels.append(label if is_label else None)
        self.numbers.extend((*image, *text, *beside))

    def arrays(self):
        """dict(about, keys, table int64 (n, len(COLUMNS)), held: rows with crc32(prefix + key) % 100 == 0)."""
        labels, names, prefix = self.labels, self.names, os.fsencode(self.prefix)
        is_named = any(isinstance(label, str) for label in labels)
        if is_named:  # class names are numbered in sorted order
            names = sorted({str(label) for label in labels if label is not None})
            number = {name: i for i, name in enumerate(names)}
            labels = [None if label is None else number[str(label)] for label in labels]
        labels = np.array([-1 if label is None else label for label in labels], dtype=np.int64)
        numbers = np.array(self.numbers, dtype=np.int64).reshape(-1, len(COLUMNS) - 1)
        table = np.column_stack([labels, numbers])
        crc = np.array([zlib.crc32(prefix + key) for key in self.keys], dtype=np.int64)
        h = hashlib.blake2b(b"\n".join(prefix + key for key in self.keys), digest_size=16)
        h.update(table[:, 2:4].tobytes() + str(self.content).encode())
        texts = hashlib.blake2b(table[:, [4, 6, 7]].tobytes() + str(self.content).encode(), digest_size=16)
        about = dict(n=len(labels), part=self.part, files=self.files, prefix=self.prefix, names=names, named=is_named)
        about |= dict(content=self.content, texts=texts.hexdigest())
        about |= dict(width=max(map(len, self.keys), default=0), bytes=sum(map(len, self.keys)), digest=h.hexdigest())
        if len(labels):
            about |= dict(
                low=table.min(0).tolist(), high=table.max(0).tolist(), crc=[int(crc.min()), int(crc.argmin())]
            )
        keys = np.array(self.keys, dtype=np.bytes_)
        return dict(about=np.array(json.dumps(about)), keys=keys, table=table, held=np.flatnonzero(crc % 100 == 0))


def read_arrays(file):
    """Index.arrays from an .npz that was made of them; an error of some kind where it was not."""
    with np.load(file) as kept:
        arrays = {name: kept[name] for name in ("about", "keys", "table", "held")}
    n = json.loads(str(arrays["about"]))["n"]
    if (arrays["keys"].shape, arrays["table"].shape) != ((n,), (n, len(COLUMNS))):
        raise ValueError(f"{n} rows are told of, {arrays['table'].shape} are there")
    return arrays


# -----------------------------------------------------------------------------
# all of them


class Table:
    """
    table[row] -> (key as bytes, [label, ..., a number for each of COLUMNS]) of a row of all shards, one after another.

    starts[s] is the first row of shard s, starts[-1] the number of rows; part_of[s], prefix_of[s], digest_of[s] (of its
    images) and texts_of[s] (of its captions) are its own; files, names and highest label of all. A row has the fewest
    bytes that hold its columns; those that never change have none. With a folder, its rows are mapped: they take no
    memory of their own, and a process that is handed the table opens it anew.
    """

    def __init__(self, about, arrays, folder=None):
        self.__dict__.update(about)
        self.rows, self.blob = arrays["rows"], arrays.get("keys")
        self.runs = {split: arrays[split] for split in ("train", "val") if split in arrays}
        self.folder = folder

    def __reduce__(self):
        return (Table.load, (self.folder,)) if self.folder else super().__reduce__()

    @classmethod
    def load(cls, folder):
        with open(f"{folder}/about.json") as f:
            about = json.load(f)
        with contextlib.suppress(OSError):
            os.utime(folder)  # used just now
        names = [name.removesuffix(".npy") for name in os.listdir(folder) if name.endswith(".npy")]
        arrays = {name: np.load(f"{folder}/{name}.npy", mmap_mode="r").view(np.ndarray) for name in names}  # is faster
        return cls(about, arrays, folder)

    @classmethod
    def of(cls, made):
        """In memory, from Index.arrays of each shard."""
        new = lambda name, dtype, shape: np.empty(shape, dtype)  # noqa: E731
        return cls(*join([json.loads(str(arrays["about"])) for arrays in made], made.__getitem__, new))

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, row):
        shard = bisect.bisect_right(self.starts, row) - 1
        values, stored = list(self.constant), self.rows[row].item()
        for column, value in zip(self.columns, stored):
            values[column] = value
        for column in FILES:
            values[column] += self.base[shard] if values[column] >= 0 else 0
        key = stored[-1] if self.blob is None else self.blob[stored[-2] : stored[-2] + stored[-1]].tobytes()
        return os.fsencode(self.prefix_of[shard]) + key, values

    def labels(self, rows):
        return self.rows["label"][rows].astype(np.int64) if 0 in self.columns else np.full(len(rows), self.constant[0])


def join(abouts, arrays_of, new, processes=1):
    """
    (about, arrays) of a Table from what Index.arrays gave for each shard: abouts[s] and, one at a time, arrays_of(s).

    new(name, dtype, shape) -> an array to be filled; with processes, one that they share.
    """
    n = np.array([about["n"] for about in abouts], dtype=np.int64)
    starts, full = np.append(0, np.cumsum(n)).astype(np.int64), [s for s in range(len(n)) if n[s]]
    low, high = (np.array([abouts[s][name] for s in full] or [[0] * len(COLUMNS)]) for name in ("low", "high"))
    low, high = low.min(0), high.max(0)
    names, number = next((about["names"] for about in abouts if about["names"]), []), None

    def word(s, label):
        return abouts[s]["names"][label] if abouts[s]["named"] else str(label)

    if any(about["named"] for about in abouts):  # where some shards have words for labels, all labels are words
        labels = {s: range(len(abouts[s]["names"])) for s in full if abouts[s]["named"]}
        labels |= {s: set(arrays_of(s)["table"][:, 0].tolist()) - {-1} for s in full if s not in labels}
        names = sorted({word(s, label) for s in labels for label in labels[s]})
        number = {name: i for i, name in enumerate(names)}
        low[0], high[0] = -1, len(names) - 1
    columns = np.flatnonzero(low != high).tolist()
    fields = [(COLUMNS[c], np.promote_types(np.min_scalar_type(low[c]), np.min_scalar_type(high[c]))) for c in columns]
    key_ends = np.append(0, np.cumsum([about["bytes"] for about in abouts])).astype(np.int64)
    width = max([about["width"] for about in abouts], default=0)
    is_apart = width > 8 + key_ends[-1] / max(starts[-1], 1)  # some keys are far longer than others
    fields += [("key_at", np.int64), ("key_size", np.uint32)] if is_apart else [("key", f"S{max(width, 1)}")]
    rows = new("rows", np.dtype(fields), (int(starts[-1]),))
    blob = new("keys", np.dtype(np.uint8), (int(key_ends[-1]),)) if is_apart else None

    def place(s):
        arrays, part = arrays_of(s), np.empty(n[s], rows.dtype)
        for c in columns:
            part[COLUMNS[c]] = arrays["table"][:, c]
        if number is not None:
            labels, back = np.unique(arrays["table"][:, 0], return_inverse=True)
            part["label"] = np.array([-1 if label < 0 else number[word(s, label)] for label in labels.tolist()])[back]
        if is_apart:
            keys = arrays["keys"].tolist()
            part["key_size"] = [len(key) for key in keys]
            part["key_at"] = key_ends[s] + np.cumsum(part["key_size"]) - part["key_size"]
            blob[key_ends[s] : key_ends[s + 1]] = np.frombuffer(b"".join(keys), np.uint8)
        else:
            part["key"] = arrays["keys"]
        rows[starts[s] : starts[s + 1]] = part
        return arrays["held"] + starts[s]

    held = dict(zip(full, spread(place, full, processes)))
    about = dict(starts=starts.tolist(), names=names, columns=columns, constant=low.tolist(), highest=int(high[0]))
    about["base"] = np.append(0, np.cumsum([len(about["files"]) for about in abouts]))[:-1].astype(int).tolist()
    about["files"] = [name for about in abouts for name in about["files"]]
    about |= {f"{name}_of": [about[name] for about in abouts] for name in ("part", "digest", "texts", "prefix")}
    arrays, parts = dict(rows=rows, keys=blob) if is_apart else dict(rows=rows), {abouts[s]["part"] for s in full}
    if parts and parts <= {"", "train"}:  # else what is held out lies apart
        pool = np.array([s for s in full if abouts[s]["part"] == ("train" if "train" in parts else "")])
        held, spans = np.concatenate([held[s] for s in pool]), (starts[pool], starts[pool + 1])
        if not len(held):  # few images: one is held out all the same
            least = min(pool, key=lambda s: abouts[s]["crc"][0])
            held = starts[[least]] + abouts[least]["crc"][1]
        runs = dict(train=(np.append(spans[0], held + 1), np.append(spans[1], held)), val=(held, held + 1))
        for split, (begin, end) in runs.items():
            made = as_runs(*(spans if n[pool].sum() == 1 else (begin, end)))
            arrays[split] = new(split, made.dtype, made.shape)
            arrays[split][:] = made
    return about, arrays


def as_runs(begin, end):
    """(2, R + 1): the first rows of R runs of rows, in order, and how many rows are before each and in all."""
    begin, end = np.sort(begin), np.sort(end)  # they do not overlap: sorted, they pair up
    begin, end = begin[end > begin], end[end > begin]
    return np.stack([np.append(begin, 0), np.append(0, np.cumsum(end - begin))])


def open_table(cache, name, jobs, arrays_from):
    """
    The Table of shards, kept in CACHE/index-.../; made in memory where that cannot be written.

    name: what tells data sets apart. jobs: [(shard, stamp), ...]: an index is made again where the stamp is another.
    arrays_from(shard): of its Index. Of many processes one makes it, the others wait.
    """
    folder, processes = f"{cache}/index-{digest('v3', name)}", processors()
    whole, parts = f"{folder}/{digest(jobs)}", [f"{folder}/{digest(job)}.npz" for job in jobs]
    with contextlib.suppress(Exception):  # not there, or damaged
        return Table.load(whole)

    def arrays_of(s):
        with contextlib.suppress(Exception):
            return read_arrays(parts[s])
        arrays = arrays_from(jobs[s][0])
        with contextlib.suppress(OSError):
            write_whole(parts[s], lambda f: np.savez_compressed(f, **arrays))
        return arrays

    def about_of(s):
        try:
            with np.load(parts[s]) as kept:  # what it tells of is not read
                return json.loads(str(kept["about"]))
        except Exception:
            return json.loads(str(arrays_of(s)["about"]))

    try:
        os.makedirs(folder, exist_ok=True)
        open(f"{folder}/lock", "a").close()
    except OSError as e:
        line = f"the index of {len(jobs)} shards cannot be kept in {folder} ({e}): it is made in memory, at every start"
        print(f"{line}; set cache_dir to a folder that can be written", flush=True)
        return Table.of([arrays_from(shard) for shard, _ in jobs])
    with locked(f"{folder}/lock", f"indexes {len(jobs)} shards") as is_alone:
        with contextlib.suppress(Exception):  # while this one waited
            return Table.load(whole)
        for left in os.listdir(folder) if is_alone else ():
            if left.endswith(".tmp"):
                remove(f"{folder}/{left}")
        remove(whole)  # it is damaged
        print(f"indexing {len(jobs)} shards (once: the index is kept in {folder})", flush=True)
        abouts, told = [], time.time()
        for about in spread(about_of, range(len(jobs)), processes):
            abouts.append(about)
            if time.time() - told > 10:
                print(f"indexed {len(abouts)} of {len(jobs)} shards", flush=True)
                told = time.time()
        making = ""
        try:
            making = tempfile.mkdtemp(dir=folder, suffix=".tmp")

            def new(name, dtype, shape):
                made = np.lib.format.open_memmap(f"{making}/{name}.npy", "w+", dtype, shape)
                if hasattr(os, "posix_fallocate"):  # a map on a full disk would end the process
                    with open(f"{making}/{name}.npy", "r+b") as f:
                        os.posix_fallocate(f.fileno(), 0, os.path.getsize(f.name))
                return made

            about, _ = join(abouts, arrays_of, new, processes)
            for name in os.listdir(making):
                with open(f"{making}/{name}", "rb") as f:
                    os.fsync(f.fileno())
            write_whole(f"{making}/about.json", lambda f: f.write(json.dumps(about).encode()))
            os.rename(making, whole)  # all of it, or nothing
        except OSError as e:
            with contextlib.suppress(Exception):  # where nothing is locked another was faster
                return Table.load(whole)
            print(f"the index cannot be kept in {folder} ({e}): it is held in memory", flush=True)
            remove(making)
            return Table.of([arrays_from(shard) for shard, _ in jobs])
        for name in set(os.listdir(folder)) - {"lock", *map(os.path.basename, [whole, *parts])} if is_alone else ():
            # of shards as they were; but a node whose copies have other dates may have mapped a table of its own
            if name.endswith(".npz") or time.time() - os.path.getmtime(f"{folder}/{name}") > UNUSED:
                remove(f"{folder}/{name}")
        return Table.load(whole)


# -----------------------------------------------------------------------------
# files and processes


def remove(path):
    """A file or a folder, which may not be there."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def temporary(path):
    """A name beside it that no other process has: on a disk that nodes share, process numbers alone are not enough."""
    return f"{path}.{os.getpid()}{int.from_bytes(os.urandom(4), 'big'):010d}.tmp"


def sync(path):
    """Does not return before a file, or a folder's names, are on the disk."""
    if os.name != "posix" and os.path.isdir(path):  # there a folder does not open
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(source, target):
    """Gives a file that is on the disk its name, and does not return before that is there too."""
    os.replace(source, target)
    sync(os.path.dirname(target) or ".")


def write_whole(path, write):
    """write(file) makes a file that is there whole or not at all, and on the disk before it has its name."""
    making = temporary(path)
    try:
        with open(making, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        rename(making, path)
    except OSError as e:
        if os.path.exists(making):
            os.remove(making)
        raise OSError(f"could not write {path} ({e}): make room and run again") from None


@contextlib.contextmanager
def locked(path, what=""):
    """
    Until its end no other process is within; what the other one does is told while this one waits.

    Yields False on a file system without locks: there all do the work, and write the same.
    """
    with open(path, "a") as f:
        is_alone = fcntl is not None
        try:
            if fcntl:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if what:
                print(f"waiting for another process, which {what}", flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError:
            is_alone = False
        yield is_alone


def processors():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(parent):
    """In a process of spread: ends with the one that began it."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call(job):
    return _function(job)


def spread(function, jobs, processes=None):
    """function(job) of each job, in order; where there are many, in forked processes."""
    global _function
    processes = processes or processors()
    if processes < 2 or len(jobs) < 32 or not sys.platform.startswith("linux"):  # macOS's libraries outlive no fork
        yield from map(function, jobs)
        return
    _function, fork = function, multiprocessing.get_context("fork")  # they have it from their birth
    try:
        with concurrent.futures.ProcessPoolExecutor(processes, fork, _begin, (os.getpid(),)) as pool:
            yield from pool.map(_call, jobs, chunksize=max(min(len(jobs) // processes // 8, 16), 1))
    except concurrent.futures.process.BrokenProcessPool:
        raise RuntimeError("a process that indexes shards was killed (out of memory?): run again, it goes on") from None


# -----------------------------------------------------------------------------
# shards from afar


class Remote:
    """
    Files that an fsspec URL names, fetched whole into a folder and read there; beyond `gigabytes` the oldest used go.

    The URL is a folder, a file, or has `*` or `{000..123}` in it. `names` are relative to the folder before those;
    stamps[name] tells one state of a file from another. Safe for any number of processes: a file has its name when it
    is whole, and one that is removed stays as long as it is open.
    """

    def __init__(self, url, cache="cache", gigabytes=64.0):
        self.url, self.gigabytes, self.thread = url, gigabytes, None
        try:
            self.look_up(url)
        except ImportError:
            raise
        except Exception as e:  # file systems raise what they like
            kind, why = FileNotFoundError if isinstance(e, FileNotFoundError) else OSError, e.__cause__ or e
            remedy = "check the address, the network and your credentials"
            raise kind(f"dataset {url} cannot be looked up ({type(why).__name__}: {why}): {remedy}") from None
        self.names = sorted(self.paths)
        self.folder = f"{cache}/shards-{digest(url.split('://')[0], self.base)}"
        try:
            os.makedirs(self.folder, exist_ok=True)
            open(f"{self.folder}/lock", "a").close()
        except OSError as e:
            raise OSError(f"shards of {url} cannot be kept in {self.folder} ({e}): set another cache_dir") from None
        largest = max([self.sizes[name] or 0 for name in self.names if name.endswith((".tar", ".parquet"))], default=0)
        if largest > gigabytes * 1e9:
            needs = f"less than one of its files, of {largest / 1e9:.3g} GB"
            raise ValueError(f"cache_gb={gigabytes} of {url} is {needs}: give it room for 64 shards and more")

    def look_up(self, url):
        """Sets base, paths, sizes and stamps from what is there now."""
        fs, found = self.system(), {}
        base, one_by_one = re.split(r"[*?\[{]", url)[0].rpartition("/")[0], braces(url)
        self.is_whole = (
            not url.endswith((".tar", ".parquet")) and len(one_by_one) == 1 and not re.search(r"[*?\[]", url)
        )
        for path in map(fs._strip_protocol, one_by_one):
            if self.is_whole:
                base, found = url, fs.find(path, detail=True)
            else:
                found |= fs.glob(path, detail=True) if re.search(r"[*?\[]", path) else {path: {}}
        base = fs._strip_protocol(base).rstrip("/")
        with concurrent.futures.ThreadPoolExecutor(16) as pool:  # over HTTP a list has no sizes
            infos = list(pool.map(lambda path: found[path] if found[path].get("size") else fs.info(path), found))
        self.paths, self.stamps, self.sizes = {}, {}, {}
        for path, info in zip(found, infos):
            name = path.removeprefix(base).lstrip("/")
            version = [str(info[key]) for key in VERSIONS if info.get(key)]
            self.paths[name], self.sizes[name] = path, info.get("size")
            self.stamps[name] = (info.get("size"), *version)
        self.base = base

    def __getstate__(self):
        return {**self.__dict__, "thread": None}

    def system(self):
        """The fsspec file system; asked for each time, as it does not outlive a fork."""
        try:
            import fsspec

            return fsspec.core.url_to_fs(self.url)[0]
        except ImportError as e:
            needs = "needs fsspec: pip install fsspec, with s3fs, gcsfs or aiohttp"
            raise ImportError(f"reading {self.url} {needs} ({e})") from None

    def local(self, name):
        return f"{self.folder}/{digest(name, self.stamps[name])}{os.path.splitext(name)[1]}"

    def open(self, name):
        """The file, open for reading."""
        while True:
            try:
                f = open(self.local(name), "rb")
                os.utime(f.fileno())  # used just now
                return f
            except FileNotFoundError:
                self.fetch(name)

    def fetch(self, name):
        path = self.local(name)
        with locked(f"{self.folder}/lock-{zlib.crc32(name.encode()) % 64}"):
            for attempt in range(4):
                if os.path.exists(path):
                    return
                part = temporary(path)
                try:
                    self.system().get_file(self.paths[name], part)
                    size = os.path.getsize(part)
                    if self.sizes[name] not in (None, size):
                        raise OSError(f"{size} bytes of {self.sizes[name]} came")
                    os.replace(part, path)
                    break
                except FileNotFoundError:
                    raise
                except Exception as e:  # what a network does is not always an OSError
                    if attempt == 3:
                        raise OSError(f"{name} of {self.url} could not be fetched four times ({e!r})") from e
                    print(f"fetching {name} of {self.url} again ({e!r})", flush=True)
                    time.sleep(4**attempt / 4)
                finally:
                    with contextlib.suppress(OSError):
                        os.remove(part)
        self.evict(path)

    def evict(self, keep):
        """Removes the longest unused until the rest is within the bound, and what killed processes left."""
        with locked(f"{self.folder}/lock"):
            files = []
            for file in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    files.append((file.stat().st_mtime, file.stat().st_size, file.path))
            total = sum(size for _, size, _ in files)
            for used, size, path in sorted(files):
                is_left = path.endswith(".tmp") and time.time() - used > 3600
                is_shard = re.fullmatch(r"[0-9a-f]{16}\.(tar|parquet)", os.path.basename(path)) and path != keep
                if is_left or (is_shard and total > self.gigabytes * 1e9):
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(path)
                    total -= size

    def ahead(self, names):
        """Fetches these in the background, if the bound has room for them beside as many others."""
        if 2 * sum(self.sizes[name] or 0 for name in names) > self.gigabytes * 1e9 or self.thread:
            return

        def fetch():
            with contextlib.suppress(Exception):  # who reads it will meet it again, and tell
                for name in names:
                    self.fetch(name)
            self.thread = None

        self.thread = threading.Thread(target=fetch, daemon=True)
        self.thread.start()

    def is_fetching(self, seconds):
        """Whether in these last seconds any process of the machine got on with a file that it fetches."""
        try:
            files = [file for file in os.scandir(self.folder) if file.name.endswith(".tmp")]
            return any(time.time() - file.stat().st_mtime < seconds for file in files)
        except FileNotFoundError:  # one has just got its name
            return True

    def small(self, name):
        """Content of a small file in the folder, None where there is none."""
        if self.is_whole and name not in self.paths:
            return None
        try:
            return self.system().cat_file(f"{self.base}/{name}")
        except (FileNotFoundError, PermissionError):  # who may not list may be refused what is not there
            return None
        except Exception as e:
            if getattr(e, "status", 0) in (401, 403, 410):  # the same over HTTP
                return None
            raise

    def copy(self, names):
        """Small files as they are there now, into the folder."""
        for name in names:
            if content := self.small(name):
                write_whole(f"{self.folder}/{name}", lambda f, content=content: f.write(content))
            else:
                remove(f"{self.folder}/{name}")


def braces(url):
    """x-{000..123}.tar as 124 URLs."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if not found:
        return [url]
    first, last = found[1], found[2]
    numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return [one for number in numbers for one in braces(url[: found.start()] + number + url[found.end() :])]
