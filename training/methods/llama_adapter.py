"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199) through PEFT: in the upper layers, attention
to a learned prompt behind a gate that starts at zero."""

from __future__ import annotations

from typing import Any

import torch

from cluster.errors import SpecError
from training.method_spec import LlamaAdapterSpec


def attach(model: Any, spec: LlamaAdapterSpec, base_path: str) -> torch.nn.Module:
    """Put a gated prompt into the attention of the top layers, in float32.

    Raises:
        SpecError: the base has fewer layers, or PEFT does not know this family's attention or
            computes it wrongly.
    """
    from peft import AdaptionPromptConfig, get_peft_model

    text = model.config.get_text_config()
    layers = spec.adapter_layers or text.num_hidden_layers
    if layers > text.num_hidden_layers:
        raise SpecError(
            f"method.adapter_layers: {layers} is more than {base_path} has; set it to at most "
            f"{text.num_hidden_layers}"
        )
    config = AdaptionPromptConfig(
        task_type="CAUSAL_LM",
        adapter_len=spec.adapter_len,
        adapter_layers=layers,
        base_model_name_or_path=base_path,
    )
    size = getattr(text, "head_dim", None)
    if size is not None and size * text.num_attention_heads != text.hidden_size:
        # PEFT takes the ratio of the projections' sizes for that of query and key heads.
        raise SpecError(
            f"method: PEFT's LLaMA-Adapter is wrong for heads of {size} in {base_path}, whose "
            f"hidden size is {text.hidden_size}; use prefix_tuning, which prompts every layer too"
        )
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise SpecError(
            f"method: PEFT refuses LLaMA-Adapter on {base_path} ({error}); use prefix_tuning, "
            "which prompts every layer too"
        ) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted
