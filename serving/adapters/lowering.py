"""A folder to primitives: once, when an adapter is loaded. One row per method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cluster.adapter_folder import (
    CONFIG,
    CONTENT,
    WEIGHTS,
    AdapterFolder,
    check_finite,
    fault,
    open_adapter_folder,
    unchanged,
)
from serving.adapters.bottleneck import lower_bottleneck
from serving.adapters.linear import lower_bitfit, lower_ia3
from serving.adapters.llama_adapter import lower_llama_adapter
from serving.adapters.lora import lower_adalora, lower_lora
from serving.adapters.merged import KINDS, lower_merged
from serving.adapters.offset import PROXY, lower_proxy
from serving.adapters.primitives import LoweredAdapter
from serving.adapters.saved import take_out
from serving.adapters.soft_prompt import lower_prefix_tuning, lower_prompt_tuning
from serving.adapters.target import Target
from serving.adapters.tokens import lower_trainable_tokens
from serving.adapters.weights import lower_layernorm, lower_shira, lower_sparse_delta

Lower = Callable[[AdapterFolder, Mapping[str, torch.Tensor], Target], LoweredAdapter]

LOWER: Mapping[str, Lower] = {
    "LORA": lower_lora,
    "ADALORA": lower_adalora,
    "BITFIT": lower_bitfit,
    "IA3": lower_ia3,
    "LN_TUNING": lower_layernorm,
    "SPARSE_DELTA": lower_sparse_delta,
    "SHIRA": lower_shira,
    "TRAINABLE_TOKENS": lower_trainable_tokens,
    "BOTTLENECK": lower_bottleneck,
    "ADAPTION_PROMPT": lower_llama_adapter,
    "PROMPT_TUNING": lower_prompt_tuning,
    "P_TUNING": lower_prompt_tuning,
    "CPT": lower_prompt_tuning,
    "PREFIX_TUNING": lower_prefix_tuning,
    "CARTRIDGE": lower_prefix_tuning,
    **dict.fromkeys(KINDS, lower_merged),
}


# Why the others of PEFT's kinds are not, where somebody may ask.
_REFUSED: Mapping[str, str] = {
    "ADAMSS": "which PEFT computes with a library that Graft does not depend on",
    "FROD": "which decomposes the base's weights over all layers at once",
    "LILY": "which PEFT does not merge into weights",
    "MULTITASK_PROMPT_TUNING": "which makes its prompt of the task of each row",
    "POLY": "which changes weights by the task of each row",
    "SHADOW": "which runs a network of its own beside the layers, from one to the next",
    "XLORA": "which chooses weights by the input itself, so that no fixed change equals it",
}

# What the names of integer tensors have; a method that has none refuses them.
INDICES = "indices"


def lower(
    path: str | Path,
    target: Target,
    small_bases: Mapping[str, Target] | None = None,
    content: str | None = None,
) -> LoweredAdapter:
    """Read the adapter folder at `path` and lower it for `target`.

    Args:
        small_bases: Those that a proxy-tuned adapter may name, by resolved path.
        content: A hash of the folder's config and weights, from who has verified that they are
            what was once published, and finite. Otherwise both are found out here, in more than
            half of the whole time.

    Raises:
        AdapterError: naming the file, the reason and the remedy; nothing was loaded.
    """
    with unchanged(Path(path), CONTENT):  # to the end: the tensors are the mapped file's
        return _lower(open_adapter_folder(path), target, small_bases or {}, content)


def _lower(
    folder: AdapterFolder, target: Target, small_bases: Mapping[str, Target], content: str | None
) -> LoweredAdapter:
    if content is None:
        check_finite(folder)
    try:
        tensors = load_file(folder.path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise fault(folder.path, WEIGHTS, f"cannot be read ({error})") from error

    def lower_on(part: AdapterFolder, base: Target) -> LoweredAdapter:
        lower_kind = _lowering_of(part, base)
        wrong = next(
            (key for key, tensor in tensors.items() if not _is_expected(key, tensor)), None
        )
        if wrong is not None:
            raise fault(folder.path, WEIGHTS, f"has tensor {wrong!r} that is not floating point")
        own, whole = take_out(part, tensors, base)
        lowered = lower_kind(part, own, base)
        both = next((module for module in whole if module in lowered.deltas), None)
        if both is not None:
            raise fault(folder.path, WEIGHTS, f"changes {both!r} and has it saved whole too")
        return replace(lowered, deltas={**lowered.deltas, **whole})

    if folder.method == PROXY:
        lowered = lower_proxy(folder, small_bases, lower_on)
    else:
        lowered = lower_on(folder, target)
    # What no pass runs changes nothing, in PEFT either.
    deltas = {name: delta for name, delta in lowered.deltas.items() if name not in target.idle}
    return replace(lowered, deltas=deltas, content=content or _content(folder, tensors))


def _is_expected(key: str, tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or INDICES in key.rpartition(".")[2]


def _lowering_of(folder: AdapterFolder, target: Target) -> Lower:
    known = LOWER.get(folder.method)
    if known is None:
        why = _REFUSED.get(folder.method, "which is not served yet")
        raise fault(
            folder.path,
            CONFIG,
            f"has peft_type {folder.method[:60]!r}, {why}; "
            f"served are {', '.join(sorted([*LOWER, PROXY]))}",
        )
    task = folder.config.get("task_type") or target.task_type
    if task == "SEQ_CLS":
        raise fault(
            folder.path,
            CONFIG,
            "has task_type 'SEQ_CLS'; the engine generates text, and a classifier has none: load "
            "it with training.load_adapter",
        )
    if task != target.task_type:
        raise fault(
            folder.path,
            CONFIG,
            f"has task_type {str(task)[:60]!r}; on the base {target.name} those of task_type "
            f"{target.task_type!r} alone are served, load others with training.load_adapter",
        )
    return known


def _content(folder: AdapterFolder, tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of what was read, whatever the file holds by now."""
    digest = blake2b(json.dumps(folder.config, sort_keys=True, default=repr).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
