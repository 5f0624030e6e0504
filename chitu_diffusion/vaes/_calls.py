"""What a network of the VAE does with one chunk of frames, convolution by convolution: sizes, no tensors.

It follows `wan.py` layer by layer; products and bytes are counted from it. Left out: attention, whose
activations and products are few beside those of the convolutions at the size of pictures.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from chitu_diffusion.vaes.wan import AttentionBlock, Downsample, ResidualBlock, Upsample

Size = tuple[int, int, int]  # frames, rows, columns
FOLDED = 4 / 9  # of the products of 3 x 3 after doubling are left: `fold_nearest2x`


@dataclass(frozen=True)
class Call:
    """A convolution of frames of size `before` to frames of size `after`.

    `held` counts the values that the layer around it keeps meanwhile, its input among them; `has_norm` says
    that SiLU(norm(x)) is convolved, `doubles` that rows and columns are doubled before.
    """

    conv: nn.Conv2d | nn.Conv3d
    before: Size
    after: Size
    held: int
    has_norm: bool = False
    doubles: bool = False

    @property
    def products(self) -> float:
        """Multiplications."""
        return prod(self.after) * self.conv.weight.numel() * (FOLDED if self.doubles else 1.0)


def calls(
    layers: Sequence[nn.Module], size: Size, windows: Mapping[nn.Module, tuple[int, int]], is_first: bool
) -> Iterator[Call]:
    """All convolutions of size 3, in order, of a chunk that enters with `size`; `is_first` of its clip.

    `windows` has the rows and columns that remain before a layer which changes the resolution, if not all.
    """
    for layer in layers:
        if isinstance(layer, nn.Conv3d):
            yield Call(layer, size, size, _values(size, layer.in_channels))
        elif isinstance(layer, nn.Sequential):
            conv = layer[-1]
            assert isinstance(conv, nn.Conv3d)
            yield Call(conv, size, size, _values(size, conv.in_channels), has_norm=True)
        elif isinstance(layer, ResidualBlock):
            yield from _residual(layer, size)
        elif isinstance(layer, Upsample | Downsample):
            held = _values(size, _conv2d(layer).in_channels)
            window = (size[0], *windows.get(layer, size[1:]))
            resample = _upsample if isinstance(layer, Upsample) else _downsample
            found, size = resample(layer, window, held, is_first)
            yield from found
        else:
            assert isinstance(layer, AttentionBlock), layer


def _residual(block: ResidualBlock, size: Size) -> Iterator[Call]:
    first, second = (part for part in block.residual if isinstance(part, nn.Conv3d))
    held = _values(size, first.in_channels)
    if block.shortcut is not None:
        held += _values(size, first.out_channels)
    yield Call(first, size, size, held, has_norm=True)
    yield Call(second, size, size, held + _values(size, second.in_channels), has_norm=True)


def _upsample(layer: Upsample | Downsample, size: Size, held: int, is_first: bool) -> tuple[list[Call], Size]:
    frames, rows, columns = size
    found = []
    if layer.time_conv is not None:
        rest = (frames - is_first, rows, columns)
        if rest[0]:
            found.append(Call(layer.time_conv, rest, rest, held))
        frames = 2 * rest[0] + is_first
        held += _values((frames, rows, columns), layer.time_conv.in_channels)
    after = (frames, 2 * rows, 2 * columns)
    found.append(Call(_conv2d(layer), (frames, rows, columns), after, held, doubles=True))
    return found, after


def _downsample(
    layer: Upsample | Downsample, size: Size, held: int, is_first: bool
) -> tuple[list[Call], Size]:
    frames, *sides = size
    rows, columns = (side // 2 for side in sides)
    halved = (frames, rows, columns)
    found = [Call(_conv2d(layer), size, halved, held)]
    if layer.time_conv is None:
        return found, halved
    rest = frames - is_first
    held += _values(halved, layer.time_conv.in_channels)
    if rest:
        found.append(Call(layer.time_conv, (rest, rows, columns), (rest // 2, rows, columns), held))
    return found, (rest // 2 + is_first, rows, columns)


def _conv2d(layer: Upsample | Downsample) -> nn.Conv2d:
    conv = layer.resample[1]
    assert isinstance(conv, nn.Conv2d)
    return conv


def _values(size: Size, channels: int) -> int:
    return prod(size) * channels
