"""An event loop for code that has none: what it is given runs, ends, and can be interrupted."""

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from serving.event_loop import EventLoop


@pytest.fixture
def interrupt() -> Iterator[threading.Timer]:
    """Ctrl-C, a moment after it is started."""
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    yield timer
    timer.join()
    signal.signal(signal.SIGINT, before)


def test_what_is_interrupted_ends_there_too(interrupt: threading.Timer) -> None:
    ended = list[str]()

    async def hang() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            ended.append("in order")

    loop = EventLoop()
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        loop.wait(hang)
    loop.close()
    assert ended == ["in order"]


def test_an_interrupted_iteration_ends_there_too(interrupt: threading.Timer) -> None:
    """As an interrupt, whatever its generator still has to do."""
    ended = list[str]()

    async def count() -> AsyncGenerator[int]:
        try:
            yield 1
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            ended.append("in order")

    loop, seen = EventLoop(), list[int]()
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        seen.extend(loop.iterate(count()))
    loop.close()
    assert (seen, ended) == ([1], ["in order"])


def test_an_iteration_that_is_left_ends_there() -> None:
    """At once, and not when its loop does; and one that was left behind by its loop."""
    ended = list[int]()

    async def count() -> AsyncGenerator[int]:
        try:
            for number in range(1, 10):
                yield number
        finally:
            ended.append(number)

    loop = EventLoop()
    for number in loop.iterate(count()):
        if number == 3:
            break
    late = iter(loop.iterate(count()))
    assert (ended, next(late)) == ([3], 1)
    loop.close()
    assert ended == [3, 1]
    del late


def test_what_fails_fails_here() -> None:
    """Also before it has become anything that could be waited for."""

    async def fail() -> None:
        raise ValueError("there")

    def refuse() -> Any:
        raise TypeError("no such argument")

    loop = EventLoop()
    with pytest.raises(ValueError, match="there"):
        loop.wait(fail)
    with pytest.raises(TypeError, match="no such argument"):
        loop.wait(refuse)
    loop.close()


def test_an_iteration_that_the_collector_ends_in_the_loops_own_thread_stops_nobody() -> None:
    ended = threading.Event()

    async def count() -> AsyncGenerator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            ended.set()

    class Holder:
        items: Any

    async def collect() -> int:
        return gc.collect()

    loop, holder = EventLoop(), Holder()
    holder.items = [holder, loop.iterate(count())]
    assert next(holder.items[1]) == 1
    gc.disable()
    try:
        del holder
        loop.wait(collect)
    finally:
        gc.enable()
    assert ended.wait(10)
    loop.close()


LEFT = """
import asyncio
from serving.event_loop import EventLoop

async def count():
    try:
        yield 1
        yield 2
    finally:
        await asyncio.sleep(0)
        print("in order", flush=True)

items = EventLoop().iterate(count())
print(next(items))
"""
NO_FILES = """
import asyncio, resource
from serving.event_loop import EventLoop

resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    EventLoop()
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize(
    ("script", "said"), [(LEFT, "1\nin order\n"), (NO_FILES, "Too many open files\n")]
)
def test_a_program_ends_whatever_it_leaves_behind(script: str, said: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.stdout, ended.returncode) == (said, 0), ended.stderr
