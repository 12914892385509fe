"""One replica's work without Ray: an engine, and adapters fetched from the store when asked for.

An adapter is fetched, verified and lowered in a thread while other requests go on, once for all
requests that wait for it; when the engine is full, the least recently used idle one leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.errors import OverloadedError
from cluster.mixes import AdapterMix, NamedAdapter
from cluster.registry import AdapterVersion, Registry
from serving.adapters import LoweredAdapter, Part
from serving.engine import Engine, EngineStats, GenerationRequest, TokenOutput, joined
from serving.engine_thread import EngineThread
from serving.spec import ServingSpec

_ROOM_POLL_S = 0.05
_ROOM_TIMEOUT_S = 30.0


class _NotLoadedError(Exception):
    """The adapter left the engine between its check and the request's start."""


class Replica:
    """Serves `spec` from this process. Raises BaseModelError."""

    def __init__(self, spec: ServingSpec) -> None:
        self._thread = EngineThread(Engine(spec.engine))
        self._registry = Registry(spec.store)
        self._cache = Path(spec.cache).expanduser()
        self._loading: dict[str, asyncio.Task[LoweredAdapter]] = {}

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
        outputs = self._start(request, adapter)
        async with aclosing(outputs):
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
        self, request: GenerationRequest, adapter: NamedAdapter | None
    ) -> AsyncGenerator[TokenOutput]:
        """Start the request with its adapter in the engine, waiting for room if it is full."""
        waited_s = 0.0
        lowered: LoweredAdapter | None = None
        while True:
            is_missing = adapter is not None and adapter.ref not in self._thread.engine.adapters
            if adapter is not None and is_missing and lowered is None:
                lowered = await self._load(adapter)

            def prepare(lowered: LoweredAdapter | None = lowered) -> None:
                engine = self._thread.engine
                if adapter is None or adapter.ref in engine.adapters:
                    return
                if lowered is None:
                    raise _NotLoadedError
                engine.install_adapter(adapter.ref, lowered, evict=True)

            outputs = self._thread.generate(request, prepare)
            async with aclosing(outputs):
                try:
                    output = await anext(outputs)
                except _NotLoadedError:
                    continue
                except OverloadedError:
                    # Every adapter that is held has requests; one of them will end.
                    if waited_s >= _ROOM_TIMEOUT_S:
                        raise
                    waited_s += _ROOM_POLL_S
                    await asyncio.sleep(_ROOM_POLL_S)
                    continue
                while output.finish_reason is None:
                    yield output
                    output = await anext(outputs)
                yield output
                return

    async def _load(self, adapter: NamedAdapter) -> LoweredAdapter:
        """Fetch and lower, or mix, once for all who ask at the same time."""
        task = self._loading.get(adapter.ref)
        if task is None:
            is_mix = isinstance(adapter, AdapterMix)
            making = self._mix(adapter) if is_mix else asyncio.to_thread(self._fetch, adapter)
            task = asyncio.create_task(making)
            self._loading[adapter.ref] = task
            task.add_done_callback(lambda _: self._loading.pop(adapter.ref, None))
        # Shielded: one of the waiting clients may leave.
        return await asyncio.shield(task)

    async def _mix(self, mix: AdapterMix) -> LoweredAdapter:
        """The sum of members, of which only those are fetched that are not held."""
        engine = self._thread.engine
        held = [engine.held_adapter(version.ref) for version, _ in mix.parts]
        missing = [v for (v, _), lowered in zip(mix.parts, held, strict=True) if lowered is None]
        fetched = iter(await asyncio.gather(*map(self._load, missing)))
        parts = [
            Part(version.ref, lowered or next(fetched), weight)
            for (version, weight), lowered in zip(mix.parts, held, strict=True)
        ]
        return await asyncio.to_thread(engine.mix, parts)

    def _fetch(self, adapter: AdapterVersion) -> LoweredAdapter:
        """From host memory, or else from the store."""
        engine = self._thread.engine
        lowered = engine.host_tier.get(adapter.ref)
        if lowered is None:
            lowered = engine.lower(self._registry.fetch(adapter, self._cache))
            engine.host_tier.put(adapter.ref, lowered)
        return lowered
