"""Adapter folders as strangers send them: each refused by file and reason, nothing executed."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from damaged_folders import DAMAGED, canary
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


@pytest.mark.parametrize("case", DAMAGED)
def test_bad_folders_are_refused_by_name(folder: Path, case: str) -> None:
    spoil, reason = DAMAGED[case]
    spoil(folder)
    with pytest.raises(AdapterError) as caught:
        open_adapter_folder(folder)
    assert str(folder) in caught.value.message
    assert reason in caught.value.message
    assert not canary(folder).exists()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not a folder"):
        open_adapter_folder(tmp_path / "gone")


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
