"""The diffusion process: noise schedules, objectives, samplers, all pure functions; below them the command that draws.

A noisy sample is x_t = alpha(t) x0 + sigma(t) eps. Time runs from t = 0, data, to t = 1, noise. A schedule is the pair
(alpha, sigma), an objective is a linear combination of x0 and eps, and a sampler sees the network only as
`denoise(x, t) -> x0_hat`; so every objective goes with every schedule and every sampler. A new schedule is one more
branch of make_schedule that gives betas or a pair (alpha, sigma); a new sampler is one more function in `samplers`.

    python sample.py --ckpt=out/ldm                                                    # what training showed
    python sample.py --ckpt=out/ldm --prompt="a red star" --steps=20 --sampler=dpmpp_2m
    python sample.py --ckpt=out/ldm --prompt="a hat" --init_image=photo.png --mask=mask.png
    torchrun --nproc_per_node=8 sample.py --ckpt=out/ldm --num_samples=50000           # an .npz for evaluators
"""

import datetime
import functools
import inspect
import json
import math
import os
import shutil
import sys
import textwrap
import time
import zipfile
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

import convert
from configurator import configure
from vae import VAE, psnr, ssim

# --- noise schedules ---


class Schedule(NamedTuple):
    name: str
    alpha: Callable  # of a float tensor t in [0, 1], any shape, dtype and device; alpha(0) = 1
    sigma: Callable  # likewise; sigma(0) = 0
    discrete: int  # T for a DDPM table, whose index i stands at t = (i + 1) / T; 0 for continuous time


SCHEDULES = ("linear", "scaled_linear", "quadratic", "sqrt", "sigmoid", "squared_cosine", "cosine", "flow")


@functools.cache  # a training step may ask for it every time
def make_schedule(name, beta_start=0.00085, beta_end=0.012, T=1000, zero_snr=False):
    """The noise schedule of that name: a DDPM table of T entries, index i = 0 to T - 1, or one in continuous time.

    linear          beta linear in i (Ho et al. 2020, there 1e-4 to 0.02)
    scaled_linear   sqrt(beta) linear in i: Stable Diffusion, where CompVis calls it "linear"
    quadratic       scaled_linear by the name it has elsewhere
    sqrt            beta^2 linear in i, from beta_start (not its square) to beta_end: CompVis' "sqrt"
    sigmoid         beta from beta_start to beta_end along a sigmoid over [-6, 6]
    squared_cosine  alpha_bar = cos^2 of i, beta at most 0.999 (Nichol & Dhariwal 2021, eq. 17; the betas' ends play no
                    part): diffusers' squaredcos_cap_v2
    cosine          continuous: alpha = cos(pi t / 2), sigma = sin(pi t / 2)
    flow            continuous: alpha = 1 - t, sigma = t (Lipman et al. 2023; Liu et al. 2023)

    zero_snr: bring a table's last alpha to 0 (Lin et al. 2024, Algorithm 1), which eps cannot be used with; refused for
    cosine and flow, which end there by themselves.
    """
    if name == "cosine" or name == "flow":
        if zero_snr:
            raise ValueError(f"schedule {name!r} ends at zero SNR by itself: leave zero_snr=False")
        if name == "flow":
            return Schedule(name, lambda t: 1 - t, lambda t: t, 0)
        # the cosine is written as a sine so that alpha(1) is exactly 0
        return Schedule(name, lambda t: torch.sin(math.pi / 2 * (1 - t)), lambda t: torch.sin(math.pi / 2 * t), 0)
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    if not 0 < beta_start <= beta_end < 1 or T < 2:
        raise ValueError(f"beta_start={beta_start}, beta_end={beta_end}, T={T}: need 0 < start <= end < 1 and T >= 2")

    def line(start, end):
        return torch.linspace(start, end, T, dtype=torch.float64)

    if name == "linear":
        betas = line(beta_start, beta_end)
    elif name == "sqrt":
        betas = line(beta_start, beta_end) ** 0.5
    elif name == "sigmoid":
        betas = beta_start + (beta_end - beta_start) * torch.sigmoid(line(-6, 6))
    elif name == "squared_cosine":
        alpha_bar = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    else:
        betas = line(beta_start**0.5, beta_end**0.5) ** 2
    return table_schedule(name, betas, zero_snr)


def table_schedule(name, betas, zero_snr=False):
    """A DDPM table in continuous time: log-SNR is linear between entries, sigma^2 between the first entry and t = 0.

    With zero_snr, log-SNR falls to -inf at the last entry: alpha is linear between the last two.
    """
    T = len(betas)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    if zero_snr:  # Lin et al. 2024, Algorithm 1
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    log_snr = torch.log(alpha_bar / (1 - alpha_bar))  # sigmoid(-log_snr) is sigma^2, exact where 1 - alpha_bar is not
    first_variance, last_but_one = float(1 - alpha_bar[0]), float(alpha_bar[-2])

    @functools.cache  # one copy per device, not one per step
    def table(device, dtype):
        return log_snr.to(device=device, dtype=dtype)

    def variance(t, sign):
        """alpha^2 for sign = 1, sigma^2 for sign = -1."""
        position = t * T  # entry i stands at i + 1
        entries, below = table(t.device, t.dtype), position.long().clamp(1, T - 1)
        between = torch.sigmoid(sign * torch.lerp(entries[below - 1], entries[below], position - below))
        start = first_variance * position
        if zero_snr:
            end = last_but_one * (T - position) ** 2
            between = torch.where(position < T - 1, between, end if sign == 1 else 1 - end)
        return torch.where(position < 1, 1 - start if sign == 1 else start, between)

    return Schedule(name, lambda t: variance(t, 1).sqrt(), lambda t: variance(t, -1).sqrt(), T)


def unet_time(schedule, t):
    """What the network is told of t: 1000 t, or a table's index (fractional between entries, 0 below the first)."""
    return (schedule.discrete * t - 1).clamp(min=0) if schedule.discrete else 1000 * t


# --- objectives: what the network predicts ---

OBJECTIVES = ("eps", "v", "x0", "flow")


def target(objective, x0, eps, alpha, sigma):
    """What the network should predict at alpha x0 + sigma eps; alpha and sigma broadcast, as (B, 1, 1, 1) does."""
    if objective == "eps":
        return eps
    if objective == "v":
        return alpha * eps - sigma * x0  # Salimans & Ho 2022, section 4
    if objective == "x0":
        return x0
    if objective == "flow":
        return eps - x0
    raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")


def to_x0(objective, prediction, x, alpha, sigma):
    """The x0 that a prediction at x = alpha x0 + sigma eps stands for: the inverse of `target`, for any alpha, sigma.

    "eps" divides by alpha: at alpha = 0 the noise is all that is seen and says nothing of x0.
    """
    if objective == "eps":
        return (x - sigma * prediction) / alpha
    if objective == "v":
        return (alpha * x - sigma * prediction) / (alpha**2 + sigma**2)
    if objective == "x0":
        return prediction
    if objective == "flow":
        return (x - sigma * prediction) / (alpha + sigma)
    raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")


# --- the steps of a sampler ---


