import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoint
from checkpoint import UserError
from vae import VAE

TENSORS = {"ema.a": torch.arange(6.0).view(2, 3).T, "ema.unet.b": torch.ones(2), "emas.c": torch.zeros(())}
META = {"stage": "ldm", "model": {"x": (1, 2)}, "step": 3, "run": 7}


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "latest.safetensors")
    checkpoint.write(path, TENSORS, META)
    return path


def test_what_is_written_is_read(path):
    tensors, meta = checkpoint.read(path)
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[name], t) for name, t in TENSORS.items())
    assert meta == {"format": checkpoint.FORMAT} | META | {"model": {"x": [1, 2]}} == checkpoint.read_meta(path)
    assert checkpoint.read(os.path.dirname(path), "ema")[0].keys() == {"ema.a", "ema.unet.b"}, "an out_dir will do"
    assert checkpoint.part(tensors, "ema").keys() == {"a", "unet.b"}
    assert checkpoint.with_prefix("ema", {"a": 1}) == {"ema.a": 1}
    assert checkpoint.tuples({"x": [1, 2], "y": 3}) == {"x": (1, 2), "y": 3}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: os.truncate(path, os.path.getsize(path) // 2), "truncated or damaged"),
        (lambda path: open(path, "w").close(), "truncated or damaged"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "not a checkpoint of this repository"),
        (lambda path: save_file({}, path, {"latent_diffusion": "{}", "crc32": "1"}), "settings were altered"),
        (lambda path: checkpoint.write(path, {}, {"format": 1}), "format 1, this code reads 2; use the code that"),
        (lambda path: checkpoint.write(path, {}, {"format": [[]]}), "format [[]]"),
        (lambda path: os.remove(path), "no latest.safetensors in it; train first"),
    ],
)
def test_a_damaged_file_is_one_line(path, damage, message):
    damage(path)
    with pytest.raises(UserError) as caught:
        checkpoint.read(os.path.dirname(path))
    assert message in str(caught.value) and "\n" not in str(caught.value) and os.path.dirname(path) in str(caught.value)


def test_find(path, tmp_path, monkeypatch):
    folder = str(tmp_path)
    assert checkpoint.find(folder) == checkpoint.find(path) == path and checkpoint.is_ours(path)
    for name in ("nothing", "out/run", f"{folder}/x.safetensors"):
        with pytest.raises(UserError, match="no such checkpoint; give a .safetensors file or the out_dir"):
            checkpoint.find(name)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model_index.json").write_text("{}")
    assert checkpoint.find(f"{folder}/theirs") == f"{folder}/theirs" and not checkpoint.is_ours(f"{folder}/theirs")
    save_file({"a": torch.ones(1)}, f"{folder}/theirs.safetensors")
    assert not checkpoint.is_ours(f"{folder}/theirs.safetensors") and not checkpoint.is_ours("model.ckpt")
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns, ignore_patterns):
            asked.append(name)
            return f"{folder}/theirs"

    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", Hub)
    assert checkpoint.find("owner/name") == f"{folder}/theirs" and set(asked) == {"owner/name"}
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        checkpoint.find("owner/name")


def test_a_file_is_complete_or_not_there(tmp_path):
    path = str(tmp_path / "file")
    checkpoint.write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise KeyError("stop")

    with pytest.raises(KeyError):
        checkpoint.write_whole(path, fail)
    assert open(path, "rb").read() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_previous_checkpoint(path):
    before = open(path, "rb").read()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        with pytest.raises(UserError, match="could not be saved .*; free disk space and run again"):
            checkpoint.write(path, {"a": torch.zeros(10_000)}, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert open(path, "rb").read() == before and os.listdir(os.path.dirname(path)) == ["latest.safetensors"]


def test_what_a_killed_save_left_goes_with_the_next(path):
    folder = os.path.dirname(path)
    for name in (".tmpAb12xY", "latest.safetensors.123.tmp"):
        open(f"{folder}/{name}", "w").close()
    for name in (".tmpfile", "other.safetensors.123.tmp"):  # not of this checkpoint
        open(f"{folder}/{name}", "w").close()
    checkpoint.write(path, TENSORS, META)
    assert sorted(os.listdir(folder)) == [".tmpfile", "latest.safetensors", "other.safetensors.123.tmp"]


SETTINGS = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, mid_attention=False)


