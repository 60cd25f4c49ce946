"""Waiting, and bounds on time that hold on a slow machine too."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator

REFERENCE_S = 0.010  # of `_work` on the machine where the bounds were set


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes more than so many seconds of a fast machine.

    A block that takes longer is held against a fixed piece of work, timed right after it.
    """
    start = time.perf_counter()
    yield
    took = time.perf_counter() - start
    if took >= seconds:
        bound = seconds * slowdown()
        assert took < bound, f"took {took:.2f} s, expected less than {bound:.2f} s"


def slowdown() -> float:
    """How many times longer this machine takes now than a fast idle one; at least 1."""
    return max(1.0, sorted(_work() for _ in range(9))[4] / REFERENCE_S)


def _work() -> float:
    start = time.perf_counter()
    for number in range(400):
        json.loads(json.dumps({str(i): [i * number, "text"] for i in range(20)}))
        sum(i * i % 7 for i in range(200))
    return time.perf_counter() - start


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    """Look every few milliseconds until it is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen in {seconds} s"
        time.sleep(0.005)
