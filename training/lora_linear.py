"""A frozen linear module and its LoRA in one pass, for training.

    T tokens    I in    O out    r rank

PEFT computes W x, then B A x, then scales it, then adds it: three tensors [T, O] of which none is
needed. Here the update is added in place, and so is its share of the input's gradient, so a
targeted module costs its own products and little more. Only plain LoRAs take this way (no dropout,
no DoRA, no bias, nothing hooked in between); all others stay PEFT's.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D


class LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ, with W and b frozen.

    Computed in W's dtype; A and B get gradients of their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_rI: torch.Tensor,
        b_Or: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """x [..., I] -> [..., O]."""
        x_TI = x.reshape(-1, x.shape[-1]).to(weight_OI.dtype)
        low_Tr = x_TI @ a_rI.to(weight_OI.dtype).T
        y_TO = linear(x_TI, weight_OI, bias_O)
        y_TO.addmm_(low_Tr, b_Or.to(weight_OI.dtype).T, alpha=scale)
        ctx.save_for_backward(x_TI, weight_OI, a_rI, b_Or, low_Tr)
        ctx.scale, ctx.x = scale, (x.shape, x.dtype)
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B."""
        x_TI, weight_OI, a_rI, b_Or, low_Tr = ctx.saved_tensors
        grad_TO = grads[0].reshape(-1, weight_OI.shape[0]).to(weight_OI.dtype)
        # Scaled here, where it is [T, r].
        grad_Tr = (grad_TO @ b_Or.to(weight_OI.dtype)).mul_(ctx.scale)
        grad_a_rI = (grad_Tr.T @ x_TI).to(a_rI.dtype)
        grad_b_Or = (low_Tr.T @ grad_TO).mul_(ctx.scale).T.to(b_Or.dtype)
        grad_x: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            shape, dtype = ctx.x
            grad_TI = (grad_TO @ weight_OI).addmm_(grad_Tr, a_rI.to(weight_OI.dtype))
            grad_x = grad_TI.to(dtype).view(shape)
        return grad_x, None, None, grad_a_rI, grad_b_Or, None


def fuse_loras(model: torch.nn.Module) -> None:
    """Let every plain LoRA on a linear module of `model` run as `LoraLinear`.

    Not where parameters are sharded (ZeRO 3): they are whole only inside their own modules.
    """
    from peft.tuners.lora import Linear

    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) in (torch.nn.Linear, Conv1D):
            module.forward = MethodType(_forward, module)


def _forward(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`peft.tuners.lora.Linear.forward`, fused where it is plain at this call."""
    factors = _plain_factors(module) if not (args or kwargs) else None
    if factors is None:
        return type(module).forward(module, x, *args, **kwargs)
    base: Any = module.base_layer
    weight_OI = base.weight.T if isinstance(base, Conv1D) else base.weight
    return LoraLinear.apply(x, weight_OI, base.bias, *factors)  # type: ignore[no-any-return]


def _plain_factors(module: Any) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A, B and the scale of a module's one LoRA, or None where PEFT would do more than add it."""
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return None
    name = module.active_adapters[0]
    if name not in module.lora_A or name in module.lora_variant:
        return None
    a, b, base = module.lora_A[name], module.lora_B[name], module.base_layer
    dropout = module.lora_dropout[name]
    is_plain = (
        type(a) is type(b) is torch.nn.Linear
        and a.bias is None
        and b.bias is None
        and not any(_is_hooked(part) for part in (a, b, base))
        and not any(parameter.requires_grad for parameter in base.parameters())
        and (isinstance(dropout, torch.nn.Identity) or not module.training)
    )
    return (a.weight, b.weight, module.scaling[name]) if is_plain else None


def _is_hooked(module: torch.nn.Module) -> bool:
    own = vars(module)
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
