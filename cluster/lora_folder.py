"""What is wrong with a LoRA folder on whatever base: its sizes, and matrices without other halves.

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
    """Raise AdapterError for a rank or an alpha that is none, and for half of a pair."""
    if folder.method not in _METHODS:
        return
    if "lora_alpha" in folder.config:
        number(folder, folder.config["lora_alpha"], "lora_alpha")
    if folder.method == "LORA" and "r" in folder.config:
        number(folder, folder.config["r"], "r", whole=True)
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
