"""The whole way on a real Ray cluster of two nodes, by the commands a user types.

Train on both nodes from a preset, publish, serve, ask through clients, generate from a file; kill
a worker on the way; look at jobs and stop them.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from adapters import make_adapter
from conftest import RayCluster, served_at
from safetensors.torch import load_file
from workers import Case, run_cases

from cluster.base_model import load_tokenizer
from cluster.registry import Registry
from cluster.spec import parse_spec
from cluster.tables import open_table, write_table
from serving.client import Client
from training.data import tokenize
from training.spec import TrainingSpec

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.ray, pytest.mark.slow]
EVALUATED = ("data.validation=0.2", "evaluation.every_steps=10", "evaluation.generations=2",
             "evaluation.max_new_tokens=4")  # fmt: skip
# A worker is killed beside it, and one of its adapters diverges.
SWEEP = ("max_steps=150", "adapters.wild.optimizer={learning_rate: 1.0e+30, warmup_ratio: 0.3}",
         "adapters.category-ia3.max_steps=20", "adapters.category-lora-4.batch_size=8")  # fmt: skip
FAST = ("base_model=configs/demo/base", "max_steps=6", "checkpoint_every_steps=2",
        "log_every_steps=2", "workers.cpus=1")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def let_in(ray_cluster: RayCluster) -> Iterator[None]:
    """The cluster's token, for this process and its children."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ray_cluster.env.items():
            patch.setenv(key, value)
        yield


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *map(str, arguments)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )  # fmt: skip


def graft(*arguments: object) -> str:
    """The output of a command that succeeds."""
    process = start(*arguments)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def overrides(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


@pytest.fixture(scope="module")
def store(
    s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Registry]]:
    """A store in a bucket, as two nodes without a shared folder would use it."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_REGION", "us-east-1")
        client = boto3.client("s3", region_name="us-east-1", endpoint_url=s3_endpoint)
        client.create_bucket(Bucket="adapters")
        uri = "s3://adapters/team"
        yield uri, Registry(uri)


@dataclass(frozen=True)
class Small:
    """The job that is killed: a tiny base and few rows."""

    base: Path
    rows: Path

    def settings(self) -> tuple[str, ...]:
        return (
            f"base_model={self.base}", f"data.train={self.rows}", "data.format=prompt_completion",
            "max_steps=60", "checkpoint_every_steps=10", "log_every_steps=5",
        )  # fmt: skip


@pytest.fixture(scope="module")
def small(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Small:
    path = tmp_path_factory.mktemp("rows") / "small.arrow"
    rows = {"prompt": [f"p{i}" * (i % 5 + 1) for i in range(64)], "completion": ["done"] * 64}
    write_table(pa.table(rows), path)
    return Small(bases("llama"), path)


@pytest.fixture(scope="module")
def train(
    ray_cluster: RayCluster, store: tuple[str, Registry]
) -> Callable[..., subprocess.Popen[str]]:
    """Starts `graft train --follow` with a preset."""

    def run(preset: str, name: str, *settings: str) -> subprocess.Popen[str]:
        return start(
            "train", f"configs/training/{preset}.yaml", "--address", ray_cluster.dashboard,
            "--follow",
            *overrides(*FAST, f"output.store={store[0]}", f"output.name={name}", *settings),
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def jobs(
    train: Callable[..., subprocess.Popen[str]], small: Small
) -> dict[str, subprocess.Popen[str]]:
    """Jobs by their adapter's name, at the same time: much of a job is start-up.

    The two workers of `lora` take more than half a node each, so they run on both nodes.
    """
    bad = small.rows.with_name("bad.arrow")
    rows = {"prompt": ["p"] * 300, "completion": ["c"] * 299 + [None]}
    write_table(pa.table(rows), bad)
    return {
        "lora": train("lora", "lora", "workers.cpus=4"),
        "killed": train("prompt_tuning", "killed", *small.settings(), *EVALUATED),
        "failed": train("lora", "failed", "data.format=prompt_completion", f"data.train={bad}"),
    }


@pytest.fixture(scope="module")
def trained(jobs: dict[str, subprocess.Popen[str]]) -> str:
    """The output of the job whose adapter is served."""
    output, _ = jobs["lora"].communicate(timeout=240)
    assert jobs["lora"].returncode == 0, output
    return output


def until_killed(job: subprocess.Popen[str], at: str) -> tuple[str, int]:
    """A job's whole output and its exit code, after SIGKILL to its first worker at a line."""
    assert job.stdout is not None
    lines: list[str] = []
    worker = 0
    for line in job.stdout:
        lines.append(line)
        found = re.search(r"training: .* process (\d+)", line)
        worker = int(found[1]) if found else worker
        if worker and at in line:
            os.kill(worker, signal.SIGKILL)
            break
    rest, _ = job.communicate(timeout=200)
    return "".join(lines) + rest, job.returncode


