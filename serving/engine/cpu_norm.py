"""The kernel of rms_norm.cpp, in place of the forward of those modules that compute the same.

Families name and round this norm in their own ways, so it is not the class that tells: a module is
tried on random rows with random weights, and keeps its own forward where no form of the kernel
gives the same. Weights are read at each call, since adapters replace them.

T rows    H hidden
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.native import kernels

_SOURCE = Path(__file__).with_name("rms_norm.cpp")
_TYPES = [
    *[ctypes.c_void_p] * 3,
    *[ctypes.c_int64] * 2,
    *[ctypes.c_float] * 2,
    ctypes.c_bool,
    ctypes.c_int,
]
_kernel = kernels(_SOURCE, "norm", _TYPES)
# How large a row is that a module is tried on: usual, so that epsilon counts, and large.
_SIZES = (1.0, 1e-3, 30.0) * 8
# In units of the dtype: another order of summing may round an element otherwise, twice.
_TOLERANCE, _ROUNDED_OTHERWISE = 4, 5e-3


@dataclass(frozen=True)
class Form:
    """y = x / sqrt(mean(x²) + epsilon) * (weight + offset), rounded to the dtype of x at the end
    and, if `rounds_first`, before the weight."""

    epsilon: float
    offset: float
    rounds_first: bool

    def norm(self, x: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H], of one dtype with the weight, for which there is a kernel."""
        x, weight_H = x.contiguous(), weight_H.contiguous()
        y = torch.empty_like(x)
        size = x.shape[-1]
        _kernel(x.dtype)(
            *(y.data_ptr(), x.data_ptr(), weight_H.data_ptr()),
            *(x.numel() // size, size),
            *(self.epsilon, self.offset, self.rounds_first),
            torch.get_num_threads(),
        )
        return y


def runs(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this dtype."""
    return _kernel(dtype) is not None


def adopt_norms(model: torch.nn.Module) -> set[torch.nn.Module]:
    """Give every module of `model` that is such a norm, on CPU, the kernel's forward, for inference
    alone, and return them. Parameters, hooks and names stay."""
    adopted: set[torch.nn.Module] = set()
    for module in model.modules():
        form = form_of(module)
        if form is not None:
            module.forward = _forward(module, form)
            adopted.add(module)
    return adopted


@torch.inference_mode()
def form_of(module: torch.nn.Module) -> Form | None:
    """What a module computes, as the kernel has it; None if that is something else."""
    weight = dict(module.named_parameters()).get("weight")
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.ndim != 1 or not len(weight) or not isinstance(epsilon, float):
        return None
    others = len(list(module.parameters())) > 1 or any(True for _ in module.buffers())
    if others or weight.device.type != "cpu" or not runs(weight.dtype):
        return None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(_SIZES), len(weight), generator=generator) + 0.5
    x = (rows * torch.tensor(_SIZES)[:, None]).to(weight.dtype)
    tried_H = torch.randn(len(weight), generator=generator).to(weight.dtype)
    expected = _own(module, x, tried_H)
    if expected is None or (expected.shape, expected.dtype) != (x.shape, x.dtype):
        return None
    # Llama, Gemma, OLMo 2, and those that came after them.
    forms = [Form(epsilon, *form) for form in ((0.0, True), (1.0, False), (0.0, False))]
    away = [_away(form.norm(x, tried_H), expected) for form in forms]
    nearest = min(range(len(forms)), key=lambda i: float(away[i].mean()))
    is_same = away[nearest].max() <= _TOLERANCE * torch.finfo(x.dtype).eps
    if x.dtype != torch.float32:  # the same roundings, but for sums that lie between two
        is_same &= (away[nearest] > 0).sum() <= max(1, _ROUNDED_OTHERWISE * x.numel())
    return forms[nearest] if is_same else None


def _own(module: torch.nn.Module, x: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor | None:
    """What the module makes of `x` with that weight; None if it cannot be asked so."""
    module.__dict__["weight"] = weight_H  # hides the parameter
    try:
        output = module.forward(x)
    except Exception:  # whatever it wants, it is not this
        return None
    finally:
        del module.__dict__["weight"]
    return output if isinstance(output, torch.Tensor) else None


def _away(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far each element is from the expected one, as a share of it."""
    size = expected.double().abs().clamp_min(torch.finfo(expected.dtype).tiny)
    return (found.double() - expected.double()).abs() / size


def _forward(module: torch.nn.Module, form: Form) -> Callable[..., Any]:
    own = module.forward

    def forward(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        weight_H: Any = module.weight
        if args or options or x.dtype is not weight_H.dtype or x.shape[-1] != len(weight_H):
            return own(x, *args, **options)
        return form.norm(x, weight_H)

    return forward
