"""Stage 1: trains the autoencoder on images: L1 or L2 + LPIPS + KL or codebook + GAN.

    python data/shapes/prepare.py && python train_vae.py config/shapes_vae.py         # 2 CPU cores, minutes
    python train_vae.py --dataset=DIR                                                 # one GPU, KL-f8 at 256 px
    torchrun --nproc_per_node=8 train_vae.py --batch_size=12 --dataset=DIR            # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_vae.py --dataset=DIR
    python train_vae.py config/ft_mse.py --init_from=out/vae --dataset=DIR            # only the decoder, further
    python train_vae.py --eval_only=True --ckpt=out/vae --dataset=DIR                 # scores and a picture

DIR is a folder of images, of tar or parquet shards, or images.npy. The same command again resumes the run.
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
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from configurator import configure
from convert import find_checkpoint
from data.dataset import Dataset, Stream, loader, seed_of, uniform
from lpips_train import LPIPS, MIN_SIDE, make_trunk
from metrics import frechet, load_inception, psnr, ssim
from vae import VAE, Attention, Discriminator, ResBlock, turn_and_scale
from watch import Watch, fresh_store

# data
dataset = "data/openimages"  # folder of images, tar or parquet shards, or images.npy; or s3://bucket/*.tar and the like
image_size = 256  # side in pixels of the crops it trains on
crop = "random"  # random (a square of 0.5 to 1 times the short side) | center
flip = True  # mirror half of the images
workers = 4  # processes that decode images; 0 decodes in the main one
cache_dir = "cache"  # where the index of shards is kept, and shards of a dataset given by URL
cache_gb = 64.0  # GB of such shards kept there at most
# model: what VAE() takes; the defaults are KL-f8
ch = 128  # channels at full resolution
ch_mult = (1, 2, 4, 4)  # times ch: channels of each level, each half the side of the one before
num_res_blocks = 2  # in each level of the encoder; the decoder has one more
z_channels = 4  # channels of the latents
attn_resolutions = ()  # sides whose levels have attention, in pixels of a resolution-sized image
resolution = 256  # the side attn_resolutions speaks of; does not limit what can be encoded
mid_attention = True  # attention in the middle
latent_proj = True  # 1x1 convolutions around the latents
bottleneck = "kl"  # kl | vq
codebook_size = 8192  # vq: how many codes
embed_dim = 0  # channels of the latents between the 1x1 convolutions; 0 is z_channels
vq_beta = 0.25  # vq: weight of the commitment term
vq_legacy = False  # vq: vq_beta on the codebook term instead, as CompVis trained
activation = "silu"  # silu | swiglu
downsample = "conv"  # conv | avg | max
upsample = "nearest"  # nearest | bilinear | bicubic
linear_attention = False  # linear-time attention after every resampler
patch_size = 1  # p > 1 folds p x p pixels into channels first: fast small models
norm_groups = 32  # groups of every GroupNorm
dropout = 0.0  # in every residual block
tanh_out = False  # tanh on the decoder's output
# loss: means per pixel, so that it does not depend on the resolution
recon_loss = "l1"  # l1 | l2
perceptual_weight = 1.0  # of LPIPS; 0 does without it
lpips_net = "vgg"  # vgg | alex | squeeze
lpips_trunk = ""  # torchvision's ImageNet weights of it, a .pth; "" fetches them once. Given, it is measured anyway
lpips_heads = ""  # our checkpoint or a published .pth; "" is the published v0.1 of the package lpips
kl_weight = 1e-6  # of the KL summed over an image's latents, divided by its 3 H W values, as the means are
codebook_weight = 1.0  # vq: of the codebook loss
restart_every = 1000  # vq: steps after which codes that were unused in them become encoder outputs; 0 is never
equivariance_prob = 0.0  # share of steps that turn and scale the latents and compare with images treated alike (EQ-VAE)
# discriminator
disc_weight = 0.5  # of the generator's GAN term, times the adaptive weight; 0 does without it
disc_start = 50_001  # the first step (they count from 1) whose autoencoder sees the discriminator
disc_warmup = 0  # steps before it in which the discriminator trains alone
disc_ramp = 0  # steps from it on in which the GAN term's weight rises linearly
disc_loss = "hinge"  # hinge | vanilla | least_squares
adaptive_weight = True  # times |gradient of recon and LPIPS| / |gradient of GAN| at the decoder's last layer
adaptive_min = 0.0  # least and ...
adaptive_max = 0.0509  # ... greatest ratio; CompVis clamps at 1e4 for sums over an image: / 196,608 values at 256 px
disc_layers = 3  # 3 judges patches of 70 x 70 pixels, 2 of 34 x 34
disc_channels = 64  # of its first layer
disc_norm = "group"  # group | batch (as published; each process for itself) | none
disc_spectral_norm = False  # spectral normalisation of its kernels
disc_lr = 1e-4  # follows the curve of lr
r1_weight = 0.0  # R1: half of it times the squared gradient of the summed real logits, a mean per pixel
lecam_weight = 0.0  # LeCam: pulls the logits to the other side's running mean, for little data
# optimizer
batch_size = 12  # images per process and micro-step
grad_accum = 2  # micro-steps per optimizer step
max_steps = 250_000  # optimizer steps
lr = 1e-4  # absolute: nothing rescales it
lr_schedule = "constant"  # constant | cosine (to lr_end) | onecycle (up and down to lr_end) | multistep
lr_end = 0.0  # where cosine and onecycle end, as a share of lr
lr_milestones = (0.6, 0.8, 0.9)  # multistep: shares of max_steps at which lr_decay strikes
lr_decay = 0.1  # multistep: factor at each milestone
warmup_steps = 1000  # steps of linear warm-up
beta1 = 0.5  # AdamW
beta2 = 0.9  # AdamW
weight_decay = 0.0  # AdamW, on matrices and kernels only
grad_clip = 1.0  # largest gradient norm of the autoencoder; 0 is no clipping
skip_spikes = 0.0  # leave out a step whose gradient norm is over so many times its running mean; 0 leaves out none
shard_optimizer = False  # each process keeps the optimizer state of its share of the parameters alone (ZeRO stage 1)
ema_decay = 0.9999  # of the averaged weights, warmed up as (1 + n) / (10 + n)
# where it starts and what it trains
init_from = ""  # start from the EMA weights of this checkpoint, ours or another's, as it was built; "" starts anew
train = "all"  # all | decoder: encoder, codebook, latents and their statistics stay as they are
# run
out_dir = "out/vae"  # checkpoint, log and pictures
seed = 0  # of weights, data order and noise
eval_every = 5000  # steps between evaluations on the validation images
val_images = 1000  # how many of them
save_every = 1000  # steps between checkpoints
snapshot_every = 0  # steps between kept EMA snapshots ema_STEP.safetensors; 0 keeps none
log_every = 50  # steps between progress lines
hang_timeout = 30.0  # minutes in which a rank makes no progress, after which the run says which one and ends
latent_images = 10_000  # training images over which the latent statistics are measured
measure_latents = False  # only measure them again for the checkpoint in out_dir
eval_only = False  # only evaluate ckpt on val_images images of dataset
ckpt = ""  # eval_only: a checkpoint or out_dir; "" is out_dir
eval_split = "all"  # eval_only: all | train | val | test images of dataset
inception_weights = ""  # eval_only: torch-fidelity's Inception weights, a .pth, for rFID; "" does without it
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto (bfloat16 on CUDA, else float32) | float32 | bfloat16 | float64
compile = "auto"  # torch.compile: auto (on CUDA) | true | false
checkpointing = False  # computes inner activations twice instead of keeping them: less memory, a third slower
deterministic = False  # bit-exact on CUDA too, slower
wandb = False  # send the log to Weights & Biases too

# dense bf16 (V100: fp16)
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "V100": 125}


def widened(x):
    """x in float32, or in float64 if it is: out of autocast's bfloat16."""
    return x if x.dtype == torch.float64 else x.float()


