"""Human judgements of distorted patches (BAPPS, Zhang et al. 2018) in the form that lpips_train.py reads.

    python data/bapps/prepare.py --source=DIR        # DIR holds the published 2afc and, if wanted, jnd
    python data/bapps/prepare.py --standin=PHOTOS    # no BAPPS at hand: makes something of its layout, and reads that

The published layout is 2afc/{train,val}/CATEGORY/{ref,p0,p1,judge} and jnd/val/CATEGORY/{p0,p1,same}: a PNG a patch,
and a .npy a judgement, the share of people who chose p1, or who saw no difference. Out come, for every category,
images.npy (N, 3 or 2, S, S, 3) uint8, in that order of folders, and judge.npy (N,) float32.

THE STAND-IN IS NOT BAPPS: nobody judged it. Two copies of a patch are distorted by different amounts of one kind (noise
or JPEG or ...), and the lesser amount is "nearer to the original". Before that, both are moved by a pixel or two and
change their brightness a little, as in a photo taken a moment later: people hardly see it, to L2 it outweighs much
else. Its validation has photos that are not in training, and kinds of distortion that are not. It shows that training
works, not how people see.
"""

import io
import json
import os
import shutil
import sys
import zlib

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
from configurator import configure
from data.dataset import BadImage, Dataset, seed_of
from data.prepare import is_made, write
from data.shards import rename

source = ""  # folder of the published layout
standin = ""  # make a stand-in from these photos instead: a folder, tar or parquet shards
out_dir = "data/bapps"  # 2afc and jnd go here; the stand-in's own layout to standin below it
size = 64  # side of a patch in pixels, to which others are resized
standin_train = 800  # stand-in: training triplets of each category
standin_val = 200  # stand-in: validation triplets of each category
seed = 0  # of the stand-in

PARTS = {"2afc": ("ref", "p0", "p1", "judge"), "jnd": ("p0", "p1", "same")}  # the last one is the judgement
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# kinds of distortion: their values at amount 0 (hardly visible) and 1 (gross), with even ratios between
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
SAME_BELOW = 0.3  # JND: amounts that pass for no difference

# -- the published layout ----------------------------------------------------------------------------------------------


def listing(folder, part, is_image):
    """{name without ending: path} of one of a category's folders."""
    path = f"{folder}/{part}"
    if not os.path.isdir(path):
        raise ValueError(f"{path} is missing: a category has {'/, '.join(PARTS[folder.split('/')[-3]])}/")
    names = [n for n in sorted(os.listdir(path)) if n.lower().endswith(IMAGES if is_image else ".npy")]
    return {os.path.splitext(name)[0]: f"{path}/{name}" for name in names}


def list_category(folder, parts):
    """[[paths of one item, in the order of parts], ...]; ValueError where the folders do not hold the same items."""
    found = {part: listing(folder, part, part != parts[-1]) for part in parts}
    counts = {part: len(files) for part, files in found.items()}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} in {part}" for part, count in counts.items())
        raise ValueError(f"{folder} has unequal counts ({text}): unpack it again")
    if not counts[parts[0]]:
        raise ValueError(f"{folder} is empty: unpack it again, or remove it")
    for part in parts[1:]:
        if odd := sorted(set(found[parts[0]]) ^ set(found[part])):
            raise ValueError(f"{folder}: {odd[0]} is not in both {parts[0]} and {part}: unpack it again")
    return [[found[part][name] for part in parts] for name in sorted(found[parts[0]])]


def read_patch(path, size):
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except Exception as e:  # a damaged file can raise anything
        raise ValueError(f"{path} does not decode ({e}): unpack it again") from None
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR))


def read_judgement(path):
    try:
        value = np.load(path, allow_pickle=False).astype(np.float32)
    except Exception as e:  # so can this one
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"{path} does not load ({reason}): unpack it again") from None
    if value.size != 1 or not 0 <= value.item() <= 1:
        raise ValueError(f"{path} holds {value.tolist()}, want one number in [0, 1]: unpack it again")
    return value.item()


