"""Arrow's IPC formats in object storage: where a file's record batches lie, and reading some.

A stream is a sequence of messages: the schema, dictionaries, record batches; a file has the same
ones between its magic and an index. pyarrow tells a batch's rows with all of its data alone, so the
few bytes of metadata that have their number are read here.
https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import ipc

_MAGIC = b"ARROW1\0\0"
_CONTINUED = b"\xff\xff\xff\xff"
_END = _CONTINUED + bytes(4)
_DICTIONARY, _BATCH = 2, 3  # of the kinds of header
_MAX_METADATA_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Batch:
    """A record batch: its place in the file in bytes, and its rows."""

    start: int
    num_bytes: int
    num_rows: int


class IpcReader:
    """Goes through a file once, whose bytes come in `chunks`.

    Attributes:
        head: The messages in front of the first batch, which every batch needs.
        schema: Of the table.

    Raises:
        ValueError: it is damaged, or of a kind that is not read in parts.
        pyarrow.ArrowException: it is damaged.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left, self._at = chunks, b"", 0
        begin = self._take(8)
        self._is_file = begin == _MAGIC
        if self._is_file:
            begin = self._take(8)
        self._next = self._message(begin)
        self.head = b""
        while self._next is not None and self._next[0] != _BATCH:
            self.head += self._next[1] + self._take(self._next[2])
            self._next = self._message(self._take(8))
        self.schema = ipc.open_stream(self.head + _END).schema

    def batches(self) -> Iterator[Batch]:
        """Each record batch, in order; once."""
        while self._next is not None:
            kind, metadata, body_bytes, num_rows = self._next
            if kind == _DICTIONARY:
                raise ValueError("has dictionaries that change; write Parquet or JSONL")
            if kind == _BATCH:
                size = len(metadata) + body_bytes
                yield Batch(self._at - len(metadata), size, num_rows)
            self._skip(body_bytes)
            self._next = self._message(self._take(8))

    def _message(self, begin: bytes) -> tuple[int, bytes, int, int] | None:
        """Kind, bytes of its metadata, bytes of its body and rows; None at the end."""
        if begin == _END or (not begin and not self._is_file):
            return None
        if not begin:
            raise ValueError("ends before its last batch")
        if len(begin) < 8 or begin[:4] != _CONTINUED:
            raise ValueError("is no Arrow file, or an old one; write it anew")
        (size,) = struct.unpack_from("<i", begin, 4)
        if not 0 < size <= _MAX_METADATA_BYTES:
            raise ValueError(f"has a message with {size:,} bytes of metadata")
        metadata = self._take(size)
        try:
            return _described(begin + metadata)
        except (struct.error, IndexError) as error:
            raise ValueError("has a message that ends too early") from error

    def _take(self, size: int) -> bytes:
        """The next bytes; fewer at the end."""
        while len(self._left) < size and (chunk := next(self._chunks, b"")):
            self._left += chunk
        taken, self._left = self._left[:size], self._left[size:]
        self._at += len(taken)
        return taken

    def _skip(self, size: int) -> None:
        self._at += size
        while size > len(self._left):
            size -= len(self._left)
            self._left = next(self._chunks, b"")
            if not self._left:
                raise ValueError("ends within a record batch")
        self._left = self._left[size:]


def read_batches(head: bytes, data: bytes) -> pa.Table:
    """The rows of consecutive batches; `head` is `IpcReader.head` of their file."""
    return ipc.open_stream(head + data + _END).read_all()


def _described(metadata: bytes) -> tuple[int, bytes, int, int]:
    """As `_message`, of the flatbuffer `Message` behind eight bytes of prefix. Raises
    struct.error."""
    table = 8 + struct.unpack_from("<I", metadata, 8)[0]
    kind_at, header_at, body_at = (_field(metadata, table, place) for place in (1, 2, 3))
    kind = metadata[kind_at] if kind_at else 0
    (body_bytes,) = struct.unpack_from("<q", metadata, body_at) if body_at else (0,)
    num_rows = 0
    if kind == _BATCH and header_at:
        header = header_at + struct.unpack_from("<I", metadata, header_at)[0]
        rows_at = _field(metadata, header, 0)
        (num_rows,) = struct.unpack_from("<q", metadata, rows_at) if rows_at else (0,)
    if body_bytes < 0 or num_rows < 0:
        raise struct.error
    return kind, metadata, body_bytes, num_rows


def _field(buffer: bytes, table: int, place: int) -> int:
    """Where a flatbuffer's table has its field; 0 if it has the default."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    (size,) = struct.unpack_from("<H", buffer, vtable)
    if 4 + 2 * place >= size:
        return 0
    (offset,) = struct.unpack_from("<H", buffer, vtable + 4 + 2 * place)
    return table + offset if offset else 0
