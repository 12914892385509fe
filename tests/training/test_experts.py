"""Experts that some rows do not reach: on each worker other gradients are missing."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers
from conftest import closing_tokenizer
from workers import Case, difference, run_case, run_cases, state_of

from cluster.base_model import empty_base
from cluster.errors import BaseModelError, SpecError
from cluster.spec import parse_spec
from cluster.tables import write_table
from training.assembly import check_base
from training.checkpoint import read_checkpoint
from training.data import tokenize
from training.data_spec import DataSpec
from training.dry_run import Shape
from training.estimate import estimate
from training.place import Place
from training.spec import TrainingSpec

STEPS, HALF = 4, 2
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["wi", "wo"]},
    "adalora": {"r": 2, "init_r": 3, "target_modules": ["wi"], "allocate_every_steps": 1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With many experts, and room for all tokens in each."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=261, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2,
        num_heads=4, num_experts=8, expert_capacity=4096, router_jitter_noise=0.0,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("switch")
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(folder)
    closing_tokenizer(None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"prompt": chr(97 + i % 24) * 3, "completion": chr(65 + i % 24)} for i in range(24)]
    write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    data = DataSpec(train=str(folder / "rows.parquet"))
    tokenize(data, closing_tokenizer(None), folder / "tokens", "seq_2_seq_lm")
    return folder / "tokens"


@pytest.fixture(scope="module")
def runs(base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """METHOD/alone on one worker."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in METHODS:
        run_case(case(base, folder, kind, 1, "alone"), pairs, Place())
    return folder


def case(
    base: Path, folder: Path, kind: str, workers: int, name: str, resume: Path | None = None
) -> Case:
    settings = {
        "base_model": str(base), "task": "seq_2_seq_lm", "method": {"kind": kind, **METHODS[kind]},
        "data": {"train": "unused"}, "output": {"name": "unused"},
        "optimizer": {"learning_rate": 0.01, "weight_decay": 0.1},
        "batch_size": 4, "micro_batch_size": 2, "max_steps": STEPS,
        "checkpoint_every_steps": HALF, "zero": {"stage": 0}, "workers": {"count": workers},
    }  # fmt: skip
    return Case(settings, folder / kind / name, resume)


def test_zero_is_refused_where_workers_would_reach_other_experts(base: Path) -> None:
    def checked(stage: int, workers: int) -> None:
        settings = dict(case(base, base, "lora", workers, "unused").spec) | {
            "zero": {"stage": stage}
        }
        check_base(empty_base(str(base), task="seq_2_seq_lm"), parse_spec(TrainingSpec, settings))

    spec = case(base, base, "lora", 2, "unused").spec
    with pytest.raises(SpecError, match="cannot be predicted"):
        estimate(parse_spec(TrainingSpec, spec), {"unused": Shape(1, 8, 8)})
    checked(0, 2)
    checked(2, 1)
    with pytest.raises(BaseModelError, match=r"set zero\.stage to 0"):
        checked(2, 2)


@pytest.mark.parametrize("kind", METHODS)
def test_a_resumed_run_is_the_same(
    runs: Path, base: Path, pairs: Path, tmp_path: Path, kind: str
) -> None:
    half = runs / kind / "alone" / f"checkpoint-{HALF}"
    resumed = case(base, tmp_path, kind, 1, "resumed", half)
    run_case(resumed, pairs, Place())
    alone = state_of(runs / kind / "alone")
    assert difference(alone, state_of(resumed.folder)) == 0
    reached = {
        key: bool(value.any())
        for key, value in read_checkpoint(half)[0].items()
        if key.startswith("exp_avg/") and "experts" in key
    }
    assert set(reached.values()) == {False, True}


@pytest.mark.slow
def test_a_run_is_the_same_whichever_worker_reaches_an_expert(
    runs: Path, base: Path, pairs: Path, tmp_path: Path
) -> None:
    run_cases(2, [case(base, tmp_path, kind, 2, "both") for kind in METHODS], pairs)
    for kind in METHODS:
        alone, both = state_of(runs / kind / "alone"), state_of(tmp_path / kind / "both")
        assert difference(alone, both) < 1e-5, kind
