"""Proxy-tuning (Liu et al. 2024, arXiv:2401.08565): logits + alpha (expert's - anti-expert's).

The expert is a small base with an adapter of any method, the anti-expert the small base alone; the
large base is not needed to train. PEFT has no proxy-tuning. The folder is the expert's with its
config nested: adapter_config.json with `peft_type` PROXY_TUNING, `small_base`, `alpha` and
`expert`, and the expert's own adapter_model.safetensors.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from cluster.adapter_folder import CONFIG, WEIGHTS, fault, open_adapter_folder
from cluster.base_model import base_config, load_base, load_tokenizer
from cluster.errors import SpecError
from training.method_spec import ProxyTuningSpec
from training.methods.course import Course

PEFT_TYPE = "PROXY_TUNING"
SCHEMA = 1


@dataclass(frozen=True)
class _Proxy:
    """What the saved folder says besides the expert."""

    base_path: str
    spec: ProxyTuningSpec


class ProxyTuned(torch.nn.Module):
    """The reference: three whole models, run side by side."""

    def __init__(self, base: Any, expert: Any, anti_expert: Any, alpha: float) -> None:
        super().__init__()
        self.base, self.expert, self.anti_expert = base, expert, anti_expert
        self.alpha = alpha

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> CausalLMOutput:
        """Logits [rows, tokens, vocabulary]; a prompt of the expert's has none."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        expert = self.expert(**inputs).logits[:, -input_ids.shape[1] :]
        change = expert - self.anti_expert(**inputs).logits
        return CausalLMOutput(logits=self.base(**inputs).logits + self.alpha * change)


def attach(model: Any, spec: ProxyTuningSpec, base_path: str) -> torch.nn.Module:
    """Build the expert on `model`, which is the small base.

    Raises:
        SpecError: the bases have different vocabularies, or the expert's method does not fit.
    """
    from training.methods import METHODS  # here, since that table has this module in it

    _check_vocabulary(base_path, spec.small_base)
    expert: Any = METHODS[spec.expert.kind].attach(model, spec.expert, spec.small_base)
    expert.proxy = _Proxy(base_path, spec)
    return expert


def course(model: Any, spec: ProxyTuningSpec, seed: int) -> Course:
    """The expert's."""
    from training.methods import METHODS

    return METHODS[spec.expert.kind].course(model, spec.expert, seed)


def save(model: Any, folder: Path) -> None:
    """Write the adapter folder of a model that `attach` made and training changed."""
    from training.methods import METHODS

    proxy: _Proxy = model.proxy
    METHODS[proxy.spec.expert.kind].save(model, folder)
    config = {
        "peft_type": PEFT_TYPE,
        "graft_schema": SCHEMA,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": proxy.base_path,
        "small_base": proxy.spec.small_base,
        "alpha": proxy.spec.alpha,
        "expert": json.loads((folder / CONFIG).read_text()),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def load(model: Any, folder: Path) -> torch.nn.Module:
    """The large base `model` with the expert of a folder beside it, for inference; loads the small
    base twice.

    Raises:
        AdapterError: the folder is not sound.
        BaseModelError: the small base is not where it was.
    """
    from training.load import load_adapter

    config = open_adapter_folder(folder).config
    small_base, alpha, expert = (config.get(key) for key in ("small_base", "alpha", "expert"))
    if not (isinstance(small_base, str) and isinstance(alpha, (int, float)) and expert):
        raise fault(folder, CONFIG, "needs small_base, alpha and expert; train it anew")
    with tempfile.TemporaryDirectory() as name:
        own = Path(name)
        shutil.copyfile(folder / WEIGHTS, own / WEIGHTS)
        (own / CONFIG).write_text(json.dumps(expert))
        adapted, bare = (load_base(small_base, model.dtype).to(model.device) for _ in range(2))
        tuned = ProxyTuned(model, load_adapter(adapted, own), bare.eval(), alpha)
    return tuned.requires_grad_(False)


def _check_vocabulary(base_path: str, small_base: str) -> None:
    """Logits can be added only where each token has the same id and row in both."""
    sizes = [base_config(path).get_text_config().vocab_size for path in (base_path, small_base)]
    if sizes[0] != sizes[1]:
        raise SpecError(
            f"method.small_base {small_base}: has a vocabulary of {sizes[1]} tokens, and "
            f"base_model {base_path} one of {sizes[0]}; take a small base of the same family"
        )
    vocabularies = [load_tokenizer(path).get_vocab() for path in (base_path, small_base)]
    if vocabularies[0] != vocabularies[1]:
        raise SpecError(
            f"method.small_base {small_base}: its tokenizer is another than that of base_model "
            f"{base_path}; take a small base of the same family"
        )
