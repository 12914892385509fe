"""The figures of engine replicas, as they last told them, in Prometheus' families.

Each has the label `replica`; only replicas that there are now are shown, so there are at most
`replicas.max` of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

# What one replica tells: serving.engine.EngineStats as a mapping.
Figures = Mapping[str, Any]
_GAUGES = {
    "running": "Requests in the batch.",
    "waiting": "Requests that wait for a row or pages.",
    "adapters": "Adapters held.",
    "adapter_bytes": "Bytes of the adapters held.",
    "host_adapter_bytes": "Bytes of the adapters kept in host memory.",
    "outstanding_tokens": "Tokens still to be computed, which autoscaling counts.",
}
_COUNTERS = {
    "steps": "Forward passes.",
    "generated_tokens": "Tokens generated.",
    "cached_tokens": "Prompt tokens found in pages that others had computed.",
    "preemptions": "Requests sent back to wait, without pages.",
    "adapter_hits": "Requests whose adapter was held already.",
    "adapter_loads": "Adapters taken in.",
    "adapter_evictions": "Adapters dropped to make room.",
    "host_adapter_hits": "Adapters taken in from host memory.",
    "host_adapter_evictions": "Adapters dropped from host memory to make room.",
}
_HISTOGRAMS = {
    "step_seconds": "Time of a forward pass, with what surrounds it.",
    "step_rows": "Requests in a forward pass.",
    "step_tokens": "Tokens of a forward pass.",
}


def engine_families(replicas: Mapping[str, Figures]) -> Iterator[Metric]:
    """Every family, of all replicas by id."""
    for name, text in _GAUGES.items():
        gauge = GaugeMetricFamily(f"graft_engine_{name}", text, labels=["replica"])
        for replica, figures in replicas.items():
            gauge.add_metric([replica], figures[name])
        yield gauge
    pages = GaugeMetricFamily("graft_engine_pages", "KV pages.", labels=["replica", "state"])
    for replica, figures in replicas.items():
        free = figures["free_pages"]
        pages.add_metric([replica, "free"], free)
        pages.add_metric([replica, "used"], figures["num_pages"] - free)
    yield pages
    for name, text in _COUNTERS.items():
        counter = CounterMetricFamily(f"graft_engine_{name}", text, labels=["replica"])
        for replica, figures in replicas.items():
            counter.add_metric([replica], figures[name])
        yield counter
    for name, text in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(f"graft_engine_{name}", text, labels=["replica"])
        for replica, figures in replicas.items():
            found = figures[name]
            bounds = [*map(str, map(float, found["bounds"])), "+Inf"]
            counts = accumulate(found["counts"])
            buckets = [(bound, float(n)) for bound, n in zip(bounds, counts, strict=True)]
            histogram.add_metric([replica], buckets, sum_value=found["total"])
        yield histogram
