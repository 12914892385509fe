"""One Ray Train worker: build, go on from a checkpoint if there is one, run the loop, report."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from cluster.errors import CallerError, JobFailedError, SpecError
from cluster.memory import keep_freed_memory, peak_memory_mib
from cluster.spec import parse_spec
from cluster.store import Store, open_store
from training import runs
from training.assembly import Assembly, assemble
from training.checkpoint import Progress, write_checkpoint
from training.evaluation import Answer, Evaluation
from training.loop import RunOptions, as_work, count_steps, run
from training.meter import LogLine
from training.methods import METHODS, count_parameters
from training.place import Place
from training.reporter import Reporter
from training.rows import TokenRows, split
from training.runs import ADAPTER, FAILURE, RESULTS
from training.scratch import Scratch
from training.several import Rows, Runner, Saved, assemble_several, run_several
from training.shortage import lacks_memory
from training.spec import TrainingSpec
from training.tracking import Tracking, figures_of


def train_worker(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every worker runs; Ray Train hands on what the first returns: RESULTS or FAILURE.

    Args:
        config: The spec, the job's id, the key of the checkpoint to start from or None, and by
            adapter `rows`: the keys of its `tokens` and of its `validation` rows, or None.
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
    except CallerError as error:  # its node has no base folder, no compiler, or another store
        runs.record_failure(store, config["job_id"], error.message)
        raise
    except (MemoryError, RuntimeError) as error:
        if lacks_memory(error):
            reason = (str(error) or type(error).__name__).splitlines()[0]
            message = f"out of memory ({reason}): {spec.memory_advice()}"
            runs.record_failure(store, config["job_id"], message)
        raise


def _train(spec: TrainingSpec, store: Store, config: Mapping[str, Any]) -> dict[str, Any]:
    import ray.train

    keep_freed_memory()
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), _device(spec))
    torch.set_num_threads(max(1, int(spec.workers.cpus)))
    train = _train_several if spec.adapters else _train_one
    return {RESULTS: train(spec, store, config, place, Scratch(config["job_id"], place.rank))}


def _train_one(
    spec: TrainingSpec, store: Store, config: Mapping[str, Any], place: Place, scratch: Scratch
) -> dict[str, dict[str, Any]]:
    ((name, keys),) = config["rows"].items()
    with _checkpoint(store, config, scratch) as folder:
        rows = _rows(spec, partial(_open_rows, store, scratch), keys, folder)
        made = assemble(spec, place, rows.training, folder, rows.validation)
    tracking = _tracking(spec, store, config, made, place)
    adapter = _Adapter(spec, made, rows, place, tracking)
    adapter.announce()
    reporter = Reporter(store, config["job_id"], place, scratch)

    def on_checkpoint(progress: Progress) -> None:
        state = made.full_state(keep=place.rank == 0)  # collective; the first worker writes it
        reporter.report(
            progress.step,
            _metrics(made, progress),
            lambda folder: write_checkpoint(folder, state, progress),
        )

    with _followed([adapter]):
        end = run(spec, made.backend, rows.training, **adapter.options(on_checkpoint))
    return {name: adapter.result(end, store, config["job_id"], scratch)}


def _train_several(
    spec: TrainingSpec, store: Store, config: Mapping[str, Any], place: Place, scratch: Scratch
) -> dict[str, dict[str, Any]]:
    specs = spec.each()
    with _checkpoint(store, config, scratch) as folder:
        opened = cache(partial(_open_rows, store, scratch))  # adapters may have the same
        rows = {
            name: _rows(own, opened, config["rows"][name], folder and folder / name)
            for name, own in specs.items()
        }
        several = assemble_several(specs, place, rows)
    adapters = {
        name: _Adapter(
            specs[name],
            made,
            rows[name],
            place,
            _tracking(specs[name], store, config, made, place, name),
            f"{name}: ",
        )
        for name, made in several.runs.items()
    }
    saved = Saved(place)
    runners: dict[str, Runner] = {}
    for name, adapter in adapters.items():
        adapter.announce()
        if adapter.made.start.step:  # it may have ended, and save nothing more
            saved.keep(name, adapter.made, adapter.made.start)
        options = adapter.options(partial(saved.keep, name, adapter.made))
        work = as_work(specs[name], adapter.made.backend, rows[name].training, **options)
        runners[name] = Runner(work, several.draws[name])
    saved.is_new = False
    reporter = Reporter(store, config["job_id"], place, scratch)

    def after_round() -> None:
        if saved.is_new:
            reporter.report(saved.steps, {"steps": saved.steps}, saved.write)
            saved.is_new = False

    with _followed(adapters.values()):
        run_several(several.shared, runners, after_round)
        for name, runner in runners.items():
            if runner.failure is not None and (tracking := adapters[name].tracking) is not None:
                tracking.end(is_whole=False)
    return {
        name: {FAILURE: runner.failure}
        if runner.end is None
        else adapters[name].result(runner.end, store, config["job_id"], scratch)
        for name, runner in runners.items()
    }


def _rows(
    spec: TrainingSpec,
    opened: Callable[[str], TokenRows],
    keys: Mapping[str, str | None],
    checkpoint: Path | None,
) -> Rows:
    """One adapter's rows by their keys, and its checkpoint if that folder is there."""
    rows, validation = opened(str(keys["tokens"])), None
    if keys["validation"] is not None:
        validation = opened(keys["validation"])
    elif isinstance(spec.data.validation, float):
        rows, validation = split(rows, spec.data.validation, spec.seed)
    return Rows(rows, validation, checkpoint if checkpoint and checkpoint.exists() else None)


