"""The kernel of packed_product.cpp, for tensors.

T rows    I in    O out
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import pad

from cluster.native import kernels

_PANEL = 32
_SOURCE = Path(__file__).with_name("packed_product.cpp")
# How many inputs of one output lie together.
_DEPTHS = {torch.float32: 1, torch.bfloat16: 2}
_TYPES = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3, ctypes.c_int]
_kernel = kernels(_SOURCE, "product", _TYPES)


@dataclass(frozen=True)
class PackedWeight:
    """A copy of a weight [O, I] as the kernel reads it."""

    values: torch.Tensor
    in_features: int
    out_features: int

    def product(self, x: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        """x Wᵀ + b for x [..., I] of the weight's dtype: [..., O]."""
        assert x.shape[-1] == self.in_features
        assert x.dtype is self.values.dtype
        x = x.contiguous()
        bias_O = None if bias_O is None else bias_O.to(x.dtype).contiguous()
        y = x.new_empty((*x.shape[:-1], self.out_features))
        _kernel(x.dtype)(
            y.data_ptr(),
            x.data_ptr(),
            self.values.data_ptr(),
            None if bias_O is None else bias_O.data_ptr(),
            y.numel() // self.out_features,
            self.in_features,
            self.out_features,
            torch.get_num_threads(),
        )
        return y


def packed(weight_OI: torch.Tensor) -> PackedWeight | None:
    """A packed copy; None where there is no kernel for it."""
    outputs, inputs = weight_OI.shape
    if weight_OI.device.type != "cpu" or _kernel(weight_OI.dtype) is None:
        return None
    depth = _DEPTHS[weight_OI.dtype]
    if inputs % depth or not inputs:
        return None
    panels = -(-outputs // _PANEL)
    whole = pad(weight_OI, (0, 0, 0, panels * _PANEL - outputs))
    values = whole.view(panels, _PANEL, inputs // depth, depth).transpose(1, 2).contiguous()
    return PackedWeight(values, inputs, outputs)
