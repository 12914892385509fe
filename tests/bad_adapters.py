"""Adapter folders that are sound as containers and yet no adapters of the base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        change(config)
        (path / "adapter_config.json").write_text(json.dumps(config))

    return apply


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors")

    return apply


def save_whole(name: str, size: int) -> Callable[[Path], object]:
    """As a module of modules_to_save, with so many numbers."""

    def apply(path: Path) -> None:
        edit_config(lambda c: c.update(modules_to_save=[name.split(".")[-2]]))(path)
        edit_tensors(lambda t: t.update({name: torch.ones(size)}))(path)

    return apply


def spoil_tensor(
    ending: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Path], object]:
    """The first whose name ends so."""

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = change(tensors[name])

    return edit_tensors(apply)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
NORM_BIAS = "base_model.model.model.norm.bias"
# Of these cases, the ones that are not published, since they are no adapters of any base.
OF_NO_BASE = {
    "alpha a text", "alpha infinite", "alpha huge", "rank a text", "half a pair", "not finite",
}  # fmt: skip
# A variant of tests/adapters.py, what is wrong with it, how it gets so, and what is told of it.
BAD: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("lora", "DoRA", edit_config(lambda c: c.update(use_dora=True)), "magnitude"),
    ("lora", "token indices", edit_config(lambda c: c.update(trainable_token_indices=[1])),
     "trainable_token_indices"),
    ("lora", "parameters", edit_config(lambda c: c.update(target_parameters=["norm.weight"])),
     "target_parameters, which is no plain matrix"),
    ("lora", "field of the future", edit_config(lambda c: c.update(new_trick=3)), "new_trick"),
    ("lora", "alpha a text", edit_config(lambda c: c.update(lora_alpha="16")), "lora_alpha"),
    ("lora", "alpha infinite", edit_config(lambda c: c.update(lora_alpha=float("inf"))),
     "lora_alpha"),
    ("lora", "alpha huge", edit_config(lambda c: c.update(lora_alpha=1e30)), "lora_alpha"),
    ("lora", "rank a text", edit_config(lambda c: c.update(r="4")), "r = '4', not a positive"),
    ("lora", "rank of another", edit_config(lambda c: c.update(r=5)), "shapes"),
    ("lora", "half a pair", edit_tensors(lambda t: t.pop(A)), "where lora_A, lora_B"),
    ("lora", "unknown module", edit_tensors(lambda t: t.update(
        {key.replace("q_", "x_"): t[key] + 1 for key in (A, B)})), "no module"),
    ("lora", "unknown tensor", edit_tensors(lambda t: t.update({"other": torch.ones(2)})), "other"),
    ("lora", "integers", edit_tensors(lambda t: t.update({A: t[A].int()})), "floating point"),
    ("lora", "not finite", edit_tensors(lambda t: t[A].fill_(float("nan"))), "NaN"),
    ("lora", "unknown kind", edit_config(lambda c: c.update(peft_type="XLORA")), "XLORA"),
    ("lora", "saved whole a text", edit_config(lambda c: c.update(modules_to_save="lm_head")),
     "modules_to_save"),
    ("lora", "saved whole of another shape", save_whole("base_model.model.model.norm.weight", 7),
     "shape"),
    ("lora", "two of a matrix", edit_tensors(lambda t: t.update(
        {A.replace(".weight", ".default.weight"): t[A] * 2})), "and another lora_A"),
    ("lora", "a bias of a norm", edit_tensors(lambda t: t.update({NORM_BIAS: torch.ones(32)})),
     "no bias there"),
    ("lora", "a forged line", edit_config(lambda c: c.update(
        r=5, base_model_name_or_path="a\nERROR\u202e\ud800" + "x" * 900_000)), "made for another"),
    ("lora", "a long name", edit_tensors(lambda t: t.update({"z" * 2_000_000: torch.ones(1)})),
     "keys begin with"),
    ("vera", "a norm of another", edit_tensors(lambda t: t.update({NORM_BIAS: torch.ones(32)})),
     "norm.bias"),
    ("vera", "an endless pattern", edit_config(lambda c: c.update(target_modules=r"(\w+\w*\.?)+!")),
     "target_modules"),
    ("lora", "look-around", edit_config(lambda c: c.update(rank_pattern={"(?=x)": 2})),
     "rank_pattern, which RE2 does not match"),
    ("adalora", "a number", spoil_tensor("lora_A", lambda t: t[0, 0].clone()), "shapes"),
    ("bottleneck", "activation a list", edit_config(lambda c: c.update(activation=["relu"])),
     "has activation \"['relu']\""),
    ("bottleneck", "one number", spoil_tensor("down.bias", lambda t: t[0].clone()), "shapes"),
    ("llama_adapter", "no prompt", spoil_tensor("prompt", lambda t: t[:0].clone()), "another size"),
    ("llama_adapter", "no tokens", spoil_tensor("prompt", lambda t: t[:, :0].clone()),
     "another size"),
    ("shira", "places alone", edit_tensors(lambda t: t.pop(next(
        key for key in t if key.endswith("shira_weight")))), "no whole pair"),
    ("prompt_tuning", "length", edit_config(lambda c: c.update(num_virtual_tokens=6)), "shape"),
    ("prompt_tuning", "extra", edit_tensors(lambda t: t.update({"x": torch.ones(1)})), "alone"),
    ("prefix_tuning", "encoder", edit_config(lambda c: c.update(num_transformer_submodules=2)),
     "num_transformer_submodules = 2, where the base"),
    ("bitfit", "a weight", edit_tensors(lambda t: t.update({A: torch.ones(2)})), "no bias"),
]  # fmt: skip
