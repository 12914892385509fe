"""Logits of the wanted rows alone, and the hidden states of pooled ones: the output embedding sees
no other rows than those that need logits.

N rows with logits    M pooled rows    H hidden    V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from serving.engine.batch import Computed


class LogitRows:
    """A hook on one model's output embedding. Used by one thread."""

    def __init__(self, model: Any) -> None:
        self._wanted_N: torch.Tensor | None = None
        self._pooled_M: torch.Tensor | None = None
        self._states_MH: torch.Tensor | None = None
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(self._select)

    def run(
        self, forward: Callable[[], Any], wanted_N: torch.Tensor, pooled_M: torch.Tensor
    ) -> Computed:
        """One forward pass of the model; `wanted_N` and `pooled_M` count the tokens of all its
        rows."""
        self._wanted_N, self._pooled_M = wanted_N, pooled_M
        try:
            logits_NV = forward().logits[0].float()
            states_MH = self._states_MH
            assert states_MH is not None, "the model did not ask its output embedding"
            return Computed(logits_NV, states_MH)
        finally:
            self._wanted_N = self._pooled_M = self._states_MH = None

    def _select(
        self, _: torch.nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        """What the output embedding reads, as [1, N, H]."""
        if self._wanted_N is None or self._pooled_M is None:
            return None
        hidden_TH = args[0].reshape(-1, args[0].shape[-1])
        # An empty selection is a kernel too, in every step that pools nothing.
        self._states_MH = hidden_TH[self._pooled_M] if len(self._pooled_M) else hidden_TH[:0]
        return (hidden_TH[self._wanted_N][None],)
