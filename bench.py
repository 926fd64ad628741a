"""How fast attention, training, drawing and the autoencoder are here, as one table.

    python bench.py                                          # two minutes or so on 2 CPU cores, in small shapes
    python bench.py --peer=True --rows=unet,vae              # the same work in diffusers too, in turns, and the ratio
    python bench.py --size=sd2 --rows=autoencode,forward     # the published sizes; what a GPU is measured in
    python bench.py --rows=unet --profile=trace.json         # look at it in chrome://tracing or ui.perfetto.dev

Training rows run train_ldm.train_step and train_vae.train_step themselves, with optimizer, clipping and EMA as their
loops have them, at the scripts' default settings; data are random and lie on the device. What cannot run says why.
"loop" is train_ldm.py itself in a process of its own, with data, noise, log and all; its "host" is the share of an
iteration that is more than a training step. TFLOP are the model's by formula, whatever tricks compute it; "peak" is
their share of a large matrix product's speed.
"""

import contextlib
import copy
import functools
import gc
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

import sample
import train_ldm
import train_vae
from attention import BACKENDS, attention, sdpa_runs
from configurator import configure, find_settings
from diffusion import make_schedule
from lpips_train import LPIPS, make_trunk
from unet import Denoiser, UNet
from vae import VAE, Discriminator, Posterior

# what
rows = "attention,unet,loop,forward,vae,sample,decode,autoencode"  # which groups of rows, with commas
size = "auto"  # small | sd2 (Stable Diffusion 2's U-Net and KL-f8) | auto (sd2 on CUDA, else small)
batch_size = 0  # images per call; 0 is each row's own
peer = False  # measure diffusers too
profile = ""  # write a Chrome trace of one call of the first row that runs to this .json (of "loop": of a bare step)
# how
seconds = 3.0  # of measuring per row and side, a tenth of it for attention, thrice for loop; at least 3 rounds
patience = 60.0  # rows whose single call would take longer than so many seconds are left out
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto (bfloat16 on CUDA, else float32) | float32 | bfloat16
compile = "auto"  # torch.compile, of both sides: auto (on CUDA) | true | false

STEPS = 50  # of drawing
SD2 = dict(channels=320, channel_mult=(1, 2, 4, 4), num_heads=0, head_dim=64, context_dim=1024, linear_proj=True)
KL_F8 = dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4)
SMALL = dict(channels=64, channel_mult=(1, 2, 4), num_heads=0, head_dim=32, context_dim=256, linear_proj=True)
SMALL_VAE = dict(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=4)
CLASSES = 10  # of the data made up for "loop"


class Place(NamedTuple):
    """Where and how everything runs."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, thing):
        return thing.to(self.device, memory_format=torch.channels_last)

    def randn(self, *shape):
        x = torch.randn(shape, device=self.device)
        return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


class Row(NamedTuple):
    """A line of the table: `make(theirs)` builds the work, ours or diffusers', as a function without arguments."""

    name: str
    unit: str
    items: int  # images or calls in a call of the work
    tflop: float  # of a call of the work, by formula
    make: Callable
    memory: float = 0.0  # GiB that it takes at least
    has_peer: bool = True
    script: Callable = None  # script(log_every) runs the loop of which the work is a step: see `training_script`


# --- diffusers, with the same number of parameters ---


def import_diffusers():
    try:
        import torchvision  # noqa: F401, which transformers imports, which diffusers imports
    except ImportError:
        pass
    except RuntimeError:  # built for another torch, and nothing here needs its compiled part
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    try:
        import diffusers
    except ImportError:
        raise ImportError("peer=True measures diffusers: pip install -r tests/requirements.txt") from None
    return diffusers


