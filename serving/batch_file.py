"""A file of prompts to a file of answers, that loses nothing on the way.

The input has a column `prompt` (text) or `messages` (a chat), in any format of cluster.tables.
The output has its rows, in their order, with `completion`, `finish_reason`, `prompt_tokens`,
`completion_tokens` and `error` added; a row that cannot be answered has its reason there and
disturbs no other. Answers are kept in OUT.partial as they come, so that the same call after an
interruption asks only for what is missing; OUT itself appears whole, at the end.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from cluster.errors import ConflictError, DataError, GraftError
from cluster.tables import check_writable, open_table, write_table

if TYPE_CHECKING:
    from serving.client import AsyncClient

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
class RowResult:
    """What is added to one row, by its number."""

    row: int
    completion: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


async def run_batch(
    client: AsyncClient,
    source: Path,
    target: Path,
    *,
    adapter: str | None,
    adapter_column: str | None,
    overwrite: bool,
    progress: bool,
    options: Mapping[str, Any],
) -> BatchReport:
    """Answer every row of `source` into `target`.

    Args:
        adapter_column: A column that names each row's model: an adapter or the base.

    Raises:
        CallerError: the input or the output cannot be used; nothing was sent.
    """
    table, column = _checked(source, target, adapter, adapter_column, overwrite)
    asked = {"adapter": adapter, "adapter_column": adapter_column, "options": dict(options)}
    journal = target.with_name(f"{target.name}.partial")
    file, done = _open_journal(journal, _fingerprint(source, asked))
    resumed = len(done)
    began = time.monotonic()
    prompts, models = table[column], table[adapter_column] if adapter_column else None
    waiting = iter([row for row in range(table.num_rows) if row not in done])

    async def worker(file: TextIO, advance: Advance) -> None:
        for row in waiting:
            model = adapter if models is None else models[row]
            result = await _answer(client, row, prompts[row], model, options)
            done[row] = result
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            advance(1, result.completion_tokens or 0, int(result.error is not None))

    with file, progress_bar(source.name, table.num_rows, resumed, enabled=progress) as advance:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(client.concurrency, table.num_rows - resumed)):
                group.create_task(worker(file, advance))
    results = [done[row] for row in range(table.num_rows)]
    await asyncio.to_thread(write_table, _with_answers(table, results), target)
    journal.unlink()
    fresh = list(done.values())[resumed:]
    return BatchReport(
        rows=table.num_rows,
        failed=sum(result.error is not None for result in results),
        resumed=resumed,
        prompt_tokens=sum(result.prompt_tokens or 0 for result in fresh),
        completion_tokens=sum(result.completion_tokens or 0 for result in fresh),
        seconds=time.monotonic() - began,
    )


def _with_answers(table: pa.Table, results: list[RowResult]) -> pa.Table:
    """`table` with the columns of ADDED."""
    for name, kind in ADDED.items():
        table = table.append_column(name, pa.array([getattr(r, name) for r in results], kind))
    return table


def _checked(
    source: Path, target: Path, adapter: str | None, adapter_column: str | None, overwrite: bool
) -> tuple[pa.Table, str]:
    """The input and the name of its prompt column."""
    table = open_table(source)
    column = prompt_column(source, table.column_names, adapter, adapter_column, ADDED)
    check_writable(target)
    if target.exists() and not overwrite:
        raise ConflictError(f"output {target}: exists already; delete it, or allow overwriting")
    return table, column


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


async def _answer(
    client: AsyncClient, row: int, cell: Any, model: Any, options: Mapping[str, Any]
) -> RowResult:
    """One row's result; whatever is wrong with it becomes its error."""
    try:
        prompt: Any = cell.as_py()
        model = model.as_py() if isinstance(model, pa.Scalar) else model
        check_row(row, prompt, model)
        answer = await client.generate_one(prompt, adapter=model, **options)  # type: ignore[arg-type]
    # What Arrow holds and Python cannot: text that is not UTF-8, times beyond its years.
    except (GraftError, pa.ArrowException, ValueError, OverflowError) as error:
        return RowResult(row, error=str(error))
    return RowResult(
        row, answer.text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens
    )


def _fingerprint(source: Path, asked: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=list).encode())
    for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if file.is_file():
            with file.open("rb") as handle:
                while chunk := handle.read(2**20):
                    digest.update(chunk)
    return digest.hexdigest()


def _open_journal(path: Path, fingerprint: str) -> tuple[TextIO, dict[int, RowResult]]:
    """The journal, held for this call alone until it is closed, and what it has.

    Raises:
        ConflictError: another call writes it now, or it is of another input or other options.
    """
    file = path.open("a", encoding="utf-8")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConflictError(
                f"{path}: another call is writing this output now; wait for it, or choose another"
            ) from error
        return file, _read_journal(path, fingerprint)
    except ConflictError:
        file.close()
        raise


def _read_journal(path: Path, fingerprint: str) -> dict[int, RowResult]:
    """Answers of an interrupted call; errors are tried again. Begins the journal if there is none.

    Raises:
        ConflictError: the journal is of another input or other options.
    """
    if not path.stat().st_size:
        path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
        return {}
    whole = path.read_bytes()
    lines = whole[: whole.rfind(b"\n") + 1].splitlines()  # a last line may be cut short
    try:
        found = json.loads(lines[0])["fingerprint"] if lines else None
        rows = [RowResult(**json.loads(line)) for line in lines[1:]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConflictError(f"{path}: is not a journal of ours; delete it") from error
    if found != fingerprint:
        raise ConflictError(
            f"{path}: was left by an interrupted call with another input or other options; "
            "repeat that call, or delete the file"
        )
    path.write_bytes(whole[: whole.rfind(b"\n") + 1])
    return {row.row: row for row in rows if row.error is None}


Advance = Callable[[int, int, int], None]  # rows, tokens of their answers, failed rows


@contextmanager
def progress_bar(what: str, rows: int, resumed: int, *, enabled: bool) -> Generator[Advance]:
    """A bar on stderr; yields what is told of each lot of rows that are done."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )
    began = time.monotonic()
    tokens = failed = 0

    def advance(new_rows: int, new_tokens: int, new_failed: int) -> None:
        nonlocal tokens, failed
        tokens, failed = tokens + new_tokens, failed + new_failed
        speed = tokens / max(time.monotonic() - began, 1e-9)
        told = f"{speed:,.0f} tokens/s" + (f", {failed:,} failed" if failed else "")
        bar.update(task, advance=new_rows, told=told)

    with bar:
        task = bar.add_task(what, total=rows, completed=resumed, told="")
        yield advance
