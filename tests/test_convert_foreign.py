"""Other people's weights: models as diffusers, transformers and open_clip build and save them compute the same here."""

import copy
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import helpers
import pytest
import torch
from conftest import ROOT, fill
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sample import command  # noqa: F401

import convert
import diffusion
import sample
from text import CLIPTextEncoder
from unet import UNet
from vae import VAE

TINY = b"#version: 0.2\nl o\nlo w</w>\n! !</w>\n"  # as in test_text.py: 517 tokens
WIDTHS, GROUPS = (16, 32, 32, 64), 8


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, tolerance=1e-4):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < tolerance, error
    return True


def same_gradients(ours, theirs, keys):
    """Both have had backward called; theirs in their names."""
    gradients = convert.to_ours({name: p.grad for name, p in theirs.named_parameters()}, keys)
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    scale = max(g.abs().max() for g in gradients.values())
    for name, p in ours.named_parameters():
        assert (p.grad - gradients[name]).abs().max() < 1e-4 * max(scale * 1e-2, gradients[name].abs().max()), name


# --- autoencoders ---


def make_vae(diffusers, kind="AutoencoderKL", widths=WIDTHS, **settings):
    n = len(widths)
    settings = dict(down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n) | settings
    settings = dict(block_out_channels=widths, layers_per_block=2, norm_num_groups=GROUPS, latent_channels=4) | settings
    return fill(getattr(diffusers, kind)(**settings)).eval()


@pytest.mark.parametrize("kind", ["f8", "f4", "vq", "attention"])
def test_vae_of_diffusers(diffusers, tmp_path, kind):
    """Outputs and gradients; the scale of the latents comes from the config."""
    if kind == "vq":
        theirs = make_vae(diffusers, "VQModel", WIDTHS[:3], num_vq_embeddings=64, latent_channels=3, vq_embed_dim=5)
    elif kind == "attention":  # of LDM's kl-f16
        types = [["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]]
        theirs = make_vae(diffusers, widths=WIDTHS[:2], down_block_types=types[0], up_block_types=types[1])
    else:
        theirs = make_vae(diffusers, widths=WIDTHS[: {"f8": 4, "f4": 3}[kind]], scaling_factor=0.5)
    theirs.save_pretrained(tmp_path)
    ours = VAE.from_pretrained(str(tmp_path)).requires_grad_(True)
    assert ours.factor == {"f8": 8, "f4": 4, "vq": 4, "attention": 2}[kind] and not ours.training
    x = noise(2, 3, 32, 48).clamp(-1, 1)
    if kind == "vq":
        z = theirs.encode(x).latents
        assert close(ours.encode(x).mean, z)
        assert close(ours.decode(z), theirs.decode(z).sample)
        assert torch.equal(ours.latent_std, torch.full((5,), 1 / theirs.config.scaling_factor))
        ours_out, theirs_out = ours.encode(x).mean, z  # quantisation passes no gradient to the encoder in eval
        ours_out = torch.cat([ours_out.flatten(), ours.decode(z.detach()).flatten()])
        theirs_out = torch.cat([theirs_out.flatten(), theirs.decode(z.detach()).sample.flatten()])
    else:
        moments = theirs.encode(x).latent_dist
        assert close(ours.encode(x).mean, moments.mean) and close(ours.encode(x).logvar, moments.logvar)
        scale = 0.18215 if kind == "attention" else 0.5
        assert torch.equal(ours.latent_std, torch.full((4,), 1 / scale)) and not ours.latent_mean.any()
        ours_out = ours.decode(ours.encode(x).sample(noise(*moments.mean.shape)))
        theirs_out = theirs.decode(moments.mean + moments.std * noise(*moments.mean.shape)).sample
    assert close(ours_out, theirs_out)
    for out in (ours_out, theirs_out):
        (out * noise(*out.shape, seed=1)).sum().backward()
    if kind == "vq":  # its codebook, which the loss alone trains
        theirs.quantize.embedding.weight.grad = ours.quantize.embedding.weight.grad = torch.zeros(64, 5)
    same_gradients(ours, theirs, convert.vae_keys(ours.settings, "diffusers"))


def test_vae_containers(diffusers, tmp_path):
    """Shards, pickles, half precision, names of diffusers before 0.14, a pipeline's folder, a file alone."""
    theirs, x = make_vae(diffusers), noise(1, 3, 16, 16)
    expected = theirs.encode(x).latent_dist.mode()
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    theirs.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "diffusion_pytorch_model.bin").exists()
    theirs.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    theirs.save_pretrained(tmp_path / "old")
    file, old = str(tmp_path / "old" / "diffusion_pytorch_model.safetensors"), {}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, t in load_file(file).items():
        for new, before in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = t
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
    save_file(old, file)
    for path in ("sharded", "pickled", "pipeline", "old", "old/diffusion_pytorch_model.safetensors"):
        ours = VAE.from_pretrained(str(tmp_path / path))
        with torch.no_grad():
            assert close(ours.encode(x).mean, expected), path
    for name, options in (("half", {}), ("half_sharded", {"max_shard_size": "200KB"})):
        copy.deepcopy(theirs).half().save_pretrained(tmp_path / name, variant="fp16", **options)
        ours = VAE.from_pretrained(str(tmp_path / name))
        assert ours.quant_conv.weight.dtype == torch.float32
        assert close(ours.encode(x).mean, expected, 1e-2)
    assert (tmp_path / "half_sharded" / "diffusion_pytorch_model.safetensors.index.fp16.json").exists()


# CompVis' names and shapes of what was published (there are 248 tensors in KL-f8, 686 in Stable Diffusion 1's U-Net)
KL_F8 = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down.0.block.1.norm2.weight": (128,),
    "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "encoder.mid.attn_1.proj_out.bias": (512,),
    "encoder.norm_out.weight": (512,),
    "encoder.conv_out.weight": (8, 512, 3, 3),
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.weight": (4, 4, 1, 1),
    "decoder.conv_in.weight": (512, 4, 3, 3),
    "decoder.mid.block_2.conv2.weight": (512, 512, 3, 3),
    "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
    "decoder.up.3.block.2.conv1.weight": (512, 512, 3, 3),
    "decoder.conv_out.weight": (3, 128, 3, 3),
}
SD_1 = {
    "time_embed.2.weight": (1280, 1280),
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    "input_blocks.1.0.emb_layers.1.weight": (320, 1280),
    "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias": (320,),
    "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
    "input_blocks.1.1.transformer_blocks.0.ff.net.2.weight": (320, 1280),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "middle_block.1.transformer_blocks.0.norm3.weight": (1280,),
    "middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
    "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
    "out.0.weight": (320,),
    "out.2.weight": (4, 320, 3, 3),
}


