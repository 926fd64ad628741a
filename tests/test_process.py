"""The diffusion process against exact answers for a Gaussian mixture, published tables, and diffusers' schedulers."""

import itertools
import math

import numpy as np
import pytest
import torch

from sample import (
    SCHEDULES,
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


# --- against diffusers ---


@pytest.fixture(scope="session")
def diffusers_schedulers():
    return pytest.importorskip("diffusers.schedulers")


BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def their_run(scheduler, steps, objective, x, schedule):
    """What diffusers' loop gives the mixture's network in turn, and draws in the end, from x of unit scale at first."""
    scheduler.set_timesteps(steps)
    first = (scheduler.timesteps[:1].double() + 1) / schedule.discrete
    if scheduler.init_noise_sigma != 1:  # their sample is x / alpha
        x = x / schedule.alpha(first).to(x.dtype)
    generators, seen = seeded(len(x)), []
    for index in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, index)
        t = (index.double() + 1) / schedule.discrete
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        seen.append(x_in)
        x0 = mixture_x0(x_in, alpha, sigma)
        prediction = target(objective, x0, (x_in - alpha * x0) / sigma, alpha, sigma).to(x.dtype)
        draw = {} if type(scheduler).__name__ in ("PNDMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler") else {"generator": generators}
        x = scheduler.step(prediction, index, x, **draw).prev_sample
    return seen, x


def test_x(diffusers_schedulers):
    schedule = make_schedule("scaled_linear")
    for name, ours, theirs, opts in [
        ("DDIMScheduler", "ddim", dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1), {}),
        ("DDIMScheduler", "ddim", dict(clip_sample=False, timestep_spacing="trailing"), {}),
        ("DDPMScheduler", "ddpm", dict(clip_sample=False, timestep_spacing="trailing"), {}),
        ("DDPMScheduler", "ddpm", dict(clip_sample=False, variance_type="fixed_large", timestep_spacing="trailing"), {"variance": "large"}),
        ("PNDMScheduler", "plms", dict(skip_prk_steps=True, steps_offset=1), {}),
        ("PNDMScheduler", "plms", dict(skip_prk_steps=True, timestep_spacing="trailing", set_alpha_to_one=True), {}),
        ("EulerDiscreteScheduler", "euler", dict(timestep_spacing="trailing"), {}),
        ("EulerDiscreteScheduler", "euler", dict(timestep_spacing="leading", steps_offset=1), {}),
        ("EulerAncestralDiscreteScheduler", "euler_a", dict(timestep_spacing="trailing"), {}),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", dict(timestep_spacing="trailing"), {}),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", dict(timestep_spacing="linspace"), {}),
        ("DPMSolverMultistepScheduler", "dpmpp_2m_sde", dict(timestep_spacing="trailing", algorithm_type="sde-dpmsolver++"), {}),
        ("UniPCMultistepScheduler", "unipc", dict(timestep_spacing="trailing"), {}),
        ("UniPCMultistepScheduler", "unipc", dict(timestep_spacing="trailing", solver_order=3), {"order": 3}),
        ("HeunDiscreteScheduler", "heun", dict(timestep_spacing="trailing"), {}),
    ]:
      for objective, steps in itertools.product(("eps", "v"), (10, 20, 50)):
        sch = getattr(diffusers_schedulers, name)(**BETAS, prediction_type={"eps": "epsilon", "v": "v_prediction"}[objective], **theirs)
        dtype = torch.float32
        x = normal(4, 2).to(dtype)
        seen, x_end = their_run(sch, steps, objective, x, schedule)
        ts = torch.unique(sch.timesteps.double()).flip(0)
        end = 1e-3 if theirs.get("steps_offset") and name in ("DDIMScheduler", "PNDMScheduler") else 0.0
        times = torch.cat([(ts + 1) / 1000, torch.tensor([end], dtype=F64)])
        mine = []
        x0 = samplers[ours](mixture_denoiser(schedule, mine), x, times, schedule, seeded(4), **opts)
        worst = max((a - b).norm().item() / b.norm().item() for a, b in zip([*mine, x0], [*seen, x_end]))
        print(name, theirs, objective, steps, len(mine), len(seen), f"{worst:.1e}")
