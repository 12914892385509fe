"""The service's own description, for tools that read one: OpenAPI 3.1, made from the protocol."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    EmbeddingList,
    EmbeddingRequest,
    ErrorBody,
    ModelCard,
    ModelList,
    TokenizeRequest,
    Tokens,
)

# Path and what it does -> the body asked for, if any, and the answer's; None is no JSON of ours.
_ROUTES: dict[tuple[str, str], tuple[type[BaseModel] | None, type[BaseModel] | None]] = {
    ("/v1/completions", "Continue prompts"): (CompletionRequest, Completion),
    ("/v1/chat/completions", "Answer a conversation"): (ChatRequest, ChatCompletion),
    ("/v1/embeddings", "Pool hidden states"): (EmbeddingRequest, EmbeddingList),
    ("/v1/models", "The base and every adapter"): (None, ModelList),
    ("/v1/models/{model}", "One of them"): (None, ModelCard),
    ("/tokenize", "A prompt's token ids"): (TokenizeRequest, Tokens),
    ("/detokenize", "The text of token ids"): (DetokenizeRequest, Detokenized),
    ("/health", "Whether the gateway runs"): (None, None),
    ("/ready", "Whether an engine answers"): (None, None),
    ("/metrics", "Prometheus metrics"): (None, None),
}
_REF = "#/components/schemas/{model}"


@cache
def document() -> dict[str, Any]:
    """The whole description."""
    asked = [(body, "validation") for body, _ in _ROUTES.values() if body is not None]
    told = [(body, "serialization") for _, body in _ROUTES.values() if body is not None]
    models: Any = [*asked, *told, (ErrorBody, "serialization")]
    refs, definitions = models_json_schema(models, ref_template=_REF)
    failure = _json("A failure, in OpenAI's form", refs[ErrorBody, "serialization"])
    paths: dict[str, Any] = {}
    for (path, summary), (body, answer) in _ROUTES.items():
        good = (
            {"description": "As it says"}
            if answer is None
            else _json("The answer", refs[answer, "serialization"])
        )
        operation: dict[str, Any] = {
            "summary": summary,
            "responses": {"200": good, "default": failure},
        }
        if body is not None:
            content = {"application/json": {"schema": refs[body, "validation"]}}
            operation["requestBody"] = {"required": True, "content": content}
        if "{model}" in path:
            schema = {"type": "string", "minLength": 1}
            operation["parameters"] = [
                {"name": "model", "in": "path", "required": True, "schema": schema}
            ]
        paths[path] = {"post" if body else "get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Graft", "version": "1", "description": "OpenAI's API over adapters."},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _json(description: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
