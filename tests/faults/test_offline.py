"""`graft generate --offline` on a real cluster: killed in the middle, begun twice, done once."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adapters import make_adapter
from commands import Command, overrides, processes, run
from conftest import RayCluster

from cluster.registry import Registry
from serving.engine import Engine, EngineSpec, GenerationRequest

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROWS, PART_ROWS, TOKENS = 480, 8, 40
NAMES = [None, "lora", "prefix-tuning", "nobody"]


def test_killed_in_the_middle_it_ends_with_every_row_once(
    ray_cluster: RayCluster, bases: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for key, value in ray_cluster.env.items():
        monkeypatch.setenv(key, value)
    base, registry = bases("llama"), Registry(str(tmp_path / "store"))
    engine = Engine(EngineSpec(base_model=str(base)))
    for variant in ("lora", "prefix_tuning"):
        path = make_adapter(variant, base, tmp_path / variant)
        registry.publish(variant.replace("_", "-"), path)
        engine.add_adapter(variant.replace("_", "-"), path)
    models = [NAMES[i % len(NAMES)] for i in range(ROWS)]
    rows = pa.table({"prompt": [f"row {i}" for i in range(ROWS)], "model": models})
    pq.write_table(rows, tmp_path / "in.parquet", row_group_size=100)
    settings = overrides(
        f"store={registry.store.uri}", f"engine.base_model={base}", f"cache={tmp_path}/cache",
        "replicas.min=1", "replicas.max=2",
    )  # fmt: skip

    def generate() -> Command:
        return Command(
            "generate", tmp_path / "in.parquet", tmp_path / "out", "--adapter-column", "model",
            "--max-tokens", TOKENS, "--part-rows", PART_ROWS,
            "--offline", "configs/serving/local.yaml", "--address", ray_cluster.address, *settings,
        )  # fmt: skip

    marks = tmp_path / "out/_graft/parts"
    with generate() as first:
        until(lambda: (tmp_path / "out/_graft/plan.json").exists(), first)
        second = generate().finish()
        assert (second.code, "another call is writing it now" in second.output) == (4, True)
        until(lambda: len(list(marks.glob("*"))) >= 3, first)
        processes("MapWorker")[0].kill()  # its part goes to another
        done = len(list(marks.glob("*")))
        until(lambda: len(list(marks.glob("*"))) > done + 2, first)
        first.process.kill()
    done = len(list(marks.glob("*")))
    with generate() as third:
        until(lambda: len(list(marks.glob("*"))) > done + 2, third)
        third.process.send_signal(signal.SIGINT)
        interrupted = third.wait()
    assert interrupted.code == 130, interrupted.output
    assert "Traceback" not in interrupted.output
    kept = {path.name: path.stat().st_mtime_ns for path in marks.glob("*")}
    assert 0 < len(kept) < ROWS // PART_ROWS

    ended = generate().finish()
    assert ended.code == 5, ended.output
    assert f"{ROWS} rows, " in ended.output
    assert "of them kept from before" in ended.output
    assert f"{ROWS // 4} of {ROWS} rows failed" in ended.output
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in marks.glob("*")}.items()
    found = pq.read_table(tmp_path / "out").to_pylist()
    assert [row["row"] for row in found] == list(range(ROWS))
    known = [row for row in found if row["model"] != "nobody"]
    answers = engine.generate(
        [GenerationRequest(r["prompt"], adapter=r["model"], max_tokens=TOKENS) for r in known]
    )
    assert [row["completion"] for row in known] == [answer.text for answer in answers]
    assert all(row["error"] is None for row in known)
    assert all("neither the base nor" in r["error"] for r in found if r["model"] == "nobody")


def test_what_an_engine_raises_reaches_the_caller(
    ray_cluster: RayCluster, bases: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for key, value in ray_cluster.env.items():
        monkeypatch.setenv(key, value)
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "in.parquet")
    settings = overrides(
        f"store={tmp_path}/store", f"engine.base_model={bases('llama')}", "replicas.min=1",
        "engine.max_context_tokens=1000000",
    )  # fmt: skip
    ended = run(
        "generate", tmp_path / "in.parquet", tmp_path / "out", "--address", ray_cluster.address,
        "--offline", "configs/serving/local.yaml", *settings,
    )  # fmt: skip
    assert ended.code == 2, ended.output
    assert "engine.max_context_tokens is 1000000, but base_model" in ended.output
    assert "Traceback" not in ended.output


def until(condition: Callable[[], bool], command: Command) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert not command.is_over(), command.said
        assert time.monotonic() < deadline, command.said
        time.sleep(0.05)
