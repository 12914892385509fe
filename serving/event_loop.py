"""An event loop in a thread of its own, for code that has none.

Knows nothing of what runs in it; `serving.client` does.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

R = TypeVar("R")


class EventLoop:
    """Runs until it is closed; used from any thread but its own."""

    def __init__(self) -> None:
        begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def live() -> None:
            closing = asyncio.Event()
            begun.set_result((asyncio.get_running_loop(), closing))
            await closing.wait()

        def run() -> None:
            try:
                asyncio.run(live())
            except BaseException as error:  # as where no more files may be open
                if begun.done():
                    raise
                begun.set_exception(error)

        self._leaving = set[asyncio.Future[None]]()
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        self._loop, self._closing = begun.result()
        atexit.register(self.close)  # later the thread stands still, and who waits for it too

    def close(self) -> None:
        """End, and whatever still runs."""
        atexit.unregister(self.close)
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def wait(self, call: Callable[[], Awaitable[R]]) -> R:
        """What `call` comes to there. An interrupt here ends it there first, in order."""
        tasks, done = list[asyncio.Task[R]](), threading.Event()

        async def run() -> R:
            return await call()

        def begin() -> None:
            tasks.append(asyncio.create_task(run()))
            tasks[0].add_done_callback(lambda _: done.set())

        self._loop.call_soon_threadsafe(begin)
        try:
            done.wait()
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            done.wait()
            raise
        return tasks[0].result()

    def iterate(self, items: AsyncGenerator[R]) -> Iterator[R]:
        """The items as they come, none of them None; ended there where it is left here."""
        try:
            while (item := self.wait(lambda: anext(items, None))) is not None:
                yield item
        finally:
            if threading.current_thread() is self._thread:  # the collector came by here
                leaving = asyncio.ensure_future(items.aclose(), loop=self._loop)
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)
            elif not self._loop.is_closed():  # with the loop every generator has ended
                self.wait(items.aclose)
