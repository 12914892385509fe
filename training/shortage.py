"""Whether an error says that memory did not suffice."""

from __future__ import annotations

import torch

# What allocators say that raise a plain RuntimeError.
_SAYINGS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def lacks_memory(error: Exception) -> bool:
    """Whether `error` comes of too little memory, the host's or the device's."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(part in str(error) for part in _SAYINGS)
