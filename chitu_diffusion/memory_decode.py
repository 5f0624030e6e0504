"""What a decode takes of the device, whole, in strips or in tiles, and the work of tiles.

Several ranks of a replica decode in strips at every level; one decodes in tiles from the level `TILED` on.
"""

from dataclasses import dataclass
from math import prod

import torch

from chitu_core.config import VideoSize
from chitu_diffusion.footprint import FP32_BYTES
from chitu_diffusion.memory_setting import TILED, Setting
from chitu_diffusion.vaes._footprint import footprint
from chitu_diffusion.vaes._tile_plan import TilePlan, plan_tiles
from chitu_diffusion.vaes.wan import Decoder

_COLOURS = 3
_NEIGHBOUR_LINES = 2  # one of the strip before, one of the strip after


@dataclass(frozen=True)
class Decode:
    """Bytes of a decode on one rank's device, above weights and latents: of its layers, and kept beside them.

    `work` counts products, relative to those of the whole.
    """

    device_bytes: int
    kept_bytes: int
    work: float


def plan_decode(setting: Setting, video: VideoSize, level: int) -> Decode:
    """What decoding a video takes at a level. Raises ValueError as `plan_tiles` does."""
    decoder, latent = setting.vae.decoder, _decoded(setting, video)
    tiles = _tiles(setting, decoder, latent) if level >= TILED else None
    need = footprint(
        setting.vae,
        decoder,
        latent,
        setting.vae_chunk,
        tiles,
        dtype=setting.vae_dtype,
        capability=setting.capability,
    )
    held = need.total - setting.vae_bytes + _picture_bytes(setting, latent, tiles)
    if tiles is None:
        return Decode(held, 0, 1.0)
    return Decode(held, _kept_bytes(setting, video, tiles), tiles.work)


def _decoded(setting: Setting, video: VideoSize) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a rank; a strip of the longer side has its neighbours' lines."""
    frames, rows, columns = setting.latent(video)
    ranks, long = setting.degrees.replica, max(rows, columns)
    if ranks == 1:
        return frames, rows, columns
    strip = min(long, -(-long // ranks) + _NEIGHBOUR_LINES)
    return (frames, strip, columns) if rows >= columns else (frames, rows, strip)


def _tiles(setting: Setting, decoder: Decoder, latent: tuple[int, int, int]) -> TilePlan | None:
    """None where nothing is cut, as strips never are."""
    if setting.degrees.replica > 1:
        return None
    plan = plan_tiles(decoder, *latent[1:], setting.tile_px, setting.tile_stride_px)
    return None if plan.mode == "whole" else plan


def _picture_bytes(setting: Setting, latent: tuple[int, int, int], tiles: TilePlan | None) -> int:
    """Pictures of the chunk before, which the caller still names: of the image, or of its largest tile."""
    frames, rows, columns = latent
    area = rows * columns
    if tiles is not None:
        area = max((bottom - top) * (right - left) for (top, bottom), (left, right) in tiles.tiles)
    return FP32_BYTES * _COLOURS * min(setting.vae_chunk, frames) * area * prod(setting.sizes.vae.stride)


def _kept_bytes(setting: Setting, video: VideoSize, tiles: TilePlan) -> int:
    """Features and pictures that are kept until the last tile is through: `vaes/_tiles.py`."""
    size, pictures = setting.sizes.vae, torch.float16 if tiles.mode == "blended" else torch.uint8
    features = prod(setting.latent(video)) * size.base_dim * size.dim_mult[-1] * setting.vae_dtype.itemsize
    return features + video.num_frames * video.height * video.width * _COLOURS * pictures.itemsize
