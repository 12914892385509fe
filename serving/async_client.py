"""The Python client of one service, asynchronous; `serving.client` has both, and an example.

Failures that a retry may mend are retried with growing pauses; others raise the server's error as
the class of cluster.errors that it was there. No torch, no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack
from urllib.parse import quote

import httpx2
import numpy as np

from cluster.errors import (
    GraftError,
    OperationError,
    RequestError,
    SpecError,
)
from serving.asking import (
    Generation,
    Options,
    Prompt,
    embedding_parts,
    embeddings,
    generation,
    request_body,
    retrying,
    stream_event,
)
from serving.batch_file import BatchReport, run_batch
from serving.connection import Connection
from serving.outage import Outage
from serving.pace import Pace
from serving.protocol import DONE, ModelCard, ModelList

if TYPE_CHECKING:
    from serving.spec import ServingSpec

T = TypeVar("T")
R = TypeVar("R")

_OF_ANOTHER_FORM = (LookupError, TypeError, AttributeError, ValueError)
_NOWHERE = "http://local"  # stands for an engine in this process


class AsyncClient:
    """A connection pool to one service.

    Args:
        base_url: Where `graft serve` listens, without /v1.
        api_key: Sent as a bearer token.
        timeout_s: Longest wait for an answer, or for the next piece of a stream. A request that
            took longer is not tried again.
        max_attempts: Tries of one request, the first included; `generate_file` waits outages out.
        concurrency: Most requests in progress at once; fewer where the service pushes back, see
            `serving.pace`.
        transport: Takes the requests in place of connections to `base_url`; see `local`.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_attempts: int = 8,
        concurrency: int = 64,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        if concurrency < 1 or max_attempts < 1:
            raise SpecError("concurrency and max_attempts must be at least 1")
        self.concurrency = concurrency
        self._connection = Connection(
            base_url, api_key=api_key, timeout_s=timeout_s, num_kept=concurrency,
            transport=transport,
        )  # fmt: skip
        self.base_url = self._connection.base_url
        self._max_attempts = max_attempts
        self._pace = Pace(concurrency)
        self._outage: Outage | None = None
        self._base_name: str | None = None

    @classmethod
    def local(
        cls, source: str | Path | ServingSpec, *, store: str | None = None, **settings: Any
    ) -> Self:
        """A client of an engine in this process: the same answers without a service, Ray or a
        network. Loads the base now, in this thread; `close` ends the engine.

        Args:
            source: A service's YAML or spec, or the folder of a base, whose name is then `base`.
            store: Where adapters are, in place of the spec's.
            settings: As of the class.

        Raises:
            CallerError: the spec or the base cannot be used.
        """
        return local_client(cls, source, store, settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        await self._connection.close()

    async def models(self) -> list[ModelCard]:
        """The base, first, and every adapter."""
        path = "/v1/models"
        body = await self._retrying(lambda: self._connection.json("GET", path))
        return self._read(lambda found: ModelList.model_validate(found).data, body, path)

    async def model(self, name: str) -> ModelCard:
        """The base or adapter that `name` means: an adapter's own, name@version, name:alias, or a
        mix. Raises GraftError; ModelNotFoundError for none of these."""
        path = f"/v1/models/{quote(name, safe='')}"
        body = await self._retrying(lambda: self._connection.json("GET", path))
        return self._read(ModelCard.model_validate, body, path)

    async def generate(
        self, prompts: Sequence[Prompt], *, adapter: str | None = None, **options: Unpack[Options]
    ) -> list[Generation]:
        """Continue each prompt (a text, token ids, or chat messages); answers in their order.

        Args:
            adapter: A name, name@version or name:alias; None for the base.

        Raises:
            GraftError: the first that failed; the others are dropped.
        """

        async def one(prompt: Prompt) -> Generation:
            return await self.generate_one(prompt, adapter=adapter, **options)

        return await self._all(one, prompts)

    async def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        adapter: str | None = None,
        dimensions: int | None = None,
    ) -> np.ndarray:
        """A vector of length 1 for each input (a text, or token ids), float32 [inputs, dimensions].

        Args:
            adapter: As in `generate`.
            dimensions: Keep only the first so many numbers of each, made to length 1 again.

        Raises:
            GraftError: the first that failed; the others are dropped.
        """
        if isinstance(inputs, str):
            raise RequestError("inputs is one text; give a list of texts", param="inputs")
        model = await self._model(adapter)
        asked: dict[str, Any] = {"model": model, "encoding_format": "base64"}
        if dimensions is not None:
            asked["dimensions"] = dimensions

        async def one(part: Sequence[str | Sequence[int]]) -> list[np.ndarray]:
            body, path = {**asked, "input": list(part)}, "/v1/embeddings"
            answer = await self._retrying(lambda: self._connection.json("POST", path, body))
            return self._read(embeddings, answer, path)

        parts = await self._all(one, embedding_parts(inputs))
        found = [vector for part in parts for vector in part]
        return np.stack(found) if found else np.zeros((0, dimensions or 0), dtype=np.float32)

    async def generate_one(
        self, prompt: Prompt, *, adapter: str | None = None, **options: Unpack[Options]
    ) -> Generation:
        """Continue one prompt. Raises GraftError."""
        path, body = await self._request(prompt, adapter, options)
        answer = await self._retrying(lambda: self._connection.json("POST", path, body))
        return self._read(generation, answer, path)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        adapter: str | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """What the assistant says, or calls, next in a conversation. Raises GraftError."""
        return await self.generate_one(messages, adapter=adapter, **options)

    async def stream(
        self, prompt: Prompt, *, adapter: str | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[str]:
        """The text of one answer as it comes. Retried until it has begun, and not from there on.

        Raises:
            GraftError: the server failed, or the stream ended before the answer did.
        """
        path, body = await self._request(prompt, adapter, options)
        # Its turn ends where it begins: who reads several streams by turns would wait for himself.
        response = await self._retrying(
            lambda: self._connection.begun(path, {**body, "stream": True})
        )
        is_over = False
        try:
            async for line in self._connection.lines(response):
                if not line.startswith("data: "):
                    continue
                data = line.removeprefix("data: ")
                if data == DONE and is_over:
                    return
                if data == DONE:
                    break
                try:
                    piece, ends = stream_event(data)
                except _OF_ANOTHER_FORM:  # of a line that is cut, too
                    break
                is_over = is_over or ends
                if piece:
                    yield piece
        except httpx2.RequestError as error:
            raise self._connection.fault(error) from error
        finally:
            await response.aclose()
        raise OperationError(f"{self.base_url}: the stream ended before the answer did; try again")

    async def generate_file(
        self,
        source: str | Path,
        target: str | Path,
        *,
        adapter: str | None = None,
        adapter_column: str | None = None,
        overwrite: bool = False,
        progress: bool = True,
        outage_s: float = 600.0,
        **options: Unpack[Options],
    ) -> BatchReport:
        """Answer every row of a file; see `serving.batch_file`.

        Args:
            outage_s: Seconds for which a service that does not answer is waited for; what fails
                meanwhile fails no row.

        Raises:
            CallerError: the file cannot be used; nothing was sent. Or every row would fail by it:
                the adapter, an option or the key.
            StoreError: an answer cannot be kept; the same call goes on from those before it.
            OperationError: the outage was longer; the same call goes on.
        """
        if not outage_s >= 0:
            raise SpecError(f"outage_s is {outage_s}, and must be at least 0")
        return await run_batch(
            self._outlasting,
            Path(source),
            Path(target),
            adapter=adapter,
            adapter_column=adapter_column,
            overwrite=overwrite,
            progress=progress,
            outage_s=outage_s,
            options=dict(options),
        )

    def _outlasting(self, outage: Outage) -> AsyncClient:
        """This client, with its connections and its pace, whose requests wait `outage` out."""
        other = copy(self)
        other._outage = outage
        return other

    async def _request(
        self, prompt: Prompt, adapter: str | None, options: Options
    ) -> tuple[str, dict[str, Any]]:
        """Path and body for a prompt."""
        return request_body(prompt, await self._model(adapter), options)

    async def _model(self, adapter: str | None) -> str:
        """The name of an adapter, or of the base, which the service tells."""
        if adapter is not None:
            return adapter
        if self._base_name is None:
            self._base_name = (await self.models())[0].id
        return self._base_name

    async def _all(self, one: Callable[[T], Awaitable[R]], given: Sequence[T]) -> list[R]:
        """What `one` makes of each. Raises the first GraftError."""

        async def run(each: T) -> R:
            return await one(each)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(each)) for each in given]
        except* GraftError as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _retrying(self, call: Callable[[], Awaitable[Any]]) -> Any:
        outage = self._outage

        async def paced() -> Any:
            async with self._pace.turn(), outage.attempt() if outage else nullcontext():
                return await call()

        async def outlasted() -> Any:
            return await (outage.outlast(paced) if outage else paced())

        return await retrying(outlasted, self._max_attempts)

    def _read(self, form: Callable[[Any], R], answer: Any, path: str) -> R:
        """What `form` makes of an answer. Raises OperationError for one that it does not know."""
        try:
            return form(answer)
        except _OF_ANOTHER_FORM as error:
            raise OperationError(
                f"{self.base_url}{path}: the answer is not one of OpenAI's form "
                f"({type(error).__name__}: {error}); is this the service's address?"
            ) from error


def local_client(
    make: Callable[..., T], source: Any, store: str | None, settings: Mapping[str, Any]
) -> T:
    """The client that `make` makes of an engine in this process; see `AsyncClient.local`."""
    from serving.local import LocalService, local_spec  # with torch, which other clients do without

    service = LocalService(local_spec(source, [] if store is None else [f"store={store}"]))
    try:
        return make(_NOWHERE, transport=service, **settings)
    except BaseException:
        service.stop()
        raise
