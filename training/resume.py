"""`graft train --resume JOB`: the spec of a stopped or failed job, if it can go on.

A job is found by its id: on the Ray cluster while that knows it, else in its store. Runs where the
command is typed; the job itself checks again what others may have done meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster import jobs
from cluster.errors import ConflictError, NotFoundError, SpecError
from cluster.session import Session
from cluster.spec import override_spec
from cluster.store import Store, open_store
from training import runs
from training.spec import TrainingSpec

# What makes the checkpoint fit, each row be seen once an epoch, and the best weights be the best.
# The rest may change: a lower learning rate or bf16 is what the job's own error may ask for.
FIXED = (
    "base_model", "task", "quantization", "method", "data", "batch_size", "seed", "evaluation",
    "output.store",
)  # fmt: skip
# But not the limits by which the job looks at the same rows again: no row changes by them.
_FREE = "data.lint."


def store_of(session: Session, job_id: str, default_uri: str) -> Store:
    """Where the job publishes; `default_uri` if the cluster does not know the job.

    Raises:
        ConflictError: it still runs.
    """
    try:
        info = jobs.show(session, job_id)
    except NotFoundError:
        return open_store(default_uri)
    if not info.is_over:
        raise ConflictError(
            f"job {job_id}: is {info.status}; it goes on by itself after a failure. "
            f"To change it, stop it first: graft jobs stop {job_id}"
        )
    return open_store(info.store or default_uri)


def continued_spec(store: Store, job_id: str, overrides: Sequence[str]) -> TrainingSpec:
    """The spec of an ended job, with overrides, as the job that continues it runs it; of several
    adapters, those that it has not published.

    Raises:
        NotFoundError: there is no such job, or it has no whole checkpoint.
        ConflictError: it has finished, or was continued already.
        SpecError: an override changes what must stay.
    """
    try:
        run = runs.read_run(store, job_id)
    except NotFoundError as error:
        raise NotFoundError(
            f"job {job_id!r}: the store {store.uri} has no record of it; "
            "name the store of its spec with --store"
        ) from error
    runs.check_open(store, job_id)
    if runs.last_checkpoint(store, run) is None:
        raise NotFoundError(
            f"job {job_id}: ended before its first checkpoint, so there is nothing to go on from; "
            "train anew"
        )
    spec = override_spec(run.spec, overrides, source=f"job {job_id}")
    before, now = run.spec.each(), spec.each()
    if spec.adapters.keys() != run.spec.adapters.keys():
        raise SpecError(f"adapters: job {job_id} has {', '.join(before)}; leave their names")
    for (name, old), new in zip(before.items(), now.values(), strict=True):
        _check_fits(old, new, job_id, f"adapters.{name}." if spec.adapters else "")
    done = runs.published_adapters(store, run)
    left = {name: own for name, own in spec.adapters.items() if name not in done}
    if done and not left:  # it ended before it could tell so, and clean up
        runs.finish(store, run, ", ".join(done.values()))
        raise ConflictError(f"job {job_id}: has published {', '.join(done.values())}; train anew")
    return spec.model_copy(update={"adapters": left})


def _check_fits(before: TrainingSpec, now: TrainingSpec, job_id: str, where: str) -> None:
    fixed = tuple(f"{field}." for field in FIXED)
    wrong = [
        f"{where}{path}: {new!r} instead of {old!r}"
        for path, old, new in _differences(_document(before), _document(now))
        if f"{path}.".startswith(fixed) and not path.startswith(_FREE)
    ]
    if wrong:
        raise SpecError(
            f"{', '.join(wrong)} would not fit the checkpoint of job {job_id}; leave "
            f"{'them' if len(wrong) > 1 else 'it'}, or train anew"
        )


def _document(spec: TrainingSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json")


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The path of each key whose value is another, and both values. Of two kinds of a thing, whose
    keys are others too, the kind alone."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        if old != new:
            yield path, old, new
        return
    is_same_kind = old.get("kind") == new.get("kind")
    for key in {**old, **new} if is_same_kind else ("kind",):
        yield from _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
