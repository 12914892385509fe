"""What is wrong with a LoRA folder on whatever base: its sizes, tensors that hold nothing, and
matrices without other halves.

Whether the rest fits is judged where a base is known, by the lowering in serving.adapters. Called
by the registry before publishing.
"""

from __future__ import annotations

import re
from collections import defaultdict

from cluster.adapter_folder import WEIGHTS, AdapterFolder, fault, number

_METHODS = ("LORA", "ADALORA")
_HALF = re.compile(r"(.+)\.(lora_(?:embedding_)?)([AB])(?:\.default)?(?:\.weight)?")
_WHOLE = ["A", "B"]


def check_lora(folder: AdapterFolder) -> None:
    """Raise AdapterError for a rank or an alpha that is none, for a tensor without elements, and
    for half of a pair."""
    if folder.method not in _METHODS:
        return
    if "lora_alpha" in folder.config:
        number(folder, folder.config["lora_alpha"], "lora_alpha")
    if folder.method == "LORA" and "r" in folder.config:
        number(folder, folder.config["r"], "r", whole=True)
    _check_whole(folder)
    halves = defaultdict[tuple[str, str], set[str]](set)
    for key in folder.tensors:
        if match := _HALF.fullmatch(key):
            halves[match[1], match[2]].add(match[3])
    for (module, kind), found in halves.items():
        if sorted(found) != _WHOLE:
            raise fault(
                folder.path,
                WEIGHTS,
                f"has {kind}{min(found)} of {module!r} alone, where {kind}A, {kind}B are needed",
            )


def _check_whole(folder: AdapterFolder) -> None:
    """AdaLoRA may leave a module without any rank; else no shape of a base has a 0."""
    for key, entry in folder.tensors.items():
        if 0 in entry.shape and not (folder.method == "ADALORA" and ".lora_" in key):
            raise fault(
                folder.path,
                WEIGHTS,
                f"has tensor {key!r} of shape {entry.shape}, which holds nothing; save the adapter "
                "with all of its weights gathered",
            )