def test_a_killed_worker_costs_nothing(
    jobs: dict[str, subprocess.Popen[str]], store: tuple[str, Registry], small: Small,
    tmp_path: Path,
) -> None:  # fmt: skip
    """SIGKILL in the middle: the job goes on from its last checkpoint, to the same bytes that
    two workers make without Ray and without disturbance."""
    text, code = until_killed(jobs["killed"], "step 25/60")
    assert code == 0, text
    resumed = re.search(r"going on from step (\d+)", text)
    assert resumed is not None, text
    assert int(resumed[1]) in (10, 20)
    assert re.search(r"evaluation at step 60  loss \d+\.\d+  perplexity [\d.]+  exact match", text)

    version = store[1].resolve("killed")
    spec = parse_spec(TrainingSpec, version.card["spec"])
    tokenize(spec.data, load_tokenizer(spec.base_model), tmp_path / "tokens")
    run_cases(2, [Case(version.card["spec"], tmp_path)], tmp_path / "tokens")
    calm = tmp_path / "adapter/adapter_model.safetensors"
    published = store[1].fetch(version, tmp_path / "cache") / "adapter_model.safetensors"
    assert published.read_bytes() == calm.read_bytes()


def test_several_adapters_survive_a_killed_worker_and_one_that_diverges(
    train: Callable[..., subprocess.Popen[str]], small: Small, ray_cluster: RayCluster,
    store: tuple[str, Registry], tmp_path: Path,
) -> None:  # fmt: skip
    """Each is what its solo run makes; what failed goes on as a job of its own."""
    sweep = train("sweep", "sweep", *small.settings(), *SWEEP)
    text, code = until_killed(sweep, "category-lora-16: step 15/150")
    job = job_id(text)
    assert code == 5, text
    assert re.search(r"category-lora-16: going on from step \d+0", text), text
    assert "category-ia3: step 20/20  loss" in text
    assert "1 of 5 adapters failed:\n  wild: training diverged at step" in text
    published = ("category-lora-16", "category-lora-4", "category-lora-16-slow", "category-ia3")
    assert "wild" not in store[1].names()
    cards = {name: store[1].resolve(name).card for name in published}
    spec = parse_spec(TrainingSpec, cards["category-lora-16"]["spec"])
    tokenize(spec.data, load_tokenizer(spec.base_model), tmp_path / "tokens")
    assert {(card["job"]["id"], card["job"]["name"]) for card in cards.values()} == {(job, "sweep")}
    compared = ("category-lora-4", "category-ia3")
    alone = [Case(cards[name]["spec"], tmp_path / name) for name in compared]
    run_cases(2, alone, tmp_path / "tokens")
    for name in compared:
        expected = load_file(tmp_path / name / "adapter/adapter_model.safetensors")
        folder = store[1].fetch(store[1].resolve(name), tmp_path / "cache")
        for key, weight in load_file(folder / "adapter_model.safetensors").items():
            assert (weight - expected[key]).abs().max() < 1e-4, (name, key)

    address = ("--address", ray_cluster.dashboard, "--store", store[0], "--follow")
    tame = overrides("adapters.wild.optimizer.learning_rate=0.001", "max_steps=20")
    text = graft("train", "--resume", job, *address, *tame)
    assert "published wild@1" in text
    assert "category-ia3" not in text
    assert all(store[1].resolve(name).ref == f"{name}@1" for name in published)


