"""What the clients and offline jobs ask of a service, and how they take its failures.

No connection is made here: `serving.async_client` has those. No torch, no Ray.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypedDict, TypeVar

import numpy as np
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_random_exponential

from cluster.errors import (
    OUTCOMES,
    AuthenticationError,
    DeadlineError,
    GraftError,
    NotFoundError,
    OperationError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from serving.protocol import ToolCall

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
R = TypeVar("R")

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# Vectors of one answer; texts of a few thousand tokens stay far below a service's body limit.
_INPUTS_AT_ONCE = 32
_GROWING = wait_random_exponential(multiplier=0.2, max=10)
_BY_CODE = {o.code: cls for cls, o in OUTCOMES.items() if o.code is not None}
_BY_STATUS: Mapping[int, type[GraftError]] = {
    401: AuthenticationError,
    404: NotFoundError,
    429: OverloadedError,
    502: UnavailableError,
    503: UnavailableError,
    504: DeadlineError,
}


class Options(TypedDict, total=False):
    """How to continue a prompt; what is left out is the server's default, but temperature is 0
    and max_tokens 64."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: Sequence[str]
    ignore_eos: bool
    response_format: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]


@dataclass(frozen=True)
class Generation:
    """One answer; a chat's may be calls of the tools that it was given."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    tool_calls: tuple[ToolCall, ...] = ()


def check_options(options: Mapping[str, Any]) -> None:
    """Raise RequestError for more than one answer to a prompt: a Generation is one."""
    if options.get("n") not in (None, 1):
        raise RequestError(
            f"n is {options['n']!r}, and each prompt gets one answer; leave it out, and give the "
            "prompt once for every answer that you want",
            param="n",
        )


def request_body(
    prompt: Prompt, model: str | None, options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Path and body for a prompt; what `options` leave out is as `Options` says. Raises
    RequestError."""
    check_options(options)
    body: dict[str, Any] = {"model": model, "max_tokens": 64, "temperature": 0.0, **options}
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
        return CHAT, {**body, "messages": list(prompt)}
    if options.get("tools"):
        raise RequestError(
            "tools: are called in a chat, and this prompt is a text or token ids; give messages",
            param="tools",
        )
    return COMPLETIONS, {**body, "prompt": prompt}


def generation(answer: Any) -> Generation:
    """A whole answer's body as a Generation. Raises LookupError, TypeError, AttributeError or
    ValueError for anything else."""
    choice, usage = answer["choices"][0], answer["usage"]
    message = choice.get("message", {})
    text = choice["text"] if "text" in choice else message["content"] or ""
    return Generation(
        text,
        choice["finish_reason"],
        usage["prompt_tokens"],
        usage["completion_tokens"],
        tuple(map(ToolCall.model_validate, message.get("tool_calls") or ())),
    )


def stream_event(data: str) -> tuple[str, bool]:
    """The text that an event of a stream brings, and whether the answer is over with it. Raises
    GraftError if it tells of one; LookupError, TypeError, AttributeError or ValueError for what is
    no such event."""
    event = json.loads(data)
    if "error" in event:
        raise error_of(500, data)
    pieces = [choice.get("text") or choice.get("delta", {}).get("content") or ""
              for choice in event["choices"]]  # fmt: skip
    is_over = any(choice.get("finish_reason") is not None for choice in event["choices"])
    return "".join(pieces), is_over


def embedding_parts(inputs: Sequence[str | Sequence[int]]) -> list[list[str | Sequence[int]]]:
    """Inputs of one request each, in their order: it has texts or token ids, never both."""
    kinds = [list(kind) for _, kind in groupby(inputs, key=lambda part: isinstance(part, str))]
    return [
        kind[at : at + _INPUTS_AT_ONCE]
        for kind in kinds
        for at in range(0, len(kind), _INPUTS_AT_ONCE)
    ]


def embeddings(answer: Any) -> list[np.ndarray]:
    """The vectors of a whole answer's body, which has them in base64."""
    texts = [vector["embedding"] for vector in answer["data"]]
    return [np.frombuffer(base64.b64decode(text), dtype="<f4") for text in texts]


async def retrying(call: Callable[[], Awaitable[R]], max_attempts: int) -> R:
    """`call`, again as long as that may mend its failure, with growing pauses. Raises GraftError,
    the last one."""
    attempts = AsyncRetrying(
        stop=stop_after_attempt(max_attempts),
        wait=pause_s,
        retry=retry_if_exception(_may_mend),
        reraise=True,
    )
    async for attempt in attempts:
        with attempt:
            return await call()
    raise AssertionError("tenacity re-raises the last failure")


def _may_mend(error: BaseException) -> bool:
    """Whether the same request may soon succeed. One that ran out of its time would again, after
    holding its place in the service for as long."""
    may_retry = isinstance(error, GraftError) and error.retryable
    return may_retry and not isinstance(error, DeadlineError)


def pause_s(state: RetryCallState) -> float:
    """What the service asked for, never less, and a growing part by chance on top: those whom it
    told the same do not come back at the same instant."""
    error = state.outcome.exception() if state.outcome else None
    asked_s = error.retry_after_s if isinstance(error, OperationError) else 0.0
    return asked_s + _GROWING(state)


def error_of(status: int, text: str, retry_after: str | None = None) -> GraftError:
    """The server's error as the class that it was there; `retry_after` is its header, in seconds
    (a date counts as none)."""
    try:
        detail = json.loads(text)["error"]
        message, code, param = str(detail["message"]), str(detail.get("code")), detail.get("param")
    except (ValueError, KeyError, TypeError):
        message, code, param = f"HTTP {status}: {text[:200]}", "", None
    fallback = OperationError if status >= 500 else RequestError
    cls = _BY_CODE.get(code) or _BY_STATUS.get(status) or fallback
    if issubclass(cls, RequestError):
        return cls(message, param=param)
    if issubclass(cls, OperationError) and retry_after and retry_after.isdigit():
        return cls(message, retry_after_s=float(retry_after))
    return cls(message)
