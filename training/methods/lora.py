"""LoRA through PEFT, and PEFT's own way to save and load that every PEFT method shares.

PiSSA and OLoRA take a part B0 A0 of the base's weight into the adapter, so what is trained is
W - s B0 A0 + s B A. It is published as a LoRA of twice the rank, [B | -B0] [A ; A0], which is the
same over the unchanged base.

    I in    O out    r rank
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cluster.adapter_folder import CONFIG, WEIGHTS
from cluster.errors import SpecError
from training.method_spec import LoraSpec
from training.methods.placement import (
    attach_low_rank,
    check_linear,
    check_patterns,
    peft_placement,
)

_START = "graft_start"  # of a model: its first factors, where they were taken from the base


def attach(model: Any, spec: LoraSpec, base_path: str) -> torch.nn.Module:
    """Add a LoRA to the targeted linear modules of `model`.

    Raises:
        SpecError: an option names nothing of the base, or does not fit it; the message lists what
            there is.
    """
    from peft import LoraConfig

    config = LoraConfig(
        **peft_placement(model, spec, base_path),
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type] # PEFT takes floats and annotates int
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        init_lora_weights="gaussian" if spec.init == "gaussian" else True,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
    )
    adapted = attach_low_rank(model, config, spec, base_path)
    check_patterns("rank_pattern", spec.rank_pattern, adapted)
    check_patterns("alpha_pattern", spec.alpha_pattern, adapted)
    if spec.init in ("pissa", "olora"):
        _check_can_take(adapted, spec.init)
        if not next(model.parameters()).is_meta:
            setattr(adapted, _START, _take_weights(adapted, spec.init))
    parameter: Any
    for name, parameter in adapted.named_parameters():
        # An embedding's B is called otherwise.
        if (".lora_B." in name or ".lora_embedding_B." in name) and parameter.requires_grad:
            parameter.rate_ratio = spec.lora_plus_ratio
    return adapted


def save(model: Any, folder: Path) -> None:
    """Write the adapter folder as PEFT does, over the unchanged base."""
    save_peft(model, folder)
    start: dict[str, torch.Tensor] | None = getattr(model, _START, None)
    if start is None:
        return
    tensors = load_file(folder / WEIGHTS)
    for key, first in start.items():
        is_a = ".lora_A." in key
        parts = (tensors[key], first.to(tensors[key]) * (1 if is_a else -1))
        tensors[key] = torch.cat(parts, dim=0 if is_a else 1)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    # alpha / r, or alpha / √r, must stay what it was.
    by = 2**0.5 if config["use_rslora"] else 2
    config |= {"init_lora_weights": True, "r": 2 * config["r"]}
    config["lora_alpha"] *= by
    config["rank_pattern"] = {k: 2 * rank for k, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {k: by * alpha for k, alpha in config["alpha_pattern"].items()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def save_peft(model: Any, folder: Path) -> None:
    """Write the adapter folder as PEFT does, over the unchanged base."""
    # Of a targeted embedding or head PEFT would write the frozen weight too: as init pissa left it,
    # and of ZeRO 3, which gathers what is trained, none at all.
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def load_peft(model: Any, folder: Path) -> torch.nn.Module:
    """Put a PEFT folder onto `model`, for inference."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))


def _check_can_take(adapted: Any, init: str) -> None:
    """Raise SpecError for a target that has no part to take, or one that others would lose too."""
    check_linear(
        adapted,
        f"init {init!r} takes a part of a linear weight; leave it out, or take init default",
    )
    users: dict[torch.nn.Parameter, list[str]] = defaultdict(list)
    for name, module in adapted.base_model.model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            users[parameter].append(name.removesuffix(".base_layer"))
    for name in adapted.base_model.targeted_module_names:
        layer = adapted.base_model.model.get_submodule(name)
        weight = layer.get_base_layer().weight
        if others := [user for user in users[weight] if user != name]:
            raise SpecError(
                f"method.target_modules: {name!r} has its weight in common with {others[0]!r}, "
                f"which would lose what init {init!r} takes of it; leave it out, or take init "
                "default"
            )
        rank, smallest = layer.r["default"], min(weight.shape)
        if rank > smallest:
            raise SpecError(
                f"method.r: {rank} is above what {name!r} of shape {tuple(weight.shape)} has; with "
                f"init {init!r} set it to at most {smallest}"
            )


@torch.no_grad()
def _take_weights(adapted: Any, init: str) -> dict[str, torch.Tensor]:
    """Start each update from a part of its base weight, which loses it; returns these factors, on
    CPU, by their keys in the folder."""
    start: dict[str, torch.Tensor] = {}
    for name in adapted.base_model.targeted_module_names:
        layer = adapted.base_model.model.get_submodule(name)
        weight, scale = layer.get_base_layer().weight, layer.scaling["default"]
        a_rI, b_Or = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight_OI = weight.float().T if layer.fan_in_fan_out else weight.float()
        first_a_rI, first_b_Or = _factors(weight_OI, len(a_rI), scale, init)
        a_rI.copy_(first_a_rI)
        b_Or.copy_(first_b_Or)
        rest_OI = weight_OI - scale * b_Or @ a_rI
        weight.copy_(rest_OI.T if layer.fan_in_fan_out else rest_OI)
        start |= {
            f"base_model.model.{name}.lora_{part}.weight": value.detach().cpu().clone()
            for part, value in (("A", a_rI), ("B", b_Or))
        }
    return start


def _factors(
    weight_OI: torch.Tensor, rank: int, scale: float, init: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B). PiSSA: U √S, √S V of the largest singular values, over the scale; OLoRA: the first
    columns of Q and rows of R."""
    if init == "olora":
        q_OI, r_II = torch.linalg.qr(weight_OI)
        return r_II[:rank], q_OI[:, :rank]
    u_Or, s_r, v_rI = torch.linalg.svd(weight_OI, full_matrices=False)
    root_r = (s_r[:rank] / scale).sqrt()
    return root_r[:, None] * v_rI[:rank], u_Or[:, :rank] * root_r
