"""A request's bytes to a checked body, or an error that names the field."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect

from cluster.errors import BodyTooLargeError, ClientGoneError, RequestError, SlowBodyError
from serving.ingress import BODY
from serving.protocol.body import CROSS_FIELD
from serving.spec import GatewaySpec

B = TypeVar("B", bound=BaseModel)
_TYPES = ("str", "int", "float", "bool")
# Bytes that are parsed and checked within a millisecond.
_PARSED_AT_ONCE = 2**16
# The parser is one call, during which no other thread runs; of so many bytes it takes 20 ms.
_PARSED_IN_ONE_CALL = 2**20
# Of its own, so that what waits here takes no thread from whatever else is done beside the loop.
_LONG_BODIES = ThreadPoolExecutor(1, thread_name_prefix="long bodies")


async def read_body(request: Request, cls: type[B], spec: GatewaySpec) -> B:
    """The body of `request` as `cls`.

    Raises:
        RequestError: it is too long, not JSON, or not a `cls`.
        SlowBodyError: it took longer than `spec` allows.
        ClientGoneError: the client left before it was whole.
    """
    try:
        async with asyncio.timeout(spec.body_timeout_s):
            raw = await _read(request, spec.max_body_bytes)
    except TimeoutError as error:
        raise SlowBodyError(
            f"the body was not there after {spec.body_timeout_s:g} s (gateway.body_timeout_s); "
            "send it faster, or less at once"
        ) from error
    if len(raw) <= _PARSED_AT_ONCE:
        return _object(raw, cls)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_LONG_BODIES, _long_object, raw, cls)


def _long_object(raw: bytes, cls: type[B]) -> B:
    """As _object, in a thread. While millions of lists are made, the garbage collector would look
    at all of them again and again: most of the time in which no other thread runs."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return _object(raw, cls)
    finally:
        if was_enabled:
            gc.enable()


def _object(raw: bytes, cls: type[B]) -> B:
    data = _parse(raw)
    if not isinstance(data, dict):
        raise RequestError(f"the body is a JSON {_kind(data)}; send an object")
    return checked(data, cls)


def checked(data: Mapping[str, Any], cls: type[B]) -> B:
    """`data` as `cls`. Raises RequestError, with the field."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise _describe(error) from error
    except RecursionError as error:
        raise RequestError("the body is nested too deep") from error


async def _read(request: Request, max_bytes: int) -> bytes:
    ahead: bytes | None = request.scope.get(BODY)
    if ahead is not None:
        return _checked_size(ahead, len(ahead), max_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            parts.append(_checked_size(part, size, max_bytes))
    except ClientDisconnect as error:
        raise ClientGoneError("the client left before its request was whole") from error
    return b"".join(parts)


def _checked_size(part: bytes, size: int, max_bytes: int) -> bytes:
    if size > max_bytes:
        raise BodyTooLargeError(f"the body is over {max_bytes:,} bytes; send less at once")
    return part


def _parse(raw: bytes) -> Any:
    if not raw:
        raise RequestError("the body is empty; send a JSON object")

    def refuse(literal: str) -> None:
        raise RequestError(f"the body has {literal}, which is not JSON")

    # Where Python code reads the numbers, others run in between.
    is_short = len(raw) <= _PARSED_IN_ONE_CALL
    numbers: dict[str, Any] = {} if is_short else {"parse_int": _whole, "parse_float": _real}
    try:
        text = raw.decode("utf-8")
        data = json.loads(text, parse_constant=refuse, **numbers)
        if "\\ud" in text.lower():  # an escape can be half of a character, which no tokenizer takes
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except RecursionError as error:
        raise RequestError("the body is nested too deep") from error
    except UnicodeEncodeError as error:
        half = f"{error.object[error.start]!a}"
        raise RequestError(f"the body has {half}, half of a surrogate pair; send both") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 (byte {error.start})") from error
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error


def _whole(text: str) -> int:
    return int(text)


def _real(text: str) -> float:
    return float(text)


def _describe(error: ValidationError) -> RequestError:
    """The first fault that is most to the point, with its field."""
    faults = error.errors(include_url=False, include_input=False)
    paths = [_path(fault) for fault in faults]
    # Of a union, each member that did not fit has a fault; the one that got furthest was meant.
    near = [place for place, path in enumerate(paths) if path[: len(paths[0])] == paths[0]]
    deepest = max(len(paths[place]) for place in near)
    meant = [place for place in near if len(paths[place]) == deepest]
    fault, path = faults[meant[0]], paths[meant[0]]
    if fault["type"] == CROSS_FIELD:
        path = [fault.get("ctx", {})["param"]]
    name = ".".join(path) or "body"
    if fault["type"] == "missing":
        message = f"{name}: required, and not given"
    else:
        said = meant if deepest == len(paths[0]) else meant[:1]
        text = "; or ".join(dict.fromkeys(_text(faults[place]) for place in said))
        message = f"{name}: {text}"
    return RequestError(message, param=path[0] if path else None)


def _path(fault: ErrorDetails) -> list[str]:
    """Where it is, without the members of unions, which pydantic names by their types."""
    parts = [str(part) for part in fault["loc"]]
    return [
        part
        for part in parts
        if part.isdigit() or (part.isidentifier() and part.islower() and part not in _TYPES)
    ]


def _text(fault: ErrorDetails) -> str:
    if fault["type"] == "model_type":
        return "should be an object"
    text = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _kind(value: Any) -> str:
    kinds = {str: "string", list: "list", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
