"""The diffusion process against exact answers for a Gaussian mixture, published tables, and diffusers' schedulers."""

import math

import numpy as np
import pytest
import torch

from diffusion import (
    SPACINGS,
    make_denoiser,
    make_schedule,
    sample_times,
    samplers,
    t_max,
    target,
    to_x0,
    unet_time,
)

F64 = torch.float64
TABLES = ("linear", "scaled_linear", "quadratic", "sqrt", "sigmoid", "squared_cosine")
STOCHASTIC = ("ddpm", "euler_a", "dpmpp_2m_sde")


def entries(T=1000):
    """Times of a table's entries, index 0 first."""
    return torch.arange(1, T + 1, dtype=F64) / T


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def seeded(n):
    return [torch.Generator().manual_seed(seed) for seed in range(n)]


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
        if seen is not None:
            seen.append(x)
        return mixture_x0(x, schedule.alpha(t), schedule.sigma(t))

    return denoise


# --- schedules ---


def test_betas_of_the_tables():
    """The new tables by their formulas: alpha_bar is the product of 1 - beta."""
    i = np.arange(1000) / 999
    start, end = 0.00085, 0.012
    betas = {
        "linear": start + (end - start) * i,
        "scaled_linear": (start**0.5 + (end**0.5 - start**0.5) * i) ** 2,
        "quadratic": (start**0.5 + (end**0.5 - start**0.5) * i) ** 2,
        "sqrt": (start + (end - start) * i) ** 0.5,
        "sigmoid": start + (end - start) / (1 + np.exp(6 - 12 * i)),
        "squared_cosine": [
            min(0.999, 1 - (math.cos((j + 9) / 1008 * math.pi / 2) / math.cos((j + 8) / 1008 * math.pi / 2)) ** 2)
            for j in range(1000)
        ],
    }
    assert set(betas) == set(TABLES)
    for name, values in betas.items():
        alpha_bar = torch.from_numpy(np.cumprod(1 - np.array(values)))
        schedule = make_schedule(name)
        torch.testing.assert_close(schedule.alpha(entries()) ** 2, alpha_bar, rtol=1e-9, atol=0)
        torch.testing.assert_close(schedule.sigma(entries()) ** 2, 1 - alpha_bar, rtol=1e-9, atol=0)
        assert schedule.name == name and schedule.discrete == 1000
    assert make_schedule("linear", T=10).alpha(torch.ones(1, dtype=F64)).item() ** 2 == pytest.approx(
        np.prod(1 - np.linspace(start, end, 10))
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_tables_in_continuous_time(name, zero_snr, dtype):
    schedule = make_schedule(name, zero_snr=zero_snr)
    t = torch.linspace(0, 1, 40001, dtype=dtype)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.isfinite().all() and sigma.isfinite().all() and alpha[0] == 1 and sigma[0] == 0
    bits = torch.finfo(dtype).eps
    assert (alpha.diff() < 4 * bits).all() and (sigma.diff() > -4 * bits).all(), "monotone up to rounding"
    assert (alpha[::40].diff() < 0).all(), "from entry to entry"
    assert (alpha[-1] == 0) == zero_snr
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=8 * bits)


@pytest.mark.parametrize("name", TABLES)
def test_zero_terminal_snr(name):
    """Lin et al. 2024: sqrt(alpha_bar) keeps its first value, ends at 0, and is shifted and scaled between."""
    plain, zero = (make_schedule(name, zero_snr=flag).alpha(entries()) for flag in (False, True))
    assert zero[-1] == 0
    assert zero[0].item() == pytest.approx(plain[0].item(), rel=1e-12)
    scale = (plain - plain[-1]) / zero  # one number; nan at the end
    torch.testing.assert_close(scale[:-1], torch.full((999,), 1 - plain[-1] / plain[0], dtype=F64), rtol=1e-9, atol=0)
    assert make_schedule(name, zero_snr=True).alpha(torch.tensor(0.9995, dtype=F64)) == pytest.approx(zero[-2] / 2)


