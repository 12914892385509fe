"""One Ray Train worker: build, go on from a checkpoint if there is one, run the loop, report."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch

from cluster.errors import CallerError, JobFailedError
from cluster.memory import keep_freed_memory, peak_memory_mib
from cluster.spec import parse_spec
from cluster.store import Store, open_store
from training import runs
from training.assembly import Assembly, assemble
from training.checkpoint import Progress, write_checkpoint
from training.evaluation import Answer, Evaluation
from training.loop import LogLine, Place, count_steps, run
from training.methods import METHODS, count_parameters
from training.rows import TokenRows, split
from training.spec import TrainingSpec

if TYPE_CHECKING:
    import ray.train

FAILURE = "failure"  # the key by which a run ends that no restart can mend
ADAPTER = "adapter"  # the key of the trained adapter's folder in the store


def train_worker(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every worker runs; Ray Train hands on what the first returns: the run's metrics with
    ADAPTER, or FAILURE.

    Args:
        config: The spec, the job's id, the key of the tokenised rows and that of the checkpoint
            to start from, or None; `validation` is the key of rows to evaluate on, or None.
    """
    spec = parse_spec(TrainingSpec, config["spec"])
    store = open_store(spec.output.store)
    if failure := runs.read_failure(store, config["job_id"]):
        return {FAILURE: failure}
    try:
        return _train(spec, store, config)
    except JobFailedError as error:
        # All workers come to the same end, and would again: Ray Train must not restart them.
        return {FAILURE: error.message}
    # It may be this worker alone: the others wait until Ray Train starts all anew, to be told.
    except CallerError as error:  # its node has no base folder, or no compiler
        runs.record_failure(store, config["job_id"], error.message)
        raise
    except (MemoryError, RuntimeError) as error:
        if _lacks_memory(error):
            reason = str(error).splitlines()[0]
            message = f"out of memory ({reason}): {spec.memory_advice()}"
            runs.record_failure(store, config["job_id"], message)
        raise


def _lacks_memory(error: MemoryError | RuntimeError) -> bool:
    """CPU allocators raise a plain RuntimeError."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _train(spec: TrainingSpec, store: Store, config: Mapping[str, Any]) -> dict[str, Any]:
    import ray.train

    keep_freed_memory()
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), _device(spec))
    torch.set_num_threads(max(1, int(spec.workers.cpus)))
    rows, validation = _open_rows(store, config["tokens"]), None
    if config["validation"] is not None:
        validation = _open_rows(store, config["validation"])
    elif isinstance(spec.data.validation, float):
        rows, validation = split(rows, spec.data.validation, spec.seed)
    with _checkpoint(store, config) as folder:
        made = assemble(spec, place, rows, folder, validation)
    if place.rank == 0:
        _announce(spec, made, place, count_steps(spec, len(rows)))
        if validation is not None:
            seen = int(np.isin(validation.hashes, rows.hashes).sum())
            print(
                f"validation: {len(validation):,} rows"
                + (f", {seen:,} of which are training rows too" if seen else ""),
                flush=True,
            )
    reporter = _Reporter(store, config["job_id"], made, place)

    def on_log(line: LogLine) -> None:
        if place.rank == 0:
            print(line, flush=True)

    def on_evaluation(found: Evaluation, answers: Sequence[Answer]) -> None:
        if place.rank == 0:
            print(found, *answers[: spec.evaluation.shown], sep="\n", flush=True)

    end = run(
        spec,
        made.backend,
        rows,
        course=made.course,
        place=place,
        start=made.start,
        evaluator=made.evaluator,
        on_log=on_log,
        on_evaluation=on_evaluation,
        on_checkpoint=reporter.report,
    )
    metrics = _metrics(made, end)
    made.take_best(end.step)
    key = f"runs/{config['job_id']}/adapter-{uuid4().hex[:8]}"
    with made.backend.whole_parameters(), tempfile.TemporaryDirectory() as name:
        if place.rank == 0:
            METHODS[spec.method.kind].save(made.backend.adapted, Path(name))
            runs.upload_folder(store, key, Path(name))
    return {ADAPTER: key, **metrics}


def _device(spec: TrainingSpec) -> torch.device:
    if not spec.workers.gpus:
        return torch.device("cpu")
    from ray.train.torch import get_device

    return get_device()


def _open_rows(store: Store, key: str) -> TokenRows:
    """The tokenised rows, in place on a shared file system, else copied once per worker."""
    folder = store.local_path()
    if folder is not None:
        return TokenRows(folder / key)
    with tempfile.TemporaryDirectory(prefix="graft-tokens-") as name:
        runs.fetch_folder(store, key, Path(name))
        return TokenRows(Path(name))  # mapped; the files may go


@contextmanager
def _checkpoint(store: Store, config: Mapping[str, Any]) -> Generator[Path | None]:
    """The folder of the checkpoint that this worker goes on from: the last one that Ray Train
    knows, which is the same for all workers, else the job's start; None where there is none."""
    import ray.train

    reported, key = ray.train.get_checkpoint(), config["checkpoint"]
    if reported is not None:
        key = f"runs/{config['job_id']}/{Path(reported.path).name}"
    if key is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="graft-checkpoint-") as name:
        runs.fetch_folder(store, key, Path(name))
        yield Path(name)


