"""Whether rows that lie end to end stay apart: an exact answer in any precision.

In half precision a neighbour may move a row's states by less than rounding does, so that close
numbers prove nothing. The gradient of a row by a neighbour that it does not see is zero to the bit,
behind a mask too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def takes_positions(base: Any) -> bool:
    """Whether the base is told each token's position, rather than counts places itself."""
    return "position_ids" in inspect.signature(base.forward).parameters


def stays_apart(
    base: Any, bounds: Sequence[tuple[int, int]], outputs: Callable[[], Iterable[torch.Tensor]]
) -> bool:
    """Whether of three rows the one in the middle sees neither of the others. `outputs` are those
    of a packed pass, row by row, of the tokens at `bounds`."""
    with torch.enable_grad(), _embedded(base.get_input_embeddings()) as leaves:
        _, middle, _ = outputs()
        # Not their plain sum, which a norm keeps the same.
        weights = torch.linspace(1, 2, middle.shape[-1], device=middle.device)
        (gradient,) = torch.autograd.grad((middle.float() * weights).sum(), leaves)
    (before, _), (start, end), (_, after) = bounds
    others = (gradient[..., before:start, :], gradient[..., end:after, :])
    # A base that embeds in another place shows nothing.
    return bool(gradient[..., start:end, :].any()) and not any(bool(g.any()) for g in others)


@contextmanager
def _embedded(embedding: torch.nn.Module) -> Generator[list[torch.Tensor]]:
    """A scope that keeps what tokens are embedded as, as the leaves of a graph."""
    leaves: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # which a base may scale in place

    hook = embedding.register_forward_hook(keep)
    try:
        yield leaves
    finally:
        hook.remove()
