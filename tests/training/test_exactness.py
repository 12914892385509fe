"""The same run however it is cut: over workers, accumulation, ZeRO stages, and interruptions."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import byte_tokenizer
from workers import Case, run_case, run_cases, state_of, weights_of

from cluster.tables import write_table
from training.checkpoint import read_checkpoint
from training.data import tokenize
from training.data_spec import DataSpec
from training.loop import Place

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 4},
    "dora_plus": {
        "kind": "lora",
        "r": 4,
        "use_dora": True,
        "init": "pissa",
        "lora_plus_ratio": 2,
        "modules_to_save": ["norm"],
    },
    "adalora": {"kind": "adalora", "r": 2, "init_r": 3, "allocate_every_steps": 1},
    "dylora": {"kind": "dylora", "r": 4, "frozen": True},
    "ia3": {"kind": "ia3"},
    "bitfit": {"kind": "bitfit"},
    "layernorm": {"kind": "layernorm"},
    "fishmask": {"kind": "fishmask", "share": 0.02, "num_samples": 8},
    "child_tuning_free": {"kind": "child_tuning", "form": "task_free"},
    "full": {"kind": "full"},
    "llama_adapter": {"kind": "llama_adapter", "adapter_len": 4},
    "bottleneck": {"kind": "bottleneck", "placement": "houlsby", "reduction_factor": 4},
    "parallel": {"kind": "bottleneck", "placement": "parallel", "reduction_factor": 4},
    "prompt_tuning": {"kind": "prompt_tuning", "num_virtual_tokens": 4},
    "p_tuning": {"kind": "p_tuning", "num_virtual_tokens": 4},
    "prefix_tuning": {"kind": "prefix_tuning", "num_virtual_tokens": 4, "projection": True},
}
# Far from the loss at their start: one embedding, or behind a gate that is shut.
SLOW = {"prompt_tuning", "llama_adapter"}
DENSE = {"full", "child_tuning_free"}
STEPS, HALF = 6, 3
# name -> (micro-batch, accumulation, ZeRO) of runs on two workers; 8 rows a step in all.
TWO_WORKERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "2x4": (4, 1, {"stage": 0}),
    "2x2x2": (2, 2, {"stage": 0}),
    "zero1": (4, 1, {"stage": 1}),
    "zero2": (4, 1, {"stage": 2}),
    "zero2-accumulated": (2, 2, {"stage": 2}),
    "zero2-offload": (4, 1, {"stage": 2, "offload_optimizer": True}),
    "zero3": (4, 1, {"stage": 3}),
    "zero3-offload": (4, 1, {"stage": 3, "offload_optimizer": True, "offload_parameters": True}),
}
# Those of them that compute layers again in backward.
RECOMPUTED = {"2x2x2", "zero2-accumulated", "zero3-offload"}
ALONE = (8, 1, {"stage": 0})


def spec(
    base: Path, method: str, how: tuple[int, int, dict[str, Any]], workers: int = 1
) -> dict[str, Any]:
    micro, accumulation, zero = how
    return {
        "base_model": str(base),
        "method": METHOD_SETTINGS[method],
        "data": {"train": "unused"},
        "output": {"name": "unused"},
        # Where every weight learns, AdamW makes whole steps of gradients that are but rounding.
        "optimizer": {
            "learning_rate": 0.001 if method in DENSE else 0.005,
            "weight_decay": 0.01,
            "max_grad_norm": 0.5,
        },
        "max_steps": STEPS,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "zero": zero,
        "workers": {"count": workers},
        "checkpoint_every_steps": HALF,
        "log_every_steps": 1,
        "seed": 5,
    }


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very different lengths, so that padding and counts matter; 8 do not divide them."""
    folder = tmp_path_factory.mktemp("tokens")
    rows = [{"prompt": "ab" * (i % 7 + 1), "completion": "cd" * (i % 5 + 1)} for i in range(29)]
    write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    tokenize(DataSpec(train=str(folder / "rows.parquet")), byte_tokenizer(), folder / "tokens")
    return folder / "tokens"


