"""Euler's method on the flow ODE: follow the velocity in a straight line. Order 1, UniPC's grid."""

from torch import Tensor

from chitu_diffusion.samplers._flow import FlowSampler, spaced_sigmas, training_sigma_max


class Sampler(FlowSampler):
    """x + (sigma_next - sigma) v."""

    def __init__(self, steps: int, shift: float, num_train_timesteps: int = 1000) -> None:
        super().__init__(
            spaced_sigmas(training_sigma_max(num_train_timesteps), steps), shift, num_train_timesteps
        )

    def advance(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        return sample.add(velocity, alpha=self.sigmas[index + 1] - self.sigmas[index])
