"""BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): train bias terms alone.

PEFT has no BitFit. The folder has PEFT's shape: adapter_config.json with `peft_type` BITFIT, and
adapter_model.safetensors with `base_model.model.<module>.bias`, each the whole bias after
training (float32 [out]). A bias that the base lacks counts as zero there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from cluster.adapter_folder import CONFIG, WEIGHTS, open_adapter_folder
from cluster.errors import AdapterError, SpecError
from cluster.tasks import peft_task_type
from training.method_spec import BitFitSpec
from training.methods.head import head_tensors, is_of_head, load_head, train_head
from training.methods.layernorm import norm_modules
from training.methods.targets import check_targets, is_targeted

PEFT_TYPE = "BITFIT"
SCHEMA = 1
# Names that families give the query's projection and the MLP's widening layers (gate and up).
_QUERY = {"q_proj", "query", "q", "wq", "q_lin"}
_WIDENING = {
    "gate_proj",
    "up_proj",
    "c_fc",
    "fc1",
    "fc_in",
    "dense_h_to_4h",
    "wi",
    "wi_0",
    "wi_1",
    "w1",
    "w3",
    "lin1",
    "intermediate.dense",
}
_KEY = re.compile(r"base_model\.model\.(.+)\.bias")


def attach(model: Any, spec: BitFitSpec, base_path: str) -> torch.nn.Module:
    """Freeze `model` but the targeted biases, adding zeros where a linear module has none.

    Raises:
        SpecError: `subset`, or a part of `target_modules`, matches nothing.
    """
    model.requires_grad_(False)
    candidates = _subset(model, spec, base_path)
    check_targets(spec.target_modules, candidates, candidates, base_path)
    for name, module in candidates.items():
        if is_targeted(name, spec.target_modules):
            _trainable_bias(module)
    train_head(model)
    model.config._name_or_path = base_path
    return model


def save(model: Any, folder: Path) -> None:
    """Write the adapter folder of a model that `attach` made and training changed."""
    biases = {
        name: parameter.detach().float().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_of_head(model, name)
    }
    config = {
        "peft_type": PEFT_TYPE,
        "graft_schema": SCHEMA,
        "task_type": peft_task_type(model),
        "base_model_name_or_path": model.config._name_or_path,
        "target_modules": sorted(name.removesuffix(".bias") for name in biases),
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{n}": b for n, b in biases.items()} | head_tensors(model)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def load(model: Any, folder: Path) -> torch.nn.Module:
    """Put the biases of a folder onto `model`, for inference. Raises AdapterError."""
    opened = open_adapter_folder(folder)
    modules: Mapping[str, torch.nn.Module] = dict(model.named_modules())
    with torch.no_grad():
        for key, value in load_head(model, load_file(folder / WEIGHTS)).items():
            match = _KEY.fullmatch(key)
            module = modules.get(match[1]) if match else None
            if module is None:
                raise AdapterError(f"adapter folder {opened.path}: the base has no {key!r}")
            _trainable_bias(module).copy_(value)
    return model.requires_grad_(False)


def biasable_modules(model: Any) -> dict[str, torch.nn.Module]:
    """Modules whose output a bias can shift: linear ones, and any that has a bias already.

    The output embedding is left out: its bias would shift the vocabulary, not a feature. So is a
    classifier's head, which is trained whole.
    """
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if module is not head
        and not is_of_head(model, name)
        and (
            isinstance(module, (torch.nn.Linear, Conv1D))
            or isinstance(getattr(module, "bias", None), torch.nn.Parameter)
        )
    }


def _subset(model: Any, spec: BitFitSpec, base_path: str) -> dict[str, torch.nn.Module]:
    """The modules whose biases the spec's subset names. Raises SpecError if there are none."""
    modules = biasable_modules(model)
    if spec.subset == "norm":
        modules = {name: module for name, module in modules.items() if name in norm_modules(model)}
    elif spec.subset == "query_mlp":
        kinds = {"query": _QUERY, "widening MLP layer": _WIDENING}
        wanted = {
            kind: [n for n in modules if any(f".{n}".endswith(f".{last}") for last in names)]
            for kind, names in kinds.items()
        }
        missing = next((part for part, found in wanted.items() if not found), None)
        if missing is not None:
            raise SpecError(
                f"method.subset: query_mlp finds no {missing} of its own in {base_path} (it may be "
                "fused with others); use subset all, or name method.target_modules"
            )
        modules = {name: modules[name] for found in wanted.values() for name in found}
    if not spec.add_missing:
        modules = {n: m for n, m in modules.items() if getattr(m, "bias", None) is not None}
    if not modules:
        remedy = "set method.add_missing"
        if spec.subset == "norm":  # where none is ever added
            remedy = "use subset all, with method.add_missing, or the method layernorm"
        raise SpecError(f"method.subset: {base_path} has no bias in {spec.subset}; {remedy}")
    return modules


def _trainable_bias(module: Any) -> torch.nn.Parameter:
    bias = getattr(module, "bias", None)
    if bias is None:
        # Only Linear can be without one.
        bias = torch.zeros(module.out_features, dtype=torch.float32, device=module.weight.device)
    # In fp32 whatever the base's dtype: updates of a bias are far below bf16's resolution.
    module.bias = torch.nn.Parameter(bias.detach().float(), requires_grad=True)
    if isinstance(module, torch.nn.LayerNorm):  # takes both in one dtype
        module.weight.data = module.weight.data.float()
    return module.bias
