"""From what was observed to a calibration: the polynomial of TeaCache, the ratios of MagCache, thresholds.

The result is a YAML that `flex_cache/_calibration.py` reads. Source: reference/algorithms.md A.1 and A.2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from chitu_diffusion.bench._cache_trace import Observed
from chitu_diffusion.flex_cache._base import Course
from chitu_diffusion.flex_cache._calibration import (
    Calibration,
    MagCalibration,
    MagRatios,
    TeaCalibration,
    TeaFit,
)
from chitu_diffusion.flex_cache.strategy import magcache, teacache

HIGHEST_DEGREE = 4
POINTS_A_COEFFICIENT = 2  # fewer would be drawn through their noise
SHARES = (0.6, 0.35)  # of steps to compute, at cache_ratio 0.5 and 1
MAX_REUSES = (2, 4)  # in a row, of MagCache
RETENTION = 0.2
_THRESHOLDS = tuple(float(f"{value:.3g}") for value in np.geomspace(1e-4, 1e2, 601))
_BEYOND = 0.01  # of the range on both sides: another device rounds otherwise
_WIDTH = 110  # columns of the file


@dataclass(frozen=True)
class Chosen:
    """A calibration, and what to know of it: lines for the file and the console."""

    calibration: Calibration
    remarks: tuple[str, ...]


def calibrate(observed: Mapping[str, Observed], course: Course) -> Chosen:
    """Fit all experts that `course` uses; its forced steps are those for which thresholds are chosen.

    Points of the first `course.warmup` steps are left out of the fit: they are computed anyway, and there the
    residual changes far more than the modulation.

    Raises ValueError where a fit would have no point, with the remedy.
    """
    fits, remarks = {}, []
    for place, (name, one) in enumerate(observed.items()):
        skipped = max(course.warmup - 1, 0) if place == 0 else 0
        changes, residuals = one.signal_changes[skipped:], one.residual_changes[skipped:]
        if not changes:
            least = f"more than {skipped + 1} steps"
            raise ValueError(f"--steps={len(course.steps)}: expert {name} needs {least}; raise it")
        fits[name] = fit_changes(changes, residuals)
        degree, error = len(fits[name].coefficients) - 1, relative_error(fits[name], changes, residuals)
        remarks.append(
            f"teacache, {name}: degree {degree} over {len(changes)} steps, {error:.1%} off (rms, relative)"
        )
    tables = {name: MagRatios(one.sigmas, one.cond, one.uncond) for name, one in observed.items()}
    tea = TeaCalibration(len(course.steps), course.shift, (0.0, 0.0), fits)
    mag = MagCalibration((0.0, 0.0), MAX_REUSES, RETENTION, tables)
    model = replace(course.model, calibration=Calibration("these runs", tea, mag))
    course = replace(course, model=model)
    tea, of_tea = _tea_thresholds(course, tea, observed)
    mag, of_mag = _mag_thresholds(course, mag, observed)
    return Chosen(Calibration("these runs", tea, mag), (*remarks, of_tea, of_mag))


def fit_changes(changes: Sequence[float], residuals: Sequence[float]) -> TeaFit:
    """The least-squares polynomial of `residuals` on `changes`, relative errors weighing alike.

    Of the highest degree up to 4 that has two points a coefficient and stays above 0 between the lowest and
    the highest change. All residuals must be above 0.
    """
    x, y = np.asarray(changes, dtype=float), np.asarray(residuals, dtype=float)
    lowest, highest = (float(f"{v:.6g}") for v in (x.min() * (1 - _BEYOND), x.max() * (1 + _BEYOND)))
    count = len(np.unique(x))
    places = np.linspace(lowest, highest, 1001)
    for degree in range(min(HIGHEST_DEGREE, max(count // POINTS_A_COEFFICIENT - 1, 0)), -1, -1):
        fitted = np.polynomial.Polynomial.fit(x, y, degree, w=1 / y) if degree else None
        powers = [np.average(y, weights=1 / y**2)] if fitted is None else fitted.convert().coef
        coefficients = tuple(float(f"{value:.8e}") for value in reversed(powers))
        if min(np.polyval(coefficients, places)) > 0:
            break
    return TeaFit(coefficients, lowest, highest)


def relative_error(fit: TeaFit, changes: Sequence[float], residuals: Sequence[float]) -> float:
    """Root mean square of (estimate - residual) / residual."""
    found = np.polyval(fit.coefficients, changes) / np.asarray(residuals)
    return float(np.sqrt(np.mean((found - 1) ** 2)))


def choose_threshold(share: float, schedule: Callable[[float], Sequence[bool]]) -> tuple[float, int]:
    """The threshold under which the share of computed steps comes nearest, and how many those are.

    The smallest of several that come equally near.
    """
    counts = [(threshold, schedule(threshold)) for threshold in _THRESHOLDS]
    threshold, fresh = min(counts, key=lambda found: abs(sum(found[1]) - share * len(found[1])))
    return threshold, sum(fresh)


def _tea_thresholds(
    course: Course, tea: TeaCalibration, observed: Mapping[str, Observed]
) -> tuple[TeaCalibration, str]:
    changes = [change for one in observed.values() for change in (-1.0, *one.signal_changes)]
    found = [
        choose_threshold(share, lambda value: teacache.schedule(course, changes, teacache.Knobs(value)))
        for share in SHARES
    ]
    (low, few), (high, many) = found
    return replace(tea, thresholds=(low, high)), _said("teacache", few, many, course)


def _mag_thresholds(
    course: Course, mag: MagCalibration, observed: Mapping[str, Observed]
) -> tuple[MagCalibration, str]:
    ratios = [ratio for one in observed.values() for ratio in (1.0, *one.cond)]
    found = []
    for share, most in zip(SHARES, MAX_REUSES, strict=True):

        def schedule(value: float, most: int = most) -> Sequence[bool]:
            return magcache.schedule(course, ratios, magcache.Knobs(value, most, RETENTION))

        found.append(choose_threshold(share, schedule))
    (low, few), (high, many) = found
    return replace(mag, thresholds=(low, high)), _said("magcache", few, many, course)


def _said(name: str, few: int, many: int, course: Course) -> str:
    forced = f"warm-up {course.warmup}, cool-down {course.cooldown}"
    return (
        f"{name}: {few} and {many} of {len(course.steps)} steps computed at cache_ratio 0.5 and 1; {forced}"
    )


def yaml_of(chosen: Chosen, about: Sequence[str]) -> str:
    """The text of the file; `about` and the remarks stand on top of it."""
    tea, mag = chosen.calibration.teacache, chosen.calibration.magcache
    assert tea is not None
    assert mag is not None
    lines = [f"# {line}" for line in (*about, *chosen.remarks)]
    lines += ["teacache:", f"  steps: {tea.steps}", f"  shift: {tea.shift!r}"]
    lines += [f"  thresholds: {list(tea.thresholds)}  # at cache_ratio 0.5 and 1", "  experts:"]
    for name, fit in tea.experts.items():
        lines += [f"    {name}:", *_list("coefficients", [f"{value:.8e}" for value in fit.coefficients])]
        lines += _list("range", [f"{value:.6g}" for value in (fit.lowest, fit.highest)])
    lines += ["magcache:", f"  thresholds: {list(mag.thresholds)}  # at cache_ratio 0.5 and 1, as max_reuses"]
    lines += [f"  max_reuses: {list(mag.max_reuses)}", f"  retention: {mag.retention}", "  experts:"]
    for name, table in mag.experts.items():
        lines += [f"    {name}:", *_list("sigmas", [f"{value:.6f}" for value in table.sigmas])]
        lines += _list("cond", [f"{value:.5f}" for value in table.cond])
        lines += _list("uncond", [f"{value:.5f}" for value in table.uncond])
    return "\n".join(lines) + "\n"


def _list(key: str, words: Sequence[str]) -> list[str]:
    """A key and its list, wrapped."""
    lines, line = [], f"      {key}: ["
    for place, word in enumerate(words):
        last = place == len(words) - 1
        piece = word + ("]" if last else ",")
        if len(line) + len(piece) + 1 > _WIDTH:
            lines.append(line.rstrip())
            line = " " * 8
        line += piece + ("" if last else " ")
    return [*lines, line if words else f"{line}]"]
