"""Stage 2 by itself; what it promises together with stage 1 (resume, ranks, faults, errors) is in test_train_vae.py."""

import base64
import contextlib
import functools
import inspect
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import tarfile
import threading
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import assert_same, read
from PIL import Image
from safetensors.torch import save_file
from test_train_vae import continued, make_images

import configurator
import convert
import diffusion
import sample
import train_ldm
from data import cache as cache_files
from data.cache import LatentCache
from data.dataset import Dataset, Stream, seed_of
from text import CLIPTextEncoder
from train_ldm import prediction_error, train_step
from unet import Denoiser, UNet
from vae import VAE

OBJECTIVES, SCHEDULES = ("eps", "v", "x0", "flow"), ("cosine", "flow", "linear", "scaled_linear")
every_process = [pytest.mark.parametrize("objective", OBJECTIVES), pytest.mark.parametrize("schedule", SCHEDULES)]


def settings(**others):
    defaults = dict(objective="v", schedule="cosine", beta_start=0.00085, beta_end=0.012)
    defaults |= dict(timesteps="uniform", t_mean=0.0, t_std=1.0, t_shift=3.0, zero_snr=False, offset_noise=0.0)
    defaults |= dict(loss_type="mse", huber_delta=0.1, loss_weight="none", min_snr_gamma=5.0)
    return defaults | dict(cond="none", cond_drop=0.1, batch_size=4) | others


def draws(n, shape=(4, 8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = {"eps": torch.randn((n, *shape), generator=generator)}
    return noise | {name: torch.rand(n, generator=generator) for name in ("t", "drop")}


class Recorder(torch.nn.Module):
    """A network that predicts zero and remembers what it was given."""

    def forward(self, x, t, **condition):
        self.x, self.t, self.condition = x, t, condition
        return torch.zeros_like(x)


# -- the loss --


def test_logit_normal_timesteps_are_that():
    n, net = 4000, Recorder()
    noise = {"eps": torch.zeros(n, 1, 1, 1), "t": (torch.arange(n) + 0.5) / n, "drop": torch.ones(n)}
    cfg = settings(timesteps="logit_normal", t_mean=0.4, t_std=0.7, schedule="flow")
    prediction_error({"denoiser": net}, {"x0": torch.zeros(n, 1, 1, 1)}, noise, cfg)
    logits = torch.logit(net.t / 1000)
    assert logits.mean().item() == pytest.approx(0.4, abs=5e-3) and logits.std().item() == pytest.approx(0.7, abs=5e-3)


def test_shifted_timesteps():
    """SD3's equation 23: as if the noise were that of sides t_shift times as large."""
    u = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    t = train_ldm.draw_times(u, settings(timesteps="shifted", t_shift=3.0, schedule="flow"))
    torch.testing.assert_close(t / (1 - t), 3 * u / (1 - u))


@every_process[0]
def test_min_snr_weighs_the_error_of_x0(objective):
    """Whatever the objective, the loss is that of x0 times min(snr, gamma)."""
    noise, x0, net = draws(64), torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1)), Recorder()
    cfg = settings(objective=objective, schedule="scaled_linear", loss_weight="min_snr", min_snr_gamma=3.0)
    error, weight, _ = prediction_error({"denoiser": net}, {"x0": x0}, noise, cfg)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)[net.t.round().long()]
    alpha, sigma = alpha_bar.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar).sqrt().view(-1, 1, 1, 1)
    x0_hat = diffusion.to_x0(objective, torch.zeros(()), net.x.double(), alpha, sigma)
    snr = alpha_bar / (1 - alpha_bar)
    wanted = snr.clamp(max=3.0) * (x0_hat - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close((weight * error).double(), wanted, rtol=1e-3, atol=1e-5)
    formula = {"eps": 1 / snr, "v": 1 / (snr + 1), "x0": torch.ones_like(snr)}  # Hang et al. 2023
    if objective in formula:
        torch.testing.assert_close(weight.double(), snr.clamp(max=3.0) * formula[objective], rtol=1e-3, atol=1e-6)
    loss = train_step({"denoiser": net}, {"x0": x0}, noise, cfg)["loss"]
    assert loss.item() == pytest.approx((weight * error).mean().item())


@every_process[0]
@pytest.mark.parametrize("schedule", ("cosine", "flow"))
def test_min_snr_is_finite_from_data_to_noise(objective, schedule):
    noise = {"eps": torch.randn(5, 1, 2, 2), "t": torch.tensor([0, 1e-6, 0.5, 0.999, 1.0]), "drop": torch.ones(5)}
    cfg = settings(objective=objective, schedule=schedule, loss_weight="min_snr")
    assert train_step({"denoiser": Recorder()}, {"x0": torch.randn(5, 1, 2, 2)}, noise, cfg)["loss"].isfinite()


def test_kinds_of_loss():
    x0, noise, net = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1)), draws(6), Recorder()
    for loss_type, wanted in (
        ("l1", x0.abs()),
        ("huber", torch.where(x0.abs() < 0.5, x0**2 / 2, 0.5 * (x0.abs() - 0.25))),
    ):
        cfg = settings(objective="x0", loss_type=loss_type, huber_delta=0.5)
        error, _, _ = prediction_error({"denoiser": net}, {"x0": x0}, noise, cfg)
        torch.testing.assert_close(error, wanted.mean(dim=(1, 2, 3)))


