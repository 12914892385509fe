"""Which methods and settings a task has, told before anything is read.

A method that is not defined for a task is refused by name, with the reason and what to take
instead; docs and tests read the same table.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.tasks import Task
from training.data_spec import DataSpec, EvaluationSpec

# (task, kind of method) -> why it is not defined there, and what to do.
UNDEFINED: Mapping[tuple[Task, str], str] = {
    ("seq_2_seq_lm", "llama_adapter"): "gates a prompt in the attention of a decoder alone (PEFT "
    "has it for llama, mistral and gpt2); take prefix_tuning, which prompts every decoder layer",
    ("seq_2_seq_lm", "proxy_tuning"): "adds the logits of a small causal LM to those of a large "
    "one; take another method, or a causal base with task causal_lm",
    ("sequence_classification", "llama_adapter"): "neither trains nor saves a classifier's head in "
    "PEFT; take prefix_tuning, which prompts every layer too",
    ("sequence_classification", "proxy_tuning"): "changes the next token's logits, of which a "
    "classifier has none; take another method, or task causal_lm with the label as the answer",
    ("sequence_classification", "hard_prompt"): "trains nothing, so the new head would stay as "
    "random as it starts; take prompt_tuning with init: text, or task causal_lm with the label as "
    "the answer",
}
_WRITTEN, _CLASSIFIED = ("exact_match", "rouge_l"), ("accuracy", "macro_f1")


def check_task(task: Task, kind: str, data: DataSpec, evaluation: EvaluationSpec) -> None:
    """Raise ValueError, as pydantic's validators do, for what does not fit `task`."""
    reason = UNDEFINED.get((task, kind))
    if reason is not None:
        raise ValueError(f"method {kind} is not defined for task {task}: it {reason}")
    is_classifier = task == "sequence_classification"
    if data.format == "text" and task == "seq_2_seq_lm":
        raise ValueError(
            "data.format text has no source for task seq_2_seq_lm; take prompt_completion, alpaca "
            "or chat, or task causal_lm"
        )
    if data.labels and not is_classifier:
        raise ValueError(f"data.labels: task {task} has no classes; leave them out, or set task")
    if len(set(data.labels)) != len(data.labels) or len(data.labels) == 1:
        raise ValueError("data.labels: a classifier needs at least two names, all different")
    strange = _WRITTEN if is_classifier else _CLASSIFIED
    if evaluation.best in strange:
        known = ", ".join(("loss", *(_CLASSIFIED if is_classifier else _WRITTEN), "none"))
        raise ValueError(f"evaluation.best {evaluation.best} is not of task {task}; take {known}")
