"""Weights of other projects in and out: models that diffusers, transformers and open_clip build compute the same."""

import copy
import json
import math
import os
import pathlib
import runpy
import shutil
import sys
import types

import helpers
import pytest
import torch
from conftest import ROOT, fill, meta
from safetensors.torch import load_file, save_file

import checkpoint
import convert
import diffusion
import sample
from checkpoint import UserError
from text import CLIPTextEncoder, TextEncoder
from unet import Denoiser, Rescaler, UNet
from vae import VAE

MERGES = b"#version: 0.2\nl o\nlo w</w>\n! !</w>\n"  # a CLIP tokenizer of 517 tokens
WIDTHS, GROUPS = (16, 32, 32, 64), 8
TOWER = dict(layers=3, length=12, vocab=517)  # heads of 64 channels, as in all towers
TOWERS = {"clip_l": TOWER | dict(width=64, heads=1, activation="quick_gelu", layer="last", pad="end")}
TOWERS["openclip_h"] = TOWER | dict(width=128, heads=2, activation="gelu", layer="penultimate", pad="zero")


@pytest.fixture
def small_towers(monkeypatch):
    """The published towers' names stand for small ones."""
    for name in TOWERS:
        monkeypatch.setitem(convert.TOWERS, name, TOWERS[name])


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, tolerance=1e-4):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < tolerance, error
    return True


def near(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def keys(model, layout, **options):
    layers = convert.unet_layers if isinstance(model, UNet) else convert.vae_layers
    return convert.key_table(layers(model.settings, **options), layout)


def renamed(model, layout="compvis", **options):
    """A model's state dict with the names of a layout, without the statistics, which others do not have."""
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("latent_")}
    out = convert.to_theirs(state, keys(model, layout, **options))
    return {name: t.contiguous() for name, t in out.items()}


def same_gradients(ours, theirs, table):
    """backward has been called on both; theirs has the other layout's names."""
    gradients = convert.to_ours({name: p.grad for name, p in theirs.named_parameters()}, table)
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    scale = max(g.abs().max() for g in gradients.values())
    for name, p in ours.named_parameters():
        assert (p.grad - gradients[name]).abs().max() < 1e-4 * max(scale * 1e-2, gradients[name].abs().max()), name


def tower_of(path, **options):
    settings, state, merges = convert.load_clip(str(path), **options)
    return checkpoint.build(CLIPTextEncoder, settings, state, path, merges=merges)


def refused(message, call, *args, **options):
    with pytest.raises(UserError) as error:
        call(*args, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


# --- checkpoints of ours ---


@pytest.mark.parametrize("name", ["vae", "text", "class", "none", "pixels"])
def test_a_run_gives_its_ema(runs, name):
    run, x = runs[name], noise(1, 3, 16, 24)
    for path in (run.path, f"{run.path}/latest.safetensors"):
        if name == "pixels":
            refused("without an autoencoder", VAE.from_pretrained, path)
        else:
            vae = VAE.from_pretrained(path)
            assert torch.equal(vae.normalize(vae.encode(x).mean), run.vae.normalize(run.vae.encode(x).mean))
            assert vae.settings == run.vae.settings and not vae.training and not vae.quant_conv.weight.requires_grad
        if name == "vae":
            refused("stage", UNet.from_pretrained, path)
        else:
            unet, expected = UNet.from_pretrained(path), run.denoiser.unet
            assert unet.settings == expected.settings and not unet.training
            assert all(torch.equal(t, expected.state_dict()[key]) for key, t in unet.state_dict().items())


# --- autoencoders of others ---


def diffusers_vae(diffusers, name="AutoencoderKL", widths=WIDTHS, **settings):
    n = len(widths)
    settings = dict(down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n) | settings
    settings = dict(block_out_channels=widths, layers_per_block=2, norm_num_groups=GROUPS, latent_channels=4) | settings
    return fill(getattr(diffusers, name)(**settings)).eval()


VAES = {
    "f8": dict(scaling_factor=0.5),
    "f4": dict(widths=WIDTHS[:3], scaling_factor=0.5),
    "vq": dict(name="VQModel", widths=WIDTHS[:3], num_vq_embeddings=64, latent_channels=3, vq_embed_dim=5),
    # LDM's kl-f16
    "attention": dict(
        widths=WIDTHS[:2],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    ),
}


@pytest.mark.parametrize("name", VAES)
def test_vae_of_diffusers(diffusers, tmp_path, name):
    """Outputs, gradients, the scale of the latents."""
    theirs = diffusers_vae(diffusers, **VAES[name])
    theirs.save_pretrained(tmp_path)
    ours, x = VAE.from_pretrained(str(tmp_path)).requires_grad_(True), noise(2, 3, 32, 48).clamp(-1, 1)
    assert ours.factor == {"f8": 8, "f4": 4, "vq": 4, "attention": 2}[name] and not ours.training
    if name == "vq":
        z = theirs.encode(x).latents
        ours_out = torch.cat([ours.encode(x).mean.flatten(), ours.decode(z.detach()).flatten()])
        theirs_out = torch.cat([z.flatten(), theirs.decode(z.detach()).sample.flatten()])
        scale = theirs.config.scaling_factor
    else:
        moments, scale = theirs.encode(x).latent_dist, 0.18215 if name == "attention" else 0.5
        assert close(ours.encode(x).mean, moments.mean) and close(ours.encode(x).logvar, moments.logvar)
        ours_out = ours.decode(ours.encode(x).sample(noise(*moments.mean.shape)))
        theirs_out = theirs.decode(moments.mean + moments.std * noise(*moments.mean.shape)).sample
    assert torch.equal(ours.latent_std, torch.full_like(ours.latent_std, 1 / scale)) and not ours.latent_mean.any()
    assert close(ours_out, theirs_out)
    for out in (ours_out, theirs_out):
        (out * noise(*out.shape, seed=1)).sum().backward()
    if name == "vq":  # the codebook, which only the loss trains
        theirs.quantize.embedding.weight.grad = ours.quantize.embedding.weight.grad = torch.zeros(64, 5)
    same_gradients(ours, theirs, keys(ours, "diffusers"))


def test_containers(diffusers, tmp_path):
    """Shards, pickles, half precision, the names of diffusers before 0.14, a pipeline's folder, a file alone."""
    theirs, x = diffusers_vae(diffusers, latents_mean=[1.0] * 4, latents_std=[2.0] * 4), noise(1, 3, 16, 16)
    expected = theirs.encode(x).latent_dist.mode()
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    theirs.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    theirs.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    theirs.save_pretrained(tmp_path / "old")
    file, old = str(tmp_path / "old" / "diffusion_pytorch_model.safetensors"), {}
    for name, t in load_file(file).items():
        for new, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = t
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
    save_file(old, file)
    for name, options in (("half", {}), ("half_sharded", {"max_shard_size": "200KB"})):
        copy.deepcopy(theirs).half().save_pretrained(tmp_path / name, variant="fp16", **options)
    for path in ("sharded", "pickled", "pipeline", "old", "old/diffusion_pytorch_model.safetensors", "half_sharded"):
        ours = VAE.from_pretrained(str(tmp_path / path))
        assert ours.quant_conv.weight.dtype == torch.float32 and ours.latent_mean.eq(1).all()
        with torch.no_grad():
            assert close(ours.encode(x).mean, expected, 1e-2 if "half" in path else 1e-4), path
    assert torch.equal(VAE.from_pretrained(str(tmp_path / "half")).quant_conv.weight, ours.quant_conv.weight)


# Names and shapes of published files with CompVis' names
KL_F8 = {
    "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "quant_conv.weight": (8, 8, 1, 1),
    "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
    "decoder.up.3.block.2.conv1.weight": (512, 512, 3, 3),
}
SD_1 = {
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
}


def test_published_names_and_shapes():
    with torch.device("meta"):
        vae, unet = VAE(), UNet(context_dim=768)
    for model, some, count, parameters in ((vae, KL_F8, 248, 83_653_863), (unet, SD_1, 686, 859_520_964)):
        state = renamed(model)
        assert len(state) == count and sum(t.numel() for t in state.values()) == parameters
        assert {name: tuple(state[name].shape) for name in some} == some
        settings, layout = (convert.infer_vae if model is vae else convert.infer_unet)(state)
        assert layout == "compvis" and {k: model.settings[k] for k in settings} == settings
    known = convert.release_of(settings)
    assert (known["num_heads"], known["objective"], known["scale"]) == (8, "eps", 0.18215)
    with torch.device("meta"):
        unet = UNet(3, 3, channels=192, channel_mult=(1, 2, 3, 5), attention_ds=(8, 4, 2), num_heads=1, context_dim=512)
    assert convert.release_of(convert.infer_unet(renamed(unet))[0])["num_heads"] == 1  # cin256-v2


def test_tables_agree_with_diffusers_converter(diffusers):
    """diffusers turns CompVis' names into its own by code of its own."""
    from diffusers.loaders import single_file_utils

    for settings in (dict(), dict(ch_mult=(1, 2, 4), num_res_blocks=1), dict(ch_mult=(1, 1, 2, 2, 4))):
        vae = fill(VAE(ch=16, norm_groups=8, **settings))
        levels = len(vae.settings["ch_mult"])
        config = {"down_block_types": [""] * levels, "up_block_types": [""] * levels}
        theirs, ours = single_file_utils.convert_ldm_vae_checkpoint(renamed(vae), config), renamed(vae, "diffusers")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(t.reshape(theirs[name].shape), theirs[name]) for name, t in ours.items())
    tried = [dict(), dict(linear_proj=True, num_classes=20, concat_channels=3, attention_ds=(2, 4, 8))]
    for settings in (*tried, dict(channel_mult=(1, 2), num_res_blocks=1, attention_ds=(2,))):
        unet = fill(UNet(channels=16, norm_groups=8, num_heads=4, context_dim=24, **settings))
        config = {"layers_per_block": unet.settings["num_res_blocks"], "num_class_embeds": 20}
        file = checkpoint.with_prefix("model.diffusion_model", renamed(unet))
        theirs, ours = single_file_utils.convert_ldm_unet_checkpoint(file, config), renamed(unet, "diffusers")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], t) for name, t in theirs.items())


