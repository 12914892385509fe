"""What lowering must know of a base model: its modules' shapes and its KV geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class ModuleShape:
    """One module that a delta can act on. `bias` is the base's own, or None."""

    in_features: int
    out_features: int
    takes_low_rank: bool
    bias: torch.Tensor | None


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


def describe(model: Any, name: str) -> Target:
    """The target that `model`, a transformers causal LM, is. Raises nothing."""
    config = model.config.get_text_config()
    heads: int = config.num_attention_heads
    weight = model.get_input_embeddings().weight
    return Target(
        name=name,
        modules={n: shape for n, m in model.named_modules() if (shape := _shape(m)) is not None},
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden_size=config.hidden_size,
        device=weight.device,
        dtype=weight.dtype,
    )


def _shape(module: torch.nn.Module) -> ModuleShape | None:
    bias = getattr(module, "bias", None)
    bias = bias.detach() if isinstance(bias, torch.nn.Parameter) else None
    if isinstance(module, torch.nn.Linear):
        return ModuleShape(module.in_features, module.out_features, True, bias)
    if isinstance(module, Conv1D):
        return ModuleShape(module.nx, module.nf, True, bias)
    if isinstance(module, torch.nn.Embedding):
        return ModuleShape(module.num_embeddings, module.embedding_dim, True, None)
    if bias is not None and bias.ndim == 1:  # a norm
        return ModuleShape(bias.shape[0], bias.shape[0], False, bias)
    return None
