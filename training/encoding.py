"""What a row becomes for each task, as tokens: the text in front, the text or class learned.

A causal LM reads prompt and response as one row and learns the response; an encoder-decoder has
them apart; a classifier reads the prompt and learns a number. Which columns are which follows from
the format (training.formats). Knows one row at a time; who counts and cuts them is training.data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.base_model import encode_prompt
from cluster.chat import render, template_of
from cluster.errors import ChatTemplateError, DataError
from cluster.tasks import Task
from training.data_spec import DataSpec
from training.formats import answer_of, label_of, response_of
from training.labels import class_number
from training.rows import IGNORE, Row

_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
_PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
_SHOWN_CHARACTERS = 240
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it


class Encoding(Protocol):
    """How the rows of one file are encoded for one task."""

    def encode(self, row: Mapping[str, Any]) -> Row:
        """(ids, labels), uncut; IGNORE wherever nothing is learned. Raises DataError."""
        ...

    def response(self, row: Mapping[str, Any]) -> str:
        """The text without which the row is empty."""
        ...

    def written(self, labels: Sequence[int]) -> Sequence[int] | None:
        """The learned tokens, which an end token should close; None where none are written."""
        ...

    def longest(self, ids: Sequence[int], labels: Sequence[int]) -> int:
        """What `data.max_length` is compared with."""
        ...

    def cut(self, ids: list[int], labels: list[int], limit: int) -> Row:
        """The row with at most so many tokens."""
        ...

    def shown(self, ids: Sequence[int], labels: Sequence[int]) -> str:
        """The row as a line of text, what is learned of it in ⟦ ⟧."""
        ...


@dataclass(frozen=True)
class CausalRows:
    """Prompt and response end to end, with an end token; the response is learned."""

    row_format: str
    template: str
    tokenizer: Any

    def encode(self, row: Mapping[str, Any]) -> Row:
        """See Encoding."""
        if self.row_format == "chat":
            return _tokenize_chat(row, self.tokenizer)
        end: list[int] = [self.tokenizer.eos_token_id]
        if self.row_format == "text":
            ids = encode_prompt(self.tokenizer, row["text"]) + end
            return ids, list(ids)
        # Apart, as at inference: a token never spans the border of prompt and response.
        prompt = prompt_of(row, self.row_format, self.template, self.tokenizer)
        before = encode_prompt(self.tokenizer, prompt)
        response = self.response(row)
        after = list(self.tokenizer(response, add_special_tokens=False)["input_ids"]) + end
        return before + after, [IGNORE] * len(before) + after

    def response(self, row: Mapping[str, Any]) -> str:
        """See Encoding."""
        return response_of(row, self.row_format)

    def written(self, labels: Sequence[int]) -> Sequence[int]:
        """See Encoding."""
        return [label for label in labels if label != IGNORE]

    def longest(self, ids: Sequence[int], labels: Sequence[int]) -> int:
        """See Encoding."""
        return len(ids)

    def cut(self, ids: list[int], labels: list[int], limit: int) -> Row:
        """See Encoding."""
        return ids[:limit], labels[:limit]

    def shown(self, ids: Sequence[int], labels: Sequence[int]) -> str:
        """See Encoding."""
        text, start = "", 0
        while start < len(ids):
            learned, end = labels[start] != IGNORE, start
            while end < len(ids) and (labels[end] != IGNORE) == learned:
                end += 1
            part = _shown(ids[start:end], self.tokenizer)
            text += f"⟦{part}⟧" if learned else part
            start = end
        return text


@dataclass(frozen=True)
class PairedRows:
    """An encoder-decoder's source and target, each as the tokenizer encodes it, with its own
    opening and closing tokens; `max_length` holds for each of the two."""

    row_format: str
    template: str
    tokenizer: Any

    def encode(self, row: Mapping[str, Any]) -> Row:
        """See Encoding."""
        prompt = prompt_of(row, self.row_format, self.template, self.tokenizer)
        source = list(self.tokenizer(prompt)["input_ids"])
        target = list(self.tokenizer(text_target=self.response(row))["input_ids"])
        if self.tokenizer.eos_token_id not in target:
            target.append(self.tokenizer.eos_token_id)
        return source, target

    def response(self, row: Mapping[str, Any]) -> str:
        """See Encoding."""
        return answer_of(row, self.row_format)

    def written(self, labels: Sequence[int]) -> Sequence[int]:
        """See Encoding."""
        return labels

    def longest(self, ids: Sequence[int], labels: Sequence[int]) -> int:
        """See Encoding."""
        return max(len(ids), len(labels))

    def cut(self, ids: list[int], labels: list[int], limit: int) -> Row:
        """See Encoding. A cut target keeps no end token: it does not end there."""
        return _closed(ids, limit, self.tokenizer), labels[:limit]

    def shown(self, ids: Sequence[int], labels: Sequence[int]) -> str:
        """See Encoding."""
        return f"{_shown(ids, self.tokenizer)}⟦{_shown(labels, self.tokenizer)}⟧"


@dataclass(frozen=True)
class LabelledRows:
    """A classifier's text, as the tokenizer encodes it, and the number of its class."""

    row_format: str
    template: str
    tokenizer: Any
    labels: Sequence[str]

    def encode(self, row: Mapping[str, Any]) -> Row:
        """See Encoding."""
        found = label_of(row, self.row_format)
        number = IGNORE if found is None else class_number(found, self.labels)
        return list(self.tokenizer(self.response(row))["input_ids"]), [number]

    def response(self, row: Mapping[str, Any]) -> str:
        """See Encoding."""
        if self.row_format == "text":
            return row["text"]
        return prompt_of(row, self.row_format, self.template, self.tokenizer)

    def written(self, labels: Sequence[int]) -> None:
        """See Encoding."""

    def longest(self, ids: Sequence[int], labels: Sequence[int]) -> int:
        """See Encoding."""
        return len(ids)

    def cut(self, ids: list[int], labels: list[int], limit: int) -> Row:
        """See Encoding."""
        return _closed(ids, limit, self.tokenizer), labels

    def shown(self, ids: Sequence[int], labels: Sequence[int]) -> str:
        """See Encoding."""
        name = "no label" if labels[0] == IGNORE else self.labels[labels[0]]
        return f"{_shown(ids, self.tokenizer)}⟦{name}⟧"


