"""A lowered adapter's tensors: how many bytes they are, and the same adapter elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from serving.adapters.primitives import LoweredAdapter

_CSR_PARTS = ("values", "crow_indices", "col_indices")


def num_bytes(lowered: LoweredAdapter) -> int:
    """Memory of its tensors, at their true ranks; what two of them share counts once."""
    storages = {s.data_ptr(): s.nbytes() for s in map(_storage, _strided(_tensors(lowered)))}
    return sum(storages.values())


def moved(lowered: LoweredAdapter, device: torch.device) -> LoweredAdapter:
    """The same adapter on `device`; itself if it is there already. From pinned memory the copies
    are asynchronous, and whoever uses the result on another stream waits for this one first."""
    return _mapped(lowered, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(lowered: LoweredAdapter) -> LoweredAdapter:
    """The same adapter in host memory that a GPU copies from by itself; sparse changes in plain
    host memory. Waits until its bytes are there."""
    host = _mapped(lowered, lambda tensor: tensor.cpu())
    return _mapped(host, lambda t: t.pin_memory() if t.layout is torch.strided else t)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in it changed, itself where none is."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _mapped(getattr(value, f.name), change) for f in fields(value)}
        return replace(value, **parts)
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _strided(tensors: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """A sparse one as the three that it is made of."""
    for tensor in tensors:
        if tensor.layout is torch.sparse_csr:
            yield from (getattr(tensor, part)() for part in _CSR_PARTS)
        else:
            yield tensor


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
