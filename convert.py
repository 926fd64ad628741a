"""Checkpoints into models: finds the file, says what is wrong with it, builds what it holds.

    VAE.from_pretrained("out/vae")        # ends up in load_vae
    UNet.from_pretrained("out/ldm")       # in load_unet
    sample.load_pipeline("out/ldm")       # in load_denoiser, load_vae and load_tower

So far it reads this repository's own files; other people's layouts join them here.
"""

import hashlib
import json
import os
import re
import zlib
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file


def find_checkpoint(path):
    """The .safetensors file that path names: itself, or latest.safetensors in it."""
    if os.path.isdir(path):
        file = os.path.join(path, "latest.safetensors")
        if not os.path.exists(file):
            raise FileNotFoundError(f"{path} holds no latest.safetensors: train first, or name a checkpoint file")
        return file
    if not os.path.exists(path):
        raise FileNotFoundError(f"checkpoint {path} is not there: name a .safetensors file or the out_dir of a run")
    return path


def read_checkpoint(path, *prefixes):
    """(tensors below any of `prefixes`, meta) of a checkpoint of ours; ValueError says what is wrong with it."""
    file = find_checkpoint(path)
    try:
        with safe_open(file, framework="pt") as f:
            stored = f.metadata() or {}
            text = stored.get("latent_diffusion")
            if text is None:
                raise ValueError(f"{file} is not a checkpoint of this repository")
            if str(zlib.crc32(text.encode())) != stored.get("crc32"):
                raise ValueError(f"{file} is damaged: its settings do not match their checksum")
            meta = json.loads(text)
            if meta["format"] != 1:
                raise ValueError(f"{file} has format {meta['format']}, this code reads 1: use the code that wrote it")
            wanted = tuple(f"{prefix}." for prefix in prefixes)
            return {name: f.get_tensor(name) for name in f.keys() if name.startswith(wanted)}, meta
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{file} is no checkpoint, or one cut short ({e})") from None


def part(tensors, prefix):
    """The state dict below a prefix."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def tuples(settings):
    """JSON's lists as the tuples that models are built with."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def check_settings(path, saved, given):
    """ValueError where settings that were asked for contradict the file's."""
    rows = [f"{k}: {saved.get(k)} in the file, {v} asked for" for k, v in tuples(given).items() if saved.get(k) != v]
    if rows:
        raise ValueError(f"{path} tells its own settings ({'; '.join(rows)}): leave them out")


def load_vae(cls, path, **settings):
    """The EMA autoencoder of a stage-1 checkpoint, or the first stage inside a stage-2 checkpoint."""
    _, meta = read_checkpoint(path)
    own, prefix = (meta["model"], "ema") if meta["stage"] == "vae" else (meta["vae"], "vae")
    if own is None:
        raise ValueError(f"{path} was trained on pixels: it holds no autoencoder")
    check_settings(path, tuples(own), settings)
    vae = cls(**tuples(own))
    vae.load_state_dict(part(read_checkpoint(path, prefix)[0], prefix))
    return vae.requires_grad_(False).eval()


def load_unet(cls, path, **settings):
    """The EMA U-Net of a stage-2 checkpoint."""
    tensors, meta = read_checkpoint(path, "ema.unet")
    if meta["stage"] != "ldm":
        raise ValueError(f"{path} is an autoencoder (stage 1): it holds no U-Net")
    own = tuples(meta["model"]["unet"])
    check_settings(path, own, settings)
    unet = cls(**own)
    unet.load_state_dict(part(tensors, "ema.unet"))
    return unet.requires_grad_(False).eval()


def load_text_encoder(cls, path, **settings):
    """The EMA text encoder trained inside a stage-2 checkpoint, or None where there is none."""
    tensors, meta = read_checkpoint(path, "ema.text", "text")
    own = meta["model"]["text"] if meta["stage"] == "ldm" else None
    if own is None:
        raise ValueError(f"{path} holds no text encoder")
    check_settings(path, own, settings)
    text = cls(**own, tokenizer=bytes(tensors["text.bpe"].tolist()))
    text.load_state_dict(part(tensors, "ema.text"))
    return text.requires_grad_(False).eval()


