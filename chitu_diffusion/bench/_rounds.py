"""Several sides of one computation in turn: A B C A B C, each with all its rounds."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from chitu_core import memory
from chitu_diffusion.bench._work import WARM_UP, first_call, held_gib, timed


@dataclass(frozen=True)
class Side:
    """One competitor: what it is called, its first call, which may compile, and any other call."""

    name: str
    overrides: tuple[str, ...] | None  # of ours; None for the peer
    first: Callable[[], object] | float  # or its seconds, where it is over
    call: Callable[[], object]
    held_gib: float | None  # weights and inputs; None on a CPU
    error: float | None = None  # relative L2 against the first of ours
    error_against: float | None = None  # relative L2 against ours under the overrides of --error-against


@dataclass(frozen=True)
class SideResult:
    """What came out for one side; times in milliseconds, `ratio` of the median to that of the first side."""

    name: str
    overrides: tuple[str, ...] | None
    first_s: float
    rounds_ms: tuple[tuple[float, ...], ...]  # every call of every round
    round_medians_ms: tuple[float, ...]
    median_ms: float  # of the medians of the rounds
    ratio: float
    held_gib: float | None
    peak_gib: float | None  # as if the other sides were not there
    error: float | None
    error_against: float | None


@torch.inference_mode()
def run_rounds(
    sides: Sequence[Side], device: torch.device, rounds: int, calls: int, *, by_host: bool
) -> tuple[SideResult, ...]:
    """Call each side once, and once more, then in every round `calls` times, side after side.

    `by_host`: by the host's clock until the device is done, where a call works on the host too.
    """
    firsts = []
    for side in sides:
        firsts.append(side.first if isinstance(side.first, float) else first_call(side.first, device))
        for _ in range(0 if by_host else WARM_UP):
            side.call()
    turns: list[list[_Turn]] = [[] for _ in sides]
    for _ in range(rounds):
        for own, side in zip(turns, sides, strict=True):
            own.append(_turn(side, device, calls, by_host=by_host))
    base = _median(turns[0])
    found = zip(sides, firsts, turns, strict=True)
    return tuple(_result(side, first_s, own, base) for side, first_s, own in found)


@dataclass(frozen=True)
class _Turn:
    """One side's part of one round."""

    times_ms: tuple[float, ...]
    peak_gib: float | None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)


def _turn(side: Side, device: torch.device, calls: int, *, by_host: bool) -> _Turn:
    memory.reset_peak(device)
    before = held_gib(device)
    if by_host:
        times = [first_call(side.call, device) * 1000 for _ in range(calls)]
    else:
        times = timed(side.call, device, calls)
    after, peak = memory.peak(device).device_gib, None
    if before is not None and after is not None and side.held_gib is not None:
        peak = round(after - before + side.held_gib, 3)
    return _Turn(tuple(times), peak)


def _result(side: Side, first_s: float, turns: Sequence[_Turn], base: float) -> SideResult:
    return SideResult(
        name=side.name,
        overrides=side.overrides,
        first_s=first_s,
        rounds_ms=tuple(turn.times_ms for turn in turns),
        round_medians_ms=tuple(turn.median_ms for turn in turns),
        median_ms=_median(turns),
        ratio=_median(turns) / base,
        held_gib=side.held_gib,
        peak_gib=max((turn.peak_gib for turn in turns if turn.peak_gib is not None), default=None),
        error=side.error,
        error_against=side.error_against,
    )


def _median(turns: Sequence[_Turn]) -> float:
    return statistics.median(turn.median_ms for turn in turns)
