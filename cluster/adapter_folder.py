"""An adapter folder on this machine's disk, read with distrust: config, header, weights.

A folder is adapter_config.json and adapter_model.safetensors, as PEFT saves them. Whatever else
lies beside them is never opened; no pickle is read and no link is followed. Knows the container
and nothing of methods or base models: the lowering in serving.adapters checks those. Called by
the registry before publishing and by serving before loading.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from cluster.errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CONTENT = (CONFIG, WEIGHTS)  # what makes two adapters the same
# In the weights' metadata, where PEFT reads nothing: the lowest rank at which a LoRA is good.
MIN_RANK = "graft_min_rank"
MAX_CONFIG_BYTES = 2**20
MAX_TENSORS = 50_000
# Parsed whole before its tensors can be counted: as many of 300 bytes each, names as long as any.
MAX_HEADER_BYTES = 16 * 2**20
_CHECK_CHUNK_BYTES = 64 * 2**20

# safetensors dtype -> bytes per element, and for floats the unsigned view and exponent mask by
# which NaN and Inf are told without a library that knows the dtype.
_BYTES_BY_SIZE = {8: ("F64", "I64"), 4: ("F32", "I32"), 2: ("F16", "BF16", "I16"), 1: ("I8", "U8")}
_DTYPE_BYTES = {dtype: size for size, dtypes in _BYTES_BY_SIZE.items() for dtype in dtypes}
_EXPONENT: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header; `start` and `end` are byte offsets from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class AdapterFolder:
    """A folder whose container is sound; the weights themselves are not read yet."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def method(self) -> str:
        """The folder's `peft_type`, upper case: "LORA", "BITFIT", …"""
        return str(self.config["peft_type"]).upper()

    @property
    def base_model(self) -> str | None:
        """The base that the adapter says it was trained on; informational."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) else None


def open_adapter_folder(path: str | Path) -> AdapterFolder:
    """Check the container at `path` and read its config and header.

    Raises:
        AdapterError: naming the folder, the file at fault, the reason and the remedy.
    """
    path = Path(path)
    with readable(path, CONFIG):
        if not path.is_dir():
            raise AdapterError(f"adapter folder {path}: is not a folder; check the path")
        config = _read_config(path)
    with readable(path, WEIGHTS):
        tensors, metadata = _read_header(path)
    return AdapterFolder(path, config, tensors, metadata)


def check_finite(folder: AdapterFolder) -> None:
    """Read every weight once and raise AdapterError for the first tensor with a NaN or Inf."""
    with readable(folder.path, WEIGHTS), (folder.path / WEIGHTS).open("rb") as file:
        for name, entry in folder.tensors.items():
            if entry.dtype not in _EXPONENT:
                continue
            view, mask = _EXPONENT[entry.dtype]
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                chunk = file.read(min(left, _CHECK_CHUNK_BYTES))
                if not chunk:
                    raise fault(folder.path, WEIGHTS, "was cut short while it was read")
                left -= len(chunk)
                bits = np.frombuffer(chunk, dtype=view)
                if ((bits & np.array(mask, dtype=view)) == mask).any():
                    raise fault(
                        folder.path, WEIGHTS, f"tensor {name!r} holds NaN or Inf; train it anew"
                    )


def marks(path: Path, files: Iterable[str]) -> dict[str, tuple[int, ...] | None]:
    """What the file system says of `files` of a folder, and what changes when somebody touches one:
    mode, inode, size, times of the last change of content and of inode. None for an absent one."""
    found: dict[str, tuple[int, ...] | None] = {}
    for file in files:
        try:
            now = (path / file).lstat()
        except OSError:
            found[file] = None
        else:
            kind = now.st_mode, now.st_ino, now.st_size
            found[file] = *kind, now.st_mtime_ns, now.st_ctime_ns
    return found


@contextmanager
def unchanged(path: Path, files: Sequence[str]) -> Generator[None]:
    """The scope in which a folder is read by parts that belong together.

    Raises:
        AdapterError: one of `files` was written, replaced or taken away meanwhile.
    """
    before = marks(path, files)

    def check() -> None:
        after = marks(path, files)
        for file in files:
            if after[file] != before[file]:
                raise fault(path, file, "was changed while it was read; wait until it is whole")

    try:
        yield
    except (AdapterError, OSError):
        check()  # what else was found wrong may be the half of a file
        raise
    check()


@contextmanager
def readable(path: Path, file: str) -> Generator[None]:
    """The scope in which a file of the folder is looked at. Raises AdapterError for what the
    system refuses."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); its reader needs the right to"
        raise fault(path, file, reason) from error


