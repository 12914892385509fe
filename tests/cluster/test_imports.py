"""PEFT folders dropped into a store: taken once, whole, by one of many, the bad ones apart."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.adapter_folder import CONFIG, WEIGHTS
from cluster.imports import Imports
from cluster.registry import Registry


def peft_folder(path: Path, value: float = 1.0) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    save_file({"a": np.full((2, 2), value, dtype=np.float32)}, path / WEIGHTS)
    return path


def test_a_folder_is_taken_once_it_has_come_to_rest(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "store"))
    imports, drop = Imports(registry), tmp_path / "store" / "imports" / "bot"
    assert imports.look().imported == []
    whole = peft_folder(tmp_path / "whole")
    drop.mkdir(parents=True)
    shutil.copy(whole / CONFIG, drop)
    assert [imports.look().waiting for _ in range(3)] == [{}, {"bot": WEIGHTS}, {}]
    content = (whole / WEIGHTS).read_bytes()
    (drop / WEIGHTS).write_bytes(content[:60])
    imports.look()
    (drop / WEIGHTS).write_bytes(content)  # it has grown between two looks
    assert imports.look().imported == []
    (drop / "optimizer.pt").write_bytes(b"never read")
    (look, again) = imports.look(), imports.look()
    assert [version.ref for version in (*look.imported, *again.imported)] == ["bot@1"]
    assert imports.look().imported == Imports(registry).look().imported == []
    version = registry.resolve("bot")
    assert set(version.files) == {CONFIG, WEIGHTS}
    assert version.card == {"imported_from": f"{registry.store.uri}/imports/bot"}
    assert (registry.fetch(version, tmp_path / "cache") / WEIGHTS).read_bytes() == content
    peft_folder(drop, 2.0)
    found = [version.ref for _ in range(3) for version in imports.look().imported]
    assert found == ["bot@2"]


def test_a_bad_folder_is_told_of_once_by_all_and_disturbs_nobody(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "store"))
    drop = tmp_path / "store" / "imports"
    peft_folder(drop / "good")
    peft_folder(drop / "nan", float("nan"))
    (peft_folder(drop / "cut") / WEIGHTS).write_bytes(b"\xff" * 20)
    peft_folder(drop / "Not a name!")
    one, other = Imports(registry), Imports(registry)
    looks = [imports.look() for _ in range(4) for imports in (one, other)]
    refused = [pair for look in looks for pair in look.refused.items()]
    reasons = dict(refused)
    # Each process tells of a name that is none; the rest is told once.
    assert sorted(name for name, _ in refused) == [*["Not a name!"] * 2, "cut", "nan"]
    assert f"{registry.store.uri}/imports/nan: {WEIGHTS} tensor 'a' holds NaN" in reasons["nan"]
    assert [version.ref for look in looks for version in look.imported] == ["good@1"]
    assert registry.names() == ["good"]
    peft_folder(drop / "nan", 3.0)
    assert [v.ref for _ in range(3) for v in one.look().imported] == ["nan@1"]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_many_that_look_at_once_register_one_version(
    kind: str, tmp_path: Path, s3_bucket: Callable[[], str]
) -> None:
    registry = Registry(str(tmp_path / "store") if kind == "local" else s3_bucket())
    whole = peft_folder(tmp_path / "whole")
    for number in range(4):
        for file in (CONFIG, WEIGHTS):
            registry.store.create_file(f"imports/bot-{number}/{file}", whole / file)
    watchers = [Imports(Registry(registry.store.uri)) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            list(pool.map(lambda watcher: watcher.look(), watchers))
    assert registry.names() == [f"bot-{number}" for number in range(4)]
    assert all(len(registry.versions(name)) == 1 for name in registry.names())


def test_whoever_ends_before_a_version_is_visible_is_finished_by_another(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "store"))
    peft_folder(tmp_path / "store" / "imports" / "bot")

    class Killed(BaseException):
        pass

    class Dying(Registry):
        def reveal(self, manifest: object) -> None:
            raise Killed

    dying = Imports(Dying(registry.store))
    dying.look()
    with pytest.raises(Killed):
        dying.look()
    assert registry.names() == []
    other = Imports(registry)
    assert [version.ref for _ in range(2) for version in other.look().imported] == ["bot@1"]


def test_what_cannot_be_read_or_is_damaged_stops_nobody(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "store"))
    drop = tmp_path / "store" / "imports"
    peft_folder(drop / "a-bad")
    peft_folder(drop / "b-good")

    imports = Imports(registry)
    imports.look()
    claimed = tmp_path / "store" / "adapters" / "a-bad"
    claimed.parent.mkdir()
    claimed.write_text("a file where its versions would be")
    look = imports.look()
    assert [version.ref for version in look.imported] == ["b-good@1"]
    assert set(look.failed) == {"a-bad"}
    claimed.unlink()
    assert [version.ref for version in imports.look().imported] == ["a-bad@1"]
