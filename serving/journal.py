"""The answers that a call has so far, by row, in a file that outlives it.

A line of JSON for each answer, behind one that tells what was asked, and for what each model's name
means; the last one tells which file has them all, before that file has its name. It is of one call
alone while that runs; in memory is where each row's line begins, eight bytes a row, and each name.
"""

from __future__ import annotations

import fcntl
import json
import os
from array import array
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from cluster.errors import ConflictError, StoreError

_NONE = -1
_OUTPUT, _MODEL = "output", "model"


@dataclass(frozen=True)
class RowResult:
    """What is added to one row, by its number."""

    row: int
    completion: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    tool_calls: str | None = None  # as JSON


class Journal:
    """Answers by row. `kept` are those of calls before, which were interrupted, `answered` those of
    this one too; rows with an error are not among them, and are tried again. `meanings` are the
    versions that models' names stand for.

    Raises:
        StoreError: the file cannot be written, as where the disk is full.
    """

    def __init__(self, file: BinaryIO, path: Path, fingerprint: str, num_rows: int) -> None:
        self._file, self.path = file, path
        self._begins = array("q", [_NONE]) * num_rows
        self.answered = 0
        self.meanings: dict[str, str] = {}
        self._output: list[int] | None = None
        self._read(fingerprint)
        self.kept = self.answered

    def __contains__(self, row: int) -> bool:
        return self._begins[row] != _NONE

    def __getitem__(self, row: int) -> RowResult:
        self._file.seek(self._begins[row])
        return RowResult(**json.loads(self._file.readline()))

    def add(self, result: RowResult) -> None:
        """Keep it, whatever becomes of this process."""
        self._begins[result.row] = self._write(json.dumps(asdict(result)))
        self.answered += result.error is None

    def add_meaning(self, name: str, version: str) -> None:
        """Keep what a name stands for, in this call and those that go on with it."""
        self._write(json.dumps({_MODEL: name, "means": version}))
        self.meanings[name] = version

    @property
    def is_of_use(self) -> bool:
        """Whether a call that is repeated has anything of it."""
        return bool(self.answered or self._output)

    def seal(self, output: Path) -> None:
        """Keep that the file `output`, which may get another name, has every row's answer."""
        self._output = _identity(output)
        self._write(json.dumps({_OUTPUT: self._output}))

    def is_sealed(self, output: Path) -> bool:
        """Whether a call before wrote `output`, whole, and was killed before it could say so."""
        return self._output is not None and output.exists() and self._output == _identity(output)

    def _write(self, line: str) -> int:
        with _faults(self.path):
            begin = self._file.seek(0, os.SEEK_END)
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        return begin

    def _read(self, fingerprint: str) -> None:
        """What is there already; begins the file if it is empty. Raises ConflictError,
        StoreError."""
        end = self._file.seek(0)
        lines = iter(self._file.readline, b"")
        try:
            for i, line in enumerate(lines):
                if not line.endswith(b"\n"):  # cut short
                    break
                values = json.loads(line)
                if i == 0:
                    self._check(values["fingerprint"], fingerprint)
                elif _OUTPUT in values:
                    self._output = values[_OUTPUT]
                elif _MODEL in values:
                    self.meanings[values[_MODEL]] = values["means"]
                else:
                    self._keep(RowResult(**values), end)
                end += len(line)
        except (ValueError, LookupError, TypeError) as error:
            raise ConflictError(f"{self.path}: is not a journal of ours; delete it") from error
        with _faults(self.path):
            self._file.truncate(end)
        if not end:
            self._write(json.dumps({"fingerprint": fingerprint}))

    def _keep(self, result: RowResult, begin: int) -> None:
        if result.row < 0:
            raise IndexError(result.row)
        if result.error is None:
            self._begins[result.row] = begin
            self.answered += 1

    def _check(self, found: str, fingerprint: str) -> None:
        if found != fingerprint:
            raise ConflictError(
                f"{self.path}: was left by an interrupted call with another input or other "
                "options; repeat that call, or delete the file"
            )


def _identity(file: Path) -> list[int]:
    """What a file keeps under another name, and no other there has."""
    found = file.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns]


@contextmanager
def _faults(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written ({error.strerror}), and every answer is kept there first; "
            "see that there is room and the right to write, and repeat the call, which goes on "
            "from what is there"
        ) from error


@contextmanager
def journal(path: Path, fingerprint: str, num_rows: int) -> Generator[Journal]:
    """The journal at `path`, held for this call alone; gone where the scope ends well, or before
    the first answer: a call with another adapter or other options may then follow.

    Raises:
        ConflictError: another call writes it now, or it is of another input or other options.
        StoreError: it cannot be written.
    """
    with _faults(path):
        file = path.open("a+b")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConflictError(
                f"{path}: another call is writing this output now; wait for it, or choose another"
            ) from error
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise ConflictError(f"{path}: another call has just written this output; look at it")
        kept = Journal(file, path, fingerprint, num_rows)
        try:
            yield kept
        except BaseException:
            if not kept.is_of_use:
                path.unlink(missing_ok=True)
            raise
        path.unlink()
    finally:
        with suppress(OSError):  # it tries again to write what was told of already
            file.close()
