"""Attention of a step's rows over paged keys and values, by Triton kernels on a GPU.

    T tokens of the step    S slots of all rows' contexts    H heads    K key/value heads
    G = H / K heads per group    D head size    N pieces    M tokens of rows in parts

A tile is some tokens of one row with all the heads of one group, so that a key is read once for
them; a row that decodes is one tile. Its context is a list of slots, wherever these lie: an
adapter's prefix ends in the middle of a page, which a table of blocks cannot tell. Where tiles are
few, in rows of few tokens, the context is read in parts side by side, whose sums are then added in
their order. Into how many follows from the row alone: what it gets depends on no other.
"""

# Of a kernel's arguments Triton makes values of its own, which have no types here.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch.nn.functional import scaled_dot_product_attention

from cluster.native import are_right

# A matrix unit takes no fewer than 16 rows, or numbers of a head. More rows of a tile share each
# key that is read, as far as the shared memory of the smaller GPUs goes.
_LEAST = 16
# Slots of a part, of a row that decodes and of one of few tokens; of a long context they are more.
_DECODE_PART, _PART, _MOST_PARTS = 512, 2048, 32
_FEW_TOKENS = 128
_EVERYTHING = 2**31 - 1  # a window
_LOG2_E = 1.4426950408889634
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_jit: Any = triton.jit


@dataclass(frozen=True)
class _Pieces:
    """What one launch of the kernel does, a program for each piece and group, and what is added
    behind it.

    Args:
        pieces_N8: int64: the tile's first token, its tokens, the first one's position, where the
            row's slots begin, those to look at (from, to), the place of the first token's sums or
            -1 if there is one part, the parts of each token.
        tokens_M3: int64: a token, the place of its sums, their number.
        num_sums: Over all.
    """

    pieces_N8: torch.Tensor
    tokens_M3: torch.Tensor
    num_sums: int


