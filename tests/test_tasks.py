"""Conditions: masks, degraded images, maps, layouts, each fixed by its position."""

import contextlib
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_data import same

from checkpoint import UserError
from data import cache as cache_files
from data import tasks
from data.cache import LatentCache
from data.dataset import Dataset, Stream, collate, loader
from data.tasks import WithCondition, degrade, layout_string, random_mask
from text import LayoutTokenizer
from vae import VAE

COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)  # class -> color
TASKS = ("none", "inpaint", "sr", "semantic", "layout")


def with_condition(stream, task, seed, **options):
    """WithCondition; "layout" stands for no task, and all its classes' boxes as text."""
    if task == "layout":
        task, options["layout"] = "none", stream.dataset.object_classes
    return WithCondition(stream, task, seed, **options)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache_files, "SHARD", 8)


def make_scenes(path, n=20, size=(24, 16)):
    """Images of a folder, whose maps are their colors: black, with one red, green or blue rectangle."""
    path.mkdir()
    rng, names, lines = np.random.default_rng(0), ["nothing", "red", "green", "blue"], []
    for i in range(n):
        classes, number = np.zeros(size[::-1], np.uint8), 1 + i % 3
        x, y, w, h = int(rng.integers(4, 11)), int(rng.integers(0, 8)), int(rng.integers(2, 9)), int(rng.integers(3, 9))
        classes[y : y + h, x : x + w] = number
        Image.fromarray(COLORS[classes]).save(path / f"{i:02d}.png")
        Image.fromarray(classes).save(path / f"{i:02d}.map.png")
        objects = {"bbox": [[x, y, w, h]], "categories": [number]}
        lines.append({"file_name": f"{i:02d}.png", "text": f"image {i}", "objects": objects})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (path / "map_classes.json").write_text(json.dumps(names))
    (path / "object_classes.json").write_text(json.dumps(names))
    return path


@pytest.fixture
def scenes(tmp_path):
    return Dataset(make_scenes(tmp_path / "scenes"), "all", 16)


def cached(stream, first_stage, folder):
    vae = VAE.from_pretrained(str(first_stage))
    cache = LatentCache(stream, vae, folder)
    cache.build(vae, torch.device("cpu"), contextlib.nullcontext(), 0, 0, 1)
    return cache


# -- masks


def test_a_mask_depends_on_its_seed_alone():
    masks = [random_mask((32, 48), 1, "train", p) for p in range(60)]
    np.random.seed(5), torch.manual_seed(5)
    for p in reversed(range(60)):
        assert torch.equal(masks[p], random_mask((32, 48), 1, "train", p))
    assert len({mask.numpy().tobytes() for mask in masks}) > 54, "all different, but for those of everything"
    assert not torch.equal(random_mask((32, 48), 1, 7), random_mask((32, 48), 2, 7))
    for mask in masks:
        assert mask.shape == (1, 32, 48) and mask.dtype == torch.float32 and set(mask.unique().tolist()) <= {0.0, 1.0}


def test_masks_cover_what_the_docstring_says():
    masks = torch.stack([random_mask((64, 64), "cover", p) for p in range(2000)])[:, 0]
    covered = masks.mean((1, 2)).numpy()
    assert covered.mean() == pytest.approx(0.39, abs=0.03) and covered.min() > 0
    assert np.percentile(covered, [10, 90]).tolist() == pytest.approx([0.12, 0.7], abs=0.03)
    assert (covered == 1).mean() == pytest.approx(0.05, abs=0.02), "everything"
    every = masks.mean(0)
    assert every.min() > 0.2 and every.max() < 0.6, "any place may be filled in, and any may be known"
    known = 1 - masks[covered < 1]
    rows, columns = known.amax(2), known.amax(1)
    box = rows[:, :, None] * columns[:, None, :]
    is_frame = ((known == box).all((1, 2))) & ((rows == 0).any(1) | (columns == 0).any(1))
    assert is_frame.float().mean() == pytest.approx(0.2 / 0.95, abs=0.03), "border: what is known is one rectangle"
    assert (columns[is_frame][:, 0] == 0).any() and (columns[is_frame][:, -1] == 0).any()
    assert (rows[is_frame][:, 0] == 0).any() and (rows[is_frame][:, -1] == 0).any()


@pytest.mark.parametrize("sides", [(1, 1), (4, 9), (8, 8), (16, 200)])
def test_masks_of_any_sides(sides):
    masks = [random_mask(sides, p) for p in range(200)]
    assert all(mask.shape == (1, *sides) and mask.any() for mask in masks)
    assert sides == (1, 1) or 0 < sum(bool(mask.all()) for mask in masks) < 100


