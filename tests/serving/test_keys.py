"""API keys: who comes in, what each may see and how much of it, and that none is ever stored."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pytest
import structlog
import typer
from service import ASK, BASE_NAME, CATALOGUE_TTL_S, Running, error, publish, running
from typer.testing import CliRunner

from cluster.errors import (
    AuthenticationError,
    NotFoundError,
    SpecError,
    StoreError,
)
from cluster.store import Store
from cluster.tables import write_table
from serving.command import generate
from serving.command import keys as commands
from serving.gateway.access import Door, Tenant
from serving.keys import KeyStore, find

Bases = Callable[[str], Path]


class Guarded:
    """A service that asks for keys."""

    def __init__(self, service: Running, keys: KeyStore) -> None:
        self.service, self.url, self.keys = service, service.url, keys

    def client(self, **rights: Any) -> httpx2.Client:
        """A connection with a new key of those rights."""
        _, text = self.keys.create("someone", **rights)
        time.sleep(1.5 * CATALOGUE_TTL_S)
        return self.connect(f"Bearer {text}")

    def connect(self, authorization: str) -> httpx2.Client:
        headers = {"Authorization": authorization}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)


@pytest.fixture(scope="module")
def guarded(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    keys = KeyStore(str(folder / "keys"))
    with running(bases("llama"), folder, gateway={"keys": str(folder / "keys")}) as service:
        publish(service.registry, bases("llama"), folder, "lora", "bitfit")
        yield Guarded(service, keys)


def test_nobody_without_a_key(guarded: Guarded) -> None:
    with guarded.client() as http:
        assert http.get("/v1/models").status_code == 200
        text = http.headers["authorization"].partition(" ")[2]
    with guarded.connect(f"bearer {text}") as http:
        assert http.get("/v1/models").status_code == 200
    for wrong in ("", "Bearer", f"Basic {text}", "Bearer graft-x-y", f"Bearer {text}x", "Bearer é"):
        response = httpx2.get(
            f"{guarded.url}/v1/models", headers={b"Authorization": wrong.encode()}
        )
        assert error(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    forged = {"Host": "x/health?"}
    for path in ("/v1/models", "/v1/models/", "/metrics", "/v1/nothing", "/health/../v1/models"):
        for headers in ({}, forged):
            error(httpx2.get(f"{guarded.url}{path}", headers=headers), 401)
    error(httpx2.post(f"{guarded.url}/v1/completions", content=b"{"), 401)
    assert httpx2.get(f"{guarded.url}/health/").status_code == 200
    assert httpx2.get(f"{guarded.url}/ready").status_code == 200


def test_a_forbidden_adapter_is_as_unknown_as_none(guarded: Guarded) -> None:
    with guarded.client(adapters=["bit*"]) as http:
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["bitfit"]
        assert http.post("/v1/completions", json={"model": "bitfit@1", **ASK}).status_code == 200
        refused = [
            error(http.post("/v1/completions", json={"model": model, **ASK}), 404)
            for model in ("lora", "loro", BASE_NAME, "lora@1", "bitfit:1+lora:1")
        ]
        assert len({d["message"].split("'", 2)[2] for d in refused}) == 1
        assert {detail["code"] for detail in refused} == {"model_not_found"}
        error(http.get("/v1/models/lora"), 404)
        error(http.get("/metrics"), 404)
    with guarded.client() as http:
        assert "graft_requests_total" in http.get("/metrics").text


def test_a_revoked_key_is_out(guarded: Guarded) -> None:
    with guarded.client() as http:
        assert http.get("/v1/models").status_code == 200
        key_id = http.headers["authorization"].split("-")[1]
        guarded.keys.revoke(key_id)
        time.sleep(1.5 * CATALOGUE_TTL_S)
        error(http.get("/v1/models"), 401)
    with pytest.raises(NotFoundError, match="graft keys list"):
        guarded.keys.revoke(key_id)


def test_a_store_that_hangs_keeps_no_request_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, answers, listed = KeyStore(str(tmp_path)), threading.Event(), Store.list
    key, text = keys.create("team")

    def hanging(store: Store, *arguments: Any) -> Any:
        answers.wait()
        return listed(store, *arguments)

    async def waited(door: Door, text: str) -> float:
        began = time.monotonic()
        await door.tenant(f"Bearer {text}")
        return time.monotonic() - began

    async def ask() -> None:
        door = Door(keys, ttl_s=0.05)
        await waited(door, text)
        monkeypatch.setattr(Store, "list", hanging)
        await asyncio.sleep(0.2)
        await waited(door, text)
        assert sum([await waited(door, text) for _ in range(10)]) < 5, "each waits anew"
        with pytest.raises(StoreError, match="not known yet"):
            await door.tenant(f"Bearer {text}x")
        with pytest.raises(AuthenticationError):
            await door.tenant(None)
        monkeypatch.undo()
        keys.revoke(key.id)
        await waited(door, text)
        answers.set()
        while len(door._keys) > 0:
            await asyncio.sleep(0.02)
            with contextlib.suppress(AuthenticationError):
                await waited(door, text)
        with pytest.raises(AuthenticationError):
            await waited(door, text)

    with structlog.testing.capture_logs() as logs:
        try:
            asyncio.run(asyncio.wait_for(ask(), 20))
        finally:
            answers.set()
    assert [log["error"] for log in logs] == ["no answer after 1 s"]


def test_a_file_is_answered_with_a_key(guarded: Guarded, tmp_path: Path) -> None:
    """`graft generate` is serving.command.generate."""
    write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "in.arrow")
    with guarded.client() as http:
        key = http.headers["authorization"].partition(" ")[2]
    app, out = typer.Typer(), tmp_path / "out.arrow"
    app.command()(generate)
    call = [str(tmp_path / "in.arrow"), str(out), "--adapter", "lora", "--url", guarded.url, "-q"]
    for option, environment in ((["--api-key", key], {}), ([], {"GRAFT_API_KEY": key})):
        result = CliRunner().invoke(app, [*call, *option], env=environment)
        assert result.exit_code == 0, result.output
        out.unlink()
    assert isinstance(CliRunner().invoke(app, call).exception, AuthenticationError)


def test_requests_tokens_and_concurrency_of_a_key(guarded: Guarded) -> None:
    ask = {"model": "lora", **ASK, "ignore_eos": True}
    with guarded.client(requests_per_minute=2) as http:
        codes = [http.post("/v1/completions", json=ask).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
    with guarded.client(requests_per_minute=4) as http:
        codes = [http.post("/v1/completions", json={**ask, "n": n}).status_code for n in (5, 3, 2)]
        assert codes == [400, 200, 429]
        codes = [http.post("/tokenize", json={"prompt": "x"}).status_code for _ in range(2)]
        assert codes == [200, 429]
        error(http.post("/detokenize", json={"tokens": [1]}), 429)
    with guarded.client(requests_per_minute=2) as http:
        # What is impossible counts too: a limit goes before whatever a request costs.
        codes = [
            http.post("/v1/completions", json={**ask, "min_p": 2}).status_code for _ in range(3)
        ]
        assert codes == [400, 400, 429]
    with guarded.client(tokens_per_minute=20) as http:
        codes = [http.post("/v1/completions", json=ask).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        response = http.post("/v1/completions", json=ask)
        assert error(response, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(response.headers["retry-after"]) <= 60
    with guarded.client(max_concurrent=1) as http, ThreadPoolExecutor(4) as pool:
        long = {**ask, "max_tokens": 100}
        codes = list(
            pool.map(lambda _: http.post("/v1/completions", json=long).status_code, range(4))
        )
        assert 200 in codes
        assert 429 in codes
        error(http.post("/v1/completions", json={**ask, "n": 2}), 400)
        assert http.post("/v1/completions", json=ask).status_code == 200


def test_a_cached_prefix_is_its_own_keys_alone(guarded: Guarded) -> None:
    """What another has asked before would show in how soon the first token comes. No body changes
    whose cache it is."""

    def cached(http: httpx2.Client, letter: str, **more: Any) -> int:
        """Tokens of a prompt of two whole pages and some more that need not be computed."""
        before = guarded.service.stats.cached_tokens
        body = {"model": "lora", "prompt": letter * 40, "max_tokens": 1, **more}
        assert http.post("/v1/completions", json=body).status_code == 200
        return guarded.service.stats.cached_tokens - before

    with guarded.client() as mine, guarded.client() as other:
        assert [cached(mine, "a"), cached(mine, "a")] == [0, 32]
        assert [cached(other, "a"), cached(other, "a")] == [0, 32]
        text = mine.headers["authorization"].partition(" ")[2]
        salt = Tenant(find(guarded.keys.keys(), text)).cache_salt
        assert [cached(mine, "b"), cached(mine, "b", cache_salt="x")] == [0, 32]
        assert [cached(other, "b", cache_salt=salt), cached(other, "b")] == [0, 32]


def test_a_key_is_never_stored(tmp_path: Path) -> None:
    keys = KeyStore(str(tmp_path))
    key, text = keys.create("team", adapters=["a*"], tokens_per_minute=5)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert text.split("-", 2)[2].encode() not in stored
    (tmp_path / "keys" / "broken.json").write_text("{")
    (tmp_path / "keys" / "other.json").write_text("[]")
    assert keys.keys() == {key.id: key}
    (tmp_path / "keys" / f"{key.id}.json").write_text("known already")
    assert keys.keys({key.id: key}) == {key.id: key}
    assert keys.keys() == {}
    assert find({key.id: key}, text) == key
    assert find({key.id: key}, text[:-1]) is None
    for bad in ({"adapters": []}, {"max_concurrent": 0}):
        with pytest.raises(SpecError):
            keys.create("team", **bad)


def test_keys_by_the_command(tmp_path: Path) -> None:
    """`graft keys` is serving.command.keys."""
    store = ["--store", str(tmp_path)]

    def graft(*arguments: str) -> str:
        result = CliRunner().invoke(commands, [*arguments, *store], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.output

    text = graft("create", "team", "--adapters", "a*", "--adapters", "b", "--max-concurrent", "2")
    key = find(KeyStore(str(tmp_path)).keys(), text.strip())
    assert key is not None
    assert (list(key.adapters), key.max_concurrent, key.allows("abc")) == (["a*", "b"], 2, True)
    listed = graft("list")
    assert key.id in listed
    assert text.strip() not in listed
    graft("revoke", key.id)
    assert key.id not in graft("list")