@dataclass(frozen=True)
class _Adapter:
    """One adapter's run on this worker. `label` begins its lines in the log; the first worker has
    `tracking`."""

    spec: TrainingSpec
    made: Assembly
    rows: Rows
    place: Place
    tracking: Tracking | None
    label: str = ""

    def announce(self) -> None:
        """Tell what begins."""
        spec, start, place = self.spec, self.made.start.step, self.place
        trained, total = count_parameters(self.made.backend.adapted)
        verb = f"going on from step {start}" if start else "training"
        self.tell(
            f"{verb}: {spec.method.kind}, {trained:,} of {total:,} parameters "
            f"({trained / total:.3%}), {count_steps(spec, len(self.rows.training))} steps of "
            f"{spec.global_batch_size} rows, {place.world_size} workers, ZeRO stage "
            f"{spec.stage_on(place.world_size)}, process {os.getpid()}"
        )
        if (validation := self.rows.validation) is not None:
            seen = int(np.isin(validation.hashes, self.rows.training.hashes).sum())
            self.tell(
                f"validation: {len(validation):,} rows"
                + (f", {seen:,} of which are training rows too" if seen else "")
            )
        evaluator = self.made.evaluator
        if evaluator is not None and evaluator.unanswered is not None:
            self.tell(
                f"validation: no exact match and no ROUGE-L, since {evaluator.unanswered}; lower "
                "evaluation.max_new_tokens"
            )

    def options(self, on_checkpoint: Callable[[Progress], None]) -> RunOptions:
        """What the loop needs."""
        tracking, shown = self.tracking, self.spec.evaluation.shown

        def log(line: LogLine) -> None:
            self.tell(line)
            if tracking is not None:
                tracking.log(figures_of(line))

        def show(found: Evaluation, answers: Sequence[Answer]) -> None:
            self.tell(found, *answers[:shown])
            if tracking is not None:
                tracking.log((found.step, found.figures))

        def save(progress: Progress) -> None:
            if tracking is not None:
                tracking.flush()
            on_checkpoint(progress)

        return {
            "course": self.made.course,
            "place": self.place,
            "start": self.made.start,
            "evaluator": self.made.evaluator,
            "on_log": log,
            "on_evaluation": show,
            "on_checkpoint": save,
            "count_notices": _count_notices,
            "on_notice": lambda step: self.tell(
                f"a node of this job is about to be taken away: step {step} is saved"
            ),
        }

    def result(self, end: Progress, store: Store, job_id: str, scratch: Scratch) -> dict[str, Any]:
        """Upload the adapter; returns its metrics with ADAPTER. Collective."""
        metrics, backend = _metrics(self.made, end), self.made.backend
        self.made.take_best(end.step)
        key = f"runs/{job_id}/adapter-{uuid4().hex[:8]}"
        with backend.whole_parameters(), scratch.passing_folder() as folder:
            if self.place.rank == 0:
                METHODS[self.spec.method.kind].save(backend.adapted, Path(folder))
                runs.upload_folder(store, key, Path(folder))
        return {ADAPTER: key, **metrics}

    def tell(self, *lines: object) -> None:
        """Print to the job's log, once for all workers."""
        if self.place.rank == 0:
            print(*(f"{self.label}{line}" for line in lines), sep="\n", flush=True)


def _tracking(
    spec: TrainingSpec,
    store: Store,
    config: Mapping[str, Any],
    made: Assembly,
    place: Place,
    name: str = "",
) -> Tracking | None:
    """The first worker's trackers; `name` is that of one of several adapters."""
    if place.rank != 0:
        return None
    return Tracking(spec, store, config["job_id"], made.start, name)


@contextmanager
def _followed(adapters: Iterable[_Adapter]) -> Generator[None]:
    """The scope of the adapters' runs, at whose end their trackers are closed."""
    with ExitStack() as stack:
        for adapter in adapters:
            if adapter.tracking is not None:
                stack.enter_context(adapter.tracking)
        yield


def _device(spec: TrainingSpec) -> torch.device:
    if not spec.workers.gpus:
        return torch.device("cpu")
    from ray.train.torch import get_device

    return get_device()


def _open_rows(store: Store, scratch: Scratch, key: str) -> TokenRows:
    """The tokenised rows, in place on a shared file system, else copied once per worker."""
    folder = store.local_path()
    if folder is not None:
        if not any((folder / key).glob("*.arrow")):
            raise SpecError(
                f"output.store {store.uri}: the job's rows are not in it on node "
                f"{platform.node()}; name storage that all nodes share"
            )
        return TokenRows(folder / key)
    with scratch.passing_folder() as name:
        runs.fetch_folder(store, key, Path(name))
        return TokenRows(Path(name))  # mapped; the files may go


@contextmanager
def _checkpoint(
    store: Store, config: Mapping[str, Any], scratch: Scratch
) -> Generator[Path | None]:
    """The folder of the checkpoint that this worker goes on from: the newest whole one of this job
    in the store, as the first worker sees it, else the job's start; None where there is none. (What
    Ray Train knows of is seconds older, and nothing if a worker dies behind its first one.)"""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    is_first = ray.train.get_context().get_world_rank() == 0
    own = runs.own_checkpoint(store, config["job_id"]) if is_first else None
    key = broadcast_from_rank_zero(own) or config["checkpoint"]
    if key is None:
        yield None
        return
    with scratch.passing_folder() as name:
        runs.fetch_checkpoint(store, key, Path(name))
        yield Path(name)


def _count_notices() -> int:
    """How many of the job's nodes the cluster has told to be taken away. Asked at every step, so of
    what Ray Train has told this worker: its public call has all workers meet in an actor."""
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    return len(info.preempted_node_to_ranks) if info is not None else 0


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
