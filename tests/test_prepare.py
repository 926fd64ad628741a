"""data/prepare.py, and every data set on top of it, on tiny data in each one's published layout."""

import base64
import functools
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
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configurator import find_settings
from data import prepare as room
from data.dataset import Dataset

ROOT = Path(__file__).resolve().parent.parent
COMMON = dict(
    size=32, crop="none", quality=95, min_side=8, drop_duplicates=True, vocab_size=0, shard_mb=256.0, workers=0
)


def picture(seed, width=48, height=40):
    """A smooth picture, of a colour that tells the seed."""
    y, x = np.mgrid[0:height, 0:width]
    colour = np.array([37 * seed % 200, 83 * seed % 200, 151 * seed % 200])
    pixels = colour + 25 * (1 + np.sin((x / 9 + seed)[..., None]) * np.cos(y / 7)[..., None])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(seed, form="JPEG", **options):
    file = io.BytesIO()
    picture(seed, **{name: options.pop(name) for name in ("width", "height") if name in options}).save(
        file, form, **options
    )
    return file.getvalue()


def settings(name, **changed):
    """(module data.NAME.prepare, its settings with some changed)."""
    module = importlib.import_module(f"data.{name}.prepare")
    cfg = {key: setting.default for key, setting in find_settings(vars(module)).items()}
    changed = dict(workers=0, **changed)
    assert changed.keys() <= cfg.keys()
    return module, types.SimpleNamespace(**cfg | changed)


def prepare(name, out, **changed):
    module, cfg = settings(name, out_dir=str(out), **changed)
    module.prepare(cfg)
    with open(out / "meta.json") as f:
        return json.load(f)


def make(items, out, **changed):
    return room.make(iter(items), types.SimpleNamespace(**COMMON | dict(out_dir=str(out)) | changed))


def records(out, pattern="*.tar"):
    """{own key: (split, record, bytes)} of all shards, in their order."""
    found = {}
    for path in sorted(Path(out).glob(pattern)):
        for data, record in room.samples(str(path)):
            found[record["key"]] = (path.name.split("-")[0], record, data)
    return found


def content(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.is_file()}


def colours(image):
    return image.mean((1, 2)) if torch.is_tensor(image) else np.asarray(image, np.float64).mean((0, 1)) / 127.5 - 1


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the index cache, and what defaults name


@pytest.fixture
def items():
    return [dict(key=f"k{i}", image=encoded(i), label=i % 3, text=[f"number {i}", "a picture"]) for i in range(220)]


# -- the room ----------------------------------------------------------------------------------------------------------


def test_shards_hold_what_went_in_and_the_split_is_of_the_key(items, tmp_path):
    meta = make(items, tmp_path / "out")
    held = {item["key"] for item in items if zlib.crc32(item["key"].encode()) % 100 == 0}
    assert held and meta["splits"] == {"train": 220 - len(held), "val": len(held)}
    for split in ("train", "val"):
        ds = Dataset(tmp_path / "out", split, 32)
        assert len(ds) == meta["splits"][split]
        for i in range(0, len(ds), 40):
            at = int(ds.key(i).split("/")[1])  # the key in the shard is the number of the item
            sample = ds[i]
            assert (items[at]["key"] in held) == (split == "val")
            assert sample["label"] == items[at]["label"] and sample["text"] == items[at]["text"]
            assert np.allclose(colours(sample["image"]), colours(picture(at)), atol=0.05)
    assert meta["images_of_class"] == {str(c): sum(item["label"] == c for item in items) for c in range(3)}
    for name, shard in meta["shards"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert len(data) == shard["bytes"] and hashlib.sha256(data).hexdigest() == shard["sha256"]
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width == 8 * 132 and np.asarray(sheet.convert("RGB")).std() > 10


def test_resize_is_lanczos_on_the_short_side_and_centre_crop_is_that_of_dataset(tmp_path):
    item = dict(key="a", image=encoded(3, "PNG", width=90, height=60))
    make([item], tmp_path / "a", quality=0)
    with Image.open(io.BytesIO(records(tmp_path / "a")["a"][2])) as image:
        expected = picture(3, 90, 60).resize((48, 32), Image.Resampling.LANCZOS)
        assert image.format == "PNG" and np.array_equal(np.asarray(image), np.asarray(expected))
    make([item], tmp_path / "b", quality=0, crop="center")
    with Image.open(io.BytesIO(records(tmp_path / "b")["a"][2])) as image:
        expected = picture(3, 90, 60).crop((15, 0, 75, 60)).resize((32, 32), Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1
    _, record, _ = records(tmp_path / "b")["a"]
    assert (record["width"], record["height"]) == (90, 60)


def test_a_small_jpeg_stays_as_it_is_others_turn_upright_and_lose_no_boxes(tmp_path):
    small, exif = encoded(1, width=30, height=20), Image.Exif()
    exif[0x0112] = 6
    turned = encoded(2, width=64, height=128, exif=exif)  # shown as 128 x 64
    boxes = dict(bbox=[[64, 32, 32, 16]], categories=["cat"])
    shares = dict(bbox=[[0.5, 0.5, 0.25, 0.25]], categories=["cat"], unit="image")
    grey = io.BytesIO()
    Image.new("L", (20, 20), 77).save(grey, "PNG")
    four = [dict(key="a", image=small), dict(key="b", image=turned, objects=boxes)]
    four += [
        dict(key="c", image=encoded(4, width=128, height=64), objects=shares),
        dict(key="d", image=grey.getvalue()),
    ]
    make(four, tmp_path / "out", crop="none")
    found = records(tmp_path / "out")
    assert found["a"][2] == small
    with Image.open(io.BytesIO(found["b"][2])) as image:
        assert image.size == (64, 32)
    for key in "bc":
        assert found[key][1]["objects"] == dict(bbox=[[32, 16, 16, 8]], categories=["cat"])
    assert Image.open(io.BytesIO(found["d"][2])).mode == "RGB"
    make(four[1:2], tmp_path / "square", crop="center")
    # 128 x 64 -> its middle 64 x 64 -> 32 x 32
    assert records(tmp_path / "square")["b"][1]["objects"]["bbox"] == [[16, 16, 16, 8]]
    ds = Dataset(tmp_path / "square", "all", 32)
    assert ds.boxes(0) == [("cat", 0.5, 0.5, 1.0, 0.75)]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_turned_image_keeps_its_shape(form, tmp_path):
    """Pillow gives the size of a TIFF as it is shown, of the others as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encoded(7, form, width=80, height=40, exif=exif)
    boxes = dict(bbox=[[0, 40, 20, 40]], categories=["cat"])
    make([dict(key="a", image=stored, objects=boxes)], tmp_path / "out", crop="none", size=20)
    _, record, data = records(tmp_path / "out")["a"]
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (20, 40)
    assert (record["width"], record["height"]) == (40, 80) and record["objects"]["bbox"] == [[0, 20, 10, 20]]


def bomb(width=30000, height=30000):
    """A PNG that says it is huge, in 100 bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_broken_tiny_huge_and_duplicate_images_are_dropped_and_listed(items, tmp_path):
    items = items[:20]
    good = len(items)

    def fails():
        raise OSError("the disk is gone")

    bad = {
        "cut": (encoded(50, width=300, height=300)[:2000], "broken: image file is truncated"),
        "text": (b"hello", "broken: not an image"),
        "empty": (b"", "broken: it has 0 bytes"),
        "missing": (str(tmp_path / "nowhere.jpg"), "broken: .*No such file"),
        "unread": (fails, "broken"),
        "tiny": (encoded(51, width=7, height=90), "tiny: 7 x 90, less than min_side=8"),
        "bomb": (bomb(), "huge"),
        "large": (bomb(10000, 9500), "huge: 10000 x 9500"),
        "twin": (items[4]["image"], "duplicate"),
    }
    mixed = items + [dict(key=key, image=image, split="train") for key, (image, _) in bad.items()]
    meta = make(mixed, tmp_path / "out")
    assert meta["count"] == good and meta["dropped"] == dict(broken=5, tiny=1, huge=2, duplicate=1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == list(bad)
    for line in lines:
        assert re.match(bad[line["key"]][1], line["reason"]), line
    assert not records(tmp_path / "out").keys() & bad.keys()
    assert make(mixed, tmp_path / "kept", drop_duplicates=False)["count"] == good + 1


def test_only_bad_images_or_none_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="all 2 were dropped, .*broken: not an image"):
        make([dict(key=str(i), image=b"no") for i in range(2)], tmp_path / "a")
    with pytest.raises(ValueError, match="none found"):
        make([], tmp_path / "b")


def test_classes_of_one_name_are_counted_apart(items, tmp_path):
    meta = room.make(iter(items), types.SimpleNamespace(**COMMON | dict(out_dir=str(tmp_path))), ["crane", "heron"] * 2)
    assert meta["images_of_class"] == {"crane (0)": 74, "heron": 73, "crane (2)": 73}


def test_workers_do_not_change_a_byte(items, tmp_path):
    mixed = [*items, dict(key="bad", image=b"bad"), dict(key="twin", image=items[7]["image"])]
    make(mixed, tmp_path / "a", shard_mb=0.05, vocab_size=300)
    make(mixed, tmp_path / "b", shard_mb=0.05, vocab_size=300, workers=2)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("train-*.tar"))) > 3


