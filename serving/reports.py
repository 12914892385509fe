"""What the engine replicas last told of themselves, in a gateway's process.

The router writes it, whenever Ray Serve brings it their statistics; /metrics and /ready read it. A
module of its own, since Serve pickles the router's module by value: a global there would be another
one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

_latest: Mapping[str, Mapping[str, Any]] = {}
_seen: Mapping[str, tuple[int, float]] = {}  # by replica: its report's number, and since when


def replace(reports: Mapping[str, Mapping[str, Any]], numbers: Mapping[str, int]) -> None:
    """Set the figures of all replicas that there are now, by id, and how many reports each made."""
    global _latest, _seen
    now_s = time.monotonic()
    before = _seen
    _seen = {
        replica: before[replica] if before.get(replica, (0,))[0] == number else (number, now_s)
        for replica, number in numbers.items()
    }
    _latest = reports


def forget(replica: str) -> None:
    """Nothing counts that a replica told which has died, also where it is listed once more."""
    global _latest, _seen
    _latest = {name: figures for name, figures in _latest.items() if name != replica}
    if replica in _seen:
        _seen = {**_seen, replica: (_seen[replica][0], -math.inf)}


def latest() -> Mapping[str, Mapping[str, Any]]:
    """The figures of each replica, by id."""
    return _latest


def age_s() -> float:
    """Seconds since one of the replicas that there are last told of itself; infinity if none
    did."""
    return time.monotonic() - max((at_s for _, at_s in _seen.values()), default=-math.inf)
