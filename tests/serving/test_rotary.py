"""The kernel of rotary embedding against the functions that it stands in for."""

import importlib
from typing import Any

import pytest
import torch
import transformers

from serving.engine.cpu_rotary import adopt_rotary, is_plain, runs, turning

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Queries' and keys' heads, head size; grouped, one each, of odd size.
SHAPES = [(12, 4, 64), (3, 3, 80), (4, 1, 6)]


def function_of(family: str) -> Any:
    return importlib.import_module(
        f"transformers.models.{family}.modeling_{family}"
    ).apply_rotary_pos_emb


@pytest.fixture(autouse=True, params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not runs(request.param):
        pytest.skip(f"no kernel for {request.param} here")
    return request.param


def inputs(dtype: torch.dtype, heads: int, kv_heads: int, size: int, rows: int) -> Any:
    """As projections give them: queries and keys are views of what has the heads last."""
    query, key = (
        torch.randn(1, rows, n, size).to(dtype).transpose(1, 2) for n in (heads, kv_heads)
    )
    angle = torch.randn(1, rows, size)
    return query, key, angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
@pytest.mark.parametrize("rows", [1, 33, 700])
def test_queries_and_keys_are_turned_alike(
    heads: int, kv_heads: int, size: int, rows: int, dtype: torch.dtype
) -> None:
    def forbidden(*_: Any) -> Any:
        raise AssertionError("these are the kernel's")

    own = function_of("llama")
    query, key, cosine, sine = inputs(dtype, heads, kv_heads, size, rows)
    before = query.clone()
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    expected, found = (f(query, key, cosine, sine) for f in (own, turning(forbidden)))
    assert torch.equal(query, before)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    for at in (0, rows - 1):
        alone = (t[..., at : at + 1, :] for t in (query, key, cosine, sine))
        for one, other in zip(turning(forbidden)(*alone), found, strict=True):
            assert torch.equal(one, other[..., at : at + 1, :]), "a row alone"


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", True), ("phi", True), ("cohere", False), ("gpt_oss", False)]
)
def test_only_the_plain_formula_is_taken(family: str, expected: bool, dtype: torch.dtype) -> None:
    assert is_plain(function_of(family), dtype) is expected


def test_what_the_kernel_does_not_take_is_the_functions(dtype: torch.dtype) -> None:
    own = function_of("llama")
    query, key, cosine, sine = inputs(dtype, 4, 2, 16, 6)
    apart = [t.mT.contiguous().mT for t in (query, key)]
    for case in (
        (query, key, cosine, sine, 1),
        (*(t.repeat(2, 1, 1, 1) for t in (query, key)), cosine, sine),
        (query, key, cosine.double(), sine.double()),
        (*apart, cosine, sine),
    ):
        for one, other in zip(turning(own)(*case), own(*case), strict=True):
            assert torch.equal(one, other)


def test_a_model_finds_the_kernel_and_its_family_does_not(dtype: torch.dtype) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    models: list[Any] = [transformers.LlamaForCausalLM(config) for _ in range(2)]
    model, other = (made.to(dtype).eval() for made in models)
    own = function_of("llama")
    ids = torch.arange(7)[None]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        adopt_rotary(model, dtype)
        found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    changed: list[Any] = [m for m in model.modules() if "forward" in vars(m)]
    (attention,) = changed
    assert attention is model.model.layers[0].self_attn
    assert attention.forward.__func__.__globals__["apply_rotary_pos_emb"] is not own
    assert function_of("llama") is own
    assert not [m for m in other.modules() if "forward" in vars(m)]