class TheirUNet(torch.nn.Module):
    """diffusers' U-Net of the same shape, called as ours; its attention is SDPA by default."""

    def __init__(self, s):
        super().__init__()
        with_attention = [2**i in (1, 2, 4) for i in range(len(s["channel_mult"]))]  # UNet's attention_ds
        widths = [s["channels"] * m for m in s["channel_mult"]]
        self.net = import_diffusers().UNet2DConditionModel(
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in with_attention],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(with_attention)],
            block_out_channels=widths,
            attention_head_dim=[width // s["head_dim"] for width in widths],  # their word for the number of heads
            cross_attention_dim=s["context_dim"],
            use_linear_projection=s["linear_proj"],
        )
        same_size(self, UNet, s)

    def forward(self, x, t, context):
        return self.net(x, t, context, return_dict=False)[0]


class TheirVAE(torch.nn.Module):
    """diffusers' autoencoder of the same shape, called as ours."""

    def __init__(self, s):
        super().__init__()
        widths = [s["ch"] * m for m in s["ch_mult"]]
        self.net = import_diffusers().AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            block_out_channels=widths,
            layers_per_block=s["num_res_blocks"],
            latent_channels=s["z_channels"],
        )
        self.encoder, self.decoder = self.net.encoder, self.net.decoder
        same_size(self, VAE, s)

    def encode(self, x):
        return Posterior(self.net.quant_conv(self.encoder(x)))

    def decode(self, z):
        return self.decoder(self.net.post_quant_conv(z))

    def forward(self, x, noise):
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior


def same_size(theirs, kind, settings):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in net.parameters()) for net in (theirs, kind(**settings))]
    assert counts[0] == counts[1], (
        f"diffusers' {type(theirs).__name__} has {counts[0]:,} parameters, ours {counts[1]:,}"
    )


# --- the work of each row ---


def defaults(script):
    """A training script's settings as they stand in it."""
    return {name: setting.default for name, setting in find_settings(vars(script)).items()}


