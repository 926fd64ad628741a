"""Image and feature metrics: PSNR and SSIM of pairs, Frechet distance, MMD, precision and recall of two sets."""

import io

import torch
import torch.nn.functional as F

NEIGHBOURS = 3  # k of precision and recall
ROWS = 512  # of an (N, M) matrix held at once


def _check_pairs(x, y):
    if x.shape != y.shape or not (x.is_floating_point() and y.is_floating_point()):
        given = f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        raise ValueError(f"psnr and ssim compare images of equal shape as floats in [-1,1], got {given}")


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of images (B,3,H,W) in [-1,1] (clamped), one for each pair: (B,)."""
    _check_pairs(x, y)
    mse = ((x.clamp(-1, 1) - y.clamp(-1, 1)).double() ** 2).mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(4.0 / mse.clamp_min(1e-12))


def ssim(x, y):
    """Structural similarity (Wang et al. 2004) of images (B,3,H,W) in [-1,1] (clamped), sides >= 11: (B,).

    Gaussian window of 11 pixels and sigma 1.5, K = 0.01, 0.03, on RGB channel by channel, no padding.
    """
    _check_pairs(x, y)
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"ssim looks through an 11x11 window; images of {tuple(x.shape[-2:])} are smaller")
    x, y = x.clamp(-1, 1).double(), y.clamp(-1, 1).double()  # which autocast and TF32 leave alone
    C = x.shape[1]
    g = torch.exp(-((torch.arange(11, device=x.device, dtype=x.dtype) - 5) ** 2) / (2 * 1.5**2))
    g = g / g.sum()

    def blur(a):
        a = F.conv2d(a, g.view(1, 1, 11, 1).expand(C, 1, 11, 1), groups=C)
        return F.conv2d(a, g.view(1, 1, 1, 11).expand(C, 1, 1, 11), groups=C)

    c1, c2 = (0.01 * 2.0) ** 2, (0.03 * 2.0) ** 2  # 2.0 is the range of [-1, 1]
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    s = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return s.mean(dim=(1, 2, 3))


def gaussian(f):
    """Mean (D,) and covariance (D,D), of N - 1 degrees of freedom, of features (N,D), in float64."""
    f = f.double()
    centred = f - f.mean(dim=0)
    return f.mean(dim=0), centred.T @ centred / (len(f) - 1)


def frechet(mean1, cov1, mean2, cov2):
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, >= 0 (Heusel et al. 2017, equation 6).

    The trace of (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2). As eigenvalues of a product they
    would be accurate to the root of the machine's precision only, which shows where there are fewer pictures than D.
    """

    def root(cov):
        values, vectors = torch.linalg.eigh(cov.double())
        values = values.where(values > len(cov) * 1e-15 * values[-1], 0)  # the rest is rounding
        return vectors * values.sqrt() @ vectors.T

    cross = torch.linalg.svdvals(root(cov1) @ root(cov2)).sum()
    distance = (mean1 - mean2).double().square().sum() + cov1.double().trace() + cov2.double().trace() - 2 * cross
    return max(distance.item(), 0.0)


def mmd(f, g):
    """Unbiased squared MMD of features (N,D), (M,D) under the kernel (f.g / D + 1)^3, that of KID; may be below 0.

    Binkowski et al. 2018, equation 4; of all pairs, where KID is usually the mean over subsets.
    """
    f, g = f.double(), g.double()

    def total(a, b):
        return sum(((rows @ b.T / a.shape[1] + 1) ** 3).sum() for rows in a.split(ROWS))

    def within(a):  # without a picture's kernel with itself
        return (total(a, a) - ((a.square().mean(dim=1) + 1) ** 3).sum()) / (len(a) * (len(a) - 1))

    return (within(f) + within(g) - 2 * total(f, g) / (len(f) * len(g))).item()


def precision_recall(f, g, k=NEIGHBOURS):
    """Share of drawn features f (N,D) among the real g (M,D), and of g among f (Kynkaanniemi et al. 2019).

    Among a set is what is no farther from any of its members than that member's k-th nearest other one.
    """
    f, g = f.double(), g.double()

    def share(queries, members):
        radii = torch.cat([torch.cdist(rows, members).kthvalue(k + 1).values for rows in members.split(ROWS)])
        inside = torch.cat([(torch.cdist(rows, members) <= radii).any(dim=1) for rows in queries.split(ROWS)])
        return inside.double().mean().item()

    return share(f, g), share(g, f)


def load_inception(weights, device):
    """torch-fidelity's Inception as a function: uint8 (B,3,S,S), any S -> (B,2048); it resizes them to 299 itself."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: F401 (version 0.3 has none)
    except (ImportError, RuntimeError) as e:  # the latter from a torchvision of another torch
        line = f"inception_weights needs torch-fidelity ({str(e).splitlines()[0]})"
        raise ImportError(f"{line}: pip install 'torch-fidelity>=0.4', or set trunk_weights") from None
    file = io.BytesIO()  # torch-fidelity would run what is in a pickle: it gets one of what was read without that
    torch.save(torch.load(weights, map_location="cpu", weights_only=True), file)
    file.seek(0)
    try:
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
    except Exception as e:  # of a state dict, or of what is none
        why = (str(e).splitlines() or [type(e).__name__])[0].rstrip(":")
        raise ValueError(
            f"{weights} does not fit Inception ({why}): give weights-inception-2015-12-05-6726825d.pth"
        ) from None
    net = net.to(device).eval()
    return lambda x: net(x)[0].cpu()
