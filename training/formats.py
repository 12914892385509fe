"""What a row means: alpaca, prompt/completion, chat messages, plain text; checked cell by cell.

Knows columns and no tokens. Every fault is a DataError that names the file, the row and
the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

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
OPTIONAL = {"alpaca": ("input",), "chat": ("tools",)}
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
        if row_format == "chat":
            # A line of JSON has the keys that it was given; Arrow gives each object those of all.
            given = row if stream.is_open else _without_nulls(row)
            row = _chat_row(given, f"data {stream.path}: row {number}", task)
        else:
            _check_row(row, row_format, number, stream.path)
        yield row


def response_of(row: Mapping[str, Any], row_format: str) -> str:
    """The text of a row that is learned, every turn of it; of a call, the function's name."""
    if row_format == "chat":
        said = [m for m in row["messages"] if m["role"] == "assistant"]
        called = [call["function"]["name"] for m in said for call in m.get("tool_calls", ())]
        return "".join([m["content"] for m in said] + called)
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


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that have none, at any depth: a template that asks whether one is
    there must see what it would see of JSON."""
    if isinstance(value, list):
        return [_without_nulls(part) for part in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    items = cast("dict[str, Any]", value).items()
    return {key: _without_nulls(part) for key, part in items if part is not None}


def _chat_row(row: Mapping[str, Any], where: str, task: Task) -> dict[str, Any]:
    """`row` as templates expect it, and as the service has it rendered: texts for contents, the
    arguments of calls as objects, no key of a message without a value."""
    messages = row.get("messages")
    try:
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list of {role, content}")
        read = [_message(m, place) for place, m in enumerate(cast("list[Any]", messages))]
        if task != "causal_lm" and "tool_calls" in read[-1]:
            raise ValueError(
                f"messages[{len(read) - 1}] calls tools, and task {task} learns its text alone; "
                "drop the row, or take task causal_lm"
            )
        return {"messages": read, "tools": _tools(row.get("tools"))}
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def _message(given: Any, place: int) -> dict[str, Any]:
    message = {key: value for key, value in _object(given).items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise ValueError("messages must be a list of {role, content} texts")
    if message["role"] == "assistant" and message.get("weight") == 0:
        raise ValueError(
            f"messages[{place}].weight is 0, and all that the assistant said is learned; leave the "
            "key out, or cut the row before that message"
        )
    calls = message.pop("tool_calls", None)
    if calls and message["role"] != "assistant":
        raise ValueError(f"messages[{place}] of role {message['role']!r} cannot have tool_calls")
    if calls:
        message["tool_calls"] = _calls(calls, f"messages[{place}].tool_calls")
        message.setdefault("content", "")
    if not isinstance(message.get("content"), str):
        found = type(message.get("content")).__name__
        raise ValueError(
            f"messages[{place}].content holds {found}, not text; only an assistant's message with "
            "tool_calls can do without"
        )
    return message


def _calls(given: Any, field: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: templates write these as JSON themselves."""
    calls: list[dict[str, Any]] = []
    for call in map(_object, given if isinstance(given, list) else [given]):
        function = _object(call.get("function"))
        if not isinstance(function.get("name"), str):
            raise ValueError(f"{field} must be a list of {{type, function: {{name, arguments}}}}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _loaded(arguments, f"{field}: arguments of {function['name']!r}")
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls


def _tools(given: Any) -> list[dict[str, Any]] | None:
    """What the assistant may call; a column of texts has it as JSON. None without any."""
    tools: Any = _loaded(given, "tools") if isinstance(given, str) else given
    if not tools:
        return None
    listed = cast("list[Any]", tools if isinstance(tools, list) else [None])
    if not all(_object(tool) for tool in listed):
        raise ValueError(f"tools must be a list of {{type, function}}, not {str(given)[:80]!r}")
    return listed


def _object(given: Any) -> dict[str, Any]:
    """`given` if it is one, else one without keys."""
    return cast("dict[str, Any]", given) if isinstance(given, dict) else {}


def _loaded(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} are no JSON: {text[:80]!r} ({error}); mend the row") from error


def _check_row(row: dict[str, Any], row_format: str, number: int, path: str | Path) -> None:
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
