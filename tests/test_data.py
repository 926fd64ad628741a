"""Data sets in every form, their splits, order, index files and workers: data/dataset.py, forms.py and shards.py."""

import http.server
import io
import json
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
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
from data.dataset import BadImage, Dataset, Stream, collate, loader, permute, seed_of, step_positions, to_tensor

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
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(file, form, **options)
    return file.getvalue()


def png(i=0, size=(12, 10)):
    return encoded(pixels(i, size))


def put(root, files):
    """Files {path: content}: {name: bytes} or pairs of them is a tar, {column: values} parquet, an array .npy."""
    for path, content in files.items():
        path = root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes | str):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        elif path.suffix == ".tar":
            with tarfile.open(path, "w") as tar:
                for name, data in content.items() if isinstance(content, dict) else content:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        elif path.suffix == ".parquet":
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            pq.write_table(pa.table(content) if isinstance(content, dict) else content, path, row_group_size=4)
        elif path.suffix == ".npy":
            np.save(path, content)
        else:
            path.write_text(json.dumps(content))
    return root


def lines(records):
    return "\n".join(map(json.dumps, records))


def keys(ds):
    return [ds.key(i) for i in range(len(ds))]


def metas(ds):
    """{key: label, or (label, caption, ...)}"""
    found = [ds.meta(i) for i in range(len(ds))]
    return {meta["key"]: (meta["label"], *meta["text"]) if meta["text"] else meta["label"] for meta in found}


def same(a, b):
    """Whether two items or batches are the same, to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def all_same(a, b):
    return all(same(x, y) for x, y in zip(a, b, strict=True))


def make_shards(path, sizes):
    """Shards of so many small images; labels, captions and keys tell them apart, each fifth does not decode."""
    numbers = iter(range(sum(sizes)))
    for s, size in enumerate(sizes):
        members = {}
        for i, number in zip(range(size), numbers):
            members[f"{i:04d}.png"] = png(number, (4, 4)) if number % 5 else b"not an image"
            members |= {f"{i:04d}.cls": str(number % 3).encode(), f"{i:04d}.txt": f"no {number}".encode()}
        put(path, {f"{s:05d}.tar": members})
    return path


# --- randomness ---


def test_seeds_and_permutations_are_pinned():
    """Runs resume by them: the same on every machine and in every version."""
    assert seed_of(1, "a") == seed_of(np.int64(1), "a") == 2461651067226055738
    assert len({seed_of(*parts) for parts in [(1, 2), (2, 1), (12,), ("1", 2), (1, 2, 0), ()]}) == 6
    assert permute(np.arange(3), 10**9, seed=5).tolist() == [75155974, 201049163, 564084377]
    for outside in (-1, 5, np.array([0, 5])):
        with pytest.raises(AssertionError, match=r"outside range\(5\)"):
            permute(outside, 5, 0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 10**6, *(2**k + d for k in (8, 13, 19) for d in (-1, 0, 1))])
def test_permutation_is_a_bijection(n):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed=n)), np.arange(n))
    few = range(0, n, -(-n // 40))
    assert [permute(i, n, 3) for i in few] == permute(np.array(few), n, 3).tolist()  # int and array agree


# --- pixels ---


def turned(array):
    """As a camera that was turned by 90 degrees saves it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(np.rot90(array).copy(), "JPEG", exif=exif, quality=100)


def modes():
    """name -> (image, the RGB array that it is)"""
    grey = np.arange(0, 250, dtype=np.uint8).reshape(10, 25)
    rgb, alpha = np.repeat(grey[:, :, None], 3, 2), np.full_like(grey, 255)
    alpha[:, :12] = 0  # fully transparent on the left: white
    on_white = np.where(alpha[..., None] == 0, 255, rgb).astype(np.uint8)
    palette = Image.fromarray(pixels(0)).quantize(8)
    clear, colors = palette.copy(), np.asarray(palette.convert("RGB"))
    clear.info["transparency"] = clear.getpixel((0, 0))
    is_clear = (np.asarray(clear) == clear.getpixel((0, 0)))[..., None]
    wide = np.linspace(0, 65535, 250).astype(np.uint16).reshape(10, 25)
    of_wide = np.repeat(np.round(wide / 257).astype(np.uint8)[:, :, None], 3, 2)
    red, lime = (Image.new("RGB", (8, 8), color) for color in ("red", "lime"))
    opened = lambda data: Image.open(io.BytesIO(data))  # noqa: E731
    return {
        "grey": (Image.fromarray(grey), rgb),
        "RGBA": (Image.fromarray(np.dstack([rgb, alpha])), on_white),
        "LA": (Image.fromarray(np.dstack([grey, alpha]), "LA"), on_white),
        "palette": (palette, colors),
        "transparent palette": (clear, np.where(is_clear, 255, colors)),
        "1 bit": (Image.new("1", (2, 2), 1), np.full((2, 2, 3), 255)),
        "16 bit PNG": (opened(encoded(wide)), of_wide),
        "16 bit TIFF": (opened(encoded(wide, "TIFF")), of_wide),
        "16 bit PGM": (opened(encoded(Image.fromarray(wide.astype(np.int32)), "PPM")), of_wide),
        "float PFM": (opened(encoded((wide / 65535).astype(np.float32), "PPM")), of_wide),
        "float TIFF": (opened(encoded((wide / 65535).astype(np.float32), "TIFF")), of_wide),
        "CMYK": (Image.fromarray(rgb).convert("CMYK"), rgb),
        "orientation": (opened(turned(rgb[:, ::-1])), rgb[:, ::-1]),
        "animation": (
            opened(encoded(red, "GIF", save_all=True, append_images=[lime])),
            np.full((8, 8, 3), (255, 0, 0)),
        ),
    }