def test_a_job_that_fails_says_why(
    jobs: dict[str, subprocess.Popen[str]], store: tuple[str, Registry]
) -> None:
    """The data's first rows are sound, so only the job meets the bad one."""
    output, _ = jobs["failed"].communicate(timeout=120)
    assert jobs["failed"].returncode == 5
    assert "row 299: column 'completion' holds NoneType" in output
    assert "Traceback" not in output
    assert "failed" not in store[1].names()


def test_training_on_two_nodes_publishes_an_adapter(
    trained: str, store: tuple[str, Registry], tmp_path: Path
) -> None:
    _, registry = store
    output = trained
    assert re.search(r"lora\.yaml: [\d,]+ of [\d,]+ parameters \(\d+\.\d+%\), 1,500 rows", output)
    assert re.search(r"step 6/6  loss \d+\.\d+  lr ", output)
    assert "published lora@1" in output
    version = registry.verify("lora")
    assert (version.method, version.card["spec"]["workers"]["count"]) == ("LORA", 2)
    assert version.card["metrics"]["step"] == 6
    assert version.card["data"]["kept"] == 1500
    assert set(version.card["libraries"]) >= {"torch", "peft", "ray", "deepspeed"}
    folder = registry.fetch(version, tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for key, weight in weights.items() if "lora_B" in key)


def test_jobs_are_listed_shown_and_logged(ray_cluster: RayCluster, trained: str) -> None:
    address = ("--address", ray_cluster.dashboard)
    job = job_id(trained)
    assert re.search(rf"{job} +lora +SUCCEEDED", graft("jobs", "list", *address))
    assert "SUCCEEDED" in graft("jobs", "show", job, *address)
    assert "published lora@1" in graft("jobs", "logs", job, *address)
    missing = start("jobs", "show", "nothing", *address)
    output, _ = missing.communicate(timeout=60)
    assert (missing.returncode, "'nothing': not on the cluster" in output) == (3, True)


def job_id(output: str) -> str:
    found = re.search(r"job (\S+) on ", output)
    assert found is not None, output
    return found[1]


def test_a_job_can_be_stopped(
    ray_cluster: RayCluster, train: Callable[..., subprocess.Popen[str]],
    store: tuple[str, Registry], small: Small,
) -> None:  # fmt: skip
    following = train("bitfit", "stopped", *small.settings(), "max_steps=100000",
                      "workers.count=[1, 2]")  # fmt: skip
    assert following.stdout is not None
    lines: list[str] = []
    for line in following.stdout:
        lines.append(line)
        if re.search(r"step 15/100000", line):
            break
    job = job_id("".join(lines))
    address = ("--address", ray_cluster.dashboard)
    early = start("train", "--resume", job, *address)
    assert "is RUNNING" in early.communicate(timeout=60)[0]
    assert early.returncode == 4
    assert "STOPPED" in graft("jobs", "stop", job, "--address", ray_cluster.dashboard)
    rest, _ = following.communicate(timeout=30)
    assert (following.returncode, "STOPPED" in rest) == (5, True)
    assert "stopped" not in store[1].names()
    # Go on from its last checkpoint, on one worker, for a few steps more.
    keys = store[1].store.list(f"runs/{job}")
    last = max(int(k.split("/step-")[1][:8]) for k in keys if k.endswith("progress.json"))
    assert any(f"{job}/tensorboard/events.out.tfevents." in key for key in keys)
    settings = ("workers.count=1", f"max_steps={last + 15}")
    text = graft("train", "--resume", job, "--follow", *address, *overrides(*settings))
    assert f"going on from step {last}: bitfit" in text
    assert "published stopped@1" in text
    assert store[1].resolve("stopped").card["job"]["continues"] == job
    again = start("train", "--resume", job, *address)
    assert f"continued by {job_id(text)} already" in again.communicate(timeout=60)[0]
    assert again.returncode == 4
    left = store[1].store.list(f"runs/{job}")
    assert not any(key.endswith((".safetensors", "progress.json")) for key in left)


