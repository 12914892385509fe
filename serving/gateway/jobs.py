"""What one HTTP request asks of the engines: a checked body and its prompts to a Job.

Nothing of HTTP frameworks, Ray or engines' insides, and nothing that waits: the service decides
what runs in a thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import RequestError
from cluster.mixes import NamedAdapter
from serving.engine.ranges import room
from serving.engine.request import MAX_SEED, GenerationRequest, ResponseFormat, choices
from serving.gateway.access import Tenant
from serving.protocol import Sampling, Usage

# OpenAI's default.
_TEMPERATURE = 1.0
# Options that mean the same to the engine.
_SAME = (
    "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "stop_token_ids", "adapter_rank",
)  # fmt: skip
# Characters and answers that are encoded and made sooner than a thread would have them.
_CHARACTERS_AT_ONCE, _ANSWERS_AT_ONCE = 1000, 32


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


def is_quick(prompts: Sequence[str | list[int]], answers: int) -> bool:
    """Whether so many answers to `prompts` are made within a millisecond."""
    characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return characters <= _CHARACTERS_AT_ONCE and answers <= _ANSWERS_AT_ONCE


def encoded(
    tokenizer: Any,
    prompts: Sequence[str | list[int]],
    encode: Callable[[Any, str], list[int]],
) -> list[list[int]]:
    """The token ids of each prompt."""
    return [encode(tokenizer, each) if isinstance(each, str) else each for each in prompts]


def sampled(body: Sampling) -> dict[str, Any]:
    """The engine's options of a body."""
    form = body.form
    return {
        "temperature": _TEMPERATURE if body.temperature is None else body.temperature,
        "seed": body.seed,
        "stop": body.stop_texts,
        "logit_bias": body.biases,
        "ignore_eos": body.ignore_eos,
        "response_format": ResponseFormat(*form) if form else None,
        **{name: given for name in _SAME if (given := getattr(body, name)) is not None},
    }


def requests_of(
    prompts: Sequence[list[int]],
    options: Mapping[str, Any],
    *,
    per_prompt: int = 1,
    context_tokens: int | None = None,
) -> list[GenerationRequest]:
    """Requests for `per_prompt` answers to each prompt, by the engine's `options`, which are
    checked once for all. Without a seed each prompt gets one here, by which its answers differ:
    another replica must be able to go on with an answer, and a prompt that is given twice has two
    chances.

    Args:
        context_tokens: The engine's context. What is over it is refused here, before it is sent
            once for each answer; an adapter may leave less, which the engine sees.

    Raises:
        RequestError: they ask the impossible.
    """
    shared = GenerationRequest(prompt_token_ids=(), **options)
    shared.check()
    if not prompts:
        raise RequestError("prompt is an empty list; give at least one prompt", param="prompt")
    for prompt in prompts:
        if not prompt:
            raise RequestError("prompt is empty; give at least one token", param="prompt")
        if context_tokens is not None:
            room(context_tokens, len(prompt), shared.max_tokens, is_pooled=bool(shared.pooling))
    found: list[GenerationRequest] = []
    for prompt in prompts:
        seed = secrets.randbelow(MAX_SEED) if shared.seed is None else shared.seed
        found += choices(replace(shared, prompt_token_ids=prompt, seed=seed), per_prompt)
    return found
