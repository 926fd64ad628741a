"""Train a denoiser (stage 2) on the latents of a trained autoencoder, or on pixels.

    python train_ldm.py config/shapes_ldm.py                                          # 2 CPU cores, minutes
    python train_ldm.py --dataset=DIR --first_stage=out/vae --cond=text               # one GPU
    python train_ldm.py --dataset=DIR --init_from=FILE_OR_FOLDER --lr=1e-5            # fine-tune, also Stable Diffusion
    torchrun --nproc_per_node=8 train_ldm.py --dataset=DIR --first_stage=out/vae      # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_ldm.py --dataset=DIR

DIR is the dataset of stage 1 or another one; captions or labels are part of it. The same command again resumes the run.
"""

import copy
import functools
import inspect
import json
import math
import os
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import common
import convert
from attention import unavailable, use_attention
from checkpoint import UserError, part, power_exponent, reject, with_prefix
from configurator import configure
from data.cache import LatentCache
from data.dataset import BadImage, Dataset, Stream, collate, loader, seed_of
from data.tasks import WithCondition, augment_low, check_task, image_condition, layout_string, show_condition
from diffusion import make_schedule, t_max, target, to_x0, unet_time
from sample import Pipeline, generate, read_prompts, save_grid
from text import CLIPTextEncoder, TextEncoder, make_tokenizer
from unet import Denoiser, Rescaler, UNet
from vae import VAE

# data
dataset = "data/openimages"  # folder of images, tar or parquet shards, or images.npy; or s3://bucket/*.tar and the like
image_size = 256  # >= 1: side of the images in pixels
flip = True  # mirror half of the images
workers = 4  # >= 0: processes that read latents or decode images; 0 uses the main one
first_stage = "out/vae"  # none | ...: the autoencoder, a stage-1 checkpoint or its out_dir; none trains on pixels
cache_latents = True  # encode every image once, before training; False encodes at every step
cache_dir = "cache"  # folder of cached latents and of the index of shards, shared by all nodes
cache_gb = 64.0  # > 0: GB of shards of a dataset given by URL that are kept there at most
latents_on_device = "auto"  # auto | true | false: cached latents in device memory; auto on CUDA, if under 1/5 of it
init_from = ""  # model to start from, ours or another project's; it determines the settings of the model
# conditioning
cond = "text"  # none | class | text | layout: what the denoiser is conditioned on; layout is boxes with names
cond_drop = 0.1  # in [0, 1]: share of examples trained without their condition, for guidance
class_embed = "add"  # add | token: a class is added to the time embedding, or a context of one token (LDM's cin256)
text_encoder = "joint"  # joint | clip_l | openclip_h | other: joint is trained here; CLIP (of SD 1, SD 2) is frozen
tower_weights = ""  # file of the frozen text encoder's weights, or the folder of a pipeline that has it
clip_vocab = ""  # CLIP's bpe_simple_vocab_16e6.txt.gz; "" uses that of an installed open_clip
tokenizer = "auto"  # auto | bytes | ...: a .tiktoken file or a tiktoken name; auto is DATASET/bpe.tiktoken, else bytes
text_width = 512  # >= 1: of the text encoder
text_layers = 6  # >= 1: of the text encoder
text_heads = 8  # >= 1: of the text encoder
text_length = 77  # >= 2: tokens of a prompt, the end token included
task = "none"  # none | inpaint | sr | semantic: image conditioning; sr is super-resolution, semantic uses label maps
sr_scale = 4  # >= 1: of sr, the output's size over the input's
sr_degradation = "bsr"  # bicubic | bsr: of sr, how images are made small; bsr adds blur, noise and JPEG in random order
sr_noise = 0  # in [0, 1000): of sr, largest level of noise added to the small image; SD's x4 upscaler has 350
# model: arguments of UNet; the defaults are Stable Diffusion 2's
channels = 320  # >= 1: width of the first level
channel_mult = (1, 2, 4, 4)  # each >= 1: widths of the levels in units of channels; each level halves the side
num_res_blocks = (2,)  # each >= 1: of a level on the way down, one number or one for each level; one more on the way up
attention_ds = (1, 2, 4)  # each >= 1: down-sampling factors whose levels have attention
num_heads = 0  # >= 0: heads of every attention, or 0 to use head_dim
head_dim = 64  # >= 0: channels of a head, or 0 to use num_heads
transformer_depth = 1  # >= 0: blocks of each spatial transformer; 0 is plain self-attention, without text
context_pool = False  # add the mean of the text to the time embedding (GLIDE, Imagen)
linear_proj = True  # into and out of the transformers: linear (SD 2) or 1x1 convolution (SD 1)
self_attention = (True,)  # False leaves a level's transformers only cross-attention; one value or one for each level
middle_attention = True  # attention in the middle
linear_attention = False  # linear-time self-attention
qk_norm = False  # RMS-normalize queries and keys
scale_shift = False  # the time embedding scales and shifts (FiLM) instead of being added
resblock_updown = False  # residual blocks change the resolution instead of convolutions
resample = "conv"  # conv | pool: how else the resolution changes
unet_patch = 1  # >= 1: fold patches of p x p latents into channels first, for small fast models and pixels
norm_groups = 32  # >= 1: groups of every GroupNorm
unet_dropout = 0.0  # in [0, 1): in every residual block
# diffusion
objective = "flow"  # eps | v | x0 | flow: what the network predicts
schedule = "flow"  # flow | cosine | linear | scaled_linear | squared_cosine | sqrt | quadratic | sigmoid: of the noise
beta_start = 0.00085  # in (0, 1): of a table, but not of squared_cosine; SD's is scaled_linear
beta_end = 0.012  # in (0, 1): of a table, but not of squared_cosine
zero_snr = False  # rescale a table so that it ends in pure noise (Lin et al. 2024); not with eps
timesteps = "logit_normal"  # logit_normal | uniform | shifted: distribution of t in training
t_mean = 0.0  # of the normal of logit_normal (Esser et al. 2024); higher is noisier
t_std = 1.0  # > 0: of the normal of logit_normal
t_shift = 3.0  # > 0: of shifted, t becomes t_shift t / (1 + (t_shift - 1) t) (Esser et al. 2024, eq. 23)
loss_type = "mse"  # mse | l1 | huber
huber_delta = 0.1  # > 0: of huber, where the square becomes linear
loss_weight = "none"  # none | min_snr | uncertainty: of noise levels; Hang et al. 2023, or learned (EDM2)
min_snr_gamma = 5.0  # > 0: of min_snr, the signal-to-noise ratio above which the weight of x0's error is constant
offset_noise = 0.0  # >= 0: deviation of noise added to each channel as a constant, for very dark or bright images
# optimizer
batch_size = 32  # >= 1: images per process and micro-step
grad_accum = 1  # >= 1: micro-steps per optimizer step
max_steps = 400_000  # >= 1: optimizer steps
lr = 1e-4  # > 0: learning rate, not rescaled by batch size
lr_schedule = "constant"  # constant | cosine | onecycle | multistep: cosine and onecycle end at lr_end
lr_end = 0.0  # in [0, 1]: where cosine and onecycle end, as a share of lr
lr_milestones = (0.6, 0.8, 0.9)  # each in [0, 1]: of multistep, shares of max_steps
lr_decay = 0.1  # in [0, 1]: of multistep, factor at each milestone
warmup_steps = 1000  # >= 0: steps of linear warm-up
beta1 = 0.9  # in [0, 1): of AdamW
beta2 = 0.999  # in [0, 1): of AdamW
weight_decay = 0.01  # >= 0: of AdamW, on matrices and kernels only
grad_clip = 1.0  # >= 0: largest gradient norm; 0 disables clipping
shard_optimizer = False  # divide the optimizer state among the processes (ZeRO stage 1)
ema_decay = 0.9999  # in [0, 1]: of the averaged weights, warmed up as (1 + n) / (10 + n)
ema_stds = ()  # each in [0.01, 0.25]: relative lengths of further averages, for sample.py --ema_std (EDM2)
# run
out_dir = "out/ldm"  # checkpoint, log and grids
seed = 0  # of weights, data order and noise
eval_every = 5000  # >= 1: steps between evaluations (validation loss, sample grids)
val_images = 1000  # >= 1: validation images, each with its own noise and t
prompts = ""  # file of prompts for the sample grids, one a line; "" uses captions of the validation set
n_samples = 16  # >= 1: images of a grid
sampler = "unipc"  # ddpm | ddim | euler | euler_a | heun | dpmpp_2m | dpmpp_2m_sde | plms | unipc: of the grids
sample_steps = 20  # in [1, 1000]: of the sampler
guidance = 3.0  # >= 0: classifier-free guidance scale of the grids; 1 disables it
save_every = 1000  # >= 1: steps between checkpoints
snapshot_every = 0  # >= 0: steps between EMA snapshots ema_STEP.safetensors, which are kept; 0 keeps none
log_every = 50  # >= 1: steps between progress lines
dist_timeout = 30.0  # > 0: minutes that a process waits for the others, and for rank 0's evaluation
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto | float32 | bfloat16 | float64: auto is bfloat16 on CUDA, else float32
checkpointing = False  # recompute the U-Net's activations in the backward pass: less memory, 1.4 times the time
compile = "auto"  # auto | true | false: torch.compile; auto on CUDA
attention = "auto"  # auto | triton | xformers | sdpa | sdpa_flash | sdpa_cudnn | sdpa_efficient | sdpa_math | reference
deterministic = False  # bit-exact on CUDA too, slower
wandb = False  # also log to Weights & Biases