def t_max(objective, schedule):
    """Where sampling starts (and training ends): 1, or 0.995 where eps would meet alpha = 0 and tell nothing of x0.

    A table that ends at alpha = 0 is refused with eps: it was made (zero_snr) so that the last entry be trained.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
    blind = objective == "eps" and schedule.alpha(torch.ones(1)).item() == 0
    if blind and schedule.discrete:
        raise ValueError(
            f"objective eps cannot be used at zero SNR, where schedule {schedule.name!r} ends: "
            "choose objective v, or zero_snr=False"
        )
    return 0.995 if blind else 1.0


SPACINGS = ("trailing", "leading", "linspace", "karras", "quadratic")


def sample_times(steps, schedule, objective="v", spacing="trailing"):
    """Times of `steps` steps, strictly descending: float64 (steps + 1,); on a table all but karras fall on entries.

    trailing   equal steps from t_max to 0 (Lin et al. 2024, table 2)
    leading    Stable Diffusion's: multiples of T / steps, rounded down, plus 1, and an end at entry 0, not at t = 0
    linspace   equal steps from t_max to entry 0, then 0 (Nichol & Dhariwal 2021)
    karras     equal steps in (sigma / alpha)^(1/7) from t_max to entry 0, then 0 (Karras et al. 2022, eq. 5);
               where that ratio is infinite the first step is from t_max to below 0.995
    quadratic  indices growing as a square up to 0.8 T, plus 1, and an end at entry 0 (Song et al. 2021, appendix D.2)

    Entry 0 is at 1/T, in continuous time at 1/1000. All T steps of leading and quadratic are the whole table, down to
    t = 0. The two start below t_max, where there is signal yet: leading at about 1 - 1 / steps. On a table
    sigma ~ sqrt(t) near 0, so trailing's last step is the large one: second-order samplers gain less there.
    """
    T, top = schedule.discrete, t_max(objective, schedule)
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least 1 is needed")
    if T and steps > T:
        raise ValueError(f"steps is {steps}: schedule {schedule.name!r} has only {T} times")
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    first, end, i, last = 1 / (T or 1000), 0.0, torch.arange(steps), max(steps - 1, 1)  # i in ascending time
    if spacing == "trailing":  # rounded in integers: all distinct
        times = ((2 * T * (i + 1) + steps) // (2 * steps)).double() / T if T else top * (i + 1).double() / steps
    elif spacing == "linspace":
        times = torch.linspace(top, first, steps, dtype=torch.float64).flip(0)
        times = (T * times).round() / T if T else times
    elif spacing == "karras":
        ends = torch.tensor([top, first], dtype=torch.float64)
        if schedule.alpha(ends[0]) == 0:
            ends[0] = 0.995
        high, low = ((schedule.sigma(ends) / schedule.alpha(ends)) ** (1 / 7)).tolist()
        times = time_of_ratio(schedule, torch.linspace(high, low, steps, dtype=torch.float64).flip(0) ** 7)
        times[-1] = top
    elif T:
        index = i * T // steps if spacing == "leading" else 8 * T * i**2 // (10 * last**2)
        index = (index - i).cummax(0).values + i  # a square's first indices would coincide
        offset = 1 if steps < T else 0
        times, end = (index + offset + 1).double() / T, offset / T
    else:
        part = i.double() / steps if spacing == "leading" else 0.8 * (i.double() / last) ** 2
        times, end = 2 * first + (top - 2 * first) * part, first
    return torch.cat([torch.tensor([end], dtype=torch.float64), times]).flip(0)


def time_of_ratio(schedule, ratio):
    """The t at which sigma / alpha is `ratio`, a float64 tensor, by bisection to the last bit."""
    low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
    for _ in range(60):
        t = (low + high) / 2
        noisier = schedule.sigma(t) > ratio * schedule.alpha(t)
        low, high = torch.where(noisier, low, t), torch.where(noisier, t, high)
    return (low + high) / 2


def steps_of(times, schedule):
    """(t, s, alpha_t, alpha_s, sigma_t, sigma_s) of every step from a time t to the next, s.

    Python floats: samplers weigh in float64 whatever the dtype of x.
    """
    times = times.double().cpu()
    t, alpha, sigma = times.tolist(), schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
    return list(zip(t[:-1], t[1:], alpha[:-1], alpha[1:], sigma[:-1], sigma[1:], strict=True))


def randn(shape, generators=None, device=None, dtype=None):
    """Standard normal noise; with `generators` (CPU, one per image) an image's noise is its own, whatever the batch."""
    if generators is None:
        return torch.randn(shape, device=device, dtype=dtype)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for {shape[0]} images: give one each")
    noise = [torch.randn(shape[1:], generator=generator) for generator in generators]  # float32: the same for any dtype
    return torch.stack(noise).to(device=device, dtype=dtype)


# --- samplers: (denoise, x, times, schedule, generators=None, **options) -> x0 ---
# x is the sample at times[0], pure noise where that is t = 1; times descend to 0, or to an end with some noise left.


def sample_ddpm(denoise, x, times, schedule, generators=None, noise_scale=1.0, variance="small"):
    """Ancestral sampling from the posterior q(x_s | x_t, x0_hat) (Ho et al. 2020, eq. 7; Kingma et al. 2021, eq. 25).

    `noise_scale` multiplies the noise put in at each step: below 1 for smoother samples. Its `variance` is "small", the
    posterior's, right for data in one point, or "large", that of q(x_t | x_s), beta, right for data N(0, 1) (Ho et al.,
    section 3.2).
    """
    if variance not in ("small", "large"):
        raise ValueError(f"variance is {variance!r}: choose small or large")
    for t, _, alpha_t, alpha_s, sigma_t, sigma_s in steps_of(times, schedule):
        x0 = denoise(x, t)
        alpha_ts = alpha_t / alpha_s  # q(x_t | x_s) = N(alpha_ts x_s, var_ts)
        var_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
        x = (alpha_ts * sigma_s**2 / sigma_t**2) * x + (alpha_s * var_ts / sigma_t**2) * x0
        std = noise_scale * var_ts**0.5 * (sigma_s / sigma_t if variance == "small" else float(sigma_s > 0))
        if std > 0:
            x = x + std * randn(x.shape, generators, x.device, x.dtype)
    return x


def sample_ddim(denoise, x, times, schedule, generators=None, eta=0.0):
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic at eta = 0, the very steps of `sample_ddpm` at eta = 1."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: choose between 0 (DDIM) and 1 (DDPM)")
    for t, _, alpha_t, alpha_s, sigma_t, sigma_s in steps_of(times, schedule):
        x0 = denoise(x, t)
        eps = (x - alpha_t * x0) / sigma_t
        var_ts = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
        std = eta * var_ts**0.5 * sigma_s / sigma_t  # eq. 16
        x = alpha_s * x0 + max(sigma_s**2 - std**2, 0) ** 0.5 * eps  # eq. 12; rounding may leave -1e-17
        if std > 0:
            x = x + std * randn(x.shape, generators, x.device, x.dtype)
    return x


def sample_euler(denoise, x, times, schedule, generators=None):
    """Euler's method on the probability-flow ODE (Song et al. 2021b, eq. 13) along straight lines.

    With z = x / (alpha + sigma) and r = sigma / (alpha + sigma), z = (1 - r) x0 + r eps and dz/dr = (z - x0_hat) / r,
    finite at both ends of every schedule. A step keeps x0_hat and eps fixed, so it is DDIM's at eta = 0.
    """
    for t, _, alpha_t, alpha_s, sigma_t, sigma_s in steps_of(times, schedule):
        z, r_t, r_s = x / (alpha_t + sigma_t), sigma_t / (alpha_t + sigma_t), sigma_s / (alpha_s + sigma_s)
        slope = (z - denoise(x, t)) / r_t
        x = (z + (r_s - r_t) * slope) * (alpha_s + sigma_s)
    return x


def sample_heun(denoise, x, times, schedule, generators=None):
    """Heun's second-order method (Karras et al. 2022, Algorithm 1) in the coordinates z, r of `sample_euler`.

    The last step, to r = 0, is Euler's; so S steps take 2 S - 1 evaluations. k-diffusion and diffusers average the
    slopes in sigma / alpha, infinite at alpha = 0, instead: the same in the limit, with other second-order errors.
    """
    for t, s, alpha_t, alpha_s, sigma_t, sigma_s in steps_of(times, schedule):
        z, r_t, r_s = x / (alpha_t + sigma_t), sigma_t / (alpha_t + sigma_t), sigma_s / (alpha_s + sigma_s)
        slope = (z - denoise(x, t)) / r_t
        z_s = z + (r_s - r_t) * slope
        if r_s > 0:
            slope_s = (z_s - denoise(z_s * (alpha_s + sigma_s), s)) / r_s
            z_s = z + (r_s - r_t) * (slope + slope_s) / 2
        x = z_s * (alpha_s + sigma_s)
    return x


