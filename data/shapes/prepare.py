"""Make a small captioned data set, "a small red star on a blue background", and score images sampled from its prompts.

    python data/shapes/prepare.py                        # seconds: images, captions, maps, boxes, tokenizer, prompts
    python data/shapes/prepare.py --n_train=2000         # fewer images
    python data/shapes/prepare.py --score=out/samples    # how many sampled images match their prompts

Image i of a split is a function of (seed, split, i) only. A tenth of the shape-color-background combinations is in
neither split, so that the prompt score on them tells composition from memorization. The judge is not learned: it
renders the image that it believes it sees, and compares. "color" is the shape's, "background" the other one.
"""

import functools
import itertools
import json
import math
import os
import re
import sys
import zlib

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import UserError, reject
from data.prepare import is_made, run, save, train_bpe
from grid import save_grid

n_train = 12000  # >= 1: images in out_dir/train
n_val = 1000  # >= 1: images in out_dir/val
size = 64  # >= 32: side of an image in pixels
seed = 0  # of the images and of the held-out combinations
vocab_size = 512  # >= 256: most tokens of the tokenizer; training stops earlier when each word is one token
out_dir = "data/shapes"  # where everything is written
score = ""  # a folder with samples.jsonl and its images; score these instead of making anything

# the corners of the RGB cube, a little inside: as far apart as eight colors can be
PALETTE = dict(red=(215, 40, 40), green=(40, 190, 60), blue=(45, 70, 215), yellow=(240, 215, 45))
PALETTE |= dict(cyan=(60, 205, 220), magenta=(210, 50, 210), black=(25, 25, 25), white=(240, 240, 240))
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring")
RADII = dict(small=0.26, large=0.39)  # half the extent of a shape, as a share of the image side
RADIUS_JITTER, BRIGHTNESS_JITTER = 0.04, 0.05  # relative, uniform, both ways
POSITION = 0.4  # largest offset from the center, as a share of the way to the border; 1 is much harder to learn
MARGIN = 2  # pixels at the border that are always background
N_PROMPTS = 256  # every fourth is a held-out combination

# --- captions ---

ATTRIBUTES = ("size", "color", "shape", "background")
COLOR = "|".join(PALETTE)
GRAMMAR = rf"a ({'|'.join(RADII)}) ({COLOR}) ({'|'.join(SHAPES)}) on a ({COLOR}) background"


def caption(size, color, shape, background):
    return f"a {size} {color} {shape} on a {background} background"


def parse(text):
    """The attributes in a caption, in any letter case; None if it is not a caption of this data set."""
    match = re.fullmatch(GRAMMAR, " ".join(text.lower().split()))
    return dict(zip(ATTRIBUTES, match.groups())) if match else None


