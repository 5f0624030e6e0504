"""Buffers in turn: pieces cover all bytes once, reuse behind a fence, readers side by side, failures."""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from chitu_core._staging import Piece, Ring, Staging, batches, carry, fence
from chitu_core._weight_files import Entry, Stored

CPU = torch.device("cpu")


def make_stored(key: str, content: np.ndarray, read=None) -> Stored:
    def from_memory(begin: int, out: np.ndarray) -> None:
        np.copyto(out, content[begin : begin + out.nbytes])

    entry = Entry(Path("x"), key, (content.nbytes // 2,), torch.bfloat16, 0)
    return Stored(entry, read or from_memory)


def make_tensors(*sizes: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {f"t{i}": generator.integers(0, 256, size, np.uint8) for i, size in enumerate(sizes)}


class Recorder:
    """Puts pieces together again."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}
        self.ended: list[str] = []

    def deliver(self, piece: Piece, staged: Tensor) -> None:
        key = piece.stored.entry.key
        assert piece.begin == sum(part.numel() for part in self.found.setdefault(key, []))  # in order
        self.found[key].append(staged.clone())
        if piece.is_last:
            self.ended.append(key)


class LazyDevice:
    """Copies out of a buffer no earlier than somebody waits for it."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.queue: list[tuple[Piece, Tensor]] = []
        self.num_done = 0

    def deliver(self, piece: Piece, staged: Tensor) -> None:
        self.queue.append((piece, staged))

    def mark(self) -> "LazyDevice.Fence":
        return LazyDevice.Fence(self, len(self.queue))

    @dataclass(frozen=True)
    class Fence:
        device: "LazyDevice"
        end: int

        def synchronize(self) -> None:
            while self.device.num_done < self.end:
                self.device.recorder.deliver(*self.device.queue[self.device.num_done])
                self.device.num_done += 1


def make_ring(staging: Staging, mark=lambda: fence(CPU)) -> Ring:
    return Ring([torch.zeros(staging.buffer_bytes, dtype=torch.uint8) for _ in range(staging.buffers)], mark)


@pytest.mark.parametrize("buffer_bytes", [64, 100, 256, 10_000])
def test_pieces_cover_every_byte_once_and_never_overlap_in_a_buffer(buffer_bytes):
    sizes = (0, 2, 64, 66, 0, 254, 1000, 6, 0)
    tensors = [make_stored(key, content) for key, content in make_tensors(*sizes).items()]
    covered = dict.fromkeys((stored.entry.key for stored in tensors), 0)
    for batch in batches(tensors, buffer_bytes):
        end = 0
        for piece in batch:
            assert end <= piece.position
            end = piece.position + piece.num_bytes
            assert end <= buffer_bytes or piece.num_bytes == 0
            assert piece.position % 64 == piece.begin % 2 == piece.num_bytes % 2 == 0
            assert covered[piece.stored.entry.key] == piece.begin
            covered[piece.stored.entry.key] += piece.num_bytes
    assert tuple(covered.values()) == sizes


def test_tensors_of_few_bytes_share_a_buffer():
    tensors = [make_stored(key, content) for key, content in make_tensors(*[10] * 40).items()]
    assert [len(batch) for batch in batches(tensors, 1024)] == [16, 16, 8]


@pytest.mark.parametrize(
    "staging", [Staging(1, 1, 64), Staging(4, 2, 64), Staging(3, 8, 100), Staging(8, 4, 4096)]
)
def test_what_is_carried_arrives_whole_and_in_order(staging):
    contents = make_tensors(0, 1000, 2, 0, 64, 130, *[6] * 50, 4098)
    recorder = Recorder()
    tensors = [make_stored(key, content) for key, content in contents.items()]
    carry(tensors, make_ring(staging), staging, recorder.deliver)
    assert recorder.ended == list(contents)
    for key, content in contents.items():
        assert torch.equal(torch.cat(recorder.found[key]), torch.from_numpy(content))


@pytest.mark.parametrize("staging", [Staging(1, 1, 64), Staging(4, 2, 64), Staging(3, 8, 128)])
def test_a_buffer_is_not_filled_again_before_the_copies_out_of_it_have_passed(staging):
    contents = make_tensors(1000, 2, 64, 130, 2000)
    device = LazyDevice(recorder := Recorder())
    tensors = [make_stored(key, content) for key, content in contents.items()]
    carry(tensors, make_ring(staging, device.mark), staging, device.deliver)
    assert device.num_done == len(device.queue)
    for key, content in contents.items():
        assert torch.equal(torch.cat(recorder.found[key]), torch.from_numpy(content))


def test_readers_read_side_by_side():
    barrier = threading.Barrier(4, timeout=30)  # passes only when four are inside

    def read(begin: int, out: np.ndarray) -> None:
        barrier.wait()
        out.fill(7)

    staging = Staging(readers=4, buffers=8, buffer_bytes=64)
    recorder = Recorder()
    carry([make_stored("t", np.zeros(64 * 8, np.uint8), read)], make_ring(staging), staging, recorder.deliver)
    assert torch.cat(recorder.found["t"]).eq(7).all()


@pytest.mark.parametrize("who", ["reader", "deliver"])
def test_a_failure_half_way_is_raised_and_leaves_no_thread(who):
    def read(begin: int, out: np.ndarray) -> None:
        if who == "reader" and begin >= 640:
            raise ValueError(f"byte {begin} is gone")

    def deliver(piece: Piece, staged: Tensor) -> None:
        if who == "deliver" and piece.begin >= 640:
            raise ValueError(f"byte {piece.begin} is gone")

    staging = Staging(readers=4, buffers=4, buffer_bytes=64)
    before = threading.active_count()
    with pytest.raises(ValueError, match="byte 640 is gone"):
        carry([make_stored("t", np.zeros(64 * 30, np.uint8), read)], make_ring(staging), staging, deliver)
    assert threading.active_count() == before
