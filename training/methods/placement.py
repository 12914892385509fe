"""Where a low-rank method's updates go: the options that all of them share, checked.

PEFT only warns of a name that matches nothing, or passes over it, and trains without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from cluster.errors import SpecError
from cluster.tasks import head_modules, peft_task_type
from training.method_spec import LowRankSpec
from training.methods.head import is_of_head
from training.methods.targets import check_targets, is_targeted

# Of what PEFT says that finds no module to adapt, and that finds one of a kind which it cannot.
_NO_TARGET = ("target modules", "modules were targeted", "modules were excluded")
_UNFIT = re.compile(r"Target module (\w+)\(")


def peft_placement(model: Any, spec: LowRankSpec, base_path: str) -> dict[str, Any]:
    """The arguments of a LoraConfig, or of its children, that a LowRankSpec means.

    Raises:
        SpecError: an option names nothing of the base.
    """
    targets, excluded = spec.target_modules, spec.exclude_modules
    if spec.layers_to_transform and isinstance(targets, str):
        if targets != "all-linear":
            raise SpecError(
                f"method.layers_to_transform: the expression target_modules {targets!r} chooses "
                "the layers itself; give suffixes, or leave it empty"
            )
        targets = tuple(linear_names(model))
    names = [name for name, _ in model.named_modules() if name]
    if not isinstance(targets, str):
        check_targets(targets, names, linear_names(model), base_path)
    patterns = (excluded,) if isinstance(excluded, str) else excluded
    _check_names("exclude_modules", patterns, names, is_regex=isinstance(excluded, str))
    _check_names("modules_to_save", spec.modules_to_save, names)
    # In full: PEFT would take `norm` for the end of `input_layernorm` too.
    saved = [n for n in names for suffix in spec.modules_to_save if f".{n}".endswith(f".{suffix}")]
    saved += [name for name in head_modules(model) if name not in saved]
    return {
        "task_type": peft_task_type(model),
        "base_model_name_or_path": base_path,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "exclude_modules": excluded if isinstance(excluded, str) else list(excluded) or None,
        "layers_to_transform": list(spec.layers_to_transform) or None,
        "modules_to_save": saved or None,
        "bias": spec.bias,
        "lora_dropout": spec.dropout,
    }


def attach_low_rank(model: Any, config: Any, spec: LowRankSpec, base_path: str) -> torch.nn.Module:
    """`model` with PEFT's `config` on it; all that is trained is float32.

    Raises:
        SpecError: the targets match nothing, or only a part of them does.
    """
    from peft import get_peft_model

    linear = linear_names(model)
    try:
        adapted: Any = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        check_fit(error, spec.target_modules, linear)
        if not any(part in str(error).lower() for part in _NO_TARGET):
            raise SpecError(f"method: PEFT refuses it on {base_path}: {error}") from error
        raise _no_target(model, spec, config.modules_to_save or (), base_path) from error
    _check_excluded(adapted, spec)
    targeted: list[str] = adapted.base_model.targeted_module_names
    for layer in spec.layers_to_transform:
        if not _has_layer(targeted, layer):
            raise _no_layer(layer, base_path)
    if spec.bias != "none" and not any(
        name.endswith("bias") and p.requires_grad for name, p in adapted.named_parameters()
    ):
        raise SpecError(
            f"method.bias: {spec.bias!r}, but {base_path} has no such bias; set it to none"
        )
    return in_float32(adapted)


def check_fit(error: Exception, targets: object, linear: Iterable[str]) -> None:
    """Raise SpecError if `error` is PEFT's for a target of a kind that it cannot adapt."""
    if match := _UNFIT.match(str(error)):
        raise SpecError(
            f"method.target_modules: {targets!r} means a module of kind {match[1]}, which this "
            f"method cannot adapt; name linear ones: {', '.join(linear)}"
        ) from error


def _check_excluded(adapted: Any, spec: LowRankSpec) -> None:
    """Raise SpecError for a parameter that PEFT trains although its module is excluded: it looks at
    modules alone there."""
    for name in adapted.base_model.targeted_parameter_names:
        module = name.rpartition(".")[0]
        if spec.exclude_modules and is_targeted(module, spec.exclude_modules):
            raise SpecError(
                f"method.exclude_modules: means {module!r}, whose parameters PEFT trains with "
                f"target_modules {spec.target_modules!r} all the same; list the names of linear "
                "modules there instead"
            )