def test_refused_schedules():
    with pytest.raises(ValueError, match="schedule 'flow' ends at zero SNR by itself: leave zero_snr=False"):
        make_schedule("flow", zero_snr=True)
    for ends in ((0.0, 0.01), (0.02, 0.01), (0.1, 1.0)):
        with pytest.raises(ValueError, match="beta_start=.* need 0 < start <= end < 1"):
            make_schedule("linear", *ends)
    with pytest.raises(ValueError, match="T=1: need .* T >= 2"):
        make_schedule("linear", T=1)
    for name in TABLES:
        schedule = make_schedule(name, zero_snr=True)
        for call, args in ((t_max, ("eps", schedule)), (sample_times, (10, schedule, "eps"))):
            with pytest.raises(ValueError, match="objective eps cannot be used at zero SNR, .* choose objective v, or"):
                call(*args)
        assert t_max("v", schedule) == 1


# --- times ---


def indices(times, T=1000):
    """The table's indices that times, all but their end, fall on."""
    return (times[:-1] * T - 1).round().int().tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps(spacing):
    for name, T in (("linear", 1000), ("linear", 17), ("sigmoid", 36), ("flow", 1000), ("cosine", 1000)):
        schedule = make_schedule(name, T=T) if name in TABLES else make_schedule(name)
        for objective in ("v", "eps"):
            top = t_max(objective, schedule)
            every = 41 if spacing == "karras" and T == 1000 else 1  # a bisection takes its time
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
    assert len(sample_times(1000, make_schedule("flow"), "v", spacing)) == 1001


