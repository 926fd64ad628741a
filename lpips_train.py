"""LPIPS: how different two images look to people, as distances between features of an ImageNet network.

    from lpips_train import LPIPS
    distance = LPIPS("vgg")(x, y)                                                     # (B,), images in [-1,1]

and its training on human judgements (BAPPS: which of two distorted patches is nearer to the original?), with the
evaluation that sets its scores beside those of the published heads, of the same network without them, of L2 and SSIM.

    python data/bapps/prepare.py --source=DIR && python lpips_train.py --net=vgg      # one GPU
    python lpips_train.py --net=squeeze --trunk_weights=FILE --workers=0              # a CPU
    torchrun --nproc_per_node=8 lpips_train.py --batch_size=6                         # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 lpips_train.py --batch_size=3
    python lpips_train.py --eval_only=True                                            # only the table

The same command again resumes the run. An image, in what it prints, is a judged patch with its two distortions.
"""

import contextlib
import datetime
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import zlib
from glob import escape, glob

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from configurator import configure
from data.dataset import loader, open_npy, permute, seed_of
from metrics import ssim
from watch import Watch, fresh_store

# data
dataset = "data/bapps"  # what data/bapps/prepare.py made
workers = 4  # processes that read patches; 0 reads in the main one
# model
net = "vgg"  # the network that sees: vgg (16) | alex | squeeze (1.1)
trunk_weights = ""  # torchvision's ImageNet weights of it, a .pth; "" fetches them once
train_trunk = False  # train the network too, not only the heads
head_weights = ""  # start from these heads: our checkpoint or a published .pth; "" starts anew
dropout = 0.5  # on the squared differences, in training alone
# optimizer: the defaults are ten epochs of BAPPS' 151,400 judgements on one process
batch_size = 50  # judgements per process and micro-step
grad_accum = 1  # micro-steps per optimizer step
max_steps = 30_280  # optimizer steps
lr = 1e-4  # absolute: nothing rescales it
lr_schedule = "linear"  # linear (from half-time on to lr_end) | constant | cosine (to lr_end) | onecycle | multistep
lr_end = 0.0  # where linear, cosine and onecycle end, as a share of lr
lr_milestones = (0.6, 0.8, 0.9)  # multistep: shares of max_steps at which lr_decay strikes
lr_decay = 0.1  # multistep: factor at each milestone
warmup_steps = 0  # steps of linear warm-up
beta1 = 0.5  # Adam
beta2 = 0.999  # Adam
grad_clip = 0.0  # largest gradient norm; 0 is no clipping
skip_spikes = 0.0  # leave out a step whose gradient norm is over so many times its running mean; 0 leaves out none
shard_optimizer = False  # each process keeps the optimizer state of its share of the parameters alone (ZeRO stage 1)
# run
out_dir = "out/lpips"  # checkpoint, log and curves
seed = 0  # of weights, data order and dropout
eval_only = False  # only print the table for the checkpoint in out_dir, or for head_weights
eval_every = 3000  # steps between evaluations
save_every = 1000  # steps between checkpoints
log_every = 50  # steps between progress lines
hang_timeout = 30.0  # minutes in which a rank makes no progress, after which the run says which one and ends
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto (bfloat16 on CUDA, else float32) | float32 | bfloat16 | float64
compile = "auto"  # torch.compile: auto (on CUDA) | true | false
deterministic = False  # bit-exact on CUDA too, slower
wandb = False  # send the log to Weights & Biases too

# dense bf16 (V100: fp16)
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "V100": 125}

# the layers of torchvision's `features` after which LPIPS v0.1 looks, and their channels
TAPS = {
    "vgg": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
    "alex": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},
    "squeeze": {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512},
}
MIN_SIDE = {"vgg": 16, "alex": 31, "squeeze": 17}  # pixels; below, a pooling layer has nothing left
TRUNK_URL = "https://download.pytorch.org/models/"
TRUNK_FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}

# -- the metric --------------------------------------------------------------------------------------------------------


class Fire(nn.Module):
    """SqueezeNet's block (Iandola et al. 2016): narrow by 1x1, then 1x1 and 3x3 side by side."""

    def __init__(self, channels, narrow, wide):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


def make_trunk(net):
    """The convolutions of VGG16, AlexNet or SqueezeNet 1.1 under torchvision's numbers, up to the last tap."""
    layers, channels = [], 3

    def conv(width, kernel=3, stride=1, padding=1):
        nonlocal channels
        # in place: a convolution's own output is never looked at
        layers.extend([nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU(inplace=True)])
        channels = width

    if net == "vgg":
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            conv(width) if width else layers.append(nn.MaxPool2d(2))
    elif net == "alex":
        conv(64, 11, 4, 2)
        layers.append(nn.MaxPool2d(3, 2))
        conv(192, 5, padding=2)
        layers.append(nn.MaxPool2d(3, 2))
        for width in (384, 256, 256):
            conv(width)
    else:
        conv(64, 3, 2, 0)
        for narrow in (0, 16, 16, 0, 32, 32, 0, 48, 48, 64, 64):
            layers.append(Fire(channels, narrow, 4 * narrow) if narrow else nn.MaxPool2d(3, 2, ceil_mode=True))
            channels = 8 * narrow or channels
    return nn.Sequential(*layers)


