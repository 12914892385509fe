"""What the catalogue answers of its own accord, and for what it looks at the store."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import make_adapter
from out_of_reach import out_of_reach

from cluster.errors import ModelNotFoundError, StoreError
from cluster.registry import Registry
from serving.catalogue import Catalogue

BASE = "tiny"


def everything(_: str) -> bool:
    return True


def only_the_base(name: str) -> bool:
    return name == BASE


@pytest.mark.parametrize("ttl_s", [0.0, 1000.0])
def test_what_is_at_hand_needs_no_store(
    bases: Callable[[str], Path], tmp_path: Path, ttl_s: float
) -> None:
    """As long as a snapshot counts, and for whoever may know of it."""
    registry = Registry(str(tmp_path / "store"))
    for name in ("a", "b"):
        registry.publish(name, make_adapter("lora", bases("llama"), tmp_path / name))
    catalogue = Catalogue(registry, base_name=BASE, base_folder=str(bases("llama")), ttl_s=ttl_s)
    assert catalogue.is_at_hand(BASE, everything)
    assert not catalogue.is_at_hand(BASE, lambda _: False)
    asked = ("a", "a@1", "b:latest", "a:0.7+b:0.3")
    assert not any(catalogue.is_at_hand(model, everything) for model in asked)
    found = [catalogue.resolve(model) for model in asked]
    assert [catalogue.is_at_hand(model, everything) for model in asked] == [ttl_s > 0] * 4
    assert not any(catalogue.is_at_hand(model, only_the_base) for model in asked)
    assert not any(catalogue.is_at_hand(model, everything) for model in ("c", "a@2", "a:b", "../a"))
    if ttl_s:
        shutil.rmtree(tmp_path / "store")
        assert [catalogue.resolve(model) for model in asked] == found


def test_a_store_that_fails_takes_away_nothing_that_was_seen(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    registry, asked = Registry(str(tmp_path / "store")), ("a", "a@1", "a:live")
    registry.publish("a", make_adapter("lora", bases("llama"), tmp_path / "a"))
    registry.set_alias("a", "live", 1)

    def catalogue() -> Catalogue:
        return Catalogue(registry, base_name=BASE, base_folder=str(bases("llama")), ttl_s=0)

    running = catalogue()
    found = [running.resolve(model) for model in asked]
    with out_of_reach(tmp_path / "store"):
        assert [running.resolve(model) for model in asked] == found
        assert running.resolve(BASE) is None
        for model in ("b", "a@2", "a:dead"):
            with pytest.raises(ModelNotFoundError):
                running.resolve(model)
        with pytest.raises(StoreError, match="storage failed"):
            catalogue().resolve("a")
    registry.publish("b", tmp_path / "a")
    assert running.resolve("b") == registry.resolve("b")
