"""Predicted memory of one worker, by part and ZeRO stage, before anything is loaded or started.

The worker's own code runs on fake tensors (training.dry_run), at the shape of the run's largest
micro-batch, as far as a sample of rows tells; on CPU the machine's own malloc says what of it is
resident (training.heap). So what is counted is what the code does, ZeRO included, and no formula
that could grow old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cluster.errors import SpecError
from training import heap
from training.dry_run import PARTS, DryRun, Shape, quiet
from training.ledger import lone_worker
from training.spec import TrainingSpec, ZeroSpec

_MIB = 2**20


@dataclass(frozen=True)
class StageEstimate:
    """One worker at one ZeRO stage, in MiB.

    `parts` is what its tensors are for at the moment of the peak, which `moment` names;
    `allocator` what malloc holds beside them then, `runtime` the process without a model. The last
    two are 0 on GPUs, where only tensors are counted.
    """

    stage: int
    moment: str
    parts: Mapping[str, float]
    allocator: float
    runtime: float

    @property
    def total(self) -> float:
        """The predicted peak."""
        return sum(self.parts.values()) + self.allocator + self.runtime


@dataclass(frozen=True)
class Estimate:
    """A spec's prediction for each ZeRO stage. `shapes` are by adapter."""

    trainable_parameters: int
    all_parameters: int
    shapes: Mapping[str, Shape]
    workers: int
    stages: Sequence[StageEstimate]


def stages_of(spec: TrainingSpec) -> Sequence[int]:
    """The ZeRO stages at which `spec` can be trained: packed weights are not sharded, and several
    adapters share a pass at stage 0 alone."""
    if spec.adapters:
        return (0,)
    return (0, 1, 2) if spec.quantization else (0, 1, 2, 3)


def estimate(
    spec: TrainingSpec, shapes: Mapping[str, Shape], stages: Sequence[int] | None = None
) -> Estimate:
    """Predict the peak memory of a worker of `spec` at each of `stages`, all if not given.

    Args:
        spec: As `training.command.resolved` gives it.
        shapes: By the names of `spec.each()`.

    Raises:
        CallerError: the base or the method does not fit.
        SpecError: the spec cannot be trained at one of the stages, or its base's memory depends on
            what it reads.
    """
    stages = stages or stages_of(spec)
    if wrong := sorted(set(stages) - set(stages_of(spec))):
        what = "adapters do" if spec.adapters else "quantization does"
        raise SpecError(f"{what} not fit ZeRO stage {wrong[0]}; leave it out of --stage")
    world_size, on_cpu = spec.workers.least, not spec.workers.gpus
    found: list[StageEstimate] = []
    counts, runtimes = (0, 0), dict[bool, float]()
    is_packed = True
    with lone_worker(world_size), quiet(zero=max(stages) > 0):
        for stage in stages:
            there = {
                name: _at_stage(own, stage, world_size, shapes[name].rows)
                for name, own in spec.each().items()
            }
            run = DryRun(there, shapes)
            first = next(iter(there.values()))
            counts, zero = run.counts, run.counts[0] > 0 and first.stage_on(world_size) > 0
            is_packed = is_packed and run.is_packed
            if zero not in runtimes:
                told = partial(heap.runtime_mib, spec.trained_base, task=spec.task)
                runtimes[zero] = told(zero=zero) if on_cpu else 0.0
            found.append(_at_peak(run, stage, runtimes[zero], with_heap=on_cpu))
    if not is_packed:
        shapes = {name: replace(shape, packed=None) for name, shape in shapes.items()}
    return Estimate(*counts, shapes, world_size, found)


def _at_stage(spec: TrainingSpec, stage: int, world_size: int, rows: int) -> TrainingSpec:
    """`spec` at another stage, with no more micro-batches in a step than there are kinds of: the
    first, and those that find gradients of others."""
    zero = ZeroSpec.model_validate(
        {
            "stage": stage,
            "offload_optimizer": spec.zero.offload_optimizer and stage > 0,
            "offload_parameters": spec.zero.offload_parameters and stage == 3,
        }
    )
    accumulation = min(2, spec.accumulation(world_size))
    update = {
        "zero": zero,
        "micro_batch_size": rows,
        "batch_size": rows * world_size * accumulation,
        "gradient_accumulation_steps": None,
    }
    return spec.model_copy(update=update)


def _at_peak(run: DryRun, stage: int, runtime: float, *, with_heap: bool) -> StageEstimate:
    """The peak and what it is made of; with what malloc adds, or of tensors alone."""
    ledger = run.ledger
    moment, at = _live_peak(run)
    parts = _parts_at(run, at)
    live = sum(parts.values())
    beside = 0
    if with_heap:
        mapped = run.loaded if run.is_mapped else 0
        beside = heap.resident_bytes(ledger.events, mapped) - live
        if run.is_mapped:  # what is not packed keeps the whole file, which was read, in memory
            beside += run.packed_file_bytes
        loading = run.file_bytes + sum(size for n, size in ledger.events if n < run.loaded)
        if not run.is_mapped and loading > live + beside:
            moment, beside = "while loading", 0
            parts = dict.fromkeys(PARTS, 0) | {"weights": loading}
    in_mib = {part: size / _MIB for part, size in parts.items()}
    return StageEstimate(stage, moment, in_mib, beside / _MIB, runtime)


def _live_peak(run: DryRun) -> tuple[str, int]:
    """When most bytes lived: the moment's name, and the event."""
    sizes: dict[int, int] = {}
    live = peak = at = 0
    for index, (number, size) in enumerate(run.ledger.events):
        live += size - sizes.get(number, 0)
        sizes[number] = size
        if live > peak:
            peak, at = live, index
    return next(name for name, end in run.moments.items() if at < end), at


def _parts_at(run: DryRun, event: int) -> dict[str, int]:
    parts = dict.fromkeys(PARTS, 0)
    for number, size in dict(run.ledger.events[: event + 1]).items():
        parts[run.ledger.parts[number]] += size
    return parts