def compvis(model):
    """A model's state dict in CompVis' names, without the statistics, which are not kept there."""
    keys = convert.unet_keys if isinstance(model, UNet) else convert.vae_keys
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("latent_")}
    return convert.to_theirs(state, keys(model.settings, "compvis"))


def test_published_names_and_shapes():
    with torch.device("meta"):
        vae, unet = VAE(), UNet(context_dim=768)
    for model, some, count, parameters in ((vae, KL_F8, 248, 83_653_863), (unet, SD_1, 686, 859_520_964)):
        state = compvis(model)
        assert len(state) == count and sum(t.numel() for t in state.values()) == parameters
        assert {name: tuple(state[name].shape) for name in some} == some
        for settings, layout in [(convert.infer_vae_settings if model is vae else convert.infer_unet_settings)(state)]:
            assert layout == "compvis" and {k: model.settings[k] for k in settings} == settings
    known = convert.release_of(convert.infer_unet_settings(compvis(unet))[0] | {"num_heads": 8})
    assert known["num_heads"] == 8 and known["objective"] == "eps" and known["scale"] == 0.18215


def test_tables_agree_with_diffusers_converter(diffusers):
    """diffusers turns CompVis' names into its own too, by code of its own."""
    from diffusers.loaders import single_file_utils

    for settings in (dict(), dict(ch_mult=(1, 2, 4), num_res_blocks=1), dict(ch_mult=(1, 1, 2, 2, 4))):
        vae = fill(VAE(ch=16, norm_groups=8, **settings))
        levels = len(vae.settings["ch_mult"])
        config = {"down_block_types": [""] * levels, "up_block_types": [""] * levels}
        theirs = single_file_utils.convert_ldm_vae_checkpoint(compvis(vae), config)
        state = {name: t for name, t in vae.state_dict().items() if not name.startswith("latent_")}
        ours = convert.to_theirs(state, convert.vae_keys(vae.settings, "diffusers"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(t.reshape(theirs[name].shape), theirs[name]) for name, t in ours.items())
    tried = [dict(), dict(linear_proj=True, num_classes=20, concat_channels=3, attention_ds=(2, 4, 8))]
    for settings in (*tried, dict(channel_mult=(1, 2), num_res_blocks=1, attention_ds=(2,))):
        unet = fill(UNet(channels=16, norm_groups=8, num_heads=4, context_dim=24, **settings))
        config = {"layers_per_block": unet.settings["num_res_blocks"], "num_class_embeds": 20}
        whole = {f"model.diffusion_model.{name}": t for name, t in compvis(unet).items()}
        theirs = single_file_utils.convert_ldm_unet_checkpoint(whole, config)
        ours = convert.to_theirs(unet.state_dict(), convert.unet_keys(unet.settings, "diffusers"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], t) for name, t in theirs.items())


@pytest.mark.parametrize("kind", ["kl", "vq", "kl-f16"])
def test_vae_of_compvis(tmp_path, kind):
    """The first stage alone, which carries its loss along, in a Lightning checkpoint; and within a whole model."""
    settings = dict(ch=32, num_res_blocks=1, norm_groups=32)
    settings |= {
        "kl": {},
        "vq": dict(ch_mult=(1, 2), z_channels=3, bottleneck="vq", codebook_size=16, embed_dim=5),
    }.get(kind, dict(ch_mult=(1, 1, 2, 2, 4), z_channels=16, attn_resolutions=(16,)))
    made, x = fill(VAE(**settings)).eval(), noise(1, 3, 16, 16)
    state = compvis(made)
    assert ("encoder.down.4.attn.0.norm.weight" in state) == (kind == "kl-f16")
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(64, 3, 4, 4)}
    torch.save({"state_dict": state | loss, "global_step": 7}, tmp_path / "alone.ckpt")
    save_file({f"first_stage_model.{name}": t for name, t in state.items()}, tmp_path / "whole.safetensors")
    for file in ("alone.ckpt", "whole.safetensors"):
        vae = VAE.from_pretrained(str(tmp_path / file))
        assert vae.settings == made.settings and torch.equal(vae.encode(x).mean, made.encode(x).mean)
        assert torch.equal(vae.decode(vae.encode(x).mean), made.decode(made.encode(x).mean))
        std = {"kl": 1 / 0.18215, "vq": 1.0, "kl-f16": math.nan}[kind]
        assert vae.latent_std.allclose(torch.full_like(vae.latent_std, std), equal_nan=True)
    if kind != "vq":
        vae = VAE.from_pretrained(str(tmp_path / "alone.ckpt"), scaling_factor=0.25)
        assert vae.latent_std.unique().item() == 4 and vae.has_latent_statistics
    small = VAE.from_pretrained(str(tmp_path / "alone.ckpt"), norm_groups=16, tanh_out=True)
    assert small.settings == made.settings | dict(norm_groups=16, tanh_out=True)
    with pytest.raises(ValueError, match=r"tells its own settings \(z_channels: \d+ by its shapes, 7 asked for\)"):
        VAE.from_pretrained(str(tmp_path / "alone.ckpt"), z_channels=7)


