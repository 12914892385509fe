"""What `vllm bench serve` sends, as vLLM 0.32 sent it to this service, and what its readers need.

vllm_bench.json has the bodies, of --backend openai (with --logprobs, and with --lora-modules),
openai-chat and openai-embeddings over its random dataset. The reading is that of
vllm/benchmarks/lib/endpoint_request_func.py: events apart by an empty line; those with choices are
tokens, the first of which is the time to first token; the last one has no choices, and the usage
that every figure is counted by.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from service import BASE_NAME, publish, running

SENT: list[dict[str, Any]] = json.loads(Path(__file__).with_name("vllm_bench.json").read_text())


@pytest.fixture(scope="module")
def http(
    bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx2.Client]:
    folder = tmp_path_factory.mktemp("served")
    with running(bases("llama"), folder) as service:
        publish(service.registry, bases("llama"), folder, "lora", "prefix_tuning")
        with httpx2.Client(base_url=service.url, timeout=60, trust_env=False) as client:
            yield client


def chunks_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """Its events as its parser has them, without the closing one."""
    *messages, end = response.text.split("\n\n")
    assert not end.strip()
    assert messages.pop() == "data: [DONE]"
    assert all(message.startswith("data: ") for message in messages)
    return [json.loads(message.removeprefix("data: ")) for message in messages]


@pytest.mark.parametrize("sent", SENT, ids=lambda sent: f"{sent['path']} {sent['body']['model']}")
def test_each_request_is_answered_as_it_is_read(http: httpx2.Client, sent: dict[str, Any]) -> None:
    body = sent["body"]
    response = http.post(sent["path"], json=body, headers={"x-request-id": "bench-1"})
    assert response.status_code == 200, response.text
    if sent["path"] == "/tokenize":
        assert len(response.json()["tokens"]) > 0
    elif sent["path"] == "/v1/embeddings":
        assert response.json()["usage"]["prompt_tokens"] > 0
    else:
        *tokens, last = chunks_of(response)
        is_chat = "chat" in sent["path"]
        asked = body["max_completion_tokens" if is_chat else "max_tokens"]
        assert all(len(chunk["choices"]) == 1 for chunk in tokens)
        choices = [chunk["choices"][0] for chunk in tokens]
        texts = [
            choice["delta"].get("content") if is_chat else choice["text"] for choice in choices
        ]
        assert any(texts)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == asked
        assert last["usage"]["prompt_tokens"] > 0


def test_the_first_model_is_the_base(http: httpx2.Client) -> None:
    """Without --model it takes the first of the list, by `id` and `root`."""
    first = http.get("/v1/models").json()["data"][0]
    assert (first["id"], first["root"]) == (BASE_NAME, BASE_NAME)
