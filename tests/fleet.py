"""A service on a real cluster, with replicas that come and go, and how it is asked."""

import asyncio
import json
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from adapters import make_adapter
from commands import Command, overrides, processes, served_at
from conftest import RayCluster

from cluster.registry import Registry
from serving.engine import Engine, EngineSpec, GenerationRequest

PATIENCE_S = 180  # of a test that would otherwise wait for ever; this machine does other things too
REQUESTS, MAX_REPLICAS, GATEWAYS, KILLS = 200, 3, 2, 3
FAILOVERS = re.compile(r'^graft_failovers_total\{gateway="(\w+)"\} (\S+)$', re.MULTILINE)
ADAPTERS = (None, "lora", "prefix-tuning")


@dataclass(frozen=True)
class Service:
    """`graft serve` of `base` at `url`, started with `arguments`; `expected` is what each of the
    requests must be answered with."""

    url: str
    command: Command
    expected: list[str]
    arguments: list[str]
    base: Path


def request(number: int) -> dict[str, Any]:
    """Every second one streams, every third has an adapter, every fourth draws at random."""
    return {
        "prompt": f"request {number}",
        "adapter": ADAPTERS[number % 3],
        "max_tokens": 40 + number % 50,
        "temperature": 0.0 if number % 4 else 1.0,
        "seed": number,
        "ignore_eos": True,
    }


@contextmanager
def serving(
    ray_cluster: RayCluster, bases: Callable[[str], Path], folder: Path
) -> Generator[Service]:
    """A service of a base and two adapters; if it still runs then, SIGTERM must end it."""
    base = shutil.copytree(bases("llama"), folder / "base")
    registry = Registry(str(folder / "store"))
    engine = Engine(EngineSpec(base_model=str(base)))
    for variant in ("lora", "prefix_tuning"):
        path = make_adapter(variant, base, folder / variant)
        registry.publish(variant.replace("_", "-"), path)
        engine.add_adapter(variant.replace("_", "-"), path)
    answers = engine.generate([GenerationRequest(**request(i)) for i in range(REQUESTS)])
    settings = (
        f"store={registry.store.uri}", f"engine.base_model={base}", f"cache={folder}/cache",
        "gateway.port=0", f"gateway.replicas={GATEWAYS}",
        "replicas.min=0", f"replicas.max={MAX_REPLICAS}", "replicas.target_outstanding_tokens=2000",
        "replicas.look_back_s=2", "replicas.upscale_delay_s=1", "replicas.downscale_delay_s=6",
        "engine.max_running_requests=16",
    )  # fmt: skip
    address = ("--address", ray_cluster.address)
    arguments = ["serve", "configs/serving/local.yaml", *address, *overrides(*settings)]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ray_cluster.env.items():
            patch.setenv(key, value)
        with Command(*arguments) as command:
            texts = [answer.text for answer in answers]
            yield Service(served_at(command), command, texts, arguments, base)
            if not command.is_over():
                command.process.terminate()
            ended = command.wait(90)
    assert ended.code == 0, ended.output


def replicas() -> list[psutil.Process]:
    """The processes of the engine replicas, oldest first."""
    return processes("ServeReplica", "engine")


async def ask(http: httpx2.AsyncClient, number: int) -> str:
    """The answer to one request; a stream must end as OpenAI's do."""
    body = request(number)
    body["model"] = body.pop("adapter") or "demo-base"
    if number % 2:
        response = await http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]
    pieces: list[str] = []
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]", lines[-1]
    for line in lines[:-1]:
        event = json.loads(line.removeprefix("data: "))
        pieces.append(event["choices"][0]["text"])
    return "".join(pieces)


@asynccontextmanager
async def connected(service: Service) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(
        base_url=service.url, timeout=270, limits=limits, trust_env=False
    ) as http:
        yield http


def until(condition: Callable[[], object], *, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


async def pages(http: httpx2.AsyncClient) -> dict[str, str]:
    """/metrics of every gateway, by its id: each answers for itself, and so many at once reach the
    busier one too."""
    found, deadline = dict[str, str](), time.monotonic() + PATIENCE_S
    while len(found) < GATEWAYS:
        assert time.monotonic() < deadline, "a gateway is never asked"
        for page in await asyncio.gather(*(http.get("/metrics") for _ in range(20))):
            found |= {gateway: page.text for gateway, _ in FAILOVERS.findall(page.text)}
    return found


async def failovers(http: httpx2.AsyncClient) -> float:
    """How many answers have gone on at another replica."""
    told = [FAILOVERS.findall(page)[0][1] for page in (await pages(http)).values()]
    return sum(map(float, told))


def until_all_are_up(service: Service) -> None:
    """Each gateway shows figures of as many engines as have a process, one of which has answered:
    none is coming up or leaving, and the gateways are all there."""

    async def scraped() -> list[str]:
        await answer_some(service)  # with nothing to do they would go before they told
        async with connected(service) as http:
            return list((await pages(http)).values())

    def are_up() -> bool:
        for page in asyncio.run(scraped()):
            lines = page.splitlines()
            steps = [line for line in lines if line.startswith("graft_engine_steps_total{replica=")]
            if len(steps) != len(replicas()) or all(step.endswith(" 0.0") for step in steps):
                return False
        return True

    until(are_up, timeout_s=120, what="replicas whose figures are not shown")


async def grow(service: Service, count: int) -> None:
    """Waves of requests until there are so many replicas; every answer is checked."""
    async with connected(service) as http:
        deadline = time.monotonic() + PATIENCE_S
        while len(replicas()) < count:
            assert time.monotonic() < deadline, replicas()
            answers = await asyncio.gather(*(ask(http, n) for n in range(REQUESTS)))
            assert answers == service.expected


async def answer_some(service: Service) -> None:
    """So that there is an engine: an idle service has none."""
    async with connected(service) as http:
        assert await ask(http, 0) == service.expected[0]
