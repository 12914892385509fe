"""One worker's run: steps in a fixed order, log lines, checkpoints.

A run is a pure function of the spec, the data and the base: which rows a step takes follows from
(seed, step), dropout from (seed, step, rank). So a run that goes on from a checkpoint equals one
that was never disturbed. Knows a Backend and rows; no Ray, no DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
import torch.distributed as dist

from cluster.errors import JobFailedError
from training.backend import Backend
from training.checkpoint import Progress, run_state
from training.evaluation import Answer, Evaluation, Evaluator
from training.loss_scale import LossScale
from training.meter import LogLine, Meter
from training.methods.course import Course
from training.place import Place
from training.rows import IGNORE, TokenRows, epoch_batches, micro_batches
from training.spec import OptimizerSpec, TrainingSpec
from training.step import Batch
from training.tasks import TASK_PARTS


@dataclass(frozen=True)
class MicroBatch:
    """What a run asks for: forward and backward of `batch`. `share` makes of the batch's loss what
    it adds to the step's, times the loss scale: what backward starts from."""

    batch: Batch
    share: Callable[[torch.Tensor], torch.Tensor]


# A run as its micro-batches: it is sent the loss of each, detached, after that one's backward.
Work = Generator[MicroBatch, torch.Tensor, Progress]


def count_steps(spec: TrainingSpec, rows: int) -> int:
    """Optimiser steps of the whole run over `rows` rows."""
    per_epoch = math.ceil(rows / spec.global_batch_size)
    if spec.max_steps is not None:
        return spec.max_steps
    return max(1, round(spec.epochs * per_epoch))


def learning_rate(spec: OptimizerSpec, step: int, steps: int) -> float:
    """The rate of update `step` (from 0): linear warm-up, then the schedule, ending near 0."""
    warm_up = math.ceil(spec.warmup_ratio * steps)
    if step < warm_up:
        return spec.learning_rate * (step + 1) / warm_up
    share = (step - warm_up) / max(1, steps - warm_up)
    factor = {
        "constant": 1.0,
        "linear": 1 - share,
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
    }[spec.schedule]
    return spec.learning_rate * factor


class RunOptions(TypedDict, total=False):
    """What a run may have besides its spec, backend and rows. The caller loaded `start`'s state."""

    course: Course
    place: Place
    start: Progress
    evaluator: Evaluator | None
    on_log: Callable[[LogLine], None]
    on_evaluation: Callable[[Evaluation, Sequence[Answer]], None]
    on_checkpoint: Callable[[Progress], None]
    # How many machines of the run are about to be taken away, as far as this worker knows; and who
    # is told of the step at whose end all save a checkpoint because it is one more.
    count_notices: Callable[[], int]
    on_notice: Callable[[int], None]


def run(
    spec: TrainingSpec, backend: Backend, rows: TokenRows, **options: Unpack[RunOptions]
) -> Progress:
    """Train from `start` to the end; returns where it ended.

    Raises:
        JobFailedError: the loss or gradient is no longer finite, or the gradient has exploded.
    """
    work = as_work(spec, backend, rows, **options)
    try:
        asked = next(work)
        while True:
            loss = backend.model(asked.batch)
            backend.backward(asked.share(loss))
            asked = work.send(loss.detach())
    except StopIteration as end:
        return end.value


