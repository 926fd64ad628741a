"""Every on-disk form, every kind of image, and the promises about order: see data/dataset.py."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import dataset as room
from data.dataset import BadImage, Dataset, Stream, collate, loader, permute, seed_of, step_positions, to_rgb, to_tensor

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # cache/ goes to the current directory


def picture(i, size=(12, 10)):
    """A different smooth RGB picture for each i, as (H, W, 3) uint8."""
    w, h = size
    y, x = np.mgrid[0:h, 0:w]
    return np.stack([x * 17 + i * 7, y * 19 + i * 3, (x + y) * 9 + i * 11], -1).astype(np.uint8)


def encoded(pixels, form="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def make_folder(path, n=6, classes=("cat", "dog"), size=(12, 10)):
    for i in range(n):
        folder = path / classes[i % len(classes)] if classes else path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(encoded(picture(i, size)))
    return path


def make_tar(path, samples):
    """samples: a list of {member name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in [pair for sample in samples for pair in sample.items()]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_parquet(path, columns, **options):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


def everything(path, **settings):
    ds = Dataset(path, "all", **settings)
    return ds, [ds[i] for i in range(len(ds))]


# -----------------------------------------------------------------------------
# randomness


def test_seed_is_stable_and_tells_parts_apart():
    assert seed_of(1, "a") == 2461651067226055738  # the same on every machine and in every version: runs resume by it
    assert seed_of(np.int64(1), "a") == seed_of(1, "a")
    seeds = {seed_of(*parts) for parts in [(1, 2), (2, 1), (12,), ("1", 2), (1, 2, 0), ()]}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 65536, 65537])
