"""A crowd does not delay who comes alone: the scheduler on a virtual clock.

A step costs a fixed part, as the weights are read once whatever it computes, and a part by its
tokens; a full step costs 1.75 times an empty one, which is what `max_step_tokens` is chosen by.
"""

import sys
from collections.abc import Iterator
from types import FrameType

import pytest

from serving.engine.fair_queue import FairQueue
from serving.engine.pages import PagePool, root_key
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence

STEP_TOKENS = 1024


class Service:
    """A scheduler whose steps take virtual time."""

    def __init__(self, num_pages: int = 4096) -> None:
        pool = PagePool(num_pages)
        self.scheduler = Scheduler(
            pool, page_tokens=16, max_running=64, max_step_tokens=STEP_TOKENS
        )
        self.targets: dict[Sequence, int] = {}
        self.clock = 0.0

    def ask(self, prompt: int, answer: int, tenant: str, adapter: str) -> Sequence:
        number = len(self.targets)
        root = root_key(tenant, adapter)
        sequence = Sequence(str(number), [number] * prompt, adapter, tenant, root=root)
        self.targets[sequence] = prompt + answer
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> set[Sequence]:
        """Those that ended."""
        chunks = self.scheduler.schedule()
        self.clock += 1 + 0.75 * sum(chunk.count for chunk in chunks) / STEP_TOKENS
        ended: set[Sequence] = set()
        for chunk in chunks:
            self.scheduler.advance(chunk)
            if chunk.is_sampled:
                chunk.sequence.tokens.append(0)
                if len(chunk.sequence.tokens) == self.targets[chunk.sequence]:
                    self.scheduler.remove(chunk.sequence)
                    ended.add(chunk.sequence)
        return ended

    def time_of(self, prompt: int, answer: int, tenant: str, adapter: str) -> float:
        """From a request's arrival, which is while a step runs, to its end."""
        arrived = self.clock
        self.step()
        sequence = self.ask(prompt, answer, tenant, adapter)
        while sequence not in self.step():
            pass
        return self.clock - arrived


CROWDS: dict[str, tuple[int, int, int]] = {  # prompt, answer, pages
    "answers": (100, 400, 4096),
    "prompts": (1500, 8, 8192),
    "few pages": (300, 200, 400),
}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("who", ["adapter", "tenant", "tenant of many adapters"])
def test_a_thousand_queued_requests_delay_anothers_by_no_more_than_its_own_time(
    crowd: str, who: str
) -> None:
    prompt, answer, pages = CROWDS[crowd]
    alone = Service(pages).time_of(100, 40, "", "single")
    service = Service(pages)
    for number in range(1000):
        tenant = "" if who == "adapter" else "crowd"
        adapter = str(number % 50) if who == "tenant of many adapters" else "crowd"
        service.ask(prompt, answer, tenant, adapter)
    for _ in range(30):
        service.step()
    assert len(service.scheduler.waiting) > 800
    for _ in range(3):
        assert service.time_of(100, 40, "", "single") < 2 * alone
        for _ in range(7):
            service.step()
    service.scheduler.check()


def test_who_asks_for_more_gets_no_more() -> None:
    """Two adapters with the same work, one of them in ten times as many requests at once."""
    service = Service()
    for number in range(2200):
        service.ask(50, 30, "", "few" if number % 11 == 0 else "many")
    done = {"few": 0, "many": 0}
    while done["few"] < 160:
        for sequence in service.step():
            done[sequence.adapter] += 1
    assert 130 <= done["many"] <= 190


def test_turns_are_by_what_was_served() -> None:
    queue = FairQueue()
    sequences = [Sequence(str(i), [0], adapter, tenant) for i, (adapter, tenant) in enumerate(
        [("a", "x"), ("a", "x"), ("b", "x"), ("a", "y")])]  # fmt: skip
    for sequence in sequences:
        queue.enter(sequence)

    def turns() -> Iterator[str]:
        while (sequence := queue.first()) is not None:
            queue.take(sequence)
            queue.charge(sequence, 10)
            yield sequence.id

    assert list(turns()) == ["0", "3", "2", "1"]
    late = Sequence("late", [0], "a", "z")
    queue.enter(late)
    assert queue.served(late)[0] == 20, "being away earned nothing"
    for sequence in (*sequences, late):
        queue.leave(sequence)
    assert queue.first() is None
    assert len(queue) == 0


def test_a_long_queue_makes_no_step_longer() -> None:
    """By the bytecode that steps run, which no other load on the machine changes."""

    def operations(waiting: int) -> int:
        service = Service()
        for number in range(64 + waiting):
            service.ask(20, 10, "", str(number % 100))
        for _ in range(12):
            service.step()
        assert len(service.scheduler.waiting) > waiting // 2
        count = 0

        def trace(frame: FrameType, event: str, _: object) -> object:
            nonlocal count
            frame.f_trace_opcodes = True
            count += event == "opcode"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for _ in range(10):
                service.scheduler.schedule()
        finally:
            sys.settrace(before)
        return count

    assert operations(20_000) < 2 * operations(200)
