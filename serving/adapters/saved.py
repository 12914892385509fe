"""Modules that PEFT saved whole beside an adapter (modules_to_save), as replacements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cluster.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, fault
from serving.adapters.primitives import Delta, Replacement
from serving.adapters.target import Target, bare_name, shape_of


def saved_whole(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> dict[str, dict[str, torch.Tensor]]:
    """Those tensors that are parameters of modules saved whole: module -> name -> tensor.

    Raises:
        AdapterError: one of them does not fit the base.
    """
    saved: Any = folder.config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise fault(folder.path, CONFIG, f"has modules_to_save = {str(saved)[:80]!r}, not names")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if not saved or not _is_within(bare_name(folder, key), saved):
            continue
        module, _, parameter = bare_name(folder, key).rpartition(".")
        own = shape_of(folder, key, module, target).parameters.get(parameter)
        if own is None or own.shape != tensor.shape:
            raise fault(
                folder.path,
                WEIGHTS,
                f"has {key!r} of shape {tuple(tensor.shape)}, where the base {target.name} has "
                f"{'none' if own is None else tuple(own.shape)}; the adapter was made for "
                f"another base ({folder.base_model})",
            )
        found.setdefault(module, {})[parameter] = tensor
    return found


def replacements(
    found: Mapping[str, Mapping[str, torch.Tensor]], target: Target
) -> dict[str, Delta]:
    """What `saved_whole` found, as the engine runs it."""
    return {
        module: Replacement(
            {n: p.to(target.device, target.dtype, copy=True) for n, p in parameters.items()}
        )
        for module, parameters in found.items()
    }


def _is_within(name: str, saved: list[str]) -> bool:
    """Whether a tensor is of a module that PEFT saved whole: one whose name ends so."""
    parts = name.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(module.endswith(ending) for module in modules for ending in saved)
