"""How many requests a process still holds that asked a service's engines for an adapter.

    python tests/kept_requests.py ADDRESS APPLICATION STORE ADAPTER

Asks them as a gateway does, twenty times, and prints the number.
"""

import asyncio
import gc
import sys

import ray
from ray import serve
from ray.serve._private.request_router.common import PendingRequest

from cluster.registry import Registry
from serving.deployment import RayBackend
from serving.engine import GenerationRequest


async def main(address: str, application: str, store: str, name: str) -> None:
    ray.init(address=address, log_to_driver=False)
    backend = RayBackend(serve.get_app_handle(application), min_replicas=1)
    version = Registry(store).resolve(name)
    for seed in range(20):
        request = GenerationRequest(
            prompt_token_ids=[1, 2], adapter=version.ref, max_tokens=1, seed=seed
        )
        async for _ in backend.generate(request, version, stream=False):
            pass
    del request
    gc.collect()
    print("kept:", sum(type(each) is PendingRequest for each in gc.get_objects()))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
