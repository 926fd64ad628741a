"""Draws: from prompts, classes, boxes and pictures, a few to look at or many to evaluate.

    python sample.py --ckpt=out/ldm                                                    # what training showed
    python sample.py --ckpt=out/ldm --prompt="a red star" --steps=20 --sampler=dpmpp_2m
    python sample.py --ckpt=out/ldm --prompt="a hat" --init_image=photo.png --mask=mask.png
    torchrun --nproc_per_node=8 sample.py --ckpt=out/ldm --num_samples=50000           # an .npz for evaluators
    python sample.py --ckpt=FOLDER_OR_FILE --prompt="a hat" --cfg=7.5 --spacing=leading  # Stable Diffusion as it draws

The diffusion process itself is in diffusion.py; `generate` brings it together with the networks.
"""

import contextlib
import datetime
import inspect
import json
import math
import os
import shutil
import sys
import textwrap
import time
import zipfile
import zlib
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

import convert
from attention import BACKENDS, use_attention
from configurator import configure
from data.shards import write_whole
from data.tasks import augment_low, image_condition
from diffusion import Schedule, ddim_invert, keep_known, make_denoiser, make_schedule, randn, sample_times, samplers
from metrics import psnr, ssim
from vae import VAE

# --- the command ---

# what to draw
ckpt = "out/ldm"  # a stage-2 checkpoint or its out_dir; for --reconstruct a stage-1 one will do
prompt = ""  # draw this; nothing at all draws what the checkpoint was shown with in training
prompts = ""  # file with a prompt a line
negative = ""  # guide away from this prompt, not from the empty one
cls = ""  # class number or name, or several with commas
n = 0  # pictures of each prompt, class or given picture; 0 is 4 of a single one and 1 of each of several
size = ()  # side in pixels, or height,width; () is the trained one, or a given picture's own
# how
seed = 0  # picture i starts from the noise of seed + i
sampler = "unipc"  # ddpm | ddim | plms | euler | euler_a | heun | dpmpp_2m | dpmpp_2m_sde | unipc
steps = 20  # from 1 up
spacing = "trailing"  # of the steps: trailing | leading | linspace | karras | quadratic
eta = -1.0  # ddim, euler_a, dpmpp_2m_sde: fresh noise, from 0 (none) to 1 (ancestral); -1 is 0 for ddim, else 1
noise_scale = 1.0  # ddpm: times its noise; below 1 is smoother
variance = "small"  # ddpm: of its noise, small | large
order = 2  # unipc: 1 | 2 | 3
cfg = 3.0  # guidance scale; 1 is none
cfg_from = 0.0  # guide at times t from here (t = 0 is data)
cfg_to = 1.0  # to here
cfg_rescale = 0.0  # share of the guided standard deviation that is set back to the unguided one, 0 to 1
guide_ckpt = ""  # guide away from this worse model, not from the empty condition (autoguidance)
ema_std = 0.0  # width of a post-hoc EMA made from the run's snapshots, relative to its length; 0 is the stored EMA
first_stage = ""  # draw by the decoder of this autoencoder, which was trained on from the checkpoint's own
tower_weights = ""  # of a frozen text encoder, if they are not where training found them
clip_vocab = ""  # likewise, of its tokenizer
objective = ""  # what the network predicts, eps or v, if another's file does not tell: Stable Diffusion 2 as one file
num_heads = 0  # of every attention, if another's file does not tell, or
head_dim = 0  # channels of each head
batch_size = 16  # pictures at a time
decode_batch = 8  # of them decoded at a time, which takes more memory than drawing does; 0 is all
decode_tile = 0  # decode in tiles of so many latents a side; 0 is whole pictures
compile = "auto"  # torch.compile of the U-Net, with CUDA graphs: auto (on CUDA, for num_samples) | true | false
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto (bfloat16 on CUDA, else float32) | float32 | bfloat16
attention = "auto"  # auto (fastest) | triton | xformers | sdpa | sdpa_flash, _cudnn, _efficient, _math | reference
# from a picture
init_image = ""  # file or folder of what to start from; for a super-resolution checkpoint the small pictures
strength = -1.0  # how much of init_image is redrawn: above 0 (little) to 1 (all); -1 is 0.75, with a mask 1
mask = ""  # picture as large as init_image: what is white in it is painted, the rest is kept
noise_level = 0  # super-resolution: noise put on init_image, from 0 to the checkpoint's sr_noise
semantic_map = ""  # PNG of class indices, or a folder of them, for a checkpoint that draws maps
invert = False  # start from the noise that DDIM leads init_image back to, and draw from that what is asked for
source_prompt = ""  # what init_image shows, for --invert
# between two
interpolate = 0  # so many frames from seed to seed_to, from prompt to prompt_to, or both
seed_to = -1  # -1 stays at seed
prompt_to = ""  # "" stays at prompt
# many: an .npz of arr_0 (N,H,W,3) uint8, with classes arr_1, as evaluators take it; also under torchrun
num_samples = 0  # so many pictures; the same command again goes on where it stopped
out = "samples.npz"  # where to
fid_ref = ""  # then compare them with this folder of real pictures: see fid.py
inception_weights = ""  # of fid.py: the network of FID
trunk = "squeeze"  # of fid.py, without Inception
trunk_weights = ""  # of fid.py
# where to
out_dir = ""  # PNGs, samples.jsonl and grid.png; "" is the folder samples beside the checkpoint
trajectory = False  # trajectory.gif too: what the first pictures were expected to become, step by step
show = False  # open the grid
reconstruct = ""  # instead: a folder of images, shown above their reconstructions, with PSNR and SSIM


TASK_SETTINGS = ("sr_scale", "sr_noise", "sr_schedule", "map_classes")


class Between(NamedTuple):
    """A seed or a prompt between two others."""

    a: int | str
    b: int | str
    weight: float  # 0 is a, 1 is b


