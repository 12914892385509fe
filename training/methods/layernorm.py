"""LayerNorm tuning (Zhao et al. 2023, arXiv:2312.11420) through PEFT: norms alone."""

from __future__ import annotations

from typing import Any

import torch

from cluster.errors import SpecError
from cluster.tasks import head_modules, peft_task_type
from training.method_spec import LayerNormSpec
from training.methods.head import is_of_head
from training.methods.placement import in_float32
from training.methods.targets import check_targets


def attach(model: Any, spec: LayerNormSpec, base_path: str) -> torch.nn.Module:
    """Train copies of the targeted norms, in float32 whatever the base's dtype.

    Raises:
        SpecError: a part of `target_modules` matches nothing, or something that is no norm.
    """
    from peft import LNTuningConfig, get_peft_model

    norms = norm_modules(model)
    last_names = sorted({name.rsplit(".", 1)[-1] for name in norms})
    targets = spec.target_modules
    if targets == "all":
        targets = tuple(last_names)
    config = LNTuningConfig(
        task_type=peft_task_type(model),
        target_modules=targets if isinstance(targets, str) else list(targets),
        base_model_name_or_path=base_path,
        modules_to_save=list(head_modules(model)) or None,
    )
    check_targets(targets, (name for name, _ in model.named_modules()), norms, base_path)
    adapted: Any = get_peft_model(model, config)
    wrong = [name for name in adapted.base_model.targeted_module_names if name not in norms]
    if wrong:
        raise SpecError(
            f"method.target_modules: {wrong[0]!r} is no norm; the norms of {base_path} are "
            f"{', '.join(last_names)}"
        )
    return in_float32(adapted)


def norm_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The norms of `model` that have something to train, by name, but a classifier's head's;
    families name their classes alike (LayerNorm, LlamaRMSNorm, …)."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and next(module.parameters(recurse=False), None) is not None
        and not is_of_head(model, name)
    }
