"""Ends this rank when another one failed or fell silent: a rank inside a collective cannot be told otherwise.

A rank that fails where the others wait for it writes its message to the store. A thread of every rank says
once a second that it lives, and looks for such a message and for ranks that say nothing any more.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from torch.distributed import Store  # type: ignore[attr-defined]  # exported in fact

PERIOD_S = 1.0
SILENCE_S = 30.0  # longer than anything that keeps a rank's threads from running
GRACE_S = 10.0  # what a rank that failed may take to end by itself
_FAILED = "chitu/failed"


class RankFailure(RuntimeError):
    """This rank failed where others wait for it; the job ends."""


def leave(message: str) -> None:
    """End the process at once, with status 1: its main thread may never return from a collective."""
    sys.stderr.write(f"Error: {message}\n")
    sys.stderr.flush()
    os._exit(1)


class Watchdog:
    """Watches the other ranks through a store connection of its own."""

    def __init__(self, store: Store, rank: int, size: int, end: Callable[[str], None] = leave) -> None:
        self._store = store
        self._rank = rank
        self._end = end
        self._others = [other for other in range(size) if other != rank]
        self._heard: dict[int, tuple[bytes, float]] = {}  # a rank's last sign, and when it was new
        self._failed_at: float | None = None
        self._stopped = threading.Event()
        self._sign(0)
        self._thread = threading.Thread(target=self._watch, name="rank-watchdog", daemon=True)

    def start(self) -> None:
        """Begin; every rank must have made its watchdog by now."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def has_reported(self) -> bool:
        """Whether this rank said that it failed."""
        return self._failed_at is not None

    def report(self, message: str) -> None:
        """Tell all ranks that this one failed; the first to say so is believed."""
        text = f"rank {self._rank} on {socket.gethostname()} failed: {message}"
        self._failed_at = time.monotonic()
        self._store.compare_set(_FAILED, "", text)

    def guard(self, doing: str) -> "Guard":
        """For work in which others wait for this rank: an error becomes RankFailure and ends the job."""
        return Guard(self, doing)

    def _watch(self) -> None:
        count = 0
        while not self._stopped.wait(PERIOD_S):
            count += 1
            try:
                self._sign(count)
                message = self._trouble()
            except RuntimeError as error:
                if self._stopped.is_set():
                    return
                message = f"the ranks' store is gone, so rank 0 or its launcher has ended ({error})"
            if message is not None:
                self._end(f"{message}; rank {self._rank} ends with it")
                return

    def _sign(self, count: int) -> None:
        self._store.set(f"chitu/alive/{self._rank}", str(count))

    def _trouble(self) -> str | None:
        """Why this rank must end, if it must."""
        now = time.monotonic()
        if self._failed_at is not None:
            return "this rank failed" if now - self._failed_at > GRACE_S else None
        if self._store.check([_FAILED]):
            return self._store.get(_FAILED).decode(errors="replace")
        signs = self._store.multi_get([f"chitu/alive/{other}" for other in self._others])
        for other, sign in zip(self._others, signs, strict=True):
            if other not in self._heard or self._heard[other][0] != sign:
                self._heard[other] = (sign, now)
            elif now - self._heard[other][1] > SILENCE_S:
                return f"rank {other} has not been heard for {SILENCE_S:.0f} s"
        return None


class Guard:
    """The context manager of `Watchdog.guard`."""

    def __init__(self, watchdog: Watchdog, doing: str) -> None:
        self._watchdog = watchdog
        self._doing = doing

    def __enter__(self) -> None:
        """Nothing to do before."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        message = f"{self._doing}: {type(error).__name__}: {error}"
        self._watchdog.report(message)
        if isinstance(error, Exception):
            raise RankFailure(message) from error
