"""One replica without Ray: more adapters than room, and grammars beside the engine."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from replicas import COUNT, Loras, ask, run
from rewriting import rewritten
from safetensors.torch import load_file, save_file

from cluster.adapter_folder import WEIGHTS
from cluster.errors import CopyChangedError, RequestError, UnavailableError
from cluster.registry import AdapterVersion
from serving.engine import EngineStats, ResponseFormat, TokenOutput
from serving.engine.grammar import Grammars
from serving.engine_thread import Outputs
from serving.replica import Replica


def test_more_adapters_than_room_take_turns(loras: Loras, make: Callable[..., Replica]) -> None:
    """Twice over, all at once; nothing else than the room is ever used, nobody is refused."""
    replica = make(room=2.5)

    async def everybody() -> list[TokenOutput]:
        asked = [ask(replica, version) for version in [None, *loras.versions] * 2]
        return await asyncio.gather(*asked)

    alone, *others = run(everybody())[: COUNT + 1]
    assert {output.token_ids for output in others} != {alone.token_ids}
    assert len({output.token_ids for output in others}) == 1, "it is one adapter"
    stats = run(replica.stats())
    assert stats.adapters == 2
    assert stats.adapter_evictions >= COUNT - 2
    assert stats.adapter_bytes == 2 * loras.adapter_bytes


def test_five_hundred_adapters_over_room_for_two(
    loras: Loras, make: Callable[..., Replica]
) -> None:
    """The least recently used leaves for another; nothing grows with the number of names."""
    replica = make(room=2.5)
    a0, a1, a2 = loras.versions[:3]
    many = [replace(loras.versions[n % COUNT], name=f"many-{n}") for n in range(500)]

    async def all_of(versions: list[AdapterVersion]) -> tuple[EngineStats, set[tuple[int, ...]]]:
        asked = [ask(replica, version, max_tokens=1) for version in versions]
        answers = await asyncio.gather(*asked)
        return await replica.stats(), {answer.token_ids for answer in answers}

    async def course() -> None:
        for version in (*loras.versions, a0, a1, a0, a2):
            await ask(replica, version)
        assert replica.adapters == [a0.ref, a2.ref]
        before, right = await all_of(many[:20])
        memory = psutil.Process().memory_info().rss
        after, answers = await all_of(many[20:])
        assert answers == right
        assert psutil.Process().memory_info().rss - memory < 30 * 2**20
        assert len(replica.adapters) == after.adapters == 2
        assert after.adapter_bytes == 2 * loras.adapter_bytes
        assert after.adapter_loads - before.adapter_loads == 480
        assert after.adapter_evictions - before.adapter_evictions == 480
        assert after.adapter_hits == before.adapter_hits
        held = [each for each in many if each.ref in replica.adapters]
        again, _ = await all_of(held * 3)
        assert again.adapter_hits - after.adapter_hits == 6
        assert again.adapter_loads == after.adapter_loads

    run(course())


def test_adapters_that_are_never_idle_make_room_for_one_that_waits(
    loras: Loras, make: Callable[..., Replica]
) -> None:
    replica = make(room=1.5)
    hot, cold = loras.versions[:2]

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


def test_a_copy_that_is_replaced_while_it_is_loaded(
    loras: Loras, make: Callable[..., Replica], tmp_path: Path
) -> None:
    """It is the adapter's answer or none, never that of what lies there now."""
    replica = make(room=1.5)  # so each of two in turn is loaded anew
    version, other = loras.versions[:2]
    right, base = (run(ask(replica, v)).token_ids for v in (version, None))
    weights = loras.folder / "cache" / version.content_hash / WEIGHTS
    content = weights.read_bytes()
    save_file({k: 0 * v for k, v in load_file(weights).items()}, tmp_path / WEIGHTS)
    refused = list[str]()
    with rewritten(weights, (tmp_path / WEIGHTS).read_bytes(), content):
        for _ in range(30):
            try:
                answer = run(ask(replica, version))
            except CopyChangedError as error:  # changed again while it was tried again
                refused.append(error.message)
            else:
                assert right == answer.token_ids != base
            assert run(ask(replica, other)).token_ids == right, "it is another's file"
    assert all("was changed while it was read" in message for message in refused)
    assert run(ask(replica, version)).token_ids == right


def test_whoever_calls_while_the_engine_ends_is_refused(make: Callable[..., Replica]) -> None:
    """Also when its last commands are done and its thread is not."""
    replica, ending, end = make(), threading.Event(), threading.Event()

    class Held(dict[str, Outputs]):
        def clear(self) -> None:
            ending.set()
            assert end.wait(60)

    replica._thread._listeners = Held()
    stopping = threading.Thread(target=replica.stop)
    stopping.start()
    try:
        assert ending.wait(60)
        for ask_of in (replica.check_health, replica.stats, lambda: ask(replica, None)):
            with pytest.raises(UnavailableError, match="has stopped"):
                run(ask_of())
        assert stopping.is_alive()
    finally:
        end.set()
        stopping.join()


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
