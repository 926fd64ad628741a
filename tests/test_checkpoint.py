"""checkpoint.py: complete files or none, damage in one line, models from files, post-hoc EMA."""

import json
import os
import resource
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused
from safetensors.torch import save_file

import checkpoint
from checkpoint import build, find, is_ours, posthoc_ema, read, with_prefix, write
from vae import VAE

TENSORS = {"ema.a": torch.arange(6.0).view(2, 3).T, "ema.unet.b": torch.ones(2), "emas.c": torch.zeros(())}
META = {"stage": "ldm", "model": {"x": (1, 2)}, "step": 3, "run": 7}


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "latest.safetensors")
    write(path, TENSORS, META)
    return path


def test_what_is_written_is_read(path):
    tensors, meta = read(path)
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[name], t) for name, t in TENSORS.items())
    assert meta == {"format": checkpoint.FORMAT} | META | {"model": {"x": [1, 2]}} == checkpoint.read_meta(path)
    assert read(os.path.dirname(path), "ema")[0].keys() == {"ema.a", "ema.unet.b"}, "an out_dir will do"
    assert checkpoint.part(tensors, "ema").keys() == {"a", "unet.b"}
    assert with_prefix("ema", {"a": 1}) == {"ema.a": 1}
    assert checkpoint.tuples({"x": [1, 2], "y": 3}) == {"x": (1, 2), "y": 3}


