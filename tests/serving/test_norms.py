"""The kernel of norms against the modules that it stands in for, and what it must not stand for."""

from typing import Any

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from serving.engine.cpu_norm import adopt_norms, form_of, runs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = 1e-6
# Offset of the weight, and whether rows are rounded before they are weighted.
KINDS = [
    (LlamaRMSNorm, 0.0, True),
    (T5LayerNorm, 0.0, True),
    (GemmaRMSNorm, 1.0, False),
    (Olmo2RMSNorm, 0.0, False),
    (torch.nn.RMSNorm, 0.0, False),
]


class Centred(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class OtherEpsilon(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        own = LlamaRMSNorm(len(self.weight), eps=2 * EPSILON)
        own.weight = torch.nn.Parameter(self.weight)
        return own(hidden_states)


class InHalfPrecision(LlamaRMSNorm):
    """Of the same formula, with a mean that is rounded."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        mean = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(mean + EPSILON))


class Scaled(LlamaRMSNorm):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)
        self.register_buffer("scale", torch.ones(()))


def made(kind: Any, size: int, dtype: torch.dtype) -> Any:
    module = kind(size, eps=EPSILON).to(dtype).requires_grad_(False)
    torch.nn.init.normal_(module.weight)
    if not runs(dtype):
        pytest.skip(f"no kernel for {dtype} here")
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 100, 768, 1000])
@pytest.mark.parametrize(("kind", "offset", "rounds_first"), KINDS)
def test_a_norm_is_the_modules_own(
    kind: Any, offset: float, rounds_first: bool, size: int, dtype: torch.dtype
) -> None:
    module = made(kind, size, dtype)
    found = form_of(module)
    assert found is not None
    assert (found.epsilon, found.offset) == (EPSILON, offset)
    assert dtype == torch.float32 or found.rounds_first is rounds_first
    rows = [torch.randn(2, 45, size) * scale for scale in (1.0, 1e-3, 50.0)]
    x = torch.cat([*rows, torch.zeros(2, 1, size)], dim=1).to(dtype)
    weight = module.weight.clone()
    expected = module(x)
    adopt_norms(module)
    assert torch.equal(module.weight, weight)
    y = module(x)
    if dtype == torch.float32:
        torch.testing.assert_close(y, expected, atol=0, rtol=1e-6)
    else:  # to the last bit, but for the rare sum that lies between two roundings
        assert (y != expected).double().mean() < 2e-3
        torch.testing.assert_close(y, expected, atol=0, rtol=2 * torch.finfo(dtype).eps)
    for first, last in ((0, 1), (3, 40)):
        assert torch.equal(module(x[:, first:last]), y[:, first:last]), "a row alone"
    assert torch.equal(module(x.transpose(0, 1)), y.transpose(0, 1))
    assert module(x[:, :0]).shape == (2, 0, size)


@pytest.mark.parametrize(
    "kind", [Centred, OtherEpsilon, Scaled, torch.nn.LayerNorm, Qwen3NextRMSNormGated]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_formula_keeps_its_forward(kind: Any, dtype: torch.dtype) -> None:
    module = made(kind, 48, dtype)
    assert form_of(module) is None
    adopt_norms(module)
    assert "forward" not in vars(module)
    assert [*vars(module)] == [*vars(made(kind, 48, dtype))], "what was tried has left something"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_roundings_keep_their_forward(dtype: torch.dtype) -> None:
    assert form_of(made(InHalfPrecision, 768, dtype)) is None


def test_adapters_replace_its_weight_and_other_dtypes_go_the_modules_way() -> None:
    module = made(LlamaRMSNorm, 48, torch.float32)
    x = torch.randn(3, 48)
    adopt_norms(module)
    assert "forward" in vars(module)
    plain = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)
    # As the engine replaces a module's parameters for some rows.
    module.__dict__["weight"] = torch.full((48,), 2.0)
    torch.testing.assert_close(module(x), plain * 2)
    del module.__dict__["weight"]
    torch.testing.assert_close(module(x), plain * module.weight)
    assert module(x.bfloat16()).dtype == torch.float32, "promoted, as the module does it"
