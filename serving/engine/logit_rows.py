"""Logits of the wanted rows alone: the output embedding sees no other.

N rows with logits
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


class LogitRows:
    """A hook on one model's output embedding. Used by one thread."""

    def __init__(self, model: Any) -> None:
        self._wanted_N: torch.Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._select)

    @contextmanager
    def wanted(self, wanted_N: torch.Tensor) -> Generator[None]:
        """The scope of one forward pass; `wanted_N` counts the tokens of all its rows."""
        self._wanted_N = wanted_N
        try:
            yield
        finally:
            self._wanted_N = None

    def _select(
        self, _: torch.nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        """What the output embedding reads, as [1, N, hidden]."""
        if self._wanted_N is None:
            return None
        hidden = args[0]
        return (hidden.reshape(1, -1, hidden.shape[-1])[:, self._wanted_N],)
