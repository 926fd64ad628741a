"""Scores of two sets of images against recorded values and torch-fidelity; generating many, interrupted and resumed."""

import json
import os
import re
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, fill
from helpers import Run, machine
from PIL import Image

import fid
from checkpoint import UserError
from data.dataset import to_mode, to_tensor
from fid import find_nearest, generate_many, score
from grid import to_pil
from lpips_train import make_trunk
from metrics import frechet, gaussian, mmd, precision_recall
from sample import generate, load_pipeline
from vae import VAE


@pytest.fixture(scope="session")
def squeeze(tmp_path_factory):
    """A file of random weights of squeeze."""
    torch.manual_seed(0)
    state = make_trunk("squeeze").state_dict()
    for name, t in state.items():
        t.normal_(0, (2 / t[0].numel()) ** 0.5) if name.endswith("weight") else t.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("trunk") / "squeeze.pth"
    torch.save(state, path)
    return str(path)


def blobs(n, seed, size=24):
    """n images, no two alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    phase = 2 * np.pi * (y[None] * rng.uniform(0, 3, (n, 1, 1)) + x[None] * rng.uniform(0, 3, (n, 1, 1)))
    waves = 0.5 + 0.5 * np.sin(phase)[..., None] * rng.uniform(-1, 1, (n, 1, 1, 3))
    return (255 * waves).round().astype(np.uint8)


def save_pngs(folder, images, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names or [f"{i:05d}" for i in range(len(images))], images):
        Image.fromarray(image).save(folder / f"{name}.png")
    return str(folder)


def scores(result):
    return [value for value in result.values() if isinstance(value, float)]


# --- scores ---


def test_recorded_scores(tmp_path, squeeze):
    """As an array, an .npz, a folder in any order, a folder of classes, a data set of arrays with a split."""
    samples, real = blobs(20, 0), blobs(30, 1) // 2
    expected = score(samples, real, trunk_weights=squeeze)
    assert scores(expected) == pytest.approx([11.6385937, 0.163416126, 0.05, 1.0], rel=1e-4)
    assert expected["features"] == "squeeze layer 12, unit length, mean over positions, 512"
    assert (expected["samples"], expected["reference"], expected["image_size"]) == (20, 30, 24)
    np.savez(tmp_path / "samples.npz", samples, labels=np.arange(20))
    (tmp_path / "npy/val").mkdir(parents=True)
    np.save(tmp_path / "npy/val/images.npy", real)
    np.save(tmp_path / "npy/images.npy", real[:5])
    save_pngs(tmp_path / "shuffled", samples, np.random.default_rng(0).permutation(20).tolist())
    for c in range(3):
        save_pngs(tmp_path / f"real/{c}", real[c::3])
    for a, b, options in (("samples.npz", "npy", dict(split="val", batch_size=7)), ("shuffled", "real", {})):
        found = score(tmp_path / a, tmp_path / b, trunk_weights=squeeze, **options)
        assert found.keys() == expected.keys() and scores(found) == pytest.approx(scores(expected), rel=1e-5)


def test_both_sets_are_cropped_and_resized_alike(tmp_path, squeeze, capsys):
    def resized(images):
        images = [Image.fromarray(image).resize((24, 24), Image.Resampling.LANCZOS) for image in images]
        return np.stack([np.asarray(image) for image in images])

    wide, real = blobs(20, 0, 60)[:, 10:50], blobs(30, 1, 31)
    small = resized(real)
    expected = score(resized(wide[:, :, 10:50]), small, trunk_weights=squeeze)
    assert scores(expected) == pytest.approx([3.5889128, 0.0272702, 0.8, 29 / 30], rel=1e-4)
    assert score(wide, real, 24, trunk_weights=squeeze) == expected
    folder = save_pngs(tmp_path / "wide", wide)
    (tmp_path / "wide/zz.png").write_bytes(b"nothing")
    first = save_pngs(tmp_path / "first", small, [f"b{i}" for i in range(30)])
    (tmp_path / "first/a.png").write_bytes(b"nothing")  # the side is then that of the first that decodes
    swapped = score(first, folder, trunk_weights=squeeze)  # a reference on disk can have any size
    assert swapped["squeeze_precision"] == expected["squeeze_recall"] != swapped["squeeze_recall"]
    out = capsys.readouterr().out
    assert "skipped a bad image of samples: a.png" in out and "skipped a bad image of reference: zz.png" in out


def test_a_folder_of_sample_py(tmp_path, squeeze):
    """Only the images that samples.jsonl names: not grid.png, nor what an earlier run left."""
    samples, real = blobs(8, 0), blobs(8, 1)
    save_pngs(tmp_path / "samples", samples)
    Image.new("RGB", (99, 50)).save(tmp_path / "samples/grid.png")
    lines = [json.dumps({"file": f"{i:05d}.png", "prompt": "x", "seed": i}) for i in range(6)]
    (tmp_path / "samples/samples.jsonl").write_text("\n".join(lines) + "\n")
    found = score(tmp_path / "samples", real, trunk_weights=squeeze)
    assert found == score(samples[:6], real, trunk_weights=squeeze) and found["samples"] == 6


def test_inception_scores_are_those_of_torch_fidelity(tmp_path, with_torchvision, monkeypatch):
    """Of features that stand in for Inception's (see test_metrics.py), where our own scores must agree."""
    pytest.importorskip("torch_fidelity", minversion="0.4")
    mix, seen = torch.randn(3 * 4, 6, generator=torch.Generator().manual_seed(0)), []

    def load_inception(weights, device):
        def extract(x):
            assert x.dtype == torch.uint8 and x.shape[1:] == (3, 24, 24) and not torch.is_grad_enabled()
            seen.append(torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1) @ mix)
            return seen[-1]

        return extract

    monkeypatch.setattr(fid, "load_inception", load_inception)
    (tmp_path / "inception.pth").write_bytes(b"weights")
    found = score(blobs(30, 0), blobs(30, 1), inception_weights=str(tmp_path / "inception.pth"), batch_size=30)
    f, g = seen
    assert found["fid"] == pytest.approx(frechet(*gaussian(f), *gaussian(g)), rel=1e-6)
    assert found["kid"] == pytest.approx(mmd(f, g), rel=1e-3) and found["kid_std"] < 1e-4, "all pairs, each time"
    assert (found["precision"], found["recall"]) == pytest.approx(precision_recall(f, g))
    assert found["features"].startswith("torch-fidelity 0.") and found["features"].endswith("KID 100 x 30")
    monkeypatch.undo()
    with pytest.raises(UserError, match="inception.pth: not the weights of Inception-v3"):
        score(blobs(30, 0), blobs(30, 1), inception_weights=str(tmp_path / "inception.pth"))


