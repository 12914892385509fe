"""Several adapters trained in one run: each a run of its own, all in one pass over the base.

Who is done, by its last step, an early end or a failure of its own, leaves the pass to the others.
Micro-batches meet one by one, so adapters of other batch sizes, data or lengths go together; the
order of everything follows from the specs alone, so that workers stay in step. No Ray here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.errors import JobFailedError
from training.assembly import Assembly, assemble, load_model
from training.checkpoint import PROGRESS, Progress, write_checkpoint
from training.loop import MicroBatch, Work
from training.place import Place
from training.rows import TokenRows
from training.shared_pass import Draws, SharedPass, sharing
from training.spec import TrainingSpec


@dataclass(frozen=True)
class Rows:
    """What one adapter is trained and evaluated on, and the checkpoint that it goes on from."""

    training: TokenRows
    validation: TokenRows | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Assemblies:
    """The runs of all adapters by name, and the pass that they share."""

    runs: Mapping[str, Assembly]
    draws: Mapping[str, Draws]
    shared: SharedPass


def assemble_several(
    specs: Mapping[str, TrainingSpec], place: Place, rows: Mapping[str, Rows]
) -> Assemblies:
    """Build every adapter's run over one base. `specs` differ in what a spec's `adapters` may.

    Raises:
        CallerError: as `assemble`; or a base or method that cannot share a pass.
    """
    spec = next(iter(specs.values()))
    torch.manual_seed(spec.seed)  # as `assemble`: what a checkpoint lacks is drawn
    base = load_model(spec, place).to(place.device)
    made: dict[str, Assembly] = {}
    for name, own in specs.items():
        used = rows[name]
        made[name] = assemble(
            own, place, used.training, used.checkpoint, used.validation, base=sharing(base)
        )
    draws = {name: Draws(place.device) for name in specs}
    models = {name: each.model for name, each in made.items()}
    shared = SharedPass(base, models, draws, recomputes=spec.gradient_checkpointing)
    return Assemblies(made, draws, shared)


class Saved:
    """What every adapter would go on from: its state when it last saved one. Each run follows from
    its own state alone, so these need not be of one moment. Only the first worker, which writes
    them, holds states."""

    def __init__(self, place: Place) -> None:
        self._is_first = place.rank == 0
        self._states: dict[str, dict[str, torch.Tensor]] = {}
        self._progress: dict[str, Progress] = {}
        self.is_new = False

    def keep(self, name: str, made: Assembly, progress: Progress) -> None:
        """Take an adapter's state as it is. Collective."""
        state = made.full_state(keep=self._is_first)
        if self._is_first:
            self._states[name] = state
        self._progress[name] = progress
        self.is_new = True

    @property
    def steps(self) -> int:
        """Updates of all adapters together: grows from one checkpoint to the next."""
        return sum(progress.step for progress in self._progress.values())

    def write(self, folder: Path) -> None:
        """A checkpoint: a folder for each adapter, and PROGRESS. By the first worker."""
        for name, state in self._states.items():
            write_checkpoint(folder / name, state, self._progress[name])
        steps = {name: progress.step for name, progress in self._progress.items()}
        (folder / PROGRESS).write_text(json.dumps(steps))


@dataclass
class Runner:
    """One adapter's run on its way. `asked` is its next micro-batch; without one it has ended, at
    `end` or by `failure`."""

    work: Work
    draws: Draws
    asked: MicroBatch | None = None
    end: Progress | None = None
    failure: str | None = None

    def go_on(self, loss: torch.Tensor | None) -> None:
        """Take the loss of what was asked, None at the start, up to the next question."""
        self.asked = None
        try:
            with self.draws():
                self.asked = next(self.work) if loss is None else self.work.send(loss)
        except StopIteration as ended:
            self.end = ended.value
        except JobFailedError as error:
            self.failure = error.message


def run_several(
    shared: SharedPass,
    runners: Mapping[str, Runner],
    after_round: Callable[[], None] = lambda: None,
) -> None:
    """Take every run to its end. `after_round` is called behind each micro-batch of all."""
    for runner in runners.values():
        runner.go_on(None)
    after_round()
    while asked := {name: run.asked for name, run in runners.items() if run.asked}:
        losses = shared.losses({name: each.batch for name, each in asked.items()})
        torch.autograd.backward([each.share(losses[name]) for name, each in asked.items()])
        for name in asked:
            runners[name].go_on(losses[name].detach())
        after_round()
