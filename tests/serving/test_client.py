"""The client against a real service."""

import datetime
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from service import BASE_NAME, Running, publish, running

from cluster.errors import (
    ConflictError,
    DataError,
    ModelNotFoundError,
    RequestError,
    UnavailableError,
)
from cluster.tables import open_table, write_table
from serving.client import AsyncClient, Client

Bases = Callable[[str], Path]
GREEDY: Any = {"max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def service(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    with running(bases("llama"), folder) as service:
        publish(service.registry, bases("llama"), folder, "lora", "bitfit", "prefix_tuning")
        yield service


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


def test_models(client: Client) -> None:
    assert [card.id for card in client.models()] == [BASE_NAME, "bitfit", "lora", "prefix-tuning"]


def test_every_kind_of_prompt(client: Client) -> None:
    chat = [{"role": "user", "content": "hi"}]
    answers = client.generate(["hi", [104, 105], chat], adapter="lora", **GREEDY)
    assert [answer.prompt_tokens for answer in answers] == [2, 2, 4]
    assert {answer.completion_tokens for answer in answers} == {6}
    (base,) = client.generate(["hi"], **GREEDY)
    assert base.text != answers[0].text


def test_a_chat_says_what_a_completion_of_its_template_does(client: Client) -> None:
    chat = [{"role": "user", "content": "hi"}]
    answer = client.chat(chat, adapter="lora", **GREEDY)
    assert answer == client.generate([chat], adapter="lora", **GREEDY)[0]
    shape = {"type": "json_schema", "json_schema": {"schema": {"const": 5}}}
    assert client.chat(chat, adapter="lora", response_format=shape).text == "5"


def test_both_clients_have_the_same_methods() -> None:
    def methods(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    assert methods(AsyncClient) == methods(Client)


def test_a_stream_is_the_answer(client: Client) -> None:
    (answer,) = client.generate(["hello"], adapter="bitfit", **GREEDY)
    assert "".join(client.stream("hello", adapter="bitfit", **GREEDY)) == answer.text
    stream = client.stream("hello", adapter="bitfit", max_tokens=100)
    next(stream)
    stream.close()


def test_embeddings_are_of_length_one_and_in_order(client: Client) -> None:
    inputs = ["hi", [104, 105], *(f"text {i}" for i in range(40))]
    vectors = client.embed(inputs, adapter="lora")
    assert (vectors.shape, vectors.dtype) == ((42, 32), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(client.embed(inputs[-1:], adapter="lora")[0], vectors[-1], atol=1e-5)
    assert client.embed(["hi"], dimensions=4).shape == (1, 4)
    assert abs(client.embed(["hi"])[0] - vectors[0]).max() > 0.01
    assert client.embed([]).shape == (0, 0)
    with pytest.raises(RequestError, match="dimensions"):
        client.embed(["hi"], dimensions=1000)
    with pytest.raises(RequestError, match="inputs is one text; give a list"):
        client.embed("hello")


def test_the_servers_errors_are_raised_as_they_were_there(client: Client) -> None:
    with pytest.raises(ModelNotFoundError, match="did you mean 'lora'"):
        client.generate(["x"], adapter="loras")
    with pytest.raises(RequestError) as caught:
        client.generate(["x"], top_p=7)
    assert caught.value.param == "top_p"
    with pytest.raises(RequestError):
        list(client.stream("x", top_k=0))


def test_no_service(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with Client(url, max_attempts=2) as nobody, pytest.raises(UnavailableError, match="running"):
        nobody.generate(["x"], adapter="a")


def rows(count: int, **columns: list[Any]) -> pa.Table:
    names = [BASE_NAME, "lora", "bitfit", "prefix-tuning"]
    return pa.table(
        {
            "id": list(range(count)),
            "prompt": [f"question {i}" for i in range(count)],
            "adapter": [names[i % 4] for i in range(count)],
            **columns,
        }
    )


@pytest.mark.parametrize("kind", ["arrow", "parquet", "jsonl"])
def test_a_file_is_answered_row_by_row_in_order(client: Client, tmp_path: Path, kind: str) -> None:
    write_table(rows(20), tmp_path / f"in.{kind}")
    report = client.generate_file(
        tmp_path / f"in.{kind}", tmp_path / f"out.{kind}", adapter_column="adapter",
        progress=False, **GREEDY,
    )  # fmt: skip
    found = open_table(tmp_path / f"out.{kind}").to_pylist()
    assert (report.rows, report.failed, report.completion_tokens) == (20, 0, 120)
    assert [row["id"] for row in found] == list(range(20))
    for row in found[:4]:
        (alone,) = client.generate([row["prompt"]], adapter=row["adapter"], **GREEDY)
        assert (row["completion"], row["completion_tokens"]) == (alone.text, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"in.{kind}", f"out.{kind}"]


def test_chat_rows(client: Client, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    write_table(pa.table({"messages": [chat]}), tmp_path / "in.parquet")
    client.generate_file(
        tmp_path / "in.parquet", tmp_path / "out.parquet", adapter="lora", progress=False, **GREEDY
    )
    (row,) = open_table(tmp_path / "out.parquet").to_pylist()
    assert row["completion"] == client.generate([chat], adapter="lora", **GREEDY)[0].text


def test_bad_rows_carry_their_error_and_the_rest_is_done(client: Client, tmp_path: Path) -> None:
    table = pa.table(
        {"prompt": ["fine", None, "", "x" * 500, "fine", "fine"],
         "adapter": ["lora", "lora", "lora", "lora", "nobody", None]}
    )  # fmt: skip
    write_table(table, tmp_path / "in.arrow")
    report = client.generate_file(
        tmp_path / "in.arrow", tmp_path / "out.arrow", adapter_column="adapter", progress=False,
        **GREEDY,
    )  # fmt: skip
    found = open_table(tmp_path / "out.arrow").to_pylist()
    assert (report.rows, report.failed) == (6, 4)
    assert [row["error"] is None for row in found] == [True, False, False, False, False, True]
    assert "context" in found[3]["error"]
    assert "nobody" in found[4]["error"]


def test_what_json_cannot_hold_is_the_error_of_its_row(client: Client, tmp_path: Path) -> None:
    """A chat with a time or bytes in it, token ids that are no numbers, times beyond Python's."""
    now = datetime.datetime(2026, 1, 1)
    chats = [
        [{"role": "user", "content": "hi", "sent": None, "raw": None}],
        [{"role": "user", "content": "hi", "sent": now, "raw": None}],
        [{"role": "user", "content": "hi", "sent": None, "raw": b"\xff"}],
    ]
    ids = [[104.0, 105.0], [float("nan")], [float("inf")]]
    text = pa.Array.from_buffers(pa.string(), 3, pa.array([b"lora", b"\xff", b"lora"]).buffers())
    years = pa.array([None, 2**62, None], pa.timestamp("ms"))
    for name, table, bad in (
        ("chats", pa.table({"messages": chats, "adapter": ["lora"] * 3}), [1, 2]),
        ("ids", pa.table({"prompt": ids, "adapter": ["lora"] * 3}), [0, 1, 2]),
        ("names", pa.table({"prompt": ["x"] * 3, "adapter": text}), [1]),
        ("years", pa.table({"prompt": ["x"] * 3, "adapter": years}), [1]),
    ):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        target = tmp_path / f"{name}-out.parquet"
        report = client.generate_file(
            tmp_path / f"{name}.parquet", target, adapter_column="adapter", progress=False, **GREEDY
        )
        errors = pq.read_table(target)["error"].to_pylist()
        assert [i for i, error in enumerate(errors) if error is not None] == bad, errors
        assert report.failed == len(bad)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_a_bad_line_is_one_bad_row(client: Client, tmp_path: Path, kind: str) -> None:
    lines = [b'{"prompt":"a"}', b"not json", b'{"prompt":5}', b'{"prompt":"b"}', b"[1]",
             b'{"prompt":"\\ud83d"}']  # fmt: skip
    source, target = tmp_path / "my questions [1].jsonl", tmp_path / f"out.{kind}"
    source.write_bytes(b"\n".join(lines))
    report = client.generate_file(source, target, adapter="lora", progress=False, **GREEDY)
    if kind == "jsonl":
        found = [json.loads(line) for line in target.read_bytes().splitlines()]
    else:
        found = open_table(target).to_pylist()
    assert (report.rows, report.failed) == (6, 4)
    assert [row["completion_tokens"] for row in found] == [6, None, None, 6, None, None]
    assert [row["error"] is None for row in found] == [True, False, False, True, False, False]
    assert "not JSON" in found[1]["error"]
    assert found[1]["error"].startswith("row 1: ")
    assert [row["prompt"] for row in found if row["error"] is None] == ["a", "b"]


def test_lines_of_other_types_fit_into_a_typed_file(client: Client, tmp_path: Path) -> None:
    """Rows far apart, so that their types are met one after another."""
    rows: list[dict[str, Any]] = [{"prompt": "x", "n": 1, "tags": [], "o": {}} for _ in range(300)]
    rows[-2] |= {"n": 2.5, "tags": ["t"], "m": {"a": 1}, "mixed": 5, "big": 1}
    rows[-1] |= {"m": {"b": "ü"}, "mixed": "five", "big": 2**70, "none": None}
    rows.append({"prompt": "x", "error": "mine"})  # which the first lines have not told
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for target in (tmp_path / "out.parquet", tmp_path / "out.arrow"):
        client.generate_file(
            tmp_path / "in.jsonl", target, adapter="lora", progress=False, max_tokens=1
        )
        *_, one, other, own = open_table(target).to_pylist()
        assert "has a 'error' of its own" in own["error"]
        assert (one["n"], one["tags"], one["o"]) == (2.5, ["t"], "{}")
        assert one["m"] == {"a": 1, "b": None}
        assert (one["mixed"], one["big"], one["none"]) == ("5", "1", None)
        assert (other["mixed"], other["big"], other["m"]["b"]) == ("five", str(2**70), "ü")


@pytest.mark.parametrize("source", ["parquet", "arrow", "jsonl"])
@pytest.mark.parametrize("target", ["parquet", "arrow", "jsonl"])
def test_any_kind_becomes_any_other(
    client: Client, tmp_path: Path, source: str, target: str
) -> None:
    """Whatever its types: dictionaries that differ by part, times, bytes."""
    table = pa.table(
        {"prompt": [f"{i}" for i in range(300)],
         "kind": pa.array([f"k{i}" for i in range(300)]).dictionary_encode(),
         "at": pa.array([datetime.date(2026, 1, 1)] * 300)}
    )  # fmt: skip
    write_table(table, tmp_path / f"in.{source}")
    client.generate_file(
        tmp_path / f"in.{source}", tmp_path / f"out.{target}", adapter="lora", progress=False,
        max_tokens=1,
    )  # fmt: skip
    found = open_table(tmp_path / f"out.{target}")
    assert found["prompt"].to_pylist() == table["prompt"].to_pylist()
    assert found["kind"].to_pylist() == table["kind"].to_pylist()
    assert str(found["at"][299]).startswith("2026-01-01")


def test_files_that_cannot_be_used_are_refused_before_anything_is_sent(
    client: Client, tmp_path: Path
) -> None:
    write_table(rows(2), tmp_path / "in.arrow")
    source, target = tmp_path / "in.arrow", tmp_path / "out.arrow"

    def run(source: Path = source, target: Path = target, **options: Any) -> None:
        client.generate_file(source, target, progress=False, **options)

    with pytest.raises(DataError, match=r"gone\.arrow: does not exist"):
        run(source=tmp_path / "gone.arrow")
    with pytest.raises(DataError, match="has no column 'model'; it has id, prompt"):
        run(adapter_column="model")
    with pytest.raises(DataError, match="not both"):
        run(adapter="lora", adapter_column="adapter")
    with pytest.raises(DataError, match="unknown kind"):
        run(target=tmp_path / "out.xls")
    write_table(pa.table({"prompt": ["x"], "o": [{}]}), tmp_path / "hollow.arrow")
    with pytest.raises(DataError, match=r"output .*Cannot write struct .*; use \.arrow"):
        run(source=tmp_path / "hollow.arrow", target=tmp_path / "out.parquet")
    (tmp_path / "two").mkdir()
    write_table(pa.table({"prompt": ["x"]}), tmp_path / "two/a.parquet")
    write_table(pa.table({"prompt": ["x"], "b": [1]}), tmp_path / "two/b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: has columns \(prompt string, b int64\)"):
        run(source=tmp_path / "two")
    write_table(pa.table({"text": ["x"]}), tmp_path / "other.arrow")
    with pytest.raises(DataError, match="no column 'prompt' or 'messages'"):
        run(source=tmp_path / "other.arrow")
    write_table(rows(2, completion=["", ""]), tmp_path / "taken.arrow")
    with pytest.raises(DataError, match="'completion' is one that is added"):
        run(source=tmp_path / "taken.arrow")
    target.write_text("precious")
    with pytest.raises(ConflictError, match="exists already"):
        run()
    assert target.read_text() == "precious"
    assert not list(tmp_path.glob("*.partial"))
