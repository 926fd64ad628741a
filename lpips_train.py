"""LPIPS: how different two images look to people, as a distance between features of an ImageNet network.

    from lpips_train import LPIPS
    distance = LPIPS("vgg")(x, y)                                                     # (B,), images in [-1,1]

and its training on human judgements (BAPPS: which of two distorted patches is nearer to the original?). Evaluation
compares it with the published heads, the same network without heads, L2 and SSIM.

    python data/bapps/prepare.py --source=DIR && python lpips_train.py --net=vgg      # one GPU
    python lpips_train.py --net=squeeze --trunk_weights=FILE --workers=0              # a CPU
    torchrun --nproc_per_node=8 lpips_train.py --batch_size=6                         # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 lpips_train.py --batch_size=3
    python lpips_train.py --eval_only=True                                            # only the tables

The same command again resumes the run. An image, in what it prints, is a judged patch with its two distortions.
"""

import importlib.util
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import common
import convert
from checkpoint import UserError, part, reject, with_prefix
from configurator import configure
from data.dataset import loader, permute, seed_of
from data.forms import open_npy
from grid import as_rgb
from metrics import off_mps, ssim

# data
dataset = "data/bapps"  # output folder of data/bapps/prepare.py
workers = 4  # >= 0: processes that read patches; 0 reads in the main one
# model
net = "vgg"  # vgg | alex | squeeze: the trunk, VGG16, AlexNet or SqueezeNet 1.1
trunk_weights = ""  # torchvision's ImageNet weights of it, a .pth; "" fetches them once
train_trunk = False  # train the trunk too, not only the heads
head_weights = ""  # start from these heads, our checkpoint or a published .pth; "" starts anew
dropout = 0.5  # in [0, 1): on the squared differences, in training only
# optimizer: the defaults are ten epochs of BAPPS' 151,400 judgements on one process
batch_size = 50  # >= 1: judgements per process and micro-step
grad_accum = 1  # >= 1: micro-steps per optimizer step
max_steps = 30_280  # >= 1: optimizer steps
lr = 1e-4  # > 0: absolute, nothing rescales it
lr_schedule = "linear"  # linear | constant | cosine | onecycle | multistep: linear falls from half-time on to lr_end
lr_end = 0.0  # in [0, 1]: where linear, cosine and onecycle end, as a share of lr
lr_milestones = (0.6, 0.8, 0.9)  # each in [0, 1]: multistep, shares of max_steps at which lr_decay applies
lr_decay = 0.1  # > 0: multistep, factor at each milestone
warmup_steps = 0  # >= 0: steps of linear warm-up
beta1 = 0.5  # in [0, 1): Adam
beta2 = 0.999  # in [0, 1): Adam
grad_clip = 0.0  # >= 0: largest gradient norm; 0 disables clipping
shard_optimizer = False  # divide the optimizer state among the processes (ZeRO stage 1)
# run
out_dir = "out/lpips"  # checkpoint, log and curves
seed = 0  # of weights, data order and dropout
eval_only = False  # only print the tables for the checkpoint in out_dir, or for head_weights
eval_every = 3000  # >= 1: steps between evaluations
save_every = 1000  # >= 1: steps between checkpoints
log_every = 50  # >= 1: steps between progress lines
dist_timeout = 30.0  # > 0: minutes after which a collective operation fails on ranks whose peers do not answer
device = "auto"  # auto | cpu | cuda | mps: auto is cuda if there is a GPU, else mps if there is one of Apple's
dtype = "auto"  # auto | float32 | bfloat16 | float64: auto is bfloat16 (autocast) on CUDA, else float32
compile = "auto"  # auto | true | false: torch.compile; auto is true on CUDA
deterministic = False  # bit-exact on CUDA too, slower
wandb = False  # send the log to Weights & Biases too

PANELS = {"loss": ("loss",), "accuracy": ("accuracy", "val_2afc", "val_jnd"), "gradient norm": ("grad_norm",)}

