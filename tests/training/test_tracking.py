"""Figures of a running job: TensorBoard's files, MLflow and W&B, and what a failing one may do."""

import importlib.util
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2

from cluster.errors import SpecError
from cluster.spec import parse_spec
from cluster.store import Store, open_store
from training import tracking
from training.checkpoint import Progress
from training.evaluation import Evaluation
from training.events import EventParts, Figures
from training.meter import LogLine
from training.spec import TrainingSpec
from training.tracking import Tracking, check_installed, figures_of, history

PROTO: Any = event_pb2


def spec(**trackers: Any) -> TrainingSpec:
    document = {
        "base_model": "base",
        "method": {"kind": "lora"},
        "data": {"train": "rows.parquet"},
        "output": {"name": "title"},
        "tracking": trackers,
    }
    return parse_spec(TrainingSpec, document)


def lines(first: int, last: int) -> list[Figures]:
    return [
        figures_of(LogLine(step, 100, 1 / step, 1e-4, 0.5, 1000.0, 1.0))
        for step in range(first, last + 1)
    ]


def records(data: bytes) -> list[Any]:
    """The events of a file: length, its checksum, an event, its checksum."""
    events: list[Any] = []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = PROTO.Event()
        event.ParseFromString(data[12 : 12 + size])
        events.append(event)
        data = data[16 + size :]
    return events


def stored(store: Store, folder: str) -> list[Any]:
    return [event for key in store.list(folder) for event in records(store.read(key))]


def steps_of(events: list[Any], tag: str) -> list[int]:
    return [e.step for e in events if any(v.tag == tag for v in e.summary.value)]


def run_until(last: int, store: Store, start: Progress, stop: int, every: int = 4) -> None:
    """What the worker does from `start` to `last`; killed at `stop`, without an end."""
    tracked = Tracking(spec(), store, "title-1", start)
    for step in range(start.step + 1, min(last, stop) + 1):
        for figures in lines(step, step):
            tracked.log(figures)
        if step % every == 0:
            tracked.flush()
    if stop >= last:
        tracked.__exit__(None)
    else:
        for channel in tracked._channels:
            while channel._queue.qsize():
                time.sleep(0.01)


def test_events_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    parts = EventParts(store, "runs/a/tensorboard", 0)
    parts.log(*lines(1, 1)[0])
    assert steps_of(stored(store, "runs/a/tensorboard"), "loss/training") == [1]
    parts.log(*lines(2, 2)[0])  # too soon for a file of its own
    assert steps_of(stored(store, "runs/a/tensorboard"), "loss/training") == [1]
    parts.flush()
    events = stored(store, "runs/a/tensorboard")
    for tag in ("loss/training", "learning_rate", "grad_norm", "tokens_per_s"):
        assert steps_of(events, tag) == [1, 2]


def test_a_run_that_was_killed_and_goes_on_has_each_step_once(tmp_path: Path) -> None:
    """Killed at step 6 behind the checkpoint of step 4; and a job of its own that goes on."""
    store = open_store(str(tmp_path))
    run_until(12, store, Progress(), stop=6)
    curve = tuple((step, 1 / step) for step in range(1, 5))
    measured = (Evaluation(step=4, loss=2.0),)
    start = Progress(step=4, curve=curve, evaluations=measured)
    run_until(12, store, start, stop=12)
    events = stored(store, "runs/title-1/tensorboard")
    assert steps_of(events, "loss/training") == list(range(1, 13))
    # A TensorBoard that is open meanwhile forgets what it has seen of the steps that come again.
    restarts = [e.step for e in events if e.session_log.status == PROTO.SessionLog.START]
    assert restarts == [5]
    other = Tracking(spec(), store, "title-2", start)
    with other:
        for figures in lines(5, 6):
            other.log(figures)
    events = stored(store, "runs/title-2/tensorboard")
    assert steps_of(events, "loss/training") == list(range(1, 7))
    assert steps_of(events, "loss/validation") == [4]


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    accumulator: Any = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    store = open_store(str(tmp_path))
    run_until(12, store, Progress(), stop=6)
    reader = accumulator.EventAccumulator(str(tmp_path / "runs" / "title-1" / "tensorboard"))
    reader.Reload()
    assert [e.step for e in reader.Scalars("loss/training")] == [1, 2, 3, 4]
    run_until(12, store, Progress(step=4), stop=12)
    reader.Reload()
    assert [e.step for e in reader.Scalars("loss/training")] == list(range(1, 13))


