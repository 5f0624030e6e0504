"""Fixtures and switches for all tests."""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import RankPool

from chitu_core.logging import PACKAGES

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks(n, function, *args)`: call a module's function on n ranks (ranks.py)."""
    pool = RankPool()
    yield pool.run
    pool.close()


@pytest.fixture
def own_loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both packages' loggers without handlers; they are as before afterwards."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        monkeypatch.setattr(logger, "propagate", logger.propagate)
        monkeypatch.setattr(logger, "handlers", [])
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, by name, where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
