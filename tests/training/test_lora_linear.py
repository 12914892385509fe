"""A LoRA fused with its frozen module computes what PEFT computes, or leaves it to PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import load, randomize

from training.lora_linear import fuse_loras
from training.methods import trainable_parameters

IDS = torch.arange(20).view(2, 10)


def adapted(base: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear", **options)
    model = peft.get_peft_model(load(base), config)
    randomize(model)
    return model


def outcome(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of their squares' mean."""
    torch.manual_seed(7)
    logits = model(IDS).logits
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in trainable_parameters(model).items()}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"lora_dropout": 0.5}),
        ("llama", {"use_dora": True}),
        ("llama", {"lora_bias": True}),
        ("gpt2", {"bias": "all"}),
    ],
)
def test_logits_and_gradients_are_those_of_peft(
    bases: Callable[[str], Path], family: str, options: dict[str, Any]
) -> None:
    plain, fused = (adapted(bases(family), **options).train() for _ in range(2))
    fuse_loras(fused)
    expected, found = outcome(plain), outcome(fused)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-3)


def test_a_disabled_or_hooked_lora_is_left_to_peft(bases: Callable[[str], Path]) -> None:
    model = adapted(bases("llama")).eval()
    base = load(bases("llama"))(IDS).logits
    fuse_loras(model)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_A["default"].register_forward_hook(lambda _m, _x, y: torch.zeros_like(y))
    assert torch.equal(model(IDS).logits, base)


def test_in_bf16_it_is_as_near_to_fp32_as_peft(bases: Callable[[str], Path]) -> None:
    exact, plain, fused = (adapted(bases("llama")).train() for _ in range(3))
    for model in (plain, fused):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    fuse_loras(fused)
    truth = outcome(exact)[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = [outcome(model)[1] for model in (plain, fused)]
    assert all(gradient.dtype == torch.float32 for gradient in found[1].values())
    away = [sum(float((g[n] - truth[n]).norm() / truth[n].norm()) for n in truth) for g in found]
    assert away[1] < 1.2 * away[0]
