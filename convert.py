"""Weights of other projects: theirs in, ours out, as (settings, state dict). Nothing here builds a model.

    settings, state = load_vae("vae-ft-mse-840000-ema-pruned.ckpt")     # VAE.from_pretrained builds it
    settings, state = load_unet("stable-diffusion-v1-5")                # UNet.from_pretrained
    settings, state, merges = load_clip("clip-vit-large-patch14")       # CLIPTextEncoder.from_pretrained
    parts = load_pipeline("sd-v1-4-full-ema.ckpt")                      # sample.load_pipeline

    python convert.py --ckpt=out/ldm --to=diffusers --out=DIR                # a folder for diffusers
    python convert.py --ckpt=out/ldm --to=compvis --out=model.safetensors    # one file with CompVis' names

Reads folders of diffusers and transformers and files of CompVis, Stability AI, OpenCLIP and OpenAI. Settings come from
tensor shapes and configs; what neither of them says must be passed by name.
"""

import functools
import gzip
import importlib.util
import io
import json
import math
import os
import re
import zipfile
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import checkpoint
import diffusion
from checkpoint import UserError, part, read_json, reject

# The defaults of vae.VAE and unet.UNet, for settings that a file of another project does not say.
VAE = dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4, attn_resolutions=(), resolution=256)
VAE |= dict(mid_attention=True, latent_proj=True, bottleneck="kl", codebook_size=8192, embed_dim=0, vq_beta=0.25)
VAE |= dict(vq_legacy=False, activation="silu", downsample="conv", upsample="nearest", linear_attention=False)
VAE |= dict(patch_size=1, pixel_channels=0, norm_groups=32, dropout=0.0, tanh_out=False, image_mode="RGB")
UNET = dict(in_channels=4, out_channels=4, concat_channels=0, channels=320, channel_mult=(1, 2, 4, 4), num_res_blocks=2)
UNET |= dict(attention_ds=(1, 2, 4), num_heads=8, head_dim=0, transformer_depth=1, context_dim=0, context_pool=False)
UNET |= dict(linear_proj=False, self_attention=True, middle_attention=True, linear_attention=False, qk_norm=False)
UNET |= dict(num_classes=0, scale_shift=False, resblock_updown=False, resample="conv", upsample="nearest")
UNET |= dict(unet_patch=1, norm_groups=32, unet_dropout=0.0)

# Published text towers, as text.CLIPTextEncoder's settings
TOWERS = {
    # Stable Diffusion 1: OpenAI's CLIP ViT-L/14
    "clip_l": dict(width=768, layers=12, heads=12, activation="quick_gelu", layer="last", pad="end"),
    # Stable Diffusion 2: OpenCLIP's ViT-H/14
    "openclip_h": dict(width=1024, layers=24, heads=16, activation="gelu", layer="penultimate", pad="zero"),
}

# --- key tables: the names of tensors here and in other layouts ---


class Layer(NamedTuple):
    """One layer. Layers that share a name in a layout are fused into one tensor there."""

    names: tuple  # here, in CompVis' and in diffusers' layout; text towers: here, in transformers' and in open_clip's
    dims: tuple = ()  # dimensions of the weight in each layout, where they differ
    heads: int = 1  # q, k and v that are fused alternate by head
    ends: tuple = (".weight", ".bias")


class Key(NamedTuple):
    """One tensor of another layout."""

    ours: tuple  # its name here, or the names of the parts it is split into
    theirs: str
    heads: int = 1
    dims: tuple = ()  # of ours and of theirs


COLUMNS = {"ours": 0, "compvis": 1, "diffusers": 2, "transformers": 1, "open_clip": 2}

VAE_BLOCK = [Layer((name,) * 3) for name in ("norm1", "conv1", "norm2", "conv2")]
VAE_SKIP = Layer(("skip", "nin_shortcut", "conv_shortcut"))
VAE_ATTENTION = [Layer(("norm", "norm", "group_norm")), Layer(("proj_out", "proj_out", "to_out.0"), (4, 4, 2))]
VAE_ATTENTION += [Layer((x, x, f"to_{x}"), (4, 4, 2)) for x in "qkv"]

UNET_BLOCK = [Layer(("norm1", "in_layers.0", "norm1")), Layer(("conv1", "in_layers.2", "conv1"))]
UNET_BLOCK += [Layer(("emb", "emb_layers.1", "time_emb_proj"))]
UNET_BLOCK += [Layer(("norm2", "out_layers.0", "norm2")), Layer(("conv2", "out_layers.3", "conv2"))]
UNET_SKIP = Layer(("skip", "skip_connection", "conv_shortcut"))
UNET_ATTENTION = [Layer(("norm", "norm", "group_norm")), Layer(("attn.to_out", "proj_out", "to_out.0"), (2, 3, 2))]
UNET_ATTENTION += [Layer((f"attn.to_{x}", "qkv", f"to_{x}"), (2, 3, 2)) for x in "qkv"]
TRANSFORMER = [Layer((f"norm{n}",) * 3) for n in (1, 2, 3)]
TRANSFORMER += [Layer((f"attn{n}.to_{x}",) * 3, ends=(".weight",)) for n in (1, 2) for x in "qkv"]
TRANSFORMER += [Layer((f"attn{n}.to_out", *[f"attn{n}.to_out.0"] * 2)) for n in (1, 2)]
TRANSFORMER += [Layer(("ff.0.proj", *["ff.net.0.proj"] * 2)), Layer(("ff.1", *["ff.net.2"] * 2))]

TEXT_BLOCK = [Layer(("norm1", "layer_norm1", "ln_1")), Layer(("norm2", "layer_norm2", "ln_2"))]
TEXT_BLOCK += [Layer(("attn.to_out", "self_attn.out_proj", "attn.out_proj"))]
TEXT_BLOCK += [Layer(("mlp.0", "mlp.fc1", "mlp.c_fc")), Layer(("mlp.2", "mlp.fc2", "mlp.c_proj"))]
for end in ("weight", "bias"):
    names = [(f"attn.to_{x}.{end}", f"self_attn.{x}_proj.{end}", f"attn.in_proj_{end}") for x in "qkv"]
    TEXT_BLOCK += [Layer(row, ends=("",)) for row in names]


def below(prefixes, layers):
    """Layers with a prefix for each layout."""
    return [layer._replace(names=tuple(map(".".join, zip(prefixes, layer.names)))) for layer in layers]


def key_table(layers, layout):
    """[Key, ...] of layers in a layout: compvis | diffusers, transformers | open_clip, or ours."""
    column, table = COLUMNS[layout], {}
    for layer in layers:
        for end in layer.ends:
            theirs = layer.names[column] + end
            parts = table[theirs].ours if theirs in table else ()
            dims = (layer.dims[0], layer.dims[column]) if layer.dims and end == ".weight" else ()
            table[theirs] = Key((*parts, layer.names[0] + end), theirs, layer.heads, dims)
    return list(table.values())


def with_dims(t, dims):
    """t with so many dimensions: those after the second have size 1."""
    return t.reshape(*t.shape[:2], *[1] * (dims - 2))


