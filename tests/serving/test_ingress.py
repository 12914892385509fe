"""Short bodies ahead of their requests' messages, on a real socket; every other one as ever."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from ray.serve._private.http_util import RequestIdMiddleware

from serving.ingress import BODY, MAX_BYTES, BodyAhead, OneRequestId, middleware

GONE = threading.Event()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it finds of a body, and where; stays for a client that leaves."""
    ahead, parts = scope.get(BODY), list[bytes]()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        parts.append(message["body"])
        if not message["more_body"]:
            break
    if scope["path"] == "/wait":
        assert (await receive())["type"] == "http.disconnect"
        GONE.set()
        return
    found = [None if ahead is None else len(ahead), len(b"".join(parts))]
    is_taken = (b"x-request-id", b"taken") in scope["headers"]
    headers = [(b"X-Request-ID", b"another")] if is_taken else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(found).encode()})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    assert [wrapped.cls for wrapped in middleware()] == [BodyAhead, OneRequestId]
    config = uvicorn.Config(
        OneRequestId(RequestIdMiddleware(BodyAhead(app))),
        host="127.0.0.1",
        port=0,
        log_level="error",
        lifespan="off",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def ask(port: int, head: str, *parts: bytes, pause_s: float = 0.0) -> Any:
    """The answer to a request that comes in pieces."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.sendall(f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n\r\n".encode())
        for part in parts:
            time.sleep(pause_s)
            line.sendall(part)
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    return json.loads(answer[answer.index(b"[") : answer.index(b"]") + 1])


def ids(port: int, *sent: bytes) -> list[bytes]:
    """The ids of the answer to a request with these."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        lines = b"".join(b"X-Request-Id: %b\r\n" % one for one in sent)
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + lines + b"\r\n")
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    head = answer.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    named = (one.partition(b": ") for one in head)
    return [value for name, _, value in named if name.lower() == b"x-request-id"]


def test_an_answer_has_one_request_id(port: int) -> None:
    """Its own if it has one, and never one that is none."""
    assert ids(port, b"mine-1") == [b"mine-1"]
    for bad in (b"x" * 2000, b"a b", b"\xff\xfe"):
        (own,) = ids(port, bad)
        assert 0 < len(own) <= 128
        assert own != bad
    assert len(ids(port)) == 1
    assert ids(port, b"taken") == [b"another"]


def test_a_short_body_is_ahead_and_still_there(port: int) -> None:
    for size in (1, 900, 5000):
        found = [ask(port, f"Content-Length: {size}", b"x" * size) for _ in range(10)]
        assert [size, size] in found, "none came within its time"
        assert all(read == size and ahead in (None, size) for ahead, read in found)
    assert ask(port, f"Content-Length: {MAX_BYTES}", b"x" * MAX_BYTES)[1] == MAX_BYTES


def test_other_bodies_are_where_they_were(port: int) -> None:
    assert ask(port, "Content-Length: 5", b"he", b"llo", pause_s=0.7) == [None, 5]
    assert ask(port, "Content-Length: 5", b"hello", pause_s=0.7) == [None, 5]
    assert ask(port, "Content-Length: 70000", b"x" * 70_000) == [None, 70_000]
    assert ask(port, "Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n") == [None, 5]
    assert ask(port, "Content-Length: 0") == [None, 0]


def test_a_client_that_leaves_is_noticed(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(b"POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
        time.sleep(0.1)
        assert not GONE.is_set()
    assert GONE.wait(5)
