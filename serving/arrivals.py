"""Adapters on their way into an engine: a task for each, which is everybody's who waits for it.

The task belongs to the adapter. It keeps its place in line as long as somebody waits, whoever asked
first; when the last one leaves before the load has begun, so does the task. What has begun goes on,
and keeps one of the few places in which adapters lie outside of engine.adapters_gib until it is in
the engine or forgotten: clients that ask and leave make the line shorter and never the places more.
What nobody waits for any more stays if it takes no other's room.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cluster.errors import OverloadedError
from cluster.mixes import NamedAdapter
from serving.adapter_loader import LANES, AdapterLoader, lane_of
from serving.adapters import LoweredAdapter
from serving.engine_thread import EngineThread

_ROOM_POLL_S = 0.02


@dataclass(eq=False)
class _Arrival:
    """One adapter, and how many wait for it."""

    waiters: int = 0
    has_begun: bool = False
    there: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    unawaited: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Arrivals:
    """Brings what `loader` makes into the engine of `thread`. Used from one event loop."""

    def __init__(self, thread: EngineThread, loader: AdapterLoader) -> None:
        self._thread, self._loader = thread, loader
        self._arriving: dict[str, _Arrival] = {}
        self._tasks = set[asyncio.Task[None]]()  # the loop itself keeps none alive
        # Each in order of arrival.
        self._doors: Mapping[str, asyncio.Semaphore] = {
            lane: asyncio.Semaphore(places) for lane, places in LANES.items()
        }
        self._room = asyncio.Lock()
        self._leaving: str | None = None  # takes no new requests

    def has(self, ref: str) -> bool:
        """Whether the engine holds the adapter, and lets new requests use it."""
        return ref in self._thread.engine.adapters and ref != self._leaving

    @asynccontextmanager
    async def awaited(self, adapter: NamedAdapter) -> AsyncGenerator[None]:
        """The scope in which the adapter is in the engine and cannot leave it; entered when it is
        there. Raises GraftError, the same for all who wait, for what cannot be had or does not fit.
        """
        arrival = self._arriving.get(adapter.ref) or self._begin(adapter)
        arrival.waiters += 1
        arrival.unawaited.clear()
        try:
            await asyncio.shield(arrival.there)
            yield
        finally:
            arrival.waiters -= 1
            if not arrival.waiters:
                arrival.unawaited.set()
                if not arrival.has_begun:
                    self._leave_line(adapter.ref, arrival)

    def _begin(self, adapter: NamedAdapter) -> _Arrival:
        arrival = self._arriving[adapter.ref] = _Arrival()
        arrival.task = asyncio.create_task(self._bring(adapter, arrival))
        self._tasks.add(arrival.task)
        arrival.task.add_done_callback(self._tasks.discard)
        return arrival

    def _leave_line(self, ref: str, arrival: _Arrival) -> None:
        assert arrival.task is not None, "it was begun"
        arrival.task.cancel()
        del self._arriving[ref]  # whoever asks next stands at the end of the line

    async def _bring(self, adapter: NamedAdapter, arrival: _Arrival) -> None:
        """Load the adapter when it is its turn, and hold it until all who waited have begun."""
        engine = self._thread.engine
        try:
            async with self._doors[lane_of(adapter)]:
                arrival.has_begun = True
                lowered = engine.held_adapter(adapter.ref)
                if lowered is None:
                    lowered = await self._loader.load(adapter)
                held = await self._install(adapter.ref, lowered, arrival)
                del lowered  # the engine's, or nobody's
        except Exception as error:
            arrival.there.set_exception(error)
            arrival.there.exception()  # perhaps nobody waits
            return
        finally:
            if arrival.has_begun:
                del self._arriving[adapter.ref]
        if held is None:
            return
        arrival.there.set_result(None)
        try:
            if arrival.waiters:
                await arrival.unawaited.wait()
        finally:  # the loop may end with the last request
            self._thread.post(lambda: engine.release_adapter(held))

    async def _install(self, ref: str, lowered: LoweredAdapter, arrival: _Arrival) -> str | None:
        """Put the adapter into the engine as soon as there is room for it, and hold it; None if
        nobody waits any more and others would have to leave for it."""
        engine = self._thread.engine

        def install() -> str:
            if ref not in engine.adapters:
                engine.install_adapter(ref, lowered, evict=arrival.waiters > 0)
            return engine.hold_adapter(ref)

        async with self._room:
            try:
                while True:
                    try:
                        return await self._thread.call(install)
                    except OverloadedError:
                        if not arrival.waiters:
                            return None
                        # Every adapter that is held has requests, and these come to an end.
                        if self._leaving not in engine.adapters:
                            self._leaving = await self._thread.call(engine.least_used_adapter)
                        await asyncio.sleep(_ROOM_POLL_S)
            finally:
                self._leaving = None
