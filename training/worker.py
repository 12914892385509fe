"""One Ray Train worker: build, resume if there is a checkpoint, run the loop, report."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cluster.base_model import load_base
from cluster.errors import CallerError, JobFailedError
from cluster.spec import parse_spec
from cluster.store import open_store
from training.backend import Backend, PlainBackend
from training.checkpoint import Progress, read_checkpoint, write_checkpoint
from training.data import TokenRows
from training.loop import LogLine, Place, count_steps, run
from training.methods import METHODS, count_parameters
from training.spec import TrainingSpec
from training.step import LossModel

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

    spec = parse_spec(TrainingSpec, config["spec"])
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), _device(spec))
    torch.set_num_threads(max(1, int(spec.workers.cpus)))
    backend = build_backend(spec, place)
    rows = _open_rows(spec, config["tokens"])
    start = _resume(backend)
    if place.rank == 0:
        _announce(spec, backend, count_steps(spec, len(rows)), start)

    def on_checkpoint(progress: Progress) -> None:
        _report(
            spec, backend, place, progress, is_last=progress.step == count_steps(spec, len(rows))
        )

    def on_log(line: LogLine) -> None:
        if place.rank == 0:
            print(line, flush=True)

    run(
        spec,
        backend,
        rows,
        place=place,
        start=start,
        on_log=on_log,
        on_checkpoint=on_checkpoint,
    )


def build_backend(spec: TrainingSpec, place: Place) -> Backend:
    """Base + method + optimiser, the same on every worker."""
    torch.manual_seed(spec.seed)
    dtype = torch.float32 if spec.precision == "fp32" else torch.bfloat16
    base = load_base(spec.base_model, dtype)
    model = METHODS[spec.method.kind].attach(base, spec.method, spec.base_model)
    model.to(place.device).train()
    loss_model = LossModel(model, is_sharded=spec.zero.stage == 3)
    if spec.zero.stage == 0:
        return PlainBackend(loss_model, spec.optimizer)
    from training.zero import ZeroBackend

    return ZeroBackend(loss_model, spec)


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
        return TokenRows(folder / f"{key}.arrow")
    with tempfile.TemporaryDirectory(prefix="graft-tokens-") as name:
        copy = Path(name, "tokens.arrow")
        store.download(f"{key}.arrow", copy)
        return TokenRows(copy)  # mapped; the file may go


def _resume(backend: Backend) -> Progress:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress()
    with checkpoint.as_directory() as folder:
        state, progress = read_checkpoint(Path(folder))
    backend.load_full_state(state, progress.step)
    return progress


def _announce(spec: TrainingSpec, backend: Backend, steps: int, start: Progress) -> None:
    trained, total = count_parameters(backend.adapted)
    verb = f"going on from step {start.step}" if start.step else "training"
    print(
        f"{verb}: {spec.method.kind}, {trained:,} of {total:,} parameters "
        f"({trained / total:.3%}), {steps} steps of "
        f"{spec.global_batch_size} rows, ZeRO stage {spec.zero.stage}, process {os.getpid()}",
        flush=True,
    )


def _report(
    spec: TrainingSpec, backend: Backend, place: Place, progress: Progress, *, is_last: bool
) -> None:
    """Hand a checkpoint, and with the last one the adapter, to Ray Train. Collective."""
    import ray.train

    state = backend.full_state()
    trained, total = count_parameters(backend.adapted)
    metrics = {
        "step": progress.step,
        "loss": progress.curve[-1][1] if progress.curve else None,
        "tokens": progress.tokens,
        "train_seconds": round(progress.seconds, 2),
        "tokens_per_s": round(progress.tokens / max(progress.seconds, 1e-9), 1),
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
