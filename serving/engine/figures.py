"""What an engine counts of itself. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
STEP_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STEP_TOKENS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Distribution:
    """How often a value was at most each bound, and above the last; `total` is the values' sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Histogram:
    """Counts values by bounds, as Prometheus has them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    @property
    def now(self) -> Distribution:
        """What was counted so far."""
        return Distribution(self._bounds, tuple(self._counts), self._total)


@dataclass
class Figures:
    """The sums of one engine since it began."""

    generated_tokens: int = 0
    preemptions: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    rows: Histogram = field(default_factory=lambda: Histogram(STEP_ROWS))
    tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))

    def step(self, seconds: float, rows: int, tokens: int) -> None:
        """Count one step."""
        self.seconds.add(seconds)
        self.rows.add(rows)
        self.tokens.add(tokens)


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds and has done. Free pages include those that are kept for others;
    `cached_tokens` were found in them and not computed. A hit is a request whose adapter another
    one had used before; what begins with `host_` is of the tier in host memory; `step_seconds`,
    `step_rows` and `step_tokens` are of forward passes."""

    running: int
    waiting: int
    free_pages: int
    num_pages: int
    adapters: int
    steps: int
    generated_tokens: int
    cached_tokens: int
    preemptions: int
    outstanding_tokens: int
    adapter_hits: int
    adapter_loads: int
    adapter_evictions: int
    adapter_bytes: int
    host_adapter_bytes: int
    host_adapter_hits: int
    host_adapter_evictions: int
    step_seconds: Distribution
    step_rows: Distribution
    step_tokens: Distribution
