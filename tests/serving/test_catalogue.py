"""What the catalogue answers of its own accord, and for what it looks at the store."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import make_adapter
from out_of_reach import out_of_reach

from cluster.catalog import Catalog
from cluster.errors import ModelNotFoundError, StoreError
from cluster.registry import AdapterVersion, Registry
from serving.catalogue import Catalogue

BASE = "tiny"


def only_the_base(name: str) -> bool:
    return name == BASE


def find(catalogue: Catalogue, model: str, **options: Any) -> Any:
    return asyncio.run(catalogue.find(model, **options))


@pytest.fixture
def registry(tmp_path: Path, bases: Callable[[str], Path]) -> Registry:
    """A store with the adapter a; under tmp_path/a is its folder."""
    registry = Registry(str(tmp_path / "store"))
    registry.publish("a", make_adapter("lora", bases("llama"), tmp_path / "a"))
    return registry


Make = Callable[..., Catalogue]


@pytest.fixture
def catalogue_of(bases: Callable[[str], Path]) -> Make:
    def make(registry: Registry, ttl_s: float) -> Catalogue:
        return Catalogue(registry, base_name=BASE, base_folder=str(bases("llama")), ttl_s=ttl_s)

    return make


def test_what_was_read_needs_no_store(
    registry: Registry, catalogue_of: Make, tmp_path: Path
) -> None:
    """And the base never does."""
    registry.publish("b", tmp_path / "a")
    asked = ("a", "a@1", "b:latest", "a:0.7+b:0.3", BASE)
    catalogue, other = catalogue_of(registry, 1000), catalogue_of(registry, 1000)
    found = [find(catalogue, model) for model in asked]
    with pytest.raises(ModelNotFoundError):
        find(catalogue, "a", allows=only_the_base)
    assert find(other, BASE, allows=only_the_base) is None
    shutil.rmtree(tmp_path / "store")
    assert [find(catalogue, model) for model in asked] == found
    assert find(catalogue_of(Registry(str(tmp_path / "nowhere")), 1000), BASE) is None


def test_a_mix_is_asked_for_by_its_reference(
    registry: Registry, catalogue_of: Make, tmp_path: Path
) -> None:
    """With weights that Python writes with an exponent, too."""
    registry.publish("b", tmp_path / "a")
    catalogue = catalogue_of(registry, 1000)
    for mix in ("a:0.7+b:-0.3", "a:0.00001+b:1", "b:9999.000000001+a:.5"):
        found = find(catalogue, mix)
        assert find(catalogue, found.ref) == found
    assert find(catalogue, "a:0.00001+b:1").ref == "a@1:0.00001+b@1:1.0"


def test_a_store_that_fails_takes_away_nothing_that_was_seen(
    registry: Registry, catalogue_of: Make, tmp_path: Path
) -> None:
    asked = ("a", "a@1", "a:live")
    registry.set_alias("a", "live", 1)
    running = catalogue_of(registry, 0.0)
    found = [find(running, model) for model in asked]
    with out_of_reach(tmp_path / "store"):
        assert [find(running, model) for model in asked] == found
        assert find(running, BASE) is None
        for model in ("b", "a@2", "a:dead"):  # which may have been published meanwhile
            with pytest.raises(StoreError, match="not known yet"):
                find(running, model)
        for model in ("../a", "b" * 10_000, "a@x"):  # which cannot
            with pytest.raises(ModelNotFoundError):
                find(running, model)
        with pytest.raises(ModelNotFoundError):
            find(running, "b", allows=only_the_base)
        new = catalogue_of(registry, 0.0)
        with pytest.raises(StoreError, match="storage failed"):
            find(new, "a")
        for catalogue in (running, new):  # no store is needed to tell
            for model in (BASE, "a", "../a"):
                with pytest.raises(ModelNotFoundError):
                    find(catalogue, model, allows=lambda name: name == "b")
    with pytest.raises(ModelNotFoundError):
        find(running, "b")
    registry.publish("b", tmp_path / "a")
    assert find(running, "b") == registry.resolve("b")


def test_a_version_that_another_gateway_told_of_is_looked_for(
    registry: Registry, catalogue_of: Make, tmp_path: Path
) -> None:
    """However young the snapshot is; what is unknown altogether costs no look."""
    catalogue = catalogue_of(registry, 1000)
    assert find(catalogue, "a").ref == "a@1"
    for name in ("a", "b"):
        registry.publish(name, tmp_path / "a")
    assert find(catalogue, "a").ref == "a@1"
    with pytest.raises(ModelNotFoundError):
        find(catalogue, "b")
    assert find(catalogue, "a@2").ref == "a@2"
    assert find(catalogue, "b").ref == "b@1"
    registry.publish("c", tmp_path / "a")
    with pytest.raises(ModelNotFoundError):
        find(catalogue, "c@1", allows=only_the_base)
    assert find(catalogue, "c@1").ref == "c@1"
    with pytest.raises(ModelNotFoundError):
        find(catalogue, "a@3")


def test_a_store_that_hangs_holds_up_nobody(
    registry: Registry, catalogue_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks waits a second for its look at most; what was seen is served, and what was not is
    told as the store's fault. Once it answers, everything is seen."""
    catalogue = catalogue_of(registry, 0.3)
    answers, listed, looks = threading.Event(), registry.catalog, list[float]()

    def hanging() -> Catalog:
        looks.append(time.monotonic())
        answers.wait(60)
        return listed()

    async def ask() -> None:
        version = await catalogue.find("a")
        monkeypatch.setattr(registry, "catalog", hanging)
        registry.publish("b", tmp_path / "a")
        await asyncio.sleep(0.4)
        many = [catalogue.find("a") for _ in range(100)]
        assert await asyncio.gather(*many) == [version] * 100
        waited_s = time.monotonic() - looks[0]
        assert waited_s > 0.5, "nobody looked"
        for _ in range(100):
            assert await catalogue.find("a") == version
        assert len(looks) == 1
        unknown = [catalogue.find("b") for _ in range(20)]
        told = await asyncio.gather(*unknown, return_exceptions=True)
        assert all(isinstance(error, StoreError) for error in told), told
        callbacks = catalogue._begin_look()._callbacks  # type: ignore[attr-defined]
        assert len(callbacks) == 1, "who left still waits"
        catalogue.refresh()
        answers.set()
        await catalogue._begin_look()
        assert (await catalogue.find("b")).ref == "b@1"  # type: ignore[union-attr]

    asyncio.run(ask())


