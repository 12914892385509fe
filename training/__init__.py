"""Training: Arrow data in, published adapter out. `load_adapter` loads what it published."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.load import load_adapter

__all__ = ["load_adapter"]


def __getattr__(name: str) -> Any:
    # Lazily, so that reading a spec or asking for help does not import torch.
    if name == "load_adapter":
        from training.load import load_adapter

        return load_adapter
    raise AttributeError(f"module 'training' has no attribute {name!r}")
