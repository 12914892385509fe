"""How far a run over a file's rows is, on stderr."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from rich import progress
from rich.console import Console


class Progress:
    """Of one run; `progress_bar` makes it."""

    def __init__(self, what: str, rows: int, resumed: int, bar: progress.Progress) -> None:
        self._what, self._bar = what, bar
        self._task = bar.add_task(what, total=rows, completed=resumed, told="")
        self._began_s = time.monotonic()
        self._tokens = self._failed = 0

    def advance(self, rows: int, tokens: int, failed: int) -> None:
        """So many more rows are done, with so many tokens of their answers."""
        self._tokens, self._failed = self._tokens + tokens, self._failed + failed
        speed = self._tokens / max(time.monotonic() - self._began_s, 1e-9)
        told = f"{speed:,.0f} tokens/s" + (f", {self._failed:,} failed" if self._failed else "")
        self._bar.update(self._task, advance=rows, told=told)

    def wait(self, reason: str) -> None:
        """Nothing goes on for now; `reason` is told in a line of its own."""
        self._bar.update(self._task, told="waiting")
        if not self._bar.disable:
            self._bar.console.print(
                f"{self._what}: waiting: {reason}", markup=False, highlight=False, soft_wrap=True
            )


@contextmanager
def progress_bar(what: str, rows: int, resumed: int, *, enabled: bool) -> Generator[Progress]:
    """A bar on stderr; yields what is told of each lot of rows that are done."""
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[told]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )
    with bar:
        yield Progress(what, rows, resumed, bar)
