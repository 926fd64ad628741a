"""Stage 1: trains the autoencoder on images.

    python data/shapes/prepare.py && python train_vae.py config/shapes_vae.py         # 2 CPU cores, minutes
    python train_vae.py --dataset=DIR                                                 # one GPU, KL-f8 at 256 px
    torchrun --nproc_per_node=8 train_vae.py --batch_size=12 --dataset=DIR            # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_vae.py --dataset=DIR

DIR is a folder of images, of tar or parquet shards, or images.npy. The same command again resumes the run.
"""

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

import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from configurator import configure
from data.dataset import Dataset, Stream, loader, seed_of
from vae import VAE, psnr, ssim

# data
dataset = "data/openimages"  # folder of images, tar or parquet shards, or images.npy
image_size = 256  # side in pixels of the crops it trains on
crop = "random"  # random (a square of 0.5 to 1 times the short side) | center
flip = True  # mirror half of the images
workers = 4  # processes that decode images; 0 decodes in the main one
# model: what VAE() takes; the defaults are KL-f8
ch = 128  # channels at full resolution
ch_mult = (1, 2, 4, 4)  # times ch: channels of each level, each half the side of the one before
num_res_blocks = 2  # in each level of the encoder; the decoder has one more
z_channels = 4  # channels of the latents
attn_resolutions = ()  # sides whose levels have attention, in pixels of a resolution-sized image
resolution = 256  # the side attn_resolutions speaks of; does not limit what can be encoded
mid_attention = True  # attention in the middle
latent_proj = True  # 1x1 convolutions around the latents
activation = "silu"  # silu | swiglu
downsample = "conv"  # conv | avg | max
upsample = "nearest"  # nearest | bilinear | bicubic
linear_attention = False  # linear-time attention after every resampler
patch_size = 1  # p > 1 folds p x p pixels into channels first: fast small models
norm_groups = 32  # groups of every GroupNorm
dropout = 0.0  # in every residual block
tanh_out = False  # tanh on the decoder's output
# loss: means per pixel
recon_loss = "l1"  # l1 | l2
kl_weight = 1e-6  # of the KL summed over an image's latents, divided by its 3 H W values, as the means are
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
grad_clip = 1.0  # largest gradient norm; 0 is no clipping
ema_decay = 0.9999  # of the averaged weights, warmed up as (1 + n) / (10 + n)
# run
out_dir = "out/vae"  # checkpoint, log and pictures
seed = 0  # of weights, data order and noise
eval_every = 5000  # steps between evaluations on the validation images
val_images = 1000  # how many of them
save_every = 1000  # steps between checkpoints
snapshot_every = 0  # steps between kept EMA snapshots ema_STEP.safetensors; 0 keeps none
log_every = 50  # steps between progress lines
latent_images = 10_000  # training images over which the latent statistics are measured
measure_latents = False  # only measure them again for the checkpoint in out_dir
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto (bfloat16 on CUDA, else float32) | float32 | bfloat16 | float64
compile = "auto"  # torch.compile: auto (on CUDA) | true | false
deterministic = False  # bit-exact on CUDA too, slower
wandb = False  # send the log to Weights & Biases too

# dense bf16 (V100: fp16)
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "V100": 125}


def train_step(models, batch, noise, cfg):
    """One forward pass -> {name: scalar loss term}; "loss" is the one to differentiate.

    batch["image"] (B,3,H,W) in [-1,1]; noise["posterior"] (B,C,h,w) picks the latent sample.
    """
    x = batch["image"]
    reconstruction, posterior = models["vae"](x, noise["posterior"])
    error = (reconstruction if reconstruction.dtype == torch.float64 else reconstruction.float()) - x
    recon = error.abs().mean() if cfg["recon_loss"] == "l1" else error.square().mean()
    kl = posterior.kl().sum() / x.numel()  # nats per value of the images
    return {"loss": recon + cfg["kl_weight"] * kl, "recon": recon, "kl": kl}


@torch.no_grad()
def evaluate(vae, stream, cfg, rank, world, device, autocast):
    """Means over the validation images, and (originals, reconstructions) of this rank's first eight."""
    sums, pictures = torch.zeros(6, dtype=torch.float64, device=device), None
    count = min(len(stream.dataset), cfg["val_images"])
    for start in range(rank, count, world * cfg["batch_size"]):
        rows = [stream[i] for i in range(start, min(start + world * cfg["batch_size"], count), world)]
        x = torch.stack([row["image"] for row in rows]).to(device)
        with autocast():
            posterior = vae.encode(x.to(vae.latent_mean.dtype))
            reconstruction = vae.decode(posterior.mode()).float()
        l1 = (reconstruction - x).abs().mean(dim=(1, 2, 3))
        terms = [l1, psnr(reconstruction, x), ssim(reconstruction, x)]
        terms += [posterior.kl().sum(dim=(1, 2, 3)) / x[0].numel(), posterior.std.mean(dim=(1, 2, 3))]
        sums += torch.stack([term.sum().double() for term in terms] + [torch.tensor(float(len(rows)), device=device)])
        if pictures is None:
            pictures = (x[:8].cpu(), reconstruction[:8].cpu())
    if world > 1:
        dist.all_reduce(sums)
    means = (sums[:-1] / sums[-1]).tolist()
    return dict(zip(("val_l1", "val_psnr", "val_ssim", "val_kl", "val_posterior_std"), means)), pictures


