"""A classifier's forward pass and its exact loss.

    B rows    T tokens of the micro-batch    C classes    H hidden    P virtual tokens

A row is one label, so a step's loss is the sum of its rows' negative log-likelihoods over their
number, however it is cut. A causal base is read at each row's last token: its rows lie end to end,
as for language modelling, or are padded where they cannot, and its head sees these tokens alone.
An encoder, which attends to both sides, is padded with a mask. Which of these gives what the base
itself gives of each row alone is found out when the model is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from cluster.errors import BaseModelError
from training.contact import stays_apart
from training.packed import packed
from training.rows import IGNORE
from training.step import PROBE_LENGTHS, TOLERANCE, Batch, LossModel, collate, padded

HEAD = "score"  # of transformers' causal classifiers, linear and behind each token


@dataclass(frozen=True)
class Prediction:
    """A batch of which the logits [B, C] are asked, not the loss."""

    batch: Batch


def collate_labelled(rows: Sequence[tuple[list[int], list[int]]], device: torch.device) -> Batch:
    """(ids, [class]) rows to a batch; its targets are the classes, one for each row."""
    ids = collate([(ids, ids) for ids, _ in rows], device)
    classes = torch.tensor([label for _, (label,) in rows], device=device)
    return Batch(ids.ids_T, classes, ids.bounds)


class Classifier(LossModel):
    """A classifier with its method on; its forward is the loss of a batch, or its logits.

    Raises:
        BaseModelError: the base gives other logits where rows of several lengths are together.
    """

    def forward(self, asked: Batch | Prediction) -> torch.Tensor:  # type: ignore[override]
        """Of a batch: the sum of the rows' negative log-likelihoods, float32 scalar with a graph.
        Of a prediction: the logits [B, C], float32."""
        with self.autocast():
            if isinstance(asked, Prediction):
                return self._logits(asked.batch).float()
            learned_B = asked.targets_T != IGNORE
            logits_NC = self._logits(asked)[learned_B].float()
            return cross_entropy(logits_NC, asked.targets_T[learned_B], reduction="sum")

    def _logits(self, batch: Batch) -> torch.Tensor:
        if self.is_packed:
            return self._logits_packed(batch)
        return self._logits_read(batch) if self._reads_last else self._logits_own(batch)

    def _logits_packed(self, batch: Batch) -> torch.Tensor:
        _, inputs, layout = self._packed_inputs(batch)
        with packed(layout):
            hidden_TH = self._body(**inputs, use_cache=False).last_hidden_state[0]
        ends = torch.tensor([end for _, end in layout.bounds], device=hidden_TH.device)
        return self._head(hidden_TH[ends - 1 - self._trailing(batch)])

    def _logits_read(self, batch: Batch) -> torch.Tensor:
        """Padded on the right, the soft prompt in front, and the head at each row's last token."""
        ids_BT, mask_BT = padded(batch.ids_T, batch.bounds, self._pad)
        inputs: dict[str, Any] = {"input_ids": ids_BT}
        if self._soft_prompt is not None:
            prompt: Any = self.model.get_prompt(len(ids_BT))  # type: ignore[operator]
            if self._soft_prompt == "PREFIX_TUNING":
                inputs["past_key_values"] = prompt
            else:
                embeddings_BTH = self._base.get_input_embeddings()(inputs.pop("input_ids"))
                prompt_BPH = prompt.to(embeddings_BTH.dtype)
                inputs["inputs_embeds"] = torch.cat([prompt_BPH, embeddings_BTH], 1)
            mask_BP = mask_BT.new_ones((len(mask_BT), self.virtual_tokens))
            inputs["attention_mask"] = torch.cat([mask_BP, mask_BT], 1)
        else:
            inputs["attention_mask"] = mask_BT
        hidden_BTH = self._body(**inputs, use_cache=False).last_hidden_state[:, -ids_BT.shape[1] :]
        rows = torch.arange(len(hidden_BTH), device=hidden_BTH.device)
        return self._head(hidden_BTH[rows, mask_BT.sum(1) - 1 - self._trailing(batch)])

    def _logits_own(self, batch: Batch) -> torch.Tensor:
        ids_BT, mask_BT = padded(batch.ids_T, batch.bounds, self._pad)
        logits: torch.Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return logits

    def _trailing(self, batch: Batch) -> torch.Tensor:
        """How many padding tokens each row itself ends with: transformers reads the one before
        them, where it sees ids at all. An end token is one in some families."""
        sees_ids = self._soft_prompt in (None, "PREFIX_TUNING")
        pad = self._base.config.get_text_config().pad_token_id if sees_ids else None
        counts = [0] * len(batch.bounds)
        if pad is not None:
            ids = batch.ids_T.tolist()
            for row, (start, end) in enumerate(batch.bounds):
                while counts[row] < end - start - 1 and ids[end - 1 - counts[row]] == pad:
                    counts[row] += 1
        return torch.tensor(counts, device=batch.ids_T.device)

    @property
    def _pad(self) -> int:
        return self._base.config.get_text_config().pad_token_id or 0

    @property
    def _body(self) -> Any:
        return getattr(self._base, self._base.base_model_prefix)

    def _head(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        return getattr(self._base, HEAD)(hidden_BH)

    def _compare(self, parameter: torch.Tensor) -> None:
        rows = [([n + i for i in range(n)], [0]) for n in PROBE_LENGTHS]
        batch = collate_labelled(rows, parameter.device)
        was_training = self.training
        self.eval()
        alone = [self._logits_own(collate_labelled([row], parameter.device)) for row in rows]
        expected_BC = torch.cat(alone)
        # A few logits of a random head: in half precision, their rounding is a larger part of them.
        slack = 1 if self._precision == torch.float32 else 4
        limit = slack * TOLERANCE[self._precision] * max(1e-6, float(expected_BC.abs().max()))

        def agrees(logits: Callable[[Batch], torch.Tensor]) -> bool:
            try:
                return bool((logits(batch) - expected_BC).abs().max() <= limit)
            except (ValueError, RuntimeError, TypeError, AttributeError):
                return False

        self._reads_last = False
        if hasattr(self._base, HEAD):
            self._try_packing(
                lambda: (
                    agrees(self._logits_packed)
                    and stays_apart(self._base, batch.bounds, lambda: self._logits_packed(batch))
                )
            )
            self._reads_last = self.is_packed or agrees(self._logits_read)
        if not self._reads_last and not agrees(self._logits_own):
            raise BaseModelError(
                f"{type(self._base).__name__} gives other logits to a row beside longer ones; name "
                "a base of another family"
            )
        self.train(was_training)
