"""Prompt tuning, P-tuning, prefix tuning and P-tuning v2 through PEFT.

P-tuning v2's deep prompts are prefix tuning without projection, one set of keys and values for
each layer (arXiv:2110.07602, section 3.2), so it needs no code of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from training.method_spec import PrefixTuningSpec, PromptTuningSpec, PTuningSpec

# As PEFT names them.
_INITS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}


def attach_prompt_tuning(model: Any, spec: PromptTuningSpec, base_path: str) -> torch.nn.Module:
    """Put `num_virtual_tokens` learned embeddings in front of the input. Vectors and tokens that
    it starts as are drawn from torch's generator, which the run has seeded."""
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=spec.num_virtual_tokens,
        prompt_tuning_init=_INITS[spec.init],
        prompt_tuning_init_text=spec.init_text,
        tokenizer_name_or_path=base_path if spec.init == "text" else None,
        base_model_name_or_path=base_path,
    )
    return get_peft_model(model, config)


def attach_p_tuning(model: Any, spec: PTuningSpec, base_path: str) -> torch.nn.Module:
    """Put `num_virtual_tokens` embeddings, made by a trained encoder, in front of the input."""
    from peft import PromptEncoderConfig, PromptEncoderReparameterizationType, get_peft_model

    hidden_size: int = model.config.get_text_config().hidden_size
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=spec.num_virtual_tokens,
        encoder_reparameterization_type=PromptEncoderReparameterizationType[spec.encoder.upper()],
        encoder_hidden_size=spec.encoder_hidden_size or hidden_size,
        # PEFT's MLP has a fixed depth and warns of any other than its default.
        encoder_num_layers=spec.encoder_layers if spec.encoder == "lstm" else 2,
        base_model_name_or_path=base_path,
    )
    return get_peft_model(model, config)


def attach_prefix_tuning(model: Any, spec: PrefixTuningSpec, base_path: str) -> torch.nn.Module:
    """Put `num_virtual_tokens` learned keys and values in front of every layer."""
    from peft import PrefixTuningConfig, get_peft_model

    hidden_size: int = model.config.get_text_config().hidden_size
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=spec.num_virtual_tokens,
        prefix_projection=spec.projection,
        encoder_hidden_size=spec.projection_hidden_size or hidden_size,
        base_model_name_or_path=base_path,
    )
    return get_peft_model(model, config)
