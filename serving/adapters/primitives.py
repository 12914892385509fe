"""The primitives: all that the engine can apply, whatever method they came from.

    I in    O out    r rank    H hidden    R width
    P prefix tokens    L layers    K key/value heads    D head size

The engine knows these and no method; a method knows how it lowers to these and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch


@dataclass(frozen=True)
class Pair:
    """A and B of a linear delta as kernels read them: addresses of A [r, I] and B [r, O], both
    contiguous, of one dtype on one device. `is_aligned`: by 16 bytes."""

    a: int
    b: int
    rank: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    device: torch.device
    is_aligned: bool

    def fits(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether it leads from x [..., I] to y [..., O]."""
        return (
            self.dtype is x.dtype is y.dtype
            and self.device == x.device == y.device
            and (self.inputs, self.outputs) == (x.shape[-1], y.shape[-1])
        )


@dataclass(frozen=True)
class LinearDelta:
    """What an adapter makes of one module: scale_O ∘ W(scale_I ∘ x) + (x A) B + x D + x S + shift.

    For an embedding, x is the one-hot row of the token, so A has a row for each token id. Tensors
    have the engine's dtype and device; a LoRA's factor is already in B. D is of linear modules
    alone.

    Args:
        factor: Of x A B.
        sparse: The sparse change S of the weight, in float32 whatever the engine's dtype: CSR
            [O, I]; of an embedding [I, O], whose rows are the tokens'.
    """

    a_Ir: torch.Tensor | None = None
    b_rO: torch.Tensor | None = None
    shift_O: torch.Tensor | None = None
    scale_O: torch.Tensor | None = None
    scale_I: torch.Tensor | None = None
    dense_IO: torch.Tensor | None = None
    sparse: torch.Tensor | None = None
    factor: float = 1.0

    @cached_property
    def low_rank(self) -> Pair | None:
        """A and B for kernels; None if there are none, or they lie otherwise."""
        a_Ir, b_rO = self.a_Ir, self.b_rO
        if a_Ir is None or b_rO is None or a_Ir.dtype is not b_rO.dtype:
            return None
        if not (a_Ir.T.is_contiguous() and b_rO.is_contiguous() and a_Ir.device == b_rO.device):
            return None
        addresses = a, b = a_Ir.data_ptr(), b_rO.data_ptr()
        sizes = (b_rO.shape[0], a_Ir.shape[0], b_rO.shape[1])
        is_aligned = all(address % 16 == 0 for address in addresses)
        return Pair(a, b, *sizes, a_Ir.dtype, a_Ir.device, is_aligned)

    @cached_property
    def without_low_rank(self) -> LinearDelta | None:
        """The same less x A B; None if that was all."""
        rest = replace(self, a_Ir=None, b_rO=None, factor=1.0)
        others = (getattr(rest, part.name) for part in fields(rest) if part.name != "factor")
        return rest if any(part is not None for part in others) else None


@dataclass(frozen=True)
class LowRank:
    """A parameter as the base's plus left @ right, of each expert where it is a stack of them. The
    sum is made anew in each step, and gone behind the module."""

    left: torch.Tensor
    right: torch.Tensor

    def added_to(self, own: torch.Tensor) -> torch.Tensor:
        """The whole parameter, a copy."""
        add = torch.baddbmm if own.ndim == 3 else torch.addmm
        return add(own, self.left, self.right)


@dataclass(frozen=True)
class Replacement:
    """Parameters of one module in place of the base's, by their name in the module: the module
    runs again with them on the adapter's rows. What a norm's weight needs, since no change of its
    output is the same as a change of its weight; and experts, which see some of the rows each."""

    parameters: Mapping[str, torch.Tensor | LowRank]


@dataclass(frozen=True)
class Block:
    """Two small layers that add to one module's output: y + f(x D + d) U + u, where x is that
    output, or what module `source` reads.

    Args:
        activation: f, a key of ACTIVATIONS.
    """

    down_HR: torch.Tensor
    down_R: torch.Tensor
    up_RH: torch.Tensor
    up_H: torch.Tensor
    activation: str
    source: str | None = None


@dataclass(frozen=True)
class GatedPrompt:
    """Attention to a learned prompt beside the base's own, softmax(q Kᵀ / √D) V for a layer's
    queries, added to what its output projection reads, or else gives. V holds the gate.

    Args:
        shift_O: What the projection's output gets too.
    """

    keys_PKD: torch.Tensor
    values_PKD: torch.Tensor
    layer: int
    is_projected: bool
    shift_O: torch.Tensor | None = None


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}
# What an adapter makes of one module.
Delta = LinearDelta | Replacement | Block | GatedPrompt


@dataclass(frozen=True)
class EmbeddingPrefix:
    """Vectors in front of the first token's embedding, [P, hidden]; their keys and values are
    what the bare base computes for them."""

    embeddings_PH: torch.Tensor


@dataclass(frozen=True)
class KVPrefix:
    """Keys and values that every token attends to: [L, P, K, D] each, positions 0 to P - 1."""

    keys_LPKD: torch.Tensor
    values_LPKD: torch.Tensor


@dataclass(frozen=True)
class LogitOffset:
    """alpha (s' - s), added to the base's logits: s are those of the small base of that path, s'
    those with `expert` on it."""

    small_base: str
    alpha: float
    expert: LoweredAdapter


@dataclass(frozen=True)
class LoweredAdapter:
    """One adapter as primitives: deltas by module name, at most one prefix and one offset.
    `content` is a hash of all that it was made of; adapters without one share nothing. `ranks` are
    those at which it is good, where a request may choose one."""

    deltas: Mapping[str, Delta] = field(default_factory=dict[str, Delta])
    prefix: EmbeddingPrefix | KVPrefix | None = None
    offset: LogitOffset | None = None
    content: str = ""
    ranks: range | None = None

    def at_rank(self, rank: int) -> LoweredAdapter:
        """The same with the first `rank` of the highest rank's products alone, over their number:
        DyLoRA's alpha / b in place of alpha / r. Views, no copies."""
        assert self.ranks is not None, "a rank is chosen where there is a choice"
        factor = self.ranks[-1] / rank
        deltas = dict(self.deltas)
        for module, delta in deltas.items():
            if isinstance(delta, LinearDelta) and delta.a_Ir is not None:
                assert delta.b_rO is not None, "A comes with B"
                cut = (delta.a_Ir[:, :rank], delta.b_rO[:rank])
                deltas[module] = replace(delta, a_Ir=cut[0], b_rO=cut[1], factor=factor)
        content = f"{self.content} rank {rank}" if self.content else ""
        return replace(self, deltas=deltas, content=content, ranks=None)

    @property
    def prefix_tokens(self) -> int:
        """Positions that the prefix, or the expert's, takes in pages."""
        if self.offset is not None:
            return self.offset.expert.prefix_tokens
        if self.prefix is None:
            return 0
        if isinstance(self.prefix, EmbeddingPrefix):
            return self.prefix.embeddings_PH.shape[0]
        return self.prefix.keys_LPKD.shape[1]
