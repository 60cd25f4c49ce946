"""How many requests may be in flight, and how long to wait after a refusal."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

BACKOFF_S = 0.5  # the first wait is at most this, and it doubles
STEPS = 32  # rounds without a refusal that bring the limit from nothing back to the ceiling


class InFlight:
    """A limit on requests in flight that follows the server's capacity.

    The limit changes once per *round*, which is as many outcomes as the limit itself: it shrinks by
    the share of refusals (at most by half), then grows by a fixed step, up to `ceiling`. So it is
    at the capacity of a server within a few rounds, and a random 2 % of refusals costs nothing.
    """

    def __init__(self, ceiling: int):
        self.ceiling = ceiling
        self.limit = ceiling
        self.busy = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._shut = False
        self._outcomes = 0
        self._refused = 0

    async def enter(self, *, again: bool = False) -> None:
        """Wait for a place; a retry (`again`) waits at the front."""
        while self._shut or self.busy >= self.limit:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.appendleft(turn) if again else self._waiting.append(turn)
            await turn
        self.busy += 1

    def leave(self) -> None:
        """Give the place to the next."""
        self.busy -= 1
        self._admit()

    def shut(self) -> None:
        """Give no more places."""
        self._shut = True

    def count(self, *, refused: bool) -> None:
        """Count one outcome: did the server ask to slow down?"""
        self._outcomes += 1
        self._refused += refused
        if self._outcomes < self.limit:
            return
        share = self._refused / self._outcomes
        self._outcomes = self._refused = 0
        kept = self.limit * max(0.5, 1 - share)
        step = max(1, self.ceiling // STEPS) if share < 0.5 else 0
        self.limit = min(self.ceiling, max(1, int(kept) + step))
        self._admit()

    def _admit(self) -> None:
        """Wake one waiter per free place; each takes its place when it runs."""
        free = self.limit - self.busy
        while free > 0 and self._waiting and not self._shut:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                free -= 1


def wait_s(headers: Mapping[str, str], failures: int, max_wait_s: float) -> float:
    """Seconds to wait after the given number of failures (1 or more), in [0, max_wait_s].

    Exponential backoff with full jitter (https://aws.amazon.com/blogs/architecture/
    exponential-backoff-and-jitter/), or the server's Retry-After if that is longer.
    """
    backoff = random.uniform(0, BACKOFF_S * 2 ** min(failures - 1, 30))
    return min(max_wait_s, max(backoff, retry_after_s(headers)))


def retry_after_s(headers: Mapping[str, str]) -> float:
    """The seconds of a Retry-After header, 0 or more; 0 if it is absent or makes no sense.

    A date is compared with the server's own Date, so neither clock has to be right.
    """
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        until = _timestamp(value)
        now = _timestamp(headers.get("date", ""))
        seconds = 0.0 if until is None else until - (time.time() if now is None else now)
    return 0.0 if math.isnan(seconds) else max(0.0, seconds)


def _timestamp(http_date: str) -> float | None:
    try:
        return parsedate_to_datetime(http_date).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