@pytest.fixture(scope="module")
def runs(
    bases: Callable[[str], Path], tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of finished runs: METHOD-alone (one worker) and METHOD-<how> of TWO_WORKERS."""
    folder, base = tmp_path_factory.mktemp("runs"), bases("llama")
    cases: list[Case] = []
    for method in METHOD_SETTINGS:
        alone = Case(spec(base, method, ALONE), folder / f"{method}-alone")
        run_case(alone, tokens, Place())
        for name, how in TWO_WORKERS.items():
            settings = spec(base, method, how, workers=2)
            settings["gradient_checkpointing"] = name in RECOMPUTED
            cases.append(Case(settings, folder / f"{method}-{name}"))
            half = folder / f"{method}-{name}" / f"checkpoint-{HALF}"
            cases.append(Case(settings, folder / f"{method}-{name}-resumed", half))
    run_cases(2, cases, tokens)
    return folder


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    # AdaLoRA may leave a module without any rank.
    return max(float((one[key] - other[key]).abs().max()) for key in one if one[key].numel())


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Flat differences by tensor; values at indices are compared where each has them."""
    found: list[torch.Tensor] = []
    for key in (one.keys() | other.keys()) - {k for k in one | other if k.endswith(".indices")}:
        places = [weights.get(key.removesuffix("values") + "indices") for weights in (one, other)]
        if places == [None, None]:
            found.append((one[key] - other[key]).flatten())
            continue
        size = 1 + max(int(p[-1]) for p in places if p is not None)
        pair = [torch.zeros(size) for _ in places]
        for dense, at, weights in zip(pair, places, (one, other), strict=True):
            if at is not None:
                dense[at.long()] = weights[key]
        found.append(pair[0] - pair[1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_SETTINGS)
@pytest.mark.parametrize("how", TWO_WORKERS)
def test_however_a_step_is_cut_the_weights_are_the_same(runs: Path, method: str, how: str) -> None:
    alone, cut = runs / f"{method}-alone", runs / f"{method}-{how}"
    assert difference(weights_of(alone), weights_of(cut)) < 1e-5
    assert difference(state_of(alone), state_of(cut)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_SETTINGS)
@pytest.mark.parametrize("how", TWO_WORKERS)
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    runs: Path, method: str, how: str
) -> None:
    whole, resumed = runs / f"{method}-{how}", runs / f"{method}-{how}-resumed"
    assert (whole / f"checkpoint-{HALF}").is_dir()
    assert not (resumed / f"checkpoint-{HALF}").exists()
    files = [run / "adapter" / "adapter_model.safetensors" for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert difference(state_of(whole), state_of(resumed)) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)  # of which compiling takes most, once on a machine
def test_cpu_adam_is_adamw_and_resumes_bit_for_bit(
    bases: Callable[[str], Path], runs: Path, tokens: Path, tmp_path: Path
) -> None:
    cases: list[Case] = []
    ways = ("2x2x2", "zero2-offload", "zero3-offload")
    for name in ways:
        settings = spec(bases("llama"), "lora", TWO_WORKERS[name], workers=2)
        settings["optimizer"] = {**settings["optimizer"], "kind": "cpu_adam"}
        whole, resumed = tmp_path / name, tmp_path / f"{name}-resumed"
        cases += [Case(settings, whole), Case(settings, resumed, whole / f"checkpoint-{HALF}")]
    run_cases(2, cases, tokens)
    for name in ways:
        whole, resumed = state_of(tmp_path / name), state_of(tmp_path / f"{name}-resumed")
        assert difference(state_of(runs / "lora-alone"), whole) < 1e-5
        assert difference(whole, resumed) == 0


@pytest.mark.slow
def test_a_compiler_is_named_where_cpu_adam_needs_one(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    settings = spec(bases("llama"), "lora", TWO_WORKERS["2x4"], workers=1)
    settings["optimizer"] = {"kind": "cpu_adam"}
    with pytest.raises(Exception, match=r"cannot compile it here .* install a C\+\+ compiler"):
        run_cases(1, [Case(settings, tmp_path / "run")], tokens)


@pytest.mark.slow
def test_two_workers_then_one_then_two_equal_the_undisturbed_run(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    """The batch stays 8 rows: two micro-batches of 4 where there is one worker."""
    stages = (0, 2, 3)
    for name, workers, before, at in (
        ("calm", 2, "", 0),
        ("one", 1, "calm", 2),
        ("two", 2, "one", 4),
    ):
        cases: list[Case] = []
        for stage in stages:
            settings = spec(bases("llama"), "lora", (4, 1, {"stage": stage}), workers=2)
            settings |= {"checkpoint_every_steps": 2}
            resume = tmp_path / f"{before}-{stage}" / f"checkpoint-{at}" if before else None
            cases.append(Case(settings, tmp_path / f"{name}-{stage}", resume))
        run_cases(workers, cases, tokens)
    for stage in stages:
        calm, cut = tmp_path / f"calm-{stage}", tmp_path / f"two-{stage}"
        assert difference(weights_of(calm), weights_of(cut)) < 1e-5
        assert difference(state_of(calm), state_of(cut)) < 1e-5
        curves = [read_checkpoint(run / f"checkpoint-{STEPS}")[1].curve for run in (calm, cut)]
        assert dict(curves[0]) == pytest.approx(dict(curves[1]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_a_checkpoint_is_as_large_as_what_is_trained(runs: Path, method: str) -> None:
    """Weights and two moments in fp32 and next to nothing beside; for the tiny model here the
    names and the curve count, so they are taken apart. What a method must remember besides (where
    a mask's values stand, AdaLoRA's averages) is state of its optimiser too."""
    folder = runs / f"{method}-zero3" / f"checkpoint-{STEPS}"
    state = state_of(runs / f"{method}-zero3")
    trained = sum(value.numel() for key, value in state.items() if key.startswith("param/"))
    content = sum(value.nbytes for value in state.values())
    course = sum(value.nbytes for key, value in state.items() if key.startswith("course/"))
    assert content <= 1.1 * (3 * 4 * trained + course)
    assert course <= 2 * 4 * trained
    names = 150 * len(state)  # a tensor's line in the header of a safetensors file
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 1.1 * content + names + 1000


@pytest.mark.slow
@pytest.mark.parametrize("how", ["zero1", "zero2", "zero3"])
def test_a_checkpoint_of_any_stage_resumes_on_one_worker_without_deepspeed(
    runs: Path, how: str, bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    settings = spec(bases("llama"), "lora", ALONE)
    half = runs / f"lora-{how}" / f"checkpoint-{HALF}"
    run_case(Case(settings, tmp_path, half), tokens, Place())
    assert difference(weights_of(runs / "lora-alone"), weights_of(tmp_path)) < 1e-5


# AdaLoRA keeps ranks by importance: rounded, other ranks are kept, and nothing is comparable.
COMPARABLE = [method for method in METHOD_SETTINGS if method != "adalora"]


@pytest.mark.slow
@pytest.mark.parametrize("method", COMPARABLE)
def test_bf16_follows_fp32(half_precision: Path, runs: Path, method: str) -> None:
    """The base in bf16 and the adapter in fp32, under every ZeRO stage."""
    expected = weights_of(runs / f"{method}-alone")
    largest = max(float(w.abs().max()) for key, w in expected.items() if "indices" not in key)
    for stage in (0, 2, 3):
        found = weights_of(half_precision / f"{method}-{stage}")
        assert all(w.dtype == torch.float32 for key, w in found.items() if "indices" not in key)
        away = torch.cat([part.abs() for part in differences(expected, found)])
        assert 0 < away.mean() < 0.1 * largest, stage


@pytest.fixture(scope="module")
def half_precision(
    bases: Callable[[str], Path], tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder, base = tmp_path_factory.mktemp("bf16"), bases("llama")
    cases = [
        Case({**spec(base, method, (4, 1, {"stage": stage}), 2), "precision": "bf16"},
             folder / f"{method}-{stage}")
        for method in COMPARABLE
        for stage in (0, 2, 3)
    ]  # fmt: skip
    run_cases(2, cases, tokens)
    return folder


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_training_lowers_the_loss(
    method: str, bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    settings = {**spec(bases("llama"), method, ALONE), "max_steps": 30}
    settings["optimizer"] = {"learning_rate": 0.5 if method in SLOW else 0.02}
    losses = run_case(Case(settings, tmp_path), tokens, Place())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.mark.parametrize("max_grad_norm", [0.5, 0])
def test_divergence_names_the_last_good_checkpoint(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path, max_grad_norm: float
) -> None:
    from cluster.errors import JobFailedError

    broken = tmp_path / "base"
    shutil.copytree(bases("llama"), broken)
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    settings = spec(broken, "lora", ALONE)
    settings["optimizer"]["max_grad_norm"] = max_grad_norm
    with pytest.raises(JobFailedError, match="diverged at step 1: the gradient is nan"):
        run_case(Case(settings, tmp_path), tokens, Place())
