"""Adapter folders whose container is damaged, or sent to do damage."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

from cluster.adapter_folder import CONFIG, WEIGHTS


def header(path: Path, length: int, body: bytes) -> None:
    (path / WEIGHTS).write_bytes(struct.pack("<Q", length) + body)


def tensors(path: Path, entries: object, data: bytes = b"") -> None:
    raw = json.dumps(entries).encode()
    header(path, len(raw), raw + data)


def entry(start: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


class Bomb:
    """Leaves a file behind when somebody reads its pickle."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


def bomb(path: Path, name: str) -> None:
    (path / name).write_bytes(pickle.dumps(Bomb(canary(path))))


def canary(path: Path) -> Path:
    """What is there if a pickle of the folder was read."""
    return path.with_name("canary")


# What is wrong with a folder, how it gets so, and what is told of it.
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty folder": (lambda p: [file.unlink() for file in p.iterdir()], f"{CONFIG} is missing"),
    "no config": (lambda p: (p / CONFIG).unlink(), CONFIG),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), WEIGHTS),
    "config not JSON": (lambda p: (p / CONFIG).write_text("{"), f"{CONFIG} is not valid JSON"),
    "config a list": (lambda p: (p / CONFIG).write_text("[]"), f"{CONFIG} holds a JSON list"),
    "config deep": (lambda p: (p / CONFIG).write_text("[" * 100_000), CONFIG),
    "config huge": (lambda p: (p / CONFIG).write_text(" " * (2**20 + 1)), CONFIG),
    "config not UTF-8": (lambda p: (p / CONFIG).write_bytes(b'{"peft_type": "\xff"}'), CONFIG),
    "config without a type": (lambda p: (p / CONFIG).write_text('{"r": 2}'), "peft_type"),
    "AdapterHub": (
        lambda p: (p / CONFIG).write_text('{"config": {"architecture": "lora"}, "hidden_size": 8}'),
        "AdapterHub",
    ),
    "empty file": (
        lambda p: (p / WEIGHTS).write_bytes(b""),
        f"{WEIGHTS} is not a safetensors file (0 bytes)",
    ),
    "pickle": (
        lambda p: ((p / WEIGHTS).unlink(), bomb(p, "adapter_model.bin")),
        f"{WEIGHTS} is missing; adapter_model.bin beside it is a pickle, which Graft never opens",
    ),
    "pickle by another name": (lambda p: bomb(p, WEIGHTS), "not a safetensors file"),
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
