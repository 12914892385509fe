"""The tokenised rows: their files, which of them validate, and the order of batches.

A folder of Arrow files of bounded size, memory-mapped by workers, so that neither side ever holds
the data. The order of rows is a pure function of (seed, epoch), the split into training and
validation one of (seed, the rows' tokens): neither needs any state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import count, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from cluster.errors import DataError
from cluster.tasks import Task

IGNORE = -100
# Padded batches are formed of rows of like length among so many batches' worth of shuffled rows.
_BUCKET_BATCHES = 32
_CHUNK_ROWS = 1024
_PART_BYTES = 256 * 2**20
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("label_count", pa.int32()),
        ("length", pa.int32()),
        ("row_hash", pa.uint64()),
    ]
)
Row = tuple[list[int], list[int]]


def row_hash(ids: Sequence[int], labels: Sequence[int]) -> int:
    """64 bits that tell a row from others by its tokens and by what is learned of it."""
    both = np.array([*ids, *labels], dtype="<i4").tobytes()
    border = b"" if len(ids) == len(labels) else len(ids).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(both, digest_size=8, key=border).digest(), "little")


def count_learned(labels: Sequence[int], task: Task = "causal_lm") -> int:
    """Label tokens of a row, or the one class of it; a causal LM's first token is predicted from
    nothing, so it teaches nothing."""
    learned = labels[1:] if task == "causal_lm" else labels
    return sum(label != IGNORE for label in learned)


def count_tokens(ids: Sequence[int], labels: Sequence[int], task: Task = "causal_lm") -> int:
    """Tokens that a row's forward pass computes: an encoder-decoder's target has its own."""
    return len(ids) + (len(labels) if task == "seq_2_seq_lm" else 0)


def write_rows(
    rows: Iterator[tuple[list[int], list[int], int]],
    folder: Path,
    part_bytes: int = _PART_BYTES,
    task: Task = "causal_lm",
) -> None:
    """Write (ids, labels, `row_hash`) rows into `folder`, in files of about `part_bytes` each.

    Labels lie beside the ids of a causal LM; an encoder-decoder's are the target's own ids, and a
    classifier's one is the number of the class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = iter(lambda: list(islice(rows, _CHUNK_ROWS)), [])
    for number in count():
        chunk = next(chunks, None)
        if chunk is None:
            return
        path = str(folder / f"{number:05d}.arrow")
        with pa.OSFile(path, "wb") as sink, pyarrow.ipc.new_stream(sink, _SCHEMA) as writer:
            while chunk is not None:
                writer.write_table(_table(chunk, task))
                chunk = next(chunks, None) if sink.tell() < part_bytes else None


def _table(chunk: Sequence[tuple[list[int], list[int], int]], task: Task) -> pa.Table:
    ids, labels, hashes = zip(*chunk, strict=True)
    counts = [count_learned(row, task) for row in labels]
    lengths = [count_tokens(*row, task) for row in zip(ids, labels, strict=True)]
    return pa.table([ids, labels, counts, lengths, hashes], schema=_SCHEMA)


class TokenRows:
    """The rows of a folder that `write_rows` wrote, memory-mapped; indexable by row number."""

    def __init__(self, folder: Path) -> None:
        parts = sorted(folder.glob("*.arrow"))
        tables = [pyarrow.ipc.open_stream(pa.memory_map(str(part))).read_all() for part in parts]
        self._table = pa.concat_tables(tables)
        self._chosen = np.arange(self._table.num_rows)

    def subset(self, chosen: np.ndarray) -> TokenRows:
        """The rows of these numbers, int64 [rows], in this order."""
        part = object.__new__(TokenRows)
        part._table, part._chosen = self._table, self._chosen[chosen]
        return part

    def __len__(self) -> int:
        return len(self._chosen)

    def row(self, index: int) -> Row:
        """(ids, labels) of one row."""
        at = int(self._chosen[index])
        return self._table["input_ids"][at].as_py(), self._table["labels"][at].as_py()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return self._column(self._table["length"])

    @cached_property
    def label_counts(self) -> np.ndarray:
        """What `count_learned` counts of each row, int64 [rows]."""
        return self._column(self._table["label_count"])

    @property
    def hashes(self) -> np.ndarray:
        """`row_hash` of each row, uint64 [rows]."""
        return self._table["row_hash"].to_numpy()[self._chosen]

    def _column(self, values: pa.ChunkedArray) -> np.ndarray:
        return values.to_numpy().astype(np.int64)[self._chosen]


def split(rows: TokenRows, share: float, seed: int) -> tuple[TokenRows, TokenRows]:
    """(training, validation) rows: about `share` of them validate, at least one.

    Which ones follows from the seed and each row's own tokens, not from its place in the file; rows
    that repeat each other stay on one side, so that nothing validated was ever trained.
    """
    order = _mixed(rows.hashes, seed)
    wanted = max(1, math.floor(share * len(rows)))
    validates = order <= np.partition(order, wanted - 1)[wanted - 1]
    if validates.all():
        raise DataError(
            f"data.validation: a share of {share} leaves none of {len(rows):,} rows to train on; "
            "lower it, add rows, or name a file"
        )
    return rows.subset(np.flatnonzero(~validates)), rows.subset(np.flatnonzero(validates))


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014) of each value with the seed, uint64 [rows]."""
    mixed = values + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def epoch_batches(
    lengths: np.ndarray, global_batch_size: int, seed: int, epoch: int, *, is_packed: bool
) -> list[np.ndarray]:
    """The row numbers of each step of an epoch: every row exactly once, in random order. Rows that
    will be padded are sorted within a window of steps, so that those of like length meet.

    A pure function of its arguments: independent of the number of workers and of what was
    trained before.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if is_packed:
        return [order[i : i + global_batch_size] for i in range(0, len(order), global_batch_size)]
    window = global_batch_size * _BUCKET_BATCHES
    batches: list[np.ndarray] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + global_batch_size] for i in range(0, len(part), global_batch_size)]
    random.shuffle(batches)  # type: ignore[arg-type]
    return batches


def micro_batches(
    rows: np.ndarray,
    lengths: np.ndarray,
    rank: int,
    world_size: int,
    accumulation: int,
    *,
    is_packed: bool,
) -> list[np.ndarray]:
    """One worker's share of a step's `rows`, of these `lengths`, as `accumulation` micro-batches
    (some may be empty).

    Packed rows are dealt out from the longest on, back and forth, so that all micro-batches of all
    workers have about as many tokens: the largest sets the memory, the slowest worker the time.
    """
    if not is_packed:
        return np.array_split(rows[rank::world_size], accumulation)
    order, parts = rows[np.argsort(-lengths, kind="stable")], world_size * accumulation
    turn = np.arange(len(rows)) % (2 * parts)
    part = np.minimum(turn, 2 * parts - 1 - turn)
    return [order[part == rank + world_size * index] for index in range(accumulation)]
