"""SageAttention: int8 queries and keys, version 1 (pip) and version 2 (CUDA kernels, built from source).

Of version 1 only the quantisation is the package's: its kernel counts keys beyond the end, and `sageattn`
changes the caller's keys; ours (`_int8`) takes their place. Version 2 has values in fp8 or fp16, by GPU; its
wrapper is written from its source, and unverified until somebody runs it. Without a variant, 2 where present.
"""

import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from chitu_core.attention._base import LseAttention, Place

logger = logging.getLogger(__name__)

_HEAD_DIMS = {"1": (64, 128), "2": (64, 96, 128)}
_CUDA_KERNELS = (
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_qk_int8_pv_fp16_cuda",
)  # what only version 2 has
_INSTALL = {
    "1": "pip install 'chitu-diffusion[sage]'",
    "2": "build it from third_party/SageAttention (docs/attention.md), or use sage1",
}
_SLOWER = (
    "sage1 is slower than exact attention on this GPU: 12.6 ms (15.4 ms by the package's own kernel) against "
    "cuDNN's 11.3 ms at 32,760 tokens, 12 heads, H200; use infer.attn_type=auto, or build SageAttention 2"
)


class Backend(LseAttention):
    """One version of SageAttention; each call is a registered operator."""

    is_exact = False

    def __init__(self, variant: str, place: Place, **options: Any) -> None:
        self._version = variant or _best(place)
        super().__init__(f"sage{self._version}")
        if self._version == "1" and place.capability == (9, 0):
            logger.warning(_SLOWER)

    @classmethod
    def unavailable(cls, variant: str, place: Place) -> str | None:
        """See `Attention`."""
        if variant:
            return _unfit(variant, place) or _missing(variant)
        reasons = {version: _unfit(version, place) or _missing(version) for version in "21"}
        return None if None in reasons.values() else reasons["1"]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`."""
        return _attend_1(q, k, v)[0] if self._version == "1" else _attend_2(q, k, v)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `LseAttention`."""
        return _attend_1(q, k, v) if self._version == "1" else _attend_2_with_lse(q, k, v)


@torch.library.custom_op("chitu::sage1", mutates_args=())
def _attend_1(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE. Keys quantise better without their mean, and the softmax does not see it."""
    kernel = importlib.import_module("chitu_core.attention._int8")  # imports triton
    quantise = importlib.import_module("sageattention.quant_per_block").per_block_int8
    q = q.contiguous()
    k_mean = k.mean(1, keepdim=True)  # [B, 1, H, D]
    q_int8, q_scale, k_int8, k_scale = quantise(q, (k - k_mean).contiguous(), tensor_layout="NHD")
    return kernel.attend((q_int8, q_scale), (k_int8, k_scale), v, exact_q=q, k_mean=k_mean)


@torch.library.custom_op("chitu::sage2", mutates_args=())
def _attend_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _sage_2(q, k, v, return_lse=False).contiguous()


@torch.library.custom_op("chitu::sage2_lse", mutates_args=())
def _attend_2_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _sage_2(q, k, v, return_lse=True)
    return out.contiguous(), lse.float().contiguous()


@_attend_2.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_attend_1.register_fake
@_attend_2_with_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)


def _sage_2(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Any:
    """NOTE: version 2 reads K's mean and leaves K alone, unlike version 1, so K needs no clone."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    sageattn = importlib.import_module("sageattention").sageattn
    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=None, return_lse=return_lse)


def _missing(version: str) -> str | None:
    """Why the package, in this version, cannot be imported."""
    try:
        package = importlib.import_module("sageattention")
    except (ImportError, OSError) as error:  # OSError: a library of the package is not found
        return f"the package sageattention is not installed ({error}); {_INSTALL[version]}"
    is_second = any(name in vars(package) for name in _CUDA_KERNELS)
    if version == "2":
        return None if is_second else f"the installed sageattention is version 1; {_INSTALL['2']}"
    try:
        importlib.import_module("sageattention.quant_per_block")
        importlib.import_module("chitu_core.attention._int8")
    except ImportError as error:
        return f"sage1 needs sageattention 1.0.6 and triton ({error}); {_INSTALL['1']}"
    return None


def _unfit(version: str, place: Place) -> str | None:
    """Why a version is not for this place, whatever is installed."""
    if place.capability is None:
        return f"SageAttention needs an NVIDIA GPU, this is {place.device_type}; use sdpa"
    if place.capability < (8, 0):
        return f"SageAttention needs compute capability 8.0 or higher, this is {place}; use sdpa"
    if version == "2" and place.capability[0] in (10, 11):
        return f"SageAttention 2 has no kernels for {place}; use auto"
    if place.dtype not in (torch.float16, torch.bfloat16):
        return f"SageAttention takes float16 or bfloat16, this is {place}; use sdpa, or another infer.dtype"
    if place.head_dim not in _HEAD_DIMS[version]:
        legal = " or ".join(map(str, _HEAD_DIMS[version]))
        return f"SageAttention {version} takes head dim {legal}, this is {place}; use sdpa"
    return None


def _best(place: Place) -> str:
    return next(version for version in "21" if not (_unfit(version, place) or _missing(version)))
