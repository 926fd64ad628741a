"""Human judgements of distorted patches (BAPPS, Zhang et al. 2018) in the form that lpips_train.py reads.

    python data/bapps/prepare.py --source=DIR        # DIR has the published 2afc and, if wanted, jnd
    python data/bapps/prepare.py --standin=PHOTOS    # without BAPPS: makes a stand-in of its layout from photos

The published layout is 2afc/{train,val}/CATEGORY/{ref,p0,p1,judge} and jnd/val/CATEGORY/{p0,p1,same}: a PNG a patch,
and a .npy a judgement, the share of people who chose p1, or who saw no difference. For every category this writes
images.npy (N, 3 or 2, S, S, 3) uint8, in that order of folders, and judge.npy (N,) float32.

THE STAND-IN IS NOT BAPPS: nobody judged it. Two copies of a patch are distorted by different amounts of one distortion
(noise or JPEG or ...), and the smaller amount is "closer to the original". Before that, both are moved by a pixel or
two and change their brightness a little, as in a photo taken a moment later: people hardly see it, to L2 it outweighs
much else. Its validation split has photos that are not in training, and distortions that are not. It shows that
training works, not how people see.
"""

import functools
import io
import json
import os
import shutil
import sys
import zlib

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from checkpoint import UserError, reading, reject, replacing
from data.dataset import Dataset, first_good, seed_of
from data.forms import IMAGES
from data.prepare import is_made, run, save

source = ""  # folder of the published layout
standin = ""  # make a stand-in from these photos instead (a folder, tar or parquet shards)
out_dir = "data/bapps"  # folder for 2afc and jnd; the stand-in's own layout is in standin/ there
size = 64  # >= 8: side of a patch in pixels; others are resized
standin_train = 800  # >= 1: training triplets of each category of the stand-in
standin_val = 200  # >= 1: validation triplets of each category of the stand-in
seed = 0  # of the stand-in

PARTS = {"2afc": ("ref", "p0", "p1", "judge"), "jnd": ("p0", "p1", "same")}  # the last one is the judgement
# distortions: their values at amount 0 (hardly visible) and 1 (gross), with even ratios between
KNOWN = {
    "noise": (2.0, 50.0),  # standard deviation, of 255
    "jpeg": (90.0, 6.0),  # quality
    "color": (4.0, 70.0),  # length of the shift in RGB, of 255
    "warp": (0.3, 4.0),  # root mean square of the displacement, pixels
}
NEW = {
    "blur": (0.4, 4.0),  # radius of the Gaussian, pixels
    "superres": (1.3, 6.0),  # factor by which it is made smaller and larger again
}
APART = (0.05, 0.5)  # least and largest difference of two amounts
MOVED, BRIGHTER = 2, 0.15  # pixels each way; relative, either way
SAME_BELOW = 0.3  # JND: amounts that count as no difference

# --- the published layout ---


def list_category(folder, parts):
    """[[paths of one item, in the order of parts], ...] of a category, whose folders must have the same items."""
    found = {}
    for part in parts:
        names = sorted(os.listdir(f"{folder}/{part}")) if os.path.isdir(f"{folder}/{part}") else []
        endings = IMAGES if part != parts[-1] else ".npy"
        found[part] = {os.path.splitext(n)[0]: f"{folder}/{part}/{n}" for n in names if n.lower().endswith(endings)}
    names = sorted(found[parts[0]])
    for part in parts:
        if odd := sorted(found[part].keys() ^ set(names)):
            reject(folder, f"{odd[0]} is missing in {parts[0]} or {part}", "unpack it again")
    if not names:
        reject(folder, "is empty", "unpack it again, or delete it")
    return [[found[part][name] for part in parts] for name in names]


def read_patch(path, size):
    with reading(path, "cannot be decoded", "unpack it again"), Image.open(path) as image:
        image = image.convert("RGB")
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR))


def read_judgement(path):
    with reading(path, "cannot be loaded", "unpack it again"):
        value = np.load(path, allow_pickle=False).astype(np.float32)
    if value.size != 1 or not 0 <= value.item() <= 1:
        reject(path, f"is {value.tolist()}, not one number in [0, 1]", "unpack it again")
    return value.item()


