"""What Prometheus reads of a gateway: its requests, errors, waiting, tokens, times, failovers, and
what the engine replicas told of themselves.

Several gateways behind one address are read in turn, so each one's own figures have the label
`gateway`; the replicas' are the same at each. Adapters are a label, for as many of them as
`MAX_ADAPTER_LABELS`; the rest share one, so that nobody grows the memory by asking for many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast
from uuid import uuid4

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric

from cluster.errors import outcome_of
from serving.gateway.engine_metrics import Figures, engine_families

MAX_ADAPTER_LABELS = 100
OTHERS = "others"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class _Families:
    """As much of a registry as is asked for its text."""

    def __init__(self, families: Iterator[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Every family, once."""
        return self._families


class Metrics:
    """The counters of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry, labels = self._registry, ("adapter",)
        self._id = uuid4().hex[:8]
        self._labels: set[str] = set()
        self._responses = Counter(
            "graft_http_responses", "HTTP responses.", ("status",), registry=registry
        )
        self._errors = Counter(
            "graft_errors", "Failures by OpenAI's code; those without one, by its type.",
            ("code",), registry=registry,
        )  # fmt: skip
        self._in_progress = Gauge(
            "graft_requests_in_progress", "Answers being made or waited for.", registry=registry
        )
        self._requests = Counter("graft_requests", "Answers begun.", labels, registry=registry)
        self._prompt = Counter("graft_prompt_tokens", "Tokens read.", labels, registry=registry)
        self._tokens = Counter(
            "graft_generated_tokens", "Tokens generated.", labels, registry=registry
        )
        self._first = Histogram(
            "graft_time_to_first_token_seconds", "From the request to its first token, streams.",
            labels, buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._queue = Histogram(
            "graft_queue_seconds", "From the request to an engine's first step for it.",
            labels, buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._between = Histogram(
            "graft_inter_token_seconds", "Between pieces of a stream, per token.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._whole = Histogram(
            "graft_request_seconds", "From the request to its answer's end.",
            labels, buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._failovers = Counter(
            "graft_failovers", "Answers that went on at another replica.", registry=registry
        )

    def text(self, replicas: Mapping[str, Figures]) -> bytes:
        """Everything in Prometheus's text format, with the figures of each replica by its id."""
        return generate_latest(cast("CollectorRegistry", _Families(self._all(replicas))))

    def _all(self, replicas: Mapping[str, Figures]) -> Iterator[Metric]:
        for metric in self._registry.collect():
            own = [s._replace(labels={**s.labels, "gateway": self._id}) for s in metric.samples]
            metric.samples = own
            yield metric
        yield from engine_families(replicas)

    def answered(self, status: int) -> None:
        """Count an HTTP response."""
        self._responses.labels(str(status)).inc()

    def failed(self, error: BaseException) -> None:
        """Count a failure. Those without a code of their own are told apart by OpenAI's type, so
        that a refusal is never counted as a fault of the server's."""
        outcome = outcome_of(error)
        self._errors.labels(outcome.code or outcome.type).inc()

    def begun(self, model: str, answers: int, prompt_tokens: int) -> None:
        """Count the answers of one request."""
        self._in_progress.inc(answers)
        self._requests.labels(self._label(model)).inc(answers)
        self._prompt.labels(self._label(model)).inc(prompt_tokens)

    def ended(self, model: str, answers: int, tokens: int, seconds: float) -> None:
        """Count their end."""
        self._in_progress.dec(answers)
        self._tokens.labels(self._label(model)).inc(tokens)
        self._whole.labels(self._label(model)).observe(seconds)

    def queued(self, model: str, seconds: float) -> None:
        """Count an answer's waiting."""
        self._queue.labels(self._label(model)).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """Count a stream's first token."""
        self._first.labels(self._label(model)).observe(seconds)

    def next_tokens(self, tokens: float, seconds: float) -> None:
        """Count a stream's further tokens, so many for each of its answers."""
        if tokens:
            self._between.observe(seconds / tokens)

    def failover(self) -> None:
        """Count a lost replica under one answer."""
        self._failovers.inc()

    def _label(self, model: str) -> str:
        if model in self._labels:
            return model
        if len(self._labels) >= MAX_ADAPTER_LABELS:
            return OTHERS
        self._labels.add(model)
        return model