def sample_dpmpp_2m(denoise, x, times, schedule, generators=None):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): second order at one evaluation a step.

    h is the step's length in log(alpha / sigma). Of first order are the first step, one after alpha = 0 (infinitely
    long) and the last, to sigma = 0 (likewise).
    """
    x0_before, h_before = 0, math.inf
    for t, _, alpha_t, alpha_s, sigma_t, sigma_s in steps_of(times, schedule):
        x0 = denoise(x, t)
        h = math.log(alpha_s * sigma_t / (alpha_t * sigma_s)) if alpha_t > 0 and sigma_s > 0 else math.inf
        weight = h / (2 * h_before) if h < math.inf else 0  # 1 / (2 r)
        D = (1 + weight) * x0 - weight * x0_before
        x = (sigma_s / sigma_t) * x + (alpha_s - alpha_t * sigma_s / sigma_t) * D
        x0_before, h_before = x0, h
    return x


def sample_dpmpp_2m_sde(denoise, x, times, schedule, generators=None, eta=1.0):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095), midpoint variant; eta = 0 is `sample_dpmpp_2m`.

    decay is exp(-h), 0 for an infinite h. eta weighs the noise as k-diffusion has it; at 1 it is the paper's.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: choose between 0 (the ODE) and 1 (the SDE)")
    x0_before, h_before = 0, math.inf
    for t, _, alpha_t, alpha_s, sigma_t, sigma_s in steps_of(times, schedule):
        x0 = denoise(x, t)
        decay = alpha_t * sigma_s / (alpha_s * sigma_t)
        h = -math.log(decay) if decay > 0 else math.inf
        weight = h / (2 * h_before) if h < math.inf else 0  # 1 / (2 r)
        D = (1 + weight) * x0 - weight * x0_before
        x = (sigma_s / sigma_t * decay**eta) * x + alpha_s * (1 - decay ** (1 + eta)) * D
        std = sigma_s * (1 - decay ** (2 * eta)) ** 0.5
        if std > 0:
            x = x + std * randn(x.shape, generators, x.device, x.dtype)
        x0_before, h_before = x0, h
    return x


def sample_euler_a(denoise, x, times, schedule, generators=None, eta=1.0):
    """Euler ancestral of k-diffusion: Euler's step to below s, then noise up to s.

    In sigma / alpha it goes down to k_down and adds noise of k_up = eta k_s sqrt(1 - k_s^2 / k_t^2), with k_down^2 +
    k_up^2 = k_s^2. As alpha_s k_up is the std of DDIM's eq. 16 and Euler's step is DDIM's, so this is `sample_ddim`;
    at eta = 1, its default, it is `sample_ddpm`.
    """
    return sample_ddim(denoise, x, times, schedule, generators, eta)


def sample_plms(denoise, x, times, schedule, generators=None):
    """PLMS: a DDIM step with Adams-Bashforth's mean of the last four eps (PNDM, Liu et al. 2022, arXiv 2202.09778).

    The first step averages eps at its two ends, so S steps take S + 1 evaluations. Where alpha < 1e-3, as at zero SNR,
    a step in sigma / alpha is all but infinite and a mean of eps would blow up: there it is DDIM's. The weights are
    those of even steps: of two or three very uneven ones it overshoots.
    """
    adams = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    past = []  # eps of the last steps, the newest first
    for t, s, alpha_t, alpha_s, sigma_t, sigma_s in steps_of(times, schedule):
        x0 = denoise(x, t)
        eps = (x - alpha_t * x0) / sigma_t
        past = [eps, *past[:3]]
        ddim = alpha_s * x0 + sigma_s * eps
        if alpha_t < 1e-3:
            x = ddim
            continue
        if len(past) == 1 and sigma_s > 0:
            mean = (eps + (ddim - alpha_s * denoise(ddim, s)) / sigma_s) / 2
        else:
            mean = sum(weight * e for weight, e in zip(adams[len(past) - 1], past))
        x = alpha_s / alpha_t * (x - sigma_t * mean) + sigma_s * mean
    return x


def sample_unipc(denoise, x, times, schedule, generators=None, order=2):
    """UniPC of x0_hat with B_2(h) = exp(h) - 1 (Zhao et al. 2023, arXiv 2302.04867), h in log(alpha / sigma).

    `order`, 1 to 3, is the predictor's; the corrector, one order higher, uses x0_hat where the predictor has led, which
    the next step needs in any case: S steps take S evaluations. The order grows from 1 at the first step and falls to
    1 at the last. x0_hat at alpha = 0, infinitely far, is of no use to later steps.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}: choose 1, 2 or 3")
    steps, past = steps_of(times, schedule), []  # past: (log(alpha / sigma), x0_hat) of earlier steps, the newest first
    x0 = denoise(x, steps[0][0])
    for i, (_, s, alpha_t, alpha_s, sigma_t, sigma_s) in enumerate(steps):
        decay = alpha_t * sigma_s / (alpha_s * sigma_t)  # exp(-h)
        h = -math.log(decay) if decay > 0 else math.inf
        log_ratio = math.log(alpha_t / sigma_t) if alpha_t > 0 else -math.inf
        earlier = past[: min(order, len(steps) - i) - 1]
        r = [(e - log_ratio) / h for e, _ in earlier]
        D = [(x0_e - x0) / r_e for r_e, (_, x0_e) in zip(r, earlier)]
        B = alpha_s * (1 - decay)
        base = (sigma_s / sigma_t) * x + B * x0
        x = base + B * unipc_sum(r, D, h)  # the predictor, UniP
        past = [(log_ratio, x0), *past[:1]] if alpha_t > 0 else []
        if i + 1 < len(steps):  # the corrector, UniC: the same step, knowing x0_hat at its end
            x0_t, x0 = x0, denoise(x, s)
            x = base + B * unipc_sum([*r, 1.0], [*D, x0 - x0_t], h)
    return x


def unipc_sum(r, D, h):
    """The divided differences D at the nodes r, with weights that solve UniPC's order conditions for B_2(h)."""
    n = len(r)
    if n < 2:  # the authors' 1/2 is as good as the solution, and right for an infinite h too
        return 0.5 * D[0] if n else 0
    phi, b = math.expm1(-h), []
    for k in range(1, n + 1):
        phi = phi / -h - 1 / math.factorial(k)
        b.append(phi * math.factorial(k) / math.expm1(-h))
    R = torch.tensor([[r_k**j for r_k in r] for j in range(n)], dtype=torch.float64)
    weights = torch.linalg.solve(R, torch.tensor(b, dtype=torch.float64)).tolist()
    return sum(weight * difference for weight, difference in zip(weights, D))


samplers = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "plms": sample_plms,
    "euler": sample_euler,
    "euler_a": sample_euler_a,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "unipc": sample_unipc,
}


# --- the network as a denoiser ---