class Pipeline(NamedTuple):
    """All that drawing needs."""

    denoiser: torch.nn.Module  # unet.Denoiser
    vae: torch.nn.Module | None  # None draws pixels
    schedule: Schedule
    objective: str
    latent_shape: tuple  # (C, h, w) as trained
    num_classes: int  # 0 where it is not class-conditional
    classes: list  # their names, or []
    shown: list  # what it draws when nothing is asked for: prompts, class numbers, or None
    task: dict = {}  # task (none | inpaint | sr | semantic), sr_scale, sr_noise, map_classes; {} is none
    tower: torch.nn.Module | None = None  # a frozen text encoder beside the denoiser

    @property
    def text(self):
        """The text encoder, or None."""
        return self.tower if self.denoiser.text is None else self.denoiser.text

    @property
    def factor(self):
        """Pixels to a latent."""
        return 1 if self.vae is None else self.vae.factor

    @property
    def multiple(self):
        """What the sides of its pictures are multiples of."""
        return self.factor * self.denoiser.unet.side_multiple

    def caption(self, condition):
        if isinstance(condition, Between):
            return f"{condition.a} -> {condition.b}, {condition.weight:.2f}"
        if isinstance(condition, int) and condition == self.num_classes:  # as an image without a label has it
            return ""
        if isinstance(condition, int):
            return self.classes[condition] if self.classes else f"class {condition}"
        return condition or ""


@convert.says_what_is_wrong
def load_pipeline(path, ema_std=0.0, tower_weights="", clip_vocab="", objective="", first_stage="", **settings):
    """The pipeline in a stage-2 checkpoint, on the CPU: its EMA weights, or a post-hoc EMA of that relative width.

    tower_weights, clip_vocab: of a frozen text encoder, if they are not where training found them.
    first_stage: an autoencoder whose decoder is to draw, see `with_decoder`.
    path may also be another's pipeline: a folder of diffusers, a file of CompVis or Stability, a Hugging Face id.
    objective, settings: eps or v, num_heads or head_dim, and so on, if another's file does not tell.
    """
    if convert.is_ours(convert.find_checkpoint(path)):
        if objective or settings:
            told = ["objective"] * bool(objective) + [*settings]
            raise ValueError(f"{path} is of this repository and tells all: leave out {', '.join(told)}")
        _, meta = convert.read_checkpoint(path)
        if meta["stage"] != "ldm":
            raise ValueError(
                f"{path} is an autoencoder (stage 1): train_ldm.py --first_stage={path} makes what can draw"
            )
        denoiser = convert.load_denoiser(path, ema_std)
        vae = VAE.from_pretrained(path) if meta["vae"] else None
        tower = convert.load_tower(path, tower_weights, clip_vocab)
    else:
        if ema_std or tower_weights:
            raise ValueError(f"ema_std and tower_weights are for checkpoints of this repository, which {path} is not")
        denoiser, vae, tower, meta = convert.load_foreign(
            convert.find_checkpoint(path), clip_vocab, objective, **settings
        )
    if first_stage:
        vae = with_decoder(vae, first_stage)
    model = meta["model"]
    side = model["image_size"] // (vae.factor if vae else 1)
    task = model.get("task", "none")  # files of the time before tasks do not say
    return Pipeline(
        denoiser,
        vae,
        make_schedule(model["schedule"], model["beta_start"], model["beta_end"], zero_snr=model.get("zero_snr", False)),
        model["objective"],
        (denoiser.unet.settings["in_channels"], side, side),
        model["num_classes"] if model["cond"] == "class" else 0,
        meta["classes"],
        meta["shown"],
        {"task": task} | {name: model[name] for name in TASK_SETTINGS if name in model},
        tower,
    )


