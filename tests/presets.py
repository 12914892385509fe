"""The methods that users are given, at a size for tiny bases: one row for each preset, and more for
options that change what is trained or saved. Every table of methods takes its rows from here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).resolve().parents[1] / "configs" / "training"
# Row -> preset, and what it changes of the preset's method.
_OPTIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora + whole modules": ("lora", {"modules_to_save": ["lm_head", "norm"], "dropout": 0.1}),
    "lora on embedding and head": (
        "lora",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "dora on pissa, two rates": (
        "dora",
        {"init": "pissa", "lora_plus_ratio": 2, "rank_pattern": {"q_proj": 4}},
    ),
    "dylora, frozen": ("dylora", {"frozen": True}),
    "p_tuning, lstm": ("p_tuning", {"encoder": "lstm"}),
    "prefix_tuning, projected": ("prefix_tuning", {"projection": True}),
}
# By kind: what a preset says that does not suit a run of a few steps.
_SMALL: Mapping[str, Mapping[str, Any]] = {"adalora": {"allocate_every_steps": 1}}


def _is_one_method(path: Path) -> bool:
    """Not a sweep of other presets' methods, and not one of them over another kind of base or for
    another task, which QUANTIZED and test_tasks.py try."""
    return not {"adapters", "quantization", "task"} & yaml.safe_load(path.read_text()).keys()


PRESETS = sorted(path.stem for path in _FOLDER.glob("*.yaml") if _is_one_method(path))
# Rows whose base is in few bits: by preset, its `quantization`.
QUANTIZED: Mapping[str, Any] = {
    path.stem: document["quantization"]
    for path in sorted(_FOLDER.glob("*.yaml"))
    if "quantization" in (document := yaml.safe_load(path.read_text()))
}
ROWS = [*PRESETS, *_OPTIONS]


def method_of(row: str) -> dict[str, Any]:
    """The `method` part of a row's YAML."""
    preset, options = _OPTIONS.get(row, (row, {}))
    method = yaml.safe_load((_FOLDER / f"{preset}.yaml").read_text())["method"]
    return {**method, **_SMALL.get(method["kind"], {}), **options}


# One preset of each kind, for where a kind's variants make no difference.
KINDS = {
    kind: kind if kind in PRESETS else next(p for p in PRESETS if method_of(p)["kind"] == kind)
    for kind in sorted(method_of(preset)["kind"] for preset in PRESETS)
}
