"""Attention of a decoding step in each dtype, against float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from serving.engine.attention import AttentionPlan, attend_by, paged_attention

ROWS, HEADS, KV_HEADS, SIZE, SLOTS = 5, 12, 4, 64, 64
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_each_row_sees_its_own_context_alone(dtype: torch.dtype) -> None:
    lengths = [1, 33, 7, 2, 20]
    memory = [torch.randn(SLOTS * ROWS, KV_HEADS, SIZE).to(dtype) for _ in range(2)]
    slots = torch.randperm(SLOTS * ROWS)[: ROWS * max(lengths)].view(ROWS, -1)
    write = torch.stack([slots[row, n - 1] for row, n in enumerate(lengths)])
    plan = AttentionPlan(
        *([tensor] for tensor in memory),
        write,
        {},
        (),
        torch.arange(ROWS),
        slots,
        torch.tensor(lengths),
    )
    query = torch.randn(1, HEADS, ROWS, SIZE).to(dtype)
    key, value = (torch.randn(1, KV_HEADS, ROWS, SIZE).to(dtype) for _ in range(2))
    layer = torch.nn.Module()
    layer.layer_idx = 0
    with attend_by(plan):
        found, _ = paged_attention(layer, query, key, value, None)
    for row, length in enumerate(lengths):
        context = (t[slots[row, :length]].transpose(0, 1)[None].double() for t in memory)
        expected = scaled_dot_product_attention(
            query[:, :, row : row + 1].double(), *context, enable_gqa=True
        )
        away = (found[0, row].double() - expected[0, :, 0]).abs().max()
        assert away < TOLERANCE[dtype], row
