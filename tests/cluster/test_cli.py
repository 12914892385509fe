"""The command as people type it: every bad input by name and remedy, with its exit code."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from adapters import make_adapter

from cluster.cli import main
from cluster.tables import write_table

Bases = Callable[[str], Path]
ROOT = Path(__file__).resolve().parents[2]


def graft(*arguments: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120,
        cwd=cwd, env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", **env},
    )  # fmt: skip


def test_help_reads_like_a_page() -> None:
    result = graft("--help")
    assert result.returncode == 0
    for word in ("train", "serve", "generate", "jobs", "adapters", "Examples", "--store"):
        assert word in result.stdout
    for command in ("train", "serve", "generate", "jobs logs", "adapters import"):
        assert graft(*command.split(), "--help").returncode == 0


@pytest.fixture
def job(bases: Bases, tmp_path: Path) -> dict[str, Any]:
    rows = {"prompt": ["a", "b", "c", "d"], "completion": ["b"] * 4}
    write_table(pa.table(rows), tmp_path / "rows.arrow")
    return {
        "base_model": str(bases("llama")),
        "method": {"kind": "lora"},
        "data": {"train": str(tmp_path / "rows.arrow")},
        "output": {"name": "mine", "store": str(tmp_path / "store")},
    }


Change = Callable[[dict[str, Any], Path], object]
BAD_JOBS: list[tuple[str, Change, int, tuple[str, ...]]] = [
    ("unknown method", lambda j, _: j["method"].update(kind="loar"), 2, ("'loar'", "'lora'")),
    ("unknown key", lambda j, _: j.update(epoch=3), 2, ("epoch: unknown key", "'epochs'")),
    ("missing data", lambda j, t: j["data"].update(train=str(t / "gone.arrow")), 2,
     ("gone.arrow", "does not exist")),
    ("missing column", lambda j, _: j["data"].update(format="alpaca"), 2,
     ("'instruction'", "the file has prompt, completion")),
    ("unknown columns", lambda j, t: write_table(pa.table({"q": ["x"]}), t / "rows.arrow"), 2,
     ("fit no known format",)),
    ("no rows", lambda j, t: write_table(
        pa.table({"text": pa.array([], pa.string())}), t / "rows.arrow"), 2, ("has no rows",)),
    ("nothing to learn", lambda j, t: write_table(pa.table({"text": [""]}), t / "rows.arrow"), 2,
     ("no row is left",)),
    ("corrupt data", lambda j, t: (t / "rows.arrow").write_bytes(b"nonsense"), 2,
     ("cannot be read",)),
    ("repetitions", lambda j, t: write_table(pa.table({"text": ["x"] * 9}), t / "rows.arrow"), 2,
     ("duplicate: 8 of 9 rows (88.9%), over data.lint.duplicate 0.5",)),
    ("no such target", lambda j, _: j["method"].update(target_modules=["qproj"]), 2,
     ("matches no module", "q_proj")),
    ("no base folder", lambda j, t: j.update(base_model=str(t / "gone")), 2,
     ("gone", "is not a folder")),
    ("a folder that is no base", lambda j, t: j.update(base_model=str(t)), 2, ("config.json",)),
    ("longer than the context", lambda j, _: j["data"].update(max_length=129), 2,
     ("exceeds the context of 128", "at most 128")),
    ("bad name", lambda j, _: j["output"].update(name="My Bot"), 2, ("output.name", "a-z")),
    ("bad store", lambda j, _: j["output"].update(store="ftp://x/y"), 2,
     ("output.store", "ftp://x/y", "s3://")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "code", "parts"), [case[1:] for case in BAD_JOBS], ids=[c[0] for c in BAD_JOBS]
)
def test_a_bad_job_ends_before_anything_starts(
    job: dict[str, Any],
    tmp_path: Path,
    change: Change,
    code: int,
    parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(job, tmp_path)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    # An address that nobody answers: it must not even be asked.
    arguments = ["train", str(tmp_path / "job.yaml"), "--address", "127.0.0.1:9"]
    monkeypatch.setattr(sys, "argv", ["graft", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    message = capsys.readouterr().err
    assert caught.value.code == code
    assert message.startswith("error: ")
    for part in parts:
        assert part in message
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("address", "part"),
    [("127.0.0.1:9", "does not answer"), ("http://127.0.0.1:9", "does not answer"),
     ("nonsense", "host:port")],
)  # fmt: skip
def test_no_cluster_at_that_address(
    job: dict[str, Any],
    tmp_path: Path,
    address: str,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    arguments = ["train", str(tmp_path / "job.yaml"), "--address", address]
    monkeypatch.setattr(sys, "argv", ["graft", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr()
    assert caught.value.code == 5
    assert part in told.err
    assert "4 rows" in told.out, "the plan was shown"


def test_a_bad_service_ends_before_anything_starts(bases: Bases, tmp_path: Path) -> None:
    good = {"name": "tiny", "store": str(tmp_path / "s"), "engine": {"base_model": "gone"}}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(good))
    result = graft("serve", tmp_path / "serve.yaml", "--address", "127.0.0.1:9")
    assert (result.returncode, "is not a folder" in result.stderr) == (2, True)
    result = graft("serve", tmp_path / "serve.yaml", "--set", "engine.dtype=int4")
    assert "engine.dtype" in result.stderr


def test_adapters_from_the_command_line(bases: Bases, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    folder = make_adapter("lora", bases("llama"), tmp_path / "lora")
    result = graft("adapters", "import", "bot", folder, *store)
    assert (result.returncode, "bot@1" in result.stdout) == (0, True), result.stderr
    assert "bot" in graft("adapters", "list", GRAFT_STORE=str(tmp_path / "store")).stdout
    assert graft("adapters", "alias", "bot@1", "stable", *store).returncode == 0
    shown = graft("adapters", "show", "bot:stable", *store).stdout
    for part in ("bot@1", "LORA", "stable"):
        assert part in shown
    assert "as published" in graft("adapters", "verify", "bot", *store).stdout
    weights = next((tmp_path / "store").rglob("adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    result = graft("adapters", "verify", "bot", *store)
    assert (result.returncode, "does not match" in result.stderr) == (2, True)
    result = graft("adapters", "show", "bto", *store)
    assert (result.returncode, "did you mean 'bot'" in result.stderr) == (3, True)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"r": 3}, "peft_type"),
        ({"peft_type": "LORA", "lora_alpha": float("inf")}, "lora_alpha = 'inf'"),
    ],
)
def test_a_bad_folder_is_not_imported(
    bases: Bases, tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    folder = tmp_path / "lora"
    shutil.copytree(make_adapter("lora", bases("llama"), tmp_path / "good"), folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    result = graft("adapters", "import", "bot", folder, "--store", tmp_path / "store")
    assert (result.returncode, reason in result.stderr) == (2, True)
    assert graft("adapters", "list", "--store", tmp_path / "store").stdout.count("bot") == 0


def test_generate_names_what_is_wrong(tmp_path: Path) -> None:
    write_table(pa.table({"prompt": ["x"]}), tmp_path / "in.arrow")
    gone = graft("generate", tmp_path / "gone.arrow", tmp_path / "out.arrow", "--adapter", "x")
    assert (gone.returncode, "does not exist" in gone.stderr) == (2, True)
    both = graft("generate", tmp_path / "in.arrow", tmp_path / "out.arrow", "--adapter", "x",
                 "--adapter-column", "prompt")  # fmt: skip
    assert (both.returncode, "not both" in both.stderr) == (2, True)
    ways = [
        (("--concurrency", 3), ("--offline", "configs/serving/local.yaml")),
        (("--address", "auto"), ()),
        (("--set", "name=x"), ()),
        (("--url", "http://127.0.0.1:9"), ("--local", "configs/serving/local.yaml")),
        (("--part-rows", 3), ("--local", "configs/serving/local.yaml")),
    ]
    for option, way in ways:  # of another way to generate
        other = graft("generate", tmp_path / "in.arrow", tmp_path / "out", *option, *way)
        assert (other.returncode, f"{option[0]}: " in other.stderr) == (2, True), other.stderr


def test_wrong_usage_is_explained(tmp_path: Path) -> None:
    for arguments in (("train",), ("train", "x.yaml", "--bad"), ("unknown",)):
        result = graft(*arguments)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert "Usage" in result.stderr