def test_published_spacings():
    schedule = make_schedule("scaled_linear")
    for steps in (
        1,
        2,
        4,
        5,
        8,
        10,
        20,
        25,
        40,
        50,
        100,
        125,
        200,
        250,
        500,
    ):  # CompVis: range(0, 1000, 1000 // steps) + 1
        leading = sample_times(steps, schedule, "eps", "leading")
        assert indices(leading) == [i + 1 for i in range(0, 1000, 1000 // steps)][::-1] and leading[-1] == 1 / 1000
    assert indices(sample_times(3, schedule, "eps", "leading")) == [667, 334, 1], "where CompVis' index is out of range"
    quadratic = ((np.linspace(0, np.sqrt(1000 * 0.8), 25)) ** 2).astype(int) + 1  # CompVis' "quad"
    assert indices(sample_times(25, schedule, "eps", "quadratic")) == quadratic[::-1].tolist()
    assert indices(sample_times(28, schedule, "eps", "linspace")) == list(range(999, -1, -37))
    assert indices(sample_times(5, schedule, "eps", "trailing")) == [999, 799, 599, 399, 199]


@pytest.mark.parametrize(
    "name, objective", [("scaled_linear", "eps"), ("flow", "eps"), ("cosine", "v"), ("linear", "v")]
)
def test_karras_spacing(name, objective):
    """Equal steps in (sigma / alpha)^(1/7); where the first is infinite, from 0.995 on."""
    schedule = make_schedule(name, zero_snr=name == "linear")
    times = sample_times(12, schedule, objective, "karras")
    ratio = (schedule.sigma(times) / schedule.alpha(times))[:-1] ** (1 / 7)
    blind = objective == "v"
    assert (schedule.alpha(times[:1]) == 0) == blind
    steps = ratio.diff()[int(blind) :]
    torch.testing.assert_close(steps, steps[:1].expand(len(steps)), rtol=1e-6, atol=0)
    assert times[-2].item() == pytest.approx(1 / 1000, rel=1e-9)
    if blind:
        highest = schedule.sigma(torch.tensor(0.995, dtype=F64)) / schedule.alpha(torch.tensor(0.995, dtype=F64))
        assert (ratio[1] - steps[0]).item() == pytest.approx(highest.item() ** (1 / 7), rel=1e-9)


def test_refused_times():
    table = make_schedule("linear")
    for spacing in SPACINGS:
        for steps in (0, -3):
            with pytest.raises(ValueError, match=f"steps is {steps}: at least 1 is needed"):
                sample_times(steps, table, "v", spacing)
        with pytest.raises(ValueError, match="steps is 1001: schedule 'linear' has only 1000 times"):
            sample_times(1001, table, "v", spacing)
    with pytest.raises(
        ValueError, match="unknown spacing 'uniform': choose one of trailing, leading, linspace, karras"
    ):
        sample_times(10, table, "v", "uniform")


# --- samplers on the mixture ---


def equal_ratios(steps, schedule):
    """Times of equal steps in sigma / (alpha + sigma), from 1 to 0."""
    t = torch.linspace(0, 1, 20001, dtype=F64) ** 3
    r = schedule.sigma(t) / (schedule.alpha(t) + schedule.sigma(t))
    return torch.from_numpy(np.interp(r[-1] * torch.linspace(1, 0, steps + 1, dtype=F64), r, t))


PROCESSES = {
    "cosine": make_schedule("cosine"),
    "scaled_linear": make_schedule("scaled_linear"),
    "zero_snr": make_schedule("scaled_linear", zero_snr=True),
    "squared_cosine": make_schedule("squared_cosine"),
}


@pytest.fixture(scope="module")
def exact():
    """Where the probability flow takes 32 points of noise, by many steps of Heun's."""
    x = normal(32, 2)
    return x, {k: samplers["heun"](mixture_denoiser(p), x, equal_ratios(2000, p), p) for k, p in PROCESSES.items()}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    "sampler, options, order",
    [
        ("ddim", {}, 1),
        ("euler", {}, 1),
        ("heun", {}, 2),
        ("dpmpp_2m", {}, 2),
        ("dpmpp_2m_sde", {"eta": 0.0}, 2),
        ("plms", {}, 2),
        ("unipc", {}, 2),
        ("unipc", {"order": 1}, 2),  # corrected
        ("unipc", {"order": 3}, 2),  # its ends are of lower order
    ],
)
def test_deterministic_samplers_converge_at_their_order(exact, sampler, options, order, process):
    schedule, (x, ends) = PROCESSES[process], exact
    errors = []
    for steps in (100, 200):
        x0 = samplers[sampler](mixture_denoiser(schedule), x, equal_ratios(steps, schedule), schedule, **options)
        errors.append((x0 - ends[process]).abs().max().item())
    assert errors[1] < (0.02 if order == 1 else 2e-3)
    assert (1.8 if order == 1 else 2.8) < errors[0] / errors[1] < (2.3 if order == 1 else 5), errors


@pytest.mark.parametrize("order, gain", [(1, 2), (2, 3), (3, 4)])
def test_unipc_gains_an_order_from_the_corrector(order, gain):
    """Between finite ends, but for the uncorrected last step, which is left out by letting it be tiny."""
    schedule, x, errors = make_schedule("cosine"), normal(32, 2), []
    start, end = 0.8, 0.3
    fine = torch.linspace(start, end, 1001, dtype=F64)
    exact = samplers["unipc"](mixture_denoiser(schedule), x, torch.cat([fine, fine[-1:] - 1e-6]), schedule, order=3)
    for steps in (16, 32):
        times = torch.linspace(start, end, steps + 1, dtype=F64)
        times = torch.cat([times, times[-1:] - 1e-6])
        warm = fine[: 1 + 2 * 1000 // steps]  # the first two steps, of low order, finely
        times = torch.cat([warm, times[3:]])
        x_end = samplers["unipc"](mixture_denoiser(schedule), x, times, schedule, order=order)
        errors.append((x_end - exact).abs().max().item())
    assert 0.7 * 2**gain < errors[0] / errors[1] < 1.8 * 2**gain, errors


@pytest.mark.parametrize("process", ["cosine", "scaled_linear", "zero_snr"])
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_stochastic_samplers_draw_the_data(sampler, process):
    schedule, n = PROCESSES[process], 10000
    torch.manual_seed(0)
    x = samplers[sampler](mixture_denoiser(schedule), normal(n, 2), equal_ratios(150, schedule), schedule)
    error = 4 * (COVARIANCE.diag() / n) ** 0.5  # four standard errors
    assert ((x.mean(0) - MEAN).abs() < error + 0.01).all()
    torch.testing.assert_close(x.T.cov(), COVARIANCE, rtol=0, atol=0.05)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", samplers)
def test_every_sampler_with_every_spacing(sampler, spacing):
    """From 1 step on, at both kinds of start (alpha = 0 or not) and both kinds of end (sigma = 0 or not)."""
    for process in (*PROCESSES.values(), make_schedule("flow"), make_schedule("sqrt")):
        for steps in (1, 2, 3, 4, 9, 30):
            times, seen = sample_times(steps, process, "v", spacing), []
            x = process.alpha(times[:1]) * MEANS[0] + process.sigma(times[:1]) * normal(4, 2)
            x = x.float() if steps > 4 else x
            x0 = samplers[sampler](mixture_denoiser(process, seen), x, times, process, seeded(4))
            if steps > 2 or sampler != "plms":  # its weights are for even steps: two very uneven ones overshoot
                assert x0.abs().max() < 5
            assert x0.isfinite().all()
            if sampler not in ("heun", "plms"):
                assert len(seen) == steps
            elif sampler == "heun":
                assert len(seen) == 2 * steps - int(times[-1] == 0)
            else:
                warm = process.alpha(times[0]) >= 1e-3 and (steps > 1 or times[-1] > 0)
                assert len(seen) == steps + int(warm)


def test_relations_and_options():
    schedule = make_schedule("cosine")
    args = mixture_denoiser(schedule), normal(16, 2).float(), sample_times(9, schedule), schedule

    def draw(sampler, **options):
        return samplers[sampler](*args, seeded(16), **options)

    torch.testing.assert_close(draw("euler_a"), draw("ddpm"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(draw("euler_a", eta=0), draw("euler"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(draw("dpmpp_2m_sde", eta=0), draw("dpmpp_2m"), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(draw("dpmpp_2m_sde", eta=0.5), draw("dpmpp_2m_sde"))
    torch.testing.assert_close(draw("ddpm", noise_scale=0.0), draw("ddpm", noise_scale=0.0, variance="large"))
    assert not torch.allclose(draw("ddpm"), draw("ddpm", variance="large"))
    for sampler, options, message in (
        ("ddpm", {"variance": "fixed"}, "variance is 'fixed': choose small or large"),
        ("dpmpp_2m_sde", {"eta": 1.5}, r"eta is 1.5: choose between 0 \(the ODE\) and 1 \(the SDE\)"),
        ("euler_a", {"eta": -1}, "eta is -1"),
        ("unipc", {"order": 4}, "order is 4: choose 1, 2 or 3"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(sampler, **options)


def test_noise_of_each_step_of_ddpm():
    """x0_hat = 0: a step multiplies x and adds noise of the stated variance; 0.95 of it with noise_scale."""
    schedule, times = make_schedule("linear", 1e-4, 0.02), torch.tensor([0.6, 0.5], dtype=F64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    beta = sigma[0] ** 2 - (alpha[0] / alpha[1]) ** 2 * sigma[1] ** 2
    for options, variance in (
        ({}, beta * sigma[1] ** 2 / sigma[0] ** 2),
        ({"variance": "large"}, beta),
        ({"noise_scale": 0.95}, 0.95**2 * beta * sigma[1] ** 2 / sigma[0] ** 2),
    ):
        torch.manual_seed(0)
        x = samplers["ddpm"](lambda x, t: 0 * x, torch.zeros(40000, 1, dtype=F64), times, schedule, **options)
        assert x.var().item() == pytest.approx(variance.item(), rel=0.03)


# --- against diffusers ---


@pytest.fixture(scope="session")
def diffusers_schedulers():
    return pytest.importorskip("diffusers.schedulers", exc_type=ImportError)


SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def compare(scheduler, steps, objective, schedule, sampler, end=0.0, **options):
    """The largest relative difference between what the network is given, and what is drawn, by diffusers and by us.

    Both see the mixture's exact prediction, start from the same noise of unit scale and draw noise from the same
    generators; ours takes diffusers' timesteps and ends at time `end`.
    """
    scheduler.set_timesteps(steps)
    x = normal(4, 2).float()
    stochastic = sampler in STOCHASTIC or "eta" in options
    theirs, ours, y, generators = [], [], x, seeded(4)
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
    x0 = samplers[sampler](mixture_denoiser(schedule, ours), x, times, schedule, seeded(4), **options)
    assert len(ours) == len(theirs)
    return max(((a - b).norm() / b.norm()).item() for a, b in zip([*ours, x0], [*theirs, y]))


OBJECTIVE_NAMES = {"eps": "epsilon", "v": "v_prediction"}
DDIM, DDPM = {"clip_sample": False}, {"clip_sample": False, "timestep_spacing": "leading"}
PNDM, TRAILING = {"skip_prk_steps": True}, {"timestep_spacing": "trailing"}
STABLE = {"steps_offset": 1, "set_alpha_to_one": False}  # leading, from index 1 on, and an end at index 0: at 1/1000


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name, settings, sampler, options",
    [
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
        ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}, "euler", {}),
        ("EulerAncestralDiscrete", TRAILING, "euler_a", {}),
        ("EulerAncestralDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}, "euler_a", {}),
        ("DPMSolverMultistep", TRAILING, "dpmpp_2m", {}),
        ("DPMSolverMultistep", {"timestep_spacing": "linspace"}, "dpmpp_2m", {}),
        ("DPMSolverMultistep", TRAILING | {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde", {}),
        ("UniPCMultistep", TRAILING, "unipc", {}),
        ("UniPCMultistep", {"timestep_spacing": "linspace"}, "unipc", {}),
        ("UniPCMultistep", TRAILING | {"solver_order": 3}, "unipc", {"order": 3}),
    ],
)
def test_samplers_agree_with_diffusers(diffusers_schedulers, name, settings, sampler, options):
    zero_snr = "rescale_betas_zero_snr" in settings
    schedule = make_schedule("scaled_linear", zero_snr=zero_snr)
    for objective, steps in (("eps", 20), ("v", 10)):
        if zero_snr and objective == "eps" or name == "PNDM" and objective == "v":
            continue  # diffusers' PNDM averages the first two v, which are of different alpha and sigma
        settings = settings | {"prediction_type": OBJECTIVE_NAMES[objective]}
        scheduler = getattr(diffusers_schedulers, name + "Scheduler")(**SD | settings)
        assert compare(scheduler, steps, objective, schedule, sampler, **options) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_heun_agrees_with_diffusers_in_the_limit(diffusers_schedulers):
    """They average slopes in sigma / alpha, we in sigma / (alpha + sigma): a second-order difference."""
    schedule, scheduler = make_schedule("scaled_linear"), diffusers_schedulers.HeunDiscreteScheduler(**SD | TRAILING)
    differences = [compare(scheduler, steps, "eps", schedule, "heun") for steps in (10, 20, 40)]
    assert differences[0] < 0.03 and differences[2] < differences[1] / 2.5 < differences[0] / 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_schedules_and_spacings_agree_with_diffusers(diffusers_schedulers):
    for theirs, ours in (("squaredcos_cap_v2", "squared_cosine"), ("sigmoid", "sigmoid"), ("linear", "linear")):
        for zero_snr in (False, True):
            scheduler = diffusers_schedulers.DDPMScheduler(
                **SD | {"beta_schedule": theirs, "rescale_betas_zero_snr": zero_snr}
            )
            alpha = make_schedule(ours, zero_snr=zero_snr).alpha(entries()).float()
            torch.testing.assert_close(
                alpha, scheduler.alphas_cumprod.sqrt(), rtol=1e-3, atol=2e-5
            )  # theirs in float32

    schedule = make_schedule("scaled_linear")
    for spacing, settings in (("trailing", {}), ("leading", {"steps_offset": 1}), ("linspace", {})):
        scheduler = diffusers_schedulers.EulerDiscreteScheduler(**SD, timestep_spacing=spacing, **settings)
        for steps in (2, 10, 28, 50, 100) if spacing == "linspace" else (2, 5, 10, 50, 100):
            scheduler.set_timesteps(steps)
            expected = scheduler.timesteps.double().round().int().tolist()  # theirs need not fall on entries
            assert indices(sample_times(steps, schedule, "eps", spacing)) == expected
    scheduler = diffusers_schedulers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    times = sample_times(20, schedule, "eps", "karras")
    torch.testing.assert_close((schedule.sigma(times) / schedule.alpha(times)).float(), scheduler.sigmas)


# --- guidance ---


def linear_net(a, b):
    """A network with a say in everything it is given, that remembers the sizes of its batches."""

    def net(x, t, c):
        net.batches.append(len(x))
        return a * x.flip(2) + b * x**2 + t.view(-1, 1, 1, 1) / 1000 + c.view(-1, 1, 1, 1) * x.flip(3)

    net.batches = []
    return net


COND, NULL = {"c": torch.tensor([0.3, -0.4], dtype=F64)}, {"c": torch.tensor([0.1, 0.0], dtype=F64)}


def test_guidance_interval():
    schedule, net, x = make_schedule("flow"), linear_net(0.3, 0.2), normal(2, 3, 4, 4)
    always = make_denoiser(net, schedule, "flow", COND, NULL, cfg=3.0)
    never = make_denoiser(net, schedule, "flow", COND)
    between = make_denoiser(net, schedule, "flow", COND, NULL, cfg=3.0, cfg_interval=(0.2, 0.7))
    for t in (0.1, 0.2, 0.5, 0.7, 0.8):
        net.batches.clear()
        inside = 0.2 <= t <= 0.7
        torch.testing.assert_close(between(x, t), (always if inside else never)(x, t), rtol=1e-12, atol=1e-12)
        assert net.batches[0] == (4 if inside else 2)
    assert between.evaluations == 3 * 2 + 2

    denoise = make_denoiser(net, schedule, "flow", COND, NULL, cfg=3.0, cfg_interval=(0.2, 0.7))
    samplers["ddim"](denoise, x, sample_times(10, schedule), schedule)
    assert denoise.evaluations == 10 + 6  # 0.2, ..., 0.7


@pytest.mark.parametrize("objective", ["eps", "v", "flow", "x0"])
def test_guidance_rescale(objective):
    """Lin et al. 2024, eq. 15 and 16, of the network's output."""
    schedule, net, x, t = make_schedule("scaled_linear"), linear_net(0.3, 0.2), normal(2, 3, 4, 4), 0.4
    at = torch.tensor(t, dtype=F64)
    alpha, sigma = schedule.alpha(at), schedule.sigma(at)
    t_in = unet_time(schedule, at).expand(2)
    positive, negative = net(x, t_in, **COND), net(x, t_in, **NULL)
    guided = negative + 5 * (positive - negative)
    for phi in (0.0, 0.7, 1.0):
        got = make_denoiser(net, schedule, objective, COND, NULL, cfg=5.0, cfg_rescale=phi)(x, t)
        rescaled = torch.stack([g * p.std() / g.std() for g, p in zip(guided, positive)])
        expected = phi * rescaled + (1 - phi) * guided
        torch.testing.assert_close(got, to_x0(objective, expected, x, alpha, sigma), rtol=1e-6, atol=1e-6)
    silent = make_denoiser(lambda x, t, c: 0 * x, schedule, objective, COND, NULL, cfg=5.0, cfg_rescale=0.7)
    assert silent(x, t).isfinite().all(), "a fresh network that predicts 0"


@pytest.mark.parametrize("objective", ["eps", "v", "flow", "x0"])
def test_autoguidance(objective):
    """The guide may be of another objective and schedule; each denoiser counts all that it caused."""
    schedule, x, t = make_schedule("cosine"), normal(2, 3, 4, 4), 0.4
    net, weak = linear_net(0.3, 0.2), linear_net(0.1, 0.05)
    guide = make_denoiser(weak, make_schedule("linear"), "x0", COND)
    guided = make_denoiser(net, schedule, objective, COND, cfg=2.5, guide=guide)
    x0, x0_weak = make_denoiser(net, schedule, objective, COND)(x, t), guide(x, t)
    weak.batches.clear()
    net.batches.clear()
    torch.testing.assert_close(guided(x, t), x0_weak + 2.5 * (x0 - x0_weak), rtol=1e-7, atol=1e-7)
    assert (net.batches, weak.batches) == ([2], [2]) and guided.evaluations == 2

    twice = make_denoiser(weak, schedule, "v", COND, NULL, cfg=2.0)  # a guide that is guided itself
    outer = make_denoiser(net, schedule, objective, COND, cfg=2.5, cfg_interval=(0.3, 0.5), guide=twice)
    for t in (0.2, 0.4, 0.6):
        outer(x, t)
    assert outer.evaluations == 3 + 2
    plain = make_denoiser(net, schedule, objective, COND, cfg=2.5, guide=lambda x, t: 0 * x)
    torch.testing.assert_close(plain(x, 0.4), 2.5 * x0, rtol=1e-7, atol=1e-7)
    assert plain.evaluations == 2


def test_refused_guidance():
    def make(**settings):
        return make_denoiser(linear_net(1, 1), make_schedule("flow"), "v", COND, NULL, cfg=2.0, **settings)

    for interval in ((0.7, 0.2), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="cfg_interval=.* is no interval of t: choose 0 <= low < high <= 1"):
            make(cfg_interval=interval)
    for phi in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"cfg_rescale is .*: choose between 0 \(none\) and 1 \(all\)"):
            make(cfg_rescale=phi)
    with pytest.raises(ValueError, match="cfg=2.0 needs an empty condition"):
        make_denoiser(linear_net(1, 1), make_schedule("flow"), "v", COND, cfg=2.0)