def adamw(net, cfg):
    groups = [{"params": [p for p in net.parameters() if p.ndim >= 2], "weight_decay": cfg["weight_decay"]}]
    groups += [{"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-6, betas=(cfg["beta1"], cfg["beta2"]), fused=True)


def attention_call(place, backend, q_shape, kv_shape, backward, norm):
    """One call on random q, k, v, with QK-norm if `norm`, and the gradient of all if `backward`."""
    q, k, v = (
        torch.randn(shape, device=place.device, dtype=place.dtype, requires_grad=backward)
        for shape in (q_shape, kv_shape, kv_shape)
    )
    slope = torch.randn_like(q)
    weights = [torch.ones(q_shape[-1], device=place.device, requires_grad=backward) for _ in range(2)] if norm else []

    def run():
        with torch.set_grad_enabled(backward):
            out = attention(q, k, v, backend=backend, qk_norm=(*weights, 1e-6) if norm else None)
        return torch.autograd.grad(out, (q, k, v, *weights), slope) if backward else out

    return run


def unet_training(place, settings, side, count, theirs, classes=0):
    """A step of train_ldm.py with a frozen text encoder's output given, or so many classes, each told by a token."""
    cfg = defaults(train_ldm) | {"text_encoder": "openclip_h"}
    tokens = torch.nn.Embedding(classes + 1, settings["context_dim"]) if classes else None
    net = place.put(TheirUNet(settings) if theirs else Denoiser(UNet(**settings), class_tokens=tokens)).train()
    ema, optimizer = copy.deepcopy(net).requires_grad_(False), adamw(net, cfg)
    parameters, averaged = list(net.parameters()), list(ema.parameters())
    called = torch.compile(net) if place.compiled else net
    batch = {"x0": place.randn(count, 4, side, side)}
    if classes:
        batch["null_y"] = torch.full((count,), classes, device=place.device)
        batch["y"] = torch.arange(count, device=place.device) % classes
    else:
        batch["context"] = place.randn(count, 77, settings["context_dim"])
        batch["null_context"] = torch.zeros_like(batch["context"])
    noise = {"eps": place.randn(count, 4, side, side), "t": torch.rand(count, device=place.device)}
    noise["drop"] = torch.rand(count, device=place.device)

    def run():
        with place.autocast():
            terms = train_ldm.train_step({"denoiser": called}, batch, noise, cfg)
        terms["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg["grad_clip"])
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        train_ldm.update_ema(averaged, parameters, 10**6, cfg["ema_decay"])

    return run


def unet_forward(place, settings, side, count, theirs):
    net = place.put(TheirUNet(settings) if theirs else UNet(**settings)).eval()
    net = torch.compile(net) if place.compiled else net
    x, context = place.randn(count, 4, side, side), place.randn(count, 77, settings["context_dim"])
    t = torch.full((count,), 500.0, device=place.device)

    @torch.no_grad()
    def run():
        with place.autocast():
            return net(x, t, context)

    return run


def vae_training(place, settings, side, count, theirs):
    """A step of train_vae.py that sees LPIPS and the discriminator; LPIPS of random weights costs what others do."""
    cfg = defaults(train_vae)
    net = place.put(TheirVAE(settings) if theirs else VAE(**settings)).train()
    disc, lpips = place.put(Discriminator(cfg["disc_layers"], cfg["disc_norm"])), place.put(random_lpips())
    ema, optimizer, disc_optimizer = copy.deepcopy(net).requires_grad_(False), adamw(net, cfg), adamw(disc, cfg)
    parameters, averaged = list(net.parameters()), list(ema.parameters())
    if place.compiled:
        net.encoder.compile()
        if theirs:
            net.decoder.compile()
        else:
            net.decoder.features = torch.compile(net.decoder.features)
    factor = 2 ** (len(settings["ch_mult"]) - 1)
    batch = {"image": place.randn(count, 3, side, side).clamp(-1, 1)}
    noise = {"posterior": torch.randn(count, settings["z_channels"], side // factor, side // factor).to(place.device)}
    state, last_layer = {"adaptive": torch.zeros((), device=place.device)}, net.decoder.conv_out.weight

    def run():
        with place.autocast():
            models = {"vae": net, "lpips": lpips, "disc": disc}
            got = train_vae.train_step(models, batch, noise, cfg, cfg["disc_weight"] * state["adaptive"])
        both = [torch.autograd.grad(got[name], last_layer, retain_graph=True)[0] for name in ("nll", "gan")]
        got["loss"].backward()
        got["disc_loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg["grad_clip"])
        for one in (optimizer, disc_optimizer):
            one.found_inf = (~torch.isfinite(norm)).float()
            one.step()
            one.zero_grad(set_to_none=True)
        state["adaptive"] = train_vae.adaptive_ratio(torch.stack(both), cfg)
        train_vae.update_ema(averaged, parameters, 10**6, cfg["ema_decay"])

    return run


def random_lpips():
    """LPIPS by VGG16 with random weights: it costs what the published ones cost."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(make_trunk("vgg").state_dict(), f"{folder}/trunk.pth")
        return LPIPS("vgg", f"{folder}/trunk.pth", "uniform")


class Words(torch.nn.Module):
    """In the place of a text encoder: the same random context for all prompts, at no cost."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("context", torch.randn(1, 77, width))

    def tokenize(self, prompts):
        return torch.zeros(len(prompts), 77, dtype=torch.long)

    def forward(self, tokens):
        return self.context.expand(len(tokens), -1, -1)


def sampling(place, settings, vae_settings, side, steps, count, theirs):
    """Guided DDIM and decoding: sample.generate, or what diffusers' pipeline does after its text encoder."""
    unet = place.put(TheirUNet(settings) if theirs else UNet(**settings)).eval()
    vae = place.put(TheirVAE(vae_settings) if theirs else VAE(**vae_settings)).eval()
    words = Words(settings["context_dim"]).to(place.device)
    if not theirs:
        vae.latent_mean.zero_()
        vae.latent_std.fill_(1.0)
        process, shape = make_schedule("scaled_linear"), (4, side, side)
        pipeline = sample.Pipeline(Denoiser(unet), vae, process, "eps", shape, 0, [], [], tower=words)
        if place.dtype == torch.bfloat16:
            sample.round_weights(pipeline)
        if place.compiled:
            sample.compile_unet(pipeline)

        def run():
            with place.autocast():
                return sample.generate(pipeline, [""] * count, range(count), steps, 7.5, "ddim", batch_size=count)

        return run
    scheduler = import_diffusers().DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    unet, vae = unet.to(place.dtype), vae.to(place.dtype)  # as its users do, instead of autocast
    network = torch.compile(unet, mode="reduce-overhead") if place.compiled else unet
    decode = torch.compile(vae.decode) if place.compiled else vae.decode

    @torch.no_grad()
    def run_theirs():
        context = words(words.tokenize([""] * (2 * count))).to(place.dtype)
        x = place.randn(count, 4, side, side).to(place.dtype)
        scheduler.set_timesteps(steps, device=place.device)
        for t in scheduler.timesteps:
            null, cond = network(torch.cat([x, x]), t, context).chunk(2)
            x = scheduler.step(null + 7.5 * (cond - null), t, x).prev_sample
        return decode(x).float().cpu().clamp(-1, 1)

    return run_theirs


def autoencoding(place, settings, side, encode, count, theirs):
    """Latents to pictures, and with `encode` from pictures to latents before that."""
    vae = place.put(TheirVAE(settings) if theirs else VAE(**settings)).eval()
    factor = 2 ** (len(settings["ch_mult"]) - 1)
    x = place.randn(count, 3, side, side) if encode else place.randn(count, 4, side // factor, side // factor)
    if place.compiled:
        vae.encoder.compile()
        vae.decoder.compile()

    @torch.no_grad()
    def run():
        with place.autocast():
            return vae.decode(vae.encode(x).mode() if encode else x)

    return run


# --- train_ldm.py's own loop ---


def loop_arguments(place, settings, side, count):
    """What makes train_ldm.py train the network of unet_training(..., classes), on the data of `make_up`."""
    given = {name: value for name, value in settings.items() if name != "context_dim"}
    given |= dict(cond="class", class_embed="token", text_width=settings["context_dim"])
    given |= dict(dataset="data", first_stage="vae.safetensors", image_size=side, batch_size=count)
    given |= dict(device=place.device.type, dtype=str(place.dtype).removeprefix("torch."), compile=place.compiled)
    given |= dict(out_dir="out", eval_every=10**9, save_every=10**9, max_steps=10**9)  # it is killed long before
    shown = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in given.items()}
    return [f"--{name}={value}" for name, value in shown.items()]


def make_up(folder, factor, side, count):
    """What a user of train_ldm.py has: labelled pictures and an autoencoder with latent statistics, here all random."""
    os.mkdir(f"{folder}/data")
    np.save(f"{folder}/data/images.npy", torch.randint(256, (count, side, side, 3), dtype=torch.uint8).numpy())
    np.save(f"{folder}/data/labels.npy", np.arange(count) % CLASSES)
    levels = factor.bit_length()  # the latents' size counts, not what makes them
    vae = VAE(ch=32, ch_mult=(1,) * levels, num_res_blocks=1, z_channels=4, mid_attention=False)
    vae.latent_mean.zero_()
    vae.latent_std.fill_(1.0)
    about = {"format": 1, "stage": "vae", "model": vae.settings}
    train_vae.save_checkpoint(f"{folder}/vae.safetensors", train_vae.with_prefix("ema", vae.state_dict()), about)


@contextlib.contextmanager
def training_script(place, settings, factor, side, count, log_every):
    """train_ldm.py as its users run it; gives next_ms() -> (milliseconds of an iteration, peak memory in GiB).

    It stands still but for that call, which lets it finish the steps of the progress line that it was stopped in, and
    then those of another, whose speed its log tells. In the end it is killed and has saved nothing. ChildProcessError
    with its last words if it ends before.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, f"{here}/train_ldm.py", *loop_arguments(place, settings, side, count)]
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/errors", "w") as errors:
        make_up(folder, factor, side, max(2 * CLASSES, 4 * count))
        process = subprocess.Popen(
            [*command, f"--log_every={log_every}", "--cache_dir=cache"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"TMPDIR": folder},  # a data worker that is killed leaves a folder there
            process_group=0,  # its data workers stop, go on and end with it
        )

        def records():
            with contextlib.suppress(FileNotFoundError), open(f"{folder}/out/log.jsonl") as f:
                return f.readlines()
            return []

        def next_ms():
            due = len(records()) + 2
            os.killpg(process.pid, signal.SIGCONT)
            while len(records()) < due:
                if not any(text.startswith("step ") for text in process.stdout):  # waits for the next one
                    process.wait()
                    with open(f"{folder}/errors") as f:
                        words = f.read().strip().split("\n")[-1]
                    raise ChildProcessError(words or f"train_ldm.py ended with status {process.returncode}")
            os.killpg(process.pid, signal.SIGSTOP)
            record = json.loads(records()[due - 1])
            memory = record["memory_gb"] or resident_peak(process.pid)
            return 1e3 * count / record["images_per_s"], memory

        try:
            yield next_ms
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of one that ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def beside_script(run, place, script, limit):
    """(ms of the script's iterations, ms of `run` before and after each, the script's peak GiB) of `limit` seconds."""
    # short turns, but two steps to a line of the log: a stop on a line's arrival then lies in the steps of the next one
    times = max(2, math.ceil(min(600, 30 * limit) / clock(run, place)))

    def bare():
        run()  # to find its caches again, for which the script has a step or more too
        return clock(run, place, times)

    with script(times) as next_ms:
        next_ms()  # compiles, tunes, fills the workers' queues
        loop, steps, before, start = [], [], bare(), time.perf_counter()
        while len(loop) < 3 or time.perf_counter() - start < limit:
            ms, memory = next_ms()
            after = bare()
            loop.append(ms)
            steps.append((before + after) / 2)  # a machine that slows down or recovers does so for both
            before = after
    return loop, steps, memory


def busy_ms(events):
    """Milliseconds in which a GPU does anything, of a profile's events; what runs at the same time counts once."""
    spans = [e.time_range for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    total, until = 0.0, -math.inf
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total / 1e3


def gpu_busy(run, times=5):
    """Milliseconds in which the GPU is busy with one call of `run`; 0 where the profiler sees no kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    return busy_ms(trace.events()) / times


# --- the rows ---


def forward_tflop(net, *shapes):
    """TFLOP of net(*inputs), a module on the meta device and inputs of these shapes."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*(torch.zeros(shape, device="meta") for shape in shapes))
    return counter.get_total_flops() / 1e12


def attention_rows(small, place, count):
    """Every back end, forward and with backward, at the shapes of SD 2 and SD 1, with 77 keys and with QK-norm."""
    shapes = [(L, L, heads, 64, False) for L, heads in ((4096, 5), (1024, 10), (256, 20), (64, 20))]
    shapes += [(L, L, 8, d, False) for L, d in ((4096, 40), (1024, 80), (256, 160))]
    shapes += [(L, 77, heads, 64, False) for L, heads in ((4096, 5), (1024, 10), (256, 20), (64, 20))]
    shapes += [(1024, 1024, 10, 64, True), (1024, 77, 10, 64, True)]
    B = count or (1 if small else 16)
    for L, M, heads, d, norm in shapes:
        if small:
            L, M = L // 4, L // 4 if M == L else M
        about = f"{B}x{L}" + (f" to {M} keys" if M != L else "") + f", {heads} heads of {d}" + ", QK-norm" * norm
        for backward in (False, True):
            tflop = 4e-12 * B * heads * L * M * d * (3.5 if backward else 1)  # backward: five products, forward: two
            for backend in BACKENDS:
                work = (place, backend, (B, L, heads, d), (B, M, heads, d), backward, norm)
                label = backend
                if backend == "sdpa":  # which of its ways it takes
                    q, k = (torch.empty(shape, device=place.device, dtype=place.dtype) for shape in work[2:4])
                    label += f" ({sdpa_runs(q.requires_grad_(backward), k, k).removeprefix('sdpa_')})"
                name = f"attention {label}, {about}, {'with' if backward else 'no'} backward"
                yield Row(name, "calls", 1, tflop, lambda theirs, work=work: attention_call(*work), has_peer=False)


def model_rows(group, small, place, count):
    """The rows of one of the groups unet, loop, forward, vae, sample, decode, autoencode."""
    unet, vae = (SMALL, SMALL_VAE) if small else (SD2, KL_F8)
    name, vae_name = ("small U-Net", "small f4 VAE") if small else ("SD2-size U-Net", "KL-f8")
    factor = 2 ** (len(vae["ch_mult"]) - 1)
    on_gpu = place.device.type == "cuda"
    with torch.device("meta"):
        denoiser, autoencoder = Denoiser(UNet(**unet)), VAE(**vae)

    def one(title, side, B, tflop, function, *args, memory=0.0):
        make = functools.partial(function, place, *args, B)
        return Row(f"{title}, {side} px, batch {B}", "images", B, B * tflop, make, memory)

    def latents(side):
        return (4, side // factor, side // factor)

    def unet_tflop(side):
        return train_ldm.count_tflop(denoiser, latents(side)) / 3

    def decode_tflop(side):
        return forward_tflop(autoencoder.decoder, (1, *latents(side)))

    low, high = (64, 128) if small else (256, 512)
    few, usual_counts = count or (8 if on_gpu and not small else 1), (4, 2) if small else (64, 32) if on_gpu else (1, 1)
    memory = 20 * sum(p.numel() for p in denoiser.parameters()) / 2**30  # weights, gradient, two moments, EMA
    if group == "unet":
        for side, usual in zip((low, high), usual_counts):
            args = (count or usual, 3 * unet_tflop(side), unet_training, unet, side // factor)
            yield one(f"{name} training step", side, *args, memory=memory)
    elif group == "loop":
        B, width = count or usual_counts[0], unet["context_dim"]
        with torch.device("meta"):
            denoiser.class_tokens = torch.nn.Embedding(CLASSES + 1, width)
        tflop = B * train_ldm.count_tflop(denoiser, latents(low))
        make = functools.partial(unet_training, place, unet, low // factor, B, classes=CLASSES)
        script = functools.partial(training_script, place, unet, factor, low, B)
        title = f"train_ldm.py itself, {name}, classes, cached latents, {low} px, batch {B}"
        yield Row(title, "images", B, tflop, make, 2 * memory, has_peer=False, script=script)
    elif group == "forward":
        yield one(f"{name} forward", low, count or 1, unet_tflop(low), unet_forward, unet, low // factor)
    elif group == "vae":
        tflop = train_vae.count_tflop(autoencoder, defaults(train_vae) | {"image_size": low})
        B = count or (2 if small else 12 if on_gpu else 1)
        yield one(f"{vae_name} training step with LPIPS (random VGG) and GAN", low, B, tflop, vae_training, vae, low)
    elif group == "sample":
        side = low if small else high
        tflop = 2 * STEPS * unet_tflop(side) + decode_tflop(side)
        title = f"drawing with {name}, {STEPS} guided DDIM steps and decoding"
        yield one(title, side, few, tflop, sampling, unet, vae, side // factor, STEPS)
    elif group == "decode":
        yield one(f"{vae_name} decode", high, few, decode_tflop(high), autoencoding, vae, high, False)
    else:
        tflop = decode_tflop(low) + forward_tflop(autoencoder.encoder, (1, 3, low, low))
        yield one(f"{vae_name} encode and decode", low, few, tflop, autoencoding, vae, low, True)


# --- measuring ---


def clock(run, place, times=1):
    """Milliseconds of one of `times` calls."""
    if place.device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            run()
        return 1e3 * (time.perf_counter() - start) / times
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def resident_peak(process):
    """GiB, or None where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration), open(f"/proc/{process}/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2**20


def warm_up(run, place):
    """Lets it compile, tune and allocate; gives its peak memory in GiB."""
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the high-water mark of resident memory begins anew
    run()
    if place.device.type == "cuda":
        for _ in range(3):
            run()
        return torch.cuda.max_memory_allocated() / 2**30
    return resident_peak("self")


def take_turns(runs, place, limit):
    """Milliseconds of each round of each of `runs`, in turns until `limit` seconds are over, three rounds at least."""
    first, start = [clock(run, place) for run in runs], time.perf_counter()
    times = [max(1, math.ceil(10 / max(ms, 1e-3))) for ms in first]  # rounds of 10 ms and more
    rounds = [[ms] if n == 1 else [] for n, ms in zip(times, first)]
    while min(map(len, rounds)) < 3 or time.perf_counter() - start < limit:
        for run, n, found in zip(runs, times, rounds):
            found.append(clock(run, place, n))
    return rounds


def matmul_peak(place):
    """TFLOP/s of a large matrix product in the type that everything runs in: the best of ten."""
    n = 8192 if place.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=place.device, dtype=place.dtype) for _ in range(2))
    clock(lambda: a @ b, place)
    return 2e-9 * n**3 / min(clock(lambda: a @ b, place) for _ in range(10))


def free_memory(place):
    """GiB."""
    if place.device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("MemAvailable")) / 2**20
    return math.inf  # not told by this system


def measure(row, place, peak, config):
    """A dict of what the table has of a row: ms (median), least, speed, tflops, share, memory, ratio; or why not.

    Of a script's loop also host, the share of its ms that is not busy: how long the GPU works on a bare step, on a CPU
    how long that step takes.
    """
    expected = row.tflop / peak
    if expected > config["patience"]:
        return {"why": f"about {expected:.0f} s a call, see patience"}
    peer, is_model = config["peer"] and row.has_peer, row.has_peer or row.script is not None
    needed = row.memory * (2 if peer else 1)
    if needed > free_memory(place):
        return {"why": f"needs {needed:.0f} GiB, {free_memory(place):.0f} are free"}
    runs, busy = [], None
    try:
        torch.manual_seed(0)
        runs.append(row.make(False))
        memory = warm_up(runs[0], place)
        if peer:
            runs.append(row.make(True))
            warm_up(runs[1], place)
        if row.script:
            *rounds, memory = beside_script(runs[0], place, row.script, 6 * config["seconds"])
            busy = gpu_busy(runs[0]) if place.device.type == "cuda" else 0.0
        else:
            rounds = take_turns(runs, place, config["seconds"] * len(runs) / (1 if is_model else 10))
    except torch.OutOfMemoryError:
        return {"why": "memory does not hold it: set a smaller batch_size"}
    except ChildProcessError as e:  # the script's last words
        return {"why": str(e)}
    except Exception as e:
        if is_model:  # a fault of a model; a back end that does not run here is none
            raise
        return {"why": str(e).strip().split("\n")[0][:90]}
    ms = statistics.median(rounds[0])
    found = {"ms": ms, "least": min(rounds[0]), "speed": 1e3 * row.items / ms, "memory": memory}
    found |= {"tflops": 1e3 * row.tflop / ms, "share": 1e3 * row.tflop / ms / peak, "run": runs[0]}
    if peer:
        found["ratio"] = statistics.median(rounds[1]) / ms
    if row.script:
        steps = [busy] * len(rounds[0]) if busy else rounds[1]
        found["host"] = statistics.median(1 - step / loop for loop, step in zip(rounds[0], steps))
        found |= {"busy": statistics.median(steps), "beside": "GPU busy" if busy else "bare step"}
    return found


def line(row, found):
    if "why" in found:
        return f"{row.name:<92} not measured here: {found['why']}"
    memory = "" if found["memory"] is None else f"{found['memory']:.2f}"
    text = f"{row.name:<92} {found['ms']:>9.2f} {found['least']:>9.2f} {found['speed']:>9.4g} {row.unit + '/s':<8}"
    text += f" {found['tflops']:>8.3g} {found['share']:>6.1%} {memory:>7}"
    if "host" in found:
        text += f"  host {found['host']:.1%} ({found['beside']} {found['busy']:.2f} ms)"
    return text + (f" {found['ratio']:>7.2f}x" if "ratio" in found else "")


def table(config):
    """Measures and prints; gives [(Row, what `measure` found), ...]."""
    groups = [group.strip() for group in config["rows"].split(",")]
    known = ("attention", "unet", "loop", "forward", "vae", "sample", "decode", "autoencode")
    for name, values, choices in (
        ("rows", groups, known),
        ("size", [config["size"]], ("auto", "small", "sd2")),
        ("device", [config["device"]], ("auto", "cpu", "cuda")),
        ("dtype", [config["dtype"]], ("auto", "float32", "bfloat16")),
        ("compile", [config["compile"].lower()], ("auto", "true", "false")),
    ):
        for value in values:
            if value not in choices:
                raise ValueError(f"{name}={value} is not one of {', '.join(choices)}")
    for name in ("batch_size", "seconds", "patience"):
        if not config[name] >= 0:
            raise ValueError(f"{name}={config[name]} is not 0 or more")
    if config["profile"] and not os.path.isdir(os.path.dirname(config["profile"]) or "."):
        raise ValueError(f"profile={config['profile']}: there is no such folder, make it first")
    if config["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU here: mend its installation, or set device=cpu")
    if config["peer"]:
        import_diffusers()
    on_gpu = torch.cuda.is_available() and config["device"] != "cpu"
    kind = {"auto": "bfloat16" if on_gpu else "float32"}.get(config["dtype"], config["dtype"])
    compiled = config["compile"].lower() == "true" or (config["compile"].lower() == "auto" and on_gpu)
    place = Place(torch.device("cuda" if on_gpu else "cpu"), getattr(torch, kind), compiled)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as the training scripts have it
    torch.backends.cudnn.benchmark = True
    small = config["size"] == "small" or (config["size"] == "auto" and not on_gpu)
    peak = matmul_peak(place)
    head = f"{'':<92} {'ms':>9} {'least':>9} {'speed':>9} {'':<8} {'TFLOP/s':>8} {'peak':>6} {'GiB':>7}"
    head += "  theirs / ours" * config["peer"]
    head += "  host: share of an iteration that is not the step" * ("loop" in groups)
    print(head, flush=True)
    results = []
    for group in groups:
        make_rows = attention_rows if group == "attention" else functools.partial(model_rows, group)
        for row in make_rows(small, place, config["batch_size"]):
            found = measure(row, place, peak, config)
            print(line(row, found), flush=True)
            run = found.pop("run", None)
            results.append((row, found))
            if config["profile"] and run and not os.path.exists(config["profile"]):
                with torch.profiler.profile() as trace:
                    run()
                trace.export_chrome_trace(config["profile"])
                print(f"trace of one call: {config['profile']}")
            run = None
            if group != "attention":  # compiled modules refer to themselves: the next row needs their memory
                torch.compiler.reset()
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
    if config["profile"] and not os.path.exists(config["profile"]):
        print(f"no trace in {config['profile']}: no row ran")
    hardware = torch.cuda.get_device_name() if on_gpu else f"{cpu_name()}, {torch.get_num_threads()} threads"
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run("git describe --always --dirty", shell=True, capture_output=True, text=True, cwd=here)
    peer = f", diffusers {import_diffusers().__version__}" if config["peer"] else ""
    print(
        f"{hardware}; peak {peak:.4g} TFLOP/s of {kind} products; torch {torch.__version__}{peer}; compiled: {compiled}"
    )
    print(f"git {git.stdout.strip() or 'unknown'}: python {' '.join(sys.argv)}")
    return results


def cpu_name():
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as f:
        return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    return platform.processor() or "CPU"


if __name__ == "__main__":
    config = configure(globals())
    sys.excepthook = sample.one_line_error
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and so ends what "loop" has begun
    if profile and os.path.exists(profile):
        raise ValueError(f"profile={profile} is there already: remove it, or choose another name")
    table(config)
