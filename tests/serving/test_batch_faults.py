"""A batch file where all rows have one fault: a service that is away, a name, an option or a key
that is none. Beside them, rows that have one of their own."""

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pytest
from adapters import make_adapter
from service import BASE_NAME, Running

from cluster.cli import main
from cluster.errors import (
    AuthenticationError,
    GraftError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    SpecError,
    StoreError,
    UnavailableError,
)
from cluster.tables import write_table
from serving.asking import Generation
from serving.async_client import AsyncClient
from serving.batch_file import BatchReport
from serving.client import Client
from serving.outage import Outage
from serving.progress import progress_bar
from serving.protocol import ModelCard

GREEDY: Any = {"max_tokens": 4, "progress": False}
GOOD = {"choices": [{"text": "ok", "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1}}  # fmt: skip
CARD = {"id": "a", "created": 0, "root": "a"}
Fault = Callable[[], httpx2.Response]


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[Client]:
    with Client(service.url, concurrency=1) as client:
        yield client


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "in.jsonl", *(f"row {i}" for i in range(20)))


def written(path: Path, *prompts: Any) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def error(status: int, code: str, **headers: str) -> httpx2.Response:
    body = {"error": {"message": f"it is {code}", "type": "t", "code": code, "param": None}}
    return httpx2.Response(status, json=body, headers=headers)


def refused() -> httpx2.Response:
    raise httpx2.ConnectError("connection refused")


FAULTS: dict[str, Fault] = {
    "no connection": refused,
    "429": lambda: error(429, "rate_limit_exceeded", **{"Retry-After": "0"}),
    "502": lambda: httpx2.Response(502, text="<html>bad gateway</html>"),
    "503": lambda: error(503, "unavailable", **{"Retry-After": "0"}),
    "store": lambda: error(503, "store_unavailable"),
    "cut": lambda: httpx2.Response(200, content=b'{"choices": [{"te'),
}


class Failing(httpx2.AsyncBaseTransport):
    """In a service's place: answers so many rows, and has the fault until it is mended."""

    def __init__(self, fault: Fault, good: int) -> None:
        self.fault, self.good = fault, good
        self.faults = self.rows = 0
        self.mends_s = float("inf")

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(0.001)
        if request.method == "POST" and self.rows >= self.good and time.monotonic() < self.mends_s:
            self.faults += 1
            return self.fault()
        self.rows += request.method == "POST"
        return httpx2.Response(200, json=GOOD if request.method == "POST" else CARD)

    def answer(self, source: Path, **options: Any) -> BatchReport:
        """The file's rows, by a client of many workers which repeats nothing of its own accord."""

        async def run() -> BatchReport:
            async with AsyncClient(transport=self, max_attempts=1, concurrency=64) as client:
                target = source.with_name("out.jsonl")
                return await client.generate_file(source, target, adapter="a", **options)

        return asyncio.run(run())


@pytest.mark.parametrize("kind", FAULTS)
def test_an_outage_is_waited_out_by_all_workers_together(source: Path, kind: str) -> None:
    """It fails no row, costs no attempt, and the service is left alone meanwhile."""
    service = Failing(FAULTS[kind], good=5)
    service.mends_s = time.monotonic() + 1
    report = service.answer(source, progress=False)
    assert (report.rows, report.failed, report.completion_tokens) == (20, 0, 20)
    assert 2 <= service.faults <= 45, "each of the rows on its own would ask much more often"
    assert sorted(path.name for path in source.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_an_outage_that_is_too_long_ends_the_call_and_keeps_its_answers(source: Path) -> None:
    service = Failing(FAULTS["503"], good=7)
    with pytest.raises(UnavailableError, match=r"it is unavailable .*the same call goes on"):
        service.answer(source, progress=False, outage_s=0.5)
    assert not source.with_name("out.jsonl").exists()
    service.mends_s = 0
    report = service.answer(source, progress=False, outage_s=0.5)
    assert (report.rows, report.failed, report.resumed) == (20, 0, 7)
    assert service.rows == 20


def test_a_service_that_is_never_there_leaves_nothing_behind(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line."""
    target = source.with_name("out.jsonl")
    command = ["graft", "generate", str(source), str(target), "--url", "http://127.0.0.1:9"]
    monkeypatch.setattr("sys.argv", [*command, "--quiet", "--outage-s", "0.3"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 5
    assert "is the service running? (nothing was answered for" in capsys.readouterr().err
    assert [path.name for path in source.parent.iterdir()] == ["in.jsonl"]


def test_an_outage_by_the_clock() -> None:
    """It begins with the first failure behind an answer, is told once, and is not over as long as
    a request is under way; nor is it waited for where the service asks for more than there is."""
    now, told = 0.0, list[str]()
    outage = Outage(10, told.append, clock=lambda: now)

    async def fail(at_s: float, failure: GraftError | None) -> GraftError | None:
        nonlocal now
        outage._not_before_s = now  # nobody waits here
        try:
            async with outage.attempt():
                now = at_s
                if failure is not None:
                    raise failure
        except GraftError as error:
            return error
        return None

    async def run() -> None:
        away = UnavailableError("away")
        assert await fail(100, None) is None
        assert await fail(200, away) is away
        for at_s in (204, 206, 208):
            assert await fail(at_s, OverloadedError("full", retry_after_s=0)) is not None
        assert told == ["full"]
        async with outage.attempt():
            assert await fail(211, away) is away
        assert await fail(211, away) is away
        last = await fail(221, away)
        assert isinstance(last, UnavailableError)
        assert last.message.startswith("away (nothing was answered for 10 s)")
        assert not last.retryable
        assert await fail(300, RequestError("a row's own")) is not None
        assert await fail(301, StoreError("away")) is not None
        late = await fail(302, OverloadedError("full", retry_after_s=9))
        assert late is not None
        assert not late.retryable

    asyncio.run(run())


def test_pauses_are_of_all_and_grow() -> None:
    now = 0.0
    outage = Outage(1e9, lambda _: None, clock=lambda: now)

    async def pause_s(requests: int) -> float:
        nonlocal now
        now = outage._not_before_s if now else 1.0

        async def fail() -> None:
            with suppress(UnavailableError):
                async with outage.attempt():
                    await asyncio.sleep(0)
                    raise UnavailableError("away")

        await asyncio.gather(*(fail() for _ in range(requests)))
        return outage._not_before_s - now

    async def run() -> list[float]:
        return [await pause_s(8) for _ in range(2000)]

    pauses_s = asyncio.run(run())
    assert all(0.1 * 2**i <= pause_s <= 0.2 * 2**i for i, pause_s in enumerate(pauses_s[:5]))
    assert all(5 <= pause_s <= 10 for pause_s in pauses_s[6:])


def test_a_key_that_is_refused_ends_the_call_and_keeps_its_answers(source: Path) -> None:
    service = Failing(lambda: error(401, "invalid_api_key"), good=7)
    with pytest.raises(AuthenticationError):
        service.answer(source, progress=False)
    assert not source.with_name("out.jsonl").exists()
    service.mends_s = 0
    assert service.answer(source, progress=False).resumed >= 7


def test_an_adapter_that_goes_away_ends_the_call(source: Path) -> None:
    service = Failing(lambda: error(404, "model_not_found"), good=7)
    with pytest.raises(ModelNotFoundError):
        service.answer(source, progress=False)
    service.mends_s = 0
    assert service.answer(source, progress=False).resumed >= 7


def test_a_version_that_is_gone_is_told_by_the_name_that_stood_for_it(
    service: Running, client: Client, bases: Callable[[str], Path], source: Path
) -> None:
    """Where the call goes on, and with the file to delete."""
    folder = make_adapter("lora", bases("llama"), source.with_name("lora"))
    service.registry.publish("brief", folder)
    answer, target = client._async.generate_one, source.with_name("out.jsonl")

    async def failing(*args: Any, **options: Any) -> Generation:
        if target.with_name("out.jsonl.partial").read_text().count("completion"):
            raise UnavailableError("away")
        return await answer(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client._async, "generate_one", failing)
        with pytest.raises(UnavailableError, match="away"):
            client.generate_file(source, target, adapter="brief", **GREEDY)
    store = service.registry.store.local_path()
    assert store is not None
    shutil.rmtree(store / "adapters" / "brief")
    service.service.catalogue.refresh()
    told = r"'brief' stood for brief@1 when the first row was asked; delete .*out.jsonl.partial"
    with pytest.raises(ModelNotFoundError, match=told):
        client.generate_file(source, target, adapter="brief", **GREEDY)


def test_a_name_is_asked_once(client: Client, source: Path) -> None:
    """Also one that is none."""
    rows = [{"prompt": f"p{n}", "model": "lora" if n % 2 else "nobody"} for n in range(20)]
    write_table(pa.Table.from_pylist(rows), source.with_name("named.jsonl"))
    model, asked = client._async.model, list[str]()

    async def counted(name: str) -> ModelCard:
        asked.append(name)
        return await model(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client._async, "model", counted)
        report = client.generate_file(
            source.with_name("named.jsonl"), source.with_name("out.jsonl"),
            adapter_column="model", **GREEDY,
        )  # fmt: skip
    assert (report.failed, sorted(asked)) == (10, ["lora", "nobody"])


@pytest.mark.parametrize(
    ("wrong", "kind", "told"),
    [
        ({"adapter": "lroa"}, ModelNotFoundError, "did you mean 'lora'"),
        ({"adapter": "lora@7"}, ModelNotFoundError, "lora@7"),
        ({"adapter": "lora:0.5+lora@1:0.5"}, RequestError, "a second time"),
        ({"temperature": 5}, RequestError, "temperature"),
        ({"tools": [{}]}, RequestError, "tools: are called in a chat"),
        ({"n": 2}, RequestError, "n is 2, and each prompt gets one answer"),
    ],
)
def test_what_is_wrong_with_every_row_is_raised_at_once(
    client: Client, service: Running, source: Path, wrong: Any, kind: type[GraftError], told: str
) -> None:
    """And leaves nothing that the right call would run into."""
    before, target = service.stats.generated_tokens, source.with_name("out.jsonl")
    with pytest.raises(kind, match=told):
        client.generate_file(source, target, **{"adapter": "lora", **GREEDY, **wrong})
    assert [path.name for path in source.parent.iterdir()] == ["in.jsonl"]
    assert service.stats.generated_tokens == before


@pytest.mark.parametrize("adapter", ["lora@1", "lora:stable", "lora:0.7+bitfit:-0.3", BASE_NAME])
def test_whatever_a_request_can_name_a_file_can(
    client: Client, tmp_path: Path, adapter: str
) -> None:
    source = written(tmp_path / "in.jsonl", "hi")
    assert client.model(adapter).id == adapter
    target = tmp_path / "out.jsonl"
    assert client.generate_file(source, target, adapter=adapter, **GREEDY).failed == 0


def test_an_option_that_one_row_cannot_have_is_its_error(service: Running, tmp_path: Path) -> None:
    """Wherever the row is, and however many are asked at once."""
    chat = [{"role": "user", "content": "hi"}]
    prompts = [chat, "x" * 500, chat, *["hi"] * 20, chat]
    source, target = written(tmp_path / "in.jsonl", *prompts), tmp_path / "out.jsonl"
    with Client(service.url, concurrency=64) as client:
        options: Any = {"adapter": "lora", "logprobs": 5, **GREEDY}
        assert client.generate_file(source, target, **options).failed == 4
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["error"] and row["error"].split()[0] for row in rows] == [
        "logprobs:", "this", "logprobs:", *[None] * 20, "logprobs:",
    ]  # fmt: skip


def test_a_rank_that_one_adapter_lacks_is_the_rows_error(service: Running, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "hi", "model": "lora"}] * 20
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Client(service.url) as client:
        options: Any = {"adapter_column": "model", "adapter_rank": 1, **GREEDY}
        assert client.generate_file(source, target, **options).failed == 20


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda: httpx2.Response(200, html="<p>welcome</p>"), "200, with a web page; is this the"),
        (lambda: httpx2.Response(301, headers={"Location": "https://a"}), "301, with another add"),
    ],
)
def test_what_is_no_service_is_told_at_once(source: Path, fault: Fault, told: str) -> None:
    class Elsewhere(Failing):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            return fault()

    with pytest.raises(SpecError, match=told):
        Elsewhere(fault, good=0).answer(source, progress=False)
    assert [path.name for path in source.parent.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    "wrong", [{"base_url": "localhost:8000"}, {"api_key": "graft\nkey"}], ids=str
)
def test_an_address_or_a_key_that_cannot_be_sent_is_told_at_once(
    service: Running, source: Path, wrong: dict[str, str]
) -> None:
    with pytest.raises(SpecError), Client(**{"base_url": service.url, **wrong}) as client:
        client.generate_file(source, source.with_name("out.jsonl"), **GREEDY)


def test_one_prompt_has_one_answer(client: Client) -> None:
    for ask in (client.generate_one, lambda *a, **k: list(client.stream(*a, **k))):
        with pytest.raises(RequestError, match="n is 3, and each prompt gets one") as caught:
            ask("hi", adapter="lora", n=3)
        assert caught.value.param == "n"
    assert client.generate(["hi"], n=1, max_tokens=2)[0].completion_tokens  # type: ignore[call-arg]


def test_waiting_is_told_beside_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    for enabled in (True, False):
        with progress_bar("in.jsonl", 3, 0, enabled=enabled) as bar:
            bar.wait("the service [a] is away")
        assert ("in.jsonl: waiting: the service [a] is away" in capsys.readouterr().err) == enabled
