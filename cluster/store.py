"""Shared storage by URI: a local folder, NFS, S3 or GCS, with create-only writes.

Everything that Graft shares between machines goes through here. A key is written once, whole, or
not at all: object stores get a conditional put, local folders a write beside and an exclusive
link, both from obstore. Knows bytes and keys, and nothing of what they mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from io import SEEK_CUR, SEEK_END, SEEK_SET, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import LocalStore, from_url

from cluster.errors import ConflictError, NotFoundError, SpecError, StoreError
from cluster.names import absolute_uri, local_folder

_KEY = re.compile(r"[A-Za-z0-9._@+=-]+(/[A-Za-z0-9._@+=-]+)*")
_CHUNK_BYTES, _PIECE_BYTES = 8 * 2**20, 2**16
_WHOLE_BYTES, _PART_BYTES = 64 * 2**20, 16 * 2**20
# As long as anything comes, a large file may take its time; obstore's own limit is 30 s for all.
_TIMEOUTS = {"timeout": "1h", "read_timeout": "60s"}


class Store:
    """One folder of shared storage. Safe to use from several threads; picklable by its URI."""

    def __init__(self, uri: str) -> None:
        self.uri = absolute_uri(uri)
        with storage_faults(f"store {self.uri}"):
            # Any: obstore's stubs leave the Arrow form of listings untyped.
            self._store: Any = _open(self.uri)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    def create(self, key: str, data: bytes) -> None:
        """Write `data` under a new key, visible only when whole.

        Raises:
            ConflictError: the key exists; it was not touched.
        """
        with storage_faults(f"{self.uri}/{key}"):
            # One conditional put: a multipart upload carries no create-only condition everywhere.
            obstore.put(self._store, _checked(key), data, mode="create", use_multipart=False)

    def create_file(self, key: str, path: Path) -> None:
        """Write the content of `path` under a new key; as `create`. A large file goes in parts,
        which carry no condition: of two writers at once, which no caller has, the last would win.
        """
        if path.stat().st_size <= _WHOLE_BYTES:
            self.create(key, path.read_bytes())
            return
        if self.exists(key):
            raise ConflictError(f"{self.uri}/{key}: exists already, and is never overwritten")
        with storage_faults(f"{self.uri}/{key}"):
            obstore.put(
                self._store, _checked(key), path, use_multipart=True, chunk_size=_PART_BYTES
            )

    def read(self, key: str) -> bytes:
        """The bytes under `key`. Raises NotFoundError."""
        with storage_faults(f"{self.uri}/{key}"):
            return bytes(obstore.get(self._store, _checked(key)).bytes())

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """So many of its bytes from `start` on. Raises NotFoundError."""
        with storage_faults(f"{self.uri}/{key}"):
            found = obstore.get_range(self._store, _inside(key), start=start, length=length)
            return bytes(found)

    def stream(self, key: str) -> Iterator[bytes]:
        """Its bytes in pieces of some megabytes. Raises NotFoundError."""
        with storage_faults(f"{self.uri}/{key}"):
            found = obstore.get(self._store, _inside(key))
            for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
                yield bytes(chunk)

    def open(self, key: str) -> BufferedReader:
        """A seekable file that reads what is asked for alone. Raises NotFoundError."""
        with storage_faults(f"{self.uri}/{key}"):
            size = int(obstore.head(self._store, _inside(key))["size"])
        return BufferedReader(_Ranges(self, key, size))

    def identity(self, key: str) -> str:
        """Another text whenever its bytes may be others. Raises NotFoundError."""
        with storage_faults(f"{self.uri}/{key}"):
            found = obstore.head(self._store, _inside(key))
        return f"{key} {found['size']} {found['e_tag'] or found['last_modified']}"

    def exists(self, key: str) -> bool:
        """Whether `key` is there."""
        try:
            with storage_faults(f"{self.uri}/{key}"):
                obstore.head(self._store, _checked(key))
        except NotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """Every key below the folder `prefix`, sorted."""
        with storage_faults(f"{self.uri}/{prefix}"):
            pages = self._store.list(_checked(prefix) if prefix else None, return_arrow=False)
            return sorted(meta["path"] for page in pages for meta in page)

    def marks(self, prefix: str) -> dict[str, tuple[str, int]]:
        """Every key below the folder `prefix`, sorted, with a mark of its content and its bytes."""
        with storage_faults(f"{self.uri}/{prefix}"):
            pages = self._store.list(_checked(prefix), return_arrow=False)
            found = {
                meta["path"]: (
                    f"{meta['e_tag']} {meta['size']} {meta['last_modified'].isoformat()}",
                    int(meta["size"]),
                )
                for page in pages
                for meta in page
            }
        return dict(sorted(found.items()))

    def list_folders(self, prefix: str = "") -> list[str]:
        """The names of the folders directly below `prefix`, sorted."""
        with storage_faults(f"{self.uri}/{prefix}"):
            where = _checked(prefix) if prefix else None
            result = self._store.list_with_delimiter(where, return_arrow=False)
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in result["common_prefixes"])

    def download(self, key: str, to: Path, pause: Callable[[], None] = lambda: None) -> None:
        """Copy `key` into the file `to` (its folder exists). Raises NotFoundError, and StoreError
        where either cannot be read or written.

        Args:
            pause: Called after each small piece, for who downloads beside other work.
        """
        pieces = self._pieces(_checked(key))
        try:
            with to.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                    pause()
        except OSError as error:  # the store's own come as StoreError
            raise unwritable(to, error) from error

    def _pieces(self, key: str) -> Iterator[Any]:
        """The bytes of a key, as buffers of 64 KiB or so."""
        folder = self.local_path()
        with storage_faults(f"{self.uri}/{key}"):
            if folder is None:
                yield from obstore.get(self._store, key).stream(min_chunk_size=_PIECE_BYTES)
                return
            # obstore streams a file in 8 KiB, each through another thread (docs/log.md).
            with (folder / key).open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece

    def delete(self, key: str) -> None:
        """Remove `key`; absent is fine."""
        try:
            with storage_faults(f"{self.uri}/{key}"):
                obstore.delete(self._store, _checked(key))
        except NotFoundError:
            pass

    def local_path(self) -> Path | None:
        """The folder on this machine's file system, or None for object storage."""
        return local_folder(self.uri)


