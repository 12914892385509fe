"""Which weights a method trains: by Fisher information, once, or by chance, each step.

FishMask (Sung et al. 2021, arXiv:2111.09839) and Child-tuning-D (Xu et al. 2021,
arXiv:2109.05687) take the top K of the empirical Fisher information, the mean over rows of the
squared gradient of log p(labels | row). Child-tuning-F multiplies each step's gradients by
Bernoulli(p) / p.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from training.method_spec import ChildTuningSpec, FishMaskSpec
from training.methods.course import Course
from training.methods.sparse import VALUES, maskable, set_masks
from training.step import Batch, LossModel


def make_child_course(model: Any, spec: ChildTuningSpec, seed: int) -> Course:
    """The course of either form of Child-tuning."""
    if spec.form == "task_free":
        return BernoulliCourse(model, spec.share, seed)
    return FisherCourse(model, spec, seed)


class FisherCourse(Course):
    """Chooses the mask from the data, at the start of a fresh run; keeps it with checkpoints."""

    def __init__(self, model: Any, spec: FishMaskSpec | ChildTuningSpec, seed: int) -> None:
        self._num_samples = spec.num_samples
        self._found = maskable(model, spec.target_modules, str(model.config._name_or_path))
        self._masks: dict[str, torch.Tensor] = {}

    def prepare(self, model: LossModel, samples: Iterator[Batch]) -> None:
        """See Course. Every worker looks at the same rows; rank 0's choice is everyone's."""
        named = model.named_parameters()
        count = sum(p.numel() for name, p in named if name.endswith(VALUES))
        set_masks(self._found, {})
        parameters = {name: parameter for name, (parameter, _) in self._found.items()}
        scores = squared_gradients(model, parameters, islice(samples, self._num_samples))
        self._choose(top(scores, count))

    def restore(self, model: LossModel, state: Mapping[str, torch.Tensor]) -> None:
        """See Course. Masks that are set already keep their values."""
        masks = {name: indices.long() for name, indices in state.items()}
        if masks.keys() == self._masks.keys() and all(
            torch.equal(masks[name], own) for name, own in self._masks.items()
        ):
            return
        self._masks = masks
        set_masks(self._found, masks)

    def state(self) -> dict[str, torch.Tensor]:
        """See Course."""
        return {name: indices.to(torch.int32) for name, indices in self._masks.items()}

    def _choose(self, places: torch.Tensor) -> None:
        """Set the masks by positions in all parameters, counted through."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(places, 0)
        start = 0
        for name, (parameter, _) in self._found.items():
            end = start + parameter.numel()
            own = places[(places >= start) & (places < end)] - start
            if len(own):
                self._masks[name] = own.cpu()
            start = end
        set_masks(self._found, self._masks)


def squared_gradients(
    model: LossModel, parameters: Mapping[str, torch.nn.Parameter], samples: Iterator[Batch]
) -> dict[str, torch.Tensor]:
    """Sums over `samples` of each row's squared gradient, float32; no dropout."""
    sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}

    def add(name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        sums[name] += parameter.grad.float().square()
        parameter.grad = None

    was_training = model.training
    model.eval()
    handles: list[Any] = []
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(partial(add, name)))
    for batch in samples:
        model(batch).backward()
    for handle, parameter in zip(handles, parameters.values(), strict=True):
        handle.remove()
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)  # a classifier's head has learned nothing yet
    model.train(was_training)
    return sums


def top(scores: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
    """Positions of the `count` largest scores of all, counted through in order, rising, int64.

    Of equal scores the first are taken. Never holds more than one tensor's scores beside the best.
    """
    best = places = torch.zeros(0)
    start = 0
    for score in scores.values():
        flat = torch.cat([best.to(score.device), score.flatten()])
        own = torch.arange(start, start + score.numel(), device=score.device)
        known = torch.cat([places.to(score.device, torch.int64), own])
        order = flat.argsort(descending=True, stable=True)[:count]
        best, places = flat[order], known[order]
        start += score.numel()
    return places.sort().values


class BernoulliCourse(Course):
    """Child-tuning-F: gradients times a mask that (seed, step, parameter) decide, over p. It is
    linear in the gradient, so micro-batches and workers may each apply it."""

    def __init__(self, model: torch.nn.Module, share: float, seed: int) -> None:
        self._share, self._seed, self._step = share, seed, 0
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.register_hook(partial(self._masked, index))

    def begin_step(self, step: int, steps: int) -> None:
        """See Course."""
        self._step = step

    def _masked(self, index: int, gradient: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(gradient.device)
        generator.manual_seed(hash((self._seed, self._step, index)) % 2**63)
        keep = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        return gradient * keep.bernoulli_(self._share, generator=generator) / self._share
