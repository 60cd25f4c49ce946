"""Handlers for the length of a `with`."""

from __future__ import annotations

import signal
import threading

from aif.signals import handling

NUMBER = signal.SIGALRM


def test_handlers_and_the_timer_of_before_come_back():
    inner, outer = [], []
    with handling({NUMBER: lambda number, frame: outer.append(number)}, alarm_s=60):
        with handling({NUMBER: lambda number, frame: inner.append(number)}, alarm_s=0):
            assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
            signal.raise_signal(NUMBER)
        assert (inner, outer) == ([NUMBER], [])
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        signal.raise_signal(NUMBER)
        assert outer == [NUMBER]


def test_a_timer_is_left_alone_unless_it_is_set():
    with handling({NUMBER: lambda number, frame: None}, alarm_s=60):
        with handling({signal.SIGTERM: lambda number, frame: None}):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50


def test_in_another_thread_signals_are_left_alone():
    before, seen = state(), []

    def run() -> None:
        with handling({NUMBER: lambda number, frame: None}, alarm_s=0):
            seen.append(state())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def state() -> tuple[object, bool]:
    """The handler, and whether the timer runs (that of the test's own time limit does)."""
    return signal.getsignal(NUMBER), signal.getitimer(signal.ITIMER_REAL)[0] > 0
