"""What goes into an engine and what comes out. No torch.

A request is checked once, when it is submitted, against what the engine can do; after that it
cannot fail for its own sake.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from cluster.errors import RequestError
from serving.engine.ranges import (
    MAX_CHOICES,
    MAX_DEPTH,
    MAX_FORMAT,
    MAX_TEXTS,
    RANGES,
    are,
    depth,
    is_int,
    is_list,
    is_text,
    require,
    shown,
)
from serving.engine.ranges import MAX_SEED as MAX_SEED

Pooling = Literal["last", "mean"]


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True)
class ResponseFormat:
    """What an answer must follow: `rule` is a JSON schema (a mapping or bool), a regular expression
    (without look-around), the texts to choose from, or, for any JSON object, None."""

    kind: Literal["json_schema", "regex", "choice", "json_object"]
    rule: Any = None

    def check(self) -> None:
        """Raise RequestError unless it is of a size that is compiled at once."""
        fits = {
            "json_schema": isinstance(self.rule, (Mapping, bool)),
            "regex": is_text(self.rule) and self.rule != "",
            "choice": are(self.rule, is_text, MAX_TEXTS) and len(self.rule) > 0,
            "json_object": self.rule is None,
        }
        name = "response_format"
        require(self.kind in fits, name, f"{name} must be one of {', '.join(fits)}")
        require(fits[self.kind], name, f"{name} is {self.kind}, and its rule of another kind")
        try:
            size = len(json.dumps(self.rule, allow_nan=False))
        except (RecursionError, TypeError, ValueError) as error:
            raise RequestError(f"{name} cannot be written as JSON: {error}", param=name) from error
        too_much = f"{name} has {size:,} characters of JSON, over {MAX_FORMAT:,}"
        require(size <= MAX_FORMAT, name, too_much)
        deepest = f"{name} is nested over {MAX_DEPTH} levels deep; use $ref and $defs"
        require(depth(self.rule) <= MAX_DEPTH, name, deepest)


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it.

    The logits of a token go through repetition, presence and frequency penalties, logit_bias,
    temperature, top_k, top_p and min_p, in this order.

    Attributes:
        prompt: Text, tokenised with the base's opening tokens, and for `pooling` with its closing
            ones; or `prompt_token_ids`, as they are.
        adapter: A name given to `add_adapter`, or None for the base alone.
        adapter_rank: Take so many of a DyLoRA's ranks; None for all.
        max_tokens: Tokens to generate; None for as many as the context allows. 0 is for
            `prompt_logprobs` or `pooling` alone.
        temperature: 0 takes the most probable token; above, the logits are divided by it.
        top_p: Only the smallest set of tokens with at least this probability is sampled from.
        top_k: Only so many of the most probable tokens are; None for all.
        min_p: Only tokens at least this share as probable as the most probable one are.
        repetition_penalty: Divides the logit of a token that occurs in prompt or answer if it is
            above 0, else multiplies it (transformers' definition; of an encoder-decoder, the
            answer alone counts).
        presence_penalty: Taken from the logit of a token that occurs in the answer (OpenAI's).
        frequency_penalty: Taken from it once for each time that it occurs.
        logit_bias: Added to the logits of these token ids.
        seed: Makes sampling repeatable: random numbers follow from (seed, position) alone. None
            draws a seed.
        stop: Texts before which the answer ends.
        stop_token_ids: Tokens with which it ends, besides the end-of-sequence token.
        ignore_eos: Go on after the end-of-sequence token.
        response_format: What the answer must follow. It ends where that is complete, whatever
            `ignore_eos` says.
        cache_salt: The tenant. Requests share KV pages, and shares of the engine are equal, within
            and between tenants.
        logprobs: Tell each token's log probability by the bare logits, and so many of the most
            probable tokens beside it.
        prompt_logprobs: The same for the prompt's tokens but the first. Not of an encoder-decoder,
            which reads its prompt and predicts none of it.
        pooling: Make one vector of the prompt, and generate nothing: of its last token's hidden
            state, or of the mean over all; of length 1. Not of an encoder-decoder.
        dimensions: Of the vector, only the first so many numbers, made to length 1 again.
        generated_token_ids: The answer's first tokens, given out before on another replica. The
            answer goes on behind them, and its outputs with it; `max_tokens`, positions and `stop`
            count them. Exact with a `seed`.
    """

    prompt: str | None = None
    prompt_token_ids: Sequence[int] | None = None
    adapter: str | None = None
    adapter_rank: int | None = None
    max_tokens: int | None = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    cache_salt: str = ""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    pooling: Pooling | None = None
    dimensions: int | None = None
    generated_token_ids: Sequence[int] = ()

    def check(self) -> None:
        """Raise RequestError, naming the field, unless the request is possible for some engine."""
        self._check_source()
        if isinstance(self.response_format, ResponseFormat):
            self.response_format.check()
        else:
            wrong = f"response_format is {shown(self.response_format)}; it must be a ResponseFormat"
            require(self.response_format is None, "response_format", wrong)
        for name, (is_possible, meaning) in RANGES.items():
            value = getattr(self, name)
            if not is_possible(value):
                raise RequestError(f"{name} is {shown(value)}; it must be {meaning}", param=name)
        if self.max_tokens == 0 and self.prompt_logprobs is None and self.pooling is None:
            raise RequestError(
                "max_tokens is 0; ask for at least one token, or for prompt_logprobs",
                param="max_tokens",
            )
        is_embedding = self.max_tokens == 0 and self.prompt_logprobs is None
        require(
            self.pooling is None or is_embedding,
            "pooling",
            "pooling is of a prompt that nothing follows; set max_tokens to 0 and leave "
            "prompt_logprobs out",
        )
        require(
            self.dimensions is None or self.pooling is not None,
            "dimensions",
            "dimensions are of a vector; set pooling, or leave them out",
        )

    def _check_source(self) -> None:
        require(
            (self.prompt is None) != (self.prompt_token_ids is None),
            "prompt",
            "give either prompt or prompt_token_ids",
        )
        require(
            self.adapter is not None or self.adapter_rank is None,
            "adapter_rank",
            "adapter_rank is of an adapter; name one, or leave it out",
        )
        require(
            self.prompt is None or is_text(self.prompt),
            "prompt",
            "prompt must be one text that can be written as UTF-8; give many as many requests",
        )
        ids = self.prompt_token_ids
        if not (ids is None or is_list(ids)):  # a message would write out every sound prompt
            raise RequestError(
                f"prompt_token_ids is {shown(ids)}; it must be a list of token ids",
                param="prompt_token_ids",
            )