def _announce(spec: TrainingSpec, made: Assembly, place: Place, steps: int) -> None:
    trained, total = count_parameters(made.backend.adapted)
    verb = f"going on from step {made.start.step}" if made.start.step else "training"
    print(
        f"{verb}: {spec.method.kind}, {trained:,} of {total:,} parameters "
        f"({trained / total:.3%}), {steps} steps of {spec.global_batch_size} rows, "
        f"{place.world_size} workers, ZeRO stage {spec.zero.stage}, process {os.getpid()}",
        flush=True,
    )


class _Reporter:
    """Hands checkpoints to Ray Train, which uploads them beside the training.

    The upload is ours, by create-only writes with the file that makes it whole at the end; Ray
    Train's own is a plain copy, of which a half looks like a whole.
    """

    def __init__(self, store: Store, job_id: str, made: Assembly, place: Place) -> None:
        self._store, self._job_id, self._made, self._place = store, job_id, made, place
        self._uploaded = threading.Event()
        self._uploaded.set()

    def report(self, progress: Progress) -> None:
        """Collective. Waits for the last checkpoint's upload, not for this one's."""
        import ray.train

        state, metrics = self._made.full_state(), _metrics(self._made, progress)
        if self._place.rank != 0:
            ray.train.report(metrics, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)
            return
        self._uploaded.wait()
        self._uploaded.clear()
        # Ray Train deletes the folder when its upload has ended.
        folder = Path(tempfile.mkdtemp(prefix="graft-checkpoint-"))
        write_checkpoint(folder, state, progress)
        ray.train.report(
            metrics,
            ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=runs.checkpoint_name(progress.step),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._upload,
        )

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Called by Ray Train in a thread of its own."""
        import ray.train

        try:
            runs.upload_folder(self._store, f"runs/{self._job_id}/{name}", Path(checkpoint.path))
        finally:
            self._uploaded.set()
        storage: Any = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(
            f"{storage.experiment_fs_path}/{name}", filesystem=storage.storage_filesystem
        )


def _metrics(made: Assembly, progress: Progress) -> dict[str, Any]:
    best = made.evaluator.best_evaluation if made.evaluator else None
    trained, total = count_parameters(made.backend.adapted)
    return {
        "step": progress.step,
        "loss": progress.curve[-1][1] if progress.curve else None,
        "tokens": progress.tokens,
        "train_seconds": round(progress.seconds, 2),
        "tokens_per_s": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "peak_memory_mib": round(peak_memory_mib()),
        "trainable_parameters": trained,
        "all_parameters": total,
        "loss_curve": json.dumps(progress.curve),
        "evaluations": json.dumps([asdict(found) for found in progress.evaluations]),
        "best_step": best.step if best else None,
    }
