"""Prompt-tuning, P-tuning, CPT, prefix-tuning and cartridge folders as prefixes.

Prompt tuning (Lester et al. 2021, arXiv:2104.08691) puts vectors in front of the input, and so do
P-tuning (Liu et al. 2021, arXiv:2103.10385), whose encoder PEFT has run when it saves, and CPT
(arXiv:2410.17222), saved as the sum of tokens' embeddings and their bounded change; prefix tuning
(Li & Liang 2021, arXiv:2101.00190) puts keys and values in front of every layer, which PEFT stores
after its projection, as the cache holds them, and so does a cartridge (arXiv:2506.06266).

    P prefix tokens    H hidden    L layers    K key/value heads    D head size
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cluster.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, fault, number
from serving.adapters.config import refuse_unread
from serving.adapters.primitives import EmbeddingPrefix, KVPrefix, LoweredAdapter
from serving.adapters.target import Target

_KEY = "prompt_embeddings"
_READ = {"num_virtual_tokens", "num_transformer_submodules"}
# Shapes, which the tensor is checked against, and how training began.
_TRAINED_WITH = {
    "token_dim", "num_attention_heads", "num_layers", "prompt_tuning_init",
    "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "init_weights",
    "encoder_hidden_size", "prefix_projection", "encoder_reparameterization_type",
    "encoder_num_layers", "encoder_dropout", "num_frozen_tokens", "cpt_token_ids", "cpt_mask",
    "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor",
    "opt_projection_epsilon", "opt_projection_format_epsilon",
}  # fmt: skip


def lower_prompt_tuning(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A prompt-tuning, P-tuning or CPT folder as an embedding prefix. Raises AdapterError.

    PEFT keeps one prompt for each of an encoder-decoder's stacks, or one alone, and puts the first
    in front of the encoder's input; the other is not used.
    """
    stacks = _stacks(folder, target, (1, 2) if target.is_seq2seq else (1,))
    embeddings_PH = _read(folder, tensors, stacks, target.hidden_size, target)
    return LoweredAdapter(prefix=EmbeddingPrefix(embeddings_PH[: len(embeddings_PH) // stacks]))


def lower_prefix_tuning(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A prefix-tuning or cartridge folder as a KV prefix, of the decoder's self-attention. Raises
    AdapterError.

    For an encoder-decoder PEFT repeats the layers' pairs and deals them out by four, two for
    self-attention and two for a cross-attention that it then leaves out: layer i gets pair 2 i.
    """
    layers, heads, size = target.num_layers, target.num_kv_heads, target.head_size
    stacks = _stacks(folder, target, (2,) if target.is_seq2seq else (1,))
    flat = _read(folder, tensors, 1, layers * 2 * heads * size, target)
    pairs_L2PKD = flat.view(-1, layers, 2, heads, size).permute(1, 2, 0, 3, 4)
    pairs_L2PKD = pairs_L2PKD[[stacks * layer % layers for layer in range(layers)]]
    keys_LPKD, values_LPKD = pairs_L2PKD.unbind(1)
    return LoweredAdapter(prefix=KVPrefix(keys_LPKD.contiguous(), values_LPKD.contiguous()))


def _stacks(folder: AdapterFolder, target: Target, possible: tuple[int, ...]) -> int:
    """How many stacks PEFT made it for; the last of `possible` where it does not tell. Raises
    AdapterError."""
    found = folder.config.get("num_transformer_submodules")
    if found not in (None, *possible):
        raise fault(
            folder.path,
            CONFIG,
            f"has num_transformer_submodules = {str(found)[:20]}, where the base {target.name} "
            f"has {possible[-1]}; train it on this base",
        )
    return found or possible[-1]


def _read(
    folder: AdapterFolder,
    tensors: Mapping[str, torch.Tensor],
    times: int,
    width: int,
    target: Target,
) -> torch.Tensor:
    """The one tensor [times P, width], in the engine's dtype on its device."""
    refuse_unread(folder, _READ, _TRAINED_WITH)
    if target.refuses_prefix is not None:
        raise fault(
            folder.path,
            CONFIG,
            f"is a prefix, and the base {target.name} has {target.refuses_prefix}, with which "
            "prefixes are not served; train a LoRA or BitFit instead",
        )
    if set(tensors) != {_KEY}:
        raise fault(folder.path, WEIGHTS, f"must hold {_KEY!r} alone; it has {sorted(tensors)[:5]}")
    tokens = number(
        folder, folder.config.get("num_virtual_tokens"), "num_virtual_tokens", whole=True
    )
    tensor = tensors[_KEY]
    if tuple(tensor.shape) != (times * tokens, width):
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {_KEY!r} with shape {tuple(tensor.shape)}, where the base {target.name} needs "
            f"{(times * tokens, width)}; the adapter was made for another base "
            f"({folder.base_model})",
        )
    return tensor.to(target.device, target.dtype, copy=True)
