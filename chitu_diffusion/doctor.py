"""What this machine has and what would be chosen on it: `chitu doctor`."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import av
import torch

from chitu_core import __version__, attention
from chitu_core.attention import Place
from chitu_core.memory import GIB

_WAN_HEAD_DIM = 128
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "av", "triton")


@dataclass(frozen=True)
class Device:
    """One GPU, or the host."""

    name: str
    total_gib: float
    free_gib: float
    capability: str | None = None


@dataclass(frozen=True)
class AttentionState:
    """One attention backend on the first device; `missing` says why it cannot run."""

    name: str
    is_exact: bool
    gives_lse: bool
    missing: str | None


@dataclass(frozen=True)
class AutoRank:
    """One place of the table that `auto` goes through, for one compute capability."""

    capability: str
    name: str
    is_measured: bool
    source: str


@dataclass(frozen=True)
class Report:
    """Facts of a machine; `str` of it is what a person reads."""

    python: str
    packages: dict[str, str]
    devices: tuple[Device, ...]
    video_encoders: dict[str, bool]
    attention_place: str
    attention_auto: str
    cross_attention_auto: str
    attention: tuple[AttentionState, ...]
    attention_ranking: tuple[AutoRank, ...]

    def __str__(self) -> str:
        lines = [f"Python             {self.python}"]
        lines += [f"{name:<18} {version}" for name, version in self.packages.items()]
        lines += ["Devices"]
        for device in self.devices:
            capability = f", compute capability {device.capability}" if device.capability else ""
            free = f"{device.free_gib:.1f} of {device.total_gib:.1f} GiB free"
            lines.append(f"  {device.name}: {free}{capability}")
        lines += ["Video"]
        for name, is_there in self.video_encoders.items():
            lines.append(f"  {name}: {'present' if is_there else 'missing'}")
        return "\n".join([*lines, *self._attention_lines()])

    def _attention_lines(self) -> list[str]:
        lines = [f"Attention on {self.attention_place}"]
        lines += [f"  infer.attn_type=auto takes {self.attention_auto}, the first below that is present"]
        lines += [f"  infer.cross_attn_type=auto takes {self.cross_attention_auto}"]
        for state in self.attention:
            kind = f"{'exact' if state.is_exact else 'lossy'}{', gives LSE' if state.gives_lse else ''}"
            lines.append(
                f"  {state.name:<15} {'present' if state.missing is None else state.missing} ({kind})"
            )
        lines += ["What auto tries, fastest first"]
        for rank in self.attention_ranking:
            source = rank.source if rank.is_measured else f"unmeasured, {rank.source}"
            lines.append(f"  sm_{rank.capability:<4} {rank.name:<12} {source}")
        return lines


def report() -> Report:
    """Look at this machine. Tries a tiny attention per backend and loads no model."""
    place = _place()
    auto, cross = (
        attention.choose("auto", place, key=key, cross=is_cross)
        for key, is_cross in (("infer.attn_type", False), ("infer.cross_attn_type", True))
    )
    return Report(
        python=platform.python_version(),
        packages={"chitu-diffusion": __version__} | {name: _version(name) for name in _PACKAGES},
        devices=_devices(),
        video_encoders={"libx264 (H.264)": "libx264" in av.codecs_available},
        attention_place=str(place),
        attention_auto=auto,
        cross_attention_auto=cross,
        attention=tuple(_state(name, place) for name in attention.names()),
        attention_ranking=tuple(
            AutoRank("".join(map(str, capability)), rank.name, rank.is_measured, rank.source)
            for capability, ranks in attention.RANKING.items()
            for rank in ranks
        ),
    )


def _place() -> Place:
    """The first GPU with Wan's head dim in bfloat16, or the CPU in float32."""
    if not torch.cuda.is_available():
        return Place("cpu", None, torch.float32, _WAN_HEAD_DIM)
    return Place("cuda", torch.cuda.get_device_capability(0), torch.bfloat16, _WAN_HEAD_DIM)


def _state(name: str, place: Place) -> AttentionState:
    missing = attention.unavailable(name, place)
    return AttentionState(name, name not in attention.LOSSY, name in attention.GIVES_LSE, missing)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> tuple[Device, ...]:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page / GIB for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    found = [Device(f"host, {os.cpu_count()} cores", total, free)]
    for index in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = f"cuda:{index} {torch.cuda.get_device_name(index)}"
        found.append(Device(name, total_bytes / GIB, free_bytes / GIB, f"{major}.{minor}"))
    return tuple(found)
