"""The samplers against the schedulers of diffusers, which take our noise levels."""

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

SCHEDULES = [(1, 5.0), (2, 3.0), (3, 1.0), (5, 3.0), (20, 5.0), (40, 12.0), (50, 5.0), (100, 12.0)]


def build(name: str, steps: int, shift: float):
    return importlib.import_module(f"chitu_diffusion.samplers.{name}").Sampler(steps, shift)


def reference(name: str, sigmas: tuple[float, ...]):
    """The scheduler of diffusers on our noise levels, counting its steps, for a timestep may occur twice."""
    steps = len(sigmas) - 1
    if name == "unipc":
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
        )
        scheduler.set_timesteps(sigmas=np.array(sigmas[:-1]))
    elif name == "dpmpp":
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(steps)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=list(sigmas[:-1]))
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.set_begin_index(0)
    return scheduler


def random_field(seed: int, size: int) -> Callable[[Tensor, float], Tensor]:
    """A smooth velocity field that depends on sample and noise level."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator) / size**0.5
    offset, slope = torch.randn(2, size, generator=generator)
    return lambda x, sigma: torch.tanh(x @ weight + offset + sigma * slope) + 0.5 * x


@pytest.mark.parametrize("name", ["unipc", "dpmpp", "euler"])
@pytest.mark.parametrize(("steps", "shift"), SCHEDULES)
def test_trajectory_equals_that_of_diffusers_on_the_same_noise_levels(name, steps, shift):
    sampler, velocity = build(name, steps, shift), random_field(steps, 32)
    scheduler = reference(name, sampler.sigmas)
    generator = torch.Generator().manual_seed(1)
    ours = theirs = torch.randn(4, 32, generator=generator)
    for sigma, timestep in zip(sampler.sigmas[:-1], scheduler.timesteps, strict=True):
        noise = torch.randn(4, 32, generator=generator)  # makes the terms of second order large
        ours = sampler.step(velocity(ours, sigma) + noise, ours)
        theirs = scheduler.step(velocity(theirs, sigma) + noise, timestep, theirs, return_dict=False)[0]
        # fp32 on both sides; diffusers also takes its logarithms in fp32
        assert ((ours - theirs).norm() / theirs.norm()).item() <= 2e-6


@pytest.mark.parametrize(("steps", "shift"), SCHEDULES)
def test_grid_of_unipc_is_the_flow_grid_of_dpm_solver_in_diffusers(steps, shift):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    sigmas = build("unipc", steps, shift).sigmas
    assert sigmas == pytest.approx(scheduler.sigmas.tolist(), abs=1e-7)  # fp32 near 1
