"""What the command draws beyond pictures from noise: from pictures, between two, many, in tiles."""

import copy
import math
import os
import re
import socket
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill
from PIL import Image
from test_diffusion import MEAN, STD, gaussian_denoiser, noisy, normal
from test_sample import FAST, command, records, seeded  # noqa: F401

import convert
import sample
import text
import train_ldm
from configurator import configure
from data.dataset import Dataset
from data.tasks import augment_low, image_condition
from diffusion import ddim_invert, keep_known, make_denoiser, make_schedule, randn, sample_times, samplers
from sample import (
    Between,
    decode,
    draw_many,
    fit,
    generate,
    load_pipeline,
    seeded_noise,
    slerp,
    to_pil,
)
from vae import VAE

NAMES = ("text", "class", "none", "pixels", "tokens", "inpaint", "sr", "semantic")


@pytest.fixture(scope="module")
def pipelines(runs):
    return {name: load_pipeline(runs[name].path) for name in NAMES}


@pytest.fixture
def watch(monkeypatch):
    """What every U-Net of a pipeline is told: watch(pipeline) -> list of the dicts it is called with."""

    def watch(pipeline):
        calls, forward = [], pipeline.denoiser.unet.forward

        def spy(x, t, **inputs):
            calls.append({"x": x, "t": t, **inputs})
            return forward(x, t, **inputs)

        monkeypatch.setattr(pipeline.denoiser.unet, "forward", spy)
        return calls

    return watch


def pictures(count=2, side=32, seed=0):
    """Random blobs in 256 levels, as pictures come from files."""
    x = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(x, scale_factor=8, mode="bilinear")
    return (x * 255).round() / 127.5 - 1


