"""What goes into an engine and what comes out. No torch.

A request is checked once, when it is submitted, against what the engine can do; after that it
cannot fail for its own sake.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from cluster.errors import RequestError

MAX_STOPS = 16
MAX_SEED = 2**63 - 1
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
# Of a response format: characters of its JSON, levels, texts to choose from.
MAX_FORMAT = 2**16
MAX_DEPTH = 64
MAX_TEXTS = 1024


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
            "regex": _is_text(self.rule) and self.rule != "",
            "choice": _are(self.rule, _is_text, MAX_TEXTS) and len(self.rule) > 0,
            "json_object": self.rule is None,
        }
        name = "response_format"
        _require(self.kind in fits, name, f"{name} must be one of {', '.join(fits)}")
        _require(fits[self.kind], name, f"{name} is {self.kind}, and its rule of another kind")
        try:
            size = len(json.dumps(self.rule, allow_nan=False))
        except (RecursionError, TypeError, ValueError) as error:
            raise RequestError(f"{name} cannot be written as JSON: {error}", param=name) from error
        too_much = f"{name} has {size:,} characters of JSON, over {MAX_FORMAT:,}"
        _require(size <= MAX_FORMAT, name, too_much)
        deepest = f"{name} is nested over {MAX_DEPTH} levels deep; use $ref and $defs"
        _require(_depth(self.rule) <= MAX_DEPTH, name, deepest)


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it.

    The logits of a token go through repetition, presence and frequency penalties, logit_bias,
    temperature, top_k, top_p and min_p, in this order.

    Attributes:
        prompt: Text, tokenised with the base's opening tokens; or `prompt_token_ids`, as they are.
        adapter: A name given to `add_adapter`, or None for the base alone.
        max_tokens: Tokens to generate; None for as many as the context allows. 0 is for
            `prompt_logprobs` alone.
        temperature: 0 takes the most probable token; above, the logits are divided by it.
        top_p: Only the smallest set of tokens with at least this probability is sampled from.
        top_k: Only so many of the most probable tokens are; None for all.
        min_p: Only tokens at least this share as probable as the most probable one are.
        repetition_penalty: Divides the logit of a token that occurs in prompt or answer if it is
            above 0, else multiplies it (transformers' definition).
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
        prompt_logprobs: The same for the prompt's tokens but the first.
        generated_token_ids: The answer's first tokens, given out before on another replica. The
            answer goes on behind them, and its outputs with it; `max_tokens`, positions and `stop`
            count them. Exact with a `seed`.
    """

    prompt: str | None = None
    prompt_token_ids: Sequence[int] | None = None
    adapter: str | None = None
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
    generated_token_ids: Sequence[int] = ()

    def check(self) -> None:
        """Raise RequestError, naming the field, unless the request is possible for some engine."""
        self._check_source()
        if self.response_format is not None:
            self.response_format.check()
        for name, (is_possible, meaning) in _RANGES.items():
            value = getattr(self, name)
            _require(is_possible(value), name, f"{name} is {value!r:.80}; it must be {meaning}")
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise RequestError(
                "max_tokens is 0; ask for at least one token, or for prompt_logprobs",
                param="max_tokens",
            )

    def _check_source(self) -> None:
        _require(
            (self.prompt is None) != (self.prompt_token_ids is None),
            "prompt",
            "give either prompt or prompt_token_ids",
        )
        _require(
            self.prompt is None or _is_text(self.prompt),
            "prompt",
            "prompt must be one text that can be written as UTF-8; give many as many requests",
        )


