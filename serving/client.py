"""The Python client: one prompt, many, a stream, or a whole file; sync and async.

    with Client("http://127.0.0.1:8000") as client:
        client.generate(["Hello"], adapter="support-bot")
        client.generate_file("questions.arrow", "answers.arrow", adapter="support-bot")

`Client.local(BASE, store=STORE)` has the same methods over an engine of its own in this process.
No torch, no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from serving.asking import Options, Prompt
from serving.async_client import AsyncClient, local_client
from serving.event_loop import EventLoop

if TYPE_CHECKING:
    from serving.spec import ServingSpec

__all__ = ["AsyncClient", "Client"]

R = TypeVar("R")
P = ParamSpec("P")


class Client:
    """`AsyncClient` for code without an event loop: the same methods, blocking.

    Raises the same errors. Use it with `with`, or call `close`.
    """

    def __init__(self, base_url: str = "http://127.0.0.1:8000", **settings: Any) -> None:
        self._loop = EventLoop()
        try:
            self._async = self._loop.wait(lambda: _make(base_url, settings))
        except BaseException:
            self._loop.close()
            raise

    @classmethod
    def local(
        cls, source: str | Path | ServingSpec, *, store: str | None = None, **settings: Any
    ) -> Self:
        """See AsyncClient."""
        return local_client(cls, source, store, settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        self._loop.wait(self._async.close)
        self._loop.close()

    @staticmethod
    def _blocking(
        method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]],
    ) -> Callable[Concatenate[Client, P], R]:
        """The same method, which waits for it."""

        @wraps(method)
        def call(self: Client, *args: P.args, **options: P.kwargs) -> R:
            return self._loop.wait(lambda: method(self._async, *args, **options))

        return call

    models = _blocking(AsyncClient.models)
    model = _blocking(AsyncClient.model)
    generate = _blocking(AsyncClient.generate)
    generate_one = _blocking(AsyncClient.generate_one)
    chat = _blocking(AsyncClient.chat)
    embed = _blocking(AsyncClient.embed)
    generate_file = _blocking(AsyncClient.generate_file)

    def stream(
        self, prompt: Prompt, *, adapter: str | None = None, **options: Unpack[Options]
    ) -> Iterator[str]:
        """See AsyncClient."""
        return self._loop.iterate(self._async.stream(prompt, adapter=adapter, **options))


async def _make(base_url: str, settings: Mapping[str, Any]) -> AsyncClient:
    return AsyncClient(base_url, **settings)
