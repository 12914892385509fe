"""What a row means: alpaca, prompt/completion, chat messages, plain text; checked cell by cell.

Knows columns and no tokens. Every fault is a DataError that names the file, the row and
the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from cluster.tables import RowStream
from cluster.tasks import Task

# format -> required columns; the first whose columns are all there is what `auto` takes.
COLUMNS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL = {"alpaca": ("input",)}
LABEL = "label"  # the column beside `text` that names a row's class, or its number


def columns_of(row_format: str, task: Task) -> tuple[str, ...]:
    """The columns that rows of a format must have."""
    is_labelled = row_format == "text" and task == "sequence_classification"
    return (*COLUMNS[row_format], LABEL) if is_labelled else COLUMNS[row_format]


def detect_format(stream: RowStream, asked: str, task: Task = "causal_lm") -> str:
    """The row format, `asked` or told by the columns. Raises DataError naming what is missing."""
    names, path = stream.columns, stream.path
    if asked != "auto":
        missing = [column for column in columns_of(asked, task) if column not in names]
        if missing:
            raise DataError(
                f"data {path}: format {asked!r} needs column {missing[0]!r}; "
                f"the file has {', '.join(names)}"
            )
        return asked
    for name in COLUMNS:
        if set(columns_of(name, task)) <= set(names) and not (
            name == "text" and task == "seq_2_seq_lm"
        ):
            return name
    text = {"causal_lm": " or text", "sequence_classification": " or text/label"}.get(task, "")
    raise DataError(
        f"data {path}: columns {', '.join(names)} fit no known format; rename them to "
        f"instruction/input/output, prompt/completion, messages{text}"
    )


def iterate_rows(
    stream: RowStream, row_format: str, task: Task = "causal_lm"
) -> Iterator[dict[str, Any]]:
    """Each row as plain Python values, its cells checked."""
    wanted = [*columns_of(row_format, task)]
    wanted += [c for c in OPTIONAL.get(row_format, ()) if stream.is_open or c in stream.columns]
    for number, row in enumerate(stream.rows(wanted)):
        _check_row(row, row_format, number, stream.path)
        yield row


def response_of(row: Mapping[str, Any], row_format: str) -> str:
    """The text of a row that is learned, every turn of it."""
    if row_format == "chat":
        return "".join(m["content"] for m in row["messages"] if m["role"] == "assistant")
    return row[{"alpaca": "output", "prompt_completion": "completion", "text": "text"}[row_format]]


def label_of(row: Mapping[str, Any], row_format: str) -> str | int | None:
    """What a row says of its class: the name or number in its label column, or the name that its
    response is; None where there is none."""
    found = row[LABEL] if row_format == "text" else answer_of(row, row_format)
    if isinstance(found, bool):
        return str(found).lower()
    return (found.strip() or None) if isinstance(found, str) else found


def answer_of(row: Mapping[str, Any], row_format: str) -> str:
    """The text that follows a row's prompt: of a chat, its last turn alone."""
    return row["messages"][-1]["content"] if row_format == "chat" else response_of(row, row_format)


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
        # Arrow gives each turn the keys of all; a template that asks whether one is there must see
        # what it would see of JSON.
        row["messages"] = [{k: v for k, v in m.items() if v is not None} for m in messages]
        return
    optional = OPTIONAL.get(row_format, ())
    for column, value in row.items():
        if column == LABEL and (value is None or isinstance(value, (int, str))):
            continue
        if not isinstance(value, str) and not (value is None and column in optional):
            raise DataError(
                f"data {path}: row {number}: column {column!r} holds {type(value).__name__}, not "
                + ("a name or a whole number" if column == LABEL else "text")
                + "; fill or drop the row"
            )
