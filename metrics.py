"""Image metrics (PSNR, SSIM) and distances between sets of features (Frechet, MMD, precision and recall, neighbors).

Features are (N,D), one row for each image; images are (B,3,H,W) in [-1,1]. Everything is computed in float64.
"""

import io

import torch
import torch.nn.functional as F

NEIGHBORS = 3  # k of precision and recall
ROWS = 512  # rows of an (N,M) matrix in memory at once


def off_mps(t):
    """A tensor; on an Apple GPU, which lacks float64 and torch.special.ndtri, its copy on the CPU."""
    return t.cpu() if t.device.type == "mps" else t


# --- pairs of images ---


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of each pair of images, clamped to [-1,1]: (B,)."""
    check_pairs(x, y)
    mse = (x.clamp(-1, 1) - y.clamp(-1, 1)).double().square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(4.0 / mse.clamp_min(1e-12))  # the peak is 2


def ssim(x, y):
    """Structural similarity of each pair of images, clamped to [-1,1], sides >= 11: (B,).

    Wang et al. 2004, equation 13: Gaussian window of 11 pixels and sigma 1.5, no padding, mean over RGB.
    """
    check_pairs(x, y)
    assert min(x.shape[-2:]) >= 11, f"ssim needs images of 11 x 11 pixels or more, got {tuple(x.shape[-2:])}"
    x, y = x.clamp(-1, 1).double(), y.clamp(-1, 1).double()  # not affected by autocast or TF32
    C = x.shape[1]
    g = torch.exp(-(torch.arange(-5, 6, device=x.device, dtype=x.dtype) ** 2) / (2 * 1.5**2))
    g = g / g.sum()

    def blur(a):
        a = F.conv2d(a, g.view(1, 1, 11, 1).expand(C, 1, 11, 1), groups=C)
        return F.conv2d(a, g.view(1, 1, 1, 11).expand(C, 1, 1, 11), groups=C)

    c1, c2 = (0.01 * 2.0) ** 2, (0.03 * 2.0) ** 2  # the range of [-1,1] is 2
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    s = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return s.mean(dim=(1, 2, 3))


def check_pairs(x, y):
    floats = x.is_floating_point() and y.is_floating_point()
    found = f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
    assert x.shape == y.shape and floats, f"two float tensors of one shape in [-1,1] are needed, got {found}"


# --- two sets of features ---


def gaussian(f):
    """Mean (D,) and covariance (D,D), with N - 1 degrees of freedom, of features (N,D)."""
    f = f.double()
    centered = f - f.mean(dim=0)
    return f.mean(dim=0), centered.T @ centered / (len(f) - 1)


def frechet(mean1, cov1, mean2, cov2):
    """Squared Frechet (2-Wasserstein) distance between two Gaussians, >= 0 (Heusel et al. 2017, equation 6).

    The trace of (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2). Eigenvalues of the product would
    be accurate only to the square root of the machine precision, which shows with fewer images than features.
    """

    def root(cov):
        values, vectors = torch.linalg.eigh(cov.double())
        values = values.where(values > len(cov) * 1e-15 * values[-1], 0)  # the rest is rounding
        return vectors * values.sqrt() @ vectors.T

    cross = torch.linalg.svdvals(root(cov1) @ root(cov2)).sum()
    distance = (mean1 - mean2).double().square().sum() + cov1.double().trace() + cov2.double().trace() - 2 * cross
    return max(distance.item(), 0.0)


def mmd(f, g):
    """Unbiased squared MMD between features (N,D) and (M,D), kernel (f.g / D + 1)^3; can be negative.

    Binkowski et al. 2018, equation 4, over all pairs; KID is the mean of the same over random subsets.
    """
    f, g = f.double(), g.double()

    def total(a, b):
        return sum(((rows @ b.T / a.shape[1] + 1) ** 3).sum() for rows in a.split(ROWS))

    def within(a):  # without the pairs of an image with itself
        return (total(a, a) - ((a.square().mean(dim=1) + 1) ** 3).sum()) / (len(a) * (len(a) - 1))

    return (within(f) + within(g) - 2 * total(f, g) / (len(f) * len(g))).item()


def precision_recall(f, g, k=NEIGHBORS):
    """(precision, recall) of generated features f (N,D) and real ones g (M,D) (Kynkaanniemi et al. 2019).

    Precision is the share of f inside the manifold of g, recall the share of g inside that of f. A manifold is the
    union of balls around a set's members, each with the distance to the k-th nearest other member as its radius.
    """
    f, g = f.double(), g.double()

    def share(queries, members):
        radii = torch.cat([torch.cdist(rows, members).kthvalue(k + 1).values for rows in members.split(ROWS)])
        inside = torch.cat([(torch.cdist(rows, members) <= radii).any(dim=1) for rows in queries.split(ROWS)])
        return inside.double().mean().item()

    return share(f, g), share(g, f)


def nearest_rows(queries, rows, earlier, numbers):
    """(distance, number) of the row nearest to each query: (N,) float64 and (N,) int64, ROWS queries at a time.

    queries: (N,D).  rows: (M,D), numbered by `numbers` (M,).  earlier: the result for the rows before, kept where these
    are not nearer, so that rows can come in parts; at first (inf, any number).
    """
    found = [torch.cdist(some.double(), rows.double()).min(dim=1) for some in queries.split(ROWS)]
    distance, row = (torch.cat(parts) for parts in zip(*found))
    nearer = distance < earlier[0]
    return distance.where(nearer, earlier[0]), numbers[row].where(nearer, earlier[1])


def share_below(distances, others, quantile=0.01):
    """Share of distances (N,) below a quantile of others (M,), as dict(share, limit, expected, deviation).

    The limit is the k-th smallest of the others, k = quantile (M + 1) rounded down, at least 1. If all N + M come from
    one distribution, whichever it is, N times the share is beta-binomial, with the mean N k / (M + 1).
    """
    N, M = len(distances), len(others)
    k = max(1, int(quantile * (M + 1)))
    limit, p = others.kthvalue(k).values, k / (M + 1)
    deviation = (p * (1 - p) * (N + M + 1) / (N * (M + 2))) ** 0.5
    return dict(share=(distances < limit).double().mean().item(), limit=limit.item(), expected=p, deviation=deviation)


def load_inception(weights, device):
    """The Inception-v3 of FID, as a function: images uint8 (B,3,S,S), any S -> features (B,2048) on the CPU.

    weights: torch-fidelity's weights-inception-2015-12-05-6726825d.pth. Raises ImportError without torch-fidelity and
    ValueError if the file does not hold these weights. The network resizes images to 299 x 299 itself.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: F401 (version 0.3 has none)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        reason = str(error).splitlines()[0]
        remedy = "pip install 'torch-fidelity>=0.4'"
        raise ImportError(f"inception_weights needs torch-fidelity ({reason}); {remedy}") from None
    try:
        file = io.BytesIO()  # torch-fidelity unpickles without weights_only: give it tensors that are read already
        torch.save(torch.load(weights, map_location="cpu", weights_only=True), file)
        file.seek(0)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
    except Exception as error:  # a damaged or foreign file can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "use torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        raise ValueError(f"{weights}: not the weights of Inception-v3 ({reason}); {remedy}") from None
    net = net.to(device).eval()
    return lambda x: net(x)[0].cpu()
