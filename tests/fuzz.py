"""Hostile files do no harm: mutated and made-up files go through every reader, under watch.

    python tests/fuzz.py                              # two minutes for each kind of file
    python tests/fuzz.py --targets=tar,images --seconds=600 --seed=1
    python tests/fuzz.py --examples=50 --seconds=0    # the same 50 of each kind every time

A reader may work, or raise ValueError or OSError with one line that says what is wrong. Anything else is a failure:
another exception, more than SECONDS_EACH seconds or MEMORY bytes for an example, code that is run, a file outside the
example's folder that is written or read (an audit hook sees these). Each kind has a process of its own. The smallest
example of every failure stays in --keep.
"""

import base64
import functools
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save  # noqa: E402

import configurator  # noqa: E402
import convert  # noqa: E402
import fid  # noqa: E402
import lpips_train  # noqa: E402
import sample  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402
import unet  # noqa: E402
from data import dataset, prepare  # noqa: E402
from data.bapps import prepare as bapps  # noqa: E402
from data.mnist import prepare as mnist  # noqa: E402
from text import CLIPTokenizer, TextEncoder, make_tokenizer  # noqa: E402
from vae import VAE  # noqa: E402

targets = "checkpoint,pickle,tar,parquet,images,captions,settings,prompts,arrays,archives"  # kinds of files, of those
seconds = 120.0  # for each of them
examples = 0  # so many of each instead
seed_ = 0  # of what is tried
keep = ""  # folder for the examples that failed

SECONDS_EACH = 20
MEMORY = 2 * 2**30  # more than a process has with everything loaded

# -- under watch -------------------------------------------------------------------------------------------------------


class Forbidden(BaseException):
    """What no file may make a reader do."""


class TooSlow(BaseException):
    pass


watched = None  # the folder of the file that is being read
READABLE = (str(ROOT), sys.prefix, sys.base_prefix, "/usr", "/lib", "/proc", "/sys", "/etc/localtime", "/dev")
NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn")
NEVER += ("socket.connect", "socket.getaddrinfo", "pickle.find_class", "urllib.Request", "shutil.rmtree", "os.kill")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


def hook(event, args):
    if watched is None:
        return
    tensors_of = ("torch", "torch._utils", "torch.storage", "collections", "_codecs")  # what tensors are made of
    if event == "pickle.find_class" and args[0] in tensors_of and args[1] not in ("load", "hub", "compile"):
        return
    if event in NEVER:
        raise Forbidden(f"{event} {args}")
    if event == "open" and isinstance(args[0], str | bytes):
        path, mode, flags = os.path.realpath(os.fsdecode(args[0])), args[1], args[2]
        inside = path.startswith(watched + os.sep) or path == watched
        changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if changes and not inside and path != "/dev/null":
            raise Forbidden(f"open {path} with mode {mode}")
        if not inside and not path.startswith(READABLE):
            raise Forbidden(f"read {path}")
    if event in CHANGES and not os.path.realpath(os.fsdecode(args[0])).startswith(watched + os.sep):
        raise Forbidden(f"{event} {args}")


def slow(number, frame):
    raise TooSlow(f"more than {SECONDS_EACH} s")


def unclear(error):
    """What is wrong with an exception, or ""."""
    if not isinstance(error, ValueError | OSError) or isinstance(error, json.JSONDecodeError | UnicodeError):
        return f"{type(error).__name__}: {error}"
    if "\n" in str(error).strip():
        return f"{type(error).__name__} of several lines: {error}"
    if isinstance(error, dataset.BadImage) and ("MemoryError" in str(error) or "can't allocate" in str(error)):
        return f"no memory: {error}"
    return ""


def attempt(reader, folder):
    """Why what the reader does with a folder is a failure, with the place; None if it is none."""
    global watched
    signal.alarm(SECONDS_EACH)
    watched = os.path.realpath(folder)
    try:
        reader(folder)
        return None
    except (Exception, Forbidden, TooSlow) as e:
        watched = None
        why = unclear(e)
        if not why:
            return None
        frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename.startswith(str(ROOT))]
        ours = [f for f in frames if "/tests/" not in f.filename] or frames
        at = f"{os.path.basename(ours[-1].filename)}:{ours[-1].name}"
        return f"{type(e).__name__} in {at}", why
    finally:
        watched = None
        signal.alarm(0)


# -- mutations ---------------------------------------------------------------------------------------------------------

