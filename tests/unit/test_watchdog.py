"""The watchdog over a store in memory: who ends, when, and with which words."""

import threading
import time

import pytest
from torch.distributed import HashStore

from chitu_core.distributed import RankFailure, watchdog
from chitu_core.distributed.watchdog import Watchdog

SOON_S = 5.0  # for what must happen; a loaded machine may let a thread wait


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Periods of milliseconds; silence that is long beside them."""
    monkeypatch.setattr(watchdog, "PERIOD_S", 0.01)
    monkeypatch.setattr(watchdog, "SILENCE_S", 60.0)
    monkeypatch.setattr(watchdog, "GRACE_S", 60.0)


class Ending:
    """Stands in for the end of the process: keeps the words, and says when they came."""

    def __init__(self):
        self.words = []
        self.came = threading.Event()

    def __call__(self, message):
        self.words.append(message)
        self.came.set()


class FragileStore(HashStore):
    """A store that can vanish as one on another machine does, or stop answering."""

    has_vanished = False

    def __init__(self):
        super().__init__()
        self.answers = threading.Event()
        self.answers.set()

    def set(self, key, value):
        if self.has_vanished:
            raise RuntimeError("Broken pipe")
        self.answers.wait()
        return super().set(key, value)

    def compare_set(self, key, expected, desired):
        if self.has_vanished:
            raise RuntimeError("Broken pipe")
        return super().compare_set(key, expected, desired)


@pytest.fixture
def watch():
    """`watch(store, rank, size)`: a watchdog that runs, and its ending; all are stopped afterwards."""
    made = []

    def start(store, rank, size):
        ending = Ending()
        made.append(Watchdog(store, rank, size, ending))
        made[-1].start()
        return made[-1], ending

    yield start
    for one in made:
        one.stop()


def pair(watch, store):
    """Watchdogs of two ranks; each must exist before the other looks for its signs."""
    for rank in range(2):
        store.set(f"chitu/alive/{rank}", "0")
    return [watch(store, rank, 2) for rank in range(2)]


def test_a_failure_that_a_rank_reports_ends_the_others_with_its_message(watch):
    (first, own), (_, other) = pair(watch, HashStore())
    first.report("denoising: RuntimeError: broken")
    assert other.came.wait(SOON_S)
    [words] = other.words
    assert words.startswith("rank 0 on ")
    assert words.endswith(" failed: denoising: RuntimeError: broken; rank 1 ends with it")
    assert first.has_reported
    assert not own.came.is_set()


def test_the_first_of_two_failures_is_believed(watch):
    store = HashStore()
    watchdogs = [Watchdog(store, rank, 3, Ending()) for rank in range(2)]
    for index, one in enumerate(watchdogs):
        one.report(f"failure {index}")
    _, ending = watch(store, 2, 3)
    assert ending.came.wait(SOON_S)
    assert "failure 0" in ending.words[0]


def test_a_rank_that_reported_and_does_not_end_by_itself_is_ended(watch, monkeypatch):
    monkeypatch.setattr(watchdog, "GRACE_S", 0.05)
    (first, own), _ = pair(watch, HashStore())
    first.report("broken")
    assert own.came.wait(SOON_S)
    assert own.words == ["this rank failed; rank 0 ends with it"]


def test_a_rank_that_says_nothing_any_more_ends_the_others(watch, monkeypatch):
    monkeypatch.setattr(watchdog, "SILENCE_S", 0.2)
    store = HashStore()
    for rank in (1, 2):
        store.set(f"chitu/alive/{rank}", "0")
    (alive, _), (_, ending) = watch(store, 2, 3), watch(store, 0, 3)
    assert ending.came.wait(SOON_S)
    assert ending.words == ["rank 1 has not been heard for 0 s; rank 0 ends with it"]
    assert not alive.has_reported


def test_a_store_that_is_gone_ends_the_rank(watch):
    store = FragileStore()
    _, ending = watch(store, 0, 1)
    store.has_vanished = True
    assert ending.came.wait(SOON_S)
    [words] = ending.words
    assert words.startswith("the ranks' store is gone, so rank 0 or its launcher has ended")
    assert "Broken pipe" in words


def test_a_store_that_does_not_answer_ends_the_rank(watch, monkeypatch):
    monkeypatch.setattr(watchdog, "SILENCE_S", 0.2)
    store = FragileStore()
    _, ending = watch(store, 0, 1)
    store.answers.clear()  # as when the machine of rank 0 is frozen or cut off
    try:
        assert ending.came.wait(SOON_S)
    finally:
        store.answers.set()


def test_ranks_that_live_end_nobody(watch, monkeypatch):
    monkeypatch.setattr(watchdog, "SILENCE_S", 1.0)
    pairs = pair(watch, HashStore())
    time.sleep(1.5)  # longer than the silence that would end one
    assert [ending.words for _, ending in pairs] == [[], []]


def test_a_watchdog_that_was_stopped_ends_nobody(watch, monkeypatch):
    monkeypatch.setattr(watchdog, "SILENCE_S", 0.1)
    store = FragileStore()
    pairs = pair(watch, store)
    for one, _ in pairs:
        one.stop()
    store.has_vanished = True
    time.sleep(0.3)
    assert [ending.words for _, ending in pairs] == [[], []]


def test_a_watchdog_that_never_started_can_be_stopped():
    Watchdog(HashStore(), 0, 1, Ending()).stop()


def test_an_error_under_guard_is_reported_and_becomes_a_rank_failure():
    store = HashStore()
    one = Watchdog(store, 1, 2, Ending())
    with (
        pytest.raises(RankFailure, match=r"^rank 1 on .* failed: decoding: KeyError: 'x'$") as caught,
        one.guard("decoding"),
    ):
        raise KeyError("x")
    assert isinstance(caught.value.__cause__, KeyError)
    assert store.get("chitu/failed").decode() == str(caught.value)


def test_a_connection_that_breaks_after_another_rank_failed_is_told_in_the_words_of_that_rank():
    store = HashStore()
    culprit, other = (Watchdog(store, rank, 2, Ending()) for rank in range(2))
    culprit.report("denoising: KeyError: 'x'")
    with pytest.raises(RankFailure, match=r"^rank 0 on .* KeyError: 'x'$"), other.guard("denoising"):
        raise RuntimeError("Connection closed by peer")


def test_an_error_under_guard_is_told_though_the_store_is_gone():
    store = FragileStore()
    one = Watchdog(store, 1, 2, Ending())
    store.has_vanished = True
    with pytest.raises(RankFailure, match=r"^rank 1 on .* RuntimeError: mine$"), one.guard("denoising"):
        raise RuntimeError("mine")


def test_an_interrupt_under_guard_is_reported_and_stays_what_it_is():
    store = HashStore()
    one = Watchdog(store, 1, 2, Ending())
    with pytest.raises(KeyboardInterrupt), one.guard("denoising"):
        raise KeyboardInterrupt
    assert b"denoising: KeyboardInterrupt" in store.get("chitu/failed")


def test_nothing_is_reported_where_nothing_fails():
    one = Watchdog(HashStore(), 0, 2, Ending())
    with one.guard("denoising"):
        pass
    assert not one.has_reported


def test_leaving_says_why_on_one_line_and_ends_with_status_1(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    watchdog.leave("rank 1 on a failed")
    assert (codes, capsys.readouterr().err) == ([1], "Error: rank 1 on a failed\n")
