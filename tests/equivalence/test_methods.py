"""Every method, on several families: Graft's logits and greedy tokens are PEFT's."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import load, make_adapter, variants_of
from conftest import CONTEXT
from safetensors.torch import load_file, save_file
from side_by_side import (
    NEW_TOKENS,
    TOLERANCE,
    SideBySide,
    assert_greedy,
    logits_of,
)

from cluster.errors import AdapterError, BaseModelError, RequestError
from serving.adapters import describe, lower
from serving.engine import Engine, EngineSpec, GenerationRequest, ScoreRequest
from serving.engine.flat import FlatPass
from serving.engine.padded import PaddedPass
from training import load_adapter

Bases = Callable[[str], Path]
Setups = Callable[[str], SideBySide]
FLAT = [
    "llama", "qwen3", "mistral", "gpt2", "gemma", "opt", "phi", "qwen2_moe", "mixtral", "qwen3_moe",
]  # fmt: skip
PADDED = [
    "bloom", "falcon", "falcon_alibi", "falcon_multi_query", "gptj", "mpt", "gemma2", "deepseek_v3",
    "gpt_oss",
]  # fmt: skip
FAMILIES = [*FLAT, *PADDED]
PAIRS = [(family, variant) for family in FAMILIES for variant in variants_of(family)]
PROMPTS = [
    [72, 101, 108, 108, 111],
    [7],
    list(range(40, 70)),
    [200, 13, 13, 99, 5, 6, 7, 8, 9, 1, 2],
]


@pytest.fixture(scope="module")
def setups(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Setups:
    """Made at a family's first use, since it takes longer than a test."""

    @cache
    def setup(family: str) -> SideBySide:
        made = SideBySide(bases(family), tmp_path_factory.mktemp(family), family)
        assert type(made.engine.runner._pass) is (FlatPass if family in FLAT else PaddedPass)
        return made

    return setup


@pytest.mark.parametrize(("family", "variant"), [*PAIRS, *((f, None) for f in FAMILIES)])
def test_logits_are_those_of_peft(setups: Setups, family: str, variant: str | None) -> None:
    setup = setups(family)
    scored = setup.engine.score([ScoreRequest(prompt, variant) for prompt in PROMPTS])
    for prompt, logits in zip(PROMPTS, scored, strict=True):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, setup.logits(variant, prompt), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("family", "variant"), PAIRS)
