"""The gateway's core: a checked body to requests for a replica, its tokens to pieces of answers.

Knows protocol, catalogue and tokenizer, and a backend that runs requests; nothing of HTTP
frameworks, Ray or engines' insides.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from cluster.base_model import encode_prompt, encode_text
from cluster.errors import (
    DeadlineError,
    EngineError,
    OverloadedError,
    RequestError,
    StoreError,
)
from cluster.mixes import NamedAdapter
from serving.catalogue import Catalogue
from serving.engine.request import FinishReason, GenerationRequest, Times, TokenLogprobs
from serving.gateway import failover
from serving.gateway.access import Tenant
from serving.gateway.chat import render
from serving.gateway.jobs import Job, encoded, is_quick, requests_of, sampled
from serving.gateway.metrics import Metrics
from serving.gateway.tracing import current
from serving.protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from serving.spec import GatewaySpec

# OpenAI's default.
_COMPLETION_TOKENS = 16
_STORE_S = 30.0  # for a few kilobytes, of which a request needs to know what it asks
T = TypeVar("T")
# Prompts, and the requests for all answers to them.
_Made = tuple[list[list[int]], list[GenerationRequest]]


@dataclass(frozen=True)
class Piece:
    """New text of the answer `index`; `finish_reason` comes with its last piece."""

    index: int
    text: str
    tokens: int
    finish_reason: str | None
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    embedding: np.ndarray | None = field(default=None, compare=False)


class Service:
    """What all connections of one gateway share.

    Args:
        context_tokens: The engines' context, by which prompts are refused before they are sent;
            None leaves it to the engines.
    """

    def __init__(
        self,
        backend: failover.Backend,
        catalogue: Catalogue,
        tokenizer: Any,
        spec: GatewaySpec,
        metrics: Metrics,
        context_tokens: int | None = None,
    ) -> None:
        self.backend, self.catalogue, self.tokenizer = backend, catalogue, tokenizer
        self.metrics = metrics
        self._spec, self._context_tokens = spec, context_tokens
        self._in_progress = 0

    @contextmanager
    def admitted(self, tenant: Tenant, answers: int, param: str) -> Generator[None]:
        """The scope of one request for so many answers, entered before anything is computed for it.

        Args:
            param: The field that asks for them.

        Raises:
            RequestError: they are more than is ever taken at once.
            OverloadedError: they are too many for now; RateLimitError: for this tenant.
        """
        most = self._spec.max_waiting_requests
        if answers > most:
            raise RequestError(
                f"{param} asks for {answers:,} answers, over the {most:,} that "
                "gateway.max_waiting_requests allows in all; send less at once",
                param=param,
            )
        if self._in_progress + answers > most:
            raise OverloadedError(
                f"{self._in_progress} requests are in progress, of {most} at most "
                "(gateway.max_waiting_requests); try again later"
            )
        with tenant.request(answers, param):
            self._in_progress += answers
            try:
                yield
            finally:
                self._in_progress -= answers

    async def completion_job(self, body: CompletionRequest, tenant: Tenant, began_s: float) -> Job:
        """Of a request that arrived at `began_s`. Raises CallerError for whatever cannot run."""
        adapter = await self._resolve(body.model, tenant)

        def make() -> _Made:
            prompts = encoded(self.tokenizer, body.prompts, encode_prompt)
            is_ranked = body.per_prompt > (body.n or 1)
            options = sampled(body) | {
                "max_tokens": _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
                "logprobs": 0 if body.logprobs is None and is_ranked else body.logprobs,
                "prompt_logprobs": body.logprobs if body.echo else None,
            }
            return prompts, self._requests(prompts, options, adapter, tenant, body.per_prompt)

        is_plain = not body.logit_bias and body.form is None
        at_once = is_plain and is_quick(body.prompts, body.answers)
        made = make() if at_once else await asyncio.to_thread(make)
        return _job("cmpl", body.model, adapter, tenant, made, began_s)

    async def chat_job(self, body: ChatRequest, tenant: Tenant, began_s: float) -> Job:
        """Of a request that arrived at `began_s`. Raises CallerError for whatever cannot run."""
        adapter = await self._resolve(body.model, tenant)

        def make() -> _Made:
            prompt = render(
                self.tokenizer,
                body.messages,
                body.tools_in_use,
                add_generation_prompt=body.add_generation_prompt,
            )
            tokens = body.max_completion_tokens
            options = sampled(body) | {
                "max_tokens": body.max_tokens if tokens is None else tokens,
                "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
            }
            return [prompt], self._requests([prompt], options, adapter, tenant, body.answers)

        made = await asyncio.to_thread(make)
        return _job("chatcmpl", body.model, adapter, tenant, made, began_s)

    async def embedding_job(self, body: EmbeddingRequest, tenant: Tenant, began_s: float) -> Job:
        """Of a request that arrived at `began_s`. Raises CallerError for whatever cannot run."""
        adapter = await self._resolve(body.model, tenant)

        def make() -> _Made:
            prompts = encoded(self.tokenizer, body.inputs, encode_text)
            options: dict[str, Any] = {
                "adapter_rank": body.adapter_rank,
                "max_tokens": 0,
                "pooling": self._spec.pooling,
                "dimensions": body.dimensions,
                "seed": 0,
            }
            return prompts, self._requests(prompts, options, adapter, tenant, 1)

        at_once = is_quick(body.inputs, body.answers)
        made = make() if at_once else await asyncio.to_thread(make)
        return _job("embd", body.model, adapter, tenant, made, began_s)

    async def run(self, job: Job, *, stream: bool) -> AsyncGenerator[list[Piece]]:
        """Run all answers of a job at once; pieces as they come, those together that are there at
        the same time.

        Raises:
            GraftError: an answer failed or is late; the others are cancelled.
        """
        self.metrics.begun(job.label, len(job.requests), job.prompt_tokens)
        trace = current.get()
        if trace is not None:
            ref = job.adapter.ref if job.adapter else ""
            trace.describe(model=job.model, adapter=ref, prompt_tokens=job.prompt_tokens)
        tokens = 0
        try:
            answers = [
                self._answer(index, request, job, stream)
                for index, request in enumerate(job.requests)
            ]
            async with aclosing(_merge(answers)) as merged:
                async for pieces in self._in_time(job, merged, stream):
                    tokens += sum(piece.tokens for piece in pieces)
                    yield pieces
        finally:
            job.tenant.spend(job.prompt_tokens + tokens)
            seconds = time.monotonic() - job.began_s
            self.metrics.ended(job.label, len(job.requests), tokens, seconds)

    async def _in_time(
        self, job: Job, merged: AsyncGenerator[list[Piece]], stream: bool
    ) -> AsyncGenerator[list[Piece]]:
        """`merged` as long as none is late; a stream's waiting times are counted."""
        waiting_since, is_first = job.began_s, True
        while True:
            limit_s = self._spec.request_timeout_s
            if stream and is_first:
                limit_s = min(limit_s, self._spec.first_token_timeout_s)
            try:
                left_s = job.began_s + limit_s - time.monotonic()
                async with asyncio.timeout(left_s):
                    pieces = await anext(merged, None)
            except TimeoutError as error:
                what = "first token" if stream and is_first else "answer"
                raise DeadlineError(
                    f"the {what} was not there after {limit_s:g} s; try again, or ask for less"
                ) from error
            if pieces is None:
                return
            now = time.monotonic()
            if stream and is_first:
                self.metrics.first_token(job.label, now - waiting_since)
            elif stream:
                each = sum(p.tokens for p in pieces) / len({p.index for p in pieces})
                self.metrics.next_tokens(each, now - waiting_since)
            waiting_since, is_first = now, False
            yield pieces

    async def _answer(
        self, index: int, request: GenerationRequest, job: Job, stream: bool
    ) -> AsyncGenerator[Piece]:
        outputs = failover.generate(
            self.backend, request, job.adapter, stream=stream, on_loss=self.metrics.failover
        )
        tokens = 0
        async with aclosing(outputs):
            async for output in outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise EngineError(output.error or "the engine failed on this request")
                reason = output.finish_reason
                tokens += len(output.token_ids)
                if output.times is not None:
                    self._tell(index, job, output.times, tokens)
                yield Piece(
                    index,
                    output.text,
                    len(output.token_ids),
                    reason and reason.value,
                    output.logprobs,
                    output.prompt_logprobs,
                    output.embedding,
                )

    def _tell(self, index: int, job: Job, times: Times, tokens: int) -> None:
        """Count, and trace, where the time of an answer that ends now went."""
        seconds = time.monotonic() - job.began_s
        self.metrics.queued(job.label, max(0.0, seconds - times.first_token_s - times.rest_s))
        trace = current.get()
        if trace is not None:
            trace.answered(index, times, job.began_s, tokens)

    async def _resolve(self, model: str, tenant: Tenant) -> NamedAdapter | None:
        return await self.in_time(self.catalogue.find(model, tenant.allows))

    async def in_time(self, found: Awaitable[T]) -> T:
        """What is asked of the catalogue. Raises StoreError where the store takes too long."""
        limit_s = min(self._spec.request_timeout_s, _STORE_S)
        try:
            async with asyncio.timeout(limit_s):
                return await found
        except TimeoutError as error:
            raise StoreError(
                f"the adapters' store did not answer within {limit_s:g} s; try again"
            ) from error

    def _requests(
        self,
        prompts: list[list[int]],
        options: Mapping[str, Any],
        adapter: NamedAdapter | None,
        tenant: Tenant,
        per_prompt: int,
    ) -> list[GenerationRequest]:
        own = {"adapter": adapter.ref if adapter else None, "cache_salt": tenant.cache_salt}
        context = self._context_tokens
        return requests_of(
            prompts, {**options, **own}, per_prompt=per_prompt, context_tokens=context
        )


def _job(
    kind: str,
    model: str,
    adapter: NamedAdapter | None,
    tenant: Tenant,
    made: _Made,
    began_s: float,
) -> Job:
    prompts, requests = made
    return Job(
        f"{kind}-{secrets.token_hex(12)}", model, adapter, tenant, prompts, requests, began_s
    )


async def _merge(answers: list[AsyncGenerator[Piece]]) -> AsyncGenerator[list[Piece]]:
    """The pieces of several answers in the order in which they come; an engine's step brings one
    for each, and those go on together."""
    if len(answers) == 1:
        async with aclosing(answers[0]) as only:
            async for piece in only:
                yield [piece]
        return
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def forward(answer: AsyncGenerator[Piece]) -> None:
        try:
            async with aclosing(answer):
                async for piece in answer:
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(forward(answer)) for answer in answers]
    try:
        left = len(tasks)
        while left:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            if pieces := [item for item in items if isinstance(item, Piece)]:
                yield pieces
            for item in items:
                if isinstance(item, Exception):
                    raise item
            left -= items.count(None)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
