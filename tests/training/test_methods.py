"""The methods: what is trained, what is saved, and that it loads where it should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import load, randomize
from conftest import byte_tokenizer
from safetensors.torch import load_file
from transformers import BloomConfig

from cluster.errors import AdapterError, SpecError
from cluster.linear import adopt
from cluster.spec import parse_spec
from training import load_adapter
from training.command import plan
from training.methods import METHODS, count_parameters, trainable_parameters
from training.spec import TrainingSpec
from training.step import LossModel, collate

Bases = Callable[[str], Path]
FAMILIES = ["llama", "gpt2"]


def attach(base: Path, **method: Any) -> tuple[Any, Any]:
    """(model, its spec) of a method on a fresh base."""
    spec = parse_spec(
        TrainingSpec,
        {
            "base_model": str(base),
            "method": method,
            "data": {"train": "x"},
            "output": {"name": "x"},
        },
    ).method
    torch.manual_seed(0)
    model = load(base)
    adopt(model)  # as `load_base` does
    return METHODS[spec.kind].attach(model, spec, str(base)), spec


CASES: list[dict[str, Any]] = [
    {"kind": "lora", "r": 3, "rank_pattern": {"q_proj|c_attn": 2}},
    {"kind": "lora", "r": 3, "use_dora": True, "modules_to_save": ["lm_head"]},
    {"kind": "lora", "r": 3, "init": "pissa", "rank_pattern": {"q_proj|c_attn": 2}},
    {"kind": "lora", "r": 3, "init": "olora", "use_rslora": True, "use_dora": True},
    {"kind": "adalora", "r": 2, "init_r": 3},
    {"kind": "dylora", "r": 3, "layers_to_transform": [1]},
    {"kind": "ia3"},
    {"kind": "bitfit"},
    {"kind": "layernorm"},
    {"kind": "fishmask", "share": 0.02},
    {"kind": "fishmask", "share": 0.02, "target_modules": ["lm_head"]},
    {"kind": "child_tuning"},
    {"kind": "child_tuning", "target_modules": r".*\.(q_proj|c_attn)"},
    {"kind": "full"},
    {"kind": "bottleneck", "placement": "houlsby", "activation": "gelu"},
    {"kind": "bottleneck", "placement": "parallel", "scaling": 4.0},
    {"kind": "llama_adapter", "adapter_len": 4},
    {"kind": "prompt_tuning", "num_virtual_tokens": 4},
    {"kind": "prompt_tuning", "num_virtual_tokens": 4, "init": "text", "init_text": "Say it"},
    {"kind": "prompt_tuning", "num_virtual_tokens": 4, "init": "vocabulary"},
    {"kind": "p_tuning", "num_virtual_tokens": 4},
    {"kind": "p_tuning", "num_virtual_tokens": 4, "encoder": "lstm", "encoder_hidden_size": 8},
    {"kind": "prefix_tuning", "num_virtual_tokens": 4},
    {"kind": "prefix_tuning", "num_virtual_tokens": 4, "projection": True},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values()))[:40])
def test_a_saved_adapter_loads_to_the_same_logits(
    bases: Bases, family: str, case: dict[str, Any], tmp_path: Path
) -> None:
    base = bases(family)
    model, spec = attach(base, **case)
    randomize(model)
    METHODS[spec.kind].save(model, tmp_path)
    ids = torch.arange(20)[None] % 250
    with torch.no_grad():
        expected = model.eval()(ids).logits
        found = load_adapter(load(base), tmp_path)(ids).logits
        plain = load(base)(ids).logits
    assert (expected - found).abs().max() < 1e-5
    assert (expected[:, -20:] - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    "case", [c for c in CASES if METHODS[c["kind"]].peft_type is None], ids=str
)
def test_what_peft_knows_plain_peft_loads(
    bases: Bases, case: dict[str, Any], tmp_path: Path
) -> None:
    model, spec = attach(bases("llama"), **case)
    randomize(model)
    METHODS[spec.kind].save(model, tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(load(bases("llama")), str(tmp_path)).eval()(ids)
        assert (model.eval()(ids).logits - found.logits).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values()))[:40])
def test_only_the_methods_parameters_get_gradients(
    bases: Bases, family: str, case: dict[str, Any]
) -> None:
    model, _ = attach(bases(family), **case)
    ids = torch.arange(12)[None]
    model(ids).logits.square().mean().backward()
    trained = trainable_parameters(model)
    assert 0 < count_parameters(model)[0] == sum(p.numel() for p in trained.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values()))[:40])
def test_gradients_through_onednn_are_those_of_torchs_own_products(
    bases: Bases, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(least: int) -> dict[str, torch.Tensor]:
        # Tiny products take torch's own way, those of real sizes the other.
        monkeypatch.setattr("cluster.linear._LEAST_PRODUCTS", least)
        model, _ = attach(bases("llama"), **case)
        ids = list(range(12))
        rows = collate([(ids, ids), (ids[3:9], ids[3:9])], torch.device("cpu"))
        LossModel(model.train())(rows).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    torch.testing.assert_close(gradients(0), gradients(2**60), atol=1e-5, rtol=1e-4)


def test_bitfit_adds_zero_biases_where_there_are_none_and_starts_as_the_base(bases: Bases) -> None:
    base = load(bases("llama"))
    assert not any(name.endswith("bias") for name, _ in base.named_parameters())
    model, _ = attach(bases("llama"), kind="bitfit")
    names = set(trainable_parameters(model))
    assert "model.layers.0.self_attn.q_proj.bias" in names
    assert "lm_head.bias" not in names
    ids = torch.arange(12)[None]
    assert torch.equal(model.eval()(ids).logits, base.eval()(ids).logits)


def test_bitfit_trains_the_biases_that_are_there(bases: Bases) -> None:
    model, _ = attach(bases("gpt2"), kind="bitfit")
    own = {n for n, _ in load(bases("gpt2")).named_parameters() if n.endswith("bias")}
    assert set(trainable_parameters(model)) == own


def test_bitfits_subsets(bases: Bases) -> None:
    """The paper's small subset is the query and what widens in the MLP."""

    def trained(family: str, **method: Any) -> set[str]:
        names = trainable_parameters(attach(bases(family), kind="bitfit", **method)[0])
        return {".".join(name.split(".")[-3:-1]) for name in names}

    small = {"self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"}
    assert trained("llama", subset="query_mlp") == small
    assert trained("phi", subset="query_mlp") == {"self_attn.q_proj", "mlp.fc1"}
    assert trained("gpt2", subset="norm") == {"0.ln_1", "0.ln_2", "1.ln_1", "1.ln_2",
                                              "transformer.ln_f"}  # fmt: skip
    assert trained("qwen2_moe", add_missing=False) == {f"self_attn.{x}_proj" for x in "qkv"}
    for family, method, message in (
        ("gpt2", {"subset": "query_mlp"}, "finds no query"),
        ("llama", {"subset": "norm"}, "has no bias in norm; use subset all, with method.add_m"),
        ("llama", {"subset": "norm", "add_missing": False}, "no bias in norm; use subset all"),
        ("llama", {"add_missing": False}, "has no bias in all; set method.add_missing"),
    ):
        with pytest.raises(SpecError, match=message):
            attach(bases(family), kind="bitfit", **method)


