"""The job on the cluster: tokenise once, train under Ray Train, publish.

    python -m training.job JOB '<spec as JSON>' [CONTINUED]      (what `graft train` submits)

The driver reads the data before Ray is imported, because Ray registers Arrow extension types
whose loading runs code. Workers get URIs and small values; the base is read by each from storage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from cluster.errors import ConflictError, GraftError, JobFailedError, StoreError, outcome_of
from cluster.registry import AdapterVersion, Registry
from cluster.spec import parse_spec
from cluster.store import Store, open_store
from training import runs
from training.card import write_card
from training.data import fingerprint, tokenize
from training.data_spec import DataSpec
from training.lint import DataReport
from training.runs import ADAPTER, FAILURE, RESULTS, Run
from training.spec import TrainingSpec

# How often a job whose workers.count is a range looks for free room on the cluster.
RESIZE_CHECK_S = 10.0
_REPORT = "report.json"
# Where Ray's errors hold what they wrap: a worker's that ended, a controller's, a task's; Python's.
_WRAPPED = ("health_check_failure", "controller_failure", "cause", "__cause__")
LIBRARIES = ("raygraft", "torch", "transformers", "peft", "deepspeed", "ray")


@dataclass(frozen=True)
class _Prepared:
    """The rows of one adapter: the keys of their tokens in the store, and the card so far."""

    keys: Mapping[str, str | None]
    card: dict[str, Any]


def run_job(run: Run) -> list[AdapterVersion]:
    """Train what the spec says and publish it. Runs on the cluster.

    Raises:
        GraftError: the data, the base or the run failed; of several adapters, those that did not
            fail themselves are published nevertheless.
    """
    began = time.monotonic()
    store = open_store(run.spec.output.store)
    runs.record_run(store, run)
    known: dict[str, tuple[str, DataReport]] = {}

    def tokens_of(data: DataSpec) -> tuple[str, DataReport]:
        """`_prepare_tokens`, once for all adapters of the same rows."""
        key = data.model_dump_json()
        if key not in known:
            known[key] = _prepare_tokens(run.spec, data, store)
        return known[key]

    prepared = {name: _prepare(run, own, tokens_of) for name, own in run.spec.each().items()}
    keys = {name: each.keys for name, each in prepared.items()}
    runs.record_rows(store, run, keys)
    ended = _train(run, store, keys)
    published: list[AdapterVersion] = []
    failed: dict[str, str] = {}
    for name, result in ended.items():
        if FAILURE in result:
            failed[name] = result[FAILURE]
            continue
        key = result.pop(ADAPTER)
        seconds = round(time.monotonic() - began, 1)
        card = prepared[name].card | {"metrics": result, "job_seconds": seconds}
        published.append(_publish(run, store, name, key, card))
    _check_all_ended_well(run, failed)
    try:
        runs.finish(store, run, ", ".join(version.ref for version in published))
    except ConflictError as error:  # what is published stays so
        print(f"another job goes on from this one meanwhile: {error.message}", flush=True)
    return published


def _prepare(
    run: Run, spec: TrainingSpec, tokens_of: Callable[[DataSpec], tuple[str, DataReport]]
) -> _Prepared:
    tokens, report = tokens_of(spec.data)
    keys: dict[str, str | None] = {"tokens": _tokens_key(tokens), "validation": None}
    card = _card(run, spec, tokens, report)
    if isinstance(spec.data.validation, str):
        data = spec.data.model_copy(update={"train": spec.data.validation})
        held_out, report = tokens_of(data)
        keys["validation"] = _tokens_key(held_out)
        card["validation"] = {"fingerprint": held_out, **report.counts()}
    return _Prepared(keys, card)


def _publish(run: Run, store: Store, name: str, key: str, card: dict[str, Any]) -> AdapterVersion:
    try:
        with tempfile.TemporaryDirectory() as folder:
            runs.fetch_folder(store, key, Path(folder))
            write_card(Path(folder), card)
            published = Registry(store).publish(name, Path(folder), card=card)
    except StoreError as error:
        raise StoreError(f"{error.message}{_advice(store, run)}") from error
    print(f"published {published.ref} in {store.uri}", flush=True)
    return published


def _check_all_ended_well(run: Run, failed: Mapping[str, str]) -> None:
    """Raise JobFailedError with what became of each of several adapters that failed."""
    if not failed:
        return
    lines = [f"{len(failed)} of {len(run.spec.adapters)} adapters failed:"]
    lines += [f"  {name}: {reason}" for name, reason in failed.items()]
    lines += [
        f"Those that have a checkpoint go on from it with: graft train --resume {run.job_id}; one "
        "that diverged needs a lower rate: --set adapters.NAME.optimizer.learning_rate=…"
    ]
    raise JobFailedError("\n".join(lines))


def _prepare_tokens(spec: TrainingSpec, data: DataSpec, store: Store) -> tuple[str, DataReport]:
    """The fingerprint of the tokenised rows in the store, which are made now unless they are
    there already, and what became of the rows. Tells both."""
    found = fingerprint(data, spec.base_model, spec.task)
    key = f"{_tokens_key(found)}/{_REPORT}"
    if store.exists(key):
        raw = json.loads(store.read(key))
        report = DataReport(**raw | {"shown": tuple(raw["shown"])})
        report.check(data.lint, data.train)
    else:
        report = _tokenize_into(store, _tokens_key(found), spec, data)
    print(f"data: {data.train}: {report.summary()}", flush=True)
    for number, text in enumerate(report.shown):
        print(f"row {number}, what is learned in ⟦⟧: {text}", flush=True)
    return found, report


def _tokenize_into(store: Store, key: str, spec: TrainingSpec, data: DataSpec) -> DataReport:
    from cluster.base_model import load_tokenizer

    def tell(done: int, rows: int) -> None:
        print(f"data: {done:,} of {rows:,} rows tokenised", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(spec.base_model)
        report = tokenize(data, tokenizer, Path(folder), spec.task, on_progress=tell)
        parts = sorted(Path(folder).iterdir())
        Path(folder, _REPORT).write_bytes(_json_bytes(asdict(report)))
        for part in [*parts, Path(folder, _REPORT)]:  # the report last: it makes the others count
            with suppress(ConflictError):  # another job made the same file meanwhile
                store.create_file(f"{key}/{part.name}", part)
    return report


def _tokens_key(fingerprint: str) -> str:
    return f"cache/tokens/{fingerprint}"


def _train(
    run: Run, store: Store, rows: Mapping[str, Mapping[str, str | None]]
) -> dict[str, dict[str, Any]]:
    """Run Ray Train to the end; returns by adapter its metrics with ADAPTER, or FAILURE."""
    import ray
    from ray.exceptions import RayActorError
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from training.worker import train_worker

    spec, workers = run.spec, run.spec.workers
    if isinstance(workers.count, tuple):
        # A range starts with the nodes present, which takes moments. After a node dies, Ray Train
        # still counts on it for a while, and would wait a minute for workers to find room there.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    ray.init(log_to_driver=True, logging_level=logging.WARNING)
    resources = {"CPU": float(workers.cpus), "GPU": float(workers.gpus)}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "spec": spec.model_dump(mode="json"),
            "job_id": run.job_id,
            "rows": {name: dict(keys) for name, keys in rows.items()},
            "checkpoint": runs.last_checkpoint(store, run),
        },
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
            use_gpu=workers.gpus > 0,
            resources_per_worker={k: v for k, v in resources.items() if v},
        ),
        run_config=RunConfig(
            name=run.job_id,
            storage_path=_ray_storage(spec.output.store),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=spec.checkpoints_kept),
        ),
    )
    tell_room(spec, resources, cast("dict[str, float]", ray.cluster_resources()))
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        reason = _reason(error, store, run)
        raise JobFailedError(f"training failed: {reason}{_advice(store, run)}") from error
    except RayActorError as error:  # a worker's death never comes like this
        raise JobFailedError(
            f"training failed: the process that leads the workers (Ray Train's controller) ended: "
            f"{_first_line(error)}{_advice(store, run)}"
        ) from error
    ended = cast("dict[str, Any]", result.return_value)
    if FAILURE in ended:
        raise JobFailedError(f"training failed: {ended[FAILURE]}{_advice(store, run)}")
    return ended[RESULTS]


def tell_room(spec: TrainingSpec, each: Mapping[str, float], cluster: Mapping[str, float]) -> None:
    """Say so if the cluster has less than the least number of workers needs: Ray Train waits, which
    is right where nodes are on their way, and else for ever."""
    count, least = spec.workers.count, spec.workers.least
    for kind, amount in each.items():
        if least * amount > (there := cluster.get(kind, 0.0)):
            print(
                f"waiting for {least * amount:g} {kind}s, of which the cluster has {there:g}: if "
                f"no more nodes will come, stop this job and lower workers.count ({count}) or "
                f"workers.{kind.lower()}s ({amount:g})",
                flush=True,
            )


def _advice(store: Store, run: Run) -> str:
    """What can be gone on from, if anything."""
    try:
        key = runs.last_checkpoint(store, run)
    except StoreError:
        return f"\nOnce the store can be read again: graft train --resume {run.job_id}"
    if key is None:
        return ""
    step = int(key.rsplit("/", 1)[-1].split("-")[1])
    if run.spec.adapters:
        return f"\nThe last whole checkpoint goes on with: graft train --resume {run.job_id}"
    return f"\nThe last whole checkpoint is of step {step}: graft train --resume {run.job_id}"


def _card(run: Run, spec: TrainingSpec, tokens: str, report: DataReport) -> dict[str, Any]:
    """What is known of an adapter before it is trained; `spec` is its own."""
    config = Path(spec.base_model, "config.json").read_bytes()
    return {
        "job": {
            "id": run.job_id,
            "continues": run.continues,
            **({"name": run.spec.output.name} if run.spec.adapters else {}),
        },
        "spec": spec.model_dump(mode="json", exclude={"adapters"}),
        "data": {"fingerprint": tokens, **report.counts()},
        "base_config_sha256": hashlib.sha256(config).hexdigest(),
        "libraries": {library: _version(library) for library in LIBRARIES},
    }


def _version(library: str) -> str | None:
    """None for Graft itself where it travelled with the job instead of being installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _ray_storage(uri: str) -> str:
    return f"{uri}/runs"


