"""The kernel of rotary.cpp, where a base's attention calls a function that computes the same.

Transformers' families turn queries and keys by a function of their own file, which their attention
finds among its globals. Where that function gives the kernel's results on random queries and keys,
this model's attention finds the kernel instead; the family's file stays as it is.

T rows    H heads    K key/value heads    D head size
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch

from cluster.native import kernels

_SOURCE = Path(__file__).with_name("rotary.cpp")
_TYPES = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 5, ctypes.c_int]
_kernel = kernels(_SOURCE, "turn", _TYPES)
# What the families call it.
_NAME = "apply_rotary_pos_emb"
# Heads, key/value heads, rows, head size; of what a function is tried on.
_TRIED = (3, 2, 5, 24)
_Turn = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def runs(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this dtype."""
    return _kernel(dtype) is not None


def adopt_rotary(model: torch.nn.Module, dtype: torch.dtype) -> set[torch.nn.Module]:
    """Let attention modules of `model`, on CPU and of that dtype, that turn queries and keys in the
    plain way do so by the kernel, for inference alone, and return them."""
    adopted: set[torch.nn.Module] = set()
    if not runs(dtype):
        return adopted
    rebound = functools.cache(partial(_rebound, dtype=dtype))  # all layers have the same
    for module in model.modules():
        forward: Any = module.forward
        function = getattr(forward, "__func__", None)
        found = rebound(function) if inspect.isfunction(function) else None
        if found is not None:
            module.forward = MethodType(found, module)
            adopted.add(module)
    return adopted


def _rebound(function: FunctionType, dtype: torch.dtype) -> FunctionType | None:
    """An attention's forward that finds the kernel among its globals; None if it turns nothing, or
    in another way."""
    own: Any = function.__globals__.get(_NAME)
    if own is None or _NAME not in function.__code__.co_names or not is_plain(own, dtype):
        return None
    names = {**function.__globals__, _NAME: turning(own)}
    code, defaults, closure = function.__code__, function.__defaults__, function.__closure__
    bound = FunctionType(code, names, None, defaults, closure)
    bound.__kwdefaults__ = function.__kwdefaults__
    return bound


@torch.inference_mode()
def is_plain(own: Callable[..., Any], dtype: torch.dtype) -> bool:
    """Whether `own` turns queries and keys as the kernel does."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, rows, size = _TRIED
    shapes = ((1, heads, rows, size), (1, kv_heads, rows, size), (1, rows, size), (1, rows, size))
    tried = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    try:
        expected = own(*tried)
        pairs = zip(turning(own)(*tried), expected, strict=True)
        # A multiplication and an addition may be one operation; of the others all roundings are.
        tolerance = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 0
        for found, other in pairs:
            torch.testing.assert_close(found, other, atol=tolerance, rtol=tolerance)
    except Exception:  # whatever it wants, it is not this
        return False
    return True


def turning(own: _Turn) -> _Turn:
    """The kernel, and `own` for what the kernel does not take: query [1, H, T, D], key [1, K, T,
    D], cosine and sine [1, T, D] of one dtype."""

    def turn(
        query: torch.Tensor,
        key: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        *args: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        each = cosine.shape[1:]
        if (
            args
            or options
            or query.device.type != "cpu"
            or not query.ndim == key.ndim == cosine.ndim + 1 == 4
            or cosine.shape != sine.shape
            or cosine.shape[-1] % 2
            or not query.shape[0] == key.shape[0] == cosine.shape[0] == 1
            or not query.shape[2:] == key.shape[2:] == each
            or not query.stride(3) == key.stride(3) == 1
            or not query.dtype is key.dtype is cosine.dtype is sine.dtype
            or not runs(query.dtype)
        ):
            return own(query, key, cosine, sine, *args, **options)
        cosine, sine = cosine.contiguous(), sine.contiguous()
        return _turned(query, cosine, sine), _turned(key, cosine, sine)

    return turn


def _turned(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    _, heads, rows, size = x.shape
    y_1THD = x.new_empty(1, rows, heads, size)
    _kernel(x.dtype)(
        *(part.data_ptr() for part in (y_1THD, x, cosine, sine)),
        *(rows, heads, size, x.stride(2), x.stride(1)),
        torch.get_num_threads(),
    )
    return y_1THD.transpose(1, 2)
