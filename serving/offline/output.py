"""Where an offline run writes, and where it goes on after an interruption.

    OUT/rows-000000002048.parquet       the answered rows from that one on, whole or absent
    OUT/_graft/plan.json                what was asked, of which files, in which parts
    OUT/_graft/parts/00000002-0-901-64  a finished part: failed rows, prompt and answer tokens
    OUT/_graft/lease/                   who writes now

Every key is create-only. Knows no engine and no Ray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from cluster.catalog import Catalog
from cluster.errors import ConflictError, DataError, JobFailedError
from cluster.store import open_store
from cluster.table_parts import Part
from cluster.table_rows import Rows, encoded
from serving.batch_file import ADDED
from serving.journal import RowResult
from serving.offline.answering import ROW, Asked

_PLAN, _PARTS = "_graft/plan.json", "_graft/parts"
LEASE = "_graft/lease"
_DONE = re.compile(rf"{_PARTS}/(\d+)-(\d+)-(\d+)-(\d+)")


@dataclass(frozen=True)
class Counts:
    """What became of a part."""

    failed: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Plan:
    """A run, as its first call saw it.

    `files` are the input's content identities, `engine` what of an engine the answers depend on;
    `catalog` is which versions names mean, for every part alike.
    """

    source: str
    files: Mapping[str, str]
    engine: Mapping[str, Any]
    asked: Asked
    catalog: Catalog
    parts: Sequence[Part]

    @property
    def num_rows(self) -> int:
        """Of all parts."""
        return sum(part.num_rows for part in self.parts)

    def to_json(self) -> bytes:
        """As `from_json` reads it."""
        document = asdict(replace(self, catalog=Catalog({}, {})))
        document["catalog"] = {
            "versions": dict(self.catalog.versions),
            "aliases": [[*at, number] for at, number in self.catalog.aliases.items()],
        }
        return json.dumps(document).encode()

    @staticmethod
    def from_json(data: bytes) -> Plan:
        """Raises ValueError, KeyError or TypeError for anything else."""
        raw = json.loads(data)
        found = raw["catalog"]
        aliases = {(name, alias): number for name, alias, number in found["aliases"]}
        return Plan(
            raw["source"], raw["files"], raw["engine"], Asked(**raw["asked"]),
            Catalog(found["versions"], aliases), [Part(**part) for part in raw["parts"]],
        )  # fmt: skip


class Output:
    """One run's folder, at a local path or a URI."""

    def __init__(self, uri: str) -> None:
        self.store = open_store(uri)
        self.uri = self.store.uri

    def plan(self) -> Plan | None:
        """The run that was begun here, or None for an empty folder.

        Raises:
            ConflictError: there is something else.
        """
        if not self.store.exists(_PLAN):
            others = [key for key in self.store.list() if not key.startswith(f"{LEASE}/")]
            if others:
                raise ConflictError(
                    f"output {self.uri}: holds {others[0]}; an offline run takes an empty folder"
                )
            return None
        try:
            return Plan.from_json(self.store.read(_PLAN))
        except (ValueError, KeyError, TypeError) as error:
            raise ConflictError(
                f"output {self.uri}/{_PLAN}: is no plan of this version; choose another output"
            ) from error

    def begin(self, plan: Plan) -> None:
        """Keep the plan of a run that was not begun yet."""
        self.store.create(_PLAN, plan.to_json())

    def finished(self) -> dict[int, Counts]:
        """What became of each part that is finished, by its place in the plan."""
        keys = map(_DONE.fullmatch, self.store.list(_PARTS))
        found = [[int(number) for number in match.groups()] for match in keys if match]
        return {place: Counts(*counts) for place, *counts in found}

    def check_whole(self, plan: Plan) -> None:
        """Raise JobFailedError unless every part of `plan` is finished here: an engine on another
        node may have written to a disk of its own."""
        finished = self.finished()
        lacking = [part for place, part in enumerate(plan.parts) if place not in finished]
        if lacking:
            first = lacking[0].first_row
            raise JobFailedError(
                f"output {self.uri}: {len(lacking)} of {len(plan.parts)} parts are not here, the "
                f"first with rows {first} to {first + lacking[0].num_rows - 1}, though engines "
                "wrote them: OUT must be storage that every node shares; choose such a folder or a "
                "URI, and call again"
            )

    def finish(
        self,
        place: int,
        part: Part,
        rows: Rows,
        results: Sequence[RowResult],
        columns: Mapping[str, pa.DataType] = ADDED,
    ) -> Counts:
        """Write a part's rows with the `columns` of their results. One that was written before
        stays."""
        added = [(pa.field(ROW, pa.int64()), [result.row for result in results])]
        added += [
            (pa.field(name, kind), [getattr(result, name) for result in results])
            for name, kind in columns.items()
        ]
        suffix, data = encoded(rows, added)
        with suppress(ConflictError):
            self.store.create(f"rows-{part.first_row:012d}{suffix}", data)
        counts = Counts(
            sum(result.error is not None for result in results),
            sum(result.prompt_tokens or 0 for result in results),
            sum(result.completion_tokens or 0 for result in results),
        )
        told = f"{counts.failed}-{counts.prompt_tokens}-{counts.completion_tokens}"
        with suppress(ConflictError):
            self.store.create(f"{_PARTS}/{place:08d}-{told}", b"")
        return counts


def check_same(kept: Plan, now: Plan, uri: str) -> None:
    """Raise ConflictError or DataError unless a call asks what a run was begun with."""
    if kept.source == now.source and kept.files != now.files:
        raise DataError(
            f"data {now.source}: has changed since {uri} was begun; choose another output"
        )
    # A call that gives no seed goes on with that of the run.
    asked = replace(now.asked, seed=kept.asked.seed)
    pairs = {
        "input": (kept.source, now.source),
        "base or store": (kept.engine, now.engine),
        "adapter or options": (asdict(kept.asked), asdict(asked)),
    }
    other = [name for name, (before, after) in pairs.items() if before != after]
    if other:
        raise ConflictError(
            f"output {uri}: was begun with another {other[0]}; repeat that call, or choose another "
            "output"
        )
