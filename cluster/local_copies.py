"""Local copies of adapters: made once, then reused; none that was touched since it was verified.

    CACHE/<content hash>/adapter_config.json, adapter_model.safetensors, …

Several processes may share the folder. Knows a registry, and nothing of what is in the files.
"""

from __future__ import annotations

import errno
import logging
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.adapter_folder import CONTENT, marks
from cluster.errors import CopyChangedError, StoreError
from cluster.registry import AdapterVersion, Registry, file_entry
from cluster.store import unwritable

_log = logging.getLogger("graft.copies")


class LocalCopies:
    """The copies under the folder `cache`; remembers which of them it has verified."""

    def __init__(self, registry: Registry, cache: Path) -> None:
        self._registry, self._cache = registry, cache
        self._verified: dict[Path, dict[str, tuple[int, ...] | None]] = {}

    def fetch(self, version: AdapterVersion, pause: Callable[[], None] = lambda: None) -> Path:
        """The folder with a verified copy. One that this process has not seen yet, or that was
        touched since, is verified again, and made anew if it is not what it was.

        Args:
            pause: Called between small pieces of the work, for who fetches beside other work.

        Raises:
            AdapterError: the store's own copy is damaged.
            StoreError: the cache cannot be written or read.
        """
        target = self._cache / version.content_hash
        if self._is_sound(version, target, pause):
            return target
        try:
            is_changed = target.exists()
            self._cache.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=self._cache))
        except OSError as error:
            raise unwritable(f"cache {self._cache}", error) from error
        if is_changed:
            _log.warning("adapter %s: its copy %s was changed; fetched anew", version.ref, target)
        try:
            fresh = scratch / "fresh"
            fresh.mkdir(mode=0o700)
            self._registry.download(version, fresh, pause)
            if is_changed:
                with suppress(FileNotFoundError):  # somebody beside us moved it away
                    target.rename(scratch / "changed")
            hashed = marks(fresh, CONTENT)  # what is written from here on was never verified
            fresh.rename(target)
            self._verified[target] = hashed
        except OSError as error:
            # Otherwise somebody beside us was faster, with the same bytes.
            if not self._is_sound(version, target, pause):
                raise unwritable(f"cache {target}", error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target

    def check(self, folder: Path) -> None:
        """Raise CopyChangedError if a copy of `fetch` was touched since, or is made anew now."""
        if self._verified.get(folder) != marks(folder, CONTENT):
            raise CopyChangedError(
                f"adapter copy {folder}: was changed while it was read; ask again, and it is "
                "fetched anew"
            )

    def _is_sound(self, version: AdapterVersion, folder: Path, pause: Callable[[], None]) -> bool:
        """Whether a local copy holds the version's config and weights."""
        try:
            found = marks(folder, CONTENT)
            if self._verified.get(folder) == found:
                return True
            if not all(
                mark is not None
                and stat.S_ISREG(mark[0])
                and file_entry(folder / file, pause) == version.files[file]
                for file, mark in found.items()
            ):
                return False
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.EIO):  # nothing is told of it
                raise StoreError(f"cache {folder}: cannot be read ({error.strerror})") from error
            return False
        self._verified[folder] = found
        return True
