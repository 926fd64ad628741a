"""Stage 1: train the autoencoder on images: L1 or L2, LPIPS, KL or codebook, GAN.

    python data/shapes/prepare.py && python train_vae.py config/shapes_vae.py         # 1 CPU core, minutes
    python train_vae.py --dataset=DIR                                                 # one GPU, KL-f8 at 256 px
    torchrun --nproc_per_node=8 train_vae.py --batch_size=12 --dataset=DIR            # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_vae.py --dataset=DIR
    python train_vae.py config/ft_mse.py --init_from=out/vae --dataset=DIR            # fine-tune the decoder only
    python train_vae.py --eval_only=True --ckpt=out/vae --dataset=DIR                 # scores and an image grid

DIR is a folder of images, of tar or parquet shards, or images.npy. The same command again resumes the run.
"""

import contextlib
import copy
import inspect
import math
import os

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

import checkpoint
import common
from checkpoint import UserError, part, reject, with_prefix
from configurator import configure
from data.dataset import BadImage, Buckets, Dataset, Stream, loader, seed_of, train_and_validation, uniform
from grid import as_rgb, save_grid, to_uint8
from lpips_train import LPIPS, MIN_SIDE, make_trunk
from metrics import frechet, gaussian, load_inception, off_mps, psnr, ssim
from vae import VAE, Attention, Discriminator, ResBlock, turn_and_scale

# data
dataset = "data/openimages"  # folder of images, tar or parquet shards, or images.npy; or s3://bucket/*.tar and the like
image_size = (256,)  # each >= 1: of the crops it trains on, a side in pixels, or height,width
image_mode = "RGB"  # L | RGB | RGBA: of the images; L is gray
buckets = False  # train on sizes of about the area of image_size, each image on the one nearest to its own shape
crop = "random"  # random | center: random is 0.5 to 1 times the sides of the largest crop
flip = True  # mirror half of the images
workers = 4  # >= 0: processes that decode images; 0 decodes in the main one
cache_dir = "cache"  # where the index of shards is kept, and shards of a dataset given by URL
cache_gb = 64.0  # > 0: GB of such shards kept there at most
# model: what VAE() takes; the defaults are KL-f8
ch = 128  # >= 1: channels at full resolution
ch_mult = (1, 2, 4, 4)  # each >= 1: times ch, channels of each level, each half the side of the one before
num_res_blocks = 2  # >= 1: in each level of the encoder; the decoder has one more
z_channels = 4  # >= 1: channels of the latents
attn_resolutions = ()  # each >= 1: sides whose levels have attention, in pixels of a resolution-sized image
resolution = 256  # >= 1: the side attn_resolutions refers to; does not limit what can be encoded
mid_attention = True  # attention in the middle
latent_proj = True  # 1x1 convolutions around the latents
bottleneck = "kl"  # kl | vq: regularization of the latents
codebook_size = 8192  # >= 1: vq, how many codes
embed_dim = 0  # >= 0: channels of the latents between the 1x1 convolutions; 0 is z_channels
vq_beta = 0.25  # >= 0: vq, weight of the commitment term
vq_legacy = False  # vq: vq_beta on the codebook term instead, as CompVis trained
activation = "silu"  # silu | swiglu: of the residual blocks
downsample = "conv"  # conv | avg | max: how the encoder halves the side
upsample = "nearest"  # nearest | bilinear | bicubic: how the decoder doubles it
linear_attention = False  # linear-time attention at the end of every level, and in the middle in place of the other
patch_size = 1  # >= 1: p > 1 folds p x p pixels into channels first, for fast small models
pixel_channels = 0  # >= 0: n > 0 ends the decoder with n channels of each pixel, SiLU, 1x1 convolution: sharper edges
norm_groups = 32  # >= 1: groups of every GroupNorm
dropout = 0.0  # in [0, 1]: in every residual block
tanh_out = False  # tanh on the decoder's output
# loss: means per pixel, so that it does not depend on the resolution
recon_loss = "l1"  # l1 | l2: reconstruction error
perceptual_weight = 1.0  # >= 0: of LPIPS; 0 disables it
lpips_net = "vgg"  # vgg | alex | squeeze: trunk of LPIPS
lpips_trunk = ""  # torchvision's ImageNet weights of it, a .pth; "" fetches them once. If set, LPIPS is always measured
lpips_heads = ""  # our checkpoint or a published .pth; "" is the published v0.1 of the package lpips
kl_weight = 1e-6  # >= 0: of the KL summed over an image's latents, divided by its C H W values, as the means are
codebook_weight = 1.0  # >= 0: vq, of the codebook loss
restart_every = 1000  # >= 0: vq, steps after which codes unused in them become encoder outputs; 0 disables it
latent_noise = 0.0  # >= 0: noise on the latents before decoding, in their deviations, times |N(0,1)| of each image
equivariance_prob = 0.0  # in [0, 1]: share of steps that rotate and scale latents and images alike (EQ-VAE)
# discriminator
disc_weight = 0.5  # >= 0: of the generator's GAN term, times the adaptive weight; 0 disables it
disc_start = 50_001  # >= 0: the first step (they count from 1) with a GAN term in the autoencoder's loss
disc_warmup = 0  # >= 0: steps before it in which the discriminator trains alone
disc_ramp = 0  # >= 0: steps from it on in which the GAN term's weight rises linearly
disc_loss = "hinge"  # hinge | vanilla | least_squares: of both players
adaptive_weight = True  # times |gradient of recon and LPIPS| / |gradient of GAN| at the decoder's last layer
adaptive_min = 0.0  # >= 0: least and ...
adaptive_max = 0.0509  # >= 0: ... greatest ratio; CompVis clamps at 1e4 for sums over an image, / 196,608 at 256 px
disc_layers = 3  # >= 1: 3 judges patches of 70 x 70 pixels, 2 of 34 x 34
disc_channels = 64  # >= 1: of its first layer
disc_norm = "group"  # group | batch | none: batch is the published one, with each process's own statistics
disc_spectral_norm = False  # spectral normalization of its kernels
disc_lr = 1e-4  # > 0: follows the curve of lr
disc_weight_decay = 0.0  # >= 0: AdamW, on its kernels only
r1_weight = 0.0  # >= 0: R1, half of it times the squared gradient of the summed real logits, a mean per pixel
lecam_weight = 0.0  # >= 0: LeCam, pulls the logits to the other side's running mean, for little data
# optimizer
batch_size = 12  # >= 1: images per process and micro-step
grad_accum = 2  # >= 1: micro-steps per optimizer step
max_steps = 250_000  # >= 1: optimizer steps
lr = 1e-4  # > 0: absolute, nothing rescales it
optimizer = "adamw"  # adamw | muon: muon is for hidden matrices and kernels, beside AdamW for the rest
muon_lr = 0.01  # > 0: muon's learning rate, follows the curve of lr
lr_schedule = "constant"  # constant | cosine | onecycle | multistep: cosine and onecycle end at lr_end
lr_end = 0.0  # in [0, 1]: where cosine and onecycle end, as a share of lr
lr_milestones = (0.6, 0.8, 0.9)  # each in [0, 1]: multistep, shares of max_steps at which lr_decay applies
lr_decay = 0.1  # > 0: multistep, factor at each milestone
warmup_steps = 1000  # >= 0: steps of linear warm-up
beta1 = 0.5  # in [0, 1): AdamW
beta2 = 0.9  # in [0, 1): AdamW
weight_decay = 0.0  # >= 0: on matrices and kernels only
grad_clip = 1.0  # >= 0: largest gradient norm of the autoencoder; 0 disables clipping
shard_optimizer = False  # divide the optimizer state among the processes (ZeRO stage 1)
ema_decay = 0.9999  # in [0, 1]: of the averaged weights, warmed up as (1 + n) / (10 + n)
# initial weights, trained parameters
init_from = ""  # start from the EMA weights of this checkpoint, ours or another's, with its settings; "" starts anew
train = "all"  # all | decoder: decoder leaves encoder, codebook, latents and their statistics as they are
# run
out_dir = "out/vae"  # checkpoint, log and image grids
seed = 0  # of weights, data order and noise
eval_every = 5000  # >= 1: steps between evaluations on the validation images
val_images = 1000  # >= 1: how many of them
save_every = 1000  # >= 1: steps between checkpoints
snapshot_every = 0  # >= 0: steps between kept EMA snapshots ema_STEP.safetensors; 0 keeps none
log_every = 50  # >= 1: steps between progress lines
dist_timeout = 30.0  # > 0: minutes after which a collective operation fails on ranks whose peers do not answer
latent_images = 10_000  # >= 1: training images over which the latent statistics are measured
measure_latents = False  # only measure them for ckpt, and store them if it has none
eval_only = False  # only evaluate ckpt on val_images images of dataset
ckpt = ""  # of these two, a checkpoint or out_dir; "" is out_dir. Its model, dataset and image_size unless given
overwrite = False  # of these two, replace the statistics of ckpt, or eval.png beside it
eval_split = "all"  # all | train | val | test: eval_only, which images of dataset
inception_weights = ""  # eval_only, torch-fidelity's Inception weights, a .pth, for rFID; "" disables it
device = "auto"  # auto | cpu | cuda | mps: auto is cuda if there is a GPU, else mps if there is one of Apple's
dtype = "auto"  # auto | float32 | bfloat16 | float64: auto is bfloat16 (autocast) on CUDA, else float32
compile = "auto"  # auto | true | false: torch.compile; auto is true on CUDA
checkpointing = False  # recompute inner activations in the backward pass: less memory, a third slower
deterministic = False  # bit-exact on CUDA too, slower
wandb = False  # send the log to Weights & Biases too


