"""One replica without Ray: how adapters come in beside running requests, and leave."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import make_adapter

from cluster.errors import AdapterError, RequestError
from cluster.registry import AdapterVersion, Registry
from serving.adapter_loader import AdapterLoader
from serving.adapters import num_bytes
from serving.engine import GenerationRequest, ResponseFormat, TokenOutput
from serving.engine.grammar import Grammars
from serving.replica import Replica
from serving.spec import EngineSpec, ServingSpec

GIB = 2**30
COUNT = 8


class Service:
    """A store of one LoRA under COUNT names, and replicas over it."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.registry = Registry(str(folder / "store"))
        path = make_adapter("lora", base, folder / "lora")
        self.versions = [self.registry.publish(f"a{n}", path) for n in range(COUNT)]
        replica = self.replica()
        self.adapter_bytes = num_bytes(replica._thread.engine.lower(path))
        replica.stop()

    def replica(self, room: float = 100.0) -> Replica:
        """With room for so many adapters."""
        gib = room * getattr(self, "adapter_bytes", GIB) / GIB
        engine = EngineSpec(base_model=str(self.base), adapters_gib=gib)
        return Replica(
            ServingSpec(name="base", store=self.registry.store.uri,
                        cache=str(self.folder / "cache"), engine=engine)
        )  # fmt: skip


