"""Bottleneck adapters: a small layer down, an activation and a layer up, beside a frozen base.

Houlsby et al. (2019, arXiv:1902.00751) put y + s up(f(down(y))) behind attention and feed-forward,
Pfeiffer et al. (2020, arXiv:2005.00247) behind feed-forward alone, both before the residual is
added; He et al. (2021, arXiv:2110.04366) add s up(f(down(x))) of the feed-forward's input x to its
output. `up` starts at zero, so training starts from the base.

PEFT has none. The folder has PEFT's shape: adapter_config.json with `peft_type` BOTTLENECK, the
activation, the scale and, by the module whose output is changed, the one whose input is read;
adapter_model.safetensors with `base_model.model.<module>.bottleneck.{down,up}.{weight,bias}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cluster.adapter_folder import CONFIG, WEIGHTS, open_adapter_folder
from cluster.errors import AdapterError, SpecError
from cluster.tasks import peft_task_type
from training.method_spec import BottleneckSpec
from training.methods.head import head_tensors, is_of_head, load_head, train_head

PEFT_TYPE = "BOTTLENECK"
SCHEMA = 1
_PREFIX = "base_model.model."
_NAME = "bottleneck"
# How families name a sublayer's last linear module, and the feed-forward.
_ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense")
_FEED_FORWARD = ("mlp", "feed_forward", "ffn")
_FEED_FORWARD_OUT = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out")
# Where these lie deeper, in T5 and its like (a decoder's block has cross-attention between the two)
# and in BERT and its like.
_NESTED_ATTENTION_OUT = ("layer.0.SelfAttention.o", "attention.output.dense")
_NESTED_FEED_FORWARD = (
    ("layer.2.DenseReluDense", "layer.2.DenseReluDense.wo"),
    ("layer.1.DenseReluDense", "layer.1.DenseReluDense.wo"),
    ("intermediate.dense", "output.dense"),
)
_ACTIVATIONS = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


class Bottleneck(torch.nn.Module):
    """s up(f(down(x))), [..., H] -> [..., H]; float32 parameters."""

    def __init__(self, hidden: int, width: int, activation: str, scale: float) -> None:
        super().__init__()
        self.down, self.up = torch.nn.Linear(hidden, width), torch.nn.Linear(width, hidden)
        torch.nn.init.zeros_(self.up.weight)
        torch.nn.init.zeros_(self.up.bias)
        self.activation, self.scale = activation, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added, in x's dtype."""
        return (self.scale * self.up(_ACTIVATIONS[self.activation](self.down(x)))).to(x.dtype)


def attach(model: Any, spec: BottleneckSpec, base_path: str) -> torch.nn.Module:
    """Freeze `model` and put a bottleneck at every place of `spec.placement`.

    Raises:
        SpecError: the base's sublayers are not found by their names.
    """
    model.requires_grad_(False)
    places = dict(_places(model, spec.placement, base_path))
    hidden: int = model.config.get_text_config().hidden_size
    width = max(1, round(hidden / spec.reduction_factor))
    device = model.get_input_embeddings().weight.device
    for module_name, source_name in places.items():
        with torch.device(device):
            block = Bottleneck(hidden, width, spec.activation, spec.scaling)
        _put(model, module_name, source_name, block)
    train_head(model)
    model.config._name_or_path = base_path
    model.bottleneck_inputs = {m: s for m, s in places.items() if s is not None}
    return model


def _places(model: Any, placement: str, base_path: str) -> Iterator[tuple[str, str | None]]:
    """(module whose output is changed, module whose input is read or None for that output), in
    every layer of the base; of an encoder-decoder, of both its stacks."""
    found = False
    for stack in _stacks(model):
        for name, (attention, source, output) in stack.items():
            found = True
            if placement == "houlsby":
                yield f"{name}.{attention}", None
            yield f"{name}.{output}", f"{name}.{source}" if placement == "parallel" else None
    if not found:
        raise SpecError(
            f"method: the attention and feed-forward of {base_path} ({type(model).__name__}) are "
            "not found by the names that other families give them; use lora or ia3, which name "
            "modules"
        )