def fault(path: Path, file: str, reason: str) -> AdapterError:
    """The AdapterError for one file of the folder."""
    return AdapterError(f"adapter folder {path}: {file} {reason}")


def number(folder: AdapterFolder, value: Any, key: str, *, whole: bool = False) -> float:
    """`value` as a positive finite number. Raises AdapterError."""
    sound = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not sound or not 0 < value < 1e9:  # NaN and any infinity fail this too
        kind = "whole number" if whole else "number"
        raise fault(folder.path, CONFIG, f"has {key} = {str(value)[:80]!r}, not a positive {kind}")
    return value


def _regular_file(path: Path, name: str, *, hint: str) -> Path:
    file = path / name
    if file.is_symlink() or not file.resolve().is_relative_to(path.resolve()):
        raise fault(path, name, "is a link; copy the file itself into the folder")
    if not file.is_file():
        raise fault(path, name, f"is missing{hint}")
    return file


def _read_config(path: Path) -> Mapping[str, Any]:
    if (path / "pytorch_adapter.bin").exists():
        raise fault(
            path, "pytorch_adapter.bin", "is AdapterHub's format; save the adapter with PEFT"
        )
    file = _regular_file(path, CONFIG, hint="; a PEFT adapter folder has one")
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise fault(path, CONFIG, f"is larger than {MAX_CONFIG_BYTES:,} bytes")
        config: Any = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise fault(path, CONFIG, f"is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise fault(path, CONFIG, f"holds a JSON {type(config).__name__}, not an object")
    config = cast("dict[str, Any]", config)
    if not isinstance(config.get("peft_type"), str):
        if {"config", "model_type", "hidden_size"} & set(config) or "architecture" in config:
            raise fault(path, CONFIG, "is AdapterHub's format; save the adapter with PEFT")
        raise fault(path, CONFIG, "has no 'peft_type'; save the adapter with PEFT or Graft")
    return config


def _read_header(path: Path) -> tuple[Mapping[str, TensorEntry], Mapping[str, str]]:
    """The tensors, and whatever text stands beside them."""
    hint = ""
    if (path / "adapter_model.bin").exists():
        hint = (
            "; adapter_model.bin beside it is a pickle, which Graft never opens: "
            "save the adapter again with safe_serialization=True"
        )
    file = _regular_file(path, WEIGHTS, hint=hint)
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise fault(
                    path, WEIGHTS, f"is not a safetensors file ({size} bytes); copy it anew"
                )
            if length > MAX_HEADER_BYTES:
                raise fault(
                    path,
                    WEIGHTS,
                    f"has a header of {length:,} bytes; {MAX_HEADER_BYTES:,} are read at most, "
                    "train fewer modules",
                )
            header: Any = json.loads(handle.read(length))
    except (ValueError, RecursionError) as error:
        raise fault(path, WEIGHTS, f"has a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise fault(path, WEIGHTS, "has a header that is not an object")
    header = cast("dict[str, Any]", header)
    raw: Any = header.pop("__metadata__", None)
    metadata = {str(k): str(v) for k, v in raw.items()} if isinstance(raw, dict) else {}
    if not 0 < len(header) <= MAX_TENSORS:
        raise fault(path, WEIGHTS, f"holds {len(header):,} tensors; 1 to {MAX_TENSORS:,} are read")
    entries = {name: _entry(path, name, raw, 8 + length) for name, raw in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries, metadata


def _entry(path: Path, name: str, raw: Any, data_start: int) -> TensorEntry:
    try:
        if isinstance(raw["dtype"], str) and raw["dtype"] not in _DTYPE_BYTES:
            raise fault(
                path,
                WEIGHTS,
                f"has tensor {name!r} of {raw['dtype'][:40]!r}, which is not read; save it as F32, "
                "F16 or BF16",
            )
        dtype, shape, (start, end) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        sound = whole and _DTYPE_BYTES[dtype] * math.prod(shape) == end - start
    except (KeyError, TypeError, ValueError):
        sound = False
        dtype, shape, start, end = "", (), 0, 0
    if not sound:
        raise fault(path, WEIGHTS, f"describes tensor {name!r} wrongly (dtype, shape or offsets)")
    return TensorEntry(dtype, shape, data_start + start, data_start + end)


def _check_layout(
    path: Path, entries: Mapping[str, TensorEntry], data_start: int, size: int
) -> None:
    """Tensors lie end to end and fill the file, as the format demands."""
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            raise fault(path, WEIGHTS, "has tensors that overlap or leave gaps; copy it anew")
        position = entry.end
    if position != size:
        raise fault(
            path, WEIGHTS, f"is {size} bytes where its header says {position}; copy it anew"
        )
