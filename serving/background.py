"""Threads for work that must not slow the engine's steps: loading adapters, compiling grammars."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

# Steps below the process's own: a third of the share of its other threads. No more: a thread that
# waits for a core may hold the interpreter's lock, and the engine's would wait with it.
_NICENESS, _MOST = 5, 19


def background(name: str, threads: int) -> ThreadPoolExecutor:
    """Threads that take the cores that others leave; work waits in order of its arrival.
    The threads end with the object."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_give_way)


def _give_way() -> None:
    # Elsewhere the calls are about the whole process.
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    own = os.getpriority(os.PRIO_PROCESS, 0)  # Ray's workers have 15 of their own accord
    os.setpriority(os.PRIO_PROCESS, thread, min(_MOST, own + _NICENESS))
    # Its operators would have threads of their own, as many as the steps'. torch says how many when
    # a thread first asks, and for the whole process where it is told.
    torch.get_num_threads()
    limit = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if limit is not None:
        limit(1)
