"""Training runs in real processes over gloo, without Ray: several runs in one set of processes."""

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file

from cluster.spec import parse_spec
from training.assembly import assemble
from training.checkpoint import write_checkpoint
from training.loop import LogLine, Place, as_work, run
from training.methods import METHODS
from training.rows import TokenRows, split
from training.several import Rows, Runner, assemble_several, run_several
from training.spec import TrainingSpec


@dataclass(frozen=True)
class Case:
    """One run: a spec, where it writes, and the checkpoint folder that it goes on from."""

    spec: Mapping[str, Any]
    folder: Path
    resume: Path | None = None


def run_case(case: Case, tokens: Path, place: Place) -> list[float]:
    """Train; rank 0 writes checkpoint-<step>/ and adapter/ into the case's folder."""
    spec = parse_spec(TrainingSpec, case.spec)
    rows, validation = TokenRows(tokens), None
    if isinstance(spec.data.validation, float):
        rows, validation = split(rows, spec.data.validation, spec.seed)
    made = assemble(spec, place, rows, case.resume, validation)
    losses: list[float] = []

    def on_checkpoint(progress: Any) -> None:
        state = made.full_state()
        if place.rank == 0:
            write_checkpoint(case.folder / f"checkpoint-{progress.step}", state, progress)

    def on_log(line: LogLine) -> None:
        losses.append(line.loss)

    reached = run(
        spec, made.backend, rows, course=made.course, place=place, start=made.start,
        evaluator=made.evaluator, on_log=on_log, on_checkpoint=on_checkpoint,
    )  # fmt: skip
    made.take_best(reached.step)
    with made.backend.whole_parameters():
        if place.rank == 0:
            METHODS[spec.method.kind].save(made.backend.adapted, case.folder / "adapter")
    return losses


@dataclass(frozen=True)
class Together:
    """Several adapters in one run, each as a Case of its own. Of several runs on the same workers,
    a later one may go on from what an earlier one wrote."""

    cases: Mapping[str, Case]


def run_together(together: Together, tokens: Path, place: Place) -> dict[str, str]:
    """Train all at once; each case's folder is as `run_case` leaves it. Returns who failed, why."""
    specs = {name: parse_spec(TrainingSpec, case.spec) for name, case in together.cases.items()}
    rows: dict[str, Rows] = {}
    for name, spec in specs.items():
        own, validation = TokenRows(tokens), None
        if isinstance(spec.data.validation, float):
            own, validation = split(own, spec.data.validation, spec.seed)
        rows[name] = Rows(own, validation, together.cases[name].resume)
    several = assemble_several(specs, place, rows)

    def keep(name: str, progress: Any) -> None:
        state = several.runs[name].full_state()
        if place.rank == 0:
            folder = together.cases[name].folder / f"checkpoint-{progress.step}"
            write_checkpoint(folder, state, progress)

    runners: dict[str, Runner] = {}
    for name, made in several.runs.items():
        work = as_work(
            specs[name], made.backend, rows[name].training, course=made.course, place=place,
            start=made.start, evaluator=made.evaluator, on_log=lambda _: None,
            on_checkpoint=partial(keep, name),
        )  # fmt: skip
        runners[name] = Runner(work, several.draws[name])
    run_several(next(iter(specs.values())), several.shared, runners, place)
    for name, runner in runners.items():
        made = several.runs[name]
        if runner.end is None:
            continue
        made.take_best(runner.end.step)
        if place.rank == 0:
            folder = together.cases[name].folder / "adapter"
            METHODS[specs[name].method.kind].save(made.backend.adapted, folder)
    return {name: runner.failure for name, runner in runners.items() if runner.failure}


def _process(
    rank: int, world_size: int, port: int, cases: Sequence[Case | Together], tokens: Path
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                   "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    for case in cases:
        run: Any = run_together if isinstance(case, Together) else run_case
        run(case, tokens, Place(rank, world_size))
    dist.destroy_process_group()
    sys.stdout.flush()
    # Now and then gloo's threads outlive the interpreter's end, which then aborts.
    os._exit(0)


def run_cases(world_size: int, cases: Sequence[Case | Together], tokens: Path) -> None:
    """Every case in `world_size` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_process, (world_size, port, cases, tokens), world_size)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's parameters and moments."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return load_file(last / "state.safetensors")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's weights."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")
