"""What is logged of requests: a line for each with its id, and never a prompt or a key."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from service import ASK, BASE_NAME, running

from serving.keys import KeyStore

SECRET = "what nobody else may read"


def test_logs_tell_of_each_request_by_its_id_and_nothing_of_what_it_says(
    bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Answered, streamed, refused in several ways, and failed in two."""
    caplog.set_level(logging.INFO)
    structlog.reset_defaults()  # a local engine of this process may have made them quieter
    store = KeyStore(str(tmp_path / "keys"))
    _, key = store.create("someone")
    chat = [{"role": "user", "content": SECRET}]
    good = {"model": BASE_NAME, **ASK, "prompt": SECRET, "max_tokens": 2}
    refused = [
        ({"temperature": SECRET}, 400),
        ({"stop": [SECRET] * 20}, 400),
        ({"prompt": SECRET * 20}, 400),
        ({"model": "nobody"}, 404),
    ]
    told: list[tuple[str, int, str]] = []

    def fail(*_: Any) -> Any:
        raise RuntimeError("a fault of ours")

    processors: Any = [
        structlog.contextvars.merge_contextvars, structlog.processors.format_exc_info
    ]  # fmt: skip
    with (
        structlog.testing.capture_logs(processors) as lines,
        running(bases("llama"), tmp_path, gateway={"keys": str(tmp_path / "keys")}) as service,
        httpx2.Client(base_url=service.url, timeout=60, trust_env=False) as http,
    ):

        def ask(path: str, status: int, body: dict[str, Any], said: str = key) -> None:
            headers = {"Authorization": f"Bearer {said}"}
            response = http.post(path, json=body, headers=headers)
            assert response.status_code == status, response.text
            told.append((path, status, response.headers["x-request-id"]))

        for body in (good, {**good, "stream": True}):
            ask("/v1/completions", 200, body)
        ask("/v1/chat/completions", 200, {"model": BASE_NAME, "messages": chat, "max_tokens": 2})
        ask("/v1/embeddings", 200, {"model": BASE_NAME, "input": SECRET})
        ask("/tokenize", 200, {"prompt": SECRET})
        for change, status in refused:
            ask("/v1/completions", status, {**good, **change})
        ask("/v1/completions", 401, good, said=f"{key}x")
        with monkeypatch.context() as patch:
            patch.setattr(service.replica._thread.engine.runner, "forward", fail)
            ask("/v1/completions", 500, good)
        with monkeypatch.context() as patch:
            patch.setattr(service.service, "_requests", fail)
            ask("/v1/completions", 500, good)
    requests = [line for line in lines if line["event"] == "request"]
    found = [(line["path"], line["status"], line["request_id"]) for line in requests]
    assert sorted(found) == sorted(told)
    assert len({request_id for _, _, request_id in told}) == len(told)
    (failure,) = [line for line in lines if line["event"] == "request failed"]
    assert failure["request_id"] == told[-1][2]
    assert "a fault of ours" in failure["exception"]
    # The client's own logs, in this process too, are not the service's.
    others = [record for record in caplog.records if not record.name.startswith("http")]
    written = f"{lines} {[record.getMessage() for record in others]}"
    assert SECRET not in written
    for secret in (key, key.split("-", 2)[2]):
        assert secret not in written
