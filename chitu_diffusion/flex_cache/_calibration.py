"""What was measured on one model for strategies that need it: polynomials of TeaCache, ratios of MagCache.

A YAML a model; those of the released models hold the authors' figures. `chitu bench flexcache --calibrate`
writes one for any other.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

PACKAGED = Path(__file__).parent / "calibrations"


@dataclass(frozen=True)
class TeaFit:
    """Change of one expert's prediction as a polynomial of the change of its time modulation."""

    coefficients: tuple[float, ...]  # highest power first
    lowest: float = 0.0  # changes that were seen; outside them nothing is known
    highest: float = math.inf

    def __call__(self, change: float) -> float | None:
        """The estimate; None where the fit says nothing, which a value of 0 or less means too."""
        if not self.lowest <= change <= self.highest:
            return None
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value if value > 0 else None


@dataclass(frozen=True)
class TeaCalibration:
    """TeaCache on one model."""

    steps: int  # of the runs that were fitted
    shift: float
    thresholds: tuple[float, float]  # at cache_ratio 0.5 and 1
    experts: Mapping[str, TeaFit]


@dataclass(frozen=True)
class MagRatios:
    """How the residual's norm of one expert changes from each of its steps to the next."""

    sigmas: tuple[float, ...]  # of its steps
    cond: tuple[float, ...]  # one fewer
    uncond: tuple[float, ...]


@dataclass(frozen=True)
class MagCalibration:
    """MagCache on one model."""

    thresholds: tuple[float, float]
    max_reuses: tuple[int, int]
    retention: float  # share of an expert's first steps that are computed
    experts: Mapping[str, MagRatios]


@dataclass(frozen=True)
class Calibration:
    """All that is known of one model."""

    source: str = "none"  # the file
    teacache: TeaCalibration | None = None
    magcache: MagCalibration | None = None


NOTHING = Calibration()


@dataclass(frozen=True)
class _Node:
    """A mapping of the file, whose complaints name the key."""

    path: Path
    key: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> "_Node":
        found = self._value(name)
        key = f"{self.key}{name}."
        if not isinstance(found, Mapping):
            raise ValueError(f"{self.path}: {key[:-1]} must be a mapping")
        return _Node(self.path, key, found)

    def numbers(self, name: str, count: int | None = None) -> tuple[float, ...]:
        found = self._value(name)
        is_list = isinstance(found, list) and all(map(_is_number, found))
        if not is_list or (count is not None and len(found) != count):
            many = "" if count is None else f"{count} "
            raise ValueError(
                f"{self.path}: {self.key}{name}={found!r} must be a list of {many}finite numbers"
            )
        return tuple(float(value) for value in found)

    def number(self, name: str) -> float:
        found = self._value(name)
        if not _is_number(found):
            raise ValueError(f"{self.path}: {self.key}{name}={found!r} must be a finite number")
        return float(found)

    def _value(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(f"{self.path}: {self.key}{name} is missing")
        return self.values[name]


def packaged(model: str) -> Calibration:
    """What ships for a model of this name; nothing where no file does."""
    path = PACKAGED / f"{model}.yaml"
    return read(path) if path.is_file() else NOTHING


def read(path: Path) -> Calibration:
    """The calibration of a file. Raises ValueError naming file and key where it is not one."""
    if not path.is_file():
        raise ValueError(f"{path}: no such calibration; write one with chitu bench flexcache --calibrate")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a mapping with teacache, magcache or both")
    root = _Node(path, "", {str(key): value for key, value in values.items()})
    return Calibration(
        str(path),
        _teacache(root.part("teacache")) if "teacache" in root.values else None,
        _magcache(root.part("magcache")) if "magcache" in root.values else None,
    )


def _teacache(node: _Node) -> TeaCalibration:
    experts = {}
    for name in node.part("experts").values:
        fit = node.part("experts").part(name)
        span = fit.numbers("range", 2) if fit.values.get("range") is not None else (0.0, math.inf)
        experts[name] = TeaFit(fit.numbers("coefficients"), *span)
    thresholds = node.numbers("thresholds", 2)
    return TeaCalibration(int(node.number("steps")), node.number("shift"), (*thresholds,), experts)  # type: ignore[arg-type]


def _magcache(node: _Node) -> MagCalibration:
    experts = {}
    for name in node.part("experts").values:
        part = node.part("experts").part(name)
        sigmas = part.numbers("sigmas")
        if any(after >= before for before, after in itertools.pairwise(sigmas)):
            raise ValueError(f"{node.path}: {part.key}sigmas must decrease")
        ratios = [part.numbers(branch, len(sigmas) - 1) for branch in ("cond", "uncond")]
        if any(ratio <= 0 for ratio in (*ratios[0], *ratios[1])):
            raise ValueError(f"{node.path}: {part.key[:-1]}: ratios must be above 0")
        experts[name] = MagRatios(sigmas, *ratios)
    low, high = node.numbers("thresholds", 2)
    few, many = node.numbers("max_reuses", 2)
    return MagCalibration((low, high), (int(few), int(many)), node.number("retention"), experts)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
