"""One side goes away in the middle: the service under a file, a reply on its way, a client that
does not wait for its first token."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from service import BASE_NAME, Running, running

from cluster.errors import ConflictError
from cluster.session import Session
from cluster.spec import parse_spec
from cluster.tables import open_table, write_table
from serving import app
from serving.client import Client
from serving.spec import LOOPBACK, ServingSpec

Bases = Callable[[str], Path]
ROWS = 40


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_file_outlives_a_restart_of_the_service(bases: Bases, tmp_path: Path) -> None:
    """Rows that were on their way when it ended are asked again; each is there once, in order."""
    write_table(pa.table({"id": range(ROWS), "prompt": [f"row {i}" for i in range(ROWS)]}),
                tmp_path / "in.jsonl")  # fmt: skip
    where = {"port": free_port()}
    journal = tmp_path / "out.jsonl.partial"

    def answer(url: str) -> int:
        with Client(url, concurrency=4) as client:
            return client.generate_file(
                tmp_path / "in.jsonl", tmp_path / "out.jsonl", adapter=BASE_NAME, max_tokens=24,
                ignore_eos=True, progress=False, outage_s=20,
            ).failed  # fmt: skip

    with ThreadPoolExecutor(1) as pool:
        with running(bases("llama"), tmp_path, gateway=where, drains=False) as before:
            failed = pool.submit(answer, before.url)
            deadline = time.monotonic() + 30
            while not journal.exists() or len(journal.read_text().splitlines()) < 10:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            until(lambda: before.stats.running)  # something is on its way when the service ends
        with running(bases("llama"), tmp_path, gateway=where) as after:
            assert failed.result(60) == 0
            assert after.stats.generated_tokens > 0
    found = open_table(tmp_path / "out.jsonl").to_pylist()
    assert [row["id"] for row in found] == list(range(ROWS))
    assert all(row["completion_tokens"] == 24 for row in found)


class Cutting(BaseHTTPRequestHandler):
    """Does the work each time, and cuts the first reply to every prompt."""

    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        body = json.dumps({"id": "a", "created": 0, "root": "x"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        self.asked[prompt] += 1
        choice = {"text": f"of {prompt}", "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        body = json.dumps({"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:20] if self.asked[prompt] == 1 else body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_lost_reply_leaves_one_row(tmp_path: Path) -> None:
    write_table(pa.table({"prompt": [f"row {i}" for i in range(8)]}), tmp_path / "in.jsonl")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cutting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with Client(f"http://127.0.0.1:{server.server_address[1]}") as client:
            report = client.generate_file(
                tmp_path / "in.jsonl", tmp_path / "out.jsonl", adapter="a", progress=False
            )
    finally:
        server.shutdown()
        server.server_close()
    assert (report.rows, report.failed) == (8, 0)
    assert set(Cutting.asked.values()) == {2}
    found = open_table(tmp_path / "out.jsonl").to_pylist()
    assert [row["completion"] for row in found] == [f"of row {i}" for i in range(8)]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def asked(service: Running, **options: object) -> Iterator[None]:
    """A client that asks for 32 answers of 120 tokens, and leaves at the end of the scope."""
    body = {"prompt": "x", "max_tokens": 120, "n": 32, "ignore_eos": True} | options
    raw = json.dumps(body).encode()
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw))  # fmt: skip
        yield


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_its_first_token(service: Running, stream: bool) -> None:
    """What it asked for ends, and its pages are free."""
    before = service.stats
    with asked(service, model="lora", stream=stream):
        until(lambda: service.stats.running)
    until(lambda: not service.stats.running and not service.stats.waiting)
    assert service.stats.generated_tokens - before.generated_tokens < 32 * 120
    assert service.stats.free_pages >= before.free_pages - 2


def test_a_client_that_leaves_is_forgotten_within_a_step(service: Running) -> None:
    """And a tenth of a second, at the best of some tries: this machine does other things too."""

    def left() -> float:
        """Seconds by which it took longer than a step."""
        with asked(service, model="lora", stream=True):
            until(lambda: service.stats.running == 32)
            steps, began = service.stats.steps, time.monotonic()
            until(lambda: service.stats.steps >= steps + 5)
            step_s = (time.monotonic() - began) / (service.stats.steps - steps)
            assert service.stats.running == 32
        began = time.monotonic()
        until(lambda: not service.stats.running)
        return time.monotonic() - began - step_s

    free = service.stats.free_pages
    assert min(left() for _ in range(5)) < 0.1
    assert service.stats.free_pages >= free - 2


def test_a_stream_that_nobody_waits_for_leaves_the_queue(bases: Bases, tmp_path: Path) -> None:
    """Long before its first token would have been there, with one request running at a time."""
    with running(bases("llama"), tmp_path, max_running_requests=1) as service:
        with asked(service, model=BASE_NAME, stream=True):
            until(lambda: service.stats.running)
            with asked(service, model=BASE_NAME, stream=True):
                until(lambda: service.stats.waiting > 32)
            until(lambda: service.stats.waiting < 32)
            assert service.stats.generated_tokens < 32 * 120, "they left the queue to run"
        until(lambda: not service.stats.running and not service.stats.waiting)


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_port_in_use_is_named_before_anything_starts(host: str) -> None:
    family = socket.getaddrinfo(host, 0)[0][0]
    with socket.socket(family) as taken:
        taken.bind((host, 0))
        taken.listen()
        port = taken.getsockname()[1]
        where = {"host": host, "port": port}
        document = {"name": "x", "engine": {"base_model": "x"}, "gateway": where}
        nowhere = Session(address="nowhere", dashboard_url="", started_here=True)
        serving = app.running(parse_spec(ServingSpec, document), nowhere)
        with pytest.raises(ConflictError, match=f"gateway.port {port} on {host}"), serving:
            pass


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_free_port_is_reached_at_its_url(host: str) -> None:
    document = {"name": "x", "engine": {"base_model": "x"}, "gateway": {"host": host, "port": 0}}
    port = app._port(parse_spec(ServingSpec, document))
    with socket.create_server((host, port), family=socket.getaddrinfo(host, 0)[0][0]):
        parts = urlsplit(app._url(host, port))
        assert parts.port == port
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