PANELS = {"loss": ("loss", "recon", "perceptual"), "kl": ("kl", "val_kl"), "codebook": ("codebook",)}
PANELS |= {"codes used": ("codes_used", "val_codes_used"), "gan": ("gan", "disc_loss"), "gan_weight": ("gan_weight",)}
PANELS |= {"logits": ("logits_real", "logits_fake"), "gradient norm": ("grad_norm", "disc_grad_norm")}
PANELS |= {name: (name,) for name in ("val_psnr", "val_ssim", "val_lpips", "val_largest_activation")}
PANELS |= {"val_kl_per_channel": ("val_kl_per_channel",)}  # a line for each channel


def check_settings(cfg):
    """What involves several settings; `configure` has checked each by itself."""
    evaluating = " ".join(f"--{name}" for name in ("eval_split", "inception_weights") if name in cfg.changed)
    measuring = " ".join(f"--{name}" for name in ("ckpt", "overwrite") if name in cfg.changed)
    side = max(min_side(cfg), MIN_SIDE[cfg.lpips_net] if cfg.lpips_trunk else 1)  # measured without a weight too
    smallest = min(cfg.image_size, default=0)
    parts = f"SSIM, LPIPS ({cfg.lpips_net}) and the discriminator; lower disc_layers or disable one of them"
    for wrong, message in (
        (cfg.adaptive_min > cfg.adaptive_max, "adaptive_min must be <= adaptive_max"),
        (evaluating and not cfg.eval_only, f"{evaluating} is only used with --eval_only"),
        (
            measuring and not (cfg.eval_only or cfg.measure_latents),
            f"{measuring} needs --eval_only or --measure_latents",
        ),
        (cfg.latent_noise and cfg.bottleneck == "vq", "--latent_noise is only used with bottleneck=kl"),
        (cfg.train == "decoder" and not cfg.init_from, "--train=decoder needs a trained autoencoder; set init_from"),
        (len(cfg.image_size) not in (1, 2), "image_size must be a side, or height,width"),
        (smallest < side, f"image_size={smallest} is below {side}, which is the least of {parts}"),
    ):
        if wrong:
            raise UserError(message)


