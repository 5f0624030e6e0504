"""Operations of a convolutional network on clips [T, H, W, C], fused: no copy between two convolutions.

As in `rows.py`, each has an eager form, which runs anywhere and is the definition, and a Triton kernel
(`_conv_kernels.py`) behind a registered operator, taken for tensors on a GPU. Convolutions are cuDNN's, but
for the one kind of layer on one kind of GPU that `prefers_shifted` names.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chitu_core.ops.rows import is_fused

# Compute capability: the most channels for which `shifted_conv3d` beats cuDNN. On H100 with cuDNN 9.19, bf16,
# for 4 frames of 832x480: 1.73 ms against 2.59 with 96 channels, at half the size 1.72 against 1.48 with 192.
SHIFTED_WIDTHS = {(9, 0): 128}
_CHANNEL_STEP = 32  # channels that the kernel takes at a time
FEW = 3  # outputs for which there is another kernel: the last layer of a decoder, 20 TFLOP/s in cuDNN


def rms_norm_silu(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Write SiLU(x / rms(x) * weight), over the channels of x [T, H, W, C], into `out`.

    `out` [T, H + 2 p, W + 2 p, C], in the dtype of x, may be a part of a larger tensor, channels adjacent.
    The p pixels around each frame become zeros, which is the padding of a convolution that follows.
    """
    if is_fused(x):
        torch.ops.chitu.rms_norm_silu(x, weight, eps, out)
        return
    _, height, width, dim = x.shape
    halo = _halo(x, out)
    y = F.silu(F.rms_norm(x, (dim,), weight, eps), inplace=True)
    if halo:
        out.zero_()
    out[:, halo : halo + height, halo : halo + width] = y


def prefers_shifted(x: Tensor, dim_out: int) -> bool:
    """Whether `shifted_conv3d` is the faster way to convolve x [T, H, W, C] to `dim_out` channels."""
    if not is_fused(x):
        return False
    return shifted_is_faster(torch.cuda.get_device_capability(x.device), x.dtype, x.shape[-1], dim_out)


def shifted_is_faster(capability: tuple[int, int], dtype: torch.dtype, dim_in: int, dim_out: int) -> bool:
    """The same by the numbers: of a GPU, and of channels."""
    is_whole = dim_in % _CHANNEL_STEP == 0 and (dim_out % _CHANNEL_STEP == 0 or dim_out <= FEW)
    most = SHIFTED_WIDTHS.get(capability, 0) if dtype in (torch.bfloat16, torch.float16) else 0
    return is_whole and max(dim_in, dim_out) <= most


def flat_taps(weight: Tensor) -> Tensor:
    """The weight [O, C, 3, 3, 3] of a convolution as [O, 27 C], tap by tap, for `shifted_conv3d`."""
    return weight.permute(0, 2, 3, 4, 1).flatten(1)


