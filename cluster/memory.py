"""This process's memory: how it keeps what tensors have freed, and its peak.

glibc hands large freed blocks back to the kernel at once, and each new one comes as zeroed pages,
one page fault for 4 KiB: on CPU an elementwise operation then waits longer for its memory than it
computes. A step allocates the same sizes again and again, so they are kept instead.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

# Of <malloc.h>; the values are the largest that glibc takes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT_BYTES, _PAD_BYTES, HEAP_BLOCK_BYTES = 2**31 - 1, 2**26, 2**25


def keep_freed_memory() -> None:
    """Let blocks of up to 32 MiB be used again by this process; no effect outside glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_TOP_PAD, _PAD_BYTES)


def peak_memory_mib() -> float:
    """The most memory that this process had so far, in MiB: its resident set, not a GPU's."""
    try:
        # ru_maxrss begins with that of the process which started this one.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        pass
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
