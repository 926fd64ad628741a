"""Train a denoiser (stage 2) on the latents of a trained autoencoder, or on pixels.

    python train_ldm.py config/shapes_ldm.py                                          # 1 CPU core, minutes
    python train_ldm.py --dataset=DIR --first_stage=out/vae --cond=text               # one GPU
    python train_ldm.py --dataset=DIR --init_from=FILE_OR_FOLDER --lr=1e-5            # fine-tune, also Stable Diffusion
    torchrun --nproc_per_node=8 train_ldm.py --dataset=DIR --first_stage=out/vae      # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_ldm.py --dataset=DIR

DIR is the dataset of stage 1 or another one; captions or labels are part of it. The same command again resumes the run.
"""

import contextlib
import copy
import inspect
import json
import math
import os

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

import checkpoint
import common
import convert
from attention import unavailable, use_attention
from checkpoint import UserError, part, power_exponent, reject, with_prefix
from configurator import as_text, configure
from data.cache import LatentCache
from data.dataset import BadImage, Buckets, Stream, collate, loader, seed_of, train_and_validation
from data.tasks import WithCondition, augment_low, check_task, image_condition, layout_string, show_condition
from diffusion import OBJECTIVES, SCHEDULES, make_denoiser, make_schedule, samplers, t_max, target, to_x0, unet_time  # noqa: F401
from grid import as_rgb, save_grid
from metrics import off_mps
from sample import Pipeline, generate, read_prompts
from text import CLIPTextEncoder, TextEncoder, make_tokenizer
from unet import Denoiser, Rescaler, UNet
from vae import VAE

# data
dataset = "data/openimages"  # folder of images, tar or parquet shards, or images.npy; or s3://bucket/*.tar and the like
image_size = (256,)  # each >= 1: of the images, a side in pixels, or height,width
image_mode = "RGB"  # L | RGB | RGBA: of the images, as in the first stage; L is gray
buckets = False  # train on sizes of about the area of image_size, each image on the one nearest to its own shape
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
resample = "conv"  # conv | pool | max: else down by a strided convolution, mean or maximum; conv has one on the way up
upsample = "nearest"  # nearest | bilinear | bicubic: interpolation on the way up
unet_patch = 1  # >= 1: fold patches of p x p latents into channels first, for small fast models and pixels
norm_groups = 32  # >= 1: groups of every GroupNorm
unet_dropout = 0.0  # in [0, 1): in every residual block
# diffusion
objective = "flow"  # one of OBJECTIVES: what the network predicts
schedule = "flow"  # one of SCHEDULES: noise schedule; scaled_linear is Stable Diffusion's
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
optimizer = "adamw"  # adamw | muon: muon is for hidden matrices and kernels, beside AdamW for the rest
muon_lr = 0.01  # > 0: muon's learning rate, follows the curve of lr
lr_schedule = "constant"  # constant | cosine | onecycle | multistep: cosine and onecycle end at lr_end
lr_end = 0.0  # in [0, 1]: where cosine and onecycle end, as a share of lr
lr_milestones = (0.6, 0.8, 0.9)  # each in [0, 1]: of multistep, shares of max_steps
lr_decay = 0.1  # in [0, 1]: of multistep, factor at each milestone
warmup_steps = 1000  # >= 0: steps of linear warm-up
beta1 = 0.9  # in [0, 1): of AdamW
beta2 = 0.999  # in [0, 1): of AdamW
weight_decay = 0.01  # >= 0: on matrices and kernels only
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
sampler = "unipc"  # one of samplers: of the sample grids
sample_steps = 20  # in [1, 1000]: of the sampler
guidance = 3.0  # >= 0: classifier-free guidance scale of the grids; 1 disables it
save_every = 1000  # >= 1: steps between checkpoints
snapshot_every = 0  # >= 0: steps between EMA snapshots ema_STEP.safetensors, which are kept; 0 keeps none
log_every = 50  # >= 1: steps between progress lines
dist_timeout = 30.0  # > 0: minutes that a process waits for the others, and for rank 0's evaluation
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto | float32 | bfloat16 | float64: auto is bfloat16 on CUDA, else float32
checkpointing = False  # recompute the U-Net's activations in the backward pass: less memory, 1.4 times the time
compile = "auto"  # auto | true | false: torch.compile; auto on CUDA
attention = "auto"  # auto | triton | xformers | sdpa | sdpa_flash | sdpa_cudnn | sdpa_efficient | sdpa_math | reference
deterministic = False  # bit-exact on CUDA too, slower
wandb = False  # also log to Weights & Biases

