"""OpenAI's request and response bodies, as far as they are served here. No torch, no Ray.

Types are strict: "5" is no number. A key that nobody knows is refused with the nearest known one;
one that OpenAI has but this service has not yet may only hold the value that changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_CHOICES = 128
DONE = "[DONE]"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


def _neutral(*values: object) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value is not None and not any(type(value) is type(v) and value == v for v in values):
            raise ValueError("is not supported yet; leave it out")
        return value

    return BeforeValidator(check)


_TokenKey = Annotated[str, Field(pattern=r"^\d{1,10}$")]
_No = Annotated[bool | None, _neutral(False)]
_Nothing = Annotated[Any, _neutral({}, [])]


class StreamOptions(_Body):
    """What a stream carries besides text."""

    include_usage: bool = False
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
    def _has_a_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema comes with type = json_schema, and only with it")
        return self


class StructuredOutputs(_Body):
    """vLLM's way to ask for other forms; one of them."""

    regex: str | None = None
    choice: list[str] | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
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
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Told to us, and of no effect on the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampling:
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
    def form(self) -> tuple[Literal["json_schema", "json_object", "regex", "choice"], Any] | None:
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

    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: Annotated[int | None, _neutral(1)] = None
    echo: _No = None
    logprobs: Annotated[int | None, _neutral()] = None
    suffix: Annotated[str | None, _neutral("")] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt of the request, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]


class TextPart(_Body):
    """One part of a message whose content is a list."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: Annotated[str | None, _neutral()] = None
    tool_calls: _Nothing = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None:
            raise ValueError("content is required: a text, or a list of text parts")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: _No = None
    top_logprobs: Annotated[int | None, _neutral(0)] = None
    tools: _Nothing = None
    tool_choice: Annotated[Any, _neutral("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[Any, _neutral(["text"])] = None


class Usage(BaseModel):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ErrorDetail(BaseModel):
    """Why a request failed; `message` says what to change."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail


class CompletionChoice(BaseModel):
    """One answer; in a stream, one piece of it."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: None = None


class Completion(BaseModel):
    """The body, or one chunk, of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AnswerMessage(BaseModel):
    """What the assistant said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: str | None = None
    logprobs: None = None


class ChatCompletion(BaseModel):
    """The body of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """One piece of what the assistant says; the role comes first."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """One piece of one answer."""

    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: None = None


class ChatChunk(BaseModel):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """One model that requests can name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "graft"
    root: str
    parent: str | None = None
    method: str | None = None


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
