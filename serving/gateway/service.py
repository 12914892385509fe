"""The gateway's core: a checked body to requests for a replica, its tokens to bodies.

Knows protocol, catalogue and tokenizer, and a backend that runs requests; nothing of HTTP
frameworks, Ray or engines' insides.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cluster.base_model import encode_prompt
from cluster.errors import EngineError, GraftError, OverloadedError, RequestError
from cluster.registry import AdapterVersion
from serving.catalogue import Catalogue
from serving.engine.request import (
    MAX_SEED,
    FinishReason,
    GenerationRequest,
    ResponseFormat,
    choices,
)
from serving.gateway import failover
from serving.protocol import ChatRequest, CompletionRequest, Sampling, Usage

# OpenAI's defaults.
_COMPLETION_TOKENS = 16
_TEMPERATURE = 1.0
# Options that mean the same to the engine.
_SAME = (
    "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "stop_token_ids", "adapter_rank",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One HTTP request, resolved: every answer that it asks for, in order of index."""

    id: str
    model: str
    adapter: AdapterVersion | None
    requests: list[GenerationRequest]
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """New text of the answer `index`; `finish_reason` comes with its last piece."""

    index: int
    text: str
    tokens: int
    finish_reason: str | None


class Service:
    """What all connections of one gateway share."""

    def __init__(
        self, backend: failover.Backend, catalogue: Catalogue, tokenizer: Any, *, max_waiting: int
    ) -> None:
        self.backend, self.catalogue = backend, catalogue
        self._tokenizer = tokenizer
        self._max_waiting = max_waiting
        self._in_progress = 0

    async def completion_job(self, body: CompletionRequest) -> Job:
        """Raises CallerError for whatever cannot run."""
        adapter = await asyncio.to_thread(self.catalogue.resolve, body.model)
        tokens = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        self._check_count(len(body.prompts) * (body.n or 1))
        prompts = await asyncio.to_thread(self._encode, body)
        return _job("cmpl", body, adapter, prompts, tokens)

    async def chat_job(self, body: ChatRequest) -> Job:
        """Raises CallerError for whatever cannot run."""
        adapter = await asyncio.to_thread(self.catalogue.resolve, body.model)
        if not self._tokenizer.chat_template:
            raise RequestError(
                f"model {body.model!r} has no chat template; use /v1/completions", param="messages"
            )
        tokens = body.max_completion_tokens
        prompt = await asyncio.to_thread(self._render, body)
        return _job(
            "chatcmpl",
            body,
            adapter,
            [prompt],
            body.max_tokens if tokens is None else tokens,
        )

    async def run(self, job: Job, *, stream: bool) -> AsyncGenerator[Piece]:
        """Run all answers of a job at once; pieces as they come.

        Raises:
            GraftError: an answer failed; the others are cancelled.
        """
        if self._in_progress + len(job.requests) > self._max_waiting:
            raise OverloadedError(
                f"{self._in_progress} requests are in progress, of {self._max_waiting} at most "
                "(gateway.max_waiting_requests); try again later"
            )
        self._in_progress += len(job.requests)
        try:
            answers = [
                self._answer(index, request, job.adapter, stream)
                for index, request in enumerate(job.requests)
            ]
            async with aclosing(_merge(answers)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._in_progress -= len(job.requests)

    async def _answer(
        self, index: int, request: GenerationRequest, adapter: AdapterVersion | None, stream: bool
    ) -> AsyncGenerator[Piece]:
        outputs = failover.generate(self.backend, request, adapter, stream=stream)
        async with aclosing(outputs):
            async for output in outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise EngineError(output.error or "the engine failed on this request")
                reason = output.finish_reason
                yield Piece(index, output.text, len(output.token_ids), reason and reason.value)

    def _check_count(self, answers: int) -> None:
        if answers > self._max_waiting:
            raise RequestError(
                f"prompt and n ask for {answers:,} answers, over the {self._max_waiting:,} that "
                "gateway.max_waiting_requests allows in all; send less at once",
                param="prompt",
            )

    def _encode(self, body: CompletionRequest) -> list[list[int]]:
        return [
            encode_prompt(self._tokenizer, prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompts
        ]

    def _render(self, body: ChatRequest) -> list[int]:
        messages = [
            {
                "role": message.role,
                "content": message.text,
                **({"name": message.name} if message.name else {}),
            }
            for message in body.messages
        ]
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=True
            )
        except GraftError:
            raise
        except Exception as error:  # templates raise whatever they like about roles and order
            raise RequestError(
                f"messages: the chat template refuses them: {error}", param="messages"
            ) from error
        return list(encoded["input_ids"])


def usage(job: Job, completion_tokens: int) -> Usage:
    """The token counts of a job."""
    return Usage(
        prompt_tokens=job.prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=job.prompt_tokens + completion_tokens,
    )


def _job(
    kind: str,
    body: Sampling,
    adapter: AdapterVersion | None,
    prompts: list[list[int]],
    max_tokens: int | None,
) -> Job:
    """One request per prompt and choice. Choices of one prompt differ by their seeds, which are
    drawn here if none is given: another replica must be able to go on with an answer."""
    requests: list[GenerationRequest] = []
    seed = secrets.randbelow(MAX_SEED) if body.seed is None else body.seed
    for prompt in prompts:
        first = GenerationRequest(
            prompt_token_ids=prompt,
            adapter=adapter.ref if adapter else None,
            max_tokens=max_tokens,
            temperature=_TEMPERATURE if body.temperature is None else body.temperature,
            seed=seed,
            stop=body.stop_texts,
            logit_bias=body.biases,
            ignore_eos=body.ignore_eos,
            response_format=ResponseFormat(*body.form) if body.form else None,
            **{name: given for name in _SAME if (given := getattr(body, name)) is not None},
        )
        first.check()
        if not prompt:
            raise RequestError("prompt is empty; give at least one token", param="prompt")
        requests += choices(first, body.n or 1)
    if not requests:
        raise RequestError("prompt is an empty list; give at least one prompt", param="prompt")
    return Job(
        id=f"{kind}-{secrets.token_hex(12)}",
        model=body.model,
        adapter=adapter,
        requests=requests,
        prompt_tokens=sum(len(prompt) for prompt in prompts),
    )


async def _merge(answers: list[AsyncGenerator[Piece]]) -> AsyncGenerator[Piece]:
    """The pieces of several answers in the order in which they come."""
    if len(answers) == 1:
        async with aclosing(answers[0]) as only:
            async for piece in only:
                yield piece
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

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
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
