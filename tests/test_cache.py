"""The latent cache: what is in it, what makes another one, damage, several ranks, and latents on the device."""

import contextlib
import copy
import os
import shutil
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import all_same, encoded, png, put

from checkpoint import UserError
from data import cache as room
from data.cache import LatentCache
from data.dataset import Dataset, Stream, loader
from vae import VAE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, "SHARD", 8)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, mid_attention=False).requires_grad_(False)


@pytest.fixture
def stream(tmp_path):
    """19 images, of which every fifth does not decode."""
    files = {f"{i:02d}.png": png(i, (20, 16)) if i % 5 else b"no" for i in range(19)}
    return Stream(Dataset(put(tmp_path / "set", files), "all", (16, 24)), 3, flip=True)


def build(cache, vae, workers=0, rank=0, world=1):
    cache.build(vae, CPU, contextlib.nullcontext(), workers, rank, world)
    return cache


def contents(cache):
    return {name: open(f"{cache.folder}/{name}", "rb").read() for name in sorted(os.listdir(cache.folder))}


def test_it_holds_what_the_encoder_gives(stream, vae, capsys):
    cache = build(LatentCache(stream, vae, "cache"), vae)
    size = 19 * 2 * 2 * 4 * 8 * 12 * 2
    assert f"caching the latents of 19 images in {cache.folder}: {size / 2**30:.3g} GiB" in capsys.readouterr().out
    assert list(contents(cache)) == ["000000.npy", "000001.npy", "000002.npy"] and cache.bytes == size
    in_memory, replaced = LatentCache(stream, vae, "cache"), 0
    latents = in_memory.load(CPU)
    assert latents.shape == (19 * 2, 2, 4, 8, 12) and latents.dtype == torch.float16 and latents.nbytes == cache.bytes
    for p in range(57):
        got, wanted, of_memory = cache[p], stream[p], in_memory[p]
        posterior, moments = vae.encode(wanted.pop("image")[None]), got.pop("image")
        assert moments.dtype == torch.float16 and moments.shape == (2, 4, 8, 12)
        torch.testing.assert_close(moments.float(), torch.cat([posterior.mean, posterior.std]), rtol=2e-3, atol=1e-4)
        assert torch.equal(latents[got["index"] * cache.flips + got["flip"]], moments)
        assert of_memory.pop("image").shape == (0,) and of_memory == got
        bad, wanted_bad = got.pop("bad"), wanted.pop("bad")
        assert got == wanted and len(bad) == len(wanted_bad), "the same stand-ins"
        assert all("did not decode when its latents were cached" in line for line in bad)
        replaced += bool(bad)
    assert replaced == 12
    assert all_same(loader(cache, 0, 5, 4, workers=2), loader(cache, 0, 5, 4))


def test_it_belongs_to_encoder_and_data(stream, vae, tmp_path):
    def folder(path="set", flip=True, split="all", size=(16, 24), model=vae, precision="float32"):
        data = Stream(Dataset(tmp_path / path, split, size), 3, flip=flip)
        return LatentCache(data, model, "cache", precision).folder

    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    put(tmp_path / "copy", {"metadata.jsonl": '{"file_name": "03.png", "text": "t"}'})
    models = {name: copy.deepcopy(vae) for name in ("encoder.conv_in.bias", "decoder.conv_out.bias")}
    for name, model in models.items():
        model.get_parameter(name).add_(0.1)
    encoder, decoder = (folder(model=model) for model in models.values())
    assert folder() == folder("copy") == decoder, "neither path, captions nor the decoder matter"
    others = [folder(flip=False), folder(split="train"), folder(size=(24, 16)), folder(precision="bfloat16")]
    assert len({folder(), encoder, *others}) == 6