def pack_judgements(source, out_dir, size, what):
    """Write images.npy and judge.npy of every category to out_dir, except those that are up to date."""
    work = []
    for task, split in (("2afc", "train"), ("2afc", "val"), ("jnd", "val")):
        folder, target = f"{source}/{task}/{split}", f"{out_dir}/{task}/{split}"
        names = sorted(name for name in os.listdir(folder) if not name.startswith(".")) if os.path.isdir(folder) else []
        if not names and task == "2afc":
            reject(folder, "no categories", "set --source to the folder with 2afc/ and jnd/")
        if others := sorted(set(os.listdir(target)) - set(names)) if os.path.isdir(target) else []:
            reject(f"{target}/{others[0]}", "is of another source", "delete it, or set another --out_dir")
        work += [(f"{folder}/{name}", f"{target}/{name}", PARTS[task]) for name in names]
    work = [(*folders, list_category(folders[0], parts)) for *folders, parts in work]  # check all before writing any
    for folder, target, items in work:
        state = [(os.path.relpath(path, folder), os.path.getsize(path)) for item in items for path in item]
        meta = {"count": len(items), "size": size, "crc32": zlib.crc32(repr(state).encode())}
        if is_made(target, meta):
            continue
        if os.path.exists(f"{out_dir}/meta.json"):  # lpips_train.py checks it: absent until everything is made
            os.remove(f"{out_dir}/meta.json")
        shape = (len(items), len(items[0]) - 1, size, size, 3)

        with replacing(f"{target}/images.npy") as temporary:
            images = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)  # it may not fit in memory
            for i, (*patches, _) in enumerate(items):
                images[i] = [read_patch(path, size) for path in patches]
        save(f"{target}/judge.npy", np.array([read_judgement(item[-1]) for item in items], np.float32))
        save(f"{target}/meta.json", json.dumps(meta))
        print(f"{target}: {len(items)} judgements of {shape[1]} patches of {size} x {size}", flush=True)
    save(f"{out_dir}/meta.json", json.dumps({"what": what}))


# --- the stand-in ---


def distort(patch, name, amount, rng):
    """A PIL patch distorted by an amount in [0, 1] on the scale of the distortion."""
    weak, gross = (KNOWN | NEW)[name]
    value, (side, _) = weak * (gross / weak) ** amount, patch.size
    if name == "noise":
        return from_array(np.asarray(patch) + value * rng.standard_normal((side, side, 3)))
    if name == "jpeg":
        file = io.BytesIO()
        patch.save(file, "JPEG", quality=round(value))
        return Image.open(file).convert("RGB")
    if name == "color":
        direction = rng.standard_normal(3)
        direction -= direction.mean()  # of the hue, not of the brightness
        return from_array(np.asarray(patch) + value * direction / np.linalg.norm(direction))
    if name == "warp":
        coarse = rng.standard_normal((2, 5, 5)).astype(np.float32)
        shift = np.stack([Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC) for c in coarse])
        return from_array(sample(np.asarray(patch, float), shift * value / np.sqrt((shift**2).sum(0).mean())))
    if name == "blur":
        return patch.filter(ImageFilter.GaussianBlur(value))
    small = max(1, round(side / value))
    return patch.resize((small, small), Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BICUBIC)


def from_array(pixels):
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def sample(pixels, shift):
    """pixels (S,S,3) looked up at (y, x) + shift (2,S,S), linearly interpolated; the border is repeated."""
    last = len(pixels) - 1
    at = np.clip(np.mgrid[: last + 1, : last + 1] + shift, 0, last)
    low = np.minimum(at.astype(int), last - 1)
    (y, x), (v, u) = low, (at - low)[..., None]
    top, bottom = (pixels[row, x] * (1 - u) + pixels[row, x + 1] * u for row in (y, y + 1))
    return top * (1 - v) + bottom * v


def cut_patch(photo, side, rng):
    """A square of a photo (PIL) at a random scale; flat ones, in which distortions hardly show, are avoided."""
    for _ in range(20):
        edge = min(*photo.size, int(rng.uniform(side, max(side, min(photo.size) * 0.6))))
        x, y = (rng.integers(0, length - edge + 1) for length in photo.size)
        patch = photo.resize((side, side), Image.Resampling.LANCZOS, (x, y, x + edge, y + edge))
        if np.asarray(patch.convert("L")).std() > 15:
            break
    return patch


