"""One replica's work without Ray: an engine, and adapters fetched from the store when asked for.

A request whose adapter is not held brings it in: it is loaded beside the running requests, once
for all who wait for it, and installed with the first of them. Only so many are on their way at a
time, and whoever comes later waits in line without holding memory. When the engine is full the
least recently used idle adapter leaves; if none is idle, one takes no new requests until it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.errors import OverloadedError, RequestError
from cluster.mixes import AdapterMix, NamedAdapter
from cluster.registry import Registry
from serving.adapter_loader import AdapterLoader
from serving.adapters import LoweredAdapter
from serving.engine import Engine, EngineStats, GenerationRequest, TokenOutput, joined
from serving.engine_thread import EngineThread, Outputs
from serving.spec import ServingSpec

_ROOM_POLL_S = 0.02
# Adapters on their way in: they lie outside of engine.adapters_gib until there is room for them.
_ARRIVING = 4
# Of mixes, as anybody may ask for as many as he likes.
_ARRIVING_MIXES = 1


class _NotHeldError(Exception):
    """The adapter left the engine between its check and the request's start."""


class Replica:
    """Serves `spec` from this process. Raises BaseModelError."""

    def __init__(self, spec: ServingSpec) -> None:
        self._thread = EngineThread(Engine(spec.engine))
        cache = Path(spec.cache).expanduser()
        self._loader = AdapterLoader(self._thread.engine, Registry(spec.store), cache)
        self._arriving: dict[str, asyncio.Future[None]] = {}
        self._door = asyncio.Semaphore(_ARRIVING)  # in order of arrival, as is the lock
        self._mix_door = asyncio.Semaphore(_ARRIVING_MIXES)
        self._room = asyncio.Lock()
        self._leaving: str | None = None  # takes no new requests

    @property
    def adapters(self) -> list[str]:
        """References of the adapters that are loaded now."""
        return self._thread.engine.adapters

    async def stats(self) -> EngineStats:
        """The engine's counts, between two steps."""
        return await self._thread.call(lambda: self._thread.engine.stats)

    async def generate(
        self, request: GenerationRequest, adapter: NamedAdapter | None, *, stream: bool
    ) -> AsyncGenerator[TokenOutput]:
        """As serving.gateway.failover.Backend. Raises GraftError before the first output."""
        async with AsyncExitStack() as stack:
            outputs = await self._start(stack, request, adapter)
            if stream:
                async for output in outputs:
                    yield output
                return
            parts = [output async for output in outputs]
            yield joined(parts)

    async def figures(self) -> Mapping[str, Mapping[str, Any]]:
        """As serving.gateway.failover.Backend."""
        return {"here": asdict(await self.stats())}

    def stop(self) -> None:
        """End the engine and every request."""
        self._thread.stop()

    async def check_health(self) -> None:
        """Raise UnavailableError if the engine has stopped."""
        await self._thread.call(lambda: None)

    async def _start(
        self, stack: AsyncExitStack, request: GenerationRequest, adapter: NamedAdapter | None
    ) -> Outputs:
        """Submit the request for the scope of `stack`, with its adapter in the engine."""
        if adapter is None:
            return await stack.enter_async_context(self._thread.submitted(request))
        while True:
            if adapter.ref in self._thread.engine.adapters and adapter.ref != self._leaving:
                submitted = self._thread.submitted(request, lambda: self._require(adapter.ref))
                try:
                    return await stack.enter_async_context(submitted)
                except _NotHeldError:
                    continue
            arrival = self._arriving.get(adapter.ref)
            if arrival is None:
                return await self._bring(stack, request, adapter)
            await asyncio.shield(arrival)

    async def _bring(
        self, stack: AsyncExitStack, request: GenerationRequest, adapter: NamedAdapter
    ) -> Outputs:
        """Load the adapter and submit the request with it, when it is its turn. Who waits for the
        same one meanwhile is told when it is there, or why it is not."""
        arrival = self._arriving[adapter.ref] = asyncio.get_running_loop().create_future()
        try:
            async with self._mix_door if isinstance(adapter, AdapterMix) else self._door:
                lowered = self._thread.engine.held_adapter(adapter.ref)
                if lowered is None:
                    lowered = await self._loader.load(adapter)
                return await self._install(stack, request, adapter.ref, lowered)
        except RequestError:
            raise  # this request's own: the next one brings the adapter
        except Exception as error:
            arrival.set_exception(error)
            arrival.exception()  # perhaps nobody waits
            raise
        finally:
            del self._arriving[adapter.ref]
            if not arrival.done():
                arrival.set_result(None)

    async def _install(
        self, stack: AsyncExitStack, request: GenerationRequest, ref: str, lowered: LoweredAdapter
    ) -> Outputs:
        """Submit the request and its adapter together, as soon as there is room for it."""
        engine = self._thread.engine

        def prepare() -> None:
            if ref not in engine.adapters:
                engine.install_adapter(ref, lowered, evict=True)

        async with self._room:
            try:
                while True:
                    submitted = self._thread.submitted(request, prepare)
                    try:
                        return await stack.enter_async_context(submitted)
                    except OverloadedError:
                        # Every adapter that is held has requests, and these come to an end.
                        if self._leaving not in engine.adapters:
                            self._leaving = await self._thread.call(engine.least_used_adapter)
                        await asyncio.sleep(_ROOM_POLL_S)
            finally:
                self._leaving = None

    def _require(self, ref: str) -> None:
        if ref not in self._thread.engine.adapters:
            raise _NotHeldError
