"""The diffusion process against exact answers for Gaussian data, published tables, and diffusers' schedulers."""

import math

import numpy as np
import pytest
import torch
from conftest import fill

from diffusion import (
    OBJECTIVES,
    SCHEDULES,
    SPACINGS,
    keep_known,
    make_denoiser,
    make_schedule,
    randn,
    sample_times,
    samplers,
    t_max,
    target,
    to_x0,
    unet_time,
)
from unet import Denoiser, UNet

F64 = torch.float64
TABLES = tuple(name for name in SCHEDULES if make_schedule(name).discrete)
CONTINUOUS = tuple(name for name in SCHEDULES if name not in TABLES)
STOCHASTIC = ("ddpm", "euler_a", "dpmpp_2m_sde")
ONE_EVALUATION = ("ddpm", "ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc")  # per step
PROCESSES = {
    **{name: make_schedule(name) for name in CONTINUOUS},
    "scaled_linear": make_schedule("scaled_linear"),
    "zero_snr": make_schedule("scaled_linear", zero_snr=True),
    "squared_cosine": make_schedule("squared_cosine"),
}


def entries(T=1000):
    """Times of a table's entries, index 0 first."""
    return torch.arange(1, T + 1, dtype=F64) / T


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def seeded(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# Data: three Gaussians in the plane, whose E[x0 | x_t] is known in closed form.
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
MEANS = torch.tensor([[1.0, 0.5], [-1.0, 0.2], [0.1, -1.2]], dtype=F64)
STDS = torch.tensor([0.5, 0.4, 0.6], dtype=F64)
MEAN = WEIGHTS @ MEANS
COVARIANCE = (MEANS.T * WEIGHTS) @ MEANS - MEAN[:, None] * MEAN + (WEIGHTS @ STDS**2) * torch.eye(2, dtype=F64)


def mixture_x0(x, alpha, sigma):
    """E[x0 | x] of the mixture."""
    variance = alpha**2 * STDS**2 + sigma**2  # of x, in each Gaussian
    away = x[:, None].double() - alpha * MEANS  # (B,3,2)
    share = (WEIGHTS.log() - variance.log() - away.square().sum(2) / (2 * variance)).softmax(1)
    means = MEANS + (alpha * STDS**2 / variance)[:, None] * away
    return (share[..., None] * means).sum(1).to(x.dtype)


def mixture_denoiser(schedule, seen=None):
    def denoise(x, t):
        t = torch.as_tensor(t, dtype=F64)
        assert t > 0, "the network is never evaluated at t = 0"
        if seen is not None:
            seen.append(x)
        return mixture_x0(x, schedule.alpha(t), schedule.sigma(t))

    return denoise


# --- schedules ---


def test_tables_by_their_formulas():
    """alpha_bar is the product of 1 - beta; published ends."""
    i, start, end = np.arange(1000) / 999, 0.00085, 0.012
    cosines = np.cos((np.arange(1001) + 8) / 1008 * math.pi / 2) ** 2
    betas = {
        "linear": start + (end - start) * i,
        "scaled_linear": (start**0.5 + (end**0.5 - start**0.5) * i) ** 2,
        "quadratic": (start**0.5 + (end**0.5 - start**0.5) * i) ** 2,
        "sqrt": (start + (end - start) * i) ** 0.5,
        "sigmoid": start + (end - start) / (1 + np.exp(6 - 12 * i)),
        "squared_cosine": np.minimum(0.999, 1 - cosines[1:] / cosines[:-1]),
    }
    assert set(betas) <= set(TABLES)
    for name, values in betas.items():
        alpha_bar, schedule = torch.from_numpy(np.cumprod(1 - values)), make_schedule(name)
        torch.testing.assert_close(schedule.alpha(entries()) ** 2, alpha_bar, rtol=1e-9, atol=0)
        torch.testing.assert_close(schedule.sigma(entries()) ** 2, 1 - alpha_bar, rtol=1e-9, atol=0)
        torch.testing.assert_close(unet_time(schedule, entries()), torch.arange(1000.0, dtype=F64), rtol=0, atol=1e-9)
    ten = make_schedule("linear", T=10).alpha(torch.ones(1, dtype=F64)).item() ** 2
    assert ten == pytest.approx(np.prod(1 - np.linspace(start, end, 10)))
    published = [("scaled_linear", 0.00085, 0.012, 0.99915, 0.0046601)]  # Stable Diffusion
    published += [("scaled_linear", 0.0015, 0.0195, 0.9985, 1.423e-4)]  # LDM
    published += [("linear", 1e-4, 0.02, 0.9999, 4.036e-5)]  # DDPM
    for name, beta_start, beta_end, *ends in published:
        got = make_schedule(name, beta_start, beta_end).alpha(entries()[[0, -1]]) ** 2
        assert got.tolist() == pytest.approx(ends, rel=5e-4)


def test_continuous_schedules():
    t = torch.linspace(0, 1, 11, dtype=F64)
    cosine, flow = make_schedule("cosine"), make_schedule("flow")
    torch.testing.assert_close(cosine.alpha(t), torch.cos(math.pi * t / 2))
    torch.testing.assert_close(cosine.sigma(t), torch.sin(math.pi * t / 2))
    assert torch.equal(flow.alpha(t), 1 - t) and torch.equal(flow.sigma(t), t)
    assert cosine.alpha(torch.ones(1)) == 0 and unet_time(flow, t).tolist() == pytest.approx((1000 * t).tolist())
    assert unet_time(make_schedule("linear"), t[[0, 5]]).tolist() == pytest.approx([0, 499])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_tables_between_entries(name, zero_snr, dtype):
    schedule = make_schedule(name, zero_snr=zero_snr)
    t = torch.linspace(0, 1, 40001, dtype=dtype)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.isfinite().all() and sigma.isfinite().all() and alpha[0] == 1 and sigma[0] == 0
    bits = torch.finfo(dtype).eps
    assert (alpha.diff() < 4 * bits).all() and (sigma.diff() > -4 * bits).all(), "monotone up to rounding"
    assert (alpha[::40].diff() < 0).all(), "from entry to entry"
    assert (alpha[-1] == 0) == zero_snr
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=8 * bits)
    assert schedule.alpha(t.view(-1, 1, 1)).shape == (40001, 1, 1)


