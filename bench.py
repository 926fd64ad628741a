"""Measure the speed of attention, the U-Net, the autoencoder and training on this machine, as one table.

    python bench.py                                          # some minutes on 2 CPU cores, in small shapes
    python bench.py --rows=unet,forward --peer               # the same work in diffusers too, and the ratio of times
    python bench.py --size=sd2 --rows=autoencode,forward     # the published sizes; the default on a GPU
    python bench.py --rows=unet --profile=trace.json         # a trace for chrome://tracing or ui.perfetto.dev

"unet" and "vae" take the training step of train_ldm.py and train_vae.py, with optimizer, clipping and EMA, at the
scripts' default settings on random data. "loop" is train_ldm.py itself, with data and log, beside the bare step. TFLOP
are those of the operators that run; "of matmul" compares TFLOP/s to those of a large matrix product.
"""

import contextlib
import copy
import functools
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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import common
import train_ldm
import train_vae
from attention import BACKENDS, attention, unavailable
from configurator import as_text, configure, find_settings, make_config
from lpips_train import LPIPS, make_trunk
from unet import Denoiser, UNet
from vae import VAE, Discriminator, Posterior

# what is measured
rows = ("all",)  # each all | attention | unet | forward | vae | autoencode | loop: groups of rows
size = "auto"  # auto | small | sd2: Stable Diffusion 2's U-Net and KL-f8 or small ones; auto is sd2 on CUDA
batch_size = 0  # >= 0: images per call; 0 is each row's own
peer = False  # measure diffusers too
profile = ""  # file (.json) for a Chrome trace of one call of the first row
# how
seconds = 3.0  # >= 0: time for each row and side, at least 3 rounds; a tenth for attention
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto | float32 | bfloat16: auto is bfloat16 on CUDA, else float32
compile = "auto"  # auto | true | false: torch.compile for both sides; auto on CUDA

ROOT = Path(__file__).resolve().parent
GROUPS = ("attention", "unet", "forward", "vae", "autoencode", "loop")
SD2 = dict(channels=320, channel_mult=(1, 2, 4, 4), num_heads=0, head_dim=64, context_dim=1024, linear_proj=True)
KL_F8 = dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4)
SMALL = dict(channels=64, channel_mult=(1, 2, 4), num_heads=0, head_dim=32, context_dim=256, linear_proj=True)
SMALL_VAE = dict(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=4)


