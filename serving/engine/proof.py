"""The proof at start: a base's own logits against those of a pass, mixed, paged and in chunks.

A base that keeps other state between tokens than keys and values, or that makes a row depend on
what runs beside it, gives other logits here, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch

from cluster.errors import BaseModelError
from serving.adapters import DeltaHooks, Target
from serving.engine.batch import Batch, Row
from serving.engine.kv_memory import KVMemory, make_memory

# Largest difference of logits, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_LENGTHS = (13, 11, 10)


class ForwardPass(Protocol):
    """A way through a step."""

    rows_dim: int | None

    def num_rows(self, step: Batch) -> int:
        """What the base's modules count of a step."""
        ...

    def run(
        self, step: Batch, memory: KVMemory, embeddings_PH: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the wanted rows, float32 [N, V]."""
        ...


def sample_sequences(vocabulary: int, context_tokens: int) -> list[torch.Tensor]:
    """Random tokens, the same at each start; of different lengths where the context allows it."""
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, context_tokens) for length in _LENGTHS]
    return [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]


@torch.inference_mode()
def own_logits(model: Any, sequences: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Each sequence's last logits by the model as it is, float32 [sequences, V]."""
    return torch.cat(
        [
            model(input_ids=ids[None].to(device), use_cache=False).logits[0, -1:].float()
            for ids in sequences
        ]
    )


def prove(
    forward: ForwardPass,
    hooks: DeltaHooks,
    target: Target,
    sequences: Sequence[torch.Tensor],
    expected: torch.Tensor,
) -> None:
    """Run `sequences` through `forward` in three steps, on memory of its own; the hooks learn where
    modules have their rows.

    Raises:
        BaseModelError: the last logits are not `expected`, or there are none.
    """
    try:
        found = _last_logits(forward, hooks, target, [s.numpy() for s in sequences])
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        raise BaseModelError((str(error).splitlines() or [type(error).__name__])[0]) from error
    scale = max(1e-6, float(expected.abs().max()))
    difference = float((found - expected).abs().max()) / scale
    if not difference < _TOLERANCE[target.dtype]:
        raise BaseModelError(f"its logits differ by {difference:.1e} of their size")


def _last_logits(
    forward: ForwardPass, hooks: DeltaHooks, target: Target, sequences: Sequence[np.ndarray]
) -> torch.Tensor:
    """The logits behind each sequence, all sequences in each step."""
    longest = max(len(ids) for ids in sequences)
    memory = make_memory(target, longest * len(sequences))
    # Slots in no order, as pages come.
    slots = np.random.default_rng(0).permutation(longest * len(sequences))
    own = [slots[index * longest :][: len(ids)] for index, ids in enumerate(sequences)]
    cuts = [(0, (len(ids) - 1) * 2 // 3, len(ids) - 1, len(ids)) for ids in sequences]
    logits = torch.empty(0)
    for part in range(3):
        bounds = [(cut[part], cut[part + 1]) for cut in cuts]
        if bounds[0][0] == bounds[0][1]:
            continue  # a context of a few tokens
        step = _step(sequences, own, bounds)
        # The middle step has rows of different lengths, and is never empty.
        learning = hooks.learning(forward.num_rows(step), forward.rows_dim)
        with learning if part == 1 else nullcontext():
            logits = forward.run(step, memory)
    return logits


def _step(
    sequences: Sequence[np.ndarray],
    slots: Sequence[np.ndarray],
    bounds: Sequence[tuple[int, int]],
) -> Batch:
    """Tokens `bounds` of each sequence as one step, logits behind each sequence's last."""
    ends = np.cumsum([end - start for start, end in bounds])
    rows = [
        Row(int(last) - (end - start), int(last), own[:end])
        for last, own, (start, end) in zip(ends, slots, bounds, strict=True)
    ]
    return Batch(
        ids=np.concatenate([s[a:b] for s, (a, b) in zip(sequences, bounds, strict=True)]),
        positions=np.concatenate([np.arange(a, b) for a, b in bounds]),
        write_slots=np.concatenate([s[a:b] for s, (a, b) in zip(slots, bounds, strict=True)]),
        rows=rows,
        wanted=ends - 1,
        body=(),
        head=(),
    )
