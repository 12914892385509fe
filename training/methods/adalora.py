"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) through PEFT's layers and rank allocator.

    W + (alpha / init_r) P diag(E) Q; PEFT calls P lora_B, E lora_E and Q lora_A

The loss gets orthogonality / n * sum ||P^T P - I||_F + ||Q Q^T - I||_F over the n matrices P and
Q. After each update, a singular value's importance is a moving average of |w dL/dw| over itself
and its vectors, and the least important ones are set to zero until the mean rank is r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from training.method_spec import AdaLoraSpec
from training.methods.course import Course
from training.methods.placement import attach_low_rank, peft_placement

if TYPE_CHECKING:
    from training.backend import Backend
    from training.step import LossModel

_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator, by parameter name


def attach(model: Any, spec: AdaLoraSpec, base_path: str) -> torch.nn.Module:
    """Add an update P diag(E) Q to the targeted linear modules of `model`.

    Raises:
        SpecError: an option names nothing of the base.
    """
    from peft import AdaLoraConfig

    config = AdaLoraConfig(
        **peft_placement(model, spec, base_path),
        init_r=spec.init_r,
        target_r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type] # PEFT takes floats and annotates int
        deltaT=spec.allocate_every_steps,
        beta1=spec.beta1,
        beta2=spec.beta2,
        orth_reg_weight=spec.orthogonality,
        total_step=1,  # the course sets it with the first step
    )
    return attach_low_rank(model, config, spec, base_path)


class AdaLoraCourse(Course):
    """Orthogonality in each forward; importances and ranks after each update."""

    def __init__(self, model: Any, spec: AdaLoraSpec, seed: int) -> None:
        self._spec, self._tuner = spec, model.base_model
        self._config = model.peft_config["default"]
        self._allocator = self._tuner.rankallocator
        # By factor: backward may compute a layer again, and must find the same penalty anew.
        self._penalties: dict[tuple[int, bool], torch.Tensor] = {}
        # What backward adds up over a step's micro-batches, by name in the tuner's model.
        self._gradients: dict[str, torch.Tensor] = {}
        factors = [p for n, p in self._named() if ".lora_A." in n or ".lora_B." in n]
        self._weight = spec.orthogonality / len(factors)
        modules = self._tuner.modules()
        self._layers = [m for m in modules if "default" in getattr(m, "lora_E", {})]
        for layer in self._layers:
            layer.register_forward_hook(self._add_penalty)
        for name, parameter in self._named():
            parameter.register_hook(self._adder(name))

    def begin_step(self, step: int, steps: int) -> None:
        """See Course."""
        self._gradients = {}  # of a step that is done again
        # Rounded down, so that some steps are always between the two.
        self._config.total_step = steps
        self._config.tinit = int(self._spec.warmup_ratio * steps)
        self._config.tfinal = int(self._spec.final_ratio * steps)

    def penalty(self) -> torch.Tensor | None:
        """See Course."""
        if not self._penalties:
            return None
        for layer in self._layers:
            # An expert that no row came by counts too, or the loss would depend on how a batch is
            # cut. Under ZeRO 3 its factors are not here.
            is_missing = (id(layer), True) not in self._penalties
            if is_missing and not hasattr(layer.lora_A["default"], "ds_id"):
                self._add_penalty(layer)
        total = torch.stack([*self._penalties.values()]).sum()
        self._penalties.clear()
        return total * self._weight

    def end_step(self, step: int, steps: int, backend: Backend) -> None:
        """See Course. PEFT's allocator counts steps from 1: the last of them is then `steps`."""
        gradients = {
            name: self._gradient(name, parameter) / backend.gradient_scale
            for name, parameter in self._named()
        }
        self._gradients = {}
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([gradients[name].flatten() for name, _ in self._named()])
            dist.all_reduce(flat)
            sizes = [gradients[name].numel() for name, _ in self._named()]
            for (name, _), summed in zip(self._named(), flat.split(sizes), strict=True):
                gradients[name] = summed.view_as(gradients[name])
        with backend.whole_parameters():
            own = {name: parameter.grad for name, parameter in self._named()}
            for name, parameter in self._named():
                parameter.grad = gradients[name].to(parameter)
            self._tuner.update_and_allocate(step + 1)
            for name, parameter in self._named():
                parameter.grad = own[name]
            values = {p: p.detach().clone() for n, p in self._named() if ".lora_E." in n}
        if self._config.rank_pattern:
            for parameter, value in values.items():
                backend.set_parameter(parameter, value)

    def state(self) -> dict[str, torch.Tensor]:
        """See Course: both moving averages, and which singular values are left."""
        found = {
            f"{part}/{name}": value.detach().float().cpu().clone()
            for part in _AVERAGES
            for name, value in getattr(self._allocator, part).items()
        }
        pattern: Mapping[str, list[bool]] = self._config.rank_pattern or {}
        return found | {f"kept/{n}": torch.tensor(kept).float() for n, kept in pattern.items()}

    def restore(self, model: LossModel, state: Mapping[str, torch.Tensor]) -> None:
        """See Course."""
        own = dict(self._named())
        pattern: dict[str, list[bool]] = {}
        for key, value in state.items():
            part, _, name = key.partition("/")
            if part == "kept":
                pattern[name] = value.bool().tolist()
            else:
                getattr(self._allocator, part)[name] = value.to(own[name].device, copy=True)
                # PEFT starts the averages anew where it has no last value; it reads no old one.
                self._allocator.ipt[name] = torch.zeros_like(value)
        self._config.rank_pattern = pattern or None

    def _named(self) -> list[tuple[str, Any]]:
        """The update's parameters, by the names under which PEFT's allocator knows them."""
        named = self._tuner.model.named_parameters()
        return [(n, p) for n, p in named if ".lora_" in n and p.requires_grad]

    def _gradient(self, name: str, parameter: Any) -> torch.Tensor:
        """What backward added up; zeros where no row came by, as by an expert."""
        known = self._gradients.get(name)
        shape = getattr(parameter, "ds_shape", parameter.shape)  # whole under ZeRO 3
        return torch.zeros(shape, device=parameter.device) if known is None else known

    def _add_penalty(self, layer: Any, *_: object) -> None:
        if layer.training and torch.is_grad_enabled():
            for factor, is_wide in ((layer.lora_A, True), (layer.lora_B, False)):
                penalty: Any = _Orthogonality.apply(factor["default"], is_wide)
                self._penalties[id(layer), is_wide] = penalty

    def _adder(self, name: str) -> Any:
        def add(gradient: torch.Tensor) -> None:
            gradient = gradient.detach().float()
            known = self._gradients.get(name)
            self._gradients[name] = gradient.clone() if known is None else known + gradient

        return add


class _Orthogonality(torch.autograd.Function):
    """||Q Q^T - I||_F of a wide Q, or ||P^T P - I||_F of a tall P, with its gradient made at once:
    under ZeRO 3 the factor is here in its layer's own forward alone."""

    @staticmethod
    def forward(ctx: Any, factor: torch.Tensor, is_wide: bool) -> torch.Tensor:
        wide = factor.float() if is_wide else factor.float().T
        away = wide @ wide.T - torch.eye(len(wide), device=wide.device)
        norm = torch.linalg.norm(away)
        # d||M||_F = <M, dM> / ||M||_F and dM = dQ Q^T + Q dQ^T, with M symmetric.
        gradient = 2 * (away @ wide) / norm.clamp_min(torch.finfo(torch.float32).tiny)
        ctx.save_for_backward((gradient if is_wide else gradient.T).to(factor.dtype))
        return norm

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None
