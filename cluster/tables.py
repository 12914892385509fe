"""Tables in files: `save_to_disk` folders, Arrow IPC, Parquet (also in shards) and JSONL, read with
distrust.

`open_table` gives a whole table, `stream_rows` its rows a few hundred at a time. Knows file
formats, not what the columns mean. Ray must not be imported before a table is read: it registers
Arrow extension types whose loading runs code.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.json
import pyarrow.parquet as pq

from cluster.errors import DataError, StoreError
from cluster.json_lines import json_line, json_object

_STREAM_MAGIC = b"\xff\xff\xff\xff"
IPC = (".arrow", ".ipc", ".feather")
PARQUET = (".parquet", ".pq")
JSONL = (".jsonl", ".ndjson")
JSON = (".json",)  # of a file with JSONL in it
_CHUNK_ROWS = 256  # a row may be a whole document
_GROUP_BYTES = 8 * 2**20  # of a row group that is written from parts
# Of a shard's name, where it tells one.
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=\W|_|$)", re.IGNORECASE)
_Chunk = list[dict[str, Any]]
AddRows = Callable[[pa.Table | Sequence[Mapping[str, Any]]], Any]


def open_table(path: str | Path, *, may_be_empty: bool = False) -> pa.Table:
    """The rows at `path` as one Arrow table, memory-mapped where the format allows.

    Raises:
        DataError: missing, corrupt, of an unknown kind, empty unless it may be, or with an Arrow
            extension type (whose loading may run code).
    """
    path = Path(path)
    with faults(path):
        table = _read(path)
    check_schema(table.schema, path)
    if table.num_rows == 0 and not may_be_empty:
        raise DataError(f"data {path}: has no rows")
    return table


@dataclass(frozen=True)
class RowStream:
    """The rows of a table of any size, read a few hundred at a time. `is_open` tells that rows may
    have columns beyond `columns`: of JSON only the first lines were looked at."""

    path: Path
    columns: tuple[str, ...]
    num_rows: int
    _chunks: Callable[[Sequence[str]], Iterator[_Chunk]]
    is_open: bool = False

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Each row's values of `columns`; None for a key that a line of JSON lacks.

        Raises:
            DataError: corrupt, or text that is not UTF-8; names the rows.
        """
        number = 0
        chunks = self._chunks(columns)
        while True:
            with faults(self.path, from_row=number):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield from chunk
            number += len(chunk)


def stream_rows(path: str | Path) -> RowStream:
    """The rows at `path`, in memory only a few hundred at a time; raises as `open_table`."""
    path = Path(path)
    with faults(path):
        stream = _stream(path)
    if stream.num_rows == 0:
        raise DataError(f"data {path}: has no rows")
    return stream


