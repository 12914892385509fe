"""What is too much, too late, or does not end well: limits, times, a dead engine."""

import asyncio
import json
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from adapters import make_adapter
from safetensors.torch import load_file
from service import ASK, BASE_NAME, error, publish, running

from cluster.errors import SpecError
from cluster.spec import parse_spec
from serving.gateway.access import Bucket, Door
from serving.gateway.guard import Guard
from serving.gateway.metrics import Metrics
from serving.keys import KeyStore
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
@pytest.mark.parametrize(("dies", "code"), [(True, "unavailable"), (False, "engine_error")])
def test_an_engine_that_fails_under_a_stream_ends_it_with_an_error(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool, code: str
) -> None:
    """Wholly or in one pass. A stream that just ends would look like success."""
    with running(bases("llama"), tmp_path) as doomed:
        engine = doomed.replica._thread.engine
        failing = (engine, "step") if dies else (engine.runner, "forward")
        body = {"model": BASE_NAME, "prompt": "x", "max_tokens": 120, "ignore_eos": True,
                "stream": True, "n": 4}  # fmt: skip

        def fail(*_: Any) -> None:
            raise RuntimeError("the device is gone")

        with (
            monkeypatch.context() as patch,
            httpx2.stream(
                "POST", f"{doomed.url}/v1/completions", json=body, timeout=30
            ) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            patch.setattr(*failing, fail)
            rest = [line for line in lines if line]
        last = json.loads(rest[-1].removeprefix("data: "))["error"]
        assert last["code"] == code
        assert ("has stopped" if dies else "device is gone") in last["message"]
        assert "data: [DONE]" not in rest
        assert httpx2.get(f"{doomed.url}/ready").status_code == (503 if dies else 200)


@pytest.mark.parametrize("stream", [False, True])
def test_a_pass_that_raises_is_a_500_and_the_next_one_is_not(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with running(bases("llama"), tmp_path) as service:
        body = {"model": BASE_NAME, **ASK, "ignore_eos": True, "n": 3, "seed": 1, "temperature": 1}

        def ask(**more: Any) -> httpx2.Response:
            return httpx2.post(f"{service.url}/v1/completions", json={**body, **more}, timeout=60)

        def texts() -> list[str]:
            return [choice["text"] for choice in ask().json()["choices"]]

        def fail(batch: Any) -> Any:
            raise RuntimeError("device error")

        expected = texts()
        with monkeypatch.context() as patch:
            patch.setattr(service.replica._thread.engine.runner, "forward", fail)
            detail = error(ask(stream=stream), 500)
        assert (detail["type"], detail["code"]) == ("server_error", "engine_error")
        assert "device error" in detail["message"]
        assert texts() == expected
        assert httpx2.get(f"{service.url}/ready").status_code == 200
        stats = service.stats
        assert (stats.running, stats.waiting) == (0, 0)


def test_adapters_are_a_label_of_a_bounded_number_of_values() -> None:
    metrics = Metrics()
    for _ in range(2):
        for number in range(150):
            metrics.begun(f"a{number}", 2, 5)
            metrics.queued(f"a{number}", 0.1)
            metrics.first_token(f"a{number}", 0.1)
            metrics.ended(f"a{number}", 2, 3, 0.1)
    text = metrics.text({}).decode()
    found = defaultdict[str, set[str]](set)
    for family, label in re.findall(r'^(\w+)\{.*?adapter="([^"]+)"', text, re.MULTILINE):
        found[family].add(label)
    assert "graft_time_to_first_token_seconds_bucket" in found
    for labels in found.values():
        assert labels == {*(f"a{number}" for number in range(100)), "others"}
    assert re.search(r'graft_requests_total\{adapter="a99",.*\} 4.0', text)
    assert re.search(r'graft_requests_total\{adapter="others",.*\} 200.0', text)


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

    async def get(door: Door, request_id: str = "mine") -> httpx2.Response:
        guard = Guard(broken, door=door, metrics=metrics, max_header_bytes=1000)
        transport = httpx2.ASGITransport(guard)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.get("/", headers={"X-Request-Id": request_id})

    metrics = Metrics()
    for keys, status, code in (
        (None, 500, "server_error"),
        (KeyStore(str(tmp_path)), 401, "invalid_api_key"),
    ):
        response = asyncio.run(get(Door(keys, ttl_s=1)))
        assert "fault of ours" not in error(response, status)["message"]
        assert response.headers["x-request-id"] == "mine"
        assert re.search(rf'graft_errors_total{{code="{code}",.*}} 1.0', metrics.text({}).decode())
    for request_id in ("mine\nX-Forged: yes", "mine\r\nX-Forged: yes", "mine\n", "x" * 2000):
        answered = asyncio.run(get(Door(None, ttl_s=1), request_id)).headers
        (own,) = answered.get_list("x-request-id")
        assert re.fullmatch("[0-9a-f]{32}", own)
        assert "x-forged" not in answered