INTERESTING = (0, 1, 127, 128, 255, 256, 32767, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


@st.composite
def mutated(draw, seeds, most=6):
    """One of these bytes with bits flipped, cut, spliced, or with numbers that are much too large in it."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, most))):
        end = max(len(content) - 1, 0)
        at = draw(st.one_of(st.integers(0, end), st.integers(0, min(end, 200))))
        kind = draw(st.sampled_from(("flip", "flip", "set", "cut", "drop", "insert", "repeat", "number", "splice")))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + draw(st.integers(1, 1000))]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=30))
        elif kind == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 600))] * draw(st.integers(1, 3))
        elif kind == "number":
            size, order = draw(st.sampled_from((2, 4, 8))), draw(st.sampled_from(("big", "little")))
            content[at : at + size] = (draw(st.sampled_from(INTERESTING)) % 256**size).to_bytes(size, order)
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, max(len(other) - 1, 0)))
            content[at:] = other[start:]
    return bytes(content)


NAMES = [
    "../outside/secret",
    "../../outside/secret",
    "/OUTSIDE/secret",
    "a/../../outside/secret",
    "a",
    "b",
    "./a",
    "a/b",
]
NAMES += ["", ".", "..", "a\n", "é", "a" * 300, "train/a", "val/a", "\udce9", "nul\0", "%s", "~/a", "a.b.c", "a;rm -rf"]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.sampled_from(INTERESTING), st.floats(), st.text(max_size=12)
)
scalars |= st.sampled_from(
    [10**400, -(10**30), 1e308, "1", "07", "-1", "nan", "cat", "\ud800", "\0", "x" * 10_000_000, *NAMES]
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
DEEP = [
    "[" * 100_000,
    "[" * 900 + "]" * 900,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    '{"text": ' + "[" * 3000 + "]" * 3000 + "}",
]
DEEP += ["9" * 5000, '{"label": ' + "9" * 5000 + "}", "NaN", "-Infinity", '{"label": 1e999}', '"\\ud800"', "\ufeff{}"]


def fields(names):
    return st.dictionaries(st.sampled_from(names), values, max_size=len(names))


@st.composite
def json_bytes(draw, record):
    """JSON of a record, of anything, too deep, in another encoding or no JSON."""
    kind = draw(st.sampled_from(("record", "record", "record", "any", "deep", "utf-16", "bytes")))
    if kind == "deep":
        return draw(st.sampled_from(DEEP)).encode(errors="surrogatepass")
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    text = json.dumps(draw(record if kind != "any" else values), ensure_ascii=draw(st.booleans()))
    return text.encode("utf-16" if kind == "utf-16" else "utf-8", errors="surrogatepass")


# -- files to begin with -----------------------------------------------------------------------------------------------


def picture(kind, mode="RGB", size=(12, 9), **options):
    pixels = np.random.default_rng(len(kind)).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB")
    if mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, depth=8, color=2, interlace=0, extra=b""):
    """A PNG that declares a size and holds next to nothing."""

    def chunk(name, content):
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, color, 0, 0, interlace])
    row = b"\0" * min(width * 3 + 1, 10**6)
    pixels = zlib.compress(row * min(height, 8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@functools.cache
def pictures():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "green")]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    text = zlib.compress(b"\0" * 3_000_000)
    bomb = b"zTXt" + b"Comment\0\0" + text
    bomb = (len(bomb) - 4).to_bytes(4, "big") + bomb + zlib.crc32(bomb).to_bytes(4, "big")
    exif = Image.Exif()
    exif[0x0112] = 6
    made = [picture("JPEG"), picture("JPEG", "L"), picture("JPEG", "CMYK"), picture("JPEG", progressive=True)]
    made += [picture("JPEG", exif=exif), picture("PNG"), picture("PNG", "P"), picture("PNG", "LA"), picture("PNG", "1")]
    made += [picture("PNG", "I;16"), picture("PNG", "RGBA"), picture("WEBP"), picture("WEBP", lossless=True)]
    made += [gif.getvalue(), picture("TIFF"), picture("TIFF", compression="tiff_lzw"), picture("BMP"), picture("PPM")]
    made += [picture("TIFF", compression="tiff_adobe_deflate"), picture("TIFF", "I;16"), picture("GIF", "P")]
    sizes = ((1, 100_000), (100_000, 1), (0, 0), (0, 5), (9000, 9000), (20000, 20000), (2**31 - 1, 2**31 - 1), (3, 1))
    made += [png(*size) for size in sizes] + [
        png(8, 8, extra=bomb),
        png(8, 8, 16, 6),
        png(8, 8, 1, 3),
        png(4, 4, 8, 2, 1),
    ]
    return made


def small_vae():
    torch.manual_seed(0)
    vae = VAE(ch=4, ch_mult=(1,), num_res_blocks=1, norm_groups=2, mid_attention=False)
    vae.latent_mean.fill_(0.0)
    vae.latent_std.fill_(1.0)
    return vae


def checkpoint_bytes(tensors, meta, crc=None):
    text = meta if isinstance(meta, str) else json.dumps(meta)
    crc = str(zlib.crc32(text.encode(errors="surrogatepass"))) if crc is None else crc
    return save(tensors, metadata={"latent_diffusion": text, "crc32": crc})


@functools.cache
def checkpoints():
    """[(tensors, meta)] of both stages, tiny ones."""
    vae = small_vae()
    ema = train_vae.with_prefix("ema", vae.state_dict())
    about = {"format": 1, "stage": "vae", "model": vae.settings, "config": {"seed": 0}, "step": 1, "git": ""}
    about |= {"images_seen": 1, "images_per_step": 1}
    text = TextEncoder(8, 1, 2, 4)
    net = dict(in_channels=4, out_channels=4, channels=4, channel_mult=(1,), num_res_blocks=1, attention_ds=())
    net |= dict(num_heads=1, norm_groups=2, context_dim=8, num_classes=0)
    denoiser = unet.Denoiser(unet.UNet(**net), text, None, None, False)
    tensors = train_vae.with_prefix("ema", denoiser.state_dict()) | train_vae.with_prefix("vae", vae.state_dict())
    tensors["text.bpe"] = torch.tensor(list(text.bpe()), dtype=torch.uint8)
    model = {"unet": denoiser.unet.settings, "text": text.settings, "cond": "text", "first_stage": "vae"}
    model |= {"num_classes": 0, "image_size": 8, "objective": "v", "schedule": "cosine"}
    model |= {"beta_start": 0.0015, "beta_end": 0.0195}
    ldm = about | {"stage": "ldm", "model": model, "vae": vae.settings, "shown": ["a"], "classes": []}
    return [(ema, about), (tensors, ldm)]


# -- kinds of files: (strategy of {path: bytes}, reader of the folder) -----------------------------------------------


def read_all(folder, split="all"):
    """Everything that training reads of a data set."""
    ds = dataset.Dataset(folder, split, 16)
    for i in range(len(ds)):
        for read in (ds.__getitem__, ds.meta, ds.map, ds._objects, ds.boxes, ds.size):
            try:
                read(i)
            except dataset.BadImage as e:
                if unclear(e):
                    raise
    ds.has_maps, ds.map_names, ds.map_classes, ds.has_objects, ds.object_classes  # noqa: B018
    stream = dataset.Stream(ds, 1, crop="random", flip=True)
    dataset.collate([stream[p] for p in range(2)])


@st.composite
def checkpoint_files(draw):
    tensors, meta = draw(st.sampled_from(checkpoints()))
    kind = draw(st.sampled_from(("bytes", "bytes", "meta", "value", "value", "value", "tensors")))
    if kind == "bytes":
        good = [checkpoint_bytes(*both) for both in checkpoints()]
        return {"latest.safetensors": draw(mutated(good))}
    if kind == "meta":
        text = draw(json_bytes(fields(list(meta)))).decode(errors="replace")
        return {"latest.safetensors": checkpoint_bytes(tensors, text.replace("\0", ""))}
    meta = json.loads(json.dumps(meta))
    if kind == "value":
        for _ in range(draw(st.integers(1, 3))):
            place = meta
            while True:
                name = draw(st.sampled_from(sorted(place)))
                if isinstance(place[name], dict) and place[name] and draw(st.integers(0, 4)):
                    place = place[name]
                    continue
                if draw(st.integers(0, 6)) == 0:
                    del place[name]
                else:
                    place[name] = draw(values.filter(lambda v: len(repr(v)) < 10_000))
                break
            if not meta:
                break
    else:
        tensors = dict(tensors)
        name = draw(st.sampled_from(sorted(tensors)))
        other = st.sampled_from([torch.zeros(0), torch.zeros(3, dtype=torch.int64), torch.full((), torch.nan), None])
        new = draw(other)
        tensors.pop(name) if new is None else tensors.update({name: new})
    text = json.dumps(meta).encode(errors="replace").decode().replace("\\ud800", "")
    return {"latest.safetensors": checkpoint_bytes(tensors, text)}


def tolerate(*readers):
    """Calls each; raises the first failure, but not what is clearly said."""
    for reader in readers:
        try:
            reader()
        except Exception as e:
            if unclear(e):
                raise


def read_checkpoints(folder):
    if folder is None:  # once, not under watch, with good files
        for both in checkpoints():
            with tempfile.TemporaryDirectory() as folder:
                Path(f"{folder}/latest.safetensors").write_bytes(checkpoint_bytes(*both))
                VAE.from_pretrained(folder)
                if both[1]["stage"] == "ldm":
                    sample.load_pipeline(folder)
        return
    path = f"{folder}/latest.safetensors"
    tolerate(
        lambda: train_vae.load_checkpoint(path, "vae"),
        lambda: train_ldm.load_checkpoint(path, "ldm"),
        lambda: convert.describe(path),
        lambda: convert.read_checkpoint(path, "ema"),
        lambda: VAE.from_pretrained(path),
        lambda: unet.UNet.from_pretrained(path),
        lambda: sample.load_pipeline(path),
        lambda: convert.read_tensors(path),
        lambda: lpips_train.load_heads("squeeze", path),
    )


class Evil:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def run_by_pickle(path):
    open(path, "w").close()


@functools.cache
def pickles():
    tensors = {"state_dict": {"encoder.conv_in.weight": torch.zeros(2, 3), "b": torch.ones(1)}, "global_step": 3}
    made = []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        file = io.BytesIO()
        torch.save(tensors, file, **options)
        made.append(file.getvalue())
    calls = [(os.system, ("touch pwned",)), (open, ("pwned", "w")), (eval, ("open('pwned', 'w')",)), (exec, ("x=1",))]
    calls += [(run_by_pickle, ("pwned",)), (__import__, ("antigravity",))]
    calls += [(torch.load, ("x",)), (np.load, ("x",)), (bytearray, (2**62,)), (torch.zeros, (2**50,))]
    for call in calls:
        for content in ({"a": Evil(call)}, {"state_dict": {"w": torch.zeros(1)}, "hparams": Evil(call)}):
            made.append(pickle.dumps(content))
            for options in ({}, {"_use_new_zipfile_serialization": False}):
                file = io.BytesIO()
                torch.save(content, file, **options)
                made.append(file.getvalue())
    made += [
        b"\x80\x02" + b"(" * 20_000,
        b"\x80\x02]" + b"]" * 20_000 + b"a" * 20_000 + b".",
        b"cos\nsystem\n(S'x'\ntR.",
    ]
    return made


def read_pickles(folder):
    path = f"{folder}/model.ckpt"
    tolerate(
        lambda: convert.read_tensors(path),
        lambda: lpips_train.read_pth(path),
        lambda: VAE.from_pretrained(path),
        lambda: convert.load_foreign(path, ""),
        lambda: lpips_train.load_heads("squeeze", path),
        lambda: lpips_train.load_trunk("squeeze", path),
        lambda: fid.open_extractor(inception_weights=path, trunk="", trunk_weights="", device="cpu"),
    )
    if os.path.exists("pwned") or os.path.exists(f"{folder}/pwned"):
        raise Forbidden("code in the pickle was run")


@st.composite
def tar_files(draw):
    """A shard: of members of every kind, its bytes mutated now and then."""
    file = io.BytesIO()
    formats = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)
    with tarfile.open(fileobj=file, mode="w", format=draw(st.sampled_from(formats))) as tar:
        for _ in range(draw(st.integers(1, 5))):
            stem = draw(st.sampled_from([name for name in NAMES if "\0" not in name and len(name) < 90]))
            ending = draw(st.sampled_from((".png", ".jpg", ".json", ".txt", ".cls", ".map.png", ".tar", "", ".JPG")))
            content = draw(st.sampled_from(pictures()[:20]))
            if ending in (".json", ".txt", ".cls"):
                content = draw(json_bytes(fields(RECORD)))[: 10**5]
            member = tarfile.TarInfo(stem + ending)
            member.type = draw(
                st.sampled_from(
                    [tarfile.REGTYPE] * 6
                    + [
                        tarfile.SYMTYPE,
                        tarfile.LNKTYPE,
                        tarfile.DIRTYPE,
                        tarfile.FIFOTYPE,
                        tarfile.CHRTYPE,
                        tarfile.GNUTYPE_SPARSE,
                        b"?",
                        tarfile.AREGTYPE,
                    ]
                )
            )
            member.linkname = draw(st.sampled_from([name[:90] for name in NAMES if "\0" not in name]))
            member.size = len(content) if member.isfile() else 0
            if draw(st.integers(0, 9)) == 0:
                member.pax_headers = {"GNU.sparse.map": "0,1", "size": draw(st.sampled_from(("-1", "x", "9" * 30)))}
            try:
                tar.addfile(member, io.BytesIO(content) if member.isfile() else None)
                if draw(st.integers(0, 9)) == 0:  # a header that promises too much, and is right otherwise
                    member.size = draw(st.sampled_from((len(content) + 1, 10**6, 2**33 - 1, 2**40, 2**62)))
                    file.write(member.tobuf(tarfile.GNU_FORMAT))
                    break
            except (ValueError, UnicodeError, TypeError):
                continue
    shard = file.getvalue()
    if draw(st.integers(0, 2)) == 0:
        shard = draw(mutated([shard]))
    made = {draw(st.sampled_from(("a.tar", "train-00000.tar", "val/b.tar"))): shard}
    if draw(st.booleans()):
        made["classes.json"] = draw(json_bytes(st.lists(st.text(max_size=4), max_size=5)))
    return made


RECORD = ["text", "caption", "captions", "label", "cls", "file_name", "objects", "width", "key"]


def read_shards(folder):
    tolerate(
        lambda: read_all(folder),
        *(functools.partial(pack, path) for path in tars(folder)),
        *(functools.partial(as_prepare_does, prepare.list_images, path) for path in tars(folder)),
    )


def pack(path):
    for _, parts in prepare.tar_samples(path):
        for ending in parts:
            reason = prepare.convert((path, *parts[ending]), {}, HOW)[0]
            if "MemoryError" in reason:
                raise MemoryError(reason)


def as_prepare_does(call, *args):
    """With what data.prepare.run does about damaged archives."""
    try:
        return call(*args)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise ValueError(f"an archive is damaged ({e})") from None


def tars(folder):
    return [str(path) for path in Path(folder).rglob("*.tar")]


HOW = dict(size=16, crop="center", quality=90, min_side=1)


@functools.cache
def tables():
    import pyarrow as pa
    import pyarrow.parquet as pq

    pixels, made = pictures()[:4], []
    hub = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b", "c", "d"]}}}})}
    cells = [{"bytes": p, "path": "x"} for p in pixels]
    options = [
        {"image": cells, "label": [0, 1, 2, 3], "text": ["a", "b", "c", "d"]},
        {"image": pixels, "label": ["x", "y", "x", None], "captions": [["a"], [], ["b", "c"], None]},
        {"image": [1, 2, 3, 4], "label": [0.5, 1.0, None, float("nan")], "text": [1, 2, 3, 4]},
        {"image": [{"path": "../outside/secret.png"}] * 4, "text": [{"a": 1}] * 4},
        {"image": [None] * 4, "map": pixels, "objects": [{"bbox": [[1.0, 2.0]], "categories": [1]}] * 4},
        {"jpg": ["../outside/secret.png"] * 4, "cls": [-5, 2**40, 0, 0]},
        {"text": ["a"] * 4},
    ]
    for columns in options:
        for compression in ("none", "snappy", "zstd"):
            for metadata in (hub, {"huggingface": "[" * 2000}, {"huggingface": '{"info": [1]}'}, None):
                file = io.BytesIO()
                table = pa.table(columns).replace_schema_metadata(metadata)
                pq.write_table(table, file, compression=compression, row_group_size=2)
                made.append(file.getvalue())
    return made


def packed_rows(path):
    for _, image, _ in prepare.parquet_rows(path, ("image",), ["text"]):
        try:
            content = image()
        except Exception:  # as in prepare.make
            content = b""
        prepare.convert(content, {}, HOW)


def read_tables(folder):
    path = f"{folder}/a.parquet"
    tolerate(
        lambda: read_all(folder),
        lambda: packed_rows(path),
        lambda: prepare.parquet_names(path, "label"),
    )


@st.composite
def picture_files(draw):
    ending = draw(st.sampled_from((".png", ".jpg", ".webp", ".gif", ".tif", ".bmp", ".map.png")))
    made = {f"a{ending}": draw(mutated(pictures())), "b.png": pictures()[5]}
    if ending == ".map.png":
        made["a.png"] = pictures()[5]
    return made


def read_pictures(folder):
    def tool(path):
        image = sample.open_image(path)
        sample.class_map(sample.fit(image, (8, 8), 8, Image.Resampling.NEAREST), 5, path)
        sample.fit(dataset.to_rgb(image), (), 4)

    def packed(path):
        if (reason := prepare.convert(path, {}, HOW)[0]) and "MemoryError" in reason:
            raise MemoryError(reason)

    paths = [str(path) for path in Path(folder).iterdir()]
    calls = [functools.partial(tool, path) for path in paths] + [functools.partial(packed, path) for path in paths]
    tolerate(lambda: read_all(folder), *calls)


@st.composite
def caption_files(draw):
    """metadata.jsonl, classes.json and the rest beside good images, as a folder or as images.npy."""
    record = fields(RECORD).map(lambda r: r | {"file_name": r.get("file_name", "a.png")})
    good = record.map(lambda r: r | {"file_name": "a.png"})
    lines = [draw(json_bytes(draw(st.sampled_from((record, good))))) for _ in range(draw(st.integers(0, 3)))]
    blank = b'{"file_name": "a.png", "text": "a"}'
    made = {}
    if draw(st.booleans()):
        made |= {"a.png": pictures()[5], "b.png": pictures()[0], "metadata.jsonl": b"\n".join([blank, *lines])}
    else:
        made |= {"images.npy": npy(np.zeros((len(lines) + 1, 4, 4, 3), np.uint8))}
        made |= {"captions.jsonl": b"\n".join([blank, *lines])}
    for name in ("classes.json", "map_classes.json", "object_classes.json", "meta.json"):
        if draw(st.integers(0, 2)) == 0:
            made[name] = draw(
                json_bytes(st.one_of(st.lists(values, max_size=3), fields(["0", "1", "classes", "9" * 30, "²"])))
            )
    return made


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@st.composite
def settings_files(draw):
    literals = st.one_of(
        values.filter(lambda v: len(repr(v)) < 10_000).map(repr),
        st.sampled_from(
            ["(" * 5000, "[" * 90 + "]" * 90, "-" * 100_000 + "1", "1+" * 20_000 + "1", "9" * 5000, "1e999"]
        ),
        st.sampled_from(
            ["__import__('os').system('x')", "open('x')", "1j", "b'a'", "{1:2}", "{*()}", "lambda: 0", "\0"]
        ),
        st.sampled_from(
            ["'a' * 10**10", "10**10**10", "(1,) * 10**9", "f'{1}'", "...", "2**2**99", "'\\ud800'", "x := 1"]
        ),
        st.text(max_size=20),
        st.sampled_from(["1" + "0" * 400, "(1" + "0" * 400 + ",)", "x" * 10**6, "1_0", "0x1p3", "inf", "-nan"]),
    )
    names = st.sampled_from(
        ["batch_size", "lr", "ch_mult", "name", "flag", "stds", "names", "__doc__", "nope", "é", ""]
    )
    arguments = [f"--{draw(names)}={draw(literals)}" for _ in range(draw(st.integers(0, 3)))]
    arguments += draw(st.lists(st.text(max_size=8), max_size=1))
    source = "\n".join(f"{draw(names)} = {draw(literals)}" for _ in range(draw(st.integers(0, 3))))
    if draw(st.integers(0, 3)) == 0:
        source = draw(
            mutated([b'"""doc"""\nlr = 1e-4\nch_mult = (1, 2)\n', b"# coding: utf-7\nlr = 1", b"\xff\xfelr"])
        ).decode("latin-1")
    return {"small.py": source.encode(errors="surrogatepass"), "argv": json.dumps(arguments).encode()}


DEFAULTS = dict(batch_size=12, lr=1e-4, ch_mult=(1, 2), name="a", flag=True, stds=(), names=("a", "b"), shares=(0.5,))


def read_settings(folder):
    argv = json.loads(Path(f"{folder}/argv").read_text())
    for given_ in (argv, [f"{folder}/small.py"], [folder], [f"{folder}/none.py"]):
        try:
            configurator.parse(given_, DEFAULTS)
        except configurator.SettingError as e:  # alone is told in one line
            if unclear(e) or len(str(e)) > 2000:
                raise TypeError(str(e)[:2000]) from None
        except ValueError as e:
            raise TypeError(f"{type(e).__name__}: {e}") from None


@functools.cache
def texts():
    bpe = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    merges = b"#version: 0.2\n" + b"i n\nt h\na n\nr e</w>\n"
    made = [bpe, bpe + b"aW4= 256\n", b"a prompt\nanother\n", "\ufeffa é\n".encode(), b"\xff\xfe", b"\n\n", merges]
    made += [gzip.compress(merges), gzip.compress(b"\0" * 10_000_000), b"a" * 10_000_000, b"layout {}"]
    made += [b'layout {"names": ["a"], "grid": 4}', b'layout {"names": ["a"], "grid": 1000000000}']
    made += [
        b"layout " + b"[" * 50_000,
        gzip.compress(b"ab\n" * 10**6),
    ]
    return made


def read_texts(folder):
    path = f"{folder}/prompts.txt"
    content = Path(path).read_bytes()

    def encoder(source):
        made = TextEncoder(8, 1, 2, 6, source)
        if made.tokenizer.n_vocab < 10**5:
            made.tokenize(["a b", "é", ""])

    tolerate(
        lambda: sample.read_prompts(path),
        lambda: make_tokenizer(path),
        lambda: make_tokenizer(content),
        lambda: encoder(content),
        lambda: CLIPTokenizer(path),
        lambda: CLIPTokenizer(content),
        lambda: dataset.read_classes(path),
        lambda: bapps.read_judgement(path),
    )


def header(text, version=(1, 0)):
    """An .npy file with this header."""
    content = text.encode("latin-1", "replace")
    size = len(content).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + size + content + b"\0" * 64


@functools.cache
def arrays():
    made = [
        npy(np.zeros((3, 4, 4, 3), np.uint8)),
        npy(np.arange(3)),
        npy(np.zeros((3, 4, 4), np.uint8)),
        npy(np.zeros(3)),
    ]
    made += [npy(np.array([{"a": 1}, Evil((os.system, ("touch pwned",))), 3], dtype=object)), npy(np.zeros(0))]
    made += [
        npy(np.zeros((2, 1, 2, 3), np.float16)),
        npy(np.array(["a", "b", "c"])),
        npy(np.zeros((3, 0, 0, 3), np.uint8)),
    ]
    for descr in ("'|u1'", "'|O'", "[('a', '|O')]", "'<U999999999'", "'|V99999999'", "'<M8[s]'", "'>f8'", "'|S0'", "1"):
        for shape in (
            "(3, 4, 4, 3)",
            "(9999999999999,)",
            "(2**62, 4)",
            "(-1, 4, 4, 3)",
            "()",
            "(3, 4611686018427387904)",
            "(0, 4, 4, 3)",
        ):
            made.append(header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"))
    made += [header("{" * 5000), header("(" * 60_000, (2, 0)), header("__import__('os').system('x')"), header("")]
    return made


@functools.cache
def bundles():
    made = []
    for parts in ({"arr_0": np.zeros((3, 4, 4, 3), np.uint8)}, {"files": np.array(["a"]), "keys": np.zeros(3)}):
        file = io.BytesIO()
        np.savez(file, **parts)
        made.append(file.getvalue())
    good = dict(n=1, part="", files=["a.tar"], prefix="a/", names=[], named=False, content=10240, width=1, bytes=1)
    good |= dict(digest="0", low=[0] * 12, high=[0] * 12, crc=[0, 0])
    for key in (b"x", b"../../outside/secret.png", b"/OUTSIDE/secret.png", b""):
        for numbers in ([-1, 0, 512, 100], [-1, -1, 0, 6], [2**40, 0, 2**50, 9], [0, 7, 0, 2**62], [-9, 0, -5, 3]):
            for about in (good, good | dict(named=True), good | dict(names=3), good | dict(n=2**40, part="../x")):
                file = io.BytesIO()
                table = np.array([numbers + [2, 0, 0, 2**40] + [0] * 4])
                told = np.array(json.dumps(about))
                np.savez(file, about=told, keys=np.array([key]), table=table, held=np.array([0]))
                made.append(file.getvalue())
    for content in arrays()[:20]:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("arr_0.npy", content)
        made.append(file.getvalue())
    return made


@st.composite
def array_files(draw):
    made = {"images.npy": draw(mutated(arrays(), 3)), "bundle.npz": draw(mutated(bundles(), 3))}
    for name in ("labels.npy", "maps.npy"):
        if draw(st.booleans()):
            made[name] = draw(mutated(arrays(), 2))
    if draw(st.booleans()):
        made["images.npy"] = arrays()[0]
    return made


def read_arrays(folder):
    for name in ("2afc/train/x",):
        os.makedirs(f"{folder}/.judged/{name}", exist_ok=True)
        for file, new in (("images.npy", "images.npy"), ("labels.npy", "judge.npy")):
            if os.path.exists(f"{folder}/{file}"):
                shutil.copy(f"{folder}/{file}", f"{folder}/.judged/{name}/{new}")

    def judged():
        judgements = lpips_train.Judgements(f"{folder}/.judged", "2afc", "train")
        [judgements.item(i) for i in range(min(len(judgements), 3))]

    def picked():
        some, which = fid.open_pictures(f"{folder}/bundle.npz", "source", 4)
        [some.rgb(i) for i in list(which)[:3]]

    def indexed():
        os.makedirs(f"{folder}/.far/.tmp", exist_ok=True)
        with tarfile.open(f"{folder}/.far/a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            member = tarfile.TarInfo("x.png")
            member.size = len(pictures()[5])
            tar.addfile(member, io.BytesIO(pictures()[5]))
        shutil.copy(f"{folder}/bundle.npz", f"{folder}/.far/a.tar.index.npz")
        read_all(f"file://{folder}/.far")

    tolerate(
        lambda: read_all(folder),
        judged,
        picked,
        indexed,
        lambda: bapps.read_judgement(f"{folder}/images.npy"),
    )


@functools.cache
def packed():
    """Archives of data sets as they are published: a zip of images, idx, a tar."""
    made, zipped = [], io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as z:
        for name in ("a.png", "../outside/b.png", "/tmp/c.jpg", "d/../../e.png", "f.txt"):
            z.writestr(name, pictures()[5])
        z.writestr("bomb.png", b"\0" * 200_000_000)
    made.append(zipped.getvalue())
    idx = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4)) + bytes(24)
    huge = bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(24)
    made += [gzip.compress(idx), gzip.compress(huge), gzip.compress(b"\0" * 100_000_000), idx]
    return made


@st.composite
def archive_files(draw):
    ending = draw(st.sampled_from(("zip", "gz", "tar", "bin")))
    made = {f"a.{ending}": draw(mutated(packed()))}
    made["stats/0_stats.json"] = draw(json_bytes(fields(["count", "successes", "status_dict", "failed_to_download"])))
    return made


def read_archives(folder):
    from data.laion400m.prepare import lost_links

    path = str(next(Path(folder).glob("a.*")))

    def unpack():
        for _, image in prepare.list_images(path):
            if callable(image):
                try:
                    image = image()
                except Exception:  # as in prepare.make
                    image = b""
            prepare.convert(image, {}, HOW)

    tolerate(lambda: as_prepare_does(unpack), lambda: mnist.read_idx(path, 3), lambda: list(prepare.tar_samples(path)))
    tolerate(lambda: lost_links(f"{folder}/stats"))


KINDS = {
    "checkpoint": (checkpoint_files, read_checkpoints),
    "pickle": (lambda: mutated(pickles(), 3).map(lambda content: {"model.ckpt": content}), read_pickles),
    "tar": (tar_files, read_shards),
    "parquet": (lambda: mutated(tables(), 3).map(lambda content: {"a.parquet": content}), read_tables),
    "images": (picture_files, read_pictures),
    "captions": (caption_files, read_all),
    "settings": (settings_files, read_settings),
    "prompts": (lambda: mutated(texts(), 4).map(lambda content: {"prompts.txt": content}), read_texts),
    "arrays": (array_files, read_arrays),
    "archives": (archive_files, read_archives),
}

# -- the run -----------------------------------------------------------------------------------------------------------


def put(folder, made):
    """Writes {path: bytes} into an empty folder."""
    for child in Path(folder).iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    for path, content in made.items():
        target = Path(folder, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def place(made, outside):
    """Absolute names in the files lead to a real folder."""
    return {path: content.replace(b"/OUTSIDE", outside.encode()) for path, content in made.items()}


def fuzz(name, work, seconds, examples, start):
    """In a process of its own: {"examples": n, "failures": {place: [why, size]}, "slowest": seconds}."""
    strategy, reader = KINDS[name]
    folder, outside = f"{work}/{name}/case", f"{work}/{name}/outside"
    os.makedirs(folder)
    os.makedirs(outside)
    Path(f"{outside}/secret.png").write_bytes(picture("PNG"))
    for ending in (".jpg", ".json", ".txt", ".tar", ""):
        Path(f"{outside}/secret{ending}").write_bytes(b"secret")
    os.chdir(f"{work}/{name}/case")
    sys.stdout = open(os.devnull, "w")
    os.dup2(os.open(f"{work}/{name}/stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)  # libtiff says a lot
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, slow)
    torch.set_num_threads(1)
    made = strategy()
    import pyarrow.parquet  # noqa: F401  what is loaded on first use is loaded now

    read_checkpoints(None)
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # built for another torch: as in conftest.py
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    tempfile.gettempdir()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    sys.addaudithook(hook)
    report = {"examples": 0, "failures": {}, "slowest": 0.0}
    began, number = time.monotonic(), start

    def one(content):
        content = place(content, outside)
        put(folder, content)
        before = time.monotonic()
        failure = attempt(reader, folder)
        report["slowest"] = max(report["slowest"], time.monotonic() - before)
        report["examples"] += 1
        if failure:
            where, why = failure
            size = sum(map(len, content.values()))
            if where not in report["failures"] or size < report["failures"][where][1]:
                report["failures"][where] = [why[:300], size]
                shutil.rmtree(f"{work}/{name}/{len(where)}-{zlib.crc32(where.encode()):08x}", ignore_errors=True)
                shutil.copytree(folder, f"{work}/{name}/{len(where)}-{zlib.crc32(where.encode()):08x}")

    while time.monotonic() - began < seconds or report["examples"] < examples:
        options = dict(database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        many = min(examples, 100) if examples else 100
        run = settings(max_examples=many, **options)(seed(number)(given(made)(one)))
        try:
            run()
        except MemoryError:
            pass
        number += 1
        Path(f"{work}/{name}/report.json").write_text(json.dumps(report))
    return report


def main():
    work = Path(keep or tempfile.mkdtemp(prefix="fuzz-"))
    failures, total = 0, 0
    for name in targets.split(","):
        shutil.rmtree(work / name, ignore_errors=True)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            try:
                fuzz(name, work, seconds, examples, seed_)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        path = work / name / "report.json"
        report = json.loads(path.read_text()) if path.exists() else {"examples": 0, "failures": {}, "slowest": 0}
        if status:
            print((work / name / "stderr").read_text()[-2000:])
            report["failures"]["the process"] = [
                f"it died (status {status}); {work / name / 'case'} is what it read",
                0,
            ]
        failures, total = failures + len(report["failures"]), total + report["examples"]
        print(
            f"{name}: {report['examples']} examples, slowest {report['slowest']:.1f} s, "
            f"{len(report['failures'])} failures",
            flush=True,
        )
        for where, (why, size) in report["failures"].items():
            print(f"  {where} ({size} bytes, {len(where)}-{zlib.crc32(where.encode()):08x}): {why}", flush=True)
    print(f"{total} examples, {failures} failures")
    if not keep and not failures:
        shutil.rmtree(work)
    return failures


if __name__ == "__main__":
    configurator.configure(globals())
    sys.exit(bool(main()))
