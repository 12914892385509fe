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
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.adapter_folder import CONFIG, WEIGHTS
from cluster.errors import AdapterError, ConflictError, GraftError, NotFoundError, StoreError
from cluster.names import NAME
from cluster.registry import AdapterVersion, Registry

_KEY = re.compile(r"imports/([^/]+)/([^/]+)")
_WHOLE = {CONFIG, WEIGHTS}


@dataclass(frozen=True)
class Look:
    """What one look at the prefix found that no earlier one of this process had.

    Attributes:
        imported: Versions that were registered.
        refused: Of folders that cannot be used, by name, why.
        waiting: Of folders that lack a file, by name, which.
        failed: Of folders that could not be read or registered now, by name, why. The next look
            tries again, and tells it again.
    """

    imported: list[AdapterVersion] = field(default_factory=list[AdapterVersion])
    refused: dict[str, str] = field(default_factory=dict[str, str])
    waiting: dict[str, str] = field(default_factory=dict[str, str])
    failed: dict[str, str] = field(default_factory=dict[str, str])


class Imports:
    """The import prefix of one store, as one process sees it. Used by one thread."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._store = registry, registry.store
        self._seen: Mapping[str, Mapping[str, str]] = {}
        self._done: dict[str, Mapping[str, str]] = {}

    def look(self) -> Look:
        """Register what has come to rest since the last look. One folder's fault is its own.

        Raises:
            StoreError: the prefix cannot be listed.
        """
        found: dict[str, dict[str, str]] = {}
        for key, mark in self._store.marks("imports").items():
            if match := _KEY.fullmatch(key):
                found.setdefault(match[1], {})[match[2]] = mark
        seen, self._seen = self._seen, found
        look = Look()
        for name, files in found.items():
            if seen.get(name) != files or self._done.get(name) == files:
                continue
            try:
                self._settle(name, files, look)
            except AdapterError as error:
                look.refused[name] = error.message
            except GraftError as error:
                look.failed[name] = error.message
                continue
            self._done[name] = files
        self._done = {name: files for name, files in self._done.items() if name in found}
        return look

    def _settle(self, name: str, files: Mapping[str, str], look: Look) -> None:
        if not NAME.fullmatch(name):
            raise AdapterError(f"imports/{name}: is no name for an adapter; rename the folder")
        missing = sorted(_WHOLE - set(files))
        if missing:
            look.waiting[name] = missing[0]
            return
        stamp = hashlib.sha256("\n".join(files[file] for file in sorted(_WHOLE)).encode())
        key = f"imported/{name}/{stamp.hexdigest()[:32]}.json"
        record = self._record(key)
        if record is None:
            record = self._take(name, key)
            if "error" in record:
                raise AdapterError(record["error"])
        if "manifest" in record:
            version = self._registry.reveal(record["manifest"])
            if version is not None:
                look.imported.append(version)

    def _take(self, name: str, key: str) -> Mapping[str, Any]:
        """Validate and upload a folder; the record of it, ours or that of whoever was faster."""
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, name)
            folder.mkdir()
            origin = f"{self._store.uri}/imports/{name}"
            try:
                for file in sorted(_WHOLE):
                    self._store.download(f"imports/{name}/{file}", folder / file)
                staged = self._registry.stage(name, folder, card={"imported_from": origin})
                record: dict[str, Any] = {"manifest": staged}
            except NotFoundError:
                return {}  # it was taken away again
            except AdapterError as error:
                record = {"error": error.message.replace(str(folder), origin)}
        try:
            self._store.create(key, json.dumps(record).encode())
        except ConflictError:
            other = self._record(key)
            # Who was faster has reported its error.
            return {} if other is None or "error" in other else other
        return record

    def _record(self, key: str) -> Mapping[str, Any] | None:
        try:
            return json.loads(self._store.read(key))
        except NotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{self._store.uri}/{key}: is damaged; delete it") from error