@dataclass(frozen=True)
class ScoreRequest:
    """Tokens whose logits are wanted, under an adapter or the base alone."""

    token_ids: Sequence[int]
    adapter: str | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log probability, and the most probable tokens of its place with theirs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """What one step brought one request: usually one token, and the text that is now certain.

    The last output of a request has a `finish_reason`; `error` says what went wrong if that is
    ERROR. Text can lag behind tokens: half a character or of a stop text is held back. Where they
    were asked for, `logprobs` has one entry for each token, and the first output has
    `prompt_logprobs`, one for each token of the prompt but the first.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer. `token_ids` has the end token if one ended it. `logprobs` and
    `prompt_logprobs` are as in TokenOutput."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


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
    )


def choices(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """`n` requests for as many answers to one prompt; their seeds follow from the request's seed
    and their index, and the first has the seed itself. They share the prompt's pages.

    Raises:
        RequestError: n is out of range.
    """
    possible = _is_int(n) and 0 < n <= MAX_CHOICES
    _require(possible, "n", f"n is {n!r:.80}; it must be a whole number from 1 to {MAX_CHOICES}")
    if request.seed is None:
        return [request] * n
    return [request, *(replace(request, seed=_derived(request.seed, i)) for i in range(1, n))]


def best_choices(answers: Sequence[Sequence[TokenLogprobs]], n: int) -> list[int]:
    """The indices of the `n` answers of the highest log probability per token, best first (what
    OpenAI's best_of keeps)."""

    def mean(index: int) -> float:
        entries = answers[index]
        return math.fsum(entry.logprob for entry in entries) / max(1, len(entries))

    return sorted(range(len(answers)), key=mean, reverse=True)[:n]


def check_token_ids(ids: Iterable[int], vocabulary: int, param: str) -> None:
    """Raise RequestError unless `ids` are token ids of a vocabulary of that size."""
    for position, token in enumerate(ids):
        _require(
            _is_int(token) and 0 <= token < vocabulary,
            param,
            f"{param}[{position}] is {token!r}; token ids are whole numbers from 0 to "
            f"{vocabulary - 1}",
        )


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return False
    return math.isfinite(value)


def _is_text(value: object) -> bool:
    """Half of a surrogate pair is a str and no text."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_bias(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_LOGIT_BIAS
        and all(_is_int(token) for token in value)
        and all(_is_number(bias) and -100 <= bias <= 100 for bias in value.values())
    )


def _are(value: object, check: Callable[[Any], bool], most: int) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) <= most
        and all(check(part) for part in value)
    )


def _number(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and least <= value <= most


def _whole(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: value is None or (_is_int(value) and least <= value <= most)


_COUNT = f"a whole number from 0 to {MAX_LOGPROBS}"
_PENALTY = (_number(-2, 2), "between -2 and 2")
# What each option can be, in the words of its refusal.
_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "adapter": (lambda value: value is None or _is_text(value), "a name"),
    "cache_salt": (_is_text, "a text"),
    "max_tokens": (_whole(0), "a whole number above 0"),
    "temperature": (_number(0, 100), "between 0 and 100"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "above 0 and at most 1"),
    "top_k": (_whole(1), "a whole number above 0"),
    "min_p": (_number(0, 1), "between 0 and 1"),
    "repetition_penalty": (
        lambda value: _is_number(value) and 0 < value <= 100,
        "above 0 and at most 100",
    ),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": (
        _is_bias,
        f"at most {MAX_LOGIT_BIAS} token ids, each with a number between -100 and 100",
    ),
    "seed": (_whole(-MAX_SEED, MAX_SEED), "a 64-bit whole number"),
    "stop": (
        lambda value: _are(value, lambda text: _is_text(text) and text != "", MAX_STOPS),
        f"at most {MAX_STOPS} texts, none of them empty",
    ),
    "stop_token_ids": (
        lambda value: _are(value, _is_int, MAX_STOPS),
        f"at most {MAX_STOPS} token ids",
    ),
    "generated_token_ids": (
        lambda value: _are(value, _is_int, MAX_SEED),
        "token ids",
    ),
    "logprobs": (_whole(0, MAX_LOGPROBS), _COUNT),
    "prompt_logprobs": (_whole(0, MAX_LOGPROBS), _COUNT),
}


def _depth(value: object) -> int:
    """Levels of lists and mappings."""
    depth, level = 0, [value]
    while level:
        inner = [v.values() if isinstance(v, Mapping) else v for v in level
                 if isinstance(v, (Mapping, list, tuple))]  # fmt: skip
        level = [part for parts in inner for part in parts]
        depth += bool(inner)
    return depth


def _derived(seed: int, index: int) -> int:
    """A seed of 63 bits that no neighbouring seed shares."""
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise RequestError(message, param=param)
