"""A training job whose cluster loses a node, gets another, and has notice that it loses that."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from commands import Command, overrides
from conftest import running_cluster
from s3 import Application, s3_behind
from safetensors.torch import load_file
from training_jobs import STORE
from workers import Case, Workers, difference, log_of, weights_of

from cluster.base_model import load_tokenizer
from cluster.local_copies import LocalCopies
from cluster.registry import Registry
from cluster.spec import parse_spec
from cluster.tables import write_table
from training.data import tokenize
from training.spec import TrainingSpec

STEPS = 80
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


class Gate:
    """S3 in which no checkpoint becomes whole while it is closed, so that a job waits for it."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._is_open = threading.Event()
        self.open, self.close = self._is_open.set, self._is_open.clear
        self.open()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith("/progress.json"):
            self._is_open.wait(120)
        return self._application(environ, start_response)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """In front of the endpoint that AWS_ENDPOINT_URL names from here on."""
    with s3_behind(Gate) as (url, gate):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield gate
        gate.open()


def wait_for_checkpoint(registry: Registry, job: str, step: int) -> None:
    """Until a checkpoint of that step, or a later one, is whole in the store."""
    whole = re.compile(rf"runs/{job}/step-(\d+)-\w+/progress.json")
    deadline = time.monotonic() + 60
    while True:
        found = [whole.fullmatch(key) for key in registry.store.list(f"runs/{job}")]
        if any(int(key[1]) >= step for key in found if key):
            return
        assert time.monotonic() < deadline, step
        time.sleep(0.05)


def test_a_job_loses_a_node_and_gets_another(
    bases: Callable[[str], Path],
    registry: Registry,
    gate: Gate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its two workers are on a node each. One node is killed, so one worker goes on; another node
    comes, so two do; of its end there is notice, so that one goes on from a checkpoint of then. The
    losses and the adapter are those of two workers that nobody disturbed."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "8")  # a dead node's, twice
    rows = {"prompt": [f"p{i}" * (i % 5 + 1) for i in range(64)], "completion": ["done"] * 64}
    write_table(pa.table(rows), tmp_path / "rows.arrow")
    settings = overrides(
        f"base_model={bases('llama')}", f"data.train={tmp_path}/rows.arrow",
        "data.format=prompt_completion", f"max_steps={STEPS}", "checkpoint_every_steps=5",
        "log_every_steps=5", "workers.count=[1, 2]", "workers.cpus=2", "output.name=elastic",
        f"output.store={STORE}",
    )  # fmt: skip
    with running_cluster(1, 2, 2) as cluster:
        address = ("--address", cluster.dashboard, "--follow")
        with Command("train", "configs/training/lora.yaml", *address, *settings) as job:
            # By the third checkpoint Ray Train knows of the first: it waits for one at a time.
            job.read_until(f"step 15/{STEPS}")
            gate.close()  # however fast the machine is, it goes on when the next node is there
            cluster.order("kill 1")
            job.read_until(" 1 workers, ZeRO")
            cluster.order("add 2")
            job.read_until(" 2 workers, ZeRO")
            cluster.order("drain 2")
            gate.open()
            noticed = job.read_until(r"is about to be taken away: step (\d+) is saved")
            wait_for_checkpoint(registry, job.job, int(noticed[1]))
            gate.close()
            cluster.order("kill 2")
            job.read_until(" 1 workers, ZeRO")
            gate.open()
            ended = job.wait()
    assert ended.code == 0, ended.output
    assert re.findall(r"(\d+) workers, ZeRO", ended.output) == ["2", "1", "2", "1"], ended.output
    *_, resumed = re.findall(r"going on from step (\d+)", ended.output)
    assert int(resumed) >= int(noticed[1]), ended.output

    version = registry.resolve("elastic")
    spec = version.card["spec"] | {"workers": {"count": 2, "cpus": 2, "gpus": 0}}
    parsed = parse_spec(TrainingSpec, spec)
    tokenize(parsed.data, load_tokenizer(parsed.base_model), tmp_path / "tokens")
    with Workers(2) as workers:
        workers.run([Case(spec, tmp_path / "calm")], tmp_path / "tokens")
    calm = [(line["step"], line["loss"]) for line in log_of(tmp_path / "calm")]
    curve = json.loads(version.card["metrics"]["loss_curve"])
    assert [step for step, _ in curve] == [step for step, _ in calm]
    assert max(abs(a - b) for (_, a), (_, b) in zip(curve, calm, strict=True)) < 1e-5
    copy = LocalCopies(registry, tmp_path / "cache").fetch(version)
    published = copy / "adapter_model.safetensors"
    assert difference(load_file(published), weights_of(tmp_path / "calm")) < 1e-5
