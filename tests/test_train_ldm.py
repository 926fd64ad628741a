import base64
import contextlib
import functools
import inspect
import json
import math
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same, machine, numbers, read, resume_folder
from PIL import Image
from safetensors.torch import save_file

import checkpoint
import convert
import train_ldm
from checkpoint import UserError, part
from configurator import configure
from data.cache import LatentCache
from data.dataset import BadImage, Dataset, Stream, collate, seed_of, to_mode
from diffusion import to_x0
from sample import Pipeline
from text import CLIPTextEncoder, TextEncoder
from train_ldm import Conditioner, prediction_error, step_noise, train_step
from unet import Denoiser, UNet
from vae import VAE

SIX_STEPS = ("--eval_every=3", "--save_every=3", "--snapshot_every=3")
PLAIN = ("--cond=none", "--transformer_depth=0")
objectives = pytest.mark.parametrize("objective", ("eps", "v", "x0", "flow"))


def settings(**values):
    """The script's settings, with a small batch and nothing but the plain loss."""
    plain = dict(cond="none", objective="v", schedule="cosine", timesteps="uniform", batch_size=4)
    return configure(vars(train_ldm).copy(), []).replace(**plain | dict(sr_scale=2) | values)


def inputs_of(x0, condition=None, null=None):
    return {"x0": x0, "condition": condition or {}, "null": null or {}}


def random_noise(n, shape=(4, 8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = {"eps": torch.randn((n, *shape), generator=generator)}
    return noise | {name: torch.rand(n, generator=generator) for name in ("t", "drop")}


class Recorder(torch.nn.Module):
    """A network that predicts zero and records its inputs."""

    def forward(self, x, t, **condition):
        self.x, self.t, self.condition = x, t, condition
        return torch.zeros_like(x)


# --- loss ---


def by_hand(schedule, t):
    """(alpha, sigma, what the network gets for t) by the published formulas, in float64."""
    if schedule == "cosine":
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t), 1000 * t
    if schedule == "flow":
        return 1 - t, t, 1000 * t
    power = 1 if schedule == "linear" else 2
    betas = torch.linspace(0.00085 ** (1 / power), 0.012 ** (1 / power), 1000, dtype=torch.float64) ** power
    index = torch.floor(1000 * t)
    alpha_bar = torch.cumprod(1 - betas, 0)[index.long()]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), index