def test_offset_noise_is_one_number_a_channel():
    x0, noise, net = torch.zeros(3, 4, 8, 8), draws(3), Recorder()
    noise["offset"] = torch.randn(3, 4, 1, 1)
    cfg = settings(objective="eps", schedule="flow", offset_noise=0.5)
    error, _, _ = prediction_error({"denoiser": net}, {"x0": x0}, noise, cfg)
    eps = noise["eps"] + 0.5 * noise["offset"]
    torch.testing.assert_close(error, eps.square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(net.x, (net.t / 1000).view(-1, 1, 1, 1) * eps)


def test_uncertainty_learns_the_log_of_the_error():
    """At the minimum of error / exp(u) + u the learned u is the logarithm of the mean error at each noise level."""
    torch.manual_seed(0)
    unet = UNet(channels=8, channel_mult=(1,), num_res_blocks=1, attention_ds=(), num_heads=1, norm_groups=4)
    net = Denoiser(unet, uncertainty=True)  # its last layer is zero, so v is predicted as 0 and only u learns
    optimizer = torch.optim.Adam(net.log_variance.parameters(), lr=0.05)
    x0 = 0.5 * torch.randn(64, 4, 8, 8)
    for i in range(250):
        loss = train_step({"denoiser": net}, {"x0": x0}, draws(64, seed=i), settings(loss_weight="uncertainty"))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error, _, u = prediction_error({"denoiser": net}, {"x0": x0}, draws(64, seed=999), settings())
    assert error.max() > 2 * error.min()
    assert (u - error.log()).abs().mean() < 0.15 and (u - error.log()).abs().max() < 0.4
    net.eval()
    assert isinstance(net(x0, torch.zeros(64)), torch.Tensor), "no more than the prediction when drawing"


# -- averages --


def test_a_power_average_is_one():
    """Weights ~ step^gamma, whose mean is (gamma + 1) / (gamma + 2) of the run and whose relative deviation is std."""
    for std in (0.05, 0.1, 0.25):
        n = 2000
        model, ema = torch.nn.Linear(n, 1, bias=False), torch.nn.Linear(n, 1, bias=False)
        for step in range(1, n + 1):  # after step k the weights are the unit vector of k
            with torch.no_grad():
                model.weight.copy_(torch.nn.functional.one_hot(torch.tensor([step - 1]), n))
            train_ldm.update_power_ema([ema.weight], [model.weight], step, std)
        share, at = ema.weight[0].double(), (torch.arange(n, dtype=torch.float64) + 1) / n
        assert share.sum().item() == pytest.approx(1, abs=1e-4)
        mean = (share * at).sum()
        assert (share * (at - mean) ** 2).sum().sqrt().item() == pytest.approx(std, rel=0.01)


def test_any_length_from_kept_averages(tmp_path):
    """Of a random walk; snapshots of two lengths give the average of a third nearly, and those two themselves."""
    walk, stds, lengths = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)).cumsum(0), (0.05, 0.1), {}
    for std in (0.05, 0.07, 0.1, 0.15):
        model, ema = torch.nn.Linear(50, 1, bias=False), torch.nn.Linear(50, 1, bias=False)
        for step, weight in enumerate(walk, 1):
            model.weight.data[0] = weight
            train_ldm.update_power_ema([ema.weight], [model.weight], step, std)
            if std in stds and step % 25 == 0:
                lengths.setdefault(step, {})[std] = ema.weight.detach().clone()
        lengths[std] = ema.weight.detach().clone()
    for step in range(25, 401, 25):
        kept = {f"ema_power_{i}.weight": lengths[step][std] for i, std in enumerate(stds)}
        about = {"format": 1, "stage": "ldm", "step": step, "run": 1, "model": {"ema_stds": stds}}
        train_ldm.save_checkpoint(f"{tmp_path}/ema_{step:08d}.safetensors", kept, about)
    train_ldm.save_checkpoint(f"{tmp_path}/latest.safetensors", {}, about)
    other = {f"ema_power_{i}.weight": torch.zeros(1, 50) for i in range(2)}  # left by another run of 500 steps
    train_ldm.save_checkpoint(f"{tmp_path}/ema_00000500.safetensors", other, about | {"step": 500, "run": 0})
    spread = walk.std()
    for std in (0.05, 0.07, 0.1, 0.15):
        got = convert.posthoc_ema(str(tmp_path), std)["ema.weight"]
        assert (got - lengths[std]).abs().max() < (1e-4 if std in stds else 0.02) * spread, std
    assert (lengths[0.05] - lengths[0.15]).abs().mean() > 0.1 * spread, "they do differ"
    early = convert.posthoc_ema(f"{tmp_path}/ema_00000200.safetensors", 0.1)["ema.weight"]
    torch.testing.assert_close(early, lengths[200][0.1], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="ema_std=0.5 is no relative length of an average"):
        convert.posthoc_ema(str(tmp_path), 0.5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty keeps no averages to combine: train with --ema_stds"):
        convert.posthoc_ema(f"{tmp_path}/empty", 0.1)


@every_process[0]
@every_process[1]
def test_loss_of_a_network_that_says_zero(objective, schedule):
    x0, noise, net = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1)), draws(6), Recorder()
    t = noise["t"].double() * (0.995 if objective == "eps" and schedule in ("cosine", "flow") else 1)
    if schedule == "cosine":
        alpha, sigma, told = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t), 1000 * t
    elif schedule == "flow":
        alpha, sigma, told = 1 - t, t, 1000 * t
    else:
        if schedule == "linear":
            betas = torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)
        else:
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        told = torch.floor(1000 * t)  # an index into the table
        alpha_bar = torch.cumprod(1 - betas, 0)[told.long()]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    alpha, sigma = alpha.float().view(-1, 1, 1, 1), sigma.float().view(-1, 1, 1, 1)
    wanted = {"eps": noise["eps"], "v": alpha * noise["eps"] - sigma * x0, "x0": x0, "flow": noise["eps"] - x0}[
        objective
    ]
    cfg = settings(objective=objective, schedule=schedule)
    losses, weights, log_variance = prediction_error({"denoiser": net}, {"x0": x0}, noise, cfg)
    assert (weights == 1).all() and log_variance is None
    torch.testing.assert_close(losses, (wanted**2).mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.x, alpha * x0 + sigma * noise["eps"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.t, told.float(), rtol=1e-4, atol=1e-3)
    assert not net.condition
    assert train_step({"denoiser": net}, {"x0": x0}, noise, cfg)["loss"] == losses.mean()


@every_process[0]
@every_process[1]
def test_every_process_trains_a_unet(objective, schedule):
    torch.manual_seed(0)
    net = Denoiser(UNet(channels=8, channel_mult=(1,), num_res_blocks=1, attention_ds=(), num_heads=1, norm_groups=4))
    optimizer, x0, losses = torch.optim.AdamW(net.parameters(), lr=3e-3), torch.randn(8, 4, 8, 8), []
    for _ in range(6):
        loss = train_step({"denoiser": net}, {"x0": x0}, draws(8), settings(objective=objective, schedule=schedule))[
            "loss"
        ]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize("cond_drop", (0.0, 0.3, 1.0))
def test_condition_dropout_takes_exactly_those_drawn(cond_drop):
    net, noise, n = Recorder(), draws(20), 20
    dropped = [drop < cond_drop for drop in noise["drop"].tolist()]
    assert sum(dropped) == {0.0: 0, 1.0: n}.get(cond_drop, sum(dropped)) and (cond_drop != 0.3 or 0 < sum(dropped) < n)
    tokens, context, y = torch.arange(n * 5).view(n, 5), torch.rand(n, 5, 7), torch.arange(n)
    for name, given, null in (
        ("tokens", tokens, torch.full((n, 5), -1)),
        ("context", context, -context),
        ("y", y, torch.full((n,), 99)),
    ):
        batch = {"x0": torch.zeros(n, 4, 8, 8), name: given, f"null_{name}": null, "concat": context}
        prediction_error({"denoiser": net}, batch, noise, settings(cond_drop=cond_drop))
        assert set(net.condition) == {name, "concat"} and net.condition["concat"] is context, "pictures are not dropped"
        for i in range(n):
            assert torch.equal(net.condition[name][i], (null if dropped[i] else given)[i])
    prediction_error({"denoiser": net}, {"x0": torch.zeros(n, 4, 8, 8)}, noise, settings(cond_drop=cond_drop))
    assert not net.condition


def test_evaluation_gives_every_image_its_own_noise_and_time():
    def examples(rows):
        return {"x0": torch.zeros(len(rows), 4, 8, 8)}

    def run(batch_size):
        cfg = settings(objective="eps", batch_size=batch_size, cond_drop=1.0)
        cpu = torch.device("cpu")
        return train_ldm.evaluate(Recorder(), examples, 37, cfg, 0, 1, cpu, contextlib.nullcontext)

    scores = run(5)
    losses, bins = [], [[] for _ in range(10)]
    for i in range(37):
        eps = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed_of("val", i)))
        losses.append(eps.square().mean().item())
        bins[int(10 * ((0.5 + i * (5**0.5 - 1) / 2) % 1))].append(losses[-1])
    assert scores["val_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert all(len(b) in (3, 4, 5) for b in bins), "evenly spread"
    assert scores["val_loss_by_t"] == pytest.approx([np.mean(b) for b in bins], rel=1e-6)
    assert run(7)["val_loss_by_t"] == pytest.approx(scores["val_loss_by_t"], rel=1e-12)


# -- the latent cache --


@pytest.fixture
def vae(first_stage):
    return VAE.from_pretrained(str(first_stage))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_files, "SHARD", 8)