def taken_again(patch, rng):
    """A patch without its margin of MOVED pixels, a little off its center and a little brighter or darker."""
    x, y = rng.integers(0, 2 * MOVED + 1, 2)
    patch = patch.crop((x, y, x + patch.width - 2 * MOVED, y + patch.height - 2 * MOVED))
    return from_array(np.asarray(patch) * (1 + rng.uniform(-BRIGHTER, BRIGHTER)))


def judged(photo, task, distortions, size, rng):
    """The patches of one item of the stand-in, (reference and) two distorted ones, and its judgement."""
    patch, distortion = cut_patch(photo, size + 2 * MOVED, rng), str(rng.choice(distortions))
    if task == "jnd":
        amounts = [rng.uniform()]
        judgement = amounts[0] < SAME_BELOW
    else:
        difference = rng.uniform(*APART)
        amounts = rng.permutation(rng.uniform(0, 1 - difference) + np.array([0, difference])).tolist()
        judgement = amounts[1] < amounts[0]
    original = patch.crop((MOVED, MOVED, MOVED + size, MOVED + size))
    return [original, *(distort(taken_again(patch, rng), distortion, amount, rng) for amount in amounts)], judgement


def make_standin(photos, folder, size, n_train, n_val, seed):
    """Write the published layout; every item is a function of (seed, split, category, number)."""
    mark = f"{folder}/made_by_prepare.txt"
    if os.path.exists(folder) and os.listdir(folder) and not os.path.exists(mark):
        reject(folder, "was not made by this script, which would delete it", "set another --out_dir")
    if f"{os.path.realpath(photos)}/".startswith(f"{os.path.realpath(folder)}/"):
        reject(photos, "is the folder of the stand-in, which is deleted first", "set another --out_dir")
    dataset = Dataset(photos, "all", size)
    if len(dataset) < 2:
        reject(photos, f"{len(dataset)} photos", "at least 2 are needed, as some are for validation only")
    every = min(5, len(dataset))
    of_split = {"train": [i for i in range(len(dataset)) if i % every], "val": range(0, len(dataset), every)}
    work = [("2afc", "train", name, [name]) for name in KNOWN] + [("2afc", "val", name, [name]) for name in KNOWN | NEW]
    work += [("jnd", "val", "known", list(KNOWN)), ("jnd", "val", "new", list(NEW))]
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    save(mark, "The stand-in that prepare.py makes of photos; made anew each time.\n")
    photo = functools.lru_cache(50)(dataset.image)

    def choose(chosen, rng):
        found = first_good(lambda _: dict(photo=photo(chosen[rng.integers(len(chosen))])), dataset)
        for line in found["bad"]:
            print(f"skipped a bad photo: {line}", flush=True)
        return found["photo"]

    for task, split, category, distortions in work:
        target = f"{folder}/{task}/{split}/{category}"
        for part in PARTS[task]:
            os.makedirs(f"{target}/{part}")
        for i in range(n_train if split == "train" else n_val):
            rng = np.random.default_rng(seed_of(seed, "standin", task, split, category, i))
            patches, judgement = judged(choose(of_split[split], rng), task, distortions, size, rng)
            for part, image in zip(PARTS[task], patches):
                image.save(f"{target}/{part}/{i:06d}.png", compress_level=1)
            np.save(f"{target}/{PARTS[task][-1]}/{i:06d}.npy", np.array([judgement], np.float32))
    print(f"{folder}: a stand-in of {len(dataset)} photos, {len(of_split['val'])} of them for validation", flush=True)


def prepare(cfg):
    if bool(cfg.source) == bool(cfg.standin):
        raise UserError("set either --source to a copy of BAPPS, or --standin to a folder of photos")
    source, what = cfg.source, f"human judgements of {cfg.source}"
    if cfg.standin:
        source, what = f"{cfg.out_dir}/standin", "a stand-in for BAPPS, made of photos; nobody judged it"
        make_standin(cfg.standin, source, cfg.size, cfg.standin_train, cfg.standin_val, cfg.seed)
    pack_judgements(source, cfg.out_dir, cfg.size, what)


if __name__ == "__main__":
    run(prepare, globals(), packs=False)
