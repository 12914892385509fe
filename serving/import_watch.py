"""Looks at a store's import prefix while a gateway runs; see cluster.imports."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from cluster.errors import GraftError
from cluster.imports import Imports
from cluster.registry import Registry

_log = structlog.get_logger("graft.imports")


class ImportWatch:
    """A thread that looks every `period_s`, until `stop`.

    Args:
        on_import: Called after a look that registered something.
    """

    def __init__(
        self, registry: Registry, *, period_s: float, on_import: Callable[[], None]
    ) -> None:
        self._imports, self._period_s, self._on_import = Imports(registry), period_s, on_import
        self._failures: dict[str, str] = {}  # told already, by folder; "" is the prefix
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="imports", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the look in progress."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._period_s):
            try:
                self._tell(self._look())
            except Exception as error:
                self._tell({"": error.message if isinstance(error, GraftError) else repr(error)})

    def _tell(self, failures: dict[str, str]) -> None:
        """Log what failed; what was told at the last look, not again."""
        for name, text in failures.items():
            if self._failures.get(name) != text:
                _log.warning("imports cannot be looked at", name=name, error=text)
        self._failures = failures

    def _look(self) -> dict[str, str]:
        """One look; what failed in it."""
        look = self._imports.look()
        for version in look.imported:
            _log.info("adapter imported", adapter=version.ref, method=version.method)
        for name, reason in look.refused.items():
            _log.warning("import refused", name=name, error=reason)
        for name, file in look.waiting.items():
            _log.info("import is not whole", name=name, missing=file)
        if look.imported:
            self._on_import()
        return look.failed
