"""A linear module whose weight bitsandbytes keeps in 4 or 8 bits: one arithmetic everywhere.

    y = x Wᵀ + b, with W unpacked into x's dtype for this product, and again in backward

bitsandbytes' own modules do more. In evaluation on some CPUs the 4-bit one re-packs its weight in
place for a kernel in bf16 that has no backward and does not take every shape; the 8-bit one rounds
activations to int8, so that what a row gives hangs on a rounding; and both cast a bias in place to
the dtype of their input. Here training, evaluation and serving get the same values from the same
weight, row by row, and a bias that is trained in fp32 stays so.

    I in    O out
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch

from cluster.linear import linear

_INT8_MAX = 127.0


class _Int8Linear(torch.autograd.Function):
    """y = x Wᵀ with W = scale_O ∘ weight_OI / 127, frozen."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor
    ) -> torch.Tensor:
        """[T, I] -> [T, O], in x's dtype."""
        ctx.save_for_backward(weight_OI, scale_O)
        return linear(x_TI, _from_int8(weight_OI, scale_O, x_TI.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of x."""
        weight_OI, scale_O = ctx.saved_tensors
        return grads[0] @ _from_int8(weight_OI, scale_O, grads[0].dtype), None, None


def _from_int8(weight_OI: torch.Tensor, scale_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight_OI.to(dtype).mul_(scale_O[:, None] / _INT8_MAX)


def settle(model: torch.nn.Module) -> None:
    """Let every quantised module of a model that was just loaded compute as this file says."""
    module: Any
    for module in model.modules():
        if is_quantized(module):
            if hasattr(module, "init_8bit_state"):
                module.init_8bit_state()  # the scales go from the weight to module.state
                module.state.CB = None  # the weight again, which copies of a module would copy
            module.forward = MethodType(_forward, module)


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether it is a linear module of bitsandbytes'; PEFT's wrappers have the same names."""
    kind = type(module)
    is_theirs = kind.__module__.partition(".")[0] == "bitsandbytes"
    return is_theirs and kind.__name__ in ("Linear4bit", "Linear8bitLt")


def was_transposed(module: Any) -> bool:
    """Whether the plain module, whose place this quantised one has, held its weight as [I, O]."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(module.source_cls, Conv1D)


@torch.no_grad()
def unpacked_weight(module: Any) -> torch.Tensor:
    """The weight of a quantised module, [O, I], float32 on its device; never one that stands in
    its place for a call."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = dict(module.named_parameters(recurse=False))["weight"]
    if (state := getattr(weight, "quant_state", None)) is None:
        return _from_int8(weight.data, module.state.SCB, torch.float32)
    state = copy.copy(state)
    state.dtype = torch.float32  # it remembers that of the weight before
    return dequantize_4bit(weight.data, state)


def numel(parameter: Any) -> int:
    """How many numbers a parameter stands for: two in each byte of a 4-bit one; of a shard those
    of the whole."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(torch.Size(state.shape).numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    from bitsandbytes import matmul_4bit  # pyright: ignore[reportPrivateImportUsage]

    device, weight, bias = x.device.type, module.weight, module.bias
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if weight.is_floating_point():  # one that stands in the place of its own for this call
        y = linear(x, weight.to(x.dtype))
    elif (state := getattr(weight, "quant_state", None)) is not None:
        y = matmul_4bit(x, weight, quant_state=state)
    else:
        # Flat: a view that a function makes itself, nobody may add to in place.
        y_TO = _Int8Linear.apply(x.reshape(-1, x.shape[-1]), weight.data, module.state.SCB)
        y = y_TO.view(*x.shape[:-1], y_TO.shape[-1])
    return y if bias is None else y + bias.to(y.dtype)
