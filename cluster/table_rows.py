"""Rows that were read with distrust: which are bad, and how they are written with more columns.

Rows of a typed table stay an Arrow table. Those of JSONL, whose keys and types may differ by line,
are a list; for a file of a typed kind `json_schema` finds types that hold them all.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.json_lines import json_line, json_object


@dataclass(frozen=True)
class BadRow:
    """Stands for a row that cannot be read, or cannot be taken; `reason` says why."""

    reason: str


Row = dict[str, Any] | BadRow
Added = Sequence[tuple[pa.Field, list[Any]]]
Rows = pa.Table | list[Row]  # a list of JSONL, whose keys and types may differ by line
# What reading a value raises that Arrow holds and Python cannot.
_UNREADABLE = (pa.ArrowException, ValueError, OverflowError)


def values_of(rows: Rows, columns: Sequence[str]) -> list[Row]:
    """Each row's values of those `columns` that a table has; a row with one that cannot be read, as
    text that is not UTF-8, is a BadRow. Rows of JSONL are given as they are."""
    if isinstance(rows, list):
        return rows
    chosen = rows.select([name for name in columns if name in rows.column_names])
    try:
        return chosen.to_pylist()
    except _UNREADABLE:  # in some row: which, only reading them apart tells
        return [_decoded(chosen.slice(i, 1)) for i in range(chosen.num_rows)]


def encoded(rows: Rows, added: Added) -> tuple[str, bytes]:
    """A file of `with_columns` of these: the suffix of its name and its bytes. JSONL stays JSONL,
    everything else becomes Parquet."""
    whole = with_columns(rows, added)
    if isinstance(whole, list):
        return ".jsonl", b"".join(map(json_line, whole))
    sink = io.BytesIO()
    pq.write_table(whole, sink)
    return ".parquet", sink.getvalue()


def with_columns(rows: Rows, added: Added) -> pa.Table | list[dict[str, Any]]:
    """`rows` with columns added, in place of those of the same name; a BadRow has only these."""
    if isinstance(rows, list):
        answers = [{field.name: values[i] for field, values in added} for i in range(len(rows))]
        pairs = zip(rows, answers, strict=True)
        return [answer if isinstance(row, BadRow) else {**row, **answer} for row, answer in pairs]
    table: Any = rows
    taken = [field.name for field, _ in added if field.name in table.column_names]
    table = table.drop_columns(taken)
    for field, values in added:
        table = table.append_column(field, pa.array(values, field.type))
    return table


def json_schema(read: Callable[[], Iterable[Rows]]) -> pa.Schema:
    """Types that hold every row of JSONL which `read` gives, again at each call; a column whose
    values have none in common, or none of Arrow's, is text. Looks at a part at a time."""
    types: dict[str, pa.DataType] = {}
    for rows in read():
        for name, values in _by_column(rows).items():
            found = _type_of(values)
            types[name] = _common(types[name], found) if name in types else found
    # A number may be too large for the type that others have brought.
    for rows in read():
        for name, values in _by_column(rows).items():
            if not _fits(values, types[name]):
                types[name] = pa.string()
    hollow = [name for name, kind in types.items() if pa.types.is_null(kind) or _is_hollow(kind)]
    return pa.schema(types | dict.fromkeys(hollow, pa.string()))


def plain(schema: pa.Schema) -> pa.Schema:
    """`schema` with dictionaries' values in their place: an Arrow file has one for all its rows."""
    return pa.schema([pa.field(field.name, _plain(field.type)) for field in schema])


def as_table(rows: Rows, schema: pa.Schema) -> pa.Table:
    """Rows of JSONL by a `json_schema`, or a table by its `plain` one; a BadRow has no values."""
    if not isinstance(rows, list):
        return rows.select(schema.names).cast(schema)
    values = [{} if isinstance(row, BadRow) else row for row in rows]
    columns = [_array([row.get(field.name) for row in values], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _plain(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.DictionaryType):
        return kind.value_type
    if isinstance(kind, pa.StructType):
        return pa.struct([pa.field(field.name, _plain(field.type)) for field in kind])
    if isinstance(kind, pa.ListType):
        return pa.list_(_plain(kind.value_type))
    return kind


def _is_hollow(kind: pa.DataType) -> bool:
    """Whether there is an object without keys in it, which Parquet has no form for."""
    if isinstance(kind, pa.StructType):
        return not kind.num_fields or any(_is_hollow(field.type) for field in kind)
    return isinstance(kind, pa.ListType) and _is_hollow(kind.value_type)


def _by_column(rows: Iterable[Row]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in () if isinstance(row, BadRow) else row.items():
            columns.setdefault(name, []).append(value)
    return columns


_UNFIT = (*_UNREADABLE, TypeError)


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except _UNFIT:
        return pa.string()


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    schemas = [pa.schema({"": kind}) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except _UNFIT:
        return pa.string()


def _fits(values: list[Any], kind: pa.DataType) -> bool:
    try:
        pa.array(values, kind)
    except _UNFIT:
        return False
    return True


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except _UNFIT:
        return pa.array([None if value is None else _text(value) for value in values], pa.string())


def _text(value: Any) -> str:
    if isinstance(value, str) and value.isascii():
        return value
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return value if isinstance(value, str) else text


def row_of(line: bytes) -> Row:
    """Of a line of JSONL; a BadRow for what is no JSON object."""
    try:
        return json_object(line)
    except ValueError as error:
        return BadRow(str(error))


def _decoded(row: pa.Table) -> Row:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow(f"its text is not UTF-8 ({error}); write it anew")
    except _UNREADABLE as error:
        return BadRow(f"has a value that cannot be read ({error}); write it anew")
