"""Checkpoints as both training scripts write them come back as the same models; what else a path may hold is told."""

import json
import os
import shutil
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert
import diffusion
import sample
from text import TextEncoder
from unet import UNet
from vae import VAE


@pytest.fixture(scope="module")
def x():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def latents(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def same_vae(got, expected, x):
    posterior = got.encode(x)
    assert torch.equal(posterior.mean, expected.encode(x).mean)
    assert torch.equal(posterior.logvar, expected.encode(x).logvar)
    assert torch.equal(got.decode(posterior.mean), expected.decode(posterior.mean))
    assert torch.equal(got.normalize(posterior.mean), expected.normalize(posterior.mean))
    assert got.settings == expected.settings and got.has_latent_statistics
    assert not got.training and not any(p.requires_grad for p in got.parameters())
    return True


# --- what comes back ---


def test_stage_1_gives_its_ema(runs, x):
    run = runs["vae"]
    for path in (run.path, f"{run.path}/latest.safetensors"):
        assert same_vae(VAE.from_pretrained(path), run.vae, x)
    trained = convert.part(load_file(f"{run.path}/latest.safetensors"), "model")
    assert not torch.equal(trained["quant_conv.weight"], run.vae.quant_conv.weight), "the EMA, not the trained weights"


@pytest.mark.parametrize("name", ["text", "class", "none"])
def test_stage_2_gives_its_first_stage(runs, x, name):
    assert same_vae(VAE.from_pretrained(runs[name].path), runs["vae"].vae, x)


@pytest.mark.parametrize("name", ["text", "class", "none", "pixels"])
def test_stage_2_gives_its_unet(runs, name):
    run = runs[name]
    unet, inputs = UNet.from_pretrained(run.path), {"x": latents(2, 3, 8, 8), "t": torch.tensor([20.0, 700.0])}
    if name == "text":
        inputs["context"] = run.denoiser.text(["a", "red star"])
    if name == "class":
        inputs["y"] = torch.tensor([1, 3])
    assert torch.equal(unet(**inputs), run.denoiser.unet(**inputs)) and unet(**inputs).std() > 0.01
    assert unet.settings == run.denoiser.unet.settings
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())


def test_stage_2_gives_its_text_encoder(runs):
    prompts = ["a red star", "", "🌟 " * 20]
    text = convert.load_text_encoder(TextEncoder, runs["text"].path)
    expected = runs["text"].denoiser.text
    assert torch.equal(text.tokenize(prompts), expected.tokenize(prompts))
    assert torch.equal(text(prompts), expected(prompts)) and text.settings == expected.settings
    assert not text.training and not any(p.requires_grad for p in text.parameters())


@pytest.mark.parametrize("name", ["text", "class", "none", "pixels"])
def test_load_pipeline(runs, x, name):
    run, pipeline = runs[name], sample.load_pipeline(runs[name].path)
    objective, schedule = ("eps", "scaled_linear") if name == "class" else ("v", "cosine")
    expected = diffusion.make_schedule(schedule, 0.0015, 0.0195, zero_snr=False)
    assert pipeline.objective == objective and pipeline.schedule is expected
    assert pipeline.latent_shape == (3, 8, 8) and pipeline.shown == run.shown
    assert pipeline.num_classes == (4 if name == "class" else 0)
    assert pipeline.classes == (["cat", "dog", "7", "tench, Tinca"] if name == "class" else [])
    assert (pipeline.denoiser.text is not None) == (name == "text") and not pipeline.denoiser.training
    if name == "pixels":
        assert pipeline.vae is None
    else:
        assert same_vae(pipeline.vae, run.vae, x)
    tokens = run.denoiser.text.tokenize(["a red star"]) if name == "text" else None
    inputs = dict(tokens=tokens, y=torch.tensor([2]) if name == "class" else None)
    args = latents(1, 3, 8, 8), torch.tensor([300.0])
    assert torch.equal(pipeline.denoiser(*args, **inputs), run.denoiser(*args, **inputs))


def test_a_snapshot_of_the_ema_is_enough(runs, x, tmp_path):
    """ema_STEP.safetensors has no trained weights and no optimizer."""
    file = f"{runs['text'].path}/latest.safetensors"
    with safe_open(file, framework="pt") as f:
        meta = f.metadata()
    tensors = {k: t for k, t in load_file(file).items() if k.startswith(("ema.", "vae.", "text."))}
    save_file(tensors, tmp_path / "ema_00000001.safetensors", metadata=meta)
    pipeline = sample.load_pipeline(str(tmp_path / "ema_00000001.safetensors"))
    assert same_vae(pipeline.vae, runs["vae"].vae, x)
    assert torch.equal(pipeline.denoiser.text(["a"]), runs["text"].denoiser.text(["a"]))


