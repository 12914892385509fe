"""Several adapters in one run: each is what its solo run makes, whoever else is there."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, byte_tokenizer
from workers import (
    Case,
    Together,
    difference,
    run_case,
    run_cases,
    run_together,
    state_of,
    weights_of,
)

from cluster.errors import SpecError
from cluster.spec import parse_spec
from training.checkpoint import read_checkpoint, write_checkpoint
from training.place import Place
from training.shared_pass import SharedPass
from training.spec import TrainingSpec

# By name: what is other than in COMMON. Other ranks, rates, lengths, batches, rows and methods.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"kind": "lora", "r": 4}, "max_steps": 6},
    "rslora_plus": {
        "method": {"kind": "lora", "r": 7, "use_rslora": True, "lora_plus_ratio": 2},
        "optimizer": {"learning_rate": 0.002, "schedule": "constant"},
        "max_steps": 3,
        "batch_size": 8,
    },
    "dora": {
        "method": {"kind": "lora", "r": 4, "use_dora": True, "modules_to_save": ["norm"]},
        "max_steps": 4,
    },
    "dropout": {"method": {"kind": "lora", "r": 3, "dropout": 0.4}, "max_steps": 5},
    "head": {
        "method": {"kind": "lora", "r": 2, "modules_to_save": ["lm_head", "embed_tokens"]},
        "max_steps": 4,
    },
    "part": {"method": {"kind": "lora", "target_modules": ["q_proj"], "layers_to_transform": [1]}},
    "adalora": {
        "method": {"kind": "adalora", "r": 2, "init_r": 3, "allocate_every_steps": 1},
        "max_steps": 6,
    },
    "dylora": {"method": {"kind": "dylora", "r": 4, "frozen": True}},
    "ia3": {
        "method": {"kind": "ia3"},
        "max_steps": 7,
        "data": {"train": "unused", "validation": 0.3},
        "evaluation": {"every_steps": 2, "generations": 2, "max_new_tokens": 3},
    },
    "bitfit": {"method": {"kind": "bitfit"}},
    "layernorm": {"method": {"kind": "layernorm"}},
}
FEW = ("lora", "rslora_plus", "ia3")


def spec(base: Path, name: str, **more: Any) -> dict[str, Any]:
    return {
        "base_model": str(base),
        "data": {"train": "unused"},
        "output": {"name": "unused"},
        "optimizer": {"learning_rate": 0.005, "weight_decay": 0.01, "max_grad_norm": 0.5},
        "max_steps": 4,
        "micro_batch_size": 2,
        "zero": {"stage": 0},
        "checkpoint_every_steps": 2,
        "log_every_steps": 1,
        "seed": len(name),
        **ADAPTERS[name],
        **more,
    }


def cases(base: Path, folder: Path, names: Any, **more: Any) -> dict[str, Case]:
    return {name: Case(spec(base, name, **more), folder / name) for name in names}


@pytest.fixture(scope="module")
def alone(
    bases: Callable[[str], Path], tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of solo runs by adapter."""
    folder = tmp_path_factory.mktemp("alone")
    for case in cases(bases("llama"), folder, ADAPTERS).values():
        run_case(case, tokens, Place())
    return folder


