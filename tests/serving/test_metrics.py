"""What Prometheus reads of a gateway, and whose fault it takes a failure for."""

import re
import socket
import time
from collections import Counter

import httpx2
from service import ASK, Running, error

from cluster.errors import OUTCOMES
from serving.gateway.metrics import Metrics


def figures(http: httpx2.Client) -> dict[str, float]:
    """What /metrics tells, by name and labels without the gateway's."""
    lines = http.get("/metrics").text.splitlines()
    named = [
        re.sub(r',gateway="\w+"|gateway="\w+",?', "", line) for line in lines if line[0] != "#"
    ]
    return {line.rpartition(" ")[0]: float(line.split()[-1]) for line in named}


def failures(http: httpx2.Client) -> Counter[str]:
    """How often each label of graft_errors_total was counted."""
    return Counter(
        {
            name.split('"')[1]: int(value)
            for name, value in figures(http).items()
            if name.startswith("graft_errors_total{")
        }
    )


def test_what_prometheus_reads(http: httpx2.Client) -> None:
    ask = {**ASK, "max_tokens": 3, "ignore_eos": True}
    http.post("/v1/completions", json={"model": "lora", **ask}).raise_for_status()
    http.post("/v1/completions", json={"model": "nobody", **ask})
    values = figures(http)
    assert values['graft_requests_total{adapter="lora"}'] >= 1
    assert values['graft_generated_tokens_total{adapter="lora"}'] >= 3
    assert values['graft_errors_total{code="model_not_found"}'] >= 1
    assert values['graft_http_responses_total{status="404"}'] >= 1
    assert values["graft_requests_in_progress{}"] == 0


def test_a_refused_request_is_no_error_of_the_servers(
    service: Running, http: httpx2.Client
) -> None:
    """Each is counted once, under one of few labels, whatever the client wrote into it."""
    before = failures(http)
    wrong = {"model": "lora", **ASK, "temperature": 9}
    for body in (wrong, {**wrong, "stream": True}, {**wrong, "no_such_field": 1}):
        error(http.post("/v1/completions", json=body), 400)
    error(http.post("/v1/chat/completions", content=b"{"), 400)
    error(http.post("/v1/embeddings", json={"model": "lora", "input": [[999]]}), 400)
    error(http.post("/detokenize", json={"tokens": [-1]}), 400)
    error(http.post("/v1/completions", json={**ASK, "model": "lora", "prompt": "x" * 500}), 400)
    error(http.post("/v1/completions", json={**ASK, "model": "no such model"}), 404)
    error(http.post("/tokenize", content=b"x" * 2**21), 413)
    error(http.get("/v1/models", headers={"X": "x" * 2**15}), 431)
    error(http.get("/no/such/path"), 404)  # nobody is asked; its status alone is counted
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    expected = {
        "invalid_request_error": 6, "context_length_exceeded": 1, "model_not_found": 1,
        "body_too_large": 1, "headers_too_large": 1, "client_gone": 1,
    }  # fmt: skip
    deadline = time.monotonic() + 30
    while sum((counted := failures(http) - before).values()) < sum(expected.values()):
        assert time.monotonic() < deadline, counted
    assert counted == expected


def test_no_label_is_of_refusals_and_of_faults() -> None:
    refusals, faults = set[str](), set[str]()
    for cls, outcome in OUTCOMES.items():
        metrics = Metrics()
        metrics.failed(cls("x"))
        (label,) = re.findall(
            r'^graft_errors_total{code="(\w+)",', metrics.text({}).decode(), re.MULTILINE
        )
        (faults if outcome.status >= 500 else refusals).add(label)
    assert "invalid_request_error" in refusals
    assert "server_error" in faults
    assert not refusals & faults