class Bench(NamedTuple):
    """Where and how everything runs; the models' settings."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool
    unet: dict
    vae: dict

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, thing):
        return thing.to(self.device, memory_format=torch.channels_last)

    def images(self, count, side):
        return self.put(torch.randn(count, 3, side, side))

    def latents(self, count, side):
        """Random latents of images of this side."""
        side //= 2 ** (len(self.vae["ch_mult"]) - 1)
        return self.put(torch.randn(count, 4, side, side))

    def context(self, count):
        """Random embeddings of prompts."""
        return torch.randn(count, 77, self.unet["context_dim"], device=self.device)

    def wait(self):
        getattr(torch, self.device.type).synchronize()


class Row(NamedTuple):
    name: str
    images: int  # of a call
    make: Callable  # make(peer) -> the work as a function without arguments
    tflop: float = 0.0  # of a call of attention, which has no peer; 0 counts


# --- diffusers, with the same number of parameters ---


@functools.cache
def import_diffusers():
    try:
        import torchvision  # noqa: F401, which diffusers imports by way of transformers
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch; its operators are not needed
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import diffusers

    return diffusers


class PeerUNet(torch.nn.Module):
    """diffusers' U-Net of the same shape, called as ours; its attention is SDPA by default."""

    def __init__(self, s):
        super().__init__()
        attends = [2**i in (1, 2, 4) for i in range(len(s["channel_mult"]))]  # UNet's attention_ds
        widths = [s["channels"] * m for m in s["channel_mult"]]
        self.net = import_diffusers().UNet2DConditionModel(
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            block_out_channels=widths,
            attention_head_dim=[width // s["head_dim"] for width in widths],  # its name for the number of heads
            cross_attention_dim=s["context_dim"],
            use_linear_projection=s["linear_proj"],
        )

    def forward(self, x, t, context):
        return self.net(x, t, context, return_dict=False)[0]


class PeerVAE(torch.nn.Module):
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

    def encode(self, x):
        return Posterior(self.net.quant_conv(self.encoder(x)))

    def decode(self, z):
        return self.decoder(self.net.post_quant_conv(z))

    def forward(self, x, noise):
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior


# --- the work of a row: make(bench, side, count, peer) -> a function without arguments ---


def defaults(script):
    """A training script's settings."""
    return make_config(find_settings(vars(script)), {})


class Training:
    """A network in training as in the scripts, with AdamW and averaged weights."""

    def __init__(self, net, cfg):
        self.cfg, self.parameters = cfg, list(net.parameters())
        self.averaged = list(copy.deepcopy(net).requires_grad_(False).parameters())
        self.optimizers = [adamw(net, cfg)]

    def step(self, terms, update_ema):
        """What follows the backward pass."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.grad_clip)
        ok = common.all_finite(norm, *terms.values())
        for optimizer in self.optimizers:
            optimizer.found_inf = (~ok).float()
            optimizer.step()
            optimizer.zero_grad()
        update_ema(self.averaged, self.parameters, self.cfg.ema_decay, ok)
        return ok


def adamw(net, cfg):
    return torch.optim.AdamW(net.parameters(), lr=1e-6, betas=(cfg.beta1, cfg.beta2), fused=True)


def attention_call(bench, backend, q_shape, kv_shape, backward, peer):
    """One call of a backend, with the gradients of q, k and v if `backward`."""
    options = dict(device=bench.device, dtype=bench.dtype, requires_grad=backward)
    q, k, v = (torch.randn(shape, **options) for shape in (q_shape, kv_shape, kv_shape))
    slope = torch.randn_like(q)

    def run():
        with torch.set_grad_enabled(backward):
            out = attention(q, k, v, backend=backend)
        return torch.autograd.grad(out, (q, k, v), slope) if backward else out

    return run


def unet_training(bench, side, count, peer):
    """A step of train_ldm.py, with text embeddings if the U-Net has a context."""
    cfg = defaults(train_ldm)
    net = bench.put(PeerUNet(bench.unet) if peer else Denoiser(UNet(**bench.unet))).train()
    training, called = Training(net, cfg), torch.compile(net) if bench.compiled else net
    inputs = {"x0": bench.latents(count, side), "condition": {}, "null": {}}
    if bench.unet["context_dim"]:
        inputs |= {"condition": {"context": bench.context(count)}, "null": {"context": 0 * bench.context(1)}}
    noise = {"eps": torch.randn_like(inputs["x0"])}
    noise |= {name: torch.rand(count, device=bench.device) for name in ("t", "drop")}

    def run():
        with bench.autocast():
            terms = train_ldm.train_step(called, inputs, noise, cfg)
        terms["loss"].backward()
        training.step(terms, train_ldm.update_ema)

    return run


def vae_training(bench, side, count, peer):
    """A step of train_vae.py with LPIPS and the discriminator."""
    cfg = defaults(train_vae)
    net = bench.put(PeerVAE(bench.vae) if peer else VAE(**bench.vae)).train()
    disc, lpips = bench.put(Discriminator(cfg.disc_layers, cfg.disc_norm)), bench.put(random_lpips())
    training = Training(net, cfg)
    training.optimizers.append(adamw(disc, cfg))
    if bench.compiled:
        net.encoder.compile()
        if peer:
            net.decoder.compile()
        else:  # all but the last layer, as in train_vae.py
            net.decoder.features = torch.compile(net.decoder.features)
    batch, noise = {"image": bench.images(count, side).clamp(-1, 1)}, {"noise": bench.latents(count, side)}
    adaptive, last_layer = torch.zeros((), device=bench.device), net.decoder.conv_out.weight

    def run():
        with bench.autocast():
            terms, _ = train_vae.train_step(net, batch, noise, cfg, lpips, disc, cfg.disc_weight * adaptive)
        both = [torch.autograd.grad(terms[name], last_layer, retain_graph=True)[0] for name in ("nll", "gan")]
        terms["loss"].backward()
        terms["disc_loss"].backward()
        ok = training.step(terms, train_vae.update_ema)
        adaptive.copy_(torch.where(ok, train_vae.adaptive_ratio(torch.stack(both), cfg), adaptive))

    return run


def random_lpips(net="vgg"):
    """LPIPS with random weights, which is as fast as with the published ones."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(make_trunk(net).state_dict(), f"{folder}/trunk.pth")
        return LPIPS(net, f"{folder}/trunk.pth", "uniform")


def unet_forward(bench, side, count, peer):
    net = bench.put(PeerUNet(bench.unet) if peer else UNet(**bench.unet)).eval()
    net = torch.compile(net) if bench.compiled else net
    x, context = bench.latents(count, side), bench.context(count)
    t = torch.full((count,), 500.0, device=bench.device)

    @torch.no_grad()
    def run():
        with bench.autocast():
            return net(x, t, context)

    return run


def autoencoding(bench, side, count, peer):
    """Images to latents and back."""
    vae, x = bench.put(PeerVAE(bench.vae) if peer else VAE(**bench.vae)).eval(), bench.images(count, side)
    if bench.compiled:
        vae.encoder.compile()
        vae.decoder.compile()

    @torch.no_grad()
    def run():
        with bench.autocast():
            return vae.decode(vae.encode(x).mode())

    return run


# --- train_ldm.py's own loop ---


def loop_arguments(bench, side, count):
    """Arguments with which train_ldm.py trains the network of unet_training."""
    values = {name: value for name, value in bench.unet.items() if name != "context_dim"} | dict(cond="none")
    values |= dict(dataset="data", first_stage="vae.safetensors", image_size=side, batch_size=count)
    values |= dict(device=bench.device.type, dtype=str(bench.dtype).removeprefix("torch."), compile=bench.compiled)
    values |= dict(out_dir="out", cache_dir="cache", eval_every=10**9, save_every=10**9, max_steps=10**9)
    return [f"--{name}={as_text(value)}" for name, value in values.items()]


def training_script(bench, side, count, steps):
    """Milliseconds of a step of train_ldm.py on random images, the median of three log lines, each of so many steps."""
    command = [sys.executable, str(ROOT / "train_ldm.py"), *loop_arguments(bench, side, count), f"--log_every={steps}"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").mkdir()
        images = np.random.randint(256, size=(max(32, 4 * count), side, side, 3), dtype=np.uint8)
        np.save(f"{folder}/data/images.npy", images)
        vae = VAE(**bench.vae)
        vae.latent_mean.zero_()
        vae.latent_std.fill_(1.0)
        meta = {"stage": "vae", "model": vae.settings}
        checkpoint.write(f"{folder}/vae.safetensors", checkpoint.with_prefix("ema", vae.state_dict()), meta)
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        environment = os.environ | {"TMPDIR": folder}  # for what a killed data worker leaves
        process, logged = subprocess.Popen(command, cwd=folder, env=environment, **options), 0
        try:
            for line in process.stdout:
                logged += line.startswith("step ")
                if logged == 4:
                    break
            else:
                raise RuntimeError(line.strip())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its data workers
            process.wait()
        records = common.read_log(f"{folder}/out")
    return 1e3 * count / statistics.median(record["images_per_s"] for record in records[1:4])


# --- the rows ---


def attention_rows(bench, small, count):
    """Every backend, forward and with backward, at the shapes of SD 2 and SD 1 and for 77 keys."""
    shapes = [(L, L, heads, 64) for L, heads in ((4096, 5), (1024, 10), (256, 20), (64, 20))]
    shapes += [(L, L, 8, dim) for L, dim in ((4096, 40), (1024, 80), (256, 160))]
    shapes += [(L, 77, heads, 64) for L, heads in ((4096, 5), (1024, 10), (256, 20), (64, 20))]
    B, backends = count or (1 if small else 16), []
    for backend in BACKENDS[1:]:  # without auto
        if reason := unavailable(backend, bench.device, bench.dtype):
            print(f"| attention {backend}: {reason} |")
        else:
            backends.append(backend)
    for L, M, heads, dim in shapes:
        if small:
            L, M = L // 4, M if M == 77 else M // 4
        for backward in (False, True):
            work = 4e-12 * B * heads * L * M * dim * (3.5 if backward else 1)  # products: forward 2, backward 5
            about = f"{B}x{L} to {M} keys, {heads} heads of {dim}, {'with' if backward else 'no'} backward"
            for backend in backends:
                call = (bench, backend, (B, L, heads, dim), (B, M, heads, dim), backward)
                make = functools.partial(attention_call, *call)
                yield Row(f"attention {backend}, {about}", B, make, tflop=work)


def model_rows(group, bench, small, count):
    """The rows of a group other than "attention"."""
    on_gpu = bench.device.type == "cuda"
    many = 8 if on_gpu else 1
    unet, vae, low, high = ("small U-Net", "small f4 VAE", 64, 128) if small else ("SD2-size U-Net", "KL-f8", 256, 512)
    train, step = f"{unet} training step", 4 if small else 8 * many
    works = {  # title, work, side, images of a call
        "unet": [(train, unet_training, low, step), (train, unet_training, high, step // 2)],
        "forward": [(f"{unet} forward", unet_forward, low, 1)],
        "vae": [(f"{vae} training step with LPIPS and GAN", vae_training, low, 12 if on_gpu else 1)],
        "autoencode": [(f"{vae} encode and decode", autoencoding, side, many) for side in (low, high)],
        "loop": [(f"{train} without text", unet_training, low, step)],
    }
    for title, work, side, n in works[group]:
        n = count or n
        yield Row(f"{title}, {side} px, batch {n}", n, functools.partial(work, bench, side, n))


# --- measuring ---


def clock(run, bench, times=1):
    """Milliseconds of one of `times` calls."""
    bench.wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    bench.wait()
    return 1e3 * (time.perf_counter() - start) / times


def take_turns(runs, bench, limit):
    """Milliseconds of the rounds of each of `runs`, in turns: for `limit` seconds, at least three rounds."""
    for run in runs:  # compile, tune, allocate
        for _ in range(3 if bench.device.type == "cuda" else 1):
            run()
    times = [max(1, math.ceil(10 / max(clock(run, bench), 1e-3))) for run in runs]  # rounds of 10 ms and more
    rounds, start = [[] for _ in runs], time.perf_counter()
    while len(rounds[0]) < 3 or time.perf_counter() - start < limit:
        for run, n, found in zip(runs, times, rounds):
            found.append(clock(run, bench, n))
    return rounds


def matmul_tflops(bench):
    """TFLOP/s of a large matrix product: the best of ten."""
    n = 8192 if bench.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=bench.device, dtype=bench.dtype) for _ in range(2))
    return 2e-9 * n**3 / min(clock(lambda: a @ b, bench) for _ in range(11))


def count_tflop(run):
    """TFLOP of the operators of one call, uncompiled; with attention as products, which are counted on every device."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.compiler.set_stance("force_eager"):
            run()
    return counter.get_total_flops() / 1e12


def measure(row, bench, cfg, peak):
    """(cells of the row's line, the work, or None where it cannot run here)."""
    peer, on_gpu = cfg.peer and not row.tflop, bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    try:
        runs = [row.make(peer=side) for side in (False, True)[: 1 + peer]]
        rounds = take_turns(runs, bench, cfg.seconds * len(runs) / (10 if row.tflop else 1))
    except Exception as error:
        if not row.tflop and not isinstance(error, torch.OutOfMemoryError):  # a bug, not a backend that cannot run here
            raise
        return [row.name, f"cannot run: {str(error).strip().splitlines()[0][:90]}"], None
    ms = statistics.median(rounds[0])
    gib = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if on_gpu else ""
    speed = 1e3 * (row.tflop or count_tflop(runs[0])) / ms
    ratio = f"{statistics.median(rounds[1]) / ms:.2f}x" if peer else ""
    cells = [f"{ms:.2f}", f"{1e3 * row.images / ms:.4g}", f"{speed:.3g}", f"{speed / peak:.1%}", gib, ratio]
    return [row.name, *cells], runs[0]


def main(cfg):
    """Print the table; return its lines as lists of cells."""
    machine = common.setup(cfg)
    if machine.device.type == "mps":
        raise checkpoint.UserError("bench.py does not measure an Apple GPU: set --device=cpu")
    on_gpu = machine.device.type == "cuda"
    small = cfg.size == "small" or (cfg.size == "auto" and not on_gpu)
    models = (SMALL, SMALL_VAE) if small else (SD2, KL_F8)
    bench = Bench(machine.device, getattr(torch, machine.precision), machine.compile, *models)
    peak, lines, trace = matmul_tflops(bench), [], cfg.profile
    hardware = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    about = f"{peak:.4g} TFLOP/s of {machine.precision} products; torch {torch.__version__}"
    print(f"{hardware}; {about}; compiled: {machine.compile}")
    print(f"git {common.git_revision()}: python {' '.join(sys.argv)}\n")
    print(f"| {'row':90} | ms | images/s | TFLOP/s | of matmul | GiB | {'diffusers / ours' if cfg.peer else ''} |")
    print("|" + " --- |" * 7)

    def add(cells):
        lines.append(cells)
        print(f"| {cells[0]:90} | {' | '.join(cells[1:])} |", flush=True)

    for group in GROUPS if "all" in cfg.rows else cfg.rows:
        if group == "loop":
            bench = bench._replace(unet=bench.unet | {"context_dim": 0})
        rows = attention_rows if group == "attention" else functools.partial(model_rows, group)
        for row in rows(bench, small, cfg.batch_size):
            cells, run = measure(row, bench, cfg, peak)
            add(cells)
            if trace and run:
                with torch.profiler.profile() as profiler:
                    run()
                profiler.export_chrome_trace(trace)
                trace = ""
            run = None
            if group != "attention":  # compiled modules refer to themselves, and the next row needs their memory
                torch.compiler.reset()
        if group == "loop":
            steps = max(2, math.ceil(1e3 * cfg.seconds / float(cells[1])))
            ms = training_script(bench, 64 if small else 256, row.images, steps)
            more = ms / float(cells[1]) - 1
            add([f"train_ldm.py, the same step: {more:+.1%}", f"{ms:.2f}", f"{1e3 * row.images / ms:.4g}"])
    return lines


if __name__ == "__main__":
    common.install_excepthook()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends what "loop" has started, too
    main(configure(globals()))