def test_a_worker_that_dies_is_told(items, tmp_path, monkeypatch):
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("workers do not inherit what this test changes")
    monkeypatch.setattr(room, "convert", lambda *args: os._exit(9))
    with pytest.raises(ValueError, match="a worker died.*run it again, it continues"):
        make(items[:40], tmp_path / "out", workers=1)


class Stop(Exception):
    pass


def stop_at(n, before, replace=os.replace):
    """An os.replace that stops the program before or after its n-th rename."""
    count = iter(range(1, 10**6))

    def stopping(a, b):
        now = next(count)
        if before and now == n:
            raise Stop
        replace(a, b)
        if now == n:
            raise Stop

    return stopping


def test_stopped_anywhere_it_continues_to_the_same_bytes(items, tmp_path, monkeypatch):
    """Before and after every rename, which is where the outcome could differ; what it finished is not decoded again."""
    mixed = [*items[:100], dict(key="twin", image=items[7]["image"]), *items[100:], dict(key="bad", image=b"bad")]
    make(mixed, tmp_path / "whole", shard_mb=0.05, vocab_size=300)
    whole, out = content(tmp_path / "whole"), tmp_path / "out"
    replace, convert, decoded = os.replace, room.convert, 0

    def counted(*args):
        nonlocal decoded
        decoded += 1
        return convert(*args)

    monkeypatch.setattr(room, "convert", counted)
    for attempt in range(1, 100):
        monkeypatch.setattr(os, "replace", stop_at(1 + attempt % 13, before=attempt % 2))
        try:
            make(mixed, out, shard_mb=0.05, vocab_size=300)
        except Stop:
            continue
        break
    assert attempt > 5 and content(out) == whole
    decoded = 0
    monkeypatch.setattr(os, "replace", replace)
    make(mixed, out, shard_mb=0.05, vocab_size=300)
    assert decoded == 0 and not (out / room.STATE).exists()


def write_folder(folder, n=220):
    for i in range(n):
        path = folder / ("cats" if i % 2 else "dogs") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))


def test_killed_by_the_system_it_continues_to_the_same_bytes(tmp_path):
    write_folder(tmp_path / "photos")
    command = [sys.executable, str(ROOT / "data/folder/prepare.py"), f"--source={tmp_path / 'photos'}", "--size=32"]
    command += ["--shard_mb=0.03", "--workers=2", "--min_side=8"]
    run = functools.partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = run([*command, f"--out_dir={tmp_path / 'a'}"])
    while first.poll() is None and len(list(tmp_path.glob("a/train-*.tar"))) < 3:
        time.sleep(0.001)
    listed = Path(f"/proc/{first.pid}/task/{first.pid}/children")
    children = listed.read_text().split() if listed.exists() else []
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    until = time.time() + 10
    while any(Path(f"/proc/{child}/cwd").exists() for child in children):  # a dead one has none
        assert time.time() < until, "workers live on"
        time.sleep(0.05)
    assert not (tmp_path / "a" / "meta.json").exists()
    again = run([*command, f"--out_dir={tmp_path / 'a'}"])
    said = again.communicate()[0]
    assert again.returncode == 0 and "it continues" in said
    prepare("folder", tmp_path / "b", source=str(tmp_path / "photos"), size=32, shard_mb=0.03, min_side=8)
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert a.keys() == b.keys() and all(a[name] == b[name] for name in a)


