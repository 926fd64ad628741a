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
POINTER = b"version https://git-lfs"  # begins what stands for a file that git-lfs has not fetched


class UserError(ValueError):
    """Something the user can fix; scripts print it as one line, without a traceback."""


def reject(path, what, remedy):
    """Raise UserError "path: what; remedy" in one line."""
    raise UserError(" ".join(f"{path}: {what}; {remedy}".split()))


# --- files ---


@contextlib.contextmanager
def replacing(path):
    """Context with a temporary name for a file or folder, which then replaces `path`: complete, or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(os.path.dirname(path) or ".")
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary)
        elif os.path.exists(temporary):
            os.remove(temporary)


def write_whole(path, write):
    """Call write(file) with a binary file that then replaces `path`, see `replacing`."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write(file)


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
    check_fetched(path)
    configs = "model_index.json", "config.json", "unet/config.json", "vae/config.json", "vqvae/config.json"
    if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, name)) for name in configs):
        reject(path, "no latest.safetensors in it", "train first, or give a checkpoint file")
    return path


def check_fetched(path):
    """UserError if `path` is a git-lfs pointer, see check_pointer."""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            check_pointer(file, path)


def check_pointer(file, path):
    """UserError if an open file is a git-lfs pointer; else its position is the beginning."""
    if file.read(len(POINTER)) == POINTER:
        reject(path, "a git-lfs pointer, not the file itself", "run git lfs pull in its folder, or download it")
    file.seek(0)


def read_json(path, remedy="fetch it again"):
    """The JSON object in a file, as a dict."""
    check_fetched(path)
    with reading(path, "cannot be read", remedy), open(path, encoding="utf-8") as file:
        content = json.load(file)
    if not isinstance(content, dict):
        reject(path, "not a JSON object", remedy)
    return content


def is_ours(path):
    """Whether what `find` returned is a checkpoint of this repository."""
    if os.path.isdir(path) or not path.endswith(".safetensors"):
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
    with reading(path, "no such file, and not on the Hugging Face hub", "check the name"):
        for ending in (".safetensors", ".bin"):
            weights = [f"*/*{ending}", f"diffusion_pytorch_model{ending}", f"model{ending}"]
            folder = snapshot_download(path, allow_patterns=configs + weights, ignore_patterns=skip)
            if any(name.endswith(ending) for _, _, names in os.walk(folder) for name in names):
                break
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
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        reject(path, f"could not be saved ({error})", "free disk space and run again; an earlier file is unchanged")


def read(path, *prefixes):
    """(tensors, meta) of a checkpoint: all tensors, or those below any of `prefixes`; meta is what `write` got."""
    return read_starts(path, tuple(f"{prefix}." for prefix in prefixes) or "")


def read_meta(path):
    """The meta of a checkpoint alone."""
    return read_starts(path, ())[1]


def read_starts(path, starts):
    path = find(path)
    if not is_ours(path):
        reject(path, "not a checkpoint of this repository", "use another file")
    remedy = "restore a copy, or start another out_dir from the last ema_*.safetensors"
    with reading(path, "truncated or damaged", remedy), safe_open(path, framework="pt") as file:
        stored = file.metadata()
        text = stored["latent_diffusion"]
        if str(zlib.crc32(text.encode())) != stored["crc32"]:
            reject(path, "its settings were altered", "use another file")
        meta = json.loads(text)
        if meta["format"] != FORMAT:
            reject(path, f"format {meta['format']}, this code reads {FORMAT}", "use the code that wrote it")
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(starts)}, meta


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
def reading(path, what="settings or tensors do not fit", remedy="use another file"):
    """Context in which any error is a UserError: files and tensors of unexpected form can raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", "") or f"{type(error).__name__}: {error}"
        reject(path, f"{what} ({reason[:300]})", remedy)


def build(model_class, settings, state, path, remedy="use another file", **more):
    """The model of these settings with the weights of a state dict, frozen and in eval mode.

    Raises UserError, with `path` and `remedy` in it, where settings and tensors do not fit, before anything large is
    allocated.
    """
    settings = tuples(settings)
    with reading(path, f"its settings do not build a {model_class.__name__}", remedy):
        for name in ("num_res_blocks", "transformer_depth", "layers", "text_layers"):  # as many modules as they say
            if np.max(settings.get(name, 0)) > len(state):
                reject(path, f"{name}={settings[name]}, but only {len(state)} tensors", remedy)
        with torch.device("meta"):
            model = load(model_class(**settings, **more), state, path, remedy)
        if any(buffer.is_meta for buffer in model.buffers()):  # computed by the constructor, not in the file
            model = load(model_class(**settings, **more), state, path, remedy)
        return model


def load(model, state, path, remedy="use another file"):
    """Load a state dict into `model`, freeze it, set eval mode; UserError names a tensor that differs."""
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        want = tuple(own[name].shape) if name in own else "none"
        have = tuple(state[name].shape) if name in state else "missing"
        if want != have:
            reject(path, f"tensor {name} is {have}, its settings need {want}", remedy)
    model.load_state_dict({name: state[name].detach().to(t.dtype) for name, t in own.items()}, assign=True)
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

    path: a checkpoint of the run; the average ends at the last snapshot up to its step. The snapshots
    ema_STEP.safetensors beside it hold averages of several lengths (train_ldm.py --ema_stds --snapshot_every); the
    profile asked for is approximated by least squares (section 3.2).
    """
    path = find(path)
    end, sources = read_meta(path), []  # (file, prefix, step, gamma)
    for file in sorted(glob.glob(f"{glob.escape(os.path.dirname(path) or '.')}/ema_[0-9]*.safetensors")):
        meta = read_meta(file)
        if meta["run"] == end["run"] and meta["step"] <= end["step"]:  # the folder may hold those of an earlier run
            lengths = enumerate(meta["model"]["ema_stds"])
            sources += [(file, f"ema_power_{i}", meta["step"], power_exponent(length)) for i, length in lengths]
    if not sources:
        reject(path, "no averages to combine", "train with --ema_stds=0.05,0.1 --snapshot_every=STEPS")
    steps = np.array([step for _, _, step, _ in sources], dtype=np.float64)
    gammas = np.array([gamma for _, _, _, gamma in sources])
    target = np.array([steps.max()]), np.array([power_exponent(std)])
    A = profile_products(steps[:, None], gammas[:, None], steps, gammas)
    b = profile_products(steps[:, None], gammas[:, None], *target)
    weights = np.linalg.lstsq(A, b, rcond=1e-12)[0][:, 0]
    total = {}
    for weight, (file, prefix, _, _) in zip(weights, sources):
        for key, t in part(read(file, prefix)[0], prefix).items():
            total[f"ema.{key}"] = total.get(f"ema.{key}", 0.0) + weight * t.double()
    return {name: t.float() for name, t in total.items()}
