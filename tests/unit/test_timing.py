"""Spans measure, timers count only when asked, and their statistics come out as the documented table."""

import csv
import time

import pytest
import torch

from chitu_core.timing import Span, Timer

CPU = torch.device("cpu")


def test_a_span_measures_what_lies_inside():
    with Span(CPU) as span:
        time.sleep(0.02)
    assert 20 <= span.milliseconds() < 500  # a sleep is never shorter; half a second is a stalled machine


def test_a_span_ends_when_its_body_raises():
    span = Span(CPU)
    with pytest.raises(KeyError), span:
        raise KeyError
    assert 0 <= span.milliseconds() < 500


def test_spans_of_one_name_may_overlap():
    timer = Timer(CPU, True)
    with timer.get_timer("outer"):
        with timer.get_timer("inner"):
            time.sleep(0.01)
        with timer.get_timer("inner"):
            pass
    outer, inner = timer.statistics()
    assert (outer.name, outer.samples, inner.name, inner.samples) == ("outer", 1, "inner", 2)
    assert outer.max >= inner.max >= inner.mean >= inner.min >= 0


def test_a_disabled_timer_counts_nothing_but_its_spans_measure():
    timer = Timer(CPU, False)
    with timer.get_timer("denoise") as span:
        time.sleep(0.01)
    timer.record("overall", 3.0)
    assert timer.statistics() == []
    assert span.milliseconds() >= 10


def test_a_timer_can_be_switched_and_reset():
    timer = Timer(CPU, False)
    timer.enable()
    timer.record("a", 1.0)
    timer.disable()
    timer.record("a", 2.0)
    assert (timer.is_enabled(), [row.samples for row in timer.statistics()]) == (False, [1])
    timer.reset()
    assert timer.statistics() == []


def test_statistics_are_minimum_maximum_and_mean():
    timer = Timer(CPU, True)
    for value in (1.0, 2.0, 6.0):
        timer.record("denoise", value)
    [row] = timer.statistics()
    assert (row.min, row.max, row.mean, row.samples) == (1.0, 6.0, 3.0, 3)


def test_a_saved_table_is_appended_to_under_one_header(tmp_path):
    timer = Timer(CPU, True)
    timer.record("overall", 1.5)
    for _ in range(2):
        timer.save_statistics(tmp_path / "time_stats.csv")
    with (tmp_path / "time_stats.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["Timestamp", "Timer Name", "Min (ms)", "Max (ms)", "Avg (ms)", "Samples"]
    assert [row[1:] for row in rows] == [["overall", "1.500", "1.500", "1.500", "1"]] * 2
