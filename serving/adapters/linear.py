"""LoRA, BitFit and IA3 folders as linear deltas.

LoRA (Hu et al. 2021, arXiv:2106.09685): W' = W + s B A, so y' = y + s (x Aᵀ) Bᵀ, with s = alpha / r
(rsLoRA, arXiv:2312.03732: alpha / √r). BitFit (arXiv:2106.10199): y' = y + (b' - b).
IA3 (Liu et al. 2022, arXiv:2205.05638): y' = l ∘ y, or W (l ∘ x) in feed-forward modules.

    I in    O out    r rank
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch

from cluster.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, fault
from serving.adapters.config import mapping, number, refuse_unread
from serving.adapters.primitives import LinearDelta, LoweredAdapter
from serving.adapters.target import PREFIX, ModuleShape, Target, bare_name, shape_of

_LOW_RANK = re.compile(r"(.+)\.lora_(?:(embedding)_)?([AB])(?:\.weight)?")
_SHIFT = re.compile(r"(.+?)(?:\.base_layer)?\.(lora_B\.bias|bias)")
# Fields that chose where and how a LoRA was trained; the tensors tell the result.
_TRAINED_WITH = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "runtime_config", "qalora_group_size",
}  # fmt: skip
_LORA_READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "lora_bias",
    "init_lora_weights",
}  # fmt: skip
# Starting values that leave the base's weights alone. Others (PiSSA, OLoRA, …) take a part of them
# into the adapter, so that B A alone is not the change.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_BASE_WEIGHT = re.compile(r"(.+)\.base_layer\.weight")


def lower_lora(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A LoRA folder as deltas. Raises AdapterError for whatever does not fit the target."""
    refuse_unread(folder, _LORA_READ, _TRAINED_WITH)
    start = folder.config.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in _PLAIN_STARTS:
        raise fault(
            folder.path,
            CONFIG,
            f"has init_lora_weights = {start!r}, which changed the base's weights; convert it with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    factors: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    shifts: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = bare_name(folder, key)
        if match := _LOW_RANK.fullmatch(name):
            # An embedding keeps A as [r, vocabulary] and B as [out, r], like a linear module.
            factors[match[1]][match[3]] = tensor
        elif match := _SHIFT.fullmatch(name):
            module, shape = match[1], shape_of(folder, key, match[1], target)
            scale = _scale(folder, module) if match[2] == "lora_B.bias" else None
            change = tensor.float() * scale if scale else _change_of_bias(tensor, shape)
            shifts[module] = shifts.get(module, 0) + _fit_shift(folder, key, change, shape)
        elif match := _BASE_WEIGHT.fullmatch(name):
            _check_base_weight(folder, key, tensor, shape_of(folder, key, match[1], target))
        else:
            raise fault(folder.path, WEIGHTS, f"has tensor {key!r}, which is not of a LoRA")
    deltas = {
        module: _low_rank(folder, module, parts, shifts.pop(module, None), target)
        for module, parts in factors.items()
    }
    deltas |= {module: LinearDelta(shift_O=shift) for module, shift in shifts.items()}
    return LoweredAdapter({name: _placed(delta, target) for name, delta in deltas.items()})


def _check_base_weight(
    folder: AdapterFolder, key: str, tensor: torch.Tensor, shape: ModuleShape
) -> None:
    """PEFT saves a copy of an embedding that a LoRA is on; it must be the base's own."""
    own = shape.weight
    if own is None or own.shape != tensor.shape or not torch.equal(tensor.to(own.dtype), own.cpu()):
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {key!r}, which differs from the base's weights; only an adapter over unchanged "
            "weights is served: save it with save_embedding_layers=False if they should be the "
            "base's",
        )