def generator_loss(fake, kind):
    """What the autoencoder wants of the logits of its reconstructions: that they look real."""
    if kind == "hinge":
        return -fake.mean()
    return F.softplus(-fake).mean() if kind == "vanilla" else 0.5 * (fake - 1).square().mean()


def discriminator_loss(real, fake, kind):
    """Of the logits of images and of reconstructions; where it tells nothing apart: 1, log 2 and 1/4."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if kind == "vanilla":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    return 0.5 * ((real - 1).square().mean() + fake.square().mean())


def train_step(models, batch, noise, cfg, gan_weight=None):
    """One forward pass -> {name: scalar loss term}; the autoencoder has "loss" to differentiate, the other "disc_loss".

    models: vae, and where they take part lpips and disc. batch["image"] (B,3,H,W) in [-1,1]; noise["posterior"]
    (B,C,h,w) picks the latent sample, noise["transform"], if there, (turns, side) of turn_and_scale for the latents.
    gan_weight: of the autoencoder's GAN term; None as long as it is not to see the discriminator.
    The gradient of neither loss reaches the other's parameters. "each" (B,) is finite where an image's loss is.
    VQ: "indices" (B,h,w) and "latents" are there too.
    """
    x, transform = batch["image"], noise.get("transform", ())
    reconstruction, posterior = models["vae"](x, noise["posterior"], *transform)
    reconstruction = widened(reconstruction)
    per_value = 1 / x.numel()
    if transform:
        x = turn_and_scale(x, transform[0], transform[1] and reconstruction.shape[-1])
    error = reconstruction - x
    terms = {"each": error.detach().sum(dim=(1, 2, 3))}  # not finite where an image's own loss is not
    terms["recon"] = error.abs().mean() if cfg["recon_loss"] == "l1" else error.square().mean()
    terms["nll"] = terms["recon"]
    if "lpips" in models:
        perceptual = models["lpips"](reconstruction, x, check=False)
        terms["each"], terms["perceptual"] = terms["each"] + perceptual.detach(), perceptual.mean()
        terms["nll"] = terms["recon"] + cfg["perceptual_weight"] * terms["perceptual"]
    if getattr(posterior, "indices", None) is not None:
        terms["codebook"] = posterior.loss
        terms["loss"] = terms["nll"] + cfg["codebook_weight"] * terms["codebook"]
        terms |= {"indices": posterior.indices, "latents": posterior.mean.detach()}
    else:
        kl = posterior.kl()
        terms["each"] = terms["each"] + kl.detach().sum(dim=(1, 2, 3))
        terms["kl"] = kl.sum() * per_value  # nats per value of the images
        terms["loss"] = terms["nll"] + cfg["kl_weight"] * terms["kl"]
    if "disc" in models:
        disc, kind = models["disc"], cfg["disc_loss"]
        if gan_weight is not None:
            disc.requires_grad_(False)  # here only the reconstruction learns
            terms["gan"] = generator_loss(widened(disc(reconstruction)), kind)
            disc.requires_grad_(True)
            terms["gan_weight"] = torch.as_tensor(gan_weight, device=x.device, dtype=x.dtype)
            terms["loss"] = terms["loss"] + gan_weight * terms["gan"]
        x = x.detach().requires_grad_(cfg["r1_weight"] > 0)
        real, fake = widened(disc(x)), widened(disc(reconstruction.detach()))  # apart, that no BatchNorm mixes them
        terms["disc_loss"] = discriminator_loss(real, fake, kind)
        if cfg["r1_weight"] > 0:  # Mescheder et al. 2018, arXiv 1801.04406
            (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
            terms["disc_loss"] = terms["disc_loss"] + 0.5 * cfg["r1_weight"] * slope.square().mean()
        if cfg["lecam_weight"] > 0:  # Tseng et al. 2021, arXiv 2104.03310, equation 3
            usual_real, usual_fake = disc.mean_logits
            apart = (real - usual_fake).square().mean() + (fake - usual_real).square().mean()
            terms["disc_loss"] = terms["disc_loss"] + cfg["lecam_weight"] * apart
        terms |= {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
    return terms


def gan_share(nth, cfg):
    """The ramp's factor of the GAN term in step nth = 1, 2, ...; None before the autoencoder sees the discriminator."""
    done = nth - cfg["disc_start"] + 1
    return None if done < 1 else min(1.0, done / (cfg["disc_ramp"] + 1))


