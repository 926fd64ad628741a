"""Shards: an index file for each, kept in cache_dir, and shards behind a URL, of which the last used stay on disk.

    Indexes        headers[s], and load(s) -> arrays of shard s (see data/forms.py), in memory
    StoredIndexes  the same, stored in files: made once, in parallel
    Remote         the files of an fsspec URL, as local files

A shard is a tar or parquet file, or the images of one split in a folder or array.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import threading
import time
import zlib

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import UserError, reading, reject, write_whole
from data.forms import COLUMNS

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None

VERSIONS = ("ETag", "etag", "md5", "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created")


def digest(*parts):
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def locked(path):
    """One process at a time; on a file system without locks all do the work, and write the same."""
    with open(path, "a") as f:
        if fcntl:
            with contextlib.suppress(OSError):
                fcntl.flock(f, fcntl.LOCK_EX)
        yield


class Indexes:
    """headers[s] and load(s) -> arrays of shard s, in memory; indexes: of data.forms.Index."""

    def __init__(self, indexes):
        self.headers, self.arrays = [], []
        for index in indexes:
            header, arrays = index.arrays()
            self.headers.append(header)
            self.arrays.append(arrays)

    def load(self, s):
        return self.arrays[s]


class StoredIndexes(torch.utils.data.Dataset):
    """The indexes of shards, a file each in `folder`, and all headers in one file, so that many are opened at once.

    jobs: [(shard, stamp), ...]; an index is made again if the stamp is another. index(shard) -> data.forms.Index.
    One process makes them while others wait; after a kill, the next continues.
    """

    def __init__(self, folder, jobs, index):
        self.folder, self.jobs, self.index = folder, jobs, index
        names = [digest(job) for job in jobs]
        self.paths, kept = [f"{folder}/{name}.npz" for name in names], self._read_headers()
        if not kept.keys() >= set(names):
            try:
                os.makedirs(folder, exist_ok=True)
                with locked(f"{folder}/lock"):
                    kept = self._read_headers()  # another process may have made them meanwhile
                    missing = [s for s, name in enumerate(names) if name not in kept]
                    kept |= {names[s]: header for s, header in zip(missing, self._build(missing))}
                    kept = {name: kept[name] for name in names}
                    write_whole(f"{folder}/headers.json", lambda f: f.write(json.dumps(kept).encode()))
                    for name in set(os.listdir(folder)) - {os.path.basename(path) for path in self.paths}:
                        if name.endswith(".npz"):  # of an older version of a shard
                            os.remove(f"{folder}/{name}")
            except OSError as e:
                reject(folder, f"the index of {len(jobs)} shards cannot be kept there ({e})", "set another cache_dir")
        self.headers = [kept[name] for name in names]

    def _read_headers(self):
        try:
            with open(f"{self.folder}/headers.json") as f:
                return json.load(f)
        except (OSError, ValueError):
            return {}

    def _build(self, missing):
        """Headers of the missing shards, made in as many processes as there are processors."""
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(processors, len(missing) // 16) if processors > 1 else 0
        options = dict(batch_size=None, num_workers=workers, generator=torch.Generator())
        headers = torch.utils.data.DataLoader(torch.utils.data.Subset(self, missing), **options)
        for header in tqdm(headers, desc="indexing shards", disable=None if missing else True):
            if isinstance(header, Exception):  # as a worker would add its trace to the message
                raise header
            yield header

    def __getitem__(self, s):
        """The header of shard s, or the error that prevents it; for _build."""
        try:
            return self._load(s)[0]
        except (UserError, OSError) as e:
            return e

    def load(self, s):
        """arrays of shard s."""
        return self._load(s)[1]

    def _load(self, s):
        """(header, arrays) of shard s from its file; made again if that is gone or damaged."""
        with contextlib.suppress(Exception), np.load(self.paths[s]) as f:
            header, arrays = json.loads(str(f["header"])), {name: f[name] for name in ("rows", "records", "held")}
            assert arrays["rows"].shape == (header["n"], COLUMNS)
            return header, arrays
        shard, stamp = self.jobs[s]
        try:
            header, arrays = self.index(shard).arrays(stamp)
        except OSError as e:
            reject(shard, f"cannot be read ({e.strerror})", "correct or remove it")
        write_whole(self.paths[s], lambda f: np.savez_compressed(f, header=json.dumps(header), **arrays))
        return header, arrays


class Remote:
    """Files that an fsspec URL names, fetched completely into a folder and read there; beyond `gigabytes` the least
    recently used are removed.

    The URL is a folder, a file, or has `*` or `{000..123}` in it. `names` are relative to the folder before those;
    stamps[name] changes when the file does. Safe for any number of processes: a file is renamed when it
    is complete, and one that is removed can be read as long as it is open.
    """

    def __init__(self, url, cache_dir="cache", gigabytes=64.0):
        self.url, self.gigabytes, self.thread = url, gigabytes, None
        try:
            self._look_up()
        except ImportError as e:
            reject(url, f"cannot be read ({e})", "pip install fsspec, with s3fs, gcsfs or aiohttp")
        except Exception as e:  # each file system has its own errors
            why = e.__cause__ or e
            remedy = "check the address, the network and your credentials"
            reject(url, f"cannot be looked up ({type(why).__name__}: {why})", remedy)
        self.names = sorted(self.paths)
        self.folder = f"{cache_dir}/shards-{digest(url.split('://')[0], self.base)}"
        with reading(url, f"its shards cannot be kept in {self.folder}", "set another cache_dir"):
            os.makedirs(self.folder, exist_ok=True)
        largest = max([self.sizes[name] or 0 for name in self.names if name.endswith((".tar", ".parquet"))], default=0)
        if largest > gigabytes * 1e9:
            what = f"cache_gb={gigabytes} is less than one of its files, of {largest / 1e9:.3g} GB"
            reject(url, what, "set it to hold 64 shards or more")

    def _look_up(self):
        """Sets base, paths, sizes and stamps."""
        fs, found, urls = self.system(), {}, braces(self.url)
        base = re.split(r"[*?\[{]", self.url)[0].rpartition("/")[0]
        for url, path in zip(urls, map(fs._strip_protocol, urls)):
            if re.search(r"[*?\[]", url):
                found |= fs.glob(path, detail=True)
            elif len(urls) > 1 or url.endswith((".tar", ".parquet")):
                found[path] = {}
            else:
                base, found = url, fs.find(path, detail=True)
        self.base = fs._strip_protocol(base).rstrip("/")
        with concurrent.futures.ThreadPoolExecutor(16) as pool:  # over HTTP a list has no sizes
            infos = list(pool.map(lambda path: found[path] if found[path].get("size") else fs.info(path), found))
        self.paths = {path.removeprefix(self.base).lstrip("/"): path for path in found}
        self.sizes = {name: info.get("size") for name, info in zip(self.paths, infos)}
        self.stamps = {
            name: (info.get("size"), *(str(info[key]) for key in VERSIONS if info.get(key)))
            for name, info in zip(self.paths, infos)
        }

    def __getstate__(self):
        return {**self.__dict__, "thread": None}

    def system(self):
        """The fsspec file system; made each time, as it is not valid after a fork."""
        import fsspec

        return fsspec.core.url_to_fs(self.url)[0]

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
        part = f"{path}.{os.getpid()}-{threading.get_ident()}.tmp"
        with locked(f"{self.folder}/lock-{zlib.crc32(name.encode()) % 64}"):
            for attempt in range(4):
                if os.path.exists(path):
                    return
                try:
                    self.system().get_file(self.paths[name], part)
                    size = os.path.getsize(part)
                    if self.sizes[name] not in (None, size):
                        raise OSError(f"got {size} of {self.sizes[name]} bytes")
                    os.replace(part, path)
                    break
                except Exception as e:  # what a network does is not always an OSError
                    if attempt == 3:
                        reject(name, f"of {self.url} could not be fetched ({e!r})", "check the network, run again")
                    print(f"fetching {name} of {self.url} again ({e!r})", flush=True)
                    time.sleep(4**attempt / 4)
                finally:
                    with contextlib.suppress(OSError):
                        os.remove(part)
        self._evict(path)

    def _evict(self, keep):
        """Removes temporary files of killed processes, and the least recently used shards beyond the bound."""
        with locked(f"{self.folder}/lock"):
            files = []
            for file in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    files.append((file.stat().st_mtime, file.stat().st_size, file.path))
            total = sum(size for _, size, _ in files)
            for used, size, path in sorted(files):
                is_left = path.endswith(".tmp") and time.time() - used > 3600
                is_shard = path.endswith((".tar", ".parquet")) and path != keep
                if is_left or (is_shard and total > self.gigabytes * 1e9):
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(path)
                    total -= size

    def prefetch(self, names):
        """Fetch these files in the background, if twice their size is within the bound."""
        if self.thread or 2 * sum(self.sizes[name] or 0 for name in names) > self.gigabytes * 1e9:
            return

        def fetch():
            with contextlib.suppress(Exception):  # the reader gets the error again, and reports it
                for name in names:
                    self.fetch(name)
            self.thread = None

        self.thread = threading.Thread(target=fetch, daemon=True)
        self.thread.start()

    def copy(self, names):
        """Copies those of these small files that exist next to the shards into the folder."""
        for name in names:
            path, content = f"{self.folder}/{name}", None
            try:
                content = self.system().cat_file(f"{self.base}/{name}")
            except Exception as e:  # not there; without permission to list, that is a 403
                if not isinstance(e, FileNotFoundError | PermissionError) and getattr(e, "status", 0) // 100 != 4:
                    raise
            if content:
                write_whole(path, lambda f, content=content: f.write(content))
            elif os.path.exists(path):
                os.remove(path)


def braces(url):
    """x-{000..123}.tar as 124 URLs."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if not found:
        return [url]
    first, last = found[1], found[2]
    numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return [one for number in numbers for one in braces(url[: found.start()] + number + url[found.end() :])]
