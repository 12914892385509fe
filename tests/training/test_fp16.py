"""fp16: the loss scale, steps that overflow, and what float16 is too narrow for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from presets import method_of
from workers import (
    Case,
    Together,
    difference,
    log_of,
    run_case,
    run_cases,
    run_together,
    state_of,
    weights_of,
)

from cluster.base_model import empty_base, load_base
from cluster.errors import BaseModelError, JobFailedError
from cluster.spec import parse_spec
from training import loss_scale
from training.assembly import assemble, check_base
from training.checkpoint import PROGRESS, Progress, read_checkpoint
from training.loop import run
from training.loss_scale import LossScale
from training.methods.course import Course
from training.place import Place
from training.rows import TokenRows
from training.spec import TrainingSpec
from training.step import LossModel

STEPS = 6
OVERFLOWS = 2.0**22  # 2**18 is the most that the tiny base takes
# Every way that a gradient takes: a LoRA's fused one, through norms, biases, embeddings, a cache,
# modules of ours, sparse values, and the base's own weights.
KINDS = ["lora", "layernorm", "bitfit", "prompt_tuning", "prefix_tuning", "ia3",
         "bottleneck_pfeiffer", "fishmask", "full", "llama_adapter"]  # fmt: skip


def spec(base: Path, row: str = "lora", *, workers: int = 1, stage: int = 0) -> dict[str, Any]:
    """Steps of 8 rows in two micro-batches on each worker."""
    return {
        "base_model": str(base),
        "method": method_of(row),
        "data": {"train": "unused"},
        "output": {"name": "unused"},
        "optimizer": {"learning_rate": 0.005, "weight_decay": 0.01, "max_grad_norm": 0.5},
        "max_steps": STEPS,
        "micro_batch_size": 4 // workers,
        "batch_size": 8,
        "precision": "fp16",
        "zero": {"stage": stage},
        "workers": {"count": workers},
        "checkpoint_every_steps": 3,
        "log_every_steps": 1,
        "seed": 5,
    }


def overflowing(run: Path, folder: Path) -> Path:
    """The checkpoint of step 3, with a scale at which the next step's gradients overflow."""
    shutil.copytree(run / "checkpoint-3", folder)
    progress = json.loads((folder / PROGRESS).read_text())
    (folder / PROGRESS).write_text(json.dumps(progress | {"loss_scale": OVERFLOWS}))
    return folder


