"""An outage of a service, which all requests of one call wait out together.

A service that cannot be reached, refuses for now or cuts an answer off may mend by itself. That
costs no request an attempt: after it none begins before a pause that they share, and which grows
until something is answered. Where nothing is for too long, the call ends. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from tenacity import AsyncRetrying, retry_if_exception, wait_random

from cluster.errors import OUTAGES, DeadlineError, GraftError, OperationError

R = TypeVar("R")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_LONG_S = 5.0
_MOST_APART_S = 0.1


class Outage:
    """Of one call, in one event loop.

    Args:
        most_s: Longest time for which requests fail so and none is answered. One that is under way
            then is waited for, as long as it takes.
        tell: Called with the failure, once in each outage that is not over within seconds.
        clock: In seconds.
    """

    def __init__(
        self,
        most_s: float,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_s, self._tell, self._clock = most_s, tell, clock
        self._not_before_s = -math.inf
        self._answered()
        self._under_way = 0

    async def outlast(self, call: Callable[[], Awaitable[R]]) -> R:
        """What `call`, which makes an `attempt`, brings in the end. Raises GraftError: another
        failure, or that of an outage that is too long."""
        # The pause itself is in front of the next attempt.
        attempts = AsyncRetrying(
            wait=wait_random(max=_MOST_APART_S), retry=retry_if_exception(_may_end), reraise=True
        )
        async for attempt in attempts:
            with attempt:
                return await call()
        raise AssertionError("tenacity re-raises the last failure")

    @asynccontextmanager
    async def attempt(self) -> AsyncGenerator[None]:
        """The scope of one request, once the pause is over; what it raises tells how it went."""
        await asyncio.sleep(max(0.0, self._not_before_s - self._clock()))
        began_s = self._clock()
        self._under_way += 1
        try:
            yield
        except OUTAGES as error:
            self._failed(began_s, error)
            raise
        except GraftError as error:
            if not isinstance(error, DeadlineError):
                self._answered()
            raise
        else:
            self._answered()
        finally:
            self._under_way -= 1

    def _answered(self) -> None:
        self._failing_since_s: float | None = None
        self._pause_s, self._is_told = _FIRST_PAUSE_S, False

    def _failed(self, began_s: float, error: OperationError) -> None:
        now_s = self._clock()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        failing_s = now_s - self._failing_since_s
        # What is still under way may be answered: a service with a full queue is not down.
        if self._under_way == 1 and failing_s + error.retry_after_s >= self._most_s:
            raise _too_long(error, failing_s) from error
        if failing_s >= _LONG_S and not self._is_told:
            self._is_told = True
            self._tell(error.message)
        # What had begun before the last pause tells nothing of the time behind it.
        if began_s >= self._not_before_s:
            growing_s = self._pause_s * random.uniform(0.5, 1)
            self._not_before_s = now_s + min(growing_s, max(0.0, self._most_s - failing_s))
            self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s)


def _may_end(error: BaseException) -> bool:
    return isinstance(error, OUTAGES) and error.retryable


def _too_long(error: OperationError, failing_s: float) -> OperationError:
    told = type(error)(
        f"{error.message} (nothing was answered for {failing_s:.0f} s); every answer before is "
        "kept, and the same call goes on from there"
    )
    told.retryable = False  # it was tried again for long enough
    return told