# settings that a checkpoint holds as its model's, beside those of U-Net and text encoder
MODEL_SETTINGS = ("cond", "class_embed", "image_size", "image_mode", "objective", "schedule", "beta_start", "beta_end",
                  "zero_snr", "ema_stds", "text_encoder", "task", "sr_scale", "sr_noise")  # fmt: skip
PANELS = {"loss: error at training's t, val_loss at uniform t": ("error", "val_loss"), "gradient norm": ("grad_norm",)}
PANELS |= {"training loss by tenths of t": ("error_by_t",), "validation loss by tenths of t": ("val_loss_by_t",)}


def check_settings(cfg):
    """What involves several settings; `configure` has checked each by itself."""
    frozen = cfg.cond == "text" and cfg.text_encoder != "joint"
    guided = cfg.cond != "none" and cfg.guidance != 1
    for wrong, message in (
        (len(cfg.image_size) not in (1, 2), "image_size must be a side, or height,width"),
        (cfg.buckets and cfg.latents_on_device == "true", "latents_on_device=true needs one size, without buckets"),
        (cfg.beta_start >= cfg.beta_end, "beta_start must be below beta_end"),
        (cfg.zero_snr and cfg.objective == "eps", "zero_snr cannot be used with objective=eps"),
        (cfg.zero_snr and cfg.schedule in ("flow", "cosine"), "zero_snr is for tables; flow and cosine have zero SNR"),
        (cfg.sr_noise and cfg.task != "sr", "sr_noise is only used with task=sr"),
        (cfg.sr_noise and cfg.cond == "class", "sr_noise and cond=class both use the class embedding: choose one"),
        (frozen != bool(cfg.tower_weights), "a frozen text_encoder needs --tower_weights=FILE, a joint one has none"),
        (guided and not (cfg.cond_drop or cfg.init_from), "guidance needs cond_drop > 0: set it, or --guidance=1"),
    ):
        if wrong:
            raise UserError(message)


# --- loss ---


def noise_schedule(cfg):
    return make_schedule(cfg.schedule, cfg.beta_start, cfg.beta_end, zero_snr=cfg.zero_snr)


def training_times(u, cfg):
    """Times (B,) of the training distribution from u (B,) uniform in [0,1)."""
    if cfg.timesteps == "logit_normal":
        u = torch.sigmoid(cfg.t_mean + cfg.t_std * torch.special.ndtri(off_mps(u)).to(u.device))
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
    condition = drop_condition(inputs["condition"], inputs["null"], noise["drop"] < cfg.cond_drop)
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


def drop_condition(condition, null, dropped):
    """The condition, with the empty one where `dropped` (B,); what `null` lacks is never dropped."""
    masks = {name: dropped.view(-1, *[1] * (condition[name].ndim - 1)) for name in null}
    return condition | {name: torch.where(masks[name], null[name], condition[name]) for name in null}


def train_step(denoiser, inputs, noise, cfg):
    """One forward pass -> {"loss": to differentiate, (); "error": not weighted, (); "error_by_t": (2,10)}.

    error_by_t: sums of the error, and counts, by tenths of t.
    """
    error, weight, log_variance = prediction_error(denoiser, inputs, noise, cfg)
    loss = weight * error
    if log_variance is not None:
        loss = error / log_variance.exp() + log_variance  # Karras et al. 2024 (EDM2), eq. 21
    tenth = (10 * training_times(noise["t"], cfg)).long().clamp(max=9)
    in_tenth = tenth[:, None] == torch.arange(10, device=error.device)  # (B,10)
    by_t = torch.stack([(in_tenth * error.detach()[:, None]).sum(dim=0), in_tenth.sum(dim=0)])
    return {"loss": loss.mean(), "error": error.mean(), "error_by_t": by_t}


