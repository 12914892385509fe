"""Loss models of each task that cannot compare numbers: `graft estimate`'s, on fake tensors.

What a loss model finds out by comparing what it computed (training.step, seq2seq, classifier), they
take from shapes, from storages and from whether the base can do it at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cluster.tasks import Task
from training.classifier import HEAD, Classifier, collate_labelled
from training.seq2seq import Seq2SeqModel, collate_pairs
from training.shared_pass import SharedPass
from training.step import LossModel, collate

_PROBE = [([0] * 8, [0] * 8)] * 2


class _ShapedCausal(LossModel):
    def _compare(self, parameter: torch.Tensor) -> None:
        batch = collate(_PROBE, parameter.device)
        self.has_plain_head = self._has_head_here() and _returns_its_heads(self, batch)
        self._try_packing(lambda: bool(self._run_packed(batch)))


class _ShapedSeq2Seq(Seq2SeqModel):
    def _compare(self, parameter: torch.Tensor) -> None:
        batch = collate_pairs(_PROBE, parameter.device)
        self.has_plain_head = self._has_head_here() and _returns_its_heads(self, batch)


class _ShapedClassifier(Classifier):
    def _compare(self, parameter: torch.Tensor) -> None:
        self._reads_last = hasattr(self._base, HEAD)
        if self._reads_last:
            batch = collate_labelled([(ids, [0]) for ids, _ in _PROBE], parameter.device)
            self._try_packing(lambda: self._logits_packed(batch).ndim > 0)


class ShapedPass(SharedPass):
    """Of several adapters: it learns where tokens are, and compares no losses."""

    host_model = _ShapedCausal

    def _compare(self) -> None:
        with torch.no_grad():
            self.losses(self._probes(torch.device("cpu")))


SHAPED: Mapping[Task, type[LossModel]] = {
    "causal_lm": _ShapedCausal,
    "seq_2_seq_lm": _ShapedSeq2Seq,
    "sequence_classification": _ShapedClassifier,
}


def _returns_its_heads(model: Any, batch: Any) -> bool:
    """Whether the logits that the base returns are what its output embedding made: but for a bias
    that BART's relatives add, which is zeros in all of them but Marian."""
    if hasattr(model.base, "final_logits_bias"):
        return model.base.config.model_type != "marian"
    made: list[torch.Tensor] = []
    head = model.base.get_output_embeddings()

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        made.append(output)

    hook = head.register_forward_hook(keep)
    _, logits = model.outputs(batch)
    hook.remove()
    of_head: Any = made[0].untyped_storage()
    returned: Any = logits.untyped_storage()
    return returned._cdata == of_head._cdata or logits.dtype != made[0].dtype
