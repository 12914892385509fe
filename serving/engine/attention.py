"""Attention over paged keys and values, plugged into transformers' AttentionInterface.

    T tokens of the step    B decoding rows    S context slots    H heads    K key/value heads
    G = H / K heads per group    D head size

The base's own modules compute projections, norms and rotary embedding; transformers then calls
`paged_attention` in each layer with all rows flattened to [1, ·, T, D]. It stores the new keys and
values in their slots and lets each row attend to its own context. Which slots these are comes
from the step's `AttentionPlan`, in scope during one forward pass.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cluster.errors import BaseModelError
from serving.engine import cpu_attention

if TYPE_CHECKING:  # it imports Triton
    from serving.engine.gpu_attention import GpuRows

NAME = "graft_paged"
# Attention variants that the formula below does not have; a layer that asks for one is refused.
_UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "alibi", "head_mask")


@dataclass(frozen=True)
class Span:
    """Rows `start` to `end` (excluded) of the step: one sequence's next tokens.

    `slots_S` (int64) are the slots of all its positions up to and with these tokens.
    """

    start: int
    end: int
    slots_S: torch.Tensor


@dataclass
class AttentionPlan:
    """Where each row of one step writes and reads. The tensors lie on the engine's device. `gpu`
    has all rows where there are kernels for them; else these are spans, or decode."""

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    write_T: torch.Tensor
    queries: dict[int, torch.Tensor]  # each layer's, for gated prompts behind it
    spans: Sequence[Span] = ()
    decode_B: torch.Tensor | None = None
    decode_slots_BS: torch.Tensor | None = None
    decode_lengths_B: torch.Tensor | None = None
    gpu: GpuRows | None = None
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(
        default_factory=dict[tuple[int, int | None], torch.Tensor]
    )
    _starts: dict[int | None, torch.Tensor] = field(default_factory=dict[int | None, torch.Tensor])

    def span_mask(self, index: int, window: int | None) -> torch.Tensor:
        """Which slots each row of a span sees, bool [rows, S]; made once for all layers."""
        if (index, window) not in self._masks:
            span = self.spans[index]
            length = len(span.slots_S)
            slot_S = torch.arange(length, device=span.slots_S.device)
            row_t = torch.arange(length - (span.end - span.start), length, device=slot_S.device)
            mask = slot_S[None, :] <= row_t[:, None]
            if window is not None:
                mask &= slot_S[None, :] > row_t[:, None] - window
            self._masks[index, window] = mask
        return self._masks[index, window]

    def decode_starts(self, window: int | None) -> torch.Tensor:
        """The first slot that each decoding row sees, int64 [B]; made once for all layers."""
        assert self.decode_lengths_B is not None
        if window not in self._starts:
            span_B = self.decode_lengths_B if window is None else window
            self._starts[window] = (self.decode_lengths_B - span_B).clamp_(min=0)
        return self._starts[window]

    def decode_mask(self, window: int | None) -> torch.Tensor:
        """Which slots each decoding row sees, bool [B, 1, 1, S]; made once for all layers."""
        if (-1, window) not in self._masks:
            assert self.decode_slots_BS is not None
            assert self.decode_lengths_B is not None
            slot_S = torch.arange(self.decode_slots_BS.shape[1], device=self.write_T.device)
            mask = slot_S < self.decode_lengths_B[:, None]
            mask &= slot_S >= self.decode_starts(window)[:, None]
            self._masks[-1, window] = mask[:, None, None, :]
        return self._masks[-1, window]


_PLAN: ContextVar[AttentionPlan | None] = ContextVar("attention_plan", default=None)


@contextmanager
def attend_by(plan: AttentionPlan) -> Generator[None]:
    """The scope of one forward pass."""
    token = _PLAN.set(plan)
    try:
        yield
    finally:
        _PLAN.reset(token)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, H, T, D], key and value [1, K, T, D] -> [1, T,
    H, D]. Raises BaseModelError for an attention variant that it does not compute."""
    plan = _PLAN.get()
    layer: int | None = getattr(module, "layer_idx", None)
    asked = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if plan is None or layer is None or asked:
        reason = f"with {asked[0]}" if asked else "outside the engine's step"
        raise BaseModelError(f"{type(module).__name__}: attention {reason} is not served yet")
    keys, values = plan.keys[layer], plan.values[layer]
    keys[plan.write_T] = key[0].transpose(0, 1)
    values[plan.write_T] = value[0].transpose(0, 1)
    query_TH = query[0].transpose(0, 1)
    plan.queries[layer] = query_TH
    if plan.gpu is not None:
        return plan.gpu.attend(query_TH, keys, values, scaling, sliding_window)[None], None
    decode = (keys, values, scaling, sliding_window)
    if not plan.spans:
        return _decode(plan, query_TH, *decode)[None], None
    output_TH = torch.empty_like(query_TH, memory_format=torch.contiguous_format)
    for index, span in enumerate(plan.spans):
        rows = slice(span.start, span.end)
        context = (
            keys[span.slots_S].transpose(0, 1)[None],
            values[span.slots_S].transpose(0, 1)[None],
        )
        output_TH[rows] = scaled_dot_product_attention(
            query[:, :, rows],
            *context,
            attn_mask=plan.span_mask(index, sliding_window),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )[0].transpose(0, 1)
    if plan.decode_B is not None:
        output_TH[plan.decode_B] = _decode(plan, query_TH[plan.decode_B], *decode)
    return output_TH[None], None


def _decode(
    plan: AttentionPlan,
    query_BH: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One token of each decoding row against its context, [B, H, D]. The heads of a group share
    their keys, so they stand where queries of one sequence would."""
    assert plan.decode_slots_BS is not None
    assert plan.decode_lengths_B is not None
    num_kv_heads, size = keys.shape[1], keys.shape[2]
    if cpu_attention.runs(query_BH, keys):
        return cpu_attention.attend(
            query_BH,
            keys,
            values,
            plan.decode_slots_BS,
            plan.decode_starts(window),
            plan.decode_lengths_B,
            size**-0.5 if scaling is None else scaling,
        )
    output = scaled_dot_product_attention(
        query_BH.reshape(len(query_BH), num_kv_heads, -1, size),
        keys[plan.decode_slots_BS].transpose(1, 2),
        values[plan.decode_slots_BS].transpose(1, 2),
        attn_mask=plan.decode_mask(window),
        scale=scaling,
    )
    return output.reshape(query_BH.shape)


AttentionInterface.register(NAME, paged_attention)
