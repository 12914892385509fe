"""Load any published adapter folder onto a model: the reference that serving is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cluster.adapter_folder import open_adapter_folder
from training.methods import METHODS

_OWN = {method.peft_type: method for method in METHODS.values() if method.peft_type}


def load_adapter(model: Any, path: str | Path) -> torch.nn.Module:
    """`model` with the adapter folder at `path`, in eval mode; `model` itself is changed.

    Args:
        model: A fresh transformers model of the base that the adapter was trained on.
        path: A folder as Graft or PEFT saves it.

    Raises:
        AdapterError: the folder is not sound.
    """
    folder = open_adapter_folder(path)
    method = _OWN.get(folder.method, METHODS["lora"])
    return method.load(model, folder.path).eval()
