"""How adapters come in beside running requests: whose they are, in which order, and how many."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from adapters import make_adapter
from replicas import Loras, ask, run

from cluster.errors import AdapterError, RequestError
from cluster.local_copies import LocalCopies
from cluster.mixes import AdapterMix
from cluster.registry import AdapterVersion
from serving.adapter_loader import AdapterLoader
from serving.engine import Engine, GenerationRequest, ResponseFormat, TokenOutput
from serving.engine.grammar import Grammars
from serving.engine_thread import EngineThread
from serving.replica import Replica


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came")


class Gate:
    """Notes what passes it in the loader's threads, and holds it back until it is opened."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self._is_open = threading.Event()

    def before(self, function: Callable[..., Any], note: Callable[..., str]) -> Callable[..., Any]:
        def wait(*args: Any) -> Any:
            self.passed.append(note(*args))
            assert self._is_open.wait(30)
            return function(*args)

        return wait

    def open(self) -> None:
        self._is_open.set()

    def close(self) -> None:
        self._is_open.clear()

    async def reached_by(self, count: int) -> None:
        """So many have come, and nobody else follows them."""
        await until(lambda: len(self.passed) >= count)
        await asyncio.sleep(0.03)
        assert len(self.passed) == count


@pytest.fixture
def gate(make: Callable[..., Replica]) -> Iterator[Gate]:
    """Open at the end, before the replicas of `make` are stopped."""
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture
def fetches(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Holds back the store."""
    held = gate.before(LocalCopies.fetch, lambda _, version, *__: version.ref)
    monkeypatch.setattr(LocalCopies, "fetch", held)
    return gate


def asked(replica: Replica, adapter: Any, **options: Any) -> asyncio.Task[TokenOutput]:
    return asyncio.create_task(ask(replica, adapter, **options))


async def has_left(*tasks: asyncio.Task[Any]) -> None:
    """The clients go."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def holds(replica: Replica, *names: str) -> None:
    """Wait until the replica has these adapters and nothing is on its way."""
    await until(lambda: sorted(replica.adapters) == sorted(names) and not replica._arrivals._tasks)


def test_a_place_in_line_is_the_adapters_own(
    loras: Loras, make: Callable[..., Replica], fetches: Gate
) -> None:
    """Who asked first may leave; where all have left, those behind move up."""
    replica = make()
    (*first, kept, left, last) = loras.versions[:7]

    async def crowd() -> None:
        tasks = [asked(replica, version) for version in first]
        await fetches.reached_by(4)
        leavers = [asked(replica, version) for version in (kept, left, left)]
        await asyncio.sleep(0)
        tasks += [asked(replica, last), asked(replica, kept)]
        await asyncio.sleep(0)
        await has_left(*leavers)
        fetches.open()
        assert len({output.token_ids for output in await asyncio.gather(*tasks)}) == 1
        await holds(replica, *(v.ref for v in (*first, kept, last)))

    run(crowd())
    assert {*fetches.passed} == {version.ref for version in (*first, kept, last)}


def test_what_was_begun_stays_if_there_is_room(
    loras: Loras, make: Callable[..., Replica], fetches: Gate
) -> None:
    """Who left may come back, and finds it; but nobody who left takes another's room."""
    replica = make(room=1.5)
    here, other = loras.versions[:2]

    async def crowd() -> None:
        left = asked(replica, here)
        await fetches.reached_by(1)
        await has_left(left)
        again = asked(replica, here)
        await asyncio.sleep(0.01)
        await has_left(again)
        fetches.open()
        await holds(replica, here.ref)
        await ask(replica, here)
        assert fetches.passed == [here.ref]
        fetches.close()
        left = asked(replica, other)
        await fetches.reached_by(2)
        await has_left(left)
        fetches.open()
        await holds(replica, here.ref)
        await ask(replica, other)
        await holds(replica, other.ref)
        assert (await replica.stats()).adapter_evictions == 1

    run(crowd())


def test_mixes_that_are_asked_for_and_left_queue_no_work(
    loras: Loras, make: Callable[..., Replica], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "mix", gate.before(Engine.mix, lambda _, parts: str(parts)))
    replica = make()
    one, two, single = loras.versions[:3]
    mixes = [AdapterMix(((one, 1.0), (two, weight / 8))) for weight in range(8)]

    async def crowd() -> None:
        await asyncio.gather(ask(replica, one), ask(replica, two))
        for mix in mixes:
            left = asked(replica, mix)
            await asyncio.sleep(0.01)
            await has_left(left)
        await gate.reached_by(1)
        await ask(replica, single)  # nobody else waits for them
        wanted = asked(replica, mixes[-1])
        await asyncio.sleep(0.01)
        gate.open()
        await wanted
        await holds(replica, *(v.ref for v in (one, two, single)), mixes[0].ref, mixes[-1].ref)
        assert len(gate.passed) == 2

    run(crowd())


def test_one_content_is_loaded_once_under_all_its_names(
    loras: Loras, make: Callable[..., Replica], fetches: Gate
) -> None:
    replica = make()
    twins = [loras.versions[0], loras.publish("twin", "0")]

    async def crowd() -> None:
        tasks = [asked(replica, version) for version in twins]
        mixed = asked(replica, AdapterMix(((twins[1], 0.5), (twins[0], 0.5))))
        await fetches.reached_by(1)
        fetches.open()
        assert len({output.token_ids for output in await asyncio.gather(*tasks, mixed)}) == 1

    run(crowd())


def test_what_peft_merges_does_not_hold_up_the_rest(
    loras: Loras,
    make: Callable[..., Replica],
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    lower = Engine.lower
    replica, slow = make(), make_adapter("lokr", loras.base, tmp_path)
    versions = [loras.registry.publish(f"lokr{number}", slow) for number in range(5)]
    contents = {version.content_hash for version in versions}
    held = gate.before(lower, lambda _, folder, __: Path(folder).name)

    def gated(engine: Engine, folder: Path, content: str) -> Any:
        return (held if content in contents else lower)(engine, folder, content)

    monkeypatch.setattr(Engine, "lower", gated)

    async def crowd() -> None:
        merged = [asked(replica, version) for version in versions]
        await gate.reached_by(1)
        await asyncio.gather(*(ask(replica, version) for version in loras.versions))
        gate.open()
        assert len({output.token_ids for output in await asyncio.gather(*merged)}) == 1

    run(crowd())


def test_who_waits_for_a_grammar_keeps_no_adapter_out(
    loras: Loras, make: Callable[..., Replica], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grammars, "_compile", gate.before(Grammars._compile, lambda *_: "grammar"))
    replica = make()
    wanted = ResponseFormat("choice", ["yes", "no"])

    async def crowd() -> None:
        structured = asked(replica, loras.versions[0], response_format=wanted, ignore_eos=False)
        await gate.reached_by(1)
        await asyncio.gather(*(ask(replica, version) for version in loras.versions))
        gate.open()
        assert (await structured).text in ("yes", "no")

    run(crowd())


def test_only_so_many_lie_outside_of_the_room(
    loras: Loras, make: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica, loaded = make(room=1.5), asyncio.Queue[str]()
    load = AdapterLoader.load

    async def noted(self: AdapterLoader, adapter: AdapterVersion) -> Any:
        loaded.put_nowait(adapter.ref)
        return await load(self, adapter)

    monkeypatch.setattr(AdapterLoader, "load", noted)
    first, *others = loras.versions

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
    loras: Loras, make: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replica, fetched = make(), list[str]()
    folder = make_adapter("lora", loras.base, tmp_path)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": ', '"r": 1'))
    bad = loras.registry.publish("bad", folder)
    fetch = LocalCopies.fetch

    def noted(self: LocalCopies, version: AdapterVersion, *rest: Any) -> Path:
        fetched.append(version.ref)
        return fetch(self, version, *rest)

    monkeypatch.setattr(LocalCopies, "fetch", noted)

    async def crowd() -> list[Any]:
        asked = [ask(replica, bad) for _ in range(5)] + [ask(replica, loras.versions[0])]
        return await asyncio.gather(*asked, return_exceptions=True)

    *failed, answered = run(crowd())
    assert [type(error) for error in failed] == [AdapterError] * 5
    assert isinstance(answered, TokenOutput)
    assert sorted(fetched) == [loras.versions[0].ref, bad.ref]


def test_who_waits_for_an_adapter_over_the_room_is_told_with_the_first(
    loras: Loras, make: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica, loaded = make(0.5), list[str]()
    load = AdapterLoader.load

    async def noted(self: AdapterLoader, adapter: AdapterVersion) -> Any:
        loaded.append(adapter.ref)
        return await load(self, adapter)

    monkeypatch.setattr(AdapterLoader, "load", noted)

    async def crowd() -> list[Any]:
        asked = [ask(replica, loras.versions[0]) for _ in range(5)]
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(error) for error in run(crowd())] == [AdapterError] * 5
    assert len(loaded) == 1


def test_who_brings_an_adapter_may_leave_or_be_refused(
    loras: Loras, make: Callable[..., Replica]
) -> None:
    """Others who wait for the same one are answered."""
    replica, version = make(), loras.versions[0]

    async def crowd() -> None:
        leaver = asyncio.create_task(ask(replica, version))
        refused = asyncio.create_task(ask(replica, loras.versions[1], max_tokens=10**6))
        await asyncio.sleep(0)
        others = [asyncio.create_task(ask(replica, v)) for v in loras.versions[:2] * 2]
        await asyncio.sleep(0)
        leaver.cancel()
        with pytest.raises(RequestError, match="maximum context length"):
            await refused
        assert len({output.token_ids for output in await asyncio.gather(*others)}) == 1
        assert (await replica.stats()).running == 0

    run(crowd())


def test_an_adapter_is_let_go_where_the_loop_ends_with_its_request(
    loras: Loras, make: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = make(room=1.5)
    submitted = EngineThread.submitted

    @asynccontextmanager
    async def all_there(self: EngineThread, request: GenerationRequest) -> Any:
        async with submitted(self, request) as outputs:
            time.sleep(0.2)  # noqa: ASYNC251 (the answer is whole before the loop looks again)
            yield outputs

    monkeypatch.setattr(EngineThread, "submitted", all_there)
    for version in loras.versions[:2]:
        run(ask(replica, version))
    assert replica.adapters == [loras.versions[1].ref]
