"""The adapters that an engine holds: installed by name, counted by request, evicted when idle.

An adapter that is removed while requests use it stays until the last of them has ended, under a
name that no new request can get. Knows the runner's hooks and pages; no requests.
"""

from __future__ import annotations

from cluster.errors import AdapterError, ConflictError, ModelNotFoundError, OverloadedError
from cluster.spec import nearest
from serving.adapters import LoweredAdapter
from serving.engine.batch import LoadedAdapter, page_slots
from serving.engine.pages import PagePool
from serving.engine.runner import Runner
from serving.engine.scheduler import Scheduler
from serving.spec import EngineSpec


class AdapterBank:
    """Used by the engine's thread alone."""

    def __init__(
        self, spec: EngineSpec, runner: Runner, pool: PagePool, scheduler: Scheduler
    ) -> None:
        self._spec, self._runner = spec, runner
        self._pool, self._scheduler = pool, scheduler
        self._named: dict[str, LoadedAdapter] = {}  # least recently used first
        self._held: dict[str, LoadedAdapter] = {}  # by unique name, removed ones included
        self._users: dict[str, int] = {}  # requests in progress by unique name
        self._removed: set[str] = set()  # unique names that only requests in progress keep
        self._installed = 0

    @property
    def names(self) -> list[str]:
        """What requests can name."""
        return list(self._named)

    @property
    def held(self) -> dict[str, LoadedAdapter]:
        """Every adapter that a sequence may carry, by its unique name."""
        return self._held

    def get(self, name: str) -> LoadedAdapter:
        """The adapter of that name. Raises ModelNotFoundError."""
        if name not in self._named:
            raise ModelNotFoundError(
                f"adapter {name[:120]!r}: is not loaded{nearest(name, self._named)}"
            )
        return self._named[name]

    def install(self, name: str, lowered: LoweredAdapter, *, evict: bool) -> None:
        """See Engine.install_adapter."""
        if not name or name in self._named:
            raise ConflictError(f"adapter {name!r}: is loaded already; remove it first")
        needed = self._fitting_pages(name, lowered)
        while (reason := self._lack(needed)) is not None:
            if not (evict and self._evict()):
                raise OverloadedError(f"adapter {name!r}: {reason}")
        self._scheduler.reclaim(needed)
        pages = self._pool.take(needed)
        assert pages is not None, "preempting every request frees all pages but the prefixes'"
        slots = page_slots(pages, self._spec.page_tokens)[: lowered.prefix_tokens]
        try:
            if lowered.prefix is not None:
                self._runner.write_prefix(lowered.prefix, slots)
        except Exception as error:
            self._pool.give_back(pages)
            raise AdapterError(
                f"adapter {name!r}: the base cannot compute its prefix: {error}"
            ) from error
        self._runner.hooks.install(lowered.deltas)
        # Two adapters of one name, the older still finishing, must not share a segment.
        unique = f"{name}#{self._installed}"
        self._installed += 1
        self._named[name] = self._held[unique] = LoadedAdapter(unique, lowered, pages, slots)
        self._users[unique] = 0

    def remove(self, name: str) -> None:
        """Take the name away; the adapter goes when nobody uses it. Raises ModelNotFoundError."""
        loaded = self.get(name)
        del self._named[name]
        self._removed.add(loaded.name)
        self._free_if_unused(loaded)

    def begin_use(self, name: str) -> None:
        """Count one more request on the adapter of that name, the most recently used now."""
        loaded = self._named[name] = self._named.pop(name)
        self._users[loaded.name] += 1

    def end_use(self, unique: str) -> None:
        """Count one request less."""
        self._users[unique] -= 1
        self._free_if_unused(self._held[unique])

    def _free_if_unused(self, loaded: LoadedAdapter) -> None:
        if self._users[loaded.name] or loaded.name not in self._removed:
            return
        self._removed.remove(loaded.name)
        del self._held[loaded.name], self._users[loaded.name]
        self._runner.hooks.uninstall(loaded.lowered.deltas)
        self._pool.give_back(loaded.pages)

    def _evict(self) -> bool:
        """Remove the least recently used adapter without requests, if there is one."""
        idle = next((n for n, held in self._named.items() if not self._users[held.name]), None)
        if idle is not None:
            self.remove(idle)
        return idle is not None

    def _lack(self, pages: int) -> str | None:
        """Why one more adapter with so many pages has no room now; None if it has.

        A whole context must still fit beside all prefixes.
        """
        if len(self._named) >= self._spec.max_adapters:
            return (
                f"{len(self._named)} adapters are loaded, which is engine.max_adapters; "
                "remove one or raise it"
            )
        taken = sum(len(loaded.pages) for loaded in self._held.values())
        if pages and taken + pages > self._prefix_room:
            return (
                f"its prefix needs {pages} KV pages and the loaded ones hold {taken} of "
                f"{self._prefix_room}; remove one or raise engine.kv_cache_gib"
            )
        return None

    @property
    def _prefix_room(self) -> int:
        context_tokens, page_tokens = self._runner.max_context_tokens, self._spec.page_tokens
        return self._pool.num_pages - -(-context_tokens // page_tokens)

    def _fitting_pages(self, name: str, lowered: LoweredAdapter) -> int:
        """Pages that the prefix takes. Raises AdapterError if it can never have them."""
        context_tokens = self._runner.max_context_tokens
        if lowered.prefix_tokens >= context_tokens:
            raise AdapterError(
                f"adapter {name!r}: its prefix of {lowered.prefix_tokens} tokens fills the context "
                f"of {context_tokens}; raise engine.max_context_tokens if the base allows it"
            )
        needed = -(-lowered.prefix_tokens // self._spec.page_tokens)
        if needed > self._prefix_room:
            raise AdapterError(
                f"adapter {name!r}: its prefix needs {needed} KV pages, and beside one context "
                f"there are {self._prefix_room}; raise engine.kv_cache_gib"
            )
        return needed
