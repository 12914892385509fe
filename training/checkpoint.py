"""A checkpoint: the backend's full state and the place in the data, in safetensors and JSON.

Independent of ZeRO stage and number of workers, and no pickle. The random state needs no bytes:
data order and dropout are functions of (seed, step).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cluster.errors import StoreError
from training.evaluation import Evaluation

if TYPE_CHECKING:
    from training.backend import Backend
    from training.methods.course import Course

STATE = "state.safetensors"
# The best weights, apart: checkpoints in a row have the same ones, and the store keeps them once.
BEST_STATE = "best.safetensors"
PROGRESS = "progress.json"  # written last
BEST = "best/"  # before their names in a run's state
COURSE = "course/"  # before the names of what a method's course must remember


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` updates. `curve` holds (step, mean loss per label token),
    `evaluations` what was measured on the validation rows; `lap_loss` is summed over the
    `lap_labels` learned tokens since the curve's last point; `loss_scale` and `good_steps` are an
    fp16 run's (training.loss_scale); `is_packed` is what the order of rows follows from."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: tuple[tuple[int, float], ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    lap_loss: float = 0.0
    lap_labels: int = 0
    loss_scale: float | None = None
    good_steps: int = 0
    is_packed: bool = False


def run_state(
    backend: Backend, course: Course, *, moments: bool = True, keep: bool = True
) -> dict[str, torch.Tensor]:
    """What a run goes on from: the backend's full state, and the course's under COURSE; nothing on
    a worker that does not keep it. Collective."""
    state = backend.full_state(moments=moments, keep=keep)
    if keep:
        state |= {COURSE + name: value for name, value in course.state().items()}
    return state


def write_checkpoint(folder: Path, state: Mapping[str, torch.Tensor], progress: Progress) -> None:
    """Write its files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    best = {name: value for name, value in state.items() if name.startswith(BEST)}
    save_file({name: state[name] for name in state.keys() - best.keys()}, folder / STATE)
    if best:
        save_file(best, folder / BEST_STATE)
    (folder / PROGRESS).write_text(json.dumps(asdict(progress)))


def read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], Progress]:
    """What `write_checkpoint` wrote. Raises StoreError if it is not whole."""
    try:
        raw = json.loads((folder / PROGRESS).read_text())
        curve = tuple((int(step), float(loss)) for step, loss in raw.pop("curve"))
        evaluations = tuple(Evaluation(**found) for found in raw.pop("evaluations"))
        state = load_file(folder / STATE)
        if (folder / BEST_STATE).exists():
            state |= load_file(folder / BEST_STATE)
        return state, Progress(curve=curve, evaluations=evaluations, **raw)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(f"checkpoint {folder}: cannot be read ({error}); delete it") from error