def test_permutation_is_a_bijection(n):
    image = permute(np.arange(n), n, seed=3)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))
    few = range(0, n, -(-n // 40))
    assert [permute(i, n, 3) for i in few] == image[few].tolist()  # int and array agree


def test_permutation_depends_on_the_seed_and_is_even():
    n = 10
    counts = np.zeros((n, n))
    for seed in range(3000):
        counts[np.arange(n), permute(np.arange(n), n, seed)] += 1
    assert abs(counts - 300).max() < 100  # 6 sigma: every index goes everywhere
    assert len({tuple(permute(np.arange(3), 3, seed).tolist()) for seed in range(100)}) == 6
    x = permute(np.arange(2000), 2000, 1)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.1 and abs(np.corrcoef(x, np.arange(2000))[0, 1]) < 0.1


def test_permutation_of_a_billion():
    n = 10**9
    at = np.concatenate([np.arange(20000), np.arange(n - 20000, n)])
    image = permute(at, n, seed=5)
    assert image[:3].tolist() == [75155974, 201049163, 564084377]  # pinned: runs resume by it
    assert len(np.unique(image)) == len(at) and image.min() >= 0 and image.max() < n
    assert abs(image.mean() / n - 0.5) < 0.02


@pytest.mark.parametrize("index", [-1, 5, np.array([0, 5])])
def test_permutation_refuses_what_is_outside(index):
    with pytest.raises(ValueError, match=r"outside range\(5\)"):
        permute(index, 5, 0)


# -----------------------------------------------------------------------------
# pixels


def test_to_tensor_range():
    x = to_tensor(Image.fromarray(np.array([[[0, 255, 51]]], np.uint8)))
    assert x.shape == (3, 1, 1) and x.dtype == torch.float32 and x.is_contiguous()
    assert torch.allclose(x.flatten(), torch.tensor([-1, 1, -0.6]))


def test_every_mode_becomes_rgb():
    grey = np.arange(0, 250, dtype=np.uint8).reshape(10, 25)
    as_rgb = np.repeat(grey[:, :, None], 3, 2)
    assert np.array_equal(to_rgb(Image.fromarray(grey)), as_rgb)

    half = np.dstack([as_rgb, np.full_like(grey, 255)])
    half[:, :12, 3] = 0  # fully transparent on the left: white
    expected = as_rgb.copy()
    expected[:, :12] = 255
    assert np.array_equal(to_rgb(Image.fromarray(half)), expected)
    with_alpha = Image.fromarray(np.dstack([grey, half[:, :, 3]]), "LA")
    assert np.array_equal(to_rgb(with_alpha), expected)

    palette = Image.fromarray(picture(0)).quantize(8)
    assert palette.mode == "P" and np.array_equal(to_rgb(palette), palette.convert("RGB"))
    palette.info["transparency"] = palette.getpixel((0, 0))
    clear = np.asarray(palette) == palette.getpixel((0, 0))
    assert (np.asarray(to_rgb(palette))[clear] == 255).all() and not clear.all()

    assert np.asarray(to_rgb(Image.new("1", (2, 2), 1))).min() == 255


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(form):
    wide = np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)
    image = Image.open(io.BytesIO(encoded(wide, form)))
    assert image.mode.startswith("I")
    grey = np.asarray(to_rgb(image))[:, :, 0]
    assert np.array_equal(grey, np.round(wide / 257)) and grey.max() == 255 and len(np.unique(grey)) == 100


def test_cmyk_jpeg(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8) + np.array([200, 40, 90], np.uint8)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
    _, items = everything(tmp_path, image_size=16)
    assert (items[0]["image"] - to_tensor(Image.fromarray(pixels))).abs().max() < 0.05


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_animation_gives_its_first_frame(tmp_path, form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(tmp_path / f"a.{form.lower()}", save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(tmp_path / f"a.{form.lower()}").n_frames == 3
    _, items = everything(tmp_path, image_size=8)
    assert torch.equal(items[0]["image"][:, 0, 0], torch.tensor([1.0, -1, -1]))


def test_exif_rotation(tmp_path):
    upright = picture(1, (8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    (tmp_path / "a.png").write_bytes(encoded(np.rot90(upright).copy(), exif=exif))
    _, items = everything(tmp_path, image_size=8)
    assert torch.equal(items[0]["image"], to_tensor(Image.fromarray(upright)))


def test_resize_and_crop(tmp_path):
    wide = picture(0, (20, 10))
    (tmp_path / "a.png").write_bytes(encoded(wide))
    (tmp_path / "b.png").write_bytes(encoded(np.full((3, 2, 3), 77, np.uint8)))  # smaller: enlarged
    ds = Dataset(tmp_path, "all", 10)
    whole = to_tensor(Image.fromarray(wide))
    assert torch.equal(ds[0]["image"], whole[:, :, 5:15])  # no resize where none is needed
    assert torch.equal(ds.pixels(0, flip=True), whole[:, :, 5:15].flip(-1))
    assert ds[1]["image"].shape == (3, 10, 10) and torch.allclose(ds[1]["image"], torch.tensor(77 / 127.5 - 1))
    # side 0.5 + 0.5 u of the short one, placed anywhere
    assert torch.equal(Dataset(tmp_path, "all", 5).pixels(0, "random", u=(0.0, 0.999, 0.999)), whole[:, 5:, 15:])
    assert torch.equal(Dataset(tmp_path, "all", 5).pixels(0, "random", u=(0.0, 0.0, 0.0)), whole[:, :5, :5])


def test_resize_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    (tmp_path / "a.png").write_bytes(encoded(stripes))
    inner = Dataset(tmp_path, "all", 16)[0]["image"][:, :, 2:-2]
    assert inner.abs().max() < 0.05  # grey; without antialiasing, black or white


# -----------------------------------------------------------------------------
# forms


def test_the_same_content_in_every_form(tmp_path):
    pictures = [picture(i, (10, 10)) for i in range(6)]
    labels, names = [i % 2 for i in range(6)], ["cat", "dog"]
    texts = [[f"picture {i}", f"no {i}, “quoted”"] for i in range(6)]
    pngs = [encoded(p) for p in pictures]

    folder = make_folder(tmp_path / "folder", 6, names, (10, 10))
    lines = [{"file_name": f"{names[i % 2]}/{i:03d}.png", "text": texts[i]} for i in range(6)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    samples = [
        {f"{i:03d}.png": pngs[i], f"{i:03d}.json": json.dumps({"label": labels[i], "text": texts[i]}).encode()}
        for i in range(6)
    ]
    make_tar(tmp_path / "tar" / "a.tar", samples[:4])
    make_tar(tmp_path / "tar" / "b.tar", samples[4:])
    (tmp_path / "tar" / "classes.json").write_text(json.dumps(names))

    images = [{"bytes": png, "path": "x.png"} for png in pngs]
    make_parquet(tmp_path / "parquet/a.parquet", {"image": images, "label": labels, "text": texts}, row_group_size=4)
    (tmp_path / "parquet" / "classes.json").write_text(json.dumps({"0": "cat", "1": "dog"}))

    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy/images.npy", np.stack(pictures))
    np.save(tmp_path / "npy/labels.npy", np.array(labels))
    captions = [json.dumps({"text": texts[i]} if i % 2 else texts[i]) for i in range(6)]
    (tmp_path / "npy/captions.jsonl").write_text("\n".join(captions))
    (tmp_path / "npy/meta.json").write_text(json.dumps({"classes": names}))

    prints = set()
    for form in ("folder", "tar", "parquet", "npy"):
        ds, items = everything(tmp_path / form, image_size=10)
        assert (ds.form, len(ds), ds.classes, ds.num_classes) == (form, 6, names, 2)
        items.sort(key=lambda item: item["text"])
        for i, item in enumerate(items):
            assert torch.equal(item["image"], to_tensor(Image.fromarray(pictures[i]))), form
            assert item["image"].dtype == torch.float32
            assert (item["label"], item["text"]) == (labels[i], texts[i]), form
            assert item["key"] and {k: v for k, v in item.items() if k != "image"} == ds.meta(ds_index(ds, item["key"]))
        assert len({item["key"] for item in items}) == 6
        prints.add(ds.fingerprint)
    assert len(prints) == 4


def ds_index(ds, key):
    return [ds.meta(i)["key"] for i in range(len(ds))].index(key)


def test_meta_does_not_decode(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "cat/000.png").write_bytes(b"nonsense")
    assert Dataset(tmp_path, "all").meta(0) == dict(label=0, text=[], key="cat/000.png")


def test_folder_without_classes_has_no_labels(tmp_path):
    ds, items = everything(make_folder(tmp_path, classes=()), image_size=8)
    assert [item["label"] for item in items] == [-1] * 6 and ds.classes == [] and ds.num_classes == 0


def test_folder_links(tmp_path):
    make_folder(tmp_path / "elsewhere", 4)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/cat").symlink_to(tmp_path / "elsewhere/cat")
    (tmp_path / "set/cat/up").symlink_to(tmp_path / "set")  # leads back up: no end but for the guard
    ds = Dataset(tmp_path / "set", "all")
    assert [ds.key(i) for i in range(len(ds))] == ["cat/000.png", "cat/002.png"]


def test_folder_classes_with_numbers_for_names_are_sorted_names(tmp_path):
    ds, items = everything(make_folder(tmp_path, 6, ("10", "9", "train")), image_size=8)  # and train is a class here
    assert ds.classes == ["10", "9", "train"]
    assert {item["key"].split("/")[0]: item["label"] for item in items} == {"10": 0, "9": 1, "train": 2}


def test_folder_metadata_labels_and_storage_folder(tmp_path):
    make_folder(tmp_path, 4, ("images",))
    lines = [{"file_name": f"images/{i:03d}.png", "label": "ab"[i % 2], "text": f"t{i}"} for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ds, items = everything(tmp_path, image_size=8)
    assert ds.classes == ["a", "b"] and [item["label"] for item in items] == [0, 1, 0, -1]
    assert [item["text"] for item in items] == [["t0"], ["t1"], ["t2"], []]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/000.png", "text": "t"}')
    assert Dataset(tmp_path, "all").num_classes == 0  # a lone images/ is no class
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "t"}')
    with pytest.raises(ValueError, match="names no image"):
        Dataset(tmp_path, "all")


def test_classes_json_orders_the_labels(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "classes.json").write_text('["dog", "bird", "cat"]')
    ds, items = everything(tmp_path, image_size=8)
    assert ds.classes == ["dog", "bird", "cat"] and ds.num_classes == 3
    assert {item["key"][:3]: item["label"] for item in items} == {"cat": 2, "dog": 0}
    (tmp_path / "classes.json").write_text('["tabby", "poodle"]')  # other names, as for wnids: the sorted order
    assert Dataset(tmp_path, "all").classes == ["tabby", "poodle"]
    (tmp_path / "classes.json").write_text('["dog", "bird", "fish"]')
    with pytest.raises(ValueError, match="'cat'"):
        Dataset(tmp_path, "all")


def test_labels_beyond_the_class_names(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((3, 4, 4, 3), np.uint8))
    np.save(tmp_path / "labels.npy", [0, 1, 2])
    assert Dataset(tmp_path, "all").num_classes == 3
    (tmp_path / "classes.json").write_text('["a", "b"]')
    with pytest.raises(ValueError, match="label 2"):
        Dataset(tmp_path, "all")


def test_tar_with_txt_cls_and_json(tmp_path):
    jpeg = [encoded(picture(i), "JPEG") for i in range(5)]
    samples = [
        {"./x/a.jpg": jpeg[0], "./x/a.txt": "ein Bär\n".encode(), "./x/a.cls": b"3\n"},
        {"b.json": b'{"caption": "from json", "label": 1}', "b.jpg": jpeg[1], "b.seg.png": b"-"},
        {"lonely.txt": b"no image", "._c.jpg": b"left by a Mac"},
        {"c.JPG": jpeg[2], "c.txt": b"first", "c.json": b'{"caption": "second"}'},
        {"d.jpg": jpeg[3], "d.json": b"{damaged"},
    ]
    make_tar(tmp_path / "sub/0.tar", samples)
    ds = Dataset(tmp_path, "all", 8)
    metas = [ds.meta(i) for i in range(3)]
    assert [meta["key"] for meta in metas] == ["sub/0/x/a", "sub/0/b", "sub/0/c"] and len(ds) == 4
    assert [meta["text"] for meta in metas] == [["ein Bär"], ["from json"], ["first"]]
    assert [meta["label"] for meta in metas] == [3, 1, -1] and ds.num_classes == 4 and ds.classes == []
    pixels = [Dataset(tmp_path, "all", 10).rgb(i) for i in range(4)]
    assert all(np.array_equal(a, Image.open(io.BytesIO(b))) for a, b in zip(pixels, jpeg))
    with pytest.raises(BadImage, match="sub/0/d: its caption"):
        ds.meta(3)


def test_class_names_as_labels_are_numbered_in_sorted_order(tmp_path):
    make_tar(tmp_path / "0.tar", [{f"{i}.png": encoded(picture(i)), f"{i}.cls": b"zcax"[i : i + 1]} for i in range(4)])
    ds = Dataset(tmp_path, "all")
    assert ds.classes == ["a", "c", "x", "z"] and ds.labels.tolist() == [3, 1, 0, 2]


def test_parquet_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pngs = [encoded(picture(i)) for i in range(4)]
    make_parquet(tmp_path / "a.parquet", {"jpg": pngs, "caption": ["one", None, "three", ""]})
    ds, items = everything(tmp_path / "a.parquet", image_size=8)  # one shard by its own name
    assert [item["text"] for item in items] == [["one"], [], ["three"], []] and ds.num_classes == 0

    hub = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())], {"huggingface": json.dumps(hub)})
    pa.parquet.write_table(pa.table({"image": pngs, "label": [1, 0, 1, None]}, schema), tmp_path / "a.parquet")
    ds, items = everything(tmp_path, image_size=8)
    assert ds.classes == ["neg", "pos"] and [item["label"] for item in items] == [1, 0, 1, -1]

    make_parquet(tmp_path / "a.parquet", {"picture": pngs})
    with pytest.raises(ValueError, match="picture.*call the one"):
        Dataset(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="does not open as parquet"):
        Dataset(tmp_path)


def test_parquet_keeps_only_some_row_groups(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (12, 30, 30, 3), dtype=np.uint8)
    make_parquet(tmp_path / "a.parquet", {"image": [encoded(x) for x in noise]}, row_group_size=2)
    monkeypatch.setattr(room, "GROUP_BYTES", 12000)  # two groups of two images of 2.7 kB
    ds = Dataset(tmp_path, "all", 30)
    for i in list(range(12)) + [0, 11, 5]:
        assert torch.equal(ds[i]["image"], to_tensor(Image.fromarray(noise[i])))
        assert len(ds._groups) <= 2


def test_npy_grey_and_refusals(tmp_path):
    grey = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)
    for images in (grey, grey[..., 0]):
        np.save(tmp_path / "images.npy", images)
        _, items = everything(tmp_path, image_size=8)
        assert torch.equal(items[1]["image"], to_tensor(Image.fromarray(np.repeat(grey[1], 3, 2))))
    np.save(tmp_path / "labels.npy", [1, 2, 3])
    with pytest.raises(ValueError, match="3 entries, not 2"):
        Dataset(tmp_path)
    for wrong in (
        grey.astype(np.float32),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)),
    ):
        np.save(tmp_path / "images.npy", wrong)
        with pytest.raises(ValueError, match="make it uint8"):
            Dataset(tmp_path)