def test_build():
    vae = VAE(**SETTINGS)
    vae.latent_mean.fill_(0.0)
    vae.latent_std.fill_(1.0)
    settings = json.loads(json.dumps(vae.settings))
    built = checkpoint.build(VAE, settings, vae.state_dict(), "file")
    assert (
        built.settings == vae.settings and not built.training and not any(p.requires_grad for p in built.parameters())
    )
    assert all(torch.equal(a, b) for a, b in zip(built.state_dict().values(), vae.state_dict().values()))

    def message(settings, state):
        with pytest.raises(UserError) as caught:
            checkpoint.build(VAE, settings, state, "file")
        return str(caught.value)

    state = vae.state_dict()
    missing = {name: t for name, t in state.items() if name != "decoder.conv_out.bias"}
    assert "tensor decoder.conv_out.bias is missing, its settings need (3,)" in message(settings, missing)
    assert "tensor more is (1,), its settings need unknown" in message(settings, state | {"more": torch.ones(1)})
    assert "tensor decoder.conv_in.bias is (16,), its settings need (32,)" in message(settings | {"ch": 16}, state)
    assert f"num_res_blocks=1000000000, but only {len(state)} tensors" in message(
        settings | {"num_res_blocks": 10**9}, state
    )
    assert "its settings do not build a VAE" in message(settings | {"colour": 1}, state)


class WithTable(torch.nn.Module):
    """A model whose constructor computes a buffer that no file holds."""

    def __init__(self, n):
        super().__init__()
        self.linear = torch.nn.Linear(n, n)
        self.register_buffer("table", torch.arange(n).float(), persistent=False)


def test_build_computes_buffers_that_are_not_saved():
    model = WithTable(3)
    built = checkpoint.build(WithTable, {"n": 3}, model.state_dict(), "file")
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
    T, stds = 400, (0.05, 0.2, 0.1)
    averages = {std: 0.0 for std in stds}
    for step in range(1, T + 1):
        for std in stds:
            beta = (1 - 1 / step) ** (checkpoint.power_exponent(std) + 1)
            averages[std] = beta * averages[std] + (1 - beta) * step / T
        if step % 50 == 0:
            kept = {f"ema_power_{i}.w": torch.tensor([averages[std]]) for i, std in enumerate(stds[:2])}
            meta = {"run": 7, "step": step, "model": {"ema_stds": stds[:2]}}
            checkpoint.write(f"{tmp_path}/ema_{step:08d}.safetensors", kept, meta)
    checkpoint.write(f"{tmp_path}/ema_00000999.safetensors", kept, meta | {"run": 6, "step": 999})  # of another run
    checkpoint.write(f"{tmp_path}/latest.safetensors", {}, {"run": 7, "step": T, "model": {"ema_stds": stds[:2]}})
    assert checkpoint.posthoc_ema(str(tmp_path), 0.1)["ema.w"].item() == pytest.approx(averages[0.1], abs=1e-3)
    early = checkpoint.posthoc_ema(f"{tmp_path}/ema_00000200.safetensors", 0.1)["ema.w"].item()
    assert early == pytest.approx(averages[0.1] / 2, abs=4e-3)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(UserError, match="no averages to combine; train with --ema_stds"):
        checkpoint.posthoc_ema(str(tmp_path), 0.1)


def test_snapshots_of_an_autoencoder(tmp_path):
    """Stage 1's hold their own EMA; stage 2's have the autoencoder in the latest.safetensors of their run."""
    vae, later = VAE(**SETTINGS), VAE(**SETTINGS)
    about = {"model": vae.settings, "vae": vae.settings, "run": 7, "snapshot": True}
    snapshot, latest = f"{tmp_path}/ema_00000003.safetensors", f"{tmp_path}/latest.safetensors"
    checkpoint.write(latest, checkpoint.with_prefix("ema", later.state_dict()), about | {"stage": "vae"})
    checkpoint.write(snapshot, checkpoint.with_prefix("ema", vae.state_dict()), about | {"stage": "vae"})
    name = "encoder.conv_in.weight"
    assert torch.equal(checkpoint.read_vae(snapshot)[1][name], vae.state_dict()[name])
    checkpoint.write(snapshot, {}, about | {"stage": "ldm"})
    ldm = about | {"stage": "ldm", "snapshot": False}
    checkpoint.write(latest, checkpoint.with_prefix("vae", later.state_dict()), ldm)
    assert torch.equal(checkpoint.read_vae(snapshot)[1][name], later.state_dict()[name])
    checkpoint.write(latest, {}, ldm | {"run": 8})
    with pytest.raises(UserError, match="a snapshot, without the autoencoder"):
        checkpoint.read_vae(snapshot)
