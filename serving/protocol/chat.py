"""OpenAI's conversations: messages, tools, and what is asked of the next message."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from serving.protocol.sampling import (
    MAX_LOGPROBS,
    Body,
    Form,
    Nothing,
    Sampling,
    neutral,
)

MAX_TOOLS = 128


class TextPart(Body):
    """One part of a message whose content is a list."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """The function of a tool call; its arguments are JSON in a text."""

    name: str
    arguments: str


class ToolCall(Body):
    """What the assistant asked a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One message of a conversation. `content` may be left out by an assistant that calls."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} cannot call tools")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is required: a text, or a list of text parts")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())


class ToolFunction(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """One tool of a request."""

    type: Literal["function"]
    function: ToolFunction


class FunctionName(Body):
    """Which function."""

    name: str


class NamedTool(Body):
    """The one tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: Annotated[bool | None, neutral(False)] = None
    functions: Nothing = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    modalities: Annotated[Any, neutral(["text"])] = None

    @property
    def answers(self) -> int:
        """All answers that it asks for."""
        return self.n or 1

    @property
    def tools_in_use(self) -> list[Tool]:
        """The tools that the model may call."""
        tools, choice = self.tools or [], self.tool_choice
        if isinstance(choice, NamedTool):
            return [tool for tool in tools if tool.function.name == choice.function.name]
        return [] if choice == "none" else tools

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call of one of them."""
        return isinstance(self.tool_choice, NamedTool) or self.tool_choice == "required"

    @property
    def form(self) -> Form | None:
        """See Sampling; a call that must be made has the form of its tools."""
        if not self.must_call:
            return super().form
        tools = self.tools_in_use
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "arguments": {"$ref": f"#/$defs/{place}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for place, tool in enumerate(tools)
        ]
        # References count from the root, and two tools may mean different things by one name.
        rules = {
            str(place): _moved(tool.function.parameters or {"type": "object"}, f"/$defs/{place}")
            for place, tool in enumerate(tools)
        }
        rule = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return "json_schema", {**rule, "$defs": rules}

    @model_validator(mode="after")
    def _something_to_call(self) -> Self:
        if self.must_call and not self.tools_in_use:
            raise ValueError("tool_choice names no tool of tools; give it there")
        if self.must_call and super().form:
            raise ValueError("give either a tool_choice that must be called or response_format")
        return self

    @model_validator(mode="after")
    def _top_of_what(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        return self


def _moved(schema: Any, to: str) -> Any:
    """`schema` with its references as they are once it stands at the path `to` of another."""
    if isinstance(schema, list):
        return [_moved(part, to) for part in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    return {
        key: f"#{to}{part[1:]}"
        if key == "$ref" and isinstance(part, str) and part.startswith("#")
        else _moved(part, to)
        for key, part in cast("dict[str, Any]", schema).items()
    }
