"""A run without bytes: fake tensors, a process group that sends nothing, and a ledger of storages.

PyTorch's fake tensors (torch._subclasses.fake_tensor) have shapes, dtypes and storages of a size,
and no memory. The worker's own code runs on them, DeepSpeed's included; the ledger writes down
which bytes it asks for and gives back, in order, and what for. Knows no methods and no allocator.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.quantized_shape import scales_of


class Ledger(TorchDispatchMode):
    """The scope in which storages are counted.

    `events` are (number, bytes) for a new storage and (number, 0) for its end; `parts[number]` is
    what it is for: the `part` of the time when it was made, unless it was claimed for another one;
    "logits" where an activation is as wide as the `vocabulary`.

    What a fake tensor cannot answer is answered here: a boolean mask chooses the first
    `chosen` positions (all, if None), a condition is false, any other number is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.parts: list[str] = []
        self.part = "weights"
        self.vocabulary: int | None = None
        self.chosen: int | None = None
        self._numbers: dict[int, int] = {}  # by the storage's identity, while it lives
        self._ends: dict[int, weakref.ref[Any]] = {}

    def rename(self, part: str, other: str) -> None:
        """Let what `part` holds now be of the `other`, from its beginning."""
        for number in self._numbers.values():
            if self.parts[number] == part:
                self.parts[number] = other

    @contextmanager
    def counting(self, part: str) -> Generator[None]:
        """The scope in which what is new counts as `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def claim(self, tensors: Iterable[Any], part: str | None = None) -> None:
        """Let the storages of `tensors` be of `part`, from their beginning."""
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                continue
            storage: Any = tensor.untyped_storage()
            if storage._cdata not in self._numbers and storage.nbytes():
                is_wide = tensor.ndim > 0 and tensor.shape[-1] == self.vocabulary
                is_logits = is_wide and self.part == "activations"
                self._begin(storage, "logits" if is_logits else self.part)
            if part and storage._cdata in self._numbers:
                self.parts[self._numbers[storage._cdata]] = part

    def _begin(self, storage: Any, part: str) -> None:
        key, size, number = storage._cdata, storage.nbytes(), len(self.parts)
        self.parts.append(part)
        self._numbers[key] = number
        self.events.append((number, size))

        def end(_: Any) -> None:
            del self._numbers[key], self._ends[number]
            self.events.append((number, 0))

        self._ends[number] = weakref.ref(storage, end)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See TorchDispatchMode."""
        if func.namespace == "c10d":
            return self._collective(func, args)
        if func is torch.ops.aten.index.Tensor and _is_mask(args[1][0]):
            values, mask = args[0], args[1][0]
            count = min(mask.numel(), self.chosen or mask.numel())
            args = (values.flatten(0, mask.ndim - 1), [torch.arange(count)])
        try:
            result = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return False if args[0].dtype == torch.bool else 1
        self.claim(tree_leaves(result))
        return result

    def _collective(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Its tensors stay as they are; it has ended when it is asked for."""
        gathers = "allgather" in func._schema.name
        if gathers:  # gloo receives them in a buffer of their size
            size = sum(t.untyped_storage().nbytes() for t in tree_leaves(args[0]))
            self.events += [(len(self.parts), size), (len(self.parts), 0)]
            self.parts.append("weights")
        if self.part == "activations":
            self.claim(tree_leaves(args[0]), "weights" if gathers else "gradients")
        work: Any = FakeWork()
        return work.boxed() if len(func._schema.returns) == 1 else (args[0], work.boxed())


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype == torch.bool


def without_bytes(*models: torch.nn.Module) -> list[torch.Tensor]:
    """Put a fake CPU tensor in the place of each parameter and buffer of models on the meta device,
    and of what quantised modules keep beside these, which is returned. To be called within a
    FakeTensorMode; tied and shared parameters stay so."""
    made: dict[Any, Any] = {}

    def fake(tensor: Any) -> Any:
        if tensor not in made:
            empty: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                empty = torch.nn.Parameter(empty, tensor.requires_grad)
            vars(empty).update(vars(tensor))  # as a learning rate's ratio
            made[tensor] = empty
        return made[tensor]

    whole = torch.nn.ModuleList(models)  # which has a module of two of them once
    beside = [(holder, name, fake(getattr(holder, name))) for holder, name in scales_of(whole)]
    for holder, name, tensor in beside:
        setattr(holder, name, tensor)
    for module in whole.modules():
        for held in (vars(module)["_parameters"], vars(module)["_buffers"]):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fake(tensor)
    return [tensor for _, _, tensor in beside]


@contextmanager
def lone_worker(world_size: int) -> Generator[None]:
    """The scope in which this process is worker 0 of so many, of which no other exists.

    Not where torch.distributed is initialised already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with patch.dict(os.environ, {**place, **address, "DS_ACCELERATOR": "cpu"}):
        dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()
