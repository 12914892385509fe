"""Rows from files: `save_to_disk` folders, Arrow IPC, Parquet and JSONL, checked column by column.

Knows file formats and what an alpaca, prompt/completion, chat or text row is; no tokens. Every
fault is a DataError that names the file, the row and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.json
import pyarrow.parquet as pq

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
_STREAM_MAGIC = b"\xff\xff\xff\xff"


def open_table(path: str | Path) -> pa.Table:
    """The rows at `path` as one Arrow table, memory-mapped where the format allows.

    Raises:
        DataError: missing, corrupt, of an unknown kind, empty, or with an Arrow extension type
            (whose loading may run code).
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"data {path}: does not exist; check data.train")
    try:
        table = _read(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data {path}: cannot be read: {reason}") from error
    for field in table.schema:
        metadata: dict[bytes, bytes] = field.metadata or {}
        if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in metadata:
            raise DataError(
                f"data {path}: column {field.name!r} has an Arrow extension type, which can carry "
                "code; write the column as a plain type"
            )
    if table.num_rows == 0:
        raise DataError(f"data {path}: has no rows")
    return table


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


def _read(path: Path) -> pa.Table:
    if path.is_dir():
        return _read_saved_dataset(path)
    suffix = path.suffix.lower()
    if suffix in (".arrow", ".ipc", ".feather"):
        return _read_ipc(path)
    if suffix in (".parquet", ".pq"):
        return pq.read_table(path, memory_map=True)
    if suffix in (".jsonl", ".ndjson", ".json"):
        return pyarrow.json.read_json(path)
    raise ValueError(f"unknown kind {suffix!r}; use .arrow, .parquet, .jsonl or a dataset folder")


def _read_ipc(path: Path) -> pa.Table:
    source = pa.memory_map(str(path))
    if source.read(4) == _STREAM_MAGIC:
        source.seek(0)
        return pyarrow.ipc.open_stream(source).read_all()
    source.seek(0)
    return pyarrow.ipc.open_file(source).read_all()


def _read_saved_dataset(path: Path) -> pa.Table:
    if (path / "dataset_dict.json").exists():
        raise ValueError("holds several splits; name one, for example " + str(path / "train"))
    if not (path / "state.json").exists():
        raise ValueError("is not a folder that datasets' save_to_disk wrote (no state.json)")
    from datasets import load_from_disk

    dataset: Any = load_from_disk(str(path)).with_format("arrow")
    return dataset[:]


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
