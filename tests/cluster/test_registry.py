"""Versions are immutable and whole or absent; aliases move atomically; damage is found."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rewriting import rewritten
from safetensors.torch import save_file

from cluster.adapter_folder import CONFIG, WEIGHTS
from cluster.errors import (
    AdapterError,
    ConflictError,
    NotFoundError,
    SpecError,
)
from cluster.local_copies import LocalCopies
from cluster.registry import Registry


def folder(path: Path, value: float = 1.0) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "some/base"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.x.bias": torch.full((2, 3), value)},
              path / "adapter_model.safetensors")  # fmt: skip
    (path / "README.md").write_text("# card")
    (path / "optimizer.pt").write_bytes(b"stays behind")
    return path


@pytest.fixture(params=["local", "s3"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "local":
        return Registry(str(tmp_path / "store"))
    make_bucket: Callable[[], str] = request.getfixturevalue("s3_bucket")
    return Registry(make_bucket())


def test_publishing_numbers_versions_and_keeps_what_was(registry: Registry, tmp_path: Path) -> None:
    first = registry.publish("bot", folder(tmp_path / "a", 1.0), card={"score": 0.5})
    second = registry.publish("bot", folder(tmp_path / "b", 2.0))
    assert (first.ref, second.ref) == ("bot@1", "bot@2")
    assert registry.resolve("bot") == registry.resolve("bot:latest") == second
    assert registry.resolve("bot@1") == first
    assert first.card == {"score": 0.5}
    assert (first.method, first.base_model) == ("LORA", "some/base")
    assert set(first.files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert registry.versions("bot") == [first, second]
    assert registry.names() == ["bot"]


def test_the_same_adapter_has_the_same_content_hash(registry: Registry, tmp_path: Path) -> None:
    one = registry.publish("a", folder(tmp_path / "a", 1.0))
    same = registry.publish("b", folder(tmp_path / "b", 1.0))
    other = registry.publish("c", folder(tmp_path / "c", 2.0))
    assert one.content_hash == same.content_hash != other.content_hash


def test_concurrent_publishers_get_different_numbers(registry: Registry, tmp_path: Path) -> None:
    source = folder(tmp_path / "a")
    threads = [
        threading.Thread(target=registry.publish, args=("bot", source)) for _ in range(6)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [version.version for version in registry.versions("bot")] == [1, 2, 3, 4, 5, 6]


def test_a_version_without_its_manifest_is_not_there(registry: Registry, tmp_path: Path) -> None:
    version = registry.publish("bot", folder(tmp_path / "a"))
    registry.store.delete(f"adapters/bot/{version.version:08d}/manifest.json")
    with pytest.raises(NotFoundError):
        registry.resolve("bot")
    assert registry.publish("bot", folder(tmp_path / "a")).version == 2


def test_aliases_move_and_are_checked(registry: Registry, tmp_path: Path) -> None:
    for _ in range(2):
        registry.publish("bot", folder(tmp_path / "a"))
    registry.set_alias("bot", "stable", 1)
    assert registry.resolve("bot:stable").version == 1
    registry.set_alias("bot", "stable", 2)
    assert registry.resolve("bot:stable").version == 2
    assert registry.aliases("bot") == {"stable": 2}
    with pytest.raises(NotFoundError, match="no version 9"):
        registry.set_alias("bot", "stable", 9)
    with pytest.raises(SpecError, match="latest"):
        registry.set_alias("bot", "latest", 1)


def test_the_catalog_agrees_with_resolve(registry: Registry, tmp_path: Path) -> None:
    for name in ("bot", "bot", "other"):
        registry.publish(name, folder(tmp_path / "a"))
    registry.set_alias("bot", "stable", 1)
    catalog = registry.catalog()
    for ref in ("bot", "bot@1", "bot:stable", "bot:latest", "other"):
        version = registry.resolve(ref)
        assert catalog.find(ref) == (version.name, version.version)
    for ref in ("bot@7", "bot:gone", "nobody", "../bot", "bot@1:stable", "", "b" * 300):
        assert catalog.find(ref) is None
        with pytest.raises((NotFoundError, SpecError)):
            registry.resolve(ref)


def test_what_others_put_into_the_store_disturbs_nobody(registry: Registry, tmp_path: Path) -> None:
    registry.publish("bot", folder(tmp_path / "a"))
    registry.set_alias("bot", "stable", 1)
    for key in (
        "adapters/.DS_Store",
        "adapters/bot/notes/manifest.json",
        "aliases/bot/x",
        "aliases/.DS_Store",
        "adapters/Bad Name".replace(" ", "_") + "/1/manifest.json",
    ):
        registry.store.create(key, b"{")
    catalog = registry.catalog()
    assert (catalog.versions, catalog.aliases) == ({"bot": [1]}, {("bot", "stable"): 1})
    assert registry.publish("bot", folder(tmp_path / "a")).version == 2
    assert registry.aliases("bot") == {"stable": 1}


def test_a_damaged_manifest_is_named(registry: Registry, tmp_path: Path) -> None:
    registry.publish("good", folder(tmp_path / "a"))
    sound = json.loads(registry.store.read("adapters/good/00000001/manifest.json"))
    undated = json.dumps(sound | {"name": "bad", "version": 5, "created_at": ""}).encode()
    damaged = (b"{", b"[]", b"{}", b'{"schema": 9, "files": {}}', undated)
    for number, content in enumerate(damaged, 1):
        registry.store.create(f"adapters/bad/{number:08d}/manifest.json", content)
        with pytest.raises(AdapterError, match=f"bad@{number}: "):
            registry.resolve(f"bad@{number}")
    assert registry.names() == ["bad", "good"]


def test_a_damaged_alias_is_nobody_elses_fault(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.publish("bot", folder(tmp_path / "a"))
    registry.set_alias("bot", "stable", 1)
    for content in (b"{", b"[]", b"{}", b'{"version": null}'):
        registry.store.create(f"aliases/bot/{content.hex()}/00000001.json", content)
        with pytest.raises(AdapterError, match="is damaged; set the alias anew"):
            registry.resolve(f"bot:{content.hex()}")
    assert dict(registry.catalog().aliases) == {("bot", "stable"): 1}
    assert caplog.text.count("is damaged") == 4


def test_what_is_near_is_named(registry: Registry, tmp_path: Path) -> None:
    registry.publish("support-bot", folder(tmp_path / "a"))
    registry.set_alias("support-bot", "stable", 1)
    with pytest.raises(NotFoundError, match="did you mean 'support-bot'"):
        registry.resolve("suport-bot")
    with pytest.raises(NotFoundError, match="did you mean 'stable'"):
        registry.resolve("support-bot:stabel")


def test_damage_in_the_store_is_found(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "store"))
    version = registry.publish("bot", folder(tmp_path / "a"))
    registry.verify("bot")
    weights = tmp_path / "store/adapters/bot/00000001/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(AdapterError, match="does not match its manifest's hash"):
        registry.verify("bot")
    with pytest.raises(AdapterError):
        LocalCopies(registry, tmp_path / "cache").fetch(version)
    assert not list((tmp_path / "cache").iterdir())


def test_a_bad_folder_publishes_nothing(registry: Registry, tmp_path: Path) -> None:
    bad = folder(tmp_path / "a", float("nan"))
    with pytest.raises(AdapterError):
        registry.publish("bot", bad)
    assert registry.store.list() == []


def test_a_tensor_that_holds_nothing_is_published_of_adalora_alone(
    registry: Registry, tmp_path: Path
) -> None:
    """As ZeRO 3 leaves a weight that is not gathered, and AdaLoRA a module without ranks."""
    bad, weight = folder(tmp_path / "a"), "base_model.model.lm_head.base_layer.weight"
    save_file({weight: torch.ones(0)}, bad / WEIGHTS)
    with pytest.raises(AdapterError, match=f"has tensor '{weight}' of shape"):
        registry.publish("bot", bad)
    (bad / CONFIG).write_text(json.dumps({"peft_type": "ADALORA", "target_r": 2}))
    module = "base_model.model.q_proj.lora_"
    save_file({f"{module}A": torch.ones(0, 4), f"{module}B": torch.ones(4, 0)}, bad / WEIGHTS)
    assert registry.publish("bot", bad).version == 1


def test_a_folder_that_changes_while_it_is_published_is_refused(
    registry: Registry, tmp_path: Path
) -> None:
    """Or published as one of what it was: never with bytes that are not its hash's."""
    contents = [(folder(tmp_path / name, value) / WEIGHTS).read_bytes()
                for name, value in (("a", 1.0), ("b", 2.0))]  # fmt: skip
    refused = list[str]()
    with rewritten(tmp_path / "a" / WEIGHTS, *contents):
        for _ in range(20):
            try:
                registry.publish("bot", tmp_path / "a")
            except AdapterError as error:
                refused.append(error.message)
    assert refused
    assert all(f"{WEIGHTS} was changed while it was read" in message for message in refused)
    published = registry.versions("bot") if "bot" in registry.names() else []
    assert len(published) + len(refused) == 20
    for version in (*published, registry.publish("bot", tmp_path / "a")):
        registry.verify(version.ref)
    uploaded = [key for key in registry.store.list() if key.endswith(WEIGHTS)]
    assert len(uploaded) == len(published) + 1


@pytest.mark.parametrize("name", ["", "Bot", "../x", "a/b", "-x", "x" * 101, "a b"])
def test_names_that_are_not(registry: Registry, tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError):
        registry.publish(name, folder(tmp_path / "a"))


def test_of_alias_moves_at_the_same_moment_some_win_and_the_rest_are_told(
    registry: Registry, tmp_path: Path
) -> None:
    for _ in range(6):
        registry.publish("bot", folder(tmp_path / "a"))
    moved: list[int] = []

    def move(version: int) -> None:
        try:
            registry.set_alias("bot", "stable", version)
            moved.append(version)
        except ConflictError:
            pass

    threads = [threading.Thread(target=move, args=(n + 1,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.store.list("aliases/bot/stable")) == len(moved) > 0
    assert registry.resolve("bot:stable").version in moved
