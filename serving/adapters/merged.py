"""Methods that PEFT merges into weights: what each weight becomes is PEFT's own word, at load.

LoHa, LoKr, VeRA, OFT and their kin change W to W' whatever the input is. PEFT's own layers are put
on a hollow copy of the base's module tree, get the folder's tensors, and merge one module at a
time; W' - W is a linear delta, at its true rank where that is small. Before it is believed, the
merged module is compared with what PEFT's layer computes unmerged: a method that does more than
change weights is refused, never served wrongly. Nothing of a method is known here but its name.

    I in    O out    N probes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from cluster.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, fault
from cluster.errors import AdapterError
from serving.adapters.alone import peft_alone
from serving.adapters.config import refuse_unread
from serving.adapters.dense import factored
from serving.adapters.linear import change_of_bias, fit_shift, placed
from serving.adapters.patterns import without_patterns
from serving.adapters.primitives import Delta, LinearDelta, LoweredAdapter
from serving.adapters.target import PREFIX, ModuleShape, Target

# Each was tried on what PEFT saves of it (tests/equivalence/test_merged.py). Those of the second
# list decompose the base's weights anew at each load.
_PLAIN = (
    "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "LOHA",
    "LOKR", "MISS", "OFT", "PEANUT", "PVERA", "RANDLORA", "ROAD", "SUPERTUNING", "UNILORA",
    "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
_FROM_WEIGHTS = ("OSF", "PSOFT", "TINYLORA")
KINDS = (*_PLAIN, *_FROM_WEIGHTS)
_NAME = "default"
_USUAL_SIZE = 1024  # as defaults have it, however small the base is
_PROBES = 5
_TOLERANCE = 1e-4  # of the largest output: float32's share of it is a tenth
_ROUNDING = 2e-7  # of the norms of weight and change: float32 rounds each element by up to 6e-8


def lower_merged(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A folder of one of KINDS as linear deltas. Raises AdapterError."""
    with peft_alone():
        config = _config(folder, tensors, target)
        shifts, own = _split(folder, tensors, target)
        model = _with_peft(folder, config, own, target)
    deltas: dict[str, Delta] = {}
    for module, layer in _layers(model):
        with peft_alone():  # each by itself: others wait for their turn in between
            delta = _merged(folder, module, layer, target.modules[module])
        shift = shifts.pop(module, None)
        if shift is not None:
            shift = shift if delta.shift_O is None else shift + delta.shift_O
            delta = dataclasses.replace(delta, shift_O=shift)
        is_embedding = target.modules[module].kind == "embedding"
        deltas[module] = placed(delta, target, is_embedding=is_embedding)
    deltas |= {module: placed(LinearDelta(shift_O=s), target) for module, s in shifts.items()}
    return LoweredAdapter(deltas)


def _split(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The changes of biases by module, and what PEFT's layers hold themselves, in float32."""
    shifts: dict[str, torch.Tensor] = {}
    own: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        module, _, name = key.removeprefix(PREFIX).rpartition(".")
        module = module.removesuffix(".base_layer")
        _check_linear(folder, key, target)
        shape = target.modules.get(module)
        if name == "bias" and shape is not None and shape.bias is not None:
            shifts[module] = fit_shift(folder, key, change_of_bias(tensor, shape), shape)
        else:
            own[key] = tensor.float() if tensor.is_floating_point() else tensor
    return shifts, own


def _check_linear(folder: AdapterFolder, key: str, target: Target) -> None:
    """Raise AdapterError for a tensor of an embedding, which the hollow base does not have."""
    for name in _parents(key.removeprefix(PREFIX)):
        shape = target.modules.get(name)
        if shape is not None and shape.kind == "embedding":
            raise fault(
                folder.path,
                WEIGHTS,
                f"has {key!r}, of the embedding {name!r}, where {folder.method} is served of "
                "linear modules alone; leave it out of target_modules, or train a LoRA of it",
            )


def _config(folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target) -> Any:
    """PEFT's config object. Raises AdapterError for a field that PEFT does not know."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(folder.method)]
    fields = {field.name for field in dataclasses.fields(kind)}
    refuse_unread(folder, fields - {"runtime_config"}, ())
    _refuse_sizes(folder, tensors, target)
    given = {k: v for k, v in folder.config.items() if k in fields and v is not None}
    given |= dict.fromkeys({"task_type", "auto_mapping", "modules_to_save"} & fields)
    given["inference_mode"] = True
    del given["peft_type"]
    try:
        return kind(**given)
    except Exception as error:
        raise _refused(folder, error) from error


def _refuse_sizes(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> None:
    """Raise AdapterError for a number that would have PEFT make more than the adapter can have:
    what modules share is made before a tensor is looked at."""
    sides = [max(m.in_features, m.out_features) for m in target.modules.values()]
    sides += [side for tensor in tensors.values() for side in tensor.shape]
    for key, value in folder.config.items():
        most = max(_USUAL_SIZE, target.hidden_size if key == "r" else max(sides))
        if type(value) is int and value > most and not key.endswith(("seed", "key", "alpha")):
            raise fault(
                folder.path,
                CONFIG,
                f"has {key} = {value}, where base and tensors allow {most}; the adapter was made "
                f"for another base ({folder.base_model}), or is damaged",
            )


def _refused(folder: AdapterFolder, error: Exception) -> AdapterError:
    """Whatever PEFT's code makes of a config and tensors that are wrong."""
    reason = " ".join(str(error).split())[:300]
    return fault(folder.path, CONFIG, f"is refused by PEFT: {type(error).__name__}: {reason}")


def _with_peft(
    folder: AdapterFolder, config: Any, tensors: Mapping[str, torch.Tensor], target: Target
) -> Any:
    """PEFT's layers with the folder's tensors, over the hollow base. Raises AdapterError."""
    import peft

    base = _hollow(target, tensors if folder.method in _FROM_WEIGHTS else {})
    without_patterns(folder, config, [name for name, _ in base.named_modules() if name])
    try:
        model: Any = peft.PeftModel(base, config, _NAME, low_cpu_mem_usage=True)  # pyright: ignore[reportArgumentType]
        found: Any = peft.set_peft_model_state_dict(
            model, dict(tensors), _NAME, low_cpu_mem_usage=True
        )
    except Exception as error:
        raise _refused(folder, error) from error
    if found.unexpected_keys:
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {found.unexpected_keys[0]!r}, which PEFT's {folder.method} does not have on the "
            f"base {target.name}; the adapter was made for another base ({folder.base_model})",
        )
    state = [*model.named_parameters(), *model.named_buffers()]
    missing = next((name for name, tensor in state if tensor.is_meta), None)
    if missing is not None:
        raise fault(folder.path, WEIGHTS, f"lacks {missing!r}; save the adapter anew")
    return model.eval().requires_grad_(False)


