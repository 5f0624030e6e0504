"""Intervals on the device's own clock (the host's on a CPU): CUDA events, nothing waits on the hot path."""

import csv
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

logger = logging.getLogger(__name__)


class Span:
    """`with Span(device): ...` marks an interval; `milliseconds` is read later, once it has passed."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        count = 2 if self._stream else 0
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        self._times = [0.0, 0.0]

    def __enter__(self) -> Self:
        self._mark(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mark(1)

    def milliseconds(self) -> float:
        """Length of the interval; on a GPU this waits until the device has reached its end."""
        if not self._events:
            return (self._times[1] - self._times[0]) * 1000
        self._events[1].synchronize()
        elapsed: float = self._events[0].elapsed_time(self._events[1])
        return elapsed

    def _mark(self, end: int) -> None:
        if self._events:
            self._events[end].record(self._stream)
        else:
            self._times[end] = time.perf_counter()


@dataclass(frozen=True)
class TimerRow:
    """Statistics of one name, in milliseconds."""

    name: str
    min: float
    max: float
    mean: float
    samples: int


class Timer:
    """Named samples over a run, off unless enabled; the samples come from spans that are taken anyway."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._device = device
        self._enabled = enabled
        self._samples: dict[str, list[Span | float]] = {}

    def get_timer(self, name: str) -> Span:
        """A span to be entered with `with`; it is counted under `name` when the timer is enabled."""
        span = Span(self._device)
        if self._enabled:
            self._samples.setdefault(name, []).append(span)
        return span

    def span(self, name: str) -> AbstractContextManager[object]:
        """The same for what happens in every layer: where the timer is not enabled, nothing is marked."""
        return self.get_timer(name) if self._enabled else nullcontext()

    def record(self, name: str, milliseconds: float) -> None:
        """Count a duration that was measured elsewhere."""
        if self._enabled:
            self._samples.setdefault(name, []).append(milliseconds)

    def statistics(self) -> list[TimerRow]:
        """One row a name, in order of first use."""
        rows = []
        for name, samples in self._samples.items():
            times = [sample.milliseconds() if isinstance(sample, Span) else sample for sample in samples]
            rows.append(TimerRow(name, min(times), max(times), sum(times) / len(times), len(times)))
        return rows

    def print_statistics(self) -> None:
        """Log every row."""
        for row in self.statistics():
            logger.info("%-12s min %.1f ms, max %.1f ms, mean %.1f ms, %d samples", *row.__dict__.values())

    def save_statistics(self, path: Path) -> None:
        """Append the rows to a CSV file, with a header when the file is new."""
        now = datetime.now().isoformat(timespec="seconds")
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(["Timestamp", "Timer Name", "Min (ms)", "Max (ms)", "Avg (ms)", "Samples"])
            for row in self.statistics():
                writer.writerow(
                    [now, row.name, f"{row.min:.3f}", f"{row.max:.3f}", f"{row.mean:.3f}", row.samples]
                )

    def enable(self) -> None:
        """Count from now on."""
        self._enabled = True

    def disable(self) -> None:
        """Count no more; what was counted stays."""
        self._enabled = False

    def is_enabled(self) -> bool:
        """Whether samples are counted."""
        return self._enabled

    def reset(self) -> None:
        """Forget all samples."""
        self._samples.clear()