@pytest.mark.parametrize("name", TABLES)
def test_zero_terminal_snr(name):
    """Lin et al. 2024: sqrt(alpha_bar) keeps its first value, ends at 0, and is shifted and scaled in between."""
    plain, zero = (make_schedule(name, zero_snr=flag).alpha(entries()) for flag in (False, True))
    assert zero[-1] == 0 and zero[0].item() == pytest.approx(plain[0].item(), rel=1e-12)
    scale = (plain - plain[-1]) / zero  # one number; nan at the end
    torch.testing.assert_close(scale[:-1], torch.full((999,), 1 - plain[-1] / plain[0], dtype=F64), rtol=1e-9, atol=0)
    assert make_schedule(name, zero_snr=True).alpha(torch.tensor(0.9995, dtype=F64)) == pytest.approx(zero[-2] / 2)


ONE = torch.ones(2, 1)
REFUSED = {
    "unknown schedule 'cosin': choose one of .*flow": lambda: make_schedule("cosin"),
    "schedule 'flow' already ends at zero SNR": lambda: make_schedule("flow", zero_snr=True),
    "need 0 < beta_start <= beta_end < 1, got 0.02 and 0.01": lambda: make_schedule("linear", 0.02, 0.01),
    "T must be >= 2": lambda: make_schedule("linear", T=1),
    "unknown objective 'epsilon': choose one of .*eps": lambda: target("epsilon", ONE, ONE, ONE, ONE),
    "unknown objective 'epsilon'": lambda: to_x0("epsilon", ONE, ONE, ONE, ONE),
    "objective eps cannot be used at zero SNR": lambda: sample_times(9, PROCESSES["zero_snr"], "eps"),
    r"steps must be in \[1, 1000\], got 0": lambda: sample_times(0, PROCESSES["cosine"]),
    r"steps must be in \[1, 17\], got 18": lambda: sample_times(18, make_schedule("linear", T=17)),
    "unknown spacing 'even': choose one of .*trailing": lambda: sample_times(9, PROCESSES["flow"], "v", "even"),
    "2 generators for 3 images": lambda: randn((3, 4), seeded([1, 2])),
    "variance must be small or large": lambda: samplers["ddpm"](0, ONE, ONE, 0, variance="fixed"),
    r"eta must be in \[0, 1\], got 2": lambda: samplers["ddim"](0, ONE, ONE, 0, eta=2),
    r"eta must be in \[0, 1\], got -1": lambda: samplers["dpmpp_2m_sde"](0, ONE, ONE, 0, eta=-1),
    "order must be 1, 2 or 3, got 4": lambda: samplers["unipc"](0, ONE, ONE, 0, order=4),
    r"guidance needs `null` with \['c'\]": lambda: make_denoiser(0, 0, "v", {"c": ONE}, {"d": ONE}, guidance=2.0),
    "guidance_interval must": lambda: make_denoiser(0, 0, "v", {}, {}, 2.0, guidance_interval=(0.5, 0.5)),
    r"guidance_rescale must be in \[0, 1\]": lambda: make_denoiser(0, 0, "v", {}, {}, 2.0, guidance_rescale=1.1),
    "eps is undefined at alpha = 0": lambda: make_denoiser(lambda x, t: x, PROCESSES["flow"], "eps", {})(ONE, 1.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_are_named(message):
    with pytest.raises(AssertionError, match=message):
        REFUSED[message]()


# --- objectives ---


PREDICTIONS = {
    "eps": lambda x0, eps, alpha, sigma: eps,
    "x0": lambda x0, eps, alpha, sigma: x0,
    "v": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    "flow": lambda x0, eps, alpha, sigma: eps - x0,
}


@pytest.mark.parametrize("name", ("linear", "scaled_linear", *CONTINUOUS))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_to_x0_inverts_target(objective, name):
    schedule = make_schedule(name)
    top = t_max(objective, schedule)
    t = torch.linspace(0, top, 9, dtype=F64).view(-1, 1, 1, 1)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x0, eps = normal(9, 3, 4, 4), normal(9, 3, 4, 4, seed=1)
    prediction = target(objective, x0, eps, alpha, sigma)
    if objective in PREDICTIONS:
        assert torch.equal(prediction, PREDICTIONS[objective](x0, eps, alpha, sigma))
        assert top == (0.995 if objective == "eps" and schedule.alpha(torch.ones(1)) == 0 else 1.0)
    torch.testing.assert_close(to_x0(objective, prediction, alpha * x0 + sigma * eps, alpha, sigma), x0)


# --- times ---


def indices(times, T=1000):
    """The table's indices of times, except their end."""
    return (times[:-1] * T - 1).round().int().tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_any_number_of_steps_has_distinct_times(spacing):
    for name, T in (("linear", 1000), ("linear", 17), ("sigmoid", 36), ("flow", 1000), ("cosine", 1000)):
        schedule = make_schedule(name, T=T)
        for objective in ("v", "eps"):
            top = t_max(objective, schedule)
            every = 97 if spacing == "karras" and T == 1000 else 3 if T == 1000 else 1
            for steps in (*range(1, T, every), T) if objective == "v" else (1, 2, 7, T):
                times = sample_times(steps, schedule, objective, spacing)
                assert times.shape == (steps + 1,) and times.dtype == F64
                assert (times.diff() < 0).all() and times[0] <= top and times[-1] >= 0
                if schedule.discrete and spacing != "karras":
                    torch.testing.assert_close(times * T, (times * T).round(), rtol=0, atol=1e-9)
                if spacing in ("trailing", "linspace", "karras"):
                    assert times[0] == top and times[-1] == 0
                else:
                    assert times[-1] == (0 if schedule.discrete == steps else 1 / T)


def test_quadratic_spacing():
    schedule = make_schedule("scaled_linear")
    quadratic = ((np.linspace(0, np.sqrt(1000 * 0.8), 25)) ** 2).astype(int) + 1  # CompVis' "quad"
    assert indices(sample_times(25, schedule, "eps", "quadratic")) == quadratic[::-1].tolist()


@pytest.mark.parametrize("name, objective", [("scaled_linear", "eps"), ("flow", "eps"), ("cosine", "v")])
def test_karras_spacing(name, objective):
    """Equal steps in (sigma / alpha)^(1/7); where the first is infinite, from 0.995 on."""
    schedule, infinite = PROCESSES[name], objective == "v"
    times = sample_times(12, schedule, objective, "karras")
    ratio = (schedule.sigma(times) / schedule.alpha(times))[:-1] ** (1 / 7)
    assert (schedule.alpha(times[:1]) == 0) == infinite and times[-2].item() == pytest.approx(1 / 1000, rel=1e-9)
    steps = ratio.diff()[int(infinite) :]
    torch.testing.assert_close(steps, steps[:1].expand(len(steps)), rtol=1e-6, atol=0)
    if infinite:
        at = torch.tensor(0.995, dtype=F64)
        highest = (schedule.sigma(at) / schedule.alpha(at)).item() ** (1 / 7)
        assert (ratio[1] - steps[0]).item() == pytest.approx(highest, rel=1e-9)


# --- samplers on the mixture ---


def equal_ratios(steps, schedule):
    """Times of equal steps in sigma / (alpha + sigma), from 1 to 0."""
    t = torch.linspace(0, 1, 20001, dtype=F64) ** 3
    r = schedule.sigma(t) / (schedule.alpha(t) + schedule.sigma(t))
    return torch.from_numpy(np.interp(r[-1] * torch.linspace(1, 0, steps + 1, dtype=F64), r, t))


@pytest.fixture(scope="module")
def exact():
    """Where the probability flow takes 32 points of noise, by many steps of Heun's."""
    x = normal(32, 2)
    return x, {k: samplers["heun"](mixture_denoiser(p), x, equal_ratios(600, p), p) for k, p in PROCESSES.items()}


ORDERS = [("ddim", {}, 1), ("euler", {}, 1), ("heun", {}, 2), ("dpmpp_2m", {}, 2), ("plms", {}, 2), ("unipc", {}, 2)]
ORDERS += [("unipc", {"order": 1}, 2), ("unipc", {"order": 3}, 2)]  # 1 is corrected; 3 has ends of lower order


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler, options, order", ORDERS)
def test_order_of_convergence(exact, sampler, options, order, process):
    """Twice the steps leave 1/2 (first order) or 1/4 (second) of the error."""
    schedule, (x, ends) = PROCESSES[process], exact
    errors = []
    for steps in (100, 200):
        x0 = samplers[sampler](mixture_denoiser(schedule), x, equal_ratios(steps, schedule), schedule, **options)
        errors.append((x0 - ends[process]).abs().max().item())
    assert errors[1] < (0.02 if order == 1 else 2e-3)
    assert (1.8 if order == 1 else 2.8) < errors[0] / errors[1] < (2.3 if order == 1 else 5.5), errors


@pytest.mark.parametrize("order, gain", [(1, 2), (2, 3), (3, 4)])
def test_unipc_gains_an_order_from_the_corrector(order, gain):
    """Between finite ends, except for the uncorrected last step, which is made tiny."""
    schedule, x, errors, fine = make_schedule("cosine"), normal(32, 2), [], torch.linspace(0.8, 0.3, 1001, dtype=F64)

    def run(times, order):
        times = torch.cat([times, times[-1:] - 1e-6])
        return samplers["unipc"](mixture_denoiser(schedule), x, times, schedule, order=order)

    expected = run(fine, 3)
    for steps in (16, 32):
        stride = 1000 // steps
        warm = fine[: 1 + 2 * stride]  # the first two steps, of low order, finely
        times = torch.linspace(0.8, 0.3, steps + 1, dtype=F64)
        errors.append((run(torch.cat([warm, times[3:]]), order) - expected).abs().max().item())
    assert 0.7 * 2**gain < errors[0] / errors[1] < 1.8 * 2**gain, errors


@pytest.mark.parametrize("process", ["flow", "zero_snr"])
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_stochastic_samplers_have_the_moments_of_the_data(sampler, process):
    schedule, n = PROCESSES[process], 10000
    torch.manual_seed(0)
    x = samplers[sampler](mixture_denoiser(schedule), normal(n, 2), equal_ratios(150, schedule), schedule)
    error = 4 * (COVARIANCE.diag() / n) ** 0.5  # four standard errors
    assert ((x.mean(0) - MEAN).abs() < error + 0.01).all()
    torch.testing.assert_close(x.T.cov(), COVARIANCE, rtol=0, atol=0.05)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", samplers)
def test_every_sampler_with_every_spacing(sampler, spacing):
    """From 1 step on, with both starts (alpha = 0 or not) and both ends (sigma = 0 or not)."""
    for process in (*PROCESSES.values(), make_schedule("sqrt")):
        for steps in (1, 2, 3, 9, 30):
            times, seen = sample_times(steps, process, "v", spacing), []
            x = process.alpha(times[:1]) * MEANS[0] + process.sigma(times[:1]) * normal(4, 2)
            x = x.float() if steps > 4 else x
            x0 = samplers[sampler](mixture_denoiser(process, seen), x, times, process, seeded(range(4)))
            assert x0.isfinite().all() and x0.dtype == x.dtype
            if steps > 2 or sampler != "plms":  # its weights are for equal steps: two very unequal ones overshoot
                assert x0.abs().max() < 5
            warm = process.alpha(times[0]) >= 1e-3 and steps > 1
            evaluations = dict.fromkeys(ONE_EVALUATION, steps)
            evaluations |= {"heun": 2 * steps - int(times[-1] == 0), "plms": steps + int(warm)}
            assert len(seen) == evaluations.get(sampler, len(seen))
            if len(seen) == 1 and process.alpha(times[0]) == 0 and times[-1] == 0:  # the best estimate from pure noise
                torch.testing.assert_close(x0, MEAN.expand(4, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", samplers)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_sampler_schedule_and_objective(name, sampler):
    """A network with the exact prediction generates what the exact x0_hat generates."""
    schedule = make_schedule(name)
    for objective in OBJECTIVES:

        def network(x, t, objective=objective):
            t = (t[0].double() + 1 if schedule.discrete else t[0].double()) / 1000
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            x0 = mixture_x0(x, alpha, sigma)
            return target(objective, x0, (x - alpha * x0) / sigma, alpha, sigma)

        times = sample_times(5, schedule, objective)
        x = schedule.sigma(times[:1]) * normal(4, 2)
        denoisers = make_denoiser(network, schedule, objective, {}), mixture_denoiser(schedule)
        a, b = (samplers[sampler](denoise, x, times, schedule, seeded(range(4))) for denoise in denoisers)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_samplers_that_are_equal_and_options():
    schedule = make_schedule("cosine")
    args = mixture_denoiser(schedule), normal(16, 2).float(), sample_times(9, schedule), schedule

    def sample(sampler, **options):
        return samplers[sampler](*args, seeded(range(16)), **options)

    equal = [("euler_a", {}, "ddpm", {}), ("ddim", {"eta": 1.0}, "ddpm", {}), ("euler", {}, "ddim", {})]
    equal += [("euler_a", {"eta": 0}, "euler", {}), ("dpmpp_2m_sde", {"eta": 0}, "dpmpp_2m", {})]
    equal += [("ddpm", {"noise_scale": 0.0}, "ddpm", {"noise_scale": 0.0, "variance": "large"})]
    for a, a_options, b, b_options in equal:
        torch.testing.assert_close(sample(a, **a_options), sample(b, **b_options), rtol=1e-5, atol=1e-5)
    different = [("ddim", {"eta": 0.5}), ("dpmpp_2m_sde", {"eta": 0.5}), ("ddpm", {"variance": "large"})]
    for sampler, options in [*different, ("unipc", {"order": 3})]:
        assert (sample(sampler, **options) - sample(sampler)).abs().max() > 1e-3


def test_noise_of_each_step_of_ddpm():
    """x0_hat = 0: a step multiplies x and adds noise of the stated variance, and noise_scale."""
    schedule, times = make_schedule("linear", 1e-4, 0.02), torch.tensor([0.6, 0.5], dtype=F64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    beta = sigma[0] ** 2 - (alpha[0] / alpha[1]) ** 2 * sigma[1] ** 2
    for options, variance in (
        ({}, beta * sigma[1] ** 2 / sigma[0] ** 2),
        ({"variance": "large"}, beta),
        ({"noise_scale": 0.5}, 0.5**2 * beta * sigma[1] ** 2 / sigma[0] ** 2),
    ):
        torch.manual_seed(0)
        x = samplers["ddpm"](lambda x, t: 0 * x, torch.zeros(40000, 1, dtype=F64), times, schedule, **options)
        assert x.var().item() == pytest.approx(variance.item(), rel=0.03)


def test_noise_does_not_depend_on_the_batch():
    many = randn((3, 4, 8, 8), seeded([5, 6, 7]))
    assert torch.equal(many[1:2], randn((1, 4, 8, 8), seeded([6])))
    assert torch.equal(many.bfloat16(), randn((3, 4, 8, 8), seeded([5, 6, 7]), dtype=torch.bfloat16)), "in any dtype"


# --- against diffusers ---


@pytest.fixture(scope="session")
def schedulers(diffusers):
    return pytest.importorskip("diffusers.schedulers", exc_type=ImportError)


SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def compare(scheduler, steps, objective, schedule, sampler, end=0.0, **options):
    """The largest relative difference between the network's inputs, and the samples, of diffusers and of ours.

    Both get the mixture's exact prediction, start from the same noise of unit scale and use the same generators; ours
    takes diffusers' timesteps and ends at time `end`.
    """
    scheduler.set_timesteps(steps)
    x = normal(4, 2).float()
    stochastic = sampler in STOCHASTIC or "eta" in options
    theirs, ours, y, generators = [], [], x, seeded(range(4))
    if scheduler.init_noise_sigma != 1:  # the samples of diffusers' Euler and Heun are x / alpha
        y = x / schedule.alpha((scheduler.timesteps[0].double() + 1) / 1000).float()
    more = {"generator": generators} if stochastic else {}
    more |= {"eta": options["eta"]} if sampler == "ddim" and stochastic else {}
    for index in scheduler.timesteps:
        t = (index.double() + 1) / 1000
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x_in = scheduler.scale_model_input(y, index)
        x0 = mixture_x0(x_in, alpha, sigma)
        prediction = target(objective, x0, (x_in - alpha * x0) / sigma, alpha, sigma).float()
        y = scheduler.step(prediction, index, y, **more).prev_sample
        theirs.append(x_in)
    times = torch.tensor([*((scheduler.timesteps.double().unique().flip(0) + 1) / 1000), end], dtype=F64)
    x0 = samplers[sampler](mixture_denoiser(schedule, ours), x, times, schedule, seeded(range(4)), **options)
    assert len(ours) == len(theirs)
    return max(((a - b).norm() / b.norm()).item() for a, b in zip([*ours, x0], [*theirs, y]))


OBJECTIVE_NAMES = {"eps": "epsilon", "v": "v_prediction"}
DDIM, DDPM = {"clip_sample": False}, {"clip_sample": False, "timestep_spacing": "leading"}
PNDM, TRAILING = {"skip_prk_steps": True}, {"timestep_spacing": "trailing"}
STABLE = {"steps_offset": 1, "set_alpha_to_one": False}  # leading, from index 1 on, and an end at index 0: at 1/1000


SAMPLERS = [
    ("DDIM", DDIM | STABLE, "ddim", {"end": 0.001}),
    ("DDIM", DDIM | STABLE, "ddim", {"end": 0.001, "eta": 0.6}),
    ("DDIM", DDIM | TRAILING, "ddim", {}),
    ("DDIM", DDIM | TRAILING | {"rescale_betas_zero_snr": True}, "ddim", {}),
    ("DDPM", DDPM | TRAILING, "ddpm", {}),
    ("DDPM", DDPM, "ddpm", {}),
    ("DDPM", DDPM | {"variance_type": "fixed_large"}, "ddpm", {"variance": "large"}),
    ("PNDM", PNDM | STABLE, "plms", {"end": 0.001}),
    ("PNDM", PNDM | TRAILING | {"set_alpha_to_one": True}, "plms", {}),
    ("EulerDiscrete", TRAILING, "euler", {}),
    ("EulerAncestralDiscrete", TRAILING, "euler_a", {}),
    ("EulerAncestralDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}, "euler_a", {}),
    ("DPMSolverMultistep", TRAILING, "dpmpp_2m", {}),
    ("DPMSolverMultistep", {"timestep_spacing": "linspace"}, "dpmpp_2m", {}),
    ("DPMSolverMultistep", TRAILING | {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde", {}),
    ("UniPCMultistep", TRAILING, "unipc", {}),
    ("UniPCMultistep", {"timestep_spacing": "linspace"}, "unipc", {}),
    ("UniPCMultistep", TRAILING | {"solver_order": 3}, "unipc", {"order": 3}),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name, settings, sampler, options", SAMPLERS)
def test_samplers_agree_with_diffusers(schedulers, name, settings, sampler, options):
    zero_snr = "rescale_betas_zero_snr" in settings
    schedule = make_schedule("scaled_linear", zero_snr=zero_snr)
    for objective, steps in (("eps", 20), ("v", 10)):
        if zero_snr and objective == "eps" or name == "PNDM" and objective == "v":
            continue  # diffusers' PNDM averages the first two v, which are of different alpha and sigma
        settings = settings | {"prediction_type": OBJECTIVE_NAMES[objective]}
        scheduler = getattr(schedulers, name + "Scheduler")(**SD | settings)
        assert compare(scheduler, steps, objective, schedule, sampler, **options) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_heun_agrees_with_diffusers_in_the_limit(schedulers):
    """They average slopes in sigma / alpha, we in sigma / (alpha + sigma): a second-order difference."""
    schedule, scheduler = make_schedule("scaled_linear"), schedulers.HeunDiscreteScheduler(**SD | TRAILING)
    differences = [compare(scheduler, steps, "eps", schedule, "heun") for steps in (10, 20, 40)]
    assert differences[0] < 0.03 and differences[2] < differences[1] / 2.5 < differences[0] / 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_schedules_and_spacings_agree_with_diffusers(schedulers):
    for theirs, ours in (("squaredcos_cap_v2", "squared_cosine"), ("sigmoid", "sigmoid"), ("linear", "linear")):
        for zero_snr in (False, True):
            scheduler = schedulers.DDPMScheduler(**SD | {"beta_schedule": theirs, "rescale_betas_zero_snr": zero_snr})
            alpha = make_schedule(ours, zero_snr=zero_snr).alpha(entries()).float()
            expected = scheduler.alphas_cumprod.sqrt()  # in float32
            torch.testing.assert_close(alpha, expected, rtol=1e-3, atol=2e-5)
    schedule = make_schedule("scaled_linear")
    for spacing, offset in (("trailing", 1), ("leading", 1), ("leading", 7), ("linspace", 1)):
        scheduler = schedulers.DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=offset)
        for steps in (2, 10, 28, 50, 100) if spacing == "linspace" else (*range(1, 100), 160, 333, 999):
            scheduler.set_timesteps(steps)
            expected = scheduler.timesteps.tolist()
            if len(expected) == steps and expected[0] < 1000:  # theirs can have one more, or begin beyond the table
                assert indices(sample_times(steps, schedule._replace(steps_offset=offset), "eps", spacing)) == expected
    scheduler = schedulers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    times = sample_times(20, schedule, "eps", "karras")
    torch.testing.assert_close((schedule.sigma(times) / schedule.alpha(times)).float(), scheduler.sigmas)


# --- the network as a denoiser ---


class Net(torch.nn.Module):
    """A prediction that depends on every input, and a list of the calls."""

    def __init__(self, weight=0.3, dtype=F64):
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.tensor(weight, dtype=dtype)), []

    def forward(self, x, t, context=None, y=None):
        self.calls.append((len(x), t, x.dtype, None if context is None else context.dtype))
        out = self.weight * x.flip(2) + 0.2 * x**2 + t.view(-1, 1, 1, 1).to(x.dtype) / 1000
        if context is not None:
            out = out + context.mean((1, 2)).view(-1, 1, 1, 1) * x.flip(3)
        return out if y is None else out + y.view(-1, 1, 1, 1)


COND = {"context": normal(2, 5, 6, seed=3), "y": torch.tensor([1, 2])}
NULL = {"context": normal(2, 5, 6, seed=4), "y": torch.tensor([0, 0])}
X = normal(2, 3, 4, 4)


@pytest.mark.parametrize("name", ["cosine", "scaled_linear"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_denoiser_and_guidance(objective, name):
    """Guidance of the prediction is that of x0; rescaled by Lin et al. 2024, eq. 15 and 16."""
    schedule, net, t = make_schedule(name), Net(), 0.6
    at = torch.tensor(t, dtype=F64)
    alpha, sigma = schedule.alpha(at), schedule.sigma(at)
    conditional = make_denoiser(net, schedule, objective, COND)
    x0 = conditional(X, t)
    t_in = unet_time(schedule, at).expand(2)
    cond, null = net(X, t_in, **COND), net(X, t_in, **NULL)
    torch.testing.assert_close(x0, to_x0(objective, cond, X, alpha, sigma), rtol=1e-6, atol=1e-6)  # t in float32
    assert conditional.evaluations == 1 and not x0.requires_grad
    strong = null + 3 * (cond - null)
    for phi in (0.0, 0.7, 1.0):
        net.calls.clear()
        guided = make_denoiser(net, schedule, objective, COND, NULL, guidance=3.0, guidance_rescale=phi)
        rescaled = torch.stack([g * p.std() / g.std() for g, p in zip(strong, cond)])
        expected = to_x0(objective, phi * rescaled + (1 - phi) * strong, X, alpha, sigma)
        torch.testing.assert_close(guided(X, at), expected, rtol=1e-6, atol=1e-6)
        assert [call[0] for call in net.calls] == [4] and guided.evaluations == 2, "one batch of two"
    zero = make_denoiser(lambda x, t, **cond: 0 * x, schedule, objective, COND, NULL, 5.0, guidance_rescale=0.7)
    assert zero(X, t).isfinite().all(), "a fresh network that predicts 0"


def test_guidance_interval():
    schedule, net = make_schedule("flow"), Net()
    always = make_denoiser(net, schedule, "flow", COND, NULL, guidance=3.0)
    never = make_denoiser(net, schedule, "flow", COND)
    interval = make_denoiser(net, schedule, "flow", COND, NULL, guidance=3.0, guidance_interval=(0.2, 0.7))
    for t in (0.1, 0.2, 0.5, 0.7, 0.8):
        net.calls.clear()
        inside = 0.2 <= t <= 0.7
        torch.testing.assert_close(interval(X, t), (always if inside else never)(X, t), rtol=1e-12, atol=1e-12)
        assert net.calls[0][0] == (4 if inside else 2)
    assert interval.evaluations == 3 * 2 + 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autoguidance(objective):
    """The guide can have another objective and schedule; each denoiser counts all evaluations that it causes."""
    schedule, net, weak = make_schedule("cosine"), Net(), Net(0.1)

    def guided(guide, **options):
        return make_denoiser(net, schedule, objective, COND, guidance=2.5, guide=guide, **options)

    x0 = make_denoiser(net, schedule, objective, COND)(X, 0.4)
    guide = make_denoiser(weak, make_schedule("linear"), "x0", COND)
    double = make_denoiser(weak, schedule, "v", COND, NULL, guidance=2.0)  # a guide that is guided itself
    for other, evaluations in ((guide, 2), (double, 3), (lambda x, t: 0 * x, 2)):
        x0_weak, denoise = other(X, 0.4), guided(other)
        torch.testing.assert_close(denoise(X, 0.4), x0_weak + 2.5 * (x0 - x0_weak), rtol=1e-7, atol=1e-7)
        assert denoise.evaluations == evaluations
    interval = guided(double, guidance_interval=(0.3, 0.5))
    for t in (0.2, 0.4, 0.6):
        interval(X, t)
    assert interval.evaluations == 3 + 2


def test_denoiser_runs_in_the_dtype_of_the_network():
    net, schedule = Net(dtype=torch.bfloat16), make_schedule("flow")
    denoise = make_denoiser(net, schedule, "flow", {"context": torch.zeros(2, 5, 6)})
    x0 = samplers["heun"](denoise, torch.randn(2, 3, 4, 4), sample_times(4, schedule, "flow"), schedule)
    assert x0.dtype == torch.float32 and denoise.evaluations == 7
    _, t, dtype, context_dtype = net.calls[0]
    assert dtype == context_dtype == torch.bfloat16 and t.dtype == torch.float32 and t.tolist() == [1000, 1000]


def test_denoiser_with_uncertainty_in_training_mode():
    """Its network then returns log-variances too."""
    settings = dict(channels=8, channel_mult=(1,), num_res_blocks=1, attention_ds=(), num_heads=1, norm_groups=4)
    model, x = fill(Denoiser(UNet(**settings), uncertainty=True)), torch.randn(2, 4, 8, 8)
    outs = [make_denoiser(model.train(on), make_schedule("flow"), "flow", {})(x, 0.5) for on in (True, False)]
    assert torch.equal(*outs) and outs[0].shape == x.shape


def test_keep_known():
    x0, known, mask = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), torch.zeros(2, 1, 4, 4)
    mask[0, :, 1] = 1
    got = keep_known(lambda x, t: x0, known, mask)(x0, 0.5)
    assert torch.equal(got[0, :, 1], x0[0, :, 1]) and torch.equal(got[0, :, 2:], known[0, :, 2:])
    assert torch.equal(got[1], known[1])
