"""PEFT folders that are dropped into a store, registered as versions of their own accord.

    imports/NAME/adapter_config.json, adapter_model.safetensors    put there by any tool
    imported/NAME/STAMP.json                                       what became of them

A folder is taken when both files are there and neither has changed since the last look: whoever
copies it may still be writing. Only these two files are read. What became of it is one create-only
record for each stamp (what the storage says of both files: tag, size, time), so that of several
processes that look at once one registers it, in whatever moment another ends: the record has the
whole manifest, and anybody makes it visible.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.adapter_folder import CONFIG, WEIGHTS
from cluster.errors import AdapterError, ConflictError, GraftError, NotFoundError, StoreError
from cluster.import_prefix import Folder, download, folders, link_fault
from cluster.names import NAME
from cluster.registry import AdapterVersion, Registry

# Both files together: to write one whole or not at all, a gateway has it in memory.
MAX_IMPORT_BYTES = 2 * 2**30
_MAX_PAUSE = 63  # looks
_WHOLE = {CONFIG, WEIGHTS}


@dataclass(frozen=True)
class Look:
    """What one look at the prefix found that no earlier one of this process had.

    Attributes:
        imported: Versions that were registered.
        refused: Of folders that cannot be used, by name, why.
        waiting: Of folders that lack a file, by name, which.
        failed: Of folders that could not be read or registered, by name, why. A later look tries
            again, after a pause that doubles with each failure; every look tells it.
    """

    imported: list[AdapterVersion] = field(default_factory=list[AdapterVersion])
    refused: dict[str, str] = field(default_factory=dict[str, str])
    waiting: dict[str, str] = field(default_factory=dict[str, str])
    failed: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class _Failure:
    """The last of a folder's failures in a row, and the looks that pass before the next attempt."""

    reason: str
    pause: int
    left: int


class Imports:
    """The import prefix of one store, as one process sees it. Used by one thread."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._store = registry, registry.store
        self._seen: Mapping[str, Folder] = {}
        self._done: dict[str, Folder] = {}
        self._failures: dict[str, _Failure] = {}
        self._claims: dict[str, int] = {}  # numbers that are ours, by the record to be written

    def look(self) -> Look:
        """Register what has come to rest since the last look. One folder's fault is its own.

        Raises:
            StoreError: the prefix cannot be listed.
        """
        found = folders(self._store)
        seen, self._seen = self._seen, found
        look = Look()
        for name, files in found.items():
            if seen.get(name) != files:
                self._failures.pop(name, None)
            elif self._done.get(name) != files and not self._pauses(name, look):
                self._try(name, files, look)
        self._done = {name: files for name, files in self._done.items() if name in found}
        self._failures = {name: f for name, f in self._failures.items() if name in found}
        return look

    def _pauses(self, name: str, look: Look) -> bool:
        last = self._failures.get(name)
        if last is None or last.left == 0:
            return False
        self._failures[name] = _Failure(last.reason, last.pause, last.left - 1)
        look.failed[name] = last.reason
        return True

    def _try(self, name: str, files: Folder, look: Look) -> None:
        try:
            self._settle(name, files, look)
        except AdapterError as error:
            look.refused[name] = error.message
        except (GraftError, OSError) as error:
            reason = error.message if isinstance(error, GraftError) else str(error)
            last = self._failures.get(name)
            pause = min(2 * last.pause + 1, _MAX_PAUSE) if last else 0
            self._failures[name] = _Failure(reason, pause, pause)
            look.failed[name] = reason
            return
        self._failures.pop(name, None)
        self._done[name] = files

    def _settle(self, name: str, files: Folder, look: Look) -> None:
        if not NAME.fullmatch(name):
            raise AdapterError(f"imports/{name}: is no name for an adapter; rename the folder")
        whole = files.get("")
        if whole is not None and not whole.is_link:
            raise StoreError(
                f"{self._store.uri}/imports/{name}: {whole.text}; let the user that the service "
                "runs as read it"
            )
        missing = sorted(_WHOLE - set(files))
        if missing and whole is None:
            look.waiting[name] = missing[0]
            return
        texts = [whole.text] if whole else [files[file].text for file in sorted(_WHOLE)]
        stamp = hashlib.sha256("\n".join(texts).encode())
        key = f"imported/{name}/{stamp.hexdigest()[:32]}.json"
        record = self._record(key)
        is_told = record is not None
        if record is None:
            record, is_told = self._take(name, files, key)
        self._give_up(name, key, record)
        if "error" in record and not is_told:
            raise AdapterError(record["error"])
        if "manifest" in record:
            version = self._registry.reveal(record["manifest"])
            if version is not None:
                look.imported.append(version)

    def _take(self, name: str, files: Folder, key: str) -> tuple[Mapping[str, Any], bool]:
        """Validate and upload a folder; the record of it, and whether it is that of whoever was
        faster, and has told of it."""
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, name)
            folder.mkdir()
            origin = f"{self._store.uri}/imports/{name}"
            try:
                _check(origin, files)
                for file in sorted(_WHOLE):
                    download(self._store, name, file, files[file], folder / file)
                record: dict[str, Any] = {"manifest": self._stage(name, folder, origin, key)}
            except NotFoundError:
                return {}, True  # it was taken away again
            except AdapterError as error:
                record = {"error": error.message.replace(str(folder), origin)}
        try:
            self._store.create(key, json.dumps(record).encode())
        except ConflictError:
            return self._record(key) or {}, True
        return record, False

    def _stage(self, name: str, folder: Path, origin: str, key: str) -> Mapping[str, Any]:
        """Upload under the one number that this process takes for a record, however often it
        fails."""

        def claim() -> int:
            if key in self._claims:
                self._registry.discard(name, self._claims[key])  # what an earlier attempt left
            else:
                self._claims[key] = self._registry.claim(name)
            return self._claims[key]

        return self._registry.stage(name, folder, card={"imported_from": origin}, claim=claim)

    def _give_up(self, name: str, key: str, record: Mapping[str, Any]) -> None:
        """Delete the copy that we uploaded, if the record is of another one."""
        number = self._claims.get(key)
        if number is not None and record.get("manifest", {}).get("version") != number:
            self._registry.discard(name, number)
        self._claims.pop(key, None)

    def _record(self, key: str) -> Mapping[str, Any] | None:
        try:
            return json.loads(self._store.read(key))
        except NotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{self._store.uri}/{key}: is damaged; delete it") from error


def _check(origin: str, files: Folder) -> None:
    """Raise AdapterError for what is not even read."""
    for file in ("", *sorted(_WHOLE)):
        if file in files and files[file].is_link:
            raise link_fault(f"{origin}: {file}" if file else origin)
    num_bytes = sum(files[file].num_bytes for file in _WHOLE)
    if num_bytes > MAX_IMPORT_BYTES:
        raise AdapterError(
            f"{origin}: its files have {num_bytes:,} bytes, and of its own accord a gateway takes "
            f"{MAX_IMPORT_BYTES:,}; publish it with `graft adapters import`"
        )
