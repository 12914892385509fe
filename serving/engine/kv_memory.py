"""The memory of keys and values: one tensor of each for each layer, indexed by slot.

K key/value heads    D head size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serving.adapters import KVPrefix, Target


@dataclass(frozen=True)
class KVMemory:
    """[slots, K, D] each, by layer, in the base's dtype on its device."""

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]

    def put(self, prefix: KVPrefix, slots: torch.Tensor) -> None:
        """Copy an adapter's keys and values to their slots."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            keys[slots] = prefix.keys_LPKD[layer]
            values[slots] = prefix.values_LPKD[layer]


def make_memory(target: Target, num_slots: int) -> KVMemory:
    """Memory of so many slots, all zero: what is masked must still be finite."""
    shape = (num_slots, target.num_kv_heads, target.head_size)
    options: dict[str, Any] = {"dtype": target.dtype, "device": target.device}
    keys, values = (
        [torch.zeros(shape, **options) for _ in range(target.num_layers)] for _ in range(2)
    )
    return KVMemory(keys, values)
