"""Conversations by a base's own chat template: what is learned is rendered as what is asked.

A template passes over what it does not know, without a word: what it never speaks of is refused, or
told in a way that it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.errors import ChatTemplateError

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]] | None


def template_of(tokenizer: Any, messages: Messages, tools: Tools) -> str:
    """The template that renders this conversation.

    Raises:
        ChatTemplateError: there is none, or it knows no tools or no calls.
    """
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            "the base's tokenizer has no chat template; give prompts, not messages"
        )
    try:
        template: str = tokenizer.get_chat_template(tools=tools or None)
    except ValueError as error:  # of several, none for this
        raise ChatTemplateError(f"the base's chat template: {error}") from error
    if tools and "tools" not in template:
        raise ChatTemplateError(
            "the base's chat template knows no tools; leave them out, or describe them in a "
            "message",
            "tools",
        )
    if any(m.get("tool_calls") for m in messages) and "tool_calls" not in template:
        raise ChatTemplateError(
            "the base's chat template knows no tool_calls; write them as the content of their "
            "messages"
        )
    return template


def render(tokenizer: Any, messages: Messages, tools: Tools, **options: Any) -> Any:
    """What `apply_chat_template` makes of a conversation, with these options of it. A developer's
    message is a system's where the template never speaks of developers.

    Raises:
        ChatTemplateError: there is no template, or it refuses the messages.
    """
    template = template_of(tokenizer, messages, tools)
    if "developer" not in template:
        messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
    try:
        return tokenizer.apply_chat_template(messages, tools=tools or None, **options)
    except Exception as error:  # templates raise whatever they like about roles and order
        raise ChatTemplateError(
            f"the base's chat template refuses these messages: {error}"
        ) from error
