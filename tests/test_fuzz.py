"""Damaged and hostile files: every reader works, or raises one line; nothing is run, nothing is written elsewhere.

LDM_FUZZ_SECONDS=60 python -m pytest tests/test_fuzz.py      # a minute for each kind of file
"""

import base64
import gzip
import io
import json
import os
import pickle
import signal
import sys
import time

import numpy as np
import pytest
import torch
from test_data import encoded, pixels, png, put

import checkpoint
import convert
from checkpoint import UserError
from configurator import Setting, SettingError, parse
from data.dataset import BadImage, Dataset
from lpips_train import load_heads
from text import make_tokenizer
from vae import VAE

SECONDS = float(os.environ.get("LDM_FUZZ_SECONDS", 1.5))
NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "shutil.rmtree")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.symlink", "os.truncate")
guarded = []  # the folder of the file that is being read


class Forbidden(BaseException):
    """What no file may make a reader do."""


def hook(event, args):
    if not guarded:
        return
    writes = event == "open" and isinstance(args[0], str) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    outside = (writes or event in CHANGES) and not os.path.abspath(args[0]).startswith(guarded[0])
    if event in NEVER or (outside and args[0] != "/dev/null"):
        raise Forbidden(f"{event} {args}")


sys.addaudithook(hook)


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch /tmp/hacked",)


def torch_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def tiny_checkpoint(path):
    vae = VAE(ch=4, ch_mult=(1, 2), num_res_blocks=1, norm_groups=2, mid_attention=False)
    meta = {"stage": "vae", "model": vae.settings, "config": {}, "step": 1, "run": 1}
    checkpoint.write(str(path), checkpoint.with_prefix("ema", vae.state_dict()), meta)


def read_dataset(path):
    images = Dataset(os.path.dirname(path), "all", 8, cache_dir=f"{os.path.dirname(path)}/cache")
    for i in range(min(len(images), 4)):
        for read in (images.pixels, images.meta, images.boxes):
            try:
                read(i)
            except BadImage as error:
                assert "\n" not in str(error)


def read_foreign(path):
    for load in (convert.load_vae, convert.load_unet, convert.load_clip):
        try:
            load(path)
        except UserError as error:
            assert "\n" not in str(error)


JPEG, RECORD = encoded(pixels(0), "JPEG"), {"label": 1, "objects": {"bbox": [[0, 0, 2, 2]], "categories": ["x"]}}
TAR = [("a.jpg", JPEG), ("a.txt", b"a red star"), ("a.json", json.dumps(RECORD).encode())]
TAR += [("b.png", png()), ("b.cls", b"3"), ("../c.png", png())]
TABLE = {"image": [{"bytes": png(), "path": "a"}] * 3, "text": ["a", "b", None], "label": [0, 1, 2]}
MERGES = gzip.compress(b"#version: 0.2\na b\nab c\n")
SETTINGS = {"lr": Setting(1.0, "> 0: rate"), "name": Setting("a"), "sizes": Setting((1, 2))}
KINDS = {  # file name: (content, as test_data.put takes it, or a function that writes the file; reader)
    "latest.safetensors": (tiny_checkpoint, VAE.from_pretrained),
    "model.ckpt": (torch_bytes({"state_dict": {"a.weight": torch.ones(2)}, "epoch": 3}), read_foreign),
    "code.pkl": (pickle.dumps(Code()), read_foreign),
    "heads.pth": (torch_bytes({"lin0.model.1.weight": torch.ones(1, 64, 1, 1)}), lambda path: load_heads("vgg", path)),
    "a.tar": (TAR, read_dataset),
    "a.parquet": (TABLE, read_dataset),
    "images.npy": (np.zeros((3, 4, 4, 3), np.uint8), read_dataset),
    "a.jpg": (JPEG, read_dataset),
    "metadata.jsonl": (b'{"file_name": "x.png", "text": ["a", "b"], "label": 1}\n', read_dataset),
    "classes.json": ({"0": "cat", "1": "dog"}, read_dataset),
    "bpe.tiktoken": (b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)), make_tokenizer),
    "merges.txt.gz": (MERGES, convert.read_merges),
    "config.py": (b"lr = 2\nname = 'b'\nsizes = (1, 2, 3)\n", lambda path: parse([path], SETTINGS)),
}


def mutate(data, rng):
    """Flip, cut, repeat, insert or overwrite some bytes."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, size = rng.integers(0, len(data) + 1), int(2 ** rng.uniform(0, 8))
        kind = rng.integers(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            del data[at : at + (size if rng.random() < 0.5 else len(data))]
        elif kind == 2:
            data[at:at] = data[at : at + size] * rng.integers(1, 4)
        elif kind == 3:
            data[at:at] = rng.bytes(size)
        else:
            word = rng.choice([b"9" * 30, b"-1", b"[" * 3000, b"\xff\xff\xff\xff", b"null", b"NaN", b"../../x", b"\0"])
            data[at : at + len(word)] = word
    return bytes(data)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_one_line(name, tmp_path):
    (content, reader), folder = KINDS[name], tmp_path / "in"
    put(folder, {"x.png": png()})
    if callable(content):
        content(folder / name)
    else:
        put(folder, {name: content})
    good, rng, tried = (folder / name).read_bytes(), np.random.default_rng(0), 0
    end = time.monotonic() + SECONDS
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(Forbidden("more than 20 s")))
    try:
        while time.monotonic() < end or tried < 5:
            data = good if tried == 0 else mutate(good, rng)
            (folder / name).write_bytes(data)
            signal.alarm(20)
            guarded.append(str(tmp_path))
            try:
                reader(str(folder / name))
            except (UserError, SettingError, BadImage) as error:
                assert "\n" not in str(error), f"{data[:200]!r}: {error}"
            except (Exception, Forbidden) as error:
                raise AssertionError(f"after {tried} files, {type(error).__name__}: {error}; {data[:300]!r}") from error
            finally:
                guarded.clear()
                signal.alarm(0)
            tried += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    print(f"{name}: {tried} files")
    assert not os.path.exists("/tmp/hacked")
