"""data/prepare.py, and every data set's prepare.py, on tiny data in each one's published layout."""

import base64
import functools
import gzip
import hashlib
import http.server
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from checkpoint import UserError
from configurator import Config, contract, find_settings
from data import prepare as room
from data.bapps import prepare as bapps
from data.dataset import Dataset
from data.mnist import prepare as mnist
from data.shapes import prepare as shapes
from text import SPLIT_PATTERN

ROOT = Path(__file__).resolve().parent.parent
COMMON = dict(size=32, crop="none", quality=95, min_side=8, vocab_size=0, shard_mb=256.0, workers=0)


def smooth(seed, width=48, height=40):
    """A smooth image, of a colour that depends on the seed."""
    y, x = np.mgrid[0:height, 0:width]
    colour = np.array([37 * seed % 200, 83 * seed % 200, 151 * seed % 200])
    pixels = colour + 25 * (1 + np.sin((x / 9 + seed)[..., None]) * np.cos(y / 7)[..., None])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(seed, form="JPEG", width=48, height=40, **options):
    file = io.BytesIO()
    smooth(seed, width, height).save(file, form, **options)
    return file.getvalue()


def load(data):
    return Image.open(io.BytesIO(data))


def prepare(name, out, **changed):
    """meta.json of what data/NAME/prepare.py makes with these settings."""
    module = importlib.import_module(f"data.{name}.prepare")
    cfg = {key: setting.default for key, setting in find_settings(vars(module)).items()}
    changed = dict({"workers": 0} if "workers" in cfg else {}, out_dir=str(out)) | changed
    assert changed.keys() <= cfg.keys()
    module.prepare(Config(cfg | changed))
    return json.loads((out / "meta.json").read_text()) if (out / "meta.json").exists() else None


def pack(items, out, classes=(), **changed):
    return room.pack(iter(items), Config(COMMON | dict(out_dir=str(out)) | changed), classes)


def records(out):
    """{own key: (split, record, image bytes)} of all shards, in their order."""
    found = {}
    for path in sorted(Path(out).glob("*.tar")):
        for _, image, record in room.read_shard(str(path)):
            found[record["key"]] = (path.name.split("-")[0], record, image.read())
    return found


def files_in(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.is_file()}


def colour(image):
    return image.mean((1, 2)) if torch.is_tensor(image) else np.asarray(image, np.float64).mean((0, 1)) / 127.5 - 1


def says(text, call, *args, **kwargs):
    """A UserError of one line that matches text."""
    with pytest.raises(UserError, match=text) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the index cache, and the paths of defaults


@pytest.fixture
def items():
    return [dict(key=f"k{i}", image=encoded(i), label=i % 3, text=[f"number {i}", "an image"]) for i in range(220)]


# --- data/prepare.py ---


def test_shards_hold_the_items_and_the_key_decides_the_split(items, tmp_path):
    meta = pack(items, tmp_path / "out")
    held = {item["key"] for item in items if zlib.crc32(item["key"].encode()) % 100 == 0}
    assert held and meta["splits"] == {"train": 220 - len(held), "val": len(held)} and meta["count"] == 220
    for split in ("train", "val"):
        ds = Dataset(tmp_path / "out", split, 32)
        assert len(ds) == meta["splits"][split]
        for i in range(0, len(ds), 40):
            at = int(ds.key(i).split("/")[1])  # the key in the shard is the position of the item
            sample = ds[i]
            assert (items[at]["key"] in held) == (split == "val")
            assert sample["label"] == items[at]["label"] and sample["text"] == items[at]["text"]
            assert np.allclose(colour(sample["image"]), colour(smooth(at)), atol=0.05)


def test_resize_is_lanczos_on_the_short_side(tmp_path):
    item = dict(key="a", image=encoded(3, "PNG", 90, 60))
    for crop, box, side in (("none", (0, 0, 90, 60), (48, 32)), ("center", (15, 0, 75, 60), (32, 32))):
        pack([item], tmp_path / crop, quality=0, crop=crop)
        _, record, data = records(tmp_path / crop)["a"]
        expected = smooth(3, 90, 60).crop(box).resize(side, Image.Resampling.LANCZOS)
        assert load(data).format == "PNG" and (record["width"], record["height"]) == (90, 60)
        assert np.abs(np.asarray(load(data), int) - np.asarray(expected, int)).max() <= 1


def test_a_small_jpeg_is_kept_and_boxes_move_with_the_pixels(tmp_path):
    small, exif, grey = encoded(1, width=30, height=20), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    turned = encoded(2, width=64, height=128, exif=exif)  # upright it is 128 x 64
    pixels = dict(bbox=[[64, 32, 32, 16]], categories=["cat"])
    shares = dict(bbox=[[0.5, 0.5, 0.25, 0.25]], categories=["cat"], unit="image")
    Image.new("L", (20, 20), 77).save(grey, "PNG")
    four = [dict(key="a", image=small), dict(key="b", image=turned, objects=pixels)]
    four += [
        dict(key="c", image=encoded(4, width=128, height=64), objects=shares),
        dict(key="d", image=grey.getvalue()),
    ]
    pack(four, tmp_path / "out")
    found = records(tmp_path / "out")
    assert found["a"][2] == small and load(found["b"][2]).size == (64, 32) and load(found["d"][2]).mode == "RGB"
    for key in "bc":
        assert found[key][1]["objects"] == dict(bbox=[[32, 16, 16, 8]], categories=["cat"])
    pack(four[1:2], tmp_path / "square", crop="center")  # 128 x 64 -> its middle 64 x 64 -> 32 x 32
    assert records(tmp_path / "square")["b"][1]["objects"]["bbox"] == [[16, 16, 16, 8]]
    assert Dataset(tmp_path / "square", "all", 32).boxes(0) == [("cat", 0.5, 0.5, 1.0, 0.75)]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_rotated_image_keeps_its_shape(form, tmp_path):
    """Pillow gives the size of a TIFF upright, of the others as stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    boxes = dict(bbox=[[0, 40, 20, 40]], categories=["cat"])
    item = dict(key="a", image=encoded(7, form, 80, 40, exif=exif), objects=boxes)
    pack([item], tmp_path / "out", size=20)
    _, record, data = records(tmp_path / "out")["a"]
    assert load(data).size == (20, 40) and (record["width"], record["height"]) == (40, 80)
    assert record["objects"]["bbox"] == [[0, 20, 10, 20]]


def bomb(width=30000, height=30000):
    """A PNG of 100 bytes with a huge size in its header."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def fails():
    raise OSError("the disk is gone")


def test_broken_tiny_huge_and_duplicate_images_are_dropped_and_listed(items, tmp_path, capsys):
    bad = {
        "cut": (encoded(50, width=300, height=300)[:2000], "broken: image file is truncated"),
        "text": (b"hello", "broken: not an image"),
        "empty": (b"", "broken: 0 bytes"),
        "missing": (str(tmp_path / "nowhere.jpg"), "broken: .*No such file"),
        "unread": (fails, "broken: the disk is gone"),
        "tiny": (encoded(51, width=7, height=90), "tiny: 7 x 90, less than min_side=8"),
        "bomb": (bomb(), "huge"),
        "large": (bomb(10000, 9500), "huge: 10000 x 9500"),
        "twin": (items[4]["image"], "duplicate"),
    }
    mixed = items[:20] + [dict(key=key, image=image, split="train") for key, (image, _) in bad.items()]
    meta = pack(mixed, tmp_path / "out")
    assert meta["count"] == 20 and meta["dropped"] == dict(broken=5, tiny=1, huge=2, duplicate=1)
    assert "20 train images in 1 shards; dropped: 5 broken, 2 huge, 1 tiny, 1 duplicate" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == list(bad)
    for line in lines:
        assert re.match(bad[line["key"]][1], line["reason"]), line
    assert not records(tmp_path / "out").keys() & bad.keys()
    assert pack(mixed, tmp_path / "kept", drop_duplicates=False)["count"] == 21
    says(r"no images left \(dropped: 2 broken", pack, [dict(key=str(i), image=b"no") for i in range(2)], tmp_path / "a")
    says("no images left", pack, [], tmp_path / "b")


def die(image, record, **how):
    os._exit(9)


def test_workers_do_not_change_a_byte(items, tmp_path, monkeypatch):
    mixed = [*items, dict(key="bad", image=b"bad"), dict(key="twin", image=items[7]["image"])]
    mixed[3]["image"] = functools.partial(bytes, mixed[3]["image"])
    mixed[4]["image"] = lambda: encoded(4)  # only the main process calls it
    for workers in (0, 2):
        pack(mixed, tmp_path / str(workers), shard_mb=0.05, vocab_size=300, workers=workers)
    assert files_in(tmp_path / "0") == files_in(tmp_path / "2")
    assert len(list((tmp_path / "0").glob("train-*.tar"))) > 3
    monkeypatch.setattr(room, "convert", die)
    says("a worker process died.*run again to continue", pack, items, tmp_path / "dead", workers=1)