def check_writable(path: str | Path) -> None:
    """Raise DataError unless `write_table` knows the kind of `path` and its folder exists."""
    path = Path(path)
    if path.suffix.lower() not in (*IPC, *PARQUET, *JSONL):
        raise DataError(
            f"output {path}: unknown kind {path.suffix!r}; use .arrow, .parquet or .jsonl"
        )
    if not path.parent.is_dir():
        raise DataError(f"output {path}: folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"output {path}: folder {path.parent} cannot be written to")


def check_holds(path: str | Path, schema: pa.Schema) -> None:
    """Raise DataError unless a file of the kind of `path` can hold such columns."""
    if Path(path).suffix.lower() not in PARQUET:
        return
    try:
        with pq.ParquetWriter(io.BytesIO(), schema) as out:
            out.write_table(schema.empty_table())
    except pa.ArrowException as error:
        raise DataError(f"output {path}: {error}; use .arrow or .jsonl") from error


def write_table(table: pa.Table, path: str | Path) -> None:
    """Write `table` to `path`, in the format of its suffix; whole or not at all.

    Raises:
        DataError: the folder cannot be written to.
        StoreError: the disk is full.
    """
    with table_file(path, table.schema) as add:
        add(table)


@contextmanager
def table_file(
    path: str | Path,
    schema: pa.Schema | None,
    on_whole: Callable[[Path], None] = lambda _: None,
) -> Generator[AddRows]:
    """What is added, part by part, becomes the file `path` in the format of its suffix: at the end
    of the scope and whole, or not at all. Rows of any keys go into JSONL alone.

    Args:
        schema: Of the tables that are added; JSONL needs none.
        on_whole: Called with the file when nothing is missing from it but its name.

    Raises:
        DataError: the folder cannot be written to.
        StoreError: the disk is full.
    """
    check_writable(path)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _opened(partial, path.suffix.lower(), schema) as add:
            yield add
        on_whole(partial)
        partial.replace(path)
    except OSError as error:
        raise StoreError(
            f"output {path}: cannot be written ({error.strerror or error}); free room there, or "
            "name another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _opened(partial: Path, suffix: str, schema: pa.Schema | None) -> Generator[AddRows]:
    if suffix in JSONL:
        with partial.open("wb") as lines:

            def add(rows: pa.Table | Sequence[Mapping[str, Any]]) -> None:
                if isinstance(rows, Sequence):
                    lines.writelines(map(json_line, rows))
                    return
                for batch in rows.to_batches(max_chunksize=_CHUNK_ROWS):
                    lines.writelines(map(json_line, batch.to_pylist()))

            yield add
    elif suffix in PARQUET:
        with pq.ParquetWriter(partial, schema) as out:
            held: list[pa.Table] = []

            def gather(rows: Any) -> None:
                held.append(rows)
                if sum(table.nbytes for table in held) >= _GROUP_BYTES:
                    out.write_table(pa.concat_tables(held))
                    held.clear()

            yield gather
            if held:
                out.write_table(pa.concat_tables(held))
    else:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
            yield out.write_table


@contextmanager
def faults(path: object, from_row: int | None = None) -> Generator[None]:
    """What reading raises, as DataError; `path` is its place in messages."""
    if isinstance(path, Path) and not path.exists():
        raise DataError(f"data {path}: does not exist; check the path")
    where = "" if from_row is None else f"from row {from_row} on: "
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"data {path}: {where}holds text that is not UTF-8 ({error}); write it anew"
        ) from error
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data {path}: {where}cannot be read: {reason}") from error


def check_schema(schema: pa.Schema, path: object) -> None:
    """Raise DataError for a column whose reading may run code, and for two of one name."""
    names: list[str] = schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"data {path}: two columns are named {twice!r}; rename or drop one of them")
    for field in schema:
        metadata: dict[bytes, bytes] = field.metadata or {}
        if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in metadata:
            raise DataError(
                f"data {path}: column {field.name!r} has an Arrow extension type, which can carry "
                "code; write the column as a plain type"
            )


def _stream(path: Path) -> RowStream:
    suffix = path.suffix.lower()
    if suffix in (*JSONL, *JSON) and path.is_file():
        return _stream_json(path)
    if shards := _shards(path):
        return _stream_parquet(path, shards)
    if suffix in IPC and path.is_file():
        return _stream_ipc(path)
    table = _read(path)  # memory-mapped, all of them
    check_schema(table.schema, path)

    def slices(columns: Sequence[str]) -> Iterator[_Chunk]:
        for batch in table.select(list(columns)).to_batches(max_chunksize=_CHUNK_ROWS):
            yield batch.to_pylist()

    return RowStream(path, tuple(table.column_names), table.num_rows, slices)


def _shards(path: Path) -> list[Path]:
    """A Parquet file, or a folder's, as the Hub has them: train-00000-of-00002.parquet, …; else
    none. Raises ValueError for those of several splits."""
    if path.is_file():
        return [path] if path.suffix.lower() in PARQUET else []
    shards = sorted(path.glob("*.parquet")) if path.is_dir() else []
    named = {match[1] for shard in shards if (match := _SPLIT.match(shard.stem))}
    if len(splits := sorted(named)) > 1:
        raise ValueError(f"holds files of {', '.join(splits)}; put those of each into a folder")
    return shards


def _stream_parquet(path: Path, shards: Sequence[Path]) -> RowStream:
    """One table in one file or several."""
    files = [pq.ParquetFile(shard, memory_map=True) for shard in shards]
    first = files[0].schema_arrow
    for shard, file in zip(shards, files, strict=True):
        check_schema(file.schema_arrow, shard)
        if not file.schema_arrow.equals(first):
            raise ValueError(
                f"{shard.name} has columns ({column_types(file.schema_arrow)}), {shards[0].name} "
                f"has ({column_types(first)}); write them alike"
            )

    def parts(columns: Sequence[str]) -> Iterator[_Chunk]:
        for file in files:
            for batch in file.iter_batches(_CHUNK_ROWS, columns=list(columns)):
                yield batch.to_pylist()

    num_rows = sum(file.metadata.num_rows for file in files)
    return RowStream(path, tuple(first.names), num_rows, parts)


