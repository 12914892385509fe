"""Find a Ray cluster, or start one on this machine that ends with us.

Ray gives anybody who reaches its ports the right to run code, so a cluster that Graft starts asks
for a token and listens on loopback alone. Knows addresses; what runs there is for jobs and the
serving app. Ray is imported only when a session begins.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import ClusterError

PACKAGES = ("cluster", "training", "serving")
CONNECT_TIMEOUT_S = 5.0
# Despite its name, "0" here makes Ray on any platform call this machine 127.0.0.1 instead of by
# its outer address. Read when ray is imported.
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# A laptop's demo must not claim a third of its memory for objects that Graft hardly uses.
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Session:
    """A reachable cluster. `address` is None where only its dashboard's URL is known; `node` is an
    open connection to this machine's own node of it."""

    address: str | None
    dashboard_url: str
    started_here: bool
    node: socket.socket | None = None

    def is_over(self) -> bool:
        """Whether this machine's node has ended, as by `ray stop`: what we ask of the cluster then
        is answered by nobody, and Ray ends our process a minute later."""
        if self.node is None:
            return False
        try:  # it says nothing to who never speaks, until its end; a new connection it would log
            return not self.node.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True


@contextmanager
def session(address: str | None = None, *, num_cpus: int | None = None) -> Generator[Session]:
    """Connect to a cluster, or start one that is stopped, every process of it, on exit.

    Looked for in this order: `address` ("host:port" of a cluster that this machine is a node of,
    "auto", or "http://host:8265" for submitting from anywhere), RAY_ADDRESS, a cluster already
    running on this machine; else one is started here with `num_cpus` (default: all).

    Raises:
        ClusterError: the cluster named does not answer or refuses our token.
    """
    named = address or os.environ.get("RAY_ADDRESS") or _running_here()
    if named and urlsplit(named).scheme in ("http", "https"):
        _check_reachable(named)
        yield Session(address=None, dashboard_url=named.rstrip("/"), started_here=False)
        return
    if named == "auto":
        named = _running_here()
        if named is None:
            raise ClusterError("address 'auto': no Ray cluster runs on this machine")
    with _own_signals():
        info = _connect(named) if named else _start(num_cpus)
    import ray

    url = str(info["webui_url"] or "")
    node = _connection_to(str(info["raylet_socket_name"]))
    found = Session(str(info["address"]), f"http://{url}", named is None, node)
    try:
        if not url:
            raise ClusterError(
                f"Ray cluster {named}: has no dashboard, which jobs need; "
                "start its head with `ray start --head --include-dashboard=true`"
            )
        yield found
    finally:
        # Where that node is gone, Ray would end the process before what happened is told.
        if found.started_here or not found.is_over():
            ray.shutdown()
        if node is not None:
            node.close()


def _connection_to(raylet: str) -> socket.socket | None:
    """A connection to a node by its socket; None where there is none to be had, and so nothing to
    see its end by."""
    node = socket.socket(socket.AF_UNIX)
    try:
        node.settimeout(CONNECT_TIMEOUT_S)
        node.connect(raylet)
        node.settimeout(None)  # or Python would wait in `recv`, whatever its flags
    except OSError:
        node.close()
        return None
    return node


@contextmanager
def _own_signals() -> Generator[None]:
    """Ray makes SIGTERM abort the process; it shall end it in order, or do what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    yield
    signal.signal(signal.SIGTERM, leave if before in (None, signal.SIG_DFL) else before)


def our_code() -> dict[str, Any]:
    """The part of a Ray runtime environment that brings this Graft to every node, so that a
    cluster needs only the dependencies and always runs its caller's version."""
    folders: list[str] = []
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ClusterError(
                f"package {package!r} is not installed beside Graft; install it anew"
            )
        folders.append(next(iter(spec.submodule_search_locations)))
    return {"py_modules": folders, "excludes": ["**/__pycache__"]}


def store_credentials() -> dict[str, str]:
    """What a process on the cluster needs of our environment to reach the store. Ray shows these
    variables to whoever may see its jobs; give a role to the nodes where that is too much."""
    return {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_"))}


def _running_here() -> str | None:
    """The address that `ray start` left on this machine, if something still listens there."""
    try:
        found = Path(tempfile.gettempdir(), "ray", "ray_current_cluster").read_text().strip()
        _check_reachable(found)
    except (OSError, ClusterError):
        return None
    return found


def _check_reachable(address: str) -> None:
    """Raise ClusterError within seconds where Ray itself would wait for minutes."""
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        port = None
    if not parts.hostname or port is None:
        raise ClusterError(f"Ray address {address!r}: write host:port or http://host:8265")
    try:
        socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"Ray cluster {address}: does not answer ({error.strerror or error}); "
            "check the address, or leave it out to start a cluster on this machine"
        ) from error


def _connect(address: str) -> dict[str, Any]:
    _check_reachable(address)
    host, _, port = address.rpartition(":")
    if host in ("127.0.0.1", "localhost") and not _answers_outside(int(port)):
        # Ray takes loopback for our outer address, where this cluster does not listen.
        os.environ.setdefault(LOOPBACK, "0")
    import ray
    from ray.exceptions import AuthenticationError

    try:
        context: Any = ray.init(
            address=address,
            runtime_env=our_code(),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except AuthenticationError as error:
        raise ClusterError(
            f"Ray cluster {address}: refuses our token; put the cluster's token into "
            "~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray cluster {address}: cannot be joined: {error}") from error
    return dict(context.address_info)


def _start(num_cpus: int | None) -> dict[str, Any]:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault(LOOPBACK, "0")
    # Ray would put its workers, which do all the work, behind every other process of the machine,
    # its own daemons too: beside one that computes, a call between two of them took 6 ms and not 2.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # It would also start workers ahead of time, which nothing of ours can use, since all of it has
    # an environment of its own; each wakes up a hundred times a second.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    import ray

    try:
        with _free_agent_port():
            context: Any = ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=_free_port(),
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (OSError, ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray could not be started on this machine: {error}") from error
    return dict(context.address_info)


@contextmanager
def _free_agent_port() -> Generator[None]:
    """The agent that starts jobs takes any free port: of itself it takes 52365, and where another
    cluster on the machine has that, no job can be submitted. `ray start` has an option for it,
    `ray.init` has none."""
    from ray._private.parameter import RayParams

    before: Any = RayParams.__init__
    setattr(RayParams, "__init__", partialmethod(before, dashboard_agent_listen_port=0))  # noqa: B010
    try:
        yield
    finally:
        setattr(RayParams, "__init__", before)  # noqa: B010


def _answers_outside(port: int) -> bool:
    """Whether something listens at `port` of this machine's outer address."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing; only tells our address
            outer = probe.getsockname()[0]
        socket.create_connection((outer, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
