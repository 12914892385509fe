"""One holder at a time, on a real folder, whatever became of the holder before."""

import threading
import time
from pathlib import Path

import pytest

from cluster.errors import ConflictError, StoreError
from cluster.lease import held
from cluster.store import Store, open_store

BEAT_S = 0.1


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with held(store, "lease", "thing", beat_s=BEAT_S) as check:
        with (
            pytest.raises(ConflictError, match="thing: another call"),
            held(store, "lease", "thing", beat_s=BEAT_S),
        ):
            pytest.fail("two at once")
        time.sleep(5 * BEAT_S)
        check()
        assert len(store.list("lease")) == 1
    assert store.list("lease") == []
    with held(store, "lease", "thing", beat_s=BEAT_S):
        pass


def test_what_a_killed_holder_left_is_taken_over_and_only_once(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.create("lease/000000000007", b"")
    taken: list[bool] = []
    over = threading.Event()

    def take() -> None:
        try:
            with held(store, "lease", "thing", beat_s=BEAT_S):
                taken.append(True)
                over.wait(10)
        except ConflictError:
            taken.append(False)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(taken) < len(threads):
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False, False, False, True]


class Forgetful(Store):
    """Keeps what it is given, and reports the second create as failed."""

    creates = 0

    def create(self, key: str, data: bytes) -> None:
        super().create(key, data)
        self.creates += 1
        if self.creates == 2:
            raise StoreError("no answer came")


def test_a_create_that_landed_and_was_reported_as_failed_is_ones_own(tmp_path: Path) -> None:
    store = Forgetful(str(tmp_path))
    with held(store, "lease", "thing", beat_s=BEAT_S) as check:
        deadline = time.monotonic() + 20
        while store.creates < 4 and time.monotonic() < deadline:
            time.sleep(BEAT_S)
            check()
    assert store.creates >= 4
    assert store.list("lease") == []


def test_a_holder_that_slept_too_long_is_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with held(store, "lease", "thing", beat_s=BEAT_S) as check:
        (key,) = store.list("lease")
        number = int(key.rsplit("/", 1)[1])
        for ahead in range(1, 40):  # as if somebody had taken over while this process stood still
            store.create(f"lease/{number + ahead:012d}", b"")
        time.sleep(3 * BEAT_S)
        with pytest.raises(ConflictError):
            check()
