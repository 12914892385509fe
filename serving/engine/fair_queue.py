"""Who waits, and whose turn is next: an equal share for each tenant, and in it for each adapter.

A virtual token counter (Sheng et al. 2024, arXiv:2401.00588) on two levels: every tenant, and
every adapter of a tenant, counts the tokens that were computed for it; the least served goes
first. One that comes back begins where the last one served stood, so being away earns nothing.
No call's cost grows with the number of those who wait, but for the logarithm of a heap.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count, pairwise

from serving.engine.sequence import Sequence


@dataclass(eq=False)
class _Party:
    """All, a tenant, or one adapter of a tenant. `line` is an adapter's, the heap of others:
    (served when listed, tick, child), out of date by what was served since."""

    served: int = 0
    members: int = 0
    num_waiting: int = 0
    floor: int = 0
    is_listed: bool = False
    children: dict[str, _Party] = field(default_factory=dict[str, "_Party"])
    heap: list[tuple[int, int, _Party]] = field(default_factory=list[tuple[int, int, "_Party"]])
    line: OrderedDict[Sequence, None] = field(default_factory=OrderedDict[Sequence, None])

    def least_served(self) -> _Party | None:
        """The child with waiters that was served least."""
        while self.heap:
            served, tick, child = self.heap[0]
            if not child.num_waiting:
                heappop(self.heap)
                child.is_listed = False
            elif served < child.served:
                heapreplace(self.heap, (child.served, tick, child))
            else:
                return child
        return None


class FairQueue:
    """Sequences from `enter` to `leave`, waiting or taken."""

    def __init__(self) -> None:
        self._all = _Party()
        self._ticks = count()

    def __len__(self) -> int:
        return self._all.num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Those who wait, in no order that matters."""
        for tenant in self._all.children.values():
            for adapter in tenant.children.values():
                yield from adapter.line

    def enter(self, sequence: Sequence) -> None:
        """A newcomer waits, last among those of its tenant and adapter."""
        tenant = self._all.children.setdefault(sequence.tenant, _Party())
        tenant.children.setdefault(sequence.adapter, _Party())
        for party in self._parties(sequence):
            party.members += 1
        self._wait(sequence)

    def first(self) -> Sequence | None:
        """Whose turn it is."""
        tenant = self._all.least_served()
        adapter = tenant.least_served() if tenant else None
        return next(iter(adapter.line)) if adapter else None

    def take(self, sequence: Sequence) -> None:
        """The first one waits no more."""
        self._unwait(sequence)
        parties = self._parties(sequence)
        for parent, child in pairwise(parties):
            parent.floor = max(parent.floor, child.served)

    def put_back(self, sequence: Sequence) -> None:
        """One that was taken waits again, first among those of its tenant and adapter."""
        self._wait(sequence)
        self._parties(sequence)[-1].line.move_to_end(sequence, last=False)

    def leave(self, sequence: Sequence) -> None:
        """It is over, whether it waits or was taken."""
        everyone, tenant, adapter = parties = self._parties(sequence)
        if sequence in adapter.line:
            self._unwait(sequence)
        for party in parties:
            party.members -= 1
        if not adapter.members:
            del tenant.children[sequence.adapter]
        if not tenant.members:
            del everyone.children[sequence.tenant]

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """So many tokens are computed for it."""
        for party in self._parties(sequence):
            party.served += tokens

    def served(self, sequence: Sequence) -> tuple[int, int]:
        """Tokens computed for its tenant, and for its adapter there: least first is fair."""
        _, tenant, adapter = self._parties(sequence)
        return tenant.served, adapter.served

    def _parties(self, sequence: Sequence) -> tuple[_Party, _Party, _Party]:
        tenant = self._all.children[sequence.tenant]
        return self._all, tenant, tenant.children[sequence.adapter]

    def _wait(self, sequence: Sequence) -> None:
        parties = self._parties(sequence)
        parties[-1].line[sequence] = None
        for party in parties:
            party.num_waiting += 1
        for parent, child in pairwise(parties):
            if not child.is_listed:
                child.is_listed = True
                child.served = max(child.served, parent.floor)
                heappush(parent.heap, (child.served, next(self._ticks), child))

    def _unwait(self, sequence: Sequence) -> None:
        parties = self._parties(sequence)
        del parties[-1].line[sequence]
        for party in parties:
            party.num_waiting -= 1
