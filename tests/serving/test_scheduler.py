"""Pages and scheduling under random traffic: nothing lost, nothing owned twice, everyone served."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.pages import PagePool
from serving.engine.scheduler import Scheduler, Sequence

PAGE = 4


def finish_steps(scheduler: Scheduler, targets: dict[str, int], steps: int = 10_000) -> list[str]:
    """Step until everybody has as many tokens as `targets` says; ids in order of finishing."""
    finished: list[str] = []
    for _ in range(steps):
        chunks = scheduler.schedule()
        scheduler.check()
        if not chunks:
            break
        assert sum(chunk.count for chunk in chunks) <= scheduler.max_step_tokens
        assert len(scheduler.running) <= scheduler.max_running
        adapters = [chunk.sequence.adapter for chunk in chunks]
        assert adapters == sorted(adapters), "rows of an adapter are contiguous"
        for chunk in chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.num_computed
            sequence.num_computed += chunk.count
            if chunk.is_sampled:
                sequence.tokens.append(0)
                if len(sequence.tokens) >= targets[sequence.id]:
                    scheduler.remove(sequence)
                    finished.append(sequence.id)
        scheduler.check()
    return finished


requests = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 20), st.sampled_from("abc")),
    min_size=1, max_size=12,
)  # fmt: skip


@given(requests, st.integers(13, 40), st.integers(1, 6), st.integers(1, 25))
@settings(max_examples=200, deadline=None)
def test_everybody_is_served_and_every_page_comes_back(
    wanted: list[tuple[int, int, str]], num_pages: int, max_running: int, max_step_tokens: int
) -> None:
    pool = PagePool(num_pages)
    scheduler = Scheduler(
        pool, page_tokens=PAGE, max_running=max_running, max_step_tokens=max_step_tokens
    )
    targets = {str(i): prompt + answer for i, (prompt, answer, _) in enumerate(wanted)}
    for i, (prompt, _, adapter) in enumerate(wanted):
        scheduler.add(Sequence(str(i), [0] * prompt, adapter))
    assert sorted(finish_steps(scheduler, targets)) == sorted(targets)
    assert pool.num_free == num_pages
    assert not list(scheduler)


@given(requests, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_arrivals_and_departures_at_any_moment(
    wanted: list[tuple[int, int, str]], seed: int
) -> None:
    random = Random(seed)
    pool = PagePool(16)
    scheduler = Scheduler(pool, page_tokens=PAGE, max_running=4, max_step_tokens=16)
    waiting = [Sequence(str(i), [0] * p, a) for i, (p, _, a) in enumerate(wanted)]
    while waiting or list(scheduler):
        if waiting and random.random() < 0.5:
            scheduler.add(waiting.pop())
        for chunk in scheduler.schedule():
            chunk.sequence.num_computed += chunk.count
            if chunk.is_sampled:
                chunk.sequence.tokens.append(0)
        leaving = random.choice([None, None, *scheduler])
        if leaving is not None:
            scheduler.remove(leaving)
        scheduler.check()
    assert pool.num_free == 16


def test_a_newcomer_joins_at_the_next_step() -> None:
    scheduler = Scheduler(PagePool(32), page_tokens=PAGE, max_running=4, max_step_tokens=16)
    first, second = Sequence("1", [0] * 4), Sequence("2", [0] * 4)
    scheduler.add(first)
    (chunk,) = scheduler.schedule()
    chunk.sequence.num_computed += chunk.count
    first.tokens.append(0)
    scheduler.add(second)
    counts = {chunk.sequence.id: chunk.count for chunk in scheduler.schedule()}
    assert counts == {"1": 1, "2": 4}


def test_a_long_prompt_is_read_beside_those_that_generate() -> None:
    scheduler = Scheduler(PagePool(64), page_tokens=PAGE, max_running=4, max_step_tokens=8)
    short, long = Sequence("short", [0] * 2), Sequence("long", [0] * 40)
    scheduler.add(short)
    for _ in range(3):
        (chunk,) = scheduler.schedule()
        short.num_computed += chunk.count
        short.tokens.append(0)
    scheduler.add(long)
    for step in range(5):
        counts = {chunk.sequence.id: chunk.count for chunk in scheduler.schedule()}
        assert counts == {"short": 1, "long": 7}, step
        short.num_computed += 1
        long.num_computed += 7
        short.tokens.append(0)


def test_when_pages_run_out_the_newest_waits_and_comes_back_first() -> None:
    pool = PagePool(4)
    scheduler = Scheduler(pool, page_tokens=PAGE, max_running=4, max_step_tokens=64)
    old, new = Sequence("old", [0] * 7), Sequence("new", [0] * 7)
    scheduler.add(old)
    scheduler.add(new)
    scheduler.add(Sequence("later", [0]))
    for chunk in scheduler.schedule():
        chunk.sequence.num_computed += chunk.count
        chunk.sequence.tokens.append(0)
    for chunk in scheduler.schedule():
        chunk.sequence.num_computed += chunk.count
        chunk.sequence.tokens.append(0)
    assert [chunk.sequence.id for chunk in scheduler.schedule()] == ["old"]
    assert (new.preemptions, new.pages, new.num_computed) == (1, [], 0)
    assert scheduler.waiting[0] is new
    assert len(new.tokens) == 9, "what was generated is kept"


def test_a_page_is_given_back_once() -> None:
    pool = PagePool(2)
    pages = pool.take(2)
    assert pages is not None
    assert pool.take(1) is None
    pool.give_back(pages[:1])
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back(pages[:1])
