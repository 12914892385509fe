"""The HTTP side on a real socket over a real replica: answers and streams in OpenAI's forms."""

import asyncio
import base64
import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from adapters import make_adapter
from conftest import closing_tokenizer
from service import ASK, BASE_NAME, CATALOGUE_TTL_S, NAMES, Running, error, events, running
from starlette.routing import Route

from serving.engine import Engine, EngineSpec, GenerationRequest
from serving.gateway import routes
from serving.gateway.access import Door
from serving.gateway.answers import embedding_body
from serving.gateway.routes import create_app
from serving.spec import GatewaySpec

Bases = Callable[[str], Path]


def test_models_are_the_base_and_the_adapters(http: httpx2.Client) -> None:
    cards = http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == [BASE_NAME, *sorted(NAMES)]
    assert cards[1]["parent"] == BASE_NAME
    assert (cards[1]["root"], cards[1]["method"]) == ("bitfit@1", "bitfit")
    assert [(card["versions"], card["aliases"]) for card in cards] == [
        (None, None), ([1], {}), ([1], {"stable": 1}), ([1], {}), ([1], {})
    ]  # fmt: skip
    named = http.get("/v1/models/lora:stable").json()
    assert named == {**cards[2], "id": "lora:stable"}
    assert named["root"] == "lora@1"
    error(http.get("/v1/models/nobody"), 404)
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/health/").status_code == 200
    assert http.get("/ready").json() == {"status": "ready"}


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


def test_a_mix_is_named_by_references_and_weights(service: Running, http: httpx2.Client) -> None:
    def answer(model: str) -> httpx2.Response:
        return http.post("/v1/completions", json={"model": model, **ASK, "ignore_eos": True})

    def text(model: str) -> str:
        return answer(model).json()["choices"][0]["text"]

    assert text("lora:1+bitfit:0") == text("lora")
    assert text("bitfit:0+lora:stable:1") == text("lora")  # the same mix, by an alias
    assert text("lora:0+bitfit:0.0") == text(BASE_NAME)
    # As exact references, one for all ways to write it; the last is made of members held already.
    held = [name for name in service.replica.adapters if "+" in name]
    assert held == ["bitfit@1:0.0+lora@1:1.0", "bitfit@1:0.0+lora@1:0.0"]
    card = http.get("/v1/models/lora:0.5+bitfit:1").json()
    assert (card["root"], card["method"]) == ("bitfit@1:1.0+lora@1:0.5", "mix")
    assert (card["versions"], card["aliases"]) == (None, None)
    assert all("+" not in card["id"] for card in http.get("/v1/models").json()["data"])
    assert 'adapter="(mix)"' in http.get("/metrics").text


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("lora:1+nobody:1", 404, "'nobody': neither the base nor an adapter"),
        ("lora:1+bitfit", 400, "'bitfit' does not end in a weight"),
        ("lora:1+lora@1:1", 400, "'lora@1' is lora@1 a second time"),
        (f"lora:1+{BASE_NAME}:1", 400, "is the base"),
        ("lora:1+prefix-tuning:1", 400, "'prefix-tuning@1' cannot be mixed"),
    ],
)
def test_an_impossible_mix_names_the_part(
    http: httpx2.Client, model: str, status: int, message: str
) -> None:
    detail = error(http.post("/v1/completions", json={"model": model, **ASK}), status)
    assert message in detail["message"]
    assert detail["code"] == ("model_not_found" if status == 404 else detail["code"])
    assert detail["param"] == "model" or status == 404


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


def test_a_refusal_is_read_as_what_was_said(http: httpx2.Client) -> None:
    said = [{"role": "user", "content": "hi"}]
    ways: list[dict[str, Any]] = [
        {"content": "no"}, {"content": None, "refusal": "no"},
        {"content": [{"type": "refusal", "refusal": "no"}]},
    ]  # fmt: skip
    found = [
        http.post("/tokenize", json={"messages": [*said, {"role": "assistant", **way}]}).json()
        for way in ways
    ]
    assert found[0]["count"] > 4
    assert found == [found[0]] * 3


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
    ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ({"guided_json": {"enum": [7, 8]}}, "7|8"),
    ({"guided_json": '{"enum": [7, 8]}'}, "7|8"),
    ({"structured_outputs": {"json": {"enum": [7, 8]}, "regex": None}}, "7|8"),
    ({"structured_outputs": {"json": '{"enum": [7, 8]}'}}, "7|8"),
    ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
]