DAMAGE = {
    "truncated or damaged": lambda path: os.truncate(path, os.path.getsize(path) // 2),
    "truncated or damaged (": lambda path: open(path, "w").close(),
    "not a checkpoint of this repository": lambda path: save_file({"a": torch.ones(1)}, path),
    "its settings were altered": lambda path: save_file({}, path, {"latent_diffusion": "{}", "crc32": "1"}),
    "format 1, this code reads 2; use the code that": lambda path: write(path, {}, {"format": 1}),
    "format [[]]": lambda path: write(path, {}, {"format": [[]]}),
    "no latest.safetensors in it; train first": os.remove,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_file_is_one_line(path, message):
    DAMAGE[message](path)
    refused(message, read, os.path.dirname(path))


def test_find(path, tmp_path, monkeypatch):
    assert find(tmp_path) == find(path) == path and is_ours(path)
    for name in ("nothing", "out/run", f"{tmp_path}/x.safetensors"):
        refused("no such checkpoint; give a .safetensors file or the out_dir", find, name)
    theirs = str(tmp_path / "theirs")
    os.mkdir(theirs)
    open(f"{theirs}/model_index.json", "w").close()
    assert find(theirs) == theirs and not is_ours(theirs)
    save_file({"a": torch.ones(1)}, f"{theirs}.safetensors")
    assert not is_ours(f"{theirs}.safetensors") and not is_ours("model.ckpt")
    asked = []
    hub = SimpleNamespace(snapshot_download=lambda name, **patterns: asked.append(name) or theirs)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert find("owner/name") == theirs and set(asked) == {"owner/name"}
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("pip install huggingface_hub", find, "owner/name")


def test_a_file_is_complete_or_not_there(tmp_path, monkeypatch):
    path = str(tmp_path / "file")
    checkpoint.write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise KeyError("stop")

    with pytest.raises(KeyError):
        checkpoint.write_whole(path, fail)
    with pytest.raises(KeyError), checkpoint.replacing(path) as temporary:
        os.makedirs(f"{temporary}/folder")
        raise KeyError("stop")
    assert open(path, "rb").read() == b"old" and os.listdir(tmp_path) == ["file"]

    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or replace(a, b))
    checkpoint.write_whole(path, lambda file: file.write(b"new"))
    assert done == [f"file.{os.getpid()}.tmp", "rename", tmp_path.name], "on disk before and after it has its name"


def test_a_full_disk_leaves_the_previous_checkpoint(path):
    before = open(path, "rb").read()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        refused("; free disk space and run again", write, path, {"a": torch.zeros(10_000)}, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert open(path, "rb").read() == before and os.listdir(os.path.dirname(path)) == ["latest.safetensors"]


def test_what_a_killed_save_left_goes_with_the_next(path, tmp_path):
    others = {".tmpfile", "other.safetensors.123.tmp"}  # not of this checkpoint
    for name in (".tmpAb12xY", "latest.safetensors.123.tmp", *others):
        (tmp_path / name).touch()
    write(path, TENSORS, META)
    assert set(os.listdir(tmp_path)) == {"latest.safetensors", *others}


SETTINGS = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, mid_attention=False)


def test_build():
    vae = VAE(**SETTINGS)
    vae.latent_mean.fill_(0.0)
    vae.latent_std.fill_(1.0)
    settings, state = json.loads(json.dumps(vae.settings)), vae.state_dict()
    built = build(VAE, settings, {name: t.double() for name, t in state.items()}, "file")
    assert built.settings == vae.settings and not built.training
    assert not any(p.requires_grad for p in built.parameters())
    assert all(t.dtype == state[name].dtype and torch.equal(t, state[name]) for name, t in built.state_dict().items())
    missing = {name: t for name, t in state.items() if name != "decoder.conv_out.bias"}
    for changed, tensors, message in (
        ({}, missing, "tensor decoder.conv_out.bias is missing, its settings need (3,)"),
        ({}, state | {"more": torch.ones(1)}, "tensor more is (1,), its settings need none"),
        ({"ch": 16}, state, "tensor decoder.conv_in.bias is (16,), its settings need (32,)"),
        ({"num_res_blocks": 10**9}, state, f"num_res_blocks=1000000000, but only {len(state)} tensors"),
        ({"num_res_blocks": "x"}, state, "its settings do not build a VAE"),
        ({"colour": 1}, state, "its settings do not build a VAE"),
    ):
        refused(f"file: {message}", build, VAE, settings | changed, tensors, "file")


class WithTable(torch.nn.Module):
    """A model whose constructor computes a buffer that no file holds."""

    def __init__(self, n):
        super().__init__()
        self.linear = torch.nn.Linear(n, n)
        self.register_buffer("table", torch.arange(n).float(), persistent=False)


def test_build_computes_buffers_that_are_not_saved():
    model = WithTable(3)
    built = build(WithTable, {"n": 3}, model.state_dict(), "file")
    assert torch.equal(built.table, model.table) and torch.equal(built.linear.weight, model.linear.weight)


def test_hash_weights():
    a, b = VAE(**SETTINGS), VAE(**SETTINGS)
    b.load_state_dict(a.state_dict())
    assert checkpoint.hash_weights(a) == checkpoint.hash_weights(b.state_dict())
    b.decoder.conv_out.bias.data += 1
    assert checkpoint.hash_weights(a) != checkpoint.hash_weights(b)
    assert checkpoint.hash_weights(a, but=("decoder.",)) == checkpoint.hash_weights(b, but=("decoder.",))


def test_power_exponent_has_the_relative_deviation_it_is_named_by():
    for std in (0.01, 0.05, 0.1, 0.25):
        gamma = checkpoint.power_exponent(std)
        s = (np.arange(1_000_000) + 0.5) / 1_000_000
        p = s**gamma / (s**gamma).sum()
        assert np.sqrt((p * s**2).sum() - (p * s).sum() ** 2) == pytest.approx(std, rel=1e-3)


def test_posthoc_ema_is_the_average_that_was_not_kept(tmp_path):
    """Averages of w(s) = s / T kept at lengths .05 and .2; one of .1 is made of them, and it is what .1 would be."""
    T, stds, averages = 400, (0.05, 0.2, 0.1), dict.fromkeys((0.05, 0.2, 0.1), 0.0)
    meta = {"run": 7, "step": T, "model": {"ema_stds": stds[:2]}}
    write(f"{tmp_path}/latest.safetensors", {}, meta)
    refused("no averages to combine; train with --ema_stds", posthoc_ema, tmp_path, 0.1)
    for step in range(1, T + 1):
        for std in stds:
            beta = (1 - 1 / step) ** (checkpoint.power_exponent(std) + 1)
            averages[std] = beta * averages[std] + (1 - beta) * step / T
        if step % 50 == 0:
            kept = {f"ema_power_{i}.w": torch.tensor([averages[std]]) for i, std in enumerate(stds[:2])}
            write(f"{tmp_path}/ema_{step:08d}.safetensors", kept, meta | {"step": step})
    other = {name: t + 1 for name, t in kept.items()}
    write(f"{tmp_path}/ema_00000399.safetensors", other, meta | {"run": 6, "step": 399})  # of another run
    assert posthoc_ema(tmp_path, 0.1)["ema.w"].item() == pytest.approx(averages[0.1], abs=1e-3)
    early = posthoc_ema(f"{tmp_path}/ema_00000200.safetensors", 0.1)["ema.w"].item()
    assert early == pytest.approx(averages[0.1] / 2, abs=4e-3)


def test_snapshots_of_an_autoencoder(tmp_path):
    """Stage 1's hold their own EMA; stage 2's have the autoencoder in the latest.safetensors of their run."""
    vae, later = VAE(**SETTINGS), VAE(**SETTINGS)
    about = {"model": vae.settings, "vae": vae.settings, "run": 7, "snapshot": True, "stage": "vae"}
    snapshot, latest = f"{tmp_path}/ema_00000003.safetensors", f"{tmp_path}/latest.safetensors"
    write(latest, with_prefix("ema", later.state_dict()), about)
    write(snapshot, with_prefix("ema", vae.state_dict()), about)
    name = "encoder.conv_in.weight"
    assert torch.equal(checkpoint.read_vae(snapshot)[1][name], vae.state_dict()[name])
    write(snapshot, {}, about | {"stage": "ldm"})
    ldm = about | {"stage": "ldm", "snapshot": False}
    write(latest, with_prefix("vae", later.state_dict()), ldm)
    assert torch.equal(checkpoint.read_vae(snapshot)[1][name], later.state_dict()[name])
    write(latest, {}, ldm | {"run": 8})
    refused("a snapshot, without the autoencoder", checkpoint.read_vae, snapshot)
    write(latest, {}, ldm | {"vae": None})
    refused("trained on pixels, without an autoencoder", checkpoint.read_vae, latest)
