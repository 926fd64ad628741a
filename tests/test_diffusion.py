"""The diffusion process by itself; test_samplers.py compares it with exact answers and with diffusers."""

import math

import numpy as np
import pytest
import torch
from conftest import fill

from diffusion import (
    OBJECTIVES,
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

SCHEDULES = ("linear", "scaled_linear", "cosine", "flow")
FINE = torch.linspace(0, 1, 4001, dtype=torch.float64)

# Data N(MEAN, STD^2): the denoiser and the flow that leads from noise to data are known in closed form.
MEAN, STD = torch.tensor([0.7, -0.3], dtype=torch.float64), torch.tensor([0.4, 1.5], dtype=torch.float64)


def gaussian_denoiser(schedule, mean=MEAN, std=STD):
    """E[x0 | x_t]."""

    def denoise(x, t):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        denoise.times.append(t.item())
        return (mean + gain * (x - alpha * mean)).to(x.dtype)

    denoise.times = []
    return denoise


def noisy(schedule, z, t=1.0, mean=MEAN, std=STD):
    """Where the probability flow that ends in the data point mean + std z stands at time t."""
    t = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return alpha * mean + (alpha**2 * std**2 + sigma**2).sqrt() * z


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- schedules ---


@pytest.mark.parametrize(
    "name, beta_start, beta_end, first, last",
    [
        ("scaled_linear", 0.00085, 0.012, 0.99915, 0.0046601),  # Stable Diffusion
        ("scaled_linear", 0.0015, 0.0195, 0.9985, 1.423e-4),  # LDM
        ("scaled_linear", 0.0015, 0.0155, 0.9985, 6.687e-4),
        ("linear", 1e-4, 0.02, 0.9999, 4.036e-5),  # DDPM
    ],
)
def test_tables_have_the_published_ends(name, beta_start, beta_end, first, last):
    schedule = make_schedule(name, beta_start, beta_end)
    for dtype in (torch.float32, torch.float64):
        first_got, last_got = schedule.alpha(torch.tensor([1 / 1000, 1], dtype=dtype)) ** 2
        assert first_got.item() == pytest.approx(first, rel=1e-6)
        assert last_got.item() == pytest.approx(last, rel=5e-4)


def test_table_entries_are_the_cumulative_product():
    schedule = make_schedule("linear", 1e-4, 0.02)
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(schedule.alpha(t) ** 2, alpha_bar, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 - alpha_bar, rtol=1e-10, atol=0)
    torch.testing.assert_close(unet_time(schedule, t), torch.arange(1000.0, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    schedule = make_schedule(name)
    alpha, sigma = schedule.alpha(FINE), schedule.sigma(FINE)
    assert alpha[0] == 1 and sigma[0] == 0, "t = 0 is data"
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    if schedule.discrete:
        assert 0 < alpha[-1] < 0.07
    else:
        assert alpha[-1] == 0 and sigma[-1] == 1
    if name != "flow":
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(FINE))
    for f in (schedule.alpha, schedule.sigma):  # float32, any shape, differences small against the value itself
        got = f(FINE.float().reshape(-1, 1, 1)[1:])
        assert got.dtype == torch.float32 and got.shape == (4000, 1, 1)
        torch.testing.assert_close(got.flatten().double()[:-1], f(FINE)[1:-1], rtol=1e-3, atol=0)


def test_unet_time():
    t = torch.tensor([0, 1e-4, 0.5, 1], dtype=torch.float64)
    assert unet_time(make_schedule("flow"), t).tolist() == pytest.approx([0, 0.1, 500, 1000])
    assert unet_time(make_schedule("linear"), t).tolist() == pytest.approx([0, 0, 499, 999])


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown schedule 'cosin': choose one of linear, scaled_linear, .*, flow"):
        make_schedule("cosin")
    one = torch.ones(1)
    for call in (
        lambda: target("epsilon", one, one, one, one),
        lambda: to_x0("epsilon", one, one, one, one),
        lambda: t_max("epsilon", make_schedule("flow")),
    ):
        with pytest.raises(ValueError, match="unknown objective 'epsilon': choose one of eps, v, x0, flow"):
            call()


# --- objectives ---


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_to_x0_inverts_target(objective, name):
    schedule = make_schedule(name)
    t = torch.linspace(0, t_max(objective, schedule), 9, dtype=torch.float64).view(-1, 1, 1, 1)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x0, eps = normal(9, 3, 4, 4), normal(9, 3, 4, 4, seed=1)
    prediction = target(objective, x0, eps, alpha, sigma)
    torch.testing.assert_close(to_x0(objective, prediction, alpha * x0 + sigma * eps, alpha, sigma), x0)


def test_t_max_stops_short_only_where_eps_is_blind():
    for objective in OBJECTIVES:
        for name in SCHEDULES:
            blind = objective == "eps" and name in ("cosine", "flow")
            assert t_max(objective, make_schedule(name)) == (0.995 if blind else 1.0)


# --- times ---


@pytest.mark.parametrize("name", SCHEDULES)
def test_sample_times(name):
    schedule = make_schedule(name)
    for steps in [*range(1, 201), 250, 333, 400, 499, 500, 501, 667, 998, 999, 1000]:
        times = sample_times(steps, schedule)
        assert times.shape == (steps + 1,) and times.dtype == torch.float64
        assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
        if schedule.discrete:
            assert (times == (times * 1000).round() / 1000).all(), "on the table's entries"
    with pytest.raises(ValueError, match="steps is 0"):
        sample_times(0, schedule)
    with pytest.raises(ValueError, match="steps is 5000: "):
        sample_times(5000, schedule)
    if schedule.discrete:
        with pytest.raises(ValueError, match="steps is 1001: .* only 1000 times"):
            sample_times(1001, schedule)
    assert sample_times(4, schedule, "eps")[0] == t_max("eps", schedule)


# --- samplers ---


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", samplers)
def test_any_number_of_steps(sampler, name):
    schedule = make_schedule(name)
    for steps in [*range(1, 21), 27, 36, 37, 50, *([1000] if name == "linear" else [])]:
        dtype = torch.float32 if steps % 2 else torch.float64
        denoise = gaussian_denoiser(schedule)
        x0 = samplers[sampler](denoise, normal(2, 2).to(dtype), sample_times(steps, schedule), schedule)
        assert x0.isfinite().all() and x0.shape == (2, 2) and x0.dtype == dtype
        assert (x0 - MEAN).abs().max() < 10
        twice = sampler == "plms" and steps > 1 and schedule.discrete  # its first step, but from alpha = 0
        assert len(denoise.times) == (2 * steps - 1 if sampler == "heun" else steps + 1 if twice else steps)
        assert min(denoise.times) > 0, "the network is never asked at t = 0"


@pytest.mark.parametrize("name", ["cosine", "flow", "scaled_linear"])
@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler, order, name):
    """Against the exact flow of Gaussian data, twice the steps leave 1/2 (first order) or 1/4 (second) of the error."""
    schedule = make_schedule(name)
    z = normal(64, 2)
    errors = []
    for steps in (100, 200, 400):
        times = sample_times(steps, schedule)
        if schedule.discrete:  # sigma ~ sqrt(t) near 0 would make the last of equal steps large: take equal ones in r
            t = FINE**3
            r = schedule.sigma(t) / (schedule.alpha(t) + schedule.sigma(t))
            times = torch.from_numpy(np.interp(r[-1] * torch.linspace(1, 0, steps + 1), r, t))
        x0 = samplers[sampler](gaussian_denoiser(schedule), noisy(schedule, z), times, schedule)
        errors.append((x0 - (MEAN + STD * z)).abs().max().item())
    low, high = {1: (1.9, 2.2), 2: (3, 5)}[order]
    assert low < errors[0] / errors[1] < high and low < errors[1] / errors[2] < high, errors


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_is_ddim(name):
    schedule = make_schedule(name)
    for steps in (1, 2, 9):
        args = gaussian_denoiser(schedule), normal(4, 2), sample_times(steps, schedule), schedule
        torch.testing.assert_close(samplers["euler"](*args), samplers["ddim"](*args), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_is_ddim_with_eta_1_and_draws_the_data_distribution(name):
    schedule = make_schedule(name)
    z, times = normal(8000, 2), sample_times(400, schedule)
    torch.manual_seed(0)
    ddpm = samplers["ddpm"](gaussian_denoiser(schedule), noisy(schedule, z), times, schedule)
    torch.manual_seed(0)
    ddim = samplers["ddim"](gaussian_denoiser(schedule), noisy(schedule, z), times, schedule, eta=1.0)
    torch.testing.assert_close(ddpm, ddim, rtol=1e-9, atol=1e-9)
    assert ((ddpm.mean(0) - MEAN).abs() < 0.05 * STD).all()
    assert ((ddpm.std(0) / STD - 1).abs() < 0.05).all()


def test_options_of_the_stochastic_samplers():
    schedule = make_schedule("cosine")
    args = gaussian_denoiser(schedule), normal(2000, 2), sample_times(20, schedule), schedule
    assert samplers["ddpm"](*args, noise_scale=0.5).std() < 0.9 * samplers["ddpm"](*args).std()
    assert not torch.equal(samplers["ddim"](*args, eta=0.5), samplers["ddim"](*args))
    with pytest.raises(ValueError, match="eta is 2"):
        samplers["ddim"](*args, eta=2)


# --- noise ---


def seeded(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_noise_of_an_image_is_its_own():
    many = randn((3, 4, 8, 8), seeded([5, 6, 7]))
    assert torch.equal(many[1:2], randn((1, 4, 8, 8), seeded([6])))
    assert torch.equal(many.bfloat16(), randn((3, 4, 8, 8), seeded([5, 6, 7]), dtype=torch.bfloat16))
    assert randn((2, 3), None, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        randn((3, 4), seeded([1, 2]))


@pytest.mark.parametrize("sampler, options", [("ddpm", {}), ("ddim", {"eta": 0.7})])
def test_an_image_does_not_depend_on_its_batch(sampler, options):
    schedule = make_schedule("flow")

    def draw(seeds):
        generators = seeded(seeds)
        x = randn((len(seeds), 2), generators, dtype=torch.float64)
        denoise = gaussian_denoiser(schedule)
        return samplers[sampler](denoise, x, sample_times(5, schedule), schedule, generators, **options)

    assert torch.equal(draw([1, 2, 3])[1:], draw([2, 3]))


# --- the network as a denoiser ---


class Net(torch.nn.Module):
    """Predicts something of everything it is given, and remembers its batches."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3, dtype=dtype))
        self.calls = []

    def forward(self, x, t, context=None, y=None):
        self.calls.append((len(x), t, x.dtype, None if context is None else context.dtype))
        out = self.weight * x + t.view(-1, 1, 1, 1).to(x.dtype) / 1000
        if context is not None:
            out = out + context.mean((1, 2)).view(-1, 1, 1, 1)
        return out if y is None else out + y.view(-1, 1, 1, 1)


COND = {"context": normal(2, 5, 6, seed=3), "y": torch.tensor([1, 2])}
NULL = {"context": torch.zeros(2, 5, 6, dtype=torch.float64), "y": torch.tensor([0, 0])}


@pytest.mark.parametrize("name", ["cosine", "scaled_linear"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_denoiser_and_guidance(objective, name):
    schedule, net, x, t = make_schedule(name), Net(), normal(2, 3, 4, 4), 0.6
    alpha, sigma = (f(torch.tensor(t, dtype=torch.float64)) for f in (schedule.alpha, schedule.sigma))
    conditional = make_denoiser(net, schedule, objective, COND)
    x0 = conditional(x, t)
    t_in = unet_time(schedule, torch.full((2,), t))
    predicted, predicted_null = net(x, t_in, **COND), net(x, t_in, **NULL)
    torch.testing.assert_close(x0, to_x0(objective, predicted, x, alpha, sigma))
    assert conditional.evaluations == 1 and not x0.requires_grad

    net.calls.clear()
    guided = make_denoiser(net, schedule, objective, COND, NULL, cfg=3.0)
    prediction = predicted_null + 3 * (predicted - predicted_null)  # guidance of the prediction is guidance of x0
    torch.testing.assert_close(guided(x, torch.tensor(t)), to_x0(objective, prediction, x, alpha, sigma))
    assert [call[0] for call in net.calls] == [4], "one batch of two"
    assert guided.evaluations == 2
    near = make_denoiser(net, schedule, objective, COND, NULL, cfg=1 + 1e-9)(x, t)
    torch.testing.assert_close(near, x0, msg="cfg = 1 is the condition alone")


def test_denoiser_runs_in_the_dtype_of_the_network():
    net, schedule = Net(torch.bfloat16), make_schedule("flow")
    denoise = make_denoiser(net, schedule, "flow", {"context": torch.zeros(2, 5, 6)})
    x0 = samplers["heun"](denoise, torch.randn(2, 3, 4, 4), sample_times(4, schedule, "flow"), schedule)
    assert x0.dtype == torch.float32 and denoise.evaluations == 7
    _, t, dtype, context_dtype = net.calls[0]
    assert dtype == context_dtype == torch.bfloat16
    assert t.dtype == torch.float32 and t.tolist() == [1000, 1000]


def test_denoiser_of_a_network_that_learns_its_uncertainty():
    """Which in training gives its log-variances beside what it predicts."""
    settings = dict(channels=8, channel_mult=(1,), num_res_blocks=1, attention_ds=(), num_heads=1, norm_groups=4)
    model, x = fill(Denoiser(UNet(**settings), uncertainty=True)), torch.randn(2, 4, 8, 8)
    outs = [make_denoiser(model.train(on), make_schedule("flow"), "flow", {})(x, 0.5) for on in (True, False)]
    assert torch.equal(*outs) and outs[0].shape == x.shape


@pytest.mark.parametrize("name", ("cosine", "flow"))
def test_eps_is_refused_where_it_tells_nothing(name):
    """Not of times that are made for another objective comes NaN, but what to do; of its own all is well."""
    schedule, x = make_schedule(name), normal(1, 1, 2, 2)
    denoise = make_denoiser(lambda x, t: 0.9 * x, schedule, "eps", {})
    with pytest.raises(ValueError, match=r"alpha is 0 at t = 1.0, .*: take sample_times\(.*, objective=.eps.\)"):
        samplers["euler"](denoise, x, sample_times(5, schedule), schedule)
    assert samplers["euler"](denoise, x, sample_times(5, schedule, "eps"), schedule).isfinite().all()


def test_denoiser_of_a_plain_function():
    schedule = make_schedule("linear")
    shift = make_denoiser(lambda x, t, shift: x + shift, schedule, "x0", {"shift": torch.ones(2, 1)})
    assert shift(torch.zeros(2, 1), 0.5).tolist() == [[1], [1]]
    denoise = make_denoiser(lambda x, t: t.view(-1, 1), schedule, "x0", {})
    assert denoise(torch.zeros(2, 1), 0.5).tolist() == [[499], [499]]
    with pytest.raises(ValueError, match="cfg=2 needs an empty condition"):
        make_denoiser(lambda x, t: x, schedule, "x0", {}, cfg=2)
    with pytest.raises(ValueError, match=r"cfg=2 needs an empty condition for \['context', 'y'\], got \['y'\]"):
        make_denoiser(Net(), schedule, "x0", COND, {"y": NULL["y"]}, cfg=2)


@pytest.mark.parametrize("sampler", samplers)
def test_one_step_from_pure_noise_gives_what_the_network_expects(sampler):
    for name in ("cosine", "flow"):
        schedule = make_schedule(name)
        x0 = samplers[sampler](gaussian_denoiser(schedule), normal(3, 2), sample_times(1, schedule), schedule)
        torch.testing.assert_close(x0, MEAN.expand(3, 2), rtol=0, atol=1e-12)
        assert math.isclose(schedule.alpha(torch.ones(1)).item(), 0)
