"""A batch file that is broken off by signals, a full disk or another call, and what is kept."""

import asyncio
import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from adapters import make_adapter
from commands import heed_interrupts
from service import BASE_NAME, NAMES, Running

from cluster.errors import ConflictError, StoreError
from cluster.tables import open_table, write_table
from serving.client import AsyncClient, Client
from serving.journal import RowResult, journal

GREEDY: Any = {"max_tokens": 6, "ignore_eos": True}
MAIN = "from cluster.cli import main; main()"


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


def questions(count: int, **columns: list[Any]) -> pa.Table:
    names = [BASE_NAME, *NAMES]
    return pa.table(
        {
            "id": list(range(count)),
            "prompt": [f"question {i}" for i in range(count)],
            "adapter": [names[i % len(names)] for i in range(count)],
            **columns,
        }
    )


def begin(
    service: Running,
    source: Path,
    target: Path,
    *options: str,
    code: str = MAIN,
    prepare: Callable[[], None] = heed_interrupts,
) -> subprocess.Popen[str]:
    """`graft generate` on its way, a few requests at a time."""
    arguments = [
        sys.executable, "-c", code, "generate", str(source), str(target), "--adapter-column",
        "adapter", "--url", service.url, "--max-tokens", "16", "--concurrency", "4", "--quiet",
        *options,
    ]  # fmt: skip
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=prepare,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def until_it_has(journal: Path, lines: int, process: subprocess.Popen[str]) -> None:
    """Wait while a process that runs writes them."""
    deadline = time.monotonic() + 60
    while not journal.exists() or len(journal.read_text().splitlines()) < lines:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit code, stdout and stderr."""
    told, errors = process.communicate(timeout=120)
    return process.returncode, told, errors


def test_an_interrupted_file_goes_on_where_it_was(service: Running, tmp_path: Path) -> None:
    """`graft generate` ended by a signal in the middle; the second call asks only for the rest."""
    source, target = tmp_path / "in.arrow", tmp_path / "out.arrow"
    write_table(questions(300), source)
    journal = tmp_path / "out.arrow.partial"
    for number in (signal.SIGINT, signal.SIGKILL):
        process = begin(service, source, target)
        before = len(journal.read_text().splitlines()) if journal.exists() else 0
        until_it_has(journal, before + 20, process)
        process.send_signal(number)
        assert ended(process)[0] == (130 if number is signal.SIGINT else -number)
        assert not target.exists()
    kept = len(journal.read_text().splitlines()) - 1
    assert 30 < kept < 300
    before = service.stats.generated_tokens
    code, told, _ = ended(begin(service, source, target))
    assert code == 0
    assert "300 rows" in told
    assert "kept from before" in told
    assert service.stats.generated_tokens - before <= (300 - kept + 8) * 16
    found = open_table(target).to_pylist()
    assert [row["id"] for row in found] == list(range(300))
    assert not any(row["error"] for row in found)


def test_a_name_stands_for_one_version_in_all_rows(
    service: Running, client: Client, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its alias moves, and a newer version comes, while the call is broken off."""
    for seed in (1, 2):
        folder = make_adapter("lora", bases("llama"), tmp_path / str(seed), seed=seed)
        service.registry.publish("moving", folder)
    service.registry.set_alias("moving", "live", 1)
    service.service.catalogue.refresh()
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    journal = target.with_name("out.jsonl.partial")
    write_table(questions(300, adapter=["moving:live"] * 300), source)
    process = begin(service, source, target)
    until_it_has(journal, 20, process)
    process.kill()
    ended(process)
    assert len(journal.read_text().splitlines()) < 300, "nothing is left to ask"
    service.registry.set_alias("moving", "live", 2)
    service.registry.publish("moving", tmp_path / "1")
    service.service.catalogue.refresh()
    assert ended(begin(service, source, target))[0] == 0
    found = [row["completion"] for row in open_table(target).to_pylist()]
    prompts = [f"question {i}" for i in range(300)]
    first, second = (
        [a.text for a in client.generate(prompts, adapter=f"moving@{n}", max_tokens=16)]
        for n in (1, 2)
    )
    assert found == first
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 30


@pytest.mark.parametrize(
    ("limit", "full", "kept"),
    [(5_000, "out.jsonl.partial", range(10, 50)), (40_000, "output .*out.jsonl", range(60, 61))],
    ids=["journal", "output"],
)
def test_a_full_disk_costs_no_answer(
    service: Running, tmp_path: Path, limit: int, full: str, kept: range
) -> None:
    """No file may grow beyond `limit`: its last line is cut, as on a disk that is full. Told once,
    with the file and what to do, and the next call goes on."""
    source, whole = tmp_path / "in.arrow", tmp_path / "whole.jsonl"
    target, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    write_table(questions(60, note=["n" * 1000] * 60), source)
    assert ended(begin(service, source, whole))[0] == 0

    def narrow() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, _, errors = ended(begin(service, source, target, prepare=narrow))
    assert code == 5, errors
    assert re.fullmatch(rf"error: .*{full}: cannot be written \(File too large\).*room.*\n", errors)
    assert not target.exists()
    assert full.startswith("output") or journal.stat().st_size == limit
    code, told, errors = ended(begin(service, source, target))
    assert code == 0, errors
    found = re.search(r"60 rows, (\d+) of them kept from before", told)
    assert found is not None, told
    assert int(found[1]) in kept
    assert target.read_bytes() == whole.read_bytes()
    assert not journal.exists()