def encoding(task: Task, row_format: str, spec: DataSpec, tokenizer: Any) -> Encoding:
    """That of a task, for rows of a format."""
    if task == "sequence_classification":
        return LabelledRows(row_format, spec.template, tokenizer, spec.labels)
    return {"causal_lm": CausalRows, "seq_2_seq_lm": PairedRows}[task](
        row_format, spec.template, tokenizer
    )


def render_alpaca(row: Mapping[str, Any], template: str) -> str:
    """An alpaca row as the prompt text in front of its response."""
    given = row.get("input") or ""
    preamble = ""
    if template == "alpaca":
        preamble = _PREAMBLE_WITH_INPUT if given else _PREAMBLE
    block = f"### Input:\n{given}\n\n" if given else ""
    return f"{preamble}### Instruction:\n{row['instruction']}\n\n{block}### Response:\n"


def render_row(row: Mapping[str, Any], row_format: str, template: str, tokenizer: Any) -> str:
    """A row as text, prompt and response."""
    if row_format == "chat":
        return _chat_text(row, tokenizer)
    if row_format == "text":
        return row["text"]
    return prompt_of(row, row_format, template, tokenizer) + response_of(row, row_format)


def prompt_of(row: Mapping[str, Any], row_format: str, template: str, tokenizer: Any) -> str:
    """The text in front of a row's answer: of a chat, all turns but the last.

    Raises:
        DataError: the last turn is not the assistant's.
    """
    if row_format == "alpaca":
        return render_alpaca(row, template)
    if row_format == "prompt_completion":
        return row["prompt"]
    *before, last = row["messages"]
    if last["role"] != "assistant" or not before:
        raise DataError(
            "a chat row must end with the assistant's turn, which is what is learned, behind "
            "another; drop the turns behind it"
        )
    return _chat_text({**row, "messages": before}, tokenizer, add_generation_prompt=True)


def _closed(ids: list[int], limit: int, tokenizer: Any) -> list[int]:
    """`ids` cut to `limit`, with the special token by which they close, if they do."""
    if len(ids) <= limit or ids[-1] not in tokenizer.all_special_ids:
        return ids[:limit]
    return [*ids[: limit - 1], ids[-1]]


def _shown(ids: Sequence[int], tokenizer: Any) -> str:
    """Text on one line; a long one is cut in the middle."""
    part = tokenizer.decode(list(ids)).replace("\n", "↵")
    half = _SHOWN_CHARACTERS // 2
    return part if len(part) <= _SHOWN_CHARACTERS else f"{part[:half]} … {part[-half:]}"


def _tokenize_chat(row: Mapping[str, Any], tokenizer: Any) -> Row:
    if not _GENERATION.search(_of_chat(template_of, row, tokenizer)):
        raise DataError(
            "the base's chat template marks no {% generation %} parts, so what the assistant said "
            "cannot be told from the rest; add the markers to the template"
        )
    encoded = _of_chat(
        render, row, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids: list[int] = list(encoded["input_ids"])
    mask: list[int] = encoded["assistant_masks"]
    return ids, [i if learned else IGNORE for i, learned in zip(ids, mask, strict=True)]


def _chat_text(row: Mapping[str, Any], tokenizer: Any, **options: Any) -> str:
    text: str = _of_chat(render, row, tokenizer, tokenize=False, **options)
    return text.removeprefix(tokenizer.bos_token or "")  # the tokenizer puts it there


def _of_chat(
    ask: Callable[..., Any], row: Mapping[str, Any], tokenizer: Any, **options: Any
) -> Any:
    try:
        return ask(tokenizer, row["messages"], row.get("tools"), **options)
    except ChatTemplateError as error:
        raise DataError(error.message) from error
