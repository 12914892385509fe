"""Rows to tokens: counting what is wrong, cutting, writing the tokenised rows.

What a row becomes is its task's matter (training.encoding). Data is read and written as a stream,
once for each fingerprint of all that shaped it. Knows nothing of models or of Ray.
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

from cluster.errors import DataError, StoreError
from cluster.tables import stream_rows
from cluster.tasks import Task
from training.data_spec import DataSpec
from training.encoding import Encoding, encoding
from training.formats import detect_format, iterate_rows
from training.lint import DataReport, Linter
from training.rows import count_learned, count_tokens, row_hash, write_rows

FORMAT = 7  # counts up when a template, the masking, the hashing or the files change
_PROGRESS_S = 5.0


def tokenize(
    spec: DataSpec,
    tokenizer: Any,
    to: Path,
    task: Task = "causal_lm",
    *,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Tokenise the data of `spec` into the folder `to`; with `limit`, its first rows only.

    Args:
        on_progress: Called every few seconds with the rows done and the rows in all.

    Raises:
        DataError: nothing can be learned from it, more rows are wrong than `spec.lint` allows
            (neither with `limit`, whose rows may not be like the rest), a cell is, or a token is
            none of the base's.
    """
    if tokenizer.eos_token_id is None and task != "sequence_classification":
        raise DataError("the base's tokenizer has no end-of-sequence token; set eos_token in it")
    stream = stream_rows(spec.train)
    row_format = detect_format(stream, spec.format, task)
    linter = Linter(tokenizer)
    rows = islice(iterate_rows(stream, row_format, task), limit)
    if on_progress:
        rows = _told(rows, stream.num_rows, on_progress)
    how = encoding(task, row_format, spec, tokenizer)
    try:
        write_rows(_kept(rows, how, task, spec, linter), to, task=task)
    except OSError as error:  # what reading raises is a DataError
        raise StoreError(
            f"{to}: tokenised rows cannot be written ({error.strerror or error}); free room there, "
            "or set TMPDIR to a folder with more"
        ) from error
    report = linter.report()
    is_whole = report.rows == stream.num_rows
    if report.kept == 0 and is_whole:
        raise DataError(
            f"data {spec.train}: no row is left to learn from ({report.summary()}); "
            "check data.max_length and the response column"
        )
    if is_whole:
        report.check(spec.lint, spec.train)
    return report


def _kept(
    rows: Iterator[dict[str, Any]], how: Encoding, task: Task, spec: DataSpec, linter: Linter
) -> Iterator[tuple[list[int], list[int], int]]:
    """The rows that something is learned of, as `write_rows` takes them; counts all of them."""
    counts = linter.counts
    for number, row in enumerate(rows):
        try:
            ids, labels = how.encode(row)
            linter.look(ids, how.written(labels), how.response(row), row_hash(ids, labels))
        except DataError as error:
            raise DataError(f"data {spec.train}: row {number}: {error.message}") from error
        linter.show(lambda row=(ids, labels): how.shown(*row))
        length = how.longest(ids, labels)
        if spec.max_length is not None and length > spec.max_length:
            if spec.over_long == "fail":
                raise DataError(
                    f"data {spec.train}: row {number} has {length} tokens, over "
                    f"data.max_length {spec.max_length}; raise it or set data.over_long"
                )
            if spec.over_long == "drop":
                counts["dropped"] += 1
                continue
            counts["truncated"] += 1
            ids, labels = how.cut(ids, labels, spec.max_length)
        learned = count_learned(labels, task)
        if learned == 0 or not ids:
            counts["without_label"] += 1
            continue
        counts["kept"] += 1
        counts["tokens"] += count_tokens(ids, labels, task)
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


def fingerprint(spec: DataSpec, base_model: str, task: Task = "causal_lm") -> str:
    """What the tokenised file depends on: the data's bytes, whatever lies beside the base's
    weights, the task, the settings, and how they are read."""
    settings: dict[str, Any] = {"format": FORMAT, "task": task}
    settings["transformers"] = version("transformers")
    settings |= spec.model_dump(include={"format", "template", "max_length", "over_long", "labels"})
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
