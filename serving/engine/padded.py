"""A step as padded batches through transformers' own Cache, for bases that take no attention
function of ours.

    B rows of one forward pass    L new tokens of the longest    S context of the longest
    N rows with logits    V vocabulary    P prefix tokens

The base builds masks, alibi, rotary and relative positions itself. Rows are padded on the left, so
that the newest token of each stands in the last column: what a family counts by columns (alibi,
relative positions) then agrees for all of them, and the mask hides the rest. Keys and values lie in
the same paged slots as everywhere: the cache that the base sees writes a layer's new ones to their
slots and gives back the rows' whole context.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import Cache

from serving.adapters import Delta, DeltaHooks, Segment
from serving.engine.batch import Batch, Row
from serving.engine.kv_memory import KVMemory
from serving.engine.logit_rows import LogitRows
from serving.engine.paged_cache import PagedLayer


@dataclass(frozen=True)
class _Group:
    """Some of a step's rows as one padded batch; indices count the group's own rows."""

    rows: Sequence[Row]
    width: int  # L
    body: Sequence[Segment]
    head: Sequence[Segment]
    wanted_N: np.ndarray  # of the group's B x L tokens
    places_N: np.ndarray  # where their logits stand in the step


class PaddedPass:
    """One base model's way through a step. Used by one thread."""

    # Modules show a step's rows as a batch has them.
    rows_dim: int | None = 0

    def __init__(self, model: Any, hooks: DeltaHooks, logit_rows: LogitRows) -> None:
        self._model, self._hooks, self._logit_rows = model, hooks, logit_rows
        self._device: torch.device = model.get_input_embeddings().weight.device
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        pad: int | None = model.config.get_text_config().pad_token_id
        self._pad = 0 if pad is None else pad

    def num_rows(self, step: Batch) -> int:
        """What modules count."""
        return len(step.rows)

    @torch.inference_mode()
    def run(
        self, step: Batch, memory: KVMemory, embeddings_PH: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the wanted rows, float32 [N, V]; new keys and values are in their slots.

        Args:
            embeddings_PH: In place of the tokens' own; the step has one row.
        """
        groups = list(_groups(step))
        found_NV = torch.cat([self._run(group, step, memory, embeddings_PH) for group in groups])
        logits_NV = torch.empty_like(found_NV)
        logits_NV[torch.from_numpy(np.concatenate([g.places_N for g in groups]))] = found_NV
        return logits_NV

    def _run(
        self, group: _Group, step: Batch, memory: KVMemory, embeddings_PH: torch.Tensor | None
    ) -> torch.Tensor:
        rows, width = group.rows, group.width
        ids_BL = np.full((len(rows), width), self._pad)
        positions_BL = np.zeros_like(ids_BL)
        for index, row in enumerate(rows):
            own = slice(width - (row.end - row.start), None)
            ids_BL[index, own] = step.ids[row.start : row.end]
            positions_BL[index, own] = step.positions[row.start : row.end]
        slots_BS, mask_BS = _padded([row.slots for row in rows])
        lengths = np.array([row.end - row.start for row in rows])
        is_new_BL = self._tensor(np.arange(width) >= width - lengths[:, None])
        writes = np.concatenate([step.write_slots[row.start : row.end] for row in rows])
        layers: list[Any] = [
            PagedLayer(keys, values, is_new_BL, self._tensor(writes), self._tensor(slots_BS))
            for keys, values in zip(memory.keys, memory.values, strict=True)
        ]
        inputs: dict[str, Any] = {
            "input_ids": self._tensor(ids_BL),
            "attention_mask": self._tensor(mask_BS),
            "past_key_values": Cache(layers=layers),
        }
        if embeddings_PH is not None:
            del inputs["input_ids"]
            inputs["inputs_embeds"] = embeddings_PH[None]
        if self._takes_positions:
            inputs["position_ids"] = self._tensor(positions_BL)
        with (
            self._hooks.active(group.body, group.head),
            self._logit_rows.wanted(self._tensor(group.wanted_N)),
        ):
            return self._model(**inputs, use_cache=True).logits[0].float()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _groups(step: Batch) -> Generator[_Group]:
    """The step's rows in batches of nearly the same length, so that less than half of a batch is
    padding; rows of one token are one of them. Their order, by adapter, stays."""
    buckets = [_bucket(row.end - row.start) for row in step.rows]
    for bucket in sorted(set(buckets)):
        rows = [row for row, own in zip(step.rows, buckets, strict=True) if own == bucket]
        width = max(row.end - row.start for row in rows)
        places: list[int] = []
        wanted: list[int] = []
        owners: list[Mapping[str, Delta]] = []
        for index, row in enumerate(rows):
            first, last = np.searchsorted(step.wanted, (row.start, row.end)).tolist()
            places += range(first, last)
            # The row's last token stands in the last column.
            wanted += ((index + 1) * width - row.end + step.wanted[first:last]).tolist()
            owners += [row.deltas] * (last - first)
        yield _Group(
            rows,
            width,
            _segments([row.deltas for row in rows]),
            _segments(owners),
            np.array(wanted, dtype=np.int64),
            np.array(places, dtype=np.int64),
        )


def _bucket(tokens: int) -> int:
    """1, 2, 3 to 4, 5 to 8 tokens, and so on."""
    return (tokens - 1).bit_length()


def _segments(owners: Sequence[Mapping[str, Delta]]) -> list[Segment]:
    """The contiguous rows of each adapter that has deltas."""
    found: list[Segment] = []
    for _, group in groupby(enumerate(owners), key=lambda pair: id(pair[1])):
        places = list(group)
        if places[0][1]:
            found.append(Segment(places[0][0], places[-1][0] + 1, places[0][1]))
    return found


def _padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Slots of rows side by side, and a mask of which are theirs. What is masked is a slot of
    their own, since 0 x NaN of another's is NaN."""
    width = max(len(row) for row in rows)
    slots = np.repeat([row[:1] for row in rows], width, axis=1)
    mask = np.zeros_like(slots)
    for index, row in enumerate(rows):
        own = slice(width - len(row), None)
        slots[index, own] = row
        mask[index, own] = 1
    return slots, mask