def half(count=2, side=32):
    """Masks that paint the left half."""
    mask = torch.zeros(count, 1, side, side)
    mask[..., : side // 2] = 1
    return mask


def near(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- checkpoints ---


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_denoiser_is_loaded(runs, pipelines, name):
    saved, loaded = runs[name].denoiser.state_dict(), pipelines[name].denoiser.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert not pipelines[name].denoiser.training
    assert (name == "tokens") == (pipelines[name].denoiser.class_tokens is not None)
    assert (name == "sr") == (pipelines[name].denoiser.log_variance is not None)
    assert (name == "semantic") == (pipelines[name].denoiser.rescaler is not None)


def test_an_autoencoder_is_no_denoiser(runs):
    with pytest.raises(ValueError, match="is an autoencoder"):
        convert.load_denoiser(runs["vae"].path)


def test_another_decoder(runs, pipelines, command, tmp_path):  # noqa: F811
    """first_stage: its decoder draws, with the checkpoint's own statistics; another encoder is refused."""
    vae = copy.deepcopy(runs["vae"].vae)
    fill(vae.decoder, 9)
    vae.latent_mean.fill_(7)  # measured anew, on other pictures
    _, about = convert.read_checkpoint(runs["vae"].path)

    def save(name, vae):
        train_ldm.save_checkpoint(f"{tmp_path}/{name}", train_ldm.with_prefix("ema", vae.state_dict()), about)

    save("tuned.safetensors", vae)
    with torch.no_grad():
        for t in vae.encoder.parameters():
            t.mul_(1.005)  # as far as no rounding goes
    save("near.safetensors", vae)
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1.5)
    save("far.safetensors", vae)

    pipeline = load_pipeline(runs["text"].path, first_stage="tuned.safetensors")
    x = torch.randn(2, 3, 8, 8)
    vae.latent_mean.copy_(runs["vae"].vae.latent_mean)
    near(sample.finish(pipeline, x), sample.finish(pipelines["text"]._replace(vae=vae), x))
    assert (sample.finish(pipeline, x) - sample.finish(pipelines["text"], x)).abs().max() > 0.1
    near(sample.finish(load_pipeline(runs["text"].path, first_stage="near.safetensors"), x), sample.finish(pipeline, x))
    with pytest.raises(ValueError, match="first_stage=far.safetensors makes other latents than the checkpoint's"):
        load_pipeline(runs["text"].path, first_stage="far.safetensors")
    with pytest.raises(ValueError, match="first_stage=far.safetensors has no place in a checkpoint that draws pixels"):
        load_pipeline(runs["pixels"].path, first_stage="far.safetensors")

    args = (f"--ckpt={runs['text'].path}", *FAST, "--prompt=a", "--n=1", "--first_stage=tuned.safetensors")
    guide = f"--guide_ckpt={runs['text'].path}"
    assert command(*args, "--out_dir=a")[0] == command(*args, "--out_dir=b", guide)[0] == 0
    a, b = (records(tmp_path / folder)[1][0][0].astype(int) for folder in "ab")
    for drawn, cfg in ((a, 3.0), (b, 1.0)):  # guided away from itself it stays
        assert abs(drawn - np.array(to_pil(generate(pipeline, ["a"], [0], 2, cfg, "unipc")[0]))).max() <= 1
    bulk = (*args[:4], "--num_samples=2")
    assert command(*bulk, "--out=a.npz")[0] == command(*bulk, args[-1], "--out=b.npz")[0] == 0
    told = [sample.settings_of(f"{name}.npz")["crc32 of first stage"] for name in "ab"]
    assert told[0] != told[1] and abs(np.load("b.npz")["arr_0"][0].astype(int) - a).max() <= 1


def test_a_class_as_a_token(runs, pipelines):
    got = generate(pipelines["tokens"], [0, 1], [3, 3], 3, 2.0)
    tokens = runs["tokens"].denoiser.class_tokens.weight
    schedule, cond, null = make_schedule("cosine"), tokens[[0, 1], None], tokens[[2, 2], None]
    network = runs["tokens"].denoiser.unet
    denoise = make_denoiser(network, schedule, "v", {"context": cond}, {"context": null}, 2.0)
    x = samplers["ddim"](denoise, randn((2, 3, 8, 8), seeded([3, 3])), sample_times(3, schedule), schedule)
    near(got, sample.finish(pipelines["tokens"], x))
    assert (got[0] - got[1]).abs().max() > 1e-2


def test_a_post_hoc_ema_takes_the_place_of_the_ema(runs, command, monkeypatch, tmp_path):  # noqa: F811
    asked = []

    def posthoc_ema(path, std):
        asked.append((path, std))
        tensors, _ = convert.read_checkpoint(path, "model")
        return {f"ema.{name.removeprefix('model.')}": t for name, t in tensors.items()}

    monkeypatch.setattr(convert, "posthoc_ema", posthoc_ema, raising=False)
    loaded = load_pipeline(runs["text"].path, 0.1).denoiser
    tensors, _ = convert.read_checkpoint(runs["text"].path, "model")
    assert asked == [(f"{runs['text'].path}/latest.safetensors", 0.1)]
    assert all(torch.equal(t, tensors[f"model.{name}"]) for name, t in loaded.state_dict().items())
    status, _, err = command(f"--ckpt={runs['text'].path}", *FAST, "--ema_std=0.2", "--n=1", "--out_dir=out")
    assert (status, err) == (0, "") and asked[1][1] == 0.2


def test_zero_terminal_snr_is_in_the_checkpoint(runs, tmp_path):
    tensors, meta = convert.read_checkpoint(runs["none"].path, "ema", "vae")
    meta["model"] |= {"schedule": "scaled_linear", "zero_snr": True}
    train_ldm.save_checkpoint(str(tmp_path / "a.safetensors"), tensors, meta)
    assert load_pipeline(str(tmp_path / "a.safetensors")).schedule.alpha(torch.ones(1)) == 0


class Tower(torch.nn.Module):
    """In the place of a frozen text encoder: a word is its letters' embeddings."""

    def __init__(self, seed):
        super().__init__()
        self.length, self.embedding = 8, torch.nn.Embedding(256, 16)
        fill(self, seed)

    @classmethod
    def from_pretrained(cls, path, name, merges):
        assert name == "clip_l" and merges == "vocab"
        return cls(int(open(path).read()))

    def count_tokens(self, prompt):
        return len(prompt)

    def tokenize(self, prompts):
        return torch.tensor([list(prompt.encode().ljust(8)[:8]) for prompt in prompts])

    def forward(self, tokens):
        return self.embedding(tokens)


def test_a_frozen_text_encoder(runs, tmp_path, monkeypatch):
    """Its weights lie outside of the checkpoint, which knows their hash."""
    monkeypatch.setattr(text, "CLIPTextEncoder", Tower, raising=False)
    (tmp_path / "seven").write_text("7")
    (tmp_path / "eight").write_text("8")
    tensors, meta = convert.read_checkpoint(runs["text"].path, "ema.unet", "vae")
    meta["model"] |= {"text": None, "text_encoder": "clip_l", "tower_hash": train_ldm.hash_weights(Tower(7))}
    meta["config"] |= {"tower_weights": str(tmp_path / "seven"), "clip_vocab": "vocab"}
    file = str(tmp_path / "tower.safetensors")
    train_ldm.save_checkpoint(file, tensors, meta)
    pipeline = load_pipeline(file)
    assert pipeline.denoiser.text is None and pipeline.text is pipeline.tower
    got = generate(pipeline, ["cat", "dog"], [0, 0], 2, 2.0)
    contexts = [Tower(7)(Tower(7).tokenize(some)) for some in (["cat", "dog"], ["", ""])]
    cond, null = ({"context": context} for context in contexts)
    denoise = make_denoiser(pipeline.denoiser.unet, pipeline.schedule, "v", cond, null, 2.0)
    times = sample_times(2, pipeline.schedule)
    near(
        got,
        sample.finish(
            pipeline, samplers["ddim"](denoise, seeded_noise([0, 0], (3, 8, 8))[0], times, pipeline.schedule)
        ),
    )

    assert load_pipeline(file, tower_weights=str(tmp_path / "seven")).tower is not None
    with pytest.raises(ValueError, match="eight is another clip_l than .* was trained with: set tower_weights=FILE"):
        load_pipeline(file, tower_weights=str(tmp_path / "eight"))
    with pytest.raises(ValueError, match="listens to clip_l, whose weights are not at nowhere: set tower_weights=FILE"):
        load_pipeline(file, tower_weights="nowhere")


# --- guidance and steps ---


def drawn_by_hand(
    pipeline, cond, null, cfg, seeds, steps, sampler="ddim", spacing="trailing", options=None, **guidance
):
    schedule, objective = pipeline.schedule, pipeline.objective
    denoise = make_denoiser(pipeline.denoiser.unet, schedule, objective, cond, null, cfg, **guidance)
    times, (x, generators) = sample_times(steps, schedule, objective, spacing), seeded_noise(seeds, (3, 8, 8))
    x = samplers[sampler](denoise, schedule.sigma(times[:1]).item() * x, times, schedule, generators, **options or {})
    return sample.finish(pipeline, x)


def test_guidance(pipelines):
    text = pipelines["text"]
    context = {p: {"context": text.denoiser.text([p])} for p in ("a star", "", "dark")}
    cond, plain = context["a star"], generate(text, ["a star"], [1], 4, 3.0)
    for settings, null, guidance in (
        (dict(negative="dark"), "dark", {}),
        (dict(cfg_interval=(0.3, 0.8)), "", dict(cfg_interval=(0.3, 0.8))),
        (dict(cfg_rescale=0.7), "", dict(cfg_rescale=0.7)),
        (dict(spacing="quadratic"), "", dict(spacing="quadratic")),
    ):
        got = generate(text, ["a star"], [1], 4, 3.0, **settings)
        near(got, drawn_by_hand(text, cond, context[null], 3.0, [1], 4, **guidance))
        assert (got - plain).abs().max() > 1e-2, settings
    generate(text, ["a star"], [1], 4, 3.0, cfg_interval=(0.3, 0.8))
    assert generate.evaluations == 6, "guided at 0.75 and 0.5, not at 1 and 0.25"


@pytest.mark.parametrize(
    "sampler, options", [("euler_a", {"eta": 0.5}), ("ddpm", {"noise_scale": 0.3}), ("unipc", {"order": 3})]
)
def test_samplers_get_their_options(pipelines, sampler, options):
    got = generate(pipelines["none"], [None], [1], 8, sampler=sampler, **options)
    near(got, drawn_by_hand(pipelines["none"], {}, None, 1.0, [1], 8, sampler, options=options))
    assert (got - generate(pipelines["none"], [None], [1], 8, sampler=sampler)).abs().max() > 1e-3


@pytest.mark.parametrize("name, conditions", [("none", [None, None]), ("text", ["a", "b"]), ("tokens", [0, 1])])
def test_autoguidance(pipelines, name, conditions):
    """The weaker model hears the same condition; it works where there is none at all."""
    pipeline = pipelines[name]
    worse = pipeline._replace(denoiser=fill(load_copy(pipeline.denoiser), 5))
    cond, weak = (
        {"context": p.denoiser.condition(**told)["context"]} if told else {}
        for p, told in (
            (
                p,
                {
                    "text": dict(tokens=pipeline.text and pipeline.text.tokenize(conditions)),
                    "tokens": dict(y=torch.tensor([0, 1])),
                }.get(name),
            )
            for p in (pipeline, worse)
        )
    )
    guide = make_denoiser(worse.denoiser.unet, pipeline.schedule, "v", weak)
    got = generate(pipeline, conditions, [0, 1], 3, 2.0, guide=worse)
    near(got, drawn_by_hand(pipeline, cond, None, 2.0, [0, 1], 3, guide=guide))
    assert generate.evaluations == 6
    assert (got - generate(pipeline, conditions, [0, 1], 3, 2.0)).abs().max() > 1e-2


def load_copy(module):
    import copy

    return copy.deepcopy(module)


def test_a_guide_that_does_not_fit(pipelines):
    for name, guide in (("none", "text"), ("text", "class"), ("none", "sr"), ("none", "pixels"), ("none", "flow")):
        other = pipelines["none" if guide == "flow" else guide]
        process = make_schedule("flow") if guide == "flow" else pipelines[name].schedule
        if guide == "pixels":  # as many channels as the latents have, but other ones
            assert other.latent_shape[0] == pipelines[name].latent_shape[0]
        with pytest.raises(ValueError, match="guide_ckpt has other latents, noise or conditions"):
            generate(pipelines[name], [None], [0], 1, 2.0, guide=other._replace(schedule=process))


# --- tiles ---


def test_decoding_in_tiles_is_decoding_away_from_the_seams():
    """Of a decoder that is convolutions alone; on the seams, tiles see zeros where there are latents."""
    torch.manual_seed(0)
    vae = VAE(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, mid_attention=False).eval()
    for module in list(vae.decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    z = torch.randn(2, 4, 70, 53)
    with torch.no_grad():
        whole, tiled = vae.decode(z), vae.decode_tiled(z, 48, 24)
        # rows: tiles from 0 and 22 (of 70), columns: from 0 and 5 (of 53); the receptive field is 12 latents to a side
        assert (whole - tiled)[:, :, 2 * 48 :].abs()[..., 2 * 48 :].max() < 1e-5
        assert (whole - tiled)[:, :, : 2 * 10, : 2 * 4].abs().max() < 1e-5
        assert (whole - tiled).abs().max() > 1e-4, "not everywhere"
        assert (whole - tiled).abs().max() < 0.5 * whole.abs().max()
        near(vae.decode_tiled(z, 70, 16), whole, 1e-6)
        assert vae.decode_tiled(z[:, :, :20, :9], 8, 0).shape == (2, 3, 40, 18), "no overlap, one side hardly a tile"


def test_tiles_blend_linearly(monkeypatch):
    """Each tile a constant: a step between two becomes a ramp as long as the overlap."""
    vae, calls = VAE(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, mid_attention=False), []

    def decode(z):
        calls.append(z.shape)
        return torch.full((len(z), 3, 2 * z.shape[2], 2 * z.shape[3]), float(len(calls)))

    monkeypatch.setattr(vae, "decode", decode)
    out = vae.decode_tiled(torch.zeros(1, 4, 8, 14), 8, 2)
    assert calls == [(1, 4, 8, 8), (1, 4, 8, 8)]
    ramp = 1 + (torch.arange(4) + 0.5) / 4  # over 2 latents, 4 pixels
    expected = torch.cat([torch.ones(12), ramp, torch.full((12,), 2.0)])
    near(out, expected.expand(1, 3, 16, 28), 1e-6)
    for tile, overlap in ((8, 8), (8, -1)):
        with pytest.raises(ValueError, match=f"overlap={overlap} does not fit tiles of 8 latents: choose 0 to 7"):
            vae.decode_tiled(torch.zeros(1, 4, 8, 8), tile, overlap)


def test_decoding_fewer_at_a_time_where_memory_is_short(runs, monkeypatch):
    vae, sizes, plain = runs["vae"].vae, [], runs["vae"].vae.decode
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = decode(vae, x)
    near(expected, plain(vae.denormalize(x)), 0)

    def short(z, most=2):
        sizes.append(len(z))
        if len(z) > most:
            raise torch.OutOfMemoryError
        return plain(z)

    monkeypatch.setattr(vae, "decode", short)
    near(decode(vae, x), expected)
    assert sizes == [5, 3, 2, 1, 2]
    monkeypatch.setattr(vae, "decode", lambda z: short(z, 0))
    with pytest.raises(ValueError, match="memory does not hold one picture's decoding: set decode_tile=64"):
        decode(vae, x)


# --- from a picture ---


def test_strength(pipelines):
    """The last of the steps from the noised picture; 1 is all of them, from noise alone."""
    text, image = pipelines["text"], pictures()
    conditions, seeds, given = ["a", "b"], [3, 4], {"image": image}
    plain = generate(text, conditions, seeds, 10, 2.0)
    near(generate(text, conditions, seeds, 10, 2.0, given=given, strength=1.0), plain, 0)
    known = text.vae.decode(text.vae.encode(image).mode()).clamp(-1, 1)
    far = []
    for strength, steps in ((0.01, 1), (0.3, 3), (0.34, 3), (0.96, 10)):
        got = generate(text, conditions, seeds, 10, 2.0, given=given, strength=strength)
        assert generate.evaluations == 2 * steps
        far.append((got - known).square().mean().item())
    assert far[0] < far[1] and far[1] == pytest.approx(far[2]) and far[2] < far[3]
    # by hand
    schedule, latents = text.schedule, text.vae.normalize(text.vae.encode(image).mode())
    times = sample_times(10, schedule)[-4:]
    x = schedule.alpha(times[:1]) * latents + schedule.sigma(times[:1]) * seeded_noise(seeds, (3, 8, 8))[0]
    cond, null = ({"context": text.denoiser.text(p)} for p in (conditions, ["", ""]))
    x = samplers["ddim"](make_denoiser(text.denoiser.unet, schedule, "v", cond, null, 2.0), x.float(), times, schedule)
    near(generate(text, conditions, seeds, 10, 2.0, given=given, strength=0.3), sample.finish(text, x))
    for strength in (0, -1, 2, math.nan):
        with pytest.raises(ValueError, match=f"strength={strength} is not above 0"):
            generate(text, conditions, seeds, 10, given=given, strength=strength)
    for more in (dict(strength=0.5), dict(source=conditions)):
        with pytest.raises(ValueError, match=r"strength and source start from a picture: there is no given\['image'\]"):
            generate(text, conditions, seeds, 10, **more)


@pytest.mark.parametrize("sampler", samplers)
def test_inpainting_by_any_model_and_sampler(pipelines, sampler):
    image, mask, none = pictures(), half(), pipelines["none"]
    frames = []
    got = generate(
        none, [None] * 2, [0, 1], 4, sampler=sampler, given={"image": image, "mask": mask}, see=frames.append
    )
    assert torch.equal(got[..., 16:], image[..., 16:]), "exactly"
    assert (got - image)[..., :16].abs().mean() > 0.05
    plain = generate(none, [None] * 2, [0, 1], 4, sampler=sampler)
    assert (got - plain)[..., :16].abs().max() > 1e-2, "what is known is seen"
    assert len(frames) >= 4


def test_what_is_known_stays(pipelines):
    x0, known = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    painted = torch.zeros(2, 1, 4, 4)
    painted[0, :, 1] = 1
    got = keep_known(lambda x, t: x0, known, painted)(x0, 0.5)
    assert torch.equal(got[0, :, 1], x0[0, :, 1]) and torch.equal(got[0, :, 2:], known[0, :, 2:])
    assert torch.equal(got[1], known[1])
    # one painted pixel opens its latent
    none, image, mask = pipelines["none"], pictures(1), torch.zeros(1, 1, 32, 32)
    mask[..., 5, 6] = 1
    frames, latents = [], none.vae.normalize(none.vae.encode(image).mode())
    got = generate(none, [None], [0], 2, given={"image": image, "mask": mask}, see=frames.append)
    assert (got != image).any(1).sum() <= 1 and (got != image).any()
    expected = none.vae.decode(none.vae.denormalize(latents)).clamp(-1, 1)
    assert (frames[-1] - expected)[..., 4:8, 4:8].abs().max() > 1e-3
    assert (frames[-1] - expected)[..., 28:, 28:].abs().mean() < (frames[-1] - expected)[..., 4:8, 4:8].abs().mean()


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_inpainting_by_a_model_made_for_it(pipelines, watch, cfg):
    pipeline, image, mask = pipelines["inpaint"], pictures(), half()
    calls = watch(pipeline)
    got = generate(pipeline, ["a", "b"], [0, 1], 3, cfg, given={"image": image, "mask": mask})
    assert torch.equal(got[..., 16:], image[..., 16:])
    shown = image_condition("inpaint", pipeline.vae, {"image": image, "mask": mask}, (8, 8))
    assert shown.shape == (2, 4, 8, 8) and len(calls) == 3
    for call in calls:
        near(call["concat"], torch.cat([shown] * int(cfg)), 1e-6)
    other = pictures(seed=5)
    other[..., 16:] = image[..., 16:]  # what is below the mask is not seen
    near(generate(pipeline, ["a", "b"], [0, 1], 3, cfg, given={"image": other, "mask": mask}), got)
    assert (
        generate(pipeline, ["a", "b"], [0, 1], 3, cfg, given={"image": other, "mask": mask}, strength=0.5) - got
    ).abs().max() > 0.1


def test_super_resolution(pipelines, watch):
    pipeline, low = pipelines["sr"], pictures(3, 16)
    calls = watch(pipeline)
    got = generate(pipeline, [None] * 3, [5, 6, 7], 2, given={"low": low})
    assert got.shape == (3, 3, 32, 32)
    noise = torch.stack([torch.randn(3, 16, 16, generator=after((3, 8, 8), seed)) for seed in (5, 6, 7)])
    level = torch.zeros(3, dtype=torch.long)
    seen = image_condition("sr", pipeline.vae, {"low": augment_low(low, level, noise)}, (8, 8))
    near(calls[0]["concat"], seen, 1e-6)
    assert calls[0]["y"].tolist() == [0, 0, 0] and seen.shape == (3, 12, 8, 8)
    near(generate(pipeline, [None] * 2, [6, 7], 2, given={"low": low[1:]}), got[1:])
    given = {"low": low, "level": torch.tensor([0, 9, 9])}
    noisier = generate(pipeline, [None] * 3, [5, 6, 7], 2, batch_size=2, given=given)
    assert calls[-2]["y"].tolist() == [0, 9] or calls[-1]["y"].tolist() == [9]
    near(noisier[0], got[0])
    assert (noisier[1] - got[1]).abs().max() > 1e-3
    wide = generate(pipeline, [None], [0], 1, given={"low": pictures(1, 32)[..., :24, :]})
    assert wide.shape == (1, 3, 48, 64), "any size"


def after(shape, seed):
    """A picture's generator after its noise was drawn."""
    generator = torch.Generator().manual_seed(seed)
    torch.randn(shape, generator=generator)
    return generator


def test_from_a_map(pipelines, watch):
    pipeline, maps = (
        pipelines["semantic"],
        torch.randint(-1, 5, (2, 32, 32), generator=torch.Generator().manual_seed(0)),
    )
    calls = watch(pipeline)
    got = generate(pipeline, [None] * 2, [0, 0], 2, given={"map": maps})
    one_hot = torch.stack([(maps == k).float() for k in range(5)], dim=1)
    near(calls[0]["concat"], pipeline.denoiser.rescaler(one_hot), 1e-6)
    assert (got[0] - got[1]).abs().max() > 1e-2, "the map matters"


def test_given_that_does_not_fit(pipelines):
    image, mask, low = pictures(1), half(1), pictures(1, 16)
    for name, given, message in (
        ("inpaint", {}, r"\(task=inpaint\) draws from image and mask: given\['image'\] is missing"),
        ("inpaint", {"image": image}, r"given\['mask'\] is missing"),
        ("sr", {"image": image}, r"draws from low: given\['low'\] is missing"),
        ("semantic", {}, r"draws from map: given\['map'\] is missing"),
        ("none", {"low": low}, r"given\['low'\] is nothing that this checkpoint \(task=none\) can use"),
        ("none", {"mask": mask}, r"given\['mask'\] is nothing that"),
        ("sr", {"low": low, "image": image}, r"given\['image'\] is nothing that"),
        ("none", {"image": image, "mask": half(1, 16)}, "what is given has several sizes"),
        ("none", {"image": pictures(1, 40)[..., :36]}, "size=36 is not a multiple of 8"),
        ("none", {"image": pictures(2)}, "2 image for 1 pictures: give one each"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(pipelines[name], [None], [0], 1, given=given)


# --- DDIM inversion ---


@pytest.mark.parametrize("name", ["cosine", "flow", "scaled_linear"])
def test_inversion_comes_back(name):
    """On exact Gaussian data: noise and back, nearer with more steps or iterations, and to where the flow begins."""
    schedule, z = make_schedule(name), normal(64, 2)
    x0, start = MEAN + STD * z, noisy(schedule, z)

    def errors(steps, iterations):
        times = sample_times(steps, schedule)
        noise = ddim_invert(gaussian_denoiser(schedule), x0, times, schedule, iterations)
        back = samplers["ddim"](gaussian_denoiser(schedule), noise, times, schedule)
        return (back - x0).abs().max().item(), (noise - start).abs().max().item()

    for iterations in (1, 3):
        (back, there), (back_2, there_2), (back_4, there_4) = (errors(steps, iterations) for steps in (25, 50, 100))
        assert back > back_2 > back_4 and there > there_2 > there_4, iterations
        assert there_4 < 0.2 and back_4 < 0.4 * back
    assert errors(50, 3)[0] < errors(50, 1)[0]
    assert errors(50, 60)[0] < 1e-3, "the exact inverse is what the iterations tend to"


def test_inversion_draws_the_picture_again(pipelines):
    text = pipelines["text"]
    image = generate(text, ["a cat"] * 2, [0, 1], 20)  # a picture that the model knows
    again = generate(text, ["a cat"] * 2, [7, 8], 20, given={"image": image}, source=["a cat"] * 2)
    known = text.vae.decode(text.vae.encode(image).mode()).clamp(-1, 1)
    fresh = generate(text, ["a cat"] * 2, [7, 8], 20)
    assert (again - known).square().mean() < 0.1 * (fresh - known).square().mean()
    assert generate.evaluations == 20
    other = generate(text, ["a red star"] * 2, [7, 8], 20, 2.0, given={"image": image}, source=["a cat"] * 2)
    assert generate.evaluations == 20 * 3 + 2 * 20
    assert (other - again).abs().max() > 1e-2


# --- between two ---


def test_slerp():
    a, b = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    near(slerp(a, b, torch.zeros(4)), a)
    near(slerp(a, b, torch.ones(4)), b)
    mid = slerp(a, b, torch.full((4,), 0.5))
    torch.testing.assert_close(mid.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1), rtol=0.1, atol=0)
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    near(slerp(x, y, torch.tensor([1 / 3])), torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]]))
    near(slerp(a, a, torch.full((4,), 0.3)), a)


