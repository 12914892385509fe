"""The engine and its offline API. Runs without Ray and without HTTP.

engine = Engine(EngineSpec(base_model="path/to/base"))
engine.add_adapter("support-bot", "path/to/adapter")
engine.generate([GenerationRequest(prompt="Hello", adapter="support-bot")])
"""

from serving.engine.engine import Engine
from serving.engine.figures import EngineStats
from serving.engine.request import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    ResponseFormat,
    ScoreRequest,
    TokenLogprobs,
    TokenOutput,
    best_choices,
    choices,
    joined,
)
from serving.spec import EngineSpec

__all__ = [
    "Engine",
    "EngineSpec",
    "EngineStats",
    "FinishReason",
    "GenerationRequest",
    "GenerationResult",
    "ResponseFormat",
    "ScoreRequest",
    "TokenLogprobs",
    "TokenOutput",
    "best_choices",
    "choices",
    "joined",
]
