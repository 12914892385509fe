"""A file of prompts to a file of answers, that loses nothing on the way.

The input has a column `prompt` (text) or `messages` (a chat), in any format of
cluster.table_parts, and is read and written a few hundred rows at a time, so it may have any size.
The output has its rows, in their order, with `completion`, `finish_reason`, `prompt_tokens`,
`completion_tokens` and `error` added, and `tool_calls` where there are tools to call; a row that
cannot be answered has its reason there and disturbs no other. What would fail every row ends the
call instead: a service that is away for too long, a refused key, adapter or option. Answers are
kept in OUT.partial as they come, so that the same call after an interruption asks only for what is
missing; OUT itself appears whole, at the end, and OUT.partial goes. A name stands for the version
that it meant when the first row asked for it, and no row gets another, however long the call or
what goes on with it takes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.errors import (
    OUTAGES,
    AdapterError,
    AuthenticationError,
    ConflictError,
    ContextLengthError,
    DataError,
    GraftError,
    NotFoundError,
    RequestError,
)
from cluster.table_parts import TableSource
from cluster.table_rows import BadRow, as_table, json_schema, plain, values_of, with_columns
from cluster.tables import JSONL, check_holds, check_writable, table_file
from serving.asking import check_options
from serving.journal import Journal, RowResult, journal
from serving.meanings import Meanings
from serving.outage import Outage
from serving.progress import Progress, progress_bar
from serving.protocol import ToolCall

if TYPE_CHECKING:
    from serving.async_client import AsyncClient

_ROWS_AT_ONCE = 256  # a row may be a whole document
_ASKED_FIRST = 16  # rows by which options are known to be refused
Values = Mapping[str, Any] | BadRow
PROMPT_COLUMNS = ("messages", "prompt")
ADDED = {
    "completion": pa.string(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "error": pa.string(),
}


@dataclass(frozen=True)
class BatchReport:
    """What became of a file. `seconds` and the token counts are of this call alone."""

    rows: int
    failed: int
    resumed: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float

    def __str__(self) -> str:
        speed = self.completion_tokens / max(self.seconds, 1e-9)
        kept = f", {self.resumed:,} of them kept from before" if self.resumed else ""
        failed = f", {self.failed:,} failed" if self.failed else ""
        return (
            f"{self.rows:,} rows{kept}{failed}: {self.completion_tokens:,} tokens in "
            f"{self.seconds:.1f} s, {speed:,.0f} tokens/s"
        )


@dataclass(frozen=True)
class _Asked:
    """What is asked of every row, by the columns of the input."""

    column: str
    adapter: str | None
    adapter_column: str | None
    options: Mapping[str, Any]

    @property
    def added(self) -> Mapping[str, pa.DataType]:
        """The columns of the answers."""
        return added_columns(self.options)


def added_columns(options: Mapping[str, Any]) -> Mapping[str, pa.DataType]:
    """What rows are given: with tools to call, also the calls, as OpenAI's JSON in a text."""
    return {**ADDED, "tool_calls": pa.string()} if options.get("tools") else ADDED


def calls_text(calls: Sequence[ToolCall]) -> str | None:
    """Of the column `tool_calls`; None where nothing is called."""
    return json.dumps([call.model_dump() for call in calls]) if calls else None


