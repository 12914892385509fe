"""BitFit and IA3 folders as linear deltas, and what every lowering to them needs.

BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): y' = y + (b' - b). IA3 (Liu et al. 2022,
arXiv:2205.05638): y' = l ∘ y, or W (l ∘ x) in feed-forward modules.

    I in    O out    r rank
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from cluster.adapter_folder import WEIGHTS, AdapterFolder, fault
from serving.adapters.config import refuse_unread
from serving.adapters.pace import give_way
from serving.adapters.primitives import LinearDelta, LoweredAdapter
from serving.adapters.target import ModuleShape, Target, bare_name, shape_of


def lower_bitfit(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A BitFit folder as output shifts. Raises AdapterError."""
    refuse_unread(folder, (), {"target_modules"})
    deltas: dict[str, LinearDelta] = {}
    for key, module, shape in _by_module(folder, tensors, ".bias", "is no bias", target):
        tensor = tensors[key]
        change = fit_shift(folder, key, change_of_bias(tensor, shape), shape)
        deltas[module] = placed(LinearDelta(shift_O=change), target)
    return LoweredAdapter(deltas)


def lower_ia3(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """An IA3 folder as output and input scales. Raises AdapterError."""
    trained_with = {"target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out",
                    "init_ia3_weights"}  # fmt: skip
    refuse_unread(folder, {"modules_to_save"}, trained_with)
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
        deltas[module] = placed(delta, target)
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


def change_of_bias(bias_O: torch.Tensor, shape: ModuleShape) -> torch.Tensor:
    """`bias_O` less the base's own, float32 on CPU; one that the base lacks counts as zero."""
    own = shape.bias
    return bias_O.float() - (
        own.float().cpu() if own is not None and own.shape == bias_O.shape else 0
    )


def fit_shift(
    folder: AdapterFolder, key: str, shift: torch.Tensor, shape: ModuleShape
) -> torch.Tensor:
    """`shift`, if the module has so many outputs. Raises AdapterError."""
    if tuple(shift.shape) != (shape.out_features,):
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {key!r} with shape {tuple(shift.shape)}, where the base has "
            f"({shape.out_features},); the adapter was made for another base ({folder.base_model})",
        )
    return shift


def placed(delta: LinearDelta, target: Target, *, is_embedding: bool = False) -> LinearDelta:
    """In the engine's dtype, on its device, copied (the file is mapped), and contiguous: A as
    [r, I], or row by token of an embedding."""
    give_way()

    def place(part: torch.Tensor | None, is_transposed: bool = False) -> torch.Tensor | None:
        if part is None:
            return None
        part = part.T if is_transposed else part
        copy = torch.empty(part.shape, dtype=target.dtype, device=target.device).copy_(part)
        return copy.T if is_transposed else copy

    return LinearDelta(
        a_Ir=place(delta.a_Ir, not is_embedding),
        b_rO=place(delta.b_rO),
        shift_O=place(delta.shift_O),
        scale_O=place(delta.scale_O),
        scale_I=place(delta.scale_I),
        dense_IO=place(delta.dense_IO),
    )
