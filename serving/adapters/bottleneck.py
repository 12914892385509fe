"""Bottleneck-adapter folders as blocks (arXiv:1902.00751, arXiv:2005.00247, arXiv:2110.04366).

H hidden    R width
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch

from cluster.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, fault, number
from serving.adapters.config import mapping, refuse_unread
from serving.adapters.primitives import ACTIVATIONS, Block, Delta, LoweredAdapter
from serving.adapters.target import Target, bare_name

_KEY = re.compile(r"(.+)\.bottleneck\.(down|up)\.(weight|bias)")


def lower_bottleneck(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A folder of bottlenecks as blocks, by the module whose output they change. Raises
    AdapterError."""
    refuse_unread(folder, {"activation", "scaling", "inputs"}, ())
    activation, inputs = folder.config.get("activation"), mapping(folder, "inputs")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise fault(
            folder.path, CONFIG, f"has activation {str(activation)[:80]!r}; served are {known}"
        )
    scale = number(folder, folder.config.get("scaling", 1.0), "scaling")
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(bare_name(folder, key))
        if match is None:
            raise fault(folder.path, WEIGHTS, f"has tensor {key!r}, which is not of a bottleneck")
        own = tensor.to(target.device, target.dtype, copy=True)
        found[match[1]][f"{match[2]}.{match[3]}"] = own
    blocks: dict[str, Delta] = {}
    for name, parts in found.items():
        shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        width, hidden = next(iter(shapes.get("down.bias", ())), 0), target.hidden_size
        expected = {"down.weight": (width, hidden), "down.bias": (width,),
                    "up.weight": (hidden, width), "up.bias": (hidden,)}  # fmt: skip
        if shapes != expected:
            raise fault(
                folder.path,
                WEIGHTS,
                f"has a bottleneck of {name!r} with shapes {shapes}, where the base {target.name} "
                f"needs {expected}; the adapter was made for another base ({folder.base_model})",
            )
        blocks[name] = Block(
            parts["down.weight"].T.contiguous(),
            parts["down.bias"],
            parts["up.weight"].T.contiguous() * scale,
            parts["up.bias"] * scale,
            activation,
            None if name not in inputs else str(inputs[name]),
        )
    return LoweredAdapter(blocks)
