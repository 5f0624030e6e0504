"""TeaCache (Liu et al. 2024, arXiv:2411.19108): the time modulation tells when the prediction changes.

A polynomial, fitted for a model, turns the relative change of the modulation into that of the prediction. The
estimates of reused steps add up; while the sum is below a threshold, the stack of blocks is its input and the
change that it made last. The modulation depends on the timesteps alone, so the whole schedule is made before
the first step. Beyond the authors' rule: where the fit says nothing, or after `max_reuses` in a row, a step
is computed, for their polynomials are negative outside the changes that they were fitted to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chitu_diffusion.flex_cache._base import Course, FlexCache, Model, Sizes, TimeSignal
from chitu_diffusion.flex_cache._calibration import TeaCalibration
from chitu_diffusion.flex_cache._checks import check_number, check_whole
from chitu_diffusion.flex_cache._ratio import linear

_LEAST = 1e-8  # a modulation smaller than this in the mean has no relative change


@dataclass(frozen=True)
class Knobs:
    """`threshold` of the summed estimates, above 0; at most `max_reuses` steps are reused in a row."""

    threshold: float | None = None
    max_reuses: int = 4

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0)
        check_whole("max_reuses", self.max_reuses, 0)


class Strategy(FlexCache):
    """Reuses the residual of the whole stack of blocks."""

    knobs_type = Knobs
    sites = frozenset({"blocks"})

    @classmethod
    def complete(cls, asked: Knobs, ratio: float, model: Model) -> Knobs:
        fits = model.calibration.teacache
        if fits is None or set(fits.experts) != set(model.experts):
            remedy = "fit one by chitu bench flexcache --calibrate, or take magcache, easycache or meancache"
            raise ValueError(f"flexcache=teacache: {model.name} has no calibration for it; {remedy}")
        threshold = linear(ratio, 0, *fits.thresholds) if asked.threshold is None else asked.threshold
        return replace(asked, threshold=threshold)

    @classmethod
    def footprint(cls, knobs: Knobs, sizes: Sizes) -> int:  # noqa: ARG003
        return sizes.branches * sizes.feature

    def remarks(self) -> list[str]:
        fits, steps, shift = _fits(self.course), len(self.course.steps), self.course.shift
        if (steps, shift) == (fits.steps, fits.shift):
            return []
        fitted = f"fitted at {fits.steps} steps and shift {fits.shift:g}"
        return [f"flexcache=teacache: {fitted}; this run has {steps} and {shift:g}"]

    def prepare(self) -> None:
        changes = changes_of(self.course, self.services.time_signal)
        agreed = self.services.agree(changes).tolist()  # the one host read
        self.fresh = schedule(self.course, agreed, self.knobs)


def _fits(course: Course) -> TeaCalibration:
    fits = course.model.calibration.teacache
    assert fits is not None, "seen when the request came"
    return fits


def changes_of(course: Course, time_signal: TimeSignal) -> Tensor:
    """Mean absolute change of the modulation from each step to the next over its mean size, [N] fp32.

    It is -1 where there is none: at an expert's first step, and after a modulation that is next to nothing.
    """
    found = []
    for expert in dict.fromkeys(step.expert for step in course.steps):
        signal = time_signal(expert, [step.timestep for step in course.steps if step.expert == expert])
        size = signal[:-1].abs().mean((1, 2))
        change = (signal[1:] - signal[:-1]).abs().mean((1, 2)) / size
        found += [change.new_full((1,), -1), torch.where(size < _LEAST, -1, change)]
    return torch.cat(found)


def schedule(course: Course, changes: Sequence[float], knobs: Knobs) -> tuple[bool, ...]:
    """Which steps are computed. `changes` as from `changes_of`."""
    assert knobs.threshold is not None
    fits, fresh, total, reuses = _fits(course), [], 0.0, 0
    for step, change in zip(course.steps, changes, strict=True):
        estimate = fits.experts[step.expert](change)  # None for a change of -1
        is_fresh = course.is_forced(step.index) or estimate is None or reuses >= knobs.max_reuses
        total += estimate or 0.0
        is_fresh = is_fresh or total >= knobs.threshold
        fresh.append(is_fresh)
        total, reuses = (0.0, 0) if is_fresh else (total, reuses + 1)
    return tuple(fresh)
