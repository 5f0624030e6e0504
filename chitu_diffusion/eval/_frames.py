"""Frames of a video file, read with PyAV: how many there are, and those that a metric looks at.

Frames are chosen by their place between first and last, in each video separately, so that videos of other
frame rates and counts are compared at the same moments of their course. Source: mission.md 8."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from chitu_diffusion.eval._base import Pair, UnfitPair, UnreadableVideo

MOST_FRAMES = 16  # of a video that a metric looks at
Frames = NDArray[np.uint8]  # [n, H, W, 3], RGB


@dataclass(frozen=True)
class VideoFacts:
    """Pixels, count and rate (frames a second, None if unknown) of a file that was read to its end."""

    width: int
    height: int
    num_frames: int
    fps: float | None


@dataclass(frozen=True)
class FramePair:
    """As many frames of each video, and what to know about how they were chosen."""

    generated: Frames
    reference: Frames
    note: str


def facts_of(path: Path) -> VideoFacts:
    """Read a video to its end. Raises UnreadableVideo for a file that is missing, broken, or has no frame."""
    count, width, height = 0, 0, 0
    rate = None
    for frame, fps in _decode(path):
        if count and (frame.width, frame.height) != (width, height):
            raise UnreadableVideo(f"{_named(path)} changes its size at frame {count}")
        width, height, rate = frame.width, frame.height, fps
        count += 1
    if count == 0:
        raise UnreadableVideo(f"{_named(path)} holds no frame")
    return VideoFacts(width, height, count, rate)


def read_frames(path: Path, total: int, count: int) -> Frames:
    """`count` of the video's `total` frames, evenly spaced from first to last: uint8 [count, H, W, 3]. Raises
    UnreadableVideo."""
    wanted = set(spread(total, count))
    chosen = [
        frame.to_ndarray(format="rgb24") for place, (frame, _) in enumerate(_decode(path)) if place in wanted
    ]
    return np.stack(chosen)


def frame_batches(path: Path, size: int) -> Iterator[Frames]:
    """All frames, `size` at a time. Raises UnreadableVideo."""
    batch: list[Frames] = []
    for frame, _ in _decode(path):
        batch.append(frame.to_ndarray(format="rgb24"))
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def read_pair(pair: Pair, *, same_size: bool) -> FramePair:
    """min(frames of one, of the other, 16) frames of each video.

    Raises UnreadableVideo, and UnfitPair if `same_size` is asked for and their sizes differ."""
    assert pair.reference is not None
    ours, theirs = facts_of(pair.generated), facts_of(pair.reference)
    sizes = [f"{one.width}x{one.height}" for one in (ours, theirs)]
    if same_size and sizes[0] != sizes[1]:
        raise UnfitPair(f"generated is {sizes[0]}, reference {sizes[1]}; make them the same size")
    count = min(ours.num_frames, theirs.num_frames, MOST_FRAMES)
    notes = []
    if ours.num_frames != theirs.num_frames:
        notes.append(f"{ours.num_frames} and {theirs.num_frames} frames, compared at {count} places")
    if ours.fps != theirs.fps:
        notes.append(f"{ours.fps or 0:g} and {theirs.fps or 0:g} frames a second")
    return FramePair(
        read_frames(pair.generated, ours.num_frames, count),
        read_frames(pair.reference, theirs.num_frames, count),
        "; ".join(notes),
    )


def spread(total: int, count: int) -> list[int]:
    """`count` whole numbers from 0 to `total` - 1, evenly spaced, cut to integers."""
    return [int(place) for place in np.linspace(0, total - 1, count, dtype=int)]


def _named(path: Path) -> str:
    """A video and its reference often have one name: the folder tells them apart."""
    return f"{path.parent.name}/{path.name}"


def _decode(path: Path) -> Iterator[tuple[av.VideoFrame, float | None]]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableVideo(f"{_named(path)} holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = None if stream.average_rate is None else float(stream.average_rate)
            for frame in container.decode(stream):
                yield frame, rate
    except av.error.EOFError:  # a file that ends behind its head
        return
    except (av.FFmpegError, OSError) as error:
        raise UnreadableVideo(f"{_named(path)} cannot be read: {error.strerror or error}") from error
