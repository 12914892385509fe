"""An encoder-decoder's sources: each read once, and what its decoder has of it put into slots.

    B sources    C tokens of the longest    H hidden    P vectors in front

Each layer's cross-attention keys and values lie in the KV memory, in the first of a sequence's
slots, as an adapter's prefix does elsewhere: so they are counted, shared by whoever has the same
source under the same tenant and adapter, freed with the last of them, and made again after a
preemption.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from serving.adapters import DeltaHooks
from serving.engine.batch import Row, Source
from serving.engine.columns import bucket, segments, side_by_side
from serving.engine.kv_memory import KVMemory
from serving.engine.paged_cache import ContextLayer, SourceLayer


class Encoder:
    """The encoder of one base, and its decoder's view of it. Used by one thread."""

    def __init__(self, model: Any, hooks: DeltaHooks) -> None:
        self._model, self._hooks = model, hooks
        self._device: torch.device = model.get_input_embeddings().weight.device
        pad: int | None = model.config.pad_token_id
        self._pad = 0 if pad is None else pad
        self._positions_BL: torch.Tensor | None = None
        self._count_by_row(model.get_decoder())

    @torch.inference_mode()
    def read(self, sources: Sequence[Source], memory: KVMemory) -> None:
        """Put what the decoder attends to of each source, which are sorted by adapter, into its
        slots."""
        kinds = [(bucket(len(s.slots)), s.embeddings_PH is not None) for s in sources]
        for kind in sorted(set(kinds)):
            self._read([s for s, own in zip(sources, kinds, strict=True) if own == kind], memory)

    def _read(self, sources: Sequence[Source], memory: KVMemory) -> None:
        slots_BC, mask_BC = side_by_side([source.slots for source in sources], on_left=False)
        mask = self._tensor(mask_BC)
        inputs = self._inputs(sources, slots_BC.shape[1])
        write = self._tensor(np.concatenate([source.slots for source in sources]))
        layers: list[Any] = [
            SourceLayer(keys, values, mask.bool(), write)
            for keys, values in zip(memory.keys, memory.values, strict=True)
        ]
        start: int = self._model.config.decoder_start_token_id
        start_B1 = torch.full((len(sources), 1), start, device=self._device)
        body = segments([source.deltas for source in sources])
        with self._hooks.active(body, (), len(sources)):
            states_BCH = self._model.get_encoder()(**inputs, attention_mask=mask)[0]
            # One decoder token, whose own output nobody wants, has the base's modules make each
            # layer's keys and values of the source.
            self._model.get_decoder()(
                input_ids=start_B1,
                encoder_hidden_states=states_BCH,
                encoder_attention_mask=mask,
                past_key_values=EncoderDecoderCache(DynamicCache(), Cache(layers=layers)),
                use_cache=True,
            )

    def _inputs(self, sources: Sequence[Source], width: int) -> dict[str, torch.Tensor]:
        """Token ids [B, C], or their embeddings behind the vectors in front of them."""
        ids_BC = np.full((len(sources), width), self._pad)
        for index, source in enumerate(sources):
            first = len(source.slots) - len(source.ids)
            ids_BC[index, first : len(source.slots)] = source.ids
        ids = self._tensor(ids_BC)
        if sources[0].embeddings_PH is None:
            return {"input_ids": ids}
        embeddings_BCH: torch.Tensor = self._model.get_input_embeddings()(ids)
        for index, source in enumerate(sources):
            assert source.embeddings_PH is not None, "all of a kind have them"
            embeddings_BCH[index, : len(source.embeddings_PH)] = source.embeddings_PH
        return {"inputs_embeds": embeddings_BCH}

    @contextmanager
    def seen_by(
        self, rows: Sequence[Row], memory: KVMemory, own: Cache, positions_BL: torch.Tensor
    ) -> Generator[dict[str, Any]]:
        """The scope of one pass of the decoder over rows at these positions, and what it takes
        besides tokens; `own` is its self-attention's cache."""
        sources = [row.slots[: row.source_tokens] for row in rows]
        slots_BC, mask_BC = side_by_side(sources, on_left=False)
        slots = self._tensor(slots_BC)
        layers: list[Any] = [
            ContextLayer(keys, values, slots)
            for keys, values in zip(memory.keys, memory.values, strict=True)
        ]
        # Its shape alone is read, since each layer's keys and values are there.
        states = torch.zeros(1, dtype=memory.keys[0].dtype, device=self._device)
        hidden: Any = states.expand(*slots_BC.shape, self._model.config.hidden_size)
        self._positions_BL = positions_BL
        try:
            yield {
                "encoder_outputs": BaseModelOutput(last_hidden_state=hidden),
                "attention_mask": self._tensor(mask_BC),
                "past_key_values": EncoderDecoderCache(own, Cache(layers=layers)),
            }
        finally:
            self._positions_BL = None

    def _count_by_row(self, decoder: torch.nn.Module) -> None:
        """A decoder that counts positions by columns (BART's) gets those of its rows, where its
        embedding of positions takes them; the proof finds one for which this is not enough."""

        def place(_: torch.nn.Module, args: Any, options: dict[str, Any]) -> Any:
            if self._positions_BL is None:
                return None
            return args, {**options, "position_ids": self._positions_BL}

        def flatten(_: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
            return output[0] if output.ndim == 4 else None  # it takes one row's, as [1, L]

        for child in decoder.children():
            takes = inspect.signature(child.forward).parameters
            if isinstance(child, torch.nn.Embedding) and "position_ids" in takes:
                child.register_forward_pre_hook(place, with_kwargs=True)
                child.register_forward_hook(flatten)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
