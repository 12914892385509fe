"""A request's options through a whole engine: alone, beside others, in chunks, preempted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import RequestError
from serving.engine import (
    Engine,
    EngineSpec,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    ScoreRequest,
    choices,
)

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
SAMPLED = GenerationRequest(
    prompt_token_ids=PROMPT, max_tokens=24, temperature=0.9, seed=4, ignore_eos=True
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.8, "top_k": 30},
    {"min_p": 0.1},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"logit_bias": {65: 4.0, 66: -100.0}},
    {"logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0.0, "frequency_penalty": 2.0, "logprobs": 0},
]


def make_engine(base: Path, **limits: Any) -> Engine:
    return Engine(EngineSpec(base_model=str(base), **limits))


@pytest.fixture(scope="module")
def engine(bases: Callable[[str], Path]) -> Engine:
    return make_engine(bases("llama"))


def rounded(results: list[GenerationResult]) -> list[GenerationResult]:
    """Without the last bits of log probabilities, which depend on how a prompt is cut."""

    def cut(entries: Any) -> Any:
        return tuple(
            replace(e, logprob=round(e.logprob, 3), top=tuple(token for token, _ in e.top))
            for e in entries
        )

    return [
        replace(r, logprobs=cut(r.logprobs), prompt_logprobs=cut(r.prompt_logprobs))
        for r in results
    ]


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_step_tokens": 5}, {"kv_cache_gib": 9 * 4096 / 2**30}, {"max_running_requests": 2}],
    ids=lambda limits: next(iter(limits), "roomy"),
)
def test_neighbours_and_limits_change_no_option(
    engine: Engine, bases: Callable[[str], Path], limits: dict[str, Any]
) -> None:
    requests = [replace(SAMPLED, **options) for options in OPTIONS]
    alone = [engine.generate([request])[0] for request in requests]
    assert len({tuple(result.token_ids) for result in alone}) > 5
    tight = make_engine(bases("llama"), **limits)
    assert rounded(tight.generate(requests)) == rounded(alone)
    tight.check()
    if "kv_cache_gib" in limits:
        assert tight.stats.preemptions > 0


def test_log_probabilities_are_those_of_the_scores(engine: Engine) -> None:
    request = replace(SAMPLED, logprobs=2, prompt_logprobs=1)
    (result,) = engine.generate([request])
    (logits,) = engine.score([ScoreRequest([*PROMPT, *result.token_ids])])
    expected = logits.log_softmax(-1)
    assert len(result.prompt_logprobs) == len(PROMPT) - 1
    tokens = [*PROMPT[1:], *result.token_ids]
    for place, entry in enumerate([*result.prompt_logprobs, *result.logprobs]):
        assert entry.token_id == tokens[place]
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-4)
        best = expected[place].topk(len(entry.top))
        assert [token for token, _ in entry.top] == best.indices.tolist()
        torch.testing.assert_close(
            torch.tensor([value for _, value in entry.top]), best.values, atol=1e-4, rtol=0
        )


def test_a_prompt_can_be_scored_without_an_answer(engine: Engine) -> None:
    request = GenerationRequest(prompt_token_ids=PROMPT, max_tokens=0, prompt_logprobs=0)
    (result,) = engine.generate([request])
    assert (result.token_ids, result.text) == ([], "")
    assert result.finish_reason is FinishReason.LENGTH
    assert [entry.token_id for entry in result.prompt_logprobs] == PROMPT[1:]
    (whole,) = engine.generate([replace(request, prompt_token_ids=[3])])
    assert whole.prompt_logprobs == ()


def test_a_stop_token_ends_and_is_no_text(engine: Engine) -> None:
    (free,) = engine.generate([SAMPLED])
    token = free.token_ids[5]
    assert token not in free.token_ids[:5]
    (ended,) = engine.generate([replace(SAMPLED, stop_token_ids=[token])])
    assert ended.token_ids == free.token_ids[:6]
    assert ended.finish_reason is FinishReason.STOP
    assert ended.text == engine.tokenizer.decode(free.token_ids[:5], skip_special_tokens=True)


def test_choices_differ_and_repeat(engine: Engine) -> None:
    first = engine.generate(choices(SAMPLED, 4))
    assert len({tuple(result.token_ids) for result in first}) == 4
    assert engine.generate(choices(SAMPLED, 4)) == first
    assert engine.generate([SAMPLED])[0] == first[0]
    for n in (0, -1, 129, 10**9, True, 1.0):
        with pytest.raises(RequestError, match="128"):
            choices(SAMPLED, n)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"logit_bias": {1: 1000}}, "logit_bias"),
        ({"logit_bias": {1: 10**400}}, "logit_bias"),
        ({"logit_bias": {10**400: 1}}, "logit_bias"),
        ({"min_p": 10**400}, "min_p"),
        ({"repetition_penalty": 10**400}, "repetition_penalty"),
        ({"frequency_penalty": -(10**400)}, "frequency_penalty"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"logit_bias": {261: 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(50_000), 1.0)}, "logit_bias"),
        ({"stop_token_ids": [261]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": list(range(17))}, "stop_token_ids"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "prompt_logprobs": 0}, "max_tokens"),
    ],
)
def test_impossible_options_name_their_field(
    engine: Engine, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate([GenerationRequest(prompt="x", **options)])
    assert caught.value.param == param
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("field", ["prompt_token_ids", "generated_token_ids"])
def test_the_length_is_checked_before_the_tokens(engine: Engine, field: str) -> None:
    options: dict[str, Any] = {"prompt_token_ids": [1], field: [0] * 100_000 + [-1]}
    with pytest.raises(RequestError) as caught:
        engine.generate([GenerationRequest(**options)])
    assert "100001 tokens" in caught.value.message