def step_noise(step, shape, factor, cfg, machine, micro_steps):
    """[{name: (B,...)} for each micro-step]: this rank's slice of the random numbers of a step.

    A function of (seed, step): the same for the global batch on any number of ranks.
    shape: (C,h,w) of x0; factor: pixels per latent along a side.
    "posterior" and "eps" are like x0; "t" and "drop" (B,) uniform in [0,1); "offset" (B,C,1,1) with offset_noise;
    "level" (B,) uniform and "low" like the small image with sr_noise.
    """
    slots = (micro_steps, machine.world, cfg.batch_size)
    generator = torch.Generator(machine.device).manual_seed(seed_of(cfg.seed, "ldm noise", step))

    def normal(*shape):
        return torch.randn(*slots, *shape, generator=generator, device=machine.device)

    def uniform():
        return torch.rand(slots, generator=generator, device=machine.device)

    noise = {"posterior": normal(*shape), "eps": normal(*shape), "t": uniform(), "drop": uniform()}
    if cfg.sr_noise:
        noise["level"] = uniform()
    if cfg.offset_noise:
        noise["offset"] = normal(shape[0], 1, 1)
    if cfg.sr_noise:
        noise["low"] = normal(len(cfg.image_mode), *(side * factor // cfg.sr_scale for side in shape[1:]))
    mine = {name: n[:, machine.rank].to(machine.param_dtype) for name, n in noise.items()}
    return [{name: n[micro] for name, n in mine.items()} for micro in range(micro_steps)]


@torch.no_grad()
def update_ema(averaged, current, decay, ok):
    """averaged <- decay averaged + (1 - decay) current, lists of tensors; ok: () bool, where False nothing changes."""
    rate = ok.to(averaged[0].dtype) * (1 - decay)
    torch._foreach_lerp_(averaged, current, [rate] * len(averaged))


# --- conditioning ---


class Conditioner:
    """Collated batch -> inputs of `train_step` on the device: {"x0", "condition", "null"}.

    condition: arguments of `Denoiser.forward`, batched.  null: of some of them what a dropped one becomes, (1,...).
    A new condition is one more entry of both.
    """

    def __init__(self, cfg, machine, autocast, vae, text, tower, num_classes, map_classes, sr_schedule):
        """text: of the denoiser, trained.  tower: a frozen text encoder.  Those that a run does not have are None."""
        self.cfg, self.device, self.dtype, self.autocast = cfg, machine.device, machine.param_dtype, autocast
        self.vae, self.text, self.tower = vae, text, tower
        self.map_classes, self.sr_schedule = map_classes, sr_schedule
        self.resident, self.flips = None, 1  # cached latents in device memory: see keep_latents
        self.null = {}
        if text is not None or tower is not None:
            self.null = self.encode([""])
        elif cfg.cond == "class":
            self.null = {"y": torch.tensor([num_classes], device=self.device)}

    @torch.no_grad()
    def __call__(self, batch, noise=None):
        """noise: of `step_noise`; None takes the posterior's mean and small images as they are, for evaluation."""
        if noise is None:
            zero = torch.zeros(len(batch["label"]), 1, 1, 1, device=self.device, dtype=self.dtype)
            noise = {"posterior": zero, "low": zero, "level": zero.flatten()}
        x0, condition = self.latents(batch, noise).contiguous(memory_format=torch.channels_last), {}
        if self.text is not None or self.tower is not None:
            condition = self.encode(batch["text"])
        elif self.cfg.cond == "class":
            y = self.send(batch["label"])
            condition["y"] = torch.where(y < 0, self.null["y"], y)  # images without a label have no condition
        if self.cfg.task != "none":
            images = {name: self.send(t) for name, t in batch["condition"].items()}
            images = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in images.items()}
            if self.cfg.sr_noise:
                condition["y"] = (noise["level"] * (self.cfg.sr_noise + 1)).long()
                images["low"] = augment_low(images["low"], condition["y"], noise["low"], self.sr_schedule)
            with self.autocast:
                concat = image_condition(self.cfg.task, self.vae, images, x0.shape[2:], self.map_classes)
            condition["concat"] = concat.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return {"x0": x0, "condition": condition, "null": self.null}

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

    @torch.no_grad()
    def encode(self, prompts):
        """{"tokens": (B,L)} for the text encoder in the denoiser, or {"context": (B,L,D)} of the frozen one."""
        tokens = self.send((self.text or self.tower).tokenize(prompts))
        if self.text is not None:
            return {"tokens": tokens}
        with self.autocast:
            return {"context": self.tower(tokens).to(self.dtype)}

    def send(self, t):
        """To the device. From memory that is not pinned, a copy would wait for all work queued there."""
        on_cuda = self.device.type == "cuda"
        pinned = t.pin_memory() if on_cuda and not t.is_pinned() else t
        return pinned.to(self.device, non_blocking=on_cuda)

    def keep_latents(self, cache):
        """Load a LatentCache into device memory if latents_on_device says so."""
        auto = self.cfg.latents_on_device == "auto" and self.device.type == "cuda"
        if auto:
            torch.cuda.empty_cache()
            auto = cache.bytes < torch.cuda.mem_get_info()[0] / 5
        if auto or self.cfg.latents_on_device == "true":
            self.resident, self.flips = cache.load(self.device), cache.flips


# --- evaluation ---


@torch.no_grad()
def evaluate(denoiser, validation, conditioner, cfg, machine, autocast):
    """Validation loss, not weighted, in all and by tenths of t; an image's noise and t are always the same."""
    cfg, count = cfg.replace(timesteps="uniform", cond_drop=0.0), len(validation)
    losses = off_mps(torch.zeros(count, device=machine.device)).double()
    times = (0.5 + torch.arange(count, dtype=torch.float64) * 0.6180339887498949) % 1.0  # golden ratio: evenly spread
    stride = machine.world * cfg.batch_size
    for start in common.progress_bar(range(machine.rank, count, stride), "evaluating"):
        rows = range(start, min(start + stride, count), machine.world)
        inputs = conditioner(collate([validation[i] for i in rows]))
        x0 = inputs["x0"]
        eps = [torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(seed_of("val", i))) for i in rows]
        noise = {"eps": torch.stack(eps).to(x0), "t": times[list(rows)].to(x0), "drop": x0.new_ones(len(rows))}
        with autocast:
            losses[list(rows)] = off_mps(prediction_error(denoiser, inputs, noise, cfg)[0]).double()
    common.sum_over_ranks(losses)  # every image was on one rank
    losses, tenth = losses.cpu(), (times * 10).long()
    bins = [losses[tenth == k] for k in range(10)]
    return {"val_loss": losses.mean().item(), "val_loss_by_t": [b.mean().item() if len(b) else None for b in bins]}


