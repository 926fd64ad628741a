"""Stage 2: trains the denoiser on the latents of a trained autoencoder, or on pixels.

    python train_ldm.py config/shapes_ldm.py                                          # 2 CPU cores, minutes
    python train_ldm.py --dataset=DIR --first_stage=out/vae --cond=text               # one GPU
    python train_ldm.py --dataset=DIR --init_from=FILE_OR_FOLDER --lr=1e-5            # fine-tunes, Stable Diffusion too
    torchrun --nproc_per_node=8 train_ldm.py --dataset=DIR --first_stage=out/vae      # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_ldm.py --dataset=DIR

DIR is what stage 1 was trained on, or another; captions or labels lie in it. The same command again resumes the run.
"""

import contextlib
import copy
import datetime
import inspect
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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from attention import BACKENDS, choose_backend, use_attention
from configurator import configure
from convert import find_checkpoint, hash_weights, is_ours, load_denoiser, load_foreign, power_exponent, read_checkpoint
from data.cache import LatentCache, Remembered, TextCache, check_shared
from data.dataset import BadImage, Dataset, Stream, collate, loader, seed_of
from data.tasks import (
    DEGRADATIONS,
    TASKS,
    WithCondition,
    augment_low,
    check_task,
    image_condition,
    layout_string,
    show_condition,
)
from diffusion import OBJECTIVES, make_schedule, sample_times, samplers, t_max, target, to_x0, unet_time
from sample import Pipeline, generate, read_prompts, save_grid
from text import CLIPTextEncoder, TextEncoder, make_tokenizer
from unet import Denoiser, Rescaler, UNet
from vae import VAE
from watch import Watch, fresh_store

# data
dataset = "data/openimages"  # folder of images, tar or parquet shards, or images.npy; or s3://bucket/*.tar and the like
image_size = 256  # side in pixels of the pictures it learns to draw
flip = True  # mirror half of the images
workers = 4  # processes that read latents or decode images; 0 does it in the main one
first_stage = "out/vae"  # the autoencoder: a stage-1 checkpoint or its out_dir | none (diffuse pixels)
cache_latents = True  # encode every image once, before training; False encodes at every step
cache_text = False  # keep the embeddings of a frozen text encoder on disk too: 118 KB a caption, openclip_h 158 KB
cache_dir = "cache"  # where these and the index of shards are kept, the same folder for all nodes
cache_gb = 64.0  # GB of shards of a dataset given by URL kept there at most
latents_on_device = "auto"  # cached latents in device memory: auto (CUDA, below a fifth of what is free) | true | false
init_from = ""  # start from this model, ours or another's, as it was built: U-Net, text, process, autoencoder, task
# conditioning
cond = "text"  # none | class | text | layout (boxes with names, as a sequence of tokens)
cond_drop = 0.1  # share of examples trained without their condition, for guidance
class_embed = "add"  # a class is told by: add (to the time embedding) | token (a context of one token, LDM's cin256)
text_encoder = "joint"  # joint (trained here); frozen: clip_l (Stable Diffusion 1's) | openclip_h (2's) | other CLIP
tower_weights = ""  # file of the frozen text encoder's weights, or the folder of a pipeline that has it
clip_vocab = ""  # CLIP's bpe_simple_vocab_16e6.txt.gz; "" takes the one of an installed open_clip
tokenizer = "auto"  # auto (DATASET/bpe.tiktoken if there, else bytes) | bytes | a .tiktoken file | a tiktoken name
text_width = 512  # of the text encoder
text_layers = 6  # of the text encoder
text_heads = 8  # of the text encoder
text_length = 77  # tokens of a prompt, the end token included
task = "none"  # none | inpaint | sr (super-resolution) | semantic (label maps): shown to it beside the noise
sr_scale = 4  # sr: how many times larger than what it is shown
sr_kind = "bsr"  # sr: how images are made small: bicubic | bsr (blur, noise and JPEG too, in random order)
sr_noise = 0  # sr: largest level, of 1000, of noise added to the small image; the level is told (SD's x4 upscaler: 350)
# model: what UNet() takes; the defaults are Stable Diffusion 2's
channels = 320  # at the latents' full side
channel_mult = (1, 2, 4, 4)  # times channels: widths of the levels, each half the side of the one before
num_res_blocks = (2,)  # in each level on the way down, one number or one for each; one more on the way up
attention_ds = (1, 2, 4)  # down-sampling factors whose levels have attention
num_heads = 0  # heads of every attention, or
head_dim = 64  # channels of each head; the other one is 0
transformer_depth = 1  # blocks of each spatial transformer; 0 is plain self-attention, without text
context_pool = False  # the mean of the text joins the time embedding too (GLIDE, Imagen)
linear_proj = True  # into and out of the transformers: linear (SD 2) or 1x1 convolution (SD 1)
self_attention = (True,)  # False: a level's transformers (not the middle's) see only text; one value or one for each
middle_attention = True  # attention in the middle
linear_attention = False  # linear-time self-attention
qk_norm = False  # RMS-normalised queries and keys
scale_shift = False  # the time scales and shifts (FiLM) instead of being added
resblock_updown = False  # residual blocks change the side instead of convolutions
resample = "conv"  # conv | pool
unet_patch = 1  # p > 1 folds p x p latents into channels first: fast small models, and pixels
norm_groups = 32  # groups of every GroupNorm
unet_dropout = 0.0  # in every residual block
# diffusion
objective = "flow"  # eps | v | x0 | flow
schedule = "flow"  # flow | cosine | tables: linear, scaled_linear (SD), squared_cosine, sqrt, quadratic, sigmoid
beta_start = 0.00085  # of the tables, but for squared_cosine
beta_end = 0.012  # of the tables, but for squared_cosine
zero_snr = False  # rescales a table so that it ends in pure noise (Lin et al. 2024); not with eps
timesteps = "logit_normal"  # how training draws t: logit_normal (dwells on the middle) | uniform | shifted (to noise)
t_mean = 0.0  # of the normal below logit_normal (Esser et al. 2024); above 0 is noisier
t_std = 1.0  # of the normal below logit_normal
t_shift = 3.0  # shifted: t becomes t_shift t / (1 + (t_shift - 1) t) (Esser et al. 2024, eq. 23)
loss_type = "mse"  # mse | l1 | huber
huber_delta = 0.1  # huber: where the square becomes linear
loss_weight = "none"  # of each noise level: none | min_snr (Hang et al. 2023) | uncertainty (learned; EDM2)
min_snr_gamma = 5.0  # min_snr: the signal-to-noise ratio above which x0's error counts no more
offset_noise = 0.0  # noise of this deviation added to whole channels, for very dark and bright pictures; 0.1 is usual
# optimizer
batch_size = 32  # images per process and micro-step
grad_accum = 1  # micro-steps per optimizer step
max_steps = 400_000  # optimizer steps
lr = 1e-4  # absolute: nothing rescales it
lr_schedule = "constant"  # constant | cosine (to lr_end) | onecycle (up and down to lr_end) | multistep
lr_end = 0.0  # where cosine and onecycle end, as a share of lr
lr_milestones = (0.6, 0.8, 0.9)  # multistep: shares of max_steps at which lr_decay strikes
lr_decay = 0.1  # multistep: factor at each milestone
warmup_steps = 1000  # steps of linear warm-up
beta1 = 0.9  # AdamW
beta2 = 0.999  # AdamW
weight_decay = 0.01  # AdamW, on matrices and kernels only
grad_clip = 1.0  # largest gradient norm; 0 is no clipping
skip_spikes = 0.0  # leave out a step whose gradient norm is over so many times its running mean; 0 leaves out none
shard_optimizer = False  # each process keeps the optimizer state of its share of the parameters alone (ZeRO stage 1)
ema_decay = 0.9999  # of the averaged weights, warmed up as (1 + n) / (10 + n)
ema_stds = ()  # averages of these relative lengths too, 0.05,0.1 say: sample.py --ema_std makes others from them
# run
out_dir = "out/ldm"  # checkpoint, log and pictures
seed = 0  # of weights, data order and noise
eval_every = 5000  # steps between evaluations: validation loss and a sample grid
val_images = 1000  # validation images, each with its own fixed noise and time
prompts = ""  # file with a prompt a line for the sample grids; else captions of the validation set
n_samples = 16  # pictures of a grid
sampler = "unipc"  # of the grids: see diffusion.py
sample_steps = 20  # of the sampler
cfg = 3.0  # guidance scale of the grids; the functions below call all the settings, a dict, cfg
save_every = 1000  # steps between checkpoints
snapshot_every = 0  # steps between kept EMA snapshots ema_STEP.safetensors; 0 keeps none
log_every = 50  # steps between progress lines
hang_timeout = 30.0  # minutes in which a rank makes no progress, after which the run says which one and ends
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto (bfloat16 on CUDA, else float32) | float32 | bfloat16 | float64
checkpointing = False  # computes the U-Net's activations twice instead of keeping them: less memory, 1.4 times the time
compile = "auto"  # torch.compile: auto (on CUDA) | true | false
attention = "auto"  # auto (fastest) | triton | xformers | sdpa | sdpa_flash, _cudnn, _efficient, _math | reference
deterministic = False  # bit-exact on CUDA too, slower
wandb = False  # send the log to Weights & Biases too