def test_llama_adapter_is_refused_where_peft_cannot(bases: Bases) -> None:
    for family, message in (("phi", "Unsupported model type"), ("gemma", "heads of 16")):
        with pytest.raises(SpecError, match=message):
            attach(bases(family), kind="llama_adapter")
    with pytest.raises(SpecError, match=r"adapter_layers: 3 is more than .*at most 2"):
        attach(bases("llama"), kind="llama_adapter", adapter_layers=3)


def test_layernorm_takes_norms_alone(bases: Bases) -> None:
    model, _ = attach(bases("qwen3"), kind="layernorm", target_modules=["norm", "q_norm"])
    assert len(trainable_parameters(model)) == 3
    with pytest.raises(SpecError, match="is no norm"):
        attach(bases("llama"), kind="layernorm", target_modules=["q_proj"])
    with pytest.raises(SpecError, match=r"'nrm'.* matches no module .*input_layernorm"):
        attach(bases("llama"), kind="layernorm", target_modules=["nrm"])


def test_bitfit_targets_by_suffix_and_by_expression(bases: Bases) -> None:
    by_list, _ = attach(bases("llama"), kind="bitfit", target_modules=["q_proj"])
    by_regex, _ = attach(bases("llama"), kind="bitfit", target_modules=r".*\.q_proj")
    expected = {f"model.layers.{i}.self_attn.q_proj.bias" for i in (0, 1)}
    assert set(trainable_parameters(by_list)) == set(trainable_parameters(by_regex)) == expected


@pytest.mark.parametrize(
    ("kind", "good", "options"),
    [
        ("lora", "q_proj", {}),
        ("adalora", "q_proj", {"r": 2, "init_r": 3}),
        ("dylora", "q_proj", {}),
        ("ia3", "down_proj", {"feedforward_modules": ["down_proj"]}),
        ("bitfit", "q_proj", {}),
        ("layernorm", "norm", {}),
        ("fishmask", "q_proj", {}),
        ("child_tuning", "q_proj", {}),
    ],
)
def test_a_target_that_matches_nothing_lists_what_there_is(
    bases: Bases, kind: str, good: str, options: dict[str, Any]
) -> None:
    """Beside one that matches, too: what is left would be trained without it."""
    model, _ = attach(bases("llama"), kind=kind, target_modules=[good], **options)
    assert trainable_parameters(model)
    for targets in (["vproj"], [good, "vproj"]):
        with pytest.raises(SpecError, match=rf"target_modules: 'vproj' matches no .*; .*{good}"):
            attach(bases("llama"), kind=kind, target_modules=targets, **options)