def test_two_at_once_are_told_apart(items, tmp_path):
    (tmp_path / "out/.prepare").mkdir(parents=True)
    code = "import fcntl, sys; f = open('out/train-00000.tar.tmp', 'wb'); f.write(b'begun'); f.flush()"
    code += "; fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process writes to .*out: let it, or set another out_dir"):
            make(items[:5], tmp_path / "out")
        assert (tmp_path / "out/train-00000.tar.tmp").read_bytes() == b"begun"
        other.stdin.close()
    assert make(items[:5], tmp_path / "out") == make(items[:5], tmp_path / "alone")
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_other_settings_another_source_and_foreign_shards_are_errors(items, tmp_path, capsys):
    out = tmp_path / "out"
    make(items[:30], out)
    make(iter(()), out)  # nothing is even asked of the source
    assert "already there" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was made with size=32, now it is 64: to start anew, remove"):
        make(items, out, size=64)
    shard = next(out.glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match="train-00000.tar is not the"):
        make(items[:30], out)
    (out / "meta.json").unlink()
    with pytest.raises(ValueError, match="of unknown origin"):
        make(items[:30], out)

    def broken_off(items):
        yield from items
        raise Stop

    out = tmp_path / "begun"
    with pytest.raises(Stop):
        make(broken_off(items), out, shard_mb=0.05)
    with pytest.raises(ValueError, match="the source has changed"):
        make(items[1:], out, shard_mb=0.05)
    with pytest.raises(ValueError, match="fewer images"):
        make(items[:5], out, shard_mb=0.05)


def test_who_starts_anew_as_told_keeps_nothing_of_before(items, tmp_path):
    """A classes.json or tokenizer of other settings would count for the new images."""
    out = tmp_path / "out"
    room.make(iter(items), types.SimpleNamespace(**COMMON | dict(out_dir=str(out), vocab_size=300)), ["a", "b", "c"])
    for pattern in re.findall(r"[\w*.]+", room.START_ANEW.removeprefix("to start anew, remove ")):
        for path in out.glob(pattern):
            path.unlink()
    make([{name: item[name] for name in ("key", "image", "label")} for item in items[:50]], out)
    assert Dataset(out, "all", 32).classes == [] and not (out / "bpe.tiktoken").exists()


def test_settings_that_make_no_sense_are_errors(tmp_path):
    for wrong in (dict(crop="middle"), dict(quality=101), dict(shard_mb=0), dict(size=0), dict(vocab_size=100)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*set "):
            make([], tmp_path / "out", **wrong)


def test_seen_is_a_set(monkeypatch):
    rng = np.random.default_rng(0)
    values = [int(v) for v in rng.integers(0, 2**63, 5000)]
    seen, true = room.Seen(), set()
    seen.update(values[:100])
    true.update(values[:100])
    for k, value in enumerate(v for pair in zip(values, values[::-1]) for v in pair):
        assert seen.add(value) == (value not in true)
        true.add(value)
        if k % 700 == 0:
            seen.update(())


def test_captions_are_counted_and_a_tokenizer_is_trained(tmp_path):
    from text import make_tokenizer

    texts = ["a cat on a mat", "кот на коврике", "猫がマットの上にいる", "12 34", "a cat"]
    items = [dict(key=str(i), image=encoded(i), split="train", text=texts[: i + 1]) for i in range(5)]
    meta = make(items, tmp_path / "out", vocab_size=280)
    words = sorted(len(text.split()) for item in items for text in item["text"])
    assert meta["captions"]["words"] == {"least": 1, "5 %": 1, "median": words[7], "95 %": 5, "most": 5}
    assert meta["captions"]["an image"]["most"] == 5 and meta["captions"]["an image"]["median"] == 3
    shares = meta["captions"]["scripts"]
    assert shares["LATIN"] == 40 and shares["CYRILLIC"] == round(400 / 15, 2) and shares["none"] == round(200 / 15, 2)
    assert shares["HIRAGANA"] == 20
    tokenizer = make_tokenizer(str(tmp_path / "out" / "bpe.tiktoken"))
    table = (tmp_path / "out" / "bpe.tiktoken").read_text().splitlines()
    assert base64.b64decode(table[0].split()[0]) == b"\x00" and len(table) == tokenizer.n_vocab == 280
    assert (
        len(tokenizer.encode("a cat on a mat")) < len("a cat on a mat")
        and tokenizer.decode(tokenizer.encode("猫")) == "猫"
    )
    assert Dataset(tmp_path / "out", "all", 32)[4]["text"] == texts


# -- downloads ---------------------------------------------------------------------------------------------------------


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


def test_downloads_continue_where_they_broke_and_are_checked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    data = np.random.default_rng(0).bytes(5000)
    server.files["/a"], server.cuts = data, 3
    md5, path = "md5:" + hashlib.md5(data).hexdigest(), str(tmp_path / "raw" / "a")
    room.fetch(f"{server.url}/a", path, md5)
    assert Path(path).read_bytes() == data
    assert server.asked == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]
    room.fetch(f"{server.url}/a", path, md5)
    assert len(server.asked) == 4  # it is there
    Path(path).write_bytes(b"other")
    room.fetch(f"{server.url}/a", path, md5)
    assert Path(path).read_bytes() == data
    server.ranges, server.cuts = False, 1  # begins anew where the server cannot continue
    room.fetch(f"{server.url}/a", str(tmp_path / "b"), md5)
    assert (tmp_path / "b").read_bytes() == data
    with pytest.raises(ValueError, match="not the original file"):
        room.fetch(f"{server.url}/a", str(tmp_path / "c"), "md5:" + "0" * 32)
    assert not list(tmp_path.glob("c*"))
    with pytest.raises(ValueError, match="404"):
        room.fetch(f"{server.url}/nothing", str(tmp_path / "d"))
    server.ranges, server.cuts = True, 9
    with pytest.raises(ValueError, match="2000 of 5000 bytes: run again to continue"):
        room.fetch(f"{server.url}/a", str(tmp_path / "e"), md5, tries=2)
    server.cuts = 0
    room.fetch(f"{server.url}/a", str(tmp_path / "e"), md5)
    assert (tmp_path / "e").read_bytes() == data and server.asked[-1] == "bytes=2000-"


# -- every data set ----------------------------------------------------------------------------------------------------