@pytest.mark.parametrize("name", modes())
def test_every_mode_becomes_rgb_gray_and_rgba(name):
    image, wanted = modes()[name]
    got, gray, rgba = (room.to_mode(image, mode) for mode in ("RGB", "L", "RGBA"))
    assert abs(np.asarray(got).astype(int) - wanted).max() <= (3 if name == "orientation" else 0)  # JPEG
    assert got.size == wanted.shape[1::-1] and gray.tobytes() == got.convert("L").tobytes()
    assert (rgba.getextrema()[3][0] < 255) == (name in ("RGBA", "LA", "transparent palette")), "alpha is kept"
    on_white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    assert on_white.tobytes() == got.tobytes()


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_image_mode_of_a_dataset(mode, channels, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (2, 10, 10, 4), dtype=np.uint8)
    image[..., 3] |= 1  # PIL resizes premultiplied colors, which alpha 0 loses
    put(tmp_path / "set", {"images.npy": image})
    ds = Dataset(tmp_path / "set", "all", 10, image_mode=mode)
    assert ds[1]["image"].shape == (channels, 10, 10) and ds.image(1).mode == mode
    back = ((ds[1]["image"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(back, np.atleast_3d(np.asarray(room.to_mode(Image.fromarray(image[1]), mode))))


def test_resize_and_crop(tmp_path):
    wide, stripes, flat = pixels(0, (20, 10)), np.zeros((64, 64, 3), np.uint8), np.full((3, 2, 3), 77, np.uint8)
    stripes[:, ::2] = 255
    files = {"a.png": encoded(wide), "b.png": encoded(flat), "c.png": encoded(stripes), "d.jpg": turned(wide)}
    put(tmp_path / "set", files)
    small, ds, large = (Dataset(tmp_path / "set", "all", side) for side in (5, 10, 16))
    full = to_tensor(Image.fromarray(wide))
    assert full.dtype == torch.float32 and full.min() >= -1 and full[0, 0, 15] == 255 / 127.5 - 1
    assert torch.equal(ds[0]["image"], full[:, :, 5:15])  # no resize where none is needed
    assert torch.equal(ds.pixels(0, flip=True), full[:, :, 5:15].flip(-1))
    assert torch.allclose(ds[1]["image"], torch.full((3, 10, 10), 77 / 127.5 - 1))  # smaller: enlarged
    assert torch.equal(small.pixels(0, "random", u=(0.0, 0.999, 0.999)), full[:, 5:, 15:])  # side 0.5 + 0.5 u
    assert torch.equal(small.pixels(0, "random", u=(0.0, 0.0, 0.0)), full[:, :5, :5])
    assert large[2]["image"][:, :, 2:-2].abs().max() < 0.05  # antialiased: grey
    assert [ds.size(i) for i in range(4)] == [(20, 10), (2, 3), (64, 64), (20, 10)], "upright"
    flat, tall = (Dataset(tmp_path / "set", "all", sides) for sides in ((6, 18), (5, 2)))  # height, width
    cut = [room.crop_box(*ds.size(0), sides)[2:] for sides in ((6, 18), (5, 2), (1, 2))]
    assert cut == [(20, 7), (4, 10), (20, 10)]
    rows = Image.fromarray(wide).crop((0, 1, 20, 8)).resize((18, 6), Image.Resampling.LANCZOS)
    assert torch.equal(flat[0]["image"], to_tensor(rows)) and flat[1]["image"].shape == (3, 6, 18)
    assert torch.equal(tall.pixels(0, "random", u=(0.0, 0.999, 0.999)), full[:, 5:, 18:])


# --- forms ---

COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)  # class -> color
BOXES = [[2, 1, 4, 5], [12, 6, 6, 4], [0, 0, 2, 10]]  # the last is outside the center crop
OBJECTS = {"bbox": BOXES, "categories": ["cat", "dog", "cat"]}


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
    parts = [{".png": encoded(images[i]), ".map.png": encoded(maps[i])} for i in range(n)]
    if form == "npy":
        files = {"images.npy": np.stack(images), "maps.npy": np.stack(maps), "labels.npy": np.array(label)}
        files |= {"captions.jsonl": lines(records), "meta.json": {"classes": ["a", "b"]}}
    elif form == "folder":
        files = {f"{'ab'[i % 2]}/{i:03d}{end}": data for i in range(n) for end, data in parts[i].items()}
        files["metadata.jsonl"] = lines({"file_name": f"{'ab'[i % 2]}/{i:03d}.png"} | records[i] for i in range(n))
    elif form == "tar":
        parts = [part | {".json": json.dumps(record).encode()} for part, record in zip(parts, records)]
        members = [(f"{i:03d}{end}", data) for i in range(n) for end, data in parts[i].items()]
        files = {"a.tar": members[:12], "b.tar": members[12:]}
    else:
        images, maps = ([{"bytes": part[end]} for part in parts] for end in (".png", ".map.png"))
        files = {"a.parquet": dict(image=images, label=label, text=texts, segmentation=maps, objects=[OBJECTS] * n)}
    classes = {} if form == "npy" else {"classes.json": {"0": "a", "1": "b"} if form == "parquet" else ["a", "b"]}
    return put(path, files | classes)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_content_in_every_form(tmp_path, form):
    ds = Dataset(make_scenes(tmp_path / "set", form), "all", 10)
    assert (ds.format, len(ds), ds.classes, ds.num_classes) == (form, 6, ["a", "b"], 2)
    assert ds.counts["maps"] and ds.counts["objects"]
    assert (ds.map_names, ds.map_classes, ds.object_classes) == ([], 4, ["cat", "dog"])
    wanted = "6 images.*2 classes \\(a, b\\), labels on 6 of 6, captions on 6 of 6, maps on 6 of 6, objects on 6 of 6$"
    assert re.search(wanted, str(ds)), str(ds)
    for i in range(6):
        number = int(ds.meta(i)["text"][0].split()[-1])
        assert ds.meta(i) == dict(label=number % 2, text=[f"image {number}", f"no {number}, “quoted”"], key=ds.key(i))
        classes, image = scene(number)
        assert torch.equal(ds[i]["image"], to_tensor(Image.fromarray(image[:, 4:14].copy())))
        assert ds.size(i) == (18, 10)
        assert np.array_equal(ds.map(i) % 256, classes[:, 4:14]), "-1 is 255"
        for options in (dict(flip=True), dict(crop="random", u=(1 - 1e-9, 0.7, 0.4))):
            colors = torch.from_numpy(COLORS[ds.map(i, **options).numpy()]).permute(2, 0, 1) / 127.5 - 1
            assert torch.equal(colors, ds.pixels(i, **options)), "the map is cut as the pixels are"
        cat, dog = ds.boxes(i)  # the crop is 4..14: half of the cat, a third of the dog is in it
        assert cat == pytest.approx(("cat", 0, 0.1, 0.2, 0.6)) and dog == pytest.approx(("dog", 0.8, 0.6, 1, 1))
        assert ds.boxes(i, flip=True)[0] == pytest.approx(("cat", 0.8, 0.1, 1, 0.6))
    assert len(set(keys(ds))) == 6 and len(pickle.dumps(ds)) < 20_000
    names = {"map_classes.json": ["sky", "sea", "sand", "stone", "snow"], "object_classes.json": ["x", "cat"]}
    again = Dataset(put(tmp_path / "set", names), "all", 10)
    assert (again.map_classes, again.map_names[1], again.object_classes) == (5, "sea", ["x", "cat"])
    assert again.fingerprint == ds.fingerprint, "caches of latents stay valid"
    with pytest.raises(IndexError, match="dataset of 6"):
        ds.map(6)


@pytest.mark.parametrize("form", FORMS)
def test_fingerprint_follows_the_content_and_not_the_path(tmp_path, form):
    path = make_scenes(tmp_path / "set", form)
    first = Dataset(path, "all", 10).fingerprint
    shutil.copytree(path, tmp_path / "copy")
    assert Dataset(tmp_path / "copy", "all", 10).fingerprint == first, "copied with its times"
    files = [file for file in path.rglob("*.*") if file.suffix in (".png", ".tar", ".parquet", ".npy")]
    image = max(files, key=lambda file: file.stat().st_size)
    found, data = os.stat(image), bytearray(image.read_bytes())
    os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert Dataset(path, "all", 10).fingerprint != first, "another time"
    data[len(data) // 4] ^= 1
    image.write_bytes(data)
    os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert Dataset(path, "all", 10).fingerprint != first, "an edit that keeps size and time, of a small set"


def described(*names, **more):
    return lines({"file_name": name, "text": f"t{i}"} | more for i, name in enumerate(names))


def tar_bytes(members):
    return put(Path(), {"joined.tar": members}).joinpath("joined.tar").read_bytes()


def hub_table():
    """A label column whose names are in the schema, as the Hugging Face hub keeps them."""
    pa = pytest.importorskip("pyarrow")
    about = {b"huggingface": b'{"info": {"features": {"label": {"names": ["neg", "pos"]}}}}'}
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())], about)
    return pa.table({"image": [png()] * 3, "label": [1, 0, None]}, schema)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n"
