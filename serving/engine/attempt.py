"""A forward pass over chunks and the tokens behind them; tried again in parts where it fails, so
that an adapter which cannot be computed costs its own requests alone.

Knows answers as far as they sample, pool and read their prompts; who is in a step, and what becomes
of a token, is the engine's.

    N rows of logits    V vocabulary    M pooled positions    H hidden
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from serving.engine.answer import Answer
from serving.engine.forward import Forward
from serving.engine.sampler import Sampled, sample
from serving.engine.sequence import Chunk


class Outcome(NamedTuple):
    """A chunk, the token sampled behind it if its sequence has been read to its end and its logits
    are finite, and why its pass failed, if it did."""

    chunk: Chunk
    sampled: Sampled | None
    error: str | None = None


def computed(forward: Forward, chunks: list[Chunk], answers: Mapping[str, Answer]) -> list[Outcome]:
    """What becomes of each chunk; answers, by their sequences' ids, get what they asked for of
    their prompts. Where a pass fails, its adapters are tried one by one."""
    try:
        done = forward.run(chunks)
        sampled = _sampled(chunks, done.logits_NV, answers)
        # Last: what is tried again after a failure must not be added to a sum twice.
        _pool(chunks, done.states_MH, answers)
    except Exception as error:
        names = sorted({chunk.sequence.adapter for chunk in chunks})
        if len(names) == 1:
            reason = f"the forward pass failed: {type(error).__name__}: {error}"
            return [Outcome(chunk, None, reason) for chunk in chunks]
        groups = [[c for c in chunks if c.sequence.adapter == name] for name in names]
        return [outcome for group in groups for outcome in computed(forward, group, answers)]
    return [Outcome(chunk, sampled.get(chunk.sequence.id)) for chunk in chunks]


def _pool(chunks: Sequence[Chunk], states_MH: torch.Tensor, answers: Mapping[str, Answer]) -> None:
    """Give each embedding its chunk's hidden states."""
    ends = np.cumsum([len(chunk.pooled) for chunk in chunks]).tolist()
    for chunk, end in zip(chunks, ends, strict=True):
        if chunk.pooled:
            own_MH = states_MH[end - len(chunk.pooled) : end]
            answers[chunk.sequence.id].pool(chunk, own_MH)


def _sampled(
    chunks: Sequence[Chunk], logits_NV: torch.Tensor, answers: Mapping[str, Answer]
) -> dict[str, Sampled | None]:
    """What follows each sequence that has been read to its end; prompts' own logits go to the
    answers that asked for them."""
    ends = np.cumsum([len(chunk.wanted) for chunk in chunks]).tolist()
    for chunk, end in zip(chunks, ends, strict=True):
        if chunk.sequence.scored_tokens:
            rows_NV = logits_NV[end - len(chunk.wanted) : end]
            answers[chunk.sequence.id].read_prompt(chunk, rows_NV)
    last = {c.sequence.id: end - 1 for c, end in zip(chunks, ends, strict=True) if c.is_sampled}
    if len(last) < len(logits_NV):
        logits_NV = logits_NV[list(last.values())]
    drawn = sample(logits_NV, [answers[i].sampling for i in last])
    return dict(zip(last, drawn, strict=True))
