"""Conditions of image-conditioned denoisers, made from the data: inpainting, super-resolution, semantic maps, layouts.

    random_mask    a region to fill in: strokes, boxes, or all beyond a border
    degrade        a small image of lower quality, for super-resolution
    layout_string  objects as text, for text.LayoutTokenizer
    WithCondition  a Stream or LatentCache whose items have their condition

All are pure functions of the seed, and in WithCondition of (seed, task, position): see data/dataset.py.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from checkpoint import reject
from data.cache import LatentCache
from data.dataset import BadImage, first_good, seed_of, to_tensor
from diffusion import make_schedule
from grid import to_pil

TASKS = ("none", "inpaint", "sr", "semantic")
DEGRADATIONS = ("bicubic", "bsr")


def random_mask(sides, *seed):
    """Mask (1,H,W) float32, 1 where to fill in; sides are (H, W), seed any numbers and strings.

    Half of the masks are strokes, a quarter boxes, a fifth border (beyond one side or more, up to a frame), one in
    twenty everything. They are wide, as LaMa's are (Suvorov et al. 2022, arXiv 2109.07161): on average 0.39 of the
    image, in eight masks of ten 0.12 to 0.7, and never nothing.
    """
    height, width = sides
    rng = np.random.default_rng(seed_of("mask", *seed))
    side, shape = min(height, width), rng.random()
    image = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(image)
    if shape < 0.5:  # strokes
        for _ in range(rng.integers(1, 6)):
            x, y, angle = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, 2 * math.pi)
            radius = max(side * rng.uniform(0.03, 0.18), 0.5)
            points = [(x, y)]
            for _ in range(rng.integers(1, 6)):
                angle += rng.normal(0, 1)
                length = side * rng.uniform(0.05, 0.6)
                x, y = x + length * math.cos(angle), y + length * math.sin(angle)
                x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)  # along the border, not beyond it
                points.append((x, y))
            pen.line(points, 1, width=max(round(2 * radius), 1))
            for x, y in points:  # round joints and ends
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), 1)
    elif shape < 0.75:  # boxes
        for _ in range(rng.integers(1, 5)):
            w, h = (max(round(v), 1) for v in side * rng.uniform(0.12, 0.6, 2))
            x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            pen.rectangle((int(x), int(y), int(x + w - 1), int(y + h - 1)), 1)
    elif shape < 0.95:  # border
        beyond = rng.random(4) < 0.4  # left, top, right, bottom
        beyond[rng.integers(4)] = True
        share = rng.uniform(0.1, 0.75 if beyond.sum() == 1 else 0.4, 4) * beyond
        left, top, right, bottom = np.maximum(np.round(share * (width, height, width, height)), beyond).tolist()
        pen.rectangle((0, 0, width, height), 1)
        if left < width - right and top < height - bottom:
            pen.rectangle((left, top, width - right - 1, height - bottom - 1), 0)
    else:
        pen.rectangle((0, 0, width, height), 1)
    return torch.from_numpy(np.array(image, dtype=np.float32))[None]


# --- degradation ---


def gaussian_blur(image, covariance):
    """Any Gaussian, by its spectrum; image (H,W,C), covariance (2,2) in squared pixels of (x, y), borders mirrored."""
    pad = math.ceil(3 * math.sqrt(np.linalg.eigvalsh(covariance).max()))
    x = np.pad(image.astype(np.float32), ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
    fx, fy = np.fft.rfftfreq(x.shape[1]), np.fft.fftfreq(x.shape[0])[:, None]
    (xx, xy), (_, yy) = covariance
    response = np.exp(-2 * math.pi**2 * (xx * fx**2 + 2 * xy * fx * fy + yy * fy**2)).astype(np.float32)
    x = np.fft.irfft2(np.fft.rfft2(x, axes=(0, 1)) * response[..., None], s=x.shape[:2], axes=(0, 1))
    return x[pad : pad + image.shape[0], pad : pad + image.shape[1]]


def degrade(image, scale, *seed, degradation="bicubic"):
    """(C,H,W) in [-1,1] -> (C,H/scale,W/scale), C 1 or 3, in 256 levels as images from files have; seed as in
    random_mask.

    "bicubic": antialiased, nothing random. "bsr": two blurs, a resize, noise and JPEG in random order, then JPEG, after
    BSRGAN (Zhang et al. 2021, arXiv 2103.14006, section 3) but lightly, so that what is there can still be recognized:
    an isotropic Gaussian of 0.1 to 0.7 pixels and another of 0.1 to 1.4 along two rotated axes (at scale 4, else
    in proportion), noise of 1 to 6 of 255, gray or colored, JPEG of quality 70 to 95.
    """
    height, width = image.shape[-2:]
    assert degradation in DEGRADATIONS, f"degradation {degradation!r}: choose {' or '.join(DEGRADATIONS)}"
    assert not height % scale and not width % scale, f"an image of {height} x {width} cannot be divided by {scale}"
    small = width // scale, height // scale
    image = to_pil(image)
    if degradation == "bicubic":
        return to_tensor(image.resize(small, Image.Resampling.BICUBIC))
    pixels = np.asarray(image.convert("RGB"))
    rng = np.random.default_rng(seed_of("degrade", *seed))

    def to_bytes(x):
        return np.clip(np.round(x), 0, 255).astype(np.uint8)

    def blur(x, sigmas, angle=0.0):
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return to_bytes(gaussian_blur(x, turn @ np.diag(np.square(sigmas) * (scale / 4) ** 2) @ turn.T))

    def isotropic(x):
        return blur(x, [rng.uniform(0.1, 0.7)] * 2)

    def anisotropic(x):
        return blur(x, rng.uniform(0.1, 1.4, 2), rng.uniform(0, math.pi))

    def resize(x):
        x, filters = Image.fromarray(x), (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)
        first, second = (filters[k] for k in rng.integers(0, 3, 2))
        if rng.random() < 0.25:  # by way of another size
            share = rng.uniform(1 / scale, 1)
            x = x.resize((round(share * width), round(share * height)), first)
        return np.asarray(x.resize(small, second))

    def noise(x):
        channels = 1 if rng.random() < 0.5 else 3
        return to_bytes(x + rng.uniform(1, 6) * rng.standard_normal((*x.shape[:2], channels)))

    def jpeg(x):
        file = io.BytesIO()
        Image.fromarray(x).save(file, "JPEG", quality=int(rng.integers(70, 96)))
        return np.asarray(Image.open(file))

    steps = [isotropic, anisotropic, resize, noise, jpeg]
    for k in rng.permutation(len(steps)):
        pixels = steps[k](pixels)
    return to_tensor(Image.fromarray(jpeg(pixels)).convert(image.mode))


# --- layout ---


def layout_string(objects, classes=None):
    """Objects (name, x0, y0, x1, y1) of Dataset.boxes -> "red circle 0.10 0.20 0.50 0.60; ...", the largest first.

    With classes, objects of others are left out: validation may have some that the tokenizer does not know.
    """
    objects = [o for o in objects if classes is None or o[0] in classes]
    objects.sort(key=lambda o: -(o[3] - o[1]) * (o[4] - o[2]))
    return "; ".join(f"{name} {x0:.3f} {y0:.3f} {x1:.3f} {y1:.3f}" for name, x0, y0, x1, y1 in objects)


# --- input channels of the denoiser ---


def image_condition(task, vae, inputs, sides, map_classes=0):
    """`concat` of Denoiser.condition for a task; vae is None in pixel space, sides (h, w) are the latents'.

    inpaint   inputs["image"] (B,C,H,W) in [-1,1], inputs["mask"] (B,1,H,W), 1 where to fill in -> mask and masked
              latents, in Stable Diffusion's order (B,1+C,h,w)
    sr        inputs["low"] (B,C,H/scale,W/scale) -> folded, or enlarged, to the latents' side (B,C or more,h,w)
    semantic  inputs["map"] (B,H,W) int64, -1 unknown -> one-hot (B,map_classes,H,W)
    """
    if task == "inpaint":
        mask = (inputs["mask"] > 0.5).to(inputs["image"].dtype)
        known = inputs["image"] * (1 - mask)
        known = known if vae is None else vae.normalize(vae.encode(known).mode())
        return torch.cat([F.interpolate(mask, sides, mode="nearest"), known], dim=1)
    if task == "sr":
        low = inputs["low"]
        fold = low.shape[-1] // sides[1]
        return F.pixel_unshuffle(low, fold) if fold > 1 else F.interpolate(low, sides, mode="bilinear")
    return (inputs["map"][:, None] == torch.arange(map_classes, device=inputs["map"].device).view(-1, 1, 1)).float()


def show_condition(task, inputs, sides):
    """One example's condition as an image (C,*sides): with a gray hole, enlarged, or with a color for each class."""
    if task == "inpaint":
        return inputs["image"] * (inputs["mask"] < 0.5)
    if task == "sr":
        return F.interpolate(inputs["low"][None], sides, mode="nearest")[0]
    colors = 2 * torch.rand(257, 3, generator=torch.Generator().manual_seed(0)) - 1
    return colors[inputs["map"]].permute(2, 0, 1)


