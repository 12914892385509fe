"""One contract for every store: a local folder, and S3 as a real endpoint on loopback."""

import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import ConflictError, NotFoundError, SpecError, StoreError
from cluster.store import Store, open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    make_bucket: Callable[[], str] = request.getfixturevalue("s3_bucket")
    return open_store(make_bucket())


def test_what_is_created_is_read_back_listed_and_downloaded(store: Store, tmp_path: Path) -> None:
    store.create("a/b/one.json", b"1")
    store.create("a/two", b"\x00" * 3_000_000)
    assert store.read("a/b/one.json") == b"1"
    assert store.list() == ["a/b/one.json", "a/two"]
    assert store.list("a/b") == ["a/b/one.json"]
    assert store.list_folders("a") == ["b"]
    assert store.list("nothing") == []
    store.download("a/two", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size == 3_000_000


def test_a_large_file_goes_in_parts_and_is_written_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.store._WHOLE_BYTES", 2**20)
    monkeypatch.setattr("cluster.store._PART_BYTES", 5 * 2**20)
    content = bytes(range(256)) * 44_000
    (tmp_path / "large").write_bytes(content)
    store.create_file("a/large", tmp_path / "large")
    assert store.read("a/large") == content
    (tmp_path / "large").write_bytes(content[::-1])
    with pytest.raises(ConflictError, match="never overwritten"):
        store.create_file("a/large", tmp_path / "large")
    assert store.read("a/large") == content
    assert store.list() == ["a/large"]


def test_a_key_is_written_once(store: Store) -> None:
    store.create("k", b"first")
    with pytest.raises(ConflictError, match="never overwritten"):
        store.create("k", b"second")
    assert store.read("k") == b"first"


def test_of_many_writers_of_one_key_exactly_one_wins(store: Store) -> None:
    won: list[int] = []

    def write(number: int) -> None:
        try:
            store.create("claim", str(number).encode())
            won.append(number)
        except ConflictError:
            pass

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("claim") == str(won[0]).encode()


def test_absence_and_deletion(store: Store, tmp_path: Path) -> None:
    assert not store.exists("k")
    with pytest.raises(NotFoundError, match="k: not found"):
        store.read("k")
    with pytest.raises(NotFoundError):
        store.download("k", tmp_path / "copy")
    store.create("k", b"")
    assert store.exists("k")
    store.delete("k")
    store.delete("k")
    assert not store.exists("k")


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "a//b", "", "a/\x00", "a b"])
def test_no_key_leaves_the_store(store: Store, key: str) -> None:
    with pytest.raises(SpecError):
        store.create(key, b"")


def test_a_store_travels_by_its_uri(store: Store) -> None:
    store.create("k", b"v")
    assert pickle.loads(pickle.dumps(store)).read("k") == b"v"


@pytest.mark.parametrize("uri", ["ftp://host/x", "", "http://host/bucket"])
def test_unknown_schemes_are_refused(uri: str) -> None:
    with pytest.raises(SpecError, match="use a local folder or one of"):
        open_store(uri)


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="is a file"):
        open_store(str(tmp_path / "file"))


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with pytest.raises(StoreError, match="s3://bucket/k"):
        open_store("s3://bucket").read("k")


def test_a_folder_without_rights(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "store" / "sub").write_text("a file where a folder should be")
    with pytest.raises(StoreError):
        store.create("sub/key", b"")


def test_a_file_that_cannot_be_written_is_told_by_its_own_name(
    store: Store, tmp_path: Path
) -> None:
    store.create("key", b"bytes")
    file = tmp_path / "full" / "file"
    with pytest.raises(StoreError, match=f"^{file}: cannot be written .*; free room there"):
        store.download("key", file)
