"""Bodies and events as JSON, part by part: no call takes long, so a long body can be written in a
thread of its own while the event loop goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from pydantic import BaseModel
from pydantic_core import to_json

# What lies deeper is written in one call: an entry of the log probabilities is in their list, in
# them, in a choice, in the choices, in the body.
_DEPTH = 5


def write(body: BaseModel) -> bytes:
    """`body`, whose lists may be sequences that make their items when they are read."""
    return b"".join(_parts(body, _DEPTH))


def _parts(value: Any, depth: int) -> Iterator[bytes]:
    fields = dict(value) if isinstance(value, BaseModel) else value
    if depth and isinstance(fields, dict):
        begin = b"{"
        for name, part in cast("dict[str, Any]", fields).items():
            yield begin + to_json(name) + b":"
            yield from _parts(part, depth - 1)
            begin = b","
        yield b"}" if begin == b"," else b"{}"
    elif depth and isinstance(value, Sequence) and not isinstance(value, str):
        begin = b"["
        for part in cast("Sequence[Any]", value):
            yield begin
            yield from _parts(part, depth - 1)
            begin = b","
        yield b"]" if begin == b"," else b"[]"
    else:
        yield to_json(value, inf_nan_mode="null")
