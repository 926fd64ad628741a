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
