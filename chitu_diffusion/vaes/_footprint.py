"""How much memory of the device a decode or an encode takes at most, said beforehand.

A convolution is followed from its input to its result, with what the layer around it keeps: `_calls.py` says
which, this module what each allocates. The past of all convolutions and the weights are there all the time.
Left out: the workspace of a library, what an allocator rounds up, and the latent or video passed in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from chitu_core.ops.conv import FEW, shifted_is_faster
from chitu_diffusion.vaes._calls import Call, Size, calls
from chitu_diffusion.vaes._tile_plan import TilePlan, kinds
from chitu_diffusion.vaes.wan import Decoder, Encoder, WanVAE

Capability = tuple[int, int]


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device: of the weights, of the past kept between chunks, of activations at the peak."""

    weights: int
    past: int
    activations: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.past + self.activations


@dataclass(frozen=True)
class _Pass:
    """Layers through which a clip goes by itself, with the rows and columns that enter them.

    `windows` are those before layers that trim a tile; `period` frames that enter are one of the latent.
    """

    layers: tuple[nn.Module, ...]
    sides: tuple[int, int]
    windows: dict[nn.Module, tuple[int, int]]
    period: int


def footprint(
    vae: WanVAE,
    net: Encoder | Decoder,
    latent: Size,
    latent_frames_per_chunk: int,
    plan: TilePlan | None = None,
    *,
    dtype: torch.dtype,
    capability: Capability | None,
) -> Footprint:
    """The peak of a decode (`net` is the decoder) or an encode of a clip of `latent` frames, rows, columns.

    `vae` may lie anywhere, also on the meta device; it computes in `dtype`, on a GPU of a compute capability,
    or, where that is None, by the eager forms. Without a `plan` the image is one piece.
    """
    weights = dtype.itemsize * sum(parameter.numel() for parameter in vae.parameters())
    found = []
    for part in _passes(vae, net, latent[1:], plan):
        for frames, is_first in _chunks(net, latent[0], latent_frames_per_chunk, part.period):
            run = calls(part.layers, (frames, *part.sides), part.windows, is_first)
            found.append(_peak(list(run), weights, dtype, capability))
    return max(found, key=lambda peak: peak.total)


def _passes(
    vae: WanVAE, net: Encoder | Decoder, sides: tuple[int, int], plan: TilePlan | None
) -> Iterator[_Pass]:
    period, scale, _ = (1, 1, 1) if isinstance(net, Decoder) else vae.config.stride
    layers = (*net.coarse, *net.fine) if isinstance(net, Decoder) else (*net.fine, *net.coarse)
    if plan is None or plan.mode == "whole":
        yield _Pass(layers, (sides[0] * scale, sides[1] * scale), {}, period)
        return
    yield _Pass(net.coarse, sides, {}, 1)
    for entry, windows, _ in kinds(plan.stops(net), plan.tiles, plan.sides):
        yield _Pass(net.fine, entry, windows, period)


def _chunks(
    net: Encoder | Decoder, latent_frames: int, chunk: int, period: int
) -> Iterator[tuple[int, bool]]:
    """Frames of the first chunk, and of the largest later one: those of the latent times the period."""
    first = min(chunk, latent_frames) if isinstance(net, Decoder) else 1
    yield first, True
    if latent_frames > first:
        yield period * min(chunk, latent_frames - first), False


def _peak(run: list[Call], weights: int, dtype: torch.dtype, capability: Capability | None) -> Footprint:
    """The peak while one chunk passes, at which the past of all its layers is taken to be there."""
    needs = [_need(call, dtype, capability) for call in run]
    size = dtype.itemsize
    most = max(size * call.held + need.meanwhile for call, need in zip(run, needs, strict=True))
    prepared, past = (size * sum(values) for values in ((n.prepared for n in needs), (n.past for n in needs)))
    return Footprint(weights + prepared, past, most)


@dataclass(frozen=True)
class _Need:
    """Of a convolution: bytes made while it runs; values of its past, and of its weight in another form."""

    meanwhile: int
    past: int
    prepared: int


def _need(call: Call, dtype: torch.dtype, capability: Capability | None) -> _Need:
    conv, (frames, rows, columns) = call.conv, call.before
    out = prod(call.after) * conv.out_channels
    if isinstance(conv, nn.Conv2d):
        wider = frames * (rows + 1) * (columns + 1)  # one more to the right and below: stride 2, or doubling
        inside = wider * (4 * conv.out_channels if call.doubles else conv.in_channels)
        return _Need(dtype.itemsize * (inside + out), 0, 16 * conv.weight.numel() // 9 if call.doubles else 0)
    is_shifted = call.has_norm and conv.kernel_size == (3, 3, 3) and capability is not None
    if is_shifted and capability is not None:
        is_shifted = shifted_is_faster(capability, dtype, conv.in_channels, conv.out_channels)
    overlap, area = conv.kernel_size[0] - conv.stride[0], (rows + 2 * is_shifted) * (columns + 2 * is_shifted)
    clip, past = (frames + overlap) * area * conv.in_channels, overlap * area * conv.in_channels
    if is_shifted:
        sums = 9 * conv.out_channels * (frames + overlap) * area if conv.out_channels <= FEW else 0
        needed = dtype.itemsize * (clip + out) + torch.float32.itemsize * sums
        return _Need(needed, past, conv.weight.numel())
    if capability is not None:
        return _Need(dtype.itemsize * (clip + 2 * out), past, 0)  # without the bias, and with it
    normed = prod(call.before) * conv.in_channels if call.has_norm else 0
    return _Need(dtype.itemsize * (clip + max(normed, out)), past, 0)