def test_between_two_seeds_and_two_prompts(pipelines):
    text = pipelines["text"]
    ends = generate(text, ["a cat", "a red star"], [3, 9], 3, 2.0)
    weights = [0.0, 0.5, 1.0]
    prompts, seeds = [Between("a cat", "a red star", w) for w in weights], [Between(3, 9, w) for w in weights]
    frames = generate(text, prompts, seeds, 3, 2.0)
    near(frames[[0, 2]], ends)
    contexts = text.denoiser.text(["a cat", "a red star"])
    cond, null = {"context": contexts.mean(0, keepdim=True)}, {"context": text.denoiser.text([""])}
    noise = slerp(*seeded_noise([3, 9], (1, 3, 8, 8))[0], torch.tensor([0.5]))
    denoise = make_denoiser(text.denoiser.unet, text.schedule, "v", cond, null, 2.0)
    x = samplers["ddim"](denoise, noise, sample_times(3, text.schedule), text.schedule)
    near(frames[1:2], sample.finish(text, x))
    near(generate(text, prompts[1:], seeds[1:], 3, 2.0), frames[1:])
    assert text.caption(prompts[1]) == "a cat -> a red star, 0.50"
    plain = pipelines["none"]  # an unconditional guide does not mind
    assert generate(text, prompts, seeds, 1, 2.0, guide=plain).shape == (3, 3, 32, 32)


