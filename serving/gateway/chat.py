"""The messages and tools of a request, as the base's own chat template has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cluster import chat
from cluster.errors import ChatTemplateError, RequestError
from serving.protocol import ChatMessage, Tool


def render(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The token ids of a conversation in which the assistant speaks next.

    Raises:
        RequestError: the base has no chat template, or its template refuses these messages or
            knows no tools.
    """
    try:
        encoded = chat.render(
            tokenizer,
            [_plain(message) for message in messages],
            [tool.model_dump(exclude_none=True) for tool in tools],
            tokenize=True,
            add_generation_prompt=add_generation_prompt,
            return_dict=True,
        )
    except ChatTemplateError as error:
        raise RequestError(error.message, param=error.field) from error
    return list(encoded["input_ids"])


def _plain(message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it: arguments of calls as objects, no key without a value."""
    plain: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _object(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    return plain | {key: value for key, value in optional.items() if value}


def _object(arguments: str) -> Any:
    """Templates write arguments as JSON themselves; what is none stays the text that it is."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