@pytest.fixture(scope="module")
def together(
    bases: Callable[[str], Path], tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same adapters of one run."""
    folder = tmp_path_factory.mktemp("together")
    every = Together(cases(bases("llama"), folder, ADAPTERS))
    assert run_together(every, tokens, Place()) == {}
    return folder


def test_the_base_multiplies_once_for_all(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []
    multiply: Any = SharedPass._linear

    def spy(self: SharedPass, module: Any, own: Mapping[str, Any], *rest: Any) -> torch.Tensor:
        shared.append(len(own))
        return multiply(self, module, own, *rest)

    monkeypatch.setattr(SharedPass, "_linear", spy)
    names = list(ADAPTERS)[:3]
    every = Together(cases(bases("llama"), tmp_path, names, max_steps=1))
    assert run_together(every, tokens, Place()) == {}
    assert shared.count(3) >= 14  # of two layers


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_is_that_of_its_solo_run(alone: Path, together: Path, name: str) -> None:
    assert difference(weights_of(alone / name), weights_of(together / name)) < 1e-4
    assert difference(state_of(alone / name), state_of(together / name)) < 1e-4
    last = sorted((alone / name).glob("checkpoint-*"))[-1].name
    ends = [read_checkpoint(run / name / last)[1] for run in (alone, together)]
    assert dict(ends[0].curve) == pytest.approx(dict(ends[1].curve), rel=1e-4)
    assert [found.exact_match for found in ends[0].evaluations] == [
        found.exact_match for found in ends[1].evaluations
    ]
    assert ends[0].tokens == ends[1].tokens


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_comparison_can_fail(alone: Path, together: Path, name: str) -> None:
    """Training moves each adapter by far more than it may differ."""
    first = min((alone / name).glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    early = {k: v for k, v in read_checkpoint(first)[0].items() if k.startswith("param/")}
    late = state_of(together / name)
    assert difference(early, {key: late[key] for key in early}) > 1e-3


@pytest.mark.slow
def test_two_workers_and_a_resume_change_nothing(
    bases: Callable[[str], Path], alone: Path, tokens: Path, tmp_path: Path
) -> None:
    """Micro-batches of 1 on each of two workers; then from checkpoints of different steps."""
    base, more = bases("llama"), {"micro_batch_size": 1, "workers": {"count": 2}}
    whole = cases(base, tmp_path / "whole", FEW, **more)
    resumed = {
        name: Case(case.spec, tmp_path / "resumed" / name, whole[name].folder / f"checkpoint-{at}")
        for (name, case), at in zip(whole.items(), (4, 2, 2), strict=True)
    }
    resumed["rslora_plus"] = Case(whole["rslora_plus"].spec, tmp_path / "resumed" / "rslora_plus")
    run_cases(2, [Together(whole), Together(resumed)], tokens)
    for name in FEW:
        assert difference(weights_of(alone / name), weights_of(tmp_path / "whole" / name)) < 1e-4
        files = [tmp_path / run / name / "adapter/adapter_model.safetensors"
                 for run in ("whole", "resumed")]  # fmt: skip
        # The others are at other steps now, and rows of a product may be summed in another order.
        assert difference(weights_of(files[0].parents[1]), weights_of(files[1].parents[1])) < 1e-5


def test_one_that_diverges_ends_alone(
    bases: Callable[[str], Path], alone: Path, tokens: Path, tmp_path: Path
) -> None:
    some = cases(bases("llama"), tmp_path, FEW)
    wild = spec(bases("llama"), "lora", optimizer={"learning_rate": 1e30, "schedule": "constant"})
    some["wild"] = Case(wild, tmp_path / "wild")
    failed = run_together(Together(some), tokens, Place())
    assert failed.keys() == {"wild"}
    assert "training diverged at step 2" in failed["wild"]
    for name in FEW:
        assert difference(weights_of(alone / name), weights_of(tmp_path / name)) < 1e-4


def test_weights_that_diverged_do_not_keep_the_others_from_going_on(
    bases: Callable[[str], Path], alone: Path, tokens: Path, tmp_path: Path
) -> None:
    state, progress = read_checkpoint(alone / "lora" / "checkpoint-2")
    broken = {name: torch.full_like(value, math.nan) for name, value in state.items()}
    write_checkpoint(tmp_path / "broken", broken, progress)
    some = cases(bases("llama"), tmp_path, ("layernorm", "lora"))
    some["lora"] = Case(some["lora"].spec, tmp_path / "lora", tmp_path / "broken")
    failed = run_together(Together(some), tokens, Place())
    assert failed.keys() == {"lora"}
    assert "training diverged at step 3" in failed["lora"]
    found = weights_of(tmp_path / "layernorm")
    assert difference(weights_of(alone / "layernorm"), found) < 1e-4


def test_an_early_end_leaves_the_pass_to_the_others(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    watched = {
        "data": {"train": "unused", "validation": 0.3},
        "evaluation": {"every_steps": 1, "generations": 0, "patience": 1},
        "optimizer": {"learning_rate": 0.3},
        "max_steps": 12,
    }
    pair = cases(bases("llama"), tmp_path / "both", ("lora", "layernorm"))
    pair["watched"] = Case(spec(bases("llama"), "lora", **watched), tmp_path / "both/watched")
    run_case(Case(pair["watched"].spec, tmp_path / "alone"), tokens, Place())
    run_together(Together(pair), tokens, Place())
    ends = [
        sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))
        for folder in (tmp_path / "alone", tmp_path / "both/watched")
    ]
    assert ends[0] == ends[1]
    assert ends[0][-1] < 12
    assert difference(weights_of(tmp_path / "alone"), weights_of(tmp_path / "both/watched")) < 1e-4


@pytest.mark.parametrize("how", ["recomputed", "bf16"])
def test_gradient_checkpointing_and_bf16(
    bases: Callable[[str], Path], alone: Path, tokens: Path, tmp_path: Path, how: str
) -> None:
    more = {"precision": "bf16"} if how == "bf16" else {"gradient_checkpointing": True}
    run_together(Together(cases(bases("llama"), tmp_path, FEW, **more)), tokens, Place())
    for name in FEW:
        expected, found = weights_of(alone / name), weights_of(tmp_path / name)
        if how == "recomputed":
            assert difference(expected, found) < 1e-4
            continue
        away = [float((found[key] - value).abs().mean()) for key, value in expected.items()]
        largest = max(float(value.abs().max()) for value in expected.values())
        assert max(away) < 0.1 * largest


def test_over_a_quantised_base(bases: Callable[[str], Path], tokens: Path, tmp_path: Path) -> None:
    more = {"quantization": {"bits": 4}}
    some = cases(bases("llama"), tmp_path / "both", FEW, **more)
    run_together(Together(some), tokens, Place())
    for name, case in some.items():
        run_case(Case(case.spec, tmp_path / "alone" / name), tokens, Place())
        assert difference(weights_of(tmp_path / "alone" / name), weights_of(case.folder)) < 1e-4


@pytest.fixture
def odd_base(tmp_path: Path) -> Callable[[Any], Path]:
    """Makes a base of a config."""

    def make(config: Any) -> Path:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


SMALL_GPT2 = {
    "vocab_size": VOCABULARY, "eos_token_id": 256, "bos_token_id": None, "n_embd": 32,
    "n_layer": 2, "n_head": 4, "n_positions": 128,
}  # fmt: skip


def test_dropout_of_the_base_is_that_of_each_solo_run(
    odd_base: Callable[[Any], Path], tokens: Path, tmp_path: Path
) -> None:
    """GPT-2 drops embeddings and residuals; its linear modules keep their weights transposed."""
    base = odd_base(transformers.GPT2Config(**SMALL_GPT2, attn_pdrop=0.0))
    some = cases(base, tmp_path / "both", ("lora", "rslora_plus", "dropout"))
    run_together(Together(some), tokens, Place())
    for name, case in some.items():
        run_case(Case(case.spec, tmp_path / "alone" / name), tokens, Place())
        assert difference(weights_of(tmp_path / "alone" / name), weights_of(case.folder)) < 1e-4


def test_a_base_that_cannot_share_a_pass_is_refused(
    odd_base: Callable[[Any], Path], bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    dropping = odd_base(transformers.GPT2Config(**SMALL_GPT2, attn_pdrop=0.1))
    refused = [(dropping, "dropout above 0"), (bases("bloom"), "cannot lie end to end")]
    for base, message in refused:
        some = Together(cases(base, tmp_path, ("lora", "rslora_plus")))
        with pytest.raises(SpecError, match=message):
            run_together(some, tokens, Place())
    recomputed = cases(bases("llama"), tmp_path, ("lora", "dropout"), gradient_checkpointing=True)
    with pytest.raises(SpecError, match=r"adapters.dropout: .*gradient_checkpointing"):
        run_together(Together(recomputed), tokens, Place())


@pytest.mark.parametrize(
    "method", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}]
)
def test_a_head_behind_which_logits_are_scaled_is_trained_alone(
    odd_base: Callable[[Any], Path], tokens: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """The host makes all logits then, and no adapter's head would be called."""
    config = transformers.GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        pad_token_id=256, bos_token_id=None, eos_token_id=256, logits_scaling=8.0,
        tie_word_embeddings=False,
    )  # fmt: skip
    base = odd_base(config)
    pair = cases(base, tmp_path / "pair", ("lora", "rslora_plus"), max_steps=1)
    assert run_together(Together(pair), tokens, Place()) == {}
    changed = spec(base, "lora", method={"kind": "lora", "r": 2, **method})
    pair["changed"] = Case(changed, tmp_path / "changed")
    with pytest.raises(SpecError, match=r"adapters\.changed: .*Granite.*train this one alone"):
        run_together(Together(pair), tokens, Place())


