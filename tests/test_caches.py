"""What stage 2 keeps beside the data: text embeddings on disk, latents on the device; damage to either cache."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import sys
import tarfile
import threading
from collections import namedtuple

import helpers
import numpy as np
import pytest
import torch
from conftest import fill
from helpers import assert_same, read
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_train_vae import continued, make_images

import sample
import train_ldm
from convert import hash_weights
from data import cache as cache_files
from data.cache import LatentCache, TextCache
from data.dataset import Dataset, Stream
from data.tasks import WithCondition
from text import CLIPTextEncoder
from vae import VAE

MERGES = b"#version: 0.2\nb l\nr e\n"  # a vocabulary of 516: 512 bytes, these two, start and end
SMALL = dict(length=20, activation="gelu", pad="zero", vocab=516)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_files, "SHARD", 8)


@pytest.fixture(scope="session")
def vae(first_stage):
    return VAE.from_pretrained(str(first_stage))


def make_tower(seed=0, **others):
    tower = CLIPTextEncoder(64, 1, 1, **dict(SMALL, merges=MERGES) | others)
    return fill(tower, seed).requires_grad_(False).eval()


@pytest.fixture(scope="session")
def tower_args(tmp_path_factory):
    """Arguments that train on a small frozen tower."""
    folder = tmp_path_factory.mktemp("tower")
    save_file(make_tower().state_dict(), folder / "tower.safetensors")
    (folder / "merges.txt").write_bytes(MERGES)
    places = f"--tower_weights={folder}/tower.safetensors --clip_vocab={folder}/merges.txt"
    return ("--text_encoder=other", *places.split())


@pytest.fixture(scope="session")
def told_data(small_data, tmp_path_factory):
    """small_data whose images have none, one, two or three captions."""
    root = tmp_path_factory.mktemp("told") / "data"
    shutil.copytree(small_data, root)
    for part, count in (("train", 24), ("val", 16)):
        texts = [[f"{'again ' * k}blob {i}" for k in range(i % 4)] for i in range(count)]
        lines = [json.dumps({"text": several}) for several in texts]
        (root / part / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return root


def stream_of(data, train=True):
    images = Dataset(data, "train" if train else "val", 16)
    return WithCondition(Stream(images, 3, flip=True, train=train), "none", 3)


def text_cache(stream, tower, folder, precision="float32"):
    return TextCache(stream, tower, hash_weights(tower), folder, precision)


def build(cache, model, rank=0, world=1):
    cache.build(model, CPU, contextlib.nullcontext, 0, rank, world)
    return cache


def caches(kind, data, vae, folder):
    """(makes a cache that is not yet built, the model it is built with)"""
    if kind == "text":
        tower = make_tower()
        return (lambda: text_cache(stream_of(data), tower, folder)), tower
    return (lambda: LatentCache(Stream(Dataset(data, "train", 16), 3, flip=True), vae, folder)), vae


def contents(cache):
    return {name: open(f"{cache.folder}/{name}", "rb").read() for name in sorted(os.listdir(cache.folder))}


both_kinds = pytest.mark.parametrize("kind", ("latents", "text"))


# -- text --


@pytest.mark.parametrize("train", (True, False))
def test_the_cache_holds_what_the_tower_gives(told_data, tmp_path, train, capsys):
    stream, tower = stream_of(told_data, train), make_tower()
    cache, seen = build(text_cache(stream, tower, tmp_path), tower), {}
    assert list(contents(cache)) == [f"{i:06d}.safetensors" for i in range(3 if train else 2)]
    told = f"the text of {24 if train else 16} images ({36 if train else 24} captions) in {cache.folder}: "
    assert told + f"{(36 if train else 24) * 20 * 64 * 2 / 2**30:.3g} GiB" in capsys.readouterr().out
    with torch.no_grad():
        for p in range(72 if train else 16):
            got, wanted = cache[p], stream[p]
            context = got.pop("context")
            assert context.dtype == torch.float16 and context.shape == (20, 64)
            torch.testing.assert_close(context.float(), tower([wanted["text"]])[0], rtol=2e-3, atol=1e-4)
            assert torch.equal(got.pop("image"), wanted.pop("image")) and got.pop("condition") == wanted.pop(
                "condition"
            )
            assert got == wanted
            seen.setdefault(got["index"], set()).add(got["text"])
    if train:
        assert len(seen) == 24 and max(map(len, seen.values())) == 3 and seen[4] == {""}, "every kind was drawn"
    size = sum(len(data) for data in contents(cache).values())
    assert size < (36 if train else 24) * 20 * 64 * 2 + 2000, "nothing but the captions, in halves"


def test_the_cache_of_text_belongs_to_tower_and_data(told_data, tmp_path):
    def folder(data=told_data, tower=None, precision="float32", train=True):
        return text_cache(stream_of(data, train), tower or make_tower(), "cache", precision).folder

    for name in ("same", "captions", "images"):
        shutil.copytree(told_data, tmp_path / name)
    assert folder(tmp_path / "same") == folder(), "the place does not matter"
    path = tmp_path / "captions/train/captions.jsonl"
    path.write_text(path.read_text().replace("blob 9", "blob nine", 1))
    images = np.load(tmp_path / "images/train/images.npy")
    np.save(tmp_path / "images/train/images.npy", images[:, ::-1].copy())
    others = [folder(tmp_path / "captions"), folder(tmp_path / "images"), folder(train=False), folder(precision="x")]
    towers = [make_tower(1), make_tower(pad="end"), make_tower(merges=MERGES.replace(b"b l", b"l b"))]
    assert len({folder(), *others, *(folder(tower=tower) for tower in towers)}) == 8


def test_captions_that_changed_since_are_noticed(told_data, tmp_path):
    """Where neither place nor length tells: one image's captions have another word of as many letters."""
    shutil.copytree(told_data, tmp_path / "data")
    tower = make_tower()
    build(text_cache(stream_of(tmp_path / "data"), tower, tmp_path), tower)
    path = tmp_path / "data/train/captions.jsonl"
    path.write_text(path.read_text().replace('blob 3"', 'blab 3"'))
    cache, odd = build(text_cache(stream_of(tmp_path / "data"), tower, tmp_path), tower), 0
    for p in range(24):
        if cache.stream[p]["index"] == 3:
            odd += 1
            with pytest.raises(ValueError, match="00000003 has other captions than were cached: delete .*000000.safet"):
                cache[p]
        else:
            cache[p]
    assert odd == 1
    os.remove(cache.path(0))
    cache = build(text_cache(stream_of(tmp_path / "data"), tower, tmp_path), tower)
    assert {cache[p]["index"] for p in range(24)} == set(range(24))


