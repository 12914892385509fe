"""A worker's life on fake tensors: base, methods, backends, some steps, a checkpoint.

It is the worker's own code that runs (but for what compares numbers, training.shaped), at the shape
of each adapter's largest micro-batch; a ledger keeps which bytes it asks for, and what for.

Not run: evaluation, and the writing of the adapter at the end.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
from training.assembly import check_base, has_lone_experts, make_backend, settle_norms
from training.backend import Backend
from training.ledger import Ledger, without_bytes
from training.method_spec import ChildTuningSpec, FishMaskSpec
from training.methods import METHODS, count_parameters
from training.methods.fisher import squared_gradients, top
from training.methods.sparse import VALUES, maskable, set_masks
from training.quantized_shape import quantize_shapes
from training.rows import Row, micro_batches
from training.shaped import SHAPED, ShapedPass
from training.shared_pass import sharing
from training.spec import TrainingSpec
from training.step import DTYPES, LossModel
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
_DRAWN_STEPS = 1_000
_SAMPLES = 2  # of those whose gradients choose a mask: in the second one all sums are there
_STEPS = 2  # in the second one the optimiser's states are there from the beginning


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


class DryRun:
    """One that has ended.

    Args:
        specs: What each adapter alone would be trained by; they differ in what `adapters` may.
        shapes: The largest micro-batch of each.

    Attributes:
        ledger: What was asked for, in order.
        loaded: So many of the ledger's tensors were there before the first step.
        moments: The number of the ledger's events at the end of each moment.
        counts: Parameters that are trained, and all.
        is_mapped: Whether the loaded weights lie in their file's own pages.
        file_bytes: Of the weights' file.
        packed_file_bytes: Of these, what is read to be packed into other memory.
        is_packed: Whether rows lie end to end.

    Raises:
        CallerError: the base or the method does not fit.
        SpecError: which of the base's modules run depends on what they read.
    """

    def __init__(self, specs: Mapping[str, TrainingSpec], shapes: Mapping[str, Shape]) -> None:
        self._specs, self._shapes, self.ledger = specs, shapes, Ledger()
        self.moments: dict[str, int] = {}
        self._spec = spec = next(iter(specs.values()))
        base = empty_base(spec.trained_base, task=spec.task, labels=spec.data.labels)
        if has_lone_experts(base):
            raise SpecError(
                f"base_model {spec.trained_base}: which of its experts run depends on what they "
                "read, so its memory cannot be predicted"
            )
        check_base(base, spec)
        dtype = DTYPES[spec.precision]
        base.to(dtype)
        self.packed_file_bytes = 0
        if spec.quantization is not None:
            quantize_shapes(base, spec.quantization, dtype)
            settle_norms(base)
            if quantization_of(spec.trained_base) is None:
                self.packed_file_bytes = _read_for_packing(base, spec.trained_base)
        models = {
            name: METHODS[own.method.kind].attach(
                sharing(base) if len(specs) > 1 else base, own.method, own.base_model
            )
            for name, own in specs.items()
        }
        counts = [count_parameters(model) for model in models.values()]
        trained, (first, total) = sum(each for each, _ in counts), counts[0]
        self.counts = trained, total - first + trained
        file_dtype, self.file_bytes = _weights_file(spec.trained_base)
        # A base of which the method made float32 copies is no longer what was loaded.
        is_as_loaded = next(next(iter(models.values())).parameters()).dtype == dtype
        self.is_mapped = file_dtype in (None, dtype if is_as_loaded else None)
        if (head := base.get_output_embeddings()) is not None:  # a classifier has none
            self.ledger.vocabulary = head.weight.shape[0]
        with FakeTensorMode(allow_non_fake_inputs=True):
            scales = without_bytes(base, *models.values())
            with self.ledger:
                for model in (*models.values(), base):
                    self.ledger.claim([*model.parameters(), *model.buffers()])
                self.ledger.claim(scales)
                self.loaded = len(self.ledger.parts)
                self._live(base, models)

    def _live(self, base: Any, models: Mapping[str, torch.nn.Module]) -> None:
        spec, ledger, world_size = self._spec, self.ledger, dist.get_world_size()
        self._shared: ShapedPass | None = None
        with ledger.counting("activations"):
            losses = {name: self._loss_model(model.train()) for name, model in models.items()}
            for name, model in losses.items():
                self._look(name, model)
            if len(models) > 1:
                undrawn: Mapping[str, Callable[[], AbstractContextManager[None]]]
                undrawn = dict.fromkeys(models, nullcontext)
                again = spec.gradient_checkpointing
                self._shared = ShapedPass(base, losses, undrawn, recomputes=again)
        with ledger.counting("optimiser"), _as_placed(spec):
            self._backends = {
                name: make_backend(losses[name], _with_adamw(own), world_size)
                for name, own in self._specs.items()
            }
        for model in models.values():
            for parameter in model.parameters():
                ledger.claim([parameter, getattr(parameter, "ds_tensor", None)], "weights")
        self.is_packed = all(model.is_packed for model in losses.values())
        self.moments["at the start"] = len(ledger.events)
        for backend in self._backends.values():
            self._watch(backend)
        self._steps(_STEPS)
        self.moments["in a step"] = len(ledger.events)
        with ledger.counting("checkpoint"):
            states = [backend.full_state() for backend in self._backends.values()]
        self.moments["at a checkpoint"] = len(ledger.events)
        if len(states) > 1:  # which are held until there are others, see training.several
            self._steps(1)
            self.moments["in a step behind a checkpoint"] = len(ledger.events)

    def _loss_model(self, model: torch.nn.Module) -> LossModel:
        spec = self._spec
        return SHAPED[spec.task](
            model,
            precision=DTYPES[spec.precision],
            is_sharded=spec.stage_on(dist.get_world_size()) == 3,
            recomputes=spec.gradient_checkpointing,
        )

    def _look(self, name: str, model: LossModel) -> None:
        """What the course of a mask does before the first step (training.methods.fisher). The
        places that it finds are numbers, so the values stay as many in each parameter."""
        method: Any = self._specs[name].method
        method = getattr(method, "expert", method)
        by_task = isinstance(method, ChildTuningSpec) and method.form == "task_driven"
        if not (by_task or isinstance(method, FishMaskSpec)):
            return
        found = maskable(model.model, method.target_modules, self._spec.trained_base)
        masks: dict[str, torch.Tensor] = {}
        for own, (_, ((module, part), *_)) in found.items():
            if (values := getattr(module, part + VALUES)) is not None:
                masks[own] = torch.zeros(len(values), dtype=torch.int64)
        parameters = {own: parameter for own, (parameter, _) in found.items()}
        set_masks(found, {})
        with self.ledger.counting("gradients"):
            scores = squared_gradients(model, parameters, self._samples(name, method.num_samples))
            top(scores, sum(map(len, masks.values())))
        del scores
        set_masks(found, masks)
        self.moments["while a mask is chosen"] = len(self.ledger.events)

    def _samples(self, name: str, count: int) -> Iterator[Any]:
        """Single rows, the longest of all."""
        task, shape = self._spec.task, replace(self._shapes[name], rows=1, packed=None)
        rows = shape.content(task, is_packed=False)
        self.ledger.chosen = len(rows[0][1])
        for _ in range(min(_SAMPLES, count)):
            with self.ledger.counting("activations"):
                yield TASK_PARTS[task].collate(rows, torch.device("cpu"))

    def _watch(self, backend: Backend) -> None:
        """Let what DeepSpeed's engine does in its step count as the update's."""
        engine, ledger = backend.model, self.ledger
        if not hasattr(engine, "step"):
            return
        step = engine.step

        def counted() -> None:
            ledger.rename("activations", "gradients")  # what backward left
            with ledger.counting("update"):
                step()
            ledger.rename("update", "optimiser")

        engine.step = counted

    def _steps(self, count: int) -> None:
        """So many of each adapter, of those that train anything."""
        if not self.counts[0]:
            return
        world_size = dist.get_world_size()
        parts = {name: own.accumulation(world_size) for name, own in self._specs.items()}
        for number in range(1, count * max(parts.values()) + 1):
            self._round([name for name, part in parts.items() if number % part == 0])

    def _round(self, ended: Collection[str]) -> None:
        """A micro-batch of each adapter, and an update of those whose step it `ended`."""
        ledger, device = self.ledger, torch.device("cpu")
        task = self._spec.task
        rows = {
            name: shape.content(task, is_packed=self.is_packed)
            for name, shape in self._shapes.items()
        }
        ledger.chosen = sum(len(labels) for each in rows.values() for _, labels in each)
        batches = {name: TASK_PARTS[task].collate(each, device) for name, each in rows.items()}
        with ledger.counting("activations"):
            self._backward(batches, {name: len(each) for name, each in rows.items()})
        ledger.rename("activations", "gradients")
        for name in ended:
            self._backends[name].set_learning_rate(self._specs[name].optimizer.learning_rate)
            with ledger.counting("update"):
                self._backends[name].finish_step()
            ledger.rename("update", "optimiser")

    def _backward(self, batches: Mapping[str, Any], counts: Mapping[str, int]) -> None:
        if self._shared is not None:
            losses = self._shared.losses(batches)
            torch.autograd.backward([loss / counts[name] for name, loss in losses.items()])
            return
        for name, backend in self._backends.items():
            backend.backward(backend.model(batches[name]) / counts[name])


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
def quiet(*, zero: bool) -> Generator[None]:
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