# --- U-Nets ---


def make_unet(diffusers, kind):
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    s = dict(block_out_channels=WIDTHS, norm_num_groups=GROUPS, layers_per_block=2, sample_size=16)
    sd2 = dict(cross_attention_dim=24, attention_head_dim=[2, 4, 4, 8], use_linear_projection=True)
    if kind.startswith("uncond"):
        s |= dict(in_channels=3, out_channels=3, attention_head_dim=8)
        if kind == "uncond_updown":  # as LDM's churches
            s |= dict(downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift")
            s |= dict(attn_norm_num_groups=GROUPS, down_block_types=["AttnDownBlock2D"] * 4)
            s |= dict(up_block_types=["AttnUpBlock2D"] * 4)
        return fill(diffusers.UNet2DModel(**s)).eval()
    s |= {
        "sd1": dict(cross_attention_dim=24, attention_head_dim=8),
        "sd2": sd2,
        "inpaint": sd2 | dict(in_channels=9),
        "upscaler": sd2
        | dict(in_channels=7, num_class_embeds=20, attention_head_dim=8, only_cross_attention=[True, True, True, False])
        | dict(down_block_types=["DownBlock2D", down, down, down], up_block_types=[up, up, up, "UpBlock2D"]),
    }[kind]
    return fill(diffusers.UNet2DConditionModel(**s)).eval()


KINDS = ["sd1", "sd2", "inpaint", "upscaler", "uncond", "uncond_updown"]


@pytest.mark.parametrize("kind", KINDS)
def test_unet_of_diffusers(diffusers, tmp_path, kind):
    theirs = make_unet(diffusers, kind)
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(str(tmp_path)).requires_grad_(True)
    heads = {"sd1": (8, 0), "upscaler": (8, 0)}.get(kind, (0, 8))
    assert (ours.settings["num_heads"], ours.settings["head_dim"]) == heads
    C, extra = ours.settings["in_channels"], ours.settings["concat_channels"]
    assert extra == {"inpaint": 5, "upscaler": 3}.get(kind, 0)
    x, t, inputs, more = noise(2, C, 16, 16), torch.tensor([20.0, 731.0]), {}, {}
    if "uncond" not in kind:
        inputs["context"] = more["encoder_hidden_states"] = noise(2, 7, 24, seed=1)
    if kind == "upscaler":
        inputs["y"] = more["class_labels"] = torch.tensor([3, 19])
    if extra:
        inputs["concat"] = noise(2, extra, 16, 16, seed=2)
    a = ours(x, t, **inputs)
    b = theirs(torch.cat([x, inputs["concat"]], 1) if extra else x, t, **more).sample
    assert close(a, b)
    for out in (a, b):
        (out * noise(*out.shape, seed=3)).sum().backward()
    same_gradients(ours, theirs, convert.unet_keys(ours.settings, "diffusers"))


def test_attention_blocks_of_compvis(tmp_path):
    """qkv is a convolution over the pixels whose channels lie head by head: 3 heads as in QKVAttentionLegacy."""
    heads, c, pixels = 3, 48, 10
    unet = fill(
        UNet(channels=16, channel_mult=(1, 3), attention_ds=(2,), num_heads=heads, transformer_depth=0, norm_groups=8)
    )
    for new_order in (False, True):
        block = convert.to_theirs(unet.state_dict(), convert.unet_keys(unet.settings, "compvis", new_order))
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
        save_file({name: t.contiguous() for name, t in block.items()}, tmp_path / "unet.safetensors")
        told = dict(num_heads=heads, norm_groups=8, new_attention_order=new_order)
        again = UNet.from_pretrained(str(tmp_path / "unet.safetensors"), **told)
        assert all(torch.equal(t, unet.state_dict()[name]) for name, t in again.state_dict().items())


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
    state = convert.to_theirs(unet.state_dict(), convert.unet_keys(unet.settings, layout))
    inferred, found = convert.infer_unet_settings(state)
    heads = {name: unet.settings[name] for name in ("num_heads", "head_dim")}
    inferred = convert.complete(UNet, inferred | heads)
    differing = {name for name in inferred if inferred[name] != unet.settings[name] and name != "attention_ds"}
    assert found == layout and not differing and set(inferred["attention_ds"]) == set(unet.settings["attention_ds"])


# --- text towers ---


def clip_config(transformers, **settings):
    s = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=517)
    s |= dict(max_position_embeddings=77, bos_token_id=515, eos_token_id=516, pad_token_id=516, projection_dim=16)
    return transformers.CLIPTextConfig(**s | settings)


