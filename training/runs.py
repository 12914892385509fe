"""A job's place in the store: what it was asked, its checkpoints, what came of it.

    runs/JOB/job.json              the resolved spec, and the job that this one continues
    runs/JOB/rows.json             where its tokenised rows are
    runs/JOB/step-00000020-1f3a/   a checkpoint; its progress.json comes last and makes it whole
    runs/JOB/best/DIGEST.safetensors   best weights, as long as a checkpoint names them
    runs/JOB/tensorboard/          event files of its figures so far, or a folder for each adapter
    runs/JOB/adapter-1f3a/         a trained adapter, until it is published
    runs/JOB/failure.json          why no restart can mend it, where one worker alone knows
    runs/JOB/outcome.json          the version it published, or the job that continued it

A checkpoint's best weights are stored once, since those behind it have mostly the same; its
best.json names them. A checkpoint of several adapters has a folder for each of those that saved a
state. Every write is create-only, so of two that would continue a job one is refused. (Ray Train
keeps records of its own beside these.) Knows files; no Ray.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from cluster.errors import AdapterError, ConflictError, DataError, NotFoundError
from cluster.registry import Registry
from cluster.spec import parse_spec
from cluster.store import Store
from training.checkpoint import BEST_STATE, PROGRESS
from training.rows import TokenRows
from training.spec import TrainingSpec

# What a worker hands to the job: FAILURE, why no restart can mend it, or RESULTS, by adapter its
# metrics with ADAPTER, the key of its folder in the store, or a FAILURE of its own.
RESULTS, ADAPTER, FAILURE = "results", "adapter", "failure"
_BEST_KEY = "best.json"
_CHECKPOINT = re.compile(rf"(runs/[^/]+/step-\d{{8}}-[0-9a-f]+)/{PROGRESS}")


@dataclass(frozen=True)
class Run:
    """One job as the store knows it. `continues` is the job whose checkpoints it goes on from."""

    job_id: str
    spec: TrainingSpec
    continues: str | None = None


def new_job_id(name: str) -> str:
    """An id that no other job has, for Ray and for the store."""
    return f"{name}-{uuid4().hex[:8]}"


def checkpoint_name(step: int) -> str:
    """A name that no other attempt at the same step has; sorts by step."""
    return f"step-{step:08d}-{uuid4().hex[:8]}"


def record_run(store: Store, run: Run) -> None:
    """Make the job known. Raises ConflictError if another continues the same one."""
    document = {"spec": run.spec.model_dump(mode="json"), "continues": run.continues}
    with suppress(ConflictError):  # the id is this job's alone: an answer was lost
        store.create(f"runs/{run.job_id}/job.json", json.dumps(document).encode())
    if run.continues is not None:
        try:
            _conclude(store, run.continues, {"continued_by": run.job_id})
        except ConflictError:
            store.delete(f"runs/{run.job_id}/job.json")
            check_open(store, run.continues)
            raise


def read_run(store: Store, job_id: str) -> Run:
    """What `record_run` wrote. Raises NotFoundError."""
    document = json.loads(store.read(f"runs/{job_id}/job.json"))
    spec = parse_spec(TrainingSpec, document["spec"], source=f"spec of job {job_id}")
    return Run(job_id, spec, document["continues"])


def record_rows(store: Store, run: Run, rows: Mapping[str, Mapping[str, str | None]]) -> None:
    """Make known, by adapter, the keys of its `tokens` and of its `validation` rows, or None.

    Raises:
        DataError: they are others than those of the job that this one continues.
    """
    before = _rows_before(store, run)
    for name, spec in run.spec.each().items():
        for part, path in (("tokens", spec.data.train), ("validation", spec.data.validation)):
            old, new = before.get(name, {}).get(part), rows[name][part]
            if old and new and not _are_same(store, old, new):
                raise DataError(
                    f"data {path}: its rows are others than when job {run.continues} began, so "
                    "which of them it was trained on is no longer known; put them back as they "
                    f"were, then graft train --resume {run.job_id}, or train anew"
                )
    with suppress(ConflictError):  # an answer was lost
        store.create(f"runs/{run.job_id}/rows.json", json.dumps(rows).encode())


def _rows_before(store: Store, run: Run) -> dict[str, dict[str, str | None]]:
    """What the nearest job before this one recorded; nothing if none did."""
    for link in lineage(store, run):
        with suppress(NotFoundError):
            return json.loads(store.read(f"runs/{link.job_id}/rows.json"))
    return {}


def _are_same(store: Store, old: str, new: str) -> bool:
    """Whether the rows at two keys are the same in the same order. Keys differ by the library that
    tokenised too, which rarely makes other tokens of a row."""
    return old == new or np.array_equal(_hashes(store, old), _hashes(store, new))


def _hashes(store: Store, key: str) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        fetch_folder(store, key, Path(folder))
        if not any(Path(folder).glob("*.arrow")):  # somebody emptied the cache
            return np.empty(0, dtype=np.uint64)
        return TokenRows(Path(folder)).hashes


def check_open(store: Store, job_id: str) -> None:
    """Raise ConflictError if the job has published, or another job continued it."""
    try:
        outcome: dict[str, Any] = json.loads(store.read(f"runs/{job_id}/outcome.json"))
    except NotFoundError:
        return
    if "published" in outcome:
        raise ConflictError(
            f"job {job_id}: has finished, and published {outcome['published']}; train anew instead"
        )
    follower = outcome["continued_by"]
    raise ConflictError(
        f"job {job_id}: was continued by {follower} already; "
        f"look at that one, or go on from it: graft train --resume {follower}"
    )


def last_checkpoint(store: Store, run: Run) -> str | None:
    """The key of the newest whole checkpoint of the job, or of the one that it continues."""
    for link in lineage(store, run):
        if (own := own_checkpoint(store, link.job_id)) is not None:
            return own
    return None


def own_checkpoint(store: Store, job_id: str) -> str | None:
    """The key of the newest whole checkpoint of this job alone."""
    return max(own_checkpoints(store, job_id), default=None)


def own_checkpoints(store: Store, job_id: str) -> list[str]:
    """The keys of all whole checkpoints of this job alone."""
    found = map(_CHECKPOINT.fullmatch, store.list(f"runs/{job_id}"))
    return [match[1] for match in found if match]


def own_bests(store: Store, job_id: str) -> list[str]:
    """The keys of the best weights that this job's checkpoints name, or named."""
    return store.list(f"runs/{job_id}/best")


