"""Data sets in every form, their splits, order, index files and workers: data/dataset.py, forms.py and shards.py."""

import http.server
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint import UserError
from data import dataset as room
from data import forms
from data.dataset import BadImage, Dataset, Stream, collate, loader, permute, seed_of, step_positions, to_rgb, to_tensor

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("folder", "tar", "parquet", "npy")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # cache/ goes to the current directory


def pixels(i, size=(12, 10)):
    """A different smooth RGB image for each i, as (H, W, 3) uint8."""
    w, h = size
    y, x = np.mgrid[0:h, 0:w]
    return np.stack([x * 17 + i * 7, y * 19 + i * 3, (x + y) * 9 + i * 11], -1).astype(np.uint8)


def encoded(array, form="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def png(i=0, size=(12, 10)):
    return encoded(pixels(i, size))


def make_tar(path, members):
    """members: {name: bytes}, or a list of pairs where a name occurs twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def put(root, files):
    """Files {path: content}; a dict of members is a tar, of lists is a parquet table, an array .npy, str as UTF-8."""
    for path, content in files.items():
        path = root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tar" and not isinstance(content, bytes):
            make_tar(path, content)
        elif isinstance(content, dict) and path.suffix == ".parquet":
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            pq.write_table(pa.table(content), path, row_group_size=4)
        elif isinstance(content, np.ndarray):
            np.save(path, content)
        else:
            content = content if isinstance(content, bytes | str) else json.dumps(content)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def lines(records):
    return "\n".join(map(json.dumps, records))


def metas(ds):
    return {ds.key(i): (ds.meta(i)["label"], ds.meta(i)["text"]) for i in range(len(ds))}


def index_of(ds, key):
    return [ds.key(i) for i in range(len(ds))].index(key)


def same(a, b):
    """Whether two items or batches are the same, to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def all_same(a, b):
    return all(same(x, y) for x, y in zip(a, b, strict=True))


def make_shards(path, sizes):
    """Shards of so many small images; labels, captions and keys tell them apart, each fifth does not decode."""
    number = 0
    for s, size in enumerate(sizes):
        members = {}
        for i in range(size):
            members[f"{i:04d}.png"] = png(number, (4, 4)) if number % 5 else b"not an image"
            members |= {f"{i:04d}.cls": str(number % 3).encode(), f"{i:04d}.txt": f"no {number}".encode()}
            number += 1
        make_tar(path / f"{s:05d}.tar", members)
    return path


# --- randomness ---


def test_seeds_and_permutations_are_pinned():
    """Runs resume by them: the same on every machine and in every version."""
    assert seed_of(1, "a") == seed_of(np.int64(1), "a") == 2461651067226055738
    assert len({seed_of(*parts) for parts in [(1, 2), (2, 1), (12,), ("1", 2), (1, 2, 0), ()]}) == 6
    assert permute(np.arange(3), 10**9, seed=5).tolist() == [75155974, 201049163, 564084377]
    assert permute(2, 10**9, 5) == 564084377


@pytest.mark.parametrize(
    "n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 10**6, *(2**k + d for k in (8, 13, 19) for d in (-1, 0, 1))]
)
def test_permutation_is_a_bijection(n):
    hit = np.zeros(n, np.uint8)
    for start in range(0, n, 2**18):  # in pieces, as training asks for it
        hit[permute(np.arange(start, min(start + 2**18, n)), n, seed=n)] += 1
    assert hit.min() == hit.max() == 1
    few = range(0, n, -(-n // 40))
    assert [permute(i, n, 3) for i in few] == permute(np.array(few), n, 3).tolist()  # int and array agree


def test_permutation_is_even():
    counts = np.zeros((10, 10))
    for seed in range(3000):
        counts[np.arange(10), permute(np.arange(10), 10, seed)] += 1
    assert abs(counts - 300).max() < 100  # 6 sigma: every index goes everywhere
    n, at = 10**9, np.arange(100_000)
    to = permute(at, n, 1)
    near = np.bincount(to * 1000 // n, minlength=1000)  # 100 each are expected
    assert 800 < ((near - 100) ** 2 / 100).sum() < 1220  # chi squared of 999 degrees: 999 +- 5 x 44.7
    assert abs(np.corrcoef(to[:-1], to[1:])[0, 1]) < 0.02 and abs(np.corrcoef(to, at)[0, 1]) < 0.02
    for outside in (-1, 5, np.array([0, 5])):
        with pytest.raises(AssertionError, match=r"outside range\(5\)"):
            permute(outside, 5, 0)


# --- pixels ---


def modes():
    """name -> (image, the RGB array that it is)"""
    grey = np.arange(0, 250, dtype=np.uint8).reshape(10, 25)
    rgb, alpha = np.repeat(grey[:, :, None], 3, 2), np.full_like(grey, 255)
    alpha[:, :12] = 0  # fully transparent on the left: white
    on_white = np.where(alpha[..., None] == 0, 255, rgb).astype(np.uint8)
    palette = Image.fromarray(pixels(0)).quantize(8)
    clear = palette.copy()
    clear.info["transparency"] = clear.getpixel((0, 0))
    is_clear = np.asarray(clear) == clear.getpixel((0, 0))
    colors = np.asarray(palette.convert("RGB"))
    wide = np.linspace(0, 65535, 250).astype(np.uint16).reshape(10, 25)
    of_wide = np.repeat(np.round(wide / 257).astype(np.uint8)[:, :, None], 3, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime")]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=50)
    return {
        "grey": (Image.fromarray(grey), rgb),
        "RGBA": (Image.fromarray(np.dstack([rgb, alpha])), on_white),
        "LA": (Image.fromarray(np.dstack([grey, alpha]), "LA"), on_white),
        "palette": (palette, colors),
        "transparent palette": (clear, np.where(is_clear[..., None], 255, colors)),
        "1 bit": (Image.new("1", (2, 2), 1), np.full((2, 2, 3), 255)),
        "16 bit PNG": (Image.open(io.BytesIO(encoded(wide))), of_wide),
        "16 bit TIFF": (Image.open(io.BytesIO(encoded(wide, "TIFF"))), of_wide),
        "CMYK": (Image.fromarray(rgb).convert("CMYK"), rgb),
        "orientation": (Image.open(io.BytesIO(encoded(np.rot90(rgb).copy(), exif=exif))), rgb),
        "animation": (Image.open(gif), np.full((8, 8, 3), (255, 0, 0))),
    }


@pytest.mark.parametrize("name", modes())
def test_every_mode_becomes_rgb(name):
    image, wanted = modes()[name]
    assert np.array_equal(to_rgb(image), wanted)


def test_resize_and_crop(tmp_path):
    wide, stripes = pixels(0, (20, 10)), np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    put(
        tmp_path / "set",
        {"a.png": encoded(wide), "b.png": encoded(np.full((3, 2, 3), 77, np.uint8)), "c.png": encoded(stripes)},
    )
    ds, small = Dataset(tmp_path / "set", "all", 10), Dataset(tmp_path / "set", "all", 5)
    full = to_tensor(Image.fromarray(wide))
    assert full.dtype == torch.float32 and full.min() >= -1 and full[0, 0, 15] == 255 / 127.5 - 1
    assert torch.equal(ds[0]["image"], full[:, :, 5:15])  # no resize where none is needed
    assert torch.equal(ds.pixels(0, flip=True), full[:, :, 5:15].flip(-1))
    assert torch.allclose(ds[1]["image"], torch.full((3, 10, 10), 77 / 127.5 - 1))  # smaller: enlarged
    assert torch.equal(small.pixels(0, "random", u=(0.0, 0.999, 0.999)), full[:, 5:, 15:])  # side 0.5 + 0.5 u
    assert torch.equal(small.pixels(0, "random", u=(0.0, 0.0, 0.0)), full[:, :5, :5])
    assert Dataset(tmp_path / "set", "all", 16)[2]["image"][:, :, 2:-2].abs().max() < 0.05  # antialiased: grey


# --- forms ---

COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)  # class -> color
WHERE = [("cat", [2, 1, 4, 5]), ("dog", [12, 6, 6, 4]), ("cat", [0, 0, 2, 10])]  # the last is outside the center crop
OBJECTS = {"bbox": [box for _, box in WHERE], "categories": [name for name, _ in WHERE]}


def scene(i, size=(18, 10)):
    """A map of blocks of two pixels, and the image with the map's colors; class 4 is unknown."""
    w, h = size
    classes = np.random.default_rng(i).integers(0, 5, (h // 2, w // 2)).repeat(2, 0).repeat(2, 1).astype(np.uint8)
    return np.where(classes == 4, 255, classes).astype(np.uint8), COLORS[classes]


def make_scenes(path, form, n=6):
    """One data set in each form: labels, two captions, maps and objects."""
    maps, images = zip(*[scene(i) for i in range(n)])
    label, texts = [i % 2 for i in range(n)], [[f"image {i}", f"no {i}, “quoted”"] for i in range(n)]
    records = [{"text": texts[i], "label": label[i], "objects": OBJECTS} for i in range(n)]
    files = {"classes.json": {"0": "a", "1": "b"} if form == "parquet" else ["a", "b"]}
    if form == "npy":
        files |= {"images.npy": np.stack(images), "maps.npy": np.stack(maps), "labels.npy": np.array(label)}
        files |= {"captions.jsonl": lines(records), "meta.json": {"classes": ["a", "b"]}}
        files.pop("classes.json")
    elif form == "folder":
        files |= {f"{'ab'[i % 2]}/{i:03d}.png": encoded(images[i]) for i in range(n)}
        files |= {f"{'ab'[i % 2]}/{i:03d}.map.png": encoded(maps[i]) for i in range(n)}
        files["metadata.jsonl"] = lines({"file_name": f"{'ab'[i % 2]}/{i:03d}.png"} | records[i] for i in range(n))
    elif form == "tar":
        ends = {".png": lambda i: encoded(images[i]), ".map.png": lambda i: encoded(maps[i])}
        ends[".json"] = lambda i: json.dumps(records[i]).encode()
        for name, numbers in (("a.tar", range(4)), ("b.tar", range(4, n))):
            files[name] = {f"{i:03d}{end}": content(i) for i in numbers for end, content in ends.items()}
    else:
        columns = {"image": [{"bytes": encoded(image), "path": "x"} for image in images], "label": label, "text": texts}
        columns |= {"segmentation": [{"bytes": encoded(m)} for m in maps], "objects": [OBJECTS] * n}
        files["a.parquet"] = columns
    return put(path, files)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_content_in_every_form(tmp_path, form):
    ds = Dataset(make_scenes(tmp_path / "set", form), "all", 10)
    assert (ds.form, len(ds), ds.classes, ds.num_classes) == (form, 6, ["a", "b"], 2)
    assert ds.has_maps and ds.has_objects
    assert (ds.map_names, ds.map_classes, ds.object_classes) == ([], 4, ["cat", "dog"])
    wanted = "6 images.*2 classes \\(a, b\\), labels on 6, captions on 6, maps on 6, objects on 6$"
    assert re.search(wanted, str(ds)), str(ds)
    for i in range(6):
        number = int(ds.meta(i)["text"][0].split()[-1])
        assert ds.meta(i) == dict(label=number % 2, text=[f"image {number}", f"no {number}, “quoted”"], key=ds.key(i))
        classes, image = scene(number)
        assert torch.equal(ds[i]["image"], to_tensor(Image.fromarray(image[:, 4:14].copy())))
        assert ds.size(i) == (18, 10) and ds.labels[i] == number % 2
        assert np.array_equal(ds.map(i) % 256, classes[:, 4:14]), "-1 is 255"
        for crop in (dict(), dict(crop="random", u=(1 - 1e-9, 0.7, 0.4))):
            for flip in (False, True):
                colors = torch.from_numpy(COLORS[ds.map(i, flip=flip, **crop).numpy()]).permute(2, 0, 1) / 127.5 - 1
                assert torch.equal(colors, ds.pixels(i, flip=flip, **crop)), "the map is cut as the pixels are"
        cat, dog = ds.boxes(i)  # the crop is 4..14: half of the cat, a third of the dog is in it
        assert cat == pytest.approx(("cat", 0, 0.1, 0.2, 0.6)) and dog == pytest.approx(("dog", 0.8, 0.6, 1, 1))
        assert ds.boxes(i, flip=True)[0] == pytest.approx(("cat", 0.8, 0.1, 1, 0.6))
    assert len({ds.key(i) for i in range(6)}) == 6 and len(pickle.dumps(ds)) < 20_000
    fingerprint = ds.fingerprint
    put(
        tmp_path / "set",
        {"map_classes.json": ["sky", "sea", "sand", "stone", "snow"], "object_classes.json": ["x", "cat"]},
    )
    ds = Dataset(tmp_path / "set", "all", 10)
    assert (ds.map_classes, ds.map_names[1], ds.object_classes) == (5, "sea", ["x", "cat"])
    assert ds.fingerprint == fingerprint, "caches of latents stay valid"
    with pytest.raises(IndexError, match="dataset of 6"):
        ds.map(6)


def described(*names, **more):
    return lines({"file_name": name, "text": f"t{i}"} | more for i, name in enumerate(names))


def npy_header(text):
    return b"\x93NUMPY\x01\x00\x80\x00" + text.encode().ljust(127) + b"\n"


HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (3, 4611686018427387904), }"
HUB = {b"huggingface": b'{"info": {"features": {"label": {"names": ["neg", "pos"]}}}}'}
P, GREY = png(), np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
# name: (files, {key: (label, captions)}, class names), or (files, message of the error)
FOUND = {
    "classes": ({"b/1.png": P, "a/1.png": P}, {"a/1.png": (0, []), "b/1.png": (1, [])}, ["a", "b"]),
    "no classes": ({"1.png": P, "x.txt": "-"}, {"1.png": (-1, [])}, []),
    "train is a class": (
        {"9/1.png": P, "train/1.png": P}, {"9/1.png": (0, []), "train/1.png": (1, [])}, ["9", "train"],
    ),
    "labels in metadata": (
        {"images/1.png": P, "images/2.png": P, "metadata.jsonl": described("images/1.png", label="x")},
        {"images/1.png": (0, ["t0"]), "images/2.png": (-1, [])}, None,
    ),
    "a lone images/ is no class": (
        {"images/1.png": P, "metadata.jsonl": described("images/1.png")}, {"images/1.png": (-1, ["t0"])}, [],
    ),
    "metadata beside images": (
        {"a/1.png": P, "b/1.png": P, "a/metadata.jsonl": described("1.png")},
        {"a/1.png": (0, ["t0"]), "b/1.png": (1, [])}, ["a", "b"],
    ),
    "metadata of more": (
        {"a.png": P, "metadata.jsonl": described("a.png", "b.png")}, {"a.png": (-1, ["t0"])}, [],
    ),
    "classes.json orders": (
        {"cat/1.png": P, "dog/1.png": P, "classes.json": ["dog", "bird", "cat"]},
        {"cat/1.png": (2, []), "dog/1.png": (0, [])}, ["dog", "bird", "cat"],
    ),
    "classes.json renames": (
        {"n01/1.png": P, "n02/1.png": P, "classes.json": ["tabby", "poodle"]},
        {"n01/1.png": (0, []), "n02/1.png": (1, [])}, ["tabby", "poodle"],
    ),
    "tar": (
        {"sub/0.tar": {"./x/a.jpg": P, "./x/a.txt": "ein Bär\n".encode(), "./x/a.cls": b"3\n",
                       "b.json": b'{"caption": "json", "label": 1}', "b.jpg": P, "b.seg.png": b"-",
                       "lonely.txt": b"no image", "._c.jpg": b"of a Mac",
                       "c.JPG": P, "c.txt": b"first", "c.json": b'{"caption": "second"}',
                       "d.jpg": P, "d.txt": b"", "d.json": b'{"text": ["one", "", "two"]}'}},
        {"sub/0/x/a": (3, ["ein Bär"]), "sub/0/b": (1, ["json"]), "sub/0/c": (-1, ["first"]),
         "sub/0/d": (-1, ["one", "two"])}, [],
    ),
    "tar: grouped by extension": (
        {"0.tar": {"a.jpg": P, "b.jpg": P, "a.txt": b"A", "b.txt": b"B"}}, {"0/a": (-1, ["A"]), "0/b": (-1, ["B"])},
        [],
    ),
    "tar: words are numbered in sorted order": (
        {"0.tar": {"1.png": P, "1.cls": b"dog", "2.png": P, "2.cls": b"ant"}, "1.tar": {"3.png": P, "3.cls": b"10"}},
        {"0/1": (2, []), "0/2": (1, []), "1/3": (0, [])}, ["10", "ant", "dog"],
    ),
    "parquet": (
        {"a.parquet": {"jpg": [P] * 4, "caption": ["one", None, "three", ""], "annotation": list("abcd")}},
        {"a/000000": (-1, ["one"]), "a/000001": (-1, []), "a/000002": (-1, ["three"]), "a/000003": (-1, [])}, [],
    ),
    "npy grey": (
        {"images.npy": GREY[..., None], "labels.npy": np.array([0, 2])}, {"00000000": (0, []), "00000001": (2, [])},
        [],
    ),
    "npy first, of npy and tar": (
        {"images.npy": GREY, "x.tar": {"1.png": P}}, {"00000000": (-1, []), "00000001": (-1, [])}, [],
    ),
    # errors
    "empty": ({"notes.txt": "-"}, r"holds no images; looked for images.npy, \*.tar, \*.parquet and .jpg"),
    "not made": ({"prepare.py": "-"}, "holds no images; run .*prepare.py"),
    "metadata names nothing": ({"a.png": P, "metadata.jsonl": described("b.png")}, "metadata.jsonl: names no image"),
    "metadata without names": ({"a.png": P, "metadata.jsonl": '{"text": "t"}'}, "line without file_name"),
    "metadata broken": ({"a.png": P, "metadata.jsonl": '{"file_name": "a.png"}\n{'}, "jsonl line 2: is not JSON"),
    "metadata nested": ({"a.png": P, "metadata.jsonl": "[" * 10**5}, "line 1: is not JSON"),
    "class without a name": (
        {"cat/1.png": P, "dog/1.png": P, "classes.json": ["dog", "a", "b"]}, "'cat' is not among",
    ),
    "label without a name": (
        {"images.npy": GREY, "labels.npy": np.array([0, 2]), "classes.json": ["a", "b"]}, "label 2 but only 2",
    ),
    "classes nested": ({"a.png": P, "classes.json": "[" * 10**5}, "classes.json: is not JSON"),
    "classes far apart": ({"a.png": P, "classes.json": '{"999999999": "a"}'}, "number them from 0"),
    "npy label count": ({"images.npy": GREY, "labels.npy": np.arange(3)}, "labels.npy: has 3 entries, not 2"),
    "npy float": ({"images.npy": GREY.astype(np.float32)}, "images.npy: is float32 .* make it uint8"),
    "npy channels first": ({"images.npy": np.zeros((2, 3, 8, 8), np.uint8)}, "make it uint8"),
    "npy in Fortran order": ({"images.npy": np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8))}, "in C order"),
    "npy of objects": ({"images.npy": np.array([{}])}, "does not load as .npy .*Python objects"),
    "npy that is code": ({"images.npy": npy_header("__import__('os').system('touch x')")}, "load as .npy"),
    "npy that is huge": ({"images.npy": npy_header(HUGE)}, "does not load as .npy"),
    "npy maps": (
        {"images.npy": GREY, "maps.npy": GREY[:1]}, r"maps.npy: is uint8 \(1, 8, 8\); make it uint8 \(2, 8, 8\)",
    ),
    "parquet without images": ({"a.parquet": {"photo": [P]}}, "has the columns .'photo'.; call the one"),
    "parquet that is none": ({"a.parquet": b"PAR1 not really"}, "does not open as parquet"),
}  # fmt: skip


LEFT_OUT = {
    "no classes": "left out: 1 not an image (x.txt)",
    "metadata of more": "captions on 1, left out: 1 in metadata.jsonl, but no image here (b.png)",
    "tar": "left out: 1 hidden, or cut short (._c.jpg), left out: 1 without an image (lonely.txt)",
    "npy first, of npy and tar": "left out: 1 of another form (x.tar)",
}


@pytest.mark.parametrize("case", FOUND)
def test_what_is_found(tmp_path, case):
    files, wanted, *classes = FOUND[case]
    put(tmp_path / "set", files)
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            len(Dataset(tmp_path / "set", "all", 8))
        return
    ds = Dataset(tmp_path / "set", "all", 8)
    assert metas(ds) == wanted and ds.classes == (classes[0] if classes[0] is not None else ds.classes)
    highest = max(label for label, _ in wanted.values())
    assert ds.num_classes == (max(highest + 1, len(ds.classes)) if highest >= 0 else 0)
    assert ds.labels.tolist() == [label for label, _ in wanted.values()]
    assert str(ds).endswith(LEFT_OUT.get(case, "")) and ("left out" in str(ds)) == (case in LEFT_OUT), str(ds)
    if ds.form != "npy":
        assert all(ds[i]["image"].shape == (3, 8, 8) for i in range(len(ds)))


def test_a_repeated_key_never_gets_the_others_caption(tmp_path):
    """Items with the same key in one shard: then what is side by side is an item."""
    for shard, second in (("0", "0.png"), ("1", "0.jpg")):
        members = [("0.png", png(1)), ("1.png", png(2)), ("1.txt", b"one"), (second, png(3)), ("0.txt", b"blue")]
        make_tar(tmp_path / f"set/{shard}.tar", members)
    ds = Dataset(tmp_path / "set", "all", 8)
    for i, shard in ((0, "0"), (3, "1")):
        found = [(ds.key(j), ds.meta(j)["text"], ds.encoded(j)) for j in range(i, i + 3)]
        keys = [(f"{shard}/0", [], png(1)), (f"{shard}/0", ["blue"], png(3)), (f"{shard}/1", ["one"], png(2))]
        assert found == keys


def test_hub_names_of_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())], HUB)
    pa.parquet.write_table(pa.table({"image": [png()] * 3, "label": [1, 0, None]}, schema), tmp_path / "a.parquet")
    ds = Dataset(tmp_path / "a.parquet", "all", 8)  # one shard by its own name
    assert ds.classes == ["neg", "pos"] and ds.labels.tolist() == [1, 0, -1]


