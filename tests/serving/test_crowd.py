"""Ten thousand requests at once, of every method and several tenants, some of which leave."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import VARIANTS, make_adapter

from serving.engine import Engine, EngineSpec, FinishReason, GenerationRequest, TokenOutput, joined
from serving.engine.request import ResponseFormat

NUMBER, SAMPLE = 10_000, 60
# Few, so that the cache is full of what other adapters and tenants have computed for them.
PROMPTS = [[n] * (4 * n + 1) for n in range(6)]


# Each is cheap enough for so many requests; those that leave nothing to chance are first.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 1.0, "repetition_penalty": 1.3},
    {"response_format": ResponseFormat("choice", ["ab", "cd", "ad"])},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"logprobs": 1, "temperature": 1.0, "logit_bias": {65: 3.0}},
]
GREEDY, MOST_TOKENS = 3, 3
# Prompt, adapter and options: all that a greedy answer depends on.
Kind = tuple[int, str | None, int]


def ask(kind: Kind, **options: Any) -> GenerationRequest:
    prompt, adapter, number = kind
    return GenerationRequest(
        prompt_token_ids=PROMPTS[prompt], adapter=adapter, ignore_eos=True,
        **OPTIONS[number] | options,
    )  # fmt: skip


@pytest.mark.slow
def test_ten_thousand_mixed_requests_leak_nothing(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("llama")
    engine = Engine(
        EngineSpec(
            base_model=str(base), max_running_requests=256, max_step_tokens=2048,
            kv_cache_gib=600 * 4096 / 2**30,
        )
    )  # fmt: skip
    for variant in VARIANTS:
        engine.add_adapter(variant, make_adapter(variant, base, tmp_path / variant))
    chooser = random.Random(0)
    names = [None, *VARIANTS]
    kinds: dict[str, Kind] = {
        str(n): tuple(chooser.choice(x) for x in (range(len(PROMPTS)), names, range(len(OPTIONS))))
        for n in range(NUMBER)
    }
    requests = {
        name: ask(
            kind,
            cache_salt=chooser.choice(["", "x", "y"]),
            max_tokens=chooser.randrange(1, MOST_TOKENS + 1),
            seed=chooser.randrange(1000),
        )
        for name, kind in kinds.items()
    }
    for name, request in requests.items():
        engine.submit(request, name)
    outputs: dict[str, list[TokenOutput]] = {name: [] for name in requests}
    left: set[str] = set()
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        leaver = str(chooser.randrange(NUMBER))
        if engine.cancel(leaver):
            left.add(leaver)
        if engine.stats.steps % 50 == 0:
            engine.check()
    engine.check()
    stats = engine.stats
    assert stats.free_pages == stats.num_pages
    assert stats.cached_tokens > 0
    assert left
    ended = [name for name, parts in outputs.items() if parts and parts[-1].finish_reason]
    assert sorted(ended + list(left)) == sorted(requests)

    alone = Engine(EngineSpec(base_model=str(base), prefix_cache=False))
    for variant in VARIANTS:
        alone.add_adapter(variant, tmp_path / variant)
    for name in chooser.sample(ended, SAMPLE):
        (result,) = alone.generate([requests[name]])
        whole = joined(outputs[name])
        assert (list(whole.token_ids), whole.text) == (result.token_ids, result.text)
        assert whole.finish_reason is result.finish_reason
    # The whole answer of each kind, of which a request has as much as it asked for.
    greedy = [name for name in ended if kinds[name][2] < GREEDY]
    assert len(greedy) > NUMBER // 3
    answers = {
        kind: alone.generate([ask(kind, max_tokens=MOST_TOKENS)])[0]
        for kind in {kinds[name] for name in greedy}
    }
    for name in greedy:
        answer, whole, most = answers[kinds[name]], joined(outputs[name]), requests[name].max_tokens
        assert [*whole.token_ids] == answer.token_ids[:most], kinds[name]
        is_cut = len(answer.token_ids) > most
        assert whole.finish_reason is (FinishReason.LENGTH if is_cut else answer.finish_reason)
