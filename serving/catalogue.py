"""Which models a request can name now: the base, and every adapter of the store made for it.

A snapshot of the store's keys is taken every few seconds, whatever is asked, so unknown names cost
nothing and new versions are seen without a restart; beyond that one look at a time, for versions of
which another gateway may have told. A store that is slow, hangs or fails holds up nobody who asks
for what was seen: that is served meanwhile. Manifests never change and are kept. Of one event loop.
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
# Names that one that is unknown is compared with, at a tenth of a millisecond each.
_COMPARED = 100
_LOOK = "look"
_NOTHING = Catalog({}, {})


@dataclass(frozen=True)
class _Snapshot:
    """Of a look that began then; where the store failed, the catalog is that of before."""

    began_s: float
    catalog: Catalog
    is_read: bool = True


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
        self._look_took_s = 0.0
        self._manifests: dict[tuple[str, int], AdapterVersion] = {}
        self._looks, self._reads = StoreReads(most=1), StoreReads(most=256)

    async def find(
        self, model: str, allows: Callable[[str], bool] = lambda _: True
    ) -> NamedAdapter | None:
        """As `resolve`, by what is in the store now; what was read before needs no store."""
        asked_s, at_hand = time.monotonic(), self._snapshot
        if self._missing(model, _NOTHING, allows) is not None:  # the base alone
            return self.resolve(model, _NOTHING, allows)
        if not self._can_be(model, allows):
            return self.resolve(model, at_hand.catalog if at_hand else _NOTHING, allows)
        since_s = asked_s - self._ttl_s
        snapshot = await self._seen(since_s)
        missing = self._missing(model, snapshot.catalog, allows)
        if missing is None:
            if _is_newer(model, snapshot.catalog):
                since_s = asked_s
            snapshot = await self._seen(since_s, is_unknown=True)
            missing = self._missing(model, snapshot.catalog, allows)
            if missing is None and (not snapshot.is_read or snapshot.began_s < since_s):
                raise StoreError(  # it may be new, and whoever is told that it is none gives up
                    f"model {model[:120]!r}: not known yet, and the store cannot be read now; try "
                    "again"
                )
        for version in missing or ():
            await self._reads.read(version, partial(self._manifest, *version))
        return self.resolve(model, snapshot.catalog, allows)

    async def catalog(self) -> Catalog:
        """What is in the store now, or was when it last answered. Raises StoreError if it never
        did."""
        return (await self._seen(time.monotonic() - self._ttl_s)).catalog

    async def _seen(self, since_s: float, *, is_unknown: bool = False) -> _Snapshot:
        """A snapshot of `since_s` or later. An older one where that takes too long; of a store that
        is known to be slow, at once to who asks for what was seen."""
        snapshot = self._snapshot
        if snapshot is None or not self._is_younger(snapshot, _AHEAD * self._ttl_s):
            self._begin_look()
        while snapshot is None or snapshot.began_s < max(since_s, self._old_before_s):
            look = self._begin_look()
            if snapshot is None:
                await asyncio.shield(look)
            else:
                if is_unknown:
                    patience_s = max(_UNKNOWN_PATIENCE_S, 2 * self._look_took_s)
                else:
                    patience_s = 0.0 if self._look_took_s > _PATIENCE_S else _PATIENCE_S
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
            hint = _hint(name[:120], list(filter(allows, [self.base_name, *catalog.versions])))
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

    def _can_be(self, model: str, allows: Callable[[str], bool]) -> bool:
        """Whether its names are such as adapters have, and this asker may know of."""
        names = [name for name, _ in _named(model) if name != self.base_name]
        matches = [REFERENCE.fullmatch(name) for name in names]
        has_base = len(names) < len(_named(model))
        return all(match is not None and allows(match[1]) for match in matches) and (
            not has_base or allows(self.base_name)
        )

    def _look(self) -> None:
        """Take a snapshot. Raises what the store raises if there is none yet."""
        began_s, before = time.monotonic(), self._snapshot
        try:
            snapshot = _Snapshot(began_s, self._registry.catalog())
        except Exception as error:
            if before is None:
                raise
            if before.is_read:
                _log.warning("store fails; what was seen is served", error=str(error))
            snapshot = _Snapshot(began_s, before.catalog, is_read=False)
        self._snapshot, self._look_took_s = snapshot, time.monotonic() - began_s

    async def adapters(self, catalog: Catalog) -> Mapping[str, AdapterVersion]:
        """The newest version of each adapter of a catalog that fits the base, by name."""
        newest = {name: numbers[-1] for name, numbers in catalog.versions.items()}
        missing = [version for version in newest.items() if version not in self._manifests]
        reads = [self._reads.begin(v, partial(self._manifest, *v)) for v in missing]
        for (name, _), read in zip(missing, reads, strict=True):
            try:
                await asyncio.shield(read)
            except GraftError as error:  # whoever asks for it by name is told why
                _log.warning("adapter left out", adapter=name, error=error.message)
        known = {name: self._manifests.get((name, number)) for name, number in newest.items()}
        return {name: v for name, v in known.items() if v is not None and self._fits(v)}

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


def _hint(name: str, known: list[str]) -> str:
    if len(known) <= _COMPARED:
        return nearest(name, known)
    alike = [other for other in known if other[:2] == name[:2]][:_COMPARED]
    hint = nearest(name, alike)
    return hint if "did you mean" in hint else ""


def _is_newer(model: str, catalog: Catalog) -> bool:
    """Whether it names a version behind the newest that was seen of that adapter, if any was."""
    for name, _ in _named(model):
        match = REFERENCE.fullmatch(name)
        numbers = catalog.versions.get(match[1], [0]) if match else [0]
        if match and match[2] and int(match[2]) > numbers[-1]:
            return True
    return False
