"""What a run is worth on rows that it does not train on: loss, greedy answers, the best weights.

Every number is the same on any number of workers: a row belongs to one worker, the others add
zero. What is best and whether to stop follows from the evaluations so far, so a resumed run needs
only those and the best weights. Knows a Backend and rows; no Ray, no DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.errors import DataError
from cluster.tasks import Task
from training.data_spec import EvaluationSpec
from training.rouge import rouge_l
from training.rows import IGNORE, Row, TokenRows
from training.step import Continuation, collate

_SHOWN_CHARACTERS = 160
# Under which tag trackers show what an evaluation measured.
_TAGS = {"loss": "loss/validation", "perplexity": "validation/perplexity",
         "exact_match": "validation/exact_match", "rouge_l": "validation/rouge_l",
         "accuracy": "validation/accuracy", "macro_f1": "validation/macro_f1"}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """One evaluation after `step` updates. `loss` is the mean over all label tokens, or all rows
    of a classifier; the shares `exact_match` and `rouge_l` are over the answered rows, None if
    there are none; `accuracy` and `macro_f1` are a classifier's, over all rows."""

    step: int
    loss: float
    exact_match: float | None = None
    rouge_l: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def figures(self) -> dict[str, float]:
        """What was measured, by tag."""
        values = {tag: getattr(self, name) for name, tag in _TAGS.items()}
        return {tag: value for tag, value in values.items() if value is not None}

    def __str__(self) -> str:
        text = f"evaluation at step {self.step}  loss {self.loss:.4f}  "
        if self.accuracy is not None and self.macro_f1 is not None:
            return text + f"accuracy {self.accuracy:.1%}  macro F1 {self.macro_f1:.3f}"
        text += f"perplexity {self.perplexity:.2f}"
        if self.exact_match is not None and self.rouge_l is not None:
            text += f"  exact match {self.exact_match:.1%}  ROUGE-L {self.rouge_l:.3f}"
        return text


@dataclass(frozen=True)
class Answer:
    """A validation row's prompt, what should follow, and what the model said."""

    prompt: str
    expected: str
    given: str

    def __str__(self) -> str:
        prompt, expected, given = map(_cut, (self.prompt, self.expected, self.given))
        verdict = "as expected" if self.given == self.expected else f"expected ⟦{expected}⟧"
        return f"  {prompt}⟦{given}⟧ {verdict}"


def best_of(history: Sequence[Evaluation], by: str) -> Evaluation | None:
    """The best evaluation, the first of equals; None without any, or by `none`."""
    if by == "none" or not history:
        return None
    sign = 1 if by == "loss" else -1

    def badness(found: Evaluation) -> float:
        value = sign * getattr(found, by)
        return value if math.isfinite(value) else math.inf

    return min(history, key=badness)


def is_over(history: Sequence[Evaluation], spec: EvaluationSpec) -> bool:
    """Whether the last `patience` evaluations were all no better than one before them."""
    best = best_of(history, spec.best)
    if spec.patience is None or best is None:
        return False
    return len(history) - 1 - history.index(best) >= spec.patience


def question_of(row: Row, task: Task = "causal_lm") -> tuple[list[int], list[int]] | None:
    """(prompt, answer) ids of a row: of a causal LM its last learned part and all before it, or
    None where nothing is before it."""
    ids, labels = row
    if task == "seq_2_seq_lm":
        return ids, labels
    end = len(ids)
    while end and labels[end - 1] == IGNORE:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORE:
        start -= 1
    return (ids[:start], ids[start:end]) if start else None


