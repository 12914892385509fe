"""The kernel of low_rank.cpp: what many adapters add to one module's output, in one call.

T tokens    I in    O out    r rank
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.native import kernels
from serving.adapters.primitives import LinearDelta

# Of one adapter; for more, two products are faster (docs/log.md).
_MOST_TOKENS = 64
_SOURCE = Path(__file__).with_name("low_rank.cpp")
_TYPES = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, ctypes.c_int]
_kernel = kernels(_SOURCE, "add", _TYPES)


class _Segment(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("start", "end", "rank", "a", "b")),
        ("factor", ctypes.c_double),
        ("low", ctypes.c_int64),
    )


@dataclass(frozen=True)
class LowRankRows:
    """Tokens from `start` to `end` (excluded) and what each adds to them, as the kernel reads it.
    It holds what it points to."""

    table: Any
    deltas: Sequence[LinearDelta]
    tokens: int  # the last one's number, and one

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y += factor (x A) B on the rows of each delta, in place: y [..., O] contiguous, x [...,
        I], of the deltas' dtype."""
        x = x.contiguous()
        assert self.tokens * y.shape[-1] <= y.numel(), "a step's rows are those it was made of"
        _kernel(y.dtype)(
            y.data_ptr(),
            x.data_ptr(),
            self.table,
            len(self.table),
            x.shape[-1],
            y.shape[-1],
            torch.get_num_threads(),
        )


def ready(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a kernel; it is compiled when first asked, which takes seconds."""
    return device.type == "cpu" and _kernel(dtype) is not None


def takes(delta: LinearDelta, tokens: int, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether x A B of so many tokens of this delta, from x [..., I] onto y [..., O], is the
    kernel's to compute."""
    low_rank = delta.low_rank
    return (
        low_rank is not None
        and tokens <= _MOST_TOKENS
        and low_rank.fits(x, y)
        and ready(y.dtype, y.device)
    )


def together(parts: Sequence[tuple[int, int, LinearDelta]]) -> LowRankRows:
    """What the kernel needs to know of (start, end, delta)."""
    table = (_Segment * len(parts))()
    low = 0
    for entry, (start, end, delta) in zip(table, parts, strict=True):
        own = delta.low_rank
        assert own is not None
        a, b, rank = own.a, own.b, own.rank
        entry.start, entry.end, entry.rank, entry.a, entry.b = start, end, rank, a, b
        entry.factor, entry.low = delta.factor, low
        low += (end - start) * rank
    return LowRankRows(table, [d for *_, d in parts], max(end for _, end, _ in parts))
