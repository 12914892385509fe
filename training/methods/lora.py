"""LoRA through PEFT, and PEFT's own way to save and load that every PEFT method shares."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from cluster.errors import SpecError
from training.method_spec import LoraSpec


def attach(model: Any, spec: LoraSpec, base_path: str) -> torch.nn.Module:
    """Add a LoRA to the targeted linear modules of `model`.

    Raises:
        SpecError: `target_modules` or a pattern matches nothing; the message lists what there is.
    """
    from peft import LoraConfig, get_peft_model

    targets = spec.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type] # PEFT takes floats and annotates int
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        base_model_name_or_path=base_path,
    )
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, re.error) as error:
        if "target modules" not in str(error).lower():
            raise SpecError(f"method: PEFT refuses it on {base_path}: {error}") from error
        raise SpecError(
            f"method.target_modules: {targets!r} matches no module of {base_path}; "
            f"it has {', '.join(linear_names(model))}"
        ) from error
    for field, patterns in (
        ("rank_pattern", spec.rank_pattern),
        ("alpha_pattern", spec.alpha_pattern),
    ):
        tuner: Any = adapted.base_model
        _check_patterns(field, patterns, tuner.targeted_module_names)
    return adapted


def _check_patterns(field: str, patterns: Iterable[str], targeted: Iterable[str]) -> None:
    """PEFT only warns of a pattern that nothing matches, and trains without it."""
    names = list(targeted)
    for pattern in patterns:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            last = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise SpecError(
                f"method.{field}: {pattern!r} matches no targeted module; they are "
                f"{', '.join(last)}"
            )


def linear_names(model: torch.nn.Module) -> list[str]:
    """The distinct last names of the linear modules, for error messages."""
    kinds = ("Linear", "Conv1D")
    found = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m).__name__ in kinds}
    return sorted(found)


def save_peft(model: Any, folder: Path) -> None:
    """Write the adapter folder as PEFT does."""
    model.save_pretrained(str(folder), safe_serialization=True)


def load_peft(model: Any, folder: Path) -> torch.nn.Module:
    """Put a PEFT folder onto `model`, for inference."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))
