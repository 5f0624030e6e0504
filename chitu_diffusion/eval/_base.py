"""What a metric is: a file of this folder with a `class Metric` that has the shape of `MetricProtocol`.

A metric scores pairs on whatever rank it is given them, and combines all scores on rank 0. What is said
between the two is JSON. Reading frames, means and distances are in files of their own."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Unavailable(Exception):
    """Something that a metric needs is not there; the message names it and the remedy."""


class UnfitPair(Exception):
    """Two videos that this metric cannot compare."""


class UnreadableVideo(Exception):
    """A file that holds no whole video."""


@dataclass(frozen=True)
class Pair:
    """A generated video and what it is compared with; None where a metric needs no reference."""

    generated: Path
    reference: Path | None = None
    matched_by: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class EvalOptions:
    """What metrics are told: `device` as torch writes it, such as cuda:0."""

    device: str
    weights_dir: str | None = None
    vbench_python: str | None = None


@dataclass(frozen=True)
class Measured:
    """What one pair gave: `value`, as JSON can hold it, or the reason why there is none."""

    name: str  # of the generated video's file
    value: dict[str, Any] | None = None
    reason: str = ""
    is_broken: bool = False


@dataclass(frozen=True)
class Outcome:
    """The result of a metric, what to know about it, and files to write beside it, by the end of a name."""

    result: dict[str, Any]
    note: str = ""
    attachments: dict[str, Any] = field(default_factory=dict)


class MetricProtocol(Protocol):
    """One metric. The constructor takes `EvalOptions` and raises Unavailable, naming the remedy."""

    needs_reference: bool

    def measure(self, pairs: Sequence[Pair]) -> list[Measured]:
        """One entry a pair, in their order."""
        ...

    def combine(self, measured: Sequence[Measured]) -> Outcome:
        """The result of all pairs of all ranks, each with a value, in order. Raises Unavailable if they are
        too few."""
        ...


def require(module: str, package: str, why: str = "") -> Any:
    """Import an optional package. Raises Unavailable naming it and the extra that installs it.

    NOTE: a binary package that does not fit this torch raises RuntimeError or OSError, not ImportError."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = f"pip install 'chitu-diffusion[eval]', or {package} alone"
        raise Unavailable(f"{package} cannot be imported ({first}); {remedy}{why}") from error
