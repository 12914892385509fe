"""API keys in a store: who may ask, for which adapters, and how much.

A key is shown once, when it is made; the store has only its hash. A secret of 256 random bits
needs no slow hash. Keys never change: another limit is another key. Used by the gateway and by
`graft keys`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import structlog

from cluster.errors import NotFoundError, SpecError
from cluster.names import check_name
from cluster.store import Store

_log = structlog.get_logger("graft.keys")
_FOLDER = "keys"
_PREFIX = "graft"


@dataclass(frozen=True)
class ApiKey:
    """One key's rights; a limit that is None is none.

    Attributes:
        adapters: Patterns (`*`, `?`, `[…]`) of the names of models that it may ask: adapters,
            whatever their version, and the base.
        requests_per_minute, tokens_per_minute, max_concurrent: Limits of each gateway. A request
            counts once for each answer that it asks for.
    """

    id: str
    name: str
    sha256: str
    created_at: str
    adapters: Sequence[str] = ("*",)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None

    def allows(self, model: str) -> bool:
        """Whether it may ask the adapter or base of that name."""
        return any(fnmatchcase(model, pattern) for pattern in self.adapters)


class KeyStore:
    """The keys below one store URI."""

    def __init__(self, uri: str) -> None:
        self._store = Store(uri)

    def create(
        self,
        name: str,
        *,
        adapters: Sequence[str] = ("*",),
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_concurrent: int | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its text, which nothing can tell again.

        Raises:
            SpecError: the name is illegal, or a limit is not above 0.
        """
        check_name(name, "key")
        limits = {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "max_concurrent": max_concurrent,
        }
        for limit, value in limits.items():
            if value is not None and value < 1:
                raise SpecError(f"{limit} is {value}; it must be above 0")
        if not adapters:
            raise SpecError("adapters is empty; give at least one pattern, '*' for all")
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        text = f"{_PREFIX}-{key_id}-{secret}"
        created = datetime.now(UTC).isoformat(timespec="seconds")
        key = ApiKey(key_id, name, _hash(text), created, tuple(adapters), **limits)
        self._store.create(f"{_FOLDER}/{key_id}.json", json.dumps(asdict(key)).encode())
        return key, text

    def keys(self, known: Mapping[str, ApiKey] | None = None) -> dict[str, ApiKey]:
        """Every key that is not revoked, by id. Those of `known` are not read again, as keys never
        change; a file that holds none is logged and left out.

        Raises:
            StoreError: the store does not answer.
        """
        known = known or {}
        names = {path.removeprefix(f"{_FOLDER}/") for path in self._store.list(_FOLDER)}
        live = (n for n in names if n.endswith(".json") and f"{n[:-5]}.revoked" not in names)
        found = ((name[:-5], known.get(name[:-5]) or self._read(name)) for name in sorted(live))
        return {key_id: key for key_id, key in found if key is not None}

    def revoke(self, key_id: str) -> None:
        """Make a key worthless; gateways see it within gateway.catalogue_ttl_s, or once
        the store answers them again.

        Raises:
            NotFoundError: there is no such key.
        """
        if key_id not in self.keys():
            raise NotFoundError(f"key {key_id[:120]!r}: not in the store; see `graft keys list`")
        self._store.create(f"{_FOLDER}/{key_id}.revoked", b"")

    def _read(self, name: str) -> ApiKey | None:
        content = self._store.read(f"{_FOLDER}/{name}")
        try:
            body: dict[str, Any] = json.loads(content)
            body["adapters"] = tuple(body["adapters"])
            return ApiKey(**body)
        except (ValueError, TypeError, KeyError) as error:
            _log.warning("is no API key", file=f"{self._store.uri}/{_FOLDER}/{name}", error=error)
            return None


def find(keys: Mapping[str, ApiKey], text: str) -> ApiKey | None:
    """The key of that text, in a time that tells nothing about it."""
    parts = text.split("-", 2)
    key = keys.get(parts[1]) if len(parts) == 3 else None
    is_right = hmac.compare_digest(_hash(text), key.sha256 if key else "0" * 64)
    return key if is_right else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
