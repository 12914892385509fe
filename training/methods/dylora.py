"""DyLoRA (Valipour et al. 2022, arXiv:2210.07558): one LoRA that is good at every rank up to r.

    W + (alpha / b) B[:, :b] A[:b], with b drawn evenly from [min_rank, r] at each step

The folder is an ordinary LoRA's; the weights file's metadata tells the lowest rank, so that serving
can take the first b ranks at a request's wish.

    I in    O out    r rank
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cluster.adapter_folder import MIN_RANK, WEIGHTS
from training.method_spec import DyLoraSpec
from training.methods.course import Course
from training.methods.lora import save_peft
from training.methods.placement import attach_low_rank, check_linear, peft_placement

_LOWEST = "graft_min_rank"  # of a model


def attach(model: Any, spec: DyLoraSpec, base_path: str) -> torch.nn.Module:
    """Add a LoRA of rank r to the targeted linear modules of `model`.

    Raises:
        SpecError: an option names nothing of the base, or a target is not linear.
    """
    from peft import LoraConfig

    config = LoraConfig(
        **peft_placement(model, spec, base_path),
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type] # PEFT takes floats and annotates int
    )
    adapted = attach_low_rank(model, config, spec, base_path)
    check_linear(
        adapted, "DyLoRA cuts the ranks of linear modules alone; leave it out, or take kind lora"
    )
    setattr(adapted, _LOWEST, spec.min_rank)
    return adapted


def save(model: Any, folder: Path) -> None:
    """Write a LoRA's folder, with the lowest rank in the metadata of its weights."""
    save_peft(model, folder)
    # One entry alone: safetensors writes several in any order, and equal adapters are equal bytes.
    metadata = {MIN_RANK: str(getattr(model, _LOWEST))}
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata=metadata)


class DyLoraCourse(Course):
    """Cuts every update to the step's rank."""

    def __init__(self, model: Any, spec: DyLoraSpec, seed: int) -> None:
        self._spec, self._seed, self.rank = spec, seed, spec.r
        for name, module in model.named_modules():
            if name.endswith(".lora_A.default"):
                module.register_forward_hook(self._cut)
        if spec.frozen:
            for name, parameter in model.named_parameters():
                if ".lora_A." in name and parameter.requires_grad:
                    parameter.register_hook(self._keep_last_row)
                elif ".lora_B." in name and parameter.requires_grad:
                    parameter.register_hook(self._keep_last_column)

    def begin_step(self, step: int, steps: int) -> None:
        """See Course."""
        draw = np.random.default_rng([self._seed, 2, step])
        self.rank = int(draw.integers(self._spec.min_rank, self._spec.r, endpoint=True))

    def _cut(self, layer: torch.nn.Module, _: object, low: torch.Tensor) -> torch.Tensor | None:
        """The first b of the r inner values; PEFT multiplies by alpha / r after it."""
        if not layer.training:
            return None
        ranks = torch.arange(self._spec.r, device=low.device)
        return low * ((ranks < self.rank) * (self._spec.r / self.rank)).to(low.dtype)

    def _keep_last_row(self, gradient_rI: torch.Tensor) -> torch.Tensor:
        return gradient_rI * self._only_last(gradient_rI)[:, None]

    def _keep_last_column(self, gradient_Or: torch.Tensor) -> torch.Tensor:
        return gradient_Or * self._only_last(gradient_Or)

    def _only_last(self, like: torch.Tensor) -> torch.Tensor:
        return (torch.arange(self._spec.r, device=like.device) == self.rank - 1).to(like.dtype)
