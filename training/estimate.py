"""Predicted memory of one worker, by part and ZeRO stage, before anything is loaded or started.

The worker's own code (model, method, backend, two steps, a checkpoint) runs on fake tensors, at
the shape of the run's largest micro-batch, as far as a sample of rows tells; a ledger keeps what it
asks for, and on CPU the machine's own malloc says what of it is resident (training.heap). So what
is counted is what the code does, ZeRO included, and no formula that could grow old.

Not counted: what a method looks at before its first step (the Fisher information of FishMask and
Child-tuning), evaluation, and the writing of the adapter at the end.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from cluster.base_model import empty_base, quantization_of
from cluster.errors import SpecError
from cluster.quantized_linear import is_quantized
from cluster.tasks import Task
from training import heap
from training.assembly import check_base, make_backend, settle_norms
from training.backend import Backend
from training.ledger import Ledger, lone_worker, without_bytes
from training.methods import METHODS, count_parameters
from training.quantized_shape import quantize_shapes
from training.rows import Row, micro_batches
from training.shaped import SHAPED
from training.spec import TrainingSpec, ZeroSpec
from training.step import DTYPES
from training.tasks import TASK_PARTS

# What a worker's tensors are for: "update" is what an optimiser's step needs beside its states,
# "checkpoint" the state in full, as it is gathered to be kept.
PARTS: Sequence[str] = (
    "weights",
    "gradients",
    "optimiser",
    "activations",
    "logits",
    "update",
    "checkpoint",
)
_MIB = 2**20
_DRAWN_STEPS = 1_000


@dataclass(frozen=True)
class Shape:
    """The largest micro-batch: `rows` of `tokens` each, with `targets` of so many where these are
    an encoder-decoder's; or, where they lie end to end, rows of the lengths `packed`."""

    rows: int
    tokens: int
    targets: int | None = None
    packed: tuple[int, ...] | None = None

    @classmethod
    def of_length(cls, spec: TrainingSpec, tokens: int, targets: int | None = None) -> Shape:
        """That of a job whose rows all have so many tokens, and targets as many if not given."""
        world_size = spec.workers.least
        parts = world_size * spec.accumulation(world_size)
        targets = (targets or tokens) if spec.task == "seq_2_seq_lm" else None
        return cls(-(-spec.global_batch_size // parts), tokens, targets)

    @classmethod
    def of_rows(cls, spec: TrainingSpec, rows: Sequence[Row]) -> Shape:
        """That of a job whose rows are like these: of padded rows the longest, of packed ones the
        largest micro-batch of many steps of rows drawn from them."""
        lengths = np.array([len(ids) for ids, _ in rows])
        targets = max(len(labels) for _, labels in rows)
        padded, world_size = cls.of_length(spec, int(lengths.max()), targets), spec.workers.least
        share = (world_size, spec.accumulation(world_size))
        random, largest = np.random.default_rng(spec.seed), np.zeros(1, dtype=int)
        for _ in range(_DRAWN_STEPS):
            drawn = random.choice(lengths, spec.global_batch_size)
            # The first worker's first one has the longest row, and about as many tokens as any.
            part = micro_batches(np.arange(len(drawn)), drawn, 0, *share, is_packed=True)[0]
            largest = max(largest, drawn[part], key=np.sum)
        return replace(padded, packed=tuple(largest.tolist()))

    def content(self, task: Task, *, is_packed: bool) -> list[Row]:
        """Rows of this shape, all of whose labels are learned."""
        lengths = self.packed if is_packed and self.packed else (self.tokens,) * self.rows
        targets = 1 if task == "sequence_classification" else self.targets
        return [([0] * length, [0] * (targets or length)) for length in lengths]


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
    """A spec's prediction for each ZeRO stage."""

    trainable_parameters: int
    all_parameters: int
    shape: Shape
    workers: int
    stages: Sequence[StageEstimate]


def stages_of(spec: TrainingSpec) -> Sequence[int]:
    """The ZeRO stages at which `spec` can be trained: packed weights are not sharded."""
    return (0, 1, 2, 3) if spec.quantization is None else (0, 1, 2)


def check_predictable(spec: TrainingSpec) -> None:
    """Raise SpecError for several adapters."""
    if spec.adapters:
        raise SpecError("adapters: their memory cannot be predicted yet; estimate one of them")


def estimate(spec: TrainingSpec, shape: Shape, stages: Sequence[int] | None = None) -> Estimate:
    """Predict the peak memory of a worker of `spec` at each of `stages`, all if not given.

    Args:
        spec: As `training.command.resolved` gives it.

    Raises:
        CallerError: the base or the method does not fit.
        SpecError: the spec has several adapters, which cannot be predicted, or cannot be trained
            at one of the stages.
    """
    check_predictable(spec)
    stages = stages or stages_of(spec)
    if 3 in stages and 3 not in stages_of(spec):
        raise SpecError("quantization does not fit ZeRO stage 3; leave it out of --stage")
    world_size, on_cpu = spec.workers.least, not spec.workers.gpus
    found: list[StageEstimate] = []
    counts, runtimes = (0, 0), dict[bool, float]()
    is_packed = True
    with lone_worker(world_size), _quiet(zero=max(stages) > 0):
        for stage in stages:
            there = _at_stage(spec, stage, world_size, shape.rows)
            run = _Run(there, shape)
            counts, zero = run.counts, run.counts[0] > 0 and there.stage_on(world_size) > 0
            is_packed = is_packed and run.is_packed
            if zero not in runtimes:
                told = partial(heap.runtime_mib, spec.trained_base, task=spec.task)
                runtimes[zero] = told(zero=zero) if on_cpu else 0.0
            found.append(run.found(runtimes[zero], with_heap=on_cpu))
    used = shape if is_packed else replace(shape, packed=None)
    return Estimate(*counts, used, world_size, found)


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


class _Run:
    """A worker's life on fake tensors: made, two steps, one checkpoint."""

    def __init__(self, spec: TrainingSpec, shape: Shape) -> None:
        self._spec, self._shape, self._ledger = spec, shape, Ledger()
        self._moments: dict[str, int] = {}
        base = empty_base(spec.trained_base, task=spec.task, labels=spec.data.labels)
        check_base(base, spec)
        dtype = DTYPES[spec.precision]
        method = METHODS[spec.method.kind]
        base.to(dtype)
        self._packed_file_bytes = 0
        if spec.quantization is not None:
            quantize_shapes(base, spec.quantization, dtype)
            settle_norms(base)
            if quantization_of(spec.trained_base) is None:
                self._packed_file_bytes = _read_for_packing(base, spec.trained_base)
        model = method.attach(base, spec.method, spec.base_model)
        self.counts = count_parameters(model)
        # A base of which the method made float32 copies is no longer what was loaded.
        self._loaded_dtype = dtype if next(model.parameters()).dtype == dtype else None
        if (head := base.get_output_embeddings()) is not None:  # a classifier has none
            self._ledger.vocabulary = head.weight.shape[0]
        with FakeTensorMode(allow_non_fake_inputs=True):
            scales = without_bytes(model)
            with self._ledger:
                self._live(model.train(), scales)

    def _live(self, model: torch.nn.Module, scales: Sequence[torch.Tensor]) -> None:
        ledger, world_size = self._ledger, dist.get_world_size()
        ledger.claim([*model.parameters(), *model.buffers(), *scales])
        self._loaded = len(ledger.parts)
        with ledger.counting("activations"):
            loss_model = SHAPED[self._spec.task](
                model,
                precision=DTYPES[self._spec.precision],
                is_sharded=self._spec.stage_on(world_size) == 3,
                recomputes=self._spec.gradient_checkpointing,
            )
        with ledger.counting("optimiser"), _as_placed(self._spec):
            backend = make_backend(loss_model, _with_adamw(self._spec), world_size)
        for parameter in model.parameters():
            ledger.claim([parameter, getattr(parameter, "ds_tensor", None)], "weights")
        self.is_packed = loss_model.is_packed
        self._moments["at the start"] = len(ledger.events)
        self._watch(backend)
        for _ in range(2 if self.counts[0] else 0):
            self._step(backend)
        self._moments["in a step"] = len(ledger.events)
        with ledger.counting("checkpoint"):
            backend.full_state()
        self._moments["at a checkpoint"] = len(ledger.events)

    def _watch(self, backend: Backend) -> None:
        """Let what DeepSpeed's engine does in its step count as the update's."""
        engine, ledger = backend.model, self._ledger
        if not hasattr(engine, "step"):
            return
        step = engine.step

        def counted() -> None:
            ledger.rename("activations", "gradients")  # what backward left
            with ledger.counting("update"):
                step()
            ledger.rename("update", "optimiser")

        engine.step = counted

    def _step(self, backend: Backend) -> None:
        spec, ledger, device = self._spec, self._ledger, torch.device("cpu")
        rows = self._shape.content(spec.task, is_packed=backend.model.is_packed)
        ledger.chosen = sum(len(labels) for _, labels in rows)
        backend.set_learning_rate(spec.optimizer.learning_rate)
        for _ in range(spec.accumulation(dist.get_world_size())):
            batch = TASK_PARTS[spec.task].collate(rows, device)
            with ledger.counting("activations"):
                loss = backend.model(batch)
                backend.backward(loss / len(rows))
                del loss
            ledger.rename("activations", "gradients")
        with ledger.counting("update"):
            backend.finish_step()
        ledger.rename("update", "optimiser")

    def found(self, runtime: float, *, with_heap: bool) -> StageEstimate:
        """The peak and what it is made of; with what malloc adds, or of tensors alone."""
        file_dtype, file_bytes = _weights_file(self._spec.trained_base)
        is_mapped = file_dtype in (None, self._loaded_dtype)
        moment, at = self._live_peak()
        parts = self._parts_at(at)
        live = sum(parts.values())
        beside = 0
        if with_heap:
            mapped = self._loaded if is_mapped else 0
            beside = heap.resident_bytes(self._ledger.events, mapped) - live
            if is_mapped:  # what is not packed keeps the whole file, which was read, in memory
                beside += self._packed_file_bytes
            loading = file_bytes + sum(size for n, size in self._ledger.events if n < self._loaded)
            if not is_mapped and loading > live + beside:
                moment, beside = "while loading", 0
                parts = dict.fromkeys(PARTS, 0) | {"weights": loading}
        in_mib = {part: size / _MIB for part, size in parts.items()}
        return StageEstimate(self._spec.zero.stage, moment, in_mib, beside / _MIB, runtime)

    def _live_peak(self) -> tuple[str, int]:
        """When most bytes lived: the moment's name, and the event."""
        sizes: dict[int, int] = {}
        live = peak = at = 0
        for index, (number, size) in enumerate(self._ledger.events):
            live += size - sizes.get(number, 0)
            sizes[number] = size
            if live > peak:
                peak, at = live, index
        return next(name for name, end in self._moments.items() if at < end), at

    def _parts_at(self, event: int) -> dict[str, int]:
        parts = dict.fromkeys(PARTS, 0)
        for number, size in dict(self._ledger.events[: event + 1]).items():
            parts[self._ledger.parts[number]] += size
        return parts


def _read_for_packing(base: Any, path: str) -> int:
    """Bytes of the weights' file that are packed into other memory when a base is loaded."""
    packed = {p for module in filter(is_quantized, base.modules()) for p in module.parameters()}
    rest = sum(p.nbytes for p in base.parameters() if p not in packed)
    return max(0, _weights_file(path)[1] - rest)


def _weights_file(base: str) -> tuple[torch.dtype | None, int]:
    """The dtype in which the base's weights lie on disk, None if it cannot be told, and their
    bytes. Reads a header."""
    files = sorted(Path(base).glob("*.safetensors"))
    try:
        with safe_open(files[0], "pt") as opened:
            name = opened.get_slice(next(iter(opened.keys()))).get_dtype()
    except (SafetensorError, OSError, IndexError, StopIteration):
        return None, 0
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return dtypes.get(name), sum(file.stat().st_size for file in files)


def _with_adamw(spec: TrainingSpec) -> TrainingSpec:
    """DeepSpeed's CPU Adam reads memory; its states are AdamW's."""
    return spec.model_copy(
        update={"optimizer": spec.optimizer.model_copy(update={"kind": "adamw"})}
    )


@contextmanager
def _as_placed(spec: TrainingSpec) -> Generator[None]:
    """The scope of making a backend: modules are where they belong, and an optimiser that updates
    in place, as DeepSpeed's CPU Adam, is torch's fused one."""

    def stay(module: torch.nn.Module, *_: Any) -> torch.nn.Module:
        return module

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.nn.Module, "to", stay))
        if spec.optimizer.kind == "cpu_adam":
            stack.enter_context(
                patch.object(torch.optim, "AdamW", partial(torch.optim.AdamW, fused=True))
            )
        yield


@contextmanager
def _quiet(*, zero: bool) -> Generator[None]:
    """The scope of a run that no log should tell of, and in which DeepSpeed finds what it compares
    between workers equal."""
    before = logging.root.manager.disable
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, before)
        if zero:
            import deepspeed.comm.comm
            import deepspeed.runtime.zero.utils as zero_utils
            import deepspeed.utils.groups as groups

            # It keeps the process group that it found first.
            stack.enter_context(patch.object(deepspeed.comm.comm, "cdb", None))
            stack.enter_context(patch.object(groups, "_WORLD_GROUP", None))
            stack.enter_context(patch.object(zero_utils, "get_lst_from_rank0", list))
        yield
