"""Every failure as OpenAI's error body: ours by their table, malformed bodies, unknown paths."""

from __future__ import annotations

import math

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cluster.errors import GraftError, OverloadedError, RequestError, outcome_of
from serving.protocol import ErrorBody, ErrorDetail

_log = structlog.get_logger("graft.gateway")


def error_body(error: BaseException) -> tuple[int, ErrorBody]:
    """HTTP status and body of a failure. A foreign exception tells nothing of our insides."""
    outcome = outcome_of(error)
    if isinstance(error, GraftError):
        message = error.message
    else:
        _log.error("request failed", exc_info=error)
        message = "the server failed on this request; it is logged, and a retry may help"
    param = error.param if isinstance(error, RequestError) else None
    if outcome.code == "model_not_found":
        param = "model"
    detail = ErrorDetail(message=message, type=outcome.type, param=param, code=outcome.code)
    return outcome.status, ErrorBody(error=detail)


def error_response(error: Exception) -> JSONResponse:
    """The HTTP response of a failure."""
    status, body = error_body(error)
    headers: dict[str, str] = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif status == 503:
        headers["Retry-After"] = "1"
    elif status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif status == 413:
        headers["Connection"] = "close"
    return JSONResponse(body.model_dump(), status, headers=headers)


async def answer_graft_error(request: Request, error: Exception) -> JSONResponse:
    """For FastAPI: whatever a handler raised."""
    request.app.state.service.metrics.failed(error)
    return error_response(error)


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """For FastAPI: a path or method that does not exist."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {str(error.detail).lower()}"
    if error.status_code == 404:
        message += (
            "; this service has /v1/models, /v1/completions, /v1/chat/completions, "
            "/v1/embeddings, /tokenize, /detokenize, /health, /ready and /metrics"
        )
    detail = ErrorDetail(message=message, type="invalid_request_error")
    body = ErrorBody(error=detail).model_dump()
    return JSONResponse(body, error.status_code, headers=error.headers)
