"""Traces as a collector gets them from OpenTelemetry's own exporter (the extra raygraft[otel])."""

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import make_base
from service import ASK, BASE_NAME, running

from cluster.errors import SpecError
from serving.app import checked
from serving.spec import EngineSpec, GatewaySpec, ServingSpec


def test_spans_of_a_request(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            import gzip

            body = self.rfile.read(int(self.headers["Content-Length"]))
            is_packed = self.headers.get("Content-Encoding") == "gzip"
            bodies.append(gzip.decompress(body) if is_packed else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    def groups() -> list[Any]:
        found = [ExportTraceServiceRequest.FromString(body) for body in bodies]
        return [group for part in found for group in part.resource_spans]

    def spans_of(group: Any) -> list[Any]:
        return [span for scope in group.scope_spans for span in scope.spans]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    traces = f"http://127.0.0.1:{server.server_port}/v1/traces"
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # ms
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with running(bases("llama"), tmp_path, gateway={"traces": traces}) as service:
        headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "mine"}
        body = {**ASK, "model": BASE_NAME, "prompt": "secret", "ignore_eos": True}
        url = f"{service.url}/v1/completions"
        httpx2.get(f"{service.url}/health")
        httpx2.post(url, json=body | {"n": 2}, headers=headers)
        httpx2.post(url, json=body | {"stream": True})
        httpx2.post(url, json=body | {"model": "nobody"})
        deadline = time.monotonic() + 30
        while len(spans := [span for group in groups() for span in spans_of(group)]) < 12:
            assert time.monotonic() < deadline, spans
            time.sleep(0.05)
    server.shutdown()
    server.server_close()
    names = {a.value.string_value for group in groups() for a in group.resource.attributes}
    assert BASE_NAME in names
    roots = [span for span in spans if span.name == "POST /v1/completions"]
    assert len(spans) == 3 + 2 * 3 + 3
    (named,) = [span for span in roots if span.trace_id.hex() == trace]
    assert named.parent_span_id.hex() == parent
    told = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in named.attributes}
    assert told == {
        "graft.request_id": "mine", "graft.model": BASE_NAME, "graft.adapter": "",
        "graft.prompt_tokens": 6, "http.response.status_code": 200,
    }  # fmt: skip
    children = [span for span in spans if span.parent_span_id == named.span_id]
    assert sorted(span.name for span in children) == sorted(
        ["queue", "first token", "generate"] * 2
    )
    for span in children:
        assert span.trace_id == named.trace_id
        # The clocks of a trace are two: of the day for its spans' ends, monotonic for lengths.
        slack = 5_000_000
        assert named.start_time_unix_nano <= span.start_time_unix_nano + slack
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= named.end_time_unix_nano + slack
    assert not any(b"secret" in body for body in bodies)


def test_traces_without_the_extra_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.app._can_trace", lambda: False)
    spec = ServingSpec(
        name="x",
        engine=EngineSpec(base_model=str(make_base("llama", tmp_path))),
        gateway=GatewaySpec.model_validate({"traces": "http://127.0.0.1:4318/v1/traces"}),
    )
    with pytest.raises(SpecError, match=r"pip install 'raygraft\[otel\]'"):
        checked(spec)
