"""How a step's gradients become an update: one interface, plain torch here, ZeRO in zero.py.

The loop sees only this. A backend's state is the trained parameters and AdamW's two moments in
full, by parameter name, whatever is sharded: it fits any backend, stage and number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from training.methods import trainable_parameters
from training.spec import OptimizerSpec
from training.step import LossModel

# The keys of a state: "param/<name>", "exp_avg/<name>", "exp_avg_sq/<name>".
PARTS = ("param", "exp_avg", "exp_avg_sq")


class Backend(Protocol):
    """What the loop needs of an optimiser. Every method is collective: all workers call it."""

    model: Any  # called with a task's batch (training.tasks); its loss
    adapted: Any  # the model with its method on, as METHODS save it
    # A step's gradients, summed over workers, are so many times too large in backward.
    gradient_scale: float

    def set_learning_rate(self, value: float) -> None:
        """Before the step's first micro-batch."""
        ...

    def set_loss_scale(self, value: float) -> None:
        """Before the step's first micro-batch: their losses come so many times too large."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's share of the step's loss; shares of all workers sum up to it."""
        ...

    def finish_step(self) -> float:
        """Clip, update, clear; returns the gradient's norm before clipping, the same on all
        workers. Where that is not finite, nothing is updated."""
        ...

    def full_state(self, *, moments: bool = True, keep: bool = True) -> dict[str, torch.Tensor]:
        """Parameters, and moments if asked, in full, float32 on CPU, by the keys of PARTS; nothing
        on a worker that does not keep them: there would be as many copies as workers."""
        ...

    def load_full_state(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Go on from `full_state` as it was after `step` updates."""
        ...

    def set_parameter(self, parameter: Any, value: torch.Tensor) -> None:
        """Give a trained parameter another value, in full; its moments stay."""
        ...

    @contextmanager
    def whole_parameters(self) -> Generator[None]:
        """A scope in which every trained parameter of the model is whole, to be read."""
        ...


def build_optimizer(model: torch.nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """AdamW over the trained parameters, grouped by the `rate_ratio` that their method gave.

    Raises:
        SpecError: its kind cannot be compiled here.
    """
    groups: dict[float, list[torch.nn.Parameter]] = {1.0: []}  # there must be one, if empty
    for parameter in trainable_parameters(model).values():
        groups.setdefault(getattr(parameter, "rate_ratio", 1.0), []).append(parameter)
    make: Any = torch.optim.AdamW
    if spec.kind == "cpu_adam":
        from training.cpu_adam import CpuAdam

        make = CpuAdam
    return make(
        [{"params": group, "rate_ratio": ratio} for ratio, group in groups.items()],
        lr=spec.learning_rate,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
    )


class PlainBackend:
    """AdamW on every worker, gradients summed over workers: ZeRO stage 0, or no DeepSpeed."""

    def __init__(self, model: LossModel, spec: OptimizerSpec) -> None:
        self.model, self.adapted = model, model.model
        self.gradient_scale = 1.0
        self._parameters = trainable_parameters(model)
        self._optimizer = build_optimizer(model, spec)
        self._max_norm = spec.max_grad_norm or float("inf")

    def set_learning_rate(self, value: float) -> None:
        """See Backend."""
        for group in self._optimizer.param_groups:
            group["lr"] = value * group["rate_ratio"]

    def set_loss_scale(self, value: float) -> None:
        """See Backend."""
        self.gradient_scale = value

    def backward(self, loss: torch.Tensor) -> None:
        """See Backend."""
        loss.backward()

    def finish_step(self) -> float:
        """See Backend."""
        gradients = [_gradient(parameter) for parameter in self._parameters.values()]
        _sum_over_workers(gradients)
        if self.gradient_scale != 1:
            for gradient in gradients:
                gradient.div_(self.gradient_scale)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._max_norm))
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def full_state(self, *, moments: bool = True, keep: bool = True) -> dict[str, torch.Tensor]:
        """See Backend."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items() if keep else ():
            own: Any = self._optimizer.state[parameter]
            state[f"param/{name}"] = parameter.detach()
            for part in PARTS[1:] if moments else ():
                state[f"{part}/{name}"] = own.get(part, torch.zeros_like(parameter))
        return {key: value.float().cpu().clone() for key, value in state.items()}

    def load_full_state(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """See Backend."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[f"param/{name}"])
                moments = {p: state[f"{p}/{name}"].to(parameter, copy=True) for p in PARTS[1:]}
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    **moments,
                }

    def set_parameter(self, parameter: Any, value: torch.Tensor) -> None:
        """See Backend."""
        parameter.data.copy_(value)

    @contextmanager
    def whole_parameters(self) -> Generator[None]:
        """See Backend."""
        yield


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter's, zeros where no row came by it (an expert's). Other workers may have one; and
    AdamW would pass over it, and count its steps otherwise than on two workers, or when resumed."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _sum_over_workers(gradients: list[torch.Tensor]) -> None:
    """In place. A function, so that the flat copy is gone before the update."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, summed in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(summed.view_as(gradient))
