"""Stage 1: its losses against formulas and CompVis, then real runs: resume, ranks, faults, GAN, VQ, fine-tuning."""

import contextlib
import copy
import functools
import importlib.util
import inspect
import math
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import fill
from helpers import ROOT, assert_same, machine, numbers, read, resume_folder
from PIL import Image

import train_vae
from checkpoint import UserError, part
from configurator import configure
from data.dataset import Dataset, Stream
from lpips_train import LPIPS, make_trunk
from train_vae import adaptive_ratio, discriminator_loss, gan_ramp, generator_loss, latent_transform, train_step
from vae import VAE, Discriminator, Posterior, turn_and_scale


def settings(*args, **values):
    """The script's settings, with a loss of recon and KL as a start."""
    plain = ["--perceptual_weight=0", "--disc_weight=0"]
    return configure(vars(train_vae).copy(), [*plain, *args]).replace(**values)


def tiny_vae(**values):
    torch.manual_seed(0)
    return fill(VAE(**dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, mid_attention=False) | values))


@pytest.fixture(scope="session")
def trunk(tmp_path_factory):
    """A file with a SqueezeNet of random weights."""
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("no package lpips, which has the published heads")
    torch.manual_seed(0)
    state = make_trunk("squeeze").state_dict()
    for name, t in state.items():
        t.normal_(0, (2 / t[0].numel()) ** 0.5 if name.endswith("weight") else 0.1)
    path = tmp_path_factory.mktemp("trunk") / "squeeze.pth"
    torch.save(state, path)
    return str(path)


# --- loss ---


