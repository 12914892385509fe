"""Which models a request can name now: the base, and every adapter of the store made for it.

A snapshot of the store's keys is taken at most every few seconds, whatever is asked, so unknown
names cost nothing and new versions are seen without a restart. One that takes long, or fails, holds
up nobody: what was seen is served meanwhile. Manifests never change and are kept. Used from several
threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import structlog

from cluster.catalog import Catalog
from cluster.errors import (
    AdapterError,
    GraftError,
    ModelNotFoundError,
    RequestError,
    StoreError,
)
from cluster.mixes import AdapterMix, NamedAdapter, check_mixable, parse_mix
from cluster.registry import AdapterVersion, Registry
from cluster.spec import nearest

_log = structlog.get_logger("graft.catalogue")
# Seconds that the request which finds a snapshot too old waits for the next.
_PATIENCE_S = 1.0


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
        self._lock = threading.Lock()
        self._snapshot: _Snapshot | None = None
        self._look: Future[Catalog] | None = None
        self._look_began_s = 0.0
        self._old_before_s = 0.0
        self._is_unread = False  # since the store failed or was late, until it answers
        self._manifests: dict[tuple[str, int], AdapterVersion] = {}

    def at_hand(self) -> Catalog:
        """What was in the store a moment ago; nothing where it is time to look."""
        snapshot = self._snapshot
        if snapshot is None or not (self._is_looking or self._is_fresh(snapshot)):
            return Catalog({}, {})
        return snapshot.catalog

    async def catalog(self) -> Catalog:
        """What is in the store now, or was when it last answered. Raises StoreError if it never
        did."""
        snapshot = self._snapshot
        if snapshot is not None and self._is_fresh(snapshot):
            return snapshot.catalog
        with self._lock:
            if not self._is_looking:
                self._look, self._look_began_s = Future[Catalog](), time.monotonic()
                # Not one of a pool's: those are waited for where a process ends.
                threading.Thread(target=self._read, args=(self._look,), daemon=True).start()
            look = self._look
        assert look is not None
        left_s = max(0.0, self._look_began_s + _PATIENCE_S - time.monotonic())
        answer = asyncio.wrap_future(look)
        await asyncio.wait((answer,), timeout=None if snapshot is None else left_s)
        if snapshot is None or answer.done():
            return answer.result()
        self._tell(f"no answer after {_PATIENCE_S:g} s")
        return snapshot.catalog

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
        parts = parse_mix(model)
        if parts is None:
            return self._resolve_one(model, catalog, allows)
        found: dict[str, tuple[AdapterVersion, float]] = {}
        for name, weight in parts:
            version = self._resolve_one(name, catalog, allows)
            if version is None or version.ref in found:
                wrong = "is the base" if version is None else f"is {version.ref} a second time"
                raise RequestError(
                    f"model {model[:120]!r}: {name!r} {wrong}; a mix is of different adapters",
                    param="model",
                )
            check_mixable(version)
            found[version.ref] = version, weight
        return AdapterMix(tuple(found[ref] for ref in sorted(found)))

    def is_at_hand(self, model: str, catalog: Catalog, allows: Callable[[str], bool]) -> bool:
        """Whether `resolve` finds it without the store."""

        def is_known(name: str) -> bool:
            if name == self.base_name:
                return allows(name)
            found = catalog.find(name)
            return found is not None and found in self._manifests and allows(found[0])

        return all(is_known(name) for name, _ in parse_mix(model) or [(model, 1.0)])

    def _resolve_one(
        self, model: str, catalog: Catalog, allows: Callable[[str], bool]
    ) -> AdapterVersion | None:
        if model == self.base_name and allows(model):
            return None
        found = catalog.find(model)
        if found is None and self._snapshot is not None:  # the look may have ended meanwhile
            found = self._snapshot.catalog.find(model)
        if found is None or not allows(found[0]):
            if self._is_unread:  # it may be new, and whoever is told that it is none gives up
                raise StoreError(
                    f"model {model[:120]!r}: not known yet, and the store cannot be read now; try "
                    "again"
                )
            hint = nearest(model[:120], filter(allows, [self.base_name, *catalog.versions]))
            raise ModelNotFoundError(
                f"model {model[:120]!r}: neither the base nor an adapter of the store{hint}"
            )
        version = self._manifest(*found)
        if not self._fits(version):
            raise AdapterError(
                f"model {model!r}: adapter {version.ref} was trained on another base "
                f"({version.base_model}) than {self.base_name!r} serves"
            )
        return version

    @property
    def _is_looking(self) -> bool:
        return self._look is not None and not self._look.done()

    def _read(self, look: Future[Catalog]) -> None:
        began_s, before = time.monotonic(), self._snapshot
        try:
            catalog, fault = self._registry.catalog(), None
        except Exception as error:
            if before is None or not isinstance(error, GraftError):
                look.set_exception(error)
                return
            catalog, fault = before.catalog, error.message  # what was there is still served
            self._tell(fault)
        self._snapshot = _Snapshot(began_s, catalog)
        if fault is None:
            self._is_unread = False
        look.set_result(catalog)

    def _tell(self, reason: str) -> None:
        if not self._is_unread:
            _log.warning("store does not answer; what was seen counts", error=reason)
        self._is_unread = True

    def adapters(self, catalog: Catalog) -> Mapping[str, AdapterVersion]:
        """The newest version of each adapter of a catalog that fits the base, by name."""
        fitting: dict[str, AdapterVersion] = {}
        for name, numbers in catalog.versions.items():
            try:
                version = self._manifest(name, numbers[-1])
            except GraftError as error:
                _log.warning("adapter left out", adapter=name, error=error.message)
                continue  # whoever asks for it by name is told why
            if self._fits(version):
                fitting[name] = version
        return fitting

    def refresh(self) -> None:
        """Look again at the next question, however young the snapshot is."""
        self._old_before_s = time.monotonic()

    def _is_fresh(self, snapshot: _Snapshot) -> bool:
        oldest_s = max(time.monotonic() - self._ttl_s, self._old_before_s)
        return snapshot.began_s >= oldest_s

    def _manifest(self, name: str, number: int) -> AdapterVersion:
        if (name, number) not in self._manifests:
            self._manifests[name, number] = self._registry.read(name, number)
        return self._manifests[name, number]

    def _fits(self, version: AdapterVersion) -> bool:
        """Adapters made elsewhere do not tell their base; lowering checks their shapes."""
        return version.card.get("base_config_sha256", self._base_hash) == self._base_hash
