"""Rows of a padded batch: which are of about one length, and how they lie side by side.

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


def segments(owners: Sequence[Mapping[str, Delta]]) -> list[Segment]:
    """The contiguous rows of each adapter that has deltas, of each row's."""
    found: list[Segment] = []
    for _, group in groupby(enumerate(owners), key=lambda pair: id(pair[1])):
        places = list(group)
        if places[0][1]:
            found.append(Segment(places[0][0], places[-1][0] + 1, places[0][1]))
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
