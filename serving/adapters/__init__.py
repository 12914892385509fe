"""Adapters as the engine runs them: primitives, and how each method lowers to them."""

from serving.adapters.apply import DeltaHooks, low_rank_kernel
from serving.adapters.lowering import lower
from serving.adapters.memory import moved, num_bytes, pinned
from serving.adapters.merged import KINDS as MERGED
from serving.adapters.mixing import Part, mixed
from serving.adapters.pace import Pace, give_way
from serving.adapters.primitives import (
    Block,
    Delta,
    EmbeddingPrefix,
    GatedPrompt,
    KVPrefix,
    LinearDelta,
    LogitOffset,
    LoweredAdapter,
    Replacement,
)
from serving.adapters.rows import Segment
from serving.adapters.target import Target, describe

__all__ = [
    "MERGED",
    "Block",
    "Delta",
    "DeltaHooks",
    "EmbeddingPrefix",
    "GatedPrompt",
    "KVPrefix",
    "LinearDelta",
    "LogitOffset",
    "LoweredAdapter",
    "Pace",
    "Part",
    "Replacement",
    "Segment",
    "Target",
    "describe",
    "give_way",
    "low_rank_kernel",
    "lower",
    "mixed",
    "moved",
    "num_bytes",
    "pinned",
]
