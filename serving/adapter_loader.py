"""From a reference to primitives: adapters fetched, verified and lowered beside a running engine.

Once for all who ask at the same time for the same content, in threads that give way to the
engine's. Knows the store and what an engine makes of a folder; which adapters an engine holds, and
for whom, is the replica's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from cluster.errors import CopyChangedError, GraftError
from cluster.local_copies import LocalCopies
from cluster.mixes import AdapterMix, NamedAdapter
from cluster.registry import AdapterVersion
from serving.adapters import MERGED, LoweredAdapter, Pace, Part, give_way
from serving.background import background
from serving.engine import Engine

# How many are loaded at a time, of what is alike: a store answers several at once; what PEFT merges
# can take minutes, and PEFT does one at a time; of mixes anybody may ask for as many as he likes.
# Each lies outside of engine.adapters_gib until there is room for it.
LANES: Mapping[str, int] = {"plain": 4, "merged": 1, "mix": 1}
# Of a core, what loading may take from a busy engine. Where its steps use every core, they are as
# much longer; where they do not, lowering alone disturbs them, by the interpreter's lock.
_SHARE, _SHARE_OF_LOCK = 0.08, 0.2


def lane_of(adapter: NamedAdapter) -> str:
    """The key of LANES that tells with how many others it is loaded."""
    if isinstance(adapter, AdapterMix):
        return "mix"
    return "merged" if adapter.method in MERGED else "plain"


class AdapterLoader:
    """Makes adapters of `copies` for `engine`. Used from one event loop, which sees to it that no
    more are asked for at a time than LANES has places."""

    def __init__(self, engine: Engine, copies: LocalCopies) -> None:
        self._engine, self._copies = engine, copies
        # By content, with the reference that it was asked for by.
        self._loading: dict[str, tuple[str, asyncio.Task[LoweredAdapter]]] = {}
        self._fetching = background("fetch", sum(LANES.values()))
        # One thread each: more would take more from the steps, and of what was freed again malloc
        # gives a thread its own alone.
        self._lowering = {lane: background(f"lower-{lane}", 1) for lane in LANES}
        steps_on = torch.get_num_threads() if engine.runner.device.type == "cpu" else 0
        self._is_on_steps_cores = steps_on >= len(os.sched_getaffinity(0))
        share = _SHARE if self._is_on_steps_cores else _SHARE_OF_LOCK
        self._pace = Pace(lambda: engine.has_work, share)

    async def load(self, adapter: NamedAdapter) -> LoweredAdapter:
        """Fetch and lower, or mix. Raises GraftError for what cannot be had or does not fit."""
        if isinstance(adapter, AdapterMix):
            return await self._mix(adapter)
        ref, task = self._loading.get(adapter.content_hash, (adapter.ref, None))
        if task is None:
            loop = asyncio.get_running_loop()
            task = loop.create_task(self._make(adapter))
            self._loading[adapter.content_hash] = ref, task
            task.add_done_callback(lambda _: self._loading.pop(adapter.content_hash, None))
        try:
            # Shielded: it may be another's too, under another name or as a part of a mix.
            return await asyncio.shield(task)
        except GraftError:
            if ref == adapter.ref:
                raise
        # Files of its own, which may be sound; and whose the others are is nobody's business.
        return await self._make(adapter)

    async def _make(self, adapter: AdapterVersion) -> LoweredAdapter:
        """From host memory, or else from the store."""
        loop, tier, content = (
            asyncio.get_running_loop(),
            self._engine.host_tier,
            adapter.content_hash,
        )
        lowered = await loop.run_in_executor(self._fetching, tier.get, content)
        if lowered is None:
            try:
                lowered = await self._fresh(adapter)
            except CopyChangedError:  # by another replica of this node, say, that fetched it anew
                lowered = await self._fresh(adapter)
            await loop.run_in_executor(self._fetching, tier.put, content, lowered, adapter.ref)
        return lowered

    async def _fresh(self, adapter: AdapterVersion) -> LoweredAdapter:
        loop = asyncio.get_running_loop()
        folder = await loop.run_in_executor(self._fetching, self._fetched, adapter)
        thread, content = self._lowering[lane_of(adapter)], adapter.content_hash
        return await loop.run_in_executor(thread, self._lowered, folder, content)

    def _fetched(self, adapter: AdapterVersion) -> Path:
        with self._pace.kept() if self._is_on_steps_cores else nullcontext():
            return self._copies.fetch(adapter, give_way)

    def _lowered(self, folder: Path, content: str) -> LoweredAdapter:
        with self._pace.kept():
            try:
                return self._engine.lower(folder, content)
            finally:
                # It goes by the hash of what was verified, which must be what was read; and what
                # else may have been wrong with it is no fault of the adapter's.
                self._copies.check(folder)

    async def _mix(self, mix: AdapterMix) -> LoweredAdapter:
        """The sum of members, of which only those are fetched that are not held; one by one, so
        that a mix takes one place alone."""
        parts: list[Part] = []
        for version, weight in mix.parts:
            lowered = self._engine.held_adapter(version.ref) or await self.load(version)
            parts.append(Part(version.ref, lowered, weight))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._lowering["mix"], self._summed, parts)

    def _summed(self, parts: Sequence[Part]) -> LoweredAdapter:
        with self._pace.kept():
            return self._engine.mix(parts)
