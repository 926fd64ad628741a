"""Files of this repository: find, read and write checkpoints; post-hoc EMA from a run's snapshots.

    tensors, meta = checkpoint.read("out/ldm", "ema")     # all of ema.*, and the settings
    checkpoint.write("out/ldm/latest.safetensors", tensors, meta)

A checkpoint is one .safetensors file: model.*, ema.*, ema_power_*, optim.*, disc.*, disc_optim.*, state.*, vae.*,
text.bpe; its metadata holds the settings as JSON with a checksum. Files of other projects: convert.py.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import zlib

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = 2


class UserError(ValueError):
    """Something the user can fix; scripts print it as one line, without a traceback."""


def reject(path, what, remedy):
    """Raise UserError "path: what; remedy" in one line."""
    raise UserError(" ".join(f"{path}: {what}; {remedy}".split()))


# --- files ---


def write_atomic(path, write):
    """Call write(temporary name), then rename what it wrote, a file or a folder, to `path`: complete, or not there."""
    folder, temporary = os.path.dirname(path) or ".", f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(folder)
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary)
        elif os.path.exists(temporary):
            os.remove(temporary)


def write_whole(path, write):
    """Call write(file) with a binary file; `path` is then complete and on disk, or not there at all."""

    def write_file(temporary):
        with open(temporary, "wb") as file:
            write(file)

    write_atomic(path, write_file)


def sync(path):
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find(path):
    """The checkpoint file that `path` names: itself, or latest.safetensors in it; or another project's file or folder.

    An id of the Hugging Face hub (owner/name) is fetched, as huggingface_hub does.
    """
    path = fetch(os.fspath(path))
    file = os.path.join(path, "latest.safetensors")
    if os.path.exists(file):
        return file
    if not os.path.exists(path):
        reject(path, "no such checkpoint", "give a .safetensors file or the out_dir of a run")
    if os.path.isdir(path) and not is_foreign_folder(path):
        reject(path, "no latest.safetensors in it", "train first, or give a checkpoint file")
    return path


def is_foreign_folder(path):
    return any(os.path.exists(os.path.join(path, name)) for name in ("config.json", "model_index.json"))


def is_ours(path):
    """Whether `path`, an existing file or folder, is a checkpoint of this repository."""
    if os.path.isdir(path):
        return not is_foreign_folder(path)
    if not path.endswith(".safetensors"):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "latent_diffusion" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return True  # `read` names what is wrong with it


def fetch(path):
    """`path` itself, or the local folder of a Hugging Face id."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not os.path.isdir(path.split("/")[0])
    if os.path.exists(path) or not is_id or path.startswith("out/"):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        reject(path, "no such file", "for a Hugging Face id: pip install huggingface_hub")
    configs = ["*.json", "*/*.json", "merges.txt", "*/merges.txt"]
    skip = ["*.fp16.*", "*.non_ema.*", "*/safety_checker/*"]
    try:
        for ending in (".safetensors", ".bin"):
            weights = [f"*/*{ending}", f"diffusion_pytorch_model{ending}", f"model{ending}"]
            folder = snapshot_download(path, allow_patterns=configs + weights, ignore_patterns=skip)
            if any(name.endswith(ending) for _, _, names in os.walk(folder) for name in names):
                break
    except (OSError, ValueError) as error:  # what the hub's errors are
        reject(path, f"no such file, and not on the Hugging Face hub ({error})", "check the name")
    return folder


# --- our checkpoints ---


def write(path, tensors, meta):
    """Write {name: tensor} and JSON-able `meta` as one .safetensors file."""
    text = json.dumps({"format": FORMAT} | meta)
    metadata = {"latent_diffusion": text, "crc32": str(zlib.crc32(text.encode()))}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        folder = glob.escape(os.path.dirname(path) or ".")
        for left in glob.glob(f"{folder}/.tmp??????") + glob.glob(f"{glob.escape(path)}.*.tmp"):
            os.remove(left)  # of a killed run (.tmp?????? is safetensors' own), as large as a checkpoint
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    except (OSError, SafetensorError) as error:
        reject(path, f"could not be saved ({error})", "free disk space and run again; an earlier file is unchanged")


def read(path, *prefixes):
    """(tensors, meta) of a checkpoint: all tensors, or those below any of `prefixes`; meta is what `write` got."""
    return _read(path, tuple(f"{prefix}." for prefix in prefixes) or "")


def read_meta(path):
    """The meta of a checkpoint alone."""
    return _read(path, ())[1]


def _read(path, starts):
    path = find(path)
    if os.path.isdir(path):
        reject(path, "not a checkpoint of this repository", "use another file")
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            text = stored.get("latent_diffusion", "")
            if str(zlib.crc32(text.encode())) != stored.get("crc32"):
                reject(path, "not a checkpoint of this repository, or its settings were altered", "use another file")
            meta = json.loads(text)
            if meta["format"] != FORMAT:
                reject(path, f"format {meta['format']}, this code reads {FORMAT}", "use the code that wrote it")
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(starts)}, meta
    except (OSError, SafetensorError, LookupError, TypeError, RecursionError, json.JSONDecodeError) as error:
        reject(
            path,
            f"truncated or damaged ({error})",
            "restore a copy, or start another out_dir from the last ema_*.safetensors",
        )


