"""Adapters of the store under requests over HTTP: bad ones, those that go away or are replaced."""

import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import pytest
from adapters import make_adapter
from bad_adapters import BAD, OF_NO_BASE, edit_config
from damaged_folders import DAMAGED, canary
from out_of_reach import as_nobody, out_of_reach
from rewriting import rewritten
from safetensors.torch import load_file, save_file
from service import ASK, BASE_NAME, CATALOGUE_TTL_S, Running, error, publish, running

from cluster.adapter_folder import CONTENT, WEIGHTS
from cluster.catalog import Catalog
from cluster.errors import AdapterError
from cluster.imports import Imports
from cluster.registry import SCHEMA, AdapterVersion, Registry, _content_hash, file_entry

Bases = Callable[[str], Path]


def text(http: httpx2.Client, model: str, **options: Any) -> str:
    body = {"model": model, **ASK, "ignore_eos": True, **options}
    return http.post("/v1/completions", json=body).json()["choices"][0]["text"]


def streamed(http: httpx2.Client, model: str, meanwhile: Callable[[], None]) -> str:
    """A long answer, whose stream is in progress while something else is done."""
    body = {"model": model, **ASK, "max_tokens": 110, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        first = next(lines)
        meanwhile()
        *rest, end = [line for line in lines if line]
    assert end == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in (first, *rest)]
    return "".join(event["choices"][0]["text"] for event in events)


def put(registry: Registry, name: str, folder: Path) -> None:
    """As a version that nobody checked, by whoever writes into the store past the registry."""
    files = {file: file_entry(folder / file) for file in CONTENT}
    for file in CONTENT:
        registry.store.create_file(f"adapters/{name}/00000001/{file}", folder / file)
    at = "2026-01-01T00:00:00+00:00"
    version = AdapterVersion(name, 1, "LORA", None, _content_hash(files), at, files, card={})
    registry.reveal({"schema": SCHEMA, **asdict(version)})


