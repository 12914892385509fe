"""What is wrong with the data, counted by cause, and the first rows as they will be learned.

Knows tokens and counts; who reads the files is training.data.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.base_model import encode_prompt
from cluster.errors import DataError
from training.data_spec import LintSpec

_SHOWN_ROWS = 3
# Cause -> what to do about it; the causes are LintSpec's fields and DataReport's counts.
_REMEDIES = {
    "empty": "fill or delete those rows",
    "without_label": "look at the response or label column, and at data.max_length",
    "truncated": "raise data.max_length",
    "dropped": "raise data.max_length",
    "duplicate": "delete the repetitions",
    "missing_bos": "let the chat template begin with the tokenizer's bos_token",
    "doubled_bos": "take the bos_token out of the rows or the chat template",
    "missing_eos": "let the chat template end each assistant turn with the tokenizer's eos_token, "
    "inside its {% generation %} part",
    "doubled_eos": "take the eos_token out of the rows",
}


@dataclass(frozen=True)
class DataReport:
    """What became of the rows: `rows` = `kept` + `without_label` + `dropped`; the other causes
    are counted over all rows. `shown` holds the first rows as text."""

    rows: int
    kept: int
    tokens: int
    label_tokens: int
    empty: int
    without_label: int
    truncated: int
    dropped: int
    duplicate: int
    missing_bos: int
    doubled_bos: int
    missing_eos: int
    doubled_eos: int
    shown: tuple[str, ...] = ()

    def causes(self) -> dict[str, int]:
        """Rows by what is wrong with them."""
        return {cause: getattr(self, cause) for cause in _REMEDIES}

    def counts(self) -> dict[str, int]:
        """Every number."""
        return {name: value for name, value in asdict(self).items() if name != "shown"}

    def summary(self) -> str:
        """One line for the plan and the log."""
        parts = [f"{self.kept:,} of {self.rows:,} rows", f"{self.tokens:,} tokens"]
        parts.append(f"{self.label_tokens:,} learned")
        parts += [f"{n:,} {cause.replace('_', ' ')}" for cause, n in self.causes().items() if n]
        return ", ".join(parts)

    def check(self, limits: LintSpec, path: str) -> None:
        """Raises DataError with every cause whose share of the rows is over its limit."""
        faults = [
            f"  {cause}: {count:,} of {self.rows:,} rows ({count / self.rows:.1%}), over "
            f"data.lint.{cause} {getattr(limits, cause)}; {_REMEDIES[cause]}, or raise the limit"
            for cause, count in self.causes().items()
            if count > getattr(limits, cause) * self.rows
        ]
        if faults:
            raise DataError("\n".join([f"data {path}: too many rows are wrong", *faults]))


class Linter:
    """Counts row after row; holds eight bytes of each, by which repetitions are told."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: int | None = getattr(tokenizer, "base_vocabulary", None)
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int | None = tokenizer.eos_token_id
        opening = encode_prompt(tokenizer, "a")
        self._opens = self._bos is not None and opening[:1] == [self._bos]
        self._hashes = array("Q")
        self._shown: list[str] = []
        self.counts = dict.fromkeys((*_REMEDIES, "kept", "tokens", "label_tokens"), 0)

    def look(
        self, ids: Sequence[int], learned: Sequence[int] | None, response: str, hashed: int
    ) -> None:
        """Count what is wrong with a whole row, before any cut.

        Args:
            learned: The tokens that it teaches to write; None for a row that teaches a class.
            response: The text without which it is empty.
            hashed: Its `row_hash`.

        Raises:
            DataError: the base has no embedding of one of its tokens.
        """
        self._check_known(max(max(ids, default=0), max(learned or (), default=0)))
        self._hashes.append(hashed)
        found = {
            "empty": not response.strip(),
            "missing_bos": self._opens and list(ids[:1]) != [self._bos],
            "doubled_bos": self._bos is not None and list(ids[:2]) == [self._bos] * 2,
            "missing_eos": bool(learned) and self._eos not in learned,
            "doubled_eos": learned is not None and list(learned[-2:]) == [self._eos] * 2,
        }
        for cause, is_so in found.items():
            self.counts[cause] += is_so

    def _check_known(self, largest: int) -> None:
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise DataError(
                f"has the token {self._tokenizer.convert_ids_to_tokens(largest)!r}, number "
                f"{largest}, of which the base with its vocabulary of {self._vocabulary} has no "
                "embedding; save the base after model.resize_token_embeddings(len(tokenizer)), or "
                "with the tokenizer that it was trained with"
            )

    def show(self, text: Callable[[], str]) -> None:
        """Keep a row's text, if it is one of the first."""
        if len(self._shown) < _SHOWN_ROWS:
            self._shown.append(text())

    def report(self) -> DataReport:
        """All counts, at the end of the rows."""
        rows = len(self._hashes)
        unique = len(np.unique(np.frombuffer(self._hashes, np.uint64))) if rows else 0
        counts = self.counts | {"duplicate": rows - unique}
        return DataReport(rows=rows, shown=tuple(self._shown), **counts)