CONDITIONS = ("tokens", "context", "y", "concat")  # arguments of Denoiser.forward that `Conditioner` makes
MODEL_SETTINGS = ("cond", "class_embed", "image_size", "objective", "schedule", "beta_start", "beta_end", "zero_snr",
                  "ema_stds", "text_encoder", "task", "sr_scale", "sr_noise")  # fmt: skip
USED_WITH = {"text_encoder": "cond=text", "tokenizer": "text_encoder=joint", "class_embed": "cond=class",
             "prompts": "task=none", "sr_scale": "task=sr", "sr_degradation": "task=sr", "sr_noise": "task=sr",
             "latents_on_device": "cache_latents=True"}  # fmt: skip
PANELS = {"loss": ("error", "val_loss"), "gradient norm": ("grad_norm",), "val_loss by tenths of t": ("val_loss_by_t",)}

# --- loss ---


def noise_schedule(cfg):
    return make_schedule(cfg.schedule, cfg.beta_start, cfg.beta_end, zero_snr=cfg.zero_snr)


def training_times(u, cfg):
    """Times (B,) of the training distribution from u (B,) uniform in [0,1)."""
    if cfg.timesteps == "logit_normal":
        u = torch.sigmoid(cfg.t_mean + cfg.t_std * torch.special.ndtri(u))
    elif cfg.timesteps == "shifted":
        u = cfg.t_shift * u / (1 + (cfg.t_shift - 1) * u)
    table = noise_schedule(cfg)
    t = u * t_max(cfg.objective, table)
    if table.discrete:  # the times of the table's entries; u may have been rounded up to 1
        t = ((torch.floor(t * table.discrete) + 1) / table.discrete).clamp(max=1)
    return t


