"""The diffusion process: noise schedules, objectives, samplers, guidance. Pure functions.

A noisy sample is x_t = alpha(t) x0 + sigma(t) eps, from t = 0 (data) to t = 1 (noise). A schedule is the pair
(alpha, sigma), an objective is a linear combination of x0 and eps, and a sampler sees the network only as
`denoise(x, t) -> x0_hat`, so every objective works with every schedule and every sampler. To add one: a schedule is a
branch of `make_schedule` and a name in `SCHEDULES`, an objective a branch of `target` and of `to_x0` and a name in
`OBJECTIVES`, a sampler a function and its name in `samplers`. The scripts take the names from here.

    schedule = make_schedule("flow")
    denoise = make_denoiser(unet, schedule, "flow", {"context": text(["a red star"])})
    times = sample_times(20, schedule)
    x0 = sample_heun(denoise, start_std(times, schedule) * torch.randn(1, 4, 32, 32), times, schedule)
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

# --- noise schedules ---


class Schedule(NamedTuple):
    name: str
    alpha: Callable  # of a float tensor t in [0, 1], any shape, dtype and device; alpha(0) = 1
    sigma: Callable  # likewise; sigma(0) = 0
    discrete: int  # number T of entries of a DDPM table, entry i at t = (i + 1) / T; 0 for continuous time
    # of spacing leading on a table, see sample_times; of another project's model its scheduler's
    steps_offset: int = 1
    set_alpha_to_one: bool = False


SCHEDULES = ("linear", "scaled_linear", "quadratic", "sqrt", "sigmoid", "squared_cosine", "cosine", "flow")


@functools.cache  # called at every training step
def make_schedule(name, beta_start=0.00085, beta_end=0.012, T=1000, zero_snr=False):
    """The noise schedule `name`: a DDPM table of T entries, i = 0 to T - 1, or one in continuous time.

    linear          beta linear in i (Ho et al. 2020, with 1e-4 to 0.02)
    scaled_linear   sqrt(beta) linear in i (Stable Diffusion; CompVis calls it "linear")
    quadratic       another name of scaled_linear
    sqrt            beta^2 linear in i, from beta_start (not its square) to beta_end (CompVis)
    sigmoid         beta from beta_start to beta_end along a sigmoid over [-6, 6]
    squared_cosine  alpha_bar = cos^2 of i, beta at most 0.999 (Nichol & Dhariwal 2021, eq. 17; beta_start and beta_end
                    are not used); squaredcos_cap_v2 in diffusers
    cosine          continuous: alpha = cos(pi t / 2), sigma = sin(pi t / 2)
    flow            continuous: alpha = 1 - t, sigma = t (Lipman et al. 2023; Liu et al. 2023)

    zero_snr: rescale a table so that its last alpha is 0 (Lin et al. 2024, Algorithm 1). It excludes objective eps.
        cosine and flow already end at alpha = 0 and do not accept it.
    """
    assert name in SCHEDULES, f"unknown schedule {name!r}: choose one of {', '.join(SCHEDULES)}"
    assert 0 < beta_start <= beta_end < 1, f"need 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}"
    assert T >= 2, f"T must be >= 2, got {T}"
    if name in ("cosine", "flow"):
        assert not zero_snr, f"schedule {name!r} already ends at zero SNR: leave out zero_snr"
        if name == "flow":
            return Schedule(name, lambda t: 1 - t, lambda t: t, 0)
        # the cosine is written as a sine so that alpha(1) is exactly 0
        return Schedule(name, lambda t: torch.sin(math.pi / 2 * (1 - t)), lambda t: torch.sin(math.pi / 2 * t), 0)

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
    """A DDPM table as a schedule in continuous time.

    log-SNR is interpolated linearly between entries, sigma^2 between t = 0 and the first entry. With zero_snr, where
    the last log-SNR is -inf, alpha is linear between the last two entries.
    """
    T = len(betas)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    if zero_snr:  # Lin et al. 2024, Algorithm 1
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    log_snr = torch.log(alpha_bar / (1 - alpha_bar))  # sigmoid(-log_snr) is sigma^2, exact where 1 - alpha_bar is not
    first_variance, second_last = float(1 - alpha_bar[0]), float(alpha_bar[-2])

    @functools.cache  # one copy per device, not one per step
    def table(device, dtype):
        return log_snr.to(device=device, dtype=dtype)

    def variance(t, sign):
        """alpha^2 for sign = 1, sigma^2 for sign = -1."""
        position = t * T  # entry i is at i + 1
        entries, below = table(t.device, t.dtype), position.long().clamp(1, T - 1)
        between = torch.sigmoid(sign * torch.lerp(entries[below - 1], entries[below], position - below))
        start = first_variance * position
        if zero_snr:
            end = second_last * (T - position) ** 2
            between = torch.where(position < T - 1, between, end if sign == 1 else 1 - end)
        return torch.where(position < 1, 1 - start if sign == 1 else start, between)

    return Schedule(name, lambda t: variance(t, 1).sqrt(), lambda t: variance(t, -1).sqrt(), T)


def unet_time(schedule, t):
    """The network's time input: 1000 t, or a table's index (fractional between entries, 0 below the first)."""
    return (schedule.discrete * t - 1).clamp(min=0) if schedule.discrete else 1000 * t


# --- objectives: what the network predicts ---

OBJECTIVES = ("eps", "v", "x0", "flow")


def target(objective, x0, eps, alpha, sigma):
    """What the network should predict at alpha x0 + sigma eps; alpha and sigma broadcast, for example (B,1,1,1)."""
    assert objective in OBJECTIVES, f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}"
    if objective == "eps":
        return eps
    if objective == "v":
        return alpha * eps - sigma * x0  # Salimans & Ho 2022, section 4
    if objective == "x0":
        return x0
    return eps - x0  # flow


def to_x0(objective, prediction, x, alpha, sigma):
    """x0 from a prediction at x = alpha x0 + sigma eps: the inverse of `target`, for any alpha and sigma.

    eps divides by alpha: at alpha = 0 the input is pure noise and contains nothing of x0.
    """
    assert objective in OBJECTIVES, f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}"
    if objective == "eps":
        return (x - sigma * prediction) / alpha
    if objective == "v":
        return (alpha * x - sigma * prediction) / (alpha**2 + sigma**2)
    if objective == "x0":
        return prediction
    return (x - sigma * prediction) / (alpha + sigma)  # flow


# --- the times of a sampler ---


def t_max(objective, schedule):
    """Where sampling starts and training ends: 1, or 0.995 for eps where alpha(1) = 0 and eps cannot give x0.

    A table that ends at alpha = 0 is rejected with eps: zero_snr exists to train the last entry.
    """
    assert objective in OBJECTIVES, f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}"
    if objective != "eps" or schedule.alpha(torch.ones(1)).item() > 0:
        return 1.0
    assert not schedule.discrete, f"objective eps cannot be used at zero SNR, where schedule {schedule.name!r} ends"
    return 0.995


SPACINGS = ("trailing", "leading", "linspace", "karras", "quadratic")


def sample_times(steps, schedule, objective="v", spacing="trailing"):
    """Times of `steps` steps, strictly descending: float64 (steps + 1,). On a table all but karras are entries.

    trailing   equal steps from t_max to 0, rounded to entries as numpy does (Lin et al. 2024, table 2)
    leading    Stable Diffusion's: multiples of T // steps, plus steps_offset, ending at entry 0, or with
               set_alpha_to_one at t = 0
    linspace   equal steps from t_max to entry 0, then 0 (Nichol & Dhariwal 2021)
    karras     equal steps in (sigma / alpha)^(1/7) from t_max to entry 0, then 0 (Karras et al. 2022, eq. 5);
               where that ratio is infinite the first step is from t_max to below 0.995
    quadratic  indices that grow as a square up to 0.8 T, plus 1, ending at entry 0 (Song et al. 2021, appendix D.2)

    Entry 0 is at 1/T, in continuous time at 1/1000. With all T steps, leading and quadratic are the complete table,
    down to t = 0. Both start below t_max, where there is some signal: leading at about 1 - 1 / steps, or lower where
    steps do not divide T. On a table sigma ~ sqrt(t) near 0, so the last step of trailing is the largest: second-order
    samplers gain less there.
    """
    T, top = schedule.discrete, t_max(objective, schedule)
    assert 1 <= steps <= (T or 1000), f"steps must be in [1, {T or 1000}], got {steps}"
    assert spacing in SPACINGS, f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}"
    first, end, i, last = 1 / (T or 1000), 0.0, torch.arange(steps), max(steps - 1, 1)  # i in ascending time
    if spacing == "trailing":
        step = T - (T - T / steps)  # with the rounding of np.arange(T, 0, -T / steps), which decides halves
        times = (T - step * i.flip(0).double()).round() / T if T else top * (i + 1).double() / steps
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
        index, offset, to_zero = i * (T // steps), schedule.steps_offset, schedule.set_alpha_to_one
        if spacing == "quadratic":
            index, offset, to_zero = 8 * T * i**2 // (10 * last**2), 1, False
            index = (index - i).cummax(0).values + i  # the first indices of a square would coincide
        if index[-1] + offset >= T:
            offset, to_zero = 0, True
        times = (index + offset + 1).double() / T
        end = 0.0 if to_zero else min(first, times[0].item() * (1 - 1e-9))  # from entry 0 to itself
    else:
        share = i.double() / steps if spacing == "leading" else 0.8 * (i.double() / last) ** 2
        times, end = 2 * first + (top - 2 * first) * share, first
    return torch.cat([torch.tensor([end], dtype=torch.float64), times]).flip(0)


def start_std(times, schedule):
    """Std of the pure noise at times[0]: sigma, but 1 on a table, even where some signal is left (as in diffusers)."""
    return 1.0 if schedule.discrete else schedule.sigma(times[:1]).item()


def time_of_ratio(schedule, ratio):
    """The times at which sigma / alpha equals `ratio`, a float64 tensor, by bisection to the last bit."""
    low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
    for _ in range(60):
        t = (low + high) / 2
        noisier = schedule.sigma(t) > ratio * schedule.alpha(t)
        low, high = torch.where(noisier, low, t), torch.where(noisier, t, high)
    return (low + high) / 2


def steps_of(times, schedule):
    """[(t, s, alpha_t, alpha_s, sigma_t, sigma_s), ...], one for each step from a time t to the next time s.

    Python floats, so that samplers compute their coefficients in float64 for any dtype of x.
    """
    times = times.double().cpu()
    t, alpha, sigma = times.tolist(), schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
    return list(zip(t[:-1], t[1:], alpha[:-1], alpha[1:], sigma[:-1], sigma[1:], strict=True))


def randn(shape, generators=None, device=None, dtype=None):
    """Standard normal noise. With `generators` (CPU, one per image) each image's noise is independent of its batch."""
    if generators is None:
        return torch.randn(shape, device=device, dtype=dtype)
    assert len(generators) == shape[0], f"{len(generators)} generators for {shape[0]} images: one per image is needed"
    noise = [torch.randn(shape[1:], generator=generator) for generator in generators]  # float32: the same in any dtype
    noise, on_gpu = torch.stack(noise), device is not None and torch.device(device).type == "cuda"
    noise = noise.pin_memory() if on_gpu else noise  # a copy from pageable memory would wait for the GPU
    return noise.to(device=device, dtype=dtype, non_blocking=on_gpu)