class Stop(Exception):
    pass


def test_stopped_at_any_write_it_continues_to_the_same_bytes(items, tmp_path, monkeypatch):
    mixed = [*items[:60], dict(key="twin", image=items[7]["image"]), *items[60:100], dict(key="bad", image=b"bad")]
    pack(mixed, tmp_path / "once", shard_mb=0.05, vocab_size=300)
    once, out = files_in(tmp_path / "once"), tmp_path / "out"
    replace, convert, converted = os.replace, room.convert, Counter()

    def counted(*args, **how):
        converted[len(converted)] = 1
        return convert(*args, **how)

    monkeypatch.setattr(room, "convert", counted)
    for attempt in range(1, 100):
        count = iter(range(1, 10**6))

        def stopping(a, b, attempt=attempt, count=count):
            now = next(count) == 1 + attempt % 5
            if now and attempt % 2:
                raise Stop
            replace(a, b)
            if now:
                raise Stop

        monkeypatch.setattr(os, "replace", stopping)
        try:
            pack(mixed, out, shard_mb=0.05, vocab_size=300)
            break
        except Stop:
            continue
    found = files_in(out)
    assert attempt > 3
    for files in (found, once):  # its lines may come in another order
        files["dropped.jsonl"] = sorted(files["dropped.jsonl"].splitlines())
    assert found == once
    converted.clear()
    monkeypatch.setattr(os, "replace", replace)
    pack(iter(()), out, shard_mb=0.05, vocab_size=300)  # nothing is asked of the source
    assert not converted


def test_killed_its_workers_end_and_it_continues_to_the_same_bytes(items, tmp_path):
    def slowly():
        for item in items:
            time.sleep(0.002)
            yield item

    options = dict(shard_mb=0.05, vocab_size=300)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: pack(slowly(), tmp_path / "out", workers=2, **options)
    )
    process.start()
    until = time.time() + 60
    while len(list(tmp_path.glob("out/train-*.tar"))) < 2 and time.time() < until:
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while any(Path(f"/proc/{child}/cwd").exists() for child in children):  # a dead one has none
        assert time.time() < until, "workers live on"
        time.sleep(0.02)
    assert len(children) >= 2 and "count" not in json.loads((tmp_path / "out/meta.json").read_text())
    for path in tmp_path.glob("out/*.tmp"):
        path.unlink()
    pack(items, tmp_path / "out", **options)
    pack(items, tmp_path / "once", **options)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "once")


def test_other_settings_other_sources_and_foreign_shards_are_refused(items, tmp_path, capsys):
    out = tmp_path / "out"
    pack(items[:30], out)
    pack(iter(()), out, workers=3)  # workers change no shard
    assert "up to date" in capsys.readouterr().out
    says("out: was made with size=32, not 64; delete .* or set another out_dir", pack, items, out, size=64)
    (out / "train-00000.tar").unlink()
    pack(items[:30], out)  # a lost shard is made again
    assert (out / "train-00000.tar").exists()
    (out / "meta.json").unlink()
    says("was not made by this command", pack, items[:30], out)

    def broken_off():
        yield from items
        raise Stop

    out = tmp_path / "begun"
    with pytest.raises(Stop):
        pack(broken_off(), out, shard_mb=0.05)
    says("the source is not the one .*item .* is ", pack, items[1:], out, shard_mb=0.05)
    says("the source is not the one .*fewer items", pack, items[:5], out, shard_mb=0.05)


def test_seen_is_a_set():
    rng = np.random.default_rng(0)
    values = [rng.bytes(8) for _ in range(3000)]
    seen, true = room.Seen(), set()
    for k, value in enumerate(v for pair in zip(values, values[::-1]) for v in pair):
        assert seen.add(value) == (value not in true)
        true.add(value)
        if k % 700 == 0:
            seen.sorted = np.union1d(seen.sorted, np.array(list(seen.recent), np.uint64))
            seen.recent = set()


def ranks_of(table):
    return {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in table.splitlines()}


def test_a_tokenizer_is_trained_on_the_captions(tmp_path):
    from text import make_tokenizer

    texts = ["a cat on a mat", "кот на коврике", "猫がマットの上にいる", "12 34", "a cat"]
    items = [dict(key=str(i), image=encoded(i), split="train", text=texts[: i + 1]) for i in range(5)]
    pack(items, tmp_path / "out", vocab_size=280)
    table = (tmp_path / "out/bpe.tiktoken").read_text()
    assert table == room.train_bpe([text for item in items for text in item["text"]], 280)
    assert list(ranks_of(table))[:256] == [bytes([b]) for b in range(256)] and len(ranks_of(table)) == 280
    tokenizer = make_tokenizer(str(tmp_path / "out/bpe.tiktoken"))
    assert len(tokenizer.encode("a cat on a mat")) < 14 and tokenizer.decode(tokenizer.encode("猫")) == "猫"
    assert Dataset(tmp_path / "out", "all", 32)[4]["text"] == texts


