"""Where an image is cut into tiles, and what of its surroundings each needs: numbers alone, no tensors.

The layers of a network that stay at the size of the latent see the whole image. Through the others, `fine`, a
tile goes with a halo as wide as its pixels look around, which is trimmed before every change of resolution.
Where that takes too much work tiles overlap instead, and what overlaps is blended.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import ceil
from typing import Literal

from torch import nn

from chitu_diffusion.vaes._calls import calls
from chitu_diffusion.vaes.wan import Decoder, Downsample, Encoder, Upsample

MAX_WORK = 2.0  # times the products of the whole; exact tiles that take more give way to blended ones
MIN_TILE_PX = 64

Span = tuple[int, int]  # from the first to before the last
Tile = tuple[Span, Span]  # rows and columns


@dataclass(frozen=True)
class Stop:
    """Before `layer` a tile is trimmed to its own part and `halo` positions around it.

    There are `scale` positions to one of the latent. `layer` is None at the start and at the end.
    """

    layer: nn.Module | None
    scale: int
    halo: int


@dataclass(frozen=True)
class TilePlan:
    """How an image of `sides` latent rows and columns is cut.

    The spans are in latent positions: of `exact` tiles what each gives, of `blended` ones all that each
    computes, neighbours sharing `overlap`. `work` counts products of convolutions, relative to the whole.
    """

    mode: Literal["whole", "exact", "blended"]
    sides: tuple[int, int]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    overlap: int
    work: float

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles, row by row."""
        return tuple(product(self.rows, self.columns))

    def stops(self, net: Encoder | Decoder) -> tuple[Stop, ...]:
        """Where tiles are trimmed; blended ones have no halo."""
        found = stops(net.fine)
        return found if self.mode == "exact" else tuple(replace(stop, halo=0) for stop in found)


