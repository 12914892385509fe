"""Lowering beside a running engine rests, and only there."""

import threading
import time

from serving.adapters import Pace
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

    with Pace(lambda: is_busy(True), 0.2).kept():
        assert work(0.02) > 0.02 * 3, "a fifth of a core"
    assert len(asked) > 5
    asked.clear()
    with Pace(lambda: is_busy(False), 0.2).kept():
        work(0.02)
    assert len(asked) > 5
    asked.clear()
    work(0.02)
    assert not asked, "who adds an adapter by himself does not wait"


def test_threads_that_lower_together_take_turns() -> None:
    """Two cost no more than one, and a slow module delays nobody else's."""
    pace = Pace(lambda: True, 0.2)
    ends_s: dict[float, float] = {}

    def lower(cpu_s: float, slice_s: float) -> None:
        with pace.kept():
            for _ in range(round(cpu_s / slice_s)):
                until_s = time.thread_time() + slice_s
                while time.thread_time() < until_s:
                    pass
                give_way()
        ends_s[slice_s] = time.monotonic()

    began_s = time.monotonic()
    threads = [threading.Thread(target=lower, args=each) for each in ((0.02, 0.002), (0.2, 0.05))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends_s[0.002] - began_s > 0.02 * 3
    assert ends_s[0.002] < ends_s[0.05]


def test_slices_of_several_threads_do_not_add_up() -> None:
    pace = Pace(lambda: True, 0.2)
    began_s = time.monotonic()

    def lower() -> None:
        with pace.kept():
            work(0.01)

    threads = [threading.Thread(target=lower) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began_s > 4 * 0.01 * 3, "a fifth of a core for all together"