def _hollow(target: Target, filled_by: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The base's linear modules by their names, with weights that take no memory and are not
    numbers, so that nothing computed from them passes for right; real ones where `filled_by` has
    a tensor."""
    root = torch.nn.Module()
    filled = {name for key in filled_by for name in _parents(key.removeprefix(PREFIX))}
    for name, shape in target.modules.items():
        if shape.kind not in ("linear", "transposed"):
            continue
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        module = _empty(shape)
        if name in filled:
            _fill(module, shape)
        parent.add_module(last, module)
    return root


def _parents(name: str) -> Iterator[str]:
    """Every module that a tensor may be of: "a.b.c" is of "a.b" and "a"."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _empty(shape: ModuleShape) -> torch.nn.Module:
    sizes, has_bias = (shape.in_features, shape.out_features), shape.bias is not None
    with torch.device("meta"):
        linear = torch.nn.Linear(*sizes, bias=has_bias)
        module: Any = Conv1D(*sizes[::-1]) if shape.kind == "transposed" else linear
    for name, parameter in list(module.named_parameters()):
        hollow = torch.full((1,), torch.nan).expand(parameter.shape)
        module.register_parameter(name, torch.nn.Parameter(hollow, requires_grad=False))
    return module


def _fill(module: Any, shape: ModuleShape) -> None:
    """Give a hollow module copies of the base's parameters."""
    assert shape.read_weight is not None, "it is linear"
    weight_OI = shape.read_weight()
    module.weight.data = (weight_OI.T if shape.kind == "transposed" else weight_OI).clone()
    if shape.bias is not None:
        module.bias.data = shape.bias.detach().float().cpu().clone()


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name.removeprefix(PREFIX), module


@torch.no_grad()
def _merged(folder: AdapterFolder, module: str, layer: Any, shape: ModuleShape) -> LinearDelta:
    """What merging adds to the weight and the bias. Raises AdapterError."""
    base: Any = layer.get_base_layer()
    if folder.method not in _FROM_WEIGHTS:
        _fill(base, shape)
    before = base.weight.data.clone()
    bias_before = None if shape.bias is None else base.bias.data.clone()
    generator = torch.Generator().manual_seed(0)
    probes_NI = torch.randn(_PROBES, shape.in_features, generator=generator)
    try:
        unmerged_NO = layer(probes_NI)
        layer.merge()
    except Exception as error:
        raise _refused(folder, error) from error
    merged_NO = base(probes_NI)
    off, size = float((merged_NO - unmerged_NO).abs().max()), float(unmerged_NO.abs().max())
    if not off <= _TOLERANCE * size:  # what is not a number fails this too
        raise fault(
            folder.path,
            CONFIG,
            f"has peft_type {folder.method!r}, which computes on {module!r} something else than "
            f"the weight that PEFT merges it into, by {off:.1e} of {size:.1e}; only a change of "
            "weights is served",
        )
    change = base.weight.data - before
    change_OI = change.T if shape.kind == "transposed" else change
    shift_O = None if bias_before is None else base.bias.data - bias_before
    base.weight.data = torch.full((1,), torch.nan).expand(change.shape)
    delta = factored(change_OI, _ROUNDING * float(before.norm() + change.norm()))
    has_shift = shift_O is not None and bool(shift_O.any())
    return dataclasses.replace(delta, shift_O=shift_O if has_shift else None)
