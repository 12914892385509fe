"""Logits to tokens, row by row.

    N rows    V vocabulary

A row's random number is a function of (seed, position) alone: the same request gives the same
tokens whatever runs beside it, after a preemption, and on another replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """How one row is sampled; `seed` is never None here. `position` counts generated tokens."""

    temperature: float
    top_p: float
    top_k: int | None
    seed: int
    position: int


def sample(logits_NV: torch.Tensor, rows: Sequence[Sampling]) -> list[int | None]:
    """One token for each row of float32 logits; None for a row whose logits are not finite."""
    best_N, token_N = logits_NV.max(-1)
    finite = torch.isfinite(best_N).tolist()
    tokens: list[int | None] = token_N.tolist()
    drawn = [row for row, sampling in enumerate(rows) if sampling.temperature > 0 and finite[row]]
    if drawn:
        chosen = _draw(logits_NV[drawn], [rows[row] for row in drawn])
        for row, token in zip(drawn, chosen, strict=True):
            tokens[row] = token
    return [token if ok else None for token, ok in zip(tokens, finite, strict=True)]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one position: the first of a counter-based generator."""
    key = np.array([seed % 2**64, position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _draw(logits_NV: torch.Tensor, rows: Sequence[Sampling]) -> list[int]:
    """Inverse-CDF sampling over tokens in order of probability."""
    temperature_N = torch.tensor([row.temperature for row in rows], dtype=torch.float64)
    sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
    # From the best one down, in float64: no temperature above 0 overflows.
    below_NV = sorted_NV.double() - sorted_NV[:, :1].double()
    probability_NV = (below_NV / temperature_N.to(logits_NV.device)[:, None]).softmax(-1)
    vocabulary = logits_NV.shape[-1]
    rank_V = torch.arange(vocabulary, device=logits_NV.device)
    top_k = [min(row.top_k or vocabulary, vocabulary) for row in rows]
    top_k_N = torch.tensor(top_k, device=logits_NV.device)
    probability_NV = probability_NV.masked_fill(rank_V >= top_k_N[:, None], 0.0)
    probability_NV = probability_NV / probability_NV.sum(-1, keepdim=True)
    # A token stays if those before it do not yet reach top_p; the first always does.
    top_p_N = torch.tensor([row.top_p for row in rows], dtype=torch.float64).to(logits_NV.device)
    before_NV = probability_NV.cumsum(-1) - probability_NV
    probability_NV = probability_NV.masked_fill(before_NV >= top_p_N[:, None], 0.0)
    cumulative_NV = probability_NV.cumsum(-1)
    draws = [uniform(row.seed, row.position) for row in rows]
    point_N = torch.tensor(draws, dtype=torch.float64, device=logits_NV.device)
    point_N = point_N * cumulative_NV[:, -1]
    index_N = torch.searchsorted(cumulative_NV, point_N[:, None], right=True).squeeze(-1)
    index_N = index_N.clamp(max=vocabulary - 1)
    return order_NV.gather(-1, index_N[:, None]).squeeze(-1).tolist()