def with_decoder(vae, path):
    """The autoencoder at path, which decodes the latents of `vae`, in its place: its decoder was trained on, no more.

    ValueError where its encoder or codebook differs by more than 1 %, far above what half precision does to weights.
    """
    if vae is None:
        raise ValueError(f"first_stage={path} has no place in a checkpoint that draws pixels: leave it out")
    new, decoding = VAE.from_pretrained(path), ("decoder.", "post_quant_conv.", "latent_")
    a, b = ({n: t for n, t in v.state_dict().items() if not n.startswith(decoding)} for v in (vae, new))
    same = {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
    if not same or sum((a[n] - b[n]).square().sum() for n in a) > 1e-4 * sum(a[n].square().sum() for n in a):
        raise ValueError(
            f"first_stage={path} makes other latents than the checkpoint's autoencoder: it may differ in its decoder "
            f"alone, as train_vae.py --train=decoder leaves it"
        )
    new.latent_mean.copy_(vae.latent_mean)
    new.latent_std.copy_(vae.latent_std)
    return new


def latent_sides(pipeline, size):
    """(h, w) of the latents of a picture of `size`: () as trained, (side,) or (height, width) in pixels."""
    if not size:
        return pipeline.latent_shape[1:]
    if len(size) > 2:
        raise ValueError(f"size={','.join(str(side) for side in size)} is neither a side nor height,width: give 1 or 2")
    multiple = pipeline.multiple
    for side in size:
        if side % multiple or side < 1:
            better = max(1, round(side / multiple)) * multiple
            raise ValueError(f"size={side} is not a multiple of {multiple}: choose {better}")
    return tuple(int(side) // pipeline.factor for side in (size[0], size[-1]))


def given_size(pipeline, given):
    """(height, width) of the pictures to draw from `given`, () for {}; ValueError if the task takes other things."""
    task = pipeline.task.get("task", "none")
    needed = {"none": (), "inpaint": ("image", "mask"), "sr": ("low",), "semantic": ("map",)}[task]
    allowed = {"image", "mask", *needed} if task != "sr" else {"low", "level"} if pipeline.task["sr_noise"] else {"low"}
    for name in needed:
        if name not in given:
            raise ValueError(
                f"this checkpoint (task={task}) draws from {' and '.join(needed)}: given[{name!r}] is missing"
            )
    for name in given:
        if name not in allowed or (name == "mask" and "image" not in given):
            raise ValueError(f"given[{name!r}] is nothing that this checkpoint (task={task}) can use")
    scale = pipeline.task["sr_scale"] if task == "sr" else 1
    sizes = {tuple(scale * side for side in v.shape[-2:]) for name, v in given.items() if name != "level"}
    if len(sizes) > 1:
        raise ValueError(f"what is given has several sizes: {sizes}")
    return next(iter(sizes), ())


def slerp(a, b, weight):
    """Between two noises (B,...) along the great circle, whose points are noise as likely as they are; weight (B,)."""
    dot, norm = (a * b).flatten(1).sum(1), a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
    angle = torch.acos((dot / norm).clamp(-1, 1))
    straight = angle.sin() < 1e-4  # one noise twice
    part_a = torch.where(straight, 1 - weight, ((1 - weight) * angle).sin() / angle.sin())
    part_b = torch.where(straight, weight, (weight * angle).sin() / angle.sin())
    part_a, part_b = (part.to(a.dtype).view(-1, *[1] * (a.ndim - 1)) for part in (part_a, part_b))
    return part_a * a + part_b * b


def seeded_noise(seeds, shape):
    """Noise (N, *shape) on the CPU, and the generators it came from, which draw what a sampler adds later."""
    generators = [torch.Generator().manual_seed(s.a if isinstance(s, Between) else s) for s in seeds]
    noise = randn((len(generators), *shape), generators)
    if any(isinstance(s, Between) for s in seeds):
        other = randn(noise.shape, [torch.Generator().manual_seed(s.b) for s in seeds])
        noise = slerp(noise, other, torch.tensor([s.weight for s in seeds]))
    return noise, generators


def unet_inputs(pipeline, conditions, concat=None, level=None):
    """What the pipeline's U-Net takes besides x and t for conditions as `generate` takes them: UNet.forward's names."""
    denoiser, text, inputs = pipeline.denoiser, pipeline.text, {}
    place = next(denoiser.parameters()).device
    if text is not None and any(isinstance(c, Between) for c in conditions):
        a, b = (unet_inputs(pipeline, list(side), concat, level) for side in list(zip(*conditions))[:2])
        weight = torch.tensor([c.weight for c in conditions], device=place).view(-1, 1, 1)
        return a | {"context": torch.lerp(a["context"].float(), b["context"].float(), weight)}
    if text is not None:
        tokens = text.tokenize(conditions)
        inputs = {"tokens": tokens} if denoiser.text is not None else {"context": text(tokens)}
    elif pipeline.num_classes:
        inputs = {"y": torch.tensor(conditions, device=place)}
    if level is not None:
        inputs["y"] = level
    if concat is not None:
        inputs["concat"] = concat
    return denoiser.condition(**inputs)


def compile_unet(pipeline, **options):
    """Compiles the U-Net for whole batches in `generate`; on CUDA its kernels are then launched as one graph.

    options: of torch.compile.  The first batch of a size waits for it, a minute or more; parts of one run as before.
    """
    pipeline.denoiser.unet.compile(dynamic=False, **(options or {"mode": "reduce-overhead"}))
    pipeline.denoiser.unet.is_compiled = True


def round_weights(pipeline):
    """Rounds the U-Net's matrices and kernels to bfloat16 once, as autocast would do in the same way at every step."""
    for layer in pipeline.denoiser.unet.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.to(torch.bfloat16)


def decode(vae, x, tile=0, batch=0):
    """Unit-variance latents -> images, `batch` at a time, or fewer where memory is short; in tiles of `tile` latents.

    Under bfloat16 autocast nothing overflows, as it would in float16: its range is float32's.
    """
    if 0 < batch < len(x):
        return torch.cat([decode(vae, part, tile) for part in x.split(batch)])
    z = vae.denormalize(x)
    try:
        return vae.decode_tiled(z, tile, tile // 4) if tile else vae.decode(z)
    except torch.OutOfMemoryError:
        if len(z) == 1:
            raise ValueError(
                "memory does not hold one picture's decoding: set decode_tile=64, or a smaller one"
            ) from None
    return torch.cat([decode(vae, half, tile) for half in x.split(-(-len(x) // 2))])


@torch.no_grad()
def generate(
    pipeline,
    conditions,
    seeds,
    steps,
    cfg=1.0,
    sampler="ddim",
    size=(),
    batch_size=16,
    given=None,
    strength=1.0,
    source=None,
    negative="",
    spacing="trailing",
    cfg_interval=(0.0, 1.0),
    cfg_rescale=0.0,
    guide=None,
    decode_tile=0,
    decode_batch=0,
    see=None,
    **options,
):
    """Draws one picture for each condition (a prompt, a class number, or None): (N,3,H,W) in [-1,1] on the CPU.

    seeds: of each picture's noise, which is the same in any batch; seeds and prompts may be Between.
    size: (side,) or (height, width) in pixels; () as trained, or as what is given.
    given: pictures to start from, N of each: see image_condition for what the checkpoint's task takes ("level" (N,), of
        super-resolution, is the noise put on "low"). Any checkpoint takes "image", with `strength` the share of the
        steps that it goes through, and "mask", outside of which the image stays as it is.
    source: conditions that describe given["image"], whose noise DDIM inversion then finds, in the place of a seed's.
    guide: another Pipeline of the same latents and schedule, to guide away from (Karras et al. 2024, arXiv 2406.02507).
    see: is called with x0_hat of the first pictures, decoded, at every evaluation of the first batch.
    options: the sampler's own.  The number of network evaluations per picture is in `generate.evaluations`.
    """
    denoiser, vae, schedule, objective, shape = pipeline[:5]
    given = given or {}
    if sampler not in samplers:
        raise ValueError(f"sampler {sampler!r} is not one of {', '.join(samplers)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} pictures at a time: choose 1 or more")
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} is not above 0 (nothing redrawn) and up to 1 (all): choose 0.75")
    if (strength < 1 or source is not None) and "image" not in given:
        raise ValueError("strength and source start from a picture: there is no given['image']")
    if guide is not None:
        check_guide(pipeline, guide)
    for name, rows in {"seeds": seeds, **given, **({"source": source} if source is not None else {})}.items():
        if len(rows) != len(conditions):
            raise ValueError(f"{len(rows)} {name} for {len(conditions)} pictures: give one each")
    sides = latent_sides(pipeline, given_size(pipeline, given) or size)
    times = sample_times(steps, schedule, objective, spacing)
    if strength < 1:
        times = times[-1 - max(1, round(steps * strength)) :]
    weight, pictures = next(denoiser.parameters()), []  # any weight: it tells device and dtype
    kind = torch.promote_types(weight.dtype, torch.float32)  # of all but the network's inputs
    for start in range(0, len(conditions), batch_size):
        rows = slice(start, start + batch_size)
        some, now = conditions[rows], {name: t[rows].to(weight.device) for name, t in given.items()}
        now = {name: t.to(kind) if t.is_floating_point() else t for name, t in now.items()}
        noise, generators = seeded_noise(seeds[rows], (shape[0], *sides))
        noise = noise.to(weight.device, kind, memory_format=torch.channels_last)
        extra = task_inputs(pipeline, now, sides, generators)
        network = guided(
            pipeline, some, extra, cfg, negative, guide, cfg_interval=cfg_interval, cfg_rescale=cfg_rescale
        )
        denoise = network  # which may be wrapped below; the network itself counts its evaluations
        if "image" in now and (strength < 1 or source is not None or pipeline.task.get("task") != "inpaint"):
            latents = now["image"] if vae is None else vae.normalize(vae.encode(now["image"]).mode())
        if "mask" in now and pipeline.task.get("task") != "inpaint":
            painted = F.max_pool2d((now["mask"] > 0.5).to(kind), pipeline.factor)  # a latent painted in part
            denoise = keep_known(denoise, latents, painted)
        if see is not None and start == 0:
            denoise = watched(denoise, lambda x0: see(finish(pipeline, x0[:16], decode_tile, decode_batch)))
        x = schedule.sigma(times[:1]).item() * noise
        if strength < 1:
            x = schedule.alpha(times[:1]).item() * latents + x
        generate.evaluations = 0
        eager = len(some) < batch_size and getattr(denoiser.unet, "is_compiled", False)  # no second compilation
        with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
            if source is not None:
                back = guided(pipeline, source[rows], extra, 1.0)
                x = ddim_invert(back, latents, times, schedule)
                generate.evaluations = back.evaluations
            x = samplers[sampler](denoise, x, times, schedule, generators, **options)
        generate.evaluations += network.evaluations
        pictures.append(finish(pipeline, x, decode_tile, decode_batch))
    pictures = torch.cat(pictures)
    if "mask" in given:  # what is known comes back exactly, without the autoencoder's loss
        pictures = torch.where(given["mask"].cpu() > 0.5, pictures, given["image"].float().cpu())
    return pictures


def guided(pipeline, conditions, extra, cfg, negative="", guide=None, **guidance):
    """make_denoiser of the pipeline for these conditions, away from `guide` or no condition; extra: of task_inputs."""
    cond, null, weaker = unet_inputs(pipeline, conditions, **extra), None, None
    if guide is not None:
        weaker = guided(guide, conditions, extra, 1.0)
    elif pipeline.text is not None:
        null = unet_inputs(pipeline, [negative] * len(conditions), **extra)
    elif pipeline.num_classes:
        null = unet_inputs(pipeline, [pipeline.num_classes] * len(conditions), **extra)
    else:
        cfg = 1.0  # there is nothing to guide away from
    network, schedule, objective = pipeline.denoiser.unet, pipeline.schedule, pipeline.objective
    return make_denoiser(network, schedule, objective, cond, null, cfg, guide=weaker, **guidance)


def same_weights(a, b):
    """Whether two modules are the same in all weights; None, which draws pixels, is as None alone."""
    if a is None or b is None:
        return a is b
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_guide(pipeline, guide):
    """ValueError where autoguidance would compare what cannot be compared."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    same_noise = all(torch.equal(f(t), g(t)) for f, g in zip(guide.schedule[1:3], pipeline.schedule[1:3]))
    same_task = guide.task == pipeline.task and same_weights(guide.vae, pipeline.vae)
    takes_same = guide.num_classes in (0, pipeline.num_classes) and (guide.text is None or pipeline.text is not None)
    if not (same_noise and same_task and takes_same):
        raise ValueError(
            "guide_ckpt has other latents, noise or conditions: take an earlier run, or a smaller one, like it"
        )


def task_inputs(pipeline, given, sides, generators):
    """What `unet_inputs` takes of a batch of given pictures: {"concat", "level"}, or {}."""
    task, level = pipeline.task.get("task", "none"), None
    if task == "none":
        return {}
    if pipeline.task.get("sr_noise"):
        low = given["low"]
        level = given.get("level", torch.zeros(len(low), dtype=torch.long, device=low.device))
        eps = randn(low.shape, generators, low.device, low.dtype)
        given = given | {"low": augment_low(low, level, eps, pipeline.task.get("sr_schedule"))}
    concat = image_condition(task, pipeline.vae, given, sides, pipeline.task.get("map_classes", 0))
    return {"concat": concat} if level is None else {"concat": concat, "level": level}


def watched(denoise, see):
    """`denoise` that shows each x0_hat to see(x0)."""

    def denoise_and_tell(x, t):
        x0 = denoise(x, t)
        see(x0)
        return x0

    return denoise_and_tell


def finish(pipeline, x, decode_tile=0, decode_batch=0):
    """Latents as they leave the sampler -> images in [-1,1] on the CPU."""
    x = x if pipeline.vae is None else decode(pipeline.vae, x, decode_tile, decode_batch)
    return x.float().cpu().clamp(-1, 1)


def read_prompts(path):
    """The lines of a prompts file that are not empty."""
    try:
        with open(path, encoding="utf-8-sig") as f:  # some editors begin a file with a byte order mark
            lines = [line.strip() for line in f if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8: give a file with a prompt a line") from None
    if not lines:
        raise ValueError(f"{path} holds no prompts: give a file with a prompt a line")
    return lines


def to_pil(image):
    """(3,H,W) in [-1,1] -> PIL."""
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def make_grid(images, captions, columns=0):
    """A PIL image of images (N,3,H,W), near square or in `columns`, captions below."""
    N, _, H, W = images.shape
    columns, zoom = columns or math.ceil(N**0.5), max(1, 128 // W)
    lines = 2 if any(captions) else 0
    cell_w, cell_h = W * zoom + 4, H * zoom + 4 + 12 * lines
    grid = Image.new("RGB", (columns * cell_w, -(-N // columns) * cell_h), "white")
    pen = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * cell_w + 2, i // columns * cell_h + 2
        grid.paste(to_pil(image).resize((W * zoom, H * zoom), Image.Resampling.NEAREST), (x, y))
        wrapped = textwrap.wrap(caption, max(8, cell_w // 6))[:lines]
        pen.text((x, y + H * zoom), "\n".join(wrapped).encode("latin-1", "replace").decode("latin-1"), fill="black")
    return grid


def save_grid(path, images, captions, settings=None, columns=0):
    """One PNG of images (N,3,H,W), as make_grid lays them out; `settings` go into the file as text."""
    grid, info = make_grid(images, captions, columns), PngInfo()
    info.add_text("settings", json.dumps(settings or {}), zip=True)
    grid.save(path, pnginfo=info)
    return grid


def save_gif(path, frames, seconds=2.0):
    """PIL images as an animation of so many seconds, which repeats and rests at its end."""
    durations = [max(20, int(1000 * seconds / len(frames)))] * (len(frames) - 1) + [1000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def choose_conditions(pipeline, prompt, prompts, cls):
    """What the settings ask to draw, as a list of prompts, class numbers or Nones."""
    text, count = pipeline.text, pipeline.num_classes
    if (prompt or prompts) and text is None:
        raise ValueError(f"this checkpoint takes no prompt: use {'--cls' if count else 'neither --prompt nor --cls'}")
    if cls and not count:
        raise ValueError(f"this checkpoint takes no class: use {'--prompt' if text else 'neither --prompt nor --cls'}")
    if prompt and prompts:
        raise ValueError("prompt and prompts are both set: choose one")
    if text is not None:
        wanted = [prompt] if prompt else read_prompts(prompts) if prompts else pipeline.shown
        for p in wanted:
            if text.count_tokens(p) > text.length:
                print(f"prompt of {text.count_tokens(p)} tokens cut to {text.length}: {p[:60]}...")
        return wanted
    if not cls:
        return pipeline.shown
    wanted = []
    for name in [cls] if cls in pipeline.classes else map(str.strip, cls.split(",")):  # a name may hold commas
        number = pipeline.classes.index(name) if name in pipeline.classes else int(name) if name.isdecimal() else -1
        if not 0 <= number < count:
            names = f", or one of {', '.join(pipeline.classes[:10])}" if pipeline.classes else ""
            raise ValueError(f"cls={name} is no class of this checkpoint: choose 0 to {count - 1}{names}")
        wanted.append(number)
    return wanted


def open_image(path):
    """The PIL image in a file, whole."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as e:  # Pillow's plugins raise many kinds
        raise ValueError(f"{path} does not open as an image ({e})") from None


def open_images(path):
    """{name: PIL image} of a file, or of every image of a folder in sorted order."""
    from data.dataset import IMAGES

    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is not there: give an image, or a folder of them")
    folder, names = (path, sorted(os.listdir(path))) if os.path.isdir(path) else os.path.split(path)
    names = [name for name in names if name.lower().endswith(IMAGES)] if os.path.isdir(path) else [names]
    if not names:
        raise ValueError(f"{path} holds no images: give an image, or a folder of them")
    return {name: open_image(os.path.join(folder, name)) for name in names}


def fit(image, size, multiple, resample=Image.Resampling.LANCZOS):
    """A PIL image resized and centrally cropped to size (height, width); cropped to multiples where size is ()."""
    if size:
        return ImageOps.fit(image, (size[-1], size[0]), resample)
    W, H = (side // multiple * multiple for side in image.size)  # the last few pixels may not fit
    if min(W, H) == 0:
        raise ValueError(f"a picture of {image.width}x{image.height} is smaller than {multiple}x{multiple}: set size")
    return image.crop((0, 0, W, H))


def class_map(image, classes, name):
    """PIL image of class indices -> int64 (H,W); 255 is unknown, -1, unless it is a class."""
    if image.mode not in ("1", "L", "P", "I;16", "I"):
        raise ValueError(f"{name} has mode {image.mode}: a map is a PNG of one channel, class indices from 0")
    indices = torch.from_numpy(np.array(image).astype(np.int64))
    if classes <= 255:
        indices[indices == 255] = -1
    if indices.max() >= classes:
        raise ValueError(f"{name} holds class {indices.max()}: this checkpoint knows 0 to {classes - 1}")
    return indices


def read_given(pipeline, init_image, mask, semantic_map, noise_level, size):
    """(names, `given` of generate with a row for each of them) from the files that the settings name."""
    from data.dataset import to_rgb, to_tensor

    task, multiple, rows = pipeline.task.get("task", "none"), pipeline.multiple, []
    latent_sides(pipeline, size)  # checks it
    size = tuple(int(side) for side in size)
    pictures = open_images(semantic_map or init_image)
    paint = to_rgb(open_image(mask)) if mask else None
    for name, picture in pictures.items():
        if semantic_map:
            picture = fit(picture, size, multiple, Image.Resampling.NEAREST)
            rows.append({"map": class_map(picture, pipeline.task["map_classes"], name)})
            continue
        picture = to_rgb(picture)
        if task == "sr":
            step = multiple // math.gcd(multiple, pipeline.task["sr_scale"])
            rows.append({"low": to_tensor(fit(picture, (), step))})
            if pipeline.task.get("sr_noise"):
                rows[-1]["level"] = torch.tensor(noise_level)
            continue
        rows.append({"image": to_tensor(fit(picture, size, multiple))})
        if paint is not None:
            if paint.size != picture.size:
                sizes = "{}x{} and {} is {}x{}".format(*paint.size, name, *picture.size)
                raise ValueError(f"{mask} is {sizes}: make them one size")
            white = fit(paint, size, multiple, Image.Resampling.NEAREST).convert("L")
            rows[-1]["mask"] = (to_tensor(white.convert("RGB"))[:1] > 0).float()
            if not rows[-1]["mask"].any():
                raise ValueError(f"{mask} is black all over: white is what is painted")
    sizes = sorted({tuple(next(iter(row.values())).shape[-2:]) for row in rows})
    if len(sizes) > 1:
        several = ", ".join("{1}x{0}".format(*side) for side in sizes[:4])
        remedy = "draw them one by one" if task == "sr" else "set size, such as --size=256"
        raise ValueError(f"the pictures of {semantic_map or init_image} have several sizes ({several}): {remedy}")
    return list(pictures), {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


SAMPLER_OPTIONS = ("eta", "noise_scale", "variance", "order")  # settings that are handed to the sampler
STOCHASTIC = ("ddpm", "euler_a", "dpmpp_2m_sde")  # samplers that add noise of their own


def check_settings(config, pipeline):
    """ValueError for a setting that has no meaning beside the others or for this checkpoint, or that it lacks."""
    c, task = SimpleNamespace(**config), pipeline.task.get("task", "none")
    if c.sampler not in samplers:
        raise ValueError(f"sampler {c.sampler!r} is not one of {', '.join(samplers)}")
    conditional = pipeline.text is not None or pipeline.num_classes > 0
    is_guided = c.cfg != 1 and (conditional or bool(c.guide_ckpt))
    bulk, between, prompted = c.num_samples != 0, c.interpolate != 0, pipeline.text is not None
    other_task = f"is not for this checkpoint, of task={task}"
    rules = [  # settings, whether they have a meaning here, why not
        ("cfg", conditional or c.guide_ckpt, "has nothing to guide towards: this checkpoint is unconditional"),
        ("guide_ckpt", c.cfg != 1, "needs a cfg above 1"),
        ("cfg_from cfg_to cfg_rescale", is_guided, "needs guidance: set cfg, or leave it out"),
        ("negative source_prompt prompt_to", prompted, "is not for this checkpoint, which takes no prompt"),
        ("negative", c.cfg != 1, "needs a cfg above 1"),
        ("negative", not c.guide_ckpt, "has no place beside guide_ckpt: set one of them"),
        ("tower_weights clip_vocab", pipeline.tower is not None, "is for checkpoints with a frozen text encoder"),
        ("decode_tile decode_batch", pipeline.vae is not None, "is for checkpoints with an autoencoder"),
        ("init_image", task != "semantic", f"{other_task}: give semantic_map"),
        ("semantic_map", task == "semantic", other_task),
        ("noise_level", pipeline.task.get("sr_noise"), "is for super-resolution checkpoints trained with sr_noise"),
        ("mask strength invert", bool(c.init_image), "needs init_image"),
        ("mask strength", task in ("none", "inpaint"), other_task),
        ("size", task != "sr", other_task),
        ("invert num_samples interpolate", task == "none", other_task),
        ("strength n seed", not c.invert, "is not for --invert, which goes all the way, once, without a seed"),
        ("source_prompt", c.invert, "is for --invert"),
        ("seed_to prompt_to", between, "is for --interpolate"),
        ("n init_image prompts", not between, "is not for --interpolate"),
        ("n init_image interpolate trajectory out_dir show", not bulk, "is not for --num_samples"),
        ("out fid_ref", bulk, "is for --num_samples"),
        ("inception_weights trunk trunk_weights", bool(c.fid_ref), "is for --fid_ref"),
    ]
    for name in SAMPLER_OPTIONS:
        users = [key for key, sampler in samplers.items() if name in inspect.signature(sampler).parameters]
        rules.append((name, c.sampler in users, f"is for sampler={' or '.join(users)}, not {c.sampler}"))
    for names, fits, reason in rules:
        for name in names.split():
            if name in config.changed and not fits:
                raise ValueError(f"{name}={config[name]} {reason}")
    for name, tasks in (("init_image", ("inpaint", "sr")), ("mask", ("inpaint",)), ("semantic_map", ("semantic",))):
        if task in tasks and not config[name]:
            raise ValueError(f"this checkpoint, of task={task}, draws from pictures: give {name}")
    ranges = [  # setting, low, high
        ("n", 0, math.inf, "choose 1 or more pictures"),
        ("num_samples", 0, math.inf, "choose 1 or more pictures"),
        ("noise_level", 0, pipeline.task.get("sr_noise", 0), f"choose 0 to {pipeline.task.get('sr_noise', 0)}"),
        ("seed", -(2**62), 2**62, "choose one of at most 62 bits"),
        ("seed_to", -1, 2**62, "choose one of at most 62 bits, or -1"),
        ("batch_size", 1, math.inf, "choose 1 or more pictures"),
        ("noise_scale", 0, math.inf, "choose 0 or more"),
        ("decode_tile", 0, math.inf, "choose a tile's side in latents, such as 64, or 0"),
        ("decode_batch", 0, math.inf, "choose 1 or more pictures, or 0 for all"),
    ]
    for name, low, high, remedy in ranges:
        if not low <= config[name] <= high:
            raise ValueError(f"{name}={config[name]}: {remedy}")
    if c.invert and (c.sampler in STOCHASTIC or c.eta > 0):
        raise ValueError(f"invert needs a sampler without noise of its own, not {c.sampler}: choose ddim with eta=0")
    if between and c.seed_to >= 0 and (c.sampler in STOCHASTIC or c.eta > 0):
        raise ValueError(f"seed_to needs a sampler without noise of its own, not {c.sampler}: choose unipc or ddim")
    if c.fid_ref and bool(c.inception_weights) == bool(c.trunk_weights):
        raise ValueError("fid_ref needs inception_weights=FILE or trunk_weights=FILE, one of them: see fid.py")
    if c.fid_ref and not os.path.exists(c.fid_ref):
        raise ValueError(f"fid_ref={c.fid_ref} is not there: name a folder of real pictures")
    if c.fid_ref and not c.out.endswith(".npz"):
        raise ValueError(f"out={c.out} is not to be told from a folder by fid_ref: end it in .npz")
    if between and (c.interpolate < 2 or (c.seed_to < 0 and not c.prompt_to)):
        raise ValueError(
            f"interpolate={c.interpolate} frames need two ends: set it to 2 or more, and seed_to or prompt_to"
        )
    if c.mask and os.path.isdir(c.mask):
        raise ValueError(f"mask={c.mask} is a folder: give one picture, for all of init_image")


def choose_pictures(pipeline, config):
    """What the settings ask for: (conditions, seeds, names of the given pictures or None, `given` of generate)."""
    c = SimpleNamespace(**config)
    wanted = choose_conditions(pipeline, c.prompt, c.prompts, c.cls)
    conditional = pipeline.text is not None or pipeline.num_classes > 0
    given = c.init_image or c.semantic_map
    if (given or c.interpolate) and not (c.prompt or c.prompts or c.cls):  # what training showed is not meant here
        if pipeline.num_classes:
            raise ValueError("this checkpoint takes a class: say with --cls which one is drawn")
        wanted = [""] if pipeline.text is not None else [None]
    if c.interpolate:
        return *between_two(wanted, c), None, {}
    if not given:
        each = c.n or (4 if len(wanted) == 1 else 1)
        wanted = [w for w in wanted for _ in range(each)] if conditional else [None] * (c.n or len(pipeline.shown))
        return wanted, list(range(c.seed, c.seed + len(wanted))), None, {}
    names, given = read_given(pipeline, c.init_image, c.mask, c.semantic_map, c.noise_level, c.size)
    pairs = [(i, w) for i in range(len(names)) for w in wanted]
    each = 1 if c.invert else c.n or (4 if len(pairs) == 1 else 1)
    index, wanted = zip(*[pair for pair in pairs for _ in range(each)])
    seeds = list(range(c.seed, c.seed + len(wanted)))
    return list(wanted), seeds, [names[i] for i in index], {k: v[list(index)] for k, v in given.items()}


def between_two(wanted, c):
    """(conditions, seeds) of the frames of --interpolate."""
    weights = [i / (c.interpolate - 1) for i in range(c.interpolate)]
    if len(wanted) > 1:
        raise ValueError(f"cls={c.cls} names several classes: interpolate stays with one")
    if c.prompt_to and not c.prompt:
        raise ValueError("prompt_to needs prompt, where the way to it begins")
    conditions = [Between(c.prompt, c.prompt_to, w) if c.prompt_to else wanted[0] for w in weights]
    return conditions, [Between(c.seed, c.seed_to, w) if c.seed_to >= 0 else c.seed for w in weights]


# --- the command: many pictures ---


def draw_many(path, count, chunk, draw, labels, settings, rank=0, world=1, barrier=None):
    """Pictures 0 to count - 1 into the .npz at `path`: arr_0 (count,H,W,3) uint8, arr_1 the labels, if there are any.

    draw(range) -> (n,H,W,3) uint8, asked for chunks of so many by number, chunk k on rank k % world. Chunks lie in
    PATH.parts until all are there; those of an earlier run with the same `settings` (of JSON) are taken as they are.
    """
    folder, whole = f"{path}.parts", os.path.exists(path)
    if whole and not os.path.isdir(folder):
        raise ValueError(f"{path} is there already: remove it, or choose another out")
    os.makedirs(folder, exist_ok=True)
    kept = f"{folder}/settings.json"
    if os.path.exists(kept):
        with open(kept) as f:
            check_drawn(folder, json.load(f), settings)
    elif not whole:  # by every rank alike
        write_whole(kept, lambda f: f.write(json.dumps(settings).encode()))
    starts = range(0, 0 if whole else count, chunk)  # whole: an earlier run had only the parts left to remove
    mine = [start for start in starts[rank::world] if not os.path.exists(f"{folder}/{start:08d}.npy")]
    for done, start in enumerate(mine):
        began = time.time()
        pictures = draw(range(start, min(start + chunk, count)))
        write_whole(f"{folder}/{start:08d}.npy", lambda f, p=pictures: np.save(f, p))
        if rank == 0:
            left = (len(mine) - done - 1) * (time.time() - began)
            print(
                f"{done + 1} of {len(mine)} chunks of {chunk} on each of {world} processes, {left:.0f} s left",
                flush=True,
            )
    if barrier is not None:
        barrier()
    if rank == 0:
        if not whole:
            assemble(path, [f"{folder}/{start:08d}.npy" for start in starts], count, labels, settings)
        shutil.rmtree(folder)


def settings_of(path):
    """The settings that an .npz at path was drawn with, None where it does not tell."""
    with contextlib.suppress(zipfile.BadZipFile, ValueError), zipfile.ZipFile(path) as z:
        return json.loads(z.comment)
    return None


def check_drawn(path, before, settings):
    """ValueError where what lies at path was drawn with other settings, as JSON has them, than these."""
    if before is None:
        raise ValueError(f"{path} does not tell how it was drawn: remove it, or choose another out")
    settings = json.loads(json.dumps(settings))
    rows = [f"{k}: {before.get(k)} there, {v} here" for k, v in settings.items() if before.get(k) != v]
    if rows:
        raise ValueError(f"{path} was drawn with other settings ({'; '.join(rows)}): take those, or remove it")


def assemble(path, chunks, count, labels, settings):
    """The .npz of all chunks, one of them in memory at a time; its zip comment is the settings, as JSON."""
    shape = (count, *np.load(chunks[0], mmap_mode="r").shape[1:])

    def write(file):
        with zipfile.ZipFile(file, "w") as z:
            z.comment = json.dumps(settings).encode()
            with z.open("arr_0.npy", "w", force_zip64=True) as f:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(f, header)
                for chunk in chunks:
                    f.write(np.load(chunk).tobytes())
            if labels is not None:
                with z.open("arr_1.npy", "w") as f:
                    np.lib.format.write_array(f, np.asarray(labels, dtype=np.int64))

    write_whole(path, write)


# --- the command: reconstructions ---


@torch.no_grad()
def show_reconstructions(vae, folder, out_dir, device, decode_tile=0):
    """Encodes and decodes every image of a folder at its own size: reconstructions.png has originals above."""
    from data.dataset import BadImage, Dataset, to_tensor

    images, pairs, scores = Dataset(folder, "all", image_size=vae.factor), [], []
    for i in range(len(images)):
        try:
            image = images.rgb(i)
        except BadImage as e:
            print(f"skipped a bad image: {e}")
            continue
        W, H = (side // vae.factor * vae.factor for side in image.size)  # the last few pixels may not fit
        if min(W, H) < max(vae.factor, 11):
            print(f"skipped {images.key(i)}: {image.size[0]}x{image.size[1]} is too small")
            continue
        x = to_tensor(image.crop((0, 0, W, H)))[None].to(device, next(vae.parameters()).dtype)
        z = vae.encode(x).mode()
        y = vae.decode_tiled(z, decode_tile, decode_tile // 4) if decode_tile else vae.decode(z)
        scores.append((psnr(y, x).item(), ssim(y, x).item()))
        print(f"{images.key(i)} {W}x{H}: PSNR {scores[-1][0]:.2f} dB, SSIM {scores[-1][1]:.4f}", flush=True)
        if len(pairs) < 8:
            pairs.append((to_pil(x[0].float()), to_pil(y[0].float())))
    if not scores:
        raise ValueError(f"{folder} holds no image that can be reconstructed")
    mean = [sum(s) / len(scores) for s in zip(*scores)]
    height = max(a.height for a, _ in pairs)
    sheet = Image.new("RGB", (sum(a.width + 4 for a, _ in pairs), 2 * height + 4), "white")
    left = 0
    for pair in pairs:
        for row, picture in enumerate(pair):
            sheet.paste(picture, (left, row * (height + 4)))
        left += pair[0].width + 4
    sheet.save(f"{out_dir}/reconstructions.png")
    print(f"{len(scores)} images: PSNR {mean[0]:.2f} dB, SSIM {mean[1]:.4f}; {out_dir}/reconstructions.png")
    return sheet


def one_line_error(kind, error, trace):
    """Users' mistakes as one line; TRACEBACK=1 shows where they were noticed, all else shows it always."""
    if issubclass(kind, (ValueError, OSError, ImportError)) and not os.environ.get("TRACEBACK"):
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    config = configure(globals())
    sys.excepthook = one_line_error
    for name, choices in (
        ("device", ("auto", "cpu", "cuda")),
        ("dtype", ("auto", "float32", "bfloat16")),
        ("compile", ("auto", "true", "false", "True", "False")),
        ("attention", BACKENDS),
    ):
        if config[name] not in choices:
            raise ValueError(f"{name}={config[name]} is not one of {', '.join(choices)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU here: mend its installation, or set device=cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not num_samples:
        raise ValueError(f"{world} processes would draw the same pictures: set num_samples, or leave torchrun out")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    file = convert.find_checkpoint(ckpt)  # or a folder of diffusers'
    out_dir = out_dir or os.path.join(file if os.path.isdir(file) else os.path.dirname(file), "samples")

    if reconstruct:
        for name in config.changed:
            if name not in ("ckpt", "reconstruct", "out_dir", "device", "dtype", "show", "decode_tile"):
                raise ValueError(f"{name}={config[name]} is not for --reconstruct")
        vae = VAE.from_pretrained(file).to(device, memory_format=torch.channels_last)
        os.makedirs(out_dir, exist_ok=True)
        with autocast:
            sheet = show_reconstructions(vae, reconstruct, out_dir, device, decode_tile)
        if show:
            sheet.show()
        sys.exit(0)

    # models
    parts = dict(tower_weights=tower_weights, clip_vocab=clip_vocab, first_stage=first_stage)
    heads = {name: config[name] for name in ("num_heads", "head_dim") if config[name]}
    pipeline = load_pipeline(file, ema_std, objective=objective, **parts, **heads)
    check_settings(config, pipeline)
    guide = load_pipeline(guide_ckpt, **parts) if guide_ckpt else None
    for part in (pipeline, guide):
        for net in (part.denoiser, part.vae, part.tower) if part else ():
            if net is not None:
                net.to(device, memory_format=torch.channels_last)
                use_attention(net, attention)
        if part and dtype == "bfloat16":
            round_weights(part)
        if part and (compile.lower() == "true" or (compile == "auto" and device == "cuda" and num_samples)):
            compile_unet(part)
    drawing = dict(steps=steps, cfg=cfg, sampler=sampler, batch_size=batch_size, guide=guide)
    drawing |= dict(decode_tile=decode_tile, decode_batch=decode_batch)
    drawing |= dict(negative=negative, spacing=spacing, cfg_interval=(cfg_from, cfg_to), cfg_rescale=cfg_rescale)
    drawing |= {name: config[name] for name in SAMPLER_OPTIONS if name in config.changed}

    # many pictures
    if num_samples:
        if world > 1:
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))  # only waits for the slowest
        asked = choose_conditions(pipeline, prompt, prompts, cls)
        if pipeline.num_classes and not cls:
            asked = range(pipeline.num_classes)
        conditions = [asked[i % len(asked)] for i in range(num_samples)]

        if fid_ref:  # what cannot be compared is said before anything is drawn
            import fid

            networks = dict(inception_weights=inception_weights, trunk=trunk, trunk_weights=trunk_weights)
            height, width = latent_sides(pipeline, size)
            if height != width:
                raise ValueError(f"fid_ref compares squares, not {size}: leave size out, or give one side")
            fid.open_extractor(**networks, device=device)
            fid.open_pictures(fid_ref, "reference", width * pipeline.factor)

        def draw(rows):
            with autocast:
                some = [conditions[i] for i in rows]
                pictures = generate(pipeline, some, range(seed + rows[0], seed + rows[-1] + 1), size=size, **drawing)
            return np.stack([np.array(to_pil(picture)) for picture in pictures])

        started = time.time()
        # what makes the pictures: a run that goes on must have the same of all but these
        free = "out device fid_ref inception_weights trunk trunk_weights compile decode_batch".split()
        settings = {name: value for name, value in config.items() if name not in free} | {"dtype": dtype}
        inputs = {"checkpoint": convert.describe(file), "conditions": conditions}
        others = {"guide": guide_ckpt, "first stage": first_stage}
        inputs |= {name: convert.describe(path) if path else None for name, path in others.items()}
        settings |= {f"crc32 of {name}": zlib.crc32(json.dumps(value).encode()) for name, value in inputs.items()}
        labels = conditions if pipeline.num_classes else None
        barrier = dist.barrier if world > 1 else None
        if fid_ref and os.path.exists(out) and not os.path.isdir(f"{out}.parts"):  # drawn before, by the same command
            check_drawn(out, settings_of(out), settings)
            print(f"{out} is there already: compared as it is")
        else:
            draw_many(out, num_samples, batch_size, draw, labels, settings, rank, world, barrier)
        if rank == 0:
            print(f"{num_samples} pictures in {time.time() - started:.1f} s: {out}")
            if fid_ref:
                print(json.dumps(fid.score(out, fid_ref, image_size=0, device=device, **networks)))
        if world > 1:
            dist.destroy_process_group()
        sys.exit(0)

    # a few, to look at
    conditions, seeds, names, given = choose_pictures(pipeline, config)
    captions = [pipeline.caption(condition) for condition in conditions]
    if "strength" not in config.changed:
        strength = 0.75 if "image" in given and not (mask or invert) else 1.0
    drawing |= dict(size=size, given=given, strength=strength, batch_size=min(batch_size, len(conditions)))
    if invert:
        drawing["source"] = conditions if pipeline.text is None else [source_prompt] * len(conditions)
    frames = []
    if trajectory:
        drawing["see"] = lambda x0: frames.append(make_grid(x0, captions))
    started = time.time()
    with autocast:
        pictures = generate(pipeline, conditions, seeds, **drawing)
    seconds = time.time() - started

    # pictures and what they are
    os.makedirs(out_dir, exist_ok=True)
    with open(os.path.join(out_dir, "samples.jsonl"), "w") as f:
        for i, picture in enumerate(pictures):
            name, info = f"{i:05d}.png", PngInfo()
            record = {"file": name, "prompt": captions[i], "seed": seeds[i]}
            if names:
                record |= {"from": names[i], "strength": strength}
            info.add_text("settings", json.dumps(record | {"config": config}), zip=True)
            to_pil(picture).save(os.path.join(out_dir, name), pnginfo=info)
            f.write(json.dumps(record) + "\n")
    grid = save_grid(os.path.join(out_dir, "grid.png"), pictures[:64], captions[:64], {"config": config})
    if trajectory:
        save_gif(os.path.join(out_dir, "trajectory.gif"), frames)
    if interpolate:
        save_gif(os.path.join(out_dir, "interpolation.gif"), [to_pil(picture) for picture in pictures])
    speed = f"{len(pictures) / seconds:.2f} images/s, {generate.evaluations} network evaluations each"
    print(f"{len(pictures)} pictures in {seconds:.1f} s, {speed}: {out_dir}/grid.png")
    if show:
        grid.show()
