"""`graft train`: check everything here, show the plan, submit the job."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli import Address

if TYPE_CHECKING:
    from cluster.session import Session
    from training.lint import DataReport
    from training.spec import TrainingSpec

_CHECKED_ROWS = 200
_LONGEST_TOKENS = 2048
# Ray's process name and colours, and its time stamps.
_DECORATION = re.compile(
    r"^(\x1b\[\d+m)?(\([^()]*pid=\d+[^()]*\))?(\x1b\[0m)? ?"
    r"(\[?\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\S* ?\S* \S+:\d+ -- )?"
)
# By how they begin: what is shown of rows and answers may hold the same words.
_NOISE = re.compile(
    r"\s*(\S+:\d+: \w*Warning: |warnings\.warn\($|return func\(\*args|Loading weights: "
    r"|Reporting training result |Checkpoint successfully |Runtime env is |Running entrypoint "
    r"|Requesting resources: |Attempting to start training worker group |Setting up process group "
    r"|Started training worker group |- \(ip=\S+ pid=\d+\) world_rank=|\[.*core_worker\.cc"
    r"|.*built successfully$)"
)


@dataclass(frozen=True)
class Plan:
    """What a job will do, as far as it can be told without weights."""

    trainable_parameters: int
    all_parameters: int
    rows: int
    steps: int
    checkpoints: int
    first_rows: DataReport

    def __str__(self) -> str:
        share = self.trainable_parameters / self.all_parameters
        return (
            f"{self.trainable_parameters:,} of {self.all_parameters:,} parameters ({share:.3%}), "
            f"{self.rows:,} rows, {self.steps:,} steps, {self.checkpoints} checkpoints"
        )


def train(
    spec: Annotated[
        Path | None,
        typer.Argument(metavar="SPEC.yaml", help="The job's YAML, as in configs/training."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: method.r=16. Repeatable.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="JOB", help="Go on with a stopped or failed job, instead of a spec."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="In place of the spec's output.store; with --resume, where the job is looked for "
            "if the cluster is gone [env: GRAFT_STORE]."
        ),
    ] = None,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print the log until the job ends.")
    ] = False,
) -> None:
    """Train an adapter as a Ray job and publish it.

    The spec, the base folder, the first rows and the target modules are checked here, before
    anything starts. On a cluster that this command itself starts, it follows to the end.
    --resume goes on from the last checkpoint of a job, named by the id that it was shown with;
    --set may change how it goes on, as workers.count=1, optimizer.learning_rate=1e-5 or
    max_steps=900; not the base, its quantisation, task, method, data, batch size, seed or
    evaluation.
    """
    from cluster.names import default_store
    from cluster.session import session
    from cluster.spec import load_spec
    from training.resume import continued_spec, store_of
    from training.spec import TrainingSpec

    if (spec is None) == (resume is None):
        raise typer.BadParameter("give one of the two", param_hint="SPEC.yaml or --resume JOB")
    job: TrainingSpec | None = None
    if spec is not None:
        elsewhere = [f"output.store={json.dumps(store)}"] if store else []
        job = resolved(load_spec(TrainingSpec, spec, [*(set_ or ()), *elsewhere]))
        _show(spec, plans(job))
    with session(address) as ray:
        if job is None:
            found = store_of(ray, str(resume), store or default_store())
            job = continued_spec(found, str(resume), set_ or ())
            for name, planned in plans(job).items():
                typer.echo(f"{resume}: {name}: {planned}")
        job_id = submit(job, ray, continues=resume)
        typer.echo(f"job {job_id} on {ray.dashboard_url}")
        if not follow and not ray.started_here:
            typer.echo(f"follow it with: graft jobs logs {job_id} --follow")
            return
        _follow(ray, job_id, job.output.store)


def _show(path: Path, planned: Mapping[str, Plan]) -> None:
    shown: set[tuple[str, ...]] = set()
    for name, each in planned.items():
        typer.echo(f"{path}: {f'{name}: ' if len(planned) > 1 else ''}{each}")
        if each.first_rows.shown in shown:  # adapters of the same rows
            continue
        shown.add(each.first_rows.shown)
        typer.echo(f"the first rows: {each.first_rows.summary()}")
        for number, text in enumerate(each.first_rows.shown):
            typer.echo(f"row {number}, what is learned in ⟦⟧: {text}")


def _follow(session: Session, job_id: str, store: str) -> None:
    """Print the log until the job ends; Ctrl+C stops the job, SIGTERM one on our own cluster."""
    from cluster import jobs

    try:
        for line in jobs.logs(session, job_id, follow=True):
            text = readable(line)
            if text is not None:
                typer.echo(text)
    except (KeyboardInterrupt, SystemExit) as end:  # the second is what SIGTERM makes
        if isinstance(end, KeyboardInterrupt):
            jobs.stop(session, job_id)
        elif not session.started_here:
            raise
        # The store is not asked: it may take minutes not to answer.
        typer.echo(
            f"job {job_id} ends here; if it has a checkpoint, it goes on with: "
            f"graft train --resume {job_id} --store {store}",
            err=True,
        )
        raise
    jobs.wait(session, job_id)


def submit(spec: TrainingSpec, session: Session, *, continues: str | None = None) -> str:
    """Submit the job, which goes on where the job `continues` ended; returns its id."""
    from cluster import jobs
    from training.runs import new_job_id

    job_id = new_job_id(spec.output.name)
    threads = str(max(1, int(spec.workers.cpus)))
    document = json.dumps(spec.model_dump(mode="json"))
    jobs.submit(
        session,
        "training.job",
        [job_id, document, *([continues] if continues else [])],
        job_id=job_id,
        name=spec.output.name,
        store=spec.output.store,
        # Ray would give each process as many threads as the node has cores.
        env={
            "OMP_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "DS_BUILD_OPS": "0",
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would print every worker's line twice
            # Ray shows GPUs to workers that asked for none, and DeepSpeed takes what it sees.
            **({} if spec.workers.gpus else {"CUDA_VISIBLE_DEVICES": ""}),
        },
    )
    return job_id


def plans(spec: TrainingSpec) -> dict[str, Plan]:
    """`plan` of each adapter by name."""
    return {name: plan(own) for name, own in spec.each().items()}


def plan(spec: TrainingSpec) -> Plan:
    """Check the base, the first rows and the targets, without weights and without Ray.

    Raises:
        CallerError: the first thing found wrong, with its remedy.
    """
    from cluster.base_model import empty_base, load_tokenizer
    from cluster.errors import DataError
    from cluster.tables import stream_rows
    from training.assembly import check_base
    from training.data import tokenize
    from training.loop import count_steps
    from training.methods import METHODS, count_parameters
    from training.methods.placement import check_saved_modules
    from training.tracking import check_installed

    check_installed(spec.tracking)
    rows, validation = stream_rows(spec.data.train).num_rows, spec.data.validation
    tokenizer = load_tokenizer(spec.base_model)
    with tempfile.TemporaryDirectory() as folder:
        report = tokenize(spec.data, tokenizer, Path(folder), spec.task, limit=_CHECKED_ROWS)
        if not report.kept:
            raise DataError(
                f"data {spec.data.train}: nothing can be learned of its first {report.rows:,} rows "
                f"({report.summary()}); check data.max_length and the response column"
            )
        if isinstance(validation, str):
            data = spec.data.model_copy(update={"train": validation})
            tokenize(data, tokenizer, Path(folder, "validation"), spec.task, limit=_CHECKED_ROWS)
        elif validation is not None:
            rows -= max(1, int(validation * rows))
    base = empty_base(spec.trained_base, task=spec.task, labels=spec.data.labels)
    check_base(base, spec)
    if spec.quantization is not None:
        check_saved_modules(base, spec.method)
    model = METHODS[spec.method.kind].attach(base, spec.method, spec.base_model)
    trained, total = count_parameters(model)
    steps = count_steps(spec, rows)
    checkpoints = -(-steps // spec.checkpoint_every_steps)
    return Plan(trained, total, rows, steps, checkpoints, report)


def resolved(spec: TrainingSpec) -> TrainingSpec:
    """The spec as the job runs it, in another folder: local paths absolute, `max_length` and the
    classes' names and quantisation of the base known; also those of each of several adapters.

    Raises:
        BaseModelError: the base's folder is not whole, or its model is for another task.
        DataError: the rows name no classes, for a classifier.
        SpecError: the base was saved quantised, which does not fit the task, method or ZeRO stage;
            the longest row, with its virtual tokens, exceeds the base's context.
    """
    from cluster.base_model import check_base_folder
    from cluster.names import absolute_path
    from training.labels import find_labels

    base = absolute_path(spec.base_model)
    check_base_folder(base, with_tokenizer=True)
    spec, virtual = _with_method(spec)
    spec = _with_quantization(spec)
    data: dict[str, Any] = {"train": absolute_path(spec.data.train)}
    if isinstance(spec.data.validation, str):
        data["validation"] = absolute_path(spec.data.validation)
    if spec.task == "sequence_classification":
        data["labels"] = find_labels(spec.data.model_copy(update=data))
    adapters = {
        name: own.model_copy(
            update={"data": resolved(spec.adapter(name)).data.model_dump(mode="json")}
        )
        for name, own in spec.adapters.items()
    }
    spec = spec.model_copy(
        update={
            "base_model": base,
            "data": spec.data.model_copy(update=data),
            "adapters": adapters,
            # From here on it depends on no number of workers: a resumed job may have another.
            "batch_size": spec.global_batch_size,
            "gradient_accumulation_steps": None,
        }
    )
    longest = _longest(spec, virtual)
    data = {"max_length": spec.data.max_length or longest}
    return spec.model_copy(update={"data": spec.data.model_copy(update=data)})


def _longest(spec: TrainingSpec, virtual: int) -> int:
    """The longest row, in tokens, that a resolved spec's base takes beside so many virtual ones.

    Raises:
        SpecError: what is asked for exceeds it.
    """
    from cluster.base_model import context_tokens, empty_base
    from cluster.errors import SpecError
    from cluster.tasks import unused_positions

    base, asked = spec.base_model, spec.data.max_length
    contexts = [context_tokens(path) for path in {base, spec.trained_base}]
    context = min((tokens for tokens in contexts if tokens is not None), default=None)
    if context is None:
        return _LONGEST_TOKENS
    if spec.task == "sequence_classification":
        context -= unused_positions(empty_base(base, task=spec.task, labels=spec.data.labels))
    least = 2 if spec.task == "causal_lm" else 1  # a token, and one to learn behind it
    if virtual and virtual + least > context:
        raise SpecError(
            f"method: its {virtual} virtual tokens leave no room for a row in the context of "
            f"{context} that {base} has; "
            "lower method.num_virtual_tokens, or method.demonstrations of a hard prompt"
        )
    if (asked or 1) + virtual > context:
        beside = f" + {virtual} virtual tokens" if virtual else ""
        raise SpecError(
            f"data.max_length {asked or 1}{beside} exceeds the context of {context} that {base} "
            f"has; set data.max_length to at most {context - virtual}"
        )
    answer = spec.evaluation.max_new_tokens + 1 + virtual
    if spec.task == "seq_2_seq_lm" and answer > context:
        raise SpecError(
            f"evaluation.max_new_tokens {spec.evaluation.max_new_tokens} exceeds the context of "
            f"{context} that {base} has; lower it"
        )
    return min(_LONGEST_TOKENS, context - virtual)


def _with_quantization(spec: TrainingSpec) -> TrainingSpec:
    """`spec` with that of a base which was saved quantised."""
    from cluster.base_model import quantization_of
    from cluster.spec import parse_spec
    from training.spec import TrainingSpec

    found = quantization_of(spec.trained_base, spec.quantization)
    if found is None:
        return spec
    document = spec.model_dump(mode="json") | {"quantization": found.model_dump(mode="json")}
    return parse_spec(TrainingSpec, document, source=f"with base_model {spec.trained_base}")


def _with_method(spec: TrainingSpec) -> tuple[TrainingSpec, int]:
    """`spec` with a proxy's path absolute, or a hard prompt's text in place of its rows, and the
    method's virtual tokens."""
    from cluster.base_model import check_base_folder, load_tokenizer
    from cluster.names import absolute_path
    from training.method_spec import HardPromptSpec, ProxyTuningSpec
    from training.methods.hard_prompt import count_tokens, with_text

    method = spec.method
    if isinstance(method, ProxyTuningSpec):
        small = absolute_path(method.small_base)
        check_base_folder(small, with_tokenizer=True)
        method = method.model_copy(update={"small_base": small})
        virtual: int = getattr(method.expert, "num_virtual_tokens", 0)
        return spec.model_copy(update={"method": method}), virtual
    if isinstance(method, HardPromptSpec):
        tokenizer = load_tokenizer(spec.base_model)
        method = with_text(method, spec.data, spec.seed, tokenizer)
        virtual = count_tokens(method.text or "", tokenizer)
        return spec.model_copy(update={"method": method, "max_steps": 0}), virtual
    return spec, getattr(method, "num_virtual_tokens", 0)


def readable(line: str) -> str | None:
    """A log line without what Ray puts around it; None for one that only Ray's developers read."""
    text = _DECORATION.sub("", line).rstrip()
    return None if not text or _NOISE.match(text) else text