# the layers of torchvision's `features` after which LPIPS v0.1 taps activations, and their channels
TAPS = {
    "vgg": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
    "alex": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},
    "squeeze": {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512},
}
MIN_SIDE = {"vgg": 16, "alex": 31, "squeeze": 17}  # pixels; below, a pooling layer has no output
TRUNK_URL = "https://download.pytorch.org/models/"
TRUNK_FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}

# --- the metric ---


class Fire(nn.Module):
    """SqueezeNet's block (Iandola et al. 2016): a narrow 1x1 convolution, then 1x1 and 3x3 in parallel."""

    def __init__(self, channels, narrow, wide):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


def make_trunk(net):
    """The convolutions of VGG16, AlexNet or SqueezeNet 1.1, numbered as in torchvision, up to the last tap."""
    layers, channels = [], 3

    def conv(width, kernel=3, stride=1, padding=1):
        nonlocal channels
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


def load_trunk(net, path=None):
    """torchvision's weights for make_trunk(net), of the model or of its `features`: from path, or fetched once."""
    if path:
        tensors = convert.read_tensors(str(path))
    else:
        path = TRUNK_URL + TRUNK_FILES[net]
        remedy = "download it and set trunk_weights (train_vae.py: lpips_trunk) to the file"
        with checkpoint.reading(path, "could not be fetched", remedy):
            tensors = torch.hub.load_state_dict_from_url(path, map_location="cpu", check_hash=True, weights_only=True)
    tensors = {name.removeprefix("features."): t for name, t in tensors.items()}
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in make_trunk(net).state_dict().items()}
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != shape:
            reject(path, f"{name} is {found}, {net} needs {shape}", f"give {net}'s weights, or set another net")
    return {name: tensors[name].to(torch.float32, copy=True) for name in wanted}  # the file may be mapped


