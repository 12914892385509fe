"""Requests about texts or their token ids: OpenAI's completions and embeddings, and the two that
turn one into the other."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, Field, PlainValidator, field_validator, model_validator

from serving.protocol.body import Body, Nothing, fault, neutral
from serving.protocol.chat import ChatMessage, Tool
from serving.protocol.sampling import Sampling

# OpenAI's limits, of inputs to embed and of a completion.
MAX_INPUTS = 2048
MAX_BEST_OF = 20
MAX_COMPLETION_LOGPROBS = 5
# Token ids of which one call takes a millisecond.
_CHECKED_AT_ONCE = 2**16
_TEXTS_ARE = "should be a text, a list of texts, token ids, or a list of lists of token ids"


def _texts(given: Any) -> Any:
    """`given`, if it is one or several texts or lists of token ids.

    As a union, each token of millions would be tried as a text too, in one call that lets no other
    thread run.
    """
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise ValueError(_TEXTS_ARE)
    parts = cast("list[Any]", given)
    kinds = _types(parts)
    if kinds == {list}:
        kinds = {kind for part in parts for kind in _types(part)}
        if not kinds <= {int}:
            raise ValueError(_TEXTS_ARE)
    elif kinds not in (set(), {str}, {int}):
        raise ValueError(_TEXTS_ARE)
    return parts


def _types(parts: list[Any]) -> set[type]:
    slices = (
        parts[first : first + _CHECKED_AT_ONCE] for first in range(0, len(parts), _CHECKED_AT_ONCE)
    )
    return {kind for some in slices for kind in set(map(type, some))}


_Texts = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_texts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: _Texts
    best_of: int | None = Field(None, ge=1, le=MAX_BEST_OF)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_COMPLETION_LOGPROBS)
    suffix: Annotated[str | None, neutral("")] = None

    @model_validator(mode="after")
    def _best_is_among_enough(self) -> Self:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise fault("best_of", f"is {self.best_of}, below n {self.n or 1}; raise it")
        if self.stream and self.best_of is not None and self.best_of != (self.n or 1):
            raise fault("best_of", "cannot stream: the best is known only at the end")
        return self

    @property
    def names(self) -> dict[str, str]:
        """See Sampling."""
        return {**super().names, "prompt_token_ids": "prompt", "prompt_logprobs": "echo"}

    @property
    def per_prompt(self) -> int:
        """Answers to each prompt."""
        return max(self.n or 1, self.best_of or 1)

    @property
    def answers(self) -> int:
        """All answers that it asks for."""
        return len(self.prompts) * self.per_prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt of the request, as text or token ids."""
        return _each(self.prompt)


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: str = Field(min_length=1)
    input: _Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    adapter_rank: int | None = None
    # Not served, as in Sampling.
    truncate_prompt_tokens: Annotated[Any, neutral(-1)] = None

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
    def answers(self) -> int:
        """All vectors that it asks for."""
        return len(self.inputs)

    @property
    def inputs(self) -> list[str | list[int]]:
        """Each input of the request, as text or token ids."""
        return _each(self.input)


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages as the chat template renders them.

    `add_special_tokens` is the tokenizer's own: opening and closing tokens, as /v1/embeddings reads
    a text. A completion leaves a closing one out, since its prompt goes on.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    # Not served, as in Sampling.
    chat_template: Annotated[Any, neutral()] = None
    chat_template_kwargs: Nothing = None
    continue_final_message: Annotated[Any, neutral(False)] = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise fault("prompt", "give either prompt or messages")
        return self


class Tokens(BaseModel):
    """The answer to /tokenize."""

    count: int
    tokens: list[int]


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class Detokenized(BaseModel):
    """The answer to /detokenize."""

    prompt: str


def _each(given: _Texts) -> list[str | list[int]]:
    """One or several texts or lists of token ids, as several."""
    is_one = isinstance(given, str) or (given and isinstance(given[0], int))
    return cast("list[str | list[int]]", [given] if is_one else given)
