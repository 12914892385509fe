"""Which replica a request goes to: one that holds its adapter, on its device or behind it in host
memory, unless it is much busier.

The choice is a pure function, tested alone; around it is what Ray Serve asks of a request router.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from cluster.mixes import members_of

STATS_PERIOD_S = 1.0
# By how many requests a holder may be busier than the least busy replica, which would have to
# load the adapter first.
HOLDER_SLACK = 16
# For how long a replica counts as holding what it was sent: loading takes seconds, and after that
# its statistics tell.
_LOADING_S = 30.0
_REMEMBERED = 10_000


def rank(
    loads: Mapping[str, int],
    holders: Set[str],
    adapter: str,
    *,
    on_host: Set[str] = frozenset(),
    slack: int = HOLDER_SLACK,
) -> list[str]:
    """The replicas of `loads` (requests in progress by id) in order of preference.

    First those that hold the adapter, the least busy in front; then those that have it `on_host`,
    in host memory, alike. Then, for an adapter that is cold or whose holders are too busy, its own
    order of the others (rendezvous hashing): every gateway sends it to the same replica, and a hot
    one spreads over as many as its load needs. Whoever is `slack` requests above the least busy one
    comes last; without an adapter only load counts.
    """
    if not loads:
        return []
    least = min(loads.values())

    def cost(replica: str) -> tuple[int, int, str]:
        if not adapter or loads[replica] > least + slack:
            return (3, loads[replica], replica)
        if replica in holders:
            return (0, loads[replica], replica)
        if replica in on_host:
            return (1, loads[replica], replica)
        return (2, _hash(adapter, replica), replica)

    return sorted(loads, key=cost)


def holds(held: Sequence[str], adapter: str) -> bool:
    """Whether a replica that holds these adapters need fetch nothing for `adapter`: a mix is made
    of members that are there."""
    return adapter in held or all(member in held for member in members_of(adapter))


def places(told: Mapping[str, Mapping[str, Any] | None], adapter: str) -> tuple[set[str], set[str]]:
    """Which replicas hold the adapter, and which others have it in host memory, by what each last
    told (`EngineReplica.record_routing_stats`; None: nothing yet)."""
    holders, on_host = set[str](), set[str]()
    for replica, stats in told.items():
        if stats:
            held: Sequence[str] = stats["adapters"]
            if holds(held, adapter):
                holders.add(replica)
            elif holds([*held, *stats["host_adapters"]], adapter):
                on_host.add(replica)
    return holders, on_host


class Sent:
    """Where each adapter was last sent, for as long as it may be on its way into that replica."""

    def __init__(self) -> None:
        self._places: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def note(self, adapter: str, replica: str, now_s: float) -> None:
        """A request for `adapter` goes to `replica`."""
        self._places[adapter] = replica, now_s
        self._places.move_to_end(adapter)
        if len(self._places) > _REMEMBERED:
            self._places.popitem(last=False)

    def place(self, adapter: str, now_s: float) -> str | None:
        """The replica that is loading it, if one may be."""
        replica, sent_s = self._places.get(adapter, ("", now_s - _LOADING_S))
        return replica if now_s - sent_s < _LOADING_S else None


class AdapterRouter(FIFOMixin, RequestRouter):
    """Routes by `rank`. Which replica holds what comes from their statistics, and until those
    arrive from where the last request for that adapter went."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray Serve once."""
        self._sent = Sent()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray Serve with every change of the replicas or of their statistics."""
        from serving.reports import replace

        super().update_replicas(replicas)
        told = {r.replica_id.unique_id: r.routing_stats for r in replicas if r.routing_stats}
        figures = {replica: stats["figures"] for replica, stats in told.items()}
        replace(figures, {replica: stats["reports"] for replica, stats in told.items()})

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Ray Serve where a request finds that out, which may be long before the
        controller does."""
        from serving.reports import forget

        super().on_replica_actor_died(replica_id)
        forget(replica_id.unique_id)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Called by Ray Serve for each request; the first list that has a free replica counts."""
        by_id = {r.replica_id.unique_id: r for r in candidate_replicas}
        queue_lengths = self.replica_queue_len_cache
        loads = {i: queue_lengths.get(r.replica_id) or 0 for i, r in by_id.items()}
        adapter = _adapter_of(pending_request)
        holders, on_host = places({i: r.routing_stats for i, r in by_id.items()}, adapter)
        loading = self._sent.place(adapter, time.monotonic())
        if loading is not None:
            holders.add(loading)
        order = rank(loads, holders, adapter, on_host=on_host)
        return [[by_id[replica]] for replica in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Called by Ray Serve: remember who will now load the adapter."""
        adapter = _adapter_of(pending_request)
        if adapter:
            self._sent.note(adapter, replica_id.unique_id, time.monotonic())


def _hash(adapter: str, replica: str) -> int:
    return int.from_bytes(blake2b(f"{adapter} {replica}".encode(), digest_size=8).digest(), "big")


def _adapter_of(pending: PendingRequest | None) -> str:
    """By the arguments of `EngineReplica.generate`; other methods have none. Serve has a field for
    a model's id, but keeps each request that has one for ever unless its own multiplexing routes
    it (2.60: `_pending_requests_by_model_id`)."""
    adapter = pending.args[1] if pending is not None and len(pending.args) > 1 else None
    return adapter.ref if adapter is not None else ""
