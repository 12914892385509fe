"""Predicted memory: exact where it can be, near a real process's, and nothing loaded for it."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from conftest import byte_tokenizer
from typer.testing import CliRunner

from cluster.base_model import load_base
from cluster.errors import SpecError
from cluster.spec import parse_spec
from training.assembly import settle_norms
from training.dry_run import Shape
from training.estimate import Estimate
from training.estimate import estimate as estimate_of
from training.estimate_command import estimate as estimate_command
from training.methods import METHODS, trainable_parameters
from training.quantized_shape import scales_of
from training.spec import TrainingSpec
from training.step import DTYPES

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
TENSORS_ALONE = {"count": 2, "gpus": 1}  # without the process and malloc


def make_spec(base: Path, method: dict[str, Any], **more: Any) -> TrainingSpec:
    document = {
        "base_model": str(base), "method": method, "data": {"train": "unused"},
        "output": {"name": "x"}, "workers": {"count": 2}, **more,
    }  # fmt: skip
    return parse_spec(TrainingSpec, document)


def estimate(spec: TrainingSpec, shape: Shape, stages: Sequence[int]) -> Estimate:
    """With micro-batches of one shape for all adapters."""
    return estimate_of(spec, dict.fromkeys(spec.each(), shape), stages)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 M parameters: large beside what small tensors round to."""
    folder = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=384, intermediate_size=1_024, num_hidden_layers=2,
        num_attention_heads=6, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_weights_states_and_checkpoint_of_full_fine_tuning_are_exact(base: Path) -> None:
    """Its peak is at a checkpoint, where the gradients are gone."""
    spec = make_spec(base, {"kind": "full"}, workers=TENSORS_ALONE)
    model = METHODS["full"].attach(load_base(str(base), torch.float32), spec.method, str(base))
    count = sum(p.numel() for p in trainable_parameters(model).values())
    found, size = estimate(spec, Shape(1, 8), [0, 2]), count * 4 / MIB
    assert found.trainable_parameters == found.all_parameters == count
    plain, sharded = (dict(at.parts) for at in found.stages)
    assert [at.moment for at in found.stages] == ["at a checkpoint"] * 2
    assert plain["weights"] == pytest.approx(size, abs=0.1)
    assert plain["optimiser"] == pytest.approx(2 * size, abs=0.1)
    assert plain["checkpoint"] == pytest.approx(3 * size, abs=0.1)
    assert sharded["weights"] == pytest.approx(size, abs=0.1)
    # Each of two workers has half of the fp32 values and of both moments.
    assert sharded["optimiser"] == pytest.approx(1.5 * size, abs=0.1)


def test_gradients_are_exact_where_micro_batches_add_up(base: Path) -> None:
    lora = {"kind": "lora", "r": 64}
    spec = make_spec(base, lora, gradient_accumulation_steps=2, workers=TENSORS_ALONE)
    found = estimate(spec, Shape(2, 64), [0])
    size = found.trainable_parameters * 4 / MIB
    assert found.stages[0].moment == "in a step"
    assert found.stages[0].parts["gradients"] == pytest.approx(size, abs=0.1)
    assert found.stages[0].parts["optimiser"] == pytest.approx(2 * size, abs=0.1)


@pytest.mark.parametrize("method", [{"kind": "fishmask"}, {"kind": "child_tuning", "share": 0.1}])
def test_the_sums_by_which_a_mask_is_chosen_are_counted(base: Path, method: dict[str, Any]) -> None:
    (at,) = estimate(make_spec(base, method, workers=TENSORS_ALONE), Shape(2, 64), [0]).stages
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert at.moment == "while a mask is chosen"
    assert at.parts["gradients"] > plain.num_parameters() * 4 / MIB


def test_activations_grow_with_the_rows_and_shrink_by_recomputing(base: Path) -> None:
    spec = make_spec(base, {"kind": "lora"}, workers=TENSORS_ALONE)
    again = spec.model_copy(update={"gradient_checkpointing": True})
    short, longer, recomputed = (
        estimate(own, Shape(2, tokens), [0]).stages[0].parts["activations"]
        for own, tokens in ((spec, 64), (spec, 256), (again, 256))
    )
    assert longer == pytest.approx(4 * short, rel=0.1)
    assert recomputed < longer / 1.5


