"""Which tokens of which sequences the next step computes. One screen of policy, no torch.

Running sequences go first, those that generate before those still reading their prompt, then
waiting ones in order of arrival, all under a token budget, so a long prompt is read over several
steps beside the others. When pages run out, the newest running sequence gives its pages back and
waits at the front of the queue; its tokens are computed again later (preemption by recompute).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from serving.engine.pages import PagePool


@dataclass(eq=False)
class Sequence:
    """One request's tokens and how far they are computed.

    `tokens` is the prompt and what was generated; `prefix_tokens` positions in front of them
    belong to the adapter, in pages of its own. `adapter` groups rows of a step. Logits are wanted
    behind the last token, and behind each of the first `scored_tokens`.
    """

    id: str
    tokens: list[int]
    adapter: str = ""
    prefix_tokens: int = 0
    scored_tokens: int = 0
    num_computed: int = 0
    pages: list[int] = field(default_factory=list[int])
    preemptions: int = 0

    @property
    def num_left(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence from its token `start`; the last of them is sampled from if
    nothing is left behind it."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_sampled(self) -> bool:
        """Whether the step ends at the sequence's last token."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def wanted(self) -> range:
        """The tokens, counted from the chunk's first, behind which logits are wanted."""
        scored = min(self.count, self.sequence.scored_tokens - self.start)
        if scored <= 0:
            return range(self.count - self.is_sampled, self.count)
        assert scored == self.count or not self.is_sampled, "prompts alone are scored"
        return range(scored)


class Scheduler:
    """Waiting and running sequences over one page pool. Used by one thread."""

    def __init__(
        self, pool: PagePool, *, page_tokens: int, max_running: int, max_step_tokens: int
    ) -> None:
        self.pool = pool
        self.page_tokens = page_tokens
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence, running first."""
        yield from (*self.running, *self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller saw to it that it fits the pool when alone."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, sorted by adapter; pages for all of them are taken."""
        budget = self.max_step_tokens
        chunks: dict[str, Chunk] = {}
        preemptions = 0
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_left > 1):
            if sequence not in self.running or not budget:
                continue  # preempted for one before it, or the step is full
            count = min(sequence.num_left, budget)
            while not self._grow(sequence, sequence.num_computed + count):
                victim = self.running[-1]
                self.preempt(victim)
                preemptions += 1
                lost = chunks.pop(victim.id, None)
                budget += lost.count if lost else 0
                if victim is sequence:
                    break
            else:
                chunks[sequence.id] = Chunk(sequence, sequence.num_computed, count)
                budget -= count
        while not preemptions and budget and self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            if self._missing_pages(sequence, len(sequence.tokens)) > self.pool.num_free:
                break
            count = min(sequence.num_left, budget)
            self._grow(sequence, count)
            self.running.append(self.waiting.popleft())
            chunks[sequence.id] = Chunk(sequence, sequence.num_computed, count)
            budget -= count
        return sorted(chunks.values(), key=lambda chunk: chunk.sequence.adapter)

    def reclaim(self, pages: int) -> bool:
        """Preempt until `pages` are free; False if even that is not enough."""
        while self.pool.num_free < pages and self.running:
            self.preempt(self.running[-1])
        return self.pool.num_free >= pages

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the front of the queue, without pages."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)

    def check(self) -> None:
        """Raise AssertionError unless pages and sequences agree (the tests call it each step)."""
        self.pool.check()
        for sequence in self.running:
            held = len(sequence.pages) * self.page_tokens
            assert held >= sequence.num_computed, f"{sequence.id} has computed beyond its pages"
        assert all(not s.pages and not s.num_computed for s in self.waiting), "a waiter holds pages"
        pages = [page for sequence in self for page in sequence.pages]
        assert len(pages) == len(set(pages)), "two sequences own one page"

    def _missing_pages(self, sequence: Sequence, tokens: int) -> int:
        return -(-tokens // self.page_tokens) - len(sequence.pages)

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give `sequence` pages for so many tokens of its own; False if there are too few."""
        pages = self.pool.take(max(0, self._missing_pages(sequence, tokens)))
        if pages is None:
            return False
        sequence.pages += pages
        return True

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.pages)
        sequence.pages = []
        sequence.num_computed = 0
