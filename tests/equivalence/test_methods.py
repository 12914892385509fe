"""Every method, on several families: Graft's logits and greedy tokens are PEFT's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import load, make_adapter, randomize, variants_of
from conftest import CONTEXT
from safetensors.torch import save_file

from cluster.errors import AdapterError, BaseModelError, RequestError
from serving.adapters import describe, lower
from serving.engine import Engine, EngineSpec, GenerationRequest, ScoreRequest
from training import load_adapter

FLAT = ["llama", "qwen3", "mistral", "gpt2", "gemma", "opt", "phi", "qwen2_moe"]
PADDED = ["bloom", "falcon", "falcon_alibi", "falcon_multi_query", "gptj", "mpt", "gemma2"]
FAMILIES = [*FLAT, *PADDED]
PAIRS = [(family, variant) for family in FAMILIES for variant in variants_of(family)]
TOLERANCE = 1e-4
NEW_TOKENS = 64
PROMPTS = [
    [72, 101, 108, 108, 111],
    [7],
    list(range(40, 70)),
    [200, 13, 13, 99, 5, 6, 7, 8, 9, 1, 2],
]


class Setup:
    """One family: an engine with every adapter, and what PEFT says."""

    def __init__(self, base: Path, folder: Path, variants: Sequence[str]) -> None:
        self.base = base
        self.folders = {v: make_adapter(v, base, folder / v) for v in variants}
        # BLOOM's config tells no context.
        self.spec = EngineSpec(base_model=str(base), max_context_tokens=CONTEXT, max_step_tokens=48)
        self.engine = Engine(self.spec)
        for variant, path in self.folders.items():
            self.engine.add_adapter(variant, path)
        self._references: dict[str | None, Any] = {}

    def reference(self, variant: str | None) -> Any:
        if variant not in self._references:
            model = load(self.base)
            adapted = model if variant is None else load_adapter(model, self.folders[variant])
            self._references[variant] = adapted.eval()
        return self._references[variant]

    @torch.no_grad()
    def reference_logits(self, variant: str | None, ids: list[int]) -> torch.Tensor:
        """[tokens, vocabulary], without the rows of virtual tokens."""
        model = self.reference(variant)
        return model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].float()

    def reference_greedy(
        self, variant: str | None, prompt: list[int], new_tokens: int = NEW_TOKENS
    ) -> list[int]:
        ids = list(prompt)
        for _ in range(new_tokens):
            ids.append(int(self.reference_logits(variant, ids)[-1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module", params=FAMILIES)
def setup(
    request: pytest.FixtureRequest,
    bases: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Setup:
    family = request.param
    return Setup(bases(family), tmp_path_factory.mktemp(family), variants_of(family))


@pytest.mark.parametrize(("setup", "variant"), [*PAIRS, *((f, None) for f in FAMILIES)],
                         indirect=["setup"])  # fmt: skip
def test_logits_are_those_of_peft(setup: Setup, variant: str | None) -> None:
    scored = setup.engine.score([ScoreRequest(prompt, variant) for prompt in PROMPTS])
    for prompt, logits in zip(PROMPTS, scored, strict=True):
        expected = setup.reference_logits(variant, prompt)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("setup", "variant"), PAIRS, indirect=["setup"])
def test_the_adapter_changes_the_logits(setup: Setup, variant: str) -> None:
    """Otherwise the test above would show nothing."""
    adapted, plain = setup.engine.score([ScoreRequest(PROMPTS[0], v) for v in (variant, None)])
    assert (adapted - plain).abs().max() > 0.05


def test_greedy_tokens_are_those_of_peft_alone_and_mixed(setup: Setup) -> None:
    cases = [(variant, prompt) for prompt in PROMPTS[:2] for variant in (None, *setup.folders)]
    requests = [
        GenerationRequest(
            prompt_token_ids=prompt, adapter=variant, max_tokens=NEW_TOKENS, ignore_eos=True
        )
        for variant, prompt in cases
    ]
    expected = [setup.reference_greedy(variant, prompt) for variant, prompt in cases]
    mixed = [result.token_ids for result in setup.engine.generate(requests)]
    assert mixed == expected
    for request, tokens in zip(requests, expected, strict=True):
        assert setup.engine.generate([request])[0].token_ids == tokens
    setup.engine.check()


def test_greedy_tokens_do_not_depend_on_where_keys_and_values_came_from(setup: Setup) -> None:
    """Computed, found in the cache, computed in chunks, or lost and computed or found again."""
    prompt, new_tokens = list(range(60, 100)), 16
    requests = [
        GenerationRequest(
            prompt_token_ids=prompt, adapter=variant, max_tokens=new_tokens, ignore_eos=True
        )
        for variant in (None, *setup.folders)
    ]
    expected = [setup.reference_greedy(r.adapter, prompt, new_tokens) for r in requests]
    for found in (0, 32 * len(requests)):
        before = setup.engine.stats.cached_tokens
        assert [r.token_ids for r in setup.engine.generate(requests)] == expected
        assert setup.engine.stats.cached_tokens == before + found
    page_bytes = 16 * 2 * sum(keys[0].nbytes for keys in setup.engine.runner.memory.keys)
    tight = Engine(
        setup.spec.model_copy(
            update={"max_step_tokens": 11, "kv_cache_gib": 11.5 * page_bytes / 2**30}
        )
    )
    for variant, path in setup.folders.items():
        tight.add_adapter(variant, path)
    for _ in range(2):
        assert [r.token_ids for r in tight.generate(requests)] == expected
        tight.check()
    assert tight.stats.preemptions > 0


def test_a_request_chooses_the_rank_of_a_dylora(bases: Callable[[str], Path]) -> None:
    """Requests of all ranks in one batch, each with the logits and tokens of a LoRA of its rank."""
    base, folder = bases("llama"), bases("llama").parent / "dylora-ranks"
    engine = Engine(EngineSpec(base_model=str(base)))
    engine.add_adapter("a", make_adapter("dylora", base, folder))
    ranks: list[int | None] = [2, 3, 4, None, 2]
    requests = [
        GenerationRequest(
            prompt_token_ids=PROMPTS[2], adapter="a", adapter_rank=rank, max_tokens=8,
            ignore_eos=True,
        )
        for rank in ranks
    ]  # fmt: skip
    mixed = [result.token_ids for result in engine.generate(requests)]
    scored = engine.score([ScoreRequest(PROMPTS[2], "a", rank) for rank in ranks])
    for rank, tokens, logits in zip(ranks, mixed, scored, strict=True):
        model: Any = load_adapter(load(base), folder)
        for layer in model.modules():
            if hasattr(layer, "lora_A") and rank is not None:
                layer.lora_A["default"].weight.data[rank:] = 0
                layer.scaling["default"] *= 4 / rank
        with torch.no_grad():
            ids = list(PROMPTS[2])
            expected = model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
            for token in tokens:
                assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
                ids.append(token)
    assert (scored[0] - scored[1]).abs().max() > 0.05
    engine.remove_adapter("a")
    assert engine.stats.adapters == 0
    engine.check()


def test_a_rank_that_an_adapter_has_not_is_refused(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_lora_on_embedding_and_head(
    bases: Callable[[str], Path], tmp_path: Path, family: str, copies: bool
) -> None:
    """Gemma scales its embeddings; PEFT saves copies of the base's own by default."""
    base = bases(family)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, target_modules=["embed_tokens", "lm_head", "q_proj"]
    )
    torch.manual_seed(2)
    model = peft.get_peft_model(load(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(str(tmp_path), save_embedding_layers=copies)
    engine = Engine(EngineSpec(base_model=str(base)))
    engine.add_adapter("a", tmp_path)
    logits = engine.score([ScoreRequest(PROMPTS[2], "a"), ScoreRequest(PROMPTS[2])])
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[2]])
        torch.testing.assert_close(logits[0], model(ids).logits[0], atol=TOLERANCE, rtol=0)
        with model.disable_adapter():
            torch.testing.assert_close(logits[1], model(ids).logits[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_llama_adapter(bases: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Where PEFT has it; another adapter runs beside it in the batch."""
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    torch.manual_seed(2)
    model = peft.get_peft_model(load(bases(family)), config).eval()
    randomize(model)
    model.save_pretrained(str(tmp_path / "a"))
    engine = Engine(EngineSpec(base_model=str(bases(family))))
    engine.add_adapter("a", tmp_path / "a")
    engine.add_adapter("b", make_adapter("ia3", bases(family), tmp_path / "b"))
    requests = [ScoreRequest(PROMPTS[i], name) for i, name in ((0, "b"), (2, "a"), (3, "a"))]
    for index, logits in list(zip((0, 2, 3), engine.score(requests), strict=True))[1:]:
        with torch.no_grad():
            expected = model(torch.tensor([PROMPTS[index]])).logits[0]
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of PEFT's own tensors
def test_a_shira_folder(bases: Callable[[str], Path], tmp_path: Path) -> None:
    config = peft.ShiraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], init_weights=False
    )
    torch.manual_seed(2)
    model = peft.get_peft_model(load(bases("llama")), config).eval()
    model.save_pretrained(str(tmp_path))
    engine = Engine(EngineSpec(base_model=str(bases("llama"))))
    engine.add_adapter("a", tmp_path)
    (logits,) = engine.score([ScoreRequest(PROMPTS[2], "a")])
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[2]])).logits[0]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


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
    bases: Callable[[str], Path], tmp_path: Path, key: str, tensor: torch.Tensor, message: str
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


def test_a_base_that_keeps_other_state_is_refused_by_name(bases: Callable[[str], Path]) -> None:
    with pytest.raises(BaseModelError, match=r"RecurrentGemma.* is not served.* of one shape"):
        Engine(EngineSpec(base_model=str(bases("recurrent_gemma")), max_context_tokens=64))


def test_a_llama_adapter_is_refused_where_queries_are_not_seen(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    at = "base_model.model.model.layers.1.self_attn.adaption_"
    tensors = {f"{at}prompt": torch.ones(1, 4, 32), f"{at}gate": torch.ones(1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADAPTION_PROMPT"}')
    engine = Engine(EngineSpec(base_model=str(bases("gemma2"))))
    with pytest.raises(AdapterError, match="LLaMA-Adapter, which needs each layer's queries"):
        engine.add_adapter("a", tmp_path)
