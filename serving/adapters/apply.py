"""Apply deltas inside one forward pass of the base, each to the rows of its own adapter.

    T tokens of the step    I in    O out

Rows lie sorted by adapter, so each adapter is one contiguous segment and its delta one in-place
`addmm` on a slice of the base's output. Forward hooks sit on those modules alone that some loaded
adapter changes; a step without adapters runs the base as it is.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from serving.adapters.primitives import LinearDelta


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `end` (excluded) of the flattened tokens, and what changes them."""

    start: int
    end: int
    deltas: Mapping[str, LinearDelta]


class DeltaHooks:
    """The hooks on one model. Used by one thread; changed only between forward passes."""

    def __init__(self, model: Any) -> None:
        self._modules: dict[str, torch.nn.Module] = dict(model.named_modules())
        self._head = model.get_output_embeddings()
        self._handles: dict[str, RemovableHandle] = {}
        self._users: dict[str, int] = {}
        self._body: Sequence[Segment] = ()
        self._head_rows: Sequence[Segment] = ()

    def install(self, names: Iterable[str]) -> None:
        """Count one more adapter that changes the modules `names`."""
        for name in names:
            self._users[name] = self._users.get(name, 0) + 1
            if self._users[name] == 1:
                module = self._modules[name]
                self._handles[name] = module.register_forward_hook(self._hook(name, module))

    def uninstall(self, names: Iterable[str]) -> None:
        """Count one adapter less on the modules `names`."""
        for name in names:
            self._users[name] -= 1
            if not self._users[name]:
                self._handles.pop(name).remove()

    @contextmanager
    def active(self, body: Sequence[Segment], head: Sequence[Segment]) -> Generator[None]:
        """The scope of one forward pass: `body` counts the step's tokens, `head` the rows of which
        logits are made."""
        self._body, self._head_rows = body, head
        try:
            yield
        finally:
            self._body = self._head_rows = ()

    def _hook(self, name: str, module: torch.nn.Module) -> Any:
        is_head = module is self._head

        def apply(_: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            y_TO = output.view(-1, output.shape[-1])
            x = args[0]
            for segment in self._head_rows if is_head else self._body:
                delta = segment.deltas.get(name)
                if delta is not None:
                    rows = slice(segment.start, segment.end)
                    _add(y_TO[rows], x.reshape(-1, *x.shape[2:])[rows], delta)

        return apply


def _add(y_TO: torch.Tensor, x: torch.Tensor, delta: LinearDelta) -> None:
    """y += (x A) B + shift, in place. `x` is [T, I], or token ids [T] for an embedding."""
    if delta.a_Ir is not None and delta.b_rO is not None:
        low_Tr = x @ delta.a_Ir if x.is_floating_point() else delta.a_Ir[x]
        y_TO.addmm_(low_Tr, delta.b_rO)
    if delta.shift_O is not None:
        y_TO += delta.shift_O
