"""LoRA and AdaLoRA folders as linear deltas.

LoRA (Hu et al. 2021, arXiv:2106.09685): W' = W + s B A, with s = alpha / r (rsLoRA,
arXiv:2312.03732: alpha / √r). DoRA (arXiv:2402.09353): W' = m / ||W + s B A|| ∘ (W + s B A), norms
over the inputs. AdaLoRA (arXiv:2303.10512): W' = W + s B diag(E) A, with s = alpha / init_r.
PiSSA and OLoRA that were not converted: W' = W - s B0 A0 + s B A, with B0 A0 of W itself.

    I in    O out    r rank
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cluster.adapter_folder import CONFIG, MIN_RANK, WEIGHTS, AdapterFolder, fault, number
from serving.adapters.config import refuse_unread
from serving.adapters.linear import change_of_bias, fit_shift, placed
from serving.adapters.pace import give_way
from serving.adapters.parameters import change_of_parameter, targeted_parameters
from serving.adapters.patterns import by_pattern
from serving.adapters.primitives import Delta, LinearDelta, LoweredAdapter, LowRank, Replacement
from serving.adapters.target import PREFIX, ModuleShape, Target, bare_name, shape_of
from serving.adapters.tokens import add_rows
from serving.adapters.weights import sharing

_PART = re.compile(
    r"(.+)\.lora_(?:embedding_)?(?:([ABE])|(magnitude)_vector)(?:\.default)?(?:\.weight)?"
)
_SHIFT = re.compile(r"(.+?)(?:\.base_layer)?\.(lora_B\.bias|bias)")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
_TRAINED_PART = ".lora_velora_embed"  # VeLoRA's, of the backward pass alone
# Fields that chose where and how a LoRA was trained; the tensors tell the result.
_TRAINED_WITH = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "runtime_config", "qalora_group_size", "velora_config",
}  # fmt: skip
_READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "lora_bias",
    "init_lora_weights", "use_dora", "modules_to_save", "trainable_token_indices",
    "target_parameters",
}  # fmt: skip
_ADALORA_TRAINED_WITH = {
    "r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
    "total_step", "rank_pattern", "init_lora_weights",
    "use_rslora", "alpha_pattern",  # PEFT's AdaLoRA does not look at them
}  # fmt: skip
# Starting values that leave the base's weights alone. Others take a part of them into the adapter,
# so that B A alone is not the change; of these two, the part follows from the weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_KNOWN_STARTS = ("pissa", "olora")


@dataclass
class _Found:
    """What a folder has for each module."""

    factors: dict[str, dict[str, torch.Tensor]] = field(
        default_factory=lambda: defaultdict[str, dict[str, torch.Tensor]](dict)
    )
    shifts: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    rows: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


@dataclass(frozen=True)
class _Sizes:
    """The ranks and alphas of single modules, and the config's own of the others."""

    folder: AdapterFolder
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """Raises AdapterError."""
        value = self.ranks.get(module, self.folder.config.get("r", 8))
        return int(number(self.folder, value, "r", whole=True))

    def scale(self, module: str) -> float:
        """Raises AdapterError."""
        value = self.alphas.get(module, self.folder.config.get("lora_alpha", 8))
        rank = self.rank(module)
        root = self.folder.config.get("use_rslora", False)
        return number(self.folder, value, "lora_alpha") / (math.sqrt(rank) if root else rank)


