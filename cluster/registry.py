"""The adapters in a store: immutable numbered versions, aliases, verification, import.

    adapters/NAME/00000003/adapter_config.json, adapter_model.safetensors, …
    adapters/NAME/00000003/manifest.json      written last: the version exists from here on
    aliases/NAME/ALIAS/00000007.json          the last entry of the log is what the alias means

Every write is create-only, so concurrent publishers get different numbers and nothing is ever
half-visible. Knows files and hashes; what a method is, only by the name in its config.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster.adapter_folder import (
    CONFIG,
    CONTENT,
    WEIGHTS,
    check_finite,
    open_adapter_folder,
    readable,
    unchanged,
)
from cluster.catalog import LATEST, REFERENCE, Catalog
from cluster.errors import (
    AdapterError,
    ConflictError,
    NotFoundError,
    SpecError,
    StoreError,
)
from cluster.lora_folder import check_lora
from cluster.names import NAME, check_name
from cluster.spec import nearest
from cluster.store import Store, open_store

MANIFEST = "manifest.json"
SCHEMA = 1
README, PICTURE, EVENTS = "README.md", "loss.png", "events.out.tfevents.graft"
# What a version holds; anything else in the folder (optimiser states, pickles) stays behind.
PUBLISHED_FILES = (CONFIG, WEIGHTS, README, PICTURE, EVENTS)
_MANIFEST_KEY = re.compile(rf"adapters/({NAME.pattern})/([0-9]{{8}})/manifest\.json")
_ALIAS_KEY = re.compile(rf"aliases/({NAME.pattern})/({NAME.pattern})/[0-9]{{8}}\.json")
_HASHED_BYTES = 2**16  # at a time: more leave the cache between reading and hashing
_log = logging.getLogger("graft.registry")


@dataclass(frozen=True)
class FileEntry:
    """One file of a version."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class AdapterVersion:
    """One immutable version of an adapter, as its manifest tells it."""

    name: str
    version: int
    method: str
    base_model: str | None
    content_hash: str
    created_at: str
    files: Mapping[str, FileEntry]
    card: Mapping[str, Any]

    @property
    def ref(self) -> str:
        """The exact reference, "name@version"."""
        return f"{self.name}@{self.version}"


