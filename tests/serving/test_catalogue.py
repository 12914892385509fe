"""What the catalogue answers of its own accord, and for what it looks at the store."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import make_adapter

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
