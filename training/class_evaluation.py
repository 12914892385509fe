"""What a classifier is worth on rows that it does not train on: loss, accuracy, macro F1.

Knows a Backend's model and rows; no Ray, no DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from training.classifier import Prediction
from training.evaluation import Answer, Evaluation, Evaluator


class ClassEvaluator(Evaluator):
    """Evaluates a classifier on one worker."""

    def _measured(self, model: Any, step: int) -> tuple[Evaluation, list[Answer]]:
        losses = torch.zeros(len(self._batches), dtype=torch.float64)
        given_R = torch.zeros(len(self._rows), dtype=torch.int64)
        for index, mine in self._turns(len(self._batches)):
            batch = self._batch(index)
            logits_BC = model(Prediction(batch))
            if mine:
                loss = cross_entropy(logits_BC, batch.targets_T, reduction="sum")
                losses[index] = loss.double().cpu()
                given_R[torch.from_numpy(self._batches[index])] = logits_BC.argmax(-1).cpu()
        given = self._summed(given_R).numpy()
        expected = np.array([self._rows.row(i)[1][0] for i in range(len(self._rows))])
        loss = float(self._summed(losses).sum()) / len(self._rows)
        found = Evaluation(
            step,
            loss,
            accuracy=float((given == expected).mean()),
            macro_f1=macro_f1(given, expected),
        )
        return found, self._shown(given, expected)

    def _shown(self, given: np.ndarray, expected: np.ndarray) -> list[Answer]:
        first = np.argsort(self._rows.hashes, kind="stable")[: self.spec.shown]
        return [
            Answer(
                self._text(self._rows.row(int(i))[0]),
                self._labels[int(expected[i])],
                self._labels[int(given[i])],
            )
            for i in first
        ]

    def _chosen(self, room: int | None) -> list[tuple[list[int], list[int]]]:
        """A classifier writes nothing."""
        return []


def macro_f1(given: np.ndarray, expected: np.ndarray) -> float:
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN); over those that some row has or is
    given, as scikit-learn takes them."""
    scores: list[float] = []
    for number in np.union1d(given, expected):
        is_given, is_so = given == number, expected == number
        scores.append(2 * int((is_given & is_so).sum()) / int(is_given.sum() + is_so.sum()))
    return float(np.mean(scores))
