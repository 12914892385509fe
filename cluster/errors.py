"""Every error Graft raises on purpose: one tree, and one table that maps it to the outside.

GraftError
├── CallerError                 the caller's fault; the same call fails again
│   ├── SpecError               a YAML spec or an option is wrong
│   ├── DataError               training or batch data cannot be used
│   ├── AdapterError            an adapter folder cannot be used (files, config, another base)
│   ├── BaseModelError          a base-model folder cannot be used
│   ├── ChatTemplateError       a conversation that the base's chat template cannot tell
│   ├── RequestError            an inference request asks the impossible
│   │   ├── ContextLengthError  prompt (+ max_tokens) exceeds the context
│   │   ├── BodyTooLargeError   the request's body is over the limit
│   │   └── HeadersTooLargeError  its headers are
│   ├── NotFoundError           a thing named by the caller does not exist
│   │   └── ModelNotFoundError  an inference request names no base or adapter served here
│   ├── ConflictError           the thing exists already, or is held by someone else
│   ├── ClientGoneError         the client left before its answer was there; nobody reads this
│   └── AuthenticationError     no credentials, or wrong ones
└── OperationError              ours or the cluster's fault; a retry may help
    ├── StoreError              shared storage refused or did not answer
    │   └── CopyChangedError    a local copy of an adapter is not the one that was verified
    ├── ClusterError            Ray cannot be reached, started or asked
    ├── JobFailedError          a job ended without doing its work
    ├── OverloadedError         too much queued; try again later
    │   └── RateLimitError      this key has used up what it may for now
    ├── DeadlineError           an answer was not there in time
    │   └── SlowBodyError       the request's body was not
    ├── UnavailableError        no replica can take the request now
    └── EngineError             a forward pass failed

Whose fault it is, and whether a retry helps, is the class; a message names the thing, its
value and the remedy. Imports nothing; everyone imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_MOST_CHARACTERS = 2000


class GraftError(Exception):
    """Root of the tree. `message` is for people: the thing, its value, the remedy."""

    retryable: bool = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CallerError(GraftError):
    """The caller's fault: the same call fails again."""


class SpecError(CallerError):
    """A YAML spec or an option is wrong; the message lists every fault with its path."""


class DataError(CallerError):
    """Training or batch data cannot be used."""


class AdapterError(CallerError):
    """An adapter folder cannot be used.

    Its message is cut, and escaped where it is not printable, since it has text of the folder's:
    nobody forges a line of a log with it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_legible(message))


def _legible(text: str) -> str:
    """`text` without its middle if it is long; the remedy stands at its end."""
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[: _MOST_CHARACTERS - 600]} […] {text[-500:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class BaseModelError(CallerError):
    """A base-model folder cannot be used."""


class ChatTemplateError(CallerError):
    """A conversation that the base's chat template cannot tell. `field` is the part at fault."""

    def __init__(self, message: str, field: Literal["messages", "tools"] = "messages") -> None:
        super().__init__(message)
        self.field = field


class RequestError(CallerError):
    """An inference request asks the impossible. `param` is the field at fault, if one is."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by positional args alone; param must survive the hop between replicas.
        return (_rebuild_request_error, (type(self), self.message, self.param))


def _rebuild_request_error(
    cls: type[RequestError], message: str, param: str | None
) -> RequestError:
    return cls(message, param=param)


class ContextLengthError(RequestError):
    """The prompt, or the prompt with max_tokens, exceeds the model's context."""


class BodyTooLargeError(RequestError):
    """The request's body is over the limit."""


class HeadersTooLargeError(RequestError):
    """The request's headers are over the limit."""


class NotFoundError(CallerError):
    """A thing that the caller named does not exist."""


class ModelNotFoundError(NotFoundError):
    """An inference request names neither the base model nor an adapter served here."""


class ConflictError(CallerError):
    """The thing exists already, or is held by someone else."""


class ClientGoneError(CallerError):
    """The client left before its answer was there. Nobody reads it but the log and the metrics."""


class AuthenticationError(CallerError):
    """No credentials, or wrong ones."""