P, GREY = png(), np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
# name: (files, {key: label or (label, captions)}, class names, what str(dataset) says was left out)
FOUND = {
    "classes": ({"b/1.png": P, "a/1.png": P}, {"a/1.png": 0, "b/1.png": 1}, "a b", ""),
    "no classes": ({"1.png": P, "x.txt": "-"}, {"1.png": -1}, "", "1 .txt files without an image (x.txt)"),
    "train is a class": ({"9/1.png": P, "train/1.png": P}, {"9/1.png": 0, "train/1.png": 1}, "9 train", ""),
    "classes.json of torchvision": (
        {"cat/1.png": P, "dog/1.png": P, "classes.json": {"dog": 0, "cat": 1}}, {"cat/1.png": 1, "dog/1.png": 0},
        "dog cat", "",
    ),
    "classes in two Unicode forms": (
        {"train/cafe\u0301/1.png": P, "val/caf\xe9/1.png": P, "train/z/1.png": P, "classes.json": ["z", "cafe\u0301"]},
        {"train/cafe\u0301/1.png": 1, "train/z/1.png": 0, "val/caf\xe9/1.png": 1}, "z caf\xe9", "",
    ),
    "what systems leave": (
        {"1.png": P, ".DS_Store": "-", "__MACOSX/._1.png": "-", "@eaDir/1.png": P, "Thumbs.db": "-"}, {"1.png": -1}, "",
        "1 .db files (Thumbs.db)",
    ),
    "labels in metadata": (
        {"a/1.png": P, "b/2.png": P, "metadata.jsonl": described("a/1.png", label="x")},
        {"a/1.png": (0, "t0"), "b/2.png": -1}, "x", "",
    ),
    "a lone images/ is no class": (
        {"images/1.png": P, "metadata.jsonl": described("images/1.png")}, {"images/1.png": (-1, "t0")}, "", "",
    ),
    "metadata beside images": (
        {"a/1.png": P, "b/1.png": P, "a/metadata.jsonl": described("1.png")},
        {"a/1.png": (0, "t0"), "b/1.png": 1}, "a b", "",
    ),
    "metadata of more": (
        {"a.png": P, "metadata.jsonl": described("a.png", "b.png")}, {"a.png": (-1, "t0")}, "",
        "1 lines of metadata without an image (b.png)",
    ),
    "classes.json orders": (
        {"cat/1.png": P, "dog/1.png": P, "classes.json": ["dog", "bird", "cat"]},
        {"cat/1.png": 2, "dog/1.png": 0}, "dog bird cat", "",
    ),
    "classes.json renames": (
        {"n01/1.png": P, "n02/1.png": P, "classes.json": ["tabby", "poodle"]},
        {"n01/1.png": 0, "n02/1.png": 1}, "tabby poodle", "",
    ),
    "tar": (
        {"sub/0.tar": {"./x/a.jpg": P, "./x/a.txt": "ein Bär\n".encode(), "./x/a.cls": b"3\n",
                       "b.json": b'{"caption": "json", "label": 1}', "b.jpg": P, "b.seg.png": b"-",
                       "lonely.txt": b"no image", "._c.jpg": b"of a Mac",
                       "c.JPG": P, "c.txt": b"first", "c.json": b'{"caption": "second"}',
                       "d.jpg": P, "d.txt": b"", "d.json": b'{"text": ["one", "", "two"]}'}},
        {"sub/0/x/a": (3, "ein Bär"), "sub/0/b": (1, "json"), "sub/0/c": (-1, "first"),
         "sub/0/d": (-1, "one", "two")}, "",
        "1 tar members that are hidden (._c.jpg), 1 tar members beside an image (b.seg.png), "
        "1 tar members without an image (lonely.txt)",
    ),
    "captions beside images": (
        {"5_dog/1.JPG": P, "5_dog/1.txt": "\ufeffa dog\n", "5_dog/2.png": P, "5_dog/2.caption": "two".encode("utf-16"),
         "5_dog/v1.5.png": P, "5_dog/v1.5.json": {"caption": ["x", "y"]}, "5_dog/4.png": P, "5_dog/4.png.txt": "four",
         "5_dog/5.png": P, "5_dog/5.txt": " ", "5_dog/notes.txt": "-"},
        {"5_dog/1.JPG": (-1, "a dog"), "5_dog/2.png": (-1, "two"), "5_dog/4.png": (-1, "four"), "5_dog/5.png": -1,
         "5_dog/v1.5.png": (-1, "x", "y")}, "", "1 .txt files without an image (5_dog/notes.txt)",
    ),
    "half an emoji, and a name in Latin-1": (
        {"1.png": P, "1.json": '{"caption": "a\\ud83d"}', os.fsdecode(b"caf\xe9.heic"): "-"}, {"1.png": (-1, "a?")}, "",
        r"1 .heic files (caf\udce9.heic)",
    ),
    "captions and classes": (
        {"a/1.png": P, "a/1.txt": "one", "b/1.png": P, "b/1.json": '{"prompt": "two"}', "b/2.png": P, "b/2.json": "{"},
        {"a/1.png": (0, "one"), "b/1.png": (1, "two"), "b/2.png": 1}, "a b",
        "1 .json files that are not JSON (b/2.json)",
    ),
    "labels beside images": (
        {"x/1.png": P, "x/1.cls": "7", "x/2.png": P, "x/2.json": {"label": 3, "text": "t"}},
        {"x/1.png": 7, "x/2.png": (3, "t")}, "", "",
    ),
    "captions of several images": (
        {"1.png": P, "1.jpg": P, "1.txt": "of which?", "1.jpg.txt": "of the JPEG"},
        {"1.jpg": (-1, "of the JPEG"), "1.png": -1}, "", "1 .txt files beside several images of one name (1.txt)",
    ),
    "img2dataset's files": (
        {f"0000{s}/0000{s}000{i}.{end}": content for s in range(2) for i in range(2)
         for end, content in (("jpg", P), ("txt", f"{s}{i}"), ("json", {"caption": "-", "key": "k"}))}
        | {"00000_stats.json": {}, "00000.parquet": {"key": ["k"]}},
        {f"0000{s}/0000{s}000{i}.jpg": (-1, f"{s}{i}") for s in range(2) for i in range(2)}, "",
        "1 .parquet files without images (00000.parquet), 1 .json files without an image (00000_stats.json)",
    ),
    "metadata.csv": (
        {"a/1.png": P, "a/2.png": P,
         "a/metadata.csv": 'File_Name,Text,label\r\n1.png,"one, ""two""\nthree",x\r\n2.png,,\r\n'},
        {"a/1.png": (0, 'one, "two"\nthree'), "a/2.png": -1}, "x",
        "1 lines of metadata without text or label (2.png)",
    ),
    "metadata.csv with spaces": (
        {"1.png": P, "metadata.csv": " file_name , text \n1.png , one\n"}, {"1.png": (-1, "one")}, "", "",
    ),
    "metadata.csv that is empty": ({"1.png": P, "metadata.csv": ""}, {"1.png": -1}, "", ""),
    "metadata with gaps of pandas": (
        {"a/1.png": P, "metadata.jsonl": '{"file_name": "a/1.png", "label": NaN, "text": NaN}'}, {"a/1.png": 0}, "a",
        "1 lines of metadata without text or label (a/1.png)",
    ),
    "metadata.csv of Excel": (
        {"1.png": P, "2.png": P, "metadata.csv": "file_name;text\n1.png;caf\xe9, black\n2.png;a; b\n".encode("cp1252")},
        {"1.png": (-1, "caf\xe9, black"), "2.png": (-1, "a; b")}, "", "",
    ),
    "metadata.csv without quotes": (
        {"1.png": P, "2.png": P, "metadata.csv": "file_name,text,label\n1.png,one, two,3\n2.png,two,2\n"},
        {"1.png": -1, "2.png": (2, "two")}, "", "1 lines of metadata with more fields than columns (1.png)",
    ),
    "metadata.tsv in UTF-16": (
        {"1.png": P, "metadata.tsv": "image\tcaption\n1.png\tone\n".encode("utf-16")}, {"1.png": (-1, "one")}, "", "",
    ),
    "metadata in single quotes": (
        {"1.png": P, "metadata.csv": "'file_name','text'\n'1.png','one, two'\n"}, {"1.png": (-1, "one, two")}, "", "",
    ),
    "metadata.parquet": (
        {"1.png": P, "metadata.parquet": {"file_name": ["1.png"], "text": ["one"]}}, {"1.png": (-1, "one")}, "", "",
    ),
    "metadata of something else": (
        {"1.png": P, "metadata.csv": "id,name\n1,x\n"}, {"1.png": -1}, "",
        "2 lines of metadata without file_name (metadata.csv)",
    ),
    "names in another form": (
        {f"cafe\u0301/{i}.JPG": P for i in range(3)}
        | {"metadata.jsonl": "\ufeff" + described(".\\caf\xe9\\0.jpg", "caf\xe9/1.Jpg", "cafe\u0301/2.JPG")},
        {f"cafe\u0301/{i}.JPG": (-1, f"t{i}") for i in range(3)}, "", "",
    ),
    "names that fit several images": (
        {"1.jpg": P, "1.JPG": P, "metadata.jsonl": described("1.jpg", "1.Jpg")}, {"1.JPG": -1, "1.jpg": (-1, "t0")}, "",
        "1 lines of metadata that fit several images (1.Jpg)",
    ),
    "several lines of an image": (
        {"1.png": P, "2.png": P,
         "metadata.jsonl": described("1.png", "1.png", "2.png", label=2) + '\n{"file":"1.png","label":3}'},
        {"1.png": (2, "t0", "t1"), "2.png": (2, "t2")}, "",
        "1 labels in metadata unlike those of an earlier line (1.png)",
    ),
    "classes that are numbers": (
        {f"{i}/1.png": P for i in ("0", "2", "10", "003")},
        {"0/1.png": 0, "003/1.png": 3, "10/1.png": 10, "2/1.png": 2}, "0 1 2 003 4 5 6 7 8 9 10", "",
    ),
    "classes that are ids": (
        {f"{i}/1.png": P for i in (90210, 7, 1138)},
        {"1138/1.png": 1, "7/1.png": 0, "90210/1.png": 2}, "7 1138 90210", "",
    ),
    "labels that are none": (
        {"images.npy": np.zeros((6, 8, 8, 3), np.uint8), "labels.npy": np.array([0.5, np.nan, -1, -7, 2, 2**40])},
        {"00000000": -1, "00000001": -1, "00000002": -1, "00000003": -1, "00000004": 2, "00000005": -1}, "",
        "3 labels that are no class (00000000: 0.5)",
    ),
    "archives beside a folder": (
        {"a/1.png": P, "a/2.png": P, "a/3.heic": "-", "old.tar": {"x.png": P}, "old.zip": "P", "b.TAR.GZ": "", "x": ""},
        {"a/1.png": 0, "a/2.png": 0}, "a",
        "1 .tar files with no more images than there are outside (old.tar), 1 .heic files (a/3.heic), "
        "1 .gz files (b.TAR.GZ), 1 .zip files (old.zip), 1 other files (x)",
    ),
    "a folder beside an archive": (
        {"a.png": P, "a.txt": "-", "0.tar": {"1.png": P, "2.png": P}, "0_stats.json": {}, "0.parquet": {"key": ["k"]},
         "0.zip": ""},
        {"0/1": -1, "0/2": -1}, "", "1 .zip files (0.zip), 1 .png files (a.png), 1 .txt files (a.txt)",
    ),
    "formats of Pillow": (
        {f"{form}.{form}": encoded(pixels(0), name) for form, name in
         (("bmp", "BMP"), ("jp2", "JPEG2000"), ("tga", "TGA"), ("webp", "WEBP"), ("pbm", "PPM"), ("avif", "AVIF"))}
        | {"a.eps": "%!PS", "b.mpg": "-"},
        {f"{form}.{form}": -1 for form in ("avif", "bmp", "jp2", "pbm", "tga", "webp")}, "",
        "1 .eps files (a.eps), 1 .mpg files (b.mpg)",
    ),
    "a map in other letters": (
        {"cafe\u0301.png": P, "caf\xe9.MAP.png": encoded(np.zeros((10, 12), np.uint8))}, {"cafe\u0301.png": -1}, "", "",
    ),
    "tar and parquet": (
        {"a.tar": {"1.png": P}, "b.parquet": {"image": [P + np.random.default_rng(i).bytes(9000) for i in range(9)]}},
        {f"b/{i:06d}": -1 for i in range(9)}, "", "1 .tar files (a.tar)",
    ),
    "parquet, some without images": (
        {"a.parquet": {"img": [{"bytes": P, "path": "a"}, {"bytes": None, "path": "b"}], "label": [1, 2]},
         "b.parquet": {"image": ["c.jpg"] * 3, "Text": list("abc")}, "c.parquet": {"url": ["u"]}},
        {"a/000000": 1}, "",
        "5 rows without the bytes of an image (a/000001)",
    ),
    "tar, dots in keys": (
        {"0.tar": {"v_2.05.png": P, "v_2.05.txt": b"a", "v_2.06.png": P, "v_2.06.map.png": encoded(GREY[0]),
                   "x.png": P, "x.txt": b"b"}},
        {"0/v_2.05": (-1, "a"), "0/v_2.06": -1, "0/x": (-1, "b")}, "", "",
    ),
    "tar, an empty one": (
        {"0.tar": {"1.png": P}, "1.tar": b""}, {"0/1": -1}, "", "1 empty tar files (1.tar)",
    ),
    "tar, joined": (
        {"0.tar": lambda: tar_bytes({"0.jpg": P}) + tar_bytes({"5.jpg": P, "5.txt": b"five"}) + b"junk" * 300},
        {"0/0": -1, "0/5": (-1, "five")}, "", "1200 bytes that are not tar (0.tar from byte 20480)",
    ),
    "tar, encodings": (
        {"0.tar": {"0.jpg": P, "0.txt": b"\xef\xbb\xbfa cat", "1.jpg": P, "1.txt": "dog\u2019s".encode("cp1252"),
                   "2.jpg": P, "2.txt": "fox".encode("utf-16"), "3.jpg": P, "3.txt": "owl".encode("utf-16-le"),
                   "4.jpg": P, "4.json": '{"text": "\xe9"}'.encode("utf-16-be"), "5.jpg": P, "5.cls": b"\xef\xbb\xbf3"}
         },
        {"0/0": (-1, "a cat"), "0/1": (-1, "dog\u2019s"), "0/2": (-1, "fox"), "0/3": (-1, "owl"), "0/4": (-1, "\xe9"),
         "0/5": 3}, "", "",
    ),
    "tar, Unicode forms and pointers": (
        {"0.tar": {"caf\xe9.jpg": P, "cafe\u0301.txt": b"x", "1.jpg": P, "1.txt": POINTER}},
        {"0/caf\xe9": (-1, "x"), "0/1": -1}, "", "1 git-lfs pointers (1.txt)",
    ),
    "tar, grouped by extension": (
        {"0.tar": {"a.jpg": P, "b.jpg": P, "a.txt": b"A", "b.txt": b"B"}}, {"0/a": (-1, "A"), "0/b": (-1, "B")}, "", "",
    ),
    "tar, words as labels": (
        {"0.tar": {"1.png": P, "1.cls": b"dog", "2.png": P, "2.cls": b"ant"}, "1.tar": {"3.png": P, "3.cls": b"10"}},
        {"0/1": 2, "0/2": 1, "1/3": 0}, "10 ant dog", "",
    ),
    "parquet": (
        {"a.parquet": {"jpg": [P] * 4, "caption": ["one", None, "three", ""], "map": [[0.5]] * 4}},
        {"a/000000": (-1, "one"), "a/000001": -1, "a/000002": (-1, "three"), "a/000003": -1}, "",
        "4 maps that are no encoded images (column map of list<element: double>)",
    ),
    "parquet of bytes, lists and gaps": (
        {"a.parquet": {"image": [P] * 2, "label": [b"dog", b"ant"], "text": [b"one", None],
                       "captions": [None, [{"caption": "two"}, {"caption": "2"}]]}},
        {"a/000000": (1, "one"), "a/000001": (0, "two", "2")}, "ant dog", "",
    ),
    "parquet, other columns": (
        {"a.parquet": {"image": [P], "fine_label": [1], "alt": ["x"]}}, {"a/000000": -1}, "",
        "2 columns that are neither captions nor labels (a.parquet: fine_label)",
    ),
    "parquet of the hub": (
        {"a.parquet": hub_table}, {"a/000000": 1, "a/000001": 0, "a/000002": -1}, "neg pos", "",
    ),
    "npy, with a tar and the preview of data/shapes": (
        {"images.npy": GREY[..., None], "labels.npy": np.array([0, 2]), "x.tar": {"1.png": P}, "sheet.png": P},
        {"00000000": 0, "00000001": 2}, "", "1 .tar files (x.tar)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_what_is_found(tmp_path, case):
    files, wanted, classes, left_out = FOUND[case]
    put(tmp_path / "set", {name: content() if callable(content) else content for name, content in files.items()})
    ds = Dataset(tmp_path / "set", "all", 8)
    labels = [value[0] if isinstance(value, tuple) else value for value in wanted.values()]
    assert (metas(ds), ds.classes) == (wanted, classes.split())
    assert ds.num_classes == (max(max(labels) + 1, len(ds.classes)) if max(labels) >= 0 else 0)
    assert str(ds).partition("; left out: ")[2] == left_out, str(ds)
    assert all(ds[i]["image"].shape == (3, 8, 8) for i in range(len(ds)))
    assert sum(ds._map(i) is not None for i in range(len(ds))) == ds.counts["maps"]


# name: (files, message)
REFUSED = {
    "empty": ({"notes.txt": "-"}, r"holds no images, left out: 1 .txt files .*; looked for images.npy, .*\*.tar"),
    "not made": ({"prepare.py": "-"}, "holds no images; run .*prepare.py"),
    "metadata names nothing": ({"a.png": P, "metadata.jsonl": described("b.png")}, "only .* not here, such as b.png"),
    "metadata broken": ({"a.png": P, "metadata.jsonl": '{"file_name": "a.png"}\n{'}, "jsonl line 2: is not JSON"),
    "class misspelled": (
        {"cat/1.png": P, "dog/1.png": P, "classes.json": ["Dog", "cat"]}, "'dog' is not among them; list the same",
    ),
    "classes of other words": ({"a/1.png": P, "classes.json": {"a": "tench"}}, "has no list of names; give a list"),
    "class without a name": (
        {"cat/1.png": P, "dog/1.png": P, "classes.json": ["dog", "a", "b"]}, "'cat' is not among",
    ),
    "label without a name": (
        {"images.npy": GREY, "labels.npy": np.array([0, 2]), "classes.json": ["a", "b"]}, "label 2 but only 2",
    ),
    "classes broken": ({"a.png": P, "classes.json": "[" * 10**5}, "classes.json: is not JSON"),
    "classes far apart": ({"a.png": P, "classes.json": '{"999999999": "a"}'}, "number them from 0"),
    "npy label count": ({"images.npy": GREY, "labels.npy": np.arange(3)}, "labels.npy: has 3 entries, not 2"),
    "npy float": ({"images.npy": GREY.astype(np.float32)}, "images.npy: is float32 .* make it uint8"),
    "npy in Fortran order": ({"images.npy": np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8))}, "in C order"),
    "npy of objects": ({"images.npy": np.array([{}])}, "does not load as .npy .*Python objects"),
    "npy maps": ({"images.npy": GREY, "maps.npy": GREY[:1]}, r"uint8 \(1, 8, 8\); make it uint8 \(2, 8, 8\)"),
    "parquet without images": ({"a.parquet": {"photo": [P]}}, r"1 rows .* \(a.parquet has photo\); .* not their"),
    "maps in color": ({"1.png": P, "1.map.png": P}, "none of 1 maps reads .1.png.*mode RGB: save one channel"),
    **{f"a pointer for {name}": ({"1.png": P, name: POINTER}, f"{name}: a git-lfs pointer, not the file itself")
       for name in ("0.tar", "0.parquet", "images.npy", "classes.json", "metadata.csv")},
    "parquet that is none": ({"a.parquet": b"PAR1 not really"}, "does not open as parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    files, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        Dataset(put(tmp_path / "set", files), "all", 8).map_classes  # noqa: B018


# members of a tar with the number of their image or their caption, items of key 0 as "image caption", what is left out
REPEATED = {
    "apart": ("0.jpg=1 1.png=2 1.txt=b 0.png=3 0.txt=c", ["1", "3 c"], ""),
    "the same name": ("0.jpg=1 1.png=2 1.txt=b 0.jpg=3 0.txt=c", ["1", "3 c"], ""),
    "in pairs": ("0.jpg=1 0.txt=a 0.jpg=3 0.txt=c", ["1 a", "3 c"], ""),
    "by extension": ("0.jpg=1 0.jpg=3 0.txt=a 0.txt=c", ["1", "3"], "2 tar members that fit several images (0.txt)"),
    "far apart": ("0.jpg=1 1.png=2 0.jpg=3 1.txt=b 0.txt=c", ["1", "3"], "1 tar members without an image (0.txt)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REPEATED)
def test_a_repeated_key_never_gets_the_others_caption(tmp_path, case):
    """Items with the same key in one shard: then what is side by side is an item."""
    members, wanted, left_out = REPEATED[case]
    pairs = [member.split("=") for member in members.split()]
    members = [(name, value.encode() if "txt" in name else png(int(value))) for name, value in pairs]
    put(tmp_path / "set", {"0.tar": members})
    ds = Dataset(tmp_path / "set", "all", 8)
    names = {png(i): str(i) for i in range(4)}
    found = [" ".join([names[ds.encoded(i)], *ds.meta(i)["text"]]) for i in range(len(ds)) if ds.key(i) == "0/0"]
    assert found == wanted and "1 keys repeated" in str(ds) and str(ds).partition("; left out: ")[2] == left_out


def test_parquet_keeps_only_some_row_groups(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (12, 30, 30, 3), dtype=np.uint8)
    put(tmp_path / "set", {"a.parquet": {"image": [encoded(x) for x in noise]}})
    monkeypatch.setattr(room, "GROUP_BYTES", 24000)  # two groups of four images of 2.7 kB
    ds = Dataset(tmp_path / "set/a.parquet", "all", 30)  # one shard by its own name
    for i in list(range(12)) + [0, 11, 5]:
        assert torch.equal(ds[i]["image"], to_tensor(Image.fromarray(noise[i]))) and len(ds._groups) <= 2


def test_ids_as_labels_are_named(tmp_path):
    """In one shard or over several; not where classes.json names them."""
    for s, labels in enumerate([[0, 7, 5_000_000] * 3, [7, 9]]):
        put(tmp_path / "set", {f"{s}.parquet": {"image": [P] * len(labels), "label": labels}})
        assert f", labels up to 5000000, of which {3 + s} occur, labels on" in str(Dataset(tmp_path / "set", "all", 8))
    put(tmp_path / "few", {"images.npy": GREY, "labels.npy": np.array([0, 999])})
    assert "1000 classes, labels on 2 of 2" in str(Dataset(tmp_path / "few", "all", 8))


def test_the_order_of_the_file_system_does_not_matter(tmp_path, monkeypatch):
    files = {
        f"{c}/{i}.{end}": P if end == "png" else "t" for c in "ab" for i in "123" for end in ("png", "txt", "heic")
    }
    first = Dataset(put(tmp_path / "set", files | {"b/metadata.csv": "file,text\n1.png,x\n0.png,y\n"}), "all", 8)
    real = os.walk

    def walk(*args, **options):
        for folder, folders, names in real(*args, **options):
            folders.sort(reverse=True)
            names.sort(reverse=True)
            yield folder, folders, names

    monkeypatch.setattr(os, "walk", walk)
    again = Dataset(tmp_path / "set", "all", 8)
    assert (metas(again), str(again), again.fingerprint) == (metas(first), str(first), first.fingerprint)


def test_links(tmp_path):
    put(tmp_path / "raw", {f"{i}.png": png(i) for i in range(3)})
    (tmp_path / "set").mkdir()
    for name in ("train", "val"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "raw")
    (tmp_path / "raw/up").symlink_to(tmp_path / "set")  # leads back up: no end but for the guard
    (tmp_path / "raw/above").symlink_to(tmp_path)  # and this one out of the set
    assert len(Dataset(tmp_path / "set", "train")) == len(Dataset(tmp_path / "set", "val")) == 3


# objects of an item -> its boxes, or the message
BOXED = [
    ({"bbox": [[0, 0, 4, 8]], "categories": [1]}, [("1", 0, 0, 0.5, 1)]),
    ({"bbox": [[0, 0, 4, 8]], "category": ["x y "]}, [("x y", 0, 0, 0.5, 1)]),
    ({"bbox": [[0, 0, 0, 8], [9, 9, 9, 9], [-2, -2, 4, 4]], "categories": [0, 0, 7]}, [("7", 0, 0, 0.25, 0.25)]),
    (None, []),
    ({"bbox": [[0, 0, 4]], "categories": [1]}, []),
    ({"bbox": [], "categories": [1]}, []),
    ({"categories": []}, []),
]


def test_numbered_objects_and_bad_ones(tmp_path):
    records = [{"text": "t", "objects": value} for value, _ in BOXED]
    files = {"images.npy": np.zeros((len(BOXED), 8, 8, 3), np.uint8), "captions.jsonl": lines(records)}
    ds = Dataset(put(tmp_path / "set", files), "all", 8)
    assert [ds.boxes(i) for i in range(len(ds))] == [wanted for _, wanted in BOXED]
    assert "objects on 3 of 7" in str(ds) and "1 boxes without area (00000002)" in str(ds)
    reason = "00000004: 1 categories, 1 boxes: give [x, y, w, h] and a category each"
    assert f"3 items whose objects do not read ({reason})" in str(ds)
    assert ds.object_classes == ["0", "1", "7", "x y"]
    put(tmp_path / "two", files | {"object_classes.json": ["person", "tree"]})
    with pytest.raises(BadImage, match="00000002: object class 7 is not among 2: name all in object_classes.json"):
        Dataset(tmp_path / "two", "all", 8).boxes(2)
    for name, names in (("classes.json", ["a", "cat"]), ("object_classes.json", ["person", "tree"])):
        put(tmp_path / "set", {name: names})
        assert Dataset(tmp_path / "set", "all", 8).boxes(0)[0][0] == names[1]


# --- splits ---


def tar_of(*keys, **captions):
    return {f"{key}.png": P for key in keys} | {f"{key}.txt": text for key, text in captions.items()}


THOUSAND = [f"{i:08d}" for i in range(1000)]
HELD = [key for key in THOUSAND if zlib.crc32(key.encode()) % 100 == 0]
# name: (files, {split: keys})
SPLIT = {
    "folders": (
        {"train/a/1.png": P, "train/b/2.png": P, "val/b/3.png": P, "test/a/4.png": P},
        {"train": ["train/a/1.png", "train/b/2.png"], "val": ["val/b/3.png"], "test": ["test/a/4.png"]},
    ),
    "in other letters": (
        {"Train/a/1.png": P, "VAL/a/2.png": P, "3.png": P}, {"train": ["Train/a/1.png"], "val": ["VAL/a/2.png"]},
    ),
    "shards in other letters": (
        {"Train-0.tar": tar_of(1), "Val/0.tar": tar_of(2)}, {"train": ["Train-0/1"], "val": ["Val/0/2"]},
    ),
    "npy in other letters": (
        {"Train/images.npy": GREY, "Val/images.npy": GREY[:1]},
        {"train": ["Train/00000000", "Train/00000001"], "val": ["Val/00000000"]},
    ),
    "test stands for val": ({"train/1.png": P, "test/3.png": P}, {"train": ["train/1.png"], "val": ["test/3.png"]}),
    "what is not held out trains": (
        {"a/1.png": P, "train-0.tar": tar_of(1), "x/val/0.tar": tar_of(9)},
        {"train": ["train-0/1"], "val": ["x/val/0/9"]},
    ),
    "names of shards": (
        {"part-0.tar": tar_of(1, 2), "validation_0.tar": tar_of(3)},
        {"train": ["part-0/1", "part-0/2"], "val": ["validation_0/3"]},
    ),
    "npy": (
        {"train/images.npy": GREY, "val/images.npy": GREY[:1]},
        {"train": ["train/00000000", "train/00000001"], "val": ["val/00000000"]},
    ),
    "crc32": (
        {"images.npy": np.zeros((1000, 1, 1, 3), np.uint8), "labels.npy": np.arange(1000) - 500},
        {"train": sorted(set(THOUSAND) - set(HELD)), "val": HELD, "all": THOUSAND},
    ),
    "few images leave one": (
        {"0.tar": tar_of(*"ab", a=b"A"), "1.tar": tar_of(*"cde", c=b"C", d=b"D")},
        {"train": ["0/a", "0/b", "1/d", "1/e"], "val": ["1/c"]},
    ),
    "one image is in both": ({"1.png": P}, {"train": ["1.png"], "val": ["1.png"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLIT)
def test_splits(tmp_path, case):
    files, wanted = SPLIT[case]
    put(tmp_path / "set", files)
    for split, names in wanted.items():
        ds, everything = Dataset(tmp_path / "set", split, 8), Dataset(tmp_path / "set", "all", 8)
        assert keys(ds) == names
        assert (everything.fingerprint == ds.fingerprint) == (split == "all")
        other = everything.in_split(split)
        assert (keys(other), other.counts, other.fingerprint) == (names, ds.counts, ds.fingerprint)
        assert ds.classes == everything.classes, "numbered alike in every split"
        found = [ds.meta(i) for i in range(len(ds))]
        labels, captions = sum(meta["label"] >= 0 for meta in found), sum(bool(meta["text"]) for meta in found)
        assert ds.counts == dict(images=len(names), labels=labels, captions=captions, maps=0, objects=0)
    assert f"(train {len(wanted['train'])}, " in str(ds)
    for path, message in (("set", "has no valid images, it has "), ("nowhere", "does not exist")):
        with pytest.raises(UserError, match=message):
            Dataset(tmp_path / path, "valid", 8)


# --- damage ---


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_each_bad_item_says_what_is_wrong(tmp_path, monkeypatch):
    good, camera = encoded(pixels(0, (64, 64)), "JPEG"), turned(pixels(0, (64, 64)))
    classes, image = scene(0)
    indexed = Image.fromarray(classes, "P")
    indexed.putpalette([7] * 768)
    images = {  # content, reason
        "empty.jpg": (b"", "it has 0 bytes"),
        "cut.jpg": (good[: len(good) // 2], "truncated"),
        "turned.jpg": (camera[: len(camera) // 2], "truncated"),  # turning it must not hide that it is cut
        "text.png": (b"<html>404</html>", "not an image that Pillow can read"),
        "float.tif": (
            encoded(np.float32([[0, 2]]), "TIFF"),
            "floats of 0 to 2: save 8 or 16 bits, or floats in .0, 1.",
        ),
        "nan.tif": (encoded(np.float32([[np.nan]]), "TIFF"), "floats of nan to nan"),
        "wide.tif": (encoded(np.int32([[0, 200]]), "TIFF"), "32-bit integers of 0 to 200: save"),
        "lfs.jpg": (POINTER, "a git-lfs pointer: fetch the file itself"),
        "huge.png": (encoded(np.zeros((40, 400, 3), np.uint8)), "400x40 is over"),
        "link.png": (None, "No such file"),
    }
    maps = {
        "mode": (encoded(image), "mode RGB: save one channel, 8-bit gray or"),
        "small": (encoded(classes[:, :10]), r"its map is \(10, 10\), the image \(18, 10\): make them the same size"),
        "broken": (b"no", "its map does not read .not an image that Pillow can read"),
        "none": (b"", "it has no map"),
    }
    put(tmp_path / "set", {name: content for name, (content, _) in images.items() if content is not None})
    put(tmp_path / "set", {f"{name}.jpg": encoded(image, "JPEG") for name in (*maps, "palette")})
    put(tmp_path / "set", {f"{name}.map.png": content for name, (content, _) in maps.items()})
    put(tmp_path / "set", {"palette.map.png": encoded(indexed), "alone.map.png": P})  # no image beside it: it is one
    (tmp_path / "set/link.png").symlink_to(tmp_path / "gone.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15000)
    ds = Dataset(tmp_path / "set", "all", 10)
    at = {key: i for i, key in enumerate(keys(ds))}
    assert at.keys() == {*images, *(f"{name}.jpg" for name in maps), "palette.jpg", "alone.map.png"}
    for name, (_, reason) in images.items():
        with pytest.raises(BadImage, match=f"^{name}: .*{reason}"):
            ds[at[name]]
    for name, (_, reason) in maps.items():
        with pytest.raises(BadImage, match=f"^{name}.jpg: .*{reason}"):
            ds.map(at[f"{name}.jpg"])
    assert ds.map_classes == 4
    assert np.array_equal(ds.map(at["palette.jpg"]) % 256, classes[:, 4:14])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself refuses beyond twice the limit
    with pytest.raises(BadImage, match="huge.png: .*decompression bomb"):
        ds.pixels(at["huge.png"])


def test_a_damaged_tar_gives_what_is_complete(tmp_path):
    files = {"a.tar": tar_of(*range(5)), "empty.tar": b"", "none.tar": b"a web page" * 100}
    path = put(tmp_path / "set", files) / "a.tar"
    header = path.read_bytes()[4 * 1024 : 4 * 1024 + 512]
    path.write_bytes(path.read_bytes().replace(header, b"damaged " * 64))
    ds = Dataset(tmp_path / "set", "all", 10)
    left_out = "bytes that are not tar (a.tar from byte 4096), 1 empty tar files (empty.tar), 1000 "
    assert len(ds) == 4 and left_out in str(ds)
    os.truncate(path, 3 * 1024 + 520)  # one header and one block an image: the fourth is cut
    ds = Dataset(tmp_path / "set", "all", 10)
    assert "left out: 1 tar members cut short (3.png)" in str(ds)
    assert len(ds) == 3 and all(ds[i]["image"].shape == (3, 10, 10) for i in range(3))
    os.truncate(tmp_path / "set/a.tar", 2 * 1024 + 520)  # after it was indexed
    with pytest.raises(BadImage, match="a/2: a.tar ends after 2568 bytes, the index says"):
        ds[2]


# --- index files ---


def test_index_files(tmp_path, monkeypatch):
    """They are kept, renewed where a shard changed, and made again where they are damaged, gone or not finished."""
    indexed, real = [], forms.index_tar
    monkeypatch.setattr(forms, "index_tar", lambda opened, shard: indexed.append(shard) or real(opened, shard))
    path = make_shards(tmp_path / "set", [4] * 6)
    first = Dataset(path, "all", 4)
    assert len(indexed) == 6 and metas(Dataset(path, "all")) == metas(first) and len(indexed) == 6
    put(path, {"00002.tar": tar_of("new")})
    changed = Dataset(path, "all")
    assert indexed[6:] == ["00002.tar"] and len(changed) == 21 and changed.fingerprint != first.fingerprint
    os.remove(path / "00000.tar")
    assert len(Dataset(path, "all")) == 17 and len(indexed) == 7
    put(path, {"00001.tar": tar_of("new")})
    (folder,) = Path("cache").iterdir()
    wanted = metas(Dataset(path, "all"))
    assert len(wanted) == 14 and len(list(folder.glob("*.npz"))) == 5, "nothing old stays"
    for file in folder.glob("*.npz"):
        file.write_bytes(b"PK cut short")
    assert metas(Dataset(path, "all")) == wanted, "from the shards"
    os.remove(folder / "headers.json")  # as after a kill: what is there is not made again
    for file in sorted(folder.glob("*.npz"))[:2]:
        file.unlink()
    indexed.clear()
    assert metas(Dataset(path, "all")) == wanted and len(indexed) == 2
    Path("taken").write_text("a file")
    with pytest.raises(
        UserError, match="index-.*: the index of 5 shards cannot be kept there.*; set another cache_dir"
    ):
        Dataset(path, "all", cache_dir="taken")


def open_in_process(path, queue):
    real = forms.index_tar
    forms.index_tar = lambda *where: queue.put("index") or real(*where)
    queue.put(Dataset(path, "all", 4).fingerprint)


def test_one_of_many_processes_indexes(tmp_path, monkeypatch):
    """And it does so with as many workers as there are processors, with the same result."""
    path, fork = make_shards(tmp_path / "set", [3] * 33), multiprocessing.get_context("fork")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
    alone = Dataset(path, "all", 4, cache_dir="alone")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    queue = fork.Queue()
    ranks = [fork.Process(target=open_in_process, args=(path, queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    said = [queue.get(timeout=60) for _ in range(33 + 3)]
    assert said.count("index") == 33 and set(said) == {"index", alone.fingerprint}
    assert metas(Dataset(path, "all", 4)) == metas(alone) and len(alone) == 99
    assert len(pickle.dumps(alone)) < 30_000, "no rows in memory"


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
    items = [one[p] for p in range(115)]
    assert all(same(items[p], two[p]) for p in reversed(range(50)))
    assert any(one.item(p) != other.item(p) for p in range(23))
    # the same item is seen otherwise in the next epoch: crop, flip, caption
    seen = [[item for item in items if item["index"] == index] for index in range(22)]
    assert all(len(views) == 5 and not torch.equal(views[0]["image"], views[1]["image"]) for views in seen)
    texts = [view["text"] for views in seen for view in views]
    assert 30 < sum(item["flip"] for item in items) < 80
    assert all(20 < sum(text.endswith(c) for text in texts) < 55 for c in "abc")
    for p in range(40):
        picked = one.pick(p)
        assert all(items[p][name] == value for name, value in picked.items()) and all(0 <= u < 1 for u in picked["u"])
        assert torch.equal(items[p]["image"], pets.pixels(picked["index"], "random", picked["flip"], picked["u"]))
        assert picked["text"] in (pets.meta(picked["index"])["text"] or [""])
    plain = Stream(pets, 3, crop="random", flip=True, train=False)
    for p in range(30):
        assert plain.item(p) == (p % 23, p // 23) and not plain[p]["flip"]
        assert torch.equal(plain[p]["image"], pets[p % 23]["image"])
        assert plain[p]["text"] == (pets.meta(p % 23)["text"] or [""])[0]


def order_by_hand(ds, epoch, window):
    """The windowed order of seed 5, as its docstring has it, with lists."""
    shards = np.split(np.arange(len(ds)), ds.bounds[1:-1])
    order = permute(np.arange(len(shards)), len(shards), seed_of(5, epoch, "shards")).tolist()
    out = []
    for first in range(0, len(shards), window):
        items = [int(i) for s in order[first : first + window] for i in shards[s]]
        out += [items[permute(j, len(items), seed_of(5, epoch, "window", first))] for j in range(len(items))]
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
        assert epochs == [order_by_hand(uneven, e, window) for e in range(3)]
    assert Stream(uneven, 5).item(2 * n + 11) == (epochs[2][11], 2), "a fresh one knows any position at once"
    shard = lambda i: int(np.searchsorted(uneven.bounds, i, "right"))  # noqa: E731
    for p in range(n):
        first, count = stream.span(p)
        assert shard(stream.item(p, 1)[0]) in {shard(stream.item(q)[0]) for q in range(first, first + count)}
    assert Stream(uneven, 5, train=False).item(7) == (7, 0)


def test_positions_do_not_depend_on_the_number_of_ranks():
    for b, acc, world in [(16, 1, 1), (4, 4, 1), (8, 1, 2), (4, 2, 2), (4, 1, 4), (2, 2, 4)]:
        parts = [step_positions(2, m, b, acc, rank, world) for m in range(acc) for rank in range(world)]
        assert sum(parts, []) == list(range(32, 48))
    assert step_positions(step=5, micro=1, batch_size=3, grad_accum=2, rank=1, world=2) == [69, 70, 71]


def test_loader_is_the_same_for_any_number_of_workers_and_any_start(pets):
    stream = Stream(pets, 3, crop="random", flip=True)
    before, options = torch.get_rng_state(), dict(batch_size=2, grad_accum=2, rank=1, world=2)
    plain = list(loader(stream, 0, 6, **options))
    assert len(plain) == 12 and all_same(plain[8:], loader(stream, 4, 6, workers=2, **options))
    positions = [p for step in range(6) for micro in range(2) for p in step_positions(step, micro, 2, 2, 1, 2)]
    assert all_same(plain, [collate([stream[p] for p in pair]) for pair in zip(positions[::2], positions[1::2])])
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not used"
    batch = plain[0]
    assert batch["image"].shape == (2, 3, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["label"].dtype == batch["index"].dtype == torch.int64 and batch["flip"].dtype == torch.bool
    assert len(batch["text"]) == len(batch["key"]) == 2 and batch["bad"] == []
    assert list(loader(stream, 3, 3, 2)) == []


def test_bad_images_are_replaced_and_named(uneven, tmp_path):
    stream, n = Stream(uneven, 5, flip=True), len(uneven)
    items = [stream[p] for p in range(n)]
    for p, item in enumerate(items):
        first = stream.pick(p)
        assert bool(item["bad"]) == (int(first["text"][3:]) % 5 == 0)
        assert not item["bad"] or item["bad"][0] == f"{first['key']}: not an image that Pillow can read"
        chosen = stream.pick(p, len(item["bad"]))  # a reader of cached latents finds the same one
        assert all(item[name] == value for name, value in chosen.items()) and same(item, stream[p])
    assert len({item["key"] for item in items if item["bad"]}) > 8, "not always the same one"
    assert collate(items)["bad"] == [line for item in items for line in item["bad"]]
    ds = Dataset(put(tmp_path / "bad", {f"{i}.jpg": b"no" for i in range(3)}), "all", 8)
    with pytest.raises(UserError, match=r"all 100 images tried are bad \(.*[012]\.jpg: not an image"):
        Stream(ds, 0)[0]


TRAINER = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from data import dataset
signal.signal(signal.SIGTERM, lambda *_: print("term", flush=True))
signal.signal(signal.SIGINT, lambda *_: print("int", flush=True))
stream = dataset.Stream(dataset.Dataset(sys.argv[2], "all", 8), 0)
batches = dataset.loader(stream, 0, 50, batch_size=2, workers=2)
next(batches), next(batches)  # one of each worker: both have begun
print("ready", flush=True)
input()
print(sum(1 for _ in batches), flush=True)
dataset.TIMEOUT, dataset.Stream.__getitem__ = 1, lambda stream, p: time.sleep(100)
next(dataset.loader(stream, 0, 50, batch_size=2, workers=1))  # and the process ends, though a worker hangs
"""


def test_workers_outlive_signals_and_a_hanging_one_ends_the_run(pets):
    command = [sys.executable, "-c", TRAINER, str(ROOT), pets.path]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, start_new_session=True, **pipes) as trainer:
        try:
            assert trainer.stdout.readline() == "ready\n"
            for number, line in ((signal.SIGTERM, "term\n"), (signal.SIGINT, "int\n")):
                os.killpg(trainer.pid, number)  # the trainer and its workers, as torchrun and Ctrl-C do
                assert trainer.stdout.readline() == line
            out, err = trainer.communicate("\n", timeout=60)
        finally:
            trainer.kill()
    assert out == "48\n" and trainer.returncode == 1 and "timed out after 1 seconds" in err, err


def test_a_long_temporary_folder_is_refused(uneven, monkeypatch):
    """A worker could not send its first batch: "AF_UNIX path too long", and the trainer would wait for it."""
    monkeypatch.setattr("tempfile.tempdir", f"/tmp/{'x' * 66}")
    with pytest.raises(UserError, match="TMPDIR=/tmp/x+: is too long"):
        loader(Stream(uneven, 0), 0, 2, 2, workers=1)
    next(loader(Stream(uneven, 0), 0, 2, 2))


# --- buckets ---


SIZES = {  # image_size, multiple: bucket_sizes
    ((64, 64), 32): [(64, 64)],
    ((40, 24), 8): [(24, 40), (32, 32), (40, 24)],
    ((512, 512), 64): [(384, 640), (384, 704), (448, 576), (512, 512), (576, 448), (640, 384), (704, 384)],
}
# (height, width) of a bucket: (width, height) of images
SHAPES = {(40, 24): [(20, 60), (12, 17)], (24, 40): [(32, 24)], (32, 32): [(9, 9), (14, 16), (20, 24), (8, 8)]}


@pytest.mark.parametrize("image_size, multiple", SIZES)
def test_bucket_sizes(image_size, multiple):
    assert room.bucket_sizes(image_size, multiple) == SIZES[image_size, multiple]


@pytest.fixture(params=("folder", "tar"))
def shaped(request, tmp_path):
    """Images of SHAPES, every second one stored on its side."""
    exif, files = Image.Exif(), {}
    exif[0x0112] = 6
    for i, (w, h) in enumerate(size for sizes in SHAPES.values() for size in sizes):
        files[f"{i}.png"] = png(i, (w, h)) if i % 2 else encoded(pixels(i, (h, w)), "PNG" if i else "JPEG", exif=exif)
    shards = {f"{s}.tar": dict(list(files.items())[s::2]) for s in range(2)}
    return put(tmp_path / "set", shards if request.param == "tar" else files)


def test_each_image_is_in_the_nearest_bucket(shaped, monkeypatch):
    bad = {"bad.png": b"no image"}
    ds = Dataset(put(shaped, {"2.tar": bad} if (shaped / "0.tar").exists() else bad), "all", (40, 24))
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", None)  # nothing is decoded
        buckets = ds.in_buckets(8)
        assert {bucket.sides for bucket in ds.in_buckets(8)} == set(SHAPES) and ds.sides == (40, 24)
    found = {bucket.sides: sorted(key.split("/")[-1].split(".")[0] for key in keys(bucket)) for bucket in buckets}
    assert found == {(40, 24): ["0", "1"], (24, 40): ["2"], (32, 32): ["3", "4", "5", "6"]}, "bad.png is left out"
    for bucket in buckets:
        again = pickle.loads(pickle.dumps(bucket))  # as workers get it
        for i in range(len(bucket)):
            assert bucket[i]["image"].shape == (3, *bucket.sides) and same(again[i], bucket[i])
    assert len({data.fingerprint for data in (ds, *buckets)}) == 4
    with pytest.raises(UserError, match=r"\(npy\) has no sizes for buckets; use a folder or tar shards"):
        Dataset(put(Path("arrays"), {"images.npy": np.zeros((2, 8, 8, 3), np.uint8)}), "all", 8).in_buckets(8)


def test_every_step_is_of_one_bucket(shaped, monkeypatch):
    monkeypatch.setattr(room, "WINDOW", 1)  # both shards of tar are one

    def batches(start, batch_size, rank=0, world=1, **options):
        datasets = Dataset(shaped, "all", (40, 24)).in_buckets(8)
        streams = [Stream(data, 3, crop="random", flip=True) for data in datasets]
        options |= dict(grad_accum=2 // batch_size // world, rank=rank, world=world)
        return list(loader(room.Buckets(streams, 5, 2), start, 35, batch_size, **options))

    whole = batches(0, 2)
    counts = [[batch["image"].shape[2:] for batch in whole[k : k + 7]].count((32, 32)) for k in (0, 7, 14)]
    assert counts == [4] * 3, "as many steps as images, among as many steps as there are images"
    seen = [key for batch in whole for key in batch["key"]]
    assert [seen.count(key) for key in set(seen)] == [10] * 7
    assert len({str([batch["image"].shape for batch in whole[k : k + 7]]) for k in (0, 7, 14)}) == 3, "in another order"
    assert all_same(batches(8, 2, workers=2), whole[8:])
    first, second = (batches(0, 1, rank, 2) for rank in range(2))
    assert [a["key"] + b["key"] for a, b in zip(first, second)] == [batch["key"] for batch in whole]
    assert all(a["image"].shape == b["image"].shape for a, b in zip(first, second))


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
    here = Dataset(memory[1], "all", 4)
    for url in ("memory://set", "memory://set/*.tar", "memory://set/0000{0..4}.tar", f"file://{memory[1]}/"):
        ds = Dataset(url, "all", 4, cache_dir=f"cache-{seed_of(url)}")
        assert (ds.format, ds.classes, metas(ds)) == ("tar", ["zero", "one", "two"], metas(here))
    assert keys(Dataset("memory://set/00002.tar", "all", 4)) == keys(here)[9:17]
    for file in Path(ds.root).glob("*.tar"):
        file.unlink()
    assert all_same(loader(Stream(ds, 3), 0, 6, 4), loader(Stream(here, 3), 0, 6, 4)), "fetched again"


def test_remote_cache_stays_within_its_bound_and_fetches_ahead(memory, monkeypatch):
    _, path = memory
    sizes = [os.path.getsize(file) for file in path.glob("*.tar")]
    bound = 2 * max(sizes) + 100
    ds = Dataset("memory://set", "all", 4, cache_gb=bound / 1e9)
    kept = lambda ds: {f.name: f.stat().st_size for f in Path(ds.root).glob("*.tar")}  # noqa: E731
    handle = ds.remote.open("00000.tar")
    for i in list(range(len(ds))) * 2:
        ds.encoded(i)
        assert 0 < sum(kept(ds).values()) <= bound < sum(sizes)
    assert handle.read() == (path / "00000.tar").read_bytes(), "who has it open keeps it"
    monkeypatch.setattr(room, "WINDOW", 2)
    ds = Dataset("memory://set", "all", 4, cache_dir="other")
    for name in kept(ds):
        os.remove(f"{ds.root}/{name}")
    stream = Stream(ds, 0)
    order, end = stream._order(0)[0].tolist(), time.monotonic() + 10
    stream[0]
    names = [os.path.basename(ds.remote.local(f"{s:05d}.tar")) for s in order]
    while not set(names[2:4]) <= kept(ds).keys() and time.monotonic() < end:
        time.sleep(0.02)
    assert set(names[2:4]) <= kept(ds).keys() and names[4] not in kept(ds)


def test_remote_faults(memory, monkeypatch, capsys):
    fs, path = memory
    ds, real, faults = Dataset("memory://set", "all", 4), type(fs).get_file, []
    monkeypatch.setattr(time, "sleep", lambda s: None)

    def get_file(self, remote, local, **options):
        real(self, remote, local, **options)
        fault = faults.pop(0) if faults else None
        if fault == "cut":
            os.truncate(local, 100)
        elif fault:
            raise fault

    monkeypatch.setattr(type(fs), "get_file", get_file)
    os.remove(ds.remote.local("00000.tar"))
    faults += [RuntimeError("503 slow down"), ConnectionResetError("peer"), "cut"]
    assert ds.encoded(0) == b"not an image" and not faults
    assert "fetching 00000.tar of memory://set again (RuntimeError('503 slow down'))" in capsys.readouterr().out
    os.remove(ds.remote.local("00000.tar"))
    faults += ["cut"] * 4
    with pytest.raises(BadImage, match="00000/0000: 00000.tar: of memory://set could not be fetched .*got 100 of"):
        ds.pixels(0)
    assert not list(Path(ds.root).glob("*.tmp"))
    Path("taken").write_text("a file")
    put(path.parent / "tables", {"a.parquet": b""})
    for message, url, options, missing in (
        ("holds no images; looked for .*remote images have to be in shards", "memory://nothing", {}, None),
        ("cannot be looked up .FileNotFoundError.*9.tar", "memory://set/9.tar", {}, None),
        ("cache_gb=1e-06 is less than one of its files", "memory://set", dict(cache_gb=1e-6), None),
        ("cannot be kept in taken/shards-.*; set another cache_dir", "memory://set", dict(cache_dir="taken"), None),
        ("s3://bucket/x: cannot be read .*; pip install fsspec", "s3://bucket/x", {}, "fsspec"),
        ("pip install pyarrow", path.parent / "tables", {}, "pyarrow.parquet"),
    ):
        with pytest.raises(UserError, match=message), monkeypatch.context() as patch:
            if missing:
                patch.setitem(sys.modules, missing, None)
            Dataset(url, "all", 4, **options)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_over_http(memory, monkeypatch):
    """Sizes and times are not in the list, and a missing file is an error of another type."""
    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:  # of the current directory
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ds = Dataset(f"http://127.0.0.1:{server.server_address[1]}/set/0000{{0..4}}.tar", "all", 4)
        server.shutdown()
    assert metas(ds) == metas(Dataset(memory[1], "all", 4)) and ds.classes == ["zero", "one", "two"]


# --- the command, real data ---


def test_the_command_says_what_there_is(tmp_path, monkeypatch, capsys):
    path = make_shards(tmp_path / "set", [5, 6])
    monkeypatch.setattr(sys, "argv", ["data.dataset", str(path), "--image_size=4", "--seconds=0.1"])
    runpy.run_path(f"{ROOT}/data/dataset.py", run_name="__main__")
    out = capsys.readouterr().out
    wanted = (
        f"{path}: tar, 11 images in 2 shards (train 10, val 1), 3 classes, labels on 11 of 11, captions on 11 of 11\n"
    )
    assert wanted in out and "images/s per core at 4 px" in out, out


# name -> (split, image_size, form, length, classes, index, its label, its first caption)
REAL = {
    "cifar10": ("train", 32, "parquet", 50000, 10, 49999, 5, None),
    "imagenette128": ("all", 128, "tar", 9469, 10, 5000, 2, "a photo of a cassette player"),
    "flickr8k_1000": ("all", 64, "folder", 1000, 0, 0, -1, "A child in a pink dress is climbing up a set of stairs"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data(test_data, name):
    split, size, form, length, classes, i, label, caption = REAL[name]
    ds = Dataset(test_data / name, split, size)
    assert (ds.format, len(ds), ds.num_classes) == (form, length, classes)
    assert not classes or (len(ds.classes) == classes and len({ds.meta(i)["label"] for i in range(length)}) == classes)
    item = ds[i]
    assert item["label"] == label and (item["text"][0].startswith(caption) if caption else not item["text"])
    assert item["image"].shape == (3, size, size) and 0.1 < item["image"].std() < 1.5