def lineage(store: Store, run: Run) -> Iterator[Run]:
    """The job, the one that it continues, and so on."""
    link: Run | None = run
    while link is not None:
        yield link
        link = read_run(store, link.continues) if link.continues else None


def upload_folder(store: Store, key: str, folder: Path) -> None:
    """Copy the files of `folder` under `key`, progress.json last. Where it ended before, it may
    be called again."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    for name in sorted(files, key=lambda name: (name == Path(PROGRESS), name)):
        with suppress(ConflictError):  # it is there, and files are there whole or not at all
            store.create_file(f"{key}/{name.as_posix()}", folder / name)


def upload_checkpoint(store: Store, key: str, folder: Path) -> set[str]:
    """Copy a checkpoint under `key`, runs/JOB/NAME; returns the keys of its best weights, which are
    copied first unless they are there."""
    bests: set[str] = set()
    for file in sorted(folder.rglob(BEST_STATE)):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        best = f"{key.rsplit('/', 1)[0]}/best/{digest}.safetensors"
        if not store.exists(best):
            with suppress(ConflictError):
                store.create_file(best, file)
        (file.parent / _BEST_KEY).write_text(json.dumps(best))
        file.unlink()
        bests.add(best)
    upload_folder(store, key, folder)
    return bests


def fetch_checkpoint(store: Store, key: str, to: Path) -> None:
    """Copy what `upload_checkpoint` copied into the folder `to`."""
    fetch_folder(store, key, to)
    for file in to.rglob(_BEST_KEY):
        store.download(json.loads(file.read_text()), file.parent / BEST_STATE)


def delete_folder(store: Store, key: str) -> None:
    """Delete what is under `key`, what makes a checkpoint whole first."""
    for file in sorted(store.list(key), key=lambda file: not file.endswith(f"/{PROGRESS}")):
        store.delete(file)


def delete_unused(store: Store, job_id: str, bests: set[str]) -> set[str]:
    """Delete those best weights that no checkpoint of the job names; returns the others."""
    named: set[str] = set()
    for key in store.list(f"runs/{job_id}"):
        if key.endswith(f"/{_BEST_KEY}"):
            with suppress(NotFoundError):  # Ray Train deleted that checkpoint meanwhile
                named.add(json.loads(store.read(key)))
    for key in bests - named:
        store.delete(key)
    return bests & named


def fetch_folder(store: Store, key: str, to: Path) -> None:
    """Copy what is under `key` into the folder `to`."""
    for file in store.list(key):
        target = to / file.removeprefix(f"{key}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        store.download(file, target)


def published_adapters(store: Store, run: Run) -> dict[str, str]:
    """What the job, and those that it continues, have published, by name: a version's card names
    its job, and is there as soon as the version is."""
    registry, jobs = Registry(store), {link.job_id for link in lineage(store, run)}
    found: dict[str, str] = {}
    for name in run.spec.each():
        for number in reversed(registry.numbers(name)):
            with suppress(AdapterError, NotFoundError):  # a damaged one, or one that left meanwhile
                version = registry.read(name, number)
                job: Any = (version.card or {}).get("job")  # others' cards hold what they like
                if isinstance(job, dict) and job.get("id") in jobs:
                    found[name] = version.ref
                    break
    return found


def record_failure(store: Store, job_id: str, message: str) -> None:
    """Let every worker of the next attempt know why there should be none."""
    with suppress(ConflictError):
        store.create(f"runs/{job_id}/failure.json", json.dumps(message).encode())


def read_failure(store: Store, job_id: str) -> str | None:
    """What `record_failure` wrote, if it did."""
    try:
        return str(json.loads(store.read(f"runs/{job_id}/failure.json")))
    except NotFoundError:
        return None


def finish(store: Store, run: Run, published: str) -> None:
    """Record what was published, and delete what it and those before it had only for a resume."""
    _conclude(store, run.job_id, {"published": published})
    for link in lineage(store, run):
        for key in store.list(f"runs/{link.job_id}"):
            if key.rsplit("/", 1)[-1] not in ("job.json", "outcome.json"):
                store.delete(key)


def _conclude(store: Store, job_id: str, outcome: dict[str, str]) -> None:
    """Raises ConflictError if it ended otherwise."""
    key = f"runs/{job_id}/outcome.json"
    try:
        store.create(key, json.dumps(outcome).encode())
    except ConflictError:
        if json.loads(store.read(key)) != outcome:  # else an answer was lost
            raise