@dataclass
class GpuRows:
    """Rows of a step, by their tokens `start` to `end` (excluded) and the length of each one's
    context, whose slots are `slots_S`, int32: made once for all layers."""

    spans: Sequence[tuple[int, int]]
    lengths: Sequence[int]
    slots_S: torch.Tensor
    _pieces: dict[tuple[bool, int, int], _Pieces] = field(
        default_factory=dict[tuple[bool, int, int], _Pieces]
    )

    def attend(
        self,
        query_THD: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """What each token sees in its row's slots up to its own, or of the last `window`, [T, H,
        D].

        Args:
            keys, values: [slots, K, D], contiguous, of the query's dtype.
        """
        heads, size = query_THD.shape[1:]
        group = heads // keys.shape[1]
        scale = _LOG2_E * (size**-0.5 if scaling is None else scaling)
        window = _EVERYTHING if window is None else window
        output_THD = query_THD.new_empty(query_THD.shape)
        for decodes in (True, False):
            shape = tile_shape(group, size, keys.itemsize, decodes)
            work = self._work(decodes, shape["tile_tokens"], window)
            if not len(work.pieces_N8):
                continue
            sums = query_THD.new_empty((work.num_sums, heads, size), dtype=torch.float32)
            ends = query_THD.new_empty((work.num_sums, heads, 2), dtype=torch.float32)
            _attend[(len(work.pieces_N8), keys.shape[1])](
                *(output_THD, sums, ends, query_THD, keys, values, self.slots_S, work.pieces_N8),
                *(*query_THD.stride(), scale, window, heads, group, size),
                **shape,
            )
            if work.num_sums:
                _add_parts[(len(work.tokens_M3), heads)](
                    *(output_THD, sums, ends, work.tokens_M3),
                    *(heads, size, shape["width"], _MOST_PARTS),
                )
        return output_THD

    def _work(self, decodes: bool, tile_tokens: int, window: int) -> _Pieces:
        """Of the rows that decode or of the others."""
        asked = (decodes, tile_tokens, window)
        if asked not in self._pieces:
            pieces: list[tuple[int, ...]] = []
            tokens: list[tuple[int, int, int]] = []
            num_sums, slots_begin = 0, 0
            for (start, end), length in zip(self.spans, self.lengths, strict=True):
                if (end - start == 1) is decodes:
                    parts = _parts(end - start, length, window)
                    places = range(num_sums, num_sums + (end - start) * len(parts), len(parts))
                    for first in range(start, end, tile_tokens):
                        count, position = min(tile_tokens, end - first), length - end + first
                        least, most = max(0, position - window + 1), position + count
                        pieces += (
                            (first, count, position, slots_begin, max(low, least), min(high, most),
                             places[first - start] + number if len(parts) > 1 else -1, len(parts))
                            for number, (low, high) in enumerate(parts)
                        )  # fmt: skip
                    if len(parts) > 1:
                        tokens += zip(
                            range(start, end), places, [len(parts)] * len(places), strict=True
                        )
                        num_sums = places.stop
                slots_begin += length
            pieces_N8, tokens_M3 = (
                torch.tensor(rows, dtype=torch.int64)
                .reshape(-1, width)
                .to(self.slots_S.device, non_blocking=True)
                for rows, width in ((pieces, 8), (tokens, 3))
            )
            self._pieces[asked] = _Pieces(pieces_N8, tokens_M3, num_sums)
        return self._pieces[asked]


def _parts(count: int, length: int, window: int) -> list[tuple[int, int]]:
    """(from, to) of the parts in which a row's last `count` tokens see their context."""
    low = max(0, length - count - window + 1)
    step = length - low
    if count <= _FEW_TOKENS:
        least = _DECODE_PART if count == 1 else _PART
        step = least * -(-step // (least * _MOST_PARTS))
    return [(start, start + step) for start in range(low, length, step)]


def gpu_rows(
    spans: Sequence[tuple[int, int]], slots: Sequence[np.ndarray], device: torch.device
) -> GpuRows:
    """Rows of tokens `start` to `end` (excluded) and the slots of their contexts, on the device."""
    together = torch.from_numpy(np.concatenate(slots).astype(np.int32))
    return GpuRows(spans, [len(own) for own in slots], together.to(device, non_blocking=True))


def tile_shape(group: int, size: int, itemsize: int, decodes: bool) -> dict[str, int]:
    """How tiles are cut, for so many heads of this size in a group, as the kernel's constants."""
    width = max(_LEAST, _power_of_2(size))
    more = 1 if decodes else min(4, max(1, 1024 // (width * itemsize)))
    rows = max(_LEAST * more, _power_of_2(group))
    return {
        "width": width,
        "tile_rows": rows,
        "tile_tokens": 1 if decodes else rows // group,
        "block": 64 if width * itemsize <= 256 else 32,
    }


def _power_of_2(number: int) -> int:
    """The least that is no smaller."""
    return 1 << (number - 1).bit_length()


@functools.cache
def ready(dtype: torch.dtype, device: torch.device, heads: int, kv_heads: int, size: int) -> bool:
    """Whether the kernels run there, and as they should, with heads of this form: on contexts that
    are read in blocks, tiles and parts. They are compiled when first asked, which takes seconds."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False  # Triton uses no matrix unit there
    own = (dtype, device, heads, kv_heads, size)
    return are_right(
        "attention", device, lambda: max(_away(*own, w) for w in (None, 70)), _TOLERANCE[dtype]
    )


def _away(
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
) -> float:
    """How far a step's attention is from torch's."""
    random = torch.Generator(device).manual_seed(0)
    counts, lengths = (1, 70, 1), (1300, 200, 3)
    ends, first = np.cumsum(counts), np.cumsum(lengths) - lengths
    query, keys, values = (
        torch.randn(tokens, count, size, generator=random, device=device).to(dtype)
        for tokens, count in ((sum(counts), heads), *[(sum(lengths), kv_heads)] * 2)
    )
    slots = [np.arange(at, at + n)[::-1].copy() for at, n in zip(first, lengths, strict=True)]
    spans = [(int(e) - c, int(e)) for e, c in zip(ends, counts, strict=True)]
    found = gpu_rows(spans, slots, device).attend(query, keys, values, None, window)
    away = 0.0
    for (start, end), own in zip(spans, slots, strict=True):
        slot_S = torch.arange(len(own), device=device)
        row_t = slot_S[len(own) - (end - start) :, None]
        seen = (slot_S <= row_t) & (slot_S > row_t - (window or len(own)))
        at = torch.from_numpy(own).to(device)
        expected = scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None].float(),
            *(memory[at].transpose(0, 1)[None].float() for memory in (keys, values)),
            attn_mask=seen,
            enable_gqa=heads != kv_heads,
        )[0].transpose(0, 1)
        away = max(away, float((found[start:end].float() - expected).abs().max()))
    return away


@_jit
def _attend(
    output,
    sums,
    ends,
    query,
    keys,
    values,
    slots,
    pieces,
    token_stride,
    head_stride,
    size_stride,
    scale,
    window,
    heads: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
    block: tl.constexpr,
):
    """One piece for one group of heads: its output, or the sum of weighted values of a part, the
    largest score and the sum of weights."""
    piece, kv_head = pieces + 8 * tl.program_id(0), tl.program_id(1)
    first, count = tl.load(piece), tl.load(piece + 1).to(tl.int32)
    position = tl.load(piece + 2).to(tl.int32)
    slots += tl.load(piece + 3)
    low, high = tl.load(piece + 4).to(tl.int32), tl.load(piece + 5).to(tl.int32)
    place, parts = tl.load(piece + 6), tl.load(piece + 7)

    row = tl.arange(0, tile_rows)
    token, head = row // group, kv_head * group + row % group
    is_own = (row < tile_tokens * group) & (token < count)
    position += token
    at = tl.arange(0, width)
    own = is_own[:, None] & (at < size)[None, :]
    query += (first + token)[:, None] * token_stride + head[:, None] * head_stride
    q = tl.load(query + at[None, :] * size_stride, own, 0.0)

    most = tl.full((tile_rows,), float("-inf"), tl.float32)
    weight = tl.zeros((tile_rows,), tl.float32)
    sum = tl.zeros((tile_rows, width), tl.float32)
    for start in range(low, high, block):
        s = start + tl.arange(0, block)
        slot = tl.load(slots + s, s < high, 0).to(tl.int64)
        offset = (slot * (heads // group) + kv_head) * size
        there = (s < high)[:, None] & (at < size)[None, :]
        k = tl.load(keys + offset[:, None] + at[None, :], there, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        age = position[:, None] - s[None, :]
        scores = tl.where((age >= 0) & (age < window) & (s < high)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        # A token of a tile may see nothing of a block that another one sees.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - finite[:, None])
        old = tl.exp2(most - finite)
        weight = weight * old + tl.sum(weights, 1)
        v = tl.load(values + offset[:, None] + at[None, :], there, 0.0)
        sum = sum * old[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = higher

    if place >= 0:
        entry = (place + token * parts) * heads + head
        tl.store(sums + entry[:, None] * size + at[None, :], sum, own)
        tl.store(ends + 2 * entry, most, is_own)
        tl.store(ends + 2 * entry + 1, weight, is_own)
    else:
        target = output + ((first + token)[:, None] * heads + head[:, None]) * size
        tl.store(target + at[None, :], sum / tl.where(is_own, weight, 1.0)[:, None], own)


@_jit
def _add_parts(
    output,
    sums,
    ends,
    tokens,
    heads: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
    most_parts: tl.constexpr,
):
    """One head of a token from its parts; one that it sees nothing of adds exact zeros."""
    entry, head = tokens + 3 * tl.program_id(0), tl.program_id(1)
    token, place, parts = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    number, at = tl.arange(0, most_parts), tl.arange(0, width)
    place = (place + number) * heads + head
    most = tl.load(ends + 2 * place, number < parts, float("-inf"))
    share = tl.exp2(most - tl.max(most, 0))
    weight = tl.sum(share * tl.load(ends + 2 * place + 1, number < parts, 0.0), 0)
    there = (number < parts)[:, None] & (at < size)[None, :]
    sum = tl.load(sums + place[:, None] * size + at[None, :], there, 0.0)
    result = tl.sum(share[:, None] * sum, 0) / weight
    tl.store(output + (token * heads + head) * size + at, result, at < size)