def _stacks(model: Any) -> Iterator[dict[str, tuple[str, str, str]]]:
    """Each stack of layers: a layer's name -> where in it attention ends, and whose input and
    output the feed-forward's are."""
    config = model.config.get_text_config()
    counts = {config.num_hidden_layers}
    if config.is_encoder_decoder:
        names = ("encoder_layers", "decoder_layers", "num_decoder_layers")
        counts |= {getattr(config, name, None) for name in names}
    for list_name, layers in model.named_modules():
        if not isinstance(layers, torch.nn.ModuleList) or len(layers) not in counts:
            continue
        found = [(_attention_out(layer), *_feed_forward(layer)) for layer in layers]
        stack = {
            f"{list_name}.{index}": (attention, source, output)
            for index, (attention, source, output) in enumerate(found)
            if attention and source and output
        }
        if len(stack) == len(layers):
            yield stack
            if not config.is_encoder_decoder:
                return


def _attention_out(layer: torch.nn.Module) -> str | None:
    for name, child in layer.named_children():
        if "Attention" in type(child).__name__:
            last = next((n for n in _ATTENTION_OUT if hasattr(child, n)), None)
            return _nested(layer, _NESTED_ATTENTION_OUT) if last is None else f"{name}.{last}"
    return _nested(layer, _NESTED_ATTENTION_OUT)


def _feed_forward(layer: torch.nn.Module) -> tuple[str | None, str | None]:
    """(whose input, whose output) the feed-forward's are. A mixture of experts is one module."""
    if hasattr(layer, "fc1") and hasattr(layer, "fc2"):
        return "fc1", "fc2"
    for source, output in _NESTED_FEED_FORWARD:
        if _nested(layer, (source,)) and _nested(layer, (output,)):
            return source, output
    name = next((n for n in _FEED_FORWARD if hasattr(layer, n)), None)
    if name is None:
        return None, None
    last = next((n for n in _FEED_FORWARD_OUT if hasattr(getattr(layer, name), n)), None)
    return name, name if last is None else f"{name}.{last}"


def _nested(layer: torch.nn.Module, paths: Iterable[str]) -> str | None:
    """The first of the paths that leads to a module."""
    modules = dict(layer.named_modules())
    return next((path for path in paths if path in modules), None)


def _put(model: torch.nn.Module, module_name: str, source_name: str | None, block: Any) -> None:
    """Let `block` change a module's output, by that or by another module's input. A forward raises
    SpecError if that output is several tensors, as of GPT-OSS's experts."""
    module = model.get_submodule(module_name)
    module.add_module(_NAME, block)

    def check(_: torch.nn.Module, _args: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            raise SpecError(
                f"method: {module_name!r} of {type(model).__name__} gives several tensors, and a "
                "bottleneck changes one; use lora or ia3, which name modules"
            )

    module.register_forward_hook(check)
    if source_name is None:
        module.register_forward_hook(lambda _module, _args, output: output + block(output))
        return
    kept: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        kept[:] = args[:1]

    def add(_: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + block(kept.pop()).view(output.shape)

    model.get_submodule(source_name).register_forward_pre_hook(keep)
    module.register_forward_hook(add)


def save(model: Any, folder: Path) -> None:
    """Write the adapter folder of a model that `attach` made and training changed."""
    tensors = {
        _PREFIX + name: parameter.detach().float().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_of_head(model, name)
    }
    tensors |= head_tensors(model)
    block = next(module for module in model.modules() if isinstance(module, Bottleneck))
    config = {
        "peft_type": PEFT_TYPE,
        "graft_schema": SCHEMA,
        "task_type": peft_task_type(model),
        "base_model_name_or_path": model.config._name_or_path,
        "activation": block.activation,
        "scaling": block.scale,
        "inputs": model.bottleneck_inputs,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def load(model: Any, folder: Path) -> torch.nn.Module:
    """Put the bottlenecks of a folder onto `model`, for inference. Raises AdapterError."""
    opened = open_adapter_folder(folder)
    tensors = load_head(model, load_file(folder / WEIGHTS))
    inputs: Mapping[str, str] = opened.config.get("inputs", {})
    weight = model.get_input_embeddings().weight
    for key in sorted(k for k in tensors if k.endswith(f".{_NAME}.down.weight")):
        name = key.removeprefix(_PREFIX).removesuffix(f".{_NAME}.down.weight")
        width, hidden = tensors[key].shape
        config = opened.config
        block = Bottleneck(hidden, width, config["activation"], config["scaling"])
        block.to(weight.device)
        block.load_state_dict(
            {p: tensors[f"{_PREFIX}{name}.{_NAME}.{p}"] for p in block.state_dict()}
        )
        try:
            _put(model, name, inputs.get(name), block)
        except AttributeError as error:
            raise AdapterError(f"adapter folder {opened.path}: the base has no {key!r}") from error
    return model.requires_grad_(False)
