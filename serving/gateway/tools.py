"""Tool calls in Hermes' form, found in an answer while it is being written.

    <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>

Text outside of the tags is given on as it comes, without the white space that touches a call;
what may become a tag, or such white space, is held back. A call whose JSON is broken, or cut off by
the answer's end, is given on as the text that it is.
"""

from __future__ import annotations

import json
import secrets
from typing import Any, cast

from serving.protocol import CalledFunction, ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class ToolParser:
    """Of one answer.

    Args:
        must_call: The answer is one call, bare, as its grammar made it.
        only_one: Whatever comes behind the first call is dropped.
    """

    def __init__(self, *, must_call: bool, only_one: bool = False) -> None:
        self._only_one = only_one
        self._held = ""
        self._spaces = ""  # white space behind what was said, which a call would swallow
        self._is_behind_call = False
        self._is_call = self._must_call = must_call
        self.calls = 0

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text and the calls that are certain now that `text` has come."""
        if self._only_one and self.calls:
            return "", []
        self._held += text
        if self._must_call:
            return "", []
        said, calls = "", list[ToolCall]()
        while True:
            tag = _CLOSE if self._is_call else _OPEN
            before, found, after = self._held.partition(tag)
            if not found:
                break
            if not self._is_call:
                said += self._said(before)
            elif (call := _parsed(before)) is not None:
                calls.append(call)
                self._spaces, self._is_behind_call = "", True
                if self._only_one:
                    self._held, self._is_call, self.calls = "", False, 1
                    return said, calls
            else:
                said += self._said(_OPEN + before + _CLOSE)
            self._held, self._is_call = after, not self._is_call
        if not self._is_call:
            keep = _beginning_of(_OPEN, self._held)
            cut = len(self._held) - keep
            said, self._held = said + self._said(self._held[:cut]), self._held[cut:]
        self.calls += len(calls)
        return said, calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The text, or the call, that was held back, at the answer's end."""
        if self._must_call:
            call = _parsed(self._held)
            self.calls += call is not None
            return ("", [call]) if call else (self._held, [])
        rest = (_OPEN if self._is_call else "") + self._held
        self._held, self._is_call = "", False
        return self._said(rest) + self._spaces, []

    def _said(self, text: str) -> str:
        """`text` behind the white space before it; its own stays back until it is known to touch
        no call. Models write line breaks around calls that nobody wants to read."""
        if self._is_behind_call:
            text = text.lstrip()
        text = self._spaces + text
        said = text.rstrip()
        self._spaces = text[len(said) :]
        self._is_behind_call = self._is_behind_call and not said
        return said


def _parsed(text: str) -> ToolCall | None:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    body = cast("dict[str, Any]", found)
    name, arguments = body.get("name"), body.get("arguments", {})
    if not isinstance(name, str):
        return None
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return ToolCall(
        id=f"call_{secrets.token_hex(12)}", function=CalledFunction(name=name, arguments=written)
    )


def _beginning_of(tag: str, text: str) -> int:
    """Length of the longest tail of `text` with which `tag` begins."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
