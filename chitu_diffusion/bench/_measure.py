"""One attention shape, and what each backend does at it: time, speed, error, memory.

The error is taken over the first queries alone, for the reference holds all their scores at once.
"""

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chitu_core import attention, memory
from chitu_core.attention import Attention, LseAttention, Place
from chitu_core.timing import Span

SEED = 0
WARM_UP = 2  # calls before the timed ones: they compile, and bring up the clocks
CHECKED_QUERIES = 256  # the error is taken over the first of them
_NUMBERS = "".join(f"{name:>11}" for name in ("ms", "min", "max"))
HEADER = f"{'backend':<16}{_NUMBERS}{'TFLOP/s':>10}{'error':>10}  exact LSE     GiB"
REFUSALS = (RuntimeError, ValueError, AssertionError)  # a package's own limits, and memory that ran out


@dataclass(frozen=True)
class Shape:
    """One attention of batch 1."""

    name: str
    heads: int
    head_dim: int
    num_queries: int
    num_keys: int

    def __str__(self) -> str:
        lengths = f"{self.num_queries:,} queries, {self.num_keys:,} keys"
        return f"{self.name}: {lengths}, {self.heads} heads of {self.head_dim}"

    @property
    def is_cross(self) -> bool:
        """Whether the keys are those of the text."""
        return self.name == "cross-attention"

    @property
    def flops(self) -> int:
        """Operations of the two matrix products."""
        return 4 * self.heads * self.num_queries * self.num_keys * self.head_dim


@dataclass(frozen=True)
class Measurement:
    """What one backend does at one shape; the error is relative L2 against attention in fp32."""

    median_ms: float
    min_ms: float
    max_ms: float
    tflops: float
    error: float
    extra_gib: float | None  # peak above the inputs; None on a CPU
    is_exact: bool
    gives_lse: bool

    def __str__(self) -> str:
        exact, lse = (("no", "yes")[flag] for flag in (self.is_exact, self.gives_lse))
        times = "".join(f"{time:>11.3f}" for time in (self.median_ms, self.min_ms, self.max_ms))
        extra = "" if self.extra_gib is None else f"{self.extra_gib:.2f}"
        return f"{times}{figures(self.tflops):>10}{self.error:>10.2g}  {exact:<6}{lse:<4}{extra:>7}"


@dataclass(frozen=True)
class Row:
    """One backend of a table: measured, or the reason why not."""

    name: str
    measured: Measurement | None
    reason: str | None


def figures(number: float) -> str:
    """Three figures, without an exponent for the large."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


class Bench:
    """One shape with its random inputs and the fp32 result, against which every backend is held."""

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int, sparsity_ratio: float
    ) -> None:
        self._shape, self._device, self._repeats, self._ratio = shape, device, repeats, sparsity_ratio
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        self._place = Place(device.type, capability, dtype, shape.head_dim)
        generator = torch.Generator(device).manual_seed(SEED)
        self._inputs = tuple(
            torch.randn(1, length, shape.heads, shape.head_dim, device=device, generator=generator).to(dtype)
            for length in (shape.num_queries, shape.num_keys, shape.num_keys)
        )  # q, k, v [B, S, H, D]
        self._expected = _formula(*self._inputs)

    def rows(self, names: Sequence[str]) -> tuple[Row, ...]:
        """Measure the named backends, `auto` among them; for cross-attention those alone that are exact."""
        key, is_cross = "--backends", self._shape.is_cross
        found = (
            attention.choose(n, self._place, key=key, cross=is_cross) if n == "auto" else n for n in names
        )
        unique = dict.fromkeys(found)
        return tuple(self._row(name) for name in unique if not (is_cross and name in attention.LOSSY))

    def _row(self, name: str) -> Row:
        """Measure one backend and print its line."""
        reason = attention.unavailable(name, self._place) or self._too_large(name)
        measured = None
        if reason is None:
            try:
                measured = self._measure(attention.create(name, self._place, sparsity_ratio=self._ratio))
            except REFUSALS as error:
                reason = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        sys.stdout.write(f"{name:<16}{measured or reason}\n")
        sys.stdout.flush()
        return Row(name, measured, reason)

    def _measure(self, backend: Attention) -> Measurement:
        memory.reset_peak(self._device)
        before = memory.peak(self._device).device_gib
        checked = backend(*self._inputs)[:, :CHECKED_QUERIES].float()
        after = memory.peak(self._device).device_gib
        for _ in range(WARM_UP - 1):
            backend(*self._inputs)
        spans = [Span(self._device) for _ in range(self._repeats)]
        for span in spans:  # nothing waits in between, so that a short kernel is not charged with its launch
            with span:
                backend(*self._inputs)
        times = [span.milliseconds() for span in spans]
        median = statistics.median(times)
        return Measurement(
            median_ms=median,
            min_ms=min(times),
            max_ms=max(times),
            tflops=self._shape.flops / median / 1e9,
            error=float((checked - self._expected).norm() / self._expected.norm()),
            extra_gib=None if before is None or after is None else round(after - before, 3),
            is_exact=backend.is_exact,
            gives_lse=isinstance(backend, LseAttention),
        )

    def _too_large(self, name: str) -> str | None:
        """Why the plain formula, which alone holds all scores at once, would not fit."""
        if name != "sdpa_math":
            return None
        scores = self._shape.heads * self._shape.num_queries * self._shape.num_keys
        needed = 3 * 4 * scores / memory.GIB  # in fp32: the scores, their softmax, and one copy
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self._device)[0] / memory.GIB
        else:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / memory.GIB
        return f"needs about {needed:.0f} GiB, {free:.0f} are free; lower --length" if needed > free else None


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by its formula in fp32, for the first queries alone: [B, CHECKED_QUERIES, H, D]."""
    q, k, v = (t.float().transpose(1, 2) for t in (q[:, :CHECKED_QUERIES], k, v))
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)
