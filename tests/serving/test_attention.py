"""Attention of a decoding step in each dtype, by the kernel and without it, against float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from serving.engine import cpu_attention
from serving.engine.attention import AttentionPlan, attend_by, paged_attention

ROWS, SLOTS = 5, 64
# Query heads, key/value heads, head size: grouped, one for all, one each, of odd size.
SHAPES = [(12, 4, 64), (8, 1, 128), (4, 4, 80), (4, 2, 10)]
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_each_row_sees_its_own_context_alone(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
    has_kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not has_kernel:
        monkeypatch.setattr(cpu_attention, "runs", lambda *_: False)
    lengths = [1, 33, 7, 16, 20]
    if has_kernel and not cpu_attention.runs(
        torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype)
    ):
        pytest.skip(f"no kernel for {dtype} here")
    memory = [torch.randn(SLOTS * ROWS, kv_heads, size).to(dtype) for _ in range(2)]
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
    query = torch.randn(1, heads, ROWS, size).to(dtype)
    key, value = (torch.randn(1, kv_heads, ROWS, size).to(dtype) for _ in range(2))
    layer = torch.nn.Module()
    layer.layer_idx = 0
    with attend_by(plan):
        found, _ = paged_attention(layer, query, key, value, None, sliding_window=window)
    for row, length in enumerate(lengths):
        seen = slots[row, max(0, length - (window or length)) : length]
        context = (t[seen].transpose(0, 1)[None].double() for t in memory)
        expected = scaled_dot_product_attention(
            query[:, :, row : row + 1].double(), *context, enable_gqa=True
        )
        away = (found[0, row].double() - expected[0, :, 0]).abs().max()
        assert away < TOLERANCE[dtype], row
