"""`graft estimate`: what a job would need of each worker's memory, by part and ZeRO stage."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from training.dry_run import Shape
    from training.estimate import Estimate
    from training.spec import TrainingSpec

_READ_ROWS = 200


def estimate(
    spec: Annotated[
        Path, typer.Argument(metavar="SPEC.yaml", help="The job's YAML, as in configs/training.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: method.r=16. Repeatable.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Length of every row, in tokens; of an encoder-decoder, of source and target. If "
            "not given: those of the data's first 200 rows; with it, no data are read.",
        ),
    ] = None,
    stage: Annotated[
        list[int] | None,
        typer.Option(min=0, max=3, help="Only this ZeRO stage. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, sizes in MiB.")] = False,
) -> None:
    """Predict trainable parameters and each worker's peak memory; load and start nothing.

    The worker's own code runs on tensors without memory, at the largest micro-batch that rows like
    the first of the data make. On CPU the libraries and what malloc keeps are included; on GPUs the
    prediction is of tensors alone, and was never compared with one.
    """
    from cluster.spec import load_spec
    from training.command import resolved
    from training.estimate import estimate as predict
    from training.spec import TrainingSpec

    job = resolved(load_spec(TrainingSpec, spec, set_ or ()))
    shapes = {name: _shape(own, tokens) for name, own in job.each().items()}
    found = predict(job, shapes, sorted(set(stage or ())))
    if as_json:
        stages = [asdict(at) | {"total": at.total} for at in found.stages]
        typer.echo(json.dumps(asdict(found) | {"stages": stages}, indent=2))
        return
    _print(job, found)


def _shape(job: TrainingSpec, tokens: int | None) -> Shape:
    from cluster.base_model import load_tokenizer
    from cluster.errors import DataError
    from training.data import tokenize
    from training.dry_run import Shape
    from training.rows import TokenRows

    if tokens is not None:
        return Shape.of_length(job, tokens)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(job.base_model)
        report = tokenize(job.data, tokenizer, Path(folder), job.task, limit=_READ_ROWS)
        if not report.kept:
            raise DataError(
                f"data {job.data.train}: nothing can be learned of the first {_READ_ROWS} rows "
                f"({report.summary()}); tell how long rows are with --tokens"
            )
        kept = TokenRows(Path(folder))
        rows = [kept.row(index) for index in range(len(kept))]
    return Shape.of_rows(job, rows)


def _print(job: TrainingSpec, found: Estimate) -> None:
    from training.dry_run import PARTS

    share = found.trainable_parameters / max(1, found.all_parameters)
    each = job.each()
    kinds = ", ".join(dict.fromkeys(own.method.kind for own in each.values()))
    typer.echo(
        (f"{len(each)} adapters, " if job.adapters else "")
        + f"{kinds}: {found.trainable_parameters:,} of {found.all_parameters:,} parameters "
        f"({share:.3%}) are trained, {job.precision}, {found.workers} workers"
    )
    for name, shape in found.shapes.items():
        typer.echo(
            (f"{name}: " if job.adapters else "")
            + f"micro-batches of {shape.rows} rows of {shape.tokens:,} tokens"
            + (f" and targets of {shape.targets:,}" if shape.targets else "")
            + (f" at most, {sum(shape.packed):,} packed" if shape.packed else "")
        )
    table = Table("MiB of each worker at its peak", box=None)
    for at in found.stages:
        chosen = " (spec)" if at.stage == job.zero.stage else ""
        table.add_column(f"ZeRO {at.stage}{chosen}", justify="right")
    for part in PARTS:
        table.add_row(part, *(f"{at.parts[part]:,.0f}" for at in found.stages))
    if not job.workers.gpus:
        table.add_row("kept by malloc", *(f"{at.allocator:,.0f}" for at in found.stages))
        table.add_row("process, libraries", *(f"{at.runtime:,.0f}" for at in found.stages))
    table.add_row("[bold]total", *(f"[bold]{at.total:,.0f}" for at in found.stages))
    table.add_row("the peak is", *(at.moment for at in found.stages))
    Console().print(table)
    if job.workers.gpus:
        typer.echo("of tensors on a GPU, without CUDA's own; no GPU was ever measured for this")
