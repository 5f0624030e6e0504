"""The harness of the rank tests itself."""

import pytest
import torch
from torch import distributed as dist

pytestmark = pytest.mark.dist


def sum_of_ranks(offset: int) -> int:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return int(total)


def test_every_rank_answers(run_ranks):
    assert run_ranks(3, sum_of_ranks, 1) == [6, 6, 6]
    assert run_ranks(2, sum_of_ranks, 0) == [1, 1]
