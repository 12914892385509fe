"""What cannot be lowered is refused by name: unread fields, and kinds that no primitive equals."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import load, make_adapter
from peft.utils import PeftType
from safetensors.torch import load_file, save_file

from cluster.adapter_folder import AdapterFolder, check_finite
from cluster.errors import AdapterError
from serving.adapters import describe, lower, lowering
from serving.adapters.lowering import _REFUSED, LOWER
from serving.adapters.offset import PROXY

Bases = Callable[[str], Path]


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", [*LOWER, PROXY])
def test_a_field_that_nobody_reads_is_refused(bases: Bases, tmp_path: Path, kind: str) -> None:
    folder = write_folder(tmp_path, {"peft_type": kind, "new_trick": 3}, {"x": torch.ones(1)})
    with pytest.raises(AdapterError, match=r"has new_trick = '3', which is not served yet"):
        lower(folder, describe(load(bases("llama")), "llama"))


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PeftType if kind not in LOWER))
def test_each_other_kind_of_peft_is_refused_with_its_reason(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    folder = write_folder(tmp_path, {"peft_type": kind}, {"x": torch.ones(1)})
    with pytest.raises(AdapterError) as caught:
        lower(folder, describe(load(bases("llama")), "llama"))
    assert f"has peft_type {kind!r}, {_REFUSED[kind]}" in caught.value.message


def test_ties_to_be_kept_are_refused_where_there_are_some(bases: Bases, tmp_path: Path) -> None:
    """Where a base ties nothing, PEFT only warns."""
    config = {"peft_type": "LORA", "ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}
    names = ("model.embed_tokens", "lm_head")
    tensors = {f"base_model.model.{name}.weight": torch.ones(261, 32) for name in names}
    target = describe(load(bases("qwen3")), "qwen3")
    with pytest.raises(AdapterError, match="has ensure_weight_tying = 'True', which is not served"):
        lower(write_folder(tmp_path, config, tensors), target)
    del tensors["base_model.model.lm_head.weight"]
    folder = write_folder(tmp_path, config, tensors)
    assert lower(folder, describe(load(bases("llama")), "llama")).deltas.keys() == {names[0]}


def test_what_peft_has_of_linear_modules_alone_is_refused_on_gpt2s(
    bases: Bases, tmp_path: Path
) -> None:
    """Its square weights have the right shape either way round."""
    target, module = describe(load(bases("gpt2")), "gpt2"), "transformer.h.0.attn.c_proj"
    key = f"base_model.model.{module}."
    places = torch.zeros(2, 1, dtype=torch.int32)
    shira = {f"{key}shira_weight": torch.ones(1), f"{key}shira_indices": places}
    factors = {f"{key}lora_{part}.weight": torch.ones(shape) for part, shape in
               (("A", (2, 32)), ("B", (32, 2)))}  # fmt: skip
    olora = {"peft_type": "LORA", "r": 2, "init_lora_weights": "olora"}
    for config, tensors, reason in (
        ({"peft_type": "SHIRA"}, shira, f"has a SHiRA on '{module}', which is not linear"),
        (olora, factors, f"is an OLoRA on '{module}', where PEFT's is undefined"),
    ):
        with pytest.raises(AdapterError) as caught:
            lower(write_folder(tmp_path, config, tensors), target)
        assert reason in caught.value.message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 5}, r"of shapes .* for 'weight' of 'model.layers.0.mlp.gate', where the base"),
        ({"target_parameters": ["gate_up_proj"]}, r"for 'gate_up_proj' of '.*', where the base"),
        ({"target_parameters": "down_proj"}, "has target_parameters = 'down_proj', not names"),
        ({"target_parameters": ["norm.weight"]}, "which is no plain matrix, or stack of some"),
        ({"init_lora_weights": "pissa"}, "in target_parameters, of which neither a part was"),
        ({"use_dora": True}, "where lora_A, lora_B, lora_magnitude are needed"),
    ],
)
def test_a_lora_on_parameters_that_do_not_fit_is_refused(
    bases: Bases, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    target = describe(load(bases("mixtral")), "mixtral")
    path = make_adapter("experts", bases("mixtral"), tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=reason):
        lower(tmp_path, target)


def test_an_encoder_decoders_prefix_of_one_stack_is_refused(bases: Bases, tmp_path: Path) -> None:
    """Its prompt may be of the encoder alone."""
    target = describe(load(bases("mt5")), "mt5")
    folder = make_adapter("prefix_tuning", bases("mt5"), tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_transformer_submodules": 1}))
    with pytest.raises(AdapterError, match="num_transformer_submodules = 1, where the base mt5"):
        lower(folder, target)


def test_weights_that_are_replaced_behind_their_check_are_refused(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter("lora", bases("llama"), tmp_path)

    def check_and_replace(opened: AdapterFolder) -> None:
        check_finite(opened)
        tensors = load_file(folder / "adapter_model.safetensors")
        nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
        save_file(nan, folder / "new")
        os.replace(folder / "new", folder / "adapter_model.safetensors")

    monkeypatch.setattr(lowering, "check_finite", check_and_replace)
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors was changed while it was"):
        lower(folder, describe(load(bases("llama")), "llama"))
