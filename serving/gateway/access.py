"""Who asks: API keys to tenants, with what each may ask for and how much of it is left."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import structlog

from cluster.errors import AuthenticationError, GraftError, RateLimitError
from serving.keys import ApiKey, KeyStore, find

_log = structlog.get_logger("graft.gateway")
_MINUTE_S = 60.0


class Bucket:
    """An allowance of so much per minute that refills steadily; `clock` is in seconds.

    What is taken may go below zero: an answer's length is known only at its end. The next one
    waits until the debt is paid.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._clock = per_minute, clock
        self._left, self._at = per_minute, clock()

    def take(self, amount: float) -> None:
        """Take away `amount`, whether it is there or not."""
        self._refill()
        self._left -= amount

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there; 0 if it is."""
        self._refill()
        return max(0.0, (min(amount, self._size) - self._left) * _MINUTE_S / self._size)

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(self._size, self._left + (now - self._at) * self._size / _MINUTE_S)
        self._at = now


class Tenant:
    """One API key at this gateway; without a key, everyone, with every right."""

    def __init__(self, key: ApiKey | None) -> None:
        self.id = key.id if key else "anonymous"
        self._key = key
        self._in_progress = 0
        requests, tokens = (key.requests_per_minute, key.tokens_per_minute) if key else (None, None)
        self._requests = Bucket(requests) if requests else None
        self._tokens = Bucket(tokens) if tokens else None

    @property
    def cache_salt(self) -> str:
        """Keeps this tenant's cached prefixes apart from others', whose timing would tell of
        them."""
        return hashlib.sha256(f"tenant {self.id}".encode()).hexdigest()[:16]

    def allows(self, model: str) -> bool:
        """Whether it may know of the base or adapter of that name."""
        return self._key is None or self._key.allows(model)

    def spend(self, tokens: int) -> None:
        """Count tokens that were computed for it."""
        if self._tokens:
            self._tokens.take(tokens)

    @contextmanager
    def request(self) -> Generator[None]:
        """The scope of one request. Raises RateLimitError."""
        key = self._key
        if key and key.max_concurrent and self._in_progress >= key.max_concurrent:
            raise RateLimitError(
                f"this key has {self._in_progress} requests in progress, of {key.max_concurrent} "
                "at most; wait for one to end"
            )
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket and (wait_s := bucket.wait_s(1)):
                raise RateLimitError(
                    f"this key has used up its {what} per minute; try again in {wait_s:.0f} s",
                    retry_after_s=wait_s,
                )
        if self._requests:
            self._requests.take(1)
        self._in_progress += 1
        try:
            yield
        finally:
            self._in_progress -= 1


class Door:
    """Lets in whoever has a key of the store; without a store, everyone.

    Keys are read again at most every `ttl_s`; a key that is gone is out then.
    """

    def __init__(self, keys: KeyStore | None, *, ttl_s: float) -> None:
        self._store, self._ttl_s = keys, ttl_s
        self._keys: dict[str, ApiKey] = {}
        self._read_at: float | None = None
        self._lock = asyncio.Lock()
        self._tenants = {"anonymous": Tenant(None)} if keys is None else {}

    async def tenant(self, authorization: str | None) -> Tenant:
        """Whom an Authorization header names.

        Raises:
            AuthenticationError: nobody.
            StoreError: the keys cannot be read, and never could.
        """
        if self._store is None:
            return self._tenants["anonymous"]
        await self._refresh(self._store)
        scheme, _, text = (authorization or "").partition(" ")
        key = find(self._keys, text.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise AuthenticationError(
                "no valid API key; send `Authorization: Bearer KEY` with one of `graft keys create`"
            )
        if key.id not in self._tenants:
            self._tenants[key.id] = Tenant(key)
        return self._tenants[key.id]

    async def _refresh(self, store: KeyStore) -> None:
        async with self._lock:
            now = time.monotonic()
            if self._read_at is not None and now - self._read_at < self._ttl_s:
                return
            try:
                self._keys = await asyncio.to_thread(store.keys)
            except GraftError as error:
                if self._read_at is None:
                    raise
                _log.warning("keys cannot be read; the known ones count", error=error.message)
            self._read_at = now
