"""From a reference to primitives: adapters fetched, verified and lowered beside a running engine.

Once for all who ask at the same time, in threads that give way to the engine's. Knows the store
and what an engine makes of a folder; which adapters an engine holds, and for whom, is the replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from cluster.mixes import AdapterMix, NamedAdapter
from cluster.registry import AdapterVersion, Registry
from serving.adapters import LoweredAdapter, Part, beside
from serving.background import background
from serving.engine import Engine

# A store answers several at once; lowering takes a core, and each more would be the steps'.
_FETCHES = 4


class AdapterLoader:
    """Makes adapters of `registry` for `engine`. Used from one event loop."""

    def __init__(self, engine: Engine, registry: Registry, cache: Path) -> None:
        self._engine, self._registry, self._cache = engine, registry, cache
        self._loading: dict[str, asyncio.Task[LoweredAdapter]] = {}
        self._fetching = background("fetch", _FETCHES)
        self._lowering = background("lower", 1)

    async def load(self, adapter: NamedAdapter) -> LoweredAdapter:
        """Fetch and lower, or mix. Raises GraftError for what cannot be had or does not fit."""
        task = self._loading.get(adapter.ref)
        if task is None:
            is_mix = isinstance(adapter, AdapterMix)
            making = self._mix(adapter) if is_mix else self._make(adapter)
            task = asyncio.create_task(making)
            self._loading[adapter.ref] = task
            task.add_done_callback(lambda _: self._loading.pop(adapter.ref, None))
        # Shielded: one of the waiting clients may leave.
        return await asyncio.shield(task)

    async def _make(self, adapter: AdapterVersion) -> LoweredAdapter:
        """From host memory, or else from the store."""
        loop, tier = asyncio.get_running_loop(), self._engine.host_tier
        lowered = await loop.run_in_executor(self._fetching, tier.get, adapter.ref)
        if lowered is None:
            folder = await loop.run_in_executor(
                self._fetching, self._registry.fetch, adapter, self._cache
            )
            lowered = await loop.run_in_executor(
                self._lowering, self._lower, folder, adapter.content_hash
            )
            await loop.run_in_executor(self._fetching, tier.put, adapter.ref, lowered)
        return lowered

    def _lower(self, folder: Path, content: str) -> LoweredAdapter:
        with beside(lambda: self._engine.has_work):
            return self._engine.lower(folder, content)

    async def _mix(self, mix: AdapterMix) -> LoweredAdapter:
        """The sum of members, of which only those are fetched that are not held."""
        engine = self._engine
        held = [engine.held_adapter(version.ref) for version, _ in mix.parts]
        missing = [v for (v, _), lowered in zip(mix.parts, held, strict=True) if lowered is None]
        fetched = iter(await asyncio.gather(*map(self.load, missing)))
        parts = [
            Part(version.ref, lowered or next(fetched), weight)
            for (version, weight), lowered in zip(mix.parts, held, strict=True)
        ]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._lowering, self._summed, parts)

    def _summed(self, parts: Sequence[Part]) -> LoweredAdapter:
        with beside(lambda: self._engine.has_work):
            return self._engine.mix(parts)
