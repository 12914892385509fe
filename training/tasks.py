"""What each task runs: how rows become a batch, the model whose forward is the loss, and what it is
worth on other rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cluster.tasks import Task
from training.class_evaluation import ClassEvaluator
from training.classifier import Classifier, collate_labelled
from training.evaluation import Evaluator
from training.rows import Row
from training.seq2seq import Seq2SeqModel, collate_pairs
from training.step import LossModel, collate


@dataclass(frozen=True)
class TaskParts:
    """Of one task: `collate` makes a batch of rows on a device, `model` takes it, `evaluator`
    measures it; `answers_in_context` if an answer takes of the prompt's context."""

    collate: Callable[[Sequence[Row], torch.device], Any]
    model: type[LossModel]
    evaluator: type[Evaluator]
    answers_in_context: bool


TASK_PARTS: Mapping[Task, TaskParts] = {
    "causal_lm": TaskParts(collate, LossModel, Evaluator, True),
    "seq_2_seq_lm": TaskParts(collate_pairs, Seq2SeqModel, Evaluator, False),
    "sequence_classification": TaskParts(collate_labelled, Classifier, ClassEvaluator, False),
}
