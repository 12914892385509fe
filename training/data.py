"""Rows to tokens: rendering, masking, counting what is wrong, writing the tokenised rows.

Loss falls on the response alone. Data is read and written as a stream, once for each fingerprint of
all that shaped it. Knows nothing of models or of Ray.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.base_model import encode_prompt
from cluster.errors import DataError
from cluster.tables import stream_rows
from training.data_spec import DataSpec
from training.formats import detect_format, iterate_rows, response_of
from training.lint import DataReport, Linter
from training.rows import IGNORE, Row, count_learned, row_hash, write_rows

FORMAT = 3  # counts up when a template, the masking or the hashing below changes
_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
_PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
_PROGRESS_S = 5.0


def render_alpaca(row: dict[str, Any], template: str) -> str:
    """An alpaca row as the prompt text in front of its response."""
    given = row.get("input") or ""
    preamble = ""
    if template == "alpaca":
        preamble = _PREAMBLE_WITH_INPUT if given else _PREAMBLE
    block = f"### Input:\n{given}\n\n" if given else ""
    return f"{preamble}### Instruction:\n{row['instruction']}\n\n{block}### Response:\n"


def render_row(row: dict[str, Any], row_format: str, template: str, tokenizer: Any) -> str:
    """A row as text, prompt and response."""
    if row_format == "chat":
        text = _chat(row["messages"], tokenizer, tokenize=False)
        return text.removeprefix(tokenizer.bos_token or "")  # the tokenizer puts it there
    if row_format == "text":
        return row["text"]
    if row_format == "alpaca":
        return render_alpaca(row, template) + row["output"]
    return row["prompt"] + row["completion"]


def tokenize_row(row: dict[str, Any], row_format: str, template: str, tokenizer: Any) -> Row:
    """(ids, labels) of one row; labels are IGNORE wherever nothing is learned."""
    if row_format == "chat":
        return _tokenize_chat(row["messages"], tokenizer)
    end: list[int] = [tokenizer.eos_token_id]
    if row_format == "text":
        ids = encode_prompt(tokenizer, row["text"]) + end
        return ids, list(ids)
    if row_format == "alpaca":
        prompt, response = render_alpaca(row, template), row["output"]
    else:
        prompt, response = row["prompt"], row["completion"]
    # Apart, as at inference: a token never spans the border of prompt and response.
    before = encode_prompt(tokenizer, prompt)
    after = list(tokenizer(response, add_special_tokens=False)["input_ids"]) + end
    return before + after, [IGNORE] * len(before) + after


def tokenize(
    spec: DataSpec,
    tokenizer: Any,
    to: Path,
    *,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Tokenise the data of `spec` into the folder `to`; with `limit`, its first rows only.

    Args:
        on_progress: Called every few seconds with the rows done and the rows in all.

    Raises:
        DataError: nothing can be learned from it, more rows are wrong than `spec.lint` allows
            (not with `limit`, whose rows may not be like the rest), or a cell is.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the base's tokenizer has no end-of-sequence token; set eos_token in it")
    stream = stream_rows(spec.train)
    row_format = detect_format(stream, spec.format)
    linter = Linter(tokenizer)
    rows = islice(iterate_rows(stream, row_format), limit)
    if on_progress:
        rows = _told(rows, stream.num_rows, on_progress)
    write_rows(_kept(rows, row_format, spec, tokenizer, linter), to)
    report = linter.report()
    if report.kept == 0:
        raise DataError(
            f"data {spec.train}: no row is left to learn from ({report.summary()}); "
            "check data.max_length and the response column"
        )
    if report.rows == stream.num_rows:
        report.check(spec.lint, spec.train)
    return report


def _kept(
    rows: Iterator[dict[str, Any]], row_format: str, spec: DataSpec, tokenizer: Any, linter: Linter
) -> Iterator[tuple[list[int], list[int], int]]:
    """The rows that something is learned of, as `write_rows` takes them; counts all of them."""
    counts = linter.counts
    for number, row in enumerate(rows):
        ids, labels = tokenize_row(row, row_format, spec.template, tokenizer)
        linter.look(ids, labels, response_of(row, row_format), row_hash(ids, labels))
        if spec.max_length is not None and len(ids) > spec.max_length:
            if spec.over_long == "fail":
                raise DataError(
                    f"data {spec.train}: row {number} has {len(ids)} tokens, over "
                    f"data.max_length {spec.max_length}; raise it or set data.over_long"
                )
            if spec.over_long == "drop":
                counts["dropped"] += 1
                continue
            counts["truncated"] += 1
            ids, labels = ids[: spec.max_length], labels[: spec.max_length]
        learned = count_learned(labels)
        if learned == 0:
            counts["without_label"] += 1
            continue
        counts["kept"] += 1
        counts["tokens"] += len(ids)
        counts["label_tokens"] += learned
        # Of what is stored: rows that only the cut made alike must not part in the split.
        yield ids, labels, row_hash(ids, labels)


def _told(
    rows: Iterator[dict[str, Any]], num_rows: int, on_progress: Callable[[int, int], None]
) -> Iterator[dict[str, Any]]:
    told = time.monotonic()
    for number, row in enumerate(rows):
        if time.monotonic() - told > _PROGRESS_S:
            told = time.monotonic()
            on_progress(number, num_rows)
        yield row


def fingerprint(spec: DataSpec, base_model: str) -> str:
    """What the tokenised file depends on: the data's bytes, whatever lies beside the base's
    weights, the settings, and how they are read."""
    settings = {"format": FORMAT, "transformers": version("transformers")}
    settings |= spec.model_dump(include={"format", "template", "max_length", "over_long"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    data = Path(spec.train)
    files = sorted(data.rglob("*")) if data.is_dir() else [data]
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
    files += [f for f in sorted(Path(base_model).iterdir()) if f.suffix not in weights]
    for file in files:
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as handle:
                while chunk := handle.read(2**20):
                    digest.update(chunk)
    return digest.hexdigest()[:32]


def _tokenize_chat(messages: list[dict[str, str]], tokenizer: Any) -> Row:
    if not tokenizer.chat_template:
        raise DataError("chat rows need a chat template, and the base's tokenizer has none")
    if "{% generation %}" not in tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}"):
        raise DataError(
            "the base's chat template marks no {% generation %} parts, so what the assistant said "
            "cannot be told from the rest; add the markers to the template"
        )
    encoded = _chat(
        messages, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids: list[int] = list(encoded["input_ids"])
    mask: list[int] = encoded["assistant_masks"]
    return ids, [i if learned else IGNORE for i, learned in zip(ids, mask, strict=True)]


def _chat(messages: list[dict[str, str]], tokenizer: Any, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # templates raise whatever they like about roles and order
        raise DataError(f"the base's chat template refuses a row: {error}") from error
