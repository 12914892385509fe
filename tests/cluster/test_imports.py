"""PEFT folders dropped into a store: taken once, whole, by one of many, the bad ones apart."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from out_of_reach import as_nobody
from safetensors.numpy import save_file

from cluster.adapter_folder import CONFIG, WEIGHTS
from cluster.errors import AdapterError, StoreError
from cluster.import_prefix import download, folders
from cluster.imports import MAX_IMPORT_BYTES, Imports
from cluster.local_copies import LocalCopies
from cluster.registry import Registry
from cluster.store import Store


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
    copy = LocalCopies(registry, tmp_path / "cache").fetch(version)
    assert (copy / WEIGHTS).read_bytes() == content
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


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_folder_that_is_closed_to_us_is_told_as_such(mode: int) -> None:
    """Not to be listed, not to be entered, or neither; it waits for no file."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        drop = Path(place, "imports")
        closed = peft_folder(drop / "closed")
        (drop / "part").mkdir()
        closed.chmod(mode)
        try:
            with as_nobody():
                imports = Imports(Registry(place))
                looks = [imports.look() for _ in range(2)]
        finally:
            closed.chmod(0o755)
    assert [set(look.failed) for look in looks] == [set(), {"closed"}]
    assert looks[1].failed["closed"].startswith(f"{place}/imports/closed: Permission denied; let ")
    assert looks[1].waiting == {"part": CONFIG}


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


def test_no_link_is_followed(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "store"))
    drop = tmp_path / "store" / "imports"
    secret = registry.publish("secret", peft_folder(tmp_path / "whole"))
    weights = tmp_path / "store" / "adapters" / "secret" / f"{secret.version:08d}" / WEIGHTS
    peft_folder(drop / "team-a-file")
    (drop / "team-a-file" / WEIGHTS).unlink()
    (drop / "team-a-file" / WEIGHTS).symlink_to(weights)
    (drop / "team-a-folder").symlink_to(weights.parent)
    (drop / "loop").symlink_to(drop.parent)
    peft_folder(drop / "good")
    one, other = Imports(registry), Imports(registry)
    looks = [imports.look() for _ in range(3) for imports in (one, other)]
    refused = [pair for look in looks for pair in look.refused.items()]
    assert sorted(name for name, _ in refused) == ["loop", "team-a-file", "team-a-folder"]
    assert all("is a link" in reason for _, reason in refused)
    assert [version.ref for look in looks for version in look.imported] == ["good@1"]
    assert registry.names() == ["good", "secret"]
    (drop / "team-a-folder").unlink()
    shutil.copytree(weights.parent, drop / "team-a-folder")
    assert [v.ref for _ in range(2) for v in one.look().imported] == ["team-a-folder@1"]


@pytest.mark.parametrize("linked", ["", WEIGHTS])
def test_a_link_that_takes_a_files_place_after_the_listing(linked: str, tmp_path: Path) -> None:
    store = Registry(str(tmp_path / "store")).store
    folder = peft_folder(tmp_path / "store" / "imports" / "bot")
    mark = folders(store)["bot"][WEIGHTS]
    (folder / linked).rename(tmp_path / "secret")
    (folder / linked).symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterError, match="is a link"):
        download(store, "bot", WEIGHTS, mark, tmp_path / "copy")


def test_an_import_that_keeps_failing_takes_one_number_and_ever_longer_pauses(
    tmp_path: Path,
) -> None:
    class Full(Store):
        full, uploads = True, 0

        def create_file(self, key: str, path: Path) -> None:
            self.uploads += path.name == WEIGHTS
            if self.full and path.name == WEIGHTS:
                raise StoreError("no space left")
            super().create_file(key, path)

    store = Full(str(tmp_path / "store"))
    peft_folder(tmp_path / "store" / "imports" / "bot")
    imports = Imports(Registry(store))
    imports.look()
    looks = [imports.look() for _ in range(32)]
    assert all(look.failed == {"bot": "no space left"} for look in looks)
    assert store.uploads == 6  # at looks 1, 2, 4, 8, 16, 32
    assert store.list("adapters") == ["adapters/bot/00000001/claim"]
    store.full = False
    assert [v.ref for _ in range(32) for v in imports.look().imported] == ["bot@1"]


def test_who_comes_second_leaves_no_copy(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "store"))
    peft_folder(tmp_path / "store" / "imports" / "bot")
    first = Imports(registry)
    first.look()

    class Slow(Registry):
        def stage(self, *args: Any, **named: Any) -> dict[str, Any]:
            staged = super().stage(*args, **named)
            assert [version.ref for version in first.look().imported] == ["bot@2"]
            return staged

    second = Imports(Slow(registry.store))
    looks = [second.look() for _ in range(3)]
    assert not any(look.imported or look.failed or look.refused for look in looks)
    keys = registry.store.list("adapters/bot")
    assert [key for key in keys if "00000001" in key] == ["adapters/bot/00000001/claim"]
    assert registry.verify("bot").version == 2


def test_what_is_too_large_for_a_gateway_is_not_even_read(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "store"))
    folder = peft_folder(tmp_path / "store" / "imports" / "bot")
    os.truncate(folder / WEIGHTS, MAX_IMPORT_BYTES)  # without blocks on the disk
    imports = Imports(registry)
    reasons = [imports.look().refused for _ in range(3)]
    assert reasons[0] == reasons[2] == {}
    assert f"{MAX_IMPORT_BYTES:,}; publish it with `graft adapters import`" in reasons[1]["bot"]