async def run_batch(
    outlasting: Callable[[Outage], AsyncClient],
    source: Path,
    target: Path,
    *,
    adapter: str | None,
    adapter_column: str | None,
    overwrite: bool,
    progress: bool,
    outage_s: float,
    options: Mapping[str, Any],
) -> BatchReport:
    """Answer every row of `source` into `target`.

    Args:
        outlasting: Makes the client, which waits an outage out.
        adapter_column: A column that names each row's model: an adapter or the base.
        outage_s: Longest outage.

    Raises:
        CallerError: the input or the output cannot be used; nothing was sent. Or the input changed
            meanwhile, or every row would fail; what was answered is kept.
        StoreError: an answer cannot be kept, as where the disk is full; those before it are.
        OperationError: the outage was too long; what was answered is kept.
    """
    began = time.monotonic()
    check_options(options)
    table = TableSource(str(source))
    added = added_columns(options)
    column = prompt_column(source, table.columns(), adapter, adapter_column, added)
    schema, num_rows = _checked(table, target), table.num_rows()
    asked = _Asked(column, adapter, adapter_column, options)
    partial = target.with_name(f"{target.name}.partial")
    fingerprint = _fingerprint(source, asked)  # takes long: another call may end meanwhile
    if not partial.exists():
        _check_free(target, overwrite)
    with journal(partial, fingerprint, num_rows) as kept:
        resumed = kept.kept
        if kept.is_sealed(target):
            counts = Counter(failed=num_rows - resumed)
        else:
            _check_free(target, overwrite)
            with progress_bar(source.name, num_rows, resumed, enabled=progress) as bar:
                client = outlasting(Outage(outage_s, bar.wait))
                meaning = Meanings(client, kept)
                if resumed < num_rows:  # nothing is asked of what is no service, or has no adapter
                    await (client.models() if adapter is None else meaning.of(adapter))
                counts = await _answer_rows(client, meaning, table, asked, kept, bar)
            await asyncio.to_thread(_write, table, schema, asked, kept, target)
    return BatchReport(
        rows=num_rows,
        failed=counts["failed"],
        resumed=resumed,
        prompt_tokens=counts["prompt"],
        completion_tokens=counts["completion"],
        seconds=time.monotonic() - began,
    )


def _checked(table: TableSource, target: Path) -> pa.Schema | None:
    """The columns that go from `table` into `target`; None where only JSONL tells its lines'."""
    check_writable(target)
    schema = table.schema()
    if schema is not None:
        schema = plain(schema)
        check_holds(target, schema)
    return schema


