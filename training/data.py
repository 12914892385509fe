"""Rows to tokens: rendering, masking, the tokenised Arrow file, and the order of batches.

Loss falls on the response alone. Data is tokenised once into an Arrow file in the store, named
by the fingerprint of all that shaped it; workers memory-map it. The order of rows is a pure
function of (seed, epoch), so it needs no state. Knows nothing of models or of Ray.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from cluster.base_model import encode_prompt
from cluster.errors import DataError
from cluster.tables import open_table
from training.formats import detect_format, iterate_rows
from training.spec import DataSpec

IGNORE = -100
FORMAT = 1  # counts up when a template or the masking below changes
_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
_PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
# Batches are formed of rows of like length among so many batches' worth of shuffled rows.
_BUCKET_BATCHES = 32
TOKENS_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class DataReport:
    """What became of the rows."""

    rows: int
    kept: int
    truncated: int
    dropped: int
    without_label: int
    tokens: int
    label_tokens: int

    def summary(self) -> str:
        """One line for the plan and the log."""
        parts = [f"{self.kept:,} of {self.rows:,} rows", f"{self.tokens:,} tokens"]
        parts.append(f"{self.label_tokens:,} learned")
        for name in ("truncated", "dropped", "without_label"):
            count = getattr(self, name)
            if count:
                parts.append(f"{count:,} {name.replace('_', ' ')}")
        return ", ".join(parts)


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


def tokenize_row(
    row: dict[str, Any], row_format: str, template: str, tokenizer: Any
) -> tuple[list[int], list[int]]:
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


def tokenize(spec: DataSpec, tokenizer: Any, to: Path, *, limit: int | None = None) -> DataReport:
    """Tokenise the data of `spec` into the Arrow stream `to`; with `limit`, its first rows only.

    Raises:
        DataError: nothing can be learned from it, or a row is wrong.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the base's tokenizer has no end-of-sequence token; set eos_token in it")
    table = open_table(spec.train)
    row_format = detect_format(table, spec.format, spec.train)
    if limit is not None:
        table = table.slice(0, limit)
    counts = dict.fromkeys(("truncated", "dropped", "without_label", "tokens", "label_tokens"), 0)
    kept = 0
    with pa.OSFile(str(to), "wb") as sink, pyarrow.ipc.new_stream(sink, TOKENS_SCHEMA) as writer:
        chunk: list[dict[str, list[int]]] = []
        for number, row in enumerate(iterate_rows(table, row_format, spec.train)):
            ids, labels = tokenize_row(row, row_format, spec.template, tokenizer)
            if spec.max_length is not None and len(ids) > spec.max_length:
                if spec.over_long == "fail":
                    raise DataError(
                        f"data {spec.train}: row {number} has {len(ids)} tokens, over "
                        f"data.max_length {spec.max_length}; raise it or set data.over_long"
                    )
                kind = "dropped" if spec.over_long == "drop" else "truncated"
                counts[kind] += 1
                if kind == "dropped":
                    continue
                ids, labels = ids[: spec.max_length], labels[: spec.max_length]
            # The first token is predicted from nothing, so its label teaches nothing.
            learned = sum(label != IGNORE for label in labels[1:])
            if learned == 0:
                counts["without_label"] += 1
                continue
            counts["tokens"] += len(ids)
            counts["label_tokens"] += learned
            kept += 1
            chunk.append({"input_ids": ids, "labels": labels})
            if len(chunk) == 1024:
                writer.write_table(pa.Table.from_pylist(chunk, TOKENS_SCHEMA))
                chunk = []
        writer.write_table(pa.Table.from_pylist(chunk, TOKENS_SCHEMA))
    report = DataReport(rows=table.num_rows, kept=kept, **counts)
    if kept == 0:
        raise DataError(
            f"data {spec.train}: no row is left to learn from ({report.summary()}); "
            "check data.max_length and the response column"
        )
    return report


def fingerprint(spec: DataSpec, base_model: str) -> str:
    """What the tokenised file depends on: the data's bytes, whatever lies beside the base's
    weights, the settings, and how they are read."""
    settings = {"format": FORMAT, "transformers": version("transformers")}
    settings |= spec.model_dump(exclude={"train"})
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


class TokenRows:
    """The tokenised rows of one job, memory-mapped; indexable by row number."""

    def __init__(self, path: Path) -> None:
        table = pyarrow.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self._ids, self._labels = table["input_ids"], table["labels"]

    def __len__(self) -> int:
        return len(self._ids)

    def row(self, index: int) -> tuple[list[int], list[int]]:
        """(ids, labels) of one row."""
        return self._ids[index].as_py(), self._labels[index].as_py()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return pc.call_function("list_value_length", [self._ids]).to_numpy().astype(np.int64)

    @cached_property
    def label_counts(self) -> np.ndarray:
        """Learned tokens of each row, the first excepted, int64 [rows]."""
        chunks = [
            [
                int(np.count_nonzero(np.asarray(labels)[1:] != IGNORE))
                for labels in chunk.to_pylist()
            ]
            for chunk in self._labels.chunks
        ]
        return np.array([count for chunk in chunks for count in chunk], dtype=np.int64)


def epoch_batches(
    lengths: np.ndarray, global_batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """The row numbers of each step of an epoch: every row exactly once, like lengths together.

    A pure function of its arguments: independent of the number of workers and of what was
    trained before.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    window = global_batch_size * _BUCKET_BATCHES
    batches: list[np.ndarray] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + global_batch_size] for i in range(0, len(part), global_batch_size)]
    random.shuffle(batches)  # type: ignore[arg-type]
    return batches


def micro_batches(
    rows: np.ndarray, rank: int, world_size: int, accumulation: int
) -> Iterator[np.ndarray]:
    """One worker's share of a step's rows, as `accumulation` micro-batches (some may be empty)."""
    mine = rows[rank::world_size]
    yield from np.array_split(mine, accumulation)


def _tokenize_chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
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
