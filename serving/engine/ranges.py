"""What each option of a request can be. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from cluster.errors import ContextLengthError, RequestError

MAX_STOPS = 16
MAX_SEED = 2**63 - 1
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
# Of a response format: characters of its JSON, levels, texts to choose from.
MAX_FORMAT = 2**16
MAX_DEPTH = 64
MAX_TEXTS = 1024


def require(condition: bool, param: str, message: str) -> None:
    """Raise RequestError unless `condition`."""
    if not condition:
        raise RequestError(message, param=param)


def check_token_ids(ids: Collection[int], vocabulary: int, param: str) -> None:
    """Raise RequestError unless `ids` are token ids of a vocabulary of that size."""
    # A long prompt is checked between two steps of everyone's answers: no Python code per token.
    are_whole = all(issubclass(k, (int, np.integer)) and k is not bool for k in set(map(type, ids)))
    if not ids or (are_whole and min(ids) >= 0 and max(ids) < vocabulary):
        return
    position, token = next(
        (position, token)
        for position, token in enumerate(ids)
        if not (is_int(token) and 0 <= token < vocabulary)
    )
    raise RequestError(
        f"{param}[{position}] is {shown(token)}; token ids are whole numbers from 0 to "
        f"{vocabulary - 1}",
        param=param,
    )


def room(
    context_tokens: int,
    prompt_tokens: int,
    max_tokens: int | None,
    *,
    taken_tokens: int = 0,
    taker: str = "the adapter takes",
    is_pooled: bool = False,
) -> int:
    """How many tokens an answer may have: `max_tokens`, or if that is None all that a context
    leaves behind the prompt and the tokens that are taken. Raises ContextLengthError."""
    left = context_tokens - taken_tokens - prompt_tokens
    wanted = max(1, left) if max_tokens is None else max_tokens
    if wanted > left:
        beside = f" + {taken_tokens} that {taker}" if taken_tokens else ""
        is_full = prompt_tokens + taken_tokens >= context_tokens
        asked = "" if is_pooled else f" and max_tokens is {shown(wanted)}"
        remedy = "shorten the prompt" + (" or lower max_tokens" if wanted else "")
        # It begins as OpenAI's own: clients know this failure by these words.
        raise ContextLengthError(
            f"this model's maximum context length is {context_tokens} tokens; the prompt has "
            f"{prompt_tokens} tokens{beside}{asked}; {remedy}",
            param="prompt" if is_full else "max_tokens",
        )
    return wanted


def is_int(value: object) -> bool:
    """Whether it is a whole number, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number that a float can hold, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_list(value: object) -> bool:
    """Whether it is things in an order, and no text."""
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))


def shown(value: object) -> str:
    """A value as a refusal tells it. Python writes no whole number of thousands of digits."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):
        return f"no {type(value).__name__} that can be written"


def is_text(value: object) -> bool:
    """Whether it is a text; half of a surrogate pair is a str and none."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_bias(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_LOGIT_BIAS
        and all(is_int(token) for token in value)
        and all(is_number(bias) and -100 <= bias <= 100 for bias in value.values())
    )


def are(value: object, check: Callable[[Any], bool], most: float) -> bool:
    """Whether it is a list of at most so many things that pass `check`."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) <= most
        and all(check(part) for part in value)
    )


def _number(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and least <= value <= most


def _whole(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: value is None or (is_int(value) and least <= value <= most)


_COUNT = f"a whole number from 0 to {MAX_LOGPROBS}"
_PENALTY = (_number(-2, 2), "between -2 and 2")
# What each option can be, in the words of its refusal.
RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "adapter": (lambda value: value is None or is_text(value), "a name"),
    "adapter_rank": (_whole(1), "a whole number above 0"),
    "cache_salt": (is_text, "a text"),
    "max_tokens": (_whole(0), "a whole number above 0"),
    "temperature": (_number(0, 100), "between 0 and 100"),
    "top_p": (lambda value: is_number(value) and 0 < value <= 1, "above 0 and at most 1"),
    "top_k": (_whole(1), "a whole number above 0"),
    "min_p": (_number(0, 1), "between 0 and 1"),
    "repetition_penalty": (
        lambda value: is_number(value) and 0 < value <= 100,
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
        lambda value: are(value, lambda text: is_text(text) and text != "", MAX_STOPS),
        f"at most {MAX_STOPS} texts, none of them empty",
    ),
    "stop_token_ids": (
        lambda value: are(value, is_int, MAX_STOPS),
        f"at most {MAX_STOPS} token ids",
    ),
    "generated_token_ids": (
        lambda value: are(value, is_int, math.inf),
        "token ids",
    ),
    "logprobs": (_whole(0, MAX_LOGPROBS), _COUNT),
    "prompt_logprobs": (_whole(0, MAX_LOGPROBS), _COUNT),
    "pooling": (lambda value: value in (None, "last", "mean"), "'last' or 'mean'"),
    "dimensions": (_whole(1), "a whole number above 0"),
}


def depth(value: object) -> int:
    """Levels of lists and mappings."""
    levels, level = 0, [value]
    while level:
        inner = [v.values() if isinstance(v, Mapping) else v for v in level
                 if isinstance(v, (Mapping, list, tuple))]  # fmt: skip
        level = [part for parts in inner for part in parts]
        levels += bool(inner)
    return levels