def prepare(source, out_dir, size, what):
    """Writes images.npy and judge.npy of every category below out_dir, where they are not there already."""
    work = []
    for task, split in (("2afc", "train"), ("2afc", "val"), ("jnd", "val")):
        folder = f"{source}/{task}/{split}"
        names = sorted(name for name in os.listdir(folder) if not name.startswith(".")) if os.path.isdir(folder) else []
        if not names and task == "2afc":
            raise ValueError(f"{folder} has no categories: set source to the folder that holds 2afc/ and jnd/")
        here = f"{out_dir}/{task}/{split}"
        others = sorted(set(os.listdir(here)) - set(names)) if os.path.isdir(here) else []
        if others:
            raise ValueError(f"{here}/{others[0]} is of another source: remove it, or set another out_dir")
        work += [(f"{folder}/{name}", f"{here}/{name}", PARTS[task]) for name in names]
    work = [(*folders, list_category(folders[0], parts)) for *folders, parts in work]  # check all before writing any
    for folder, target, items in work:
        state = [(os.path.relpath(path, folder), os.path.getsize(path)) for item in items for path in item]
        meta = {"count": len(items), "size": size, "crc32": zlib.crc32(repr(state).encode())}
        if is_made(target, meta):
            continue
        if os.path.exists(f"{out_dir}/meta.json"):  # until all is made again: lpips_train.py asks for it
            os.remove(f"{out_dir}/meta.json")
        shape = (len(items), len(items[0]) - 1, size, size, 3)
        images = np.lib.format.open_memmap(f"{target}/images.npy.tmp", "w+", np.uint8, shape)  # may not fit in memory
        judge = np.zeros(len(items), np.float32)
        for i, (*patches, judgement) in enumerate(items):
            for k, path in enumerate(patches):
                images[i, k] = read_patch(path, size)
            judge[i] = read_judgement(judgement)
        images.flush()
        rename(f"{target}/images.npy.tmp", f"{target}/images.npy")
        write(f"{target}/judge.npy", judge)
        write(f"{target}/meta.json", json.dumps(meta))
        print(f"{target}: {len(items)} judgements of {shape[1]} patches of {size} x {size}", flush=True)
    write(f"{out_dir}/meta.json", json.dumps({"what": what}))


# -- the stand-in ------------------------------------------------------------------------------------------------------


def distort(patch, kind, amount, rng):
    """A PIL patch distorted by an amount in [0, 1] on the kind's scale."""
    weak, gross = (KNOWN | NEW)[kind]
    value, (side, _) = weak * (gross / weak) ** amount, patch.size
    if kind == "noise":
        return from_array(np.asarray(patch) + value * rng.standard_normal((side, side, 3)))
    if kind == "jpeg":
        file = io.BytesIO()
        patch.save(file, "JPEG", quality=round(value))
        return Image.open(file).convert("RGB")
    if kind == "color":
        direction = rng.standard_normal(3)
        direction -= direction.mean()  # of the hue, not of the brightness
        return from_array(np.asarray(patch) + value * direction / np.linalg.norm(direction))
    if kind == "warp":
        coarse = rng.standard_normal((2, 5, 5)).astype(np.float32)
        shift = np.stack([Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC) for c in coarse])
        return from_array(sample(np.asarray(patch, float), shift * value / np.sqrt((shift**2).sum(0).mean())))
    if kind == "blur":
        return patch.filter(ImageFilter.GaussianBlur(value))
    small = max(1, round(side / value))
    return patch.resize((small, small), Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BICUBIC)


def from_array(pixels):
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def sample(pixels, shift):
    """pixels (S,S,3) looked up at (y, x) + shift (2,S,S), linearly between neighbours; the border goes on."""
    last = len(pixels) - 1
    at = np.clip(np.mgrid[: last + 1, : last + 1] + shift, 0, last)
    low = np.minimum(at.astype(int), last - 1)
    (y, x), (v, u) = low, (at - low)[..., None]
    top, bottom = (pixels[row, x] * (1 - u) + pixels[row, x + 1] * u for row in (y, y + 1))
    return top * (1 - v) + bottom * v


def cut_patch(photo, side, rng):
    """A square of a photo (PIL), which it sees at a random scale; flat ones, on which little shows, are not taken."""
    for _ in range(20):
        edge = min(*photo.size, int(rng.uniform(side, max(side, min(photo.size) * 0.6))))
        x, y = (rng.integers(0, length - edge + 1) for length in photo.size)
        patch = photo.resize((side, side), Image.Resampling.LANCZOS, (x, y, x + edge, y + edge))
        if np.asarray(patch.convert("L")).std() > 15:
            break
    return patch


