"""Metrics against closed forms, numpy and plain loops."""

import math
import sys
import types

import numpy as np
import pytest
import torch

import metrics
from metrics import frechet, gaussian, load_inception, mmd, nearest_rows, precision_recall, psnr, share_below, ssim


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- pairs of images ---


def test_psnr_by_hand():
    x = torch.zeros(3, 3, 8, 8)
    y = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), -1.0), torch.zeros(3, 8, 8)])
    wanted = [10 * math.log10(4 / 0.04), 10 * math.log10(4), 10 * math.log10(4e12)]  # peak 2; equal images are capped
    assert psnr(x, y).tolist() == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(psnr(x, y), psnr(y, x))


def slow_ssim(x, y):
    """Wang et al. 2004, equation 13, window by window; (C,H,W) in [-1,1]."""
    window = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    window /= window.sum()
    c1, c2, values = (0.01 * 2) ** 2, (0.03 * 2) ** 2, []
    for c, i, j in np.ndindex(x.shape[0], x.shape[1] - 10, x.shape[2] - 10):
        a, b = x[c, i : i + 11, j : j + 11], y[c, i : i + 11, j : j + 11]
        ma, mb = (window * a).sum(), (window * b).sum()
        va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
        cov = (window * (a - ma) * (b - mb)).sum()
        values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_ssim_against_a_slow_loop():
    ramp = torch.linspace(-1, 1, 20).expand(3, 17, 20)
    x = torch.stack([images(3, 17, 20), ramp, torch.full((3, 17, 20), 0.9)])
    y = torch.stack([images(3, 17, 20, seed=1), ramp.flip(-1) * 0.8, torch.full((3, 17, 20), 0.899)])
    wanted = [slow_ssim(a.double().numpy(), b.double().numpy()) for a, b in zip(x, y)]
    assert ssim(x, y).tolist() == pytest.approx(wanted, abs=1e-6)
    assert ssim(x, x).tolist() == pytest.approx([1, 1, 1], abs=1e-9)
    assert ssim(x[:1, :, :11, :11], y[:1, :, :11, :11]).shape == (1,), "one window"
    with pytest.raises(AssertionError, match=r"11 x 11 pixels or more, got \(11, 10\)"):
        ssim(x[:, :, :11, :10], y[:, :, :11, :10])


@pytest.mark.parametrize("metric", (psnr, ssim))
def test_clamped_and_not_affected_by_autocast(metric):
    x, y = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    x[0, 0, 0], y[0, 1, 5] = 1.0, -1.0
    loud_x, loud_y = x.clone(), y.clone()
    loud_x[0, 0, 0], loud_y[0, 1, 5] = 7.0, -9.0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metric(loud_x, loud_y), metric(x, y))
    with pytest.raises(AssertionError, match=r"of one shape in \[-1,1\] are needed, got .*32 \(2, 3, 16, 16\)"):
        metric(x, y[:1])
    with pytest.raises(AssertionError, match="float tensors"):
        metric(x.byte(), y.byte())


# --- two sets of features ---


def test_frechet_of_gaussians_in_closed_form():
    g = torch.Generator().manual_seed(0)
    a, b, s, t = torch.rand(4, 7, dtype=torch.float64, generator=g)
    wanted = ((a - b) ** 2).sum() + ((s - t) ** 2).sum()
    assert frechet(a, (s**2).diag(), b, (t**2).diag()) == pytest.approx(wanted.item(), rel=1e-12)
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=g))[0]  # a rotation changes nothing
    c1, c2 = (turn @ (d**2).diag() @ turn.T for d in (s, t))
    assert frechet(turn @ a, c1, turn @ b, c2) == pytest.approx(wanted.item(), rel=1e-12)
    c1, c2 = torch.tensor([[2.0, 0.9], [0.9, 1.0]]), torch.tensor([[1.0, -0.7], [-0.7, 3.0]])  # do not commute
    product = c1.double() @ c2.double()
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))  # trace of a 2x2 matrix's root
    assert frechet(torch.zeros(2), c1, torch.ones(2), c2) == pytest.approx(2 + 3 + 4 - 2 * root, rel=1e-6)


@pytest.mark.parametrize("n", (9, 300))
def test_frechet_with_fewer_and_more_images_than_features(n):
    f = torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).double() * torch.logspace(-6, 2, 64)
    mean, cov = gaussian(f)
    assert np.allclose(cov, np.cov(f.numpy(), rowvar=False), rtol=1e-9) and np.allclose(mean, f.numpy().mean(axis=0))
    assert 0 <= frechet(mean, cov, mean, cov) < 1e-12 * cov.trace()
    assert frechet(mean, cov, mean, 0 * cov) == pytest.approx(cov.trace().item())
    wanted = ((1.5 * mean + 2) ** 2).sum() + 1.5**2 * cov.trace()  # 2.5 f + 2 is an optimal map of f
    assert frechet(*gaussian(f), *gaussian(2.5 * f + 2)) == pytest.approx(wanted.item(), rel=1e-9)


