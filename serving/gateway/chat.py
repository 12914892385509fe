"""Messages and tools to a prompt, by the base's own chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cluster.errors import RequestError
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
    template = str(tokenizer.chat_template or "")
    if not template:
        raise RequestError("this model has no chat template; use /v1/completions", param="messages")
    if tools and "tools" not in template:
        raise RequestError(
            "this model's chat template knows no tools; leave them out, or describe them in a "
            "message",
            param="tools",
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            [_plain(message, template) for message in messages],
            tools=[tool.model_dump(exclude_none=True) for tool in tools] or None,
            tokenize=True,
            add_generation_prompt=add_generation_prompt,
            return_dict=True,
        )
    except Exception as error:  # templates raise whatever they like about roles and order
        raise RequestError(
            f"messages: the chat template refuses them: {error}", param="messages"
        ) from error
    return list(encoded["input_ids"])


def _plain(message: ChatMessage, template: str) -> dict[str, Any]:
    """A message as templates expect it: arguments of calls as objects, no key without a value. A
    developer's is a system's where the template, which may pass over what it does not know, never
    speaks of developers."""
    is_known = message.role != "developer" or "developer" in template
    plain: dict[str, Any] = {"role": message.role if is_known else "system"}
    plain["content"] = message.text
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