def test_read_checkpoint_reads_only_what_is_asked_for(runs):
    tensors, meta = convert.read_checkpoint(runs["text"].path, "vae", "text")
    assert {name.split(".")[0] for name in tensors} == {"vae", "text"}
    assert meta["stage"] == "ldm" and meta["step"] == 1
    assert convert.read_checkpoint(runs["text"].path)[0] == {}
    assert convert.part({"ema.a": 1, "ema.unet.b": 2, "emas.c": 3}, "ema") == {"a": 1, "unet.b": 2}


def test_settings_may_be_repeated_but_not_contradicted(runs):
    assert VAE.from_pretrained(runs["vae"].path, ch_mult=(1, 2), z_channels=3).latent_channels == 3
    with pytest.raises(ValueError, match=r"tells its own settings \(z_channels: 3 in the file, 4 asked for\): leave"):
        VAE.from_pretrained(runs["vae"].path, ch=8, z_channels=4)
    with pytest.raises(
        ValueError, match="channels: 16 in the file, 320 asked for; nonsense: None in the file, 1 asked"
    ):
        UNet.from_pretrained(runs["text"].path, channels=320, nonsense=1)
    with pytest.raises(ValueError, match="text_length: 16 in the file, 77 asked for"):
        convert.load_text_encoder(TextEncoder, runs["text"].path, text_length=77)


# --- what else a path may hold ---


def test_nothing_there(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors is not there: name a .safetensors file"):
        VAE.from_pretrained(str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(FileNotFoundError, match="holds no latest.safetensors: train first, or name a checkpoint file"):
        sample.load_pipeline(str(tmp_path))
    assert convert.find_checkpoint(runs["vae"].path) == f"{runs['vae'].path}/latest.safetensors"


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.9999])
def test_cut_short(runs, tmp_path, share):
    file = tmp_path / "latest.safetensors"
    shutil.copy(f"{runs['vae'].path}/latest.safetensors", file)
    os.truncate(file, int(os.path.getsize(file) * share))
    with pytest.raises(ValueError, match="latest.safetensors is no checkpoint, or one cut short"):
        VAE.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"dear diary, today I trained a model\n" * 99, b"\x80\x02}q\x00.", b"PK\x03\x04zip"]
)
def test_another_kind_of_file(tmp_path, content):
    file = tmp_path / "model.ckpt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="model.ckpt is no checkpoint, or one cut short"):
        UNet.from_pretrained(str(file))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_somebody_else(tmp_path, metadata):
    file = str(tmp_path / "foreign.safetensors")
    save_file({"weight": torch.ones(2)}, file, metadata=metadata)
    with pytest.raises(ValueError, match="foreign.safetensors: there is no encoder.conv_in.weight: it is no auto"):
        VAE.from_pretrained(file)


def test_altered_settings(runs, tmp_path):
    original, file = f"{runs['vae'].path}/latest.safetensors", str(tmp_path / "altered.safetensors")
    with safe_open(original, framework="pt") as f:
        text = f.metadata()["latent_diffusion"]
    altered = json.dumps(json.loads(text) | {"step": 2})
    for crc, fine in ((zlib.crc32(text.encode()), False), (zlib.crc32(altered.encode()), True)):
        save_file(load_file(original), file, metadata={"latent_diffusion": altered, "crc32": str(crc)})
        if fine:
            assert convert.read_checkpoint(file)[1]["step"] == 2
            continue
        with pytest.raises(
            ValueError, match="altered.safetensors is damaged: its settings do not match their checksum"
        ):
            VAE.from_pretrained(file)


def test_a_later_format(runs, tmp_path):
    original, file = f"{runs['vae'].path}/latest.safetensors", str(tmp_path / "later.safetensors")
    with safe_open(original, framework="pt") as f:
        text = json.dumps(json.loads(f.metadata()["latent_diffusion"]) | {"format": 2})
    save_file(load_file(original), file, metadata={"latent_diffusion": text, "crc32": str(zlib.crc32(text.encode()))})
    with pytest.raises(ValueError, match="later.safetensors has format 2, this code reads 1"):
        VAE.from_pretrained(file)


def test_one_kind_where_another_is_wanted(runs):
    with pytest.raises(ValueError, match=r"is an autoencoder \(stage 1\): it holds no U-Net"):
        UNet.from_pretrained(runs["vae"].path)
    with pytest.raises(ValueError, match=r"is an autoencoder \(stage 1\): train_ldm.py --first_stage=.*vae makes what"):
        sample.load_pipeline(runs["vae"].path)
    with pytest.raises(ValueError, match="was trained on pixels: it holds no autoencoder"):
        VAE.from_pretrained(runs["pixels"].path)
    for name in ("vae", "class"):
        with pytest.raises(ValueError, match="holds no text encoder"):
            convert.load_text_encoder(TextEncoder, runs[name].path)