def test_mmd_is_over_all_pairs_and_unbiased(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 5)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(13, 3, generator=g), torch.randn(8, 3, generator=g) + 0.5

    def kernel(a, b):
        return (float(a.double() @ b.double()) / 3 + 1) ** 3

    wanted = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    wanted += np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    wanted -= 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert mmd(x, y) == pytest.approx(wanted, rel=1e-9)
    same = [mmd(torch.randn(16, 4, generator=g), torch.randn(24, 4, generator=g)) for _ in range(300)]
    assert min(same) < 0 and abs(np.mean(same)) < 4 * np.std(same) / 300**0.5


def test_precision_and_recall(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 7)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 5, generator=g).double(), 1.2 * torch.randn(30, 5, generator=g).double()

    def share(queries, members):
        radius = [sorted((m - o).norm().item() for o in members)[3] for m in members]  # [0] is itself
        return np.mean([any((q - m).norm() <= r for m, r in zip(members, radius)) for q in queries])

    assert precision_recall(a, b) == pytest.approx((share(a, b), share(b, a)))
    assert 0 < share(a, b) < share(b, a) < 1 or 0 < share(b, a) < share(a, b) < 1, "or a swap would not show"
    assert precision_recall(b, b) == (1.0, 1.0) and precision_recall(b + 1e6, b) == (0.0, 0.0)


def test_nearest_rows_in_parts(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 4)
    g = torch.Generator().manual_seed(0)
    queries, rows, numbers = torch.randn(10, 3, generator=g), torch.randn(30, 3, generator=g), torch.arange(30) + 100
    rows[7] = queries[2] = 1e3  # a copy far from zero has the distance 0, too
    wanted = [min(((q.double() - r.double()).norm().item(), 100 + i) for i, r in enumerate(rows)) for q in queries]
    for parts in ([30], [1, 12, 17], [17, 13]):
        best = (torch.inf, 0)
        for part, some in zip(rows.split(parts), numbers.split(parts)):
            best = nearest_rows(queries, part, best, some)
        assert best[1].tolist() == [i for _, i in wanted] and best[0][2] == 0
        assert best[0].tolist() == pytest.approx([d for d, _ in wanted], abs=1e-6)


def test_share_below_a_quantile():
    """By hand, and over draws from one skewed distribution: the stated mean and deviation."""
    by_hand = share_below(torch.tensor([0.0, 2.0, 2.9, 3.0, 9.0]), torch.arange(1.0, 100.0), quantile=0.03)
    deviation = (5 * 3 * 97 * 105 / (100**2 * 101)) ** 0.5 / 5  # of a beta-binomial with n = 5, a = 3, b = 97
    assert by_hand == pytest.approx(dict(share=0.6, limit=3, expected=0.03, deviation=deviation))
    assert share_below(torch.tensor([0.5]), torch.tensor([3.0, 1.0]))["expected"] == 1 / 3, "the smallest of two"
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 50 + 99, generator=g).exp()
    found = [share_below(row[:50], row[50:], 0.05) for row in draws]
    shares = torch.tensor([each["share"] for each in found])
    assert found[0]["expected"] == 0.05 and abs(shares.mean() - 0.05) < 4 * shares.std() / 2000**0.5
    assert shares.std().item() == pytest.approx(found[0]["deviation"], rel=0.1)


def test_inception_weights_are_read_as_tensors_only(tmp_path, monkeypatch):
    class Net(torch.nn.Linear):
        def __init__(self, name, features, feature_extractor_weights_path):
            super().__init__(3, 2048, bias=False)
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

        def forward(self, x):
            return (super().forward(x.float().mean(dim=(2, 3))),)

    inception = types.SimpleNamespace(FeatureExtractorInceptionV3=Net)
    prc = types.SimpleNamespace(prc_features_to_metric=None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", inception)
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_prc", prc)
    path = str(tmp_path / "inception.pth")
    torch.save({"weight": torch.ones(2048, 3)}, path)
    features = load_inception(path, "cpu")(torch.full((2, 3, 4, 4), 5, dtype=torch.uint8))
    assert torch.equal(features, torch.full((2, 2048), 15.0))
    for content in ({"other": torch.zeros(1)}, types.SimpleNamespace()):  # the latter would have to be unpickled
        torch.save(content, path)
        with pytest.raises(ValueError, match="inception.pth: not the weights of Inception-v3 .*; use torch-fidelity's"):
            load_inception(path, "cpu")
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_prc", None)
    with pytest.raises(ImportError, match="inception_weights needs torch-fidelity .*; pip install"):
        load_inception(path, "cpu")
