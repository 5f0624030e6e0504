"""The Triton kernels of the fused operations, and the functions that launch them.

All of them work row by row, one program a row, with the row in registers: what leaves the chip is read once
and written once. Statistics, rotation and gates are fp32. Imported only where Triton is there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chitu_core.ops import rows as definitions
from chitu_core.ops.rows import FP8, scales_of

FP8_MAX = tl.constexpr(definitions.FP8_MAX)
AMAX_FLOOR = tl.constexpr(definitions.AMAX_FLOOR)


@triton.jit
def _to_fp8(y, factor):
    """Scaled into the range of fp8; the product may round to beyond it."""
    return tl.minimum(tl.maximum(y * factor, -FP8_MAX), FP8_MAX)


@triton.jit
def _store_row(y, out, scales, row, columns, is_inside, width, QUANTISE: tl.constexpr):
    """Write one row in the dtype of `out`, or as fp8 with its scale."""
    if QUANTISE:
        amax = tl.maximum(tl.max(tl.where(is_inside, tl.abs(y), 0.0), axis=0), AMAX_FLOOR)
        tl.store(scales + row, amax / FP8_MAX)
        y = _to_fp8(y, FP8_MAX / amax)
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _normalise(x, weight, bias, columns, is_inside, width, eps):
    """Layer norm of one row, two passes: squares of deviations, not a difference of large sums."""
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(is_inside, x - mean, 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    w = tl.load(weight + columns, mask=is_inside, other=0.0)
    b = tl.load(bias + columns, mask=is_inside, other=0.0)
    return centred * factor * w + b


@triton.jit
def layer_norm_kernel(
    x, weight, bias, out, scales, width, eps, BLOCK: tl.constexpr, QUANTISE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < width
    values = tl.load(x + row * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    y = _normalise(values, weight, bias, columns, is_inside, width, eps)
    _store_row(y, out, scales, row, columns, is_inside, width, QUANTISE)


@triton.jit
def gate_residual_kernel(
    x, y, gate, weight, bias, total, out, scales, width, eps,
    BLOCK: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr, QUANTISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < width
    stream = tl.load(x + row * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    update = tl.load(y + row * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        update *= tl.load(gate + columns, mask=is_inside, other=0.0)
    stream += update
    tl.store(total + row * width + columns, stream, mask=is_inside)
    if HAS_NORM:
        n = _normalise(stream, weight, bias, columns, is_inside, width, eps)
        _store_row(n, out, scales, row, columns, is_inside, width, QUANTISE)


@triton.jit
def rms_norm_rope_kernel(
    x, q_weight, k_weight, cos, sin, q_out, k_out, row_stride, length, width, pairs, eps,
    BLOCK: tl.constexpr, HAS_ROPE: tl.constexpr,
):  # fmt: skip
    """Program (row, 0) takes the first `width` columns of a row of x, program (row, 1) the next."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < width
    values = tl.load(x + row * row_stride + part * width + columns, mask=is_inside, other=0.0)
    values = values.to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    weight = q_weight if part == 0 else k_weight
    values = values * factor * tl.load(weight + columns, mask=is_inside, other=0.0)
    if HAS_ROPE:
        first, second = tl.split(tl.reshape(values, (BLOCK // 2, 2)))
        pair = tl.arange(0, BLOCK // 2)
        angle = (row % length) * pairs + pair % pairs
        is_pair = pair < width // 2
        c = tl.load(cos + angle, mask=is_pair, other=0.0)
        s = tl.load(sin + angle, mask=is_pair, other=0.0)
        values = tl.reshape(tl.join(first * c - second * s, first * s + second * c), (BLOCK,))
    out = q_out if part == 0 else k_out
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _load(x, columns, is_inside, GELU: tl.constexpr):
    y = tl.load(x + columns, mask=is_inside, other=0.0).to(tl.float32)
    if GELU:  # 0.5 y (1 + tanh(u)) = y sigmoid(2 u) with u = sqrt(2 / pi) (y + 0.044715 y^3)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y


@triton.jit
def quantise_kernel(
    x, out, scales, width, BLOCK: tl.constexpr, TAIL: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    """The row is a block and, unless TAIL is 0, a smaller one after it, so that fewer lanes are idle."""
    row = tl.program_id(0).to(tl.int64)
    x, out = x + row * width, out + row * width
    columns = tl.arange(0, BLOCK)
    is_inside = columns < width
    y = _load(x, columns, is_inside, GELU)
    amax = tl.max(tl.abs(y), axis=0)
    if TAIL > 0:
        tail_columns = BLOCK + tl.arange(0, TAIL)
        is_in_tail = tail_columns < width
        tail = _load(x, tail_columns, is_in_tail, GELU)
        amax = tl.maximum(amax, tl.max(tl.abs(tail), axis=0))
    amax = tl.maximum(amax, AMAX_FLOOR)
    tl.store(scales + row, amax / FP8_MAX)
    factor = FP8_MAX / amax
    tl.store(out + columns, _to_fp8(y, factor).to(out.dtype.element_ty), mask=is_inside)
    if TAIL > 0:
        tl.store(out + tail_columns, _to_fp8(tail, factor).to(out.dtype.element_ty), mask=is_in_tail)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows of x [..., d] normalised, in `dtype`, and their scales [rows, 1] for fp8, else [0, 1]."""
    rows, width, x = x.numel() // x.shape[-1], x.shape[-1], x.contiguous()
    out, scales = _outputs(x, dtype)
    layer_norm_kernel[(rows,)](
        x, weight, bias, out, scales, width, eps, **_blocks(width), QUANTISE=dtype == FP8
    )
    return out, scales


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * y, rows of fp32 x and of y in any dtype; one row of gates, or none."""
    rows, width, x, y = x.numel() // x.shape[-1], x.shape[-1], x.contiguous(), y.contiguous()
    total = torch.empty_like(x)
    gate_residual_kernel[(rows,)](
        x, y, x if gate is None else gate, x, x, total, x, x, width, 0.0,
        **_blocks(width), HAS_GATE=gate is not None, HAS_NORM=False, QUANTISE=False,
    )  # fmt: skip
    return total


def gate_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum x + gate * y, its rows normalised in `dtype`, and their scales for fp8."""
    rows, width, x, y = x.numel() // x.shape[-1], x.shape[-1], x.contiguous(), y.contiguous()
    total = torch.empty_like(x)
    out, scales = _outputs(x, dtype)
    gate_residual_kernel[(rows,)](
        x, y, x if gate is None else gate, weight, bias, total, out, scales, width, eps,
        **_blocks(width), HAS_GATE=gate is not None, HAS_NORM=True, QUANTISE=dtype == FP8,
    )  # fmt: skip
    return total, out, scales


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """From packed rows [B, S, 3 d]: q and k normalised over d and rotated, [B, S, d] each, contiguous."""
    batch, length, triple = qkv.shape
    width = triple // 3
    q, k = (qkv.new_empty(batch, length, width) for _ in range(2))
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    rms_norm_rope_kernel[(batch * length, 2)](
        qkv, q_weight, k_weight, cos, sin, q, k, triple, length, width, cos.shape[-1], eps,
        **_blocks(width), HAS_ROPE=True,
    )  # fmt: skip
    return q, k


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows of x [..., d] over their root mean square times `weight`, in the dtype of x."""
    rows, width, x = x.numel() // x.shape[-1], x.shape[-1], x.contiguous()
    out = torch.empty_like(x)
    rms_norm_rope_kernel[(rows, 1)](
        x, weight, weight, weight, weight, out, out, width, 1, width, 1, eps, **_blocks(width), HAS_ROPE=False
    )
    return out


def quantise(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Rows of x [..., d], through GELU or not, as float8_e4m3fn and their scales [rows, 1]."""
    rows, width, x = x.numel() // x.shape[-1], x.shape[-1], x.contiguous()
    out, scales = _outputs(x, FP8)
    whole = triton.next_power_of_2(width)
    block = whole if whole == width else whole // 2
    tail = triton.next_power_of_2(width - block) if width > block else 0
    if block + tail >= whole:
        block, tail = whole, 0
    quantise_kernel[(rows,)](x, out, scales, width, **_blocks(block), TAIL=tail, GELU=gelu)
    return out, scales


def _outputs(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype), scales_of(x, dtype)


def _blocks(width: int) -> dict[str, int]:
    """The whole row as one block, 16 to 32 values a thread: best at widths 1536 and 5120 on an H100."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 1024))}