def build(cache, vae, rank=0, world=1):
    cache.build(vae, torch.device("cpu"), contextlib.nullcontext, 0, rank, world)
    return cache


def contents(cache):
    return {name: open(f"{cache.folder}/{name}", "rb").read() for name in sorted(os.listdir(cache.folder))}


@torch.no_grad()
def test_the_cache_holds_what_encoding_gives(small_data, vae, tmp_path):
    for flip in (True, False):
        images = Dataset(small_data, "train", 16)
        stream = Stream(images, 3, flip=flip)
        cache = build(LatentCache(stream, vae, tmp_path), vae)
        assert list(contents(cache)) == ["000000.npy", "000001.npy", "000002.npy"]
        seen = set()
        for p in range(48):
            got, wanted = cache[p], stream[p]
            posterior = vae.encode(wanted["image"][None])
            assert got["image"].dtype == torch.float16
            moments = torch.stack([posterior.mean[0], posterior.std[0]])
            torch.testing.assert_close(got["image"].float(), moments, rtol=2e-3, atol=1e-4)
            for name in ("label", "text", "key", "index", "flip", "bad"):
                assert got[name] == wanted[name]
            seen.add(got["flip"])
        assert seen == ({True, False} if flip else {False})


def test_the_cache_goes_on_where_it_was_stopped(small_data, vae, tmp_path):
    cache = build(LatentCache(Stream(Dataset(small_data, "train", 16), 0), vae, tmp_path), vae)
    whole, inodes = contents(cache), {name: os.stat(f"{cache.folder}/{name}").st_ino for name in contents(cache)}
    os.rename(cache.path(1), f"{cache.path(1)}.123.tmp")  # as if killed while it wrote
    build(LatentCache(cache.stream, vae, tmp_path), vae)
    os.remove(f"{cache.path(1)}.123.tmp")
    assert contents(cache) == whole
    now = {name: os.stat(f"{cache.folder}/{name}").st_ino for name in whole}
    assert [name for name in whole if now[name] != inodes[name]] == ["000001.npy"]


def test_the_cache_belongs_to_weights_and_data(small_data, vae, tmp_path):
    def folder(data=small_data, size=16, flip=True, model=vae):
        return LatentCache(Stream(Dataset(data, "train", size), 0, flip=flip), model, "cache").folder

    shutil.copytree(small_data, tmp_path / "data")
    assert folder(tmp_path / "data") == folder(), "the place does not matter"
    images = np.load(tmp_path / "data/train/images.npy")
    images[5] //= 2
    np.save(tmp_path / "data/train/images.npy", images)
    other = VAE(**vae.settings)
    other.load_state_dict(vae.state_dict())
    assert folder(model=other) == folder()
    with torch.no_grad():
        other.decoder.conv_out.bias[0] += 1e-6
        assert folder(model=other) == folder(), "latents do not depend on the decoder"
        other.encoder.conv_out.bias[0] += 1e-6
    assert len({folder(), folder(tmp_path / "data"), folder(size=32), folder(flip=False), folder(model=other)}) == 5


