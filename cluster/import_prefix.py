"""The folders below imports/ of a store, listed and read with distrust, for cluster.imports.

Whoever may put a folder there chooses its name, and by it who may ask for the adapter. On a file
system no link is therefore followed: it could stand for a folder that its maker may not read, or
lead a listing through the whole disk. Object stores have no links.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import AdapterError, StoreError
from cluster.store import Store, storage_faults

PREFIX = "imports"
_KEY = re.compile(rf"{PREFIX}/([^/]+)/([^/]+)")
_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Mark:
    """What the storage says of one file: another text whenever its bytes may be others."""

    text: str
    num_bytes: int
    is_link: bool = False


# By file. A folder that is itself a link has one entry, "", and so has one that cannot be listed:
# its mark says why.
Folder = dict[str, Mark]


def folders(store: Store) -> dict[str, Folder]:
    """The folders of the prefix by name. Raises StoreError."""
    root = store.local_path()
    if root is not None:
        with storage_faults(f"{store.uri}/{PREFIX}"):
            return _local(root / PREFIX)
    found: dict[str, Folder] = {}
    for key, (text, num_bytes) in store.marks(PREFIX).items():
        if match := _KEY.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = Mark(text, num_bytes)
    return found


def download(store: Store, name: str, file: str, mark: Mark, to: Path) -> None:
    """Copy one listed file to `to`.

    Raises:
        AdapterError: it, or its folder, has become a link.
        NotFoundError: it is gone.
        StoreError: it cannot be read, or is longer than it was when it was listed.
    """
    key = f"{PREFIX}/{name}/{file}"
    root = store.local_path()
    chunks = store.stream(key) if root is None else _unlinked(root / PREFIX, name, file)
    left = mark.num_bytes
    with storage_faults(f"{store.uri}/{key}"), to.open("wb") as target:
        for chunk in chunks:
            left -= len(chunk)
            if left < 0:
                raise StoreError(f"{store.uri}/{key}: was changed while it was read")
            target.write(chunk)


def _local(prefix: Path) -> dict[str, Folder]:
    found: dict[str, Folder] = {}
    try:
        entries = sorted(os.scandir(prefix), key=lambda entry: entry.name)
    except FileNotFoundError:
        return found
    for entry in entries:
        if entry.is_symlink():
            found[entry.name] = _marked(entry, "")
        elif entry.is_dir():
            try:
                found[entry.name] = _listed(entry)
            except FileNotFoundError:
                continue  # it is gone again
            except OSError as error:
                found[entry.name] = {"": Mark(error.strerror or str(error), 0)}
    return found


def _listed(folder: os.DirEntry[str]) -> Folder:
    found: Folder = {}
    with os.scandir(folder) as files:
        for file in files:
            if file.is_symlink() or file.is_file():
                found |= _marked(file, file.name)
    return found


def _marked(entry: os.DirEntry[str], name: str) -> Folder:
    try:
        now = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return {}
    text = f"{now.st_ino:x}-{now.st_mtime_ns:x}-{now.st_size:x}"
    return {name: Mark(text, now.st_size, entry.is_symlink())}


def _unlinked(prefix: Path, name: str, file: str) -> Iterator[bytes]:
    """Its bytes. By descriptors, so that nothing is put in between after a check."""
    try:
        folder = os.open(prefix / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # Without waiting for whoever would write into a pipe of that name.
            found = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise link_fault(f"{prefix / name}: {file}") from error
        raise
    with os.fdopen(found, "rb") as source:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise AdapterError(f"{prefix / name}: {file} is no file; copy the file itself there")
        while chunk := source.read(_CHUNK_BYTES):
            yield chunk


def link_fault(what: str) -> AdapterError:
    """What a link below the prefix is refused with."""
    return AdapterError(
        f"{what} is a link, and none is followed there; copy what it stands for in its place"
    )