@pytest.fixture(scope="module")
def service(
    ray_cluster: RayCluster, trained: str, store: tuple[str, Registry],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:  # fmt: skip
    """The URL of `graft serve` with two replicas; it is stopped by SIGTERM."""
    folder = tmp_path_factory.mktemp("service")
    base = ROOT / "configs/demo/base"
    store[1].publish("prefix-tuning", make_adapter("prefix_tuning", base, folder / "adapter"))
    settings = overrides(
        f"store={store[0]}", "engine.base_model=configs/demo/base", "gateway.port=0",
        "replicas.min=2", "replicas.max=2", f"cache={folder}/cache",
    )  # fmt: skip
    process = start(
        "serve", "configs/serving/local.yaml", "--address", ray_cluster.address, *settings
    )
    yield served_at(process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output


def test_openais_client_against_the_served_adapters(service: str) -> None:
    script = ROOT / "tests/conformance/openai_client.py"
    arguments = [sys.executable, str(script), service, "demo-base", "lora", "prefix-tuning"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "conforms" in result.stdout


def test_a_file_through_the_command(service: str, tmp_path: Path) -> None:
    names = ["demo-base", "lora", "prefix-tuning", "lora@1"]
    rows = {"prompt": [f"row {i}" for i in range(40)], "model": [names[i % 4] for i in range(40)]}
    write_table(pa.table(rows), tmp_path / "in.parquet")
    output = graft("generate", tmp_path / "in.parquet", tmp_path / "out.parquet", "--url", service,
                   "--adapter-column", "model", "--max-tokens", "6", "--quiet")  # fmt: skip
    assert "40 rows" in output
    found = open_table(tmp_path / "out.parquet").to_pylist()
    assert [row["prompt"] for row in found] == rows["prompt"]
    assert not any(row["error"] for row in found)
    with Client(service) as client:
        for row in found[:4]:
            (alone,) = client.generate([row["prompt"]], adapter=row["model"], max_tokens=6)
            assert alone.text == row["completion"]


def test_errors_of_a_replica_keep_their_form_on_the_way(service: str) -> None:
    from cluster.errors import ContextLengthError, ModelNotFoundError

    with Client(service, max_attempts=1) as client:
        with pytest.raises(ContextLengthError, match="context"):
            client.generate(["x " * 5000], adapter="lora")
        with pytest.raises(ContextLengthError, match="context"):
            list(client.stream("x " * 5000, adapter="lora"))
        with pytest.raises(ModelNotFoundError, match="did you mean 'lora'"):
            client.generate(["x"], adapter="lroa")


def test_a_new_version_is_served_without_a_restart(
    service: str, store: tuple[str, Registry], tmp_path: Path
) -> None:
    _, registry = store
    folder = registry.fetch(registry.resolve("prefix-tuning"), tmp_path)
    with Client(service, max_attempts=1) as client:
        registry.publish("fresh", folder)
        deadline = time.monotonic() + 5
        while "fresh" not in {card.id for card in client.models()}:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        texts = [client.generate(["hi"], adapter=a)[0].text for a in ("fresh", "prefix-tuning")]
    assert texts[0] == texts[1]


@pytest.fixture
def short_folder() -> Iterator[str]:
    """Ray's socket names must fit into 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="g") as folder:
        yield folder


def test_a_session_of_our_own_ends_with_us(tmp_path: Path, short_folder: str) -> None:
    """A cluster that Graft starts is asked for a token, and no process of it is left."""
    code = (
        "import json, os, urllib.request, urllib.error\n"
        "from cluster.session import session\n"
        "from cluster.jobs import list_jobs\n"
        "with session(num_cpus=1) as ray:\n"
        "    assert ray.started_here and list_jobs(ray) == []\n"
        "    try: urllib.request.urlopen(ray.dashboard_url + '/api/jobs/')\n"
        "    except urllib.error.HTTPError as e: print(json.dumps([ray.dashboard_url, e.code]))\n"
        "    import psutil\n"
        "    mine = [p.pid for p in psutil.Process().children(recursive=True)]\n"
        "    print(json.dumps(mine))\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "TMPDIR": short_folder}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            timeout=120, check=False, cwd=ROOT, env=env)  # fmt: skip
    assert result.returncode == 0, result.stderr
    (url, status), processes = map(json.loads, result.stdout.splitlines()[-2:])
    assert url.startswith("http://127.0.0.1:")
    assert status in (401, 403)
    assert len(processes) > 3
    deadline = time.monotonic() + 10
    while left := [pid for pid in processes if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
