"""The Triton kernels for GPUs: what they compute, on a GPU where there is one, else by Triton's
interpreter on CPU (conftest asks for it), which multiplies no bfloat16; and that they compile for
GPUs, by Triton's compiler, which needs none. How fast they are only a GPU shows.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter
from conftest import CONTEXT

from serving.adapters import LinearDelta
from serving.engine import Engine, EngineSpec, GenerationRequest, runner
from serving.engine.flat import FlatPass

pytest.importorskip("triton", reason="Triton is there for Linux alone")
from serving.adapters import apply, gpu_low_rank
from serving.engine import gpu_attention

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3}
if HAS_GPU:
    TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
needs_interpreter = pytest.mark.skipif(HAS_GPU, reason="the engine takes them by itself")
SLOTS = 300
# Each row's tokens of the step, and of its context.
ROWS = [(1, 37), (5, 5), (1, 1), (50, 70), (1, 9), (1, 90)]
SPANS, RANKS = [(0, 1), (1, 4), (6, 11), (11, 40)], [1, 8, 13, 40]  # 4 and 5 are nobody's


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (7, 1, 40)])
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("part", [16, 512])
def test_each_token_sees_its_own_context_alone(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
    part: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if contexts were long: of many parts, and of many blocks.
    for name in ("_DECODE_PART", "_PART"):
        monkeypatch.setattr(gpu_attention, name, part)
    shape = gpu_attention.tile_shape
    monkeypatch.setattr(gpu_attention, "tile_shape", lambda *form: shape(*form) | {"block": 16})
    keys, values = (torch.full((SLOTS, kv_heads, size), torch.nan, dtype=dtype) for _ in range(2))
    free = np.random.default_rng(0).permutation(SLOTS)
    ends = np.cumsum([length for _, length in ROWS])
    slots = np.split(free[: ends[-1]], ends[:-1])
    for own in slots:  # what belongs to nobody stays NaN
        keys[own], values[own] = (torch.randn(len(own), kv_heads, size).to(dtype) for _ in range(2))
    last = np.cumsum([count for count, _ in ROWS])
    spans = [(int(end) - count, int(end)) for (count, _), end in zip(ROWS, last, strict=True)]
    query = torch.randn(1, heads, int(last[-1]), size).to(dtype)[0].transpose(0, 1)
    rows = gpu_attention.gpu_rows(spans, slots, DEVICE)
    asked = (tensor.to(DEVICE) for tensor in (query, keys, values))
    found = rows.attend(*asked, None, window).cpu()
    for (start, end), own in zip(spans, slots, strict=True):
        position = torch.arange(len(own) - (end - start), len(own))[:, None]
        seen = torch.arange(len(own)) <= position
        if window is not None:
            seen &= torch.arange(len(own)) > position - window
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None].double(),
            *(memory[own].transpose(0, 1)[None].double() for memory in (keys, values)),
            attn_mask=seen,
            enable_gqa=True,
        )
        away = (found[start:end].double() - expected[0].transpose(0, 1)).abs().max()
        assert away < TOLERANCE[dtype], (start, end)


def test_long_contexts_are_read_in_parts_that_the_row_alone_sets() -> None:
    whole, windowed = 2**31 - 1, 100
    assert gpu_attention._parts(1, 300, whole) == [(0, 512)]
    assert gpu_attention._parts(1, 1300, whole) == [(0, 512), (512, 1024), (1024, 1536)]
    assert len(gpu_attention._parts(1, 128_000, whole)) == 32
    assert gpu_attention._parts(1, 128_000, windowed) == [(127_900, 128_412)]
    assert len(gpu_attention._parts(20, 30_000, whole)) == 15
    assert len(gpu_attention._parts(500, 30_000, whole)) == 1


def test_they_are_proved_before_they_are_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heads = (4, 2, 64)
    asked = {gpu_attention: (torch.float32, DEVICE, *heads), gpu_low_rank: (torch.float32, DEVICE)}
    for module, options in asked.items():
        module.ready.cache_clear()
        assert module.ready(*options), caplog.text
    monkeypatch.setattr(gpu_attention, "_LOG2_E", 1.3)  # a wrong answer
    monkeypatch.setattr(gpu_low_rank, "_shrink", {})  # what does not compile
    for module, options in asked.items():
        module.ready.cache_clear()
        assert not module.ready(*options)
        module.ready.cache_clear()
    assert caplog.text.count("not used on") == 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 48), (5, 33), (1100, 300)])
def test_each_adapter_changes_its_own_rows(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes).to(DEVICE, dtype)

    deltas = [LinearDelta(random(r, inputs).T, random(r, outputs), factor=0.5) for r in RANKS]
    x, y = random(1, 50, inputs)[:, 5:45], random(1, 40, outputs)
    expected = y.double()
    for (start, end), delta in zip(SPANS, deltas, strict=True):
        change = x[:, start:end].double() @ delta.a_Ir.double() @ delta.b_rO.double()
        expected[:, start:end] += 0.5 * change
        assert gpu_low_rank.takes(delta, end - start, x, y)
    parts = [(*span, delta) for span, delta in zip(SPANS, deltas, strict=True)]
    gpu_low_rank.together(parts).add(y, x)
    assert (y.double() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


def test_what_does_not_lie_as_they_read_is_left() -> None:
    x, y, a_rI, b_rO = (torch.randn(2, size) for size in (32, 48, 32, 48))
    assert gpu_low_rank.takes(LinearDelta(a_rI.T, b_rO), 2, x, y)
    assert not gpu_low_rank.takes(LinearDelta(a_rI.T, b_rO), 257, x, y), "cuBLAS's"
    shifted = torch.randn(2 * 48 + 1)[1:].view(2, 48)
    assert not gpu_low_rank.takes(LinearDelta(a_rI.T, shifted), 2, x, y), "off the 16 bytes"
    many = [torch.randn(129, size) for size in (32, 48)]
    assert not gpu_low_rank.takes(LinearDelta(many[0].T, many[1]), 2, x, y), "of a high rank"


@needs_interpreter
@pytest.mark.parametrize("family", ["llama", "mistral"])  # groups of heads; a window
def test_an_engine_answers_by_them_as_without(
    family: str, bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = ["lora", "lora_patterns", "dora", "prefix_tuning", "ia3"]
    folders = {v: make_adapter(v, bases(family), tmp_path / v) for v in variants}
    spec = EngineSpec(base_model=str(bases(family)), max_context_tokens=CONTEXT, max_step_tokens=24)
    requests = [
        GenerationRequest(
            prompt_token_ids=list(range(60, 60 + tokens)), adapter=adapter, max_tokens=5,
            ignore_eos=True, logprobs=3,
        )
        for tokens, adapter in zip((9, 30, 2, 17, 25, 12), (None, *variants), strict=True)
    ]  # fmt: skip
    expected = _answers(spec, folders, requests)
    called: list[str] = []
    _count(monkeypatch, called, gpu_attention.GpuRows, "attend")
    _count(monkeypatch, called, gpu_low_rank.GpuLowRankRows, "add")
    for module in (apply, runner):
        monkeypatch.setattr(module, "low_rank_kernel", lambda _: gpu_low_rank)
    monkeypatch.setattr(runner, "FlatPass", lambda *a: FlatPass(*a[:3], gpu_attention))
    found = _answers(spec, folders, requests)
    assert called.count("attend") > 10
    assert called.count("add") > 10
    for request, one, other in zip(requests, expected, found, strict=True):
        assert one.token_ids == other.token_ids, request.adapter
        gaps = [
            abs(a - b)
            for left, right in zip(one.logprobs, other.logprobs, strict=True)
            for (_, a), (_, b) in zip(left.top, right.top, strict=True)
        ]
        assert max(gaps) < 1e-4, request.adapter


def _answers(spec: EngineSpec, folders: dict[str, Path], requests: list[GenerationRequest]) -> Any:
    engine = Engine(spec)
    for name, path in folders.items():
        engine.add_adapter(name, path)
    results = engine.generate(requests)
    engine.check()
    return results


def _count(monkeypatch: pytest.MonkeyPatch, called: list[str], owner: type, name: str) -> None:
    own = getattr(owner, name)

    def counted(*args: Any) -> Any:
        called.append(name)
        return own(*args)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80])
def test_they_compile_for_a_gpu(capability: int) -> None:
    """And need no more shared memory than a GPU of that generation has at least."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    program = Path(__file__).parents[1] / "compiled_kernels.py"
    command = [sys.executable, str(program), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines()]
    assert {kernel for kernel, *_ in told} == {"_attend", "_add_parts", "_shrink", "_expand"}
    for *kernel, shared in told:
        assert int(shared) <= 99 * 1024, kernel
