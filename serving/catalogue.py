"""Which models a request can name now: the base, and every adapter of the store made for it.

A snapshot of the store's keys is taken at most every few seconds, whatever is asked, so unknown
names cost nothing and new versions are seen without a restart. Manifests never change and are
kept. Used from several threads.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import AdapterError, GraftError, ModelNotFoundError
from cluster.registry import AdapterVersion, Catalog, Registry
from cluster.spec import nearest


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

    def resolve(self, model: str) -> AdapterVersion | None:
        """The adapter version that `model` means now, or None for the base.

        Raises:
            ModelNotFoundError: naming what is nearest.
            AdapterError: the adapter was trained on another base.
        """
        if model == self.base_name:
            return None
        catalog = self._catalog()
        found = catalog.find(model)
        if found is None:
            hint = nearest(model[:120], [self.base_name, *catalog.versions])
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

    def adapters(self) -> Mapping[str, AdapterVersion]:
        """The newest version of each adapter that fits the base, by name."""
        newest = {n: self._manifest(n, v[-1]) for n, v in self._catalog().versions.items()}
        return {name: version for name, version in newest.items() if self._fits(version)}

    def _catalog(self) -> Catalog:
        with self._lock:
            snapshot = self._snapshot
            if snapshot is None or time.monotonic() - snapshot.at > self._ttl_s:
                try:
                    catalog = self._registry.catalog()
                except GraftError:
                    if snapshot is None:
                        raise
                    catalog = snapshot.catalog  # a store that is away takes nothing from us
                snapshot = self._snapshot = _Snapshot(time.monotonic(), catalog)
            return snapshot.catalog

    def _manifest(self, name: str, number: int) -> AdapterVersion:
        if (name, number) not in self._manifests:
            self._manifests[name, number] = self._registry.read(name, number)
        return self._manifests[name, number]

    def _fits(self, version: AdapterVersion) -> bool:
        """Adapters made elsewhere do not tell their base; lowering checks their shapes."""
        return version.card.get("base_config_sha256", self._base_hash) == self._base_hash