@torch.no_grad()
def latent_statistics(vae, images, cfg, rank, world, device, autocast):
    """Per-channel mean and standard deviation of posterior samples over the training set: two (C,) tensors.

    The variance of a sample is the variance of the mean plus the mean of the variance: no noise is drawn.
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
    return mean, (sums[2] / sums[0] - mean**2).sqrt()


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
def update_ema(ema, model, step, decay):
    """ema <- d ema + (1 - d) model with d = min(decay, (1 + n) / (10 + n)) after optimizer step n = 1, 2, ..."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def save_checkpoint(path, tensors, meta):
    """Writes one .safetensors file whole or not at all; tensors are named, meta is JSON-able."""
    text, temporary = json.dumps(meta), f"{path}.tmp"  # always the same name: what a killed run left is overwritten
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
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
            if meta["stage"] != stage:
                raise ValueError(f"{path} is a checkpoint of stage {meta['stage']!r}, not {stage!r}")
            return {name: f.get_tensor(name) for name in f.keys()}, meta
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path} is cut short or damaged ({e}): delete it, or put a good copy in its place") from None


def optimizer_tensors(optimizer, model, prefix):
    """The optimizer's state as {prefix.PARAMETER.exp_avg: tensor, ...}."""
    state = ((name, optimizer.state.get(p, {})) for name, p in model.named_parameters())
    return {f"{prefix}.{name}.{key}": t for name, s in state for key, t in s.items()}


