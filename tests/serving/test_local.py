"""A client of an engine in its own process: the service's answers, piece by piece, and an end."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from service import Running, publish, running

from cluster.errors import BaseModelError, ModelNotFoundError, RequestError, SpecError
from cluster.tables import open_table, write_table
from serving.client import AsyncClient, Client

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
        list(local.stream("x", top_k=-1))


def test_a_stream_comes_piece_by_piece(local: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first piece while the engine stands still behind its fourth step."""
    asked: Any = {"adapter": "lora", "max_tokens": 40, "ignore_eos": True}
    whole = local.generate_one("hello", **asked).text
    engine = transport(local)._replica._thread.engine
    step, steps, goes_on, waits = engine.step, 0, threading.Event(), list[bool]()

    def halting() -> Any:
        nonlocal steps
        steps += 1
        if steps > 4:
            waits.append(goes_on.wait(30))
        return step()

    monkeypatch.setattr(engine, "step", halting)
    stream = local.stream("hello", **asked)
    first = next(stream)
    goes_on.set()
    assert first + "".join(stream) == whole
    assert len(first) < len(whole)
    assert all(waits), "it was not there until the engine went on"


def test_a_stream_that_is_left_ends_in_the_engine(local: Client) -> None:
    stream: Any = local.stream("hello", max_tokens=100, ignore_eos=True)
    next(stream)
    stream.close()
    service, deadline = transport(local), time.monotonic() + 30
    while service._calls or local._loop.wait(service._replica.stats).running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