def test_masks_are_as_wide_in_a_larger_image():
    for p, mask in enumerate(
        [random_mask((256, 256), p) for p in range(150)]
    ):  # the same one, drawn finer: half the pixels of the outline may differ
        small = F.interpolate(random_mask((64, 64), p)[None], scale_factor=4)[0]
        assert (small - mask).abs().mean() < 0.08


# -- degradation


def photo(size=64):
    """A smooth image with edges, (3,H,W) in [-1,1], of 256 levels."""
    y, x = np.mgrid[0:size, 0:size] / size
    image = np.stack([x, y, 0.5 + 0.4 * np.sin(9 * x + 5 * y)], -1)
    image[(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.05] = (0.9, 0.2, 0.1)
    return torch.from_numpy((image * 255).round().astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


def psnr(a, b):
    return -10 * math.log10(((a - b) / 2).square().mean())


def test_bicubic_is_pillows_and_antialiased():
    image = photo()
    low = degrade(image, 4)
    pixels = Image.fromarray(((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8))
    wanted = np.asarray(pixels.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(((low.permute(1, 2, 0) + 1) * 127.5).round(), wanted)
    torchs = F.interpolate(image[None], (16, 16), mode="bicubic", antialias=True)[0]
    assert (low - torchs).abs().max() < 0.02  # of 2: rounding, and another cubic
    assert torch.equal(low, degrade(image, 4, "any", "seed"))
    assert torch.equal(degrade(image, 1), image)
    assert degrade(image[:, :32], 2).shape == (3, 16, 32)


def test_bsr_is_fixed_by_its_seed_and_stays_recognisable():
    image = photo()
    lows = [degrade(image, 4, 3, p, degradation="bsr") for p in range(40)]
    np.random.seed(5), torch.manual_seed(5)
    assert all(torch.equal(lows[p], degrade(image, 4, 3, p, degradation="bsr")) for p in (39, 7, 0))
    assert not torch.equal(lows[0], lows[1]) and not torch.equal(lows[0], degrade(image, 4, 4, 0, degradation="bsr"))
    clean = degrade(image, 4)
    for low in lows:
        assert low.shape == (3, 16, 16) and low.dtype == torch.float32 and -1 <= low.min() < low.max() <= 1
        assert torch.equal(((low + 1) * 127.5).round() / 127.5 - 1, low), "256 levels"
    quality = [psnr(low, clean) for low in lows]
    assert 17 < min(quality) and max(quality) < 40 and 3 < max(quality) - min(quality)
    colors = torch.tensor([-0.5, 0.1, 0.6]).view(3, 1, 1)
    flat = torch.stack([degrade(colors.expand(3, 64, 64), 4, p, degradation="bsr") for p in range(60)]) - colors
    assert flat.mean((0, 2, 3)).abs().max() < 0.02, "without bias, but for the rounding of colors in JPEG"
    assert 0.5 / 127.5 < flat.std((0, 2, 3)).mean() < 6 / 127.5, "noisy"
    assert degrade(image, 2, 0, degradation="bsr").shape == (3, 32, 32) and degrade(
        image, 8, 0, degradation="bsr"
    ).shape == (3, 8, 8)


def test_blur_is_the_gaussian_of_its_covariance():
    point = np.zeros((41, 61, 1), np.float32)
    point[20, 30] = 1
    covariance = np.array([[6.0, 2.0], [2.0, 3.0]])
    y, x = np.mgrid[-20:21, -30:31]
    inverse = np.linalg.inv(covariance)
    density = np.exp(-0.5 * (inverse[0, 0] * x * x + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y * y))
    density /= 2 * math.pi * math.sqrt(np.linalg.det(covariance))
    got = tasks.gaussian_blur(point, covariance)[..., 0]
    assert abs(got - density).max() < 1e-3 * density.max() and got[22, 33] > 2 * got[22, 27], "turned the right way"
    flat = tasks.gaussian_blur(np.full((9, 7, 3), 100.0), covariance)
    assert flat.shape == (9, 7, 3) and abs(flat - 100).max() < 1e-3, "no dark border"


def test_degrade_refuses():
    with pytest.raises(AssertionError, match="64 x 64 cannot be divided by 3"):
        degrade(photo(), 3)
    with pytest.raises(AssertionError, match="degradation 'blur': choose bicubic or bsr"):
        degrade(photo(), 4, degradation="blur")


@pytest.mark.parametrize("schedule, ends", [(None, (1e-4, 0.02)), (("linear", 1e-3, 0.03), (1e-3, 0.03))])
def test_augment_low_is_ddpms_noise(schedule, ends):
    """Level l is step l of the table, counted from 0 (Ho et al. 2020, eq. 4): level 0 has some noise already."""
    kept = (1 - torch.linspace(*ends, 1000, dtype=torch.float64)).cumprod(0)
    low, eps, level = torch.rand(4, 3, 2, 2).double(), torch.randn(4, 3, 2, 2).double(), torch.tensor([0, 1, 350, 999])
    share = kept[level].view(-1, 1, 1, 1)
    found = tasks.augment_low(low, level, eps, schedule)
    torch.testing.assert_close(found, share.sqrt() * low + (1 - share).sqrt() * eps, rtol=1e-5, atol=1e-6)


# -- layouts


def test_layout_of_objects_biggest_first():
    objects = [("cat", 0, 0, 0.1, 0.1), ("big dog", 0.25, 0.1, 1.0, 0.4444), ("bird", 0.5, 0.5, 0.75, 0.75)]
    text = "big dog 0.250 0.100 1.000 0.444; bird 0.500 0.500 0.750 0.750; cat 0.000 0.000 0.100 0.100"
    assert layout_string(objects) == text and layout_string([]) == "" and objects[0][0] == "cat", "left as it was"
    assert layout_string(objects, ["cat", "bird"]) == text.partition("; ")[2]
    parsed = LayoutTokenizer(["bird", "big dog", "cat"]).parse(text)
    assert parsed == [(o[0], *(round(v, 3) for v in o[1:])) for o in (objects[1], objects[2], objects[0])]


# -- items with their condition


def check(task, p, condition, image):
    """One condition against the image (3,S,S) that belongs to it."""
    if task == "inpaint":
        assert condition.keys() == {"image", "mask"} and torch.equal(condition["image"], image)
        assert torch.equal(condition["mask"], random_mask((16, 16), 9, "inpaint", p))
    elif task == "sr":
        assert condition.keys() == {"low"}
        assert torch.equal(condition["low"], degrade(image, 2, 9, "sr", p, degradation="bsr"))
    elif task == "semantic":
        assert condition.keys() == {"map"} and condition["map"].dtype == torch.int64
        painted = torch.from_numpy(COLORS[condition["map"].numpy()]).permute(2, 0, 1) / 127.5 - 1
        assert ((painted - image).abs().amax(0) < 0.8).float().mean() > 0.85, "but for edges, which resizing blurs"
    else:
        assert condition == {}


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("task", TASKS)
def test_condition_of_a_stream(scenes, task, crop):
    stream = Stream(scenes, 4, crop=crop, flip=True)
    made = with_condition(stream, task, 9, scale=2)
    flips = set()
    for p in (0, 3, 17, 40, 41, 59):
        item, plain = made[p], stream[p]
        flips.add(item["flip"])
        check(task, p, item["condition"], plain["image"])
        changed = {"text"} if task == "layout" else set()
        assert all(same(item[name], plain[name]) for name in plain.keys() - changed)
        if task == "layout":
            boxes = LayoutTokenizer(scenes.object_classes).parse(item["text"])
            bright = (plain["image"].amax(0) > 0).nonzero()
            assert len(boxes) <= 1 and (boxes or len(bright) < 20)
            for name, *corners in boxes:
                (top, left), (bottom, right) = bright.min(0)[0].tolist(), bright.max(0)[0].tolist()
                assert [16 * v for v in corners] == pytest.approx([left, top, right + 1, bottom + 1], abs=1.01)
                channel = plain["image"][:, bright[:, 0], bright[:, 1]].mean(1).argmax().item()
                assert name == ["red", "green", "blue"][channel]
        assert same(item, with_condition(stream, task, 9, scale=2)[p])
    assert flips == {True, False}


@pytest.mark.parametrize("train", [True, False])
def test_condition_of_cached_latents_is_that_of_the_pixels(scenes, train, first_stage, tmp_path):
    stream = Stream(scenes, 4, flip=True, train=train)
    cache = cached(stream, first_stage, tmp_path / "cache")
    for task in TASKS:
        of_pixels, of_cache = with_condition(stream, task, 9, scale=2), with_condition(cache, task, 9, scale=2)
        for p in range(0, 40, 3):
            a, b = of_pixels[p], of_cache[p]
            assert same(a["condition"], b["condition"]) and a["text"] == b["text"] and a["index"] == b["index"]
            assert torch.equal(b["image"], cache[p]["image"]) and b["image"].dtype == torch.float16
            check(task, p, b["condition"], scenes.pixels(b["index"], flip=b["flip"]))
        batch = collate([of_cache[p] for p in range(5)])
        assert batch["image"].shape == (5, 2, 4, 8, 8) and batch["condition"].keys() == a["condition"].keys()
        sides = {"image": (5, 3, 16, 16), "mask": (5, 1, 16, 16), "low": (5, 3, 8, 8), "map": (5, 16, 16)}
        assert all(value.shape == sides[name] for name, value in batch["condition"].items())


def test_conditions_do_not_depend_on_workers_or_order(scenes):
    made = with_condition(Stream(scenes, 4, flip=True), "inpaint", 9)
    plain, with_workers = (list(loader(made, 2, 5, 4, workers=workers)) for workers in (0, 2))
    assert len(plain) == 3 and all(same(a, b) for a, b in zip(plain, with_workers, strict=True))
    split = [next(loader(made, 2, 3, 2, rank=rank, world=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([part["condition"]["mask"] for part in split]), plain[0]["condition"]["mask"])
    masks = torch.cat([batch["condition"]["mask"] for batch in plain])
    assert len({mask.numpy().tobytes() for mask in masks}) > 9
    other = with_condition(made.stream, "inpaint", 10)
    assert not torch.equal(other[8]["condition"]["mask"], made[8]["condition"]["mask"])


@pytest.mark.parametrize("task", ["semantic", "inpaint", "layout"])
def test_an_item_whose_condition_does_not_read_is_replaced(scenes, task, first_stage, tmp_path):
    stream = Stream(scenes, 4, flip=True)
    source = cached(stream, first_stage, tmp_path / "cache") if task == "inpaint" else stream
    made, path = with_condition(source, task, 9), tmp_path / "scenes"
    if task == "inpaint":  # its latents are there, its pixels are gone
        os.remove(path / "05.png")
    elif task == "semantic":
        (path / "05.map.png").write_bytes(b"no")
    else:
        lines = (path / "metadata.jsonl").read_text().splitlines(True)
        lines[5] = lines[5].replace('"bbox"', '"bxbb"')  # as long: the index holds
        (path / "metadata.jsonl").write_text("".join(lines))
    items = [made[p] for p in range(20)]
    at = next(p for p in range(20) if scenes.key(stream.item(p)[0]) == "05.png")
    assert [bool(item["bad"]) for item in items] == [p == at for p in range(20)]
    assert items[at]["bad"][0].startswith("05.png: ") and items[at]["key"] != "05.png"
    assert same(items[at], made[at]), "always by the same one"
    assert collate(items)["bad"] == items[at]["bad"]


def test_a_class_that_has_no_name_is_not_taken_for_unknown(scenes, tmp_path):
    (tmp_path / "scenes/map_classes.json").write_text('["nothing", "red", "green"]')
    fewer = with_condition(Stream(Dataset(tmp_path / "scenes", "all", 16), 4), "semantic", 9)
    items = [fewer[p] for p in range(20)]
    assert max(item["condition"]["map"].max() for item in items) == 2
    bad = [line for item in items for line in item["bad"]]
    assert len(bad) > 4 and all("class 3 of its map is not among 3: name all in map_classes.json" in b for b in bad)


def test_what_the_data_do_not_have_is_refused_at_once(small_data, scenes):
    stream = Stream(Dataset(small_data, "train", 16), 0)
    for task, message in (
        ("semantic", "has no semantic maps; add KEY.map.png"),
        ("layout", "has no objects; give"),
    ):
        with pytest.raises(UserError, match=message):
            with_condition(stream, task, 0)
    with pytest.raises(UserError, match="image_size=16: cannot be divided by a scale of 5"):
        with_condition(stream, "sr", 0, scale=5)
    for task, options, message in (
        ("colorize", {}, "task 'colorize'"),
        ("sr", dict(degradation="x"), "degradation 'x'"),
    ):
        with pytest.raises(AssertionError, match=message):
            with_condition(stream, task, 0, **options)
    for name in os.listdir(scenes.path):
        if name.endswith(".map.png") and name != "00.map.png":
            os.remove(f"{scenes.path}/{name}")
    os.rename(f"{scenes.path}/00.map.png", f"{scenes.path}/00.map")
    with pytest.raises(UserError, match="has no semantic maps"):
        with_condition(Stream(Dataset(scenes.path, "all", 16), 0), "semantic", 0)