class _Ranges(RawIOBase):
    """A key's bytes, each read a request of its own."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        self._store, self._key, self._size, self._at = store, key, size, 0

    def readable(self) -> bool:
        """See IOBase."""
        return True

    def seekable(self) -> bool:
        """See IOBase."""
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        """See IOBase."""
        self._at = offset + {SEEK_SET: 0, SEEK_CUR: self._at, SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """See IOBase."""
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """See RawIOBase."""
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            buffer[:length] = self._store.read_range(self._key, self._at, length)
        self._at += length
        return length


def open_store(uri: str) -> Store:
    """The store at `uri`: "/abs", "rel/folder", "file:///abs", "s3://bucket/prefix", "gs://…".

    S3 takes endpoint, region and credentials from the usual AWS_* variables (plain http only
    for an endpoint on loopback). Raises SpecError for a URI that is none of these.
    """
    return Store(uri)


def _open(uri: str) -> Any:
    folder = local_folder(uri)
    if folder is not None:
        if folder.exists() and not folder.is_dir():
            raise SpecError(f"store {uri}: is a file; name a folder")
        return LocalStore(folder, mkdir=True)
    options: dict[str, Any] = {}
    client: dict[str, Any] = dict(_TIMEOUTS)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if uri.startswith("s3://") and endpoint:
        options["endpoint"] = endpoint
        if urlsplit(endpoint).hostname in ("127.0.0.1", "localhost", "::1"):
            client["allow_http"] = True
    return cast("Any", from_url)(uri, config=options, client_options=client)


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key) or any(part in (".", "..") for part in key.split("/")):
        raise SpecError(f"store key {key!r}: use letters, digits and ._@+=- between slashes")
    return key


def _inside(key: str) -> str:
    """A key that is only read may have any characters: users name their files."""
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise SpecError(f"store key {key!r}: names no file below the store; write its whole name")
    return key


@contextmanager
def storage_faults(what: str) -> Generator[None]:
    """Turn what obstore and the file system raise into Graft's errors."""
    try:
        yield
    except AlreadyExistsError as error:
        raise ConflictError(f"{what}: exists already, and is never overwritten") from error
    except FileNotFoundError as error:
        raise NotFoundError(f"{what}: not found") from error
    except (NotSupportedError, UnknownConfigurationKeyError) as error:
        raise SpecError(f"{what}: {error}") from error
    except (PermissionError, PermissionDeniedError, UnauthenticatedError) as error:
        raise StoreError(f"{what}: permission denied; check the credentials and rights") from error
    except (BaseError, GenericError, OSError, ValueError) as error:
        raise StoreError(
            f"{what}: storage failed: {_first_line(error)}; see that it answers and has room, then "
            "try again"
        ) from error


def unwritable(what: object, error: OSError) -> StoreError:
    """The error for a file or folder of this machine that cannot be written."""
    return StoreError(
        f"{what}: cannot be written ({error.strerror}); free room there, or name another folder"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