def lower_lora(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A LoRA folder as deltas. Raises AdapterError for whatever does not fit the target."""
    refuse_unread(folder, _READ, _TRAINED_WITH | _of_ties(target))
    start = folder.config.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start
    if start not in (*_PLAIN_STARTS, *_KNOWN_STARTS):
        raise fault(
            folder.path,
            CONFIG,
            f"has init_lora_weights = {start!r}, which changed the base's weights; convert it with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    on_parameters = targeted_parameters(folder, target)
    names = [*target.modules, *(f"{module}.{name}" for module, name in on_parameters.values())]
    sizes = _Sizes(
        folder,
        by_pattern(folder, "rank_pattern", names),
        by_pattern(folder, "alpha_pattern", names),
    )
    found = _read(folder, tensors, target, sizes)
    deltas = _of_parameters(found, on_parameters, sizes, str(start), target)
    for module, parts in found.factors.items():
        give_way()
        rank, scale = sizes.rank(module), sizes.scale(module)
        shape = _checked(folder, module, parts, rank, target)
        a_rI, b_Or = parts["A"].float(), parts["B"].float() * scale
        # PEFT starts an embedding plainly, whatever it starts other modules with.
        if start in _KNOWN_STARTS and shape.kind != "embedding":
            first_a_rI, first_b_Or = _first(folder, module, shape, rank, scale, str(start))
            a_rI, b_Or = torch.cat([a_rI, first_a_rI]), torch.cat([b_Or, -first_b_Or], dim=1)
        shift = found.shifts.pop(module, None)
        if folder.config.get("use_dora"):
            factors, magnitude_O = (a_rI, b_Or), parts["magnitude"].float()
            deltas[module] = _dora(folder, module, shape, factors, magnitude_O, shift)
        else:
            deltas[module] = LinearDelta(a_rI.T, (b_Or * shape.scale).T, shift)
    return _lowered(folder, found, deltas, target)


def _of_ties(target: Target) -> set[str]:
    """The field that ties what is trained to what the base ties, if it ties nothing."""
    weight = target.modules[target.input_embedding].parameters["weight"]
    return set() if len([*sharing(target, weight)]) > 1 else {"ensure_weight_tying"}


def _of_parameters(
    found: _Found,
    on_parameters: Mapping[str, tuple[str, str]],
    sizes: _Sizes,
    start: str,
    target: Target,
) -> dict[str, Delta]:
    """What is on parameters, taken out of `found`. Raises AdapterError."""
    folder = sizes.folder
    changes: dict[str, dict[str, torch.Tensor | LowRank]] = defaultdict(dict)
    for key, place in on_parameters.items():
        module, name = place
        if start in _KNOWN_STARTS or MIN_RANK in folder.metadata:
            raise fault(
                folder.path,
                CONFIG,
                f"has {name!r} of {module!r} in target_parameters, of which neither a part was "
                "taken by init_lora_weights nor the rank can be chosen; leave it out of "
                "target_parameters",
            )
        full, parts = f"{module}.{name}", found.factors.pop(key, {})
        rank, scale = sizes.rank(full), sizes.scale(full)
        changes[module][name] = change_of_parameter(folder, place, parts, rank, scale, target)
    return {module: Replacement(parameters) for module, parameters in changes.items()}


def lower_adalora(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """An AdaLoRA folder as deltas, each at the rank it was left. Raises AdapterError."""
    read = {"init_r", "lora_alpha", "bias", "modules_to_save", "trainable_token_indices"}
    refuse_unread(folder, read, _TRAINED_WITH | _ADALORA_TRAINED_WITH | _of_ties(target))
    init_r = number(folder, folder.config.get("init_r", 12), "init_r", whole=True)
    alpha = number(folder, folder.config.get("lora_alpha", 8), "lora_alpha")
    found = _read(folder, tensors, target)
    deltas: dict[str, Delta] = {}
    for module, parts in found.factors.items():
        rank = next(iter(parts["A"].shape), 0) if "A" in parts else 0
        shape = _checked(folder, module, parts, rank, target, needed={"A", "B", "E"})
        if rank:
            # The little is PEFT's.
            b_Or = parts["B"].float() * parts["E"].float().flatten() * (alpha / (init_r + 1e-5))
            low_rank = (parts["A"].float().T, (b_Or * shape.scale).T)
            deltas[module] = LinearDelta(*low_rank, found.shifts.pop(module, None))
    return _lowered(folder, found, deltas, target)


def _lowered(
    folder: AdapterFolder, found: _Found, deltas: dict[str, Delta], target: Target
) -> LoweredAdapter:
    deltas |= {module: LinearDelta(shift_O=shift) for module, shift in found.shifts.items()}
    placed_deltas: dict[str, Delta] = {
        name: placed(delta, target, is_embedding=target.modules[name].kind == "embedding")
        if isinstance(delta, LinearDelta)
        else delta
        for name, delta in deltas.items()
    }
    add_rows(folder, found.rows, placed_deltas, target)
    lowest = folder.metadata.get(MIN_RANK)
    if lowest is None:
        return LoweredAdapter(placed_deltas)
    highest = int(number(folder, folder.config.get("r", 8), "r", whole=True))
    if not lowest.isdecimal() or not 1 <= int(lowest) <= highest:
        raise fault(folder.path, WEIGHTS, f"has {MIN_RANK} {lowest[:40]!r} in its metadata, which "
                    f"is no rank from 1 to {highest}")  # fmt: skip
    return LoweredAdapter(placed_deltas, ranks=range(int(lowest), highest + 1))


def _read(
    folder: AdapterFolder,
    tensors: Mapping[str, torch.Tensor],
    target: Target,
    sizes: _Sizes | None = None,
) -> _Found:
    """Every tensor in its place. Raises AdapterError for one that has none."""
    found = _Found()
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        give_way()
        if match := _PART.fullmatch(bare_name(folder, key)):
            # An embedding keeps A as [r, vocabulary] and B as [out, r], like a linear module.
            parts, part = found.factors[match[1]], match[2] or match[3]
            if part in parts:
                reason = f"has {key!r} and another lora_{part} of {match[1]!r}; save it anew"
                raise fault(folder.path, WEIGHTS, reason)
            parts[part] = tensor
        else:
            others[key] = tensor
    for key, tensor in others.items():
        name = bare_name(folder, key)
        if name.endswith(_TRAINED_PART):
            continue
        if match := _TOKENS.fullmatch(name):
            found.rows[match[1]] = tensor
        elif (match := _SHIFT.fullmatch(name)) and (sizes or match[2] == "bias"):
            module, shape = match[1], shape_of(folder, key, match[1], target)
            if match[2] == "bias" and shape.bias is None:
                reason = f"has {key!r}, and the base {target.name} has no bias there; save it anew"
                raise fault(folder.path, WEIGHTS, reason)
            scale = sizes.scale(module) if sizes and match[2] == "lora_B.bias" else None
            change = tensor.float() * scale if scale else change_of_bias(tensor, shape)
            found.shifts[module] = found.shifts.get(module, 0) + fit_shift(
                folder, key, change, shape
            )
        else:
            raise fault(folder.path, WEIGHTS, f"has tensor {key!r}, which is not of a LoRA")
    return found


def _checked(
    folder: AdapterFolder,
    module: str,
    parts: Mapping[str, torch.Tensor],
    rank: int,
    target: Target,
    needed: set[str] | None = None,
) -> ModuleShape:
    """The module that `parts` are on. Raises AdapterError unless they are whole and fit."""
    shape = shape_of(folder, f"{PREFIX}{module}.lora_A", module, target)
    if needed is None:
        needed = {"A", "B", "magnitude"} if folder.config.get("use_dora") else {"A", "B"}
    if set(parts) != needed:
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {_listed(parts)} of {module!r}, where {_listed(needed)} are needed",
        )
    if not shape.takes_low_rank:
        raise fault(folder.path, WEIGHTS, f"has a LoRA on {module!r}, which is not linear")
    sizes = {
        "A": (rank, shape.in_features),
        "B": (shape.out_features, rank),
        "E": (rank, 1),
        "magnitude": (shape.out_features,),
    }
    found = {name: tuple(part.shape) for name, part in sorted(parts.items())}
    expected = {name: sizes[name] for name in found}
    if found != expected:
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {_listed(found)} of {module!r} with shapes {tuple(found.values())}, where the "
            f"base {target.name} and rank {rank} need {tuple(expected.values())}; the adapter was "
            f"made for another base ({folder.base_model})",
        )
    return shape


def _dora(
    folder: AdapterFolder,
    module: str,
    shape: ModuleShape,
    factors: tuple[torch.Tensor, torch.Tensor],
    magnitude_O: torch.Tensor,
    shift: torch.Tensor | None,
) -> LinearDelta:
    """g ∘ (y - bias) + g ∘ (x A) B + new bias, with g = m / ||W + B A|| and y = W x + bias; where
    an embedding scales y, both."""
    a_rI, b_Or = factors
    norm_O = torch.linalg.norm(_weight(folder, module, shape) + b_Or @ a_rI, dim=1)
    gain_O = magnitude_O / norm_O
    if shape.bias is not None:
        own_O = shape.bias.float().cpu()
        shift = own_O + (0 if shift is None else shift) - gain_O * own_O
    gain_O1 = gain_O[:, None]
    return LinearDelta(a_rI.T, (gain_O1 * b_Or * shape.scale).T, shift, scale_O=gain_O)


def _first(
    folder: AdapterFolder, module: str, shape: ModuleShape, rank: int, scale: float, start: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A0, s B0) that PEFT took out of the weight: what it would compute again at each load."""
    if shape.is_quantized:
        raise fault(
            folder.path,
            CONFIG,
            f"has init_lora_weights = {start!r}, whose first factors cannot be told from a base in "
            "4 or 8 bits; convert it with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    weight_OI = _weight(folder, module, shape)
    if start == "olora":
        if shape.kind != "linear":
            raise fault(
                folder.path, CONFIG, f"is an OLoRA on {module!r}, where PEFT's is undefined"
            )
        q_OI, r_II = torch.linalg.qr(weight_OI)
        return r_II[:rank], q_OI[:, :rank] * scale
    u_Or, s_r, v_rI = torch.linalg.svd(weight_OI, full_matrices=False)
    return s_r[:rank, None] * v_rI[:rank], u_Or[:, :rank]


def _weight(folder: AdapterFolder, module: str, shape: ModuleShape) -> torch.Tensor:
    """[O, I], float32 on CPU."""
    if shape.read_weight is None:
        raise fault(folder.path, CONFIG, f"needs the weight of {module!r}, which is no matrix")
    return shape.read_weight()


def _listed(parts: Mapping[str, object] | set[str]) -> str:
    return ", ".join(f"lora_{part}" for part in sorted(parts))
