"""Kernels are compiled once; where they cannot be, that is told, and nothing fails."""

import ctypes
import shutil
from pathlib import Path

import pytest

from cluster import native

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    native.load.cache_clear()
    monkeypatch.setattr(native, "_own_folder", lambda: tmp_path)
    return tmp_path / "home" / ".cache" / "graft" / "kernels"


def write(folder: Path, text: str) -> Path:
    path = folder / "answer.cpp"
    path.write_text(text)
    return path


def test_a_kernel_is_compiled_once(tmp_path: Path, own_cache: Path) -> None:
    path = write(tmp_path, SOURCE)
    first = native.load(path)
    assert isinstance(first, ctypes.CDLL)
    assert first.answer() == 42
    (compiled,) = own_cache.iterdir()
    made_ns = compiled.stat().st_mtime_ns
    native.load.cache_clear()
    assert native.load(path) is not None
    assert [p.stat().st_mtime_ns for p in own_cache.iterdir()] == [made_ns]


def test_another_text_is_another_kernel(tmp_path: Path, own_cache: Path) -> None:
    native.load(write(tmp_path, SOURCE))
    native.load.cache_clear()
    found = native.load(write(tmp_path, SOURCE.replace("42", "43")))
    assert found is not None
    assert found.answer() == 43
    assert len(list(own_cache.iterdir())) == 2


def test_without_a_compiler_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.load(write(tmp_path, SOURCE)) is None
    assert "no C++ compiler" in caplog.text


def test_a_compiler_that_fails_is_told_of(
    tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert native.load(write(tmp_path, "int answer( {")) is None
    assert "answer.cpp did not compile" in caplog.text
    assert "error" in caplog.text
    assert not list(own_cache.iterdir())


def test_a_folder_that_others_write_is_not_trusted(tmp_path: Path, own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    own_cache.chmod(0o777)
    assert native.load(write(tmp_path, SOURCE)) is not None
    assert not list(own_cache.iterdir())


def test_a_kept_kernel_that_does_not_load_is_made_again(tmp_path: Path, own_cache: Path) -> None:
    path = write(tmp_path, SOURCE)
    native.load(path)
    native.load.cache_clear()
    (kept,) = own_cache.iterdir()
    kept.unlink()  # the first one stays mapped
    kept.write_bytes(b"cut")
    found = native.load(path)
    assert found is not None
    assert found.answer() == 42


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(write(tmp_path, SOURCE)))
    found = native.load(tmp_path / "answer.cpp")
    assert found is not None
    assert found.answer() == 42
