"""A frozen linear module and its LoRA in one pass, for training.

    T tokens    I in    O out    r rank

PEFT computes W x, then B A x, then scales it, then adds it: three tensors [T, O] of which none is
needed. Here the update is added in place, and so is its share of the input's gradient, so a
targeted module costs its own products and little more. Only plain LoRAs take this way (no dropout,
no DoRA, no bias, nothing hooked in between); all others stay PEFT's. Where several adapters share
a pass (training.several), each LoRA has its own segment of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from cluster.linear import is_plain, linear, product


class Segment(NamedTuple):
    """One LoRA's tokens, from `start` up to `end` in T, and its scale."""

    start: int
    end: int
    scale: float


def lora_linear(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    segments: Sequence[Segment],
    *factors: torch.Tensor,
) -> torch.Tensor:
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ, with W and b frozen: [..., I] -> [..., O]. A [r, I], B [O, r] and
    s are those of each segment; `factors` are A and B in turn.

    Computed in W's dtype; every A and B gets gradients of its own.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    y_TO: torch.Tensor = _LoraLinear.apply(x_TI, weight_OI, bias_O, segments, *factors)
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


class _LoraLinear(torch.autograd.Function):
    """Of flat tensors: a view that a function makes itself, nobody may add to in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        segments: Sequence[Segment],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """See `lora_linear`."""
        ctx.x_dtype = x_TI.dtype
        x_TI = x_TI.to(weight_OI.dtype)
        y_TO = linear(x_TI, weight_OI, bias_O)
        lows: list[torch.Tensor] = []
        for (start, end, scale), a_rI, b_Or in zip(
            segments, factors[::2], factors[1::2], strict=True
        ):
            low_Tr = product(x_TI[start:end], a_rI.to(weight_OI.dtype))
            y_TO[start:end].addmm_(low_Tr, b_Or.to(weight_OI.dtype).T, alpha=scale)
            lows.append(low_Tr)
        ctx.save_for_backward(x_TI, weight_OI, *factors, *lows)
        ctx.segments = segments
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, and of each A and B."""
        x_TI, weight_OI, *rest = ctx.saved_tensors
        dtype, count = weight_OI.dtype, len(ctx.segments)
        factors, lows = rest[: 2 * count], rest[2 * count :]
        grad_TO = grads[0].to(dtype)
        grad_TI = product(grad_TO, weight_OI.T) if ctx.needs_input_grad[0] else None
        found: list[torch.Tensor] = []
        for (start, end, scale), a_rI, b_Or, low_Tr in zip(
            ctx.segments, factors[::2], factors[1::2], lows, strict=True
        ):
            own_TO = grad_TO[start:end]
            # Scaled here, where it is [T, r].
            grad_Tr = product(own_TO, b_Or.to(dtype).T).mul_(scale)
            found.append(product(grad_Tr.T, x_TI[start:end].T).to(a_rI.dtype))
            found.append(product(low_Tr.T, own_TO.T).mul_(scale).T.to(b_Or.dtype))
            if grad_TI is not None:
                grad_TI[start:end].addmm_(grad_Tr, a_rI.to(dtype))
        return None if grad_TI is None else grad_TI.to(ctx.x_dtype), None, None, None, *found


def fuse_loras(model: torch.nn.Module) -> None:
    """Let every plain LoRA on a linear module of `model` run as `lora_linear`.

    Not where parameters are sharded (ZeRO 3): they are whole only inside their own modules.
    """
    from peft.tuners.lora import Linear as LoraModule

    for module in model.modules():
        if type(module) is LoraModule and is_plain(module.base_layer):
            module.forward = MethodType(_forward, module)


def _forward(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`peft.tuners.lora.Linear.forward`, fused where it is plain at this call."""
    lora = plain_lora(module) if not (args or kwargs) else None
    if lora is None:
        return type(module).forward(module, x, *args, **kwargs)
    *factors, scale = lora
    whole = Segment(0, x.numel() // x.shape[-1], scale)
    return lora_linear(x, *weight_and_bias(module.base_layer), (whole,), *factors)


def weight_and_bias(linear_module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(W [O, I], b [O] or None) of a Linear or a Conv1D."""
    weight = linear_module.weight
    return weight.T if isinstance(linear_module, Conv1D) else weight, linear_module.bias


def plain_lora(module: Any) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A, B and the scale of a `peft.tuners.lora.Linear`'s one LoRA, or None where PEFT would do
    more than add it."""
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return None
    name = module.active_adapters[0]
    if name not in module.lora_A or name in module.lora_variant:
        return None
    a, b, base = module.lora_A[name], module.lora_B[name], module.base_layer
    dropout = module.lora_dropout[name]
    adds_only = (
        type(a) is type(b) is torch.nn.Linear
        and a.bias is None
        and b.bias is None
        and not any(_is_hooked(part) for part in (a, b, base))
        and not any(parameter.requires_grad for parameter in base.parameters())
        and (isinstance(dropout, torch.nn.Identity) or not module.training)
    )
    return (a.weight, b.weight, module.scaling[name]) if adds_only else None


def _is_hooked(module: torch.nn.Module) -> bool:
    own = vars(module)
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
