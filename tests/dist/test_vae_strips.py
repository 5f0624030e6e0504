"""The VAE on strips of the image, several ranks under gloo, against one rank."""

from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from oracles import randomise, relative_error
from torch import Tensor
from torch import distributed as dist

from chitu_core.distributed.collectives import Line
from chitu_core.ops import conv as ops
from chitu_diffusion.vaes._strips import Strips
from chitu_diffusion.vaes.wan import WanVAE, wan21

pytestmark = pytest.mark.dist

FP32 = 1e-5  # relative L2: convolutions of other sizes sum in another order
SIDES = [(5, 3), (3, 5), (3, 3), (1, 1)]  # rows cut; columns cut; a square; fewer lines than ranks
BASE_DIM = 8


class WorldLine(Line):
    """All ranks of the default group as a line, which counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__(dist.group.WORLD)
        self.call_num = self.sent_bytes = 0

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        assert sends or receives, "an empty batch"
        assert all(tensor.is_contiguous() for _, tensor in (*sends, *receives))
        self.call_num += 1
        self.sent_bytes += sum(tensor.nbytes for _, tensor in sends)
        super().exchange(sends, receives)


class ShortLine:
    """A line that cannot exchange anything: of one rank, or for what needs no exchange."""

    def __init__(self, index: int, size: int) -> None:
        self.index, self.size = index, size

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        raise AssertionError(f"exchange of {len(sends)} and {len(receives)} tensors")


def tiny_vae() -> WanVAE:
    return randomise(WanVAE(wan21(BASE_DIM)), seed=0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def random_latent(rows: int, columns: int, frames: int = 3) -> Tensor:
    return random(16, frames, rows, columns)


def random_video(rows: int, columns: int) -> Tensor:
    return random(3, 9, 8 * rows, 8 * columns).clamp(-1, 1)


def to_pictures(chunk: Tensor) -> Tensor:  # [3, n, H, W] to uint8 [n, H, W, 3]
    return ((chunk.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8)


def decode_strips(rows: int, columns: int, latent_frames_per_chunk: int) -> list[Tensor]:
    strips = Strips(WorldLine(), rows, columns)
    return list(tiny_vae().decode(random_latent(rows, columns), latent_frames_per_chunk, strips))


def decode_strips_shifted(rows: int, columns: int) -> list[Tensor]:
    with patch.object(ops, "prefers_shifted", lambda x, dim_out: True):
        return decode_strips(rows, columns, 2)


def decode_counted(rows: int, columns: int, frames: int) -> tuple[int, int]:
    line = WorldLine()
    strips = Strips(line, rows, columns)
    for _ in tiny_vae().decode(random_latent(rows, columns, frames), strips=strips):
        pass
    return line.sent_bytes, line.call_num


def decode_and_collect(rows: int, columns: int) -> tuple[list[Tensor | None], int]:
    line = WorldLine()
    strips = Strips(line, rows, columns)
    chunks = tiny_vae().decode(random_latent(rows, columns), strips=strips)
    return [strips.collect(to_pictures(chunk), scale=8) for chunk in chunks], line.call_num


def collect_numbers(rows: int, columns: int) -> Tensor | None:
    strips = Strips(WorldLine(), rows, columns)
    numbers = torch.arange(4 * rows * columns * 3, dtype=torch.uint8).view(1, 2 * rows, 2 * columns, 3)
    return strips.collect(strips.cut(numbers, scale=2), scale=2)


def encode_strips(rows: int, columns: int) -> tuple[Tensor, int]:
    line = WorldLine()
    return tiny_vae().encode(random_video(rows, columns), Strips(line, rows, columns)), line.call_num


def swap_twice() -> list[float]:
    """Two batches of two messages each between the same two ranks."""
    line = WorldLine()
    other, received = 1 - line.index, torch.zeros(4)
    for start in (0, 2):
        sent = 10 * line.index + torch.arange(start, start + 2.0)
        slots = list(received[start : start + 2].split(1))
        line.exchange([(other, part) for part in sent.split(1)], [(other, slot) for slot in slots])
    return received.tolist()


@pytest.mark.parametrize("latent_frames_per_chunk", [1, 2])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("world", [2, 4])
def test_strips_together_are_the_video_of_one_rank(run_ranks, world, sides, latent_frames_per_chunk):
    parts = run_ranks(world, decode_strips, *sides, latent_frames_per_chunk)
    expected = tiny_vae().decode(random_latent(*sides), latent_frames_per_chunk)
    axis = 2 if sides[0] >= sides[1] else 3  # of [3, n, H, W]
    for chunk, *strips in zip(expected, *parts, strict=True):
        assert relative_error(torch.cat(strips, dim=axis), chunk) <= FP32


@pytest.mark.parametrize("sides", [(5, 3), (3, 5)])
def test_strips_by_products_of_shifted_rows_are_the_video_of_one_rank(run_ranks, sides):
    parts = run_ranks(2, decode_strips_shifted, *sides)
    for chunk, *strips in zip(tiny_vae().decode(random_latent(*sides), 2), *parts, strict=True):
        assert relative_error(torch.cat(strips, dim=2 if sides[0] >= sides[1] else 3), chunk) <= FP32


def test_an_idle_rank_yields_chunks_without_lines(run_ranks):
    *_, idle = run_ranks(4, decode_strips, 3, 2, 2)
    assert [chunk.shape for chunk in idle] == [(3, 5, 0, 16), (3, 4, 0, 16)]
    assert {chunk.dtype for chunk in idle} == {torch.float32}


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_has_the_latent_that_one_rank_encodes(run_ranks, world, sides):
    expected = tiny_vae().encode(random_video(*sides))
    for latent, _ in run_ranks(world, encode_strips, *sides):
        assert latent.shape == expected.shape
        assert relative_error(latent, expected) <= FP32


def test_pictures_are_collected_on_rank_0_alone(run_ranks):
    (pictures, _), *others = run_ranks(4, decode_and_collect, 3, 5)
    expected = torch.cat([to_pictures(chunk) for chunk in tiny_vae().decode(random_latent(3, 5))])
    assert torch.cat(pictures).shape == expected.shape
    difference = (torch.cat(pictures).int() - expected.int()).abs()
    assert difference.max() <= 1  # a value between two levels may round to either
    assert [chunks for chunks, _ in others] == [[None] * 3] * 3


@pytest.mark.parametrize("sides", SIDES)
def test_collect_joins_bytes_in_order(run_ranks, sides):
    first, *others = run_ranks(4, collect_numbers, *sides)
    rows, columns = sides
    expected = torch.arange(4 * rows * columns * 3, dtype=torch.uint8).view(1, 2 * rows, 2 * columns, 3)
    assert torch.equal(first, expected)
    assert others == [None] * 3


def test_an_idle_rank_exchanges_nothing_to_decode_and_once_to_encode(run_ranks):
    assert run_ranks(4, decode_and_collect, 3, 2)[3][1] == 0
    assert run_ranks(4, encode_strips, 3, 2)[3][1] == 1


def halo_elements(latent_frame: int) -> int:
    """Frames x scale x input channels over the decoder's 3 x 3 (x 3) convolutions, for one latent frame."""
    dim, is_first = BASE_DIM, latent_frame == 0
    layers = [  # frames of the first and of any other latent frame, scale, input channels of each convolution
        ((1, 1), 1, [16, *[4 * dim] * 4, *[4 * dim] * 6]),
        ((1, 2), 2, [4 * dim, 2 * dim, *[4 * dim] * 5]),  # an upsampling convolution begins a level
        ((1, 4), 4, [4 * dim, *[2 * dim] * 6]),
        ((1, 4), 8, [2 * dim, *[dim] * 6, dim]),
    ]
    return sum(frames[not is_first] * scale * sum(channels) for frames, scale, channels in layers)


