"""A classifier's head, which every method trains and saves whole: it is new, so no change of it
would mean anything.

PEFT's own methods do this by `modules_to_save`; these are for the others. The folder has the head
under PEFT's names, `base_model.model.<module>.<parameter>`, as the only whole parameters in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cluster.errors import AdapterError
from cluster.tasks import head_modules

PREFIX = "base_model.model."


def head_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """By their names in the model; empty unless it is a classifier."""
    return {
        f"{name}.{part}": parameter
        for name, module in head_modules(model).items()
        for part, parameter in module.named_parameters()
    }


def is_of_head(model: Any, name: str) -> bool:
    """Whether a module, or a parameter, of this name is in the head."""
    return any(f"{name}.".startswith(f"{head}.") for head in head_modules(model))


def train_head(model: Any) -> None:
    """Train the head beside the method, in float32 whatever the base's dtype."""
    for parameter in head_parameters(model).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def head_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What a folder holds of it, by key."""
    return {
        PREFIX + name: parameter.detach().float().cpu().contiguous()
        for name, parameter in head_parameters(model).items()
    }


@torch.no_grad()
def load_head(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put a folder's head onto `model`; returns the other tensors.

    Raises:
        AdapterError: the folder has none, or one of another shape.
    """
    own = {PREFIX + name: parameter for name, parameter in head_parameters(model).items()}
    for key, parameter in own.items():
        found = tensors.get(key)
        if found is None or found.shape != parameter.shape:
            raise AdapterError(
                f"the classifier's {key} is {'missing' if found is None else list(found.shape)} in "
                f"the folder, and {list(parameter.shape)} in the model; load it onto a model with "
                "the classes that it was trained for"
            )
        parameter.copy_(found)
    return {key: tensor for key, tensor in tensors.items() if key not in own}