# dense bf16 (V100: fp16)
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "V100": 125}
CONDITIONS = ("tokens", "context", "y", "concat")  # what a batch may bring for Denoiser.forward


def process_of(cfg):
    return make_schedule(cfg["schedule"], cfg["beta_start"], cfg["beta_end"], zero_snr=cfg["zero_snr"])


def draw_times(u, cfg):
    """Times (B,) of the training distribution from u (B,) uniform in [0,1)."""
    if cfg["timesteps"] == "logit_normal":
        u = torch.sigmoid(cfg["t_mean"] + cfg["t_std"] * torch.special.ndtri(u))
    elif cfg["timesteps"] == "shifted":
        u = cfg["t_shift"] * u / (1 + (cfg["t_shift"] - 1) * u)
    process = process_of(cfg)
    t = u * t_max(cfg["objective"], process)
    if process.discrete:  # on the table's grid; u may have been rounded up to 1
        t = ((torch.floor(t * process.discrete) + 1) / process.discrete).clamp(max=1)
    return t


def prediction_error(models, batch, noise, cfg):
    """error (B,), the objective's mean over an example; its weight (B,); and the learned log-variance (B,) or None.

    batch["x0"] (B,C,h,w) of unit variance; with a joint text encoder batch["tokens"] and batch["null_tokens"] (B,L),
    with a frozen one batch["context"] and batch["null_context"] (B,L,D), with classes batch["y"] and batch["null_y"]
    (B,); with a task batch["concat"], see data.tasks.image_condition, and as batch["y"] how noisy a small image is.
    What has no null_ twin is never dropped. noise["eps"] like x0, noise["t"], noise["drop"] (B,) uniform in [0,1); with
    offset_noise noise["offset"] (B,C,1,1).
    """
    x0, eps, process = batch["x0"], noise["eps"], process_of(cfg)
    if "offset" in noise:
        eps = eps + cfg["offset_noise"] * noise["offset"]
    t = draw_times(noise["t"], cfg)
    alpha, sigma = (f(t).to(x0.dtype).view(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
    dropped = noise["drop"] < cfg["cond_drop"]
    condition = {name: batch[name] for name in CONDITIONS if name in batch}
    for name in condition:
        if f"null_{name}" in batch:
            mask = dropped.view(-1, *[1] * (batch[name].ndim - 1))
            condition[name] = torch.where(mask, batch[f"null_{name}"], batch[name])
    prediction = models["denoiser"](alpha * x0 + sigma * eps, unet_time(process, t).to(x0.dtype), **condition)
    prediction, log_variance = prediction if isinstance(prediction, tuple) else (prediction, None)
    prediction, wanted = prediction.to(x0.dtype), target(cfg["objective"], x0, eps, alpha, sigma)
    if cfg["loss_type"] == "mse":
        error = (prediction - wanted).square()
    elif cfg["loss_type"] == "l1":
        error = (prediction - wanted).abs()
    else:
        error = F.huber_loss(prediction, wanted, reduction="none", delta=cfg["huber_delta"])
    weight = torch.ones_like(t, dtype=x0.dtype)
    if cfg["loss_weight"] == "min_snr":
        # x0's squared error is to count min(snr, gamma) (Hang et al. 2023). to_x0 is linear: what it makes of a
        # prediction of 1 at x = 0 is how much larger x0's error is than the prediction's
        snr = (alpha / sigma.clamp(min=1e-12)).square()
        times = to_x0(cfg["objective"], torch.ones_like(alpha), torch.zeros_like(alpha), alpha, sigma)
        weight = (snr.clamp(max=cfg["min_snr_gamma"]) * times.square()).flatten()
    return error.mean(dim=(1, 2, 3)), weight, log_variance


def train_step(models, batch, noise, cfg):
    """One forward pass -> {name: loss term}; "loss" is the one to differentiate, "error" not weighted, "each" (B,)."""
    error, weight, log_variance = prediction_error(models, batch, noise, cfg)
    loss = weight * error
    if log_variance is not None:
        loss = error / log_variance.exp() + log_variance  # as in Karras et al. 2024 (EDM2)
    return {"loss": loss.mean(), "error": error.mean(), "each": loss.detach()}


@torch.no_grad()
def evaluate(denoiser, examples, count, cfg, rank, world, device, autocast):
    """Unweighted loss over `count` validation images, in all and by tenths of t; each has its own noise and t for ever.

    examples(rows) gives the batch of those images.
    """
    sums = torch.zeros(2, 10, dtype=torch.float64, device=device)
    for start in range(rank, count, world * cfg["batch_size"]):
        rows = range(start, min(start + world * cfg["batch_size"], count), world)
        batch = examples(rows)
        like, shape = batch["x0"], batch["x0"].shape[1:]
        eps = [torch.randn(shape, generator=torch.Generator().manual_seed(seed_of("val", i))) for i in rows]
        t = (0.5 + torch.tensor(rows, dtype=torch.float64) * 0.6180339887498949) % 1.0  # golden ratio: evenly spread
        keep = torch.ones(len(rows), device=device)  # above any cond_drop: all keep their condition
        noise = {"eps": torch.stack(eps).to(like), "t": t.to(like), "drop": keep}
        with autocast():
            losses, _, _ = prediction_error({"denoiser": denoiser}, batch, noise, cfg | {"timesteps": "uniform"})
        for k, values in enumerate((losses.double(), torch.ones_like(losses).double())):
            sums[k].index_add_(0, (t * 10).long().to(device), values)
    if world > 1:
        dist.all_reduce(sums)
    bins = [s / n if n else None for s, n in sums.T.tolist()]
    return {"val_loss": (sums[0].sum() / sums[1].sum()).item(), "val_loss_by_t": bins}


@torch.no_grad()
def example_predictions(denoiser, vae, batch, eps, cfg, autocast):
    """What the network takes x_t for: (B,6,3,H,W) on the CPU, the truth and x0_hat at t = 0.1, 0.3, 0.5, 0.7, 0.9."""
    process, x0, out = process_of(cfg), batch["x0"], [batch["x0"]]
    condition = {name: batch[name] for name in CONDITIONS if name in batch}
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        t = torch.full((len(x0),), t, dtype=x0.dtype, device=x0.device)
        alpha, sigma = (f(t).view(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
        x_t = alpha * x0 + sigma * eps
        with autocast():
            prediction = denoiser(x_t, unet_time(process, t), **condition)
        out.append(to_x0(cfg["objective"], prediction.to(x0.dtype), x_t, alpha, sigma))
    with autocast():
        out = [x if vae is None else vae.decode(vae.denormalize(x)) for x in out]
    return torch.stack(out, dim=1).float().cpu().clamp(-1, 1)


# -- averages of any length (EDM2) --


@torch.no_grad()
def update_power_ema(averaged, current, step, std):
    """As update_ema, with d = (1 - 1/n)^(gamma + 1)."""
    beta = (1 - 1 / step) ** (power_exponent(std) + 1)
    torch._foreach_lerp_(averaged, current, 1 - beta)


# -- what stands in train_vae.py too, line for line --


def learning_rate(step, cfg):
    """The learning rate of optimizer step `step` (counted from 0)."""
    if step < cfg["warmup_steps"] and cfg["lr_schedule"] != "onecycle":
        return cfg["lr"] * (step + 1) / (cfg["warmup_steps"] + 1)
    if cfg["lr_schedule"] == "constant":
        return cfg["lr"]
    if cfg["lr_schedule"] == "multistep":
        return cfg["lr"] * cfg["lr_decay"] ** sum(step >= m * cfg["max_steps"] for m in cfg["lr_milestones"])
    done = min(1.0, (step - cfg["warmup_steps"]) / max(1, cfg["max_steps"] - cfg["warmup_steps"]))
    if cfg["lr_schedule"] == "onecycle" and step < cfg["warmup_steps"]:  # up from lr / 25 (Smith & Topin 2017)
        return cfg["lr"] * (1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * step / cfg["warmup_steps"])))
    return cfg["lr"] * (cfg["lr_end"] + (1 - cfg["lr_end"]) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def update_ema(averaged, current, step, decay):
    """averaged <- d averaged + (1 - d) current, lists of tensors, with d = min(decay, (1 + n) / (10 + n)).

    n = 1, 2, ... is the number of the optimizer step it comes after.
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(averaged, current, 1 - d)


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
    """loss.png: training and validation loss over steps, and the last validation loss over t."""
    try:
        import matplotlib
    except ImportError:  # an extra: no reason to lose a run
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(f"{out_dir}/log.jsonl") as f:
        records = [json.loads(line) for line in f]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    for axis, names in zip(axes, (("error", "val_loss"), ("grad_norm",))):
        for name in names:
            points = [(r["step"], r[name]) for r in records if r[name] is not None]
            if points:
                axis.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None)
                axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.legend()
    by_t = [(r["step"], r["val_loss_by_t"]) for r in records if r["val_loss_by_t"]]
    for step, bins in by_t[-1:] if len(by_t) < 2 else (by_t[0], by_t[-1]):
        points = [(0.05 + 0.1 * i, b) for i, b in enumerate(bins) if b is not None]
        axes[2].plot(*zip(*points), marker=".", label=f"validation loss at step {step}")
    axes[2].set_xlabel("t: data to noise")
    axes[2].legend()
    figure.tight_layout()
    figure.savefig(f"{out_dir}/loss.png", dpi=80)
    plt.close(figure)


def inherit(config, model, path):
    """The settings of a model to start from (a checkpoint's meta["model"]); ValueError where others are asked for."""
    names = "cond class_embed objective schedule beta_start beta_end zero_snr text_encoder task sr_scale sr_noise"
    found = {name: model[name] for name in names.split() if name in model}
    found |= model["unet"] | (model["text"] or {})
    if found.get("class_embed") == "token":
        found["text_width"] = model["unet"]["context_dim"]
    found["num_res_blocks"], found["self_attention"] = (
        tuple(value) if isinstance(value, (tuple, list)) else (value,)
        for value in (found["num_res_blocks"], found["self_attention"])
    )
    found = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if name in config}
    free = ("unet_dropout",)
    rows = [
        f"{name}: {value} in the model, {config[name]} asked for"
        for name, value in found.items()
        if name in config.given and name not in free and config[name] != value
    ]
    if rows:
        raise ValueError(f"{path} brings its own settings ({'; '.join(rows)}): leave them out")
    return {name: value for name, value in found.items() if name not in free or name not in config.given}


def count_tflop(denoiser, shape):
    """TFLOP of training on one example: forward and twice that for backward, counted operator by operator."""
    from torch.utils.flop_counter import FlopCounterMode

    twin, settings = copy.deepcopy(denoiser).to("meta", torch.float32), denoiser.unet.settings

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(1, *shape, dtype=dtype, device="meta")

    condition = {}
    if twin.text is not None:
        condition["tokens"] = zeros(twin.text.length, dtype=torch.long)
    elif settings["context_dim"] and twin.class_tokens is None:
        condition["context"] = zeros(77, settings["context_dim"])
    if settings["num_classes"] or twin.class_tokens is not None:
        condition["y"] = zeros(dtype=torch.long)
    if twin.rescaler is not None:
        scale = twin.rescaler.factor
        condition["concat"] = zeros(twin.rescaler.conv.in_channels, shape[1] * scale, shape[2] * scale)
    elif settings["concat_channels"]:
        condition["concat"] = zeros(settings["concat_channels"], *shape[1:])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(zeros(*shape), zeros(), **condition)
    return 3 * counter.get_total_flops() / 1e12


def check_settings(cfg):
    for name, choices in (
        ("cond", ("none", "class", "text", "layout")),
        ("class_embed", ("add", "token")),
        ("text_encoder", ("joint", *CLIPTextEncoder.towers, "other")),
        ("latents_on_device", ("auto", "true", "false", "True", "False")),
        ("task", TASKS),
        ("sr_kind", DEGRADATIONS),
        ("objective", OBJECTIVES),
        ("timesteps", ("uniform", "logit_normal", "shifted")),
        ("loss_type", ("mse", "l1", "huber")),
        ("loss_weight", ("none", "min_snr", "uncertainty")),
        ("sampler", tuple(samplers)),
        ("lr_schedule", ("constant", "cosine", "onecycle", "multistep")),
        ("device", ("auto", "cpu", "cuda")),
        ("dtype", ("auto", "float32", "bfloat16", "float64")),
        ("compile", ("auto", "true", "false", "True", "False")),
        ("attention", BACKENDS),
    ):
        if cfg[name] not in choices:
            raise ValueError(f"{name}={cfg[name]} is not one of {', '.join(choices)}")
    counts = ("batch_size", "grad_accum", "max_steps", "eval_every", "save_every", "log_every", "val_images")
    for name in (*counts, "n_samples", "sample_steps", "sr_scale"):
        if cfg[name] < 1:
            raise ValueError(f"{name}={cfg[name]} must be at least 1")
    for name in ("lr", "hang_timeout", "cache_gb", "t_std", "t_shift", "beta_start", "huber_delta", "min_snr_gamma"):
        if not cfg[name] > 0:
            raise ValueError(f"{name}={cfg[name]} must be above 0")
    for name in ("grad_clip", "skip_spikes", "warmup_steps", "weight_decay", "snapshot_every", "offset_noise"):
        if cfg[name] < 0:
            raise ValueError(f"{name}={cfg[name]} must not be negative: 0 does without it")
    for name in ("cond_drop", "ema_decay", "lr_end", "beta1", "beta2"):
        if not 0 <= cfg[name] <= 1:
            raise ValueError(f"{name}={cfg[name]} must lie between 0 and 1")
    if 0 < cfg["skip_spikes"] <= 1:
        raise ValueError(f"skip_spikes={cfg['skip_spikes']} would leave out most steps: set it above 1, 5 say, or to 0")
    if not cfg["beta_start"] < cfg["beta_end"] < 1:
        raise ValueError(f"beta_start={cfg['beta_start']}, beta_end={cfg['beta_end']}: the first must be the smaller")
    if cfg["task"] == "sr" and cfg["sr_noise"] and cfg["cond"] == "class":
        raise ValueError("sr_noise and cond=class both want the class embedding: set one of them to 0 or none")
    if not 0 <= cfg["sr_noise"] < 1000:
        raise ValueError(f"sr_noise={cfg['sr_noise']} is not a level: choose 0 to 999")
    if cfg["cond"] == "text" and (cfg["text_encoder"] == "joint") != (not cfg["tower_weights"]):
        wants = "no tower_weights, it is trained here" if cfg["text_encoder"] == "joint" else "tower_weights=FILE"
        raise ValueError(f"text_encoder={cfg['text_encoder']} wants {wants}")
    if cfg["cond"] != "none" and not cfg["cond_drop"] and cfg["cfg"] != 1 and not cfg["init_from"]:
        remedy = "set cfg=1, here and for sample.py, or cond_drop=0.1"
        raise ValueError(f"cond_drop=0 trains no empty condition, for cfg={cfg['cfg']} to guide away from: {remedy}")
    joint = cfg["cond"] == "text" and cfg["text_encoder"] == "joint"
    for names, fits, reason in (
        ("text_encoder", cfg["cond"] == "text", "cond=text"),
        ("tower_weights clip_vocab cache_text", cfg["cond"] == "text" and not joint, "a frozen text_encoder"),
        ("latents_on_device", cfg["cache_latents"] and cfg["first_stage"] != "none", "cached latents"),
        ("tokenizer", joint, "cond=text and text_encoder=joint"),
        ("prompts", cfg["cond"] in ("text", "layout") and cfg["task"] == "none", "cond=text, or layout, and no task"),
        ("class_embed", cfg["cond"] == "class", "cond=class"),
        ("sr_scale sr_kind sr_noise", cfg["task"] == "sr", "task=sr"),
    ):
        for name in names.split():
            if name in getattr(cfg, "changed", ()) and not fits:
                raise ValueError(f"{name}={cfg[name]} has a meaning for {reason} alone: leave it out")
    for std in cfg["ema_stds"]:
        if not 0.01 <= std <= 0.25:
            raise ValueError(f"ema_stds: {std} is no relative length: choose between 0.01 and 0.25")
    sample_times(cfg["sample_steps"], process_of(cfg), cfg["objective"])  # says if there are too many


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

    # a model to start from brings its own settings; of a run that goes on they are in its checkpoint
    latest, weights, sr_schedule = f"{out_dir}/latest.safetensors", None, None
    resumed = os.path.exists(latest)
    if init_from:
        source = latest if resumed else find_checkpoint(init_from)
        if is_ours(source):
            meta = read_checkpoint(source)[1]
            if meta["stage"] != "ldm":
                raise ValueError(f"init_from={init_from} is an autoencoder: name it with first_stage")
            weights = None if resumed else load_denoiser(source)
            brought = {name: meta["config"][name] for name in ("tower_weights", "clip_vocab", "first_stage")}
            if not resumed and meta["vae"] is not None:
                brought["first_stage"] = source
        else:
            told = {name: config.given[name] for name in ("num_heads", "head_dim") if name in config.given}
            told |= {"objective": config.given.get("objective", ""), "otherwise": objective}
            weights, autoencoder, frozen_text, meta = load_foreign(source, clip_vocab, **told)
            brought = {"first_stage": "none" if autoencoder is None else source}
            brought |= {"tower_weights": source} if frozen_text is not None else {}
            autoencoder = frozen_text = None
        began = meta["model"]
        if began["cond"] == "layout":
            raise ValueError(f"{init_from} draws layouts of the objects of its own data: it cannot be gone on from")
        sr_schedule = began.get("sr_schedule")
        brought = {name: value for name, value in brought.items() if name not in config.given}
        for name, value in (brought | inherit(config, began, init_from)).items():
            config[name] = globals()[name] = value
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
    if attention != "auto":
        choose_backend(attention, device, getattr(torch, dtype), head_dim)  # what cannot run here is said at once
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    # data
    images = Dataset(dataset, "train", image_size, cache_dir, cache_gb)
    stream = Stream(images, seed, flip=flip)
    try:
        validation = Dataset(dataset, "val", image_size, cache_dir, cache_gb)
    except ValueError:  # too few images to set any aside
        validation = images
    num_classes = images.num_classes if cond == "class" else 0
    if cond == "class" and not num_classes:
        raise ValueError(f"cond=class, but the images in {dataset} have no labels: use cond=none or cond=text")
    check_task(images, task, sr_scale, sr_kind, cond == "layout")
    val_count = min(len(validation), val_images)  # images spread over all, which may be sorted by class

    def told_of(images, i):
        """The captions of image i, or its layout as one."""
        return [layout_string(images.boxes(i), object_names)] if cond == "layout" else images.meta(i)["text"]

    object_names, captions = images.object_classes if cond == "layout" else None, []
    for i in range(val_count if cond in ("text", "layout") else 0):
        with contextlib.suppress(BadImage):  # a caption that does not read; training names and counts them
            captions += told_of(validation, i * len(validation) // val_count)[:1]
    if cond == "text" and not captions:
        where = f"the validation images in {dataset}" if validation is not images else f"the images in {dataset}"
        raise ValueError(f"cond=text, but {where} have no captions: add them, or use cond=none or cond=class")

    # resume, first half: a checkpoint brings its own autoencoder and tokenizer
    step, images_per_step = 0, batch_size * grad_accum * world
    if master:
        os.makedirs(out_dir, exist_ok=True)
    if resumed:
        tensors, meta = load_checkpoint(latest, "ldm")
        before = dict(class_embed="add", zero_snr=False, uncertainty=False, ema_stds=[], task="none")
        meta["model"] = before | dict(text_encoder="joint", tower_hash=None) | meta["model"]  # older files do not say
        now = {name: config[name] for name in ("cond", "text_encoder", "task")}
        now["first_stage"] = "none" if first_stage == "none" else "vae"
        check_same_model(latest, meta["model"], now)
        if meta["config"].get("init_from", "") != init_from:
            then = meta["config"].get("init_from", "")
            raise ValueError(f"{latest} is of a run with init_from={then!r}, not {init_from!r}: use another out_dir")

    # first stage: frozen, or none
    param_dtype = torch.float64 if dtype == "float64" else torch.float32
    vae, latent_shape = None, (3, image_size, image_size)
    if first_stage != "none":
        vae = VAE.from_pretrained(latest if resumed else first_stage)
        if resumed and os.path.exists(first_stage):
            if hash_weights(VAE.from_pretrained(first_stage)) != hash_weights(vae):
                raise ValueError(f"{latest} was trained on another autoencoder than {first_stage}: use another out_dir")
        if not vae.has_latent_statistics:
            raise ValueError(
                f"{first_stage} has no latent statistics: finish its training, or run "
                f"train_vae.py with its settings and --measure_latents"
            )
        if image_size % vae.factor:
            raise ValueError(f"image_size={image_size} is not a multiple of the autoencoder's {vae.factor}")
        vae.to(device, param_dtype, memory_format=torch.channels_last)
        latent_shape = (vae.latent_channels, image_size // vae.factor, image_size // vae.factor)

    # model
    torch.manual_seed(seed_of(seed, "init"))
    # text: an encoder trained here, part of the model; tower: a frozen one beside it; rescaler: shrinks label maps
    text, tower, tower_hash, class_tokens, rescaler, context_dim, unet_classes = None, None, None, None, None, 0, 0
    if cond == "layout":
        source = bytes(tensors["text.bpe"].tolist()) if resumed else "layout " + json.dumps({"names": object_names})
        text = TextEncoder(text_width, text_layers, text_heads, text_length, source)
    elif cond == "text" and text_encoder == "joint":
        if tokenizer == "auto":
            tokenizer = f"{dataset}/bpe.tiktoken" if os.path.exists(f"{dataset}/bpe.tiktoken") else "bytes"
        source = bytes(tensors["text.bpe"].tolist()) if resumed and meta["model"]["text"] else tokenizer
        source = weights.text.bpe() if weights else source
        text = TextEncoder(text_width, text_layers, text_heads, text_length, source)
        if (
            (resumed or weights)
            and config["tokenizer"] != "auto"
            and make_tokenizer(tokenizer)._mergeable_ranks != (text.tokenizer._mergeable_ranks)
        ):
            came, remedy = (latest, "use another out_dir") if resumed else (init_from, "leave it out")
            raise ValueError(f"{came} was trained with another tokenizer than {tokenizer}: {remedy}")
    elif cond == "text":
        tower = CLIPTextEncoder.from_pretrained(tower_weights, name=text_encoder, merges=clip_vocab)
        tower_hash = hash_weights(tower)
        tower.to(device, param_dtype)
    if text is not None or tower is not None:
        context_dim = (text or tower).width
    elif cond == "class" and class_embed == "token":
        context_dim, class_tokens = text_width, torch.nn.Embedding(num_classes + 1, text_width)
    elif cond == "class":
        unet_classes = num_classes + 1
    concat_channels, task_settings = 0, {"task": task}
    if task == "inpaint":
        concat_channels = 1 + latent_shape[0]
    elif task == "sr":
        low_side = image_size // sr_scale
        if low_side % latent_shape[1] and low_side > latent_shape[1]:
            raise ValueError(f"sr_scale={sr_scale} gives images of side {low_side}, no multiple of {latent_shape[1]}")
        concat_channels = 3 * max(1, low_side // latent_shape[1]) ** 2
        unet_classes = 1000 if sr_noise else unet_classes
        task_settings |= dict(sr_scale=sr_scale, sr_noise=sr_noise)
        task_settings |= {"sr_schedule": list(sr_schedule)} if sr_schedule else {}
    elif task == "semantic":
        concat_channels, rescaler = 3, Rescaler(images.map_classes, image_size // latent_shape[1])
        task_settings |= dict(map_classes=images.map_classes)
    unet_settings = {name: config[name] for name in inspect.signature(UNet).parameters if name in config}
    unet_settings |= dict(in_channels=latent_shape[0], out_channels=latent_shape[0], concat_channels=concat_channels)
    unet_settings |= dict(context_dim=context_dim, num_classes=unet_classes)
    model = Denoiser(UNet(**unet_settings), text, class_tokens, rescaler, loss_weight == "uncertainty")
    if weights:
        for what, count in (("num_classes", num_classes), ("map_classes", task_settings.get("map_classes"))):
            if count and count != began.get(what):
                raise ValueError(f"{init_from} has {what}={began.get(what)}, {dataset} {count}: name as many there")
        names = ("in_channels", "concat_channels", "context_dim", "num_classes")
        check_same_model(init_from, began["unet"], {name: unet_settings[name] for name in names})
        for name, child in model.named_children():
            if getattr(weights, name) is not None:
                child.load_state_dict(getattr(weights, name).state_dict())
        weights = None  # its memory is needed
    side_multiple = model.unet.side_multiple
    if latent_shape[1] % side_multiple:
        raise ValueError(
            f"image_size={image_size} gives latents of side {latent_shape[1]}, not a multiple of {side_multiple}, "
            f"which {len(channel_mult)} levels divide by: change image_size or channel_mult"
        )
    model.to(device, param_dtype, memory_format=torch.channels_last)
    for net in (model, tower):
        if net is not None:
            use_attention(net, attention)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    power_emas = [copy.deepcopy(ema) for _ in ema_stds]
    model.unet.checkpointing = checkpointing
    process = process_of(config)
    model_settings = {"unet": model.unet.settings, "text": text and text.settings}
    model_settings["first_stage"] = "none" if vae is None else "vae"
    model_settings |= dict(cond=cond, num_classes=num_classes, image_size=image_size, class_embed=class_embed)
    model_settings |= dict(objective=objective, schedule=schedule, beta_start=beta_start, beta_end=beta_end)
    model_settings |= dict(zero_snr=zero_snr, uncertainty=loss_weight == "uncertainty", ema_stds=ema_stds)
    model_settings |= dict(text_encoder=text_encoder, tower_hash=tower_hash) | task_settings

    # optimizer: no weight decay on biases and norms
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    owner = share_out(model.parameters(), world) if shard_optimizer and world > 1 else {}
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    for group in groups:
        group["params"] = [p for p in group["params"] if owner.get(p, rank) == rank]
    # fused: of AdamW's kinds the one that heeds found_inf, by which a bad step is left out without waiting for it
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), fused=True)

    # as lists, once: to walk through all modules for them takes a millisecond, which a step would spend four times
    parameters, averaged = list(model.parameters()), list(ema.parameters())
    power_averaged = [list(average.parameters()) for average in power_emas]

    # what a step leaves to the next ones: mean, count and spikes of the gradient norms
    state = {"grad_norm": torch.zeros(3, device=device, dtype=param_dtype)}

    # resume, second half
    if resumed:
        check_same_model(latest, meta["model"], model_settings)
        model.load_state_dict(without_prefix("model", tensors))
        ema.load_state_dict(without_prefix("ema", tensors))
        for i, average in enumerate(power_emas):
            average.load_state_dict(without_prefix(f"ema_power_{i}", tensors))
        load_optimizer(optimizer, model, "optim", tensors)
        step = meta["step"]
        for name, t in without_prefix("state", tensors).items():
            state[name].copy_(t)
        if meta["images_per_step"] != images_per_step:  # another number of processes, or another batch_size
            grad_accum, rest = divmod(meta["images_per_step"], batch_size * world)
            if rest:
                raise ValueError(
                    f"{latest} was trained with {meta['images_per_step']} images per step, which "
                    f"batch_size={batch_size} on {world} processes cannot make up: change batch_size"
                )
            images_per_step = meta["images_per_step"]
        del tensors
    found = {"the checkpoint's step": step if resumed else "none", "training images": len(images)}
    check_same_everywhere(found, world)

    # what the sample grids show: prompts from a file or the validation captions, or one class after the other
    shown = [None] * n_samples
    if cond in ("text", "layout"):
        shown = (read_prompts(prompts) if prompts else list(dict.fromkeys(captions)))[:n_samples]
        for prompt in shown:
            if (text or tower).count_tokens(prompt) > (text or tower).length and master:
                print(f"prompt cut to {(text or tower).length} tokens: {prompt[:60]}...")
    elif cond == "class":
        shown = [i % num_classes for i in range(n_samples)]

    def averages():
        tensors = with_prefix("ema", ema.state_dict())
        for i, average in enumerate(power_emas):
            tensors |= with_prefix(f"ema_power_{i}", average.state_dict())
        return tensors

    def checkpoint():
        """Rank 0 writes all that a resumed run, sampling and a reader need; every rank has to call it."""
        watch.at("saving", step)
        tensors = optimizer_tensors(optimizer, model, "optim", owner)
        if not master:
            return
        tensors |= with_prefix("model", model.state_dict()) | averages() | with_prefix("state", state) | frozen_tensors
        now = {"step": step, "images_seen": step * images_per_step, "images_per_step": images_per_step}
        save_checkpoint(latest, tensors, about | now)

    # the first log lines
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run("git describe --always --dirty", shell=True, capture_output=True, text=True, cwd=here)
    git_revision = git.stdout.strip() or "unknown"  # no git, no repository
    tflop = count_tflop(model, latent_shape)
    frozen_tensors = with_prefix("vae", vae.state_dict()) if vae is not None else {}
    if text is not None:
        frozen_tensors["text.bpe"] = torch.tensor(list(text.bpe()), dtype=torch.uint8)
    about = {"format": 1, "stage": "ldm", "model": model_settings, "vae": vae and vae.settings, "shown": shown}
    about |= {"classes": images.classes, "config": config, "git": git_revision}
    about["run"] = meta.get("run", 0) if resumed else time.time_ns()  # tells its snapshots from those of another run
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in hardware), 0)
    if master:
        print(f"command: {' '.join(sys.argv)}")
        print(f"git {git_revision}, python {platform.python_version()}, torch {torch.__version__}")
        print(f"{world} x {hardware}, {dtype}; settings not default: {config.changed}")
        print(f"{len(images)} training and {len(validation)} validation images ({images.form}) in {dataset}")
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tflop:.4g} TFLOP per trained image")
        print(f"latents of {latent_shape}; cond={cond}, task={task}; {objective} objective on the {schedule} schedule")
        print(f"{images_per_step} images per step: {world} processes x {batch_size} x {grad_accum} accumulated")
        if grad_accum != config["grad_accum"]:
            print(f"grad_accum={config['grad_accum']} is not taken: the run keeps {images_per_step} images per step")
        start = f"a new run in {out_dir}" + (f", from the weights of {init_from}" if init_from else "")
        print(f"resumed from {latest} at step {step}" if resumed else start, flush=True)
        if resumed:
            now, then = json.loads(json.dumps(config)), meta["config"]
            others = [f"{name}={now[name]} was {then[name]}" for name in now if now[name] != then.get(name, now[name])]
            print(f"other settings than before: {', '.join(others) or 'none'}", flush=True)
        if resumed and os.path.exists(f"{out_dir}/log.jsonl"):
            rewind_log(f"{out_dir}/log.jsonl", step, max_steps)
        elif os.path.exists(f"{out_dir}/log.jsonl"):
            os.remove(f"{out_dir}/log.jsonl")
        if wandb:
            import wandb as wandb_client

            wandb_client.init(project="latent-diffusion", name=out_dir, config=dict(config))

    terms_logged = ("loss", "error", "grad_norm")
    fields = ("step", "images_seen", *terms_logged, "lr", "images_per_s", "mfu", "memory_gb")
    fields += ("val_loss", "val_loss_by_t")

    def log(**record):
        """One line of log.jsonl, the same fields each time."""
        if master:
            record = {"step": step} | record
            record["images_seen"] = record["step"] * images_per_step
            with open(f"{out_dir}/log.jsonl", "a") as f:
                f.write(json.dumps({name: record.get(name) for name in fields}) + "\n")
            if wandb:
                wandb_client.log({k: v for k, v in record.items() if v is not None}, step=record["step"])

    watch = Watch(rank, world, hang_timeout)
    ema.unet.register_forward_hook(watch.progress)  # called while evaluating and drawing, the next ones while caching
    for net in (vae and vae.encoder, tower):
        if net is not None:
            net.register_forward_hook(watch.progress)

    # latents: cached on disk, or encoded at every step, or the pixels themselves
    cached = vae is not None and cache_latents
    validation_stream = Stream(validation, seed, train=False)
    if cached:
        stream, validation_stream = (LatentCache(s, vae, cache_dir, dtype) for s in (stream, validation_stream))
        for cache in (validation_stream, stream):
            watch.at("caching latents", step)
            check_shared(cache, rank, world)
            cache.build(vae, device, autocast, workers, rank, world)
    latents = stream if cached else None
    stream, validation_stream = (
        WithCondition(s, task, seed, sr_scale, sr_kind, object_names) for s in (stream, validation_stream)
    )
    if text is not None:
        null_tokens = text.tokenize([""]).to(device)
    if tower is not None:
        with torch.no_grad(), autocast():
            null_context = tower([""]).to(param_dtype)
    grid_count = min(n_samples, val_count)  # of a task's grid, whose pictures are validation's
    if cache_text:  # the tower is not needed any more, but for what the grids ask for
        stream, validation_stream = (
            TextCache(s, tower, tower_hash, cache_dir, dtype) for s in (stream, validation_stream)
        )
        for cache in (validation_stream, stream):
            watch.at("caching text", step)
            check_shared(cache, rank, world)
            cache.build(tower, device, autocast, workers, rank, world)
        asked = shown
        if task != "none":
            asked = [validation_stream[i * len(validation) // val_count]["text"] for i in range(grid_count)]
        with torch.no_grad(), autocast():
            tower = Remembered(tower, ["", *asked])
    resident = None  # all training latents, on the device
    if cached and latents_on_device.lower() != "false":
        wanted, size, free = latents_on_device.lower() == "true", latents.bytes / 2**30, math.inf
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] / 2**30
        if wanted and size > free:
            room = f"{size:.3g} GiB, and {free:.3g} GiB are free"
            raise ValueError(f"latents_on_device=true, but they take {room} on {device}: set it to auto or false")
        if wanted or (device.type == "cuda" and size < free / 5):
            if master:
                print(f"keeping the latents on {device}: {size:.3g} GiB in each process", flush=True)
            resident = latents.load(device)

    def sent(t):
        """A tensor just made, on the device; a copy of memory that is not pinned may wait for all under way there."""
        return (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)

    def examples(batch, noise):
        """A collated batch on the device, as train_step takes it.

        noise: "posterior" (B,C,h,w) picks the posterior sample; for sr with sr_noise "level" (B,) uniform in [0,1) and
        "low" like the small image.
        """
        n = len(batch["label"])
        if vae is None:
            out = {"x0": batch["image"].to(device, param_dtype, non_blocking=True)}
        elif cached:
            moments = batch["image"].to(device, non_blocking=True)
            if not moments.numel():  # they are here already
                moments = resident.index_select(0, sent(batch["index"] * latents.flips + batch["flip"]))
            mean, std = moments.to(param_dtype).unbind(1)
            out = {"x0": vae.normalize(mean + std * noise["posterior"])}
        else:
            with torch.no_grad(), autocast():
                posterior = vae.encode(batch["image"].to(device, param_dtype, non_blocking=True))
            out = {"x0": vae.normalize(posterior.sample(noise["posterior"]))}
        out["x0"] = out["x0"].contiguous(memory_format=torch.channels_last)
        if text is not None:
            out["tokens"] = sent(text.tokenize(batch["text"]))
            out["null_tokens"] = null_tokens.expand(n, -1)
        elif tower is not None:
            if cache_text:
                context = batch["context"].to(device, non_blocking=True)
            else:
                with torch.no_grad(), autocast():
                    context = tower(sent(tower.tokenize(batch["text"])))
            out["context"] = context.to(param_dtype)
            out["null_context"] = null_context.expand(n, -1, -1)
        elif cond == "class":
            out["null_y"] = torch.full((n,), num_classes, device=device)
            y = batch["label"].to(device, non_blocking=True)
            out["y"] = torch.where(y < 0, out["null_y"], y)  # no label, no condition
        if task != "none":
            given = {name: t.to(device, non_blocking=True) for name, t in batch["condition"].items()}
            given = {name: t.to(param_dtype) if t.is_floating_point() else t for name, t in given.items()}
            if "level" in noise:
                out["y"] = (noise["level"] * (sr_noise + 1)).long()
                given["low"] = augment_low(given["low"], out["y"], noise["low"], sr_schedule)
            with torch.no_grad(), autocast():
                concat = image_condition(task, vae, given, latent_shape[1:], task_settings.get("map_classes", 0))
            out["concat"] = concat.to(param_dtype).contiguous(memory_format=torch.channels_last)
        return out

    def validation_examples(rows):
        batch = collate([validation_stream[i * len(validation) // val_count] for i in rows])
        noise = {"posterior": torch.zeros((), device=device)}
        if sr_noise:  # as clean as it comes
            noise |= {name: torch.zeros(len(rows), 1, 1, 1, device=device) for name in ("level", "low")}
            noise["level"] = noise["level"].flatten()
        return examples(batch, noise)

    def draw_grids():
        """samples_STEP.png, what it draws, and predictions_STEP.png, what it sees in noise."""
        pipeline = Pipeline(ema, vae, process, objective, latent_shape, num_classes, images.classes, shown)
        pipeline = pipeline._replace(task=task_settings, tower=tower)
        wanted, given, grid, names = shown, None, [], []
        if task != "none":  # of validation images, which bring their own text and class
            batch = collate([validation_stream[i * len(validation) // val_count] for i in range(grid_count)])
            given, wanted = batch["condition"], [None] * grid_count
            if text is not None or tower is not None:
                wanted = batch["text"]
            elif cond == "class":
                wanted = [label if label >= 0 else num_classes for label in batch["label"].tolist()]
        with autocast():
            pictures = generate(pipeline, wanted, range(len(wanted)), sample_steps, cfg, sampler, inputs=given)
        for i, (picture, condition) in enumerate(zip(pictures, wanted)):
            if task != "none":
                grid += [show_condition(task, {name: t[i] for name, t in given.items()}, image_size)]
                names += ["shown"]
            grid, names = [*grid, picture], [*names, pipeline.caption(condition)]
        even = 0 if task == "none" else 2 * math.ceil(len(grid) ** 0.5 / 2)  # columns that keep what belongs together
        save_grid(f"{out_dir}/samples_{step:08d}.png", torch.stack(grid), names, columns=even)
        batch = validation_examples(range(min(6, val_count)))
        eps = torch.randn(batch["x0"].shape, generator=torch.Generator().manual_seed(0)).to(batch["x0"])
        seen = example_predictions(ema, vae, batch, eps, config, autocast)
        names = ["truth", *(f"x0_hat at t={t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9))]
        save_grid(f"{out_dir}/predictions_{step:08d}.png", seen.flatten(0, 1), names * len(seen), columns=6)

    # compile, DDP
    net = torch.compile(model) if use_compile else model
    if world > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, forward_sync_buffers=False)
    batches = loader(stream, step, max_steps, batch_size, grad_accum, rank, world, workers)

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
    pending, stop, bad_items, start_step, started = None, False, 0, step, time.time()
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
            scores = evaluate(ema, validation_examples, val_count, config, rank, world, device, autocast)
            log(**scores)
            watch.at("drawing")
            if master:
                bins = " ".join("-" if b is None else f"{b:.3f}" for b in scores["val_loss_by_t"])
                print(f"evaluation: loss {scores['val_loss']:.4f}, by tenths of t {bins}", flush=True)
                draw_grids()
                plot_log(out_dir)
            clock.update(time=time.time(), step=step)  # evaluation does not count as training
        snapshot_due = finished or (step % snapshot_every == 0 and step > start_step) if snapshot_every else False
        if snapshot_due and master:
            snapshot = averages() | {name: t for name, t in frozen_tensors.items() if not name.startswith("vae.")}
            about_it = about | {"step": step, "snapshot": True}  # the autoencoder is in the checkpoint beside it
            save_checkpoint(f"{out_dir}/ema_{step:08d}.safetensors", snapshot, about_it)
        if finished or stop or (step % save_every == 0 and step > start_step):
            checkpoint()
        if finished or stop:
            break

        # forward and backward
        generator = torch.Generator(device).manual_seed(seed_of(seed, "ldm noise", step))
        slots, draw = (grad_accum, world, batch_size), dict(generator=generator, device=device)
        noise = {name: torch.randn((*slots, *latent_shape), **draw) for name in ("posterior", "eps")}
        noise |= {name: torch.rand(slots, **draw) for name in ("t", "drop", *(("level",) if sr_noise else ()))}
        # "t" is uniform here: draw_times makes times of it
        if offset_noise:
            noise["offset"] = torch.randn((*slots, latent_shape[0], 1, 1), **draw)
        if sr_noise:
            noise["low"] = torch.randn((*slots, 3, image_size // sr_scale, image_size // sr_scale), **draw)
        noise = {name: n[:, rank] for name, n in noise.items()}  # every rank draws the whole step's, takes its own
        if unet_dropout:
            torch.manual_seed(seed_of(seed, "dropout", step, rank))
        sums = torch.zeros(len(terms_logged), device=device, dtype=param_dtype)  # the loss terms, then a wish to stop
        keys, each = [], []
        for micro in range(grad_accum):
            watch.at("reading data", step)
            batch = next(batches)
            watch.at("forward")
            keys += batch["key"]
            for item in batch["bad"]:
                bad_items += 1
                print(f"skipped a bad image ({bad_items} so far on rank {rank}): {item}", flush=True)
            now = {name: n[micro].to(param_dtype) for name, n in noise.items()}
            batch = examples(batch, now)
            if world > 1:
                net.require_backward_grad_sync = micro == grad_accum - 1  # one all-reduce a step
            with autocast():
                terms = train_step({"denoiser": net}, batch, now, config)
            each.append(terms["each"])
            watch.at("backward")
            (terms["loss"] / grad_accum).backward()
            sums[:-1] += torch.stack([terms[name].detach() for name in terms_logged[:-1]]) / grad_accum

        # clip, step, ema
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
        update_ema(averaged, parameters, step, ema_decay)
        for std, average in zip(ema_stds, power_averaged):
            update_power_ema(average, parameters, step, std)

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