@functools.cache
def held_out(seed=0):
    """The (shape, color, background) in neither split: 39 of 392, no color pair twice, every shape 5 or 6 times."""
    pairs = [(color, background) for color in PALETTE for background in PALETTE if color != background]
    rng = np.random.default_rng((seed, zlib.crc32(b"held out")))
    order = rng.permutation(len(pairs))[: len(SHAPES) * len(pairs) // 10]
    return frozenset((SHAPES[k % len(SHAPES)], *pairs[i]) for k, i in enumerate(order))


def is_held_out(shape, color, background, seed=0):
    return (shape, color, background) in held_out(seed)


@functools.cache
def combinations(seed=0):
    """Every (size, color, shape, background) that may occur in a split, in a fixed order."""
    every = itertools.product(RADII, PALETTE, SHAPES, PALETTE)
    return [(s, c, shape, b) for s, c, shape, b in every if c != b and not is_held_out(shape, c, b, seed)]


# --- rendering ---


def signed_distance(shape, x, y):
    """Distance to the outline of a shape that fills about [-1, 1]^2, negative inside; x points right and y down."""
    assert shape in SHAPES, shape
    x = abs(x)  # every shape is symmetric
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.77) - 0.23
    if shape == "square":
        return np.maximum(x, abs(y)) - 0.9
    if shape == "cross":
        return np.maximum(np.minimum(x, abs(y)) - 0.33, np.maximum(x, abs(y)) - 1)
    if shape == "triangle":  # equilateral, side 2
        h = 0.75**0.5
        return np.maximum(y - h, h * x - 0.5 * (y + h))
    if shape == "heart":  # a square on its corner, and a disc on each of its two upper sides
        h = 0.586
        y = y - 0.146 * h
        return np.minimum((x + abs(y)) / 2**0.5 - h, np.hypot(x - h / 2**0.5, y + h / 2**0.5) - h)
    y = y - 0.1  # star: turn each of the five tips into the first, halve it; one straight edge remains
    angle = np.arctan2(x, -y)
    angle = abs((angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    tip, notch = 1.05, 0.53  # distances from the middle; 0.4 would be the pentagram, too thin for a small star
    ex, ey = notch * math.cos(math.pi / 5) - tip, notch * math.sin(math.pi / 5)
    rho = np.hypot(x, y)
    return ((rho * np.cos(angle) - tip) * ey - rho * np.sin(angle) * ex) / math.hypot(ex, ey)


def render_mask(shape, cx, cy, radius, side):
    """Coverage in [0, 1] of each pixel by a shape; cx, cy, radius (N,) in pixels -> (N, side, side)."""
    cx, cy, radius = (np.asarray(a, dtype=np.float32).reshape(-1, 1, 1) for a in (cx, cy, radius))
    centers = np.arange(side, dtype=np.float32) + 0.5
    x, y = (centers - cx) / radius, (centers[:, None] - cy) / radius
    return np.clip(0.5 - radius * signed_distance(shape, x, y), 0, 1)


def make_split(split, n, side, seed):
    """images (n, side, side, 3), captions, labels, maps (n, side, side), boxes (n, 4) [x, y, w, h], their names.

    Image i depends on (seed, split, i) only. A map is 0 on the background and label + 1 where the shape covers more
    than half of the pixel; the box bounds these; its name is color and shape.
    """
    key = (seed, zlib.crc32(split.encode()))
    u = np.stack([np.random.default_rng((*key, i)).random(6, dtype=np.float32) for i in range(n)])  # (n, 6) in [0, 1)
    allowed = combinations(seed)
    scenes = [allowed[int(v * len(allowed))] for v in u[:, 0]]
    sizes, colors, shapes, backgrounds = zip(*scenes)
    signed = 2 * u - 1
    radius = side * np.array([RADII[name] for name in sizes]) * (1 + RADIUS_JITTER * signed[:, 1])
    cx, cy = (side / 2 + POSITION * signed[:, j] * (side / 2 - radius - MARGIN) for j in (2, 3))
    fg = np.array([PALETTE[name] for name in colors], dtype=np.float32) * (1 + BRIGHTNESS_JITTER * signed[:, 4:5])
    bg = np.array([PALETTE[name] for name in backgrounds], dtype=np.float32) * (1 + BRIGHTNESS_JITTER * signed[:, 5:6])
    labels = np.array([SHAPES.index(name) for name in shapes])
    images, maps = np.empty((n, side, side, 3), dtype=np.uint8), np.empty((n, side, side), dtype=np.uint8)
    for label, shape in enumerate(SHAPES):
        members = np.flatnonzero(labels == label)
        for i in np.split(members, range(64, len(members), 64)):  # 64 at a time fit in the cache
            mask = render_mask(shape, cx[i], cy[i], radius[i], side)[..., None]
            images[i] = bg[i, None, None] + mask * (fg - bg)[i, None, None] + 0.5
            maps[i] = (mask[..., 0] > 0.5) * (label + 1)
    columns, rows = maps.any(1), maps.any(2)
    x, y = columns.argmax(1), rows.argmax(1)
    boxes = np.stack([x, y, side - columns[:, ::-1].argmax(1) - x, side - rows[:, ::-1].argmax(1) - y], 1)
    names = [f"{color} {shape}" for color, shape in zip(colors, shapes)]
    return images, [caption(*scene) for scene in scenes], labels, maps, boxes, names


# --- judging ---


def blur(a, times=1):
    """(..., H, W) smoothed by (1, 2, 1) / 4 in both directions; once removes most noise and little of the shape."""
    for _ in range(times):
        p = np.pad(a, [(0, 0)] * (a.ndim - 2) + [(1, 1), (1, 1)], mode="edge")
        p = (p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]) / 4
        a = (p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]) / 4
    return a


