"""A whole service in this process: the gateway's app on a real socket, over a real replica."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from adapters import make_adapter

from cluster.registry import Registry
from serving.engine import EngineStats
from serving.gateway.assembly import gateway_app
from serving.gateway.service import Service
from serving.replica import Replica
from serving.spec import EngineSpec, GatewaySpec, ServingSpec

BASE_NAME = "tiny"
CATALOGUE_TTL_S = 0.2
VARIANTS = ("lora", "bitfit", "prompt_tuning", "prefix_tuning")
NAMES = [variant.replace("_", "-") for variant in VARIANTS]
ASK: dict[str, Any] = {"prompt": "hello", "max_tokens": 6, "temperature": 0}


@dataclass(frozen=True)
class Running:
    """A service that answers at `url`."""

    url: str
    registry: Registry
    replica: Replica
    service: Service

    @property
    def stats(self) -> EngineStats:
        return asyncio.run(self.replica.stats())


def events(response: httpx2.Response) -> list[Any]:
    """The events of a stream that ended as it should."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The detail of a failure in OpenAI's form."""
    assert response.status_code == status, response.text
    detail = response.json()["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    assert detail["message"]
    return detail


def publish(registry: Registry, base: Path, folder: Path, *variants: str) -> None:
    """One adapter per variant, named like it."""
    for variant in variants:
        path = make_adapter(variant, base, folder / variant)
        registry.publish(variant.replace("_", "-"), path)


@contextmanager
def running(
    base: Path,
    folder: Path,
    *,
    gateway: dict[str, Any] | None = None,
    drains: bool = True,
    **engine: Any,
) -> Iterator[Running]:
    """Serve `base` and the adapters of the store under `folder`; at its end it answers what it has
    begun, if it `drains`."""
    limits = {
        "max_waiting_requests": 512, "max_body_bytes": 2**20, "port": 0, "imports": False,
        "catalogue_ttl_s": CATALOGUE_TTL_S,
    }  # fmt: skip
    registry = Registry(str(folder / "store"))
    spec = ServingSpec(
        name=BASE_NAME,
        store=registry.store.uri,
        cache=str(folder / "cache"),
        engine=EngineSpec(base_model=str(base), **engine),
        gateway=GatewaySpec.model_validate(limits | (gateway or {})),
    )
    replica = Replica(spec)
    app = gateway_app(spec, replica)
    port = spec.gateway.port
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", registry, replica, app.state.service)
    finally:
        server.should_exit, server.force_exit = True, not drains
        thread.join()
        if spec.gateway.imports:
            app.state.imports.stop()
        replica.stop()
