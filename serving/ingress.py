"""Runs in Ray Serve's proxies: a short body goes to the gateway together with its request.

Of its own accord Serve sends on a request without its body, and the gateway asks the proxy for that
by a call from actor to actor; with the way back it was the longest part of a request's way to its
engine. Serve takes middleware for its proxies from a function that an environment variable names.
Knows ASGI and nothing of Graft: whatever else runs behind the same proxies finds its body as ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

BODY = "graft.body"  # of the scope
MAX_BYTES = 64 * 2**10
# A client sends a body right behind the headers. Whoever takes longer is the gateway's to judge.
_WAIT_S = 0.02

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def middleware() -> list[Middleware]:
    """Called by each of Serve's proxies when it starts."""
    return [Middleware(BodyAhead)]


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


def _has_short_body(scope: Message) -> bool:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return len(lengths) == 1 and lengths[0].isdigit() and 0 < int(lengths[0]) <= MAX_BYTES