def photos(form, edited):
    """Files of 100 images in a form; edited: number 37 has other pixels, or only another orientation (EXIF)."""
    pixels, exif = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), np.uint8), Image.Exif()
    if edited and form != "jpg":
        pixels[37] = 255 - pixels[37]
    exif[0x0112] = 3 if edited else 1
    files = {f"{i:02d}.bmp": encoded(pixel, "BMP") for i, pixel in enumerate(pixels)}
    turned = {"a.jpg": encoded(pixels[0], "JPEG"), "b.jpg": encoded(pixels[37], "JPEG", exif=exif)}
    shards = {"npy": pixels, "tar": files, "parquet": {"image": list(files.values())}}
    return files | turned if form == "jpg" else files if form == "bmp" else {f"images.{form}": shards[form]}


@pytest.mark.parametrize("keeps_time", (False, True))
@pytest.mark.parametrize("form", ("bmp", "jpg", "npy", "tar", "parquet"))
def test_an_edit_that_keeps_the_size_makes_another_and_a_copy_does_not(form, keeps_time, vae, tmp_path):
    def folder(path):
        return LatentCache(Stream(Dataset(path, "all", 16), 0), vae, "cache").folder

    path = put(tmp_path / "set", photos(form, False))
    before, found = folder(path), {file: os.stat(file) for file in path.iterdir()}
    shutil.copytree(path, tmp_path / "copy")  # with times, as cp -a and rsync -t
    assert folder(tmp_path / "copy") == before
    for file, content in photos(form, True).items():
        if form == "npy":
            array = np.load(path / file, mmap_mode="r+")
            array[:] = content
            array.flush()
        else:
            put(path, {file: content})
    for file, stat in found.items():
        assert file.stat().st_size == stat.st_size
        if keeps_time:
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert folder(path) != before


@pytest.mark.parametrize("damage", ("killed", "cut short", "no head", "bad head"))
def test_a_file_that_is_not_complete_is_made_again(stream, vae, damage, capsys):
    cache = build(LatentCache(stream, vae, "cache"), vae)
    before, path = contents(cache), cache.path(1)
    data = before["000001.npy"]
    if damage == "killed":  # while it wrote
        os.rename(path, f"{path}.123.tmp")
    else:
        with open(path, "wb") as f:
            bad = {"cut short": data[:-1], "no head": b"\0" * len(data), "bad head": data.replace(b"}", b"(", 1)}
            f.write(bad[damage])
    times = [os.stat(cache.path(shard)).st_mtime_ns for shard in (0, 2)]
    capsys.readouterr()
    build(cache, vae)
    assert "caching the latents of 8 images" in capsys.readouterr().out
    assert {name: data for name, data in contents(cache).items() if not name.endswith(".tmp")} == before
    assert times == [os.stat(cache.path(shard)).st_mtime_ns for shard in (0, 2)], "the others stay"
    build(cache, vae)
    assert capsys.readouterr().out == "", "nothing is left to do"


def test_two_ranks_build_the_cache_of_one(stream, vae, monkeypatch):
    one = build(LatentCache(stream, vae, "one"), vae, workers=1)
    pair = [LatentCache(stream, vae, "two") for _ in range(2)]
    threads = [threading.Thread(target=build, args=(c, vae, 0, rank, 2)) for rank, c in enumerate(pair)]
    threads[0].start()
    threads[0].join(0.5)
    assert threads[0].is_alive(), "it waits for rank 1"
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads) and contents(pair[0]) == contents(one)
    monkeypatch.setattr(room, "PATIENCE", 1)
    with pytest.raises(UserError, match="000001.npy: is not made by the other ranks .1 files.*all nodes share"):
        build(LatentCache(stream, vae, "alone"), vae, 0, 0, 2)


def test_a_disk_too_small_is_said_before_anything_is_written(stream, vae, monkeypatch):
    cache, usage = LatentCache(stream, vae, "cache"), namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(cache.bytes - 1))
    with pytest.raises(UserError, match="has no room for the latents .*GiB to write.*make room, or set another"):
        build(cache, vae)
    assert not contents(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(cache.bytes))
    assert len(contents(build(cache, vae))) == 3 and np.load(cache.path(2)).shape == (3, 2, 2, 4, 8, 12)
