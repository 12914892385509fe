"""What the clients and offline jobs ask of a service, and how they take its failures.

No connection is made here: `serving.client` has those. No torch, no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

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


def request_body(
    prompt: Prompt, model: str | None, options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Path and body for a prompt; what `options` leave out is as `Options` says."""
    body: dict[str, Any] = {"model": model, "max_tokens": 64, "temperature": 0.0, **options}
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
        return CHAT, {**body, "messages": list(prompt)}
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


async def retrying(call: Callable[[], Awaitable[R]], max_attempts: int) -> R:
    """`call`, again as long as that may mend its failure, with growing pauses. Raises GraftError,
    the last one."""
    attempts = AsyncRetrying(
        stop=stop_after_attempt(max_attempts),
        wait=_pause_s,
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


def _pause_s(state: RetryCallState) -> float:
    """A growing pause with jitter, and never shorter than the server asked for."""
    error = state.outcome.exception() if state.outcome else None
    asked_s = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
    return max(asked_s, _GROWING(state))


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
    if issubclass(cls, OverloadedError) and retry_after and retry_after.isdigit():
        return cls(message, retry_after_s=float(retry_after))
    return cls(message)
