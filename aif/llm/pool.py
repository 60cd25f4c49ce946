"""A pool of asyncio workers behind a plain generator, all in the calling thread.

The workers run only while the generator waits for answers. So its user can write a journal between
two answers without a lock, and asks are read one by one as places come free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator

from aif.llm import Answer, Ask
from aif.llm.event_loop import Turns
from aif.llm.rate_limit import InFlight

LINGER_S = 0.005  # from the first answer of a batch to yielding the batch
GRACE_S = 5.0  # for the requests under way after a failure of all


class WorkerPool:
    """One pass over `asks`, with at most `limit.ceiling` of them read and not yet answered."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        asks: Iterable[Ask],
        answer_one: Callable[[Ask, InFlight], Awaitable[Answer]],
        limit: InFlight,
    ):
        self._loop = loop
        self._asks = iter(asks)
        self._answer_one = answer_one
        self._limit = limit
        self._ended = False  # `asks` has no more
        self._failure: BaseException | None = None
        self._ready: list[Answer] = []
        self._turns = Turns(loop)
        self._working = limit.ceiling
        self._workers = [loop.create_task(self._work()) for _ in range(limit.ceiling)]

    def answers(self) -> Iterator[Answer]:
        """Every answer as it comes; then raises what a worker or `asks` raised, if anything."""
        give_up = None
        try:
            with self._turns:
                while self._working:
                    self._turns.run()
                    yield from self._take()
                    self._turns.deliver()
                    if self._failure is not None:
                        give_up = give_up or self._loop.time() + GRACE_S
                        if not self._limit.busy or self._loop.time() > give_up:
                            break
            if self._failure is not None:
                raise self._failure
        finally:
            self._loop.run_until_complete(self._dismiss())

    async def _work(self) -> None:
        """Read an ask when there is a place, answer it, and again."""
        try:
            while not self._ended:
                await self._limit.enter()
                try:
                    # Others may have reached the end while this one waited for its place.
                    ask = None if self._ended else next(self._asks, None)
                    self._ended = ask is None
                    if ask is not None:
                        self._deliver(await self._answer_one(ask, self._limit))
                finally:
                    self._limit.leave()
        except Exception as error:
            self._fail(error)
        finally:
            self._working -= 1
            self._turns.wake()

    def _fail(self, error: Exception) -> None:
        """Read no more asks."""
        self._failure = self._failure or error
        self._ended = True
        self._limit.shut()

    def _deliver(self, answer: Answer) -> None:
        if not self._ready:
            self._loop.call_later(LINGER_S, self._turns.wake)
        self._ready.append(answer)

    def _take(self) -> list[Answer]:
        batch, self._ready = self._ready, []
        return batch

    async def _dismiss(self) -> None:
        """Stop the workers; a request under way is broken off."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
