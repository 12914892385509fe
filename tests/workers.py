"""Training runs in real processes over gloo, without Ray: many runs in one set of processes."""

import gc
import json
import os
import socket
import sys
import traceback
from bisect import bisect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster.spec import parse_spec
from training.assembly import Assembly, assemble
from training.checkpoint import read_checkpoint, write_checkpoint
from training.loop import as_work, run
from training.meter import LogLine
from training.methods import METHODS
from training.place import Place
from training.rows import TokenRows, split
from training.several import Rows, Runner, assemble_several, run_several
from training.spec import TrainingSpec
from training.step import Continuation

_LOG, _LOGITS = "log.json", "logits.safetensors"
# What takes a worker most of its start: imported once, in the process that all are forked from.
_IMPORTED = ("deepspeed", "training.assembly", "training.several", "training.loop")


@dataclass(frozen=True)
class Case:
    """One run: a spec, where it writes, and the checkpoint folder that it goes on from.

    With `asked`, token ids, the trained model's logits of the next token are written too. With
    `most`, training fails at the first tensor of so many elements that it makes. With `notices`,
    each worker learns at the ends of those of its steps that one more machine will be taken away.
    """

    spec: Mapping[str, Any]
    folder: Path
    resume: Path | None = None
    asked: Sequence[int] = ()
    most: int | None = None
    notices: Sequence[Sequence[int]] = ()


class _Limited(TorchDispatchMode):
    """A scope in which no operation may make a tensor of so many elements."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and each.numel() >= self._most:
                raise AssertionError(f"{func} made {tuple(each.shape)}, {self._most} or more")
        return made


def run_case(case: Case, tokens: Path, place: Place) -> list[float]:
    """Train; rank 0 writes checkpoint-<step>/, adapter/, its log and logits into the case's
    folder. Returns the logged losses."""
    spec = parse_spec(TrainingSpec, case.spec)
    rows, validation = TokenRows(tokens), None
    if isinstance(spec.data.validation, float):
        rows, validation = split(rows, spec.data.validation, spec.seed)
    made = assemble(spec, place, rows, case.resume, validation)
    lines: list[LogLine] = []
    known, done = case.notices[place.rank] if case.notices else (), count(1)

    def on_checkpoint(progress: Any) -> None:
        state = made.full_state(keep=place.rank == 0)
        if place.rank == 0:
            write_checkpoint(case.folder / f"checkpoint-{progress.step}", state, progress)

    with nullcontext() if case.most is None else _Limited(case.most):
        reached = run(
            spec, made.backend, rows, course=made.course, place=place, start=made.start,
            evaluator=made.evaluator, on_log=lines.append, on_checkpoint=on_checkpoint,
            count_notices=lambda: bisect(known, next(done)),
        )  # fmt: skip
    made.take_best(reached.step)
    # Before the save: PEFT asks some modules for their output there, on the first worker alone,
    # after which ZeRO 3's forward would wait for the others for ever.
    logits_V = _answer(made, case.asked) if case.asked else None
    with made.backend.whole_parameters():
        if place.rank == 0:
            METHODS[spec.method.kind].save(made.backend.adapted, case.folder / "adapter")
            (case.folder / _LOG).write_text(json.dumps([asdict(line) for line in lines]))
            if logits_V is not None:
                save_file({"logits_V": logits_V}, case.folder / _LOGITS)
    return [line.loss for line in lines]


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
        state = several.runs[name].full_state(keep=place.rank == 0)
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
    run_several(several.shared, runners)
    for name, runner in runners.items():
        made = several.runs[name]
        if runner.end is None:
            continue
        made.take_best(runner.end.step)
        if place.rank == 0:
            folder = together.cases[name].folder / "adapter"
            METHODS[specs[name].method.kind].save(made.backend.adapted, folder)
    return {name: runner.failure for name, runner in runners.items() if runner.failure}


@torch.no_grad()
def _answer(made: Assembly, asked: Sequence[int]) -> torch.Tensor:
    """Collective: under ZeRO 3 each worker has a part of the model."""
    made.backend.model.eval()
    return made.backend.model(Continuation(list(asked))).float().contiguous()


class Workers:
    """Processes joined by gloo that live from one call to the next.

    A call that fails leaves them out of step: they are killed, and the next one starts others.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join()

    def run(self, cases: Sequence[Case | Together], tokens: Path) -> None:
        """Do every case in all processes. Raises RuntimeError with the first one's traceback."""
        if not self._processes:
            self._start()
        try:
            for connection in self._connections:
                connection.send((cases, tokens))
            waiting = list(self._connections)
            while waiting:
                for ready in wait(waiting):
                    assert isinstance(ready, Connection)
                    waiting.remove(ready)
                    if failure := ready.recv():
                        raise RuntimeError(failure)
        except BaseException:
            self._kill()
            raise

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_IMPORTED))
        for rank in range(self._world_size):
            ours, theirs = context.Pipe()
            # A fork has the environment of the time when the first worker was started.
            arguments = (rank, self._world_size, port, theirs, dict(os.environ))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that a worker's death is the end of its pipe
            self._processes.append(process)
            self._connections.append(ours)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []


def _serve(
    rank: int, world_size: int, port: int, connection: Connection, environment: Mapping[str, str]
) -> None:
    """A worker: does what it is sent and replies with a traceback or None, until it gets None."""
    os.environ |= environment
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                   "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    while (call := connection.recv()) is not None:
        cases, tokens = call
        try:
            for case in cases:
                # DeepSpeed collects garbage at every start: longer, the more there is alive.
                gc.freeze()
                do: Any = run_together if isinstance(case, Together) else run_case
                do(case, tokens, Place(rank, world_size))
            connection.send(None)
        except Exception:
            connection.send(f"worker {rank}: {traceback.format_exc()}")
    dist.destroy_process_group()
    sys.stdout.flush()
    # Now and then gloo's threads outlive the interpreter's end, which then aborts.
    os._exit(0)


def run_cases(world_size: int, cases: Sequence[Case | Together], tokens: Path) -> None:
    """Every case in `world_size` processes."""
    with Workers(world_size) as workers:
        workers.run(cases, tokens)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's parameters and moments, and the best ones of an evaluated run."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return read_checkpoint(last)[0]


def difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest of any element, of states or weights with the same names."""
    assert one.keys() == other.keys()
    # AdaLoRA may leave a module without any rank.
    return max(float((one[key] - other[key]).abs().max()) for key in one if one[key].numel())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's weights."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def logits_of(folder: Path) -> torch.Tensor:
    """What the trained model said to `asked`: [V], float32."""
    return load_file(folder / _LOGITS)["logits_V"]


def log_of(folder: Path) -> list[dict[str, float]]:
    """The fields of each log line."""
    return json.loads((folder / _LOG).read_text())
