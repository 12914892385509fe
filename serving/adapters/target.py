"""What lowering must know of a base model: its modules' shapes and its KV geometry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers.pytorch_utils import Conv1D

from cluster.adapter_folder import WEIGHTS, AdapterFolder, fault
from cluster.errors import BaseModelError
from cluster.quantized_linear import is_quantized, unpacked_weight, was_transposed

# What PEFT puts in front of each tensor's name.
PREFIX = "base_model.model."
# Config fields of bases whose layers see more than embeddings, or share keys between layers.
_NO_PREFIX = ("hidden_size_per_layer_input", "num_kv_shared_layers")


@dataclass(frozen=True)
class ModuleShape:
    """One module that a delta can act on. A transposed one is linear with its weight in [in, out]
    order; another, such as a norm, takes no change of its weight by a product. `parameters` are
    all that it has itself, by name; `scale` is what an embedding multiplies its vectors by, and
    PEFT a LoRA. Of a weight in 4 or 8 bits, `parameters` have the shape alone (meta device): only
    `read_weight` tells its values."""

    in_features: int
    out_features: int
    kind: Literal["linear", "transposed", "embedding", "other"]
    parameters: Mapping[str, torch.Tensor]
    bias: torch.Tensor | None
    scale: float = 1.0
    # The weight in [out, in] order, float32 on CPU, of whatever is linear or an embedding.
    read_weight: Callable[[], torch.Tensor] | None = None
    is_quantized: bool = False
    is_transposed: bool = False  # its stacked experts' matrices are [in, out]

    @property
    def takes_low_rank(self) -> bool:
        """Whether x A B adds up to what a changed weight gives."""
        return self.kind != "other"


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
    input_embedding: str  # a module
    is_seq2seq: bool = False
    # Modules that no pass runs: T5's `shared`, of which each stack has an embedding of its own.
    idle: frozenset[str] = frozenset()

    @property
    def task_type(self) -> str:
        """What PEFT calls the task of its adapters."""
        return "SEQ_2_SEQ_LM" if self.is_seq2seq else "CAUSAL_LM"


def describe(model: Any, name: str) -> Target:
    """The target that `model`, a transformers causal LM or encoder-decoder, is. Layers and heads
    are a decoder's.

    Raises:
        BaseModelError: it has no attention of one geometry.
    """
    config = model.config.get_text_config()
    try:
        heads: int = config.num_attention_heads
        size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
        layers = _decoder_layers(config)
    except (AttributeError, TypeError) as error:
        raise BaseModelError(
            f"base_model {name}: {type(model).__name__} is not served: its layers do not all "
            f"attend with the same heads ({error})"
        ) from error
    embedding = model.get_input_embeddings()
    weight, is_seq2seq = embedding.weight, bool(config.is_encoder_decoder)
    input_embedding = next(n for n, module in model.named_modules() if module is embedding)
    is_idle = is_seq2seq and model.get_encoder().get_input_embeddings() is not embedding
    return Target(
        name=name,
        modules={n: shape for n, m in model.named_modules() if (shape := _shape(m)) is not None},
        num_layers=layers,
        num_kv_heads=kv_heads,
        head_size=size,
        hidden_size=config.hidden_size,
        device=weight.device,
        dtype=weight.dtype,
        refuses_prefix=next((k for k in _NO_PREFIX if getattr(config, k, None)), None),
        input_embedding=input_embedding,
        is_seq2seq=is_seq2seq,
        idle=frozenset({input_embedding} if is_idle else ()),
    )


def _decoder_layers(config: Any) -> int:
    names = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
    found = next((count for name in names if (count := getattr(config, name, None))), None)
    if found is None:
        raise AttributeError(f"its config has none of {', '.join(names)}")
    return found


def bare_name(folder: AdapterFolder, key: str) -> str:
    """A tensor's name in the base. Raises AdapterError."""
    if not key.startswith(PREFIX):
        raise fault(folder.path, WEIGHTS, f"has tensor {key!r}; keys begin with {PREFIX!r}")
    return key.removeprefix(PREFIX)


def shape_of(folder: AdapterFolder, key: str, module: str, target: Target) -> ModuleShape:
    """The module that the tensor `key` is of. Raises AdapterError if the base has none."""
    shape = target.modules.get(module)
    if shape is None:
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {key!r}, but the base {target.name} has no module {module!r}; "
            f"the adapter was made for another base ({folder.base_model})",
        )
    return shape


def _shape(module: torch.nn.Module) -> ModuleShape | None:
    own = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
    weight, bias = own.get("weight"), own.get("bias")
    read = partial(_read_weight, module)
    if is_quantized(module):
        return _quantized_shape(module, own)
    if isinstance(module, torch.nn.Linear):
        size = (module.in_features, module.out_features)
        return ModuleShape(*size, "linear", own, bias, read_weight=read)
    if isinstance(module, Conv1D):
        return ModuleShape(module.nx, module.nf, "transposed", own, bias, read_weight=read)
    if isinstance(module, torch.nn.Embedding):
        scale = getattr(module, "embed_scale", None)
        # With a forward of its own, as for positions, it may be called with something else.
        takes_ids = scale is not None or type(module).forward is torch.nn.Embedding.forward
        size = (module.num_embeddings, module.embedding_dim)
        kind = "embedding" if takes_ids else "other"
        scale = 1.0 if scale is None else float(scale)
        return ModuleShape(*size, kind, own, None, scale, read if takes_ids else None)
    if not own:
        return None
    vector = next((p for p in (bias, weight) if p is not None and p.ndim == 1), None)
    features = 0 if vector is None else vector.shape[0]  # of a norm
    is_transposed = bool(getattr(module, "is_transposed", False))
    return ModuleShape(features, features, "other", own, bias, is_transposed=is_transposed)


def _quantized_shape(module: Any, own: dict[str, torch.Tensor]) -> ModuleShape:
    """Its weight is in [out, in] order whatever the plain module's was; where that was another, the
    places of a sparse change would be others here, so none is shown."""
    size, bias = (module.in_features, module.out_features), own.get("bias")
    own["weight"] = torch.empty(size[::-1], device="meta")
    if was_transposed(module):
        del own["weight"]
    read = partial(_read_weight, module)
    return ModuleShape(*size, "linear", own, bias, read_weight=read, is_quantized=True)


def _read_weight(module: torch.nn.Module) -> torch.Tensor:
    """[out, in], float32 on CPU. Of the base itself: while another thread computes a step, the
    attribute may hide it behind an adapter's."""
    if is_quantized(module):
        return unpacked_weight(module).cpu()
    weight = dict(module.named_parameters(recurse=False))["weight"]
    weight = weight.detach().float().cpu()
    return weight if isinstance(module, torch.nn.Linear) else weight.T