class Offset(torch.nn.Module):
    """An autoencoder whose reconstruction is the image plus a constant, and whose posterior is N(0.5, 0.3^2)."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x, noise):
        moments = torch.cat([torch.full_like(noise, 0.5), torch.full_like(noise, 2 * math.log(0.3))], dim=1)
        return x + self.error, Posterior(moments)


@pytest.mark.parametrize("recon_loss, recon", [("l1", 0.25), ("l2", 0.0625)])
def test_loss_does_not_depend_on_resolution(recon_loss, recon):
    for size, batch in ((16, 1), (16, 4), (64, 2)):
        x, noise = torch.rand(batch, 3, size, size) - 0.5, torch.randn(batch, 4, size // 8, size // 8)
        cfg = settings(recon_loss=recon_loss, kl_weight=2.0)
        terms, _ = train_step(Offset(0.25), {"image": x}, {"noise": noise}, cfg)
        kl = 0.5 * (0.5**2 + 0.3**2 - 1 - math.log(0.3**2)) * 4 / (3 * 64)  # 4 latents for 8 x 8 pixels
        assert terms["recon"].item() == pytest.approx(recon, rel=1e-5)
        assert terms["kl"].item() == pytest.approx(kl, rel=1e-5)
        assert terms["loss"].item() == pytest.approx(recon + 2 * kl, rel=1e-5)


LOSS = dict(perceptual_weight=1.0, disc_weight=0.5, adaptive_max=1e9)


@pytest.fixture
def game(trunk):
    """(vae, batch, noise, lpips, disc) with every part of the loss, in float64."""
    torch.manual_seed(1)
    vae, lpips, disc = tiny_vae().double(), LPIPS("squeeze", trunk).double(), Discriminator(1).double()
    x = torch.rand(3, 3, 24, 24, dtype=torch.float64) * 2 - 1
    return vae, {"image": x}, {"noise": torch.randn(3, 4, 12, 12, dtype=torch.float64)}, lpips, disc


@pytest.mark.parametrize("loss", ("hinge", "vanilla", "least_squares"))
def test_the_gradient_of_neither_player_reaches_the_other(loss, game):
    vae, batch, noise, lpips, disc = game
    cfg = settings(**LOSS | dict(disc_loss=loss, r1_weight=1.0, lecam_weight=0.1))
    terms, _ = train_step(vae, batch, noise, cfg, lpips, disc, 0.5)
    assert all(p.requires_grad for p in disc.parameters())
    terms["loss"].backward(retain_graph=True)
    assert all(p.grad is None for p in disc.parameters()) and all(p.grad is not None for p in vae.parameters())
    before = [p.grad.clone() for p in vae.parameters()]
    terms["disc_loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in disc.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(vae.parameters(), before))
    # the GAN term does reach the autoencoder, with its weight
    alone = torch.autograd.grad(train_step(vae, batch, noise, cfg, lpips, disc, 0.0)[0]["loss"], vae.parameters())
    gan = torch.autograd.grad(generator_loss(disc(vae(batch["image"], **noise)[0]), loss), vae.parameters())
    for g, a, b in zip(gan, alone, before):
        torch.testing.assert_close(a + 0.5 * g, b, rtol=1e-8, atol=1e-12)
    assert "gan" not in train_step(vae, batch, noise, cfg, lpips, disc)[0], "warm-up: it has no GAN term"


def test_gan_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    expected = {"hinge": 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3), "least_squares": (1 + 0.25 + 4 + 9 + 0 + 1) / 6}
    expected["vanilla"] = sum(math.log1p(math.exp(v)) for v in (-2.0, -0.5, 1.0, -3.0, 0.0, 1.0)) / 6
    for loss, value in expected.items():
        assert discriminator_loss(real, fake, loss).item() == pytest.approx(value, rel=1e-6)
    assert generator_loss(fake, "hinge").item() == pytest.approx(2 / 3)
    softplus = sum(math.log1p(math.exp(-v)) for v in fake.tolist()) / 3
    assert generator_loss(fake, "vanilla").item() == pytest.approx(softplus)
    assert generator_loss(fake, "least_squares").item() == pytest.approx((16 + 1 + 0) / 6)
    for loss, blind in (("hinge", 1.0), ("vanilla", math.log(2)), ("least_squares", 0.25)):
        half = torch.full((4,), 0.5 if loss == "least_squares" else 0.0)
        assert discriminator_loss(half, half, loss).item() == pytest.approx(blind)


class Slope(torch.nn.Module):
    """A discriminator whose logit at a pixel is w times the sum of its channels."""

    def __init__(self, w, mean_logits=(0.0, 0.0)):
        super().__init__()
        self.w, self.mean_logits, self.inputs = torch.nn.Parameter(torch.tensor(w)), torch.tensor(mean_logits), []

    def forward(self, x):
        self.inputs.append(x.detach())
        return self.w * x.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("size", (8, 32))  # means per pixel: the resolution does not matter
def test_regularization_of_the_discriminator_by_hand(size):
    x, values = torch.rand(2, 3, size, size), {}
    noise = {"noise": torch.randn(2, 4, size // 8, size // 8)}
    for name, weights in {"none": {}, "r1": dict(r1_weight=4.0), "lecam": dict(lecam_weight=0.5)}.items():
        disc = Slope(0.3, (0.7, -0.4))
        values[name] = train_step(Offset(-0.25), {"image": x}, noise, settings(**weights), disc=disc)[0]["disc_loss"]
    assert (values["r1"] - values["none"]).item() == pytest.approx(2 * 0.3**2, rel=1e-4)
    real, fake = 0.3 * x.sum(1), 0.3 * (x - 0.25).sum(1)
    distance = (real + 0.4).square().mean() + (fake - 0.7).square().mean()
    assert (values["lecam"] - values["none"]).item() == pytest.approx(0.5 * distance.item(), rel=1e-4)


def last_layer_gradients(terms, weight):
    return torch.stack([torch.autograd.grad(terms[k], weight, retain_graph=True)[0] for k in ("nll", "gan")])


def test_the_loss_with_everything_is_that_of_compvis_per_value(game):
    """Theirs: (sum(|x - x_hat| + LPIPS at every value) + 1e-6 sum KL) / B - 0.5 d mean D(x_hat), d clamped at 1e4."""
    vae, batch, noise, lpips, disc = game
    x, values, last = batch["image"], 3 * 24 * 24, vae.decoder.conv_out.weight
    cfg = settings(**LOSS | dict(adaptive_max=1e4 / values))
    gradients = last_layer_gradients(train_step(vae, batch, noise, cfg, lpips, disc, 0.0)[0], last)
    ours = train_step(vae, batch, noise, cfg, lpips, disc, 0.5 * adaptive_ratio(gradients, cfg))[0]["loss"]
    posterior = vae.encode(x)
    fake = vae.decode(posterior.mean + posterior.std * noise["noise"])
    each = (x - fake).abs() + lpips(fake, x)[:, None, None, None]
    nll, g = each.sum() / 3, -disc(fake).mean()
    norms = [torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (nll, g)]
    d = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
    assert d > 1
    theirs = nll + 1e-6 * posterior.kl().sum() / 3 + 0.5 * d * g
    torch.testing.assert_close(ours * values, theirs, rtol=1e-9, atol=0)
    for low, high, expected in ((0.0, 1e-3, 1e-3), (1e3, 1e4, 1e3)):
        clamped = adaptive_ratio(gradients, cfg.replace(adaptive_min=low, adaptive_max=high))
        assert clamped.item() == pytest.approx(expected)
    assert adaptive_ratio(0 * gradients, cfg) == 0


@pytest.mark.parametrize("norm", ("group", "none", "batch"))
def test_identical_images_and_a_batch_of_one_give_no_nan(norm, trunk):
    class Perfect(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, noise):
            return self.weight * x, Posterior(torch.zeros(1, 8, 12, 12))

    vae, lpips, disc, cfg = Perfect(), LPIPS("squeeze", trunk), Discriminator(2, norm), settings(**LOSS)
    for x in (torch.rand(1, 3, 24, 24) * 2 - 1, torch.full((1, 3, 24, 24), -1.0), torch.zeros(1, 3, 24, 24)):
        terms, _ = train_step(vae, {"image": x}, {"noise": torch.zeros(1, 4, 12, 12)}, cfg, lpips, disc, 0.1)
        assert adaptive_ratio(last_layer_gradients(terms, vae.weight), cfg).isfinite()
        (terms["loss"] + terms["disc_loss"]).backward()
        for p in (vae.weight, *disc.parameters()):
            assert p.grad.isfinite().all()


def test_when_the_discriminator_enters():
    cfg = settings(disc_start=5, disc_ramp=3)
    assert [gan_ramp(n, cfg) for n in (1, 4, 5, 6, 7, 8, 99)] == [None, None, 0.25, 0.5, 0.75, 1, 1]
    assert gan_ramp(5, settings(disc_start=5)) == 1 == gan_ramp(1, settings(disc_start=0))


def test_noise_is_a_slice_of_the_global_batch():
    small, large = (settings(batch_size=size, latent_noise=0.3) for size in (2, 12))
    noise = [train_vae.step_noise(7, (4, 2, 2), small, machine(rank, 2), 3) for rank in range(2)]
    one, other = (train_vae.step_noise(step, (4, 2, 2), large, machine(), 1)[0] for step in (7, 8))
    for name in ("noise", "jitter"):
        slices = torch.stack([torch.stack([micro[name] for micro in rank]) for rank in noise], dim=1)
        assert torch.equal(slices.flatten(0, 2), one[name]) and len(one[name].unique(dim=0)) == 12
        assert not torch.equal(other[name], one[name])
    assert train_vae.step_noise(7, (4, 2, 2), settings(), machine(), 1)[0].keys() == {"noise"}


def test_latent_noise_is_relative_to_the_latents():
    (noise,) = train_vae.step_noise(0, (4, 16, 16), settings(batch_size=2000, latent_noise=0.3), machine(), 1)
    deviation = noise["jitter"].flatten(1).std(dim=1)  # tau |N(0,1)| for each image
    assert deviation.mean() == pytest.approx(0.3 * (2 / math.pi) ** 0.5, rel=0.05)
    assert deviation.square().mean() == pytest.approx(0.3**2, rel=0.1)
    vae, x, jitter = tiny_vae().double(), torch.rand(2, 3, 24, 24).double() * 2 - 1, noise["jitter"][:2, :, :12, :12]
    z = vae.encode(x).mean
    z = z + jitter * z.std(dim=(0, 2, 3), correction=0, keepdim=True)
    for turns, sides in ((0, ()), (1, (8, 8))):
        reconstruction, _ = vae(x, torch.zeros_like(z), turns, sides, jitter=jitter.double())
        torch.testing.assert_close(reconstruction, vae.decode(turn_and_scale(z, turns, sides)))


def test_larger_latents_do_not_escape_the_noise(monkeypatch):
    vae, scale = tiny_vae().double(), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    encode, unscaled = vae.encode, vae.post_quant_conv.forward

    def scaled(x):
        posterior = encode(x)
        posterior.mean = scale * posterior.mean
        return posterior

    monkeypatch.setattr(vae, "encode", scaled)
    monkeypatch.setattr(vae.post_quant_conv, "forward", lambda z: unscaled(z / scale))
    x, zero = torch.rand(2, 3, 24, 24).double() * 2 - 1, torch.zeros(2, 4, 12, 12).double()
    (slope,) = torch.autograd.grad(vae(x, zero, jitter=torch.randn_like(zero))[0].square().mean(), scale)
    assert abs(slope) < 1e-12


@pytest.mark.parametrize("transform", ((1, ()), (0, (4, 4)), (3, (6, 4))))
def test_equivariance_compares_with_images_treated_alike(transform):
    class Equivariant(torch.nn.Module):
        def forward(self, x, noise, turns=0, sides=()):
            return turn_and_scale(x, turns, [2 * side for side in sides]), Posterior(torch.zeros(len(x), 8, 8, 8))

    x, disc = torch.rand(2, 3, 16, 16) * 2 - 1, Slope(1.0)
    noise = {"noise": torch.zeros(2, 4, 8, 8)}
    terms, _ = train_step(Equivariant(), {"image": x}, noise, settings(), None, disc, 0.5, transform)
    assert terms["recon"] == 0 and len(disc.inputs) == 3 and torch.equal(disc.inputs[1], disc.inputs[2])
    assert torch.equal(disc.inputs[1], turn_and_scale(x, transform[0], [2 * side for side in transform[1]]))
    assert disc.inputs[1].shape[2:] == tuple(2 * side for side in transform[1] or (8, 8))


def test_transforms_of_equivariance():
    cfg = settings(equivariance_prob=0.5, perceptual_weight=1.0, disc_weight=0.5, disc_layers=2)
    chosen = [latent_transform(step, (4, 16, 16), cfg, 4) for step in range(2000)]
    assert 900 < sum(map(bool, chosen)) < 1100
    assert set(chosen) == {(turns, (side, side)[:side]) for turns in range(4) for side in (0, 4, 8, 12)} - {(0, ())} | {
        ()
    }
    cfg = cfg.replace(lpips_net="alex", equivariance_prob=1.0)  # which needs 31 pixels, 8 latents
    chosen = {latent_transform(step, (4, 16, 24), cfg, 4) for step in range(500)}
    assert {sides for turns, sides in chosen if turns % 2 == 0} == {(), (8, 12), (12, 18)}
    assert {sides for turns, sides in chosen if turns % 2} == {(), (12, 8), (18, 12)}
    assert not any(latent_transform(step, (4, 16, 16), cfg.replace(equivariance_prob=0.0), 4) for step in range(99))


# --- codebook, EMA ---


def test_unused_codes_become_candidates_and_forget():
    model = tiny_vae(bottleneck="vq", codebook_size=5)
    ema, codes = copy.deepcopy(model), model.quantize.embedding.weight
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before, unused, candidates = codes.detach().clone(), torch.tensor([0, 1, 0, 0, 1]).bool(), torch.randn(5, 4)
    train_vae.restart_codes(model, ema, optimizer, unused, candidates)
    assert torch.equal(codes[unused], candidates[unused]) and torch.equal(codes[~unused], before[~unused])
    assert torch.equal(ema.quantize.embedding.weight[unused], candidates[unused])
    for moment in ("exp_avg", "exp_avg_sq"):
        assert (optimizer.state[codes][moment] == 0).all(dim=1).tolist() == unused.tolist()
    counts = train_vae.count_codes([torch.tensor([[[0, 3]]]), torch.tensor([[[3, 3]]])], 5, torch.float64)
    assert counts.tolist() == [1, 0, 0, 3, 0]
    share, perplexity = train_vae.code_use(counts)
    assert share == 0.4 and perplexity.item() == pytest.approx(4 / 3**0.75)


def test_candidates_are_latents_of_the_global_batch():
    latents, cfg = torch.randn(2, 3, 4, 2, 2), settings(codebook_size=100, seed=3)
    candidates = train_vae.restart_candidates(list(latents), 7, cfg, machine())  # (100,4)
    rows = latents.permute(0, 1, 3, 4, 2).reshape(-1, 4)
    at = (candidates[:, None] == rows).all(dim=2)
    assert at.any(dim=1).all() and at.any(dim=0).sum() > 18, "all over the batch"
    assert not torch.equal(train_vae.restart_candidates(list(latents), 8, cfg, machine()), candidates)


# --- evaluation ---


def test_rfid_is_the_distance_of_two_gaussians(small_data):
    """With a stand-in for Inception whose features are six values of an image."""
    linalg = pytest.importorskip("scipy.linalg", reason="no scipy to compare with")

    def inception(x):
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 16, 16)
        return x.float().flatten(1)[:, ::128] / 255

    vae, stream = tiny_vae().eval(), Stream(Dataset(small_data, "val", 16), 0, train=False)
    validation = [stream[i] for i in range(16)]
    options = settings(batch_size=5), machine(), contextlib.nullcontext(), None, inception
    scores, _ = train_vae.evaluate(vae, validation, *options)
    x = torch.stack([item["image"] for item in validation])
    y = vae.decode(vae.encode(x).mode()).clamp(-1, 1).detach()
    f, g = (inception(((a + 1) * 127.5).round().byte()).double().numpy() for a in (x, y))
    c, d = (np.cov(features, rowvar=False) for features in (f, g))
    expected = ((f.mean(0) - g.mean(0)) ** 2).sum() + np.trace(c + d - 2 * linalg.sqrtm(c @ d).real)
    assert scores["val_rfid"] == pytest.approx(expected, rel=1e-4) and scores["val_rfid"] > 0


@torch.no_grad()
def posterior_of(vae, folder, split="train", size=16):
    images = Dataset(folder, split, size)
    return vae.encode(torch.stack([images.pixels(i) for i in range(len(images))]))


# --- runs: resume, ranks, faults ---

SIX_STEPS = ("--eval_every=3", "--save_every=3", "--snapshot_every=3")


KEEP_STATE = """
import sys, torch, common
finite, log_step, calls = common.all_finite, common.Log.step, []
def all_finite(*values):
    calls.append(1)
    return finite(*values) & (len(calls) != 4)
