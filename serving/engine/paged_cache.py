"""Layers of a transformers Cache over paged keys and values, for one forward pass.

B rows    K key/value heads    L new tokens    S context    D head size
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin


class PagedLayer(CacheLayerMixin):
    """Self-attention: the new keys and values go to their slots, and the base gets the whole
    context of each row. `is_new_BL` tells tokens from padding; `write_T` are their slots."""

    is_sliding = False

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        is_new_BL: torch.Tensor,
        write_T: torch.Tensor,
        slots_BS: torch.Tensor,
    ) -> None:
        super().__init__()
        self._keys, self._values = keys, values
        self._is_new_BL, self._write_T, self._slots_BS = is_new_BL, write_T, slots_BS

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K, L, D] each, new, to [B, K, S, D] each."""
        self._keys[self._write_T] = key_states.transpose(1, 2)[self._is_new_BL]
        self._values[self._write_T] = value_states.transpose(1, 2)[self._is_new_BL]
        slots = self._slots_BS
        return self._keys[slots].transpose(1, 2), self._values[slots].transpose(1, 2)

    def get_seq_length(self) -> int:
        """Columns in front of the new tokens."""
        return self._slots_BS.shape[1] - self._is_new_BL.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns, from the first on."""
        return self._slots_BS.shape[1], 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The memory is there already."""
