"""The HTTP side on a real socket over a real replica: answers, streams, and every bad input."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from service import BASE_NAME, CATALOGUE_TTL_S, Running, publish, running

Bases = Callable[[str], Path]
VARIANTS = ("lora", "bitfit", "prompt_tuning", "prefix_tuning")
NAMES = [variant.replace("_", "-") for variant in VARIANTS]
ASK = {"prompt": "hello", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def service(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    with running(bases("llama"), folder) as service:
        publish(service.registry, bases("llama"), folder, *VARIANTS)
        service.registry.set_alias("lora", "stable", 1)
        yield service


@pytest.fixture
def http(service: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        yield client


def events(response: httpx2.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    detail = response.json()["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    assert detail["message"]
    return detail


def test_models_are_the_base_and_the_adapters(http: httpx2.Client) -> None:
    cards = http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == [BASE_NAME, *sorted(NAMES)]
    assert cards[1]["parent"] == BASE_NAME
    assert (cards[1]["root"], cards[1]["method"]) == ("bitfit@1", "bitfit")
    assert http.get("/v1/models/lora:stable").json()["root"] == "lora@1"
    error(http.get("/v1/models/nobody"), 404)
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/health/", follow_redirects=True).status_code == 200


@pytest.mark.parametrize("model", [BASE_NAME, *NAMES, "lora@1", "lora:stable", "lora:latest"])
def test_a_completion_is_the_engines(service: Running, http: httpx2.Client, model: str) -> None:
    body = http.post("/v1/completions", json={"model": model, **ASK, "ignore_eos": True}).json()
    (choice,) = body["choices"]
    assert (body["object"], body["model"]) == ("text_completion", model)
    assert choice["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    streamed = http.post(
        "/v1/completions", json={"model": model, **ASK, "ignore_eos": True, "stream": True}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    pieces = [event["choices"][0] for event in events(streamed)]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    assert [piece["finish_reason"] for piece in pieces][-1] == "length"
    assert all(piece["finish_reason"] is None for piece in pieces[:-1])


def test_adapters_answer_differently(http: httpx2.Client) -> None:
    texts = {
        http.post("/v1/completions", json={"model": m, **ASK}).text.split('"text":')[1]
        for m in (BASE_NAME, *NAMES)
    }
    assert len(texts) == 5


def test_several_prompts_and_choices(http: httpx2.Client) -> None:
    ask = {"model": "lora", "max_tokens": 4, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    body = http.post("/v1/completions", json={**ask, "prompt": ["a", "b"], "n": 2}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == 16
    again = http.post("/v1/completions", json={**ask, "prompt": [[98]], "n": 2}).json()
    ids = http.post("/v1/completions", json={**ask, "prompt": "b", "n": 2}).json()
    assert [c["text"] for c in ids["choices"]] == [c["text"] for c in body["choices"]][2:]
    assert len({choice["text"] for choice in body["choices"]}) == 4
    assert len(again["choices"]) == 2
    streamed = http.post(
        "/v1/completions", json={**ask, "prompt": ["a", "b"], "n": 2, "stream": True}
    )
    texts = ["", "", "", ""]
    for event in events(streamed):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in body["choices"]]


def test_chat_renders_the_template(service: Running, http: httpx2.Client) -> None:
    messages = [
        {"role": "system", "content": "short"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    ask = {"model": "bitfit", "messages": messages, "max_tokens": 5, "temperature": 0,
           "ignore_eos": True}  # fmt: skip
    body = http.post("/v1/chat/completions", json=ask).json()
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    prompt = "<|system|>short<|user|>hi<|assistant|>"
    same = http.post(
        "/v1/completions",
        json={"model": "bitfit", "prompt": prompt, "max_tokens": 5, "temperature": 0,
              "ignore_eos": True},
    ).json()  # fmt: skip
    assert choice["message"]["content"] == same["choices"][0]["text"]
    streamed = http.post(
        "/v1/chat/completions",
        json={**ask, "stream": True, "stream_options": {"include_usage": True}},
    )
    *chunks, last = events(streamed)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    content = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert content == choice["message"]["content"]
    assert last["choices"] == []
    assert last["usage"] == body["usage"]


def test_defaults_are_those_of_openai(http: httpx2.Client) -> None:
    body = http.post("/v1/completions", json={"model": "lora", "prompt": "x", "ignore_eos": True})
    assert body.json()["usage"]["completion_tokens"] == 16


BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "empty"),
    (b'"text"', 400, "string"),
    (b"[1]", 400, "list"),
    (b"3", 400, "number"),
    (b"null", 400, "null"),
    (b"{", 400, "not JSON"),
    (b'{"model": "\xff"}', 400, "not UTF-8"),
    (b'{"model": "lora", "temperature": NaN}', 400, "NaN"),
    (b'{"model": "lora", "temperature": Infinity}', 400, "Infinity"),
    (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400, "nested"),
    (b"[" * 10_000, 400, "nested"),
    (b'{"prompt": "' + b"x" * 2**20 + b'"}', 413, "over 1,048,576 bytes"),
]


@pytest.mark.parametrize(("body", "status", "reason"), BODIES, ids=[b[2] for b in BODIES])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bodies_that_are_none(
    http: httpx2.Client, path: str, body: bytes, status: int, reason: str
) -> None:
    detail = error(http.post(path, content=body), status)
    assert reason in detail["message"]


PARAMETERS: list[tuple[dict[str, Any], str | None]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 129}, "n"),
    ({"n": 10**9}, "n"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": 0}, "top_k"),
    ({"adapter_rank": 0}, "adapter_rank"),
    ({"adapter_rank": 2}, "adapter_rank"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**70}, "seed"),
    ({"stop": [1]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, None),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [-1]}, "prompt_token_ids"),
    ({"prompt": [10**6]}, "prompt_token_ids"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": "x" * 200}, "prompt"),
    ({"logit_bias": {"5": 1000}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"999": 1}}, "logit_bias"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": "1"}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_p": 2}, "min_p"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
        "response_format",
    ),
    ({"structured_outputs": {"regex": "("}}, "response_format"),
    ({"structured_outputs": {"choice": []}}, "response_format"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"stop_token_ids": [999]}, "stop_token_ids"),
    ({"logprobs": 3}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"best_of": 3}, "best_of"),
    ({"max_token": 5}, "max_token"),
    ({"model": 5}, "model"),
    ({"model": ""}, "model"),
]


@pytest.mark.parametrize(("change", "param"), PARAMETERS, ids=lambda v: str(v)[:30])
def test_impossible_parameters_name_the_field(
    http: httpx2.Client, change: dict[str, Any], param: str | None
) -> None:
    began = time.monotonic()
    detail = error(http.post("/v1/completions", json={"model": "lora", **ASK, **change}), 400)
    assert time.monotonic() - began < 1
    assert detail["param"] == param
    assert detail["type"] == "invalid_request_error"


def test_an_unknown_parameter_gets_the_nearest(http: httpx2.Client) -> None:
    detail = error(
        http.post("/v1/completions", json={"model": "lora", **ASK, "temprature": 1}), 400
    )
    assert "did you mean 'temperature'" in detail["message"]


def test_a_prompt_over_the_context(http: httpx2.Client) -> None:
    detail = error(http.post("/v1/completions", json={"model": "lora", "prompt": "x" * 200}), 400)
    assert detail["code"] == "context_length_exceeded"
    assert "200 tokens" in detail["message"]
    streamed = {"model": "lora", "prompt": "x" * 200, "stream": True}
    error(http.post("/v1/completions", json=streamed), 400)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "wizard", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        ["text"],
        "text",
        None,
    ],
    ids=str,
)
def test_messages_that_are_none(http: httpx2.Client, messages: Any) -> None:
    error(http.post("/v1/chat/completions", json={"model": "lora", "messages": messages}), 400)


MODELS = ["nobody", "../x", "%2e%2e", "a\x00b", "x" * 10_000, "l\u043era", "lora@99", "lora:gone",
          "lora@", "lora@1:stable", "LORA", " lora"]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda model: ascii(model)[:20])
def test_unknown_models(http: httpx2.Client, model: str) -> None:
    detail = error(http.post("/v1/completions", json={"model": model, **ASK}), 404)
    assert (detail["code"], detail["param"]) == ("model_not_found", "model")
    assert len(detail["message"]) < 400


def test_a_thousand_unknown_models_cost_nothing(service: Running, http: httpx2.Client) -> None:
    began = time.monotonic()
    for number in range(300):
        error(http.post("/v1/completions", json={"model": f"nobody-{number}", **ASK}), 404)
    assert time.monotonic() - began < 30
    assert service.replica.adapters == [r for r in service.replica.adapters if "nobody" not in r]


def test_paths_and_methods_that_do_not_exist(http: httpx2.Client) -> None:
    error(http.get("/v2/nothing"), 404)
    response = http.get("/v1/completions")
    error(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_new_version_and_a_moved_alias_are_seen(
    service: Running, http: httpx2.Client, bases: Bases, tmp_path: Path
) -> None:
    from adapters import make_adapter

    ask = {**ASK, "ignore_eos": True, "max_tokens": 12}

    def text(model: str) -> str:
        body = http.post("/v1/completions", json={"model": model, **ask}).json()
        return body["choices"][0]["text"]

    first = make_adapter("lora", bases("llama"), tmp_path / "1", seed=1)
    second = make_adapter("lora", bases("llama"), tmp_path / "2", seed=2)
    error(http.post("/v1/completions", json={"model": "moving", **ASK}), 404)
    service.registry.publish("moving", first)
    service.registry.set_alias("moving", "live", 1)
    time.sleep(2 * CATALOGUE_TTL_S)
    old = text("moving")
    assert text("moving:live") == old
    service.registry.publish("moving", second)
    time.sleep(2 * CATALOGUE_TTL_S)
    new = text("moving")
    assert new != old
    assert (text("moving@1"), text("moving:live")) == (old, old)
    service.registry.set_alias("moving", "live", 2)
    time.sleep(2 * CATALOGUE_TTL_S)
    assert text("moving:live") == new


def test_adapters_of_another_base(
    service: Running, http: httpx2.Client, bases: Bases, tmp_path: Path
) -> None:
    """Told by the card where the adapter was trained with Graft, by the shapes elsewhere."""
    from adapters import make_adapter

    other = make_adapter("lora", bases("qwen3"), tmp_path / "lora")
    service.registry.publish("trained-elsewhere", other, card={"base_config_sha256": "0" * 64})
    service.registry.import_folder("imported", other)
    time.sleep(2 * CATALOGUE_TTL_S)
    detail = error(http.post("/v1/completions", json={"model": "trained-elsewhere", **ASK}), 400)
    assert "trained on another base" in detail["message"]
    detail = error(http.post("/v1/completions", json={"model": "imported", **ASK}), 400)
    assert "made for another base" in detail["message"]
    listed = [card["id"] for card in http.get("/v1/models").json()["data"]]
    assert "trained-elsewhere" not in listed
    good = http.post("/v1/completions", json={"model": "lora", **ASK})
    assert good.status_code == 200


def test_a_client_that_leaves_frees_its_pages(service: Running, http: httpx2.Client) -> None:
    stats = service.stats
    assert stats.running == 0
    ask = {"model": "lora", "prompt": "x", "max_tokens": 120, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json={**ask, "n": 8}) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 5
    while service.stats.running or service.stats.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert service.stats.generated_tokens - stats.generated_tokens < 8 * 120
    assert service.stats.free_pages >= stats.free_pages - 2


def test_many_at_once_equal_one_by_one(service: Running) -> None:
    bodies = [
        {"model": model, "prompt": f"prompt {i}", "max_tokens": 10, "temperature": 1, "seed": i}
        for i in range(6)
        for model in (BASE_NAME, *NAMES)
    ]

    def ask(body: dict[str, Any]) -> str:
        response = httpx2.post(f"{service.url}/v1/completions", json=body, timeout=60)
        return response.json()["choices"][0]["text"]

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert list(pool.map(ask, bodies)) == alone


def test_more_adapters_than_the_engine_holds(bases: Bases, tmp_path: Path) -> None:
    with running(bases("llama"), tmp_path, max_adapters=2) as small:
        publish(small.registry, bases("llama"), tmp_path, *VARIANTS)

        def ask(model: str) -> int:
            body = {"model": model, "prompt": "x", "max_tokens": 10, "ignore_eos": True}
            return httpx2.post(f"{small.url}/v1/completions", json=body, timeout=60).status_code

        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(ask, NAMES * 6)) == {200}
        assert len(small.replica.adapters) == 2


def test_over_the_queue_limit_is_429(bases: Bases, tmp_path: Path) -> None:
    with running(bases("llama"), tmp_path, max_waiting=3) as small:
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
        assert error(httpx2.get(f"{doomed.url}/health"), 503)["code"] == "unavailable"
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
        error(httpx2.get(f"{doomed.url}/health"), 503)
