"""Exact attention by torch SDPA: runs on any device, and is the reference for the other backends.

Without a variant torch picks the kernel; a variant names one: cudnn, flash, efficient or math.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from chitu_core.attention._base import LseAttention, Place

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Backend(LseAttention):
    """`scaled_dot_product_attention`, itself an operator that compilation keeps."""

    def __init__(self, variant: str = "", place: Place | None = None, **options: Any) -> None:
        super().__init__(f"sdpa_{variant}" if variant else "sdpa")
        self._kernel = variant

    @classmethod
    def unavailable(cls, variant: str, place: Place) -> str | None:
        """See `Attention`: a kernel is tried once on a few numbers, for torch alone knows its conditions."""
        if not variant:
            return None
        shape = (1, 64, 2, place.head_dim)
        q = torch.zeros(shape, device=place.device_type, dtype=place.dtype)
        try:
            with warnings.catch_warnings(
                action="ignore"
            ):  # torch warns of every kernel that it does not take
                _attend_with(q, q, q, variant)
        except RuntimeError:
            return f"torch {torch.__version__} has no {variant} attention for {place}; use sdpa"
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`."""
        if self._kernel:
            return _attend_with(q, k, v, self._kernel)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # SDPA wants heads before sequence
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `LseAttention`."""
        return _attend_with_lse(q, k, v, self._kernel)


@torch.library.custom_op("chitu::sdpa_kernel", mutates_args=())
def _attend_with(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    """SDPA by one kernel alone."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(KERNELS[kernel]):  # sets global flags, so it stays inside this operator
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@_attend_with.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("chitu::sdpa_lse", mutates_args=())
def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """SDPA and its log-sum-exp through the aten operators, which want contiguous [B, H, S, D]."""
    heads_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    kernel = kernel or _lse_kernel(q)
    if kernel == "cudnn":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, True)
    elif kernel == "flash" and q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)
    elif kernel == "flash":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
    elif kernel == "efficient":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*heads_first, None, True)
    else:
        out, lse = _plain_attention(*heads_first)
    lse = lse.reshape(*lse.shape[:2], -1)[..., : q.shape[1]]  # cuDNN adds an axis, efficient pads to 32
    return out.transpose(1, 2).contiguous(), lse.float().contiguous()


@_attend_with_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)


def _lse_kernel(q: Tensor) -> str:
    """The fastest kernel that gives an LSE for these inputs."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.is_cuda:
        return (
            ("cudnn" if torch.cuda.get_device_capability(q.device) >= (9, 0) else "flash")
            if half
            else "efficient"
        )
    return "flash" if q.dtype != torch.float64 else "math"


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by its formula, [B, H, S, D], scores in fp32 or better."""
    scale = q.shape[-1] ** -0.5
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.to(wide)).to(q.dtype), lse
