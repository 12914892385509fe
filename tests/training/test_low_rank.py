"""LoRA's options, AdaLoRA against PEFT's own loop, DyLoRA against a LoRA of each rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import load, randomize
from conftest import VOCABULARY
from torch.nn.functional import cross_entropy

from cluster.adapter_folder import MIN_RANK, open_adapter_folder
from cluster.errors import SpecError
from cluster.spec import parse_spec
from training.backend import PlainBackend
from training.command import plan
from training.methods import METHODS, trainable_parameters
from training.spec import OptimizerSpec, TrainingSpec
from training.step import LossModel, collate

Bases = Callable[[str], Path]
ROWS = [(list(range(n, n + 9)), list(range(n, n + 9))) for n in (3, 40, 77, 110)]
IDS = torch.arange(12)[None]


def attach(base: Path, **method: Any) -> tuple[Any, Any]:
    """(model, its spec) of a method on a fresh base."""
    document = {"base_model": str(base), "method": method, "data": {"train": "x"}}
    spec = parse_spec(TrainingSpec, {**document, "output": {"name": "x"}}).method
    torch.manual_seed(0)
    return METHODS[spec.kind].attach(load(base), spec, str(base)), spec


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"exclude_modules": ["qproj"]}, "exclude_modules: 'qproj' matches no module"),
        ("llama", {"exclude_modules": "("}, r"exclude_modules: '\(' is no regular expression"),
        ("llama", {"target_modules": "q_(proj"}, r"target_modules: 'q_\(proj' is no regular"),
        (
            "llama",
            {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]},
            r"target_modules: \('q_proj',\) means nothing but what is trained whole already",
        ),
        ("llama", {"modules_to_save": ["layers"]}, "'all-linear' means nothing but what is tr"),
        (
            "llama",
            {"target_modules": ["q_proj", "norm"]},
            r"method.target_modules: .* of kind LlamaRMSNorm, .* linear ones: down_proj, gate",
        ),
        (
            "llama",
            {"kind": "adalora", "target_modules": ["self_attn"]},
            r"method.target_modules: .* of kind LlamaAttention, .*: down_proj.*v_proj$",
        ),
        (
            "llama",
            {"kind": "ia3", "target_modules": ["norm"], "feedforward_modules": []},
            "method.target_modules: .* of kind LlamaRMSNorm",
        ),
        ("llama", {"rank_pattern": {"q_(proj": 2}}, r"rank_pattern: 'q_\(proj' is no regular"),
        ("llama", {"alpha_pattern": {"(?i)q": 2}}, r"alpha_pattern: '\(\?i\)q' is no regular"),
        ("llama", {"modules_to_save": ["head"]}, "modules_to_save: 'head' matches no module.*head"),
        ("llama", {"layers_to_transform": [0, 2]}, "layers_to_transform: .* has no layer 2"),
        ("llama", {"layers_to_transform": [99]}, "layers_to_transform: .* has no layer 99"),
        (
            "llama",
            {"exclude_modules": r".*_proj"},
            r"exclude_modules: '\.\*_proj' leaves nothing of method.target_modules 'all-linear'",
        ),
        (
            "llama",
            {"exclude_modules": ["q_proj", "k_proj"], "target_modules": ["q_proj"]},
            "exclude_modules: .* leaves nothing of method.target_modules",
        ),
        (
            "llama",
            {"exclude_modules": ["q_proj"], "target_modules": ".*qproj"},
            r"target_modules: '\.\*qproj' matches no module",
        ),
        (
            "llama",
            {"layers_to_transform": [0], "target_modules": ".*q_proj"},
            "chooses the layers itself",
        ),
        ("llama", {"bias": "all"}, "bias: 'all', but .* has no such bias"),
        ("llama", {"init": "pissa", "r": 40}, r"r: 40 is above what .*set it to at most 32"),
        (
            "llama",
            {"init": "olora", "target_modules": ["embed_tokens"]},
            "'model.embed_tokens' is no linear module but Embedding; init 'olora' takes",
        ),
        (
            "gpt2",
            {"init": "pissa", "target_modules": ["c_attn", "lm_head"]},
            "'lm_head' has its weight in common with 'transformer.wte', .* take init default",
        ),
        ("llama", {"init": "half"}, "method.lora.init"),
        ("llama", {"kind": "adalora", "r": 8, "init_r": 8}, "init_r is 8, not above r 8"),
        ("llama", {"kind": "adalora", "warmup_ratio": 0.8}, "leave no steps"),
        ("llama", {"kind": "dylora", "min_rank": 9}, "min_rank is 9, above r 8"),
        (
            "llama",
            {"kind": "dylora", "target_modules": ["q_proj", "embed_tokens"]},
            "'model.embed_tokens' is no linear module but Embedding; DyLoRA cuts",
        ),
    ],
)
def test_an_option_that_cannot_be_is_refused(
    bases: Bases, family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        attach(bases(family), **{"kind": "lora", **options})


def test_a_plan_knows_tied_weights(bases: Bases, tmp_path: Path) -> None:
    """Without weights, too; an untied output embedding can be taken from."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')

    def planned(family: str) -> Any:
        method = {"kind": "lora", "init": "pissa", "target_modules": ["lm_head"]}
        document = {"base_model": str(bases(family)), "method": method, "output": {"name": "x"}}
        return plan(
            parse_spec(TrainingSpec, {**document, "data": {"train": str(tmp_path / "rows.jsonl")}})
        )

    assert planned("llama").trainable_parameters == 8 * (32 + VOCABULARY)
    with pytest.raises(SpecError, match="'lm_head' has its weight in common"):
        planned("qwen3")