def check_multiple(cfg, vae):
    for side in cfg.image_size:
        if side % vae.factor:
            raise UserError(f"image_size={side} is not a multiple of {vae.factor}, the autoencoder's factor")


def min_side(cfg):
    """Of images, in pixels, that all parts of the loss accept."""
    perceptual = MIN_SIDE[cfg.lpips_net] if cfg.perceptual_weight else 1
    return max(11, perceptual, 3 * 2**cfg.disc_layers if cfg.disc_weight else 1)  # 11 is SSIM's window


# --- loss ---


def generator_loss(fake, loss):
    """Of the logits of reconstructions, for the autoencoder: they should look real."""
    if loss == "hinge":
        return -fake.mean()
    return F.softplus(-fake).mean() if loss == "vanilla" else 0.5 * (fake - 1).square().mean()


def discriminator_loss(real, fake, loss):
    """Of the logits of images and of reconstructions; a constant discriminator has 1, log 2 and 1/4 at best."""
    if loss == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if loss == "vanilla":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    return 0.5 * ((real - 1).square().mean() + fake.square().mean())


def widened(x):
    """x in float32, or in float64 if it is: out of autocast's bfloat16."""
    return x if x.dtype == torch.float64 else x.float()


def train_step(vae, batch, noise, cfg, lpips=None, disc=None, gan_weight=None, transform=()):
    """One forward pass -> ({name: scalar term}, posterior); "loss" trains the autoencoder, "disc_loss" disc.

    batch["image"] (B,C,H,W) in [-1,1].  noise: of `step_noise`, for one micro-step.
    gan_weight: of the autoencoder's GAN term; None: it has none.
    transform: (turns, sides) of turn_and_scale, applied to the latents and to the images (EQ-VAE).
    The gradient of neither loss reaches the other's parameters.
    """
    x, values, terms = batch["image"], batch["image"].numel(), {}
    options = dict(turns=transform[0], sides=transform[1]) if transform else {}
    reconstruction, posterior = vae(x, **noise, **options)
    reconstruction = widened(reconstruction)
    if transform:
        x = turn_and_scale(x, transform[0], transform[1] and reconstruction.shape[2:])
    error = reconstruction - x
    terms["recon"] = nll = error.abs().mean() if cfg.recon_loss == "l1" else error.square().mean()
    if cfg.perceptual_weight:
        terms["perceptual"] = lpips(reconstruction, x).mean()
        nll = nll + cfg.perceptual_weight * terms["perceptual"]
    if cfg.bottleneck == "vq":
        terms["codebook"] = posterior.loss
        loss = nll + cfg.codebook_weight * posterior.loss
    else:
        terms["kl"] = posterior.kl().sum() / values  # nats per value of the images
        loss = nll + cfg.kl_weight * terms["kl"]
    if gan_weight is not None:
        disc.requires_grad_(False)  # here only the reconstruction learns
        terms["nll"], terms["gan"] = nll, generator_loss(widened(disc(reconstruction)), cfg.disc_loss)
        disc.requires_grad_(True)
        terms["gan_weight"] = torch.as_tensor(gan_weight, device=x.device, dtype=x.dtype)
        loss = loss + gan_weight * terms["gan"]
    if disc is not None:
        terms |= discriminator_terms(disc, x.detach(), reconstruction.detach(), cfg)
    return {"loss": loss} | terms, posterior