def test_the_adapter_changes_the_logits(setups: Setups, family: str, variant: str) -> None:
    """Otherwise the test above would show nothing."""
    setup = setups(family)
    adapted, plain = setup.engine.score([ScoreRequest(PROMPTS[0], v) for v in (variant, None)])
    assert (adapted - plain).abs().max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_peft_alone_and_mixed(setups: Setups, family: str) -> None:
    """And log probabilities, in the mixed batch, which many steps cut prompts of."""
    setup = setups(family)
    requests = setup.requests(*PROMPTS[1:3], logprobs=5)
    mixed = setup.engine.generate(requests)
    setup.assert_as_peft(requests, mixed)
    longer = [*zip(requests, mixed, strict=True)][len(requests) // 2 :]
    for request, result in longer:
        assert setup.engine.generate([request])[0].token_ids == result.token_ids, request.adapter
    setup.engine.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_do_not_depend_on_where_keys_and_values_came_from(
    setups: Setups, family: str
) -> None:
    """Computed, found in the cache, computed in chunks, or lost and computed or found again."""
    setup = setups(family)
    requests = setup.requests(list(range(60, 100)))
    expected: list[list[int]] = []
    for found in (0, 32 * len(requests)):
        before = setup.engine.stats.cached_tokens
        results = setup.engine.generate(requests)
        setup.assert_as_peft(requests, results)
        assert setup.engine.stats.cached_tokens == before + found
        expected = [result.token_ids for result in results]
    setup.assert_the_same_when_preempted(requests, expected)


@pytest.mark.parametrize("family", [f for f in [*FAMILIES, "t5"] if "dylora" in variants_of(f)])
def test_a_request_chooses_the_rank_of_a_dylora(bases: Bases, tmp_path: Path, family: str) -> None:
    """Requests of all ranks in one batch, each with the logits and tokens of a LoRA of its rank."""
    base, prompt = bases(family), PROMPTS[2]
    engine = Engine(EngineSpec(base_model=str(base), max_context_tokens=CONTEXT))
    engine.add_adapter("a", make_adapter("dylora", base, tmp_path))
    ranks: list[int | None] = [2, 3, 4, None, 2]
    requests = [
        GenerationRequest(
            prompt_token_ids=prompt, adapter="a", adapter_rank=rank, max_tokens=NEW_TOKENS,
            ignore_eos=True, logprobs=5,
        )
        for rank in ranks
    ]  # fmt: skip
    mixed = engine.generate(requests)
    answer = [5, 6] if engine.runner.target.is_seq2seq else []
    scored = engine.score([ScoreRequest(prompt, "a", rank, answer) for rank in ranks])
    for request, result, logits in zip(requests, mixed, scored, strict=True):
        rank = request.adapter_rank
        model: Any = load_adapter(load(base), tmp_path)
        for layer in model.modules():
            if hasattr(layer, "lora_A") and rank is not None:
                layer.lora_A["default"].weight.data[rank:] = 0
                layer.scaling["default"] *= 4 / rank
        expected = logits_of(model, prompt, answer)
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        assert_greedy(model, request, result)
    assert (scored[0] - scored[1]).abs().max() > 0.05
    engine.remove_adapter("a")
    assert engine.stats.adapters == 0
    engine.check()


def test_a_rank_that_an_adapter_has_not_is_refused(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    engine = Engine(EngineSpec(base_model=str(base)))
    for variant in ("lora", "dylora"):
        engine.add_adapter(variant, make_adapter(variant, base, tmp_path / variant))
    for adapter, rank, message in [
        ("dylora", 1, "adapter_rank is 1, but the adapter 'dylora' has ranks 2 to 4"),
        ("dylora", 0, "adapter_rank is 0; it must be"),
        ("lora", 2, "the adapter 'lora' is no DyLoRA"),
        (None, 2, "adapter_rank is of an adapter"),
    ]:
        with pytest.raises(RequestError, match=message):
            engine.submit(
                GenerationRequest(prompt_token_ids=[7], adapter=adapter, adapter_rank=rank)
            )


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", "embeddings"), ("gemma", "embeddings"), ("qwen3", "lora"), ("phi", "lora"),
        ("llama", "ia3"), ("llama", "layernorm"), ("llama", "shira"), ("llama", "lokr"),
    ],
)  # fmt: skip
def test_copies_of_the_bases_embeddings_change_nothing(
    bases: Bases, tmp_path: Path, family: str, variant: str
) -> None:
    """Whole or rounded. PEFT saves them where an embedding is a target, or if it is told to."""
    base, key = bases(family), "base_model.model.lm_head"
    model: Any = load_adapter(load(base), make_adapter(variant, base, tmp_path / "made"))
    engine = Engine(EngineSpec(base_model=str(base)))
    for name, has_copies in (("bare", False), ("copies", True), ("rounded", True)):
        model.save_pretrained(str(tmp_path / name), save_embedding_layers=has_copies)
        path = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(path)
        names = [k for k in tensors if re.search(r"(_tokens|head)(\.base_layer)?\.weight$", k)]
        copies = {k: tensors[k].half() for k in names}
        assert bool(copies) == has_copies
        if name == "rounded":
            save_file(tensors | copies, path)
        engine.add_adapter(name, tmp_path / name)
    bare, *others = engine.score([ScoreRequest(PROMPTS[2], n) for n in engine.adapters])
    assert all(torch.equal(bare, other) for other in others)
    weight = load(base).get_output_embeddings().weight.detach()
    save_file(tensors | {f"{key}.weight": weight + 1}, path)
    with pytest.raises(AdapterError, match="which differs from the base's weights"):
        engine.add_adapter("other", path.parent)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("q_proj.weight.indices", torch.tensor([3, 3], dtype=torch.int32), "do not rise"),
        ("q_proj.weight.indices", torch.tensor([3, 1024], dtype=torch.int32), "to below 1024"),
        ("q_proj.weight.indices", torch.tensor([3], dtype=torch.int32), "one for each value"),
        ("q_proj.weight.scores", torch.ones(2), "no change of a weight"),
        ("q_proj.bias.delta", torch.ones(32), "no such parameter"),
        ("k_proj.weight.delta", torch.ones(32, 32), r"one of shape \(16, 32\)"),
        ("r_proj.weight.delta", torch.ones(32, 32), "has no module"),
    ],
)
def test_a_damaged_sparse_delta_is_refused(
    bases: Bases, tmp_path: Path, key: str, tensor: torch.Tensor, message: str
) -> None:
    at = "base_model.model.model.layers.0.self_attn."
    tensors = {
        f"{at}q_proj.weight.values": torch.ones(2),
        f"{at}q_proj.weight.indices": torch.tensor([3, 9], dtype=torch.int32),
        f"{at}{key}": tensor,
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "SPARSE_DELTA"}')
    target = describe(load(bases("llama")), "llama")
    with pytest.raises(AdapterError, match=message):
        lower(tmp_path, target)


def test_a_base_that_keeps_other_state_is_refused_by_name(bases: Bases) -> None:
    with pytest.raises(BaseModelError, match=r"RecurrentGemma.* is not served.* of one shape"):
        Engine(EngineSpec(base_model=str(bases("recurrent_gemma")), max_context_tokens=64))


def test_a_llama_adapter_is_refused_where_queries_are_not_seen(
    bases: Bases, tmp_path: Path
) -> None:
    at = "base_model.model.model.layers.1.self_attn.adaption_"
    tensors = {f"{at}prompt": torch.ones(1, 4, 32), f"{at}gate": torch.ones(1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADAPTION_PROMPT"}')
    engine = Engine(EngineSpec(base_model=str(bases("gemma2"))))
    with pytest.raises(AdapterError, match="LLaMA-Adapter, which needs each layer's queries"):
        engine.add_adapter("a", tmp_path)
