"""Scores of sets of pictures against closed forms, plain loops and torch-fidelity; their inputs; bad input."""

import importlib.util
import json
import math
import re
import runpy
import sys
import types

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

import fid
import metrics
from fid import score
from lpips_train import make_trunk
from metrics import frechet, gaussian, mmd, precision_recall


@pytest.fixture(scope="session")
def squeeze(tmp_path_factory):
    """A file of random weights for squeeze."""
    torch.manual_seed(0)
    state = make_trunk("squeeze").state_dict()
    for name, t in state.items():
        t.normal_(0, (2 / t[0].numel()) ** 0.5) if name.endswith("weight") else t.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("trunk") / "squeeze.pth"
    torch.save(state, path)
    return str(path)


def blobs(n, seed, size=24):
    """n pictures, of which no two are alike."""
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


# scores of features


def test_frechet_of_gaussians_in_closed_form():
    a, b, s, t = torch.rand(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = ((a - b) ** 2).sum() + ((s - t) ** 2).sum()
    assert frechet(a, (s**2).diag(), b, (t**2).diag()) == pytest.approx(wanted.item(), rel=1e-12)
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]  # the same axes, turned: it does not matter
    turned = (turn @ (d**2).diag() @ turn.T for d in (s, t))
    assert frechet(turn @ a, next(turned), turn @ b, next(turned)) == pytest.approx(wanted.item(), rel=1e-12)
    c1, c2 = torch.tensor([[2.0, 0.9], [0.9, 1.0]]), torch.tensor([[1.0, -0.7], [-0.7, 3.0]])  # do not commute
    product = c1.double() @ c2.double()
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))  # trace of the root of a 2x2 matrix
    assert frechet(torch.zeros(2), c1, torch.ones(2), c2) == pytest.approx(2 + 3 + 4 - 2 * root, rel=1e-6)


@pytest.mark.parametrize("n", (9, 300))
def test_frechet_where_pictures_are_fewer_than_features_and_where_not(n):
    f = torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).double() * torch.logspace(-6, 2, 64)
    mean, cov = gaussian(f)
    assert 0 <= frechet(mean, cov, mean, cov) < 1e-12 * cov.trace()
    assert frechet(mean, cov, mean, 0 * cov) == pytest.approx(cov.trace().item())
    assert np.allclose(cov, np.cov(f.numpy(), rowvar=False), rtol=1e-9) and np.allclose(mean, f.numpy().mean(axis=0))
    wanted = ((1.5 * mean + 2) ** 2).sum() + 1.5**2 * cov.trace()  # g = 2.5 f + 2 is an optimal map
    assert frechet(*gaussian(f), *gaussian(2.5 * f + 2)) == pytest.approx(wanted.item(), rel=1e-9)


def test_mmd_is_that_of_all_pairs_and_unbiased(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 5)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(13, 3, generator=g), torch.randn(8, 3, generator=g) + 0.5

    def kernel(a, b):
        return (float(a.double() @ b.double()) / 3 + 1) ** 3

    wanted = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    wanted += np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    wanted -= 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert mmd(x, y) == pytest.approx(wanted, rel=1e-9)
    same = [mmd(torch.randn(16, 4, generator=g), torch.randn(24, 4, generator=g)) for _ in range(500)]
    assert min(same) < 0 and abs(np.mean(same)) < 4 * np.std(same) / 500**0.5
    assert mmd(torch.randn(200, 4, generator=g), torch.randn(200, 4, generator=g) + 1) > 10 * np.std(same)


