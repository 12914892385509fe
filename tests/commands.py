"""`graft` as a user types it, in a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ended:
    """What a command said, on stdout and stderr, and its exit code."""

    output: str
    code: int

    @property
    def job(self) -> str:
        """The job that `graft train` told it started."""
        return _job_in(self.output)


def heed_interrupts() -> None:
    """For a child of tests that run in the background of a shell: they ignore SIGINT, and so would
    their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """A command on its way, which ends with its `with` block if it has not before.

    It writes to a file: a pipe that nobody reads would stop it once it is full.
    """

    def __init__(self, *arguments: object) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._seen = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *map(str, arguments)],
            cwd=ROOT, stdout=self._output, stderr=subprocess.STDOUT,
            preexec_fn=heed_interrupts,
            env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for timeout_s in (60, 30):  # the second signal cuts off what a service waits for
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.terminate()
                self.process.wait(timeout_s)
        self.process.kill()
        self.process.wait()
        self._output.close()

    @property
    def said(self) -> str:
        """All of its output until now."""
        descriptor = self._output.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    @property
    def job(self) -> str:
        """The job that `graft train` told it started."""
        return _job_in(self.said)

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def read_until(self, pattern: str) -> re.Match[str]:
        """Wait for a line with this pattern, behind the one last waited for. Fails if the command
        ends without."""
        while True:
            was_over, said = self.is_over(), self.said
            for line in said[self._seen :].split("\n")[:-1]:
                self._seen += len(line) + 1
                if found := re.search(pattern, line):
                    return found
            assert not was_over, said
            time.sleep(0.05)

    def wait(self, timeout_s: float = 560) -> Ended:
        """Until it has ended."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it runs on after {timeout_s} s: {self.said}")
        return Ended(self.said, code)

    def finish(self) -> Ended:
        """Wait for its end, outside a `with` block."""
        with self:
            return self.wait()


def run(*arguments: object) -> Ended:
    """The command from its start to its end."""
    return Command(*arguments).finish()


def graft(*arguments: object) -> str:
    """The output of a command that succeeds."""
    ended = run(*arguments)
    assert ended.code == 0, ended.output
    return ended.output


def overrides(*pairs: str) -> list[str]:
    """Settings of a spec as options."""
    return [part for pair in pairs for part in ("--set", pair)]


def served_at(service: Command) -> str:
    """The URL that `graft serve` tells once it answers."""
    return service.read_until(r"(http://\S+)/v1")[1]


def kill_worker(job: Command, at: str, has_checkpoint: Callable[[str], bool]) -> None:
    """Wait for a line of a training job and SIGKILL its first worker, as soon as the job of that
    name has something to go on from: checkpoints are uploaded beside training."""
    job.read_until(at)
    while not has_checkpoint(job.job) and not job.is_over():
        time.sleep(0.05)
    found = re.search(r"training: .* process (\d+)", job.said)
    assert found is not None, job.said
    os.kill(int(found[1]), signal.SIGKILL)


def _job_in(output: str) -> str:
    found = re.search(r"job (\S+) on ", output)
    assert found is not None, output
    return found[1]


def processes(actor: str, deployment: str = "") -> list[psutil.Process]:
    """The processes of one kind of actor, oldest first."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if actor in process.name() and deployment in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())