def save_tokenizer(transformers, folder, pad="<|endoftext|>"):
    """As Stable Diffusion's folder holds it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(c) for c in (*plain, *range(256, 256 + 68))]
    names += [name + "</w>" for name in names] + ["lo", "low</w>", "!!</w>", "<|startoftext|>", "<|endoftext|>"]
    os.makedirs(folder)
    (pathlib.Path(folder) / "merges.txt").write_bytes(TINY)
    (pathlib.Path(folder) / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_of_transformers(transformers, tmp_path, activation):
    theirs = fill(transformers.CLIPTextModel(clip_config(transformers, hidden_act=activation))).eval()
    theirs.save_pretrained(tmp_path / "text_encoder")
    pad = {"quick_gelu": "<|endoftext|>", "gelu": "!"}[activation]
    tokenizer = save_tokenizer(transformers, str(tmp_path / "tokenizer"), pad)
    (tmp_path / "model_index.json").write_text("{}")
    texts = [
        "low low?! slow" if activation == "quick_gelu" else "low low?? slow"
    ]  # padding is a "!" wherever it stands
    texts += ["", "a low owl, a lower bowl " * 30]
    rows = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    for path in (tmp_path, tmp_path / "text_encoder"):
        ours = CLIPTextEncoder.from_pretrained(str(path))
        assert torch.equal(ours.tokenize(texts), rows)
        with torch.no_grad():
            assert close(ours(texts), theirs(input_ids=rows).last_hidden_state)
    weights = str(tmp_path / "text_encoder" / "model.safetensors")  # heads and activation stand in the config beside it
    ours = CLIPTextEncoder.from_pretrained(weights, merges=TINY)
    with torch.no_grad():
        assert close(ours(texts), theirs(input_ids=rows).last_hidden_state)
    (tmp_path / "tokenizer" / "merges.txt").unlink()  # transformers 5 writes tokenizer.json alone
    assert torch.equal(CLIPTextEncoder.from_pretrained(str(tmp_path)).tokenize(texts), rows)
    with pytest.raises(ValueError, match="does not hold clip_l's weights but other of 3 blocks of width 64"):
        CLIPTextEncoder.from_pretrained(str(tmp_path), name="clip_l")
    whole = {f"cond_stage_model.transformer.text_model.{k}": t for k, t in theirs.state_dict().items()}
    whole = {name.replace("text_model.text_model.", "text_model."): t for name, t in whole.items()}
    whole["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(whole, tmp_path / "whole.safetensors")  # one head of 64 here: the file does not tell
    ours = CLIPTextEncoder.from_pretrained(str(tmp_path / "whole.safetensors"), merges=TINY)
    theirs = transformers.CLIPTextModel(clip_config(transformers, num_attention_heads=1)).eval()
    theirs.load_state_dict(load_file(tmp_path / "text_encoder" / "model.safetensors"), strict=False)
    with torch.no_grad():
        assert close(ours(texts), theirs(input_ids=ours.tokenize(texts)).last_hidden_state)


def test_text_of_open_clip(open_clip, tmp_path):
    """Of a whole CLIP, of Stable Diffusion 2's file: the last block is there and not used."""
    from open_clip import transformer

    theirs = fill(transformer.TextTransformer(77, 517, width=128, heads=2, layers=3, output_dim=8)).eval()
    state = {name: t for name, t in theirs.state_dict().items() if name != "attn_mask"}
    beside = {"logit_scale": torch.ones(()), "visual.conv1.weight": torch.zeros(8, 3, 2, 2)}
    torch.save(state | beside, tmp_path / "open_clip_pytorch_model.bin")
    save_file({f"cond_stage_model.model.{name}": t for name, t in state.items()}, tmp_path / "sd2.safetensors")
    for file in ("open_clip_pytorch_model.bin", "sd2.safetensors"):
        ours = CLIPTextEncoder.from_pretrained(str(tmp_path / file), merges=TINY)
        assert ours.settings["layer"] == "penultimate" and ours.settings["pad"] == "zero" and len(ours.blocks) == 2
        rows = ours.tokenize(["low low!! slow", ""])
        options = dict(normalize_intermediates=True, intermediates_only=True, output_fmt="NLC")
        with torch.no_grad():
            expected = theirs.forward_intermediates(rows, **options)["text_intermediates"][-2]
            assert close(ours(rows), expected)


def test_openai_names_are_also_open_clips(tmp_path):
    """Both write the same names; only QuickGELU tells OpenAI's ViT-L/14 apart, and no tensor shows that."""
    made = CLIPTextEncoder(**CLIPTextEncoder.towers["clip_l"] | dict(layers=12, vocab=517), merges=TINY)
    state = convert.to_theirs(made.state_dict(), convert.text_keys(12, "open_clip"))
    assert state["transformer.resblocks.3.attn.in_proj_weight"].shape == (3 * 768, 768)
    save_file(state | {"text_projection": torch.ones(768, 768)}, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="may be OpenAI's ViT-L/14 or another's: give name=clip_l, or name=other"):
        CLIPTextEncoder.from_pretrained(str(tmp_path / "clip.safetensors"), merges=TINY)
    for name, activation in (("clip_l", "quick_gelu"), ("other", "gelu")):
        tower = CLIPTextEncoder.from_pretrained(str(tmp_path / "clip.safetensors"), name=name, merges=TINY)
        assert tower.settings["activation"] == activation and tower.settings["heads"] == 12
    assert torch.equal(tower.position_embedding, made.position_embedding)


# --- whole pipelines ---


