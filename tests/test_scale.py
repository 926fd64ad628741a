"""Order, index, remote shards and workers at scale: what data/dataset.py and data/shards.py promise of many shards."""

import errno
import http.server
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_dataset import encoded, make_folder, make_tar, picture, same

from data import dataset as room
from data import shards as store
from data.dataset import BadImage, Dataset, Stream, loader, permute, seed_of, step_positions

ROOT, FORK = Path(__file__).resolve().parent.parent, multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # cache/ goes to the current directory


def make_shards(path, sizes, names="{:05d}.tar"):
    """Shards of so many small images; labels, captions and keys tell them apart."""
    number = 0
    for s, size in enumerate(sizes):
        samples = []
        for i in range(size):
            parts = (
                {".png": encoded(picture(number, (4, 4)))} if number % 5 else {".jpg": b"not an image"[: number % 7]}
            )
            parts = parts if number % 5 else {".png": encoded(picture(number, (5, 4)))}
            parts |= {".cls": str(number % 3).encode(), ".txt": f"no {number}".encode()}
            samples.append({f"{i:04d}{end}": content for end, content in parts.items()})
            number += 1
        make_tar(path / names.format(s), samples)
    return path


def content(ds):
    return [(meta := ds.meta(i))["key"] + f" {meta['label']} {meta['text']}" for i in range(len(ds))]


# -----------------------------------------------------------------------------
# the permutation


@pytest.mark.parametrize("n", [10**6, *(2**k + d for k in (8, 13, 16, 19) for d in (-1, 0, 1))])
def test_permutation_hits_everything_once(n):
    hit = np.zeros(n, np.uint8)
    for start in range(0, n, 2**18):  # in pieces, as training asks for it
        hit[permute(np.arange(start, min(start + 2**18, n)), n, seed=n)] += 1
    assert hit.min() == hit.max() == 1


