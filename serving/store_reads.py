"""Reads of a store that may hang, beside the requests that wait for them.

A pool of threads would be full of reads that hang, and is waited for where its process ends: each
has a daemon thread. Whoever asks for what is being read already waits for the same read.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any


class StoreReads:
    """The reads of one kind, of one event loop; at most so many at once, others wait their turn."""

    def __init__(self, *, most: int) -> None:
        self._turns = asyncio.Semaphore(most)
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}

    def is_reading(self, key: Hashable) -> bool:
        """Whether what `key` stands for is being read."""
        task = self._tasks.get(key)
        return task is not None and not task.done()

    def begin(self, key: Hashable, read: Callable[[], object]) -> asyncio.Task[None]:
        """The read in progress for `key`, or the one that begins now. What it finds `read` keeps;
        the task has its failure alone, and is not to be cancelled."""
        task = self._tasks.get(key)
        if task is None or task.done():
            task = self._tasks[key] = asyncio.create_task(self._run(read))
            task.add_done_callback(lambda ended: self._end(key, ended))
        return task

    async def read(self, key: Hashable, read: Callable[[], object]) -> None:
        """Until it has been read; who leaves before does not end it. Raises what `read` raises."""
        await asyncio.shield(self.begin(key, read))

    async def _run(self, read: Callable[[], object]) -> None:
        async with self._turns:
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[None] = loop.create_future()

            def told(failure: BaseException | None) -> None:
                if not answer.done():
                    answer.set_exception(failure) if failure else answer.set_result(None)

            def run() -> None:
                failure: Any = None
                try:
                    read()
                except BaseException as error:
                    failure = error
                with suppress(RuntimeError):  # the loop has ended meanwhile
                    loop.call_soon_threadsafe(told, failure)

            threading.Thread(target=run, daemon=True).start()
            await answer

    def _end(self, key: Hashable, ended: asyncio.Task[None]) -> None:
        if self._tasks[key] is ended:
            del self._tasks[key]
        if not ended.cancelled():
            ended.exception()  # of a read for which nobody waits any more
