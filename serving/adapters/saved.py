"""What PEFT saves beside a method's own tensors: modules whole (modules_to_save), as replacements,
and copies of the base's own weights (save_embedding_layers), which change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cluster.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, fault
from serving.adapters.pace import give_way
from serving.adapters.primitives import Delta, Replacement
from serving.adapters.target import PREFIX, ModuleShape, Target


def take_out(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> tuple[dict[str, torch.Tensor], dict[str, Delta]]:
    """The method's own tensors, and the modules saved whole.

    Raises:
        AdapterError: one of these does not fit the base, or a weight is there that is not the
            base's.
    """
    saved: Any = folder.config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise fault(folder.path, CONFIG, f"has modules_to_save = {str(saved)[:80]!r}, not names")
    own: dict[str, torch.Tensor] = {}
    whole: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, parameter = key.removeprefix(PREFIX).rpartition(".")
        shape = target.modules.get(module.removesuffix(".base_layer"))
        if shape is None or not key.startswith(PREFIX):
            own[key] = tensor
        elif _is_copy(tensor, shape, parameter):
            continue
        elif saved and _is_within(module, saved):
            _check_shape(folder, key, tensor, shape, parameter, target)
            give_way()
            placed = tensor.to(target.device, target.dtype, copy=True).contiguous()
            whole.setdefault(module, {})[parameter] = placed
        elif parameter == "weight" and not folder.config.get("ensure_weight_tying"):
            raise fault(
                folder.path,
                WEIGHTS,
                f"has {key!r}, which differs from the base's weights; only an adapter over "
                "unchanged weights is served: save it with save_embedding_layers=False if they "
                "should be the base's",
            )
        else:
            own[key] = tensor
    return own, {module: Replacement(parameters) for module, parameters in whole.items()}


def _is_copy(tensor: torch.Tensor, shape: ModuleShape, parameter: str) -> bool:
    """Whether it is a parameter of the base, where need be as one of the two rounds the other."""
    own = shape.parameters.get(parameter)
    if own is None or own.is_meta or own.shape != tensor.shape:
        return False
    own = own.cpu()
    return torch.equal(own.to(tensor.dtype), tensor) or torch.equal(tensor.to(own.dtype), own)


def _check_shape(
    folder: AdapterFolder,
    key: str,
    tensor: torch.Tensor,
    shape: ModuleShape,
    parameter: str,
    target: Target,
) -> None:
    own = shape.parameters.get(parameter)
    if own is None or own.shape != tensor.shape:
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {key!r} of shape {tuple(tensor.shape)}, where the base {target.name} has "
            f"{'none' if own is None else tuple(own.shape)}; the adapter was made for "
            f"another base ({folder.base_model})",
        )


def _is_within(module: str, saved: list[str]) -> bool:
    """Whether it, or what it lies in, is a module that PEFT saved whole: whose name ends so."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(name.endswith(ending) for name in names for ending in saved)
