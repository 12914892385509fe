"""Loading beside a running engine: threads that work in short slices and rest in between.

A step is some thousand calls into torch, each of which gives up the interpreter's lock and takes it
back; a thread that lowers an adapter, mostly Python, would make it wait there time and again, and
on few cores it would take one from the step's products. Slices bound what one step can lose; one
module is the least of them, however long it takes. Threads that load at the same time take turns,
so that they cost no more than one, and a slow adapter does not hold up the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

_SLICE_S = 0.001  # of CPU time
_LONGEST_REST_S = 0.1
_own = threading.local()


class Pace:
    """That of all threads which load beside one engine.

    Args:
        is_busy: Whether the engine could use the time.
        share: Of a core, that all the threads together may take then.
    """

    def __init__(self, is_busy: Callable[[], bool], share: float) -> None:
        self._is_busy, self._share = is_busy, share
        self._lock = threading.Lock()
        self._free_s = 0.0  # when nobody's slice is due any more

    @contextmanager
    def kept(self) -> Generator[None]:
        """The scope in which this thread's calls of `give_way` rest."""
        _own.pace, _own.began_s = self, time.thread_time()
        try:
            yield
        finally:
            _own.pace = None

    def rest(self, used_s: float) -> None:
        """Sleep, if the engine is busy, for what a slice of so much CPU time costs."""
        if not self._is_busy():
            return
        with self._lock:
            now_s = time.monotonic()
            begins_s = max(
                now_s + min(_LONGEST_REST_S, used_s / self._share - used_s), self._free_s
            )
            # A turn is as long for a slice that was far too long: that is its own thread's to pay.
            self._free_s = max(now_s, self._free_s) + _SLICE_S / self._share
        time.sleep(begins_s - now_s)


def give_way() -> None:
    """To be called for every module that is lowered, and every small piece that is fetched."""
    pace: Pace | None = getattr(_own, "pace", None)
    if pace is None:
        return
    used_s = time.thread_time() - _own.began_s
    if used_s >= _SLICE_S:
        pace.rest(used_s)
        _own.began_s = time.thread_time()
