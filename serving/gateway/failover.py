"""A request's outputs over as many replicas as it takes.

Random numbers follow from (seed, position), so another replica goes on behind the tokens that
were given out as the lost one would have: whoever reads sees one answer without gap or repeat.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

import structlog

from cluster.errors import UnavailableError
from cluster.mixes import NamedAdapter
from serving.engine.request import GenerationRequest, TokenOutput

_log = structlog.get_logger("graft.gateway")
# A request that itself brings replicas down must not bring them all down.
MAX_LOSSES = 6
_FIRST_PAUSE_S = 0.05


class Backend(Protocol):
    """Runs one request on some replica."""

    def generate(
        self, request: GenerationRequest, adapter: NamedAdapter | None, *, stream: bool
    ) -> AsyncGenerator[TokenOutput]:
        """The request's outputs as they come; without `stream`, all in one. Closing it early
        cancels the request. Raises UnavailableError where the replica is lost."""
        ...

    async def check_health(self) -> None:
        """Raise UnavailableError if no replica answers."""
        ...

    async def figures(self) -> Mapping[str, Mapping[str, Any]]:
        """What each replica last told of itself: serving.engine.EngineStats as a mapping, by the
        replica's id."""
        ...


async def generate(
    backend: Backend,
    request: GenerationRequest,
    adapter: NamedAdapter | None,
    *,
    stream: bool,
    on_loss: Callable[[], None],
) -> AsyncGenerator[TokenOutput]:
    """As Backend.generate, of a request with a seed, but a lost replica is replaced by another.

    Args:
        on_loss: Called for each replica that is lost.

    Raises:
        UnavailableError: MAX_LOSSES replicas were lost under it, one after the other.
    """
    assert request.seed is not None, "the answer goes on elsewhere only by the same seed"
    losses = 0
    while True:
        outputs = backend.generate(request, adapter, stream=stream)
        given = list(request.generated_token_ids)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    given += output.token_ids
                    yield output
                    if output.finish_reason is not None:
                        return
            raise UnavailableError("the replica's stream ended before the answer did; try again")
        except UnavailableError as error:
            losses += 1
            on_loss()
            if losses == MAX_LOSSES:
                raise
            _log.warning("replica lost", losses=losses, given=len(given), error=error.message)
        request = replace(request, generated_token_ids=tuple(given))
        await asyncio.sleep(_FIRST_PAUSE_S * 2**losses * random.uniform(0.5, 1.0))
