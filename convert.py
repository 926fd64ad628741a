"""Checkpoints into models: finds the file, says what is wrong with it, builds what it holds.

    VAE.from_pretrained("out/vae")        # ends up in load_vae
    UNet.from_pretrained("out/ldm")       # in load_unet
    sample.load_pipeline("out/ldm")       # in load_denoiser, load_vae and load_tower

    python convert.py --ckpt=out/ldm --to=diffusers --out=DIR                # ours out: a folder for diffusers
    python convert.py --ckpt=out/ldm --to=compvis --out=model.safetensors    # or one file in CompVis' names

It reads this repository's own files and those of diffusers, transformers, CompVis, Stability, OpenCLIP and OpenAI: what
tensor shapes show is inferred, what their configs tell is read, what is left is asked for by name. The key tables below
go both ways.
"""

import functools
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import sys
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configurator import configure
from data.shards import rename, sync


def find_checkpoint(path):
    """The .safetensors file that path names: itself, or latest.safetensors in it; or another's file or folder."""
    path = local(path)
    if os.path.isdir(path):
        file = os.path.join(path, "latest.safetensors")
        if not os.path.exists(file):
            if any(os.path.exists(os.path.join(path, name)) for name in ("config.json", "model_index.json")):
                return path
            raise FileNotFoundError(f"{path} holds no latest.safetensors: train first, or name a checkpoint file")
        return file
    if not os.path.exists(path):
        raise FileNotFoundError(f"checkpoint {path} is not there: name a .safetensors file or the out_dir of a run")
    return path


def read_checkpoint(path, *prefixes):
    """(tensors below any of `prefixes`, meta) of a checkpoint of ours; ValueError says what is wrong with it."""
    file = find_checkpoint(path)
    try:
        if os.path.isdir(file):
            raise ValueError(f"{file} is another's folder, not a checkpoint of this repository")
        with safe_open(file, framework="pt") as f:
            stored = f.metadata() or {}
            text = stored.get("latent_diffusion")
            if text is None:
                raise ValueError(f"{file} is not a checkpoint of this repository")
            if str(zlib.crc32(text.encode())) != stored.get("crc32"):
                raise ValueError(f"{file} is damaged: its settings do not match their checksum")
            meta = json.loads(text)
            if not isinstance(meta, dict) or meta.get("format") != 1:
                found = meta.get("format") if isinstance(meta, dict) else "no settings"
                raise ValueError(f"{file} has format {found}, this code reads 1: use the code that wrote it")
            wanted = tuple(f"{prefix}." for prefix in prefixes)
            return {name: f.get_tensor(name) for name in f.keys() if name.startswith(wanted)}, meta
    except (OSError, SafetensorError, json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{file} is no checkpoint, or one cut short ({e})") from None


def describe(path):
    """What tells a checkpoint from another, as JSON has it: the meta of ours, names and sizes of another's files."""
    path = find_checkpoint(path)
    if is_ours(path):
        return read_checkpoint(path)[1]
    files = [os.path.join(at, name) for at, _, names in os.walk(path) for name in names] or [path]
    return {file: os.path.getsize(file) for file in sorted(files)}


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


def says_what_is_wrong(load):
    """For functions that build models: settings or tensors that fit nothing, of an altered file, are one line too."""

    @functools.wraps(load)
    def careful(*args, **options):
        try:
            return load(*args, **options)
        except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError) as e:
            path = next((a for a in args if isinstance(a, str | os.PathLike)), "the file")
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            raise ValueError(f"{path} is damaged: its settings and tensors fit no model ({reason})") from None

    return careful


