"""OpenAI's conversations: messages, tools, and what is asked of the next message."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from serving.protocol.body import Body, Nothing, fault, neutral
from serving.protocol.forms import Form
from serving.protocol.sampling import MAX_LOGPROBS, Sampling

MAX_TOOLS = 128


class TextPart(Body):
    """One part of a message whose content is a list; what was refused is read as its text."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, given: Any) -> Any:
        part = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
        kind = part.get("type", "text")
        if kind == "refusal":
            return {"type": "text", "text": part.get("refusal")}
        if kind != "text":
            raise ValueError(f"is of type {kind!r:.40}; only text parts are served")
        return given


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
    """One message of a conversation. `content` may be left out by an assistant that calls,
    or refused."""

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
        has_refused = self.role == "assistant" and self.refusal is not None
        if self.content is None and not self.tool_calls and not has_refused:
            raise ValueError("content is required: a text, or a list of text parts")
        return self

    @property
    def text(self) -> str:
        """The content, or else the refusal, as one text."""
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            return self.refusal or ""
        return "".join(part.text for part in self.content)


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


class AllowedNames(Body):
    """Those of the tools that may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedTools(Body):
    """Only some of the tools, while the list of all of them stays the same."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedNames


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = Field(
        True, description="Of a chat: begin the assistant's message by the template's own words."
    )
    continue_final_message: Annotated[Any, neutral(False)] = None
    echo: Annotated[Any, neutral(False)] = None
    functions: Nothing = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    modalities: Annotated[Any, neutral(["text"])] = None

    @property
    def answers(self) -> int:
        """All answers that it asks for."""
        return self.n or 1

    @property
    def names(self) -> dict[str, str]:
        """See Sampling."""
        names = {**super().names, "prompt": "messages", "prompt_token_ids": "messages"}
        if self.must_call:
            names["response_format"] = "tools"
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names

    @property
    def tools_in_use(self) -> list[Tool]:
        """The tools that the model may call."""
        tools, names = self.tools or [], self._named
        if names is not None:
            return [tool for tool in tools if tool.function.name in names]
        return [] if self.tool_choice == "none" else tools

    @property
    def _named(self) -> set[str] | None:
        """The tools that tool_choice names, if it names any."""
        choice = self.tool_choice
        if isinstance(choice, AllowedTools):
            return {tool.function.name for tool in choice.allowed_tools.tools}
        return {choice.function.name} if isinstance(choice, NamedTool) else None

    @property
    def names_a_function(self) -> bool:
        """Whether the answer is a call of one function that is given."""
        return isinstance(self.tool_choice, NamedTool)

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call of one of them."""
        choice = self.tool_choice
        if isinstance(choice, AllowedTools):
            return choice.allowed_tools.mode == "required"
        return self.names_a_function or choice == "required"

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
        known = {tool.function.name for tool in self.tools or ()}
        if missing := (self._named or set[str]()) - known:
            raise fault("tool_choice", f"{min(missing)!r:.80} is no tool of tools; give it there")
        if self.must_call and not known:
            raise fault("tool_choice", "needs tools; give some")
        if self.must_call and (form := next(iter(self._forms()), None)):
            raise fault("tool_choice", f"is that a tool must be called, beside {form}; give one")
        return self

    @model_validator(mode="after")
    def _top_of_what(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise fault("top_logprobs", "needs logprobs = true")
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