def load_optimizer(optimizer, model, prefix, tensors):
    for name, p in model.named_parameters():
        state = {key: tensors[f"{prefix}.{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        step = state.pop("step").to(p.device)
        optimizer.state[p] = {key: torch.empty_like(p).copy_(t) for key, t in state.items()} | {"step": step}


def with_prefix(prefix, state):
    return {f"{prefix}.{name}": t for name, t in state.items()}


def without_prefix(prefix, tensors):
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def check_same_model(path, saved, now):
    """ValueError with both values side by side where a model's settings differ from its checkpoint's."""

    def flat(settings):
        parts = (flat(value) if isinstance(value, dict) else {name: value} for name, value in settings.items())
        return {name: value for part in parts for name, value in part.items()}

    saved, now = flat(saved), flat(json.loads(json.dumps(now)))  # tuples as lists, as they were saved
    rows = [f"{k}: {saved.get(k)} in the checkpoint, {now.get(k)} now" for k in now if saved.get(k) != now[k]]
    if rows:
        raise ValueError(f"{path} holds another model ({'; '.join(rows)}): use its settings, or another out_dir")


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
    names = ("loss", "recon", "kl", "grad_norm", "val_psnr", "val_ssim")
    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    for name, axis in zip(names, axes.flat):
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        axis.plot(*zip(*points), marker="." if len(points) < 30 else None) if points else None
        axis.set_title(name)
        axis.set_xlabel("step")
        if points and name in ("loss", "recon", "grad_norm"):
            axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(f"{out_dir}/loss.png", dpi=80)
    plt.close(figure)


def count_tflop(vae, cfg):
    """TFLOP of training on one image: forward and twice that for backward, counted operator by operator."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        twin = VAE(**vae.settings)
        x = torch.zeros(1, 3, cfg["image_size"], cfg["image_size"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin.decode(twin.encode(x).mode())
    return 3 * counter.get_total_flops() / 1e12


def check_settings(cfg):
    for name, choices in (
        ("recon_loss", ("l1", "l2")),
        ("crop", ("random", "center")),
        ("lr_schedule", ("constant", "cosine", "onecycle", "multistep")),
        ("device", ("auto", "cpu", "cuda")),
        ("dtype", ("auto", "float32", "bfloat16", "float64")),
        ("compile", ("auto", "true", "false", "True", "False")),
    ):
        if cfg[name] not in choices:
            raise ValueError(f"{name}={cfg[name]} is not one of {', '.join(choices)}")
    counts = ("batch_size", "grad_accum", "max_steps", "eval_every", "save_every", "log_every", "val_images")
    for name in (*counts, "latent_images"):
        if cfg[name] < 1:
            raise ValueError(f"{name}={cfg[name]} must be at least 1")


def one_line_error(kind, error, trace):
    """Users' mistakes as one line; TRACEBACK=1 shows where they were noticed, all else shows it always."""
    if issubclass(kind, (ValueError, OSError, ImportError, FloatingPointError)) and not os.environ.get("TRACEBACK"):
        line = str(error).strip().rsplit("\n", 1)[-1]  # of a data worker's error, which holds its traceback
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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    master = rank == 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    # data
    images = Dataset(dataset, "train", image_size)
    stream = Stream(images, seed, crop=crop, flip=flip)
    try:
        validation = Dataset(dataset, "val", image_size)
    except ValueError:  # too few images to set any aside
        validation = images
    validation_stream = Stream(validation, seed, train=False)

    # model
    param_dtype = torch.float64 if dtype == "float64" else torch.float32
    torch.manual_seed(seed_of(seed, "init"))
    model = VAE(**{name: config[name] for name in inspect.signature(VAE).parameters if name in config})
    if image_size % model.factor:
        raise ValueError(
            f"image_size={image_size} is not a multiple of {model.factor}, which this autoencoder divides by"
        )
    model.to(device, param_dtype, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False).eval()

    # optimizer: no weight decay on biases and norms
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), fused=True)

    # resume
    latest, step, images_per_step = f"{out_dir}/latest.safetensors", 0, batch_size * grad_accum * world
    os.makedirs(out_dir, exist_ok=True)
    resumed = os.path.exists(latest)
    if resumed:
        tensors, meta = load_checkpoint(latest, "vae")
        check_same_model(latest, meta["model"], model.settings)
        model.load_state_dict(without_prefix("model", tensors))
        ema.load_state_dict(without_prefix("ema", tensors))
        load_optimizer(optimizer, model, "optim", tensors)
        step = meta["step"]
        if step < max_steps and not measure_latents:  # statistics of an earlier end do not hold for what follows
            for statistics in (model.latent_mean, model.latent_std, ema.latent_mean, ema.latent_std):
                statistics.fill_(math.nan)
        if meta["images_per_step"] != images_per_step:  # another number of processes, or another batch_size
            grad_accum, rest = divmod(meta["images_per_step"], batch_size * world)
            if rest:
                raise ValueError(
                    f"{latest} was trained with {meta['images_per_step']} images per step, which "
                    f"batch_size={batch_size} on {world} processes cannot make up: change batch_size"
                )
            images_per_step = meta["images_per_step"]
        del tensors
    elif measure_latents:
        raise ValueError(f"--measure_latents needs a checkpoint, and {latest} is not there: set out_dir")

    def checkpoint():
        """Rank 0 writes all that a resumed run, stage 2 and a reader need."""
        if not master:
            return
        tensors = with_prefix("model", model.state_dict()) | with_prefix("ema", ema.state_dict())
        tensors |= optimizer_tensors(optimizer, model, "optim")
        now = {"step": step, "images_seen": step * images_per_step, "images_per_step": images_per_step}
        save_checkpoint(latest, tensors, about | now)

    def measure():
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
    tflop = count_tflop(model, config)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in hardware), 0)
    if master:
        print(f"command: {' '.join(sys.argv)}")
        print(f"git {git_revision}, python {platform.python_version()}, torch {torch.__version__}")
        print(f"{world} x {hardware}, {dtype}; settings not default: {config.changed}")
        print(f"{len(images)} training and {len(validation)} validation images ({images.form}) in {dataset}")
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tflop:.4g} TFLOP per trained image")
        print(f"{images_per_step} images per step: {world} processes x {batch_size} x {grad_accum} accumulated")
        print(f"resumed from {latest} at step {step}" if resumed else f"a new run in {out_dir}", flush=True)
        if resumed and os.path.exists(f"{out_dir}/log.jsonl"):  # what came after the checkpoint is done again
            with open(f"{out_dir}/log.jsonl") as f:
                kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
            with open(f"{out_dir}/log.jsonl", "w") as f:
                f.writelines(kept)
        elif os.path.exists(f"{out_dir}/log.jsonl"):
            os.remove(f"{out_dir}/log.jsonl")
        if wandb:
            import wandb as wandb_client

            wandb_client.init(project="latent-diffusion", name=out_dir, config=dict(config))

    if measure_latents:
        measure()
        checkpoint()
        sys.exit(0)

    terms_logged = ("loss", "recon", "kl", "grad_norm")
    fields = ("step", "images_seen", *terms_logged, "lr", "images_per_s", "mfu", "memory_gb")
    fields += ("val_l1", "val_psnr", "val_ssim", "val_kl", "val_posterior_std")

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
    net = torch.compile(model) if use_compile else model
    if world > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    batches = loader(stream, step, max_steps, batch_size, grad_accum, rank, world, workers)
    latent_shape = (model.latent_channels, image_size // model.factor, image_size // model.factor)

    # SIGTERM and SIGINT ask for a stop; every rank learns of it with the loss terms and stops at the same step
    asked_to_stop = []
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda number, frame: asked_to_stop.append(number))

    clock = {"time": time.time(), "step": step}  # since the last progress line

    def settle(pending):
        """Waits for the numbers of a step, stops the run if they are bad, logs them when due; returns the stop flag."""
        at_step, host, ready, at_time = pending
        if ready is not None:
            ready.synchronize()
        *values, finite, stop = host.tolist()
        terms = dict(zip(terms_logged, values))
        if not finite:
            bad = [name for name, value in terms.items() if not math.isfinite(value)]
            bad = [name for name in bad if name not in ("loss", "grad_norm")] or bad
            raise FloatingPointError(
                f"{' and '.join(bad)} not finite at step {at_step}: no such step touches the weights, and {latest}, if "
                f"saved before, is good: lower lr, set grad_clip or raise warmup_steps, and run the same command"
            )
        if at_step % log_every == 0 or at_step == max_steps:
            images_seen, lr_then = at_step * images_per_step, learning_rate(at_step - 1, config)
            speed = (at_step - clock["step"]) * images_per_step / (at_time - clock["time"])
            clock.update(time=at_time, step=at_step)
            mfu = speed * tflop / (world * peak) if peak else None
            memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
            log(step=at_step, **terms, lr=lr_then, images_per_s=round(speed, 2), mfu=mfu, memory_gb=memory)
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
            scores, pictures = evaluate(ema, validation_stream, config, rank, world, device, autocast)
            log(**scores)
            if master:
                text = ", ".join(f"{name.removeprefix('val_')} {value:.4f}" for name, value in scores.items())
                print(f"evaluation: {text}", flush=True)
                save_grid(f"{out_dir}/recon_{step:08d}.png", pictures)
                plot_log(out_dir)
            clock.update(time=time.time(), step=step)  # evaluation does not count as training
        if finished:
            measure()
        if finished or stop or (step % save_every == 0 and step > start_step):
            checkpoint()
        if snapshot_every and step % snapshot_every == 0 and step > start_step and master:
            snapshot = with_prefix("ema", ema.state_dict())
            save_checkpoint(f"{out_dir}/ema_{step:08d}.safetensors", snapshot, about | {"step": step})
        if finished or stop:
            break

        # forward and backward
        generator = torch.Generator(device).manual_seed(seed_of(seed, "vae noise", step))
        noise = torch.randn((grad_accum, world, batch_size, *latent_shape), generator=generator, device=device)
        noise = noise[:, rank]  # every rank draws the whole step's noise and takes its own
        if dropout:
            torch.manual_seed(seed_of(seed, "dropout", step, rank))
        sums = torch.zeros(len(terms_logged), device=device, dtype=param_dtype)  # the loss terms, then a wish to stop
        for micro in range(grad_accum):
            batch = next(batches)
            for item in batch["bad"]:
                bad_items += 1
                print(f"skipped a bad image ({bad_items} so far on rank {rank}): {item}", flush=True)
            x = batch["image"].to(device, param_dtype, non_blocking=True)
            x = x.contiguous(memory_format=torch.channels_last)
            if world > 1:
                net.require_backward_grad_sync = micro == grad_accum - 1  # one all-reduce a step
            with autocast():
                terms = train_step({"vae": net}, {"image": x}, {"posterior": noise[micro].to(x.dtype)}, config)
            (terms["loss"] / grad_accum).backward()
            sums[:-1] += torch.stack([terms[name].detach() for name in terms_logged[:-1]]) / grad_accum

        # clip, step, ema
        sums[-1] = bool(asked_to_stop)
        if world > 1:
            dist.all_reduce(sums)
            sums /= world
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        finite = torch.isfinite(grad_norm) & torch.isfinite(sums).all()
        optimizer.found_inf = (~finite).float()  # AdamW leaves weights and moments alone where this is 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        update_ema(ema, model, step, ema_decay)

        # log: this step's numbers travel to the host while the next step runs
        if pending:
            stop = settle(pending)
        numbers = torch.cat([sums[:-1], grad_norm[None], finite[None].to(sums.dtype), sums[-1:]])
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=device.type == "cuda")
        host.copy_(numbers, non_blocking=True)
        ready = torch.cuda.Event() if device.type == "cuda" else None
        if ready is not None:
            ready.record()
        pending = (step, host, ready, time.time())

    if master:
        print(f"{'finished' if finished else 'stopped'} at step {step} after {time.time() - started:.0f} s: {latest}")
    if world > 1:
        dist.destroy_process_group()
    if not finished:
        sys.exit(128 + (asked_to_stop or [signal.SIGTERM])[0])
