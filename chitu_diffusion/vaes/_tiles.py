"""Decode and encode an image tile by tile, each over all frames with its own past, in the memory of one.

The layers at the size of the latent, attention among them, run over the whole image. Their values are kept,
T h w C of them (for Wan2.1 C is 384), while the `fine` layers take one tile after another. Exact tiles carry
a halo, and compute the whole image; blended ones are padded with zeros, and fade into each other. Pictures
are kept until the last tile is through: 3 bytes a pixel; of blended ones the sums, 6 bytes. Both stay on the
device, where they take a twentieth of what tiles save: copies to the host would have it wait at every chunk.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from chitu_diffusion.vaes._tile_plan import Span, Stop, Tile, TilePlan, trims
from chitu_diffusion.vaes.wan import Decoder, Encoder, Stream, WanVAE, apply, pointwise

Cut = tuple[slice, slice]


class TileStream(Stream):
    """One pass of a tile through the `fine` layers of a network, which is trimmed at `stops` on the way."""

    def __init__(
        self,
        net: Encoder | Decoder,
        tile: Tile,
        sides: tuple[int, int],
        stops: Sequence[Stop],
        weights: dict[nn.Module, Tensor] | None = None,
    ) -> None:
        super().__init__(weights)
        self._net = net
        cuts = list(trims(stops, tile, sides))
        self._first, self._last = cuts[0], cuts[-1]
        inside = zip(stops, cuts, strict=True)
        self._inside: dict[nn.Module, Cut] = {
            stop.layer: cut for stop, cut in inside if stop.layer is not None
        }

    def window(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The part of [T, H, W, C] that the tile needs from this layer on."""
        rows, columns = self._inside[layer]
        return x[:, rows, columns]

    def feed(self, image: Tensor) -> Tensor:
        """Pass the tile of the next chunk [T, H, W, C] of the whole through; the chunk may lie elsewhere."""
        (top, left), (rows, columns), weight = self._first, self._last, next(self._net.parameters())
        x = image[:, top, left].to(weight.device, weight.dtype).contiguous()
        y = apply(self._net.fine, x, self)[:, rows, columns]
        self.is_at_start = False
        return y


