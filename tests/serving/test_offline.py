"""Offline answers are the service's, row by row; an output takes each part once."""

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adapters import make_adapter
from service import BASE_NAME, CATALOGUE_TTL_S, NAMES, Running

from cluster.catalog import Catalog
from cluster.errors import (
    ConflictError,
    DataError,
    JobFailedError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    StoreError,
)
from cluster.registry import Registry
from cluster.table_parts import TableSource
from cluster.table_rows import BadRow
from cluster.tables import open_table, write_table
from serving.batch_file import BatchReport, added_columns
from serving.client import Client
from serving.journal import RowResult
from serving.offline import pool
from serving.offline.answering import Asked, answer_rows
from serving.offline.output import Counts, Output, Plan, check_same
from serving.spec import EngineSpec, ServingSpec

CHAT = [{"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {"max_tokens": 6}
DRAWN: dict[str, Any] = {**GREEDY, "temperature": 1.0, "top_p": 0.9, "seed": 7, "stop": ["e"]}
ADDED = ("completion", "finish_reason", "prompt_tokens", "completion_tokens", "error")


def answer(
    service: Running, asked: Asked, rows: Sequence[dict[str, Any] | BadRow]
) -> list[RowResult]:
    return asyncio.run(answer_rows(service.service, asked, rows, 100, concurrency=5))


@pytest.mark.parametrize("options", [GREEDY, DRAWN])
def test_answers_are_those_of_the_service(
    service: Running, tmp_path: Path, options: dict[str, Any]
) -> None:
    names = [BASE_NAME, *NAMES, None, "lora@1", "lora:stable", "lroa"]
    rows = [{"prompt": f"row {i}", "model": names[i % len(names)]} for i in range(20)]
    rows += [{"prompt": "", "model": "lora"}, {"prompt": None, "model": "lora"},
             {"prompt": "x" * 500, "model": "lora"}]  # fmt: skip
    write_table(pa.Table.from_pylist(rows), tmp_path / "in.arrow")
    with Client(service.url) as client:
        client.generate_file(
            tmp_path / "in.arrow", tmp_path / "out.arrow", adapter_column="model", **options
        )
    expected = open_table(tmp_path / "out.arrow").to_pylist()
    found = answer(service, Asked("prompt", None, "model", options, seed=1), rows)
    assert [result.row for result in found] == list(range(100, 100 + len(rows)))
    for result, row in zip(found, expected, strict=True):
        told = {name: getattr(result, name) for name in ADDED}
        if row["prompt"]:
            assert told == {name: row[name] for name in ADDED}
        else:
            assert "is empty or no text" in told["error"]
    assert sum(result.error is not None for result in found) == 5


def test_chats_are_rendered_as_the_service_does(service: Running) -> None:
    with Client(service.url) as client:
        (expected,) = client.generate([CHAT], adapter="lora", **GREEDY)
    rows = [{"messages": CHAT}, {"messages": [{"role": "nobody", "content": "x"}]}]
    good, bad = answer(service, Asked("messages", "lora", None, GREEDY, seed=1), rows)
    assert (good.completion, good.prompt_tokens) == (expected.text, expected.prompt_tokens)
    assert bad.error is not None
    assert bad.error.startswith("messages.0.role")


def test_without_a_seed_every_row_draws_by_its_own(service: Running) -> None:
    options = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    rows = [{"prompt": "same"}] * 6
    first, again, other = (
        [r.completion for r in answer(service, Asked("prompt", None, None, options, seed), rows)]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(set(first)) == len(rows)


def test_a_store_that_fails_is_no_rows_fault(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise StoreError("the store does not answer")

    monkeypatch.setattr("serving.offline.answering._TRIES", 2)
    monkeypatch.setattr(service.service.catalogue, "resolve", broken)
    with pytest.raises(StoreError):
        answer(service, Asked("prompt", "lora", None, GREEDY, seed=1), [{"prompt": "x"}])


def test_what_is_wrong_with_a_row_is_its_error_alone(service: Running) -> None:
    rows: list[dict[str, Any] | BadRow] = [
        {"prompt": "good", "model": "lora"},
        BadRow("is not JSON"),
        {"prompt": "\ud83d", "model": "lora"},
        {"prompt": "x", "model": "\ud83d"},
        {"prompt": "x", "model": "lora", "error": "its own"},
        {"prompt": "x", "model": "lora", "row": 3},
        {"prompt": "good", "model": "lora"},
    ]
    first, *bad, last = answer(service, Asked("prompt", None, "model", GREEDY, seed=1), rows)
    assert (first.error, last.error) == (None, None)
    assert first.completion == last.completion
    assert all(result.error for result in bad)
    assert bad[0].error == "row 101: is not JSON"
    assert all("half a surrogate pair" in str(bad[i].error) for i in (1, 2))
    assert "has a 'error' of its own" in str(bad[3].error)
    assert "has a 'row' of its own" in str(bad[4].error)
    chats = [{"messages": [{"role": "user", "content": text}]} for text in ("\ud83d", "hi")]
    wrong, right = answer(service, Asked("messages", "lora", None, GREEDY, seed=1), chats)
    assert "half a surrogate pair" in str(wrong.error)
    assert right.error is None


def test_an_adapter_that_cannot_be_loaded_fails_who_asked_for_it(
    service: Running, tmp_path: Path, bases: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = service.registry.publish
    damaged = publish("damaged", make_adapter("bottleneck", bases("llama"), tmp_path / "adapter"))
    store = service.registry.store.local_path()
    assert store is not None
    weights = store / f"adapters/damaged/{damaged.version:08d}/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    time.sleep(2 * CATALOGUE_TTL_S)
    rows = [{"prompt": "x", "model": name} for name in ("damaged", "lora")]
    asked = Asked("prompt", None, "model", GREEDY, seed=1)
    wrong, right = answer(service, asked, rows)
    assert "does not match its manifest's hash" in str(wrong.error)
    assert right.error is None

    def full(*_: object) -> None:
        raise OverloadedError("there is no room")

    monkeypatch.setattr("serving.offline.answering._TRIES", 1)
    monkeypatch.setattr(service.service.catalogue, "resolve", full)
    assert [result.error for result in answer(service, asked, rows)] == ["there is no room"] * 2


def test_an_engine_answers_part_after_part_with_adapters_that_are_cold(
    service: Running, tmp_path: Path, bases: Callable[[str], Path]
) -> None:
    registry = Registry(str(tmp_path / "store"))
    folder = make_adapter("lora", bases("llama"), tmp_path / "lora")
    names = [f"lora-{number}" for number in range(12)]
    for name in names:
        registry.publish(name, folder)
    rows = [{"prompt": "x", "model": name} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    source = TableSource(str(tmp_path / "in.parquet"))
    spec = ServingSpec(
        name=BASE_NAME, engine=EngineSpec(base_model=str(bases("llama"))),
        store=registry.store.uri,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    asked = Asked("prompt", None, "model", GREEDY, seed=1)
    engine = {"name": spec.name}
    plan = Plan(source.uri, source.files, engine, asked, registry.catalog(), source.parts(6))
    output = Output(str(tmp_path / "out"))
    output.begin(plan)
    own = pool._Engine(pool._document(spec, plan, output.uri))
    for place, part in enumerate(plan.parts):
        assert own.answer(place, part).failed == 0


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(10)]}), tmp_path / "in.parquet")
    source = TableSource(str(tmp_path / "in.parquet"))
    asked = Asked("prompt", "bot", None, GREEDY, seed=5)
    catalog = Catalog({"bot": [1, 2]}, {("bot", "stable"): 1})
    return Plan(source.uri, source.files, {"base_model": "b"}, asked, catalog, source.parts(4))


def test_a_part_is_written_once(plan: Plan, tmp_path: Path) -> None:
    output, source = Output(str(tmp_path / "out")), TableSource(plan.source)
    assert output.plan() is None
    output.begin(plan)
    assert output.plan() == plan
    for text in ("first", "second"):  # an engine died between the part and its mark
        for place, part in reversed(list(enumerate(plan.parts))):
            results = [
                RowResult(part.first_row + i, text, "stop", 2, 3, None if i else "bad")
                for i in range(part.num_rows)
            ]
            output.finish(place, part, source.read(part), results)
    counts = output.finished()
    assert sorted(counts) == [0, 1, 2]
    assert sum(each.failed for each in counts.values()) == 3
    found = pq.read_table(tmp_path / "out").to_pylist()
    assert [row["row"] for row in found] == list(range(10))
    assert [row["prompt"] for row in found] == [f"p{i}" for i in range(10)]
    assert {row["completion"] for row in found} == {"first"}


def test_a_run_is_whole_or_says_what_lacks(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Also, with its bar: without a part that is left, no cluster is joined."""
    write_table(pa.table({"prompt": [f"p{i}" for i in range(10)]}), tmp_path / "in.jsonl")
    spec = ServingSpec(
        name="tiny",
        store=str(tmp_path / "store"),
        engine=EngineSpec(base_model=str(bases("llama"))),
    )
    output = Output(str(tmp_path / "out"))
    monkeypatch.setenv("COLUMNS", "300")

    def run() -> BatchReport:
        return pool.generate_offline(
            spec, str(tmp_path / "in.jsonl"), output.uri, adapter=None, adapter_column=None,
            options=GREEDY, address=None, part_rows=4, progress=True,
        )  # fmt: skip

    def elsewhere(*_: object) -> Generator[tuple[int, Counts]]:
        """Engines on other nodes, whose disks are not ours."""
        yield from ((place, Counts(1, 2, 3)) for place in range(3))

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_answered", elsewhere)
        with pytest.raises(JobFailedError, match=r"3 of 3 parts are not here.* 0 to 3.*share"):
            run()
    assert "10/10" in capsys.readouterr().err
    plan, source = output.plan(), TableSource(str(tmp_path / "in.jsonl"))
    assert plan is not None
    for place, part in enumerate(plan.parts):
        results = [RowResult(part.first_row + i, "x", "stop", 2, 3) for i in range(part.num_rows)]
        output.finish(place, part, source.read(part), results)
    report = run()
    assert (report.rows, report.resumed, report.failed) == (10, 10, 0)
    assert "10/10" in capsys.readouterr().err


def test_one_adapter_for_all_rows_is_looked_for_before_anything_starts(
    service: Running, tmp_path: Path, bases: Callable[[str], Path]
) -> None:
    write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "in.jsonl")
    engine = EngineSpec(base_model=str(bases("llama")))
    spec = ServingSpec(name=BASE_NAME, store=service.registry.store.uri, engine=engine)

    def plan(adapter: str, name: str) -> Plan:
        output, source = Output(str(tmp_path / name)), str(tmp_path / "in.jsonl")
        return pool._plan(spec, output, source, adapter, None, GREEDY, 4)

    assert plan("lora:0.5+bitfit:0.5", "out").asked.adapter == "lora:0.5+bitfit:0.5"
    with pytest.raises(ModelNotFoundError, match="did you mean 'lora'"):
        plan("lroa", "none")
    assert Output(str(tmp_path / "none")).plan() is None


def test_calls_of_tools_have_a_column_of_their_own(plan: Plan, tmp_path: Path) -> None:
    """A run without tools has none."""
    source, calls = TableSource(plan.source), '[{"id": "c"}]'
    for name, options in (("with", {"tools": [{}]}), ("without", {})):
        output = Output(str(tmp_path / name))
        for place, part in enumerate(plan.parts):
            rows = range(part.first_row, part.first_row + part.num_rows)
            results = [RowResult(row, "x", "stop", 2, 3, tool_calls=calls) for row in rows]
            output.finish(place, part, source.read(part), results, added_columns(options))
    assert pq.read_table(tmp_path / "with")["tool_calls"].to_pylist() == [calls] * 10
    assert "tool_calls" not in pq.read_table(tmp_path / "without").column_names


def test_more_than_one_answer_to_a_row_is_refused_before_anything_starts(tmp_path: Path) -> None:
    write_table(pa.table({"prompt": ["x"]}), tmp_path / "in.jsonl")
    spec = ServingSpec(name="tiny", store="nowhere", engine=EngineSpec(base_model="nowhere"))
    with pytest.raises(RequestError, match="n is 2, and each prompt gets one answer"):
        pool.generate_offline(
            spec, str(tmp_path / "in.jsonl"), str(tmp_path / "out"), adapter=None,
            adapter_column=None, options={"n": 2}, address=None, part_rows=4, progress=False,
        )  # fmt: skip
    assert Output(str(tmp_path / "out")).plan() is None


def test_another_call_does_not_go_on_with_an_output(plan: Plan, tmp_path: Path) -> None:
    from dataclasses import replace

    check_same(plan, replace(plan, asked=replace(plan.asked, seed=99)), "out")
    for change in (
        {"asked": replace(plan.asked, options={"max_tokens": 7})},
        {"asked": replace(plan.asked, adapter="other")},
        {"engine": {"base_model": "c"}},
        {"source": "/elsewhere.parquet"},
    ):
        with pytest.raises(ConflictError, match="was begun with another"):
            check_same(plan, replace(plan, **change), "out")
    with pytest.raises(DataError, match="has changed since"):
        check_same(plan, replace(plan, files={"in.parquet": "other"}), "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    with pytest.raises(ConflictError, match=r"holds notes\.txt"):
        Output(str(tmp_path / "full")).plan()