class Registry:
    """The adapters of one store. Knows nothing by heart: every call reads what is there now."""

    def __init__(self, store: Store | str) -> None:
        self.store = open_store(store) if isinstance(store, str) else store

    def publish(
        self, name: str, folder: Path, *, card: Mapping[str, Any] | None = None
    ) -> AdapterVersion:
        """Publish a PEFT folder as the next version of `name`.

        Raises:
            AdapterError: the folder is not sound, or changed meanwhile; nothing is to be seen.
                Whether it fits a base is found by who knows the base, when it is loaded.
        """
        manifest = self.stage(name, folder, card=card)
        # Visible already, it is by a write of ours whose answer was lost.
        return self.reveal(manifest) or self.read(name, manifest["version"])

    def stage(
        self,
        name: str,
        folder: Path,
        *,
        card: Mapping[str, Any] | None = None,
        claim: Callable[[], int] | None = None,
    ) -> dict[str, Any]:
        """Upload a PEFT folder under the next number of `name`, not visible yet; its manifest, for
        `reveal`. Raises AdapterError as `publish`; what was uploaded of a folder that fails is
        deleted.

        Args:
            claim: Gives the number instead, once the folder is known to be sound.
        """
        check_name(name, "adapter")
        with ExitStack() as undo:
            with unchanged(folder, PUBLISHED_FILES):
                opened = open_adapter_folder(folder)
                check_lora(opened)
                check_finite(opened)
                paths = [folder / file for file in PUBLISHED_FILES]
                present = [p.name for p in paths if p.is_file() and not p.is_symlink()]
                files = dict[str, FileEntry]()
                for file in present:
                    with readable(folder, file):
                        files[file] = file_entry(folder / file)
                number = claim() if claim else self.claim(name)
                undo.callback(self._try_discard, name, number)
                for file in files:
                    with suppress(ConflictError):  # the number is ours: an answer was lost
                        self.store.create_file(f"{_folder(name, number)}/{file}", folder / file)
            undo.pop_all()
        version = AdapterVersion(
            name=name,
            version=number,
            method=opened.method,
            base_model=opened.base_model,
            content_hash=_content_hash(files),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files=files,
            card=dict(card or {}),
        )
        return {"schema": SCHEMA, **asdict(version)}

    def reveal(self, manifest: Mapping[str, Any]) -> AdapterVersion | None:
        """Make the version of a `stage` visible; None if it is already."""
        key = f"{_folder(manifest['name'], manifest['version'])}/{MANIFEST}"
        try:
            self.store.create(key, json.dumps(manifest, indent=2, sort_keys=True).encode())
        except ConflictError:
            return None
        return self.read(manifest["name"], manifest["version"])

    def claim(self, name: str) -> int:
        """Take the next free number; a number once taken is never given again."""
        folders = self.store.list_folders(f"adapters/{name}")
        taken = [int(folder) for folder in folders if folder.isdecimal()]
        number, own = max(taken, default=0) + 1, uuid4().bytes
        while True:
            key = f"{_folder(name, number)}/claim"
            try:
                self.store.create(key, own)
                return number
            except ConflictError:
                if self.store.read(key) == own:  # the first try was done, its answer lost
                    return number
                number += 1

    def discard(self, name: str, number: int) -> None:
        """Delete what a `stage` that will never be revealed has uploaded; its number stays taken,
        so that no other version ever has it."""
        for file in PUBLISHED_FILES:
            self.store.delete(f"{_folder(name, number)}/{file}")

    def _try_discard(self, name: str, number: int) -> None:
        with suppress(StoreError):  # nobody can see it, and what failed before is the one to tell
            self.discard(name, number)

    def import_folder(self, name: str, folder: Path) -> AdapterVersion:
        """Publish a plain PEFT folder made elsewhere; as `publish`, with its origin in the card."""
        return self.publish(name, folder, card={"imported_from": str(folder)})

    def catalog(self) -> Catalog:
        """Everything there is, by two listings and one small read for each alias."""
        entries: dict[tuple[str, str], str] = {}
        for key in self.store.list("aliases"):
            if match := _ALIAS_KEY.fullmatch(key):
                entries[match[1], match[2]] = key  # the last one counts
        aliases: dict[tuple[str, str], int] = {}
        for at, key in entries.items():
            try:
                aliases[at] = self._alias_version(key)
            except AdapterError as error:  # which is nobody else's fault
                _log.warning("%s", error.message)
        return Catalog(self._all_versions(), aliases)

    def names(self) -> list[str]:
        """Every adapter with at least one whole version."""
        return sorted(self._all_versions())

    def _all_versions(self) -> dict[str, list[int]]:
        versions: dict[str, list[int]] = {}
        for key in self.store.list("adapters"):  # sorted, so versions ascend
            if match := _MANIFEST_KEY.fullmatch(key):  # others may put files there too
                versions.setdefault(match[1], []).append(int(match[2]))
        return versions

    def _alias_version(self, key: str) -> int:
        raw = self.store.read(key)
        try:
            return int(json.loads(raw)["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterError(f"{self.store.uri}/{key}: is damaged; set the alias anew") from error

    def versions(self, name: str) -> list[AdapterVersion]:
        """The whole versions of `name`, oldest first. Raises NotFoundError."""
        return [self.read(name, number) for number in self._existing(name)]

    def resolve(self, ref: str) -> AdapterVersion:
        """The version that "name" (the newest), "name@3" or "name:alias" means now.

        Raises:
            NotFoundError: naming what is nearest.
        """
        match = REFERENCE.fullmatch(ref)
        if match is None:
            raise NotFoundError(
                f"adapter {ref[:120]!r}: not a reference; write name, name@version or name:alias"
            )
        name, number, alias = str(match[1]), match[2], match[3]
        existing = self._existing(name)
        if alias == LATEST or (not number and not alias):
            return self.read(name, existing[-1])
        if alias:
            known = self.aliases(name)
            if alias not in known:
                raise NotFoundError(
                    f"adapter {name!r} has no alias {alias!r}{nearest(alias, known)}"
                )
            return self.read(name, known[alias])
        if int(number) not in existing:
            raise NotFoundError(
                f"adapter {name!r} has no version {number}; the newest is {existing[-1]}"
            )
        return self.read(name, int(number))

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of `name` and the versions that they mean now."""
        found: dict[str, int] = {}
        for alias in self.store.list_folders(f"aliases/{name}"):
            entries = self.store.list(f"aliases/{name}/{alias}")
            entries = [key for key in entries if _ALIAS_KEY.fullmatch(key)]
            if entries:
                found[alias] = self._alias_version(entries[-1])
        return found

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Make `name:alias` mean `version`, atomically.

        Raises:
            ConflictError: somebody moved the alias at the same moment.
        """
        check_name(alias, "alias")
        if alias == LATEST:
            raise SpecError("alias 'latest' always means the newest version; choose another name")
        self.resolve(f"{name}@{version}")
        folder = f"aliases/{name}/{alias}"
        number = len(self.store.list(folder)) + 1
        entry = {"version": version, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        self.store.create(f"{folder}/{number:08d}.json", json.dumps(entry).encode())

    def verify(self, ref: str) -> AdapterVersion:
        """Read every file of a version again. Raises AdapterError if one is not as its hash."""
        version = self.resolve(ref)
        with tempfile.TemporaryDirectory() as folder:
            self.download(version, Path(folder))
        return version

    def download(
        self, version: AdapterVersion, folder: Path, pause: Callable[[], None] = lambda: None
    ) -> None:
        """Copy every file of a version into `folder`. Raises AdapterError if one is not as its
        hash.

        Args:
            pause: Called between small pieces of the work, for who does it beside other work.
        """
        for file, entry in version.files.items():
            if file not in PUBLISHED_FILES:
                raise AdapterError(f"adapter {version.ref}: manifest names a strange file {file!r}")
            key = f"{_folder(version.name, version.version)}/{file}"
            self.store.download(key, folder / file, pause)
            if file_entry(folder / file, pause) != entry:
                raise AdapterError(
                    f"adapter {version.ref}: {file} in {self.store.uri} does not match its "
                    "manifest's hash; it was changed or damaged: publish the adapter anew"
                )

    def numbers(self, name: str) -> list[int]:
        """The whole versions of `name`, oldest first; none if nobody published under it."""
        matches = map(_MANIFEST_KEY.fullmatch, self.store.list(f"adapters/{name}"))
        return sorted(int(match[2]) for match in matches if match)

    def _existing(self, name: str) -> list[int]:
        check_name(name, "adapter")
        numbers = self.numbers(name)
        if not numbers:
            known = nearest(name, self.names())
            raise NotFoundError(f"adapter {name!r} is not in {self.store.uri}{known}")
        return numbers

    def read(self, name: str, number: int) -> AdapterVersion:
        """The manifest of a version. Raises NotFoundError."""
        content = self.store.read(f"{_folder(name, number)}/{MANIFEST}")
        try:
            raw = json.loads(content)
            schema = raw.pop("schema")
            if schema != SCHEMA:
                raise AdapterError(
                    f"adapter {name}@{number}: made by a newer Graft (schema {schema}); update"
                )
            files = {file: FileEntry(**entry) for file, entry in raw.pop("files").items()}
            version = AdapterVersion(files=files, **raw)
            datetime.fromisoformat(version.created_at)  # /v1/models tells it of every adapter
            is_own = (version.name, version.version) == (name, number)
            if not is_own or version.content_hash != _content_hash(files):
                raise ValueError("it is of another version")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(
                f"adapter {name}@{number}: its manifest in {self.store.uri} is damaged ({error}); "
                "publish the adapter anew"
            ) from error
        return version


def _folder(name: str, number: int) -> str:
    return f"adapters/{name}/{number:08d}"


def file_entry(path: Path, pause: Callable[[], None] = lambda: None) -> FileEntry:
    """What a manifest says of a file such as this; `pause` as in `Registry.download`."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASHED_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            pause()
    return FileEntry(digest.hexdigest(), path.stat().st_size)


def _content_hash(files: Mapping[str, FileEntry]) -> str:
    """What makes two versions the same adapter: config and weights, not the text beside them."""
    lines = [f"{file} {files[file].sha256}" for file in CONTENT]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