# --- samplers: (denoise, x, times, schedule, generators=None, **options) -> x0 ---
# x is the sample at times[0]: start_std times noise, or a noisy image. The times descend to 0, or to an end with some
# noise left.


def sample_ddpm(denoise, x, times, schedule, generators=None, noise_scale=1.0, variance="small"):
    """Ancestral sampling from the posterior q(x_s | x_t, x0_hat) (Ho et al. 2020, eq. 7; Kingma et al. 2021, app. A).

    noise_scale: factor of the noise added at each step; below 1 for smoother samples.
    variance: of that noise: "small", the posterior's, exact for data in one point; or "large", that of q(x_t | x_s),
        beta, exact for data N(0, 1) (Ho et al., section 3.2).
    """
    assert variance in ("small", "large"), f"variance must be small or large, got {variance!r}"
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
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic at eta = 0, equal to `sample_ddpm` at eta = 1."""
    assert 0 <= eta <= 1, f"eta must be in [0, 1], got {eta}"
    for t, _, alpha_t, alpha_s, sigma_t, sigma_s in steps_of(times, schedule):
        x0 = denoise(x, t)
        eps = (x - alpha_t * x0) / sigma_t
        var_ts = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
        std = eta * var_ts**0.5 * sigma_s / sigma_t  # eq. 16
        x = alpha_s * x0 + max(sigma_s**2 - std**2, 0) ** 0.5 * eps  # eq. 12; rounding can give -1e-17
        if std > 0:
            x = x + std * randn(x.shape, generators, x.device, x.dtype)
    return x


def sample_euler(denoise, x, times, schedule, generators=None):
    """Euler's method on the probability-flow ODE (Song et al. 2021b, eq. 13) along straight lines.

    With z = x / (alpha + sigma) and r = sigma / (alpha + sigma), z = (1 - r) x0 + r eps and dz/dr = (z - x0_hat) / r,
    finite at both ends of every schedule. A step keeps x0_hat and eps fixed, so it equals DDIM at eta = 0.
    """
    for t, _, alpha_t, alpha_s, sigma_t, sigma_s in steps_of(times, schedule):
        z, r_t, r_s = x / (alpha_t + sigma_t), sigma_t / (alpha_t + sigma_t), sigma_s / (alpha_s + sigma_s)
        slope = (z - denoise(x, t)) / r_t
        x = (z + (r_s - r_t) * slope) * (alpha_s + sigma_s)
    return x


def sample_heun(denoise, x, times, schedule, generators=None):
    """Heun's second-order method (Karras et al. 2022, Algorithm 1) in the coordinates z, r of `sample_euler`.

    The last step, to r = 0, is Euler's, so S steps take 2 S - 1 evaluations. k-diffusion and diffusers average slopes
    in sigma / alpha, which is infinite at alpha = 0: the same in the limit, with other second-order errors.
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
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): second order at one evaluation per step."""
    return sample_dpmpp_2m_sde(denoise, x, times, schedule, generators, eta=0.0)


def sample_dpmpp_2m_sde(denoise, x, times, schedule, generators=None, eta=1.0):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095), midpoint variant; eta = 0 is the ODE.

    h is the length of a step in log(alpha / sigma), decay = exp(-h). Steps of first order are the first, one after
    alpha = 0 and the last, to sigma = 0 (both infinitely long). eta scales the noise as in k-diffusion; 1 is the
    paper's.
    """
    assert 0 <= eta <= 1, f"eta must be in [0, 1], got {eta}"
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
    """Euler ancestral of k-diffusion: Euler's step to below s, then noise up to s. Equal to `sample_ddim`.

    In sigma / alpha it goes down to k_down and adds noise of k_up = eta k_s sqrt(1 - k_s^2 / k_t^2), with k_down^2 +
    k_up^2 = k_s^2. alpha_s k_up is the std of DDIM's eq. 16 and Euler's step is DDIM's; at eta = 1, the default, both
    equal `sample_ddpm`.
    """
    return sample_ddim(denoise, x, times, schedule, generators, eta)


