"""Every failure as OpenAI's error body: ours by their table, malformed bodies, unknown paths."""

from __future__ import annotations

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cluster.errors import GraftError, RequestError, outcome_of
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


async def answer_graft_error(_: Request, error: Exception) -> JSONResponse:
    """For FastAPI: whatever a handler raised."""
    status, body = error_body(error)
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if status == 413:
        headers["Connection"] = "close"
    return JSONResponse(body.model_dump(), status, headers=headers)


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """For FastAPI: a path or method that does not exist."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {str(error.detail).lower()}"
    if error.status_code == 404:
        message += "; this service has /v1/models, /v1/completions, /v1/chat/completions, /health"
    detail = ErrorDetail(message=message, type="invalid_request_error")
    body = ErrorBody(error=detail).model_dump()
    return JSONResponse(body, error.status_code, headers=error.headers)