def _stream_ipc(path: Path) -> RowStream:
    """Batch by batch: of a compressed file, one is in memory at a time."""
    schema = _open_ipc(path).schema
    check_schema(schema, path)

    def parts(columns: Sequence[str]) -> Iterator[_Chunk]:
        fields = [schema.get_field_index(name) for name in columns]
        for batch in _batches(_open_ipc(path, fields)):
            for start in range(0, batch.num_rows, _CHUNK_ROWS):
                yield batch.slice(start, _CHUNK_ROWS).to_pylist()

    first = _open_ipc(path, range(len(schema))[:1])
    num_rows = sum(batch.num_rows for batch in _batches(first))
    return RowStream(path, tuple(schema.names), num_rows, parts)


def column_types(schema: pa.Schema) -> str:
    """For messages."""
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _stream_json(path: Path) -> RowStream:
    """Line by line with Python's own reader: Arrow's fixes the types by the first block."""

    def parts() -> Iterator[_Chunk]:
        with path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            while chunk := list(islice(lines, _CHUNK_ROWS)):
                yield [_json_row(number, line) for number, line in chunk]

    def chunks(columns: Sequence[str]) -> Iterator[_Chunk]:
        for rows in parts():
            yield [{column: row.get(column) for column in columns} for row in rows]

    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        if (first := next(lines, b"")).lstrip().startswith(b"["):
            raise ValueError("is a JSON array; write one object a line, as jq -c '.[]' does")
        num_rows = bool(first) + sum(1 for _ in lines)
    names = dict.fromkeys(name for row in next(parts(), []) for name in row)
    return RowStream(path, tuple(names), num_rows, chunks, is_open=True)


def _json_row(number: int, line: bytes) -> dict[str, Any]:
    """A line's object. Raises ValueError that names the line."""
    try:
        row = json_object(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    if rb"\ud" in line.lower():  # JSON can write halves of characters, which are no text
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"line {number}: its text is not UTF-8 ({error.reason})") from error
    return row


def _read(path: Path) -> pa.Table:
    if shards := _shards(path):
        for shard in shards:
            check_schema(pq.read_schema(shard), shard)
        # The columns are those of the files, whatever the folders are called.
        return pq.read_table(shards, memory_map=True, partitioning=None)  # type: ignore[arg-type]
    if path.is_dir():
        return _read_saved_dataset(path)
    suffix = path.suffix.lower()
    if suffix in IPC:
        return _read_ipc(path)
    if suffix in (*JSONL, *JSON):
        return pyarrow.json.read_json(path)
    raise ValueError(f"unknown kind {suffix!r}; use .arrow, .parquet, .jsonl or a dataset folder")


def _read_ipc(path: Path) -> pa.Table:
    return _open_ipc(path).read_all()


def ipc_slices(path: Path, num_rows: int) -> Iterator[pa.Table]:
    """The rows of an Arrow file or stream in order, at most `num_rows` at once; of a compressed one
    a record batch is in memory, and of another one what is read."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for batch in _batches(_ipc_reader(pa.BufferReader(pa.py_buffer(mapped)))):
        for start in range(0, batch.num_rows, num_rows):
            yield pa.Table.from_batches([batch.slice(start, num_rows)])
            # What was read of a mapping counts as this process's memory until it ends.
            mapped.madvise(mmap.MADV_DONTNEED)


def _open_ipc(path: Path, fields: Sequence[int] = ()) -> Any:
    """A reader of either kind, of some of the columns or all; memory-mapped."""
    return _ipc_reader(pa.memory_map(str(path)), fields)


def _ipc_reader(source: Any, fields: Sequence[int] = ()) -> Any:
    is_stream = source.read(4) == _STREAM_MAGIC
    source.seek(0)
    options = pyarrow.ipc.IpcReadOptions(included_fields=list(fields) or None)
    return (pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file)(
        source, options=options
    )


def _batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pyarrow.ipc.RecordBatchFileReader):
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from reader


def _read_saved_dataset(path: Path) -> pa.Table:
    if (path / "dataset_dict.json").exists():
        raise ValueError("holds several splits; name one, for example " + str(path / "train"))
    if not (path / "state.json").exists():
        raise ValueError("is no folder that datasets' save_to_disk wrote (no state.json)")
    from datasets import load_from_disk

    dataset: Any = load_from_disk(str(path)).with_format("arrow")
    return dataset[:]
