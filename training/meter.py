"""What a run tells of itself every few steps: losses, tokens, speed and what is left.

Fed by `training.loop`, whose log lines it makes; knows nothing of models and data.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from training.checkpoint import Progress
from training.place import Place


@dataclass(frozen=True)
class LogLine:
    """What the log tells every few steps. `tokens_per_s` counts real tokens of all workers;
    `loss_scale` is fp16's, None in other precisions."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    eta_s: float
    loss_scale: float | None = None

    def __str__(self) -> str:
        scale = "" if self.loss_scale is None else f"loss scale {self.loss_scale:,.0f}  "
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.4f}  lr {self.learning_rate:.2e}  "
            f"grad norm {self.grad_norm:.3f}  {scale}{self.tokens_per_s:,.0f} tokens/s  "
            f"{self.eta_s:.0f} s left"
        )


class Meter:
    """Losses and tokens since the last log line and since the run's first step."""

    def __init__(self, place: Place, start: Progress, steps: int) -> None:
        self._place, self._start, self._steps = place, start, steps
        self._began = self._lap = time.monotonic()
        self._curve = list(start.curve)
        self._tokens = self._lap_tokens = 0
        # Of the lap: what all workers learned until it was last summed, and this one's own since.
        self._lap_loss, self._lap_labels = start.lap_loss, start.lap_labels
        self._own_loss = 0.0

    def add_loss(self, loss: torch.Tensor) -> None:
        """A micro-batch of this worker, its loss summed over labels; a scalar."""
        self._own_loss += float(loss)

    def add_step(self, label_count: int, tokens: int) -> None:
        """A step of all workers: its labels, and its tokens without padding."""
        self._lap_labels += label_count
        self._lap_tokens += tokens
        self._tokens += tokens

    def gather(self) -> None:
        """Sum the lap's loss over workers. Collective."""
        self._lap_loss += self._place.reduce(self._own_loss, dist.ReduceOp.SUM)
        self._own_loss = 0.0

    @property
    def lap_loss(self) -> float:
        """Summed over workers, up to the last `gather`."""
        return self._lap_loss

    def line(self, step: int, rate: float, grad_norm: float) -> LogLine:
        """Close the lap. Collective: the loss is summed over workers."""
        self.gather()
        loss = self._lap_loss / max(1, self._lap_labels)
        self._curve.append((step, loss))
        now = time.monotonic()
        speed = self._lap_tokens / max(now - self._lap, 1e-9)
        per_step = (now - self._began) / (step - self._start.step)
        self._lap, self._lap_tokens = now, 0
        self._lap_loss, self._lap_labels = 0.0, 0
        left = (self._steps - step) * per_step
        return LogLine(step, self._steps, loss, rate, grad_norm, speed, left)

    def progress(self, step: int) -> Progress:
        """How far the run is after `step` steps."""
        return Progress(
            step=step,
            tokens=self._start.tokens + self._tokens,
            seconds=self._start.seconds + time.monotonic() - self._began,
            curve=tuple(self._curve),
            lap_loss=self._lap_loss,
            lap_labels=self._lap_labels,
        )
