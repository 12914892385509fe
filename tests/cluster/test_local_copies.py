"""Copies are made once, verified, and never used once somebody has touched them."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from out_of_reach import as_nobody
from safetensors.torch import save_file

from cluster.adapter_folder import CONFIG, WEIGHTS
from cluster.errors import AdapterError, CopyChangedError, StoreError
from cluster.local_copies import LocalCopies
from cluster.registry import AdapterVersion, Registry


def published(registry: Registry, folder: Path) -> AdapterVersion:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "some/base"}
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({"base_model.model.x.bias": torch.ones(2, 3)}, folder / WEIGHTS)
    return registry.publish("bot", folder)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_fetching_copies_once(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    is_local = kind == "local"
    uri = str(tmp_path / "store") if is_local else request.getfixturevalue("s3_bucket")()
    registry = Registry(uri)
    version = published(registry, tmp_path / "a")
    copies = LocalCopies(registry, tmp_path / "cache")
    path = copies.fetch(version)
    assert path == tmp_path / "cache" / version.content_hash
    before = (path / WEIGHTS).stat().st_mtime_ns
    assert copies.fetch(version) == path
    assert (path / WEIGHTS).stat().st_mtime_ns == before


def test_a_copy_that_was_changed_is_fetched_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before this process has seen it, and after; by name, and not from a store that is damaged."""
    registry, cache = Registry(str(tmp_path / "store")), tmp_path / "cache"
    version = published(registry, tmp_path / "a")
    first, second = LocalCopies(registry, cache), LocalCopies(registry, cache)
    weights = first.fetch(version) / WEIGHTS
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + b"x")
    for copies in (first, second):
        assert copies.fetch(version) == weights.parent
        assert weights.read_bytes() == sound
        weights.write_bytes(sound[:-1] + b"y")
    assert caplog.text.count("bot@1") == 2
    with pytest.raises(CopyChangedError, match="changed while it was read"):
        first.check(weights.parent)
    weights.unlink()
    weights.symlink_to(tmp_path / "a" / WEIGHTS)
    assert not (second.fetch(version) / WEIGHTS).is_symlink()
    assert [path.name for path in cache.iterdir()] == [version.content_hash]
    weights.write_bytes(sound[:-1] + b"z")
    (tmp_path / "store/adapters/bot/00000001" / WEIGHTS).write_bytes(sound[:-1])
    with pytest.raises(AdapterError, match=r"bot@1.*does not match"):
        second.fetch(version)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "store"))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StoreError, match=r"cache .*cache: cannot be written .*another folder"):
        LocalCopies(registry, tmp_path / "cache").fetch(published(registry, tmp_path / "a"))


def test_a_cache_that_may_not_be_entered_is_told() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, 0o755)
        registry, cache = Registry(f"{place}/store"), Path(place, "cache")
        version = published(registry, Path(place, "a"))
        cache.mkdir(mode=0)
        with as_nobody(), pytest.raises(StoreError, match=r"Permission denied.*another folder"):
            LocalCopies(registry, cache).fetch(version)
        cache.chmod(0o755)
