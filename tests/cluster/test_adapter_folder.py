"""Adapter folders as strangers send them: each refused by file and reason, nothing executed."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.adapter_folder import CONFIG, WEIGHTS, check_finite, open_adapter_folder
from cluster.errors import AdapterError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, path / WEIGHTS)
    return path


def header(path: Path, length: int, body: bytes) -> None:
    (path / WEIGHTS).write_bytes(struct.pack("<Q", length) + body)


def tensors(path: Path, entries: object, data: bytes = b"") -> None:
    raw = json.dumps(entries).encode()
    header(path, len(raw), raw + data)


def entry(start: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / CONFIG).unlink(), CONFIG),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), WEIGHTS),
    "config not JSON": (lambda p: (p / CONFIG).write_text("{"), CONFIG),
    "config a list": (lambda p: (p / CONFIG).write_text("[]"), CONFIG),
    "config deep": (lambda p: (p / CONFIG).write_text("[" * 100_000), CONFIG),
    "config huge": (lambda p: (p / CONFIG).write_text(" " * (2**20 + 1)), CONFIG),
    "config not UTF-8": (lambda p: (p / CONFIG).write_bytes(b'{"peft_type": "\xff"}'), CONFIG),
    "config without a type": (lambda p: (p / CONFIG).write_text('{"r": 2}'), "peft_type"),
    "AdapterHub": (
        lambda p: (p / CONFIG).write_text('{"config": {"architecture": "lora"}, "hidden_size": 8}'),
        "AdapterHub",
    ),
    "empty file": (lambda p: (p / WEIGHTS).write_bytes(b""), WEIGHTS),
    "header of 2^63": (lambda p: header(p, 2**63, b"{}"), "not a safetensors file"),
    "header beyond the file": (lambda p: header(p, 100, b"{}"), "not a safetensors file"),
    "header not JSON": (lambda p: header(p, 4, b"nope"), "not JSON"),
    "header a list": (lambda p: tensors(p, []), "not an object"),
    "no tensors": (lambda p: tensors(p, {}), "0 tensors"),
    "100,000 tensors": (
        lambda p: tensors(p, {str(i): entry(0, 0, shape=(0,)) for i in range(100_000)}),
        "100,000 tensors",
    ),
    "overlap": (
        lambda p: tensors(p, {"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4),
        "overlap",
    ),
    "gap": (lambda p: tensors(p, {"a": entry(4, 8)}, b"\0" * 8), "gaps"),
    "cut short": (lambda p: tensors(p, {"a": entry(0, 4)}, b"\0" * 2), "bytes where"),
    "trailing bytes": (lambda p: tensors(p, {"a": entry(0, 4)}, b"\0" * 9), "bytes where"),
    "unknown dtype": (lambda p: tensors(p, {"a": entry(0, 4, "Q9")}, b"\0" * 4), "'a' wrongly"),
    "negative shape": (
        lambda p: tensors(p, {"a": entry(0, 4, shape=(-1, -1))}, b"\0" * 4),
        "'a' wrongly",
    ),
    "shape of another size": (
        lambda p: tensors(p, {"a": entry(0, 4, shape=(7,))}, b"\0" * 4),
        "'a' wrongly",
    ),
    "link to a secret": (
        lambda p: ((p / CONFIG).unlink(), (p / CONFIG).symlink_to("/etc/passwd")),
        CONFIG,
    ),
    "weights a folder": (lambda p: ((p / WEIGHTS).unlink(), (p / WEIGHTS).mkdir()), WEIGHTS),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_by_name(folder: Path, case: str) -> None:
    spoil, reason = BAD[case]
    spoil(folder)
    with pytest.raises(AdapterError) as caught:
        open_adapter_folder(folder)
    assert str(folder) in caught.value.message
    assert reason in caught.value.message


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not a folder"):
        open_adapter_folder(tmp_path / "gone")
    with pytest.raises(AdapterError, match=CONFIG):
        open_adapter_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_permission_denied(folder: Path) -> None:
    (folder / WEIGHTS).chmod(0)
    with pytest.raises(AdapterError, match="cannot be read"):
        open_adapter_folder(folder)


def test_a_pickle_is_named_and_never_opened(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {canary}",)

    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(AdapterError, match="pickle, which Graft never opens"):
        open_adapter_folder(folder)
    assert not canary.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder: Path, dtype: torch.dtype, value: float) -> None:
    good, bad = torch.ones(5, 7, dtype=dtype), torch.ones(5, 7, dtype=dtype)
    save_file({"good": good, "bad": bad}, folder / WEIGHTS)
    check_finite(open_adapter_folder(folder))
    bad[3, 2] = value
    save_file({"good": good, "bad": bad}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="'bad'"):
        check_finite(open_adapter_folder(folder))