@pytest.fixture(scope="module")
def service(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Service:
    return Service(bases("llama"), tmp_path_factory.mktemp("replica"))


@pytest.fixture
def make(service: Service) -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def replica(room: float = 100.0) -> Replica:
        made.append(service.replica(room))
        return made[-1]

    yield replica
    for each in made:
        each.stop()


async def ask(replica: Replica, version: AdapterVersion | None, **options: Any) -> TokenOutput:
    """The whole answer."""
    asked: dict[str, Any] = {"prompt_token_ids": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
    name = version and version.ref
    request = GenerationRequest(adapter=name, **(asked | options))
    (output,) = [o async for o in replica.generate(request, version, stream=False)]
    return output


def run(work: Awaitable[Any]) -> Any:
    async def within() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(within())


def test_more_adapters_than_room_take_turns(service: Service, make: Callable[..., Replica]) -> None:
    """Twice over, all at once; nothing else than the room is ever used, nobody is refused."""
    replica = make(room=2.5)

    async def everybody() -> list[TokenOutput]:
        asked = [ask(replica, version) for version in [None, *service.versions] * 2]
        return await asyncio.gather(*asked)

    alone, *others = run(everybody())[: COUNT + 1]
    assert {output.token_ids for output in others} != {alone.token_ids}
    assert len({output.token_ids for output in others}) == 1, "it is one adapter"
    stats = run(replica.stats())
    assert stats.adapters == 2
    assert stats.adapter_evictions >= COUNT - 2
    assert stats.adapter_bytes == 2 * service.adapter_bytes


def test_adapters_that_are_never_idle_make_room_for_one_that_waits(
    service: Service, make: Callable[..., Replica]
) -> None:
    replica = make(room=1.5)
    hot, cold = service.versions[:2]

    async def crowd() -> None:
        answers = asyncio.Queue[TokenOutput]()

        async def client(delay: int) -> None:
            while True:
                answers.put_nowait(await ask(replica, hot, max_tokens=8 + delay))

        clients = [asyncio.create_task(client(number)) for number in range(4)]
        await answers.get()
        await ask(replica, cold)
        while not answers.empty():
            answers.get_nowait()
        await answers.get()  # it comes back
        for each in clients:
            each.cancel()

    run(crowd())


def test_only_so_many_lie_outside_of_the_room(
    service: Service, make: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica, loaded = make(room=1.5), asyncio.Queue[str]()
    load = AdapterLoader.load

    async def noted(self: AdapterLoader, adapter: AdapterVersion) -> Any:
        loaded.put_nowait(adapter.ref)
        return await load(self, adapter)

    monkeypatch.setattr(AdapterLoader, "load", noted)
    first, *others = service.versions

    async def crowd() -> None:
        request = GenerationRequest(
            prompt_token_ids=[1], adapter=first.ref, max_tokens=120, ignore_eos=True
        )
        outputs = replica.generate(request, first, stream=True)
        await anext(outputs)
        waiting = [asyncio.create_task(ask(replica, version)) for version in [*others, *others]]
        assert await loaded.get() == first.ref
        assert len({await loaded.get() for _ in range(4)}) == 4
        await asyncio.sleep(0.02)
        assert loaded.empty(), "four are on their way, and no more"
        await outputs.aclose()  # it leaves, and the others come in
        await asyncio.gather(*waiting)

    run(crowd())
    assert loaded.qsize() >= len(others) - 4


def test_who_waits_for_a_bad_adapter_is_told_with_the_first(
    service: Service, make: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replica, fetched = make(), list[str]()
    folder = make_adapter("lora", service.base, tmp_path)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": ', '"r": 1'))
    bad = service.registry.publish("bad", folder)
    fetch = Registry.fetch

    def noted(self: Registry, version: AdapterVersion, cache: Path) -> Path:
        fetched.append(version.ref)
        return fetch(self, version, cache)

    monkeypatch.setattr(Registry, "fetch", noted)

    async def crowd() -> list[Any]:
        asked = [ask(replica, bad) for _ in range(5)] + [ask(replica, service.versions[0])]
        return await asyncio.gather(*asked, return_exceptions=True)

    *failed, answered = run(crowd())
    assert [type(error) for error in failed] == [AdapterError] * 5
    assert isinstance(answered, TokenOutput)
    assert sorted(fetched) == [service.versions[0].ref, bad.ref]


def test_who_waits_for_an_adapter_over_the_room_is_told_with_the_first(
    service: Service, make: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica, loaded = make(0.5), list[str]()
    load = AdapterLoader.load

    async def noted(self: AdapterLoader, adapter: AdapterVersion) -> Any:
        loaded.append(adapter.ref)
        return await load(self, adapter)

    monkeypatch.setattr(AdapterLoader, "load", noted)

    async def crowd() -> list[Any]:
        asked = [ask(replica, service.versions[0]) for _ in range(5)]
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(error) for error in run(crowd())] == [AdapterError] * 5
    assert len(loaded) == 1


def test_who_brings_an_adapter_may_leave_or_be_refused(
    service: Service, make: Callable[..., Replica]
) -> None:
    """Others who wait for the same one are answered."""
    replica, version = make(), service.versions[0]

    async def crowd() -> None:
        leaver = asyncio.create_task(ask(replica, version))
        refused = asyncio.create_task(ask(replica, service.versions[1], max_tokens=10**6))
        await asyncio.sleep(0)
        others = [asyncio.create_task(ask(replica, v)) for v in service.versions[:2] * 2]
        await asyncio.sleep(0)
        leaver.cancel()
        with pytest.raises(RequestError, match="maximum context length"):
            await refused
        assert len({output.token_ids for output in await asyncio.gather(*others)}) == 1
        assert (await replica.stats()).running == 0

    run(crowd())


def test_grammars_are_compiled_beside_the_engine(
    make: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica, threads = make(), list[str]()
    compile_one = Grammars._compile

    def noted(self: Grammars, wanted: ResponseFormat) -> Any:
        threads.append(threading.current_thread().name)
        return compile_one(self, wanted)

    monkeypatch.setattr(Grammars, "_compile", noted)
    wanted = ResponseFormat("choice", ["yes", "no"])

    async def crowd() -> list[TokenOutput]:
        asked = [ask(replica, None, response_format=wanted, ignore_eos=False) for _ in range(4)]
        return await asyncio.gather(*asked)

    assert {output.text for output in run(crowd())} <= {"yes", "no"}
    assert len(threads) == 1, "once for all"
    assert threads[0].startswith("grammar")
    with pytest.raises(RequestError, match="cannot be compiled"):
        run(ask(replica, None, response_format=ResponseFormat("regex", "(a")))
