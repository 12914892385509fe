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
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import structlog

from cluster.errors import UnavailableError
from serving.background import background
from serving.engine import Engine, GenerationRequest, TokenOutput, joined

R = TypeVar("R")
_log = structlog.get_logger("graft.engine")


_GRAMMARS = 2  # compiled at a time


class Outputs:
    """One request's outputs as they come, those of several steps as one if they were not taken in
    time, up to the last one. For the loop that made it.

    Raises:
        UnavailableError: the engine has stopped; what was given out stands.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.is_over = False
        self._queue: asyncio.Queue[TokenOutput | None] = asyncio.Queue()

    def put(self, output: TokenOutput | None) -> None:
        """The next one; None if the engine has stopped."""
        self._queue.put_nowait(output)

    def __aiter__(self) -> Outputs:
        return self

    async def __anext__(self) -> TokenOutput:
        if self.is_over:
            raise StopAsyncIteration
        first = await self._queue.get()
        if first is None:
            raise _stopped()
        found = [first]
        while not self._queue.empty():
            output = self._queue.get_nowait()
            if output is None:
                self._queue.put_nowait(None)  # for the next call
                break
            found.append(output)
        self.is_over = found[-1].finish_reason is not None
        return first if len(found) == 1 else joined(found)


class EngineThread:
    """Owns `engine` until `stop`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[str, Outputs] = {}  # of the engine's thread
        self._numbers = itertools.count()
        self._compiling = background("grammar", _GRAMMARS)
        self._stopping = threading.Event()
        self._ending = threading.Lock()  # of the next one, and of who puts commands
        self._has_ended = False  # no command is run any more
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[], R]) -> R:
        """Run `function` on the engine's thread, between two steps. Raises UnavailableError if the
        engine has stopped."""
        future: Future[R] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    if self._stopping.is_set():
                        raise _stopped()
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        if not self._command(run):
            raise _stopped()
        return await asyncio.wrap_future(future)

    def post(self, function: Callable[[], None]) -> None:
        """Have `function` run on the engine's thread between two steps, for who cannot wait for it;
        what it raises is logged alone. Nothing happens if the engine has stopped."""

        def run() -> None:
            try:
                function()
            except Exception as error:
                _log.exception("a posted command failed", error=type(error).__name__)

        self._command(run)

    @asynccontextmanager
    async def submitted(
        self, request: GenerationRequest, prepare: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Outputs]:
        """The scope of one request in the engine; leaving it early cancels the request.

        Args:
            prepare: Run on the engine's thread just before the request is submitted.

        Raises:
            RequestError: it asks the impossible.
            UnavailableError: the engine has stopped.
        """
        request_id, outputs = f"r{next(self._numbers)}", Outputs()

        def start() -> None:
            prepare()
            self.engine.submit(request, request_id)
            self._listeners[request_id] = outputs

        def cancel() -> None:
            self._listeners.pop(request_id, None)
            self.engine.cancel(request_id)

        if request.response_format is not None:
            compiling = outputs.loop.run_in_executor(
                self._compiling, self.engine.compile_grammar, request
            )
            await compiling  # tenths of a second for a large schema
        try:
            await self.call(start)
            yield outputs
        finally:
            if not outputs.is_over:
                self.post(cancel)

    def stop(self) -> None:
        """End the thread after the step in progress, and with it every request."""
        self._stopping.set()
        self._commands.put(lambda: None)
        self._thread.join()

    def _command(self, run: Callable[[], None]) -> bool:
        """Have `run` called by the thread; False if that will never be."""
        with self._ending:
            if not self._has_ended:
                self._commands.put(run)
            return not self._has_ended

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
            with self._ending:
                self._run_commands(block=False)
                self._has_ended = True
            _send([(outputs, None) for outputs in self._listeners.values()])
            self._listeners.clear()

    def _run_commands(self, *, block: bool) -> None:
        try:
            while True:
                self._commands.get(block=block)()
                block = False
        except queue.Empty:
            return

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        pairs: list[tuple[Outputs, TokenOutput | None]] = []
        for output in outputs:
            listener = self._listeners.get(output.request_id)
            if listener is None:
                continue
            if output.finish_reason is not None:
                del self._listeners[output.request_id]
            pairs.append((listener, output))
        _send(pairs)


def _send(pairs: list[tuple[Outputs, TokenOutput | None]]) -> None:
    """Each output to whom it is for, with one wake-up for each loop."""
    by_loop: defaultdict[Any, list[tuple[Outputs, TokenOutput | None]]] = defaultdict(list)
    for outputs, output in pairs:
        by_loop[outputs.loop].append((outputs, output))
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, own)
        except RuntimeError:
            continue  # the loop is closed, and with it whoever listened


def _stopped() -> UnavailableError:
    return UnavailableError("the engine of this replica has stopped; try again")


def _put(pairs: list[tuple[Outputs, TokenOutput | None]]) -> None:
    for outputs, output in pairs:
        outputs.put(output)
