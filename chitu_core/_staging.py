"""Bytes on their way from files to a device: readers fill a ring of buffers, one thread hands them on.

A buffer is filled again only when the copies out of it have passed, so host memory stays that of the ring,
and reading, the bus and the device's casts overlap. Leaves out what the bytes are for.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from chitu_core._weight_files import Stored

_ALIGNMENT = 64  # bytes; of a piece in its buffer, so that it can be seen as any dtype


@dataclass(frozen=True)
class Staging:
    """How much is on its way at once. Pinned memory on a GPU's host: buffers * buffer_bytes."""

    readers: int = 8
    buffers: int = 16
    buffer_bytes: int = 16 * 2**20


STAGING = Staging()


@dataclass(frozen=True)
class Piece:
    """A run of whole elements of one tensor, and where it lies in its buffer. All in bytes."""

    stored: Stored
    begin: int
    num_bytes: int
    position: int

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends with this piece."""
        return self.begin + self.num_bytes == self.stored.entry.num_bytes

    def of(self, buffer: Tensor) -> Tensor:
        """The bytes of this piece, a view of its buffer [num_bytes]."""
        return buffer[self.position : self.position + self.num_bytes]


class Fence(Protocol):
    """A point in a device's work."""

    def synchronize(self) -> None:
        """Wait until the device is past it."""


class NoFence:
    """On a CPU a copy has passed when the call returns."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def fence(device: torch.device) -> Fence:
    """The end of what the device's current stream has been given so far."""
    if device.type != "cuda":
        return NoFence()
    event = torch.cuda.Event(blocking=True)  # a wait that spins would take a core from the readers
    event.record(torch.cuda.current_stream(device))
    return event


class Ring:
    """Buffers in turn: of uint8, pinned for a GPU. `give` returns one whose copies may still be under way."""

    def __init__(self, buffers: Iterable[Tensor], mark: Callable[[], Fence]) -> None:
        self._mark = mark
        self._free: deque[tuple[Tensor, Fence]] = deque((buffer, NoFence()) for buffer in buffers)

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> Tensor:
        """The buffer that was given back first, once nothing reads it any more."""
        buffer, last_use = self._free.popleft()
        last_use.synchronize()
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Give a buffer back; it is taken again only when all work queued so far has passed."""
        self._free.append((buffer, self._mark()))

    def wait(self) -> None:
        """Wait until nothing reads any buffer that was given back."""
        for _, last_use in self._free:
            last_use.synchronize()


def ring(staging: Staging, num_bytes: int, device: torch.device) -> Ring:
    """A ring for `num_bytes` in all: no more buffers than they fill."""
    is_aligned = staging.buffer_bytes > 0 and staging.buffer_bytes % _ALIGNMENT == 0
    assert is_aligned, f"buffer_bytes must be a multiple of {_ALIGNMENT}, got {staging.buffer_bytes}"
    count = min(staging.buffers, 1 + num_bytes // staging.buffer_bytes)
    is_pinned = device.type == "cuda"
    buffers = [
        torch.empty(staging.buffer_bytes, dtype=torch.uint8, pin_memory=is_pinned) for _ in range(count)
    ]
    return Ring(buffers, lambda: fence(device))


def batches(tensors: Iterable[Stored], buffer_bytes: int) -> Iterator[list[Piece]]:
    """Fill buffers with tensors one after another: small ones share a buffer, a large one takes several.

    Each tensor has a piece, an empty one too.
    """
    batch: list[Piece] = []
    position = 0
    for stored in tensors:
        begin, total, itemsize = 0, stored.entry.num_bytes, stored.entry.dtype.itemsize
        while True:
            room = max(0, buffer_bytes - position) // itemsize * itemsize
            if room == 0 and begin < total:
                yield batch
                batch, position = [], 0
                continue
            piece = Piece(stored, begin, min(room, total - begin), position)
            batch.append(piece)
            position += -(-piece.num_bytes // _ALIGNMENT) * _ALIGNMENT
            begin += piece.num_bytes
            if begin == total:
                break
    if batch:
        yield batch


def carry(
    tensors: Iterable[Stored], buffers: Ring, staging: Staging, deliver: Callable[[Piece, Tensor], None]
) -> None:
    """Read tensors into the buffers with several threads, and `deliver` the pieces in order in this one.

    `deliver` gets a piece and its bytes, a view of a buffer that stays as it is until the work queued on the
    device by then has passed. Raises what a reader or `deliver` raises; no thread is left either way.
    """
    most = max(1, len(buffers) * 3 // 4)  # of buffers being filled; the others are being emptied
    pool = ThreadPoolExecutor(staging.readers, thread_name_prefix="weights")
    filling: deque[tuple[Future[None], list[Piece], Tensor]] = deque()

    def settle() -> None:
        future, batch, buffer = filling.popleft()
        future.result()
        for piece in batch:
            deliver(piece, piece.of(buffer))
        buffers.give(buffer)

    try:
        for batch in batches(tensors, staging.buffer_bytes):
            if len(filling) == most:
                settle()
            buffer = buffers.take()
            filling.append((pool.submit(_fill, batch, buffer), batch, buffer))
        while filling:
            settle()
        buffers.wait()
    finally:
        pool.shutdown(cancel_futures=True)


def _fill(batch: list[Piece], buffer: Tensor) -> None:
    for piece in batch:
        piece.stored.read(piece.begin, piece.of(buffer).numpy())
