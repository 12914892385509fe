"""What lowering must know of a base model: its modules' shapes and its KV geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from cluster.errors import BaseModelError

# Config fields of bases whose layers see more than embeddings, or share keys between layers.
_NO_PREFIX = ("hidden_size_per_layer_input", "num_kv_shared_layers")


@dataclass(frozen=True)
class ModuleShape:
    """One module that a delta can act on. `bias` and `weight` are the base's own, or None;
    `scale` is what an embedding multiplies its vectors by, and so PEFT a LoRA's."""

    in_features: int
    out_features: int
    takes_low_rank: bool
    bias: torch.Tensor | None
    weight: torch.Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Target:
    """A base model as lowering sees it; `device` and `dtype` are those of the primitives."""

    name: str
    modules: Mapping[str, ModuleShape]
    num_layers: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    device: torch.device
    dtype: torch.dtype
    refuses_prefix: str | None  # why a prefix would be computed wrongly here


def describe(model: Any, name: str) -> Target:
    """The target that `model`, a transformers causal LM, is.

    Raises:
        BaseModelError: it has no attention of one geometry.
    """
    config = model.config.get_text_config()
    try:
        heads: int = config.num_attention_heads
        size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    except (AttributeError, TypeError) as error:
        raise BaseModelError(
            f"base_model {name}: {type(model).__name__} is not served: its layers do not all "
            f"attend with the same heads ({error})"
        ) from error
    weight = model.get_input_embeddings().weight
    return Target(
        name=name,
        modules={n: shape for n, m in model.named_modules() if (shape := _shape(m)) is not None},
        num_layers=config.num_hidden_layers,
        num_kv_heads=kv_heads,
        head_size=size,
        hidden_size=config.hidden_size,
        device=weight.device,
        dtype=weight.dtype,
        refuses_prefix=next((k for k in _NO_PREFIX if getattr(config, k, None)), None),
    )


def _shape(module: torch.nn.Module) -> ModuleShape | None:
    bias = getattr(module, "bias", None)
    bias = bias.detach() if isinstance(bias, torch.nn.Parameter) else None
    if isinstance(module, torch.nn.Linear):
        return ModuleShape(module.in_features, module.out_features, True, bias, module.weight)
    if isinstance(module, Conv1D):
        return ModuleShape(module.nx, module.nf, True, bias)
    if isinstance(module, torch.nn.Embedding):
        scale = float(getattr(module, "embed_scale", 1.0))
        size = (module.num_embeddings, module.embedding_dim)
        return ModuleShape(*size, True, None, module.weight, scale)
    if bias is not None and bias.ndim == 1:  # a norm
        return ModuleShape(bias.shape[0], bias.shape[0], False, bias)
    return None
