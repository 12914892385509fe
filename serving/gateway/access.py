"""Who asks: API keys to tenants, with what each may ask for and how much of it is left."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import structlog

from cluster.errors import (
    AuthenticationError,
    GraftError,
    RateLimitError,
    RequestError,
    StoreError,
)
from serving.keys import ApiKey, KeyStore, find

_log = structlog.get_logger("graft.gateway")
_MINUTE_S = 60.0
# Seconds that a request waits for the keys to be read.
_PATIENCE_S = 1.0


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

    @property
    def sees_all(self) -> bool:
        """Whether it may know of every base and adapter, and so of what all of them do."""
        return self._key is None or "*" in self._key.adapters

    def spend(self, tokens: int) -> None:
        """Count tokens that were computed for it."""
        if self._tokens:
            self._tokens.take(tokens)

    @contextmanager
    def request(self, answers: int = 1, param: str | None = None) -> Generator[None]:
        """The scope of one request, which counts as many times as it asks for answers.

        Args:
            param: The field that asks for them.

        Raises:
            RequestError: they are more than the key may ever ask for at once.
            RateLimitError: they are too many for now.
        """
        key = self._key
        most = key.max_concurrent if key else None
        for limit, what in (
            (most, "at once"),
            (key.requests_per_minute if key else None, "per minute"),
        ):
            if limit and answers > limit:
                raise RequestError(
                    f"the request asks for {answers} answers (inputs times n), and this key has "
                    f"{limit} {what}; send less at once",
                    param=param,
                )
        if most and self._in_progress + answers > most:
            raise RateLimitError(
                f"this key has {self._in_progress} answers in progress, of {most} at most, and "
                f"asks for {answers} more; wait for one to end"
            )
        wanted = ((self._requests, answers, "requests"), (self._tokens, 1, "tokens"))
        for bucket, amount, what in wanted:
            if bucket and (wait_s := bucket.wait_s(amount)):
                raise RateLimitError(
                    f"this key has used up its {what} per minute; try again in {wait_s:.0f} s",
                    retry_after_s=wait_s,
                )
        if self._requests:
            self._requests.take(answers)
        self._in_progress += answers
        try:
            yield
        finally:
            self._in_progress -= answers


class Door:
    """Lets in whoever has a key of the store; without a store, everyone.

    New keys are looked for at most every `ttl_s`, and a key that is gone is out then, or while that
    is slow within twice the time. No request waits for a look that takes longer than a second or
    two: while the store does not answer, the known keys count, so a key that is revoked goes on
    until it answers again and the look that hung has ended (minutes, by the store's own limits).
    """

    def __init__(self, keys: KeyStore | None, *, ttl_s: float) -> None:
        self._store, self._ttl_s = keys, ttl_s
        self._keys: dict[str, ApiKey] = {}
        self._read_at: float | None = None
        self._look: asyncio.Task[None] | None = None
        self._look_began_s = -math.inf
        self._is_unread = False  # since the store failed or was late, until it answers
        self._tenants = {"anonymous": Tenant(None)} if keys is None else {}

    async def tenant(self, authorization: str | None) -> Tenant:
        """Whom an Authorization header names.

        Raises:
            AuthenticationError: nobody.
            StoreError: the keys cannot be read now, and the header's is not among the known ones.
        """
        if self._store is None:
            return self._tenants["anonymous"]
        scheme, _, text = (authorization or "").partition(" ")
        text = text.strip() if scheme.lower() == "bearer" else ""
        if self._age_s >= self._ttl_s:
            await self._refreshed(self._store, is_known=find(self._keys, text) is not None)
        key = find(self._keys, text)
        if key is None and text and self._is_unread:
            # It may have been made a moment ago, and whoever is told that it is none gives up.
            raise StoreError(
                "this key is not known yet, and the keys cannot be read now; try again"
            )
        if key is None:
            raise AuthenticationError(
                "no valid API key; send `Authorization: Bearer KEY` with one of `graft keys create`"
            )
        if key.id not in self._tenants:
            self._tenants[key.id] = Tenant(key)
        return self._tenants[key.id]

    async def _refreshed(self, store: KeyStore, *, is_known: bool) -> None:
        """Wait until the keys are read anew, at most until the look for them is _PATIENCE_S old."""
        look = self._look
        if look is not None and look.done() and (failure := look.exception()):
            self._tell(str(failure))  # which came too late for whoever had waited for it
        if look is None or look.done():
            look = self._look = asyncio.create_task(self._read(store))
            self._look_began_s = time.monotonic()
        elif is_known and self._age_s < 2 * self._ttl_s:
            return  # known a moment ago: the others' keys are no matter of its
        left_s = self._look_began_s + _PATIENCE_S - time.monotonic()
        await asyncio.wait((look,), timeout=max(0.0, left_s))
        if look.done():
            look.result()
        else:
            self._tell(f"no answer after {_PATIENCE_S:g} s")

    async def _read(self, store: KeyStore) -> None:
        try:
            self._keys = await asyncio.to_thread(store.keys, self._keys)
            self._is_unread = False
        except GraftError as error:
            if self._read_at is None:
                raise
            self._tell(error.message)
        self._read_at = time.monotonic()

    def _tell(self, reason: str) -> None:
        if not self._is_unread:
            _log.warning("keys cannot be read; the known ones count", error=reason)
        self._is_unread = True

    @property
    def _age_s(self) -> float:
        return math.inf if self._read_at is None else time.monotonic() - self._read_at