@objectives
@pytest.mark.parametrize("schedule", ("cosine", "flow", "linear", "scaled_linear"))
def test_loss_of_a_zero_prediction(objective, schedule):
    x0, noise, net = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1)), random_noise(6), Recorder()
    t = noise["t"].double() * (0.995 if objective == "eps" and schedule in ("cosine", "flow") else 1)
    alpha, sigma, unet_time = by_hand(schedule, t)
    alpha, sigma, eps = alpha.float().view(-1, 1, 1, 1), sigma.float().view(-1, 1, 1, 1), noise["eps"]
    target = {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0, "flow": eps - x0}[objective]
    cfg = settings(objective=objective, schedule=schedule)
    errors, weights, log_variance = prediction_error(net, inputs_of(x0), noise, cfg)
    assert (weights == 1).all() and log_variance is None and not net.condition
    torch.testing.assert_close(errors, (target**2).mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.x, alpha * x0 + sigma * eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.t, unet_time.float(), rtol=1e-4, atol=1e-3)
    terms = train_step(net, inputs_of(x0), noise, cfg)
    assert terms["loss"] == errors.mean()
    tenths = (10 * t.float()).long() if schedule in ("cosine", "flow") else ((torch.floor(1000 * t) + 1) / 100).long()
    for k in range(10):
        inside = errors[tenths == k]
        assert terms["error_by_t"][:, k].tolist() == pytest.approx([inside.sum().item(), len(inside)])
    # min-SNR weighs the error of x0
    cfg = cfg.replace(loss_weight="min_snr", min_snr_gamma=3.0)
    error, weight, _ = prediction_error(net, inputs_of(x0), noise, cfg)
    x0_hat = to_x0(objective, torch.zeros(()), net.x.double(), alpha, sigma)
    snr = (alpha / sigma).square().flatten()
    expected = snr.clamp(max=3.0) * (x0_hat - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close((weight * error).double(), expected.double(), rtol=1e-3, atol=1e-5)
    assert train_step(net, inputs_of(x0), noise, cfg)["loss"].item() == pytest.approx((weight * error).mean().item())


def test_times_of_training():
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    logits = torch.logit(train_ldm.training_times(u, settings(timesteps="logit_normal", t_mean=0.4, t_std=0.7)))
    assert logits.mean().item() == pytest.approx(0.4, abs=5e-3) and logits.std().item() == pytest.approx(0.7, abs=5e-3)
    t = train_ldm.training_times(u, settings(timesteps="shifted", t_shift=3.0))  # SD3, eq. 23
    torch.testing.assert_close(t / (1 - t), 3 * u / (1 - u))
    grid = 1000 * train_ldm.training_times(torch.cat([u, u.new_ones(1)]), settings(schedule="linear"))
    torch.testing.assert_close(grid, grid.round())
    assert grid.min() == 1 and grid.max() == 1000


@objectives
def test_min_snr_is_finite_from_data_to_noise(objective):
    noise = {"eps": torch.randn(3, 1, 2, 2), "t": torch.tensor([0, 0.5, 1.0]), "drop": torch.ones(3)}
    cfg = settings(objective=objective, schedule="flow", loss_weight="min_snr")
    assert train_step(Recorder(), inputs_of(torch.randn(3, 1, 2, 2)), noise, cfg)["loss"].isfinite()


def test_loss_types_and_offset_noise():
    x0, noise, net = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1)), random_noise(6), Recorder()
    huber = torch.where(x0.abs() < 0.5, x0**2 / 2, 0.5 * (x0.abs() - 0.25))
    for loss_type, expected in (("l1", x0.abs()), ("huber", huber)):
        error, _, _ = prediction_error(
            net, inputs_of(x0), noise, settings(objective="x0", loss_type=loss_type, huber_delta=0.5)
        )
        torch.testing.assert_close(error, expected.mean(dim=(1, 2, 3)))
    noise["offset"] = torch.randn(6, 4, 1, 1)
    cfg = settings(objective="eps", schedule="flow", offset_noise=0.5)
    error, _, _ = prediction_error(net, inputs_of(0 * x0), noise, cfg)
    eps = noise["eps"] + 0.5 * noise["offset"]
    torch.testing.assert_close(error, eps.square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(net.x, (net.t / 1000).view(-1, 1, 1, 1) * eps)


def test_uncertainty():
    unet = UNet(channels=8, channel_mult=(1,), num_res_blocks=1, attention_ds=(), num_heads=1, norm_groups=4)
    net, x0, noise = Denoiser(unet, uncertainty=True), torch.randn(8, 4, 8, 8), random_noise(8)
    torch.nn.init.normal_(net.log_variance.weight)
    error, _, u = prediction_error(net, inputs_of(x0), noise, settings())
    assert u.shape == (8,) and u.std() > 0.1
    torch.testing.assert_close(train_step(net, inputs_of(x0), noise, settings())["loss"], (error / u.exp() + u).mean())


@pytest.mark.parametrize("cond_drop", (0.0, 0.3, 1.0))
def test_conditions_are_dropped_at_their_rate(cond_drop):
    n, net, noise = 1000, Recorder(), random_noise(1000, (1, 1, 1))
    x0, concat = torch.zeros(n, 1, 1, 1), torch.rand(n, 5, 7)
    for name, value in (("tokens", torch.arange(5 * n).view(n, 5)), ("context", concat), ("y", torch.arange(n))):
        null = torch.full_like(value[:1], -1)
        inputs = inputs_of(x0, {name: value, "concat": concat}, {name: null})
        prediction_error(net, inputs, noise, settings(cond_drop=cond_drop))
        assert set(net.condition) == {name, "concat"} and net.condition["concat"] is concat, "images are never dropped"
        dropped = (net.condition[name] == -1).view(n, -1).all(dim=1)
        assert dropped.double().mean().item() == pytest.approx(cond_drop, abs=0.04)
        assert torch.equal(net.condition[name][~dropped], value[~dropped])


def test_noise_is_a_slice_of_the_global_batch():
    cfg = settings(offset_noise=0.1, sr_noise=5)
    one = step_noise(3, (4, 8, 8), 2, cfg, machine(), 1)[0]
    shapes = dict(posterior=(4, 8, 8), eps=(4, 8, 8), t=(), drop=(), level=(), offset=(4, 1, 1), low=(3, 8, 8))
    assert {name: tuple(n.shape) for name, n in one.items()} == {name: (4, *shape) for name, shape in shapes.items()}
    small = cfg.replace(batch_size=1)
    ranks = [step_noise(3, (4, 8, 8), 2, small, machine(rank, 2), 2) for rank in range(2)]
    for name, n in one.items():
        assert torch.equal(torch.cat([ranks[rank][micro][name] for micro in range(2) for rank in range(2)]), n), name
        assert len(n.flatten(1).unique(dim=0) if n.ndim > 1 else n.unique()) == 4, "every image has its own"
        assert not torch.equal(n, step_noise(4, (4, 8, 8), 2, cfg, machine(), 1)[0][name])
        assert not torch.equal(n, step_noise(3, (4, 8, 8), 2, cfg.replace(seed=1), machine(), 1)[0][name])


# --- averages ---


# --- conditioning and evaluation ---


def conditioner(vae=None, text=None, num_classes=0, **values):
    cfg = settings(first_stage="none" if vae is None else "vae", **values)
    return Conditioner(cfg, machine(), contextlib.nullcontext(), vae, text, None, num_classes, 0, None)


def test_inputs_of_a_batch():
    batch = dict(image=torch.randn(3, 3, 16, 16), label=torch.tensor([2, -1, 0]), text=["a", "", "b"])
    inputs = conditioner(cond="class", num_classes=5)(batch, {})
    assert torch.equal(inputs["x0"], batch["image"]) and set(inputs["condition"]) == {"y"}
    assert inputs["condition"]["y"].tolist() == [2, 5, 0] and inputs["null"]["y"].tolist() == [5]
    text = TextEncoder(16, 1, 2, 12)
    inputs = conditioner(text=text, cond="text")(batch, {})
    assert torch.equal(inputs["condition"]["tokens"], text.tokenize(["a", "", "b"]))
    assert torch.equal(inputs["null"]["tokens"], inputs["condition"]["tokens"][1:2])
    batch |= {"condition": {"low": torch.randn(3, 3, 8, 8)}}
    noise = {"level": torch.tensor([0, 0.5, 0.999]), "low": torch.ones(3, 3, 8, 8)}
    condition = conditioner(task="sr", sr_noise=9)(batch, noise)["condition"]
    assert condition["y"].tolist() == [0, 5, 9] and condition["concat"].shape == (3, 3, 16, 16)
    assert not conditioner(task="sr", sr_noise=9)(batch)["condition"]["y"].any(), "no noise in evaluation"


def test_latents_are_the_same_cached_on_the_device_or_encoded_now(small_data, first_stage, tmp_path):
    vae = VAE.from_pretrained(str(first_stage))
    stream = Stream(Dataset(small_data, "train", 16), 0, flip=True)
    cache = LatentCache(stream, vae, tmp_path)
    cache.build(vae, torch.device("cpu"), contextlib.nullcontext(), 0, 0, 1)
    noise, rows = {"posterior": torch.randn(6, 4, 8, 8)}, range(6)
    encoded = conditioner(vae, cache_latents=False)(collate([stream[i] for i in rows]), noise)["x0"]
    cached = conditioner(vae)(collate([cache[i] for i in rows]), noise)["x0"]
    torch.testing.assert_close(cached, encoded, atol=5e-3, rtol=5e-3)  # float16
    resident = conditioner(vae, latents_on_device="true")
    resident.keep_latents(cache)
    assert torch.equal(resident(collate([cache[i] for i in rows]), noise)["x0"], cached)


def test_evaluation_gives_every_image_its_own_noise_and_time():
    items = [dict(image=torch.zeros(3, 8, 8), label=1, index=0, flip=False, text="", key="", bad=[])] * 37
    inputs = conditioner(cond="class", num_classes=5)

    def run(batch_size):
        net = Recorder()
        cfg = settings(objective="eps", batch_size=batch_size, cond_drop=1.0, timesteps="shifted")
        scores = train_ldm.evaluate(net, items, inputs, cfg, machine(), contextlib.nullcontext())
        assert (net.condition["y"] == 1).all(), "no condition is dropped"
        return scores

    losses, bins = [], [[] for _ in range(10)]
    for i in range(37):
        eps = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed_of("val", i)))
        losses.append(eps.square().mean().item())
        bins[int(10 * ((0.5 + i * (5**0.5 - 1) / 2) % 1))].append(losses[-1])
    scores = run(5)
    assert scores["val_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert scores["val_loss_by_t"] == pytest.approx([np.mean(b) for b in bins], rel=1e-6)
    assert run(7)["val_loss_by_t"] == pytest.approx(scores["val_loss_by_t"], rel=1e-12)


def test_predictions_are_x0_hat(monkeypatch):
    """Of a zero prediction of the noise: x_t / alpha."""
    found, x0 = [], torch.randn(2, 3, 4, 4) / 4
    monkeypatch.setattr(train_ldm, "save_grid", lambda path, grid, *args, columns: found.append(grid))
    table, inputs = train_ldm.noise_schedule(settings(schedule="flow")), inputs_of(x0)
    pipeline = Pipeline(lambda x, t: 0 * x, None, table, "eps", (3, 4, 4), 0, [], [])
    train_ldm.save_predictions("a.png", pipeline, inputs, contextlib.nullcontext())
    eps, t = (
        torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 0.1, 0.3, 0.5, 0.7, 0.9]),
    )
    expected = x0[:, None] + (t / (1 - t)).view(1, 6, 1, 1, 1) * eps[:, None]
    torch.testing.assert_close(found[0], expected.flatten(0, 1).clamp(-1, 1), rtol=1e-4, atol=1e-4)


