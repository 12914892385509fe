"""Embeddings are those of the base's or PEFT's own hidden states, beside answers in one batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from adapters import load, make_adapter
from conftest import CONTEXT

from cluster.errors import RequestError
from serving.engine import Engine, EngineSpec, FinishReason, GenerationRequest, attempt
from training import load_adapter

Bases = Callable[[str], Path]
Pooling = Literal["last", "mean"]
# Two flat, one padded.
FAMILIES = ["llama", "gpt2", "bloom"]
VARIANTS = ["lora", "layernorm", "prefix_tuning"]
PROMPTS = [[7], list(range(40, 70)), [*range(40, 68), 3, 4]]


def embedding(
    prompt: list[int], adapter: str | None, pooling: Pooling, **options: Any
) -> GenerationRequest:
    return GenerationRequest(
        prompt_token_ids=prompt, adapter=adapter, max_tokens=0, pooling=pooling, **options
    )


@torch.no_grad()
def reference(model: Any, prompt: list[int], pooling: Pooling) -> torch.Tensor:
    found = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
    states = found.hidden_states[-1][0, -len(prompt) :]
    pooled = states[-1] if pooling == "last" else states.mean(0)
    return pooled / pooled.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_peft_in_a_batch_with_answers(
    family: str, bases: Bases, tmp_path: Path
) -> None:
    base = bases(family)
    spec = EngineSpec(base_model=str(base), max_context_tokens=CONTEXT, max_step_tokens=24)
    # Chunks of a prompt, and preemption in the middle of one, where pages are few.
    page_bytes = 16 * 2 * 2 * 32 * 4 * (0.5 if family == "llama" else 1)
    tight = spec.model_copy(
        update={"max_step_tokens": 11, "kv_cache_gib": 10.5 * page_bytes / 2**30}
    )
    engines = [Engine(spec), Engine(tight)]
    models: dict[str | None, Any] = {None: load(base).eval()}
    for variant in VARIANTS:
        folder = make_adapter(variant, base, tmp_path / variant)
        models[variant] = load_adapter(load(base), folder).eval()
        for engine in engines:
            engine.add_adapter(variant, folder)
    cases: list[tuple[list[int], str | None, Pooling]] = [
        (prompt, name, pooling)
        for prompt in PROMPTS
        for name in models
        for pooling in ("last", "mean")
    ]
    asked = [embedding(*case) for case in cases]
    answers = [
        GenerationRequest(prompt_token_ids=PROMPTS[1], adapter=name, max_tokens=8, ignore_eos=True)
        for name in models
    ]
    alone = [result.token_ids for result in engines[0].generate(answers)]
    expected = [reference(models[name], prompt, pooling) for prompt, name, pooling in cases]
    for engine in engines:
        results = engine.generate([*asked, *answers])
        assert [r.token_ids for r in results[len(asked) :]] == alone
        for result, vector in zip(results, expected, strict=False):
            assert result.embedding is not None
            assert (result.finish_reason, result.token_ids) == (FinishReason.STOP, [])
            found = torch.from_numpy(result.embedding)
            torch.testing.assert_close(found, vector, atol=1e-4, rtol=0)
        engine.check()
    assert engines[1].stats.preemptions > 0
    differing = {tuple(np.round(vector.numpy(), 3)) for vector in expected}
    # A prompt of one token is its own mean.
    assert len(differing) == len(expected) - len(models)


def test_fewer_dimensions_are_the_first_ones_made_to_length_one(bases: Bases) -> None:
    engine = Engine(EngineSpec(base_model=str(bases("llama"))))
    whole, cut = engine.generate(
        [embedding([1, 2, 3], None, "mean"), embedding([1, 2, 3], None, "mean", dimensions=5)]
    )
    assert whole.embedding is not None
    assert cut.embedding is not None
    assert (whole.embedding.shape, cut.embedding.shape) == ((32,), (5,))
    first = whole.embedding[:5]
    np.testing.assert_allclose(cut.embedding, first / np.linalg.norm(first), atol=1e-6)
    with pytest.raises(RequestError, match="dimensions is 33, and this base's vectors have 32"):
        engine.submit(embedding([1], None, "mean", dimensions=33))


def test_a_mean_takes_nothing_from_other_prompts_pages_and_a_last_token_does(bases: Bases) -> None:
    base = bases("llama")
    engine = Engine(EngineSpec(base_model=str(base)))
    for pooling, found in (("last", 0), ("mean", 0), ("last", 16)):
        before = engine.stats.cached_tokens
        (result,) = engine.generate([embedding(PROMPTS[1], None, pooling)])
        assert engine.stats.cached_tokens == before + found
        expected = reference(load(base).eval(), PROMPTS[1], pooling)
        assert result.embedding is not None
        torch.testing.assert_close(torch.from_numpy(result.embedding), expected, atol=1e-4, rtol=0)


def test_a_pass_that_is_tried_again_adds_nothing_twice(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = EngineSpec(base_model=str(bases("llama")), max_step_tokens=24, prefix_cache=False)
    engine = Engine(spec)
    engine.add_adapter("lora", make_adapter("lora", bases("llama"), tmp_path))
    asked = [embedding(PROMPTS[1], name, "mean") for name in (None, "lora")]
    expected = engine.generate(asked)
    sampled, failures = attempt._sampled, list[int]()

    def fail(chunks: Any, *rest: Any) -> Any:
        if len(chunks) > 1:
            failures.append(chunks[0].start)
            raise RuntimeError("out of memory")
        return sampled(chunks, *rest)

    monkeypatch.setattr(attempt, "_sampled", fail)
    results = engine.generate(asked)
    assert any(failures), "one of them was in the middle of its prompt"
    for result, before in zip(results, expected, strict=True):
        assert result.embedding is not None
        assert before.embedding is not None
        np.testing.assert_allclose(result.embedding, before.embedding, atol=1e-5)


def test_a_prompt_over_the_context_is_told_nothing_of_max_tokens(bases: Bases) -> None:
    engine = Engine(EngineSpec(base_model=str(bases("llama"))))
    with pytest.raises(RequestError, match="the prompt has 200 tokens; shorten the prompt"):
        engine.submit(embedding([1] * 200, None, "last"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 1, "pooling": "last"}, "set max_tokens to 0"),
        ({"max_tokens": 0, "pooling": "last", "prompt_logprobs": 1}, "leave prompt_logprobs out"),
        ({"max_tokens": 0, "pooling": "cls"}, "must be 'last' or 'mean'"),
        ({"dimensions": 4}, "set pooling"),
        ({"max_tokens": 0, "pooling": "last", "dimensions": 0}, "above 0"),
    ],
)
def test_what_is_no_embedding_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        GenerationRequest(prompt_token_ids=[1], **options).check()


def test_an_encoder_decoder_has_none(bases: Bases) -> None:
    engine = Engine(EngineSpec(base_model=str(bases("t5")), max_context_tokens=CONTEXT))
    with pytest.raises(RequestError, match="encoder-decoder"):
        engine.submit(embedding([1, 2], None, "last"))
