"""Prompt-tuning, P-tuning and prefix-tuning folders as prefixes.

Prompt tuning (Lester et al. 2021, arXiv:2104.08691) puts vectors in front of the input, and so
does P-tuning (Liu et al. 2021, arXiv:2103.10385), whose encoder PEFT has run when it saves; prefix
tuning (Li & Liang 2021, arXiv:2101.00190) puts keys and values in front of every layer, which PEFT
stores after its projection, without rotary embedding.

    P prefix tokens    H hidden    L layers    K key/value heads    D head size
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cluster.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, fault
from serving.adapters.config import number, refuse_unread
from serving.adapters.primitives import EmbeddingPrefix, KVPrefix, LoweredAdapter
from serving.adapters.target import Target

_KEY = "prompt_embeddings"
_READ = {"num_virtual_tokens", "num_transformer_submodules"}
# Shapes, which the tensor is checked against, and how training began.
_TRAINED_WITH = {
    "token_dim", "num_attention_heads", "num_layers", "prompt_tuning_init",
    "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "init_weights",
    "encoder_hidden_size", "prefix_projection", "encoder_reparameterization_type",
    "encoder_num_layers", "encoder_dropout",
}  # fmt: skip


def lower_prompt_tuning(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A prompt-tuning or P-tuning folder as an embedding prefix. Raises AdapterError."""
    embeddings_PH = _read(folder, tensors, target.hidden_size, target)
    return LoweredAdapter(prefix=EmbeddingPrefix(embeddings_PH))


def lower_prefix_tuning(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A prefix-tuning folder as a KV prefix. Raises AdapterError."""
    layers, heads, size = target.num_layers, target.num_kv_heads, target.head_size
    flat = _read(folder, tensors, layers * 2 * heads * size, target)
    pairs_L2PKD = flat.view(-1, layers, 2, heads, size).permute(1, 2, 0, 3, 4)
    keys_LPKD, values_LPKD = pairs_L2PKD.unbind(1)
    return LoweredAdapter(prefix=KVPrefix(keys_LPKD.contiguous(), values_LPKD.contiguous()))


def _read(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], width: int, target: Target
) -> torch.Tensor:
    """The one tensor [P, width], in the engine's dtype on its device."""
    refuse_unread(folder, _READ, _TRAINED_WITH)
    if target.refuses_prefix is not None:
        raise fault(
            folder.path,
            CONFIG,
            f"is a prefix, and the base {target.name} has {target.refuses_prefix}, with which "
            "prefixes are not served; train a LoRA or BitFit instead",
        )
    if folder.config.get("num_transformer_submodules") not in (None, 1):
        raise fault(folder.path, CONFIG, "is of an encoder-decoder; decoders alone are served")
    if set(tensors) != {_KEY}:
        raise fault(folder.path, WEIGHTS, f"must hold {_KEY!r} alone; it has {sorted(tensors)[:5]}")
    tokens = number(
        folder, folder.config.get("num_virtual_tokens"), "num_virtual_tokens", whole=True
    )
    tensor = tensors[_KEY]
    if tuple(tensor.shape) != (tokens, width):
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {_KEY!r} with shape {tuple(tensor.shape)}, where the base {target.name} needs "
            f"{(tokens, width)}; the adapter was made for another base ({folder.base_model})",
        )
    return tensor.to(target.device, target.dtype)
