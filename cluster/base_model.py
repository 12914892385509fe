"""The base model and its tokenizer from a folder; never from a hub, never a pickle.

Imports torch and transformers only when a function needs them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import BaseModelError
from cluster.quantization import QuantizationSpec, saved_quantization
from cluster.tasks import Task, auto_model, head_modules, missing_outside_head

if TYPE_CHECKING:
    import torch

# PEFT and transformers import bitsandbytes, which on some CPUs warns that a kernel to be downloaded
# is missing; it is not used (see cluster.quantized_linear).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def check_base_folder(path: str, *, with_tokenizer: bool) -> None:
    """Raise BaseModelError unless `path` is a whole base-model folder; loads nothing."""
    folder = Path(path)
    quantization_of(path)
    if not any(folder.glob("*.safetensors")):
        raise BaseModelError(f"base_model {path}: has no .safetensors weights; pickles are refused")
    if with_tokenizer and not any(folder.glob("tokenizer*")):
        raise BaseModelError(
            f"base_model {path}: has no tokenizer files; save the tokenizer into the folder too"
        )


def quantization_of(path: str, asked: QuantizationSpec | None = None) -> QuantizationSpec | None:
    """How the base in the folder at `path` is kept when it is loaded: as it was saved quantised,
    else as `asked`; None for plainly.

    Raises:
        BaseModelError: the folder has no sound config.json, is of another library's quantisation,
            or was saved otherwise than asked.
    """
    saved = saved_quantization(path, _config_file(path))
    if saved is not None and asked is not None and str(saved) != str(asked):
        raise BaseModelError(
            f"base_model {path}: was saved quantised to {saved}, so quantization cannot be "
            f"{asked}; leave quantization out, or name the plain base"
        )
    return saved or asked


def _config_file(path: str) -> dict[str, Any]:
    folder = Path(path)
    if not folder.is_dir():
        raise BaseModelError(f"base_model {path}: is not a folder; download the model first")
    try:
        config: Any = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"base_model {path}: has no readable config.json; name the folder that "
            "save_pretrained wrote"
        ) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BaseModelError(f"base_model {path}: config.json names no model_type")
    return config


def base_config(path: str, **options: Any) -> Any:
    """The transformers config of the base at `path`, with `options` in it.

    Raises:
        BaseModelError: there is none, or transformers does not know its kind.
    """
    from transformers import AutoConfig

    _config_file(path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"base_model {path}: its config does not load: {error}") from error


def context_tokens(path: str) -> int | None:
    """The longest sequence that the base's config allows, or None if it tells none. Raises
    BaseModelError."""
    return longest_context(base_config(path))


def rescaled_rope(config: Any) -> tuple[str, int | None] | None:
    """The kind of a rotary embedding that turns all rows of a batch by the longest of them, and the
    tokens up to which it does not, where that is told; None of any other."""
    rope: dict[str, Any] = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind not in ("longrope", "dynamic"):
        return None
    return kind, rope.get("original_max_position_embeddings")


def longest_context(config: Any) -> int | None:
    """The tokens that a transformers config allows, under either of its names; None if it tells
    none."""
    text = config.get_text_config()
    found: Any = getattr(text, "max_position_embeddings", None)
    return getattr(text, "max_seq_len", None) if found is None else found


def load_tokenizer(path: str) -> Any:
    """The base's tokenizer. Raises BaseModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exceptions for a damaged file
        raise BaseModelError(
            f"base_model {path}: its tokenizer does not load ({error}); save it there anew"
        ) from error
    config = base_config(path)
    # An encoder reads a whole text, its end with it.
    tokenizer.closes_prompts = config.is_encoder_decoder
    # Tokens may have been added since the base was made; some configs tell no size.
    tokenizer.base_vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    return tokenizer


def encode_prompt(tokenizer: Any, text: str, *, is_whole: bool = True) -> list[int]:
    """The ids of a prompt: with the tokenizer's opening tokens, without a closing one unless an
    encoder reads it and it `is_whole` (nothing follows)."""
    ids = encode_text(tokenizer, text)
    if is_whole and getattr(tokenizer, "closes_prompts", False):
        return ids
    if (
        len(ids) > 1
        and ids[-1] == tokenizer.eos_token_id
        and not text.endswith(tokenizer.eos_token)
    ):
        ids.pop()
    return ids


