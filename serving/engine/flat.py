"""A step as one flat sequence: all rows end to end, attention by a plan over paged slots.

    T tokens of the step    P prefix tokens

Nothing is padded, but on CPU the slots of rows that decode. For every base whose attention goes
through transformers' AttentionInterface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cluster.errors import BaseModelError
from serving.adapters import DeltaHooks
from serving.engine.attention import AttentionPlan, Span, attend_by
from serving.engine.batch import Batch, Computed, Row, Source
from serving.engine.columns import segments, side_by_side
from serving.engine.kv_memory import KVMemory
from serving.engine.logit_rows import LogitRows


class FlatPass:
    """One base model's way through a step. Used by one thread.

    Args:
        gpu_kernels: gpu_attention, where attention is to be computed by it.
    """

    # In which dimension modules show a step's rows: wherever the tokens are.
    rows_dim: int | None = None

    def __init__(
        self, model: Any, hooks: DeltaHooks, logit_rows: LogitRows, gpu_kernels: Any = None
    ) -> None:
        self._model, self._hooks, self._logit_rows = model, hooks, logit_rows
        self._device: torch.device = model.get_input_embeddings().weight.device
        self._gpu_kernels = gpu_kernels

    def num_rows(self, step: Batch) -> int:
        """What modules count."""
        return len(step.positions)

    def encode(self, sources: Sequence[Source], memory: KVMemory) -> None:
        """Not for a decoder alone."""
        raise BaseModelError("an encoder-decoder is not run flat")

    @torch.inference_mode()
    def run(
        self, step: Batch, memory: KVMemory, embeddings_PH: torch.Tensor | None = None
    ) -> Computed:
        """Logits of the wanted rows and states of the pooled ones; new keys and values are in their
        slots.

        Args:
            embeddings_PH: In place of the tokens' own.
        """
        inputs = {"input_ids": self._tensor(step.ids)[None]}
        if embeddings_PH is not None:
            inputs = {"inputs_embeds": embeddings_PH[None]}
        inputs["position_ids"] = self._tensor(step.positions)[None]
        owners = [row.deltas for row in step.rows]
        spans = [(row.start, row.end) for row in step.rows]
        # Which of the logits are a row's.
        wanted = [(int(a), int(b)) for a, b in np.searchsorted(step.wanted, spans)]
        with (
            self._hooks.active(segments(owners, spans), segments(owners, wanted)),
            attend_by(self._plan(self._tensor(step.write_slots), step.rows, memory)),
        ):
            return self._logit_rows.run(
                lambda: self._model(**inputs, use_cache=False),
                self._tensor(step.wanted),
                self._tensor(step.pooled),
            )

    def _plan(self, write_T: torch.Tensor, rows: Sequence[Row], memory: KVMemory) -> AttentionPlan:
        """All rows together where there are kernels for a GPU; else rows of one token, padded to
        the longest, and longer ones each alone."""
        plan = AttentionPlan(memory.keys, memory.values, write_T, self._hooks.queries)
        if self._gpu_kernels is not None:
            spans = [(row.start, row.end) for row in rows]
            plan.gpu = self._gpu_kernels.gpu_rows(spans, [row.slots for row in rows], self._device)
            return plan
        plan.spans = [
            Span(row.start, row.end, self._tensor(row.slots))
            for row in rows
            if row.end - row.start > 1
        ]
        single = [row for row in rows if row.end - row.start == 1]
        if single:
            padded, mask = side_by_side([row.slots for row in single], on_left=False)
            plan.decode_B = torch.tensor([row.start for row in single], device=self._device)
            plan.decode_slots_BS = self._tensor(padded)
            plan.decode_lengths_B = self._tensor(mask.sum(1))
        return plan

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
