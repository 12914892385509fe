"""An encoder-decoder's forward pass and its exact loss.

    B rows    S source tokens    T target tokens    N label tokens    V vocabulary    H hidden

The loss is counted as a causal LM's (training.step): summed over label tokens, whose number is
taken over all workers and micro-batches, and the decoder's logits exist for these alone. Sources
and targets are padded, each to the longest of the micro-batch, with a mask: the encoder attends to
both sides, and its families have position biases that rows end to end would not share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from cluster.errors import BaseModelError
from training.head_loss import HeadAt
from training.rows import IGNORE
from training.step import PROBE_LENGTHS, Continuation, LossModel, padded


@dataclass(frozen=True)
class Seq2SeqBatch:
    """Sources end to end in `ids_T`, and targets in `targets_T` (int64, IGNORE where nothing is
    learned), with where each row of either starts and ends."""

    ids_T: torch.Tensor
    targets_T: torch.Tensor
    bounds: Sequence[tuple[int, int]]
    target_bounds: Sequence[tuple[int, int]]


def collate_pairs(
    rows: Sequence[tuple[list[int], list[int]]], device: torch.device
) -> Seq2SeqBatch:
    """(source, target) rows to a batch."""
    ids, bounds = _joined([source for source, _ in rows])
    targets, target_bounds = _joined([target for _, target in rows])
    return Seq2SeqBatch(
        torch.tensor(ids, device=device),
        torch.tensor(targets, device=device),
        bounds,
        target_bounds,
    )


class Seq2SeqModel(LossModel):
    """An encoder-decoder with its method on; its forward is the loss of a batch, or the next
    logits of a row's answer.

    Raises:
        BaseModelError: transformers does not tell how its targets are shifted.
    """

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        whole: Any = model
        base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        if not hasattr(base, "prepare_decoder_input_ids_from_labels"):
            raise BaseModelError(
                f"{type(base).__name__} does not tell what its decoder reads before a target; "
                "name a base of another family (T5, mT5, BART, …)"
            )
        super().__init__(model, **options)

    def _run(self, batch: Seq2SeqBatch) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """(hidden [N, H], logits [N, V]) at label positions, rows padded on the right."""
        pad = self._base.config.get_text_config().pad_token_id or 0
        ids_BS, mask_BS = padded(batch.ids_T, batch.bounds, pad)
        labels_BT, _ = padded(batch.targets_T, batch.target_bounds, IGNORE)
        with self._head_at(labels_BT != IGNORE) as head:
            logits = self.model(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                decoder_input_ids=self._shifted(labels_BT),
                use_cache=False,
            ).logits
        return head.hidden_NH, logits

    def _shifted(self, labels_BT: torch.Tensor) -> torch.Tensor:
        """What the decoder reads: the targets behind their start, as the family has it."""
        readable_BT = labels_BT.clone()
        # A row that teaches nothing has no token either, and some families look for its last one.
        is_empty_B = (labels_BT == IGNORE).all(1)
        readable_BT[:, 0] = readable_BT[:, 0].masked_fill(is_empty_B, 0)
        shifted: torch.Tensor = self._base.prepare_decoder_input_ids_from_labels(labels=readable_BT)
        return shifted

    def _next_logits(self, row: Continuation) -> torch.Tensor:
        """Of `row.ids`, the source and behind it what was answered so far."""
        device = self._base.get_input_embeddings().weight.device
        ids_1T = torch.tensor([row.ids], device=device)
        last = torch.ones((1, 1), dtype=torch.bool, device=device)
        inputs: dict[str, Any]
        if row.cache is None:
            model = self.model
            inputs = {
                "input_ids": ids_1T,
                "attention_mask": torch.ones_like(ids_1T),
                "decoder_input_ids": self._start(ids_1T),
            }
        else:
            model, (cache, encoded) = self._base, row.cache
            inputs = {
                "encoder_outputs": BaseModelOutput(last_hidden_state=encoded),
                "decoder_input_ids": ids_1T[:, -1:],
                "past_key_values": cache,
            }
        with HeadAt(self._base, last, whole=True):
            output = model(**inputs, use_cache=True)
        row.cache = (output.past_key_values, output.encoder_last_hidden_state)
        return output.logits.flatten()

    def _start(self, ids_1T: torch.Tensor) -> torch.Tensor:
        """What the decoder reads first, [1, 1]: what the configuration says, as generation has it;
        without that what a target that ends as the source does would begin with (mBART)."""
        start = getattr(self._base.config, "decoder_start_token_id", None)
        last = ids_1T[:, -1:]
        return self._shifted(last) if start is None else torch.full_like(last, start)

    def _compare(self, parameter: torch.Tensor) -> None:
        rows = [([n + i for i in range(n)], [n, *range(n)]) for n in PROBE_LENGTHS]
        was_training = self.training
        self.eval()
        self._compare_head(collate_pairs(rows, parameter.device))
        self.train(was_training)


def _joined(rows: Sequence[list[int]]) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    joined: list[int] = []
    bounds: list[tuple[int, int]] = []
    for row in rows:
        bounds.append((len(joined), len(joined) + len(row)))
        joined += row
    return joined, tuple(bounds)