def normalize(a):
    """(..., H, W) with mean 0 and norm 1, so that the inner product of two is their correlation."""
    a = a - a.mean((-2, -1), keepdims=True)
    return a / np.sqrt((a * a).sum((-2, -1), keepdims=True))


@functools.cache
def templates(side):
    """K pairs (shape, radius in sides), their masks in the middle (K, side, side), and the masks' conjugate spectra."""
    radii = np.geomspace(0.12, 0.40, 13)  # 11 % apart
    middle = np.full(len(radii), side / 2)
    masks = np.concatenate([render_mask(shape, middle, middle, radii * side, side) for shape in SHAPES])
    masks = np.concatenate([blur(masks), blur(masks, 7)])  # a sharp image as the judge sees it, and a soft one
    names = [(shape, radius) for shape in SHAPES for radius in radii] * 2
    return names, masks, np.conj(np.fft.rfft2(normalize(masks)))


def nearest_color(rgb):
    """Name of the palette color within 85 of rgb (about half of the closest pair's distance), else None."""
    distance = {name: np.linalg.norm(rgb - np.array(value)) for name, value in PALETTE.items()}
    name = min(distance, key=distance.get)
    return name if distance[name] < 85 else None


def read(image):
    """Size, color, shape and background of an image, (S, S, 3) uint8 or PIL; each None if it cannot be recognized.

    The border's median is the background. The distance from it is correlated with every shape at every radius and
    position. The best match, in its best color, must explain the image: most of it, and everything but specks. So two
    objects, a wrong outline or two colors are not recognized.
    """
    image = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if image.shape != (len(image), len(image), 3) or image.dtype != np.uint8:
        raise UserError(f"an image to judge must be (S, S, 3) uint8, not {image.shape} {image.dtype}")
    found = dict.fromkeys(ATTRIBUTES)
    side = len(image)
    border = np.ones((side, side), dtype=bool)
    border[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
    background = np.median(image[border].astype(np.float32), axis=0)
    found["background"] = nearest_color(background)
    difference = blur((image - background).transpose(2, 0, 1))  # (3, S, S)
    distance = np.linalg.norm(difference, axis=0)
    if distance.max() < 60:  # blank
        return found
    names, masks, spectra = templates(side)
    correlation = np.fft.irfft2(np.fft.rfft2(normalize(distance)) * spectra, s=(side, side))  # (K, S, S)
    best, dy, dx = np.unravel_index(correlation.argmax(), correlation.shape)
    mask = np.roll(masks[best], (dy, dx), (0, 1))
    contrast = (mask * difference).sum((1, 2)) / (mask * mask).sum()  # (3,) by least squares
    residual = difference - mask * contrast[:, None, None]
    speck = np.linalg.norm(blur(residual, 6), axis=0).max()
    # clean images have 0.05 and 0.26, at 26 dB it is 0.2 and 0.3; another disc a fifth as wide makes a speck of 0.9
    if (residual**2).sum() > 0.2 * (difference**2).sum() or speck > 0.4 * np.linalg.norm(contrast):
        return found
    found["shape"], radius = names[best]
    found["color"] = nearest_color(background + contrast)
    found["size"] = next((name for name, r in RADII.items() if 0.85 < radius / r < 1.18), None)
    return found


def score_folder(folder, seed):
    """Print how many samples in a folder match their prompts, in total and by attribute."""
    index = os.path.join(folder, "samples.jsonl")
    if not os.path.exists(index):
        reject(index, "no such file", "set --score to a folder that sample.py wrote")
    with open(index) as f:
        lines = f.read().splitlines()
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            wanted = parse(record["prompt"])
            if wanted is None:
                raise ValueError("the prompt is not a caption of this data set")
            with Image.open(os.path.join(folder, os.path.basename(record["file"]))) as image:
                got = read(image)
            held = is_held_out(wanted["shape"], wanted["color"], wanted["background"], seed)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            bad.append(f"line {number} {line[:99]}: {type(e).__name__}: {e}")
            continue
        rows.append((held, [got[name] == wanted[name] for name in ATTRIBUTES]))

    def report(name, hits):
        if hits:
            print(f"{name} {100 * np.mean(hits):.1f} % ({sum(hits)} of {len(hits)})")

    report("prompt score", [all(hits) for _, hits in rows])
    report("  seen combinations", [all(hits) for held, hits in rows if not held])
    report("  held-out combinations", [all(hits) for held, hits in rows if held])
    for j, name in enumerate(ATTRIBUTES):
        report(f"  {name}", [hits[j] for _, hits in rows])
    if bad or not rows:
        reject(index, f"{len(bad)} of {len(lines)} samples cannot be scored", "; ".join(bad[:3]) or "sample some first")


# --- files ---


def choose_prompts(train_captions, seed):
    """N_PROMPTS captions, different while there are enough: three that occur in training, one held out, and so on."""
    rng = np.random.default_rng((seed, zlib.crc32(b"prompts")))
    unseen = sorted(caption(s, color, shape, background) for s in RADII for shape, color, background in held_out(seed))
    unseen = itertools.cycle(rng.permutation(unseen).tolist())
    seen = itertools.cycle(rng.permutation(sorted(set(train_captions))).tolist())
    return [next(unseen if k % 4 == 3 else seen) for k in range(N_PROMPTS)]


def prepare(cfg):
    if cfg.score:
        score_folder(cfg.score, cfg.seed)
        return
    recipe = dict(size=cfg.size, seed=cfg.seed, vocab_size=cfg.vocab_size, palette=PALETTE, shapes=SHAPES, radii=RADII)
    recipe |= dict(radius_jitter=RADIUS_JITTER, brightness_jitter=BRIGHTNESS_JITTER, position=POSITION)
    recipe |= dict(map_classes=["background", *SHAPES])
    for split, n in (("val", cfg.n_val), ("train", cfg.n_train)):
        folder, meta = os.path.join(cfg.out_dir, split), recipe | dict(split=split, count=n)
        if is_made(folder, meta):  # it is written last
            continue
        images, captions, labels, maps, boxes, names = make_split(split, n, cfg.size, cfg.seed)
        objects = [{"bbox": [box], "categories": [name]} for box, name in zip(boxes.tolist(), names)]
        records = [{"text": [text], "objects": of_image} for text, of_image in zip(captions, objects)]
        save(f"{folder}/images.npy", images)
        save(f"{folder}/labels.npy", labels)
        save(f"{folder}/maps.npy", maps)
        save(f"{folder}/captions.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        if split == "val":
            some = torch.from_numpy(images[:40]).permute(0, 3, 1, 2) / 127.5 - 1
            save_grid(f"{cfg.out_dir}/sheet.png", some, captions[:40], columns=8)
        else:
            every = [f"{color} {shape}" for color in PALETTE for shape in SHAPES]
            save(f"{cfg.out_dir}/classes.json", json.dumps(SHAPES) + "\n")
            save(f"{cfg.out_dir}/map_classes.json", json.dumps(["background", *SHAPES]) + "\n")
            save(f"{cfg.out_dir}/object_classes.json", json.dumps(every) + "\n")
            save(f"{cfg.out_dir}/bpe.tiktoken", train_bpe(captions, cfg.vocab_size))
            save(f"{cfg.out_dir}/prompts.txt", "\n".join(choose_prompts(captions, cfg.seed)) + "\n")
        save(f"{folder}/meta.json", json.dumps(meta, indent=1) + "\n")
        print(f"{folder}: {n} images of {cfg.size} x {cfg.size}")


if __name__ == "__main__":
    run(prepare, globals(), packs=False)