def test_permutation_of_a_billion_is_even_and_takes_no_memory():
    n, rng = 10**9, np.random.default_rng(0)
    at = np.unique(np.concatenate([rng.integers(0, n, 300_000), np.arange(100_000), np.arange(n - 100_000, n)]))
    for seed in (1, 2):
        to = permute(at, n, seed)
        assert len(np.unique(to)) == len(at) and to.min() >= 0 and to.max() < n
        near = np.bincount(permute(np.arange(100_000), n, seed) * 1000 // n, minlength=1000)  # 100 each are expected
        assert 800 < ((near - 100) ** 2 / 100).sum() < 1220  # chi squared of 999 degrees: 999 +- 5 x 44.7
        u, v = to[:-1] / n, to[1:] / n
        assert abs(np.corrcoef(u, v)[0, 1]) < 0.01 and abs(np.corrcoef(to, at)[0, 1]) < 0.01
        assert permute(int(at[77]), n, seed) == to[77]
    tracemalloc.start()
    permute(123456789, n, 3)
    assert tracemalloc.get_traced_memory()[1] < 20_000
    tracemalloc.stop()


# -----------------------------------------------------------------------------
# the index


def test_the_table_finds_what_tarfile_finds(tmp_path):
    make_shards(tmp_path / "set", [3, 0, 40, 1, 7])
    ds, at = Dataset(tmp_path / "set", "all", 4), 0
    for shard in sorted(os.listdir(tmp_path / "set")):
        with tarfile.open(tmp_path / "set" / shard) as tar:
            for name in [name for name in tar.getnames() if name.endswith(".png")]:
                key, label, (file, *where), text, _ = ds.place(at)
                read = lambda name, tar=tar: tar.extractfile(name).read()  # noqa: E731
                assert key == f"{shard[:-4]}/{name[:-4]}" and ds.files[file] == shard
                assert ds._read(key, file, *where) == read(name)
                assert label == int(read(name[:-4] + ".cls")) == ds.labels[at]
                assert ds.meta(at)["text"] == [read(name[:-4] + ".txt").decode()]
                at += 1
    assert at == len(ds) == 51 and ds.bounds.tolist() == [0, 3, 3, 43, 44, 51]


def test_index_in_processes_in_memory_and_kept_are_the_same(tmp_path, monkeypatch):
    make_shards(tmp_path / "set", [5] * 33)
    made = {}
    for name, count, is_kept in (("one", 1, True), ("three", 3, True), ("memory", 1, False)):
        monkeypatch.setattr(store, "processors", lambda count=count: count)
        if not is_kept:
            Path("memory").write_text("a file stands where the folder would be")
        for split in ("train", "val", "all"):
            made[name, split] = Dataset(tmp_path / "set", split, cache=name)
    for split in ("train", "val", "all"):
        one = made["one", split]
        for name in ("three", "memory"):
            other = made[name, split]
            assert other.fingerprint == one.fingerprint and content(other) == content(one)
            assert other.table.rows.dtype == one.table.rows.dtype and (other.table.rows == one.table.rows).all()
        assert isinstance(one.table.rows.base, np.memmap)
    crc = [zlib.crc32(made["one", "all"].key(i).encode()) % 100 == 0 for i in range(165)]
    keys = {split: {line.split()[0] for line in content(made["one", split])} for split in ("train", "val")}
    assert (
        len(keys["val"]) == max(sum(crc), 1)
        and not keys["train"] & keys["val"]
        and len(keys["train"]) == 165 - len(keys["val"])
    )


def test_a_worker_is_handed_the_table_by_name(tmp_path):
    make_shards(tmp_path / "set", [50, 60])
    ds = Dataset(tmp_path / "set", "train", 4)
    packed = pickle.dumps(ds)
    assert len(packed) < 3000 and content(pickle.loads(packed)) == content(ds)
    assert isinstance(pickle.loads(packed).table.rows.base, np.memmap)
    plain = pickle.loads(pickle.dumps(Dataset(make_folder(tmp_path / "folder"), "train", 4)))
    assert len(plain) == 5 and plain[0]["image"].shape == (3, 4, 4)
    assert ds.table.rows.dtype.itemsize < 20, "narrow: offsets below 2^32, keys of 4 characters"


def test_keys_of_very_different_lengths(tmp_path):
    png, keys = encoded(picture(0)), ["a", "b" * 90, "ccc", "ä" * 40, "d"]
    make_tar(tmp_path / "set/0.tar", [{f"{key}.png": png} for key in keys])
    make_tar(tmp_path / "set/1.tar", [{f"{i:03d}.png": png} for i in range(50)])
    ds = Dataset(tmp_path / "set", "all")
    assert ds.table.blob is not None
    assert [ds.key(i) for i in range(len(ds))] == [f"0/{key}" for key in keys] + [f"1/{i:03d}" for i in range(50)]


def test_class_names_in_some_shards_and_numbers_in_others(tmp_path):
    png = encoded(picture(0))
    for s, labels in enumerate((["dog", "ant"], ["3", "10"], ["ant", ""])):
        samples = [{f"{i}.png": png, f"{i}.cls": label.encode()} for i, label in enumerate(labels)]
        make_tar(tmp_path / f"set/{s}.tar", samples)
    ds = Dataset(tmp_path / "set", "all")
    assert ds.classes == ["10", "3", "ant", "dog"] and ds.labels.tolist() == [3, 2, 1, 0, 2, -1]
    assert [ds.meta(i)["label"] for i in range(6)] == ds.labels.tolist()


def test_a_changed_shard_alone_is_read_again(tmp_path, monkeypatch):
    read, real = [], room.index_tar
    monkeypatch.setattr(room, "index_tar", lambda opened, shard: read.append(shard) or real(opened, shard))
    make_shards(tmp_path / "set", [4] * 6)
    first = Dataset(tmp_path / "set", "all").fingerprint
    assert len(read) == 6 and Dataset(tmp_path / "set", "val").table is not None and len(read) == 6
    make_tar(tmp_path / "set/00002.tar", [{"new.png": encoded(picture(9))}])
    changed = Dataset(tmp_path / "set", "all")
    assert read[6:] == ["00002.tar"] and len(changed) == 21 and changed.fingerprint != first
    os.remove(tmp_path / "set/00000.tar")
    assert len(Dataset(tmp_path / "set", "all")) == 17 and len(read) == 7
    (folder,) = Path("cache").iterdir()
    tables = [path for path in folder.iterdir() if path.is_dir()]
    assert len(list(folder.glob("*.npz"))) == 5 and len(tables) == 3, "another node may have mapped an old table"
    for path in tables:
        os.utime(path, (1, time.time() - store.UNUSED - 1))
    make_tar(tmp_path / "set/00001.tar", [{"new.png": encoded(picture(9))}])
    assert len(Dataset(tmp_path / "set", "all")) == 14 and len(read) == 8
    assert len(list(folder.glob("*.npz"))) == 5 and len(list(folder.iterdir())) == 7, "nothing old stays"


def slow_opening(path, said=None):
    """In another process: opens a data set, 0.1 s a shard."""
    real = room.index_tar
    room.index_tar = lambda *where: time.sleep(0.1) or real(*where)
    if said:
        sys.stdout = open(said, "w")
    ds = Dataset(path, "all", 4)
    print(len(ds), ds.fingerprint, flush=True)


def test_a_killed_build_goes_on_where_it_was(tmp_path, monkeypatch):
    make_shards(tmp_path / "set", [2] * 40)
    process = FORK.Process(target=slow_opening, args=(tmp_path / "set",))
    process.start()
    while len(list(Path("cache").rglob("*.npz"))) < 4:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    (folder,) = Path("cache").iterdir()
    (folder / "left.tmp").write_bytes(b"half")
    made = -1
    while made != (made := len(list(folder.glob("*.npz")))):  # its processes end by themselves
        time.sleep(1.5)
    read, real = [], room.index_tar
    monkeypatch.setattr(room, "index_tar", lambda opened, shard: read.append(shard) or real(opened, shard))
    monkeypatch.setattr(store, "processors", lambda: 1)
    ds = Dataset(tmp_path / "set", "all", 4)
    assert len(ds) == 80 and 0 < len(read) == 40 - made < 40 and not list(folder.glob("*.tmp"))
    assert ds.fingerprint == Dataset(tmp_path / "set", "all", 4, cache="other").fingerprint


def test_one_of_many_processes_builds(tmp_path):
    make_shards(tmp_path / "set", [3] * 12)
    ranks = [FORK.Process(target=slow_opening, args=(tmp_path / "set", f"said-{rank}")) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    said = [Path(f"said-{rank}").read_text() for rank in range(4)]
    assert len({text.splitlines()[-1] for text in said}) == 1 and said[0].splitlines()[-1].startswith("36 ")
    assert sum("indexing 12 shards" in text for text in said) == 1
    assert sum("waiting for another process, which indexes 12 shards" in text for text in said) == 3
    assert not list(Path("cache").rglob("*.tmp"))


def test_a_full_disk_is_told_and_the_index_held_in_memory(tmp_path, monkeypatch, capsys):
    make_shards(tmp_path / "set", [3] * 3)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    ds = Dataset(tmp_path / "set", "all")
    assert len(content(ds)) == 9 and "No space left on device): it is held in memory" in capsys.readouterr().out
    assert not list(Path("cache").rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", full)  # not even the small files
    assert content(Dataset(tmp_path / "set", "all", cache="other")) == content(ds)


def test_the_simulation_makes_up_what_an_index_has():
    import simulate_scale

    index = store.Index(files=["00007.tar"], prefix="00007/")
    index.add("000070000", (0, 512, 20_000), None, (1, 0, 21_000, 90), (0, 0, 22_000, 500))
    real, made = index.arrays(), simulate_scale.made_up("00007.tar")
    assert real.keys() == made.keys() and json.loads(str(real["about"])).keys() == json.loads(str(made["about"])).keys()
    assert made["keys"][0] == real["keys"][0] and made["table"].shape == (10_000, real["table"].shape[1])
    assert (made["table"].min(0) == made["table"].max(0)).tolist() == [name not in VARY for name in store.COLUMNS]


VARY = ("at", "size", "text_at", "text_size", "json_at", "json_size")


# -----------------------------------------------------------------------------
# order: shards of unequal sizes, window by window


@pytest.fixture
def uneven(tmp_path):
    return Dataset(make_shards(tmp_path / "uneven", [1, 17, 0, 4, 9, 30, 2, 2, 13, 5]), "all", 4)


def by_hand(ds, stream, epoch, window):
    """The windowed order, as its docstring has it, with lists."""
    shards = np.split(np.arange(len(ds)), ds.bounds[1:-1])
    order = permute(np.arange(len(shards)), len(shards), seed_of(stream.seed, epoch, "shards")).tolist()
    out = []
    for first in range(0, len(shards), window):
        items = [int(i) for s in order[first : first + window] for i in shards[s]]
        out += [items[permute(j, len(items), seed_of(stream.seed, epoch, "window", first))] for j in range(len(items))]
    return out


@pytest.mark.parametrize("window", [0, 1, 3, 32])
def test_no_overlap_and_no_loss_at_any_world_size(uneven, window):
    stream, n = Stream(uneven, 5, window=window), len(uneven)
    epochs = [[stream.item(p)[0] for p in range(e * n, (e + 1) * n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and epochs[0] != epochs[1]
    if window:
        assert epochs == [by_hand(uneven, stream, e, window) for e in range(3)]
        for at in range(0, n, 7):  # a fresh one knows any position at once
            assert Stream(uneven, 5, window=window).item(2 * n + at) == (epochs[2][at], 2)
        shard_of = np.searchsorted(uneven.bounds, epochs[0], "right")
        assert len(set(shard_of[:1])) <= window and len(set(shard_of.tolist())) == 9
    flat = sum(epochs, [])
    for world in (1, 2, 3, 64):
        steps = -(-len(flat) // (2 * world))
        seen = [
            stream.item(p)[0]
            for step in range(steps)
            for rank in range(world)
            for p in step_positions(step, 0, 2, 1, rank, world)
        ]
        assert seen[: len(flat)] == flat


def test_a_window_reads_few_shards(uneven):
    stream, n = Stream(uneven, 1, window=3), len(uneven)
    shard = np.searchsorted(uneven.bounds, [stream.item(p)[0] for p in range(n)], "right") - 1
    ends = stream._window(0, 0)[4]
    windows = np.split(shard, ends[2:-1:3])
    assert [len(set(w.tolist())) <= 3 for w in windows] == [True] * 4 and sum(
        len(set(w.tolist())) for w in windows
    ) == 9
    assert (np.diff(windows[0]) != 0).mean() > 0.2 or len(windows[0]) < 10, "shuffled among the three"
    for p in range(n):  # a stand-in lies in the same window
        w = next(k for k, end in enumerate([*ends[2:-1:3], n]) if p < end)
        assert np.searchsorted(uneven.bounds, stream.item(p, 1)[0], "right") - 1 in windows[w]
    assert Stream(uneven, 1, train=False, window=3).item(7) == (7, 0)


# -----------------------------------------------------------------------------
# shards from afar


@pytest.fixture
def memory(tmp_path):
    """memory://set, and the same shards here."""
    fsspec = pytest.importorskip("fsspec")
    path, fs = make_shards(tmp_path / "set", [6, 3, 8, 1, 5]), fsspec.filesystem("memory")
    (path / "classes.json").write_text('["zero", "one", "two"]')
    fs.put(f"{path}/", "/set/", recursive=True)
    yield fs, path
    fs.rm("/set", recursive=True)


def test_remote_equals_local(memory, capsys):
    fs, path = memory
    here = Dataset(path, "all", 4)
    for url in ("memory://set", "memory://set/", "memory://set/*.tar", "memory://set/0000{0..4}.tar", f"file://{path}"):
        ds = Dataset(url, "all", 4, cache=f"cache-{seed_of(url)}")
        assert (ds.form, ds.window, ds.classes) == ("tar", 32, ["zero", "one", "two"])
        assert os.path.exists(f"{ds.root}/classes.json")
        assert ds.fingerprint == here.fingerprint and content(ds) == content(here)
        assert all(torch.equal(ds[i]["image"], here[i]["image"]) for i in range(len(ds)))
    one = Dataset("memory://set/00002.tar", "all", 4)
    assert content(one) == content(here)[9:17]
    stream, plain = Stream(ds, 3), Stream(here, 3, window=32)
    for a, b in zip(loader(stream, 0, 6, 4, workers=2), loader(plain, 0, 6, 4)):
        assert same(a, b)


def test_remote_cache_stays_within_its_bound(memory):
    fs, path = memory
    sizes = {name: os.path.getsize(path / name) for name in os.listdir(path)}
    bound = 2 * max(sizes.values()) + 100
    ds = Dataset("memory://set", "all", 4, cache_gb=bound / 1e9)
    kept = lambda: sum(f.stat().st_size for f in Path(ds.root).glob("*.tar"))  # noqa: E731
    assert 0 < kept() <= bound < sum(sizes.values())
    handle = ds._open("00000.tar")
    for i in list(range(len(ds))) * 2:
        ds[i]
        assert kept() <= bound
    assert not os.path.exists(ds.remote.local("00000.tar")) or kept() <= bound
    os.utime(ds.remote.local(ds.files[-1]), (1, 1))
    ds[0], ds[8]
    assert not os.path.exists(ds.remote.local(ds.files[-1])), "the longest unused goes first"
    assert handle.read() == (path / "00000.tar").read_bytes(), "who has it open keeps it"


def test_remote_shards_of_the_next_window_are_fetched_ahead(memory):
    ds = Dataset("memory://set", "all", 4)
    for name in ds.files:
        os.remove(ds.remote.local(name))
    stream = Stream(ds, 0, window=2)
    stream[0]
    first, _, _, order, _ = stream._window(0, 0)
    wanted = [ds.remote.local(ds.files[s]) for s in order[2:4]]
    deadline = time.time() + 10
    while not all(map(os.path.exists, wanted)) and time.time() < deadline:
        time.sleep(0.02)
    assert all(map(os.path.exists, wanted)) and not os.path.exists(ds.remote.local(ds.files[order[4]]))


def test_remote_faults(memory, monkeypatch, capsys):
    fs, path = memory
    ds, real, faults = Dataset("memory://set", "all", 4), type(fs).get_file, []
    monkeypatch.setattr(time, "sleep", lambda s: None)

    def get_file(self, remote, local, **options):
        real(self, remote, local, **options)
        if faults:
            kind = faults.pop()
            if kind == "cut":
                os.truncate(local, 100)
            else:
                raise kind

    monkeypatch.setattr(type(fs), "get_file", get_file)
    os.remove(ds.remote.local("00000.tar"))
    faults += ["cut", ConnectionResetError("peer"), RuntimeError("503 slow down")]
    assert ds.meta(0)["text"] == ["no 0"] and not faults
    assert "fetching 00000.tar of memory://set again (RuntimeError('503 slow down'))" in capsys.readouterr().out
    os.remove(ds.remote.local("00000.tar"))
    faults += ["cut"] * 8
    with pytest.raises(
        BadImage, match="00000/0000: .*00000.tar of memory://set could not be fetched four times .*100 byt"
    ):
        ds.pixels(0)
    assert not list(Path(ds.root).glob("*.tmp"))
    for url, message in (
        ("memory://nothing", "holds no images: looked for .*from afar"),
        ("memory://set/9.tar", "9.tar"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            Dataset(url)
    with pytest.raises(ValueError, match="cache_gb=1e-06 of memory://set is less than one of its files, of .*e-05 GB"):
        Dataset("memory://set", cache_gb=1e-6)
    Path("taken").write_text("a file")
    with pytest.raises(OSError, match="cannot be kept in taken/shards-.* set another cache_dir"):
        Dataset("memory://set", cache="taken")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match="reading s3://bucket/x needs fsspec: pip install fsspec"):
        Dataset("s3://bucket/x")


def test_an_index_beside_a_remote_shard_is_taken(memory, monkeypatch, capsys):
    fs, path = memory
    here = Dataset(path, "all", 4)
    assert here.write_sidecars() == 5
    for name in here.files:
        fs.put_file(f"{path}/{name}.index.npz", f"/set/{name}.index.npz")
    for number, url in enumerate(("memory://set", "memory://set/*.tar")):
        ds = Dataset(url, "all", 4, cache=f"other{number}")
        assert not list(Path(ds.root).glob("*.tar")), "nothing had to be fetched"
        assert ds.fingerprint == here.fingerprint and content(ds) == content(here)
    fs.pipe_file("/set/00001.tar.index.npz", b"PK not an index")
    ds = Dataset("memory://set", "all", 4, cache="third")
    assert [p.name for p in Path(ds.root).glob("*.tar")] == [os.path.basename(ds.remote.local("00001.tar"))]
    assert "00001.tar.index.npz is not the index of 00001.tar" in capsys.readouterr().out
    assert content(ds) == content(here)


def test_over_http(memory):
    pytest.importorskip("aiohttp")
    _, path = memory

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(path))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/0000{{0..4}}.tar"
            ds = Dataset(url, "all", 4)
            assert content(ds) == content(Dataset(path, "all", 4)) and ds.classes == ["zero", "one", "two"]
            for name in ds.files:
                os.remove(ds.remote.local(name))
            batches = list(loader(Stream(ds, 0), 0, 5, 4, workers=2))  # each worker fetches by itself
            assert len({i for batch in batches for i in batch["index"].tolist()}) == 20
        finally:
            server.shutdown()


# -----------------------------------------------------------------------------
# workers that die or hang, files that do not read


class Faulty(torch.utils.data.Dataset):
    """A stream that calls fault(p) before item p."""

    def __init__(self, stream, fault):
        self.stream, self.fault = stream, fault

    def __getitem__(self, p):
        self.fault(p)
        return self.stream[p]


def once(path):
    """True the first time, in whatever process."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def test_killed_workers_change_nothing(uneven, tmp_path, capsys):
    stream = Stream(uneven, 3, crop="random", flip=True)

    def fault(p):
        if p in (10, 14, 26, 27, 79) and once(tmp_path / f"died-{p}"):
            os.kill(os.getpid(), signal.SIGKILL)

    options = dict(start_step=1, max_steps=11, batch_size=2, grad_accum=2, rank=1, world=2)
    plain, before = list(loader(stream, **options)), signal.getsignal(signal.SIGCHLD)
    faulty = list(loader(Faulty(stream, fault), workers=2, **options))
    assert len(plain) == len(faulty) == 20 and all(same(a, b) for a, b in zip(plain, faulty))
    said = capsys.readouterr().out
    assert (
        "of rank 1 was killed by SIGKILL (out of memory?), with positions" in said and "workers again, 1 of 3" in said
    )
    assert signal.getsignal(signal.SIGCHLD) is before
    assert {path.name for path in tmp_path.glob("died-*")} == {f"died-{p}" for p in (10, 14, 26, 27, 79)}


def test_workers_killed_from_outside_while_they_read(uneven):
    stream = Stream(uneven, 3)
    plain = list(loader(stream, 0, 30, 2))
    before = set(torch.multiprocessing.active_children())
    batches, got = loader(Faulty(stream, lambda p: time.sleep(0.01)), 0, 30, 2, workers=2), []
    for n in range(30):
        if n in (3, 17):
            for worker in set(torch.multiprocessing.active_children()) - before:
                os.kill(worker.pid, signal.SIGKILL)
        got.append(next(batches))
    assert next(batches, None) is None and all(same(a, b) for a, b in zip(plain, got))


def test_a_dead_worker_interrupts_nothing_after_a_plain_loader(uneven):
    """torch's handler of SIGCHLD, which such a one installs for good, raises wherever the process is just then."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        list(torch.utils.data.DataLoader(uneven, batch_size=None, num_workers=1, collate_fn=str))
        batches = loader(Stream(uneven, 3), 0, 10, 2, workers=2)
        got = [next(batches)]
        for worker in torch.multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass
        got += batches
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert all(same(a, b) for a, b in zip(loader(Stream(uneven, 3), 0, 10, 2), got)) and len(got) == 10


def test_fetching_from_afar_is_no_hang(memory, monkeypatch, capsys):
    """A shard that takes longer than the timeout but grows is waited for; one that does not is a hang."""
    fs, _ = memory
    ds, real = Dataset("memory://set", "all", 4), type(fs).get_file
    for name in ds.files:
        os.remove(ds.remote.local(name))

    def get_file(self, remote, local, **options):
        for _ in range(3):
            with open(local, "ab") as f:
                f.write(b"part")
            time.sleep(0.5)
        real(self, remote, local, **options)

    with monkeypatch.context() as slow:
        slow.setattr(type(fs), "get_file", get_file)
        (got,) = loader(Stream(ds, 3), 0, 1, 2, workers=1, timeout=1)
    said = capsys.readouterr().out
    assert "rank 0 has waited 1 s for shards that are being fetched" in said and "starting workers" not in said
    assert same(got, *loader(Stream(ds, 3), 0, 1, 2))
    ds = Dataset("memory://set", "all", 4, cache="other")
    assert not ds.remote.is_fetching(1)
    Path(ds.root, "left.tmp").write_bytes(b"")
    assert ds.remote.is_fetching(1)
    os.utime(Path(ds.root, "left.tmp"), (1, time.time() - 2))
    assert not ds.remote.is_fetching(1)


def test_a_worker_that_hangs_is_shown_and_replaced(uneven, tmp_path, capfd):
    stream = Stream(uneven, 3)

    def hang_here(p):
        if p == 13 and once(tmp_path / "hung"):
            time.sleep(1000)

    got = list(loader(Faulty(stream, hang_here), 0, 10, 2, workers=2, timeout=1))
    assert all(same(a, b) for a, b in zip(loader(stream, 0, 10, 2), got)) and len(got) == 10
    out, err = capfd.readouterr()
    assert "worker 0 (pid" in out and "gave no batch for 1 s, with positions 12..13" in out
    assert "in hang_here" in err, "its stack"


def test_a_worker_that_always_dies_ends_the_run(uneven, capsys):
    def fault(p):
        if p == 5:
            os._exit(3)

    batches = loader(Faulty(Stream(uneven, 3), fault), 0, 10, 2, workers=2, restarts=2)
    got = [next(batches), next(batches)]
    with pytest.raises(
        RuntimeError, match=r"worker . \(pid \d+\) of rank 0 ended with status 3, with positions 4..5.*3 times"
    ):
        got.append(next(batches))
    assert len(got) == 2 and not [w for w in torch.multiprocessing.active_children() if w.name.startswith("Process")]


def test_a_long_temporary_folder_is_refused(uneven, monkeypatch):
    """A worker could not send its first batch: "AF_UNIX path too long", and the trainer would wait for it."""
    stream = Stream(uneven, 0)
    monkeypatch.setattr("tempfile.tempdir", f"/tmp/{'x' * 66}")
    with pytest.raises(
        ValueError, match="TMPDIR=/tmp/x+ is too long .*: set one of at most 70 characters, or workers=0"
    ):
        next(loader(stream, 0, 2, 2, workers=1))
    next(loader(stream, 0, 2, 2, workers=0))


def test_an_error_in_a_worker_is_told_as_it_is(uneven):
    def fault(p):
        raise RuntimeError("DataLoaders are fine, this is not")

    with pytest.raises(RuntimeError, match="this is not"):
        list(loader(Faulty(Stream(uneven, 3), fault), 0, 10, 2, workers=2))


def test_a_shard_cut_short_after_it_was_indexed(uneven, tmp_path):
    path = tmp_path / "uneven/00005.tar"
    whole = [Stream(uneven, 0)[p] for p in range(len(uneven))]
    where = uneven.place(int(uneven.bounds[5]) + 10)[2]
    os.truncate(path, where[1] + 20)
    again = [Stream(uneven, 0)[p] for p in range(len(uneven))]
    lost = {f"00005/{i:04d}" for i in range(10, 30)}
    for a, b in zip(whole, again):
        assert bool(b["bad"]) == (a["key"] in lost) and b["key"] not in lost
        assert b["bad"] or same(a, b)
    message = next(b["bad"][0] for b in again if b["bad"] and b["bad"][0].startswith("00005/0020: "))
    assert "00005.tar ends after" in message and "the index says" in message


def test_a_read_that_fails_for_a_moment(uneven, monkeypatch):
    real, faults, waited = uneven._open, [], []
    monkeypatch.setattr(time, "sleep", waited.append)

    def opened(name):
        if faults:
            raise OSError(faults.pop(), "what the disk says", name)
        return real(name)

    uneven._open = opened
    good = uneven[3]
    faults += [errno.EIO, errno.EMFILE]
    assert same(uneven[3], good) and not faults and waited == [0.1, 1]
    faults += [errno.EIO] * 3
    with pytest.raises(BadImage, match="00001/0002: .*Errno 5.*what the disk says: '00001.tar'"):
        uneven.rgb(3)
    faults[:] = [errno.EACCES]
    with pytest.raises(BadImage, match="Errno 13"):
        uneven.rgb(3)


# -----------------------------------------------------------------------------
# less to read, and the command


def test_a_size_is_read_from_the_header(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 60000
    contents = {"a.jpg": encoded(noise, "JPEG"), "b.png": encoded(noise), "c.jpg": encoded(noise, "JPEG", exif=exif)}
    contents["d.jpg"] = contents["a.jpg"][:100]
    icc = encoded(noise, "JPEG", icc_profile=bytes(200_000), exif=exif)
    for name, data in (contents | {"e.jpg": icc}).items():
        (tmp_path / name).write_bytes(data)
    ds, asked, real = Dataset(tmp_path, "all"), [], Dataset._read
    monkeypatch.setattr(Dataset, "_read", lambda self, *where: asked.append(where[3]) or real(self, *where))
    keys = [ds.key(i) for i in range(5)]
    assert ds.size(keys.index("a.jpg")) == (600, 400) and asked == [2**16]
    assert ds.size(keys.index("c.jpg")) == ds.size(keys.index("e.jpg")) == (400, 600)
    assert asked[1:] == [2**16, 2**16, len(icc)], "its head is longer: all was read"
    assert ds.size(keys.index("b.png")) == (600, 400)
    with pytest.raises(BadImage, match="d.jpg: "):
        ds.size(keys.index("d.jpg"))


def test_the_command_tells_what_there_is(tmp_path):
    make_shards(tmp_path / "set", [5, 6])
    command = [
        sys.executable,
        "-m",
        "data.dataset",
        str(tmp_path / "set"),
        "--image_size=4",
        "--seconds=0.2",
        "--sidecars",
    ]
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert "set: tar, 11 images in 2 shards, 3 classes; opened in" in said.stdout, said.stdout + said.stderr
    assert "2 indexes written" in said.stdout and "images/s per core at 4 px" in said.stdout
    assert json.loads(str(np.load(tmp_path / "set/00001.tar.index.npz")["about"]))["n"] == 6
