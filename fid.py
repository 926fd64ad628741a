"""FID, KID, precision and recall of generated images against real ones, or their nearest training images.

    torchrun --nproc_per_node=8 fid.py --ckpt=out/ldm --num_samples=50000 --samples=out.npz \\
        --reference=DIR --inception_weights=FILE                                        # generate, then score
    python fid.py --samples=out.npz --reference=DIR --inception_weights=FILE            # score
    python fid.py --samples=out/ldm/samples --reference=DIR --trunk_weights=FILE        # without Inception: not a FID
    python fid.py --samples=out.npz --reference=DIR --nearest=true --ckpt=out/ldm --trunk_weights=FILE      # memorized?

Generating is resumed by the same command. Both sets get the same preprocessing: center crop of the short side, Lanczos
to image_size if the side differs, uint8; with image_size=0, the side of the samples, these are used as they are.
With inception_weights, features and scores are torch-fidelity's. With trunk_weights the features are the last ones of
LPIPS; these scores carry the trunk's name, compare only with each other, and favor models trained with that LPIPS.
Most scores depend on the number of images: compare equal numbers only (FID is reported for 50,000 samples).

nearest=true finds the training image nearest to each sample, by features and by pixels (averaged to 32 x 32 if larger;
RMS difference in gray levels). The reference is the data set of training: its training images and their mirror images
are decoded by the autoencoder of --ckpt, as samples are (without --ckpt: as they are; always center crops). The score
is the share of samples below the 1 % quantile of the same distance of its held-out images; without memorization about
1 % are, the line has the exact number and its standard deviation. A larger share can also come from blurred or plain
samples, which are near to many images: look at the sheet of the closest pairs, SAMPLES.nearest.features.png. All pairs
are in SAMPLES.nearest.features.jsonl; the same with pixels.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import checkpoint
import metrics
import sample
from checkpoint import UserError, reject, write_whole
from common import check_same_settings, install_excepthook, progress_bar, setup
from configurator import configure, find_settings
from data.dataset import BadImage, Dataset, crop_and_resize, to_tensor
from grid import as_rgb, save_grid, to_pil, to_uint8
from lpips_train import LPIPS, MIN_SIDE, TAPS
from metrics import NEIGHBORS, frechet, gaussian, load_inception, mmd, off_mps, precision_recall
from sample import choose_conditions, earlier_files, generate, latent_sides, load_from_settings
from vae import VAE

# the two sets
samples = "samples.npz"  # generated images: an .npz (arr_0, uint8 (N,H,W,3)), or a folder written by sample.py
reference = ""  # real images: a data set as training reads it, or an .npz; "" generates only
split = "all"  # all | train | val | test: part of the reference that is scored against
nearest = False  # find the nearest training images instead; the reference is then the data set of training
image_size = 0  # >= 0: side in pixels at which both are compared; 0 is that of the samples
# features, one of two
inception_weights = ""  # torch-fidelity's weights-inception-2015-12-05-6726825d.pth: FID, KID, precision, recall
trunk = "squeeze"  # squeeze | alex | vgg: network of LPIPS
trunk_weights = ""  # torchvision's ImageNet weights of it, a .pth
# generate the samples first; this also takes sample.py's settings: ckpt, prompts, cls, steps, guidance, ...
num_samples = 0  # >= 0: images to generate, of the prompts or classes in turns; 0 scores existing ones
batch_size = 64  # >= 1: images at a time, on each process
compile = "auto"  # auto | true | false: torch.compile of the denoiser; auto is on CUDA
dist_timeout = 1440.0  # > 0: minutes that a process waits for the slowest at the end

# settings of sample.py that are not used here: image inputs and output
UNUSED = "n init_image strength mask noise_level semantic_map out_dir show".split()
# settings that do not change the images: generating resumes with other values
FREE = "inception_weights trunk trunk_weights decode_batch compile device".split()
FREE += "samples reference split nearest image_size".split()

# --- generate ---


def generate_samples(cfg, machine):
    """Generate cfg.num_samples images into the .npz cfg.samples, or do nothing if it has them already.

    Their prompts or classes are used in turns: the given ones, else the checkpoint's examples, or all its classes.
    Returns the autoencoder, or None.
    """
    cfg, pipeline, options = load_from_settings(cfg, machine)
    if pipeline.task["task"] != "none":
        raise UserError(f"--num_samples is not for a checkpoint with task={pipeline.task['task']}, which needs images")
    conditions = choose_conditions(pipeline, cfg)
    if pipeline.num_classes and not cfg.cls:
        conditions = range(pipeline.num_classes)
    conditions = [conditions[i % len(conditions)] for i in range(cfg.num_samples)]
    height, width = latent_sides(pipeline, cfg.size)
    if cfg.reference and height != width:
        raise UserError("a comparison with --reference needs square images: set --size to one side")

    def generate_rows(rows):
        some, seeds = [conditions[i] for i in rows], range(cfg.seed + rows[0], cfg.seed + rows[-1] + 1)
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.precision == "bfloat16"):
            images = generate(pipeline, some, seeds, **options)
        return np.stack([np.array(to_pil(as_rgb(image))) for image in images])

    settings = {name: value for name, value in cfg.items() if name not in FREE} | {"dtype": machine.precision}
    for name in ("ckpt", "guide_ckpt", "first_stage"):
        settings[f"crc32 of {name}"] = describe(cfg[name]) if cfg[name] else None
    settings["crc32 of conditions"] = zlib.crc32(json.dumps(conditions).encode())
    labels = [pipeline.numbers[i] for i in conditions] if pipeline.num_classes else None
    generate_many(cfg.samples, cfg.num_samples, cfg.batch_size, generate_rows, labels, settings, machine)
    return pipeline.vae


def describe(path):
    """A checksum of a checkpoint's meta, or of the names and sizes of another project's files."""
    path = checkpoint.find(path)
    if checkpoint.is_ours(path):
        return zlib.crc32(json.dumps(checkpoint.read_meta(path)).encode())
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names] or [path]
    return zlib.crc32(json.dumps({file: os.path.getsize(file) for file in sorted(files)}).encode())


def generate_many(path, count, chunk, generate_rows, labels, settings, machine):
    """generate_rows(range) -> uint8 (n,H,W,3), of all rows 0 to count - 1, into the .npz `path`, labels as arr_1.

    Chunk k of the rows is made by rank k % world. Chunks are kept in PATH.parts until all are there; those of an
    interrupted run are used if its `settings` (JSON) were the same, and rejected otherwise.
    """
    settings, folder = json.loads(json.dumps(settings)), f"{path}.parts"
    words = dict(then="then", remedy="use those, or another --samples")
    if os.path.exists(path) and not os.path.exists(folder):
        check_same_settings(path, read_settings(path), settings, **words)
        return
    os.makedirs(folder, exist_ok=True)
    if os.path.exists(f"{folder}/settings.json"):
        before = checkpoint.read_json(f"{folder}/settings.json", f"delete {folder}")
        check_same_settings(folder, before, settings, **words)
    else:  # by all ranks alike
        write_whole(f"{folder}/settings.json", lambda file: file.write(json.dumps(settings).encode()))
    starts = range(0, count, chunk)
    parts = [f"{folder}/{start:08d}.npy" for start in starts]
    mine = [k for k in range(machine.rank, len(starts), machine.world) if not os.path.exists(parts[k])]
    for k in progress_bar(mine, "generating"):
        images = generate_rows(range(starts[k], min(starts[k] + chunk, count)))
        write_whole(parts[k], functools.partial(np.save, arr=images))
    if machine.world > 1:
        dist.barrier()
    if machine.rank == 0:
        assemble(path, parts, count, labels, settings)
        shutil.rmtree(folder)


def read_settings(path):
    """The settings that an .npz was generated with, {} if it has none."""
    with contextlib.suppress(zipfile.BadZipFile, ValueError), zipfile.ZipFile(path) as archive:
        return json.loads(archive.comment)
    return {}


def assemble(path, parts, count, labels, settings):
    """One .npz of all chunks, with one of them in memory at a time; its zip comment is the settings as JSON."""
    shape = (count, *np.load(parts[0], mmap_mode="r").shape[1:])

    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            archive.comment = json.dumps(settings).encode()
            with archive.open("arr_0.npy", "w", force_zip64=True) as f:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(f, header)
                for part in parts:
                    f.write(np.load(part).tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w") as f:
                    np.lib.format.write_array(f, np.asarray(labels, dtype=np.int64))

    write_whole(path, write)


# --- score ---


class Array:
    """uint8 (N,H,W,3) with the methods of data.dataset.Dataset that are used here."""

    def __init__(self, images, name):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            reject(name, f"{images.dtype} {images.shape}", "make it uint8 (N,H,W,3)")
        self.images = images

    def __len__(self):
        return len(self.images)

    def key(self, i):
        return f"image {i}"

    def image(self, i):
        return Image.fromarray(self.images[i])


def open_set(source, name, split="all"):
    """(images with image(i) and key(i), the indices to use) of an array, an .npz, or a data set."""
    if isinstance(source, np.ndarray):
        images = Array(source, name)
    elif not source or not os.path.exists(source):
        reject(f"--{name}={source}", "no such file", "give an .npz, or a folder of images")
    elif str(source).endswith(".npz"):
        remedy = "give an .npz with the images as arr_0, uint8 (N,H,W,3)"
        with checkpoint.reading(source, "does not load", remedy), np.load(source, allow_pickle=False) as file:
            images = Array(file["arr_0"], source)
    else:
        images = Dataset(source, split)
        if names := earlier_files(source) - {"grid.png"}:  # written by sample.py
            return images, [i for i in range(len(images)) if images.key(i) in names]
    return images, range(len(images))


def first_side(images, which):
    """The short side of the first image that decodes, 0 if none does."""
    for i in which:
        with contextlib.suppress(BadImage):
            return min(images.image(i).size)
    return 0


@torch.no_grad()
def features(extract, images, which, name, side, as_is, batch_size, device):
    """extract(uint8 (B,C,side,side)) -> (B,D) of all images that decode: their indices [N] and the features (N,D).

    as_is: do not crop or resize.
    """
    found, batch, decoded = [], [], []
    for n, i in enumerate(progress_bar(which, name), 1):
        try:
            image = images.image(i)
            if not as_is:
                image = crop_and_resize(image, (side, side))
            elif image.size != (side, side):
                reject(images.key(i), f"{image.width}x{image.height}, not {side}x{side}", "set image_size to resize")
            batch.append(torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1))
            decoded.append(i)
        except BadImage as error:
            print(f"skipped a bad image of {name}: {error}")
        if batch and (len(batch) == batch_size or n == len(which)):
            found.append(extract(torch.stack(batch).to(device)))
            batch = []
    if len(decoded) <= NEIGHBORS:
        reject(name, f"{len(decoded)} images", f"give at least {NEIGHBORS + 1}")
    return decoded, off_mps(torch.cat(found))


def load_trunk_features(trunk, weights, device):
    """A function: uint8 (B,3,S,S) -> the trunk's last features in LPIPS, mean over positions, times sqrt(D): (B,D).

    LPIPS normalizes the D channels at each position to length 1; times sqrt(D) their mean square is 1, which gives the
    kernel of `mmd` its scale. Without normalization a few strong channels dominate and precision hardly falls with
    blur.
    """
    lpips = LPIPS(trunk, weights, "uniform").to(device)

    def extract(x):
        if min(x.shape[2:]) < MIN_SIDE[trunk]:
            raise UserError(f"images of {x.shape[3]} px, {trunk} needs {MIN_SIDE[trunk]} or more: set --image_size")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the same numbers on a GPU
            f = lpips.features(x / 127.5 - 1)[-1]  # (B,D,h,w)
        return f.mean(dim=(2, 3)) * f.shape[1] ** 0.5

    return extract


def inception_scores(f, g):
    """FID, KID (mean and std over 100 subsets), precision and recall of Inception features, by torch-fidelity.

    Its own default for precision and recall is VGG16; reports of diffusion models use Inception.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    from torch_fidelity.version import __version__

    subset = min(1000, len(f), len(g))
    found = fid_statistics_to_metric(fid_features_to_statistics(f), fid_features_to_statistics(g), False)
    found |= kid_features_to_metric(f, g, kid_subset_size=subset, verbose=False)
    found |= prc_features_to_metric(f, g, prc_neighborhood=NEIGHBORS, save_cpu_ram=True, verbose=False)
    names = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}
    names |= {"kid_std": "kernel_inception_distance_std", "precision": "precision", "recall": "recall"}
    about = f"torch-fidelity {__version__}: inception-v3-compat 2048, KID 100 x {subset}"
    return {name: found[key] for name, key in names.items()} | {"features": about}