def write_parquet(path, rows, names=None, group=7):
    """rows: dicts; names: {column: class names}, kept as the hub does it."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.Table.from_pylist(rows)
    features = {column: {"names": list(of), "_type": "ClassLabel"} for column, of in (names or {}).items()}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def image_cell(seed, **options):
    return {"bytes": encoded(seed, **options), "path": f"{seed}.jpg"}


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_folder_of_classes(tmp_path):
    source = tmp_path / "photos"
    write_folder(source)
    meta = prepare("folder", tmp_path / "out", source=str(source), size=32)
    for split in ("train", "val"):
        raw, made = Dataset(source, split, 32), Dataset(tmp_path / "out", split, 32)
        assert len(raw) == len(made) == meta["splits"][split] and raw.classes == made.classes == ["cats", "dogs"]
        for i in range(0, len(raw), 50):
            assert raw[i]["label"] == made[i]["label"]
            assert (raw[i]["image"] - made[i]["image"]).abs().mean() < 0.02
    assert not (tmp_path / "out" / "bpe.tiktoken").exists()


@pytest.mark.parametrize("form", ["metadata", "tar", "parquet"])
def test_folder_of_captions(form, tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    texts = [[f"picture {i}", "another caption"] for i in range(30)]
    objects = [dict(bbox=[[4 + i % 3, 6, 20, 20]], categories=["thing"]) for i in range(30)]
    if form == "metadata":
        for i in range(30):
            (source / f"{i:02d}.jpg").write_bytes(encoded(i))
        lines = [dict(file_name=f"{i:02d}.jpg", text=texts[i], objects=objects[i]) for i in range(30)]
        (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    elif form == "tar":
        with tarfile.open(source / "a.tar", "w") as tar:
            for i in range(30):
                add(tar, f"{i:02d}.jpg", encoded(i))
                add(tar, f"{i:02d}.json", json.dumps(dict(text=texts[i], objects=objects[i])).encode())
    else:
        rows = [dict(image=image_cell(i), text=texts[i], objects=objects[i]) for i in range(30)]
        write_parquet(source / "a.parquet", rows)
    prepare("folder", tmp_path / "out", source=str(source), size=20, vocab_size=300, shard_mb=0.02)
    for split in ("train", "val"):
        raw, made = Dataset(source, split, 20), Dataset(tmp_path / "out", split, 20)
        assert len(raw) == len(made)
        for i in range(len(raw)):
            assert raw.meta(i)["text"] == made.meta(i)["text"] and len(raw.boxes(i)) == 1
            assert np.allclose(raw.boxes(i)[0][1:], made.boxes(i)[0][1:], atol=0.02)
    assert (tmp_path / "out" / "bpe.tiktoken").exists()


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("train", "test"), ("train", "validation")])
def test_folder_keeps_every_split(splits, tmp_path):
    for k, split in enumerate(splits):
        (tmp_path / "src" / split).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "src" / split / f"{i}.jpg").write_bytes(encoded(3 * k + i))
    meta = prepare("folder", tmp_path / "out", source=str(tmp_path / "src"), size=32)
    assert meta["splits"] == dict.fromkeys(["train", "val", "test"][: len(splits)], 3)


def test_folder_says_that_maps_are_left_out(tmp_path, capsys):
    (tmp_path / "src").mkdir()
    for i in range(3):
        (tmp_path / "src" / f"{i}.jpg").write_bytes(encoded(i))
        Image.new("L", (48, 40), i).save(tmp_path / "src" / f"{i}.map.png")
    assert prepare("folder", tmp_path / "out", source=str(tmp_path / "src"), size=32)["count"] == 3
    assert "the semantic maps in " in capsys.readouterr().out


def test_folder_drops_an_image_whose_caption_does_not_read(tmp_path):
    (tmp_path / "photos").mkdir()
    with tarfile.open(tmp_path / "photos" / "a.tar", "w") as tar:
        for i in range(9):
            add(tar, f"{i}.jpg", encoded(i))
            add(tar, f"{i}.json", b'{"text": ["half' if i == 4 else json.dumps(dict(text=[str(i)])).encode())
    meta = prepare("folder", tmp_path / "out", source=str(tmp_path / "photos"), size=32, vocab_size=0)
    assert meta["count"] == 8 and meta["dropped"] == dict(broken=1)
    assert "a/4: its caption does not read" in (tmp_path / "out" / "dropped.jsonl").read_text()


@pytest.mark.parametrize("name", ["cifar10", "celeba", "imagenet"])
def test_a_damaged_archive_is_told_in_one_line(name, tmp_path, monkeypatch):
    files = dict(cifar10="cifar-10-binary.tar.gz", celeba="img_align_celeba.zip", imagenet="ILSVRC2012_img_train.tar")
    (tmp_path / files[name]).write_bytes(b"\x1f\x8b\x08" + bytes(range(200)))
    module = importlib.import_module(f"data.{name}.prepare")
    source = tmp_path / files[name] if name == "cifar10" else tmp_path
    monkeypatch.setattr(
        sys, "argv", ["prepare.py", f"--source={source}", f"--out_dir={tmp_path / 'out'}", "--workers=0"]
    )
    with pytest.raises(SystemExit) as stopped:
        room.run(module.prepare, dict(vars(module)))
    assert "is damaged" in stopped.value.code and str(tmp_path) in stopped.value.code and "\n" not in stopped.value.code


def test_folder_refuses_what_it_would_spoil(tmp_path):
    write_folder(tmp_path / "photos", 4)
    with pytest.raises(ValueError, match="is inside the source"):
        prepare("folder", tmp_path / "photos" / "out", source=str(tmp_path / "photos"))
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "images.npy", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="train on it as it is"):
        prepare("folder", tmp_path / "out", source=str(tmp_path / "npy"))


def test_cifar10_binary(tmp_path):
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
    with pytest.raises(ValueError, match="data_batch_1.bin has 4000 bytes, no multiple of 3073"):
        prepare("cifar10", tmp_path / "bad", source=str(tmp_path / "short.tar.gz"))


SYNSETS = {"n01440764": "tench, Tinca tinca", "n02102040": "English springer", "n03000684": "chain saw, chainsaw"}


@pytest.fixture
def imagenet(tmp_path):
    """The three tar files, with 3 classes of 5 and 6 validation photos."""
    source = tmp_path / "ilsvrc"
    source.mkdir()
    numbers = {"n02102040": 1, "n01440764": 2, "n03000684": 3}  # ILSVRC2012_ID is in another order
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

    def kit(kind):
        if kind == "kaggle":
            (source / "LOC_synset_mapping.txt").write_text("".join(f"{s} {words}\n" for s, words in SYNSETS.items()))
            of_number = {n: s for s, n in numbers.items()}
            rows = [f"ILSVRC2012_val_{i + 1:08d},{of_number[n]} 1 2 3 4\n" for i, n in enumerate(truth)]
            (source / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))
        else:
            scipy_io = pytest.importorskip("scipy.io")
            kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")]
            synsets = np.array([(n, s, SYNSETS[s], "a thing") for s, n in numbers.items()], dtype=kinds)
            file = io.BytesIO()
            scipy_io.savemat(file, {"synsets": synsets[:, None]})
            with tarfile.open(source / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
                add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", file.getvalue())
                lines = "".join(f"{n}\n" for n in truth).encode()
                add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines)
        return str(source)

    return kit


@pytest.mark.parametrize("kind", ["kaggle", "devkit"])
def test_imagenet_tars(kind, imagenet, tmp_path):
    prepare("imagenet", tmp_path / "out", source=imagenet(kind), size=32)
    train, val = (Dataset(tmp_path / "out", split, 32) for split in ("train", "val"))
    assert train.classes == list(SYNSETS.values()) and len(train) == 15 and len(val) == 6
    found = records(tmp_path / "out")
    for c, synset in enumerate(SYNSETS):
        split, record, data = found[f"{synset}/{synset}_3"]
        assert split == "train" and record["label"] == c
        assert np.allclose(colours(Image.open(io.BytesIO(data))), colours(picture(10 * c + 3)), atol=0.05)
    assert [found[f"val/ILSVRC2012_val_{i:08d}"][1]["label"] for i in range(1, 7)] == [2, 1, 0, 0, 1, 2]
    some = prepare("imagenet", tmp_path / "some", source=imagenet(kind), size=32, classes="chain saw,n01440764")
    assert some["images_of_class"] == {"tench, Tinca tinca": 7, "chain saw, chainsaw": 7}
    half = prepare("imagenet", tmp_path / "half", source=imagenet(kind), size=32, fraction=0.5)
    assert 2 < half["splits"]["train"] < 13 and half["splits"]["val"] == 6
    with pytest.raises(ValueError, match="class 'zebra' is not there"):
        prepare("imagenet", tmp_path / "no", source=imagenet(kind), classes="zebra")
    with pytest.raises(ValueError, match="ILSVRC2012_img_train.tar is not the published file"):
        prepare("imagenet", tmp_path / "no", source=imagenet(kind), verify=True)


def test_imagenet_parquet(tmp_path):
    names = list(SYNSETS.values())
    for part, n in (("train-00000-of-00002", 10), ("train-00001-of-00002", 8), ("validation-00000-of-00001", 5)):
        rows = [dict(image=image_cell(len(part) * n + i), label=i % 3) for i in range(n)]
        write_parquet(tmp_path / "hub" / "data" / f"{part}.parquet", rows, dict(label=names), group=3)
    rows = [dict(image=image_cell(i), label=-1) for i in range(3)]
    write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", rows, dict(label=names))
    meta = prepare("imagenet", tmp_path / "out", source=str(tmp_path / "hub"), size=32, classes="1,2")
    assert meta["splits"] == {"train": 6 + 5, "val": 3} and Dataset(tmp_path / "out").classes == names[1:]
    found = records(tmp_path / "out")
    assert found["train-00001-of-00002/000007"][1]["label"] == 0 and "train-00001-of-00002/000006" not in found


def test_imagenet_parquet_without_names_or_labels(tmp_path):
    rows = [dict(image=image_cell(i), label=(0, None, 2)[i % 3]) for i in range(6)]
    write_parquet(tmp_path / "gaps" / "train-0.parquet", rows)
    meta = prepare("imagenet", tmp_path / "out", source=str(tmp_path / "gaps"), size=32)
    assert meta["count"] == 4 and meta["images_of_class"] == {"0": 2, "2": 2}
    write_parquet(tmp_path / "words" / "train-0.parquet", [dict(image=image_cell(0), label="cat")])
    with pytest.raises(ValueError, match="words has no numbers for labels: take the hub's own files"):
        prepare("imagenet", tmp_path / "no", source=str(tmp_path / "words"))


def celeba_lists(folder, kind="txt"):
    folder.mkdir(parents=True, exist_ok=True)
    names, comma = ["Male", "Smiling", "Wavy_Hair"], "," if kind == "csv" else " "
    rows = [f"{i + 1:06d}.jpg" + "".join(f"{comma}{1 if (i >> k) & 1 else -1}" for k in range(3)) for i in range(8)]
    head = ["image_id," + ",".join(names)] if kind == "csv" else ["8", " ".join(names)]
    (folder / f"list_attr_celeba.{kind}").write_text("\n".join([*head, *rows]) + "\n")
    rows = [f"{i + 1:06d}.jpg{comma}{(0, 0, 0, 0, 0, 1, 1, 2)[i]}" for i in range(8)]
    head = ["image_id,partition"] if kind == "csv" else []
    (folder / f"list_eval_partition.{kind}").write_text("\n".join([*head, *rows]) + "\n")


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_celeba(kind, tmp_path):
    source = tmp_path / "celeba"
    celeba_lists(source / "Anno", kind)
    if kind == "txt":
        with zipfile.ZipFile(source / "img_align_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(8):
                archive.writestr(f"img_align_celeba/{i + 1:06d}.jpg", encoded(i, width=36, height=44))
    else:
        (source / "img_align_celeba").mkdir()
        for i in range(8):
            (source / "img_align_celeba" / f"{i + 1:06d}.jpg").write_bytes(encoded(i, width=36, height=44))
    meta = prepare("celeba", tmp_path / "out", source=str(source), size=32, attribute="Smiling")
    assert meta["splits"] == {"train": 5, "val": 2, "test": 1}
    found = records(tmp_path / "out")
    assert found["000007"][0] == "val" and found["000007"][1]["text"] == ["smiling, wavy hair"]
    assert [found[f"{i:06d}"][1]["label"] for i in range(1, 9)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert Image.open(io.BytesIO(found["000003"][2])).size == (32, 32)
    assert len(Dataset(tmp_path / "out", "test", 32)) == 1
    with pytest.raises(
        ValueError, match="attribute 'Tall' is not known: list_attr_celeba has Male, Smiling, Wavy_Hair"
    ):
        prepare("celeba", tmp_path / "no", source=str(source), attribute="Tall")
    for path in (source / "Anno").glob("list_eval_partition.*"):
        path.write_text("".join(f"{i:06d}.jpg {i - 2}\n" for i in range(1, 9)))
    with pytest.raises(ValueError, match="list_eval_partition has 000001.jpg in no part of 0, 1, 2: fetch that again"):
        prepare("celeba", tmp_path / "bad", source=str(source))


def test_celebahq(tmp_path):
    source = tmp_path / "CelebAMask-HQ"
    (source / "CelebA-HQ-img").mkdir(parents=True)
    (source / "CelebAMask-HQ-mask-anno" / "0").mkdir(parents=True)
    (source / "CelebAMask-HQ-mask-anno" / "0" / "00000_hair.png").write_bytes(encoded(0, "PNG"))
    for i in range(8):
        (source / "CelebA-HQ-img" / f"{i}.jpg").write_bytes(encoded(i, width=64, height=64))
    celeba_lists(tmp_path / "lists")
    attributes = (tmp_path / "lists" / "list_attr_celeba.txt").read_text().splitlines()
    rows = [f"{i}.jpg  {row.split(' ', 1)[1]}" for i, row in enumerate(attributes[2:])]
    (source / "CelebAMask-HQ-attribute-anno.txt").write_text("\n".join([*attributes[:2], *rows]) + "\n")
    prepare("celebahq", tmp_path / "plain", source=str(source), size=32)
    assert records(tmp_path / "plain")["3"][1]["text"] == ["male, smiling"] and len(records(tmp_path / "plain")) == 8
    shutil.copy(tmp_path / "lists" / "list_eval_partition.txt", source)
    lines = ["idx  orig_idx  orig_file"] + [f"{i}  {7 - i}  {8 - i:06d}.jpg" for i in range(8)]
    (source / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines) + "\n")
    meta = prepare("celebahq", tmp_path / "out", source=str(source), size=32)
    assert meta["splits"] == {"train": 5, "val": 2, "test": 1}
    assert [records(tmp_path / "out")[str(i)][0] for i in range(4)] == ["test", "val", "val", "train"]


def test_ffhq(tmp_path):
    for number in (0, 1, 59999, 60000, 69999):
        path = tmp_path / "ffhq" / "images1024x1024" / f"{number // 1000 * 1000:05d}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, "PNG", width=64, height=64))
    (tmp_path / "ffhq" / "LICENSE.txt").write_text("")
    meta = prepare("ffhq", tmp_path / "out", source=str(tmp_path / "ffhq"), size=32)
    assert meta["splits"] == {"train": 3, "val": 2}
    assert np.allclose(colours(Dataset(tmp_path / "out", "val", 32)[1]["image"]), colours(picture(69999)), atol=0.06)
    (tmp_path / "ffhq" / "face.png").write_bytes(encoded(1, "PNG"))
    with pytest.raises(ValueError, match="face.png is not named by its number"):
        prepare("ffhq", tmp_path / "no", source=str(tmp_path / "ffhq"))


def test_lsun(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    (tmp_path / "lsun").mkdir()
    for k, (name, n) in enumerate((("bedroom_train", 12), ("bedroom_val", 3), ("tower_train", 5), ("tower_val", 2))):
        with lmdb.open(str(tmp_path / "lsun" / f"{name}_lmdb"), map_size=2**22) as env, env.begin(write=True) as t:
            for i in range(n):
                t.put(hashlib.sha1(f"{name}{i}".encode()).hexdigest().encode(), encoded(50 * k + i, "WEBP", quality=90))
    meta = prepare("lsun", tmp_path / "out", source=str(tmp_path / "lsun"), size=32)
    assert meta["splits"] == {"train": 17, "val": 5} and meta["images_of_class"] == {"bedroom": 15, "tower": 7}
    key = "tower/" + hashlib.sha1(b"tower_train3").hexdigest()
    split, record, data = records(tmp_path / "out")[key]
    assert split == "train" and record["label"] == 1
    assert np.allclose(colours(Image.open(io.BytesIO(data))), colours(picture(103)), atol=0.06)
    meta = prepare("lsun", tmp_path / "some", source=str(tmp_path / "lsun"), size=32, categories="tower", fraction=0.5)
    assert 0 < meta["splits"]["train"] < 5 and meta["splits"]["val"] == 2
    with pytest.raises(ValueError, match="has no kitchen_train_lmdb, it has bedroom, tower"):
        prepare("lsun", tmp_path / "no", source=str(tmp_path / "lsun"), categories="kitchen")


def test_wikiart(tmp_path):
    names = dict(
        artist=["Unknown Artist", "claude-monet"], genre=["portrait", "Unknown Genre"], style=["Cubism", "Pop_Art"]
    )
    rows = [dict(image=image_cell(i), artist=i % 2, genre=i // 2 % 2, style=i // 4 % 2) for i in range(8)]
    write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", rows, names, group=3)
    meta = prepare("wikiart", tmp_path / "out", source=str(tmp_path / "hub"), size=32, min_side=8)
    found = records(tmp_path / "out")
    texts = [found[f"train-00000-of-00001/{i:06d}"][1]["text"][0] for i in range(8)]
    assert texts[:4] == [
        "portrait, cubism",
        "portrait by claude monet, cubism",
        "painting, cubism",
        "painting by claude monet, cubism",
    ]
    assert found["train-00000-of-00001/000005"][1]["artist"] == "claude-monet"
    assert meta["images_of_class"] == {"Cubism": 4, "Pop_Art": 4}
    meta = prepare("wikiart", tmp_path / "artist", source=str(tmp_path / "hub"), size=32, min_side=8, label="artist")
    assert list(meta["images_of_class"]) == names["artist"]
    write_parquet(tmp_path / "other" / "a.parquet", [dict(image=image_cell(0), label=1)])
    with pytest.raises(ValueError, match="has no column 'style', it has image, label"):
        prepare("wikiart", tmp_path / "no", source=str(tmp_path / "other"))


def test_art500k(tmp_path):
    source = tmp_path / "img"
    files = {
        "Art Movement/Cubism/Guitar Player##abc.jpg": encoded(1, width=80, height=70),
        "Art Movement/Pop Art/Soup##def.jpg": encoded(2, width=80, height=70),
        "Artists1/Picasso/Guitar Player##abc.jpg": encoded(1, width=80, height=70),  # the same work again
        "Artists1/Picasso/Blue_Room##ghi.jpg": encoded(3, width=80, height=70),
        "Medium/Drawing/Broken##jkl.jpg": encoded(4, width=80, height=70)[:600],
    }
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    meta = prepare("art500k", tmp_path / "out", source=str(source), size=32)
    assert meta["count"] == 3 and meta["dropped"] == {"broken": 1, "duplicate": 1}
    found = {record["text"][0]: record.get("label") for _, record, _ in records(tmp_path / "out").values()}
    assert found == {"Guitar Player, Cubism": 0, "Soup, Pop Art": 1, "Blue Room, Picasso": None}
    with pytest.raises(ValueError, match="has no group 'Genre' with images, it has Art Movement, Artists1, Medium"):
        prepare("art500k", tmp_path / "no", source=str(source), group="Genre")


def open_images(source):
    for split, ids in (("train", ["0a", "0b", "0c", "0d"]), ("validation", ["1a", "1b"])):
        for name in ("data", "labels", "metadata"):
            (source / split / name).mkdir(parents=True)
        for i, key in enumerate(ids):
            (source / split / "data" / f"{key}.jpg").write_bytes(encoded(len(split) + i, width=128, height=96))
        (source / split / "metadata" / "classes.csv").write_text("LabelName,DisplayName\n/m/01yrx,Cat\n/m/0bt9lr,Dog\n")
        head = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,"
        head += "IsInside\n"
        rows = [f"{key},xclick,/m/01yrx,1,0.25,0.75,0.5,1.0,0,0,0,0,0\n" for key in [*ids, "elsewhere"]]
        rows.append(f"{ids[0]},xclick,/m/0bt9lr,1,0,0.5,0,0.5,0,0,0,0,0\n")
        (source / split / "labels" / "detections.csv").write_text(head + "".join(rows))
    lines = [
        dict(image_id="0b", caption="A cat. "),
        dict(image_id="0b", caption="It sits."),
        dict(image_id="9", caption="x"),
    ]
    (source / "train" / "labels" / "narratives_captions.jsonl").write_text("\n".join(map(json.dumps, lines)))


def check_open_images(out, meta):
    assert meta["splits"] == {"train": 4, "val": 2}
    train = Dataset(out, "train", 32)
    assert train.object_classes == ["Cat", "Dog"] and [len(train.boxes(i)) for i in range(4)] == [2, 1, 1, 1]
    # of 128 x 96 the middle 96 x 96 is cut: x 32..96 of 16..112
    assert np.allclose(train.boxes(1)[0][1:], [1 / 6, 0.5, 5 / 6, 1], atol=0.02)
    assert train[1]["text"] == ["A cat.", "It sits."] and train[2]["text"] == []


def test_openimages(tmp_path, monkeypatch):
    open_images(tmp_path / "open-images-v7")
    meta = prepare("openimages", tmp_path / "out", source=str(tmp_path / "open-images-v7"), size=32)
    check_open_images(tmp_path / "out", meta)
    # through FiftyOne, which is not installed: something with the two functions that are called
    asked, zoo = [], types.ModuleType("fiftyone.zoo")

    def download_zoo_dataset(name, split, **options):
        asked.append((name, split, options))
        return None, str(tmp_path / "open-images-v7")

    zoo.download_zoo_dataset = download_zoo_dataset
    monkeypatch.setitem(sys.modules, "fiftyone", types.ModuleType("fiftyone"))
    monkeypatch.setitem(sys.modules, "fiftyone.zoo", zoo)
    meta = prepare("openimages", tmp_path / "zoo", download=True, size=32, n_train=4, n_val=2, only="Cat, Dog")
    check_open_images(tmp_path / "zoo", meta)
    both = dict(label_types=["detections"], classes=["Cat", "Dog"])
    assert asked == [
        ("open-images-v7", "train", both | dict(max_samples=4)),
        ("open-images-v7", "validation", both | dict(max_samples=2)),
    ]
    # the zoo's folder keeps the photos of other classes that an earlier call fetched
    meta = prepare("openimages", tmp_path / "dogs", download=True, size=32, n_train=4, n_val=2, only="Dog")
    assert meta["splits"] == {"train": 1, "val": 1} and list(records(tmp_path / "dogs")) == ["0a", "1a"]
    with pytest.raises(ValueError, match="has neither train/data nor validation/data"):
        prepare("openimages", tmp_path / "no", source=str(tmp_path / "out"))


def img2dataset_output(folder, urls=20):
    """Two shards as img2dataset writes them, with a dead link in five."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            alive = [i for i in range(urls // 2) if i % 5]
            for i in alive:
                key, text = f"{shard:05d}{i:04d}", f"a caption, number {shard} {i}"
                add(tar, f"{key}.jpg", encoded(100 * shard + i, width=80, height=70))
                add(tar, f"{key}.txt", text.encode())
                record = dict(
                    caption=text, url=f"http://x/{key}", key=key, status="success", NSFW=("UNLIKELY", "NSFW")[i == 7]
                )
                add(tar, f"{key}.json", json.dumps(record | dict(similarity=0.3 + i / 100)).encode())
        stats = dict(
            count=urls // 2, successes=len(alive), failed_to_download=urls // 2 - len(alive), failed_to_resize=0
        )
        stats["status_dict"] = {"success": len(alive), "HTTP Error 404: Not Found": urls // 2 - len(alive)}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
        (folder / f"{shard:05d}.parquet").write_bytes(b"a table beside the shard")


def fake_img2dataset(monkeypatch):
    """The one function that is called, as img2dataset has it: it writes shards, and keeps what it was asked."""
    module, asked = types.ModuleType("img2dataset"), []

    def download(url_list, output_folder, **options):
        asked.append(dict(options, url_list=url_list, output_folder=output_folder))
        img2dataset_output(Path(output_folder))

    module.download = download
    monkeypatch.setitem(sys.modules, "img2dataset", module)
    return asked


LINKS = dict(links=20, images=16, not_downloaded=4, not_resized=0, reasons={"HTTP Error 404: Not Found": 4})


def test_laion400m(tmp_path, monkeypatch, capsys):
    asked, out = fake_img2dataset(monkeypatch), tmp_path / "out"
    (tmp_path / "lists").mkdir()
    meta = prepare("laion400m", out, urls=str(tmp_path / "lists"), size=32, vocab_size=300, min_similarity=0.32)
    assert "20 links: 16 images, 4 lost (20.0 %)" in capsys.readouterr().out
    assert meta["links"] == LINKS and meta["count"] == 12 and meta["dropped"] == dict(unlike=2, unsafe=2)
    assert asked[0]["url_col"] == "URL" and asked[0]["caption_col"] == "TEXT" and asked[0]["image_size"] == 32
    assert asked[0]["resize_mode"] == "keep_ratio" and asked[0]["output_format"] == "webdataset"
    assert len(Dataset(out, "all", 32)) == 12  # .fetched is not seen
    assert len(Dataset(out / ".fetched", "all", 32)) == 16  # unless it is asked for
    _, record, _ = records(out)["000010003"]
    assert record["text"] == ["a caption, number 1 3"] and record["url"] == "http://x/000010003"
    # whoever starts anew with another size or list would get what was fetched with the old one
    for path in [*out.glob("*.tar"), out / "meta.json"]:
        path.rename(tmp_path / path.name)
    (tmp_path / "more").mkdir()
    for changed, said in (({"size": 64}, "size=32, now it is 64"), ({"urls": str(tmp_path / "more")}, "urls=.*lists")):
        with pytest.raises(
            ValueError, match=rf"\.fetched was fetched with {said}.*: remove it, or set another out_dir"
        ):
            prepare("laion400m", out, **dict(urls=str(tmp_path / "lists"), size=32, vocab_size=300) | changed)
    for name in ("train-00000.tar", "meta.json"):
        (tmp_path / name).rename(out / name)
    shutil.rmtree(out / ".fetched")
    prepare("laion400m", out, urls=str(tmp_path / "lists"), size=32, vocab_size=300, min_similarity=0.32)
    assert len(asked) == 1 and "already there" in capsys.readouterr().out


def test_laion400m_records_of_another_kind(tmp_path):
    (tmp_path / "fetched").mkdir()
    with tarfile.open(tmp_path / "fetched" / "00000.tar", "w") as tar:
        for i, text in enumerate((b"[]", b"5", b"{bad", b'{"caption": ["a", null], "similarity": "0.3"}')):
            add(tar, f"{i:05d}.jpg", encoded(i, width=80, height=70))
            add(tar, f"{i:05d}.json", text)
    prepare("laion400m", tmp_path / "out", fetched=str(tmp_path / "fetched"), size=32, vocab_size=0)
    texts = [record["text"] for _, record, _ in records(tmp_path / "out").values()]
    assert texts == [[], [], [], ["a"]]


@pytest.mark.parametrize("line", ["a caption\thttp://x/a.jpg", "http://x/a.jpg\ta caption"])
def test_conceptual_captions(line, tmp_path, monkeypatch):
    asked, out = fake_img2dataset(monkeypatch), tmp_path / "out"
    (tmp_path / "list.tsv").write_text(line + "\n")
    meta = prepare("conceptual_captions", out, urls=str(tmp_path / "list.tsv"), size=32, vocab_size=300)
    assert meta["links"] == LINKS and meta["count"] == 16 and (out / "bpe.tiktoken").exists()
    head = "\t".join("url" if word.startswith("http") else "caption" for word in line.split("\t"))
    assert Path(asked[0]["url_list"]).read_text() == f"{head}\n{line}\n" and asked[0]["input_format"] == "tsv"
    (tmp_path / "list.tsv").write_text("no tab\n")
    with pytest.raises(ValueError, match="does not begin with a caption, a tab and a URL"):
        prepare("conceptual_captions", tmp_path / "no", urls=str(tmp_path / "list.tsv"))
    meta = prepare("conceptual_captions", tmp_path / "again", fetched=str(out / ".fetched"), size=32, vocab_size=0)
    assert meta["count"] == 16


SETS = (
    "cifar10 imagenet celeba celebahq ffhq lsun wikiart art500k openimages laion400m conceptual_captions folder".split()
)


@pytest.mark.parametrize("name", SETS)
def test_bad_sources_are_told_in_one_line(name, tmp_path):
    module, cfg = settings(name, out_dir=str(tmp_path / "out"))
    by_url = hasattr(cfg, "urls")
    with pytest.raises(ValueError, match="set urls|source is not set: --source="):
        module.prepare(cfg)
    setattr(cfg, "fetched" if by_url else "source", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="set"):
        module.prepare(cfg)
    (tmp_path / "empty").mkdir()
    setattr(cfg, "fetched" if by_url else "source", str(tmp_path / "empty"))
    with pytest.raises((ValueError, OSError)) as error:
        module.prepare(cfg)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    for word in ("Licence", "Size", "Time", "On disk"):
        assert word in module.__doc__ or word.lower() in module.__doc__, word


def test_the_hub_keeps_its_files_below_hf_home(tmp_path):
    """As the hub's own library lays them out, and no network."""
    pytest.importorskip("huggingface_hub")
    folder = tmp_path / "home" / "hub" / "datasets--huggan--wikiart"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    names = dict(artist=["Unknown Artist"], genre=["portrait"], style=["Cubism"])
    rows = [dict(image=image_cell(i, width=80, height=70), artist=0, genre=0, style=0) for i in range(4)]
    write_parquet(folder / "snapshots" / "abc" / "data" / "train-00000-of-00001.parquet", rows, names)
    environment = os.environ | dict(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    command = [sys.executable, str(ROOT / "data/wikiart/prepare.py"), "--download=True", "--workers=0"]
    command.append(f"--out_dir={tmp_path / 'out'}")
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert len(records(tmp_path / "out")) == 4
    command[-1] = f"--out_dir={tmp_path / 'other'}"
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment | dict(HF_HOME=str(tmp_path / "no"))
    )
    assert result.returncode == 1 and "huggan/wikiart did not come" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["openimages", "laion400m", "lsun", "wikiart"])
