"""Files that a run writes: a video encoded while decoding goes on, and JSON, each whole or not at all.

Encoding uses PyAV, in this process: imageio's PyAV plugin, which wraps it, has no public way to set the crf.
No audio, no images, and no rule about names beyond `unique_path` (folders and names: outputs.py)."""

import dataclasses
import json
import math
import os
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import torch
from torch import Tensor

CRF = "10"  # imageio's quality 8, which the Wan release writes: int((1 - 0.8) * 51)
BT709_PRIMARIES, BT709_TRANSFER, BT601_MATRIX = 1, 1, 6  # codes of ITU-T H.273
LIMITED_RANGE = 1  # FFmpeg's code
RECORD_SUFFIX = ".json"  # of the file beside a video that says what was run
WRITE_ERRORS = (OSError, ValueError, av.FFmpegError)  # what a `VideoWriter` raises


class VideoWriter:
    """Encodes frames to H.264 in a thread while decoding goes on; the file appears whole or not at all.

    `with VideoWriter(path, fps, size) as writer: writer.put(frames)` closes, or aborts on an exception.
    Not for use from several threads. Source of range, quality and truncation: reference/wan.md section 7."""

    def __init__(
        self, path: Path, fps: int | float, size: tuple[int, int], *, keeps_existing: bool = False
    ) -> None:
        """Open a hidden temporary file beside `path`; `size` is (width, height) in pixels, both even. With
        `keeps_existing` a name that a video or a record has becomes name_2, name_3, ..., whoever took it in
        the meantime.
        Raises ValueError for a bad fps or size, OSError if the folder cannot be written."""
        self.path = path
        self._keeps_existing = keeps_existing
        self._size = size
        self._frame_num = 0
        self._put_num = 0
        rate = _frame_rate(fps)
        if min(size) < 2 or any(side % 2 for side in size):
            raise ValueError(f"video size must be even and positive, got {size}; use multiples of 16")
        self._temporary = path.with_name(f".video-{os.getpid()}-{secrets.token_hex(4)}.tmp")
        with ExitStack() as undo:
            # A Python file, not a path: its write errors (disk full) always reach us, and it can be synced.
            self._file = undo.enter_context(self._temporary.open("xb"))
            undo.callback(self._temporary.unlink, missing_ok=True)
            self._container = av.open(self._file, mode="w", format="mp4")
            self._stream = self._container.add_stream("libx264", rate=rate, options=_encoder_options())
            # Whole frames side by side: on 16 cores a fifth faster than slices, PyAV's default, and smaller.
            self._stream.codec_context.thread_type = "FRAME"
            self._stream.width, self._stream.height = size
            self._stream.pix_fmt = "yuv420p"
            self._tag_colours()
            undo.pop_all()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="video-writer")
        self._encodings: list[Future[None] | None] = [None, None]  # the last one of each pinned buffer
        self._pinned: list[Tensor | None] = [None, None]
        self._is_open = True

    @torch.inference_mode()
    def put(self, frames: Tensor) -> None:
        """Hand over `frames`, [3, n, H, W] float in [-1, 1] (clamped) or [n, H, W, 3] uint8, on CPU or CUDA;
        waits only when two earlier puts are still being encoded. Raises OSError naming the path if an earlier
        put failed."""
        width, height = self._size
        assert self._is_open, "put after close or abort"
        pixels = frames if frames.dtype == torch.uint8 else to_pixels(frames)
        assert pixels.shape == (len(pixels), height, width, 3), pixels.shape
        with ExitStack() as undo:
            undo.callback(self.abort)
            slot = self._put_num % 2
            self._put_num += 1
            self._wait(self._encodings[slot])
            other = self._encodings[1 - slot]
            if other is not None and other.done():
                self._wait(other)
            copied = None
            if pixels.is_cuda:
                pixels, copied = self._copy_to_host(pixels, slot)
            self._encodings[slot] = self._thread.submit(self._encode, pixels, copied)
            undo.pop_all()

    def close(self) -> Path:
        """Wait for the encoder, rename the temporary file, and return its path; what is there is replaced.
        Raises OSError naming the path if it could not be written, ValueError without frames; both abort."""
        if not self._is_open:
            return self.path
        with ExitStack() as undo:
            undo.callback(self.abort)
            for encoding in (self._encodings[self._put_num % 2], self._encodings[1 - self._put_num % 2]):
                self._wait(encoding)
            if self._frame_num == 0:
                raise ValueError(f"no frame was put into the video {self.path}")
            self._wait(self._thread.submit(self._finish))
            undo.pop_all()
        self._is_open = False
        self._thread.shutdown()
        return self.path

    def abort(self) -> None:
        """Stop, and remove the temporary file; nothing appears at the path. Does nothing after close."""
        if not self._is_open:
            return
        self._is_open = False
        self._thread.shutdown(cancel_futures=True)
        # The file goes away: it does not matter whether a full disk refuses its trailer or its last bytes.
        with suppress(OSError, av.FFmpegError):
            self._container.close()
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def _tag_colours(self) -> None:
        """NOTE: players guess the matrix of an untagged file from its height: BT.601 or BT.709. It is BT.601,
        FFmpeg's choice for RGB input, so that readers which ignore tags (OpenCV) are right too."""
        codec = self._stream.codec_context
        codec.color_primaries, codec.color_trc = BT709_PRIMARIES, BT709_TRANSFER
        codec.colorspace, codec.color_range = BT601_MATRIX, LIMITED_RANGE

    def _copy_to_host(self, pixels: Tensor, slot: int) -> tuple[Tensor, torch.cuda.Event]:
        """Start the copy into the slot's pinned buffer, on the current stream; the event says it is there."""
        buffer = self._pinned[slot]
        if buffer is None or buffer.numel() < pixels.numel():
            buffer = self._pinned[slot] = torch.empty(pixels.numel(), dtype=torch.uint8, pin_memory=True)
        host = buffer[: pixels.numel()].view(pixels.shape)
        host.copy_(pixels, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record(torch.cuda.current_stream(pixels.device))
        return host, copied

    def _encode(self, pixels: Tensor, copied: torch.cuda.Event | None) -> None:  # [n, H, W, 3], in the thread
        if copied is not None:
            copied.synchronize()
        for picture in pixels.numpy():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            self._container.mux(self._stream.encode(frame))
            self._frame_num += 1

    def _finish(self) -> None:  # in the thread
        self._container.mux(self._stream.encode(None))
        self._container.close()
        if self._keeps_existing:
            self.path = _publish_beside(self._file.fileno(), self._temporary, self.path)
        else:
            _publish(self._file.fileno(), self._temporary, self.path)
        self._file.close()

    def _wait(self, encoding: Future[None] | None) -> None:
        if encoding is None:
            return
        try:
            encoding.result()
        except (OSError, av.FFmpegError) as error:
            reason = f"{error.strerror or error}; the video was not written"
            raise OSError(error.errno, reason, str(self.path)) from error


def write_json(path: Path, record: object) -> None:
    """Write a dataclass, or anything JSON can hold, as indented UTF-8; the file at `path` is replaced whole.
    Raises ValueError for NaN or infinity, TypeError for other values, OSError if the disk refuses."""
    text = json.dumps(record, default=_plain, ensure_ascii=False, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; see `write_bytes`."""
    # a lone surrogate (an argument that was not UTF-8) becomes \udcXX, which JSON reads back
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file; the one at `path` is replaced at once, or stays when this raises OSError."""
    temporary = path.with_name(f".file-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with ExitStack() as undo:
        undo.callback(temporary.unlink, missing_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            _publish(file.fileno(), temporary, path)
        undo.pop_all()


def unique_path(path: Path, *suffixes: str) -> Path:
    """`path` if nothing is there, else the first free of name_2, name_3, ... before the extension.
    `suffixes` are those of files that go with it: a name that one of them has is not free either."""
    candidate, count = path, 1
    while any(os.path.lexists(candidate.with_suffix(suffix)) for suffix in (path.suffix, *suffixes)):
        count += 1
        candidate = path.with_name(f"{path.stem}_{count}{path.suffix}")
    return candidate


def _publish(descriptor: int, temporary: Path, path: Path) -> None:
    os.fsync(descriptor)  # some file systems report a full disk only here
    os.replace(temporary, path)


def _publish_beside(descriptor: int, temporary: Path, path: Path) -> Path:
    """Give a video the first free name. A link, unlike a rename, fails where another process was faster."""
    os.fsync(descriptor)
    while True:
        free = unique_path(path, RECORD_SUFFIX)
        try:
            os.link(temporary, free)
        except FileExistsError:
            continue
        except OSError:  # a file system without links, or no right to make them
            os.replace(temporary, free)
            return free
        temporary.unlink()
        return free


def _encoder_options() -> dict[str, str]:
    """NOTE with AVX-512 libx264 makes several files from the same noisy frames (21 of 36); with AVX2 one."""
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return {"crf": CRF} | ({"x264-params": "asm=AVX2"} if has_avx512 else {})


def _frame_rate(fps: int | float) -> Fraction:
    if not (math.isfinite(fps) and 0.001 <= fps <= 1000):
        raise ValueError(
            f"fps must be between 0.001 and 1000 frames a second, got {fps}; Wan models play at 16"
        )
    return Fraction(fps).limit_denominator(1001)  # exact for the NTSC rates, n * 1000 / 1001


def to_pixels(frames: Tensor) -> Tensor:
    """Frames [3, n, H, W] float to [n, H, W, 3] uint8 on the same device; values beyond [-1, 1] are clamped.

    Truncates as the Wan release does, in its order of operations: equal frames, equal bytes."""
    scaled = (frames.float().clamp(-1, 1) + 1) / 2 * 255
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
