"""Folders that change the base's own weights: LayerNorm tuning, sparse deltas, SHiRA.

LayerNorm tuning (arXiv:2312.11420) stores norms in place of the base's. A sparse delta (FishMask,
arXiv:2111.09839; Child-tuning, arXiv:2109.05687; full fine-tuning) stores the change of each
parameter: values at flat indices, or all of it. SHiRA (arXiv:2406.13175): rows and columns.

    I in    O out    K changed elements
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from cluster.adapter_folder import WEIGHTS, AdapterFolder, fault
from serving.adapters.alone import without_warnings
from serving.adapters.config import refuse_unread
from serving.adapters.pace import give_way
from serving.adapters.primitives import Delta, LinearDelta, LoweredAdapter, Replacement
from serving.adapters.target import ModuleShape, Target, bare_name, shape_of

_NORM = ".ln_tuning_layers."


@dataclass(frozen=True)
class Sparse:
    """A change of one parameter: float32 values at flat, rising int64 indices."""

    indices_K: torch.Tensor
    values_K: torch.Tensor

    def dense(self, like: torch.Tensor) -> torch.Tensor:
        """The whole change, in the shape of `like`, float32 on CPU."""
        flat = torch.zeros(like.numel())
        flat[self.indices_K] = self.values_K
        return flat.view(like.shape)


# The changes of one module's parameters, by their name in it.
_Changes = dict[str, "torch.Tensor | Sparse"]


def lower_layernorm(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A LayerNorm-tuning folder as replacements. Raises AdapterError."""
    refuse_unread(folder, {"modules_to_save"}, {"target_modules", "exclude_modules"})
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, infix, name = bare_name(folder, key).partition(_NORM)
        if not infix:
            raise fault(folder.path, WEIGHTS, f"has tensor {key!r}, which is not of a norm")
        _own(folder, key, shape_of(folder, key, module, target), target, name, tuple(tensor.shape))
        found[module][name] = _placed(tensor, target)
    return LoweredAdapter({module: Replacement(parts) for module, parts in found.items()})


def lower_sparse_delta(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A folder of changed parameters as deltas and replacements. Raises AdapterError."""
    refuse_unread(folder, {"method"}, ())
    changes: dict[str, _Changes] = defaultdict(dict)
    for key, tensor in tensors.items():
        path, _, part = bare_name(folder, key).rpartition(".")
        if part not in ("values", "indices", "delta") or (
            part == "indices" and key.removesuffix(part) + "values" not in tensors
        ):
            raise fault(folder.path, WEIGHTS, f"has tensor {key!r}, which is no change of a weight")
        if part == "indices":
            continue
        module, _, name = path.rpartition(".")
        shape = shape_of(folder, key, module, target)
        if part == "delta":
            own = _own(folder, key, shape, target, name, tuple(tensor.shape))
            change = tensor.float()
        else:
            own = _own(folder, key, shape, target, name)
            indices = tensors.get(key.removesuffix(part) + "indices")
            change = _checked(folder, key, indices, tensor, own.numel())
        if isinstance(change, Sparse) and not len(change.values_K):
            continue
        for tied, same in sharing(target, own):
            changes[tied][same] = change
    return LoweredAdapter(
        {m: _lowered(target.modules[m], parts, target) for m, parts in changes.items()}
    )


def lower_shira(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A SHiRA folder as sparse deltas. Raises AdapterError."""
    trained_with = {"r", "mask_type", "random_seed", "target_modules", "fan_in_fan_out",
                    "init_weights"}  # fmt: skip
    refuse_unread(folder, {"modules_to_save"}, trained_with)
    deltas: dict[str, Delta] = {}
    for key, values_K in tensors.items():
        module, _, part = bare_name(folder, key).rpartition(".")
        names = "shira_weight", "shira_indices"
        pair = [tensors.get(key.removesuffix(part) + name) for name in names]
        places_2K = pair[1]
        if part not in names or pair[0] is None or places_2K is None:
            raise fault(
                folder.path, WEIGHTS, f"has tensor {key!r}, which is not of SHiRA or no whole pair"
            )
        if part == "shira_indices":
            continue
        shape = shape_of(folder, key, module, target)
        if shape.kind != "linear":  # PEFT's places would be others in a weight that is transposed
            raise fault(folder.path, WEIGHTS, f"has a SHiRA on {module!r}, which is not linear")
        size = (shape.out_features, shape.in_features)
        own = _own(folder, key, shape, target, "weight", size)
        if (
            places_2K.shape != (2, *values_K.shape)
            or not (places_2K[1] >= 0).all()
            or not (places_2K[1] < size[1]).all()
        ):
            raise fault(folder.path, WEIGHTS, f"has {key!r} whose indices are not within {size}")
        flat_K, order_K = (places_2K[0].long() * size[1] + places_2K[1]).sort()
        change = _checked(folder, key, flat_K, values_K[order_K], own.numel())
        deltas[module] = _lowered(shape, {"weight": change}, target)
    return LoweredAdapter(deltas)


def _own(
    folder: AdapterFolder,
    key: str,
    shape: ModuleShape,
    target: Target,
    name: str,
    expected: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The base's parameter that `key` changes. Raises AdapterError if it differs in shape."""
    own = shape.parameters.get(name)
    if own is None and shape.is_quantized and name == "weight":
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {key!r}, a change of a weight in [in, out] order, which the quantised base "
            f"{target.name} keeps in the other; serve it over the plain base",
        )
    if own is None or (expected is not None and tuple(own.shape) != expected):
        there = "no such parameter" if own is None else f"one of shape {tuple(own.shape)}"
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {key!r}, of another shape: the base has {there}; "
            f"the adapter was made for another base ({folder.base_model})",
        )
    return own


