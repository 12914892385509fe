"""Changes of the base's own weights at chosen places, and of all of them: attach, save, load.

FishMask (Sung et al. 2021, arXiv:2111.09839) and Child-tuning's task-driven form (Xu et al. 2021,
arXiv:2109.05687) train a share of the base's weights. Here the base stays frozen and each of its
parameters gets a vector of values, W' = W + scatter(values): gradients, moments and checkpoints
are as small as the mask, and every ZeRO stage shards them as any other parameter. Child-tuning's
task-free form and full fine-tuning train the weights themselves. Which places are chosen is the
course's matter (training.methods.fisher).

The folder has PEFT's shape: adapter_config.json with `peft_type` SPARSE_DELTA, and for each
changed parameter `base_model.model.<parameter>.values` (float32) at flat, rising `.indices`, or
the whole change as `.delta` where that is smaller.

    K values of one parameter
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cluster.adapter_folder import CONFIG, WEIGHTS, open_adapter_folder
from cluster.base_model import load_base
from cluster.errors import AdapterError
from cluster.tasks import head_modules, peft_task_type, task_of
from training.method_spec import ChildTuningSpec, FishMaskSpec, FullSpec
from training.methods.head import head_tensors, is_of_head, load_head, train_head
from training.methods.targets import check_targets, is_targeted

PEFT_TYPE = "SPARSE_DELTA"
SCHEMA = 1
_PREFIX = "base_model.model."
VALUES, _INDICES = "_values", "_indices"
# The modules that use one parameter, and its name in each: tied parameters have several.
_Users = Sequence[tuple[torch.nn.Module, str]]


def attach_masked(
    model: Any, spec: FishMaskSpec | ChildTuningSpec, base_path: str
) -> torch.nn.Module:
    """Freeze `model` and give it `spec.share` of its size in values to train. They lie evenly
    spread until the data has been looked at.

    Raises:
        SpecError: `target_modules` matches nothing.
    """
    model.requires_grad_(False)
    found = maskable(model, spec.target_modules, base_path)
    total, taken, start = sum(p.numel() for p in model.parameters()), 0, 0
    size = sum(parameter.numel() for parameter, _ in found.values())
    count = min(size, max(1, round(spec.share * total)))
    masks: dict[str, torch.Tensor] = {}
    for name, (parameter, _) in found.items():
        start += parameter.numel()
        own = count * start // size - taken
        taken += own
        masks[name] = torch.arange(own) * parameter.numel() // max(1, own)
    set_masks(found, masks)
    train_head(model)
    model.config._name_or_path = base_path
    return model


def attach_full(model: Any, spec: FullSpec | ChildTuningSpec, base_path: str) -> torch.nn.Module:
    """Train every weight itself, in float32 whatever the base's dtype."""
    model.float().requires_grad_(True)
    model.config._name_or_path = base_path
    return model


def attach_child(model: Any, spec: ChildTuningSpec, base_path: str) -> torch.nn.Module:
    """Either form of Child-tuning. Raises SpecError."""
    return (attach_full if spec.form == "task_free" else attach_masked)(model, spec, base_path)


def maskable(
    model: torch.nn.Module, targets: str | tuple[str, ...], base_path: str
) -> dict[str, tuple[torch.nn.Parameter, _Users]]:
    """The base's parameters in the targeted modules and who uses each, by first name; not those
    of a classifier's head, which are trained whole.

    Raises:
        SpecError: there are none, or a name of a list has none.
    """
    users: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = defaultdict(list)
    names: dict[torch.nn.Parameter, str] = {}
    weighted: dict[str, torch.nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if not is_of_head(model, name) and [*module.named_parameters(recurse=False)]
    }
    check_targets(targets, weighted, weighted, base_path)
    for module_name, module in weighted.items():
        for name, parameter in module.named_parameters(recurse=False):
            if not name.endswith(VALUES):
                users[parameter].append((module, name))
                if is_targeted(module_name, targets):
                    names.setdefault(parameter, f"{module_name}.{name}")
    return {name: (parameter, users[parameter]) for parameter, name in names.items()}


def set_masks(
    found: Mapping[str, tuple[torch.nn.Parameter, _Users]], masks: Mapping[str, torch.Tensor]
) -> None:
    """Train values at the flat indices of `masks`, by a parameter's name, and nowhere else; they
    start at zero."""
    for name, (parameter, users) in found.items():
        indices_K = masks.get(name, torch.zeros(0)).to(parameter.device, torch.int64)
        values_K = torch.nn.Parameter(torch.zeros(len(indices_K), device=parameter.device))
        for module, own_name in users:
            is_empty = not len(indices_K)
            module.register_parameter(own_name + VALUES, None if is_empty else values_K)
            module.register_buffer(own_name + _INDICES, indices_K, persistent=False)
            module.forward = partial(_forward, module)


def _masked(module: torch.nn.Module) -> list[str]:
    """The names of the module's parameters that have values to train."""
    names = (name for name, _ in module.named_parameters(recurse=False))
    return [name.removesuffix(VALUES) for name in names if name.endswith(VALUES)]


