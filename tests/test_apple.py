"""An Apple GPU: how it is chosen, and runs on a stand-in for it (apple.py), whose numbers are the CPU's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, near, refused
from helpers import Run, assert_same
from PIL import Image

import common
from common import Machine
from configurator import configure

APPLE = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import apple"
VQ = "--bottleneck=vq --codebook_size=16 --restart_every=2 --optimizer=muon"
VQ += " --disc_weight=1 --disc_layers=1 --disc_norm=none --disc_channels=16 --disc_start=2"


def setup(monkeypatch, present=("mps",), world=1, macos=15, **values):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in present)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in present)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    settings = dict(device="auto", dtype="auto", compile="auto", deterministic=False, dist_timeout=1.0)
    return common.setup(configure(settings | values, []))


def test_auto_takes_an_apple_gpu_in_float32(monkeypatch):
    found = setup(monkeypatch)
    assert found == Machine(0, 1, torch.device("mps"), "float32", torch.float32, False)
    assert setup(monkeypatch, present=()).device.type == setup(monkeypatch, device="cpu").device.type == "cpu"
    assert setup(monkeypatch, dtype="bfloat16").precision == "bfloat16"
    refused("bfloat16 on an Apple GPU needs macOS 14", setup, monkeypatch, dtype="bfloat16", macos=13)
    refused("no float64: set --device=cpu", setup, monkeypatch, dtype="float64")
    refused("takes one process", setup, monkeypatch, world=2)
    refused("--device=mps, but PyTorch finds no GPU", setup, monkeypatch, present=(), device="mps")


def test_a_bad_step_is_left_out_without_the_fused_optimizer():
    cfg = configure(dict(lr=0.1, beta1=0.9, beta2=0.99, shard_optimizer=False), [])
    weight, like = (torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    optimizer = common.adamw([{"params": [weight]}], cfg, Machine(0, 1, torch.device("mps"), "", None, False))
    adamw = torch.optim.AdamW([like], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    assert not optimizer.defaults["fused"]
    for step, bad in enumerate((False, True, False)):
        weight.grad, like.grad = (torch.arange(6.0).sin() + step for _ in range(2))
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        if not bad:
            adamw.step()
    near(weight.detach(), like.detach(), 1e-7)


@pytest.mark.parametrize("stage, args", [("vae", VQ), ("ldm", "--cond=text")])
def test_a_run_is_that_of_the_cpu(stage, args, start, tmp_path):
    """Interrupted and resumed; and a sample of the model."""
    args = [*args.split(), "--eval_every=2", "--val_images=8"]
    cpu = start(stage, *args, "--max_steps=4").finish()
    for steps in (2, 4):
        run = start(stage, *args, f"--max_steps={steps}", "--device=mps", first=APPLE, folder=tmp_path).finish()
    assert "1 x Apple GPU, float32" in run.stdout
    assert_same(run.checkpoint[0], cpu.checkpoint[0], 1e-4)
    for here, there in zip(run.log, cpu.log, strict=True):
        assert here.keys() == there.keys()
        near(*(torch.tensor([v for v in r.values() if isinstance(v, float)][:3]) for r in (here, there)), 1e-3)
    if stage == "ldm":
        command = ("--n=2", "--steps=2", "--prompt=a red blob")
        for device, first in (("mps", APPLE), ("cpu", "")):
            options = (f"--ckpt={run.out}", f"--device={device}", f"--out_dir={tmp_path}/{device}")
            Run("ldm", tmp_path, *command, *options, bare=True, script=f"{ROOT}/sample.py", first=first).finish()
        a, b = (np.asarray(Image.open(Path(tmp_path, name, "00001.png"))).astype(int) for name in ("mps", "cpu"))
        assert abs(a - b).max() <= 1