def test_training_splits_text_as_tiktoken_will():
    """Trained on one text only, each piece of the trainer's split is a token, and tiktoken finds the same pieces."""
    tiktoken = pytest.importorskip("tiktoken")
    text = "It's  42 over-long words, isn't it?  \n yes"
    ranks = ranks_of(room.train_bpe([text] * 50, 512))
    assert list(ranks.values()) == list(range(len(ranks)))
    trained = tiktoken.Encoding("t", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    pieces = ["It", "'s", " ", " 42", " over", "-", "long", " words", ",", " isn", "'t", " it", "?", "  \n", " yes"]
    assert [trained.decode([token]) for token in trained.encode(text)] == pieces


# --- downloads, archives ---


@pytest.fixture
def server():
    """An HTTP server: server.files by path; it hangs up after server.cut bytes of a reply, server.cuts times."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.headers.get("Range"))
            data = server.files.get(self.path)
            if data is None:
                return self.send_error(404)
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if server.ranges else 0
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            end = len(data)
            if server.cuts:
                server.cuts, end = server.cuts - 1, start + server.cut
            self.wfile.write(data[start:end])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.ranges, server.cuts, server.cut = {}, [], True, 0, 1000
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_downloads_continue_and_are_checked(server, tmp_path):
    data = np.random.default_rng(0).bytes(5000)
    server.files["/a"], server.cuts = data, 2
    md5, url, path = hashlib.md5(data).hexdigest(), f"{server.url}/a", tmp_path / "raw/a"
    for end in (1000, 2000):
        says(f"after {end} of 5000 bytes; run again to continue", room.fetch, url, str(path), md5)
    room.fetch(url, str(path), md5)
    assert path.read_bytes() == data and server.asked == [None, "bytes=1000-", "bytes=2000-"]
    room.fetch(url, str(path), md5)
    assert len(server.asked) == 3  # it is there
    path.write_bytes(b"other")
    room.fetch(url, str(path), md5)
    assert path.read_bytes() == data
    (tmp_path / "b.part").write_bytes(data)  # killed between the last byte and the rename
    room.fetch(url, str(tmp_path / "b"), md5)
    (tmp_path / "c.part").write_bytes(data[:10])
    server.ranges = False  # such a server starts over
    room.fetch(url, str(tmp_path / "c"), md5)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes() == data
    says("not the published one", room.fetch, url, str(tmp_path / "d"), "0" * 32)
    assert not list(tmp_path.glob("d*"))
    says("404", room.fetch, f"{server.url}/nothing", str(tmp_path / "e"))


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_hostile_archives_write_nothing_outside_and_are_refused(tmp_path, monkeypatch):
    inside = tmp_path / "in"
    inside.mkdir()
    with zipfile.ZipFile(inside / "a.zip", "w") as archive:
        archive.writestr("../../evil.png", encoded(1, "PNG"))
        archive.writestr("bomb.png", bytes(10**6))
    with tarfile.open(inside / "a.tar", "w") as tar:
        add(tar, "../../evil.png", encoded(1, "PNG"))
    for path in ("a.zip", "a.tar"):
        found = dict(room.list_images(str(inside / path)))
        image = found["../../evil.png"]
        assert room.read_bytes(image() if callable(image) else image) == encoded(1, "PNG")
    monkeypatch.setattr(room, "MAX_BYTES", 10**5)
    says("bomb.png: unpacks to 1000000 bytes", dict(room.list_images(str(inside / "a.zip")))["bomb.png"])
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"a.zip", "a.tar"}
    says("not a folder, .zip or .tar", room.list_images, __file__)


DAMAGED = dict(cifar10="cifar-10-binary.tar.gz", celeba="img_align_celeba.zip", imagenet="ILSVRC2012_img_train.tar")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_archive_is_one_line(name, tmp_path):
    (tmp_path / DAMAGED[name]).write_bytes(b"\x1f\x8b\x08" + bytes(range(200)))
    source = tmp_path / DAMAGED[name] if name == "cifar10" else tmp_path
    says("is damaged", prepare, name, tmp_path / "out", source=str(source))


# --- every data set ---

SETS = "cifar10 imagenet celeba celebahq ffhq lsun wikiart art500k openimages laion400m conceptual_captions folder"


@pytest.mark.parametrize("name", SETS.split())
def test_wrong_sources_are_one_line_and_settings_are_checked(name, tmp_path):
    module = importlib.import_module(f"data.{name}.prepare")
    settings = find_settings(vars(module))
    setting = "fetched" if "urls" in settings else "source"
    (tmp_path / "empty").mkdir()
    for value in ("", str(tmp_path / "nowhere"), str(tmp_path / "empty")):
        says("set --|no images|no parquet|unpack|see the top", prepare, name, tmp_path / "out", **{setting: value})
    for word in ("Licence", "Size", "Time", "On disk"):
        assert word.lower() in module.__doc__.lower(), word
    for key in ("size", "crop", "quality", "min_side", "vocab_size", "shard_mb", "workers", "fraction"):
        if key in settings:
            _, check = contract(settings[key].comment)
            wrong = dict(crop="middle", quality=101, vocab_size=100, fraction=0.0, shard_mb=0.0, size=0).get(key, -1)
            assert check(settings[key].default) and not check(wrong), key


def write_parquet(path, rows, names=None, group=7):
    """rows: dicts; names: {column: class names}, where the hub keeps them."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.Table.from_pylist(rows)
    features = {column: {"names": list(of), "_type": "ClassLabel"} for column, of in (names or {}).items()}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def image_cell(seed, **options):
    return {"bytes": encoded(seed, **options), "path": f"{seed}.jpg"}


def write_files(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def test_folder_of_classes(tmp_path):
    source = tmp_path / "photos"
    write_files(source, {f"{('dogs', 'cats')[i % 2]}/{i}.jpg": encoded(i) for i in range(120)})
    meta = prepare("folder", tmp_path / "out", source=str(source), size=32)
    for split in ("train", "val"):
        raw, made = Dataset(source, split, 32), Dataset(tmp_path / "out", split, 32)
        assert len(raw) == len(made) == meta["splits"][split] and raw.classes == made.classes == ["cats", "dogs"]
        for i in range(0, len(raw), 50):
            assert raw[i]["label"] == made[i]["label"]
            assert (raw[i]["image"] - made[i]["image"]).abs().mean() < 0.02
    assert not (tmp_path / "out/bpe.tiktoken").exists()
    says("is inside the source", prepare, "folder", source / "out", source=str(source))
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy/images.npy", np.zeros((4, 8, 8, 3), np.uint8))
    says("train on it as it is", prepare, "folder", tmp_path / "no", source=str(tmp_path / "npy"))


@pytest.mark.parametrize("form", ["metadata", "tar", "parquet"])
def test_folder_of_captions_and_objects(form, tmp_path):
    source = tmp_path / "photos"
    texts = [[f"image {i}", "another caption"] for i in range(30)]
    objects = [dict(bbox=[[4 + i % 3, 6, 20, 20]], categories=["thing"]) for i in range(30)]
    lines = [json.dumps(dict(text=texts[i], objects=objects[i])) for i in range(30)]
    if form == "metadata":
        write_files(source, {f"{i:02d}.jpg": encoded(i) for i in range(30)})
        lines = [json.dumps(dict(json.loads(line), file_name=f"{i:02d}.jpg")) for i, line in enumerate(lines)]
        write_files(source, {"metadata.jsonl": "\n".join(lines)})
    elif form == "tar":
        source.mkdir()
        with tarfile.open(source / "a.tar", "w") as tar:
            for i in range(30):
                add(tar, f"{i:02d}.jpg", encoded(i))
                add(tar, f"{i:02d}.json", lines[i].encode())
            add(tar, "bad.jpg", encoded(40))
            add(tar, "bad.json", b'{"text": ["half')
    else:
        write_parquet(
            source / "a.parquet", [dict(image=image_cell(i), text=texts[i], objects=objects[i]) for i in range(30)]
        )
    out = tmp_path / "out"
    meta = prepare("folder", out, source=str(source), size=20, vocab_size=300, shard_mb=0.02)
    assert meta["count"] == 30 and meta["dropped"] == (dict(broken=1) if form == "tar" else {})
    found = {record["text"][0]: record for _, record, _ in records(out).values()}
    raw = Dataset(source, "all", 20)
    for i in range(30):
        label, text = raw.meta(i)["label"], texts[i]
        record = found[text[0]]
        assert record["text"] == text and label == -1 and "label" not in record
        assert record["objects"]["categories"] == ["thing"]
        assert record["objects"]["bbox"] == [[(4 + i % 3) / 2, 3, 10, 10]]
    for split in ("train", "val"):
        assert len(Dataset(out, split, 20)) == meta["splits"][split]
    assert (out / "bpe.tiktoken").exists()


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("train", "test"), ("train", "validation")])
def test_folder_keeps_every_split_and_leaves_maps_out(splits, tmp_path, capsys):
    for k, split in enumerate(splits):
        write_files(tmp_path / "src" / split, {f"{i}.jpg": encoded(3 * k + i) for i in range(3)})
        Image.new("L", (48, 40), 1).save(tmp_path / "src" / split / "0.map.png")
    meta = prepare("folder", tmp_path / "out", source=str(tmp_path / "src"), size=32)
    assert meta["splits"] == dict.fromkeys(["train", "val", "test"][: len(splits)], 3)
    assert "the semantic maps are left out" in capsys.readouterr().out


def test_cifar10(tmp_path):
    rng = np.random.default_rng(0)
    batches = {f"data_batch_{k}": rng.integers(0, 256, (6, 3073), np.uint8) for k in range(1, 6)}
    batches["test_batch"] = rng.integers(0, 256, (4, 3073), np.uint8)
    for batch in batches.values():
        batch[:, 0] %= 10
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        add(tar, "cifar-10-batches-bin/batches.meta.txt", b"airplane\n")
        for name, batch in batches.items():
            add(tar, f"cifar-10-batches-bin/{name}.bin", batch.tobytes())
    prepare("cifar10", tmp_path / "out", source=str(tmp_path / "cifar-10-binary.tar.gz"))
    train, val = (Dataset(tmp_path / "out", split, 32) for split in ("train", "val"))
    assert len(train) == 30 and len(val) == 4 and train.classes[3] == "cat"
    row = batches["data_batch_2"][1]
    assert train[7]["label"] == row[0]
    assert np.array_equal(np.asarray(train.rgb(7)), row[1:].reshape(3, 32, 32).transpose(1, 2, 0))
    with tarfile.open(tmp_path / "short.tar.gz", "w:gz") as tar:
        add(tar, "cifar-10-batches-bin/data_batch_1.bin", b"x" * 4000)
    says("data_batch_1.bin has 4000 bytes", prepare, "cifar10", tmp_path / "bad", source=str(tmp_path / "short.tar.gz"))
    for part in ("train", "test"):
        rows = [dict(img=image_cell(i, form="PNG", width=32, height=32), label=i % 10) for i in range(12)]
        write_parquet(tmp_path / "hub" / f"{part}-00000-of-00001.parquet", rows)
    meta = prepare("cifar10", tmp_path / "parquet", source=str(tmp_path / "hub"))
    assert meta["splits"] == {"train": 12, "val": 12}
    split, record, data = records(tmp_path / "parquet")["test-00000-of-00001/00011"]
    assert split == "val" and record["label"] == 1 and np.array_equal(load(data), smooth(11, 32, 32))


SYNSETS = {"n01440764": "tench, Tinca tinca", "n02102040": "English springer", "n03000684": "chain saw, chainsaw"}


