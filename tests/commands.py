"""`graft` as a user types it, in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ended:
    """What a command said, on stdout and stderr, and its exit code."""

    output: str
    code: int

    @property
    def job(self) -> str:
        """The job that `graft train` told it started."""
        found = re.search(r"job (\S+) on ", self.output)
        assert found is not None, self.output
        return found[1]


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command on its way."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *map(str, arguments)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], said: str = "") -> Ended:
    """Wait for its end; `said` was read already."""
    rest, _ = process.communicate(timeout=280)
    return Ended(said + rest, process.returncode)


def graft(*arguments: object) -> str:
    """The output of a command that succeeds."""
    ended = finish(start(*arguments))
    assert ended.code == 0, ended.output
    return ended.output


def overrides(*pairs: str) -> list[str]:
    """Settings of a spec as options."""
    return [part for pair in pairs for part in ("--set", pair)]


def read_until(process: subprocess.Popen[str], part: str) -> str:
    """What it says up to a line with this part; up to its end if there is none."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if part in line:
            break
    return "".join(lines)


def kill_worker(job: subprocess.Popen[str], at: str, has_checkpoint: Callable[[str], bool]) -> str:
    """Wait for a line of a training job and SIGKILL its first worker, as soon as the job of that
    name has something to go on from: checkpoints are uploaded beside training. What it said."""
    said = read_until(job, at)
    name = Ended(said, 0).job
    while not has_checkpoint(name) and job.poll() is None:
        time.sleep(0.05)
    found = re.search(r"training: .* process (\d+)", said)
    assert found is not None, said
    os.kill(int(found[1]), signal.SIGKILL)
    return said


def processes(actor: str, deployment: str = "") -> list[int]:
    """The processes of one kind of actor."""
    found: list[int] = []
    for process in psutil.Process().children(recursive=True):
        try:
            if actor in process.name() and deployment in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return sorted(found)