def augment_low(low, level, eps, schedule=None):
    """Noise on a low-resolution image, as Stable Diffusion's x4 upscaler has it: level (B,) counts in 0..999.

    The level is the network's y, so it knows what to trust (Ho et al. 2021, arXiv 2106.15282, section 4.2).
    schedule: arguments of make_schedule, None is ("linear", 1e-4, 0.02); the upscaler's own is scaled_linear.
    """
    schedule = make_schedule(*(schedule or ("linear", 1e-4, 0.02)))
    t = ((level + 1) / schedule.discrete).to(low.dtype).view(-1, 1, 1, 1)
    return schedule.alpha(t) * low + schedule.sigma(t) * eps


# --- items with their condition ---


def check_task(dataset, task, scale=4, degradation="bsr", layout=False):
    """Rejects a Dataset that lacks what a task, or a layout, needs."""
    assert task in TASKS, f"task {task!r}: choose one of {', '.join(TASKS)}"
    assert degradation in DEGRADATIONS, f"degradation {degradation!r}: choose {' or '.join(DEGRADATIONS)}"
    for side in dataset.sides if task == "sr" else ():
        if side % scale:
            reject(f"image_size={side}", f"cannot be divided by a scale of {scale}", "set another scale or size")
    if task == "sr" and dataset.image_mode == "RGBA":
        reject("task=sr", "has no alpha (JPEG has none)", "set --image_mode=RGB")
    if task == "semantic" and not (dataset.counts["maps"] and dataset.map_classes):
        reject(f"dataset {dataset.path}", "has no semantic maps", "add KEY.map.png, maps.npy or a column 'map'")
    if layout and not dataset.counts["objects"]:
        remedy = 'give "objects": {"bbox": ..., "categories": ...} in JSON'
        reject(f"dataset {dataset.path}", "has no objects", remedy)


