"""Jobs of `graft train --follow` and what is done to them, each named after its fate.

Some run at the same time: most of a job this small is start-up, and some of that is waiting.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
from commands import Command, Ended, graft, kill_worker, overrides, run

from cluster.registry import Registry
from cluster.tables import write_table

AT_ONCE = 3  # more than two cores bear costs more than it saves
STORE = "s3://adapters/team"
FAST = ("base_model=configs/demo/base", "max_steps=6", "checkpoint_every_steps=2",
        "log_every_steps=2", "workers.cpus=1", f"output.store={STORE}")  # fmt: skip
EVALUATED = ("data.validation=0.2", "evaluation.every_steps=100", "evaluation.generations=2",
             "evaluation.max_new_tokens=4")  # fmt: skip
# One of its adapters diverges, one ends early.
SWEEP = ("adapters.wild.optimizer={learning_rate: 1.0e+30, warmup_ratio: 0.3}",
         "adapters.category-ia3.max_steps=20", "adapters.category-lora-4.batch_size=8")  # fmt: skip
TAME = ("adapters.wild.optimizer.learning_rate=0.001", "max_steps=20")


@dataclass(frozen=True)
class Killed:
    """A job whose worker was killed; `kept` is what it had in the store long after that."""

    ended: Ended
    kept: list[str]


@dataclass(frozen=True)
class Stopped:
    """A job that was stopped in the middle, and the one that goes on from it.

    `too_early` and `too_late` are attempts to do so beside the first or behind the second one;
    `kept` is what the first left in the store, `last` the step of its last checkpoint.
    """

    job: str
    too_early: Ended
    stop: str
    followed: Ended
    kept: list[str]
    last: int
    resumed: Ended
    too_late: Ended


@dataclass(frozen=True)
class Jobs:
    """Of `several`, a worker was killed and one adapter diverged; `tamed` is what went on."""

    lora: Future[Ended]
    killed: Future[Killed]
    several: Future[Ended]
    tamed: Future[Ended]
    failed: Future[Ended]
    stopped: Future[Stopped]


@contextmanager
def started(dashboard: str, base: Path, folder: Path) -> Iterator[Jobs]:
    """Run all; the two workers of `lora` take more than half a node each, so they run on both
    nodes. The others have a tiny base and few rows."""
    rows = {"prompt": [f"p{i}" * (i % 5 + 1) for i in range(64)], "completion": ["done"] * 64}
    write_table(pa.table(rows), folder / "small.arrow")
    rows = {"prompt": ["p"] * 300, "completion": ["c"] * 299 + [None]}
    write_table(pa.table(rows), folder / "bad.arrow")
    small = (f"base_model={base}", f"data.train={folder}/small.arrow", "max_steps=60",
             "data.format=prompt_completion", "checkpoint_every_steps=10",
             "log_every_steps=5")  # fmt: skip
    bad = ("data.format=prompt_completion", f"data.train={folder}/bad.arrow")
    running: list[Command] = []
    train = partial(_train, dashboard, running)
    middle = "category-lora-16: step 15/60"
    goes_on = ("bitfit", "stopped", *small, "max_steps=100000", "workers.count=[1, 2]",
               "precision=fp16")  # fmt: skip
    with ThreadPoolExecutor(max_workers=AT_ONCE) as threads:
        do = threads.submit
        lora = do(lambda: train("lora", "lora", "workers.cpus=4").finish())
        failed = do(lambda: train("lora", "failed", *bad).finish())
        killed = do(lambda: _kill_and_look(
            train("prompt_tuning", "killed", *small, *EVALUATED, "max_steps=200")))  # fmt: skip
        several = do(lambda: _kill(train("sweep", "sweep", *small, *SWEEP), middle))
        stopped = do(lambda: _stop_and_go_on(dashboard, train(*goes_on)))
        tamed = do(lambda: _go_on(dashboard, several.result().job, *TAME))
        yield Jobs(lora, killed, several, tamed, failed, stopped)
        threads.shutdown(wait=False, cancel_futures=True)
        for job in running:  # only after a test that failed
            job.process.kill()


def _kill(job: Command, at: str) -> Ended:
    kill_worker(job, at, _has_checkpoint)
    return job.finish()


def _kill_and_look(job: Command) -> Killed:
    """The store is looked at when most of what the job saves was saved."""
    kill_worker(job, "step 15/200", _has_checkpoint)
    job.read_until("step 180/200")
    kept = Registry(STORE).store.list(f"runs/{job.job}")
    return Killed(job.finish(), kept)


def _has_checkpoint(job: str) -> bool:
    kept = Registry(STORE).store.list(f"runs/{job}")
    return any(key.endswith("progress.json") for key in kept)


def _train(
    dashboard: str, running: list[Command], preset: str, name: str, *settings: str
) -> Command:
    options = overrides(*FAST, f"output.name={name}", *settings)
    document = f"configs/training/{preset}.yaml"
    running.append(Command("train", document, "--address", dashboard, "--follow", *options))
    return running[-1]


def _go_on(dashboard: str, job: str, *settings: str) -> Ended:
    options = ("--address", dashboard, "--store", STORE, "--follow", *overrides(*settings))
    return run("train", "--resume", job, *options)


def _stop_and_go_on(dashboard: str, following: Command) -> Stopped:
    """On two workers, or one if there is no room; then for a few steps on one."""
    following.read_until("step 15/100000")
    job = following.job
    address = ("--address", dashboard)
    too_early = run("train", "--resume", job, *address)
    stop = graft("jobs", "stop", job, *address)
    followed = following.finish()
    kept = Registry(STORE).store.list(f"runs/{job}")
    last = max(int(k.split("/step-")[1][:8]) for k in kept if k.endswith("progress.json"))
    resumed = _go_on(dashboard, job, "workers.count=1", f"max_steps={last + 15}")
    too_late = run("train", "--resume", job, *address)
    return Stopped(job, too_early, stop, followed, kept, last, resumed, too_late)
