"""Generate images from a trained checkpoint.

    python sample.py --ckpt=out/ldm                                  # the examples of training's sample grids
    python sample.py --ckpt=out/ldm --prompt="a red star" --n=8 --steps=50 --sampler=ddim --guidance=5
    python sample.py --ckpt=out/ldm --cls=dog,cat                    # class-conditional
    python sample.py --ckpt=out/ldm --prompt="red circle 0.1 0.2 0.5 0.6; blue star 0.5 0.5 1 1"   # layout
    python sample.py --ckpt=out/ldm --prompt="a hat" --init_image=photo.png --strength=0.6         # image to image
    python sample.py --ckpt=out/ldm --prompt="a hat" --init_image=photo.png --mask=mask.png        # inpainting
    python sample.py --ckpt=out/sr --init_image=small.png            # super-resolution
    python sample.py --ckpt=out/maps --semantic_map=map.png          # semantic maps
    python sample.py --ckpt=FILE_OR_FOLDER_OR_ID --prompt="a hat" --guidance=7.5 --spacing=leading # Stable Diffusion

From Python: `generate(load_pipeline("out/ldm"), ["a red star"], seeds=[0], steps=20, guidance=3)`.
Many images, and how far they are from real ones: fid.py. Interpolation, inversion, trajectories: examples/.
"""

import contextlib
import functools
import importlib
import inspect
import json
import math
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import checkpoint
import convert
import diffusion
from attention import unavailable, use_attention
from checkpoint import UserError, reject
from common import install_excepthook, setup
from configurator import configure
from data.dataset import check_size, to_mode, to_tensor
from data.forms import IMAGES
from data.tasks import augment_low, image_condition
from diffusion import SPACINGS, Schedule, samplers  # noqa: F401  of the setting `spacing`
from grid import make_grid, save_png, to_pil
from text import CLIPTextEncoder
from unet import Denoiser, UNet
from vae import VAE

# what to generate
ckpt = "out/ldm"  # stage-2 checkpoint or its out_dir; or another project's file, folder or Hugging Face id
prompt = ""  # the prompt, or a layout; without prompt, prompts and cls: the examples of training's sample grids
prompts = ""  # file with one prompt per line
negative = ""  # prompt to guide away from, instead of the empty one
cls = ""  # class name or number, or several separated by commas
n = 0  # >= 0: images per prompt, class or input image; 0 is 4 if there is one of them, else 1
size = ()  # each >= 1: side in pixels, or height,width; () is the trained size, or that of the input image
seed = 0  # in [-4e18, 4e18]: image i starts from the noise of seed + i
# sampling; a checkpoint has its own sampler, steps and guidance, these defaults are for another project's model
sampler = "unipc"  # one of samplers: see diffusion.py; unless given, the checkpoint's
steps = 20  # in [1, 1000]: sampling steps; unless given, the checkpoint's
spacing = "trailing"  # one of SPACINGS: how the steps are distributed over time
# options of some samplers
eta = -1.0  # -1 or in [0, 1]: noise of ddim, euler_a and dpmpp_2m_sde; -1 is 0 for ddim and 1 for the others
noise_scale = 1.0  # >= 0: factor of ddpm's noise; below 1 is smoother
variance = "small"  # small | large: of ddpm's noise
order = 2  # in [1, 3]: of unipc
# guidance
guidance = 3.0  # >= 0: classifier-free guidance scale, 1 disables it; unless given, the checkpoint's
guidance_from = 0.0  # in [0, 1): guide at times t >= this (t = 0 is data)
guidance_to = 1.0  # in (0, 1]: and t <= this
guidance_rescale = 0.0  # in [0, 1]: how far the guided standard deviation is restored to the unguided one
guide_ckpt = ""  # weaker model to guide away from, instead of the empty condition (autoguidance)
# the model
ema_std = 0.0  # 0 or in [0.01, 0.25]: relative length of a post-hoc EMA from the run's snapshots; 0 is the stored EMA
first_stage = ""  # autoencoder with a fine-tuned decoder, used instead of the checkpoint's
denoiser = ""  # MODULE:CLASS of your own denoiser, such as mine:DiT, if the checkpoint was trained with one
tower_weights = ""  # file or folder of the frozen text encoder, if moved since training
clip_vocab = ""  # file or folder of its tokenizer, if moved since training
objective = ""  # "" | eps | v: prediction of another project's network, if its file does not name it
num_heads = 0  # >= 0: attention heads of another project's U-Net, if its file does not hold them
head_dim = 0  # >= 0: or channels of each head
# speed and memory
batch_size = 16  # >= 1: images at a time
decode_batch = 8  # >= 0: images decoded at a time, which takes more memory than sampling; 0 is all
decode_tile = 0  # >= 0: side in latents of the tiles that are decoded separately; 0 is no tiles
compile = "false"  # auto | true | false: torch.compile of the denoiser, for many batches; auto is true on CUDA
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto | float32 | bfloat16: auto is bfloat16 on CUDA, else float32
attention = "auto"  # auto | triton | xformers | sdpa | sdpa_flash | sdpa_cudnn | sdpa_efficient | sdpa_math | reference
# image inputs
init_image = ""  # file or folder to start from; for super-resolution the low-resolution images
strength = -1.0  # -1 or in (0, 1]: share of the steps that init_image goes through; -1 is 0.75, with a mask 1
mask = ""  # image of the size of init_image: white is generated, black is kept
noise_level = 0  # >= 0: noise added to a low-resolution init_image, up to the checkpoint's sr_noise
semantic_map = ""  # PNG of class indices or a folder of them, for a semantic checkpoint
# output
out_dir = ""  # for PNGs, samples.jsonl and grid.png; "" is the folder samples next to the checkpoint
show = False  # open the grid

