"""Lowering beside a running engine: a thread that works in short slices and rests in between.

A step is some thousand calls into torch, each of which gives up the interpreter's lock and takes it
back; a thread that lowers an adapter, mostly Python, would make it wait there time and again, and
on few cores it would take one from the step's products. Slices bound what one step can lose; one
module is the least of them, however long it takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

_SLICE_S = 0.001  # of CPU time
_SHARE = 0.2  # of a core
_LONGEST_REST_S = 0.1
_own = threading.local()


class _Pace:
    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._began_s = time.thread_time()

    def rest(self) -> None:
        """Sleep if a slice is over and somebody could use the time."""
        used_s = time.thread_time() - self._began_s
        if used_s < _SLICE_S:
            return
        if self._is_busy():
            time.sleep(min(_LONGEST_REST_S, used_s / _SHARE - used_s))
        self._began_s = time.thread_time()


@contextmanager
def beside(is_busy: Callable[[], bool]) -> Generator[None]:
    """The scope in which this thread's calls of `give_way` rest, while `is_busy`."""
    _own.pace = _Pace(is_busy)
    try:
        yield
    finally:
        _own.pace = None


def give_way() -> None:
    """To be called for every module that is lowered."""
    pace: _Pace | None = getattr(_own, "pace", None)
    if pace is not None:
        pace.rest()
