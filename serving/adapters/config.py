"""Reading an adapter's config fail-closed: each field is used, known to be neutral, or refused.

A field that changes what the adapter computes and is passed over would make answers silently
wrong; a field that only trained it is harmless. So each method lists both, and any other field
must be empty.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cluster.adapter_folder import CONFIG, AdapterFolder, fault

# Who made the adapter and on what; nothing of it is computed.
LINEAGE = {
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision",
    "auto_mapping", "inference_mode", "graft_schema",
}  # fmt: skip


def refuse_unread(folder: AdapterFolder, read: Collection[str], neutral: Collection[str]) -> None:
    """Raise AdapterError for the first field with a value that nobody reads."""
    for key, value in folder.config.items():
        if key in LINEAGE or key in read or key in neutral or value in (None, False, "", [], {}):
            continue
        raise fault(
            folder.path,
            CONFIG,
            f"has {key} = {str(value)[:80]!r}, which is not served yet; "
            "merge the adapter, or train it without",
        )


def mapping(folder: AdapterFolder, key: str) -> Mapping[str, Any]:
    """The object under `key`, or an empty one. Raises AdapterError."""
    value: Any = folder.config.get(key) or {}
    if not isinstance(value, dict):
        raise fault(folder.path, CONFIG, f"has {key} = {str(value)[:80]!r}, not an object")
    return value