def sample_plms(denoise, x, times, schedule, generators=None):
    """PLMS: DDIM steps with the Adams-Bashforth mean of the last four eps (PNDM, Liu et al. 2022, arXiv 2202.09778).

    The first of several steps averages eps at its two ends, so S > 1 steps take S + 1 evaluations. Where alpha < 1e-3,
    as at zero SNR, a step in sigma / alpha is nearly infinite and a mean of eps would diverge: DDIM's step is used
    there. The weights are those of equal steps: with two or three very unequal ones it overshoots. With a v network the
    result differs from diffusers', which averages v, although the v of different steps belong to different alpha and
    sigma.
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
        if len(past) == 1 and len(times) > 2:
            mean = (eps + (ddim - alpha_s * denoise(ddim, s)) / sigma_s) / 2
        else:
            mean = sum(weight * e for weight, e in zip(adams[len(past) - 1], past))
        x = alpha_s / alpha_t * (x - sigma_t * mean) + sigma_s * mean
    return x


def sample_unipc(denoise, x, times, schedule, generators=None, order=2):
    """UniPC of x0_hat with B_2(h) = exp(h) - 1 (Zhao et al. 2023, arXiv 2302.04867), h in log(alpha / sigma).

    order: 1 to 3, of the predictor. The corrector, one order higher, uses x0_hat at the predicted point, which the
        next step needs anyway: S steps take S evaluations. The order grows from 1 at the first step and falls to
        1 at the last. x0_hat at alpha = 0, infinitely far away, is not used by later steps.
    """
    assert order in (1, 2, 3), f"order must be 1, 2 or 3, got {order}"
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
        if i + 1 < len(steps):  # the corrector, UniC: the same step with x0_hat at its end
            x0_t, x0 = x0, denoise(x, s)
            x = base + B * unipc_sum([*r, 1.0], [*D, x0 - x0_t], h)
    return x


def unipc_sum(r, D, h):
    """Sum of the divided differences D at the nodes r, with weights that solve UniPC's order conditions for B_2(h)."""
    n = len(r)
    if n < 2:  # the authors' 1/2 is as accurate as the solution, and holds for infinite h
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
    model, schedule, objective, cond, null=None, guidance=1.0, guidance_interval=(0.0, 1.0), guidance_rescale=0.0,
    guide=None,
):  # fmt: skip
    """`denoise(x, t) -> x0_hat` of a network `model(x, unet_time, **cond) -> prediction`, with guidance.

    cond, null: the condition and the empty one, dicts with the same keys of tensors batched like x. A negative prompt
        is another `null`.
    guidance: scale w: x0_null + w (x0_cond - x0_null) (Ho & Salimans 2022, eq. 6 with w - 1 for their w; linear, so
        the same for eps and x0), both in one batch of twice the size. 1 evaluates the condition only.
    guidance_interval: (low, high): no guidance outside of low <= t <= high (Kynkaanniemi et al. 2024, arXiv
        2404.07724).
    guidance_rescale: in [0, 1], how far the std of each image's guided prediction is restored to the unguided one
        (phi of Lin et al. 2024, eq. 15 and 16).
    guide: another `denoise(x, t)`, of a weaker model with the same condition. Its x0_hat replaces x0_null and `null`
        is not needed (autoguidance, Karras et al. 2024, arXiv 2406.02507).

    `denoise.evaluations` counts network evaluations per image: 2 when guided, those of the guide included.
    """
    low, high = guidance_interval
    joint = guidance != 1 and guide is None  # condition and null in one batch
    assert not joint or (null is not None and null.keys() == cond.keys()), f"guidance needs `null` with {list(cond)}"
    assert 0 <= low < high <= 1, f"guidance_interval must satisfy 0 <= low < high <= 1, got {guidance_interval}"
    assert 0 <= guidance_rescale <= 1, f"guidance_rescale must be in [0, 1], got {guidance_rescale}"
    both = {key: torch.cat([cond[key], null[key]]) for key in cond} if joint else None

    @torch.no_grad()
    def denoise(x, t):
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        alpha, sigma, time = schedule.alpha(t).item(), schedule.sigma(t).item(), unet_time(schedule, t).item()
        assert alpha > 0 or objective != "eps", "eps is undefined at alpha = 0: use sample_times(..., objective='eps')"
        guided = guidance != 1 and low <= t.item() <= high
        if guided and joint:
            prediction, weak = predict(model, torch.cat([x, x]), time, both).chunk(2)
        else:
            prediction = predict(model, x, time, cond)
        denoise.evaluations += 2 if guided and joint else 1
        if guided and not joint:
            before = getattr(guide, "evaluations", 0)
            x0_weak = guide(x, t.item())
            denoise.evaluations += getattr(guide, "evaluations", 1) - before
            weak = target(objective, x0_weak, (x - alpha * x0_weak) / sigma, alpha, sigma)
        if guided:
            strong = weak + guidance * (prediction - weak)
            prediction = restore_std(strong, prediction, guidance_rescale) if guidance_rescale else strong
        return to_x0(objective, prediction, x, alpha, sigma)

    denoise.evaluations = 0
    return denoise