def plan_tiles(net: Encoder | Decoder, rows: int, columns: int, tile_px: int, stride_px: int) -> TilePlan:
    """Cut an image of `rows` x `columns` latent positions into tiles of at most `tile_px` pixels a side.

    Exact tiles hold their halo in that. Of both sides cut, or one, it is the cut with the smallest tiles
    that takes at most `MAX_WORK`; without one tiles are blended, and start at most `stride_px` apart.
    Raises ValueError for a tile below 64 px, a stride not in (0, tile), and either not a multiple of 8.
    """
    around = stops(net.fine)
    scale = max(stop.scale for stop in around)
    _check_px(tile_px, stride_px, scale)
    tile, overlap, sides = tile_px // scale, (tile_px - stride_px) // scale, (rows, columns)
    if max(sides) <= tile:
        return TilePlan("whole", sides, ((0, rows),), ((0, columns),), 0, 1.0)
    margin = max(ceil(stop.halo / stop.scale) for stop in around if stop.scale >= scale // 2)  # near pixels
    exact = [
        _weighed(net, TilePlan("exact", sides, *cut, 0, 0.0)) for cut in _ways_to_cut(sides, tile, margin)
    ]
    affordable = [plan for plan in exact if plan.work <= MAX_WORK]
    if affordable:
        return min(affordable, key=lambda plan: max(map(_size, plan.tiles)))
    across, along = (_overlapping(side, tile, overlap) for side in sides)
    return _weighed(net, TilePlan("blended", sides, across, along, overlap, 0.0))


def stops(layers: Sequence[nn.Module]) -> tuple[Stop, ...]:
    """Where a tile is trimmed on its way through `fine` layers, and how far its pixels look from there."""
    scale, halo = 2 ** sum(isinstance(layer, Upsample) for layer in layers), 0
    found = [Stop(None, scale, halo)]
    for layer in reversed(layers):
        if isinstance(layer, Upsample):
            scale, halo = scale // 2, (halo + 2) // 2  # of halo + 1 there, for the 3 x 3, the half rounded up
            found.append(Stop(layer, scale, halo))
        elif isinstance(layer, Downsample):
            scale, halo = 2 * scale, 2 * halo + 1  # its 3 x 3 sees one position beyond a pair
            found.append(Stop(layer, scale, halo + 1))  # pairs stay whole
        else:
            convolutions = (part for part in layer.modules() if isinstance(part, nn.Conv3d))
            halo += sum(conv.kernel_size[1] // 2 for conv in convolutions)
    return (Stop(None, scale, halo), *reversed(found))


def reach(span: Span, side: int, stop: Stop) -> Span:
    """The positions at a stop of a span of the latent, with its halo, which ends where the image does."""
    return max(0, span[0] * stop.scale - stop.halo), min(side * stop.scale, span[1] * stop.scale + stop.halo)


def trims(around: Sequence[Stop], tile: Tile, sides: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Of each stop, the rows and columns that stay, counted in what has come there; first, in the image."""
    regions = [[reach(span, side, stop) for span, side in zip(tile, sides, strict=True)] for stop in around]
    yield _slices(regions[0], (0, 0))
    for (before, stop), (region, kept) in zip(pairwise(around), pairwise(regions), strict=True):
        yield _slices(kept, [start * stop.scale // before.scale for start, _ in region])


def tile_sizes(
    around: Sequence[Stop], tile: Tile, sides: tuple[int, int]
) -> tuple[tuple[int, int], dict[nn.Module, tuple[int, int]]]:
    """Rows and columns of a tile at the start, and before each layer that it is trimmed at."""
    cuts = trims(around, tile, sides)
    lengths = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in cuts]
    inside = zip(around, lengths, strict=True)
    return lengths[0], {stop.layer: length for stop, length in inside if stop.layer is not None}


def kinds(
    around: Sequence[Stop], tiles: Sequence[Tile], sides: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], dict[nn.Module, tuple[int, int]], int]]:
    """`tile_sizes` of tiles, once for all that are alike, and how many these are."""
    found = [tile_sizes(around, tile, sides) for tile in tiles]
    alike = [(size, tuple(windows.values())) for size, windows in found]
    counts, first = Counter(alike), dict(zip(alike, found, strict=True))
    for key, (size, windows) in first.items():
        yield size, windows, counts[key]


def _slices(region: Sequence[Span], origin: Sequence[int]) -> tuple[slice, slice]:
    rows, columns = (
        slice(start - first, stop - first) for (start, stop), first in zip(region, origin, strict=True)
    )
    return rows, columns


def _check_px(tile_px: int, stride_px: int, scale: int) -> None:
    for key, value in (("vae_tile_px", tile_px), ("vae_tile_stride_px", stride_px)):
        if value % scale:
            raise ValueError(f"infer.{key} must be a multiple of {scale}, got {value}")
    if tile_px < MIN_TILE_PX:
        raise ValueError(f"infer.vae_tile_px must be at least {MIN_TILE_PX}, got {tile_px}")
    if not 0 < stride_px < tile_px:
        raise ValueError(
            "infer.vae_tile_stride_px must be above 0 and below "
            f"infer.vae_tile_px = {tile_px}, got {stride_px}"
        )


def _ways_to_cut(
    sides: tuple[int, int], tile: int, margin: int
) -> Iterator[tuple[tuple[Span, ...], tuple[Span, ...]]]:
    if tile <= 2 * margin:
        return
    whole = tuple(((0, side),) for side in sides)
    cut = tuple(_adjacent(side, tile, margin) for side in sides)
    for rows, columns in dict.fromkeys(product((whole[0], cut[0]), (whole[1], cut[1]))):
        if (rows, columns) != whole:
            yield rows, columns


def _adjacent(side: int, tile: int, margin: int) -> tuple[Span, ...]:
    """Spans side by side, each with `margin` on its inner ends at most a tile long."""
    if side <= tile:
        return ((0, side),)
    inner = side - 2 * margin
    count = ceil(inner / (tile - 2 * margin))
    bounds = [margin + inner * index // count for index in range(1, count)]
    return tuple(pairwise([0, *bounds, side]))


def _overlapping(side: int, tile: int, overlap: int) -> tuple[Span, ...]:
    """Spans of at most a tile, about equally long, that share `overlap` with the next."""
    if side <= tile:
        return ((0, side),)
    inner = side - overlap
    count = ceil(inner / (tile - overlap))
    bounds = [inner * index // count for index in range(count + 1)]
    return tuple((start, stop + overlap) for start, stop in pairwise(bounds))


def _size(tile: Tile) -> int:
    (top, bottom), (left, right) = tile
    return (bottom - top) * (right - left)


def _weighed(net: Encoder | Decoder, plan: TilePlan) -> TilePlan:
    """The plan with its work."""
    image: Tile = ((0, plan.sides[0]), (0, plan.sides[1]))
    coarse = sum(call.products for call in calls(net.coarse, (1, *plan.sides), {}, is_first=False))
    whole = coarse + _fine_products(net, [image], plan)
    work = coarse + _fine_products(net, plan.tiles, plan)
    return replace(plan, work=work / whole)


def _fine_products(net: Encoder | Decoder, tiles: Sequence[Tile], plan: TilePlan) -> float:
    """Products that tiles take for each latent frame."""
    halvings = sum(isinstance(layer, Downsample) and layer.time_conv is not None for layer in net.fine)
    frames = 2**halvings  # that make one of the latent
    return sum(
        count * call.products
        for size, windows, count in kinds(plan.stops(net), tiles, plan.sides)
        for call in calls(net.fine, (frames, *size), windows, is_first=False)
    )
