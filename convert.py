"""Checkpoints into models: finds the file, says what is wrong with it, builds what it holds.

    VAE.from_pretrained("out/vae")        # ends up in load_vae
    UNet.from_pretrained("out/ldm")       # in load_unet

So far it reads this repository's own files; other people's layouts join them here.
"""

import json
import os
import zlib

from safetensors import SafetensorError, safe_open


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
