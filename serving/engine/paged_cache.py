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


class ContextLayer(CacheLayerMixin):
    """Cross-attention to sources that were read before, whose keys and values lie in slots and are
    gathered when they are asked for, layer by layer."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots_BC: torch.Tensor) -> None:
        self._keys, self._values, self._slots_BC = keys, values, slots_BC
        self.is_initialized = True

    @property
    def keys(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[B, K, C, D]."""
        return self._keys[self._slots_BC].transpose(1, 2)

    @property
    def values(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[B, K, C, D]."""
        return self._values[self._slots_BC].transpose(1, 2)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Never called by a base that asks whether they are there."""
        raise RuntimeError("the base reads its encoder's output anew in each step")

    def get_seq_length(self) -> int:
        """C."""
        return self._slots_BC.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns, from the first on."""
        return self._slots_BC.shape[1], 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The memory is there already."""


class SourceLayer(CacheLayerMixin):
    """Cross-attention to sources that are just read: their keys and values go to their slots.
    `is_source_BC` tells tokens from padding; `write_T` are their slots."""

    is_sliding = False

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        is_source_BC: torch.Tensor,
        write_T: torch.Tensor,
    ) -> None:
        super().__init__()
        self._keys, self._values = keys, values
        self._is_source_BC, self._write_T = is_source_BC, write_T

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K, C, D] each, and back as they are."""
        self._keys[self._write_T] = key_states.transpose(1, 2)[self._is_source_BC]
        self._values[self._write_T] = value_states.transpose(1, 2)[self._is_source_BC]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Nothing is known yet, so the base makes them."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns, from the first on."""
        return self._is_source_BC.shape[1], 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The memory is there already."""