def save_pipeline(diffusers, transformers, folder, kind):
    """A Stable Diffusion with random weights, as diffusers saves it; returns it with DDIM."""
    v = kind == "sd2"
    text = dict(hidden_size=24, intermediate_size=96, num_attention_heads=4, hidden_act="gelu" if v else "quick_gelu")
    text = fill(transformers.CLIPTextModel(clip_config(transformers, **text))).eval()
    tokenizer = save_tokenizer(transformers, f"{folder}.tokenizer", "!" if v else "<|endoftext|>")
    scheduler = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler |= dict(set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction" if v else "epsilon")
    parts = dict(
        vae=make_vae(diffusers, widths=(32, 32, 32, 64), norm_num_groups=32),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=make_unet(diffusers, kind),
    )
    parts |= dict(scheduler=diffusers.DDIMScheduler(**scheduler), safety_checker=None, feature_extractor=None)
    pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


@pytest.fixture(scope="module")
def stable(diffusers, transformers, tmp_path_factory):
    """{kind: (diffusers' pipeline, its folder)}"""
    root = tmp_path_factory.mktemp("pipelines")
    kinds = {kind: str(root / kind) for kind in ("sd1", "sd2")}
    return {kind: (save_pipeline(diffusers, transformers, folder, kind), folder) for kind, folder in kinds.items()}


def trajectory(pipeline, prompt, x, steps, cfg):
    """Latents before each of our DDIM steps, and after the last."""
    denoise = sample.guided(pipeline, [prompt], {}, cfg)
    seen = []

    def see(x, t):
        seen.append(x)
        return denoise(x, t)

    times = diffusion.sample_times(steps, pipeline.schedule, pipeline.objective, "leading")
    return seen, diffusion.sample_ddim(see, x, times, pipeline.schedule)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_ten_steps_of_ddim(stable, kind):
    """Guided, from the same latents: they agree after every step, and so does the picture."""
    pipe, folder = stable[kind]
    x, theirs = noise(1, 4, 16, 16), []

    def keep(pipe, i, t, inputs):
        theirs.append(inputs["latents"])
        return inputs

    options = dict(num_inference_steps=10, guidance_scale=7.5, latents=x, callback_on_step_end=keep, output_type="pt")
    picture = pipe("low low? slow", **options).images
    pipeline = sample.load_pipeline(folder)
    assert pipeline.objective == {"sd1": "eps", "sd2": "v"}[kind] and pipeline.latent_shape == (4, 16, 16)
    seen, last = trajectory(pipeline, "low low? slow", x, 10, 7.5)
    assert len(theirs) == 10
    for a, b in zip([*seen[1:], last], theirs):
        assert close(a, b, 1e-3)
    assert ((sample.finish(pipeline, last) + 1) / 2 - picture).abs().max() < 1e-3


def test_the_decoder_of_another_autoencoder(stable, tmp_path):
    """As sd-vae-ft-mse is one: a folder of its own, the same encoder, here in half precision."""
    pipe, folder = stable["sd1"]
    vae = copy.deepcopy(pipe.vae)
    fill(vae.decoder, 5)
    fill(vae.post_quant_conv, 5)
    copy.deepcopy(vae).half().save_pretrained(tmp_path)
    pipeline, latents = sample.load_pipeline(folder, first_stage=str(tmp_path)), noise(1, 4, 16, 16)
    with torch.no_grad():
        theirs = vae.decode(latents / vae.config.scaling_factor).sample
    ours, own = (sample.finish(p, latents) for p in (pipeline, sample.load_pipeline(folder)))
    assert close(ours, theirs.clamp(-1, 1), 1e-2) and (ours - own).abs().max() > 0.1
    fill(vae.encoder, 5)
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="makes other latents than the checkpoint's autoencoder"):
        sample.load_pipeline(folder, first_stage=str(tmp_path))


def lightning(path, state):
    """A checkpoint as Lightning pickles it: its callbacks are objects of a package that is not there."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    sys.modules |= {"pytorch_lightning": module, "pytorch_lightning.callbacks": module, module.__name__: module}
    try:
        callback = module.ModelCheckpoint()
        callback.best = 1.0
        torch.save({"state_dict": state, "callbacks": {module.ModelCheckpoint: {"of": callback}}}, path)
    finally:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            del sys.modules[name]


def test_a_compvis_file_draws_the_same(stable, tmp_path):
    """The same weights as one Lightning file: prefixes, an EMA without dots that counts, betas, a loss."""
    _, folder = stable["sd1"]
    expected = sample.load_pipeline(folder)
    unet = compvis(expected.denoiser.unet)
    state = {f"model.diffusion_model.{name}": torch.zeros_like(t) for name, t in unet.items()}
    state |= {"model_ema.diffusion_model" + name.replace(".", ""): t for name, t in unet.items()}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    state |= {f"first_stage_model.{name}": t for name, t in compvis(expected.vae).items()}
    text = {name: t for name, t in expected.tower.state_dict().items()}
    text = convert.to_theirs(text, convert.text_keys(3, "transformers"))
    state |= {f"cond_stage_model.transformer.text_model.{name}": t for name, t in text.items()}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    state |= {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}
    lightning(tmp_path / "model.ckpt", state)
    told = dict(num_heads=8, norm_groups=GROUPS)
    unet = UNet.from_pretrained(str(tmp_path / "model.ckpt"), **told)
    x, t, context = noise(1, 4, 16, 16), torch.tensor([500.0]), noise(1, 7, 24)
    assert torch.equal(unet(x, t, context=context), expected.denoiser.unet(x, t, context=context)), "the EMA"
    with pytest.raises(ValueError, match="does not tell its number of heads: give num_heads=N or head_dim=N"):
        UNet.from_pretrained(str(tmp_path / "model.ckpt"))
    with pytest.raises(ValueError, match="does not tell what it predicts: set objective=v"):
        sample.load_pipeline(str(tmp_path / "model.ckpt"), clip_vocab=TINY, **told)
    pipeline = sample.load_pipeline(str(tmp_path / "model.ckpt"), clip_vocab=TINY, objective="eps", **told)
    times = torch.linspace(0.001, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(pipeline.schedule.alpha(times), expected.schedule.alpha(times))
    assert pipeline.latent_shape == (4, 64, 64) and pipeline.objective == "eps"
    assert pipeline.vae.latent_std.unique().item() == pytest.approx(1 / 0.18215)
    assert all(torch.equal(t, pipeline.tower.state_dict()[name]) for name, t in expected.tower.state_dict().items())


def test_classes_as_tokens(tmp_path):
    """LDM's cin256-v2: 1001 classes, the last of which is none."""
    with torch.device("meta"):
        unet = UNet(3, 3, channels=192, channel_mult=(1, 2, 3, 5), attention_ds=(8, 4, 2), num_heads=1, context_dim=512)
    inferred, _ = convert.infer_unet_settings(compvis(unet))
    assert convert.release_of(inferred)["num_heads"] == 1 and sum(p.numel() for p in unet.parameters()) == 400_920_579
    settings = dict(channels=32, channel_mult=(1, 2), attention_ds=(2,), num_heads=1, context_dim=16)
    unet, vae = fill(UNet(3, 3, **settings)), fill(VAE(ch=32, ch_mult=(1, 2, 4), z_channels=3, bottleneck="vq"))
    table = noise(11, 16)
    state = {f"model.diffusion_model.{name}": t for name, t in compvis(unet).items()}
    state |= {f"first_stage_model.{name}": t for name, t in compvis(vae).items()}
    state |= {"cond_stage_model.embedding.weight": table, "betas": torch.linspace(1e-4, 0.02, 1000)}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    pipeline = sample.load_pipeline(str(tmp_path / "model.ckpt"), objective="eps", num_heads=1)
    assert pipeline.num_classes == 10 and pipeline.schedule.name == "linear" and pipeline.vae.latent_std[0] == 1
    shown = sample.unet_inputs(pipeline, [3, 10])["context"]
    assert torch.equal(shown, table[[3, 10]][:, None])
    assert sample.generate(pipeline, [3], [0], 2, cfg=3.0, size=(16,)).shape == (1, 3, 16, 16)


