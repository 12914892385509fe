"""A running service: the application on a Ray cluster, reachable over HTTP."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from cluster.errors import ClusterError, ConflictError, NotFoundError, SpecError
from cluster.names import absolute_path
from cluster.session import Session
from serving.shutdown import controller, take_down
from serving.spec import ServingSpec


def checked(spec: ServingSpec) -> ServingSpec:
    """`spec` with local paths made absolute, after the bases' folders were looked at.

    Raises:
        BaseModelError: a base is not a whole folder; nothing was started.
        SpecError: it asks for an extra that is not installed.
    """
    from cluster.base_model import check_base_folder

    if spec.gateway.traces is not None and not _can_trace():
        raise SpecError(
            f"gateway.traces is {spec.gateway.traces}, and OpenTelemetry's exporter is not "
            "installed; pip install 'raygraft[otel]', or leave it out"
        )
    base = absolute_path(spec.engine.base_model)
    check_base_folder(base, with_tokenizer=True)
    small = tuple(absolute_path(path) for path in spec.engine.small_bases)
    for path in small:
        check_base_folder(path, with_tokenizer=False)
    cache = absolute_path(spec.cache)
    engine = spec.engine.model_copy(update={"base_model": base, "small_bases": small})
    return spec.model_copy(update={"engine": engine, "cache": cache})


@contextmanager
def running(
    spec: ServingSpec, session: Session, cut_off: threading.Event | None = None
) -> Generator[str]:
    """Deploy a `checked` spec on the session's cluster; yields its URL once every part answers. On
    exit it ends as soon as its requests have, or `cut_off` is set.

    Raises:
        ConflictError: the port is taken, or Ray Serve runs on the cluster already.
        ClusterError: the replicas do not come up; the message has their reason. Or Serve does not
            end.
    """
    port = _port(spec)
    serve = _serve(session)
    from serving.deployment import CONTROLLER, PROXY, engines_of

    with _starting(spec):
        if controller() is not None:
            there = ", ".join(serve.status().applications) or "no application"
            raise ConflictError(
                f"Ray Serve runs {there} on this cluster already, and Graft's service needs its "
                "port, route and settings; end that with `serve shutdown`, give --update if it is "
                "this service, or use another cluster"
            )
    variables = CONTROLLER | (PROXY if session.started_here else {})
    cut_off, is_up = cut_off or threading.Event(), False
    try:
        with _starting(spec):
            serve.start(
                http_options={"host": spec.gateway.host, "port": port},
                controller_options={"runtime_env": {"env_vars": variables}},
            )
            _deploy(serve, spec)
        is_up = True
        yield _url(spec.gateway.host, port)
    finally:
        if not is_up:  # nobody has asked anything yet
            cut_off.set()
        if not session.is_over() and controller() is not None:
            # A cluster of our own ends with the session.
            shut_down = not session.started_here
            take_down(spec.name, engines_of(spec), cut_off, shut_down=shut_down)


def _can_trace() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def roll_over(spec: ServingSpec, session: Session) -> str:
    """Replace the parts of the running service of this name that a `checked` spec changes, one
    replica after another, each after its running requests; returns the URL once all are new.

    With replicas.surge_percent at 0 a replica leaves before the one in its place has proven itself:
    where there is one alone, requests wait for the new one meanwhile.

    Raises:
        NotFoundError: no service of this name runs on the cluster.
        ConflictError: it listens elsewhere or serves other bases, which no update changes.
        ClusterError: the new replicas do not come up. Those old ones go on that were not stopped
            yet: all with a surge, otherwise all but one in five, and none where there was one.
    """
    serve = _serve(session)
    from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]

    from serving.deployment import bases_of, engines_of, running_bases

    running = serve.status().applications
    if not {spec.name, engines_of(spec)} <= set(running):
        there = ", ".join(running) or "none"
        raise NotFoundError(
            f"service {spec.name!r}: does not run on this cluster, where Ray Serve has: {there}; "
            "leave out --update to start it"
        )
    client = _get_global_client()
    assert client is not None
    host, port = str(client.http_config.host), client.http_config.port
    if spec.gateway.host != host or spec.gateway.port not in (0, port):
        raise ConflictError(
            f"service {spec.name!r}: listens on {host}:{port}, not {spec.gateway.host}:"
            f"{spec.gateway.port}; stop and start it to move it"
        )
    bases = running_bases(client.get_serve_details(), spec)
    if bases != bases_of(spec):
        # Old gateways would send their tokens to new engines, and new engines go on with old
        # engines' answers.
        raise ConflictError(
            f"service {spec.name!r}: its engine.base_model and small_bases are {bases}, not "
            f"{bases_of(spec)}, and no update changes them under running requests; stop and start "
            "it, or start the other one on another cluster"
        )
    with _starting(spec):
        _deploy(serve, spec)
    return _url(host, port)


def _serve(session: Session) -> Any:
    """Ray Serve's module. Raises ClusterError for a cluster that is only known by its URL."""
    if session.address is None:
        raise ClusterError(
            f"{session.dashboard_url}: serving needs a node of the cluster; run `graft serve` on "
            "one, with --address auto"
        )
    # Ray Serve tells of each deployment and proxy at INFO.
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    from ray import serve

    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return serve


def _deploy(serve: Any, spec: ServingSpec) -> None:
    """Bring both applications to `spec`; returns when every part answers."""
    from serving.deployment import build, engines_of

    engines, gateways = build(spec)
    serve.run(engines, name=engines_of(spec), route_prefix=None)
    if not spec.replicas.min:
        # There may be no engine yet, and the first one is started by a request: whatever keeps it
        # from coming up then, a later one must find it mended. Not before: an update whose engines
        # do not come up has to end.
        patient, _ = build(spec, patiently=True)
        serve.run(patient, name=engines_of(spec), route_prefix=None)
    serve.run(gateways, name=spec.name, route_prefix="/")


@contextmanager
def _starting(spec: ServingSpec) -> Generator[None]:
    """Raise as ClusterError what Serve and Ray raise for parts that do not come up."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except (RuntimeError, TimeoutError, RayError, RayServeException) as error:
        reason = error.cause if isinstance(error, RayTaskError) else error
        raise ClusterError(f"service {spec.name!r} did not come up: {reason}") from error


def _url(host: str, port: int) -> str:
    reached = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def _port(spec: ServingSpec) -> int:
    """The port to listen on, known to be free. Raises ConflictError."""
    host, port = spec.gateway.host, spec.gateway.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConflictError(
            f"gateway.port {port} on {host}: {error.strerror}; choose another, or 0 for a free one"
        ) from error