def test_captions_that_do_not_read_are_replaced_as_without_the_cache(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data/train-0.tar", "w") as tar:
        for i in range(12):
            image, caption = io.BytesIO(), json.dumps({"text": [f"picture {i}", f"{i}"]}).encode()
            Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(image, "JPEG")
            for name, data in ((f"{i}.jpg", image.getvalue()), (f"{i}.json", caption[: -9 * (i == 5)] or caption)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    stream, tower = stream_of(tmp_path / "data"), make_tower()
    cache, replaced = build(text_cache(stream, tower, tmp_path), tower), 0
    assert "(20 captions)" in capsys.readouterr().out
    for p in range(24):
        got, wanted = cache[p], stream[p]
        assert (got["index"], got["text"], got["bad"]) == (wanted["index"], wanted["text"], wanted["bad"])
        torch.testing.assert_close(got["context"].float(), tower([wanted["text"]])[0], rtol=2e-3, atol=1e-4)
        replaced += bool(got["bad"])
    assert replaced == 2


# -- both caches --


@both_kinds
@pytest.mark.parametrize("damage", ("killed", "cut short", "no head", "empty"))
def test_a_file_that_is_not_whole_is_made_again(kind, damage, told_data, vae, tmp_path, capsys):
    make, model = caches(kind, told_data, vae, tmp_path)
    cache = build(make(), model)
    whole, inodes = contents(cache), {name: os.stat(f"{cache.folder}/{name}").st_ino for name in contents(cache)}
    path, name = cache.path(1), os.path.basename(cache.path(1))
    data = {"cut short": whole[name][:-1], "no head": b"\0" * len(whole[name]), "empty": b""}.get(damage)
    if data is None:  # killed while it wrote
        os.rename(path, f"{path}.123.tmp")
    else:
        with open(path, "wb") as f:
            f.write(data)
        inodes[name] = None
    capsys.readouterr()
    cache = build(make(), model)
    out = capsys.readouterr().out
    assert (f"{path} is cut short or damaged: it is made again" in out) == (data is not None)
    assert re.search(r"caching the (latents|text) of 8 images", out)
    if data is None:
        os.remove(f"{path}.123.tmp")
    assert contents(cache) == whole
    assert [n for n in whole if os.stat(f"{cache.folder}/{n}").st_ino != inodes[n]] == [name]
    build(make(), model)
    assert capsys.readouterr().out == "", "nothing is left to do"


@both_kinds
def test_workers_killed_while_it_is_built_change_nothing(kind, told_data, vae, tmp_path, monkeypatch, capsys):
    make, model = caches(kind, told_data, vae, tmp_path / "plain")
    plain = build(make(), model)
    read, parent = (Dataset.pixels, Dataset.meta)[kind == "text"], os.getpid()

    def deadly(self, i, *args, **options):
        if i == 11 and os.getpid() != parent and not os.path.exists(tmp_path / "died"):
            open(tmp_path / "died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, i, *args, **options)

    monkeypatch.setattr(Dataset, read.__name__, deadly)
    make, model = caches(kind, told_data, vae, tmp_path / "killed")
    cache, before = make(), signal.getsignal(signal.SIGCHLD)
    cache.build(model, CPU, contextlib.nullcontext, 2, 0, 1)
    assert contents(cache) == contents(plain) and signal.getsignal(signal.SIGCHLD) is before
    assert "was killed by SIGKILL (out of memory?), with positions" in capsys.readouterr().out


@both_kinds
@pytest.mark.parametrize("late", (False, True))
def test_two_ranks_build_the_cache_of_one(kind, late, told_data, vae, tmp_path):
    make, model = caches(kind, told_data, vae, tmp_path / "one")
    one = build(make(), model)
    make, model = caches(kind, told_data, vae, tmp_path / "two")
    pair = [make(), make()]
    os.makedirs(pair[0].folder)
    open(pair[0].path(1), "w").close()  # cut short: rank 0 must wait for it all the same
    threads = [threading.Thread(target=build, args=(c, model, r, 2), daemon=True) for r, c in enumerate(pair)]
    threads[0].start()
    while late and not pair[0].is_whole(2):  # rank 0 is done with its shards, 0 and 2
        assert threads[0].is_alive()
    threads[0].join(timeout=0.3)
    assert threads[0].is_alive(), "it waits for rank 1"
    threads[1].start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads), "a rank waits for what nobody builds"
    assert contents(pair[0]) == contents(one)


@both_kinds
def test_a_disk_too_small_is_told_before_anything_is_written(kind, told_data, vae, tmp_path, monkeypatch):
    make, model = caches(kind, told_data, vae, tmp_path)
    size = {"latents": 24 * 2 * 2 * 4 * 8 * 8 * 2, "text": 36 * 20 * 64 * 2}[kind]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, size - 1))
    message = f"no room for the cache in .* \\({size / 2**30:.3g} GiB to write, and .* GiB free\\): make room, or set"
    with pytest.raises(OSError, match=message):
        build(make(), model)
    assert not contents(make())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, size))
    assert len(contents(build(make(), model))) == 3


