"""UniPC for flow matching, Wan's default: predict the next sample, and correct it once its velocity is known.

Order 2 with B(h) = exp(-h) - 1 ("bh2") in the x0 form (Zhao et al. 2023, arXiv:2302.04867). One model call a
step: the x0 predicted at the uncorrected sample serves both. The first and last step are of order 1.
"""

import math

from torch import Tensor

from chitu_diffusion.samplers._flow import FlowSampler, combine, spaced_sigmas, training_sigma_max


class Sampler(FlowSampler):
    """Keeps the last two x0 predictions and the last corrected sample."""

    def __init__(self, steps: int, shift: float, num_train_timesteps: int = 1000) -> None:
        super().__init__(
            spaced_sigmas(training_sigma_max(num_train_timesteps), steps), shift, num_train_timesteps
        )
        self._x0s: tuple[Tensor, ...] = ()  # predictions of the steps before, the newest first
        self._corrected: Tensor | None = None

    def advance(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        x0 = self.predict_x0(index, velocity, sample)
        corrected = self._correct(index, x0, sample)
        predicted = self.extrapolate(index, corrected, x0, self._x0s[0] if self._x0s else None)
        self._x0s, self._corrected = (x0, *self._x0s[:1]), corrected
        return predicted

    def _correct(self, index: int, x0: Tensor, sample: Tensor) -> Tensor:
        """The sample at noise level `index` once more: the step before with the slope that `x0` reveals."""
        if self._corrected is None:
            return sample.clone()  # kept for the next step, by when the caller may have overwritten it
        ratio, factor, step = self.interval(index - 1)
        kept = (ratio, self._corrected)
        if len(self._x0s) == 1:
            return combine(kept, (0.5 * factor, self._x0s[0]), (0.5 * factor, x0))
        newest, oldest = self._x0s
        # the two weights solve [[1, 1], [r, 1]] rho = b; the first one weighs (oldest - newest) / r
        r = (self._log_snrs[index - 2] - self._log_snrs[index - 1]) / step
        phi = math.expm1(-step)
        phi_1 = phi / -step - 1
        phi_2 = phi_1 / -step - 0.5
        b_1, b_2 = phi_1 / phi, 2 * phi_2 / phi
        rho_old = (b_1 - b_2) / (1 - r)
        rho_new = b_1 - rho_old
        old = rho_old / r
        return combine(
            kept, (factor * (1 - old - rho_new), newest), (factor * old, oldest), (factor * rho_new, x0)
        )