def _check_free(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise ConflictError(f"output {target}: exists already; delete it, or allow overwriting")


async def _answer_rows(
    client: AsyncClient,
    meaning: Meanings,
    table: TableSource,
    asked: _Asked,
    kept: Journal,
    bar: Progress,
) -> Counter[str]:
    """Answer the rows that are not `kept` yet, as many at once as the client may ask for; how many
    failed, and their tokens."""
    counts = Counter[str]()
    waiting = ((row, values) for row, values in _numbered(table, asked) if row not in kept)

    async def take(row: int, values: Values) -> GraftError | None:
        result, fault = await _answer(client, meaning, row, values, asked)
        kept.add(result)
        tokens, failed = result.completion_tokens or 0, int(fault is not None)
        counts.update(failed=failed, prompt=result.prompt_tokens or 0, completion=tokens)
        bar.advance(1, tokens, failed)
        return fault

    async def worker() -> None:
        for row, values in waiting:
            await take(row, values)

    if asked.options and not kept.answered:
        await _check_options(take, islice(waiting, _ASKED_FIRST), asked)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(client.concurrency):
                group.create_task(worker())
    except* GraftError as failures:
        raise failures.exceptions[0] from None
    return counts


async def _check_options(
    take: Callable[[int, Values], Awaitable[GraftError | None]],
    rows: Iterable[tuple[int, Values]],
    asked: _Asked,
) -> None:
    """Answer rows one by one until one is answered. Raises the refusal of an option if none is: it
    would fail every row, and of one row alone it may be what is special about that one."""
    refusal: GraftError | None = None
    for row, values in rows:
        fault = await take(row, values)
        if fault is None:
            return
        if _is_of_an_option(fault, asked):
            refusal = fault
    if refusal is not None:
        raise refusal


def _numbered(table: TableSource, asked: _Asked) -> Iterator[tuple[int, Values]]:
    """Every row's number and its values of the columns that matter."""
    names = dict.fromkeys([asked.column, *filter(None, [asked.adapter_column]), *asked.added])
    chunks = (values_of(rows, list(names)) for rows in table.rows(_ROWS_AT_ONCE))
    return enumerate(chain.from_iterable(chunks))


def _write(
    table: TableSource, schema: pa.Schema | None, asked: _Asked, kept: Journal, target: Path
) -> None:
    """The rows of `table`, of a plain `schema` unless they are JSONL, with their results."""
    is_json = target.suffix.lower() in JSONL
    if schema is None and not is_json:
        found = json_schema(partial(table.rows, _ROWS_AT_ONCE))
        schema = pa.schema([field for field in found if field.name not in asked.added])
    added = [pa.field(name, kind) for name, kind in asked.added.items()]
    row = 0
    kind = None if schema is None else pa.schema([*schema, *added])
    with table_file(target, kind, on_whole=kept.seal) as add:
        for rows in table.rows(_ROWS_AT_ONCE):
            results = [kept[row + i] for i in range(len(rows))]
            row += len(rows)
            answers = [(field, [getattr(r, field.name) for r in results]) for field in added]
            if is_json or schema is None:
                names = [] if isinstance(rows, list) else rows.column_names
                add(with_columns(values_of(rows, names), answers))
            else:
                add(with_columns(as_table(rows, schema), answers))


def prompt_column(
    source: object,
    names: Sequence[str],
    adapter: str | None,
    adapter_column: str | None,
    added: Iterable[str],
) -> str:
    """The column of the prompts among the `names` of an input. Raises DataError where that or
    another that is wanted lacks, or one that is added is there already."""
    column = next((name for name in PROMPT_COLUMNS if name in names), None)
    if column is None:
        raise DataError(
            f"data {source}: has no column 'prompt' or 'messages'; it has {', '.join(names)}"
        )
    if adapter is not None and adapter_column is not None:
        raise DataError("give an adapter or an adapter column, not both")
    if adapter_column is not None and adapter_column not in names:
        raise DataError(
            f"data {source}: has no column {adapter_column!r}; it has {', '.join(names)}"
        )
    taken = [name for name in added if name in names]
    if taken:
        raise DataError(f"data {source}: column {taken[0]!r} is one that is added; rename it")
    return column


def check_row(row: int, prompt: Any, model: Any) -> None:
    """Raise DataError for what is no prompt, or no name of a model."""
    if not prompt or not isinstance(prompt, (str, list)):
        raise DataError(f"row {row}: the prompt is empty or no text; fill it")
    if model is not None and not isinstance(model, str):
        raise DataError(f"row {row}: the adapter is {model!r}, not a name")


def check_own(row: int, values: Mapping[str, Any], added: Iterable[str]) -> None:
    """Raise DataError for a row that has what is `added`: of JSONL only the first lines were looked
    at, and another file may have more."""
    taken = [name for name in added if name in values]
    if taken:
        raise DataError(f"row {row}: has a {taken[0]!r} of its own, which is one that is added")


async def _answer(
    client: AsyncClient, meaning: Meanings, row: int, values: Values, asked: _Asked
) -> tuple[RowResult, GraftError | None]:
    """One row's result, whose error is whatever is wrong with it, and that fault. Raises GraftError
    for what is wrong with every row."""
    prompt, model = None, asked.adapter
    try:
        if isinstance(values, BadRow):
            raise DataError(f"row {row}: {values.reason}")
        prompt = values.get(asked.column)
        if asked.adapter_column is not None:
            model = values.get(asked.adapter_column)
        check_own(row, values, asked.added)
        check_row(row, prompt, model)
        assert prompt is not None
        version = await meaning.of(model)
        try:
            answer = await client.generate_one(prompt, adapter=version, **asked.options)  # type: ignore[arg-type]
        except NotFoundError as error:
            for_all = asked.adapter_column is None
            raise meaning.about(error, str(model), str(version), for_all=for_all) from error
    except GraftError as error:
        if _is_of_every_row(error, asked):
            raise
        return RowResult(row, error=str(error)), error
    result = RowResult(
        row, answer.text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens,
        tool_calls=calls_text(answer.tool_calls),
    )  # fmt: skip
    return result, None


def _is_of_every_row(error: GraftError, asked: _Asked) -> bool:
    """Whether each row would fail so: by the service, the key, or the one adapter."""
    if isinstance(error, (*OUTAGES, AuthenticationError)):
        return True
    return asked.adapter_column is None and isinstance(error, (AdapterError, NotFoundError))


def _is_of_an_option(error: GraftError, asked: _Asked) -> bool:
    """Whether it may be an option that is refused, and not what a row has of its own."""
    if not isinstance(error, RequestError) or isinstance(error, ContextLengthError):
        return False
    is_of_adapter = error.param == "adapter_rank" and asked.adapter_column is not None
    return error.param in asked.options and not is_of_adapter


def _fingerprint(source: Path, asked: _Asked) -> str:
    digest = hashlib.sha256(json.dumps(asdict(asked), sort_keys=True, default=list).encode())
    for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if file.is_file():
            with file.open("rb") as handle:
                while chunk := handle.read(2**20):
                    digest.update(chunk)
    return digest.hexdigest()
