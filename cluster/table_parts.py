"""A table of any size in shared storage, cut into parts that are read apart.

A table is a file, or a folder of files in the order of their names: Parquet, JSONL and Arrow, and
on a file system (NFS included) `save_to_disk`; in object storage its Arrow files alone. Where it is
cut follows from the files. Knows file formats, not what the columns mean.

`TableSource.parts` looks at every file and must run before Ray is imported, as in cluster.tables;
who reads a part later finds the very files that were looked at, or is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.arrow_parts import IpcReader, read_batches
from cluster.errors import DataError, NotFoundError
from cluster.names import absolute_uri, local_folder
from cluster.store import Store
from cluster.table_rows import Rows, row_of
from cluster.tables import (
    IPC,
    JSON,
    JSONL,
    PARQUET,
    check_schema,
    column_types,
    faults,
    ipc_slices,
    open_table,
)

_KNOWN = (*IPC, *PARQUET, *JSONL)
_SAVED = "state.json"  # of a save_to_disk folder, which is one table
# A row group is read from its beginning up to a part's end, and a record batch in object storage as
# a whole: cut it into no more parts than this.
_PARTS_OF_GROUP = 16
_LOOKED_AT = 256  # lines of JSONL, for its columns
_COUNTED = 2**16
_BUFFER_BYTES = 2**20  # of each column of Parquet, whose row groups may be large


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one file. `first_row` counts over all files.

    `start` is a row of the file's row group `group` (Parquet), a row of the file (Arrow), or a
    byte (JSONL, of which it takes `num_bytes`). Of Arrow in object storage it is a row of the
    record batches that are `num_bytes` from the byte `group` on.
    """

    file: str
    first_row: int
    num_rows: int
    start: int
    group: int = 0
    num_bytes: int = 0


