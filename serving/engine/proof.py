"""The proof at start: a base's own logits against those of a pass, mixed, paged and in chunks.

A base that keeps other state between tokens than keys and values, or that makes a row depend on
what runs beside it, gives other logits here, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from cluster.errors import BaseModelError
from serving.adapters import DeltaHooks, Target
from serving.engine.batch import Batch, Computed, Row, Source
from serving.engine.geometry import running_base
from serving.engine.kv_memory import KVMemory, make_memory

# Largest difference of logits, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# The middle step's 3 rows of up to 4 tokens are 12, which nothing else of it is.
_LENGTHS = (12, 11, 10)


class ForwardPass(Protocol):
    """A way through a step."""

    rows_dim: int | None

    def num_rows(self, step: Batch) -> int:
        """What the base's modules count of a step."""
        ...

    def run(
        self, step: Batch, memory: KVMemory, embeddings_PH: torch.Tensor | None = None
    ) -> Computed:
        """Logits of the wanted rows and states of the pooled ones."""
        ...

    def encode(self, sources: Sequence[Source], memory: KVMemory) -> None:
        """Put sources into their slots."""
        ...


@dataclass(frozen=True)
class Sample:
    """Random tokens, and for an encoder-decoder others that its encoder reads, else none."""

    ids: np.ndarray
    source: np.ndarray


def samples(target: Target, vocabulary: int, context_tokens: int) -> list[Sample]:
    """The same at each start; of different lengths where the context allows it."""
    generator = np.random.default_rng(0)
    lengths = [min(length, context_tokens) for length in _LENGTHS]
    sources = [*lengths[1:], lengths[0]] if target.is_seq2seq else [0] * len(lengths)
    return [
        Sample(generator.integers(vocabulary, size=own), generator.integers(vocabulary, size=other))
        for own, other in zip(lengths, sources, strict=True)
    ]


@torch.inference_mode()
def own_logits(model: Any, sequences: Sequence[Sample], device: torch.device) -> torch.Tensor:
    """Each sample's last logits by the model as it is, float32 [samples, V]."""
    found: list[torch.Tensor] = []
    for sample in sequences:
        ids, source = (torch.from_numpy(a)[None].to(device) for a in (sample.ids, sample.source))
        inputs = {"input_ids": ids}
        if len(sample.source):
            inputs = {"input_ids": source, "decoder_input_ids": ids}
        found.append(model(**inputs, use_cache=False).logits[0, -1:].float())
    return torch.cat(found)


def prove(
    forward: ForwardPass,
    hooks: DeltaHooks,
    target: Target,
    sequences: Sequence[Sample],
    expected: torch.Tensor,
) -> None:
    """Run `sequences` through `forward` in three steps, on memory of its own; the hooks learn where
    modules have their rows.

    Raises:
        BaseModelError: the last logits are not `expected`, or there are none.
    """
    with running_base():
        found = _last_logits(forward, hooks, target, sequences)
    scale = max(1e-6, float(expected.abs().max()))
    difference = float((found - expected).abs().max()) / scale
    if not difference < _TOLERANCE[target.dtype]:
        raise BaseModelError(f"its logits differ by {difference:.1e} of their size")


def _last_logits(
    forward: ForwardPass, hooks: DeltaHooks, target: Target, sequences: Sequence[Sample]
) -> torch.Tensor:
    """The logits behind each sample, all samples in each step."""
    hooks.forget()
    lengths = [len(sample.source) + len(sample.ids) for sample in sequences]
    memory = make_memory(target, sum(lengths))
    # Slots in no order, as pages come.
    slots = np.random.default_rng(0).permutation(sum(lengths))
    own = np.split(slots, np.cumsum(lengths)[:-1])
    if target.is_seq2seq:
        with hooks.learning(len(sequences), forward.rows_dim):
            parts = zip(sequences, own, strict=True)
            forward.encode([Source(s.source, at[: len(s.source)], {}) for s, at in parts], memory)
    counts = [len(sample.ids) for sample in sequences]
    cuts = [(0, (count - 1) * 2 // 3, count - 1, count) for count in counts]
    logits = torch.empty(0)
    for part in range(3):
        bounds = [(cut[part], cut[part + 1]) for cut in cuts]
        if bounds[0][0] == bounds[0][1]:
            continue  # a context of a few tokens
        step = _step(sequences, own, bounds)
        # The middle step has rows of different lengths, and is never empty.
        # What an encoder-decoder has end to end may be of either stack.
        is_padded = forward.rows_dim is not None and not target.is_seq2seq
        width = max(end - start for start, end in bounds) if is_padded else None
        learning = hooks.learning(forward.num_rows(step), forward.rows_dim, width)
        with learning if part == 1 else nullcontext():
            logits = forward.run(step, memory).logits_NV
    return logits


def _step(
    sequences: Sequence[Sample],
    slots: Sequence[np.ndarray],
    bounds: Sequence[tuple[int, int]],
) -> Batch:
    """Tokens `bounds` of each sample as one step, logits behind each one's last."""
    ends = np.cumsum([end - start for start, end in bounds])
    rows: list[Row] = []
    for sample, last, own, (start, end) in zip(sequences, ends, slots, bounds, strict=True):
        before = len(sample.source)
        context = own[: before + end]
        rows.append(Row(int(last) - (end - start), int(last), context, source_tokens=before))
    return Batch(
        ids=np.concatenate([s.ids[a:b] for s, (a, b) in zip(sequences, bounds, strict=True)]),
        positions=np.concatenate([np.arange(a, b) for a, b in bounds]),
        write_slots=np.concatenate([row.slots[row.start - row.end :] for row in rows]),
        rows=rows,
        wanted=ends - 1,
    )