class Broken:
    """A tracker whose server is gone, or that waits for it for ever."""

    last_step = 0

    def __init__(self, waits: threading.Event | None = None) -> None:
        self._waits = waits

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._waits is not None:
            self._waits.wait()
        raise ConnectionError("no route to host")


@pytest.mark.parametrize("waits", [False, True])
def test_a_tracker_that_fails_or_hangs_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], waits: bool
) -> None:
    release = threading.Event()
    monkeypatch.setattr(tracking, "MlflowTracker", lambda *_: Broken(release if waits else None))
    monkeypatch.setattr(tracking, "_END_S", 0.5)
    monkeypatch.setattr(tracking, "_ROOM", 50)
    store = open_store(str(tmp_path))
    tracked = Tracking(spec(mlflow={}), store, "title-1")
    began = time.monotonic()
    with tracked:
        for figures in lines(1, 100):
            tracked.log(figures)
            time.sleep(0.001)
    assert time.monotonic() - began < 5
    told = [line for line in capsys.readouterr().out.splitlines() if "tracking" in line]
    assert len(told) == 1
    assert "MLflow failed, the run goes on without it" in told[0]
    assert ("50 figures behind" if waits else "no route to host") in told[0]
    events = stored(store, "runs/title-1/tensorboard")
    assert steps_of(events, "loss/training") == list(range(1, 101))
    release.set()


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.filterwarnings("default")  # of MLflow and what it brings
def test_mlflow_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/mlruns"
    asked = spec(mlflow={"tracking_uri": uri, "experiment": "titles"})
    store = open_store(str(tmp_path / "store"))
    start = Progress(step=4, curve=tuple((step, 1 / step) for step in range(1, 5)))
    for progress, last in ((Progress(), 6), (start, 9)):
        with Tracking(asked, store, "title-1", progress) as tracked:
            for figures in lines(progress.step + 1, last):
                tracked.log(figures)
    client: Any = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("titles")
    (run,) = client.search_runs([experiment.experiment_id])
    found = client.get_metric_history(run.info.run_id, "loss/training")
    assert sorted(metric.step for metric in found) == list(range(1, 10))
    assert run.info.status == "FINISHED"
    assert run.data.params["method.kind"] == "lora"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("default")  # of W&B and what it brings
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    asked = spec(wandb={"project": "titles", "mode": "offline"})
    with Tracking(asked, open_store(str(tmp_path / "store")), "title-1") as tracked:
        for figures in lines(1, 5):
            tracked.log(figures)
    (written,) = tmp_path.glob("wandb/offline-run-*-title-1/run-title-1.wandb")
    assert b"loss/training" in written.read_bytes()


def test_a_package_that_is_not_there_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find(name: str) -> None:
        return None

    monkeypatch.setattr(tracking, "find_spec", find)
    check_installed(spec().tracking)
    with pytest.raises(SpecError, match=r"tracking.mlflow: .* pip install 'raygraft\[mlflow\]'"):
        check_installed(spec(mlflow={}).tracking)
    with pytest.raises(SpecError, match=r"tracking.wandb: .* pip install 'raygraft\[wandb\]'"):
        check_installed(spec(wandb={}).tracking)


def test_no_password_is_taken() -> None:
    with pytest.raises(SpecError, match="MLFLOW_TRACKING_PASSWORD"):
        spec(mlflow={"tracking_uri": "https://me:secret@tracking.example"})


def test_history_is_in_the_order_of_steps() -> None:
    start = Progress(
        step=4, curve=((2, 2.0), (4, 1.0)), evaluations=(Evaluation(step=3, loss=1.5),)
    )
    assert [step for step, _ in history(start)] == [2, 3, 4]