def shifted_conv3d(x: Tensor, taps: Tensor, bias: Tensor, add: Tensor | None = None) -> Tensor:
    """Convolve x [T + 2, H + 2, W + 2, C], which holds its padding, to [T, H, W, O]; then add [T, H, W, O].

    The number of a pixel in x plus a constant for each of the 27 `taps` [O, 27 C] is the number of the pixel
    that the tap sees. So the convolution is 27 matrix products of the same rows, begun at other ones. What
    comes out for the last two pixels of a row, and rows of a frame, is dropped. Sums are fp32; results are
    in the dtype of x, rounded before the addition as those of a convolution and an addition are.
    """
    if is_fused(x):
        return torch.ops.chitu.shifted_conv3d(x, taps, bias, add)
    (frames, height, width), (_, rows, columns, dim) = _shape_inside(x), x.shape
    pixels = frames * rows * columns
    flat = F.pad(x.flatten(0, 2).float(), (0, 0, 0, 2 * columns + 2))  # beyond the last frame: zeros
    total = bias.float().expand(pixels, -1).clone()
    for tap, weight in enumerate(taps.float().split(dim, dim=1)):
        shift = (tap // 9 * rows + tap // 3 % 3) * columns + tap % 3
        total.addmm_(flat[shift : shift + pixels], weight.t())
    y = total.view(frames, rows, columns, -1)[:, :height, :width].to(x.dtype)
    return y.contiguous() if add is None else y + add


def fold_nearest2x(weight: Tensor) -> Tensor:
    """A 3 x 3 weight [O, C, 3, 3] after nearest doubling as a 2 x 2 one before it, [4 O, C, 2, 2].

    A doubled row, even or odd, sees two rows of the input with three taps; those that see the same are
    summed, in fp32. The four parities (row, column) are the slowest part of the outputs.
    """
    meets = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
    folded = torch.einsum("apk,bql,oikl->aboipq", meets, meets, weight.float())
    return folded.flatten(0, 2).to(weight.dtype)


def conv2d_nearest2x(x: Tensor, folded: Tensor, bias: Tensor) -> Tensor:
    """Double rows and columns of x [T, H, W, C] and convolve 3 x 3 with zeros around, to [T, 2 H, 2 W, O].

    `folded` [4 O, C, 2, 2] is `fold_nearest2x` of the weight. The doubled tensor is never made, and 4 / 9 of
    the products are left.
    """
    y = F.conv2d(x.permute(0, 3, 1, 2), folded, padding=1)
    return interleave2x(y.permute(0, 2, 3, 1), bias)


def interleave2x(y: Tensor, bias: Tensor) -> Tensor:
    """From y [T, H + 1, W + 1, 4 O] to [T, 2 H, 2 W, O], plus `bias` [O].

    Parity (a, b) of the pixel (h, w) is y at (h + a, w + b).
    """
    if is_fused(y):
        return torch.ops.chitu.interleave2x(y, bias)
    height, width = y.shape[1] - 1, y.shape[2] - 1
    parts = y.unflatten(-1, (2, 2, -1))
    out = y.new_empty(len(y), height, 2, width, 2, parts.shape[-1])
    for a in range(2):
        for b in range(2):
            out[:, :, a, :, b] = parts[:, a : a + height, b : b + width, a, b]
    return out.flatten(3, 4).flatten(1, 2).add_(bias)


def convolve(conv: nn.Conv3d, x: Tensor, padding: tuple[int, int, int], add: Tensor | None = None) -> Tensor:
    """Apply a convolution to [T, H, W, C] with so many zeros on either side of T, H and W; then add `add`."""
    # NOTE: the batch axis comes before the permutation, else the strides are not seen as channels-last.
    clip = x[None].permute(0, 4, 1, 2, 3)  # [1, C, T, H, W]
    if is_fused(x) and conv.bias is not None:  # cuDNN's result is read once for both additions
        y = F.conv3d(clip, conv.weight, None, conv.stride, padding).permute(0, 2, 3, 4, 1)[0]
        return torch.ops.chitu.add_bias(y, conv.bias, add)
    has_onednn: bool = torch.backends.mkldnn.is_available()
    if has_onednn and x.is_cpu and x.dtype == torch.float32:
        # For a batch of one small fp32 clip F.conv3d would choose a kernel up to 30 times slower.
        y = torch.mkldnn_convolution(clip, conv.weight, conv.bias, padding, conv.stride, conv.dilation, 1)
    else:
        y = F.conv3d(clip, conv.weight, conv.bias, conv.stride, padding)
    y = y.permute(0, 2, 3, 4, 1)[0]
    return y if add is None else y.add_(add)


def _halo(x: Tensor, out: Tensor) -> int:
    """Pixels of `out` beyond each side of x; the operator relies on these shapes."""
    halo = (out.shape[1] - x.shape[1]) // 2
    frames, height, width, dim = x.shape
    assert out.shape == (frames, height + 2 * halo, width + 2 * halo, dim), (x.shape, out.shape)
    assert halo >= 0, (x.shape, out.shape)
    assert out.dtype == x.dtype, (x.dtype, out.dtype)
    assert out.stride(-1) == 1, out.stride()
    return halo


def _shape_inside(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0] - 2, x.shape[1] - 2, x.shape[2] - 2


def _kernels() -> Any:
    """Imported at the first launch: Triton is not everywhere."""
    return importlib.import_module("chitu_core.ops._conv_kernels")


@torch.library.custom_op("chitu::rms_norm_silu", mutates_args=("out",), device_types="cuda")
def _rms_norm_silu(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    _kernels().rms_norm_silu(x, weight, eps, out, _halo(x, out))


@_rms_norm_silu.register_fake
def _(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    return None


@torch.library.custom_op("chitu::shifted_conv3d", mutates_args=(), device_types="cuda")
def _shifted_conv3d(x: Tensor, taps: Tensor, bias: Tensor, add: Tensor | None) -> Tensor:
    return _kernels().shifted_conv3d(x, taps, bias, add)


@_shifted_conv3d.register_fake
def _(x: Tensor, taps: Tensor, bias: Tensor, add: Tensor | None) -> Tensor:
    return x.new_empty(*_shape_inside(x), len(taps))


@torch.library.custom_op("chitu::add_bias", mutates_args=(), device_types="cuda")
def _add_bias(y: Tensor, bias: Tensor, add: Tensor | None) -> Tensor:
    return _kernels().add_bias(y, bias, add)


@_add_bias.register_fake
def _(y: Tensor, bias: Tensor, add: Tensor | None) -> Tensor:
    return torch.empty_like(y)


@torch.library.custom_op("chitu::interleave2x", mutates_args=(), device_types="cuda")
def _interleave2x(y: Tensor, bias: Tensor) -> Tensor:
    return _kernels().interleave2x(y, bias)


@_interleave2x.register_fake
def _(y: Tensor, bias: Tensor) -> Tensor:
    frames, rows, columns, dim = y.shape
    return y.new_empty(frames, 2 * (rows - 1), 2 * (columns - 1), dim // 4)
