"""Logits to tokens, all rows of a step at once.

    N rows    V vocabulary    K candidates    M bits of a token mask, 32 in each int32

A row's random number is a function of (seed, position) alone: the same request gives the same
tokens whatever runs beside it, after a preemption, and on another replica. Steps that no row of
the batch asks for are left out, and what one row asks for changes no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from serving.engine.request import GenerationRequest, TokenLogprobs

# So many of the most probable tokens are looked at first; top_p and top_k rarely need more. Where
# they do, so many times more: the first 256 of 32,000 take about 1/15 of the time of all.
_CANDIDATES, _MORE = 256, 16


@dataclass(frozen=True)
class Sampling:
    """How one row is sampled: a request's options, its seed (never None here), its prompt and
    answer so far (lent, not changed), and the tokens that a grammar allows."""

    request: GenerationRequest
    seed: int
    tokens: Sequence[int]
    prompt_tokens: int
    allowed_M: np.ndarray | None = None


@dataclass(frozen=True)
class Sampled:
    """A row's token, and its log probability if the request asked for it."""

    token: int
    logprobs: TokenLogprobs | None


def sample(logits_NV: torch.Tensor, rows: Sequence[Sampling]) -> list[Sampled | None]:
    """One token for each row of float32 logits; None for a row whose logits are not finite."""
    shaped_NV = _allowed(_biased(_penalized(logits_NV, rows), rows), rows)
    tokens, finite_N = _best(shaped_NV)
    drawn = [i for i, row in enumerate(rows) if row.request.temperature > 0 and finite_N[i]]
    if drawn:
        chosen = _draw(shaped_NV[drawn], [rows[i] for i in drawn])
        for i, token in zip(drawn, chosen, strict=True):
            tokens[i] = token
    told = [i for i, row in enumerate(rows) if row.request.logprobs is not None and finite_N[i]]
    counts = [rows[i].request.logprobs or 0 for i in told]
    entries = logprobs_of(logits_NV[told], [tokens[i] for i in told], counts) if told else []
    by_row = dict(zip(told, entries, strict=True))
    return [
        Sampled(token, by_row.get(i)) if finite_N[i] else None for i, token in enumerate(tokens)
    ]


def logprobs_of(
    logits_NV: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """The log probability of one token for each row, and of so many of the most probable ones."""
    logprobs_NV = logits_NV.log_softmax(-1)
    index_N = torch.tensor(tokens, device=logits_NV.device)
    own = logprobs_NV.gather(-1, index_N[:, None]).squeeze(-1).tolist()
    best_NK, best_index_NK = logprobs_NV.topk(min(max(counts), logits_NV.shape[-1]))
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, values, ids, count in zip(
            tokens, own, best_NK.tolist(), best_index_NK.tolist(), counts, strict=True
        )
    ]


def _best(logits_NV: torch.Tensor) -> tuple[list[int], list[bool]]:
    """Each row's first token of the largest logit, or its first that is no number, and whether that
    logit is finite."""
    if logits_NV.device.type == "cpu":
        # torch looks at one number at a time for where the largest is, NumPy at sixteen.
        token_N = torch.from_numpy(logits_NV.numpy().argmax(-1))
        best_N = logits_NV.gather(-1, token_N[:, None]).squeeze(-1)
    else:
        best_N, token_N = logits_NV.max(-1)
    return token_N.tolist(), torch.isfinite(best_N).tolist()


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one position: the first of a counter-based generator."""
    key = np.array([seed % 2**64, position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _penalized(logits_NV: torch.Tensor, rows: Sequence[Sampling]) -> torch.Tensor:
    """Repetition penalty over prompt and answer (Keskar et al. 2019, arXiv:1909.05858), then
    presence and frequency penalties over the answer."""
    repeated = [i for i, row in enumerate(rows) if row.request.repetition_penalty != 1]
    if repeated:
        logits_NV = logits_NV.clone()
        own_NV = logits_NV[repeated]
        seen_NV = _counts(own_NV, [rows[i].tokens for i in repeated]) > 0
        penalty_N1 = _column([rows[i].request.repetition_penalty for i in repeated], own_NV)
        weakened_NV = torch.where(own_NV > 0, own_NV / penalty_N1, own_NV * penalty_N1)
        logits_NV[repeated] = torch.where(seen_NV, weakened_NV, own_NV)
    counted = [
        i
        for i, row in enumerate(rows)
        if row.request.presence_penalty or row.request.frequency_penalty
    ]
    if counted:
        logits_NV = logits_NV.clone()
        own_NV = logits_NV[counted]
        count_NV = _counts(own_NV, [rows[i].tokens[rows[i].prompt_tokens :] for i in counted])
        presence_N1 = _column([rows[i].request.presence_penalty for i in counted], own_NV)
        frequency_N1 = _column([rows[i].request.frequency_penalty for i in counted], own_NV)
        logits_NV[counted] = own_NV - (count_NV > 0) * presence_N1 - count_NV * frequency_N1
    return logits_NV


def _counts(like_NV: torch.Tensor, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """How often each token occurs in each row's tokens, [N, V]."""
    flat = torch.tensor(list(chain.from_iterable(tokens)), dtype=torch.int64)
    row = torch.arange(len(tokens)).repeat_interleave(torch.tensor([len(t) for t in tokens]))
    ones = torch.ones(len(flat), dtype=like_NV.dtype, device=like_NV.device)
    index = (row.to(like_NV.device), flat.to(like_NV.device))
    return torch.zeros_like(like_NV).index_put_(index, ones, accumulate=True)


