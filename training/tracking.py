"""A run's figures while it runs: TensorBoard's events always, MLflow and W&B where asked for.

Each tracker has a thread of its own, so that the run never waits for one; one that fails is told of
once and left. A run that goes on hands them what a checkpoint knows of the steps before, and each
takes what it has not: no step is there twice, and none is missing. Used by the first worker alone.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from cluster.errors import SpecError
from cluster.store import Store
from training.checkpoint import Progress
from training.events import EventParts, Figures
from training.meter import LogLine
from training.spec import TrainingSpec
from training.tracking_spec import MlflowSpec, TrackingSpec, WandbSpec

# Figures that may wait for a tracker which is slow or stuck; and how long an ended run waits.
_ROOM, _END_S = 10_000, 30.0


class Tracker(Protocol):
    """Where figures go. Made and called in one thread."""

    last_step: int  # it has the figures of steps up to this one

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of a step, by tag."""
        ...

    def flush(self) -> None:
        """Put away what was taken."""
        ...

    def close(self, *, is_whole: bool) -> None:
        """Put away what was taken; the run has ended, at its end or before."""
        ...


def check_installed(tracking: TrackingSpec) -> None:
    """Raise SpecError for a tracker that is asked for and not installed."""
    for name in ("mlflow", "wandb"):
        if getattr(tracking, name) is not None and find_spec(name) is None:
            raise SpecError(
                f"tracking.{name}: the package is not installed; pip install 'raygraft[{name}]' "
                "here and on the nodes, or leave it out"
            )


def figures_of(line: LogLine) -> Figures:
    """What a log line tells."""
    values = {"loss/training": line.loss, "learning_rate": line.learning_rate,
              "grad_norm": line.grad_norm, "tokens_per_s": line.tokens_per_s}  # fmt: skip
    if line.loss_scale is not None:
        values["loss_scale"] = line.loss_scale
    return line.step, values


def history(start: Progress) -> list[Figures]:
    """What a checkpoint knows of the steps before it."""
    curve: list[Figures] = [(step, {"loss/training": loss}) for step, loss in start.curve]
    measured: list[Figures] = [(found.step, found.figures) for found in start.evaluations]
    return sorted(curve + measured, key=lambda figures: figures[0])


class Tracking:
    """All trackers of a run; one of several adapters of a job has a `name`."""

    def __init__(
        self,
        spec: TrainingSpec,
        store: Store,
        job_id: str,
        start: Progress | None = None,
        name: str = "",
    ) -> None:
        start, folder = start or Progress(), f"runs/{job_id}/tensorboard"
        if name:
            folder, job_id = f"{folder}/{name}", f"{job_id}-{name}"
        makers: dict[str, Callable[[], Tracker]] = {
            "TensorBoard": lambda: EventParts(store, folder, start.step)
        }
        if (mlflow := spec.tracking.mlflow) is not None:
            makers["MLflow"] = lambda: MlflowTracker(mlflow, spec, job_id)
        if (wandb := spec.tracking.wandb) is not None:
            makers["W&B"] = lambda: WandbTracker(wandb, spec, job_id)
        self._channels = [_Channel(name, make) for name, make in makers.items()]
        for figures in history(start):
            self.log(figures)

    def log(self, figures: Figures) -> None:
        """Hand them on; never waits, never raises."""
        for channel in self._channels:
            channel.put(figures)

    def flush(self) -> None:
        """A checkpoint is made of all that was logged."""
        for channel in self._channels:
            channel.put(None)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the trackers, if they do not take too long."""
        self.end(is_whole=kind is None)
        deadline = time.monotonic() + _END_S
        for channel in self._channels:
            channel.thread.join(max(0.0, deadline - time.monotonic()))

    def end(self, *, is_whole: bool) -> None:
        """The run is over; only the first call counts."""
        for channel in self._channels:
            channel.put(is_whole)


class _Channel:
    """One tracker and its thread; a queue of figures, None for a flush, and a bool for the end."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name, self._make, self._is_over = name, make, False
        self._queue: queue.Queue[Figures | bool | None] = queue.Queue(_ROOM)
        self.thread = threading.Thread(target=self._run, name=f"tracking {name}", daemon=True)
        self.thread.start()

    def put(self, item: Figures | bool | None) -> None:
        if self._is_over:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._give_up(f"it is {_ROOM:,} figures behind")

    def _run(self) -> None:
        try:
            tracker = self._make()
            seen = tracker.last_step
            for item in iter(self._queue.get, self):
                if self._is_over:
                    return
                if isinstance(item, bool):
                    tracker.close(is_whole=item)
                    return
                if item is None:
                    tracker.flush()
                elif item[0] > seen:
                    tracker.log(*item)
        except (Exception, SystemExit) as error:  # whatever a library and its server come up with
            self._give_up(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def _give_up(self, reason: str) -> None:
        if not self._is_over:
            print(f"tracking: {self._name} failed, the run goes on without it ({reason})",
                  flush=True)  # fmt: skip
        self._is_over = True


class MlflowTracker:
    """A run of MLflow, found again by the job's id."""

    def __init__(self, asked: MlflowSpec, spec: TrainingSpec, job_id: str) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        self._client: Any = MlflowClient(tracking_uri=asked.tracking_uri)
        name = asked.experiment or spec.output.name
        experiment = self._client.get_experiment_by_name(name)
        at = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([at], f"tags.`graft.job` = '{job_id}'", max_results=1)
        self._run_id: str = (
            found[0].info.run_id if found else self._open(at, spec, job_id).info.run_id
        )
        known = found[0].data.metrics if found else {}
        self.last_step = max(
            (
                metric.step
                for tag in known
                for metric in self._client.get_metric_history(self._run_id, tag)
            ),
            default=-1,
        )

    def _open(self, experiment: str, spec: TrainingSpec, job_id: str) -> Any:
        run = self._client.create_run(experiment, run_name=job_id, tags={"graft.job": job_id})
        for name, value in _flat(spec.model_dump(mode="json")):
            self._client.log_param(run.info.run_id, name, str(value)[:500])
        return run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        for tag, value in values.items():
            self._client.log_metric(self._run_id, tag, value, step=step)

    def flush(self) -> None:
        """See Tracker: what was logged is away."""

    def close(self, *, is_whole: bool) -> None:
        """See Tracker."""
        self._client.set_terminated(self._run_id, "FINISHED" if is_whole else "FAILED")


class WandbTracker:
    """A run of W&B, gone on with by the job's id."""

    def __init__(self, asked: WandbSpec, spec: TrainingSpec, job_id: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        library: Any = wandb
        self._run: Any = library.init(
            project=asked.project,
            entity=asked.entity,
            mode=asked.mode,
            id=job_id,
            name=job_id,
            resume="allow" if asked.mode == "online" else None,
            reinit="create_new",  # each of several adapters has a run of its own in this process
            config=spec.model_dump(mode="json"),
            settings=library.Settings(console="off", silent=True),
        )
        self.last_step: int = self._run.starting_step - 1 if self._run.resumed else -1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """See Tracker: W&B's own process does it."""

    def close(self, *, is_whole: bool) -> None:
        """See Tracker."""
        self._run.finish(exit_code=0 if is_whole else 1)


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Its values by dotted path; lists as JSON."""
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else value
