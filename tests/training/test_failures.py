"""Why a job ended, in words that name the remedy; and what a failed checkpoint leaves behind, also
in a store that does not answer, or that takes nothing more."""

import pickle
import re
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from adapters import make_adapter
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from s3 import Application, s3_behind

from cluster.errors import ConflictError, StoreError
from cluster.registry import Registry
from cluster.store import open_store
from training import job, worker
from training.checkpoint import Progress, read_checkpoint, write_checkpoint
from training.place import Place
from training.reporter import Reporter
from training.runs import (
    FAILURE,
    Run,
    checkpoint_name,
    fetch_folder,
    finish,
    own_checkpoint,
    record_run,
    upload_folder,
)
from training.scratch import Scratch
from training.spec import TrainingSpec

# What a job that goes on may change, then what it may not.
KNOBS = (
    r"lower micro_batch_size \(4; [^)]*\), or set precision to bf16, .*"
    r"or train anew with a lower data\.max_length \(\w+\)( or|$)"
)
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
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    place = Place(0, 1, torch.device("cpu"))
    return Reporter(open_store(spec.output.store), "job", place, Scratch("job", 0))


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


def test_the_folders_of_a_killed_worker_go_when_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, neighbours = Scratch("job", 1), [Scratch("job", 10), Scratch("other", 1)]
    (killed.folder() / "weights").write_bytes(b"x")
    left = killed.passing_folder()
    others = {scratch.folder() for scratch in neighbours}
    Scratch("job", 1)
    assert set(tmp_path.iterdir()) == others
    left.cleanup()


def test_a_failed_upload_leaves_no_local_folder(reporter: Reporter, tmp_path: Path) -> None:
    folder = tmp_path / "local" / "graft-checkpoint-1"
    write_checkpoint(folder, {}, Progress())
    (tmp_path / "store" / "runs").write_text("a file where the folder should be")
    with pytest.raises(StoreError):
        reporter._upload(ray.train.Checkpoint(str(folder)), checkpoint_name(10))
    assert not list((tmp_path / "local").iterdir())


class Faults:
    """S3 that answers requests by one of `methods` with `status` as often as `fails` says so; those
    of them that write are done nevertheless if `are_done`."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self.status, self.methods, self.are_done = "503 Slow Down", {"PUT"}, False
        self.fails: Iterator[bool] = repeat(False)
        self.given = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] not in self.methods or not next(self.fails):
            return self._application(environ, start_response)
        self.given += 1
        if self.are_done:
            [*self._application(environ, lambda *_: None)]
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(self.status, [("Content-Length", "0")])
        return []


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, s3_bucket: Callable[[], str]) -> Iterator[Faults]:
    """In front of the endpoint that AWS_ENDPOINT_URL names from here on; none yet."""
    with s3_behind(Faults) as (url, application):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield application


@pytest.fixture
def job_in_s3(spec: TrainingSpec, s3_bucket: Callable[[], str], faults: Faults) -> Run:
    """A job in a bucket behind `faults`, not begun yet."""
    output = spec.output.model_copy(update={"store": s3_bucket()})
    return Run("job", spec.model_copy(update={"output": output}))


def upload(reporter: Reporter, folder: Path, step: int) -> str:
    """A checkpoint of that step, as a first worker does beside its training; its folder's name."""
    write_checkpoint(folder, {"param/a": torch.full((4,), float(step))}, Progress(step=step))
    reporter._store_whole(folder, name := checkpoint_name(step))
    return name


@pytest.mark.parametrize("are_done", [False, True])
def test_a_store_that_does_not_answer_for_a_while_costs_nothing(
    job_in_s3: Run, faults: Faults, tmp_path: Path, are_done: bool
) -> None:
    """Whether what it answers so is done or not."""
    store = open_store(job_in_s3.spec.output.store)
    reporter = Reporter(store, "job", Place(), Scratch("job", 0))
    faults.fails, faults.are_done = chain(repeat(True, 3), repeat(False)), are_done
    name = upload(reporter, tmp_path / "10", 10)
    assert faults.given == 3
    assert own_checkpoint(store, "job") == f"runs/job/{name}"
    fetch_folder(store, f"runs/job/{name}", tmp_path / "fetched")
    state, progress = read_checkpoint(tmp_path / "fetched")
    assert (state["param/a"].tolist(), progress.step) == ([10.0] * 4, 10)


def test_a_job_whose_every_write_seems_lost_is_published_all_the_same(
    job_in_s3: Run, faults: Faults, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each first answer is 503, and what it asked for is done: a job that goes on from another."""
    store = open_store(job_in_s3.spec.output.store)
    adapter = make_adapter("lora", bases("llama"), tmp_path / "adapter")
    faults.fails, faults.are_done = cycle([True, False]), True
    run = Run("next", job_in_s3.spec, continues="job")
    record_run(store, job_in_s3)
    record_run(store, run)
    version = Registry(store).publish("mine", adapter)
    finish(store, run, version.ref)
    assert faults.given >= 8
    assert Registry(store).resolve("mine") == version
    with pytest.raises(ConflictError, match="continued by next already"):
        record_run(store, Run("another", job_in_s3.spec, continues="job"))


def test_a_store_that_takes_nothing_more_ends_the_job_and_keeps_its_checkpoint(
    job_in_s3: Run, faults: Faults, tmp_path: Path
) -> None:
    store = open_store(job_in_s3.spec.output.store)
    record_run(store, job_in_s3)
    reporter = Reporter(store, "job", Place(), Scratch("job", 0))
    upload(reporter, tmp_path / "10", 10)
    faults.status, faults.fails = "403 Forbidden", repeat(True)
    with pytest.raises(StoreError) as caught:
        upload(reporter, tmp_path / "20", 20)
    failure = WorkerGroupError("", {0: caught.value})
    told = job._reason(pickle.loads(pickle.dumps(failure)), store, job_in_s3)
    key = rf"{store.uri}/runs/job/step-00000020-\w+/state.safetensors"
    assert re.fullmatch(f"{key}: permission denied; check the credentials and rights", told), told
    assert "of step 10: graft train --resume job" in job._advice(store, job_in_s3)


def test_a_store_that_cannot_be_read_hides_no_reason(job_in_s3: Run, faults: Faults) -> None:
    store = open_store(job_in_s3.spec.output.store)
    faults.status, faults.methods, faults.fails = "403 Forbidden", {"GET", "HEAD"}, repeat(True)
    assert job._reason(StoreError("no room"), store, job_in_s3) == "no room"
    assert "can be read again: graft train --resume job" in job._advice(store, job_in_s3)