def read_pth(path):
    """The tensors of a published file, read without running anything in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a file that is something else can raise anything
        why = "it is not there" if not os.path.exists(path) else str(e).split("\n")[0][:100] or type(e).__name__
        raise ValueError(f"{path} does not load ({why}): give a .pth file of tensors") from None


def load_trunk(net, path=None):
    """torchvision's weights for make_trunk(net): of the whole model or its `features`, from path or fetched once."""
    if path:
        tensors = read_pth(path)
    else:
        url = TRUNK_URL + TRUNK_FILES[net]
        try:
            tensors = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as e:  # no network, or other bytes than its name promises
            raise OSError(f"could not fetch {url} ({e}): fetch it yourself and set trunk_weights to it") from None
        path = url
    tensors = {name.removeprefix("features."): t for name, t in tensors.items()} if isinstance(tensors, dict) else {}
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in make_trunk(net).state_dict().items()}
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape) if isinstance(tensors.get(name), torch.Tensor) else "not there"
        if found != shape:
            raise ValueError(f"{path}: {name} is {found}, {net} wants {tuple(shape)}: give {net}'s weights, or set net")
    return {name: tensors[name].float() for name in wanted}


def load_heads(net, path=None):
    """(heads, trunk, meta): a weight >= 0 for each channel of each tap, [(C,), ...].

    From a checkpoint of ours (a file or its out_dir), whose meta comes along, and whose trunk, {} if that was left
    alone; from a published .pth; "uniform" is ones, the bare network; None is the published v0.1, read from the
    installed package `lpips` without importing it.
    """
    channels, trunk, meta = list(TAPS[net].values()), {}, None
    if path == "uniform":
        return [torch.ones(c) for c in channels], trunk, meta
    if not path:
        package = importlib.util.find_spec("lpips")
        if package is None:
            raise ImportError("the published heads come with the package lpips: pip install lpips, or set head_weights")
        path = f"{package.submodule_search_locations[0]}/weights/v0.1/{net}.pth"
    path = f"{path}/latest.safetensors" if os.path.isdir(path) else str(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"head_weights={path} is not there: give a published .pth, or ours")
    if path.endswith(".safetensors"):
        tensors, meta = load_checkpoint(path, "lpips")
        tensors, trained_on = without_prefix("model", tensors), f" ({meta['model']['net']})"
        heads = [t for name, t in sorted(tensors.items()) if name.startswith("heads.")]  # fewer than ten
        trunk = without_prefix("trunk", tensors)
    else:
        tensors, trained_on = read_pth(path), ""
        names = [f"lin{k}.model.1.weight" for k in range(len(tensors))]
        if not isinstance(tensors, dict) or set(names) != set(tensors):
            raise ValueError(f"{path} holds no LPIPS heads (lin0.model.1.weight, ...): give a published .pth or ours")
        heads = [tensors[name].flatten().float() for name in names]
    if [len(w) for w in heads] != channels:
        raise ValueError(
            f"{path} has heads for {[len(w) for w in heads]} channels{trained_on}, {net} has {channels}: "
            f"give heads that were trained on {net}, or set net"
        )
    if any(not (w >= 0).all() for w in heads):
        raise ValueError(
            f"{path} has a head weight of {min(w.min().item() for w in heads):.3g}: give heads that are >= 0"
        )
    return heads, trunk, meta