def load_heads(net, path=None):
    """(heads, trunk, hash): a weight >= 0 for each channel of each tap, [(C,), ...].

    path: our checkpoint or out_dir, with the trunk that it trained, else the hash of the frozen one; or a published
    .pth; None is the published v0.1 in the installed package `lpips`, which is not imported; "uniform" is ones.
    """
    channels, trunk, trunk_hash = list(TAPS[net].values()), {}, None
    if path == "uniform":
        return [torch.ones(c) for c in channels], trunk, trunk_hash
    if not path:
        package = importlib.util.find_spec("lpips")
        if package is None:
            raise UserError("the published LPIPS heads are in the package lpips: pip install lpips, or give a file")
        path = f"{package.submodule_search_locations[0]}/weights/v0.1/{net}.pth"
    path = str(path)
    if os.path.isdir(path) or path.endswith(".safetensors"):
        tensors, meta = checkpoint.read(path, "model")
        trunk, trunk_hash = part(tensors, "model.trunk"), meta["model"].get("trunk_hash")
        heads = [t for _, t in sorted(part(tensors, "model.heads").items())]  # fewer than ten
    else:
        tensors = convert.read_tensors(path)
        heads = [tensors.get(f"lin{k}.model.1.weight", torch.zeros(0)).flatten() for k in range(len(tensors))]
        heads = [weight.to(torch.float32, copy=True) for weight in heads]
    if [len(w) for w in heads] != channels:
        found = f"LPIPS heads of {[len(w) for w in heads]} channels, {net} needs {channels}"
        reject(path, found, f"give heads trained on {net}, or set another net")
    if not all((w >= 0).all() for w in heads):
        reject(path, "a head has a weight below 0", "give other heads")
    return heads, trunk, trunk_hash


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, version 0.1 (Zhang et al. 2018).

    forward: floating-point images (B,3,H,W) x 2 in [-1,1], or with normalize=True in [0,1], sides >= MIN_SIDE[net] ->
    distances >= 0 (B,). Frozen, and always in eval mode, whatever the mode of the module that holds it.
    """

    def __init__(self, net="vgg", trunk_weights=None, head_weights=None):
        """net: vgg | alex | squeeze.  trunk_weights: see load_trunk.  head_weights: see load_heads."""
        super().__init__()
        assert net in TAPS, f"net={net!r} must be one of {', '.join(TAPS)}"
        heads, trunk, trunk_hash = load_heads(net, head_weights)
        trunk = trunk or load_trunk(net, trunk_weights)
        self.net, self.trunk_hash = net, checkpoint.hash_weights(trunk)
        if trunk_hash not in (None, self.trunk_hash):
            reject(head_weights, "its heads were trained on other weights of the trunk", "set trunk_weights to those")
        with torch.device("meta"):
            self.trunk = make_trunk(net)
        self.trunk.load_state_dict(trunk, assign=True)
        self.heads = nn.ParameterList(heads)
        # torchvision's ImageNet mean and deviation, for [-1,1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # a parent's train() changes nothing here

    def features(self, x):
        """Images (B,1, 3 or 4,H,W) in [-1,1], made RGB -> the taps' activations, of length 1 over the channels:
        [(B,C,h,w), ...].
        """
        x, taps = (as_rgb(x).to(self.shift.dtype) - self.shift) / self.scale, []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in TAPS[self.net]:
                f = x if x.dtype == torch.float64 else x.float()  # out of autocast's bfloat16
                # the published code adds 1e-10 to the root: where all channels are 0 its gradient is not finite
                taps.append(f * (f.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt())
        return taps

    def distance(self, f, g, dropout=0.0):
        """Distances (B,) between two results of `features`; dropout is for the training of the heads."""
        total = 0.0
        for a, b, weight in zip(f, g, self.heads):
            difference = (a - b).square()  # (B,C,h,w)
            if dropout:
                difference = F.dropout(difference, dropout)
            total = total + (difference * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))
        return total

    def forward(self, x, y, normalize=False):
        for images in (x, y):
            assert images.is_floating_point(), f"LPIPS of {images.dtype} images: scale them to [-1,1] in floating point"
        x, y = (2 * x - 1, 2 * y - 1) if normalize else (x, y)
        return self.distance(self.features(x), self.features(y))


# --- human judgements ---


class Judgements(torch.utils.data.Dataset):
    """Output of data/bapps/prepare.py for task "2afc" (ref, p0, p1) or "jnd" (p0, p1), all categories of a split.

    item(i) -> dict(images (3 or 2,3,S,S) in [-1,1], judge: share of people who chose p1, or saw no difference; key).
    [p] is position p of an endless sequence, a new permutation every epoch, as in data.dataset.Stream.
    """

    def __init__(self, path, task, split, seed=0):
        folder, self.seed, self.parts, end = f"{path}/{task}/{split}", seed, {}, 0
        remedy = "run data/bapps/prepare.py, or set dataset"
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        names = [name for name in names if os.path.exists(f"{folder}/{name}/images.npy")]
        if not names:
            reject(folder, "no judgements here", remedy)
        self.images = [open_npy(f"{folder}/{name}/images.npy") for name in names]
        judged = [open_npy(f"{folder}/{name}/judge.npy") for name in names]
        for name, images, judge in zip(names, self.images, judged):
            are_images = images.ndim == 5 and images.dtype == np.uint8 and images.shape[1:] == self.images[0].shape[1:]
            if not are_images or judge.shape != images.shape[:1] or judge.dtype.kind not in "fiu":
                reject(f"{folder}/{name}", f"judgements {judge.shape} of images {images.shape}", remedy)
            self.parts[name] = slice(end, end := end + len(judge))
        self.judge = torch.from_numpy(np.concatenate(judged).astype(np.float32))
        self.per_item, self.size = self.images[0].shape[1:3]

    def __len__(self):
        return len(self.judge)

    def item(self, i):
        images, (name, rows) = next(pair for pair in zip(self.images, self.parts.items()) if i < pair[1][1].stop)
        x = torch.from_numpy(images[i - rows.start].astype(np.float32) / 127.5 - 1)  # (K,S,S,3)
        x = x.permute(0, 3, 1, 2).contiguous()
        return {"images": x, "judge": self.judge[i], "key": f"{name}/{i - rows.start}"}

    def __getitem__(self, p):
        epoch, at = divmod(int(p), len(self))
        return self.item(permute(at, len(self), seed_of(self.seed, epoch)))


class Judge(nn.Module):
    """Predicts which of two distorted images people choose, from two distances and nothing else.

    Its parameters are what is trained and saved: heads and ranking network, and the trunk only with train_trunk.
    """

    def __init__(self, lpips, train_trunk):
        super().__init__()
        self.settings = {"net": lpips.net, "train_trunk": train_trunk}
        self.settings["trunk_hash"] = None if train_trunk else lpips.trunk_hash
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


# --- loss and scores ---


def train_step(judge, batch, cfg):
    """One forward pass -> {name: scalar term}; "loss" is the one to differentiate.

    batch["images"] (B,3,3,S,S) in [-1,1], ref, p0 and p1; batch["judge"] (B,) in [0,1]. Dropout uses the global
    generator; accuracy is the batch's 2AFC score, with dropout on.
    """
    d0, d1, logit = judge(batch["images"], cfg.dropout)
    loss = F.binary_cross_entropy_with_logits(logit, batch["judge"])
    return {"loss": loss, "accuracy": two_afc(torch.stack([d0, d1], dim=1).detach(), batch["judge"])}


def two_afc(distances, judge):
    """Share of people who agree with the smaller of two distances (N,2); judge (N,) of them chose the second."""
    d0, d1 = distances.unbind(dim=1)
    return torch.where(d0 < d1, 1 - judge, torch.where(d1 < d0, judge, 0.5)).mean()


def average_precision(distances, same):
    """Area under the precision-recall curve (as PASCAL VOC) of "no difference seen"; same (N,): share of people.

    A pair counts as `same` hits and 1 - same misses; pairs are ordered by their distances (N,1).
    """
    same = same[distances.flatten().argsort(stable=True)].double()
    hits = same.cumsum(0)
    precision, recall = hits / torch.arange(1, len(same) + 1, device=same.device), hits / hits[-1]
    precision = precision.flip(0).cummax(0).values.flip(0)  # at this recall or a higher one
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum()


# --- evaluation ---


@torch.no_grad()
def evaluate(metrics, judgements, cfg, machine, autocast):
    """{metric: {category: score}} of functions of two batches: 2AFC agreement, or for JND average precision."""
    count, others = len(judgements), judgements.per_item - 1
    distances = off_mps(torch.zeros(len(metrics), count, others, device=machine.device)).double()
    starts = range(machine.rank * cfg.batch_size, count, machine.world * cfg.batch_size)
    for start in common.progress_bar(starts, "evaluating"):
        end = min(start + cfg.batch_size, count)
        x = torch.stack([judgements.item(i)["images"] for i in range(start, end)])
        x = x.to(machine.device, machine.param_dtype)
        for m, metric in enumerate(metrics.values()):
            for k in range(others):
                with autocast:
                    distances[m, start:end, k] = off_mps(metric(x[:, 0], x[:, k + 1])).double()
    common.sum_over_ranks(distances)  # every pair was measured by one rank
    score, judge = two_afc if others == 2 else average_precision, judgements.judge.to(distances.device)
    return {
        name: {category: score(d[rows], judge[rows]).item() for category, rows in judgements.parts.items()}
        for name, d in zip(metrics, distances)
    }


def table(task, scores, judgements):
    """The scores of `evaluate` as text: a row for each category, a column for each metric."""
    means = {name: sum(row.values()) / len(row) for name, row in scores.items()}
    counts = {name: rows.stop - rows.start for name, rows in judgements.parts.items()} | {"mean": len(judgements)}
    width = max(map(len, [*counts, "category"])) + 2
    lines = [f"{task:5}{'category':{width}}{'judged':>7}" + "".join(f"{name:>11}" for name in scores)]
    for category, count in counts.items():
        row = [means[name] if category == "mean" else scores[name][category] for name in scores]
        lines.append(f"{'':5}{category:{width}}{count:7}" + "".join(f"{value:11.4f}" for value in row))
    return "\n".join(lines)


def other_metrics(cfg, machine):
    """{name: function of two batches}: what trained heads are compared with."""
    heads = {"published": None} if importlib.util.find_spec("lpips") else {}  # optional
    metrics = {name: LPIPS(cfg.net, cfg.trunk_weights, head) for name, head in (heads | {"uniform": "uniform"}).items()}
    metrics = {name: metric.to(machine.device, machine.param_dtype) for name, metric in metrics.items()}
    metrics["L2"] = lambda x, y: (x - y).square().mean(dim=(1, 2, 3))
    return metrics | {"SSIM": lambda x, y: -ssim(off_mps(x), off_mps(y))}


def evaluate_heads(ours, others, validation, cfg, machine, autocast):
    """Print a table for each task, return our scores.  ours: LPIPS or None.  others: of `evaluate`, by task."""
    record = {}
    for task, judgements in validation.items():
        scores = {} if ours is None else evaluate({"ours": ours}, judgements, cfg, machine, autocast)
        if machine.rank == 0:
            print(table(task, scores | others[task], judgements), flush=True)
        for row in scores.values():
            record[f"val_{task}"] = sum(row.values()) / len(row)
            record |= {f"val_{task}_{category}": score for category, score in row.items()}
    return record


if __name__ == "__main__":
    common.install_excepthook()
    cfg = configure(globals())

    # processes, device, precision
    machine = common.setup(cfg)
    rank, world = machine.rank, machine.world
    autocast = torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.precision == "bfloat16")

    # a checkpoint to resume
    latest, tensors, meta = f"{cfg.out_dir}/latest.safetensors", {}, {}
    resumed = os.path.exists(latest) and not (cfg.eval_only and cfg.head_weights)
    if resumed:
        tensors, meta = checkpoint.read(latest)
        common.check_same_settings(latest, meta, {"stage": "lpips"})

    # data
    images = Judgements(cfg.dataset, "2afc", "val" if cfg.eval_only else "train", cfg.seed)
    validation = {"2afc": Judgements(cfg.dataset, "2afc", "val")}
    if os.path.isdir(f"{cfg.dataset}/jnd/val"):
        validation["jnd"] = Judgements(cfg.dataset, "jnd", "val")
    side = min(judgements.size for judgements in (images, *validation.values()))
    if side < MIN_SIDE[cfg.net]:
        reject(cfg.dataset, f"patches of {side} pixels, {cfg.net} needs {MIN_SIDE[cfg.net]}", "choose another net")
    description = checkpoint.read_json(f"{cfg.dataset}/meta.json", "run data/bapps/prepare.py to its end")["what"]

    # model
    torch.manual_seed(seed_of(cfg.seed, "init"))
    if cfg.head_weights and load_heads(cfg.net, cfg.head_weights)[1] and not (cfg.train_trunk or cfg.eval_only):
        reject(cfg.head_weights, "holds a trained trunk too, which only --train_trunk=True keeps", "set that")
    lpips = LPIPS(cfg.net, cfg.trunk_weights, cfg.head_weights or "uniform")
    if not cfg.head_weights:
        for weight in lpips.heads:
            weight /= len(weight) ** 0.5  # the magnitude of PyTorch's own initial weights
    lpips.to(machine.device, machine.param_dtype, memory_format=torch.channels_last)
    model = Judge(lpips, cfg.train_trunk).to(machine.device, machine.param_dtype)

    # optimizer: AdamW without weight decay is Adam
    parameters = list(model.parameters())
    optimizer = common.adamw(parameters, cfg, machine)

    # weights and state of a checkpoint
    if resumed:
        common.check_same_settings(latest, meta["model"], model.settings)
        model.load_state_dict(part(tensors, "model"))
        common.load_optimizer_state(optimizer, model, "optim", tensors)
    del tensors

    # what the other metrics score never changes
    metrics = other_metrics(cfg, machine)
    others = {task: evaluate(metrics, judged, cfg, machine, autocast) for task, judged in validation.items()}
    del metrics
    if cfg.eval_only:
        ours = lpips if cfg.head_weights or resumed else None  # None: only what is published
        evaluate_heads(ours, others, validation, cfg, machine, autocast)
        common.leave()

    step, images_per_step, micro_steps = common.start(cfg, world, meta, latest)
    common.assert_same_on_all_ranks(step=step, images=len(images))

    # log
    with torch.device("meta"):  # three images forward, and backward where the trunk is trained
        x = torch.zeros(3, 3, images.size, images.size)
        tflop = (3 if cfg.train_trunk else 1) * common.count_tflop(make_trunk(cfg.net), x)
    log = common.Log(cfg, machine, images_per_step, f"{len(images)} judgements", meta, tflop)
    counts = f"{len(images)} training and {len(validation['2afc'])} validation judgements"
    log.print(f"{counts} in {cfg.dataset}: {description}")
    log.print(f"{sum(p.numel() for p in parameters):,} parameters, {tflop:.4g} TFLOP per image")

    # compile, DDP, loader
    net = torch.compile(model) if machine.compile else model
    if world > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, forward_sync_buffers=False)
    collate = torch.utils.data.default_collate
    batches = loader(images, step, cfg.max_steps, cfg.batch_size, micro_steps, rank, world, cfg.workers, collate)
    model.train()

    def due(every):
        return every > 0 and step % every == 0 and step > start_step

    # training loop
    stop, start_step = common.Stop(), step
    while True:
        lr_now = common.learning_rate(step, cfg)
        common.set_lr(optimizer, lr_now)

        # evaluate, save, stop
        last, stopping = step >= cfg.max_steps, stop.agreed()
        evaluating, saving = last or due(cfg.eval_every), last or stopping or due(cfg.save_every)
        if evaluating or saving:
            log.check()  # nothing is saved after a step that was not finite
            if evaluating:
                log.evaluation(step, evaluate_heads(lpips, others, validation, cfg, machine, autocast))
                if rank == 0:
                    common.plot_log(cfg.out_dir, PANELS)
            if saving:
                state = common.optimizer_state(optimizer, model, "optim") | with_prefix("model", model.state_dict())
                if rank == 0:
                    checkpoint.write(latest, state, log.header(step, stage="lpips", model=model.settings))
            log.restart_clock()  # this was not training time
        if last or stopping:
            break

        # forward and backward
        torch.manual_seed(seed_of(cfg.seed, "dropout", step, rank))
        totals = {}
        for micro in range(micro_steps):
            batch = next(batches)
            log.saw(batch)
            on_cuda = machine.device.type == "cuda"
            for name in ("images", "judge"):
                batch[name] = batch[name].to(machine.device, machine.param_dtype, non_blocking=on_cuda)
            net.require_backward_grad_sync = micro == micro_steps - 1  # one all-reduce a step
            with autocast:
                terms = train_step(net, batch, cfg)
            (terms["loss"] / micro_steps).backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0.0) + term.detach() / micro_steps

        # optimizer step, heads >= 0: nothing carried to the next step changes where ok is false
        totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip or math.inf)
        ok = common.all_finite(*totals.values())  # the same on all ranks
        common.inner(optimizer).found_inf = (~ok).float()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_clamp_min_(list(model.heads), 0.0)  # more difference is never more alike
        step += 1
        log.step(step, totals, ok, lr_now)

    log.end(step, stop)
