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

from chitu_core.memory import is_out_of_memory

PERIOD_S = 1.0
SILENCE_S = 30.0  # longer than anything that keeps a rank's threads from running
GRACE_S = 10.0  # what a rank that failed may take to end by itself
LINGER_PERIODS = 2.5  # how long a rank that failed stays, so that the others read why
_FAILED = "chitu/failed"
_ADVICE = "out of memory; ask for a smaller size, or use more ranks; "


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
        self._answered_at = time.monotonic()  # when the store last did
        self._stopped = threading.Event()
        self._sign(0)
        self._threads = [
            threading.Thread(target=work, name=f"rank-watchdog-{name}", daemon=True)
            for name, work in (("ask", self._ask), ("wait", self._wait))
        ]

    def start(self) -> None:
        """Begin; every rank must have made its watchdog by now."""
        self._answered_at = time.monotonic()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=2 * PERIOD_S)

    @property
    def has_reported(self) -> bool:
        """Whether this rank said that it failed."""
        return self._failed_at is not None

    def report(self, message: str) -> str:
        """Tell all ranks that this one failed; return what is believed, which is what the first one said.

        Of a rank whose process is gone, others learn by connections that break, and that is no reason of
        their own. So the first one stays until the others have read it, and so does rank 0, which may hold
        the store.
        """
        text = f"rank {self._rank} on {socket.gethostname()} failed: {message}"
        self._failed_at = time.monotonic()
        try:
            believed = self._believed(text)
        except RuntimeError:  # the store went with rank 0, and so will all
            return text
        if believed == text or self._rank == 0:
            time.sleep(LINGER_PERIODS * PERIOD_S)
        return believed

    def guard(self, doing: str) -> "Guard":
        """For work in which others wait for this rank: an error becomes RankFailure and ends the job."""
        return Guard(self, doing)

    def _ask(self) -> None:
        """Once a period: say that this rank lives, and look what the others say."""
        count = 0
        while not self._stopped.wait(PERIOD_S):
            count += 1
            try:
                self._sign(count)
                message = self._trouble()
            except RuntimeError as error:
                if self._stopped.is_set() or self.has_reported:  # the others ended before this rank did
                    return
                message = f"the ranks' store is gone, so rank 0 or its launcher has ended ({error})"
            self._answered_at = time.monotonic()
            if message is not None:
                if self._rank == 0:  # whose store the others may not have asked yet
                    time.sleep(LINGER_PERIODS * PERIOD_S)
                self._leave(message)
                return

    def _wait(self) -> None:
        """See that the other thread is answered, for a machine that froze breaks no connection, and that this
        rank ends after it failed."""
        while not self._stopped.wait(PERIOD_S):
            now = time.monotonic()
            if self._failed_at is not None:
                if now - self._failed_at > GRACE_S:
                    self._leave("this rank failed")
            elif now - self._answered_at > SILENCE_S:
                self._leave(f"the ranks' store has not answered for {SILENCE_S:.0f} s")

    def _leave(self, message: str) -> None:
        self._stopped.set()
        self._end(f"{message}; rank {self._rank} ends with it")

    def _sign(self, count: int) -> None:
        self._store.set(f"chitu/alive/{self._rank}", str(count))

    def _trouble(self) -> str | None:
        """Why this rank must end, if it must."""
        now = time.monotonic()
        if self.has_reported:
            return None
        if self._store.check([_FAILED]):
            return str(self._store.get(_FAILED).decode(errors="replace"))
        signs = self._store.multi_get([f"chitu/alive/{other}" for other in self._others])
        for other, sign in zip(self._others, signs, strict=True):
            if other not in self._heard or self._heard[other][0] != sign:
                self._heard[other] = (sign, now)
            elif now - self._heard[other][1] > SILENCE_S:
                silence = f"rank {other} has not been heard for {SILENCE_S:.0f} s"
                return self._believed(silence)
        return None

    def _believed(self, text: str) -> str:
        """Why the job ends: `text`, unless another rank was faster."""
        believed: bytes = self._store.compare_set(_FAILED, "", text)
        return believed.decode(errors="replace")


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
        advice = _ADVICE if is_out_of_memory(error) else ""
        believed = self._watchdog.report(f"{self._doing}: {advice}{type(error).__name__}: {error}")
        if isinstance(error, Exception):
            raise RankFailure(believed) from error
