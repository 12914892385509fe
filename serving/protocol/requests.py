"""OpenAI's request bodies, as far as they are served here.

Types are strict: "5" is no number. Keys that nobody knows are taken and have no effect, since tools
send what they like; a key that would change the answer and is not served may only hold the value
that changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_TOOLS = 128
MAX_INPUTS = 2048


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


def _neutral(*values: object) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value is not None and not any(type(value) is type(v) and value == v for v in values):
            raise ValueError("is not supported yet; leave it out")
        return value

    return BeforeValidator(check)


_TokenKey = Annotated[str, Field(pattern=r"^\d{1,10}$")]
# The kind and rule that an answer must follow.
Form = tuple[Literal["json_schema", "json_object", "regex", "choice"], Any]
# One or several texts, or their token ids.
_Texts = str | list[str] | list[int] | list[list[int]]
_Nothing = Annotated[Any, _neutral({}, [])]


class StreamOptions(_Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchema(_Body):
    """The schema that an answer must follow; every schema is followed strictly."""

    name: str | None = None
    description: str | None = None
    rule: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema comes with type = json_schema, and only with it")
        return self


class StructuredOutputs(_Body):
    """vLLM's way to ask for other forms; one of them."""

    regex: str | None = None
    choice: list[str] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.regex is None) == (self.choice is None):
            raise ValueError("give either regex or choice")
        return self


class Sampling(_Body):
    """What both kinds of completion share."""

    model: str = Field(min_length=1)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    adapter_rank: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[_TokenKey, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Would change the answer, and is not served: only its neutral value is taken.
    chat_template: Annotated[str | None, _neutral()] = None
    chat_template_kwargs: _Nothing = None
    guided_json: _Nothing = None
    guided_regex: Annotated[str | None, _neutral()] = None
    guided_choice: _Nothing = None
    guided_grammar: Annotated[str | None, _neutral()] = None
    min_tokens: Annotated[int | None, _neutral(0)] = None
    bad_words: _Nothing = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("give either response_format or structured_outputs")
        return self

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def form(self) -> Form | None:
        """The kind and rule that the answer must follow."""
        if self.structured_outputs is not None:
            asked = self.structured_outputs
            return ("choice", asked.choice) if asked.regex is None else ("regex", asked.regex)
        if self.response_format is None or self.response_format.type == "text":
            return None
        schema = self.response_format.json_schema
        return ("json_schema", schema.rule) if schema else ("json_object", None)

    @property
    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id, whose keys are text in JSON."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: _Texts
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: Annotated[str | None, _neutral("")] = None

    @model_validator(mode="after")
    def _best_is_among_enough(self) -> Self:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of is {self.best_of}, below n {self.n or 1}; raise it")
        if self.stream and self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of cannot stream: the best is known only at the end")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt of the request, as text or token ids."""
        return _each(self.prompt)


class EmbeddingRequest(_Body):
    """POST /v1/embeddings."""

    model: str = Field(min_length=1)
    input: _Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    adapter_rank: int | None = None

    @field_validator("input")
    @classmethod
    def _some_of_each(cls, given: _Texts) -> _Texts:
        parts = _each(given)
        if not 0 < len(parts) <= MAX_INPUTS:
            raise ValueError(f"has {len(parts):,} parts; give 1 to {MAX_INPUTS:,}")
        if not all(parts):
            raise ValueError("has an empty part; give each at least one token")
        return given

    @property
    def inputs(self) -> list[str | list[int]]:
        """Each input of the request, as text or token ids."""
        return _each(self.input)


class TextPart(_Body):
    """One part of a message whose content is a list."""

    type: Literal["text"]
    text: str


class CalledFunction(_Body):
    """The function of a tool call; its arguments are JSON in a text."""

    name: str
    arguments: str


class ToolCall(_Body):
    """What the assistant asked a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Body):
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


class ToolFunction(_Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    """One tool of a request."""

    type: Literal["function"]
    function: ToolFunction


class FunctionName(_Body):
    """Which function."""

    name: str


class NamedTool(_Body):
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
    continue_final_message: Annotated[bool | None, _neutral(False)] = None
    functions: _Nothing = None
    function_call: Annotated[Any, _neutral("none", "auto")] = None
    modalities: Annotated[Any, _neutral(["text"])] = None

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


def _each(given: _Texts) -> list[str | list[int]]:
    """One or several texts or lists of token ids, as several."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [[token for token in given if isinstance(token, int)]]
    return [part for part in given if not isinstance(part, int)]


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


class TokenizeRequest(_Body):
    """POST /tokenize: a prompt, or messages as the chat template renders them.

    `add_special_tokens` is the tokenizer's own: opening and closing tokens, as /v1/embeddings reads
    a text. A completion leaves a closing one out, since its prompt goes on.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class Tokens(BaseModel):
    """The answer to /tokenize."""

    count: int
    tokens: list[int]


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class Detokenized(BaseModel):
    """The answer to /detokenize."""

    prompt: str