def test_parquet_keeps_only_some_row_groups(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (12, 30, 30, 3), dtype=np.uint8)
    put(tmp_path / "set", {"a.parquet": {"image": [encoded(x) for x in noise]}})
    monkeypatch.setattr(room, "GROUP_BYTES", 24000)  # two groups of four images of 2.7 kB
    ds = Dataset(tmp_path / "set", "all", 30)
    for i in list(range(12)) + [0, 11, 5]:
        assert torch.equal(ds[i]["image"], to_tensor(Image.fromarray(noise[i]))) and len(ds._groups) <= 2


def test_links(tmp_path):
    put(tmp_path / "raw", {f"{i}.png": png(i) for i in range(3)})
    (tmp_path / "set").mkdir()
    for name in ("train", "val"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "raw")
    (tmp_path / "raw/up").symlink_to(tmp_path / "set")  # leads back up: no end but for the guard
    assert len(Dataset(tmp_path / "set", "train")) == len(Dataset(tmp_path / "set", "val")) == 3


def test_numbered_objects_and_bad_ones(tmp_path):
    objects = [
        {"bbox": [[0, 0, 4, 8]], "categories": [1]},
        {"bbox": [[0, 0, 4, 8]], "category": ["x y "]},
        {"bbox": [[0, 0, 4]], "categories": [1]},
        {"bbox": [], "categories": [1]},
        {"bbox": [[0, 0, 0, 8], [9, 9, 9, 9], [-2, -2, 4, 4]], "categories": [0, 0, 7]},
        {"categories": []},
    ]
    records = [{"text": "t", "objects": value} for value in objects] + [["only captions"]]
    put(tmp_path / "set", {"images.npy": np.zeros((7, 8, 8, 3), np.uint8), "captions.jsonl": lines(records)})
    ds = Dataset(tmp_path / "set", "all", 8)
    assert ds.boxes(0) == [("1", 0, 0, 0.5, 1)] and ds.boxes(1) == [("x y", 0, 0, 0.5, 1)]
    assert ds.boxes(4) == [("7", 0, 0, 0.25, 0.25)], "nothing of the others can be seen"
    assert ds.boxes(6) == [] and ds.meta(6)["text"] == ["only captions"]
    assert ds.object_classes == ["0", "1", "7", "x y"]
    for i, message in ((2, "give .x, y, w, h. and a category each"), (3, "1 categories, 0 boxes"), (5, "bbox")):
        with pytest.raises(BadImage, match=f"0000000{i}: its objects do not read .*{message}"):
            ds.boxes(i)
    for name, names in (("classes.json", ["a", "cat"]), ("object_classes.json", ["person", "tree"])):
        put(tmp_path / "set", {name: names})
        assert Dataset(tmp_path / "set", "all", 8).boxes(0)[0][0] == names[1]


