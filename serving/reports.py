"""What the engine replicas last told of themselves, in a gateway's process.

The router writes it, whenever Ray Serve brings it their statistics; /metrics reads it. A module of
its own, since Serve pickles the router's module by value: a global there would be another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_latest: Mapping[str, Mapping[str, Any]] = {}


def replace(reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the figures of all replicas that there are now, by id."""
    global _latest
    _latest = reports


def latest() -> Mapping[str, Mapping[str, Any]]:
    """The figures of each replica, by id."""
    return _latest