COMPVIS_VAES = {
    "kl": (dict(), 1 / 0.18215),
    "vq": (dict(ch_mult=(1, 2), z_channels=3, bottleneck="vq", codebook_size=16, embed_dim=5), 1.0),
    "kl-f16": (dict(ch_mult=(1, 1, 2, 2, 4), z_channels=16, attn_resolutions=(16,)), math.nan),
}


@pytest.mark.parametrize("name", COMPVIS_VAES)
def test_vae_of_compvis(tmp_path, name):
    """Alone, with its loss, in a Lightning checkpoint; and in the file of a model."""
    settings, std = COMPVIS_VAES[name]
    made, x = fill(VAE(ch=32, num_res_blocks=1, **settings)).eval(), noise(1, 3, 16, 16)
    state = renamed(made)
    assert ("encoder.down.4.attn.0.norm.weight" in state) == (name == "kl-f16")
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(64, 3, 4, 4)}
    alone, model = str(tmp_path / "alone.ckpt"), str(tmp_path / "model.safetensors")
    torch.save({"state_dict": state | loss, "global_step": 7}, alone)
    save_file(checkpoint.with_prefix("first_stage_model", state), model)
    for file in (alone, model):
        vae = VAE.from_pretrained(file)
        assert vae.settings == made.settings and torch.equal(vae.encode(x).mean, made.encode(x).mean)
        assert torch.equal(vae.decode(vae.encode(x).mean), made.decode(made.encode(x).mean))
        assert vae.latent_std.allclose(torch.full_like(vae.latent_std, std), equal_nan=True)
    assert VAE.from_pretrained(alone, scaling_factor=0.25).latent_std.unique().item() == 4
    known = dict(norm_groups=16, tanh_out=True)
    assert VAE.from_pretrained(alone, **known).settings == made.settings | known
    refused("by its tensors and config, not 7; leave z_channels out", VAE.from_pretrained, alone, z_channels=7)
    refused("nonsense is not a setting", VAE.from_pretrained, alone, nonsense=7)


# --- U-Nets of others ---