# -----------------------------------------------------------------------------
# semantic maps and objects

COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)  # class -> color
WHERE = [("cat", [2, 1, 4, 5]), ("dog", [12, 6, 6, 4]), ("cat", [0, 0, 2, 10])]  # the last is outside the centre crop


def scene(i, size=(18, 10)):
    """A map of blocks of two pixels, and the picture that has the map's colors; class 4 is unknown."""
    w, h = size
    classes = np.random.default_rng(i).integers(0, 5, (h // 2, w // 2)).repeat(2, 0).repeat(2, 1).astype(np.uint8)
    return np.where(classes == 4, 255, classes).astype(np.uint8), COLORS[classes]


def make_scenes(path, form, n=6, size=(18, 10)):
    """One data set with maps and objects in each form."""
    path.mkdir(parents=True, exist_ok=True)
    maps, pictures = zip(*[scene(i, size) for i in range(n)])
    objects = {"bbox": [box for _, box in WHERE], "categories": [name for name, _ in WHERE]}
    pngs, map_pngs = [encoded(p) for p in pictures], [encoded(m) for m in maps]
    if form == "npy":
        np.save(path / "images.npy", np.stack(pictures)), np.save(path / "maps.npy", np.stack(maps))
        lines = [json.dumps({"text": f"no {i}", "objects": objects}) for i in range(n)]
        (path / "captions.jsonl").write_text("\n".join(lines))
    elif form == "folder":
        for i in range(n):
            (path / f"{i:03d}.png").write_bytes(pngs[i]), (path / f"{i:03d}.map.png").write_bytes(map_pngs[i])
        lines = [{"file_name": f"{i:03d}.png", "text": f"no {i}", "objects": objects} for i in range(n)]
        (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    elif form == "tar":
        record = json.dumps({"objects": objects}).encode()
        parts = [
            {".png": pngs[i], ".map.png": map_pngs[i], ".json": record, ".txt": f"no {i}".encode()} for i in range(n)
        ]
        samples = [{f"{i:03d}{end}": content for end, content in part.items()} for i, part in enumerate(parts)]
        make_tar(path / "a.tar", samples[:2]), make_tar(path / "b.tar", samples[2:])
    else:
        columns = {"image": [{"bytes": png} for png in pngs], "segmentation": [{"bytes": png} for png in map_pngs]}
        columns |= {"text": [f"no {i}" for i in range(n)], "objects": [objects] * n}
        make_parquet(path / "a.parquet", columns, row_group_size=4)
    return path


def colors_of(classes):
    """The picture (3,S,S) that a map tells of."""
    return torch.from_numpy(COLORS[classes.numpy()]).permute(2, 0, 1) / 127.5 - 1  # -1 is the last color, too


@pytest.mark.parametrize("form", ["npy", "folder", "tar", "parquet"])
def test_maps_and_objects_in_every_form(tmp_path, form):
    path = make_scenes(tmp_path / "set", form)
    ds = Dataset(path, "all", 10)
    assert (ds.form, len(ds), ds.has_maps, ds.has_objects) == (form, 6, True, True)
    assert (ds.map_names, ds.map_classes, ds.object_classes) == ([], 4, ["cat", "dog"])
    for i in range(6):
        for crop in (dict(), dict(crop="random", u=(1 - 1e-9, 0.7, 0.4))):
            for flip in (False, True):
                classes = ds.map(i, flip=flip, **crop)
                assert classes.shape == (10, 10) and classes.dtype == torch.int64
                assert torch.equal(colors_of(classes), ds.pixels(i, flip=flip, **crop)), "as the pixels"
        assert np.array_equal(ds.map(i) % 256, scene(i)[0][:, 4:14]), "and -1 is 255"
        assert ds.size(i) == (18, 10) and ds.meta(i)["text"] == [f"no {i}"] and "objects" not in ds.meta(i)
        cat, dog = ds.boxes(i)  # the crop is 4..14: half of the cat, a third of the dog is in it
        assert cat == pytest.approx(("cat", 0, 0.1, 0.2, 0.6)) and dog == pytest.approx(("dog", 0.8, 0.6, 1, 1))
        cat, dog = ds.boxes(i, flip=True)
        assert cat == pytest.approx(("cat", 0.8, 0.1, 1, 0.6)) and dog == pytest.approx(("dog", 0, 0.6, 0.2, 1))
    (path / "map_classes.json").write_text('["sky", "sea", "sand", "stone", "snow"]')
    (path / "object_classes.json").write_text('["bird", "cat", "dog"]')
    named = Dataset(path, "all", 10)
    assert named.map_classes == 5 and named.map_names[1] == "sea" and named.object_classes == ["bird", "cat", "dog"]
    assert named.fingerprint == ds.fingerprint, "caches of latents stay valid"
    with pytest.raises(IndexError, match="dataset of 6"):
        ds.map(6)


def test_boxes_frame_what_the_pixels_show(tmp_path):
    """One bright rectangle a picture: its box, scaled to the crop, is where the bright pixels are."""
    rng, lines, seen = np.random.default_rng(0), [], 0
    for i in range(20):
        size = (30, 20) if i % 2 else (20, 30)
        x, y = (int(rng.integers(0, side - 8)) for side in size)
        w, h = (int(v) for v in rng.integers(2, 9, 2))
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        pixels[y : y + h, x : x + w] = 255
        (tmp_path / f"{i:02d}.png").write_bytes(encoded(pixels))
        lines.append({"file_name": f"{i:02d}.png", "objects": {"bbox": [[x, y, w, h]], "categories": ["it"]}})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ds = Dataset(tmp_path, "all", 20)
    for i in range(20):
        for flip in (False, True):
            bright, boxes = (ds.pixels(i, flip=flip)[0] > 0).nonzero(), ds.boxes(i, flip)
            visible = len(bright) / np.prod(lines[i]["objects"]["bbox"][0][2:])
            assert len(boxes) == (visible >= room.VISIBLE)
            for name, *corners in boxes:
                (top, left), (bottom, right) = bright.min(0)[0].tolist(), bright.max(0)[0].tolist()
                assert name == "it" and [20 * v for v in corners] == pytest.approx([left, top, right + 1, bottom + 1])
                seen += 1
    assert 20 < seen < 40, "some are outside"


def test_an_older_index_of_a_tar_is_renewed_when_maps_come(tmp_path):
    png, one = encoded(scene(0)[1]), encoded(scene(0)[0])
    make_tar(tmp_path / "set/a.tar", [{"0.png": png}])
    before = Dataset(tmp_path / "set", "all", 10)
    assert not before.has_maps and before.map_classes == 0 and not before.has_objects and before.boxes(0) == []
    with pytest.raises(BadImage, match="^a/0: it has no map$"):
        before.map(0)
    make_tar(tmp_path / "set/a.tar", [{"0.map.png": one, "0.png": png}])
    after = Dataset(tmp_path / "set", "all", 10)
    assert after.has_maps and torch.equal(colors_of(after.map(0)), after[0]["image"])


def test_each_bad_map_says_what_is_wrong(tmp_path):
    classes, pixels = scene(0)
    contents = {
        "a": (encoded(pixels), "mode RGB: save it as 8-bit grey"),
        "b": (encoded(classes[:, :10]), r"its map is \(10, 10\), the picture \(18, 10\): make them as large"),
        "c": (b"no", "its map does not read .not an image that Pillow can read"),
        "d": (b"", "it has no map"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / f"{name}.jpg").write_bytes(encoded(pixels, "JPEG"))
        (tmp_path / f"{name}.map.png").write_bytes(content)
    (tmp_path / "e.jpg").write_bytes(encoded(pixels, "JPEG"))
    indexed = Image.fromarray(classes, "P")
    indexed.putpalette([7] * 768)
    indexed.save(tmp_path / "e.map.png")
    (tmp_path / "alone.map.png").write_bytes(encoded(pixels))  # no picture beside it: it is one
    ds = Dataset(tmp_path, "all", 10)
    assert [ds.key(i) for i in range(len(ds))] == ["a.jpg", "alone.map.png", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    assert ds.has_maps and np.array_equal(ds.map(5) % 256, classes[:, 4:14])
    for name, (_, message) in contents.items():
        with pytest.raises(BadImage, match=f"^{name}.jpg: .*{message}"):
            ds.map(ds_index(ds, f"{name}.jpg"))
    np.save(tmp_path / "images.npy", np.zeros((2, 8, 8, 3), np.uint8))
    for wrong in (np.zeros((2, 8, 8), np.int64), np.zeros((3, 8, 8), np.uint8), np.zeros((2, 4, 4), np.uint8)):
        np.save(tmp_path / "maps.npy", wrong)
        with pytest.raises(ValueError, match=r"maps.npy is .*: make it uint8 \(2, 8, 8\)"):
            Dataset(tmp_path)


def test_numbered_objects_and_bad_ones(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((7, 8, 8, 3), np.uint8))
    objects = [
        {"bbox": [[0, 0, 4, 8]], "categories": [1]},
        {"bbox": [[0, 0, 4, 8]], "category": ["x y "]},
        {"bbox": [[0, 0, 4]], "categories": [1]},
        {"bbox": [], "categories": [1]},
        {"bbox": [[0, 0, 0, 8], [9, 9, 9, 9], [-2, -2, 4, 4]], "categories": [0, 0, 7]},
        {"categories": []},
    ]
    lines = [{"text": "t", "objects": value} for value in objects] + [["only captions"]]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ds = Dataset(tmp_path, "all", 8)
    assert ds.boxes(0) == [("1", 0, 0, 0.5, 1)] and ds.boxes(1) == [("x y", 0, 0, 0.5, 1)]
    assert ds.boxes(4) == [("7", 0, 0, 0.25, 0.25)], "nothing of the others can be seen"
    assert ds.boxes(6) == [] and ds.meta(6)["text"] == ["only captions"]
    assert ds.object_classes == ["0", "1", "7", "x y"]
    for i, message in ((2, "give .x, y, w, h. and a category each"), (3, "1 categories, 0 boxes"), (5, "bbox")):
        with pytest.raises(BadImage, match=f"0000000{i}: its objects do not read .*{message}"):
            ds.boxes(i)
    (tmp_path / "classes.json").write_text('{"1": "cat", "7": "dog"}')
    ds = Dataset(tmp_path, "all", 8)
    assert ds.boxes(0)[0][0] == "cat" and ds.boxes(4)[0][0] == "dog" and ds.object_classes == ["0", "cat", "dog", "x y"]
    (tmp_path / "object_classes.json").write_text('["person", "tree"]')
    ds = Dataset(tmp_path, "all", 8)
    assert ds.boxes(0)[0][0] == "tree" and ds.boxes(4)[0][0] == "7" and ds.object_classes == ["person", "tree"]


def test_a_column_called_map_that_holds_no_pictures(tmp_path):
    columns = {"image": [encoded(picture(i)) for i in range(3)], "annotation": ["a", "b", "c"]}
    make_parquet(tmp_path / "a.parquet", columns)
    assert not Dataset(tmp_path, "all", 8).has_maps


# -----------------------------------------------------------------------------
# splits


def test_split_folders_share_their_classes(tmp_path):
    make_folder(tmp_path / "train", 6, ("a", "b", "c"))
    make_folder(tmp_path / "val", 2, ("a", "c"))
    make_folder(tmp_path / "test", 1, ("a",))
    train, val = Dataset(tmp_path, "train"), Dataset(tmp_path, "val")
    assert (len(train), len(val), len(Dataset(tmp_path, "test")), len(Dataset(tmp_path, "all"))) == (6, 2, 1, 9)
    assert train.classes == val.classes == ["a", "b", "c"] and val.num_classes == 3
    assert [val.meta(i)["label"] for i in range(2)] == [0, 2]  # c is 2, though val has no b
    assert train.fingerprint != val.fingerprint
    inside = Dataset(tmp_path / "val", "all")
    assert len(inside) == 2


@pytest.mark.parametrize("held_out", ["val-000.tar", "validation_0.tar", "test.tar", "x/valid/0.tar"])
def test_split_by_shard_names(tmp_path, held_out):
    png = encoded(picture(0))
    make_tar(tmp_path / "train-000.tar", [{f"{i}.png": png} for i in range(3)])
    make_tar(tmp_path / held_out, [{"9.png": png}])
    assert (len(Dataset(tmp_path, "train")), len(Dataset(tmp_path, "val"))) == (3, 1)
    assert Dataset(tmp_path, "val").meta(0)["key"] == held_out[:-4] + "/9"


def test_split_of_npy(tmp_path):
    for part, n in (("train", 4), ("val", 2)):
        (tmp_path / part).mkdir()
        np.save(tmp_path / part / "images.npy", np.full((n, 4, 4, 3), n, np.uint8))
        (tmp_path / part / "captions.jsonl").write_text("\n".join(f'"{part} {i}"' for i in range(n)))
    val = Dataset(tmp_path, "val", 4)
    assert len(Dataset(tmp_path)) == 4 and [val[i]["text"] for i in range(2)] == [["val 0"], ["val 1"]]
    assert torch.allclose(val[1]["image"], torch.tensor(2 / 127.5 - 1))


def test_split_by_crc32(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((1000, 1, 1, 3), np.uint8))
    keys = {}
    for split in ("train", "val", "all"):
        ds = Dataset(tmp_path, split)
        keys[split] = [ds.key(i) for i in range(len(ds))]
    assert keys["val"] == [key for key in keys["all"] if zlib.crc32(key.encode()) % 100 == 0]
    assert keys["train"] == [key for key in keys["all"] if zlib.crc32(key.encode()) % 100]
    assert 0 < len(keys["val"]) < 30


def test_a_few_images_leave_one_for_validation(tmp_path):
    make_folder(tmp_path, 5)
    train, val = Dataset(tmp_path, "train"), Dataset(tmp_path, "val")
    assert len(train) == 4 and len(val) == 1 and val.key(0) not in [train.key(i) for i in range(4)]


# -----------------------------------------------------------------------------
# errors


def test_missing_path_empty_folder_and_bad_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^dataset nowhere/here is not there: pass --dataset=DIR, a folder"):
        Dataset("nowhere/here")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no images: looked for images.npy, \*.tar, \*.parquet and .jpg"):
        Dataset(tmp_path / "empty")
    (tmp_path / "empty/prepare.py").touch()  # data/openimages, as a clone has it
    with pytest.raises(FileNotFoundError, match="is not made yet: run .*/empty/prepare.py"):
        Dataset(tmp_path / "empty")
    make_folder(tmp_path / "some")
    for size in (0, -8, 2.5, None):
        with pytest.raises(ValueError, match="image_size"):
            Dataset(tmp_path / "some", image_size=size)
    with pytest.raises(ValueError, match="split 'dev'"):
        Dataset(tmp_path / "some", "dev")
    with pytest.raises(ValueError, match="no test images"):
        Dataset(tmp_path / "some", "test")
    ds = Dataset(tmp_path / "some", "all")
    for i in (-1, 6):
        with pytest.raises(IndexError, match="dataset of 6"):
            ds[i]
    with pytest.raises(ValueError, match="crop 'middle'"):
        Stream(ds, 0, crop="middle")


def test_pyarrow_is_named_where_missing(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        Dataset(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_each_bad_item_says_what_is_wrong(tmp_path, monkeypatch):
    good = encoded(picture(0, (64, 64)), "JPEG")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(good[: len(good) // 2])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(0, (64, 64)), "JPEG", exif=exif)
    (tmp_path / "turned.jpg").write_bytes(turned[: len(turned) // 2])  # turning it must not hide that it is cut
    (tmp_path / "text.png").write_bytes(b"<html>404</html>")
    (tmp_path / "huge.png").write_bytes(encoded(np.zeros((40, 400, 3), np.uint8)))
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15000)
    ds = Dataset(tmp_path, "all", 16)
    reasons = {}
    for i in range(len(ds)):
        with pytest.raises(BadImage) as error:
            ds[i]
        key, _, reasons[key] = str(error.value).partition(": ")
    expected = {
        "empty.jpg": "0 bytes",
        "cut.jpg": "truncated",
        "turned.jpg": "truncated",
        "text.png": "not an image",
        "huge.png": "400x40 is over",
    }
    assert reasons.keys() == {*expected, "link.png"}
    assert all(part in reasons[key] for key, part in expected.items()), reasons
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself refuses beyond twice the limit
    with pytest.raises(BadImage, match="huge.png: .*decompression bomb"):
        ds.pixels(ds_index(ds, "huge.png"))


def test_a_cut_tar_gives_what_is_whole(tmp_path, capsys):
    path = make_tar(tmp_path / "a.tar", [{f"{i}.png": encoded(picture(i))} for i in range(5)])
    path.write_bytes(path.read_bytes()[: 3 * 1024 + 600])  # one header and one block an image: the fourth is cut
    ds = Dataset(tmp_path, "all", 10)
    assert "damaged" in capsys.readouterr().out
    assert len(ds) >= 3 and all(ds[i]["image"].shape == (3, 10, 10) for i in range(3))


# -----------------------------------------------------------------------------
# the index cache


def test_tar_index_is_kept_and_renewed(tmp_path, monkeypatch):
    calls = []
    real = room.index_tar
    monkeypatch.setattr(room, "index_tar", lambda *a: calls.append(1) or real(*a))
    png, where = encoded(picture(0)), tmp_path / "set"
    make_tar(where / "a.tar", [{"0.png": png, "0.txt": b"zero", "0.cls": b"cat"}])
    first = Dataset(where, "all", 10)
    again = Dataset(where, "all", 10)
    assert len(calls) == 1 and len(os.listdir("cache")) == 1  # no temporary file left
    assert again.fingerprint == first.fingerprint and again.classes == ["cat"]
    assert again.meta(0) == first.meta(0) == dict(label=0, text=["zero"], key="a/0")
    make_tar(where / "a.tar", [{"0.png": png}, {"1.png": encoded(picture(1)), "1.txt": b"one"}])
    assert len(Dataset(where, "all")) == 2 and len(calls) == 2
    make_tar(where / "b.tar", [{"0.png": png}])
    assert len(Dataset(where, "all")) == 3 and len(calls) == 3
    for path in Path("cache").rglob("*.*"):
        path.write_bytes(b"PK cut short")
    assert len(Dataset(where, "all")) == 3 and len(calls) == 5
    shutil.rmtree("cache")
    Path("cache").write_text("a file stands where the folder would be")
    assert len(Dataset(where, "all")) == 3


def test_fingerprint_follows_the_content_and_not_the_path(tmp_path):
    here, there = make_folder(tmp_path / "here"), make_folder(tmp_path / "elsewhere/there")
    fingerprint = Dataset(here, "all").fingerprint
    assert Dataset(there, "all").fingerprint == fingerprint
    (there / "metadata.jsonl").write_text('{"file_name": "dog/001.png", "text": "t"}')
    assert Dataset(there, "all").fingerprint == fingerprint, "latents do not depend on captions"
    assert Dataset(there, "all").text_fingerprint != Dataset(here, "all").text_fingerprint
    (there / "dog/001.png").write_bytes(encoded(picture(1)) + b" ")
    assert Dataset(there, "all").fingerprint != fingerprint
    for value in (1, 2):  # an array has the same size whatever is in it
        (tmp_path / str(value)).mkdir()
        np.save(tmp_path / str(value) / "images.npy", np.full((100, 4, 4, 3), value, np.uint8))
    assert Dataset(tmp_path / "1").fingerprint != Dataset(tmp_path / "2").fingerprint


# -----------------------------------------------------------------------------
# the stream and the loader


@pytest.fixture
def pets(tmp_path):
    make_folder(tmp_path / "pets", 23, size=(14, 10))
    lines = [
        {"file_name": f"{('cat', 'dog')[i % 2]}/{i:03d}.png", "text": [f"{i} {c}" for c in "abc"]} for i in range(22)
    ]
    (tmp_path / "pets/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Dataset(tmp_path / "pets", "all", 8)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_stream_is_a_pure_function_of_seed_and_position(pets):
    make = lambda seed: Stream(pets, seed, crop="random", flip=True)  # noqa: E731
    one, two, other = make(1), make(1), make(2)
    backwards = {p: two[p] for p in reversed(range(50))}
    assert all(same(one[p], backwards[p]) for p in range(50))
    assert any(one.item(p) != other.item(p) for p in range(23))
    # the same item is seen otherwise in the next epoch: crop, flip, caption
    seen = [[one[p] for p in range(115) if one.item(p)[0] == index] for index in range(22)]
    assert all(len(views) == 5 and not torch.equal(views[0]["image"], views[1]["image"]) for views in seen)
    flips, texts = [v["flip"] for views in seen for v in views], [v["text"] for views in seen for v in views]
    assert 30 < sum(flips) < 80 and all(20 < sum(text.endswith(c) for text in texts) < 55 for c in "abc")


def test_epochs_are_without_replacement_and_differ(pets):
    stream = Stream(pets, 7)
    epochs = [[stream.item(p)[0] for p in range(e * 23, e * 23 + 23)] for e in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(23))
    assert stream.item(22)[1] == 0 and stream.item(23)[1] == 1
    assert epochs[1] == [permute(i, 23, seed_of(7, 1)) for i in range(23)]


def test_draw_tells_what_getitem_does(pets):
    stream = Stream(pets, 3, crop="random", flip=True)
    for p in range(40):
        drawn, item = stream.draw(p), stream[p]
        assert all(item[name] == drawn[name] for name in ("index", "flip", "text", "label", "key"))
        assert (drawn["index"], drawn["epoch"]) == stream.item(p)
        assert torch.equal(item["image"], pets.pixels(drawn["index"], "random", drawn["flip"], drawn["u"]))
        assert drawn["text"] in (pets.meta(drawn["index"])["text"] or [""])
        assert all(0 <= u < 1 for u in drawn["u"])


def test_validation_stream_is_plain(pets):
    stream = Stream(pets, 3, crop="random", flip=True, train=False)
    for p in range(30):
        assert stream.item(p) == (p % 23, p // 23)
        assert torch.equal(stream[p]["image"], pets[p % 23]["image"]) and not stream[p]["flip"]
        assert stream[p]["text"] == (pets.meta(p % 23)["text"] or [""])[0]


def test_positions_do_not_depend_on_the_number_of_ranks():
    cut = lambda step, b, acc, world: [  # noqa: E731
        step_positions(step, micro, b, acc, rank, world) for micro in range(acc) for rank in range(world)
    ]
    for step in range(3):
        whole = list(range(step * 16, step * 16 + 16))
        for b, acc, world in [(16, 1, 1), (4, 4, 1), (8, 1, 2), (4, 2, 2), (4, 1, 4), (2, 2, 4)]:
            assert sum(cut(step, b, acc, world), []) == whole
    assert step_positions(step=5, micro=1, batch_size=3, grad_accum=2, rank=1, world=2) == [69, 70, 71]


def test_loader_is_the_same_for_any_number_of_workers_and_any_start(pets):
    stream = Stream(pets, 3, crop="random", flip=True)
    before = torch.get_rng_state()
    plain = list(loader(stream, 0, 6, batch_size=2, grad_accum=2, rank=1, world=2, workers=0))
    with_workers = list(loader(stream, 0, 6, batch_size=2, grad_accum=2, rank=1, world=2, workers=2))
    resumed = list(loader(stream, 4, 6, batch_size=2, grad_accum=2, rank=1, world=2, workers=1))
    assert len(plain) == 12 and len(resumed) == 4
    assert all(same(a, b) for a, b in zip(plain, with_workers)) and len(with_workers) == 12
    assert all(same(a, b) for a, b in zip(plain[8:], resumed))
    positions = [p for step in range(6) for micro in range(2) for p in step_positions(step, micro, 2, 2, 1, 2)]
    assert sum((batch["index"].tolist() for batch in plain), []) == [stream.item(p)[0] for p in positions]
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn from the global generator


def test_collate(pets):
    batch = collate([Stream(pets, 0)[p] for p in range(3)])
    assert batch["image"].shape == (3, 3, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["label"].dtype == batch["index"].dtype == torch.int64 and batch["flip"].dtype == torch.bool
    assert len(batch["text"]) == len(batch["key"]) == 3 and batch["bad"] == []


def test_one_bad_image_is_replaced_and_named(tmp_path):
    make_folder(tmp_path, 8)
    good = (tmp_path / "cat/002.png").read_bytes()
    (tmp_path / "cat/002.png").write_bytes(good[:60])
    stream = Stream(Dataset(tmp_path, "all", 8), 5, flip=True)
    at = next(p for p in range(8) if stream.draw(p)["key"] == "cat/002.png")
    items = [stream[p] for p in range(8)]
    assert [len(item["bad"]) for item in items] == [int(p == at) for p in range(8)] or len(items[at]["bad"]) > 1
    assert items[at]["bad"][0].startswith("cat/002.png: ") and items[at]["key"] != "cat/002.png"
    assert same(items[at], stream[at])
    attempt = len(items[at]["bad"])
    assert items[at]["index"] == stream.draw(at, attempt)["index"]  # a reader of cached latents finds the same one
    batches = list(loader(stream, 0, 2, batch_size=4, workers=2))
    assert [line for batch in batches for line in batch["bad"]] == items[at]["bad"]


def test_stand_ins_are_of_many_kinds(tmp_path):
    make_folder(tmp_path, 40)
    for i in range(0, 40, 2):
        (tmp_path / f"cat/{i:03d}.png").write_bytes(b"bad")
    stream = Stream(Dataset(tmp_path, "all", 8), 5)
    items = [stream[p] for p in range(40)]
    stand_ins = {item["key"] for item in items if item["bad"]}
    assert sum(bool(item["bad"]) for item in items) == 20 and len(stand_ins) > 8
    assert all(item["key"].startswith("dog/") for item in items)


def test_all_bad_is_an_error_that_says_so(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"no")
    stream = Stream(Dataset(tmp_path, "all", 8), 0)
    with pytest.raises(ValueError, match=r"all 100 images tried in .* are bad \(.*[012]\.jpg: not an image"):
        stream[0]
    with pytest.raises(ValueError, match="all 100 images tried"):
        next(loader(stream, 0, 1, batch_size=2, workers=1))


TRAINER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from data.dataset import Dataset, Stream, loader
signal.signal(signal.SIGTERM, lambda *_: print("term", flush=True))
signal.signal(signal.SIGINT, lambda *_: print("int", flush=True))
stream = Stream(Dataset(sys.argv[2], "all", 8), 0)
batches = loader(stream, 0, 50, batch_size=2, workers=2)
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
            for number, said in ((signal.SIGTERM, "term\n"), (signal.SIGINT, "int\n")):
                os.killpg(trainer.pid, number)  # the trainer and its workers, as torchrun and Ctrl-C do
                assert trainer.stdout.readline() == said
            out, err = trainer.communicate("\n", timeout=30)
        finally:
            trainer.kill()
    assert (trainer.returncode, out) == (0, "50\n"), err


# -----------------------------------------------------------------------------
# real data


def test_cifar10(test_data):
    pytest.importorskip("pyarrow")
    train, val = Dataset(test_data / "cifar10", "train", 32), Dataset(test_data / "cifar10", "val", 32)
    assert train.form == "parquet" and (len(train), len(val)) == (50000, 10000)
    assert train.num_classes == 10 and train.classes[:2] == ["airplane", "automobile"]
    assert np.bincount(train.labels).tolist() == [5000] * 10 and np.bincount(val.labels).tolist() == [1000] * 10
    assert train[49999]["image"].shape == (3, 32, 32) and 0.3 < train[7]["image"].std() < 1


def test_imagenette_tar(test_data):
    path = test_data / "imagenette128"
    train, val, whole = (Dataset(path, split, 128) for split in ("train", "val", "all"))
    assert len(train) + len(val) == len(whole) == 9469 and 60 < len(val) < 130
    assert whole.num_classes == len(whole.classes) == 10
    for i in (0, 5000, 9468):  # against tarfile, read in full
        item, (shard, _, key) = whole[i], whole.key(i).partition("/")
        with tarfile.open(path / f"{shard}.tar") as tar:
            record = json.load(tar.extractfile(f"{key}.json"))
            image = Image.open(tar.extractfile(f"{key}.jpg")).convert("RGB")
        assert (item["label"], item["text"]) == (record["label"], [record["text"]])
        assert whole.classes[item["label"]] in item["text"][0] and torch.equal(item["image"], to_tensor(image))


def test_flickr8k_captions(test_data):
    ds = Dataset(test_data / "flickr8k_1000", "all", 64)
    assert ds.form == "folder" and len(ds) == 1000 and ds.num_classes == 0
    assert all(len(ds.meta(i)["text"]) == 5 for i in range(1000))
    assert ds[0]["text"][1] == "A girl going into a wooden building ." and ds[0]["image"].shape == (3, 64, 64)


def test_kodak_and_imagenette_folders(test_data):
    kodak = Dataset(test_data / "kodak", "all", 512)
    assert len(kodak) == 24 and kodak.num_classes == 0
    image = np.asarray(Image.open(test_data / "kodak" / kodak.key(3)).convert("RGB"))
    h, w = ((side - 512) // 2 for side in image.shape[:2])
    assert torch.equal(kodak[3]["image"], to_tensor(Image.fromarray(image[h : h + 512, w : w + 512])))
    val = Dataset(test_data / "imagenette224_val", "all", 64)
    assert len(val) == 200 and val.num_classes == 10 and np.bincount(val.labels).tolist() == [20] * 10
