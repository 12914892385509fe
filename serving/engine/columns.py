"""Rows of a batch: which are of about one length or of one adapter, and how they lie side by side.

B rows    S columns
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from serving.adapters import Delta, Segment


def bucket(tokens: int) -> int:
    """The number of a length's class: 1, 2, 3 to 4, 5 to 8 tokens, and so on, so that less than
    half of a batch is padding."""
    return (tokens - 1).bit_length()


def segments(
    owners: Sequence[Mapping[str, Delta]], spans: Sequence[tuple[int, int]] | None = None
) -> list[Segment]:
    """Where the rows of each adapter that has deltas lie, empty ones left out.

    Args:
        owners: Each row's deltas; rows of one adapter stand together.
        spans: Each row's first element and the one behind its last; if None, it is one element.
    """
    spans = spans or [(place, place + 1) for place in range(len(owners))]
    found: list[Segment] = []
    for _, group in groupby(zip(owners, spans, strict=True), key=lambda row: id(row[0])):
        rows = list(group)
        (deltas, (start, _)), (_, end) = rows[0], rows[-1][1]
        if deltas and end > start:
            found.append(Segment(start, end, deltas))
    return found


def side_by_side(rows: Sequence[np.ndarray], *, on_left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on one side, int64 [B, S], and which places are theirs, 0 or 1. What is masked is
    a row's own first element: of slots, another's may hold NaN, and 0 x NaN is NaN."""
    width = max(len(row) for row in rows)
    padded = np.repeat([row[:1] for row in rows], width, axis=1)
    mask = np.zeros_like(padded)
    for index, row in enumerate(rows):
        own = slice(width - len(row), None) if on_left else slice(len(row))
        padded[index, own] = row
        mask[index, own] = 1
    return padded, mask