def decode_tiled(
    vae: WanVAE,
    latent: Tensor,
    plan: TilePlan,
    latent_frames_per_chunk: int,
    to_pixels: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """Decode a normalised latent [z, T, h, w] to pictures [n, 8 h, 8 w, 3], in order, chunk by chunk.

    `to_pixels` makes frames [3, n, H, W], fp32 in [-1, 1], pictures [n, H, W, 3] of any dtype. All tiles are
    decoded before the first pictures are yielded; a plan of the whole yields chunk by chunk.
    Raises ValueError as `WanVAE.decode` does.
    """
    chunks = vae.split_latent(latent, latent_frames_per_chunk)
    _check_sides(plan, latent.shape[-2:], 1)
    if plan.mode == "whole":
        return map(to_pixels, vae.decode(latent, latent_frames_per_chunk))
    decode = _decode_exact if plan.mode == "exact" else _decode_blended
    return decode(vae, chunks, plan, to_pixels)


@torch.no_grad()
def encode_tiled(vae: WanVAE, video: Tensor, plan: TilePlan, latent_frames_per_chunk: int = 1) -> Tensor:
    """Encode a video [3, F, H, W] in [-1, 1] to the normalised posterior mean [z, T, H / 8, W / 8], fp32.

    The video may lie on the host; the latent is where the network is. Raises ValueError as `WanVAE.encode`.
    """
    chunks, device = vae.split_video(video, latent_frames_per_chunk), vae.conv1.weight.device
    _check_sides(plan, video.shape[-2:], vae.config.stride[1])
    if plan.mode == "whole":
        return vae.encode(video.to(device), latent_frames_per_chunk=latent_frames_per_chunk)
    features: list[Tensor] = []  # [T, h, w, C] of each chunk
    prepared: dict[nn.Module, Tensor] = {}
    for tile, weight in zip(plan.tiles, _weights(plan, 1), strict=True):
        stream = TileStream(vae.encoder, tile, plan.sides, plan.stops(vae.encoder), prepared)
        for index, chunk in enumerate(chunks):
            part = stream.feed(chunk.permute(1, 2, 3, 0))
            if index == len(features):
                features.append(part.new_zeros(len(part), *plan.sides, part.shape[-1]))
            features[index][:, *_place(tile, 1)] += part * weight.to(part)
    past, (mean, std) = Stream(), vae.mean_and_std(device)
    means = [vae.posterior_mean(apply(vae.encoder.coarse, chunk, past)) for chunk in features]
    return ((torch.cat(means) - mean) / std).permute(3, 0, 1, 2)


@torch.no_grad()
def _decode_exact(
    vae: WanVAE, chunks: Sequence[Tensor], plan: TilePlan, to_pixels: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    prepared: dict[nn.Module, Tensor] = {}
    features, pictures = _features(vae, chunks), None
    for tile in plan.tiles:
        place, done = _place(tile, vae.config.stride[1]), 0
        for frames in _decode_tile(vae, features, tile, plan, prepared):
            part = to_pixels(frames)
            if pictures is None:
                pictures = part.new_empty(_picture_shape(vae, chunks, plan))
            pictures[done : done + len(part), *place] = part
            done += len(part)
    assert pictures is not None
    yield from pictures.split(_frame_nums(vae, chunks))


@torch.no_grad()
def _decode_blended(
    vae: WanVAE, chunks: Sequence[Tensor], plan: TilePlan, to_pixels: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    features, scale = _features(vae, chunks), vae.config.stride[1]
    shape, device = _picture_shape(vae, chunks, plan), chunks[0].device
    prepared: dict[nn.Module, Tensor] = {}
    sums = torch.zeros(shape, dtype=torch.float16, device=device)  # steps below 1/8 of a level
    for tile, weight in zip(plan.tiles, _weights(plan, scale), strict=True):
        place, weight, done = _place(tile, scale), weight.to(device), 0
        for frames in _decode_tile(vae, features, tile, plan, prepared):
            part = (frames.permute(1, 2, 3, 0) * weight).half()
            sums[done : done + len(part), *place] += part
            done += len(part)
    for part in sums.split(_frame_nums(vae, chunks)):
        yield to_pixels(part.float().permute(3, 0, 1, 2))


def _features(vae: WanVAE, chunks: Sequence[Tensor]) -> list[Tensor]:
    """What the coarse layers give [T, h, w, C] of the whole image, chunk by chunk."""
    features, past, (mean, std) = [], Stream(), vae.mean_and_std(chunks[0].device)
    for chunk in chunks:
        z = chunk.permute(1, 2, 3, 0).float() * std + mean
        features.append(apply(vae.decoder.coarse, pointwise(vae.conv2, z.to(vae.dtype)), past))
    return features


def _decode_tile(
    vae: WanVAE, features: Sequence[Tensor], tile: Tile, plan: TilePlan, prepared: dict[nn.Module, Tensor]
) -> Iterator[Tensor]:
    """The frames [3, n, H, W] of one tile."""
    stream = TileStream(vae.decoder, tile, plan.sides, plan.stops(vae.decoder), prepared)
    for chunk in features:
        yield stream.feed(chunk).float().clamp_(-1, 1).permute(3, 0, 1, 2)


def _weights(plan: TilePlan, scale: int) -> Iterator[Tensor]:
    """Of each tile, its share [H, W, 1] at each position; over all tiles they sum to one."""
    rows, columns = (
        [_ramp(span, spans, plan.overlap, scale) for span in spans] for spans in (plan.rows, plan.columns)
    )
    for row in rows:
        for column in columns:
            yield (row[:, None] * column)[..., None]


def _ramp(span: Span, spans: Sequence[Span], overlap: int, scale: int) -> Tensor:
    """The share of a span: it rises and falls linearly over the overlap with its neighbours.

    Neighbours overlap by as much as `overlap` positions of the latent; further ones, of short spans, may too.
    """
    position = torch.arange(span[0] * scale, span[1] * scale) + 0.5
    heights = [
        torch.minimum(position - start * scale, stop * scale - position).clamp(0, max(overlap, 1) * scale)
        for start, stop in spans
    ]
    return heights[spans.index(span)] / sum(heights)


def _place(tile: Tile, scale: int) -> Cut:
    (top, bottom), (left, right) = tile
    return slice(top * scale, bottom * scale), slice(left * scale, right * scale)


def _picture_shape(vae: WanVAE, chunks: Sequence[Tensor], plan: TilePlan) -> tuple[int, ...]:
    scale = vae.config.stride[1]
    return sum(_frame_nums(vae, chunks)), *(side * scale for side in plan.sides), 3


def _frame_nums(vae: WanVAE, chunks: Sequence[Tensor]) -> list[int]:
    """Video frames that come of each chunk of the latent [z, T, h, w]."""
    period = vae.config.stride[0]
    return [period * chunk.shape[1] - (period - 1) * (not index) for index, chunk in enumerate(chunks)]


def _check_sides(plan: TilePlan, sides: Sequence[int], scale: int) -> None:
    expected = tuple(side * scale for side in plan.sides)
    assert tuple(sides) == expected, f"{tuple(sides)} is not what was planned, {expected}"
