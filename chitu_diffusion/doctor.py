"""What this machine has and what would be chosen on it: `chitu doctor`."""

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass

import av
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from chitu_core import __version__, attention, plugins
from chitu_core.memory import GIB

_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_OTHER_KERNELS = {
    "flash_attn": "flash-attn or flash-attn-4",
    "sageattention": "sageattention",
    "spas_sage_attn": "spas_sage_attn",
}


@dataclass(frozen=True)
class Device:
    """One GPU, or the host."""

    name: str
    total_gib: float
    free_gib: float
    capability: str | None = None


@dataclass(frozen=True)
class Report:
    """Facts of a machine; `str` of it is what a person reads."""

    python: str
    packages: dict[str, str]
    devices: tuple[Device, ...]
    video_encoders: dict[str, bool]
    attention_backends: tuple[str, ...]
    attention_auto: str
    sdpa_kernels: dict[str, str]  # on the first device: "runs", or why not
    other_attention: dict[str, str]

    def __str__(self) -> str:
        lines = [f"Python             {self.python}"]
        lines += [f"{name:<18} {version}" for name, version in self.packages.items()]
        lines += ["Devices"]
        for device in self.devices:
            capability = f", compute capability {device.capability}" if device.capability else ""
            free = f"{device.free_gib:.1f} of {device.total_gib:.1f} GiB free"
            lines.append(f"  {device.name}: {free}{capability}")
        lines += ["Video"]
        lines += [
            f"  {name}: {'present' if is_there else 'missing'}"
            for name, is_there in self.video_encoders.items()
        ]
        lines += ["Attention"]
        lines += [
            f"  infer.attn_type=auto takes {self.attention_auto}, exact on every device, the only one so far"
        ]
        lines += [f"  backend {name}: present" for name in self.attention_backends]
        lines += [f"    its kernel {name}: {state}" for name, state in self.sdpa_kernels.items()]
        lines += [f"  package {name}: {state}" for name, state in self.other_attention.items()]
        return "\n".join(lines)


def report() -> Report:
    """Look at this machine. Runs one tiny attention per SDPA kernel and loads no model."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "av", "triton")
    return Report(
        python=platform.python_version(),
        packages={"chitu-diffusion": __version__} | {name: _version(name) for name in packages},
        devices=_devices(),
        video_encoders={"libx264 (H.264)": "libx264" in av.codecs_available},
        attention_backends=tuple(plugins.names("chitu_core.attention")),
        attention_auto=attention.AUTO,
        sdpa_kernels={name: _kernel_state(kernel) for name, kernel in _KERNELS.items()},
        other_attention={name: _package_state(name, package) for name, package in _OTHER_KERNELS.items()},
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> tuple[Device, ...]:
    page, unit = os.sysconf("SC_PAGE_SIZE"), GIB
    total, free = (os.sysconf(name) * page / unit for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    found = [Device(f"host, {os.cpu_count()} cores", total, free)]
    for index in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = f"cuda:{index} {torch.cuda.get_device_name(index)}"
        found.append(Device(name, total_bytes / GIB, free_bytes / GIB, f"{major}.{minor}"))
    return tuple(found)


def _kernel_state(kernel: SDPBackend) -> str:
    """Whether SDPA runs with this kernel alone, at head dim 128, on the first device."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    q = torch.zeros(1, 2, 64, 128, device=device, dtype=dtype)
    try:
        with sdpa_kernel(kernel):
            scaled_dot_product_attention(q, q, q)
    except RuntimeError:
        return f"does not run on {device} in {str(dtype).removeprefix('torch.')}"
    return f"runs on {device}"


def _package_state(module: str, package: str) -> str:
    is_there = importlib.util.find_spec(module) is not None
    return f"{'installed' if is_there else f'not installed ({package})'}; this version has no backend for it"