def taken_again(patch, rng):
    """A patch without its margin of MOVED pixels, a little beside its middle and a little brighter or darker."""
    x, y = rng.integers(0, 2 * MOVED + 1, 2)
    patch = patch.crop((x, y, x + patch.width - 2 * MOVED, y + patch.height - 2 * MOVED))
    return from_array(np.asarray(patch) * (1 + rng.uniform(-BRIGHTER, BRIGHTER)))


def make_standin(photos, folder, size, n_train, n_val, seed):
    """Writes the published layout; every item is a function of (seed, split, category, number)."""
    photos = Dataset(photos, "all", size)
    if len(photos) < 2:
        raise ValueError(f"{photos.path} has {len(photos)} photos: give two or more, as some are for validation alone")
    if f"{os.path.realpath(photos.root)}/".startswith(f"{os.path.realpath(folder)}/"):
        raise ValueError(f"{photos.path} is where the stand-in goes, which is emptied: set another out_dir")
    every = min(5, len(photos))
    of_split = {"train": [i for i in range(len(photos)) if i % every], "val": range(0, len(photos), every)}
    work = [("2afc", "train", kind, [kind]) for kind in KNOWN] + [("2afc", "val", kind, [kind]) for kind in KNOWN | NEW]
    work += [("jnd", "val", "known", list(KNOWN)), ("jnd", "val", "new", list(NEW))]
    mark = f"{folder}/made_by_prepare.txt"
    if os.path.exists(folder) and os.listdir(folder) and not os.path.exists(mark):
        raise ValueError(f"{folder} was not made by this program, which would empty it: set another out_dir")
    os.makedirs(folder, exist_ok=True)
    with open(mark, "w") as f:
        f.write("The stand-in that prepare.py makes of photos; made anew each time.\n")
    for task in PARTS:
        shutil.rmtree(f"{folder}/{task}", ignore_errors=True)
    for task, split, category, kinds in work:
        target = f"{folder}/{task}/{split}/{category}"
        for part in PARTS[task]:
            os.makedirs(f"{target}/{part}")
        chosen, cache = of_split[split], {}
        for i in range(n_train if split == "train" else n_val):
            rng = np.random.default_rng(seed_of(seed, "standin", task, split, category, i))
            for _ in range(100):
                at = chosen[rng.integers(len(chosen))]
                try:
                    cache = {at: cache.get(at) or photos.rgb(at)} | dict(list(cache.items())[:50])
                    break
                except BadImage as e:
                    print(f"skipped a bad photo: {e}", flush=True)
            else:
                raise ValueError(f"100 photos of {photos.path} in a row do not decode: look at them")
            patch, kind = cut_patch(cache[at], size + 2 * MOVED, rng), str(rng.choice(kinds))
            patches = [patch.crop((MOVED, MOVED, MOVED + size, MOVED + size))]
            if task == "jnd":
                amounts = [rng.uniform()]
                judgement = amounts[0] < SAME_BELOW
            else:
                difference = rng.uniform(*APART)
                amounts = rng.permutation(rng.uniform(0, 1 - difference) + np.array([0, difference])).tolist()
                judgement = amounts[1] < amounts[0]
            patches += [distort(taken_again(patch, rng), kind, amount, rng) for amount in amounts]
            for part, image in zip(PARTS[task], patches):
                image.save(f"{target}/{part}/{i:06d}.png", compress_level=1)
            np.save(f"{target}/{PARTS[task][-1]}/{i:06d}.npy", np.array([judgement], np.float32))
    print(f"{folder}: a stand-in of {len(photos)} photos, {len(of_split['val'])} of them for validation", flush=True)


if __name__ == "__main__":
    configure(globals())
    try:
        if bool(source) == bool(standin):
            raise ValueError("set source to a copy of BAPPS, or standin to a folder of photos, and one of them only")
        if standin:
            make_standin(standin, f"{out_dir}/standin", size, standin_train, standin_val, seed)
            prepare(f"{out_dir}/standin", out_dir, size, "a stand-in for BAPPS, made of photos; nobody judged it")
        else:
            prepare(source, out_dir, size, f"human judgements of {source}")
    except (ValueError, OSError) as e:
        sys.exit(f"prepare.py: {e}")