# --- runs: resume, ranks, stops ---


@pytest.mark.parametrize("ranks", (1, 2))
def test_a_killed_run_resumes_bit_for_bit(ranks, start, finished, killed, tmp_path):
    before = killed("ldm", ranks)
    assert before.checkpoint[1]["step"] == 3 and before.log[-1]["step"] == 4
    args = (*SIX_STEPS, f"--batch_size={4 // ranks}")
    resumed = start("ldm", *args, ranks=ranks, folder=resume_folder(before, tmp_path)).finish()
    tensors, meta = finished("ldm", ranks).checkpoint
    assert_same(resumed.checkpoint[0], tensors)
    assert resumed.checkpoint[1]["step"] == meta["step"] == 6 and meta["images_seen"] == 24
    assert numbers(resumed.log) == numbers(finished("ldm", ranks).log)


def test_a_sharded_optimizer_changes_nothing(start, finished, killed, tmp_path):
    args = (*SIX_STEPS, "--batch_size=2", "--shard_optimizer=true")
    sharded = start("ldm", *args, ranks=2).finish()
    assert_same(sharded.checkpoint[0], finished("ldm", 2).checkpoint[0])
    resumed = start("ldm", *args, ranks=2, folder=resume_folder(killed("ldm", 2), tmp_path)).finish()
    assert_same(resumed.checkpoint[0], finished("ldm", 2).checkpoint[0])


@pytest.mark.parametrize("ranks", (1, 2))
def test_a_bad_step_ends_the_run_and_is_not_saved(ranks, start):
    """NaN in the noise of step 4, on the last rank alone, noticed at the next log line."""
    poison = "import torch, diffusion\nfrom torch.distributed import get_rank\nold, calls = diffusion.target, [0]\n"
    poison += f"def target(*args):\n    calls[0] += 1\n    last = {ranks} == 1 or get_rank() == 1\n"
    poison += "    return old(*args) * (float('nan') if calls[0] == 4 and last else 1)\ndiffusion.target = target"
    args = ("--save_every=2", "--log_every=5", f"--batch_size={4 // ranks}", "--eval_every=50")
    run = start("ldm", *args, ranks=ranks, first=poison, keep=True)
    codes = run.wait()
    assert all(codes) and "not finite at step 4; the weights were not updated; last checkpoint: out/" in run.stderr
    tensors, meta = run.checkpoint
    assert meta["step"] == 2 and all(t.isfinite().all() for t in tensors.values())
    for rank in range(ranks):
        assert all(t.isfinite().all() for t in read(run.folder / f"rank{rank}.safetensors")[0].values())


