"""An engine in this process behind the gateway's own app, without a network: what a client asks
goes to the app as a call, and comes back piece by piece.

No Ray. Importing it loads torch; `serving.async_client` does so when a local engine is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import structlog

from cluster.spec import load_spec, override_spec, parse_spec
from serving.app import checked
from serving.gateway.assembly import gateway_app
from serving.replica import Replica
from serving.spec import ServingSpec

BASE_NAME = "base"  # of a base that is given as its folder
_log = structlog.get_logger("graft.local")
_Message = MutableMapping[str, Any]


def local_spec(source: str | Path | ServingSpec, overrides: Sequence[str] = ()) -> ServingSpec:
    """The spec at `source`, or that of a base's folder, which is then called BASE_NAME.

    Raises SpecError if it is no spec of a service, with every fault.
    """
    if isinstance(source, ServingSpec):
        return override_spec(source, overrides, source=source.name)
    if Path(source).expanduser().is_dir():
        tree = {"name": BASE_NAME, "engine": {"base_model": str(source)}}
        return override_spec(parse_spec(ServingSpec, tree), overrides, source=str(source))
    return load_spec(ServingSpec, Path(source).expanduser(), overrides)


class LocalService(httpx2.AsyncBaseTransport):
    """Answers for a `local_spec` from this process, until it is closed. In one event loop.

    Raises:
        SpecError: it asks for an extra that is not installed.
        BaseModelError: a base is not a whole folder.
    """

    def __init__(self, spec: ServingSpec) -> None:
        # Who only asks does not write to the store.
        gateway = spec.gateway.model_copy(update={"imports": False})
        spec = checked(spec.model_copy(update={"gateway": gateway}))
        if not structlog.is_configured():  # of its own accord it writes each request to stdout
            structlog.configure(
                wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
                logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            )
        self._calls: set[_Call] = set()
        self._replica = Replica(spec)
        try:
            self._app = gateway_app(spec, self._replica)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the engine and every request; what is called from then on is refused."""
        self._replica.stop()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """See httpx2: the response, once it begins."""
        call = _Call(request, await request.aread())
        self._calls.add(call)
        call.begin(self._app).add_done_callback(lambda _task: self._calls.discard(call))
        try:
            return await call.response()
        except BaseException:
            await call.aclose()
            raise

    async def aclose(self) -> None:
        """See httpx2."""
        calls = list(self._calls)
        for call in calls:
            await call.aclose()
        await asyncio.to_thread(self.stop)
        await asyncio.gather(*(call.task for call in calls))


class _Call(httpx2.AsyncByteStream):
    """One request on its way through the app, and the body of its response."""

    task: asyncio.Task[None]

    def __init__(self, request: httpx2.Request, body: bytes) -> None:
        self._request = request
        self._body: bytes | None = body
        self._timeout_s = request.extensions.get("timeout", {}).get("read")
        self._messages: asyncio.Queue[_Message | None] = asyncio.Queue()
        self._has_left = asyncio.Event()

    def begin(self, app: Any) -> asyncio.Task[None]:
        """Call the app in a task of its own."""
        self.task = asyncio.create_task(self._run(app))
        return self.task

    async def response(self) -> httpx2.Response:
        """Its status and headers, in front of a body that is not there yet."""
        start = await self._next()
        return httpx2.Response(start["status"], headers=start["headers"], stream=self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        has_more = True
        while has_more:
            message = await self._next()
            yield message.get("body", b"")
            has_more = message.get("more_body", False)

    async def aclose(self) -> None:
        """As a client that closes its connection."""
        self._has_left.set()

    async def _next(self) -> _Message:
        try:
            async with asyncio.timeout(self._timeout_s):
                message = await self._messages.get()
        except TimeoutError as error:
            raise httpx2.ReadTimeout(f"no answer within {self._timeout_s} s") from error
        if message is None:
            raise httpx2.ReadError("the answer ended before it was whole")
        return message

    async def _run(self, app: Any) -> None:
        url, method = self._request.url, self._request.method
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": url.scheme,
            "method": method, "path": url.path, "raw_path": url.raw_path.split(b"?")[0],
            "query_string": url.query, "root_path": "", "client": None, "server": None,
            "headers": [(name.lower(), value) for name, value in self._request.headers.raw],
        }  # fmt: skip
        try:
            await app(scope, self._receive, self._messages.put)
        except Exception as error:  # told to the client already, if it was still there
            _log.error("a request failed", error=f"{type(error).__name__}: {error}")
        finally:
            self._messages.put_nowait(None)

    async def _receive(self) -> _Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._has_left.wait()
        return {"type": "http.disconnect"}