class WithCondition(torch.utils.data.Dataset):
    """[p] -> stream[p] and "condition", a dict of tensors, from the same crop and flip; stream is a Stream or
    LatentCache.

        none      {}
        inpaint   {"image": (C,H,W), "mask": (1,H,W)}
        sr        {"low": (C,H/scale,W/scale)}
        semantic  {"map": (H,W) int64, -1 unknown}

    With `layout`, names of object classes, text is the item's layout in objects of those. scale, degradation: of sr.
    Masks and degradations depend on (seed, task, p) only, so validation has the same ones each time. An item whose
    condition does not read is reported in bad and replaced by that of another position, a function of (seed, p).
    """

    def __init__(self, stream, task, seed, scale=4, degradation="bsr", layout=None):
        check_task(stream.dataset, task, scale, degradation, layout is not None)
        self.stream, self.dataset, self.task, self.seed = stream, stream.dataset, task, seed
        self.scale, self.degradation = scale, degradation
        self.layout = None if layout is None else frozenset(layout)
        self.has_latents = isinstance(stream, LatentCache)

    def condition(self, p, item):
        """The fields added to an item of position p; raises BadImage."""
        dataset, index, flip, fields, condition = self.dataset, item["index"], item["flip"], {}, {}
        crop = {} if item["u"] is None else dict(crop="random", u=item["u"])
        if self.layout is not None:
            fields["text"] = layout_string(dataset.boxes(index, flip, **crop), self.layout)
        if self.task in ("inpaint", "sr"):
            image = dataset.pixels(index, flip=flip, **crop) if self.has_latents else item["image"]
        if self.task == "inpaint":
            condition = {"image": image, "mask": random_mask(image.shape[1:], self.seed, "inpaint", p)}
        elif self.task == "sr":
            low = degrade(image, self.scale, self.seed, "sr", p, degradation=self.degradation)
            condition = {"low": low}
        elif self.task == "semantic":
            condition = {"map": dataset.map(index, flip=flip, **crop)}
            if condition["map"].max() >= dataset.map_classes:
                count = f"class {condition['map'].max()} of its map is not among {dataset.map_classes}"
                raise BadImage(f"{item['key']}: {count}: name all in map_classes.json")
        return fields | {"condition": condition}

    def __getitem__(self, p):
        replaced, (first, count) = [], self.stream.span(p)  # replaced: bad images, of all attempts

        def read(attempt):
            at = first + seed_of(self.seed, "replace condition", p, attempt) % count if attempt else p
            item = self.stream[at]
            replaced.extend(item["bad"])
            return item | self.condition(at, item) | {"bad": []}

        item = first_good(read, self.dataset)
        return item | {"bad": replaced + item["bad"]}