def test_precision_and_recall(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 7)
    g = torch.Generator().manual_seed(0)
    ball = torch.nn.functional.normalize(torch.randn(400, 3, generator=g)) * torch.rand(400, 1, generator=g)
    centres = torch.tensor([[0.0, 0, 0], [100, 0, 0], [0, 100, 0], [0, 0, 100]])
    real = (ball[:200].view(4, 50, 3) + centres[:, None]).view(-1, 3)
    assert precision_recall(real, real) == (1.0, 1.0)
    half = (0.3 * ball[200:300].view(2, 50, 3) + centres[:2, None]).view(-1, 3)  # two of four clusters, their middle
    precision, recall = precision_recall(half, real)
    assert precision > 0.95 and 0 < recall < 0.5
    junk = torch.cat([real, torch.full((200, 3), 1e4) + 100 * ball[:200]])  # half of it is like no real one
    precision, recall = precision_recall(junk, real)
    assert (precision, recall) == (0.5, 1.0)
    assert precision_recall(real + 1e6, real) == (0.0, 0.0)
    a, b = torch.randn(40, 5, generator=g).double(), 1.2 * torch.randn(30, 5, generator=g).double()

    def share(queries, members):
        radius = [sorted((m - o).norm().item() for o in members)[3] for m in members]  # [0] is itself
        return np.mean([any((q - m).norm() <= r for m, r in zip(members, radius)) for q in queries])

    assert precision_recall(a, b) == pytest.approx((share(a, b), share(b, a)))


# pictures


def test_an_array_a_file_a_folder_and_a_data_set_are_the_same(tmp_path, squeeze):
    drawn, real = blobs(20, 0), blobs(30, 1) // 2
    wanted = score(drawn, real, trunk_weights=squeeze)
    assert (wanted["samples"], wanted["reference"], wanted["image_size"]) == (20, 30, 24)
    assert wanted["squeeze_frechet"] > 0 and re.fullmatch(r"squeeze layer 12, .*, 512", wanted["features"])
    np.savez(tmp_path / "drawn.npz", drawn, labels=np.arange(20))
    (tmp_path / "npy/val").mkdir(parents=True)
    np.save(tmp_path / "npy/val/images.npy", real)
    np.save(tmp_path / "npy/images.npy", real[:5])
    found = score(tmp_path / "drawn.npz", tmp_path / "npy", trunk_weights=squeeze, split="val", batch_size=7)
    assert found.keys() == wanted.keys() and scores(found) == pytest.approx(scores(wanted), rel=1e-5)
    assert score(drawn, tmp_path / "npy", trunk_weights=squeeze)["reference"] == 35
    order = np.random.default_rng(0).permutation(20)
    shuffled = save_pngs(tmp_path / "drawn", drawn, [f"{i}" for i in order])
    (tmp_path / "real").mkdir()
    for c in range(3):  # classes do not matter
        save_pngs(tmp_path / f"real/{c}", real[c::3])
    found = score(shuffled, tmp_path / "real", trunk_weights=squeeze)
    assert scores(found) == pytest.approx(scores(wanted), rel=1e-5)


def test_what_sample_py_leaves(tmp_path, squeeze):
    """Only the pictures that samples.jsonl names: not grid.png, nor what an earlier run left."""
    drawn, real = blobs(8, 0), blobs(8, 1)
    save_pngs(tmp_path / "samples", drawn)
    Image.new("RGB", (99, 50)).save(tmp_path / "samples/grid.png")
    lines = [json.dumps({"file": f"{i:05d}.png", "prompt": "x", "seed": i}) for i in range(6)]
    (tmp_path / "samples/samples.jsonl").write_text("\n".join(lines) + "\n")
    found = score(tmp_path / "samples", real, trunk_weights=squeeze)
    assert found == score(drawn[:6], real, trunk_weights=squeeze) and found["samples"] == 6