def choose_examples(cfg, images, validation_images, num_classes, object_names):
    """What the sample grids show: prompts or layouts, one class after the other, or None for each image."""
    if cfg.cond == "class":
        return [i % num_classes for i in range(cfg.n_samples)]
    if cfg.cond == "none":
        return [None] * cfg.n_samples
    if cfg.prompts:
        return read_prompts(cfg.prompts)[: cfg.n_samples]
    sources = (first_captions(dataset, cfg.val_images, object_names) for dataset in (validation_images, images))
    captions = next(filter(None, sources), [""])  # those of training if validation has none
    return list(dict.fromkeys(captions))[: cfg.n_samples]


def first_captions(images, count, object_names):
    """The first caption, or the layout, of `count` images of a dataset.  object_names: of layouts, else None."""
    captions = []
    for i in common.spread(len(images), count):
        with contextlib.suppress(BadImage):  # training reports it
            if object_names is None:
                captions += images.meta(i)["text"][:1]
            else:
                captions.append(layout_string(images.boxes(i), object_names))
    return captions


def save_samples(path, pipeline, validation, cfg, autocast):
    """Write a grid of samples; with a task, each beside the condition of a validation image that it was made from."""
    conditions, images, grid, captions = pipeline.examples, None, [], []
    if cfg.task != "none":  # conditions, prompts and classes of the same images
        batch = collate([validation[i] for i in range(min(cfg.n_samples, len(validation)))])
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
            grid.append(show_condition(cfg.task, {name: t[i] for name, t in images.items()}, sample.shape[1:]))
            captions.append("condition")
        grid.append(sample)
        captions.append(pipeline.caption(condition))
    columns = 0 if images is None else 2 * math.ceil(len(grid) ** 0.5 / 2)  # even: a condition beside its sample
    save_grid(path, torch.stack([as_rgb(image) for image in grid]), captions, columns=columns)


def save_predictions(path, pipeline, inputs, autocast):
    """Write a row for each image: itself, then what the network predicts of it at some t."""
    x0, times = inputs["x0"], (0.1, 0.3, 0.5, 0.7, 0.9)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    denoise = make_denoiser(pipeline.denoiser, pipeline.schedule, pipeline.objective, inputs["condition"])
    rows = [x0]
    with torch.no_grad(), autocast:
        for t in torch.tensor(times, dtype=torch.float64):
            alpha, sigma = pipeline.schedule.alpha(t).item(), pipeline.schedule.sigma(t).item()
            rows.append(denoise(alpha * x0 + sigma * eps, t))
        if pipeline.vae is not None:
            rows = [pipeline.vae.decode(pipeline.vae.denormalize(x)) for x in rows]
    grid = torch.stack(rows, dim=1).flatten(0, 1).float().cpu().clamp(-1, 1)
    save_grid(path, grid, ["image", *(f"x0_hat at t={t}" for t in times)] * len(x0), columns=len(rows))