def as_work(
    spec: TrainingSpec, backend: Backend, rows: TokenRows, **options: Unpack[RunOptions]
) -> Work:
    """The run, but for the forward and backward of its micro-batches, which the caller does."""
    place, progress = options.get("place") or Place(), options.get("start") or Progress()
    course, evaluator = options.get("course") or Course(), options.get("evaluator")
    steps = count_steps(spec, len(rows))
    meter = Meter(place, progress, steps)
    scale = LossScale(
        is_dynamic=spec.precision == "fp16",
        value=progress.loss_scale,
        good_steps=progress.good_steps,
    )
    # A run goes on in the order that it began in, whatever the base allows by now.
    is_packed = progress.is_packed
    if not progress.step:
        is_packed = bool(place.reduce(backend.model.is_packed, dist.ReduceOp.MIN))
    train_step = _Stepper(spec, backend, rows, course, place, meter, scale, is_packed=is_packed)
    is_noticed = _Notices(place, options.get("count_notices", int))

    def evaluate(step: int) -> None:
        if evaluator is None:
            return
        found = evaluator.evaluate(backend.model, step)
        if evaluator.is_best:
            evaluator.best = _weights(backend, course)
        if on_evaluation := options.get("on_evaluation"):
            on_evaluation(*found)

    def reached(step: int) -> Progress:
        history = evaluator.history if evaluator else ()
        return replace(
            meter.progress(step),
            evaluations=tuple(history),
            loss_scale=scale.value if scale.is_dynamic else None,
            good_steps=scale.good_steps,
            is_packed=is_packed,
        )

    for step in range(progress.step, steps):
        if evaluator and evaluator.is_over:
            break
        rate, grad_norm = yield from train_step(step, steps)
        is_last = step + 1 == steps
        every = spec.evaluation.every_steps
        if is_last or (every is not None and (step + 1) % every == 0):
            evaluate(step + 1)
            is_last = is_last or (evaluator is not None and evaluator.is_over)
        if (step + 1) % spec.log_every_steps == 0 or is_last:
            line = meter.line(step + 1, rate, grad_norm)
            # The loss can be infinite where its gradient is not. Summed over workers only here.
            _check_finite("loss", line.loss, step)
            told = scale.value if scale.is_dynamic else None
            options.get("on_log", print)(replace(line, loss_scale=told))
        is_saved = (step + 1) % spec.checkpoint_every_steps == 0 or is_last
        if is_noticed():
            is_saved = True
            options.get("on_notice", print)(step + 1)
        if is_saved:
            meter.gather()
            _check_finite("loss", meter.lap_loss, step)
        progress = reached(step + 1)
        if is_saved and (on_checkpoint := options.get("on_checkpoint")):
            on_checkpoint(progress)
    if not steps:  # a method that trains nothing
        evaluate(0)
        progress = reached(0)
    return progress


class _Notices:
    """Whether one more machine of the run is about to be taken away since it was last asked.
    Collective: workers learn of it at different moments, and whoever is first has all save."""

    def __init__(self, place: Place, count: Callable[[], int]) -> None:
        self._place, self._count, self._known = place, count, 0

    def __call__(self) -> bool:
        before = self._known
        self._known = int(self._place.reduce(self._count(), dist.ReduceOp.MAX))
        return self._known > before