# inputs of `generate` that a task needs, and those that it can use
TASK_INPUTS = {
    "none": (set(), {"image", "mask"}),
    "inpaint": ({"image", "mask"}, set()),
    "sr": ({"low"}, {"level"}),
    "semantic": ({"map"}, set()),
}

# --- the pipeline ---


class Pipeline(NamedTuple):
    """Everything that generating images needs."""

    denoiser: torch.nn.Module  # unet.Denoiser
    vae: torch.nn.Module | None  # None: the denoiser works on pixels
    schedule: Schedule
    objective: str
    latent_shape: tuple  # (C, h, w) as trained
    num_classes: int  # 0 if not class-conditional
    classes: list  # their names, or []: see `numbers`
    examples: list  # what to generate by default: prompts, class numbers, or None
    task: dict = {"task": "none"}  # task, and sr_scale, sr_noise, sr_schedule, map_classes where it has them
    tower: torch.nn.Module | None = None  # a frozen text encoder outside of the denoiser
    sampling: dict = {}  # sampler, steps and guidance of training's sample grids; {} for another project's model
    image_mode: str = "RGB"  # L | RGB | RGBA
    clip_x0: float = 0.0  # limit of every x0_hat, as some of diffusers' schedulers have it; 0 is none

    @property
    def text(self):
        """The text encoder, or None."""
        return self.tower if self.denoiser.text is None else self.denoiser.text

    @property
    def factor(self):
        """Pixels per latent, along a side."""
        return 1 if self.vae is None else self.vae.factor

    @property
    def multiple(self):
        """Image sides are multiples of this."""
        return self.factor * self.denoiser.unet.side_multiple

    @property
    def numbers(self):
        """The number of each class: the one that it is named by, if all names are whole numbers, else its position."""
        if self.classes and all(re.fullmatch(r"\d{1,9}", name) for name in self.classes):
            return [int(name) for name in self.classes]
        return list(range(self.num_classes))

    def to(self, device):
        """Moves all networks."""
        for network in (self.denoiser, self.vae, self.tower):
            if network is not None:
                network.to(device, memory_format=torch.channels_last)
        return self

    def caption(self, condition):
        """A condition as text."""
        if isinstance(condition, int) and condition == self.num_classes:  # the null class
            return ""
        if isinstance(condition, int):
            return self.classes[condition] if self.classes else f"class {condition}"
        return condition or ""


