"""What each task runs: how rows become a batch, and the model whose forward is the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cluster.tasks import Task
from training.classifier import Classifier, collate_labelled
from training.rows import Row
from training.seq2seq import Seq2SeqModel, collate_pairs
from training.step import LossModel, collate


@dataclass(frozen=True)
class TaskParts:
    """Of one task: `collate` makes a batch of rows on a device, `model` takes it."""

    collate: Callable[[Sequence[Row], torch.device], Any]
    model: type[LossModel]


TASK_PARTS: Mapping[Task, TaskParts] = {
    "causal_lm": TaskParts(collate, LossModel),
    "seq_2_seq_lm": TaskParts(collate_pairs, Seq2SeqModel),
    "sequence_classification": TaskParts(collate_labelled, Classifier),
}
