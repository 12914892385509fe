"""The HTTP routes, as one FastAPI app over a Service."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from datetime import datetime
from functools import partial
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from cluster.base_model import encode_text
from cluster.catalog import Catalog
from cluster.errors import ClientGoneError, GraftError, RequestError
from cluster.mixes import AdapterMix, NamedAdapter
from serving.engine.ranges import check_token_ids
from serving.gateway.access import Door, Tenant
from serving.gateway.answers import ChatForm, CompletionForm, Form, embedding_body
from serving.gateway.bodies import read_body
from serving.gateway.chat import render
from serving.gateway.errors import answer_graft_error, answer_http_error, error_body
from serving.gateway.guard import Guard
from serving.gateway.jobs import Job
from serving.gateway.logprobs import TokenText
from serving.gateway.metrics import CONTENT_TYPE
from serving.gateway.openapi import document
from serving.gateway.service import Piece, Service
from serving.gateway.tracing import Traces
from serving.gateway.writing import write
from serving.protocol import (
    DONE,
    ChatRequest,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    EmbeddingRequest,
    ModelCard,
    ModelList,
    Sampling,
    TokenizeRequest,
    Tokens,
    Usage,
)
from serving.spec import GatewaySpec

R = TypeVar("R")
# The engine's names of what /v1/embeddings calls otherwise.
_EMBEDDING_NAMES = {
    "prompt": "input", "prompt_token_ids": "input", "pooling": "model", "adapter": "model",
}  # fmt: skip
# Places with log probabilities: of twenty tokens each they take some milliseconds.
_MADE_AT_ONCE = 32
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# The names of what FastAPI calls are never used here.
# pyright: reportUnusedFunction=false


def create_app(
    service: Service,
    spec: GatewaySpec,
    door: Door,
    traces: Traces | None = None,
    *,
    is_behind_serve: bool = False,
) -> FastAPI:
    """The app with every route; `door` decides who comes in, `traces` tells of each request."""
    app = FastAPI(title="Graft", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(
        Guard,
        door=door,
        metrics=service.metrics,
        max_header_bytes=spec.max_header_bytes,
        traces=traces,
        is_echoed=is_behind_serve,
    )
    app.add_exception_handler(GraftError, answer_graft_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    _add_answers(app, service, spec)
    _add_models(app, service)
    _add_tokens(app, service, spec)
    _add_state(app, service)
    return app


def _add_answers(app: FastAPI, service: Service, spec: GatewaySpec) -> None:
    texts = TokenText(service.tokenizer)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        body = await read_body(request, CompletionRequest, spec)
        tenant = _admitted(service, request, body.answers, "prompt")
        with _named(body.names):
            job = await service.completion_job(body, tenant, request.state.began_s)
            return await _respond(service, request, body, job, CompletionForm(job, body, texts))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatRequest, spec)
        tenant = _admitted(service, request, body.answers, "n")
        with _named(body.names):
            job = await service.chat_job(body, tenant, request.state.began_s)
            return await _respond(service, request, body, job, ChatForm(job, body, texts))

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        body = await read_body(request, EmbeddingRequest, spec)
        tenant = _admitted(service, request, body.answers, "input")
        with _named(_EMBEDDING_NAMES):
            job = await service.embedding_job(body, tenant, request.state.began_s)
            answers = await _answers(service, request, job)
        whole = await asyncio.to_thread(embedding_body, job, body, answers)
        return Response(whole, media_type="application/json")


def _add_models(app: FastAPI, service: Service) -> None:
    catalogue = service.catalogue

    @app.get("/v1/models")
    async def list_models(request: Request) -> ModelList:
        allows = _tenant(request).allows

        seen = await service.in_time(catalogue.catalog())
        adapters = await service.in_time(catalogue.adapters(seen))

        def cards() -> list[ModelCard]:
            aliases = seen.aliases_by_name()
            named = [(catalogue.base_name, None), *adapters.items()]
            return [
                _card(name, catalogue.base_name, version, seen, aliases)
                for name, version in named
                if allows(name)
            ]

        return ModelList(data=await asyncio.to_thread(cards))

    @app.get("/v1/models/{model:path}")
    async def show_model(request: Request, model: str) -> ModelCard:
        version = await service.in_time(catalogue.find(model, _tenant(request).allows))
        if version is None:
            return _card(model, catalogue.base_name, None, Catalog({}, {}), {})
        seen = await service.in_time(catalogue.catalog())
        return _card(model, catalogue.base_name, version, seen, seen.aliases_by_name())


def _add_tokens(app: FastAPI, service: Service, spec: GatewaySpec) -> None:
    tokenizer = service.tokenizer

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Tokens:
        body = await read_body(request, TokenizeRequest, spec)

        def ids() -> list[int]:
            if body.messages is not None:
                opens = body.add_generation_prompt
                return render(
                    tokenizer, body.messages, body.tools or (), add_generation_prompt=opens
                )
            return encode_text(tokenizer, body.prompt or "", special=body.add_special_tokens)

        with _tenant(request).request():
            found = await asyncio.to_thread(ids)
        return Tokens(count=len(found), tokens=found)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Detokenized:
        body = await read_body(request, DetokenizeRequest, spec)

        def text() -> str:
            check_token_ids(body.tokens, len(tokenizer), "tokens")
            return tokenizer.decode(body.tokens)

        with _tenant(request).request():
            return Detokenized(prompt=await asyncio.to_thread(text))


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        await service.backend.check_health()
        return JSONResponse({"status": "ready"})

    @app.get("/openapi.json")
    async def described() -> Response:
        return JSONResponse(document())

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        # They name every adapter; whoever may not know of one finds nothing here.
        if not _tenant(request).sees_all:
            raise HTTPException(404)
        text = service.metrics.text(await service.backend.figures())
        return Response(text, media_type=CONTENT_TYPE)


async def _respond(
    service: Service, request: Request, body: Sampling, job: Job, form: Form
) -> Response:
    if body.stream:
        merged = service.run(job, stream=True)
        # Whatever is wrong with the request shows before the first piece: still an HTTP error.
        # From there on the response itself sees whether the client leaves.
        first = await _while_connected(request, anext(merged))
        events = _events(service, body, job, first, merged, form)
        return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)
    answers = await _answers(service, request, job)
    used = job.usage(sum(piece.tokens for piece in answers))
    whole = await _made(lambda: write(form.whole(answers, used)), answers)
    return Response(whole, media_type="application/json")


async def _made(make: Callable[[], bytes], pieces: Sequence[Piece]) -> bytes:
    """What `make` makes of the pieces; if they have many log probabilities, in a thread."""
    entries = sum(len(piece.logprobs) + len(piece.prompt_logprobs) for piece in pieces)
    return make() if entries <= _MADE_AT_ONCE else await asyncio.to_thread(make)


async def _answers(service: Service, request: Request, job: Job) -> list[Piece]:
    """The one piece of each answer, in order of index. Raises ClientGoneError."""

    async def collect() -> list[Piece]:
        answers: dict[int, Piece] = {}
        async with aclosing(service.run(job, stream=False)) as merged:
            async for pieces in merged:
                answers |= {piece.index: piece for piece in pieces}
        return [answers[index] for index in range(len(job.requests))]

    return await _while_connected(request, collect())


async def _while_connected(request: Request, work: Awaitable[R]) -> R:
    """What `work` comes to. Raises ClientGoneError, and cancels it, if the client leaves first."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    worked, left = asyncio.ensure_future(work), asyncio.create_task(leave())
    try:
        await asyncio.wait((worked, left), return_when=asyncio.FIRST_COMPLETED)
        if not worked.done():
            raise ClientGoneError("the client left before its answer was there")
        return worked.result()
    finally:
        for task in (worked, left):
            task.cancel()
        await asyncio.gather(worked, left, return_exceptions=True)


