"""The rows of one part answered by a service in this process: no Ray, no HTTP.

The same core resolves, renders, tokenises and samples as behind HTTP, so that an answer is what
the service would give. What is wrong with a row, or with the adapter that it asks for, becomes its
error; what is wrong with the cluster or the store ends the part.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cluster.errors import CallerError, DataError, EngineError, OverloadedError
from cluster.table_rows import BadRow
from serving.asking import CHAT, request_body, retrying
from serving.batch_file import added_columns, calls_text, check_own, check_row
from serving.engine.request import derived_seed
from serving.gateway.access import Tenant
from serving.gateway.answers import ChatForm
from serving.gateway.bodies import checked
from serving.gateway.logprobs import TokenText
from serving.gateway.service import Piece, Service
from serving.journal import RowResult
from serving.protocol import ChatRequest, CompletionRequest

ROW = "row"  # the column of a row's number in the input, from 0
_TRIES = 8
_EVERYONE = Tenant(None)


@dataclass(frozen=True)
class Asked:
    """What is asked of every row. `options` are `serving.asking.Options`; where they have no
    `seed`, each row draws by its own, which follows from `seed` and the row's number."""

    column: str
    adapter: str | None
    adapter_column: str | None
    options: Mapping[str, Any]
    seed: int


async def answer_rows(
    service: Service,
    asked: Asked,
    rows: Sequence[Mapping[str, Any] | BadRow],
    first_row: int,
    *,
    concurrency: int,
) -> list[RowResult]:
    """The result of each row, in their order.

    Raises:
        OperationError: the store did not answer, or the engine stopped.
    """
    gate = asyncio.Semaphore(concurrency)

    async def one(row: int, values: Mapping[str, Any] | BadRow) -> RowResult:
        async with gate:
            return await _answer(service, asked, row, values)

    try:
        async with asyncio.TaskGroup() as group:
            numbered = enumerate(rows, first_row)
            tasks = [group.create_task(one(row, values)) for row, values in numbered]
    except* Exception as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _answer(
    service: Service, asked: Asked, row: int, values: Mapping[str, Any] | BadRow
) -> RowResult:
    if isinstance(values, BadRow):
        return RowResult(row, error=f"row {row}: {values.reason}")
    prompt, model = values.get(asked.column), asked.adapter
    if asked.adapter_column is not None:
        model = values.get(asked.adapter_column)
    try:
        check_own(row, values, (*added_columns(asked.options), ROW))
        check_row(row, prompt, model)
        _check_text(row, [prompt, model])
        assert prompt is not None
        options = {"seed": derived_seed(asked.seed, row), **asked.options}
        base = service.catalogue.base_name
        path, body = request_body(prompt, base if model is None else model, options)
        return await retrying(lambda: _run(service, row, path, body), _TRIES)
    except (CallerError, EngineError, OverloadedError, UnicodeError, RecursionError) as error:
        return RowResult(row, error=str(error))


def _check_text(row: int, values: Any) -> None:
    """JSON can spell half a surrogate pair, which is a str and which no tokenizer takes."""
    try:
        json.dumps(values, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"row {row}: holds half a surrogate pair, which is no text") from error


async def _run(service: Service, row: int, path: str, body: dict[str, Any]) -> RowResult:
    began_s = time.monotonic()
    chat = checked(body, ChatRequest) if path == CHAT else None
    if chat is not None:
        job = await service.chat_job(chat, _EVERYONE, began_s)
    else:
        job = await service.completion_job(checked(body, CompletionRequest), _EVERYONE, began_s)
    pieces: list[Piece] = []
    async with aclosing(service.run(job, stream=False)) as running:
        async for some in running:
            pieces += some
    (whole,) = pieces
    text, reason, calls = whole.text, whole.finish_reason, None
    if chat is not None and chat.tools_in_use:
        form = ChatForm(job, chat, TokenText(service.tokenizer))
        (choice,) = form.whole(pieces, job.usage(whole.tokens)).choices
        text, reason = choice.message.content or "", choice.finish_reason
        calls = calls_text(choice.message.tool_calls or ())
    return RowResult(row, text, reason, job.prompt_tokens, whole.tokens, tool_calls=calls)
