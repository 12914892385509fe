"""All that one worker's run is made of: base, method, its course, optimiser, and where it starts.

No Ray here; the worker under Ray Train, the tests and the benchmarks all start a run this way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.base_model import context_tokens, load_base, load_tokenizer, rescaled_rope
from cluster.errors import BaseModelError
from training.backend import PARTS, Backend, PlainBackend
from training.checkpoint import BEST, COURSE, Progress, read_checkpoint, run_state
from training.evaluation import Evaluator
from training.methods import METHODS, trainable_parameters
from training.methods.course import Course
from training.methods.layernorm import norm_modules
from training.methods.placement import check_saved_modules
from training.place import Place
from training.rows import TokenRows
from training.spec import TrainingSpec
from training.step import DTYPES, Batch, LossModel
from training.tasks import TASK_PARTS

_LAYER_DROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True)
class Assembly:
    """One worker's run, ready for `training.loop.run`."""

    model: LossModel
    backend: Backend
    course: Course
    start: Progress
    evaluator: Evaluator | None

    def full_state(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """What a checkpoint holds; nothing on a worker that does not keep it. Collective."""
        state = run_state(self.backend, self.course, keep=keep)
        best = self.evaluator.best if self.evaluator and keep else {}
        return state | {BEST + name: best[name] for name in best}

    def take_best(self, step: int) -> None:
        """Put the best weights in the place of the last ones, of `step`, to be saved. Collective;
        nothing can be trained after it."""
        if self.evaluator is None or not self.evaluator.best:
            return
        best = self.evaluator.best
        weights = {name: value for name, value in best.items() if name.startswith("param/")}
        moments = {
            name.replace("param", part, 1): torch.zeros_like(value)
            for name, value in weights.items()
            for part in PARTS[1:]
        }
        self.backend.load_full_state(weights | moments, step)
        if course := _within(best, COURSE):
            self.course.restore(self.model, course)


def assemble(
    spec: TrainingSpec,
    place: Place,
    rows: TokenRows,
    checkpoint: Path | None = None,
    validation: TokenRows | None = None,
    base: Any = None,
) -> Assembly:
    """Build a run at its start, or as `checkpoint` left it. Collective; the same on every worker.

    Args:
        validation: The rows that the run is evaluated on, if any.
        base: The base's model where it is loaded already; it is changed.

    Raises:
        CallerError: the base or the method does not fit; names the field.
        StoreError: the checkpoint is not whole.
    """
    state, start = read_checkpoint(checkpoint) if checkpoint else ({}, Progress())
    torch.manual_seed(spec.seed)
    method = METHODS[spec.method.kind]
    if base is None:
        base = load_model(spec, place)
    if spec.quantization is not None:
        check_saved_modules(base, spec.method)
    model = method.attach(base, spec.method, spec.base_model)
    model.to(place.device).train()
    loss_model = TASK_PARTS[spec.task].model(
        model,
        precision=DTYPES[spec.precision],
        is_sharded=spec.stage_on(place.world_size) == 3,
        recomputes=spec.gradient_checkpointing,
    )
    course = method.course(model, spec.method, spec.seed)
    if checkpoint:
        course.restore(loss_model, _within(state, COURSE))
    else:
        course.prepare(loss_model, _samples(spec, rows, place))
    backend = make_backend(loss_model, spec, place.world_size)
    if checkpoint:
        backend.load_full_state(state, start.step)
    evaluator = None
    if validation is not None:
        evaluator = _evaluator(spec, place, loss_model, validation, start, _within(state, BEST))
    return Assembly(loss_model, backend, course, start, evaluator)


def load_model(spec: TrainingSpec, place: Place) -> Any:
    """The model that the spec's method is put on. Raises BaseModelError."""
    base = load_base(
        spec.trained_base,
        DTYPES[spec.precision],
        spec.quantization,
        place.device,
        task=spec.task,
        labels=spec.data.labels,
    )
    check_base(base, spec)
    if spec.quantization is not None:
        settle_norms(base)
    return base


def settle_norms(base: Any) -> None:
    """Make a quantised base's norms float32, as QLoRA does: they cost nothing, and what they scale
    is rounded once less."""
    for norm in norm_modules(base).values():
        norm.float()


def check_base(base: Any, spec: TrainingSpec) -> None:
    """Raise BaseModelError for a base that leaves out layers at random, other ones on each worker
    and in each micro-batch (their collective calls would not meet, and the loss would depend on how
    a batch is cut), or experts that no row asks for where ZeRO needs all; or that float16 is too
    narrow for, as T5's feed-forward is; or that turns rows as long as these another way than short
    ones, and all rows of a batch alike."""
    parts = [base.config, *(getattr(base.config, part, None) for part in ("encoder", "decoder"))]
    keys = _LAYER_DROP if base.config.is_encoder_decoder else ("layerdrop", "decoder_layerdrop")
    if dropped := sorted({key for part in parts for key in keys if getattr(part, key, None)}):
        raise BaseModelError(
            f"base_model {spec.trained_base}: it leaves out layers at random in training; set "
            f"{' and '.join(dropped)} to 0 in its config.json (dropout within layers may stay)"
        )
    if spec.zero.stage and spec.workers.most > 1 and has_lone_experts(base):
        raise BaseModelError(
            f"base_model {spec.trained_base}: its experts are modules of their own, of which each "
            "worker's rows reach others, and under ZeRO workers would wait for one another for "
            "ever; set zero.stage to 0, or workers.count to 1"
        )
    wide = sorted(getattr(base, "_keep_in_fp32_modules", None) or ())
    if spec.precision == "fp16" and wide:
        raise BaseModelError(
            f"base_model {spec.trained_base}: {type(base).__name__} overflows in float16 "
            f"(transformers keeps its {', '.join(wide)} in float32); set precision to bf16 or fp32"
        )
    _check_length(base, spec)


def _check_length(base: Any, spec: TrainingSpec) -> None:
    kind, original = rescaled_rope(base.config) or (None, None)
    if original is None:
        return
    virtual = getattr(spec.method, "num_virtual_tokens", None) or 0
    asked = spec.data.max_length
    if asked is None or asked + virtual > original:
        beside = f" less its {virtual} virtual tokens" if virtual else ""
        raise BaseModelError(
            f"base_model {spec.trained_base}: with rope_type {kind!r} a row's loss "
            f"depends on whether a row beside it is longer than {original} tokens; set "
            f"data.max_length, now {asked or 'not set'}, to at most {original}{beside}"
        )


def has_lone_experts(base: Any) -> bool:
    """Whether experts run apart, and only if a row comes by them, as SwitchTransformers' do; those
    of other families are one tensor."""
    kinds = (torch.nn.ModuleList, torch.nn.ModuleDict)
    return any(
        isinstance(module, kinds) and name.rpartition(".")[2] == "experts" and len(module) > 0
        for name, module in base.named_modules()
    )


def _evaluator(
    spec: TrainingSpec,
    place: Place,
    model: LossModel,
    rows: TokenRows,
    start: Progress,
    best: Mapping[str, torch.Tensor],
) -> Evaluator:
    parts = TASK_PARTS[spec.task]
    context = context_tokens(spec.trained_base) if parts.answers_in_context else None
    return parts.evaluator(
        spec.evaluation,
        rows,
        load_tokenizer(spec.base_model),
        task=spec.task,
        collate=parts.collate,
        labels=spec.data.labels,
        batch_rows=spec.micro_batch_size,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        room=None if context is None else context - model.virtual_tokens,
        is_sharded=spec.stage_on(place.world_size) == 3,
        history=start.evaluations,
        best=best,
    )


def _within(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _samples(spec: TrainingSpec, rows: TokenRows, place: Place) -> Iterator[Batch]:
    """Single rows in an order of their own, the same on every worker."""
    for index in np.random.default_rng([spec.seed, 1]).permutation(len(rows)):
        yield TASK_PARTS[spec.task].collate([rows.row(int(index))], place.device)


def make_backend(model: LossModel, spec: TrainingSpec, world_size: int) -> Backend:
    """The backend of the spec's ZeRO stage. Needs torch.distributed from stage 1 on."""
    if spec.stage_on(world_size) == 0 or not trainable_parameters(model):
        return PlainBackend(model, spec.optimizer)
    from training.zero import ZeroBackend

    return ZeroBackend(model, spec)