def adaptive_ratio(gradients, cfg):
    """Clamped |gradient of nll| / |gradient of GAN| from both at the last layer (2, ...) (Esser et al. 2021, eq. 7)."""
    nll, gan = gradients.flatten(1).norm(dim=1)
    return (nll / (gan + 1e-4)).clamp(cfg["adaptive_min"], cfg["adaptive_max"])


def latent_transform(step, cfg, factor):
    """(turns, side) that optimizer step `step`'s latents go through, () for most (EQ-VAE, arXiv 2502.09509)."""
    if uniform(cfg["seed"], "equivariance", step) >= cfg["equivariance_prob"]:
        return ()
    whole = cfg["image_size"] // factor
    sides = [0] + [side for side in (whole // 4, whole // 2, 3 * whole // 4) if side * factor >= least_side(cfg)]
    kinds = [(turns, side) for turns in range(4) for side in sides][1:]  # the first would change nothing
    return kinds[int(uniform(cfg["seed"], "which equivariance", step) * len(kinds))]


def least_side(cfg):
    """Of images, in pixels, that all parts of the loss can look at."""
    perceptual = MIN_SIDE[cfg["lpips_net"]] if cfg["perceptual_weight"] else 1
    return max(11, perceptual, 3 * 2 ** cfg["disc_layers"] if cfg["disc_weight"] else 1)  # 11 is SSIM's window


def restart_positions(step, count, codes, cfg):
    """Which of a global batch's `count` latent vectors stand by for each of the codes: (codes,)."""
    generator = torch.Generator().manual_seed(seed_of(cfg["seed"], "restart", step))
    return torch.randint(count, (codes,), generator=generator)


def vectors_at(positions, latents, slot):
    """Of the vectors at positions (K,) of a global batch those in its slot-th part, latents (B,D,h,w), or 0: (K,D)."""
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    here = positions - slot * len(rows)
    return torch.where(((here >= 0) & (here < len(rows)))[:, None], rows[here.clamp(0, len(rows) - 1)], 0.0)


@torch.no_grad()
def restart_codes(model, ema, optimizer, dead, candidates):
    """Puts candidates (K,D) in the place of the codes marked in dead (K,) bool, which the optimizer then forgets."""
    codes = model.quantize.embedding.weight
    for weight in (codes, ema.quantize.embedding.weight):
        weight.copy_(torch.where(dead[:, None], candidates.to(weight.dtype), weight))
    if codes in optimizer.state:  # of a shared one's, on one rank
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[codes][moment].masked_fill_(dead[:, None], 0.0)


def code_use(counts):
    """(share of the codes used, perplexity: as many codes as would carry as much if used alike) of counts (K,)."""
    p = counts / counts.sum()
    return (counts > 0).to(counts.dtype).mean(), torch.special.entr(p).sum().exp()


def average_gradients(module, world):
    """Over all ranks, in one message; for what DDP does not wrap, as the discriminator runs several times a step."""
    gradients = [p.grad for p in module.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, part in zip(gradients, (flat / world).split([g.numel() for g in gradients])):
        g.copy_(part.view_as(g))


def verdict(loss, real, fake, kind):
    """What is wrong with a discriminator whose averages over many steps are these, in words; "" if nothing is."""
    blind, numbers = {"hinge": 1.0, "vanilla": math.log(2), "least_squares": 0.25}[kind], f"its loss is {loss:.3f}"
    numbers += f", its logits are {real:.3f} for images and {fake:.3f} for reconstructions"
    if abs(loss - blind) < 0.03 * blind and abs(real - fake) < 0.03:
        return f"the discriminator tells nothing apart ({numbers}): raise disc_lr, or give it disc_warmup steps alone"
    if loss < 0.03 * blind:
        return f"the discriminator has won ({numbers}): lower disc_lr or disc_weight, or set r1_weight or lecam_weight"
    return ""


@torch.no_grad()
def evaluate(vae, stream, cfg, rank, world, device, autocast, lpips=None, inception=None):
    """Means over the validation images, and (originals, reconstructions) of up to eight of this rank's first batch.

    Beside them lists by channel: KL, and mean, deviation and farthest value of the latents; the largest activation of
    any block; for VQ how much of the codebook is used. With inception the rFID.
    """
    C, pictures = vae.latent_channels, None
    sums = torch.zeros(7 + 3 * C, dtype=torch.float64, device=device)
    largest = torch.zeros(1, dtype=torch.float64, device=device)
    reach = torch.full((2, C), -math.inf, dtype=torch.float64, device=device)  # of latents and of their negatives
    codes = torch.zeros(len(vae.quantize.embedding.weight) if vae.quantize else 0, dtype=torch.float64, device=device)
    seen = torch.zeros(2, 2049, 2048 if inception else 0, dtype=torch.float64, device=device)  # sums of f f^T, and of f

    def watch(module, inputs, output):
        torch.maximum(largest, output.abs().amax().double(), out=largest)

    hooks = [m.register_forward_hook(watch) for m in vae.modules() if isinstance(m, (ResBlock, Attention))]
    count = min(len(stream.dataset), cfg["val_images"])
    for start in range(rank, count, world * cfg["batch_size"]):
        spread = len(stream.dataset) / count  # over all of them, which may be sorted by class
        rows = [stream[int(i * spread)] for i in range(start, min(start + world * cfg["batch_size"], count), world)]
        x = torch.stack([row["image"] for row in rows]).to(device)
        with autocast():
            posterior = vae.encode(x.to(vae.latent_mean.dtype))
            reconstruction = vae.decode(posterior.mode()).float()
        l1 = (reconstruction - x).abs().mean(dim=(1, 2, 3))
        terms = [l1, psnr(reconstruction, x), ssim(reconstruction, x)]
        terms += [posterior.kl().sum(dim=(1, 2, 3)) / x[0].numel(), posterior.std.mean(dim=(1, 2, 3))]
        with autocast():
            pair = (a.clamp(-1, 1).to(vae.latent_mean.dtype) for a in (reconstruction, x))
            terms += [lpips(*pair) if lpips else 0 * l1]
        mean, std = posterior.mean.double(), posterior.std.double()
        channels = [posterior.kl().sum(dim=(2, 3)), mean.mean(dim=(2, 3)), (mean**2 + std**2).mean(dim=(2, 3))]
        singles = torch.stack([term.double() for term in (*terms, torch.ones_like(l1))], dim=1)
        sums += torch.cat([singles, *(value.double() for value in channels)], dim=1).sum(dim=0)
        reach = torch.maximum(reach, torch.stack([mean, -mean]).amax(dim=(1, 3, 4)))
        if vae.quantize:
            codes += torch.bincount(vae.quantize.nearest(posterior.mean).flatten(), minlength=len(codes))
        if inception:
            for k, images in enumerate((x, reconstruction)):
                f = inception(((images.clamp(-1, 1) + 1) * 127.5).round().byte()).to(device).double()
                seen[k, :-1] += f.T @ f
                seen[k, -1] += f.sum(dim=0)
        if pictures is None:
            pictures = (x[:8].cpu(), reconstruction[:8].cpu())
    for hook in hooks:
        hook.remove()
    if world > 1:
        for t, how in ((sums, "SUM"), (codes, "SUM"), (seen, "SUM"), (largest, "MAX"), (reach, "MAX")):
            dist.all_reduce(t, getattr(dist.ReduceOp, how))
    n = sums[6]
    kl, mean, square = (sums[7:] / n).view(3, C)
    names = ("val_l1", "val_psnr", "val_ssim", "val_kl", "val_posterior_std", "val_lpips")
    scores = dict(zip(names, (sums[:6] / n).tolist()))
    if not lpips:
        del scores["val_lpips"]
    if vae.quantize:
        scores |= dict(zip(("val_codes_used", "val_perplexity"), (value.item() for value in code_use(codes))))
    if inception:
        mean_f = seen[:, -1] / n
        cov_f = (seen[:, :-1] - n * mean_f[:, :, None] * mean_f[:, None]) / (n - 1)
        scores["val_rfid"] = frechet(mean_f[0], cov_f[0], mean_f[1], cov_f[1])
    scores["val_largest_activation"] = largest.item()
    std = (square - mean**2).sqrt()
    far = torch.maximum(reach[0] - mean, reach[1] + mean) / std
    lists = {"val_kl_per_channel": kl, "val_latent_mean": mean, "val_latent_std": std, "val_latent_farthest": far}
    return scores | {name: [round(v, 5) for v in t.tolist()] for name, t in lists.items()}, pictures


@torch.no_grad()
def latent_statistics(vae, images, cfg, rank, world, device, autocast):
    """Per-channel mean and standard deviation of posterior samples over the training set: two (C,) tensors.

    With a codebook the deviation is the same for all channels: the nearest code is the same in any one unit, but not
    in several. The variance of a sample is the variance of the mean plus the mean of the variance: no noise is drawn.
    """
    sums = torch.zeros(3, vae.latent_channels, dtype=torch.float64, device=device)  # of 1, z, z^2
    count = min(len(images), cfg["latent_images"])
    picks = [i * len(images) // count for i in range(count)]  # spread over the whole set
    for start in range(rank, count, world * cfg["batch_size"]):
        rows = []
        for i in picks[start : start + world * cfg["batch_size"] : world]:
            try:
                rows.append(images[i]["image"])
            except ValueError:  # does not decode; training has said so
                continue
        if rows:
            with autocast():
                posterior = vae.encode(torch.stack(rows).to(device, vae.latent_mean.dtype))
            mean, var = posterior.mean.double(), posterior.std.double() ** 2
            for k, value in enumerate((torch.ones_like(mean), mean, mean**2 + var)):
                sums[k] += value.sum(dim=(0, 2, 3))
    if world > 1:
        dist.all_reduce(sums)
    mean = sums[1] / sums[0]
    variance = sums[2] / sums[0] - mean**2
    return mean, (variance.mean().expand_as(mean) if vae.quantize else variance).sqrt()


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


def save_grid(path, rows):
    """A picture of rows of images (N,3,H,W) in [-1,1], all of one size."""
    rows = [torch.cat(list(row), dim=2) for row in rows]
    grid = ((torch.cat(rows, dim=1).float().clamp(-1, 1) + 1) * 127.5).round().byte()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


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
    names = ("loss", "recon", "perceptual", "kl", "codebook", "codes_used", "gan", "disc_loss", "logits", "gan_weight")
    names += ("grad_norm", "disc_grad_norm", "val_psnr", "val_ssim", "val_lpips", "val_largest_activation")
    names += ("val_kl_per_channel",) if any(r.get("kl") for r in records) else ()  # a line for each channel
    parts = {"logits": ("logits_real", "logits_fake")}
    names = [n for n in names if any(r.get(part) for r in records for part in parts.get(n, (n,)))]
    figure, axes = plt.subplots(math.ceil(len(names) / 4), 4, figsize=(17, 3.5 * math.ceil(len(names) / 4)))
    for name, axis in zip(names, axes.flat):
        for part in parts.get(name, (name,)):
            points = [(r["step"], r[part]) for r in records if r.get(part) is not None]
            axis.plot(*zip(*points), marker="." if len(points) < 30 else None, label=part)
        axis.set_title(name)
        axis.set_xlabel("step")
        if name in parts:
            axis.legend()
        if name in ("loss", "recon", "perceptual", "grad_norm", "disc_grad_norm"):
            axis.set_yscale("log")
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(f"{out_dir}/loss.png", dpi=80)
    plt.close(figure)


def count_tflop(vae, cfg):
    """TFLOP of training on one image, counted operator by operator; the backward pass of all weights is two forward."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(module, x):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y = module(x)
        return y, counter.get_total_flops()

    with torch.device("meta"):
        twin = VAE(**vae.settings)
        x = torch.zeros(1, 3, cfg["image_size"], cfg["image_size"])
        z, encoder = count(lambda x: twin.encode(x).mode(), x)
        total = (3 if cfg["train"] == "all" else 1) * encoder + 3 * count(
            lambda z: twin.decoder(twin.post_quant_conv(z)), z
        )[1]
        if cfg["perceptual_weight"]:
            total += 3 * count(make_trunk(cfg["lpips_net"]), x)[1]  # image, reconstruction, back to the latter
        if cfg["disc_weight"]:
            total += (
                8 * count(Discriminator(cfg["disc_layers"], "none", channels=cfg["disc_channels"]), x)[1]
            )  # likewise 2, and 3 for each of the two
    return total / 1e12


def check_settings(cfg):
    for name, choices in (
        ("recon_loss", ("l1", "l2")),
        ("lpips_net", tuple(MIN_SIDE)),
        ("disc_loss", ("hinge", "vanilla", "least_squares")),
        ("disc_norm", ("group", "batch", "none")),
        ("train", ("all", "decoder")),
        ("eval_split", ("all", "train", "val", "test")),
        ("crop", ("random", "center")),
        ("lr_schedule", ("constant", "cosine", "onecycle", "multistep")),
        ("device", ("auto", "cpu", "cuda")),
        ("dtype", ("auto", "float32", "bfloat16", "float64")),
        ("compile", ("auto", "true", "false", "True", "False")),
    ):
        if cfg[name] not in choices:
            raise ValueError(f"{name}={cfg[name]} is not one of {', '.join(choices)}")
    counts = ("batch_size", "grad_accum", "max_steps", "eval_every", "save_every", "log_every", "val_images")
    for name in (*counts, "latent_images", "disc_layers", "disc_channels", "codebook_size"):
        if cfg[name] < 1:
            raise ValueError(f"{name}={cfg[name]} must be at least 1")
    weights = ("perceptual_weight", "codebook_weight", "disc_weight", "r1_weight", "lecam_weight", "adaptive_min")
    weights += ("kl_weight", "weight_decay", "grad_clip", "skip_spikes", "warmup_steps", "snapshot_every")
    for name in (*weights, "disc_warmup", "disc_ramp", "restart_every", "equivariance_prob"):
        if cfg[name] < 0:
            raise ValueError(f"{name}={cfg[name]} must not be negative: 0 does without it")
    if cfg["adaptive_min"] > cfg["adaptive_max"]:
        raise ValueError(f"adaptive_min={cfg['adaptive_min']} is above adaptive_max={cfg['adaptive_max']}: swap them")
    for name in ("equivariance_prob", "ema_decay", "lr_end", "beta1", "beta2", "dropout"):
        if not 0 <= cfg[name] <= 1:
            raise ValueError(f"{name}={cfg[name]} must lie between 0 and 1")
    for name in ("lr", "disc_lr", "hang_timeout", "cache_gb"):
        if not cfg[name] > 0:
            raise ValueError(f"{name}={cfg[name]} must be above 0")
    for name in ("ckpt", "eval_split", "inception_weights"):
        if name in getattr(cfg, "changed", ()) and not cfg["eval_only"]:
            raise ValueError(f"{name}={cfg[name]} is for eval_only alone: set eval_only=True, or leave it out")
    if 0 < cfg["skip_spikes"] <= 1:
        raise ValueError(f"skip_spikes={cfg['skip_spikes']} would leave out most steps: set it above 1, 5 say, or to 0")
    least = max(least_side(cfg), MIN_SIDE[cfg["lpips_net"]] * bool(cfg["lpips_trunk"]))  # measured without weight too
    if cfg["image_size"] < least:
        remedy = f"SSIM, LPIPS ({cfg['lpips_net']}) and the discriminator need: lower disc_layers, or do without one"
        raise ValueError(f"image_size={cfg['image_size']} is less than the {least} that {remedy}")


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
    if deterministic and device.type == "cuda" and (upsample != "nearest" or equivariance_prob):
        remedy = "set upsample=nearest and equivariance_prob=0"
        raise ValueError(f"deterministic=True, but on CUDA only nearest interpolation is: {remedy}")
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    # data
    if eval_only:
        validation = Dataset(dataset, eval_split, image_size, cache_dir, cache_gb)
    else:
        images = Dataset(dataset, "train", image_size, cache_dir, cache_gb)
        stream = Stream(images, seed, crop=crop, flip=flip)
        try:
            validation = Dataset(dataset, "val", image_size, cache_dir, cache_gb)
        except ValueError:  # too few images to set any aside
            validation = images
    validation_stream = Stream(validation, seed, train=False)

    # the metric of the perceptual loss
    param_dtype = torch.float64 if dtype == "float64" else torch.float32
    lpips = None
    if (perceptual_weight or lpips_trunk) and not measure_latents:
        try:
            lpips = LPIPS(lpips_net, lpips_trunk, lpips_heads)
            lpips.to(device, param_dtype, memory_format=torch.channels_last)
        except (ValueError, OSError, ImportError) as e:  # in the words of this script's settings
            words = str(e).replace("trunk_weights", "lpips_trunk").replace("head_weights", "lpips_heads")
            if not eval_only or lpips_trunk:
                raise type(e)(f"{words}, or do without LPIPS: perceptual_weight=0") from None
            print(f"no LPIPS: {words}")

    if eval_only:
        source = ckpt or out_dir
        vae = VAE.from_pretrained(source).to(device, param_dtype, memory_format=torch.channels_last)
        if inception_weights and min(len(validation), val_images) < 2:
            raise ValueError(f"rFID needs 2 images or more, {dataset} gives 1: leave inception_weights out")
        inception = load_inception(inception_weights, device) if inception_weights else None
        scores, pictures = evaluate(vae, validation_stream, config, rank, world, device, autocast, lpips, inception)
        if master:
            path = f"{source if os.path.isdir(source) else os.path.dirname(source) or '.'}/eval.png"
            error_map = (pictures[1] - pictures[0]).abs().mean(dim=1, keepdim=True).expand_as(pictures[0])
            save_grid(path, (*pictures, 4 * error_map - 1))  # white from an error of 64 grey levels on
            print(f"{source} on {min(len(validation), val_images)} images of {dataset} at {image_size} px:")
            for name, value in scores.items():
                value = value if isinstance(value, list) else f"{value:.4f}"
                print(f"  {name.removeprefix('val_'):20} {value}")
            print(f"originals, reconstructions and error map: {path}")
        if world > 1:
            dist.destroy_process_group()
        sys.exit(0)

    # a model to start from brings its settings, where none are asked for here
    latest, step, images_per_step = f"{out_dir}/latest.safetensors", 0, batch_size * grad_accum * world
    resumed = os.path.exists(latest)
    if init_from:
        source = VAE.from_pretrained(latest if resumed else init_from)
        for name in (name for name in source.settings if name in config and name not in config.given):
            config[name] = globals()[name] = source.settings[name]

    # model
    torch.manual_seed(seed_of(seed, "init"))
    model = VAE(**{name: config[name] for name in inspect.signature(VAE).parameters if name in config})
    if image_size % model.factor:
        raise ValueError(
            f"image_size={image_size} is not a multiple of {model.factor}, which this autoencoder divides by"
        )
    if master:
        os.makedirs(out_dir, exist_ok=True)
    if init_from and not resumed:
        free = ["tanh_out", "dropout", "vq_beta", "vq_legacy"]
        if source.state_dict().keys() == model.state_dict().keys():  # attention at the same levels all the same
            free.append("resolution")
        given = json.loads(json.dumps(source.settings | {name: model.settings[name] for name in free}))
        check_same_model(init_from, given, model.settings)
        model.load_state_dict(source.state_dict())
        del source
    elif train == "decoder" and not resumed:
        raise ValueError("train=decoder goes on from a trained autoencoder: set init_from to its checkpoint")
    model.to(device, param_dtype, memory_format=torch.channels_last)
    model.encoder.checkpointing = model.decoder.checkpointing = checkpointing
    model.requires_grad_(train == "all")
    for part in (model.decoder, model.post_quant_conv):
        part.requires_grad_(True)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    disc = None
    if disc_weight:
        torch.manual_seed(seed_of(seed, "disc init"))
        disc = Discriminator(disc_layers, disc_norm, disc_spectral_norm, disc_channels)
        disc.to(device, param_dtype, memory_format=torch.channels_last)
        if disc_start > max_steps and master:
            remedy = "no step of this run has a GAN loss; set disc_start, or disc_weight=0"
            print(f"warning: disc_start={disc_start} is beyond max_steps={max_steps}: {remedy}")

    # optimizers: no weight decay on biases and norms
    decayed = [p for p in trained if p.ndim >= 2]
    others = [p for p in trained if p.ndim < 2]
    owner = share_out(trained, world) if shard_optimizer and world > 1 else {}
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    for group in groups:
        group["params"] = [p for p in group["params"] if owner.get(p, rank) == rank]
    # fused: of AdamW's kinds the one that heeds found_inf, by which a bad step is left out without waiting for it
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), fused=True)
    if disc:
        disc_owner = share_out(disc.parameters(), world) if owner else {}
        groups = [{"params": [p for p in disc.parameters() if disc_owner.get(p, rank) == rank]}]
        disc_optimizer = torch.optim.AdamW(groups, betas=(beta1, beta2), weight_decay=0.0, fused=True)

    # as lists, once: to walk through all modules for them takes a while, which every step would spend
    parameters, averaged = list(model.parameters()), list(ema.parameters())
    disc_parameters = list(disc.parameters()) if disc else []

    # what a step leaves to the next ones: mean, count and spikes of the gradient norms, the adaptive weight, and how
    # often each code was used since the last restart
    state = {"grad_norm": torch.zeros(3, device=device, dtype=param_dtype)}
    state["adaptive"] = torch.zeros((), device=device, dtype=param_dtype)
    state["code_counts"] = torch.zeros(codebook_size if model.quantize else 0, device=device, dtype=param_dtype)

    # resume
    if resumed:
        tensors, meta = load_checkpoint(latest, "vae")
        check_same_model(latest, meta["model"], model.settings)
        then = meta["config"]
        for name, now in (("train", train), ("init_from", init_from)):
            if then[name] != now:
                raise ValueError(f"{latest} is of a run with {name}={then[name]!r}, not {now!r}: use another out_dir")
        model.load_state_dict(without_prefix("model", tensors))
        ema.load_state_dict(without_prefix("ema", tensors))
        load_optimizer(optimizer, model, "optim", tensors)
        step = meta["step"]
        for name, t in without_prefix("state", tensors).items():
            state[name].copy_(t)
        if step < max_steps and train == "all" and not measure_latents:
            for statistics in (model.latent_mean, model.latent_std, ema.latent_mean, ema.latent_std):
                statistics.fill_(math.nan)  # those of an earlier end do not hold for what follows
        if meta["images_per_step"] != images_per_step:  # another number of processes, or another batch_size
            grad_accum, rest = divmod(meta["images_per_step"], batch_size * world)
            if rest:
                raise ValueError(
                    f"{latest} was trained with {meta['images_per_step']} images per step, which "
                    f"batch_size={batch_size} on {world} processes cannot make up: change batch_size"
                )
            images_per_step = meta["images_per_step"]
    elif measure_latents:
        raise ValueError(f"--measure_latents needs a checkpoint, and {latest} is not there: set out_dir")
    else:
        tensors, meta = {}, {}
        if init_from and disc:
            try:
                tensors, meta = load_checkpoint(find_checkpoint(init_from), "vae")
            except ValueError:  # a stage-2 checkpoint's first stage, or other people's weights: they come without
                pass
        if train == "all":
            for statistics in (model.latent_mean, model.latent_std, ema.latent_mean, ema.latent_std):
                statistics.fill_(math.nan)  # not measured yet: stage 2 refuses it
    disc_tensors = without_prefix("disc", tensors)  # a kept EMA snapshot has none
    if disc and disc_tensors:
        check_same_model(latest if resumed else init_from, meta["disc"], disc.settings)
        disc.load_state_dict(disc_tensors)
        if resumed:
            load_optimizer(disc_optimizer, disc, "disc_optim", tensors)
    elif disc and master and (resumed or init_from):
        print("the discriminator is a new one: the checkpoint has none")
    resting = {}  # a discriminator that this run does without stays in its checkpoint
    if resumed and not disc:
        resting = {name: t for name, t in tensors.items() if name.startswith(("disc.", "disc_optim."))}
    del tensors, disc_tensors
    found = {"the checkpoint's step": step if resumed else "none", "training images": len(images)}
    check_same_everywhere(found, world)

    def checkpoint(path=latest):
        """Rank 0 writes all that a resumed run, stage 2 and a reader need; every rank has to call it."""
        watch.at("saving", step)
        tensors = optimizer_tensors(optimizer, model, "optim", owner)
        tensors |= optimizer_tensors(disc_optimizer, disc, "disc_optim", disc_owner) if disc else resting
        if not master:
            return
        tensors |= with_prefix("model", model.state_dict()) | with_prefix("ema", ema.state_dict())
        tensors |= with_prefix("state", state) | (with_prefix("disc", disc.state_dict()) if disc else {})
        now = {"step": step, "images_seen": step * images_per_step, "images_per_step": images_per_step}
        save_checkpoint(path, tensors, about | now)

    def measure():
        watch.at("measuring latents", step)
        mean, std = latent_statistics(ema, images, config, rank, world, device, autocast)
        for net in (model, ema):
            net.latent_mean.copy_(mean)
            net.latent_std.copy_(std)
        if master:
            print(f"latent mean {[round(m, 4) for m in mean.tolist()]}, std {[round(s, 4) for s in std.tolist()]}")

    # the first log lines
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run("git describe --always --dirty", shell=True, capture_output=True, text=True, cwd=here)
    git_revision = git.stdout.strip() or "unknown"  # no git, no repository
    about = {"format": 1, "stage": "vae", "model": model.settings, "config": config, "git": git_revision}
    about["disc"] = disc.settings if disc else meta.get("disc")
    tflop = count_tflop(model, config)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in hardware), 0)
    if master:
        print(f"command: {' '.join(sys.argv)}")
        print(f"git {git_revision}, python {platform.python_version()}, torch {torch.__version__}")
        print(f"{world} x {hardware}, {dtype}; settings not default: {config.changed}")
        print(f"{len(images)} training and {len(validation)} validation images ({images.form}) in {dataset}")
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tflop:.4g} TFLOP per trained image")
        if disc:
            size = sum(p.numel() for p in disc.parameters())
            print(f"discriminator: {size:,} parameters, trains from step {max(1, disc_start - disc_warmup)}, ", end="")
            print(f"the autoencoder sees it from step {disc_start}")
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

    watch = Watch(rank, world, hang_timeout)
    ema.encoder.register_forward_hook(watch.progress)  # called while evaluating and measuring
    if measure_latents:  # all else in the file stays as it is
        measure()
        if master:
            tensors, meta = load_checkpoint(latest, "vae")
            tensors |= {f"{name}.latent_mean": net.latent_mean for name, net in (("model", model), ("ema", ema))}
            tensors |= {f"{name}.latent_std": net.latent_std for name, net in (("model", model), ("ema", ema))}
            save_checkpoint(latest, tensors, meta)
        watch.stop()
        if world > 1:
            dist.destroy_process_group()
        sys.exit(0)

    gan_terms = ("gan", "disc_loss", "logits_real", "logits_fake", "gan_weight")
    code_terms, norms = ("codes_used", "perplexity"), ("disc_grad_norm", "grad_norm")
    fields = ("step", "images_seen", "loss", "recon", "perceptual", "kl", "codebook", *gan_terms, *code_terms, *norms)
    fields += ("lr", "images_per_s", "mfu", "memory_gb")
    terms = ("loss", "recon") + ("perceptual",) * bool(perceptual_weight)  # what train_step gives, and is summed up
    terms += ("codebook",) if model.quantize else ("kl",)
    terms += gan_terms if disc else ()
    terms_logged = terms + code_terms * bool(model.quantize) + norms[disc is None :]  # without one grad_norm alone
    fields += ("val_l1", "val_psnr", "val_ssim", "val_lpips", "val_kl", "val_kl_per_channel", "val_codes_used")
    fields += ("val_perplexity", "val_latent_mean", "val_latent_std", "val_latent_farthest")
    fields += ("val_largest_activation", "val_posterior_std")

    def log(**record):
        """One line of log.jsonl, the same fields each time."""
        if master:
            record = {"step": step} | record
            record["images_seen"] = record["step"] * images_per_step
            with open(f"{out_dir}/log.jsonl", "a") as f:
                f.write(json.dumps({name: record.get(name) for name in fields}) + "\n")
            if wandb:
                wandb_client.log({k: v for k, v in record.items() if v is not None}, step=record["step"])

    # compile, DDP: all but the last layer, so that the adaptive weight's gradients do not run the compiled part again
    if use_compile:
        model.encoder.compile()
        model.decoder.features = torch.compile(model.decoder.features)
    net = (
        DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False) if world > 1 else model
    )
    batches = loader(stream, step, max_steps, batch_size, grad_accum, rank, world, workers)
    latent_shape = (model.latent_channels, image_size // model.factor, image_size // model.factor)

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

    usual = {"count": 0, "values": 0.0, "said": ""}

    def judge(pending):
        """Warns when the discriminator's running averages begin to look as if it had collapsed, or won."""
        at = terms_logged.index("disc_loss")
        values = pending[1][at : at + 3].double()  # and the logits, which follow it in gan_terms
        usual["count"] += 1
        usual["values"] = usual["values"] + (values - usual["values"]) * max(0.002, 1 / usual["count"])
        said = verdict(*usual["values"].tolist(), disc_loss) if usual["count"] >= 500 else ""
        if said and usual["said"] != said.split("(")[0] and master:
            print(f"warning at step {pending[0]}: {said}", flush=True)
        usual["said"] = said.split("(")[0]

    model.train()
    if train == "decoder":
        model.encoder.eval()  # no dropout in what stays as it is
    last_layer, one = model.decoder.conv_out.weight, torch.ones_like(state["adaptive"])
    pending, stop, bad_items, start_step, started = None, False, 0, step, time.time()
    while True:
        # learning rate
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        share = gan_share(step + 1, config) if disc else None
        disc_trains = disc is not None and step + 1 >= disc_start - disc_warmup
        if disc_trains:
            disc_optimizer.param_groups[0]["lr"] = disc_lr * learning_rate(step, config) / lr
        before_gan = disc is not None and step == disc_start - 1 and step > 0

        # evaluate, save, stop
        finished = step >= max_steps
        if pending and (finished or stop or before_gan or step % eval_every == 0 or step % save_every == 0):
            stop, pending = settle(pending) or stop, None
        if (step % eval_every == 0 and step > start_step) or finished:
            watch.at("evaluating", step)
            scores, pictures = evaluate(ema, validation_stream, config, rank, world, device, autocast, lpips)
            log(**scores)
            if master:
                single = {name: value for name, value in scores.items() if not isinstance(value, list)}
                text = ", ".join(f"{name.removeprefix('val_')} {value:.4f}" for name, value in single.items())
                print(f"evaluation: {text}", flush=True)
                save_grid(f"{out_dir}/recon_{step:08d}.png", pictures)
                plot_log(out_dir)
            clock.update(time=time.time(), step=step)  # evaluation does not count as training
        if finished and not (train == "decoder" and ema.has_latent_statistics):
            measure()
        if snapshot_every and step % snapshot_every == 0 and step > start_step and master:
            snapshot = with_prefix("ema", ema.state_dict())
            save_checkpoint(f"{out_dir}/ema_{step:08d}.safetensors", snapshot, about | {"step": step})
        if finished or stop or (step % save_every == 0 and step > start_step):
            checkpoint()
        if before_gan:  # to go back to, should what follows not please
            checkpoint(f"{out_dir}/before_gan.safetensors")
        if finished or stop:
            break

        # forward and backward
        generator = torch.Generator(device).manual_seed(seed_of(seed, "vae noise", step))
        noise = torch.randn((grad_accum, world, batch_size, *latent_shape), generator=generator, device=device)
        noise = noise[:, rank]  # every rank draws the whole step's noise and takes its own
        transform = latent_transform(step, config, model.factor)
        if dropout:
            torch.manual_seed(seed_of(seed, "dropout", step, rank))
        models = {"vae": net, "lpips": lpips if perceptual_weight else None, "disc": disc if disc_trains else None}
        models = {name: module for name, module in models.items() if module is not None}
        # the ratio is the one that the step before has measured, since it takes all micro-steps and all ranks to know
        # this step's; the first step that needs it does without
        gan_weight = None if share is None else share * disc_weight * (state["adaptive"] if adaptive_weight else one)
        gradients = torch.zeros(2, *last_layer.shape, device=device, dtype=param_dtype)  # of nll and GAN, for the ratio
        sums = torch.zeros(len(terms) + 1, device=device, dtype=param_dtype)  # the loss terms, then a wish to stop
        counts = torch.zeros_like(state["code_counts"])  # how often this step uses each code
        zero = sums[0].clone()
        restart = model.quantize and train == "all" and restart_every and (step + 1) % restart_every == 0
        if restart:
            vectors = images_per_step * math.prod(latent_shape[1:])  # in the global batch
            positions = restart_positions(step, vectors, codebook_size, config).to(device)
            candidates = torch.zeros_like(model.quantize.embedding.weight)
        keys, each = [], []
        for micro in range(grad_accum):
            watch.at("reading data", step)
            batch = next(batches)
            watch.at("forward")
            keys += batch["key"]
            for item in batch["bad"]:
                bad_items += 1
                print(f"skipped a bad image ({bad_items} so far on rank {rank}): {item}", flush=True)
            x = batch["image"].to(device, param_dtype, non_blocking=True)
            x = x.contiguous(memory_format=torch.channels_last)
            if world > 1:
                net.require_backward_grad_sync = micro == grad_accum - 1  # one all-reduce a step
            drawn = {"posterior": noise[micro].to(x.dtype)} | ({"transform": transform} if transform else {})
            with autocast():
                got = train_step(models, {"image": x}, drawn, config, gan_weight)
            each.append(got["each"])
            if share is not None and adaptive_weight:
                for k, name in enumerate(("nll", "gan")):
                    gradients[k] += torch.autograd.grad(got[name], last_layer, retain_graph=True)[0] / grad_accum
            watch.at("backward")
            (got["loss"] / grad_accum).backward()
            if disc_trains:
                (got["disc_loss"] / grad_accum).backward()
            sums[:-1] += torch.stack([got[name].detach() if name in got else zero for name in terms]) / grad_accum
            if model.quantize:
                used = got["indices"].flatten()
                counts.index_add_(0, used, torch.ones_like(used, dtype=counts.dtype))
            if restart:
                candidates += vectors_at(positions, got["latents"], micro * world + rank).to(candidates.dtype)

        # clip, step, ema
        watch.at("optimizer step")
        sums[-1].fill_(bool(asked_to_stop))  # not sums[-1] = ..., which on CUDA waits for all that is under way
        if world > 1:
            dist.all_reduce(sums)
            sums /= world
            if disc_trains:
                average_gradients(disc, world)
                dist.all_reduce(gradients)
                gradients /= world
            if model.quantize:
                dist.all_reduce(counts)
            if restart:
                dist.all_reduce(candidates)  # each row is one rank's, the others have zeros there
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
        measured = [*code_use(counts)] if model.quantize else []  # in the order of terms_logged, after terms
        if disc:
            grads = [p.grad for p in disc_parameters if p.grad is not None]
            measured.append(torch.nn.utils.get_total_norm(grads) if grads else zero)
        measured = torch.stack([*measured, grad_norm])
        finite = torch.isfinite(measured).all() & torch.isfinite(sums).all()
        spike = is_spike(grad_norm, state["grad_norm"], skip_spikes) if skip_spikes else torch.zeros_like(finite)
        taken = finite & ~spike
        optimizer.found_inf = (~taken).float()  # AdamW leaves weights and moments alone where this is 1
        optimizer.step()
        send_updates(owner)
        for p in parameters:
            p.grad = None
        if disc_trains:
            disc_optimizer.found_inf = optimizer.found_inf
            disc_optimizer.step()
            send_updates(disc_owner)
            for p in disc_parameters:
                p.grad = None
            at = terms.index("logits_real")  # and logits_fake after it; a list of indices would wait for the GPU
            logits = sums[at : at + 2].to(disc.mean_logits.dtype)
            # what LeCam pulls the logits to, from the next step on
            disc.mean_logits.lerp_(torch.where(taken, logits, disc.mean_logits), 0.01)
        if share is not None and adaptive_weight:
            state["adaptive"].copy_(torch.where(taken, adaptive_ratio(gradients, config), state["adaptive"]))
        step += 1
        update_ema(averaged, parameters, step, ema_decay)
        state["code_counts"] += counts
        if restart:
            restart_codes(model, ema, optimizer, (state["code_counts"] == 0) & taken, candidates)
            state["code_counts"].zero_()

        # log: this step's numbers travel to the host while the next step runs
        if pending:
            stop = settle(pending)
            if disc and pending[0] >= disc_start - disc_warmup:
                judge(pending)
        flags = torch.stack([state["grad_norm"][2], spike, finite])
        numbers = torch.cat([sums[:-1], measured, flags, sums[-1:]])
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
