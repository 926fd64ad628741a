"""data/prepare.py, and every data set's prepare.py, on tiny data in each one's published layout."""

import base64
import functools
import gzip
import hashlib
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
import time
import types
import urllib
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image, ImageOps

from checkpoint import UserError
from configurator import Config, find_settings, keeps
from data import prepare as room
from data.bapps import prepare as bapps
from data.dataset import Dataset
from data.emoji import prepare as emoji
from data.mnist import prepare as mnist
from data.shapes import prepare as shapes
from text import make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
COMMON = dict(size=32, crop="none", quality=95, min_side=8, vocab_size=0, shard_mb=256.0, workers=0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # all paths of the tests are relative


def smooth(seed, width=48, height=40):
    """A smooth image, of a color that depends on the seed."""
    y, x = np.mgrid[0:height, 0:width]
    color = np.array([37 * seed % 200, 83 * seed % 200, 151 * seed % 200])
    pixels = color + 25 * (1 + np.sin((x / 9 + seed)[..., None]) * np.cos(y / 7)[..., None])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(seed, form="JPEG", width=48, height=40, **options):
    file = io.BytesIO()
    smooth(seed, width, height).save(file, form, **options)
    return file.getvalue()


def load(data):
    return Image.open(io.BytesIO(data))


def parquet(rows, names):
    """The bytes of a parquet file; names: {column: class names}, which the hub keeps in the schema."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    is_seed = lambda row: type(row.get("image")) is int  # noqa: E731
    rows = [row | {"image": dict(bytes=encoded(row["image"]))} if is_seed(row) else row for row in rows]
    features = {column: {"names": list(of), "_type": "ClassLabel"} for column, of in names.items()}
    file, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, file, row_group_size=3)
    return file.getvalue().to_pybytes()


def content(name, value):
    """The bytes of a file: a number is the seed of an image, a dict is an archive, a list holds rows or JSON lines."""
    if isinstance(value, int):
        return encoded(value, "PNG" if name.endswith(".png") else "JPEG")
    if isinstance(value, tuple) or name.endswith(".parquet"):
        return parquet(*value) if isinstance(value, tuple) else parquet(value, {})
    if isinstance(value, list):
        return "\n".join(map(json.dumps, value)).encode()
    file = io.BytesIO()
    if isinstance(value, np.ndarray):
        np.save(file, value)
    elif name.endswith(".zip"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in value.items():
                archive.writestr(member, content(member, data))
    elif isinstance(value, dict):
        with tarfile.open(fileobj=file, mode="w:gz" if name.endswith("gz") else "w") as tar:
            for member, data in value.items():
                info, data = tarfile.TarInfo(member), content(member, data)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    else:
        return value if isinstance(value, bytes) else value.encode()
    return file.getvalue()


def source(folder, files):
    """Write files, {name: what `content` takes}, below a folder; returns its path."""
    for name, value in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("_lmdb"):
            lmdb = pytest.importorskip("lmdb")
            with lmdb.open(str(path), map_size=2**22) as env, env.begin(write=True) as transaction:
                for key, seed in value.items():
                    transaction.put(key.encode(), encoded(seed, "WEBP", quality=90))
        else:
            path.write_bytes(value if isinstance(value, bytes) else content(name, value))
    return str(folder)


def settings_of(name):
    """{name: Setting} of a prepare script, as `run` has them."""
    more, own = find_settings(vars(room)), find_settings(vars(importlib.import_module(f"data.{name}.prepare")))
    return own if name in ("bapps", "emoji", "mnist", "shapes") else more | own


def prepare(name, out="out", **changed):
    """meta.json of what data/NAME/prepare.py makes of src/ with these settings."""
    cfg = {key: setting.default for key, setting in settings_of(name).items()}
    cfg |= dict(out_dir=str(out)) | {"fetched" if "urls" in cfg else "source": "src"}
    if "shard_mb" in cfg:
        cfg |= dict(workers=0, size=32, min_side=8)
    assert changed.keys() <= cfg.keys()
    importlib.import_module(f"data.{name}.prepare").prepare(Config(cfg | changed))
    meta = Path(out) / "meta.json"
    return json.loads(meta.read_text()) if meta.exists() else None


def pack(items, out="out", **changed):
    return room.pack(iter(items), Config(COMMON | dict(out_dir=str(out)) | changed))


def records(out="out"):
    """{own key: (split, record, image bytes)} of all shards, in their order."""
    found = {}
    for path in sorted(Path(out).glob("*.tar")):
        for _, image, record in room.read_shard(str(path)):
            found[record["key"]] = (path.name.split("-")[0], record, image.read())
    return found


def files_in(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.is_file()}


@pytest.fixture
def items():
    return [dict(key=f"k{i}", image=encoded(i), label=i % 3, text=[f"number {i}", "an image"]) for i in range(150)]


# --- data/prepare.py ---


def test_shards_hold_the_items_and_the_key_decides_the_split(items):
    meta = pack(items)
    held = {item["key"] for item in items if zlib.crc32(item["key"].encode()) % 100 == 0}
    assert held and meta["splits"] == {"train": 150 - len(held), "val": len(held)} and meta["count"] == 150
    for split in ("train", "val"):
        dataset = Dataset("out", split, 32)
        assert len(dataset) == meta["splits"][split]
        for i in range(0, len(dataset), 40):
            at = int(dataset.key(i).split("/")[1])  # the key in the shard is the position of the item
            sample, expected = dataset[i], np.asarray(smooth(at)) / 127.5 - 1
            assert (items[at]["key"] in held) == (split == "val")
            assert sample["label"] == items[at]["label"] and sample["text"] == items[at]["text"]
            assert np.allclose(sample["image"].mean((1, 2)), expected.mean((0, 1)), atol=0.05)


def test_resize_is_lanczos_on_the_short_side():
    for crop, box, side in (("none", (0, 0, 90, 60), (48, 32)), ("center", (15, 0, 75, 60), (32, 32))):
        pack([dict(key="a", image=encoded(3, "PNG", 90, 60))], crop, quality=0, crop=crop)
        _, record, data = records(crop)["a"]
        expected = smooth(3, 90, 60).crop(box).resize(side, Image.Resampling.LANCZOS)
        assert load(data).format == "PNG" and (record["width"], record["height"]) == (90, 60)
        assert np.abs(np.asarray(load(data), int) - np.asarray(expected, int)).max() <= 1


def test_images_turn_upright_and_boxes_move_with_the_pixels():
    small, grey, exif = encoded(1, width=30, height=20), io.BytesIO(), Image.Exif()
    Image.new("L", (20, 20), 77).save(grey, "PNG")
    exif[0x0112] = 6  # upright these are 128 x 64
    found = {form: encoded(2, form, 64, 128, exif=exif) for form in ("JPEG", "PNG", "TIFF", "WEBP")}
    found["shares"] = encoded(4, width=128, height=64)
    cat = dict(bbox=[[64, 32, 32, 16]], categories=["cat"])
    items = [dict(key=key, image=image, objects=cat) for key, image in found.items()]
    items[-1]["objects"] = cat | dict(bbox=[[0.5, 0.5, 0.25, 0.25]], unit="image")
    pack([*items, dict(key="small", image=small), dict(key="grey", image=grey.getvalue())], drop_duplicates=False)
    made = records()
    assert made["small"][2] == small and load(made["grey"][2]).mode == "RGB"
    for key in found:
        _, record, data = made[key]
        assert load(data).size == (64, 32) and (record["width"], record["height"]) == (128, 64)
        assert record["objects"] == dict(bbox=[[32, 16, 16, 8]], categories=["cat"]), key
    pack(items[:1], "square", crop="center")  # 128 x 64 -> its middle 64 x 64 -> 32 x 32
    assert records("square")["JPEG"][1]["objects"]["bbox"] == [[16, 16, 16, 8]]
    assert Dataset("square", "all", 32).boxes(0) == [("cat", 0.5, 0.5, 1.0, 0.75)]


def bomb(width, height):
    """A PNG of 100 bytes with a huge size in its header."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def fails():
    raise OSError("the disk is gone")


def test_broken_tiny_huge_and_duplicate_images_are_dropped_and_listed(items, capsys):
    bad = {
        "cut": (encoded(50, width=300, height=300)[:2000], "broken: image file is truncated"),
        "text": (b"hello", "broken: not an image"),
        "empty": (b"", "broken: 0 bytes"),
        "missing": ("nowhere.jpg", "broken: .*No such file"),
        "unread": (fails, "broken: the disk is gone"),
        "tiny": (encoded(51, width=7, height=90), "tiny: 7 x 90, less than min_side=8"),
        "short": (b"GIF", "tiny: 3 bytes, less than min_bytes=4"),
        "bomb": (bomb(30000, 30000), "huge"),
        "large": (bomb(10000, 9500), "huge: 10000 x 9500"),
        "twin": (items[4]["image"], "duplicate"),
    }
    mixed = items[:20] + [dict(key=key, image=image, split="train") for key, (image, _) in bad.items()]
    meta = pack(mixed, min_bytes=4)
    assert meta["count"] == 20 and meta["dropped"] == dict(broken=5, tiny=2, huge=2, duplicate=1)
    assert "20 train images in 1 shards; dropped: 5 broken, 2 tiny, 2 huge, 1 duplicate" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("out/dropped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == list(bad) and not records().keys() & bad.keys()
    for line in lines:
        assert re.match(bad[line["key"]][1], line["reason"]), line
    assert pack(mixed, "kept", drop_duplicates=False)["count"] == 21
    refused("no images left (dropped: 2 broken", pack, [dict(key=str(i), image=b"no") for i in range(2)], "none")


def die(image, record, **how):
    os._exit(9)


def test_a_worker_that_dies_is_one_line(items, monkeypatch):
    monkeypatch.setattr(room, "convert", die)
    refused("a worker process died (out of memory?); set fewer workers", pack, items, "dead", workers=1)


def test_killed_its_workers_end_and_it_continues_to_the_same_files(items):
    """The same as without an interruption and without workers."""
    items[30:30] = [dict(key="twin", image=items[7]["image"]), dict(key="bad", image=b"bad")]
    items[4]["image"] = lambda: encoded(4)  # only the main process calls it
    run = functools.partial(pack, shard_mb=0.05, vocab_size=300)

    def slowly():
        for item in items:
            time.sleep(0.002)
            yield item

    process = multiprocessing.get_context("fork").Process(target=lambda: run(slowly(), workers=2))
    process.start()
    until = time.time() + 60
    while len(list(Path("out").glob("train-*.tar"))) < 2 and time.time() < until:
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while any(Path(f"/proc/{child}/cwd").exists() for child in children):  # a dead one has none
        assert time.time() < until, "workers live on"
        time.sleep(0.02)
    assert len(children) >= 2 and "count" not in json.loads(Path("out/meta.json").read_text())
    run(items, workers=2)
    run(items, "once")
    found = {name: data for name, data in files_in("out").items() if not name.endswith(".tmp")}
    assert found == files_in("once")


def test_other_settings_other_sources_and_foreign_shards_are_refused(items, capsys):
    def broken_off():
        yield from items
        raise KeyboardInterrupt

    pack(items[:30])
    pack(iter(()), workers=3)  # workers change no shard
    assert "up to date" in capsys.readouterr().out
    refused("out: has other settings: size=32 then, 64 now; delete *.tar", pack, items, size=64)
    Path("out/train-00000.tar").unlink()
    pack(items[:30])  # a lost shard is made again
    assert Path("out/train-00000.tar").exists()
    Path("out/meta.json").unlink()
    refused("was not made by this command", pack, items[:30])
    with pytest.raises(KeyboardInterrupt):
        pack(broken_off(), "begun", shard_mb=0.05)
    refused("is not the one that this folder was begun with (item ", pack, items[1:], "begun", shard_mb=0.05)
    refused("is not the one that this folder was begun with (fewer items)", pack, items[:5], "begun", shard_mb=0.05)


def ranks_of(table):
    return {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in table.splitlines()}


def test_a_tokenizer_is_trained_on_the_captions():
    texts = ["a cat on a mat", "кот на коврике", "猫がマットの上にいる", "12 34", "a cat"]
    items = [dict(key=str(i), image=encoded(i), split="train", text=texts[: i + 1]) for i in range(5)]
    pack(items, vocab_size=280)
    table = Path("out/bpe.tiktoken").read_text()
    assert table == room.train_bpe([text for item in items for text in item["text"]], 280)
    assert list(ranks_of(table))[:256] == [bytes([b]) for b in range(256)] and len(ranks_of(table)) == 280
    tokenizer = make_tokenizer("out/bpe.tiktoken")
    assert len(tokenizer.encode("a cat on a mat")) < 14 and tokenizer.decode(tokenizer.encode("猫")) == "猫"
    assert Dataset("out", "all", 32)[4]["text"] == texts


def test_training_splits_text_as_tiktoken_will():
    """Trained on one text only, each piece of the trainer's split is a token, and tiktoken finds the same pieces."""
    text = "It's  42 over-long words, isn't it?  \n yes"
    Path("bpe.tiktoken").write_text(room.train_bpe([text] * 50, 512))
    tokenizer = make_tokenizer("bpe.tiktoken")
    pieces = ["It", "'s", " ", " 42", " over", "-", "long", " words", ",", " isn", "'t", " it", "?", "  \n", " yes"]
    assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == pieces


# --- downloads, archives ---


def test_downloads_continue_and_are_checked(monkeypatch):
    data, asked, cuts, ranges = np.random.default_rng(0).bytes(5000), [], [1000, 1000], True
    md5, fetch = hashlib.md5(data).hexdigest(), functools.partial(room.fetch, "http://x/a")

    def urlopen(request, timeout):
        """A server that hangs up after the bytes in `cuts`, and may ignore where to start."""
        asked.append(request.get_header("Range"))
        start = int((asked[-1] or "bytes=0-")[6:-1]) if ranges else 0
        if start >= len(data):
            raise urllib.error.HTTPError("http://x/a", 416, "nothing is left", {}, None)
        response = io.BytesIO(data[start : start + cuts.pop() if cuts else None])
        response.status, response.headers = 206 if start else 200, {"Content-Length": len(data) - start}
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for end in (1000, 2000):
        refused(f"after {end} of 5000 bytes); run again to continue", fetch, "raw/a", md5)
    for _ in range(2):  # then it is there
        fetch("raw/a", md5)
    assert asked == [None, "bytes=1000-", "bytes=2000-"]
    source("", {"raw/a": "another", "b.part": data, "c.part": data[:10]})
    fetch("raw/a", md5)
    fetch("b", md5)  # killed between the last byte and the rename
    ranges = False
    fetch("c", md5)
    assert all(Path(name).read_bytes() == data for name in ("raw/a", "b", "c"))
    refused("not the published one", fetch, "d", "0" * 32)
    assert not list(Path().glob("d*"))
    monkeypatch.undo()
    refused("save the file as e yourself", room.fetch, "http://127.0.0.1:1/e", "e", "")


def test_hostile_archives_write_nothing_outside_and_are_refused(monkeypatch):
    files = {"../../evil.png": 1, "bomb.png": bytes(10**6)}
    source("in", {"a.zip": files, "a.tar": files})
    for path in ("in/a.zip", "in/a.tar"):
        image = dict(room.list_images(path))["../../evil.png"]
        assert room.read_bytes(image() if callable(image) else image) == encoded(1, "PNG")
    monkeypatch.setattr(room, "MAX_BYTES", 10**5)
    refused("bomb.png: unpacks to 1000000 bytes", dict(room.list_images("in/a.zip"))["bomb.png"])
    assert {path.name for path in Path().parent.rglob("*") if path.is_file()} == {"a.zip", "a.tar"}
    refused("not a folder, .zip or .tar", room.list_images, __file__)
    # a path in parquet is not followed
    source("", {"paths.parquet": [dict(image="in/a.zip"), dict(image=None)]})
    assert [image() for _, image, _ in room.parquet_rows("paths.parquet")] == [b""] * 2


# --- every data set: its files, settings, and what is made of them ---


def cifar(n, seed):
    """n records of the binary version: label i, image seed + i."""
    pixels = [np.asarray(smooth(seed + i, 32, 32)).transpose(2, 0, 1) for i in range(n)]
    return b"".join(bytes([i]) + image.tobytes() for i, image in enumerate(pixels))


CIFAR = {f"cifar-10-batches-bin/data_batch_{k}.bin": cifar(6, 10 * k) for k in range(1, 6)}
CIFAR |= {"cifar-10-batches-bin/test_batch.bin": cifar(4, 90), "cifar-10-batches-bin/batches.meta.txt": "airplane\n"}

SYNSETS = {"n01440764": "tench, Tinca tinca", "n02102040": "English springer", "n03000684": "chain saw, chainsaw"}
NAMES = list(SYNSETS.values())
TRUTH = [2, 1, 0, 0, 1, 2]
OUTER = {f"{s}.tar": {f"{s}_{i}.JPEG": 10 * c + i for i in range(5)} for c, s in enumerate(SYNSETS)}
ILSVRC = {"ILSVRC2012_img_train.tar": dict(reversed(OUTER.items()))}
ILSVRC["ILSVRC2012_img_val.tar"] = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": 100 + i for i in range(6)}
ROWS = [f"ILSVRC2012_val_{i + 1:08d},{list(SYNSETS)[c]} 1 2 3 4\n" for i, c in enumerate(TRUTH)]
KAGGLE = {"LOC_synset_mapping.txt": "".join(f"{s} {words}\n" for s, words in SYNSETS.items())}
KAGGLE["LOC_val_solution.csv"] = "ImageId,PredictionString\n" + "".join(reversed(ROWS))
OF_ILSVRC = {"n03000684/n03000684_3": ("train", 23, 2), "val/ILSVRC2012_val_00000002": ("val", 101, 1)}


def devkit():
    """ILSVRC2012_ID has another order than the synsets."""
    numbers, file = {"n02102040": 1, "n01440764": 2, "n03000684": 3}, io.BytesIO()
    types = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")]
    synsets = np.array([(n, s, SYNSETS[s], "a thing") for s, n in numbers.items()], dtype=types)
    pytest.importorskip("scipy.io").savemat(file, {"synsets": synsets[:, None]})
    truth = "".join(f"{numbers[list(SYNSETS)[c]]}\n" for c in TRUTH)
    files = {"meta.mat": file.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
    kit = {f"ILSVRC2012_devkit_t12/data/{name}": value for name, value in files.items()}
    return ILSVRC | {"ILSVRC2012_devkit_t12.tar.gz": kit}


def imagenet_parquet():
    hub = {"data/test-00000-of-00001.parquet": ([dict(image=i, label=-1) for i in range(3)], dict(label=NAMES))}
    for k, (part, n) in enumerate((("train-00000-of-00002", 10), ("train-00001-of-00002", 8), ("validation-00", 5))):
        rows = [dict(image=20 * k + i, label=i % 3) for i in range(n)]
        hub[f"data/{part}.parquet"] = rows, dict(label=NAMES)
    return hub


def celeba_lists(header, comma, end):
    rows = [f"{i + 1:06d}.jpg" + "".join(f"{comma}{1 if (i >> k) & 1 else -1}" for k in range(3)) for i in range(8)]
    parts = [f"{i + 1:06d}.jpg{comma}{part}" for i, part in enumerate((0, 0, 0, 0, 0, 1, 1, 2))]
    return {f"a/list_attr_celeba.{end}": "\n".join([header, *rows]), f"a/list_eval_partition.{end}": "\n".join(parts)}


OF_CELEBA = celeba_lists("8\nMale Smiling Wavy_Hair", " ", "txt")
FACES = {f"img_align_celeba/{i + 1:06d}.jpg": i for i in range(8)}
HQ = {f"CelebA-HQ-img/{i}.jpg": i for i in range(8)} | {"CelebAMask-HQ-mask-anno/0/00000_hair.png": 0}
ATTRIBUTES = [f"{i}.jpg  {1 if i & 1 else -1} {1 if i & 2 else -1}" for i in range(8)]
HQ["CelebAMask-HQ-attribute-anno.txt"] = "\n".join(["8", "Male Smiling", *ATTRIBUTES]) + "\n"
MAPPING = "\n".join(["idx  orig_idx  orig_file"] + [f"{i}  {7 - i}  {8 - i:06d}.jpg" for i in range(8)])

WIKIART = dict(artist=["Unknown Artist", "claude-monet"], genre=["portrait", "Unknown Genre"])
WIKIART["style"] = ["Cubism", "Pop_Art"]
PAINTINGS = [dict(image=i, artist=i % 2, genre=i // 2 % 2, style=i // 4 % 2) for i in range(8)]
HUB_WIKIART = {"data/train-0.parquet": (PAINTINGS, WIKIART)}
CAPTIONS = ["portrait", "portrait by claude monet", "painting", "painting by claude monet"]
ARCHIVE = {"Pop_Art/roy_whaam-1963.jpg": 1, "Cubism/juan-gris_guitar-1913.jpg": 2, "Cubism/pablo_chair.jpg": 3}
OF_ARCHIVE = {
    "me_x.jpg": ("train", 4, None, "painting by me"),
    "Cubism/juan-gris_guitar-1913.jpg": ("train", 2, 0, "painting by juan gris, cubism"),
}
OF_WIKIART = {f"train-0/{i:06d}": ("train", i, 0, f"{text}, cubism") for i, text in enumerate(CAPTIONS)}

LSUN = {f"bedroom_{split}_lmdb": {f"{split}{i}": n + i for i in range(n)} for split, n in (("train", 12), ("val", 3))}
TOWERS = (("train", 5), ("val", 2))
LSUN |= {f"tower_{split}_lmdb": {f"{split}{i}": 50 + n + i for i in range(n)} for split, n in TOWERS}

ART = {"Art Movement/Cubism/Guitar Player##abc.jpg": 1, "Art Movement/Pop Art/Soup##def.jpg": 2}
ART |= {"Artists1/Picasso/Guitar Player##abc.jpg": 1, "Artists1/Picasso/Blue_Room##ghi.jpg": 3}
ART |= {"Medium/Drawing/Broken##jkl.jpg": encoded(4)[:600], "Medium/Drawing/Short##mno.gif": encoded(5)[:599]}


def open_images():
    head, files = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated\n", {}
    for split, ids in (("train", ["0a", "0b", "0c", "0d"]), ("validation", ["1a", "1b"])):
        files |= {f"{split}/data/{key}.jpg": int(key, 16) for key in ids}
        rows = [f"{key},xclick,/m/01yrx,1,0.25,0.75,0.5,1.0,0,0\n" for key in [*ids, "elsewhere"]]
        rows.append(f"{ids[0]},xclick,/m/0bt9lr,1,0,0.5,0,0.5,0,0\n")
        files[f"{split}/labels/detections.csv"] = head + "".join(rows)
        files[f"{split}/metadata/classes.csv"] = "LabelName,DisplayName\n/m/01yrx,Cat\n/m/0bt9lr,Dog\n"
    lines = [dict(image_id="0b", caption="A cat. "), dict(image_id="0b", caption="It sits.")]
    lines += [dict(image_id="9", caption="x"), dict(image_id=["0c"]), [], dict(image_id="0d", caption=3)]
    return files | {"train/labels/narratives_captions.jsonl": lines}


def fetched_shard(shard):
    """A shard as img2dataset writes them, with two dead links of ten, and damaged files."""
    files, alive = {f"{shard:05d}0000.jpg": 200 - shard, f"{shard:05d}0000.json": "[5"}, [1, 2, 3, 4, 6, 7, 8, 9]
    for i in alive:
        key, text = f"{shard:05d}{i:04d}", f"a caption, number {shard} {i}"
        record = dict(caption=text, url=f"http://x/{key}", key=key, status="success", similarity=0.3 + i / 100)
        record["NSFW"] = "NSFW" if i == 7 else "UNLIKELY"
        files |= {f"{key}.jpg": 100 * shard + i, f"{key}.txt": text, f"{key}.json": json.dumps(record)}
    stats = dict(count=10, successes=8, failed_to_download=2, failed_to_resize=0)
    stats["status_dict"] = {"success": 8, "HTTP Error 404: Not Found": 2}
    made = {f"{shard:05d}.tar": files, f"{shard:05d}_stats.json": json.dumps(stats), f"{shard:05d}.parquet": b"table"}
    return made | {f"{9 - shard}_stats.json": "[1"}


def fetched_table(shard):
    """The same in img2dataset's parquet format, where dead links are rows without an image."""
    made, columns = fetched_shard(shard), ("key", "jpg", "caption", "url", "status", "similarity", "NSFW")
    files, rows = made.pop(f"{shard:05d}.tar"), [dict.fromkeys(columns) | dict(key="x", status="failed_to_download")]
    for name, seed in files.items():
        if name.endswith(".jpg"):
            record = room.parse(files[f"{name[:-4]}.json"]) or {}
            rows.append(record | dict(key=name[:-4], jpg=encoded(seed)))
    return made | {f"{shard:05d}.parquet": rows}


FETCHED = fetched_shard(0) | fetched_shard(1)
TABLES = fetched_table(0) | fetched_table(1)
LINKS = dict(links=20, images=16, not_downloaded=4, not_resized=0, reasons={"HTTP Error 404: Not Found": 4})
OF_FETCHED = {"000010003": ("train", 103, None, "a caption, number 1 3")}

HUB_CIFAR = {f"{part}-0.parquet": [dict(image=i, label=i) for i in range(9)] for part in ("train", "test")}
GAPS = {"train-0.parquet": [dict(image=i, label=(0, None, 2)[i % 3]) for i in range(6)]}
FFHQ = {f"images1024x1024/{n // 1000 * 1000:05d}/{n:05d}.png": n for n in (0, 1, 59999, 60000, 69999)}
CLASSES = {f"{('dogs', 'cats')[i % 2]}/{i}.jpg": i for i in range(20)}
SPLITS = {f"{split}/0{end}": k for k, split in enumerate(("train", "val", "test")) for end in (".jpg", ".map.png")}
HALF = dict(fraction=0.5)

# (data set, its files, settings, images by split, class names, {key: (split, seed of the image, label, caption)})
IN_TAR = dict(source="src/cifar-10-binary.tar.gz")
PARTS = dict(train=5, val=2, test=1)
MADE = {
    "cifar10": ("cifar10", {"cifar-10-binary.tar.gz": CIFAR}, IN_TAR, dict(train=30, val=4), [],
                {"data_batch_2/00001": ("train", 21, 1), "test_batch/00003": ("val", 93, 3)}),
    "cifar10 parquet": ("cifar10", HUB_CIFAR, {}, dict(train=9, val=9), [], {"test-0/00008": ("val", 8, 8)}),
    "imagenet kaggle": ("imagenet", ILSVRC | KAGGLE, {}, dict(train=15, val=6), NAMES, OF_ILSVRC),
    "imagenet devkit": ("imagenet", devkit, {}, dict(train=15, val=6), NAMES, OF_ILSVRC),
    "imagenet no labels": ("imagenet", ILSVRC, {}, dict(train=15), list(SYNSETS), {}),
    "imagenet classes": ("imagenet", ILSVRC | KAGGLE, dict(classes="chain saw,n01440764"), dict(train=10, val=4),
                         [NAMES[0], NAMES[2]], {"n03000684/n03000684_3": ("train", 23, 1)}),
    "imagenet half": ("imagenet", ILSVRC | KAGGLE, HALF, dict(train=7, val=6), NAMES, {}),
    "imagenet parquet": ("imagenet", imagenet_parquet, dict(classes="1,2"), dict(train=11, val=3), NAMES[1:],
                         {"train-00001-of-00002/000007": ("train", 27, 0)}),
    "imagenet gaps": ("imagenet", GAPS, {}, dict(train=4), ["0", "1", "2"], {"train-0/000005": ("train", 5, 2)}),
    "celeba zip": ("celeba", {"img_align_celeba.zip": FACES} | OF_CELEBA, dict(attribute="Smiling", workers=1),
                   PARTS, ["not Smiling", "Smiling"], {"000007": ("val", 6, 1, "smiling, wavy hair")}),
    "celeba csv": ("celeba", FACES | celeba_lists("image_id,Male,Smiling,Wavy_Hair", ",", "csv"), {}, PARTS, [],
                   {"000008": ("test", 7, None)}),
    "celebahq": ("celebahq", HQ, {}, dict(train=8), [], {"3": ("train", 3, None, "male, smiling")}),
    "celebahq lists": ("celebahq", HQ | OF_CELEBA | {"CelebA-HQ-to-CelebA-mapping.txt": MAPPING}, {},
                       PARTS, [], {"0": ("test", 0, None), "1": ("val", 1, None)}),
    "ffhq": ("ffhq", FFHQ | {"LICENSE.txt": ""}, {}, dict(train=3, val=2), [], {"60000": ("val", 60000, None)}),
    "lsun": ("lsun", LSUN, {}, dict(train=17, val=5), ["bedroom", "tower"], {"tower/train3": ("train", 58, 1)}),
    "lsun half": ("lsun", LSUN, HALF | dict(categories="tower"), dict(train=3, val=2), ["tower"], {}),
    "wikiart": ("wikiart", HUB_WIKIART, {}, dict(train=8), WIKIART["style"], OF_WIKIART),
    "wikiart artist": ("wikiart", HUB_WIKIART, dict(label="artist"), dict(train=8), WIKIART["artist"],
                       {"train-0/000005": ("train", 5, 1)}),
    "wikiart archive": ("wikiart", ARCHIVE | {"me_x.jpg": 4}, {}, dict(train=4), ["Cubism", "Pop_Art"], OF_ARCHIVE),
    "wikiart zip": ("wikiart", {"wikiart.zip": {f"wikiart/{path}": seed for path, seed in ARCHIVE.items()}},
                    dict(source="src/wikiart.zip", label="artist"), dict(train=3), ["juan-gris", "pablo", "roy"],
                    {"wikiart/Cubism/pablo_chair.jpg": ("train", 3, 1)}),
    "art500k": ("art500k", ART, dict(min_bytes=600), dict(train=3), ["Cubism", "Pop Art"],
                {"Artists1/Picasso/Blue_Room##ghi.jpg": ("train", 3, None, "Blue Room, Picasso"),
                 "Art Movement/Cubism/Guitar Player##abc.jpg": ("train", 1, 0, "Guitar Player, Cubism")}),
    "openimages": ("openimages", open_images, {}, dict(train=4, val=2), [], {"0b": ("train", 11, None, "A cat.")}),
    "openimages dogs": ("openimages", open_images, dict(only="Dog"), dict(train=1, val=1), [],
                        {"0a": ("train", 10, None)}),
    "openimages some": ("openimages", open_images, dict(n_train=2, n_val=1), dict(train=2, val=1), [], {}),
    "laion400m": ("laion400m", FETCHED, dict(min_similarity=0.32), dict(train=14), [], OF_FETCHED),
    "captions parquet": ("conceptual_captions", TABLES, {}, dict(train=18), [], OF_FETCHED),
    "captions": ("conceptual_captions", FETCHED, {}, dict(train=18), [], OF_FETCHED),
    "folder": ("folder", CLASSES, {}, dict(train=19, val=1), ["cats", "dogs"], {"cats/7.jpg": ("train", 7, 0)}),
    "folder splits": ("folder", SPLITS, {}, dict(train=1, val=1, test=1), [], {"test/0.jpg": ("test", 2, None)}),
    "folder with more": ("folder", {"train/0.jpg": 0, "Test/0.jpg": 1, "example.jpg": 2}, {}, dict(train=1, val=1), [],
                         {"Test/0.jpg": ("val", 1, None)}),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_data_sets(case):
    name, files, settings, splits, classes, expected = MADE[case]
    source("src", files() if callable(files) else files)
    meta, found = prepare(name, **settings), records()
    assert meta["splits"] == splits and sum(splits.values()) == len(found) == len(Dataset("out", "all"))
    if classes:
        assert json.loads(Path("out/classes.json").read_text()) == classes
    for key, (split, seed, label, *text) in expected.items():
        is_in, record, data = found[key]
        assert (is_in, record.get("label"), record.get("text", [])[: len(text)]) == (split, label, text)
        image = load(data).convert("RGB")
        original = ImageOps.fit(smooth(seed, record["width"], record["height"]), image.size)
        assert np.abs(np.asarray(original, float) - np.asarray(image)).mean() < 4, key


def idx(array):
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


ZEROS, rng = np.zeros((30, 28, 28), np.uint8), np.random.default_rng(0)


def digits(**changed):
    """The four files of MNIST, 30 and 20 random images; changed: other images= or labels= of training."""
    arrays = {}
    for part, n in (("train", 30), ("t10k", 20)):
        arrays[f"{part}-images-idx3"] = idx(rng.integers(0, 256, (n, 28, 28), np.uint8))
        arrays[f"{part}-labels-idx1"] = idx(np.arange(n).astype(np.uint8) // (n // 10))
    arrays |= {f"train-{name}-idx{3 if name == 'images' else 1}": data for name, data in changed.items()}
    return {f"{name}-ubyte.gz": data for name, data in arrays.items()}


BAPPS = {"2afc/train/cnn": 3, "2afc/train/mix": 2, "2afc/val/color": 2, "jnd/val/cnn": 2}


def judged(without=None, **changed):
    """The published layout of BAPPS, without a part, or with part=content for one item of a category."""
    files = {"2afc/train/.DS_Store": ""}
    for category, count in BAPPS.items():
        *patches, last = bapps.PARTS[category.split("/")[0]]
        side = 80 if category.endswith("mix") else 64
        for i in range(count):
            for k, part in enumerate(patches):
                files[f"{category}/{part}/{i:06d}.png"] = encoded(10 * k + i, "PNG", side, side)
            files[f"{category}/{last}/{i:06d}.npy"] = np.array([i / 4], np.float32)
    for part, data in changed.items():
        files[f"2afc/train/cnn/{part}/000001.{'npy' if part == 'judge' else 'png'}"] = data
    return {name: data for name, data in files.items() if not without or without not in name}


WRONG = [
    ("cifar10", {"a.tar.gz": {"data_batch_1.bin": b"x" * 4000}}, dict(source="src/a.tar.gz"), "_1.bin has 4000 bytes"),
    ("cifar10", {"a.tar.gz": b"\x1f\x8b\x08" + bytes(range(200))}, dict(source="src/a.tar.gz"), "is damaged"),
    ("celeba", {"img_align_celeba.zip": bytes(range(200))}, {}, "is damaged"),
    ("celeba", FACES | OF_CELEBA, dict(attribute="Tall"), "Tall is not in list_attr_celeba: Male, Smiling, Wavy_Hair"),
    ("celeba", FACES | {"list_eval_partition.txt": "000001.jpg 3\n"}, {}, "000001.jpg is in none of the parts 0, 1, 2"),
    ("imagenet", {"ILSVRC2012_img_train.tar": bytes(range(200))}, {}, "is damaged"),
    ("imagenet", ILSVRC, dict(classes="zebra"), "--classes has 'zebra'"),
    ("imagenet", ILSVRC, dict(verify=True), "img_train.tar: is not the published file"),
    ("imagenet", {"train-0.parquet": [dict(image=0, label="cat")]}, {}, "no numbers in the column"),
    ("ffhq", {"face.png": 1}, {}, "face.png: is not named by a number"),
    ("lsun", LSUN, dict(categories="kitchen"), "no folder kitchen_train_lmdb, only bedroom, tower"),
    ("lsun", {"tower_train_lmdb/data.mdb": bytes(9999)}, {}, "tower_train_lmdb: damaged"),
    ("wikiart", {"a.parquet": [dict(image=0, label=1)]}, {}, "no column 'style', only image, label"),
    ("wikiart", {"a.parquet": b"PAR1" + bytes(99)}, {}, "a.parquet: "),
    ("wikiart", ARCHIVE, dict(label="genre"), "the archive has style and artist, not genre; set --label"),
    ("wikiart", {"roy_whaam.jpg": 1}, {}, "no images in folders of styles"),
    ("laion400m", {"0.parquet": [dict(url="x")]}, {}, "no column 'image', only url"),
    ("art500k", ART, {}, "no images left (dropped: 6 tiny"),  # below 5,000 bytes
    ("art500k", ART, dict(group="Genre"), "no images in a group 'Genre', only in Art Movement, Artists1, Medium"),
    ("openimages", {"train/data/0a.jpg": 1, "train/labels/detections.csv": "ImageID,XMin\n0a,x\n"}, {},
     "detections.csv: line 2 cannot be read"),
    ("folder", {"images.npy": np.zeros((4, 8, 8, 3), np.uint8)}, {}, "train on it as it is"),
    ("folder", CLASSES, dict(out_dir="src/out"), "is inside the source"),
    ("conceptual_captions", {"urls.tsv": "no tab\n"}, dict(urls="src/urls.tsv"),
     "does not begin with a caption, a tab and a URL"),
    ("mnist", digits(images=b"hello"), {}, "damaged"),
    ("mnist", digits(images=gzip.compress(np.random.default_rng(0).bytes(9999))[:5000]), {}, "damaged"),
    ("mnist", digits(labels=gzip.compress(b"")), {}, "0 bytes after the header"),
    ("mnist", digits(labels=idx(ZEROS)), {}, "after the header 00000803"),
    ("mnist", digits(images=gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12)), {}, "0 bytes after the header"),
    ("mnist", digits(labels=idx(ZEROS[:29, 0, 0])), {}, "29 labels"),
    ("mnist", digits(images=idx(ZEROS[:, :, :27])), {}, "images are"),
    ("mnist", digits(labels=idx(ZEROS[:, 0, 0] + 10)), {}, "labels up to 10"),
    ("bapps", judged(without="cnn/p1/000001"), {}, "train/cnn: 000001 is missing in ref or p1"),
    ("bapps", judged(without="cnn/judge"), {}, "is missing in ref or judge"),
    ("bapps", judged(p0=b"\x89PNG"), {}, "p0/000001.png: cannot be decoded"),
    ("bapps", judged(judge="cut"), {}, "judge/000001.npy: cannot be loaded"),
    ("bapps", judged(judge=np.array([{}])), {}, "judge/000001.npy: cannot be loaded"),  # a pickle
    ("bapps", judged(judge=np.array([5.0])), {}, "is [5.0], not one number"),
    ("bapps", judged(judge=np.array([np.nan])), {}, "is [nan]"),
    ("bapps", judged(judge=np.array([0.0, 1.0])), {}, "is [0.0, 1.0]"),
    ("bapps", {"a": ""}, {}, "2afc/train: no categories; set --source"),
    ("bapps", {}, dict(standin="src"), "set either --source to a copy of BAPPS, or --standin"),
]  # fmt: skip


@pytest.mark.parametrize("name, files, settings, what", WRONG)
def test_wrong_files_are_one_line(name, files, settings, what):
    source("src", files)
    refused(what, prepare, name, **settings)


NAMES_OF_SETS = sorted({name for name, *_ in MADE.values()})


@pytest.mark.parametrize("name", NAMES_OF_SETS)
def test_missing_sources_are_one_line_and_settings_are_checked(name):
    settings, about = settings_of(name), importlib.import_module(f"data.{name}.prepare").__doc__.lower()
    Path("empty").mkdir()
    for value in ("", "nowhere", "empty"):
        setting = {"fetched" if "urls" in settings else "source": value}
        with pytest.raises(UserError, match="set --|no images|no parquet|unpack|see the top"):
            prepare(name, **setting)
    for word in ("license", "size", "time", "on disk"):
        assert word in about, word
    wrong = dict(size=0, crop="middle", quality=101, min_side=-1, vocab_size=100, shard_mb=0.0, workers=-1)
    wrong |= dict(fraction=0.0, min_bytes=-1)
    for key in settings.keys() & wrong.keys():
        contract = settings[key].contract
        assert keeps(settings[key].default, contract) and keeps(wrong[key], contract) is False, key


def test_missing_tools_are_named_with_their_command(monkeypatch):
    Path("src/bedroom_train_lmdb").mkdir(parents=True)
    download = dict(source="", download=True)
    tools = dict(openimages=("fiftyone", download), laion400m=("img2dataset", dict(urls="src")))
    for name, (tool, changed) in (tools | dict(lsun=("lmdb", {}), wikiart=("huggingface_hub", download))).items():
        for module in (tool, f"{tool}.zoo"):
            monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        refused(f"needs {tool}, which is not installed; pip install {tool}", prepare, name, **changed)


def test_folder_keeps_captions_and_objects():
    objects = dict(bbox=[[4, 6, 20, 20]], categories=["thing"])
    files = {f"{i}.jpg": i for i in range(9)} | {"bad.jpg": 40, "bad.json": '{"text": ["half'}
    files |= {f"{i}.json": json.dumps(dict(text=[f"image {i}", "another"], objects=objects)) for i in range(9)}
    source("src", {"a.tar": files})
    meta = prepare("folder", size=20, vocab_size=300)
    assert meta["count"] == 10 and not meta["dropped"] and Path("out/bpe.tiktoken").exists()
    assert "text" not in records()["a/bad"][1], "damaged JSON is counted when the source is opened"
    for i in range(9):
        _, record, _ = records()[f"a/{i}"]
        assert record["text"] == [f"image {i}", "another"] and "label" not in record
        assert record["objects"] == dict(bbox=[[2, 3, 10, 10]], categories=["thing"])


def test_objects_and_the_zoo_of_open_images(monkeypatch):
    """FiftyOne is a module with the one function that is called."""
    asked, zoo = [], types.ModuleType("fiftyone.zoo")

    def download_zoo_dataset(name, split, **options):
        asked.append((name, split, options))
        return None, "src"

    zoo.download_zoo_dataset = download_zoo_dataset
    monkeypatch.setitem(sys.modules, "fiftyone", types.ModuleType("fiftyone"))
    monkeypatch.setitem(sys.modules, "fiftyone.zoo", zoo)
    source("src", open_images())
    prepare("openimages", source="", download=True, n_train=4, n_val=2, only="Cat, Dog")
    both = dict(label_types=["detections"], classes=["Cat", "Dog"])
    calls = (("train", 4), ("validation", 2))
    assert asked == [("open-images-v7", split, both | dict(max_samples=n)) for split, n in calls]
    train = Dataset("out", "train", 32)
    assert train.object_classes == ["Cat", "Dog"] and [len(train.boxes(i)) for i in range(4)] == [2, 1, 1, 1]
    # of 48 x 40 the middle 40 x 40 is cut: x 12..36 of 4..44
    assert np.allclose(train.boxes(1)[0][1:], [0.2, 0.5, 0.8, 1], atol=0.02)
    assert train[1]["text"] == ["A cat.", "It sits."] and train[2]["text"] == []


@pytest.fixture
def asked(monkeypatch):
    """img2dataset is a module with the one function that is called, which writes shards; its arguments."""
    module, asked = types.ModuleType("img2dataset"), []

    def download(url_list, output_folder, **options):
        asked.append(dict(options, url_list=url_list))
        source(output_folder, FETCHED)

    module.download = download
    monkeypatch.setitem(sys.modules, "img2dataset", module)
    return asked


def test_laion400m_is_fetched(asked, capsys):
    for folder in ("lists", "more"):
        Path(folder).mkdir()
    run = functools.partial(prepare, "laion400m", fetched="", min_similarity=0.32)
    meta = run(urls="lists")
    assert "20 links: 16 images, 4 lost (20.0 %)" in capsys.readouterr().out
    assert meta["links"] == LINKS and meta["dropped"] == dict(unlike=2, unsafe=2)
    options = dict(url_col="URL", caption_col="TEXT", image_size=32, resize_mode="keep_ratio")
    assert asked[0].items() >= dict(options, output_format="webdataset").items()
    assert len(Dataset("out", "all")) == 14 and len(Dataset("out/.fetched", "all")) == 18  # .fetched is hidden
    Path("out/meta.json").rename("meta.json")
    for changed, what in (({"size": 64}, "size=32 then, 64 now"), ({"urls": "more"}, "urls=lists")):
        refused(f".fetched: has other settings: {what}", run, **dict(urls="lists") | changed)
    Path("meta.json").rename("out/meta.json")
    shutil.rmtree("out/.fetched")
    run(urls="lists")
    assert len(asked) == 1 and "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["a caption\thttp://x/a.jpg", "http://x/a.jpg\ta caption"])
def test_conceptual_captions_are_fetched(line, asked):
    source("", {"list.tsv": line + "\n"})
    meta = prepare("conceptual_captions", urls="list.tsv", fetched="", vocab_size=300)
    assert meta["links"] == LINKS and meta["count"] == 18 and Path("out/bpe.tiktoken").exists()
    head = "\t".join("url" if word.startswith("http") else "caption" for word in line.split("\t"))
    assert Path(asked[0]["url_list"]).read_text() == f"{head}\n{line}\n" and asked[0]["input_format"] == "tsv"


# --- arrays ---


def test_mnist(capsys, monkeypatch):
    source("raw", files := digits())
    monkeypatch.setattr(mnist, "MD5", {name: hashlib.md5(data).hexdigest() for name, data in files.items()})
    prepare("mnist", download=True, mirror=Path("raw").absolute().as_uri())
    assert files_in("src") == files
    for split, prefix, n in (("train", "train", 30), ("val", "t10k", 20)):
        images, labels = np.load(f"out/{split}/images.npy"), np.load(f"out/{split}/labels.npy")
        raw = gzip.decompress(files[f"{prefix}-images-idx3-ubyte.gz"])[16:]
        assert images.shape == (n, 28, 28, 1) and images.tobytes() == raw
        pixels = 127.5 * (Dataset("out", split, 28)[0]["image"][0] + 1)
        assert pixels.round().byte().numpy().tobytes() == raw[:784], "not resampled"
        assert labels.tolist() == [i * 10 // n for i in range(n)]
    assert json.loads(Path("out/classes.json").read_text()) == list("0123456789")
    capsys.readouterr()
    Path("out/val/meta.json").unlink()
    prepare("mnist")
    assert re.findall("up to date|20 images", capsys.readouterr().out) == ["up to date", "20 images"]
    source("src", digits(images=idx(ZEROS)))
    prepare("mnist")
    assert not np.load("out/train/images.npy").any()
    refused("or add --download=True", prepare, "mnist", source="nowhere")


def test_bapps(capsys):
    source("src", judged())
    run = functools.partial(prepare, "bapps", size=64)
    run()
    assert {str(path.parent.relative_to("out")) for path in Path("out").rglob("images.npy")} == set(BAPPS)
    for category, n in BAPPS.items():
        images, judge = np.load(f"out/{category}/images.npy"), np.load(f"out/{category}/judge.npy")
        assert images.shape == (n, 3 if "2afc" in category else 2, 64, 64, 3) and images.dtype == np.uint8
        assert judge.dtype == np.float32 and judge.tolist() == [i / 4 for i in range(n)]
    images = np.load("out/2afc/train/cnn/images.npy")
    assert all(np.array_equal(images[2, k], smooth(10 * k + 2, 64, 64)) for k in range(3))
    assert "src" in json.loads(Path("out/meta.json").read_text())["what"]
    capsys.readouterr()
    Path("out/2afc/val/color/meta.json").unlink()
    run()
    assert capsys.readouterr().out.count("up to date") == 3
    # interrupted in the middle of new files, the set does not count as complete
    source("src", {"2afc/train/mix/judge/000001.npy": "cut"})
    refused("000001.npy: cannot be loaded", run)
    assert not Path("out/meta.json").exists()
    Path("src/2afc/train/mix").rename("src/2afc/train/other")
    refused("train/mix: is of another source", run)


@pytest.fixture
def photos():
    """Ten photos, each of its own color with waves on it."""
    y, x = np.mgrid[0:100, 0:120]
    Path("photos").mkdir()
    for i in range(10):
        waves = 60 * np.sin(y / (3 + i)) * np.sin(x / (13 - i))
        pixels = np.stack([25 * i + 0 * waves, 128 + waves, 128 - waves], axis=2)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(f"photos/{i}.png")


def test_the_standin_has_the_published_layout(photos):
    run = functools.partial(prepare, "bapps", source="", standin="photos", size=32, standin_train=4, standin_val=3)
    run()
    assert "stand-in" in json.loads(Path("out/meta.json").read_text())["what"]
    categories = {split: {path.name for path in Path("out/2afc", split).iterdir()} for split in ("train", "val")}
    assert categories == {"train": set(bapps.KNOWN), "val": set(bapps.KNOWN | bapps.NEW)}
    red = {}  # identifies the photos; ref is not distorted
    for split, count in (("train", 4), ("val", 3)):
        images = [np.load(path) for path in sorted(Path("out/2afc", split).rglob("images.npy"))]
        assert all(a.shape == (count, 3, 32, 32, 3) for a in images)
        red[split] = {round(float(ref[..., 0].mean()) / 25) for a in images for ref in a[:, 0]}
    assert red["val"] <= {0, 5} and not red["val"] & red["train"]
    judge = np.concatenate([np.load(path) for path in Path("out/2afc").rglob("judge.npy")])
    assert set(judge) == {0.0, 1.0} and 0.2 < judge.mean() < 0.8
    assert np.load("out/jnd/val/new/images.npy").shape == (3, 2, 32, 32, 3)
    before = {path: path.read_bytes() for path in Path("out").glob("2afc/*/*/*.npy")}
    for path in before:
        path.with_name("meta.json").unlink(missing_ok=True)
    run()
    assert all(path.read_bytes() == data for path, data in before.items())
    refused("is the folder of the stand-in", run, standin="out/standin/2afc")
    Path("out/standin/made_by_prepare.txt").unlink()
    refused("was not made by this script", run)


@pytest.mark.parametrize("name", bapps.KNOWN | bapps.NEW)
def test_a_larger_amount_distorts_more(name, photos):
    patch = Image.open("photos/4.png").crop((0, 0, 64, 64))
    means = []
    for amount in (0.0, 0.25, 0.5, 0.75, 1.0):
        distorted = [bapps.distort(patch, name, amount, np.random.default_rng(s)) for s in range(4)]
        means.append(np.mean([(np.asarray(d, float) - np.asarray(patch)) ** 2 for d in distorted]))
    assert means == sorted(means) and means[0] < means[-1] / 4


# --- shapes ---


@pytest.fixture(scope="module")
def rendered():
    """200 images and captions."""
    return shapes.make_split("val", 200, 64, seed=0)[:2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    prepare("shapes", folder, n_train=1500, n_val=60)
    return folder


def compose(shape, color, background, size, side, at=0.5):
    """An image without the jitter of the data set."""
    mask = shapes.render_mask(shape, side * at, side * at, side * shapes.RADII[size], side)[0][..., None]
    return (mask * shapes.PALETTE[color] + (1 - mask) * shapes.PALETTE[background]).astype(np.uint8)


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


def test_shapes_files(made, capsys):
    classes, captions = json.loads((made / "classes.json").read_text()), {}
    for split, n in (("train", 1500), ("val", 60)):
        images, labels = np.load(made / split / "images.npy"), np.load(made / split / "labels.npy")
        assert images.shape == (n, 64, 64, 3) and images.dtype == np.uint8
        lines = (made / split / "captions.jsonl").read_text().splitlines()
        captions[split] = [json.loads(line)["text"][0] for line in lines]
        scenes = [shapes.parse(text) for text in captions[split]]
        assert [classes[label] for label in labels] == [scene["shape"] for scene in scenes]
        assert not any(shapes.is_held_out(s["shape"], s["color"], s["background"]) for s in scenes)
    prompts = (made / "prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == 256
    for k, text in enumerate(prompts):  # three that occur in training, then one held out
        scene = shapes.parse(text)
        assert shapes.is_held_out(scene["shape"], scene["color"], scene["background"]) == (k % 4 == 3)
        assert (text in captions["train"]) == (k % 4 != 3)
    ranks = ranks_of((made / "bpe.tiktoken").read_text())
    assert len(ranks) <= 512 and all(f" {word}".encode() in ranks for word in (*shapes.PALETTE, *shapes.SHAPES))
    shutil.copytree(made, "out")
    prepare("shapes", n_train=1500, n_val=50)
    assert re.findall("up to date|50 images", capsys.readouterr().out) == ["50 images", "up to date"]


def test_shapes_depend_on_seed_split_and_index_only_and_are_those_of_the_log(rendered):
    one, short = shapes.make_split("train", 20, 64, seed=3), shapes.make_split("train", 7, 64, seed=3)
    for a, b in zip(one, short, strict=True):
        assert np.array_equal(a[:7], b)
    for split, seed in (("val", 3), ("train", 4)):
        assert one[1] != shapes.make_split(split, 20, 64, seed)[1]
    images, captions = rendered[0][:100], rendered[1][:100]
    assert zlib.crc32("\n".join(captions).encode()) == 190813147
    mean = [129.1575, 131.3972, 136.1592]
    assert images.mean((0, 1, 2)).tolist() == pytest.approx(mean, abs=2e-3)  # a cosine may differ by machine


def test_maps_and_boxes_are_where_the_shapes_are(made):
    train = Dataset(made, "train", 64)
    assert train.counts["maps"] and train.map_names == ["background", *shapes.SHAPES]
    assert len(train.object_classes) == 56
    colors = {name: torch.tensor(value)[:, None, None] / 127.5 - 1 for name, value in shapes.PALETTE.items()}
    for i in range(0, 1500, 50):
        item, classes, ((name, *box),) = train[i], train.map(i), train.boxes(i)
        scene, inside = shapes.parse(item["text"][0]), classes > 0
        assert classes[inside].unique().tolist() == [item["label"] + 1]
        to_shape, to_background = ((item["image"] - colors[scene[x]]).norm(dim=0) for x in ("color", "background"))
        # the brightness jitter may decide otherwise on the outline
        assert ((to_shape < to_background) == inside).float().mean() > 0.985
        rows, columns = inside.nonzero(as_tuple=True)
        assert name == f"{scene['color']} {scene['shape']}"
        bounds = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert [64 * v for v in box] == [v.item() for v in bounds]


def test_the_judge_is_right_and_rejects_other_captions(rendered):
    readings, scenes = [shapes.read(image) for image in rendered[0]], [shapes.parse(text) for text in rendered[1]]
    assert np.mean([got == scene for got, scene in zip(readings, scenes)]) >= 0.99
    assert np.mean([got == scene for got, scene in zip(readings, np.roll(scenes, 7))]) <= 0.02
    for side, scene, size in zip((64, 32, 96) * 5, sorted(shapes.held_out()), ("small", "large") * 8):
        shape, color, background = scene
        image = compose(*scene, size, side, 0.47)
        expected = dict(size=size, color=color, shape=shape, background=background)
        assert shapes.read(image) == expected, (side, scene)


@pytest.mark.parametrize("name, amount", [("blur", 0.65), ("noise", 0.58), ("jpeg", 0.55), ("superres", 0.7)])
def test_the_judge_is_right_on_degraded_images(name, amount, rendered):
    images, captions = rendered[0][:50], rendered[1][:50]
    generators = map(np.random.default_rng, range(50))
    degraded = [bapps.distort(Image.fromarray(a), name, amount, rng) for a, rng in zip(images, generators)]
    squared = ((np.stack(degraded).astype(np.float64) - images) ** 2).mean((1, 2, 3))
    assert 25 < np.mean(10 * np.log10(255**2 / squared)) < 28
    assert np.mean([shapes.read(image) == shapes.parse(text) for image, text in zip(degraded, captions)]) >= 0.98


def test_the_judge_rejects_what_is_not_one_clean_shape():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(10)]
    blank = [np.full((64, 64, 3), value, dtype=np.uint8) for value in shapes.PALETTE.values()]
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None], (64, 64, 3))
    for image in (*noise, *blank, ramp):
        found = shapes.read(image)
        assert found["shape"] is found["color"] is found["size"] is None
    assert [shapes.read(image)["background"] for image in blank] == list(shapes.PALETTE)

    def blob(inside):
        return np.where(inside[..., None], np.uint8((215, 40, 40)), np.uint8((240, 240, 240)))

    y, x = np.mgrid[:64, :64] - 31.5
    disc = np.hypot(x, y) < 22
    assert shapes.read(blob(disc)) == dict(size="large", color="red", shape="circle", background="white")
    strange = {
        "two alike": (np.hypot(x - 16, y) < 11) | (np.hypot(x + 16, y) < 11),
        "a dot beside it": disc | (np.hypot(x - 22, y - 22) < 4),
        "wide ellipse": (x / 18) ** 2 + (y / 12) ** 2 < 1,
        "crescent": disc & (np.hypot(x - 8, y) > 14),
        "corner": (np.maximum(abs(x), abs(y)) < 16) & ~((x > -5) & (y < 5)),
        "frame": (np.maximum(abs(x), abs(y)) < 17) & (np.maximum(abs(x), abs(y)) > 10),
    }
    for name, inside in strange.items():
        assert shapes.read(blob(inside))["shape"] is None, name
    second = blob(disc)
    second[np.hypot(x + 22, y + 22) < 9] = shapes.PALETTE["green"]
    assert shapes.read(second)["shape"] is None
    middle = shapes.read(blob(np.hypot(x, y) < 64 * 0.325))  # between small and large
    assert middle["shape"] == "circle" and middle["size"] is None
    for image in (np.zeros((64, 32, 3), np.uint8), np.zeros((64, 64)), np.zeros((64, 64, 3))):
        refused("must be (S, S, 3) uint8", shapes.read, image)


def score(images, prompts, capsys):
    """{name: percentage} of what is printed for a folder of samples, and all of it."""
    lines = [dict(file=f"{k:05d}.png", prompt=prompt) for k, prompt in enumerate(prompts)]
    Path("samples").mkdir(exist_ok=True)
    for line, image in zip(lines, images):
        Image.fromarray(image).save(f"samples/{line['file']}")
    source("samples", {"samples.jsonl": lines})
    prepare("shapes", score="samples")
    out = capsys.readouterr().out
    found = re.findall(r"^ *(\S.*?) (\d+\.\d) % \(\d+ of \d+\)$", out, re.MULTILINE)
    return {name: float(value) for name, value in found}, out


def test_score(rendered, capsys):
    shape, color, background = sorted(shapes.held_out())[0]
    images = [*rendered[0][:63], compose(shape, color, background, "small", 64)]
    captions = [*rendered[1][:63], shapes.caption("small", color, shape, background)]
    parts, out = score(images, captions, capsys)
    assert out.startswith("prompt score 100.0 % (64 of 64)\n") and set(parts.values()) == {100.0}
    assert "  seen combinations 100.0 % (63 of 63)" in out and "  held-out combinations 100.0 % (1 of 1)" in out
    parts, _ = score(images, np.roll(captions, 1).tolist(), capsys)
    assert len(parts) == 7 and parts["prompt score"] <= 5
    assert 20 < parts["size"] < 80 and parts["shape"] < 40 and parts["color"] < 40 and parts["background"] < 40
    Path("samples/00001.png").unlink()
    source("samples", {"00002.png": "not an image"})
    four = [dict(file=f"{k:05d}.png", prompt=text) for k, text in enumerate(["a cat", *captions[1:4]])]
    for lines, count in ((four, "3 of 4"), ('{"file": "00003.png"}\nnot json\n[1]\n', "3 of 3"), ("", "0 of 0")):
        source("samples", {"samples.jsonl": lines})
        refused(f"{count} samples", prepare, "shapes", score="samples")
    refused("samples.jsonl: no such file", prepare, "shapes", score="nowhere")


def test_the_command_line_and_its_errors_in_one_line():
    command = [sys.executable, str(ROOT / "data/shapes/prepare.py"), "--score=nowhere"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("prepare.py: nowhere/samples.jsonl: no such file")
    assert result.stderr.count("\n") == 1


# --- emoji ---

MAN, GUARD, RUNNER = "👨", "💂", "🏃"
PLAIN = {
    "HEAVY BLACK HEART": "red heart",
    "BLACK HEART": "black heart",
    "BLACK HEART SUIT": "heart suit",
    "WHITE SMILING FACE": "smiling face",
    "LARGE GREEN CIRCLE": "green circle",
    "MEDIUM WHITE CIRCLE": "white circle",
    "BLACK LARGE SQUARE": "black square",
    "BLACK RIGHTWARDS ARROW": "rightwards arrow",
    "HELMET WITH WHITE CROSS": "helmet with white cross",
    "THUMBS UP SIGN": "thumbs up",
    "GRINNING FACE WITH ONE LARGE AND ONE SMALL EYE": "grinning face with one large and one small eye",
}


@pytest.mark.parametrize("name", PLAIN)
def test_unicode_names_in_plain_words(name):
    assert emoji.plain(name) == PLAIN[name]


def test_emoji_are_those_that_the_font_has():
    tones = list(emoji.TONES.values())
    has = {"🐱", "🐕", "\u2764", "🇦", "🏻", MAN, GUARD, RUNNER, "🇫🇷", "👨\u200d🚒", "🏃\u200d\u2640\ufe0f"}
    has |= {person[0] + tone + person[1:] for person in (MAN, GUARD, "👨\u200d🚒") for tone in tones}
    found = emoji.list_emoji(has.__contains__, [("FR", "France"), ("XX", "Nowhere")])
    names = ["red heart", "runner", "dog", "cat face", "man", "guardsman", "woman runner", "man firefighter"]
    assert list(found) == [*names, "flag of france"]
    assert found["man firefighter"]["man firefighter, dark skin tone"] == "👨🏿\u200d🚒"
    assert {name: len(of) for name, of in found.items() if len(of) > 1} == {name: 6 for name in names[4:6] + names[7:]}
    assert found["runner"] == {"runner": RUNNER} and found["flag of france"] == {"flag of france": "🇫🇷"}
    for name, expected in (("person bowing", "man bowing"), ("woman in tuxedo", "man in tuxedo"), ("elf", "man elf")):
        assert emoji.with_gender(name, "man") == expected


def test_held_out_emoji():
    things = {f"{color} {form}" for color in emoji.COLORS for form in emoji.FORMS}
    faces = {f"{animal}{face}" for animal in ("cat", "cow", "dog") for face in ("", " face")}
    names = ("farmer", "woman with red hair", "elf")
    people = {f"{name}, {tone} skin tone" for name in names for tone in emoji.TONES}
    held = emoji.held_out(things | faces | people | {"fox face", "red heart suit", *names})
    assert held <= things | faces | people and held & faces == {"cow face"}
    of_color, of_form = (Counter(text.split()[k] for text in held & things) for k in (0, 1))
    assert of_color == dict.fromkeys(emoji.COLORS, 1) and of_form == dict.fromkeys(emoji.FORMS, 3)
    assert Counter(text.split(",")[0] for text in held & people) == dict.fromkeys(names, 1)


def test_a_font_without_color_or_none_is_one_line(monkeypatch):
    monkeypatch.setattr(emoji, "FONTS", ())
    refused("run `apt install fonts-noto-color-emoji`", prepare_emoji)
    source("", {"text.ttf": "no font"})
    for path in ("nowhere.ttf", "text.ttf"):
        refused("is not a font with color bitmaps", prepare_emoji, font=path)


def prepare_emoji(**changed):
    cfg = {key: setting.default for key, setting in settings_of("emoji").items()}
    emoji.prepare(Config(cfg | dict(out_dir="out") | changed))


def test_emoji_files_and_comparison(monkeypatch, capsys):
    if not any(map(os.path.exists, emoji.FONTS)):
        pytest.skip("no color-emoji font: apt install fonts-noto-color-emoji")
    monkeypatch.setattr(emoji, "RANGES", (range(0x1F400, 0x1F440), range(0x1F468, 0x1F46A), range(0x1F7E0, 0x1F7EC)))
    prepare_emoji(size=32)
    images, captions = {}, {}
    for split in ("train", "val"):
        dataset = Dataset("out", split, 32)
        captions[split] = [dataset[i]["text"][0] for i in range(len(dataset))]
        images[split] = np.load(f"out/{split}/images.npy")
        assert images[split].shape == (len(dataset), 32, 32, 3) and (images[split] < 255).any((1, 2, 3)).all()
    assert not set(captions["train"]) & set(captions["val"]) and Counter(captions["train"])["snail"] == 6
    assert {"orange square", "horse face"} & set(captions["val"]) and len(set(captions["val"])) == len(captions["val"])
    assert len(np.unique(images["train"], axis=0)) == len(images["train"])  # no tofu, no image twice
    prompts = Path("out/prompts.txt").read_text().splitlines()
    assert {"octopus", "penguin"} < set(prompts) and set(captions["val"]) & set(prompts)
    prepare_emoji(size=32)

    Path("samples").mkdir()
    rows = [("train", captions["train"].index("snail"), "snail"), ("train", 0, "snail"), ("val", 0, captions["val"][0])]
    for i, (split, k, _) in enumerate(rows):
        Image.fromarray(images[split][k]).save(f"samples/{i}.png")
    lines = [dict(prompt=prompt, file=f"{i}.png") for i, (*_, prompt) in enumerate(rows)]
    Path("samples/samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_emoji(compare="samples")
    out = capsys.readouterr().out
    assert "up to date" in out and "1 of 2 samples of trained" in out and "1 of 1 samples of held-out" in out
    assert load(Path("samples/compare.png").read_bytes()).width >= 3 * 32
    refused("samples.jsonl: no such file", prepare_emoji, compare="nowhere")
    source("large", {"0.png": encoded(0, "PNG", 64, 64), "samples.jsonl": [{"file": "0.png", "prompt": "snail"}]})
    refused("0.png: is (64, 64, 3), not (32, 32, 3); sample RGB images with --size=32", prepare_emoji, compare="large")
