"""Evaluation: the numbers are the textbook's and anybody's; the best weights, early stopping, and
a run that was killed in between ends with the same bytes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import VARIANTS, randomize, variants_of
from workers import Case, run_case, run_cases, weights_of

from cluster.errors import SpecError
from cluster.spec import parse_spec
from training import worker
from training.assembly import assemble
from training.checkpoint import read_checkpoint
from training.data_spec import EvaluationSpec
from training.evaluation import Evaluation, best_of, is_over, question_of
from training.loop import run
from training.place import Place
from training.rouge import rouge_l
from training.rows import IGNORE, TokenRows, row_hash, split, write_rows
from training.several import Rows
from training.spec import TrainingSpec
from training.step import Continuation, LossModel, collate

Bases = Callable[[str], Path]
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 4},
    "bitfit": {"kind": "bitfit"},
    "prompt_tuning": {"kind": "prompt_tuning", "num_virtual_tokens": 4},
    "prefix_tuning": {"kind": "prefix_tuning", "num_virtual_tokens": 4, "projection": True},
    "fishmask": {"kind": "fishmask", "num_samples": 4},
    "adalora": {"kind": "adalora", "r": 2, "init_r": 4},
}


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        # Of a cartridge PEFT's own generate fails; nothing here trains one.
        *((f, v) for f in ("llama", "mistral", "gpt2") for v in variants_of(f) if v != "cartridge"),
        *(("bloom", v) for v in ("lora", "bitfit", "prompt_tuning", "prefix_tuning")),
    ],
)
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_whole_row(bases: Bases, family: str, variant: str) -> None:
    torch.manual_seed(1)
    model = VARIANTS[variant](bases(family))
    randomize(model)
    model.eval()
    row = [5, 6, 7, 8, 9]
    expected: list[int] = []
    for _ in range(12):
        logits = model(input_ids=torch.tensor([row + expected])).logits[0, -1]
        expected.append(int(logits.argmax()))
    measured = LossModel(model).eval()
    continued = Continuation(list(row))
    for _ in range(12):
        continued.ids.append(int(measured(continued).argmax()))
    assert continued.ids[len(row) :] == expected
    # What follows is packed again.
    rows = [([1, 2, 3], [IGNORE, 2, 3])]
    assert measured.is_packed == (family != "bloom")
    assert math.isfinite(float(measured(collate(rows, torch.device("cpu")))))


@pytest.mark.parametrize(
    ("given", "expected", "score"),
    [
        ("the cat sat on the mat", "the cat on the mat", 10 / 11),
        ("The cat", "the CAT.", 1.0),
        ("a b c d", "d c b a", 0.25),
        ("", "a", 0.0),
        ("", "", 1.0),
        ("我喜歡貓", "我喜歡狗", 0.75),
        ("नमस्ते दुनिया", "नमस्कार दुनिया", 0.5),
        ("क्\u200dष", "क्\u200dक", 0.0),
        ("un cafe\u0301", "un caf\u00e9", 1.0),
        ("か\u3099く", "がく", 1.0),
        ("!!!", "???", 0.0),
        ("\u2764\ufe0f", "\u2600\ufe0f", 0.0),
        ("!!! ", "!!!", 1.0),
    ],
)
def test_rouge_l(given: str, expected: str, score: float) -> None:
    assert rouge_l(given, expected) == pytest.approx(score)


def test_a_question_is_what_stands_before_the_last_learned_part() -> None:
    assert question_of(([1, 2, 3, 4], [IGNORE, 2, IGNORE, 4])) == ([1, 2, 3], [4])
    assert question_of(([1, 2, 3, 4], [IGNORE, IGNORE, 3, IGNORE])) == ([1, 2], [3])
    assert question_of(([1, 2], [1, 2])) is None


def test_the_best_and_the_end_follow_from_the_history() -> None:
    def history(*losses: float) -> list[Evaluation]:
        return [Evaluation(i, loss, exact_match=-loss) for i, loss in enumerate(losses)]

    once = EvaluationSpec(every_steps=1, patience=2)
    assert best_of([], "loss") is None
    assert best_of(history(2, 1, 1, 3), "loss") == history(2, 1)[1]
    assert best_of(history(2, 1, 1, 3), "exact_match") == history(2, 1)[1]
    assert best_of(history(2, 1), "none") is None
    assert best_of(history(math.nan, 2, math.nan), "loss") == history(0, 2)[1]
    assert not is_over(history(3, 2, 1), once)
    assert not is_over(history(3, 1, 2), once)
    assert is_over(history(3, 1, 2, 1), once)
    assert not is_over(history(3, 1, 2, 0.5), once)


@pytest.mark.parametrize(
    ("evaluation", "data", "reason"),
    [
        ({"every_steps": 5}, {}, "evaluation needs data.validation"),
        ({"patience": 1}, {"validation": 0.5}, "patience needs every_steps"),
        ({"best": "rouge_l", "generations": 0}, {"validation": 0.5}, "needs generations"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    evaluation: dict[str, Any], data: dict[str, Any], reason: str
) -> None:
    document = {"base_model": "b", "method": {"kind": "lora"}, "data": {"train": "x", **data},
                "output": {"name": "x"}, "evaluation": evaluation}  # fmt: skip
    with pytest.raises(SpecError, match=reason):
        parse_spec(TrainingSpec, document)


STEPS, HALF, WILD_STEPS = 8, 4, 16
# Answers are drawn at random, so what is learned of them by heart only harms.
WILD = {"learning_rate": 0.02, "schedule": "constant", "warmup_ratio": 0}
EVALUATION = {"every_steps": 2, "generations": 3, "max_new_tokens": 5}
# Stage 3 evaluates each method in test_stages.py.
STAGES = {method: (0, 2, 3) if method == "lora" else (0, 2) for method in METHOD_SETTINGS}


def evaluated(base: Path, method: str, stage: int, workers: int, **more: Any) -> dict[str, Any]:
    return {
        "base_model": str(base),
        "method": METHOD_SETTINGS[method],
        "data": {"train": "unused", "validation": 0.3},
        "evaluation": EVALUATION,
        "output": {"name": "unused"},
        "optimizer": {"learning_rate": 0.005, "max_grad_norm": 0.5},
        "max_steps": STEPS,
        "micro_batch_size": 8 // workers,
        "zero": {"stage": stage},
        "workers": {"count": workers},
        "checkpoint_every_steps": HALF,
        "log_every_steps": 1,
        **more,
    }


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    random = np.random.default_rng(0)
    rows: list[tuple[list[int], list[int]]] = []
    for i in range(41):
        answer = [*random.integers(60, 120, i % 5 + 1).tolist(), 256]
        question = [i + 1] * (i % 7 + 1)
        rows.append((question + answer, [IGNORE] * len(question) + answer))
    write_rows(((*row, row_hash(*row)) for row in rows), folder)
    return folder


@pytest.fixture(scope="module")
def runs(bases: Bases, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """METHOD-alone on one worker, METHOD-<stage> on two; what ends early also from its middle."""
    folder, base = tmp_path_factory.mktemp("runs"), bases("llama")
    cases: list[Case] = []
    for method in METHOD_SETTINGS:
        run_case(Case(evaluated(base, method, 0, 1), folder / f"{method}-alone"), tokens, Place())
        for stage in STAGES[method]:
            settings = evaluated(base, method, stage, 2)
            cases.append(Case(settings, folder / f"{method}-{stage}"))
    for stage in (2, 3):
        wild = evaluated(base, "lora", stage, 2, optimizer=WILD, max_steps=WILD_STEPS)
        wild["evaluation"] = {**EVALUATION, "patience": 2}
        half = folder / f"wild-{stage}" / f"checkpoint-{HALF}"
        cases.append(Case(wild, folder / f"wild-{stage}"))
        cases.append(Case(wild, folder / f"wild-{stage}-resumed", half))
    run_cases(2, cases, tokens)
    return folder


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_what_is_saved_is_the_best(bases: Bases, tokens: Path, method: str) -> None:
    spec = parse_spec(TrainingSpec, evaluated(bases("llama"), method, 0, 1))
    rows, validation = split(TokenRows(tokens), 0.3, spec.seed)
    made = assemble(spec, Place(), rows, None, validation)
    end = run(spec, made.backend, rows, course=made.course, evaluator=made.evaluator)
    made.take_best(end.step)
    assert made.evaluator is not None
    parameters = dict(made.model.named_parameters())
    best = {k: v for k, v in made.evaluator.best.items() if k.startswith("param/")}
    assert best
    for name, value in best.items():
        assert torch.equal(parameters[name.removeprefix("param/")], value)


def test_the_loss_between_two_log_lines_outlives_a_restart_and_an_early_end(
    bases: Bases, tokens: Path, tmp_path: Path
) -> None:
    wild = evaluated(bases("llama"), "lora", 0, 1, optimizer=WILD, max_steps=WILD_STEPS)
    wild |= {"evaluation": {**EVALUATION, "patience": 2}, "log_every_steps": 3}
    run_case(Case(wild, tmp_path / "whole"), tokens, Place())
    half = tmp_path / "whole" / f"checkpoint-{HALF}"
    run_case(Case(wild, tmp_path / "resumed", half), tokens, Place())
    curves = [progress_of(tmp_path / name)["curve"] for name in ("whole", "resumed")]
    assert curves[0] == curves[1]
    ended = history(tmp_path / "whole")[-1]["step"]
    assert ended < WILD_STEPS
    assert curves[0][-1][0] == ended


@pytest.mark.parametrize("max_new_tokens", [5, 500])
def test_answers_that_no_row_has_room_for_are_told(
    bases: Bases, tokens: Path, max_new_tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = evaluated(bases("llama"), "lora", 0, 1)
    settings["evaluation"] = {**EVALUATION, "max_new_tokens": max_new_tokens}
    spec = parse_spec(TrainingSpec, settings)
    rows = Rows(*split(TokenRows(tokens), 0.3, spec.seed), None)
    made = assemble(spec, Place(), rows.training, None, rows.validation)
    worker._Adapter(spec, made, rows, Place(), None).announce()
    told = "no ROUGE-L, since no row has a prompt that leaves 500 tokens for an answer; lower"
    assert (told in capsys.readouterr().out) is (max_new_tokens == 500)


def history(run: Path) -> list[dict[str, Any]]:
    return progress_of(run)["evaluations"]


def progress_of(run: Path) -> dict[str, Any]:
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((last / "progress.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stage"), [(method, stage) for method in STAGES for stage in STAGES[method]]
)
def test_the_numbers_are_the_same_on_any_number_of_workers(
    runs: Path, method: str, stage: int
) -> None:
    alone, both = history(runs / f"{method}-alone"), history(runs / f"{method}-{stage}")
    assert [found["step"] for found in alone] == [2, 4, 6, 8]
    for one, other in zip(alone, both, strict=True):
        assert other == pytest.approx(one, abs=1e-5)
        assert 0 <= one["exact_match"] <= one["rouge_l"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_gets_worse_ends_early_with_its_best_weights(runs: Path, stage: int) -> None:
    run = runs / f"wild-{stage}"
    found = [Evaluation(**one) for one in history(run)]
    best = best_of(found, "loss")
    assert best is not None
    assert len(found) - 1 - found.index(best) == 2  # patience
    assert found[-1].step < WILD_STEPS
    state, _ = read_checkpoint(run / f"checkpoint-{found[-1].step}")
    saved = {k: v for k, v in state.items() if k.startswith("best/param/")}
    trained = [torch.equal(v, state[k.removeprefix("best/")]) for k, v in saved.items()]
    assert not all(trained)
    weights = {
        k.removeprefix("best/param/model.").replace("default.", ""): v for k, v in saved.items()
    }
    assert weights.keys() == weights_of(run).keys()
    assert all(torch.equal(value, weights[key]) for key, value in weights_of(run).items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_has_the_same_best_the_same_end_and_the_same_bytes(
    runs: Path, stage: int
) -> None:
    whole, resumed = runs / f"wild-{stage}", runs / f"wild-{stage}-resumed"
    assert not (resumed / f"checkpoint-{HALF}").exists()
    assert history(resumed) == history(whole)
    files = [run / "adapter" / "adapter_model.safetensors" for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
