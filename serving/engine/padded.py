"""A step as padded batches through transformers' own Cache, for bases that take no attention
function of ours.

    B rows of one forward pass    L new tokens of the longest    S context of the longest
    N rows with logits    M pooled rows    P prefix tokens

The base builds masks, alibi, rotary and relative positions itself. Rows are padded on the left, so
that the newest token of each stands in the last column: what a family counts by columns (alibi,
relative positions) then agrees for all of them, and the mask hides the rest. Keys and values lie in
the same paged slots as everywhere: the cache that the base sees writes a layer's new ones to their
slots and gives back the rows' whole context. Of an encoder-decoder these rows are the decoder's.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Cache

from serving.adapters import DeltaHooks, Segment
from serving.engine.batch import Batch, Computed, Row, Source
from serving.engine.columns import bucket, segments, side_by_side
from serving.engine.encoder import Encoder
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
    pooled_M: np.ndarray  # the same of pooled tokens
    places_M: np.ndarray


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
        self._encoder = Encoder(model, hooks) if model.config.is_encoder_decoder else None

    def num_rows(self, step: Batch) -> int:
        """What modules count."""
        return len(step.rows)

    def encode(self, sources: Sequence[Source], memory: KVMemory) -> None:
        """Read what an encoder-decoder's rows are about; see Encoder."""
        assert self._encoder is not None, "a decoder alone has no sources"
        self._encoder.read(sources, memory)

    @torch.inference_mode()
    def run(
        self, step: Batch, memory: KVMemory, embeddings_PH: torch.Tensor | None = None
    ) -> Computed:
        """Logits of the wanted rows and states of the pooled ones; new keys and values are in their
        slots.

        Args:
            embeddings_PH: In place of the tokens' own; the step has one row.
        """
        groups = list(_groups(step))
        found = [self._run(group, step, memory, embeddings_PH) for group in groups]
        return Computed(
            _in_order([part.logits_NV for part in found], [g.places_N for g in groups]),
            _in_order([part.states_MH for part in found], [g.places_M for g in groups]),
        )

    def _run(
        self, group: _Group, step: Batch, memory: KVMemory, embeddings_PH: torch.Tensor | None
    ) -> Computed:
        rows, width = group.rows, group.width
        ids_BL = np.full((len(rows), width), self._pad)
        positions_BL = np.zeros_like(ids_BL)
        for index, row in enumerate(rows):
            own = slice(width - (row.end - row.start), None)
            ids_BL[index, own] = step.ids[row.start : row.end]
            positions_BL[index, own] = step.positions[row.start : row.end]
        slots_BS, mask_BS = side_by_side(
            [row.slots[row.source_tokens :] for row in rows], on_left=True
        )
        lengths = np.array([row.end - row.start for row in rows])
        is_new_BL = self._tensor(np.arange(width) >= width - lengths[:, None])
        writes = np.concatenate([step.write_slots[row.start : row.end] for row in rows])
        write_T, slots = self._tensor(writes), self._tensor(slots_BS)
        layers: list[Any] = [
            PagedLayer(keys, values, is_new_BL, write_T, slots)
            for keys, values in zip(memory.keys, memory.values, strict=True)
        ]
        cache, positions = Cache(layers=layers), self._tensor(positions_BL)
        inputs: dict[str, Any] = {"past_key_values": cache}
        name = "" if self._encoder is None else "decoder_"
        inputs[f"{name}attention_mask"] = self._tensor(mask_BS)
        if embeddings_PH is None:
            inputs[f"{name}input_ids"] = self._tensor(ids_BL)
        else:
            inputs["inputs_embeds"] = embeddings_PH[None]
        if self._takes_positions:
            inputs["position_ids"] = positions
        with ExitStack() as scope:
            scope.enter_context(self._hooks.active(group.body, group.head, len(rows)))
            if self._encoder is not None:
                seen = self._encoder.seen_by(rows, memory, cache, positions)
                inputs |= scope.enter_context(seen)
            return self._logit_rows.run(
                lambda: self._model(**inputs, use_cache=True),
                self._tensor(group.wanted_N),
                self._tensor(group.pooled_M),
            )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _groups(step: Batch) -> Generator[_Group]:
    """The step's rows in batches of nearly the same length, so that less than half of a batch is
    padding; rows of one token are one of them. Their order, by adapter, stays."""
    buckets = [bucket(row.end - row.start) for row in step.rows]
    for kind in sorted(set(buckets)):
        rows = [row for row, own in zip(step.rows, buckets, strict=True) if own == kind]
        width = max(row.end - row.start for row in rows)
        wanted, places, counts = _picked(rows, width, step.wanted)
        pooled, kept, _ = _picked(rows, width, step.pooled)
        deltas = [row.deltas for row in rows]
        owners = [own for own, count in zip(deltas, counts, strict=True) for _ in range(count)]
        yield _Group(rows, width, segments(deltas), segments(owners), wanted, places, pooled, kept)


def _picked(
    rows: Sequence[Row], width: int, picked: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Those of `picked`, sorted tokens of the step, that are in `rows`: their places in the group's
    padded batch, their indices in `picked`, and how many each row has."""
    bounds = [np.searchsorted(picked, (row.start, row.end)) for row in rows]
    # A row's last token stands in the last column.
    own = [
        (index + 1) * width - row.end + picked[first:last]
        for index, (row, (first, last)) in enumerate(zip(rows, bounds, strict=True))
    ]
    places = np.concatenate([np.arange(first, last) for first, last in bounds])
    return np.concatenate(own), places, [len(tokens) for tokens in own]


def _in_order(found: Sequence[torch.Tensor], places: Sequence[np.ndarray]) -> torch.Tensor:
    """The rows that groups found, as the step has them."""
    rows = torch.cat(list(found))
    ordered = torch.empty_like(rows)
    ordered[torch.from_numpy(np.concatenate(places))] = rows
    return ordered
