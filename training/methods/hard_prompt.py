"""Hard prompts: in-context demonstrations as an adapter, for comparison with what is trained.

The published folder is an ordinary prompt-tuning one whose vectors are the base's embeddings of
the demonstrations' tokens, so whatever loads prompt tuning runs it, and exactly. Which rows they
are is settled when the job is resolved; from then on the method is a text.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch

from cluster.base_model import encode_prompt, load_tokenizer
from cluster.errors import SpecError
from cluster.tables import stream_rows
from cluster.tasks import peft_task_type
from training.data_spec import DataSpec
from training.encoding import render_row
from training.formats import detect_format, iterate_rows
from training.method_spec import HardPromptSpec
from training.methods.soft_prompt import attention_heads


def attach(model: Any, spec: HardPromptSpec, base_path: str) -> torch.nn.Module:
    """Put the embeddings of `spec.text` in front of the input; nothing is left to train."""
    from peft import PromptTuningConfig, get_peft_model

    if spec.text is None:
        raise SpecError("method.text: is made of the data's rows first; see training.command")
    config = PromptTuningConfig(
        task_type=peft_task_type(model),
        # PEFT cuts its tokens to so many: the closing one, where there is one, goes.
        num_virtual_tokens=count_tokens(spec.text, load_tokenizer(base_path)),
        num_transformer_submodules=1,  # an encoder-decoder's prompt is the encoder's alone
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=spec.text,
        tokenizer_name_or_path=base_path,
        num_attention_heads=attention_heads(model),
        base_model_name_or_path=base_path,
    )
    return get_peft_model(model, config).requires_grad_(False)


def count_tokens(text: str, tokenizer: Any) -> int:
    """How many positions `text` takes in front of a prompt, with the tokenizer's opening tokens."""
    return len(encode_prompt(tokenizer, text, is_whole=False))


def with_text(spec: HardPromptSpec, data: DataSpec, seed: int, tokenizer: Any) -> HardPromptSpec:
    """`spec` with its text, which is a pure function of the arguments and the data.

    Raises:
        SpecError: the data has fewer rows, or a share of them validates.
        DataError: one of them is wrong.
    """
    if spec.text is not None:
        return spec
    if isinstance(data.validation, float):
        raise SpecError(
            f"data.validation: {data.validation} is a share of the rows that a hard_prompt's "
            "demonstrations are drawn from, so they could be validated; name a file, or give "
            "method.text"
        )
    stream = stream_rows(data.train)
    row_format = detect_format(stream, data.format)
    count = spec.demonstrations
    if count > stream.num_rows:
        raise SpecError(
            f"method.demonstrations is {count}, and data {data.train} has {stream.num_rows} rows; "
            "lower it"
        )
    chosen = list(range(count))
    if spec.choose == "random":
        drawn = np.random.default_rng([seed, count]).choice(stream.num_rows, count, replace=False)
        chosen = drawn.tolist()
    rows = islice(iterate_rows(stream, row_format), max(chosen) + 1)
    wanted = {number: row for number, row in enumerate(rows) if number in set(chosen)}
    texts = [render_row(wanted[number], row_format, data.template, tokenizer) for number in chosen]
    return spec.model_copy(update={"text": "".join(text + spec.separator for text in texts)})
