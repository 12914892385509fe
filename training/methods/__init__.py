"""The methods: how each is built on a model and saved as an adapter folder.

One file per family, one row per kind in `METHODS`. A method that PEFT has is PEFT's, and saved as
PEFT saves it; the others use the same folder shape. Runs without Ray and without DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.quantized_linear import numel
from training.methods import (
    adalora,
    bitfit,
    bottleneck,
    dylora,
    fisher,
    hard_prompt,
    ia3,
    layernorm,
    llama_adapter,
    lora,
    proxy_tuning,
    soft_prompt,
    sparse,
)
from training.methods.course import Course


def _no_course(model: Any, spec: Any, seed: int) -> Course:
    return Course()


@dataclass(frozen=True)
class Method:
    """One method. `attach` freezes the base and returns the model to train; `save` writes its
    adapter folder; `load` puts a folder saved by it onto a fresh base.

    Args:
        peft_type: Of its folders, where PEFT does not know it.
        course: Makes what the method does besides following gradients, of the attached model,
            the method's spec and the run's seed.
    """

    attach: Callable[[Any, Any, str], torch.nn.Module]
    save: Callable[[Any, Path], None]
    load: Callable[[Any, Path], torch.nn.Module]
    peft_type: str | None = None
    course: Callable[[Any, Any, int], Course] = _no_course


_PEFT = (lora.save_peft, lora.load_peft)
_SPARSE = (sparse.save, sparse.load, sparse.PEFT_TYPE)
METHODS: Mapping[str, Method] = {
    "lora": Method(lora.attach, lora.save, lora.load_peft),
    "adalora": Method(adalora.attach, *_PEFT, course=adalora.AdaLoraCourse),
    "dylora": Method(dylora.attach, dylora.save, lora.load_peft, course=dylora.DyLoraCourse),
    "ia3": Method(ia3.attach, *_PEFT),
    "bitfit": Method(bitfit.attach, bitfit.save, bitfit.load, bitfit.PEFT_TYPE),
    "layernorm": Method(layernorm.attach, *_PEFT),
    "fishmask": Method(sparse.attach_masked, *_SPARSE, fisher.FisherCourse),
    "child_tuning": Method(sparse.attach_child, *_SPARSE, fisher.make_child_course),
    "bottleneck": Method(bottleneck.attach, bottleneck.save, bottleneck.load, bottleneck.PEFT_TYPE),
    "llama_adapter": Method(llama_adapter.attach, *_PEFT),
    "full": Method(sparse.attach_full, *_SPARSE),
    "prompt_tuning": Method(soft_prompt.attach_prompt_tuning, *_PEFT),
    "p_tuning": Method(soft_prompt.attach_p_tuning, *_PEFT),
    "prefix_tuning": Method(soft_prompt.attach_prefix_tuning, *_PEFT),
    "hard_prompt": Method(hard_prompt.attach, *_PEFT),
    "proxy_tuning": Method(
        proxy_tuning.attach,
        proxy_tuning.save,
        proxy_tuning.load,
        proxy_tuning.PEFT_TYPE,
        proxy_tuning.course,
    ),
}


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that the method trains, by their name in the model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; tied ones count once, shards and quantised ones in full."""
    sizes = [(numel(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
