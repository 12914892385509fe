"""What every request for an answer may ask of it, and how a request's body is read.

Types are strict: "5" is no number. Keys that nobody knows are taken and have no effect, since tools
send what they like; a key that would change the answer and is not served may only hold the value
that changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# OpenAI's limits, and two of ours.
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 2
# OpenAI has 4; lm-eval's local-completions sends all that a task has, and HumanEval has eight.
MAX_STOPS = 16
# OpenAI's schema has no limit, and each is looked at in every step.
MAX_BIASES = 1024


class Body(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


def neutral(*values: object) -> BeforeValidator:
    """For a key that is not served: these values change nothing, as does leaving it out."""

    def check(value: Any) -> Any:
        if value is not None and not any(type(value) is type(v) and value == v for v in values):
            raise ValueError("is not supported yet; leave it out")
        return value

    return BeforeValidator(check)


_TokenKey = Annotated[str, Field(pattern=r"^\d{1,10}$")]
# The kind and rule that an answer must follow.
Form = tuple[Literal["json_schema", "json_object", "regex", "choice"], Any]
Nothing = Annotated[Any, neutral({}, [])]


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchema(Body):
    """The schema that an answer must follow; every schema is followed strictly."""

    name: str | None = None
    description: str | None = None
    rule: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema comes with type = json_schema, and only with it")
        return self


class StructuredOutputs(Body):
    """vLLM's way to ask for other forms; one of them."""

    regex: str | None = None
    choice: list[str] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.regex is None) == (self.choice is None):
            raise ValueError("give either regex or choice")
        return self


class Sampling(Body):
    """What both kinds of completion share."""

    model: str = Field(min_length=1)
    max_tokens: int | None = None
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    adapter_rank: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[_TokenKey, float] | None = Field(None, max_length=MAX_BIASES)
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[int] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Would change the answer, and is not served: only its neutral value is taken.
    chat_template: Annotated[str | None, neutral()] = None
    chat_template_kwargs: Nothing = None
    guided_json: Nothing = None
    guided_regex: Annotated[str | None, neutral()] = None
    guided_choice: Nothing = None
    guided_grammar: Annotated[str | None, neutral()] = None
    min_tokens: Annotated[int | None, neutral(0)] = None
    bad_words: Nothing = None

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
