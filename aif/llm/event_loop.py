"""An asyncio loop that runs in turns, so that signal handlers run between two of them.

A handler that raises does so wherever the main thread is. In an asyncio loop that may be a
callback, where the exception is only logged, or a library's `except`, where it becomes a failed
request; about one in a hundred was lost that way. So while the loop runs a signal is only noted,
and its handler is called when the turn is over.
"""

from __future__ import annotations

import asyncio
import signal
from types import FrameType
from typing import Self

from aif.signals import Handler, can_be_handled

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
TURN_S = 0.2  # the longest turn of the loop


class Turns:
    """In a `with`, a signal that comes during `run` is left for `deliver`."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._wake: asyncio.Future[None] | None = None
        self._handlers: dict[int, Handler] = {}
        self._noted: list[tuple[int, FrameType | None]] = []
        self._running = False

    def __enter__(self) -> Self:
        if can_be_handled():
            for number in NUMBERS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._arrived)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._handlers.items():
            # A generator may be closed late, when others have set and put back theirs.
            if signal.getsignal(number) == self._arrived:
                signal.signal(number, handler)
        self.deliver()

    def run(self) -> None:
        """Run the loop until somebody calls `wake`, or for a little while."""
        self._running = True
        try:
            self._loop.run_until_complete(self._turn())
        finally:
            self._running = False

    async def _turn(self) -> None:
        self._wake = self._loop.create_future()
        timer = self._loop.call_later(TURN_S, self.wake)
        await self._wake
        timer.cancel()

    def wake(self) -> None:
        """End the turn under way."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def deliver(self) -> None:
        """Call the handlers of the signals that were noted; they may raise."""
        while self._noted:
            number, frame = self._noted.pop(0)
            self._handlers[number](number, frame)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._running and not self._noted:
            self._noted.append((number, frame))
            self._loop.call_soon_threadsafe(self.wake)
        else:  # a second one does not wait, in case the turn does not end
            self._handlers[number](number, frame)
