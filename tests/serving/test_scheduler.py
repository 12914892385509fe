"""Pages and scheduling under random traffic: nothing lost, nothing owned twice, everyone served,
and what is shared is what would have been computed."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.pages import PagePool, next_key, root_key
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Chunk, Sequence

PAGE = 4


class Memory:
    """What the engine would have written into each slot: all that decides a token's keys and
    values. Reading checks that the pages of a sequence hold nothing else."""

    def __init__(self) -> None:
        self.slots: dict[int, object] = {}

    def compute(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        slots = [page * PAGE + offset for page in sequence.pages for offset in range(PAGE)]
        prefix = slots[: sequence.prefix_tokens]
        own = slots[sequence.prefix_pages(PAGE) * PAGE :]
        if not sequence.has_prefix:
            self.slots.update((slot, (sequence.prefix_key, i)) for i, slot in enumerate(prefix))
        for place, slot in enumerate(prefix):
            assert self.slots[slot] == (sequence.prefix_key, place)
        for place in range(chunk.start, chunk.start + chunk.count):
            self.slots[own[place]] = (sequence.root, tuple(sequence.tokens[: place + 1]))
        for place in range(chunk.start + chunk.count):
            assert self.slots[own[place]] == (sequence.root, tuple(sequence.tokens[: place + 1]))


def make(
    name: str, tokens: list[int], adapter: str = "", tenant: str = "", prefix: int = 0
) -> Sequence:
    return Sequence(
        name, list(tokens), adapter, tenant, prefix,
        root_key("prefix", adapter), root_key("tokens", tenant, adapter),
    )  # fmt: skip


def step(scheduler: Scheduler, memory: Memory | None = None) -> list[Chunk]:
    chunks = scheduler.schedule()
    scheduler.check()
    costs = [chunk.cost for chunk in chunks]
    assert sum(costs) - max(costs, default=0) < scheduler.max_step_tokens, "one source goes beyond"
    for chunk in chunks:
        assert chunk.start == chunk.sequence.num_computed
        if memory:
            memory.compute(chunk)
        scheduler.advance(chunk)
        if chunk.is_sampled:
            chunk.sequence.tokens.append(len(chunk.sequence.tokens) % 3)
    return chunks


def finish_steps(scheduler: Scheduler, targets: dict[str, int], steps: int = 10_000) -> list[str]:
    """Step until everybody has as many tokens as `targets` says; ids in order of finishing."""
    finished: list[str] = []
    memory = Memory()
    for _ in range(steps):
        chunks = step(scheduler, memory)
        if not chunks:
            break
        assert sum(chunk.count for chunk in chunks) <= scheduler.max_step_tokens
        assert len(scheduler.running) <= scheduler.max_running
        adapters = [chunk.sequence.adapter for chunk in chunks]
        assert adapters == sorted(adapters), "rows of an adapter are contiguous"
        for sequence in [chunk.sequence for chunk in chunks]:
            if len(sequence.tokens) >= targets[sequence.id]:
                scheduler.remove(sequence)
                finished.append(sequence.id)
        scheduler.check()
    return finished


# Prompts of one kind begin alike; a prefix belongs to its adapter; a source is an encoder's.
requests = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 20), st.sampled_from("abc"),
              st.sampled_from(["", "t", "u"]), st.integers(0, 1),
              st.one_of(st.just(0), st.integers(1, 14))),
    min_size=1, max_size=12,
)  # fmt: skip
PREFIX = {"a": 0, "b": 5, "c": 8}
Wanted = list[tuple[int, int, str, str, int, int]]


def sequences(wanted: Wanted) -> list[Sequence]:
    made: list[Sequence] = []
    for i, (prompt, _, adapter, tenant, kind, source) in enumerate(wanted):
        sequence = make(str(i), [kind] * prompt, adapter, tenant, PREFIX[adapter])
        if source:  # what serving.engine.intake makes of it
            sequence.source, sequence.source_tokens = (kind,) * source, source
            sequence.prefix_tokens += source
            assert sequence.root is not None
            sequence.prefix_key = next_key(sequence.root, sequence.source)
            sequence.root = next_key(sequence.prefix_key, ())
        made.append(sequence)
    return made


@given(requests, st.integers(20, 40), st.integers(1, 6), st.integers(1, 25))
@settings(max_examples=200, deadline=None)
def test_everybody_is_served_and_every_page_comes_back(
    wanted: Wanted,
    num_pages: int,
    max_running: int,
    max_step_tokens: int,
) -> None:
    pool = PagePool(num_pages)
    scheduler = Scheduler(
        pool, page_tokens=PAGE, max_running=max_running, max_step_tokens=max_step_tokens
    )
    targets = {str(i): prompt + answer for i, (prompt, answer, *_) in enumerate(wanted)}
    for sequence in sequences(wanted):
        scheduler.add(sequence)
    assert sorted(finish_steps(scheduler, targets)) == sorted(targets)
    assert pool.num_free == num_pages
    assert not list(scheduler)


@given(requests, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_arrivals_and_departures_at_any_moment(wanted: Wanted, seed: int) -> None:
    random = Random(seed)
    pool = PagePool(20)
    scheduler = Scheduler(pool, page_tokens=PAGE, max_running=4, max_step_tokens=16)
    waiting = sequences(wanted)
    memory = Memory()
    while waiting or list(scheduler):
        if waiting and random.random() < 0.5:
            scheduler.add(waiting.pop())
        step(scheduler, memory)
        leaving = random.choice([None, None, *scheduler])
        if leaving is not None:
            scheduler.remove(leaving)
        scheduler.check()
    assert pool.num_free == 20


def test_a_newcomer_joins_at_the_next_step() -> None:
    scheduler = Scheduler(PagePool(32), page_tokens=PAGE, max_running=4, max_step_tokens=16)
    scheduler.add(Sequence("1", [0] * 4))
    step(scheduler)
    scheduler.add(Sequence("2", [0] * 4))
    assert {c.sequence.id: c.count for c in step(scheduler)} == {"1": 1, "2": 4}


def test_a_long_prompt_is_read_beside_those_that_generate() -> None:
    scheduler = Scheduler(PagePool(64), page_tokens=PAGE, max_running=4, max_step_tokens=8)
    scheduler.add(Sequence("short", [0] * 2))
    for _ in range(3):
        step(scheduler)
    scheduler.add(Sequence("long", [0] * 40))
    for number in range(5):
        counts = {chunk.sequence.id: chunk.count for chunk in step(scheduler)}
        assert counts == {"short": 1, "long": 7}, number


def test_when_pages_run_out_the_newest_waits_and_comes_back_first() -> None:
    pool = PagePool(6)
    scheduler = Scheduler(pool, page_tokens=PAGE, max_running=4, max_step_tokens=64)
    old, new = Sequence("old", [0] * 7), Sequence("new", [0] * 7)
    for sequence in (old, new, Sequence("later", [0] * 9)):
        scheduler.add(sequence)
    for _ in range(6):
        assert {chunk.sequence.id for chunk in step(scheduler)} == {"old", "new"}
    assert [chunk.sequence.id for chunk in step(scheduler)] == ["old"]
    assert (new.preemptions, new.pages, new.num_computed) == (1, [], 0)
    assert scheduler.waiting.first() is new
    assert len(new.tokens) == 13, "what was generated is kept"


def test_a_page_is_given_back_once() -> None:
    pool = PagePool(2)
    pages = pool.take(2)
    assert pages is not None
    assert pool.take(1) is None
    pool.give_back(pages[:1])
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back(pages[:1])


def test_the_page_that_was_idle_longest_is_given_up() -> None:
    pool = PagePool(4)
    keys = [next_key(root_key("x"), [number]) for number in range(4)]
    pages = pool.take(4)
    assert pages is not None
    for page, key in zip(pages, keys, strict=True):
        pool.label(page, key)
    pool.give_back([pages[1]])
    pool.give_back(pages[2:])  # the last of a run before its first
    pool.give_back([pages[0]])
    assert (pool.num_free, pool.known(keys)) == (4, 4)
    shared = pool.share(keys[1:2])
    assert shared == [pages[1]]
    assert pool.take(2) == [pages[3], pages[2]]
    assert [pool.known([key]) for key in keys] == [1, 1, 0, 0]
    pool.check([pages[1], pages[2], pages[3]])


def test_those_that_begin_alike_wait_for_the_first_and_share() -> None:
    scheduler = Scheduler(PagePool(64), page_tokens=PAGE, max_running=8, max_step_tokens=8)
    for number in range(4):
        scheduler.add(make(str(number), [9] * 12 + [number]))
    scheduler.add(make("other tenant", [9] * 13, tenant="x"))
    scheduler.add(make("other adapter", [9] * 13, adapter="y"))
    scored = make("scored", [9] * 13)
    scored.scored_tokens = 13
    scheduler.add(scored)
    started: dict[str, int] = {}
    while len(started) < 7:
        for chunk in step(scheduler):
            started.setdefault(chunk.sequence.id, chunk.start)
    assert started == {"0": 0, "1": 12, "2": 12, "3": 12, "other tenant": 0, "other adapter": 0,
                       "scored": 0}  # fmt: skip
    assert scheduler.cached_tokens == 36


def test_a_source_is_read_as_a_whole_and_counts_against_the_step() -> None:
    scheduler = Scheduler(PagePool(64), page_tokens=PAGE, max_running=8, max_step_tokens=8)
    for name, length in (("a", 6), ("b", 20), ("c", 5)):
        sequence = make(name, [9], tenant=name, prefix=length)
        sequence.source, sequence.source_tokens = (7,) * length, length
        sequence.prefix_key = next_key(root_key(name), sequence.source)
        scheduler.add(sequence)
    # Of 8 tokens `a` takes 7 and `b` 21; then both generate, and `c` fits beside them.
    steps = [[(c.sequence.id, c.cost) for c in scheduler.schedule()]]
    for sequence in list(scheduler.running):
        if sequence.id in "ab":
            scheduler.advance(Chunk(sequence, 0, 1))
            sequence.tokens.append(1)
    steps.append([(c.sequence.id, c.cost) for c in scheduler.schedule()])
    assert [sorted(step) for step in steps] == [
        [("a", 7), ("b", 21)],
        [("a", 1), ("b", 1), ("c", 6)],
    ]
    scheduler.preempt(next(s for s in scheduler.running if s.id == "a"))
    again = next(c for c in scheduler.schedule() if c.sequence.id == "a")
    assert again.cost == again.count, "its source lies in pages that nobody took"