def count_tflop(denoiser, inputs):
    """TFLOP of training on one image: forward, and twice that for backward.  inputs: of a batch of one."""
    twin = copy.deepcopy(denoiser).to("meta", torch.float32)
    condition = {n: t.to("meta", torch.float32 if t.is_floating_point() else t.dtype)
                 for n, t in inputs["condition"].items()}  # fmt: skip
    x0, t = inputs["x0"].to("meta", torch.float32), torch.zeros(1, device="meta")
    return 3 * common.count_tflop(twin, x0, t, **condition)


# --- model ---


def load_first_stage(cfg, latest):
    """The frozen autoencoder.  latest: checkpoint of a resumed run, which has it, or ""."""
    vae = VAE.from_pretrained(latest or cfg.first_stage)
    if latest and os.path.exists(cfg.first_stage):
        if checkpoint.hash_weights(VAE.from_pretrained(cfg.first_stage)) != checkpoint.hash_weights(vae):
            reject(latest, f"was trained on another autoencoder than {cfg.first_stage}", "use another out_dir")
    if not vae.has_latent_statistics:
        remedy = f"finish its training, or run train_vae.py --measure_latents --ckpt={cfg.first_stage}"
        reject(cfg.first_stage, "has no latent statistics", remedy)
    if (mode := vae.settings["image_mode"]) != cfg.image_mode:
        raise UserError(f"image_mode={cfg.image_mode}, but the autoencoder is of {mode}: set --image_mode={mode}")
    for side in cfg.image_size:
        if side % vae.factor:
            raise UserError(f"image_size={side} must be a multiple of {vae.factor}, the autoencoder's factor")
    return vae


