"""Conditions: masks, degraded images, maps, layouts, each fixed by its position."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_data import encoded, lines, put, same

from checkpoint import UserError
from data import cache as cache_files
from data import tasks
from data.cache import LatentCache
from data.dataset import Dataset, Stream, collate, loader
from data.tasks import WithCondition, degrade, layout_string, random_mask
from text import LayoutTokenizer
from vae import VAE

COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)  # class -> color
NAMES = ["nothing", "red", "green", "blue"]
TASKS = ("none", "inpaint", "sr", "semantic", "layout")


def with_condition(stream, task, seed=9, **options):
    """WithCondition; "layout" stands for no task, and all its classes' boxes as text."""
    if task == "layout":
        task, options["layout"] = "none", stream.dataset.object_classes
    return WithCondition(stream, task, seed, **options)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache_files, "SHARD", 8)


@pytest.fixture
def scenes(tmp_path):
    """Images of a folder, whose maps are their colors: black, with one red, green or blue rectangle."""
    rng, records, files = np.random.default_rng(0), [], {"map_classes.json": NAMES, "object_classes.json": NAMES}
    for i in range(20):
        classes, number = np.zeros((16, 24), np.uint8), 1 + i % 3
        x, y, w, h = (int(rng.integers(low, high)) for low, high in ((4, 11), (0, 8), (2, 9), (3, 9)))
        classes[y : y + h, x : x + w] = number
        files |= {f"{i:02d}.png": encoded(COLORS[classes]), f"{i:02d}.map.png": encoded(classes)}
        objects = {"bbox": [[x, y, w, h]], "categories": [number]}
        records.append({"file_name": f"{i:02d}.png", "text": f"image {i}", "objects": objects})
    return Dataset(put(tmp_path / "scenes", files | {"metadata.jsonl": lines(records)}), "all", 16)


def cached(stream, first_stage):
    vae = VAE.from_pretrained(str(first_stage))
    cache = LatentCache(stream, vae, "cache")
    cache.build(vae, torch.device("cpu"), contextlib.nullcontext(), 0, 0, 1)
    return cache


# -- masks


@pytest.mark.parametrize("sides", [(1, 1), (4, 9), (8, 8), (16, 200)])
def test_masks_depend_on_their_seed_alone(sides):
    masks = [random_mask(sides, 1, "train", p) for p in range(200)]
    np.random.seed(5), torch.manual_seed(5)
    assert all(torch.equal(masks[p], random_mask(sides, 1, "train", p)) for p in (199, 7, 0))
    for mask in masks:
        assert mask.shape == (1, *sides) and mask.dtype == torch.float32 and mask.any()
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert sides == (1, 1) or 0 < sum(bool(mask.all()) for mask in masks) < 100
    assert sides[1] < 200 or len({mask.numpy().tobytes() for mask in masks}) > 180, "different, but for those of all"


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
    is_frame = (known == rows[:, :, None] * columns[:, None, :]).all((1, 2))
    is_frame &= (rows == 0).any(1) | (columns == 0).any(1)
    assert is_frame.float().mean() == pytest.approx(0.2 / 0.95, abs=0.03), "border: what is known is one rectangle"
    assert all((edge[is_frame][:, k] == 0).any() for edge in (rows, columns) for k in (0, -1)), "beyond any side"
    for p in range(100):  # the same one in a larger image, drawn finer: half the pixels of the outline may differ
        small = F.interpolate(masks[p][None, None], scale_factor=4)[0]
        assert (small - random_mask((256, 256), "cover", p)).abs().mean() < 0.08


# -- degradation