def test_inputs_that_cannot_be_compared(tmp_path, squeeze):
    images = blobs(6, 0)
    np.savez(tmp_path / "named.npz", images=images)
    np.savez(tmp_path / "floats.npz", images / 255)
    folder = save_pngs(tmp_path / "samples", [*images[:3], images[3][:20]])
    for args, options, message in (
        ((images, images), dict(trunk_weights=""), "set one of --inception_weights .* and --trunk_weights"),
        ((images, images), dict(inception_weights="y"), "set one of"),
        ((images[:3], images), {}, "samples: 3 images; give at least 4"),
        ((images, images[:0]), {}, "reference: 0 images; give at least 4"),
        ((images, blobs(6, 0, 32)), {}, "image 0: 32x32, not 24x24; set image_size"),
        ((folder, images), {}, "00003.png: 24x20, not 24x24; set image_size"),
        ((images[:, :12, :12], images), {}, "images of 12 px, squeeze needs 17 or more: set --image_size"),
        ((images[..., 0], images), {}, r"samples: uint8 \(6, 24, 24\); make it uint8 \(N,H,W,3\)"),
        ((tmp_path / "floats.npz", images), {}, "floats.npz: float64"),
        ((images, tmp_path / "named.npz"), {}, "named.npz: does not load"),
        ((images, tmp_path / "none"), {}, "--reference=.*none: no such file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            score(*args, **(dict(trunk_weights=squeeze) | options))
        assert "\n" not in str(caught.value)


# --- nearest training images ---


def save_training(folder, train, val):
    """A data set of PNGs with both splits, and before them an image that does not decode."""
    save_pngs(folder / "train", train)
    save_pngs(folder / "val", val)
    (folder / "train/0.png").write_bytes(b"nothing")
    return str(folder)


@torch.no_grad()
def decoded(vae, images):
    x = torch.stack([to_tensor(to_mode(Image.fromarray(image), vae.settings["image_mode"])) for image in images])
    return np.stack([np.array(to_pil(y).convert("RGB")) for y in vae.decode(vae.encode(x).mode())])


@pytest.mark.parametrize("through", ("", "RGB", "L"))
def test_copies_are_found_and_held_out_images_are_not(through, runs, squeeze, tmp_path):
    """Copies of training images, two of three mirrored, among samples that are like held-out images."""
    everything, vae = blobs(270, 0), runs["vae"].vae if through else None
    if through == "L":
        vae = fill(VAE(**vae.settings | dict(image_mode="L")), 2)
    train, held_out, fresh = everything[:72], everything[72:171], everything[171:]
    copies = train[::4].copy()  # 18
    copies[6:] = copies[6:, :, ::-1]
    if through:
        fresh, copies = decoded(vae, fresh), decoded(vae, copies)
    reference = save_training(tmp_path / "data", train, held_out)
    out, options = f"{tmp_path}/nearest", dict(trunk_weights=squeeze, batch_size=1)  # the training images in two parts
    for space, found in find_nearest(fresh, reference, **options, vae=vae, out=out):
        assert found["share"] <= found["expected"] + 3 * found["deviation"] < 0.06, (space, found)
    samples = save_pngs(tmp_path / "samples", np.concatenate([fresh[18:], copies]))
    (tmp_path / "samples/0.png").write_bytes(b"nothing")
    for space, found in find_nearest(samples, reference, **options, vae=vae, out=out):
        assert 18 / 99 <= found["share"] <= 18 / 99 + 0.06, (space, found)
        lines = [json.loads(line) for line in open(f"{out}.{space}.jsonl")]
        assert [line["sample"] for line in lines] == [f"{i:05d}.png" for i in range(99)]
        last = [(line["train"], line["mirrored"]) for line in lines[-18:]]
        assert last == [(f"train/{4 * i:05d}.png", i >= 6) for i in range(18)], space
        assert max(line["distance"] for line in lines[-18:]) < 0.05 < min(line["distance"] for line in lines[:-18])
        sheet = Image.open(f"{out}.{space}.png")
        assert sheet.size == (8 * 124, 4 * 148), "16 pairs, cells of 5 x 24 pixels with captions"
        for row, column in np.ndindex(4, 4):
            a, b = ((248 * column + x, 148 * row + 2, 248 * column + x + 120, 148 * row + 122) for x in (2, 126))
            assert (sheet.crop(a) == sheet.crop(b)) is not bool(through), (
                "the training image is shown as it is, mirrored"
            )
    if through:  # what the autoencoder is applied for
        for space, _ in find_nearest(samples, reference, **options, out=out):
            assert min(json.loads(line)["distance"] for line in open(f"{out}.{space}.jsonl")) > 0.05


def test_nearest_inputs_that_cannot_be_compared(runs, squeeze, tmp_path, command):
    images = blobs(30, 0)
    np.savez(tmp_path / "images.npz", images)
    reference, few = save_training(tmp_path / "data", images, images), save_pngs(tmp_path / "few", images)
    odd, vae = blobs(6, 0, 26), runs["vae"].vae
    for samples, data, options, message in (
        (images, reference, dict(trunk_weights=""), "set one of --inception_weights .* and --trunk_weights"),
        (images[:3], reference, {}, "samples: 3 images; give at least 4"),
        (images, few, {}, "held-out images: 1 images; give at least 4"),
        (images, tmp_path / "images.npz", {}, "images.npz: .*holds no images"),
        (images, tmp_path / "none", {}, "none: does not exist"),
        (odd, reference, dict(vae=vae), "images of 26 px, the autoencoder needs a multiple of 4: set --image_size"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            list(find_nearest(samples, data, **(dict(trunk_weights=squeeze) | options)))
        assert "\n" not in str(caught.value)
    for arguments in ([], [f"--reference={reference}", "--split=val"]):
        status, _, err = command("fid.py", "--device=cpu", "--nearest=true", *arguments)
        assert status == 1 and err.count("\n") == 1
        assert "--nearest=true needs --reference=DIR, the data set of training, without --split" in err


# --- generating many ---


def rows_of(rows, side=4):
    return np.stack([np.full((side, side + 1, 3), i % 256, np.uint8) for i in rows])


ALONE = types.SimpleNamespace(rank=0, world=1)


def test_generating_resumes_by_chunk(tmp_path, monkeypatch):
    path, calls = str(tmp_path / "samples.npz"), []

    def killed_after(most):
        def generate_rows(rows):
            if len(calls) == most:
                raise KeyboardInterrupt
            calls.append(rows)
            return rows_of(rows)

        return generate_rows

    labels, settings = [i % 3 for i in range(23)], {"seed": 1, "size": (8, 8)}
    with pytest.raises(KeyboardInterrupt):
        generate_many(path, 23, 5, killed_after(2), labels, settings, ALONE)
    assert sorted(os.listdir(path + ".parts")) == ["00000000.npy", "00000005.npy", "settings.json"]
    with pytest.raises(UserError, match="parts: has other settings: seed=1 then, 2 now"):
        generate_many(path, 23, 5, rows_of, labels, settings | {"seed": 2}, ALONE)
    file = tmp_path / "samples.npz.parts/settings.json"
    saved = file.read_text()
    file.write_text(saved[:-1])
    with pytest.raises(UserError, match="settings.json: cannot be read .*; delete .*samples.npz.parts$"):
        generate_many(path, 23, 5, rows_of, labels, settings, ALONE)
    file.write_text(saved)
    generate_many(path, 23, 5, killed_after(-1), labels, settings, ALONE)
    assert calls == [range(0, 5), range(5, 10), range(10, 15), range(15, 20), range(20, 23)], "none twice"
    with np.load(path) as npz:
        assert sorted(npz.files) == ["arr_0", "arr_1"] and npz["arr_0"].dtype == np.uint8
        assert np.array_equal(npz["arr_0"], rows_of(range(23))) and npz["arr_1"].tolist() == labels
    assert os.listdir(tmp_path) == ["samples.npz"]
    generate_many(path, 23, 5, killed_after(5), labels, settings, ALONE)  # is there already
    for other in ({"seed": 2}, {"steps": 3}):
        with pytest.raises(UserError, match="samples.npz: has other settings"):
            generate_many(path, 23, 5, rows_of, labels, settings | other, ALONE)
    np.savez(path, arr_0=rows_of(range(3)))
    with pytest.raises(UserError, match="seed=None then, 1 now"):
        generate_many(path, 23, 5, rows_of, labels, settings, ALONE)
    monkeypatch.setattr(fid.dist, "barrier", lambda: None)
    calls.clear()
    generate_many(f"{tmp_path}/of_two.npz", 23, 5, killed_after(-1), labels, settings, machine(1, 2))
    assert calls == [range(5, 10), range(15, 20)], "every second chunk is of the second rank"


def test_command_generates_and_scores(runs, command, tmp_path, squeeze):
    real = save_pngs(tmp_path / "real", blobs(7, 3, 32))
    args = ["fid.py", "--device=cpu", f"--ckpt={runs['class'].path}", "--steps=2", "--num_samples=10", "--seed=3"]
    args += ["--batch_size=4", f"--reference={real}", f"--trunk_weights={squeeze}"]
    status, out, err = command(*args)
    assert (status, err) == (0, "")
    with np.load("samples.npz") as npz:
        images, labels = npz["arr_0"], npz["arr_1"]
    assert images.shape == (10, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3] * 2 + [0, 1]
    expected = generate(load_pipeline(runs["class"].path), labels.tolist(), range(3, 13), 2, 3.0, "unipc")
    assert abs(images.astype(int) - np.stack([to_pil(x) for x in expected])).max() <= 1
    wanted = score(images, real, trunk_weights=squeeze)
    first, opened, *lines, last = out.splitlines()
    assert opened.startswith(f"{real}: folder, 7 images (train 6, val 1)")
    assert first == "10 images in samples.npz" and "few images" in last and len(lines) == 4
    about = "  # 10 samples, 7 real (all); 32 px, center crop, Lanczos, uint8; squeeze layer 12, unit length"
    for line, name in zip(lines, ("frechet", "mmd", "precision", "recall")):
        assert line.startswith(f"squeeze_{name} {wanted[f'squeeze_{name}']:.6g}{about}")
        assert line.endswith(f"sha256 {wanted['sha256'][:16]}")
    stamp = os.stat("samples.npz").st_mtime_ns
    assert command(*args)[1] == out and os.stat("samples.npz").st_mtime_ns == stamp, "scored as it is"
    data = save_training(tmp_path / "training", blobs(9, 4, 32), blobs(9, 5, 32))
    for asked in (args[2:], ["--samples=samples.npz", *args[2:3], args[-1]]):  # with the settings of generating or not
        status, out, err = command(*args[:2], *asked, f"--reference={data}", "--nearest=true")
        assert (status, err, os.stat("samples.npz").st_mtime_ns) == (0, "", stamp)
        for space, found in find_nearest(images, data, trunk_weights=squeeze, vae=runs["class"].vae):
            line = (
                f"nearest_{space} {found['share']:.6g}  # share of samples closer than {found['limit']:.4g}; without "
            )
            assert f"{line}memorization 0.1 +- {found['deviation']:.2g}; samples.npz.nearest.{space}.png\n" in out
    for changed, message in (
        ("--seed=4", "samples.npz: has other settings: seed=3 then, 4 now"),
        (f"--ckpt={runs['none'].path}", "other settings: ckpt="),
        (f"--ckpt={runs['sr'].path}", "is not for a checkpoint with task=sr"),
    ):
        status, _, err = command(*args, changed)
        assert status == 1 and re.search(message, err) and err.count("\n") == 1


def test_two_ranks_generate_the_same(runs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na red star\n")
    args = ["--device=cpu", f"--ckpt={runs['text'].path}", "--steps=2", "--num_samples=7", "--batch_size=2"]
    args += [f"--prompts={tmp_path}/prompts.txt", f"--samples={tmp_path}/samples.npz"]
    found = []
    for ranks in (1, 2):
        run = Run("fid", tmp_path / f"{ranks}", *args, ranks=ranks, bare=True, script=str(ROOT / "fid.py"))
        run.finish()
        with np.load(tmp_path / "samples.npz") as npz:
            assert npz.files == ["arr_0"] and npz["arr_0"].shape == (7, 32, 32, 3)
            found.append(npz["arr_0"].astype(int))
        assert not (tmp_path / "samples.npz.parts").exists()
        (tmp_path / "samples.npz").unlink()
    assert abs(found[0] - found[1]).max() <= 1
