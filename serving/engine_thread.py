"""An engine and the one thread that owns it, for use from asyncio.

The thread steps as long as there is work; submissions, cancellations and installations are done
between steps. Outputs go to the event loop of whoever waits, one wake-up per step and loop.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from cluster.errors import UnavailableError
from serving.engine import Engine, GenerationRequest, TokenOutput, joined

R = TypeVar("R")
_log = structlog.get_logger("graft.engine")


@dataclass(frozen=True)
class _Listener:
    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[TokenOutput | None]  # None: the engine has stopped

    async def next(self) -> TokenOutput | None:
        """All that is there, as one output."""
        first = await self.outputs.get()
        if first is None:
            return None
        found = [first]
        while not self.outputs.empty():
            output = self.outputs.get_nowait()
            if output is None:
                self.outputs.put_nowait(None)  # for the next call
                break
            found.append(output)
        return first if len(found) == 1 else joined(found)


class EngineThread:
    """Owns `engine` until `stop`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}  # of the engine's thread
        self._numbers = itertools.count()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[], R]) -> R:
        """Run `function` on the engine's thread, between two steps."""
        future: Future[R] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    if self._stopping.is_set():
                        raise _stopped()
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        self._commands.put(run)
        if not self._thread.is_alive():
            self._run_commands(block=False)  # nobody else will; `run` refuses
        return await asyncio.wrap_future(future)

    async def generate(
        self, request: GenerationRequest, prepare: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[TokenOutput]:
        """The outputs of one request as they come, those of several steps as one if they were not
        taken in time; closing it early cancels the request.

        Args:
            prepare: Run on the engine's thread just before the request is submitted.

        Raises:
            RequestError: it asks the impossible.
            UnavailableError: the engine has stopped; what was given out stands.
        """
        request_id = f"r{next(self._numbers)}"
        listener = _Listener(asyncio.get_running_loop(), asyncio.Queue())

        def start() -> None:
            prepare()
            self.engine.submit(request, request_id)
            self._listeners[request_id] = listener

        def cancel() -> None:
            self._listeners.pop(request_id, None)
            self.engine.cancel(request_id)

        is_over = False
        try:
            await self.call(start)
            while not is_over:
                output = await listener.next()
                if output is None:
                    raise _stopped()
                is_over = output.finish_reason is not None
                yield output
        finally:
            if not is_over:
                self._commands.put(cancel)

    def stop(self) -> None:
        """End the thread after the step in progress, and with it every request."""
        self._stopping.set()
        self._commands.put(lambda: None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._run_commands(block=not self.engine.has_work)
                self._deliver(self.engine.step() if self.engine.has_work else [])
        except BaseException as error:
            # Only a fault of the engine itself comes here: what requests do is caught in `step`.
            _log.error("the engine stopped", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self._stopping.set()
            self._run_commands(block=False)
            _send([(listener, None) for listener in self._listeners.values()])
            self._listeners.clear()

    def _run_commands(self, *, block: bool) -> None:
        try:
            while True:
                self._commands.get(block=block)()
                block = False
        except queue.Empty:
            return

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        pairs: list[tuple[_Listener, TokenOutput | None]] = []
        for output in outputs:
            listener = self._listeners.get(output.request_id)
            if listener is None:
                continue
            if output.finish_reason is not None:
                del self._listeners[output.request_id]
            pairs.append((listener, output))
        _send(pairs)


def _send(pairs: list[tuple[_Listener, TokenOutput | None]]) -> None:
    """Each output to its listener, with one wake-up for each loop."""
    by_loop: defaultdict[Any, list[tuple[_Listener, TokenOutput | None]]] = defaultdict(list)
    for listener, output in pairs:
        by_loop[listener.loop].append((listener, output))
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, own)
        except RuntimeError:
            continue  # the loop is closed, and with it whoever listened


def _stopped() -> UnavailableError:
    return UnavailableError("the engine of this replica has stopped; try again")


def _put(pairs: list[tuple[_Listener, TokenOutput | None]]) -> None:
    for listener, output in pairs:
        listener.outputs.put_nowait(output)
