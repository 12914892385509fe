"""Runs in Ray Serve's proxies: a short body goes to the gateway together with its request, and an
answer has one id.

Of its own accord Serve sends on a request without its body, and the gateway asks the proxy for that
by a call from actor to actor; with the way back it was the longest part of a request's way to its
engine. And it adds to each answer the id that its request came with, whatever it is, beside the one
that the answer has. Serve takes middleware for its proxies from a function that an environment
variable names.
Knows ASGI and nothing of Graft: whatever else runs behind the same proxies finds its body as ever.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

BODY = "graft.body"  # of the scope
MAX_BYTES = 64 * 2**10
# A client sends a body right behind the headers. Whoever takes longer is the gateway's to judge.
_WAIT_S = 0.02

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_HEADER = b"x-request-id"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def middleware() -> list[Middleware]:
    """Called by each of Serve's proxies when it starts."""
    return [Middleware(BodyAhead), Middleware(OneRequestId)]  # the last is the outermost


class BodyAhead:
    """Wraps `app`, for which the scope of a request with a short body has it under BODY."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or not _has_short_body(scope):
            await self._app(scope, receive, send)
            return
        first: asyncio.Future[Message] | None = asyncio.ensure_future(receive())
        began = first
        await asyncio.wait((began,), timeout=_WAIT_S)
        if began.done():
            message = began.result()
            if message["type"] == "http.request" and not message.get("more_body"):
                scope[BODY] = message.get("body", b"")

        async def receive_again() -> Message:
            nonlocal first
            if first is None:
                return await receive()
            given, first = first, None
            return await given

        try:
            await self._app(scope, receive_again, send)
        finally:
            began.cancel()


class OneRequestId:
    """Wraps `app` with Serve's own middleware, which finds no request id that is none, and whose id
    an answer keeps only if it has no other."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        scope["headers"] = [h for h in headers if h[0] != _HEADER or REQUEST_ID.fullmatch(h[1])]

        async def send_one(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                ids = [header for header in headers if header[0].lower() == _HEADER]
                message["headers"] = [h for h in headers if h not in ids] + ids[:1]
            await send(message)

        await self._app(scope, receive, send_one)


def _has_short_body(scope: Message) -> bool:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return len(lengths) == 1 and lengths[0].isdigit() and 0 < int(lengths[0]) <= MAX_BYTES