def prediction_error(denoiser, inputs, noise, cfg):
    """Error (B,) of the prediction, its weight (B,), and the learned log-variance (B,) or None.

    inputs: of a `Conditioner`.  noise: of `step_noise`, for one micro-step.
    """
    x0, eps = inputs["x0"], noise["eps"]
    if "offset" in noise:
        eps = eps + cfg.offset_noise * noise["offset"]
    table, t = noise_schedule(cfg), training_times(noise["t"], cfg)
    alpha, sigma = (f(t).to(x0.dtype).view(-1, 1, 1, 1) for f in (table.alpha, table.sigma))
    condition = drop_conditions(inputs, noise["drop"] < cfg.cond_drop)
    prediction = denoiser(alpha * x0 + sigma * eps, unet_time(table, t).to(x0.dtype), **condition)
    prediction, log_variance = prediction if isinstance(prediction, tuple) else (prediction, None)
    prediction, wanted = prediction.to(x0.dtype), target(cfg.objective, x0, eps, alpha, sigma)
    if cfg.loss_type == "mse":
        error = (prediction - wanted).square()
    elif cfg.loss_type == "l1":
        error = (prediction - wanted).abs()
    else:
        error = F.huber_loss(prediction, wanted, reduction="none", delta=cfg.huber_delta)
    weight = torch.ones_like(t, dtype=x0.dtype)
    if cfg.loss_weight == "min_snr":  # weigh x0's squared error by min(snr, gamma) (Hang et al. 2023)
        snr = (alpha / sigma.clamp(min=1e-12)).square()
        # to_x0 is linear: what it makes of a prediction of 1 at x = 0 is x0's error over the prediction's
        ratio = to_x0(cfg.objective, torch.ones_like(alpha), torch.zeros_like(alpha), alpha, sigma)
        weight = (snr.clamp(max=cfg.min_snr_gamma) * ratio.square()).flatten()
    return error.mean(dim=(1, 2, 3)), weight, log_variance


def drop_conditions(inputs, dropped):
    """The denoiser's conditions; where `dropped` (B,), null_NAME in place of NAME. What has no such twin is kept."""
    condition = {name: inputs[name] for name in CONDITIONS if name in inputs}
    for name, value in condition.items():
        if f"null_{name}" in inputs:
            mask = dropped.view(-1, *[1] * (value.ndim - 1))
            condition[name] = torch.where(mask, inputs[f"null_{name}"], value)
    return condition


def train_step(denoiser, inputs, noise, cfg):
    """One forward pass -> {"loss": to differentiate, "error": not weighted}, both ()."""
    error, weight, log_variance = prediction_error(denoiser, inputs, noise, cfg)
    loss = weight * error
    if log_variance is not None:
        loss = error / log_variance.exp() + log_variance  # Karras et al. 2024 (EDM2), eq. 21
    return {"loss": loss.mean(), "error": error.mean()}


def step_noise(step, shape, cfg, machine, micro_steps):
    """[{name: (B,...)} for each micro-step]: this rank's slice of the random numbers of a step.

    A function of (seed, step): the same for the global batch on any number of ranks.  shape: (C,h,w) of x0.
    "posterior" and "eps" are like x0; "t" and "drop" (B,) uniform in [0,1); "offset" (B,C,1,1) with offset_noise;
    "level" (B,) uniform and "low" like the small image with sr_noise.
    """
    generator = torch.Generator(machine.device).manual_seed(seed_of(cfg.seed, "ldm noise", step))
    slots, options = (micro_steps, machine.world, cfg.batch_size), dict(generator=generator, device=machine.device)
    noise = {name: torch.randn(*slots, *shape, **options) for name in ("posterior", "eps")}
    noise |= {name: torch.rand(slots, **options) for name in ("t", "drop", *(["level"] if cfg.sr_noise else []))}
    if cfg.offset_noise:
        noise["offset"] = torch.randn(*slots, shape[0], 1, 1, **options)
    if cfg.sr_noise:
        side = cfg.image_size // cfg.sr_scale
        noise["low"] = torch.randn(*slots, 3, side, side, **options)
    return [
        {name: n[micro, machine.rank].to(machine.param_dtype) for name, n in noise.items()}
        for micro in range(micro_steps)
    ]


# --- averaged weights ---


@torch.no_grad()
def update_ema(averaged, current, step, decay):
    """averaged <- d averaged + (1 - d) current with d = min(decay, (1 + n) / (10 + n)); lists of tensors.

    step: n = 1, 2, ..., the number of the optimizer step that was just taken.
    """
    torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + step) / (10 + step)))


@torch.no_grad()
def update_power_ema(averaged, current, step, std):
    """As update_ema, with d = (1 - 1/n)^(gamma + 1) (Karras et al. 2024, EDM2, section 3.1)."""
    torch._foreach_lerp_(averaged, current, 1 - (1 - 1 / step) ** (power_exponent(std) + 1))


# --- conditioning ---


