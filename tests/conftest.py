"""Shared by all tests: the repository on sys.path, folders of data, and runs as training leaves them."""

import functools
import json
import os
import runpy
import signal
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():  # runs attention's kernels on the CPU; Triton reads it when imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

from checkpoint import UserError, with_prefix, write  # noqa: E402


def pytest_make_parametrize_id(val, argname):
    """Name bytes by their argument: gzip's hold the time, and every worker must find the same test names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def test_data():
    """Folder of real images: $LDM_TEST_DATA, else ../shared/data from the project's root."""
    folder = Path(os.environ.get("LDM_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set LDM_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def with_torchvision():
    """Reference packages import torchvision, which may have been built for another version of torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip("no torchvision: pip install -r requirements.txt")
    except RuntimeError:  # "operator torchvision::nms does not exist": nothing here needs its compiled part
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")


def reference(name):
    """Fixture of a package to compare with; without it the test is skipped."""
    return pytest.fixture(scope="session")(lambda with_torchvision: pytest.importorskip(name))


lpips_package, open_clip = reference("lpips"), reference("open_clip")
transformers, diffusers = reference("transformers"), reference("diffusers")


# --- for all test files ---


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def near(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def refused(message, call, *args, **options):
    """That a call raises a UserError of one line with `message` in it."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@torch.no_grad()
def fill(model, seed=0):
    """Fill every parameter, also zero-initialized ones, with noise that depends only on name, shape and seed."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed))
        p.copy_(noise / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1 * noise + name.endswith("weight"))
    return model


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command("sample.py", *args) -> (exit status, stdout, stderr), in an empty folder and in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the script sets its own

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *args])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as e:
            status = e.code
        except BaseException as e:
            sys.excepthook(type(e), e, e.__traceback__)
            status = 1
        return status, *capsys.readouterr()

    return run


# --- tiny runs, filled with noise ---


class Saved(NamedTuple):
    path: str  # its out_dir
    vae: torch.nn.Module | None  # the autoencoder in it (EMA)
    denoiser: torch.nn.Module | None  # stage 2: the EMA unet.Denoiser
    examples: list  # what it samples by default


def meta(stage, model, **more):
    """The meta of a checkpoint after one step."""
    about = {"stage": stage, "model": model, "config": {"seed": 0}, "git": "unknown", "run": 1}
    return about | {"step": 1, "images_seen": 4, "images_per_step": 4} | more


def ldm_settings(denoiser, **more):
    """meta["model"] of a checkpoint of stage 2."""
    s = {"unet": denoiser.unet.settings, "text": denoiser.text and denoiser.text.settings, "cond": "none"}
    s |= {"first_stage": "vae", "class_embed": "add", "num_classes": 0, "image_size": (32,), "image_mode": "RGB"}
    s |= {"objective": "v", "schedule": "cosine", "beta_start": 0.0015, "beta_end": 0.0195, "zero_snr": False}
    s |= {"ema_stds": [], "uncertainty": False, "text_encoder": "joint", "tower_hash": None, "task": "none"}
    return s | {"sr_scale": 0, "sr_noise": 0, "sr_schedule": None, "map_classes": 0} | more


def noisy(model):
    """(model.* and ema.* of a checkpoint, the EMA as a model)."""
    state = fill(model, 1).state_dict()
    tensors = with_prefix("model", {name: t.clone() for name, t in state.items()})
    ema = fill(model, 2).requires_grad_(False).eval()
    return tensors | with_prefix("ema", ema.state_dict()), ema


def make_vae_run(path):
    from vae import VAE

    vae = VAE(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, norm_groups=4, patch_size=2, mid_attention=False)
    vae.latent_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    vae.latent_std.copy_(torch.tensor([0.5, 1.0, 1.5]))
    tensors, ema = noisy(vae)
    path.mkdir()
    write(f"{path}/latest.safetensors", tensors, meta("vae", vae.settings))
    return Saved(str(path), ema, None, [])


def make_ldm_run(path, vae, classes=(), examples=None, unet=None, **model):
    """unet, model: settings that differ from these and from ldm_settings."""
    from text import TextEncoder
    from unet import Denoiser, Rescaler, UNet

    cond, task, token = (model.get(name) for name in ("cond", "task", "class_embed"))
    text = TextEncoder(16, 1, 2, 16) if cond == "text" else None
    tokens = torch.nn.Embedding(len(classes) + 1, 16) if token else None
    settings = dict(in_channels=3, out_channels=3, channels=16, channel_mult=(1, 2), num_res_blocks=1)
    settings |= dict(attention_ds=(2,), num_heads=2, norm_groups=4, context_dim=16 if text or tokens else 0)
    settings |= dict(concat_channels={None: 0, "inpaint": 4, "sr": 12, "semantic": 3}[task])
    settings |= dict(num_classes=1000 if task == "sr" else len(classes) + 1 if cond == "class" and not token else 0)
    rescaler = Rescaler(5, vae.factor) if task == "semantic" else None
    denoiser = Denoiser(UNet(**settings | (unet or {})), text, tokens, rescaler, model.get("uncertainty", False))
    tensors, ema = noisy(denoiser)
    tensors |= with_prefix("vae", vae.state_dict()) if vae else {}
    if text:
        tensors["text.bpe"] = torch.tensor(list(text.bpe()), dtype=torch.uint8)
    about = {"num_classes": len(classes), "sr_scale": 2, "map_classes": 5 if rescaler else 0}
    about |= {} if vae else {"first_stage": "none", "image_size": (8,)}
    examples = examples or [None] * 3
    more = dict(vae=vae and vae.settings, examples=examples, classes=list(classes))
    path.mkdir()
    about = meta("ldm", ldm_settings(denoiser, **about | model), **more)
    write(f"{path}/latest.safetensors", tensors, about)
    return Saved(str(path), vae, ema, examples)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Tiny runs by name: an autoencoder (f4), denoisers of its latents by condition, and one of pixels.

    "tokens" has classes as tokens; "inpaint", "sr" (twice the side) and "semantic" (5 classes) are tasks.
    """
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    made = {"vae": make_vae_run(root / "vae")}
    vae = made["vae"].vae
    classes, process = ("cat", "dog", "7", "tench, Tinca"), dict(objective="eps", schedule="scaled_linear")
    pixels = dict(channel_mult=(1,), attention_ds=())
    for name, stage, options in (
        ("text", vae, dict(cond="text", examples=["a red star", "a blue circle"])),
        ("class", vae, dict(cond="class", classes=classes, examples=[0, 1, 2, 3], **process)),
        ("none", vae, {}),
        ("pixels", None, dict(unet=pixels)),
        ("tokens", vae, dict(cond="class", classes=("cat", "dog"), examples=[0, 1], class_embed="token")),
        ("inpaint", vae, dict(cond="text", examples=["a"], task="inpaint")),
        ("sr", vae, dict(task="sr", sr_noise=10, uncertainty=True)),
        ("semantic", vae, dict(task="semantic")),
    ):
        made[name] = make_ldm_run(root / name, stage, **options)
    return made


# --- real runs of the training scripts, tiny ones; see helpers.py ---


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A data set of 24 training and 16 validation images of 16 px, blobs of three colors, with labels and captions."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:16, 0:16]
    for part, count in (("train", 24), ("val", 16)):
        (root / part).mkdir()
        labels = rng.integers(0, 3, count)
        distance = (y - rng.uniform(4, 12, (count, 1, 1))) ** 2 + (x - rng.uniform(4, 12, (count, 1, 1))) ** 2
        blob = np.exp(-distance / 20)
        images = 40 * rng.random((count, 16, 16, 3)) + 200 * blob[..., None] * np.eye(3)[labels][:, None, None]
        np.save(root / part / "images.npy", images.astype(np.uint8))
        np.save(root / part / "labels.npy", labels)
        lines = [json.dumps({"text": f"a {'red green blue'.split()[label]} blob"}) for label in labels]
        (root / part / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def first_stage(tmp_path_factory):
    """An untrained autoencoder with latent statistics, as a checkpoint of stage 1."""
    from vae import VAE

    torch.manual_seed(0)
    vae = VAE(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, mid_attention=False)
    vae.latent_mean.copy_(torch.linspace(-0.2, 0.1, 4))
    vae.latent_std.copy_(torch.linspace(0.8, 1.4, 4))
    path = tmp_path_factory.mktemp("first_stage") / "latest.safetensors"
    write(str(path), with_prefix("ema", vae.state_dict()), meta("vae", vae.settings))
    return path


@pytest.fixture(scope="session")
def start(tmp_path_factory, small_data, first_stage):
    """start(stage, *args, folder=..., ...) starts a training run in a folder of its own: see helpers.Run."""
    import helpers

    cache = tmp_path_factory.mktemp("cache")
    places = {"vae": [f"--dataset={small_data}"]}
    places["ldm"] = [*places["vae"], f"--first_stage={first_stage}", f"--cache_dir={cache}"]

    def start(stage, *args, folder=None, **options):
        return helpers.Run(stage, folder or tmp_path_factory.mktemp(stage), *places[stage], *args, **options)

    return start


def short_run(start, stage, ranks, **options):
    """A run of six steps with global batch 4."""
    args = ("--eval_every=3", "--save_every=3", "--snapshot_every=3", f"--batch_size={4 // ranks}")
    return start(stage, *args, ranks=ranks, **options)


@pytest.fixture(scope="session")
def finished(start):
    """finished(stage, ranks): a short_run, made once for all tests."""
    return functools.cache(lambda stage, ranks=1: short_run(start, stage, ranks, keep=True, plots=ranks == 1).finish())


@pytest.fixture(scope="session")
def killed(start):
    """killed(stage, ranks): the same run, killed by SIGKILL in the middle of step 5: step 3 is saved, 4 is logged."""

    @functools.cache
    def killed(stage, ranks=1):
        run = short_run(start, stage, ranks, trap=("step 4,", signal.SIGKILL))
        assert run.wait()[0] == -signal.SIGKILL  # the others are killed too, or notice first that they are alone
        return run

    return killed
