"""What is too much, too late, or not for everyone: keys, limits, times, a dead engine."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pytest
import typer
from adapters import make_adapter
from safetensors.torch import load_file
from service import ASK, BASE_NAME, CATALOGUE_TTL_S, error, publish, running
from typer.testing import CliRunner

from cluster.errors import JobFailedError, NotFoundError, SpecError
from cluster.spec import parse_spec
from cluster.tables import write_table
from serving.command import generate
from serving.command import keys as commands
from serving.gateway.access import Bucket, Door
from serving.gateway.guard import Guard
from serving.gateway.metrics import Metrics
from serving.keys import KeyStore, find
from serving.spec import GatewaySpec

Bases = Callable[[str], Path]


@pytest.mark.parametrize("host_gib", [0, 1.0])
def test_more_adapters_than_the_engine_holds(bases: Bases, tmp_path: Path, host_gib: float) -> None:
    """A working set twice the memory churns; what host memory keeps is fetched only once."""
    copies = 3
    folder = make_adapter("lora", bases("llama"), tmp_path / "lora")
    names = [f"lora-{number}" for number in range(2 * copies)]
    # Its tensors, at their ranks, and nothing else.
    size = sum(t.nbytes for t in load_file(folder / "adapter_model.safetensors").values())
    memory = {"adapters_gib": 1.05 * copies * size / 2**30, "host_adapters_gib": host_gib}
    with running(bases("llama"), tmp_path, **memory) as small:
        config = (folder / "adapter_config.json").read_text()
        for name in names:  # each of a content of its own, by a field that changes nothing
            changed = config.replace('"revision": null', f'"revision": "{name}"')
            assert changed != config
            (folder / "adapter_config.json").write_text(changed)
            small.registry.publish(name, folder)
        most = 0

        def ask(model: str) -> int:
            nonlocal most
            body = {"model": model, "prompt": "x", "max_tokens": 10, "ignore_eos": True}
            status = httpx2.post(f"{small.url}/v1/completions", json=body, timeout=60).status_code
            most = max(most, asyncio.run(small.replica.stats()).adapter_bytes)
            return status

        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(ask, names * 6)) == {200}
        figures = asyncio.run(small.replica.stats())
        assert len(small.replica.adapters) == copies
        assert figures.adapter_bytes == pytest.approx(copies * size, rel=0.05)
        assert most <= 1.05 * copies * size
        assert figures.adapter_hits + figures.adapter_loads == 6 * len(names)
        assert figures.adapter_evictions == figures.adapter_loads - copies > 0
        assert (figures.host_adapter_hits > 0) == (host_gib > 0)
        if host_gib:
            assert figures.host_adapter_bytes == pytest.approx(len(names) * size, rel=0.05)
        kept = {f"{name}@1" for name in names} if host_gib else set[str]()
        assert set(small.replica.host_adapters) == kept


def test_over_the_queue_limit_is_429(bases: Bases, tmp_path: Path) -> None:
    with running(bases("llama"), tmp_path, gateway={"max_waiting_requests": 3}) as small:
        url, body = f"{small.url}/v1/completions", {"model": BASE_NAME, "prompt": "x", "n": 3}
        long = {**body, "max_tokens": 100, "ignore_eos": True}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: httpx2.post(url, json=long, timeout=60), range(8)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 0 < len(refused) < 8
        for answer in refused:
            assert error(answer, 429)["code"] == "overloaded"
            assert answer.headers["retry-after"] == "1"
        assert httpx2.post(url, json=body).status_code == 200
        assert "send less" in error(httpx2.post(url, json={**body, "n": 4}), 400)["message"]


def test_a_dead_engine_shows(bases: Bases, tmp_path: Path) -> None:
    with running(bases("llama"), tmp_path) as doomed:
        doomed.replica.stop()
        assert error(httpx2.get(f"{doomed.url}/ready"), 503)["code"] == "unavailable"
        body = {"model": BASE_NAME, "prompt": "x"}
        error(httpx2.post(f"{doomed.url}/v1/completions", json=body), 503)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_ends_its_streams_with_an_error(bases: Bases, tmp_path: Path) -> None:
    """A stream that just ends would look like success."""
    with running(bases("llama"), tmp_path) as doomed:
        body = {"model": BASE_NAME, "prompt": "x", "max_tokens": 120, "ignore_eos": True,
                "stream": True, "n": 4}  # fmt: skip

        def fail() -> None:
            raise RuntimeError("the device is gone")

        with httpx2.stream(
            "POST", f"{doomed.url}/v1/completions", json=body, timeout=30
        ) as response:
            lines = response.iter_lines()
            next(lines)
            doomed.replica._thread.engine.step = fail  # type: ignore[method-assign]
            rest = [line for line in lines if line]
        last = json.loads(rest[-1].removeprefix("data: "))["error"]
        assert (last["code"], "has stopped" in last["message"]) == ("unavailable", True)
        error(httpx2.get(f"{doomed.url}/ready"), 503)


class Guarded:
    """A service that asks for keys."""

    def __init__(self, url: str, keys: KeyStore) -> None:
        self.url, self.keys = url, keys

    def client(self, **rights: Any) -> httpx2.Client:
        """A connection with a new key of those rights."""
        _, text = self.keys.create("someone", **rights)
        time.sleep(1.5 * CATALOGUE_TTL_S)
        return self.connect(f"Bearer {text}")

    def connect(self, authorization: str) -> httpx2.Client:
        headers = {"Authorization": authorization}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)


@pytest.fixture(scope="module")
def guarded(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    keys = KeyStore(str(folder / "keys"))
    with running(bases("llama"), folder, gateway={"keys": str(folder / "keys")}) as service:
        publish(service.registry, bases("llama"), folder, "lora", "bitfit")
        yield Guarded(service.url, keys)


def test_nobody_without_a_key(guarded: Guarded) -> None:
    with guarded.client() as http:
        assert http.get("/v1/models").status_code == 200
        text = http.headers["authorization"].partition(" ")[2]
    with guarded.connect(f"bearer {text}") as http:
        assert http.get("/v1/models").status_code == 200
    for wrong in ("", "Bearer", f"Basic {text}", "Bearer graft-x-y", f"Bearer {text}x", "Bearer é"):
        response = httpx2.get(
            f"{guarded.url}/v1/models", headers={b"Authorization": wrong.encode()}
        )
        assert error(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    forged = {"Host": "x/health?"}
    for path in ("/v1/models", "/v1/models/", "/metrics", "/v1/nothing", "/health/../v1/models"):
        for headers in ({}, forged):
            error(httpx2.get(f"{guarded.url}{path}", headers=headers), 401)
    error(httpx2.post(f"{guarded.url}/v1/completions", content=b"{"), 401)
    assert httpx2.get(f"{guarded.url}/health/").status_code == 200
    assert httpx2.get(f"{guarded.url}/ready").status_code == 200


def test_a_forbidden_adapter_is_as_unknown_as_none(guarded: Guarded) -> None:
    with guarded.client(adapters=["bit*"]) as http:
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["bitfit"]
        assert http.post("/v1/completions", json={"model": "bitfit@1", **ASK}).status_code == 200
        refused = [
            error(http.post("/v1/completions", json={"model": model, **ASK}), 404)
            for model in ("lora", "loro", BASE_NAME, "lora@1", "bitfit:1+lora:1")
        ]
        assert len({d["message"].split("'", 2)[2] for d in refused}) == 1
        assert {detail["code"] for detail in refused} == {"model_not_found"}
        error(http.get("/v1/models/lora"), 404)
        error(http.get("/metrics"), 404)
    with guarded.client() as http:
        assert "graft_requests_total" in http.get("/metrics").text


def test_a_revoked_key_is_out(guarded: Guarded) -> None:
    with guarded.client() as http:
        assert http.get("/v1/models").status_code == 200
        key_id = http.headers["authorization"].split("-")[1]
        guarded.keys.revoke(key_id)
        time.sleep(1.5 * CATALOGUE_TTL_S)
        error(http.get("/v1/models"), 401)
    with pytest.raises(NotFoundError, match="graft keys list"):
        guarded.keys.revoke(key_id)


def test_a_file_is_answered_with_a_key(guarded: Guarded, tmp_path: Path) -> None:
    """`graft generate` is serving.command.generate."""
    write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "in.arrow")
    with guarded.client() as http:
        key = http.headers["authorization"].partition(" ")[2]
    app, out = typer.Typer(), tmp_path / "out.arrow"
    app.command()(generate)
    call = [str(tmp_path / "in.arrow"), str(out), "--adapter", "lora", "--url", guarded.url, "-q"]
    for option, environment in ((["--api-key", key], {}), ([], {"GRAFT_API_KEY": key})):
        result = CliRunner().invoke(app, [*call, *option], env=environment)
        assert result.exit_code == 0, result.output
        out.unlink()
    assert isinstance(CliRunner().invoke(app, call).exception, JobFailedError)


def test_requests_tokens_and_concurrency_of_a_key(guarded: Guarded) -> None:
    ask = {"model": "lora", **ASK, "ignore_eos": True}
    with guarded.client(requests_per_minute=2) as http:
        codes = [http.post("/v1/completions", json=ask).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
    with guarded.client(requests_per_minute=4) as http:
        codes = [http.post("/v1/completions", json={**ask, "n": n}).status_code for n in (5, 3, 2)]
        assert codes == [400, 200, 429]
        codes = [http.post("/tokenize", json={"prompt": "x"}).status_code for _ in range(2)]
        assert codes == [200, 429]
        error(http.post("/detokenize", json={"tokens": [1]}), 429)
    with guarded.client(tokens_per_minute=20) as http:
        codes = [http.post("/v1/completions", json=ask).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        response = http.post("/v1/completions", json=ask)
        assert error(response, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(response.headers["retry-after"]) <= 60
    with guarded.client(max_concurrent=1) as http, ThreadPoolExecutor(4) as pool:
        long = {**ask, "max_tokens": 100}
        codes = list(
            pool.map(lambda _: http.post("/v1/completions", json=long).status_code, range(4))
        )
        assert 200 in codes
        assert 429 in codes
        error(http.post("/v1/completions", json={**ask, "n": 2}), 400)
        assert http.post("/v1/completions", json=ask).status_code == 200


def test_a_key_is_never_stored(tmp_path: Path) -> None:
    keys = KeyStore(str(tmp_path))
    key, text = keys.create("team", adapters=["a*"], tokens_per_minute=5)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert text.split("-", 2)[2].encode() not in stored
    (tmp_path / "keys" / "broken.json").write_text("{")
    (tmp_path / "keys" / "other.json").write_text("[]")
    assert keys.keys() == {key.id: key}
    (tmp_path / "keys" / f"{key.id}.json").write_text("known already")
    assert keys.keys({key.id: key}) == {key.id: key}
    assert keys.keys() == {}
    assert find({key.id: key}, text) == key
    assert find({key.id: key}, text[:-1]) is None
    for bad in ({"adapters": []}, {"max_concurrent": 0}):
        with pytest.raises(SpecError):
            keys.create("team", **bad)


def test_keys_by_the_command(tmp_path: Path) -> None:
    """`graft keys` is serving.command.keys."""
    store = ["--store", str(tmp_path)]

    def graft(*arguments: str) -> str:
        result = CliRunner().invoke(commands, [*arguments, *store], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.output

    text = graft("create", "team", "--adapters", "a*", "--adapters", "b", "--max-concurrent", "2")
    key = find(KeyStore(str(tmp_path)).keys(), text.strip())
    assert key is not None
    assert (list(key.adapters), key.max_concurrent, key.allows("abc")) == (["a*", "b"], 2, True)
    listed = graft("list")
    assert key.id in listed
    assert text.strip() not in listed
    graft("revoke", key.id)
    assert key.id not in graft("list")


def test_a_bucket_refills_and_pays_its_debts() -> None:
    now = 0.0
    bucket = Bucket(60, lambda: now)
    bucket.take(60)
    assert bucket.wait_s(1) == pytest.approx(1)
    bucket.take(30)
    assert bucket.wait_s(1) == pytest.approx(31)
    now = 1000.0
    assert bucket.wait_s(60) == 0


def test_a_service_without_keys_stays_on_this_machine() -> None:
    with pytest.raises(SpecError, match="no keys are asked for"):
        parse_spec(GatewaySpec, {"host": "0.0.0.0"})
    assert parse_spec(GatewaySpec, {"host": "0.0.0.0", "keys": "s3://bucket/keys"}).keys


def test_the_dashboard_shows_what_there_is(bases: Bases, tmp_path: Path) -> None:
    """Every figure that a service has after some requests is shown, and nothing else is."""
    dashboard = json.loads(Path("configs/serving/grafana.json").read_text())
    shown = "\n".join(t["expr"] for panel in dashboard["panels"] for t in panel["targets"])
    asked = set(re.findall(r"graft_\w+", shown))
    folder = make_adapter("lora", bases("llama"), tmp_path / "alone")
    size = sum(t.nbytes for t in load_file(folder / "adapter_model.safetensors").values())
    with running(bases("llama"), tmp_path, adapters_gib=(size + 8) / 2**30) as small:
        publish(small.registry, bases("llama"), tmp_path, "lora", "bitfit")
        url = f"{small.url}/v1/completions"
        for model in ("lora", "lora", "bitfit", "nobody"):
            httpx2.post(url, json={**ASK, "model": model, "stream": True, "prompt": "x" * 40})
        text = httpx2.get(f"{small.url}/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    made = {line.split("{")[0] for line in lines}
    assert not asked - made
    families = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    families = {name for name in families if not name.endswith("_created")}
    assert not {name for name in families if not any(a.startswith(name) for a in asked)}
    ids = {re.search(r'gateway="(\w{8})"', line) for line in lines if "engine" not in line}
    assert None not in ids
    values = dict(line.rsplit(" ", 1) for line in lines if "engine" in line)
    engine = {key.replace("graft_engine_", ""): float(value) for key, value in values.items()}
    assert engine['adapter_hits_total{replica="here"}'] == 1
    assert engine['adapter_loads_total{replica="here"}'] == 2
    assert engine['adapter_evictions_total{replica="here"}'] == 1
    assert 0 < engine['adapter_bytes{replica="here"}'] <= size + 8
    assert engine['cached_tokens_total{replica="here"}'] == 32
    assert engine['step_rows_count{replica="here"}'] == engine['steps_total{replica="here"}'] > 0
    assert engine['step_tokens_sum{replica="here"}'] >= 40 + 8 + 40
    assert engine['pages{replica="here",state="free"}'] > 0


def test_late_answers_are_given_up(bases: Bases, tmp_path: Path) -> None:
    limits = {"request_timeout_s": 0.3, "first_token_timeout_s": 0.001}
    with running(bases("llama"), tmp_path, gateway=limits) as slow:
        url = f"{slow.url}/v1/completions"
        body = {"model": BASE_NAME, "prompt": "x", "ignore_eos": True, "max_tokens": 120}
        late = httpx2.post(url, json={**body, "n": 64}, timeout=60)
        assert "answer was not there after 0.3 s" in error(late, 504)["message"]
        late = httpx2.post(url, json={**body, "stream": True}, timeout=60)
        assert "first token" in error(late, 504)["message"]
        deadline = time.monotonic() + 5
        while slow.stats.running or slow.stats.waiting:
            assert time.monotonic() < deadline, "what nobody waits for still runs"


def test_a_body_that_does_not_arrive_is_given_up(bases: Bases, tmp_path: Path) -> None:
    with running(bases("llama"), tmp_path, gateway={"body_timeout_s": 0.3}) as slow:
        host, port = slow.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as line:
            line.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            )
            answer = b""
            while b"}" not in answer and (part := line.recv(65536)):
                answer += part
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body was not there after 0.3 s" in answer


def test_a_deadline_counts_from_the_arrival(bases: Bases, tmp_path: Path) -> None:
    def slowly() -> Iterator[bytes]:
        yield b'{"prompt": "x", "max_tokens": 1, '
        time.sleep(0.8)
        yield b'"model": "%s"}' % BASE_NAME.encode()

    with running(bases("llama"), tmp_path, gateway={"request_timeout_s": 0.7}) as slow:
        late = httpx2.post(f"{slow.url}/v1/completions", content=slowly(), timeout=60)
    assert "answer was not there after 0.7 s" in error(late, 504)["message"]


def test_what_the_guard_answers_itself_is_counted_and_has_an_id(tmp_path: Path) -> None:
    async def broken(*_: object) -> None:
        raise ValueError("a fault of ours")

    async def get(door: Door) -> httpx2.Response:
        guard = Guard(broken, door=door, metrics=metrics, max_header_bytes=1000)
        transport = httpx2.ASGITransport(guard)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.get("/", headers={"X-Request-Id": "mine"})

    metrics = Metrics()
    for keys, status, code in (
        (None, 500, "server_error"),
        (KeyStore(str(tmp_path)), 401, "invalid_api_key"),
    ):
        response = asyncio.run(get(Door(keys, ttl_s=1)))
        assert "fault of ours" not in error(response, status)["message"]
        assert response.headers["x-request-id"] == "mine"
        assert re.search(rf'graft_errors_total{{code="{code}",.*}} 1.0', metrics.text({}).decode())
