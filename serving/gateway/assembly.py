"""A gateway's app from a spec: all it needs but its engines."""

from __future__ import annotations

from fastapi import FastAPI

from cluster.base_model import context_tokens, load_tokenizer
from cluster.registry import Registry
from serving.catalogue import Catalogue
from serving.gateway.access import Door
from serving.gateway.failover import Backend
from serving.gateway.metrics import Metrics
from serving.gateway.routes import create_app
from serving.gateway.service import Service
from serving.gateway.tracing import Traces
from serving.import_watch import ImportWatch
from serving.keys import KeyStore
from serving.spec import ServingSpec


def gateway_app(spec: ServingSpec, backend: Backend, *, is_behind_serve: bool = False) -> FastAPI:
    """The app that answers for `spec` by way of `backend`; looks for imports while it exists."""
    asked = spec.gateway
    catalogue = Catalogue(
        Registry(spec.store),
        base_name=spec.name,
        base_folder=spec.engine.base_model,
        ttl_s=asked.catalogue_ttl_s,
    )
    tokenizer = load_tokenizer(spec.engine.base_model)
    context = spec.engine.max_context_tokens or context_tokens(spec.engine.base_model)
    service = Service(backend, catalogue, tokenizer, asked, Metrics(), context)
    keys = None if asked.keys is None else KeyStore(asked.keys)
    door = Door(keys, ttl_s=asked.catalogue_ttl_s)
    traces = None if asked.traces is None else Traces(asked.traces, spec.name)
    app = create_app(service, asked, door, traces, is_behind_serve=is_behind_serve)
    if asked.imports:
        # Two looks and the other gateways' next snapshot fit into five seconds.
        period_s, registry = asked.catalogue_ttl_s / 2, Registry(spec.store)
        app.state.imports = ImportWatch(registry, period_s=period_s, on_import=catalogue.refresh)
    return app