def _no_target(model: Any, spec: LowRankSpec, saved: Iterable[str], base_path: str) -> SpecError:
    """Which option leaves PEFT without any target, where it trains the modules `saved` whole."""
    names = [name for name, _ in model.named_modules()]
    for layer in spec.layers_to_transform:
        if not _has_layer(names, layer):
            return _no_layer(layer, base_path)
    targets, excluded = spec.target_modules, spec.exclude_modules
    if _is_within(saved, targets, model):
        return SpecError(
            f"method.target_modules: {targets!r} means nothing but what is trained whole already "
            "(method.modules_to_save, a classifier's head); leave it out of one of them"
        )
    is_found = True  # each name of a list matches something, or it was refused before
    if isinstance(targets, str) and targets != "all-linear":
        is_found = any(re.fullmatch(targets, name) for name in names)
    if excluded and is_found:
        return SpecError(
            f"method.exclude_modules: {excluded!r} leaves nothing of method.target_modules "
            f"{targets!r} on {base_path}; exclude less"
        )
    layers = f" in layers {list(spec.layers_to_transform)}" if spec.layers_to_transform else ""
    return SpecError(
        f"method.target_modules: {targets!r} matches no module of {base_path}{layers}; it has "
        f"{', '.join(linear_names(model))}"
    )


def _is_within(saved: Iterable[str], targets: str | tuple[str, ...], model: Any) -> bool:
    """Whether all modules that `targets` names are of those `saved`."""
    wanted = tuple(linear_names(model)) if targets == "all-linear" else targets
    found = [f"{name}." for name, _ in model.named_modules() if is_targeted(name, wanted)]
    wholes = tuple(f"{name}." for name in saved)
    return bool(found) and all(name.startswith(wholes) for name in found)


def _has_layer(names: Iterable[str], layer: int) -> bool:
    return any(f".{layer}." in f"{name}." for name in names)


def _no_layer(layer: int, base_path: str) -> SpecError:
    return SpecError(
        f"method.layers_to_transform: {base_path} has no layer {layer}; they count from 0"
    )


def in_float32(adapted: torch.nn.Module) -> torch.nn.Module:
    """`adapted` with all that is trained in float32: updates of a bias or a head are far below
    bf16's resolution."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def check_saved_modules(model: Any, method: Any) -> None:
    """Raise SpecError for a method that trains modules whole which a base in 4 or 8 bits has not;
    `model` may be the plain one."""
    head = model.get_output_embeddings()
    for suffix in getattr(method, "modules_to_save", ()):
        for name, module in model.named_modules():
            if f".{name}".endswith(f".{suffix}") and any(
                is_linear(part) and part is not head for part in module.modules()
            ):
                raise SpecError(
                    f"method.modules_to_save: {suffix!r} is {name!r}, which cannot be trained "
                    "whole in 4 or 8 bits; leave it out, or leave quantization out (embeddings, "
                    "norms and the output embedding stay whole)"
                )


def check_patterns(field: str, patterns: Iterable[str], adapted: Any) -> None:
    """Raise SpecError for a rank or alpha pattern that matches no targeted module."""
    names: list[str] = adapted.base_model.targeted_module_names
    for pattern in patterns:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            raise SpecError(
                f"method.{field}: {pattern!r} matches no targeted module; they are "
                f"{_last_names(names)}"
            )


def is_linear(module: torch.nn.Module) -> bool:
    """Whether it is torch's, GPT-2's, or one that a base or bitsandbytes made of torch's."""
    return isinstance(module, torch.nn.Linear | Conv1D)


def check_linear(adapted: Any, remedy: str) -> None:
    """Raise SpecError for a targeted module that is not linear, or a parameter, such as stacked
    experts, which PEFT targets in place of modules; `remedy` says why and what to do."""
    for name in adapted.base_model.targeted_parameter_names:
        raise SpecError(
            f"method.target_modules: means the parameter {name!r} too, where it can list the names "
            f"of linear modules; {remedy}"
        )
    for name in adapted.base_model.targeted_module_names:
        module = adapted.base_model.model.get_submodule(name).get_base_layer()
        if not is_linear(module):
            raise SpecError(
                f"method.target_modules: {name!r} is no linear module but {type(module).__name__}; "
                f"{remedy}"
            )


def linear_names(model: torch.nn.Module) -> list[str]:
    """The distinct last names of the linear modules but the output embedding, or a classifier's
    head."""
    whole: Any = model
    head = whole.get_output_embeddings()
    named: Mapping[str, Any] = dict(model.named_modules())
    found = (name for name, module in named.items() if is_linear(module) and module is not head)
    return sorted({name.rsplit(".", 1)[-1] for name in found if not is_of_head(model, name)})


def _check_names(
    field: str, patterns: Iterable[str], names: list[str], *, is_regex: bool = False
) -> None:
    for pattern in patterns:
        found = (
            any(re.fullmatch(pattern, name) for name in names)
            if is_regex
            else any(f".{name}".endswith(f".{pattern}") for name in names)
        )
        if pattern and not found:
            raise SpecError(
                f"method.{field}: {pattern!r} matches no module; there are {_last_names(names)}"
            )


def _last_names(names: Iterable[str]) -> str:
    last = {name.rsplit(".", 1)[-1] for name in names}
    return ", ".join(sorted(name for name in last if not name.isdigit()))
