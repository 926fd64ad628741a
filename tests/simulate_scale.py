"""What hundreds of millions of images need of a machine: a synthetic index of that size, opened and read.

    python tests/simulate_scale.py                      # 4,000 shards of 10,000 images: 1 GB, some minutes
    python tests/simulate_scale.py --shards=40000       # 400 million: 11 GB

The shards are empty files; what would be read from them is made up, as img2dataset writes it: KEY.jpg of 15 to 35 KB,
KEY.txt, KEY.json. All else is what training does: `Dataset` lists them, joins their indexes, opens the table, draws
positions. The time to index a shard is measured on one real shard of small files.
"""

import argparse
import functools
import io
import json
import os
import sys
import tarfile
import tempfile
import time

import numpy as np

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..")))
from data import dataset, shards
from data.dataset import Dataset, Stream

ITEMS = 10_000  # in a shard, as img2dataset has them


@functools.cache
def template():
    """Index.arrays of one shard, and what is told of it."""
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(15_000, 35_000, ITEMS), rng.integers(20, 200, ITEMS), rng.integers(300, 900, ITEMS)])
    blocks = (sizes + 511) // 512 * 512
    ends = np.cumsum((blocks + 512).T.reshape(-1)).reshape(-1, 3).T  # of each member, after its header
    table = np.zeros((ITEMS, len(shards.COLUMNS)), np.int64)
    for k, name in enumerate(("", "text_", "json_")):
        table[:, shards.COLUMNS.index(f"{name}at")] = ends[k] - blocks[k]
        table[:, shards.COLUMNS.index(f"{name}size")] = sizes[k]
    table[:, 0], table[:, shards.COLUMNS.index("text_kind")] = -1, dataset.PLAIN_TEXT
    about = dict(n=ITEMS, part="", names=[], named=False, content=int(ends[-1, -1]), width=9, bytes=9 * ITEMS)
    about |= dict(low=table.min(0).tolist(), high=table.max(0).tolist(), crc=[0, 0], texts="")
    keys = np.array([b"%09d" % i for i in range(ITEMS)])
    return about, dict(keys=keys, table=table, held=np.flatnonzero(rng.random(ITEMS) < 0.01))


def made_up(shard):
    """Index.arrays of a shard that is not there: places and sizes are the same in all, keys are not."""
    about, arrays = template()
    keys = arrays["keys"].copy()
    keys.view(np.uint8).reshape(ITEMS, 9)[:, :5] = np.frombuffer(shard[:5].encode(), np.uint8)
    about = json.dumps(about | dict(files=[shard], prefix=shard[:-4] + "/", digest=shards.digest(shard)))
    return arrays | dict(about=np.array(about), keys=keys)


def real_shard(path):
    """Seconds to index one shard of ITEMS images, of 1 KB each, and the size of its index in bytes."""
    with tarfile.open(path, "w") as tar:
        for i in range(ITEMS):
            for end, size in ((".jpg", 1000), (".json", 500), (".txt", 90)):
                info = tarfile.TarInfo(f"{i:09d}{end}")
                info.size = size
                tar.addfile(info, io.BytesIO(b'{"caption": "a"}'.ljust(size)))
    began = time.process_time()
    arrays = dataset.index_tar(lambda name: open(path, "rb"), "00000.tar").arrays()
    took = time.process_time() - began
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return took, len(file.getvalue())


def memory():
    """(resident, of its own) MB of this process; what is mapped from a file is not its own."""
    with open("/proc/self/smaps_rollup") as f:
        kb = {line.split(":")[0]: int(line.split()[1]) for line in f if line.endswith("kB\n")}
    return kb["Rss"] / 1e3, kb["Anonymous"] / 1e3


def worker(folder, cache, draws, pipe):
    """One process: opens the data set, and draws at random places."""
    before, began = memory(), time.perf_counter()
    ds = Dataset(folder, "train", 256, cache=cache)
    opened, after = time.perf_counter() - began, memory()
    out = dict(n=len(ds), opened=opened, private=after[1] - before[1])
    stream = Stream(ds, 0)
    began = time.perf_counter()
    for p in range(draws):
        ds.place(stream.item(p)[0])
    out |= dict(places=draws / (time.perf_counter() - began))
    windowed, began = Stream(ds, 0, window=32), time.perf_counter()
    windowed.item(len(ds) // 2 + 5)
    out["first"] = time.perf_counter() - began
    began = time.perf_counter()
    for p in range(draws // 10):
        windowed.item(len(ds) // 2 + p)
    out |= dict(
        windowed=draws / 10 / (time.perf_counter() - began), resident=memory()[0], drawn=memory()[1] - before[1]
    )
    pipe.send(out)
    pipe.recv()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=4000)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--folder", default=None, help="where it is made, and removed again; default: a temporary one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as root:
        took, size = real_shard(f"{root}/real.tar")
        print(f"indexing a shard of {ITEMS} images: {took:.2f} s of one core and {size / 1e3:.0f} KB kept")
        os.makedirs(f"{root}/set")
        for s in range(asked.shards):
            open(f"{root}/set/{s:05d}.tar", "w").close()
        real_write = shards.write_whole
        shards.write_whole = lambda path, write: (
            None if path.endswith(".npz") else real_write(path, write)
        )  # 0.2 MB each
        dataset.Dataset._arrays = lambda self, shard: made_up(shard)
        began = time.perf_counter()
        count = len(Dataset(f"{root}/set", "all", cache=f"{root}/cache").table)
        joined = time.perf_counter() - began
        files = [os.path.join(at, name) for at, _, names in os.walk(f"{root}/cache") for name in names]
        disk = {os.path.basename(name): os.path.getsize(name) for name in files}
        total = sum(disk.values())
        print(f"{count:,} images: listed and joined in {joined:.0f} s on {shards.processors()} cores")
        print(f"on disk {total / 1e9:.2f} GB, {total / count:.1f} bytes an image: {disk}")
        ends, results = [], []
        for _ in range(2):  # the second finds what the first has read
            here, there = shards.multiprocessing.get_context("spawn").Pipe()
            process = shards.multiprocessing.get_context("spawn").Process(
                target=worker, args=(f"{root}/set", f"{root}/cache", asked.draws, there)
            )
            process.start()
            results.append(here.recv())
            ends.append((here, process))
        for number, r in enumerate(results):
            print(
                f"process {number}: opened in {r['opened']:.2f} s with {r['private']:.0f} MB of its own;"
                f" {r['places']:.0f} random places/s; a window after {r['first'] * 1e3:.0f} ms, {r['windowed']:.0f}/s;"
                f" then {r['resident']:.0f} MB resident, {r['drawn']:.0f} MB more of its own than before"
            )
        for here, process in ends:
            here.send(None)
            process.join()