def test_the_cache_keeps_few_files_open(small_data, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_files, "SHARD", 1)
    cache = build(LatentCache(Stream(Dataset(small_data, "train", 16), 0), vae, tmp_path), vae)
    first = cache.moments(0, False)
    cache.shards |= {f"other {k}": None for k in range(255)}
    cache.moments(1, False)
    assert len(cache.shards) == 256 and 0 not in cache.shards
    assert torch.equal(cache.moments(0, False), first)


def test_the_cache_replaces_a_bad_image_as_the_stream_does(vae, tmp_path, capsys):
    make_images(tmp_path / "images/train", 10, 2)
    stream = Stream(Dataset(tmp_path / "images", "train", 16), 0)
    cache = build(LatentCache(stream, vae, tmp_path), vae)
    assert capsys.readouterr().out.count("skipped a bad image: train/bad") == 2
    replaced = 0
    for p in range(24):
        got, wanted = cache[p], stream[p]
        assert got["image"].isfinite().all() and got["index"] == wanted["index"] and got["key"].startswith("train/good")
        assert [line.split(":")[0] for line in got["bad"]] == [line.split(":")[0] for line in wanted["bad"]]
        replaced += bool(got["bad"])
    assert replaced == 4


@pytest.mark.parametrize("late", (False, True))
def test_two_ranks_build_the_cache_of_one(small_data, vae, tmp_path, late):
    stream = Stream(Dataset(small_data, "train", 16), 0, flip=True)
    one = build(LatentCache(stream, vae, tmp_path / "one"), vae)
    caches = [LatentCache(stream, vae, tmp_path / "two") for _ in range(2)]
    threads = [threading.Thread(target=build, args=(c, vae, r, 2), daemon=True) for r, c in enumerate(caches)]
    threads[0].start()
    while late and not os.path.exists(caches[0].path(2)):  # rank 0 is done with its shards, 0 and 2
        assert threads[0].is_alive()
    threads[1].start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads), "a rank waits for what nobody builds"
    assert contents(caches[0]) == contents(one)


def test_a_cache_that_cannot_be_written_says_so(start, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in start("ldm", f"--cache_dir={tmp_path}/file/cache").fail()
    message = start("ldm", f"--cache_dir={tmp_path}/cache", limit=3000).fail()
    assert re.search(r"could not write .*/000000.npy \(.*\): make room and run again", message)
    assert not list(tmp_path.glob("cache/*/*"))


# -- runs --


def test_latents_encoded_at_every_step_train_like_cached_ones(start, finished, tmp_path):
    encoded = start("ldm", "--cache_latents=false", "--max_steps=3", f"--cache_dir={tmp_path}/cache").finish()
    for a, b in zip(finished("ldm").log[:3], encoded.log):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-2
        )
    assert not (tmp_path / "cache").exists()


def test_classes_some_of_them_unknown(start, small_data, tmp_path):
    shutil.copytree(small_data, tmp_path / "data")
    labels = np.load(tmp_path / "data/train/labels.npy")
    labels[::2] = -1  # no label, no condition
    np.save(tmp_path / "data/train/labels.npy", labels)
    args = ("--cond=class", "--objective=eps", "--schedule=scaled_linear", "--transformer_depth=0", "--max_steps=2")
    run = start("ldm", f"--dataset={tmp_path}/data", *args, "--n_samples=5").finish()
    meta = run.checkpoint[1]
    assert meta["shown"] == [0, 1, 2, 0, 1] and meta["model"]["num_classes"] == 3
    assert run.checkpoint[0]["model.unet.class_embed.weight"].shape[0] == 4
    assert (run.out / "samples_00000002.png").exists()
    assert drawn(run).shape == (5, 3, 16, 16)
    for cond in ("text", "layout"):
        folder = tmp_path / cond
        folder.mkdir()
        message = start("ldm", f"--cond={cond}", folder=continued(run, folder)).fail()
        assert f"cond: class in the checkpoint, {cond} now" in message or "has no objects" in message
    os.remove(tmp_path / "data/train/labels.npy"), os.remove(tmp_path / "data/val/labels.npy")
    message = start("ldm", f"--dataset={tmp_path}/data", "--cond=class").fail()
    assert re.search("cond=class, but the images in .*/data have no labels: use cond=none or cond=text", message)


def test_pixels_without_conditions(start, small_data, tmp_path):
    """On data that have labels and captions, which it must leave alone; decoded in another process."""
    args = ("--first_stage=none", "--cond=none", "--objective=flow", "--schedule=flow", "--max_steps=2", "--workers=1")
    run = start("ldm", *args, "--transformer_depth=0").finish()
    assert "latents of (3, 16, 16); cond=none, task=none; flow objective on the flow schedule" in run.stdout
    assert not any(name.startswith(("vae.", "text.", "model.text.")) for name in run.checkpoint[0])
    assert run.checkpoint[1]["vae"] is None and run.checkpoint[1]["shown"] == [None] * 3
    assert drawn(run).shape == (3, 3, 16, 16)
    message = start("ldm", *args[1:], "--transformer_depth=0", folder=continued(run, tmp_path)).fail()
    assert "(first_stage: none in the checkpoint, vae now): use its settings, or another out_dir" in message
    shutil.copytree(small_data, tmp_path / "data")
    os.remove(tmp_path / "data/train/captions.jsonl"), os.remove(tmp_path / "data/val/captions.jsonl")
    message = start("ldm", f"--dataset={tmp_path}/data").fail()
    assert re.search("the validation images in .*/data have no captions: add them, or use cond=none or cond=", message)