class Conditioner:
    """Collated batch -> inputs of `train_step` on the device: x0, and each condition with its empty twin null_NAME.

    A new condition is one more entry of the result of __call__, and its name in CONDITIONS.
    """

    def __init__(self, cfg, machine, autocast, vae, text, tower, num_classes, map_classes, sr_schedule):
        """text: of the denoiser, trained.  tower: a frozen text encoder.  Those that a run does not have are None."""
        self.cfg, self.device, self.dtype, self.autocast = cfg, machine.device, machine.param_dtype, autocast
        self.vae, self.text, self.tower = vae, text, tower
        self.num_classes, self.map_classes, self.sr_schedule = num_classes, map_classes, sr_schedule
        side = cfg.image_size // (vae.factor if vae else 1)
        self.latent_shape = (vae.latent_channels if vae else 3, side, side)
        self.resident, self.flips = None, 1  # cached latents in device memory: see keep_latents

    @torch.no_grad()
    def __call__(self, batch, noise):
        """noise: "posterior" like x0; with sr_noise "level" (B,) and "low" like the small image: see step_noise."""
        inputs = {"x0": self.latents(batch, noise).contiguous(memory_format=torch.channels_last)}
        n = len(batch["label"])
        if self.text is not None:
            inputs["tokens"] = self.send(self.text.tokenize(batch["text"]))  # (B,L)
            inputs["null_tokens"] = self.send(self.text.tokenize([""])).expand(n, -1)
        elif self.tower is not None:
            inputs["context"], inputs["null_context"] = self.embed(batch["text"]), self.null_context.expand(n, -1, -1)
        elif self.cfg.cond == "class":
            inputs["null_y"] = torch.full((n,), self.num_classes, device=self.device)
            y = self.send(batch["label"])
            inputs["y"] = torch.where(y < 0, inputs["null_y"], y)  # images without a label have no condition
        if self.cfg.task != "none":
            condition = {name: self.send(t) for name, t in batch["condition"].items()}
            condition = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in condition.items()}
            if self.cfg.sr_noise:
                inputs["y"] = (noise["level"] * (self.cfg.sr_noise + 1)).long()
                condition["low"] = augment_low(condition["low"], inputs["y"], noise["low"], self.sr_schedule)
            with self.autocast:
                concat = image_condition(self.cfg.task, self.vae, condition, self.latent_shape[1:], self.map_classes)
            inputs["concat"] = concat.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return inputs

    def latents(self, batch, noise):
        """x0 (B,C,h,w): pixels, or a sample of the posterior, cached or encoded now, with unit variance."""
        if self.vae is None:
            return self.send(batch["image"]).to(self.dtype)
        if not self.cfg.cache_latents:
            with self.autocast:
                posterior = self.vae.encode(self.send(batch["image"]).to(self.dtype))
            return self.vae.normalize(posterior.sample(noise["posterior"]))
        moments = self.send(batch["image"])
        if not moments.numel():  # of training images whose latents are on the device
            moments = self.resident.index_select(0, self.send(batch["index"] * self.flips + batch["flip"]))
        mean, std = moments.to(self.dtype).unbind(1)
        return self.vae.normalize(mean + std * noise["posterior"])

    def embed(self, prompts):
        """(B,L,D) of the frozen text encoder."""
        with self.autocast:
            return self.tower(self.send(self.tower.tokenize(prompts))).to(self.dtype)

    @functools.cached_property
    def null_context(self):
        return self.embed([""])

    def send(self, t):
        """To the device. From memory that is not pinned, a copy would wait for all work queued there."""
        pinned = t.pin_memory() if self.device.type == "cuda" and not t.is_pinned() else t
        return pinned.to(self.device, non_blocking=True)

    def keep_latents(self, cache, log_line):
        """Load a LatentCache into device memory, as latents_on_device says."""
        wanted, size, free = self.cfg.latents_on_device, cache.bytes / 2**30, math.inf
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] / 2**30
        if wanted == "true" and size > free:
            what = f"takes {size:.3g} GiB, {free:.3g} GiB are free on {self.device}"
            reject("latents_on_device=true", what, "set it to auto or false")
        if wanted == "true" or (wanted == "auto" and self.device.type == "cuda" and size < free / 5):
            log_line(f"keeping the latents on {self.device}: {size:.3g} GiB in each process")
            self.resident, self.flips = cache.load(self.device), cache.flips


