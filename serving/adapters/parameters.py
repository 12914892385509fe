"""A LoRA on parameters (PEFT's target_parameters): a mixture's stacked experts, and its router.

p' = p + s B A, of each expert. PEFT wraps a module once for each of its parameters, so that the
folder's names tell how deep a parameter lies and not which one it is: the last of them in the
module is outermost.

    E experts    I in    O out    r rank
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cluster.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, fault
from serving.adapters.pace import give_way
from serving.adapters.primitives import LowRank
from serving.adapters.target import Target


def targeted_parameters(folder: AdapterFolder, target: Target) -> dict[str, tuple[str, str]]:
    """(module, parameter) of each that the folder changes, by what its tensors' names begin with.
    Raises AdapterError."""
    asked = folder.config.get("target_parameters") or []
    if not isinstance(asked, list) or not all(isinstance(name, str) for name in asked):
        raise fault(folder.path, CONFIG, f"has target_parameters = {str(asked)[:80]!r}, not names")
    endings = tuple(f".{name}" for name in asked)
    found: dict[str, tuple[str, str]] = {}
    for module, shape in target.modules.items() if endings else ():
        names = [name for name in shape.parameters if f".{module}.{name}".endswith(endings)]
        for depth, name in enumerate(reversed(names)):
            found[module + ".base_layer" * depth] = (module, name)
    return found


def change_of_parameter(
    folder: AdapterFolder,
    place: tuple[str, str],
    parts: Mapping[str, torch.Tensor],
    rank: int,
    scale: float,
    target: Target,
) -> LowRank:
    """What A [E r, I] and B [O, r E] change of the parameter at `place`, a module and a name in it.
    Raises AdapterError."""
    give_way()
    module, name = place
    shape = target.modules[module]
    own = shape.parameters[name]
    if own.is_meta or not own.is_floating_point() or own.ndim not in (2, 3):
        raise fault(
            folder.path,
            CONFIG,
            f"has {name!r} of {module!r} in target_parameters, which is no plain matrix, or stack "
            "of some; leave it out of target_parameters",
        )
    is_transposed = own.ndim == 3 and shape.is_transposed
    experts = own.shape[0] if own.ndim == 3 else 1
    size_O, size_I = own.shape[-2:] if not is_transposed else own.shape[:-3:-1]
    expected = {"A": (experts * rank, size_I), "B": (size_O, rank * experts)}
    found = {part: tuple(tensor.shape) for part, tensor in sorted(parts.items())}
    if found != expected:
        raise fault(
            folder.path,
            WEIGHTS,
            f"has factors of shapes {found} for {name!r} of {module!r}, where the base "
            f"{target.name} and rank {rank} need {expected}; the adapter was made for another base "
            f"({folder.base_model})",
        )
    a_ErI = parts["A"].float().view(experts, rank, size_I)
    b_EOr = parts["B"].float().view(size_O, rank, experts).permute(2, 0, 1) * scale
    left, right = (a_ErI.mT, b_EOr.mT) if is_transposed else (b_EOr, a_ErI)
    if own.ndim == 2:
        left, right = left[0], right[0]
    return LowRank(*(t.to(target.device, target.dtype, copy=True) for t in (left, right)))
