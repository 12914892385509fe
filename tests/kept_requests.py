"""How many requests that are over Ray Serve's router still holds, in the process that made them.

    python tests/kept_requests.py

Asks a deployment for adapters as a gateway does, on a cluster of its own, and prints the number.
"""

import asyncio
import gc
from typing import Any

from cluster.registry import AdapterVersion
from cluster.session import session
from serving.engine.request import FinishReason, GenerationRequest, TokenOutput


class Engine:
    """Answers at once."""

    async def generate(self, request: Any, adapter: Any, stream: bool) -> Any:
        yield TokenOutput("", (1,), "", FinishReason.STOP)


async def ask(backend: Any) -> None:
    version = AdapterVersion("lora", 1, "LORA", None, "", "", {}, card={})
    for _ in range(20):
        request = GenerationRequest(prompt_token_ids=[1, 2], adapter=version.ref, max_tokens=1)
        async for _ in backend.generate(request, version, stream=False):
            pass


def kept() -> int:
    # Here, since Ray asks when it is imported how a cluster is to be joined.
    from ray import serve
    from ray.serve._private.request_router.common import PendingRequest
    from ray.serve.config import RequestRouterConfig

    from serving.deployment import RayBackend
    from serving.router import AdapterRouter

    config = RequestRouterConfig.model_validate({"request_router_class": AdapterRouter})
    deployment: Any = serve.deployment(Engine, request_router_config=config)
    handle = serve.run(deployment.bind(), name="kept", route_prefix=None)
    asyncio.run(ask(RayBackend(handle, min_replicas=1)))
    gc.collect()
    found = sum(type(each) is PendingRequest for each in gc.get_objects())
    serve.shutdown()
    return found


if __name__ == "__main__":
    with session(num_cpus=2):
        print("kept:", kept())