def test_a_full_disk(start, killed, tmp_path):
    path = resume_folder(killed("ldm"), tmp_path) / "out/latest.safetensors"
    before = path.read_bytes()
    message = start("ldm", "--save_every=5", "--val_images=2", limit=len(before) // 2, folder=tmp_path).fail()
    assert re.search("latest.safetensors: could not be saved .*; free disk space and run again", message)
    assert path.read_bytes() == before and not list((tmp_path / "out").glob("*.tmp"))


def test_what_a_run_leaves(finished):
    run = finished("ldm")
    assert [r["step"] for r in run.log if "loss" in r] == [1, 2, 3, 4, 5, 6]
    evaluated = [r for r in run.log if "val_loss" in r]
    assert [r["step"] for r in evaluated] == [3, 6] and all(len(r["val_loss_by_t"]) == 10 for r in evaluated)
    assert all(len(r["error_by_t"]) == 10 for r in run.log)
    assert run.log[0]["lr"] == pytest.approx(1e-3 / 3) and run.log[-1]["lr"] == 1e-3
    names = {f"{name}_{step:08d}.png" for name in ("samples", "predictions") for step in (3, 6)}
    names |= {f"ema_{step:08d}.safetensors" for step in (3, 6)}
    names |= {"latest.safetensors", "log.jsonl", "loss.png", "settings.json"}
    assert {p.name for p in run.out.iterdir()} == names
    for path in run.out.glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 1, path
    tensors, meta = run.checkpoint
    assert sorted(meta["examples"]) == ["a blue blob", "a green blob", "a red blob"]
    assert meta["stage"] == "ldm" and meta["config"]["max_steps"] == 6
    assert "prompt cut to 12 tokens: a green blob" in run.stdout
    model, ema = part(tensors, "model"), part(tensors, "ema")
    first = read(run.out / "ema_00000003.safetensors")[0]
    for name in ("unet.conv_out.weight", "text.norm_out.bias"):
        assert not torch.equal(model[name], ema[name]) and not torch.equal(first[f"ema.{name}"], ema[name])


SYNCS = """
import sys, torch, common
from torch.utils._python_dispatch import TorchDispatchMode
aten = torch.ops.aten
set_lr, calls, waits = common.set_lr, [0], (aten._local_scalar_dense, aten.lift_fresh, aten.nonzero)

def counted(*args):
    calls[0] += 1
    set_lr(*args)

class Syncs(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in waits and calls[0] in (1, 2):
            frames, frame = [], sys._getframe(1)
            while frame:
                frames.append(frame.f_code.co_name)
                frame = frame.f_back
            if not {"tokenize", "__next__"} & set(frames):  # on the host
                print("waits:", func, frames[:6], flush=True)
        return func(*args, **(kwargs or {}))

common.set_lr = counted
Syncs().__enter__()
"""


def test_no_step_waits_for_the_device(start):
    """.item(), bool(tensor), x[0] = 1 and the like would each wait for a GPU; two that are planted are found."""
    args = ("--max_steps=3", "--log_every=10", "--val_images=2", "--ema_stds=0.1", "--optimizer=muon")
    assert "waits:" not in start("ldm", *args, first=SYNCS).finish().stdout
    planted = "lerp = torch._foreach_lerp_\ndef planted(*args):\n    bool(args[0][0].sum() > 0)\n    lerp(*args)\n"
    found = start("ldm", *args, first=f"{SYNCS}\n{planted}torch._foreach_lerp_ = planted").finish().stdout
    assert found.count("waits: aten._local_scalar_dense") == 6  # two steps: EMA, power EMA, momentum


# --- conditions and tasks ---

RUNS = {
    "inpaint": ("--task=inpaint", "--cond=text"),
    "sr": ("--task=sr", *PLAIN, "--sr_scale=2", "--sr_noise=300", "--image_size=24,16"),
    "small sr": ("--task=sr", *PLAIN, "--sr_scale=4", "--sr_degradation=bicubic"),
    "semantic": ("--task=semantic", "--cond=class", "--transformer_depth=0"),
    "layout": ("--cond=layout", "--image_size=24,16"),
    "pixels": ("--task=inpaint", *PLAIN, "--first_stage=none", "--unet_dropout=0.1", "--image_size=24,16"),
    "tokens": ("--cond=class", "--class_embed=token", "--cache_latents=false", "--workers=1"),
    "classes": (
        "--cond=class",
        "--transformer_depth=0",
        "--objective=eps",
        "--schedule=scaled_linear",
        "--latents_on_device=true",
    ),
    "all": (
        "--task=semantic",
        "--cond=layout",
        "--loss_weight=uncertainty",
        "--offset_noise=.1",
        "--ema_stds=.05,.1",
        "--optimizer=muon",
        "--image_size=24,16",
    ),  # fmt: skip
}


@pytest.fixture(scope="session")
def rich_data(small_data, tmp_path_factory):
    """small_data with label maps and boxes."""
    root = tmp_path_factory.mktemp("rich") / "data"
    shutil.copytree(small_data, root)
    for folder in ("train", "val"):
        images, labels = np.load(root / folder / "images.npy"), np.load(root / folder / "labels.npy")
        maps = (images.max(-1) > 120) * (labels[:, None, None] + 1)
        np.save(root / folder / "maps.npy", maps.astype(np.uint8))
        lines = []
        for image, label in zip(images, labels):
            rows, columns = np.where(image.max(-1) > 120)
            box = [int(v) for v in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)]
            name = f"{'red green blue'.split()[label]} blob"
            lines.append(json.dumps({"text": [f"a {name}"], "objects": {"bbox": [box], "categories": [name]}}))
        (root / folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    (root / "map_classes.json").write_text(json.dumps(["ground", "red", "green", "blue"]))
    return root


@pytest.fixture(scope="session")
def rich_run(start, rich_data):
    """rich_run(name): four steps of RUNS[name], run once for all tests."""

    @functools.cache
    def rich_run(name):
        args = (*RUNS[name], f"--dataset={rich_data}", "--max_steps=4", "--eval_every=4", "--snapshot_every=2")
        return start("ldm", *args, "--val_images=8").finish()

    return rich_run


@pytest.mark.parametrize("name", RUNS)
def test_each_condition_trains(name, rich_run):
    run = rich_run(name)
    tensors, meta = run.checkpoint
    inputs = {"inpaint": 9, "sr": 7, "small sr": 7, "semantic": 7, "pixels": 7, "all": 7}
    assert tensors["model.unet.input_blocks.0.0.weight"].shape[1] == inputs.get(name, 4)
    special = {
        "semantic": ("rescaler.conv.weight", (3, 4, 1, 1)),
        "sr": ("unet.class_embed.weight", (1000, 32)),
        "classes": ("unet.class_embed.weight", (4, 32)),
        "tokens": ("class_tokens.weight", (4, 16)),
        "layout": ("text.token_embedding.weight", (3 + 32 * 32 + 2, 16)),
        "all": ("log_variance.weight", (1, 64)),
    }
    if name in special:
        key, shape = special[name]
        assert tensors[f"model.{key}"].shape == shape
        assert not torch.equal(tensors[f"model.{key}"], tensors[f"ema.{key}"]), "it learns"
    if name == "layout":
        assert meta["examples"][0].startswith(("red blob 0.", "green blob 0.", "blue blob 0."))
    if name == "tokens":
        assert meta["examples"] == [0, 1, 2] and "model.unet.class_embed.weight" not in tensors
    assert any(name.startswith("vae.") for name in tensors) == (name != "pixels") == (meta["vae"] is not None)
    assert set(meta["model"]) == set(rich_run("inpaint").checkpoint[1]["model"]), "the same settings in every file"
    assert_same(Denoiser.from_pretrained(str(run.out)).state_dict(), part(tensors, "ema"))
    with Image.open(run.out / "samples_00000004.png") as grid, Image.open(run.out / "predictions_00000004.png") as rows:
        assert rows.size[0] == 6 * 132 and grid.size[0] in (2 * 132, 4 * 132)


@pytest.mark.parametrize("name", ["pixels", "all"])
def test_tasks_resume_bit_for_bit(name, rich_run, start, rich_data, tmp_path):
    args = (*RUNS[name], f"--dataset={rich_data}", "--eval_every=4", "--val_images=8")
    start("ldm", *args, "--max_steps=2", folder=tmp_path).finish()
    assert_same(start("ldm", *args, "--max_steps=4", folder=tmp_path).finish().checkpoint[0],
                rich_run(name).checkpoint[0])  # fmt: skip


def test_ranks_are_equal_with_everything_on(start, rich_data):
    args = (*RUNS["all"], f"--dataset={rich_data}", "--max_steps=2", "--dtype=float64", "--val_images=8")
    one = start("ldm", *args)
    two = start("ldm", *args, "--batch_size=1", "--grad_accum=2", ranks=2)
    assert_same(one.finish().checkpoint[0], two.finish().checkpoint[0], atol=1e-9)


IN_BUCKETS = {"vae": "--equivariance_prob=0.5 --disc_weight=0.5 --disc_layers=1 --disc_start=2"}
IN_BUCKETS["ldm"] = "--task=sr --sr_scale=2 --sr_noise=9 --cond=text"


@pytest.mark.parametrize("stage", IN_BUCKETS)
def test_buckets_resume_bit_for_bit_and_ranks_are_equal(stage, start, tmp_path):
    (tmp_path / "set").mkdir()
    for i, size in enumerate([(20, 12)] * 9 + [(16, 16)] * 6 + [(12, 20)] * 3):  # width, height
        noise = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"set/{i}.png")
        (tmp_path / f"set/{i}.txt").write_text(f"number {i}")
    args = (
        f"--dataset={tmp_path}/set --buckets --dtype=float64 --save_every=3 --grad_accum=2 {IN_BUCKETS[stage]}".split()
    )
    one = start(stage, *args, "--batch_size=2")
    two = start(stage, *args, "--batch_size=1", f"--cache_dir={tmp_path}/cache", ranks=2)
    one = one.finish()
    found = re.search("buckets: (.*)", one.stdout)[1]
    assert re.search("[789] images at 12x20.*[56] images at 16x16.*[23] images at 20x12", found), found
    assert_same(one.checkpoint[0], two.finish().checkpoint[0], atol=1e-9)
    killed = start(stage, *args, "--batch_size=2", trap=("step 5,", signal.SIGKILL), folder=tmp_path / "run")
    assert killed.wait() == [-signal.SIGKILL] and killed.checkpoint[1]["step"] == 3
    resumed = start(stage, *args, "--batch_size=2", folder=tmp_path / "run").finish()
    assert_same(resumed.checkpoint[0], one.checkpoint[0])


