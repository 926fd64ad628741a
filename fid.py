"""How far drawn pictures are from real ones: FID, KID, precision and recall; or, offline, the same of another network.

    python fid.py --samples=out/ldm/samples --reference=DIR --inception_weights=FILE  # FID, by torch-fidelity
    python fid.py --samples=drawn.npz --reference=DIR --trunk_weights=FILE            # squeeze_frechet: not a FID

Both sets go through one preprocessing: centre crop of the short side, Lanczos to image_size where the side differs,
uint8. Where image_size is 0 it is the side of the drawn pictures, and those are taken as they are. With
inception_weights (torch-fidelity's .pth) features and scores are torch-fidelity's. With trunk_weights (torchvision's)
the features are LPIPS's last ones, and the scores carry the trunk's name: they compare with nothing but themselves,
and favour what was trained on LPIPS of that trunk. Most depend on the number of pictures: compare equal numbers only
(FID is commonly told of 50,000 drawn ones).
"""

import contextlib
import hashlib
import json
import os
import sys

import numpy as np
import torch
from PIL import Image

from configurator import configure
from data.dataset import BadImage, Dataset, to_tensor
from lpips_train import LPIPS, MIN_SIDE, TAPS, TRUNK_FILES, TRUNK_URL
from metrics import NEIGHBOURS, frechet, gaussian, load_inception, mmd, precision_recall

samples = ""  # drawn pictures: an .npz (arr_0, uint8 (N,H,W,3)) or a folder, as sample.py leaves it
reference = ""  # real pictures: a data set as training reads it, or an .npz
split = "all"  # of the reference: all | train | val | test
image_size = 0  # side in pixels at which both are compared; 0 is that of the drawn pictures
inception_weights = ""  # torch-fidelity's weights-inception-2015-12-05-6726825d.pth: FID, KID, precision, recall
trunk = "squeeze"  # without Inception: squeeze (1.1) | alex | vgg (16)
trunk_weights = ""  # torchvision's ImageNet weights of it, a .pth
batch_size = 64  # pictures at once
device = "auto"  # auto | cpu | cuda


# -- pictures ----------------------------------------------------------------------------------------------------------


class Array:
    """Pictures (N,H,W,3) uint8 in memory, as data.dataset.Dataset has them on disk."""

    pixels = Dataset.pixels  # the same crop, the same resize

    def __init__(self, images, name, image_size):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"{name} is {images.dtype} {images.shape}: make it uint8 (N,H,W,3)")
        self.images, self.image_size = images, image_size

    def __len__(self):
        return len(self.images)

    def key(self, i):
        return f"picture {i}"

    def rgb(self, i):
        return Image.fromarray(self.images[i])


def open_pictures(source, name, image_size, split="all"):
    """(pictures with pixels(i), rgb(i), key(i); which of them count) of an array, an .npz or what Dataset opens."""
    if split != "all" and (isinstance(source, np.ndarray) or str(source).endswith(".npz")):
        raise ValueError(f"split={split} is of a data set, and {name} is an array: leave it out")
    if isinstance(source, np.ndarray):
        pictures = Array(source, name, image_size)
    elif not source or not os.path.exists(source):
        raise FileNotFoundError(f"{name}={source} is not there: give an .npz, or a folder of pictures")
    elif str(source).endswith(".npz"):
        try:
            with np.load(source, allow_pickle=False) as file:
                there, array = file.files, file["arr_0"] if "arr_0" in file.files else None
        except Exception as e:  # a damaged file can raise anything
            raise ValueError(f"{name}={source} does not load as .npz ({e}): draw or fetch it again") from None
        if array is None:
            raise ValueError(f"{name}={source} has {', '.join(there)}: call the pictures arr_0")
        pictures = Array(array, f"{name}={source}", image_size)
    else:
        pictures = Dataset(source, split, image_size)
        if os.path.exists(f"{source}/samples.jsonl"):  # sample.py's: grid.png beside them is no sample
            with open(f"{source}/samples.jsonl", encoding="utf-8") as lines:
                drawn = {json.loads(line).get("file") for line in lines}
            return pictures, [i for i in range(len(pictures)) if pictures.key(i) in drawn]
    return pictures, range(len(pictures))


@torch.no_grad()
def features(extract, pictures, which, name, as_is, batch_size, device):
    """extract(uint8 (B,3,S,S)) -> (B,D) of all pictures that decode: (N,D). as_is: their sides must be S already."""
    size, found, batch = pictures.image_size, [], []
    for n, i in enumerate(which, 1):
        try:
            if as_is and (image := pictures.rgb(i)).size != (size, size):
                it_is = f"{pictures.key(i)} of {name} is {image.width}x{image.height}"
                raise ValueError(f"{it_is}, not {size}x{size}: set image_size to crop and resize both sets")
            x = to_tensor(image) if as_is else pictures.pixels(i)
            batch.append(((x + 1) * 127.5).round().byte())
        except BadImage as e:
            print(f"skipped a bad picture of {name}: {e}")
        if batch and (len(batch) == batch_size or n == len(which)):
            found.append(extract(torch.stack(batch).to(device)))
            batch = []
    f = torch.cat(found) if found else torch.zeros(0, 1)
    if len(f) <= NEIGHBOURS:
        raise ValueError(f"{name} has {len(f)} pictures: give {NEIGHBOURS + 1} or more")
    if not f.isfinite().all():
        raise ValueError(f"features of {name} are not finite: look at the weights")
    return f