def test_both_sets_are_cropped_and_resized_alike(tmp_path, squeeze, capsys):
    wide, real = blobs(6, 0, 60)[:, 10:50], blobs(6, 1, 31)
    by_hand = [Image.fromarray(image[:, 10:50]).resize((24, 24), Image.Resampling.LANCZOS) for image in wide]
    by_hand = np.stack([np.asarray(image) for image in by_hand])
    small = np.stack([np.asarray(Image.fromarray(x).resize((24, 24), Image.Resampling.LANCZOS)) for x in real])
    wanted = score(by_hand, small, trunk_weights=squeeze)
    assert score(wide, real, 24, trunk_weights=squeeze) == wanted
    folder = save_pngs(tmp_path / "wide", wide)
    assert score(folder, real, 24, trunk_weights=squeeze) == wanted
    turned = score(small, folder, trunk_weights=squeeze)  # a reference on disk may be of any size
    assert turned["squeeze_precision"] == wanted["squeeze_recall"]
    assert turned["squeeze_frechet"] == pytest.approx(wanted["squeeze_frechet"], rel=1e-6)
    first = save_pngs(tmp_path / "first", small, [f"b{i}" for i in range(6)])
    (tmp_path / "first/a.png").write_bytes(b"nothing")  # the side is then that of the first that decodes
    assert score(first, folder, trunk_weights=squeeze) == turned
    assert capsys.readouterr().out.count("skipped a bad picture of samples: a.png: not an image") == 1
    (tmp_path / "wide/zz.png").write_bytes(b"nothing")
    assert score(small, folder, trunk_weights=squeeze) == turned and turned["reference"] == 6
    assert "skipped a bad picture of reference: zz.png: not an image" in capsys.readouterr().out


