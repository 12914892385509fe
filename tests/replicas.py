"""Replicas without Ray over a store of LoRAs that compute alike, and requests to them."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from adapters import make_adapter

from cluster.mixes import NamedAdapter
from cluster.registry import AdapterVersion, Registry
from serving.adapters import num_bytes
from serving.engine import GenerationRequest, TokenOutput
from serving.replica import Replica
from serving.spec import EngineSpec, ServingSpec

GIB = 2**30
COUNT = 8


class Loras:
    """A store of one LoRA under COUNT names, each of a content of its own, and replicas over it."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.registry = Registry(str(folder / "store"))
        self._path = make_adapter("lora", base, folder / "lora")
        self._config = (self._path / "adapter_config.json").read_text()
        self.versions = [self.publish(f"a{n}", str(n)) for n in range(COUNT)]
        replica = self.replica()
        self.adapter_bytes = num_bytes(replica._thread.engine.lower(self._path))
        replica.stop()

    def publish(self, name: str, revision: str) -> AdapterVersion:
        """The LoRA, with its content told by a field that changes nothing."""
        config = self._config.replace('"revision": null', f'"revision": "{revision}"')
        assert config != self._config
        (self._path / "adapter_config.json").write_text(config)
        return self.registry.publish(name, self._path)

    def spec(self, room: float = 100.0, host_room: float = 0.0) -> ServingSpec:
        """With room for so many adapters, and so many behind them."""
        gib = getattr(self, "adapter_bytes", GIB) / GIB
        engine = EngineSpec(
            base_model=str(self.base), adapters_gib=room * gib, host_adapters_gib=host_room * gib
        )
        return ServingSpec(
            name="base", store=self.registry.store.uri, cache=str(self.folder / "cache"),
            engine=engine,
        )  # fmt: skip

    def replica(self, room: float = 100.0) -> Replica:
        """With room for so many adapters."""
        return Replica(self.spec(room))


async def ask(replica: Replica, adapter: NamedAdapter | None, **options: Any) -> TokenOutput:
    """The whole answer."""
    asked: dict[str, Any] = {"prompt_token_ids": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
    name = adapter and adapter.ref
    request = GenerationRequest(adapter=name, **(asked | options))
    (output,) = [o async for o in replica.generate(request, adapter, stream=False)]
    return output


def run(work: Awaitable[Any]) -> Any:
    """What it gives, within a minute."""

    async def within() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(within())
