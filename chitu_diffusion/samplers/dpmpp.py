"""DPM-Solver++(2M) for flow matching: multistep, order 2, in the x0 form (Lu et al. 2022, arXiv:2211.01095).

Midpoint variant on the official Wan grid, which starts at sigma 1. The first and last step are of order 1.
"""

from torch import Tensor

from chitu_diffusion.samplers._flow import FlowSampler, spaced_sigmas


class Sampler(FlowSampler):
    """Keeps the x0 prediction of the step before."""

    def __init__(self, steps: int, shift: float, num_train_timesteps: int = 1000) -> None:
        super().__init__(spaced_sigmas(1.0, steps), shift, num_train_timesteps)
        self._x0_before: Tensor | None = None

    def advance(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        x0, x0_before = self.predict_x0(index, velocity, sample), self._x0_before
        self._x0_before = x0
        return self.extrapolate(index, sample, x0, x0_before)
