"""What goes into an engine and what comes out. No torch.

A request is checked once, when it is submitted, against what the engine can do; after that it
cannot fail for its own sake.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from cluster.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it.

    Attributes:
        prompt: Text, tokenised with the base's opening tokens; or `prompt_token_ids`, as they are.
        adapter: A name given to `add_adapter`, or None for the base alone.
        max_tokens: Tokens to generate; None for as many as the context allows.
        temperature: 0 takes the most probable token; above, the logits are divided by it.
        top_p: Only the smallest set of tokens with at least this probability is sampled from.
        top_k: Only so many of the most probable tokens are; None for all.
        seed: Makes sampling repeatable: random numbers follow from (seed, position) alone. None
            draws a seed.
        stop: Texts before which the answer ends.
        ignore_eos: Go on after the end-of-sequence token.
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
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    generated_token_ids: Sequence[int] = ()

    def check(self) -> None:
        """Raise RequestError, naming the field, unless the sampling options are possible."""
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
        _require(
            self.adapter is None or _is_text(self.adapter),
            "adapter",
            f"adapter is {self.adapter!r}; it must be a name",
        )
        _require(
            self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens > 0),
            "max_tokens",
            f"max_tokens is {self.max_tokens!r}; it must be a whole number above 0",
        )
        _require(
            _is_number(self.temperature) and 0 <= self.temperature <= 100,
            "temperature",
            f"temperature is {self.temperature!r}; it must be between 0 and 100",
        )
        _require(
            _is_number(self.top_p) and 0 < self.top_p <= 1,
            "top_p",
            f"top_p is {self.top_p!r}; it must be above 0 and at most 1",
        )
        _require(
            self.top_k is None or (_is_int(self.top_k) and self.top_k > 0),
            "top_k",
            f"top_k is {self.top_k!r}; it must be a whole number above 0",
        )
        _require(
            self.seed is None or (_is_int(self.seed) and -MAX_SEED <= self.seed <= MAX_SEED),
            "seed",
            f"seed is {self.seed!r}; it must be a 64-bit whole number",
        )
        _require(
            not isinstance(self.stop, str)
            and all(_is_text(text) and text for text in self.stop)
            and len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"stop must be at most {MAX_STOP_STRINGS} texts, none of them empty",
        )


@dataclass(frozen=True)
class ScoreRequest:
    """Tokens whose logits are wanted, under an adapter or the base alone."""

    token_ids: Sequence[int]
    adapter: str | None = None


@dataclass(frozen=True)
class TokenOutput:
    """What one step brought one request: usually one token, and the text that is now certain.

    The last output of a request has a `finish_reason`; `error` says what went wrong if that is
    ERROR. Text can lag behind tokens: half a character or of a stop text is held back.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer. `token_ids` has the end-of-sequence token if that ended it."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int


def check_token_ids(ids: Sequence[int], vocabulary: int, param: str) -> None:
    """Raise RequestError unless `ids` are token ids of a vocabulary of that size."""
    _require(len(ids) > 0, param, f"{param} is empty; give at least one token")
    for position, token in enumerate(ids):
        _require(
            _is_int(token) and 0 <= token < vocabulary,
            param,
            f"{param}[{position}] is {token!r}; token ids are whole numbers from 0 to "
            f"{vocabulary - 1}",
        )


def check_generated(request: GenerationRequest, max_tokens: int, vocabulary: int) -> list[int]:
    """The tokens that the answer begins with. Raises RequestError unless more can follow them."""
    given, field = request.generated_token_ids, "generated_token_ids"
    if not given:
        return []
    check_token_ids(given, vocabulary, field)
    _require(
        len(given) < max_tokens,
        field,
        f"{field} has {len(given)} tokens, and the answer has {max_tokens} in all; it is over",
    )
    return [int(token) for token in given]


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return False
    return math.isfinite(value)


def _is_text(value: object) -> bool:
    """Half of a surrogate pair is a str and no text."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise RequestError(message, param=param)