def _biased(logits_NV: torch.Tensor, rows: Sequence[Sampling]) -> torch.Tensor:
    places = [
        (i, token, bias)
        for i, row in enumerate(rows)
        for token, bias in row.request.logit_bias.items()
    ]
    if not places:
        return logits_NV
    row, token, bias = zip(*places, strict=True)
    device = logits_NV.device
    index = (torch.tensor(row, device=device), torch.tensor(token, device=device))
    values = torch.tensor(bias, dtype=logits_NV.dtype, device=device)
    return logits_NV.index_put(index, values, accumulate=True)


def _allowed(logits_NV: torch.Tensor, rows: Sequence[Sampling]) -> torch.Tensor:
    """Without the tokens that a row's grammar forbids."""
    masks = {i: row.allowed_M for i, row in enumerate(rows) if row.allowed_M is not None}
    if not masks:
        return logits_NV
    bits_NV = np.unpackbits(
        np.stack(list(masks.values())).view(np.uint8), axis=-1, bitorder="little"
    )[:, : logits_NV.shape[-1]]
    allowed_NV = torch.from_numpy(bits_NV).to(logits_NV.device, torch.bool)
    logits_NV = logits_NV.clone()
    masked = list(masks)
    logits_NV[masked] = logits_NV[masked].masked_fill(~allowed_NV, -torch.inf)
    return logits_NV


def _draw(logits_NV: torch.Tensor, rows: Sequence[Sampling]) -> list[int]:
    """Inverse-CDF sampling, in order of token ids, over the tokens that the cuts leave."""
    # From the best one down, in float64: no temperature above 0 overflows.
    below_NV = logits_NV.double() - logits_NV.amax(-1, keepdim=True).double()
    temperature_N1 = _column([row.request.temperature for row in rows], below_NV)
    probability_NV = (below_NV / temperature_N1).softmax(-1)
    cut = [i for i, row in enumerate(rows) if row.request.top_p < 1 or row.request.top_k]
    if cut:
        requests = [rows[i].request for i in cut]
        probability_NV[cut] = _top(probability_NV[cut], requests, _CANDIDATES)
    floored = [i for i, row in enumerate(rows) if row.request.min_p]
    if floored:
        own_NV = probability_NV[floored]
        share_N1 = _column([rows[i].request.min_p for i in floored], own_NV)
        probability_NV[floored] = own_NV * (own_NV >= share_N1 * own_NV.amax(-1, keepdim=True))
    cumulative_NV = probability_NV.cumsum(-1)
    draws = [uniform(row.seed, len(row.tokens) - row.prompt_tokens) for row in rows]
    point_N1 = _column(draws, cumulative_NV) * cumulative_NV[:, -1:]
    index_N = torch.searchsorted(cumulative_NV, point_N1, right=True).squeeze(-1)
    # Rounding can put the point onto the sum itself, behind the last token that is left.
    last_N = cumulative_NV.argmax(-1)
    return torch.minimum(index_N, last_N).tolist()


def _top(
    probability_NV: torch.Tensor, requests: Sequence[GenerationRequest], candidates: int
) -> torch.Tensor:
    """The probabilities with 0 for what top_k, then top_p of the rest, cut off. Looks at the most
    probable candidates alone, and at all where these do not tell."""
    vocabulary = probability_NV.shape[-1]
    candidates = min(candidates, vocabulary)
    best_NK, order_NK = probability_NV.topk(candidates)
    top_k = [min(request.top_k or vocabulary, vocabulary) for request in requests]
    top_k_N1 = torch.tensor(top_k, device=best_NK.device)[:, None]
    kept_NK = best_NK * (torch.arange(candidates, device=best_NK.device) < top_k_N1)
    # Of a row, top_k leaves what is in sight, or all; what is between is looked at again.
    whole_N1 = torch.where(top_k_N1 <= candidates, kept_NK.sum(-1, keepdim=True), 1.0)
    wanted_N1 = _column([request.top_p for request in requests], best_NK) * whole_N1
    wanted_N1 = wanted_N1.clamp_min(torch.finfo(best_NK.dtype).tiny)
    # A token stays if those before it do not yet reach top_p; the first always does.
    before_NK = kept_NK.cumsum(-1) - kept_NK
    result_NV = torch.zeros_like(probability_NV)
    result_NV.scatter_(-1, order_NK, kept_NK.masked_fill(before_NK >= wanted_N1, 0.0))
    if candidates < vocabulary:
        is_short_N1 = (top_k_N1 < vocabulary) | (kept_NK.sum(-1, keepdim=True) < wanted_N1)
        is_open_N = ((top_k_N1 > candidates) & is_short_N1).squeeze(-1)
        unclear: list[int] = is_open_N.nonzero().squeeze(-1).tolist()
        if unclear:
            again = [requests[i] for i in unclear]
            result_NV[unclear] = _top(probability_NV[unclear], again, candidates * _MORE)
    return result_NV


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """[N, 1], of the dtype and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