# -- latents on the device --


def test_latents_in_memory_are_those_on_disk(vae, tmp_path):
    """With images that do not decode: the same stand-ins."""
    make_images(tmp_path / "images/train", 16, 3)  # one of which is kept for validation
    stream = Stream(Dataset(tmp_path / "images", "train", 16), 0, flip=True)
    disk, memory = (build(LatentCache(stream, vae, tmp_path), vae) for _ in range(2))
    latents, replaced = memory.load(CPU), 0
    assert latents.shape == (18 * 2, 2, 4, 8, 8) and latents.dtype == torch.float16
    assert latents.nbytes == memory.bytes
    for p in range(54):
        got, wanted = memory[p], disk[p]
        assert got.pop("image").shape == (0,)
        assert torch.equal(latents[got["index"] * memory.flips + got["flip"]], wanted.pop("image"))
        assert got == wanted
        replaced += bool(got["bad"])
    assert replaced >= 6


@pytest.mark.parametrize("bad", (0, 4))
def test_a_run_with_latents_in_memory_is_the_run_without(bad, start, tmp_path):
    """Byte for byte, decoded in a worker or not, bad images and all."""
    make_images(tmp_path / "images/train", 12, bad)
    make_images(tmp_path / "images/val", 3, 0)
    args = (f"--dataset={tmp_path}/images", "--cond=none", "--transformer_depth=0", "--max_steps=5")
    disk = start("ldm", *args).finish()
    memory = start("ldm", *args, "--latents_on_device=true", "--workers=1").finish()
    assert_same(disk.checkpoint[0], memory.checkpoint[0])
    assert f"keeping the latents on cpu: {(12 + bad) * 2 * 2 * 4 * 8 * 8 * 2 / 2**30:.3g} GiB" in memory.stdout
    assert "keeping" not in disk.stdout
    named = [line for line in disk.stdout.splitlines() if line.startswith("skipped a bad image (")]
    assert bool(named) == bool(bad)
    assert named == [line for line in memory.stdout.splitlines() if line.startswith("skipped a bad image (")]


