"""The gateway's core: a checked body to requests for a replica, its tokens to pieces of answers.

Knows protocol, catalogue and tokenizer, and a backend that runs requests; nothing of HTTP
frameworks, Ray or engines' insides.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.base_model import encode_prompt, encode_text
from cluster.errors import DeadlineError, EngineError, OverloadedError, RequestError
from cluster.mixes import NamedAdapter
from serving.catalogue import Catalogue
from serving.engine.request import (
    MAX_SEED,
    FinishReason,
    GenerationRequest,
    ResponseFormat,
    Times,
    TokenLogprobs,
    choices,
)
from serving.gateway import failover
from serving.gateway.access import Tenant
from serving.gateway.chat import render
from serving.gateway.metrics import Metrics
from serving.gateway.tracing import current
from serving.protocol import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Sampling,
    Usage,
)
from serving.spec import GatewaySpec

# OpenAI's defaults.
_COMPLETION_TOKENS = 16
_TEMPERATURE = 1.0
# Characters whose tokens are there sooner than a thread would have them.
_ENCODED_AT_ONCE = 1000
# Options that mean the same to the engine.
_SAME = (
    "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "stop_token_ids", "adapter_rank",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One HTTP request, resolved: every answer that it asks for, in order of index.

    `requests` has `per_prompt` answers for each of `prompts` in turn. `began_s` is the monotonic
    time of its arrival.
    """

    id: str
    model: str
    adapter: NamedAdapter | None
    tenant: Tenant
    prompts: list[list[int]]
    requests: list[GenerationRequest]
    began_s: float

    @property
    def per_prompt(self) -> int:
        """Answers to each prompt."""
        return len(self.requests) // len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def label(self) -> str:
        """The adapter's name, for the metrics."""
        return self.adapter.name if self.adapter else self.model

    def usage(self, completion_tokens: int) -> Usage:
        """Its token counts."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.prompt_tokens + completion_tokens,
        )


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
    """What all connections of one gateway share."""

    def __init__(
        self,
        backend: failover.Backend,
        catalogue: Catalogue,
        tokenizer: Any,
        spec: GatewaySpec,
        metrics: Metrics,
    ) -> None:
        self.backend, self.catalogue, self.tokenizer = backend, catalogue, tokenizer
        self.metrics = metrics
        self._spec = spec
        self._in_progress = 0

    async def completion_job(self, body: CompletionRequest, tenant: Tenant, began_s: float) -> Job:
        """Of a request that arrived at `began_s`. Raises CallerError for whatever cannot run."""
        adapter = await self._resolve(body.model, tenant)
        per_prompt = max(body.n or 1, body.best_of or 1)
        self._check_count(len(body.prompts) * per_prompt, "prompt")
        prompts = await self._encoded(body.prompts, encode_prompt)
        is_ranked = per_prompt > (body.n or 1)
        return self._job(
            "cmpl", began_s, body, tenant, adapter, prompts, per_prompt,
            max_tokens=_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
            logprobs=0 if body.logprobs is None and is_ranked else body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )  # fmt: skip

    async def chat_job(self, body: ChatRequest, tenant: Tenant, began_s: float) -> Job:
        """Of a request that arrived at `began_s`. Raises CallerError for whatever cannot run."""
        adapter = await self._resolve(body.model, tenant)
        self._check_count(body.n or 1, "n")
        prompt = await asyncio.to_thread(render, self.tokenizer, body.messages, body.tools_in_use)
        tokens = body.max_completion_tokens
        return self._job(
            "chatcmpl", began_s, body, tenant, adapter, [prompt], body.n or 1,
            max_tokens=body.max_tokens if tokens is None else tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )  # fmt: skip

    async def embedding_job(self, body: EmbeddingRequest, tenant: Tenant, began_s: float) -> Job:
        """Of a request that arrived at `began_s`. Raises CallerError for whatever cannot run."""
        adapter = await self._resolve(body.model, tenant)
        self._check_count(len(body.inputs), "input")
        prompts = await self._encoded(body.inputs, encode_text)
        requests = [
            GenerationRequest(
                prompt_token_ids=prompt,
                adapter=adapter.ref if adapter else None,
                adapter_rank=body.adapter_rank,
                cache_salt=tenant.cache_salt,
                max_tokens=0,
                pooling=self._spec.pooling,
                dimensions=body.dimensions,
                seed=0,
            )
            for prompt in prompts
        ]
        for request in requests:
            request.check()
        request_id = f"embd-{secrets.token_hex(12)}"
        return Job(request_id, body.model, adapter, tenant, prompts, requests, began_s)

    async def run(self, job: Job, *, stream: bool) -> AsyncGenerator[list[Piece]]:
        """Run all answers of a job at once; pieces as they come, those together that are there at
        the same time.

        Raises:
            GraftError: an answer failed or is late; the others are cancelled.
        """
        if self._in_progress + len(job.requests) > self._spec.max_waiting_requests:
            raise OverloadedError(
                f"{self._in_progress} requests are in progress, of "
                f"{self._spec.max_waiting_requests} at most (gateway.max_waiting_requests); try "
                "again later"
            )
        with job.tenant.request(len(job.requests)):
            self._in_progress += len(job.requests)
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
                self._in_progress -= len(job.requests)
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
        if self.catalogue.is_at_hand(model, tenant.allows):
            return self.catalogue.resolve(model, tenant.allows)
        return await asyncio.to_thread(self.catalogue.resolve, model, tenant.allows)

    def _check_count(self, answers: int, param: str) -> None:
        if answers > self._spec.max_waiting_requests:
            raise RequestError(
                f"{param} asks for {answers:,} answers, over the "
                f"{self._spec.max_waiting_requests:,} that gateway.max_waiting_requests allows in "
                "all; send less at once",
                param=param,
            )

    async def _encoded(
        self, prompts: Sequence[str | list[int]], encode: Callable[[Any, str], list[int]]
    ) -> list[list[int]]:
        def encoded() -> list[list[int]]:
            return [
                encode(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]

        characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return encoded() if characters <= _ENCODED_AT_ONCE else await asyncio.to_thread(encoded)

    def _job(
        self,
        kind: str,
        began_s: float,
        body: Sampling,
        tenant: Tenant,
        adapter: NamedAdapter | None,
        prompts: list[list[int]],
        per_prompt: int,
        **options: Any,
    ) -> Job:
        """Choices of one prompt differ by their seeds, which are drawn here if none is given:
        another replica must be able to go on with an answer."""
        seed = secrets.randbelow(MAX_SEED) if body.seed is None else body.seed
        requests: list[GenerationRequest] = []
        for prompt in prompts:
            first = GenerationRequest(
                prompt_token_ids=prompt,
                adapter=adapter.ref if adapter else None,
                cache_salt=tenant.cache_salt,
                temperature=_TEMPERATURE if body.temperature is None else body.temperature,
                seed=seed,
                stop=body.stop_texts,
                logit_bias=body.biases,
                ignore_eos=body.ignore_eos,
                response_format=ResponseFormat(*body.form) if body.form else None,
                **{name: given for name in _SAME if (given := getattr(body, name)) is not None},
                **options,
            )
            first.check()
            if not prompt:
                raise RequestError("prompt is empty; give at least one token", param="prompt")
            requests += choices(first, per_prompt)
        if not requests:
            raise RequestError("prompt is an empty list; give at least one prompt", param="prompt")
        request_id = f"{kind}-{secrets.token_hex(12)}"
        return Job(request_id, body.model, adapter, tenant, prompts, requests, began_s)


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
