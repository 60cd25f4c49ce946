"""Signal handlers for the length of a `with`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


def can_be_handled() -> bool:
    """Whether this is the main thread, the only one in which Python sets and runs handlers."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def handling(
    handlers: Mapping[signal.Signals, Handler], *, alarm_s: float | None = None
) -> Iterator[None]:
    """Handle these signals, then put back the handlers of before; does nothing in other threads.

    `alarm_s` sets the timer of SIGALRM, 0 turns it off; afterwards the timer of before goes on.
    """
    if not can_be_handled():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    timer = None if alarm_s is None else signal.setitimer(signal.ITIMER_REAL, alarm_s)
    try:
        yield
    finally:
        if timer is not None:
            signal.setitimer(signal.ITIMER_REAL, *timer)
        for number, handler in before.items():
            signal.signal(number, handler)
