"""Adapters as the engine runs them: primitives, and how each method lowers to them."""

from serving.adapters.apply import DeltaHooks, Segment
from serving.adapters.lowering import lower
from serving.adapters.primitives import EmbeddingPrefix, KVPrefix, LinearDelta, LoweredAdapter
from serving.adapters.target import Target, describe

__all__ = [
    "DeltaHooks",
    "EmbeddingPrefix",
    "KVPrefix",
    "LinearDelta",
    "LoweredAdapter",
    "Segment",
    "Target",
    "describe",
    "lower",
]