def test_real_pictures_are_near_each_other_and_noise_is_far(test_data):
    trunk, cifar = test_data / "assets/squeezenet1_1_features.pth", test_data / "cifar10"
    if not (trunk.exists() and cifar.exists()):
        pytest.skip(f"no CIFAR-10 or no SqueezeNet in {test_data}")
    from data.dataset import Dataset

    def pictures(split):
        ds = Dataset(cifar, split, 32)
        return np.stack([np.asarray(ds.rgb(i)) for i in range(0, len(ds), len(ds) // 500)][:500])

    train, test = pictures("train"), pictures("test")
    near = score(test, train, trunk_weights=str(trunk))
    grainy = np.random.default_rng(0).normal(test, 20).round().clip(0, 255).astype(np.uint8)
    grainy = score(grainy, train, trunk_weights=str(trunk))
    noise = np.random.default_rng(0).integers(0, 256, test.shape, dtype=np.uint8)
    far = score(noise, train, trunk_weights=str(trunk))
    assert 0 < 1.5 * near["squeeze_frechet"] < grainy["squeeze_frechet"] < far["squeeze_frechet"] / 2
    assert abs(near["squeeze_mmd"]) < 0.005 < 0.02 < grainy["squeeze_mmd"] < far["squeeze_mmd"]
    assert near["squeeze_precision"] > 0.7 and near["squeeze_recall"] > 0.7
    assert far["squeeze_precision"] < 0.5 and far["squeeze_recall"] < 0.05  # an odd real picture's ball is wide


# torch-fidelity


def test_inception_scores_are_torch_fidelitys(tmp_path, monkeypatch):
    """With a stand-in for the library: what it is given, and that its answers are told under their names."""
    modules = {name: types.ModuleType(f"torch_fidelity.{name}") for name in ("metric_fid", "metric_kid", "metric_prc")}
    inception, version = (types.ModuleType(name) for name in ("inception", "version"))

    class Net(torch.nn.Module):
        def __init__(self, name, layers, feature_extractor_weights_path):
            super().__init__()
            assert (name, layers) == ("inception-v3-compat", ["2048"])
            given = torch.load(feature_extractor_weights_path, weights_only=True)  # what was read without code
            assert given.keys() == {"fc.weight"}

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1:] == (3, 24, 24) and not torch.is_grad_enabled()
            return (x.float().mean(dim=(2, 3)),)

    def kid(f, g, kid_subset_size, verbose):
        assert kid_subset_size == 6
        return {"kernel_inception_distance_mean": f.sum().item(), "kernel_inception_distance_std": g.sum().item()}

    def prc(f, g, prc_neighborhood, save_cpu_ram, verbose):
        assert prc_neighborhood == 3
        return {"precision": f.mean().item(), "recall": g.mean().item(), "f_score": 0.0}

    inception.FeatureExtractorInceptionV3, version.__version__ = Net, "0.9"
    modules["metric_fid"].fid_features_to_statistics = lambda f: f
    modules["metric_fid"].fid_statistics_to_metric = lambda f, g, _: {"frechet_inception_distance": (f[0] - g[0]).sum()}
    modules["metric_kid"].kid_features_to_metric, modules["metric_prc"].prc_features_to_metric = kid, prc
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"torch_fidelity.{name}", module)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", inception)
    monkeypatch.setitem(sys.modules, "torch_fidelity.version", version)
    weights = str(tmp_path / "inception.pth")
    torch.save({"fc.weight": torch.zeros(1)}, weights)
    drawn, real = blobs(6, 0), blobs(9, 1)
    found = score(drawn, real, inception_weights=weights, batch_size=4)
    f, g = (a.astype(np.float64).mean(axis=(1, 2)) for a in (drawn, real))
    wanted = [f[0].sum() - g[0].sum(), f.sum(), g.sum(), f.mean(), g.mean()]
    assert [float(found[name]) for name in ("fid", "kid", "kid_std", "precision", "recall")] == pytest.approx(wanted)
    assert found["features"] == "torch-fidelity 0.9: inception-v3-compat 2048, KID 100 x 6"
    torch.save(fid.Array, weights)  # not tensors: never handed to the library, which would run it
    with pytest.raises(ValueError, match="inception.pth: not the weights of Inception-v3"):
        score(drawn, real, inception_weights=weights)


def test_against_torch_fidelity_itself(tmp_path, lpips_package, monkeypatch):
    """lpips_package, for it sees to it that torchvision loads."""
    library = pytest.importorskip("torch_fidelity", minversion="0.4")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = str(tmp_path / "inception.pth")
    torch.save({}, weights)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # its random initial weights, as a file of the right form
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, tensors: None)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    torch.save(net.state_dict(), weights)
    sets = [save_pngs(tmp_path / name, blobs(n, n, 48)) for name, n in (("drawn", 5), ("real", 4))]
    features, kept = fid.features, []
    monkeypatch.setattr(fid, "features", lambda *args: kept.append(features(*args)) or kept[-1])
    found = score(*sets, inception_weights=weights, batch_size=4)
    wanted = library.calculate_metrics(
        input1=sets[0], input2=sets[1], feature_extractor_weights_path=weights, cuda=False, cache=False, verbose=False,
        fid=True, kid=True, kid_subset_size=4, prc=True, feature_extractor="inception-v3-compat", save_cpu_ram=True,
    )  # fmt: skip
    names = ("frechet_inception_distance", "kernel_inception_distance_mean", "kernel_inception_distance_std")
    names += ("precision", "recall")
    assert scores(found) == pytest.approx([wanted[name] for name in names], rel=1e-6)
    f, g = kept  # and our own scores of them agree
    assert frechet(*gaussian(f), *gaussian(g)) == pytest.approx(found["fid"], rel=1e-3)
    assert precision_recall(f, g) == pytest.approx((found["precision"], found["recall"]))


# bad input


