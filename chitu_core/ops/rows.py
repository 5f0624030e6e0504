"""Row-wise operations of a transformer block, fused: operands are read once, results written once.

Every operation has an eager form, which runs anywhere and is the definition, and a Triton kernel
(`_kernels.py`) behind a registered operator that compilation keeps, taken for tensors on a GPU. `Rows` is
what a linear layer takes: a tensor, or fp8 values with a scale a row where the layer is quantised.
"""

import importlib
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # its largest value
AMAX_FLOOR = 1e-12  # a row of zeros gets a scale that divides
HAS_TRITON = importlib.util.find_spec("triton") is not None


class Quantised(NamedTuple):
    """Rows [..., d] as float8_e4m3fn, and what each is to be multiplied with, fp32 [rows, 1]."""

    values: Tensor
    scales: Tensor


Rows = Tensor | Quantised


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Rows:
    """Layer norm over the last axis of x [..., d] in fp32, times `weight` [d] plus `bias` [d], as `dtype`.

    Modulation by one row for all tokens is this too: weight 1 + scale, bias shift. `dtype` may be `FP8`.
    """
    if is_fused(x):
        return _rows(*torch.ops.chitu.layer_norm(x, weight, bias, eps, dtype))
    return _as(F.layer_norm(x, x.shape[-1:], weight, bias, eps), dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * y: a residual stream x [..., d] fp32, y of any dtype, one row of gates [d] or none."""
    if is_fused(x):
        return torch.ops.chitu.gate_residual(x, y, gate)
    return x + y if gate is None else torch.addcmul(x, y, gate)  # promotes to the dtype of x


def gate_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Rows]:
    """`gate_residual`, and `layer_norm` of its result: the stream stays on the chip between the two."""
    if is_fused(x):
        total, *normed = torch.ops.chitu.gate_residual_norm(x, y, gate, weight, bias, eps, dtype)
        return total, _rows(*normed)
    total = gate_residual(x, y, gate)
    return total, layer_norm(total, weight, bias, eps, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, computed in fp32, in the dtype of x."""
    if is_fused(x):
        return torch.ops.chitu.rms_norm(x, weight, eps)
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """q and k of packed projections [B, S, 3 d]: RMS norm over the whole width d, then rotary positions.

    Adjacent pairs of each head are rotated by `rope`, cosines and sines fp32 [S, 1, D / 2]. Returns q and k
    [B, S, H, D] in the dtype of `qkv`; statistics and rotation are fp32.
    """
    cos, sin = rope
    heads = (-1, 2 * cos.shape[-1])
    if is_fused(qkv):
        q, k = torch.ops.chitu.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, eps)
        return q.unflatten(-1, heads), k.unflatten(-1, heads)
    width = (q_weight.shape[0],)
    q, k, _ = qkv.float().chunk(3, dim=-1)
    normed = (F.rms_norm(x, width, weight, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    q, k = (rotate(x.unflatten(-1, heads), rope).to(qkv.dtype) for x in normed)
    return q, k


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the adjacent pairs of x [B, S, H, D] fp32 by the angles of `rope` ([S, 1, D / 2] each)."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh form) of a linear layer; on a GPU it is the epilogue of the matrix product."""
    if x.is_cuda:
        return torch.ops.chitu.linear_gelu(x, weight, bias)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def quantise(x: Tensor, gelu: bool = False) -> Quantised:
    """Rows of x [..., d] as fp8, each scaled by its largest absolute value; with `gelu`, GELU (tanh) of x."""
    if is_fused(x):
        return Quantised(*torch.ops.chitu.quantise(x, gelu))
    x = x.float()
    return quantise_rows(F.gelu(x, approximate="tanh") if gelu else x)


def quantise_rows(x: Tensor) -> Quantised:
    """The definition of `quantise`: row * 448 / max(|row|), to nearest even; scale max(|row|) / 448."""
    rows = x.float().reshape(-1, x.shape[-1])
    largest = rows.abs().amax(-1, keepdim=True).clamp_min(AMAX_FLOOR)
    values = (rows * (FP8_MAX / largest)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return Quantised(values.view(x.shape), largest / FP8_MAX)


def is_fused(x: Tensor) -> bool:
    """Whether an operation on x is its kernel; the eager form otherwise."""
    return HAS_TRITON and x.is_cuda


def _as(x: Tensor, dtype: torch.dtype) -> Rows:
    return quantise_rows(x) if dtype == FP8 else x.to(dtype)


def _rows(values: Tensor, scales: Tensor) -> Rows:
    return Quantised(values, scales) if values.dtype == FP8 else values


def _kernels() -> Any:
    """Imported at the first launch: Triton is not everywhere."""
    return importlib.import_module("chitu_core.ops._kernels")


def scales_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor stands for no scales: operators return tensors only."""
    return x.new_empty(x.numel() // x.shape[-1] if dtype == FP8 else 0, 1, dtype=torch.float32)


@torch.library.custom_op("chitu::layer_norm", mutates_args=(), device_types="cuda")
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _kernels().layer_norm(x, weight, bias, eps, dtype)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), scales_of(x, dtype)


@torch.library.custom_op("chitu::gate_residual", mutates_args=(), device_types="cuda")
def _gate_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return _kernels().gate_residual(x, y, gate)


@_gate_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("chitu::gate_residual_norm", mutates_args=(), device_types="cuda")
def _gate_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels().gate_residual_norm(x, y, gate, weight, bias, eps, dtype)


@_gate_residual_norm.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), scales_of(x, dtype)


@torch.library.custom_op("chitu::rms_norm", mutates_args=(), device_types="cuda")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _kernels().rms_norm(x, weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("chitu::qk_norm_rope", mutates_args=(), device_types="cuda")
def _qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _kernels().qk_norm_rope(qkv, q_weight, k_weight, cos, sin, eps)


@_qk_norm_rope.register_fake
def _(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    shape = (*qkv.shape[:-1], qkv.shape[-1] // 3)
    return qkv.new_empty(shape), qkv.new_empty(shape)


@torch.library.custom_op("chitu::linear_gelu", mutates_args=(), device_types="cuda")
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    flat = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return flat.view(*x.shape[:-1], -1)


@_linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("chitu::quantise", mutates_args=(), device_types="cuda")
def _quantise(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return _kernels().quantise(x, gelu)


@_quantise.register_fake
def _(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), scales_of(x, FP8)
