"""One line of JSONL, read with distrust and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def json_object(line: bytes) -> dict[str, Any]:
    """The object of a line. Raises ValueError that says why it has none."""
    try:
        row = json.loads(line.decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"its text is not UTF-8 ({error}); write it anew") from error
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    return row


def json_line(row: Mapping[str, Any]) -> bytes:
    """`row` as a line; what JSON has no form for, as text."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        return json.dumps(row, default=str).encode() + b"\n"