def checksum(trunk):
    """One number for a trunk's weights."""
    crc = 0
    for t in trunk.values():
        crc = zlib.crc32(t.float().contiguous().numpy(), crc)
    return crc


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, version 0.1 (Zhang et al. 2018): two batches -> distances >= 0, (B,).

    net: vgg, alex or squeeze.  trunk_weights: see load_trunk.  head_weights: see load_heads.
    Nothing in it is trained and nothing in it is random, whatever the mode of the module that holds it.
    """

    def __init__(self, net="vgg", trunk_weights=None, head_weights=None):
        super().__init__()
        if net not in TAPS:
            raise ValueError(f"net={net} is not one of {', '.join(TAPS)}")
        heads, trunk, meta = load_heads(net, head_weights)
        trunk = trunk or load_trunk(net, trunk_weights)
        self.net, self.trunk_crc32 = net, checksum(trunk)
        if meta and meta["model"]["trunk_crc32"] not in (self.trunk_crc32, None):
            raise ValueError(
                f"{head_weights} was trained on other weights of {net} than {trunk_weights or 'the fetched ones'} "
                f"(checksum {meta['model']['trunk_crc32']}, not {self.trunk_crc32}): set trunk_weights to those"
            )
        with torch.device("meta"):
            self.trunk = make_trunk(net)
        self.trunk.load_state_dict(trunk, assign=True)
        self.heads = nn.ParameterList(heads)
        # of torchvision's ImageNet mean and deviation, moved to [-1,1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # a parent's train() changes nothing here

    def features(self, x):
        """Images (B,3,H,W) in [-1,1] -> the taps' activations, of length 1 over the channels: [(B,C,h,w), ...]."""
        x, taken = (x - self.shift) / self.scale, []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in TAPS[self.net]:
                f = x if x.dtype == torch.float64 else x.float()  # out of autocast's bfloat16
                # the published code adds 1e-10 to the root: where all channels are 0 its gradient is not finite
                taken.append(f * (f.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt())
        return taken

    def distance(self, f, g, dropout=0.0):
        """Distances (B,) between two results of `features`; dropout is for the training of the heads."""
        total = 0.0
        for a, b, weight in zip(f, g, self.heads):
            difference = (a - b).square()  # (B,C,h,w)
            if dropout:
                difference = F.dropout(difference, dropout)
            total = total + (difference * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))
        return total

    def forward(self, x, y, check=True):
        """check: whether values outside [-1,1] are an error; to look makes a GPU wait, and a compiled graph does not.

        Training losses, whose reconstructions may well leave the range, pass check=False.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < MIN_SIDE[self.net]:
            wanted = f"two batches (B,3,H,W) of sides >= {MIN_SIDE[self.net]}"
            raise ValueError(f"LPIPS ({self.net}) compares {wanted}, got {tuple(x.shape)} and {tuple(y.shape)}: resize")
        if check and x.numel() and not torch.compiler.is_compiling():
            reach = torch.maximum(x.detach().abs().amax(), y.detach().abs().amax()).item()
            if not reach <= 1.001:  # NaN too; the rest is rounding
                raise ValueError(f"LPIPS got values up to +-{reach:.4g}, images are in [-1,1]: rescale or clamp them")
        return self.distance(self.features(x), self.features(y))


# -- human judgements --------------------------------------------------------------------------------------------------


class Judgements(torch.utils.data.Dataset):
    """What data/bapps/prepare.py made of task "2afc" (ref, p0, p1) or "jnd" (p0, p1), all categories of a split.

    item(i) -> dict(images (3 or 2,3,S,S) in [-1,1], judge: share of people who chose p1, or saw no difference; key).
    [p] is position p of an endless sequence, a new permutation every epoch, as of data.dataset.Stream.
    """

    def __init__(self, path, task, split, seed=0):
        folder, self.seed, self.parts, end = f"{path}/{task}/{split}", seed, {}, 0
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        names = [name for name in names if os.path.exists(f"{folder}/{name}/images.npy")]
        if not names:
            raise FileNotFoundError(f"no judgements in {folder}: run data/bapps/prepare.py, or set dataset")
        self.images = [open_npy(f"{folder}/{name}/images.npy") for name in names]
        judged = [open_npy(f"{folder}/{name}/judge.npy") for name in names]
        for name, images, judge in zip(names, self.images, judged):
            are_images = images.ndim == 5 and images.dtype == np.uint8 and images.shape[1:] == self.images[0].shape[1:]
            if not are_images or judge.shape != images.shape[:1] or judge.dtype.kind not in "fiu":
                raise ValueError(
                    f"{folder}/{name}: {judge.size} judgements, images {images.shape}: run data/bapps/prepare.py again"
                )
            self.parts[name] = slice(end, end := end + len(judge))
        self.judge = torch.from_numpy(np.concatenate(judged).astype(np.float32))
        self.per_item, self.size = self.images[0].shape[1:3]

    def __len__(self):
        return len(self.judge)

    def item(self, i):
        images, (name, part) = next(pair for pair in zip(self.images, self.parts.items()) if i < pair[1][1].stop)
        x = torch.from_numpy(images[i - part.start].astype(np.float32) / 127.5 - 1)  # (K,S,S,3)
        return {"images": x.permute(0, 3, 1, 2).contiguous(), "judge": self.judge[i]} | {
            "key": f"{name}/{i - part.start}"
        }

    def __getitem__(self, p):
        epoch, at = divmod(int(p), len(self))
        return self.item(permute(at, len(self), seed_of(self.seed, epoch)))


class Judge(nn.Module):
    """Guesses which of two distorted images people choose, from two distances and nothing else.

    Its parameters are what is trained and kept; a trunk that stays as it is, is none of them.
    """

    def __init__(self, lpips, train_trunk):
        super().__init__()
        self.settings = {"net": lpips.net, "train_trunk": train_trunk}
        self.settings["trunk_crc32"] = None if train_trunk else lpips.trunk_crc32
        self.lpips = [lpips]  # in a list, so that it is not registered
        self.heads = lpips.heads.requires_grad_()
        if train_trunk:
            self.trunk = lpips.trunk.requires_grad_()
        # the paper's ranking network
        activation = nn.LeakyReLU(0.2)
        self.ranker = nn.Sequential(nn.Linear(5, 32), activation, nn.Linear(32, 32), activation, nn.Linear(32, 1))

    def forward(self, images, dropout=0.0):
        """(B,3,3,S,S), ref, p0, p1 -> distances d0, d1 from ref to both, and the logit of "p1 is chosen": (B,)."""
        lpips, B = self.lpips[0], len(images)
        features = lpips.features(images.transpose(0, 1).flatten(0, 1))  # one pass for all three
        ref, p0, p1 = zip(*((f[:B], f[B : 2 * B], f[2 * B :]) for f in features))
        d0, d1 = lpips.distance(ref, p0, dropout), lpips.distance(ref, p1, dropout)
        with torch.autocast(images.device.type, enabled=False):  # d0 - d1 is small
            inputs = torch.stack([d0, d1, d0 - d1, d0 / (d1 + 0.1), d1 / (d0 + 0.1)], dim=1)
            return d0, d1, self.ranker(inputs).squeeze(1)


def two_afc(distances, judge):
    """Share of people whom the smaller of two distances (N,2) agrees with, judge (N,) of them for the second."""
    d0, d1 = distances.unbind(dim=1)
    return torch.where(d0 < d1, 1 - judge, torch.where(d1 < d0, judge, 0.5)).mean()


def average_precision(distances, same):
    """Area under the precision-recall curve (as PASCAL VOC) of "no difference seen", which `same` (N,) of people said.

    A pair counts as so many hits and 1 - same misses; pairs come in the order of their distances (N,1).
    """
    same = same[distances.flatten().argsort(stable=True)].double()
    hits = same.cumsum(0)
    precision, recall = hits / torch.arange(1, len(same) + 1, device=same.device), hits / hits[-1]
    precision = precision.flip(0).cummax(0).values.flip(0)  # at this recall or a higher one
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum()


def train_step(models, batch, noise, cfg):
    """One forward pass -> {name: scalar loss term}; "loss" is the one to differentiate.

    batch["images"] (B,3,3,S,S) in [-1,1], ref, p0 and p1; batch["judge"] (B,) in [0,1]. noise is empty: dropout draws
    from the global generator. Accuracy is the batch's 2AFC score, with dropout on; "each" (B,) is not averaged.
    """
    d0, d1, logit = models["judge"](batch["images"], cfg["dropout"])
    each = F.binary_cross_entropy_with_logits(logit, batch["judge"], reduction="none")
    accuracy = two_afc(torch.stack([d0, d1], dim=1).detach(), batch["judge"])
    return {"loss": each.mean(), "accuracy": accuracy, "each": each.detach()}


@torch.no_grad()
def evaluate(metrics, judgements, cfg, rank, world, device, autocast):
    """{metric: {category: score}} of functions of two batches: 2AFC agreement, or for JND average precision."""
    count, others = len(judgements), judgements.per_item - 1
    distances = torch.zeros(len(metrics), count, others, dtype=torch.float64, device=device)
    for start in range(rank * cfg["batch_size"], count, world * cfg["batch_size"]):
        end = min(start + cfg["batch_size"], count)
        x = torch.stack([judgements.item(i)["images"] for i in range(start, end)])
        x = x.to(device, torch.float64 if cfg["dtype"] == "float64" else torch.float32)
        for m, metric in enumerate(metrics.values()):
            for k in range(others):
                with autocast():
                    distances[m, start:end, k] = metric(x[:, 0], x[:, k + 1]).double()
    if world > 1:
        dist.all_reduce(distances)  # every pair was measured by one rank
    score, judge = two_afc if others == 2 else average_precision, judgements.judge.to(device)
    return {
        name: {category: score(d[part], judge[part]).item() for category, part in judgements.parts.items()}
        for name, d in zip(metrics, distances)
    }


def table(task, scores, judgements):
    """The text of what evaluate() gave: categories down, metrics across."""
    means = {name: sum(row.values()) / len(row) for name, row in scores.items()}
    parts = {name: part.stop - part.start for name, part in judgements.parts.items()}
    width = max(map(len, [*parts, "category"])) + 2
    lines = [f"{task:5}{'category':{width}}{'judged':>7}" + "".join(f"{name:>11}" for name in scores)]
    for category, count in (parts | {"mean": len(judgements)}).items():
        row = [means[name] if category == "mean" else scores[name][category] for name in scores]
        lines.append(f"{'':5}{category:{width}}{count:7}" + "".join(f"{value:11.4f}" for value in row))
    return "\n".join(lines)


def learning_rate(step, cfg):
    """The learning rate of optimizer step `step` (counted from 0)."""
    if step < cfg["warmup_steps"] and cfg["lr_schedule"] != "onecycle":
        return cfg["lr"] * (step + 1) / (cfg["warmup_steps"] + 1)
    if cfg["lr_schedule"] == "constant":
        return cfg["lr"]
    if cfg["lr_schedule"] == "multistep":
        return cfg["lr"] * cfg["lr_decay"] ** sum(step >= m * cfg["max_steps"] for m in cfg["lr_milestones"])
    if cfg["lr_schedule"] == "linear":
        left = min(1.0, 2.0 * (1 - step / cfg["max_steps"]))
        return cfg["lr"] * (cfg["lr_end"] + (1 - cfg["lr_end"]) * left)
    done = min(1.0, (step - cfg["warmup_steps"]) / max(1, cfg["max_steps"] - cfg["warmup_steps"]))
    if cfg["lr_schedule"] == "onecycle" and step < cfg["warmup_steps"]:  # up from lr / 25 (Smith & Topin 2017)
        return cfg["lr"] * (1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * step / cfg["warmup_steps"])))
    return cfg["lr"] * (cfg["lr_end"] + (1 - cfg["lr_end"]) * 0.5 * (1 + math.cos(math.pi * done)))


def save_checkpoint(path, tensors, meta):
    """Writes one .safetensors file whole or not at all; tensors are named, meta is JSON-able."""
    text, temporary = json.dumps(meta), f"{path}.tmp"  # always the same name: what a killed run left is overwritten
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        for left in glob(f"{escape(os.path.dirname(path) or '.')}/.tmp{6 * '[0-9A-Za-z]'}"):
            os.remove(left)  # as safetensors names what it writes: a kill left it, as large as a checkpoint
        save_file(tensors, temporary, metadata={"latent_diffusion": text, "crc32": str(zlib.crc32(text.encode()))})
        for name in (temporary, os.path.dirname(path) or "."):  # the file is on the disk before its name is
            fd = os.open(name, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            if name == temporary:
                os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"could not save {path} ({e}): make room and run again, the one before is untouched") from None


def load_checkpoint(path, stage):
    """(tensors on the CPU, meta) of a checkpoint of ours; ValueError says what is wrong with the file."""
    try:
        with safe_open(path, framework="pt") as f:
            text = (f.metadata() or {}).get("latent_diffusion")
            if text is None or str(zlib.crc32(text.encode())) != f.metadata().get("crc32"):
                raise ValueError(f"{path} is not a checkpoint of this repository, or its settings were altered")
            meta = json.loads(text)
            if meta["format"] != 1:
                raise ValueError(f"{path} has format {meta['format']}, this code reads 1: use the code that wrote it")
            if meta["stage"] != stage:
                raise ValueError(f"{path} is a checkpoint of stage {meta['stage']!r}, not {stage!r}")
            return {name: f.get_tensor(name) for name in f.keys()}, meta
    except (OSError, SafetensorError, json.JSONDecodeError, LookupError, TypeError, RecursionError) as e:
        raise ValueError(f"{path} is cut short or damaged ({e}): delete it, or put a good copy in its place") from None


def share_out(parameters, world):
    """{parameter: the rank that keeps its optimizer state and updates it}: ZeRO's stage 1 (arXiv 1910.02054).

    The largest first, each to the rank that has least so far: the same on every rank.
    """
    kept, owner = [0] * world, {}
    for p in sorted(parameters, key=lambda p: -p.numel()):
        owner[p] = kept.index(min(kept))
        kept[owner[p]] += p.numel()
    return owner


@torch.no_grad()
def send_updates(owner):
    """After a step of a shared optimizer: what each rank has updated goes to all others, in one message a rank."""
    for rank in sorted(set(owner.values())):
        own = [p for p, keeper in owner.items() if keeper == rank]
        flat = torch.cat([p.flatten() for p in own])
        dist.broadcast(flat, rank)
        for p, part in zip(own, flat.split([p.numel() for p in own])):
            p.copy_(part.view_as(p))


@torch.no_grad()
def optimizer_tensors(optimizer, model, prefix, owner=None):
    """The optimizer's state as {prefix.PARAMETER.exp_avg: tensor, ...}; of a shared one rank 0 gets the others' part.

    owner: share_out()'s. Every rank has to call it then.
    """
    state = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        keeper = owner.get(p, 0) if owner else 0
        if keeper and dist.get_rank() == keeper:
            s = state[name] or {"step": -p.new_ones(()), "exp_avg": p, "exp_avg_sq": p}  # -1: none yet
            dist.send(torch.cat([s[key].flatten().to(p.dtype) for key in ("step", "exp_avg", "exp_avg_sq")]), 0)
        elif keeper and dist.get_rank() == 0:
            flat = torch.empty(1 + 2 * p.numel(), dtype=p.dtype, device=p.device)
            dist.recv(flat, keeper)
            flat = flat.cpu()  # at once: rank 0's GPU need not have room for all
            if flat[0] >= 0:
                moments = (part.view(p.shape) for part in flat[1:].chunk(2))
                state[name] = {"step": flat[0].float()} | dict(zip(("exp_avg", "exp_avg_sq"), moments))
    return {f"{prefix}.{name}.{key}": t for name, s in state.items() for key, t in s.items()}


def load_optimizer(optimizer, model, prefix, tensors):
    kept = {p for group in optimizer.param_groups for p in group["params"]}  # of a shared one this rank's part
    for name, p in model.named_parameters():
        if f"{prefix}.{name}.step" not in tensors or p not in kept:  # frozen, or no step taken yet
            continue
        state = {key: tensors[f"{prefix}.{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        step = state.pop("step").to(p.device)
        optimizer.state[p] = {key: torch.empty_like(p).copy_(t) for key, t in state.items()} | {"step": step}


def with_prefix(prefix, state):
    return {f"{prefix}.{name}": t for name, t in state.items()}


def without_prefix(prefix, tensors):
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


@torch.no_grad()
def is_spike(norm, usual, times):
    """() bool: is a gradient norm over `times` times its running mean? usual (3,): mean, norms in it, spikes so far.

    Never in the first 100; the mean is over about as many. A spike enters it as what was just allowed, so that norms
    which stay high are followed; what is not finite does not enter. Nothing waits for the device.
    """
    mean, count, spikes = usual
    spike = (norm > times * mean) & (count >= 100)
    enters = torch.where(spike, times * mean, norm)
    after = torch.stack([mean + (enters - mean) / (count + 1).clamp(max=100), count + 1, spikes + spike])
    usual.copy_(torch.where(enters.isfinite(), after, usual))
    return spike


def images_of_step(keys, each, world):
    """(keys, those of them whose own loss is not finite) of a step, lists by rank; every rank has to ask.

    keys: of this rank's images.  each: their losses, a list of (B,).
    """
    bad = [key for key, fine in zip(keys, torch.cat(each).isfinite().tolist()) if not fine]
    ranks = [(keys, bad)]
    if world > 1:
        ranks = [None] * world
        dist.all_gather_object(ranks, (keys, bad))
    return [part[0] for part in ranks], [part[1] for part in ranks]


def check_same_everywhere(found, world):
    """ValueError on all ranks where one has found other things than rank 0; found: {what: value}."""
    ranks = [(platform.node(), found)]
    if world > 1:
        ranks = [None] * world
        dist.all_gather_object(ranks, (platform.node(), found))
    for rank, (node, theirs) in enumerate(ranks):
        for what, value in ranks[0][1].items():
            if theirs[what] != value:
                told = f"{what}: {value} on rank 0 ({ranks[0][0]}), {theirs[what]} on rank {rank} ({node})"
                raise ValueError(f"{told}: out_dir must lie on a disk that all nodes share; dataset too, or be alike")


def check_same_model(path, saved, now):
    """ValueError with both values side by side where a model's settings differ from its checkpoint's."""

    def flat(settings):
        parts = (flat(value) if isinstance(value, dict) else {name: value} for name, value in settings.items())
        return {name: value for part in parts for name, value in part.items()}

    saved, now = flat(saved), flat(json.loads(json.dumps(now)))  # tuples as lists, as they were saved
    rows = [f"{k}: {saved.get(k)} in the checkpoint, {now.get(k)} now" for k in now if saved.get(k) != now[k]]
    if rows:
        raise ValueError(f"{path} holds another model ({'; '.join(rows)}): use its settings, or another out_dir")


def rewind_log(path, step, max_steps):
    """Takes what is done again from `step` on out of log.jsonl, which is there whole at any moment."""
    ended = step >= max_steps  # a run at its end is evaluated once more
    with open(path) as f:
        records = [(json.loads(line), line) for line in f if line.endswith("\n")]  # a kill may leave half a line
    kept = [line for r, line in records if r["step"] < step + (r["lr"] is not None or not ended)]
    with open(f"{path}.tmp", "w") as f:
        f.writelines(kept)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def plot_log(out_dir):
    """loss.png: the curves of log.jsonl, one panel for each quantity."""
    try:
        import matplotlib
    except ImportError:  # an extra: no reason to lose a run
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(f"{out_dir}/log.jsonl") as f:
        records = [r for r in map(json.loads, f) if "step" in r]
    names = ("loss", "accuracy", "grad_norm", "val_2afc", "val_jnd", "lr")
    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    for name, axis in zip(names, axes.flat):
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        axis.plot(*zip(*points), marker="." if len(points) < 30 else None) if points else None
        axis.set_title(name)
        axis.set_xlabel("step")
        if points and name == "grad_norm":
            axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(f"{out_dir}/loss.png", dpi=80)
    plt.close(figure)


def count_tflop(cfg, side):
    """TFLOP of one judgement: three images forward, and back too where the trunk is trained, operator by operator."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        make_trunk(cfg["net"])(torch.zeros(3, 3, side, side))
    return (3 if cfg["train_trunk"] else 1) * counter.get_total_flops() / 1e12


