"""A client of an engine in its own process: the service's answers, piece by piece, and an end."""

import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import structlog
from commands import Command, graft
from service import Running, publish, running

from cluster.errors import (
    AuthenticationError,
    BaseModelError,
    DeadlineError,
    ModelNotFoundError,
    RequestError,
    SpecError,
    UnavailableError,
)
from cluster.spec import parse_spec
from cluster.tables import open_table, write_table
from serving.client import AsyncClient, Client
from serving.keys import KeyStore
from serving.local import local_spec
from serving.spec import ServingSpec

Bases = Callable[[str], Path]
GREEDY: Any = {"max_tokens": 6, "ignore_eos": True}
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def service(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    with running(bases("llama"), folder) as service:
        publish(service.registry, bases("llama"), folder, "lora")
        yield service


@pytest.fixture(scope="module")
def local(bases: Bases, service: Running) -> Iterator[Client]:
    with Client.local(bases("llama"), store=service.registry.store.uri) as client:
        yield client


def transport(client: Client) -> Any:
    return client._async._connection._http._transport


def engines() -> int:
    return sum(thread.name == "engine" for thread in threading.enumerate())


def test_the_answers_are_the_services(local: Client, service: Running) -> None:
    prompts: list[Any] = ["hello", [104, 105], CHAT]
    with Client(service.url) as client:
        for adapter in ("lora", None):
            expected = client.generate(prompts, adapter=adapter, **GREEDY)
            assert local.generate(prompts, adapter=adapter, **GREEDY) == expected
        assert local.chat(CHAT, **GREEDY) == client.chat(CHAT, **GREEDY)
        assert (local.embed(["hi"], adapter="lora") == client.embed(["hi"], adapter="lora")).all()
    assert [card.id for card in local.models()] == ["base", "lora"]
    with pytest.raises(ModelNotFoundError, match="did you mean 'lora'"):
        local.generate(["x"], adapter="loras")
    with pytest.raises(RequestError):
        list(local.stream("x", top_k=0))


@pytest.fixture
def gate(local: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The engine stands still behind its fourth step, until this is set."""
    engine = transport(local)._replica._thread.engine
    step, steps, goes_on = engine.step, 0, threading.Event()

    def halting() -> Any:
        nonlocal steps
        steps += 1
        assert steps <= 4 or goes_on.wait(30), "nobody lets the engine go on"
        return step()

    monkeypatch.setattr(engine, "step", halting)
    yield goes_on
    goes_on.set()
    is_done(local)


def is_done(local: Client) -> None:
    """Wait until nothing is asked of the engine any more."""
    service, deadline = transport(local), time.monotonic() + 30
    while service._calls or local._loop.wait(service._replica.stats).running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def made(local: Client) -> int:
    return local._loop.wait(transport(local)._replica.stats).generated_tokens


def test_a_stream_comes_piece_by_piece(local: Client, gate: threading.Event) -> None:
    """Its first piece while the engine stands still."""
    asked: Any = {"adapter": "lora", "max_tokens": 40, "ignore_eos": True}
    stream = local.stream("hello", **asked)
    first = next(stream)
    assert not gate.is_set()
    gate.set()
    whole = first + "".join(stream)
    assert len(first) < len(whole)
    assert whole == local.generate_one("hello", **asked).text


def test_a_stream_that_is_left_ends_in_the_engine(local: Client) -> None:
    stream: Any = local.stream("hello", max_tokens=100, ignore_eos=True)
    next(stream)
    stream.close()
    is_done(local)


def test_what_is_given_up_ends_in_the_engine(local: Client, gate: threading.Event) -> None:
    """By who asked, or because it took too long; before it has begun to answer."""
    asked: Any = {"adapter": "lora", "max_tokens": 100, "ignore_eos": True}
    service, before = transport(local), made(local)

    async def hasty(timeout_s: float) -> None:
        client = AsyncClient(transport=service, timeout_s=timeout_s, max_attempts=1)
        await client.generate_one("hello", **asked)

    async def cancelled() -> None:
        task = asyncio.create_task(hasty(60))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with pytest.raises(DeadlineError, match=r"nothing came for 0\.2 s"):
        local._loop.wait(lambda: hasty(0.2))
    local._loop.wait(cancelled)
    gate.set()
    is_done(local)
    assert made(local) - before < 50


def test_an_answer_that_breaks_off_is_told(local: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})
        raise RuntimeError("a fault of ours")

    async def ask() -> None:
        client = AsyncClient(transport=transport(local), timeout_s=30, max_attempts=1)
        await client.generate_one("hello", adapter="lora")

    monkeypatch.setattr(transport(local), "_app", breaks)
    with (
        structlog.testing.capture_logs() as lines,
        pytest.raises(UnavailableError, match="ended before it was whole"),
    ):
        local._loop.wait(ask)
    is_done(local)
    assert [line["error"] for line in lines] == ["RuntimeError: a fault of ours"]


def spec_of(base: Path, folder: Path, **gateway: Any) -> ServingSpec:
    tree = {
        "name": "tiny", "store": str(folder / "store"), "engine": {"base_model": str(base)},
        "gateway": gateway,
    }  # fmt: skip
    return parse_spec(ServingSpec, tree)


def test_a_spec_counts_as_in_a_service(bases: Bases, tmp_path: Path) -> None:
    """Its keys, say; but who only asks does not write to the store."""
    _, key = KeyStore(str(tmp_path / "keys")).create("someone")
    spec = spec_of(bases("llama"), tmp_path, keys=str(tmp_path / "keys"))
    with Client.local(spec, api_key=key) as client:
        assert client.generate_one("hello", **GREEDY).completion_tokens == 6
        assert [card.id for card in client.models()] == ["tiny"]
        assert "imports" not in {thread.name for thread in threading.enumerate()}
        client._async._connection._http.headers["Authorization"] = f"Bearer {key}x"
        with pytest.raises(AuthenticationError):
            client.generate_one("hello", **GREEDY)


@pytest.mark.parametrize(
    ("gateway", "fault"),
    [({"traces": "http://127.0.0.1:9"}, r"raygraft\[otel\]"), ({"keys": "gone://keys"}, "gone")],
)
def test_a_start_that_fails_leaves_no_engine_behind(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gateway: Any, fault: str
) -> None:
    monkeypatch.setattr("serving.app._can_trace", lambda: False)
    gc.collect()
    before = engines()
    with pytest.raises(SpecError, match=fault):
        Client.local(spec_of(bases("llama"), tmp_path, **gateway))
    assert engines() == before


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_whole_file(local: Client, tmp_path: Path, kind: str) -> None:
    names = ["lora", "base", "nobody"]
    table = pa.table(
        {
            "prompt": [f"question {i}" for i in range(60)],
            "adapter": [names[i % 3] for i in range(60)],
        }
    )
    write_table(table, tmp_path / f"in.{kind}")
    report = local.generate_file(
        tmp_path / f"in.{kind}", tmp_path / f"out.{kind}", adapter_column="adapter",
        progress=False, **GREEDY,
    )  # fmt: skip
    assert (report.rows, report.failed) == (60, 20)
    for row in open_table(tmp_path / f"out.{kind}").to_pylist()[:3]:
        if row["adapter"] == "nobody":
            assert "nobody" in row["error"]
        else:
            alone = local.generate_one(row["prompt"], adapter=row["adapter"], **GREEDY)
            assert row["completion"] == alone.text


def test_closing_ends_the_engine_and_whatever_it_was_doing(bases: Bases, tmp_path: Path) -> None:
    gc.collect()
    before = engines()
    client = Client.local(bases("llama"), store=str(tmp_path / "store"))
    assert engines() == before + 1
    stream: Any = client.stream("hello", max_tokens=100, ignore_eos=True)
    next(stream)
    client.close()
    assert engines() == before
    with pytest.raises(SpecError, match="concurrency"):
        Client.local(bases("llama"), store=str(tmp_path / "store"), concurrency=0)
    assert engines() == before, "nobody was left to close it"


def test_asynchronously(bases: Bases, tmp_path: Path) -> None:
    async def run() -> int:
        store = str(tmp_path / "store")
        async with AsyncClient.local(bases("llama"), store=store) as client:
            answers = await client.generate([f"question {i}" for i in range(20)], **GREEDY)
            pieces = [piece async for piece in client.stream("question 7", **GREEDY)]
            assert "".join(pieces) == answers[7].text
        return len(answers)

    before = engines()
    assert asyncio.run(run()) == 20
    assert engines() == before


def test_what_is_no_base_and_no_spec_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError):
        Client.local(tmp_path / "empty")
    with pytest.raises(SpecError, match=r"gone\.yaml: cannot be read"):
        Client.local(tmp_path / "gone.yaml")


def test_a_spec_is_read_from_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base's folder or a YAML, of the home folder too, or a spec that is there already; what
    overrides it is checked in each."""
    (tmp_path / "base").mkdir()
    (tmp_path / "spec.yaml").write_text("engine: {base_model: /base}\nname: mine\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    of_folder, of_file = local_spec("~/base"), local_spec("~/spec.yaml")
    assert (of_folder.name, of_folder.engine.base_model) == ("base", "~/base")
    assert (of_file.name, of_file.engine.base_model) == ("mine", "/base")
    for source in ("~/base", "~/spec.yaml", of_file):
        assert local_spec(source, ["store=s3://elsewhere"]).store == "s3://elsewhere"
        with pytest.raises(SpecError, match="stores"):
            local_spec(source, ["stores=elsewhere"])


def test_on_the_command_line(bases: Bases, service: Running, tmp_path: Path) -> None:
    """By a spec, and without Ray; nothing but the report is on stdout."""
    write_table(pa.table({"prompt": ["hello", "hi"]}), tmp_path / "in.jsonl")
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"name: tiny\nengine:\n  base_model: {bases('llama')}\n")
    command = "from cluster.cli import main; import sys; main(); assert 'ray' not in sys.modules"
    result = subprocess.run(
        [sys.executable, "-c", command, "generate", tmp_path / "in.jsonl", tmp_path / "out.jsonl",
         "--adapter", "lora", "--max-tokens", "6", "--quiet", "--local", spec,
         "--set", f"store={service.registry.store.uri}"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    (line,) = [line for line in result.stdout.splitlines() if "accelerator" not in line]
    assert "out.jsonl: 2 rows" in line
    with Client(service.url) as client:
        expected = client.generate(["hello", "hi"], adapter="lora", max_tokens=6)
    found = open_table(tmp_path / "out.jsonl")["completion"].to_pylist()
    assert found == [answer.text for answer in expected]


def test_an_interrupted_command_keeps_its_answers(bases: Bases, tmp_path: Path) -> None:
    write_table(pa.table({"id": range(80), "prompt": ["hello"] * 80}), tmp_path / "in.arrow")
    journal = tmp_path / "out.arrow.partial"
    command = ("generate", tmp_path / "in.arrow", tmp_path / "out.arrow", "--local",
               bases("llama"), "--concurrency", 4, "--max-tokens", 32, "--quiet")  # fmt: skip
    with Command(*command) as interrupted:
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_text().count("\n") < 20:
            assert not interrupted.is_over(), interrupted.said
            assert time.monotonic() < deadline, interrupted.said
            time.sleep(0.01)
        interrupted.process.send_signal(signal.SIGINT)
        ended = interrupted.wait()
    assert ended.code == 130, ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "out.arrow").exists()
    told = graft(*command)
    kept = re.search(r"80 rows.* (\d+) of them kept from before", told)
    assert kept is not None, told
    assert 19 <= int(kept[1]) < 80
    assert open_table(tmp_path / "out.arrow")["id"].to_pylist() == list(range(80))
