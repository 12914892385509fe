"""The end of a service on Ray Serve: nothing that runs is lost, and nothing of Serve stays.

Called by `serving.app` behind a service that ran or failed to start. Serve's own calls give up on
their own terms, mostly without a word. Knows names of Serve's actors, and nothing of engines.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cluster.errors import ClusterError

_NAMESPACE = "serve"  # of Serve's actors
_LOOK_S = 0.5


def controller() -> Any:
    """Serve's controller on this cluster, None if there is none."""
    import ray

    try:
        return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace=_NAMESPACE)
    except ValueError:
        return None


def take_down(gateways: str, engines: str, cut_off: threading.Event, *, shut_down: bool) -> None:
    """Delete two applications: the gateways once they have finished their requests, then the
    engines, which they need until then.

    Args:
        cut_off: Set to delete the gateways at once.
        shut_down: Serve too, if it has no other application.

    Raises:
        ClusterError: Serve does not answer, or does not end.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        _delete(serve, gateways, cut_off.is_set)
        _delete(serve, engines, lambda: True)  # nothing runs on them
        if shut_down and not serve.status().applications:
            _shut_down(serve)
    except (RayError, RayServeException, TimeoutError) as error:
        if controller() is not None:  # otherwise somebody else has shut it down meanwhile
            raise ClusterError(
                f"Ray Serve does not end ({type(error).__name__}); see its controller's log, and "
                "end it with `serve shutdown`"
            ) from error
        _kill_actors("SERVE_")


def _delete(serve: Any, application: str, kills: Callable[[], bool]) -> None:
    """Delete an application and wait until its replicas have ended. Serve's own wait gives up after
    a minute, less than a stream may take.

    Args:
        kills: Whether to kill them by now: Serve waits for what runs on them, and for one that is
            still loading.
    """
    while True:
        # Again each time: a roll-over that is on its way brings the application back.
        serve.delete(application, _blocking=False)
        if kills():
            _kill_actors(f"SERVE_REPLICA::{application}#")
        if application not in serve.status().applications:
            return
        time.sleep(_LOOK_S)


def _shut_down(serve: Any) -> None:
    """Shut Serve down, and try again: its own call does nothing if the controller is busy for five
    seconds. Raises TimeoutError if the controller answers and is there for a minute."""
    deadline = time.monotonic() + 60
    while controller() is not None:
        if time.monotonic() > deadline:
            raise TimeoutError
        serve.shutdown()
        time.sleep(_LOOK_S)
    # A restarted controller does not know the proxies of nodes that no longer need one.
    _kill_actors("SERVE_PROXY_ACTOR")


def _kill_actors(prefix: str) -> None:
    """End Serve's actors whose names begin so."""
    import ray

    # Any: with all_namespaces the items are dicts, though typed as str.
    actors: Any = ray.util.list_named_actors(all_namespaces=True)
    for actor in actors:
        if actor["namespace"] == _NAMESPACE and actor["name"].startswith(prefix):
            with suppress(ValueError):  # it has ended meanwhile
                ray.kill(ray.get_actor(**actor))