@pytest.mark.parametrize("mode, task", [("L", "sr"), ("RGBA", "semantic")])
def test_gray_and_rgba_in_both_stages(mode, task, start, rich_data, command, tmp_path):
    """Latents of an autoencoder, and pixels with a task; samples are in the mode, grids and fid.py's .npz in RGB."""
    data, channels = tmp_path / "data", len(mode)
    shutil.copytree(rich_data, data)
    for path in data.glob("*/images.npy"):
        images = np.load(path)
        np.save(path, images[..., :1] if mode == "L" else np.append(images, images.max(-1, keepdims=True), axis=-1))
    everything = (f"--dataset={data}", f"--image_mode={mode}", "--max_steps=2", "--val_images=8")
    gan = ("--disc_weight=1", "--disc_layers=1", "--disc_channels=16", "--disc_start=1")
    vae = start("vae", *everything, *gan).finish()
    assert vae.checkpoint[0]["model.encoder.conv_in.weight"].shape[1] == channels
    assert vae.checkpoint[0]["disc.main.0.weight"].shape[1] == channels
    evaluated = start("vae", "--eval_only=true", f"--ckpt={vae.out}", "--device=cpu", bare=True, folder=tmp_path)
    assert "psnr" in evaluated.finish().stdout
    first_stage = f"--first_stage={vae.out}"
    latent = start("ldm", *everything, *PLAIN, first_stage).finish()
    again = start("ldm", everything[0], *everything[2:], *PLAIN, first_stage, f"--init_from={latent.out}").finish()
    assert again.checkpoint[1]["model"]["image_mode"] == mode
    pixels = start("ldm", *everything, *PLAIN, "--first_stage=none", f"--task={task}", "--sr_scale=2").finish()
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(photo[..., 0] // 128 * 255).save("mask.png")
    Image.fromarray(photo[..., 0] % 4).save("map.png")
    inputs = "--init_image=photo.png" if task == "sr" else "--semantic_map=map.png"
    for run, *args in ((pixels, inputs), (latent, "--init_image=photo.png", "--mask=mask.png")):
        for path in (vae.out / "recon_00000002.png", run.out / "samples_00000002.png", vae.out / "eval.png"):
            assert Image.open(path).mode == "RGB"
        status, _, err = command("sample.py", f"--ckpt={run.out}", "--device=cpu", "--n=1", "--steps=2", *args)
        assert status == 0, err
        image = Image.open(run.out / "samples/00000.png")
        assert image.mode == mode and Image.open(run.out / "samples/grid.png").mode == "RGB"
    known = photo[..., 0] < 128
    assert np.array_equal(np.array(image)[known], np.array(to_mode(Image.fromarray(photo), mode))[known]), "alpha too"
    args = (f"--ckpt={latent.out}", "--device=cpu", "--num_samples=2", "--steps=1", "--samples=many.npz")
    assert command("fid.py", *args)[0] == 0 and np.load("many.npz")["arr_0"].shape == (2, 16, 16, 3)


def test_snapshots(rich_run):
    """They hold averages, which combine to one of another length, and no autoencoder."""
    run = rich_run("all")
    snapshot, meta = read(run.out / "ema_00000002.safetensors")
    assert {name.split(".")[0] for name in snapshot} == {"ema", "ema_power_0", "ema_power_1", "text"}
    assert meta["step"] == 2 and meta["snapshot"] and meta["run"] == run.checkpoint[1]["run"]
    combined = checkpoint.posthoc_ema(str(run.out), 0.1)["ema.unet.conv_out.weight"]
    power = [run.checkpoint[0][f"ema_power_{i}.unet.conv_out.weight"] for i in range(2)]
    torch.testing.assert_close(combined, power[1], rtol=1e-3, atol=1e-6)
    assert not torch.equal(*power)


def test_first_captions_are_spread_over_the_images():
    class Images(list):
        def meta(self, i):
            if i == 4:
                raise BadImage("its caption does not read")
            return {"text": [f"caption {i}", "another"][: i + 1]}

    found = train_ldm.first_captions(Images(range(10)), 5, None)
    assert found == [f"caption {i}" for i in (0, 2, 6, 8)]


def test_grids_of_a_task_use_the_same_images(monkeypatch):
    """Condition, class and sample in a grid are of one validation image."""
    grid, asked, items = [], [], []
    for i, label in enumerate((1, -1, 2)):
        condition = {"image": torch.full((3, 4, 4), float(i)), "mask": torch.zeros(1, 4, 4)}
        item = dict(image=condition["image"], label=label, index=i, flip=False, text="", key="", bad=[])
        items.append(item | {"condition": condition})
    network = torch.nn.Module()
    network.text = None
    pipeline = Pipeline(network, None, None, "v", (3, 4, 4), 3, ["zero", "one", "two"], [])

    def generate(pipeline, conditions, seeds, *args, inputs, **more):
        asked.extend(conditions)
        return inputs["image"] + 10

    monkeypatch.setattr(train_ldm, "generate", generate)
    monkeypatch.setattr(train_ldm, "save_grid", lambda path, *args, columns: grid.extend(args))
    cfg = settings(task="inpaint", cond="class", n_samples=8)
    train_ldm.save_samples("a.png", pipeline, items, cfg, contextlib.nullcontext())
    assert grid[1] == ["condition", "one", "condition", "", "condition", "two"] and asked == [1, 3, 2]
    assert grid[0][:, 0, 0, 0].tolist() == [0, 10, 1, 11, 2, 12]


# --- other models, towers, tokenizers ---


def test_init_from_a_run(start, rich_run, rich_data, tmp_path):
    run = rich_run("tokens")
    own = f"--dataset={rich_data} --device=cpu --workers=0 --batch_size=4 --n_samples=2 --sample_steps=1 --out_dir=out"
    args = (*own.split(), f"--init_from={run.out}", "--lr=1e-9", "--warmup_steps=0", "--max_steps=1", "--image_size=16")
    tuned = start("ldm", *args, bare=True, folder=tmp_path).finish()
    assert_same(part(tuned.checkpoint[0], "model"), part(run.checkpoint[0], "ema"), atol=1e-6)
    assert tuned.checkpoint[1]["model"] == run.checkpoint[1]["model"]
    resumed = start("ldm", *args, "--max_steps=2", bare=True, folder=tmp_path).finish()
    assert resumed.checkpoint[1]["step"] == 2 and "settings changed since: max_steps=2 was 1\n" in resumed.stdout
    message = start("ldm", *args, "--channels=320", "--norm_groups=4", bare=True).fail()
    assert "channels=8 in the checkpoint, 320 now" in message, "though it is the default"
    assert "init_from=" in start("ldm", *RUNS["tokens"], f"--dataset={rich_data}", folder=tmp_path).fail()
    assert "object names" in start("ldm", *args, f"--init_from={rich_run('layout').out}", bare=True).fail()
    shutil.copytree(rich_data, tmp_path / "data")
    (tmp_path / "data/classes.json").write_text(json.dumps([f"class {i}" for i in range(20)]))
    assert "num_classes=3 in the checkpoint, 20" in start("ldm", *args, f"--dataset={tmp_path}/data", bare=True).fail()


def test_init_from_a_diffusers_pipeline(start, tmp_path):
    run = start("ldm", *PLAIN, "--objective=eps", "--schedule=scaled_linear", "--max_steps=2").finish()
    convert.to_diffusers(str(run.out), f"{tmp_path}/pipeline")
    args = (f"--init_from={tmp_path}/pipeline", "--cond=none", "--lr=1e-9", "--warmup_steps=0", "--max_steps=1")
    own = ("--device=cpu", "--workers=0", "--batch_size=4", "--sample_steps=1", "--image_size=16", "--out_dir=out")
    tuned = start("ldm", *own, *args, bare=True).finish()
    assert_same(part(tuned.checkpoint[0], "model"), part(run.checkpoint[0], "ema"), atol=1e-6)
    assert tuned.checkpoint[1]["model"]["schedule"] == "scaled_linear"


def test_resume_keeps_autoencoder_tokenizer_and_settings(start, finished, first_stage, tmp_path):
    folder = resume_folder(finished("ldm"), tmp_path)
    other = VAE.from_pretrained(str(first_stage))
    other.decoder.conv_out.bias.data += 1
    meta = checkpoint.read_meta(str(first_stage))
    checkpoint.write(f"{tmp_path}/other.safetensors", checkpoint.with_prefix("ema", other.state_dict()), meta)
    message = start("ldm", f"--first_stage={tmp_path}/other.safetensors", folder=folder).fail()
    assert "was trained on another autoencoder" in message
    message = start("ldm", "--channels=16", "--objective=eps", folder=folder).fail()
    assert "channels=8 in the checkpoint, 16 now" in message and "objective=flow in the checkpoint, eps now" in message
    tokens = [*(bytes([i]) for i in range(256)), b"re", b"red"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (tmp_path / "own.tiktoken").write_text("".join(lines))
    assert "--tokenizer out" in start("ldm", f"--tokenizer={tmp_path}/own.tiktoken", folder=folder).fail()
    resumed = start("ldm", "--first_stage=gone", "--max_steps=7", "--tokenizer=bytes", folder=folder).finish()
    assert_same(part(resumed.checkpoint[0], "vae"), part(read(first_stage)[0], "ema"))
    changed = re.search("settings changed since[^:]*: (.*)", resumed.stdout)[1]
    assert "max_steps=7 was 6" in changed and "first_stage=gone" in changed
    path = folder / "out/latest.safetensors"
    shutil.copy(first_stage, path)
    assert "stage=vae in the checkpoint, ldm now" in start("ldm", folder=folder).fail()
    path.write_bytes(path.read_bytes()[:1000])
    assert "truncated or damaged" in start("ldm", folder=folder).fail() and path.stat().st_size == 1000


def test_a_frozen_tower_is_named_and_not_trained(start, test_data, tmp_path):
    """With a small tower in place of clip_l."""
    small = dict(width=64, layers=2, heads=1, activation="quick_gelu", layer="last", pad="end")
    merges, weights = str(test_data / "assets/bpe_simple_vocab_16e6.txt.gz"), f"{tmp_path}/tower.safetensors"
    tower = CLIPTextEncoder(**small, merges=merges)
    save_file(tower.state_dict(), weights)
    first = f"import convert\nconvert.TOWERS['clip_l'] = {small}"
    args = ("--text_encoder=clip_l", f"--clip_vocab={merges}", f"--tower_weights={weights}")
    (tmp_path / "prompts.txt").write_text("a red blob\n\na dog\n")
    run = start("ldm", *args, "--max_steps=2", "--prompts=prompts.txt", first=first, folder=tmp_path).finish()
    tensors, meta = run.checkpoint
    assert meta["examples"] == ["a red blob", "a dog"]
    assert not any(name.startswith(("model.text", "ema.text", "text.")) for name in tensors)
    assert meta["model"]["text_encoder"] == "clip_l" and meta["model"]["tower_hash"] == checkpoint.hash_weights(tower)
    assert tensors["model.unet.middle_block.1.blocks.0.attn2.to_k.weight"].shape[1] == 64
    start("ldm", *args, "--max_steps=3", first=first, folder=tmp_path).finish()
    tower.norm_out.bias.data += 1
    save_file(tower.state_dict(), weights)
    message = start("ldm", *args, "--max_steps=4", first=first, folder=tmp_path).fail()
    assert re.search("tower_hash=[0-9a-f]* in the checkpoint, [0-9a-f]* now", message)


def test_a_copy_with_another_denoiser(start, tmp_path):
    source, line = Path(train_ldm.__file__).read_text(), "from unet import Denoiser, Rescaler, UNet\n"
    assert line in source
    other = "from examples.dit import DiT as UNet\nfrom unet import Denoiser, Rescaler\n"
    (tmp_path / "mine.py").write_text(source.replace(line, other))
    options = dict(script=f"{tmp_path}/mine.py", folder=tmp_path)
    run = start("ldm", "--transformer_depth=3", "--max_steps=2", **options).finish()
    assert run.checkpoint[1]["model"]["unet"]["transformer_depth"] == 3
    assert run.checkpoint[0]["model.unet.blocks.2.cross_attention.to_k.weight"].shape == (8, 16)
    start("ldm", "--transformer_depth=3", "--max_steps=3", **options).finish()


# --- settings and data that do not fit ---


UNFIT = {
    "--buckets --latents_on_device=true": "latents_on_device=true needs one size, without buckets",
    "--beta_start=0.5": "beta_start must be below beta_end",
    "--zero_snr --schedule=scaled_linear --objective=eps": "zero_snr cannot be used with objective=eps",
    "--zero_snr": "zero_snr is for tables",
    "--task=sr --sr_noise=9 --cond=class": "both use the class embedding",
    "--text_encoder=clip_l": "needs --tower_weights=FILE",
    "--tower_weights=FILE": "needs --tower_weights=FILE",
    "--cond_drop=0": "guidance needs cond_drop > 0",
    "--sr_noise=3": "sr_noise is only used with task=sr",
}


@pytest.mark.parametrize("args", UNFIT)
def test_settings_that_do_not_fit_together(args):
    with pytest.raises(UserError, match=re.escape(UNFIT[args])):
        train_ldm.check_settings(configure(dict(vars(train_ldm)), args.split()))


MISFITS = {
    "--task=semantic": "maps",
    "--cond=layout": "objects",
    "--task=sr --sr_scale=3": "3",
    "--image_mode=L": "image_mode=L, but the autoencoder is of RGB: set --image_mode=RGB",
    "--image_mode=RGBA --task=sr --sr_scale=2": "task=sr: has no alpha (JPEG has none); set --image_mode=RGB",
    "--buckets=true": ": (npy) has no sizes for buckets; use a folder or tar shards",
    "--image_size=16,18": "latents of side 9, which must be a multiple of 2",
    "--num_heads=2": "num_heads=2, head_dim=8",
    "--cond=class --dataset=.": "its training images have no labels; set another --cond, such as none",
    "--dataset=.": "its training images have no captions; set another --cond, such as none",
    "--attention=sdpa_cudnn": "attention=sdpa_cudnn: no kernels for cpu",
}


@pytest.mark.parametrize("args", MISFITS)
def test_data_and_models_that_do_not_fit_are_one_line(args, start, small_data, tmp_path):
    for folder in ("train", "val"):  # without labels and captions
        (tmp_path / folder).mkdir()
        shutil.copy(small_data / folder / "images.npy", tmp_path / folder)
    assert MISFITS[args] in start("ldm", *args.split(), folder=tmp_path).fail()


def test_few_captions(start, small_data, tmp_path):
    """A run says how many training images have them; validation without any is fine."""
    shutil.copytree(small_data, tmp_path / "data")
    for folder, kept in (("train", 5), ("val", 0)):
        path = tmp_path / "data" / folder / "captions.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[:kept] + ["{}"] * (len(lines) - kept)) + "\n")
    run = start("ldm", f"--dataset={tmp_path}/data", "--max_steps=1", folder=tmp_path).finish()
    assert "captions on 5 of 24 training images, the others have none" in run.stdout
    assert run.checkpoint[1]["examples"][0].endswith("blob")


CONFIGS = sorted(Path(train_ldm.__file__).parent.glob("config/*_ldm.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs(path):
    """They name settings that exist; one that says how many parameters it has, has as many."""
    cfg = configure(dict(vars(train_ldm)), [str(path)])
    train_ldm.check_settings(cfg)
    side = cfg.image_size[0] // (1 if cfg.first_stage == "none" else 4)
    with torch.device("meta"):
        train_ldm.build_denoiser(cfg.replace(cond="none"), (4, side, side), map_classes=2)
    count = re.search(r"([\d.]+) M parameters", path.read_text().split("\n")[0])
    if not count:
        return
    latents = 3 if "f4" in cfg.first_stage else 4
    concat = {"none": 0, "inpaint": 1 + latents, "sr": 3, "semantic": 3}[cfg.task]
    context = cfg.text_width if cfg.cond in ("text", "layout") or cfg.class_embed == "token" else 0
    arguments = {name: cfg[name] for name in inspect.signature(UNet).parameters if name in cfg}
    arguments |= dict(in_channels=latents, out_channels=latents, concat_channels=concat, context_dim=context)
    with torch.device("meta"):
        unet = UNet(**arguments)
    assert f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f}" == count[1]