def load_clip(cls, path, name, merges):
    """A CLIP text tower from a .safetensors file of its state dict, in this repository's names."""
    tower = cls.named(name, merges)
    if not os.path.exists(path):
        raise FileNotFoundError(f"the text tower {path} is not there: name a .safetensors file of {name}'s weights")
    try:
        tower.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as e:
        raise ValueError(f"{path} does not hold {name}'s weights: {str(e).splitlines()[0]}") from None
    return tower.requires_grad_(False).eval()


def posthoc_ema(path, std):
    """The `ema.*` tensors of an average over a run of relative length `std`, from the snapshots that it kept.

    path: its out_dir, or the snapshot it shall end at; else it ends at the last. Snapshots hold averages of the weights
    at several steps and of several lengths (train_ldm.py --ema_stds --snapshot_every). The profile asked for is their
    combination that is nearest by least squares (Karras et al. 2024, EDM2, arXiv 2312.02696, section 3.2).
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    files = sorted(name for name in os.listdir(folder) if re.fullmatch(r"ema_\d+\.safetensors", name))
    if os.path.basename(path) in files:
        files = files[: files.index(os.path.basename(path)) + 1]
    steps, gammas, sources = [], [], []
    for name in files:
        _, meta = read_checkpoint(f"{folder}/{name}")
        for i, kept in enumerate(meta["model"].get("ema_stds") or ()):
            steps, gammas = [*steps, meta["step"]], [*gammas, power_exponent(kept)]
            sources.append((f"{folder}/{name}", f"ema_power_{i}"))
    if not sources:
        raise ValueError(
            f"{folder} keeps no averages to combine: train with --ema_stds=0.05,0.1 --snapshot_every=STEPS"
        )
    if not 0.01 <= std <= 0.25:
        raise ValueError(f"ema_std={std} is no relative length of an average: choose between 0.01 and 0.25")
    steps, gammas = np.array(steps, dtype=np.float64), np.array(gammas)
    target = np.array([steps.max()]), np.array([power_exponent(std)])
    A = profile_products(steps[:, None], gammas[:, None], steps, gammas)
    b = profile_products(steps[:, None], gammas[:, None], *target)
    weights = np.linalg.lstsq(A, b, rcond=1e-12)[0][:, 0]
    out = {}
    for weight, (file, prefix) in zip(weights, sources):
        for name, t in part(read_checkpoint(file, prefix)[0], prefix).items():
            total = out.get(f"ema.{name}", torch.zeros_like(t, dtype=torch.float64))
            out[f"ema.{name}"] = total + weight * t.double()
    return {name: t.float() for name, t in out.items()}


def power_exponent(std):
    """gamma of the power profile, weights ~ t^gamma over a run's steps, whose relative deviation is std in (0, 0.28].

    EDM2, section 3.1: std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    return np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max()