def step(self, number, *rest):
    g = sys._getframe(1).f_globals
    parts = {name: g[name].state_dict() for name in ("model", "ema", "disc", "opt", "disc_opt")}
    torch.save(parts | {"state": g["state"]}, f"state{number}.pt")
    return log_step(self, number, *rest)
common.all_finite, common.Log.step = all_finite, step
"""


def flat(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [t for value in values for t in flat(value)]


def test_a_bad_step_changes_nothing_that_is_carried(start, tmp_path):
    """Step 4 of a run with VQ, a restart due, GAN, LeCam and the adaptive weight is declared bad."""
    args = (*VQ_ON, "--lecam_weight=0.1", "--adaptive_max=0.5", "--save_every=1", "--optimizer=muon")
    run = start("vae", *args, first=KEEP_STATE, folder=tmp_path)
    assert "not finite at step 4; the weights were not updated; last checkpoint: out/latest" in run.fail()
    assert run.checkpoint[1]["step"] == 3
    states = [torch.load(tmp_path / f"state{n}.pt", weights_only=True) for n in (2, 3, 4)]
    for name in states[0]:
        before, good, bad = ([t.nan_to_num(7) for t in flat(state[name])] for state in states)
        assert len(good) == len(bad) and all(map(torch.equal, good, bad)), name
        assert not all(map(torch.equal, before, good)), name
    rates = [states[0][name]["param_groups"][0]["lr"] for name in ("opt", "disc_opt")]
    assert rates == pytest.approx([1e-3 * 2 / 3, 1e-4 * 2 / 3]), "the second of two steps of warm-up, of both"


def test_what_a_run_leaves(finished):
    run = finished("vae")
    assert [r["step"] for r in run.log] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in run.log if "val_psnr" in r] == [3, 6]
    assert all(r["images_seen"] == 4 * r["step"] for r in run.log)
    assert run.log[0]["lr"] == pytest.approx(1e-3 / 3) and run.log[-1]["lr"] == 1e-3
    expected = {
        f"{name}_{step:08d}.{end}" for name, end in (("recon", "png"), ("ema", "safetensors")) for step in (3, 6)
    }
    expected |= {"latest.safetensors", "log.jsonl", "loss.png", "settings.json"}
    assert {p.name for p in run.out.iterdir()} == expected
    for path in run.out.glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 1, path
    for text in ("40 images (train 24, val 16)", "parameters", "TFLOP per image"):
        assert text in run.stdout
    tensors, meta = run.checkpoint
    assert meta["stage"] == "vae" and meta["config"]["max_steps"] == 6 and meta["disc"] is None
    assert VAE.from_pretrained(run.out / "ema_00000006.safetensors").settings["ch"] == 8
    assert not torch.equal(tensors["model.decoder.conv_in.weight"], tensors["ema.decoder.conv_in.weight"])


def test_bad_images_among_good_ones_are_named_and_replaced(start, tmp_path):
    for name, good, bad in (("train", 7, 1), ("val", 3, 0)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(good + bad):
            path = tmp_path / "images" / name / f"{i}.jpg"
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 20, 3), dtype=np.uint8)).save(path)
            if i >= good:
                path.write_bytes(path.read_bytes()[:300])
    run = start("vae", f"--dataset={tmp_path}/images").finish()
    skipped = re.findall(r"skipped a bad image \((\d) so far on rank 0\): train/7.jpg: ", run.stdout)
    assert skipped == [str(n + 1) for n in range(len(skipped))] and len(skipped) >= 3, run.stdout  # 3 epochs of 8
    assert run.log[-1]["step"] == 6


# --- latent statistics ---


def test_a_stopped_run_can_be_measured(start, killed, small_data, tmp_path):
    folder = resume_folder(killed("vae"), tmp_path)
    before, meta = read(folder / "out/latest.safetensors")
    assert before["ema.latent_std"].isnan().all()
    run = start("vae", "--measure_latents", "--device=cpu", "--ckpt=out", bare=True, folder=folder).finish()
    after, meta_after = run.checkpoint
    assert meta_after == meta and meta["step"] == 3
    kept = [name for name in before if "latent_" not in name]
    assert_same({name: before[name] for name in kept}, {name: after[name] for name in kept})
    vae = VAE.from_pretrained(run.out)
    posterior = posterior_of(vae, small_data)
    samples = [posterior.sample(generator=torch.Generator().manual_seed(i)) for i in range(50)]
    x0 = vae.normalize(torch.cat(samples))
    assert x0.mean(dim=(0, 2, 3)).abs().max() < 0.01 and (x0.std(dim=(0, 2, 3)) - 1).abs().max() < 0.01
    second_moment, mean = (posterior.mean**2 + posterior.std**2).mean(dim=(0, 2, 3)), posterior.mean.mean(dim=(0, 2, 3))
    for prefix in ("model", "ema"):
        torch.testing.assert_close(after[f"{prefix}.latent_mean"], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[f"{prefix}.latent_std"], (second_moment - mean**2).sqrt(), rtol=1e-4, atol=0)
    # a second time, on other images, they are only printed, unless asked for
    other = ("--measure_latents", "--device=cpu", "--ckpt=out", f"--dataset={small_data}/val", "--image_size=24")
    printed = start("vae", *other, bare=True, folder=folder).finish().stdout
    assert "at 24x24 px on" in printed and "not stored: the checkpoint has latent mean" in printed
    assert_same(run.checkpoint[0], after)
    start("vae", *other, "--overwrite", bare=True, folder=folder).finish()
    assert not torch.equal(run.checkpoint[0]["ema.latent_std"], after["ema.latent_std"])
    names = read(folder / "out/ema_00000003.safetensors")[0].keys()
    start("vae", *other, "--ckpt=out/ema_00000003.safetensors", bare=True, folder=folder).finish()
    snapshot = read(folder / "out/ema_00000003.safetensors")[0]
    assert snapshot.keys() == names and snapshot["ema.latent_std"].isfinite().all()
    # they are not kept for weights trained further
    further = start("vae", "--save_every=4", trap=("step 5,", signal.SIGKILL), folder=folder)
    further.wait()
    assert further.checkpoint[1]["step"] == 4 and further.checkpoint[0]["ema.latent_std"].isnan().all()


# --- runs: LPIPS, GAN, VQ ---

ALL_ON = "--image_size=24,40 --perceptual_weight=1 --lpips_net=squeeze --disc_weight=0.5 --disc_layers=1 --disc_start=3"
ALL_ON += " --optimizer=muon --weight_decay=0.1"
ALL_ON = (
    ALL_ON + " --dtype=float64 --disc_warmup=1 --disc_ramp=1 --adaptive_max=0.5 --lecam_weight=0.01 --r1_weight=0.1"
).split()
VQ_ON = "--image_size=16,24 --bottleneck=vq --codebook_size=40 --embed_dim=3 --restart_every=2 --equivariance_prob=0.7"
VQ_ON = (VQ_ON + " --disc_weight=0.5 --disc_layers=1 --disc_start=2").split()
GAME = ("--disc_weight=0.5", "--disc_layers=1", "--disc_start=1")


@pytest.fixture(scope="session")
def adversarial(start, trunk):
    """adversarial(ranks): six steps with LPIPS and GAN, made once."""

    @functools.cache
    def adversarial(ranks=1):
        args = (*ALL_ON, f"--lpips_trunk={trunk}", "--eval_every=3", "--save_every=3", f"--batch_size={4 // ranks}")
        return start("vae", *args, ranks=ranks, plots=ranks == 1).finish()

    return adversarial


@pytest.fixture(scope="session")
def vq(start):
    return start("vae", *VQ_ON, "--dtype=float64", "--eval_every=3").finish()


def test_a_run_with_everything(adversarial, start, trunk, tmp_path):
    run = adversarial()
    # step 1 without, step 2 the discriminator alone, from step 3 on both; the ratio is known from step 4 on
    assert ["disc_loss" in r for r in run.log] == [False, True, True, True, True, True]
    assert ["gan" in r for r in run.log] == [False, False, True, True, True, True]
    assert [r.get("gan_weight", 0) > 0 for r in run.log] == [False, False, False, True, True, True]
    assert all(0 < r["gan_weight"] <= 0.5 * 0.5 for r in run.log[3:])
    for r in run.log:
        expected = r["recon"] + r["perceptual"] + 1e-6 * r["kl"] + r.get("gan_weight", 0) * r.get("gan", 0)
        assert r["loss"] == pytest.approx(expected, rel=1e-5) and r["perceptual"] > 0
    kl = sum(run.log[-1]["val_kl_per_channel"]) / (3 * 24 * 40)
    assert run.log[-1]["val_lpips"] > 0 and kl == pytest.approx(run.log[-1]["val_kl"], rel=1e-3)
    tensors, meta = run.checkpoint
    names = {"disc.main.0.weight", "disc_optim.main.0.weight.exp_avg", "state.adaptive", "disc.mean_logits"}
    assert names < tensors.keys() and meta["disc"]["disc_layers"] == 1 and tensors["disc.mean_logits"].any()
    # saved just before the GAN loss began, to go back to
    before, meta = read(run.out / "before_gan.safetensors")
    assert meta["step"] == 2 and before["state.adaptive"] == 0 < tensors["state.adaptive"]
    (tmp_path / "out").mkdir()
    shutil.copy(run.out / "before_gan.safetensors", tmp_path / "out/latest.safetensors")
    again = start("vae", *ALL_ON, f"--lpips_trunk={trunk}", "--eval_every=3", folder=tmp_path).finish()
    assert_same(again.checkpoint[0], tensors)


@pytest.mark.parametrize("ranks", (1, 2))
def test_a_killed_game_resumes_bit_for_bit(ranks, start, adversarial, trunk, tmp_path):
    args = (*ALL_ON, f"--lpips_trunk={trunk}", "--eval_every=3", "--save_every=4", f"--batch_size={4 // ranks}")
    killed = start("vae", *args, ranks=ranks, trap=("step 5,", signal.SIGKILL), folder=tmp_path)
    assert killed.wait()[0] == -signal.SIGKILL and killed.checkpoint[1]["step"] == 4
    assert killed.checkpoint[0]["state.adaptive"] > 0
    resumed = start("vae", *args, ranks=ranks, folder=tmp_path).finish()
    assert "settings changed since: none" in resumed.stdout
    assert_same(resumed.checkpoint[0], adversarial(ranks).checkpoint[0])
    assert numbers(resumed.log) == numbers(adversarial(ranks).log)


def same_logs(one, two):
    for a, b in zip(one.log, two.log, strict=True):
        for name in a.keys() - {"images_per_s"}:
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-9), name


def test_two_ranks_of_a_game_are_one(start, adversarial, trunk):
    args = (*ALL_ON, f"--lpips_trunk={trunk}", "--eval_every=3", "--batch_size=1", "--grad_accum=2")
    two = start("vae", *args, ranks=2).finish()
    assert_same(adversarial().checkpoint[0], two.checkpoint[0], 1e-9)
    same_logs(adversarial(), two)


def test_two_ranks_of_vq_are_one_in_float64(vq, start):
    """With restarts after steps 2, 4 and 6, equivariance and GAN."""
    args = (*VQ_ON, "--batch_size=1", "--grad_accum=2", "--dtype=float64", "--eval_every=3")
    two = start("vae", *args, ranks=2).finish()
    assert_same(vq.checkpoint[0], two.checkpoint[0], 1e-9)
    same_logs(vq, two)
    assert all(1 <= r["perplexity"] <= 40 * r["codes_used"] + 1e-9 and "kl" not in r for r in vq.log)
    assert vq.log[-1]["codes_used"] > vq.log[0]["codes_used"], "restarts help"
    assert vq.log[-1]["val_codes_used"] > 0 and not vq.checkpoint[0]["state.code_counts"].any()


def test_a_killed_vq_run_resumes_bit_for_bit(vq, start, tmp_path):
    """Killed between two restarts, so that the counts since the last one matter."""
    args = (*VQ_ON, "--dtype=float64", "--eval_every=3", "--save_every=3")
    killed = start("vae", *args, trap=("step 4,", signal.SIGKILL), folder=tmp_path)
    killed.wait()
    assert killed.checkpoint[1]["step"] == 3 and killed.checkpoint[0]["state.code_counts"].sum() == 4 * 8 * 12
    assert_same(start("vae", *args, folder=tmp_path).finish().checkpoint[0], vq.checkpoint[0])


# --- fine-tuning ---


def test_decoder_only(start, finished, small_data, tmp_path):
    base = finished("vae")
    args = (f"--init_from={base.out}", "--train=decoder", "--tanh_out=true", "--recon_loss=l2", "--latent_noise=0.2")
    args += ("--eval_every=3", "--save_every=2", *GAME)
    tuned = start("vae", *args).finish()
    tensors, ema = tuned.checkpoint[0], part(base.checkpoint[0], "ema")
    for prefix in ("model", "ema"):
        now = part(tensors, prefix)
        kept = {name for name in now if torch.equal(now[name], ema[name])}
        frozen = {name for name in now if name.split(".")[0] not in ("decoder", "post_quant_conv")}
        assert kept == frozen and "latent_mean" in kept and "encoder.conv_in.weight" in kept
    assert not any(name.startswith("optim.encoder") for name in tensors)
    assert VAE.from_pretrained(tuned.out).settings["tanh_out"] and "parameters, a new one, trains" in tuned.stdout
    killed = start("vae", *args, trap=("step 3,", signal.SIGKILL), folder=tmp_path)
    killed.wait()
    assert_same(start("vae", *args, folder=tmp_path).finish().checkpoint[0], tensors)
    message = start("vae", *args, "--train=all", "--max_steps=9", folder=tmp_path).fail()
    assert "train=decoder in the checkpoint, all now" in message


def test_decoder_only_leaves_a_codebook_alone(vq, start):
    args = (*VQ_ON, f"--init_from={vq.out}", "--train=decoder", "--max_steps=2")
    tensors = start("vae", *args).finish().checkpoint[0]
    was = {name: t.float() for name, t in part(vq.checkpoint[0], "ema").items()}
    for name in ("quantize.embedding.weight", "quant_conv.weight", "encoder.conv_out.weight", "latent_std"):
        assert torch.equal(tensors[f"model.{name}"], was[name]) and torch.equal(tensors[f"ema.{name}"], was[name]), name


def test_training_on_at_a_higher_resolution(adversarial, start, trunk):
    args = (*ALL_ON, f"--lpips_trunk={trunk}", f"--init_from={adversarial().out}", "--image_size=32", "--resolution=32")
    still = ("--lr=1e-30", "--muon_lr=1e-30", "--disc_lr=1e-30")
    run = start("vae", *args, *still, "--max_steps=1", "--checkpointing=true").finish()
    then, now = adversarial().checkpoint[0], run.checkpoint[0]
    before, after = then["ema.decoder.conv_in.weight"], now["model.decoder.conv_in.weight"]
    assert torch.equal(before.float(), after.float())
    assert torch.equal(now["disc.main.0.weight"], then["disc.main.0.weight"]), "the discriminator is kept"
    assert now["ema.latent_std"].isfinite().all()
    assert not torch.equal(now["ema.latent_std"], then["ema.latent_std"]), "measured anew"


def test_four_phases(start, trunk, tmp_path):
    """One step each: the discriminator of phase 1 first trains in phase 2, tanh and larger images stay from then on."""
    args = ("--ch=8 --ch_mult=1,2 --norm_groups=4 --disc_layers=1", f"--lpips_net=squeeze --lpips_trunk={trunk}")
    args += ("--device=cpu --workers=0 --batch_size=2 --grad_accum=1 --val_images=2 --max_steps=1",)
    found = []
    for phase, side in ((1, 24), (2, 24), (3, 24), (4, 32)):
        config, size = f"{ROOT}/config/four_phase_{phase}.py", f"--image_size={side}"
        start("vae", config, size, *" ".join(args).split(), bare=True, folder=tmp_path).finish()
        found.append(read(tmp_path / f"out/four_phase_{phase}/latest.safetensors"))
    assert [meta["model"]["tanh_out"] for _, meta in found] == [False, True, True, True]
    torch.manual_seed(train_vae.seed_of(0, "disc init"))
    kernels = [Discriminator(1).main[0].weight, *(tensors["disc.main.0.weight"] for tensors, _ in found)]
    assert [torch.equal(a, b) for a, b in zip(kernels, kernels[1:])] == [True, False, False, False]


def test_weight_decay_of_the_discriminator(start):
    """After one step it has changed kernels by lr times itself times their initial values, and no bias."""
    runs = [start("vae", *GAME, "--max_steps=1", "--dtype=float64", f"--disc_weight_decay={w}") for w in (0, 0.5)]
    plain, decayed = (run.finish().checkpoint[0] for run in runs)
    torch.manual_seed(train_vae.seed_of(0, "disc init"))
    lr, initial = 1e-4 / 3, Discriminator(1).double().main[0].weight.detach()  # of the first of two steps of warm-up
    difference = plain["disc.main.0.weight"] - decayed["disc.main.0.weight"]
    torch.testing.assert_close(difference, lr * 0.5 * initial, rtol=1e-6, atol=1e-12)
    assert torch.equal(plain["disc.main.0.bias"], decayed["disc.main.0.bias"])


def test_a_discriminator_that_does_not_train_is_kept(start, tmp_path):
    start("vae", *GAME, "--max_steps=2", folder=tmp_path).finish()
    before, meta = read(tmp_path / "out/latest.safetensors")
    after, now = start("vae", "--max_steps=4", folder=tmp_path).finish().checkpoint
    kept = {name for name in before if name.startswith(("disc.", "disc_optim."))}
    assert kept and all(torch.equal(before[name], after[name]) for name in kept) and now["disc"] == meta["disc"]
    assert not torch.equal(before["model.decoder.conv_in.weight"], after["model.decoder.conv_in.weight"])
    line = start("vae", *GAME, "--init_from=out", folder=tmp_path).fail()
    assert "init_from= in the checkpoint, out now" in line


# --- eval_only ---


def test_eval_only(adversarial, start, small_data, trunk, tmp_path):
    ckpt = shutil.copytree(adversarial().out, tmp_path / "copy")
    args = ("--eval_only=true", f"--ckpt={ckpt}", "--eval_split=val", "--device=cpu", "--batch_size=4")
    run = start("vae", *args, bare=True, folder=tmp_path).finish()  # at 24x40 px and with LPIPS, as it was trained
    logged = adversarial().log[-1]
    printed = dict(re.findall(r"^  (\w+) +(.*)$", run.stdout, re.M))
    for name in ("psnr", "ssim", "lpips", "kl", "largest_activation"):
        assert float(printed[name]) == pytest.approx(logged[f"val_{name}"], abs=2e-4), name
    assert eval(printed["latent_std"]) == logged["val_latent_std"] and "on 16 images" in run.stdout
    grid = np.asarray(Image.open(ckpt / "eval.png"))
    assert grid.shape == (3 * (3 * 24 + 4), 4 * (3 * 40 + 4), 3), "batch_size 4 of them"
    assert not (tmp_path / "out").exists()
    mean = posterior_of(VAE.from_pretrained(ckpt), small_data, "val", (24, 40)).mean
    far = (mean - mean.mean(dim=(0, 2, 3), keepdim=True)).abs().amax(dim=(0, 2, 3))
    farthest = far / torch.tensor(logged["val_latent_std"])
    torch.testing.assert_close(torch.tensor(eval(printed["latent_farthest"])), farthest, rtol=1e-3, atol=1e-3)
    line = start("vae", *args, "--val_images=1", "--inception_weights=FILE", bare=True, folder=tmp_path).fail()
    assert "rFID needs 2 images or more" in line
    small = (*args, "--image_size=16", "--perceptual_weight=0", "--lpips_trunk=")
    before = (ckpt / "eval.png").read_bytes()
    for overwrite in ("", "--overwrite"):
        run = start("vae", *small, *overwrite.split(), bare=True, folder=tmp_path).finish()
        assert ("eval.png is there already" in run.stdout) == (not overwrite) and "lpips" not in run.stdout
        assert ((ckpt / "eval.png").read_bytes() == before) == (not overwrite)


# --- wrong settings ---


UNFIT = {
    "--image_size=16 --disc_weight=1 --disc_layers=3": "image_size=16 is below 24, which is the least of SSIM",
    "--image_size=16 --lpips_trunk=FILE --lpips_net=squeeze": "image_size=16 is below 17",
    "--image_size=8": "image_size=8 is below 11",
    "--image_size=16,16,16": "image_size must be a side, or height,width",
    "--image_size=16,8": "image_size=8 is below 11",
    "--train=decoder": "needs a trained autoencoder; set init_from",
    "--bottleneck=vq --latent_noise=0.1": "--latent_noise is only used with bottleneck=kl",
    "--adaptive_min=2": "adaptive_min must be <= adaptive_max",
    "--eval_split=val": "--eval_split is only used with --eval_only",
    "--ckpt=out --overwrite": "--ckpt --overwrite needs --eval_only or --measure_latents",
}
WRONG = {
    "--disc_loss=wgan": "--disc_loss=wgan must be one of hinge | vanilla | least_squares",
    "--init_from=nowhere": "nowhere: no such checkpoint",
    "--dataset=nowhere": "nowhere",
    "--image_size=17": "image_size=17 is not a multiple of 2",
    "--norm_groups=3": "norm_groups=3: must divide ch * ch_mult",
    "--measure_latents": "out: no such checkpoint",
    "--image_size=32 --perceptual_weight=1 --lpips_trunk=none.pth": "none.pth: no such file",
}


@pytest.mark.parametrize("args", UNFIT)
def test_settings_that_do_not_fit_together(args):
    with pytest.raises(UserError, match=re.escape(UNFIT[args])):
        train_vae.check_settings(settings(*args.split()))


@pytest.mark.parametrize("args", WRONG)
def test_a_wrong_setting_is_one_line(args, start):
    assert WRONG[args] in start("vae", *args.split()).fail()


def test_a_checkpoint_with_other_settings_is_refused(start, finished, first_stage, tmp_path):
    folder = resume_folder(finished("vae"), tmp_path)
    message = start("vae", "--max_steps=9", "--ch=16", folder=folder).fail()
    assert "latest.safetensors: has other settings: ch=8 in the checkpoint, 16 now" in message
    message = start("vae", f"--init_from={finished('vae').out}", "--ch=128").fail()
    assert "ch=8 in the checkpoint, 128 now" in message, "though it is the default"


PUBLISHED = dict(kl_f4=55_312_063, kl_f8=83_653_863, kl_f16=69_610_963, kl_f32=103_880_131, vq_f4=55_322_782)
PUBLISHED |= dict(vq_f8=67_717_295, ft_mse=83_653_863, four_phase_4=83_653_863)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_are_the_published_models(name):
    cfg = configure(vars(train_vae).copy(), [f"{ROOT}/config/{name}.py"])
    train_vae.check_settings(cfg)
    with torch.device("meta"):
        vae = VAE(**{key: cfg[key] for key in inspect.signature(VAE).parameters})
    assert sum(p.numel() for p in vae.parameters()) == PUBLISHED[name]