def load_pipeline(
    path, ema_std=0.0, tower_weights="", clip_vocab="", objective="", first_stage="", unet_class=UNet, **known
):
    """The pipeline of a stage-2 checkpoint or of another project's model (see convert.py), on the CPU.

    ema_std: relative length of a post-hoc EMA; 0 is the stored EMA.
    tower_weights, clip_vocab: the frozen text encoder and its tokenizer, if they were moved since training.
    first_stage: an autoencoder whose decoder is used, see `with_decoder`.
    unet_class: of the denoiser, if the checkpoint was trained with another than UNet.
    objective, known: eps or v, num_heads, head_dim, ..., where another project's file does not have them.
    """
    path = checkpoint.find(path)
    if checkpoint.is_ours(path):
        if objective or known:
            reject(path, "has all its settings", "leave out --objective, --num_heads and --head_dim")
        model, meta = Denoiser.from_pretrained(path, ema_std, unet_class), checkpoint.read_meta(path)
        vae = VAE.from_pretrained(path) if meta["vae"] else None
        tower = CLIPTextEncoder.of_checkpoint(path, tower_weights, clip_vocab)
    else:
        if ema_std or tower_weights:
            reject(path, "not a checkpoint of this repository", "leave out --ema_std and --tower_weights")
        parts = convert.load_pipeline(path, clip_vocab=clip_vocab, objective=objective, **known)
        model, vae, tower, meta = build_foreign(path, parts)
    if first_stage:
        vae = with_decoder(vae, first_stage)
    about, config = meta["model"], meta.get("config", {})
    own = {"sampler": "sampler", "steps": "sample_steps", "guidance": "guidance"}
    height, width = (about["image_size"][i] // (vae.factor if vae else 1) for i in (0, -1))
    ends = about["beta_start"], about["beta_end"]
    steps = {name: about[name] for name in ("steps_offset", "set_alpha_to_one") if name in about}
    return Pipeline(
        denoiser=model,
        vae=vae,
        schedule=diffusion.make_schedule(about["schedule"], *ends, zero_snr=about["zero_snr"])._replace(**steps),
        objective=about["objective"],
        latent_shape=(vae.latent_channels if vae else len(about["image_mode"]), height, width),
        num_classes=about["num_classes"] if about["cond"] == "class" else 0,
        classes=meta["classes"],
        examples=meta["examples"],
        task={name: about.get(name) for name in ("task", "sr_scale", "sr_noise", "sr_schedule", "map_classes")},
        tower=tower,
        sampling={name: config[setting] for name, setting in own.items() if setting in config},
        image_mode=about["image_mode"],
        clip_x0=about.get("clip_x0", 0.0),
    )


def build_foreign(path, parts):
    """(Denoiser, VAE or None, CLIPTextEncoder or None, meta) of what convert.load_pipeline read."""
    tokens, vae, tower = parts["class_tokens"], None, None
    tokens = None if tokens is None else torch.nn.Embedding.from_pretrained(tokens)
    model = Denoiser(checkpoint.build(UNet, *parts["unet"], path), class_tokens=tokens).requires_grad_(False).eval()
    if parts["vae"]:
        vae = checkpoint.build(VAE, *parts["vae"], path)
    if parts["text"]:
        settings, state, merges = parts["text"]
        tower = checkpoint.build(CLIPTextEncoder, settings, state, path, merges=merges)
    return model, vae, tower, parts["meta"]


def with_decoder(vae, path):
    """The autoencoder at `path`, a copy of `vae` whose decoder was fine-tuned, with the latent statistics of `vae`.

    Raises UserError if its encoder or codebook differs by more than 1 %, far more than rounding to half precision.
    """
    if vae is None:
        reject(path, "the checkpoint generates pixels", "leave out first_stage")
    new, decoding = VAE.from_pretrained(path), ("decoder.", "post_quant_conv.", "latent_")
    a, b = ({n: t for n, t in v.state_dict().items() if not n.startswith(decoding)} for v in (vae, new))
    same = {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
    if not same or sum((a[n] - b[n]).square().sum() for n in a) > 1e-4 * sum(a[n].square().sum() for n in a):
        reject(path, "has other latents than the checkpoint's autoencoder", "use train_vae.py --train=decoder")
    new.latent_mean.copy_(vae.latent_mean)
    new.latent_std.copy_(vae.latent_std)
    return new


def compile_unet(pipeline, **options):
    """Compile the denoiser for full batches in `generate`; on CUDA its kernels are then launched as one graph.

    options: of torch.compile. The first batch of a size takes a minute or more; smaller ones run uncompiled.
    """
    pipeline.denoiser.unet.compile(dynamic=False, **(options or {"mode": "reduce-overhead"}))
    pipeline.denoiser.unet.is_compiled = True


def round_weights(pipeline):
    """Round the denoiser's matrices and kernels to bfloat16 once, as autocast would at every step."""
    for layer in pipeline.denoiser.unet.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.to(torch.bfloat16)


# --- generation ---


@torch.no_grad()
def generate(
    pipeline, conditions, seeds, steps, guidance=1.0, sampler="ddim", size=(), batch_size=16, inputs=None,
    strength=1.0, negative="", spacing="trailing", guidance_interval=(0.0, 1.0), guidance_rescale=0.0, guide=None,
    decode_tile=0, decode_batch=0, callback=None, progress=False, **options,
):  # fmt: skip
    """One image for each condition (a prompt, a class number, or None): (N,C,H,W) in [-1,1] on the CPU.

    seeds: N integers. An image depends on its condition and seed only, not on its batch.
    size: (side,) or (height, width) in pixels; () is the trained size, or that of the inputs.
    inputs: tensors of N rows that the task uses (TASK_INPUTS): "image" (N,C,H,W) in [-1,1] and "mask" (N,1,H,W), 1
        where to generate; "low" (N,C,h,w) and "level" (N,), the noise to add to it; "map" (N,H,W). With "image" any
        checkpoint does image to image, where `strength` is the share of the steps, and with "mask" inpainting.
    guide: a Pipeline with the same latents and schedule to guide away from (Karras et al. 2024, arXiv 2406.02507).
    callback: called with x0_hat as up to 16 images (B,C,H,W) at every evaluation of the first batch.
    progress: show a bar of the steps of all batches on a terminal.
    options: of the sampler. See diffusion.py for steps, spacing and guidance.

    `generate.evaluations` is then the number of network evaluations per image.
    """
    inputs, images = inputs or {}, []
    assert sampler in samplers, f"sampler must be one of {', '.join(samplers)}, got {sampler!r}"
    assert 0 < strength <= 1 and (strength == 1 or "image" in inputs), f"strength={strength} needs inputs['image']"
    assert guide is None or is_comparable(pipeline, guide), "the guide has other latents, noise or conditions"
    for name, rows in {"seeds": seeds, **inputs}.items():
        assert len(rows) == len(conditions), f"{len(rows)} {name} for {len(conditions)} images"
    sides = latent_sides(pipeline, input_size(pipeline, inputs) or size)
    schedule = pipeline.schedule
    if sampler not in ("ddim", "plms"):  # in diffusers leading steps end at entry 0 with these alone
        schedule = schedule._replace(set_alpha_to_one=True)
    times = diffusion.sample_times(steps, schedule, pipeline.objective, spacing)
    times = times[-1 - max(1, round(steps * strength)) :]
    guided = dict(guidance=guidance, negative=negative, guide=guide)
    guided |= dict(guidance_interval=guidance_interval, guidance_rescale=guidance_rescale)
    batches, steps = range(0, len(conditions), batch_size), len(times) - 1
    bar = tqdm(total=len(batches) * steps, unit="step", leave=False, disable=None if progress else True)

    def on_step(x0, t):
        bar.update(len(images) * steps + (times[:-1] >= t).sum().item() - bar.n)
        if callback is not None and not images:
            callback(decode(pipeline, x0[:16], decode_tile, decode_batch))

    job = (sides, times, strength, functools.partial(samplers[sampler], **options), on_step)
    for start in batches:
        rows = slice(start, start + batch_size)
        batch = {name: t[rows] for name, t in inputs.items()}
        full = len(conditions[rows]) == batch_size or not getattr(pipeline.denoiser.unet, "is_compiled", False)
        with contextlib.nullcontext() if full else torch.compiler.set_stance("force_eager"):  # no second compilation
            x = sample_batch(pipeline, conditions[rows], seeds[rows], batch, *job, **guided)
        images.append(decode(pipeline, x, decode_tile, decode_batch))
    bar.close()
    images = torch.cat(images)
    if "mask" in inputs:  # known pixels are copied, without the loss of the autoencoder
        images = torch.where(inputs["mask"].cpu() > 0.5, images, inputs["image"].float().cpu())
    return images


def sample_batch(pipeline, conditions, seeds, inputs, sides, times, strength, sampler, on_step, **guided):
    """Latents (B,C,*sides) of one batch of `generate`.

    sampler: a function of `samplers` with its options bound.  on_step: called with x0_hat and t at every evaluation.
    guided: keyword arguments of guided_denoiser.
    """
    schedule, weight = pipeline.schedule, next(pipeline.denoiser.parameters())
    device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
    inputs = {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in inputs.items()}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # also of the noise that a sampler adds
    noise = diffusion.randn((len(seeds), pipeline.latent_shape[0], *sides), generators)
    noise = noise.to(device, dtype, memory_format=torch.channels_last)
    network = guided_denoiser(pipeline, conditions, task_inputs(pipeline, inputs, sides, generators), **guided)
    latents = encode(pipeline, inputs["image"]) if "image" in inputs else None
    x = diffusion.start_std(times, schedule) * noise
    if strength < 1:
        x = schedule.alpha(times[:1]).item() * latents + schedule.sigma(times[:1]).item() * noise
    denoise = diffusion.clip_x0(network, pipeline.clip_x0) if pipeline.clip_x0 else network
    if "mask" in inputs and pipeline.task["task"] != "inpaint":
        mask = F.max_pool2d((inputs["mask"] > 0.5).to(dtype), pipeline.factor)  # generate latents masked in part
        denoise = diffusion.keep_known(denoise, latents, mask)

    def observed(x, t):
        x0 = denoise(x, t)
        on_step(x0, t)
        return x0

    x = sampler(observed, x, times, schedule, generators)
    generate.evaluations = network.evaluations
    return x


def guided_denoiser(pipeline, conditions, extra, guidance=1.0, negative="", guide=None, **options):
    """make_denoiser of the pipeline for `conditions`, guided away from `guide` or from the empty condition.

    extra: of `task_inputs`, {} without a task. options: guidance_interval and guidance_rescale.
    """
    cond, null, weak = network_inputs(pipeline, conditions, **extra), None, None
    if guide is not None:
        weak = guided_denoiser(guide, conditions, extra)
    elif pipeline.text is not None:
        null = network_inputs(pipeline, [negative] * len(conditions), **extra)
    elif pipeline.num_classes:
        null = network_inputs(pipeline, [pipeline.num_classes] * len(conditions), **extra)
    else:
        guidance = 1.0  # unconditional
    unet, schedule, objective = pipeline.denoiser.unet, pipeline.schedule, pipeline.objective
    return diffusion.make_denoiser(unet, schedule, objective, cond, null, guidance, guide=weak, **options)


def network_inputs(pipeline, conditions, concat=None, level=None):
    """What the denoiser's network takes besides x and t, for conditions as in `generate`: context, y, concat."""
    inputs = {"concat": concat, "y": level}
    if pipeline.text is not None:
        tokens = pipeline.text.tokenize(conditions)
        inputs |= {"tokens": tokens} if pipeline.denoiser.text is not None else {"context": pipeline.text(tokens)}
    elif pipeline.num_classes:
        inputs["y"] = torch.tensor(conditions, device=next(pipeline.denoiser.parameters()).device)
    return pipeline.denoiser.condition(**inputs)


def task_inputs(pipeline, inputs, sides, generators):
    """The `concat` and `level` of network_inputs, of a batch of inputs of `generate`; {} without a task."""
    task = pipeline.task
    if task["task"] == "none":
        return {}
    level = {}
    if task.get("sr_noise"):
        low = inputs["low"]
        level["level"] = inputs.get("level", torch.zeros(len(low), dtype=torch.long, device=low.device))
        eps = diffusion.randn(low.shape, generators, low.device, low.dtype)
        inputs = inputs | {"low": augment_low(low, level["level"], eps, task.get("sr_schedule"))}
    return level | {"concat": image_condition(task["task"], pipeline.vae, inputs, sides, task.get("map_classes") or 0)}


def is_comparable(pipeline, guide):
    """Whether `guide` has the latents, noise, task and conditions of `pipeline`, as autoguidance needs."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    same_noise = all(torch.equal(f(t), g(t)) for f, g in zip(guide.schedule[1:3], pipeline.schedule[1:3]))
    a, b = (p.vae.state_dict() if p.vae else {} for p in (pipeline, guide))
    same_latents = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    same_conditions = guide.num_classes in (0, pipeline.num_classes) and (not guide.text or pipeline.text)
    return same_noise and same_latents and same_conditions and guide.task == pipeline.task


def latent_sides(pipeline, size):
    """(h, w) of the latents of an image of `size`: () as trained, (side,) or (height, width) in pixels."""
    if not size:
        return pipeline.latent_shape[1:]
    if len(size) > 2 or any(side % pipeline.multiple or side < 1 for side in size):
        given = ",".join(f"{side:g}" for side in size)
        raise UserError(f"size={given} must be one or two multiples of {pipeline.multiple}")
    return tuple(int(side) // pipeline.factor for side in (size[0], size[-1]))


def input_size(pipeline, inputs):
    """(height, width) of the images to generate from `inputs` of `generate`; () without inputs."""
    task = pipeline.task["task"]
    needed, optional = TASK_INPUTS[task]
    fits = needed <= inputs.keys() <= needed | optional and ("mask" not in inputs or "image" in inputs)
    assert fits, f"task={task} needs inputs {needed or '{}'} and can use {optional or '{}'}, got {set(inputs)}"
    scale = pipeline.task["sr_scale"] if task == "sr" else 1
    sizes = {tuple(scale * side for side in t.shape[-2:]) for name, t in inputs.items() if name != "level"}
    assert len(sizes) <= 1, f"inputs have several sizes: {sizes}"
    return next(iter(sizes), ())


def encode(pipeline, images):
    """Images (B,C,H,W) in [-1,1] -> unit-variance latents."""
    vae = pipeline.vae
    return images if vae is None else vae.normalize(vae.encode(images).mode())


def decode(pipeline, x, tile=0, batch=0):
    """Unit-variance latents -> images (B,C,H,W) in [-1,1] on the CPU.

    tile: side in latents of tiles that are decoded separately, 0 for none. batch: images at a time, 0 for all, or
    fewer if memory runs out. bfloat16 autocast does not overflow here, unlike float16.
    """
    vae, batch, decoded = pipeline.vae, batch or len(x), []
    while len(decoded) < len(x):
        z = x[len(decoded) : len(decoded) + batch]
        try:
            if vae is not None:
                z = vae.denormalize(z)
                z = vae.decode_tiled(z, tile, tile // 4) if tile else vae.decode(z)
            decoded.extend(z.float().cpu().clamp(-1, 1))
        except torch.OutOfMemoryError:
            if batch == 1:
                raise  # decode_tile=64, or smaller, needs less
            batch = -(-len(z) // 2)
    return torch.stack(decoded)


# --- the command ---


def read_prompts(path):
    """The lines of a prompts file that are not empty."""
    remedy = "give a file with one prompt per line"
    # some editors begin a file with a byte order mark
    with checkpoint.reading(path, "cannot be read as UTF-8", remedy), open(path, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file if line.strip()]
    if not lines:
        reject(path, "no prompts in it", remedy)
    return lines


def load_class(path):
    """The class that the setting `denoiser` names, MODULE:CLASS; `UNet` for ""."""
    if not path:
        return UNet
    (module, _, name), found, reason = path.partition(":"), None, "names no class"
    try:
        found = getattr(importlib.import_module(module), name, None) if module and name else None
    except ModuleNotFoundError as error:
        reason = error
    if not isinstance(found, type):
        remedy = "write MODULE:CLASS, such as examples.dit:DiT, with a module in this folder or on PYTHONPATH"
        raise UserError(f"--denoiser={path}: {reason}; {remedy}")
    return found


def sampler_options(sampler):
    """Names of a sampler's options: its arguments after denoise, x, times, schedule, generators."""
    return list(inspect.signature(samplers[sampler]).parameters)[5:]


def with_sampling(cfg, pipeline):
    """cfg with the checkpoint's own sampler, steps and guidance where these are settings that are not given."""
    own = {name: value for name, value in pipeline.sampling.items() if name in cfg and name not in cfg.given}
    return cfg.replace(**own)


def load_from_settings(cfg, machine):
    """(cfg of `with_sampling`, pipeline on `machine`, keyword arguments of `generate`) of this script or of fid.py."""
    parts = dict(unet_class=load_class(cfg.denoiser))
    parts |= {name: cfg[name] for name in ("tower_weights", "clip_vocab", "first_stage")}
    known = {name: cfg[name] for name in ("objective", "num_heads", "head_dim") if cfg[name]}
    if reason := unavailable(cfg.attention, machine.device, getattr(torch, machine.precision)):
        raise UserError(f"--attention={cfg.attention}: {reason}")
    pipeline = load_pipeline(cfg.ckpt, cfg.ema_std, **parts, **known)
    cfg = with_sampling(cfg, pipeline)
    check_settings(cfg, pipeline)
    guide = load_pipeline(cfg.guide_ckpt, **parts) if cfg.guide_ckpt else None
    if guide and not is_comparable(pipeline, guide):
        reject(cfg.guide_ckpt, "has other latents, noise or conditions", "use an earlier or smaller model like ckpt")
    for part in filter(None, (pipeline, guide)):
        part.to(machine.device)
        for network in filter(None, (part.denoiser, part.tower)):
            use_attention(network, cfg.attention)
        if machine.precision == "bfloat16":
            round_weights(part)
        if machine.compile:
            compile_unet(part)
    return cfg, pipeline, generate_options(cfg) | {"guide": guide}


def generate_options(cfg):
    """Keyword arguments of `generate` that are settings."""
    names = "steps sampler spacing size batch_size guidance guidance_rescale negative decode_tile decode_batch".split()
    names += [name for name in sampler_options(cfg.sampler) if cfg.get(name, -1) != -1]  # -1: the sampler's default
    return {name: cfg[name] for name in names} | {"guidance_interval": (cfg.guidance_from, cfg.guidance_to)}


def check_settings(cfg, pipeline):
    """UserError for a setting that has no effect with this checkpoint or with the other settings."""
    task, text = pipeline.task["task"], pipeline.text is not None
    sr_noise = pipeline.task.get("sr_noise") or 0
    guidable = text or pipeline.num_classes > 0 or bool(cfg.guide_ckpt)
    rules = [  # settings, whether they have an effect, what they need
        ("prompt prompts negative", text, "a checkpoint with text"),
        ("cls", pipeline.num_classes, "a checkpoint with classes"),
        ("guidance", guidable, "a checkpoint with text or classes, or --guide_ckpt"),
        ("negative guide_ckpt guidance_from guidance_to guidance_rescale", guidable and cfg.guidance != 1, "guidance"),
        ("negative", not cfg.guide_ckpt, "guidance without --guide_ckpt"),
        ("tower_weights clip_vocab", pipeline.tower is not None, "a checkpoint with a frozen text encoder"),
        ("init_image", task != "semantic", "another checkpoint; use --semantic_map"),
        ("mask strength", cfg.get("init_image") and task in ("none", "inpaint"), "--init_image, without another task"),
        ("semantic_map", task == "semantic", "a checkpoint with task=semantic"),
        ("noise_level", cfg.get("noise_level", 0) <= sr_noise, f"task=sr, and a level up to its sr_noise, {sr_noise}"),
        ("size", task != "sr", "a checkpoint with a task other than sr"),
    ]
    for option in sorted({option for sampler in samplers for option in sampler_options(sampler)}):
        having = [sampler for sampler in samplers if option in sampler_options(sampler)]
        rules.append((option, cfg.sampler in having, f"another sampler: {', '.join(having)}"))
    for names, used, need in rules:
        for name in names.split():
            if name in cfg.changed and not used:
                raise UserError(f"--{name}={cfg[name]} has no effect here; it needs {need}")


def choose_conditions(pipeline, cfg):
    """The prompts, class positions or Nones that the settings prompt, prompts and cls name, or the examples."""
    if pipeline.text is not None:
        prompts = read_prompts(cfg.prompts) if cfg.get("prompts") else pipeline.examples
        prompts = [cfg.prompt] if cfg.prompt else prompts
        for prompt in [*prompts, cfg.get("negative", "")]:
            if (count := pipeline.text.count_tokens(prompt)) > pipeline.text.length:
                print(f"prompt of {count} tokens cut to {pipeline.text.length}: {prompt[:60]}...")
        return prompts
    if not cfg.cls:
        return pipeline.examples
    known = {str(number): i for i, number in enumerate(pipeline.numbers)}
    known |= {name: i for i, name in enumerate(pipeline.classes)}  # a name has precedence over a number
    names = [cfg.cls] if cfg.cls in known else [name.strip() for name in cfg.cls.split(",")]  # names can have commas
    for name in names:
        if name not in known:
            some = ", ".join(pipeline.classes[:10]) or f"0 to {pipeline.num_classes - 1}"
            some += f", ... ({pipeline.num_classes} in all)" if len(pipeline.classes) > 10 else ""
            raise UserError(f"--cls={name} is not a class of this checkpoint: {some}")
    return [known[name] for name in names]


def open_images(path):
    """{name: PIL image} of a file, or of the images in a folder in sorted order."""
    files, images = [Path(path)], {}
    if files[0].is_dir():
        files = sorted(file for file in files[0].iterdir() if file.name.lower().endswith(IMAGES))
    if not files:
        reject(path, "no images in it", "give an image, or a folder of images")
    for file in files:
        with checkpoint.reading(file, "does not open as an image", "give an image"), Image.open(file) as image:
            check_size(image)
            image.load()
            images[file.name] = image
    return images


def fit(image, size, multiple, resample=Image.Resampling.LANCZOS):
    """Resize and centrally crop a PIL image to `size` (height, width); () crops it to multiples of `multiple`."""
    if size:
        return ImageOps.fit(image, (size[-1], size[0]), resample)
    W, H = (side // multiple * multiple for side in image.size)
    if min(W, H) == 0:
        raise UserError(f"an image of {image.width}x{image.height} is smaller than {multiple}x{multiple}: set --size")
    return image.crop((0, 0, W, H))


def class_map(image, classes, name):
    """PIL image of class indices -> int64 (H,W); 255 is unknown, -1, unless it is a class."""
    if image.mode not in ("1", "L", "P", "I;16", "I"):
        reject(name, f"mode {image.mode}", "give a PNG of one channel with class indices from 0")
    indices = torch.from_numpy(np.array(image).astype(np.int64))
    if classes <= 255:
        indices[indices == 255] = -1
    if indices.max() >= classes:
        reject(name, f"has class {indices.max()}", f"this checkpoint has 0 to {classes - 1}")
    return indices


def read_inputs(pipeline, cfg):
    """(names, `inputs` of generate with a row for each) from the files that init_image, mask and semantic_map name."""
    task, multiple, rows = pipeline.task["task"], pipeline.multiple, []
    latent_sides(pipeline, cfg.size)  # checks it
    size, nearest = tuple(int(side) for side in cfg.size), Image.Resampling.NEAREST
    images = open_images(cfg.semantic_map or cfg.init_image)
    mask = to_mode(next(iter(open_images(cfg.mask).values())), "L") if cfg.mask else None
    for name, image in images.items():
        if task == "semantic":
            rows.append({"map": class_map(fit(image, size, multiple, nearest), pipeline.task["map_classes"], name)})
        elif task == "sr":
            step = multiple // math.gcd(multiple, pipeline.task["sr_scale"])
            rows.append({"low": to_tensor(fit(to_mode(image, pipeline.image_mode), (), step))})
            if pipeline.task["sr_noise"]:
                rows[-1]["level"] = torch.tensor(cfg.noise_level)
        else:
            image = to_mode(image, pipeline.image_mode)  # upright
            rows.append({"image": to_tensor(fit(image, size, multiple))})
            if mask is not None:
                if mask.size != image.size:
                    reject(cfg.mask, f"is {mask.size}, {name} is {image.size}", "make them the same size")
                rows[-1]["mask"] = (to_tensor(fit(mask, size, multiple, nearest)) > 0).float()
                if not rows[-1]["mask"].any():
                    reject(cfg.mask, "is all black", "make white what is to be generated")
    sizes = {tuple(next(iter(row.values())).shape[-2:]) for row in rows}
    if len(sizes) > 1:
        reject(cfg.semantic_map or cfg.init_image, f"several sizes {sorted(sizes)}", "set --size, or run it for each")
    return list(images), {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def choose_inputs(pipeline, cfg):
    """(conditions, seeds, names of the input images or None, `inputs` of generate) that the settings ask for."""
    needs = {"inpaint": ("init_image", "mask"), "sr": ("init_image",), "semantic": ("semantic_map",)}
    for name in needs.get(pipeline.task["task"], ()):
        if not cfg[name]:
            raise UserError(f"this checkpoint (task={pipeline.task['task']}) needs --{name}")
    conditions, names, inputs = choose_conditions(pipeline, cfg), [None], {}
    if cfg.init_image or cfg.semantic_map:
        names, inputs = read_inputs(pipeline, cfg)
        if not (cfg.prompt or cfg.prompts or cfg.cls):  # not the examples of training
            if pipeline.num_classes:
                raise UserError("this checkpoint needs --cls, the class to generate")
            conditions = [""] if pipeline.text is not None else [None]
    elif conditions[0] is None and cfg.n:
        conditions = [None]
    pairs = [(i, condition) for i in range(len(names)) for condition in conditions]
    each = cfg.n or (4 if len(pairs) == 1 else 1)
    index, conditions = zip(*[pair for pair in pairs for _ in range(each)])
    seeds = list(range(cfg.seed, cfg.seed + len(index)))
    inputs = {name: rows[list(index)] for name, rows in inputs.items()}
    return list(conditions), seeds, [names[i] for i in index], inputs


def plan(pipeline, cfg):
    """(conditions, seeds, inputs, ... of `generate`, a record of each image) that the settings ask for."""
    conditions, seeds, names, inputs = choose_inputs(pipeline, cfg)
    strength = cfg.strength if cfg.strength > 0 else 0.75 if "image" in inputs and "mask" not in inputs else 1.0
    records = []
    for i, condition in enumerate(conditions):
        records.append({"file": f"{i:05d}.png", "prompt": pipeline.caption(condition), "seed": seeds[i]})
        if inputs:
            records[-1] |= {"from": names[i], "strength": strength}
    batch_size = min(cfg.batch_size, len(conditions))
    return dict(conditions=conditions, seeds=seeds, inputs=inputs, strength=strength, batch_size=batch_size), records


def earlier_files(folder):
    """Names of what an earlier call wrote into `folder`: the images in its samples.jsonl, and their grid.png."""
    file = Path(folder, "samples.jsonl")
    images = re.findall(r'^{"file": "(\d+\.png)"', file.read_text(errors="replace"), re.M) if file.exists() else []
    return {*images, "grid.png"} if images else set()


def save_samples(folder, images, records, settings):
    """PNGs with their records, samples.jsonl, grid.png of up to 64 images; those of an earlier call are removed."""
    os.makedirs(folder, exist_ok=True)
    for name in earlier_files(folder):
        Path(folder, name).unlink(missing_ok=True)
    Path(folder, "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for image, record in zip(images, records):
        save_png(Path(folder, record["file"]), to_pil(image), record | {"config": settings})
    grid = make_grid(images[:64], [record["prompt"] for record in records])
    save_png(Path(folder, "grid.png"), grid, {"config": settings})
    return grid


if __name__ == "__main__":
    cfg = configure(globals())
    install_excepthook()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("sample.py runs in one process; for torchrun see fid.py")
    machine = setup(cfg)
    cfg, pipeline, options = load_from_settings(cfg, machine)
    what, records = plan(pipeline, cfg)
    options |= what

    file = checkpoint.find(cfg.ckpt)
    folder = cfg.out_dir or os.path.join(file if os.path.isdir(file) else os.path.dirname(file), "samples")
    for name in {"grid.png", *(record["file"] for record in records)} - earlier_files(folder):
        if Path(folder, name).exists():
            reject(folder, f"its {name} is not from an earlier call and would be overwritten", "set another --out_dir")

    started = time.time()
    with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.precision == "bfloat16"):
        images = generate(pipeline, progress=True, **options)
    seconds = time.time() - started
    grid = save_samples(folder, images, records, cfg)
    how = f"{cfg.sampler}, {cfg.steps} steps, guidance {cfg.guidance:g}"
    how += f", {generate.evaluations} network evaluations each"
    print(f"{len(images)} images in {seconds:.1f} s ({how}): {folder}/grid.png")
    if cfg.show:
        grid.show()