class Validation:
    """The `count` images of a run's evaluations, spread over their dataset, which may be sorted by class."""

    def __init__(self, stream, size, count, conditioner):
        """size: images in the dataset of `stream`."""
        self.stream, self.size, self.count, self.conditioner = stream, size, count, conditioner

    def batch(self, rows):
        return collate([self.stream[i * self.size // self.count] for i in rows])

    def inputs(self, rows):
        """As in training, from the mean of the posterior and small images without added noise."""
        device = self.conditioner.device
        noise = {"posterior": torch.zeros((), device=device), "level": torch.zeros(len(rows), device=device)}
        return self.conditioner(self.batch(rows), noise | {"low": torch.zeros(len(rows), 1, 1, 1, device=device)})


# --- evaluation ---


@torch.no_grad()
def evaluate(denoiser, validation, cfg, machine, autocast):
    """Validation loss, not weighted, in all and by tenths of t; an image's noise and t are always the same."""
    cfg = cfg.replace(timesteps="uniform", cond_drop=0.0)
    sums = torch.zeros(2, 10, dtype=torch.float64, device=machine.device)  # of losses and of images
    starts = range(machine.rank, validation.count, machine.world * cfg.batch_size)
    for start in common.progress_bar(starts, "evaluating"):
        rows = range(start, min(start + machine.world * cfg.batch_size, validation.count), machine.world)
        inputs = validation.inputs(rows)
        like, shape = inputs["x0"], inputs["x0"].shape[1:]
        eps = [torch.randn(shape, generator=torch.Generator().manual_seed(seed_of("val", i))) for i in rows]
        t = (0.5 + torch.tensor(rows, dtype=torch.float64) * 0.6180339887498949) % 1.0  # golden ratio: evenly spread
        noise = {"eps": torch.stack(eps).to(like), "t": t.to(like), "drop": torch.ones(len(rows), device=like.device)}
        with autocast:
            losses, _, _ = prediction_error(denoiser, inputs, noise, cfg)
        for row, values in zip(sums, (losses.double(), torch.ones_like(losses).double())):
            row.index_add_(0, (t * 10).long().to(like.device), values)
    if machine.world > 1:
        dist.all_reduce(sums)
    bins = [total / n if n else None for total, n in sums.T.tolist()]
    return {"val_loss": (sums[0].sum() / sums[1].sum()).item(), "val_loss_by_t": bins}


def first_captions(images, count, object_names):
    """The first caption, or the layout, of `count` images of a dataset.  object_names: of layouts, else None."""
    captions = []
    for i in range(count):
        i = i * len(images) // count
        try:
            layout = None if object_names is None else layout_string(images.boxes(i), object_names)
            captions += images.meta(i)["text"][:1] if layout is None else [layout]
        except BadImage:  # training reports it
            pass
    return captions


def save_samples(path, pipeline, validation, cfg, autocast):
    """Write a grid of samples; with a task, each beside the condition of a validation image that it was made from."""
    conditions, images, grid, captions = pipeline.examples, None, [], []
    if cfg.task != "none":  # conditions, prompts and classes of the same images
        batch = validation.batch(range(min(cfg.n_samples, validation.count)))
        images, conditions = batch["condition"], [None] * len(batch["label"])
        if pipeline.text is not None:
            conditions = batch["text"]
        elif cfg.cond == "class":
            conditions = [label if label >= 0 else pipeline.num_classes for label in batch["label"].tolist()]
    seeds, options = range(len(conditions)), dict(sampler=cfg.sampler, inputs=images)
    with autocast:
        samples = generate(pipeline, conditions, seeds, cfg.sample_steps, cfg.guidance, **options)
    for i, (sample, condition) in enumerate(zip(samples, conditions)):
        if images is not None:
            grid.append(show_condition(cfg.task, {name: t[i] for name, t in images.items()}, cfg.image_size))
            captions.append("condition")
        grid.append(sample)
        captions.append(pipeline.caption(condition))
    columns = 0 if images is None else 2 * math.ceil(len(grid) ** 0.5 / 2)  # even: a condition beside its sample
    save_grid(path, torch.stack(grid), captions, columns=columns)


@torch.no_grad()
def predictions(denoiser, vae, inputs, eps, cfg, autocast):
    """(B,6,3,H,W) on the CPU: images, and what the network predicts of them at t = 0.1, 0.3, 0.5, 0.7, 0.9."""
    table, x0, results = noise_schedule(cfg), inputs["x0"], [inputs["x0"]]
    condition = {name: inputs[name] for name in CONDITIONS if name in inputs}
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        t = torch.full((len(x0),), t, dtype=x0.dtype, device=x0.device)
        alpha, sigma = (f(t).view(-1, 1, 1, 1) for f in (table.alpha, table.sigma))
        x_t = alpha * x0 + sigma * eps
        with autocast:
            prediction = denoiser(x_t, unet_time(table, t), **condition)
        results.append(to_x0(cfg.objective, prediction.to(x0.dtype), x_t, alpha, sigma))
    with autocast:
        results = [x if vae is None else vae.decode(vae.denormalize(x)) for x in results]
    return torch.stack(results, dim=1).float().cpu().clamp(-1, 1)


def save_predictions(path, pipeline, validation, cfg, autocast):
    """Write a grid of `predictions`, a row for each image."""
    inputs = validation.inputs(range(min(6, validation.count)))
    eps = torch.randn(inputs["x0"].shape, generator=torch.Generator().manual_seed(0)).to(inputs["x0"])
    rows = predictions(pipeline.denoiser, pipeline.vae, inputs, eps, cfg, autocast)
    captions = ["image", *(f"x0_hat at t={t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9))]
    save_grid(path, rows.flatten(0, 1), captions * len(rows), columns=6)


def count_tflop(denoiser, inputs):
    """TFLOP of training on one image: forward, and twice that for backward; inputs: of any batch."""
    from torch.utils.flop_counter import FlopCounterMode

    twin = copy.deepcopy(denoiser).to("meta", torch.float32)
    inputs = {name: t[:1].to("meta", torch.float32 if t.is_floating_point() else None) for name, t in inputs.items()}
    condition = {name: inputs[name] for name in CONDITIONS if name in inputs}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(inputs["x0"], torch.zeros(1, device="meta"), **condition)
    return 3 * counter.get_total_flops() / 1e12


# --- model ---


def load_first_stage(cfg, latest):
    """The frozen autoencoder.  latest: checkpoint of a resumed run, which has it, or ""."""
    vae = VAE.from_pretrained(latest or cfg.first_stage)
    if latest and os.path.exists(cfg.first_stage):
        if checkpoint.hash_weights(VAE.from_pretrained(cfg.first_stage)) != checkpoint.hash_weights(vae):
            reject(latest, f"was trained on another autoencoder than {cfg.first_stage}", "use another out_dir")
    if not vae.has_latent_statistics:
        remedy = "finish its training, or run train_vae.py with its settings and --measure_latents"
        reject(cfg.first_stage, "has no latent statistics", remedy)
    if cfg.image_size % vae.factor:
        raise UserError(f"image_size={cfg.image_size} must be a multiple of {vae.factor}, the autoencoder's factor")
    return vae


def build_text(cfg, object_names, bpe):
    """The text encoder that is trained with the U-Net.  bpe: its tokenizer if a checkpoint has one, else None."""
    source, file = cfg.tokenizer, f"{cfg.dataset}/bpe.tiktoken"
    if cfg.cond == "layout":
        source = "layout " + json.dumps({"names": object_names})
    elif source == "auto":
        source = file if os.path.exists(file) else "bytes"
    arguments = (cfg.text_width, cfg.text_layers, cfg.text_heads, cfg.text_length, bpe or source)
    text = common.build(TextEncoder, *arguments)
    if bpe and cfg.tokenizer != "auto":
        if make_tokenizer(source)._mergeable_ranks != text.tokenizer._mergeable_ranks:
            reject(cfg.tokenizer, "not the tokenizer that the model was trained with", "leave --tokenizer out")
    return text


def build_denoiser(cfg, latent_shape, text=None, context_dim=0, num_classes=0, map_classes=0):
    """The U-Net with what is trained beside it: text encoder, class tokens, rescaler of label maps, uncertainty."""
    side, class_tokens, rescaler, unet_classes, concat_channels = latent_shape[1], None, None, 0, 0
    if cfg.cond == "class" and cfg.class_embed == "token":
        context_dim, class_tokens = cfg.text_width, torch.nn.Embedding(num_classes + 1, cfg.text_width)
    elif cfg.cond == "class":
        unet_classes = num_classes + 1  # and no class
    if cfg.task == "inpaint":
        concat_channels = 1 + latent_shape[0]
    elif cfg.task == "sr":
        low_side = cfg.image_size // cfg.sr_scale
        if low_side % side and low_side > side:
            raise UserError(f"sr_scale={cfg.sr_scale} gives images of side {low_side}, not a multiple of {side}")
        concat_channels = 3 * max(1, low_side // side) ** 2
        unet_classes = 1000 if cfg.sr_noise else unet_classes  # noise levels in place of classes
    elif cfg.task == "semantic":
        concat_channels, rescaler = 3, Rescaler(map_classes, cfg.image_size // side)
    arguments = {name: cfg[name] for name in inspect.signature(UNet).parameters if name in cfg}
    arguments |= dict(in_channels=latent_shape[0], out_channels=latent_shape[0], concat_channels=concat_channels)
    arguments |= dict(context_dim=context_dim, num_classes=unet_classes)
    unet = common.build(UNet, **arguments)  # another denoiser: its class here and in `arguments`
    if side % unet.side_multiple:
        need = f"latents of side {side}, which must be a multiple of {unet.side_multiple}"
        raise UserError(f"image_size={cfg.image_size} gives {need}: change image_size or channel_mult")
    return Denoiser(unet, text, class_tokens, rescaler, cfg.loss_weight == "uncertainty")


class Initial(NamedTuple):
    """A trained model that a run starts from."""

    model: dict  # as meta["model"] of a checkpoint
    settings: dict  # of files that it needs: first_stage, tower_weights, clip_vocab
    state: dict  # of a Denoiser, without what the model does not have
    bpe: torch.Tensor | None  # the tokenizer's


def read_initial(path, cfg):
    """The `Initial` in our checkpoint or in another project's file or folder."""
    path = checkpoint.find(path)
    if checkpoint.is_ours(path):
        tensors, meta = checkpoint.read(path, "ema", "text")
        if meta["stage"] != "ldm":
            reject(path, "an autoencoder, not a denoiser", "set it as first_stage, not as init_from")
        files = {name: meta["config"][name] for name in ("first_stage", "tower_weights", "clip_vocab")}
        if meta["vae"] and path != f"{cfg.out_dir}/latest.safetensors":  # not of a resumed run
            files["first_stage"] = path
        return Initial(meta["model"], files, part(tensors, "ema"), tensors.get("text.bpe"))
    known = {name: cfg.given[name] for name in ("num_heads", "head_dim") if name in cfg.given}
    known |= {"objective": cfg.given.get("objective", ""), "otherwise": cfg.objective}
    parts = convert.load_pipeline(path, cfg.clip_vocab, **known)
    state = with_prefix("unet", parts["unet"][1])
    if parts["class_tokens"] is not None:
        state["class_tokens.weight"] = parts["class_tokens"]
    files = {"first_stage": path if parts["vae"] else "none"} | ({"tower_weights": path} if parts["text"] else {})
    return Initial(parts["meta"]["model"], files, state, None)


def inherited(cfg, initial, path):
    """The settings of the model to start from; UserError where the user's differ."""
    model = initial.model
    if model["cond"] == "layout":
        reject(path, "a layout model has the object names of its own dataset", "train a new one")
    found = {name: model[name] for name in MODEL_SETTINGS if name not in ("image_size", "ema_stds")}
    found |= model["unet"] | (model["text"] or {})
    if model["class_embed"] == "token":
        found["text_width"] = model["unet"]["context_dim"]
    for name in {"num_res_blocks", "self_attention"} & found.keys():
        found[name] = found[name] if isinstance(found[name], (tuple, list)) else (found[name],)
    found = {name: value for name, value in checkpoint.tuples(found).items() if name in cfg}
    free = {"unet_dropout"} | initial.settings.keys()
    found = {name: v for name, v in (initial.settings | found).items() if name not in free or name not in cfg.given}
    wrong = [f"{name}={v}, not {cfg[name]}" for name, v in found.items() if name in cfg.given and cfg[name] != v]
    if wrong:
        reject(path, f"the model has {', '.join(wrong)}", "leave these settings out")
    return found


def check_settings(cfg):
    """What involves several settings; `configure` has checked each by itself."""
    frozen = cfg.cond == "text" and cfg.text_encoder != "joint"
    guided = cfg.cond != "none" and cfg.guidance != 1
    for name, other in USED_WITH.items():
        setting, _, value = other.partition("=")
        if name in cfg.changed and str(cfg[setting]) != value:
            raise UserError(f"--{name} is only used with --{other}")
    for wrong, message in (
        (cfg.beta_start >= cfg.beta_end, "beta_start must be below beta_end"),
        (cfg.zero_snr and cfg.objective == "eps", "zero_snr cannot be used with objective=eps"),
        (cfg.zero_snr and cfg.schedule in ("flow", "cosine"), "zero_snr is for tables; flow and cosine have zero SNR"),
        (cfg.sr_noise and cfg.cond == "class", "sr_noise and cond=class both use the class embedding: choose one"),
        (frozen != bool(cfg.tower_weights), "a frozen text_encoder needs --tower_weights=FILE, a joint one has none"),
        (guided and not (cfg.cond_drop or cfg.init_from), "guidance needs cond_drop > 0: set it, or --guidance=1"),
    ):
        if wrong:
            raise UserError(message)


if __name__ == "__main__":
    cfg = configure(globals())
    common.install_excepthook()

    # a model to start from determines its settings; of a resumed run they are in its checkpoint
    latest, initial = f"{cfg.out_dir}/latest.safetensors", None
    resumed = os.path.exists(latest)
    if cfg.init_from:
        initial = read_initial(latest if resumed else cfg.init_from, cfg)
        cfg = cfg.replace(**inherited(cfg, initial, cfg.init_from))
    check_settings(cfg)

    # processes, device
    machine = common.setup(cfg)
    rank, world = machine.rank, machine.world
    autocast = torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.precision == "bfloat16")
    if reason := unavailable(cfg.attention, machine.device, getattr(torch, machine.precision)):
        raise UserError(f"attention={cfg.attention}: {reason}")

    # data
    images = Dataset(cfg.dataset, "train", cfg.image_size, cfg.cache_dir, cfg.cache_gb)
    try:
        validation_images = Dataset(cfg.dataset, "val", cfg.image_size, cfg.cache_dir, cfg.cache_gb)
    except ValueError:  # too few images to set some aside
        validation_images = images
    check_task(images, cfg.task, cfg.sr_scale, cfg.sr_degradation, cfg.cond == "layout")
    num_classes = images.num_classes if cfg.cond == "class" else 0
    map_classes = images.map_classes if cfg.task == "semantic" else 0
    object_names = images.object_classes if cfg.cond == "layout" else None
    if cfg.cond == "class" and not num_classes:
        reject(cfg.dataset, "has no labels", "set --cond=none or --cond=text")
    val_count = min(len(validation_images), cfg.val_images)
    described = cfg.cond in ("text", "layout")
    captions = first_captions(validation_images, val_count, object_names) if described else []
    if cfg.cond == "text" and not captions:
        reject(cfg.dataset, "its validation images have no captions", "set --cond=none or --cond=class")

    # resume: a checkpoint has its own autoencoder and tokenizer
    step, micro_steps, images_per_step = 0, cfg.grad_accum, cfg.batch_size * cfg.grad_accum * world
    tensors, meta = checkpoint.read(latest) if resumed else ({}, {})
    if resumed:
        if meta["stage"] != "ldm":
            reject(latest, f"a checkpoint of stage {meta['stage']}, not ldm", "use another out_dir")
        now = {name: cfg[name] for name in ("cond", "text_encoder", "task")}
        now["first_stage"] = "none" if cfg.first_stage == "none" else "vae"
        common.check_same_settings(latest, meta["model"], now)
        common.check_same_settings(latest, meta["config"], {"init_from": cfg.init_from})
        step, images_per_step = meta["step"], meta["images_per_step"]
        micro_steps = common.accumulation(cfg, world, images_per_step, latest)
    common.assert_same_on_all_ranks(step=step, images=len(images))

    # first stage: frozen, or none
    vae = None if cfg.first_stage == "none" else load_first_stage(cfg, latest if resumed else "")
    if vae is not None:
        vae.to(machine.device, machine.param_dtype, memory_format=torch.channels_last)

    # text encoder: trained here, or frozen
    text = tower = tower_hash = None
    if cfg.cond == "text" and cfg.text_encoder != "joint":
        tower = CLIPTextEncoder.from_pretrained(cfg.tower_weights, name=cfg.text_encoder, merges=cfg.clip_vocab)
        tower_hash = checkpoint.hash_weights(tower)
        tower.to(machine.device, machine.param_dtype)
    torch.manual_seed(seed_of(cfg.seed, "init"))
    if cfg.cond == "layout" or (cfg.cond == "text" and tower is None):
        bpe = tensors.get("text.bpe") if resumed else initial and initial.bpe
        text = build_text(cfg, object_names, None if bpe is None else bytes(bpe.tolist()))

    # model
    conditions = (vae, text, tower, num_classes, map_classes, initial and initial.model["sr_schedule"])
    conditioner = Conditioner(cfg, machine, autocast, *conditions)
    latent_shape = conditioner.latent_shape
    context_dim = (text or tower).width if text or tower else 0
    model = build_denoiser(cfg, latent_shape, text, context_dim, num_classes, map_classes)
    if initial and not resumed:
        counts = {name: n for name, n in (("num_classes", num_classes), ("map_classes", map_classes)) if n}
        common.check_same_settings(cfg.init_from, {name: initial.model[name] for name in counts}, counts)
        names = ("in_channels", "concat_channels", "context_dim", "num_classes")
        widths = {name: value for name, value in model.unet.settings.items() if name in names}
        common.check_same_settings(cfg.init_from, initial.model["unet"], widths)
        for name, child in model.named_children():
            if state := part(initial.state, name):
                child.load_state_dict(state)
    initial = None  # free its memory
    model.to(machine.device, machine.param_dtype, memory_format=torch.channels_last)
    model.unet.checkpointing = cfg.checkpointing
    for network in (model, tower) if tower else (model,):
        use_attention(network, cfg.attention)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    averages = {"ema": ema} | {f"ema_power_{i}": copy.deepcopy(ema) for i in range(len(cfg.ema_stds))}
    parameters = list(model.parameters())
    averaged = {name: list(average.parameters()) for name, average in averages.items()}

    # optimizer: no weight decay on biases and norms
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    options = dict(lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)  # of AdamW's forms fused has found_inf
    if cfg.shard_optimizer and world > 1:
        optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    else:
        optimizer = torch.optim.AdamW(groups, **options)

    # what a checkpoint holds, and the state of a resumed run
    about = {"unet": model.unet.settings, "text": text and text.settings, "first_stage": "vae" if vae else "none"}
    about |= {name: cfg[name] for name in MODEL_SETTINGS} | {"num_classes": num_classes, "map_classes": map_classes}
    about |= {"uncertainty": cfg.loss_weight == "uncertainty", "tower_hash": tower_hash}
    about |= {"sr_schedule": conditioner.sr_schedule}
    if resumed:
        common.check_same_settings(latest, meta["model"], about)
        model.load_state_dict(part(tensors, "model"))
        for name, average in averages.items():
            average.load_state_dict(part(tensors, name))
        common.load_optimizer_state(optimizer, model, "optim", tensors)
    tensors = {}

    # what the sample grids show: prompts, one class after the other, or nothing
    examples = [None] * cfg.n_samples
    if described:
        examples = (read_prompts(cfg.prompts) if cfg.prompts else list(dict.fromkeys(captions)))[: cfg.n_samples]
    elif cfg.cond == "class":
        examples = [i % num_classes for i in range(cfg.n_samples)]
    task_settings = {name: about[name] for name in ("task", "sr_scale", "sr_noise", "sr_schedule", "map_classes")}
    pipeline = Pipeline(ema, vae, noise_schedule(cfg), cfg.objective, latent_shape, num_classes, images.classes,
                        examples, task_settings, tower)  # fmt: skip

    # latents: cached on disk and perhaps on the device, or encoded at every step, or the pixels themselves
    stream = Stream(images, cfg.seed, flip=cfg.flip)
    validation_stream = Stream(validation_images, cfg.seed, train=False)
    if vae is not None and cfg.cache_latents:
        stream, validation_stream = (
            LatentCache(s, vae, cfg.cache_dir, machine.precision) for s in (stream, validation_stream)
        )
        for cache in (validation_stream, stream):
            cache.build(vae, machine.device, autocast, cfg.workers, rank, world)
        resident = stream
    options = (cfg.task, cfg.seed, cfg.sr_scale, cfg.sr_degradation, object_names)
    stream, validation_stream = (WithCondition(s, *options) for s in (stream, validation_stream))
    validation = Validation(validation_stream, len(validation_images), val_count, conditioner)

    # log
    tflop = count_tflop(ema, validation.inputs(range(1)))
    log = common.Log(cfg, machine, step, images_per_step, tflop, latest if resumed else "", meta.get("config"))
    log.print(f"{len(images)} training and {len(validation_images)} validation images; {images}")
    log.print(f"{sum(p.numel() for p in parameters):,} parameters, {tflop:.4g} TFLOP per image; latents {latent_shape}")
    if vae is not None and cfg.cache_latents:
        conditioner.keep_latents(resident, log.print)
    if micro_steps != cfg.grad_accum:
        log.print(f"grad_accum={micro_steps} in place of {cfg.grad_accum}, to keep {images_per_step} images per step")
    for prompt in examples if text or tower else ():
        if (text or tower).count_tokens(prompt) > (text or tower).length:
            log.print(f"prompt cut to {(text or tower).length} tokens: {prompt[:60]}")

    # compile, DDP, loader
    net = torch.compile(model) if machine.compile else model
    if world > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, forward_sync_buffers=False)
    batches = loader(stream, step, cfg.max_steps, cfg.batch_size, micro_steps, rank, world, cfg.workers)

    # checkpoints and snapshots
    frozen = {} if text is None else {"text.bpe": torch.tensor(list(text.bpe()), dtype=torch.uint8)}
    started = time.time_ns()
    run = meta["run"] if resumed else started  # tells its snapshots from those of another run
    meta = dict(stage="ldm", model=about, vae=vae and vae.settings, config=cfg, classes=images.classes)
    meta |= dict(examples=examples, git=common.git_revision(), run=run)

    def save(path, snapshot=False):
        """Write all that resuming and sampling need, or as a snapshot the averages only; every rank must call it."""
        state = dict(frozen)
        for name, average in averages.items():
            state |= with_prefix(name, average.state_dict())
        if not snapshot:
            state |= common.optimizer_state(optimizer, model, "optim") | with_prefix("model", model.state_dict())
            state |= with_prefix("vae", vae.state_dict()) if vae else {}
        progress = {"step": step, "images_seen": step * images_per_step, "images_per_step": images_per_step}
        if rank == 0:
            checkpoint.write(path, state, meta | progress | {"snapshot": snapshot})

    # training loop
    model.train()
    stop, start_step = common.Stop(), step

    def due(every):
        return every > 0 and step % every == 0 and step > start_step

    while True:
        # learning rate
        common.set_lr(optimizer, common.learning_rate(step, cfg))

        # evaluate, save, stop
        last, stopping = step >= cfg.max_steps, stop.agreed()
        if last or due(cfg.eval_every):
            log.check()
            log.evaluation(step, evaluate(ema, validation, cfg, machine, autocast))
            if rank == 0:
                save_samples(f"{cfg.out_dir}/samples_{step:08d}.png", pipeline, validation, cfg, autocast)
                save_predictions(f"{cfg.out_dir}/predictions_{step:08d}.png", pipeline, validation, cfg, autocast)
                common.plot_log(cfg.out_dir, PANELS)
            log.restart_clock()
        if (last and cfg.snapshot_every) or due(cfg.snapshot_every):
            log.check()
            save(f"{cfg.out_dir}/ema_{step:08d}.safetensors", snapshot=True)
        if last or stopping or due(cfg.save_every):
            log.check()
            save(latest)
        if last or stopping:
            break

        # forward and backward
        noise = step_noise(step, latent_shape, cfg, machine, micro_steps)
        if cfg.unet_dropout:
            torch.manual_seed(seed_of(cfg.seed, "dropout", step, rank))
        totals, keys = {}, []
        for micro in range(micro_steps):
            batch = next(batches)
            keys += batch["key"]
            for item in batch["bad"]:
                print(f"skipped a bad image: {item}", flush=True)
            net.require_backward_grad_sync = micro == micro_steps - 1  # of DDP: one all-reduce a step
            inputs = conditioner(batch, noise[micro])
            with autocast:
                terms = train_step(net, inputs, noise[micro], cfg)
            (terms["loss"] / micro_steps).backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach() / micro_steps

        # optimizer step, EMA
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip or math.inf)
        ok = common.all_finite(grad_norm, *totals.values())
        common.inner(optimizer).found_inf = (~ok).float()  # AdamW leaves weights and moments alone where this is 1
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        update_ema(averaged["ema"], parameters, step, cfg.ema_decay)
        for i, std in enumerate(cfg.ema_stds):
            update_power_ema(averaged[f"ema_power_{i}"], parameters, step, std)

        # log
        log.step(step, totals, grad_norm, ok, common.learning_rate(step - 1, cfg), keys)

    took = (time.time_ns() - started) / 1e9
    log.print(f"{'finished' if last else 'stopped'} at step {step} after {took:.0f} s: {latest}")
    common.leave(0 if last else 128 + stop.signal)