class Evaluator:
    """Evaluates one run on one worker. `history` and `best` are what a checkpoint keeps of it.

    Args:
        task: What the rows are; those of a classifier have an Evaluator of their own.
        collate: Makes a batch of some of them.
        labels: The classes' names, in order, of a classifier.
        room: Longest prompt and answer together, in tokens; None if the base sets no limit.
        is_sharded: Every forward is collective (ZeRO 3).
    """

    def __init__(
        self,
        spec: EvaluationSpec,
        rows: TokenRows,
        tokenizer: Any,
        *,
        task: Task = "causal_lm",
        collate: Callable[[Sequence[Row], torch.device], Any] = collate,
        labels: Sequence[str] = (),
        batch_rows: int,
        rank: int,
        world_size: int,
        device: torch.device,
        room: int | None = None,
        is_sharded: bool = False,
        history: Sequence[Evaluation] = (),
        best: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.spec, self.history, self.best = spec, list(history), dict(best or {})
        self._rows, self._tokenizer = rows, tokenizer
        self._task: Task = task
        self._collate, self._labels = collate, labels
        self._rank, self._world_size, self._device = rank, world_size, device
        self._is_sharded = is_sharded
        order = np.argsort(rows.lengths, kind="stable")
        self._batches = [order[i : i + batch_rows] for i in range(0, len(order), batch_rows)]
        self._label_tokens = int(rows.label_counts.sum())
        # Why no row is answered, where answers are asked for.
        self.unanswered: str | None = None
        self._questions = self._chosen(room)

    def evaluate(self, model: Any, step: int) -> tuple[Evaluation, list[Answer]]:
        """Measure `model`, a backend's, after `step` updates, and note it. Collective."""
        was_training = model.training
        model.eval()
        with torch.no_grad():
            found, answers = self._measured(model, step)
        model.train(was_training)
        self.history.append(found)
        return found, answers

    @property
    def best_evaluation(self) -> Evaluation | None:
        """The one whose weights `best` holds, if any."""
        return best_of(self.history, self.spec.best)

    @property
    def is_best(self) -> bool:
        """Whether the last evaluation is the best one so far."""
        return self.best_evaluation is self.history[-1]

    @property
    def is_over(self) -> bool:
        """Whether training should end early."""
        return is_over(self.history, self.spec)

    def _measured(self, model: Any, step: int) -> tuple[Evaluation, list[Answer]]:
        loss, answers = self._loss(model), self._answers(model)
        shares: list[float] = []
        if answers:
            matches = [answer.given == answer.expected for answer in answers]
            likeness = [rouge_l(answer.given, answer.expected) for answer in answers]
            shares = [sum(values) / len(answers) for values in (matches, likeness)]
        return Evaluation(step, loss, *shares), answers

    def _loss(self, model: Any) -> float:
        losses = torch.zeros(len(self._batches), dtype=torch.float64)
        for index, mine in self._turns(len(self._batches)):
            batch = self._batch(index)
            loss = model(batch)
            if mine:
                losses[index] = loss.double().cpu()
        return float(self._summed(losses).sum()) / max(1, self._label_tokens)

    def _batch(self, index: int) -> Any:
        rows = [self._rows.row(int(i)) for i in self._batches[index]]
        return self._collate(rows, self._device)

    def _answers(self, model: Any) -> list[Answer]:
        ids = torch.zeros((len(self._questions), self.spec.max_new_tokens), dtype=torch.int64)
        for index, mine in self._turns(len(self._questions)):
            answer = self._answer(model, *self._questions[index])
            if mine:
                # Zero is a token too: what is not written is told by its sign after the sum.
                ids[index, : len(answer)] = torch.tensor(answer) + 1
        return [
            Answer(self._text(prompt), self._text(expected), self._text(_written(row)))
            for (prompt, expected), row in zip(
                self._questions, self._summed(ids).tolist(), strict=True
            )
        ]

    def _answer(self, model: Any, prompt: Sequence[int], expected: Sequence[int]) -> list[int]:
        """The greedy continuation, with its end token if it comes to one: the tokenizer's, or the
        special token by which the expected answer ends, as a chat's turns do."""
        special = {*self._tokenizer.all_special_ids}
        ends = {self._tokenizer.eos_token_id, *(special & {expected[-1]})}
        row, answer, is_done = Continuation(list(prompt)), list[int](), False
        for _ in range(self.spec.max_new_tokens):
            if self._all(is_done):
                break
            logits_V = model(row)
            if is_done:  # others are not, and need this worker's shards
                continue
            token = int(logits_V.argmax())
            answer.append(token)
            row.ids.append(token)
            is_done = token in ends
        return answer

    def _all(self, is_done: bool) -> bool:
        """Whether no worker has anything left to do that takes part of all."""
        if not self._is_sharded or self._world_size == 1:
            return is_done
        return int(self._summed(torch.tensor([int(is_done)]))) == self._world_size

    def _turns(self, count: int) -> Iterator[tuple[int, bool]]:
        """What this worker does of `count` things, and whether its result counts: under ZeRO 3 a
        worker without one does the last of them again, since each forward takes all workers."""
        for start in range(0, count, self._world_size):
            index = start + self._rank
            if index < count or self._is_sharded:
                yield min(index, count - 1), index < count

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        if self._world_size == 1:
            return values
        values = values.to(self._device)
        dist.all_reduce(values)
        return values.cpu()

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _chosen(self, room: int | None) -> list[tuple[list[int], list[int]]]:
        """The first rows by hash that have a prompt and leave room for an answer."""
        found: list[tuple[list[int], list[int]]] = []
        if not self.spec.generations:
            return found
        for index in np.argsort(self._rows.hashes, kind="stable"):
            question = question_of(self._rows.row(int(index)), self._task)
            length = len(question[0]) + self.spec.max_new_tokens if question else 0
            if question and (room is None or length <= room):
                found.append(question)
            if len(found) == self.spec.generations:
                return found
        if not found:
            self.unanswered = (
                f"no row has a prompt that leaves {self.spec.max_new_tokens} tokens for an answer"
            )
            if self.spec.best in ("exact_match", "rouge_l"):
                raise DataError(
                    f"data.validation: {self.unanswered}, and evaluation.best is {self.spec.best}; "
                    "lower evaluation.max_new_tokens, or choose the best by loss"
                )
        return found


def _written(row: Sequence[int]) -> list[int]:
    return [value - 1 for value in row if value]


def _cut(text: str) -> str:
    text = text.replace("\n", "↵")
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"
