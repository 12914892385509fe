"""A change of a whole weight as a linear delta: at its true rank where that is smaller.

I in    O out    r rank
"""

from __future__ import annotations

import torch

from serving.adapters.primitives import LinearDelta

_FIRST_RANK = 4


def factored(change_OI: torch.Tensor, rounding: float) -> LinearDelta:
    """`change_OI`, float32 on CPU, as x A B if that is exact and half of the whole, else as x D;
    nothing, if it is no more than rounding.

    The rank is found by trying: the change's range is spanned by ever more random vectors (Halko
    et al. 2011, arXiv:0909.4061) until what they leave is no more than rounding. A few of its rows
    and columns tell cheaply whether the rank can be that low.

    Args:
        rounding: What of the change means nothing, as a Frobenius norm.
    """
    if change_OI.norm() <= rounding:
        return LinearDelta()
    size_O, size_I = change_OI.shape
    generator, rank = torch.Generator().manual_seed(0), _FIRST_RANK
    while 2 * rank * (size_O + size_I) <= size_O * size_I:
        if _least_rank(change_OI, rank + 1, rounding, generator) <= rank:
            probes_Ir = torch.randn(size_I, rank, generator=generator)
            basis_Or = torch.linalg.qr(change_OI @ probes_Ir).Q
            inner_rI = basis_Or.T @ change_OI
            if (change_OI - basis_Or @ inner_rI).norm() <= rounding:
                return LinearDelta(*_trimmed(basis_Or, inner_rI, rounding))
        rank *= 2
    return LinearDelta(dense_IO=change_OI.T)


def _least_rank(
    change_OI: torch.Tensor, size: int, rounding: float, generator: torch.Generator
) -> int:
    """The rank of a random `size` by `size` part, below which that of the whole cannot be."""
    rows, columns = (torch.randperm(n, generator=generator)[:size] for n in change_OI.shape)
    return int((torch.linalg.svdvals(change_OI[rows][:, columns]) > rounding).sum())


def _trimmed(
    basis_Or: torch.Tensor, inner_rI: torch.Tensor, rounding: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [I, r] and B [r, O] of the true rank, as small as `rounding` lets them be."""
    u_rr, s_r, v_rI = torch.linalg.svd(inner_rI, full_matrices=False)
    left_r = s_r.flip(0).square().cumsum(0).sqrt().flip(0)  # what leaving out from here on costs
    keep = max(1, int((left_r > rounding).sum()))
    return (s_r[:keep, None] * v_rI[:keep]).T, (basis_Or @ u_rr[:, :keep]).T
