"""One replica's work without Ray: an engine, and adapters fetched from the store when asked for.

A request whose adapter is held begins at once. Another one waits for it, with all who ask for the
same, while running requests go on; `arrivals` says when it comes in and who has to leave for it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.local_copies import LocalCopies
from cluster.mixes import NamedAdapter
from cluster.registry import Registry
from serving.adapter_loader import AdapterLoader
from serving.arrivals import Arrivals
from serving.engine import Engine, EngineStats, GenerationRequest, TokenOutput, joined
from serving.engine_thread import EngineThread, Outputs
from serving.spec import ServingSpec


class _NotHeldError(Exception):
    """The adapter left the engine between its check and the request's start."""


class Replica:
    """Serves `spec` from this process. Raises BaseModelError."""

    def __init__(self, spec: ServingSpec) -> None:
        self._thread = EngineThread(Engine(spec.engine))
        copies = LocalCopies(Registry(spec.store), Path(spec.cache).expanduser())
        loader = AdapterLoader(self._thread.engine, copies)
        self._arrivals = Arrivals(self._thread, loader)

    @property
    def adapters(self) -> list[str]:
        """References of the adapters that are loaded now."""
        return self._thread.engine.adapters

    @property
    def host_adapters(self) -> list[str]:
        """References of the adapters that come back from host memory."""
        return self._thread.engine.host_tier.refs

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
        while self._arrivals.has(adapter.ref):
            submitted = self._thread.submitted(request, lambda: self._require(adapter.ref))
            try:
                return await stack.enter_async_context(submitted)
            except _NotHeldError:
                continue
        async with self._arrivals.awaited(adapter):
            return await stack.enter_async_context(self._thread.submitted(request))

    def _require(self, ref: str) -> None:
        if ref not in self._thread.engine.adapters:
            raise _NotHeldError
