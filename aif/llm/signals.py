"""Signal handlers kept out of a running event loop.

A handler that raises does so wherever the main thread happens to be. In an asyncio loop that may be
a callback, where the exception is only logged, or a library's `except`, where it turns into a
failed request; about one in a hundred was lost that way. So while the loop runs a signal is only
noted, and its handler is called as soon as the loop has been left.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


class Deferred:
    """In a `with`, a signal that comes between `hold` and `release` is left for `deliver`.

    Does nothing but in the main thread, where Python runs its handlers.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, leave: Callable[[], None]):
        self._loop = loop
        self._leave = leave  # asks the loop to end its turn
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._noted: list[tuple[int, FrameType | None]] = []
        self._holding = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._arrived)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._arrived:  # and nobody has set another since
                signal.signal(number, handler)
        self.deliver()

    def hold(self) -> None:
        """From here on signals are noted."""
        self._holding = True

    def release(self) -> None:
        """From here on handlers run at once again."""
        self._holding = False

    def deliver(self) -> None:
        """Call the handlers of what was noted; they may raise."""
        while self._noted:
            number, frame = self._noted.pop(0)
            self._handlers[number](number, frame)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._holding and not self._noted:
            self._noted.append((number, frame))
            self._loop.call_soon_threadsafe(self._leave)
        else:  # a second one does not wait, in case the turn does not end
            self._handlers[number](number, frame)