def test_a_real_worker_needs_about_as_much(base: Path) -> None:
    """Two processes over gloo at ZeRO 2. The table of docs/benchmarks.md has many more."""
    path = ROOT / "tests" / "bench" / "estimate.py"
    made: Any = importlib.util.spec_from_file_location("bench_estimate", path)
    bench: Any = importlib.util.module_from_spec(made)
    made.loader.exec_module(bench)
    document = bench.document(base, "lora", 4, 2, {})
    predicted, measured = bench.predict(document, 256), bench.measure(document, 256)
    assert predicted == pytest.approx(measured, rel=0.15)


def test_a_base_of_70_billion_parameters_is_estimated_without_memory(tmp_path: Path) -> None:
    transformers.LlamaConfig(
        vocab_size=128_256, hidden_size=16_384, intermediate_size=58_624, num_hidden_layers=19,
        num_attention_heads=128, num_key_value_heads=16,
    ).save_pretrained(tmp_path)  # fmt: skip
    (tmp_path / "model.safetensors").touch()  # its weights are never opened
    document = make_spec(
        tmp_path, {"kind": "prompt_tuning"}, precision="bf16", workers=TENSORS_ALONE
    ).model_dump_json()
    code = """if True:
        import sys
        from cluster.memory import peak_memory_mib
        from cluster.spec import parse_spec
        from training.dry_run import Shape
        from training.estimate import estimate
        from training.spec import TrainingSpec
        import json
        spec = parse_spec(TrainingSpec, json.loads(sys.argv[1]))
        found = estimate(spec, {"x": Shape(1, 512)}, [0])
        print(found.all_parameters, found.stages[0].parts["weights"])
        print(peak_memory_mib())
    """
    result = subprocess.run(
        [sys.executable, "-c", code, document], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    parameters, weights, peak_mib = (float(word) for word in result.stdout.split())
    assert 70e9 < parameters < 71e9
    assert weights == pytest.approx(2 * parameters / MIB, rel=1e-3)
    assert peak_mib < 1200


def test_a_shape_is_that_of_the_largest_micro_batch_that_such_rows_make(base: Path) -> None:
    spec = make_spec(base, {"kind": "ia3"}, micro_batch_size=2, batch_size=16)
    shape = Shape.of_rows(spec, [([0] * n, [0] * n) for n in (3, 30, 7, 5, 4, 6, 5, 3)])
    assert [len(ids) for ids, _ in shape.content("causal_lm", is_packed=False)] == [30, 30]
    one, other = sorted(len(ids) for ids, _ in shape.content("causal_lm", is_packed=True))
    assert other == 30
    assert one < 7  # long rows are dealt out to micro-batches apart


def test_the_command_takes_the_longest_row_and_prints_every_stage(
    base: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "a", "completion": "b" * n} for n in (3, 30, 7)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"base_model: {base}\nmethod: {{kind: prompt_tuning}}\nmax_steps: 1\n"
        f"data: {{train: {tmp_path / 'rows.jsonl'}}}\noutput: {{name: x}}\n"
        "workers: {count: 2, gpus: 1}\n"
    )
    app = typer.Typer()
    app.command()(estimate_command)
    shown = CliRunner().invoke(app, [str(spec)], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    assert "4 rows of 32 tokens at most" in shown.output
    assert all(f"ZeRO {stage}" in shown.output for stage in range(4))
    found = CliRunner().invoke(app, [str(spec), "--json", "--stage", "1", "--tokens", "20"])
    (only,) = json.loads(found.stdout)["stages"]
    assert only["stage"] == 1
    assert only["total"] == pytest.approx(sum(only["parts"].values()))


def test_several_adapters_share_one_bases_weights(base: Path) -> None:
    """Each has its own states, and all their activations are there at once."""
    adapters = {name: {"seed": n} for n, name in enumerate(("a", "b", "c"))}
    alone, several = (
        estimate(
            make_spec(base, {"kind": "lora"}, zero={"stage": 0}, workers=TENSORS_ALONE, **more),
            Shape(2, 64), [0],
        )
        for more in ({}, {"adapters": adapters})
    )  # fmt: skip
    assert several.trainable_parameters == 3 * alone.trainable_parameters
    frozen = alone.all_parameters - alone.trainable_parameters
    assert several.all_parameters == frozen + several.trainable_parameters
    one, all_three = alone.stages[0].parts, several.stages[0].parts
    trained = alone.trainable_parameters * 4 / MIB
    assert all_three["weights"] == pytest.approx(one["weights"] + 2 * trained, rel=0.01)
    assert all_three["optimiser"] == pytest.approx(6 * trained, rel=0.01)
    assert all_three["activations"] == pytest.approx(3 * one["activations"], rel=0.1)
    with pytest.raises(SpecError, match="adapters do not fit ZeRO stage 2"):
        estimate(make_spec(base, {"kind": "lora"}, zero={"stage": 0}, adapters=adapters),
                 Shape(2, 64), [2])  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", [{"bits": 4}, {"bits": 4, "double_quant": False}, {"bits": 8}])
def test_a_quantised_bases_weights_are_exact(
    base: Path, how: dict[str, Any], precision: str
) -> None:
    """Those that are loaded: packed weights and their scales."""
    spec = make_spec(
        base, {"kind": "lora"}, workers=TENSORS_ALONE, quantization=how, precision=precision
    )
    model = load_base(str(base), DTYPES[spec.precision], spec.quantization)
    settle_norms(model)
    held = [*model.parameters(), *model.buffers()]
    held += [getattr(holder, name) for holder, name in scales_of(model)]
    size = sum(tensor.untyped_storage().nbytes() for tensor in {id(t): t for t in held}.values())
    lora = METHODS["lora"].attach(model, spec.method, str(base))
    size += sum(p.numel() * 4 for p in trainable_parameters(lora).values())
    found = estimate(spec, Shape(1, 8), [0, 2])
    assert found.stages[0].parts["weights"] == pytest.approx(size / MIB, abs=0.005)


@pytest.mark.parametrize("task", ["seq_2_seq_lm", "sequence_classification"])
def test_other_tasks_are_estimated(base: Path, tmp_path: Path, task: Any) -> None:
    """An encoder-decoder's logits are those of its targets alone; a classifier has none."""
    path, labels = base, {"labels": ["a", "b"]}
    if task == "seq_2_seq_lm":
        config = transformers.T5Config(
            vocab_size=32_000, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )  # fmt: skip
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
        path, labels = tmp_path, {}
    data = {"train": "unused", **labels}
    spec = make_spec(path, {"kind": "bitfit"}, workers=TENSORS_ALONE, task=task, data=data)
    short, longer = (estimate(spec, Shape(4, size, size, (size,) * 4), [0, 2]) for size in (16, 64))
    assert (longer.shapes["x"].packed is None) == (task == "seq_2_seq_lm")
    short, longer = short.stages[0].parts, longer.stages[0].parts
    assert short["weights"] == pytest.approx(longer["weights"], rel=1e-3)
    assert longer["activations"] > 2 * short["activations"] > 0
    if task == "seq_2_seq_lm":
        assert longer["logits"] > 1.2 * short["logits"] > 0
    else:
        assert longer["logits"] == 0


def test_stage_3_is_left_out_for_a_quantised_base(base: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"base_model: {base}\nmethod: {{kind: lora}}\nmax_steps: 1\nquantization: {{bits: 4}}\n"
        f"data: {{train: {base}}}\noutput: {{name: x}}\nworkers: {{count: 2, gpus: 1}}\n"
    )
    app = typer.Typer()
    app.command()(estimate_command)
    arguments = [str(spec), "--json", "--tokens", "8"]
    shown = CliRunner().invoke(app, arguments)
    assert [at["stage"] for at in json.loads(shown.stdout)["stages"]] == [0, 1, 2]
    refused = CliRunner().invoke(app, [*arguments, "--stage", "3"])
    assert isinstance(refused.exception, SpecError)
    assert "quantization does not fit ZeRO stage 3" in refused.exception.message