def read_vae(path):
    """(settings, state dict) of the autoencoder in a checkpoint: the EMA of stage 1, or the first stage of stage 2.

    A snapshot of stage 2 holds none: it is read from the latest.safetensors of the same run, in the same folder.
    """
    path = find(path)
    meta = read_meta(path)
    if meta.get("snapshot") and meta["stage"] == "ldm":
        latest = os.path.join(os.path.dirname(path), "latest.safetensors")
        if not os.path.exists(latest) or read_meta(latest).get("run") != meta.get("run"):
            reject(path, "a snapshot, without the autoencoder", "put the latest.safetensors of its run beside it")
        path = latest
    settings, prefix = (meta["model"], "ema") if meta["stage"] == "vae" else (meta["vae"], "vae")
    if settings is None:
        reject(path, "trained on pixels, without an autoencoder", "give another checkpoint")
    return settings, part(read(path, prefix)[0], prefix)


def with_prefix(prefix, state):
    return {f"{prefix}.{name}": t for name, t in state.items()}


def part(tensors, prefix):
    """The state dict below a prefix."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def tuples(settings):
    """Settings read from JSON, with tuples for lists, as models are built with."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


@contextlib.contextmanager
def reading(path):
    """Context in which settings and tensors of unexpected form raise UserError with the path of their file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # settings and tensors of unexpected form can raise anything
        reject(path, f"damaged: settings or tensors do not fit ({type(error).__name__}: {error})", "use another file")


def build(model_class, settings, state, path, **more):
    """The model of these settings with the weights of a state dict, frozen and in eval mode.

    Raises UserError, with `path` in it, where settings and tensors do not fit, before anything large is allocated.
    """
    settings = tuples(settings)
    for name in ("num_res_blocks", "transformer_depth", "layers", "text_layers"):  # as many modules as they say
        value = settings.get(name, 0)
        if max(value if isinstance(value, tuple) else (value,)) > len(state):
            reject(path, f"{name}={value}, but only {len(state)} tensors", "the file is damaged: use another")
    try:
        with torch.device("meta"):
            model = model_class(**settings, **more)
        load(model, state, path)
        if any(buffer.is_meta for buffer in model.buffers()):  # computed by the constructor, not in the file
            model = load(model_class(**settings, **more), state, path)
        return model
    except UserError:
        raise
    except Exception as error:  # settings of an altered file can raise anything
        reject(path, f"its settings do not build a {model_class.__name__} ({error})", "use another file")


def load(model, state, path):
    """Load a state dict into `model`, freeze it, set eval mode; UserError names a tensor that differs."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            have, want = found.get(name, "missing"), wanted.get(name, "unknown")
            reject(path, f"tensor {name} is {have}, its settings need {want}", "use another file")
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    model.load_state_dict({name: t.detach().to(dtypes[name]) for name, t in state.items()}, assign=True)
    return model.requires_grad_(False).eval()


def hash_weights(model, but=()):
    """Hex digest of a module's (or a state dict's) tensors, except names that begin with one of `but`."""
    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    digest = hashlib.blake2b(digest_size=16)
    for name, t in sorted(state.items()):
        if not name.startswith(tuple(but)):
            digest.update(name.encode() + t.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


# --- post-hoc EMA (Karras et al. 2024, EDM2, arXiv 2312.02696, section 3) ---


@functools.cache  # training asks for it at every step
def power_exponent(std):
    """gamma of the power profile, weights ~ t^gamma over a run, of relative deviation std in (0, 0.28].

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), section 3.1.
    """
    return np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max()


def profile_products(t_a, gamma_a, t_b, gamma_b):
    """Inner products of the profiles p(s) = (gamma + 1) / t (s / t)^gamma on [0, t]; arrays that broadcast."""
    shorter = np.where(t_a < t_b, (t_a / t_b) ** gamma_b, (t_b / t_a) ** gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shorter / np.maximum(t_a, t_b)


def posthoc_ema(path, std):
    """{"ema.NAME": tensor}: an average of relative length `std` in [0.01, 0.25], combined from a run's snapshots.

    path: the out_dir of the run, or the snapshot (ema_STEP.safetensors) at which it ends; else it ends at the last one.
    Snapshots hold averages at several steps and of several lengths (train_ldm.py --ema_stds --snapshot_every); the
    profile asked for is approximated by least squares (section 3.2). Snapshots of another run are left out.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    files = sorted(name for name in os.listdir(folder) if re.fullmatch(r"ema_\d+\.safetensors", name))
    if os.path.basename(path) in files:
        files = files[: files.index(os.path.basename(path)) + 1]
    metas = {name: read_meta(f"{folder}/{name}") for name in [*files, "latest.safetensors"]
             if os.path.exists(f"{folder}/{name}")}  # fmt: skip
    newest = metas.get("latest.safetensors") or metas.get(files[-1] if files else "", {})
    sources = [
        (name, f"ema_power_{i}", metas[name]["step"], power_exponent(length))
        for name in files
        if metas[name]["run"] == newest["run"]
        for i, length in enumerate(metas[name]["model"]["ema_stds"])
    ]
    if not sources:
        reject(folder, "no averages to combine", "train with --ema_stds=0.05,0.1 --snapshot_every=STEPS")
    steps = np.array([step for _, _, step, _ in sources], dtype=np.float64)
    gammas = np.array([gamma for _, _, _, gamma in sources])
    target = np.array([steps.max()]), np.array([power_exponent(std)])
    A = profile_products(steps[:, None], gammas[:, None], steps, gammas)
    b = profile_products(steps[:, None], gammas[:, None], *target)
    weights = np.linalg.lstsq(A, b, rcond=1e-12)[0][:, 0]
    total = {}
    for weight, (name, prefix, _, _) in zip(weights, sources):
        for key, t in part(read(f"{folder}/{name}", prefix)[0], prefix).items():
            total[f"ema.{key}"] = total.get(f"ema.{key}", 0.0) + weight * t.double()
    return {name: t.float() for name, t in total.items()}