def make_denoiser(
    model, schedule, objective, cond, null=None, cfg=1.0, cfg_interval=(0.0, 1.0), cfg_rescale=0.0, guide=None
):
    """`denoise(x, t) -> x0_hat` of a network `model(x, unet_time, **cond) -> prediction`, with guidance.

    cond, null: the condition and its empty twin, dicts of the same keys, of tensors batched as x is; a negative prompt
        is another `null`.
    cfg: the guided x0 is x0_null + cfg (x0_cond - x0_null) (Ho & Salimans 2022, eq. 6 with cfg = 1 + w; linear, hence
        the same for eps and x0), both of one batch of two; cfg = 1 runs the condition alone.
    cfg_interval: (low, high); outside low <= t <= high the condition runs alone (Kynkaanniemi et al. 2024, arXiv
        2404.07724).
    cfg_rescale: in [0, 1], how far the std of each image's guided prediction is brought back to the unguided one's (phi
        of Lin et al. 2024, eq. 15 and 16).
    guide: another `denoise(x, t)`, of a weaker model under the same condition, made by this function too; its x0_hat
        takes the place of x0_null, and `null` is not needed (autoguidance, Karras et al. 2024, arXiv 2406.02507).

    `denoise.evaluations` counts network evaluations per image: 2 when guided, the guide's own included.
    """
    guided, (low, high) = cfg != 1, cfg_interval
    if guided and guide is None and (null is None or null.keys() != cond.keys()):
        raise ValueError(
            f"cfg={cfg} needs an empty condition for {list(cond)}, got {null and list(null)}: or set cfg=1"
        )
    if not 0 <= low < high <= 1:
        raise ValueError(f"cfg_interval={low},{high} is no interval of t: choose 0 <= low < high <= 1")
    if not 0 <= cfg_rescale <= 1:
        raise ValueError(f"cfg_rescale is {cfg_rescale}: choose between 0 (none) and 1 (all)")
    dtype = next((p.dtype for p in model.parameters()), None) if isinstance(model, torch.nn.Module) else None

    def to_model(inputs):
        return {key: value.to(dtype=dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    alone = to_model(cond)
    both = to_model({key: torch.cat([cond[key], null[key]]) for key in cond}) if guided and guide is None else None

    @torch.no_grad()
    def denoise(x, t):
        at = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        t, alpha, sigma = at.item(), schedule.alpha(at).item(), schedule.sigma(at).item()
        guided_now = guided and low <= t <= high
        twice = guided_now and guide is None
        x_in = torch.cat([x, x]) if twice else x
        t_in = torch.full((len(x_in),), unet_time(schedule, at).item(), device=x.device, dtype=torch.float32)
        prediction = model(x_in.to(dtype=dtype), t_in, **(both if twice else alone)).to(x.dtype)
        denoise.evaluations += 2 if twice else 1
        if not guided_now:
            return to_x0(objective, prediction, x, alpha, sigma)
        if twice:
            prediction, weak = prediction.chunk(2)
        else:
            before = getattr(guide, "evaluations", 0)
            x0_weak = guide(x, t)
            denoise.evaluations += getattr(guide, "evaluations", 1) - before
            weak = target(objective, x0_weak, (x - alpha * x0_weak) / sigma, alpha, sigma)
        strong = weak + cfg * (prediction - weak)
        if cfg_rescale > 0:
            axes = tuple(range(1, x.ndim))
            ratio = prediction.std(axes, keepdim=True) / strong.std(axes, keepdim=True).clamp(min=1e-8)
            strong = (cfg_rescale * ratio + 1 - cfg_rescale) * strong
        return to_x0(objective, strong, x, alpha, sigma)

    denoise.evaluations = 0
    return denoise


# --- what an image-conditioned denoiser is shown ---


def image_condition(task, vae, given, sides, map_classes=0):
    """`concat` of Denoiser.condition for a task; vae is None in pixels, sides (h, w) are the latents'.

    inpaint   given["image"] (B,3,H,W) in [-1,1], given["mask"] (B,1,H,W), 1 where to paint -> mask and masked latents,
              in Stable Diffusion's order (B,1+C,h,w)
    sr        given["low"] (B,3,H/scale,W/scale) -> folded, or enlarged, to the latents' side (B,3 or more,h,w)
    semantic  given["map"] (B,H,W) int64, -1 unknown -> one-hot (B,map_classes,H,W)
    """
    if task == "inpaint":
        mask = (given["mask"] > 0.5).to(given["image"].dtype)
        known = given["image"] * (1 - mask)
        known = known if vae is None else vae.normalize(vae.encode(known).mode())
        return torch.cat([F.interpolate(mask, sides, mode="nearest"), known], dim=1)
    if task == "sr":
        low = given["low"]
        fold = low.shape[-1] // sides[1]
        return F.pixel_unshuffle(low, fold) if fold > 1 else F.interpolate(low, sides, mode="bilinear")
    return (given["map"][:, None] == torch.arange(map_classes, device=given["map"].device).view(-1, 1, 1)).float()


def show_condition(task, given, side):
    """What one example was shown, as (3,side,side): with a grey hole, enlarged, or with a color for each class."""
    if task == "inpaint":
        return given["image"] * (given["mask"] < 0.5)
    if task == "sr":
        return F.interpolate(given["low"][None], (side, side), mode="nearest")[0]
    colors = 2 * torch.rand(257, 3, generator=torch.Generator().manual_seed(0)) - 1
    return colors[given["map"]].permute(2, 0, 1)


def augment_low(low, level, eps):
    """Noise on a low-resolution image, as Stable Diffusion's x4 upscaler has it: level (B,) counts in 0..999.

    The network is told the level as y, so it knows what to trust (Ho et al. 2021, arXiv 2106.15282, section 4.2).
    """
    schedule = make_schedule("linear", 1e-4, 0.02)
    t = ((level + 1) / schedule.discrete).to(low.dtype).view(-1, 1, 1, 1)
    return schedule.alpha(t) * low + schedule.sigma(t) * eps


# --- the command ---

# what to draw
ckpt = "out/ldm"  # a stage-2 checkpoint or its out_dir; for --reconstruct a stage-1 one will do
prompt = ""  # draw this; nothing at all draws what the checkpoint was shown with in training
prompts = ""  # file with a prompt a line
negative = ""  # guide away from this prompt, not from the empty one
cls = ""  # class number or name, or several with commas
n = 0  # pictures of each prompt, class or given picture; 0 is 4 of a single one and 1 of each of several
size = ()  # side in pixels, or height,width; () is the trained one, or a given picture's own
# how
seed = 0  # picture i starts from the noise of seed + i
sampler = "ddim"  # ddpm | ddim | plms | euler | euler_a | heun | dpmpp_2m | dpmpp_2m_sde | unipc
steps = 50  # from 1 up
spacing = "trailing"  # of the steps: trailing | leading | linspace | karras | quadratic
eta = -1.0  # ddim, euler_a, dpmpp_2m_sde: fresh noise, from 0 (none) to 1 (ancestral); -1 is 0 for ddim, else 1
noise_scale = 1.0  # ddpm: times its noise; below 1 is smoother
variance = "small"  # ddpm: of its noise, small | large
order = 2  # unipc: 1 | 2 | 3
cfg = 3.0  # guidance scale; 1 is none
cfg_from = 0.0  # guide at times t from here (t = 0 is data)
cfg_to = 1.0  # to here
cfg_rescale = 0.0  # share of the guided standard deviation that is set back to the unguided one, 0 to 1
guide_ckpt = ""  # guide away from this worse model, not from the empty condition (autoguidance)
ema_std = 0.0  # width of a post-hoc EMA made from the run's snapshots, relative to its length; 0 is the stored EMA
tower_weights = ""  # of a frozen text encoder, if they are not where training found them
clip_vocab = ""  # likewise, of its tokenizer
batch_size = 16  # pictures at a time
decode_tile = 0  # decode in tiles of so many latents a side; 0 is whole pictures
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto (bfloat16 on CUDA, else float32) | float32 | bfloat16
# from a picture
init_image = ""  # file or folder of what to start from; for a super-resolution checkpoint the small pictures
strength = -1.0  # how much of init_image is redrawn: above 0 (little) to 1 (all); -1 is 0.75, with a mask 1
mask = ""  # picture as large as init_image: what is white in it is painted, the rest is kept
noise_level = 0  # super-resolution: noise put on init_image, from 0 to the checkpoint's sr_noise
semantic_map = ""  # PNG of class indices, or a folder of them, for a checkpoint that draws maps
invert = False  # start from the noise that DDIM leads init_image back to, and draw from that what is asked for
source_prompt = ""  # what init_image shows, for --invert
# between two
interpolate = 0  # so many frames from seed to seed_to, from prompt to prompt_to, or both
seed_to = -1  # -1 stays at seed
prompt_to = ""  # "" stays at prompt
# many: an .npz of arr_0 (N,H,W,3) uint8, with classes arr_1, as evaluators take it; also under torchrun
num_samples = 0  # so many pictures; the same command again goes on where it stopped
out = "samples.npz"  # where to
fid_ref = ""  # then compare them with this folder of real pictures: see fid.py
inception_weights = ""  # of fid.py: the network of FID
trunk = "squeeze"  # of fid.py, without Inception
trunk_weights = ""  # of fid.py
# where to
out_dir = ""  # PNGs, samples.jsonl and grid.png; "" is the folder samples beside the checkpoint
trajectory = False  # trajectory.gif too: what the first pictures were expected to become, step by step
show = False  # open the grid
reconstruct = ""  # instead: a folder of images, shown above their reconstructions, with PSNR and SSIM


class Between(NamedTuple):
    """A seed or a prompt between two others."""

    a: int | str
    b: int | str
    weight: float  # 0 is a, 1 is b


class Pipeline(NamedTuple):
    """All that drawing needs."""

    denoiser: torch.nn.Module  # unet.Denoiser
    vae: torch.nn.Module | None  # None draws pixels
    schedule: Schedule
    objective: str
    latent_shape: tuple  # (C, h, w) as trained
    num_classes: int  # 0 where it is not class-conditional
    classes: list  # their names, or []
    shown: list  # what it draws when nothing is asked for: prompts, class numbers, or None
    task: dict = {}  # task (none | inpaint | sr | semantic), sr_scale, sr_noise, map_classes; {} is none
    tower: torch.nn.Module | None = None  # a frozen text encoder beside the denoiser

    @property
    def text(self):
        """The text encoder, or None."""
        return self.tower if self.denoiser.text is None else self.denoiser.text

    @property
    def factor(self):
        """Pixels to a latent."""
        return 1 if self.vae is None else self.vae.factor

    @property
    def multiple(self):
        """What the sides of its pictures are multiples of."""
        return self.factor * self.denoiser.unet.side_multiple

    def caption(self, condition):
        if isinstance(condition, Between):
            return f"{condition.a} -> {condition.b}, {condition.weight:.2f}"
        if isinstance(condition, int):
            return self.classes[condition] if self.classes else f"class {condition}"
        return condition or ""


def load_pipeline(path, ema_std=0.0, tower_weights="", clip_vocab=""):
    """The pipeline in a stage-2 checkpoint, on the CPU: its EMA weights, or a post-hoc EMA of that relative width.

    tower_weights, clip_vocab: of a frozen text encoder, if they are not where training found them.
    """
    _, meta = convert.read_checkpoint(path)
    if meta["stage"] != "ldm":
        raise ValueError(f"{path} is an autoencoder (stage 1): train_ldm.py --first_stage={path} makes what can draw")
    model = meta["model"]
    denoiser = convert.load_denoiser(path, ema_std)
    vae = VAE.from_pretrained(path) if meta["vae"] else None
    side = model["image_size"] // (vae.factor if vae else 1)
    task = model.get("task", "none")  # files of the time before tasks do not say
    return Pipeline(
        denoiser,
        vae,
        make_schedule(model["schedule"], model["beta_start"], model["beta_end"], zero_snr=model.get("zero_snr", False)),
        model["objective"],
        (denoiser.unet.settings["in_channels"], side, side),
        model["num_classes"] if model["cond"] == "class" else 0,
        meta["classes"],
        meta["shown"],
        {"task": task} | {name: model[name] for name in ("sr_scale", "sr_noise", "map_classes") if name in model},
        convert.load_tower(path, tower_weights, clip_vocab),
    )


def latent_sides(pipeline, size):
    """(h, w) of the latents of a picture of `size`: () as trained, (side,) or (height, width) in pixels."""
    if not size:
        return pipeline.latent_shape[1:]
    if len(size) > 2:
        raise ValueError(f"size={','.join(str(side) for side in size)} is neither a side nor height,width: give 1 or 2")
    multiple = pipeline.multiple
    for side in size:
        if side % multiple or side < 1:
            better = max(1, round(side / multiple)) * multiple
            raise ValueError(f"size={side} is not a multiple of {multiple}: choose {better}")
    return tuple(int(side) // pipeline.factor for side in (size[0], size[-1]))


def given_size(pipeline, given):
    """(height, width) of the pictures to draw from `given`, () for {}; ValueError if the task takes other things."""
    task = pipeline.task.get("task", "none")
    needed = {"none": (), "inpaint": ("image", "mask"), "sr": ("low",), "semantic": ("map",)}[task]
    allowed = {"image", "mask", *needed} if task != "sr" else {"low", "level"} if pipeline.task["sr_noise"] else {"low"}
    for name in needed:
        if name not in given:
            raise ValueError(
                f"this checkpoint (task={task}) draws from {' and '.join(needed)}: given[{name!r}] is missing"
            )
    for name in given:
        if name not in allowed or (name == "mask" and "image" not in given):
            raise ValueError(f"given[{name!r}] is nothing that this checkpoint (task={task}) can use")
    scale = pipeline.task["sr_scale"] if task == "sr" else 1
    sizes = {tuple(scale * side for side in v.shape[-2:]) for name, v in given.items() if name != "level"}
    if len(sizes) > 1:
        raise ValueError(f"what is given has several sizes: {sizes}")
    return next(iter(sizes), ())


def slerp(a, b, weight):
    """Between two noises (B,...) along the great circle, whose points are noise as likely as they are; weight (B,)."""
    dot, norm = (a * b).flatten(1).sum(1), a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
    angle = torch.acos((dot / norm).clamp(-1, 1))
    straight = angle.sin() < 1e-4  # one noise twice
    part_a = torch.where(straight, 1 - weight, ((1 - weight) * angle).sin() / angle.sin())
    part_b = torch.where(straight, weight, (weight * angle).sin() / angle.sin())
    part_a, part_b = (part.to(a.dtype).view(-1, *[1] * (a.ndim - 1)) for part in (part_a, part_b))
    return part_a * a + part_b * b


def seeded_noise(seeds, shape):
    """Noise (N, *shape) on the CPU, and the generators it came from, which draw what a sampler adds later."""
    generators = [torch.Generator().manual_seed(s.a if isinstance(s, Between) else s) for s in seeds]
    noise = randn((len(generators), *shape), generators)
    if any(isinstance(s, Between) for s in seeds):
        other = randn(noise.shape, [torch.Generator().manual_seed(s.b) for s in seeds])
        noise = slerp(noise, other, torch.tensor([s.weight for s in seeds]))
    return noise, generators


def told(pipeline, conditions, concat=None, level=None):
    """What the pipeline's U-Net takes besides x and t for conditions as `generate` takes them: UNet.forward's names."""
    denoiser, text, inputs = pipeline.denoiser, pipeline.text, {}
    place = next(denoiser.parameters()).device
    if text is not None and any(isinstance(c, Between) for c in conditions):
        a, b = (told(pipeline, list(side), concat, level) for side in list(zip(*conditions))[:2])
        weight = torch.tensor([c.weight for c in conditions], device=place).view(-1, 1, 1)
        return a | {"context": torch.lerp(a["context"].float(), b["context"].float(), weight)}
    if text is not None:
        tokens = text.tokenize(conditions)
        inputs = {"tokens": tokens} if denoiser.text is not None else {"context": text(tokens)}
    elif pipeline.num_classes:
        inputs = {"y": torch.tensor(conditions, device=place)}
    if level is not None:
        inputs["y"] = level
    if concat is not None:
        inputs["concat"] = concat
    return denoiser.condition(**inputs)


def keep_known(denoise, known, painted):
    """`denoise` that knows x0 where `painted` (B,1,h,w) is 0: it is `known` (B,C,h,w) there. For any sampler."""

    def denoise_rest(x, t):
        return torch.where(painted > 0, denoise(x, t), known.to(x.dtype))

    return denoise_rest


def ddim_invert(denoise, x0, times, schedule, iterations=3):
    """The sample at times[0] from which DDIM at eta = 0, over these times, leads to x0; about that.

    A step of DDIM (see sample_euler, whose coordinates these are) looks at its start, which is not known here: it is
    found by so many fixed-point iterations (Pan et al. 2023, arXiv 2309.04907); 1 is the common explicit inversion.
    """
    x = x0
    for t, _, alpha_t, alpha_s, sigma_t, sigma_s in reversed(steps_of(times, schedule)):
        z_s, r_t, r_s = x / (alpha_s + sigma_s), sigma_t / (alpha_t + sigma_t), sigma_s / (alpha_s + sigma_s)
        z = z_s
        for _ in range(iterations):
            slope = (z - denoise(z * (alpha_t + sigma_t), t)) / r_t
            z = z_s + (r_t - r_s) * slope
        x = z * (alpha_t + sigma_t)
    return x


def decode(vae, x, tile=0):
    """Unit-variance latents -> images, in tiles of so many latents if asked, fewer at a time where memory is short."""
    z = vae.denormalize(x)
    try:
        return vae.decode_tiled(z, tile, tile // 4) if tile else vae.decode(z)
    except torch.OutOfMemoryError:
        if len(z) == 1:
            raise ValueError(
                "memory does not hold one picture's decoding: set decode_tile=64, or a smaller one"
            ) from None
    return torch.cat([decode(vae, half, tile) for half in x.split(-(-len(x) // 2))])


@torch.no_grad()
def generate(
    pipeline,
    conditions,
    seeds,
    steps,
    cfg=1.0,
    sampler="ddim",
    size=(),
    batch_size=16,
    given=None,
    strength=1.0,
    source=None,
    negative="",
    spacing="trailing",
    cfg_interval=(0.0, 1.0),
    cfg_rescale=0.0,
    guide=None,
    decode_tile=0,
    see=None,
    **options,
):
    """Draws one picture for each condition (a prompt, a class number, or None): (N,3,H,W) in [-1,1] on the CPU.

    seeds: of each picture's noise, which is the same in any batch; seeds and prompts may be Between.
    size: (side,) or (height, width) in pixels; () as trained, or as what is given.
    given: pictures to start from, N of each: see image_condition for what the checkpoint's task takes ("level" (N,), of
        super-resolution, is the noise put on "low"). Any checkpoint takes "image", with `strength` the share of the
        steps that it goes through, and "mask", outside of which the image stays as it is.
    source: conditions that describe given["image"], whose noise DDIM inversion then finds, in the place of a seed's.
    guide: another Pipeline of the same latents and schedule, to guide away from (Karras et al. 2024, arXiv 2406.02507).
    see: is called with x0_hat of the first pictures, decoded, at every evaluation of the first batch.
    options: the sampler's own.  The number of network evaluations per picture is in `generate.evaluations`.
    """
    denoiser, vae, schedule, objective, shape = pipeline[:5]
    given = given or {}
    if sampler not in samplers:
        raise ValueError(f"sampler {sampler!r} is not one of {', '.join(samplers)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} pictures at a time: choose 1 or more")
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} is not above 0 (nothing redrawn) and up to 1 (all): choose 0.75")
    if (strength < 1 or source is not None) and "image" not in given:
        raise ValueError("strength and source start from a picture: there is no given['image']")
    if guide is not None:
        check_guide(pipeline, guide)
    for name, rows in {"seeds": seeds, **given, **({"source": source} if source is not None else {})}.items():
        if len(rows) != len(conditions):
            raise ValueError(f"{len(rows)} {name} for {len(conditions)} pictures: give one each")
    sides = latent_sides(pipeline, given_size(pipeline, given) or size)
    times = sample_times(steps, schedule, objective, spacing)
    if strength < 1:
        times = times[-1 - max(1, round(steps * strength)) :]
    weight, pictures = next(denoiser.parameters()), []
    for start in range(0, len(conditions), batch_size):
        rows = slice(start, start + batch_size)
        some, now = conditions[rows], {name: t[rows].to(weight.device) for name, t in given.items()}
        now = {name: t.to(weight.dtype) if t.is_floating_point() else t for name, t in now.items()}
        noise, generators = seeded_noise(seeds[rows], (shape[0], *sides))
        noise = noise.to(weight.device, weight.dtype, memory_format=torch.channels_last)
        shown = task_inputs(pipeline, now, sides, generators)
        network = guided(
            pipeline, some, shown, cfg, negative, guide, cfg_interval=cfg_interval, cfg_rescale=cfg_rescale
        )
        denoise = network
        if "image" in now:
            latents = now["image"] if vae is None else vae.normalize(vae.encode(now["image"]).mode())
        if "mask" in now and pipeline.task.get("task") != "inpaint":
            painted = F.max_pool2d((now["mask"] > 0.5).to(weight.dtype), pipeline.factor)  # a latent painted in part
            denoise = keep_known(denoise, latents, painted)
        if see is not None and start == 0:
            denoise = watched(denoise, lambda x0: see(finish(pipeline, x0[:16], decode_tile)))
        x = schedule.sigma(times[:1]).item() * noise
        if strength < 1:
            x = schedule.alpha(times[:1]).item() * latents + x
        generate.evaluations = 0
        if source is not None:
            back = guided(pipeline, source[rows], shown, 1.0)
            x = ddim_invert(back, latents, times, schedule)
            generate.evaluations = back.evaluations
        x = samplers[sampler](denoise, x, times, schedule, generators, **options)
        generate.evaluations += network.evaluations
        pictures.append(finish(pipeline, x, decode_tile))
    pictures = torch.cat(pictures)
    if "mask" in given:  # what is known comes back exactly, without the autoencoder's loss
        pictures = torch.where(given["mask"].cpu() > 0.5, pictures, given["image"].float().cpu())
    return pictures


def guided(pipeline, conditions, shown, cfg, negative="", guide=None, **guidance):
    """make_denoiser of the pipeline for these conditions and `shown` pictures, away from `guide` or no condition."""
    cond, null, weaker = told(pipeline, conditions, **shown), None, None
    if guide is not None:
        weaker = guided(guide, conditions, shown, 1.0)
    elif pipeline.text is not None:
        null = told(pipeline, [negative] * len(conditions), **shown)
    elif pipeline.num_classes:
        null = told(pipeline, [pipeline.num_classes] * len(conditions), **shown)
    else:
        cfg = 1.0  # there is nothing to guide away from
    network, schedule, objective = pipeline.denoiser.unet, pipeline.schedule, pipeline.objective
    return make_denoiser(network, schedule, objective, cond, null, cfg, guide=weaker, **guidance)


def check_guide(pipeline, guide):
    """ValueError where autoguidance would compare what cannot be compared."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    same_noise = all(torch.equal(f(t), g(t)) for f, g in zip(guide.schedule[1:3], pipeline.schedule[1:3]))
    same_task = guide.task == pipeline.task and guide.latent_shape[0] == pipeline.latent_shape[0]
    takes_same = guide.num_classes in (0, pipeline.num_classes) and (guide.text is None or pipeline.text is not None)
    if not (same_noise and same_task and takes_same):
        raise ValueError(
            "guide_ckpt has other latents, noise or conditions: take an earlier run, or a smaller one, like it"
        )


def task_inputs(pipeline, given, sides, generators):
    """What `told` takes of a batch of given pictures: {"concat", "level"}, or {}."""
    task, level = pipeline.task.get("task", "none"), None
    if task == "none":
        return {}
    if pipeline.task.get("sr_noise"):
        low = given["low"]
        level = given.get("level", torch.zeros(len(low), dtype=torch.long, device=low.device))
        given = given | {"low": augment_low(low, level, randn(low.shape, generators, low.device, low.dtype))}
    concat = image_condition(task, pipeline.vae, given, sides, pipeline.task.get("map_classes", 0))
    return {"concat": concat} if level is None else {"concat": concat, "level": level}


def watched(denoise, see):
    """`denoise` that shows each x0_hat to see(x0)."""

    def denoise_and_tell(x, t):
        x0 = denoise(x, t)
        see(x0)
        return x0

    return denoise_and_tell


def finish(pipeline, x, decode_tile=0):
    """Latents as they leave the sampler -> images in [-1,1] on the CPU."""
    x = x if pipeline.vae is None else decode(pipeline.vae, x, decode_tile)
    return x.float().cpu().clamp(-1, 1)


def read_prompts(path):
    """The lines of a prompts file that are not empty."""
    try:
        with open(path, encoding="utf-8-sig") as f:  # some editors begin a file with a byte order mark
            lines = [line.strip() for line in f if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8: give a file with a prompt a line") from None
    if not lines:
        raise ValueError(f"{path} holds no prompts: give a file with a prompt a line")
    return lines


def to_pil(image):
    """(3,H,W) in [-1,1] -> PIL."""
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def make_grid(images, captions, columns=0):
    """A PIL image of images (N,3,H,W), near square or in `columns`, captions below."""
    N, _, H, W = images.shape
    columns, zoom = columns or math.ceil(N**0.5), max(1, 128 // W)
    lines = 2 if any(captions) else 0
    cell_w, cell_h = W * zoom + 4, H * zoom + 4 + 12 * lines
    grid = Image.new("RGB", (columns * cell_w, -(-N // columns) * cell_h), "white")
    pen = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * cell_w + 2, i // columns * cell_h + 2
        grid.paste(to_pil(image).resize((W * zoom, H * zoom), Image.Resampling.NEAREST), (x, y))
        wrapped = textwrap.wrap(caption, max(8, cell_w // 6))[:lines]
        pen.text((x, y + H * zoom), "\n".join(wrapped).encode("latin-1", "replace").decode("latin-1"), fill="black")
    return grid


def save_grid(path, images, captions, settings=None, columns=0):
    """One PNG of images (N,3,H,W), as make_grid lays them out; `settings` go into the file as text."""
    grid, info = make_grid(images, captions, columns), PngInfo()
    info.add_text("settings", json.dumps(settings or {}), zip=True)
    grid.save(path, pnginfo=info)
    return grid


def save_gif(path, frames, seconds=2.0):
    """PIL images as an animation of so many seconds, which repeats and rests at its end."""
    durations = [max(20, int(1000 * seconds / len(frames)))] * (len(frames) - 1) + [1000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def choose_conditions(pipeline, prompt, prompts, cls):
    """What the settings ask to draw, as a list of prompts, class numbers or Nones."""
    text, count = pipeline.text, pipeline.num_classes
    if (prompt or prompts) and text is None:
        raise ValueError(f"this checkpoint takes no prompt: use {'--cls' if count else 'neither --prompt nor --cls'}")
    if cls and not count:
        raise ValueError(f"this checkpoint takes no class: use {'--prompt' if text else 'neither --prompt nor --cls'}")
    if prompt and prompts:
        raise ValueError("prompt and prompts are both set: choose one")
    if text is not None:
        wanted = [prompt] if prompt else read_prompts(prompts) if prompts else pipeline.shown
        for p in wanted:
            if text.count_tokens(p) > text.length:
                print(f"prompt of {text.count_tokens(p)} tokens cut to {text.length}: {p[:60]}...")
        return wanted
    if not cls:
        return pipeline.shown
    wanted = []
    for name in [cls] if cls in pipeline.classes else map(str.strip, cls.split(",")):  # a name may hold commas
        number = pipeline.classes.index(name) if name in pipeline.classes else int(name) if name.isdecimal() else -1
        if not 0 <= number < count:
            names = f", or one of {', '.join(pipeline.classes[:10])}" if pipeline.classes else ""
            raise ValueError(f"cls={name} is no class of this checkpoint: choose 0 to {count - 1}{names}")
        wanted.append(number)
    return wanted


def open_image(path):
    """The PIL image in a file, whole."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as e:  # Pillow's plugins raise many kinds
        raise ValueError(f"{path} does not open as an image ({e})") from None


def open_images(path):
    """{name: PIL image} of a file, or of every image of a folder in sorted order."""
    from data.dataset import IMAGES

    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is not there: give an image, or a folder of them")
    folder, names = (path, sorted(os.listdir(path))) if os.path.isdir(path) else os.path.split(path)
    names = [name for name in names if name.lower().endswith(IMAGES)] if os.path.isdir(path) else [names]
    if not names:
        raise ValueError(f"{path} holds no images: give an image, or a folder of them")
    return {name: open_image(os.path.join(folder, name)) for name in names}


def fit(image, size, multiple, resample=Image.Resampling.LANCZOS):
    """A PIL image resized and centrally cropped to size (height, width); cropped to multiples where size is ()."""
    if size:
        return ImageOps.fit(image, (size[-1], size[0]), resample)
    W, H = (side // multiple * multiple for side in image.size)  # the last few pixels may not fit
    if min(W, H) == 0:
        raise ValueError(f"a picture of {image.width}x{image.height} is smaller than {multiple}x{multiple}: set size")
    return image.crop((0, 0, W, H))


def class_map(image, classes, name):
    """PIL image of class indices -> int64 (H,W); 255 is unknown, -1, unless it is a class."""
    if image.mode not in ("L", "P", "I;16", "I"):
        raise ValueError(f"{name} has mode {image.mode}: a map is a PNG of one channel, class indices from 0")
    indices = torch.from_numpy(np.array(image).astype(np.int64))
    if classes <= 255:
        indices[indices == 255] = -1
    if indices.max() >= classes:
        raise ValueError(f"{name} holds class {indices.max()}: this checkpoint knows 0 to {classes - 1}")
    return indices


def read_given(pipeline, init_image, mask, semantic_map, noise_level, size):
    """(names, `given` of generate with a row for each of them) from the files that the settings name."""
    from data.dataset import to_rgb, to_tensor

    task, multiple, rows = pipeline.task.get("task", "none"), pipeline.multiple, []
    latent_sides(pipeline, size)  # checks it
    size = tuple(int(side) for side in size)
    pictures = open_images(semantic_map or init_image)
    paint = to_rgb(open_image(mask)) if mask else None
    for name, picture in pictures.items():
        if semantic_map:
            picture = fit(picture, size, multiple, Image.Resampling.NEAREST)
            rows.append({"map": class_map(picture, pipeline.task["map_classes"], name)})
            continue
        picture = to_rgb(picture)
        if task == "sr":
            step = multiple // math.gcd(multiple, pipeline.task["sr_scale"])
            rows.append({"low": to_tensor(fit(picture, (), step))})
            if pipeline.task.get("sr_noise"):
                rows[-1]["level"] = torch.tensor(noise_level)
            continue
        rows.append({"image": to_tensor(fit(picture, size, multiple))})
        if paint is not None:
            if paint.size != picture.size:
                sizes = "{}x{} and {} is {}x{}".format(*paint.size, name, *picture.size)
                raise ValueError(f"{mask} is {sizes}: make them one size")
            white = fit(paint, size, multiple, Image.Resampling.NEAREST).convert("L")
            rows[-1]["mask"] = (to_tensor(white.convert("RGB"))[:1] > 0).float()
            if not rows[-1]["mask"].any():
                raise ValueError(f"{mask} is black all over: white is what is painted")
    sizes = sorted({tuple(next(iter(row.values())).shape[-2:]) for row in rows})
    if len(sizes) > 1:
        several = ", ".join("{1}x{0}".format(*side) for side in sizes[:4])
        remedy = "draw them one by one" if task == "sr" else "set size, such as --size=256"
        raise ValueError(f"the pictures of {semantic_map or init_image} have several sizes ({several}): {remedy}")
    return list(pictures), {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


SAMPLER_OPTIONS = ("eta", "noise_scale", "variance", "order")  # settings that are handed to the sampler
STOCHASTIC = ("ddpm", "euler_a", "dpmpp_2m_sde")  # samplers that add noise of their own


def check_settings(config, pipeline):
    """ValueError for a setting that has no meaning beside the others or for this checkpoint, or that it lacks."""
    c, task = SimpleNamespace(**config), pipeline.task.get("task", "none")
    if c.sampler not in samplers:
        raise ValueError(f"sampler {c.sampler!r} is not one of {', '.join(samplers)}")
    conditional = pipeline.text is not None or pipeline.num_classes > 0
    is_guided = c.cfg != 1 and (conditional or bool(c.guide_ckpt))
    bulk, between, prompted = c.num_samples != 0, c.interpolate != 0, pipeline.text is not None
    other_task = f"is not for this checkpoint, of task={task}"
    rules = [  # settings, whether they have a meaning here, why not
        ("cfg", conditional or c.guide_ckpt, "has nothing to guide towards: this checkpoint is unconditional"),
        ("guide_ckpt", c.cfg != 1, "needs a cfg above 1"),
        ("cfg_from cfg_to cfg_rescale", is_guided, "needs guidance: set cfg, or leave it out"),
        ("negative source_prompt prompt_to", prompted, "is not for this checkpoint, which takes no prompt"),
        ("negative", c.cfg != 1, "needs a cfg above 1"),
        ("negative", not c.guide_ckpt, "has no place beside guide_ckpt: set one of them"),
        ("tower_weights clip_vocab", pipeline.tower is not None, "is for checkpoints with a frozen text encoder"),
        ("decode_tile", pipeline.vae is not None, "is for checkpoints with an autoencoder"),
        ("init_image", task != "semantic", f"{other_task}: give semantic_map"),
        ("semantic_map", task == "semantic", other_task),
        ("noise_level", pipeline.task.get("sr_noise"), "is for super-resolution checkpoints trained with sr_noise"),
        ("mask strength invert", bool(c.init_image), "needs init_image"),
        ("mask strength size", task != "sr", other_task),
        ("invert num_samples interpolate", task == "none", other_task),
        ("strength n seed", not c.invert, "is not for --invert, which goes all the way, once, without a seed"),
        ("source_prompt", c.invert, "is for --invert"),
        ("seed_to prompt_to", between, "is for --interpolate"),
        ("n init_image prompts", not between, "is not for --interpolate"),
        ("n init_image interpolate trajectory out_dir show", not bulk, "is not for --num_samples"),
        ("out fid_ref", bulk, "is for --num_samples"),
        ("inception_weights trunk trunk_weights", bool(c.fid_ref), "is for --fid_ref"),
    ]
    for name in SAMPLER_OPTIONS:
        users = [key for key, sampler in samplers.items() if name in inspect.signature(sampler).parameters]
        rules.append((name, c.sampler in users, f"is for sampler={' or '.join(users)}, not {c.sampler}"))
    for names, fits, reason in rules:
        for name in names.split():
            if name in config.changed and not fits:
                raise ValueError(f"{name}={config[name]} {reason}")
    for name, tasks in (("init_image", ("inpaint", "sr")), ("mask", ("inpaint",)), ("semantic_map", ("semantic",))):
        if task in tasks and not config[name]:
            raise ValueError(f"this checkpoint, of task={task}, draws from pictures: give {name}")
    ranges = [  # setting, low, high
        ("n", 0, math.inf, "choose 1 or more pictures"),
        ("num_samples", 0, math.inf, "choose 1 or more pictures"),
        ("noise_level", 0, pipeline.task.get("sr_noise", 0), f"choose 0 to {pipeline.task.get('sr_noise', 0)}"),
        ("decode_tile", 0, math.inf, "choose a tile's side in latents, such as 64, or 0"),
    ]
    for name, low, high, remedy in ranges:
        if not low <= config[name] <= high:
            raise ValueError(f"{name}={config[name]}: {remedy}")
    if c.invert and (c.sampler in STOCHASTIC or c.eta > 0):
        raise ValueError(f"invert needs a sampler without noise of its own, not {c.sampler}: choose ddim with eta=0")
    if c.fid_ref and bool(c.inception_weights) == bool(c.trunk_weights):
        raise ValueError("fid_ref needs inception_weights=FILE or trunk_weights=FILE, one of them: see fid.py")
    if c.fid_ref and not os.path.exists(c.fid_ref):
        raise ValueError(f"fid_ref={c.fid_ref} is not there: name a folder of real pictures")
    if between and (c.interpolate < 2 or (c.seed_to < 0 and not c.prompt_to)):
        raise ValueError(
            f"interpolate={c.interpolate} frames need two ends: set it to 2 or more, and seed_to or prompt_to"
        )
    if c.mask and os.path.isdir(c.mask):
        raise ValueError(f"mask={c.mask} is a folder: give one picture, for all of init_image")


def choose_pictures(pipeline, config):
    """What the settings ask for: (conditions, seeds, names of the given pictures or None, `given` of generate)."""
    c = SimpleNamespace(**config)
    wanted = choose_conditions(pipeline, c.prompt, c.prompts, c.cls)
    conditional = pipeline.text is not None or pipeline.num_classes > 0
    given = c.init_image or c.semantic_map
    if (given or c.interpolate) and not (c.prompt or c.prompts or c.cls):  # what training showed is not meant here
        if pipeline.num_classes:
            raise ValueError("this checkpoint takes a class: say with --cls which one is drawn")
        wanted = [""] if pipeline.text is not None else [None]
    if c.interpolate:
        return *between_two(wanted, c), None, {}
    if not given:
        each = c.n or (4 if len(wanted) == 1 else 1)
        wanted = [w for w in wanted for _ in range(each)] if conditional else [None] * (c.n or len(pipeline.shown))
        return wanted, list(range(c.seed, c.seed + len(wanted))), None, {}
    names, given = read_given(pipeline, c.init_image, c.mask, c.semantic_map, c.noise_level, c.size)
    pairs = [(i, w) for i in range(len(names)) for w in wanted]
    each = 1 if c.invert else c.n or (4 if len(pairs) == 1 else 1)
    index, wanted = zip(*[pair for pair in pairs for _ in range(each)])
    seeds = list(range(c.seed, c.seed + len(wanted)))
    return list(wanted), seeds, [names[i] for i in index], {k: v[list(index)] for k, v in given.items()}


def between_two(wanted, c):
    """(conditions, seeds) of the frames of --interpolate."""
    weights = [i / (c.interpolate - 1) for i in range(c.interpolate)]
    if len(wanted) > 1:
        raise ValueError(f"cls={c.cls} names several classes: interpolate stays with one")
    if c.prompt_to and not c.prompt:
        raise ValueError("prompt_to needs prompt, where the way to it begins")
    conditions = [Between(c.prompt, c.prompt_to, w) if c.prompt_to else wanted[0] for w in weights]
    return conditions, [Between(c.seed, c.seed_to, w) if c.seed_to >= 0 else c.seed for w in weights]


# --- the command: many pictures ---


def draw_many(path, count, chunk, draw, labels, settings, rank=0, world=1, barrier=None):
    """Pictures 0 to count - 1 into the .npz at `path`: arr_0 (count,H,W,3) uint8, arr_1 the labels, if there are any.

    draw(range) -> (n,H,W,3) uint8, asked for chunks of so many by number, chunk k on rank k % world. Chunks lie in
    PATH.parts until all are there; those of an earlier run with the same `settings` (of JSON) are taken as they are.
    """
    folder, settings = f"{path}.parts", json.loads(json.dumps(settings))
    if os.path.exists(path):
        raise ValueError(f"{path} is there already: remove it, or choose another out")
    os.makedirs(folder, exist_ok=True)
    kept = f"{folder}/settings.json"
    if os.path.exists(kept):
        with open(kept) as f:
            before = json.load(f)
        rows = [f"{k}: {before.get(k)} there, {v} here" for k, v in settings.items() if before.get(k) != v]
        if rows:
            raise ValueError(f"{folder} was begun with other settings ({'; '.join(rows)}): take those, or remove it")
    else:  # by every rank alike
        write_whole(kept, lambda f: f.write(json.dumps(settings).encode()))
    starts = range(0, count, chunk)
    mine = [start for start in starts[rank::world] if not os.path.exists(f"{folder}/{start:08d}.npy")]
    for done, start in enumerate(mine):
        began = time.time()
        pictures = draw(range(start, min(start + chunk, count)))
        write_whole(f"{folder}/{start:08d}.npy", lambda f, p=pictures: np.save(f, p))
        if rank == 0:
            left = (len(mine) - done - 1) * (time.time() - began)
            print(
                f"{done + 1} of {len(mine)} chunks of {chunk} on each of {world} processes, {left:.0f} s left",
                flush=True,
            )
    if barrier is not None:
        barrier()
    if rank == 0:
        assemble(path, [f"{folder}/{start:08d}.npy" for start in starts], count, labels)
        shutil.rmtree(folder)


def write_whole(path, write):
    """write(file) to a file that is there whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"could not write {path} ({e}): make room and run again") from None


def assemble(path, chunks, count, labels):
    """The .npz of all chunks, one of them in memory at a time."""
    shape = (count, *np.load(chunks[0], mmap_mode="r").shape[1:])

    def write(file):
        with zipfile.ZipFile(file, "w") as z:
            with z.open("arr_0.npy", "w", force_zip64=True) as f:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(f, header)
                for chunk in chunks:
                    f.write(np.load(chunk).tobytes())
            if labels is not None:
                with z.open("arr_1.npy", "w") as f:
                    np.lib.format.write_array(f, np.asarray(labels, dtype=np.int64))

    write_whole(path, write)


# --- the command: reconstructions ---


@torch.no_grad()
def show_reconstructions(vae, folder, out_dir, device, decode_tile=0):
    """Encodes and decodes every image of a folder at its own size: reconstructions.png has originals above."""
    from data.dataset import BadImage, Dataset, to_tensor

    images, pairs, scores = Dataset(folder, "all", image_size=vae.factor), [], []
    for i in range(len(images)):
        try:
            image = images.rgb(i)
        except BadImage as e:
            print(f"skipped a bad image: {e}")
            continue
        W, H = (side // vae.factor * vae.factor for side in image.size)  # the last few pixels may not fit
        if min(W, H) < max(vae.factor, 11):
            print(f"skipped {images.key(i)}: {image.size[0]}x{image.size[1]} is too small")
            continue
        x = to_tensor(image.crop((0, 0, W, H)))[None].to(device, next(vae.parameters()).dtype)
        z = vae.encode(x).mode()
        y = vae.decode_tiled(z, decode_tile, decode_tile // 4) if decode_tile else vae.decode(z)
        scores.append((psnr(y, x).item(), ssim(y, x).item()))
        print(f"{images.key(i)} {W}x{H}: PSNR {scores[-1][0]:.2f} dB, SSIM {scores[-1][1]:.4f}", flush=True)
        if len(pairs) < 8:
            pairs.append((to_pil(x[0].float()), to_pil(y[0].float())))
    if not scores:
        raise ValueError(f"{folder} holds no image that can be reconstructed")
    mean = [sum(s) / len(scores) for s in zip(*scores)]
    height = max(a.height for a, _ in pairs)
    sheet = Image.new("RGB", (sum(a.width + 4 for a, _ in pairs), 2 * height + 4), "white")
    left = 0
    for pair in pairs:
        for row, picture in enumerate(pair):
            sheet.paste(picture, (left, row * (height + 4)))
        left += pair[0].width + 4
    sheet.save(f"{out_dir}/reconstructions.png")
    print(f"{len(scores)} images: PSNR {mean[0]:.2f} dB, SSIM {mean[1]:.4f}; {out_dir}/reconstructions.png")
    return sheet


def one_line_error(kind, error, trace):
    """Users' mistakes as one line; TRACEBACK=1 shows where they were noticed, all else shows it always."""
    if issubclass(kind, (ValueError, OSError, ImportError)) and not os.environ.get("TRACEBACK"):
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    config = configure(globals())
    sys.excepthook = one_line_error
    for name, choices in (("device", ("auto", "cpu", "cuda")), ("dtype", ("auto", "float32", "bfloat16"))):
        if config[name] not in choices:
            raise ValueError(f"{name}={config[name]} is not one of {', '.join(choices)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU here: mend its installation, or set device=cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not num_samples:
        raise ValueError(f"{world} processes would draw the same pictures: set num_samples, or leave torchrun out")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    file = convert.find_checkpoint(ckpt)
    out_dir = out_dir or os.path.join(os.path.dirname(file), "samples")

    if reconstruct:
        for name in config.changed:
            if name not in ("ckpt", "reconstruct", "out_dir", "device", "dtype", "show", "decode_tile"):
                raise ValueError(f"{name}={config[name]} is not for --reconstruct")
        vae = VAE.from_pretrained(file).to(device, memory_format=torch.channels_last)
        os.makedirs(out_dir, exist_ok=True)
        with autocast:
            sheet = show_reconstructions(vae, reconstruct, out_dir, device, decode_tile)
        if show:
            sheet.show()
        sys.exit(0)

    # models
    pipeline = load_pipeline(file, ema_std, tower_weights, clip_vocab)
    check_settings(config, pipeline)
    guide = load_pipeline(guide_ckpt, 0.0, tower_weights, clip_vocab) if guide_ckpt else None
    for part in (pipeline, guide):
        for net in (part.denoiser, part.vae, part.tower) if part else ():
            if net is not None:
                net.to(device, memory_format=torch.channels_last)
    drawing = dict(steps=steps, cfg=cfg, sampler=sampler, batch_size=batch_size, decode_tile=decode_tile, guide=guide)
    drawing |= dict(negative=negative, spacing=spacing, cfg_interval=(cfg_from, cfg_to), cfg_rescale=cfg_rescale)
    drawing |= {name: config[name] for name in SAMPLER_OPTIONS if name in config.changed}

    # many pictures
    if num_samples:
        if world > 1:
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))  # only waits for the slowest
        asked = choose_conditions(pipeline, prompt, prompts, cls)
        if pipeline.num_classes and not cls:
            asked = range(pipeline.num_classes)
        conditions = [asked[i % len(asked)] for i in range(num_samples)]

        def draw(rows):
            with autocast:
                some = [conditions[i] for i in rows]
                pictures = generate(pipeline, some, range(seed + rows[0], seed + rows[-1] + 1), size=size, **drawing)
            return np.stack([np.array(to_pil(picture)) for picture in pictures])

        started = time.time()
        elsewhere = ("out", "device", "fid_ref", "inception_weights", "trunk", "trunk_weights")
        settings = {name: value for name, value in config.items() if name not in elsewhere} | {"dtype": dtype}
        inputs = {"checkpoint": convert.read_checkpoint(file)[1], "conditions": conditions}
        inputs["guide"] = convert.read_checkpoint(guide_ckpt)[1] if guide_ckpt else None
        settings |= {f"crc32 of {name}": zlib.crc32(json.dumps(value).encode()) for name, value in inputs.items()}
        labels = conditions if pipeline.num_classes else None
        barrier = dist.barrier if world > 1 else None
        draw_many(out, num_samples, batch_size, draw, labels, settings, rank, world, barrier)
        if rank == 0:
            print(f"{num_samples} pictures in {time.time() - started:.1f} s: {out}")
            if fid_ref:
                import fid

                names = dict(inception_weights=inception_weights, trunk=trunk, trunk_weights=trunk_weights)
                print(json.dumps(fid.score(out, fid_ref, image_size=0, **names)))
        if world > 1:
            dist.destroy_process_group()
        sys.exit(0)

    # a few, to look at
    conditions, seeds, names, given = choose_pictures(pipeline, config)
    captions = [pipeline.caption(condition) for condition in conditions]
    if "strength" not in config.changed:
        strength = 0.75 if "image" in given and not (mask or invert) else 1.0
    drawing |= dict(size=size, given=given, strength=strength)
    if invert:
        drawing["source"] = conditions if pipeline.text is None else [source_prompt] * len(conditions)
    frames = []
    if trajectory:
        drawing["see"] = lambda x0: frames.append(make_grid(x0, captions))
    started = time.time()
    with autocast:
        pictures = generate(pipeline, conditions, seeds, **drawing)
    seconds = time.time() - started

    # pictures and what they are
    os.makedirs(out_dir, exist_ok=True)
    with open(os.path.join(out_dir, "samples.jsonl"), "w") as f:
        for i, picture in enumerate(pictures):
            name, info = f"{i:05d}.png", PngInfo()
            record = {"file": name, "prompt": captions[i], "seed": seeds[i]}
            if names:
                record |= {"from": names[i], "strength": strength}
            info.add_text("settings", json.dumps(record | {"config": config}), zip=True)
            to_pil(picture).save(os.path.join(out_dir, name), pnginfo=info)
            f.write(json.dumps(record) + "\n")
    grid = save_grid(os.path.join(out_dir, "grid.png"), pictures[:64], captions[:64], {"config": config})
    if trajectory:
        save_gif(os.path.join(out_dir, "trajectory.gif"), frames)
    if interpolate:
        save_gif(os.path.join(out_dir, "interpolation.gif"), [to_pil(picture) for picture in pictures])
    speed = f"{len(pictures) / seconds:.2f} images/s, {generate.evaluations} network evaluations each"
    print(f"{len(pictures)} pictures in {seconds:.1f} s, {speed}: {out_dir}/grid.png")
    if show:
        grid.show()
