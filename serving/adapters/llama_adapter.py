"""LLaMA-Adapter folders (arXiv:2303.16199) as gated prompts, as PEFT computes them.

P prompt tokens    K key/value heads    D head size
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch.nn.functional import linear

from cluster.adapter_folder import WEIGHTS, AdapterFolder, fault
from serving.adapters.config import refuse_unread
from serving.adapters.primitives import Delta, GatedPrompt, LoweredAdapter
from serving.adapters.target import Target, bare_name, shape_of

_KEY = re.compile(r"(.+\.(\d+)\.\w+)\.adaption_(?:prompt|gate)")


def lower_llama_adapter(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A folder of gated prompts, by the attention's output projection. Raises AdapterError."""
    refuse_unread(folder, (), {"target_modules", "adapter_len", "adapter_layers"})
    found: dict[str, Delta] = {}
    for key in tensors:
        match = _KEY.fullmatch(bare_name(folder, key))
        pair = [] if match is None else [key[: -len(key.rpartition(".")[2])] + f"adaption_{part}"
                                         for part in ("prompt", "gate")]  # fmt: skip
        if match is None or any(name not in tensors for name in pair):
            raise fault(folder.path, WEIGHTS, f"has tensor {key!r}, which is no gated prompt")
        prompt, gate = (tensors[name].float() for name in pair)
        has_prompt = prompt.ndim == 3 and prompt.shape[0] == 1 and prompt.shape[1] > 0
        if not has_prompt or prompt.shape[2] != target.hidden_size or gate.numel() != 1:
            raise fault(
                folder.path,
                WEIGHTS,
                f"has {key!r} of another size than the base {target.name}; the adapter was made "
                f"for another base ({folder.base_model})",
            )
        is_fused = f"{match[1]}.c_attn" in target.modules
        names = ("c_attn", "c_attn", "c_proj") if is_fused else ("k_proj", "v_proj", "o_proj")
        shapes = [shape_of(folder, key, f"{match[1]}.{name}", target) for name in names]
        rows: list[torch.Tensor] = []
        for part, shape in enumerate(shapes[:2], 1):
            assert shape.read_weight is not None, "projections are linear"
            bias = shape.parameters.get("bias")
            bias = None if bias is None else bias.float().cpu()
            row = linear(prompt[0], shape.read_weight(), bias)
            row = row.split(target.hidden_size, 1)[part] if is_fused else row
            rows.append(row.view(-1, target.num_kv_heads, target.head_size))
        # PEFT adds it behind GPT-2's output projection, and elsewhere projects it, bias included.
        found[f"{match[1]}.{names[2]}"] = GatedPrompt(
            *(tensor.to(target.device, target.dtype) for tensor in (rows[0], gate * rows[1])),
            layer=int(match[2]),
            is_projected=not is_fused,
            shift_O=None if is_fused else shapes[2].bias,
        )
    return LoweredAdapter(found)
