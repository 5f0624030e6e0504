"""FlashAttention, exact: version 2 (`flash_attn`), 3 (`flash_attn_interface`) and 4 (`flash_attn.cute`).

Without a variant, the newest version that is present and made for the GPU. Variants: 2, 3, 4.
"""

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from chitu_core.attention._base import LseAttention, Place

_MODULES = {"2": "flash_attn", "3": "flash_attn_interface", "4": "flash_attn.cute"}
_PACKAGES = {
    "2": "flash-attn 2 (pip install flash-attn --no-build-isolation; needs nvcc)",
    "3": "FlashAttention 3 (built from the folder hopper/ of its repository; needs nvcc)",
    "4": "flash-attn-4 (pip install 'chitu-diffusion[flash]')",
}
_CAPABILITIES = {"2": ((8, 0), (12, 9)), "3": ((9, 0), (9, 0)), "4": ((9, 0), (11, 9))}  # lowest and highest
_MAX_HEAD_DIM = {"2": 256, "3": 256, "4": 128}


class Backend(LseAttention):
    """One version of FlashAttention, called with dense [B, S, H, D]; each call is a registered operator."""

    def __init__(self, variant: str, place: Place, **options: Any) -> None:
        self._version = variant or _newest(place)
        super().__init__(f"fa{self._version}")
        _function(
            self._version
        )  # compile caches and package errors belong to the start, not to the first step

    @classmethod
    def unavailable(cls, variant: str, place: Place) -> str | None:
        """See `Attention`."""
        if variant:
            return _unfit(variant, place) or _missing(variant)
        reasons = {version: _unfit(version, place) or _missing(version) for version in "432"}
        if None in reasons.values():
            return None
        return "; ".join(f"version {version}: {reason}" for version, reason in reasons.items())

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`."""
        out, _ = _attend(q, k, v, self._version)
        return out

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `LseAttention`; every version computes the LSE anyway."""
        return _attend(q, k, v, self._version)


@torch.library.custom_op("chitu::flash_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, version: str) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, D] and LSE [B, H, S] fp32, natural log."""
    function = _function(version)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if version == "4":
        out, lse = function(q, k, v, return_lse=True)
    else:
        out, lse, *_ = function(q, k, v, return_attn_probs=True)
    return out, lse


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, version: str) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)


def _function(version: str) -> Any:
    if version == "4":  # its kernels take seconds to compile; keep them on disk between processes
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    return importlib.import_module(_MODULES[version]).flash_attn_func


def _missing(version: str) -> str | None:
    """Why the package of a version cannot be imported."""
    try:
        _function(version)
    except (ImportError, AttributeError, OSError) as error:  # OSError: a library of the package is not found
        return f"{_PACKAGES[version]} is not installed ({error})"
    return None


def _unfit(version: str, place: Place) -> str | None:
    """Why a version is not for this place, whatever is installed."""
    lowest, highest = _CAPABILITIES[version]
    if place.capability is None:
        return f"FlashAttention {version} needs an NVIDIA GPU, this is {place.device_type}; use sdpa"
    if not lowest <= place.capability <= highest:
        legal = "{}.{} to {}.{}".format(*lowest, *highest)
        return f"FlashAttention {version} is made for compute capability {legal}, this is {place}"
    if place.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention takes float16 or bfloat16, this is {place}; use sdpa, or another infer.dtype"
    if place.head_dim > _MAX_HEAD_DIM[version]:
        return f"FlashAttention {version} takes head dims up to {_MAX_HEAD_DIM[version]}, this is {place}"
    return None


def _newest(place: Place) -> str:
    return next(version for version in "432" if not (_unfit(version, place) or _missing(version)))
