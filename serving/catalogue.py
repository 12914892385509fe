"""Which models a request can name now: the base, and every adapter of the store made for it.

A snapshot of the store's keys is taken at most every few seconds, whatever is asked, so unknown
names cost nothing and new versions are seen without a restart. Manifests never change and are
kept. Used from several threads.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from cluster.catalog import Catalog
from cluster.errors import AdapterError, GraftError, ModelNotFoundError, RequestError
from cluster.mixes import AdapterMix, NamedAdapter, check_mixable, parse_mix
from cluster.registry import AdapterVersion, Registry
from cluster.spec import nearest

_log = structlog.get_logger("graft.catalogue")
_AT_ONCE = 0.9  # of a snapshot's time, so that it is not over before the next call


@dataclass(frozen=True)
class _Snapshot:
    at: float
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
        self._manifests: dict[tuple[str, int], AdapterVersion] = {}

    def resolve(
        self, model: str, allows: Callable[[str], bool] = lambda _: True
    ) -> NamedAdapter | None:
        """The adapter version, or mix of versions, that `model` means now, or None for the base.

        Args:
            allows: Whether the asker may know of the base or adapter of a name. What is forbidden
                is as unknown as what does not exist.

        Raises:
            ModelNotFoundError: naming what is nearest.
            AdapterError: the adapter was trained on another base.
            RequestError: it is a mix, and none that can be.
        """
        parts = parse_mix(model)
        if parts is None:
            return self._resolve_one(model, allows)
        found: dict[str, tuple[AdapterVersion, float]] = {}
        for name, weight in parts:
            version = self._resolve_one(name, allows)
            if version is None or version.ref in found:
                wrong = "is the base" if version is None else f"is {version.ref} a second time"
                raise RequestError(
                    f"model {model[:120]!r}: {name!r} {wrong}; a mix is of different adapters",
                    param="model",
                )
            check_mixable(version)
            found[version.ref] = version, weight
        return AdapterMix(tuple(found[ref] for ref in sorted(found)))

    def is_at_hand(self, model: str, allows: Callable[[str], bool]) -> bool:
        """Whether `resolve`, called at once, finds it without a look at the store."""
        snapshot = self._snapshot
        is_fresh = snapshot is not None and self._is_fresh(snapshot, _AT_ONCE)
        catalog = snapshot.catalog if snapshot is not None and is_fresh else Catalog({}, {})

        def is_known(name: str) -> bool:
            if name == self.base_name:
                return allows(name)
            found = catalog.find(name)
            return found is not None and found in self._manifests and allows(found[0])

        return all(is_known(name) for name, _ in parse_mix(model) or [(model, 1.0)])

    def _resolve_one(self, model: str, allows: Callable[[str], bool]) -> AdapterVersion | None:
        if model == self.base_name and allows(model):
            return None
        catalog = self.catalog()
        found = catalog.find(model)
        if found is None or not allows(found[0]):
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

    def catalog(self) -> Catalog:
        """What is in the store now, or was when it last answered. Raises StoreError if it never
        did."""
        snapshot = self._snapshot
        if snapshot is not None and self._is_fresh(snapshot):
            return snapshot.catalog
        # One thread looks; the others wait only for the very first snapshot.
        if not self._lock.acquire(blocking=snapshot is None):
            assert snapshot is not None
            return snapshot.catalog
        try:
            if self._snapshot is not snapshot and self._snapshot is not None:
                return self._snapshot.catalog
            try:
                catalog = self._registry.catalog()
            except GraftError as error:
                if snapshot is None:
                    raise
                _log.warning("store does not answer", error=error.message)
                catalog = snapshot.catalog  # what was there is still served
            self._snapshot = _Snapshot(time.monotonic(), catalog)
            return catalog
        finally:
            self._lock.release()

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
        snapshot = self._snapshot
        if snapshot is not None:
            self._snapshot = _Snapshot(-math.inf, snapshot.catalog)

    def _is_fresh(self, snapshot: _Snapshot, share: float = 1.0) -> bool:
        return time.monotonic() - snapshot.at <= share * self._ttl_s

    def _manifest(self, name: str, number: int) -> AdapterVersion:
        if (name, number) not in self._manifests:
            self._manifests[name, number] = self._registry.read(name, number)
        return self._manifests[name, number]

    def _fits(self, version: AdapterVersion) -> bool:
        """Adapters made elsewhere do not tell their base; lowering checks their shapes."""
        return version.card.get("base_config_sha256", self._base_hash) == self._base_hash
