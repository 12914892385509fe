"""A trace of each request over OTLP, where `gateway.traces` names a collector.

    POST /v1/completions            server span, a child of the client's `traceparent`
      queue                         from arrival to the first step of an engine that has it
      first token                   from there: the prompt is read
      generate                      from there to the answer's end

They tell the request's id, model, adapter and token counts; never prompts, answers or keys. The
engine tells how long each part took with an answer's end, so that nothing of OpenTelemetry is in
the engines. It is an extra, imported by `Traces` alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from importlib import import_module
from typing import Any

from serving.engine.request import Times

# The trace of the request that this task answers.
current: ContextVar[RequestTrace | None] = ContextVar("graft_trace", default=None)
_NS = 1_000_000_000


class RequestTrace:
    """The spans of one request."""

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer, self._span = tracer, span

    def describe(self, **attributes: str | int) -> None:
        """Tell what is asked for."""
        for name, value in attributes.items():
            self._span.set_attribute(f"graft.{name}", value)

    def answered(self, index: int, times: Times, began_s: float, tokens: int) -> None:
        """Tell of the answer `index`, which ends now, of a request that came at the monotonic time
        `began_s`."""
        from opentelemetry.trace import set_span_in_context

        end = time.time_ns()
        first = end - int(times.rest_s * _NS)
        scheduled = first - int(times.first_token_s * _NS)
        began = end - int((time.monotonic() - began_s) * _NS)
        parts = (("queue", began, scheduled), ("first token", scheduled, first),
                 ("generate", first, end))  # fmt: skip
        attributes = {"graft.answer": index, "graft.completion_tokens": tokens}
        for name, start, stop in parts:
            span = self._tracer.start_span(
                name, set_span_in_context(self._span), start_time=start, attributes=attributes
            )
            span.end(max(start, stop))

    def end(self, method: str, route: str | None, status: int) -> None:
        """End the request's own span."""
        from opentelemetry.trace import Status, StatusCode

        self._span.update_name(f"{method} {route}" if route else method)
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class Traces:
    """Sends spans to the collector at `endpoint`, in a thread of its own; what the collector does
    not take is lost, and costs no request anything.

    Raises:
        ImportError: the extra raygraft[otel] is not installed.
    """

    def __init__(self, endpoint: str, service: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # By name: the exporter is of the extra alone.
        exporters: Any = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        resource = Resource.create({"service.name": service})
        provider = TracerProvider(resource=resource)
        exporter = exporters.OTLPSpanExporter(endpoint=endpoint)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = provider.get_tracer("graft.gateway")

    def begin(self, headers: Mapping[str, str], request_id: str) -> RequestTrace:
        """The trace of a request that arrives now, whose headers may name the client's span."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span = self._tracer.start_span(
            "request",
            TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"graft.request_id": request_id},
        )
        return RequestTrace(self._tracer, span)
