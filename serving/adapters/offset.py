"""Proxy-tuning folders as logit offsets.

Proxy-tuning (Liu et al. 2024, arXiv:2401.08565, equation 1): the large base's logits plus
alpha (expert's - anti-expert's), both of one small base, the expert with an adapter of any method.
The folder is that adapter's, its config nested under `expert`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from cluster.adapter_folder import CONFIG, AdapterFolder, fault, number
from serving.adapters.config import mapping, refuse_unread
from serving.adapters.primitives import LogitOffset, LoweredAdapter
from serving.adapters.target import Target

PROXY = "PROXY_TUNING"


def lower_proxy(
    folder: AdapterFolder,
    small_bases: Mapping[str, Target],
    lower_expert: Callable[[AdapterFolder, Target], LoweredAdapter],
) -> LoweredAdapter:
    """A proxy-tuning folder as an offset. Raises AdapterError.

    Args:
        small_bases: The small bases that the engine runs, by resolved path.
        lower_expert: Lowers what is not proxy-tuning.
    """
    refuse_unread(folder, {"alpha", "small_base", "expert"}, ())
    named = folder.config.get("small_base")
    path = str(Path(named).resolve()) if isinstance(named, str) else ""
    if path not in small_bases:
        raise fault(
            folder.path,
            CONFIG,
            f"names the small base {str(named)[:120]!r}, which engine.small_bases does not list; "
            "add it there",
        )
    expert = mapping(folder, "expert")
    if not isinstance(expert.get("peft_type"), str) or str(expert["peft_type"]).upper() == PROXY:
        raise fault(folder.path, CONFIG, "has an expert without a peft_type of its own")
    lowered = lower_expert(replace(folder, config=expert), small_bases[path])
    alpha = number(folder, folder.config.get("alpha"), "alpha")
    return LoweredAdapter(offset=LogitOffset(path, float(alpha), lowered))