# --- many ---


def fake_draw(rows, side=4):
    return np.stack([np.full((side, side + 1, 3), i % 256, np.uint8) for i in rows])


def test_many_pictures_resume(tmp_path):
    path, calls = str(tmp_path / "samples.npz"), []

    def killed_after(most):
        def draw(rows):
            if len(calls) == most:
                raise KeyboardInterrupt
            calls.append(rows)
            return fake_draw(rows)

        return draw

    labels, settings = [i % 3 for i in range(23)], {"seed": 1, "size": (8, 8)}
    with pytest.raises(KeyboardInterrupt):
        draw_many(path, 23, 5, killed_after(2), labels, settings)
    assert sorted(os.listdir(path + ".parts")) == ["00000000.npy", "00000005.npy", "settings.json"]
    with pytest.raises(ValueError, match=r"samples.npz.parts was drawn with other settings \(seed: 1 there, 2 here\)"):
        draw_many(path, 23, 5, fake_draw, labels, settings | {"seed": 2})
    draw_many(path, 23, 5, killed_after(-1), labels, settings)
    assert calls == [range(0, 5), range(5, 10), range(10, 15), range(15, 20), range(20, 23)], "none twice"
    with np.load(path) as npz:
        assert sorted(npz.files) == ["arr_0", "arr_1"]
        assert npz["arr_0"].dtype == np.uint8 and npz["arr_0"].shape == (23, 4, 5, 3)
        assert (npz["arr_0"] == fake_draw(range(23))).all() and npz["arr_1"].tolist() == labels
    assert os.listdir(tmp_path) == ["samples.npz"]
    with pytest.raises(ValueError, match="samples.npz is there already: remove it, or choose another out"):
        draw_many(path, 23, 5, fake_draw, labels, settings)


