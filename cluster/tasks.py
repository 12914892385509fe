"""What a model is asked to do, and which of transformers' classes does it.

Imports torch and transformers only when a function needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from cluster.errors import BaseModelError

Task = Literal["causal_lm", "seq_2_seq_lm", "sequence_classification"]
TASKS: tuple[Task, ...] = get_args(Task)
PEFT_TASK_TYPES: dict[Task, str] = {
    "causal_lm": "CAUSAL_LM",
    "seq_2_seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
}


def auto_model(
    path: str, config: Any, task: Task, labels: Sequence[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """The Auto class by which the base at `path`, of this config, is loaded for `task`, and what
    its `from_pretrained` takes besides; `labels` are the classes' names, in order.

    Raises:
        BaseModelError: this architecture is for another task.
    """
    import transformers

    reason = _misfit(config, task)
    if reason is not None:
        name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        raise BaseModelError(f"base_model {path}: {name} {reason}")
    if task == "causal_lm":
        return transformers.AutoModelForCausalLM, {}
    if task == "seq_2_seq_lm":
        return transformers.AutoModelForSeq2SeqLM, {}
    names = dict(enumerate(labels))
    numbers = {name: number for number, name in names.items()}
    options = {"num_labels": len(labels), "id2label": names, "label2id": numbers}
    return transformers.AutoModelForSequenceClassification, options


def _misfit(config: Any, task: Task) -> str | None:
    """Why an architecture is not for a task, and what to do; None if it is."""
    from transformers.models.auto import modeling_auto as known

    kind = type(config)
    if config.is_encoder_decoder:
        if task == "causal_lm":
            return (
                "is an encoder-decoder, and task causal_lm takes a decoder alone; set task to "
                "seq_2_seq_lm, or name a causal LM"
            )
        if task == "sequence_classification":
            return (
                "is an encoder-decoder, whose class is read at its end token and whose head PEFT "
                "does not save; set task to seq_2_seq_lm, which learns the label as text, or name "
                "an encoder or a causal LM"
            )
        return None
    if task == "seq_2_seq_lm":
        return (
            "is no encoder-decoder (T5, mT5, BART, …), which task seq_2_seq_lm takes; set task to "
            "causal_lm, or name another base"
        )
    if task == "sequence_classification":
        if kind in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return None
        return "has no class for sequence_classification in transformers; name another base"
    # transformers would load an encoder as a causal LM that sees what comes after each token.
    sees_all = not getattr(config, "is_decoder", False)
    sees_all = sees_all and kind in known.MODEL_FOR_MASKED_LM_MAPPING
    if sees_all and (getattr(config, "architectures", None) or [""])[0] not in _CAUSAL_CLASSES:
        return (
            "is an encoder, whose tokens see those behind them, and task causal_lm takes a "
            "decoder; set task to sequence_classification, or name a causal LM"
        )
    return None


# Families of both kinds, whose saved class alone tells which: these are causal as they are saved.
_CAUSAL_CLASSES = ("XLMWithLMHeadModel", "ReformerModelWithLMHead")


def missing_outside_head(model: Any, missing: Sequence[str]) -> list[str]:
    """Those of a classifier's `missing` weights that are not of its head: what is in no base
    checkpoint, and in no adapter, would be other random numbers at each load."""
    body = f"{model.base_model_prefix}."
    return sorted(name for name in missing if name.startswith(body))


def head_modules(model: Any) -> dict[str, Any]:
    """The modules, by name, that a classifier has beside the body that it shares with other
    tasks: what is trained and saved whole by every method. Empty for other models."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return {}
    return {
        name: module
        for name, module in model.named_children()
        if name != model.base_model_prefix and next(module.parameters(), None) is not None
    }


def peft_task_type(model: Any) -> str:
    """The task of a transformers model, as PEFT writes it into an adapter's config."""
    return PEFT_TASK_TYPES[task_of(model)]


def unused_positions(model: Any) -> int:
    """How many of the positions that a config allows no token takes: RoBERTa and its like count
    from behind the padding token's number."""
    for name, module in model.named_modules():
        skipped = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and skipped is not None:
            return skipped + 1
    return 0


def task_of(model: Any) -> Task:
    """The task of a transformers model."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "sequence_classification"
    return "seq_2_seq_lm" if model.config.is_encoder_decoder else "causal_lm"
