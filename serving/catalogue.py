"""Which models a request can name now: the base, and every adapter of the store made for it.

A snapshot of the store's keys is taken at most every few seconds, whatever is asked, so unknown
names cost nothing and new versions are seen without a restart. A store that is slow, hangs or
fails holds up nobody who asks for what was seen: that is served meanwhile. Manifests never change
and are kept. Of one event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from cluster.catalog import REFERENCE, Catalog
from cluster.errors import (
    AdapterError,
    GraftError,
    ModelNotFoundError,
    RequestError,
    StoreError,
)
from cluster.mixes import AdapterMix, NamedAdapter, check_mixable, is_mix, parse_mix
from cluster.registry import AdapterVersion, Registry
from cluster.spec import nearest
from serving.store_reads import StoreReads

_log = structlog.get_logger("graft.catalogue")
# The age, as a share of a snapshot's time, from which the next is taken beside the requests.
_AHEAD = 0.5
# Seconds from the begin of a look for which requests wait for it where the snapshot is too old:
# those for what it has, and those for what it has not.
_PATIENCE_S, _UNKNOWN_PATIENCE_S = 1.0, 5.0
_LOOK, _ALL = "look", "all"


@dataclass(frozen=True)
class _Snapshot:
    began_s: float
    catalog: Catalog


class Catalogue:
    """The models of one service.

    Args:
        base_name: What requests call the base.
        base_folder: Whose config.json tells adapters of this base from others.
        ttl_s: Age in seconds up to which a snapshot is used.
    """

    def __init__(
        self, registry: Registry, *, base_name: str, base_folder: str, ttl_s: float
    ) -> None:
        self.base_name = base_name
        self._registry, self._ttl_s = registry, ttl_s
        config = Path(base_folder, "config.json").read_bytes()
        self._base_hash = hashlib.sha256(config).hexdigest()
        self._snapshot: _Snapshot | None = None
        self._look_began_s, self._old_before_s = -math.inf, -math.inf
        self._is_unread = False  # since a look failed, until one does not
        self._manifests: dict[tuple[str, int], AdapterVersion] = {}
        self._looks, self._reads = StoreReads(most=1), StoreReads(most=32)

    async def find(
        self, model: str, allows: Callable[[str], bool] = lambda _: True
    ) -> NamedAdapter | None:
        """As `resolve`, by what is in the store now; what was read before needs no store."""
        nothing, asked_s = Catalog({}, {}), time.monotonic()
        if self._missing(model, nothing, allows) is not None:  # the base alone
            return self.resolve(model, nothing, allows)
        since_s = asked_s - self._ttl_s
        snapshot = await self._seen(since_s, _PATIENCE_S)
        missing = self._missing(model, snapshot.catalog, allows)
        if missing is None:
            if _is_newer(model, snapshot.catalog):  # of which another gateway may have told
                since_s = asked_s
            snapshot = await self._seen(since_s, _UNKNOWN_PATIENCE_S)
            missing = self._missing(model, snapshot.catalog, allows)
            if missing is None and (self._is_unread or snapshot.began_s < since_s):
                self._refuse_for_now(model, allows)
        for version in missing or ():
            await self._reads.read(version, partial(self._manifest, *version))
        if missing is None:  # to be told what is nearest among all
            return await asyncio.to_thread(self.resolve, model, snapshot.catalog, allows)
        return self.resolve(model, snapshot.catalog, allows)

    async def catalog(self) -> Catalog:
        """What is in the store now, or was when it last answered. Raises StoreError if it never
        did."""
        return (await self._seen(time.monotonic() - self._ttl_s, _PATIENCE_S)).catalog

    async def _seen(self, since_s: float, patience_s: float) -> _Snapshot:
        """A snapshot of `since_s` or later; an older one where the look in progress has taken
        longer than `patience_s`."""
        snapshot = self._snapshot
        if snapshot is None or not self._is_younger(snapshot, _AHEAD * self._ttl_s):
            self._begin_look()
        while snapshot is None or snapshot.began_s < max(since_s, self._old_before_s):
            look = self._begin_look()
            if snapshot is None:
                await asyncio.shield(look)
            else:
                left_s = self._look_began_s + patience_s - time.monotonic()
                if left_s > 0:
                    await asyncio.wait((look,), timeout=left_s)
                if not look.done() or look.exception() is not None:
                    return snapshot
            snapshot = self._snapshot
        return snapshot

    def _begin_look(self) -> asyncio.Task[None]:
        """The look in progress, or a new one."""
        if not self._looks.is_reading(_LOOK):
            self._look_began_s = time.monotonic()
        return self._looks.begin(_LOOK, self._look)

    def resolve(
        self, model: str, catalog: Catalog, allows: Callable[[str], bool] = lambda _: True
    ) -> NamedAdapter | None:
        """The adapter version, or mix of versions, that `model` means by `catalog`, or None for the
        base. Reads manifests that were not read yet.

        Args:
            allows: Whether the asker may know of the base or adapter of a name. What is forbidden
                is as unknown as what does not exist.

        Raises:
            ModelNotFoundError: naming what is nearest.
            AdapterError: the adapter was trained on another base.
            RequestError: it is a mix, and none that can be.
            StoreError: what it names was not seen yet, and the store cannot be read now.
        """
        names = _named(model)
        found = [self._found(name, catalog, allows) for name, _ in names]  # before any is read
        versions = [
            None if version is None else self._fitting(name, version)
            for (name, _), version in zip(names, found, strict=True)
        ]
        if not is_mix(model):
            return versions[0]
        parts: dict[str, tuple[AdapterVersion, float]] = {}
        for (name, weight), version in zip(names, versions, strict=True):
            if version is None or version.ref in parts:
                wrong = "is the base" if version is None else f"is {version.ref} a second time"
                raise RequestError(
                    f"model {model[:120]!r}: {name!r} {wrong}; a mix is of different adapters",
                    param="model",
                )
            check_mixable(version)
            parts[version.ref] = version, weight
        return AdapterMix(tuple(parts[ref] for ref in sorted(parts)))

    def _missing(
        self, model: str, catalog: Catalog, allows: Callable[[str], bool]
    ) -> list[tuple[str, int]] | None:
        """The versions that `model` names of which no manifest was read yet; None if it names what
        the catalog has not."""
        missing: list[tuple[str, int]] = []
        for name, _ in _named(model):
            if name == self.base_name and allows(name):
                continue
            version = catalog.find(name)
            if version is None or not allows(version[0]):
                return None
            if version not in self._manifests:
                missing.append(version)
        return missing

    def _found(
        self, name: str, catalog: Catalog, allows: Callable[[str], bool]
    ) -> tuple[str, int] | None:
        if name == self.base_name and allows(name):
            return None
        found = catalog.find(name)
        if found is None or not allows(found[0]):
            hint = nearest(name[:120], filter(allows, [self.base_name, *catalog.versions]))
            raise ModelNotFoundError(
                f"model {name[:120]!r}: neither the base nor an adapter of the store{hint}"
            )
        return found

    def _fitting(self, name: str, found: tuple[str, int]) -> AdapterVersion:
        version = self._manifest(*found)
        if not self._fits(version):
            raise AdapterError(
                f"model {name!r}: adapter {version.ref} was trained on another base "
                f"({version.base_model}) than {self.base_name!r} serves"
            )
        return version

    def _refuse_for_now(self, model: str, allows: Callable[[str], bool]) -> None:
        """Raise StoreError for a name that can be and is allowed: it may be new, and whoever is
        told that it is none gives up."""
        for name, _ in _named(model):
            match = REFERENCE.fullmatch(name)
            if name != self.base_name and (match is None or not allows(match[1])):
                return
        raise StoreError(
            f"model {model[:120]!r}: not known yet, and the store cannot be read now; try again"
        )

    def _look(self) -> None:
        """Take a snapshot. Raises GraftError if there is none yet and the store fails."""
        began_s, before = time.monotonic(), self._snapshot
        try:
            catalog = self._registry.catalog()
        except Exception as error:
            if before is None:
                raise
            if not self._is_unread:
                _log.warning("store fails; what was seen is served", error=str(error))
            self._is_unread = True
            catalog = before.catalog
        else:
            self._is_unread = False
        self._snapshot = _Snapshot(began_s, catalog)

    async def adapters(self, catalog: Catalog) -> Mapping[str, AdapterVersion]:
        """The newest version of each adapter of a catalog that fits the base, by name."""
        newest = {name: numbers[-1] for name, numbers in catalog.versions.items()}
        if any(version not in self._manifests for version in newest.items()):
            await self._reads.read(_ALL, partial(self._read_all, newest))
        known = {name: self._manifests.get((name, number)) for name, number in newest.items()}
        return {name: v for name, v in known.items() if v is not None and self._fits(v)}

    def _read_all(self, newest: Mapping[str, int]) -> None:
        for name, number in newest.items():
            try:
                self._manifest(name, number)
            except GraftError as error:  # whoever asks for it by name is told why
                _log.warning("adapter left out", adapter=name, error=error.message)

    def refresh(self) -> None:
        """Look again at the next question, however young the snapshot is."""
        self._old_before_s = time.monotonic()

    def _is_younger(self, snapshot: _Snapshot, age_s: float) -> bool:
        return snapshot.began_s >= max(time.monotonic() - age_s, self._old_before_s)

    def _manifest(self, name: str, number: int) -> AdapterVersion:
        if (name, number) not in self._manifests:
            self._manifests[name, number] = self._registry.read(name, number)
        return self._manifests[name, number]

    def _fits(self, version: AdapterVersion) -> bool:
        """Adapters made elsewhere do not tell their base; lowering checks their shapes."""
        return version.card.get("base_config_sha256", self._base_hash) == self._base_hash


def _named(model: str) -> list[tuple[str, float]]:
    return parse_mix(model) or [(model, 1.0)]


def _is_newer(model: str, catalog: Catalog) -> bool:
    """Whether it names a version behind the newest of a known adapter."""
    for name, _ in _named(model):
        match = REFERENCE.fullmatch(name)
        numbers = catalog.versions.get(match[1]) if match else None
        if match and match[2] and numbers and int(match[2]) > numbers[-1]:
            return True
    return False