def check_fit(cls, settings, state, **more):
    """ValueError where a model of these settings would not take this state dict, found out without its memory."""

    def numbers(value):
        return [n for v in value for n in numbers(v)] if isinstance(value, (list, tuple)) else [value]

    for name, value in settings.items():
        deep = name in ("num_res_blocks", "transformer_depth", "layers")  # so many modules
        most = len(state) if deep else 2**20
        if len(numbers(value)) > 1000 or any(isinstance(n, (int, float)) and n > most for n in numbers(value)):
            raise ValueError(f"{name}={str(value)[:50]} is more than a file of {len(state)} tensors can be of")
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in cls(**settings, **more).state_dict().items()}
    for name in sorted(shapes.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else "not there"
        if shapes.get(name) != found:
            raise ValueError(f"{name} is {found} in the file, {shapes.get(name, 'not there')} by its settings")


@says_what_is_wrong
def load_vae(cls, path, **settings):
    """The EMA autoencoder of a stage-1 checkpoint, or the first stage inside a stage-2 checkpoint, or another's."""
    path = local(path)
    if os.path.exists(path) and not is_ours(path):
        return load_foreign_vae(cls, path, **settings)
    _, meta = read_checkpoint(path)
    own, prefix = (meta["model"], "ema") if meta["stage"] == "vae" else (meta["vae"], "vae")
    if own is None:
        raise ValueError(f"{path} was trained on pixels: it holds no autoencoder")
    if meta.get("snapshot"):
        snapshot, path = path, os.path.join(os.path.dirname(find_checkpoint(path)), "latest.safetensors")
        if not os.path.exists(path) or read_checkpoint(path)[1].get("run") != meta["run"]:
            raise ValueError(f"{snapshot}'s autoencoder is in the latest.safetensors of its run: put that beside it")
    check_settings(path, tuples(own), settings)
    state = part(read_checkpoint(path, prefix)[0], prefix)
    check_fit(cls, tuples(own), state)
    vae = cls(**tuples(own))
    vae.load_state_dict(state)
    return vae.requires_grad_(False).eval()


@says_what_is_wrong
def load_unet(cls, path, **settings):
    """The EMA U-Net of a stage-2 checkpoint, or another's."""
    path = local(path)
    if os.path.exists(path) and not is_ours(path):
        return load_foreign_unet(cls, path, **settings)
    tensors, meta = read_checkpoint(path, "ema.unet")
    if meta["stage"] != "ldm":
        raise ValueError(f"{path} is an autoencoder (stage 1): it holds no U-Net")
    own = tuples(meta["model"]["unet"])
    check_settings(path, own, settings)
    check_fit(cls, own, part(tensors, "ema.unet"))
    unet = cls(**own)
    unet.load_state_dict(part(tensors, "ema.unet"))
    return unet.requires_grad_(False).eval()


@says_what_is_wrong
def load_text_encoder(cls, path, **settings):
    """The EMA text encoder trained inside a stage-2 checkpoint, or None where there is none."""
    tensors, meta = read_checkpoint(path, "ema.text", "text")
    own = meta["model"]["text"] if meta["stage"] == "ldm" else None
    if own is None:
        raise ValueError(f"{path} holds no text encoder")
    check_settings(path, own, settings)
    check_fit(cls, own, part(tensors, "ema.text"), tokenizer=bytes(tensors["text.bpe"].tolist()))
    text = cls(**own, tokenizer=bytes(tensors["text.bpe"].tolist()))
    text.load_state_dict(part(tensors, "ema.text"))
    return text.requires_grad_(False).eval()


def load_clip(cls, path, name="", merges=None):
    """A CLIP text tower from a file of its state dict in this repository's names, or from another's file or folder."""
    path = local(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"the text tower {path} is not there: name a file or folder of {name or 'its'} weights")
    return load_foreign_clip(cls, path, name, merges)


def posthoc_ema(path, std):
    """The `ema.*` tensors of an average over a run of relative length `std`, from the snapshots that it kept.

    path: its out_dir, or the snapshot it shall end at; else it ends at the last. Snapshots of another run, which a
    folder used twice may hold, are left alone. They hold averages of the weights at several steps and of several
    lengths (train_ldm.py --ema_stds --snapshot_every). The profile asked for is their combination that is nearest by
    least squares (Karras et al. 2024, EDM2, arXiv 2312.02696, section 3.2).
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    files = sorted(name for name in os.listdir(folder) if re.fullmatch(r"ema_\d+\.safetensors", name))
    if os.path.basename(path) in files:
        files = files[: files.index(os.path.basename(path)) + 1]
    steps, gammas, sources = [], [], []
    latest = os.path.join(folder, "latest.safetensors")
    newest = latest if os.path.exists(latest) else os.path.join(folder, files[-1]) if files else None
    run = read_checkpoint(newest)[1].get("run") if newest else None
    for name in files:
        _, meta = read_checkpoint(f"{folder}/{name}")
        if meta.get("run") != run:
            continue
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


@functools.cache  # training asks for it at every step
def power_exponent(std):
    """gamma of the power profile, weights ~ t^gamma over a run's steps, whose relative deviation is std in (0, 0.28].

    EDM2, section 3.1: std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    return np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max()


def profile_products(t_a, gamma_a, t_b, gamma_b):
    """Inner products of the profiles p(s) = (gamma + 1) / t (s / t)^gamma on [0, t]; arrays that broadcast."""
    shorter = np.where(t_a < t_b, (t_a / t_b) ** gamma_b, (t_b / t_a) ** gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shorter / np.maximum(t_a, t_b)


@says_what_is_wrong
def load_denoiser(path, ema_std=0.0):
    """The EMA unet.Denoiser of a stage-2 checkpoint: the U-Net with all that was trained beside it.

    ema_std: above 0, a post-hoc EMA of that relative width from the snapshots beside the file; see posthoc_ema.
    """
    from text import TextEncoder
    from unet import Denoiser, Rescaler, UNet

    tensors, meta = read_checkpoint(path, "text", *(() if ema_std else ("ema",)))
    if meta["stage"] != "ldm":
        raise ValueError(f"{path} is an autoencoder (stage 1): it holds no U-Net")
    model = meta["model"]
    bpe = tensors.pop("text.bpe", None)
    if ema_std:
        tensors = posthoc_ema(find_checkpoint(path), ema_std)
    ema = part(tensors, "ema")
    check_fit(UNet, tuples(model["unet"]), part(ema, "unet"))
    if model["text"]:
        check_fit(TextEncoder, model["text"], part(ema, "text"), tokenizer=bytes(bpe.tolist()))
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


@says_what_is_wrong
def load_tower(path, weights="", merges=""):
    """The frozen text encoder that a stage-2 checkpoint was trained with, or None; its weights lie outside of the file.

    weights, merges: where they and the tokenizer's lie now, if no longer where training found them.
    """
    _, meta = read_checkpoint(path)
    name = meta["model"].get("text_encoder", "joint")
    if name == "joint" or meta["model"]["cond"] != "text":
        return None
    from text import CLIPTextEncoder

    weights, merges = weights or meta["config"]["tower_weights"], merges or meta["config"]["clip_vocab"]
    try:
        weights = local(weights)  # training takes the id of a Hugging Face repository, too
    except FileNotFoundError:
        pass
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


# --- settings from shapes ---

# What the published models' U-Nets look like, and what their files do not tell: heads, process, scale, latents' side.
# REFERENCE: the configurations in CompVis/latent-diffusion, CompVis/stable-diffusion, Stability-AI/stablediffusion.
SD = dict(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, scale=0.18215, side=64)
LDM = dict(objective="eps", schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, scale=1.0, side=64)
RELEASES = [
    # Stable Diffusion 1 and its inpainting model
    (dict(channels=320, context_dim=768, linear_proj=False), dict(num_heads=8, objective="eps", **SD)),
    # Stable Diffusion 2: inpainting and depth; the others predict eps (512 px) or v (768 px), which no file tells
    (
        dict(channels=320, context_dim=1024, linear_proj=True, concat_channels=5),
        dict(head_dim=64, objective="eps", **SD),
    ),
    (
        dict(channels=320, context_dim=1024, linear_proj=True, concat_channels=1),
        dict(head_dim=64, objective="eps", **SD),
    ),
    (dict(channels=320, context_dim=1024, linear_proj=True), dict(head_dim=64, **SD)),
    # its x4 upscaler
    (
        dict(channels=256, context_dim=1024, linear_proj=True, num_classes=1000),
        dict(num_heads=8, objective="v", **SD) | dict(beta_start=1e-4, beta_end=0.02, scale=0.08333, side=128),
    ),
    # LDM: text (1.4B), class (cin256-v2), text (256), class (LDM-8)
    (dict(channels=320, context_dim=1280), dict(num_heads=8, objective="eps", **SD) | dict(side=32)),
    (dict(channels=192, channel_mult=(1, 2, 3, 5), context_dim=512), LDM | dict(num_heads=1)),
    (dict(channels=192, channel_mult=(1, 2, 3, 5), context_dim=640), LDM | dict(head_dim=32)),
    (dict(channels=256, channel_mult=(1, 2, 4), context_dim=512), LDM | dict(head_dim=32, side=32)),
    # LDM: unconditional (CelebA-HQ, FFHQ, LSUN bedrooms; churches)
    (dict(channels=224, channel_mult=(1, 2, 3, 4), transformer_depth=0), LDM | dict(head_dim=32)),
    (
        dict(channels=192, channel_mult=(1, 2, 2, 4, 4), resblock_updown=True),
        LDM | dict(num_heads=8, beta_end=0.0155, side=32, scale=None),
    ),
    # LDM: layouts, semantic maps, super-resolution, inpainting
    (dict(channels=128, transformer_depth=3, context_dim=512), LDM | dict(head_dim=32, beta_end=0.0205)),
    (dict(channels=128, channel_mult=(1, 4, 8), concat_channels=3), LDM | dict(num_heads=8, beta_end=0.0205)),
    (dict(channels=160, channel_mult=(1, 2, 2, 4), concat_channels=3), LDM | dict(head_dim=32, beta_end=0.0155)),
    (dict(channels=256, concat_channels=4, resblock_updown=True), LDM | dict(num_heads=8, beta_end=0.0205)),
]


def release_of(settings):
    """What is known of the published model whose U-Net has these settings: {} where none does."""
    for looks, known in RELEASES:
        if all(settings[name] == value for name, value in looks.items()):
            return known
    return {}


def count(state, name):
    """How many of the numbers 0, 1, ... put into `name` give tensors of the state dict."""
    n = 0
    while name.format(n) in state:
        n += 1
    return n


def multiples(widths, ch):
    if not widths or any(width % ch for width in widths):
        raise ValueError(f"levels of {widths} channels behind one of {ch}: that is no architecture known here")
    return tuple(width // ch for width in widths)


def infer_vae_settings(state):
    """(settings, layout) of an autoencoder's state dict in CompVis' or diffusers' names; norm_groups is assumed."""
    layout = "diffusers" if "encoder.down_blocks.0.resnets.0.conv1.weight" in state else "compvis"
    down, block, attention, middle = (
        ("encoder.down_blocks.{}", "resnets", "attentions.0.group_norm", "encoder.mid_block.attentions.0.group_norm")
        if layout == "diffusers"
        else ("encoder.down.{}", "block", "attn.0.norm", "encoder.mid.attn_1.norm")
    )
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", f"{down.format(0)}.{block}.0.conv1.weight")
    for name in needed:
        if name not in state:
            raise ValueError(f"there is no {name}: it is no autoencoder of this kind")
    levels = count(state, f"{down}.{block}.0.conv1.weight")
    widths = [len(state[f"{down.format(i)}.{block}.0.conv1.weight"]) for i in range(levels)]
    ch, z_channels = len(state["encoder.conv_in.weight"]), state["decoder.conv_in.weight"].shape[1]
    settings = dict(ch=ch, ch_mult=multiples(widths, ch), z_channels=z_channels, resolution=256)
    settings["num_res_blocks"] = count(state, f"{down.format(0)}.{block}.{{}}.conv1.weight")
    attending = [i for i in range(levels) if f"{down.format(i)}.{attention}.weight" in state]
    settings["attn_resolutions"] = tuple(256 // 2**i for i in attending)
    settings["mid_attention"] = f"{middle}.weight" in state
    settings["latent_proj"] = "post_quant_conv.weight" in state
    embed_dim = state["post_quant_conv.weight"].shape[1] if settings["latent_proj"] else z_channels
    settings["embed_dim"] = 0 if embed_dim == z_channels else embed_dim
    if "quantize.embedding.weight" in state:
        settings |= dict(bottleneck="vq", codebook_size=len(state["quantize.embedding.weight"]))
    return settings, layout


def infer_unet_settings(state):
    """(settings, layout) of a U-Net's state dict in CompVis' or diffusers' names; heads, norm_groups are not known."""
    layout = "compvis" if "input_blocks.0.0.weight" in state else "diffusers"
    levels = []  # (width, blocks on the way down, prefix of an attention or None, prefix of a resampler)
    if layout == "compvis":
        conv_in, conv_out, middle = "input_blocks.0.0.weight", "out.2.weight", "middle_block.1"
        emb, labels, resampled = "middle_block.0.emb_layers.1.weight", "label_emb.weight", "in_layers.0.weight"
        n = blocks = 0
        total = count(state, "output_blocks.{}.0.in_layers.0.weight")
        for n in range(total):
            stage, blocks = f"output_blocks.{n}", blocks + 1
            attention = f"{stage}.1" if f"{stage}.1.norm.weight" in state else None
            last = f"{stage}.{2 if attention else 1}"
            if f"{last}.conv.weight" in state or f"{last}.{resampled}" in state or n == total - 1:
                levels.insert(0, (len(state[f"{stage}.0.in_layers.2.weight"]), blocks - 1, attention, last))
                blocks = 0
    else:
        conv_in, conv_out, middle = "conv_in.weight", "conv_out.weight", "mid_block.attentions.0"
        emb, labels = "mid_block.resnets.0.time_emb_proj.weight", "class_embedding.weight"
        resampled = "norm1.weight"
        for i in range(count(state, "down_blocks.{}.resnets.0.conv1.weight")):
            attention = f"down_blocks.{i}.attentions.0"
            has_attention = f"{attention}.norm.weight" in state or f"{attention}.group_norm.weight" in state
            n, width = (
                count(state, f"down_blocks.{i}.resnets.{{}}.conv1.weight"),
                f"down_blocks.{i}.resnets.0.conv1.weight",
            )
            attention = attention if has_attention else None
            levels.append((len(state[width]), n, attention, f"down_blocks.{i}.downsamplers.0"))
    for name in (conv_in, conv_out, emb):
        if name not in state or not levels:
            raise ValueError(f"there is no {name}: it is no U-Net of this kind")
    channels, shown = state[conv_in].shape[:2]
    out_channels = len(state[conv_out])
    if shown < out_channels:
        raise ValueError(f"it takes {shown} channels and gives {out_channels}: that is no architecture known here")
    widths = [level[0] for level in levels]
    s = dict(in_channels=out_channels, out_channels=out_channels, concat_channels=shown - out_channels)
    s |= dict(channels=channels, channel_mult=multiples(widths, channels))
    blocks = tuple(level[1] for level in levels)
    s["num_res_blocks"] = blocks[0] if len(set(blocks)) == 1 else blocks
    s["attention_ds"] = tuple(2**i for i, level in enumerate(levels) if level[2])
    s["middle_attention"] = f"{middle}.norm.weight" in state or f"{middle}.group_norm.weight" in state
    s["scale_shift"] = len(state[emb]) == 2 * widths[-1]
    s["resblock_updown"] = any(f"{level[3]}.{resampled}" in state for level in levels)
    s["num_classes"] = len(state[labels]) if labels in state else 0
    # attention: plain, or a transformer, whose keys show what it looks at
    attentions = [(level[0], level[2]) for level in levels if level[2]]
    attentions += [(widths[-1], middle)] if s["middle_attention"] else []
    s |= dict(transformer_depth=0, context_dim=0, linear_proj=False)
    if attentions and f"{attentions[0][1]}.proj_in.weight" in state:
        s["transformer_depth"] = count(state, f"{attentions[0][1]}.transformer_blocks.{{}}.norm1.weight")
        s["linear_proj"] = state[f"{attentions[0][1]}.proj_in.weight"].ndim == 2
        to_k = [
            [state[f"{at}.transformer_blocks.0.attn{n}.to_k.weight"].shape[1] for _, at in attentions] for n in (1, 2)
        ]
        is_self = [to_k[1][i] == width for i, (width, _) in enumerate(attentions)]
        s["context_dim"] = 0 if all(is_self) and len(set(to_k[1])) > 1 else to_k[1][0]
        first = {at: width == dim for (width, at), dim in zip(attentions, to_k[0])}
        s["self_attention"] = tuple(first.get(level[2], True) for level in levels)
        if all(s["self_attention"]):
            s["self_attention"] = True
    if not attentions:
        s |= dict(num_heads=1, head_dim=0)
    return s, layout


# --- other people's files ---

PREFIXES = {"vae": "first_stage_model.", "unet": "model.diffusion_model.", "text": "cond_stage_model."}
FOLDERS = {"vae": ("vae", "vqvae"), "unet": ("unet",), "text": ("text_encoder", "bert")}
NAMES = {"vae": "autoencoder", "unet": "U-Net", "text": "text encoder"}
# what Lightning's files name beside tensors; they get stand-ins that do nothing
INERT = (
    r"(pytorch_lightning|lightning|lightning_fabric)\..*|_codecs\.encode|numpy\.dtype|numpy\._?core\.multiarray\.scalar"
)


class Inert:
    """Stands in for an object that a pickle names, does nothing and knows nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def is_ours(path):
    """Whether path, a file or folder that is there, is a checkpoint of this repository."""
    if os.path.isdir(path):
        return not any(os.path.exists(os.path.join(path, name)) for name in ("config.json", "model_index.json"))
    if not path.endswith(".safetensors"):
        return False
    try:
        with safe_open(path, framework="pt") as f:
            return "latent_diffusion" in (f.metadata() or {})
    except (OSError, SafetensorError):
        return True  # read_checkpoint says what is wrong with it


def local(path):
    """path itself, or for the id of a Hugging Face repository (owner/name) the folder that it was fetched to."""
    path = os.fspath(path)
    owner = path.split("/")[0]
    if (
        os.path.exists(path)
        or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)
        or os.path.isdir(owner)
        or owner == "out"
    ):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{path} is not there; if it is a Hugging Face id, fetch it (pip install huggingface_hub; "
            f"hf download {path} --local-dir {path}) and run again"
        ) from None
    kinds, skipped = (
        ["*.json", "*/*.json", "*/merges.txt", "merges.txt"],
        ["*.fp16.*", "*.non_ema.*", "*/safety_checker/*"],
    )
    try:
        for weights in ("*.safetensors", "*.bin"):
            inside = ["/".join(("*", weights)), f"diffusion_pytorch_model{weights[1:]}", f"model{weights[1:]}"]
            folder = snapshot_download(path, allow_patterns=kinds + inside, ignore_patterns=skipped)
            if any(name.endswith(weights[1:]) for _, _, names in os.walk(folder) for name in names):
                break
        return folder
    except (OSError, ValueError) as e:  # what the hub's errors are
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise FileNotFoundError(f"{path} is not there, and Hugging Face does not give it ({reason})") from None


def read_tensors(path):
    """All tensors of a .safetensors file or of a pickle (Lightning's too), in which no code is run."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is not there: name a file, a folder or the id of a Hugging Face repository")
    if path.endswith(".safetensors"):
        try:
            with safe_open(path, framework="pt") as f:
                return {name: f.get_tensor(name) for name in f.keys()}
        except (OSError, SafetensorError) as e:
            raise ValueError(f"{path} is no .safetensors file, or one cut short ({e})") from None
    zipped = zipfile.is_zipfile(path)  # the pickles of before torch 1.6 are not, and name no code that is let through
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        code = [name for name in named if not re.fullmatch(INERT, name)]
        if not code:
            with torch.serialization.safe_globals([(type("Inert", (Inert,), {}), name) for name in named]):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # a file that is something else can raise anything
        code = re.findall(r"GLOBAL (\S+)", str(e))
        if not code:
            script = "a TorchScript archive: save its state dict" if "TorchScript" in str(e) else ""
            reason = script or "neither .safetensors nor a dict of tensors as torch.save writes it"
            raise ValueError(f"{path} is no checkpoint, or one cut short ({reason})") from None
    if code:
        raise ValueError(f"{path} holds {', '.join(code[:3])}, code that would be run: it is not read")
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    if not state:
        raise ValueError(f"{path} holds no tensors by name: save a state dict")
    return state


def read_folder(folder):
    """(tensors, config) of a model's folder as diffusers and transformers save it: whole or in shards."""
    if not os.path.exists(f"{folder}/config.json"):
        raise ValueError(f"{folder} holds neither config.json nor model_index.json: name the model's own folder")
    stems, kinds = ("diffusion_pytorch_model", "model", "pytorch_model"), (".safetensors", ".bin")
    names = [f"{stem}{kind}{index}" for kind in kinds for index in ("", ".index.json") for stem in stems]
    names += [f"{stem}{end}" for kind in kinds for end in (f".fp16{kind}", f"{kind}.index.fp16.json") for stem in stems]
    name = next((name for name in names if os.path.exists(f"{folder}/{name}")), None)
    if name is None:
        raise ValueError(f"{folder} holds no weights: {names[0]} or the like is missing, fetch it again")
    if not name.endswith(".json"):
        return read_tensors(f"{folder}/{name}"), read_json(f"{folder}/config.json")
    state, told = {}, read_json(f"{folder}/{name}").get("weight_map", {})
    for shard in sorted(set(told.values())):
        if not os.path.exists(f"{folder}/{shard}"):
            raise ValueError(f"{folder} lacks the shard {shard} that {name} names: fetch it again")
        state |= read_tensors(f"{folder}/{shard}")
    lost = sorted(set(told) - set(state))
    if lost:
        raise ValueError(f"{folder}: {name} names {lost[0]}, which is in none of its shards: fetch it again")
    return state, read_json(f"{folder}/config.json")


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read ({e}): fetch it again") from None


def read_part(path, part):
    """(tensors, config or {}, all tensors of the file) of the vae, unet or text in another's file or folder."""
    if os.path.isdir(path):
        folder = path
        if os.path.exists(f"{path}/model_index.json"):
            folder = next((f"{path}/{name}" for name in FOLDERS[part] if os.path.isdir(f"{path}/{name}")), None)
            if folder is None:
                raise ValueError(f"{path} holds no {NAMES[part]} ({' or '.join(FOLDERS[part])})")
        state, config = read_folder(folder)
        everything = state
    else:
        everything = read_tensors(path)
        state, config = select_part(everything, part, path), {}
        beside = os.path.join(os.path.dirname(path), "config.json")
        diffusers, transformers = "down_blocks.0.resnets.0.conv1", ("text_model.", "embeddings.token_embedding")
        if os.path.exists(beside) and any(diffusers in name or name.startswith(transformers) for name in state):
            config = read_json(beside)
    if any("lora_" in name or ".lora." in name or "hada_" in name for name in everything):
        raise ValueError(f"{path} is a LoRA, an addition to a model's weights: merge it into them first")
    if part == "unet":
        for name in ("label_emb.0.0.weight", "add_embedding.linear_1.weight"):
            if name in state:
                raise ValueError(f"{path} is SDXL's U-Net (it has {name}), which is not supported: its VAE is")
    # diffusers' older names of an attention's layers
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    old = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
    matches = {name: old.fullmatch(name) for name in state}
    state = {f"{m[1]}.{renamed[m[2]]}.{m[3]}" if m else name: state[name] for name, m in matches.items()}
    return state, config, everything


def select_part(everything, part, path):
    """The tensors of vae, unet or text in a CompVis file, without their prefix; the EMA's where there are any."""
    prefix = PREFIXES[part]
    if not any(name.startswith(tuple(PREFIXES.values())) for name in everything):
        state, before = everything, ""  # one model alone
    else:
        state = {name[len(prefix) :]: t for name, t in everything.items() if name.startswith(prefix)}
        before = "diffusion_model." if part == "unet" else None
        if not state:
            raise ValueError(f"{path} holds no {NAMES[part]}: there is nothing below {prefix}")
    averages = {name: t for name, t in everything.items() if name.startswith("model_ema.")}
    if averages and before is not None:  # LitEma took the dots out of the names
        dotless = {}
        for name in state:
            short = "model_ema." + (before + name).replace(".", "")
            if short in averages and short in dotless:
                raise ValueError(f"{path}: {short} may be {dotless[short]} or {name}: its average cannot be told")
            dotless[short] = name
        state = state | {dotless[short]: t for short, t in averages.items() if short in dotless}
    if part == "vae" and state is not None:
        return {name: t for name, t in state.items() if not name.startswith(("loss.", "model_ema."))}
    return {name: t for name, t in state.items() if not name.startswith("model_ema.")} if averages else state


def refuse(config, path, **wanted):
    """ValueError where a config has another value than the only one that is built here."""
    for name, value in wanted.items():
        if name in config and config[name] != value:
            raise ValueError(f"{path} has {name}={config[name]!r}: only {value!r} is supported")


def combine(path, inferred, told):
    """Settings, of which `told` adds to what the shapes say but must not contradict it."""
    rows = [f"{k}: {inferred[k]} by its shapes, {v} asked for" for k, v in told.items() if inferred.get(k, v) != v]
    if rows:
        raise ValueError(f"{path} tells its own settings ({'; '.join(rows)}): leave them out")
    return inferred | told


def build(model_class, settings, ours, what):
    """The model in eval mode, frozen, with weights of its own in float32."""
    with torch.device("meta"):
        model = model_class(**settings)
    for name, t in model.state_dict().items():
        if name in ours and ours[name].shape != t.shape:
            found, wanted = tuple(ours[name].shape), tuple(t.shape)
            raise ValueError(f"{what}: {name} is {found}, its others want {wanted}: that is no architecture known here")
    ours = {name: t.detach().to(torch.float32, copy=True).contiguous() for name, t in ours.items()}
    model.load_state_dict(ours, assign=True)
    return model.requires_grad_(False).eval()


def named_error(path, e):
    return ValueError(f"{path}: {e}")


def load_foreign_vae(cls, path, scaling_factor=None, **told):
    """The autoencoder in another's file or folder; scaling_factor: of its latents, where the file does not tell."""
    state, config, everything = read_part(path, "vae")
    refuse(config, path, act_fn="silu", norm_type="group", lookup_from_codebook=False, in_channels=3, out_channels=3)
    try:
        inferred, layout = infer_vae_settings(state)
    except ValueError as e:
        raise named_error(path, e) from None
    if "norm_num_groups" in config:
        inferred["norm_groups"] = config["norm_num_groups"]
    resolution = told.get("resolution", 256)
    if resolution != 256:
        inferred["attn_resolutions"] = tuple(side * resolution // 256 for side in inferred["attn_resolutions"])
        inferred["resolution"] = resolution
    settings = combine(path, inferred, tuples(told))
    ours = to_ours(state, vae_keys(complete(cls, settings), layout), path)
    channels = len(ours["quantize.embedding.weight"][0]) if "quantize.embedding.weight" in ours else None
    channels = channels or settings["embed_dim"] or settings["z_channels"]
    mean, std = vae_statistics(path, settings, config, everything, scaling_factor)
    ours["latent_mean"], ours["latent_std"] = (torch.as_tensor(t).expand(channels) for t in (mean, std))
    return build(cls, settings, ours, path)


def vae_statistics(path, settings, config, everything, scaling_factor):
    """(mean, std) of the latents, which others keep as one scale: numbers, a list for each channel, or NaN, unknown."""
    mean, std, known = 0.0, 1.0, {}
    if any(name.startswith(PREFIXES["unet"]) for name in everything):
        try:
            known = release_of(infer_unet_settings(select_part(everything, "unet", path))[0])
        except ValueError:  # not of a kind known here; its autoencoder may be
            pass
    scale = config.get("scaling_factor", scaling_factor)
    if scaling_factor is not None and scale != scaling_factor:
        raise ValueError(f"{path} has scaling_factor {scale}: leave scaling_factor={scaling_factor} out")
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])
    mean = config["shift_factor"] if config.get("shift_factor") else mean
    if scale is None and "scale_factor" in everything:  # scale_by_std
        scale = float(everything["scale_factor"])
    if scale is None and any(name.startswith("conditioner.embedders.") for name in everything):
        scale = 0.13025  # SDXL
    scale = known.get("scale") if scale is None else scale
    if scale is None and settings.get("bottleneck") == "vq":
        scale = 1.0  # LDM leaves them as they are
    if scale is None and settings["z_channels"] == 4 and len(settings["ch_mult"]) == 4:
        scale = 0.18215  # Stable Diffusion
    return mean, math.nan if scale is None else std / scale


def complete(cls, settings):
    """Settings with the defaults of the class."""
    defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    for name in settings:
        if name not in defaults:
            raise ValueError(f"{name} is no setting of {cls.__name__}: {', '.join(defaults)}")
    return defaults | settings


def load_foreign_unet(cls, path, new_attention_order=False, **told):
    """The U-Net in another's file or folder, with the EMA's weights where it has them.

    new_attention_order: see unet_keys.
    """
    state, config, _ = read_part(path, "unet")
    try:
        inferred, layout = infer_unet_settings(state)
    except ValueError as e:
        raise named_error(path, e) from None
    if config:
        inferred |= read_unet_config(config, path, inferred)
    if "num_heads" not in inferred and not (told.get("num_heads") or told.get("head_dim")):
        known = release_of(inferred)
        if not known:
            raise ValueError(f"{path} does not tell its number of heads: give num_heads=N or head_dim=N")
        inferred |= dict(num_heads=known.get("num_heads", 0), head_dim=known.get("head_dim", 0))
    elif told.get("num_heads") or told.get("head_dim"):
        told = dict(num_heads=0, head_dim=0) | told
    settings = combine(path, inferred, tuples(told))
    ours = to_ours(state, unet_keys(complete(cls, settings), layout, new_attention_order), path)
    return build(cls, settings, ours, path)


def read_unet_config(config, path, inferred):
    """The settings that only diffusers' config.json tells; ValueError for what is not built here."""
    one = dict(act_fn="silu", norm_eps=1e-5, mid_block_scale_factor=1, flip_sin_to_cos=True, freq_shift=0)
    one |= dict(downsample_padding=1, center_input_sample=False, dual_cross_attention=False, class_embed_type=None)
    one |= dict(addition_embed_type=None, encoder_hid_dim=None, time_embedding_type="positional", conv_in_kernel=3)
    one |= dict(conv_out_kernel=3, class_embeddings_concat=False, resnet_skip_time_act=False, time_cond_proj_dim=None)
    one |= dict(resnet_out_scale_factor=1.0, cross_attention_norm=None, attention_type="default")
    one |= dict(time_embedding_act_fn=None, timestep_post_act=None, mid_block_only_cross_attention=None)
    if not inferred["resblock_updown"]:
        one |= dict(downsample_type="conv", upsample_type="conv")
    refuse(config, path, **one)
    conditional = config.get("_class_name", "UNet2DConditionModel") == "UNet2DConditionModel"
    out = {"norm_groups": config.get("norm_num_groups") or 32}
    # a trap: UNet2DConditionModel calls the number of heads attention_head_dim, UNet2DModel means what it says
    given = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    widths = [inferred["channels"] * mult for mult in inferred["channel_mult"]]
    if not conditional:
        if given is None:
            out |= dict(num_heads=1, head_dim=0)
        else:
            out |= dict(num_heads=0, head_dim=given)
    elif isinstance(given, int) or len(set(given)) == 1:
        out |= dict(num_heads=given if isinstance(given, int) else given[0], head_dim=0)
    else:  # levels without attention have a number too, of no meaning
        used = [i for i in range(len(widths)) if 2**i in inferred["attention_ds"]]
        used += [len(widths) - 1] if inferred["middle_attention"] else []
        dims = {widths[i] / given[i] for i in used}
        if len(dims) > 1:
            raise ValueError(f"{path} has attention_head_dim={given}: neither its heads nor their width are the same")
        out |= dict(num_heads=0, head_dim=int(dims.pop())) if dims else {}
    only_cross = config.get("only_cross_attention", False)
    if only_cross is True:
        raise ValueError(f"{path} has only_cross_attention=True: only one value for each level is supported")
    if only_cross and any(only_cross):
        out["self_attention"] = tuple(not value for value in only_cross)
    return out


TOKENIZERS = ("tokenizer", ".", "../tokenizer")  # where a text encoder's may lie


def load_foreign_clip(cls, path, name="", merges=None):
    """CLIP's text tower in a file or folder of transformers, open_clip, OpenAI, CompVis, Stability or ours."""
    state, config, _ = read_part(path, "text")
    config = config.get("text_config", config)
    if "embedding.weight" in state and len(state) == 1:
        raise ValueError(f"{path} listens to classes: it holds no text encoder")
    if any("attn_layers." in key for key in state) or config.get("model_type") in ("ldmbert", "bert"):
        raise ValueError(f"{path} listens to LDM's BERT, which is not supported: only CLIP's text towers are")
    prefixes = ("transformer.text_model.", "text_model.", "model.", "text.", "transformer.embeddings", "")
    own = "position_embedding" in state
    prefix = next(p for p in prefixes if any(key.startswith(p) for key in state))
    prefix = "transformer." if prefix == "transformer.embeddings" else prefix
    state = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    layout = "transformers" if "embeddings.token_embedding.weight" in state else "open_clip"
    block = {
        "transformers": "encoder.layers.{}.layer_norm1.weight",
        "open_clip": "transformer.resblocks.{}.ln_1.weight",
    }
    blocks = count(state, "blocks.{}.norm1.weight" if own else block[layout])
    table = {"transformers": "embeddings.token_embedding.weight", "open_clip": "token_embedding.weight"}[layout]
    position = "position_embedding" if own else text_keys(0, layout)[1].theirs
    if not blocks or table not in state or position not in state:
        raise ValueError(f"{path} holds no text tower of CLIP's: neither transformers' names nor open_clip's are there")
    (vocab, width), length = state[table].shape, len(state[position])
    if layout == "open_clip" and not own and not name and width == 768:  # OpenAI's has QuickGELU, LAION's GELU
        raise ValueError(f"{path} may be OpenAI's ViT-L/14 or another's: give name=clip_l, or name=other")
    gelu = {known["width"] for known in cls.towers.values() if known["activation"] == "gelu"}
    openai = (layout == "transformers" and width not in gelu) or name == "clip_l" or (own and width == 768)
    s = dict(width=width, layers=blocks, heads=max(1, width // 64), length=length, vocab=vocab, layer="last")
    s |= dict(activation="quick_gelu", pad="end") if openai else dict(activation="gelu", pad="zero")
    if config:
        heads, activation = config.get("num_attention_heads", s["heads"]), config.get("hidden_act", "quick_gelu")
        refuse(config, path, layer_norm_eps=1e-5, intermediate_size=4 * width)
        s |= dict(heads=heads, activation=activation, pad="zero" if activation == "gelu" else "end")
    folders = [os.path.join(path, folder) for folder in TOKENIZERS] if os.path.isdir(path) else []
    special = next((f for f in folders if os.path.exists(f"{f}/tokenizer_config.json")), None)
    if special:
        pad = read_json(f"{special}/tokenizer_config.json").get("pad_token")
        if os.path.exists(f"{special}/special_tokens_map.json"):
            pad = read_json(f"{special}/special_tokens_map.json").get("pad_token", pad)
        pad = pad.get("content") if isinstance(pad, dict) else pad
        s["pad"] = "zero" if pad in ("!", "<|pad|>") else "end" if pad else s["pad"]
    if layout == "open_clip" and not openai and not own and blocks > 1:
        s["layer"] = "penultimate"  # as Stable Diffusion 2 listens to it
    for known in cls.towers.values():  # the published ones; a file may hold the block that is not used, or not
        held = known["layers"] - (known["layer"] == "penultimate")
        same = all(s[key] == known[key] for key in ("width", "heads", "activation", "pad"))
        s |= known if same and blocks in (held, known["layers"]) else {}
    tower = name_of_tower(cls, s)
    if name not in ("", "other", tower):
        found = f"{tower} of {blocks} blocks of width {width}"
        raise ValueError(f"{path} does not hold {name}'s weights but {found}: name the right one")
    if merges is None:
        merges = next((found for found in map(find_merges, folders) if found), None)
    held = s["layers"] - (s["layer"] == "penultimate")
    unused = re.compile(
        r"visual\..*|logit_scale|text_projection(\.weight)?|attn_mask|.*position_ids|"
        rf"(encoder\.layers|transformer\.resblocks|blocks)\.({'|'.join(map(str, range(held, blocks))) or 'x'})\..*"
    )
    state = {key: t for key, t in state.items() if not unused.fullmatch(key)}
    ours = state if own else to_ours(state, text_keys(held, layout), path)
    return build(cls, s | dict(merges=merges), ours, path)


def name_of_tower(cls, settings):
    """The published text tower that has these settings, or "other"."""
    towers = cls.towers.items()
    return next((name for name, known in towers if all(settings[key] == known[key] for key in known)), "other")


def find_merges(folder):
    """What CLIPTokenizer takes of a tokenizer's folder, or None: the folder, or the merges in a tokenizer.json."""
    if os.path.exists(f"{folder}/merges.txt"):
        return folder
    if not os.path.exists(f"{folder}/tokenizer.json"):
        return None
    merges = read_json(f"{folder}/tokenizer.json").get("model", {}).get("merges", [])
    lines = [line if isinstance(line, str) else " ".join(line) for line in merges]
    return "\n".join(["#version: 0.2", *lines, ""]).encode() if lines else None


# --- other people's pipelines ---

PROMPT = "a photograph of an astronaut riding a horse"  # drawn where nothing is asked for


def read_process(path, told):
    """Objective and noise schedule, in the names of train_ldm.py's settings, of a pipeline folder's scheduler."""
    config = read_json(f"{path}/scheduler/scheduler_config.json")
    names = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "squared_cosine"}
    names |= {"sigmoid": "sigmoid"}
    betas = config.get("trained_betas")
    table = {} if betas is None else schedule_of(torch.tensor(betas, dtype=torch.float64))
    if table is None or (not table and config.get("beta_schedule", "linear") not in names):
        raise ValueError(f"{path}: its {config.get('_class_name')} has a noise schedule that is not known here")
    refuse(config, path, num_train_timesteps=1000, use_flow_sigmas=False)
    kind, predicts = config.get("_class_name", ""), config.get("prediction_type", "epsilon")
    objective = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}.get(predicts)
    if objective is None or kind.startswith(("FlowMatch", "EDM", "KarrasVe", "ScoreSde")):  # these have no betas at all
        raise ValueError(f"{path} is drawn from by {kind} with prediction_type={predicts}, which is not supported")
    if told not in ("", objective):
        raise ValueError(f"{path} predicts {objective} by its scheduler's config: leave objective={told} out")
    process = {"objective": objective, "schedule": names.get(config.get("beta_schedule", "linear"))}
    process |= dict(beta_start=config.get("beta_start", 1e-4), beta_end=config.get("beta_end", 0.02))
    return process | table | dict(zero_snr=bool(config.get("rescale_betas_zero_snr", False)))


def process_of_file(path, everything, known, told, otherwise=""):
    """Likewise for a CompVis file: betas as it holds them, else those of the published model; objective as told."""
    process = {name: known.get(name) for name in ("objective", "schedule", "beta_start", "beta_end")}
    if "betas" in everything:
        table = schedule_of(everything["betas"].double())
        if table is None:
            raise ValueError(f"{path}: its betas are of no schedule known here")
        process |= table
    process["objective"] = told or process["objective"] or otherwise
    if not process["objective"]:
        raise ValueError(f"{path} does not tell what it predicts: set objective=v (SD 2 at 768 px) or eps (at 512 px)")
    if process["schedule"] is None:
        raise ValueError(f"{path} is no published model and holds no betas: its noise schedule cannot be told")
    return process | {"zero_snr": False}


def load_foreign(path, clip_vocab="", objective="", otherwise="", **settings):
    """(unet.Denoiser, VAE or None, CLIPTextEncoder or None, meta) of another's whole diffusion model.

    path: a pipeline folder of diffusers or a file of CompVis or Stability.  clip_vocab: of its tokenizer, if it is not
    there.  objective: eps | v, of a file, which does not tell; otherwise: where it is not known of the published model
    either.  settings: further ones of the U-Net, see load_foreign_unet.  meta: as in a checkpoint of ours.
    """
    from text import CLIPTextEncoder
    from unet import Denoiser, UNet
    from vae import VAE

    folder = os.path.isdir(path)
    index, everything = {}, {}
    if folder and not os.path.exists(f"{path}/model_index.json"):
        raise ValueError(f"{path} holds no model_index.json: name the folder of a whole pipeline")
    if folder:
        index = read_json(f"{path}/model_index.json")
        beyond = ("text_encoder_2", "prior", "image_normalizer", "depth_estimator", "transformer", "controlnet", "bert")
        for part in beyond:
            if index.get(part, [None])[0] is not None:
                raise ValueError(f"{path} is a {index.get('_class_name')} with a {part}, which is not supported")
    else:
        everything = read_tensors(path)
    unet = load_foreign_unet(UNet, path, **settings)
    s, known = unet.settings, release_of(unet.settings)
    if folder:
        process = read_process(path, objective)
        has_vae = any(os.path.isdir(f"{path}/{name}") for name in FOLDERS["vae"])
        has_text = os.path.isdir(f"{path}/text_encoder")
    else:
        process = process_of_file(path, everything, known, objective, otherwise)
        has_vae = any(name.startswith(PREFIXES["vae"]) for name in everything)
        has_text = any(name.startswith(PREFIXES["text"]) for name in everything)
    if process["schedule"] == "cosine":  # a table for others, with which their U-Net counts from 0
        unet.time_embed[0].weight.copy_(fold_time(unet.time_embed[0].weight, -1))
    vae = load_foreign_vae(VAE, path) if has_vae else None
    if vae is not None and not vae.has_latent_statistics:
        raise ValueError(f"{path} does not tell the scale of its latents, without which nothing can be drawn")
    if vae is not None and vae.latent_channels != s["in_channels"]:
        raise ValueError(
            f"{path}: its U-Net draws {s['in_channels']} channels, its autoencoder has {vae.latent_channels}"
        )

    # what it listens to
    tower = class_tokens = None
    cond, classes, shown = "none", 0, [None] * 4
    if has_text and not folder and f"{PREFIXES['text']}channel_mapper.weight" in everything:
        raise ValueError(f"{path} draws semantic maps as LDM folds them, which is not supported")
    table = everything.get(f"{PREFIXES['text']}embedding.weight")
    if table is not None:  # LDM's class as a token; the last one is no class
        if len(table) % 10 != 1:
            raise ValueError(f"{path} has {len(table)} classes and none for no class: it cannot be guided")
        class_tokens = torch.nn.Embedding.from_pretrained(table.float().clone())
        cond, classes = "class", len(table) - 1
        shown = list(range(0, classes, -(-classes // 8)))
    elif s["context_dim"]:
        if not has_text:
            raise ValueError(f"{path} listens to a text encoder that is not there")
        tower = load_foreign_clip(CLIPTextEncoder, path, merges=clip_vocab or None)
        if tower.width != s["context_dim"]:
            raise ValueError(f"{path}: its U-Net listens to width {s['context_dim']}, its text has {tower.width}")
        cond, shown = "text", [PROMPT]
    task, latents = {"task": "none"}, s["in_channels"]
    factor = vae.factor if vae else 1
    if s["concat_channels"] == 1 + latents and vae is not None and cond == "text":
        task = {"task": "inpaint"}
    elif s["concat_channels"] == 3 and vae is not None:
        task = {"task": "sr", "sr_scale": factor, "sr_noise": 0}
        if s["num_classes"]:
            low = f"{path}/low_res_scheduler/scheduler_config.json"
            low = read_json(low) if folder and os.path.exists(low) else {}
            betas = low.get("beta_start", 1e-4), low.get("beta_end", 0.02)
            task["sr_noise"] = index.get("max_noise_level", 350)
            task["sr_schedule"] = (low.get("beta_schedule", "scaled_linear"), *betas)
    elif s["concat_channels"]:
        raise ValueError(
            f"{path} is shown {s['concat_channels']} more channels, of which it is not known what they are"
        )
    if s["num_classes"] and task["task"] != "sr":
        raise ValueError(f"{path} has {s['num_classes']} classes; which is none of them is not known")
    side = known.get("side", 64)
    if folder:
        sides = read_json(f"{path}/unet/config.json").get("sample_size") or side
        side = sides if isinstance(sides, int) else sides[0]
    elif s["context_dim"] == 1024 and not s["concat_channels"] and process["objective"] == "v":
        side = 96
    model = {"unet": s, "text": None, "cond": cond, "num_classes": classes, "image_size": side * factor}
    model |= {"class_embed": "token" if class_tokens is not None else "add", **process, **task}
    model["text_encoder"] = name_of_tower(CLIPTextEncoder, tower.settings) if tower is not None else "joint"
    denoiser = Denoiser(unet, None, class_tokens).requires_grad_(False).eval()
    return denoiser, vae, tower, {"model": model, "vae": vae and vae.settings, "classes": [], "shown": shown}


# --- ours out: diffusers' folders and CompVis' files ---

# What a layout has no place for: (layouts, whether the settings have it, its name).
VAE_LIMITS = (
    ("diffusers compvis", lambda s: s["activation"] != "silu", "the autoencoder's activation=swiglu"),
    ("diffusers compvis", lambda s: s["downsample"] != "conv", "the autoencoder's downsample=avg or max"),
    ("diffusers compvis", lambda s: s["upsample"] != "nearest", "the autoencoder's upsample=bilinear or bicubic"),
    ("diffusers compvis", lambda s: s["linear_attention"], "the autoencoder's linear_attention"),
    ("diffusers compvis", lambda s: s["patch_size"] > 1, "the autoencoder's patch stem (patch_size)"),
    (
        "diffusers",
        lambda s: level_attention(s),
        "attention in the autoencoder's levels (attn_resolutions, as in kl-f16)",
    ),
    ("diffusers", lambda s: s["tanh_out"], "the autoencoder's tanh_out"),
    ("diffusers", lambda s: s["bottleneck"] == "kl" and latents_of(s) != s["z_channels"], "embed_dim != z_channels"),
    ("compvis", lambda s: s["norm_groups"] != 32, "the autoencoder's norm_groups, which are 32 there"),
)
UNET_LIMITS = (
    ("diffusers compvis", lambda s: s["unet_patch"] > 1, "unet_patch"),
    ("diffusers compvis", lambda s: s["context_pool"], "context_pool"),
    ("diffusers compvis", lambda s: s["qk_norm"], "qk_norm"),
    ("diffusers compvis", lambda s: s["linear_attention"], "the U-Net's linear_attention"),
    ("diffusers", lambda s: s["resample"] == "pool" and not s["resblock_updown"], "resample=pool"),
    ("diffusers", lambda s: s["transformer_depth"] and s["resblock_updown"], "resblock_updown with transformers"),
    (
        "diffusers",
        lambda s: s["transformer_depth"] and not s["middle_attention"],
        "transformers, but none in the middle",
    ),
    ("diffusers", lambda s: not s["transformer_depth"] and several(s["num_res_blocks"]), "num_res_blocks by level"),
    ("diffusers", lambda s: not s["transformer_depth"] and head_width(s) is None, "num_heads > 1 on several widths"),
    ("compvis", lambda s: s["transformer_depth"] and not s["context_dim"], "transformers without a context"),
    ("compvis", lambda s: not s["middle_attention"], "middle_attention=False"),
    ("compvis", lambda s: s["norm_groups"] != 32, "the U-Net's norm_groups, which are 32 there"),
)
MODEL_LIMITS = (
    ("diffusers compvis", lambda m: m["objective"] not in ("eps", "v", "x0"), "objective={objective}"),
    (
        "diffusers compvis",
        lambda m: not preserves_variance(m),
        "schedule={schedule}, where alpha^2 + sigma^2 is not 1",
    ),
    (
        "diffusers compvis",
        lambda m: m["objective"] == "eps" and table_of(m)[0][-1] == 0,
        "objective=eps on schedule={schedule}, which starts at t = 0.995",
    ),
    ("diffusers", lambda m: m["cond"] == "class" and m.get("class_embed") == "token", "class_embed=token"),
    ("diffusers", lambda m: m.get("task") == "semantic", "task=semantic, whose maps go through a rescaler"),
)


def several(value):
    return isinstance(value, (tuple, list)) and len(set(value)) > 1


def latents_of(s):
    """Channels of the latents of an autoencoder with these settings."""
    return s["embed_dim"] or s["z_channels"]


def level_attention(s):
    """Whether levels of the autoencoder have attention."""
    sides = [s["resolution"] // s["patch_size"] // 2**i for i in range(len(s["ch_mult"]))]
    return any(side in s["attn_resolutions"] for side in sides)


def head_width(s):
    """Channels of a head where all attention of the U-Net has the same; 0: the level's own; None: neither."""
    if s["head_dim"] or s["num_heads"] == 1:
        return s["head_dim"]
    mults = [mult for i, mult in enumerate(s["channel_mult"]) if 2**i in s["attention_ds"]]
    widths = {s["channels"] * mult for mult in mults + s["middle_attention"] * [s["channel_mult"][-1]]}
    return max(widths, default=0) // s["num_heads"] if len(widths) < 2 else None


def check_expressible(path, to, vae, model=None):
    """ValueError naming all that a layout cannot express; vae: the autoencoder's settings or None, model: meta's."""
    found = [(VAE_LIMITS, vae)] if vae else []
    found += [(UNET_LIMITS, tuples(model["unet"])), (MODEL_LIMITS, model)] if model else []
    names = [name.format(**s) for limits, s in found for places, has, name in limits if to in places.split() and has(s)]
    if names:
        raise ValueError(f"{path} cannot become {to}, which has no place for {'; '.join(names)}")


def fold_statistics(tensors, mean, std):
    """An autoencoder's tensors, in our names, with its latents' statistics inside, and the scalar that remains.

    mean, std: (C,). Layouts of others have latents * scalar for the U-Net and latents / scalar for `decode`. Where all
    means are 0 and all deviations one, the tensors stay and the scalar is 1 / std. Else it is 1: quant_conv gives
    (mean - m) / s and logvar - 2 ln s, post_quant_conv takes W s and b + W m. The codes of VQ move along, which leaves
    the nearest one the nearest only where all channels have one s; ValueError where they have not.
    """
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise ValueError("the autoencoder has no latent statistics: run train_vae.py with --measure_latents")
    out, one = dict(tensors), bool((std == std[0]).all())
    if one and not mean.any():
        return out, 1 / std[0].item()
    codes, C = "quantize.embedding.weight", len(mean)
    if codes in out and not one:
        raise ValueError(
            "VQ latents with a std for each channel: scaled by it, another code would be the nearest; "
            "only one std for all channels can be exported"
        )
    if "quant_conv.weight" not in out:
        out |= identity_projections(C, 1 if codes in out else 2)
    m, s = mean.double(), std.double()
    w, b = out["quant_conv.weight"].double(), out["quant_conv.bias"].double()
    w[:C], b[:C] = w[:C] / s.view(-1, 1, 1, 1), (b[:C] - m) / s
    if codes in out:
        out[codes] = ((out[codes].double() - m) / s).float()
    else:
        b[C:] -= 2 * s.log()
    out |= {"quant_conv.weight": w.float(), "quant_conv.bias": b.float()}
    w, b = out["post_quant_conv.weight"].double(), out["post_quant_conv.bias"].double()
    b = b + w[:, :, 0, 0] @ m
    return out | {"post_quant_conv.weight": (w * s.view(1, -1, 1, 1)).float(), "post_quant_conv.bias": b.float()}, 1.0


def identity_projections(channels, moments):
    """quant_conv and post_quant_conv that change nothing, for layouts that know no autoencoder without them."""
    out = {}
    for name, n in (("quant_conv", moments * channels), ("post_quant_conv", channels)):
        out |= {f"{name}.weight": torch.eye(n).view(n, n, 1, 1), f"{name}.bias": torch.zeros(n)}
    return out


def fold_time(weight, by=1):
    """The first weight of the time embedding for a U-Net that shall be told i where it was told i + by.

    The sinusoids of i + 1 are those of i, each pair turned by its frequency. With it a continuous schedule, whose
    U-Net knows 1000 t, becomes a table of 1000 entries, whose entry i at t = (i + 1) / 1000 is told as i.
    """
    half = weight.shape[1] // 2
    angle = by * torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
    c, s = weight[:, :half].double(), weight[:, half : 2 * half].double()  # of the cosines, of the sines
    turned = [c * angle.cos() + s * angle.sin(), s * angle.cos() - c * angle.sin()]
    return torch.cat([*(w.to(weight.dtype) for w in turned), weight[:, 2 * half :]], dim=1)


def table_of(model):
    """alpha_bar (T,) float64 of a checkpoint's schedule, and whether its U-Net counts from 1, see fold_time."""
    from diffusion import make_schedule

    ends = model["beta_start"], model["beta_end"]
    process = make_schedule(model["schedule"], *ends, zero_snr=model.get("zero_snr", False))
    T = process.discrete or 1000
    return process.alpha(torch.arange(1, T + 1, dtype=torch.float64) / T) ** 2, not process.discrete


def preserves_variance(model):
    """Whether alpha^2 + sigma^2 is 1 all along a checkpoint's schedule, as a table of betas has it."""
    from diffusion import make_schedule

    process = make_schedule(model["schedule"], model["beta_start"], model["beta_end"])
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    return torch.allclose(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t), atol=1e-6)


def betas_of(alpha_bar):
    return 1 - alpha_bar / torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])


def schedule_of(betas):
    """{schedule, beta_start, beta_end} of a table of betas (1000,) float64, or None where it is none of ours.

    "cosine" too, which is continuous here: of a U-Net told i, see fold_time.
    """
    start, end = betas[0].item(), betas[-1].item()
    low, high = (torch.sigmoid(torch.tensor([-6.0, 6.0], dtype=torch.float64))).tolist()
    slope = (end - start) / (high - low)
    ends = {"linear": (start, end), "scaled_linear": (start, end), "sqrt": (start**2, end**2)}
    ends |= {"sigmoid": (start - slope * low, start - slope * low + slope)}
    ends |= {"squared_cosine": (0.00085, 0.012), "cosine": (0.00085, 0.012)}
    for name, (first, last) in ends.items():
        if len(betas) == 1000 and 0 < first <= last < 1:
            model = {"schedule": name, "beta_start": float(f"{first:.6g}"), "beta_end": float(f"{last:.6g}")}
            if torch.allclose(betas_of(table_of(model)[0]), betas, rtol=1e-4, atol=1e-8):
                return model


def scheduler_config(model):
    """diffusers' DDIMScheduler for a checkpoint's settings; its steps are sample.py's, spacing=trailing, eta=0."""
    known = {"linear": "linear", "scaled_linear": "scaled_linear", "quadratic": "scaled_linear"}
    known |= {"squared_cosine": "squaredcos_cap_v2"}
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
    if model["schedule"] in known:
        config |= {"beta_schedule": known[model["schedule"]], "trained_betas": None}
        config |= {"beta_start": model["beta_start"], "beta_end": model["beta_end"]}
    else:
        config["trained_betas"] = betas_of(table_of(model | {"zero_snr": False})[0]).tolist()
    config["rescale_betas_zero_snr"] = bool(model.get("zero_snr"))
    config["prediction_type"] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[model["objective"]]
    # steps_offset plays no part in trailing steps, but pipelines complain of any other than 1
    config |= {"timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 1}
    return config | {"clip_sample": False, "thresholding": False}


def vae_config(s, scaling, side):
    """diffusers' config of an autoencoder with settings s, for images of that side."""
    widths = [s["ch"] * mult for mult in s["ch_mult"]]
    config = {"in_channels": 3, "out_channels": 3, "block_out_channels": widths, "act_fn": "silu"}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * len(widths)}
    config |= {"up_block_types": ["UpDecoderBlock2D"] * len(widths), "layers_per_block": s["num_res_blocks"]}
    config |= {"latent_channels": s["z_channels"], "norm_num_groups": s["norm_groups"], "sample_size": side}
    config |= {"mid_block_add_attention": s["mid_attention"], "scaling_factor": scaling}
    if s["bottleneck"] == "vq":
        config |= {"num_vq_embeddings": s["codebook_size"], "vq_embed_dim": latents_of(s)}
        return {"_class_name": "VQModel"} | config
    config |= {"use_quant_conv": s["latent_proj"], "use_post_quant_conv": s["latent_proj"]}
    return {"_class_name": "AutoencoderKL"} | config


def unet_config(s, side):
    """diffusers' config of a U-Net with settings s, for latents of that side: UNet2DModel has plain attention."""
    widths, depth = [s["channels"] * mult for mult in s["channel_mult"]], s["transformer_depth"]
    attends = [2**i in s["attention_ds"] for i in range(len(widths))]
    config = {"sample_size": side, "in_channels": s["in_channels"] + s["concat_channels"]}
    config |= {"out_channels": s["out_channels"], "block_out_channels": widths, "norm_num_groups": s["norm_groups"]}
    config |= {"num_class_embeds": s["num_classes"] or None, "norm_eps": 1e-5, "act_fn": "silu"}
    config |= {"flip_sin_to_cos": True, "freq_shift": 0, "dropout": s["unet_dropout"]}
    config["resnet_time_scale_shift"] = "scale_shift" if s["scale_shift"] else "default"

    def by_level(value):
        value = list(value) if isinstance(value, (tuple, list)) else [value]
        return value * len(widths) if len(value) == 1 else value

    if depth:
        down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
        config |= {"transformer_layers_per_block": depth, "use_linear_projection": s["linear_proj"]}
        config |= {"cross_attention_dim": s["context_dim"] or widths, "mid_block_type": "UNetMidBlock2DCrossAttn"}
        config |= {"layers_per_block": by_level(s["num_res_blocks"])}
        # by this name it means the number of heads
        config |= {"attention_head_dim": [s["num_heads"] or width // s["head_dim"] for width in widths]}
        config |= {"only_cross_attention": [not attention for attention in by_level(s["self_attention"])]}
        config["_class_name"] = "UNet2DConditionModel"
    else:
        plain = (
            ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
            if s["resblock_updown"]
            else ("DownBlock2D", "UpBlock2D")
        )
        (down, up), kind = (
            zip(("AttnDownBlock2D", "AttnUpBlock2D"), plain),
            "resnet" if s["resblock_updown"] else "conv",
        )
        config |= {"layers_per_block": by_level(s["num_res_blocks"])[0], "add_attention": s["middle_attention"]}
        config |= {"attention_head_dim": head_width(s) or None, "attn_norm_num_groups": s["norm_groups"]}
        config |= {"downsample_type": kind, "upsample_type": kind, "_class_name": "UNet2DModel"}
    config["down_block_types"] = [down[0] if attention else down[1] for attention in attends]
    config["up_block_types"] = [up[0] if attention else up[1] for attention in attends[::-1]]
    return config


def clip_files(tower):
    """A CLIP tower as transformers keeps it: {file: content}, JSON-able or text."""
    s = tower.settings
    ends = {"bos_token_id": tower.start, "eos_token_id": tower.end, "pad_token_id": tower.pad}
    config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": s["width"]}
    config |= {"intermediate_size": 4 * s["width"], "projection_dim": s["width"], "num_attention_heads": s["heads"]}
    config |= {"num_hidden_layers": len(tower.blocks), "max_position_embeddings": s["length"], "layer_norm_eps": 1e-5}
    config |= {"vocab_size": s["vocab"], "hidden_act": s["activation"], "torch_dtype": "float32"} | ends
    merges = tower.bpe().decode()
    plain = [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    letters = plain + [chr(256 + i) for i in range(256 - len(plain))]
    names = letters + [f"{letter}</w>" for letter in letters]
    names += [line.replace(" ", "") for line in merges.splitlines()[1:]] + ["<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": names[tower.start], "eos_token": names[tower.end], "unk_token": names[tower.end]}
    # Stable Diffusion 2 pads with token 0, "!". By that name every "!" of a prompt would be taken for padding, so token
    # 0 has a second name, for padding only.
    vocab = {name: i for i, name in enumerate(names)} | ({} if tower.pad == tower.end else {"<|pad|>": tower.pad})
    special["pad_token"] = names[tower.end] if tower.pad == tower.end else "<|pad|>"
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": s["length"], "do_lower_case": True} | special
    return {
        "text_encoder/config.json": config,
        "tokenizer/tokenizer_config.json": tokenizer,
        "tokenizer/special_tokens_map.json": special,
        "tokenizer/vocab.json": vocab,
        "tokenizer/merges.txt": merges,
    }


def load_ours(path, ema_std, tower_weights, clip_vocab):
    """(meta, denoiser or None, autoencoder or None, frozen text tower or None) of a checkpoint of either stage."""
    from vae import VAE

    _, meta = read_checkpoint(path)
    if meta["stage"] == "vae":
        if ema_std or tower_weights or clip_vocab:
            raise ValueError(f"{path} is an autoencoder: ema_std, tower_weights and clip_vocab are not for it")
        return meta, None, VAE.from_pretrained(path), None
    vae = VAE.from_pretrained(path) if meta["vae"] else None
    return meta, load_denoiser(path, ema_std), vae, load_tower(path, tower_weights, clip_vocab)


def to_diffusers(path, folder, ema_std=0.0, tower_weights="", clip_vocab=""):
    """Writes a checkpoint of ours as a folder for diffusers; returns what it has become, in words.

    Unconditional models become an LDMPipeline, those that listen to a frozen CLIP a StableDiffusionPipeline; of all
    others the autoencoder, the U-Net and the scheduler are written, to be put together by hand.  path, ema_std,
    tower_weights, clip_vocab: see sample.load_pipeline.  ValueError names what diffusers cannot express.
    """
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ValueError(f"out={folder} is there already: name a new folder")
    meta, denoiser, vae, tower = load_ours(path, ema_std, tower_weights, clip_vocab)
    model = meta["model"] if denoiser else None
    check_expressible(path, "diffusers", vae and vae.settings, model)
    files, side = {}, (model or {}).get("image_size") or meta["config"].get("image_size", 256)
    plain = model and not model["unet"]["transformer_depth"] and model.get("task", "none") == "none"
    pipeline, reason = "", ""
    if not model:
        reason = "it is an autoencoder alone"
    elif vae is None:
        reason = "no pipeline of this kind draws pixels"
    elif model.get("task", "none") != "none":
        reason = f"no pipeline knows task={model['task']} as it was trained here"
    elif model["cond"] == "none" and plain:
        pipeline = "LDMPipeline"
    elif model["cond"] == "none":
        reason = "LDMPipeline takes plain attention, transformer_depth=0"
    elif tower is not None and vae.quantize is None:
        pipeline = "StableDiffusionPipeline"
    elif tower is not None:
        reason = "StableDiffusionPipeline takes no VQ"
    elif model["cond"] == "class":
        reason = f"no pipeline takes classes so; class_labels={model['num_classes']} is the empty condition"
    else:
        reason = "the text encoder was trained here and stays here"

    vae_folder = "vqvae" if pipeline == "LDMPipeline" else "vae"
    if vae is not None:
        s, tensors = vae.settings, dict(vae.state_dict())
        mean, std = tensors.pop("latent_mean"), tensors.pop("latent_std")
        tensors, scaling = fold_statistics(tensors, mean, std)
        if s["bottleneck"] == "vq" and "quant_conv.weight" not in tensors:  # VQModel has them always
            tensors |= identity_projections(len(mean), 1)
        s = s | {"latent_proj": "quant_conv.weight" in tensors}
        files[f"{vae_folder}/config.json"] = vae_config(s, scaling, side)
        weights = to_theirs(tensors, vae_keys(s, "diffusers"))
        files[f"{vae_folder}/diffusion_pytorch_model.safetensors"] = weights
    if model:
        s, tensors = denoiser.unet.settings, dict(denoiser.unet.state_dict())
        if table_of(model)[1]:
            tensors["time_embed.0.weight"] = fold_time(tensors["time_embed.0.weight"])
        files["unet/config.json"] = unet_config(s, side // (vae.factor if vae else 1))
        files["unet/diffusion_pytorch_model.safetensors"] = to_theirs(tensors, unet_keys(s, "diffusers"))
        files["scheduler/scheduler_config.json"] = scheduler_config(model)
    if tower is not None:
        files |= clip_files(tower)
        weights = to_theirs(tower.state_dict(), text_keys(len(tower.blocks), "transformers"))
        files["text_encoder/model.safetensors"] = {f"text_model.{name}": t for name, t in weights.items()}
    if pipeline:
        index = {"_class_name": pipeline, "scheduler": ["diffusers", "DDIMScheduler"]}
        for name in ("unet", vae_folder):
            index[name] = ["diffusers", files[f"{name}/config.json"]["_class_name"]]
        if tower is not None:
            index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
            index |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
            index["requires_safety_checker"] = False
        files["model_index.json"] = index

    temporary = f"{os.path.normpath(folder)}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    for name, content in files.items():
        file = os.path.join(temporary, name)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        if name.endswith(".safetensors"):
            write_tensors(file, content)
        else:
            with open(file, "w", encoding="utf-8") as f:
                f.write(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
        sync(file)
    for inside, _, _ in os.walk(temporary):
        sync(inside)
    rename(temporary, os.path.normpath(folder))
    if pipeline:
        return f'{pipeline}: DiffusionPipeline.from_pretrained("{folder}") opens it'
    parts = [f"{name} ({kind})" for name in ("vae", "unet", "scheduler") if (kind := class_of(files, name))]
    return f"components, no pipeline: {', '.join(parts)}; {reason}"


def write_tensors(file, tensors):
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(f"could not write {file} ({e}): make room and run again") from None


def class_of(files, name):
    for file in (f"{name}/config.json", f"{name}/{name}_config.json"):
        if file in files:
            return files[file]["_class_name"]


def to_compvis(path, file, ema_std=0.0, tower_weights="", clip_vocab=""):
    """Writes a checkpoint of ours as one .safetensors file in CompVis' names; returns what is in it, in words.

    first_stage_model. and scale_factor; model.diffusion_model. and the schedule's buffers; cond_stage_model. of a
    frozen CLIP, of classes as tokens and of a rescaler for maps. An autoencoder alone has no prefix, as CompVis'.
    """
    if not file.endswith(".safetensors") or os.path.exists(file):
        raise ValueError(f"out={file} is there already, or no .safetensors file: name a new one")
    meta, denoiser, vae, tower = load_ours(path, ema_std, tower_weights, clip_vocab)
    model = meta["model"] if denoiser else None
    check_expressible(path, "compvis", vae and vae.settings, model)
    out, parts = {}, []

    def add(prefix, tensors, what):
        out.update({prefix + name: t for name, t in tensors.items()})
        parts.append(what)

    if vae is not None:
        s, tensors = vae.settings, dict(vae.state_dict())
        mean, std = tensors.pop("latent_mean"), tensors.pop("latent_std")
        tensors, scaling = fold_statistics(tensors, mean, std)
        if "quant_conv.weight" not in tensors:  # CompVis has them always
            tensors |= identity_projections(len(mean), 1 if s["bottleneck"] == "vq" else 2)
        tensors = to_theirs(tensors, vae_keys(s | {"latent_proj": True}, "compvis"))
        add("first_stage_model." if model else "", tensors, f"the autoencoder, scale_factor {scaling:.6g}")
        if model:
            out["scale_factor"] = torch.tensor(scaling)
    if model:
        tensors = dict(denoiser.unet.state_dict())
        alpha_bar, from_one = table_of(model)
        if from_one:
            tensors["time_embed.0.weight"] = fold_time(tensors["time_embed.0.weight"])
        add("model.diffusion_model.", to_theirs(tensors, unet_keys(denoiser.unet.settings, "compvis")), "the U-Net")
        before = torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])
        buffers = {"betas": betas_of(alpha_bar), "alphas_cumprod": alpha_bar, "alphas_cumprod_prev": before}
        buffers |= {"sqrt_alphas_cumprod": alpha_bar.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt()}
        add("", {name: t.float() for name, t in buffers.items()}, f"its table of {len(alpha_bar)} betas")
    if tower is not None:
        # Stable Diffusion 1 has transformers' tower, 2 has open_clip's
        layout = "transformers" if tower.settings["layer"] == "last" else "open_clip"
        prefix = {"transformers": "transformer.text_model.", "open_clip": "model."}[layout]
        weights = to_theirs(tower.state_dict(), text_keys(len(tower.blocks), layout))
        add(f"cond_stage_model.{prefix}", weights, "the text tower")
    if denoiser and denoiser.class_tokens is not None:
        add("cond_stage_model.embedding.", denoiser.class_tokens.state_dict(), "the classes' tokens")
    if denoiser and denoiser.rescaler is not None:
        rescaler = {"channel_mapper.weight": denoiser.rescaler.conv.weight}
        add("cond_stage_model.", rescaler, "the maps' rescaler")
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    write_tensors(f"{file}.tmp", out)
    sync(f"{file}.tmp")
    rename(f"{file}.tmp", file)
    without = "; its own text encoder has no place there" if denoiser and denoiser.text is not None else ""
    s = denoiser.unet.settings if model else {}
    untold = [f"objective={model['objective']}"] if model else []
    untold += [f"{name}={s[name]}" for name in ("num_heads", "head_dim") if s.get(name)]
    untold += ["tanh_out=True of the autoencoder"] if vae is not None and vae.settings["tanh_out"] else []
    without += f"; not in the file: {', '.join(untold)}" if untold else ""
    return f"{file}: {', '.join(parts)}{without}"


# --- the command ---

ckpt = ""  # a checkpoint of ours, of either stage, or its out_dir
to = "diffusers"  # diffusers (a folder) | compvis (one .safetensors file)
out = ""  # the folder or file to write, a new one
ema_std = 0.0  # width of a post-hoc EMA, as in sample.py; 0 is the stored EMA
tower_weights = ""  # of a frozen text encoder, if they are not where training found them
clip_vocab = ""  # likewise, of its tokenizer


def one_line_error(kind, error, trace):
    """Users' mistakes as one line; TRACEBACK=1 shows where they were noticed, all else shows it always."""
    if issubclass(kind, (ValueError, OSError, ImportError)) and not os.environ.get("TRACEBACK"):
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    configure(globals())
    sys.excepthook = one_line_error
    if to not in ("diffusers", "compvis"):
        raise ValueError(f"to={to} is not one of diffusers, compvis")
    for name in ("ckpt", "out"):
        if not globals()[name]:
            raise ValueError(f"{name} is not set: python convert.py --ckpt=out/ldm --to={to} --out=NEW")
    write = to_diffusers if to == "diffusers" else to_compvis
    print(write(find_checkpoint(ckpt), out, ema_std, tower_weights, clip_vocab))