@pytest.mark.parametrize(("asked", "expected"), FORMS, ids=str)
def test_every_name_of_a_form_is_followed(
    http: httpx2.Client, asked: dict[str, Any], expected: str
) -> None:
    said = [{"role": "user", "content": "hi"}]
    body = {"model": "lora", "max_tokens": 5, "temperature": 1.0, "seed": 1, **asked}
    answer = http.post("/v1/completions", json={**body, "prompt": "x"}).json()
    assert re.fullmatch(expected, answer["choices"][0]["text"])
    answer = http.post("/v1/chat/completions", json={**body, "messages": said}).json()
    assert re.fullmatch(expected, answer["choices"][0]["message"]["content"])


def test_defaults_are_those_of_openai(http: httpx2.Client) -> None:
    for change in ({}, {"max_tokens": None, "n": None, "stop": None, "seed": None}):
        ask = {"model": "lora", "prompt": "x", "ignore_eos": True, **change}
        body = http.post("/v1/completions", json=ask).json()
        assert body["usage"]["completion_tokens"] == 16


def test_a_new_version_and_a_moved_alias_are_seen(
    service: Running, http: httpx2.Client, bases: Bases, tmp_path: Path
) -> None:
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
    card = http.get("/v1/models/moving").json()
    assert (card["root"], card["versions"], card["aliases"]) == ("moving@2", [1, 2], {"live": 1})
    service.registry.set_alias("moving", "live", 2)
    time.sleep(2 * CATALOGUE_TTL_S)
    assert text("moving:live") == new
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert cards["moving"]["aliases"] == {"live": 2}


def test_adapters_of_another_base(
    service: Running, http: httpx2.Client, bases: Bases, tmp_path: Path
) -> None:
    """Told by the card where the adapter was trained with Graft, by the shapes elsewhere."""
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


def sampled(http: httpx2.Client, **options: Any) -> Any:
    body = {"model": "lora", "prompt": "hello", "max_tokens": 5, "ignore_eos": True, **options}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_log_probabilities_of_a_completion(http: httpx2.Client) -> None:
    (choice,) = sampled(http, temperature=0, logprobs=2)["choices"]
    found = choice["logprobs"]
    assert {len(column) for column in found.values()} == {5}
    for chosen, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        assert chosen == pytest.approx(max(top.values()))  # greedy takes the most probable one
        assert len(top) <= 2
    assert found["text_offset"][0] == 0
    streamed = http.post(
        "/v1/completions",
        json={"model": "lora", "prompt": "hello", "max_tokens": 5, "ignore_eos": True,
              "temperature": 0, "logprobs": 2, "stream": True},
    )  # fmt: skip
    parts = [event["choices"][0]["logprobs"] for event in events(streamed)]
    for key, column in found.items():
        assert [value for part in parts if part for value in part[key]] == column


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("prompt", ["hello", [71, 72]], ids=["text", "ids"])
def test_an_echoed_prompt_is_scored(http: httpx2.Client, max_tokens: int, prompt: Any) -> None:
    """What lm-eval asks: the log probability of every token of the prompt but the first."""
    (choice,) = sampled(http, prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens)[
        "choices"
    ]
    found = choice["logprobs"]
    count = len(prompt) + max_tokens
    assert [len(column) for column in found.values()] == [count] * 4
    text = prompt if isinstance(prompt, str) else "hi"
    assert choice["text"].startswith(text)
    assert found["tokens"][: len(prompt)] == list(text)
    assert found["token_logprobs"][0] is None
    assert all(value < 0 for value in found["token_logprobs"][1:])
    assert found["text_offset"][: len(prompt)] == list(range(len(prompt)))


