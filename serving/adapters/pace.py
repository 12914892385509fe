"""Lowering beside a running engine: a thread that works in short slices and rests in between.

A step is some thousand calls into torch, each of which gives up the interpreter's lock and takes it
back; a thread that lowers an adapter, mostly Python, would make it wait there time and again, and
on few cores it would take one from the step's products. Slices bound what one step can lose.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

_SLICE_S = 0.001  # of CPU time
_SHARE = 0.2  # of a core
_own = threading.local()


class _Pace:
    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._ends_s = time.thread_time() + _SLICE_S

    def rest(self) -> None:
        """Sleep if a slice is over and somebody could use the time."""
        if time.thread_time() < self._ends_s:
            return
        if self._is_busy():
            time.sleep(_SLICE_S / _SHARE - _SLICE_S)
        self._ends_s = time.thread_time() + _SLICE_S


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