def load_trunk_features(trunk, weights, device):
    """A function: uint8 (B,3,S,S) -> the trunk's last tap as LPIPS sees it, mean over positions, times sqrt(D): (B,D).

    LPIPS makes the D channels at each position a vector of length 1; times sqrt(D) their mean square is 1, which gives
    the kernel of `mmd` its scale. Without that a few strong channels decide, and precision hardly falls with blur.
    """
    if trunk not in TAPS:
        raise ValueError(f"trunk={trunk} is not one of {', '.join(TAPS)}")
    lpips = LPIPS(trunk, weights, "uniform").to(device)

    def extract(x):
        if min(x.shape[2:]) < MIN_SIDE[trunk]:
            raise ValueError(f"pictures of {x.shape[3]} px: {trunk} wants {MIN_SIDE[trunk]} or more, set image_size")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the same numbers on a GPU
            f = lpips.features(x / 127.5 - 1)[-1]  # (B,D,h,w)
        return f.mean(dim=(2, 3)) * f.shape[1] ** 0.5

    return extract


def inception_scores(f, g):
    """FID, KID (mean and deviation over 100 subsets), precision and recall of features of Inception, and by whom.

    Left to itself torch-fidelity takes VGG16 for precision and recall; the reports of diffusion models take Inception.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    from torch_fidelity.version import __version__

    subset = min(1000, len(f), len(g))
    found = fid_statistics_to_metric(fid_features_to_statistics(f), fid_features_to_statistics(g), False)
    found |= kid_features_to_metric(f, g, kid_subset_size=subset, verbose=False)
    found |= prc_features_to_metric(f, g, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    names = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}
    names |= {"kid_std": "kernel_inception_distance_std", "precision": "precision", "recall": "recall"}
    made_with = f"torch-fidelity {__version__}: inception-v3-compat 2048, KID 100 x {subset}"
    return {name: found[key] for name, key in names.items()} | {"features": made_with}


# -- the score ---------------------------------------------------------------------------------------------------------


def open_extractor(inception_weights, trunk, trunk_weights, device):
    """uint8 pictures -> features, by the one of the two weights that is given; and the device it is on."""
    if bool(inception_weights) == bool(trunk_weights):
        given = "are both given" if inception_weights else "are both empty"
        remedy = f"the first to torch-fidelity's .pth, for FID, or the second to {TRUNK_URL}{TRUNK_FILES.get(trunk)}"
        raise ValueError(f"inception_weights and trunk_weights {given}: set {remedy}, fetched")
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device={device} is not auto, cpu or cuda, or PyTorch sees no GPU here: set device=cpu")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    weights = inception_weights or trunk_weights
    return load_inception(weights, device) if inception_weights else load_trunk_features(trunk, weights, device), device


def score(samples, reference, image_size=0, inception_weights="", trunk="squeeze", trunk_weights="", batch_size=64,
          device="auto", split="all"):  # fmt: skip
    """How far samples are from reference: dict of scores, and of what they were made with; see the top of this file.

    samples, reference: uint8 array (N,H,W,3), .npz, or what data.dataset.Dataset opens, of which reference has a split.
    """
    if batch_size < 1 or image_size < 0:
        raise ValueError(f"batch_size={batch_size}, image_size={image_size}: give at least 1 and 0")
    extract, device = open_extractor(inception_weights, trunk, trunk_weights, device)
    weights = inception_weights or trunk_weights
    a, drawn = open_pictures(samples, "samples", image_size or 1)
    if not len(drawn):
        raise ValueError("samples has 0 pictures: draw some")
    for i in drawn if not image_size else ():
        with contextlib.suppress(BadImage):
            a.image_size = min(a.rgb(i).size)
            break
    b, real = open_pictures(reference, "reference", a.image_size, split)
    f = features(extract, a, drawn, "samples", not image_size, batch_size, device)
    g = features(extract, b, real, "reference", not image_size and isinstance(b, Array), batch_size, device)
    if inception_weights:
        result = inception_scores(f, g)
    else:
        values = (frechet(*gaussian(f), *gaussian(g)), mmd(f, g), *precision_recall(f, g))
        result = {f"{trunk}_{name}": v for name, v in zip(("frechet", "mmd", "precision", "recall"), values)}
        result |= {"features": f"{trunk} layer {max(TAPS[trunk])}, unit length, mean over positions, {f.shape[1]}"}
    with open(weights, "rb") as file:
        result["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return result | {"samples": len(f), "reference": len(g), "image_size": a.image_size}


def one_line_error(kind, error, trace):
    """Users' mistakes as one line; TRACEBACK=1 shows where they were noticed, all else shows it always."""
    if issubclass(kind, (ValueError, OSError, ImportError)) and not os.environ.get("TRACEBACK"):
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    config = configure(globals())
    sys.excepthook = one_line_error
    if inception_weights and "trunk" in config.given:
        raise ValueError(f"trunk={trunk} is for trunk_weights, not for inception_weights: leave one of them out")
    result = score(**config)
    sets = f"{result['samples']} drawn, {result['reference']} real ({split})"
    pictures = f"{result['image_size']} px, centre crop, Lanczos, uint8"
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name} {value:.6g}  # {sets}; {pictures}; {result['features']}; sha256 {result['sha256'][:16]}")
    if min(result["samples"], result["reference"]) <= 2048:
        print("few pictures: all but KID and MMD depend strongly on their number")