def photo(size=64):
    """A smooth image with edges, (3,H,W) in [-1,1], of 256 levels."""
    y, x = np.mgrid[0:size, 0:size] / size
    image = np.stack([x, y, 0.5 + 0.4 * np.sin(9 * x + 5 * y)], -1)
    image[(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.05] = (0.9, 0.2, 0.1)
    return torch.from_numpy((image * 255).round().astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


def levels(image):
    return ((image + 1) * 127.5).round()


def test_bicubic_is_pillows_and_antialiased():
    image = photo()
    low = degrade(image, 4)
    pixels = Image.fromarray(levels(image).permute(1, 2, 0).numpy().astype(np.uint8))
    assert np.array_equal(levels(low).permute(1, 2, 0), pixels.resize((16, 16), Image.Resampling.BICUBIC))
    torchs = F.interpolate(image[None], (16, 16), mode="bicubic", antialias=True)[0]
    assert (low - torchs).abs().max() < 0.02  # of 2: rounding, and another cubic
    assert torch.equal(low, degrade(image, 4, "any", "seed")) and torch.equal(degrade(image, 1), image)


def test_bsr_is_fixed_by_its_seed_and_stays_recognisable():
    image, clean = photo(), degrade(photo(), 4)
    lows = [degrade(image, 4, 3, p, degradation="bsr") for p in range(40)]
    np.random.seed(5), torch.manual_seed(5)
    assert all(torch.equal(lows[p], degrade(image, 4, 3, p, degradation="bsr")) for p in (39, 7, 0))
    assert not torch.equal(lows[0], lows[1]) and not torch.equal(lows[0], degrade(image, 4, 4, 0, degradation="bsr"))
    for low in lows:
        assert low.shape == (3, 16, 16) and low.dtype == torch.float32 and -1 <= low.min() < low.max() <= 1
        assert torch.equal(levels(low) / 127.5 - 1, low), "256 levels"
    psnr = [-10 * math.log10(((low - clean) / 2).square().mean()) for low in lows]
    assert 17 < min(psnr) and max(psnr) < 40 and 3 < max(psnr) - min(psnr)
    colors = torch.tensor([-0.5, 0.1, 0.6]).view(3, 1, 1)
    flat = torch.stack([degrade(colors.expand(3, 64, 64), 4, p, degradation="bsr") for p in range(60)]) - colors
    assert flat.mean((0, 2, 3)).abs().max() < 0.02, "without bias, but for the rounding of colors in JPEG"
    assert 0.5 / 127.5 < flat.std((0, 2, 3)).mean() < 6 / 127.5, "noisy"
    assert degrade(image[:, :32], 8, 0, degradation="bsr").shape == (3, 4, 8)


def test_gray_is_made_small_as_rgb_is():
    gray = photo()[:1]
    assert torch.equal(degrade(gray, 4), degrade(gray.expand(3, 64, 64), 4)[:1])
    low = degrade(gray, 4, 3, degradation="bsr")
    colors = levels(degrade(gray.expand(3, 64, 64), 4, 3, degradation="bsr"))
    luma = (colors * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    assert low.shape == (1, 16, 16) and (levels(low)[0] - luma).abs().max() <= 1


def test_blur_is_the_gaussian_of_its_covariance():
    point, covariance = np.zeros((41, 61, 1), np.float32), np.array([[6.0, 2.0], [2.0, 3.0]])
    point[20, 30] = 1
    y, x = np.mgrid[-20:21, -30:31]
    (xx, xy), (_, yy) = np.linalg.inv(covariance)
    density = np.exp(-0.5 * (xx * x * x + 2 * xy * x * y + yy * y * y))
    density /= 2 * math.pi * math.sqrt(np.linalg.det(covariance))
    got = tasks.gaussian_blur(point, covariance)[..., 0]
    assert abs(got - density).max() < 1e-3 * density.max() and got[22, 33] > 2 * got[22, 27], "turned the right way"
    flat = tasks.gaussian_blur(np.full((9, 7, 3), 100.0), covariance)
    assert flat.shape == (9, 7, 3) and abs(flat - 100).max() < 1e-3, "no dark border"


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


# -- items with their condition


def check(task, p, item, image):
    """The condition of an item against the image (3,S,S) that belongs to it."""
    condition = item["condition"]
    if task == "inpaint":
        assert condition.keys() == {"image", "mask"} and torch.equal(condition["image"], image)
        assert torch.equal(condition["mask"], random_mask((16, 16), 9, "inpaint", p))
    elif task == "sr":
        assert condition.keys() == {"low"}
        assert torch.equal(condition["low"], degrade(image, 2, 9, "sr", p, degradation="bsr"))
    elif task == "semantic":
        assert condition.keys() == {"map"} and condition["map"].dtype == torch.int64
        colored = torch.from_numpy(COLORS[condition["map"].numpy()]).permute(2, 0, 1) / 127.5 - 1
        assert ((colored - image).abs().amax(0) < 0.8).float().mean() > 0.85, "but for edges, which resizing blurs"
    else:
        assert condition == {}
    if task == "layout":
        boxes = LayoutTokenizer(NAMES).parse(item["text"])
        bright = (image.amax(0) > 0).nonzero()
        assert len(boxes) <= 1 and (boxes or len(bright) < 20)
        for name, *corners in boxes:
            (top, left), (bottom, right) = bright.min(0)[0].tolist(), bright.max(0)[0].tolist()
            assert [16 * v for v in corners] == pytest.approx([left, top, right + 1, bottom + 1], abs=1.01)
            assert name == NAMES[1 + image[:, bright[:, 0], bright[:, 1]].mean(1).argmax()]


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("task", TASKS)
def test_condition_of_a_stream(scenes, task, crop):
    stream = Stream(scenes, 4, crop=crop, flip=True)
    made, flips = with_condition(stream, task, scale=2), set()
    for p in (0, 3, 17, 40, 41, 59):
        item, plain = made[p], stream[p]
        flips.add(item["flip"])
        check(task, p, item, plain["image"])
        unchanged = plain.keys() - ({"text"} if task == "layout" else set())
        assert all(same(item[name], plain[name]) for name in unchanged)
        assert same(item, with_condition(stream, task, scale=2)[p])
    assert flips == {True, False}
    parts = [next(loader(made, 2, 3, 2, rank=rank, world=2)) for rank in (0, 1)]
    for name, value in next(loader(made, 2, 3, 4))["condition"].items():
        assert torch.equal(torch.cat([part["condition"][name] for part in parts]), value), "the same on two ranks"


def test_condition_of_cached_latents_is_that_of_the_pixels(scenes, first_stage):
    stream = Stream(scenes, 4, flip=True)
    cache = cached(stream, first_stage)
    for task in TASKS:
        of_pixels, of_cache = with_condition(stream, task, scale=2), with_condition(cache, task, scale=2)
        for p in range(0, 40, 3):
            a, b = of_pixels[p], of_cache[p]
            assert torch.equal(b.pop("image"), cache[p]["image"]) and same(b, {name: a[name] for name in b})
        batch = collate([of_cache[p] for p in range(5)])
        assert batch["image"].shape == (5, 2, 4, 8, 8) and batch["condition"].keys() == a["condition"].keys()
        sides = {"image": (5, 3, 16, 16), "mask": (5, 1, 16, 16), "low": (5, 3, 8, 8), "map": (5, 16, 16)}
        assert all(value.shape == sides[name] for name, value in batch["condition"].items())


@pytest.mark.parametrize("task", ["semantic", "inpaint"])
def test_an_item_whose_condition_does_not_read_is_replaced(scenes, task, first_stage, tmp_path):
    path, stream = tmp_path / "scenes", Stream(scenes, 4, flip=True)
    made = with_condition(cached(stream, first_stage) if task == "inpaint" else stream, task)
    if task == "inpaint":  # its latents are there, its pixels are gone
        (path / "05.png").unlink()
    else:
        (path / "05.map.png").write_bytes(b"no")
    items = [made[p] for p in range(20)]
    at = next(p for p in range(20) if scenes.key(stream.item(p)[0]) == "05.png")
    assert [bool(item["bad"]) for item in items] == [p == at for p in range(20)]
    assert items[at]["bad"][0].startswith("05.png: ") and items[at]["key"] != "05.png"
    assert same(items[at], made[at]), "always by the same one"


def test_a_class_that_has_no_name_is_not_taken_for_unknown(scenes, tmp_path):
    (tmp_path / "scenes/map_classes.json").write_text(json.dumps(NAMES[:3]))
    fewer = with_condition(Stream(Dataset(tmp_path / "scenes", "all", 16), 4), "semantic")
    items = [fewer[p] for p in range(20)]
    assert max(item["condition"]["map"].max() for item in items) == 2
    bad = [line for item in items for line in item["bad"]]
    assert len(bad) > 4 and all("class 3 of its map is not among 3: name all in map_classes.json" in b for b in bad)
    stream, tried = fewer.stream, []

    class Replacing:
        """A stream in which each item stands for another whose image is bad."""

        def span(self, p):
            return stream.span(p)

        def __getitem__(self, p):
            tried.append(f"{p}.png: no image")
            return stream[p] | {"bad": tried[-1:]}

    fewer.stream = Replacing()
    twice = next(item["bad"] for item in (fewer[p] for p in range(20)) if len(item["bad"]) > 1)
    assert len(twice) % 2 and [line for line in twice if "no image" in line] == tried[-(len(twice) + 1) // 2 :]


def test_what_is_refused(small_data):
    stream = Stream(Dataset(small_data, "train", 16), 0)
    rgba = Stream(Dataset(small_data, "train", 16, image_mode="RGBA"), 0)
    for make, error, message in (
        (lambda: with_condition(stream, "semantic"), UserError, "has no semantic maps; add KEY.map.png"),
        (lambda: WithCondition(stream, "none", 0, layout=[]), UserError, "has no objects; give"),
        (lambda: with_condition(stream, "sr", scale=5), UserError, "image_size=16: cannot be divided by a scale of 5"),
        (lambda: with_condition(rgba, "sr"), UserError, "task=sr: has no alpha"),
        (lambda: with_condition(stream, "colorize"), AssertionError, "task 'colorize'"),
        (lambda: with_condition(stream, "sr", degradation="x"), AssertionError, "degradation 'x'"),
        (lambda: degrade(photo(), 3), AssertionError, "64 x 64 cannot be divided by 3"),
        (lambda: degrade(photo(), 4, degradation="x"), AssertionError, "degradation 'x': choose bicubic or bsr"),
    ):
        with pytest.raises(error, match=message):
            make()