SEVERAL = {
    "base_model": "/base",
    "method": {"kind": "lora", "r": 16, "alpha": 32},
    "data": {"train": "/rows.arrow", "lint": {"empty": 0.2}},
    "output": {"name": "sweep", "store": "/store"},
    "gradient_accumulation_steps": 2,
    "zero": {"stage": 0},
    "adapters": {
        "small": {"method": {"r": 4}, "optimizer": {"learning_rate": 0.01}},
        "scales": {"method": {"kind": "ia3"}, "data": {"train": "/other.arrow"}, "batch_size": 4},
        "again": None,
    },
}


def test_an_adapter_is_the_rest_of_the_spec_with_its_own_keys() -> None:
    specs = parse_spec(TrainingSpec, SEVERAL).each()
    assert list(specs) == ["small", "scales", "again"]
    small, scales, again = (each.model_dump() for each in specs.values())
    assert (small["method"]["r"], small["method"]["alpha"]) == (4, 32)
    assert math.isclose(small["optimizer"]["learning_rate"], 0.01)
    assert scales["method"]["kind"] == "ia3"
    assert (scales["data"]["train"], scales["data"]["lint"]["empty"]) == ("/other.arrow", 0.2)
    assert (scales["batch_size"], again["gradient_accumulation_steps"]) == (4, 2)
    assert [each["output"]["name"] for each in (small, scales, again)] == list(specs)
    assert {each["output"]["store"] for each in (small, scales, again)} == {"/store"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero": {"stage": 2}}, r"adapters: share a pass at zero.stage 0 alone"),
        ({"adapters": {"a": {"precision": "bf16"}}}, r"adapters\.a: precision is the same for all"),
        ({"adapters": {"a": {"micro_batch_size": 2}}}, r"adapters\.a: micro_batch_size is the"),
        ({"adapters": {"a": {"optimiser": {}}}}, r"did you mean 'optimizer'"),
        ({"adapters": {"a": {"method": {"rr": 1}}}}, r"a\.method\.lora\.rr: unknown key"),
        ({"adapters": {"a": {"method": {"kind": "full"}}}}, r"a\.method\.kind: full is no linear"),
        ({"adapters": {"a": {"method": {"init": "pissa"}}}}, r"a\.method\.init: pissa takes"),
        ({"adapters": {"A b": {}}}, r"use 1 to 100 of a-z"),
    ],
)
def test_what_cannot_share_a_run_is_refused_by_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(TrainingSpec, SEVERAL | change)
