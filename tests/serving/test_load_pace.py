"""Lowering beside a running engine rests, and only there."""

import time

from serving.adapters import beside
from serving.adapters.pace import give_way


def work(cpu_s: float) -> float:
    """Seconds that so much work takes in a thread that gives way."""
    began, ends_s = time.monotonic(), time.thread_time() + cpu_s
    while time.thread_time() < ends_s:
        give_way()
    return time.monotonic() - began


def test_a_thread_that_lowers_rests_while_the_engine_is_busy() -> None:
    asked: list[bool] = []

    def is_busy(answer: bool) -> bool:
        asked.append(answer)
        return answer

    with beside(lambda: is_busy(True)):
        assert work(0.02) > 0.02 * 3, "a fifth of a core"
    assert len(asked) > 5
    asked.clear()
    with beside(lambda: is_busy(False)):
        work(0.02)
    assert len(asked) > 5
    asked.clear()
    work(0.02)
    assert not asked, "who adds an adapter by himself does not wait"
