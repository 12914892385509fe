"""The client against servers that fail in every way, and what it sends them."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from cluster.errors import (
    DataError,
    DeadlineError,
    GraftError,
    OperationError,
    RequestError,
    SpecError,
    UnavailableError,
)
from cluster.tables import open_table, write_table
from serving.client import Client


class Faulty(BaseHTTPRequestHandler):
    """Answers each request by the next of the class's `answers`; of models it knows every name."""

    answers: ClassVar[list[Callable[["Faulty"], None]]] = []
    seen = 0

    def do_GET(self) -> None:
        card = {"id": self.path.rpartition("/")[2], "created": 0, "root": "x"}
        self.send(200, json.dumps(card).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        answers = type(self).answers
        type(self).seen += 1
        answers[min(type(self).seen, len(answers)) - 1](self)

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


GOOD = json.dumps(
    {"choices": [{"text": "ok", "finish_reason": "stop"}],
     "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
).encode()  # fmt: skip


@pytest.fixture
def faulty() -> Iterator[tuple[str, type[Faulty]]]:
    handler = type("Handler", (Faulty,), {"answers": [], "seen": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def test_what_is_sent_and_where(
    faulty: tuple[str, type[Faulty]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key as a bearer token; to the service itself, whatever proxy the environment names."""
    url, handler = faulty
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    seen: list[tuple[str, str | None]] = []

    def answer(handler: Faulty) -> None:
        seen.append((handler.path, handler.headers["Authorization"]))
        handler.send(200, GOOD)

    handler.answers = [answer]
    for key in (None, "secret"):
        with Client(f"{url}/", api_key=key, max_attempts=1) as client:
            client.generate_one("x", adapter="a")
    assert seen == [("/v1/completions", None), ("/v1/completions", "Bearer secret")]


def test_an_answer_that_does_not_come_is_given_up(faulty: tuple[str, type[Faulty]]) -> None:
    """Nor does the rest of a stream. It is not asked for again, which would take as long."""
    url, handler = faulty
    goes_on = threading.Event()

    def stall(handler: Faulty) -> None:
        handler.send(200, b'data: {"choices": [{"text": "half"}]}\n\n', 1000)
        goes_on.wait(30)

    handler.answers = [lambda _: goes_on.wait(30), stall]
    with Client(f"{url}/", timeout_s=0.2) as client:
        told = re.escape(f"{url}: ") + r"nothing came for 0\.2 s \(the client's timeout_s\)"
        with pytest.raises(DeadlineError, match=told):
            client.generate_one("x", adapter="a")
        assert handler.seen == 1
        stream = client.stream("x", adapter="a")
        assert next(stream) == "half"
        with pytest.raises(DeadlineError, match=told):
            next(stream)
    goes_on.set()


@pytest.mark.parametrize(
    "fault",
    [
        lambda h: h.send(503, b'{"error": {"message": "m", "type": "t", "code": "unavailable"}}'),
        lambda h: h.send(429, b'{"error": {"message": "m", "type": "t", "code": "overloaded"}}'),
        lambda h: h.send(502, b"<html>bad gateway</html>"),
        lambda h: h.send(200, GOOD[:20], len(GOOD)),  # the reply is cut
        lambda h: h.send(200, GOOD[:20]),  # cut, and it does not show in the length
        lambda h: h.connection.close(),
    ],
)
def test_what_may_mend_is_tried_again(
    faulty: tuple[str, type[Faulty]], fault: Callable[[Faulty], None]
) -> None:
    url, handler = faulty
    handler.answers = [fault, fault, lambda h: h.send(200, GOOD)]
    with Client(url) as client:
        assert client.generate(["x"], adapter="a")[0].text == "ok"
    assert handler.seen == 3


def refuse(handler: Faulty, status: int, code: str, retry_after: str = "0") -> None:
    body = json.dumps({"error": {"message": "later", "type": "t", "code": code}}).encode()
    handler.send_response(status)
    handler.send_header("Retry-After", retry_after)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.mark.parametrize(("status", "code"), [(429, "rate_limit_exceeded"), (503, "unavailable")])
def test_the_pause_that_the_server_asks_for_is_kept(
    faulty: tuple[str, type[Faulty]], status: int, code: str
) -> None:
    """And by all requests of a client, of which no two come back at its very end."""
    url, handler = faulty
    came_s: list[float] = []

    def busy(handler: Faulty) -> None:
        came_s.append(time.monotonic())
        refuse(handler, status, code, "1") if len(came_s) <= 2 else handler.send(200, GOOD)

    handler.answers = [busy]
    with Client(url) as client:
        assert len(client.generate(["x"] * 2, adapter="a")) == 2
    pauses_s = [later - came_s[1] for later in came_s[2:]]
    assert len(pauses_s) == 2
    assert all(pause_s > 1 for pause_s in pauses_s)


@pytest.mark.parametrize(("status", "kind"), [(400, RequestError), (504, DeadlineError)])
def test_what_cannot_mend_is_not(
    faulty: tuple[str, type[Faulty]], status: int, kind: type[GraftError]
) -> None:
    url, handler = faulty
    handler.answers = [lambda h: h.send(status, b"no JSON at all")]
    with Client(url) as client, pytest.raises(kind, match=f"HTTP {status}: no JSON"):
        client.generate(["x"], adapter="a")
    assert handler.seen == 1


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b'{"choices": []}', b'{"data": 5}'])
def test_an_answer_of_another_kind_fails_its_row_alone(
    faulty: tuple[str, type[Faulty]], tmp_path: Path, body: bytes
) -> None:
    url, handler = faulty
    handler.answers = [lambda h: h.send(200, body), lambda h: h.send(200, GOOD)]
    write_table(pa.table({"prompt": ["x"] * 2}), tmp_path / "in.jsonl")
    with Client(url, concurrency=1) as client:
        report = client.generate_file(
            tmp_path / "in.jsonl", tmp_path / "out.jsonl", adapter="a", progress=False
        )
    assert (report.rows, report.failed) == (2, 1)
    assert "not one of OpenAI's form" in open_table(tmp_path / "out.jsonl")["error"][0].as_py()


def test_a_stream_that_just_ends_is_no_success(faulty: tuple[str, type[Faulty]]) -> None:
    url, handler = faulty
    event = b'data: {"choices": [{"text": "half"}]}\n\n'
    handler.answers = [lambda h: h.send(200, event)]
    with Client(url) as client, pytest.raises(OperationError, match="ended before the answer did"):
        list(client.stream("x", adapter="a"))
    handler.answers = [lambda h: h.send(200, event + b"data: [DONE]\n\n")]
    with Client(url) as client, pytest.raises(OperationError, match="ended before the answer did"):
        list(client.stream("x", adapter="a"))
    finished = b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n'
    for broken in (b'data: {"choices": [{"te', b'data: {"id": 1}\n\n', b"data: 5\n\n"):
        handler.answers = [lambda h, broken=broken: h.send(200, event + broken)]
        with Client(url) as client, pytest.raises(OperationError, match="ended before the answer"):
            list(client.stream("x", adapter="a"))
    handler.answers = [lambda h: h.send(200, event + finished)]
    with Client(url) as client, pytest.raises(OperationError, match="ended before the answer did"):
        list(client.stream("x", adapter="a"))
    failure = (
        b'data: {"error": {"message": "engine gone", "type": "t", "code": "engine_error"}}\n\n'
    )
    handler.answers = [lambda h: h.send(200, event + failure)]
    with Client(url) as client, pytest.raises(OperationError, match="engine gone"):
        list(client.stream("x", adapter="a"))


def test_a_stream_is_tried_again_until_it_has_begun(faulty: tuple[str, type[Faulty]]) -> None:
    """At the pace of the client's other requests, and with nothing said twice."""
    url, handler = faulty
    busy = b'{"error": {"message": "m", "type": "t", "code": "unavailable"}}'
    half = b'data: {"choices": [{"text": "half"}]}\n\n'
    whole = half + b'data: {"choices": [{"finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    handler.answers = [lambda h: h.send(503, busy), lambda h: h.connection.close(),
                       lambda h: h.send(200, whole)]  # fmt: skip
    with Client(url, concurrency=4) as client:
        assert list(client.stream("x", adapter="a")) == ["half"]
        assert handler.seen == 3
        assert client._async._pace.limit == 1.0
        streams: list[Any] = [client.stream("x", adapter="a") for _ in range(4)]
        assert [next(stream) for stream in streams] == ["half"] * 4, "one waits for another"
        for stream in streams:
            stream.close()
        handler.answers = [lambda h: h.send(200, half, len(whole))]  # cut
        with pytest.raises(UnavailableError):
            list(client.stream("x", adapter="a"))
    assert handler.seen == 8


def test_a_file_goes_at_the_pace_that_the_service_takes(
    faulty: tuple[str, type[Faulty]], tmp_path: Path
) -> None:
    """A service that refuses a fourth request at once: nothing fails, and few are refused."""
    url, handler = faulty
    lock, at_once, refused = threading.Lock(), 0, 0

    def answer(handler: Faulty) -> None:
        nonlocal at_once, refused
        with lock:
            at_once += 1
            is_over = at_once > 3
            refused += is_over
        time.sleep(0.005)
        with lock:
            at_once -= 1
        body = b'{"error": {"message": "m", "type": "t", "code": "unavailable"}}'
        handler.send(*((503, body) if is_over else (200, GOOD)))

    handler.answers.append(answer)
    write_table(pa.table({"prompt": ["x"] * 60}), tmp_path / "in.jsonl")
    with Client(url, concurrency=64) as client:
        report = client.generate_file(
            tmp_path / "in.jsonl", tmp_path / "out.jsonl", adapter="a", progress=False
        )
    assert (report.rows, report.failed) == (60, 0)
    assert 0 < refused < 50


def test_an_input_that_changes_meanwhile_is_told(
    faulty: tuple[str, type[Faulty]], tmp_path: Path
) -> None:
    url, handler = faulty
    source = tmp_path / "in.jsonl"
    write_table(pa.table({"prompt": ["x"] * 3}), source)

    def change(handler: Faulty) -> None:
        source.write_text('{"prompt": "y"}\n' * 3)
        handler.send(200, GOOD)

    handler.answers = [change, lambda h: h.send(200, GOOD)]
    with Client(url) as client, pytest.raises(DataError, match="has changed since"):
        client.generate_file(source, tmp_path / "out.jsonl", adapter="a", progress=False)
    assert not (tmp_path / "out.jsonl").exists()


_PEAK = """
import sys
from pathlib import Path
from serving.client import Client

url, source, target = sys.argv[1:]
with Client(url, concurrency=4) as client:
    report = client.generate_file(source, target, adapter="a", progress=False)
status = Path("/proc/self/status").read_text()
(peak,) = [line.split()[1] for line in status.splitlines() if "VmHWM" in line]
print(report.rows, report.failed, peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_memory_does_not_grow_with_the_file(
    faulty: tuple[str, type[Faulty]], tmp_path: Path, kind: str
) -> None:
    """Rows and answers of 20 kB: five times as many are 32 MB more of either."""
    url, handler = faulty
    long = json.loads(GOOD) | {"choices": [{"text": "ok" * 10_000, "finish_reason": "stop"}]}
    body = json.dumps(long).encode()
    handler.answers = [lambda h: h.send(200, body)]
    peaks: list[int] = []
    for count in (400, 2000):
        source, target = tmp_path / f"{count}.{kind}", tmp_path / f"{count}-out.{kind}"
        write_table(pa.table({"prompt": [f"{i:05}" * 4000 for i in range(count)]}), source)
        command = [sys.executable, "-c", _PEAK, url, str(source), str(target)]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        rows, failed, peak = map(int, told.stdout.split())
        assert (rows, failed) == (count, 0)
        peaks.append(peak)
    found = open_table(target)
    assert [text.as_py()[:5] for text in found["prompt"]] == [f"{i:05}" for i in range(2000)]
    assert peaks[1] - peaks[0] < 65_000, peaks  # kB; of all at once, 130 000


def test_a_key_is_never_told() -> None:
    for key in ("secret\x00key", "sécret"):
        with pytest.raises(SpecError, match="api_key: has characters that no key has") as told:
            Client("http://127.0.0.1:9", api_key=key)
        assert "cret" not in str(told.value)


def test_a_key_from_a_file_has_a_line_end() -> None:
    with (
        Client("http://127.0.0.1:9", api_key="secret\n", max_attempts=1) as client,
        pytest.raises(UnavailableError),
    ):
        client.models()


def test_only_line_feeds_end_a_streams_line(faulty: tuple[str, type[Faulty]]) -> None:
    url, handler = faulty
    text = "one\u2028two\u2029three\x85four\x0b\x0c\x1c"

    def stream(answer: Faulty) -> None:
        event = {"choices": [{"text": text, "finish_reason": "stop"}]}
        data = json.dumps(event, ensure_ascii=False)
        answer.send(200, f"data: {data}\r\n\r\ndata: [DONE]\n\n".encode())

    handler.answers = [stream]
    with Client(url) as client:
        assert "".join(client.stream("x", adapter="a")) == text