def load_extractor(inception_weights, trunk, trunk_weights, device):
    """A function from uint8 images (B,3,S,S) to features (B,D), by whichever weights are named."""
    if bool(inception_weights) == bool(trunk_weights):
        raise UserError("set one of --inception_weights (for FID) and --trunk_weights")
    if not inception_weights:
        return load_trunk_features(trunk, trunk_weights, device)
    try:
        return load_inception(inception_weights, device)
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from None


def score(samples, reference, image_size=0, inception_weights="", trunk="squeeze", trunk_weights="", batch_size=64,
          device="cpu", split="all"):  # fmt: skip
    """Scores of `samples` against `reference`, and what they were computed with, as a dict; see the docstring above.

    samples, reference: a uint8 array (N,H,W,3), an .npz, or what data.dataset.Dataset opens.
    """
    extract = load_extractor(inception_weights, trunk, trunk_weights, device)
    a, chosen = open_set(samples, "samples")
    b, real = open_set(reference, "reference", split)
    for images in (a, b):
        if isinstance(images, Dataset):
            print(images, flush=True)  # what was opened, and what was left out
    side = image_size or first_side(a, chosen)
    _, f = features(extract, a, chosen, "samples", side, not image_size, batch_size, device)
    _, g = features(extract, b, real, "reference", side, not image_size and isinstance(b, Array), batch_size, device)
    if inception_weights:
        result = inception_scores(f, g)
    else:
        values = (frechet(*gaussian(f), *gaussian(g)), mmd(f, g), *precision_recall(f, g))
        result = {f"{trunk}_{name}": v for name, v in zip(("frechet", "mmd", "precision", "recall"), values)}
        result |= {"features": f"{trunk} layer {max(TAPS[trunk])}, unit length, mean over positions, {f.shape[1]}"}
    with open(inception_weights or trunk_weights, "rb") as file:
        result["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return result | {"samples": len(f), "reference": len(g), "image_size": side}


# --- nearest training images ---


def find_nearest(samples, reference, image_size=0, inception_weights="", trunk="squeeze", trunk_weights="",
                 batch_size=64, device="cpu", vae=None, out="nearest"):  # fmt: skip
    """Find the nearest training image of each sample; yields ("features" or "pixels", dict of metrics.share_below).

    samples: as in `score`.  reference: the data set of training; its split val are the held-out images.  vae: the
    autoencoder that decoded the samples, which real images go through too, or None.  out: path of the files that
    `save_pairs` writes, OUT.features.png and so on. In memory are the features of all samples and held-out images, and
    of 64 batches of training images.
    """
    extract = load_extractor(inception_weights, trunk, trunk_weights, device)
    a, chosen = open_set(samples, "samples")
    train = Dataset(reference, "train", image_mode=vae.settings["image_mode"] if vae else "RGB")
    held_out = train.in_split("val")
    print(train, flush=True)
    side = image_size or first_side(a, chosen)
    small = min(side, 32)
    if vae is not None and side % vae.factor:
        raise UserError(f"images of {side} px, the autoencoder needs a multiple of {vae.factor}: set --image_size")

    def see(x):  # Euclidean distances of the pixels are RMS differences in gray levels
        pixels = torch.nn.functional.adaptive_avg_pool2d(off_mps(x).float(), small).flatten(1) / (3 * small**2) ** 0.5
        return torch.cat([extract(x).to(pixels.device), pixels], dim=1)

    def see_real(x):
        if vae is not None:
            x = to_uint8(as_rgb(vae.decode(vae.encode(x / 127.5 - 1).mode())))
        return see(x)

    def see_both(x):
        return torch.stack([see_real(x), see_real(x.flip(3))], dim=1).flatten(0, 1)  # two rows an image

    kept, f = features(see, a, chosen, "samples", side, not image_size, batch_size, device)
    _, g = features(see_real, held_out, range(len(held_out)), "held-out images", side, False, batch_size, device)
    columns = [f.shape[1] - 3 * small**2, 3 * small**2]
    queries, best = torch.cat([f, g]).split(columns, dim=1), [(torch.inf, 0)] * 2
    for part in np.array_split(range(len(train)), -(-len(train) // (64 * batch_size))):
        indices, rows = features(see_both, train, part, "training images", side, False, batch_size, device)
        numbers = torch.tensor([2 * i + mirrored for i in indices for mirrored in (0, 1)], device=rows.device)
        best = [metrics.nearest_rows(*each, numbers) for each in zip(queries, rows.split(columns, dim=1), best)]
    for space, (distances, numbers) in zip(("features", "pixels"), best):
        pairs = list(zip(distances.tolist(), kept, numbers.tolist()))
        save_pairs(f"{out}.{space}", pairs, a, train, side)
        yield space, metrics.share_below(distances[: len(f)], distances[len(f) :])


def save_pairs(path, pairs, samples, train, side):
    """PATH.jsonl of all pairs, and the sheet PATH.png of the 16 closest, each sample left of its training image.

    pairs: (distance, index of the sample, twice the index of the training image, + 1 if mirrored), by sample.
    """
    with open(f"{path}.jsonl", "w") as file:
        for distance, i, j in pairs:
            record = dict(sample=samples.key(i), train=train.key(j // 2), mirrored=j % 2 == 1, distance=distance)
            file.write(json.dumps(record) + "\n")
    images, captions = [], []
    for distance, i, j in sorted(pairs)[:16]:
        image = as_rgb(to_tensor(crop_and_resize(train.image(j // 2), (side, side))))
        images += [to_tensor(crop_and_resize(samples.image(i), (side, side))), image.flip(2) if j % 2 else image]
        captions += [f"{samples.key(i)}: {distance:.2f}", "mirrored " * (j % 2) + train.key(j // 2)]
    save_grid(f"{path}.png", torch.stack(images), captions, columns=8)


if __name__ == "__main__":
    generating = {name: setting for name, setting in find_settings(vars(sample)).items() if name not in UNUSED}
    cfg = configure(globals(), more=generating)
    install_excepthook()
    machine = setup(cfg)
    networks = {name: cfg[name] for name in ("inception_weights", "trunk", "trunk_weights")}
    if cfg.nearest and (not cfg.reference or cfg.split != "all"):
        raise UserError("--nearest=true needs --reference=DIR, the data set of training, without --split")
    if cfg.num_samples:
        if cfg.reference and machine.rank == 0:  # mistakes in these are found before generating
            load_extractor(**networks, device=machine.device)
            Dataset(cfg.reference, "val") if cfg.nearest else open_set(cfg.reference, "reference", cfg.split)
        vae = generate_samples(cfg, machine)
        if machine.rank == 0:
            print(f"{cfg.num_samples} images in {cfg.samples}")
    options = dict(image_size=cfg.image_size, **networks, batch_size=cfg.batch_size, device=machine.device)
    if cfg.nearest and machine.rank == 0:
        if not cfg.num_samples:
            path = cfg.first_stage or cfg.given.get("ckpt")
            vae = VAE.from_pretrained(path).to(machine.device) if path else None
        out = f"{os.path.normpath(cfg.samples)}.nearest"
        for space, found in find_nearest(cfg.samples, cfg.reference, **options, vae=vae, out=out):
            about = f"without memorization {found['expected']:.4g} +- {found['deviation']:.2g}; {out}.{space}.png"
            print(f"nearest_{space} {found['share']:.6g}  # share of samples closer than {found['limit']:.4g}; {about}")
    elif cfg.reference and machine.rank == 0:
        result = score(cfg.samples, cfg.reference, **options, split=cfg.split)
        sets = f"{result['samples']} samples, {result['reference']} real ({cfg.split})"
        images = f"{result['image_size']} px, center crop, Lanczos, uint8"
        for name, value in result.items():
            if isinstance(value, float):
                about = f"{sets}; {images}; {result['features']}; sha256 {result['sha256'][:16]}"
                print(f"{name} {value:.6g}  # {about}")
        if min(result["samples"], result["reference"]) <= 2048:
            print("few images: all but KID and MMD depend strongly on their number")
    if machine.world > 1:
        dist.destroy_process_group()
