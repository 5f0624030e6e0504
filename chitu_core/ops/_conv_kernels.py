"""The Triton kernels of `conv.py`, and the functions that launch them.

Pixels are numbered through a whole clip, and a program takes a tile of adjacent ones with all their channels.
Sums are fp32. Numbers of pixels are 32 bit, places of values 64. Imported only where Triton is there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_TILE_VALUES = 4096  # of a program that moves pixels: 32 a thread, in loads of 16 bytes
_PIXELS, _CHANNELS, _STAGES = (
    256,
    32,
    4,
)  # tile of the convolution: the fastest of nine on H100 for 96 channels
_COUNTS = ("pixels", "height", "width")  # one kernel serves clips of any size
_LINES = 32  # results of a pixel where the convolution has at most 3 outputs: 9 lines of taps for each


@triton.jit
def _place(pixel, height, width):
    """Frame, row and column of a pixel's number."""
    line = pixel // width
    return line // height, line % height, pixel % width


@triton.jit(do_not_specialize=_COUNTS)
def rms_norm_silu_kernel(
    x, weight, out, pixels, height, width, frame_stride, row_stride, pixel_stride, eps,
    DIM: tl.constexpr, HALO: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of the pixels of `out`; those around a frame read nothing, and the norm of zeros is zero."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    column = tl.arange(0, BLOCK)
    frame, row, place = _place(pixel, height + 2 * HALO, width + 2 * HALO)
    h, w = row - HALO, place - HALO
    is_real = (pixel < pixels) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    is_inside = column < DIM
    source = ((frame * height + h) * width + w).to(tl.int64) * DIM
    mask = is_real[:, None] & is_inside[None, :]
    values = tl.load(x + source[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, axis=1) / DIM + eps)
    gamma = tl.load(weight + column, mask=is_inside, other=0.0).to(tl.float32)
    y = values * factor[:, None] * gamma[None, :]
    y = y * tl.sigmoid(y)
    target = frame.to(tl.int64) * frame_stride + row.to(tl.int64) * row_stride + place * pixel_stride
    mask = (pixel < pixels)[:, None] & is_inside[None, :]
    tl.store(out + target[:, None] + column[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def shifted_conv3d_kernel(
    x, taps, bias, add, out, pixels, height, width,
    DIM: tl.constexpr, DIM_OUT: tl.constexpr, HAS_ADD: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of pixels, numbered as in the padded x. `x`, `taps` are descriptors: beyond them are zeros."""
    start = tl.program_id(0) * PIXELS
    columns = width + 2
    size = (height + 2) * columns
    total = tl.zeros((PIXELS, BLOCK), dtype=tl.float32)
    parts: tl.constexpr = DIM // CHANNELS
    for step in range(27 * parts):
        tap = step // parts
        channel = step % parts * CHANNELS
        shift = tap // 9 * size + tap // 3 % 3 * columns + tap % 3
        rows = x.load([start + shift, channel])
        weight = taps.load([0, tap * DIM + channel])
        total = tl.dot(rows, weight.T, total)
    pixel = start + tl.arange(0, PIXELS)
    column = tl.arange(0, BLOCK)
    frame, h, w = _place(pixel, height + 2, columns)
    is_real = (pixel < pixels) & (h < height) & (w < width)
    is_inside = column < DIM_OUT
    mask = is_real[:, None] & is_inside[None, :]
    y = total + tl.load(bias + column, mask=is_inside, other=0.0).to(tl.float32)[None, :]
    y = y.to(out.dtype.element_ty)
    target = ((frame * height + h) * width + w).to(tl.int64) * DIM_OUT
    places = target[:, None] + column[None, :]
    if HAS_ADD:
        other = tl.load(add + places, mask=mask, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + other).to(out.dtype.element_ty)
    tl.store(out + places, y, mask=mask)


@triton.jit(do_not_specialize=["pixels"])
def line_products_kernel(
    x, lines, parts, pixels, DIM: tl.constexpr, COUNT: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of pixels with all `lines` of taps, 3 in a row each; sums go to planes of `parts`."""
    start = tl.program_id(0) * PIXELS
    total = tl.zeros((PIXELS, BLOCK), dtype=tl.float32)
    steps: tl.constexpr = DIM // CHANNELS
    for step in range(3 * steps):
        channel = step % steps * CHANNELS
        rows = x.load([start + step // steps, channel])
        weight = lines.load([0, step // steps * DIM + channel])
        total = tl.dot(rows, weight.T, total)
    pixel = start + tl.arange(0, PIXELS)
    plane = tl.arange(0, BLOCK)
    mask = (pixel < pixels)[:, None] & (plane < COUNT)[None, :]
    tl.store(parts + plane.to(tl.int64)[None, :] * pixels + pixel[:, None], total, mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def sum_lines_kernel(
    parts, bias, out, pixels, height, width, DIM_OUT: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """One tile of pixels, numbered as in the padded input: the sum of its 9 lines, from as many places."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    columns = width + 2
    size = (height + 2) * columns
    frame, h, w = _place(pixel, height + 2, columns)
    is_real = (h < height) & (w < width) & (pixel + 2 * size < pixels)
    target = ((frame * height + h) * width + w).to(tl.int64) * DIM_OUT
    for channel in tl.static_range(DIM_OUT):
        total = tl.zeros((PIXELS,), dtype=tl.float32) + tl.load(bias + channel).to(tl.float32)
        for line in tl.static_range(9):
            shift = line // 3 * size + line % 3 * columns
            plane = parts + tl.cast(pixels, tl.int64) * (line * DIM_OUT + channel)
            total += tl.load(plane + pixel + shift, mask=is_real, other=0.0)
        tl.store(out + target + channel, total.to(out.dtype.element_ty), mask=is_real)


@triton.jit(do_not_specialize=_COUNTS)
def interleave2x_kernel(
    y, bias, out, pixels, height, width, DIM: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One tile of the pixels of `out`, whose frames have `height` x `width`."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    column = tl.arange(0, BLOCK)
    mask = (pixel < pixels)[:, None] & (column < DIM)[None, :]
    frame, row, place = _place(pixel, height, width)
    a, b = row % 2, place % 2
    line = frame * (height // 2 + 1) + row // 2 + a
    source = (line * (width // 2 + 1) + place // 2 + b).to(tl.int64) * 4 + a * 2 + b
    values = tl.load(y + source[:, None] * DIM + column[None, :], mask=mask, other=0.0).to(tl.float32)
    values += tl.load(bias + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
    places = pixel.to(tl.int64)[:, None] * DIM + column[None, :]
    tl.store(out + places, values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels"])
def add_bias_kernel(
    y, bias, add, out, pixels,
    DIM: tl.constexpr, HAS_ADD: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of pixels."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    column = tl.arange(0, BLOCK)
    mask = (pixel < pixels)[:, None] & (column < DIM)[None, :]
    places = pixel.to(tl.int64)[:, None] * DIM + column[None, :]
    total = tl.load(y + places, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
    if HAS_ADD:
        total += tl.load(add + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)


def rms_norm_silu(x: Tensor, weight: Tensor, eps: float, out: Tensor, halo: int) -> None:
    """SiLU of the normalised pixels of x [T, H, W, C] inside `out`, zeros in its `halo` pixels around."""
    x, (_, height, width, dim), pixels = x.contiguous(), x.shape, out.numel() // out.shape[-1]
    tile = _tile(dim)
    rms_norm_silu_kernel[(triton.cdiv(pixels, tile["PIXELS"]),)](
        x, weight, out, pixels, height, width, *out.stride()[:3], eps, DIM=dim, HALO=halo, **tile
    )


def shifted_conv3d(x: Tensor, taps: Tensor, bias: Tensor, add: Tensor | None) -> Tensor:
    """Convolve x [T + 2, H + 2, W + 2, C] by `taps` [O, 27 C], C a multiple of 32 and O at most 128."""
    if 9 * len(taps) <= _LINES:
        y = _few_conv3d(x, taps, bias)
        return y if add is None else y.add_(add)
    frames, rows, columns, dim = x.shape
    frames, height, width, dim_out = frames - 2, rows - 2, columns - 2, len(taps)
    flat, taps = x.contiguous().view(-1, dim), taps.contiguous()
    out = x.new_empty(frames, height, width, dim_out)
    pixels, block = frames * rows * columns, triton.next_power_of_2(dim_out)
    shifted_conv3d_kernel[(triton.cdiv(pixels, _PIXELS),)](
        TensorDescriptor.from_tensor(flat, [_PIXELS, _CHANNELS]),
        TensorDescriptor.from_tensor(taps, [block, _CHANNELS]),
        bias, out if add is None else add.contiguous(), out, pixels, height, width,
        DIM=dim, DIM_OUT=dim_out, HAS_ADD=add is not None,
        PIXELS=_PIXELS, BLOCK=block, CHANNELS=_CHANNELS, num_warps=8, num_stages=_STAGES,
    )  # fmt: skip
    return out


def _few_conv3d(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """The same to at most 3 channels.

    A product for each tap would read x 27 times for nearly empty tiles of results. So one product reads it 3
    times and gives every line of 3 taps its own results, fp32, and 9 lines are summed from where they belong.
    """
    frames, rows, columns, dim = x.shape
    height, width, dim_out = rows - 2, columns - 2, len(taps)
    pixels, flat = frames * rows * columns, x.contiguous().view(-1, dim)
    lines = taps.view(dim_out, 9, 3 * dim).transpose(0, 1).reshape(9 * dim_out, 3 * dim)
    parts = x.new_empty(9 * dim_out, pixels, dtype=torch.float32)
    line_products_kernel[(triton.cdiv(pixels, _PIXELS),)](
        TensorDescriptor.from_tensor(flat, [_PIXELS, _CHANNELS]),
        TensorDescriptor.from_tensor(lines, [_LINES, _CHANNELS]),
        parts, pixels, DIM=dim, COUNT=9 * dim_out,
        PIXELS=_PIXELS, BLOCK=_LINES, CHANNELS=_CHANNELS, num_warps=4, num_stages=_STAGES,
    )  # fmt: skip
    out = x.new_empty(frames - 2, height, width, dim_out)
    sum_lines_kernel[(triton.cdiv(pixels - 2 * rows * columns, 2 * _PIXELS),)](
        parts, bias, out, pixels, height, width, DIM_OUT=dim_out, PIXELS=2 * _PIXELS, num_warps=4
    )
    return out


def add_bias(y: Tensor, bias: Tensor, add: Tensor | None) -> Tensor:
    """y [T, H, W, C] plus `bias` [C] plus `add` [T, H, W, C]: summed in fp32, rounded once."""
    y = y.contiguous()
    out, pixels, tile = torch.empty_like(y), y.numel() // y.shape[-1], _tile(y.shape[-1])
    add_bias_kernel[(triton.cdiv(pixels, tile["PIXELS"]),)](
        y, bias, y if add is None else add.contiguous(), out, pixels,
        DIM=y.shape[-1], HAS_ADD=add is not None, **tile,
    )  # fmt: skip
    return out


def interleave2x(y: Tensor, bias: Tensor) -> Tensor:
    """The four parities of y [T, H + 1, W + 1, 4 O] as pixels [T, 2 H, 2 W, O], plus `bias` [O]."""
    frames, rows, columns, dim = y.shape
    out = y.new_empty(frames, 2 * (rows - 1), 2 * (columns - 1), dim // 4)
    pixels, tile = out.numel() // out.shape[-1], _tile(dim // 4)
    interleave2x_kernel[(triton.cdiv(pixels, tile["PIXELS"]),)](
        y.contiguous(), bias, out, pixels, *out.shape[1:3], DIM=dim // 4, **tile
    )
    return out


def _tile(dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"PIXELS": max(1, _TILE_VALUES // block), "BLOCK": block, "num_warps": 4}
