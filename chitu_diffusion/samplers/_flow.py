"""What all flow samplers share: the grid of noise levels, the count of steps and the sums of a step.

Flow matching: x = (1 - sigma) x0 + sigma noise; the model predicts v = noise - x0, so that x0 = x - sigma v.
Coefficients are Python floats, so a step works on any device and never waits for one. No stochastic solvers.
"""

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor


def shift_sigmas(sigmas: Sequence[float], shift: float) -> list[float]:
    """Move a flow schedule, values in [0, 1], towards high noise; shift 1.0 is the identity.

    Raises ValueError unless shift is a finite number > 0.
    Source: Esser et al. 2024 (arXiv:2403.03206), section 5.3.2.
    """
    divisor_at_1 = 1 + (shift - 1)  # not only `shift`: it rounds to 0 below 1e-16
    if not (math.isfinite(shift) and divisor_at_1 > 0):
        raise ValueError(
            f"models.sampler.sample_shift must be a finite number > 0, got {shift}; "
            "Wan uses 3 to 12, and 1 does not shift"
        )
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]


def spaced_sigmas(start: float, steps: int) -> list[float]:
    """`steps` evenly spaced values from `start` on towards 0, which is not one of them.

    Raises ValueError if steps < 1. Rounds as numpy.linspace does, which decides the integer timesteps.
    """
    if steps < 1:
        raise ValueError(f"num_inference_steps must be >= 1, got {steps}; Wan uses 40 to 50")
    spacing = -start / steps
    return [index * spacing + start for index in range(steps)]


def training_sigma_max(num_train_timesteps: int) -> float:
    """Highest noise level seen in training, 1 - 1/n rounded to fp32: where the official UniPC grid starts."""
    return round_to_fp32([1 - 1 / num_train_timesteps])[0]


def round_to_fp32(values: Sequence[float]) -> list[float]:
    """The nearest fp32 numbers, again as Python floats."""
    return array("f", values).tolist()


def log_snr(sigma: float) -> float:
    """lambda = ln((1 - sigma) / sigma), the time of the solvers; -inf at sigma 1 and +inf at sigma 0."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log(1 - sigma) - math.log(sigma)


def combine(first: tuple[float, Tensor], *others: tuple[float, Tensor]) -> Tensor:
    """Sum of factor * tensor in a new tensor, with one pass over the memory per term."""
    factor, tensor = first
    total = tensor * factor
    for factor, tensor in others:
        total.add_(tensor, alpha=factor)
    return total


class FlowSampler(ABC):
    """The noise levels of one run and the position in it; a subclass says how a sample moves to the next one.

    `timesteps` are N integers, floor(num_train_timesteps * sigma); `sigmas` are N fp32 values, then 0.
    Raises ValueError when the number of steps and the shift make no strictly decreasing grid.
    """

    def __init__(self, base_sigmas: Sequence[float], shift: float, num_train_timesteps: int) -> None:
        sigmas = shift_sigmas(base_sigmas, shift)
        self.timesteps = tuple(int(num_train_timesteps * sigma) for sigma in sigmas)
        self.sigmas = (*round_to_fp32(sigmas), 0.0)
        if any(after >= before for before, after in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError(
                f"models.sampler.sample_shift = {shift} with num_inference_steps = {len(sigmas)} makes noise "
                "levels that are equal in fp32; bring the shift closer to 1, or take fewer steps"
            )
        self._log_snrs = tuple(log_snr(sigma) for sigma in self.sigmas)
        self._index = 0

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """Move `sample` (fp32, any shape) to the next noise level, given the model's `velocity` at it.

        Counts its own steps, for a timestep may occur twice. Raises ValueError after the last step.
        """
        if self._index == len(self.timesteps):
            raise ValueError(f"this sampler has taken all its {self._index} steps; build one for each task")
        index, self._index = self._index, self._index + 1
        if self.sigmas[index + 1] == 0:  # every solver ends on the predicted x0, but some through infinities
            return self.predict_x0(index, velocity, sample)
        return self.advance(index, velocity, sample)

    def predict_x0(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """The clean sample that `velocity` points at from `sample` at noise level `index`."""
        return torch.sub(sample, velocity, alpha=self.sigmas[index])

    @abstractmethod
    def advance(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Move `sample` from noise level `index` to `index` + 1, which is above 0."""

    def interval(self, index: int) -> tuple[float, float, float]:
        """From noise level `index` to the next: factor of the sample, factor of x0, step in lambda."""
        sigma, sigma_next = self.sigmas[index : index + 2]
        step = self._log_snrs[index + 1] - self._log_snrs[index]
        return sigma_next / sigma, -(1 - sigma_next) * math.expm1(-step), step

    def extrapolate(self, index: int, sample: Tensor, x0: Tensor, x0_before: Tensor | None) -> Tensor:
        """Move `sample` to noise level `index` + 1 with a slope in lambda from `x0` and the one before it, or
        on `x0` alone if there is none: the step of DPM-Solver++(2M) and the predictor of UniPC, order 2."""
        ratio, factor, step = self.interval(index)
        if x0_before is None:
            return combine((ratio, sample), (factor, x0))
        step_before = self._log_snrs[index] - self._log_snrs[index - 1]  # inf after sigma 1: x0 alone
        slope = 0.5 * factor * step / step_before
        return combine((ratio, sample), (factor + slope, x0), (-slope, x0_before))
