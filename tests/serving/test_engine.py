"""The offline engine: its API, its limits, its errors, and that neighbours do not matter."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import VARIANTS, make_adapter
from bad_adapters import BAD, edit_tensors

from cluster.errors import (
    AdapterError,
    BaseModelError,
    ConflictError,
    ContextLengthError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
)
from serving.adapters import num_bytes
from serving.engine import (
    Engine,
    EngineSpec,
    FinishReason,
    GenerationRequest,
    ScoreRequest,
)

Bases = Callable[[str], Path]
PROMPTS = [[1, 2, 3], list(range(40)), [7], [200, 100, 50, 25] * 5]


def make_engine(base: Path, **limits: Any) -> Engine:
    return Engine(EngineSpec(base_model=str(base), **limits))


@pytest.fixture(scope="module")
def adapters(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(name, bases("llama"), folder / name) for name in VARIANTS}


@pytest.fixture(scope="module")
def engine(bases: Bases, adapters: dict[str, Path]) -> Engine:
    engine = make_engine(bases("llama"))
    for name, path in adapters.items():
        engine.add_adapter(name, path)
    return engine


def mixed(**options: Any) -> list[GenerationRequest]:
    """Requests of every adapter and the base, with several prompts."""
    return [
        GenerationRequest(prompt_token_ids=prompt, adapter=adapter, ignore_eos=True, **options)
        for prompt in PROMPTS
        for adapter in (None, *VARIANTS)
    ]


def test_results_come_in_order_with_reasons(engine: Engine) -> None:
    results = engine.generate(mixed(max_tokens=5))
    assert [result.prompt_tokens for result in results] == [
        len(prompt) for prompt in PROMPTS for _ in range(1 + len(VARIANTS))
    ]
    assert {len(result.token_ids) for result in results} == {5}
    assert {result.finish_reason for result in results} == {FinishReason.LENGTH}
    engine.check()


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_neighbours_do_not_matter(engine: Engine, temperature: float) -> None:
    requests = mixed(max_tokens=12, temperature=temperature, seed=11)
    together = engine.generate(requests)
    alone = [engine.generate([request])[0] for request in requests]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    if temperature:
        assert len({tuple(r.token_ids) for r in together}) == len(together)


@pytest.mark.parametrize(
    "limits",
    [
        {"kv_cache_gib": 36 * 4096 / 2**30},  # one full context and the prefixes: preemption
        {"max_step_tokens": 7},  # chunked prefill
        {"max_running_requests": 3},
        {"page_tokens": 5},
    ],
    ids=lambda limits: next(iter(limits)),
)
def test_no_limit_changes_a_token(
    engine: Engine, bases: Bases, adapters: dict[str, Path], limits: dict[str, Any]
) -> None:
    requests = mixed(max_tokens=30, temperature=0.7, seed=3)
    expected = [result.token_ids for result in engine.generate(requests)]
    tight = make_engine(bases("llama"), **limits)
    for name, path in adapters.items():
        tight.add_adapter(name, path)
    assert [result.token_ids for result in tight.generate(requests)] == expected
    tight.check()
    if "kv_cache_gib" in limits:
        assert tight.stats.preemptions > 0
    for name in adapters:
        tight.remove_adapter(name)
    assert tight.stats.free_pages == tight.stats.num_pages


def test_scores_are_float32_logits_of_every_token(engine: Engine) -> None:
    (alone,) = engine.score([ScoreRequest(PROMPTS[1], "lora")])
    assert (alone.shape, alone.dtype) == ((40, 261), torch.float32)
    together = engine.score([ScoreRequest(p, a) for p in PROMPTS for a in (None, "lora")])
    assert torch.equal(together[3], alone)
    assert not torch.allclose(together[2], together[3])


def test_text_in_and_text_out(engine: Engine) -> None:
    (by_text,) = engine.generate([GenerationRequest(prompt="hello", max_tokens=8)])
    ids = engine.tokenizer("hello")["input_ids"]
    (by_ids,) = engine.generate([GenerationRequest(prompt_token_ids=ids, max_tokens=8)])
    assert by_text == by_ids
    decoded = engine.tokenizer.decode(by_text.token_ids, skip_special_tokens=True)
    assert by_text.text == decoded


def test_the_end_token_ends_unless_ignored(engine: Engine) -> None:
    seeds = [GenerationRequest(prompt_token_ids=[5], max_tokens=100, temperature=30.0, seed=s)
             for s in range(8)]  # fmt: skip
    results = engine.generate(seeds)
    assert any(r.finish_reason is FinishReason.STOP for r in results)
    for result in results:
        if result.finish_reason is FinishReason.STOP:
            assert result.token_ids[-1] == 256
            assert 256 not in result.token_ids[:-1]
            assert "<|end|>" not in result.text
    ignoring = engine.generate([replace(request, ignore_eos=True) for request in seeds])
    assert {len(result.token_ids) for result in ignoring} == {100}
    assert any(256 in result.token_ids[:-1] for result in ignoring)


def test_stop_texts_end_and_are_cut(engine: Engine) -> None:
    request = {"prompt_token_ids": [9, 8], "max_tokens": 30, "ignore_eos": True}
    (free,) = engine.generate([GenerationRequest(**request)])
    stop = free.text[4:6]
    (cut,) = engine.generate([GenerationRequest(**request, stop=[stop])])
    assert cut.finish_reason is FinishReason.STOP
    assert cut.text == free.text[: free.text.index(stop)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_goes_on_behind_what_another_engine_gave_out(
    engine: Engine, temperature: float
) -> None:
    """Token by token and text by text, wherever it was cut: stop texts and halves of characters
    included."""
    request = GenerationRequest(
        prompt="hello", adapter="lora", max_tokens=12, temperature=temperature, seed=5,
        ignore_eos=True,
    )  # fmt: skip
    (whole,) = engine.generate([request])
    stop = [next(c for c in reversed(whole.text) if c.isascii()) if temperature else "no such text"]
    request = replace(request, stop=stop)

    def outputs(request: GenerationRequest) -> list[tuple[tuple[int, ...], str, object]]:
        engine.submit(request)
        found: list[tuple[tuple[int, ...], str, object]] = []
        while engine.has_work:
            found += [(o.token_ids, o.text, o.finish_reason) for o in engine.step()]
        return found

    undisturbed = outputs(request)
    assert undisturbed[-1][2] == ("stop" if temperature else "length")
    given: list[int] = []
    for number, (tokens, _, _) in enumerate(undisturbed[:-1], 1):
        given += tokens
        assert outputs(replace(request, generated_token_ids=given)) == undisturbed[number:]


def test_max_tokens_none_fills_the_context(engine: Engine) -> None:
    request = GenerationRequest(
        prompt_token_ids=[1] * 100, adapter="prefix_tuning", max_tokens=None, ignore_eos=True
    )
    assert len(engine.generate([request])[0].token_ids) == 128 - 21 - 100


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": "x", "prompt_token_ids": [1]}, "prompt"),
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [261]}, "prompt_token_ids"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids"),
        ({"prompt_token_ids": [1.0]}, "prompt_token_ids"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids"),
        ({"prompt_token_ids": [10**5000]}, "prompt_token_ids"),
        ({"prompt_token_ids": 5}, "prompt_token_ids"),
        ({"prompt_token_ids": {1: 2}}, "prompt_token_ids"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "x", "max_tokens": 10**5000}, "max_tokens"),
        ({"prompt": "x", "temperature": 10**5000}, "temperature"),
        ({"prompt": "x", "top_p": 10**400}, "top_p"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 10**12}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "x", "temperature": -0.1}, "temperature"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature"),
        ({"prompt": "x", "top_p": 0.0}, "top_p"),
        ({"prompt": "x", "top_p": 1.1}, "top_p"),
        ({"prompt": "x", "top_k": 0}, "top_k"),
        ({"prompt": "x", "seed": 2**64}, "seed"),
        ({"prompt": "x", "seed": "1"}, "seed"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "stop": [5]}, "stop"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "half \ud800"}, "prompt"),
        ({"prompt": "x", "adapter": 5}, "adapter"),
        ({"prompt": "x", "max_tokens": 2, "generated_token_ids": [1, 2]}, "generated_token_ids"),
        ({"prompt": "x", "generated_token_ids": [261]}, "generated_token_ids"),
        ({"prompt": "x", "stop": "text"}, "stop"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ],
)
def test_impossible_requests_name_their_field(
    engine: Engine, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate([GenerationRequest(prompt="fine"), GenerationRequest(**options)])
    assert caught.value.param == param
    assert not engine.has_work


def test_extreme_options_are_met(engine: Engine) -> None:
    greedy = GenerationRequest(prompt="x", max_tokens=5, ignore_eos=True)
    (expected,) = engine.generate([greedy])
    for options in ({"temperature": 1e-39}, {"temperature": 1e-300}, {"top_p": 1e-50},
                    {"top_k": 10**30, "temperature": 1e-9}, {"top_k": 1}):  # fmt: skip
        request = replace(greedy, **{"temperature": 1.0, "seed": 1, **options})
        both = engine.generate([request, greedy])
        assert [result.token_ids for result in both] == [expected.token_ids] * 2, options


def test_a_prompt_over_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(
        ContextLengthError, match="context length is 128 tokens; the prompt has 128 tokens"
    ):
        engine.generate([GenerationRequest(prompt_token_ids=[1] * 128, max_tokens=1)])
    with pytest.raises(ContextLengthError, match="21 that the adapter takes"):
        engine.generate([GenerationRequest(prompt_token_ids=[1] * 107, adapter="prefix_tuning")])


def test_an_unknown_adapter_gets_the_nearest(engine: Engine) -> None:
    with pytest.raises(ModelNotFoundError, match="did you mean 'bitfit'"):
        engine.generate([GenerationRequest(prompt="x", adapter="bitfti")])


def test_adapters_come_and_go(bases: Bases, adapters: dict[str, Path]) -> None:
    sizes = {v: num_bytes(make_engine(bases("llama")).lower(adapters[v])) for v in adapters}
    room = sizes["prefix_tuning"] + sizes["lora"] + sizes["bitfit"]
    engine = make_engine(bases("llama"), adapters_gib=(room + 64) / 2**30)
    request = GenerationRequest(prompt="x", adapter="a", max_tokens=6, ignore_eos=True)
    engine.add_adapter("a", adapters["prefix_tuning"])
    expected = engine.generate([request])[0].token_ids
    with pytest.raises(ConflictError, match="loaded already"):
        engine.add_adapter("a", adapters["lora"])
    engine.add_adapter("b", adapters["lora"])
    with pytest.raises(OverloadedError, match="adapters_gib"):
        engine.add_adapter("c", adapters["lora"])
    engine.submit(request, "running")
    engine.step()
    engine.remove_adapter("a")
    assert engine.adapters == ["b"]
    with pytest.raises(ModelNotFoundError):
        engine.submit(request)
    engine.add_adapter("a", adapters["bitfit"])  # the name is free; the old one still finishes
    assert engine.stats.adapter_bytes == room
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
        engine.check()
    assert tokens == expected[1:]
    engine.remove_adapter("a")
    engine.remove_adapter("b")
    assert engine.stats.free_pages == engine.stats.num_pages
    with pytest.raises(ModelNotFoundError):
        engine.remove_adapter("a")


def test_cancelling_frees_the_pages(engine: Engine) -> None:
    free = engine.stats.free_pages
    request = GenerationRequest(prompt="hello", adapter="lora", max_tokens=50, ignore_eos=True)
    ids = [engine.submit(request) for _ in range(3)]
    engine.step()
    assert engine.stats.free_pages < free
    assert all(engine.cancel(i) for i in ids)
    assert not engine.cancel(ids[0])
    assert engine.stats.free_pages == free
    engine.check()


def test_streams_and_batches_do_not_mix(engine: Engine) -> None:
    running = engine.submit(GenerationRequest(prompt="x"))
    with pytest.raises(ConflictError, match="in progress"):
        engine.generate([GenerationRequest(prompt="y")])
    engine.cancel(running)


@pytest.mark.parametrize(("variant", "case", "spoil", "reason"), BAD, ids=lambda v: str(v)[:20])
def test_a_bad_adapter_is_refused_by_name_and_disturbs_nobody(
    engine: Engine, adapters: dict[str, Path], tmp_path: Path,
    variant: str, case: str, spoil: Callable[[Path], object], reason: str,
) -> None:  # fmt: skip
    bad = tmp_path / "bad"
    shutil.copytree(adapters[variant], bad)
    spoil(bad)
    good = GenerationRequest(prompt="x", adapter=variant, max_tokens=4, ignore_eos=True)
    (expected,) = engine.generate([good])
    running = engine.submit(good)
    tokens = [token for output in engine.step() for token in output.token_ids]
    before = engine.stats
    with pytest.raises(AdapterError) as caught:
        engine.add_adapter("bad", bad)
    assert str(bad) in caught.value.message
    assert reason in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 2100
    assert engine.stats == before
    assert "bad" not in engine.adapters
    while engine.has_work:
        for output in engine.step():
            assert output.request_id == running
            tokens += output.token_ids
    assert tokens == expected.token_ids
    engine.check()


def test_an_adapter_of_another_base_is_refused(
    bases: Bases, adapters: dict[str, Path], engine: Engine, tmp_path: Path
) -> None:
    for variant in ("lora", "bitfit", "prefix_tuning"):
        other = make_adapter(variant, bases("qwen3"), tmp_path / variant)
        with pytest.raises(AdapterError, match="made for another base"):
            engine.add_adapter("other", other)


@pytest.fixture
def wild(adapters: dict[str, Path], tmp_path: Path) -> Path:
    """Finite weights whose products are not: the file passes every check, the logits do not."""
    folder = tmp_path / "wild"
    shutil.copytree(adapters["lora"], folder)
    edit_tensors(lambda t: [v.fill_(1e30) for v in t.values()])(folder)
    return folder


def test_weights_that_overflow_fail_their_own_requests_alone(
    bases: Bases, adapters: dict[str, Path], wild: Path
) -> None:
    engine = make_engine(bases("llama"))
    engine.add_adapter("lora", adapters["lora"])
    engine.add_adapter("wild", wild)
    good = GenerationRequest(prompt="x", adapter="lora", max_tokens=8, ignore_eos=True)
    expected = engine.generate([good])[0].token_ids
    ids = [engine.submit(good), engine.submit(GenerationRequest(prompt="x", adapter="wild"))]
    tokens: list[int] = []
    errors: dict[str, str | None] = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is FinishReason.ERROR:
                errors[output.request_id] = output.error
            elif output.request_id == ids[0]:
                tokens += output.token_ids
        engine.check()
    assert tokens == expected
    assert list(errors) == [ids[1]]
    assert "not finite" in str(errors[ids[1]])


def test_what_an_overflow_left_in_a_page_hurts_nobody(bases: Bases, wild: Path) -> None:
    """Page 0 keeps keys that are NaN; whoever is padded beside a longer row must not read it."""
    engine = make_engine(bases("llama"))
    requests = [GenerationRequest(prompt_token_ids=p, max_tokens=20, ignore_eos=True)
                for p in PROMPTS]  # fmt: skip
    expected = [result.token_ids for result in engine.generate(requests)]
    engine.add_adapter("wild", wild)
    pages = engine.stats.num_pages
    for _ in range(2 * pages // 3):
        engine.submit(GenerationRequest(prompt_token_ids=[1] * 20, adapter="wild"))
    while engine.has_work:
        engine.step()
    assert not all(torch.isfinite(keys).all() for keys in engine.runner.memory.keys)
    assert [result.token_ids for result in engine.generate(requests)] == expected


def test_bases_whose_long_answers_follow_another_rule_are_refused(
    bases: Bases, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="max_context_tokens to 64"):
        make_engine(base)
    make_engine(base, max_context_tokens=64)


def test_prefixes_share_pages_that_would_hold_one_context(
    bases: Bases, adapters: dict[str, Path], engine: Engine, tmp_path: Path
) -> None:
    """21 virtual tokens take 2 pages, as many as there are beside 7 of the tokens."""
    tight = make_engine(bases("llama"), kv_cache_gib=9 * 4096 / 2**30)
    requests: list[GenerationRequest] = []
    for number in range(5):
        name = f"prefix{number}"
        for each in (engine, tight):
            each.add_adapter(name, make_adapter("prefix_tuning", bases("llama"), tmp_path / name,
                                                number))  # fmt: skip
        requests += [
            GenerationRequest(prompt_token_ids=prompt, adapter=name, max_tokens=107 - len(prompt),
                              ignore_eos=True)
            for prompt in PROMPTS
        ]  # fmt: skip
    expected = engine.generate(requests)
    assert tight.generate(requests) == expected
    tight.check()
    for number in range(5):
        engine.remove_adapter(f"prefix{number}")


def test_a_pass_that_raises_fails_its_own_adapter_alone(
    bases: Bases, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(bases("llama"))
    for name in ("lora", "bitfit"):
        engine.add_adapter(name, adapters[name])
    forward = engine.runner.forward

    good = GenerationRequest(prompt="x", adapter="lora", max_tokens=4, ignore_eos=True)
    expected = engine.generate([good])[0].token_ids
    shift = engine._bank.get("bitfit").lowered

    def fail(batch: Any) -> torch.Tensor:
        if any(row.deltas is shift.deltas for row in batch.rows):
            raise RuntimeError("device error")
        return forward(batch)

    monkeypatch.setattr(engine.runner, "forward", fail)
    first = engine.submit(good)
    second = engine.submit(GenerationRequest(prompt="x", adapter="bitfit"))
    outputs = [output for _ in range(4) for output in engine.step()]
    assert [t for o in outputs if o.request_id == first for t in o.token_ids] == expected
    (failed,) = [output for output in outputs if output.request_id == second]
    assert "device error" in str(failed.error)
    assert not engine.has_work
    assert engine.stats.free_pages == engine.stats.num_pages


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: shutil.rmtree(p), "is not a folder|does not exist"),
        (lambda p: (p / "config.json").unlink(), "config.json"),
        (lambda p: (p / "config.json").write_text("{"), "config.json"),
        (lambda p: (p / "model.safetensors").unlink(), "safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes(b"x"), "cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_base(
    bases: Bases, tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    spoil(base)
    with pytest.raises(BaseModelError, match=reason) as caught:
        make_engine(base)
    assert str(base) in caught.value.message


def test_a_base_without_a_tokenizer_takes_token_ids(bases: Bases, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    for file in base.glob("*token*"):
        file.unlink()
    engine = make_engine(base)
    assert engine.generate([GenerationRequest(prompt_token_ids=[1], max_tokens=2)])[0].token_ids
    with pytest.raises(RequestError, match="no tokenizer"):
        engine.generate([GenerationRequest(prompt="x")])