async def _events(
    service: Service,
    body: Sampling,
    job: Job,
    first: list[Piece],
    rest: AsyncGenerator[list[Piece]],
    form: Form,
) -> AsyncGenerator[bytes]:
    """Server-sent events. A failure is an error event and no [DONE], so that no client takes the
    part for the whole."""
    options = body.stream_options
    is_counted = options is not None and options.continuous_usage_stats
    tokens = 0
    async with aclosing(rest):
        try:
            pieces: list[Piece] | None = first
            while pieces is not None:
                tokens += sum(piece.tokens for piece in pieces)
                used: Usage | None = job.usage(tokens) if is_counted else None
                if lines := await _made(partial(_lines, form, pieces, used), pieces):
                    yield lines
                pieces = await anext(rest, None)
            if options is not None and options.include_usage:
                yield _line(form.last(job.usage(tokens)))
            yield f"data: {DONE}\n\n".encode()
        except Exception as error:
            service.metrics.failed(error)
            yield _line(error_body(error)[1])


def _lines(form: Form, pieces: Sequence[Piece], used: Usage | None) -> bytes:
    return b"".join(_line(chunk) for piece in pieces for chunk in form.chunks(piece, used))


def _line(body: BaseModel) -> bytes:
    return b"data: " + write(body) + b"\n\n"


def _tenant(request: Request) -> Tenant:
    return request.state.tenant


def _admitted(service: Service, request: Request, answers: int, param: str) -> Tenant:
    """The request's tenant, of whose limits so many answers are taken until all of it is sent."""
    tenant = _tenant(request)
    request.state.held.enter_context(service.admitted(tenant, answers, param))
    return tenant


@contextmanager
def _named(names: Mapping[str, str]) -> Generator[None]:
    """Tell of the body's own fields where the engine refuses what it calls otherwise."""
    try:
        yield
    except RequestError as error:
        own = error.param or ""
        if name := names.get(own):
            error.message = re.sub(rf"^{own}\b|\b{own}(?=\[)", name, error.message, count=1)
            error.param = name
        raise


def _card(
    name: str,
    base: str,
    adapter: NamedAdapter | None,
    seen: Catalog,
    aliases: Mapping[str, dict[str, int]],
) -> ModelCard:
    if adapter is None:
        return ModelCard(id=name, created=0, root=name)
    parts = [v for v, _ in adapter.parts] if isinstance(adapter, AdapterMix) else [adapter]
    created = max(int(datetime.fromisoformat(part.created_at).timestamp()) for part in parts)
    card = ModelCard(id=name, created=created, root=adapter.ref, parent=base)
    if isinstance(adapter, AdapterMix):
        card.method = "mix"
    else:
        card.method = adapter.method.lower()
        card.versions = seen.versions.get(adapter.name, [])
        card.aliases = aliases.get(adapter.name, {})
    return card