def test_errors(tmp_path, squeeze):
    images = blobs(6, 0)
    np.savez(tmp_path / "named.npz", images=images)
    np.savez(tmp_path / "floats.npz", images / 255)
    folder = save_pngs(tmp_path / "drawn", [*images[:3], images[3][:20]])
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for args, options, message in (
        ((images, images), {}, r"inception_weights and trunk_weights are both empty: .*squeezenet1_1-b8a52dc0.pth"),
        ((images, images), dict(inception_weights="x", trunk_weights="y"), "are both given: set"),
        ((images, images), dict(trunk_weights="none.pth"), "none.pth does not load .it is not there"),
        ((images, images), dict(trunk_weights=str(tmp_path / "code.pth")), "code.pth does not load"),
        ((images, images), dict(trunk="alex"), "0.weight is .*, alex wants"),
        ((images, images), dict(trunk="resnet"), "trunk=resnet is not one of vgg, alex, squeeze"),
        ((images, images), dict(batch_size=0), "batch_size=0"),
        ((images, images), dict(device="tpu"), "device=tpu is not auto, cpu or cuda"),
        ((images[:3], images), {}, "samples has 3 pictures: give 4 or more"),
        ((images, images[:3]), {}, "reference has 3 pictures: give 4 or more"),
        ((images[:0], images), {}, "samples has 0 pictures"),
        ((images, blobs(6, 0, 32)), {}, "picture 0 of reference is 32x32, not 24x24: set image_size"),
        ((folder, images), {}, "00003.png of samples is 24x20, not 24x24: set image_size"),
        ((images[:, :12, :12], images), {}, "pictures of 12 px: squeeze wants 17 or more"),
        ((images[..., 0], images), {}, r"samples is uint8 \(6, 24, 24\): make it uint8 \(N,H,W,3\)"),
        ((tmp_path / "floats.npz", images), {}, "samples=.*floats.npz is float64"),
        ((images, tmp_path / "named.npz"), {}, "reference=.*named.npz has images: call the pictures arr_0"),
        ((images, tmp_path / "none"), {}, "reference=.*none is not there"),
        ((images, folder), dict(split="val2"), "split 'val2' is not known"),
        ((images, images), dict(split="val"), "split=val is of a data set, and reference is an array: leave it out"),
    ):
        given = {} if "empty" in message else {"trunk_weights": squeeze}
        with pytest.raises((ValueError, OSError), match=message) as caught:
            score(*args, **(given | options))
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_without_torch_fidelity(tmp_path):
    with pytest.raises(ImportError, match=r"pip install 'torch-fidelity>=0.4', or set trunk_weights$"):
        score(blobs(6, 0), blobs(6, 1), inception_weights="inception.pth")


def test_command(tmp_path, squeeze, monkeypatch, capsys):
    def command(*args):
        monkeypatch.setattr(sys, "argv", ["fid.py", *args])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        runpy.run_path(str(ROOT / "fid.py"), run_name="__main__")
        return capsys.readouterr().out

    drawn, real = (save_pngs(tmp_path / name, blobs(n, n)) for name, n in (("drawn", 5), ("real", 7)))
    wanted = score(drawn, real, trunk_weights=squeeze)
    out = command(f"--samples={drawn}", f"--reference={real}", f"--trunk_weights={squeeze}")
    *lines, note = out.splitlines()
    assert [line.split()[0] for line in lines] == [f"squeeze_{n}" for n in ("frechet", "mmd", "precision", "recall")]
    assert [float(line.split()[1]) for line in lines] == pytest.approx(scores(wanted), rel=1e-5)
    about = "  # 5 drawn, 7 real (all); 24 px, centre crop, Lanczos, uint8; squeeze layer 12, unit length"
    assert all(about in line and line.endswith(f"sha256 {wanted['sha256'][:16]}") for line in lines)
    assert "few pictures" in note and "fid" not in out.lower()
    with pytest.raises(ValueError, match="trunk=vgg is for trunk_weights, not for inception_weights"):
        command(f"--samples={drawn}", f"--reference={real}", "--inception_weights=x.pth", "--trunk=vgg")
    with pytest.raises(FileNotFoundError) as caught:
        command(f"--reference={real}", f"--trunk_weights={squeeze}")
    capsys.readouterr()
    sys.excepthook(caught.type, caught.value, None)
    assert capsys.readouterr().err == "fid.py: samples= is not there: give an .npz, or a folder of pictures\n"
