"""Encoder-decoders: Graft's logits and greedy tokens are PEFT's, however many run together."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from adapters import make_adapter, variants_of
from conftest import CONTEXT
from side_by_side import TOLERANCE, SideBySide

from cluster.errors import AdapterError, BaseModelError, ContextLengthError, RequestError
from serving.engine import Engine, EngineSpec, GenerationRequest, ScoreRequest
from serving.engine.padded import PaddedPass

Bases = Callable[[str], Path]
Setups = Callable[[str], SideBySide]
FAMILIES = ["t5", "mt5", "bart"]
PAIRS = [(family, variant) for family in FAMILIES for variant in variants_of(family)]
# (what the encoder reads, what the decoder does)
CASES = [
    ([72, 101, 108, 108, 111], [5, 6, 7]),
    ([7], []),
    (list(range(40, 70)), [200, 13, 13, 99, 5, 6, 7, 8, 9, 1, 2]),
]


@pytest.fixture(scope="module")
def setups(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Setups:
    """Made at a family's first use, since it takes longer than a test."""

    @cache
    def setup(family: str) -> SideBySide:
        made = SideBySide(bases(family), tmp_path_factory.mktemp(family), family)
        assert type(made.engine.runner._pass) is PaddedPass
        return made

    return setup


@pytest.mark.parametrize(("family", "variant"), [*PAIRS, *((f, None) for f in FAMILIES)])
def test_logits_are_those_of_peft(setups: Setups, family: str, variant: str | None) -> None:
    setup = setups(family)
    asked = [ScoreRequest(source, variant, answer_token_ids=answer) for source, answer in CASES]
    changes: list[float] = []
    for (source, answer), logits in zip(CASES, setup.engine.score(asked), strict=True):
        expected = setup.logits(variant, source, answer)
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        changes.append(float((logits - setup.logits(None, source, answer)).abs().max()))
    assert variant is None or max(changes) > 0.05, "the adapter changes nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_peft_alone_and_mixed(setups: Setups, family: str) -> None:
    setup = setups(family)
    requests = setup.requests(*(source for source, _ in CASES[:2]), logprobs=5)
    mixed = setup.engine.generate(requests)
    setup.assert_as_peft(requests, mixed)
    for request, result in zip(requests, mixed, strict=True):
        assert result.prompt_tokens == len(request.prompt_token_ids or ())
        assert setup.engine.generate([request])[0].token_ids == result.token_ids, request.adapter
    setup.engine.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_do_not_depend_on_where_keys_and_values_came_from(
    setups: Setups, family: str
) -> None:
    """Sources computed, found, or lost and read again; more of them than a step has tokens."""
    setup = setups(family)
    source = list(range(60, 100))
    requests = setup.requests(source)
    expected: list[list[int]] = []
    for is_known in (False, True):
        before = setup.engine.stats.cached_tokens
        results = setup.engine.generate(requests)
        setup.assert_as_peft(requests, results)
        found = setup.engine.stats.cached_tokens - before
        assert found >= len(source) * len(requests) if is_known else found == 0
        expected = [result.token_ids for result in results]
    setup.assert_the_same_when_preempted(requests, expected)


def test_sources_are_shared_within_a_tenant_alone(bases: Bases) -> None:
    engine = Engine(EngineSpec(base_model=str(bases("mt5")), max_context_tokens=CONTEXT))

    def found(salt: str) -> int:
        before = engine.stats.cached_tokens
        asked = GenerationRequest(prompt_token_ids=[*range(20)], cache_salt=salt, max_tokens=2)
        engine.generate([asked])
        return engine.stats.cached_tokens - before

    assert [found("a"), found("b"), found("a")] == [0, 0, 20]
    apart = EngineSpec(base_model=str(bases("mt5")), max_context_tokens=CONTEXT, prefix_cache=False)
    engine = Engine(apart)
    assert [found("a"), found("a")] == [0, 0]


def test_what_is_not_defined_is_refused(bases: Bases, tmp_path: Path) -> None:
    seq2seq = Engine(EngineSpec(base_model=str(bases("mt5")), max_context_tokens=CONTEXT))
    for options in ({"prompt_logprobs": 1}, {"prompt_logprobs": 0, "max_tokens": 0}):
        with pytest.raises(RequestError, match="encoder reads the prompt") as caught:
            seq2seq.submit(GenerationRequest(prompt_token_ids=[7], **options))
        assert caught.value.param == "prompt_logprobs"
    with pytest.raises(ContextLengthError, match=r"\+ 1 that adapter and decoder take and"):
        seq2seq.submit(GenerationRequest(prompt_token_ids=[7] * CONTEXT))
    causal = make_adapter("lora", bases("llama"), tmp_path / "causal")
    with pytest.raises(AdapterError, match=r"'CAUSAL_LM'; on the base .* 'SEQ_2_SEQ_LM' alone"):
        seq2seq.add_adapter("a", causal)
    own = make_adapter("prompt_tuning", bases("mt5"), tmp_path / "own")
    with pytest.raises(AdapterError, match=r"'SEQ_2_SEQ_LM'; on the base .* 'CAUSAL_LM' alone"):
        Engine(EngineSpec(base_model=str(bases("llama")))).add_adapter("a", own)
    sparse = make_adapter("fishmask", bases("mt5"), tmp_path / "sparse")
    with pytest.raises(AdapterError, match=r"relative_attention_bias', which does not see"):
        seq2seq.add_adapter("a", sparse)
    small = EngineSpec(
        base_model=str(bases("mt5")), max_context_tokens=CONTEXT, small_bases=(str(bases("mt5")),)
    )
    with pytest.raises(BaseModelError, match="proxy-tuning is for decoders alone"):
        Engine(small)
    with pytest.raises(BaseModelError, match=r"in float32 where float16 is asked for.* bfloat16"):
        Engine(small.model_copy(update={"small_bases": (), "dtype": "float16"}))


def test_text_is_read_with_its_end_and_answered(bases: Bases) -> None:
    engine = Engine(EngineSpec(base_model=str(bases("mt5")), max_context_tokens=CONTEXT))
    tokenizer = engine.tokenizer
    by_text, by_ids = (
        engine.generate([GenerationRequest(max_tokens=6, ignore_eos=True, **prompt)])[0]
        for prompt in ({"prompt": "Hi"}, {"prompt_token_ids": tokenizer("Hi")["input_ids"]})
    )
    assert by_text == by_ids
    assert by_text.text == tokenizer.decode(by_text.token_ids, skip_special_tokens=True)
