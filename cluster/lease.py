"""A lease on a folder of a store: one holder at a time, on storage that has no locks.

The holder adds a numbered key every few seconds and takes the one before it away; create-only
keys let one of several win a number. A key names its holder, since a create may land and be
reported as failed: who finds its own name has won. No clock is compared: who finds a key of
somebody else watches whether another follows. A holder that was stopped for so long that its lease
went to another finds its next number taken.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from cluster.errors import ConflictError, NotFoundError, StoreError
from cluster.store import Store

BEAT_S = 3.0
_MISSED = 3  # beats after which a holder counts as gone


@contextmanager
def held(store: Store, folder: str, what: str, *, beat_s: float = BEAT_S) -> Generator[Check]:
    """Hold the lease; yields what raises ConflictError once it is lost. Where a holder was killed,
    taking over waits three beats of `beat_s` seconds.

    Raises:
        ConflictError: somebody else holds it; `what` names the thing.
    """
    holder = secrets.token_bytes(16)
    number = _take(store, folder, what, beat_s, holder)
    over, lost = threading.Event(), threading.Event()

    def beat() -> None:
        nonlocal number
        while not over.wait(beat_s):
            try:
                _create(store, _key(folder, number + 1), holder)
            except ConflictError:
                lost.set()
                return
            except StoreError:
                continue  # the lease is lost only when somebody else takes it
            number += 1
            _drop(store, folder, number - 1)

    def check() -> None:
        if lost.is_set():
            raise _held(what)

    thread = threading.Thread(target=beat, name=f"lease {folder}", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        over.set()
        thread.join()
        if not lost.is_set():
            _drop(store, folder, number)


Check = Callable[[], None]


def _take(store: Store, folder: str, what: str, beat_s: float, holder: bytes) -> int:
    """The number of our first key."""
    while keys := store.list(folder):
        deadline = time.monotonic() + _MISSED * beat_s
        while (now := store.list(folder)) == keys:
            if time.monotonic() > deadline:
                number = int(keys[-1].rsplit("/", 1)[1]) + 1
                _claim(store, folder, number, what, holder)
                for key in keys:
                    store.delete(key)
                return number
            time.sleep(beat_s / 4)
        if now:
            raise _held(what)
    _claim(store, folder, 0, what, holder)
    return 0


def _claim(store: Store, folder: str, number: int, what: str, holder: bytes) -> None:
    try:
        _create(store, _key(folder, number), holder)
    except ConflictError as error:
        raise _held(what) from error


def _create(store: Store, key: str, holder: bytes) -> None:
    """Raises ConflictError where the key is somebody else's."""
    try:
        store.create(key, holder)
    except ConflictError:
        if _holder(store, key) != holder:
            raise


def _holder(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except NotFoundError:
        return None


def _drop(store: Store, folder: str, number: int) -> None:
    try:
        store.delete(_key(folder, number))
    except StoreError:
        return  # it is older than the one that counts, or goes stale


def _key(folder: str, number: int) -> str:
    return f"{folder}/{number:012d}"


def _held(what: str) -> ConflictError:
    return ConflictError(
        f"{what}: another call is writing it now; wait for it, or choose another output"
    )
