"""Encoder-decoders: Graft's logits and greedy tokens are PEFT's, however many run together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import load, make_adapter, variants_of
from conftest import CONTEXT

from cluster.errors import AdapterError, BaseModelError, ContextLengthError, RequestError
from serving.engine import Engine, EngineSpec, GenerationRequest, ScoreRequest
from training import load_adapter

FAMILIES = ["t5", "mt5", "bart"]
PAIRS = [(family, variant) for family in FAMILIES for variant in variants_of(family)]
START = 256
NEW_TOKENS = 64
# (what the encoder reads, what the decoder does)
CASES = [
    ([72, 101, 108, 108, 111], [5, 6, 7]),
    ([7], []),
    (list(range(40, 70)), [200, 13, 13, 99, 5, 6, 7, 8, 9, 1, 2]),
]


class Setup:
    """One family: an engine with every adapter, and what PEFT says."""

    def __init__(self, base: Path, folder: Path, family: str) -> None:
        self.spec = EngineSpec(base_model=str(base), max_context_tokens=CONTEXT, max_step_tokens=48)
        self.base, self.engine = base, Engine(self.spec)
        self.folders = {v: make_adapter(v, base, folder / v) for v in variants_of(family)}
        for variant, path in self.folders.items():
            self.engine.add_adapter(variant, path)
        self._references: dict[str | None, Any] = {}

    @torch.no_grad()
    def logits(self, variant: str | None, source: list[int], answer: list[int]) -> torch.Tensor:
        """[1 + answer, vocabulary], by PEFT."""
        if variant not in self._references:
            model = load(self.base)
            adapted = model if variant is None else load_adapter(model, self.folders[variant])
            self._references[variant] = adapted.eval()
        decoder = torch.tensor([[START, *answer]])
        model = self._references[variant]
        return model(input_ids=torch.tensor([source]), decoder_input_ids=decoder).logits[0].float()

    def greedy(self, variant: str | None, source: list[int], new_tokens: int) -> list[int]:
        answer: list[int] = []
        for _ in range(new_tokens):
            answer.append(int(self.logits(variant, source, answer)[-1].argmax()))
        return answer


@pytest.fixture(scope="module", params=FAMILIES)
def setup(
    request: pytest.FixtureRequest,
    bases: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Setup:
    return Setup(bases(request.param), tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(("setup", "variant"), [*PAIRS, *((f, None) for f in FAMILIES)],
                         indirect=["setup"])  # fmt: skip
def test_logits_are_those_of_peft(setup: Setup, variant: str | None) -> None:
    asked = [ScoreRequest(source, variant, answer_token_ids=answer) for source, answer in CASES]
    changes: list[float] = []
    for (source, answer), logits in zip(CASES, setup.engine.score(asked), strict=True):
        expected = setup.logits(variant, source, answer)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        changes.append(float((logits - setup.logits(None, source, answer)).abs().max()))
    assert variant is None or max(changes) > 0.05, "the adapter changes nothing"


def test_greedy_tokens_are_those_of_peft_alone_and_mixed(setup: Setup) -> None:
    cases = [(variant, source) for source, _ in CASES[:2] for variant in (None, *setup.folders)]
    requests = [
        GenerationRequest(
            prompt_token_ids=source, adapter=variant, max_tokens=NEW_TOKENS, ignore_eos=True
        )
        for variant, source in cases
    ]
    expected = [setup.greedy(variant, source, NEW_TOKENS) for variant, source in cases]
    results = setup.engine.generate(requests)
    assert [result.token_ids for result in results] == expected
    assert [result.prompt_tokens for result in results] == [len(source) for _, source in cases]
    assert setup.engine.generate(requests[:1])[0].token_ids == expected[0]
    setup.engine.check()


def test_greedy_tokens_do_not_depend_on_where_keys_and_values_came_from(setup: Setup) -> None:
    """Sources computed, found, or lost and read again; more of them than a step has tokens."""
    source, new_tokens = list(range(60, 100)), 40
    requests = [
        GenerationRequest(
            prompt_token_ids=source, adapter=variant, max_tokens=new_tokens, ignore_eos=True
        )
        for variant in (None, *setup.folders)
    ]
    expected = [setup.greedy(r.adapter, source, new_tokens) for r in requests]
    for is_known in (False, True):
        before = setup.engine.stats.cached_tokens
        assert [r.token_ids for r in setup.engine.generate(requests)] == expected
        found = setup.engine.stats.cached_tokens - before
        assert found >= len(source) * len(requests) if is_known else found == 0
    page_bytes = 16 * 2 * sum(keys[0].nbytes for keys in setup.engine.runner.memory.keys)
    update = {"max_step_tokens": 11, "kv_cache_gib": 11.5 * page_bytes / 2**30}
    tight = Engine(setup.spec.model_copy(update=update))
    for variant, path in setup.folders.items():
        tight.add_adapter(variant, path)
    assert [r.token_ids for r in tight.generate(requests)] == expected
    assert tight.stats.preemptions > 0
    tight.check()


def test_sources_are_shared_within_a_tenant_alone(bases: Callable[[str], Path]) -> None:
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


def test_what_is_not_defined_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
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


def test_text_is_read_with_its_end_and_answered(bases: Callable[[str], Path]) -> None:
    engine = Engine(EngineSpec(base_model=str(bases("mt5")), max_context_tokens=CONTEXT))
    tokenizer = engine.tokenizer
    by_text, by_ids = (
        engine.generate([GenerationRequest(max_tokens=6, ignore_eos=True, **prompt)])[0]
        for prompt in ({"prompt": "Hi"}, {"prompt_token_ids": tokenizer("Hi")["input_ids"]})
    )
    assert by_text == by_ids
    assert by_text.text == tokenizer.decode(by_text.token_ids, skip_special_tokens=True)