# -- runs --


def train(monkeypatch, line):
    """train_ldm.py in this process -> its globals."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing curves takes longer than training
    monkeypatch.setattr(sys, "argv", ["train_ldm.py", *f"{helpers.ARGS['ldm']} {line}".split()])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return runpy.run_path(train_ldm.__file__, run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("kind", ("plain", "inpaint", "pixels"))
def test_a_run_with_cached_text_is_the_run_without(
    kind, told_data, first_stage, tower_args, tmp_path, monkeypatch, capsys
):
    """Bit for bit, and the grids too, of a tower whose embeddings halves can tell."""
    whole = CLIPTextEncoder.forward
    monkeypatch.setattr(CLIPTextEncoder, "forward", lambda self, prompts: whole(self, prompts).half().double())
    monkeypatch.chdir(tmp_path)
    args = f"--dataset={told_data} --first_stage={first_stage} --cache_dir=cache {' '.join(tower_args)} --max_steps=3"
    args += {"plain": "", "inpaint": " --task=inpaint", "pixels": " --first_stage=none"}[kind]
    args += " --dtype=float64 --val_images=6 --sample_steps=1 --out_dir="
    plain = train(monkeypatch, args + "plain")
    assert isinstance(plain["tower"], CLIPTextEncoder)
    del plain
    cached = train(monkeypatch, args + "cached --cache_text=True")
    assert not any(isinstance(value, CLIPTextEncoder) for value in cached.values()), "it is free to go"
    assert_same(*(read(f"{name}/latest.safetensors")[0] for name in ("plain", "cached")))
    for name in ("samples_00000003.png", "predictions_00000003.png"):
        with Image.open(f"plain/{name}") as a, Image.open(f"cached/{name}") as b:
            assert np.array_equal(a, b)
    logs = [[json.loads(line) for line in open(f"{name}/log.jsonl")] for name in ("plain", "cached")]
    for a, b in zip(*logs):
        assert [a[name] for name in ("loss", "val_loss")] == [b[name] for name in ("loss", "val_loss")]
    assert "caching the text of 24 images (36 captions)" in capsys.readouterr().out
    pipeline = sample.load_pipeline("cached")
    assert pipeline.tower is not None, "sample.py finds the tower by itself"


@pytest.fixture(scope="module")
def undisturbed(start, told_data, tower_args, tmp_path_factory):
    """(arguments, a run of four steps with cached text)"""
    args = (*tower_args, f"--dataset={told_data}", "--cache_text=true", "--max_steps=4", "--dtype=float64")
    cache = f"--cache_dir={tmp_path_factory.mktemp('cache')}"
    return args, start("ldm", *args, cache).finish()


def test_halves_change_the_loss_little(start, undisturbed):
    args, run = undisturbed
    plain = start("ldm", *args, "--cache_text=false").finish()
    a, b = ([record["loss"] for record in one.log if record["loss"]] for one in (run, plain))
    assert len(a) == 4 and a == pytest.approx(b, rel=1e-4) and a != b


def test_killed_while_the_text_is_cached(start, undisturbed, tmp_path):
    """Validation's text is there, training's is not; the second run goes on."""
    args, run = undisturbed
    args = (*args, f"--cache_dir={tmp_path}/cache")
    killed = start("ldm", *args, folder=tmp_path / "run", trap=("text of 24 images", signal.SIGKILL))
    assert killed.wait() == [-signal.SIGKILL]
    assert [len(files) for _, folders, files in os.walk(tmp_path / "cache") if not folders].count(0) == 1
    again = start("ldm", *args, folder=tmp_path / "run").finish()
    assert "caching the text of 24 images" in again.stdout and "text of 16 images" not in again.stdout
    assert_same(again.checkpoint[0], run.checkpoint[0])
    longer = start("ldm", *args, "--max_steps=5", "--latents_on_device=true", folder=tmp_path / "run").finish()
    assert "caching" not in longer.stdout and longer.checkpoint[1]["step"] == 5


def test_two_ranks_with_cached_text_are_one(start, undisturbed, tmp_path):
    args, run = undisturbed
    args = (*args, f"--cache_dir={tmp_path}/cache", "--batch_size=1", "--grad_accum=2", "--latents_on_device=true")
    two = start("ldm", *args, ranks=2, folder=tmp_path / "run").finish()
    assert_same(two.checkpoint[0], run.checkpoint[0], atol=1e-9)


def test_text_beside_a_run_that_goes_on_may_be_cached_or_not(start, undisturbed, tmp_path):
    args, run = undisturbed
    folder = continued(run, tmp_path)
    out = start("ldm", *args, "--cache_text=false", "--max_steps=5", folder=folder).finish()
    assert out.checkpoint[1]["step"] == 5


def test_a_checkpointed_run_is_the_run_without(start, finished):
    run = start("ldm", "--checkpointing=true", "--max_steps=3", "--eval_every=3", "--unet_dropout=0.1").finish()
    plain = start("ldm", "--max_steps=3", "--eval_every=3", "--unet_dropout=0.1").finish()
    assert_same(run.checkpoint[0], plain.checkpoint[0])


@pytest.mark.parametrize(
    "args, wanted",
    [
        ("--cache_text=true", "cache_text=True has a meaning for a frozen text_encoder alone: leave it out"),
        ("--latents_on_device=yes", "latents_on_device=yes is not one of auto, true, false"),
        ("--latents_on_device=true --cache_latents=false", "has a meaning for cached latents alone: leave it out"),
        ("--latents_on_device=true --first_stage=none", "has a meaning for cached latents alone: leave it out"),
    ],
)
def test_settings_that_do_not_go_together(args, wanted, start):
    assert wanted in start("ldm", *args.split()).fail()


def test_a_shard_of_text_is_what_the_docstring_says(told_data, tmp_path):
    tower = make_tower()
    cache = build(text_cache(stream_of(told_data), tower, tmp_path), tower)
    with safe_open(cache.path(2), framework="pt") as f:
        assert f.get_tensor("starts").tolist() == [0, 0, 1, 3, 6, 6, 7, 9, 12]
        assert f.get_tensor("context").dtype == torch.float16 and f.get_tensor("context").shape == (12, 20, 64)
        assert f.get_tensor("crc").shape == (12,)
