"""Why a job ended, in words that name the remedy; and what a failed checkpoint leaves behind."""

import pickle
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cluster.errors import StoreError
from cluster.store import open_store
from training import job, worker
from training import reporter as reporter_module
from training.checkpoint import Progress, write_checkpoint
from training.loop import Place
from training.reporter import Reporter
from training.runs import FAILURE, Run, checkpoint_name, record_run, upload_folder
from training.spec import TrainingSpec

KNOBS = r"lower micro_batch_size \(4; .* or set precision to bf16"
LOST = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4211")


def died(failure: Exception) -> Exception:
    """What Ray Train makes of a worker whose process does not answer."""
    return WorkerHealthCheckFailedError("A worker health check failed.", failure=failure)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (WorkerGroupError("", {0: LOST, 1: died(ActorDiedError())}), f"process ended .*{KNOBS}"),
        (WorkerGroupError("", {0: died(OutOfMemoryError("95 % used"))}), f"95 % used.*{KNOBS}"),
        (WorkerGroupError("", {1: LOST}), r"RuntimeError: \[gloo\] Connection closed"),
        (WorkerGroupError("", {0: StoreError("no room"), 1: LOST}), "no room$"),
        (ControllerError(ValueError("no room")), "ValueError: no room$"),
    ],
)
def test_the_reason_is_found_behind_what_ray_wraps_it_in(
    spec: TrainingSpec, error: Exception, told: str
) -> None:
    cause = job._cause(pickle.loads(pickle.dumps(error)), spec)
    assert re.match(f".*{told}", cause), cause


def test_an_error_of_ours_is_told_and_not_what_it_came_from(spec: TrainingSpec) -> None:
    error = StoreError("free room there")
    error.__cause__ = OSError("full")
    assert job._cause(error, spec) == "free room there"


def test_what_can_be_gone_on_from_is_told(spec: TrainingSpec, tmp_path: Path) -> None:
    store, run = open_store(spec.output.store), Run("mine-1", spec)
    record_run(store, run)
    assert job._advice(store, run) == ""
    for step in (10, 20):
        write_checkpoint(tmp_path / str(step), {}, Progress(step=step))
        upload_folder(store, f"runs/mine-1/{checkpoint_name(step)}", tmp_path / str(step))
    (tmp_path / "20" / "progress.json").unlink()
    upload_folder(store, f"runs/mine-1/{checkpoint_name(30)}", tmp_path / "20")  # not whole
    told = "\nThe last whole checkpoint is of step 20: graft train --resume mine-1"
    assert job._advice(store, run) == told


def lack_of_cuda_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.empty(2**60),  # "can't allocate memory", a plain RuntimeError
        lambda: bytearray(2**62),  # a MemoryError that says nothing
        lack_of_cuda_memory,
    ],
)
def test_out_of_memory_names_the_knobs(
    spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], object]
) -> None:
    monkeypatch.setattr(worker, "_train", lambda *_: fail())
    config: dict[str, Any] = {"spec": spec.model_dump(mode="json"), "job_id": "job"}
    with pytest.raises((MemoryError, RuntimeError)):
        worker.train_worker(config)
    told = worker.train_worker(config)[FAILURE]
    assert re.match(rf"out of memory \(.+\): {KNOBS}", told), told


def test_another_error_is_no_lack_of_memory(
    spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LOST

    monkeypatch.setattr(worker, "_train", fail)
    config: dict[str, Any] = {"spec": spec.model_dump(mode="json"), "job_id": "job"}
    with pytest.raises(RuntimeError, match="gloo"):
        worker.train_worker(config)
    assert worker.runs.read_failure(open_store(spec.output.store), "job") is None


@pytest.fixture
def reporter(spec: TrainingSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reporter:
    """Of a first worker, whose folders of checkpoints are in tmp_path / "local"."""
    (tmp_path / "local").mkdir()
    monkeypatch.setattr(reporter_module.tempfile, "tempdir", str(tmp_path / "local"))
    place = Place(0, 1, torch.device("cpu"))
    return Reporter(open_store(spec.output.store), "job", place)


def test_a_full_disk_at_a_checkpoint_is_told_with_the_folder(
    reporter: Reporter, tmp_path: Path
) -> None:
    state = {"param/a": torch.zeros(2**16)}
    resource.prlimit(0, resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(StoreError, match=r"checkpoint .*local.*: cannot be written .*TMPDIR"):
            reporter.report(10, {}, lambda folder: write_checkpoint(folder, state, Progress()))
    finally:
        resource.prlimit(0, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "local").iterdir())


def test_a_failed_upload_leaves_no_local_folder(reporter: Reporter, tmp_path: Path) -> None:
    folder = tmp_path / "local" / "graft-checkpoint-1"
    write_checkpoint(folder, {}, Progress())
    (tmp_path / "store" / "runs").write_text("a file where the folder should be")
    with pytest.raises(StoreError):
        reporter._upload(ray.train.Checkpoint(str(folder)), checkpoint_name(10))
    assert not list((tmp_path / "local").iterdir())