def encode_text(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """The ids of a text that nothing follows, with all the tokenizer's tokens unless those that are
    `special` are left out: what an embedding is of. Bases that embed are trained with their closing
    token, whose state they put it in."""
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def load_base(
    path: str,
    dtype: torch.dtype,
    quantization: QuantizationSpec | None = None,
    device: torch.device | None = None,
    *,
    task: Task = "causal_lm",
    labels: Sequence[str] = (),
    **options: Any,
) -> Any:
    """The model with its weights, its products on CPU by cluster.linear; a classifier's head that
    the folder lacks starts at random, drawn from torch's generator.

    Args:
        quantization: Of its linear modules; a folder that was saved quantised stays as it is.
        device: Where it will be, CPU if not given. Only a quantised one is put there at once.
        task: What it is to do.
        labels: The classes' names, in order, of `sequence_classification`.
        options: Further ones of `from_pretrained`, such as `attn_implementation`.

    Raises:
        BaseModelError: it cannot be loaded, is for another task, or lacks weights that no head is.
    """
    from safetensors import SafetensorError

    from cluster.linear import adopt

    check_base_folder(path, with_tokenizer=False)
    auto, asked = auto_model(path, base_config(path), task, labels)
    found = quantization_of(path, quantization)
    _check_plain(path, task, found)
    if found is not None:
        # A folder that was saved quantised tells how itself.
        own = quantization_of(path) is not None
        options |= _quantized_options(None if own else found, device)
    try:
        model, loaded = auto.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **asked,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"base_model {path}: cannot be loaded: {error}") from error
    lacking = missing_outside_head(model, loaded["missing_keys"]) if labels else []
    if lacking:
        raise BaseModelError(
            f"base_model {path}: lacks {', '.join(lacking)}, which would be random numbers that no "
            "adapter holds; name a base that was saved with them"
        )
    adopt(model)
    if found is not None:
        from cluster.quantized_linear import settle

        settle(model)
    return model


def _check_plain(path: str, task: Task, quantization: QuantizationSpec | None) -> None:
    if quantization is not None and task == "sequence_classification":
        raise BaseModelError(
            f"base_model {path}: is quantised to {quantization}, over which no classifier trains; "
            "name the plain base"
        )


def _quantized_options(
    quantization: QuantizationSpec | None, device: torch.device | None
) -> dict[str, Any]:
    """What `from_pretrained` needs for it; None where the folder tells how."""
    options: dict[str, Any] = {"device_map": {"": "cpu" if device is None else str(device)}}
    if quantization is not None:
        options["quantization_config"] = bitsandbytes_config(quantization)
    return options


def bitsandbytes_config(quantization: QuantizationSpec) -> Any:
    """The same as transformers' BitsAndBytesConfig."""
    from transformers import BitsAndBytesConfig

    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type or "nf4",
        bnb_4bit_use_double_quant=quantization.double_quant is not False,
    )


def empty_base(path: str, task: Task = "causal_lm", labels: Sequence[str] = ()) -> Any:
    """The model's structure without weights (meta device): what a plan needs. Raises
    BaseModelError, as `load_base`; also for a classifier's head of another number of classes."""
    import torch

    check_base_folder(path, with_tokenizer=False)
    auto, asked = auto_model(path, base_config(path), task, labels)
    _check_plain(path, task, quantization_of(path))
    try:
        with torch.device("meta"):
            model = auto.from_config(base_config(path, **asked))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base_model {path}: does not fit task {task}: {error}") from error
    if labels:
        _check_head(path, model, len(labels))
    return model


def _check_head(path: str, model: Any, classes: int) -> None:
    """Raise BaseModelError if the folder has a head that is not of so many classes. Reads the
    weights' headers: configs tell a number of classes without a head too."""
    from safetensors import SafetensorError, safe_open

    sizes = {
        f"{name}.{part}": list(parameter.shape)
        for name, module in head_modules(model).items()
        for part, parameter in module.named_parameters()
    }
    try:
        for file in sorted(Path(path).glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                held = set(opened.keys())
                for key, size in sizes.items():
                    if key in held and (saved := opened.get_slice(key).get_shape()) != size:
                        raise BaseModelError(
                            f"base_model {path}: its classifier's {key} is {saved}, where "
                            f"{classes} classes take {size}; save it without that head "
                            "(transformers.AutoModel), which then starts anew, or train on as many "
                            "classes as it has"
                        )
    except (OSError, SafetensorError) as error:
        raise BaseModelError(f"base_model {path}: cannot be loaded: {error}") from error
