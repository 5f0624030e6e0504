"""MeanCache: beyond the steps of a table the guided velocity is extrapolated along the trajectory.

What was known at the last computed steps, the latents around them and their velocities, gives the mean
velocity over an interval, and the difference to the instantaneous one gives the slope in sigma. Tables are
for 50 steps of Wan; other counts take the same relative positions. Both branches and their exchange are
saved. Source of tables and formula: reference/algorithms.md A.9.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from chitu_diffusion.flex_cache._base import Course, FlexCache, Model, Sizes
from chitu_diffusion.guidance import Prediction

CHAIN = 1  # order of a gap whose ends follow each other: nothing lies between
_TABLE_STEPS = 50
_MOST_RECORDS = 5


@dataclass(frozen=True)
class Table:
    """Computed steps of 50, and the order of the gap after each but the last: how many records it spans."""

    steps: tuple[int, ...]
    orders: tuple[int, ...]


TABLES = {
    30: Table(
        (*range(20), 24, 28, 32, 36, 40, 43, 45, 47, 48, 49),
        (*[CHAIN] * 19, *[1] * 5, *[5] * 3, CHAIN, CHAIN),
    ),
    25: Table(
        (*range(17), 24, 32, 40, 43, 45, 47, 48, 49), (*[CHAIN] * 16, *[1] * 3, *[5] * 3, CHAIN, CHAIN)
    ),
    17: Table((*range(9), 10, 17, 24, 31, 38, 45, 48, 49), (*[CHAIN] * 8, 2, *[1] * 5, 4, CHAIN)),
    10: Table((0, 1, 3, 7, 14, 21, 28, 35, 42, 49), (CHAIN, 2, *[1] * 6, 4)),
}
_UP_TO = ((0.5, 30), (0.7, 25), (0.9, 17), (1.0, 10))


@dataclass(frozen=True)
class Knobs:
    """`fresh_steps` of 50 are computed: 30, 25, 17 or 10; `use_jvp` false repeats the last velocity."""

    fresh_steps: int | None = None
    use_jvp: bool = True

    def __post_init__(self) -> None:
        if self.fresh_steps is not None and self.fresh_steps not in TABLES:
            raise ValueError(f"fresh_steps={self.fresh_steps!r}: choose one of {', '.join(map(str, TABLES))}")


@dataclass(frozen=True)
class _Record:
    """A computed step: latents before and after it, noise levels before and after, its velocity."""

    before: Tensor
    after: Tensor
    sigma: float
    sigma_next: float
    velocity: Tensor


class Strategy(FlexCache):
    """Reuses the guided velocity."""

    knobs_type = Knobs

    @classmethod
    def complete(cls, asked: Knobs, ratio: float, model: Model) -> Knobs:  # noqa: ARG003
        by_ratio = next(count for most, count in _UP_TO if ratio <= most)
        return replace(asked, fresh_steps=asked.fresh_steps or by_ratio)

    @classmethod
    def footprint(cls, knobs: Knobs, sizes: Sizes) -> int:  # noqa: ARG003
        return 3 * _MOST_RECORDS * sizes.latent

    def prepare(self) -> None:
        table = TABLES[self.knobs.fresh_steps]
        self.fresh, self._orders = schedule(self.course, table)
        self._records: list[_Record] = []

    def forget(self) -> None:
        super().forget()
        self._records.clear()

    def velocity(self, compute: Callable[[], Prediction], latent: Tensor) -> Tensor:  # noqa: ARG002
        is_reused = not self.fresh[self.step.index] and bool(self._records)
        self.note("velocity", is_reused=is_reused)
        return self._extrapolate() if is_reused else compute().guided

    def leave_step(self, before: Tensor, after: Tensor, velocity: Tensor) -> None:
        if not self.fresh[self.step.index]:
            return
        step = self.step
        self._records.append(_Record(before, after, step.sigma, step.sigma_next, velocity))
        del self._records[:-_MOST_RECORDS]
        self._account()

    def _account(self) -> None:
        tensors = itertools.chain.from_iterable(
            (one.before, one.after, one.velocity) for one in self._records
        )
        self.kept.clear()
        for tensor in tensors:  # neighbours share a latent, which counts once
            self.kept.put(id(tensor), tensor)

    def _extrapolate(self) -> Tensor:
        last = self._records[-1]
        order = min(self._orders[self.step.index], len(self._records))
        first = self._records[-order]
        span = last.sigma_next - first.sigma
        if not self.knobs.use_jvp:
            return last.velocity
        mean = (last.after - first.before) / span
        slope = (first.velocity - mean) / span
        return last.velocity - slope * (self.step.sigma_next - self.step.sigma)


def schedule(course: Course, table: Table) -> tuple[tuple[bool, ...], tuple[int, ...]]:
    """Which steps are computed, and the order that a reused one takes, for any number of steps.

    For other numbers than 50 the same share of steps is computed, at the table's relative positions. Forced
    steps are computed besides.
    """
    total = len(course.steps)
    places = _places(table.steps, total)
    fresh = tuple(step.index in places or course.is_forced(step.index) for step in course.steps)
    scale = (_TABLE_STEPS - 1) / max(total - 1, 1)
    return fresh, tuple(_order(table, step.index * scale) for step in course.steps)


def _places(steps: Sequence[int], total: int) -> list[int]:
    """The table's steps thinned or thickened to a run of `total`."""
    count = min(max(round(len(steps) * total / _TABLE_STEPS), 1), total)
    places: list[int] = []
    for number in range(count):
        low, share = divmod(number * (len(steps) - 1) / max(count - 1, 1), 1)
        at, after = steps[int(low)], steps[min(int(low) + 1, len(steps) - 1)]
        place = round((at + share * (after - at)) * (total - 1) / (_TABLE_STEPS - 1))
        places.append(max(place, places[-1] + 1) if places else place)
    return places


def _order(table: Table, place: float) -> int:
    """That of the gap of the table in which a place lies."""
    return table.orders[min(max(bisect.bisect_left(table.steps, place) - 1, 0), len(table.orders) - 1)]