class TableSource:
    """The table at a local path or a URI. Raises DataError where there is none."""

    def __init__(self, uri: str) -> None:
        whole = absolute_uri(uri)
        local = local_folder(whole)
        if local is not None and not local.exists():
            raise DataError(f"data {whole}: does not exist; check the path")
        suffix, is_folder = Path(whole).suffix.lower(), local is not None and local.is_dir()
        is_file = suffix in (*_KNOWN, *JSON) and not is_folder
        if local is not None and not is_file and not is_folder:
            raise DataError(
                f"data {whole}: unknown kind {suffix!r}; use .arrow, .parquet, .jsonl or a folder"
            )
        folder, _, name = whole.rpartition("/") if is_file else (whole, "", "")
        self.uri = whole
        self._store = Store(folder or "/")
        self._local = self._store.local_path()
        self.files = self._find(name)

    def _find(self, name: str) -> dict[str, str]:
        """Content identities by file: a key below the folder, or "" for a saved dataset."""
        if not name and self._local is not None and (self._local / _SAVED).is_file():
            return {"": self._identity("")}
        names = [name] if name else [k for k in self._store.list() if k.lower().endswith(_KNOWN)]
        # Hidden by the habit of all who read such folders: what begins with "_" or ".".
        names = [k for k in names if not any(part[0] in "_." for part in k.split("/"))] or names[:1]
        if not names:
            raise DataError(f"data {self.uri}: holds no .parquet, .jsonl or .arrow file")
        try:
            return {key: self._identity(key) for key in names}
        except NotFoundError as error:
            raise DataError(f"data {self.uri}: does not exist; check the URI") from error

    def _identity(self, file: str) -> str:
        """Raises NotFoundError."""
        keys = [file]
        if not file and self._local is not None:
            keys = sorted(path.name for path in self._local.iterdir() if path.is_file())
        return " ".join(self._store.identity(key) for key in keys)

    def columns(self) -> list[str]:
        """What every file has; of JSONL, its first lines tell.

        Raises:
            DataError: a file is damaged, or none has a row that can be read.
        """
        found = [names for names in map(self._columns, self.files) if names is not None]
        if not found:
            raise DataError(f"data {self.uri}: has no rows that can be read")
        return [name for name in found[0] if all(name in names for names in found)]

    def schema(self) -> pa.Schema | None:
        """The columns with their types; None of JSONL.

        Raises:
            DataError: a file is damaged, its columns are not those of the others, or only some of
                the files are JSONL.
        """
        are_lines = {_kind(file) == "jsonl" for file in self.files}
        if are_lines == {True}:
            return None
        if len(are_lines) > 1:
            raise DataError(f"data {self.uri}: only some of its files are JSONL; part them")
        found: dict[str, pa.Schema] = {}
        for file in self.files:
            with faults(self._where(file)):
                schema = self._schema(file)
            if schema is None:
                continue
            found[file] = schema
            first, expected = next(iter(found.items()))
            if not schema.equals(expected):
                raise DataError(
                    f"data {self._where(file)}: has columns ({column_types(schema)}), {first} has "
                    f"({column_types(expected)}); write them alike"
                )
        return next(iter(found.values()), None)

    def num_rows(self) -> int:
        """Of all files; raises as `parts`."""
        return sum(part.num_rows for part in self.parts(_COUNTED))

    def rows(self, num_rows: int) -> Iterator[Rows]:
        """All rows in order, at most so many at once, in one pass over each file; what `read` would
        give, and raises as it does."""
        for file in self.files:
            self._check_unchanged(file)
            chunks = self._chunks(file, num_rows)
            while True:
                with faults(self._where(file)):
                    chunk = next(chunks, None)
                if chunk is None:
                    break
                yield chunk

    def parts(self, num_rows: int) -> list[Part]:
        """All rows in order, in parts of about so many.

        Raises:
            DataError: a file is damaged, of an unknown kind, or has an Arrow extension type; or
                there is no row at all.
        """
        parts: list[Part] = []
        first_row = 0
        for file in self.files:
            with faults(self._where(file)):
                for part in self._cut(file, first_row, num_rows):
                    parts.append(part)
                    first_row += part.num_rows
        if not parts:
            raise DataError(f"data {self.uri}: has no rows")
        return parts

    def read(self, part: Part) -> Rows:
        """The rows of one part, as many as it says; a line that is no JSON object is a BadRow.

        Raises:
            DataError: the file is damaged, or has gone or changed since it was looked at.
        """
        self._check_unchanged(part.file)
        with faults(self._where(part.file)):
            if _kind(part.file) == "jsonl":
                raw = self._store.read_range(part.file, part.start, part.num_bytes)
                return [row_of(line) for line in raw.split(b"\n") if line.strip()]
            if _kind(part.file) == "parquet":
                return self._read_parquet(part)
            if self._local is None:
                head = IpcReader(self._store.stream(part.file)).head
                data = self._store.read_range(part.file, part.group, part.num_bytes)
                return read_batches(head, data).slice(part.start, part.num_rows)
            return open_table(self._local / part.file).slice(part.start, part.num_rows)

    def _check_unchanged(self, file: str) -> None:
        try:
            has_changed = self._identity(file) != self.files[file]
        except (KeyError, NotFoundError) as error:
            raise DataError(
                f"data {self._where(file)}: is gone; begin anew with what is there"
            ) from error
        if has_changed:
            raise DataError(
                f"data {self._where(file)}: has changed since it was looked at; begin anew "
                "with another output"
            )

    def _chunks(self, file: str, num_rows: int) -> Iterator[Rows]:
        kind = _kind(file)
        if kind == "jsonl":
            lines = (line for line in _lines(self._store.stream(file)) if line.strip())
            while chunk := list(islice(lines, num_rows)):
                yield [row_of(line) for line in chunk]
        elif kind == "parquet":
            with self._parquet(file) as opened:
                for batch in opened.iter_batches(num_rows):
                    yield pa.Table.from_batches([batch], opened.schema_arrow)
        elif self._local is None:
            for part in self._cut(file, 0, num_rows):
                yield self.read(part)
        else:
            yield from self._slices(self._local, file, num_rows)

    def _slices(self, folder: Path, file: str, num_rows: int) -> Iterator[pa.Table]:
        """Of a local Arrow file, or of a saved dataset."""
        if file:
            for rows in ipc_slices(folder / file, num_rows):
                check_schema(rows.schema, self._where(file))
                yield rows
            return
        table = open_table(folder, may_be_empty=True)
        for start in range(0, table.num_rows, num_rows):
            yield table.slice(start, num_rows)

    def _cut(self, file: str, first_row: int, num_rows: int) -> Iterator[Part]:
        kind = _kind(file)
        if kind == "jsonl":
            yield from _cut_lines(file, self._store.stream(file), first_row, num_rows)
            return
        if kind == "parquet":
            with self._parquet(file) as opened:
                metadata = opened.metadata
            groups = [
                (i, metadata.row_group(i).num_rows, 0) for i in range(metadata.num_row_groups)
            ]
        elif self._local is None:
            groups = _batches(self._ipc(file), num_rows)
        else:
            slices = self._slices(self._local, file, _COUNTED)
            groups = [(0, sum(rows.num_rows for rows in slices), 0)]
        is_mapped = kind == "arrow" and self._local is not None
        for group, rows, num_bytes in groups:
            most = num_rows if is_mapped else max(num_rows, -(-rows // _PARTS_OF_GROUP))
            for start in range(0, rows, most):
                size = min(most, rows - start)
                yield Part(file, first_row, size, start, group, num_bytes)
                first_row += size

    def _columns(self, file: str) -> list[str] | None:
        """None for a file without rows."""
        with faults(self._where(file)):
            if _kind(file) == "jsonl":
                lines = (line for line in _lines(self._store.stream(file)) if line.strip())
                rows = [
                    row for row in map(row_of, islice(lines, _LOOKED_AT)) if isinstance(row, dict)
                ]
                rows = rows or islice(
                    (row for row in map(row_of, lines) if isinstance(row, dict)), 1
                )
                return list(dict.fromkeys(name for row in rows for name in row)) or None
            schema = self._schema(file)
            return None if schema is None else list(schema.names)

    def _schema(self, file: str) -> pa.Schema | None:
        """Of a file that is not JSONL; None for one without rows."""
        if _kind(file) == "parquet":
            with self._parquet(file) as opened:
                return opened.schema_arrow if opened.metadata.num_rows else None
        if self._local is None:
            opened = self._ipc(file)
            return opened.schema if any(batch.num_rows for batch in opened.batches()) else None
        first = next(self._slices(self._local, file, 1), None)
        return None if first is None else first.schema

    def _parquet(self, file: str) -> pq.ParquetFile:
        """Closed by whoever takes it."""
        opened = pq.ParquetFile(self._store.open(file), buffer_size=_BUFFER_BYTES)
        check_schema(opened.schema_arrow, self._where(file))
        return opened

    def _read_parquet(self, part: Part) -> pa.Table:
        """A row group's rows up to the part's end are decoded, a batch at a time."""
        kept: list[pa.RecordBatch] = []
        at, end = 0, part.start + part.num_rows
        with self._parquet(part.file) as opened:
            for batch in opened.iter_batches(part.num_rows, row_groups=[part.group]):
                first, last = max(part.start - at, 0), min(end - at, batch.num_rows)
                if first < last:
                    kept.append(batch.slice(first, last - first))
                at += batch.num_rows
                if at >= end:
                    break
            return pa.Table.from_batches(kept, opened.schema_arrow)

    def _ipc(self, file: str) -> IpcReader:
        opened = IpcReader(self._store.stream(file))
        check_schema(opened.schema, self._where(file))
        return opened

    def _where(self, file: str) -> str:
        return f"{self._store.uri}/{file}" if file else self.uri


def _kind(file: str) -> str:
    suffix = Path(file).suffix.lower()
    return "parquet" if suffix in PARQUET else "jsonl" if suffix in (*JSONL, *JSON) else "arrow"


def _batches(opened: IpcReader, num_rows: int) -> Iterator[tuple[int, int, int]]:
    """Record batches that are read together, with at least so many rows but for the last: the byte
    where they begin, their rows and their bytes."""
    begin = rows = num_bytes = 0
    for batch in opened.batches():
        if not num_bytes:
            begin = batch.start
        # Whatever lies between two batches goes with them.
        rows, num_bytes = rows + batch.num_rows, batch.start + batch.num_bytes - begin
        if rows >= num_rows:
            yield begin, rows, num_bytes
            rows = num_bytes = 0
    if rows:
        yield begin, rows, num_bytes


def _cut_lines(file: str, chunks: Iterator[bytes], first_row: int, num_rows: int) -> Iterator[Part]:
    """JSONL has no index: it is read through once."""
    start = at = rows = 0
    for line in _lines(chunks):
        at += len(line)
        rows += bool(line.strip())
        if rows == num_rows:
            yield Part(file, first_row, rows, start, num_bytes=at - start)
            first_row, start, rows = first_row + rows, at, 0
    if rows:
        yield Part(file, first_row, rows, start, num_bytes=at - start)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines with their ends."""
    rest: list[bytes] = []
    for chunk in chunks:
        *whole, last = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*rest, line, b"\n"])
            rest = []
        if last:
            rest.append(last)
    if rest:
        yield b"".join(rest)
