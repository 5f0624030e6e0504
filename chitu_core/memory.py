"""How much memory a process holds, at most and now, and whether an error means that there was too little."""

import resource
import sys
from dataclasses import dataclass

import torch

GIB = 2**30
_HOST_WORDS = ("not enough memory", "can't allocate memory")


@dataclass(frozen=True)
class MemoryPeak:
    """Peaks in GiB: of the process on the host since its start, of the device since `reset_peak`."""

    host_gib: float
    device_gib: float | None


def reset_peak(device: torch.device) -> None:
    """Start a new device peak; the host's peak is the process's own and cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> MemoryPeak:
    """The peaks so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts KiB on Linux
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    on_device = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    return MemoryPeak(round(host, 3), None if on_device is None else round(on_device, 3))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch's CPU allocator raises a plain RuntimeError, worded by platform
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST_WORDS)
