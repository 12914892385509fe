"""Weighted mixes: W' = W + Σ w ΔW over adapters, as one adapter's deltas.

Whatever changes weights and biases adds up exactly (task arithmetic, Ilharco et al. 2023,
arXiv:2212.04089): what a linear delta adds to its module's output is linear in ΔW, and a replaced
parameter p moves by Σ w (p' - p). A negative weight takes away what an adapter learned. What is no
change of weights (a prefix, a block, a second model) is refused by name.

    I in    O out    r rank
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from cluster.errors import RequestError
from serving.adapters.alone import without_warnings
from serving.adapters.pace import give_way
from serving.adapters.primitives import Delta, LinearDelta, LoweredAdapter, LowRank, Replacement
from serving.adapters.target import Target


@dataclass(frozen=True)
class Part:
    """One adapter of a mix, and its weight."""

    name: str
    lowered: LoweredAdapter
    weight: float


@dataclass(frozen=True)
class _Term:
    """One adapter's delta of a module, and its weight."""

    name: str
    delta: Delta
    weight: float


def mixed(parts: Sequence[Part], target: Target) -> LoweredAdapter:
    """The sum of `parts`, each times its weight; of a DyLoRA at its highest rank.

    Raises:
        RequestError: one of them, or two on one module, do not add up to a change of weights.
    """
    terms: dict[str, list[_Term]] = {}
    for part in parts:
        if part.lowered.prefix is not None or part.lowered.offset is not None:
            what = "has tokens in front of the prompt" if part.lowered.prefix else "adds logits"
            raise _refused(part.name, f"{what}, which no weight multiplies")
        for module, delta in part.lowered.deltas.items():
            terms.setdefault(module, []).append(_Term(part.name, delta, part.weight))
    deltas = {module: _sum(module, found, target) for module, found in terms.items()}
    return LoweredAdapter(deltas, content=_content(parts))


def _content(parts: Sequence[Part]) -> str:
    """A hash of contents and weights; empty if a content is unknown."""
    if not all(part.lowered.content for part in parts):
        return ""
    named = sorted((part.lowered.content, part.weight) for part in parts)
    return blake2b(f"mix {named!r}".encode()).hexdigest()


def _refused(name: str, reason: str) -> RequestError:
    return RequestError(
        f"adapter {name[:120]!r} cannot be mixed: it {reason}; ask for it alone", param="model"
    )


def _sum(module: str, terms: Sequence[_Term], target: Target) -> Delta:
    give_way()
    linear = [(t, t.delta) for t in terms if isinstance(t.delta, LinearDelta)]
    replaced = [(t, t.delta) for t in terms if isinstance(t.delta, Replacement)]
    if len(linear) == len(terms):
        return _sum_of_linear(module, linear)
    if len(replaced) == len(terms):
        return _sum_of_replaced(module, replaced, target)
    other = next(t for t in terms if not isinstance(t.delta, LinearDelta))
    if isinstance(other.delta, Replacement):
        reason = f"holds parameters of {module!r} whole, which another of the mix changes in part"
    else:
        reason = f"puts a block beside {module!r}, which is no change of weights"
    raise _refused(other.name, reason)


def _sum_of_linear(module: str, terms: Sequence[tuple[_Term, LinearDelta]]) -> LinearDelta:
    """y + Σ w (y' - y), with y' what each makes of y."""
    scaled = next((term for term, delta in terms if delta.scale_I is not None), None)
    plain = all(
        part is None
        for _, delta in terms
        for part in (delta.a_Ir, delta.scale_O, delta.dense_IO, delta.sparse)
    )
    if scaled is not None and not plain:
        # The others would read the scaled input.
        raise _refused(
            scaled.name, f"scales the input of {module!r}, which another of the mix changes too"
        )
    low_rank = [
        (delta.a_Ir, delta.b_rO.float() * (term.weight * delta.factor), delta)
        for term, delta in terms
        if delta.a_Ir is not None and delta.b_rO is not None
    ]
    return LinearDelta(
        a_Ir=_side_by_side([a_Ir for a_Ir, _, _ in low_rank]) if low_rank else None,
        b_rO=torch.cat([b_rO.to(a.dtype) for a, b_rO, _ in low_rank]) if low_rank else None,
        shift_O=_weighted(terms, lambda delta: delta.shift_O),
        scale_O=_weighted(terms, lambda delta: delta.scale_O, around=1.0),
        scale_I=_weighted(terms, lambda delta: delta.scale_I, around=1.0),
        dense_IO=_weighted(terms, lambda delta: delta.dense_IO),
        sparse=_sum_of_sparse([(t.weight, d.sparse) for t, d in terms if d.sparse is not None]),
    )


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """As columns [I, r], in memory as they are: rank by rank, or an embedding's by token."""
    if all(a_Ir.T.is_contiguous() for a_Ir in parts):
        return torch.cat([a_Ir.T for a_Ir in parts]).T
    return torch.cat([*parts], dim=1)


def _weighted(
    terms: Sequence[tuple[_Term, LinearDelta]],
    part_of: Callable[[LinearDelta], torch.Tensor | None],
    around: float = 0.0,
) -> torch.Tensor | None:
    """around + Σ w (part - around) over those that have the part, in float32 and back."""
    found = [(t.weight, part) for t, delta in terms if (part := part_of(delta)) is not None]
    if not found:
        return None
    total = torch.full_like(found[0][1], around, dtype=torch.float32)
    for weight, part in found:
        total += weight * (part.float() - around)
    return total.to(found[0][1].dtype)


def _sum_of_sparse(found: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor | None:
    if not found:
        return None
    with without_warnings("Sparse CSR tensor support is in beta"):
        weight, first = found[0]
        total = first.to_sparse_coo() * weight
        for weight, sparse in found[1:]:
            total = total + sparse.to_sparse_coo() * weight
        return total.coalesce().to_sparse_csr()


def _sum_of_replaced(
    module: str, terms: Sequence[tuple[_Term, Replacement]], target: Target
) -> Replacement:
    """p + Σ w (p' - p) of each parameter that one of them has."""
    shape, parameters = target.modules[module], dict[str, torch.Tensor | LowRank]()
    for name in dict.fromkeys(name for _, r in terms for name in r.parameters):
        own = shape.parameters[name]
        found = [(t, r.parameters[name]) for t, r in terms if name in r.parameters]
        if own.is_meta:
            reason = f"replaces {module!r}, whose weight is quantised here"
            raise _refused(found[0][0].name, reason)
        low_rank = [(t.weight, value) for t, value in found if isinstance(value, LowRank)]
        if len(low_rank) == len(found):
            left = torch.cat([value.left.float() * w for w, value in low_rank], dim=-1)
            right = torch.cat([value.right for _, value in low_rank], dim=-2)
            parameters[name] = LowRank(left.to(right.dtype), right)
            continue
        total = own.float()
        for term, value in found:
            whole = value.added_to(own) if isinstance(value, LowRank) else value
            total = total + term.weight * (whole.float() - own.float())
        parameters[name] = total.to(target.dtype).contiguous()
    return Replacement(parameters)