def profile_products(t_a, gamma_a, t_b, gamma_b):
    """Inner products of the profiles p(s) = (gamma + 1) / t (s / t)^gamma on [0, t]; arrays that broadcast."""
    shorter = np.where(t_a < t_b, (t_a / t_b) ** gamma_b, (t_b / t_a) ** gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shorter / np.maximum(t_a, t_b)


def load_denoiser(path, ema_std=0.0):
    """The EMA unet.Denoiser of a stage-2 checkpoint: the U-Net with all that was trained beside it.

    ema_std: above 0, a post-hoc EMA of that relative width from the snapshots beside the file; see posthoc_ema.
    """
    from unet import Denoiser, Rescaler, TextEncoder, UNet

    tensors, meta = read_checkpoint(path, "ema", "text")
    if meta["stage"] != "ldm":
        raise ValueError(f"{path} is an autoencoder (stage 1): it holds no U-Net")
    model = meta["model"]
    bpe = tensors.pop("text.bpe", None)
    if ema_std:
        tensors = posthoc_ema(find_checkpoint(path), ema_std)
    ema = part(tensors, "ema")
    text = TextEncoder(**model["text"], tokenizer=bytes(bpe.tolist())) if model["text"] else None
    class_tokens = rescaler = None
    if "class_tokens.weight" in ema:
        class_tokens = torch.nn.Embedding(*ema["class_tokens.weight"].shape)
    if "rescaler.conv.weight" in ema:
        width, classes = ema["rescaler.conv.weight"].shape[:2]
        vae = meta["vae"]  # its factor: pixels to a latent
        factor = vae["patch_size"] * 2 ** (len(vae["ch_mult"]) - 1) if vae else 1
        rescaler = Rescaler(classes, factor, width)
    uncertainty = any(name.startswith("log_variance.") for name in ema)
    denoiser = Denoiser(UNet(**tuples(model["unet"])), text, class_tokens, rescaler, uncertainty)
    denoiser.load_state_dict(ema)
    return denoiser.requires_grad_(False).eval()


def load_tower(path, weights="", merges=""):
    """The frozen text encoder that a stage-2 checkpoint was trained with, or None; its weights lie outside of the file.

    weights, merges: where they and the tokenizer's lie now, if no longer where training found them.
    """
    _, meta = read_checkpoint(path)
    name = meta["model"].get("text_encoder", "joint")
    if name == "joint" or meta["model"]["cond"] != "text":
        return None
    from unet import CLIPTextEncoder

    weights, merges = weights or meta["config"]["tower_weights"], merges or meta["config"]["clip_vocab"]
    if not os.path.exists(weights):
        raise ValueError(f"{path} listens to {name}, whose weights are not at {weights}: set tower_weights=FILE")
    tower = CLIPTextEncoder.from_pretrained(weights, name=name, merges=merges)
    if hash_weights(tower) != meta["model"]["tower_hash"]:
        raise ValueError(f"{weights} is another {name} than {path} was trained with: set tower_weights=FILE")
    return tower.requires_grad_(False).eval()


def hash_weights(model, but=()):
    """Hex digest of a module's parameters and buffers, but for names that begin so."""
    h = hashlib.blake2b(digest_size=16)
    for name, t in sorted(model.state_dict().items()):
        if not name.startswith(but):
            h.update(name.encode() + t.detach().float().contiguous().cpu().numpy().tobytes())
    return h.hexdigest()


# --- the key tables: ours and theirs, name by name ---

# A name's ending in our files, in CompVis' and in diffusers'
VAE_BLOCK = [(name, name, name) for name in ("norm1", "conv1", "norm2", "conv2")]
VAE_SKIP = ("skip", "nin_shortcut", "conv_shortcut")
VAE_ATTENTION = [("norm", "norm", "group_norm"), ("q", "q", "to_q"), ("k", "k", "to_k"), ("v", "v", "to_v")]
VAE_ATTENTION += [("proj_out", "proj_out", "to_out.0")]
UNET_BLOCK = [("norm1", "in_layers.0", "norm1"), ("conv1", "in_layers.2", "conv1")]
UNET_BLOCK += [("emb", "emb_layers.1", "time_emb_proj")]
UNET_BLOCK += [("norm2", "out_layers.0", "norm2"), ("conv2", "out_layers.3", "conv2")]
UNET_SKIP = ("skip", "skip_connection", "conv_shortcut")
# in our text towers, in transformers' and in open_clip's
TEXT_BLOCK = [("norm1", "layer_norm1", "ln_1"), ("norm2", "layer_norm2", "ln_2")]
TEXT_BLOCK += [("attn.to_out", "self_attn.out_proj", "attn.out_proj")]
TEXT_BLOCK += [("mlp.0", "mlp.fc1", "mlp.c_fc"), ("mlp.2", "mlp.fc2", "mlp.c_proj")]


class Key(NamedTuple):
    """A tensor of theirs and what it is here."""

    ours: tuple  # its name, or the names of the parts it is split into
    theirs: str
    heads: int = 1  # q, k and v lie in it head by head, so many times; 1: one behind the other
    extra: int = 0  # dimensions of size 1 at the end of ours that theirs lacks; -1: the other way round


def to_ours(state, keys, what="the file"):
    """A state dict in our names; ValueError names a tensor that is missing or too many."""
    missing = [key.theirs for key in keys if key.theirs not in state]
    beyond = sorted(set(state) - {key.theirs for key in keys})
    for names, problem in ((missing, "lacks"), (beyond, "has, with no place in this model,")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{what} {problem} {', '.join(names[:3])}{more}: it is damaged, or of another architecture"
            )
    out = {}
    for key in keys:
        t = state[key.theirs]
        if key.extra < 0:
            t = t.squeeze(-1)
        elif t.ndim < 2 + key.extra:
            t = t.reshape(*t.shape, *[1] * key.extra)
        rows = len(key.ours) * key.heads
        if len(t) % rows:
            raise ValueError(f"{what}: {key.theirs} of {len(t)} rows does not divide into {rows}: check num_heads")
        parts = t.unflatten(0, (key.heads, len(key.ours), -1)).unbind(1)
        out |= {name: part.flatten(0, 1) for name, part in zip(key.ours, parts)}
    return out


def to_theirs(state, keys):
    """The inverse: a state dict in their names."""
    beyond = sorted(set(state) - {name for key in keys for name in key.ours})
    if beyond:
        raise ValueError(f"{beyond[0]} has no name in the other layout, which knows no such thing")
    out = {}
    for key in keys:
        parts = [state[name].unflatten(0, (key.heads, -1)) for name in key.ours]
        t = torch.stack(parts, dim=1).flatten(0, 2)
        out[key.theirs] = t.unsqueeze(-1) if key.extra < 0 else t.reshape(t.shape[: t.ndim - key.extra])
    return out


def both(ours, theirs, **how):
    """Weight and bias."""
    ours = ours if isinstance(ours, tuple) else (ours,)
    extra = how.pop("extra", 0)  # of the weight only, but for conv1d's bias, which has no place for it either
    for kind in ("weight", "bias"):
        names = tuple(f"{name}.{kind}" for name in ours)
        yield Key(names, f"{theirs}.{kind}", extra=extra if kind == "weight" else 0, **how)


def vae_keys(settings, layout):
    """[Key, ...] of an autoencoder with these settings; layout: compvis | diffusers (AutoencoderKL and VQModel).

    Without latent_mean and latent_std, which other layouts do not know.
    """
    column, keys = ("compvis", "diffusers").index(layout) + 1, []
    s, levels = settings, len(settings["ch_mult"])
    widths = [s["ch"] * mult for mult in s["ch_mult"]]

    def add(*names, **how):
        keys.extend(both(names[0], names[column], **how))

    def block(a, b, *prefixes):
        for names in [*VAE_BLOCK, VAE_SKIP] if a != b else VAE_BLOCK:
            add(*(f"{prefix}.{name}" for prefix, name in zip(prefixes, names)))

    def attention(*prefixes):
        for names in VAE_ATTENTION:  # 1x1 convolutions, in diffusers linear layers
            linear = layout == "diffusers" and names[0] != "norm"
            add(*(f"{prefix}.{name}" for prefix, name in zip(prefixes, names)), extra=2 if linear else 0)

    for half, down in (("encoder", True), ("decoder", False)):
        c = s["ch"] if down else widths[-1]
        add(f"{half}.conv_in", f"{half}.conv_in", f"{half}.conv_in")
        for i in range(levels) if down else reversed(range(levels)):
            # diffusers counts the decoder's levels as they are run, CompVis from full resolution
            ours = f"{half}.down.{i}" if down else f"{half}.up.{i}"
            theirs = f"{half}.down_blocks.{i}" if down else f"{half}.up_blocks.{levels - 1 - i}"
            for j in range(s["num_res_blocks"] + (not down)):
                block(c, widths[i], f"{ours}.block.{j}", f"{ours}.block.{j}", f"{theirs}.resnets.{j}")
                c = widths[i]
                if s["resolution"] // s["patch_size"] // 2**i in s["attn_resolutions"]:
                    attention(f"{ours}.attn.{j}", f"{ours}.attn.{j}", f"{theirs}.attentions.{j}")
            if down and i < levels - 1 and s["downsample"] == "conv":
                add(f"{ours}.resample.conv", f"{ours}.downsample.conv", f"{theirs}.downsamplers.0.conv")
            elif not down and i:
                add(f"{ours}.resample.conv", f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv")
        for i in range(2):
            block(0, 0, *[f"{half}.mid.block_{i + 1}"] * 2, f"{half}.mid_block.resnets.{i}")
        if s["mid_attention"]:
            attention(*[f"{half}.mid.attn_1"] * 2, f"{half}.mid_block.attentions.0")
        add(f"{half}.norm_out", f"{half}.norm_out", f"{half}.conv_norm_out")
        add(f"{half}.conv_out", f"{half}.conv_out", f"{half}.conv_out")
    if s["latent_proj"]:
        add(*["quant_conv"] * 3)
        add(*["post_quant_conv"] * 3)
    if s["bottleneck"] == "vq":
        keys.append(Key(("quantize.embedding.weight",), "quantize.embedding.weight"))
    return keys


def unet_keys(settings, layout, new_order=False):
    """[Key, ...] of a U-Net with these settings; layout: compvis | diffusers (UNet2DConditionModel and UNet2DModel).

    new_order: of CompVis' plain attention blocks, q, k and v lie one behind the other, not head by head.
    """
    column, keys = ("compvis", "diffusers").index(layout) + 1, []
    s, levels = settings, len(settings["channel_mult"])
    blocks = s["num_res_blocks"] if isinstance(s["num_res_blocks"], (tuple, list)) else (s["num_res_blocks"],)
    blocks = blocks * levels if len(blocks) == 1 else blocks
    widths = [s["channels"] * mult for mult in s["channel_mult"]]

    def add(*names, **how):
        keys.extend(both(names[0], names[column], **how))

    def block(a, b, *prefixes):
        for names in [*UNET_BLOCK, UNET_SKIP] if a != b else UNET_BLOCK:
            add(*(f"{prefix}.{name}" for prefix, name in zip(prefixes, names)))

    def attention(c, *prefixes):
        ours, theirs = prefixes[0], prefixes[column]
        if s["transformer_depth"]:
            for name in ("norm", "proj_in", "proj_out"):
                add(*(f"{prefix}.{name}" for prefix in prefixes))
            for i in range(s["transformer_depth"]):
                inner, theirs_inner = f"{ours}.blocks.{i}", f"{theirs}.transformer_blocks.{i}"
                for n in (1, 2, 3):
                    keys.extend(both(f"{inner}.norm{n}", f"{theirs_inner}.norm{n}"))
                for n in (1, 2):
                    for x in "qkv":
                        names = f"{inner}.attn{n}.to_{x}.weight", f"{theirs_inner}.attn{n}.to_{x}.weight"
                        keys.append(Key(names[:1], names[1]))
                    keys.extend(both(f"{inner}.attn{n}.to_out", f"{theirs_inner}.attn{n}.to_out.0"))
                keys.extend(both(f"{inner}.ff.0.proj", f"{theirs_inner}.ff.net.0.proj"))
                keys.extend(both(f"{inner}.ff.1", f"{theirs_inner}.ff.net.2"))
            return
        qkv = tuple(f"{ours}.attn.to_{x}" for x in "qkv")
        if layout == "compvis":  # convolutions over the pixels as a sequence
            heads = 1 if new_order else s["num_heads"] or c // s["head_dim"]
            keys.extend(both(f"{ours}.norm", f"{theirs}.norm"))
            keys.extend(both(qkv, f"{theirs}.qkv", heads=heads, extra=-1))
            keys.extend(both(f"{ours}.attn.to_out", f"{theirs}.proj_out", extra=-1))
        else:
            keys.extend(both(f"{ours}.norm", f"{theirs}.group_norm"))
            for name in qkv:
                keys.extend(both(name, f"{theirs}.{name[-4:]}"))
            keys.extend(both(f"{ours}.attn.to_out", f"{theirs}.to_out.0"))

    for i, n in ((0, 1), (2, 2)):
        add(f"time_embed.{i}", f"time_embed.{i}", f"time_embedding.linear_{n}")
    if s["num_classes"]:
        keys.append(Key(("class_embed.weight",), ("label_emb.weight", "class_embedding.weight")[column - 1]))
    add("input_blocks.0.0", "input_blocks.0.0", "conv_in")
    k, c, kept = 1, s["channels"], [s["channels"]]
    for level, width in enumerate(widths):
        theirs = f"down_blocks.{level}"
        for j in range(blocks[level]):
            block(c, width, *[f"input_blocks.{k}.0"] * 2, f"{theirs}.resnets.{j}")
            c = width
            if 2**level in s["attention_ds"]:
                attention(c, *[f"input_blocks.{k}.1"] * 2, f"{theirs}.attentions.{j}")
            kept, k = [*kept, c], k + 1
        if level < levels - 1:
            if s["resblock_updown"]:
                block(c, c, *[f"input_blocks.{k}.0"] * 2, f"{theirs}.downsamplers.0")
            elif s["resample"] == "conv":
                add(f"input_blocks.{k}.0.conv", f"input_blocks.{k}.0.op", f"{theirs}.downsamplers.0.conv")
            kept, k = [*kept, c], k + 1
    block(c, c, *["middle_block.0"] * 2, "mid_block.resnets.0")
    if s["middle_attention"]:
        attention(c, *["middle_block.1"] * 2, "mid_block.attentions.0")
    block(c, c, f"middle_block.{1 + s['middle_attention']}", "middle_block.2", "mid_block.resnets.1")
    k = 0
    for level, width in reversed(list(enumerate(widths))):
        theirs = f"up_blocks.{levels - 1 - level}"
        for j in range(blocks[level] + 1):
            block(c + kept.pop(), width, *[f"output_blocks.{k}.0"] * 2, f"{theirs}.resnets.{j}")
            c, at = width, 1
            if 2**level in s["attention_ds"]:
                attention(c, *[f"output_blocks.{k}.1"] * 2, f"{theirs}.attentions.{j}")
                at = 2
            if level and j == blocks[level]:
                if s["resblock_updown"]:
                    block(c, c, *[f"output_blocks.{k}.{at}"] * 2, f"{theirs}.upsamplers.0")
                elif s["resample"] == "conv":
                    add(*[f"output_blocks.{k}.{at}.conv"] * 2, f"{theirs}.upsamplers.0.conv")
            k += 1
    add("norm_out", "out.0", "conv_norm_out")
    add("conv_out", "out.2", "conv_out")
    return keys


def text_keys(blocks, layout):
    """[Key, ...] of CLIP's text tower with so many blocks; layout: transformers (below text_model) | open_clip."""
    column = ("transformers", "open_clip").index(layout) + 1
    names = ("", "embeddings.token_embedding.weight", "token_embedding.weight")
    keys = [Key(("token_embedding.weight",), names[column])]
    names = ("", "embeddings.position_embedding.weight", "positional_embedding")
    keys += [Key(("position_embedding",), names[column])]
    for i in range(blocks):
        ours, theirs = f"blocks.{i}", ("", f"encoder.layers.{i}", f"transformer.resblocks.{i}")[column]
        for names in TEXT_BLOCK:
            keys += both(f"{ours}.{names[0]}", f"{theirs}.{names[column]}")
        if layout == "open_clip":
            qkv = tuple(f"{ours}.attn.to_{x}" for x in "qkv")
            for kind in ("weight", "bias"):
                keys += [Key(tuple(f"{name}.{kind}" for name in qkv), f"{theirs}.attn.in_proj_{kind}")]
        else:
            for x in "qkv":
                keys += both(f"{ours}.attn.to_{x}", f"{theirs}.self_attn.{x}_proj")
    return keys + list(both("norm_out", ("", "final_layer_norm", "ln_final")[column]))
