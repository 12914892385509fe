"""Kernels of our own: in C++ for the processor they are compiled on, and in Triton for a GPU.

For what torch has no operator for. C++ is compiled where it runs and kept for later; Triton comes
with torch's builds for GPUs and does the same by itself. A machine without a compiler, or without
Triton, goes without, and is told. It knows nothing of what it compiles.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_COMPILERS = ("c++", "g++", "clang++")
_OPTIONS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
_COMPILE_TIMEOUT_S = 120
_HEADERS = Path(__file__).parent
_log = logging.getLogger("graft.native")


@functools.cache
def triton_kernels(module: str) -> Any:
    """The module of Triton kernels of that name; None where there is no Triton."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        _log.warning("no Triton (%s): %s runs slower", error, module.rpartition(".")[2])
        return None


def are_right(name: str, device: torch.device, away: Callable[[], float], most: float) -> bool:
    """Whether kernels run on a device, and what they give is less than `most` `away` from what it
    should be; if not, that is told."""
    try:
        if not (found := away()) < most:
            raise ArithmeticError(f"they are {found:.1e} away")
    except Exception as error:  # whatever a compiler or a driver says
        _log.warning("%s kernels are not used on %s, which is slower: %s", name, device, error)
        return False
    return True


def kernels(source: Path, stem: str, types: Sequence[Any]) -> Callable[[torch.dtype], Any]:
    """How to find the function of `source` for a dtype, as `stem`_float32, of these ctypes and no
    result; it finds None where there is none, and compiles when it is first asked."""

    @functools.cache
    def of(dtype: torch.dtype) -> Any:
        name = f"{stem}_{str(dtype).removeprefix('torch.')}"
        function = getattr(load(source), name, None)
        if function is not None:
            function.argtypes, function.restype = list(types), None
        return function

    return of


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The compiled `source`, or None where it cannot be had; seconds at first, then at once."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        _log.warning("no C++ compiler (%s): %s runs slower", ", ".join(_COMPILERS), source.stem)
        return None
    try:
        try:
            return ctypes.CDLL(str(_compiled(source, compiler, _kept_folder())))
        except OSError:  # made elsewhere, or on a disk that nothing may run from
            return ctypes.CDLL(str(_compiled(source, compiler, _own_folder())))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in said if "error" in line), said[0] if said else "")
        _log.warning("%s did not compile, and runs slower: %s", source.name, reason)
        return None


def _compiled(source: Path, compiler: str, folder: Path) -> Path:
    """Raises OSError, SubprocessError."""
    texts = [path.read_text() for path in (source, *sorted(_HEADERS.glob("*.h")))]
    version = _output([compiler, "--version"])
    machine = [*platform.libc_ver(), _processor(), torch.__version__]
    identity = "\n".join([*texts, compiler, version, *_OPTIONS, *machine])
    name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    path = folder / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            unfinished = Path(made) / name
            command = [compiler, *_OPTIONS, f"-I{_HEADERS}", str(source), "-o", str(unfinished)]
            _output([*command, "-Wl,--as-needed", *_openmp()] if _openmp() else command)
            os.replace(unfinished, path)  # whole or not there, whoever else compiles
    return path


def _output(command: Sequence[str]) -> str:
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S
    )
    return result.stdout


def _openmp() -> list[str]:
    """torch's own OpenMP, which its CUDA wheels call by another name: one pool of threads."""
    return [str(path) for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))]


def _kept_folder() -> Path:
    """Where compiled kernels stay: the user's cache, if nobody else can write to it."""
    try:
        folder = Path.home() / ".cache" / "graft" / "kernels"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if found.st_uid == os.geteuid() and not others and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return _own_folder()


def _own_folder() -> Path:
    return Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """This process's own; gone with it."""
    return tempfile.TemporaryDirectory(prefix="graft-kernels-", ignore_cleanup_errors=True)


def _processor() -> str:
    """What instructions there are: a home may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
