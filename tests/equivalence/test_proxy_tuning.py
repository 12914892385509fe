"""Proxy-tuning: what is served equals three models side by side, alone and in a mixed batch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from adapters import load, make_adapter, randomize
from conftest import CONTEXT, byte_tokenizer, make_base
from side_by_side import NEW_TOKENS, assert_greedy
from transformers import LlamaConfig, LlamaForCausalLM
from workers import Case, run_case

from cluster.errors import AdapterError, BaseModelError, ContextLengthError
from cluster.spec import parse_spec
from cluster.tables import write_table
from serving.engine import Engine, EngineSpec, GenerationRequest, ScoreRequest
from training import load_adapter
from training.command import plan, resolved
from training.data import tokenize
from training.methods import METHODS
from training.place import Place
from training.spec import TrainingSpec

Bases = Callable[[str], Path]
PROMPTS = [[72, 101, 108, 108, 111], [7], list(range(40, 70))]
SMALL_CONTEXT = 112  # shorter than the large base's
EXPERTS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 3},
    "bitfit": {"kind": "bitfit"},
    "prompt": {"kind": "prompt_tuning", "num_virtual_tokens": 5},
    "prefix": {"kind": "prefix_tuning", "num_virtual_tokens": 18},
}


def make_proxy(base: Path, small: Path, folder: Path, expert: str, alpha: float = 0.7) -> Path:
    document = {
        "base_model": str(base),
        "method": {"kind": "proxy_tuning", "small_base": str(small), "alpha": alpha,
                   "expert": EXPERTS[expert]},
        "data": {"train": "x"},
        "output": {"name": "x"},
    }  # fmt: skip
    spec = parse_spec(TrainingSpec, document)
    torch.manual_seed(3)
    model = METHODS["proxy_tuning"].attach(load(small), spec.method, str(base))
    randomize(model)
    METHODS["proxy_tuning"].save(model, folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another shape, and another family's context."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=261, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=SMALL_CONTEXT, eos_token_id=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2", "bloom"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(bases: Bases, family: str) -> Path:
    return bases(family)


@pytest.fixture(scope="module")
def folders(base: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Proxies of every expert, a second alpha, and neighbours without an offset."""
    root = tmp_path_factory.mktemp("adapters")
    made = {name: make_proxy(base, small, root / name, name) for name in EXPERTS}
    made["strong"] = make_proxy(base, small, root / "strong", "lora", alpha=2.0)
    return made | {
        name: make_adapter(name, base, root / f"own-{name}") for name in ("ia3", "p_tuning")
    }


def make_engine(base: Path, small: Path, folders: dict[str, Path], **limits: Any) -> Engine:
    # BLOOM's config tells no context.
    limits["max_context_tokens"] = CONTEXT
    engine = Engine(EngineSpec(base_model=str(base), small_bases=(str(small),), **limits))
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    return engine


@pytest.fixture(scope="module")
def engine(base: Path, small: Path, folders: dict[str, Path]) -> Engine:
    return make_engine(base, small, folders, max_step_tokens=23)


@pytest.mark.parametrize("name", [*EXPERTS, "strong"])
def test_logits_and_greedy_tokens_are_those_of_the_three_models(
    engine: Engine, base: Path, folders: dict[str, Path], name: str
) -> None:
    reference = load_adapter(load(base), folders[name])
    plain = engine.score([ScoreRequest(PROMPTS[2])])[0]
    for prompt in PROMPTS:
        (found,) = engine.score([ScoreRequest(prompt, name)])
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - plain).abs().max() > 0.05
    request = GenerationRequest(
        prompt_token_ids=PROMPTS[0], adapter=name, max_tokens=NEW_TOKENS, ignore_eos=True,
        logprobs=5,
    )  # fmt: skip
    (result,) = engine.generate([request])
    assert len(result.token_ids) == NEW_TOKENS
    assert_greedy(reference, request, result)


@pytest.fixture(scope="module")
def requests(folders: dict[str, Path]) -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt_token_ids=prompt, adapter=name, max_tokens=24, ignore_eos=True)
        for prompt in PROMPTS
        for name in (None, *folders)
    ]


