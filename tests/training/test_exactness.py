"""Runs whose workers come and go, lower their loss, or cannot go on."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from presets import KINDS, method_of
from safetensors.torch import load_file, save_file
from workers import Case, Workers, difference, run_case, run_cases, state_of, weights_of

from cluster.errors import JobFailedError
from training.checkpoint import read_checkpoint
from training.place import Place
from training.rows import epoch_batches

# Far from the loss at their start: one embedding, or behind a gate that is shut.
SLOW = {"prompt_tuning", "llama_adapter"}
TRAINED = [row for kind, row in KINDS.items() if kind != "hard_prompt"]
STEPS = 6


def spec(base: Path, row: str = "lora", *, workers: int = 1, stage: int = 0) -> dict[str, Any]:
    """Steps of 8 rows."""
    method = method_of(row)
    if method["kind"] == "proxy_tuning":
        method["small_base"] = str(base)
    return {
        "base_model": str(base),
        "method": method,
        "data": {"train": "unused"},
        "output": {"name": "unused"},
        "optimizer": {"learning_rate": 0.005, "weight_decay": 0.01, "max_grad_norm": 0.5},
        "max_steps": STEPS,
        "micro_batch_size": 8 // workers,
        "zero": {"stage": stage},
        "workers": {"count": workers},
        "log_every_steps": 1,
        "seed": 5,
    }


@pytest.mark.slow
def test_a_compiler_is_named_where_cpu_adam_needs_one(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    settings = spec(bases("llama"))
    settings["optimizer"] = {"kind": "cpu_adam"}
    with pytest.raises(Exception, match=r"cannot compile it here .* install a C\+\+ compiler"):
        run_cases(1, [Case(settings, tmp_path / "run")], tokens)


@pytest.mark.slow
@pytest.mark.timeout(900)  # of which compiling takes most, once on a machine
def test_who_is_killed_while_cpu_adam_is_compiled_stops_nobody() -> None:
    """Torch's lock is a file, which it leaves behind."""
    from training.cpu_adam import CpuAdam, build_folder

    lock = build_folder() / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    CpuAdam([{"params": [weight]}], lr=0.1, weight_decay=0.0).step()
    assert torch.allclose(weight.detach(), torch.full((3,), 0.9))
    assert not lock.exists()


@pytest.mark.slow
def test_two_workers_then_one_then_two_equal_the_undisturbed_run(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    """The batch stays 8 rows: two micro-batches of 4 where there is one worker."""
    stages = (0, 2, 3)

    def cases(name: str, before: str | None = None, at: int = 0) -> list[Case]:
        found: list[Case] = []
        for stage in stages:
            settings = spec(bases("llama"), workers=2, stage=stage) | {"checkpoint_every_steps": 2}
            resume = tmp_path / f"{before}-{stage}" / f"checkpoint-{at}" if before else None
            found.append(Case(settings, tmp_path / f"{name}-{stage}", resume))
        return found

    with Workers(2) as both:
        both.run(cases("calm"), tokens)
        run_cases(1, cases("one", "calm", 2), tokens)
        both.run(cases("two", "one", 4), tokens)
    for stage in stages:
        calm, cut = tmp_path / f"calm-{stage}", tmp_path / f"two-{stage}"
        assert difference(weights_of(calm), weights_of(cut)) < 1e-5
        assert difference(state_of(calm), state_of(cut)) < 1e-5
        curves = [read_checkpoint(run / f"checkpoint-{STEPS}")[1].curve for run in (calm, cut)]
        assert dict(curves[0]) == pytest.approx(dict(curves[1]), rel=1e-5)


@pytest.mark.slow
def test_a_notice_has_all_workers_save_at_the_same_step(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    """As soon as one of them knows of it, once for each notice; and it changes nothing else."""
    settings = spec(bases("llama"), workers=2)
    told = Case(settings, tmp_path / "told", notices=[(4, 5), (2, 5)])
    resumed = Case(settings, tmp_path / "resumed", told.folder / "checkpoint-2")
    calm = Case(settings, tmp_path / "calm")
    run_cases(2, [told, resumed, calm], tokens)
    saved = {case.folder: {path.name for path in case.folder.glob("checkpoint-*")}
             for case in (told, calm)}  # fmt: skip
    last = f"checkpoint-{STEPS}"
    assert saved == {told.folder: {"checkpoint-2", "checkpoint-5", last}, calm.folder: {last}}
    for name in (f"{last}/state.safetensors", "adapter/adapter_model.safetensors"):
        for case in (told, resumed):
            assert (case.folder / name).read_bytes() == (calm.folder / name).read_bytes(), name


@pytest.mark.parametrize("row", TRAINED)
def test_training_lowers_the_loss(
    row: str, bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    settings = {**spec(bases("llama"), row), "max_steps": 30}
    settings["optimizer"] = {"learning_rate": 0.5 if row in SLOW else 0.02}
    losses = run_case(Case(settings, tmp_path), tokens, Place())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.fixture(scope="module")
def broken_base(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose every gradient is NaN."""
    folder = tmp_path_factory.mktemp("broken") / "base"
    shutil.copytree(bases("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("max_grad_norm", [0.5, 0])
def test_divergence_ends_the_run(
    broken_base: Path, tokens: Path, tmp_path: Path, max_grad_norm: float
) -> None:
    settings = spec(broken_base)
    settings["optimizer"]["max_grad_norm"] = max_grad_norm
    with pytest.raises(JobFailedError, match="diverged at step 1: the gradient is nan"):
        run_case(Case(settings, tmp_path), tokens, Place())


def test_an_exploding_gradient_ends_the_run(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    settings = spec(bases("llama"))
    settings["optimizer"]["stop_grad_norm"] = 1e-9
    told = r"diverged at step 1: the gradient's norm is .*, over optimizer.stop_grad_norm 1e-09"
    with pytest.raises(JobFailedError, match=told):
        run_case(Case(settings, tmp_path), tokens, Place())


def test_a_run_goes_on_in_the_order_of_rows_that_it_began_in(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the checkpoint is of a time when packed rows were sorted as others are."""
    orders: list[bool] = []

    def batches(*args: Any, is_packed: bool) -> Any:
        orders.append(is_packed)
        return epoch_batches(*args, is_packed=is_packed)

    monkeypatch.setattr("training.loop.epoch_batches", batches)
    settings = spec(bases("llama")) | {"checkpoint_every_steps": 2}
    run_case(Case(settings, tmp_path), tokens, Place())
    assert set(orders) == {True}
    checkpoint = tmp_path / "checkpoint-2"
    progress = json.loads((checkpoint / "progress.json").read_text())
    del progress["is_packed"]
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    orders.clear()
    run_case(Case(settings, tmp_path / "resumed", checkpoint), tokens, Place())
    assert set(orders) == {False}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_divergence_ends_the_run_under_zero(
    broken_base: Path, tokens: Path, tmp_path: Path, stage: int
) -> None:
    """DeepSpeed takes such a step for one that only needs another loss scale, and leaves it out."""
    settings = spec(broken_base, workers=2, stage=stage)
    with pytest.raises(RuntimeError, match="diverged at step 1: the gradient is inf"):
        run_cases(2, [Case(settings, tmp_path)], tokens)
