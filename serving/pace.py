"""How many requests a client has in progress: as many as the service takes, and no more.

Additive increase, multiplicative decrease, as TCP does it: doubled each round until the service
first pushes back (429, 503, a time-out), halved then, and from there one more for each round that
went well. After a Retry-After nobody begins before it is over, nor all clients at its very end.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from cluster.errors import OUTAGES, DeadlineError, OperationError

_FIRST = 8
_MOST_BEYOND = 1.1  # of a Retry-After
_PUSHED_BACK = (*OUTAGES, DeadlineError)


class Pace:
    """Of one client, in one event loop.

    Args:
        most: Requests at once that are never exceeded.
        clock: In seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.limit = most, float(min(most, _FIRST))
        self._clock = clock
        self._running = 0
        self._has_met_a_limit = False
        self._cut_s, self._not_before_s = -math.inf, clock()
        self._waiting: dict[asyncio.Future[None], None] = {}  # in order of arrival

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """The scope of one request, once it may begin; what it raises tells how it went."""
        await self._enter()
        began_s = self._clock()
        try:
            yield
        except _PUSHED_BACK as error:
            self._slow_down(began_s, error)
            raise
        else:
            self._speed_up()
        finally:
            self._leave()

    async def _enter(self) -> None:
        """Take a place, in order of arrival, and wait until one may begin."""
        if self._running < int(self.limit):
            self._running += 1
        else:
            await self._queue()
        try:
            while True:
                pause_s = self._not_before_s - self._clock()
                if pause_s <= 0:
                    return
                await asyncio.sleep(pause_s)
        except asyncio.CancelledError:
            self._leave()
            raise

    async def _queue(self) -> None:
        """Wait for a place, which whoever leaves hands over."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.pop(turn, None)
            else:
                self._leave()  # it was given its place at the same moment
            raise

    def _leave(self) -> None:
        self._running -= 1
        while self._waiting and self._running < int(self.limit):
            turn = next(iter(self._waiting))
            del self._waiting[turn]
            if not turn.cancelled():
                self._running += 1
                turn.set_result(None)

    def _slow_down(self, began_s: float, error: OperationError) -> None:
        until_s = self._clock() + error.retry_after_s * random.uniform(1, _MOST_BEYOND)
        self._not_before_s = max(self._not_before_s, until_s)
        self._has_met_a_limit = True
        # What had begun before the last cut tells of the pace before it.
        if began_s > self._cut_s:
            self.limit = max(1.0, self.limit / 2)
            self._cut_s = self._clock()

    def _speed_up(self) -> None:
        # A limit that nobody waits at says nothing about a higher one.
        if self._waiting:
            self.limit += 1 / self.limit if self._has_met_a_limit else 1
            self.limit = min(float(self.most), self.limit)
