"""The card beside an adapter: for people, for TensorBoard, and what of it is published."""

import json
import struct
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest
from adapters import make_adapter
from PIL import Image
from tensorboardX.proto import event_pb2

from cluster.local_copies import LocalCopies
from cluster.registry import EVENTS, PICTURE, README, Registry
from training.card import write_card

MESSAGES: Any = event_pb2
CURVE = [(10, 2.5), (20, 1.25), (30, 1.0)]
EVALUATIONS = [
    {"step": 20, "loss": 1.5, "exact_match": 0.25, "rouge_l": None},
    {"step": 30, "loss": 1.125, "exact_match": 0.5, "rouge_l": None},
]


def card(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "job": {"id": "title-1f3a9c2e", "continues": None},
        "spec": {"base_model": "/bases/tiny", "method": {"kind": "lora"},
                 "output": {"name": "title"}},
        "data": {"fingerprint": "abc", "rows": 12, "kept": 10},
        "libraries": {"torch": "2.13.0", "raygraft": None},
        "metrics": {
            "step": 30, "loss": 1.0, "tokens": 12_345, "train_seconds": 7.5, "tokens_per_s": 1646.0,
            "trainable_parameters": 1_000, "all_parameters": 100_000, "best_step": 20,
            "loss_curve": json.dumps(CURVE), "evaluations": json.dumps(evaluations),
        },
    }  # fmt: skip


def scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    """What an events file holds: records of length, check sum, event, check sum."""
    found: dict[str, list[tuple[int, float]]] = {}
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = MESSAGES.Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        data = data[16 + length :]
    return found


@pytest.mark.parametrize("evaluations", [EVALUATIONS, []])
def test_the_card_is_published_with_its_adapter(
    bases: Callable[[str], Path], tmp_path: Path, evaluations: list[dict[str, Any]]
) -> None:
    folder = make_adapter("lora", bases("llama"), tmp_path / "adapter")
    write_card(folder, card(evaluations))
    registry = Registry(str(tmp_path / "store"))
    version = registry.publish("title", folder)
    fetched = LocalCopies(registry, tmp_path / "cache").fetch(version)
    text = (fetched / README).read_text()
    assert text.startswith("---\nbase_model: /bases/tiny\n")
    for fact in ("title-1f3a9c2e", "1,000 of 100,000 parameters (1.000%)", "| kept | 10 |",
                 f"({PICTURE})", "kind: lora", "| torch | 2.13.0 |"):  # fmt: skip
        assert fact in text
    assert ("| 30 | 1.125 | 0.5 |" in text) == bool(evaluations)
    with Image.open(fetched / PICTURE) as picture:
        assert picture.width > 500
    expected: dict[str, list[tuple[int, float]]] = {"loss/training": CURVE}
    if evaluations:
        expected["loss/validation"] = [(20, 1.5), (30, 1.125)]
        expected["validation/perplexity"] = [
            (step, pytest.approx(exp(loss))) for step, loss in expected["loss/validation"]
        ]
        expected["validation/exact_match"] = [(20, 0.25), (30, 0.5)]
    assert scalars(fetched / EVENTS) == expected
