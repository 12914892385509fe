"""Threads for work that must not slow the engine's steps: loading adapters, compiling grammars."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

# Of Linux's 19, a third of the share of others. No more: a thread that waits for a core may hold
# the interpreter's lock, and the engine's would wait with it.
_NICENESS = 5


def background(name: str, threads: int) -> ThreadPoolExecutor:
    """Threads that take the cores that others leave; work waits in order of its arrival.
    The threads end with the object."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_give_way)


def _give_way() -> None:
    # Elsewhere the call is about the whole process.
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
