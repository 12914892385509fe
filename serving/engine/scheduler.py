"""Which tokens of which sequences the next step computes. One screen of policy, no torch.

Running sequences are in every step as far as its token budget goes: those that generate first,
then those that read their prompt, the least served adapter before others. A waiting one is let in
when it is its turn (fair_queue), a row and pages for all its tokens are free, and nobody is just
computing pages that it could share. What stands in the way of fairness is preempted: its pages go
back, it waits at the front of its line, and what others have not overwritten it finds again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from serving.engine.fair_queue import FairQueue
from serving.engine.pages import PagePool
from serving.engine.sequence import Chunk, Sequence


class Scheduler:
    """Waiting and running sequences over one page pool. Used by one thread."""

    def __init__(
        self, pool: PagePool, *, page_tokens: int, max_running: int, max_step_tokens: int
    ) -> None:
        self.pool = pool
        self.page_tokens = page_tokens
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.waiting = FairQueue()
        self.running: dict[Sequence, None] = {}  # in order of admission
        self.cached_tokens = 0
        self._promised: set[bytes] = set()  # what running sequences are about to compute

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence, running first."""
        yield from (*self.running, *self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller saw to it that it fits the pool when alone."""
        self.waiting.enter(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and free its pages."""
        if sequence in self.running:
            self._release(sequence)
        self.waiting.leave(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, sorted by adapter; pages for all of them are taken."""
        self._admit()
        turn = {s: (s.is_reading, self.waiting.served(s)) for s in self.running}
        chunks: dict[Sequence, Chunk] = {}
        budget = self.max_step_tokens
        # Prompts keep a quarter, or those that generate could lock them out.
        kept = -(-budget // 4) if any(is_reading for is_reading, _ in turn.values()) else 0
        for sequence in sorted(self.running, key=turn.__getitem__):
            count = min(sequence.num_left, budget - (0 if turn[sequence][0] else kept))
            if count <= 0 or sequence not in self.running:
                continue  # the step is full, or it was preempted for one before it
            while not self._grow(sequence, sequence.num_computed + count):
                victim = self._newest_of_most(self.running)
                assert victim is not None
                lost = chunks.pop(victim, None)
                budget += lost.cost if lost else 0
                self.preempt(victim)
                if victim is sequence:
                    break
            else:
                chunks[sequence] = chunk = Chunk(sequence, sequence.num_computed, count)
                # An encoder's source is read as a whole: the last of a step may exceed the budget.
                budget -= chunk.cost
        for chunk in chunks.values():
            self.waiting.charge(chunk.sequence, chunk.cost)
        return sorted(chunks.values(), key=lambda chunk: chunk.sequence.adapter)

    def advance(self, chunk: Chunk) -> None:
        """A chunk is computed; pages that are full now can be shared."""
        sequence = chunk.sequence
        sequence.num_computed += chunk.count
        keys = sequence.keys(sequence.num_computed, self.page_tokens)
        first = sequence.prefix_pages(self.page_tokens) + chunk.start // self.page_tokens
        for index in range(first if sequence.has_prefix else 0, len(keys)):
            self.pool.label(sequence.pages[index], keys[index])
            self._promised.discard(keys[index])
        sequence.has_prefix = True

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the front of its line, without pages."""
        self._release(sequence)
        sequence.preemptions += 1
        self.waiting.put_back(sequence)

    def check(self) -> None:
        """Raise AssertionError unless pages and sequences agree (the tests call it each step)."""
        self.pool.check(page for sequence in self.running for page in sequence.pages)
        for sequence in self.running:
            own = len(sequence.pages) - sequence.prefix_pages(self.page_tokens)
            assert max(0, own) * self.page_tokens >= sequence.num_computed, (
                f"{sequence.id} has no page"
            )
        assert not any(s.pages or s.num_computed for s in self.waiting), "a waiter holds pages"
        assert len(self.waiting) == len(list(self.waiting)), "a waiter is lost"
        assert self.running or not self._promised, "a promise is left"

    def _admit(self) -> None:
        """Let in who is next, as long as there is room or a right to it."""
        # For the tokens that are known, and a page more for each to go on into.
        reserved = sum(self._missing(s, len(s.tokens)) + 1 for s in self.running)
        aside: list[Sequence] = []
        while (sequence := self.waiting.first()) and len(aside) < self.max_running:
            keys = self._shareable(sequence)
            known = self.pool.known(keys)
            if known < len(keys) and keys[known] in self._promised:
                self.waiting.take(sequence)
                aside.append(sequence)  # a step or more later it finds them
                continue
            while not self._enter(sequence, keys[:known], reserved):
                victim = self._owed(sequence)
                if victim is None:
                    break
                reserved -= self._missing(victim, len(victim.tokens)) + 1
                self.preempt(victim)
            if sequence not in self.running:
                break
            reserved += self._missing(sequence, len(sequence.tokens)) + 1
            self._promised.update(keys[known:])
        for sequence in reversed(aside):
            self.waiting.put_back(sequence)

    def _enter(self, sequence: Sequence, keys: list[bytes], reserved: int) -> bool:
        """Start a waiting sequence with the known pages of `keys`, if there is room for all."""
        if len(self.running) >= self.max_running:
            return False
        prefix = sequence.prefix_pages(self.page_tokens)
        if len(keys) < prefix:
            keys = []  # a prefix is there in whole or not at all
        sequence.pages = self.pool.share(keys)
        if self._missing(sequence, len(sequence.tokens)) + reserved > self.pool.num_free:
            self.pool.give_back(sequence.pages)
            sequence.pages = []
            return False
        if keys:
            sequence.has_prefix = True
            sequence.num_computed = (len(keys) - prefix) * self.page_tokens
            self.cached_tokens += sequence.source_tokens + sequence.num_computed
        self.waiting.take(sequence)
        self.running[sequence] = None
        return True

    def _shareable(self, sequence: Sequence) -> list[bytes]:
        """The keys of pages that would do for a start: at least one token is left to compute."""
        return sequence.keys(sequence.first_needed, self.page_tokens)

    def _owed(self, sequence: Sequence) -> Sequence | None:
        """Whom to preempt for a waiting sequence: its tenant, or in it its adapter, runs less than
        another by two or more, so that both are nearer to an equal share afterwards."""
        tenants = Counter(other.tenant for other in self.running)
        victim = self._newest_of_most(self.running)
        if victim and tenants[victim.tenant] > tenants[sequence.tenant] + 1:
            return victim
        own = [other for other in self.running if other.tenant == sequence.tenant]
        adapters = Counter(other.adapter for other in own)
        victim = self._newest_of_most(own)
        if victim and adapters[victim.adapter] > adapters[sequence.adapter] + 1:
            return victim
        return None

    @staticmethod
    def _newest_of_most(running: Collection[Sequence]) -> Sequence | None:
        """The newest sequence of the adapter that runs most, of the tenant that runs most. The
        oldest of all is never it unless it is alone, so somebody always comes to an end."""
        tenants = Counter(s.tenant for s in running)
        adapters = Counter((s.tenant, s.adapter) for s in running)
        return max(
            reversed(list(running)),
            key=lambda s: (tenants[s.tenant], adapters[s.tenant, s.adapter]),
            default=None,
        )

    def _missing(self, sequence: Sequence, tokens: int) -> int:
        """Pages that a sequence still needs for its prefix and so many tokens."""
        own = -(-tokens // self.page_tokens)
        return max(0, sequence.prefix_pages(self.page_tokens) + own - len(sequence.pages))

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give `sequence` pages for so many tokens of its own; False if there are too few."""
        pages = self.pool.take(self._missing(sequence, tokens))
        if pages is None:
            return False
        sequence.pages += pages
        return True

    def _release(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self._promised.difference_update(self._shareable(sequence))
        self.pool.give_back(sequence.pages)
        sequence.pages = []
        sequence.num_computed = 0
        sequence.has_prefix = False
