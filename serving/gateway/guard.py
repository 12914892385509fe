"""What every HTTP request passes: header limit, request id, API key, its log line and count.

An ASGI layer around the routes, so that no route can be reached beside it; it looks at the path
that is routed, never at the URL that a Host header makes up.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders

from cluster.errors import HeadersTooLargeError
from serving.gateway.access import Door
from serving.gateway.errors import error_response
from serving.gateway.metrics import Metrics
from serving.gateway.tracing import Traces, current
from serving.ingress import REQUEST_ID

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ready")
_log = structlog.get_logger("graft.gateway")


class Guard:
    """Wraps the app `app`; a request that comes through has in its state `tenant`, `began_s`, the
    monotonic time of its arrival, and `held`, whose scopes end when its whole answer is sent.
    `is_echoed` behind Ray Serve's proxy, which adds the id of the request to the answer itself."""

    def __init__(
        self,
        app: App,
        *,
        door: Door,
        metrics: Metrics,
        max_header_bytes: int,
        traces: Traces | None = None,
        is_echoed: bool = False,
    ) -> None:
        self._app, self._door, self._metrics, self._traces = app, door, metrics, traces
        self._is_echoed = is_echoed
        self._max_header_bytes = max_header_bytes
        self._ids: set[str] = set()  # of requests in progress

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = scope["path"].rstrip("/") or "/"
        headers = Headers(scope=scope)
        wanted = headers.get("x-request-id", "")
        request_id = self._request_id(wanted)
        self._ids.add(request_id)
        structlog.contextvars.bind_contextvars(request_id=request_id)
        began, status, tenant_id, has_begun = time.monotonic(), 500, "", False
        is_traced = self._traces is not None and scope["path"] not in OPEN
        trace = self._traces.begin(headers, request_id) if self._traces and is_traced else None
        token, held = current.set(trace), ExitStack()

        async def send_with_id(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                if not (self._is_echoed and request_id == wanted):
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            if sum(len(k) + len(v) for k, v in scope["headers"]) > self._max_header_bytes:
                raise HeadersTooLargeError(
                    f"the headers are over {self._max_header_bytes:,} bytes; send less"
                )
            if scope["path"] not in OPEN:
                tenant = await self._door.tenant(headers.get("authorization"))
                tenant_id = tenant.id
                scope.setdefault("state", {}).update(tenant=tenant, began_s=began, held=held)
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if has_begun:
                raise
            self._metrics.failed(error)
            await error_response(error)(scope, receive, send_with_id)
        finally:
            held.close()
            self._ids.discard(request_id)
            seconds = time.monotonic() - began
            if scope["path"] not in OPEN:
                self._metrics.answered(status)
                _log.info(
                    "request", method=scope["method"], path=scope["path"][:200], status=status,
                    seconds=round(seconds, 4), key=tenant_id,
                )  # fmt: skip
            if trace is not None:
                trace.end(scope["method"], getattr(scope.get("route"), "path", None), status)
            current.reset(token)
            structlog.contextvars.unbind_contextvars("request_id")

    def _request_id(self, wanted: str) -> str:
        """The caller's id if it is one and nobody else's now, else one of our own."""
        if REQUEST_ID.fullmatch(wanted.encode("latin-1")) and wanted not in self._ids:
            return wanted
        return uuid4().hex
