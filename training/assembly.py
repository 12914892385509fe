"""All that one worker's run is made of: base, method, its course, optimiser, and where it starts.

No Ray here; the worker under Ray Train, the tests and the benchmarks all start a run this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cluster.base_model import load_base
from training.backend import Backend, PlainBackend
from training.checkpoint import Progress, read_checkpoint
from training.loop import Place
from training.methods import METHODS, trainable_parameters
from training.methods.course import Course
from training.rows import TokenRows
from training.spec import TrainingSpec
from training.step import Batch, LossModel, collate

_COURSE = "course/"


@dataclass(frozen=True)
class Assembly:
    """One worker's run, ready for `training.loop.run`."""

    backend: Backend
    course: Course
    start: Progress

    def full_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds. Collective."""
        course = {_COURSE + name: value for name, value in self.course.state().items()}
        return self.backend.full_state() | course


def assemble(
    spec: TrainingSpec, place: Place, rows: TokenRows, checkpoint: Path | None = None
) -> Assembly:
    """Build a run at its start, or as `checkpoint` left it. Collective; the same on every worker.

    Raises:
        CallerError: the base or the method does not fit; names the field.
        StoreError: the checkpoint is not whole.
    """
    state, start = read_checkpoint(checkpoint) if checkpoint else ({}, Progress())
    torch.manual_seed(spec.seed)
    dtype = torch.float32 if spec.precision == "fp32" else torch.bfloat16
    method = METHODS[spec.method.kind]
    base = load_base(spec.trained_base, dtype)
    model = method.attach(base, spec.method, spec.base_model)
    model.to(place.device).train()
    loss_model = LossModel(model, is_sharded=spec.zero.stage == 3)
    course = method.course(model, spec.method, spec.seed)
    if checkpoint:
        saved = {k.removeprefix(_COURSE): v for k, v in state.items() if k.startswith(_COURSE)}
        course.restore(loss_model, saved)
    else:
        course.prepare(loss_model, _samples(spec, rows, place))
    backend = _backend(loss_model, spec)
    if checkpoint:
        backend.load_full_state(state, start.step)
    return Assembly(backend, course, start)


def _samples(spec: TrainingSpec, rows: TokenRows, place: Place) -> Iterator[Batch]:
    """Single rows in an order of their own, the same on every worker."""
    for index in np.random.default_rng([spec.seed, 1]).permutation(len(rows)):
        yield collate([rows.row(int(index))], place.device)


def _backend(model: LossModel, spec: TrainingSpec) -> Backend:
    if spec.zero.stage == 0 or not trainable_parameters(model):
        return PlainBackend(model, spec.optimizer)
    from training.zero import ZeroBackend

    return ZeroBackend(model, spec)