@pytest.fixture(scope="module")
def sound(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each variant that is spoilt below."""
    folder = tmp_path_factory.mktemp("sound")
    variants = {variant for variant, *_ in BAD}
    return {v: make_adapter(v, bases("llama"), folder / v) for v in sorted(variants)}


@pytest.fixture(scope="module")
def undisturbed(service: Running) -> str:
    """The long answer of an adapter that is sound."""
    with httpx2.Client(base_url=service.url, timeout=60, trust_env=False) as http:
        return text(http, "lora", max_tokens=110)


@pytest.mark.parametrize(("variant", "case", "spoil", "reason"), BAD, ids=lambda v: str(v)[:20])
def test_a_bad_adapter_is_refused_by_its_reason_and_disturbs_nobody(
    service: Running, http: httpx2.Client, sound: dict[str, Path], undisturbed: str,
    tmp_path: Path, variant: str, case: str, spoil: Callable[[Path], object], reason: str,
) -> None:  # fmt: skip
    name = f"bad-{case.lower().replace(' ', '-')}"
    bad = Path(shutil.copytree(sound[variant], tmp_path / "bad"))
    spoil(bad)
    if case in OF_NO_BASE:
        with pytest.raises(AdapterError, match=re.escape(reason)):
            service.registry.publish(name, bad)
        if case == "not finite":  # what is in the store was found finite
            return
        put(service.registry, name, bad)
    else:
        service.registry.publish(name, bad)
    service.service.catalogue.refresh()

    def refused() -> None:
        for _ in range(2):
            detail = error(http.post("/v1/completions", json={"model": name, **ASK}), 400)
            assert detail["code"] == "invalid_adapter"
            assert reason in detail["message"]

    assert streamed(http, "lora", refused) == undisturbed
    assert f"{name}@1" not in service.replica.adapters


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_told_by_its_reason_on_every_way_in(
    service: Running, http: httpx2.Client, sound: dict[str, Path], undisturbed: str,
    tmp_path: Path, case: str,
) -> None:  # fmt: skip
    """Published, dropped under the import prefix, or in the store already."""
    name = f"damaged-{case.lower().replace(' ', '-').translate({44: None, 94: None})}"
    bad, (spoil, reason) = Path(shutil.copytree(sound["lora"], tmp_path / name)), DAMAGED[case]
    spoil(bad)
    store = service.registry.store.local_path()
    assert store is not None
    has_both = all((bad / file).is_file() and not (bad / file).is_symlink() for file in CONTENT)

    def ask(status: int) -> dict[str, Any]:
        return error(http.post("/v1/completions", json={"model": name, **ASK}), status)

    def tried() -> None:
        with pytest.raises(AdapterError, match=re.escape(reason)):
            service.registry.publish(name, bad)
        shutil.copytree(bad, store / "imports" / name, symlinks=True)
        imports = Imports(service.registry)
        looks = [imports.look() for _ in range(2)]
        assert not any(look.imported or look.failed for look in looks)
        told = [file for look in looks for file in look.waiting.values()] or [
            message for look in looks for message in look.refused.values()
        ]
        assert any(file in told[0] for file in CONTENT)
        assert reason in told[0] or not has_both
        service.service.catalogue.refresh()
        assert ask(404)["code"] == "model_not_found"
        if has_both:
            put(service.registry, name, bad)
            service.service.catalogue.refresh()
            detail = ask(400)
            assert detail["code"] == "invalid_adapter"
            assert reason in detail["message"]

    try:
        assert streamed(http, "lora", tried) == undisturbed
    finally:
        shutil.rmtree(store / "imports", ignore_errors=True)
    assert http.get("/ready").status_code == 200
    assert not canary(bad).exists()


def test_an_adapter_that_is_deleted_under_a_stream(
    service: Running, http: httpx2.Client, sound: dict[str, Path]
) -> None:
    """The stream ends whole; whoever asks later is told that there is none."""
    store = service.registry.store.local_path()
    assert store is not None
    service.registry.publish("doomed", sound["lora"])
    service.service.catalogue.refresh()
    whole = text(http, "doomed", max_tokens=110)

    def delete() -> None:
        shutil.rmtree(store / "adapters" / "doomed")
        service.service.catalogue.refresh()
        for model in ("doomed", "doomed@1"):
            detail = error(http.post("/v1/completions", json={"model": model, **ASK}), 404)
            assert detail["code"] == "model_not_found"
        assert service.stats.running == 1, "the stream had ended when it was deleted"

    assert streamed(http, "doomed", delete) == whole
    assert "doomed" not in [card["id"] for card in http.get("/v1/models").json()["data"]]


def test_a_stream_ends_on_the_version_that_it_began_with(
    service: Running, http: httpx2.Client, bases: Bases, tmp_path: Path
) -> None:
    for seed in (1, 2):
        folder = make_adapter("lora", bases("llama"), tmp_path / str(seed), seed=seed)
        service.registry.publish("turning", folder)
    service.registry.set_alias("turning", "live", 1)
    service.service.catalogue.refresh()
    first, second = (text(http, f"turning@{n}", max_tokens=110) for n in (1, 2))

    def move() -> None:
        service.registry.set_alias("turning", "live", 2)
        service.service.catalogue.refresh()
        short = text(http, "turning:live")
        assert service.stats.running == 1, "the stream had ended when the alias was moved"
        assert second.startswith(short)
        assert not first.startswith(short)

    assert streamed(http, "turning:live", move) == first


def test_a_store_that_fails_costs_only_what_must_be_fetched(
    service: Running, http: httpx2.Client, sound: dict[str, Path], tmp_path: Path
) -> None:
    """What was not fetched yet is refused for now, whether its manifest was read or not."""
    store = service.registry.store.local_path()
    assert store is not None
    held = text(http, "lora")
    for name in ("listed", "unseen"):  # each of a content of its own, so of no local copy
        folder = Path(shutil.copytree(sound["lora"], tmp_path / name))
        edit_config(lambda config, name=name: config.update(revision=name))(folder)
        service.registry.publish(name, folder)
    service.service.catalogue.refresh()
    assert http.get("/v1/models/listed").status_code == 200
    with out_of_reach(store):
        for _ in range(2):
            for name in ("listed", "unseen"):
                answer = http.post("/v1/completions", json={"model": name, **ASK})
                assert error(answer, 503)["code"] == "store_unavailable"
                assert answer.headers["retry-after"] == "1"
            assert text(http, "lora") == held
            time.sleep(CATALOGUE_TTL_S)  # so the catalogue asks the store again
        assert http.get("/ready").status_code == 200
    assert [text(http, name) for name in ("listed", "unseen")] == [held, held]


def test_a_store_that_hangs_holds_up_nobody_else(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base needs none; then many requests wait for manifests that do not come."""
    base, answers = bases("llama"), threading.Event()
    names = [f"hung-{number}" for number in range(40)]
    monkeypatch.setattr("serving.gateway.service._STORE_S", 3.0)
    with running(base, tmp_path) as own, ThreadPoolExecutor(50) as threads:
        publish(own.registry, base, tmp_path, "lora")
        for name in names:
            own.registry.publish(name, tmp_path / "lora")
        stored = own.service.catalogue._registry
        read = stored.read

        def hanging(name: str, number: int) -> AdapterVersion:
            assert name == "lora" or answers.wait(60)
            return read(name, number)

        def unlisted() -> Catalog:
            assert listed.wait(60)
            return catalog()

        listed, catalog = threading.Event(), stored.catalog
        monkeypatch.setattr(stored, "catalog", unlisted)
        monkeypatch.setattr(stored, "read", hanging)
        with httpx2.Client(base_url=own.url, timeout=60) as http:
            answer = http.post("/v1/completions", json={"model": "lora", **ASK})
            assert error(answer, 503)["code"] == "store_unavailable"
            assert text(http, BASE_NAME)
            listed.set()
            held = text(http, "lora")
            asked = [
                threads.submit(http.post, "/v1/completions", json={"model": name, **ASK})
                for name in names
            ]
            time.sleep(CATALOGUE_TTL_S)
            assert [text(http, "lora") for _ in range(5)] == [held] * 5
            assert http.get("/v1/models/lora").json()["root"] == "lora@1"
            assert error(http.get("/v1/models"), 503)["code"] == "store_unavailable"
            for answer in asked:
                assert error(answer.result(), 503)["code"] == "store_unavailable"
            answers.set()
            assert [text(http, name) for name in names] == [held] * 40
            assert len(http.get("/v1/models").json()["data"]) == 42


def test_a_version_that_the_service_may_not_read_is_told_as_such(bases: Bases) -> None:
    # Where others may go: pytest's own folders are its user's alone.
    with tempfile.TemporaryDirectory(dir="/tmp") as place, ExitStack() as stack:
        os.chmod(place, 0o755)
        cache = Path(place, "cache")
        cache.mkdir()
        cache.chmod(0o777)
        service = stack.enter_context(running(bases("llama"), Path(place)))
        http = stack.enter_context(httpx2.Client(base_url=service.url, timeout=60, trust_env=False))
        publish(service.registry, bases("llama"), Path(place), "lora", "bitfit")
        held = text(http, "lora")
        closed = Path(place, "store", "adapters", "bitfit", "00000001", WEIGHTS)
        closed.chmod(0)
        with as_nobody():
            answer = http.post("/v1/completions", json={"model": "bitfit", **ASK})
            detail = error(answer, 503)
            assert detail["code"] == "store_unavailable"
            assert f"bitfit/00000001/{WEIGHTS}: permission denied" in detail["message"]
            assert text(http, "lora") == held
        closed.chmod(0o644)
        with as_nobody():
            assert text(http, "bitfit") != held


def test_a_copy_that_is_replaced_while_it_is_loaded(bases: Bases, tmp_path: Path) -> None:
    """The right answer or a refusal for now, never an answer of what lies there."""
    folder = make_adapter("lora", bases("llama"), tmp_path / "lora")
    tensors = load_file(folder / WEIGHTS)
    room = 1.5 * sum(tensor.nbytes for tensor in tensors.values())  # each of two is loaded anew
    with (
        running(bases("llama"), tmp_path, adapters_gib=room / 2**30) as service,
        httpx2.Client(base_url=service.url, timeout=60, trust_env=False) as http,
    ):
        for name in ("neighbour", "rewritten"):
            edit_config(lambda config, name=name: config.update(revision=name))(folder)
            version = service.registry.publish(name, folder)
        right, plain = text(http, "rewritten"), text(http, BASE_NAME)
        assert text(http, "neighbour") == right != plain
        weights = tmp_path / "cache" / version.content_hash / WEIGHTS
        sound = weights.read_bytes()
        save_file({key: 0 * tensor for key, tensor in tensors.items()}, tmp_path / WEIGHTS)
        statuses = list[int]()
        with rewritten(weights, (tmp_path / WEIGHTS).read_bytes(), sound):
            for _ in range(20):
                answer = http.post(
                    "/v1/completions", json={"model": "rewritten", **ASK, "ignore_eos": True}
                )
                statuses.append(answer.status_code)
                if answer.status_code == 200:
                    assert answer.json()["choices"][0]["text"] == right
                else:
                    assert error(answer, 503)["code"] == "copy_changed"
                    assert answer.headers["retry-after"] == "1"
                assert text(http, "neighbour") == right
        assert 503 in statuses
        assert text(http, "rewritten") == right
