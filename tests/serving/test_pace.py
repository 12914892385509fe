"""A client's pace on a clock of its own."""

import asyncio
from contextlib import suppress

import pytest

from cluster.errors import OverloadedError, RequestError, UnavailableError
from serving.pace import Pace


async def requests(pace: Pace, count: int, error: Exception | None = None) -> None:
    """So many requests, all of them ready to begin."""

    async def one() -> None:
        with suppress(UnavailableError, RequestError):
            async with pace.turn():
                await asyncio.sleep(0)
                if error is not None:
                    raise error

    await asyncio.gather(*(one() for _ in range(count)))


def test_it_doubles_halves_and_then_grows_by_one_a_round() -> None:
    async def run() -> list[int]:
        now = 0.0
        pace = Pace(64, clock=lambda: now)
        found = [int(pace.limit)]

        async def then(count: int, error: Exception | None = None) -> None:
            nonlocal now
            now += 1
            await requests(pace, count, error)
            found.append(int(pace.limit))

        await then(500)
        await then(64, UnavailableError("the same round's failures are one"))
        await then(32 + 33 + 32)  # the last ones have nobody waiting behind them
        await then(100, RequestError("the caller's fault says nothing of the pace"))
        for _ in range(8):
            await then(1, UnavailableError("x"))
        await then(3000)
        return [*found[:5], *found[-2:]]

    assert asyncio.run(run()) == [8, 64, 32, 33, 33, 1, 64]


def test_nobody_begins_before_the_time_that_the_service_asked_for() -> None:
    async def run() -> float:
        loop = asyncio.get_running_loop()
        pace = Pace(4)
        with pytest.raises(OverloadedError):
            async with pace.turn():
                raise OverloadedError("busy", retry_after_s=0.2)
        began = loop.time()
        async with pace.turn():
            return loop.time() - began

    assert 0.15 < asyncio.run(run()) < 5


def test_no_two_clients_come_back_at_one_instant() -> None:
    async def until_s() -> float:
        pace = Pace(4, clock=lambda: 0.0)
        with pytest.raises(OverloadedError):
            async with pace.turn():
                raise OverloadedError("busy", retry_after_s=10)
        return pace._not_before_s

    found = [asyncio.run(until_s()) for _ in range(20)]
    assert all(10 <= until <= 11 for until in found)
    assert len(set(found)) > 10


def test_a_turn_that_is_given_up_goes_to_the_next() -> None:
    async def run() -> None:
        pace = Pace(1)
        entered: list[int] = []

        async def one(number: int) -> None:
            async with pace.turn():
                entered.append(number)
                await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(one(number)) for number in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0.011)
        tasks[2].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert entered[-1] == 3

    asyncio.run(run())
