"""Rows of one micro-batch end to end in one sequence, without padding and without contact.

    T tokens of the micro-batch    H heads    K key/value heads    D head size    P prefix tokens

Positions restart with each row, and attention runs row by row, so no row sees another. The base's
own modules compute everything else. Plugged into transformers' AttentionInterface; where the rows
begin comes from the `Layout` in scope during a forward pass. Knows no methods and no losses.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cluster.errors import BaseModelError

NAME = "graft_packed"
# Attention variants that the formula below does not have.
_UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "alibi", "head_mask")


# Of configs whose layers look at a token's place in the sequence by other means than its position:
# Llama 4 scales queries by it and attends in chunks of it.
_PLACES = ("attention_chunk_size", "attn_temperature_tuning")


def check_packable(config: Any) -> None:
    """Raise BaseModelError for a base of which rows must each begin their sequence."""
    text = config.get_text_config()
    if asked := [name for name in _PLACES if getattr(text, name, None)]:
        raise BaseModelError(f"{text.model_type}: {asked[0]} counts places, so rows are not packed")


def _slides(module: Any) -> bool:
    """Whether the base gives this layer a sliding window that a row can be longer than."""
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    if not window or window >= getattr(config, "max_position_embeddings", math.inf):
        return False
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    return kinds is None or layer is None or kinds[layer] == "sliding_attention"


@dataclass(frozen=True)
class Layout:
    """Where each row lies: `bounds` are (start, end) in T. `prefix` holds, by layer, keys and
    values [1, K, P, D] that every row sees in front of its own."""

    bounds: Sequence[tuple[int, int]]
    prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None
    _masks: dict[tuple[int, int, int | None], torch.Tensor] = field(
        default_factory=dict[tuple[int, int, int | None], torch.Tensor]
    )

    def mask(self, rows: int, prefix: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Which keys each token of a row sees, bool [rows, prefix + rows]; made once a pass."""
        at = (rows, prefix, window)
        if at not in self._masks:
            key_S = torch.arange(prefix + rows, device=like.device)
            query_R = torch.arange(prefix, prefix + rows, device=like.device)
            mask = key_S <= query_R[:, None]
            if window is not None:
                mask &= key_S > query_R[:, None] - window
            self._masks[at] = mask
        return self._masks[at]


_LAYOUT: ContextVar[Layout | None] = ContextVar("packed_layout", default=None)


@contextmanager
def packed(layout: Layout) -> Generator[None]:
    """The scope of one forward pass."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, H, T, D], key and value [1, K, T, D] -> [1, T,
    H, D]. Raises BaseModelError for an attention variant that it does not compute."""
    layout = _LAYOUT.get()
    asked = [name for name in _UNSUPPORTED if options.get(name) is not None]
    # Some bases tell their window, or what else a token sees, by the mask, which rows share here.
    if attention_mask is not None or (sliding_window is None and _slides(module)):
        asked.append("a mask of its own")
    if layout is None or asked:
        reason = f"with {asked[0]}" if asked else "outside a packed pass"
        raise BaseModelError(f"{type(module).__name__}: attention {reason} cannot be packed")
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None
    if layout.prefix is not None:
        layer: Any = module.layer_idx
        prefix = layout.prefix[layer]
    outputs: list[torch.Tensor] = []
    for start, end in layout.bounds:
        own = (key[:, :, start:end], value[:, :, start:end])
        context = own if prefix is None else _joined(prefix, own)
        before = context[0].shape[2] - (end - start)
        plain = not before and (sliding_window is None or sliding_window >= end - start)
        mask = None if plain else layout.mask(end - start, before, sliding_window, query)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:end],
                *context,
                attn_mask=mask,
                is_causal=plain,
                dropout_p=dropout if module.training else 0.0,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2), None


def _joined(
    prefix: tuple[torch.Tensor, torch.Tensor], own: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (torch.cat([p.to(o.dtype), o], 2) for p, o in zip(prefix, own, strict=True))
    return keys, values


def prefix_of(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values by layer of a cache as PEFT's `get_prompt` makes it for one row."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def recomputation() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The scopes of a layer's forward and of its second one, in backward: the `context_fn` of
    torch.utils.checkpoint. Backward runs outside the packed pass, and on a GPU in other threads."""
    layout = _LAYOUT.get()
    return nullcontext(), nullcontext() if layout is None else packed(layout)


AttentionInterface.register(NAME, packed_attention)
