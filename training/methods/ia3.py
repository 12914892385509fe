"""IA3 (Liu et al. 2022, arXiv:2205.05638) through PEFT: factors of activations."""

from __future__ import annotations

from typing import Any

import torch

from cluster.errors import SpecError
from cluster.tasks import head_modules, peft_task_type
from training.method_spec import IA3Spec
from training.methods.placement import check_fit, in_float32, linear_names
from training.methods.targets import check_targets


def attach(model: Any, spec: IA3Spec, base_path: str) -> torch.nn.Module:
    """Put a factor on each output, or feed-forward input, of the targeted modules.

    Raises:
        SpecError: one of the targets matches nothing, or they are needed since PEFT has none for
            this family.
    """
    from peft import IA3Config, get_peft_model

    targets, inputs = spec.target_modules, spec.feedforward_modules
    if (targets is None) != (inputs is None):
        raise SpecError(
            "method: give target_modules and feedforward_modules both, or neither; "
            "feedforward_modules: [] scales outputs alone"
        )
    names, linear = [name for name, _ in model.named_modules()], linear_names(model)
    for field, asked in (("target_modules", targets), ("feedforward_modules", inputs or None)):
        if asked is not None:
            check_targets(asked, names, linear, base_path, field)
    if beside := set(inputs or ()) - set(targets or ()):
        raise SpecError(
            f"method.feedforward_modules: {', '.join(map(repr, sorted(beside)))} is not in "
            "method.target_modules; name it in both"
        )
    config = IA3Config(
        task_type=peft_task_type(model),
        target_modules=None if targets is None else list(targets),
        feedforward_modules=None if inputs is None else list(inputs),
        modules_to_save=list(head_modules(model)) or None,
        base_model_name_or_path=base_path,
    )
    try:
        return in_float32(get_peft_model(model, config))
    except ValueError as error:
        check_fit(error, targets, linear)
        raise SpecError(
            f"method: PEFT refuses IA3 on {base_path} ({error}); name method.target_modules and "
            f"method.feedforward_modules among {', '.join(linear)}"
        ) from error
