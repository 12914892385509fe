"""Requests to one service, and what comes back: a body, a stream that has begun, or its error.

Knows HTTP, and nothing of what is asked; `serving.async_client` does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import httpx2

from cluster.errors import (
    DeadlineError,
    GraftError,
    RequestError,
    SpecError,
    UnavailableError,
)
from serving.asking import error_of


class Connection:
    """A pool of connections to `base_url`, or the `transport` in their place, which it closes.

    Raises:
        SpecError: the key is none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        timeout_s: float,
        num_kept: int,
        transport: httpx2.AsyncBaseTransport | None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        key = (api_key or "").strip()  # a file's text ends with a line's end
        if not (key.isascii() and key.isprintable()):
            raise SpecError("api_key: has characters that no key has; give it as it was told")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Requests wait for their turn, and open streams hold none: nobody waits for a connection.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=num_kept)
        timeout = httpx2.Timeout(timeout_s, connect=10.0)
        self._http = httpx2.AsyncClient(
            base_url=self.base_url, headers=headers, limits=limits, timeout=timeout,
            trust_env=False, transport=transport,
        )  # fmt: skip

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def lines(self, response: httpx2.Response) -> AsyncGenerator[str]:
        """A stream's lines, by line feeds alone: an answer may hold what else ends one."""
        rest = b""
        async for chunk in response.aiter_bytes():
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace").removesuffix("\r")
        if rest:
            yield rest.decode(errors="replace")

    async def json(self, method: str, path: str, body: Any = None) -> Any:
        """A whole answer's body. Raises GraftError."""
        response = await self._send(self._request(method, path, body), stream=False)
        self._check_kind(response, path)
        try:
            return response.json()
        except ValueError as error:
            raise UnavailableError(f"{self.base_url}{path}: the answer is cut short") from error

    async def begun(self, path: str, body: Any) -> httpx2.Response:
        """A response whose body is still to be read, and closed. Raises GraftError."""
        return await self._send(self._request("POST", path, body), stream=True)

    def fault(self, error: httpx2.RequestError) -> GraftError:
        """What a fault on the way is for the caller."""
        if isinstance(error, (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError)):
            return SpecError(f"{self.base_url}: {error}; write the address as http://HOST:PORT")
        if isinstance(error, httpx2.ReadTimeout):
            return DeadlineError(
                f"{self.base_url}: nothing came for {self._timeout_s:g} s (the client's "
                "timeout_s); raise it, or ask for less"
            )
        return UnavailableError(
            f"{self.base_url}: {str(error) or type(error).__name__}; is the service running?"
        )

    async def _send(self, request: httpx2.Request, *, stream: bool) -> httpx2.Response:
        try:
            response = await self._http.send(request, stream=stream)
            if response.status_code >= 400:
                await response.aread()
        except httpx2.RequestError as error:
            raise self.fault(error) from error
        if response.status_code >= 400:
            raise error_of(response.status_code, response.text, response.headers.get("retry-after"))
        return response

    def _check_kind(self, response: httpx2.Response, path: str) -> None:
        """Raise SpecError for an answer that no service gives."""
        is_page = response.headers.get("content-type", "").startswith("text/html")
        if is_page or response.is_redirect:
            what = "a web page" if is_page else "another address"
            raise SpecError(
                f"{self.base_url}{path}: answers {response.status_code}, with {what}; is this the "
                "service's address?"
            )

    def _request(self, method: str, path: str, body: Any) -> httpx2.Request:
        """Raises RequestError for a body that JSON has no form for."""
        try:
            return self._http.build_request(method, path, json=body)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"the request cannot be written as JSON ({error}); give text, finite numbers, "
                "lists and objects of these"
            ) from error
