"""The kernel of paged_attention.cpp, for tensors.

B decoding rows    S context slots    H heads    K key/value heads    D head size
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from cluster.native import kernels

_SOURCE = Path(__file__).with_name("paged_attention.cpp")
_TYPES = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 5 + [ctypes.c_float, ctypes.c_int]
_kernel = kernels(_SOURCE, "attend", _TYPES)


def runs(query: torch.Tensor, memory: torch.Tensor) -> bool:
    """Whether there is a kernel for this query and keys and values that lie there."""
    if memory.device.type != "cpu" or query.dtype is not memory.dtype:
        return False
    return _kernel(memory.dtype) is not None


def attend(
    query_BHD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots_BS: torch.Tensor,
    starts_B: torch.Tensor,
    lengths_B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """What each row sees in its slots from `starts_B` to `lengths_B` (excluded), [B, H, D].

    Args:
        keys, values: [slots, K, D], contiguous, of the query's dtype.
        slots_BS, starts_B, lengths_B: int64; each row sees one slot at least.
    """
    query_BHD, slots_BS = query_BHD.contiguous(), slots_BS.contiguous()
    output_BHD = torch.empty_like(query_BHD)
    rows, heads, size = query_BHD.shape
    tensors = (output_BHD, query_BHD, keys, values, slots_BS, starts_B, lengths_B)
    kv_heads = keys.shape[1]
    _kernel(query_BHD.dtype)(
        *(tensor.data_ptr() for tensor in tensors),
        *(rows, slots_BS.shape[1], kv_heads, heads // kv_heads, size),
        scaling,
        torch.get_num_threads(),
    )
    return output_BHD
