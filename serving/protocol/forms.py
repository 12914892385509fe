"""What an answer must follow, as OpenAI and vLLM ask for it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from serving.protocol.body import Body, neutral

# The kind and rule that an answer must follow.
Form = tuple[Literal["json_schema", "json_object", "regex", "choice"], Any]


def _parsed(given: Any) -> Any:
    """vLLM takes a schema as its text, too."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from error


Schema = Annotated[dict[str, Any] | bool, BeforeValidator(_parsed)]


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

    @property
    def form(self) -> Form | None:
        """The kind and rule; None for any text."""
        if self.json_schema is not None:
            return "json_schema", self.json_schema.rule
        return ("json_object", None) if self.type == "json_object" else None


class StructuredOutputs(Body):
    """vLLM's way to ask for a form; one of them."""

    rule: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    # Not served, as in Sampling.
    json_object: Annotated[Any, neutral(False)] = None
    grammar: Annotated[Any, neutral()] = None
    structural_tag: Annotated[Any, neutral()] = None
    whitespace_pattern: Annotated[Any, neutral()] = None
    disable_any_whitespace: Annotated[Any, neutral(False)] = None
    disable_additional_properties: Annotated[Any, neutral(False)] = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if [self.rule, self.regex, self.choice].count(None) != 2:
            raise ValueError("give one of json, regex and choice")
        return self

    @property
    def form(self) -> Form:
        """The kind and rule."""
        if self.rule is not None:
            return "json_schema", self.rule
        return ("choice", self.choice) if self.regex is None else ("regex", self.regex)
