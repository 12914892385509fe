"""Rows of a sparse change of an embedding, of a size at which torch's own way uses threads."""

import warnings

import pytest
import torch

from serving.adapters.apply import DeltaHooks, Segment
from serving.adapters.primitives import LinearDelta


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_an_embeddings_sparse_change_in_inference_mode(share: float) -> None:
    torch.manual_seed(0)
    table = torch.nn.Embedding(2_000, 256)
    change = torch.randn(2_000, 256) * (torch.rand(2_000, 256) < share)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        delta = LinearDelta(sparse=change.to_sparse_csr())

    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def get_output_embeddings(self) -> None:
            return None

    base, ids = Base(), torch.randint(2_000, (1, 600))
    hooks = DeltaHooks(base)
    with torch.inference_mode():
        with hooks.learning(600):
            base.table(ids)
        hooks.install({"table": delta})
        with hooks.active([Segment(100, 600, {"table": delta})], []):
            found = base.table(ids)[0]
    expected = table.weight.detach()[ids[0]]
    expected[100:] += change[ids[0, 100:]]
    torch.testing.assert_close(found, expected)