def check_settings(cfg):
    for name, choices in (
        ("net", tuple(TAPS)),
        ("lr_schedule", ("linear", "constant", "cosine", "onecycle", "multistep")),
        ("device", ("auto", "cpu", "cuda")),
        ("dtype", ("auto", "float32", "bfloat16", "float64")),
        ("compile", ("auto", "true", "false", "True", "False")),
    ):
        if cfg[name] not in choices:
            raise ValueError(f"{name}={cfg[name]} is not one of {', '.join(choices)}")
    for name in ("batch_size", "grad_accum", "max_steps", "eval_every", "save_every", "log_every"):
        if cfg[name] < 1:
            raise ValueError(f"{name}={cfg[name]} must be at least 1")
    if not cfg["hang_timeout"] > 0 or cfg["skip_spikes"] < 0:
        raise ValueError(
            f"hang_timeout={cfg['hang_timeout']} must be above 0, skip_spikes={cfg['skip_spikes']} not below"
        )
    if 0 < cfg["skip_spikes"] <= 1:
        raise ValueError(f"skip_spikes={cfg['skip_spikes']} would leave out most steps: set it above 1, 5 say, or to 0")
    if not 0 <= cfg["dropout"] < 1:
        raise ValueError(f"dropout={cfg['dropout']} is a share: set it to 0 or more, and less than 1")