def predict(model, x, time, cond):
    """model(x, time, **cond) in the dtype of its weights, returned in that of x."""
    dtype = next((p.dtype for p in model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    t = torch.full((len(x),), time, device=x.device, dtype=torch.float32)
    cond = {key: value.to(dtype=dtype) if value.is_floating_point() else value for key, value in cond.items()}
    prediction = model(x.to(dtype=dtype), t, **cond)
    prediction = prediction[0] if isinstance(prediction, tuple) else prediction  # of a Denoiser in training mode
    return prediction.to(x.dtype, copy=True)  # the next replay of a CUDA graph overwrites its output


def restore_std(guided, prediction, share):
    """Moves the std of each guided image by `share` towards that of its prediction (Lin et al. 2024, eq. 15, 16)."""
    axes = tuple(range(1, guided.ndim))
    ratio = prediction.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-8)
    return (share * ratio + 1 - share) * guided


def keep_known(denoise, known, mask):
    """`denoise` whose x0 is `known` (B,C,h,w) where `mask` (B,1,h,w) is 0; works with any sampler."""
    return lambda x, t: torch.where(mask > 0, denoise(x, t), known.to(x.dtype))


def clip_x0(denoise, limit):
    """`denoise` whose x0 is within [-limit, limit]."""
    return lambda x, t: denoise(x, t).clamp(-limit, limit)