def test_heads_told_on_the_command_line(command, tmp_path):  # noqa: F811
    """A file of no published model does not tell its heads: sample.py takes what the error asks for."""
    unet = fill(UNet(3, 3, channels=32, channel_mult=(1,), attention_ds=(1,), num_heads=2, transformer_depth=0))
    state = {f"model.diffusion_model.{name}": t for name, t in compvis(unet).items()}
    save_file(state | {"betas": torch.linspace(1e-4, 0.02, 1000)}, tmp_path / "mine.safetensors")
    told = ("--ckpt=mine.safetensors", "--objective=eps", "--steps=1", "--n=1", "--size=16", "--device=cpu")
    _, _, error = command(*told)
    assert "does not tell its number of heads: give num_heads=N or head_dim=N" in error
    for heads in ("--num_heads=2", "--head_dim=16"):
        status, _, error = command(*told, heads, f"--out_dir={heads}")
        assert (status, error) == (0, "")
    first, second = ((tmp_path / heads / "00000.png") for heads in ("--num_heads=2", "--head_dim=16"))
    assert Image.open(first).tobytes() == Image.open(second).tobytes()


def test_unconditional(diffusers, tmp_path):
    """LDMPipeline's folder: U-Net and VQModel, and its pictures."""
    vqvae = make_vae(diffusers, "VQModel", WIDTHS[:3], num_vq_embeddings=64, latent_channels=3, scaling_factor=1.0)
    unet = make_unet(diffusers, "uncond")
    scheduler = dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    pipe = diffusers.LDMPipeline(vqvae=vqvae, unet=unet, scheduler=diffusers.DDIMScheduler(**scheduler))
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    picture = pipe(generator=torch.manual_seed(0), num_inference_steps=4, output_type="np").images
    pipeline = sample.load_pipeline(str(tmp_path))
    assert pipeline.tower is None and pipeline.latent_shape == (3, 16, 16) and pipeline.task == {"task": "none"}
    x = torch.randn((1, 3, 16, 16), generator=torch.manual_seed(0))
    times = torch.tensor([751, 501, 251, 1, 0], dtype=torch.float64) / 1000  # indices 750, 500, 250, 0, and data
    denoise = sample.guided(pipeline, [None], {}, 1.0)
    last = diffusion.sample_ddim(denoise, x, times, pipeline.schedule)
    ours = ((sample.finish(pipeline, last) + 1) / 2).permute(0, 2, 3, 1)
    assert (ours - torch.from_numpy(picture)).abs().mean() < 1e-3  # a code may be another


def swap_unet(stable, tmp_path, unet, name="StableDiffusionPipeline", **index):
    """The folder of SD 2 with another U-Net in it."""
    _, folder = stable["sd2"]
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        os.symlink(f"{folder}/{part}", tmp_path / part)
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name} | index))
    return str(tmp_path)


def test_inpainting(diffusers, stable, tmp_path):
    pipeline = sample.load_pipeline(swap_unet(stable, tmp_path, make_unet(diffusers, "inpaint")))
    assert pipeline.task == {"task": "inpaint"} and pipeline.latent_shape == (4, 16, 16)
    image, mask = noise(1, 3, 64, 64).clamp(-1, 1), torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    out = sample.generate(pipeline, ["low"], [0], 2, cfg=2.0, given={"image": image, "mask": mask})
    assert torch.equal(out[mask.expand_as(out) == 0], image[mask.expand_as(out) == 0])


def test_upscaler(diffusers, stable, tmp_path):
    folder = swap_unet(stable, tmp_path, make_unet(diffusers, "upscaler"), max_noise_level=15)
    os.remove(tmp_path / "vae")
    make_vae(diffusers, widths=WIDTHS[:3], scaling_factor=0.08333).save_pretrained(tmp_path / "vae")
    low = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="scaled_linear")
    low = diffusers.DDPMScheduler(**low)
    low.save_pretrained(tmp_path / "low_res_scheduler")
    pipeline = sample.load_pipeline(folder)
    assert pipeline.task == {"task": "sr", "sr_scale": 4, "sr_noise": 15, "sr_schedule": ("scaled_linear", 1e-4, 0.02)}
    x, eps = noise(1, 3, 16, 16), noise(1, 3, 16, 16, seed=1)
    noisy = sample.augment_low(x, torch.tensor([12]), eps, pipeline.task["sr_schedule"])
    torch.testing.assert_close(noisy, low.add_noise(x, eps, torch.tensor([12])), atol=1e-5, rtol=0)
    given = {"low": x.clamp(-1, 1), "level": torch.tensor([12])}
    out = sample.generate(pipeline, ["low"], [0], 2, cfg=2.0, given=given)
    assert out.shape == (1, 3, 64, 64) and out.isfinite().all()