def drawn(run):
    """What sample.py draws with nothing but the checkpoint."""
    pipeline = sample.load_pipeline(str(run.out))
    pictures = sample.generate(pipeline, pipeline.shown, range(len(pipeline.shown)), steps=2, cfg=2.0)
    assert pictures.isfinite().all()
    return pictures


def test_prompts_come_from_a_file_or_from_the_captions(start, finished, tmp_path):
    run = finished("ldm")
    assert sorted(run.checkpoint[1]["shown"]) == ["a blue blob", "a green blob", "a red blob"]
    assert "prompt cut to 12 tokens: a green blob" in run.stdout
    assert drawn(run).shape == (3, 3, 16, 16)
    (tmp_path / "prompts.txt").write_text("a red blob\n\na red blob\n")
    args = (f"--prompts={tmp_path}/prompts.txt", "--objective=x0", "--schedule=linear", "--max_steps=1")
    other = start("ldm", *args).finish()
    assert other.checkpoint[1]["shown"] == ["a red blob", "a red blob"]
    assert "prompts.txt holds no prompts" not in other.stdout
    (tmp_path / "prompts.txt").write_text("\n")
    assert "prompts.txt holds no prompts: give a file with a prompt a line" in start("ldm", *args).fail()


def test_validation_has_ten_bins(finished):
    evaluated = [record for record in finished("ldm").log if record["val_loss"] is not None]
    for record in evaluated:
        bins = record["val_loss_by_t"]
        assert len(bins) == 10 and all(math.isfinite(b) for b in bins)
        assert min(bins) < record["val_loss"] < max(bins)
    assert evaluated[0]["val_loss"] != evaluated[1]["val_loss"]


def test_a_run_keeps_to_its_autoencoder_and_brings_it_along(start, finished, first_stage, tmp_path):
    folder = continued(finished("ldm"), tmp_path)
    message = start("ldm", f"--first_stage={finished('vae').out}", folder=folder).fail()
    assert re.search("latest.safetensors was trained on another autoencoder than .*: use another out_dir", message)
    tensors = start("ldm", "--first_stage=gone", "--max_steps=7", folder=folder).finish().checkpoint[0]
    vae, _ = read(first_stage)
    assert_same(train_ldm.without_prefix("vae", tensors), train_ldm.without_prefix("ema", vae))
    wanted = r"channels: 8 in the checkpoint, 16 now; objective: flow in the checkpoint, eps now"
    assert wanted in start("ldm", "--channels=16", "--objective=eps", folder=folder).fail()
    message = start("ldm", "--image_size=18").fail()
    assert "image_size=18 gives latents of side 9, not a multiple of 2" in message
    assert json.loads((folder / "out/log.jsonl").read_text().splitlines()[-1])["step"] == 7


@pytest.mark.parametrize(
    "args, wanted",
    [
        ("--grad_clip=-1", "grad_clip=-1.0 must not be negative: 0 does without it"),
        ("--ema_decay=7", "ema_decay=7.0 must lie between 0 and 1"),
        ("--lr=0", "lr=0.0 must be above 0"),
        ("--beta_start=0.5", "beta_start=0.5, beta_end=0.012: the first must be the smaller"),
        ("--schedule=linear --sample_steps=1001", "steps is 1001: schedule 'linear' has only 1000 times"),
    ],
)
def test_numbers_out_of_range_are_one_line(args, wanted, start):
    assert wanted in start("ldm", "--cond=none", *args.split()).fail()


def test_settings_by_level(start):
    args = ("--num_res_blocks=1,2", "--self_attention=true,False", "--attention_ds=1,2", "--max_steps=1")
    settings = start("ldm", *args).finish().checkpoint[1]["model"]["unet"]
    assert settings["num_res_blocks"] == [1, 2] and settings["self_attention"] == [True, False]


def test_another_tokenizer_on_resume(start, finished, small_data, tmp_path):
    folder = continued(finished("ldm"), tmp_path)
    line = start("ldm", "--tokenizer=nowhere.tiktoken", folder=folder).fail()
    assert "nowhere.tiktoken" in line
    start("ldm", "--tokenizer=bytes", folder=folder).finish()


