"""One forward pass and its exact loss.

    B micro-batch rows    T padded tokens    N label tokens    V vocabulary    H hidden

A step's loss is the sum of the negative log-likelihoods of its label tokens over their number,
counted over all workers and micro-batches, so it does not depend on how the step is cut. Logits
are made for label positions alone: no [B, T, V] exists. Knows nothing of optimisers or workers.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from training.data import IGNORE


@dataclass(frozen=True)
class Batch:
    """Padded rows, int64: ids [B, T], attention mask [B, T], the next token's label [B, T]."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    targets_BT: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding left out."""
        return int(self.mask_BT.sum())


def collate(
    rows: Sequence[tuple[list[int], list[int]]], pad_id: int, device: torch.device
) -> Batch:
    """Pad (ids, labels) rows on the right; target t is label t + 1, the last one none."""
    length = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), length), pad_id)
    mask_BT = torch.zeros((len(rows), length), dtype=torch.long)
    targets_BT = torch.full((len(rows), length), IGNORE)
    for row, (ids, labels) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
        targets_BT[row, : len(ids) - 1] = torch.tensor(labels[1:])
    return Batch(ids_BT.to(device), mask_BT.to(device), targets_BT.to(device))


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of the label tokens' negative log-likelihoods, float32 scalar with a graph."""
    chosen_BT = batch.targets_BT != IGNORE
    with _head_at(model, chosen_BT):
        logits_NV = model(
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False
        ).logits
    return cross_entropy(logits_NV.float(), batch.targets_BT[chosen_BT], reduction="sum")


@contextmanager
def _head_at(model: Any, chosen_BT: torch.Tensor) -> Generator[None]:
    """Let the output embedding see the hidden states at `chosen_BT` alone, as [N, H].

    Soft prompts make the sequence longer at its front, so positions count from the end.
    """

    def select(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0][:, -chosen_BT.shape[1] :][chosen_BT],)

    inner = getattr(model, "module", model)  # DeepSpeed's engine wraps the model
    hook = inner.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