def test_a_journal_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "out.arrow.partial").mkdir()
    with (
        pytest.raises(StoreError, match=r"out\.arrow\.partial: cannot be written \(Is a directory"),
        journal(tmp_path / "out.arrow.partial", "asked", 1),
    ):
        pass


def killed_at(event: str, ending: str) -> str:
    """`graft` that dies before it does this to a file of that name."""
    return (
        "import os, signal, sys\n"
        "def kill(event, args):\n"
        f"    if event == {event!r} and any(str(each).endswith({ending!r}) for each in args):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sys.addaudithook(kill)\n{MAIN}"
    )


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_call_killed_behind_its_output_was_done(
    service: Running, tmp_path: Path, bad: int, overwrite: bool
) -> None:
    """The file has its name, and its journal is still there: nothing is asked or written again."""
    source, target = tmp_path / "in.arrow", tmp_path / "out.arrow"
    options = ["--overwrite"] if overwrite else []
    write_table(questions(20, adapter=["nobody"] * bad + ["lora"] * (20 - bad)), source)
    if overwrite:
        target.write_text("of another time")
    code = killed_at("os.remove", "out.arrow.partial")
    assert ended(begin(service, source, target, *options, code=code))[0] == -signal.SIGKILL
    assert (tmp_path / "out.arrow.partial").exists()
    before, stamp = service.stats.generated_tokens, target.stat()
    code, told, errors = ended(begin(service, source, target, *options))
    assert code == (5 if bad else 0), errors
    assert f"20 rows, {20 - bad} of them kept from before" in told
    assert ("1 of 20 rows failed" in errors) == bool(bad)
    assert (service.stats.generated_tokens, target.stat()) == (before, stamp)
    found = open_table(target).to_pylist()
    assert [row["error"] is None for row in found] == [False] * bad + [True] * (20 - bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.arrow", "out.arrow"]
    code, _, errors = ended(begin(service, source, target))
    assert (code, "exists already" in errors) == (4, True)


def test_a_call_killed_before_its_output_has_its_name_writes_it_again(
    service: Running, tmp_path: Path
) -> None:
    """And never takes the file of somebody else for its own."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_table(questions(20), source)
    code = killed_at("os.rename", "out.jsonl")
    assert ended(begin(service, source, target, code=code))[0] == -signal.SIGKILL
    assert not target.exists()
    target.write_text("precious")
    code, _, errors = ended(begin(service, source, target))
    assert (code, "exists already" in errors) == (4, True)
    assert target.read_text() == "precious"
    target.unlink()
    before = service.stats.generated_tokens
    code, told, _ = ended(begin(service, source, target))
    assert code == 0
    assert "20 rows, 20 of them kept from before" in told
    assert service.stats.generated_tokens == before
    assert [row["id"] for row in open_table(target).to_pylist()] == list(range(20))
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_the_last_answer_of_a_row_counts(tmp_path: Path) -> None:
    """Answers are kept from call to call, errors are not."""
    path = tmp_path / "out.partial"
    with suppress(KeyboardInterrupt), journal(path, "asked", 3) as first:
        first.add(RowResult(0, error="too long"))
        first.add(RowResult(2, "a", "stop", 1, 2))
        assert first[0].error == "too long"
        raise KeyboardInterrupt
    with suppress(KeyboardInterrupt), journal(path, "asked", 3) as second:
        assert ([row in second for row in range(3)], second.kept) == ([False, False, True], 1)
        second.add(RowResult(0, "b"))
        assert [second[row].completion for row in (0, 2)] == ["b", "a"]
        raise KeyboardInterrupt
    with journal(path, "asked", 3) as third:
        assert third.kept == 2
        assert third[2] == RowResult(2, "a", "stop", 1, 2)
    assert not path.exists()


def test_a_journal_without_an_answer_is_not_kept(tmp_path: Path) -> None:
    """So that another call, with the adapter or the option that was meant, is not refused."""
    path = tmp_path / "out.partial"
    for fingerprint in ("a typo", "as meant"):
        with suppress(KeyboardInterrupt), journal(path, fingerprint, 2) as kept:
            kept.add(RowResult(1, error="no such adapter"))
            raise KeyboardInterrupt
        assert not path.exists()


def test_an_output_is_known_by_any_name(tmp_path: Path) -> None:
    """And no other is, though it has the same content; nor is one that was touched."""
    path, whole, other = tmp_path / "out.partial", tmp_path / "whole", tmp_path / "other"
    for file in (whole, other):
        file.write_text("the same")
        os.utime(file, (1, 1))
    with suppress(KeyboardInterrupt), journal(path, "asked", 1) as kept:
        assert not kept.is_sealed(whole)
        kept.seal(whole)
        raise KeyboardInterrupt
    named = whole.rename(tmp_path / "named")
    with journal(path, "asked", 1) as kept:
        known = [file for file in (whole, other, named) if kept.is_sealed(file)]
        assert known == [named]
        os.utime(named, (2, 2))
        assert not kept.is_sealed(named)


def test_a_line_that_was_cut_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    """Which goes where it was, so that a third call can read both."""
    path = tmp_path / "out.partial"
    for row in range(3):
        with suppress(KeyboardInterrupt), journal(path, "asked", 4) as kept:
            assert kept.kept == row
            kept.add(RowResult(row, "x" * 20, "stop", 1, 2))
            kept.add(RowResult(3, "long " * 20, "stop", 1, 2))
            raise KeyboardInterrupt
        os.truncate(path, path.stat().st_size - 30)
    with journal(path, "asked", 4) as kept:
        assert [row in kept for row in range(4)] == [True, True, True, False]


def test_a_journal_of_other_options_is_not_mixed_in(client: Client, tmp_path: Path) -> None:
    write_table(questions(2), tmp_path / "in.arrow")
    journal = tmp_path / "out.arrow.partial"
    journal.write_text(json.dumps({"fingerprint": "another"}) + "\n")
    with pytest.raises(ConflictError, match="another input or other options"):
        client.generate_file(
            tmp_path / "in.arrow", tmp_path / "out.arrow", adapter="lora", progress=False
        )


@pytest.mark.parametrize(
    "lines",
    [
        ["not JSON"], ["[]"], ['{"asked": 1}'], ['{"fingerprint": "asked"}', "5"],
        ['{"fingerprint": "asked"}', '{"row": -1}'], ['{"fingerprint": "asked"}', '{"row": 3}'],
        ['{"fingerprint": "asked"}', '{"row": 1, "text": "x"}'],
    ],
)  # fmt: skip
def test_a_file_of_somebody_else_is_no_journal(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "out.arrow.partial"
    path.write_text("\n".join([*lines, ""]))
    with pytest.raises(ConflictError, match="not a journal of ours"), journal(path, "asked", 3):
        pass
    assert path.read_text() == "\n".join([*lines, ""])


def test_two_calls_on_one_output_refuse_each_other(client: Client, tmp_path: Path) -> None:
    write_table(questions(2), tmp_path / "in.arrow")
    journal = tmp_path / "out.arrow.partial"
    options: Any = {"adapter": "lora", "progress": False, **GREEDY}
    with journal.open("a") as other:
        # The weakest that keeps others out: who only shares it would get it too.
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(ConflictError, match="another call is writing this output"):
            client.generate_file(tmp_path / "in.arrow", tmp_path / "out.arrow", **options)
    client.generate_file(tmp_path / "in.arrow", tmp_path / "out.arrow", **options)
    assert not journal.exists()


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_a_call_that_another_has_just_finished_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_made_anew: bool
) -> None:
    """It opened the journal, and the other one removed it before it was locked; and a third one
    may have begun one of its own."""
    path = tmp_path / "out.arrow.partial"

    def late(*_: object) -> None:
        path.unlink()
        if is_made_anew:
            path.write_text("another's")

    monkeypatch.setattr("serving.journal.fcntl.flock", late)
    with pytest.raises(ConflictError, match="has just written"), journal(path, "asked", 1):
        pass
    assert path.exists() == is_made_anew


def test_a_line_cut_short_is_asked_again(client: Client, tmp_path: Path) -> None:
    write_table(questions(8, adapter=["lora"] * 8), tmp_path / "in.arrow")
    whole, cut = tmp_path / "whole.arrow", tmp_path / "cut.arrow"
    options: Any = {"adapter_column": "adapter", "progress": False, **GREEDY}
    client.generate_file(tmp_path / "in.arrow", whole, **options)

    class StopError(Exception):
        pass

    async def some() -> None:
        """Answer three rows, then stop as a crash would."""
        async with AsyncClient(client._async.base_url, concurrency=1) as other:
            answer, count = other.generate_one, 0

            async def limited(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count > 3:
                    raise StopError
                return await answer(*args, **kwargs)

            other.generate_one = limited  # type: ignore[method-assign]
            await other.generate_file(tmp_path / "in.arrow", cut, **options)

    with pytest.raises(ExceptionGroup):
        asyncio.run(some())
    journal = tmp_path / "cut.arrow.partial"
    journal.write_bytes(journal.read_bytes()[:-10])
    report = client.generate_file(tmp_path / "in.arrow", cut, **options)
    assert report.resumed == 2
    assert open_table(cut).to_pylist() == open_table(whole).to_pylist()
