"""MagCache (Ma et al. 2025, arXiv:2506.09045): residuals shrink from step to step by ratios a model repeats.

The ratios of the residual's norm, measured once, are nearly the same for every prompt. Their product since
the last computed step says how wrong the size of a stale residual is; while the summed errors stay below a
threshold, the stack of blocks is its input and that residual. A table, so the schedule is one. For other
noise levels than the measured ones the logarithms of the ratios are integrated over log-SNR, one expert at a
time.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from chitu_diffusion.flex_cache._base import Course, FlexCache, Model, Sizes
from chitu_diffusion.flex_cache._calibration import MagCalibration, MagRatios
from chitu_diffusion.flex_cache._checks import check_number, check_whole
from chitu_diffusion.flex_cache._ratio import linear, whole
from chitu_diffusion.samplers._flow import log_snr
from chitu_diffusion.seam import Site

_SAME = 1e-3  # noise levels that differ by no more are the measured ones


@dataclass(frozen=True)
class Knobs:
    """`threshold` of the summed errors; at most `max_reuses` reused steps in a row; the first `retention` of
    an expert's steps are computed; `scales_residual` gives a stale residual the size that ratios predict."""

    threshold: float | None = None
    max_reuses: int | None = None
    retention: float | None = None
    scales_residual: bool = False

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0)
        check_whole("max_reuses", self.max_reuses, 0)
        check_number("retention", self.retention, 0, 1)


class Strategy(FlexCache):
    """Reuses the residual of the whole stack of blocks."""

    knobs_type = Knobs
    sites = frozenset({"blocks"})

    @classmethod
    def complete(cls, asked: Knobs, ratio: float, model: Model) -> Knobs:
        table = model.calibration.magcache
        if table is None or set(table.experts) != set(model.experts):
            remedy = "measure it by chitu bench flexcache --calibrate, or take easycache or meancache"
            raise ValueError(f"flexcache=magcache: {model.name} has no calibration for it; {remedy}")
        few, many = table.max_reuses
        low, high = table.thresholds
        return replace(
            asked,
            threshold=linear(ratio, 0, low, high) if asked.threshold is None else asked.threshold,
            max_reuses=whole(ratio, 0, few, many) if asked.max_reuses is None else asked.max_reuses,
            retention=table.retention if asked.retention is None else asked.retention,
        )

    @classmethod
    def footprint(cls, knobs: Knobs, sizes: Sizes) -> int:  # noqa: ARG003
        return sizes.branches * sizes.feature

    def remarks(self) -> list[str]:
        experts = _table(self.course).experts
        if all(is_measured(experts[name], sigmas) for name, sigmas in _levels(self.course).items()):
            return []
        count = sum(len(table.sigmas) for table in experts.values())
        here = len(self.course.steps)
        return [f"flexcache=magcache: ratios measured over {count} steps are interpolated to these {here}"]

    def prepare(self) -> None:
        experts = _table(self.course).experts
        tables = {name: ratios_at(experts[name], sigmas) for name, sigmas in _levels(self.course).items()}
        cond = list(itertools.chain.from_iterable((1.0, *tables[name].cond) for name in tables))
        uncond = list(itertools.chain.from_iterable((1.0, *tables[name].uncond) for name in tables))
        self._ratios = {"cond": cond, "uncond": uncond}
        self.fresh = schedule(self.course, cond, self.knobs)

    def restore(self, site: Site, x: Tensor) -> Tensor | None:
        change = self.kept.get((self.branch, site))
        if change is None or not self.knobs.scales_residual:
            return None if change is None else x + change
        first = last = self.step.index
        while not self.fresh[first]:
            first -= 1
        ratios = self._ratios["uncond" if self.branch == "uncond" else "cond"]
        return x.add(change, alpha=math.prod(ratios[first + 1 : last + 1]))


def _table(course: Course) -> MagCalibration:
    table = course.model.calibration.magcache
    assert table is not None, "seen when the request came"
    return table


def _levels(course: Course) -> dict[str, list[float]]:
    """The noise levels of each expert's steps, in the order of the run."""
    names = dict.fromkeys(step.expert for step in course.steps)
    return {name: [step.sigma for step in course.steps if step.expert == name] for name in names}


def is_measured(table: MagRatios, sigmas: Sequence[float]) -> bool:
    """Whether `table` was measured at these noise levels."""
    return len(table.sigmas) == len(sigmas) and all(
        abs(there - here) <= _SAME for there, here in zip(table.sigmas, sigmas, strict=True)
    )


def ratios_at(table: MagRatios, sigmas: Sequence[float]) -> MagRatios:
    """The ratios between other noise levels: differences of the integral of their logarithms over log-SNR.

    The integral is linear between measured levels, and goes on as straight beyond the last ones.
    """
    if is_measured(table, sigmas):
        return table
    knots, places = [log_snr(s) for s in table.sigmas], [log_snr(s) for s in sigmas]
    found = []
    for ratios in (table.cond, table.uncond):
        heights = list(itertools.accumulate(map(math.log, ratios), initial=0.0))
        there = [_interpolate(knots, heights, place) for place in places]
        found.append(tuple(math.exp(b - a) for a, b in itertools.pairwise(there)))
    return MagRatios(tuple(sigmas), *found)


def _interpolate(knots: Sequence[float], heights: Sequence[float], place: float) -> float:
    if len(knots) == 1:
        return heights[0]
    index = min(max(bisect.bisect_right(knots, place) - 1, 0), len(knots) - 2)
    share = (place - knots[index]) / (knots[index + 1] - knots[index])
    return heights[index] + share * (heights[index + 1] - heights[index])


def schedule(course: Course, ratios: Sequence[float], knobs: Knobs) -> tuple[bool, ...]:
    """Which steps are computed; `ratios` [N] from each step's predecessor, 1 at an expert's first step."""
    assert knobs.threshold is not None
    assert knobs.max_reuses is not None
    assert knobs.retention is not None
    experts = [step.expert for step in course.steps]
    fresh: list[bool] = []
    size, error, reuses = 1.0, 0.0, 0
    for index, ratio in enumerate(ratios):
        name = experts[index]
        retained = index - experts.index(name) < math.floor(knobs.retention * experts.count(name) + 0.5)
        size *= ratio
        error += abs(1 - size)
        is_reused = error < knobs.threshold and reuses < knobs.max_reuses
        is_fresh = course.is_forced(index) or retained or not is_reused
        fresh.append(is_fresh)
        size, error, reuses = (1.0, 0.0, 0) if is_fresh else (size, error, reuses + 1)
    return tuple(fresh)
