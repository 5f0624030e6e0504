"""Texts between ranks arrive whole, at every length around the size of one exchange."""

import pytest
from torch import distributed as dist

from chitu_core.distributed import RankChannel

SIZES = (0, 1, 1015, 1016, 1017, 100_000)  # bytes; 1,016 fill the first exchange
WORLDS = (1, 3)


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.get_world_size() > 1 else None


def text_of(rank: int, size: int) -> str:
    return "abc"[rank] * size


def hear_rank_0(sizes: tuple[int, ...]) -> list[str]:
    channel = RankChannel(group())
    return [channel.agree(text_of(dist.get_rank(), size)) for size in sizes]


def hear_all(sizes: tuple[int, ...]) -> list[list[str]]:
    channel = RankChannel(group())
    return [channel.gather(text_of(dist.get_rank(), size)) for size in sizes]


def hear_different_sizes(sizes: tuple[int, ...]) -> list[str]:
    rank = dist.get_rank()
    return RankChannel(group()).gather(text_of(rank, sizes[rank]))


def hear_text(text: str) -> tuple[str, list[str]]:
    channel = RankChannel(group())
    return channel.agree(text), channel.gather(text)


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_hear_what_rank_0_says(run_ranks, world):
    expected = [text_of(0, size) for size in SIZES]
    assert run_ranks(world, hear_rank_0, SIZES) == [expected] * world


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_hear_what_each_says_in_their_order(run_ranks, world):
    expected = [[text_of(rank, size) for rank in range(world)] for size in SIZES]
    assert run_ranks(world, hear_all, SIZES) == [expected] * world


@pytest.mark.dist
@pytest.mark.parametrize("sizes", [(0, 100_000, 1016), (1017, 0, 1018), (5, 1016, 0)])
def test_texts_of_different_lengths_do_not_mix(run_ranks, sizes):
    expected = [text_of(rank, size) for rank, size in enumerate(sizes)]
    assert run_ranks(3, hear_different_sizes, sizes) == [expected] * 3


@pytest.mark.dist
def test_characters_of_several_bytes_and_broken_ones_arrive_as_they_were(run_ranks):
    for text in ("\U0001f408" * 254, "ä" * 508 + "a", "\udcff" * 500, "\x00"):
        assert run_ranks(3, hear_text, text) == [(text, [text] * 3)] * 3


def test_one_rank_needs_no_group():
    channel = RankChannel(None)
    for size in SIZES:
        assert channel.agree("a" * size) == "a" * size
        assert channel.gather("a" * size) == ["a" * size]