def lower_bitfit(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A BitFit folder as output shifts. Raises AdapterError."""
    refuse_unread(folder, (), {"target_modules"})
    deltas: dict[str, LinearDelta] = {}
    for key, module, shape in _by_module(folder, tensors, ".bias", "is no bias", target):
        tensor = tensors[key]
        change = _fit_shift(folder, key, _change_of_bias(tensor, shape), shape)
        deltas[module] = _placed(LinearDelta(shift_O=change), target)
    return LoweredAdapter(deltas)


def lower_ia3(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """An IA3 folder as output and input scales. Raises AdapterError."""
    trained_with = {"target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out",
                    "init_ia3_weights"}  # fmt: skip
    refuse_unread(folder, (), trained_with)
    deltas: dict[str, LinearDelta] = {}
    for key, module, shape in _by_module(folder, tensors, ".ia3_l", "is not of IA3", target):
        tensor = tensors[key]
        scale = tensor.float().flatten()
        if tuple(tensor.shape) == (shape.out_features, 1):
            delta = LinearDelta(scale_O=scale)
        elif tuple(tensor.shape) == (1, shape.in_features):
            delta = LinearDelta(scale_I=scale)
        else:
            raise fault(
                folder.path,
                WEIGHTS,
                f"has {key!r} with shape {tuple(tensor.shape)}, where the base has "
                f"({shape.out_features}, 1) or (1, {shape.in_features}); the adapter was made for "
                f"another base ({folder.base_model})",
            )
        deltas[module] = _placed(delta, target)
    return LoweredAdapter(deltas)


def _by_module(
    folder: AdapterFolder, keys: Iterable[str], suffix: str, otherwise: str, target: Target
) -> Iterator[tuple[str, str, ModuleShape]]:
    """(key, module, its shape) of a method with one tensor, named by `suffix`, for each module."""
    for key in keys:
        name = bare_name(folder, key)
        if not name.endswith(suffix):
            raise fault(folder.path, WEIGHTS, f"has tensor {key!r}, which {otherwise}")
        module = name.removesuffix(suffix)
        yield key, module, shape_of(folder, key, module, target)


def _low_rank(
    folder: AdapterFolder,
    module: str,
    parts: Mapping[str, torch.Tensor],
    shift: torch.Tensor | None,
    target: Target,
) -> LinearDelta:
    shape = shape_of(folder, f"{PREFIX}{module}.lora_A", module, target)
    if set(parts) != {"A", "B"}:
        raise fault(
            folder.path, WEIGHTS, f"has lora_{next(iter(parts))} of {module!r} without its pair"
        )
    if not shape.takes_low_rank:
        raise fault(folder.path, WEIGHTS, f"has a LoRA on {module!r}, which is not linear")
    rank = _rank(folder, module)
    found = (tuple(parts["A"].shape), tuple(parts["B"].shape))
    expected = ((rank, shape.in_features), (shape.out_features, rank))
    if found != expected:
        raise fault(
            folder.path,
            WEIGHTS,
            f"has A, B of {module!r} with shapes {found}, where the base {target.name} and rank "
            f"{rank} need {expected}; the adapter was made for another base ({folder.base_model})",
        )
    b_Or = parts["B"].float() * _scale(folder, module) * shape.scale
    return LinearDelta(parts["A"].float().T, b_Or.T, shift)


def _rank(folder: AdapterFolder, module: str) -> int:
    patterns = mapping(folder, "rank_pattern")
    value = patterns.get(_pattern(patterns, module), folder.config.get("r", 8))
    return int(number(folder, value, "r", whole=True))


def _scale(folder: AdapterFolder, module: str) -> float:
    patterns = mapping(folder, "alpha_pattern")
    value = patterns.get(_pattern(patterns, module), folder.config.get("lora_alpha", 8))
    rank = _rank(folder, module)
    root = folder.config.get("use_rslora", False)
    return number(folder, value, "lora_alpha") / (math.sqrt(rank) if root else rank)


def _pattern(patterns: Mapping[str, object], module: str) -> str:
    """The key of a rank or alpha pattern that PEFT would take for `module`."""
    for key in patterns:
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return key
        except re.error:
            continue  # PEFT would have failed on it while training
    return module


def _change_of_bias(bias_O: torch.Tensor, shape: ModuleShape) -> torch.Tensor:
    own = shape.bias
    return bias_O.float() - (
        own.float().cpu() if own is not None and own.shape == bias_O.shape else 0
    )


def _fit_shift(
    folder: AdapterFolder, key: str, shift: torch.Tensor, shape: ModuleShape
) -> torch.Tensor:
    if tuple(shift.shape) != (shape.out_features,):
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {key!r} with shape {tuple(shift.shape)}, where the base has "
            f"({shape.out_features},); the adapter was made for another base ({folder.base_model})",
        )
    return shift


def _placed(delta: LinearDelta, target: Target) -> LinearDelta:
    """Contiguous, in the engine's dtype, on its device."""
    parts = (delta.a_Ir, delta.b_rO, delta.shift_O, delta.scale_O, delta.scale_I)
    return LinearDelta(
        *(None if p is None else p.to(target.device, target.dtype).contiguous() for p in parts)
    )
