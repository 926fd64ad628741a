import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.bapps import prepare as bapps

ROOT = Path(__file__).resolve().parent.parent


def run(*args):
    command = [sys.executable, "data/bapps/prepare.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def refused(source, out_dir, **settings):
    with pytest.raises(ValueError) as error:
        bapps.prepare(str(source), str(out_dir), 64, "a test", **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def source(tmp_path):
    """The published layout with two or three items a category, of random pixels, some 80 pixels wide."""
    rng, folder = np.random.default_rng(0), tmp_path / "source"
    for task, split, category, count in (
        ("2afc", "train", "cnn", 3),
        ("2afc", "train", "mix", 2),
        ("2afc", "val", "color", 2),
        ("jnd", "val", "cnn", 2),
    ):
        for part in bapps.PARTS[task]:
            target = folder / task / split / category / part
            target.mkdir(parents=True)
            for i in range(count):
                if part in ("judge", "same"):
                    np.save(target / f"{i:06d}.npy", np.array([i / 4], np.float32))
                else:
                    side = 80 if category == "mix" else 64
                    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(target / f"{i:06d}.png")
    (folder / "2afc/train/.DS_Store").write_text("")
    return folder


def test_writes_the_common_form(source, tmp_path):
    out = tmp_path / "out"
    result = run(f"--source={source}", f"--out_dir={out}")
    assert result.returncode == 0, result.stderr
    shapes = {
        "2afc/train/cnn": (3, 3, 64, 64, 3),
        "2afc/train/mix": (2, 3, 64, 64, 3),
        "2afc/val/color": (2, 3, 64, 64, 3),
        "jnd/val/cnn": (2, 2, 64, 64, 3),
    }
    assert {str(p.parent.relative_to(out)) for p in out.rglob("images.npy")} == set(shapes)
    for category, shape in shapes.items():
        images, judge = np.load(out / category / "images.npy"), np.load(out / category / "judge.npy")
        assert images.shape == shape and images.dtype == np.uint8
        assert judge.dtype == np.float32 and judge.tolist() == [i / 4 for i in range(shape[0])]
    images = np.load(out / "2afc/train/cnn/images.npy")
    for k, part in enumerate(("ref", "p0", "p1")):
        assert np.array_equal(images[2, k], np.asarray(Image.open(source / f"2afc/train/cnn/{part}/000002.png")))
    assert str(source) in json.loads((out / "meta.json").read_text())["what"]
    assert not list(out.rglob("*.tmp"))


def test_rerun_makes_only_what_is_missing_or_different(source, tmp_path, capsys):
    def prepare():
        bapps.prepare(str(source), str(tmp_path / "out"), 64, "a test")
        return capsys.readouterr().out

    prepare()
    assert prepare().count("already there") == 4
    (tmp_path / "out/2afc/val/color/meta.json").unlink()
    again = prepare()
    assert again.count("already there") == 3 and "color: 2 judgements" in again
    for part in bapps.PARTS["2afc"]:
        end = "npy" if part == "judge" else "png"
        shutil.copy(source / f"2afc/train/mix/{part}/000000.{end}", source / f"2afc/train/mix/{part}/000009.{end}")
    assert "mix: 3 judgements" in prepare() and len(np.load(tmp_path / "out/2afc/train/mix/images.npy")) == 3
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "2afc/train/cnn").rename(other / "2afc/train/traditional")
    assert "train/cnn is of another source: remove it" in refused(other, tmp_path / "out")


def test_an_interrupted_rerun_is_not_taken_for_a_whole_set(source, tmp_path):
    """New pictures may lie beside old judgements: the mark of the whole set goes first, and comes last."""
    out = tmp_path / "out"
    bapps.prepare(str(source), str(out), 64, "a test")
    (source / "2afc/train/mix/judge/000001.npy").write_text("cut")
    assert "000001.npy does not load" in refused(source, out)
    assert not (out / "meta.json").exists() and (out / "2afc/train/mix/images.npy").exists()


CATEGORY = "2afc/train/cnn"


@pytest.mark.parametrize(
    "fault, said",
    [
        ("fewer", "cnn has unequal counts (3 in ref, 3 in p0, 2 in p1, 3 in judge): unpack it again"),
        ("odd name", "cnn: 000001 is not in both ref and p1"),
        ("no folder", "cnn/judge is missing: a category has ref/, p0/, p1/, judge"),
        ("empty", "cnn is empty"),
        ("cut image", "p0/000001.png does not decode"),
        ("text", "judge/000001.npy does not load"),
        ("pickle", "judge/000001.npy does not load"),
        ("out of range", "judge/000001.npy holds [5.0], want one number in [0, 1]"),
        ("nan", "judge/000001.npy holds [nan]"),
        ("two numbers", "judge/000001.npy holds [0.0, 1.0]"),
    ],
)
def test_faults_are_named(fault, said, source, tmp_path):
    folder = source / CATEGORY
    judge, image = folder / "judge/000001.npy", folder / "p0/000001.png"
    if fault == "fewer":
        (folder / "p1/000001.png").unlink()
    elif fault == "odd name":
        (folder / "p1/000001.png").rename(folder / "p1/000007.png")
    elif fault == "no folder":
        shutil.rmtree(folder / "judge")
    elif fault == "empty":
        [p.unlink() for p in folder.rglob("*.*")]
    elif fault == "cut image":
        image.write_bytes(image.read_bytes()[:500])
    elif fault == "text":
        judge.write_text("0.5")
    elif fault == "pickle":
        np.save(judge, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        np.save(judge, np.array({"out of range": [5.0], "nan": [np.nan], "two numbers": [0.0, 1.0]}[fault]))
    message = refused(source, tmp_path / "out")
    assert said in message and str(folder) in message
    assert not (tmp_path / "out" / CATEGORY / "meta.json").exists()


def test_mistakes_are_one_line_of_the_command(source, tmp_path):
    message = refused(tmp_path, tmp_path / "out")
    assert "2afc/train has no categories: set source to the folder that holds 2afc/" in message
    (source / CATEGORY / "p1/000001.png").unlink()
    for args, said in (
        ((), "set source to a copy of BAPPS, or standin to a folder of photos"),
        ((f"--source={source}",), "unequal counts"),
        (("--standin=nowhere",), "dataset nowhere is not there"),
    ):
        result = run(*args, f"--out_dir={tmp_path / 'out'}")
        assert result.returncode == 1 and said in result.stderr, result.stderr
        assert result.stderr.startswith("prepare.py: ") and result.stderr.count("\n") == 1


# -- the stand-in --


@pytest.fixture
def photos(tmp_path):
    """Ten photos, each of its own colour with waves on it."""
    (tmp_path / "photos").mkdir()
    y, x = np.mgrid[0:100, 0:120]
    for i in range(10):
        waves = 60 * np.sin(y / (3 + i)) * np.sin(x / (13 - i))
        pixels = np.stack([25 * i + 0 * waves, 128 + waves, 128 - waves], axis=2)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


def test_the_standin_has_the_published_layout_and_says_what_it_is(photos, tmp_path):
    out = tmp_path / "out"
    settings = ("--size=32", "--standin_train=6", "--standin_val=5", f"--out_dir={out}")
    result = run(f"--standin={photos}", *settings)
    assert result.returncode == 0, result.stderr
    assert "stand-in" in json.loads((out / "meta.json").read_text())["what"]
    kinds = {split: {p.name for p in (out / "2afc" / split).iterdir()} for split in ("train", "val")}
    assert kinds == {"train": set(bapps.KNOWN), "val": set(bapps.KNOWN | bapps.NEW)}
    red = {}  # tells the photos apart; a kind's distortions do not touch ref
    for split, count in (("train", 6), ("val", 5)):
        images = [np.load(p) for p in sorted((out / "2afc" / split).rglob("images.npy"))]
        assert all(a.shape == (count, 3, 32, 32, 3) for a in images)
        red[split] = {round(float(ref[..., 0].mean()) / 25) for a in images for ref in a[:, 0]}
    assert red["val"] <= {0, 5} and not red["val"] & red["train"]
    judge = np.concatenate([np.load(p) for p in (out / "2afc").rglob("judge.npy")])
    assert set(judge) == {0.0, 1.0} and 0.2 < judge.mean() < 0.8
    assert np.load(out / "jnd/val/new/images.npy").shape == (5, 2, 32, 32, 3)
    digest = hashlib.md5((out / "2afc/train/warp/images.npy").read_bytes()).digest()
    shutil.rmtree(out)
    bapps.make_standin(str(photos), f"{out}/standin", 32, 6, 5, 0)
    bapps.prepare(f"{out}/standin", str(out), 32, "a test")
    assert hashlib.md5((out / "2afc/train/warp/images.npy").read_bytes()).digest() == digest
    with pytest.raises(ValueError, match="is where the stand-in goes"):
        bapps.make_standin(f"{out}/standin/2afc", f"{out}/standin", 32, 6, 5, 0)


@pytest.mark.parametrize("kind", bapps.KNOWN | bapps.NEW)
def test_a_greater_amount_is_further_off(kind, photos):
    patch = Image.open(photos / "4.png").crop((0, 0, 64, 64))
    means = []
    for amount in (0.0, 0.25, 0.5, 0.75, 1.0):
        draws = [bapps.distort(patch, kind, amount, np.random.default_rng(s)) for s in range(4)]
        assert all(d.size == (64, 64) and d.mode == "RGB" for d in draws)
        means.append(np.mean([(np.asarray(d, float) - np.asarray(patch)) ** 2 for d in draws]))
    assert means == sorted(means) and means[0] < means[-1] / 4


def test_moving_is_by_whole_pixels_within_the_margin():
    pixels = np.random.default_rng(0).integers(0, 256, (36, 36, 3), np.uint8)
    seen = set()
    for s in range(60):
        rng = np.random.default_rng(s)
        again = np.asarray(bapps.taken_again(Image.fromarray(pixels), rng), float)
        assert again.shape == (32, 32, 3)
        fits = {
            (y, x): np.corrcoef(again.flat, pixels[y : y + 32, x : x + 32].flat)[0, 1]
            for y in range(5)
            for x in range(5)
        }
        best = max(fits, key=fits.get)
        assert fits[best] > 0.98
        seen.add(best)
    assert len(seen) > 15