class _Stepper:
    """One optimiser step after the other: its rows, its micro-batches, its update."""

    def __init__(
        self,
        spec: TrainingSpec,
        backend: Backend,
        rows: TokenRows,
        course: Course,
        place: Place,
        meter: Meter,
        scale: LossScale,
        *,
        is_packed: bool,
    ) -> None:
        self._spec, self._backend, self._rows, self._course = spec, backend, rows, course
        self._is_packed, self._plan = is_packed, _Plan(spec, rows, is_packed=is_packed)
        self._place, self._meter, self._scale = place, meter, scale
        self._accumulation = spec.accumulation(place.world_size)

    def __call__(
        self, step: int, steps: int
    ) -> Generator[MicroBatch, torch.Tensor, tuple[float, float]]:
        """Do step `step` of `steps`; returns its learning rate and the gradient's norm.

        Raises:
            JobFailedError: the gradient is not finite, or has exploded.
        """
        rate = learning_rate(self._spec.optimizer, step, steps)
        self._backend.set_learning_rate(rate)
        taken = self._plan.rows_of(step)
        label_count = int(self._rows.label_counts[taken].sum())
        while True:
            losses = yield from self._passes(step, steps, taken, label_count)
            grad_norm = self._backend.finish_step()
            if math.isfinite(grad_norm) or not self._scale.is_dynamic:
                break
            self._lower_scale(step, losses)
        _check_finite("gradient", grad_norm, step)
        if grad_norm > (limit := self._spec.optimizer.stop_grad_norm):
            raise _diverged(
                f"the gradient's norm is {grad_norm:.3g}, over optimizer.stop_grad_norm {limit:g}",
                step, "Lower optimizer.learning_rate, or raise that limit",
            )  # fmt: skip
        self._scale.grow()
        self._course.end_step(step, steps, self._backend)
        for loss in losses:
            self._meter.add_loss(loss)
        self._meter.add_step(label_count, int(self._rows.lengths[taken].sum()))
        return rate, grad_norm

    def _passes(
        self, step: int, steps: int, taken: np.ndarray, label_count: int
    ) -> Generator[MicroBatch, torch.Tensor, list[torch.Tensor]]:
        """Forward and backward of a step's micro-batches, the same each time; their losses."""
        place, losses = self._place, list[torch.Tensor]()
        self._backend.set_loss_scale(self._scale.value)
        self._course.begin_step(step, steps)
        torch.manual_seed(hash((self._spec.seed, step, place.rank)) % 2**63)
        for part in micro_batches(
            taken, self._rows.lengths[taken], place.rank, place.world_size, self._accumulation,
            is_packed=self._is_packed,
        ):  # fmt: skip
            batch = _load(self._spec, self._rows, part, place.device)
            losses.append((yield MicroBatch(batch, partial(self._share, label_count))))
        return losses

    def _lower_scale(self, step: int, losses: Sequence[torch.Tensor]) -> None:
        """A step overflowed: make it ready for another try, or raise JobFailedError where no scale
        would help. Collective."""
        loss = self._place.reduce(sum(map(float, losses)), dist.ReduceOp.SUM)
        if not math.isfinite(loss):
            reason = f"the loss is {loss}: the forward pass overflowed, which no scale helps"
        elif not self._scale.halve():
            reason = "the gradient is not finite at a loss scale of 1"
        else:
            return
        raise _diverged(
            f"fp16, {reason}", step,
            "Set precision to bf16, which has fp32's range, or to fp32; or lower "
            "optimizer.learning_rate",
        )  # fmt: skip

    def _share(self, label_count: int, loss: torch.Tensor) -> torch.Tensor:
        share, penalty = loss / label_count, self._course.penalty()
        if penalty is not None:
            share = share + penalty / (self._place.world_size * self._accumulation)
        return share * self._scale.value


def _weights(backend: Backend, course: Course) -> dict[str, torch.Tensor]:
    """What an adapter is saved from, as a state without moments."""
    return run_state(backend, course, moments=False)


def _check_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        remedy = "Lower optimizer.learning_rate, or look at the rows of this step"
        raise _diverged(f"the {what} is {value}", step, remedy)


def _diverged(reason: str, step: int, remedy: str) -> JobFailedError:
    """The job, which sees the store, tells what can be gone on from."""
    return JobFailedError(f"training diverged at step {step + 1}: {reason}. {remedy}")


class _Plan:
    """Which rows each step takes; keeps the order of one epoch at a time."""

    def __init__(self, spec: TrainingSpec, rows: TokenRows, *, is_packed: bool) -> None:
        self._spec, self._lengths, self._is_packed = spec, rows.lengths, is_packed
        self._per_epoch = math.ceil(len(rows) / spec.global_batch_size)
        self._epoch: int | None = None
        self._batches: list[np.ndarray] = []

    def rows_of(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            size, seed = self._spec.global_batch_size, self._spec.seed
            self._batches = epoch_batches(
                self._lengths, size, seed, epoch, is_packed=self._is_packed
            )
            self._epoch = epoch
        return self._batches[index]


def _load(spec: TrainingSpec, rows: TokenRows, part: np.ndarray, device: torch.device) -> Any:
    """The rows of a micro-batch. A worker that has none left still takes part in the collective
    calls of the step, with one row of which nothing is learned."""
    collate = TASK_PARTS[spec.task].collate
    if len(part):
        return collate([rows.row(int(i)) for i in part], device)
    ids, labels = rows.row(int(rows.lengths.argmin()))
    return collate([(ids, [IGNORE] * len(labels))], device)