@pytest.fixture(scope="module")
def alone(
    bases: Callable[[str], Path], tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One worker without DeepSpeed: in fp32, in fp16, and gone on with after an overflow."""
    folder, settings = tmp_path_factory.mktemp("alone"), spec(bases("llama"))
    run_case(Case({**settings, "precision": "fp32"}, folder / "fp32"), tokens, Place())
    run_case(Case(settings, folder / "fp16"), tokens, Place())
    start = overflowing(folder / "fp16", folder / "start")
    run_case(Case(settings, folder / "redone", start), tokens, Place())
    return folder


def apart(run: Path, other: Path) -> float:
    """The mean difference of adapters' values, of the largest value. One alone may be further off:
    AdamW makes whole steps of gradients that are but rounding."""
    one, two = weights_of(run), weights_of(other)
    away = torch.cat([(one[key] - two[key]).abs().flatten() for key in one])
    return float(away.mean()) / max(float(value.abs().max()) for value in two.values())


def check_follows(run: Path, expected: Path) -> None:
    """Finite, near the run in fp32, and not it."""
    found = weights_of(run)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert 0 < apart(run, expected) < 5e-4
    losses = [[line["loss"] for line in log_of(each)] for each in (run, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def check_redone(run: Path, undisturbed: Path) -> None:
    """No step is lost or done twice, and the scale is where nothing overflows."""
    ends = [read_checkpoint(each / f"checkpoint-{STEPS}")[1] for each in (run, undisturbed)]
    assert [line["step"] for line in log_of(run)] == [4, 5, 6]
    scales = [line["loss_scale"] for line in log_of(run)]
    assert (ends[0].loss_scale, ends[0].good_steps) == (scales[-1], scales.count(scales[-1]))
    assert OVERFLOWS > scales[0] >= scales[-1] >= 2.0**16
    assert ends[0].tokens == ends[1].tokens
    assert dict(ends[0].curve) == pytest.approx(dict(ends[1].curve), rel=1e-4)
    assert apart(run, undisturbed) < 5e-4


def test_fp16_follows_fp32_and_an_overflow_loses_nothing(alone: Path) -> None:
    check_follows(alone / "fp16", alone / "fp32")
    check_redone(alone / "redone", alone / "fp16")
    _, end = read_checkpoint(alone / "fp16" / f"checkpoint-{STEPS}")
    assert (end.loss_scale, end.good_steps) == (2.0**16, STEPS)
    assert read_checkpoint(alone / "fp32" / f"checkpoint-{STEPS}")[1].loss_scale is None


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_under_zero(
    workers: int, alone: Path, bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    cases: list[Case] = []
    for stage in (0, 2, 3) if workers > 1 else (2, 3):
        settings = spec(bases("llama"), workers=workers, stage=stage)
        if workers == 1 and stage:  # without offload a lone worker has no use for DeepSpeed
            settings = {**settings, "zero": {"stage": stage, "offload_optimizer": True}}
        whole, resumed, redone = (
            tmp_path / f"{stage}-{kind}" for kind in ("whole", "resumed", "redone")
        )
        cases.append(Case(settings, whole))
        cases.append(Case(settings, resumed, whole / "checkpoint-3"))
        if stage > 1:
            settings = {**settings, "zero": {"stage": stage, "offload_optimizer": True}}
        cases.append(Case(settings, redone, alone / "start"))
    run_cases(workers, cases, tokens)
    folders = [case.folder for case in cases]
    for whole, resumed, redone in zip(folders[::3], folders[1::3], folders[2::3], strict=True):
        check_follows(whole, alone / "fp32")
        if workers == 1 and whole.name != "3-whole":  # the same products, so the same rounding
            assert difference(weights_of(whole), weights_of(alone / "fp16")) < 1e-5
        check_redone(redone, alone / "fp16")
        assert difference(state_of(whole), state_of(resumed)) == 0
        adapter = "adapter/adapter_model.safetensors"
        assert (whole / adapter).read_bytes() == (resumed / adapter).read_bytes()


@pytest.mark.parametrize("row", KINDS)
def test_methods_follow_fp32(
    row: str, bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    settings = spec(bases("llama"), row) | {"max_steps": 2}
    for precision in ("fp32", "fp16"):
        case = Case({**settings, "precision": precision}, tmp_path / precision)
        run_case(case, tokens, Place())
    logs = [log_of(tmp_path / precision) for precision in ("fp16", "fp32")]
    for key in ("loss", "grad_norm"):
        found, exact = ([line[key] for line in log] for log in logs)
        assert found == pytest.approx(exact, rel=0.02)
    assert all(bool(value.isfinite().all()) for value in weights_of(tmp_path / "fp16").values())


def test_a_step_done_again_is_no_other_for_adalora(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    """Its importances are made of what backward adds up."""
    settings = spec(bases("llama"), "adalora")
    run_case(Case(settings, tmp_path / "calm"), tokens, Place())
    start = overflowing(tmp_path / "calm", tmp_path / "start")
    run_case(Case(settings, tmp_path / "redone", start), tokens, Place())
    calm, redone = state_of(tmp_path / "calm"), state_of(tmp_path / "redone")
    assert difference(calm, redone) < 1e-3


def test_each_of_several_adapters_has_its_own_scale(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    cases: dict[str, Case] = {}
    for row in ("lora", "ia3"):
        settings = spec(bases("llama"), row)
        run_case(Case(settings, tmp_path / row), tokens, Place())
        start = tmp_path / row / "checkpoint-3"
        if row == "lora":
            start = overflowing(tmp_path / row, tmp_path / "start")
        cases[row] = Case(settings, tmp_path / "together" / row, start)
    assert run_together(Together(cases), tokens, Place()) == {}
    scales: dict[str, float | None] = {}
    for row in cases:
        run = tmp_path / "together" / row
        assert difference(weights_of(run), weights_of(tmp_path / row)) < 1e-3
        scales[row] = read_checkpoint(run / f"checkpoint-{STEPS}")[1].loss_scale
    assert scales["ia3"] == 2.0**16 != scales["lora"]


def test_the_scale_grows_and_goes_on(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "_GROWS_AFTER", 2)
    settings = spec(bases("llama"))
    run_case(Case(settings, tmp_path / "whole"), tokens, Place())
    resume = tmp_path / "whole/checkpoint-3"
    run_case(Case(settings, tmp_path / "resumed", resume), tokens, Place())
    _, middle = read_checkpoint(resume)
    assert (middle.loss_scale, middle.good_steps) == (2.0**17, 3)
    ends = [read_checkpoint(tmp_path / run / "checkpoint-6") for run in ("whole", "resumed")]
    assert [end.loss_scale for _, end in ends] == [2.0**19] * 2
    assert difference(ends[0][0], ends[1][0]) == 0


def test_an_overflow_in_the_forward_pass_ends_the_run(
    bases: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    settings = spec(bases("llama"), "full")
    settings["optimizer"] = {"learning_rate": 1e4, "warmup_ratio": 0}
    reason = r"diverged at step 2: fp16, the loss is (nan|inf).*Set precision to bf16"
    with pytest.raises(JobFailedError, match=reason):
        run_case(Case(settings, tmp_path), tokens, Place())


class Steep(Course):
    """Adds so much to the loss that its gradient's norm is over float32's range at any scale."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._trained = [p for p in model.parameters() if p.requires_grad]

    def penalty(self) -> torch.Tensor:
        return 1e30 * torch.stack([p.sum() for p in self._trained]).sum()


def test_a_scale_below_one_ends_the_run(bases: Callable[[str], Path], tokens: Path) -> None:
    settings, rows = parse_spec(TrainingSpec, spec(bases("llama"))), TokenRows(tokens)
    made = assemble(settings, Place(), rows)
    before = made.full_state()
    reason = r"step 1: fp16, the gradient is not finite at a loss scale of 1.*Set precision to bf16"
    with pytest.raises(JobFailedError, match=reason):
        run(settings, made.backend, rows, course=Steep(made.model), start=Progress(loss_scale=4))
    assert difference(before, made.full_state()) == 0


def test_a_base_that_overflows_in_float16_is_refused(bases: Callable[[str], Path]) -> None:
    path = bases("t5")
    settings = parse_spec(TrainingSpec, spec(path) | {"task": "seq_2_seq_lm"})
    with pytest.raises(BaseModelError, match=r"overflows in float16.* wo .*precision to bf16"):
        check_base(empty_base(str(path), task="seq_2_seq_lm"), settings)


@pytest.mark.parametrize("scale", [1.0, 2.0**18])
def test_the_heads_gradient_in_float16(bases: Callable[[str], Path], scale: float) -> None:
    """The scale over three label tokens may exceed float16's range; the gradients do not."""
    found: list[torch.Tensor] = []
    for dtype in (torch.float32, torch.float16):
        measured = LossModel(load_base(str(bases("llama")), dtype)).eval()
        assert measured.has_plain_head
        torch.manual_seed(0)
        hidden = (torch.randn(3, measured.base.config.hidden_size) * 1e-3).to(dtype)
        hidden.requires_grad_(True)
        with measured.autocast():
            loss = measured.loss(hidden, hidden, torch.tensor([5, 6, 7]))
        (loss / 3 * scale).backward()
        assert hidden.grad is not None
        found.append(hidden.grad.float())
    away = (found[0] - found[1]).abs().max() / found[0].abs().max()
    assert float(away) < 5e-3


def test_the_scale() -> None:
    still = LossScale(is_dynamic=False)
    still.grow()
    assert (still.value, still.is_dynamic) == (1.0, False)
    scale = LossScale(is_dynamic=True, value=4.0, good_steps=999)
    scale.grow()
    assert scale.value == 8.0
    assert [scale.halve() for _ in range(4)] == [True, True, True, False]
    assert scale.good_steps == 0
    largest = LossScale(is_dynamic=True, value=2.0**24, good_steps=999)
    largest.grow()
    assert largest.value == 2.0**24
