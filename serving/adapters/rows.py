"""Where each module of a base has a step's rows, learned from one pass.

    T tokens of the step    B rows of a padded batch    L tokens of the longest    O out

The rows are the step's tokens where these lie end to end, else those of a padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from serving.adapters.primitives import Delta


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `end` (excluded) of a step, and what changes them."""

    start: int
    end: int
    deltas: Mapping[str, Delta]


@dataclass(frozen=True)
class Place:
    """Which dimension of a module's output counts rows. `is_tuple`: it gives several tensors, as a
    router does. `is_flat`: of a padded batch it has all tokens, [B L, O], as experts do."""

    dim: int
    is_tuple: bool = False
    is_flat: bool = False

    def segments(self, body: Sequence[Segment], rows: int, shown: int) -> Sequence[Segment]:
        """Those of a step of so many `rows`, as a module has them that shows so many."""
        if not self.is_flat:
            return body
        width = shown // rows
        return [Segment(part.start * width, part.end * width, part.deltas) for part in body]


@dataclass(frozen=True)
class Rows:
    """A segment's rows of whatever has `total` of them in `dim`."""

    dim: int
    total: int
    segment: Segment

    def of(self, value: Any) -> Any:
        """Its rows, a view; `value` itself where it has no rows."""
        if not isinstance(value, torch.Tensor) or value.ndim <= self.dim:
            return value
        if value.shape[self.dim] != self.total:
            return value
        return value.narrow(self.dim, self.segment.start, self.segment.end - self.segment.start)


@contextmanager
def learning(
    modules: Mapping[str, torch.nn.Module],
    found: Callable[[str, Place], None],
    num_rows: int,
    dim: int | None,
    width: int | None,
) -> Generator[None]:
    """The scope of one forward pass that tells `found` where each module has the rows; see
    DeltaHooks.learning."""

    def look(name: str) -> Any:
        def note(_: torch.nn.Module, _args: object, output: Any) -> None:
            dims = [_dims(part, num_rows, dim) for part in parts(output)]
            is_tuple = isinstance(output, tuple)
            if len(dims[0]) == 1 and all(other == dims[0] for other in dims):
                found(name, Place(dims[0][0], is_tuple))
            elif width and all(_is_flat(part, num_rows * width) for part in parts(output)):
                found(name, Place(0, is_tuple, is_flat=True))

        return note

    handles = [m.register_forward_hook(look(n)) for n, m in modules.items() if n]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parts(output: Any) -> tuple[Any, ...]:
    """The tensors that a module returns."""
    return cast("tuple[Any, ...]", output) if isinstance(output, tuple) else (output,)


def _dims(part: Any, num_rows: int, dim: int | None) -> list[int]:
    """The dimensions of a module's output that can be the rows."""
    sizes = part.shape[:-1] if isinstance(part, torch.Tensor) else ()
    return [at for at, size in enumerate(sizes) if size == num_rows and dim in (None, at)]


def _is_flat(part: Any, tokens: int) -> bool:
    return isinstance(part, torch.Tensor) and part.ndim == 2 and part.shape[0] == tokens
