"""Linear modules on CPU through oneDNN, and through our own kernel where weights stay.

torch gives float32 products to MKL, which on AMD processors with AVX-512 reaches half of what
oneDNN does, and a fraction of it for thin ones (docs/log.md); oneDNN is in every build of torch,
behind the operator that compiled models use. Other devices and dtypes go torch's own way.

    T rows    I in    O out
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear as torch_linear
from transformers.pytorch_utils import Conv1D as _Conv1D

from cluster.packed_product import PackedWeight, packed

# Below so many multiplications the operator costs more than it saves.
_LEAST_PRODUCTS = 2**19
# What oneDNN lays its copies out for.
_DECODING_ROWS = 32
# What oneDNN compiles for a shape takes about 1 MiB, and rows come in any number; two caches of it
# hold 1,024 each. They read their size at the first product.
KEPT_SHAPES = 128
for _cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, str(KEPT_SHAPES))
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear`, computed by `linear`, or by what `pack` made of its weight."""

    packed: PackedWeight | torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        return _forward(self, input, self.weight)


class Conv1D(_Conv1D):
    """transformers' linear module with its weight the other way round, computed likewise."""

    packed: PackedWeight | torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        weight_OI = self.weight.T
        if self.packed is None and not _suits(x, weight_OI):
            return super().forward(x)
        return _forward(self, x, weight_OI)


_OURS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Linear: Linear,
    _Conv1D: Conv1D,
}


def adopt(model: torch.nn.Module) -> None:
    """Let every plain linear module of `model` compute by `linear`; parameters, hooks and names
    stay."""
    for module in model.modules():
        module.__class__ = _OURS.get(type(module), type(module))


def pack(model: torch.nn.Module) -> None:
    """Give every adopted linear module of `model` a copy of its weight for a kernel of ours:
    for inference alone, with weights that stay. Where there is no such kernel, the copy is oneDNN's
    own for few rows; elsewhere than on CPU there is none."""
    for module in model.modules():
        if isinstance(module, (Linear, Conv1D)) and module.weight.device.type == "cpu":
            weight = module.weight.detach()
            weight_OI = weight if isinstance(module, Linear) else weight.T
            module.packed = packed(weight_OI)
            if module.packed is None and _HAS_ONEDNN and weight.dtype in _packable():
                reorder = torch.ops.mkldnn._reorder_linear_weight
                module.packed = reorder(weight_OI.contiguous(), _DECODING_ROWS)


def _packable() -> tuple[torch.dtype, ...]:
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32, torch.bfloat16
    return (torch.float32,)


def is_plain(module: torch.nn.Module) -> bool:
    """Whether it is a linear module and no more (none that is quantised, or wrapped)."""
    return type(module) in _OURS or type(module) in _OURS.values()


def linear(
    x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """x Wᵀ + b: [..., I] -> [..., O], differentiable once."""
    if not _suits(x, weight_OI):
        return torch_linear(x, weight_OI, bias_O)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight_OI, bias_O)
    ):
        # Flat, as oneDNN's result of any other shape is a view, which autograd lets nobody add to.
        output_TO: Any = _Linear.apply(x.reshape(-1, x.shape[-1]), weight_OI, bias_O)
        return output_TO.view(*x.shape[:-1], output_TO.shape[-1])
    return _product(x, weight_OI, bias_O)


def product(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x Wᵀ of any two matrices, without a graph."""
    if not _suits(x_TI, weight_OI):
        return x_TI @ weight_OI.T
    return _product(x_TI, weight_OI, None)


def _forward(module: Any, x: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    # An attribute that hides the parameter is somebody's replacement of it.
    if module.packed is None or "weight" in vars(module) or x.dtype is not weight_OI.dtype:
        return linear(x, weight_OI, module.bias)
    if isinstance(module.packed, PackedWeight):
        return module.packed.product(x, module.bias)
    return _product(x, module.packed, module.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x_TI if needs_weight else None, weight_OI if needs_x else None)
        return _product(x_TI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        grad_TO = grads[0]
        grad_x = grad_weight = grad_bias = None
        if weight_OI is not None:
            grad_x = product(grad_TO, weight_OI.T)
        if x_TI is not None:
            grad_weight = product(grad_TO.T, x_TI.T)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_TO.sum(0)
        return grad_x, grad_weight, grad_bias


def _suits(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and x.dtype is weight_OI.dtype is torch.float32
        and x.device.type == weight_OI.device.type == "cpu"
        and x.numel() * weight_OI.shape[0] >= _LEAST_PRODUCTS
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
    return output
