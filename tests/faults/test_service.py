"""A service on a real cluster under load while its replicas come, go and are killed.

One service for all: from no replica to three and back, streams and whole answers, and not one
answer differs from what the engine says when it is left alone.
"""

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from commands import Command, overrides, processes, run
from conftest import RayCluster
from fleet import (
    KILLS,
    MAX_REPLICAS,
    PATIENCE_S,
    REQUESTS,
    Service,
    answer_some,
    ask,
    connected,
    failovers,
    grow,
    replicas,
    request,
    serving,
    until,
    until_all_are_up,
)

from serving.client import AsyncClient

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def service(
    ray_cluster: RayCluster, bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    with serving(ray_cluster, bases, tmp_path_factory.mktemp("service")) as service:
        yield service


def test_an_engine_that_fails_to_start_is_started_again(service: Service) -> None:
    """More often than Ray Serve does of its own accord; who waits for it is answered."""
    weights, tried = service.base / "model.safetensors", set[int]()

    def one_more_than_serve_tries() -> bool:
        tried.update(process.pid for process in replicas())
        return len(tried) > 3

    async def wait() -> str:
        async with connected(service) as http:
            asked = asyncio.create_task(ask(http, 0))
            what = "an engine was given up"
            await asyncio.to_thread(until, one_more_than_serve_tries, timeout_s=240, what=what)
            hidden.rename(weights)
            return await asked

    assert not replicas()
    hidden = weights.rename(weights.with_suffix(".hidden"))
    assert asyncio.run(wait()) == service.expected[0]


def test_more_load_more_replicas_and_no_answer_changes(service: Service) -> None:
    """Some wait for a replica to come up."""
    assert httpx2.get(f"{service.url}/ready").status_code == 200
    asyncio.run(grow(service, MAX_REPLICAS))


def test_each_gateway_shows_the_figures_of_every_replica(service: Service) -> None:
    until_all_are_up(service)


def test_killed_replicas_cost_nobody_a_token(service: Service) -> None:
    """200 requests in progress at any time until the last kill has cost a replica some of them,
    which go on at another one."""
    answered, is_over = 0, False

    async def keep_asking(http: httpx2.AsyncClient, number: int) -> None:
        nonlocal answered
        while True:
            assert await ask(http, number) == service.expected[number]
            answered += 1
            if is_over:
                return

    async def kill_one(http: httpx2.AsyncClient) -> None:
        seen, deadline = answered, time.monotonic() + PATIENCE_S
        while answered == seen:  # where there was one alone, the next has to come up first
            assert time.monotonic() < deadline, "nobody is answered any more"
            await asyncio.sleep(0.05)
        before = await failovers(http)
        replicas()[0].kill()  # a younger one may not have come up yet, and has no requests then
        deadline = time.monotonic() + PATIENCE_S  # they may have to wait for another one to come up
        while await failovers(http) == before:
            assert time.monotonic() < deadline, "it was killed with no request on it"
            await asyncio.sleep(0.2)

    async def wave() -> None:
        nonlocal is_over
        async with connected(service) as http, asyncio.TaskGroup() as tasks:
            for number in range(REQUESTS):
                tasks.create_task(keep_asking(http, number))
            for _ in range(KILLS):
                await kill_one(http)
            is_over = True

    asyncio.run(grow(service, MAX_REPLICAS))
    asyncio.run(wave())


def test_less_load_fewer_replicas_and_no_stream_is_cut(service: Service) -> None:
    """Streams all the time, some on each replica: those that leave finish theirs, and none has to
    go on elsewhere."""

    async def stream_on(http: httpx2.AsyncClient, first: int) -> None:
        number, deadline = first, time.monotonic() + PATIENCE_S
        while len(replicas()) > 1:
            assert time.monotonic() < deadline, replicas()
            assert await ask(http, number) == service.expected[number]
            number = (number + 2) % REQUESTS

    async def streams() -> None:
        async with connected(service) as http:
            before = await failovers(http)
            assert len(replicas()) == MAX_REPLICAS
            await asyncio.gather(*(stream_on(http, first) for first in range(0, REQUESTS, 22)))
            assert await failovers(http) == before

    asyncio.run(grow(service, MAX_REPLICAS))
    asyncio.run(streams())


async def answer_while(service: Service, is_over: Callable[[], bool]) -> int:
    """Keep 24 requests in progress, each right at its first try; returns how many there were."""
    numbers = iter(range(100_000))

    async def worker(http: httpx2.AsyncClient) -> int:
        count = 0
        while not is_over():
            number = next(numbers) % REQUESTS
            assert await ask(http, number) == service.expected[number]
            count += 1
        return count

    async with connected(service) as http:
        return sum(await asyncio.gather(*(worker(http) for _ in range(24))))


async def refused_beyond(limit: int, service: Service) -> None:
    """Of many requests at once each is answered or told at once to come again: not one waits for a
    gateway that is full, and neither does who asks how the service is."""
    async with connected(service) as http:
        bodies = [{**request(n), "model": "demo-base", "max_tokens": 100} for n in range(3 * limit)]
        for body in bodies:
            del body["adapter"]
        asked = [asyncio.create_task(http.post("/v1/completions", json=body)) for body in bodies]
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        first = done.pop().result()
        assert first.status_code == 429, first.text
        assert first.json()["error"]["code"] == "overloaded"
        assert int(first.headers["retry-after"]) > 0
        assert (await http.get("/health", timeout=5)).status_code == 200
        codes = Counter(response.status_code for response in await asyncio.gather(*asked))
        assert set(codes) == {200, 429}
        assert codes[200] >= limit


def test_a_changed_spec_is_rolled_out_and_nobody_notices(
    service: Service, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Engines and gateways are replaced under load, streams included."""
    before = set(processes("ServeReplica"))
    changes = overrides("engine.max_running_requests=12", "gateway.max_waiting_requests=2048")
    with Command(*service.arguments, *changes, "--update") as update:
        assert asyncio.run(answer_while(service, update.is_over)) > 24
        ended = update.wait()
    assert ended.code == 0, ended.output
    assert f"updated at {service.url}" in ended.output

    def old_have_ended() -> bool:
        return before.isdisjoint(processes("ServeReplica"))

    until(old_have_ended, timeout_s=30, what="some replicas were not replaced")

    # What concerns the gateways alone leaves the engines as they are, if not idle ones leave.
    asyncio.run(answer_some(service))
    engines = replicas()
    gateway = overrides("engine.max_running_requests=12", "gateway.max_waiting_requests=8")
    ended = run(*service.arguments, *gateway, "--update")
    assert ended.code == 0, ended.output
    assert set(replicas()) <= set(engines)
    asyncio.run(refused_beyond(8, service))  # the next test's update takes the limit back
    elsewhere = run(*service.arguments, *overrides("gateway.port=9"), "--update")
    assert (elsewhere.code, "stop and start it to move it" in elsewhere.output) == (4, True)
    other = shutil.copytree(bases("llama"), tmp_path / "other")
    for change in (f"engine.base_model={other}", f"engine.small_bases=[{other}]"):
        refused = run(*service.arguments, *overrides(change), "--update")
        assert (refused.code, "no update changes them" in refused.output) == (4, True)


async def ready_while_full(service: Service) -> None:
    """A service whose only engine takes two at once, with many waiting, is ready at once."""
    async with connected(service) as http:
        assert await ask(http, 0) == service.expected[0]
        asked = [asyncio.create_task(ask(http, number)) for number in range(150)]
        await asyncio.sleep(1)
        response = await http.get("/ready")
        assert response.status_code == 200, response.text
        assert not all(answer.done() for answer in asked[-50:]), "it was not full"
        assert await asyncio.gather(*asked) == service.expected[:150]


def test_a_service_whose_engines_do_not_come_up_is_not_ready(service: Service) -> None:
    """It says so, and does not wait for them; it is ready again once there is one. One that is full
    is ready."""
    one = overrides("replicas.min=1")
    full = overrides("replicas.min=1", "replicas.max=1", "replicas.max_ongoing_requests=2")
    for settings in (full, one):
        ended = run(*service.arguments, *settings, "--update")
        assert ended.code == 0, ended.output
        assert httpx2.get(f"{service.url}/ready", timeout=10).status_code == 200
        if settings is full:
            asyncio.run(ready_while_full(service))
    weights = service.base / "model.safetensors"
    hidden = weights.rename(weights.with_suffix(".hidden"))
    for process in replicas():
        process.kill()
    for _ in range(2):  # lost at first, and then not there
        response = httpx2.get(f"{service.url}/ready", timeout=10)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
        time.sleep(1)
    hidden.rename(weights)

    def is_ready() -> bool:
        return httpx2.get(f"{service.url}/ready", timeout=10).status_code == 200

    until(is_ready, timeout_s=60, what="the service did not become ready again")


def test_the_path_to_the_engines_heals(service: Service) -> None:
    """A gateway and the proxy are killed under load; what was on its way through them is asked
    again by our client."""
    numbers = list(range(0, REQUESTS, 5))

    async def through_client() -> None:
        async with AsyncClient(service.url, max_attempts=30) as client:
            for actor, deployment in (("ServeReplica", "gateway"), ("ProxyActor", "")):
                asked = [asyncio.create_task(through(client, number)) for number in numbers]
                await asyncio.sleep(0.3)
                processes(actor, deployment)[0].kill()
                assert await asyncio.gather(*asked) == [service.expected[n] for n in numbers], actor

    async def through(client: AsyncClient, number: int) -> str:
        options: Any = request(number)
        prompt = options.pop("prompt")
        return (await client.generate_one(prompt, **options)).text

    asyncio.run(through_client())


def test_requests_pass_without_serves_controller(service: Service) -> None:
    """It is killed under load, half of which streams, and nobody asks twice: what runs goes on, and
    what comes meanwhile is answered."""
    numbers = list(range(0, REQUESTS, 5))

    async def wave() -> list[str]:
        async with connected(service) as http:
            asked = [asyncio.create_task(ask(http, number)) for number in numbers]
            await asyncio.sleep(0.3)
            assert not all(task.done() for task in asked), "nothing ran when it was killed"
            (controller,) = processes("ServeController")
            controller.kill()
            asked += [asyncio.create_task(ask(http, number)) for number in numbers]
            return await asyncio.gather(*asked)

    asyncio.run(answer_some(service))
    assert asyncio.run(wave()) == [service.expected[number] for number in numbers] * 2
    until(lambda: bool(processes("ServeController")), timeout_s=30, what="no controller")


def test_a_terminated_service_finishes_what_runs_and_leaves_no_process(service: Service) -> None:
    """SIGTERM while answers are on their way and engines on theirs."""

    def there() -> set[psutil.Process]:
        return {p for kind in ("ServeReplica", "Proxy", "ServeController") for p in processes(kind)}

    async def last() -> list[str]:
        async with connected(service) as http:
            asked = [asyncio.create_task(ask(http, n)) for n in range(REQUESTS)]
            left = set(asked)
            while len(left) > 0.9 * REQUESTS:  # by then the gateways have them all
                _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            assert left, "nothing ran when it was terminated"
            own.update(there())
            service.command.process.terminate()
            return await asyncio.gather(*asked)

    own = set[psutil.Process]()
    assert asyncio.run(last()) == service.expected

    assert service.command.wait(PATIENCE_S).code == 0
    deadline = time.monotonic() + 10
    # A process that has ended and whom nobody has waited for counts as running.
    while left := there() | {process for process in own if process.is_running()}:
        assert time.monotonic() < deadline, (left, service.command.said)
        time.sleep(0.1)
