"""Tables in files: `save_to_disk` folders, Arrow IPC, Parquet and JSONL, read with distrust.

Knows file formats, not what the columns mean. Ray must not be imported before a table is read: it
registers Arrow extension types whose loading runs code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.json
import pyarrow.parquet as pq

from cluster.errors import DataError

_STREAM_MAGIC = b"\xff\xff\xff\xff"
_IPC = (".arrow", ".ipc", ".feather")
_PARQUET = (".parquet", ".pq")
_JSONL = (".jsonl", ".ndjson")
_JSONL_ROWS = 4096


def open_table(path: str | Path) -> pa.Table:
    """The rows at `path` as one Arrow table, memory-mapped where the format allows.

    Raises:
        DataError: missing, corrupt, of an unknown kind, empty, or with an Arrow extension type
            (whose loading may run code).
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"data {path}: does not exist; check the path")
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


def check_writable(path: str | Path) -> None:
    """Raise DataError unless `write_table` knows the kind of `path` and its folder exists."""
    path = Path(path)
    if path.suffix.lower() not in (*_IPC, *_PARQUET, *_JSONL):
        raise DataError(
            f"output {path}: unknown kind {path.suffix!r}; use .arrow, .parquet or .jsonl"
        )
    if not path.parent.is_dir():
        raise DataError(f"output {path}: folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"output {path}: folder {path.parent} cannot be written to")


def write_table(table: pa.Table, path: str | Path) -> None:
    """Write `table` to `path`, in the format of its suffix; whole or not at all.

    Raises:
        DataError: the folder cannot be written to, or the disk is full.
    """
    check_writable(path)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix.lower() in _PARQUET:
            pq.write_table(table, partial)
        elif path.suffix.lower() in _JSONL:
            with partial.open("w", encoding="utf-8") as lines:
                for batch in table.to_batches(max_chunksize=_JSONL_ROWS):
                    for row in batch.to_pylist():
                        lines.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        else:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
                out.write_table(table)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"output {path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> pa.Table:
    if path.is_dir():
        return _read_saved_dataset(path)
    suffix = path.suffix.lower()
    if suffix in _IPC:
        return _read_ipc(path)
    if suffix in _PARQUET:
        return pq.read_table(path, memory_map=True)
    if suffix in (*_JSONL, ".json"):
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
