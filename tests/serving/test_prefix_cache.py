"""KV pages shared between requests: who may share, who must not, and that nobody can tell."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter

from serving.engine import Engine, EngineSpec, GenerationRequest, ScoreRequest, choices

LONG = [7, 3] * 25  # three full pages and two tokens
Bases = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = {
        f"{variant}{seed}": make_adapter(variant, bases("llama"), root / f"{variant}{seed}", seed)
        for variant in ("lora", "prefix_tuning")
        for seed in (1, 2)
    }
    return made | {"twin": made["lora1"]}


@pytest.fixture
def engine(bases: Bases, folders: dict[str, Path]) -> Engine:
    return make_engine(bases, folders)


def make_engine(bases: Bases, folders: dict[str, Path], **limits: Any) -> Engine:
    engine = Engine(EngineSpec(base_model=str(bases("llama")), **limits))
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    return engine


def request(adapter: str | None = None, tenant: str = "", **options: Any) -> GenerationRequest:
    return GenerationRequest(
        **{"prompt_token_ids": LONG, "max_tokens": 8, "ignore_eos": True, **options},
        adapter=adapter,
        cache_salt=tenant,
    )


def found(engine: Engine, *requests: GenerationRequest) -> int:
    """Tokens that were found while these requests ran, one after the other."""
    before = engine.stats.cached_tokens
    for each in requests:
        engine.generate([each])
        engine.check()
    return engine.stats.cached_tokens - before


def test_pages_are_shared_by_tenant_adapter_content_and_tokens_alone(engine: Engine) -> None:
    assert found(engine, request("lora1")) == 0
    assert found(engine, request("lora1")) == 48
    assert found(engine, request("twin")) == 48, "the same adapter by another name"
    for other in (request(), request("lora2"), request("prefix_tuning1"), request("lora1", "x")):
        assert found(engine, other) == 0
        assert found(engine, other) == 48
    changed = [*LONG[:20], 9, *LONG[21:]]
    assert found(engine, request("lora1", prompt_token_ids=changed)) == 16
    assert found(engine, request("lora1", prompt_token_ids=LONG[:48])) == 32, "one is left"


def test_answers_are_kept_too_and_an_adapter_that_comes_back_finds_them(engine: Engine,
    folders: dict[str, Path],
) -> None:  # fmt: skip
    (first,) = engine.generate([request("lora1", max_tokens=40)])
    turn = [*LONG, *first.token_ids, 5]
    engine.remove_adapter("lora1")
    engine.remove_adapter("twin")
    engine.add_adapter("again", folders["lora1"])
    assert found(engine, request("again", prompt_token_ids=turn)) == 80


def test_a_hit_gives_what_a_miss_gives(
    bases: Bases, folders: dict[str, Path], engine: Engine
) -> None:
    plain = make_engine(bases, folders, prefix_cache=False)
    requests = [
        request(adapter, temperature=temperature, seed=1, logprobs=0, max_tokens=30)
        for adapter in (None, *folders)
        for temperature in (0.0, 1.0)
    ]
    expected = [plain.generate([each])[0] for each in requests]
    assert plain.stats.cached_tokens == 0
    for _ in range(2):
        for each, miss in zip(requests, expected, strict=True):
            (hit,) = engine.generate([each])
            assert (hit.token_ids, hit.text) == (miss.token_ids, miss.text)
            for ours, theirs in zip(hit.logprobs, miss.logprobs, strict=True):
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert engine.stats.cached_tokens > 48 * len(requests)


def test_scores_and_prompt_logprobs_compute_every_token(engine: Engine) -> None:
    (before,) = engine.score([ScoreRequest(LONG, "lora1")])
    asked = request("lora1", prompt_logprobs=0)
    (cold,) = engine.generate([asked])
    assert found(engine, asked) == 0
    assert engine.generate([asked])[0] == cold
    assert torch.equal(engine.score([ScoreRequest(LONG, "lora1")])[0], before)
    assert found(engine, request("lora1")) == 48, "but others find what they computed"


def test_choices_of_one_prompt_read_it_once(engine: Engine) -> None:
    many = choices(request("prefix_tuning1", temperature=1.0, seed=3), 8)
    before = engine.stats.cached_tokens
    together = engine.generate(many)
    assert engine.stats.cached_tokens - before == 7 * 48
    assert together == [engine.generate([each])[0] for each in many]


def test_kept_pages_make_way_and_a_full_cache_refuses_nobody(
    bases: Bases, folders: dict[str, Path]
) -> None:
    """Twelve pages, of which a request takes four or six."""
    engine = make_engine(bases, folders, kv_cache_gib=12 * 4096 / 2**30)
    roomy = make_engine(bases, folders)
    prompts = [[n] * 50 for n in range(6)]
    requests = [
        request(adapter, prompt_token_ids=prompt) for prompt in prompts for adapter in folders
    ]
    expected = roomy.generate(requests)
    assert engine.generate(requests) == expected
    engine.check()
    assert engine.stats.free_pages == engine.stats.num_pages
    assert found(engine, requests[0], requests[0]) == 48, "the first is gone, the second is there"


def test_cancelling_keeps_what_was_computed_and_frees_it(engine: Engine) -> None:
    ids = [engine.submit(request("prefix_tuning2", max_tokens=50)) for _ in range(3)]
    for _ in range(3):
        engine.step()
        engine.check()
    assert engine.stats.free_pages < engine.stats.num_pages
    for each in ids:
        engine.cancel(each)
        engine.check()
    assert engine.stats.free_pages == engine.stats.num_pages
    assert found(engine, request("prefix_tuning2")) == 48