def _forward(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
    """The module's own forward with its changed parameters.

    These exist only while it runs: what autograd would keep of them for the backward pass, it
    gets by making them again, or each base weight would be in memory twice.
    """
    names = _masked(module)
    changed = {name: _changed(module, name) for name in names}
    owners = {_storage(w): name for name, w in changed.items()}

    def pack(saved: torch.Tensor) -> Any:
        name = owners.get(_storage(saved))
        if name is None:
            return saved
        return partial(
            _view, module, name, saved.size(), saved.stride(), int(saved.storage_offset())
        )

    # A module's attribute hides its parameter of that name.
    module.__dict__.update(changed)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return type(module).forward(module, *args, **options)
    finally:
        for name in names:
            del module.__dict__[name]


def _storage(tensor: torch.Tensor) -> int:
    """Its storage's identity. Not the address, which fake tensors (training.ledger) lack."""
    storage: Any = tensor.untyped_storage()
    return storage._cdata


def _unpack(kept: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
    return kept if isinstance(kept, torch.Tensor) else kept()


@torch.no_grad()
def _view(
    module: torch.nn.Module, name: str, size: torch.Size, stride: Sequence[int], offset: int
) -> torch.Tensor:
    return _changed(module, name).as_strided(size, stride, offset)


def _changed(module: torch.nn.Module, name: str) -> torch.Tensor:
    parts = (getattr(module, name + part) for part in ("", _INDICES, VALUES))
    changed: Any = _Scatter.apply(*parts)
    return changed


class _Scatter(torch.autograd.Function):
    """W + scatter(values) in W's dtype; backward gathers the values' gradient."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, indices_K: torch.Tensor, values_K: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(indices_K)
        changed = weight.detach().clone(memory_format=torch.contiguous_format)
        flat = changed.view(-1)
        flat[indices_K] = (flat[indices_K].float() + values_K).to(weight.dtype)
        return changed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        (indices_K,) = ctx.saved_tensors
        return None, None, grads[0].flatten()[indices_K].float()


def save(model: Any, folder: Path) -> None:
    """Write the adapter folder of a model that an `attach` here made and training changed."""
    tensors = head_tensors(model)
    is_full = all(parameter.requires_grad for parameter in model.parameters())
    if is_full:
        before = _untrained(model)
        for name, parameter in model.named_parameters():
            if is_of_head(model, name):
                continue
            delta = parameter.detach().cpu() - before[name].float()
            indices_K = delta.flatten().nonzero().flatten()
            tensors |= _stored(name, delta.shape, indices_K, delta.flatten()[indices_K])
    else:
        for name, (parameter, users) in maskable(model, "all", "").items():
            module, own_name = users[0]
            values_K = getattr(module, own_name + VALUES, None)
            if values_K is not None:  # it was targeted, and chosen
                indices_K = getattr(module, own_name + _INDICES)
                shape = getattr(parameter, "ds_shape", parameter.shape)
                tensors |= _stored(name, shape, indices_K.cpu(), values_K.detach().cpu())
    config = {
        "peft_type": PEFT_TYPE,
        "graft_schema": SCHEMA,
        "task_type": peft_task_type(model),
        "base_model_name_or_path": model.config._name_or_path,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _untrained(model: Any) -> Mapping[str, torch.Tensor]:
    """The base's own parameters, by name; a new head's are none."""
    labels: Mapping[int, str] = model.config.id2label if head_modules(model) else {}
    path, dtype = model.config._name_or_path, model.config.dtype
    base = load_base(path, dtype, task=task_of(model), labels=[*labels.values()])
    return dict(base.named_parameters())


def _stored(
    name: str, shape: torch.Size, indices_K: torch.Tensor, values_K: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A parameter's change in whichever form takes fewer bytes, by key."""
    key, size = f"{_PREFIX}{name}", shape.numel()
    if 2 * len(indices_K) < size:
        kind = torch.int32 if size < 2**31 else torch.int64
        return {f"{key}.indices": indices_K.to(kind), f"{key}.values": values_K.contiguous()}
    delta = torch.zeros(size)
    delta[indices_K] = values_K
    return {f"{key}.delta": delta.view(shape)}


def load(model: Any, folder: Path) -> torch.nn.Module:
    """Add the changes of a folder to `model`, for inference. Raises AdapterError."""
    opened = open_adapter_folder(folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = load_head(model, load_file(folder / WEIGHTS))
    with torch.no_grad():
        for key, change in tensors.items():
            name, _, part = key.removeprefix(_PREFIX).rpartition(".")
            parameter = parameters.get(name)
            if parameter is None:
                raise AdapterError(f"adapter folder {opened.path}: the base has no {key!r}")
            if part == "delta":
                parameter.copy_(parameter.float() + change)
            elif part == "values":
                flat = parameter.view(-1)
                places = tensors[f"{_PREFIX}{name}.indices"].long()
                flat[places] = (flat[places].float() + change).to(flat.dtype)
    return model.requires_grad_(False)
