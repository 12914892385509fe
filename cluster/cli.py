"""The `graft` command: parsing and printing only.

Commands of other rooms (`train`, `serve`, `generate`) are found by the entry-point group
`graft.commands`, so that this room imports neither. Importing this module loads no torch and no
Ray: each command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.errors import GraftError, outcome_of
from cluster.names import DEFAULT_STORE

HELP = """\
Train adapters on a Ray cluster, publish them, serve them all from one base model.

[bold]Examples[/bold]

  graft train configs/training/lora.yaml --set output.name=support-bot --follow

  graft serve configs/serving/local.yaml

  graft generate questions.arrow answers.arrow --adapter support-bot

Without --address (or RAY_ADDRESS, or a cluster on this machine) a Ray cluster is started here
and ends with the command. Adapters live in the store: --store or the spec's own, else
GRAFT_STORE, else ./graft-store.
"""

app = typer.Typer(
    help=HELP, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)
jobs_app = typer.Typer(help="Training jobs on the cluster.", no_args_is_help=True)
adapters_app = typer.Typer(help="Adapters in the store.", no_args_is_help=True)

Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: host:port, auto, or http://host:8265 [env: RAY_ADDRESS]."),
]
Store = Annotated[
    str, typer.Option(envvar="GRAFT_STORE", help="Folder, s3://bucket/prefix or gs://… .")
]
Ref = Annotated[str, typer.Argument(metavar="REF", help="NAME, NAME@VERSION or NAME:ALIAS.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="As `graft jobs list` shows it.")]


@jobs_app.command("list")
def list_jobs(address: Address = None) -> None:
    """List jobs, newest first."""
    from cluster import jobs
    from cluster.session import session

    table = Table("job", "name", "status", "seconds", box=None)
    with session(_named(address)) as ray:
        for info in jobs.list_jobs(ray):
            ended = info.ended_at_s
            took = f"{ended - info.started_at_s:.0f}" if ended and info.started_at_s else ""
            table.add_row(info.id, info.name, info.status, took)
    Console().print(table)


@jobs_app.command("show")
def show_job(job: JobId, address: Address = None) -> None:
    """Show one job."""
    from cluster import jobs
    from cluster.session import session

    with session(_named(address)) as ray:
        info = jobs.show(ray, job)
    _print_pairs(vars(info))


@jobs_app.command("logs")
def job_logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    address: Address = None,
) -> None:
    """Print a job's log."""
    from cluster import jobs
    from cluster.session import session

    with session(_named(address)) as ray:
        for line in jobs.logs(ray, job, follow=follow):
            typer.echo(line)


@jobs_app.command("stop")
def stop_job(job: JobId, address: Address = None) -> None:
    """Stop a job and wait until it has ended."""
    from cluster import jobs
    from cluster.session import session

    with session(_named(address)) as ray:
        jobs.stop(ray, job)
        typer.echo(f"{job}: {jobs.show(ray, job).status}")


@adapters_app.command("list")
def list_adapters(store: Store = DEFAULT_STORE) -> None:
    """List adapters with their newest version."""
    from cluster.registry import Registry

    registry = Registry(store)
    table = Table("adapter", "version", "method", "aliases", "published", box=None)
    for name in registry.names():
        newest = registry.resolve(name)
        aliases = ", ".join(f"{a}={v}" for a, v in registry.aliases(name).items())
        table.add_row(name, str(newest.version), newest.method, aliases, newest.created_at)
    Console().print(table)


@adapters_app.command("show")
def show_adapter(ref: Ref, store: Store = DEFAULT_STORE) -> None:
    """Show one version: files, lineage, metrics."""
    from cluster.registry import Registry

    registry = Registry(store)
    version = registry.resolve(ref)
    _print_pairs(
        {
            "adapter": version.ref,
            "versions": ", ".join(str(v.version) for v in registry.versions(version.name)),
            "aliases": ", ".join(f"{a}={v}" for a, v in registry.aliases(version.name).items()),
            "method": version.method,
            "base_model": version.base_model,
            "published": version.created_at,
            "content": version.content_hash,
            **{f"file {name}": f"{e.bytes:,} bytes" for name, e in version.files.items()},
            **_flat(version.card),
        }
    )


@adapters_app.command("import")
def import_adapter(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name to publish it under.")],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="As PEFT's save_pretrained writes it.")
    ],
    store: Store = DEFAULT_STORE,
) -> None:
    """Publish a plain PEFT folder as the next version of NAME.

    Its files are checked here; whether it fits a base, by the service when it first loads it."""
    from cluster.registry import Registry

    typer.echo(f"published {Registry(store).import_folder(name, folder).ref}")


@adapters_app.command("alias")
def set_alias(
    ref: Ref,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="For example: stable.")],
    store: Store = DEFAULT_STORE,
) -> None:
    """Make NAME:ALIAS mean the version REF."""
    from cluster.registry import Registry

    registry = Registry(store)
    version = registry.resolve(ref)
    registry.set_alias(version.name, alias, version.version)
    typer.echo(f"{version.name}:{alias} is now {version.ref}")


@adapters_app.command("verify")
def verify_adapter(ref: Ref, store: Store = DEFAULT_STORE) -> None:
    """Read every file of a version again and compare it with its hash."""
    from cluster.registry import Registry

    version = Registry(store).verify(ref)
    size = sum(entry.bytes for entry in version.files.values())
    typer.echo(f"{version.ref}: {len(version.files)} files, {size:,} bytes, as published")


def main() -> None:
    """The console script: a GraftError becomes one message and its exit code, never a traceback."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries warn their developers; who types this is none
    try:
        _build()()
    except GraftError as error:
        typer.echo(f"error: {error.message}", err=True)
        sys.exit(outcome_of(error).exit_code)


def _build() -> Callable[..., Any]:
    """The app with the commands of the other rooms in front."""
    order = {"train": 0, "estimate": 1, "serve": 2, "generate": 3}
    found = entry_points(group="graft.commands")
    for entry in sorted(found, key=lambda entry: (order.get(entry.name, 9), entry.name)):
        loaded = entry.load()
        if isinstance(loaded, typer.Typer):
            app.add_typer(loaded, name=entry.name)
        else:
            app.command(entry.name)(loaded)
    app.add_typer(jobs_app, name="jobs")
    app.add_typer(adapters_app, name="adapters")
    return app


def _named(address: str | None) -> str:
    """The cluster to ask about jobs: never one that we would start only to find it empty."""
    import os

    return address or os.environ.get("RAY_ADDRESS") or "auto"


def _flat(card: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A card's nested values by their dotted keys."""
    pairs: dict[str, Any] = {}
    for key, value in card.items():
        if isinstance(value, Mapping):
            pairs |= _flat(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            pairs[prefix + key] = value
    return pairs


def _print_pairs(pairs: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False)
    for key, value in pairs.items():
        table.add_row(key, Text(str(value)))  # as it is: brackets are no markup here
    Console().print(table)


if __name__ == "__main__":
    main()
