"""Answers that follow a grammar: always, with everything else that a request can ask for."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.errors import RequestError
from serving.engine import (
    Engine,
    EngineSpec,
    FinishReason,
    GenerationRequest,
    ResponseFormat,
    choices,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["size", "count", "tags"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "not at all", "é😀"]


@pytest.fixture(scope="module")
def engine(bases: Callable[[str], Path]) -> Engine:
    return Engine(EngineSpec(base_model=str(bases("llama"))))


@pytest.fixture(scope="module")
def no_space(engine: Engine) -> dict[int, float]:
    """A base of random weights would else put white space for ever."""
    return {engine.tokenizer(c)["input_ids"][0]: -100.0 for c in " \t\r\n"}


def request(kind: Any, rule: Any = None, **options: Any) -> GenerationRequest:
    return GenerationRequest(
        **{"prompt": "x", "max_tokens": 90, "temperature": 1.0, "seed": 3, **options},
        response_format=ResponseFormat(kind, rule),
    )


def test_answers_follow_and_end_where_they_are_complete(
    engine: Engine, no_space: dict[int, float]
) -> None:
    asked = [
        *choices(request("json_schema", SCHEMA, logit_bias=no_space), 12),
        *choices(request("regex", r"[a-f]{3}-\d+x"), 4),
        *choices(request("choice", CHOICES, ignore_eos=True), 12),
        request("json_object", logit_bias=no_space, temperature=0.0),
    ]
    results = engine.generate(asked)
    engine.check()
    for result in results[:12]:
        assert result.finish_reason is FinishReason.STOP
        answer = json.loads(result.text)
        assert set(answer) == set(SCHEMA["properties"])
        assert answer["size"] in ("small", "large")
        assert 0 <= answer["count"] <= 99
        assert all(isinstance(tag, bool) for tag in answer["tags"])
    for result in results[12:16]:
        assert result.finish_reason is FinishReason.LENGTH or re.fullmatch(
            r"[a-f]{3}-\d+x", result.text
        )
    assert {result.text for result in results[16:28]} <= set(CHOICES)
    assert len({result.text for result in results[:28]}) > 10
    assert results[28].text.startswith("{")


def test_neighbours_preemption_and_another_engine_change_nothing(
    engine: Engine, bases: Callable[[str], Path], no_space: dict[int, float]
) -> None:
    asked = [
        *choices(request("json_schema", SCHEMA, logit_bias=no_space, logprobs=0), 6),
        GenerationRequest(prompt="y", temperature=1.0, seed=1, max_tokens=60, ignore_eos=True),
        request("choice", CHOICES, prompt="z" * 20),
    ]
    alone = [engine.generate([each])[0].token_ids for each in asked]
    tight = Engine(
        EngineSpec(base_model=str(bases("llama")), max_step_tokens=9, kv_cache_gib=9 * 4096 / 2**30)
    )
    assert [result.token_ids for result in tight.generate(asked)] == alone
    assert tight.stats.preemptions > 0
    tight.check()
    for cut in (1, len(alone[0]) // 2, len(alone[0]) - 1):
        (rest,) = engine.generate([replace(asked[0], generated_token_ids=alone[0][:cut])])
        assert rest.token_ids == alone[0][cut:]
    with pytest.raises(RequestError, match="do not follow"):
        engine.generate([replace(asked[0], generated_token_ids=[5, 5])])


def test_stop_texts_and_the_end_token_still_end(engine: Engine) -> None:
    free = request("regex", "(ab)*", max_tokens=80, temperature=0.0)
    (whole,) = engine.generate([replace(free, logit_bias={256: -100.0})])
    assert whole.text == "ab" * 40
    (stopped,) = engine.generate([replace(free, logit_bias={256: -100.0}, stop=["ba"])])
    assert (stopped.text, stopped.finish_reason) == ("a", FinishReason.STOP)
    (ended,) = engine.generate([replace(free, logit_bias={256: 100.0})])
    assert (ended.text, ended.token_ids) == ("", [256])


def nested(levels: int) -> Any:
    schema: Any = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_a_schema_may_lead_to_itself_by_way_of_something(engine: Engine) -> None:
    rule = {
        "type": "object", "additionalProperties": False, "required": ["next"],
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    }  # fmt: skip
    (answer,) = engine.generate([request("json_schema", rule, max_tokens=120, temperature=0.0)])
    assert re.match(r'\s*\{\s*"next"', answer.text)
    if answer.finish_reason is FinishReason.STOP:
        value = json.loads(answer.text)
        while value is not None:
            value = value["next"]


IMPOSSIBLE: dict[str, tuple[Any, Any]] = {
    "no schema": ("json_schema", [1]),
    "wrong schema": ("json_schema", {"type": 5}),
    "unknown reference": ("json_schema", {"$ref": "#/nowhere"}),
    "itself": ("json_schema", {"$ref": "#"}),
    "a ring": (
        "json_schema",
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    ),
    "unsatisfiable": ("json_schema", False),
    "not served": ("json_schema", {"type": "array", "uniqueItems": True}),
    "not JSON": ("json_schema", {"const": {1, 2}}),
    "not a number": ("json_schema", {"const": float("nan")}),
    "deep": ("json_schema", nested(65)),
    "very deep": ("json_schema", nested(30_000)),
    "long": ("json_schema", {"enum": ["x" * 2**16]}),
    "half a regex": ("regex", "("),
    "look-ahead": ("regex", "(?=a)b"),
    "no regex": ("regex", 5),
    "a long count": ("regex", "a{1000000}"),
    "no choices": ("choice", []),
    "an empty choice": ("choice", [""]),
    "text as choices": ("choice", "yes"),
    "too many choices": ("choice", ["x"] * 2000),
    "rule of an object": ("json_object", {}),
    "unknown kind": ("yaml", ""),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_formats_are_refused_at_once(engine: Engine, case: str) -> None:
    began = time.monotonic()
    with pytest.raises(RequestError) as caught:
        engine.generate([request(*IMPOSSIBLE[case])])
    assert caught.value.param == "response_format"
    assert len(caught.value.message) < 600
    assert ("leads to itself" in caught.value.message) == (case in ("itself", "a ring"))
    assert time.monotonic() - began < 5
    assert not engine.has_work


def test_a_grammar_that_grows_too_complex_fails_its_own_request_alone(engine: Engine) -> None:
    other = GenerationRequest(prompt="y", max_tokens=20, ignore_eos=True)
    (expected,) = engine.generate([other])
    bad = engine.submit(request("regex", "[xy]{3}(a?){500}a{500}"))
    good = engine.submit(other)
    tokens: list[int] = []
    errors: list[str | None] = []
    while engine.has_work:
        for output in engine.step():
            if output.request_id == good:
                tokens += output.token_ids
            elif output.finish_reason is FinishReason.ERROR:
                assert output.request_id == bad
                errors.append(output.error)
    assert tokens == expected.token_ids
    assert len(errors) == 1
    assert "response_format" in str(errors)


def test_many_grammars_are_not_kept(engine: Engine) -> None:
    for number in range(300):
        engine.cancel(engine.submit(request("choice", [f"answer {number}"])))
    for number in (0, 299):
        (result,) = engine.generate([request("choice", [f"answer {number}"])])
        assert result.text == f"answer {number}"
    assert len(engine._intake._grammars._kept) == 128


def test_thousands_of_schemas_take_no_more_memory_than_hundreds(engine: Engine) -> None:
    """llguidance's own memory among it, which no count of what is kept would show; each that stayed
    would take 145 KiB."""

    def compile_schemas(numbers: range) -> int:
        for number in numbers:
            schema = {"properties": {f"name {number}": {"type": "integer"}}}
            engine.compile_grammar(request("json_schema", schema))
        return psutil.Process().memory_info().rss

    before = compile_schemas(range(300))
    assert compile_schemas(range(300, 3_000)) - before < 32 * 2**20
