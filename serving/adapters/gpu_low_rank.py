"""What many adapters add to one module's output, by two Triton kernels on a GPU.

    T tokens    I in    O out    r rank    S segments    N tiles    P parts of the input

A tile is some tokens of one segment. The first kernel gives x A, the second adds what B makes of
it: each A and B is read where it lies, once for a tile, at its own rank. x A is summed in parts of
the input side by side, which the second adds in their order: what a token gets depends on no other.
"""

# Of a kernel's arguments Triton makes values of its own, which have no types here.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from cluster.native import are_right
from serving.adapters.primitives import LinearDelta

# Of one adapter; where there is more, two products of cuBLAS fill the GPU. Neither was measured.
_MOST_TOKENS, _HIGHEST_RANK = 256, 128
_TOKENS, _RANKS, _INPUTS, _OUTPUTS = 16, 16, 128, 128  # of one product
_MOST_PARTS, _PART = 8, 512
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_jit: Any = triton.jit


@dataclass(frozen=True)
class GpuLowRankRows:
    """Segments of a step's tokens and what each adds to them. It holds what it points to.

    Args:
        table_S7: int64: start, end (excluded), rank, addresses of A [r, I] and B [r, O], the
            place of its first number of x A, and the bits of the factor, a float64.
        tiles_N2: int64: a segment, and the tile's first token.
        numbers: Of x A, over all segments.
        tokens: The last one's number, and one.
    """

    table_S7: torch.Tensor
    tiles_N2: torch.Tensor
    numbers: int
    tokens: int
    highest_rank: int
    deltas: Sequence[LinearDelta]

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y += factor (x A) B on the rows of each delta, in place: y [..., O] contiguous, x [...,
        I], of the deltas' dtype."""
        x = x.contiguous()
        inputs, outputs, tiles = x.shape[-1], y.shape[-1], len(self.tiles_N2)
        assert self.tokens * outputs <= y.numel(), "a step's rows are those it was made of"
        parts = min(_MOST_PARTS, -(-inputs // _PART))
        part = -(-inputs // (parts * _INPUTS)) * _INPUTS
        low = x.new_empty((parts, self.numbers), dtype=torch.float32)
        tables = (self.table_S7, self.tiles_N2)
        _shrink[(tiles, -(-self.highest_rank // _RANKS), parts)](
            *(low, x, *tables, inputs, part, self.numbers, _TOKENS, _RANKS, _INPUTS)
        )
        _expand[(tiles, -(-outputs // _OUTPUTS))](
            *(y, low, *tables, outputs, parts, self.numbers, _TOKENS, _RANKS, _OUTPUTS)
        )


@functools.cache
def ready(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels run there, and as they should: on segments of several tiles, ranks and
    parts. They are compiled when first asked, which takes seconds."""
    return are_right("low-rank", device, lambda: _away(dtype, device), _TOLERANCE[dtype])


def _away(dtype: torch.dtype, device: torch.device) -> float:
    """How far two segments' products are from torch's, of the largest."""
    random = torch.Generator(device).manual_seed(0)
    x, a_rI, b_rO = (
        torch.randn(shape, generator=random, device=device).to(dtype)
        for shape in ((20, 1120), (40, 1120), (40, 304))
    )
    y, expected = x.new_zeros(20, 304), x.new_zeros((20, 304), dtype=torch.float32)
    spans = [(0, 17, LinearDelta(a_rI.T, b_rO)), (18, 20, LinearDelta(a_rI[:16].T, b_rO[:16]))]
    together(spans).add(y, x)
    for start, end, delta in spans:
        assert delta.a_Ir is not None
        assert delta.b_rO is not None
        low = (x[start:end].float() @ delta.a_Ir.float()).to(dtype)
        expected[start:end] = low.float() @ delta.b_rO.float()
    return float((y.float() - expected).abs().max() / expected.abs().max())


def takes(delta: LinearDelta, tokens: int, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether x A B of so many tokens of this delta, from x [..., I] onto y [..., O], is the
    kernels' to compute."""
    low_rank = delta.low_rank
    return (
        low_rank is not None
        and tokens <= _MOST_TOKENS
        and low_rank.rank <= _HIGHEST_RANK
        and low_rank.is_aligned
        and low_rank.fits(x, y)
        and ready(y.dtype, y.device)
    )


def together(parts: Sequence[tuple[int, int, LinearDelta]]) -> GpuLowRankRows:
    """What the kernels need to know of (start, end, delta)."""
    table: list[tuple[int, ...]] = []
    numbers, device = 0, torch.device("cpu")
    for start, end, delta in parts:
        own = delta.low_rank
        assert own is not None
        factor = struct.unpack("q", struct.pack("d", delta.factor))[0]
        table.append((start, end, own.rank, own.a, own.b, numbers, factor))
        numbers, device = numbers + (end - start) * own.rank, own.device
    # Copied from memory that may be paged out, so that it is read before the call returns, and
    # the step does not wait for the GPU.
    table_S7 = torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)
    tiles_N2 = _tiles(tuple((start, end) for start, end, _ in parts), device)
    highest_rank, tokens = max(row[2] for row in table), max(row[1] for row in table)
    deltas = [delta for *_, delta in parts]
    return GpuLowRankRows(table_S7, tiles_N2, numbers, tokens, highest_rank, deltas)


@functools.lru_cache(maxsize=32)  # one step's modules have the same
def _tiles(spans: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    tiles = [(i, t) for i, (start, end) in enumerate(spans) for t in range(start, end, _TOKENS)]
    return torch.tensor(tiles, dtype=torch.int64).to(device, non_blocking=True)


@_jit(do_not_specialize=["numbers"])
def _shrink(
    low,
    x,
    table,
    tiles,
    inputs,
    part_inputs,
    numbers,
    tile_tokens: tl.constexpr,
    ranks: tl.constexpr,
    block: tl.constexpr,
):
    """x A of one tile, of some ranks and a part of the inputs."""
    tile, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    segment, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    entry = table + 7 * segment
    start, end, rank = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    r = tl.program_id(1) * ranks + tl.arange(0, ranks)
    if tl.program_id(1) * ranks < rank:
        a = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(x.dtype.element_ty)), 16)
        t = first + tl.arange(0, tile_tokens)
        sum = tl.zeros((tile_tokens, ranks), tl.float32)
        for i in range(part * part_inputs, tl.minimum((part + 1) * part_inputs, inputs), block):
            at = i + tl.arange(0, block)
            in_x = (t < end)[:, None] & (at < inputs)[None, :]
            own = tl.load(x + t[:, None] * inputs + at[None, :], in_x, 0.0)
            in_a = (r < rank)[:, None] & (at < inputs)[None, :]
            weight = tl.load(a + r[:, None] * inputs + at[None, :], in_a, 0.0)
            sum += tl.dot(own, tl.trans(weight), input_precision="ieee")
        place = part * numbers + tl.load(entry + 5) + (t - start)[:, None] * rank + r[None, :]
        tl.store(low + place, sum, (t < end)[:, None] & (r < rank)[None, :])


@_jit(do_not_specialize=["parts", "numbers"])
def _expand(
    y,
    low,
    table,
    tiles,
    outputs,
    parts,
    numbers,
    tile_tokens: tl.constexpr,
    ranks: tl.constexpr,
    block: tl.constexpr,
):
    """What B makes of x A, added to one tile of some outputs."""
    tile = tl.program_id(0).to(tl.int64)
    segment, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    entry = table + 7 * segment
    start, end, rank = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    b = tl.multiple_of(tl.load(entry + 4).to(tl.pointer_type(y.dtype.element_ty)), 16)
    factor = tl.load(entry + 6).to(tl.float64, bitcast=True).to(tl.float32)
    low += tl.load(entry + 5)
    t, at = first + tl.arange(0, tile_tokens), tl.program_id(1) * block + tl.arange(0, block)
    sum = tl.zeros((tile_tokens, block), tl.float32)
    for first_rank in range(0, rank, ranks):
        r = first_rank + tl.arange(0, ranks)
        is_own = (t < end)[:, None] & (r < rank)[None, :]
        place = (t - start)[:, None] * rank + r[None, :]
        is_b = (r < rank)[:, None] & (at < outputs)[None, :]
        weight = tl.load(b + r[:, None] * outputs + at[None, :], is_b, 0.0)
        product = tl.zeros((tile_tokens, ranks), tl.float32)
        for part in range(parts):
            product += tl.load(low + part * numbers + place, is_own, 0.0)
        sum += tl.dot(product.to(weight.dtype), weight, input_precision="ieee")
    target = y + t[:, None] * outputs + at[None, :]
    is_own = (t < end)[:, None] & (at < outputs)[None, :]
    sum = tl.load(target, is_own, 0.0).to(tl.float32) + sum * factor
    tl.store(target, sum, is_own)