@pytest.fixture(scope="module")
def alone(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    return [engine.generate([request])[0].token_ids for request in requests]


@pytest.mark.parametrize("limits", ["none", "pages", "chunks"])
def test_neighbours_preemption_and_chunks_change_no_token(
    engine: Engine,
    base: Path,
    small: Path,
    folders: dict[str, Path],
    requests: list[GenerationRequest],
    alone: list[list[int]],
    limits: str,
) -> None:
    mixed = engine
    if limits == "pages":
        page_bytes = engine.runner.page_bytes + 2 * 16 * 2 * 16 * 4
        mixed = make_engine(base, small, folders, kv_cache_gib=14 * page_bytes / 2**30)
    elif limits == "chunks":
        mixed = make_engine(base, small, folders, max_step_tokens=7, page_tokens=5)
    assert [result.token_ids for result in mixed.generate(requests)] == alone
    mixed.check()
    assert limits != "pages" or mixed.stats.preemptions > 0
    if mixed is not engine:
        for name in folders:
            mixed.remove_adapter(name)
        assert mixed.stats.free_pages == mixed.stats.num_pages


def test_the_experts_context_limits_the_request(engine: Engine) -> None:
    def ask(adapter: str, tokens: int) -> GenerationRequest:
        return GenerationRequest(
            prompt_token_ids=[1, 2], adapter=adapter, max_tokens=tokens, ignore_eos=True
        )

    assert len(engine.generate([ask("prefix", SMALL_CONTEXT - 20)])[0].token_ids) == 92
    with pytest.raises(ContextLengthError, match=f"{CONTEXT - SMALL_CONTEXT + 18} that the adap"):
        engine.generate([ask("prefix", SMALL_CONTEXT - 19)])


def test_a_small_base_is_named_by_the_engine_and_shares_the_vocabulary(
    base: Path, small: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    engine = Engine(EngineSpec(base_model=str(base), max_context_tokens=CONTEXT))
    with pytest.raises(AdapterError, match=r"names the small base .* engine.small_bases does not"):
        engine.add_adapter("a", folders["lora"])
    LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(BaseModelError, match=r"vocabulary of 300 tokens and .* one of 261"):
        make_engine(base, tmp_path, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"alpha": "much"}, "alpha"),
        ({"temperature": 2}, "has temperature = '2'"),
        ({"expert": {"peft_type": "PROXY_TUNING"}}, "expert without a peft_type of its own"),
        ({"expert": [1]}, "not an object"),
        ({"expert": {"peft_type": "LORA", "unread": True}}, "has unread"),
        ({"expert": {"peft_type": "LORA", "task_type": "SEQ_CLS"}}, "has task_type 'SEQ_CLS'"),
    ],
    ids=str,
)
def test_a_folder_that_is_not_sound_is_refused(
    engine: Engine, folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    for file in folders["lora"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=reason):
        engine.add_adapter("wrong", tmp_path)
    engine.check()


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_expert_is_what_training_it_alone_gives(
    base: Path, small: Path, tmp_path: Path
) -> None:
    rows = {"prompt": ["ab"] * 8, "completion": [f"c{i}" for i in range(8)]}
    write_table(pa.table(rows), tmp_path / "rows.parquet")
    expert = EXPERTS["lora"]
    proxy = {"kind": "proxy_tuning", "small_base": str(small), "expert": expert}
    made: list[Path] = []
    for base_model, method in ((base, proxy), (small, expert)):
        document = {
            "base_model": str(base_model), "method": method, "max_steps": 3,
            "data": {"train": str(tmp_path / "rows.parquet")}, "output": {"name": "x"},
            "zero": {"stage": 0},
        }  # fmt: skip
        spec = resolved(parse_spec(TrainingSpec, document))
        trained, total = plan(spec).trainable_parameters, plan(spec).all_parameters
        assert 0 < trained < total < sum(p.numel() for p in load(base).parameters())
        assert spec.data.max_length == SMALL_CONTEXT
        tokenize(spec.data, byte_tokenizer(), tmp_path / "tokens")
        folder = tmp_path / str(spec.method.kind)
        run_case(Case(spec.model_dump(mode="json"), folder), tmp_path / "tokens", Place())
        made.append(folder / "adapter" / "adapter_model.safetensors")
    assert made[0].read_bytes() == made[1].read_bytes()


def test_another_tokenizer_is_refused_before_training(small: Path, tmp_path: Path) -> None:
    from cluster.errors import SpecError

    other = make_base("llama", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SpecError, match="its tokenizer is another than that of base_model"):
        make_proxy(other, small, tmp_path / "adapter", "lora")