def diffusers_unet(diffusers, name):
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    s = dict(block_out_channels=WIDTHS, norm_num_groups=GROUPS, layers_per_block=2, sample_size=16)
    sd2 = dict(cross_attention_dim=24, attention_head_dim=[2, 4, 4, 8], use_linear_projection=True)
    if name.startswith("uncond"):
        s |= dict(in_channels=3, out_channels=3, attention_head_dim=8)
        if name == "uncond_updown":  # as LDM's churches
            s |= dict(downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift")
            s |= dict(attn_norm_num_groups=GROUPS, down_block_types=["AttnDownBlock2D"] * 4)
            s |= dict(up_block_types=["AttnUpBlock2D"] * 4)
        return fill(diffusers.UNet2DModel(**s)).eval()
    upscaler = dict(in_channels=7, num_class_embeds=20, attention_head_dim=8)
    upscaler |= dict(only_cross_attention=[True, True, True, False])
    upscaler |= dict(down_block_types=["DownBlock2D", down, down, down], up_block_types=[up, up, up, "UpBlock2D"])
    s |= {
        "sd1": dict(cross_attention_dim=24, attention_head_dim=8),
        "sd2": sd2,
        "inpaint": sd2 | dict(in_channels=9),
        "upscaler": sd2 | upscaler,
    }[name]
    return fill(diffusers.UNet2DConditionModel(**s)).eval()


@pytest.mark.parametrize("name", ["sd1", "sd2", "inpaint", "upscaler", "uncond", "uncond_updown"])
def test_unet_of_diffusers(diffusers, tmp_path, name):
    theirs = diffusers_unet(diffusers, name)
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(str(tmp_path)).requires_grad_(True)
    heads = {"sd1": (8, 0), "upscaler": (8, 0)}.get(name, (0, 8))
    assert (ours.settings["num_heads"], ours.settings["head_dim"]) == heads
    C, extra = ours.settings["in_channels"], ours.settings["concat_channels"]
    assert extra == {"inpaint": 5, "upscaler": 3}.get(name, 0)
    x, t, inputs, more = noise(2, C, 16, 16), torch.tensor([20.0, 731.0]), {}, {}
    if "uncond" not in name:
        inputs["context"] = more["encoder_hidden_states"] = noise(2, 7, 24, seed=1)
    if name == "upscaler":
        inputs["y"] = more["class_labels"] = torch.tensor([3, 19])
    if extra:
        inputs["concat"] = noise(2, extra, 16, 16, seed=2)
    a = ours(x, t, **inputs)
    b = theirs(torch.cat([x, inputs["concat"]], 1) if extra else x, t, **more).sample
    assert close(a, b)
    for out in (a, b):
        (out * noise(*out.shape, seed=3)).sum().backward()
    same_gradients(ours, theirs, keys(ours, "diffusers"))


def test_attention_blocks_of_compvis(tmp_path):
    """qkv is a convolution over the pixels; q, k and v alternate by head, as in QKVAttentionLegacy, or do not."""
    heads, c, pixels = 3, 48, 10
    settings = dict(channels=16, channel_mult=(1, 3), attention_ds=(2,), transformer_depth=0, norm_groups=8)
    unet, file = fill(UNet(num_heads=heads, **settings)), str(tmp_path / "unet.safetensors")
    for new_order in (False, True):
        block = renamed(unet, new_order=new_order)
        weight, bias = block["middle_block.1.qkv.weight"], block["middle_block.1.qkv.bias"]
        assert weight.shape == (3 * c, c, 1) and block["middle_block.1.proj_out.weight"].shape == (c, c, 1)
        x = noise(2, c, pixels)
        qkv = torch.nn.functional.conv1d(x, weight, bias)
        if new_order:
            q, k, v = (part.reshape(2 * heads, c // heads, pixels) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(2 * heads, 3 * c // heads, pixels).split(c // heads, dim=1)
        weights = torch.einsum("bct,bcs->bts", q, k / (c // heads) ** 0.5).softmax(-1)
        h = torch.einsum("bts,bcs->bct", weights, v).reshape(2, c, pixels)
        proj = block["middle_block.1.proj_out.weight"], block["middle_block.1.proj_out.bias"]
        expected = torch.nn.functional.conv1d(h, *proj).transpose(1, 2)
        assert close(unet.middle_block[1].attn(x.transpose(1, 2)), expected)
        save_file(block, file)
        again = UNet.from_pretrained(file, num_heads=heads, norm_groups=8, new_attention_order=new_order)
        assert all(torch.equal(t, unet.state_dict()[name]) for name, t in again.state_dict().items())
    refused("does not say its number of heads; give num_heads=N or head_dim=N", UNet.from_pretrained, file)


@pytest.mark.parametrize("settings", [
    dict(context_dim=24), dict(context_dim=24, linear_proj=True, num_heads=0, head_dim=16, concat_channels=5),
    dict(context_dim=24, num_classes=20, self_attention=(True, False, False, True), attention_ds=(2, 4, 8)),
    dict(transformer_depth=0, attention_ds=(8, 4, 2)), dict(context_dim=24, transformer_depth=3, attention_ds=(4,)),
    dict(transformer_depth=0, resblock_updown=True, scale_shift=True),
    dict(context_dim=24, num_res_blocks=(1, 2, 3, 1)),
])  # fmt: skip
@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_unet_settings_from_shapes(settings, layout):
    with torch.device("meta"):
        unet = UNet(channels=32, **settings)
    inferred, found = convert.infer_unet(renamed(unet, layout))
    heads = {name: unet.settings[name] for name in ("num_heads", "head_dim")}
    inferred = convert.UNET | inferred | heads
    differing = {name for name in inferred if inferred[name] != unet.settings[name] and name != "attention_ds"}
    assert found == layout and not differing and set(inferred["attention_ds"]) == set(unet.settings["attention_ds"])


# --- text towers of others ---


def clip_config(transformers, **settings):
    s = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=517)
    s |= dict(max_position_embeddings=77, bos_token_id=515, eos_token_id=516, pad_token_id=516, projection_dim=16)
    return transformers.CLIPTextConfig(**s | settings)


def save_tokenizer(transformers, folder, pad="<|endoftext|>"):
    """As in Stable Diffusion's folder."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(c) for c in (*plain, *range(256, 256 + 68))]
    names += [name + "</w>" for name in names] + ["lo", "low</w>", "!!</w>", "<|startoftext|>", "<|endoftext|>"]
    os.makedirs(folder)
    (pathlib.Path(folder) / "merges.txt").write_bytes(MERGES)
    (pathlib.Path(folder) / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_of_transformers(transformers, tmp_path, activation):
    theirs = fill(transformers.CLIPTextModel(clip_config(transformers, hidden_act=activation))).eval()
    theirs.save_pretrained(tmp_path / "text_encoder")
    quick = activation == "quick_gelu"
    tokenizer = save_tokenizer(transformers, str(tmp_path / "tokenizer"), "<|endoftext|>" if quick else "!")
    (tmp_path / "model_index.json").write_text("{}")
    # where "!" is the padding, it is padding wherever it is
    texts = ["low low?! slow" if quick else "low low?? slow", "", "a low owl, a lower bowl " * 30]
    rows = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(input_ids=rows).last_hidden_state
        for path in (tmp_path, tmp_path / "text_encoder"):
            ours = tower_of(path)
            assert torch.equal(ours.tokenize(texts), rows) and close(ours(texts), expected)
        # heads and activation are in the config beside the weights
        ours = tower_of(tmp_path / "text_encoder" / "model.safetensors", merges=MERGES)
        assert close(ours(texts), expected)
    (tmp_path / "tokenizer" / "merges.txt").unlink()  # transformers 5 writes tokenizer.json alone
    assert torch.equal(tower_of(tmp_path).tokenize(texts), rows)
    refused("holds other of 3 blocks of width 64, not clip_l", convert.load_clip, str(tmp_path), name="clip_l")
    names = {name: f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}" for name in
             theirs.state_dict()}  # fmt: skip
    state = {names[name]: t for name, t in theirs.state_dict().items()}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, tmp_path / "model.safetensors")  # one head of 64: the file does not say
    ours = tower_of(tmp_path / "model.safetensors", merges=MERGES)
    theirs = transformers.CLIPTextModel(clip_config(transformers, num_attention_heads=1)).eval()
    theirs.load_state_dict(load_file(tmp_path / "text_encoder" / "model.safetensors"), strict=False)
    with torch.no_grad():
        assert close(ours(texts), theirs(input_ids=ours.tokenize(texts)).last_hidden_state)


def test_text_of_open_clip(open_clip, tmp_path):
    """Of a complete CLIP and of Stable Diffusion 2's file: the last block is there and not used."""
    from open_clip import transformer

    theirs = fill(transformer.TextTransformer(77, 517, width=128, heads=2, layers=3, output_dim=8)).eval()
    state = {name: t for name, t in theirs.state_dict().items() if name != "attn_mask"}
    beside = {"logit_scale": torch.ones(()), "visual.conv1.weight": torch.zeros(8, 3, 2, 2)}
    torch.save(state | beside, tmp_path / "open_clip_pytorch_model.bin")
    save_file({f"cond_stage_model.model.{name}": t for name, t in state.items()}, tmp_path / "sd2.safetensors")
    for file in ("open_clip_pytorch_model.bin", "sd2.safetensors"):
        ours = tower_of(tmp_path / file, merges=MERGES)
        assert ours.settings["layer"] == "penultimate" and ours.settings["pad"] == "zero" and len(ours.blocks) == 2
        rows = ours.tokenize(["low low!! slow", ""])
        options = dict(normalize_intermediates=True, intermediates_only=True, output_fmt="NLC")
        with torch.no_grad():
            expected = theirs.forward_intermediates(rows, **options)["text_intermediates"][-2]
            assert close(ours(rows), expected)


def test_openai_and_open_clip_have_the_same_names(tmp_path):
    """Only QuickGELU distinguishes OpenAI's ViT-L/14, and no tensor shows it."""
    shapes = dict(width=768, layers=12, heads=12, length=4, vocab=517, activation="quick_gelu", layer="last", pad="end")
    with torch.device("meta"):
        made = CLIPTextEncoder(**shapes, merges=MERGES)
    state = {name: torch.zeros(1).expand(t.shape) for name, t in made.state_dict().items()}
    state = convert.to_theirs(state, convert.key_table(convert.text_layers(12), "open_clip"))
    assert state["transformer.resblocks.3.attn.in_proj_weight"].shape == (3 * 768, 768)
    path = str(tmp_path / "clip.safetensors")
    save_file({name: t.half().contiguous() for name, t in state.items()} | {"text_projection": torch.ones(8)}, path)
    refused("give name=clip_l or name=other", convert.load_clip, path, merges=MERGES)
    for name, activation in (("clip_l", "quick_gelu"), ("other", "gelu")):
        settings = convert.load_clip(path, name, MERGES)[0]
        assert settings["activation"] == activation and settings["heads"] == 12


@pytest.mark.parametrize("name", ["clip_l", "openclip_h"])
@pytest.mark.parametrize("layout", ["ours", "transformers"])
def test_a_published_tower_is_recognised_without_its_config(name, layout, tmp_path, small_towers):
    tower = fill(CLIPTextEncoder(**TOWERS[name], merges=MERGES)).eval()
    table = convert.key_table(convert.text_layers(len(tower.blocks)), layout)
    file, prefix = str(tmp_path / "tower.safetensors"), {"ours": "", "transformers": "text_model."}[layout]
    save_file({prefix + key: t.contiguous() for key, t in convert.to_theirs(tower.state_dict(), table).items()}, file)
    for asked in (name, "") if layout == "transformers" else (name,):
        back = tower_of(file, name=asked, merges=MERGES)
        assert back.settings == tower.settings and torch.equal(back(["low low! Slow"]), tower(["low low! Slow"]))


# --- pipelines of others ---


def save_pipeline(diffusers, transformers, folder, name):
    """A Stable Diffusion with random weights as diffusers saves it; returns it with DDIM."""
    v = name == "sd2"
    text = dict(hidden_size=24, intermediate_size=96, num_attention_heads=4, hidden_act="gelu" if v else "quick_gelu")
    text = fill(transformers.CLIPTextModel(clip_config(transformers, **text))).eval()
    scheduler = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler |= dict(set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction" if v else "epsilon")
    parts = dict(vae=diffusers_vae(diffusers, widths=(32, 32, 32, 64), norm_num_groups=32), text_encoder=text)
    parts |= dict(tokenizer=save_tokenizer(transformers, f"{folder}.tokenizer", "!" if v else "<|endoftext|>"))
    parts |= dict(unet=diffusers_unet(diffusers, name), scheduler=diffusers.DDIMScheduler(**scheduler))
    pipe = diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


@pytest.fixture(scope="module")
def stable(diffusers, transformers, tmp_path_factory):
    """{name: (diffusers' pipeline, its folder)}"""
    root = tmp_path_factory.mktemp("pipelines")
    folders = {name: str(root / name) for name in ("sd1", "sd2")}
    return {name: (save_pipeline(diffusers, transformers, folder, name), folder) for name, folder in folders.items()}


def ddim(pipeline, x, conditions, times, guidance=1.0):
    """Latents before each DDIM step from x, and after the last one."""
    denoise, seen = sample.guided_denoiser(pipeline, conditions, {}, guidance), []

    def observe(x, t):
        seen.append(x)
        return denoise(x, t)

    return [*seen, diffusion.sample_ddim(observe, x, times, pipeline.schedule)]


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_ten_steps_of_ddim(stable, name):
    """Guided, from the same latents: equal after every step, and so is the image."""
    pipe, folder = stable[name]
    x, theirs = noise(1, 4, 16, 16), []

    def keep(pipe, i, t, inputs):
        theirs.append(inputs["latents"])
        return inputs

    options = dict(num_inference_steps=10, guidance_scale=7.5, latents=x, callback_on_step_end=keep, output_type="pt")
    image = pipe("low low? slow", **options).images
    pipeline = sample.load_pipeline(folder)
    assert pipeline.objective == {"sd1": "eps", "sd2": "v"}[name] and pipeline.latent_shape == (4, 16, 16)
    times = diffusion.sample_times(10, pipeline.schedule, pipeline.objective, "leading")
    ours = ddim(pipeline, x, ["low low? slow"], times, 7.5)
    assert len(theirs) == 10
    for a, b in zip(ours[1:], theirs, strict=False):
        assert close(a, b, 1e-3)
    assert ((sample.decode(pipeline, ours[-1]) + 1) / 2 - image).abs().max() < 1e-3


def test_ldm_pipeline(diffusers, tmp_path):
    """Unconditional: U-Net and VQModel, and their image."""
    vqvae = diffusers_vae(diffusers, "VQModel", WIDTHS[:3], num_vq_embeddings=64, latent_channels=3, scaling_factor=1.0)
    scheduler = dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    scheduler = diffusers.DDIMScheduler(**scheduler)
    pipe = diffusers.LDMPipeline(vqvae=vqvae, unet=diffusers_unet(diffusers, "uncond"), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    image = pipe(generator=torch.manual_seed(0), num_inference_steps=4, output_type="np").images
    pipeline = sample.load_pipeline(str(tmp_path))
    assert pipeline.tower is None and pipeline.latent_shape == (3, 16, 16) and pipeline.task["task"] == "none"
    times = torch.tensor([751, 501, 251, 1, 0], dtype=torch.float64) / 1000  # indices 750, 500, 250, 0, and data
    x = ddim(pipeline, torch.randn((1, 3, 16, 16), generator=torch.manual_seed(0)), [None], times)[-1]
    ours = ((sample.decode(pipeline, x) + 1) / 2).permute(0, 2, 3, 1)
    assert (ours - torch.from_numpy(image)).abs().mean() < 1e-3  # a code may differ


def with_unet(stable, folder, unet, **index):
    """The folder of SD 2 with another U-Net in it."""
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(f"{stable['sd2'][1]}/{name}", folder / name)
    unet.save_pretrained(folder / "unet")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | index))
    return str(folder)


def test_tasks(diffusers, stable, tmp_path):
    (tmp_path / "a").mkdir()
    inpaint = convert.load_pipeline(with_unet(stable, tmp_path / "a", diffusers_unet(diffusers, "inpaint")))
    assert inpaint["meta"]["model"]["task"] == "inpaint" and inpaint["unet"][0]["concat_channels"] == 5
    folder = tmp_path / "b"
    with_unet(stable, folder, diffusers_unet(diffusers, "upscaler"), max_noise_level=15)
    shutil.rmtree(folder / "vae")
    diffusers_vae(diffusers, widths=WIDTHS[:3], scaling_factor=0.08333).save_pretrained(folder / "vae")
    low = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="scaled_linear")
    low.save_pretrained(folder / "low_res_scheduler")
    model = convert.load_pipeline(str(folder))["meta"]["model"]
    task = {name: model[name] for name in ("task", "sr_scale", "sr_noise", "sr_schedule")}
    assert task == dict(task="sr", sr_scale=4, sr_noise=15, sr_schedule=("scaled_linear", 1e-4, 0.02))
    assert model["image_size"] == 64 and model["cond"] == "text"


def lightning(path, state):
    """A checkpoint as Lightning pickles it: its callbacks are objects of a package that is not installed."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__)
    sys.modules |= dict.fromkeys(names, module)
    try:
        callback = module.ModelCheckpoint()
        callback.best = 1.0
        torch.save({"state_dict": state, "callbacks": {module.ModelCheckpoint: {"of": callback}}}, path)
    finally:
        for name in names:
            del sys.modules[name]


def test_pipeline_of_compvis(stable, tmp_path):
    """The same weights in one Lightning file: prefixes, an EMA without dots, which counts, betas."""
    expected = sample.load_pipeline(stable["sd1"][1])
    unet = renamed(expected.denoiser.unet)
    state = {f"model.diffusion_model.{name}": torch.zeros_like(t) for name, t in unet.items()}
    state |= {"model_ema.diffusion_model" + name.replace(".", ""): t for name, t in unet.items()}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    state |= checkpoint.with_prefix("first_stage_model", renamed(expected.vae))
    table = convert.key_table(convert.text_layers(3), "transformers")
    text = convert.to_theirs(expected.tower.state_dict(), table)
    state |= checkpoint.with_prefix("cond_stage_model.transformer.text_model", text)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    file, known = str(tmp_path / "model.ckpt"), dict(num_heads=8, norm_groups=GROUPS)
    lightning(file, state | {"betas": betas.float()})
    refused("does not say its number of heads", UNet.from_pretrained, file)
    refused("does not say what it predicts; set objective=v", convert.load_pipeline, file, MERGES, **known)
    assert convert.load_pipeline(file, MERGES, otherwise="v", **known)["meta"]["model"]["objective"] == "v"
    parts = convert.load_pipeline(file, MERGES, objective="eps", **known)
    ours = {name: parts[name][1] for name in ("unet", "vae", "text")}
    theirs = dict(unet=expected.denoiser.unet, vae=expected.vae, text=expected.tower)
    for name, module in theirs.items():
        assert all(torch.equal(ours[name][key], t) for key, t in module.state_dict().items() if "latent" not in key)
    assert ours["vae"]["latent_std"].unique().item() == pytest.approx(1 / 0.18215)
    model = parts["meta"]["model"]
    assert (model["schedule"], model["beta_start"], model["beta_end"]) == ("scaled_linear", 0.00085, 0.012)
    assert (model["objective"], model["image_size"], model["cond"]) == ("eps", 512, "text")


def test_classes_as_tokens(tmp_path):
    """LDM's cin256-v2: 1001 classes, the last of which is the empty one."""
    settings = dict(channels=32, channel_mult=(1, 2), attention_ds=(2,), num_heads=1, context_dim=16)
    unet, vae = fill(UNet(3, 3, **settings)), fill(VAE(ch=32, ch_mult=(1, 2, 4), z_channels=3, bottleneck="vq"))
    table, file = noise(11, 16), str(tmp_path / "model.ckpt")
    state = checkpoint.with_prefix("model.diffusion_model", renamed(unet))
    state |= checkpoint.with_prefix("first_stage_model", renamed(vae))
    state |= {"cond_stage_model.embedding.weight": table, "betas": torch.linspace(1e-4, 0.02, 1000)}
    torch.save({"state_dict": state}, file)
    pipeline = sample.load_pipeline(file, objective="eps", num_heads=1)
    assert pipeline.num_classes == 10 and pipeline.schedule.name == "linear" and pipeline.vae.latent_std[0] == 1
    assert torch.equal(sample.network_inputs(pipeline, [3, 10])["context"], table[[3, 10]][:, None])
    refused("holds a text encoder", convert.load_clip, file)
    torch.save({"state_dict": state | {"cond_stage_model.embedding.weight": table[:10]}}, file)
    refused("no guidance", convert.load_pipeline, file, objective="eps", num_heads=1)


def test_fine_tuning(stable, small_data, tmp_path):
    """train_ldm.py continues from a pipeline's folder; the result is a checkpoint of ours."""
    folder = stable["sd1"][1]
    theirs = sample.load_pipeline(folder)
    args = f"--dataset={small_data} --init_from={folder} --image_size=64 --batch_size=1 --lr=1e-6 --warmup_steps=0"
    args += " --max_steps=1 --val_images=1 --n_samples=1 --sample_steps=1 --cache_latents=false --workers=0"
    args += " --device=cpu --out_dir=out"
    run = helpers.Run("ldm", tmp_path, *args.split(), bare=True).finish()
    ours = sample.load_pipeline(str(run.out))
    assert ours.objective == "eps" and ours.latent_shape == (4, 8, 8) and ours.denoiser.text is None
    for name in ("vae", "tower"):
        states = (getattr(pipeline, name).state_dict() for pipeline in (ours, theirs))
        assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    before = theirs.denoiser.unet.state_dict()
    moved = [(t - before[name]).abs().max() for name, t in ours.denoiser.unet.state_dict().items()]
    assert 0 < max(moved) < 1e-5 and sum(m > 0 for m in moved) > 600


# --- refused ---


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, zipped):
    marker, file = tmp_path / "ran", str(tmp_path / "model.ckpt")
    for call in ((os.system, (f"touch {marker}",)), (open, (str(marker), "w")), (eval, (f"open({marker!r}, 'w')",))):
        for content in ({"state_dict": {"a": torch.ones(1)}, "b": Call(*call)}, Call(*call), [Call(*call)]):
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            refused("code that would be run; use a .safetensors file", VAE.from_pretrained, file)
    assert not marker.exists()


def test_damaged_pickles(tmp_path):
    file = tmp_path / "a.ckpt"
    torch.save({"w": torch.zeros(1)}, file, _use_new_zipfile_serialization=False)
    good = file.read_bytes()
    contents = [good[:end] for end in range(0, len(good), 7)] + [b"dear diary\n" * 99, b"PK\x03\x04zip"]
    for content in (*contents, b"\x80\x02" + b"(" * 20_000, b"\x80\x02J", b"\x80\x02X\xff\xff\xff\x7f"):
        file.write_bytes(content)
        refused("a.ckpt: ", convert.read_tensors, str(file))
    torch.save({"w": torch.zeros(1).expand(2**20, 2**20)}, file)  # a few bytes that would fill the memory
    refused("a.ckpt: no tensors", convert.read_tensors, str(file))


def test_bad_folders(diffusers, tmp_path):
    good, bare = tmp_path / "good", tmp_path / "bare"
    diffusers_vae(diffusers).save_pretrained(good, max_shard_size="400KB")
    shard = sorted(good.glob("*-of-*.safetensors"))[1]
    state, load = load_file(shard), VAE.from_pretrained
    name = sorted(state)[0]
    save_file({k: t for k, t in state.items() if k != name}, shard)
    refused(f"lists {name}, which is in none of its shards", load, str(good))
    shard.unlink()
    refused(f"{shard.name}: no such file", load, str(good))
    bare.mkdir()
    refused("bare: no latest.safetensors in it", load, str(bare))
    for content, message in (("{}", "no weights (diffusion_pytorch_model.safetensors"), ("{", "cannot be read")):
        (bare / "config.json").write_text(content)
        refused(message, load, str(bare))
    (bare / "config.json").write_text("[]")
    refused("config.json: not a JSON object", load, str(bare))
    (bare / "config.json").unlink()
    (bare / "model_index.json").write_text("{}")
    refused("no autoencoder (vae or vqvae) in it", load, str(bare))
    (bare / "unet").mkdir()
    refused("unet: neither config.json nor model_index.json in it", UNet.from_pretrained, str(bare))


def test_bad_tensors(tmp_path):
    state, file = renamed(fill(VAE(ch=32, ch_mult=(1, 2), num_res_blocks=1))), str(tmp_path / "vae.safetensors")
    first, level = "encoder.mid.block_1.conv1.weight", "encoder.down.1.block.0.conv1.weight"
    for changed, message in (
        ({k: t for k, t in state.items() if k != first}, f"tensors are missing: {first}"),
        (state | {"encoder.mid.extra": torch.ones(1)}, "tensors are unknown: encoder.mid.extra"),
        (state | {first: torch.ones(32, 64, 3, 3)}, f"{first} is (32, 64, 3, 3)"),
        (state | {level: torch.ones(48, 32, 3, 3)}, "levels of [32, 48] channels"),
        (state | {"decoder.conv_in.weight": torch.ones(7)}, "settings or tensors do not fit (IndexError"),
        ({"weight": torch.ones(2)}, "no tensor encoder.conv_in.weight"),
        ({"unet.down.lora_A.weight": torch.ones(2)}, "a LoRA"),
        ({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.ones(2)}, "a LoRA"),
    ):
        save_file(changed, file)
        refused(message, VAE.from_pretrained, file)
    state = {"model.diffusion_model.a.bc": torch.ones(1), "model.diffusion_model.ab.c": torch.ones(1)}
    save_file(state | {"model_ema.diffusion_modelabc": torch.ones(1)}, file)
    refused("its EMA cannot be assigned", UNet.from_pretrained, file)


def test_sdxl(diffusers, tmp_path):
    """Its U-Net is refused by name; its autoencoder is supported, with its own scale."""
    state = checkpoint.with_prefix("first_stage_model", renamed(fill(VAE(ch=32, num_res_blocks=1))))
    state |= {"model.diffusion_model.label_emb.0.0.weight": torch.ones(4, 4)}
    state |= {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": torch.ones(4)}
    file = str(tmp_path / "xl.safetensors")
    save_file(state, file)
    assert VAE.from_pretrained(file).latent_std.unique().item() == pytest.approx(1 / 0.13025)
    for load in (UNet.from_pretrained, convert.load_pipeline):
        refused("SDXL's U-Net (it has label_emb.0.0.weight), which is not supported", load, file)
    xl = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80)
    theirs = diffusers.UNet2DConditionModel(block_out_channels=WIDTHS, norm_num_groups=8, cross_attention_dim=24, **xl)
    theirs.save_pretrained(tmp_path / "unet")
    refused("SDXL's U-Net (it has add_embedding", UNet.from_pretrained, str(tmp_path / "unet"))


def test_unsupported_configs(diffusers, tmp_path):
    diffusers_unet(diffusers, "sd1").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value, message in (
        ("act_fn", "gelu", "act_fn='gelu'; only 'silu' is supported"),
        ("norm_eps", 1e-6, "norm_eps=1e-06; only"),
        ("class_embed_type", "timestep", "class_embed_type='timestep'; only None"),
        ("attention_head_dim", [1, 2, 3, 4], "attention_head_dim=[1, 2, 3, 4]"),
        ("only_cross_attention", True, "only_cross_attention=True"),
        ("norm_num_groups", "x", "do not build a UNet"),
        ("attention_head_dim", [0, "x"], "settings or tensors do not fit"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        refused(message, UNet.from_pretrained, str(tmp_path))


def test_unsupported_pipelines(diffusers, stable, tmp_path):
    folder = tmp_path / "sd"
    path = with_unet(stable, folder, diffusers_unet(diffusers, "sd2"))
    xl = {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(xl))
    refused("a StableDiffusionXLPipeline with a text_encoder_2", convert.load_pipeline, path)
    (folder / "model_index.json").write_text("{}")
    refused("objective is v, not eps; leave objective out", convert.load_pipeline, path, objective="eps")
    refused("not a checkpoint of this repository", convert.to_diffusers, path, f"{tmp_path}/out")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    for changed, message in (
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "scheduler FlowMatchEulerDiscreteScheduler"),
        ({"prediction_type": "flow_prediction"}, "prediction_type=flow_prediction"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True; only False"),
        ({"beta_schedule": "mine"}, "the noise schedule"),
        ({"trained_betas": [0.5] * 1000}, "linear"),
    ):
        scheduler.write_text(json.dumps(config | changed))
        if "trained_betas" not in changed:
            refused(message, convert.load_pipeline, path)
        else:
            assert convert.load_pipeline(path)["meta"]["model"]["schedule"] == message
    scheduler.write_text(json.dumps(config))
    shutil.rmtree(folder / "text_encoder")
    refused("no text encoder, which its U-Net needs", convert.load_pipeline, path)
    refused("no model_index.json in it", convert.load_pipeline, str(folder / "unet"))


# --- ours out ---

KL = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, norm_groups=4)
VQ = KL | dict(bottleneck="vq", codebook_size=32)
PLAIN = dict(in_channels=3, out_channels=3, channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_ds=(2,))
PLAIN |= dict(norm_groups=4, num_heads=0, head_dim=8, transformer_depth=0)
CROSS = PLAIN | dict(transformer_depth=1, context_dim=32)
WIDE_VAE, WIDE = dict(ch=32, norm_groups=32), dict(channels=32, norm_groups=32, head_dim=16)  # as CompVis has it


def make_vae(mean=(0.3, -0.2, 0.1), std=(0.5, 1.0, 1.7), **settings):
    vae = fill(VAE(**KL | settings)).requires_grad_(False).eval()
    C = vae.latent_channels
    vae.latent_mean.copy_(torch.tensor(mean).repeat(C)[:C])
    vae.latent_std.copy_(torch.tensor(std).repeat(C)[:C])
    return vae


def make_unet(settings, **more):
    return fill(UNet(**settings | more)).requires_grad_(False).eval()


def save_vae(folder, vae):
    """A checkpoint of stage 1; returns its path."""
    about = meta("vae", vae.settings, config={"image_size": 16})
    checkpoint.write(f"{folder}/vae.safetensors", checkpoint.with_prefix("ema", vae.state_dict()), about)
    return f"{folder}/vae.safetensors"


def save_ldm(folder, vae, unet, cond="none", tower=None, denoiser=None, **model):
    """A checkpoint of stage 2; returns its path. model: the checkpoint's settings that differ from these."""
    denoiser = denoiser or Denoiser(unet)
    tensors = checkpoint.with_prefix("ema", denoiser.state_dict())
    tensors |= checkpoint.with_prefix("vae", vae.state_dict()) if vae else {}
    s = {"unet": denoiser.unet.settings, "text": denoiser.text and denoiser.text.settings, "cond": cond}
    s |= {"first_stage": "vae" if vae else "none", "num_classes": 3, "image_size": 16 if vae else 8}
    s |= {"objective": "v", "schedule": "cosine", "beta_start": 0.00085, "beta_end": 0.012, "zero_snr": False}
    s |= {"class_embed": "add", "text_encoder": "joint", "tower_hash": None, "task": "none", "uncertainty": False}
    s |= {"ema_stds": [], "sr_scale": 0, "sr_noise": 0, "sr_schedule": None, "map_classes": 0}
    config = {"tower_weights": "", "clip_vocab": ""}
    if tower is not None:
        config = {"tower_weights": f"{folder}/tower.safetensors", "clip_vocab": f"{folder}/merges.txt"}
        s["tower_hash"] = checkpoint.hash_weights(tower)
        save_file(tower.state_dict(), config["tower_weights"])
        (folder / "merges.txt").write_bytes(MERGES)
    about = meta("ldm", s | model, vae=vae and vae.settings, examples=[None], classes=[], config=config)
    checkpoint.write(f"{folder}/ldm.safetensors", tensors, about)
    return f"{folder}/ldm.safetensors"


def in_unit_range(images):
    """As diffusers' pipelines have them: (N,H,W,3) in [0,1]."""
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def images_of(file, conditions, steps, guidance=1.0):
    """Our images in DDIM steps from the latents of seeds 7, 8, ..., as diffusers' pipelines give theirs."""
    pipeline = sample.load_pipeline(file)
    times = diffusion.sample_times(steps, pipeline.schedule, pipeline.objective, "trailing")
    x = torch.stack([noise(*pipeline.latent_shape, seed=7 + i) for i in range(len(conditions))])
    return in_unit_range(sample.decode(pipeline, ddim(pipeline, x, conditions, times, guidance)[-1]))


def same_vae(got, vae):
    x, x0 = noise(1, 3, 16, 16).clamp(-1, 1), noise(1, vae.latent_channels, 8, 8)
    near(got.normalize(got.encode(x).mean), vae.normalize(vae.encode(x).mean))
    near(got.decode(got.denormalize(x0)), vae.decode(vae.denormalize(x0)))


@pytest.mark.parametrize(
    "settings",
    [{}, dict(latent_proj=False), dict(mid_attention=False, ch_mult=(1, 2, 2), num_res_blocks=2)],
    ids=["kl", "no projections", "no attention"],
)
def test_autoencoder_in_diffusers(settings, diffusers, tmp_path):
    """Encodes to unit variance and decodes it, there and when it is read back."""
    vae, x = make_vae(**settings), noise(2, 3, 16, 24).clamp(-1, 1)
    description = convert.to_diffusers(save_vae(tmp_path, vae), f"{tmp_path}/out")
    assert description == "components, no pipeline: vae (AutoencoderKL); it is an autoencoder alone"
    theirs = diffusers.AutoencoderKL.from_pretrained(f"{tmp_path}/out", subfolder="vae")
    assert theirs.config.scaling_factor == 1 and theirs.config.sample_size == 16
    ours, std = vae.encode(x), vae.latent_std.view(1, -1, 1, 1)
    with torch.no_grad():
        got = theirs.encode(x).latent_dist
        near(got.mean, vae.normalize(ours.mean))
        near(got.std, ours.std / std)
        near(theirs.decode(got.mean).sample, vae.decode(ours.mean))
    if not settings:
        same_vae(VAE.from_pretrained(f"{tmp_path}/out/vae"), vae)


@pytest.mark.parametrize("settings", [{}, dict(embed_dim=5), dict(latent_proj=False)])
def test_vq_in_diffusers(settings, diffusers, tmp_path):
    """One deviation and any means: the codes move along. Many codes are used, so a wrong distance would show."""
    vae, x = make_vae(std=(0.7,), **VQ | settings), noise(2, 3, 64, 64)
    vae.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    convert.to_diffusers(save_vae(tmp_path, vae), f"{tmp_path}/out")
    theirs = diffusers.VQModel.from_pretrained(f"{tmp_path}/out", subfolder="vae")
    x0 = noise(2, vae.latent_channels, 16, 16)
    with torch.no_grad():
        near(theirs.encode(x).latents, vae.normalize(vae.encode(x).mean))
        near(theirs.decode(x0).sample, vae.decode(vae.denormalize(x0)))
    assert len(vae.quantize.nearest(vae.denormalize(x0)).unique()) > 20
    same_vae(VAE.from_pretrained(f"{tmp_path}/out/vae"), vae)


@pytest.mark.parametrize("settings", [KL, KL | dict(latent_proj=False), VQ], ids=["kl", "no projections", "vq"])
def test_one_deviation_and_no_means_leave_the_weights_alone(settings, tmp_path):
    vae = make_vae(mean=(0.0,), std=(1 / 0.18215,), **settings)
    convert.to_diffusers(save_vae(tmp_path, vae), f"{tmp_path}/out")
    scale = json.loads((tmp_path / "out/vae/config.json").read_text())["scaling_factor"]
    assert scale == pytest.approx(0.18215, rel=1e-6) and torch.equal(torch.tensor(1 / scale), vae.latent_std[0])
    back = VAE.from_pretrained(f"{tmp_path}/out/vae").state_dict()
    assert all(torch.equal(back[name], t) for name, t in vae.state_dict().items())


def test_logvar_is_folded_in_nats():
    """log N(mean / s, std / s): the log-variance falls by 2 ln s; by hand for an identity projection."""
    tensors = convert.identity_projections(2, 2)
    got, scalar = convert.fold_statistics(tensors, torch.tensor([1.0, -2.0]), torch.tensor([2.0, 4.0]))
    assert scalar == 1
    near(got["quant_conv.weight"][:, :, 0, 0], torch.diag(torch.tensor([0.5, 0.25, 1.0, 1.0])))
    near(got["quant_conv.bias"], torch.tensor([-0.5, 0.5, -1.3862944, -2.7725887]))
    near(got["post_quant_conv.weight"][:, :, 0, 0], torch.diag(torch.tensor([2.0, 4.0])))
    near(got["post_quant_conv.bias"], torch.tensor([1.0, -2.0]))
    assert tensors["quant_conv.bias"].abs().max() == 0, "the input is unchanged"


@pytest.mark.parametrize(
    "settings",
    [
        CROSS | dict(linear_proj=True, num_classes=4),
        CROSS | dict(num_heads=2, head_dim=0, transformer_depth=2, num_res_blocks=(1, 2), self_attention=(True, False)),
        CROSS | dict(context_dim=0, scale_shift=True),
        # heads of 16 beside a level without attention, whose number means nothing
        CROSS | dict(channels=24, head_dim=16),
        CROSS | dict(channels=8, channel_mult=(1, 4), head_dim=16),
        PLAIN | dict(num_classes=4, concat_channels=2),
        PLAIN | dict(num_heads=1, head_dim=0, attention_ds=(1, 2), resblock_updown=True, scale_shift=True),
        PLAIN | dict(num_heads=4, head_dim=0, middle_attention=False),
    ],
)
@pytest.mark.parametrize("schedule", ["cosine", "scaled_linear"])
def test_unet_in_diffusers(settings, schedule, diffusers, tmp_path):
    unet = make_unet(settings)
    cond = "class" if settings.get("num_classes") else "none"
    convert.to_diffusers(save_ldm(tmp_path, make_vae(), unet, cond, schedule=schedule), f"{tmp_path}/out")
    theirs = "UNet2DConditionModel" if settings["transformer_depth"] else "UNet2DModel"
    theirs = getattr(diffusers, theirs).from_pretrained(f"{tmp_path}/out", subfolder="unet")
    s, x, index = unet.settings, noise(2, 3, 8, 8), torch.tensor([0, 733])
    ours, more, joined = {}, {}, x
    if s["num_classes"]:
        ours["y"] = more["class_labels"] = torch.tensor([1, 3])
    if s["context_dim"]:
        ours["context"] = more["encoder_hidden_states"] = noise(2, 5, 32)
    elif s["transformer_depth"]:
        more["encoder_hidden_states"] = None
    if s["concat_channels"]:
        ours["concat"] = noise(2, 2, 8, 8)
        joined = torch.cat([x, ours["concat"]], dim=1)
    with torch.no_grad():
        expected = unet(x, index.float() + (schedule == "cosine"), **ours)
        near(theirs(joined, index, **more).sample, expected)
        back = UNet.from_pretrained(f"{tmp_path}/out/unet")
        near(back(x, index.float(), **ours), expected)
    assert expected.std() > 0.1


TABLES = ["linear", "scaled_linear", "quadratic", "sqrt", "sigmoid", "squared_cosine", "cosine"]


@pytest.mark.parametrize("schedule, zero_snr", [(name, zero) for name in TABLES for zero in (False, True)][:-1])
def test_the_schedulers_table_is_ours(schedule, zero_snr, diffusers):
    model = dict(schedule=schedule, beta_start=0.00085, beta_end=0.012, zero_snr=zero_snr, objective="v")
    theirs = diffusers.DDIMScheduler.from_config(json.loads(json.dumps(convert.scheduler_config(model))))
    process = diffusion.make_schedule(schedule, zero_snr=zero_snr)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    near(theirs.alphas_cumprod.double().sqrt(), process.alpha(t))
    near((1 - theirs.alphas_cumprod.double()).sqrt(), process.sigma(t), atol=5e-5)
    if not zero_snr:  # and it is recognised
        betas = convert.betas_of(convert.table_of(model)[0])
        name = {"quadratic": "scaled_linear"}.get(schedule, schedule)
        for table in (betas, betas.float().double()):
            assert convert.schedule_of(table) == {"schedule": name, "beta_start": 0.00085, "beta_end": 0.012}
        assert convert.schedule_of(betas.flip(0)) is None and convert.schedule_of(betas[:999]) is None
    assert (theirs.alphas_cumprod[-1] == 0) == (zero_snr or schedule == "cosine")


PROCESSES = {
    "v cosine": dict(),
    "vq": dict(),
    "eps": dict(objective="eps", schedule="scaled_linear"),
    "v zero snr": dict(objective="v", schedule="scaled_linear", zero_snr=True),
    "x0": dict(objective="x0", schedule="squared_cosine"),
    "sigmoid": dict(objective="v", schedule="sigmoid"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_unconditional_pipeline(name, diffusers, tmp_path):
    """It generates the same images in diffusers, and when it is read back."""
    vae = make_vae(std=(0.7,), **VQ) if name == "vq" else make_vae()
    file, out = save_ldm(tmp_path, vae, make_unet(PLAIN), **PROCESSES[name]), f"{tmp_path}/out"
    assert convert.to_diffusers(file, out) == f'LDMPipeline: DiffusionPipeline.from_pretrained("{out}") opens it'
    theirs = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(theirs).__name__ == "LDMPipeline"
    theirs.set_progress_bar_config(disable=True)
    for steps in (1, 10):
        expected = images_of(file, [None], steps)
        got = theirs(1, torch.Generator().manual_seed(7), num_inference_steps=steps, output_type="np").images
        near(torch.from_numpy(got), expected, atol=1e-3)
    near(images_of(out, [None], 10), expected, atol=1e-3)
    assert expected.std() > 0.05
    ours, back = (read["model"] for read in (checkpoint.read_meta(file), convert.load_pipeline(out)["meta"]))
    same = ("objective", "schedule", "beta_start", "beta_end", "zero_snr", "cond", "task", "image_size")
    different = {name for name in same if ours[name] != back[name]}
    assert different <= ({"beta_start", "beta_end"} if ours["schedule"] == "squared_cosine" else set())


@pytest.mark.parametrize("name", ["clip_l", "openclip_h"])
def test_text_pipeline(name, diffusers, tmp_path, small_towers):
    tower = fill(CLIPTextEncoder(**TOWERS[name], merges=MERGES)).eval()
    process = dict(objective="eps", schedule="scaled_linear") if name == "clip_l" else {}
    unet, out = make_unet(CROSS, context_dim=tower.width), f"{tmp_path}/out"
    file = save_ldm(tmp_path, make_vae(), unet, "text", tower, text_encoder=name, **process)
    description = convert.to_diffusers(file, out)
    assert description == f'StableDiffusionPipeline: DiffusionPipeline.from_pretrained("{out}") opens it'
    theirs = diffusers.DiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert type(theirs).__name__ == "StableDiffusionPipeline" and theirs.safety_checker is None
    theirs.set_progress_bar_config(disable=True)
    prompts = ["low low!! Slow", "a lower owl " * 9, ""]
    tokens = theirs.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert tokens.tolist() == tower.tokenize(prompts).tolist() and theirs.tokenizer.model_max_length == 12
    with torch.no_grad():
        near(theirs.text_encoder(tokens)[0], tower(prompts))
        expected = images_of(file, prompts, 10, guidance=3.0)
        latents = torch.stack([noise(3, 8, 8, seed=7 + i) for i in range(3)])
        options = dict(num_inference_steps=10, guidance_scale=3.0, height=16, width=16, output_type="np")
        got = theirs(prompts, latents=latents, **options).images
    near(torch.as_tensor(got), expected, atol=1e-3)
    near(images_of(out, prompts, 10, guidance=3.0), expected, atol=1e-3)
    assert expected.std() > 0.05 and (expected[0] - expected[2]).abs().max() > 0.01, "the prompts matter"
    settings, state, _ = convert.load_tower(file, f"{out}/text_encoder", f"{tmp_path}/merges.txt")
    assert settings == tower.settings and checkpoint.hash_weights(state) == checkpoint.hash_weights(tower)
    refused("set --tower_weights=FILE", convert.load_tower, file, "nowhere")
    save_file({key: t + 1 for key, t in tower.state_dict().items()}, tmp_path / "other.safetensors")
    refused(f"another {name} than", convert.load_tower, file, f"{tmp_path}/other.safetensors")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("class", "no pipeline for such classes; class_labels=3 is the empty condition"),
        ("text", "its text encoder was trained here and cannot be exported"),
        ("inpaint", "no pipeline for task=inpaint as it was trained here"),
        ("transformers", "LDMPipeline takes plain attention, transformer_depth=0"),
        ("vq", "StableDiffusionPipeline takes no VQ"),
        ("pixels", "no pipeline of this type generates pixels"),
    ],
)
def test_other_models_become_components(name, reason, diffusers, tmp_path, small_towers):
    vae = None if name == "pixels" else make_vae(std=(0.7,), **VQ) if name == "vq" else make_vae()
    more = {"class": dict(num_classes=4), "inpaint": dict(concat_channels=4), "transformers": dict(context_dim=0)}
    plain, options = name in ("class", "inpaint", "pixels"), {}
    unet = make_unet(PLAIN if plain else CROSS, **(more | {"vq": dict(context_dim=64)}).get(name, {}))
    if name == "text":
        options = dict(denoiser=Denoiser(unet, TextEncoder(32, 1, 2, 8)))
    elif name == "vq":
        options = dict(tower=fill(CLIPTextEncoder(**TOWERS["clip_l"], merges=MERGES)), text_encoder="clip_l")
    elif name == "inpaint":
        options = dict(task="inpaint")
    cond = {"vq": "text", "text": "text", "class": "class"}.get(name, "none")
    got = convert.to_diffusers(save_ldm(tmp_path, vae, unet, cond, **options), f"{tmp_path}/out")
    classes = {"vae": "VQModel" if name == "vq" else "AutoencoderKL"} if vae else {}
    classes |= {"unet": "UNet2DModel" if plain else "UNet2DConditionModel", "scheduler": "DDIMScheduler"}
    assert got == f"components, no pipeline: {', '.join(f'{p} ({c})' for p, c in classes.items())}; {reason}"
    assert not (tmp_path / "out/model_index.json").exists()
    parts = {p: getattr(diffusers, c).from_pretrained(f"{tmp_path}/out", subfolder=p) for p, c in classes.items()}
    if name == "class":  # guided DDIM steps from the three components
        x, empty = (
            torch.stack([noise(3, 8, 8, seed=7 + i) for i in range(2)]),
            parts["unet"].config.num_class_embeds - 1,
        )
        parts["scheduler"].set_timesteps(10)
        with torch.no_grad():
            for t in parts["scheduler"].timesteps:
                labels = torch.tensor([0, 2]), torch.tensor([empty, empty])
                a, b = (parts["unet"](x, t, class_labels=y).sample for y in labels)
                x = parts["scheduler"].step(b + 2.0 * (a - b), t, x).prev_sample
            got = in_unit_range(parts["vae"].decode(x / parts["vae"].config.scaling_factor).sample)
        near(got, images_of(f"{tmp_path}/ldm.safetensors", [0, 2], 10, guidance=2.0), atol=1e-3)


@pytest.mark.parametrize(
    "vae, unet, model, to, words",
    [
        (dict(activation="swiglu"), {}, {}, "both", "activation=swiglu"),
        (dict(downsample="avg"), {}, {}, "both", "downsample=avg"),
        (dict(upsample="bilinear"), {}, {}, "both", "upsample=bilinear"),
        (dict(linear_attention=True), {}, {}, "both", "linear_attention of the autoencoder"),
        (dict(patch_size=2, ch_mult=(1,)), {}, {}, "both", "patch_size"),
        (dict(attn_resolutions=(16,), resolution=32), {}, {}, "diffusers", "attn_resolutions"),
        (dict(tanh_out=True), {}, {}, "diffusers", "tanh_out"),
        (dict(embed_dim=5), {}, {}, "diffusers", "embed_dim != z_channels"),
        (dict(norm_groups=4), {}, {}, "compvis", "norm_groups of the autoencoder"),
        ({}, dict(norm_groups=4), {}, "compvis", "norm_groups of the U-Net"),
        ({}, dict(unet_patch=2), {}, "both", "unet_patch"),
        ({}, CROSS | dict(context_pool=True), {}, "both", "context_pool"),
        ({}, dict(qk_norm=True), {}, "both", "qk_norm"),
        ({}, dict(linear_attention=True), {}, "both", "linear_attention of the U-Net"),
        ({}, dict(resample="pool"), {}, "diffusers", "resample=pool"),
        ({}, CROSS | dict(resblock_updown=True), {}, "diffusers", "resblock_updown with transformers"),
        ({}, CROSS | dict(middle_attention=False), {}, "diffusers", "transformers without middle_attention"),
        ({}, dict(num_res_blocks=(1, 2)), {}, "diffusers", "num_res_blocks by level"),
        ({}, dict(attention_ds=(1, 2), num_heads=2, head_dim=0), {}, "diffusers", "num_heads > 1 on several widths"),
        ({}, CROSS | dict(context_dim=0), {}, "compvis", "transformers without a context"),
        ({}, dict(middle_attention=False), {}, "compvis", "middle_attention=False"),
        ({}, {}, dict(objective="flow", schedule="cosine"), "both", "objective=flow"),
        ({}, {}, dict(schedule="flow"), "both", "schedule=flow, where"),
        ({}, {}, dict(objective="eps"), "both", "objective=eps with schedule=cosine"),
        ({}, {}, dict(cond="class", class_embed="token"), "diffusers", "class_embed=token"),
        ({}, {}, dict(task="semantic"), "diffusers", "task=semantic"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limits_are_named(vae, unet, model, to, words):
    vae = convert.VAE | KL | WIDE_VAE | vae
    about = dict(cond="none", objective="v", schedule="cosine", beta_start=0.00085, beta_end=0.012, zero_snr=False)
    about |= dict(task="none", class_embed="add", unet=convert.UNET | PLAIN | WIDE | unet) | model
    for layout in ("diffusers", "compvis"):
        named = any(words in name for name in convert.limits(layout, vae, about))
        assert named == (to in ("both", layout)), layout


def test_schedules_and_objectives_of_ones_own(monkeypatch):
    """Other layouts hold tables with alpha^2 + sigma^2 = 1, and eps, v and x0, whatever their names."""
    own = {"bent": diffusion.Schedule("bent", lambda t: 1 - t**2, lambda t: t, 0)}
    own |= {"root": diffusion.Schedule("root", lambda t: (1 - t) ** 0.5, lambda t: t**0.5, 0)}
    monkeypatch.setattr(diffusion, "make_schedule", lambda name, *ends, **more: own[name])
    model = dict(cond="none", beta_start=0.1, beta_end=0.2, zero_snr=False, task="none", unet=convert.UNET)
    for schedule, objective, found in (
        ("bent", "v", ["schedule=bent, where alpha^2 + sigma^2 is not 1"]),
        ("root", "eps", ["objective=eps with schedule=root, which starts at t = 0.995"]),
        ("root", "lean", ["objective=lean"]),
        ("root", "v", []),
    ):
        assert convert.limits("diffusers", None, model | dict(schedule=schedule, objective=objective)) == found


def test_refused_exports_leave_nothing_behind(tmp_path, monkeypatch):
    out = f"{tmp_path}/out"
    file = save_ldm(tmp_path, make_vae(), make_unet(PLAIN), objective="flow", schedule="flow")
    refused("diffusers cannot hold objective=flow; schedule=flow", convert.to_diffusers, file, out)
    refused("VQ latents with one std a channel", convert.to_diffusers, save_vae(tmp_path, make_vae(**VQ)), out)
    file = save_vae(tmp_path, make_vae(std=(math.nan,)))
    refused("no latent statistics; run train_vae.py with --measure_latents", convert.to_diffusers, file, out)
    file = save_vae(tmp_path, make_vae())
    refused("are for stage 2", convert.to_compvis, file, f"{out}.safetensors", ema_std=0.1)
    own = save_ldm(tmp_path, make_vae(), make_unet(PLAIN))
    tensors, about = checkpoint.read(own)
    checkpoint.write(own, tensors, about | {"model": about["model"] | {"unet": {"width": 3}}})
    refused("its denoiser is not a unet.UNet", convert.to_diffusers, own, out)

    def full_disk(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full_disk)
    refused("could not be written ([Errno 28] No space left on device)", convert.to_diffusers, file, out)
    assert sorted(os.listdir(tmp_path)) == ["ldm.safetensors", "vae.safetensors"]


# --- CompVis' file ---


def test_file_of_compvis(tmp_path):
    """What is in it besides the tensors of the models."""
    out = f"{tmp_path}/out/model.safetensors"
    vae, unet = make_vae(**WIDE_VAE), make_unet(PLAIN, **WIDE)
    description = convert.to_compvis(save_ldm(tmp_path, vae, unet), out)
    parts = "the autoencoder, scale_factor 1, the U-Net, its table of 1000 betas"
    assert description == f"{out}: {parts}; not in the file: objective=v, head_dim=16"
    expected = {f"first_stage_model.{name}" for name in renamed(vae)}
    expected |= {f"model.diffusion_model.{name}" for name in renamed(unet)}
    expected |= {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"}
    expected |= {"sqrt_one_minus_alphas_cumprod", "scale_factor"}
    state = load_file(out)
    assert set(state) == expected and state["scale_factor"] == 1
    assert state["model.diffusion_model.middle_block.1.qkv.weight"].shape == (192, 64, 1)
    alpha_bar, t = state["alphas_cumprod"], torch.arange(1, 1001, dtype=torch.float64) / 1000
    near(alpha_bar.double(), torch.cos(torch.pi / 2 * t) ** 2, atol=1e-7)
    near(torch.cumprod(1 - state["betas"].double(), 0), alpha_bar.double())
    assert torch.equal(state["alphas_cumprod_prev"], torch.cat([torch.ones(1), alpha_bar[:-1]]))
    near(state["sqrt_alphas_cumprod"] ** 2, alpha_bar)
    near(state["sqrt_one_minus_alphas_cumprod"] ** 2, 1 - alpha_bar)


@pytest.mark.parametrize("name", ["none", "clip_l", "openclip_h", "tokens", "joint"])
def test_compvis_there_and_back(name, tmp_path, small_towers):
    tower = fill(CLIPTextEncoder(**TOWERS[name], merges=MERGES)).eval() if name in TOWERS else None
    context = dict(context_dim=tower.width) if tower else {}
    vae, unet = make_vae((0.0,), (5.5,), **WIDE_VAE), make_unet(PLAIN if name == "none" else CROSS, **WIDE | context)
    model = dict(schedule="scaled_linear", text_encoder=name) if tower else {}
    denoiser = Denoiser(unet, TextEncoder(32, 1, 2, 8) if name == "joint" else None)
    if name == "tokens":
        denoiser.class_tokens = fill(torch.nn.Embedding(11, 32))
        model = dict(class_embed="token", num_classes=10)
    cond = {"none": "none", "tokens": "class"}.get(name, "text")
    out = f"{tmp_path}/model.safetensors"
    description = convert.to_compvis(save_ldm(tmp_path, vae, unet, cond, tower, denoiser, **model), out)
    assert ("the text encoder that was trained with it" in description) == (name == "joint")
    state, back = load_file(out), VAE.from_pretrained(out)
    texts = {key for key in state if key.startswith("cond_stage_model.")}
    assert bool(texts) == (name in ("clip_l", "openclip_h", "tokens")) and state["scale_factor"] == pytest.approx(
        1 / 5.5
    )
    assert all(torch.equal(t, back.state_dict()[key]) for key, t in vae.state_dict().items())
    if name == "joint":
        return
    parts = convert.load_pipeline(out, f"{tmp_path}/merges.txt" if tower else "", "v", head_dim=16)
    about = parts["meta"]["model"]
    assert (about["schedule"], about["cond"]) == (model.get("schedule", "cosine"), cond)
    if tower:
        assert parts["text"][0] == tower.settings and about["text_encoder"] == name
        assert all(torch.equal(parts["text"][1][key], t) for key, t in tower.state_dict().items())
        assert ("cond_stage_model.model.ln_final.bias" in texts) == (name == "openclip_h")
    elif name == "tokens":
        assert torch.equal(parts["class_tokens"], denoiser.class_tokens.weight)
    for key, t in unet.state_dict().items():
        near(parts["unet"][1][key], t)  # bits of the time embedding are lost where it is folded to and fro


def test_compvis_autoencoder_alone_and_maps(tmp_path):
    vae, out = make_vae(**WIDE_VAE | dict(latent_proj=False, tanh_out=True, attn_resolutions=(128,))), f"{tmp_path}/out"
    description = convert.to_compvis(save_vae(tmp_path, vae), f"{out}/a.safetensors")
    assert "a.safetensors: the autoencoder, scale_factor 1; not in the file: tanh_out=True of" in description
    state = load_file(f"{out}/a.safetensors")
    assert "decoder.up.1.attn.0.q.weight" in state and "scale_factor" not in state
    assert state["quant_conv.weight"].shape == (6, 6, 1, 1)
    unet = make_unet(PLAIN, **WIDE, concat_channels=3)
    denoiser = Denoiser(unet, rescaler=Rescaler(5, 2))
    file = save_ldm(tmp_path, make_vae(**WIDE_VAE), unet, denoiser=denoiser, task="semantic", map_classes=5)
    assert "the rescaler for maps" in convert.to_compvis(file, f"{out}/b.safetensors")
    weight = load_file(f"{out}/b.safetensors")["cond_stage_model.channel_mapper.weight"]
    assert torch.equal(weight, denoiser.rescaler.conv.weight)


def test_the_command(tmp_path, monkeypatch, capsys):
    def command(*args):
        monkeypatch.setattr(sys, "argv", ["convert.py", *args])
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        runpy.run_path(f"{ROOT}/convert.py", run_name="__main__")

    file, folder = save_ldm(tmp_path, make_vae(**WIDE_VAE), make_unet(PLAIN, **WIDE)), f"{tmp_path}/folder"
    command(f"--ckpt={file}", f"--out={folder}")
    assert capsys.readouterr().out.startswith("LDMPipeline: DiffusionPipeline.from_pretrained(")
    assert sorted(os.listdir(folder)) == ["model_index.json", "scheduler", "unet", "vqvae"]
    command(f"--ckpt={file}", "--to=compvis", f"--out={tmp_path}/file.safetensors")
    assert "file.safetensors: the autoencoder" in capsys.readouterr().out
    for args, words in (
        (["--out=x"], "--ckpt and --out: both must be set"),
        ([f"--ckpt={file}", f"--out={folder}"], "folder: exists already; give a new folder"),
        ([f"--ckpt={file}", "--to=compvis", f"--out={file}"], "exists already, or is not a .safetensors file"),
        ([f"--ckpt={file}", "--to=compvis", "--out=model.ckpt"], "exists already, or is not a .safetensors file"),
    ):
        refused(words, command, *args)