def build_text(cfg, object_names, bpe):
    """The text encoder that is trained with the U-Net.  bpe: its tokenizer if a checkpoint has one, else None."""
    source, file = cfg.tokenizer, f"{cfg.dataset}/bpe.tiktoken"
    if cfg.cond == "layout":
        source = "layout " + json.dumps({"names": object_names})
    elif source == "auto":
        source = file if os.path.exists(file) else "bytes"
    bpe = None if bpe is None else bytes(bpe.tolist())
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
        low_side = cfg.image_size[0] // cfg.sr_scale
        if low_side % side and low_side > side:
            raise UserError(f"sr_scale={cfg.sr_scale} gives images of side {low_side}, not a multiple of {side}")
        concat_channels = len(cfg.image_mode) * max(1, low_side // side) ** 2
        unet_classes = 1000 if cfg.sr_noise else unet_classes  # noise levels in place of classes
    elif cfg.task == "semantic":
        concat_channels, rescaler = 3, Rescaler(map_classes, cfg.image_size[0] // side)
    arguments = {name: cfg[name] for name in inspect.signature(UNet).parameters if name in cfg}
    arguments |= dict(in_channels=latent_shape[0], out_channels=latent_shape[0], concat_channels=concat_channels)
    arguments |= dict(context_dim=context_dim, num_classes=unet_classes)
    if arguments.get("context_pool") and not context_dim:  # of a text model's configuration, with --cond=none
        arguments["context_pool"] = False
    unet = common.build(UNet, **arguments)  # another denoiser: its class here and in `arguments`
    for side in latent_shape[1:]:
        if side % unet.side_multiple:
            need = f"latents of side {side}, which must be a multiple of {unet.side_multiple}"
            raise UserError(f"image_size={as_text(cfg.image_size)} gives {need}: change image_size or channel_mult")
    return Denoiser(unet, text, class_tokens, rescaler, cfg.loss_weight == "uncertainty")


def read_initial(cfg):
    """(tensors, meta) of the model in init_from: EMA, tokenizer; "model" and "config" as in a checkpoint's meta."""
    path = checkpoint.find(cfg.init_from)
    if checkpoint.is_ours(path):
        tensors, meta = checkpoint.read(path, "ema", "text")
        if meta["stage"] != "ldm":
            reject(path, "an autoencoder, not a denoiser", "set it as first_stage, not as init_from")
        if meta["vae"]:
            meta["config"]["first_stage"] = path
        return tensors, {"model": meta["model"], "config": meta["config"]}
    known = {name: cfg.given[name] for name in ("num_heads", "head_dim") if name in cfg.given}
    known |= {"objective": cfg.given.get("objective", ""), "otherwise": cfg.objective}
    parts = convert.load_pipeline(path, cfg.clip_vocab, **known)
    settings, state = parts["unet"]
    with torch.device("meta"):
        settings = UNet(**settings).settings  # with the defaults
    tensors, meta = with_prefix("ema.unet", state), parts["meta"]
    if parts["class_tokens"] is not None:
        tensors["ema.class_tokens.weight"] = parts["class_tokens"]
    for name in ("num_res_blocks", "self_attention"):
        settings[name] = settings[name] if isinstance(settings[name], tuple) else (settings[name],)
    files = {"first_stage": path if parts["vae"] else "none", "tower_weights": path if parts["text"] else ""}
    return tensors, {"model": meta["model"] | {"unet": settings}, "config": files}


def inherited(cfg, meta):
    """The settings of the model to start from, but for those that the user has named."""
    model, found = meta["model"], {}
    if model["cond"] == "layout":
        reject(cfg.init_from, "a layout model has the object names of its own dataset", "train a new one")
    if model["class_embed"] == "token":
        found["text_width"] = model["unet"]["context_dim"]
    found |= {name: meta["config"].get(name, "") for name in ("first_stage", "tower_weights", "clip_vocab")}
    found |= {name: model[name] for name in MODEL_SETTINGS if name not in ("image_size", "ema_stds")}
    found |= checkpoint.tuples(model["unet"] | (model["text"] or {}))
    return {name: value for name, value in found.items() if name in cfg and name not in cfg.given}


if __name__ == "__main__":
    common.install_excepthook()
    cfg = configure(globals())

    # a checkpoint to resume, or a model to start from, has the settings of the model and its tokenizer
    latest, tensors, meta = f"{cfg.out_dir}/latest.safetensors", {}, {}
    resumed = os.path.exists(latest)
    if resumed:
        tensors, meta = checkpoint.read(latest)
        common.check_same_settings(latest, meta, {"stage": "ldm", "init_from": cfg.init_from})
    elif cfg.init_from:
        tensors, meta = read_initial(cfg)
    if cfg.init_from:
        cfg = cfg.replace(**inherited(cfg, meta))
    check_settings(cfg)

    # processes, device, precision
    machine = common.setup(cfg)
    rank, world = machine.rank, machine.world
    autocast = torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.precision == "bfloat16")
    if reason := unavailable(cfg.attention, machine.device, getattr(torch, machine.precision)):
        raise UserError(f"attention={cfg.attention}: {reason}")
    step, images_per_step, micro_steps = common.start(cfg, world, meta, latest)

    # data
    options = (cfg.image_size, cfg.cache_dir, cfg.cache_gb, cfg.image_mode)
    images, validation_images = train_and_validation(cfg.dataset, *options)
    common.assert_same_on_all_ranks(step=step, images=len(images))
    if rank == 0:  # before labels that are ids make a model too large, and before hours of caching
        print(images, flush=True)
    check_task(images, cfg.task, cfg.sr_scale, cfg.sr_degradation, cfg.cond == "layout")
    conditions = {"none": "images", "text": "captions", "class": "labels", "layout": "objects"}[cfg.cond]
    if not images.counts[conditions]:
        reject(cfg.dataset, f"its training images have no {conditions}", "set another --cond, such as none")
    if images.counts[conditions] < len(images) and rank == 0:
        print(f"{conditions} on {images.counts[conditions]} of {len(images)} training images, the others have none")
    num_classes = images.num_classes if cfg.cond == "class" else 0
    map_classes = images.map_classes if cfg.task == "semantic" else 0
    object_names = images.object_classes if cfg.cond == "layout" else None
    examples = choose_examples(cfg, images, validation_images, num_classes, object_names)

    # frozen models: first stage, text encoder
    vae = None if cfg.first_stage == "none" else load_first_stage(cfg, latest if resumed else "")
    text = tower = tower_hash = None
    if cfg.cond == "text" and cfg.text_encoder != "joint":
        tower = CLIPTextEncoder.from_pretrained(cfg.tower_weights, name=cfg.text_encoder, merges=cfg.clip_vocab)
        tower_hash = checkpoint.hash_weights(tower)
        use_attention(tower, cfg.attention)
    for frozen in filter(None, (vae, tower)):
        frozen.to(machine.device, machine.param_dtype, memory_format=torch.channels_last)

    # model
    torch.manual_seed(seed_of(cfg.seed, "init"))
    if cfg.cond == "layout" or (cfg.cond == "text" and tower is None):
        text = build_text(cfg, object_names, tensors.get("text.bpe"))
    encoder = text or tower
    channels, factor = (vae.latent_channels, vae.factor) if vae else (len(cfg.image_mode), 1)
    latent_shape = (channels, *(side // factor for side in images.sides))
    model = build_denoiser(cfg, latent_shape, text, encoder.width if encoder else 0, num_classes, map_classes)
    model.to(machine.device, machine.param_dtype, memory_format=torch.channels_last)
    model.unet.checkpointing = cfg.checkpointing
    use_attention(model, cfg.attention)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    averages = {"ema": ema} | {f"ema_power_{i}": copy.deepcopy(ema) for i in range(len(cfg.ema_stds))}
    parameters = list(model.parameters())  # listed once: walking modules is slow
    averaged = {name: list(average.parameters()) for name, average in averages.items()}
    opt = common.make_optimizer(model, cfg, machine)

    # weights and state of the checkpoint, or weights of the model to start from
    sr_schedule = meta["model"]["sr_schedule"] if meta else None
    about = {name: cfg[name] for name in MODEL_SETTINGS}
    about |= dict(unet=model.unet.settings, text=text and text.settings, first_stage="vae" if vae else "none")
    about |= dict(uncertainty=cfg.loss_weight == "uncertainty", tower_hash=tower_hash, sr_schedule=sr_schedule)
    about |= dict(num_classes=num_classes, map_classes=map_classes)
    if resumed:
        common.check_same_settings(latest, meta["model"], about)
        model.load_state_dict(part(tensors, "model"))
        for name, average in averages.items():
            average.load_state_dict(part(tensors, name))
        common.load_optimizer_state(opt, model, "optim", tensors)
    elif cfg.init_from:
        free = ("image_size", "ema_stds", "uncertainty", "unet_dropout", "first_stage", "tower_hash")
        common.check_same_settings(cfg.init_from, meta["model"], about, free)
        for name, child in model.named_children():  # all but a new log_variance
            if state := part(tensors, f"ema.{name}"):
                child.load_state_dict(state)
        for average in averages.values():
            average.load_state_dict(model.state_dict())
    del tensors

    # latents: cached on disk and perhaps on the device, or encoded at every step, or the pixels themselves
    conditioner = Conditioner(cfg, machine, autocast, vae, text, tower, num_classes, map_classes, sr_schedule)
    multiple = math.lcm(factor * model.unet.side_multiple, cfg.sr_scale if cfg.task == "sr" else 1)
    datasets = images.in_buckets(multiple) if cfg.buckets else [images]
    streams = [Stream(data, cfg.seed, flip=cfg.flip) for data in datasets]
    streams.append(Stream(validation_images, cfg.seed, train=False))
    if vae and cfg.cache_latents:
        streams = [LatentCache(stream, vae, cfg.cache_dir, machine.precision) for stream in streams]
        for i, cache in enumerate(streams):  # small ones each on another rank
            cache.build(vae, machine.device, autocast, cfg.workers, (rank + i) % world, world)
        if not cfg.buckets:
            conditioner.keep_latents(streams[0])
    options = (cfg.task, cfg.seed, cfg.sr_scale, cfg.sr_degradation, object_names)
    *conditioned, validation_stream = (WithCondition(stream, *options) for stream in streams)
    stream = Buckets(conditioned, cfg.seed, images_per_step) if cfg.buckets else conditioned[0]
    validation = Subset(validation_stream, common.spread(len(validation_images), cfg.val_images))

    # log
    tflop = count_tflop(ema, conditioner(collate([validation[0]])))
    log = common.Log(cfg, machine, images_per_step, images.fingerprint, meta if resumed else {}, tflop)
    log.print(f"{sum(p.numel() for p in parameters):,} parameters, {tflop:.4g} TFLOP per image; latents {latent_shape}")
    if cfg.buckets:
        log.print(stream)
    if conditioner.resident is not None:
        log.print(f"latents kept on {machine.device}: {streams[0].bytes / 2**30:.3g} GiB in each process")
    for prompt in examples if encoder else ():
        if encoder.count_tokens(prompt) > encoder.length:
            log.print(f"prompt cut to {encoder.length} tokens: {prompt[:60]}")

    # compile, DDP, loader
    net = torch.compile(model) if machine.compile else model
    if world > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, forward_sync_buffers=False)
    batches = loader(stream, step, cfg.max_steps, cfg.batch_size, micro_steps, rank, world, cfg.workers)
    pipeline = Pipeline(ema, vae, noise_schedule(cfg), cfg.objective, latent_shape, num_classes, images.classes,
                        examples, about, tower)  # fmt: skip
    model.train()

    def due(every):
        return every > 0 and step % every == 0 and step > start_step

    # training loop
    stop, start_step = common.Stop(), step
    while True:
        lr_now = common.learning_rate(step, cfg)
        common.set_lr(opt, lr_now)

        # evaluate, save, stop
        last, stopping = step >= cfg.max_steps, stop.agreed()
        evaluating, saving = last or due(cfg.eval_every), last or stopping or due(cfg.save_every)
        snapshot = due(cfg.snapshot_every) or (last and cfg.snapshot_every > 0)
        if evaluating or saving or snapshot:
            log.check()  # nothing is saved after a step that was not finite
            if evaluating:
                log.evaluation(step, evaluate(ema, validation, conditioner, cfg, machine, autocast))
            if evaluating and rank == 0:
                save_samples(f"{cfg.out_dir}/samples_{step:08d}.png", pipeline, validation, cfg, autocast)
                batch = collate([validation[i] for i in range(min(6, len(validation)))])
                save_predictions(f"{cfg.out_dir}/predictions_{step:08d}.png", pipeline, conditioner(batch), autocast)
                common.plot_log(cfg.out_dir, PANELS)
            state = common.optimizer_state(opt, model, "optim") if saving else {}  # all ranks take part
            if rank == 0:
                header = log.header(step, stage="ldm", model=about, vae=vae and vae.settings, examples=examples)
                header |= {"classes": images.classes}
                tensors = {"text.bpe": torch.tensor(list(text.bpe()), dtype=torch.uint8)} if text else {}
                for name, average in averages.items():
                    tensors |= with_prefix(name, average.state_dict())
                if snapshot:  # the averages alone
                    path = f"{cfg.out_dir}/ema_{step:08d}.safetensors"
                    checkpoint.write(path, tensors, header | {"snapshot": True})
                if saving:
                    tensors |= state | with_prefix("model", model.state_dict())
                    tensors |= with_prefix("vae", vae.state_dict()) if vae else {}
                    checkpoint.write(latest, tensors, header)
            log.restart_clock()  # this was not training time
        if last or stopping:
            break

        # forward and backward
        height, width = stream.sides(step) if cfg.buckets else images.sides
        shape = (channels, height // factor, width // factor)
        noise = step_noise(step, shape, factor, cfg, machine, micro_steps)
        if cfg.unet_dropout:
            torch.manual_seed(seed_of(cfg.seed, "dropout", step, rank))
        totals = {}
        for micro in range(micro_steps):
            batch = next(batches)
            log.saw(batch)
            net.require_backward_grad_sync = micro == micro_steps - 1  # one all-reduce a step
            inputs = conditioner(batch, noise[micro])
            with autocast:
                terms = train_step(net, inputs, noise[micro], cfg)
            (terms["loss"] / micro_steps).backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0.0) + term.detach() / micro_steps

        # optimizer step, EMA: nothing carried to the next step changes where ok is false
        totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip or math.inf)
        ok = common.all_finite(*totals.values())  # the same on all ranks
        common.inner(opt).found_inf = (~ok).float()
        opt.step()
        opt.zero_grad()
        step += 1
        update_ema(averaged["ema"], parameters, min(cfg.ema_decay, (1 + step) / (10 + step)), ok)
        for i, std in enumerate(cfg.ema_stds):  # Karras et al. 2024 (EDM2), section 3.1
            decay = (1 - 1 / step) ** (power_exponent(std) + 1)
            update_ema(averaged[f"ema_power_{i}"], parameters, decay, ok)
        log.step(step, totals, ok, lr_now)

    log.end(step, stop)