def test_optional_tools_are_asked_for_with_their_command(name, tmp_path, monkeypatch):
    tool = dict(openimages="fiftyone", laion400m="img2dataset", lsun="lmdb", wikiart="huggingface_hub")[name]
    for module in (tool, f"{tool}.zoo"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    (tmp_path / "bedroom_train_lmdb").mkdir()
    wanted = dict(openimages=dict(download=True), laion400m=dict(urls=str(tmp_path)), wikiart=dict(download=True))
    with pytest.raises(ImportError, match=f"needs {tool}.*: pip install {tool}$"):
        prepare(name, tmp_path / "out", **wanted.get(name, dict(source=str(tmp_path))))


# -- real data ---------------------------------------------------------------------------------------------------------


def test_real_cifar10(test_data, tmp_path):
    (tmp_path / "some").mkdir()
    os.symlink(test_data / "cifar10" / "test-00000-of-00001.parquet", tmp_path / "some" / "test-00000-of-00001.parquet")
    meta = prepare("cifar10", tmp_path / "out", source=str(tmp_path / "some"))
    assert meta["splits"] == {"val": 10000} and set(meta["images_of_class"].values()) == {1000}
    raw, made = Dataset(test_data / "cifar10", "test", 32), Dataset(tmp_path / "out", "val", 32)
    for i in (0, 77, 9999):
        assert made[i]["label"] == raw[i]["label"] and torch.equal(made[i]["image"], raw[i]["image"])


def test_real_captions(test_data, tmp_path):
    source = test_data / "flickr8k_1000"
    meta = prepare("folder", tmp_path / "out", source=str(source), size=64, crop="center", vocab_size=2048)
    raw, made = (Dataset(path, "val", 64) for path in (source, tmp_path / "out"))
    assert len(raw) == len(made) == meta["splits"]["val"] and meta["count"] + sum(meta["dropped"].values()) == 1000
    for i in range(len(raw)):
        assert raw[i]["text"] == made[i]["text"] and len(made[i]["text"]) == 5
        assert (raw[i]["image"] - made[i]["image"]).abs().mean() < 0.03
    assert meta["captions"]["scripts"] == {"LATIN": 100.0}