def _checked(
    folder: AdapterFolder,
    key: str,
    indices_K: torch.Tensor | None,
    values_K: torch.Tensor,
    size: int,
) -> Sparse:
    """The change, if its indices rise and lie in the parameter. Raises AdapterError."""
    sound = (
        indices_K is not None
        and not indices_K.is_floating_point()
        and indices_K.ndim == 1
        and indices_K.shape == values_K.shape
        and (not len(indices_K) or (indices_K[0] >= 0 and indices_K[-1] < size))
        and bool((indices_K[1:] > indices_K[:-1]).all())
    )
    if not sound:
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {key!r} whose indices do not rise from 0 to below {size}, one for each value; "
            f"the adapter was made for another base ({folder.base_model}), or is damaged",
        )
    assert indices_K is not None
    return Sparse(indices_K.long(), values_K.float())


def sharing(target: Target, own: torch.Tensor) -> Iterator[tuple[str, str]]:
    """(module, name) of each place where the base uses this very parameter: tied ones are two."""
    for module, shape in target.modules.items():
        for name, parameter in shape.parameters.items():
            is_same = parameter.data_ptr() == own.data_ptr() and parameter.shape == own.shape
            # One in 4 or 8 bits, which is only described, is tied to no other.
            if parameter is own or (is_same and not own.is_meta):
                yield module, name


def _lowered(shape: ModuleShape, changes: _Changes, target: Target) -> Delta:
    """A sparse weight, and a bias, as a linear delta; anything else as a replacement."""
    weight = changes.get("weight")
    if not shape.takes_low_rank or (weight is not None and not isinstance(weight, Sparse)):
        return Replacement(
            {
                name: _placed(_value(shape, name) + _whole(change, shape, name), target)
                for name, change in changes.items()
            }
        )
    bias = changes.get("bias")
    return LinearDelta(
        shift_O=None if bias is None else _placed(_whole(bias, shape, "bias"), target),
        sparse=None if weight is None else compressed(weight, shape, target),
    )


def _value(shape: ModuleShape, name: str) -> torch.Tensor:
    """The base's parameter, float32 on CPU."""
    if shape.is_quantized and name == "weight":
        assert shape.read_weight is not None, "a quantised module is linear"
        return shape.read_weight()
    return shape.parameters[name].float().cpu()


def _whole(change: torch.Tensor | Sparse, shape: ModuleShape, name: str) -> torch.Tensor:
    return change.dense(shape.parameters[name]) if isinstance(change, Sparse) else change


def compressed(change: Sparse, shape: ModuleShape, target: Target) -> torch.Tensor:
    """As LinearDelta holds it."""
    rows, columns = shape.parameters["weight"].shape
    places = torch.stack([change.indices_K // columns, change.indices_K % columns])
    values = change.values_K * shape.scale
    if shape.kind == "transposed":
        places, rows, columns = places.flip(0), columns, rows
    with without_warnings("Sparse CSR tensor support is in beta"):
        table = torch.sparse_coo_tensor(
            places, values, (rows, columns), check_invariants=True
        ).coalesce()
        return table.to_sparse_csr().to(target.device)


def _placed(tensor: torch.Tensor, target: Target) -> torch.Tensor:
    give_way()
    return tensor.to(target.device, target.dtype, copy=True).contiguous()
