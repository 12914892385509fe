"""The kernel that adds what many adapters' A and B give to their own rows, against float64."""

import shutil

import pytest
import torch
import transformers

from serving.adapters import DeltaHooks, LinearDelta, Segment
from serving.adapters.cpu_low_rank import takes, together

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SPANS = [(0, 1), (1, 4), (6, 11), (11, 12)]  # rows 4 and 5 belong to nobody
RANKS = [1, 8, 13, 17]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 48), (5, 33), (768, 300)])
def test_each_adapter_changes_its_own_rows(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    deltas = [
        LinearDelta(
            torch.randn(rank, inputs).to(dtype).T, torch.randn(rank, outputs).to(dtype), factor=0.5
        )
        for rank in RANKS
    ]
    x, y = torch.randn(1, 12, inputs).to(dtype), torch.randn(1, 12, outputs).to(dtype)
    expected = y.double()
    for (start, end), delta in zip(SPANS, deltas, strict=True):
        change = x[:, start:end].double() @ delta.a_Ir.double() @ delta.b_rO.double()
        expected[:, start:end] += 0.5 * change
    rows = together([(*span, delta) for span, delta in zip(SPANS, deltas, strict=True)])
    rows.add(y, x)
    assert (y.double() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


def test_it_takes_what_lies_as_it_reads() -> None:
    a_rI, b_rO, x, y = (
        torch.randn(8, 32),
        torch.randn(8, 48),
        torch.randn(99, 32),
        torch.zeros(99, 48),
    )
    assert takes(LinearDelta(a_rI.T, b_rO), 64, x, y)
    assert takes(LinearDelta(a_rI[:3].T, b_rO[:3]), 1, x, y), "a chosen rank"
    assert not takes(LinearDelta(a_rI.T, b_rO), 65, x, y), "where two products are faster"
    assert not takes(LinearDelta(a_rI.T.contiguous(), b_rO), 1, x, y), "an embedding's"
    assert not takes(LinearDelta(a_rI.double().T, b_rO.double()), 1, x.double(), y.double())
    assert not takes(LinearDelta(a_rI.bfloat16().T, b_rO.bfloat16()), 1, x, y), "another dtype"
    assert not takes(LinearDelta(a_rI.T, b_rO), 1, x[:, :16], y), "another module's"
    assert not takes(LinearDelta(shift_O=b_rO[0]), 1, x, y)


def test_a_slice_of_what_others_read() -> None:
    delta = LinearDelta(torch.randn(4, 64).T, torch.randn(4, 32))
    x, y = torch.randn(20, 500)[:, :64], torch.zeros(20, 32)
    rows = together([(0, 20, delta)])
    rows.add(y, x)
    torch.testing.assert_close(y, x @ delta.a_Ir @ delta.b_rO, atol=1e-4, rtol=1e-4)


def test_outside_of_a_step_nothing_is_changed() -> None:
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    hooks, name, ids = DeltaHooks(model), "model.layers.0.mlp.up_proj", torch.arange(9)[None]
    with hooks.learning(9):
        model(ids)
    deltas = {name: LinearDelta(torch.randn(4, 32).T, torch.randn(4, 48))}
    hooks.install(deltas)
    module, x = model.get_submodule(name), torch.randn(1, 9, 32)
    plain = module(x)
    for _ in range(2):
        with hooks.active([Segment(2, 9, deltas)], []):
            changed = module(x)
        assert torch.equal(changed[:, :2], plain[:, :2])
        assert (changed[:, 2:] != plain[:, 2:]).any(-1).all()
        torch.testing.assert_close(module(x[:, :3]), plain[:, :3])