@dataclass(frozen=True)
class ScoreRequest:
    """Tokens whose logits are wanted, under an adapter or the base alone.

    Attributes:
        token_ids: The prompt; of an encoder-decoder, what its encoder reads.
        answer_token_ids: What follows it; of an encoder-decoder, what its decoder does.
    """

    token_ids: Sequence[int]
    adapter: str | None = None
    adapter_rank: int | None = None
    answer_token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log probability, and the most probable tokens of its place with theirs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Times:
    """Where an answer's time went, in seconds: waiting for its first step, from there to its first
    token, and from there to its end."""

    queue_s: float
    first_token_s: float
    rest_s: float


@dataclass(frozen=True)
class TokenOutput:
    """What one step brought one request: usually one token, and the text that is now certain.

    The last output of a request has a `finish_reason`; `error` says what went wrong if that is
    ERROR. Text can lag behind tokens: half a character or of a stop text is held back. Where they
    were asked for, `logprobs` has one entry for each token, and the first output has
    `prompt_logprobs`, one for each token of the prompt but the first. `embedding` is what `pooling`
    asked for, float32 [dimensions]. The last one has `times`, unless it failed.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: np.ndarray | None = field(default=None, compare=False)
    times: Times | None = field(default=None, compare=False)


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer. `token_ids` has the end token if one ended it. `logprobs`,
    `prompt_logprobs` and `embedding` are as in TokenOutput."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: np.ndarray | None = field(default=None, compare=False)


def joined(outputs: Sequence[TokenOutput]) -> TokenOutput:
    """All outputs of one request as one."""
    last = outputs[-1]
    return TokenOutput(
        last.request_id,
        tuple(token for output in outputs for token in output.token_ids),
        "".join(output.text for output in outputs),
        last.finish_reason,
        last.error,
        tuple(entry for output in outputs for entry in output.logprobs),
        tuple(entry for output in outputs for entry in output.prompt_logprobs),
        last.embedding,
        last.times,
    )


def result_of(outputs: Sequence[TokenOutput], prompt_tokens: int) -> GenerationResult:
    """All outputs of a request that has ended, and did not fail, as its result."""
    whole = joined(outputs)
    assert whole.finish_reason is not None
    return GenerationResult(
        list(whole.token_ids),
        whole.text,
        whole.finish_reason,
        prompt_tokens,
        whole.logprobs,
        whole.prompt_logprobs,
        whole.embedding,
    )


def choices(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """`n` requests for as many answers to one prompt; their seeds follow from the request's seed
    and their index, and the first has the seed itself. They share the prompt's pages.

    Raises:
        RequestError: n is out of range.
    """
    possible = is_int(n) and 0 < n <= MAX_CHOICES
    require(possible, "n", f"n is {n!r:.80}; it must be a whole number from 1 to {MAX_CHOICES}")
    if request.seed is None:
        return [request] * n
    return [request, *(replace(request, seed=derived_seed(request.seed, i)) for i in range(1, n))]


def best_choices(answers: Sequence[Sequence[TokenLogprobs]], n: int) -> list[int]:
    """The indices of the `n` answers of the highest log probability per token, best first (what
    OpenAI's best_of keeps)."""

    def mean(index: int) -> float:
        entries = answers[index]
        return math.fsum(entry.logprob for entry in entries) / max(1, len(entries))

    return sorted(range(len(answers)), key=mean, reverse=True)[:n]


def derived_seed(seed: int, index: int) -> int:
    """The seed of one of several draws that share `seed`: 63 bits that no neighbour has."""
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
