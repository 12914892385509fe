"""What a method does besides following gradients: a look at the data first, a rank drawn each
step, weights set after an update.

One object for each run and worker; every worker makes the same calls with the same arguments, so
what it decides must follow from them alone. Its state is saved with each checkpoint. The loop
knows this interface and no method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from training.backend import Backend
    from training.step import Batch, LossModel


class Course:
    """The course of a method that has none: most follow their gradients alone."""

    def prepare(self, model: LossModel, samples: Iterator[Batch]) -> None:
        """Before the optimiser is made, at the start of a fresh run.

        Args:
            samples: One row each, in an order that the seed alone decides; they end with the data.
        """

    def restore(self, model: LossModel, state: Mapping[str, torch.Tensor]) -> None:
        """Instead of `prepare` where a run goes on: `state` is what `state()` was."""

    def begin_step(self, step: int, steps: int) -> None:
        """Before the first forward of update `step` (from 0) of `steps`; once more where its
        gradients overflowed and it is done again."""

    def penalty(self) -> torch.Tensor | None:
        """What the last forward adds to the step's loss, a scalar with a graph; the step takes the
        mean of it over its micro-batches and workers."""

    def end_step(self, step: int, steps: int, backend: Backend) -> None:
        """After update `step`."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs of it, on CPU; the same on every worker."""
        return {}