def discriminator_terms(disc, x, reconstruction, cfg):
    """Its loss, with R1 and LeCam, and the mean logits."""
    x.requires_grad_(cfg.r1_weight > 0)
    real, fake = widened(disc(x)), widened(disc(reconstruction))  # apart, so that BatchNorm does not mix them
    loss = discriminator_loss(real, fake, cfg.disc_loss)
    if cfg.r1_weight > 0:  # Mescheder et al. 2018, arXiv 1801.04406
        (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
        loss = loss + 0.5 * cfg.r1_weight * slope.square().mean()
    if cfg.lecam_weight > 0:  # Tseng et al. 2021, arXiv 2104.03310, equation 3
        mean_real, mean_fake = disc.mean_logits
        distance = (real - mean_fake).square().mean() + (fake - mean_real).square().mean()
        loss = loss + cfg.lecam_weight * distance
    return {"disc_loss": loss, "logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}


def step_noise(step, shape, cfg, machine, micro_steps):
    """[{name: (B,C,h,w)} for each micro-step]: this rank's slice of the noise of a step, a function of (seed, step).

    The same for the global batch on any number of ranks.  shape: (C,h,w) of the latents.
    "noise" selects the latent sample; with latent_noise "jitter" is added to it (Zheng et al. 2025, arXiv 2510.11690).
    """
    generator = torch.Generator(machine.device).manual_seed(seed_of(cfg.seed, "vae noise", step))
    slots = (micro_steps, machine.world, cfg.batch_size)

    def normal(*shape):
        return torch.randn(*slots, *shape, generator=generator, device=machine.device)

    noise = {"noise": normal(*shape)}
    if cfg.latent_noise:
        noise["jitter"] = cfg.latent_noise * normal(1, 1, 1).abs() * normal(*shape)
    mine = {name: n[:, machine.rank].to(machine.param_dtype) for name, n in noise.items()}
    return [{name: n[micro] for name, n in mine.items()} for micro in range(micro_steps)]


def gan_ramp(number, cfg):
    """Factor of the GAN term in step number 1, 2, ...; None before disc_start."""
    done = number - cfg.disc_start + 1
    return None if done < 1 else min(1.0, done / (cfg.disc_ramp + 1))


def adaptive_ratio(gradients, cfg):
    """Clamped |gradient of nll| / |gradient of GAN| from both at the last layer (2, ...) (Esser et al. 2021, eq. 7)."""
    nll, gan = gradients.flatten(1).norm(dim=1)
    return (nll / (gan + 1e-4)).clamp(cfg.adaptive_min, cfg.adaptive_max)


def latent_transform(step, shape, cfg, factor):
    """(turns, sides) for the latents (C,h,w) of optimizer step `step`, () for most (EQ-VAE, arXiv 2502.09509)."""
    if uniform(cfg.seed, "equivariance", step) >= cfg.equivariance_prob:
        return ()
    smaller = [[quarters * side // 4 for side in shape[1:]] for quarters in (1, 2, 3)]
    smaller = [()] + [tuple(sides) for sides in smaller if min(sides) * factor >= min_side(cfg)]
    # a quarter turn exchanges the sides; the first choice would change nothing
    choices = [(turns, sides[::-1] if turns % 2 else sides) for turns in range(4) for sides in smaller][1:]
    return choices[int(uniform(cfg.seed, "which equivariance", step) * len(choices))]


# --- codebook ---


def count_codes(indices, codes, dtype):
    """How often this step used each code, on all ranks: (codes,). indices: [(B,h,w), ...] of the micro-steps."""
    used = torch.cat([i.flatten() for i in indices])
    counts = torch.zeros(codes, dtype=dtype, device=used.device)
    counts.index_add_(0, used, torch.ones_like(used, dtype=dtype))
    common.sum_over_ranks(counts)
    return counts


def code_use(counts):
    """(share of the codes used, perplexity: the number of codes, used equally often, of the same entropy), of (K,)."""
    p = counts / counts.sum()
    return (counts > 0).to(counts.dtype).mean(), torch.special.entr(p).sum().exp()


def restart_candidates(latents, step, cfg, machine):
    """(codebook_size, D): vectors picked at random from the latents of a step's global batch, the same on all ranks.

    latents: [(B,D,h,w), ...] of this rank's micro-steps.
    """
    rows = torch.stack([z.permute(0, 2, 3, 1).flatten(0, 2) for z in latents])  # (micro-steps, B h w, D)
    per_slot = rows.shape[1]
    generator = torch.Generator().manual_seed(seed_of(cfg.seed, "restart", step))
    positions = torch.randint(len(rows) * machine.world * per_slot, (cfg.codebook_size,), generator=generator)
    slot, at = (t.to(rows.device) for t in (positions // per_slot, positions % per_slot))  # micro * world + rank
    mine = (slot % machine.world == machine.rank)[:, None]
    candidates = torch.where(mine, rows[slot // machine.world, at], 0.0)
    common.sum_over_ranks(candidates)
    return candidates


@torch.no_grad()
def restart_codes(model, ema, optimizer, unused, candidates):
    """Replace the codes where unused (K,) by candidates (K,D) and clear their moments in the optimizer."""
    codes = model.quantize.embedding.weight
    for weight in (codes, ema.quantize.embedding.weight):
        weight.copy_(torch.where(unused[:, None], candidates.to(weight.dtype), weight))
    state = common.inner(optimizer).state.get(codes, {})  # {} on a rank that does not hold it
    for name in state.keys() & {"exp_avg", "exp_avg_sq"}:
        state[name].masked_fill_(unused[:, None], 0.0)


# --- averaged weights ---


@torch.no_grad()
def update_ema(averaged, current, decay, ok):
    """averaged <- decay averaged + (1 - decay) current, lists of tensors; ok: () bool, where False nothing changes."""
    rate = ok.to(averaged[0].dtype) * (1 - decay)
    torch._foreach_lerp_(averaged, current, [rate] * len(averaged))


# --- evaluation ---


@torch.no_grad()
def evaluate(vae, validation, cfg, machine, autocast, lpips=None, inception=None):
    """({name: score}, (originals, reconstructions)) on the validation images; the images are up to 8 of this rank's.

    Scores are means over images; lists by channel: KL, and mean, deviation and farthest value of the latents; the
    largest activation of any block; for VQ the use of the codebook; with inception the rFID.
    """
    rows, features, examples, activations = [], ([], []), None, []
    size = len(vae.quantize.embedding.weight) if vae.quantize else 0
    codes = off_mps(torch.zeros(size, device=machine.device)).double()
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: activations.append(output.abs().amax()))
        for block in vae.modules()
        if isinstance(block, (ResBlock, Attention))
    ]
    count, stride = len(validation), machine.world * cfg.batch_size
    for start in common.progress_bar(range(machine.rank, count, stride), "evaluating"):
        x = [validation[i]["image"] for i in range(start, min(start + stride, count), machine.world)]
        x = torch.stack(x).to(machine.device)
        activations.clear()
        with autocast:
            posterior = vae.encode(x.to(vae.latent_mean.dtype))
            y = vae.decode(posterior.mode()).float()
            row = image_scores(x, y, posterior)
            if lpips is not None:
                row["val_lpips"] = lpips(*(a.clamp(-1, 1).to(vae.latent_mean.dtype) for a in (y, x)))
        row["val_largest_activation"] = torch.stack(activations).max().expand(len(x))
        rows.append({name: t.cpu().double() for name, t in row.items()})
        if vae.quantize:
            indices = vae.quantize.nearest(posterior.mean).flatten()
            codes += off_mps(torch.bincount(indices, minlength=size))
        for images, f in zip((x, y), features if inception else ()):
            f.append(inception(to_uint8(as_rgb(images))).cpu())
        examples = examples or (x[:8].cpu(), y[:8].cpu())
    for hook in hooks:
        hook.remove()
    scores = mean_scores(common.gathered(rows))
    if vae.quantize:
        common.sum_over_ranks(codes)
        scores |= dict(zip(("val_codes_used", "val_perplexity"), (t.item() for t in code_use(codes))))
    if inception:
        scores["val_rfid"] = frechet(*(g for f in features for g in gaussian(torch.cat(common.gathered(f)))))
    return scores, examples


def image_scores(x, y, posterior):
    """Scores of images x, their reconstructions y and their latents: {name: (B,), or by channel (B,C)}."""
    x, y, mean, std, kl = map(off_mps, (x, y, posterior.mean, posterior.std, posterior.kl()))
    mean, std = mean.double(), std.double()
    scores = {"val_l1": (y - x).abs().mean(dim=(1, 2, 3)), "val_psnr": psnr(y, x), "val_ssim": ssim(y, x)}
    scores |= {"val_kl": kl.sum(dim=(1, 2, 3)) / x[0].numel(), "val_posterior_std": std.mean(dim=(1, 2, 3))}
    scores |= {"val_kl_per_channel": kl.sum(dim=(2, 3)), "val_latent_mean": mean.mean(dim=(2, 3))}
    scores["square"] = (mean**2 + std**2).mean(dim=(2, 3))
    return scores | {"high": mean.amax(dim=(2, 3)), "low": mean.amin(dim=(2, 3))}


def mean_scores(rows):
    """{name: number, or list by channel} of all images from [scores of a batch, ...]."""
    rows = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    high, low, square = rows.pop("high").amax(dim=0), rows.pop("low").amin(dim=0), rows.pop("square").mean(dim=0)
    largest = rows.pop("val_largest_activation").max()
    scores = {name: t.mean(dim=0) for name, t in rows.items()} | {"val_largest_activation": largest}
    mean = scores["val_latent_mean"]
    scores["val_latent_std"] = std = (square - mean**2).sqrt()
    scores["val_latent_farthest"] = torch.maximum(high - mean, mean - low) / std
    return {name: [round(v, 5) for v in t.tolist()] if t.ndim else t.item() for name, t in scores.items()}


def build_lpips(cfg, machine):
    """The metric of the perceptual loss and of evaluation, or None."""
    if not (cfg.perceptual_weight or cfg.lpips_trunk):
        return None
    lpips = LPIPS(cfg.lpips_net, cfg.lpips_trunk, cfg.lpips_heads)
    return lpips.to(machine.device, machine.param_dtype, memory_format=torch.channels_last)


def open_checkpoint(cfg, machine):
    """(path, autoencoder, settings) for --eval_only and --measure_latents: those not given are those of its run."""
    path = checkpoint.find(cfg.ckpt or cfg.out_dir)
    saved = checkpoint.tuples(checkpoint.read_meta(path)["config"]) if checkpoint.is_ours(path) else {}
    names = ("dataset", "image_size", "perceptual_weight", "lpips_net", "lpips_trunk", "lpips_heads")
    cfg = cfg.replace(disc_weight=0.0, **{name: saved[name] for name in names if name in saved.keys() - cfg.given})
    check_settings(cfg)
    vae = VAE.from_pretrained(path).to(machine.device, machine.param_dtype, memory_format=torch.channels_last)
    check_multiple(cfg, vae)
    return path, vae, cfg.replace(image_mode=vae.settings["image_mode"])


def evaluate_checkpoint(cfg, machine, autocast):
    """--eval_only: print the scores of cfg.ckpt, save eval.png beside it."""
    path, vae, cfg = open_checkpoint(cfg, machine)
    images = Dataset(cfg.dataset, cfg.eval_split, cfg.image_size, cfg.cache_dir, cfg.cache_gb, cfg.image_mode)
    validation = Subset(Stream(images, cfg.seed, train=False), common.spread(len(images), cfg.val_images))
    if cfg.inception_weights and len(validation) < 2:
        raise UserError(f"rFID needs 2 images or more, {cfg.dataset} has 1: leave inception_weights out")
    try:
        inception = load_inception(cfg.inception_weights, machine.device) if cfg.inception_weights else None
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from None
    scores, (x, y) = evaluate(vae, validation, cfg, machine, autocast, build_lpips(cfg, machine), inception)
    if machine.rank > 0:
        return
    print(f"{path} on {len(validation)} images at {images.sides[0]}x{images.sides[1]} px of {images}")
    for name, value in scores.items():
        print(f"  {name.removeprefix('val_'):20} {value if isinstance(value, list) else format(value, '.4f')}")
    grid = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "eval.png")
    if os.path.exists(grid) and not cfg.overwrite:
        return print(f"{grid} is there already: --overwrite=True replaces it")
    error_map = 4 * (y - x).abs().mean(dim=1, keepdim=True) - 1  # white from an error of 64 gray levels on
    save_grid(grid, torch.cat([as_rgb(images) for images in (x, y, error_map)]), columns=len(x))
    print(f"originals, reconstructions and error map: {grid}")


def measure_checkpoint(cfg, machine, autocast):
    """--measure_latents: print the latent statistics of cfg.ckpt, and store them if it has none."""
    path, vae, cfg = open_checkpoint(cfg, machine)
    images = Dataset(cfg.dataset, "train", cfg.image_size, cfg.cache_dir, cfg.cache_gb, cfg.image_mode)
    mean, std = latent_statistics(vae, images, cfg, machine, autocast)
    if machine.rank > 0:
        return
    print(f"{path} at {images.sides[0]}x{images.sides[1]} px on {images}\n{as_text(mean, std)}")
    if vae.has_latent_statistics and not cfg.overwrite:
        print(f"not stored: the checkpoint has {as_text(vae.latent_mean, vae.latent_std)}", end="; ")
        return print("--overwrite=True replaces those of a run of train_vae.py")
    if not checkpoint.is_ours(path) or checkpoint.read_meta(path)["stage"] != "vae":
        reject(path, "cannot store latent statistics", "give a checkpoint of train_vae.py")
    tensors, meta = checkpoint.read(path)
    for name, value in (("latent_mean", mean), ("latent_std", std)):
        prefixes = [prefix for prefix in ("model", "ema") if f"{prefix}.{name}" in tensors]  # a snapshot has no model
        tensors |= {f"{prefix}.{name}": value.to(vae.latent_mean) for prefix in prefixes}
    checkpoint.write(path, tensors, meta)
    print(f"stored in {path}")


@torch.no_grad()
def latent_statistics(vae, images, cfg, machine, autocast):
    """Per-channel mean and standard deviation of posterior samples over the training set: two (C,) tensors.

    With a codebook all channels share one deviation: the nearest code is the same in any one unit, but not in several.
    The variance of a sample is the variance of the mean plus the mean of the variance, so no noise is needed.
    """
    sums = off_mps(torch.zeros(3, vae.latent_channels, device=machine.device)).double()  # of 1, z, z^2
    picks, stride = common.spread(len(images), cfg.latent_images), machine.world * cfg.batch_size
    for start in common.progress_bar(range(machine.rank, len(picks), stride), "latent statistics"):
        rows = []
        for i in picks[start : start + stride : machine.world]:
            with contextlib.suppress(BadImage):  # training has reported it
                rows.append(images[i]["image"])
        if rows:
            with autocast:
                posterior = vae.encode(torch.stack(rows).to(machine.device, vae.latent_mean.dtype))
            mean, std = (off_mps(t).double() for t in (posterior.mean, posterior.std))
            var = std**2
            sums += torch.stack([value.sum(dim=(0, 2, 3)) for value in (torch.ones_like(mean), mean, mean**2 + var)])
    common.sum_over_ranks(sums)
    mean = sums[1] / sums[0]
    variance = sums[2] / sums[0] - mean**2
    return mean, (variance.mean().expand_as(mean) if vae.quantize else variance).sqrt()


def as_text(mean, std):
    return f"latent mean {[round(m, 4) for m in mean.tolist()]}, std {[round(s, 4) for s in std.tolist()]}"


def count_tflop(vae, cfg):
    """TFLOP of training on one image; the backward pass of all weights is two forward."""
    with torch.device("meta"):
        twin, sides = VAE(**vae.settings), (cfg.image_size[0], cfg.image_size[-1])
        x = torch.zeros(1, len(cfg.image_mode), *sides)
        z = torch.zeros(1, vae.latent_channels, *(side // vae.factor for side in sides))
        total = (3 if cfg.train == "all" else 1) * common.count_tflop(twin.encode, x)
        total += 3 * common.count_tflop(lambda z: twin.decoder(twin.post_quant_conv(z)), z)
        if cfg.perceptual_weight:  # image, reconstruction, back to the latter
            total += 3 * common.count_tflop(make_trunk(cfg.lpips_net), as_rgb(x))
        if cfg.disc_weight:  # 2 likewise, and 3 for each of the two
            disc = Discriminator(cfg.disc_layers, "none", False, cfg.disc_channels, x.shape[1])
            total += 8 * common.count_tflop(disc, x)
    return total


# --- starting from another model ---


def read_initial(path):
    """(tensors, meta) of an autoencoder, as a checkpoint has them: EMA weights, and the discriminator if it has one."""
    vae, tensors, meta = VAE.from_pretrained(path), {}, {}
    if checkpoint.is_ours(checkpoint.find(path)):
        tensors, meta = checkpoint.read(path, "disc", "disc_optim")
    weights = vae.state_dict()
    tensors |= with_prefix("model", weights) | with_prefix("ema", weights)
    return tensors, {"model": vae.settings, "disc": meta.get("disc")}


if __name__ == "__main__":
    common.install_excepthook()
    cfg = configure(globals())
    machine = common.setup(cfg)
    rank, world = machine.rank, machine.world
    autocast = torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.precision == "bfloat16")
    if cfg.eval_only or cfg.measure_latents:
        (evaluate_checkpoint if cfg.eval_only else measure_checkpoint)(cfg, machine, autocast)
        common.leave()

    # a checkpoint to resume, or a model to start from, has the settings of the model
    latest, tensors, meta = f"{cfg.out_dir}/latest.safetensors", {}, {}
    resumed = os.path.exists(latest)
    if resumed:
        tensors, meta = checkpoint.read(latest)
        common.check_same_settings(latest, meta, {"stage": "vae", "train": cfg.train, "init_from": cfg.init_from})
    elif cfg.init_from:
        tensors, meta = read_initial(cfg.init_from)
    if cfg.init_from:
        model_settings = checkpoint.tuples(meta["model"])
        cfg = cfg.replace(**{k: v for k, v in model_settings.items() if k in cfg.keys() - cfg.given})
    check_settings(cfg)
    step, images_per_step, micro_steps = common.start(cfg, world, meta, latest)

    # data
    options = (cfg.image_size, cfg.cache_dir, cfg.cache_gb, cfg.image_mode)
    images, validation_images = train_and_validation(cfg.dataset, *options)
    common.assert_same_on_all_ranks(step=step, images=len(images))
    validation = common.spread(len(validation_images), cfg.val_images)
    validation = Subset(Stream(validation_images, cfg.seed, train=False), validation)

    # models
    lpips = build_lpips(cfg, machine)
    torch.manual_seed(seed_of(cfg.seed, "init"))
    model = common.build(VAE, **{name: cfg[name] for name in inspect.signature(VAE).parameters if name in cfg})
    check_multiple(cfg, model)
    model.to(machine.device, machine.param_dtype, memory_format=torch.channels_last)
    model.encoder.checkpointing = model.decoder.checkpointing = cfg.checkpointing
    for name, child in model.named_children():
        child.requires_grad_(cfg.train == "all" or name in ("decoder", "post_quant_conv"))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    disc = None
    if cfg.disc_weight:
        torch.manual_seed(seed_of(cfg.seed, "disc init"))
        options = (cfg.disc_layers, cfg.disc_norm, cfg.disc_spectral_norm, cfg.disc_channels, len(cfg.image_mode))
        disc = common.build(Discriminator, *options)
        disc.to(machine.device, machine.param_dtype, memory_format=torch.channels_last)

    # optimizers, and what else is carried from step to step: the adaptive weight, the use of codes since a restart
    parameters, averaged = list(model.parameters()), list(ema.parameters())  # listed once: walking modules is slow
    opt = common.make_optimizer(model, cfg, machine)
    players = [("model", model, "optim", opt)]
    if disc:
        plain = cfg.replace(optimizer="adamw", weight_decay=cfg.disc_weight_decay)
        disc_opt = common.make_optimizer(disc, plain, machine)
        players.append(("disc", disc, "disc_optim", disc_opt))
    state = {"adaptive": torch.zeros(()), "code_counts": torch.zeros(cfg.codebook_size if model.quantize else 0)}
    state = {name: t.to(machine.device, machine.param_dtype) for name, t in state.items()}

    # weights and state of the checkpoint, or weights of the model to start from
    if meta:
        free = () if resumed else ("tanh_out", "dropout", "vq_beta", "vq_legacy")
        if part(tensors, "model").keys() == model.state_dict().keys():  # attention at the same levels
            free = (*free, "resolution")
        source = latest if resumed else cfg.init_from
        for name, network, optim, optimizer in players:
            if meta[name]:  # a discriminator can be a new one
                common.check_same_settings(source, meta[name], network.settings, free)
                network.load_state_dict(part(tensors, name))
                common.load_optimizer_state(optimizer, network, optim, tensors)
        ema.load_state_dict(part(tensors, "ema"))
        for name, t in part(tensors, "state").items():
            state[name].copy_(t)
    if cfg.train == "all" and step < cfg.max_steps:
        for buffer in (model.latent_mean, model.latent_std, ema.latent_mean, ema.latent_std):
            buffer.fill_(math.nan)  # measured at the end; those of an earlier end do not hold for what follows
    # a discriminator that this run does not train stays in its checkpoint
    resting = {} if disc else {name: t for name, t in tensors.items() if name.startswith("disc")}
    disc_settings = disc.settings if disc else meta.get("disc")
    del tensors

    # log
    tflop = count_tflop(model, cfg)
    log = common.Log(cfg, machine, images_per_step, images.fingerprint, meta if resumed else {}, tflop)
    log.print(images)
    log.print(f"{sum(p.numel() for p in parameters):,} parameters, {tflop:.4g} TFLOP per image")
    if disc:
        size = f"{sum(p.numel() for p in disc.parameters()):,} parameters{'' if meta.get('disc') else ', a new one'}"
        first = f"trains from step {max(1, cfg.disc_start - cfg.disc_warmup)}, GAN loss from step {cfg.disc_start}"
        log.print(f"discriminator: {size}, {first}{' (beyond max_steps)' if cfg.disc_start > cfg.max_steps else ''}")

    # compile, DDP, loader
    if machine.compile:  # all but the last layer, so that the adaptive weight's gradients do not run all of it again
        model.encoder.compile()
        model.decoder.features = torch.compile(model.decoder.features)
    net = model
    if world > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, forward_sync_buffers=False)
    datasets = images.in_buckets(model.factor) if cfg.buckets else [images]
    for data in datasets:
        check_settings(cfg.replace(image_size=data.sides))
    streams = [Stream(data, cfg.seed, crop=cfg.crop, flip=cfg.flip) for data in datasets]
    stream = Buckets(streams, cfg.seed, images_per_step) if cfg.buckets else streams[0]
    if cfg.buckets:
        log.print(stream)
    batches = loader(stream, step, cfg.max_steps, cfg.batch_size, micro_steps, rank, world, cfg.workers)
    last_layer = model.decoder.conv_out.weight
    model.train()
    if cfg.train == "decoder":
        model.encoder.eval()  # no dropout in what stays as it is

    def due(every):
        return every > 0 and step % every == 0 and step > start_step

    # training loop
    stop, start_step = common.Stop(), step
    while True:
        # learning rate; does the discriminator train, and does the autoencoder see it?
        lr_now = common.learning_rate(step, cfg)
        common.set_lr(opt, lr_now)
        if disc:
            common.set_lr(disc_opt, cfg.disc_lr * lr_now / cfg.lr)
        ramp = gan_ramp(step + 1, cfg) if disc else None
        disc_trains = disc is not None and step + 1 >= cfg.disc_start - cfg.disc_warmup

        # evaluate, save, stop
        last, stopping = step >= cfg.max_steps, stop.agreed()
        evaluating, saving = last or due(cfg.eval_every), last or stopping or due(cfg.save_every)
        snapshot = due(cfg.snapshot_every) or (last and cfg.snapshot_every > 0)
        before_gan = disc is not None and step == cfg.disc_start - 1 and 0 < step < cfg.max_steps  # to go back to
        if evaluating or saving or snapshot or before_gan:
            log.check()  # nothing is saved after a step that was not finite
            if evaluating:
                scores, examples = evaluate(ema, validation, cfg, machine, autocast, lpips)
                log.evaluation(step, scores)
                if rank == 0:
                    save_grid(f"{cfg.out_dir}/recon_{step:08d}.png", torch.cat(examples), columns=len(examples[0]))
                    common.plot_log(cfg.out_dir, PANELS)
            if last and (cfg.train == "all" or not ema.has_latent_statistics):
                mean, std = latent_statistics(ema, images, cfg, machine, autocast)
                for module in (model, ema):
                    module.latent_mean.copy_(mean)
                    module.latent_std.copy_(std)
                log.print(as_text(mean, std))
            header = log.header(step, stage="vae", model=model.settings, disc=disc_settings)
            averages = with_prefix("ema", ema.state_dict())
            if snapshot and rank == 0:
                checkpoint.write(f"{cfg.out_dir}/ema_{step:08d}.safetensors", averages, header)
            if saving or before_gan:
                tensors = averages | resting | with_prefix("state", state)
                for name, network, optim, optimizer in players:  # all ranks take part
                    tensors |= with_prefix(name, network.state_dict())
                    tensors |= common.optimizer_state(optimizer, network, optim)
                if saving and rank == 0:
                    checkpoint.write(latest, tensors, header)
                if before_gan and rank == 0:
                    checkpoint.write(f"{cfg.out_dir}/before_gan.safetensors", tensors, header)
            log.restart_clock()  # this was not training time
        if last or stopping:
            break

        # forward and backward
        height, width = stream.sides(step) if cfg.buckets else images.sides
        latent_shape = (model.latent_channels, height // model.factor, width // model.factor)
        noise = step_noise(step, latent_shape, cfg, machine, micro_steps)
        transform = latent_transform(step, latent_shape, cfg, model.factor)
        if cfg.dropout:
            torch.manual_seed(seed_of(cfg.seed, "dropout", step, rank))
        # the ratio measured in the step before: this step's is known only after all micro-steps and ranks
        adaptive = state["adaptive"] if cfg.adaptive_weight else torch.ones_like(state["adaptive"])
        gan_weight = None if ramp is None else ramp * cfg.disc_weight * adaptive
        measured = gan_weight is not None and cfg.adaptive_weight
        gradients = torch.zeros(2, *last_layer.shape, device=machine.device, dtype=machine.param_dtype)  # nll, GAN
        opponent, totals, posteriors = disc if disc_trains else None, {}, []
        for micro in range(micro_steps):
            batch = next(batches)
            log.saw(batch)
            options = dict(non_blocking=machine.device.type == "cuda", memory_format=torch.channels_last)
            batch["image"] = batch["image"].to(machine.device, machine.param_dtype, **options)
            net.require_backward_grad_sync = micro == micro_steps - 1  # one all-reduce a step
            with autocast:
                terms, posterior = train_step(net, batch, noise[micro], cfg, lpips, opponent, gan_weight, transform)
            if measured:
                for k, name in enumerate(("nll", "gan")):
                    gradients[k] += torch.autograd.grad(terms[name], last_layer, retain_graph=True)[0] / micro_steps
            (terms["loss"] / micro_steps).backward()
            if disc_trains:
                (terms["disc_loss"] / micro_steps).backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0.0) + term.detach() / micro_steps
            posteriors.append(posterior)

        # optimizer steps, EMA: nothing carried to the next step changes where ok is false
        totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip or math.inf)
        if disc_trains:
            disc_gradients = [p.grad for p in disc.parameters()]
            common.average_over_ranks(*disc_gradients)  # not by DDP, as it runs several times a step
            totals["disc_grad_norm"] = torch.nn.utils.get_total_norm(disc_gradients)
        ok = common.all_finite(*totals.values())  # one for both optimizers, the same on all ranks
        for one in (opt, disc_opt) if disc_trains else (opt,):
            common.inner(one).found_inf = (~ok).float()
            one.step()
            one.zero_grad()
        step += 1
        update_ema(averaged, parameters, min(cfg.ema_decay, (1 + step) / (10 + step)), ok)
        if disc_trains:
            logits = torch.stack([totals["logits_real"], totals["logits_fake"]]).to(disc.mean_logits.dtype)
            common.average_over_ranks(logits)
            disc.mean_logits.lerp_(torch.where(ok, logits, disc.mean_logits), 0.01)  # for LeCam
        if measured:
            common.average_over_ranks(gradients)
            state["adaptive"].copy_(torch.where(ok, adaptive_ratio(gradients, cfg), state["adaptive"]))
        if model.quantize:
            counts = count_codes([p.indices for p in posteriors], cfg.codebook_size, machine.param_dtype)
            totals["codes_used"], totals["perplexity"] = code_use(counts)
            state["code_counts"] += torch.where(ok, counts, 0.0)
            if cfg.train == "all" and due(cfg.restart_every):
                candidates = restart_candidates([p.mean.detach() for p in posteriors], step - 1, cfg, machine)
                restart_codes(model, ema, opt, (state["code_counts"] == 0) & ok, candidates)
                state["code_counts"].mul_(~ok)
        log.step(step, totals, ok, lr_now)

    log.end(step, stop)
