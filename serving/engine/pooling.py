"""One vector of a prompt: its last hidden states, pooled as the steps that read it come.

    M pooled rows    H hidden

The states are what the output embedding reads, after the last norm, of the prompt's own tokens (an
adapter's virtual tokens are seen by them and are not among them).
"""

from __future__ import annotations

import numpy as np
import torch


class Pooled:
    """The states of one prompt, by a sum: of its last token, or of all, whose mean has the same
    direction.

    Args:
        dimensions: How many of the vector's numbers are kept; None for all.
    """

    def __init__(self, dimensions: int | None) -> None:
        self._dimensions = dimensions
        self._sum_H: torch.Tensor | None = None

    def add(self, states_MH: torch.Tensor, *, is_first: bool) -> None:
        """Take a chunk's states; with `is_first` from the start, as after a preemption."""
        sum_H = states_MH.sum(0, dtype=torch.float32)
        self._sum_H = sum_H if is_first or self._sum_H is None else self._sum_H + sum_H

    def vector(self) -> np.ndarray | None:
        """Of Euclidean length 1, float32 on CPU; None if the states are not finite."""
        assert self._sum_H is not None, "the prompt was read"
        # Float64: the squares of large activations overflow float32.
        vector_H = self._sum_H[: self._dimensions].cpu().numpy().astype(np.float64)
        length = float(np.linalg.norm(vector_H))
        if not np.isfinite(length) or length == 0:
            return None
        return (vector_H / length).astype(np.float32)