@pytest.fixture
def imagenet(tmp_path):
    """The three tar files, with 3 classes of 5 photos and 6 validation photos."""
    source = tmp_path / "ilsvrc"
    source.mkdir()
    numbers = {"n02102040": 1, "n01440764": 2, "n03000684": 3}  # ILSVRC2012_ID has another order
    with tarfile.open(source / "ILSVRC2012_img_train.tar", "w") as outer:
        for c, synset in enumerate(reversed(SYNSETS)):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for i in range(5):
                    add(inner, f"{synset}_{i}.JPEG", encoded(10 * (2 - c) + i))
            add(outer, f"{synset}.tar", file.getvalue())
    with tarfile.open(source / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in range(6):
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", encoded(100 + i))
    truth = [3, 1, 2, 2, 1, 3]

    def kaggle():
        by_number = {n: s for s, n in numbers.items()}
        rows = [f"ILSVRC2012_val_{i + 1:08d},{by_number[n]} 1 2 3 4\n" for i, n in enumerate(truth)]
        mapping = "".join(f"{s} {words}\n" for s, words in SYNSETS.items())
        solution = "ImageId,PredictionString\n" + "".join(reversed(rows))
        write_files(source, {"LOC_synset_mapping.txt": mapping, "LOC_val_solution.csv": solution})
        return str(source)

    def devkit():
        scipy_io = pytest.importorskip("scipy.io")
        types = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")]
        synsets = np.array([(n, s, SYNSETS[s], "a thing") for s, n in numbers.items()], dtype=types)
        file = io.BytesIO()
        scipy_io.savemat(file, {"synsets": synsets[:, None]})
        with tarfile.open(source / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", file.getvalue())
            lines = "".join(f"{n}\n" for n in truth).encode()
            add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines)
        return str(source)

    return dict(kaggle=kaggle, devkit=devkit)


@pytest.mark.parametrize("lists", ["kaggle", "devkit"])
def test_imagenet_tars(lists, imagenet, tmp_path):
    source = imagenet[lists]()
    prepare("imagenet", tmp_path / "out", source=source, size=32)
    train, val = (Dataset(tmp_path / "out", split, 32) for split in ("train", "val"))
    assert train.classes == list(SYNSETS.values()) and len(train) == 15 and len(val) == 6
    found = records(tmp_path / "out")
    for c, synset in enumerate(SYNSETS):
        split, record, data = found[f"{synset}/{synset}_3"]
        assert split == "train" and record["label"] == c
        assert np.allclose(colour(load(data)), colour(smooth(10 * c + 3)), atol=0.05)
    assert [found[f"val/ILSVRC2012_val_{i:08d}"][1]["label"] for i in range(1, 7)] == [2, 1, 0, 0, 1, 2]
    prepare("imagenet", tmp_path / "some", source=source, size=32, classes="chain saw,n01440764")
    some = Dataset(tmp_path / "some", "all", 32)
    assert some.classes == ["tench, Tinca tinca", "chain saw, chainsaw"] and Counter(some.labels.tolist()) == {
        0: 7,
        1: 7,
    }
    half = prepare("imagenet", tmp_path / "half", source=source, size=32, fraction=0.5)
    assert 2 < half["splits"]["train"] < 13 and half["splits"]["val"] == 6
    says("--classes has 'zebra'", prepare, "imagenet", tmp_path / "no", source=source, classes="zebra")
    says("img_train.tar: is not the published file", prepare, "imagenet", tmp_path / "no", source=source, verify=True)


def test_imagenet_parquet(tmp_path):
    names = list(SYNSETS.values())
    for part, n in (("train-00000-of-00002", 10), ("train-00001-of-00002", 8), ("validation-00000-of-00001", 5)):
        rows = [dict(image=image_cell(len(part) * n + i), label=i % 3) for i in range(n)]
        write_parquet(tmp_path / "hub/data" / f"{part}.parquet", rows, dict(label=names), group=3)
    rows = [dict(image=image_cell(i), label=-1) for i in range(3)]
    write_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", rows, dict(label=names))
    meta = prepare("imagenet", tmp_path / "out", source=str(tmp_path / "hub"), size=32, classes="1,2")
    assert meta["splits"] == {"train": 6 + 5, "val": 3} and Dataset(tmp_path / "out").classes == names[1:]
    found = records(tmp_path / "out")
    assert found["train-00001-of-00002/000007"][1]["label"] == 0 and "train-00001-of-00002/000006" not in found
    write_parquet(tmp_path / "paths.parquet", [dict(image=str(tmp_path / "a.png")), dict(image=None)])
    assert [image() for _, image, _ in room.parquet_rows(str(tmp_path / "paths.parquet"), ("image",), [])] == [b""] * 2
    # without names, with gaps
    rows = [dict(image=image_cell(i), label=(0, None, 2)[i % 3]) for i in range(6)]
    write_parquet(tmp_path / "gaps/train-0.parquet", rows)
    assert prepare("imagenet", tmp_path / "gaps_out", source=str(tmp_path / "gaps"), size=32)["count"] == 4
    assert Counter(Dataset(tmp_path / "gaps_out", "all").labels.tolist()) == {0: 2, 2: 2}
    write_parquet(tmp_path / "words/train-0.parquet", [dict(image=image_cell(0), label="cat")])
    says("words: no numbers in the column", prepare, "imagenet", tmp_path / "no", source=str(tmp_path / "words"))


def celeba_lists(ending="txt"):
    names, comma = ["Male", "Smiling", "Wavy_Hair"], "," if ending == "csv" else " "
    rows = [f"{i + 1:06d}.jpg" + "".join(f"{comma}{1 if (i >> k) & 1 else -1}" for k in range(3)) for i in range(8)]
    head = ["image_id," + ",".join(names)] if ending == "csv" else ["8", " ".join(names)]
    parts = [f"{i + 1:06d}.jpg{comma}{(0, 0, 0, 0, 0, 1, 1, 2)[i]}" for i in range(8)]
    parts = ["image_id,partition"] * (ending == "csv") + parts
    files = {"list_attr_celeba": [*head, *rows], "list_eval_partition": parts}
    return {f"{name}.{ending}": "\n".join(lines) + "\n" for name, lines in files.items()}


@pytest.mark.parametrize("ending", ["txt", "csv"])
def test_celeba(ending, tmp_path):
    source, faces = tmp_path / "celeba", {f"{i + 1:06d}.jpg": encoded(i, width=36, height=44) for i in range(8)}
    write_files(source / "Anno", celeba_lists(ending))
    if ending == "txt":
        with zipfile.ZipFile(source / "img_align_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in faces.items():
                archive.writestr(f"img_align_celeba/{name}", data)
    else:
        write_files(source / "img_align_celeba", faces)
    run = functools.partial(prepare, "celeba", source=str(source), size=32)
    meta = run(tmp_path / "out", attribute="Smiling", workers=1)  # workers get no handle of the .zip
    assert meta["splits"] == {"train": 5, "val": 2, "test": 1} and len(Dataset(tmp_path / "out", "test", 32)) == 1
    found = records(tmp_path / "out")
    assert found["000007"][0] == "val" and found["000007"][1]["text"] == ["smiling, wavy hair"]
    assert [found[f"{i:06d}"][1]["label"] for i in range(1, 9)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert load(found["000003"][2]).size == (32, 32)
    says("--attribute=Tall .*: Male, Smiling, Wavy_Hair", run, tmp_path / "no", attribute="Tall")
    write_files(source / "Anno", {f"list_eval_partition.{ending}": "000001.jpg 3\n"})
    says("000001.jpg is in none of the parts 0, 1, 2", run, tmp_path / "no")


def test_celebahq(tmp_path):
    source, lists = tmp_path / "CelebAMask-HQ", celeba_lists()
    write_files(source, {f"CelebA-HQ-img/{i}.jpg": encoded(i, width=64, height=64) for i in range(8)})
    write_files(source, {"CelebAMask-HQ-mask-anno/0/00000_hair.png": encoded(0, "PNG")})
    attributes = lists["list_attr_celeba.txt"].splitlines()
    rows = [f"{i}.jpg  {row.split(' ', 1)[1]}" for i, row in enumerate(attributes[2:])]
    write_files(source, {"CelebAMask-HQ-attribute-anno.txt": "\n".join([*attributes[:2], *rows]) + "\n"})
    prepare("celebahq", tmp_path / "plain", source=str(source), size=32)
    assert records(tmp_path / "plain")["3"][1]["text"] == ["male, smiling"] and len(records(tmp_path / "plain")) == 8
    lines = ["idx  orig_idx  orig_file"] + [f"{i}  {7 - i}  {8 - i:06d}.jpg" for i in range(8)]
    write_files(source, {"CelebA-HQ-to-CelebA-mapping.txt": "\n".join(lines) + "\n"} | lists)
    meta = prepare("celebahq", tmp_path / "out", source=str(source), size=32)
    assert meta["splits"] == {"train": 5, "val": 2, "test": 1}
    assert [records(tmp_path / "out")[str(i)][0] for i in range(4)] == ["test", "val", "val", "train"]


def test_ffhq(tmp_path):
    numbers = (0, 1, 59999, 60000, 69999)
    path = "images1024x1024/{:05d}/{:05d}.png"
    write_files(tmp_path / "ffhq", {path.format(n // 1000, n): encoded(n, "PNG", 64, 64) for n in numbers})
    write_files(tmp_path / "ffhq", {"LICENSE.txt": ""})
    meta = prepare("ffhq", tmp_path / "out", source=str(tmp_path / "ffhq"), size=32)
    assert meta["splits"] == {"train": 3, "val": 2}
    assert np.allclose(colour(Dataset(tmp_path / "out", "val", 32)[1]["image"]), colour(smooth(69999)), atol=0.06)
    write_files(tmp_path / "ffhq", {"face.png": encoded(1, "PNG")})
    says("face.png: is not named by a number", prepare, "ffhq", tmp_path / "no", source=str(tmp_path / "ffhq"))


def test_lsun(tmp_path):
    lmdb, source = pytest.importorskip("lmdb"), tmp_path / "lsun"
    source.mkdir()
    for k, (name, n) in enumerate((("bedroom_train", 12), ("bedroom_val", 3), ("tower_train", 5), ("tower_val", 2))):
        with lmdb.open(str(source / f"{name}_lmdb"), map_size=2**22) as env, env.begin(write=True) as t:
            for i in range(n):
                t.put(hashlib.sha1(f"{name}{i}".encode()).hexdigest().encode(), encoded(50 * k + i, "WEBP", quality=90))
    run = functools.partial(prepare, "lsun", source=str(source), size=32)
    assert run(tmp_path / "out")["splits"] == {"train": 17, "val": 5}
    split, record, data = records(tmp_path / "out")["tower/" + hashlib.sha1(b"tower_train3").hexdigest()]
    assert split == "train" and record["label"] == 1
    assert np.allclose(colour(load(data)), colour(smooth(103)), atol=0.06)
    some = run(tmp_path / "some", categories="tower", fraction=0.5)
    assert 0 < some["splits"]["train"] < 5 and some["splits"]["val"] == 2
    says("no folder kitchen_train_lmdb, only bedroom, tower", run, tmp_path / "no", categories="kitchen")
    data = bytearray((source / "tower_val_lmdb/data.mdb").read_bytes())
    data[:64] = bytes(64)
    (source / "tower_val_lmdb/data.mdb").write_bytes(data)
    says("tower_val_lmdb: damaged", run, tmp_path / "no", categories="tower")


WIKIART = dict(
    artist=["Unknown Artist", "claude-monet"], genre=["portrait", "Unknown Genre"], style=["Cubism", "Pop_Art"]
)


def test_wikiart(tmp_path):
    rows = [dict(image=image_cell(i), artist=i % 2, genre=i // 2 % 2, style=i // 4 % 2) for i in range(8)]
    write_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet", rows, WIKIART, group=3)
    run = functools.partial(prepare, "wikiart", source=str(tmp_path / "hub"), size=32, min_side=8)
    run(tmp_path / "out")
    found = [records(tmp_path / "out")[f"train-00000-of-00001/{i:06d}"][1] for i in range(8)]
    assert [record["text"][0] for record in found[:4]] == [
        "portrait, cubism",
        "portrait by claude monet, cubism",
        "painting, cubism",
        "painting by claude monet, cubism",
    ]
    assert found[5]["artist"] == "claude-monet" and Dataset(tmp_path / "out").classes == WIKIART["style"]
    run(tmp_path / "artist", label="artist")
    assert Dataset(tmp_path / "artist").classes == WIKIART["artist"]
    assert records(tmp_path / "artist")["train-00000-of-00001/000005"][1]["label"] == 1
    write_parquet(tmp_path / "other/a.parquet", [dict(image=image_cell(0), label=1)])
    says("no column 'style', only image, label", run, tmp_path / "no", source=str(tmp_path / "other"))


def test_art500k(tmp_path):
    source = tmp_path / "img"
    write_files(
        source,
        {
            "Art Movement/Cubism/Guitar Player##abc.jpg": encoded(1, width=80, height=70),
            "Art Movement/Pop Art/Soup##def.jpg": encoded(2, width=80, height=70),
            "Artists1/Picasso/Guitar Player##abc.jpg": encoded(1, width=80, height=70),  # the same work again
            "Artists1/Picasso/Blue_Room##ghi.jpg": encoded(3, width=80, height=70),
            "Medium/Drawing/Broken##jkl.jpg": encoded(4, width=80, height=70)[:600],
        },
    )
    meta = prepare("art500k", tmp_path / "out", source=str(source), size=32)
    assert meta["count"] == 3 and meta["dropped"] == {"broken": 1, "duplicate": 1}
    found = {record["text"][0]: record.get("label") for _, record, _ in records(tmp_path / "out").values()}
    assert found == {"Guitar Player, Cubism": 0, "Soup, Pop Art": 1, "Blue Room, Picasso": None}
    what = "no images in a group 'Genre', only in Art Movement, Artists1, Medium"
    says(what, prepare, "art500k", tmp_path / "no", source=str(source), group="Genre")


def open_images(source):
    head = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated\n"
    for split, ids in (("train", ["0a", "0b", "0c", "0d"]), ("validation", ["1a", "1b"])):
        photos = {f"data/{key}.jpg": encoded(len(split) + i, width=128, height=96) for i, key in enumerate(ids)}
        rows = [f"{key},xclick,/m/01yrx,1,0.25,0.75,0.5,1.0,0,0\n" for key in [*ids, "elsewhere"]]
        rows.append(f"{ids[0]},xclick,/m/0bt9lr,1,0,0.5,0,0.5,0,0\n")
        names = {"metadata/classes.csv": "LabelName,DisplayName\n/m/01yrx,Cat\n/m/0bt9lr,Dog\n"}
        write_files(source / split, photos | names | {"labels/detections.csv": head + "".join(rows)})
    lines = [dict(image_id="0b", caption="A cat. "), dict(image_id="0b", caption="It sits.")]
    lines += [dict(image_id="9", caption="x"), dict(image_id=["0c"]), [], dict(image_id="0d", caption=3)]
    captions = {"narratives_captions.jsonl": "\n".join(map(json.dumps, lines))}
    write_files(source / "train/labels", captions)


def check_open_images(out, meta):
    assert meta["splits"] == {"train": 4, "val": 2}
    train = Dataset(out, "train", 32)
    assert train.object_classes == ["Cat", "Dog"] and [len(train.boxes(i)) for i in range(4)] == [2, 1, 1, 1]
    # of 128 x 96 the middle 96 x 96 is cut: x 32..96 of 16..112
    assert np.allclose(train.boxes(1)[0][1:], [1 / 6, 0.5, 5 / 6, 1], atol=0.02)
    assert train[1]["text"] == ["A cat.", "It sits."] and train[2]["text"] == []


def test_openimages(tmp_path, monkeypatch):
    source = tmp_path / "open-images-v7"
    open_images(source)
    check_open_images(tmp_path / "out", prepare("openimages", tmp_path / "out", source=str(source), size=32))
    # through FiftyOne, which is not installed: a module with the one function that is called
    asked, zoo = [], types.ModuleType("fiftyone.zoo")

    def download_zoo_dataset(name, split, **options):
        asked.append((name, split, options))
        return None, str(source)

    zoo.download_zoo_dataset = download_zoo_dataset
    monkeypatch.setitem(sys.modules, "fiftyone", types.ModuleType("fiftyone"))
    monkeypatch.setitem(sys.modules, "fiftyone.zoo", zoo)
    run = functools.partial(prepare, "openimages", download=True, size=32, n_train=4, n_val=2)
    check_open_images(tmp_path / "zoo", run(tmp_path / "zoo", only="Cat, Dog"))
    both = dict(label_types=["detections"], classes=["Cat", "Dog"])
    assert asked == [
        ("open-images-v7", "train", both | dict(max_samples=4)),
        ("open-images-v7", "validation", both | dict(max_samples=2)),
    ]
    # the zoo's folder keeps the photos of other classes that an earlier call fetched
    assert run(tmp_path / "dogs", only="Dog")["splits"] == {"train": 1, "val": 1}
    assert list(records(tmp_path / "dogs")) == ["0a", "1a"]
    write_files(source / "train", {"labels/detections.csv": "ImageID,XMin\n0a,x\n"})
    says("detections.csv: line 2 cannot be read", run, tmp_path / "no")


def img2dataset_output(folder, urls=20):
    """Two shards as img2dataset writes them, with a dead link in five."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        alive = [i for i in range(urls // 2) if i % 5]
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in alive:
                key, text = f"{shard:05d}{i:04d}", f"a caption, number {shard} {i}"
                record = dict(caption=text, url=f"http://x/{key}", key=key, status="success")
                record |= dict(NSFW="NSFW" if i == 7 else "UNLIKELY", similarity=0.3 + i / 100)
                add(tar, f"{key}.jpg", encoded(100 * shard + i, width=80, height=70))
                add(tar, f"{key}.txt", text.encode())
                add(tar, f"{key}.json", json.dumps(record).encode())
        dead = urls // 2 - len(alive)
        stats = dict(count=urls // 2, successes=len(alive), failed_to_download=dead, failed_to_resize=0)
        stats["status_dict"] = {"success": len(alive), "HTTP Error 404: Not Found": dead}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
        (folder / f"{shard:05d}.parquet").write_bytes(b"a table beside the shard")


@pytest.fixture
def asked(monkeypatch):
    """The one function of img2dataset that is called, which writes shards; its arguments."""
    module, asked = types.ModuleType("img2dataset"), []

    def download(url_list, output_folder, **options):
        asked.append(dict(options, url_list=url_list, output_folder=output_folder))
        img2dataset_output(Path(output_folder))

    module.download = download
    monkeypatch.setitem(sys.modules, "img2dataset", module)
    return asked


LINKS = dict(links=20, images=16, not_downloaded=4, not_resized=0, reasons={"HTTP Error 404: Not Found": 4})


def test_laion400m(asked, tmp_path, capsys):
    out, lists, more = tmp_path / "out", tmp_path / "lists", tmp_path / "more"
    lists.mkdir()
    more.mkdir()
    run = functools.partial(prepare, "laion400m", out, vocab_size=300, min_similarity=0.32)
    meta = run(urls=str(lists), size=32)
    assert "20 links: 16 images, 4 lost (20.0 %)" in capsys.readouterr().out
    assert meta["links"] == LINKS and meta["count"] == 12 and meta["dropped"] == dict(unlike=2, unsafe=2)
    assert asked[0]["url_col"] == "URL" and asked[0]["caption_col"] == "TEXT" and asked[0]["image_size"] == 32
    assert asked[0]["resize_mode"] == "keep_ratio" and asked[0]["output_format"] == "webdataset"
    assert len(Dataset(out, "all", 32)) == 12  # .fetched is hidden
    assert len(Dataset(out / ".fetched", "all", 32)) == 16
    _, record, _ = records(out)["000010003"]
    assert record["text"] == ["a caption, number 1 3"] and record["url"] == "http://x/000010003"
    (out / "meta.json").rename(tmp_path / "meta.json")
    for changed, what in (({"size": 64}, "size=32, not 64"), ({"urls": str(more)}, "urls=.*lists")):
        says(rf"\.fetched: was fetched with {what}", run, **dict(urls=str(lists), size=32) | changed)
    (tmp_path / "meta.json").rename(out / "meta.json")
    shutil.rmtree(out / ".fetched")
    run(urls=str(lists), size=32)
    assert len(asked) == 1 and "up to date" in capsys.readouterr().out


def test_laion400m_records_that_are_damaged(tmp_path):
    write_files(tmp_path / "fetched", {"0_stats.json": "[1", "1_stats.json": '{"count": "x", "status_dict": 3}'})
    with tarfile.open(tmp_path / "fetched/00000.tar", "w") as tar:
        for i, text in enumerate((b"[]", b"5", b"{bad", b'{"caption": ["a", null], "similarity": "0.3"}')):
            add(tar, f"{i:05d}.jpg", encoded(i, width=80, height=70))
            add(tar, f"{i:05d}.json", text)
        add(tar, "00004.jpg", encoded(4, width=80, height=70))
        member = tarfile.TarInfo("00004.json")
        member.size = 2**42  # beyond the end of the file
        tar.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))
    meta = prepare("laion400m", tmp_path / "out", fetched=str(tmp_path / "fetched"), size=32, vocab_size=0)
    assert [record["text"] for _, record, _ in records(tmp_path / "out").values()] == [[], [], [], ["a"]]
    assert meta["links"]["links"] == 0


@pytest.mark.parametrize("line", ["a caption\thttp://x/a.jpg", "http://x/a.jpg\ta caption"])
def test_conceptual_captions(line, asked, tmp_path):
    out, path = tmp_path / "out", tmp_path / "list.tsv"
    path.write_text(line + "\n")
    run = functools.partial(prepare, "conceptual_captions", size=32)
    meta = run(out, urls=str(path), vocab_size=300)
    assert meta["links"] == LINKS and meta["count"] == 16 and (out / "bpe.tiktoken").exists()
    head = "\t".join("url" if word.startswith("http") else "caption" for word in line.split("\t"))
    assert Path(asked[0]["url_list"]).read_text() == f"{head}\n{line}\n" and asked[0]["input_format"] == "tsv"
    says("urls 'x.tsv': no such file.*set --urls", run, tmp_path / "no", urls="x.tsv")
    path.write_text("no tab\n")
    says("does not begin with a caption, a tab and a URL", run, tmp_path / "no", urls=str(path))
    assert run(tmp_path / "again", fetched=str(out / ".fetched"), vocab_size=0)["count"] == 16


TOOLS = dict(
    openimages=("fiftyone", dict(download=True)),
    laion400m=("img2dataset", dict(urls=".")),
    lsun=("lmdb", dict(source=".")),
    wikiart=("huggingface_hub", dict(download=True)),
)


@pytest.mark.parametrize("name", TOOLS)
def test_missing_tools_are_named_with_their_command(name, tmp_path, monkeypatch):
    tool, changed = TOOLS[name]
    for module in (tool, f"{tool}.zoo"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    (tmp_path / "bedroom_train_lmdb").mkdir()
    says(f"needs {tool}, which is not installed; pip install {tool}$", prepare, name, tmp_path / "out", **changed)


# --- MNIST ---


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def digits(tmp_path):
    """A folder with the four files, of 30 and 20 random images."""
    rng, folder = np.random.default_rng(0), tmp_path / "raw"
    for prefix, n in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        files = {f"{prefix}-images-idx3-ubyte.gz": images, f"{prefix}-labels-idx1-ubyte.gz": labels}
        write_files(folder, {name: gzip.compress(idx(array)) for name, array in files.items()})
    return folder


def test_mnist(digits, tmp_path, capsys, monkeypatch):
    out, source = tmp_path / "out", tmp_path / "fetched"
    monkeypatch.setattr(mnist, "MD5", {name: hashlib.md5(data).hexdigest() for name, data in files_in(digits).items()})
    prepare("mnist", out, source=str(source), download=True, mirror=digits.as_uri())
    assert files_in(source) == files_in(digits)
    for split, prefix, n in (("train", "train", 30), ("val", "t10k", 20)):
        images, labels = np.load(out / split / "images.npy"), np.load(out / split / "labels.npy")
        assert images.shape == (n, 32, 32, 1) and images.dtype == np.uint8
        raw = mnist.read_idx(f"{digits}/{prefix}-images-idx3-ubyte.gz", 3)
        assert np.array_equal(images[:, 2:30, 2:30, 0], raw) and images.sum(dtype=int) == raw.sum(dtype=int)
        assert np.array_equal(labels, mnist.read_idx(f"{digits}/{prefix}-labels-idx1-ubyte.gz", 1))
    assert json.loads((out / "classes.json").read_text()) == list("0123456789")
    capsys.readouterr()
    (out / "val/meta.json").unlink()
    prepare("mnist", out, source=str(source))
    assert re.findall("up to date|20 images", capsys.readouterr().out) == ["up to date", "20 images"]
    write_files(source, {"train-images-idx3-ubyte.gz": gzip.compress(idx(np.zeros((30, 28, 28), np.uint8)))})
    prepare("mnist", out, source=str(source))
    assert not np.load(out / "train/images.npy").any()
    says("no such file.*--download=True", prepare, "mnist", out, source=str(tmp_path / "nowhere"))


IMAGES, LABELS = np.zeros((30, 28, 28), np.uint8), np.zeros(30, np.uint8)
BAD_DIGITS = {
    "no gzip": ("images-idx3", b"hello", "damaged"),
    "cut off": ("images-idx3", gzip.compress(np.random.default_rng(0).bytes(9999))[:5000], "damaged"),
    "empty": ("labels-idx1", gzip.compress(b""), "0 bytes after the header"),
    "magic": ("labels-idx1", gzip.compress(idx(IMAGES)), "after the header 00000803"),
    "header": ("images-idx3", gzip.compress(idx(IMAGES)[:10]), "images are"),
    "short": ("images-idx3", gzip.compress(idx(IMAGES)[:-1]), "23519 bytes after the header"),
    "huge": ("images-idx3", gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12), "0 bytes after the header"),
    "count": ("labels-idx1", gzip.compress(idx(LABELS[:29])), "29 labels"),
    "side": ("images-idx3", gzip.compress(idx(IMAGES[:, :, :27])), "images are"),
    "label": ("labels-idx1", gzip.compress(idx(LABELS + 10)), "labels up to 10"),
}


@pytest.mark.parametrize("case", BAD_DIGITS)
def test_damaged_mnist_files_are_named(case, digits):
    name, content, what = BAD_DIGITS[case]
    (digits / f"train-{name}-ubyte.gz").write_bytes(content)
    says(f"{digits}.*{what}", mnist.read_split, str(digits), "train")


# --- BAPPS ---

BAPPS = {"2afc/train/cnn": 3, "2afc/train/mix": 2, "2afc/val/color": 2, "jnd/val/cnn": 2}


@pytest.fixture
def published(tmp_path):
    """The published layout with two or three items a category, of random pixels."""
    rng, folder = np.random.default_rng(0), tmp_path / "source"
    for category, count in BAPPS.items():
        for part in bapps.PARTS[category.split("/")[0]]:
            target = folder / category / part
            target.mkdir(parents=True)
            for i in range(count):
                if part in ("judge", "same"):
                    np.save(target / f"{i:06d}.npy", np.array([i / 4], np.float32))
                else:
                    side = 80 if category.endswith("mix") else 64
                    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(target / f"{i:06d}.png")
    (folder / "2afc/train/.DS_Store").write_text("")
    return folder


def test_bapps(published, tmp_path, capsys):
    out = tmp_path / "out"
    prepare("bapps", out, source=str(published))
    assert {str(p.parent.relative_to(out)) for p in out.rglob("images.npy")} == set(BAPPS)
    for category, n in BAPPS.items():
        images, judge = np.load(out / category / "images.npy"), np.load(out / category / "judge.npy")
        assert images.shape == (n, 3 if "2afc" in category else 2, 64, 64, 3) and images.dtype == np.uint8
        assert judge.dtype == np.float32 and judge.tolist() == [i / 4 for i in range(n)]
    images = np.load(out / "2afc/train/cnn/images.npy")
    for k, part in enumerate(("ref", "p0", "p1")):
        assert np.array_equal(images[2, k], np.asarray(Image.open(published / f"2afc/train/cnn/{part}/000002.png")))
    assert str(published) in json.loads((out / "meta.json").read_text())["what"]
    capsys.readouterr()
    (out / "2afc/val/color/meta.json").unlink()
    prepare("bapps", out, source=str(published))
    assert capsys.readouterr().out.count("up to date") == 3
    # interrupted in the middle of new files, the set does not count as complete
    (published / "2afc/train/mix/judge/000001.npy").write_text("cut")
    says("000001.npy: cannot be loaded", prepare, "bapps", out, source=str(published))
    assert not (out / "meta.json").exists()
    (published / "2afc/train/mix").rename(published / "2afc/train/other")
    says("train/mix: is of another source", prepare, "bapps", out, source=str(published))
    says("2afc/train: no categories; set --source", prepare, "bapps", out, source=str(tmp_path))
    says("set either --source .* or --standin", prepare, "bapps", out)


CATEGORY = "2afc/train/cnn"
BAD_JUDGEMENTS = {
    "fewer": ("000001 is missing in ref or p1", lambda folder: (folder / "p1/000001.png").unlink()),
    "other name": ("000001 is missing", lambda folder: (folder / "p1/000001.png").rename(folder / "p1/000007.png")),
    "no folder": ("is missing in ref or judge", lambda folder: shutil.rmtree(folder / "judge")),
    "empty": ("is empty", lambda folder: [path.unlink() for path in folder.rglob("*.*")]),
    "image": ("p0/000001.png: cannot be decoded", lambda folder: (folder / "p0/000001.png").write_bytes(b"\x89PNG")),
    "text": ("judge/000001.npy: cannot be loaded", lambda folder: (folder / "judge/000001.npy").write_text("0.5")),
    "pickle": ("cannot be loaded", lambda folder: np.save(folder / "judge/000001.npy", [{"a": 1}], allow_pickle=True)),
    "range": (r"is \[5.0\], not one number", lambda folder: np.save(folder / "judge/000001.npy", [5.0])),
    "nan": (r"is \[nan\]", lambda folder: np.save(folder / "judge/000001.npy", [np.nan])),
    "two": (r"is \[0.0, 1.0\]", lambda folder: np.save(folder / "judge/000001.npy", [0.0, 1.0])),
}


@pytest.mark.parametrize("fault", BAD_JUDGEMENTS)
def test_faults_of_bapps_are_named(fault, published, tmp_path):
    what, damage = BAD_JUDGEMENTS[fault]
    damage(published / CATEGORY)
    says(f"{published / CATEGORY}.*{what}", prepare, "bapps", tmp_path / "out", source=str(published))
    assert not (tmp_path / "out" / CATEGORY / "meta.json").exists()


@pytest.fixture
def photos(tmp_path):
    """Ten photos, each of its own colour with waves on it."""
    (tmp_path / "photos").mkdir()
    y, x = np.mgrid[0:100, 0:120]
    for i in range(10):
        waves = 60 * np.sin(y / (3 + i)) * np.sin(x / (13 - i))
        pixels = np.stack([25 * i + 0 * waves, 128 + waves, 128 - waves], axis=2)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


def test_the_standin_has_the_published_layout(photos, tmp_path):
    out = tmp_path / "out"
    run = functools.partial(prepare, "bapps", standin=str(photos), size=32, standin_train=6, standin_val=5)
    run(out)
    assert "stand-in" in json.loads((out / "meta.json").read_text())["what"]
    categories = {split: {path.name for path in (out / "2afc" / split).iterdir()} for split in ("train", "val")}
    assert categories == {"train": set(bapps.KNOWN), "val": set(bapps.KNOWN | bapps.NEW)}
    red = {}  # identifies the photos; ref is not distorted
    for split, count in (("train", 6), ("val", 5)):
        images = [np.load(path) for path in sorted((out / "2afc" / split).rglob("images.npy"))]
        assert all(a.shape == (count, 3, 32, 32, 3) for a in images)
        red[split] = {round(float(ref[..., 0].mean()) / 25) for a in images for ref in a[:, 0]}
    assert red["val"] <= {0, 5} and not red["val"] & red["train"]
    judge = np.concatenate([np.load(path) for path in (out / "2afc").rglob("judge.npy")])
    assert set(judge) == {0.0, 1.0} and 0.2 < judge.mean() < 0.8
    assert np.load(out / "jnd/val/new/images.npy").shape == (5, 2, 32, 32, 3)
    run(tmp_path / "again")
    for path in out.glob("2afc/*/*/*.npy"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(out)).read_bytes()
    says("is the folder of the stand-in", run, out, standin=f"{out}/standin/2afc")
    (out / "standin/made_by_prepare.txt").unlink()
    says("was not made by this script", run, out)


@pytest.mark.parametrize("name", bapps.KNOWN | bapps.NEW)
def test_a_larger_amount_distorts_more(name, photos):
    patch = Image.open(photos / "4.png").crop((0, 0, 64, 64))
    means = []
    for amount in (0.0, 0.25, 0.5, 0.75, 1.0):
        distorted = [bapps.distort(patch, name, amount, np.random.default_rng(s)) for s in range(4)]
        assert all(d.size == (64, 64) and d.mode == "RGB" for d in distorted)
        means.append(np.mean([(np.asarray(d, float) - np.asarray(patch)) ** 2 for d in distorted]))
    assert means == sorted(means) and means[0] < means[-1] / 4


# --- shapes ---


@pytest.fixture(scope="module")
def rendered():
    return shapes.make_split("val", 200, 64, seed=0)[:2]


@pytest.fixture(scope="module")
def readings(rendered):
    return [shapes.read(image) for image in rendered[0]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    prepare("shapes", folder, n_train=1500, n_val=60)
    return folder


def read_captions(folder):
    return [json.loads(line)["text"][0] for line in (folder / "captions.jsonl").read_text().splitlines()]


def test_captions_parse_and_a_tenth_of_the_combinations_is_held_out():
    for scene in shapes.combinations():
        assert tuple(shapes.parse(shapes.caption(*scene)).values()) == scene
    assert shapes.parse("A  small RED star on a Blue background ")["shape"] == "star"
    for text in ("", "a red star", "a small red star on a blue background, please", "a small pink star on a red one"):
        assert shapes.parse(text) is None
    held = shapes.held_out(0)
    assert len(held) == 39 and held != shapes.held_out(1) and len(shapes.combinations()) == 2 * (392 - 39)
    assert len({(color, background) for _, color, background in held}) == 39  # no pair of colors twice
    for column, most in ((0, 6), (1, 7), (2, 7)):
        assert max(Counter(row[column] for row in held).values()) <= most  # of 56, 49, 49


def test_shapes_files(made, tmp_path, capsys):
    classes = json.loads((made / "classes.json").read_text())
    for split, n in (("train", 1500), ("val", 60)):
        images, labels = np.load(made / split / "images.npy"), np.load(made / split / "labels.npy")
        assert images.shape == (n, 64, 64, 3) and images.dtype == np.uint8
        scenes = [shapes.parse(text) for text in read_captions(made / split)]
        assert [classes[label] for label in labels] == [scene["shape"] for scene in scenes]
        for scene in scenes:
            assert not shapes.is_held_out(scene["shape"], scene["color"], scene["background"])
            assert scene["color"] != scene["background"]
    prompts, trained = (made / "prompts.txt").read_text().splitlines(), set(read_captions(made / "train"))
    assert len(prompts) == len(set(prompts)) == 256
    for k, text in enumerate(prompts):  # three that occur in training, then one held out
        scene = shapes.parse(text)
        assert shapes.is_held_out(scene["shape"], scene["color"], scene["background"]) == (k % 4 == 3)
        assert (text in trained) == (k % 4 != 3)
    ranks = ranks_of((made / "bpe.tiktoken").read_text())
    assert len(ranks) <= 512 and all(f" {word}".encode() in ranks for word in (*shapes.PALETTE, *shapes.SHAPES))
    copy = tmp_path / "shapes"
    shutil.copytree(made, copy)
    before = files_in(copy)
    prepare("shapes", copy, n_train=1500, n_val=50)
    assert re.findall("up to date|50 images", capsys.readouterr().out) == ["50 images", "up to date"]
    (copy / "train/meta.json").unlink()  # as after a crash
    (copy / "bpe.tiktoken").unlink()
    prepare("shapes", copy, n_train=1500, n_val=50)
    assert files_in(copy) == before


def test_shapes_depend_on_seed_split_and_index_only():
    made, fewer = shapes.make_split("train", 20, 64, seed=3), shapes.make_split("train", 7, 64, seed=3)
    for one, short in zip(made, fewer, strict=True):
        assert np.array_equal(one[:7], short)
    for other in (shapes.make_split("val", 20, 64, seed=3), shapes.make_split("train", 20, 64, seed=4)):
        assert made[1] != other[1]


def test_shapes_are_those_of_the_log(rendered):
    """The numbers in LOG.md hold for these images, so they must not change."""
    images, captions = rendered[0][:100], rendered[1][:100]
    assert zlib.crc32("\n".join(captions).encode()) == 190813147
    mean = [129.1575, 131.3972, 136.1592]
    assert images.mean((0, 1, 2)).tolist() == pytest.approx(mean, abs=2e-3)  # a cosine may differ by machine


def test_maps_and_boxes_are_where_the_shapes_are(made):
    train = Dataset(made, "train", 64)
    assert train.has_maps and train.map_names == ["background", *shapes.SHAPES] and len(train.object_classes) == 56
    colors = {name: torch.tensor(value) / 127.5 - 1 for name, value in shapes.PALETTE.items()}
    for i in range(0, 1500, 50):
        item, classes, ((name, *box),) = train[i], train.map(i), train.boxes(i)
        scene, inside = shapes.parse(item["text"][0]), classes > 0
        assert classes[inside].unique().tolist() == [item["label"] + 1]
        to_shape, to_background = (
            (item["image"] - colors[scene[what]][:, None, None]).norm(dim=0) for what in ("color", "background")
        )  # the brightness jitter may decide otherwise on the outline
        assert ((to_shape < to_background) == inside).float().mean() > 0.985
        rows, columns = inside.nonzero(as_tuple=True)
        assert name == f"{scene['color']} {scene['shape']}"
        bounds = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert [64 * v for v in box] == [v.item() for v in bounds]


def test_the_judge_is_right_and_rejects_other_captions(rendered, readings):
    scenes = [shapes.parse(text) for text in rendered[1]]
    assert np.mean([got == scene for got, scene in zip(readings, scenes)]) >= 0.99
    shuffled = np.random.default_rng(0).permutation(len(scenes))
    assert np.mean([got == scenes[k] for got, k in zip(readings, shuffled)]) <= 0.02
    held = sorted(shapes.held_out())
    for side, (shape, color, background), size in zip((64, 32, 96) * 5, held, ("small", "large") * 8):
        mask = shapes.render_mask(shape, side * 0.45, side * 0.52, side * shapes.RADII[size], side)[0][..., None]
        image = mask * shapes.PALETTE[color] + (1 - mask) * shapes.PALETTE[background]
        text = shapes.caption(size, color, shape, background)
        assert shapes.judge(image.astype(np.uint8), text), (side, text)
        other = shapes.caption({"small": "large", "large": "small"}[size], color, shape, background)
        assert not shapes.judge(image.astype(np.uint8), other)


def as_jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=20)
    return Image.open(file)


def add_noise(image):
    pixels = np.asarray(image)
    noise = np.random.default_rng(int(pixels.sum())).normal(0, 13, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


DEGRADATIONS = {
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(1.8)),
    "noise": add_noise,
    "jpeg": as_jpeg,
    "down-up": lambda image: image.resize((16, 16), Image.BOX).resize((64, 64), Image.BICUBIC),
}


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_judge_is_right_on_degraded_images(name, rendered):
    images, captions = rendered[0][:100], rendered[1][:100]
    degraded = np.stack([np.asarray(DEGRADATIONS[name](Image.fromarray(image))) for image in images])
    squared = ((degraded.astype(np.float64) - images) ** 2).mean((1, 2, 3))
    assert 25 < np.mean(10 * np.log10(255**2 / squared)) < 28
    assert shapes.accuracy(degraded, captions) >= 0.99


def blob(inside, color=(215, 40, 40), background=(240, 240, 240)):
    return np.where(inside[..., None], np.uint8(color), np.uint8(background))


def test_the_judge_rejects_what_is_not_one_clean_shape():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(10)]
    blank = [np.full((64, 64, 3), value, dtype=np.uint8) for value in shapes.PALETTE.values()]
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None], (64, 64, 3))
    for image in (*noise, *blank, ramp):
        found = shapes.read(image)
        assert found["shape"] is found["color"] is found["size"] is None
    assert [shapes.read(image)["background"] for image in blank] == list(shapes.PALETTE)
    y, x = np.mgrid[:64, :64] - 31.5
    disc = np.hypot(x, y) < 22
    assert shapes.read(blob(disc)) == dict(size="large", color="red", shape="circle", background="white")
    strange = {
        "two alike": (np.hypot(x - 16, y) < 11) | (np.hypot(x + 16, y) < 11),
        "large and small": (np.hypot(x - 10, y - 10) < 18.5) | (np.hypot(x + 21, y + 21) < 10),
        "a dot beside it": disc | (np.hypot(x - 22, y - 22) < 4),
        "wide ellipse": (x / 18) ** 2 + (y / 12) ** 2 < 1,
        "bar": (abs(x) < 20) & (abs(y) < 5),
        "half a disc": disc & (y < 0),
        "crescent": disc & (np.hypot(x - 8, y) > 14),
        "corner": (np.maximum(abs(x), abs(y)) < 16) & ~((x > -5) & (y < 5)),
        "frame": (np.maximum(abs(x), abs(y)) < 17) & (np.maximum(abs(x), abs(y)) > 10),
        "cut in halves": x > 0,
    }
    for name, inside in strange.items():
        assert shapes.read(blob(inside))["shape"] is None, name
    second = blob(disc)
    second[np.hypot(x + 22, y + 22) < 9] = shapes.PALETTE["green"]
    assert shapes.read(second)["shape"] is None
    middle = shapes.read(blob(np.hypot(x, y) < 64 * 0.325))  # between small and large
    assert middle["shape"] == "circle" and middle["size"] is None
    for image in (np.zeros((64, 32, 3), np.uint8), np.zeros((64, 64)), np.zeros((64, 64, 3))):
        says(r"must be \(S, S, 3\) uint8", shapes.read, image)
    says("'a cat' is not a caption", shapes.judge, np.zeros((64, 64, 3), np.uint8), "a cat")


def write_samples(folder, images, prompts):
    folder.mkdir()
    records = [dict(file=f"{k:05d}.png", prompt=prompt) for k, prompt in enumerate(prompts)]
    for record, image in zip(records, images):
        Image.fromarray(image).save(folder / record["file"])
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def percentages(text):
    lines = re.findall(r"^ *(\S.*?) (\d+\.\d) % \(\d+ of \d+\)$", text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def test_score(rendered, tmp_path, capsys):
    images, captions = rendered[0][:64], rendered[1][:64]
    shape, color, background = sorted(shapes.held_out())[0]
    mask = shapes.render_mask(shape, 32, 32, 16.6, 64)[0][..., None]
    unseen = (mask * shapes.PALETTE[color] + (1 - mask) * shapes.PALETTE[background]).astype(np.uint8)
    images, captions = [*images, unseen], [*captions, shapes.caption("small", color, shape, background)]
    write_samples(tmp_path / "true", images, captions)
    prepare("shapes", tmp_path, score=str(tmp_path / "true"))
    out = capsys.readouterr().out
    assert out.startswith("prompt score 100.0 % (65 of 65)\n") and set(percentages(out).values()) == {100.0}
    assert "  seen combinations 100.0 % (64 of 64)" in out and "  held-out combinations 100.0 % (1 of 1)" in out
    write_samples(tmp_path / "shuffled", images, np.roll(captions, 1).tolist())
    prepare("shapes", tmp_path, score=str(tmp_path / "shuffled"))
    parts = percentages(capsys.readouterr().out)
    assert len(parts) == 7 and parts["prompt score"] <= 5
    assert 20 < parts["size"] < 80 and parts["shape"] < 40 and parts["color"] < 40 and parts["background"] < 40
    folder = tmp_path / "bad"
    write_samples(folder, images[:4], ["a cat", *captions[1:4]])
    (folder / "00001.png").unlink()
    (folder / "00002.png").write_bytes(b"not an image")
    says("3 of 4 samples .*a cat.*00001.png.*00002.png", prepare, "shapes", tmp_path, score=str(folder))
    assert "(1 of 1)" in capsys.readouterr().out
    for lines, count in (('{"file": "00003.png"}\nnot json\n[1]\n', "3 of 3"), ("", "0 of 0")):
        (folder / "samples.jsonl").write_text(lines)
        says(f"{count} samples", prepare, "shapes", tmp_path, score=str(folder))
    says("samples.jsonl: no such file", prepare, "shapes", tmp_path, score="nowhere")


def test_the_command_line_and_its_errors_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "data/shapes/prepare.py"), "--score=nowhere"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("prepare.py: nowhere/samples.jsonl: no such file")
    assert result.stderr.count("\n") == 1
