import gzip
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.mnist import prepare as mnist

ROOT = Path(__file__).resolve().parent.parent


def run(*args):
    command = [sys.executable, "data/mnist/prepare.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def source(tmp_path):
    """The four files, with 30 and 20 pictures of random pixels."""
    rng, folder = np.random.default_rng(0), tmp_path / "raw"
    folder.mkdir()
    for prefix, n in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def test_pads_and_writes_the_common_form(source, tmp_path):
    out = tmp_path / "out"
    result = run(f"--source={source}", f"--out_dir={out}")
    assert result.returncode == 0, result.stderr
    for split, prefix, n in (("train", "train", 30), ("val", "t10k", 20)):
        images, labels = np.load(out / split / "images.npy"), np.load(out / split / "labels.npy")
        assert images.shape == (n, 32, 32, 1) and images.dtype == np.uint8
        raw = mnist.read_idx(str(source / f"{prefix}-images-idx3-ubyte.gz"), 3)
        assert np.array_equal(images[:, 2:30, 2:30, 0], raw)
        assert int(images.astype(np.int64).sum()) == int(raw.astype(np.int64).sum())  # the padding is black
        assert np.array_equal(labels, mnist.read_idx(str(source / f"{prefix}-labels-idx1-ubyte.gz"), 1))
        assert json.loads((out / split / "meta.json").read_text())["count"] == n
    assert json.loads((out / "classes.json").read_text()) == list("0123456789")


def test_rerun_makes_only_what_is_missing_or_different(source, tmp_path):
    args = f"--source={source}", f"--out_dir={tmp_path / 'out'}"
    run(*args)
    assert run(*args).stdout.count("already there") == 2
    (tmp_path / "out" / "val" / "meta.json").unlink()
    again = run(*args).stdout
    assert again.count("already there") == 1 and "20 pictures" in again
    other = idx(np.zeros((30, 28, 28), np.uint8))
    (source / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(other))
    assert "30 pictures" in run(*args).stdout and not np.load(tmp_path / "out" / "train" / "images.npy").any()


def test_missing_files_say_where_to_get_them(tmp_path):
    result = run(f"--source={tmp_path / 'nowhere'}", f"--out_dir={tmp_path}")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    for said in (
        "train-images-idx3-ubyte.gz is missing",
        "--download=True",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ):
        assert said in result.stderr


IMAGES, LABELS = np.zeros((30, 28, 28), np.uint8), np.zeros(30, np.uint8)
CORRUPT = {
    "no gzip": ("images-idx3", b"hello", "does not unpack"),
    "cut off": ("images-idx3", gzip.compress(np.random.default_rng(0).bytes(9999))[:5000], "does not unpack"),
    "empty": ("labels-idx1", gzip.compress(b""), "begins with"),
    "magic": ("labels-idx1", gzip.compress(idx(IMAGES)), "begins with 00000803, not 00000801"),
    "header": ("images-idx3", gzip.compress(idx(IMAGES)[:10]), "3 sizes"),
    "short": ("images-idx3", gzip.compress(idx(IMAGES)[:-1]), "holds 23519 bytes for an array of [30, 28, 28]"),
    "long": ("labels-idx1", gzip.compress(idx(LABELS) + b"x"), "holds 31 bytes for an array of [30]"),
    "count": ("labels-idx1", gzip.compress(idx(LABELS[:29])), "29 train labels for images (30, 28, 28)"),
    "side": ("images-idx3", gzip.compress(idx(IMAGES[:, :, :27])), "want (N, 28, 28)"),
    "label": ("labels-idx1", gzip.compress(idx(LABELS + 10)), "label is 10"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files_are_named(case, source):
    kind, content, said = CORRUPT[case]
    path = source / f"train-{kind}-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        mnist.read_split(str(source), "train")
    assert said in str(error.value) and str(source) in str(error.value) and "\n" not in str(error.value)


def test_corrupt_file_is_one_line_of_the_command(source, tmp_path):
    path = source / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    result = run(f"--source={source}", f"--out_dir={tmp_path / 'out'}")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and str(path) in result.stderr


def test_download_skips_good_files_and_refuses_wrong_ones(source, tmp_path, monkeypatch, capsys):
    md5 = {name: hashlib.md5((source / name).read_bytes()).hexdigest() for name in mnist.MD5}
    monkeypatch.setattr(mnist, "MD5", md5)
    target, mirror = tmp_path / "target", source.as_uri()
    mnist.fetch(str(target), mirror)
    assert capsys.readouterr().out.count("fetching") == 4
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in md5)
    (target / "t10k-labels-idx1-ubyte.gz").write_bytes(b"half")
    mnist.fetch(str(target), mirror)
    assert capsys.readouterr().out.count("fetching") == 1
    shutil.copy(source / "t10k-labels-idx1-ubyte.gz", target / "train-labels-idx1-ubyte.gz")
    (source / "train-labels-idx1-ubyte.gz").write_bytes(b"other")
    with pytest.raises(ValueError, match="train-labels.*5 bytes that came are not the original"):
        mnist.fetch(str(target), mirror)
    (source / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="train-labels.*try again"):
        mnist.fetch(str(target), mirror)


def test_real_files(test_data):
    folder = test_data / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no MNIST at {folder}: set LDM_TEST_DATA")
    for prefix, n, zeros in (("train", 60000, 5923), ("t10k", 10000, 980)):
        images, labels = mnist.read_split(str(folder), prefix)
        assert images.shape == (n, 32, 32, 1) and (labels == 0).sum() == zeros
        assert abs(images[:, 2:30, 2:30].mean() / 255 - 0.1315) < 0.002  # the well-known mean is 0.1307
