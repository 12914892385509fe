"""One step's chunks as flat arrays: tokens, positions, slots, and what each row's adapter changes.

A slot is one token's place in the KV memory: page * page_tokens + offset. Positions count from
the adapter's prefix on. NumPy arrays; the passes (flat, padded) make tensors of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from serving.adapters import Delta, LoweredAdapter
from serving.engine.sequence import Chunk
from serving.engine.sequence import Sequence as Scheduled


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that the engine holds. `name` is its own; adapters of one `identity` give the
    same keys and values; its requests lack `taken_tokens` of the base's context."""

    name: str
    lowered: LoweredAdapter
    identity: str
    taken_tokens: int


@dataclass(frozen=True)
class Row:
    """One chunk of the step: tokens `start` to `end`, the slots of its whole context, and what
    its adapter changes. The first `source_tokens` slots are what a decoder has of its encoder."""

    start: int
    end: int
    slots: np.ndarray
    deltas: Mapping[str, Delta] = field(default_factory=dict[str, Delta])
    source_tokens: int = 0


@dataclass(frozen=True)
class Source:
    """What an encoder reads: token ids, behind the adapter's vectors if it has some, and the slots
    of all of these."""

    ids: np.ndarray
    slots: np.ndarray
    deltas: Mapping[str, Delta]
    embeddings_PH: torch.Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """A step. All arrays int64: [T] tokens, positions, write slots; [N] rows to make logits of, [M]
    rows to keep the last hidden states of."""

    ids: np.ndarray
    positions: np.ndarray
    write_slots: np.ndarray
    rows: Sequence[Row]
    wanted: np.ndarray
    pooled: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class Computed:
    """What a step gives: logits, float32 [N, V], and what the output embedding reads of the pooled
    rows, in the base's dtype [M, hidden]."""

    logits_NV: torch.Tensor
    states_MH: torch.Tensor


def build(
    chunks: Sequence[Chunk], adapters: Mapping[str, LoadedAdapter], page_tokens: int
) -> Batch:
    """The batch of `chunks`, which are sorted by adapter; `adapters` by the name that a sequence
    carries."""
    ids: list[int] = []
    positions: list[np.ndarray] = []
    writes: list[np.ndarray] = []
    rows: list[Row] = []
    wanted: list[int] = []
    pooled: list[int] = []
    nothing: Mapping[str, Delta] = {}
    for chunk in chunks:
        sequence, begin = chunk.sequence, len(ids)
        slots = context_slots(sequence, page_tokens)
        first = sequence.prefix_tokens + chunk.start
        last = first + chunk.count
        ids += sequence.tokens[chunk.start : chunk.start + chunk.count]
        positions.append(np.arange(first, last) - sequence.source_tokens)
        writes.append(slots[first:last])
        name = sequence.adapter
        deltas = adapters[name].lowered.deltas if name else nothing
        rows.append(Row(begin, len(ids), slots[:last], deltas, sequence.source_tokens))
        wanted += (begin + offset for offset in chunk.wanted)
        pooled += (begin + offset for offset in chunk.pooled)
    return Batch(
        ids=np.array(ids, dtype=np.int64),
        positions=np.concatenate(positions),
        write_slots=np.concatenate(writes),
        rows=rows,
        wanted=np.array(wanted, dtype=np.int64),
        pooled=np.array(pooled, dtype=np.int64),
    )


def context_slots(sequence: Scheduled, page_tokens: int) -> np.ndarray:
    """The slots of a sequence's positions in order: its prefix's, then its own, which begin in a
    page of their own."""
    slots = page_slots(sequence.pages, page_tokens)
    unused = sequence.prefix_pages(page_tokens) * page_tokens
    return np.concatenate([slots[: sequence.prefix_tokens], slots[unused:]]) if unused else slots


def page_slots(pages: Sequence[int], page_tokens: int) -> np.ndarray:
    """The slots of `pages` in order, int64 [pages * page_tokens]."""
    first = np.array(pages, dtype=np.int64) * page_tokens
    return (first[:, None] + np.arange(page_tokens)).ravel()