def test_another_tokenizer_than_that_of_init_from(start, finished, tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [b"re", b"red"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (tmp_path / "own.tiktoken").write_text("".join(lines))
    line = start("ldm", f"--init_from={finished('ldm').out}", f"--tokenizer={tmp_path}/own.tiktoken").fail()
    assert re.search("out was trained with another tokenizer than .*/own.tiktoken: leave it out", line)


def test_a_setting_given_beside_init_from_counts_though_it_is_the_default(start, finished):
    message = start("ldm", f"--init_from={finished('ldm').out}", "--channels=320", "--norm_groups=32").fail()
    wanted = "channels: 8 in the model, 320 asked for; norm_groups: 4 in the model, 32 asked for"
    assert f"brings its own settings ({wanted}): leave them out" in message


def test_a_caption_that_does_not_read_is_no_end(start, tmp_path):
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        with tarfile.open(tmp_path / "data" / f"{part}-0.tar", "w") as tar:
            for i in range(12):
                image, caption = io.BytesIO(), json.dumps({"text": f"a picture of {i}"}).encode()
                Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(image, "JPEG")
                for name, data in ((f"{i}.jpg", image.getvalue()), (f"{i}.json", caption[: -9 * (i == 0)] or caption)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    run = start("ldm", f"--dataset={tmp_path / 'data'}", "--max_steps=5", folder=tmp_path).finish()
    assert run.checkpoint[1]["shown"] == ["a picture of 1", "a picture of 2", "a picture of 3"]
    assert "its caption does not read" in run.stdout


# -- tasks, towers, classes as tokens --


@pytest.fixture(scope="session")
def told_data(small_data, tmp_path_factory):
    """small_data with label maps and boxes."""
    root = tmp_path_factory.mktemp("told") / "data"
    shutil.copytree(small_data, root)
    for part in ("train", "val"):
        images, labels = np.load(root / part / "images.npy"), np.load(root / part / "labels.npy")
        maps = (images.max(-1) > 120) * (labels[:, None, None] + 1)
        np.save(root / part / "maps.npy", maps.astype(np.uint8))
        lines = []
        for image, label in zip(images, labels):
            rows, columns = np.where(image.max(-1) > 120)
            box = [int(v) for v in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)]
            name = "red green blue".split()[label]
            objects = {"bbox": [box], "categories": [f"{name} blob"]}
            lines.append(json.dumps({"text": [f"a {name} blob"], "objects": objects}))
        (root / part / "captions.jsonl").write_text("\n".join(lines) + "\n")
    (root / "map_classes.json").write_text(json.dumps(["ground", "red", "green", "blue"]))
    return root


TASKS = {
    "inpaint": ("--task=inpaint", "--cond=text"),
    "sr": ("--task=sr", "--cond=none", "--transformer_depth=0", "--sr_scale=2", "--sr_noise=300"),
    "sr bicubic": ("--task=sr", "--cond=none", "--transformer_depth=0", "--sr_scale=4", "--sr_kind=bicubic"),
    "semantic": ("--task=semantic", "--cond=class", "--transformer_depth=0"),
    "layout": ("--cond=layout",),
    "pixels": ("--task=inpaint", "--cond=none", "--transformer_depth=0", "--first_stage=none", "--cache_latents=false"),
    "tokens": ("--cond=class", "--class_embed=token"),
    "all": (
        "--task=semantic",
        "--cond=layout",
        "--loss_weight=uncertainty",
        "--offset_noise=0.1",
        "--ema_stds=0.05,0.1",
    ),
}


@pytest.fixture(scope="session")
def tasked(start, told_data):
    """tasked(name): a run of that task, four steps long, made once for all tests."""

    @functools.cache
    def tasked(name):
        args = (*TASKS[name], f"--dataset={told_data}", "--max_steps=4", "--eval_every=4", "--snapshot_every=2")
        return start("ldm", *args, keep=True).finish()

    return tasked


@pytest.mark.parametrize("name", TASKS)
def test_a_task_trains_and_shows_what_it_draws(name, tasked):
    run = tasked(name)
    tensors, meta = run.checkpoint
    first = tensors["model.unet.input_blocks.0.0.weight"].shape[1]
    assert first == {"inpaint": 9, "sr": 7, "sr bicubic": 7, "semantic": 7, "pixels": 7, "all": 7}.get(name, 4)
    assert tensors["ema.unet.conv_out.weight"].abs().max() > 0
    if name in ("semantic", "all"):
        assert tensors["model.rescaler.conv.weight"].shape == (3, 4, 1, 1)
    if name == "sr":
        assert tensors["model.unet.class_embed.weight"].shape[0] == 1000
    if name == "tokens":
        assert tensors["model.class_tokens.weight"].shape == (4, 16) and "model.unet.class_embed.weight" not in tensors
    if name == "layout":
        assert meta["shown"][0].startswith(("red blob 0.", "green blob 0.", "blue blob 0."))
        assert len(tensors["model.text.token_embedding.weight"]) == 3 + 32 * 32 + 2
    with Image.open(run.out / "samples_00000004.png") as grid, Image.open(run.out / "predictions_00000004.png") as seen:
        assert seen.size[0] == 6 * 132 and grid.size[0] in (2 * 132, 4 * 132), "what was shown beside what was drawn"
    pipeline, given = sample.load_pipeline(str(run.out)), {}
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    task = TASKS[name][0].removeprefix("--task=")
    if task == "inpaint":
        mask = torch.zeros(2, 1, 16, 16)
        mask[:, :, 4:12, 4:12] = 1
        given = {"image": image, "mask": mask}
    elif task == "sr":
        given = {"low": image[..., :: meta["model"]["sr_scale"], :: meta["model"]["sr_scale"]]}
    elif task == "semantic":
        given = {"map": torch.randint(-1, 4, (2, 16, 16))}
    pictures = sample.generate(pipeline, pipeline.shown[:2], [0, 1], 2, 2.0, given=given)
    assert pictures.shape == (2, 3, 16, 16) and pictures.isfinite().all()
    other = {key: t.flip(-1) for key, t in given.items()}
    if given:
        assert not torch.equal(sample.generate(pipeline, pipeline.shown[:2], [0, 1], 2, 2.0, given=other), pictures)


@pytest.mark.parametrize("name", ["inpaint", "sr", "all"])
def test_a_task_resumes_bit_for_bit_and_two_ranks_are_one(name, tasked, start, told_data, tmp_path):
    args = (*TASKS[name], f"--dataset={told_data}", "--eval_every=4", "--snapshot_every=2")
    half = start("ldm", *args, "--max_steps=2", folder=tmp_path).finish()
    assert half.checkpoint[1]["step"] == 2
    assert_same(
        start("ldm", *args, "--max_steps=4", folder=tmp_path).finish().checkpoint[0], tasked(name).checkpoint[0]
    )
    one = start("ldm", *args, "--max_steps=2", "--dtype=float64").finish()
    two = start("ldm", *args, "--max_steps=2", "--dtype=float64", "--batch_size=1", "--grad_accum=2", ranks=2).finish()
    assert_same(one.checkpoint[0], two.checkpoint[0], atol=1e-9)


def test_going_on_with_other_classes_is_one_line(tasked, start, told_data, tmp_path):
    shutil.copytree(told_data, tmp_path / "data")
    for file in ("map_classes.json", "classes.json"):
        (tmp_path / "data" / file).write_text(json.dumps([f"class {i}" for i in range(20)]))
        if file == "map_classes.json":
            line = start("ldm", f"--dataset={tmp_path}/data", f"--init_from={tasked('semantic').out}").fail()
            assert re.search("out has map_classes=4, .*/data 20: name as many there", line)
    for name in ("semantic", "tokens"):
        line = start("ldm", f"--dataset={tmp_path}/data", f"--init_from={tasked(name).out}").fail()
        assert re.search("out has num_classes=3, .*/data 20: name as many there", line)


def test_a_snapshot_takes_the_autoencoder_from_its_run(tasked, tmp_path):
    run = tasked("all")
    snapshot, beside = tmp_path / "ema_00000002.safetensors", tmp_path / "latest.safetensors"
    shutil.copy(run.out / "ema_00000002.safetensors", snapshot)
    assert not any(name.startswith("vae.") for name in read(snapshot)[0])
    message = "ema_00000002.safetensors's autoencoder is in the latest.safetensors of its run: put that beside it"
    with pytest.raises(ValueError, match=message):
        sample.load_pipeline(str(snapshot))
    shutil.copy(tasked("inpaint").out / "latest.safetensors", beside)  # of another run
    with pytest.raises(ValueError, match=message):
        sample.load_pipeline(str(snapshot))
    shutil.copy(run.out / "latest.safetensors", beside)
    pipeline, whole = sample.load_pipeline(str(snapshot)), sample.load_pipeline(str(beside))
    assert_same(pipeline.vae.state_dict(), whole.vae.state_dict())
    tensors, meta = read(snapshot)
    assert_same(pipeline.denoiser.state_dict(), train_ldm.without_prefix("ema", tensors))
    del meta["snapshot"]  # as snapshots were before, the autoencoder in them
    tensors |= {name: t for name, t in read(beside)[0].items() if name.startswith("vae.")}
    (tmp_path / "old").mkdir()
    train_ldm.save_checkpoint(f"{tmp_path}/old/ema_1.safetensors", tensors, meta)
    assert_same(VAE.from_pretrained(f"{tmp_path}/old/ema_1.safetensors").state_dict(), whole.vae.state_dict())


def test_a_run_makes_averages_of_any_length(tasked):
    run = tasked("all")
    model = {n: t for n, t in run.checkpoint[0].items() if n.startswith("model.")}
    for std in (0.05, 0.1, 0.15):
        denoiser = sample.load_pipeline(str(run.out), std).denoiser
        assert denoiser.state_dict().keys() == {n.removeprefix("model.") for n in model}
    kept = convert.posthoc_ema(str(run.out), 0.1)["ema.unet.conv_out.weight"]
    torch.testing.assert_close(kept, run.checkpoint[0]["ema_power_1.unet.conv_out.weight"], rtol=1e-3, atol=1e-6)
    assert not torch.equal(run.checkpoint[0]["ema_power_0.unet.conv_out.weight"], kept)


def test_a_frozen_tower_is_named_and_left_alone(small_data, first_stage, tmp_path, test_data, monkeypatch, capsys):
    """In this process, with a small tower in the place of CLIP's; the real ones' widths are those of test_text.py."""
    small = dict(width=64, layers=2, heads=1, activation="quick_gelu", layer="last", pad="end")
    monkeypatch.setitem(CLIPTextEncoder.towers, "clip_l", small)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(tmp_path)
    merges, weights = str(test_data / "assets/bpe_simple_vocab_16e6.txt.gz"), f"{tmp_path}/tower.safetensors"
    torch.manual_seed(0)
    tower = CLIPTextEncoder.named("clip_l", merges)
    save_file(tower.state_dict(), weights)
    places = f"--dataset={small_data} --first_stage={first_stage} --cache_dir=cache --tower_weights={weights}"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def train(*args):
        line = f"{helpers.ARGS['ldm']} {places} --text_encoder=clip_l --clip_vocab={merges}".split()
        monkeypatch.setattr(sys, "argv", ["train_ldm.py", *line, *args])
        try:
            runpy.run_path(train_ldm.__file__, run_name="__main__")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    train("--max_steps=2")
    tensors, meta = read("out/latest.safetensors")
    assert not any(name.startswith(("model.text", "ema.text", "text.")) for name in tensors)
    assert meta["model"]["text_encoder"] == "clip_l" and meta["model"]["tower_hash"] == convert.hash_weights(tower)
    assert tensors["model.unet.middle_block.1.blocks.0.attn2.to_k.weight"].shape[1] == 64
    pipeline = sample.load_pipeline("out")
    draw = functools.partial(sample.generate, pipeline, seeds=[0], steps=2, cfg=2.0)
    assert not torch.equal(draw(["a red blob"]), draw(["a blue blob"]))
    train("--max_steps=3")
    assert read("out/latest.safetensors")[1]["step"] == 3
    with torch.no_grad():
        tower.norm_out.bias += 1
    save_file(tower.state_dict(), weights)
    with pytest.raises(ValueError, match="tower_hash: [0-9a-f]* in the checkpoint, [0-9a-f]* now"):
        train("--max_steps=4")
    save_file({"other": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="tower.safetensors holds no text tower of CLIP's"):
        train("--out_dir=new")


@pytest.mark.parametrize(
    "args, wanted",
    [
        ("--task=sr --sr_scale=3", "an image of 16 x 16 is not to be divided by scale 3: set another scale"),
        ("--task=semantic", "has no semantic maps: add KEY.map.png"),
        ("--cond=layout", "has no objects: give"),
        ("--cond=class --text_encoder=clip_l", "text_encoder=clip_l has a meaning for cond=text alone: leave it out"),
        ("--sr_noise=3", "sr_noise=3 has a meaning for task=sr alone"),
        ("--task=inpaint --prompts=FILE", "prompts=FILE has a meaning for cond=text, or layout, and no task alone"),
        ("--cond=none --sample_steps=5000", "steps is 5000: more than 1000"),
        ("--task=sr --sr_noise=1000", "sr_noise=1000 is not a level: choose 0 to 999"),
        ("--task=sr --sr_noise=9 --cond=class", "sr_noise and cond=class both want the class embedding"),
        ("--ema_stds=0.5", "ema_stds: 0.5 is no relative length"),
        ("--text_encoder=clip_l", "text_encoder=clip_l wants tower_weights=FILE"),
        ("--zero_snr=True --schedule=scaled_linear --objective=eps", "zero_snr"),
        ("--loss_weight=snr", "loss_weight=snr is not one of none, min_snr, uncertainty"),
        ("--offset_noise=-1", "offset_noise=-1.0 must not be negative"),
        ("--cond_drop=0", "cond_drop=0 trains no empty condition, for cfg=3.0 to guide away from: set cfg=1"),
    ],
)
def test_settings_that_do_not_go_together(args, wanted, start):
    assert re.search(wanted, start("ldm", *args.split()).fail())


CONFIGS = sorted(Path(train_ldm.__file__).parent.glob("config/*_ldm.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_name_settings_that_exist_and_count_their_parameters(path):
    """A recipe that tells its parameters has as many; the published counts are exact in test_unet.py."""
    scope = {name: setting.default for name, setting in configurator.find_settings(vars(train_ldm)).items()}
    config = scope | configurator.parse([str(path)], scope)
    train_ldm.check_settings(config)
    told = re.search(r"([\d.]+) M parameters", path.read_text().split("\n")[0])
    if not told:
        return
    latents = 3 if "f4" in config["first_stage"] else 4
    concat = {"none": 0, "inpaint": 1 + latents, "sr": 3, "semantic": 3}[config["task"]]
    context = config["text_width"] if config["cond"] in ("text", "layout") or config["class_embed"] == "token" else 0
    arguments = {name: config[name] for name in inspect.signature(UNet).parameters if name in config}
    with torch.device("meta"):
        unet = UNet(
            **arguments | dict(in_channels=latents, out_channels=latents, concat_channels=concat, context_dim=context)
        )
    assert f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f}" == told[1]


# -- what runs must really do --


def test_example_predictions_are_x0_hat():
    """Of a network that knows the noise: the truth, at every t; of one that says nothing, x_t / alpha."""
    x0, eps = torch.randn(2, 3, 4, 4) / 4, torch.randn(2, 3, 4, 4)

    def draw(net):
        cfg = settings(objective="eps", schedule="flow")
        return train_ldm.example_predictions(net, None, {"x0": x0}, eps, cfg, contextlib.nullcontext)

    seen = draw(lambda x, t: eps)
    assert seen.shape == (2, 6, 3, 4, 4)
    torch.testing.assert_close(seen, x0[:, None].expand(-1, 6, -1, -1, -1).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    blind, t = draw(lambda x, t: torch.zeros_like(x)), torch.tensor([0, 0.1, 0.3, 0.5, 0.7, 0.9]).view(1, 6, 1, 1, 1)
    torch.testing.assert_close(blind, (x0[:, None] + t / (1 - t) * eps[:, None]).clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_settings_of_noise_reach_the_loss(start, tasked, told_data):
    """The same run without the setting has another first loss."""
    args = ("--task=sr", "--cond=none", "--transformer_depth=0", "--sr_scale=2", f"--dataset={told_data}")
    plain = start("ldm", *args, "--max_steps=2").finish().log
    assert plain[1]["loss"] != tasked("sr").log[1]["loss"], "sr_noise"
    for setting in ("--offset_noise=0.5", "--loss_type=l1", "--loss_weight=min_snr", "--timesteps=shifted"):
        assert start("ldm", *args, setting, "--max_steps=2").finish().log[1]["loss"] != plain[1]["loss"], setting


def test_a_class_that_validation_alone_has_is_left_out_of_layouts(told_data, start, tmp_path):
    shutil.copytree(told_data, tmp_path / "data")
    path = tmp_path / "data/val/captions.jsonl"
    path.write_text(path.read_text().replace("blue blob", "unheard-of blob"))
    run = start("ldm", "--cond=layout", f"--dataset={tmp_path}/data", "--max_steps=1").finish()
    assert not any("unheard-of" in prompt for prompt in run.checkpoint[1]["shown"])


def test_a_run_from_before_tasks_goes_on(start, finished, tmp_path):
    """Its checkpoint lacks the settings that came later."""
    folder = continued(finished("ldm"), tmp_path)
    tensors, meta = read(folder / "out/latest.safetensors")
    for name in ("class_embed", "zero_snr", "uncertainty", "ema_stds", "text_encoder", "tower_hash", "task"):
        del meta["model"][name]
    train_ldm.save_checkpoint(str(folder / "out/latest.safetensors"), tensors, meta)
    assert start("ldm", "--max_steps=7", folder=folder).finish().checkpoint[1]["step"] == 7


def test_grids_of_a_task_show_conditions_of_the_very_pictures(told_data, start, monkeypatch, tmp_path):
    """Conditions, classes and prompts come from the same validation images."""
    seen = {}
    monkeypatch.setattr(sample, "save_grid", lambda path, images, names, *rest, **more: seen.update({path: names}))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(told_data, "data")
    np.save("data/val/labels.npy", np.resize([1, -1, 2], len(np.load("data/val/labels.npy"))))
    Path("data/classes.json").write_text('["none", "one", "two"]')
    places = "--dataset=data --first_stage=none --cache_latents=false --task=inpaint --cond=class --max_steps=1"
    monkeypatch.setattr(sys, "argv", ["train_ldm.py", *f"{helpers.ARGS['ldm']} {places} --transformer_depth=0".split()])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        runpy.run_path(train_ldm.__file__, run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert seen["out/samples_00000001.png"][1::2] == ["one", "", "two"], "what has no label is drawn without one"