def test_the_best_of_several(http: httpx2.Client) -> None:
    options: Any = {"temperature": 1.0, "seed": 3, "logprobs": 0}
    every = sampled(http, n=4, **options)["choices"]

    def mean(choice: Any) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    best = sampled(http, n=2, best_of=4, **options)
    expected = sorted(every, key=mean, reverse=True)[:2]
    assert [c["text"] for c in best["choices"]] == [c["text"] for c in expected]
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 20


def test_log_probabilities_of_a_chat(http: httpx2.Client) -> None:
    ask = {"model": "lora", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4,
           "ignore_eos": True, "temperature": 0, "logprobs": True, "top_logprobs": 3}  # fmt: skip
    (choice,) = http.post("/v1/chat/completions", json=ask).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 4
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"])
    whole = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert whole.decode(errors="replace") == choice["message"]["content"]
    streamed = http.post("/v1/chat/completions", json={**ask, "stream": True})
    parts = [event["choices"][0]["logprobs"] for event in events(streamed)]
    assert [entry for part in parts if part for entry in part["content"]] == entries


def test_usage_in_every_chunk(http: httpx2.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    ask = {"model": "lora", **ASK, "stream": True, "stream_options": options, "ignore_eos": True}
    counts = [
        e["usage"]["completion_tokens"] for e in events(http.post("/v1/completions", json=ask))
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_tokens_and_text(http: httpx2.Client) -> None:
    found = http.post("/tokenize", json={"prompt": "hé"}).json()
    assert found["count"] == len(found["tokens"]) == 3
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "hé"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["count"] == 4
    bare = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    assert http.post("/tokenize", json=bare).json()["tokens"] == chat["tokens"][:3]
    error(http.post("/detokenize", json={"tokens": [999]}), 400)
    error(http.post("/tokenize", json={}), 400)


def test_a_folder_that_is_dropped_into_the_store_is_served(bases: Bases, tmp_path: Path) -> None:
    """Two gateways look; a bad folder beside it is nobody's trouble."""
    bad, asked = tmp_path / "store/imports/broken", {"model": "dropped", **ASK}
    with ExitStack() as both:
        services = [
            both.enter_context(running(bases("llama"), tmp_path, gateway={"imports": True}))
            for _ in range(2)
        ]
        bad.mkdir(parents=True)
        (bad / "adapter_config.json").write_text("[]")
        (bad / "adapter_model.safetensors").write_text("")
        for service in services:
            error(httpx2.post(f"{service.url}/v1/completions", json=asked), 404)
        folder = make_adapter("lora", bases("llama"), tmp_path / "lora", seed=5)
        shutil.copytree(folder, bad.parent / "dropped")
        deadline = time.monotonic() + 5
        for service in services:
            while httpx2.post(f"{service.url}/v1/completions", json=asked).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            # Whichever gateway was faster: the other's number stays unused.
            card = httpx2.get(f"{service.url}/v1/models/dropped").json()
            assert card["root"] in ("dropped@1", "dropped@2")
            broken = {**asked, "model": "broken"}
            error(httpx2.post(f"{service.url}/v1/completions", json=broken), 404)
    assert len(services[0].registry.versions("dropped")) == 1


@pytest.mark.parametrize("model", [BASE_NAME, "lora", "prefix-tuning"])
def test_embeddings_are_the_engines(service: Running, http: httpx2.Client, model: str) -> None:
    def ask(**change: Any) -> Any:
        body = {"model": model, "input": ["hello", "hello, world"], "user": "x", **change}
        return http.post("/v1/embeddings", json=body).json()

    body = ask()
    assert (body["object"], body["model"]) == ("list", model)
    assert body["usage"] == {"prompt_tokens": 17, "total_tokens": 17}
    assert [(part["object"], part["index"]) for part in body["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    vectors = np.array([part["embedding"] for part in body["data"]])
    assert vectors.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    ids = http.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
    packed = ask(encoding_format="base64", input=[ids])["data"][0]["embedding"]
    found = np.frombuffer(base64.b64decode(packed), dtype="<f4")
    np.testing.assert_allclose(found, vectors[0], atol=1e-6)
    (short,) = ask(input="hello", dimensions=4)["data"]
    first = vectors[0, :4]
    np.testing.assert_allclose(short["embedding"], first / np.linalg.norm(first), atol=1e-6)
    plain = np.array(ask(model=BASE_NAME)["data"][0]["embedding"])
    assert (abs(plain - vectors[0]).max() > 0.01) == (model != BASE_NAME)


def test_an_embedding_is_of_the_closing_token_and_a_completion_is_not(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many models that embed have it in their template. The body is written off the loop."""
    base, loops = shutil.copytree(bases("llama"), tmp_path / "base"), list[bool]()
    closing_tokenizer(None).save_pretrained(base)

    def noting(*args: Any) -> bytes:
        try:
            loops.append(bool(asyncio.get_running_loop()))
        except RuntimeError:
            loops.append(False)
        return embedding_body(*args)

    monkeypatch.setattr(routes, "embedding_body", noting)
    with running(base, tmp_path) as service, httpx2.Client(base_url=service.url) as client:
        body = {"model": BASE_NAME, "input": "hello"}
        answer = client.post("/v1/embeddings", json=body).json()
        ids = client.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
        assert ids == service.service.tokenizer("hello")["input_ids"]
        assert answer["usage"]["prompt_tokens"] == len(ids) == 6
        bare = client.post("/tokenize", json={"prompt": "hello", "add_special_tokens": False})
        assert bare.json()["tokens"] == ids[:5]
        body["input"] = ids
        whole = client.post("/v1/embeddings", json=body).json()["data"]
        assert answer["data"] == whole
        used = client.post("/v1/completions", json={"model": BASE_NAME, **ASK}).json()["usage"]
        assert used["prompt_tokens"] == 5
    assert loops == [False, False]
    engine = Engine(EngineSpec(base_model=str(base)))
    asked = GenerationRequest(prompt="hello", max_tokens=0, pooling="last")
    (result,) = engine.generate([asked])
    assert result.embedding is not None
    np.testing.assert_allclose(result.embedding, whole[0]["embedding"], atol=1e-6)


NO_EMBEDDINGS: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": ["x", ""]}, "input"),
    ({"input": 5}, "input"),
    ({"input": [1, "x"]}, "input"),
    ({"input": [[999]]}, "input"),
    ({"input": [-1]}, "input"),
    ({"input": "x" * 200}, "input"),
    ({"input": ["x"] * 2049}, "input"),
    ({"input": ["x"] * 600}, "input"),
    ({"dimensions": 33}, "dimensions"),
    ({"dimensions": 0}, "dimensions"),
    ({"encoding_format": "hex"}, "encoding_format"),
    ({"adapter_rank": 2}, "adapter_rank"),
]


@pytest.mark.parametrize(("change", "param"), NO_EMBEDDINGS, ids=lambda v: str(v)[:30])
def test_impossible_embeddings_name_the_field(
    http: httpx2.Client, change: dict[str, Any], param: str
) -> None:
    body = {"model": BASE_NAME, "input": "x", **change}
    assert error(http.post("/v1/embeddings", json=body), 400)["param"] == param


def test_every_route_is_described(http: httpx2.Client, service: Running) -> None:
    document = http.get("/openapi.json").json()
    app = create_app(service.service, GatewaySpec.model_validate({}), Door(None, ttl_s=1))
    there = {route.path.replace(":path", "") for route in app.routes if isinstance(route, Route)}
    assert set(document["paths"]) == there - {"/openapi.json"}
    for operations in document["paths"].values():
        assert all(operation["responses"]["default"] for operation in operations.values())
    known = set(document["components"]["schemas"])
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document))) <= known
    asked = document["components"]["schemas"]["CompletionRequest"]
    assert {"model", "prompt", "max_tokens", "stream"} <= set(asked["properties"])
    told = " ".join(document["components"]["schemas"]["ChatMessage"]["description"].split())
    assert "`content` may be left out by an assistant that calls, or refused" in told