class OperationError(GraftError):
    """Ours or the cluster's fault: the same call may succeed later.

    `retry_after_s` is how long the service asked to be left alone.
    """

    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreError(OperationError):
    """Shared storage refused or did not answer."""


class CopyChangedError(StoreError):
    """A local copy of an adapter is not the one that was verified."""


class ClusterError(OperationError):
    """Ray cannot be reached, started or asked."""


class JobFailedError(OperationError):
    """A job ended without doing its work."""


class OverloadedError(OperationError):
    """Too much is queued; try again after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class RateLimitError(OverloadedError):
    """An API key has used up its requests or tokens of this minute, or its concurrency."""


class DeadlineError(OperationError):
    """An answer, or its first token, was not there in time."""


class SlowBodyError(DeadlineError):
    """The request's body did not arrive in time."""


class UnavailableError(OperationError):
    """No replica can take the request now."""


class EngineError(OperationError):
    """A forward pass failed; only the requests of that batch are lost."""


# Of a service that cannot be reached, refuses for now or cuts an answer off (429, 502, 503): no
# request's own fault.
OUTAGES = (UnavailableError, OverloadedError, StoreError, ClusterError)


@dataclass(frozen=True)
class Outcome:
    """How one error class shows outside: HTTP status, OpenAI `type` and `code`, exit code."""

    status: int
    type: str
    code: str | None
    exit_code: int


_INVALID = "invalid_request_error"

# Exit codes: 1 unexpected, 2 the caller's fault, 3 not found, 4 conflict, 5 operation failed.
OUTCOMES: dict[type[GraftError], Outcome] = {
    GraftError: Outcome(500, "server_error", None, 1),
    CallerError: Outcome(400, _INVALID, None, 2),
    SpecError: Outcome(400, _INVALID, "invalid_spec", 2),
    DataError: Outcome(400, _INVALID, "invalid_data", 2),
    AdapterError: Outcome(400, _INVALID, "invalid_adapter", 2),
    BaseModelError: Outcome(400, _INVALID, "invalid_base_model", 2),
    ChatTemplateError: Outcome(400, _INVALID, None, 2),
    RequestError: Outcome(400, _INVALID, None, 2),
    ContextLengthError: Outcome(400, _INVALID, "context_length_exceeded", 2),
    BodyTooLargeError: Outcome(413, _INVALID, "body_too_large", 2),
    HeadersTooLargeError: Outcome(431, _INVALID, "headers_too_large", 2),
    NotFoundError: Outcome(404, _INVALID, "not_found", 3),
    ModelNotFoundError: Outcome(404, _INVALID, "model_not_found", 3),
    ConflictError: Outcome(409, _INVALID, "conflict", 4),
    ClientGoneError: Outcome(499, _INVALID, "client_gone", 2),  # the status that nginx has for it
    AuthenticationError: Outcome(401, "authentication_error", "invalid_api_key", 2),
    OperationError: Outcome(500, "server_error", None, 5),
    StoreError: Outcome(503, "server_error", "store_unavailable", 5),
    CopyChangedError: Outcome(503, "server_error", "copy_changed", 5),
    ClusterError: Outcome(503, "server_error", "cluster_unavailable", 5),
    JobFailedError: Outcome(500, "server_error", "job_failed", 5),
    OverloadedError: Outcome(429, "rate_limit_error", "overloaded", 5),
    RateLimitError: Outcome(429, "rate_limit_error", "rate_limit_exceeded", 5),
    DeadlineError: Outcome(504, "server_error", "timeout", 5),
    SlowBodyError: Outcome(408, _INVALID, "body_timeout", 5),
    UnavailableError: Outcome(503, "server_error", "unavailable", 5),
    EngineError: Outcome(500, "server_error", "engine_error", 5),
}


def outcome_of(error: BaseException) -> Outcome:
    """The outcome of `error`'s nearest mapped class; any foreign exception is a plain 500."""
    for cls in type(error).__mro__:
        if cls in OUTCOMES:
            return OUTCOMES[cls]
    return OUTCOMES[GraftError]