def test_targets_are_those_of_the_layers_but_the_excluded(bases: Bases) -> None:
    model, _ = attach(
        bases("llama"), kind="lora", layers_to_transform=[1], exclude_modules=["q_proj"]
    )
    names = {name.split(".lora_")[0] for name in trainable_parameters(model)}
    assert all(".layers.1." in name for name in names)
    assert {name.rsplit(".", 1)[-1] for name in names} == {
        "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_biases_of_the_base_are_trained_and_saved(bases: Bases, tmp_path: Path) -> None:
    model, spec = attach(bases("gpt2"), kind="lora", target_modules=["c_fc"], bias="lora_only")
    names = [name for name in trainable_parameters(model) if name.endswith("bias")]
    assert names
    assert all("c_fc" in name for name in names)
    randomize(model)
    METHODS[spec.kind].save(model, tmp_path)
    found = peft.PeftModel.from_pretrained(load(bases("gpt2")), str(tmp_path)).eval()
    assert (model.eval()(IDS).logits - found(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weights_is_the_base(bases: Bases, family: str, init: str) -> None:
    model, _ = attach(bases(family), kind="lora", r=4, init=init)
    factors = trainable_parameters(model)
    assert all(bool(value.any()) for value in factors.values())
    plain = load(bases(family))
    assert (model.eval()(IDS).logits - plain(IDS).logits).abs().max() < 1e-3
    changed = [
        name
        for name, weight in model.get_base_model().named_parameters()
        if ".base_layer.weight" in name
        and not torch.equal(weight, plain.get_parameter(name.replace(".base_layer", "")))
    ]
    assert len(changed) == len(factors) // 2


def test_a_head_that_a_part_was_taken_of_is_not_saved_without_it(
    bases: Bases, tmp_path: Path
) -> None:
    targets = ["q_proj", "lm_head"]
    model, spec = attach(bases("llama"), kind="lora", r=4, init="pissa", target_modules=targets)
    randomize(model, 0.1)
    METHODS[spec.kind].save(model, tmp_path)
    found = peft.PeftModel.from_pretrained(load(bases("llama")), str(tmp_path)).eval()
    assert (model.eval()(IDS).logits - found(IDS).logits).abs().max() < 1e-5


def test_lora_plus_gives_b_its_own_rate(bases: Bases) -> None:
    targets = ["q_proj", "embed_tokens"]
    model, _ = attach(bases("llama"), kind="lora", lora_plus_ratio=16, target_modules=targets)
    randomize(model)
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    backend = PlainBackend(LossModel(model), OptimizerSpec(max_grad_norm=0))
    backend.set_learning_rate(0.001)
    backend.backward(backend.model(collate(ROWS, IDS.device)))
    backend.finish_step()
    for name, parameter in trainable_parameters(model).items():
        # AdamW's first step moves every weight by its rate.
        moved = float((parameter.detach() - before[name]).abs().max())
        is_b = ".lora_B." in name or ".lora_embedding_B." in name
        assert moved == pytest.approx(0.016 if is_b else 0.001, rel=1e-2)


def textbook_adalora(model: Any, spec: Any, steps: int, rate: float) -> None:
    """PEFT's documented loop: the loss with its regulariser, an update, its allocator."""
    tuner, config = model.base_model, model.peft_config["default"]
    config.total_step = steps
    config.tinit, config.tfinal = int(spec.warmup_ratio * steps), int(spec.final_ratio * steps)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=rate, weight_decay=0)
    for step in range(steps):
        loss = torch.zeros(())
        for ids, labels in ROWS:
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            loss = loss + cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum")
        factors = [
            p if "lora_A" in n else p.T
            for n, p in model.named_parameters()
            if "lora_A" in n or "lora_B" in n
        ]
        away = sum(torch.norm(f @ f.T - torch.eye(len(f)), p="fro") for f in factors)
        count = sum(len(labels) - 1 for _, labels in ROWS)
        (loss / count + config.orth_reg_weight * away / len(factors)).backward()
        optimizer.step()
        tuner.update_and_allocate(step + 1)
        optimizer.zero_grad()


def test_adalora_is_pefts_own_loop(bases: Bases, tmp_path: Path) -> None:
    steps, rate = 8, 0.01
    options = {"kind": "adalora", "r": 2, "init_r": 4, "allocate_every_steps": 2}
    expected, spec = attach(bases("llama"), **options)
    textbook_adalora(expected, spec, steps, rate)

    model, spec = attach(bases("llama"), **options)
    course = METHODS["adalora"].course(model.train(), spec, 0)
    backend = PlainBackend(LossModel(model), OptimizerSpec(max_grad_norm=0))
    for step in range(steps):
        backend.set_learning_rate(rate)
        course.begin_step(step, steps)
        for half in (ROWS[:2], ROWS[2:]):
            loss = backend.model(collate(half, IDS.device)) / (8 * len(ROWS))
            penalty = course.penalty()
            assert penalty is not None
            backend.backward(loss + penalty / 2)
        backend.finish_step()
        course.end_step(step, steps, backend)

    for name, parameter in trainable_parameters(expected).items():
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=2e-5, rtol=0)
    pattern = model.peft_config["default"].rank_pattern
    assert pattern == expected.peft_config["default"].rank_pattern
    ranks = [sum(kept) for kept in pattern.values()]
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1
    METHODS["adalora"].save(model, tmp_path)
    found = peft.PeftModel.from_pretrained(load(bases("llama")), str(tmp_path)).eval()
    assert (expected.eval()(IDS).logits - found(IDS).logits).abs().max() < 1e-3


def test_dylora_runs_each_step_at_its_rank(bases: Bases, tmp_path: Path) -> None:
    model, spec = attach(bases("llama"), kind="dylora", r=4, min_rank=2, alpha=6)
    randomize(model)
    course = METHODS["dylora"].course(model.train(), spec, 7)
    found: dict[int, torch.Tensor] = {}
    for step in range(20):
        course.begin_step(step, 20)
        with torch.no_grad():
            logits = model(IDS).logits
        rank = course.rank
        torch.testing.assert_close(found.setdefault(rank, logits), logits)
    assert set(found) == {2, 3, 4}
    for rank, logits in found.items():
        cut, _ = attach(bases("llama"), kind="lora", r=rank, alpha=6)
        for name, parameter in trainable_parameters(cut).items():
            full = trainable_parameters(model)[name]
            parameter.data = full[:rank] if ".lora_A." in name else full[:, :rank]
        torch.testing.assert_close(cut.eval()(IDS).logits, logits, atol=1e-4, rtol=0)

    METHODS["dylora"].save(model, tmp_path)
    assert open_adapter_folder(tmp_path).metadata[MIN_RANK] == "2"
    plain = peft.PeftModel.from_pretrained(load(bases("llama")), str(tmp_path)).eval()
    assert (plain(IDS).logits - found[4]).abs().max() < 1e-4


def test_frozen_dylora_trains_the_last_rank_alone(bases: Bases) -> None:
    model, spec = attach(bases("llama"), kind="dylora", r=4, frozen=True)
    randomize(model)
    course = METHODS["dylora"].course(model.train(), spec, 1)
    measured = LossModel(model)
    for step in range(3):
        course.begin_step(step, 3)
        model.zero_grad()
        measured(collate(ROWS, IDS.device)).backward()
        for name, parameter in trainable_parameters(model).items():
            by_rank = parameter.grad.abs().amax(1 if ".lora_A." in name else 0)
            assert by_rank.nonzero().flatten().tolist() == [course.rank - 1], name
