"""Adapter folders as strangers send them: each refused by file and reason, nothing executed."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
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
    "header of 101 MB": (
        lambda p: (
            header(p, 101 * 2**20, b""),
            os.truncate(p / WEIGHTS, 101 * 2**20 + 8),  # sparse
        ),
        "105,906,176 bytes; 16,777,216 are read",
    ),
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
    "unknown dtype": (
        lambda p: tensors(p, {"a": entry(0, 1, "F8_E4M3")}, b"\0"),
        "has tensor 'a' of 'F8_E4M3', which is not read; save it as F32, F16 or BF16",
    ),
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
    "link to other weights": (
        lambda p: (
            (p / WEIGHTS).rename(p / "elsewhere"),
            (p / WEIGHTS).symlink_to(p / "elsewhere"),
        ),
        f"{WEIGHTS} is a link",
    ),
    "weights out of the folder": (
        lambda p: (
            (p / WEIGHTS).rename(p.parent / WEIGHTS),
            (p / WEIGHTS).symlink_to(f"../{WEIGHTS}"),
        ),
        f"{WEIGHTS} is a link",
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


PUBLISHED_BY_NOBODY = """
import os, sys
from pathlib import Path
from cluster.errors import AdapterError
from cluster.registry import Registry
if os.geteuid() == 0:  # who may read anything
    os.setgid(65534)
    os.setuid(65534)
store, *folders = sys.argv[1:]
for folder in folders:
    try:
        print(Registry(store).publish("a", Path(folder)).ref)
    except AdapterError as error:
        print(error.message)
"""


def test_permission_denied(folder: Path) -> None:
    """Of a file, of the folder, and of the one around it."""
    (folder / WEIGHTS).chmod(0o644)
    (folder / "README.md").write_text("of an adapter")
    # Where others may go: pytest's own folders are its user's alone.
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        Path(top).chmod(0o777)
        names = ("whole", CONFIG, WEIGHTS, "README.md", "folder", "outer")
        copies = {name: shutil.copytree(folder, Path(top, name, "adapter")) for name in names}
        closed = [copies[name] / name for name in (CONFIG, WEIGHTS, "README.md")]
        closed += [copies["folder"], copies["outer"].parent]
        for path in closed:
            path.chmod(0)
        child = subprocess.run(
            [sys.executable, "-c", PUBLISHED_BY_NOBODY, f"{top}/store", *copies.values()],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        for path in closed:
            path.chmod(0o755)
    assert child.returncode == 0, child.stderr
    whole, *refused = child.stdout.splitlines()
    assert whole == "a@1"
    files = (CONFIG, WEIGHTS, "README.md", CONFIG, CONFIG)
    for name, file, said in zip(names[1:], files, refused, strict=True):
        expected = f"adapter folder {copies[name]}: {file} cannot be read (Permission denied)"
        assert said.startswith(expected)


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