def test_the_command(stable, tmp_path):
    _, folder = stable["sd1"]
    line = [
        sys.executable,
        "sample.py",
        f"--ckpt={folder}",
        "--prompt=low",
        "--n=1",
        "--steps=1",
        "--spacing=leading",
    ]
    run = subprocess.run([*line, f"--out_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "grid.png").exists() and (tmp_path / "00000.png").exists()


def test_fine_tuning(stable, small_data, tmp_path, monkeypatch):
    """train_ldm.py goes on from their U-Net beside their text and autoencoder; it leaves a checkpoint of ours."""
    _, folder = stable["sd1"]
    theirs = sample.load_pipeline(folder)
    monkeypatch.setitem(helpers.ARGS, "ldm", f"{helpers.RUN_ARGS} --out_dir=out")  # the model's settings come along
    args = [f"--dataset={small_data}", f"--init_from={folder}", "--image_size=64", "--batch_size=1", "--lr=1e-6"]
    args += ["--val_images=1", "--n_samples=1", "--sample_steps=1", "--warmup_steps=0", "--cache_latents=false"]
    run = helpers.Run("ldm", tmp_path, *args, "--max_steps=1").finish()
    assert f"from the weights of {folder}" in run.stdout
    pipeline = sample.load_pipeline(str(run.out))
    assert pipeline.objective == "eps" and pipeline.latent_shape == (4, 8, 8) and pipeline.denoiser.text is None
    before = theirs.denoiser.unet.state_dict()
    moved = {name: (t - before[name]).abs().max().item() for name, t in pipeline.denoiser.unet.state_dict().items()}
    assert all(value < 1e-5 for value in moved.values()) and sum(value > 0 for value in moved.values()) > 600
    for ours, before in ((pipeline.vae, theirs.vae), (pipeline.tower, theirs.tower)):
        assert all(torch.equal(t, before.state_dict()[name]) for name, t in ours.state_dict().items())
    run = helpers.Run("ldm", tmp_path, *args, "--max_steps=2").finish()
    assert "resumed from" in run.stdout and "step 2" in run.stdout
    # a checkpoint of ours is gone on from in the same way
    args[1] = f"--init_from={run.out}"
    again = helpers.Run("ldm", tmp_path / "again", *args, "--max_steps=1").finish()
    assert "from the weights of" in again.stdout and sample.load_pipeline(str(again.out)).objective == "eps"
    error = helpers.Run("ldm", tmp_path / "other", *args, "--channels=64").fail()
    assert "brings its own settings (channels: 16 in the model, 64 asked for): leave them out" in error
    error = helpers.Run("ldm", tmp_path, *args, "--max_steps=2").fail()
    assert "is of a run with init_from=" in error


def test_fine_tuning_an_autoencoder(stable, small_data, tmp_path, monkeypatch):
    _, folder = stable["sd2"]
    monkeypatch.setitem(helpers.ARGS, "vae", f"{helpers.RUN_ARGS} --out_dir=out --perceptual_weight=0 --disc_weight=0")
    args = [f"--dataset={small_data}", f"--init_from={folder}", "--image_size=32", "--batch_size=1", "--val_images=1"]
    for steps in (1, 2):
        run = helpers.Run("vae", tmp_path, *args, "--train=decoder", f"--max_steps={steps}", "--lr=1e-6").finish()
    assert "resumed from" in run.stdout
    ours, theirs = VAE.from_pretrained(str(run.out)), VAE.from_pretrained(folder)
    for name, t in ours.state_dict().items():
        moved = (t - theirs.state_dict()[name]).abs().max().item()
        assert moved < 1e-4 and (moved == 0) == (not name.startswith(("decoder", "post_quant"))), name


# --- what is not there, and what is not taken ---


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def test_code_in_a_pickle(tmp_path):
    marker = tmp_path / "ran"
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        evil = Evil()
        evil.__class__.__reduce__ = lambda self: (os.system, (f"touch {marker}",))
        torch.save({"state_dict": {"a": torch.ones(1)}, "evil": evil}, tmp_path / "model.ckpt", **options)
        with pytest.raises(ValueError, match=r"model.ckpt holds \w+.system, code that would be run: it is not read"):
            VAE.from_pretrained(str(tmp_path / "model.ckpt"))
    assert not marker.exists()


def test_averages_whose_names_collide(tmp_path):
    state = {"model.diffusion_model.a.bc": torch.ones(1), "model.diffusion_model.ab.c": torch.ones(1)}
    save_file(state | {"model_ema.diffusion_modelabc": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model_ema.diffusion_modelabc may be .* or .*: its average cannot be told"):
        UNet.from_pretrained(str(tmp_path / "model.safetensors"))


def test_bad_folders(diffusers, tmp_path):
    make_vae(diffusers).save_pretrained(tmp_path / "good", max_shard_size="400KB")
    shard = sorted((tmp_path / "good").glob("*-of-*.safetensors"))[1]
    shard.rename(tmp_path / "away")
    with pytest.raises(ValueError, match=f"lacks the shard {shard.name} that .*index.json names: fetch it again"):
        VAE.from_pretrained(str(tmp_path / "good"))
    (tmp_path / "away").rename(shard)
    state = load_file(shard)
    name = sorted(state)[0]
    save_file({k: t for k, t in state.items() if k != name}, shard)
    with pytest.raises(ValueError, match=f"names {name}, which is in none of its shards"):
        VAE.from_pretrained(str(tmp_path / "good"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="bare holds no weights: diffusion_pytorch_model.safetensors or the like"):
        VAE.from_pretrained(str(tmp_path / "bare"))
    (tmp_path / "bare" / "config.json").write_text("{")
    save_file({}, tmp_path / "bare" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        VAE.from_pretrained(str(tmp_path / "bare"))
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="bare holds no latest.safetensors"):
        VAE.from_pretrained(str(tmp_path / "bare"))
    (tmp_path / "bare" / "model_index.json").write_text("{}")
    for load, message in ((VAE, r"no autoencoder \(vae or vqvae\)"), (UNet, r"no U-Net \(unet\)")):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(str(tmp_path / "bare"))
    (tmp_path / "bare" / "unet").mkdir()
    with pytest.raises(ValueError, match="unet holds neither config.json nor model_index.json"):
        UNet.from_pretrained(str(tmp_path / "bare"))


def test_tensors_too_many_too_few_and_misshapen(tmp_path):
    state = compvis(fill(VAE(ch=32, ch_mult=(1, 2), num_res_blocks=1)))
    file = str(tmp_path / "vae.safetensors")
    first = "encoder.mid.block_1.conv1.weight"
    for changed, message in (
        ({k: t for k, t in state.items() if k != first}, f"lacks {first}: it is damaged"),
        (state | {"encoder.mid.extra": torch.ones(1)}, "has, with no place in this model, encoder.mid.extra"),
        (
            state | {first: torch.ones(32, 64, 3, 3)},
            r"encoder.mid.block_1.conv1.weight is \(32, 64, 3, 3\), its others",
        ),
        (state | {"encoder.down.1.block.0.conv1.weight": torch.ones(48, 32, 3, 3)}, r"levels of \[32, 48\] channels"),
        ({"weight": torch.ones(2)}, "no encoder.conv_in.weight: it is no autoencoder"),
        ({"unet.down.lora_A.weight": torch.ones(2)}, "is a LoRA"),
        ({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.ones(2)}, "is a LoRA"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            VAE.from_pretrained(file)


def test_sdxl(diffusers, tmp_path):
    """Its U-Net is refused by name; its autoencoder is welcome, with its own scale."""
    vae = fill(VAE(ch=32, num_res_blocks=1))
    state = {f"first_stage_model.{name}": t for name, t in compvis(vae).items()}
    state |= {"model.diffusion_model.label_emb.0.0.weight": torch.ones(4, 4)}
    state |= {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": torch.ones(4)}
    save_file(state, tmp_path / "xl.safetensors")
    assert VAE.from_pretrained(str(tmp_path / "xl.safetensors")).latent_std.unique().item() == pytest.approx(
        1 / 0.13025
    )
    for load in (UNet.from_pretrained, sample.load_pipeline):
        with pytest.raises(ValueError, match="is SDXL's U-Net .*, which is not supported: its VAE is"):
            load(str(tmp_path / "xl.safetensors"))
    xl = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80)
    theirs = diffusers.UNet2DConditionModel(block_out_channels=WIDTHS, norm_num_groups=8, cross_attention_dim=24, **xl)
    theirs.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="is SDXL's U-Net .*add_embedding.linear_1.weight"):
        UNet.from_pretrained(str(tmp_path / "unet"))


@pytest.mark.parametrize("name, value", [
    ("act_fn", "gelu"), ("norm_eps", 1e-6), ("class_embed_type", "timestep"), ("attention_head_dim", [1, 2, 3, 4]),
    ("only_cross_attention", True),
])  # fmt: skip
def test_configs_of_what_is_not_built_here(diffusers, tmp_path, name, value):
    make_unet(diffusers, "sd1").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=f"has {name}="):
        UNet.from_pretrained(str(tmp_path))


def test_pipelines_that_are_not_supported(diffusers, stable, tmp_path):
    folder = swap_unet(stable, tmp_path, make_unet(diffusers, "sd2"))
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "X"]}))
    with pytest.raises(ValueError, match="is a StableDiffusionXLPipeline with a text_encoder_2, which is not"):
        sample.load_pipeline(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="predicts v by its scheduler's config: leave objective=eps out"):
        sample.load_pipeline(folder, objective="eps")
    with pytest.raises(ValueError, match="for checkpoints of this repository, which .* is not"):
        sample.load_pipeline(folder, ema_std=0.1)
    with pytest.raises(ValueError, match="is another's folder, not a checkpoint of this repository"):
        convert.to_diffusers(folder, f"{tmp_path}/out")
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    os.remove(tmp_path / "scheduler")
    (tmp_path / "scheduler").mkdir()
    for changed, message in (
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "drawn from by FlowMatchEulerDiscreteScheduler"),
        ({"prediction_type": "flow_prediction"}, "prediction_type=flow_prediction, which is not supported"),
        ({"use_flow_sigmas": True}, "has use_flow_sigmas=True: only"),
    ):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=message):
            sample.load_pipeline(folder)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    os.remove(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match="listens to a text encoder that is not there"):
        sample.load_pipeline(folder)
    with pytest.raises(ValueError, match="unet holds no model_index.json: name the folder of a whole pipeline"):
        sample.load_pipeline(str(tmp_path / "unet"))


def test_hugging_face_ids(stable, tmp_path, monkeypatch):
    _, folder = stable["sd1"]
    asked = []
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, **options: asked.append(name) or folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert sample.load_pipeline("somebody/their-model").objective == "eps" and set(asked) == {"somebody/their-model"}
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="hf download somebody/their-model --local-dir somebody/their-model"):
        VAE.from_pretrained("somebody/their-model")
    asked.clear()
    for path in ("out/ldm", "/nowhere/model", "model.ckpt"):
        with pytest.raises(FileNotFoundError, match="is not there"):
            VAE.from_pretrained(path)
    assert not asked
