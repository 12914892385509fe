"""An offline run on a Ray cluster: a pool of engines that grows and shrinks with the work.

Ray Data hands each engine the description of a part; the engine reads it from storage, answers it
and writes the result there, so rows pass neither this process nor Ray's object store. A part whose
engine was lost goes to another one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cluster.catalog import Catalog
from cluster.errors import ClusterError, GraftError
from cluster.lease import held
from cluster.registry import Registry
from cluster.session import session, store_credentials
from cluster.spec import parse_spec
from cluster.store import Store
from cluster.table_parts import Part, TableSource
from cluster.table_rows import values_of
from serving.asking import check_options
from serving.batch_file import BatchReport, added_columns, prompt_column
from serving.engine.request import MAX_SEED
from serving.offline.answering import ROW, Asked, answer_rows
from serving.offline.output import LEASE, Counts, Output, Plan, check_same
from serving.progress import progress_bar
from serving.spec import ServingSpec

if TYPE_CHECKING:
    from serving.catalogue import Catalogue

# Deaths of engines over one part before the run is given up.
_TRIES_OF_PART = 3
_LONG_S = 1e8
# Of a spec, what changes no answer or is checked on its own.
_ENGINE = ("base_model", "small_bases", "dtype", "quantization", "max_context_tokens")


def generate_offline(
    spec: ServingSpec,
    source: str,
    target: str,
    *,
    adapter: str | None,
    adapter_column: str | None,
    options: Mapping[str, Any],
    address: str | None,
    part_rows: int,
    progress: bool,
) -> BatchReport:
    """Answer every row of `source` into the folder `target` with the engines of a `checked` spec.
    The same call after an interruption goes on from the parts that are finished.

    Args:
        source: A file or a folder of them, by path or URI; see `cluster.table_parts`.
        part_rows: Rows that are answered, and kept, at once; their number is the plan's once begun.

    Raises:
        CallerError: input, output or options cannot be used; nothing was started.
        ConflictError: another call writes this output now.
        ClusterError: the cluster cannot be joined, or lost too many engines.
        JobFailedError: parts that were answered are not in `target`, which nodes do not share.
    """
    began = time.monotonic()
    output = Output(target)
    with held(output.store, LEASE, f"output {output.uri}") as check_lease:
        plan = _plan(spec, output, source, adapter, adapter_column, options, part_rows)
        kept = output.finished()
        left = [place for place in range(len(plan.parts)) if place not in kept]
        resumed = sum(plan.parts[place].num_rows for place in kept)
        done: dict[int, Counts] = {}
        with (
            progress_bar(source, plan.num_rows, resumed, enabled=progress) as bar,
            closing(_answered(spec, plan, output, left, address)) as answered,
        ):
            for place, counts in answered:
                check_lease()
                done[place] = counts
                bar.advance(plan.parts[place].num_rows, counts.completion_tokens, counts.failed)
        output.check_whole(plan)
    return BatchReport(
        rows=plan.num_rows,
        failed=sum(counts.failed for counts in (kept | done).values()),
        resumed=resumed,
        prompt_tokens=sum(counts.prompt_tokens for counts in done.values()),
        completion_tokens=sum(counts.completion_tokens for counts in done.values()),
        seconds=time.monotonic() - began,
    )


def _plan(
    spec: ServingSpec,
    output: Output,
    source: str,
    adapter: str | None,
    adapter_column: str | None,
    options: Mapping[str, Any],
    part_rows: int,
) -> Plan:
    """The plan that was begun, or a new one."""
    check_options(options)
    table = TableSource(source)
    added = (*added_columns(options), ROW)
    column = prompt_column(table.uri, table.columns(), adapter, adapter_column, added)
    asked = Asked(column, adapter, adapter_column, dict(options), secrets.randbelow(MAX_SEED))
    engine = spec.engine.model_dump(mode="json", include=set(_ENGINE))
    engine |= {"name": spec.name, "store": spec.store}
    plan = Plan(table.uri, table.files, engine, asked, Catalog({}, {}), ())
    if (kept := output.plan()) is not None:
        check_same(kept, plan, output.uri)
        return kept
    catalog = Registry(spec.store).catalog()
    plan = Plan(table.uri, table.files, engine, asked, catalog, table.parts(part_rows))
    if adapter is not None:
        # Nothing is started for a name that is none.
        _catalogue(spec, catalog).resolve(adapter, catalog)
    output.begin(plan)
    return plan


def _answered(
    spec: ServingSpec, plan: Plan, output: Output, left: Sequence[int], address: str | None
) -> Generator[tuple[int, Counts]]:
    """Each part that is left, in the order in which they end."""
    if not left:
        return
    with session(address) as cluster:
        if cluster.address is None:
            raise ClusterError(
                f"{cluster.dashboard_url}: an offline run needs a node of the cluster; start it on "
                "one, with --address auto"
            )
        import ray.data
        from ray.exceptions import RayError

        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends the run is raised
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # Ray Data's own wrapping loses its cause, the reason, on the way from the engine.
        context.raise_original_map_exception = True
        items = [{"place": i, "part": json.dumps(asdict(plan.parts[i]))} for i in left]
        engines = spec.replicas
        most = min(engines.max, len(left))
        least = min(max(1, engines.min), most)
        threads = str(spec.engine.threads or max(1, int(engines.cpus)))
        env = {**store_credentials(), "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        answered = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            OfflineEngine,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
            fn_constructor_args=(_document(spec, plan, output.uri),),
            num_cpus=engines.cpus,
            num_gpus=engines.gpus,
            runtime_env={"env_vars": env},
            ray_remote_args_fn=lambda: {"max_task_retries": _TRIES_OF_PART},
        )
        try:
            for row in answered.iter_rows():
                counts = Counts(row["failed"], row["prompt_tokens"], row["completion_tokens"])
                yield row["place"], counts
        except RayError as error:
            raise _cause(error) from error


def _document(spec: ServingSpec, plan: Plan, target: str) -> str:
    """What an engine of the pool is made from; the parts come one by one."""
    lean = Plan(plan.source, plan.files, plan.engine, plan.asked, plan.catalog, ())
    return json.dumps(
        {"spec": spec.model_dump(mode="json"), "plan": lean.to_json().decode(), "target": target}
    )


class OfflineEngine:
    """One engine of the pool: parts in, counts out.

    It is built with its first part: of what an actor's constructor raises, Ray tells only the text.
    """

    def __init__(self, document: str) -> None:
        self._document = document

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        """The one part that a batch has."""
        place, part = int(batch["place"][0]), Part(**json.loads(str(batch["part"][0])))
        counts = self._engine.answer(place, part)
        return {"place": [place], **{name: [count] for name, count in asdict(counts).items()}}

    @cached_property
    def _engine(self) -> _Engine:
        return _Engine(self._document)


class _Engine:
    def __init__(self, document: str) -> None:
        from cluster.base_model import load_tokenizer
        from serving.gateway.metrics import Metrics
        from serving.gateway.service import Service
        from serving.replica import Replica

        raw = json.loads(document)
        spec = parse_spec(ServingSpec, raw["spec"])
        plan = Plan.from_json(raw["plan"].encode())
        self._output, self._asked = Output(raw["target"]), plan.asked
        self._source = TableSource(plan.source)
        check_same(plan, replace(plan, files=self._source.files), self._output.uri)
        self._concurrency = 2 * spec.engine.max_running_requests
        # One loop for all parts: what its requests wait for belongs to it.
        self._runner = asyncio.Runner()
        weakref.finalize(self, self._runner.close)
        limits = {"request_timeout_s": _LONG_S}
        self._service = Service(
            Replica(spec),
            _catalogue(spec, plan.catalog),
            load_tokenizer(spec.engine.base_model),
            spec.gateway.model_copy(update=limits),
            Metrics(),
        )

    def answer(self, place: int, part: Part) -> Counts:
        """Answer a part and write it."""
        rows, asked = self._source.read(part), self._asked
        added = added_columns(asked.options)
        columns = (asked.column, *filter(None, [asked.adapter_column]), *added, ROW)
        values = values_of(rows, list(dict.fromkeys(columns)))
        results = self._runner.run(
            answer_rows(self._service, asked, values, part.first_row, concurrency=self._concurrency)
        )
        return self._output.finish(place, part, rows, results, added)


class _Pinned(Registry):
    """A store whose names mean what they meant when the run began."""

    def __init__(self, store: Store | str, catalog: Catalog) -> None:
        super().__init__(store)
        self._catalog = catalog

    def catalog(self) -> Catalog:
        """See Registry."""
        return self._catalog


def _catalogue(spec: ServingSpec, catalog: Catalog) -> Catalogue:
    from serving.catalogue import Catalogue

    base, registry = spec.engine.base_model, _Pinned(spec.store, catalog)
    return Catalogue(registry, base_name=spec.name, base_folder=base, ttl_s=_LONG_S)


def _cause(error: Exception) -> GraftError:
    """What an engine raised, without Ray's wrapping."""
    from ray.exceptions import RayError

    inner: BaseException = error
    # The wrapping is also an instance of what it wraps, with a traceback for its text.
    while isinstance(inner, RayError) or not isinstance(inner, GraftError):
        cause = getattr(inner, "cause", None) or inner.__cause__
        if cause is None:
            lines = str(inner).splitlines() or [""]
            return ClusterError(
                f"the cluster gave up on a part: {type(inner).__name__}: {lines[0]}; what is "
                "finished stays, and the same call goes on"
            )
        inner = cause
    return inner
