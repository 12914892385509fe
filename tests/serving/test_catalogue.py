"""What the catalogue answers of its own accord, and for what it looks at the store."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from adapters import make_adapter
from out_of_reach import out_of_reach

from cluster.catalog import Catalog
from cluster.errors import ModelNotFoundError, StoreError
from cluster.registry import Registry
from serving.catalogue import Catalogue

BASE = "tiny"


def everything(_: str) -> bool:
    return True


def only_the_base(name: str) -> bool:
    return name == BASE


def now(catalogue: Catalogue) -> Catalog:
    return asyncio.run(catalogue.catalog())


@pytest.mark.parametrize("ttl_s", [0.0, 1000.0])
def test_what_is_at_hand_needs_no_store(
    bases: Callable[[str], Path], tmp_path: Path, ttl_s: float
) -> None:
    """As long as a snapshot counts, and for whoever may know of it."""
    registry = Registry(str(tmp_path / "store"))
    for name in ("a", "b"):
        registry.publish(name, make_adapter("lora", bases("llama"), tmp_path / name))
    catalogue = Catalogue(registry, base_name=BASE, base_folder=str(bases("llama")), ttl_s=ttl_s)
    asked = ("a", "a@1", "b:latest", "a:0.7+b:0.3")
    assert catalogue.is_at_hand(BASE, catalogue.at_hand(), everything)  # without any look
    seen = now(catalogue)
    assert not catalogue.is_at_hand(BASE, seen, lambda _: False)
    assert not any(catalogue.is_at_hand(model, seen, everything) for model in asked)
    found = [catalogue.resolve(model, seen) for model in asked]
    assert all(catalogue.is_at_hand(model, seen, everything) for model in asked)
    assert not any(catalogue.is_at_hand(model, seen, only_the_base) for model in asked)
    unknown = ("c", "a@2", "a:b", "../a")
    assert not any(catalogue.is_at_hand(model, seen, everything) for model in unknown)
    assert (now(catalogue) is seen) == (ttl_s > 0)
    assert bool(catalogue.at_hand().versions) == (ttl_s > 0)
    if ttl_s:
        shutil.rmtree(tmp_path / "store")
        assert [catalogue.resolve(model, now(catalogue)) for model in asked] == found


def test_a_store_that_fails_takes_away_nothing_that_was_seen(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    registry, asked = Registry(str(tmp_path / "store")), ("a", "a@1", "a:live")
    registry.publish("a", make_adapter("lora", bases("llama"), tmp_path / "a"))
    registry.set_alias("a", "live", 1)

    def catalogue() -> Catalogue:
        return Catalogue(registry, base_name=BASE, base_folder=str(bases("llama")), ttl_s=0)

    running = catalogue()
    found = [running.resolve(model, now(running)) for model in asked]
    with out_of_reach(tmp_path / "store"):
        assert [running.resolve(model, now(running)) for model in asked] == found
        assert running.resolve(BASE, now(running)) is None
        for model in ("b", "a@2", "a:dead"):  # which may have been published meanwhile
            with pytest.raises(StoreError, match="not known yet"):
                running.resolve(model, now(running))
        with pytest.raises(StoreError, match="storage failed"):
            now(catalogue())
    with pytest.raises(ModelNotFoundError):
        running.resolve("b", now(running))
    registry.publish("b", tmp_path / "a")
    assert running.resolve("b", now(running)) == registry.resolve("b")


def test_a_store_that_hangs_holds_up_nobody(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request waits a second for it; what was seen is served, and what was not is told as the
    store's fault. Once it answers, everything is seen."""
    registry = Registry(str(tmp_path / "store"))
    version = registry.publish("a", make_adapter("lora", bases("llama"), tmp_path / "a"))
    catalogue = Catalogue(registry, base_name=BASE, base_folder=str(bases("llama")), ttl_s=0.3)
    assert catalogue.resolve("a", now(catalogue)) == version
    answers, listed = threading.Event(), registry.catalog

    def hanging() -> Catalog:
        answers.wait(60)
        return listed()

    monkeypatch.setattr(registry, "catalog", hanging)
    registry.publish("b", tmp_path / "a")
    time.sleep(0.4)
    seconds: list[float] = []
    for _ in range(3):
        began = time.monotonic()
        assert catalogue.resolve("a", now(catalogue)) == version
        seconds.append(time.monotonic() - began)
    assert 0.9 < seconds[0] < 5
    assert max(seconds[1:]) < 0.5
    with pytest.raises(StoreError, match="'b': not known yet"):
        catalogue.resolve("b", now(catalogue))
    catalogue.refresh()
    answers.set()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(StoreError):
            assert catalogue.resolve("b", now(catalogue)).ref == "b@1"  # type: ignore[union-attr]
            return
    pytest.fail("the store answers, and b is not found")
