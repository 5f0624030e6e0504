"""How much memory a process held at most, and may still have, and whether an error means too little."""

import logging
import os
import resource
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

GIB = 2**30
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's own; the second is older
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


def free_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process may still have on the host: of the machine, and of its control groups.

    Memory that the kernel gives back on demand counts as free. `root` is where /proc and /sys are; without
    /proc/meminfo, as on macOS, all physical memory counts.
    """
    limits = [_available(root), *(limit for group in _groups(root) for limit in _left_in(group))]
    return max(0, min(limits))


def free_device_bytes(device: torch.device) -> int:
    """Bytes that this process may still have on a device; on a CPU those of the host.

    On a GPU: what the driver has free and torch holds unused, within the process's share of the device
    (`torch.cuda.set_per_process_memory_fraction`).
    """
    if device.type != "cuda":
        return free_host_bytes()
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free + reserved - allocated, share - allocated))


def _available(root: Path) -> int:
    file = root / "proc/meminfo"
    if not file.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":", 1) for line in file.read_text("utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024  # in kB, which are KiB


@dataclass(frozen=True)
class _Group:
    """Files of a control group: its limit, its use, and the key of `memory.stat` that can be given back."""

    folder: Path
    limit: str
    usage: str
    inactive: str


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def _groups(root: Path) -> Iterator[_Group]:
    """The control groups of this process that count memory, of version 1 or 2, the innermost first."""
    file = root / "proc/self/cgroup"
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, names = ("sys/fs/cgroup/memory", _V1) if controllers else ("sys/fs/cgroup", _V2)
        inner = Path(path.lstrip("/"))
        for part in (inner, *inner.parents):
            yield _Group(root / base / part, *names)


def _left_in(group: _Group) -> Iterator[int]:
    """What a group's limit leaves; nothing where it has none, or where a container does not show it."""
    limit, usage, stat = group.folder / group.limit, group.folder / group.usage, group.folder / "memory.stat"
    if not (limit.is_file() and usage.is_file()):
        return
    text = limit.read_text("utf-8").strip()
    if text == "max":
        return
    lines = stat.read_text("utf-8").splitlines() if stat.is_file() else []
    given_back = dict(line.split() for line in lines).get(group.inactive, "0")
    yield int(text) - int(usage.read_text("utf-8")) + int(given_back)


def grow_segments(env: MutableMapping[str, str] | None = None) -> None:
    """Have torch's allocator extend its segments, so that tensors of all sizes share them: fewer gaps.

    torch asks once, at the first use of a GPU: later there is a warning. What the user set of the allocator
    in `env`, by default the process's environment, stays as it is, and without a GPU nothing is done.
    """
    env = os.environ if env is None else env
    if not torch.cuda.is_available() or any(env.get(name) for name in _ALLOCATOR_VARIABLES):
        return
    name, setting = _ALLOCATOR_VARIABLES[0], "expandable_segments:True"
    if torch.cuda.is_initialized():
        problem = "a GPU was in use before the engine"
        logger.warning("%s; for fewer gaps in its memory, start with %s=%s", problem, name, setting)
        return
    env[name] = setting


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch's CPU allocator raises a plain RuntimeError, worded by platform
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST_WORDS)
