"""The HTTP routes, as one FastAPI app over a Service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import datetime

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from cluster.errors import GraftError
from cluster.registry import AdapterVersion
from serving.gateway.bodies import read_body
from serving.gateway.errors import answer_graft_error, answer_http_error, error_body
from serving.gateway.service import Job, Piece, Service, usage
from serving.protocol import (
    DONE,
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Delta,
    ModelCard,
    ModelList,
    Sampling,
    Usage,
)

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# One event of a stream: the pieces of a job, or its usage at the end.
_Event = Callable[[Job, int, Piece | None, Usage | None], BaseModel]


def create_app(service: Service, *, max_body_bytes: int) -> FastAPI:
    """The app: /v1/models, /v1/completions, /v1/chat/completions, /health."""
    app = FastAPI(title="Graft", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(Exception, answer_graft_error)
    app.add_exception_handler(GraftError, answer_graft_error)
    app.add_exception_handler(HTTPException, answer_http_error)

    @app.get("/health")
    async def health() -> Response:  # pyright: ignore[reportUnusedFunction]
        await service.backend.check_health()
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def list_models() -> ModelList:  # pyright: ignore[reportUnusedFunction]
        catalogue = service.catalogue
        adapters = await asyncio.to_thread(catalogue.adapters)
        base = _card(catalogue.base_name, catalogue.base_name, None)
        cards = [_card(name, catalogue.base_name, version) for name, version in adapters.items()]
        return ModelList(data=[base, *cards])

    @app.get("/v1/models/{model:path}")
    async def show_model(model: str) -> ModelCard:  # pyright: ignore[reportUnusedFunction]
        version = await asyncio.to_thread(service.catalogue.resolve, model)
        return _card(model, service.catalogue.base_name, version)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        body = await read_body(request, CompletionRequest, max_bytes=max_body_bytes)
        job = await service.completion_job(body)
        return await _respond(service, body, job, _completion_event, _completion)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        body = await read_body(request, ChatRequest, max_bytes=max_body_bytes)
        job = await service.chat_job(body)
        return await _respond(service, body, job, _chat_event, _chat)

    return app


async def _respond(
    service: Service,
    body: Sampling,
    job: Job,
    event: _Event,
    whole: Callable[[Job, int, list[str], list[str], Usage], BaseModel],
) -> Response:
    created = int(time.time())
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        pieces = service.run(job, stream=True)
        # Whatever is wrong with the request shows before the first piece: still an HTTP error.
        first = await anext(pieces)
        events = _events(job, created, first, pieces, event, with_usage=with_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)
    texts = [""] * len(job.requests)
    reasons = [""] * len(job.requests)
    tokens = 0
    async with aclosing(service.run(job, stream=False)) as pieces:
        async for piece in pieces:
            texts[piece.index] += piece.text
            reasons[piece.index] = piece.finish_reason or ""
            tokens += piece.tokens
    answer = whole(job, created, texts, reasons, usage(job, tokens))
    return JSONResponse(answer.model_dump())


async def _events(
    job: Job,
    created: int,
    first: Piece,
    rest: AsyncGenerator[Piece],
    event: _Event,
    *,
    with_usage: bool,
) -> AsyncGenerator[str]:
    """Server-sent events. A failure is an error event and no [DONE], so that no client takes the
    part for the whole."""
    tokens = 0
    begun: set[int] = set()
    async with aclosing(rest):
        try:
            piece: Piece | None = first
            while piece is not None:
                if event is _chat_event and piece.index not in begun:
                    begun.add(piece.index)
                    yield _line(_chat_start(job, created, piece.index))
                tokens += piece.tokens
                if piece.text or piece.finish_reason:
                    yield _line(event(job, created, piece, None))
                piece = await anext(rest, None)
            if with_usage:
                yield _line(event(job, created, None, usage(job, tokens)))
            yield f"data: {DONE}\n\n"
        except Exception as error:
            _, body = error_body(error)
            yield _line(body)


def _line(body: BaseModel) -> str:
    return f"data: {body.model_dump_json()}\n\n"


def _completion(
    job: Job, created: int, texts: list[str], reasons: list[str], used: Usage
) -> Completion:
    choices = [
        CompletionChoice(index=index, text=text, finish_reason=reason)
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    return Completion(id=job.id, created=created, model=job.model, choices=choices, usage=used)


def _completion_event(
    job: Job, created: int, piece: Piece | None, used: Usage | None
) -> Completion:
    choices = (
        [CompletionChoice(index=piece.index, text=piece.text, finish_reason=piece.finish_reason)]
        if piece
        else []
    )
    return Completion(id=job.id, created=created, model=job.model, choices=choices, usage=used)


def _chat(
    job: Job, created: int, texts: list[str], reasons: list[str], used: Usage
) -> ChatCompletion:
    choices = [
        ChatChoice(index=index, message=AnswerMessage(content=text), finish_reason=reason)
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    return ChatCompletion(id=job.id, created=created, model=job.model, choices=choices, usage=used)


def _chat_start(job: Job, created: int, index: int) -> ChatChunk:
    choice = ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))
    return ChatChunk(id=job.id, created=created, model=job.model, choices=[choice])


def _chat_event(job: Job, created: int, piece: Piece | None, used: Usage | None) -> ChatChunk:
    choices = (
        [
            ChatChunkChoice(
                index=piece.index,
                delta=Delta(content=piece.text),
                finish_reason=piece.finish_reason,
            )
        ]
        if piece
        else []
    )
    return ChatChunk(id=job.id, created=created, model=job.model, choices=choices, usage=used)


def _card(name: str, base: str, version: AdapterVersion | None) -> ModelCard:
    if version is None:
        return ModelCard(id=name, created=0, root=name)
    created = int(datetime.fromisoformat(version.created_at).timestamp())
    return ModelCard(
        id=name, created=created, root=version.ref, parent=base, method=version.method.lower()
    )
