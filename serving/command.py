"""`graft serve`, `graft generate` and `graft keys`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import SpecError

if TYPE_CHECKING:
    from serving.client import Client

DEFAULT_URL = "http://127.0.0.1:8000"
keys = typer.Typer(help="API keys of a service.", no_args_is_help=True)
KeyStoreUri = Annotated[
    str, typer.Option("--store", envvar="GRAFT_KEYS", help="As the service's gateway.keys.")
]


def serve(
    spec: Annotated[
        Path, typer.Argument(metavar="SPEC.yaml", help="The service's YAML, as in configs/serving.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: gateway.port=0. Repeatable.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster: host:port or auto [env: RAY_ADDRESS].")
    ] = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Roll the running service of this name over to SPEC, and return. Its bases and "
            "Graft's code stay.",
        ),
    ] = False,
) -> None:
    """Serve a base model and every adapter of a store over HTTP, until interrupted."""
    import signal
    import threading

    from cluster.errors import ClusterError
    from cluster.session import session
    from cluster.spec import load_spec
    from serving.app import checked, roll_over, running
    from serving.spec import ServingSpec

    service = checked(load_spec(ServingSpec, spec, set_ or ()))
    if update:
        with session(address) as cluster:
            typer.echo(f"{service.name}: updated at {roll_over(service, cluster)}/v1")
        return
    stop, cut_off = threading.Event(), threading.Event()

    def end(_number: int, _frame: object) -> None:
        (cut_off if stop.is_set() else stop).set()

    with session(address) as cluster, running(service, cluster, cut_off) as url:
        # Until here either signal breaks the start off; from here they end the service in order.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        typer.echo(f"{service.name} and the adapters of {service.store}: {url}/v1")
        while not stop.wait(0.5):
            if cluster.is_over():
                raise ClusterError(
                    f"service {service.name!r}: the Ray cluster {cluster.address} has ended on "
                    "this machine, and the service with it; start both anew"
                )
        typer.echo("stopping once all requests are answered; a second signal cuts them off")


def generate(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Rows with a column prompt or messages.")
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="The rows with their answers: .arrow, …; offline, a folder or URI."
        ),
    ],
    adapter: Annotated[
        str | None, typer.Option(help="NAME, NAME@VERSION, NAME:ALIAS, or a mix A:0.7+B:0.3.")
    ] = None,
    adapter_column: Annotated[
        str | None, typer.Option(help="Column that names each row's adapter.")
    ] = None,
    url: Annotated[str, typer.Option(envvar="GRAFT_URL", help="Of the service.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="GRAFT_API_KEY", help="A key of the service, if it asks for one."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of one answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in progress at once.")] = 64,
    outage_s: Annotated[
        float, typer.Option(min=0, help="Seconds for which a service that is away is waited for.")
    ] = 600.0,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    offline: Annotated[
        Path | None,
        typer.Option(
            metavar="SPEC.yaml",
            help="Without a service: by engines of this spec, as of `graft serve`, on a cluster.",
        ),
    ] = None,
    local: Annotated[
        Path | None,
        typer.Option(
            metavar="SPEC.yaml|BASE",
            help="Without a service: by an engine of this spec, or of a base's folder, in this "
            "process.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Offline and local: override a key. Repeatable."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Offline: as of `graft serve` [env: RAY_ADDRESS].")
    ] = None,
    part_rows: Annotated[
        int, typer.Option(min=1, help="Offline: rows that are kept at once.")
    ] = 1024,
) -> None:
    """Answer every row of a file through a running service, in this process, or offline on a
    cluster.

    An interrupted call keeps its answers; the same call again goes on from there.
    """
    from cluster.errors import JobFailedError
    from serving.asking import Options

    options: Options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    if seed is not None:
        options["seed"] = seed
    if stop:
        options["stop"] = stop
    rows = {"adapter": adapter, "adapter_column": adapter_column}
    if offline is not None:
        _refuse(
            context, ("url", "api_key", "concurrency", "outage_s"), "an offline run asks no service"
        )
        _refuse(context, ("local",), "an offline run has engines on a cluster")
        if overwrite:
            raise SpecError("--overwrite: an offline run replaces nothing; name an empty folder")
        from cluster.spec import load_spec
        from serving.app import checked
        from serving.offline.pool import generate_offline
        from serving.spec import ServingSpec

        spec = checked(load_spec(ServingSpec, offline, set_ or ()))
        report = generate_offline(
            spec, source, target, options=options, address=address, part_rows=part_rows,
            progress=not quiet, **rows,
        )  # fmt: skip
    else:
        _refuse(context, ("address", "part_rows"), "only an --offline run takes it")
        settings = {"api_key": api_key, "concurrency": concurrency}
        with _client(context, url, local, set_ or (), settings) as client:
            report = client.generate_file(
                source, target, overwrite=overwrite, progress=not quiet, outage_s=outage_s,
                **rows, **options,
            )  # fmt: skip
    typer.echo(f"{target}: {report}")
    if report.failed:
        raise JobFailedError(
            f"{report.failed} of {report.rows} rows failed; their column 'error' says why"
        )


def _client(
    context: typer.Context,
    url: str,
    local: Path | None,
    overrides: Sequence[str],
    settings: Mapping[str, Any],
) -> Client:
    """Of the service at `url`, or of an engine in this process."""
    from serving.client import Client

    if local is None:
        _refuse(context, ("set_",), "only an --offline or a --local run takes it")
        return Client(url, **settings)
    _refuse(context, ("url",), "a --local run asks no service")
    from serving.local import local_spec

    return Client.local(local_spec(local, overrides), **settings)


def _refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Raise SpecError for an option of `names` that the command line gives; one from the
    environment is there for other calls too."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source is not None and source.name == "COMMANDLINE":
            raise SpecError(f"{option.opts[0]}: {why}; leave it out")


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is.")],
    store: KeyStoreUri,
    adapters: Annotated[
        list[str] | None, typer.Option(help="Pattern of models that it may ask. Repeatable.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="At each gateway. None: no limit.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Of prompts and answers, at each gateway.")
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Answers at once, at each gateway.")
    ] = None,
) -> None:
    """Make a key and print it, once: the store keeps only its hash."""
    from serving.keys import KeyStore

    _, text = KeyStore(store).create(
        name,
        adapters=adapters or ("*",),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
    )
    typer.echo(text)


@keys.command("list")
def list_keys(store: KeyStoreUri) -> None:
    """List the keys that are not revoked."""
    from rich.console import Console
    from rich.table import Table

    from serving.keys import KeyStore

    table = Table(
        "id", "name", "adapters", "requests/min", "tokens/min", "at once", "made", box=None
    )
    for key in KeyStore(store).keys().values():
        limits = (key.requests_per_minute, key.tokens_per_minute, key.max_concurrent)
        shown = ("" if limit is None else f"{limit:,}" for limit in limits)
        table.add_row(key.id, key.name, " ".join(key.adapters), *shown, key.created_at)
    Console().print(table)


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="ID", help="As `graft keys list` shows it.")],
    store: KeyStoreUri,
) -> None:
    """Make a key worthless, within seconds, at every gateway."""
    from serving.keys import KeyStore

    KeyStore(store).revoke(key)
    typer.echo(f"{key}: revoked")
