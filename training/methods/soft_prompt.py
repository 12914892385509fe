"""Prompt tuning, P-tuning, prefix tuning and P-tuning v2 through PEFT.

P-tuning v2's deep prompts are prefix tuning without projection, one set of keys and values for
each layer (arXiv:2110.07602, section 3.2), so it needs no code of its own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from cluster.errors import SpecError
from cluster.tasks import head_modules, peft_task_type
from training.method_spec import PrefixTuningSpec, PromptTuningSpec, PTuningSpec
from training.methods.placement import in_float32

# As PEFT names them.
_INITS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}


def attach_prompt_tuning(model: Any, spec: PromptTuningSpec, base_path: str) -> torch.nn.Module:
    """Put `num_virtual_tokens` learned embeddings in front of the input. Vectors and tokens that
    it starts as are drawn from torch's generator, which the run has seeded."""
    from peft import PromptTuningConfig

    config = PromptTuningConfig(
        **_shared(model),
        num_transformer_submodules=1,  # an encoder-decoder's prompt is the encoder's alone
        num_virtual_tokens=spec.num_virtual_tokens,
        prompt_tuning_init=_INITS[spec.init],
        prompt_tuning_init_text=spec.init_text,
        tokenizer_name_or_path=base_path if spec.init == "text" else None,
        num_attention_heads=attention_heads(model),
        base_model_name_or_path=base_path,
    )
    return _attached(model, config, base_path)


def attach_p_tuning(model: Any, spec: PTuningSpec, base_path: str) -> torch.nn.Module:
    """Put `num_virtual_tokens` embeddings, made by a trained encoder, in front of the input."""
    from peft import PromptEncoderConfig, PromptEncoderReparameterizationType

    hidden_size: int = model.config.get_text_config().hidden_size
    config = PromptEncoderConfig(
        **_shared(model),
        num_transformer_submodules=1,
        num_virtual_tokens=spec.num_virtual_tokens,
        encoder_reparameterization_type=PromptEncoderReparameterizationType[spec.encoder.upper()],
        encoder_hidden_size=spec.encoder_hidden_size or hidden_size,
        # PEFT's MLP has a fixed depth and warns of any other than its default.
        encoder_num_layers=spec.encoder_layers if spec.encoder == "lstm" else 2,
        num_attention_heads=attention_heads(model),
        base_model_name_or_path=base_path,
    )
    return _attached(model, config, base_path)


def attach_prefix_tuning(model: Any, spec: PrefixTuningSpec, base_path: str) -> torch.nn.Module:
    """Put `num_virtual_tokens` learned keys and values in front of every layer; of an
    encoder-decoder, in front of the decoder's own attention (PEFT's choice).

    Raises:
        SpecError: the base takes none.
    """
    from peft import PrefixTuningConfig

    _check_takes_prefix(model, base_path)
    text: Any = model.config.get_text_config()
    heads, hidden_size = attention_heads(model), text.hidden_size
    shape: dict[str, Any] = {"num_attention_heads": heads}
    if heads and _has_one_key_head(text):
        shape = {"num_attention_heads": 1, "token_dim": hidden_size // heads}
    config = PrefixTuningConfig(
        **_shared(model),
        num_virtual_tokens=spec.num_virtual_tokens,
        prefix_projection=spec.projection,
        encoder_hidden_size=spec.projection_hidden_size or hidden_size,
        base_model_name_or_path=base_path,
        **shape,
    )
    return _attached(model, config, base_path)


def _shared(model: Any) -> dict[str, Any]:
    """What all of them tell PEFT of the base."""
    return {
        "task_type": peft_task_type(model),
        "modules_to_save": list(head_modules(model)) or None,
    }


def _attached(model: Any, config: Any, base_path: str) -> torch.nn.Module:
    from peft import get_peft_model

    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise SpecError(
            f"method: PEFT refuses it on {base_path} ({error}); use lora or ia3, which name modules"
        ) from error
    return in_float32(adapted)


def _check_takes_prefix(model: Any, base_path: str) -> None:
    """A classifier's body gets it as a cache of keys and values, which some encoders have not; and
    PEFT's are as wide as each other, where DeepSeek's keys have a rotated part more."""
    if hasattr(model.config.get_text_config(), "qk_rope_head_dim"):
        raise SpecError(
            f"method: keys and values of {base_path} ({type(model).__name__}) differ in width, and "
            "PEFT's prefixes do not; use prompt_tuning or p_tuning"
        )
    body = getattr(model, model.base_model_prefix, model)
    if head_modules(model) and "past_key_values" not in inspect.signature(body.forward).parameters:
        raise SpecError(
            f"method: {type(model).__name__} of {base_path} takes no prefix of keys and values; "
            "use prompt_tuning or p_tuning"
        )


def attention_heads(model: Any) -> int | None:
    """By transformers' name for it in any family; PEFT knows some families' own names alone."""
    return getattr(model.config.get_text_config(), "num_attention_heads", None)


def _has_one_key_head(text: Any) -> bool:
    """In Falcon's words for it: PEFT knows num_key_value_heads alone."""
    is_falcon = text.model_type == "falcon"
    return is_falcon and text.multi_query and not text.new_decoder_architecture