def test_many_pictures_by_several_ranks(tmp_path):
    """Each draws its own chunks, the first puts them together after the others are done."""
    path, drawn = str(tmp_path / "samples.npz"), {0: [], 1: [], 2: []}

    def rank(number):
        def draw(rows):
            drawn[number].append(rows.start)
            return fake_draw(rows)

        def barrier():
            if number == 0:
                rank(2)
                rank(1)

        draw_many(path, 17, 4, draw, None, {}, number, 3, barrier)

    rank(0)
    assert drawn == {0: [0, 12], 1: [4, 16], 2: [8]}
    with np.load(path) as npz:
        assert npz.files == ["arr_0"] and (npz["arr_0"] == fake_draw(range(17))).all()


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"could not write .*00000000.npy \(No space left on device\): make room"):
        draw_many(str(tmp_path / "a.npz"), 3, 3, fake_draw, None, {})
    assert os.listdir(tmp_path / "a.npz.parts") == ["settings.json"]


def test_bulk_command(runs, command, tmp_path, monkeypatch):  # noqa: F811
    asked = []
    fid = types.ModuleType("fid")
    fid.score = lambda *args, **more: asked.append((args, more)) or {"fid": 12.5, "samples": 10}
    fid.open_extractor = lambda **networks: asked.append(networks)
    fid.open_pictures = lambda *args: asked.append(args)
    monkeypatch.setitem(sys.modules, "fid", fid)
    args = f"--ckpt={runs['class'].path}", *FAST, "--num_samples=10", "--batch_size=4", "--seed=3"
    status, out, err = command(*args, "--fid_ref=.", "--trunk=vgg", "--trunk_weights=vgg.pth")
    assert (status, err) == (0, ""), err
    assert re.search(r'10 pictures in .* s: samples.npz\n{"fid": 12.5, "samples": 10}\n$', out)
    weights = dict(inception_weights="", trunk="vgg", trunk_weights="vgg.pth")
    before = [weights | {"device": "cpu"}, (".", "reference", 32)]
    after = (("samples.npz", "."), dict(image_size=0, device="cpu", **weights))
    assert asked == [*before, after], "what can be wrong is found before anything is drawn"
    stamp = Path("samples.npz").stat().st_mtime_ns
    status, out, err = command(*args, "--fid_ref=.", "--trunk=vgg", "--trunk_weights=vgg.pth")
    assert status == 0 and "samples.npz is there already: compared as it is" in out and asked[-1] == after
    assert Path("samples.npz").stat().st_mtime_ns == stamp
    with np.load(tmp_path / "samples.npz") as npz:
        np.savez(tmp_path / "untold.npz", arr_0=npz["arr_0"])
    for out, seed, wanted in (
        ("samples.npz", 4, "samples.npz was drawn with other settings (seed: 3 there, 4 here): take those, or"),
        ("untold.npz", 3, "untold.npz does not tell how it was drawn: remove it, or choose another out"),
    ):
        more = (f"--out={out}", f"--seed={seed}", "--fid_ref=.", "--trunk=vgg", "--trunk_weights=vgg.pth")
        status, _, err = command(*args, *more)
        assert status == 1 and wanted in err and asked.count(after) == 2, "another's pictures are not taken for its own"
    with np.load(tmp_path / "samples.npz") as npz:
        one, labels = npz["arr_0"], npz["arr_1"]
    assert one.shape == (10, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3] * 2 + [0, 1]
    expected = generate(load_pipeline(runs["class"].path), labels.tolist(), range(3, 13), 2, 3.0)
    assert abs(one.astype(int) - np.stack([to_pil(x) for x in expected])).max() <= 1


def test_bulk_on_two_ranks(runs, command, tmp_path):  # noqa: F811
    import helpers

    (tmp_path / "prompts.txt").write_text("a cat\na dog\na red star\n")
    args = [
        f"--ckpt={runs['text'].path}",
        *FAST,
        "--num_samples=7",
        "--batch_size=2",
        f"--prompts={tmp_path}/prompts.txt",
    ]
    assert command(*args, "--out=one.npz")[0] == 0
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    processes = []
    for rank in range(2):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        everything = ("sample.py", [*args, "--out=two.npz"], str(tmp_path), environment, None, None, None, False)
        processes.append(helpers.context.Process(target=helpers._main, args=everything))
        processes[-1].start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "stderr0").read_text()
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert one.files == two.files == ["arr_0"] and one["arr_0"].shape == (7, 32, 32, 3)
        assert abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert not (tmp_path / "two.npz.parts").exists()


# --- the command ---


@pytest.fixture
def files(tmp_path):
    """Pictures to start from, in the folder that the command runs in."""
    rng = np.random.default_rng(0)
    for name, (W, H) in {"photo.png": (40, 32), "small.png": (16, 24), "odd.png": (45, 37)}.items():
        pixels = np.kron(rng.integers(0, 256, (-(-H // 8), -(-W // 8), 3)), np.ones((8, 8, 1)))[:H, :W]
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name)
    mask = np.zeros((32, 40), np.uint8)
    mask[8:20, 4:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.zeros((32, 40), np.uint8)).save(tmp_path / "black.png")
    classes = Image.fromarray(rng.integers(0, 5, (32, 32)).astype(np.uint8), mode="P")
    classes.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
    classes.save(tmp_path / "map.png")
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(tmp_path / "seven.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("b.png", "a.png"):
        Image.open(tmp_path / "photo.png").rotate(180 * (name == "a.png")).save(tmp_path / "folder" / name)
        Image.open(tmp_path / ("photo.png" if name == "a.png" else "odd.png")).save(tmp_path / "mixed" / name)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes((tmp_path / "photo.png").read_bytes()[:80])
    return tmp_path


PHOTO, FOLDER, MASK = "--init_image=photo.png", "--init_image=folder", "--mask=mask.png"


@pytest.mark.parametrize(
    "name, args, shape, rows",
    [
        ("text", [PHOTO, "--prompt=a"], (32, 40), [("photo.png", "a", 0.75)] * 4),
        ("text", ["--init_image=odd.png", "--n=1", "--strength=0.3"], (32, 40), [("odd.png", "", 0.3)]),
        ("text", ["--init_image=odd.png", "--n=1", "--size=16,24"], (16, 24), [("odd.png", "", 0.75)]),
        ("class", [FOLDER, "--cls=0,2"], (32, 40), [(i, c, 0.75) for i in ("a.png", "b.png") for c in ("cat", "7")]),
        ("none", ["--init_image=mixed", "--size=32"], (32, 32), [("a.png", "", 0.75), ("b.png", "", 0.75)]),
        ("pixels", ["--init_image=small.png", "--n=2", "--mask="], (24, 16), [("small.png", "", 0.75)] * 2),
        ("none", [PHOTO, MASK, "--n=1"], (32, 40), [("photo.png", "", 1.0)]),
        ("inpaint", [PHOTO, MASK, "--prompt=x", "--n=1"], (32, 40), [("photo.png", "x", 1.0)]),
        ("sr", ["--init_image=small.png", "--noise_level=10", "--n=1"], (48, 32), [("small.png", "", 1.0)]),
        ("semantic", ["--semantic_map=map.png", "--n=1"], (32, 32), [("map.png", "", 1.0)]),
        ("text", [PHOTO, "--invert", "--source_prompt=a", "--prompt=b"], (32, 40), [("photo.png", "b", 1.0)]),
        ("tokens", [FOLDER, "--invert", "--cls=1"], (32, 40), [("a.png", "dog", 1.0), ("b.png", "dog", 1.0)]),
    ],
)  # fmt: skip
def test_from_pictures(runs, command, files, name, args, shape, rows):  # noqa: F811
    status, out, err = command(f"--ckpt={runs[name].path}", *FAST, "--out_dir=out", *args)
    assert (status, err) == (0, ""), err
    lines, drawn = records(files / "out")
    assert [(line["from"], line["prompt"], line["strength"]) for line in lines] == rows
    assert all(picture.shape == (*shape, 3) for picture, _ in drawn)
    assert len({picture.tobytes() for picture, _ in drawn}) == len(rows)
    if MASK in args:
        original, mask = (np.array(Image.open(files / f)) for f in ("photo.png", "mask.png"))
        changed = (drawn[0][0] != original).any(-1)
        assert not changed[mask == 0].any() and changed[mask > 0].mean() > 0.9


def test_a_map_of_one_bit_draws_as_it_trains(files):
    classes = np.random.default_rng(0).random((8, 8)) < 0.5
    for name in ("one.png", "one.map.png"):
        Image.fromarray(classes).save(files / "mixed" / name)
    images = Dataset(files / "mixed", "all", 8)
    trained = images.map([images.key(i) for i in range(len(images))].index("one.png"))
    drawn = sample.class_map(Image.open(files / "mixed/one.map.png"), 2, "one.map.png")
    assert torch.equal(trained, drawn) and trained.tolist() == classes.astype(int).tolist()


def test_a_picture_that_is_started_from_is_fitted(files):
    image = Image.open(files / "odd.png")
    assert (
        fit(image, (), 8).size == (40, 32)
        and fit(image, (16, 24), 8).size == (24, 16)
        and fit(image, (16,), 8).size == (16, 16)
    )
    assert np.array_equal(np.array(fit(image, (), 8)), np.array(image)[:32, :40])
    with pytest.raises(ValueError, match="a picture of 45x37 is smaller than 64x64: set size"):
        fit(image, (), 64)


def test_interpolation_and_trajectory(runs, command, tmp_path):  # noqa: F811
    args = f"--ckpt={runs['text'].path}", *FAST, "--steps=3"
    status, out, err = command(*args, "--prompt=a", "--prompt_to=b", "--seed_to=5", "--interpolate=3", "--out_dir=out")
    assert (status, err) == (0, ""), err
    lines, drawn = records(tmp_path / "out")
    assert [line["prompt"] for line in lines] == ["a -> b, 0.00", "a -> b, 0.50", "a -> b, 1.00"]
    assert [line["seed"] for line in lines] == [[0, 5, 0.0], [0, 5, 0.5], [0, 5, 1.0]]
    with Image.open(tmp_path / "out" / "interpolation.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (32, 32)
    assert command(*args, "--n=1", "--trajectory", "--steps=1", "--out_dir=short")[0] == 0, "a single frame"
    status, out, err = command(*args, "--prompt=b", "--seed=5", "--n=2", "--trajectory", "--out_dir=end")
    assert (status, err) == (0, ""), err
    end = records(tmp_path / "end")[1]
    assert abs(drawn[2][0].astype(int) - end[0][0]).max() <= 1
    with Image.open(tmp_path / "end" / "trajectory.gif") as gif:
        assert gif.n_frames == 3
        gif.seek(2)
        last = np.array(gif.convert("RGB")).astype(int)
    grid = np.array(Image.open(tmp_path / "end" / "grid.png")).astype(int)
    assert last.shape == grid.shape and abs(last - grid).mean() < 12, (
        "the last x0_hat of DDIM is the picture, in 256 colors"
    )
    assert (
        command(f"--ckpt={runs['class'].path}", *FAST, "--cls=dog", "--seed_to=4", "--interpolate=2", "--out_dir=o")[0]
        == 0
    )


def test_frames_are_what_is_seen_on_the_way(pipelines):
    frames = []
    got = generate(pipelines["none"], [None] * 5, range(5), 4, batch_size=3, see=frames.append)
    assert len(frames) == 4 and all(frame.shape == (3, 3, 32, 32) for frame in frames), "of the first batch"
    near(frames[-1], got[:3])
    assert (frames[0] - got[:3]).abs().max() > 1e-2


def test_tiles_and_guide_through_the_command(runs, command, tmp_path):  # noqa: F811
    args = f"--ckpt={runs['none'].path}", *FAST, "--n=1", "--size=32,64"
    assert command(*args, "--out_dir=a")[0] == command(*args, "--out_dir=b", "--decode_tile=8")[0] == 0
    a, b = (records(tmp_path / folder)[1][0][0].astype(int) for folder in "ab")
    assert a.shape == b.shape == (32, 64, 3) and 0 < abs(a - b).mean() < 30
    status, out, err = command(*args, f"--guide_ckpt={runs['none'].path}", "--cfg=2", "--out_dir=c")
    assert (status, err) == (0, "") and "4 network evaluations each" in out
    assert abs(records(tmp_path / "c")[1][0][0].astype(int) - a).max() <= 1, "guided away from itself it stays"


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("none", ["--negative=x"], "negative=x is not for this checkpoint, which takes no prompt"),
        ("text", ["--negative=x", "--cfg=1"], "negative=x needs a cfg above 1"),
        ("text", ["--negative=x", "--guide_ckpt=y"], "negative=x has no place beside guide_ckpt: set one of them"),
        ("none", ["--cfg_from=0.2"], "cfg_from=0.2 needs guidance: set cfg, or leave it out"),
        ("text", ["--cfg_to=0.2", "--cfg_from=0.5"], r"cfg_interval=0.5,0.2 is no interval of t: .*"),
        ("none", ["--guide_ckpt=x", "--cfg=1"], "guide_ckpt=x needs a cfg above 1"),
        ("none", ["--noise_scale=0.5"], "noise_scale=0.5 is for sampler=ddpm, not unipc"),
        ("none", ["--order=3", "--sampler=ddim"], "order=3 is for sampler=unipc, not ddim"),
        ("none", ["--noise_scale=-1", "--sampler=ddpm"], "noise_scale=-1.0: choose 0 or more"),
        ("pixels", ["--first_stage=x"], "first_stage=x has no place in a checkpoint that draws pixels: leave it out"),
        ("none", ["--spacing=even"], "unknown spacing 'even'.*"),
        ("none", ["--tower_weights=x"], "tower_weights=x is for checkpoints with a frozen text encoder"),
        ("none", ["--decode_tile=-1"], "decode_tile=-1: choose a tile's side in latents, such as 64, or 0"),
        ("pixels", ["--decode_tile=8"], "decode_tile=8 is for checkpoints with an autoencoder"),
        ("none", ["--strength=0.5"], "strength=0.5 needs init_image"),
        ("none", [MASK], "mask=mask.png needs init_image"),
        ("none", ["--invert"], "invert=True needs init_image"),
        ("none", [PHOTO, "--strength=0"], "strength=0.0 is not above 0 .*: choose 0.75"),
        ("none", [PHOTO, "--strength=2"], "strength=2.0 is not above 0 .*: choose 0.75"),
        ("none", ["--init_image=nowhere.png"], "nowhere.png is not there: give an image, or a folder of them"),
        ("none", ["--init_image=empty"], "empty holds no images: give an image, or a folder of them"),
        ("none", ["--init_image=bad.png"], r"bad.png does not open as an image \(.*\)"),
        ("none", ["--init_image=mixed", MASK], "mask.png is 40x32 and b.png is 45x37: make .*"),
        ("pixels", ["--init_image=mixed"], r"the pictures of mixed have several sizes \(40x32, 45x37\): .*"),
        ("none", [PHOTO, "--mask=small.png"], "small.png is 16x24 and photo.png is 40x32: make them .*"),
        ("none", [PHOTO, "--mask=black.png"], "black.png is black all over: white is what is painted"),
        ("none", [PHOTO, "--mask=folder"], "mask=folder is a folder: give one picture, .*"),
        ("class", [PHOTO], "this checkpoint takes a class: say with --cls .*"),
        ("none", [PHOTO, "--size=20"], "size=20 is not a multiple of 8: choose 16"),
        ("inpaint", [], "this checkpoint, of task=inpaint, draws from pictures: give init_image"),
        ("inpaint", [PHOTO], "this checkpoint, of task=inpaint, draws from pictures: give mask"),
        ("sr", [], "this checkpoint, of task=sr, draws from pictures: give init_image"),
        ("sr", ["--init_image=small.png", "--noise_level=11"], "noise_level=11: choose 0 to 10"),
        ("sr", ["--init_image=small.png", "--strength=0.5"], "strength=0.5 is not for this checkpoint, of task=sr"),
        ("sr", ["--init_image=small.png", "--size=64"], "size=.* is not for this checkpoint, of task=sr"),
        ("none", ["--noise_level=3"], "noise_level=3 is for super-resolution checkpoints trained with sr_noise"),
        ("semantic", [], "this checkpoint, of task=semantic, draws from pictures: give semantic_map"),
        ("semantic", ["--semantic_map=photo.png"], "photo.png has mode RGB: a map is a PNG of one channel, .*"),
        ("semantic", ["--semantic_map=seven.png"], "seven.png holds class 7: this checkpoint knows 0 to 4"),
        ("semantic", [PHOTO], "init_image=photo.png is not for .*=semantic: give semantic_map"),
        ("none", ["--semantic_map=map.png"], "semantic_map=map.png is not for this checkpoint, of task=none"),
        ("text", ["--source_prompt=a"], "source_prompt=a is for --invert"),
        ("text", [PHOTO, "--invert", "--n=2"], "n=2 is not for --invert, which goes all the way, .*"),
        ("text", [PHOTO, "--invert", "--sampler=ddpm"], "invert needs a sampler without noise .*"),
        ("text", [PHOTO, "--invert", "--eta=0.5", "--sampler=ddim"], "invert needs a sampler without noise .*"),
        ("text", ["--seed_to=3"], "seed_to=3 is for --interpolate"),
        ("text", ["--interpolate=3", "--prompt=a"], "interpolate=3 frames need two ends: .*"),
        ("text", ["--interpolate=1", "--seed_to=3"], "interpolate=1 frames need two ends: .*"),
        ("text", ["--interpolate=3", "--prompt_to=a"], "prompt_to needs prompt, where the way to it begins"),
        ("class", ["--interpolate=3", "--prompt_to=a"], "prompt_to=a is not for this checkpoint, .*"),
        ("class", ["--interpolate=3", "--seed_to=4"], "this checkpoint takes a class: say with --cls .*"),
        ("class", ["--interpolate=3", "--seed_to=4", "--cls=0,1"], "cls=0,1 names several classes: .*"),
        ("text", ["--num_samples=3", "--n=2"], "n=2 is not for --num_samples"),
        ("text", ["--num_samples=-3"], "num_samples=-3: choose 1 or more pictures"),
        ("text", ["--num_samples=3", "--trajectory"], "trajectory=True is not for --num_samples"),
        ("inpaint", ["--num_samples=3"], "num_samples=3 is not for this checkpoint, of task=inpaint"),
        ("text", ["--out=x.npz"], "out=x.npz is for --num_samples"),
        ("text", ["--num_samples=2", "--out=drawn", "--fid_ref=.", "--trunk_weights=y"], "out=drawn .* end it in .npz"),
        ("text", ["--seed=99999999999999999999"], "seed=99999999999999999999: choose one of at most 62 bits"),
        ("text", ["--num_samples=2", "--batch_size=0"], "batch_size=0: choose 1 or more pictures"),
        ("text", ["--num_samples=2", "--trunk=vgg"], "trunk=vgg is for --fid_ref"),
        ("text", ["--num_samples=2", "--fid_ref=folder"], "fid_ref needs inception_weights=FILE or .*"),
        ("text", ["--num_samples=2", "--fid_ref=x", "--trunk_weights=y"], "fid_ref=x is not there: .*"),
        ("vae", ["--reconstruct=folder", "--prompt=a"], "prompt=a is not for --reconstruct"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(runs, command, files, name, args, message):  # noqa: F811
    fast = FAST[:1] if name == "vae" else FAST
    where = [] if any(arg.startswith("--num_samples") for arg in args) else ["--out_dir=out"]
    status, out, err = command(f"--ckpt={runs[name].path}", *fast, *where, *args)
    assert (status, out) == (1, "")
    assert re.fullmatch(f"sample.py: {message}\n", err), err
    assert not (files / "out").exists() and not (files / "samples.npz").exists()


@pytest.mark.parametrize("arg", [MASK, "--strength=0.5"])
def test_a_task_of_ones_own_takes_no_mask(runs, arg):  # noqa: F811
    """A task that the script does not know yet, a depth map say: what it cannot use is refused, not ignored."""
    pipeline = sample.load_pipeline(str(runs["none"].path))._replace(task={"task": "depth"})
    with pytest.raises(ValueError, match="is not for this checkpoint, of task=depth"):
        sample.check_settings(configure(dict(vars(sample)), [PHOTO, arg]), pipeline)


def test_torchrun_is_for_many(runs, command, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out, err = command(f"--ckpt={runs['text'].path}", *FAST)
    assert err == "sample.py: 2 processes would draw the same pictures: set num_samples, or leave torchrun out\n"
