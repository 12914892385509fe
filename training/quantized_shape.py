"""A base without weights as bitsandbytes would hold it: for counting bytes, not for computing.

transformers chooses which modules are quantised, as when it loads them; here each gets tensors on
the meta device of the shapes and dtypes that its weight and scales would have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from cluster.base_model import bitsandbytes_config
from cluster.quantization import QuantizationSpec
from cluster.quantized_linear import is_quantized, settle

_BLOCK, _SCALES_BLOCK = 64, 256  # values, and scales of such blocks, that share a scale


def quantize_shapes(base: Any, spec: QuantizationSpec, dtype: torch.dtype) -> None:
    """Put quantised modules in the place of `base`'s linear ones, which are on the meta device;
    what is not packed has that dtype. A base that was saved quantised tells which modules are."""
    from transformers.quantizers.auto import AutoHfQuantizer

    asked: Any = getattr(base.config, "quantization_config", None) or bitsandbytes_config(spec)
    quantizer: Any = AutoHfQuantizer.from_config(asked, pre_quantized=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as when transformers loads them
    try:
        quantizer.preprocess_model(base, device_map=None)
    finally:
        torch.set_default_dtype(before)
    setattr(base, f"is_loaded_in_{spec.bits}bit", True)  # PEFT asks for it
    pack = _pack_4bit if spec.bits == 4 else _pack_8bit
    with torch.device("meta"):
        for module in filter(is_quantized, base.modules()):
            pack(module)
    settle(base)


def _pack_4bit(module: Any) -> None:
    from bitsandbytes.functional import QuantState

    weight = module.weight
    blocks = math.ceil(weight.numel() / _BLOCK)
    double: dict[str, Any] = {}
    if weight.compress_statistics:
        scales, code = torch.empty(math.ceil(blocks / _SCALES_BLOCK)), torch.empty(256)
        double = {
            "offset": torch.empty(()),
            "state2": QuantState(scales, code=code, blocksize=_SCALES_BLOCK, dtype=torch.float32),
        }
    weight.quant_state = module.quant_state = QuantState(
        torch.empty(blocks, dtype=torch.uint8 if double else torch.float32),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=_BLOCK,
        quant_type=weight.quant_type,
        dtype=weight.dtype,
        **double,
    )
    weight.data = torch.empty(math.ceil(weight.numel() / 2), 1, dtype=torch.uint8)


def _pack_8bit(module: Any) -> None:
    weight = module.weight
    weight.SCB = torch.empty(weight.shape[0])
    weight.data = torch.empty(weight.shape, dtype=torch.int8)


def scales_of(model: torch.nn.Module) -> Iterator[tuple[Any, str]]:
    """(what holds it, the attribute's name) of each tensor that a quantised module of `model` keeps
    beside its parameters."""
    module: Any
    for module in filter(is_quantized, model.modules()):
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            yield module.state, "SCB"
            continue
        for holder in filter(None, (state, state.state2)):
            yield from ((holder, name) for name in ("absmax", "code"))
        if state.nested:
            yield state, "offset"