# --- splits ---


def tar_of(*keys):
    return {f"{key}.png": png() for key in keys}


# files, {split: keys}
SPLIT = {
    "folders": (
        {"train/a/1.png": P, "train/b/2.png": P, "val/b/3.png": P, "test/a/4.png": P},
        {"train": ["train/a/1.png", "train/b/2.png"], "val": ["val/b/3.png"], "test": ["test/a/4.png"]},
    ),
    "test stands for val": ({"train/1.png": P, "test/3.png": P}, {"train": ["train/1.png"], "val": ["test/3.png"]}),
    "what is not held out trains": (
        {"a/1.png": P, "train-0.tar": tar_of(1), "x/valid/0.tar": tar_of(9)},
        {"train": ["train-0/1"], "val": ["x/valid/0/9"]},
    ),
    "names of shards": (
        {"part-0.tar": tar_of(1, 2), "validation_0.tar": tar_of(3)},
        {"train": ["part-0/1", "part-0/2"], "val": ["validation_0/3"]},
    ),
    "npy": (
        {"train/images.npy": GREY, "val/images.npy": GREY[:1]},
        {"train": ["train/00000000", "train/00000001"], "val": ["val/00000000"]},
    ),
    "few images leave one": (
        {"0.tar": tar_of(*"abc"), "1.tar": tar_of(*"de")}, {"train": ["0/a", "0/b", "1/d", "1/e"], "val": ["0/c"]},
    ),
    "one image is in both": ({"1.png": P}, {"train": ["1.png"], "val": ["1.png"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLIT)
def test_splits(tmp_path, case):
    files, wanted = SPLIT[case]
    put(tmp_path / "set", files)
    for split, keys in wanted.items():
        ds = Dataset(tmp_path / "set", split, 8)
        assert [ds.key(i) for i in range(len(ds))] == keys and ds.path.endswith("set")
        assert ds.classes == Dataset(tmp_path / "set", "all").classes, "numbered alike in every split"
    with pytest.raises(UserError, match="has no valid images|is not there"):
        Dataset(tmp_path / ("set" if "valid" not in str(files) else "nowhere"), "valid", 8)


def test_split_by_crc32(tmp_path):
    put(tmp_path / "set", {"images.npy": np.zeros((1000, 1, 1, 3), np.uint8)})
    keys = {split: list(metas(Dataset(tmp_path / "set", split, 1))) for split in ("train", "val", "all")}
    assert keys["val"] == [key for key in keys["all"] if zlib.crc32(key.encode()) % 100 == 0]
    assert keys["train"] == [key for key in keys["all"] if zlib.crc32(key.encode()) % 100]
    assert 0 < len(keys["val"]) < 30


# --- damage ---


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_each_bad_item_says_what_is_wrong(tmp_path, monkeypatch):
    good, exif = encoded(pixels(0, (64, 64)), "JPEG"), Image.Exif()
    exif[0x0112] = 6
    turned = encoded(pixels(0, (64, 64)), "JPEG", exif=exif)
    wanted = {  # content, reason
        "empty.jpg": (b"", "it has 0 bytes"),
        "cut.jpg": (good[: len(good) // 2], "truncated"),
        "turned.jpg": (turned[: len(turned) // 2], "truncated"),  # turning it must not hide that it is cut
        "text.png": (b"<html>404</html>", "not an image that Pillow can read"),
        "huge.png": (encoded(np.zeros((40, 400, 3), np.uint8)), "400x40 is over"),
    }
    put(tmp_path / "set", {name: content for name, (content, _) in wanted.items()})
    (tmp_path / "set/link.png").symlink_to(tmp_path / "gone.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15000)
    ds = Dataset(tmp_path / "set", "all", 16)
    for name, reason in [*((name, reason) for name, (_, reason) in wanted.items()), ("link.png", "No such file")]:
        with pytest.raises(BadImage, match=f"^{name}: .*{reason}"):
            ds[index_of(ds, name)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself refuses beyond twice the limit
    with pytest.raises(BadImage, match="huge.png: .*decompression bomb"):
        ds.pixels(index_of(ds, "huge.png"))


def test_each_bad_map_says_what_is_wrong(tmp_path):
    classes, image = scene(0)
    indexed, file = Image.fromarray(classes, "P"), io.BytesIO()
    indexed.putpalette([7] * 768)
    indexed.save(file, "PNG")
    contents = {
        "a": (encoded(image), "mode RGB: save it as 8-bit grey"),
        "b": (encoded(classes[:, :10]), r"its map is \(10, 10\), the image \(18, 10\): make them the same size"),
        "c": (b"no", "its map does not read .not an image that Pillow can read"),
        "d": (b"", "it has no map"),
        "e": (file.getvalue(), None),
    }
    for name, (content, _) in contents.items():
        put(tmp_path / "set", {f"{name}.jpg": encoded(image, "JPEG"), f"{name}.map.png": content})
    put(tmp_path / "set", {"alone.map.png": encoded(image)})  # no image beside it: it is one
    ds = Dataset(tmp_path / "set", "all", 10)
    assert [ds.key(i) for i in range(len(ds))] == ["a.jpg", "alone.map.png", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    assert np.array_equal(ds.map(5) % 256, classes[:, 4:14])
    for name, (_, message) in list(contents.items())[:4]:
        with pytest.raises(BadImage, match=f"^{name}.jpg: .*{message}"):
            ds.map(index_of(ds, f"{name}.jpg"))


def test_a_damaged_tar_gives_what_is_complete(tmp_path, capsys):
    path = make_tar(tmp_path / "set/a.tar", tar_of(*range(5)) | {"6.png": png(), "6.json": b"{damaged"})
    ds = Dataset(tmp_path / "set", "all", 10)
    with pytest.raises(BadImage, match="a/6: its caption does not read"):
        ds.meta(5)
    path.write_bytes(path.read_bytes()[: 3 * 1024 + 520])  # one header and one block an image: the fourth is cut
    ds = Dataset(tmp_path / "set", "all", 10)
    assert "damaged" in capsys.readouterr().out and "left out: 1 " in str(ds)
    assert len(ds) == 3 and all(ds[i]["image"].shape == (3, 10, 10) for i in range(3))
    os.truncate(path, 2 * 1024 + 520)  # after it was indexed
    with pytest.raises(BadImage, match="a/2: a.tar ends after 2568 bytes, the index says"):
        ds[2]


def test_a_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encoded(pixels(0, (60, 40)), "JPEG", exif=exif)
    put(tmp_path / "set", {"a.jpg": encoded(pixels(0, (60, 40)), "JPEG"), "b.jpg": image, "c.jpg": image[:50]})
    ds = Dataset(tmp_path / "set", "all")
    assert (ds.size(0), ds.size(1)) == ((60, 40), (40, 60))
    with pytest.raises(BadImage, match="c.jpg: "):
        ds.size(2)


# --- index files and fingerprints ---


@pytest.fixture
def indexed(monkeypatch):
    """The shards that are indexed from now on."""
    read, real = [], forms.index_tar
    monkeypatch.setattr(forms, "index_tar", lambda opened, shard: read.append(shard) or real(opened, shard))
    return read


def test_index_files(tmp_path, indexed):
    """They are kept, renewed where a shard changed, and made again where they are damaged, gone or not finished."""
    path = make_shards(tmp_path / "set", [4] * 6)
    first = Dataset(path, "all", 4)
    assert len(indexed) == 6 and metas(Dataset(path, "all")) == metas(first) and len(indexed) == 6
    make_tar(path / "00002.tar", {"new.png": png(9)})
    changed = Dataset(path, "all")
    assert indexed[6:] == ["00002.tar"] and len(changed) == 21 and changed.fingerprint != first.fingerprint
    os.remove(path / "00000.tar")
    assert len(Dataset(path, "all")) == 17 and len(indexed) == 7
    make_tar(path / "00001.tar", {"new.png": png(9)})
    (folder,) = Path("cache").iterdir()
    assert len(Dataset(path, "all")) == 14 and len(list(folder.glob("*.npz"))) == 5, "nothing old stays"
    wanted = metas(Dataset(path, "all"))
    for damage in (b"PK cut short", None):
        for file in folder.glob("*.npz"):
            file.write_bytes(damage) if damage else file.unlink()
        assert metas(Dataset(path, "all")) == wanted, "from the shards"
    (folder / "headers.json").write_text("{")  # as after a kill: what is there is not made again
    indexed.clear()
    files = [make_shards(tmp_path / "other", [4] * 6), Dataset(tmp_path / "other", "all", cache_dir="cache2")]
    (other,) = Path("cache2").iterdir()
    os.remove(other / "headers.json")
    for file in sorted(other.glob("*.npz"))[:2]:
        file.unlink()
    indexed.clear()
    assert metas(Dataset(files[0], "all", cache_dir="cache2")) == metas(files[1]) and len(indexed) == 2
    Path("taken").write_text("a file")
    with pytest.raises(
        UserError, match="taken/index-.*: the index of 5 shards cannot be kept there.*; set another cache_dir"
    ):
        Dataset(path, "all", cache_dir="taken")


def test_processes_index_alike(tmp_path, monkeypatch):
    path, made = make_shards(tmp_path / "set", [3] * 33), {}
    for count in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=count: range(count))
        made[count] = Dataset(path, "all", 4, cache_dir=f"cache{count}")
    assert metas(made[1]) == metas(made[2]) and made[1].fingerprint == made[2].fingerprint and len(made[1]) == 99
    assert len(pickle.dumps(made[1])) < 30_000, "no rows in memory"
    (path / "00007.tar").unlink()
    put(path, {"00007.tar": b"", "bad.parquet": b""})
    assert len(Dataset(path, "all", 4)) == 96, "an empty shard"


def open_in_process(path, queue):
    real = forms.index_tar
    forms.index_tar = lambda *where: queue.put("index") or time.sleep(0.05) or real(*where)
    queue.put(Dataset(path, "all", 4).fingerprint)


def test_one_of_many_processes_indexes(tmp_path):
    path, fork = make_shards(tmp_path / "set", [3] * 8), multiprocessing.get_context("fork")
    queue = fork.Queue()
    ranks = [fork.Process(target=open_in_process, args=(path, queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    said = [queue.get(timeout=60) for _ in range(8 + 3)]
    assert said.count("index") == 8 and len(set(said)) == 2


@pytest.mark.parametrize("form", FORMS)
def test_fingerprint_follows_the_content_and_not_the_path(tmp_path, form):
    path = make_scenes(tmp_path / "set", form)
    subprocess.run(["cp", "-a", path, tmp_path / "copy"], check=True)
    first = Dataset(path, "all", 10).fingerprint
    assert Dataset(tmp_path / "copy", "all", 10).fingerprint == first, "copied with its times"
    image = max(
        (file for file in path.rglob("*.*") if file.suffix in (".png", ".tar", ".parquet", ".npy")),
        key=lambda f: f.stat().st_size,
    )
    found, data = os.stat(image), bytearray(image.read_bytes())
    os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert Dataset(path, "all", 10).fingerprint != first, "another time"
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert Dataset(path, "all", 10).fingerprint != first, "an edit that keeps size and time, of a small set"


# --- the stream and the loader ---


@pytest.fixture
def pets(tmp_path):
    files = {f"{('cat', 'dog')[i % 2]}/{i:03d}.png": png(i, (14, 10)) for i in range(23)}
    records = [{"file_name": name, "text": [f"{i} {c}" for c in "abc"]} for i, name in enumerate(files) if i < 22]
    return Dataset(put(tmp_path / "pets", files | {"metadata.jsonl": lines(records)}), "all", 8)


@pytest.fixture
def uneven(tmp_path):
    return Dataset(make_shards(tmp_path / "uneven", [1, 17, 0, 4, 9, 30, 2, 2, 13, 5]), "all", 4)


def test_stream_is_a_pure_function_of_seed_and_position(pets):
    one, two, other = (Stream(pets, seed, crop="random", flip=True) for seed in (1, 1, 2))
    backwards = {p: two[p] for p in reversed(range(50))}
    assert all(same(one[p], backwards[p]) for p in range(50))
    assert any(one.item(p) != other.item(p) for p in range(23))
    # the same item is seen otherwise in the next epoch: crop, flip, caption
    seen = [[one[p] for p in range(115) if one.item(p)[0] == index] for index in range(22)]
    assert all(len(views) == 5 and not torch.equal(views[0]["image"], views[1]["image"]) for views in seen)
    flips, texts = [v["flip"] for views in seen for v in views], [v["text"] for views in seen for v in views]
    assert 30 < sum(flips) < 80 and all(20 < sum(text.endswith(c) for text in texts) < 55 for c in "abc")
    for p in range(40):
        picked = one.pick(p)
        assert all(one[p][name] == value for name, value in picked.items())
        assert torch.equal(one[p]["image"], pets.pixels(picked["index"], "random", picked["flip"], picked["u"]))
        assert picked["text"] in (pets.meta(picked["index"])["text"] or [""]) and all(0 <= u < 1 for u in picked["u"])
    plain = Stream(pets, 3, crop="random", flip=True, train=False)
    for p in range(30):
        assert plain.item(p) == (p % 23, p // 23) and not plain[p]["flip"]
        assert torch.equal(plain[p]["image"], pets[p % 23]["image"])
        assert plain[p]["text"] == (pets.meta(p % 23)["text"] or [""])[0]


def order_by_hand(ds, stream, epoch, window):
    """The windowed order, as its docstring has it, with lists."""
    shards = np.split(np.arange(len(ds)), ds.bounds[1:-1])
    order = permute(np.arange(len(shards)), len(shards), seed_of(stream.seed, epoch, "shards")).tolist()
    out = []
    for first in range(0, len(shards), window):
        items = [int(i) for s in order[first : first + window] for i in shards[s]]
        out += [items[permute(j, len(items), seed_of(stream.seed, epoch, "window", first))] for j in range(len(items))]
    return out


@pytest.mark.parametrize("window", [1, 3, 32])
def test_the_order_rule(uneven, monkeypatch, window):
    """One permutation; with more shards than a window, shards and then the items of a window of them."""
    monkeypatch.setattr(room, "WINDOW", window)
    stream, n = Stream(uneven, 5), len(uneven)
    epochs = [[stream.item(p)[0] for p in range(e * n, (e + 1) * n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and epochs[0] != epochs[1]
    if window == 32:
        assert epochs == [[permute(i, n, seed_of(5, e)) for i in range(n)] for e in range(3)]
    else:
        assert epochs == [order_by_hand(uneven, stream, e, window) for e in range(3)]
        assert Stream(uneven, 5).item(2 * n + 11) == (epochs[2][11], 2), "a fresh one knows any position at once"
    shard = lambda i: int(np.searchsorted(uneven.bounds, i, "right"))  # noqa: E731
    for p in range(n):
        first, count = stream.span(p)
        assert shard(stream.item(p, 1)[0]) in {shard(stream.item(q)[0]) for q in range(first, first + count)}
    assert Stream(uneven, 5, train=False).item(7) == (7, 0)


def test_positions_do_not_depend_on_the_number_of_ranks():
    for step in range(3):
        for b, acc, world in [(16, 1, 1), (4, 4, 1), (8, 1, 2), (4, 2, 2), (4, 1, 4), (2, 2, 4)]:
            parts = [step_positions(step, m, b, acc, rank, world) for m in range(acc) for rank in range(world)]
            assert sum(parts, []) == list(range(step * 16, step * 16 + 16))
    assert step_positions(step=5, micro=1, batch_size=3, grad_accum=2, rank=1, world=2) == [69, 70, 71]


def test_loader_is_the_same_for_any_number_of_workers_and_any_start(pets):
    stream = Stream(pets, 3, crop="random", flip=True)
    before, options = torch.get_rng_state(), dict(batch_size=2, grad_accum=2, rank=1, world=2)
    plain = list(loader(stream, 0, 6, **options))
    assert len(plain) == 12 and all_same(plain, loader(stream, 0, 6, workers=2, **options))
    assert all_same(plain[8:], loader(stream, 4, 6, workers=1, **options))
    positions = [p for step in range(6) for micro in range(2) for p in step_positions(step, micro, 2, 2, 1, 2)]
    assert sum((batch["index"].tolist() for batch in plain), []) == [stream.item(p)[0] for p in positions]
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not used"
    batch = collate([stream[p] for p in range(3)])
    assert batch["image"].shape == (3, 3, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["label"].dtype == batch["index"].dtype == torch.int64 and batch["flip"].dtype == torch.bool
    assert len(batch["text"]) == len(batch["key"]) == 3 and batch["bad"] == []
    assert list(loader(stream, 3, 3, 2, workers=1)) == []


def test_bad_images_are_replaced_and_named(uneven):
    stream, n = Stream(uneven, 5, flip=True), len(uneven)
    items = [stream[p] for p in range(n)]
    for p, item in enumerate(items):
        first = stream.pick(p)
        assert bool(item["bad"]) == (int(first["text"][3:]) % 5 == 0)
        assert not item["bad"] or item["bad"][0] == f"{first['key']}: not an image that Pillow can read"
        chosen = stream.pick(p, len(item["bad"]))  # a reader of cached latents finds the same one
        assert all(item[name] == value for name, value in chosen.items()) and same(item, stream[p])
    assert len({item["key"] for item in items if item["bad"]}) > 8, "not always the same one"
    bad = [line for batch in loader(stream, 0, 10, batch_size=4, workers=2) for line in batch["bad"]]
    assert bad == [line for item in items[:40] for line in item["bad"]]


def test_all_bad_is_an_error_that_says_so(tmp_path):
    ds = Dataset(put(tmp_path / "set", {f"{i}.jpg": b"no" for i in range(3)}), "all", 8)
    with pytest.raises(UserError, match=r"all 100 images tried are bad \(.*[012]\.jpg: not an image"):
        Stream(ds, 0)[0]
    with pytest.raises(UserError, match="all 100 images tried"):
        next(loader(Stream(ds, 0), 0, 1, batch_size=2, workers=1))


TRAINER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from data.dataset import Dataset, Stream, loader
signal.signal(signal.SIGTERM, lambda *_: print("term", flush=True))
signal.signal(signal.SIGINT, lambda *_: print("int", flush=True))
stream = Stream(Dataset(sys.argv[2], "all", 8), 0)
batches = loader(stream, 0, 50, batch_size=2, workers=2)
next(batches)
print("ready", flush=True)
input()
print(sum(1 for _ in batches), flush=True)
batches = loader(stream, 0, 50, batch_size=2, workers=2)
next(batches)  # and the process ends, though this one has not come to its end
"""


def test_workers_outlive_signals_that_are_for_the_trainer(pets):
    command = [sys.executable, "-c", TRAINER, str(ROOT), pets.path]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, start_new_session=True, **pipes) as trainer:
        try:
            assert trainer.stdout.readline() == "ready\n"
            for number, line in ((signal.SIGTERM, "term\n"), (signal.SIGINT, "int\n")):
                os.killpg(trainer.pid, number)  # the trainer and its workers, as torchrun and Ctrl-C do
                assert trainer.stdout.readline() == line
            out, err = trainer.communicate("\n", timeout=30)
        finally:
            trainer.kill()
    assert (trainer.returncode, out) == (0, "49\n"), err


class Faulty(torch.utils.data.Dataset):
    """A stream whose worker dies, or hangs, at position 5."""

    def __init__(self, stream, fault):
        self.stream, self.fault = stream, fault

    def __getitem__(self, p):
        if p == 5:
            os._exit(3) if self.fault == "dies" else time.sleep(100)
        return self.stream[p]


def load_in_process(stream, fault, queue):
    room.TIMEOUT = 1 if fault == "hangs" else 5
    try:
        list(loader(Faulty(stream, fault), 0, 10, 2, workers=1))
    except Exception as e:  # of a dead one: RuntimeError, or EOFError where it was just sending a batch
        queue.put(repr(e))


@pytest.mark.parametrize("fault, message", [("dies", "Error"), ("hangs", "timed out after 1 seconds")])
def test_a_worker_that_dies_or_hangs_ends_the_run(uneven, fault, message):
    fork = multiprocessing.get_context("fork")  # torch's handler of SIGCHLD may raise anywhere in this process
    queue = fork.Queue()
    process = fork.Process(target=load_in_process, args=(Stream(uneven, 3), fault, queue))
    process.start()
    assert message in queue.get(timeout=60)
    process.join(30)
    assert not process.is_alive(), "a worker that hangs is ended by SIGTERM from its trainer"
    process.kill()


def test_a_long_temporary_folder_is_refused(uneven, monkeypatch):
    """A worker could not send its first batch: "AF_UNIX path too long", and the trainer would wait for it."""
    monkeypatch.setattr("tempfile.tempdir", f"/tmp/{'x' * 66}")
    with pytest.raises(UserError, match="TMPDIR=/tmp/x+: is too long"):
        loader(Stream(uneven, 0), 0, 2, 2, workers=1)
    next(loader(Stream(uneven, 0), 0, 2, 2))


# --- remote shards ---


@pytest.fixture
def memory(tmp_path):
    """memory://set, and the same shards here."""
    fsspec = pytest.importorskip("fsspec")
    path, fs = make_shards(tmp_path / "set", [6, 3, 8, 1, 5]), fsspec.filesystem("memory")
    put(path, {"classes.json": ["zero", "one", "two"]})
    fs.put(f"{path}/", "/set/", recursive=True)
    yield fs, path
    fs.rm("/set", recursive=True)


def test_remote_equals_local(memory):
    fs, path = memory
    here = Dataset(path, "all", 4)
    for url in ("memory://set", "memory://set/", "memory://set/*.tar", "memory://set/0000{0..4}.tar", f"file://{path}"):
        ds = Dataset(url, "all", 4, cache_dir=f"cache-{seed_of(url)}")
        assert (ds.form, ds.classes, metas(ds)) == ("tar", ["zero", "one", "two"], metas(here))
    assert list(metas(Dataset("memory://set/00002.tar", "all", 4))) == list(metas(here))[9:17]
    for name in ds.remote.names:
        if name.endswith(".tar"):
            os.remove(ds.remote.local(name))
    assert all_same(loader(Stream(ds, 3), 0, 6, 4, workers=2), loader(Stream(here, 3), 0, 6, 4))


def test_remote_cache_stays_within_its_bound_and_fetches_ahead(memory, monkeypatch):
    fs, path = memory
    sizes = [os.path.getsize(file) for file in path.glob("*.tar")]
    bound = 2 * max(sizes) + 100
    ds = Dataset("memory://set", "all", 4, cache_gb=bound / 1e9)
    kept = lambda ds: {f.name: f.stat().st_size for f in Path(ds.root).glob("*.tar")}  # noqa: E731
    assert 0 < sum(kept(ds).values()) <= bound < sum(sizes)
    handle = ds.remote.open("00000.tar")
    for i in list(range(len(ds))) * 2:
        ds.encoded(i)
        assert sum(kept(ds).values()) <= bound
    assert handle.read() == (path / "00000.tar").read_bytes(), "who has it open keeps it"
    monkeypatch.setattr(room, "WINDOW", 2)
    ds = Dataset("memory://set", "all", 4, cache_dir="other")
    for name in kept(ds):
        os.remove(f"{ds.root}/{name}")
    stream = Stream(ds, 0)
    order, end = stream._order(0)[0].tolist(), time.monotonic() + 10
    stream[0]
    wanted = {os.path.basename(ds.remote.local(f"{s:05d}.tar")) for s in order[2:4]}
    while not wanted <= kept(ds).keys() and time.monotonic() < end:
        time.sleep(0.02)
    assert wanted <= kept(ds).keys() and os.path.basename(ds.remote.local(f"{order[4]:05d}.tar")) not in kept(ds)


def test_remote_faults(memory, monkeypatch, capsys):
    fs, path = memory
    ds, real, faults = Dataset("memory://set", "all", 4), type(fs).get_file, []
    monkeypatch.setattr(time, "sleep", lambda s: None)

    def get_file(self, remote, local, **options):
        real(self, remote, local, **options)
        if faults and (fault := faults.pop()) == "cut":
            os.truncate(local, 100)
        elif faults:
            raise fault

    monkeypatch.setattr(type(fs), "get_file", get_file)
    os.remove(ds.remote.local("00000.tar"))
    faults += [None, "cut", ConnectionResetError("peer"), RuntimeError("503 slow down")]
    assert ds.meta(0)["text"] == ["no 0"]
    assert "fetching 00000.tar of memory://set again (RuntimeError('503 slow down'))" in capsys.readouterr().out
    os.remove(ds.remote.local("00000.tar"))
    faults[:] = ["cut"] * 8
    with pytest.raises(BadImage, match="00000/0000: 00000.tar: of memory://set could not be fetched .*100 bytes of"):
        ds.pixels(0)
    assert not list(Path(ds.root).glob("*.tmp"))
    faults.clear()
    Path("taken").write_text("a file")
    for message, url, options in (
        ("holds no images; looked for .*remote images have to be in shards", "memory://nothing", {}),
        ("cannot be looked up .FileNotFoundError.*9.tar", "memory://set/9.tar", {}),
        ("cache_gb=1e-06 is less than one of its files", "memory://set", dict(cache_gb=1e-6)),
        ("cannot be kept in taken/shards-.*; set another cache_dir", "memory://set", dict(cache_dir="taken")),
    ):
        with pytest.raises(UserError, match=message):
            Dataset(url, "all", 4, **options)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match="s3://bucket/x: cannot be read .*; pip install fsspec"):
        Dataset("s3://bucket/x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        Dataset(put(path.parent / "tables", {"a.parquet": b""}))


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
            ds = Dataset(f"http://127.0.0.1:{server.server_address[1]}/0000{{0..4}}.tar", "all", 4)
            assert metas(ds) == metas(Dataset(path, "all", 4)) and ds.classes == ["zero", "one", "two"]
        finally:
            server.shutdown()


# --- the command, real data ---


def test_the_command_says_what_there_is(tmp_path):
    path = make_shards(tmp_path / "set", [5, 6])
    command = [sys.executable, "-m", "data.dataset", str(path), "--image_size=4", "--seconds=0.2"]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wanted = f"{path}: tar, 11 images in 2 shards (train 10, val 1), 3 classes, labels on 11, captions on 11\n"
    assert wanted in out.stdout and "images/s per core at 4 px" in out.stdout, out.stdout + out.stderr


# name -> (split, image_size, form, length, classes, index, first caption)
REAL = {
    "cifar10": ("train", 32, "parquet", 50000, 10, 49999, None),
    "imagenette128": ("all", 128, "tar", 9469, 10, 5000, "a photo of a"),
    "flickr8k_1000": ("all", 64, "folder", 1000, 0, 0, "A child in a pink dress"),
    "imagenette224_val": ("all", 64, "folder", 200, 10, 150, None),
    "kodak": ("all", 512, "folder", 24, 0, 3, None),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data(test_data, name):
    split, size, form, length, classes, i, caption = REAL[name]
    ds = Dataset(test_data / name, split, size)
    assert (ds.form, len(ds), ds.num_classes) == (form, length, classes)
    assert ds[i]["image"].shape == (3, size, size) and 0.1 < ds[i]["image"].std() < 1.5
    assert caption is None or ds.meta(i)["text"][0].startswith(caption), ds.meta(i)
    if classes:
        counts = np.bincount(ds.labels)
        assert len(counts) == len(ds.classes) == classes and counts.min() > 0
    if form == "tar":  # against tarfile, read in full
        shard, _, key = ds.key(i).partition("/")
        with tarfile.open(test_data / name / f"{shard}.tar") as tar:
            record, image = json.load(tar.extractfile(f"{key}.json")), Image.open(tar.extractfile(f"{key}.jpg"))
            assert torch.equal(ds[i]["image"], to_tensor(image.convert("RGB")))
            assert ds.meta(i)["label"] == record["label"] and ds.meta(i)["text"] == [record["text"]]
