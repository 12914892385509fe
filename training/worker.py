"""One Ray Train worker: build, resume if there is a checkpoint, run the loop, report."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cluster.errors import CallerError, JobFailedError
from cluster.memory import keep_freed_memory, peak_memory_mib
from cluster.spec import parse_spec
from cluster.store import open_store
from training.assembly import Assembly, assemble
from training.checkpoint import Progress, write_checkpoint
from training.loop import LogLine, Place, count_steps, run
from training.methods import METHODS, count_parameters
from training.rows import TokenRows
from training.spec import TrainingSpec

ADAPTER_FOLDER = "adapter"
FAILURE = "failure"  # the metric by which a run ends that no restart can mend


def train_worker(config: Mapping[str, Any]) -> None:
    """What every worker runs; `config` holds the spec and the key of the tokenised rows."""
    import ray.train

    try:
        _train(config)
    except (CallerError, JobFailedError) as error:
        # All workers come to the same end, and would again: Ray Train must not restart them.
        ray.train.report({FAILURE: error.message})


def _train(config: Mapping[str, Any]) -> None:
    import ray.train

    keep_freed_memory()
    spec = parse_spec(TrainingSpec, config["spec"])
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), _device(spec))
    torch.set_num_threads(max(1, int(spec.workers.cpus)))
    rows = _open_rows(spec, config["tokens"])
    with _checkpoint() as folder:
        made = assemble(spec, place, rows, folder)
    steps = count_steps(spec, len(rows))
    if place.rank == 0:
        _announce(spec, made, steps)

    def on_checkpoint(progress: Progress) -> None:
        _report(spec, made, place, progress, is_last=progress.step == steps)

    def on_log(line: LogLine) -> None:
        if place.rank == 0:
            print(line, flush=True)

    run(
        spec,
        made.backend,
        rows,
        course=made.course,
        place=place,
        start=made.start,
        on_log=on_log,
        on_checkpoint=on_checkpoint,
    )


def _device(spec: TrainingSpec) -> torch.device:
    if not spec.workers.gpus:
        return torch.device("cpu")
    from ray.train.torch import get_device

    return get_device()


def _open_rows(spec: TrainingSpec, key: str) -> TokenRows:
    """The tokenised rows, in place on a shared file system, else copied once per worker."""
    store = open_store(spec.output.store)
    folder = store.local_path()
    if folder is not None:
        return TokenRows(folder / key)
    with tempfile.TemporaryDirectory(prefix="graft-tokens-") as name:
        for part in store.list(key):
            store.download(part, Path(name, part.rsplit("/", 1)[-1]))
        return TokenRows(Path(name))  # mapped; the files may go


@contextmanager
def _checkpoint() -> Generator[Path | None]:
    """The folder that this worker goes on from, or None at a fresh start."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _announce(spec: TrainingSpec, made: Assembly, steps: int) -> None:
    trained, total = count_parameters(made.backend.adapted)
    verb = f"going on from step {made.start.step}" if made.start.step else "training"
    print(
        f"{verb}: {spec.method.kind}, {trained:,} of {total:,} parameters "
        f"({trained / total:.3%}), {steps} steps of "
        f"{spec.global_batch_size} rows, ZeRO stage {spec.zero.stage}, process {os.getpid()}",
        flush=True,
    )


def _report(
    spec: TrainingSpec, made: Assembly, place: Place, progress: Progress, *, is_last: bool
) -> None:
    """Hand a checkpoint, and with the last one the adapter, to Ray Train. Collective."""
    import ray.train

    state, backend = made.full_state(), made.backend
    trained, total = count_parameters(backend.adapted)
    metrics = {
        "step": progress.step,
        "loss": progress.curve[-1][1] if progress.curve else None,
        "tokens": progress.tokens,
        "train_seconds": round(progress.seconds, 2),
        "tokens_per_s": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "peak_memory_mib": round(peak_memory_mib()),
        "trainable_parameters": trained,
        "all_parameters": total,
        "loss_curve": json.dumps(progress.curve),
    }
    with tempfile.TemporaryDirectory(prefix="graft-checkpoint-") as name:
        folder = Path(name)
        if is_last:
            with backend.whole_parameters():
                if place.rank == 0:
                    METHODS[spec.method.kind].save(backend.adapted, folder / ADAPTER_FOLDER)
        if place.rank == 0:
            write_checkpoint(folder, state, progress)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        else:
            ray.train.report(metrics)
