"""Fixtures and switches for all tests."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import RankPool

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks(n, function, *args)`: call a module's function on n ranks (ranks.py)."""
    pool = RankPool()
    yield pool.run
    pool.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, by name, where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