def _reason(error: BaseException, store: Store, run: Run) -> str:
    """What a worker left in the store, if that can be read, or what Ray Train tells."""
    with suppress(StoreError):
        if failure := runs.read_failure(store, run.job_id):
            return failure
    return _cause(error, run.spec)


def _cause(error: BaseException, spec: TrainingSpec) -> str:
    """The innermost reason that Ray Train wrapped, on one line where it is one of ours. Of several
    workers' reasons that of a process that died: what the others tell is that they miss it."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    failures = cast("dict[int, BaseException]", getattr(error, "worker_failures", {}))
    reasons = [_innermost(failure) for failure in failures.values()] or [_innermost(error)]
    for reason in reasons:
        if isinstance(reason, (OutOfMemoryError, RayActorError)):
            return (
                f"a worker's process ended ({_first_line(reason)}). If nothing above tells why, "
                f"it was killed for memory: {spec.memory_advice()}"
            )
    first = reasons[0]
    return first.message if isinstance(first, GraftError) else f"{type(first).__name__}: {first}"


def _innermost(error: BaseException) -> BaseException:
    """What is behind Ray's wrappers, each of which has a name of its own for it."""
    while not isinstance(error, GraftError):
        wrapped = (getattr(error, name, None) for name in _WRAPPED)
        cause = next((inner for inner in wrapped if isinstance(inner, BaseException)), None)
        if cause is None:
            break
        error = cause
    return error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode()


if __name__ == "__main__":
    try:
        job_id, document, *continued = sys.argv[1:]
        submitted = parse_spec(TrainingSpec, json.loads(document), source="submitted spec")
        run_job(Run(job_id, submitted, continued[0] if continued else None))
    except GraftError as failure:
        print(f"error: {failure.message}", flush=True)
        sys.exit(outcome_of(failure).exit_code)
