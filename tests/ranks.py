"""Several ranks on the CPU for tests: processes that stay, so that a test pays no import, joined by gloo.

`run_ranks(n, function, *args)` (a fixture) calls a function of a test module on n ranks, each with the
default process group of world size n, and returns what they returned, in order; all of it is pickled.
"""

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 120


class RankPool:
    """Worker processes, started when they are first needed."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on each of `world` ranks. Raises AssertionError if one raised."""
        while len(self._workers) < world:
            self._workers.append(_start())
        with tempfile.TemporaryDirectory() as folder:
            name = (function.__module__, function.__qualname__)
            for rank, (_, pipe) in enumerate(self._workers[:world]):
                pipe.send((name, args, rank, world, str(Path(folder) / "store")))
            results = [self._receive(rank) for rank in range(world)]
        failures = [f"rank {rank}:\n{text}" for rank, (is_good, text) in enumerate(results) if not is_good]
        if failures:
            self.close()  # their groups may be out of step
        assert not failures, "\n".join(failures)
        return [value for _, value in results]

    def close(self) -> None:
        """End all workers; the next run starts new ones."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers.clear()

    def _receive(self, rank: int) -> tuple[bool, Any]:
        _, pipe = self._workers[rank]
        if not pipe.poll(TIMEOUT_S):
            return False, f"no answer in {TIMEOUT_S} s"
        try:
            return pipe.recv()
        except EOFError:
            return False, "the process is gone"


def _start() -> tuple[Any, Connection]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, list(sys.path)), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _work(pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)  # the ranks share few cores
    while True:
        try:
            (module, qualname), args, rank, world, store = pipe.recv()
        except EOFError:
            return
        try:
            timeout = timedelta(seconds=TIMEOUT_S)
            shared = dist.FileStore(store, world)
            dist.init_process_group("gloo", store=shared, rank=rank, world_size=world, timeout=timeout)
            function: Any = importlib.import_module(module)
            for part in qualname.split("."):
                function = getattr(function, part)
            value = function(*args)
            dist.barrier()  # a rank that leaves early may abort the others
            pipe.send((True, value))
        except BaseException:  # what went wrong belongs into the test's own report
            pipe.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
