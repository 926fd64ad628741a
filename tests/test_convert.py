"""Weights of other projects in and out: models of diffusers, transformers and open_clip compute the same as ours."""

import copy
import json
import math
import os
import runpy
import shutil
import sys
import types

import helpers
import pytest
import torch
from conftest import ROOT, fill, ldm_settings, meta, normal, refused
from safetensors.torch import load_file, save_file

import checkpoint
import convert
import diffusion
import sample
from text import CLIPTextEncoder, TextEncoder
from unet import Denoiser, Rescaler, UNet
from vae import VAE

MERGES = b"#version: 0.2\nl o\nlo w</w>\n! !</w>\n"  # a CLIP tokenizer of 517 tokens
TOWER = dict(layers=3, length=12, vocab=517)  # heads of 64 channels, as in all towers
TOWERS = {"clip_l": TOWER | dict(width=64, heads=1, activation="quick_gelu", layer="last", pad="end")}
TOWERS["openclip_h"] = TOWER | dict(width=128, heads=2, activation="gelu", layer="penultimate", pad="zero")


@pytest.fixture
def small_towers(monkeypatch):
    """The published towers' names stand for small ones."""
    for name in TOWERS:
        monkeypatch.setitem(convert.TOWERS, name, TOWERS[name])


def close(a, b, tolerance=2e-5):
    """Equal up to a part of the largest value."""
    assert a.shape == b.shape
    error = ((a - b).abs().max() / b.abs().max()).item()
    assert error < tolerance, error


def same_weights(a, b):
    """State dicts, except latent statistics, which other layouts do not have."""
    a, b = ({name: t for name, t in state.items() if not name.startswith("latent_")} for state in (a, b))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def keys(model, layout="compvis"):
    layers = convert.unet_layers if isinstance(model, UNet) else convert.vae_layers
    return convert.key_table(layers(model.settings), layout)


def renamed(model, layout="compvis"):
    """A model's state dict with the names of another layout."""
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("latent_")}
    state = convert.to_theirs(state, keys(model, layout))
    return {name: t.contiguous() for name, t in state.items()}


def renamed_text(tower, layout):
    table = convert.key_table(convert.text_layers(len(tower.blocks)), layout)
    return {name: t.contiguous() for name, t in convert.to_theirs(tower.state_dict(), table).items()}


def tower_of(path, **options):
    settings, state, merges = convert.load_clip(str(path), **options)
    return checkpoint.build(CLIPTextEncoder, settings, state, path, merges=merges)


# --- autoencoders and U-Nets of diffusers ---

WIDTHS, GROUPS = (16, 32, 32, 64), 8


def vae_config(widths=WIDTHS, **more):
    s = dict(block_out_channels=widths, layers_per_block=2, norm_num_groups=GROUPS, latent_channels=4)
    s |= {f"{way}_block_types": [f"{way.title()}{half}Block2D"] * len(widths)
          for way, half in (("down", "Encoder"), ("up", "Decoder"))}  # fmt: skip
    return s | more


DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD_1 = dict(block_out_channels=WIDTHS, norm_num_groups=GROUPS, layers_per_block=2, sample_size=16)
PLAIN_UNET = SD_1 | dict(in_channels=3, out_channels=3, attention_head_dim=8)
SD_1 |= dict(cross_attention_dim=24, attention_head_dim=8)
SD_2 = SD_1 | dict(attention_head_dim=[2, 4, 4, 8], use_linear_projection=True)
UPSCALER = SD_2 | dict(in_channels=7, num_class_embeds=20, attention_head_dim=8)
UPSCALER |= dict(down_block_types=["DownBlock2D"] + [DOWN] * 3, up_block_types=[UP] * 3 + ["UpBlock2D"])
UPSCALER |= dict(only_cross_attention=[True, True, True, False])
CHURCHES = PLAIN_UNET | dict(downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift")
CHURCHES |= dict(attn_norm_num_groups=GROUPS, down_block_types=["AttnDownBlock2D"] * 4)
CHURCHES |= dict(up_block_types=["AttnUpBlock2D"] * 4)
KL_F16 = dict(down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"])
KL_F16 |= dict(up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"])
VQ_F4 = dict(widths=WIDTHS[:3], num_vq_embeddings=64, latent_channels=3)
MODELS = {  # class, config, some of our settings
    "kl f8": ("AutoencoderKL", vae_config(scaling_factor=0.5), dict(ch_mult=(1, 2, 2, 4), z_channels=4)),
    "kl f4": ("AutoencoderKL", vae_config(WIDTHS[:3]), dict(ch_mult=(1, 2, 2), latent_proj=True)),
    "gray": ("AutoencoderKL", vae_config(WIDTHS[:2], in_channels=1, out_channels=1), dict(image_mode="L")),
    "vq": ("VQModel", vae_config(**VQ_F4, vq_embed_dim=5), dict(bottleneck="vq", embed_dim=5)),
    "attention": ("AutoencoderKL", vae_config(WIDTHS[:2], **KL_F16), dict(attn_resolutions=(128,))),
    "sd1": ("UNet2DConditionModel", SD_1, dict(num_heads=8, head_dim=0, concat_channels=0, linear_proj=False)),
    "sd2": ("UNet2DConditionModel", SD_2, dict(num_heads=0, head_dim=8, concat_channels=0, linear_proj=True)),
    "inpaint": ("UNet2DConditionModel", SD_2 | dict(in_channels=9), dict(head_dim=8, concat_channels=5)),
    "upscaler": ("UNet2DConditionModel", UPSCALER, dict(num_heads=8, head_dim=0, concat_channels=3, num_classes=20)),
    "unconditional": ("UNet2DModel", PLAIN_UNET, dict(num_heads=0, head_dim=8, transformer_depth=0)),
    "churches": ("UNet2DModel", CHURCHES, dict(num_heads=0, head_dim=8, resblock_updown=True, scale_shift=True)),
}


def model_of(diffusers, kind, **more):
    name, config, _ = MODELS[kind]
    return fill(getattr(diffusers, name)(**config | more)).eval()


def vae_outputs(ours, theirs):
    """Pairs of unit-variance latents and deviations of one image, and images of one latent."""
    x, scale = normal(2, len(ours.settings["image_mode"]), 32, 48).clamp(-1, 1), theirs.config.scaling_factor
    std = ours.latent_std.view(1, -1, 1, 1)
    a, b = ours.encode(x), theirs.encode(x)
    if hasattr(b, "latents"):
        yield ours.normalize(a.mean), b.latents * scale
    else:
        yield ours.normalize(a.mean), b.latent_dist.mean * scale
        yield a.std / std, b.latent_dist.std * scale
    z = normal(*a.mean.shape, seed=1)
    yield ours.decode(ours.denormalize(z)), theirs.decode(z / scale).sample


def unet_outputs(ours, theirs, shift=0):
    """The pair of predictions for the same inputs. shift: what our times are later by."""
    s, inputs, more = ours.settings, {}, {}
    x, t = normal(2, s["in_channels"], 16, 16), torch.tensor([0, 733])
    joined = x
    if s["transformer_depth"]:
        more["encoder_hidden_states"] = None
    if s["context_dim"]:
        inputs["context"] = more["encoder_hidden_states"] = normal(2, 7, s["context_dim"], seed=1)
    if s["num_classes"]:
        inputs["y"] = more["class_labels"] = torch.tensor([1, s["num_classes"] - 1])
    if s["concat_channels"]:
        inputs["concat"] = normal(2, s["concat_channels"], 16, 16, seed=2)
        joined = torch.cat([x, inputs["concat"]], dim=1)
    yield ours(x, t.float() + shift, **inputs), theirs(joined, t, **more).sample


@pytest.mark.parametrize("kind", MODELS)
def test_model_of_diffusers(kind, diffusers, tmp_path):
    """The same outputs and gradients."""
    theirs, expected = model_of(diffusers, kind), MODELS[kind][2]
    theirs.save_pretrained(tmp_path)
    model_class, outputs = (UNet, unet_outputs) if "UNet" in MODELS[kind][0] else (VAE, vae_outputs)
    ours = model_class.from_pretrained(str(tmp_path))
    assert {name: ours.settings[name] for name in expected} == expected and not ours.training
    pairs = list(outputs(ours.requires_grad_(True), theirs))
    for pair in pairs:
        close(*pair, 1e-4)
    for side in zip(*pairs):
        sum((out * normal(*out.shape, seed=3)).sum() for out in side).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    gradients = convert.to_ours(gradients, keys(ours, "diffusers"))
    largest = max(g.abs().max() for g in gradients.values())
    for name, p in ours.named_parameters():
        if name != "quantize.embedding.weight":  # which only the loss trains
            error = (p.grad - gradients[name]).abs().max()
            assert error <= 1e-4 * max(largest * 1e-2, gradients[name].abs().max()), name


def test_containers(diffusers, tmp_path):
    """Shards, pickles, half precision, the names of diffusers before 0.14, a pipeline's folder, a file alone."""
    theirs = model_of(diffusers, "kl f8", latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    theirs.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    theirs.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    theirs.save_pretrained(tmp_path / "old")
    file, state = str(tmp_path / "old" / "diffusion_pytorch_model.safetensors"), theirs.state_dict()
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in state.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in state
    save_file(state, file)
    half = copy.deepcopy(theirs).half()
    half.save_pretrained(tmp_path / "half", variant="fp16")
    half.save_pretrained(tmp_path / "half sharded", variant="fp16", max_shard_size="200KB")
    for path in ("sharded", "pickled", "pipeline", "old", file, "half", "half sharded"):
        ours = VAE.from_pretrained(str(tmp_path / path))
        expected = half.float() if "half" in path else theirs
        same_weights(ours.state_dict(), convert.to_ours(expected.state_dict(), keys(ours, "diffusers")))
        assert ours.latent_mean.eq(1).all() and ours.latent_std.eq(4).all()


def test_tables_agree_with_diffusers_converter(diffusers):
    """diffusers turns CompVis' names into its own by code of its own."""
    from diffusers.loaders import single_file_utils

    for settings in (dict(), dict(ch_mult=(1, 2, 4), num_res_blocks=1), dict(ch_mult=(1, 1, 2, 2, 4))):
        vae = fill(VAE(ch=16, norm_groups=8, **settings))
        blocks = [""] * len(vae.settings["ch_mult"])
        config = {"down_block_types": blocks, "up_block_types": blocks}
        theirs, ours = single_file_utils.convert_ldm_vae_checkpoint(renamed(vae), config), renamed(vae, "diffusers")
        same_weights(ours, {name: t.reshape(ours[name].shape) for name, t in theirs.items()})
    tried = [dict(), dict(linear_proj=True, num_classes=20, concat_channels=3, attention_ds=(2, 4, 8))]
    for settings in (*tried, dict(channel_mult=(1, 2), num_res_blocks=1, attention_ds=(2,))):
        unet = fill(UNet(channels=16, norm_groups=8, num_heads=4, context_dim=24, **settings))
        config = {"layers_per_block": unet.settings["num_res_blocks"], "num_class_embeds": 20}
        file = checkpoint.with_prefix("model.diffusion_model", renamed(unet))
        same_weights(renamed(unet, "diffusers"), single_file_utils.convert_ldm_unet_checkpoint(file, config))


# --- autoencoders and U-Nets of CompVis ---


def test_stable_diffusion_is_recognised():
    """By shapes alone; counts of tensors and parameters are those of the published files."""
    with torch.device("meta"):
        models = (
            (VAE(), convert.infer_vae, 248, 83_653_863),
            (UNet(context_dim=768), convert.infer_unet, 686, 859_520_964),
        )
    for model, infer, tensors, parameters in models:
        state = renamed(model)
        assert len(state) == tensors and sum(t.numel() for t in state.values()) == parameters
        settings, layout = infer(state)
        assert layout == "compvis" and settings.items() <= model.settings.items()
    assert convert.release_of(settings) == convert.SD_1


@pytest.mark.parametrize("settings", [
    dict(context_dim=24), dict(context_dim=24, linear_proj=True, num_heads=0, head_dim=16, concat_channels=5),
    dict(context_dim=24, num_classes=20, self_attention=(True, False, False, True), attention_ds=(2, 4, 8)),
    dict(transformer_depth=0, attention_ds=(2, 4, 8)), dict(context_dim=24, transformer_depth=3, attention_ds=(4,)),
    dict(transformer_depth=0, resblock_updown=True, scale_shift=True),
    dict(context_dim=24, num_res_blocks=(1, 2, 3, 1)),
])  # fmt: skip
@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_unet_settings_from_shapes(settings, layout):
    with torch.device("meta"):
        unet = UNet(channels=32, **settings)
    inferred, found = convert.infer_unet(renamed(unet, layout))
    heads = {name: unet.settings[name] for name in ("num_heads", "head_dim")}
    assert found == layout and convert.UNET | inferred | heads == unet.settings


COMPVIS_VAES = {
    "kl": (dict(), 1 / 0.18215),
    "vq": (dict(ch_mult=(1, 2), z_channels=3, bottleneck="vq", codebook_size=16, embed_dim=5), 1.0),
    "kl-f16": (dict(ch_mult=(1, 1, 2, 2, 4), z_channels=16, attn_resolutions=(16,)), math.nan),
}


@pytest.mark.parametrize("name", COMPVIS_VAES)
def test_vae_of_compvis(name, tmp_path):
    """Alone, with its loss, in a Lightning checkpoint; and in the file of a model."""
    settings, std = COMPVIS_VAES[name]
    made = fill(VAE(ch=32, num_res_blocks=1, **settings))
    state = renamed(made)
    assert ("encoder.down.4.attn.0.norm.weight" in state) == (name == "kl-f16")
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(64, 3, 4, 4)}
    alone, model = str(tmp_path / "alone.ckpt"), str(tmp_path / "model.safetensors")
    torch.save({"state_dict": state | loss, "global_step": 7}, alone)
    save_file(checkpoint.with_prefix("first_stage_model", state), model)
    for file in (alone, model):
        vae = VAE.from_pretrained(file)
        assert vae.settings == made.settings
        same_weights(vae.state_dict(), made.state_dict())
        assert vae.latent_std.allclose(torch.full_like(vae.latent_std, std), equal_nan=True)
    assert VAE.from_pretrained(alone, scaling_factor=0.25).latent_std.unique().item() == 4
    known = dict(norm_groups=16, tanh_out=True)
    assert VAE.from_pretrained(alone, **known).settings == made.settings | known
    refused("by its tensors and config, not 7; leave z_channels out", VAE.from_pretrained, alone, z_channels=7)
    refused("nonsense is not a setting", VAE.from_pretrained, alone, nonsense=7)


def test_attention_blocks_of_compvis(tmp_path):
    """qkv is a convolution over the pixels; q, k and v alternate by head, as in QKVAttentionLegacy."""
    heads, c, pixels = 3, 48, 10
    settings = dict(channels=16, channel_mult=(1, 3), attention_ds=(2,), transformer_depth=0, norm_groups=8)
    unet, file = fill(UNet(num_heads=heads, **settings)), str(tmp_path / "unet.safetensors")
    state, x = renamed(unet), normal(2, c, pixels)
    assert state["middle_block.1.qkv.weight"].shape == (3 * c, c, 1)
    qkv = torch.nn.functional.conv1d(x, state["middle_block.1.qkv.weight"], state["middle_block.1.qkv.bias"])
    q, k, v = qkv.reshape(2 * heads, 3 * c // heads, pixels).split(c // heads, dim=1)
    weights = torch.einsum("bct,bcs->bts", q, k / (c // heads) ** 0.5).softmax(-1)
    h = torch.einsum("bts,bcs->bct", weights, v).reshape(2, c, pixels)
    proj = state["middle_block.1.proj_out.weight"], state["middle_block.1.proj_out.bias"]
    close(unet.middle_block[1].attn(x.mT), torch.nn.functional.conv1d(h, *proj).mT)
    save_file(state, file)
    same_weights(UNet.from_pretrained(file, num_heads=heads, norm_groups=8).state_dict(), unet.state_dict())
    refused("does not say its number of heads; set --num_heads=N or --head_dim=N", UNet.from_pretrained, file)


# --- text towers of others ---


def clip_config(transformers, **settings):
    s = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=517)
    s |= dict(max_position_embeddings=77, bos_token_id=515, eos_token_id=516, pad_token_id=516, projection_dim=16)
    return transformers.CLIPTextConfig(**s | settings)


def write_tokenizer(folder):
    """vocab.json and merges.txt of MERGES."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(c) for c in (*plain, *range(256, 256 + 68))]
    names += [name + "</w>" for name in names] + ["lo", "low</w>", "!!</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_bytes(MERGES)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_of_transformers(activation, transformers, tmp_path):
    theirs = fill(transformers.CLIPTextModel(clip_config(transformers, hidden_act=activation))).eval()
    theirs.save_pretrained(tmp_path / "text_encoder")
    quick, file = activation == "quick_gelu", tmp_path / "text_encoder" / "model.safetensors"
    write_tokenizer(tmp_path / "tokenizer")
    special = dict(pad_token="<|endoftext|>" if quick else "!", model_max_length=77)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", **special)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model_index.json").write_text("{}")
    # where "!" is the padding, it is padding wherever it is
    texts = ["low low?! slow" if quick else "low low?? slow", "", "a low owl, a lower bowl " * 30]
    rows = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    expected = theirs(input_ids=rows).last_hidden_state
    for path, merges in ((tmp_path, None), (tmp_path / "text_encoder", None), (file, MERGES)):
        ours = tower_of(path, merges=merges)
        close(ours(texts), expected, 1e-4)
        assert torch.equal(ours.tokenize(texts), rows) or path == file
    (tmp_path / "tokenizer" / "merges.txt").unlink()  # transformers 5 writes tokenizer.json alone
    assert torch.equal(tower_of(tmp_path).tokenize(texts), rows)
    refused("of width 64, not clip_l; set --tower_weights", convert.load_clip, str(tmp_path), name="clip_l")


@torch.no_grad()
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
        close(ours(rows), theirs.forward_intermediates(rows, **options)["text_intermediates"][-2], 1e-4)


def test_openai_and_open_clip_have_the_same_names(tmp_path, monkeypatch):
    """Only QuickGELU distinguishes OpenAI's ViT-L/14, and no tensor shows it."""
    monkeypatch.setitem(convert.TOWERS, "clip_l", convert.TOWERS["clip_l"] | dict(layers=1))
    with torch.device("meta"):
        made = CLIPTextEncoder(**TOWERS["clip_l"] | dict(width=768, heads=12, layers=1), merges=MERGES)
    state = {name: torch.zeros(t.shape) for name, t in renamed_text(made, "open_clip").items()}
    assert state["transformer.resblocks.0.attn.in_proj_weight"].shape == (3 * 768, 768)
    path = str(tmp_path / "clip.safetensors")
    save_file(state | {"text_projection": torch.ones(8)}, path)
    refused("set --text_encoder=clip_l, or name=other", convert.load_clip, path, merges=MERGES)
    for name, activation in (("clip_l", "quick_gelu"), ("other", "gelu")):
        settings = convert.load_clip(path, name, MERGES)[0]
        assert settings["activation"] == activation and settings["heads"] == 12


# --- pipelines of others ---


LAYOUTS = {  # published folders, whose JSON files are among the real data
    "sd1": "runwayml/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1",
    "sd1_inpaint": "runwayml/stable-diffusion-inpainting",
    "sd2_inpaint": "stabilityai/stable-diffusion-2-inpainting",
    "x4": "stabilityai/stable-diffusion-x4-upscaler",
}
SMALL = {320: (16, 32, 64, 64), 256: (16, 32, 32, 64), 128: (32, 32, 32, 64)}  # widths, by the first published one
TEXT = dict(hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=517)


def small(config):
    """A config of a published folder, with fewer channels."""
    if "vocab_size" in config:
        return config | TEXT | dict(bos_token_id=515, eos_token_id=516)
    widths = config["block_out_channels"]
    config |= dict(block_out_channels=SMALL[widths[0]][: len(widths)], norm_num_groups=GROUPS)
    if "cross_attention_dim" in config:
        heads = config["attention_head_dim"]
        config |= dict(cross_attention_dim=24, sample_size=8, attention_head_dim=heads if heads == 8 else [2, 4, 8, 8])
    return config


@pytest.fixture(scope="module")
def stable(diffusers, transformers, test_data, tmp_path_factory):
    """{name: (diffusers' pipeline, its folder)}: the published folders, with small random weights."""
    root, made = tmp_path_factory.mktemp("pipelines"), {}
    for name, layout in LAYOUTS.items():
        folder = shutil.copytree(test_data / "sd_layouts" / layout, root / name)
        for part in ("unet", "vae", "text_encoder"):
            config = small(json.loads((folder / part / "config.json").read_text()))
            if part == "text_encoder":
                model = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(config))
            else:
                model = getattr(diffusers, config["_class_name"]).from_config(config)
            if part == "vae":  # no variance: diffusers samples the latents of an image to inpaint
                fill(model).quant_conv.weight.data[4:], model.quant_conv.bias.data[4:] = 0, -60
            (model if part == "vae" else fill(model)).save_pretrained(folder / part)
        write_tokenizer(folder / "tokenizer")
        change(folder / "model_index.json", dict.fromkeys(("safety_checker", "feature_extractor"), [None, None]))
        made[name] = opened(diffusers, folder, json.loads((folder / "model_index.json").read_text())["_class_name"])
        made[name] = made[name], str(folder)
    return made


def both_images(theirs, ours, steps, sampler, spacing):
    """The image of diffusers' pipeline and of ours, with guidance, from the same latents."""
    generator, prompt, task = torch.Generator().manual_seed(5), "low low? slow", ours.task["task"]
    size, inputs, latents = dict(height=64, width=64), {}, torch.randn((1, 4, 8, 8), generator=generator)
    if task == "inpaint":
        image, mask = normal(1, 3, 64, 64).clamp(-1, 1), torch.zeros(1, 1, 64, 64)
        mask[..., :32] = 1
        size, inputs = size | dict(image=image, mask_image=mask), dict(image=image, mask=mask)
    elif task == "sr":
        low = normal(1, 3, 8, 8).clamp(-1, 1)
        size, inputs = dict(image=low, noise_level=9), dict(low=low, level=torch.tensor([9]))
    options = dict(num_inference_steps=steps, guidance_scale=3.0, latents=latents, generator=generator)
    a = theirs(prompt, output_type="pt", **options, **size).images * 2 - 1
    size = () if task == "sr" else (64,)
    b = sample.generate(ours, [prompt], [5], steps, 3.0, sampler, size, inputs=inputs, spacing=spacing)
    assert a.std() > 0.2
    return (a[..., :32], b[..., :32]) if task == "inpaint" else (a, b)  # what is known is not decoded by ours


LEADING, TRAILING = dict(timestep_spacing="leading"), dict(timestep_spacing="trailing")
SCHEDULERS = [  # diffusers' class, settings, numbers of steps; our sampler
    ("DDIM", LEADING, (1, 3, 20), "ddim"),
    ("DDIM", LEADING | dict(steps_offset=0, set_alpha_to_one=True), (3,), "ddim"),
    ("DDIM", LEADING | dict(steps_offset=0, set_alpha_to_one=False), (3,), "ddim"),
    ("PNDM", LEADING, (1, 3, 20), "plms"),
    ("UniPCMultistep", TRAILING, (1, 3, 16), "unipc"),
    ("DPMSolverMultistep", TRAILING, (1, 3, 16), "dpmpp_2m"),
    ("EulerDiscrete", LEADING, (3, 20), "euler"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LAYOUTS)
def test_images_of_published_layouts(name, diffusers, stable, monkeypatch):
    """With the file's own scheduler and others; its steps_offset and set_alpha_to_one are obeyed."""
    theirs, folder = stable[name]
    ours, own = sample.load_pipeline(folder), theirs.scheduler
    assert ours.objective == ("v" if name in ("sd2", "x4") else "eps") and ours.latent_shape == (4, 8, 8)
    assert ours.task["task"] == {"inpaint": "inpaint", "x4": "sr"}.get(name.split("_")[-1], "none")
    assert (ours.schedule.steps_offset, ours.schedule.set_alpha_to_one) == (1, False)
    close(*both_images(theirs, ours, 20, "plms" if "PNDM" in type(own).__name__ else "ddim", "leading"), 1e-5)
    for kind, settings, counts, sampler in SCHEDULERS:
        if kind == "PNDM" and ours.objective == "v":
            continue  # diffusers' averages v, which are of different alpha and sigma
        kind = getattr(diffusers, f"{kind}Scheduler")
        monkeypatch.setattr(theirs, "scheduler", kind.from_config(own.config, **settings))
        steps = {key: settings[key] for key in ("steps_offset", "set_alpha_to_one") if key in settings}
        other = ours._replace(schedule=ours.schedule._replace(**steps))
        for n in counts:
            close(*both_images(theirs, other, n, sampler, settings["timestep_spacing"]), 1e-5)


def test_clip_sample(diffusers, tmp_path):
    """Of DDPM on pixels, as diffusers' own training script has it."""
    unet, scheduler = model_of(diffusers, "unconditional", sample_size=8), diffusers.DDPMScheduler()
    pipe = diffusers.DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    ours, options = sample.load_pipeline(str(tmp_path)), dict(sampler="ddpm", spacing="leading")
    expected = pipe(1, torch.Generator().manual_seed(5), 5, output_type="np").images
    clipped, plain = (sample.generate(p, [None], [5], 5, **options) for p in (ours, ours._replace(clip_x0=0.0)))
    close(clipped.permute(0, 2, 3, 1) / 2 + 0.5, torch.from_numpy(expected), 1e-5)
    assert (clipped - plain).abs().max() > 0.1


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
    text = renamed_text(expected.tower, "transformers") | {"embeddings.position_ids": torch.arange(77)[None]}
    state |= checkpoint.with_prefix("cond_stage_model.transformer.text_model", text)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    file, known = str(tmp_path / "model.ckpt"), dict(num_heads=8, norm_groups=GROUPS)
    lightning(file, state | {"betas": betas.float()})
    refused("does not say its number of heads", UNet.from_pretrained, file)
    refused("does not say what it predicts; set --objective=v", convert.load_pipeline, file, MERGES, **known)
    assert convert.load_pipeline(file, MERGES, otherwise="v", **known)["meta"]["model"]["objective"] == "v"
    parts = convert.load_pipeline(file, MERGES, objective="eps", **known)
    modules = dict(unet=expected.denoiser.unet, vae=expected.vae, text=expected.tower)
    for name, module in modules.items():
        same_weights(parts[name][1], module.state_dict())
    assert parts["vae"][1]["latent_std"].unique().item() == pytest.approx(1 / 0.18215)
    expected = dict(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, objective="eps", cond="text")
    assert {name: parts["meta"]["model"][name] for name in expected} == expected
    assert parts["meta"]["model"]["image_size"] == [512] and parts["text"][0]["heads"] == 1, "heads of 64, as published"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["sd1", "sd1_inpaint", "x4"])
def test_fine_tuning(name, diffusers, stable, small_data, tmp_path):
    """train_ldm.py continues from a pipeline's folder; the result goes back as the same pipeline, the same images."""
    pipe, folder = stable[name]
    theirs = sample.load_pipeline(folder)
    side = 32 if name == "x4" else 64
    args = f"--dataset={small_data} --init_from={folder} --image_size={side} --batch_size=1 --lr=1e-6 --warmup_steps=0"
    args += " --max_steps=1 --val_images=1 --n_samples=1 --sample_steps=1 --cache_latents=false --workers=0"
    args += " --device=cpu --out_dir=out"
    run = helpers.Run("ldm", tmp_path, *args.split(), bare=True).finish()
    ours = sample.load_pipeline(str(run.out))
    assert ours.objective == theirs.objective and ours.denoiser.text is None
    for part in ("vae", "tower"):
        a, b = (getattr(pipeline, part) for pipeline in (ours, theirs))
        assert checkpoint.hash_weights(a) == checkpoint.hash_weights(b)
    before = theirs.denoiser.unet.state_dict()
    moved = [(t - before[key]).abs().max() for key, t in ours.denoiser.unet.state_dict().items()]
    assert 0 < max(moved) < 1e-5 and sum(m > 0 for m in moved) > 600
    convert.to_diffusers(str(run.out), f"{tmp_path}/back")
    back = opened(diffusers, f"{tmp_path}/back", type(pipe).__name__)
    for pipeline in (ours, sample.load_pipeline(f"{tmp_path}/back")):
        close(*both_images(back, pipeline, 10, "ddim", "trailing"), 1e-5)


# --- refused ---


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(zipped, tmp_path):
    marker, file = tmp_path / "ran", str(tmp_path / "model.ckpt")
    for call in ((os.system, (f"touch {marker}",)), (open, (str(marker), "w")), (eval, (f"open({marker!r}, 'w')",))):
        for content in ({"state_dict": {"a": torch.ones(1)}, "b": Call(*call)}, Call(*call), [Call(*call)]):
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            refused("code that would be run; use a .safetensors file", VAE.from_pretrained, file)
    assert not marker.exists()


def test_damaged_pickles(tmp_path):
    file = tmp_path / "a.ckpt"
    for content in (b"dear diary\n" * 99, b"PK\x03\x04zip", b"\x80\x02" + b"(" * 20_000, b"\x80\x02X\xff\xff\xff\x7f"):
        file.write_bytes(content)
        refused("a.ckpt: not a checkpoint", convert.read_tensors, str(file))
    torch.save({"w": torch.zeros(1).expand(2**20, 2**20)}, file)  # a few bytes that would fill the memory
    refused("a.ckpt: no tensors", convert.read_tensors, str(file))


FIRST, LEVEL = "encoder.mid.block_1.conv1.weight", "encoder.down.1.block.0.conv1.weight"
SHARD, INDEX = "diffusion_pytorch_model-00002-of-00012.safetensors", "diffusion_pytorch_model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 335\n"
SCHEDULER, WEIGHTS = "scheduler/scheduler_config.json", "diffusion_pytorch_model.safetensors"
REFUSED = [  # file or folder; what is changed in which file, None removes; message
    ("vae.safetensors", {"": {FIRST: None}}, f"tensors are missing: {FIRST}"),
    ("vae.safetensors", {"": {"encoder.mid.extra": (1,)}}, "tensors are unknown: encoder.mid.extra"),
    ("vae.safetensors", {"": {FIRST: (32, 64, 3, 3)}}, f"{FIRST} is (32, 64, 3, 3)"),
    ("vae.safetensors", {"": {LEVEL: (48, 32, 3, 3)}}, "levels of [32, 48] channels"),
    ("vae.safetensors", {"": {"encoder.conv_in.weight": (32, 6, 3, 3)}}, "images of 6 channels; only 1, 3 and 4 (L,"),
    ("vae.safetensors", {"": {"encoder.conv_in.weight": (32, 4, 3, 3)}}, "conv_out.bias is (3,), its settings need (4"),
    ("vae.safetensors", {"": {"decoder.conv_in.weight": (7,)}}, "settings or tensors do not fit (IndexError"),
    ("vae.safetensors", {"": {"encoder.conv_in.weight": None}}, "no tensor encoder.conv_in.weight"),
    ("vae.safetensors", {"": {"unet.down.lora_A.weight": (2,)}}, "a LoRA"),
    ("shards", {INDEX: {"weight_map": {"x": SHARD}}}, "lists x, which is in none of its shards"),
    ("shards", {SHARD: None}, f"{SHARD}: no such file"),
    ("shards", {INDEX: None}, "no weights (diffusion_pytorch_model.safetensors"),
    ("shards", {"config.json": "{"}, "config.json: cannot be read"),
    ("shards", {"config.json": "[]"}, "config.json: not a JSON object"),
    ("shards", {"config.json": None}, "shards: no latest.safetensors in it"),
    ("sd/unet", {WEIGHTS: {"add_embedding.linear_1.weight": (2,)}}, "SDXL's U-Net (it has add_embedding"),
    ("sd/unet", {"config.json": {"act_fn": "gelu"}}, "act_fn='gelu'; only 'silu' is supported"),
    ("sd/unet", {"config.json": {"norm_eps": 1e-6}}, "norm_eps=1e-06; only"),
    ("sd/unet", {"config.json": {"attention_head_dim": [1, 2, 3, 4]}}, "attention_head_dim=[1, 2, 3, 4]"),
    ("sd/unet", {"config.json": {"attention_head_dim": [0, "x"]}}, "settings or tensors do not fit"),
    ("sd/unet", {"config.json": {"only_cross_attention": True}}, "only_cross_attention=True"),
    ("sd/unet", {"config.json": {"norm_num_groups": "x"}}, "do not build a UNet"),
    *(("sd", {part: None}, f"sd/{part}: missing, but model_index.json names it; fetch all of it")
      for part in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")),
    ("sd", {"tokenizer/merges.txt": None}, "sd/tokenizer: neither merges.txt nor tokenizer.json in it; fetch it again"),
    ("sd", {"tokenizer/merges.txt": "#version: 0.2\nl o\n"}, "merges.txt: 1 merges, its text encoder needs 3;"),
    ("sd", {"tokenizer/vocab.json": "{"}, "tokenizer/vocab.json: cannot be read"),
    *(("sd", {file: POINTER}, f"sd/{file}: a git-lfs pointer, not the file itself; run git lfs pull")
      for file in ("unet/" + WEIGHTS, "vae/config.json", "tokenizer/merges.txt", "tokenizer/vocab.json")),
    ("vae.safetensors", {"": POINTER}, "vae.safetensors: a git-lfs pointer"),
    ("sd", {"unet/config.json": None}, "unet/config.json: cannot be read"),
    ("sd", {"model_index.json": None}, "sd: no model_index.json in it; fetch all of it"),
    ("sd", {SCHEDULER: {"clip_sample": True}}, "scheduler_config.json: clip_sample=True of a DDIMScheduler"),
    ("sd", {SCHEDULER: {"thresholding": True}}, f"{SCHEDULER}: thresholding=True; only False is supported"),
    ("sd", {SCHEDULER: None}, "sd/scheduler/scheduler_config.json: cannot be read"),
    ("sd", {"model_index.json": {"text_encoder_2": ["a", "b"]}}, "a StableDiffusionPipeline with a text_encoder_2"),
    ("sd", {SCHEDULER: {"_class_name": "FlowMatchEulerDiscreteScheduler"}}, "scheduler FlowMatchEuler"),
    ("sd", {SCHEDULER: {"use_flow_sigmas": True}}, "use_flow_sigmas=True; only False"),
    ("sd", {SCHEDULER: {"beta_schedule": "mine"}}, "the noise schedule"),
]  # fmt: skip


@pytest.fixture(scope="module")
def good_files(diffusers, stable, tmp_path_factory):
    """What REFUSED changes."""
    root = tmp_path_factory.mktemp("good")
    save_file(renamed(fill(VAE(ch=32, ch_mult=(1, 2), num_res_blocks=1))), root / "vae.safetensors")
    model_of(diffusers, "kl f8").save_pretrained(root / "shards", max_shard_size="400KB")
    shutil.copytree(stable["sd2"][1], root / "sd")
    return root


def change(path, content):
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        state = load_file(path) | {name: shape and torch.ones(shape) for name, shape in content.items()}
        save_file({name: t for name, t in state.items() if t is not None}, path)


@pytest.mark.parametrize("name, changes, message", REFUSED, ids=[f"{i} {row[0]}" for i, row in enumerate(REFUSED)])
def test_refused(name, changes, message, good_files, tmp_path):
    root, path = name.split("/")[0], tmp_path / name
    copy_of = shutil.copytree if (good_files / root).is_dir() else shutil.copy
    copy_of(good_files / root, tmp_path / root)
    load = {"sd": convert.load_pipeline, "sd/unet": UNet.from_pretrained}.get(name, VAE.from_pretrained)
    load(str(path))
    for file, content in changes.items():
        change(path / file, content)
    refused(message, load, str(path))


def test_contradictions_and_tables_of_betas(stable, tmp_path):
    folder = shutil.copytree(stable["sd2"][1], tmp_path / "sd")
    refused("objective is v, not eps; leave --objective out", convert.load_pipeline, str(folder), objective="eps")
    refused("not a checkpoint of this repository", convert.to_diffusers, str(folder), f"{tmp_path}/out")
    refused("no model_index.json in it", convert.load_pipeline, str(folder / "unet"))
    change(folder / SCHEDULER, {"trained_betas": [0.5] * 1000})
    assert convert.load_pipeline(str(folder))["meta"]["model"]["schedule"] == "linear"


def test_prefixes(tmp_path):
    """What wraps a module is taken off; another common prefix is named."""
    vae, file = fill(VAE(ch=32, ch_mult=(1, 2), num_res_blocks=1)), str(tmp_path / "vae.safetensors")
    state = renamed(vae)
    for prefix in ("module", "_orig_mod", "vae", "module._orig_mod"):
        save_file(checkpoint.with_prefix(prefix, state), file)
        same_weights(VAE.from_pretrained(file).state_dict(), vae.state_dict())
    save_file(checkpoint.with_prefix("net.autoencoder", state), file)
    refused("no tensor encoder.conv_in.weight (all names begin with net.autoencoder.)", VAE.from_pretrained, file)


def test_sdxl(tmp_path):
    """Its U-Net is refused by name; its autoencoder is supported, with its own scale."""
    state = checkpoint.with_prefix("first_stage_model", renamed(fill(VAE(ch=32, num_res_blocks=1))))
    state |= {"model.diffusion_model.label_emb.0.0.weight": torch.ones(4, 4)}
    state |= {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": torch.ones(4)}
    file = str(tmp_path / "xl.safetensors")
    save_file(state, file)
    assert VAE.from_pretrained(file).latent_std.unique().item() == pytest.approx(1 / 0.13025)
    for load in (UNet.from_pretrained, convert.load_pipeline):
        refused("SDXL's U-Net (it has label_emb.0.0.weight), which is not supported", load, file)


# --- ours out ---

KL = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, norm_groups=4)
VQ = KL | dict(bottleneck="vq", codebook_size=32)
PLAIN = dict(in_channels=3, out_channels=3, channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_ds=(2,))
PLAIN |= dict(norm_groups=4, num_heads=0, head_dim=8, transformer_depth=0)
CLASSES = PLAIN | dict(num_classes=4)
CROSS = PLAIN | dict(transformer_depth=1, context_dim=32)
WIDE_VAE, WIDE = dict(ch=32, norm_groups=32), dict(channels=32, norm_groups=32, head_dim=16)  # as CompVis has it
ONE_STD = dict(mean=(0.3, -0.2, 0.1), std=(0.7,))
PUBLISHED_SCALE = dict(mean=(0.0,), std=(1 / 0.18215,))


def make_vae(settings=KL, mean=(0.3, -0.2, 0.1), std=(0.5, 1.0, 1.7), **more):
    vae = fill(VAE(**settings | more)).requires_grad_(False).eval()
    C = vae.latent_channels
    vae.latent_mean.copy_(torch.tensor(mean).repeat(C)[:C])
    vae.latent_std.copy_(torch.tensor(std).repeat(C)[:C])
    if vae.settings["bottleneck"] == "vq":
        vae.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    return vae


def make_unet(settings=PLAIN, **more):
    return fill(UNet(**settings | more)).requires_grad_(False).eval()


def save_vae(folder, vae):
    """A checkpoint of stage 1; returns its path."""
    about = meta("vae", vae.settings, config={"image_size": (16,)})
    checkpoint.write(f"{folder}/vae.safetensors", checkpoint.with_prefix("ema", vae.state_dict()), about)
    return f"{folder}/vae.safetensors"


def save_ldm(folder, vae, denoiser, tower=None, **model):
    """A checkpoint of stage 2; returns its path. model: settings that differ from conftest.ldm_settings."""
    denoiser = Denoiser(denoiser) if isinstance(denoiser, UNet) else denoiser
    tensors = checkpoint.with_prefix("ema", denoiser.state_dict())
    tensors |= checkpoint.with_prefix("vae", vae.state_dict()) if vae else {}
    config = {"tower_weights": "", "clip_vocab": ""}
    if tower is not None:
        config = {"tower_weights": f"{folder}/tower.safetensors", "clip_vocab": f"{folder}/merges.txt"}
        save_file(tower.state_dict(), config["tower_weights"])
        (folder / "merges.txt").write_bytes(MERGES)
        model |= dict(cond="text", tower_hash=checkpoint.hash_weights(tower))
    about = ldm_settings(
        denoiser, **{"image_size": (16,) if vae else (8,), "beta_start": 0.00085, "beta_end": 0.012} | model
    )
    about["first_stage"] = "vae" if vae else "none"
    about = meta("ldm", about, vae=vae and vae.settings, examples=[None], classes=[], config=config)
    checkpoint.write(f"{folder}/ldm.safetensors", tensors, about)
    return f"{folder}/ldm.safetensors"


def images_of(file, conditions, steps, guidance=1.0):
    """Our images from the latents of seeds 7, 8, ..., as diffusers' pipelines have theirs: (N,H,W,3) in [0,1]."""
    seeds = range(7, 7 + len(conditions))
    images = sample.generate(sample.load_pipeline(file), conditions, seeds, steps, guidance)
    return images.permute(0, 2, 3, 1) / 2 + 0.5


EXPORTED_VAES = {  # settings, latent statistics
    "kl": (KL, {}),
    "no projections": (KL | dict(latent_proj=False), {}),
    "no attention": (KL | dict(mid_attention=False, ch_mult=(1, 2, 2), num_res_blocks=2), {}),
    "rgba": (KL | dict(image_mode="RGBA"), {}),
    "vq": (VQ, ONE_STD),
    "vq embed_dim": (VQ | dict(embed_dim=5), ONE_STD),
    "vq no projections": (VQ | dict(latent_proj=False), ONE_STD),
    "kl scaled": (KL, PUBLISHED_SCALE),
    "vq scaled": (VQ, PUBLISHED_SCALE),
}


@torch.no_grad()
@pytest.mark.parametrize("name", EXPORTED_VAES)
def test_autoencoder_in_diffusers(name, diffusers, tmp_path):
    """Encodes to unit variance and decodes it, there and when it is read back."""
    settings, statistics = EXPORTED_VAES[name]
    vae, kind = make_vae(settings, **statistics), "VQModel" if "vq" in name else "AutoencoderKL"
    description = convert.to_diffusers(save_vae(tmp_path, vae), f"{tmp_path}/out")
    assert description == f"components, no pipeline: vae ({kind}); it is an autoencoder alone"
    theirs = getattr(diffusers, kind).from_pretrained(f"{tmp_path}/out", subfolder="vae")
    back = VAE.from_pretrained(f"{tmp_path}/out/vae")
    for pair in (*vae_outputs(vae, theirs), *vae_outputs(back, theirs)):
        close(*pair, 1e-4)
    assert theirs.config.sample_size == 16
    if "vq" in name:  # many codes are used, so a wrong distance would show
        assert len(vae.quantize.nearest(vae.denormalize(normal(2, vae.latent_channels, 16, 16))).unique()) > 20
    if statistics == PUBLISHED_SCALE:  # one deviation and no means leave the weights alone
        same_weights(back.state_dict(), vae.state_dict())
        assert theirs.config.scaling_factor == pytest.approx(0.18215) and torch.equal(back.latent_std, vae.latent_std)
    else:
        assert theirs.config.scaling_factor == 1


@torch.no_grad()
@pytest.mark.parametrize("settings", [
    CROSS | dict(linear_proj=True, num_classes=4),
    CROSS | dict(num_heads=2, head_dim=0, transformer_depth=2, num_res_blocks=(1, 2), self_attention=(True, False)),
    CROSS | dict(context_dim=0, scale_shift=True),
    # heads of 16 beside a level without attention, whose number means nothing
    CROSS | dict(channels=24, head_dim=16),
    CROSS | dict(channels=8, channel_mult=(1, 4), head_dim=16),
    CLASSES, CLASSES | dict(concat_channels=2),
    PLAIN | dict(num_heads=1, head_dim=0, attention_ds=(1, 2), resblock_updown=True, scale_shift=True),
    PLAIN | dict(num_heads=4, head_dim=0, middle_attention=False),
])  # fmt: skip
@pytest.mark.parametrize("schedule", ["cosine", "scaled_linear"])
def test_unet_in_diffusers(settings, schedule, diffusers, tmp_path):
    unet, cond = make_unet(settings), "class" if settings.get("num_classes") else "none"
    file = save_ldm(tmp_path, make_vae(), unet, cond=cond, num_classes=3, schedule=schedule)
    convert.to_diffusers(file, f"{tmp_path}/out")
    theirs = diffusers.UNet2DConditionModel if settings["transformer_depth"] else diffusers.UNet2DModel
    theirs = theirs.from_pretrained(f"{tmp_path}/out", subfolder="unet")
    back = UNet.from_pretrained(f"{tmp_path}/out/unet")
    for pair in (*unet_outputs(unet, theirs, schedule == "cosine"), *unet_outputs(back, theirs)):
        close(*pair)
    if settings == CLASSES:  # without a pipeline, but it opens here
        a, b = (sample.generate(sample.load_pipeline(path), [2], [0], 3, 2.0) for path in (file, f"{tmp_path}/out"))
        close(a, b, 1e-4)


TABLES = ["linear", "scaled_linear", "quadratic", "sqrt", "sigmoid", "squared_cosine", "cosine"]


@pytest.mark.parametrize("schedule, zero_snr", [(name, zero) for name in TABLES for zero in (False, True)][:-1])
def test_the_schedulers_table_is_ours(schedule, zero_snr, diffusers):
    model = dict(schedule=schedule, beta_start=0.00085, beta_end=0.012, zero_snr=zero_snr, objective="v")
    theirs = diffusers.DDIMScheduler.from_config(json.loads(json.dumps(convert.scheduler_config(model))))
    process = diffusion.make_schedule(schedule, zero_snr=zero_snr)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    close(theirs.alphas_cumprod.double().sqrt(), process.alpha(t))
    close((1 - theirs.alphas_cumprod.double()).sqrt(), process.sigma(t), 5e-5)
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
    "v zero snr": dict(schedule="scaled_linear", zero_snr=True),
    "x0": dict(objective="x0", schedule="squared_cosine"),
    "sigmoid": dict(schedule="sigmoid"),
    "gray": dict(image_mode="L"),
}


def opened(diffusers, folder, kind):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipe).__name__ == kind
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", PROCESSES)
def test_unconditional_pipeline(name, diffusers, tmp_path):
    """It generates the same images in diffusers, and when it is read back."""
    vae = make_vae(VQ, **ONE_STD) if name == "vq" else make_vae(image_mode="L" if name == "gray" else "RGB")
    file, out = save_ldm(tmp_path, vae, make_unet(), **PROCESSES[name]), f"{tmp_path}/out"
    assert convert.to_diffusers(file, out) == f'LDMPipeline: DiffusionPipeline.from_pretrained("{out}") opens it'
    theirs = opened(diffusers, out, "LDMPipeline")
    for steps in (1, 10):
        expected = images_of(file, [None], steps)
        got = theirs(1, torch.Generator().manual_seed(7), num_inference_steps=steps, output_type="np").images
        close(torch.from_numpy(got), expected, 1e-3)
    close(images_of(out, [None], 10), expected, 1e-3)
    assert expected.std() > 0.05
    ours, back = (read["model"] for read in (checkpoint.read_meta(file), convert.load_pipeline(out)["meta"]))
    same = ["objective", "schedule", "zero_snr", "cond", "task", "image_size", "image_mode"]
    same += ["beta_start", "beta_end"] if name != "x0" else []  # squared_cosine has none
    assert {key: ours[key] for key in same} == {key: back[key] for key in same}


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_text_pipeline(name, diffusers, transformers, tmp_path, small_towers):
    tower, out = fill(CLIPTextEncoder(**TOWERS[name], merges=MERGES)).eval(), f"{tmp_path}/out"
    process = dict(objective="eps", schedule="scaled_linear") if name == "clip_l" else {}
    unet = make_unet(CROSS, context_dim=tower.width)
    file = save_ldm(tmp_path, make_vae(), unet, tower, text_encoder=name, image_size=(16, 24), **process)
    convert.to_diffusers(file, out)
    theirs = opened(diffusers, out, "StableDiffusionPipeline")
    prompts = ["low low!! Slow", "a lower owl " * 9, ""]
    tokens = theirs.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert tokens.tolist() == tower.tokenize(prompts).tolist() and theirs.tokenizer.model_max_length == 12
    close(theirs.text_encoder(tokens)[0], tower(prompts))
    expected = images_of(file, prompts, 10, guidance=3.0)
    latents = torch.stack([normal(3, 8, 12, seed=7 + i) for i in range(3)])
    options = dict(num_inference_steps=10, guidance_scale=3.0, output_type="np")
    close(torch.as_tensor(theirs(prompts, latents=latents, **options).images), expected, 1e-3)
    close(images_of(out, prompts, 10, guidance=3.0), expected, 1e-3)
    assert expected.std() > 0.05 and (expected[0] - expected[2]).abs().max() > 0.01, "the prompts matter"
    settings, state, _ = convert.load_tower(file, f"{out}/text_encoder", f"{tmp_path}/merges.txt")
    assert settings == tower.settings
    same_weights(state, tower.state_dict())


WITH_TEXT, CLASS = dict(cond="text"), dict(cond="class", num_classes=3)
SR = WITH_TEXT | dict(task="sr", sr_scale=2, sr_noise=9)
NO_PIPELINE = [  # the checkpoint's settings, the autoencoder's, whether its tower is frozen; the reason
    (None, KL, False, "it is an autoencoder alone"),
    ({}, None, False, "no pipeline of this type generates pixels"),
    (dict(task="inpaint"), KL, False, "no pipeline for task=inpaint without text"),
    (SR | dict(image_mode="L"), KL, True, "no pipeline for task=sr with image_mode=L"),
    (SR | dict(sr_scale=4), KL, True, "StableDiffusionUpscalePipeline enlarges by 2, not 4"),
    (SR | dict(sr_noise=0), KL, True, "StableDiffusionUpscalePipeline adds noise, sr_noise=0 has none"),
    (CLASS, KL, False, "no pipeline for such classes; class_labels=3 is the empty condition"),
    (dict(unet=CROSS), KL, False, "LDMPipeline takes plain attention, transformer_depth=0"),
    (dict(image_size=(8, 16)), KL, False, "LDMPipeline and StableDiffusionInpaintPipeline make square images"),
    (WITH_TEXT, KL, False, "its text encoder was trained here and cannot be exported"),
    (WITH_TEXT, VQ, True, "StableDiffusionPipeline takes no VQ"),
]


@pytest.mark.parametrize("model, vae, tower, reason", NO_PIPELINE)
def test_models_without_a_pipeline(model, vae, tower, reason):
    plain = dict(cond="none", task="none", num_classes=0, sr_scale=0, unet=PLAIN, image_size=(16,), image_mode="RGB")
    model = model if model is None else plain | model
    got = convert.pipeline_of(model, vae and (convert.VAE | vae, {}, 1.0), ({}, {}, b"") if tower else None)
    assert got == ("", reason)


LIMITS = [  # the layouts that cannot hold them: a part's settings, of which the first is named
    ("both", "vae", [dict(activation="swiglu"), dict(downsample="avg"), dict(upsample="bilinear")]),
    ("both", "vae", [dict(linear_attention=True), dict(patch_size=2, ch_mult=(1,)), dict(pixel_channels=2)]),
    ("both", "unet", [dict(unet_patch=2), dict(qk_norm=True), dict(linear_attention=True)]),
    ("both", "unet", [dict(resample="max"), dict(upsample="bilinear")]),
    ("both", "cross", [dict(context_pool=True), dict(middle_attention=False)]),
    ("both", "model", [dict(objective="flow"), dict(schedule="flow"), dict(objective="eps")]),
    ("diffusers", "vae", [dict(attn_resolutions=(16,), resolution=32), dict(tanh_out=True), dict(embed_dim=5)]),
    ("diffusers", "unet", [dict(resample="pool"), dict(num_res_blocks=(1, 2))]),
    ("diffusers", "unet", [dict(num_heads=2, head_dim=0, attention_ds=(1, 2))]),
    ("diffusers", "cross", [dict(resblock_updown=True)]),
    ("diffusers", "model", [dict(class_embed="token", cond="class"), dict(task="semantic")]),
    ("compvis", "vae", [dict(norm_groups=4)]),
    ("compvis", "unet", [dict(norm_groups=4), dict(middle_attention=False)]),
    ("compvis", "cross", [dict(context_dim=0)]),
]


@pytest.mark.parametrize("layouts, part, rows", LIMITS)
def test_limits_are_named(layouts, part, rows):
    for row in rows:
        s = {"vae": KL | WIDE_VAE, "unet": PLAIN | WIDE, "cross": CROSS | WIDE, "model": dict(schedule="cosine")}
        s[part] = s[part] | row
        model = dict(cond="none", objective="v", beta_start=0.00085, beta_end=0.012, zero_snr=False, task="none")
        model |= dict(class_embed="add", unet=convert.UNET | s["cross" if part == "cross" else "unet"]) | s["model"]
        for layout in ("diffusers", "compvis"):
            named = any(next(iter(row)) in name for name in convert.limits(layout, convert.VAE | s["vae"], model))
            assert named == (layouts in ("both", layout)), (layout, row)


def test_refused_exports_leave_nothing_behind(tmp_path, monkeypatch):
    out = f"{tmp_path}/out"
    file = save_ldm(tmp_path, make_vae(), make_unet(), objective="flow", schedule="flow")
    refused("diffusers cannot hold objective=flow; schedule=flow", convert.to_diffusers, file, out)
    refused("VQ latents with one std a channel", convert.to_diffusers, save_vae(tmp_path, make_vae(VQ)), out)
    file = save_vae(tmp_path, make_vae(std=(math.nan,)))
    refused("no latent statistics; run train_vae.py with --measure_latents", convert.to_diffusers, file, out)
    file = save_vae(tmp_path, make_vae())
    refused("leave out --ema_std", convert.to_compvis, file, f"{out}.safetensors", ema_std=0.1)
    own = save_ldm(tmp_path, make_vae(), make_unet())
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
    out, vae, unet = f"{tmp_path}/out/model.safetensors", make_vae(**WIDE_VAE), make_unet(**WIDE)
    description = convert.to_compvis(save_ldm(tmp_path, vae, unet), out)
    parts = "the autoencoder, scale_factor 1, the U-Net, its table of 1000 betas"
    assert description == f"{out}: {parts}; not in the file: objective=v, head_dim=16"
    expected, state = {f"first_stage_model.{name}" for name in renamed(vae)}, load_file(out)
    expected |= {f"model.diffusion_model.{name}" for name in renamed(unet)} | {"betas", "scale_factor"}
    expected |= {"alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"}
    assert set(state) == expected and state["scale_factor"] == 1
    alpha_bar, t = state["alphas_cumprod"], torch.arange(1, 1001) / 1000
    close(alpha_bar, torch.cos(torch.pi / 2 * t) ** 2, 1e-6)
    close(torch.cumprod(1 - state["betas"].double(), 0).float(), alpha_bar)
    assert torch.equal(state["alphas_cumprod_prev"], torch.cat([torch.ones(1), alpha_bar[:-1]]))
    close(state["sqrt_alphas_cumprod"] ** 2, alpha_bar)
    close(state["sqrt_one_minus_alphas_cumprod"] ** 2, 1 - alpha_bar)


@pytest.mark.parametrize("name", ["none", "clip_l", "openclip_h", "tokens", "joint"])
def test_compvis_there_and_back(name, tmp_path, small_towers):
    tower = fill(CLIPTextEncoder(**TOWERS[name], merges=MERGES)).eval() if name in TOWERS else None
    context, out = dict(context_dim=tower.width) if tower else {}, f"{tmp_path}/model.safetensors"
    vae = make_vae(**PUBLISHED_SCALE, **WIDE_VAE)
    denoiser = Denoiser(make_unet(PLAIN if name == "none" else CROSS, **WIDE | context))
    model = dict(cond="none" if name == "none" else "text")
    if name == "joint":
        denoiser.text = TextEncoder(32, 1, 2, 8)
    elif name == "tokens":
        denoiser.class_tokens = fill(torch.nn.Embedding(11, 32))
        model = dict(cond="class", class_embed="token", num_classes=10)
    elif tower:
        model = dict(schedule="scaled_linear", text_encoder=name, cond="text")
    description = convert.to_compvis(save_ldm(tmp_path, vae, denoiser, tower, **model), out)
    assert ("the text encoder that was trained with it" in description) == (name == "joint")
    state, back = load_file(out), VAE.from_pretrained(out)
    texts = {key for key in state if key.startswith("cond_stage_model.")}
    assert bool(texts) == (name not in ("none", "joint")) and state["scale_factor"] == pytest.approx(0.18215)
    same_weights(back.state_dict(), vae.state_dict())
    assert torch.equal(back.latent_std, vae.latent_std)
    if name == "joint":
        return
    parts = convert.load_pipeline(out, f"{tmp_path}/merges.txt" if tower else "", "v", head_dim=16)
    assert {key: parts["meta"]["model"][key] for key in model} == model
    if tower:
        assert parts["text"][0] == tower.settings
        same_weights(parts["text"][1], tower.state_dict())
        assert ("cond_stage_model.model.ln_final.bias" in texts) == (name == "openclip_h")
    elif name == "tokens":  # as in LDM's cin256-v2: the last one is the empty class
        table = denoiser.class_tokens.weight.detach()
        assert torch.equal(parts["class_tokens"], table)
        pipeline = sample.load_pipeline(out, objective="v", head_dim=16)
        assert torch.equal(sample.network_inputs(pipeline, [3, 10])["context"], table[[3, 10]][:, None])
        refused("holds a text encoder", convert.load_clip, out)
        save_file(state | {"cond_stage_model.embedding.weight": table[:10].clone()}, out)
        refused("no guidance", convert.load_pipeline, out, objective="v", head_dim=16)
    for key, t in denoiser.unet.state_dict().items():
        close(parts["unet"][1][key], t)  # bits of the time embedding are lost where it is folded to and fro


def test_compvis_autoencoder_alone_and_maps(tmp_path):
    vae, out = make_vae(**WIDE_VAE | dict(latent_proj=False, tanh_out=True, attn_resolutions=(128,))), f"{tmp_path}/out"
    description = convert.to_compvis(save_vae(tmp_path, vae), f"{out}/a.safetensors")
    assert "a.safetensors: the autoencoder, scale_factor 1; not in the file: tanh_out=True of" in description
    state = load_file(f"{out}/a.safetensors")
    assert "decoder.up.1.attn.0.q.weight" in state and "scale_factor" not in state
    assert state["quant_conv.weight"].shape == (6, 6, 1, 1)
    unet = make_unet(PLAIN, **WIDE, concat_channels=3)
    denoiser = Denoiser(unet, rescaler=Rescaler(5, 2))
    file = save_ldm(tmp_path, make_vae(**WIDE_VAE), denoiser, task="semantic", map_classes=5)
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