def to_ours(state, keys, path="the file"):
    """A state dict with our names, in float32. UserError if tensors are missing or unknown."""
    missing = [key.theirs for key in keys if key.theirs not in state]
    unknown = sorted(set(state) - {key.theirs for key in keys})
    for names, what in ((missing, "missing"), (unknown, "unknown")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            reject(path, f"tensors are {what}: {', '.join(names[:3])}{more}", "damaged, or of another architecture")
    out = {}
    for key in keys:
        t = with_dims(state[key.theirs], key.dims[0]) if key.dims else state[key.theirs]
        rows = len(key.ours) * key.heads
        if len(t) % rows:
            reject(path, f"{key.theirs} has {len(t)} rows, not a multiple of {rows}", "check --num_heads")
        parts = t.unflatten(0, (key.heads, len(key.ours), -1)).unbind(1)
        for name, t in zip(key.ours, parts):
            out[name] = t.flatten(0, 1).detach().to(torch.float32, copy=True).contiguous()
    return out


def to_theirs(state, keys):
    """The inverse of to_ours."""
    unknown = set(state) - {name for key in keys for name in key.ours}
    assert not unknown, f"no names in the other layout for {', '.join(sorted(unknown)[:3])}"
    out = {}
    for key in keys:
        parts = [state[name].unflatten(0, (key.heads, -1)) for name in key.ours]
        t = torch.stack(parts, dim=1).flatten(0, 2)
        out[key.theirs] = with_dims(t, key.dims[1]) if key.dims else t
    return out


def by_level(value, levels):
    """A setting that is one value, or one for each level, as a tuple of one for each level."""
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return value * levels if len(value) == 1 else value


def vae_layers(s):
    """The layers of an autoencoder with settings s."""
    widths = [s["ch"] * mult for mult in s["ch_mult"]]
    last = len(widths) - 1
    sides = [s["resolution"] // s["patch_size"] // 2**i for i in range(len(widths))]
    for half, way, inputs in (("encoder", "down", [s["ch"], *widths]), ("decoder", "up", [*widths[1:], widths[-1]])):
        yield Layer((f"{half}.conv_in",) * 3)
        for i, width in enumerate(widths):
            # diffusers counts the decoder's levels in the order they run, CompVis from full resolution
            ours, theirs = f"{half}.{way}.{i}", f"{half}.{way}_blocks.{i if way == 'down' else last - i}"
            for j in range(s["num_res_blocks"] + (way == "up")):
                names = (f"{ours}.block.{j}",) * 2 + (f"{theirs}.resnets.{j}",)
                skip = [VAE_SKIP] if j == 0 and inputs[i] != width else []
                yield from below(names, VAE_BLOCK + skip)
                if sides[i] in s["attn_resolutions"]:
                    yield from below((f"{ours}.attn.{j}",) * 2 + (f"{theirs}.attentions.{j}",), VAE_ATTENTION)
            if way == "down" and i < last and s["downsample"] == "conv":
                yield Layer((f"{ours}.resample.conv", f"{ours}.downsample.conv", f"{theirs}.downsamplers.0.conv"))
            elif way == "up" and i > 0:
                yield Layer((f"{ours}.resample.conv", f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv"))
        for i in range(2):
            yield from below((f"{half}.mid.block_{i + 1}",) * 2 + (f"{half}.mid_block.resnets.{i}",), VAE_BLOCK)
        if s["mid_attention"]:
            yield from below((f"{half}.mid.attn_1",) * 2 + (f"{half}.mid_block.attentions.0",), VAE_ATTENTION)
        yield Layer((f"{half}.norm_out", f"{half}.norm_out", f"{half}.conv_norm_out"))
        yield Layer((f"{half}.conv_out",) * 3)
    if s["latent_proj"]:
        yield Layer(("quant_conv",) * 3)
        yield Layer(("post_quant_conv",) * 3)
    if s["bottleneck"] == "vq":
        yield Layer(("quantize.embedding",) * 3, ends=(".weight",))


def unet_layers(s):
    """The layers of a U-Net with settings s."""
    levels = len(s["channel_mult"])
    blocks = by_level(s["num_res_blocks"], levels)
    widths = [s["channels"] * mult for mult in s["channel_mult"]]

    def res_block(c_in, c_out, ours, diffusers):
        return below((ours, ours, diffusers), UNET_BLOCK + [UNET_SKIP] * (c_in != c_out))

    def attention(c, *names):
        names = (names[0], *names)
        if not s["transformer_depth"]:
            heads = s["num_heads"] or c // s["head_dim"]
            return below(names, [layer._replace(heads=heads) for layer in UNET_ATTENTION])
        layers = [Layer((name,) * 3) for name in ("norm", "proj_in", "proj_out")]
        for i in range(s["transformer_depth"]):
            layers += below((f"blocks.{i}", *[f"transformer_blocks.{i}"] * 2), TRANSFORMER)
        return below(names, layers)

    def resampler(c, ours, compvis, diffusers):
        if s["resblock_updown"]:
            return res_block(c, c, ours, diffusers)
        conv = Layer((f"{ours}.conv", f"{ours}.{compvis}", f"{diffusers}.conv"))
        return [conv] if s["resample"] == "conv" else []

    for i, n in ((0, 1), (2, 2)):
        yield Layer((f"time_embed.{i}", f"time_embed.{i}", f"time_embedding.linear_{n}"))
    if s["num_classes"]:
        yield Layer(("class_embed", "label_emb", "class_embedding"), ends=(".weight",))
    yield Layer(("input_blocks.0.0", "input_blocks.0.0", "conv_in"))
    k, c, skips = 1, s["channels"], [s["channels"]]
    for level, width in enumerate(widths):
        for j in range(blocks[level]):
            yield from res_block(c, width, f"input_blocks.{k}.0", f"down_blocks.{level}.resnets.{j}")
            if 2**level in s["attention_ds"]:
                yield from attention(width, f"input_blocks.{k}.1", f"down_blocks.{level}.attentions.{j}")
            k, c, skips = k + 1, width, [*skips, width]
        if level < levels - 1:
            yield from resampler(c, f"input_blocks.{k}.0", "op", f"down_blocks.{level}.downsamplers.0")
            k, skips = k + 1, [*skips, c]
    yield from res_block(c, c, "middle_block.0", "mid_block.resnets.0")
    if s["middle_attention"]:
        yield from attention(c, "middle_block.1", "mid_block.attentions.0")
    yield from res_block(c, c, f"middle_block.{1 + s['middle_attention']}", "mid_block.resnets.1")
    k = 0
    for i, (level, width) in enumerate(reversed(list(enumerate(widths)))):
        for j in range(blocks[level] + 1):
            yield from res_block(c + skips.pop(), width, f"output_blocks.{k}.0", f"up_blocks.{i}.resnets.{j}")
            c, attends = width, 2**level in s["attention_ds"]
            if attends:
                yield from attention(c, f"output_blocks.{k}.1", f"up_blocks.{i}.attentions.{j}")
            if level and j == blocks[level]:
                yield from resampler(c, f"output_blocks.{k}.{1 + attends}", "conv", f"up_blocks.{i}.upsamplers.0")
            k += 1
    yield Layer(("norm_out", "out.0", "conv_norm_out"))
    yield Layer(("conv_out", "out.2", "conv_out"))


def text_layers(blocks):
    """The layers of CLIP's text tower; transformers' names are those below `text_model.`."""
    yield Layer(("token_embedding", "embeddings.token_embedding", "token_embedding"), ends=(".weight",))
    position = "position_embedding", "embeddings.position_embedding.weight", "positional_embedding"
    yield Layer(position, ends=("",))
    for i in range(blocks):
        yield from below((f"blocks.{i}", f"encoder.layers.{i}", f"transformer.resblocks.{i}"), TEXT_BLOCK)
    yield Layer(("norm_out", "final_layer_norm", "ln_final"))


# --- settings from shapes ---

# Published U-Nets, by the settings that identify them, and what their files do not say: heads, objective, schedule,
# scale and side of the latents. SOURCE: the configs of CompVis/latent-diffusion, CompVis/stable-diffusion and
# Stability-AI/stablediffusion.
EPS = dict(objective="eps")
SD = dict(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, scale=0.18215, side=64)
SD_1 = SD | dict(num_heads=8, objective="eps")
SD_2 = SD | dict(head_dim=64)  # eps at 512 px, v at 768 px: no file says which
UPSCALER = SD | dict(num_heads=8, objective="v", beta_start=1e-4, beta_end=0.02, scale=0.08333, side=128)
LDM = dict(objective="eps", schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, scale=1.0, side=64)
CHURCHES = LDM | dict(num_heads=8, beta_end=0.0155, side=32, scale=None)
RELEASES = [
    (dict(channels=320, context_dim=768, linear_proj=False), SD_1),  # Stable Diffusion 1, also inpainting
    (dict(channels=320, context_dim=1024, linear_proj=True, concat_channels=5), SD_2 | EPS),  # inpainting
    (dict(channels=320, context_dim=1024, linear_proj=True, concat_channels=1), SD_2 | EPS),  # depth
    (dict(channels=320, context_dim=1024, linear_proj=True), SD_2),
    (dict(channels=256, context_dim=1024, linear_proj=True, num_classes=1000), UPSCALER),
    (dict(channels=320, context_dim=1280), SD_1 | dict(side=32)),  # LDM: text, 1.45 billion parameters
    (dict(channels=192, channel_mult=(1, 2, 3, 5), context_dim=512), LDM | dict(num_heads=1)),  # classes, cin256-v2
    (dict(channels=192, channel_mult=(1, 2, 3, 5), context_dim=640), LDM | dict(head_dim=32)),  # text, 256 px
    (dict(channels=256, channel_mult=(1, 2, 4), context_dim=512), LDM | dict(head_dim=32, side=32)),  # classes, f = 8
    # CelebA-HQ, FFHQ, LSUN bedrooms
    (dict(channels=224, channel_mult=(1, 2, 3, 4), transformer_depth=0), LDM | dict(head_dim=32)),
    (dict(channels=192, channel_mult=(1, 2, 2, 4, 4), resblock_updown=True), CHURCHES),
    (dict(channels=128, transformer_depth=3, context_dim=512), LDM | dict(head_dim=32, beta_end=0.0205)),  # layouts
    # semantic maps, super-resolution, inpainting
    (dict(channels=128, channel_mult=(1, 4, 8), concat_channels=3), LDM | dict(num_heads=8, beta_end=0.0205)),
    (dict(channels=160, channel_mult=(1, 2, 2, 4), concat_channels=3), LDM | dict(head_dim=32, beta_end=0.0155)),
    (dict(channels=256, concat_channels=4, resblock_updown=True), LDM | dict(num_heads=8, beta_end=0.0205)),
]


def release_of(settings):
    """What is known of the published model whose U-Net has these settings; {} if there is none."""
    return next((known for looks, known in RELEASES if looks.items() <= settings.items()), {})


def count(state, name):
    """How many of name.format(0), name.format(1), ... are in the state dict."""
    n = 0
    while name.format(n) in state:
        n += 1
    return n


def require(state, names, what, path):
    for name in names:
        if name not in state:
            common = os.path.commonprefix(list(state)).rpartition(".")[0]
            also = f" (all names begin with {common}.)" if common else ""
            reject(path, f"no tensor {name}{also}", f"give a file that holds {what}, under the names of its own layout")


def multiples(widths, base, path):
    if not widths or any(width % base for width in widths):
        reject(path, f"levels of {widths} channels, the first layer has {base}", "this architecture is not supported")
    return tuple(width // base for width in widths)


def image_mode(channels, path):
    """The mode of images of so many channels."""
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        reject(path, f"images of {channels} channels", "only 1, 3 and 4 (L, RGB and RGBA) are supported")
    return modes[channels]


def infer_vae(state, path="the file"):
    """(settings, layout) of an autoencoder, from names and shapes, which do not show norm_groups."""
    layout, level, block, attention, middle = "compvis", "down", "block", "attn.0.norm", "mid.attn_1.norm"
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in state:
        layout, level, block = "diffusers", "down_blocks", "resnets"
        attention, middle = "attentions.0.group_norm", "mid_block.attentions.0.group_norm"
    block = f"encoder.{level}.{{}}.{block}.{{}}.conv1.weight"
    first = "encoder.conv_in.weight", "decoder.conv_in.weight", block.format(0, 0)
    require(state, first, "an autoencoder", path)
    levels = range(count(state, block.format("{}", 0)))
    widths = [len(state[block.format(i, 0)]) for i in levels]
    ch, z_channels = len(state[first[0]]), state[first[1]].shape[1]
    s = dict(ch=ch, ch_mult=multiples(widths, ch, path), z_channels=z_channels, resolution=256)
    s["num_res_blocks"] = count(state, block.format(0, "{}"))
    s["attn_resolutions"] = tuple(256 // 2**i for i in levels if f"encoder.{level}.{i}.{attention}.weight" in state)
    s["mid_attention"] = f"encoder.{middle}.weight" in state
    s["image_mode"] = image_mode(state[first[0]].shape[1], path)
    s["latent_proj"] = "post_quant_conv.weight" in state
    embed_dim = state["post_quant_conv.weight"].shape[1] if s["latent_proj"] else z_channels
    s["embed_dim"] = 0 if embed_dim == z_channels else embed_dim
    if "quantize.embedding.weight" in state:
        s |= dict(bottleneck="vq", codebook_size=len(state["quantize.embedding.weight"]))
    return s, layout


class Level(NamedTuple):
    width: int
    blocks: int  # on the way down
    attention: str | None  # the name of one
    resampler: str


def compvis_levels(state):
    """[Level, ...] of a U-Net with CompVis' names, from the way up, where a level ends with what changes the size."""
    levels, blocks = [], 0
    total = count(state, "output_blocks.{}.0.in_layers.0.weight")
    for n in range(total):
        blocks += 1
        attention = f"output_blocks.{n}.1" if f"output_blocks.{n}.1.norm.weight" in state else None
        last = f"output_blocks.{n}.{2 if attention else 1}"
        if f"{last}.conv.weight" in state or f"{last}.in_layers.0.weight" in state or n == total - 1:
            width = len(state[f"output_blocks.{n}.0.in_layers.2.weight"])
            levels.insert(0, Level(width, blocks - 1, attention, f"{last}.in_layers.0.weight"))
            blocks = 0
    return levels


def diffusers_levels(state):
    levels = []
    for i in range(count(state, "down_blocks.{}.resnets.0.conv1.weight")):
        blocks, attention = count(state, f"down_blocks.{i}.resnets.{{}}.conv1.weight"), f"down_blocks.{i}.attentions.0"
        width = len(state[f"down_blocks.{i}.resnets.0.conv1.weight"])
        attention = attention if has_norm(state, attention) else None
        levels.append(Level(width, blocks, attention, f"down_blocks.{i}.downsamplers.0.norm1.weight"))
    return levels


def has_norm(state, name):
    return f"{name}.norm.weight" in state or f"{name}.group_norm.weight" in state


def infer_unet(state, path="the file"):
    """(settings, layout) of a U-Net, from names and shapes, which do not show norm_groups and the number of heads."""
    if "input_blocks.0.0.weight" in state:
        layout, levels = "compvis", compvis_levels(state)
        conv_in, conv_out, middle = "input_blocks.0.0.weight", "out.2.weight", "middle_block.1"
        emb, classes = "middle_block.0.emb_layers.1.weight", "label_emb.weight"
    else:
        layout, levels = "diffusers", diffusers_levels(state)
        conv_in, conv_out, middle = "conv_in.weight", "conv_out.weight", "mid_block.attentions.0"
        emb, classes = "mid_block.resnets.0.time_emb_proj.weight", "class_embedding.weight"
    require(state, (conv_in, conv_out, emb), "a U-Net", path)
    (channels, inputs), outputs = state[conv_in].shape[:2], len(state[conv_out])
    if inputs < outputs:
        reject(path, f"{inputs} input channels, {outputs} output channels", "this architecture is not supported")
    widths, blocks = [level.width for level in levels], tuple(level.blocks for level in levels)
    s = dict(in_channels=outputs, out_channels=outputs, concat_channels=inputs - outputs, channels=channels)
    s |= dict(channel_mult=multiples(widths, channels, path))
    s |= dict(num_res_blocks=blocks[0] if len(set(blocks)) == 1 else blocks)
    s |= dict(attention_ds=tuple(2**i for i, level in enumerate(levels) if level.attention))
    s |= dict(middle_attention=has_norm(state, middle), scale_shift=len(state[emb]) == 2 * widths[-1])
    s |= dict(resblock_updown=any(level.resampler in state for level in levels))
    s |= dict(num_classes=len(state[classes]) if classes in state else 0)
    attentions = {level.attention: level.width for level in levels if level.attention}
    attentions |= {middle: widths[-1]} if s["middle_attention"] else {}
    return s | infer_attention(state, levels, attentions), layout


def infer_attention(state, levels, attentions):
    """The settings of a U-Net's attentions {name: width}, plain blocks or transformers, whose keys' widths show what
    each of their two attentions looks at."""
    s = dict(transformer_depth=0, context_dim=0, linear_proj=False)
    if not attentions:
        return s | dict(num_heads=1, head_dim=0)
    first = next(iter(attentions))
    if f"{first}.proj_in.weight" not in state:
        return s
    s["transformer_depth"] = count(state, f"{first}.transformer_blocks.{{}}.norm1.weight")
    s["linear_proj"] = state[f"{first}.proj_in.weight"].ndim == 2
    keys = [{at: state[f"{at}.transformer_blocks.0.attn{n}.to_k.weight"].shape[1] for at in attentions} for n in (1, 2)]
    no_context = keys[1] == attentions and len(set(attentions.values())) > 1
    s["context_dim"] = 0 if no_context else keys[1][first]
    own = tuple(keys[0].get(level.attention) == attentions.get(level.attention) for level in levels)
    s["self_attention"] = True if all(own) else own
    return s


# --- files ---

PREFIXES = {"vae": "first_stage_model.", "unet": "model.diffusion_model.", "text": "cond_stage_model."}  # CompVis'
FOLDERS = {"vae": ("vae", "vqvae"), "unet": ("unet",), "text": ("text_encoder", "bert")}  # diffusers'
OURS = "_latent_diffusion"  # in unet/config.json of our exports: what diffusers' files have no place for
NAMES = {"vae": "autoencoder", "unet": "U-Net", "text": "text encoder"}
# Objects in Lightning's files beside the tensors; they become Inert
INERT = r"(pytorch_lightning|lightning|lightning_fabric)\..*|_codecs\.encode"
INERT += r"|numpy\.dtype|numpy\._?core\.multiarray\.scalar"


class Inert:
    """Stands for an object that a pickle names: it is built without running any code."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_tensors(path):
    """All tensors of a .safetensors file, or of a pickle without running its code."""
    if not os.path.exists(path):
        reject(path, "no such file", "give a file of tensors: .safetensors, .ckpt, .pth")
    checkpoint.check_fetched(path)
    if path.endswith(".safetensors"):
        what = "not a .safetensors file, or truncated"
        with checkpoint.reading(path, what, "fetch it again"), safe_open(path, framework="pt") as file:
            return without_prefixes({name: file.get_tensor(name) for name in file.keys()})
    try:
        zipped = zipfile.is_zipfile(path)  # pickles from before torch 1.6 are not; they may name tensors only
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        code = [name for name in named if not re.fullmatch(INERT, name)]
        if not code:
            with torch.serialization.safe_globals([(Inert, name) for name in named]):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a file of another format can raise anything
        code = re.findall(r"GLOBAL (\S+)", str(error))
        if not code:
            reason = "a TorchScript archive" if "TorchScript" in str(error) else "no dict of tensors, or truncated"
            reject(path, f"not a checkpoint ({reason})", "save a state dict with torch.save or safetensors")
    if code:
        reject(path, f"holds {', '.join(code[:3])}, code that would be run", "use a .safetensors file")
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}
    if not state or any(t.nbytes > t.untyped_storage().nbytes() + 2**20 for t in state.values()):  # expanded: a bomb
        reject(path, "no tensors by name", "save a state dict")
    return without_prefixes(state)


def without_prefixes(state):
    """A state dict without what DistributedDataParallel, torch.compile or a model of parts puts before all names."""
    for prefix in ("module.", "_orig_mod.", "vae."):
        if state and all(name.startswith(prefix) for name in state):
            return without_prefixes({name.removeprefix(prefix): t for name, t in state.items()})
    return state


def read_folder(folder):
    """(tensors, config) of a model's folder from diffusers or transformers, in one file or in shards."""
    config = read_json(f"{folder}/config.json")
    stems, endings = ("diffusion_pytorch_model", "model", "pytorch_model"), (".safetensors", ".bin")
    names = [stem + end + index for end in endings for index in ("", ".index.json") for stem in stems]
    names += [stem + half for end in endings for half in (f".fp16{end}", f"{end}.index.fp16.json") for stem in stems]
    name = next((name for name in names if os.path.exists(f"{folder}/{name}")), None)
    if name is None:
        reject(folder, f"no weights ({names[0]} or similar)", "fetch it again")
    if not name.endswith(".json"):
        return read_tensors(f"{folder}/{name}"), config
    state, shards = {}, read_json(f"{folder}/{name}").get("weight_map", {})
    for shard in sorted(set(shards.values())):
        state |= read_tensors(os.path.join(folder, os.path.basename(shard)))
    if lost := sorted(set(shards) - set(state)):
        reject(folder, f"{name} lists {lost[0]}, which is in none of its shards", "fetch it again")
    return state, config


def read_part(path, part, file=None):
    """(tensors, config or {}, all tensors of the file) of the vae, unet or text in a file or folder, in its own names.

    file: all tensors of the file, if they have been read.
    """
    if os.path.isdir(path):
        folder = path
        if os.path.exists(f"{path}/model_index.json") or not os.path.exists(f"{path}/config.json"):
            folder = next((f"{path}/{name}" for name in FOLDERS[part] if os.path.isdir(f"{path}/{name}")), None)
            if folder is None:
                reject(path, f"no {NAMES[part]} ({' or '.join(FOLDERS[part])}) in it", "fetch all of it")
        file, config = read_folder(folder)
        state = file
    else:
        file = file or read_tensors(path)
        state, config = without_prefixes(select_part(file, part, path)), {}
        beside = os.path.join(os.path.dirname(path), "config.json")
        theirs = "down_blocks.0.resnets.0.conv1", "text_model.", "embeddings.token_embedding"
        if os.path.exists(beside) and any(theirs[0] in name or name.startswith(theirs[1:]) for name in state):
            config = read_json(beside)
    if any(re.search(r"lora_|\.lora\.|hada_", name) for name in file):
        reject(path, "a LoRA, an addition to a model's weights", "merge it into them first, see examples/lora.py")
    xl = next((name for name in ("label_emb.0.0.weight", "add_embedding.linear_1.weight") if name in state), None)
    if xl and part == "unet":
        reject(path, f"SDXL's U-Net (it has {xl}), which is not supported", "its autoencoder is supported")
    # before version 0.14 diffusers had other names for an attention's layers
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    old = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
    state = {old.sub(lambda match: f"{match[1]}.{new[match[2]]}.{match[3]}", name): t for name, t in state.items()}
    return state, config, file


def select_part(file, part, path):
    """The tensors of vae, unet or text in a CompVis file, without their prefix; the EMA's if there are any."""
    if any(name.startswith(tuple(PREFIXES.values())) for name in file):
        prefix, dotless = PREFIXES[part], {"unet": "diffusion_model."}.get(part)
        state = {name.removeprefix(prefix): t for name, t in file.items() if name.startswith(prefix)}
        if not state:
            reject(path, f"no {NAMES[part]}: no tensor below {prefix}", "give a file that holds one")
    else:
        state, dotless = file, ""  # one model alone
    if dotless is not None:  # LitEma takes the dots out of the names
        names = {"model_ema." + (dotless + name).replace(".", ""): name for name in state}
        state = state | {names[name]: file[name] for name in names.keys() & file.keys()}
    return {name: t for name, t in state.items() if not name.startswith(("model_ema.", "loss."))}


def check_config(config, path, **supported):
    """UserError where a config has another value than the only one that is supported."""
    for name, value in supported.items():
        if name in config and config[name] != value:
            reject(path, f"{name}={config[name]!r}", f"only {value!r} is supported")


def combine(path, defaults, inferred, known):
    """All settings: `known` ones may complete what the file says, but not contradict it."""
    for name, value in known.items():
        if name not in defaults:
            reject(path, f"{name} is not a setting of its model", f"choose from {', '.join(defaults)}")
        if inferred.get(name, value) != value:
            reject(path, f"{name}={inferred[name]} by its tensors and config, not {value}", f"leave {name} out")
    return defaults | inferred | known


def one_line_errors(read):
    """Decorator for functions of a path: tensors and configs of unexpected form raise UserError, see checkpoint."""

    @functools.wraps(read)
    def read_or_reject(path, *args, **options):
        with checkpoint.reading(path):
            return read(path, *args, **options)

    return read_or_reject


# --- one model ---


@one_line_errors
def load_vae(path, scaling_factor=None, file=None, **known):
    """(settings, state dict) of the autoencoder in a file or folder.

    scaling_factor: of its latents; known: other settings of vae.VAE, if the file does not say them.  file: its tensors,
    if they have been read.
    """
    path = checkpoint.find(path)
    state, config, file = read_part(path, "vae", file)
    check_config(config, path, act_fn="silu", norm_type="group", lookup_from_codebook=False)
    inferred, layout = infer_vae(state, path)
    if "norm_num_groups" in config:
        inferred["norm_groups"] = config["norm_num_groups"]
    if resolution := known.get("resolution"):
        inferred["attn_resolutions"] = tuple(side * resolution // 256 for side in inferred["attn_resolutions"])
        inferred["resolution"] = resolution
    s = combine(path, VAE, inferred, checkpoint.tuples(known))
    state = to_ours(state, key_table(vae_layers(s), layout), path)
    scale = config.get("scaling_factor", scaling_factor)
    if scaling_factor is not None and scale != scaling_factor:
        reject(path, f"scaling_factor={scale} by its config, not {scaling_factor}", "leave scaling_factor out")
    scale = latent_scale(path, file, s) if scale is None else scale
    mean, std = config.get("shift_factor") or 0.0, 1.0
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])
    for name, value in (("latent_mean", mean), ("latent_std", std / scale)):
        state[name] = torch.as_tensor(value).expand(latent_channels(s)).clone()
    return s, state


def latent_channels(s):
    """Channels of the latents of an autoencoder with settings s."""
    return s["embed_dim"] or s["z_channels"]


def latent_scale(path, file, s):
    """What the latents of an autoencoder with settings s are multiplied by in its file's U-Net; NaN if unknown."""
    if "scale_factor" in file:  # CompVis' scale_by_std
        return float(file["scale_factor"])
    if any(name.startswith("conditioner.embedders.") for name in file):
        return 0.13025  # SDXL
    if any(name.startswith(PREFIXES["unet"]) for name in file):
        try:
            release = release_of(infer_unet(select_part(file, "unet", path))[0])
        except UserError:  # an unsupported U-Net; its autoencoder is supported
            release = {}
        if release.get("scale"):
            return release["scale"]
    if s["bottleneck"] == "vq":
        return 1.0  # LDM does not scale them
    return 0.18215 if s["z_channels"] == 4 and len(s["ch_mult"]) == 4 else math.nan  # Stable Diffusion


@one_line_errors
def load_unet(path, file=None, **known):
    """(settings, state dict) of the U-Net in a file or folder, its EMA's weights if there are any.

    known: settings of unet.UNet that the file does not say, such as num_heads.  file: its tensors, if they have been
    read.
    """
    path = checkpoint.find(path)
    state, config, _ = read_part(path, "unet", file)
    inferred, layout = infer_unet(state, path)
    if config:
        inferred |= read_unet_config(config, path, inferred)
    if known.get("num_heads") or known.get("head_dim"):
        known = dict(num_heads=0, head_dim=0) | known
    elif "num_heads" not in inferred:
        release = release_of(inferred)
        if not release:
            reject(path, "does not say its number of heads", "set --num_heads=N or --head_dim=N")
        inferred |= dict(num_heads=release.get("num_heads", 0), head_dim=release.get("head_dim", 0))
    s = combine(path, UNET, inferred, checkpoint.tuples(known))
    return s, to_ours(state, key_table(unet_layers(s), layout), path)


def read_unet_config(config, path, inferred):
    """The settings that only diffusers' config.json says."""
    only = dict(act_fn="silu", norm_eps=1e-5, mid_block_scale_factor=1, flip_sin_to_cos=True, freq_shift=0)
    only |= dict(downsample_padding=1, center_input_sample=False, dual_cross_attention=False, class_embed_type=None)
    only |= dict(addition_embed_type=None, encoder_hid_dim=None, time_embedding_type="positional", conv_in_kernel=3)
    only |= dict(conv_out_kernel=3, class_embeddings_concat=False, resnet_skip_time_act=False, time_cond_proj_dim=None)
    only |= dict(resnet_out_scale_factor=1.0, cross_attention_norm=None, attention_type="default")
    only |= dict(time_embedding_act_fn=None, timestep_post_act=None, mid_block_only_cross_attention=None)
    if not inferred["resblock_updown"]:
        only |= dict(downsample_type="conv", upsample_type="conv")
    check_config(config, path, **only)
    out = {"norm_groups": config.get("norm_num_groups") or 32}
    # a trap: what UNet2DConditionModel calls attention_head_dim is the number of heads; in UNet2DModel it is the width
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    widths = [inferred["channels"] * mult for mult in inferred["channel_mult"]]
    if config.get("_class_name") == "UNet2DModel":
        out |= dict(num_heads=1, head_dim=0) if heads is None else dict(num_heads=0, head_dim=heads)
    elif len(set(by_level(heads, 1))) == 1:
        out |= dict(num_heads=by_level(heads, 1)[0], head_dim=0)
    else:  # levels without attention have a number too, without meaning
        used = [i for i in range(len(widths)) if 2**i in inferred["attention_ds"]]
        used += [len(widths) - 1] if inferred["middle_attention"] else []
        dims = {widths[i] / heads[i] for i in used}
        if len(dims) > 1:
            reject(path, f"attention_head_dim={heads}", "only equal numbers or equal widths of heads are supported")
        out |= dict(num_heads=0, head_dim=int(dims.pop())) if dims else {}
    only_cross = config.get("only_cross_attention", False)
    if only_cross is True:
        reject(path, "only_cross_attention=True", "only one value for each level is supported")
    if only_cross and any(only_cross):
        out["self_attention"] = tuple(not value for value in only_cross)
    return out


@one_line_errors
def load_clip(path, name="", merges=None, file=None):
    """(settings, state dict, merges) of CLIP's text tower in a file or folder, ours or another project's.

    name: clip_l or openclip_h if it must be that one.  merges: what read_merges takes, if not beside the weights.
    """
    path = checkpoint.find(path)
    state, config, _ = read_part(path, "text", file)
    config = config.get("text_config", config)
    if set(state) == {"embedding.weight"}:
        reject(path, "conditioned on classes, not on text", "give a file that holds a text encoder")
    if any("attn_layers." in key for key in state) or config.get("model_type") in ("ldmbert", "bert"):
        reject(path, "LDM's BERT", "only CLIP's text towers are supported")
    for layout in ("transformers", "ours", "open_clip"):
        table, position, norm = (key.theirs for key in key_table(text_layers(1), layout)[:3])
        prefix = next((key.removesuffix(table) for key in state if key.endswith(table)), "")
        if {prefix + table, prefix + position, prefix + norm} <= state.keys():
            break
    else:
        reject(path, "no text tower of CLIP's", "give a file or folder that holds one")
    state = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    blocks, length, (vocab, width) = count(state, norm.replace("0", "{}", 1)), len(state[position]), state[table].shape
    s = dict(width=width, layers=blocks, heads=max(1, width // 64), length=length, vocab=vocab)
    s = clip_settings(path, s, config, layout, name)
    found = name_of_tower(s)
    if name not in ("", "other", found):
        what = f"holds {found} of {blocks} blocks of width {s['width']}, not {name}"
        reject(path, what, f"set --tower_weights to weights of {name}")
    if merges is None:
        merges = find_merges(path)
        if merges is None and os.path.isdir(f"{path}/tokenizer"):
            reject(f"{path}/tokenizer", "neither merges.txt nor tokenizer.json in it", AGAIN)
    if merges is not None:
        lines, _, where = read_merges(merges)
        if len(lines) != vocab - 514:  # bytes, bytes that end a word, start and end
            reject(where, f"{len(lines)} merges, its text encoder needs {vocab - 514}", AGAIN)
    used = used_blocks(s)
    numbers = "|".join(map(str, range(used, blocks))) or "none"
    unused = r"visual\..*|logit_scale|text_projection(\.weight)?|attn_mask|.*position_ids|"
    unused = re.compile(unused + rf"(encoder\.layers|transformer\.resblocks|blocks)\.({numbers})\..*")
    state = {key: t for key, t in state.items() if not unused.fullmatch(key)}
    return s, to_ours(state, key_table(text_layers(used), layout), path), merges


def clip_settings(path, s, config, layout, name):
    """The settings s that shapes show, completed by config, layout, name and the published towers."""
    width, blocks = s["width"], s["layers"]
    if layout == "open_clip" and not name and width == 768:  # OpenAI's has QuickGELU, LAION's GELU
        reject(path, "OpenAI's ViT-L/14, or another's of that shape", "set --text_encoder=clip_l, or name=other")
    gelu = any(known["width"] == width and known["activation"] == "gelu" for known in TOWERS.values())
    openai = name == "clip_l" or (layout == "transformers" and not gelu) or (layout == "ours" and width == 768)
    penultimate = layout == "open_clip" and not openai and blocks > 1  # as in Stable Diffusion 2
    s |= dict(layer="penultimate" if penultimate else "last")
    s |= dict(activation="quick_gelu", pad="end") if openai else dict(activation="gelu", pad="zero")
    if config:
        check_config(config, path, layer_norm_eps=1e-5, intermediate_size=4 * width)
        activation = config.get("hidden_act", "quick_gelu")
        s |= dict(heads=config.get("num_attention_heads", s["heads"]), activation=activation)
        s |= dict(pad="zero" if activation == "gelu" else "end")
    pad = None
    for folder in tokenizer_folders(path)[::-1]:  # the first one counts
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if os.path.exists(f"{folder}/{file}"):
                pad = read_json(f"{folder}/{file}").get("pad_token", pad)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    s["pad"] = "zero" if pad in ("!", "<|pad|>") else "end" if pad else s["pad"]
    for known in TOWERS.values():  # a file may or may not hold the block that is not used
        same = all(s[key] == known[key] for key in ("width", "heads", "activation", "pad"))
        s |= known if same and blocks in (used_blocks(known), known["layers"]) else {}
    return s


def used_blocks(settings):
    """Blocks of a text tower whose output is used; only these are loaded."""
    return settings["layers"] - (settings["layer"] == "penultimate")


def name_of_tower(settings):
    """The published text tower with these settings, or "other"."""
    return next((name for name, known in TOWERS.items() if known.items() <= settings.items()), "other")


def tokenizer_folders(path):
    return [os.path.join(path, name) for name in ("tokenizer", ".", "../tokenizer")] if os.path.isdir(path) else []


def find_merges(path):
    """The argument of read_merges for a model's folder: where merges.txt is, or those in tokenizer.json; else None."""
    for folder in tokenizer_folders(path):
        if os.path.exists(f"{folder}/merges.txt"):
            return folder
        if os.path.exists(f"{folder}/tokenizer.json"):
            merges = read_json(f"{folder}/tokenizer.json")["model"]["merges"]
            lines = [line if isinstance(line, str) else " ".join(line) for line in merges]
            return "\n".join(["#version: 0.2", *lines, ""]).encode()


def byte_letters():
    """{character: byte} of GPT-2's and CLIP's vocabularies, in their order: what is printable is written as itself, the
    other 68 bytes as the characters from 256 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


CLIP_VOCAB = "set --clip_vocab=FILE: bpe_simple_vocab_16e6.txt.gz or a folder with merges.txt"
AGAIN = f"fetch it again, or {CLIP_VOCAB}"


def read_merges(source):
    """(lines of CLIP's merges, the content of the vocab.json beside them or None, their file).

    source: path of bpe_simple_vocab_16e6.txt.gz, of a merges.txt or of a folder that holds one; or the content as
    bytes; None: the file in the package open_clip, if that is installed.
    """
    vocab, content, where = None, source, "CLIP's merges"
    if source is None:
        found = importlib.util.find_spec("open_clip")  # does not import it
        source = os.path.join(os.path.dirname(found.origin or "") if found else "", "bpe_simple_vocab_16e6.txt.gz")
        if not os.path.exists(source):
            reject(where, "no file", f"pip install open_clip_torch, or {CLIP_VOCAB}")
    if not isinstance(source, bytes):
        where = os.path.join(source, "merges.txt") if os.path.isdir(source) else source
        if os.path.exists(f"{source}/vocab.json"):
            vocab = read_json(f"{source}/vocab.json")
        if not os.path.exists(where):
            reject(where, "no such file of CLIP's merges", CLIP_VOCAB)
        checkpoint.check_fetched(where)
        with open(where, "rb") as file:
            content = file.read()
    with checkpoint.reading(where, "cannot be read", AGAIN):
        if content[:2] == b"\x1f\x8b":
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(2**26)
        if len(content) >= 2**26:  # the real one has 3 MB
            reject(where, "more than 64 MB", AGAIN)
        lines = content.decode().split("\n")
    lines = lines[1:] if "#version" in lines[0] else lines
    return [line for line in lines[: 49152 - 256 - 2] if line.strip()], vocab, where  # CLIP uses only these


# --- pipelines ---

PROMPT = "a photograph of an astronaut riding a horse"  # sampled by default


@one_line_errors
def load_pipeline(path, clip_vocab="", objective="", otherwise="", **known):
    """The parts of a latent diffusion model: a pipeline folder of diffusers, or a file of CompVis or Stability AI.

    Returns {"unet": (settings, state), "vae": (settings, state) or None, "text": what load_clip returns or None,
    "class_tokens": tensor (N,D) or None, "meta": as in our checkpoints}.

    clip_vocab: merges of the tokenizer, if not in the folder.  objective: eps | v, which a file does not say.
    otherwise: the objective if the model is not a published one either.  known: see load_unet.
    """
    path = checkpoint.find(path)
    folder, index, own, file = os.path.isdir(path), {}, {}, None
    if folder:
        index, own = read_index(path, clip_vocab)
        found = {name for name in FOLDERS for folder_name in FOLDERS[name] if os.path.isdir(f"{path}/{folder_name}")}
    else:
        file = read_tensors(path)
        found = {name for name, prefix in PREFIXES.items() if any(tensor.startswith(prefix) for tensor in file)}
    unet = s, state = load_unet(path, file=file, **known)
    release = release_of(s)
    if folder:
        process = read_scheduler(path, objective, index, "vae" not in found)
    else:
        process = read_betas(path, file, release, objective, otherwise)
    diffusion.make_schedule(process["schedule"], process["beta_start"], process["beta_end"])  # checks them
    if process["schedule"] == "cosine":  # a table in other layouts, whose U-Net counts from 0
        state["time_embed.0.weight"] = fold_time(state["time_embed.0.weight"], -1)
    vae = load_vae(path, file=file) if "vae" in found else None
    if vae and not all(vae[1][name].isfinite().all() for name in ("latent_mean", "latent_std")):
        reject(path, "the scale of its latents is unknown", "this pipeline is not supported")
    if vae and latent_channels(vae[0]) != s["in_channels"]:
        channels = f"{s['in_channels']} channels in its U-Net, {latent_channels(vae[0])} in its autoencoder"
        reject(path, f"latents of {channels}", "use parts that belong together")
    text, class_tokens, condition = read_condition(path, file or {}, s, "text" in found, clip_vocab, own)
    factor = 2 ** (len(vae[0]["ch_mult"]) - 1) if vae else 1
    model = {"unet": s, "text": None, "first_stage": "vae" if vae else "none", "tower_hash": None}
    model |= {"uncertainty": False, "ema_stds": (), "map_classes": 0, **condition, **process}
    if vae is None and s["in_channels"] == 4 and not own:
        reject(path, "4 channels, which are latents, and no autoencoder", "add its vae folder")
    model["image_mode"] = vae[0]["image_mode"] if vae else image_mode(s["in_channels"], path)
    model |= read_task(path, index, s, model, factor if vae else 0)
    sides = (release.get("side", 64),)
    if folder:
        sides = by_level(read_json(f"{path}/unet/config.json").get("sample_size") or sides, 1)
    elif s["context_dim"] == 1024 and not s["concat_channels"] and process["objective"] == "v":
        sides = (96,)
    model |= {"image_size": [int(side) * factor for side in sides]}
    some = list(range(0, model["num_classes"], -(-model["num_classes"] // 8) or 1))
    examples = {"text": [PROMPT], "class": some}.get(model["cond"], [None] * 4)
    meta = {"stage": "ldm", "model": model, "vae": vae and vae[0], "examples": examples}
    meta["classes"] = own.get("classes", [])
    return {"unet": unet, "vae": vae, "text": text, "class_tokens": class_tokens, "meta": meta}


def read_index(path, clip_vocab):
    """(model_index.json, {}) of a pipeline's folder that has all that it names, or ({}, what `to_diffusers` noted)."""
    if not os.path.exists(f"{path}/model_index.json"):
        own = read_json(f"{path}/unet/config.json").get(OURS) if os.path.exists(f"{path}/unet/config.json") else None
        if own is None:
            reject(path, "no model_index.json in it", "fetch all of it, or give the folder of a pipeline")
        return {}, own
    index = read_json(f"{path}/model_index.json")
    named = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    others = "text_encoder_2 prior image_normalizer depth_estimator transformer controlnet bert".split()
    if other := next((name for name in others if name in named), None):
        reject(path, f"a {index.get('_class_name')} with a {other}", "this pipeline is not supported")
    unused = ["safety_checker", "feature_extractor", "image_encoder", "watermarker"] + ["tokenizer"] * bool(clip_vocab)
    for name in named:
        if name not in unused and not os.path.isdir(f"{path}/{name}"):
            remedy = "fetch all of it, or set --clip_vocab=FILE" if name == "tokenizer" else "fetch all of it"
            reject(f"{path}/{name}", "missing, but model_index.json names it", remedy)
    return index, {}


# diffusers' name -> ours
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "squared_cosine"}
SCHEDULES |= {"sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def read_scheduler(path, objective, index, pixels):
    """Objective, noise schedule and steps of the scheduler in a pipeline's folder, as settings of train_ldm.py.

    index: model_index.json.  pixels: whether there is no autoencoder.
    """
    file = f"{path}/scheduler/scheduler_config.json"
    config = read_json(file)
    name, predicts = config.get("_class_name", ""), config.get("prediction_type", "epsilon")
    process = dict(schedule=SCHEDULES.get(config.get("beta_schedule", "linear")))
    process |= dict(beta_start=config.get("beta_start", 1e-4), beta_end=config.get("beta_end", 0.02))
    if config.get("trained_betas") is not None:
        process = schedule_of(torch.tensor(config["trained_betas"], dtype=torch.float64))
    if process is None or process["schedule"] is None:
        reject(file, f"the noise schedule of its {name}", "it is not supported")
    check_config(config, file, num_train_timesteps=1000, use_flow_sigmas=False, thresholding=False)
    found = PREDICTIONS.get(predicts)
    if found is None or name.startswith(("FlowMatch", "EDM", "KarrasVe", "ScoreSde")):  # which have no betas
        reject(file, f"scheduler {name} with prediction_type={predicts}", "it is not supported")
    if objective not in ("", found):
        reject(path, f"its scheduler's objective is {found}, not {objective}", "leave --objective out")
    # what a file does not say is as in diffusers, whose Stable Diffusion pipelines have defaults of their own
    stable = index.get("_class_name", "").startswith("StableDiffusion")
    clip = config.get("clip_sample", name in ("DDIMScheduler", "DDPMScheduler") and not stable)
    if clip and not (pixels and name == "DDPMScheduler"):  # DDIM there clips x0 alone, and not eps
        reject(file, f"clip_sample=True of a {name}, which is not supported", "set it to false there")
    process |= dict(clip_x0=config.get("clip_sample_range", 1.0) if clip else 0.0)
    process |= dict(steps_offset=config.get("steps_offset", int(stable)))
    process |= dict(set_alpha_to_one=config.get("set_alpha_to_one", name != "PNDMScheduler"))
    return process | dict(objective=found, zero_snr=bool(config.get("rescale_betas_zero_snr", False)))


def read_betas(path, file, release, objective, otherwise):
    """The same of a CompVis file: from its betas, else as in the published model."""
    process = {name: release.get(name) for name in ("schedule", "beta_start", "beta_end")}
    process["objective"] = objective or release.get("objective") or otherwise
    if "betas" in file:
        table = schedule_of(file["betas"].double())
        if table is None:
            reject(path, "its betas are of no known schedule", "it is not supported")
        process |= table
    if not process["objective"]:
        reject(path, "does not say what it predicts", "set --objective=v (SD 2 at 768 px) or eps (at 512 px)")
    if process["schedule"] is None:
        reject(path, "no published model and no betas: its noise schedule is unknown", "add its betas")
    return process | dict(zero_snr=False)


def read_condition(path, file, unet, has_text, clip_vocab, own):
    """(text as load_clip or None, class tokens or None, the settings that say what the model is conditioned on).

    own: what `to_diffusers` noted in a folder of ours, else {}.
    """
    text, table = None, file.get(f"{PREFIXES['text']}embedding.weight")
    s = dict(cond="none", class_embed="add", num_classes=0, text_encoder="joint")
    if f"{PREFIXES['text']}channel_mapper.weight" in file:
        reject(path, "LDM's semantic maps", "they are not supported")
    if table is not None:  # LDM's classes as tokens, the last of which is the empty one
        if table.ndim != 2 or len(table) % 10 != 1:
            reject(path, f"{len(table)} class tokens, the last of which is a class", "no guidance: not supported")
        s |= dict(cond="class", class_embed="token", num_classes=len(table) - 1)
        table = table.float().clone()
    elif unet["context_dim"]:
        if not has_text:
            reject(path, "no text encoder, which its U-Net needs", "fetch all of it")
        text = load_clip(path, merges=clip_vocab or None, file=file or None)
        if text[0]["width"] != unet["context_dim"]:
            widths = f"{unet['context_dim']} in its U-Net, {text[0]['width']} in its text encoder"
            reject(path, f"the context's width is {widths}", "use parts that belong together")
        s |= dict(cond="text", text_encoder=name_of_tower(text[0]))
    elif own.get("cond") == "class":
        s |= dict(cond="class", num_classes=own["num_classes"])
    return text, table, s


def read_task(path, index, unet, model, factor):
    """The task's settings, from what is joined to the U-Net's input. factor: of the autoencoder, 0 without one."""
    s, extra, cond = dict(task="none", sr_scale=0, sr_noise=0, sr_schedule=()), unet["concat_channels"], model["cond"]
    if extra == 1 + unet["in_channels"] and factor and cond == "text":
        s |= dict(task="inpaint")
    elif extra == len(model["image_mode"]) and factor:
        s |= dict(task="sr", sr_scale=factor)
        if unet["num_classes"] and cond != "class":
            low = f"{path}/low_res_scheduler/scheduler_config.json"
            low = read_json(low) if os.path.exists(low) else {}
            betas = low.get("beta_start", 1e-4), low.get("beta_end", 0.02)
            s |= dict(sr_noise=index.get("max_noise_level", 350))
            s |= dict(sr_schedule=(low.get("beta_schedule", "scaled_linear"), *betas))
    elif extra:
        reject(path, f"{extra} more input channels of unknown meaning", "this model is not supported")
    if unet["num_classes"] and s["task"] != "sr" and cond != "class":
        reject(path, f"{unet['num_classes']} classes, of which the empty one is unknown", "it is not supported")
    return s


# --- ours out ---


def limits(to, vae, model):
    """Names of what a layout cannot hold. vae: the autoencoder's settings or None; model: the checkpoint's or None."""
    diffusers, compvis, found = to == "diffusers", to == "compvis", {}
    if vae:
        s = vae
        sides = [s["resolution"] // s["patch_size"] // 2**i for i in range(len(s["ch_mult"]))]
        only = dict(activation="silu", downsample="conv", upsample="nearest", linear_attention=False)
        only |= dict(patch_size=1, pixel_channels=0)
        found |= {f"{name}={s[name]} of the autoencoder": s[name] != value for name, value in only.items()}
        found |= {
            "attn_resolutions of the autoencoder (as in kl-f16)": diffusers and set(sides) & set(s["attn_resolutions"]),
            "tanh_out of the autoencoder": diffusers and s["tanh_out"],
            "embed_dim != z_channels": diffusers and s["bottleneck"] == "kl" and latent_channels(s) != s["z_channels"],
            "norm_groups of the autoencoder (32 there)": compvis and s["norm_groups"] != 32,
        }
    if model:
        s, transformers = model["unet"], model["unet"]["transformer_depth"] > 0
        several = len(set(by_level(s["num_res_blocks"], 1))) > 1
        only = dict(unet_patch=1, context_pool=False, qk_norm=False, linear_attention=False)
        found |= {f"{name}={s[name]} of the U-Net": s[name] != value for name, value in only.items()}
        found |= {
            "resample=pool": diffusers and s["resample"] == "pool" and not s["resblock_updown"],
            "resample=max": s["resample"] == "max" and not s["resblock_updown"],
            f"upsample={s['upsample']} of the U-Net": s["upsample"] != "nearest" and not s["resblock_updown"],
            "resblock_updown with transformers": diffusers and transformers and s["resblock_updown"],
            "transformers without middle_attention": diffusers and transformers and not s["middle_attention"],
            "num_res_blocks by level": diffusers and not transformers and several,
            "num_heads > 1 on several widths": diffusers and not transformers and head_width(s) is None,
            "transformers with context_dim=0": compvis and transformers and not s["context_dim"],
            "middle_attention=False": compvis and not s["middle_attention"],
            "norm_groups of the U-Net (32 there)": compvis and s["norm_groups"] != 32,
        }
        schedule, objective = model["schedule"], model["objective"]
        at_zero = objective == "eps" and table_of(model)[0][-1] == 0
        found |= {
            f"objective={objective}": objective not in ("eps", "v", "x0"),
            f"schedule={schedule}, where alpha^2 + sigma^2 is not 1": schedule == "flow",
            f"objective=eps with schedule={schedule}, which starts at t = 0.995": at_zero,
            "class_embed=token": diffusers and model["cond"] == "class" and model["class_embed"] == "token",
            "task=semantic, whose maps go through a rescaler": diffusers and model["task"] == "semantic",
        }
    return [name for name, present in found.items() if present]


def head_width(s):
    """Channels of a head if they are the same in all of a U-Net's attentions; 0: the level's own; None: they differ."""
    if s["head_dim"] or s["num_heads"] == 1:
        return s["head_dim"]
    mults = [mult for i, mult in enumerate(s["channel_mult"]) if 2**i in s["attention_ds"]]
    widths = {s["channels"] * mult for mult in mults + s["middle_attention"] * [s["channel_mult"][-1]]}
    return max(widths, default=0) // s["num_heads"] if len(widths) < 2 else None


def fold_statistics(tensors, mean, std, scale=0.0):
    """(tensors, scalar): the statistics of an autoencoder's latents go into its weights. mean, std: (C,).

    Other layouts scale: the U-Net sees latents * scalar, `decode` gets latents / scalar. scale: the scalar, 0 for any.
    If all means are 0 and all deviations equal, the scalar is 1 / std and no weight changes. Otherwise it is 1, or
    `scale`: quant_conv returns (mean - m) / s and logvar - 2 ln s, where s = std * scalar, and post_quant_conv has
    weight W s and bias b + W m. A VQ codebook is normalized too, which keeps the nearest code only if s is the same for
    all channels. UserError if it is not, or without statistics.
    """
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        reject("the autoencoder", "no latent statistics", "run train_vae.py with --measure_latents")
    out, uniform = dict(tensors), bool((std == std[0]).all())
    if uniform and not mean.any() and (not scale or math.isclose(scale * std[0].item(), 1, rel_tol=1e-6)):
        return out, scale or 1 / std[0].item()
    codes, C = "quantize.embedding.weight", len(mean)
    if codes in out and not uniform:
        reject("the autoencoder", "VQ latents with one std a channel", "only one std for all channels can be exported")
    if "quant_conv.weight" not in out:
        out |= identity_projections(C, 1 if codes in out else 2)
    m, s = mean.double(), std.double() * (scale or 1.0)
    w, b = out["quant_conv.weight"].double(), out["quant_conv.bias"].double()
    w[:C], b[:C] = w[:C] / s.view(-1, 1, 1, 1), (b[:C] - m) / s
    if codes in out:
        out[codes] = ((out[codes].double() - m) / s).float()
    else:
        b[C:] -= 2 * s.log()
    out |= {"quant_conv.weight": w.float(), "quant_conv.bias": b.float()}
    w, b = out["post_quant_conv.weight"].double(), out["post_quant_conv.bias"].double()
    b = b + w[:, :, 0, 0] @ m
    return out | {
        "post_quant_conv.weight": (w * s.view(1, -1, 1, 1)).float(),
        "post_quant_conv.bias": b.float(),
    }, scale or 1.0


def identity_projections(channels, moments):
    """quant_conv and post_quant_conv that change nothing, for layouts that always have them."""
    out = {}
    for name, n in (("quant_conv", moments * channels), ("post_quant_conv", channels)):
        out |= {f"{name}.weight": torch.eye(n).view(n, n, 1, 1), f"{name}.bias": torch.zeros(n)}
    return out


def fold_time(weight, by=1):
    """The first weight of the time embedding, so that the U-Net gives at time i what it gave at i + by.

    The sinusoids of i + 1 are those of i, each pair rotated by its frequency. A continuous schedule, whose U-Net takes
    1000 t, becomes a table of 1000 entries: entry i is at t = (i + 1) / 1000, and its U-Net takes i.
    """
    half = weight.shape[1] // 2
    angle = by * torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
    c, s = weight[:, :half].double(), weight[:, half : 2 * half].double()  # of the cosines, of the sines
    rotated = [c * angle.cos() + s * angle.sin(), s * angle.cos() - c * angle.sin()]
    return torch.cat([*(w.to(weight.dtype) for w in rotated), weight[:, 2 * half :]], dim=1)


def table_of(model):
    """alpha_bar (T,) float64 of a checkpoint's schedule, and whether its U-Net counts from 1, see fold_time."""
    ends = model["beta_start"], model["beta_end"]
    schedule = diffusion.make_schedule(model["schedule"], *ends, zero_snr=model["zero_snr"])
    T = schedule.discrete or 1000
    return schedule.alpha(torch.arange(1, T + 1, dtype=torch.float64) / T) ** 2, not schedule.discrete


def betas_of(alpha_bar):
    return 1 - alpha_bar / torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])


def schedule_of(betas):
    """{schedule, beta_start, beta_end} of a table of betas (1000,) float64, or None if it is another one.

    Includes "cosine", which is continuous here, for a U-Net that takes i: see fold_time.
    """
    start, end = betas[0].item(), betas[-1].item()
    low, high = (torch.sigmoid(torch.tensor([-6.0, 6.0], dtype=torch.float64))).tolist()
    slope = (end - start) / (high - low)
    ends = {"linear": (start, end), "scaled_linear": (start, end), "sqrt": (start**2, end**2)}
    ends |= {"sigmoid": (start - slope * low, start - slope * low + slope)}
    ends |= {"squared_cosine": (0.00085, 0.012), "cosine": (0.00085, 0.012)}
    for name, (first, last) in ends.items():
        if len(betas) == 1000 and 0 < first <= last < 1:
            found = dict(schedule=name, beta_start=float(f"{first:.6g}"), beta_end=float(f"{last:.6g}"))
            if torch.allclose(betas_of(table_of(found | dict(zero_snr=False))[0]), betas, rtol=1e-4, atol=1e-8):
                return found


def scheduler_config(model):
    """diffusers' DDIMScheduler for a checkpoint's settings; its steps are sample.py's with spacing=trailing, eta=0."""
    names = {ours: theirs for theirs, ours in SCHEDULES.items() if ours != "sigmoid"}  # which has other ends there
    name = (names | {"quadratic": "scaled_linear"}).get(model["schedule"])
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "trained_betas": None}
    if name:
        config |= {"beta_schedule": name, "beta_start": model["beta_start"], "beta_end": model["beta_end"]}
    else:
        config["trained_betas"] = betas_of(table_of(model | {"zero_snr": False})[0]).tolist()
    config["rescale_betas_zero_snr"] = bool(model["zero_snr"])
    config["prediction_type"] = {ours: theirs for theirs, ours in PREDICTIONS.items()}[model["objective"]]
    # steps_offset is not used by trailing steps, but pipelines warn of any other than 1
    config |= {"timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 1}
    return config | {"clip_sample": False, "thresholding": False}


def vae_config(s, scaling, side):
    """diffusers' config of an autoencoder with settings s, for images of that side."""
    widths = [s["ch"] * mult for mult in s["ch_mult"]]
    channels = len(s["image_mode"])
    config = {"in_channels": channels, "out_channels": channels, "block_out_channels": widths, "act_fn": "silu"}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * len(widths)}
    config |= {"up_block_types": ["UpDecoderBlock2D"] * len(widths), "layers_per_block": s["num_res_blocks"]}
    config |= {"latent_channels": s["z_channels"], "norm_num_groups": s["norm_groups"], "sample_size": side}
    config |= {"mid_block_add_attention": s["mid_attention"], "scaling_factor": scaling}
    if s["bottleneck"] == "vq":
        config |= {"num_vq_embeddings": s["codebook_size"], "vq_embed_dim": latent_channels(s)}
        return {"_class_name": "VQModel"} | config
    config |= {"use_quant_conv": s["latent_proj"], "use_post_quant_conv": s["latent_proj"]}
    return {"_class_name": "AutoencoderKL"} | config


def unet_config(s, side):
    """diffusers' config of a U-Net with settings s, for latents of that side, or [height, width]."""
    widths, depth = [s["channels"] * mult for mult in s["channel_mult"]], s["transformer_depth"]
    config = {"sample_size": side, "in_channels": s["in_channels"] + s["concat_channels"]}
    config |= {"out_channels": s["out_channels"], "block_out_channels": widths, "norm_num_groups": s["norm_groups"]}
    config |= {"num_class_embeds": s["num_classes"] or None, "norm_eps": 1e-5, "act_fn": "silu"}
    config |= {"flip_sin_to_cos": True, "freq_shift": 0, "dropout": s["unet_dropout"]}
    config["resnet_time_scale_shift"] = "scale_shift" if s["scale_shift"] else "default"
    blocks = list(by_level(s["num_res_blocks"], len(widths)))
    if depth:
        down, up, plain_down, plain_up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D", "UpBlock2D"
        config |= {"transformer_layers_per_block": depth, "use_linear_projection": s["linear_proj"]}
        config |= {"cross_attention_dim": s["context_dim"] or widths, "mid_block_type": "UNetMidBlock2DCrossAttn"}
        # a trap: this is the number of heads, see read_unet_config
        config |= {"attention_head_dim": [s["num_heads"] or width // s["head_dim"] for width in widths]}
        config |= {"only_cross_attention": [not own for own in by_level(s["self_attention"], len(widths))]}
        config |= {"layers_per_block": blocks, "_class_name": "UNet2DConditionModel"}
    else:
        down, up, plain_down, plain_up = "AttnDownBlock2D", "AttnUpBlock2D", "DownBlock2D", "UpBlock2D"
        resampler = "conv"
        if s["resblock_updown"]:
            plain_down, plain_up, resampler = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "resnet"
        config |= {"attention_head_dim": head_width(s) or None, "attn_norm_num_groups": s["norm_groups"]}
        config |= {"downsample_type": resampler, "upsample_type": resampler, "add_attention": s["middle_attention"]}
        config |= {"layers_per_block": blocks[0], "_class_name": "UNet2DModel"}
    attends = [2**i in s["attention_ds"] for i in range(len(widths))]
    config["down_block_types"] = [down if attention else plain_down for attention in attends]
    config["up_block_types"] = [up if attention else plain_up for attention in attends[::-1]]
    return config


def clip_files(s, merges):
    """The config and tokenizer of a CLIP tower with settings s, as in transformers: {file: content}, JSON or text."""
    lines, _, where = read_merges(merges)
    letters = list(byte_letters())
    names = letters + [f"{letter}</w>" for letter in letters] + [line.replace(" ", "") for line in lines]
    names += ["<|startoftext|>", "<|endoftext|>"]
    if len(names) != s["vocab"]:
        reject(where, f"{len(names)} tokens, the text encoder has {s['vocab']}", CLIP_VOCAB)
    start, end = len(names) - 2, len(names) - 1
    config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": s["width"]}
    config |= {"intermediate_size": 4 * s["width"], "projection_dim": s["width"], "num_attention_heads": s["heads"]}
    config |= {"num_hidden_layers": used_blocks(s), "max_position_embeddings": s["length"], "layer_norm_eps": 1e-5}
    config |= {"vocab_size": s["vocab"], "hidden_act": s["activation"], "torch_dtype": "float32"}
    config |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end if s["pad"] == "end" else 0}
    special = {"bos_token": names[start], "eos_token": names[end], "unk_token": names[end], "pad_token": names[end]}
    vocab = {name: i for i, name in enumerate(names)}
    if s["pad"] == "zero":
        # Stable Diffusion 2 pads with token 0, "!". Under that name every "!" of a prompt would count as padding, so
        # token 0 has a second name, for padding only.
        vocab["<|pad|>"], special["pad_token"] = 0, "<|pad|>"
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": s["length"], "do_lower_case": True} | special
    return {
        "text_encoder/config.json": config,
        "tokenizer/tokenizer_config.json": tokenizer,
        "tokenizer/special_tokens_map.json": special,
        "tokenizer/vocab.json": vocab,
        "tokenizer/merges.txt": "\n".join(["#version: 0.2", *lines, ""]),
    }


@one_line_errors
def load_tower(path, weights="", merges=""):
    """(settings, state dict, merges) of the frozen text encoder of a stage-2 checkpoint of ours; None if it has none.

    weights, merges: their paths, if they have moved since training.
    """
    meta = checkpoint.read_meta(path)
    name = meta["model"]["text_encoder"]
    if name == "joint" or meta["model"]["cond"] != "text":
        return None
    weights, merges = weights or meta["config"]["tower_weights"], merges or meta["config"]["clip_vocab"]
    try:
        weights = checkpoint.find(weights)
    except UserError as error:
        reject(path, f"the weights of its text encoder {name} are missing ({error})", "set --tower_weights=FILE")
    tower = load_clip(weights, name, merges or None)
    if checkpoint.hash_weights(tower[1]) != meta["model"]["tower_hash"]:
        reject(weights, f"another {name} than {path} was trained with", "set --tower_weights=FILE")
    return tower


def read_ours(path, to, ema_std, tower_weights, clip_vocab):
    """(meta, model, vae, unet, tower, others) of a checkpoint of ours, to be written in the layout `to`.

    model: the settings of stage 2.  vae: (settings, state, scaling).  unet: state.  tower: (settings, state, merges).
    Each is None if there is none.  others: class tokens, a text encoder or a rescaler, trained with the U-Net.
    State dicts have our names. UserError names what the layout cannot hold.
    """
    meta = checkpoint.read_meta(path)
    model = meta["model"] if meta["stage"] == "ldm" else None
    if not model and (meta["stage"] != "vae" or ema_std or tower_weights or clip_vocab):
        reject(path, f"stage {meta['stage']}", "leave out --ema_std, --tower_weights and --clip_vocab, of stage 2")
    if model and not UNET.keys() <= model["unet"].keys():
        reject(path, "its denoiser is not a unet.UNet", "no other layout can hold it")
    vae = unet = tower = None
    if names := limits(to, meta["vae"] if model else meta["model"], model):
        reject(path, f"{to} cannot hold {'; '.join(names)}", "train without")
    ema = {}
    if model:
        tensors = checkpoint.posthoc_ema(checkpoint.find(path), ema_std) if ema_std else checkpoint.read(path, "ema")[0]
        ema = part(tensors, "ema")
        unet = part(ema, "unet")
        if table_of(model)[1]:
            unet["time_embed.0.weight"] = fold_time(unet["time_embed.0.weight"])
        tower = load_tower(path, tower_weights, clip_vocab)
    if not model or meta["vae"]:
        s, state = checkpoint.read_vae(path)
        mean, std = state.pop("latent_mean"), state.pop("latent_std")
        upscaler = to == "diffusers" and model and model["task"] == "sr"  # whose pipeline has this scale and no other
        state, scaling = fold_statistics(state, mean, std, 0.08333 if upscaler else 0.0)
        if "quant_conv.weight" not in state and (to == "compvis" or s["bottleneck"] == "vq"):  # always there
            state |= identity_projections(len(mean), 1 if s["bottleneck"] == "vq" else 2)
        vae = s | {"latent_proj": "quant_conv.weight" in state}, state, scaling
    others = {name: t for name, t in ema.items() if not name.startswith("unet.")}
    return meta, model, vae, unet, tower, others


TEXT_PIPELINES = {"none": "StableDiffusionPipeline", "inpaint": "StableDiffusionInpaintPipeline"}
TEXT_PIPELINES |= {"sr": "StableDiffusionUpscalePipeline"}  # by the task


def pipeline_of(model, vae, tower):
    """(the name of diffusers' pipeline for a checkpoint of ours, or "", and the reason why there is none)."""
    if model is None:
        return "", "it is an autoencoder alone"
    cond, task, classes = model["cond"], model["task"], model["num_classes"]
    square, mode = len(set(model["image_size"])) == 1, model["image_mode"]
    no_vae, vq = vae is None, vae is not None and vae[0]["bottleneck"] == "vq"
    scale, factor = model["sr_scale"], 1 if no_vae else 2 ** (len(vae[0]["ch_mult"]) - 1)
    reasons = {
        "no pipeline of this type generates pixels": no_vae,
        f"no pipeline for task={task} with image_mode={mode}": task != "none" and mode != "RGB",
        f"no pipeline for task={task} without text": task != "none" and cond != "text",
        f"StableDiffusionUpscalePipeline enlarges by {factor}, not {scale}": task == "sr" and scale != factor,
        "StableDiffusionUpscalePipeline adds noise, sr_noise=0 has none": task == "sr" and not model["sr_noise"],
        f"no pipeline for such classes; class_labels={classes} is the empty condition": cond == "class",
        "LDMPipeline takes plain attention, transformer_depth=0": cond == "none" and model["unet"]["transformer_depth"],
        "LDMPipeline and StableDiffusionInpaintPipeline make square images": not square
        and (cond == "none" or task == "inpaint"),
        "its text encoder was trained here and cannot be exported": cond == "text" and tower is None,
        "StableDiffusionPipeline takes no VQ": cond == "text" and vq,
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), ""):
        return "", reason
    return "LDMPipeline" if cond == "none" else TEXT_PIPELINES[task], ""


@one_line_errors
def to_diffusers(path, folder, ema_std=0.0, tower_weights="", clip_vocab=""):
    """Write a checkpoint of ours as a folder for diffusers; returns a description of it.

    An unconditional model becomes an LDMPipeline, one with a frozen CLIP a StableDiffusionPipeline or, by its task, the
    one for inpainting or upscaling; of any other the autoencoder, the U-Net and the scheduler are written. The options
    are those of sample.load_pipeline. UserError names what diffusers cannot hold.
    """
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        reject(folder, "exists already", "give a new folder")
    meta, model, vae, unet, tower, _ = read_ours(path, "diffusers", ema_std, tower_weights, clip_vocab)
    files, index, sides = {}, {}, model["image_size"] if model else meta["config"].get("image_size", (256,))
    pipeline, reason = pipeline_of(model, vae, tower)
    vae_folder = "vqvae" if pipeline == "LDMPipeline" else "vae"

    def add(name, config, weights):
        files[f"{name}/config.json"] = config
        files[f"{name}/diffusion_pytorch_model.safetensors"] = weights
        index[name] = ["diffusers", config["_class_name"]]

    factor = 1
    if vae:
        s, state, scaling = vae
        factor = 2 ** (len(s["ch_mult"]) - 1)
        add(vae_folder, vae_config(s, scaling, max(sides)), to_theirs(state, key_table(vae_layers(s), "diffusers")))
    if model:
        s = model["unet"]
        note = {"cond": model["cond"], "num_classes": model["num_classes"], "classes": meta["classes"]}
        sides = [side // factor for side in sides]  # a number for a square, else [height, width]
        config = unet_config(s, sides if len(set(sides)) > 1 else sides[0]) | {OURS: note}
        add("unet", config, to_theirs(unet, key_table(unet_layers(s), "diffusers")))
        files["scheduler/scheduler_config.json"] = scheduler_config(model)
        index["scheduler"] = ["diffusers", "DDIMScheduler"]
    if tower:
        s, state, merges = tower
        files |= clip_files(s, merges)
        weights = to_theirs(state, key_table(text_layers(used_blocks(s)), "transformers"))
        files["text_encoder/model.safetensors"] = checkpoint.with_prefix("text_model", weights)
    components = ", ".join(f"{name} ({library_class[1]})" for name, library_class in index.items())
    if pipeline:
        if pipeline == TEXT_PIPELINES["sr"]:
            schedule, *ends = model["sr_schedule"] or ("linear", 1e-4, 0.02)
            low = dict(model, schedule=schedule, beta_start=ends[0], beta_end=ends[1], zero_snr=False)
            files["low_res_scheduler/scheduler_config.json"] = scheduler_config(low) | {"_class_name": "DDPMScheduler"}
            index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": model["sr_noise"]}
        if tower:
            index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
            index |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
            index["requires_safety_checker"] = False
        # opening a pipeline for inpainting needs the version; from this one on tensors have their present names
        files["model_index.json"] = {"_class_name": pipeline, "_diffusers_version": "0.14.0"} | index
    save(os.path.normpath(folder), files)
    if pipeline:
        return f'{pipeline}: DiffusionPipeline.from_pretrained("{folder}") opens it'
    return f"components, no pipeline: {components}; {reason}"


@one_line_errors
def to_compvis(path, file, ema_std=0.0, tower_weights="", clip_vocab=""):
    """Write a checkpoint of ours as one .safetensors file with CompVis' names; returns a description of it.

    first_stage_model. and scale_factor; model.diffusion_model. and the schedule's buffers; cond_stage_model. of a
    frozen CLIP, of class tokens and of a rescaler for maps. An autoencoder alone has no prefix, as CompVis'.
    """
    if not file.endswith(".safetensors") or os.path.exists(file):
        reject(file, "exists already, or is not a .safetensors file", "give a new one")
    _, model, vae, unet, tower, others = read_ours(path, "compvis", ema_std, tower_weights, clip_vocab)
    out, parts, left_out = {}, [], []

    def add(prefix, tensors, what):
        out.update({prefix + name: t for name, t in tensors.items()})
        parts.append(what)

    if vae:
        s, state, scaling = vae
        tensors = to_theirs(state, key_table(vae_layers(s), "compvis"))
        add(PREFIXES["vae"] if model else "", tensors, f"the autoencoder, scale_factor {scaling:.6g}")
        left_out += ["tanh_out=True of the autoencoder"] if s["tanh_out"] else []
        if model:
            out["scale_factor"] = torch.tensor(scaling)
    if model:
        s, alpha_bar = model["unet"], table_of(model)[0]
        add(PREFIXES["unet"], to_theirs(unet, key_table(unet_layers(s), "compvis")), "the U-Net")
        before = torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])
        buffers = {"betas": betas_of(alpha_bar), "alphas_cumprod": alpha_bar, "alphas_cumprod_prev": before}
        buffers |= {"sqrt_alphas_cumprod": alpha_bar.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt()}
        add("", {name: t.float() for name, t in buffers.items()}, f"its table of {len(alpha_bar)} betas")
        heads = [f"{name}={s[name]}" for name in ("num_heads", "head_dim") if s[name]]
        left_out = [f"objective={model['objective']}", *heads, *left_out]
        left_out += ["the text encoder that was trained with it"] if model["text"] else []
    if tower:
        # Stable Diffusion 1 has transformers' tower, 2 has open_clip's
        s, state, _ = tower
        last = s["layer"] == "last"
        layout, prefix = ("transformers", "transformer.text_model.") if last else ("open_clip", "model.")
        tensors = to_theirs(state, key_table(text_layers(used_blocks(s)), layout))
        add(PREFIXES["text"] + prefix, tensors, "the text tower")
    if "class_tokens.weight" in others:
        add(PREFIXES["text"], {"embedding.weight": others["class_tokens.weight"]}, "the class tokens")
    if "rescaler.conv.weight" in others:
        add(PREFIXES["text"], {"channel_mapper.weight": others["rescaler.conv.weight"]}, "the rescaler for maps")
    save(file, {"": out})
    return f"{file}: {', '.join(parts)}" + (f"; not in the file: {', '.join(left_out)}" if left_out else "")


def save(path, files):
    """Write {name: tensors, text or JSON} as a folder, or {"": tensors} as one file, complete or not at all."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with checkpoint.replacing(path) as temporary:
            for name, content in files.items():
                file = os.path.join(temporary, name) if name else temporary
                os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
                if name.endswith((".json", ".txt")):
                    with open(file, "w", encoding="utf-8") as f:
                        f.write(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
                else:
                    save_file({key: t.contiguous() for key, t in content.items()}, file, metadata={"format": "pt"})
                checkpoint.sync(file)
                checkpoint.sync(os.path.dirname(file) or ".")
    except (OSError, SafetensorError) as error:
        reject(path, f"could not be written ({error})", "free disk space and run again")


# --- the command ---

ckpt = ""  # a checkpoint of ours, of either stage, or its out_dir
to = "diffusers"  # diffusers | compvis: a folder, or one .safetensors file
out = ""  # the new folder or file
ema_std = 0.0  # 0 or in [0.01, 0.25]: relative length of a post-hoc EMA, as in sample.py; 0 is the stored EMA
tower_weights = ""  # weights of a frozen text encoder, if they have moved since training
clip_vocab = ""  # merges of its tokenizer, if they have moved

if __name__ == "__main__":
    from common import install_excepthook
    from configurator import configure

    cfg = configure(globals())
    install_excepthook()
    if not (cfg.ckpt and cfg.out):
        reject("--ckpt and --out", "both must be set", f"python convert.py --ckpt=out/ldm --to={cfg.to} --out=NEW")
    export = to_diffusers if cfg.to == "diffusers" else to_compvis
    print(export(checkpoint.find(cfg.ckpt), cfg.out, cfg.ema_std, cfg.tower_weights, cfg.clip_vocab))
