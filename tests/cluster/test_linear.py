"""Products through oneDNN against torch's own."""

import subprocess
import sys

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from cluster.linear import adopt, is_plain, linear, pack, product
from cluster.packed_product import packed

NEED = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]


@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 40), (0, 40), (700, 768)])
@pytest.mark.parametrize("need", NEED)
def test_values_and_gradients_are_torchs(shape: tuple[int, ...], need: tuple[bool, ...]) -> None:
    sizes = (shape, (900, shape[-1]), (900,))
    x, weight, bias = (
        torch.randn(s, dtype=torch.float32).requires_grad_(n)
        for s, n in zip(sizes, need, strict=True)
    )
    found, expected = linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    wanted = [t for t in (x, weight, bias) if t.requires_grad]
    upstream = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(found, wanted, upstream),
        torch.autograd.grad(expected, wanted, upstream),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(700, 768), (2, 350, 768)])
def test_a_result_may_be_added_to_in_place(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(900, 768, requires_grad=True)
    result = linear(x, weight)
    result += 1
    result.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0], x.flatten(0, -2).sum(0), atol=1e-3, rtol=1e-4)


def test_views_of_any_stride() -> None:
    x, weight = torch.randn(700, 1536)[:, ::2], torch.randn(768, 900).T
    torch.testing.assert_close(product(x, weight), x @ weight.T, atol=1e-3, rtol=1e-4)
    assert linear(torch.empty(5, 40, device="meta"), torch.empty(9, 40, device="meta")).shape == (
        5,
        9,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_alone_and_among_others(dtype: torch.dtype) -> None:
    x, module = torch.randn(100, 768).to(dtype), torch.nn.Linear(768, 901).to(dtype)
    adopt(module.requires_grad_(False))
    pack(module)
    if packed(module.weight) is None:
        pytest.skip(f"no kernel for {dtype} here; oneDNN chooses by the number of rows")
    with torch.inference_mode():
        for first, last in ((0, 1), (40, 48), (7, 32), (99, 100)):
            assert torch.equal(module(x)[first:last], module(x[first:last]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [1, 30, 33, 768])
@pytest.mark.parametrize("outputs", [1, 16, 31, 97])
@pytest.mark.parametrize("rows", [0, 1, 12, 13, 29])
def test_packed_products_of_any_shape(
    dtype: torch.dtype, inputs: int, outputs: int, rows: int
) -> None:
    x, weight, bias = (
        torch.randn(*s).to(dtype) for s in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    weight_of = packed(weight)
    if weight_of is None:
        pytest.skip(f"no kernel for {dtype} and {inputs} inputs here")
    for own in (bias, None):
        expected = x.double() @ weight.double().T + (0 if own is None else own.double())
        found = weight_of.product(x, own)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found.double(), expected, atol=tolerance * 30, rtol=tolerance)


def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    # In a process of its own: the caches' size is read once.
    program = """
import torch
from pathlib import Path
from cluster.linear import product
def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) / 256
weights = [torch.randn(640, 256), torch.randn(256, 640), torch.randn(256, 256)]
def products(rows):
    for count in rows:
        for weight in weights:
            product(torch.randn(count, weight.shape[1]), weight)
products(range(200, 300))
before = resident_mib()
products(range(300, 500))
print(resident_mib() - before)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert float(told.stdout) < 100, told.stderr  # without a bound 600 shapes take over 300


def test_autocast_is_torchs() -> None:
    x, weight = torch.randn(700, 768), torch.randn(900, 768)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adopted_and_packed_modules_compute_the_same(dtype: torch.dtype) -> None:
    class Own(torch.nn.Linear):
        pass

    parts = [torch.nn.Linear(300, 700), Conv1D(200, 700), torch.nn.Linear(200, 50, bias=False)]
    model = torch.nn.Sequential(*parts, Own(50, 50)).to(dtype).requires_grad_(False)
    names = list(model.state_dict())
    x = torch.randn(2, 500, 300, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        expected = model(x)
        adopt(model)
        assert [is_plain(module) for module in model] == [True, True, True, False]
        torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=tolerance)
        pack(model)
        torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=tolerance)
        assert list(model.state_dict()) == names
        first = model[0]
        # As the engine replaces a module's parameters for some rows.
        first.__dict__["weight"] = torch.zeros_like(first.weight)
        assert torch.equal(first(x)[0, 0], first.bias)
