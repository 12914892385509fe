"""A training job whose cluster loses a node, gets another, and has notice that it loses that."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from commands import Ended, finish, overrides, read_until, start
from conftest import running_cluster
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

STEPS = 320  # each 20 of them wait for Ray Train to take a checkpoint, which it looks for every 2 s
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def wait_for_checkpoint(registry: Registry, job: str, step: int) -> None:
    """Until the checkpoint of that step is whole in the store."""
    whole = re.compile(rf"runs/{job}/step-{step:08d}-\w+/progress.json")
    deadline = time.monotonic() + 60
    while not any(map(whole.fullmatch, registry.store.list(f"runs/{job}"))):
        assert time.monotonic() < deadline, step
        time.sleep(0.05)


def test_a_job_loses_a_node_and_gets_another(
    bases: Callable[[str], Path],
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its two workers are on a node each. One node is killed, so one worker goes on; another node
    comes, so two do; of its end there is notice, so that one goes on from a checkpoint of then. The
    losses and the adapter are those of two workers that nobody disturbed."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    rows = {"prompt": [f"p{i}" * (i % 5 + 1) for i in range(64)], "completion": ["done"] * 64}
    write_table(pa.table(rows), tmp_path / "rows.arrow")
    settings = overrides(
        f"base_model={bases('llama')}", f"data.train={tmp_path}/rows.arrow",
        "data.format=prompt_completion", f"max_steps={STEPS}", "checkpoint_every_steps=20",
        "log_every_steps=20", "workers.count=[1, 2]", "workers.cpus=2", "output.name=elastic",
        f"output.store={STORE}",
    )  # fmt: skip
    with running_cluster(1, 2, 2) as cluster:
        address = ("--address", cluster.dashboard, "--follow")
        job = start("train", "configs/training/lora.yaml", *address, *settings)
        try:
            # By the third checkpoint Ray Train knows of the first: it waits for one at a time.
            said = read_until(job, f"step 60/{STEPS}")
            cluster.order("kill 1")
            said += read_until(job, "going on from step")
            cluster.order("add 2")
            said += read_until(job, " 2 workers, ZeRO")
            cluster.order("drain 2")
            said += read_until(job, "is about to be taken away")
            noticed = re.search(r"is about to be taken away: step (\d+) is saved", said)
            assert noticed is not None, said
            wait_for_checkpoint(registry, Ended(said, 0).job, int(noticed[1]))
            cluster.order("kill 2")
            ended = finish(job, said)
        finally:
            job.kill()
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
