"""What a row means: alpaca, prompt/completion, chat messages, plain text; checked cell by cell.

Knows columns, no tokens and no files. Every fault is a DataError that names the file, the row and
the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.errors import DataError

# format -> required columns; the first whose columns are all there is what `auto` takes.
COLUMNS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL = {"alpaca": ("input",)}
_BATCH_ROWS = 4096


def detect_format(table: pa.Table, asked: str, path: str | Path) -> str:
    """The row format, `asked` or told by the columns. Raises DataError naming what is missing."""
    names = table.column_names
    if asked != "auto":
        missing = [column for column in COLUMNS[asked] if column not in names]
        if missing:
            raise DataError(
                f"data {path}: format {asked!r} needs column {missing[0]!r}; "
                f"the file has {', '.join(names)}"
            )
        return asked
    for name, columns in COLUMNS.items():
        if set(columns) <= set(names):
            return name
    raise DataError(
        f"data {path}: columns {', '.join(names)} fit no known format; rename them to "
        "instruction/input/output, prompt/completion, messages or text"
    )


def iterate_rows(table: pa.Table, row_format: str, path: str | Path) -> Iterator[dict[str, Any]]:
    """Each row as plain Python values, its cells checked."""
    wanted = [*COLUMNS[row_format]]
    wanted += [c for c in OPTIONAL.get(row_format, ()) if c in table.column_names]
    number = 0
    for batch in table.select(wanted).to_batches(max_chunksize=_BATCH_ROWS):
        try:
            rows: Sequence[dict[str, Any]] = batch.to_pylist()
        except (UnicodeDecodeError, pa.ArrowException) as error:
            raise DataError(
                f"data {path}: rows {number} to {number + batch.num_rows - 1} hold text that is "
                f"not UTF-8 ({error}); write them anew"
            ) from error
        for row in rows:
            _check_row(row, row_format, number, path)
            yield row
            number += 1


def _check_row(row: dict[str, Any], row_format: str, number: int, path: str | Path) -> None:
    if row_format == "chat":
        messages = row["messages"]
        sound = isinstance(messages, list) and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        )
        if not sound or not messages:
            raise DataError(
                f"data {path}: row {number}: messages must be a list of {{role, content}} texts"
            )
        return
    optional = OPTIONAL.get(row_format, ())
    for column, value in row.items():
        if not isinstance(value, str) and not (value is None and column in optional):
            raise DataError(
                f"data {path}: row {number}: column {column!r} holds "
                f"{type(value).__name__}, not text; fill or drop the row"
            )