@pytest.mark.parametrize("method", [{"kind": "dylora"}, {"kind": "lora", "init": "pissa"}])
def test_what_needs_linear_modules_is_refused_on_experts(
    bases: Bases, method: dict[str, str]
) -> None:
    """PEFT takes these in where all linear modules are meant."""
    with pytest.raises(SpecError, match=r"means the parameter '.*gate.weight' too, where it can"):
        attach(bases("mixtral"), **method)
    with pytest.raises(SpecError, match=r"exclude_modules: means '.*gate', whose parameters PEFT"):
        attach(bases("mixtral"), kind="lora", exclude_modules=["gate"])


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_refused(bases: Bases, field: str) -> None:
    with pytest.raises(SpecError, match=rf"method.{field}: 'qproj' matches no targeted module"):
        attach(bases("llama"), kind="lora", **{field: {"qproj": 2, "v_proj": 3}})


def test_ia3_asks_for_targets_where_peft_knows_none(bases: Bases) -> None:
    with pytest.raises(SpecError, match="target_modules and method"):
        attach(bases("qwen2_moe"), kind="ia3")
    with pytest.raises(SpecError, match=r"both, or neither; feedforward_modules: \[\] scales"):
        attach(bases("llama"), kind="ia3", target_modules=["k_proj"])
    wrong = {"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}
    with pytest.raises(SpecError, match="feedforward_modules: 'down_proj' is not in method"):
        attach(bases("llama"), kind="ia3", **wrong)
    wrong = {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj", "fc1"]}
    with pytest.raises(SpecError, match="feedforward_modules: 'fc1' matches no module"):
        attach(bases("llama"), kind="ia3", **wrong)


def test_ia3_takes_attention_alone(bases: Bases, tmp_path: Path) -> None:
    asked = {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    model, spec = attach(bases("llama"), kind="ia3", **asked)
    assert {name.split(".")[-3] for name in trainable_parameters(model)} == {"k_proj", "v_proj"}
    randomize(model)
    METHODS[spec.kind].save(model, tmp_path)
    ids = torch.arange(12)[None]
    found = load_adapter(load(bases("llama")), tmp_path)(ids).logits
    assert (model.eval()(ids).logits - found).abs().max() < 1e-5
    assert (load(bases("llama"))(ids).logits - found).abs().max() > 1e-2


def test_init_text_starts_from_the_texts_embeddings(bases: Bases) -> None:
    model, _ = attach(
        bases("llama"), kind="prompt_tuning", num_virtual_tokens=8, init="text", init_text="abc"
    )
    (prompt,) = trainable_parameters(model).values()
    ids = byte_tokenizer()("abc" * 3)["input_ids"][:8]
    assert torch.equal(prompt, load(bases("llama")).get_input_embeddings().weight[ids])


def test_init_vocabulary_starts_from_tokens_that_the_seed_draws(bases: Bases) -> None:
    prompts: list[torch.Tensor] = []
    for _ in range(2):  # `attach` seeds both alike
        model, _ = attach(
            bases("llama"), kind="prompt_tuning", num_virtual_tokens=8, init="vocabulary"
        )
        prompts += trainable_parameters(model).values()
    assert torch.equal(*prompts)
    words = load(bases("llama")).get_input_embeddings().weight
    found = [(words == row).all(-1).nonzero() for row in prompts[0]]
    assert all(len(rows) == 1 for rows in found)
    assert len({int(rows) for rows in found}) > 1


def test_init_text_and_its_text_go_together(bases: Bases) -> None:
    for settings in ({"init": "text"}, {"init_text": "abc"}):
        with pytest.raises(SpecError, match="both, or neither"):
            attach(bases("llama"), kind="prompt_tuning", **settings)


def test_the_published_count_of_bloom_1b4_zh_follows_from_its_config_alone(tmp_path: Path) -> None:
    """Through the plan of `graft train`, without weights."""
    config = BloomConfig(vocab_size=46_145, hidden_size=2_048, n_layer=24, n_head=16)
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # its weights are never opened
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    found = plan(
        parse_spec(
            TrainingSpec,
            {
                "base_model": str(tmp_path),
                "method": {"kind": "prompt_tuning", "num_virtual_tokens": 10},
                "data": {"train": str(tmp_path / "rows.jsonl")},
                "output": {"name": "x"},
            },
        )
    )
    assert (found.trainable_parameters, found.all_parameters) == (20_480, 1_303_132_160)


def test_a_projected_prefix_is_stored_without_its_mlp(bases: Bases, tmp_path: Path) -> None:
    model, spec = attach(
        bases("llama"), kind="prefix_tuning", num_virtual_tokens=4, projection=True,
        projection_hidden_size=16,
    )  # fmt: skip
    assert count_parameters(model)[0] > 1000
    METHODS[spec.kind].save(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(t.shape) for key, t in stored.items()} == {
        "prompt_embeddings": (4, 2 * 2 * 2 * 8)
    }


def test_an_adapter_for_another_base_is_refused(bases: Bases, tmp_path: Path) -> None:
    model, spec = attach(bases("gpt2"), kind="bitfit")
    METHODS[spec.kind].save(model, tmp_path)
    with pytest.raises(AdapterError, match="the base has no"):
        load_adapter(load(bases("llama")), tmp_path)
