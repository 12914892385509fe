"""QLoRA, and every other method that a base in 4 or 8 bits takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import byte_tokenizer
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from workers import Case, difference, run_case, run_cases, state_of, weights_of

from cluster.base_model import empty_base, load_base
from cluster.errors import BaseModelError, SpecError
from cluster.quantization import QuantizationSpec
from cluster.spec import parse_spec
from training.assembly import assemble
from training.command import plan, resolved
from training.method_spec import MethodSpec
from training.methods import METHODS, count_parameters
from training.place import Place
from training.rows import TokenRows
from training.spec import TrainingSpec

METHODS_ON_IT: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 4, "modules_to_save": ["lm_head"]},
    "rslora": {"kind": "lora", "r": 4, "use_rslora": True, "init": "gaussian"},
    "dora": {"kind": "lora", "r": 4, "use_dora": True, "lora_plus_ratio": 2},
    "adalora": {"kind": "adalora", "r": 2, "init_r": 3},
    "dylora": {"kind": "dylora", "r": 4},
    "ia3": {"kind": "ia3"},
    "bitfit": {"kind": "bitfit"},
    "layernorm": {"kind": "layernorm"},
    "llama_adapter": {"kind": "llama_adapter", "adapter_len": 4},
    "bottleneck": {"kind": "bottleneck", "reduction_factor": 4},
    "parallel": {"kind": "bottleneck", "placement": "parallel", "reduction_factor": 4},
    "prompt_tuning": {"kind": "prompt_tuning", "num_virtual_tokens": 4},
    "p_tuning": {"kind": "p_tuning", "num_virtual_tokens": 4},
    "prefix_tuning": {"kind": "prefix_tuning", "num_virtual_tokens": 4},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"kind": "full"}, "trains the base's own weights"),
    "free": ({"kind": "child_tuning", "form": "task_free"}, "trains the base's own weights"),
    "driven": ({"kind": "child_tuning"}, "chosen places of the base's own weights"),
    "fishmask": ({"kind": "fishmask"}, "chosen places of the base's own weights"),
    "pissa": ({"kind": "lora", "init": "pissa"}, "init pissa takes a part"),
    "olora": ({"kind": "lora", "init": "olora"}, "init olora takes a part"),
    "hard_prompt": ({"kind": "hard_prompt"}, "trains nothing"),
    "proxy": (
        {"kind": "proxy_tuning", "small_base": "x", "expert": {"kind": "lora"}},
        "never loaded",
    ),
}
SLOW = {"prompt_tuning", "llama_adapter"}
STEPS, HALF = 6, 3
WAYS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "2x2x2": (2, 2, {"stage": 0}),
    "zero1": (4, 1, {"stage": 1}),
    "zero2": (4, 1, {"stage": 2, "offload_optimizer": True}),
}


def spec(base: Path, method: str = "lora", **more: Any) -> dict[str, Any]:
    return {
        "base_model": str(base),
        "quantization": {"bits": 4},
        "method": METHODS_ON_IT[method],
        "data": {"train": "unused"},
        "output": {"name": "unused"},
        "optimizer": {"learning_rate": 0.005, "weight_decay": 0.01, "max_grad_norm": 0.5},
        "max_steps": STEPS,
        "micro_batch_size": 8,
        "zero": {"stage": 0},
        "checkpoint_every_steps": HALF,
        "log_every_steps": 1,
        "seed": 5,
        **more,
    }


@pytest.mark.parametrize(
    ("method", "bits"), [*((m, 4) for m in METHODS_ON_IT), ("lora", 8), ("dora", 8), ("bitfit", 8)]
)
def test_training_lowers_the_loss(
    method: str, bits: int, bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    """In bf16, with layers computed again; the adapter then loads over the same base."""
    settings = spec(
        bases("llama"), method, max_steps=20, quantization={"bits": bits}, precision="bf16",
        gradient_checkpointing=True,
        optimizer={"learning_rate": 0.5 if method in SLOW else 0.02},
    )  # fmt: skip
    losses = run_case(Case(settings, tmp_path), tokens, Place())
    assert sum(losses[-4:]) < 0.96 * sum(losses[:4])
    trained = weights_of(tmp_path)
    assert all(value.dtype == torch.float32 for value in trained.values())
    quantization = QuantizationSpec.model_validate({"bits": bits})
    model = load_base(str(bases("llama")), torch.float32, quantization).eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        kind = str(METHODS_ON_IT[method]["kind"])
        after = METHODS[kind].load(model, tmp_path / "adapter").eval()(input_ids=ids).logits
    assert (after[:, -9:] - before).abs().max() > 0.01


@pytest.mark.slow
def test_however_a_step_is_cut_and_interrupted_the_weights_are_the_same(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    """Micro-batches, ZeRO 0 to 2 on two workers, layers computed again, a resume; a checkpoint
    holds what is trained, and nothing of the base."""
    cases: list[Case] = []
    for bits in (4, 8):
        settings = spec(bases("llama"), quantization={"bits": bits})
        run_case(Case(settings, tmp_path / f"{bits}-alone"), tokens, Place())
        for way in WAYS if bits == 4 else ("zero2",):
            micro, accumulation, zero = WAYS[way]
            cut = settings | {
                "micro_batch_size": micro, "gradient_accumulation_steps": accumulation,
                "zero": zero, "workers": {"count": 2}, "gradient_checkpointing": way != "zero1",
            }  # fmt: skip
            whole = tmp_path / f"{bits}-{way}"
            half = whole / f"checkpoint-{HALF}"
            cases += [Case(cut, whole), Case(cut, tmp_path / f"{bits}-{way}-resumed", half)]
    run_cases(2, cases, tokens)
    for bits in (4, 8):
        alone = tmp_path / f"{bits}-alone"
        for way in WAYS if bits == 4 else ("zero2",):
            whole, resumed = tmp_path / f"{bits}-{way}", tmp_path / f"{bits}-{way}-resumed"
            assert difference(weights_of(alone), weights_of(whole)) < 1e-5, way
            assert difference(state_of(alone), state_of(whole)) < 1e-5, way
            files = [run / "adapter" / "adapter_model.safetensors" for run in (whole, resumed)]
            assert files[0].read_bytes() == files[1].read_bytes(), way
            assert difference(state_of(whole), state_of(resumed)) == 0, way
        names = {key.split("/", 1)[1] for key in state_of(alone)}
        assert all("lora_" in name or "modules_to_save" in name for name in names)
    assert difference(weights_of(tmp_path / "4-alone"), weights_of(tmp_path / "8-alone")) > 1e-3


def test_the_adapter_is_an_ordinary_lora(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    """Over the plain base and over transformers' own 4-bit base, by plain PEFT. GPT-2's weights lie
    the other way round in the plain one."""
    for family in ("llama", "gpt2"):
        base = bases(family)
        settings = spec(base, max_steps=20, optimizer={"learning_rate": 0.02})
        losses = run_case(Case(settings, tmp_path / family), tokens, Place())
        quantised = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            ), device_map={"": "cpu"}, dtype=torch.float32,
        )  # fmt: skip
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        rows = [TokenRows(tokens).row(index) for index in range(8)]
        for model in (quantised, plain):
            adapted: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / family / "adapter"))
            for module in adapted.eval().modules():
                if type(module).__name__ == "Linear4bit":
                    module.support_avx512bf16_for_cpu = False  # which does not take this size
            with torch.no_grad():
                found = [
                    adapted(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
                    for ids, labels in rows
                ]
            assert float(torch.stack(found).mean()) < 0.8 * losses[0]


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_whole_weights_is_refused_by_name(case: str) -> None:
    method, reason = REFUSED[case]
    with pytest.raises(SpecError, match=f"does not fit method {method['kind']}: .*{reason}"):
        parse_spec(TrainingSpec, spec(Path("base")) | {"method": method})


def test_what_cannot_be_done_in_few_bits_is_refused_before_anything_starts(
    bases: Callable[[str], Path], tokens: Path
) -> None:
    base = bases("llama")
    with pytest.raises(SpecError, match=r"does not fit zero.stage 3.*take zero.stage 2"):
        parse_spec(TrainingSpec, spec(base, zero={"stage": 3}))
    with pytest.raises(SpecError, match="leave them out with 8"):
        parse_spec(TrainingSpec, spec(base, quantization={"bits": 8, "quant_type": "nf4"}))
    saved = parse_spec(
        TrainingSpec,
        spec(base, method="lora")
        | {
            "method": {"kind": "lora", "modules_to_save": ["q_proj"]},
            "data": {"train": str(tokens.parent / "rows.parquet")},
        },
    )
    whole = r"'q_proj' is .* cannot be trained whole in 4 or 8 bits"
    with pytest.raises(SpecError, match=whole):
        plan(resolved(saved))
    with pytest.raises(SpecError, match=whole):
        assemble(saved, Place(), TokenRows(tokens))


def test_a_base_that_was_saved_quantised_is_known_before_anything_starts(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    made = load_base(
        str(bases("llama")), torch.float32, QuantizationSpec.model_validate({"bits": 8})
    )
    made.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    rows = {"data": {"train": str(tokens.parent / "rows.parquet"), "max_length": 64}}
    settings = spec(tmp_path, quantization=None) | rows
    job = resolved(parse_spec(TrainingSpec, settings))
    assert job.quantization is not None
    assert job.quantization.bits == 8
    assert plan(job).all_parameters == plan(
        resolved(parse_spec(TrainingSpec, spec(bases("llama")) | rows))
    ).all_parameters  # fmt: skip
    with pytest.raises(SpecError, match=r"with base_model (.|\n)* does not fit zero.stage 3"):
        resolved(parse_spec(TrainingSpec, settings | {"zero": {"stage": 3}}))
    with pytest.raises(BaseModelError, match="leave quantization out"):
        resolved(parse_spec(TrainingSpec, settings | {"quantization": {"bits": 4}}))


def test_parameters_are_counted_in_full(bases: Callable[[str], Path], tokens: Path) -> None:
    base = str(bases("llama"))
    method: Any = TypeAdapter(MethodSpec).validate_python(METHODS_ON_IT["rslora"])
    planned = METHODS["lora"].attach(empty_base(base), method, base)
    for bits in (4, 8):
        settings = spec(bases("llama"), "rslora", quantization={"bits": bits}, precision="bf16")
        made = assemble(parse_spec(TrainingSpec, settings), Place(), TokenRows(tokens))
        assert count_parameters(made.backend.adapted) == count_parameters(planned)
        assert made.model.is_packed
        assert made.model.has_plain_head
        kept = {name: p.dtype for name, p in made.model.named_parameters() if "lora_" not in name}
        assert {d for n, d in kept.items() if "norm" in n} == {torch.float32}
        assert kept["model.base_model.model.model.embed_tokens.weight"] == torch.bfloat16
        assert kept["model.base_model.model.lm_head.weight"] == torch.bfloat16
        packed = {d for n, d in kept.items() if "proj" in n}
        assert packed == {torch.uint8 if bits == 4 else torch.int8}