@pytest.mark.parametrize(("world", "rows", "columns", "active"), [(2, 5, 3, 2), (4, 3, 6, 4), (4, 3, 2, 3)])
def test_a_decode_sends_the_bytes_that_the_module_states(run_ranks, world, rows, columns, active):
    frames, length, width = 3, max(rows, columns), min(rows, columns)
    counted = run_ranks(world, decode_counted, rows, columns, frames)
    halo = sum(halo_elements(frame) for frame in range(frames))
    attention = 2 * length * frames * 4 * BASE_DIM
    assert sum(sent for sent, _ in counted) == 4 * (active - 1) * width * (2 * halo + attention)
    assert [calls for _, calls in counted] == [34 * frames] * active + [0] * (world - active)


def test_messages_between_two_ranks_arrive_in_the_order_of_sending(run_ranks):
    assert run_ranks(2, swap_twice) == [[10, 11, 12, 13], [0, 1, 2, 3]]


def test_a_line_of_one_rank_changes_no_bit():
    vae, strips = tiny_vae(), Strips(ShortLine(0, 1), 3, 5)
    latent, video = random_latent(3, 5), random_video(3, 5)
    for part, whole in zip(vae.decode(latent, strips=strips), vae.decode(latent), strict=True):
        assert torch.equal(part, whole)
        assert torch.equal(strips.collect(part.permute(1, 2, 3, 0), scale=8), whole.permute(1, 2, 3, 0))
    assert torch.equal(vae.encode(video, strips), vae.encode(video))


@pytest.mark.parametrize(
    ("rows", "columns", "axis", "counts", "active"),
    [
        (90, 160, 2, (40, 40, 40, 40), 4),
        (90, 60, 1, (23, 23, 22, 22), 4),
        (5, 5, 1, (2, 1, 1, 1), 4),
        (2, 3, 2, (1, 1, 1, 0), 3),
    ],
)
def test_the_longer_side_is_shared_out_evenly(rows, columns, axis, counts, active):
    strips = [Strips(ShortLine(index, 4), rows, columns) for index in range(4)]
    assert (strips[0].axis, strips[0].counts, strips[0].active) == (axis, counts, active)
    assert [part.is_idle for part in strips] == [count == 0 for count in counts]


def test_the_parts_of_all_ranks_make_up_the_whole():
    x = random(2, 6, 14, 3)
    parts = [Strips(ShortLine(index, 4), 3, 7).cut(x, scale=2) for index in range(4)]
    assert [part.shape[2] for part in parts] == [4, 4, 4, 2]
    assert torch.equal(torch.cat(parts, dim=2), x)


def test_a_latent_of_other_sides_than_the_strips_is_refused():
    with pytest.raises(AssertionError, match=r"\(3, 4, 5, 16\) is not \[T, 3, 5, C\]"):
        next(tiny_vae().decode(random_latent(4, 5), 3, Strips(ShortLine(0, 1), 3, 5)))


def test_a_latent_without_positions_is_refused_at_once_and_not_taken_for_an_idle_part():
    with pytest.raises(ValueError, match=r"latent must be \[16, T, h, w\], got \[16, 3, 0, 5\]"):
        tiny_vae().decode(torch.zeros(16, 3, 0, 5))