def test_a_store_that_is_slow_is_one_that_answers(
    registry: Registry, catalogue_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose listing takes longer than a snapshot counts, and than anyone waits for what was
    seen."""
    catalogue, listed = catalogue_of(registry, 0.05), registry.catalog

    def slowly() -> Catalog:
        time.sleep(1.2)
        return listed()

    async def ask() -> None:
        version = await catalogue.find("a")
        monkeypatch.setattr(registry, "catalog", slowly)

        async def one(place: int) -> None:
            for _ in range(2):
                await asyncio.sleep(0.07 * (place % 7))
                assert await catalogue.find("a") == version
                if place < 10:
                    with pytest.raises(ModelNotFoundError):
                        await catalogue.find("nobody")

        others = asyncio.gather(*map(one, range(20)))
        while not others.done():  # at every turn of the loop, that of a look's end among them
            assert await catalogue.find("a") == version
            await asyncio.sleep(0)
        await others

    asyncio.run(ask())


def test_a_manifest_that_hangs_is_read_once_and_holds_up_no_other(
    registry: Registry, catalogue_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "c"):
        registry.publish(name, tmp_path / "a")
    catalogue, answers, read = catalogue_of(registry, 1000), threading.Event(), registry.read
    reads: list[str] = []

    def hanging(name: str, number: int) -> AdapterVersion:
        reads.append(name)
        assert name != "b" or answers.wait(60)
        return read(name, number)

    async def ask() -> None:
        monkeypatch.setattr(registry, "read", hanging)
        for _ in range(50):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(catalogue.find("b"), 0.001)
        assert (await catalogue.find("c")).ref == "c@1"  # type: ignore[union-attr]
        waiting = asyncio.create_task(catalogue.adapters(await catalogue.catalog()))
        await asyncio.sleep(0.1)
        answers.set()
        assert (await catalogue.find("b")).ref == "b@1"  # type: ignore[union-attr]
        assert sorted(await waiting) == ["a", "b", "c"]
        assert sorted(reads) == ["a", "b", "c"]

    asyncio.run(ask())
