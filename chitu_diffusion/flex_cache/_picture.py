"""Decision pictures: what a strategy did at which step, as a binary PPM and the same as PNG."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from chitu_diffusion.media import unique_path, write_bytes

Colour = tuple[int, int, int]
CELL = 12  # pixels of a step's square


@dataclass(frozen=True)
class Picture:
    """An RGB image and the stem of its files; rows from the top, three bytes a pixel."""

    stem: str
    width: int
    height: int
    rgb: bytes


def timeline(stem: str, codes: Mapping[int, int], palette: Sequence[Colour]) -> Picture | None:
    """One row of squares, one a step, coloured by code; None for a run of no steps."""
    if not codes:
        return None
    row = b"".join(bytes(palette[codes.get(step, 0)]) * CELL for step in range(max(codes) + 1))
    return Picture(stem, len(row) // 3, CELL, row * CELL)


def write(picture: Picture, folder: Path) -> tuple[Path, Path]:
    """Write both files into `folder`, under a free name where another video's stand. Raises OSError."""
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
    ppm = unique_path(folder / f"{picture.stem}.ppm")
    paths = ppm, ppm.with_suffix(".png")
    for path, kind in zip(paths, ("PPM", "PNG"), strict=True):
        file = io.BytesIO()
        image.save(file, kind)
        write_bytes(path, file.getvalue())
    return paths