def one_line_error(kind, error, trace):
    """Users' mistakes as one line; TRACEBACK=1 shows where they were noticed, all else shows it always."""
    shown = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)
    if issubclass(kind, shown) and not os.environ.get("TRACEBACK"):
        line = str(error).strip().rsplit("\n", 1)[-1]  # of a data worker's error, which holds its traceback
        if issubclass(kind, MemoryError):
            line = "out of memory: the last checkpoint is good; lower batch_size or workers, run the same command"
        print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    config = configure(globals())
    sys.excepthook = one_line_error
    check_settings(config)

    # derive
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    use_compile = compile.lower() == "true" or (compile.lower() == "auto" and device == "cuda")

    # distributed: torchrun sets RANK, WORLD_SIZE, LOCAL_RANK
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device=cuda, but PyTorch sees no GPU here: mend its installation, or set device=cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)
    if world > 1:
        timeout = datetime.timedelta(minutes=2 * hang_timeout + 1)  # watch speaks first
        options = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
        dist.init_process_group(store=fresh_store(timeout), rank=rank, world_size=world, timeout=timeout, **options)
    master = rank == 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    # data
    train = None if eval_only else Judgements(dataset, "2afc", "train", seed)
    validation = {"2afc": Judgements(dataset, "2afc", "val")}
    if os.path.isdir(f"{dataset}/jnd/val"):
        validation["jnd"] = Judgements(dataset, "jnd", "val")
    side = min(judgements.size for judgements in (train or validation["2afc"], *validation.values()))
    if side < MIN_SIDE[net]:
        raise ValueError(f"{dataset} has patches of {side} pixels, {net} needs {MIN_SIDE[net]}: choose another net")
    if not os.path.exists(f"{dataset}/meta.json"):
        raise FileNotFoundError(f"{dataset}/meta.json is not there: run data/bapps/prepare.py to its end")
    with open(f"{dataset}/meta.json") as f:
        what = json.load(f)["what"]

    # model
    param_dtype = torch.float64 if dtype == "float64" else torch.float32
    torch.manual_seed(seed_of(seed, "init"))
    if head_weights and load_heads(net, head_weights)[1] and not (train_trunk or eval_only):
        raise ValueError(f"head_weights={head_weights} brings a network of its own, kept only with train_trunk=True")
    lpips = LPIPS(net, trunk_weights, head_weights or "uniform")
    if not head_weights:
        for weight in lpips.heads:
            weight /= len(weight) ** 0.5  # of the size that PyTorch's own initial weights have
    lpips.to(device, param_dtype, memory_format=torch.channels_last)
    model = Judge(lpips, train_trunk).to(device, param_dtype)

    # optimizer: AdamW without weight decay is Adam
    owner = share_out(model.parameters(), world) if shard_optimizer and world > 1 else {}
    groups = [{"params": [p for p in model.parameters() if owner.get(p, rank) == rank]}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), weight_decay=0.0, fused=True)

    parameters = list(model.parameters())  # once: to walk through all modules for them takes a while

    # what a step leaves to the next ones: mean, count and spikes of the gradient norms
    state = {"grad_norm": torch.zeros(3, device=device, dtype=param_dtype)}

    # resume
    latest, step, images_per_step = f"{out_dir}/latest.safetensors", 0, batch_size * grad_accum * world
    resumed = os.path.exists(latest) and not (eval_only and head_weights)  # which asks for those heads
    if master and not eval_only:
        os.makedirs(out_dir, exist_ok=True)
    if resumed:
        tensors, meta = load_checkpoint(latest, "lpips")
        check_same_model(latest, meta["model"], model.settings)
        model.load_state_dict(without_prefix("model", tensors))
        load_optimizer(optimizer, model, "optim", tensors)
        step = meta["step"]
        for name, t in without_prefix("state", tensors).items():
            state[name].copy_(t)
        if eval_only:
            images_per_step = meta["images_per_step"]
        if meta["images_per_step"] != images_per_step:  # another number of processes, or another batch_size
            grad_accum, rest = divmod(meta["images_per_step"], batch_size * world)
            if rest:
                raise ValueError(
                    f"{latest} was trained with {meta['images_per_step']} images per step, which "
                    f"batch_size={batch_size} on {world} processes cannot make up: change batch_size"
                )
            images_per_step = meta["images_per_step"]
        del tensors
    found = {"the checkpoint's step": step if resumed else "none", "training images": len(train or ())}
    check_same_everywhere(found, world)

    def checkpoint():
        """Rank 0 writes all that a resumed run and LPIPS need; every rank has to call it."""
        watch.at("saving", step)
        tensors = optimizer_tensors(optimizer, model, "optim", owner)
        if not master:
            return
        tensors |= with_prefix("model", model.state_dict()) | with_prefix("state", state)
        now = {"step": step, "images_seen": step * images_per_step, "images_per_step": images_per_step}
        save_checkpoint(latest, tensors, about | now)

    # ours comes first; the others never change and are measured once
    metrics = {"ours": lpips} if head_weights or resumed or not eval_only else {}
    try:
        metrics["published"] = LPIPS(net, trunk_weights).to(device, param_dtype)
    except ImportError:  # an extra
        pass
    metrics["uniform"] = LPIPS(net, trunk_weights, "uniform").to(device, param_dtype)
    metrics["L2"] = lambda x, y: (x - y).square().mean(dim=(1, 2, 3))
    metrics["SSIM"] = lambda x, y: -ssim(x, y)
    measured = {task: {} for task in validation}

    def assess():
        """Prints the tables; returns the means and the scores of our heads for the log."""
        record = {}
        for task, judgements in validation.items():
            due = {name: metric for name, metric in metrics.items() if name == "ours" or name not in measured[task]}
            scores = evaluate(due, judgements, config, rank, world, device, autocast)
            measured[task] = {name: scores.get(name) or measured[task][name] for name in metrics}
            if master:
                print(table(task, measured[task], judgements), flush=True)
            ours = measured[task].get("ours", {"": math.nan})
            record |= {f"val_{task}": sum(ours.values()) / len(ours), f"val_{task}_by_category": ours}
        return record

    # the first log lines
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run("git describe --always --dirty", shell=True, capture_output=True, text=True, cwd=here)
    git_revision = git.stdout.strip() or "unknown"  # no git, no repository
    about = {"format": 1, "stage": "lpips", "model": model.settings, "config": config, "git": git_revision}
    tflop = count_tflop(config, (train or validation["2afc"]).size)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in hardware), 0)
    if master:
        print(f"command: {' '.join(sys.argv)}")
        print(f"git {git_revision}, python {platform.python_version()}, torch {torch.__version__}")
        print(f"{world} x {hardware}, {dtype}; settings not default: {config.changed}")
        print(f"{len(train or ())} training and {len(validation['2afc'])} validation judgements in {dataset}: {what}")
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tflop:.4g} TFLOP per trained image")
        print(f"{images_per_step} images per step: {world} processes x {batch_size} x {grad_accum} accumulated")
        print(f"resumed from {latest} at step {step}" if resumed else f"a new run in {out_dir}", flush=True)
        if resumed:
            now, then = json.loads(json.dumps(config)), meta["config"]
            others = [f"{name}={now[name]} was {then[name]}" for name in now if now[name] != then.get(name, now[name])]
            print(f"other settings than before: {', '.join(others) or 'none'}", flush=True)
    watch = Watch(rank, world, hang_timeout)
    for metric in metrics.values():
        if isinstance(metric, LPIPS):
            metric.register_forward_hook(watch.progress)
    if eval_only:
        assess()
        watch.stop()
        if world > 1:
            dist.destroy_process_group()
        sys.exit(0)
    if master:
        if resumed and os.path.exists(f"{out_dir}/log.jsonl"):
            rewind_log(f"{out_dir}/log.jsonl", step, max_steps)
        elif os.path.exists(f"{out_dir}/log.jsonl"):
            os.remove(f"{out_dir}/log.jsonl")
        if wandb:
            import wandb as wandb_client

            wandb_client.init(project="latent-diffusion", name=out_dir, config=dict(config))

    terms_logged = ("loss", "accuracy", "grad_norm")
    fields = ("step", "images_seen", *terms_logged, "lr", "images_per_s", "mfu", "memory_gb")
    fields += ("val_2afc", "val_jnd", "val_2afc_by_category", "val_jnd_by_category")

    def log(**record):
        """One line of log.jsonl, the same fields each time."""
        if master:
            record = {"step": step} | record
            record["images_seen"] = record["step"] * images_per_step
            with open(f"{out_dir}/log.jsonl", "a") as f:
                f.write(json.dumps({name: record.get(name) for name in fields}) + "\n")
            if wandb:
                wandb_client.log({k: v for k, v in record.items() if v is not None}, step=record["step"])

    # compile, DDP
    judge = torch.compile(model) if use_compile else model
    if world > 1:
        judge = DistributedDataParallel(judge, gradient_as_bucket_view=True, forward_sync_buffers=False)
    join = torch.utils.data.default_collate
    batches = loader(train, step, max_steps, batch_size, grad_accum, rank, world, workers, join)

    # SIGTERM and SIGINT ask for a stop; every rank learns of it with the loss terms and stops at the same step
    asked_to_stop = []
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda number, frame: asked_to_stop.append(number))

    clock = {"time": time.time(), "step": step}  # since the last progress line

    def settle(pending):
        """Waits for the numbers of a step, stops the run if they are bad, logs them when due; returns the stop flag."""
        at_step, host, ready, at_time, keys, each = pending
        if ready is not None:
            ready.synchronize()
        *values, spikes, spike, finite, stop = host.tolist()
        terms = dict(zip(terms_logged, values))
        if spike or not finite:  # every rank sees the same, and can be asked
            keys, bad_keys = images_of_step(keys, each, world)
            culprits = sum(bad_keys, []) or sum(keys, [])
            some = ", ".join(culprits[:4]) + f" and {len(culprits) - 4} more" * (len(culprits) > 4)
        if spike and master:
            over = f"gradient norm {terms['grad_norm']:.4g}, over {skip_spikes:g} times its running mean"
            print(f"left out step {at_step}, {spikes:.0f} so far: {over}; images: {some}", flush=True)
        if not finite:
            bad = [name for name, value in terms.items() if not math.isfinite(value)]
            bad = [name for name in bad if name not in ("loss", "grad_norm")] or bad
            listed = f"{out_dir}/bad_batch_{at_step:08d}.json"
            record = {"step": at_step, "terms": {name: str(value) for name, value in terms.items()}}  # JSON has no NaN
            if master:
                with contextlib.suppress(OSError), open(listed, "w") as f:  # what is wrong is told all the same
                    json.dump(record | {"keys_by_rank": keys, "not_finite_by_rank": bad_keys}, f)
            raise FloatingPointError(
                f"{' and '.join(bad)} not finite at step {at_step}: no such step touches the weights, and {latest}, if "
                f"saved before, is good: look at {some} ({listed} has all keys), lower lr, set grad_clip or raise "
                f"warmup_steps, and run the same command"
            )
        if at_step % log_every == 0 or at_step == max_steps:
            images_seen, lr_then = at_step * images_per_step, learning_rate(at_step - 1, config)
            speed = (at_step - clock["step"]) * images_per_step / (at_time - clock["time"])
            clock.update(time=at_time, step=at_step)
            mfu = speed * tflop / (world * peak) if peak else None
            memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
            log(step=at_step, **terms, lr=lr_then, images_per_s=float(f"{speed:.6g}"), mfu=mfu, memory_gb=memory)
            if master:
                text = f"step {at_step}, {images_seen} images: "
                text += ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
                text += f", lr {lr_then:.2e}, {speed:.1f} images/s" + (f", MFU {mfu:.1%}" if mfu else "")
                text += f", {memory:.1f} GiB" if memory else ""
                left = (max_steps - at_step) * images_per_step / max(speed, 1e-9)
                print(f"{text}, {datetime.timedelta(seconds=int(left))} left", flush=True)
        return bool(stop)

    model.train()
    pending, stop, start_step, started = None, False, step, time.time()
    while True:
        # learning rate
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        # evaluate, save, stop
        finished = step >= max_steps
        if pending and (finished or stop or step % eval_every == 0 or step % save_every == 0):
            stop, pending = settle(pending) or stop, None
        if (step % eval_every == 0 and step > start_step) or finished:
            watch.at("evaluating", step)
            log(**assess())
            if master:
                plot_log(out_dir)
            clock.update(time=time.time(), step=step)  # evaluation does not count as training
        if finished or stop or (step % save_every == 0 and step > start_step):
            checkpoint()
        if finished or stop:
            break

        # forward and backward
        torch.manual_seed(seed_of(seed, "dropout", step, rank))
        sums = torch.zeros(len(terms_logged), device=device, dtype=param_dtype)  # the loss terms, then a wish to stop
        keys, each = [], []
        for micro in range(grad_accum):
            watch.at("reading data", step)
            batch = next(batches)
            watch.at("forward")
            keys += batch["key"]
            x = batch["images"].to(device, param_dtype, non_blocking=True)
            chosen = batch["judge"].to(device, param_dtype, non_blocking=True)
            if world > 1:
                judge.require_backward_grad_sync = micro == grad_accum - 1  # one all-reduce a step
            with autocast():
                terms = train_step({"judge": judge}, {"images": x, "judge": chosen}, {}, config)
            each.append(terms["each"])
            watch.at("backward")
            (terms["loss"] / grad_accum).backward()
            sums[:-1] += torch.stack([terms[name].detach() for name in terms_logged[:-1]]) / grad_accum

        # clip, step, clamp
        watch.at("optimizer step")
        sums[-1].fill_(bool(asked_to_stop))  # not sums[-1] = ..., which on CUDA waits for all that is under way
        if world > 1:
            dist.all_reduce(sums)
            sums /= world
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        finite = torch.isfinite(grad_norm) & torch.isfinite(sums).all()
        spike = is_spike(grad_norm, state["grad_norm"], skip_spikes) if skip_spikes else torch.zeros_like(finite)
        taken = finite & ~spike
        optimizer.found_inf = (~taken).float()  # AdamW leaves weights and moments alone where this is 1
        optimizer.step()
        send_updates(owner)
        for p in parameters:
            p.grad = None
        step += 1
        with torch.no_grad():
            torch._foreach_clamp_min_(list(model.heads), 0.0)  # more difference is never more alike

        # log: this step's numbers travel to the host while the next step runs
        if pending:
            stop = settle(pending)
        flags = torch.stack([state["grad_norm"][2], spike, finite])
        numbers = torch.cat([sums[:-1], grad_norm[None], flags, sums[-1:]])
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=device.type == "cuda")
        host.copy_(numbers, non_blocking=True)
        ready = torch.cuda.Event() if device.type == "cuda" else None
        if ready is not None:
            ready.record()
        pending = (step, host, ready, time.time(), keys, each)

    if master:
        print(f"{'finished' if finished else 'stopped'} at step {step} after {time.time() - started:.0f} s: {latest}")
    watch.stop()
    if world > 1:
        dist.destroy_process_group()
    if not finished:
        sys.exit(128 + (asked_to_stop or [signal.SIGTERM])[0])
