"""Demonstrations as an adapter: which rows, what text, and that it is the base reading them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import load
from conftest import CONTEXT, byte_tokenizer
from workers import Case, run_case

from cluster.errors import SpecError
from cluster.spec import parse_spec
from training.command import plan, resolved
from training.data import tokenize
from training.place import Place
from training.spec import TrainingSpec

Bases = Callable[[str], Path]


@pytest.fixture
def document(bases: Bases, tmp_path: Path) -> dict[str, Any]:
    rows = [f'{{"prompt": "{i}->", "completion": "{i * i}"}}' for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return {
        "base_model": str(bases("llama")),
        "method": {"kind": "hard_prompt", "demonstrations": 3, "separator": ";"},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "output": {"name": "x"},
        "zero": {"stage": 3},
    }


def text_of(document: dict[str, Any], **method: Any) -> str:
    changed = {**document, "method": {**document["method"], **method}}
    spec = resolved(parse_spec(TrainingSpec, changed)).method
    assert spec.kind == "hard_prompt"
    return spec.text or ""


def test_the_rows_are_the_first_or_those_that_the_seed_draws(document: dict[str, Any]) -> None:
    assert text_of(document, choose="first") == "0->0;1->1;2->4;"
    drawn = text_of(document)
    assert drawn == text_of(document) != text_of({**document, "seed": 1})
    assert len(set(drawn.split(";"))) == 4
    assert text_of(document, text="mine") == "mine"


def test_what_cannot_be_a_prompt_is_refused_before_the_start(document: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"method.demonstrations is 10, .* has 9 rows"):
        text_of(document, demonstrations=10)
    shared = {**document, "data": {**document["data"], "validation": 0.2}}
    with pytest.raises(SpecError, match=r"data.validation: 0.2 is a share .* name a file"):
        text_of(shared)
    assert text_of(shared, text="mine") == "mine"
    with pytest.raises(
        SpecError, match=rf"virtual tokens leave no room for a row in the context of {CONTEXT}"
    ):
        text_of(document, text="x" * CONTEXT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_the_job_has_no_steps_and_plain_peft_reads_the_demonstrations(
    bases: Bases, document: dict[str, Any], tmp_path: Path, family: str
) -> None:
    spec = resolved(parse_spec(TrainingSpec, {**document, "base_model": str(bases(family))}))
    planned = plan(spec)
    assert (planned.trainable_parameters, planned.steps) == (0, 0)
    tokenize(spec.data, byte_tokenizer(), tmp_path / "tokens")
    case = Case(spec.model_dump(mode="json"), tmp_path / "run")
    run_case(case, tmp_path / "tokens", Place())
    assert spec.method.kind == "hard_prompt"
    shown = byte_tokenizer()(spec.method.text)["input_ids"]
    asked = byte_tokenizer()("5->")["input_ids"]
    adapted = peft.PeftModel.from_pretrained(load(bases(family)), str(tmp_path / "run" / "adapter"))
    assert adapted.active_peft_config.prompt_tuning_init_text == spec.method.text
    with torch.no_grad():
        found = adapted.eval()(torch.tensor([asked])).logits[0, -len(asked) :]
        whole = load(bases(family))(torch.tensor([shown + asked])).logits[0, -len(asked) :]
    assert (found - whole).abs().max() < 1e-4
