"""A training job's YAML on data and evaluation. Every field's description is its reference."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from cluster.spec import Spec

Limit = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
_NUMBER = re.compile(r"\d*\.?\d+(e[+-]?\d+)?", re.IGNORECASE)


class LintSpec(Spec):
    """Shares of rows over which the job fails before a worker starts; 1 never fails."""

    empty: Limit = Field(0.05, description="Rows whose response or text is blank.")
    without_label: Limit = Field(
        0.05, description="Rows left out, since nothing is learned, or no class is named."
    )
    truncated: Limit = Field(0.5, description="Rows cut to `max_length`.")
    dropped: Limit = Field(0.5, description="Rows left out for being over `max_length`.")
    duplicate: Limit = Field(0.5, description="Rows that repeat another one, token by token.")
    missing_bos: Limit = Field(
        0.1, description="Rows without the opening token that the tokenizer puts before prompts."
    )
    doubled_bos: Limit = Field(0.1, description="Rows that open with two of them.")
    missing_eos: Limit = Field(
        0.1, description="Rows whose learned part holds no end token: generation would not stop."
    )
    doubled_eos: Limit = Field(0.1, description="Rows whose learned part ends with two of them.")


class DataSpec(Spec):
    """Where the rows are, and how they become tokens."""

    train: str = Field(
        description="Folder of `save_to_disk` or of Parquet shards, or a file of Arrow IPC, "
        "Parquet or JSONL; on storage that every node sees."
    )
    format: Literal["auto", "alpaca", "prompt_completion", "chat", "text"] = Field(
        "auto",
        description="What the columns mean: instruction/input/output, prompt/completion, messages, "
        "or text. `auto` tells by their names. Beside messages, `tools` has what the assistant may "
        "call in that row: OpenAI's list, or it as JSON text; a message with `tool_calls` needs no "
        "content. The base's chat template renders both, and the assistant's turns are learned. An "
        "encoder-decoder's source is what stands before the output, completion or last message, "
        "and that its target. A classifier reads the same, or text, and learns the output, "
        "completion, last message, or label: a name, or the number of one.",
    )
    labels: tuple[str, ...] = Field(
        (),
        description="Names of a classifier's classes, in the order of their numbers. If not given: "
        "those of the training rows, sorted; rows that have numbers must have all from 0.",
    )
    template: Literal["alpaca", "alpaca_short"] = Field(
        "alpaca", description="Layout of alpaca rows; `alpaca_short` leaves out the preamble."
    )
    max_length: PositiveInt | None = Field(
        None,
        description="Longest row, in tokens; of an encoder-decoder, longest source and longest "
        "target. If not given: what the base's context leaves beside the method's virtual tokens, "
        "at most 2,048.",
    )
    over_long: Literal["truncate", "drop", "fail"] = Field(
        "truncate", description="What becomes of a longer row; counted in the log."
    )
    validation: str | Share | None = Field(
        None,
        description="Rows to evaluate on: a path as `train`, or a share of its rows, which are "
        "then not trained on. Which ones follows from `seed` and the rows' own tokens.",
    )
    lint: LintSpec = Field(
        default_factory=lambda: LintSpec.model_validate({}),
        description="How much of the data may be wrong.",
    )

    @field_validator("validation", mode="before")
    @classmethod
    def _share_or_path(cls, value: Any) -> Any:
        # YAML takes 5e-2, without a point, for text.
        return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


class EvaluationSpec(Spec):
    """How the validation rows are used; nothing of it happens without `data.validation`."""

    every_steps: PositiveInt | None = Field(
        None, description="Optimiser steps between evaluations; there is always one at the end."
    )
    generations: NonNegativeInt = Field(
        8,
        description="Validation rows answered greedily, for exact match and ROUGE-L; a classifier "
        "answers all.",
    )
    max_new_tokens: PositiveInt = Field(64, description="Longest answer, in tokens.")
    shown: NonNegativeInt = Field(2, description="Answers printed in the log each time.")
    best: Literal["loss", "exact_match", "rouge_l", "accuracy", "macro_f1", "none"] = Field(
        "loss",
        description="By what the published weights are chosen; `none` takes the last ones. A "
        "classifier has accuracy and macro F1, other tasks have exact match and ROUGE-L.",
    )
    patience: PositiveInt | None = Field(
        None, description="Evaluations without a better one after which training ends early."
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationSpec:
        if self.best in ("exact_match", "rouge_l") and not self.generations:
            raise ValueError(f"best: {self.best} needs generations of at least 1")
        if self.patience and (self.best == "none" or self.every_steps is None):
            raise ValueError("patience needs every_steps, and a best other than none")
        return self
