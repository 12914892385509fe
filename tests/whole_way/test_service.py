"""The adapters that jobs published, served on the same cluster: by OpenAI's client and ours."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pyarrow as pa
import pytest
from adapters import make_adapter
from commands import ROOT, Command, Ended, graft, overrides, served_at
from conftest import RayCluster
from training_jobs import STORE

from cluster.errors import ContextLengthError, ModelNotFoundError
from cluster.local_copies import LocalCopies
from cluster.registry import Registry
from cluster.tables import open_table, write_table
from serving.client import Client

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def service(
    ray_cluster: RayCluster, trained: Ended, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of `graft serve` with two replicas; it is stopped by SIGTERM."""
    folder = tmp_path_factory.mktemp("service")
    base = ROOT / "configs/demo/base"
    Registry(STORE).publish(
        "prefix-tuning", make_adapter("prefix_tuning", base, folder / "adapter")
    )
    settings = overrides(
        f"store={STORE}", "engine.base_model=configs/demo/base", "gateway.port=0",
        "replicas.min=2", "replicas.max=2", f"cache={folder}/cache",
        f"gateway.max_body_bytes={2**19}",
    )  # fmt: skip
    document = "configs/serving/local.yaml"
    with Command("serve", document, "--address", ray_cluster.address, *settings) as command:
        yield served_at(command)
        command.process.send_signal(signal.SIGTERM)
        ended = command.wait()
    assert ended.code == 0, ended.output


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
    with Client(service, max_attempts=1) as client:
        with pytest.raises(ContextLengthError, match="context"):
            client.generate(["x " * 5000], adapter="lora")
        with pytest.raises(ContextLengthError, match="context"):
            list(client.stream("x " * 5000, adapter="lora"))
        with pytest.raises(ModelNotFoundError, match="did you mean 'lora'"):
            client.generate(["x"], adapter="lroa")


def test_a_new_version_is_served_without_a_restart(
    service: str, registry: Registry, tmp_path: Path
) -> None:
    folder = LocalCopies(registry, tmp_path).fetch(registry.resolve("prefix-tuning"))
    with Client(service, max_attempts=1) as client:
        registry.publish("fresh", folder)
        deadline = time.monotonic() + 5
        while "fresh" not in {card.id for card in client.models()}:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        texts = [client.generate(["hi"], adapter=a)[0].text for a in ("fresh", "prefix-tuning")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("ask", "status"),
    [
        (lambda http: http.get("/health/"), 200),
        (lambda http: http.get("/v1/completions"), 405),
        (lambda http: http.get("/v1/models", headers={"X-Long": "x" * 40_000}), 431),
        (lambda http: http.post("/v1/completions", content=b"x" * 2**20), 413),
        (lambda http: http.post("/v1/completions", content=b'{"temperature": NaN}'), 400),
        (lambda http: http.post("/v1/completions", content=b"[" * 100_000), 400),
        (lambda http: http.post("/v1/completions", content=iter([b'{"model"', b": 5}"])), 400),
    ],
)
def test_refusals_pass_the_proxy(
    service: str, ask: Callable[[httpx2.Client], httpx2.Response], status: int
) -> None:
    headers = {"X-Request-Id": "mine-1"}
    with httpx2.Client(base_url=service, headers=headers, trust_env=False) as http:
        response = ask(http)
    assert response.status_code == status, response.text
    assert response.headers.get_list("x-request-id") == ["mine-1"]
    assert status == 200 or response.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_engine(service: str) -> None:
    """Long before its answers would have ended."""
    count, tokens = 16, 400
    body = {"model": "demo-base", "prompt": "x", "max_tokens": tokens, "ignore_eos": True,
            "stream": True}  # fmt: skip

    def generated() -> float:
        page = httpx2.get(f"{service}/metrics", trust_env=False).text
        found = re.findall(r"^graft_engine_generated_tokens_total\{.*\} (\S+)$", page, re.MULTILINE)
        return sum(map(float, found))

    before = generated()
    with httpx2.Client(base_url=service, trust_env=False) as http, ExitStack() as streams:
        for _ in range(count):
            stream = streams.enter_context(http.stream("POST", "/v1/completions", json=body))
            assert next(stream.iter_lines())
    told, deadline = [before], time.monotonic() + 60
    while told[-1] == before or told[-1] != told[-7:][0]:  # engines tell it every five seconds
        assert time.monotonic() < deadline, told
        time.sleep(1)
        told.append(generated())
    assert told[-1] - before < count * tokens / 2, told
