"""The adapters that an engine holds: installed by name, counted by request and by bytes, evicted
when idle.

An adapter that is removed while requests use it stays until the last of them has ended, under a
name that no new request can get. Knows the runner's hooks; no pages, no requests.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from cluster.errors import (
    AdapterError,
    ConflictError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
)
from cluster.names import is_mix
from cluster.spec import nearest
from serving.adapters import LoweredAdapter, num_bytes
from serving.engine.batch import LoadedAdapter
from serving.engine.offset import SmallBases
from serving.engine.runner import Runner
from serving.spec import EngineSpec

_GIB = 2**30


class AdapterBank:
    """Used by the engine's thread alone.

    Attributes:
        loads: Adapters that were installed.
        hits: Requests whose adapter another one had used before.
        evictions: Adapters that were removed to make room.
        num_bytes: Of the adapters held, removed ones in use included.
    """

    def __init__(self, spec: EngineSpec, runner: Runner, small_bases: SmallBases) -> None:
        self._runner, self._small_bases = runner, small_bases
        # Least recently used first; other threads look names up.
        self._named = OrderedDict[str, LoadedAdapter]()
        self._held: dict[str, LoadedAdapter] = {}  # by unique name, removed ones included
        self._users: dict[str, int] = {}  # requests in progress by unique name
        self._removed: set[str] = set()  # unique names that only requests in progress keep
        self._variants: dict[str, str] = {}  # an adapter at another rank -> the adapter
        self._fresh: set[str] = set()  # unique names that no request has used yet
        self.loads = self.hits = self.evictions = 0
        self._sizes: dict[str, int] = {}  # bytes by unique name
        self._max_bytes = int(spec.adapters_gib * _GIB)
        self.num_bytes = 0

    @property
    def names(self) -> list[str]:
        """What requests can name."""
        return list(self._named)

    @property
    def held(self) -> dict[str, LoadedAdapter]:
        """Every adapter that a sequence may carry, by its unique name."""
        return self._held

    def get(self, name: str, rank: int | None = None) -> LoadedAdapter:
        """The adapter of that name, at a rank of its choice or the highest.

        Raises:
            ModelNotFoundError: there is none.
            RequestError: it has no such rank.
        """
        if name not in self._named:
            raise ModelNotFoundError(
                f"adapter {name[:120]!r}: is not loaded{nearest(name, self._named)}"
            )
        loaded = self._named[name]
        return loaded if rank is None else self._at_rank(name, loaded, rank)

    def find(self, name: str) -> LoweredAdapter | None:
        """The adapter of that name as it was lowered, if there is one; from any thread."""
        loaded = self._named.get(name)
        return None if loaded is None else loaded.lowered

    def least_used(self) -> str | None:
        """See Engine.least_used_adapter."""
        named = self._named.items()
        return min(
            named, key=lambda n: (not is_mix(n[0]), self._users[n[1].name]), default=(None,)
        )[0]

    def install(self, name: str, lowered: LoweredAdapter, *, evict: bool) -> None:
        """See Engine.install_adapter."""
        if not name or name in self._named:
            raise ConflictError(f"adapter {name!r}: is loaded already; remove it first")
        context_tokens = self._runner.max_context_tokens
        taken = self._small_bases.taken_tokens(lowered)
        if taken >= context_tokens:
            raise AdapterError(
                f"adapter {name!r}: its prefix of {lowered.prefix_tokens} tokens fills the context "
                f"of {context_tokens - taken + lowered.prefix_tokens}; raise "
                "engine.max_context_tokens if the base allows it"
            )
        size = self._make_room(name, lowered, evict=evict)
        self._runner.hooks.install(lowered.deltas)
        # Two adapters of one name, the older still finishing, must not share a segment.
        unique = f"{name}#{self.loads}"
        self.loads += 1
        self._fresh.add(unique)
        if lowered.offset is not None:
            self._small_bases.install(unique, lowered.offset)
        loaded = LoadedAdapter(unique, lowered, lowered.content or unique, taken)
        self._named[name] = self._held[unique] = loaded
        self._users[unique] = 0
        self._sizes[unique] = size
        self.num_bytes += size

    def remove(self, name: str) -> None:
        """Take the name away; the adapter goes when nobody uses it. Raises ModelNotFoundError."""
        loaded = self.get(name)
        del self._named[name]
        self._removed.add(loaded.name)
        self._free_if_unused(loaded)

    def begin_use(self, name: str) -> None:
        """Count one more request on the adapter of that name, the most recently used now."""
        self._named.move_to_end(name)
        loaded = self._named[name]
        self._users[loaded.name] += 1
        self.hits += loaded.name not in self._fresh
        self._fresh.discard(loaded.name)

    def hold(self, name: str) -> str:
        """Keep the adapter of that name, as a request does, until `end_use` of the unique name that
        it returns."""
        unique = self._named[name].name
        self._users[unique] += 1
        return unique

    def end_use(self, unique: str) -> None:
        """Count one request, or whoever held it, less."""
        unique = self._variants.get(unique, unique)
        self._users[unique] -= 1
        self._free_if_unused(self._held[unique])

    def _free_if_unused(self, loaded: LoadedAdapter) -> None:
        if self._users[loaded.name] or loaded.name not in self._removed:
            return
        self._removed.remove(loaded.name)
        for variant in [v for v, of in self._variants.items() if of == loaded.name]:
            del self._held[variant], self._variants[variant]
        del self._held[loaded.name], self._users[loaded.name]
        self._fresh.discard(loaded.name)
        self.num_bytes -= self._sizes.pop(loaded.name)
        self._runner.hooks.uninstall(loaded.lowered.deltas)
        self._small_bases.uninstall(loaded.name)

    def _at_rank(self, name: str, loaded: LoadedAdapter, rank: int) -> LoadedAdapter:
        """The adapter cut to a rank: rows of their own in a step, and KV pages."""
        ranks = loaded.lowered.ranks
        if ranks is None or rank not in ranks:
            there = f"has ranks {ranks[0]} to {ranks[-1]}" if ranks else "is no DyLoRA"
            raise RequestError(
                f"adapter_rank is {rank}, but the adapter {name[:120]!r} {there}",
                param="adapter_rank",
            )
        variant = f"{loaded.name}/{rank}"
        if variant not in self._held:
            cut = loaded.lowered.at_rank(rank)
            self._held[variant] = replace(
                loaded, name=variant, lowered=cut, identity=cut.content or variant
            )
            self._variants[variant] = loaded.name
        return self._held[variant]

    def _make_room(self, name: str, lowered: LoweredAdapter, *, evict: bool) -> int:
        """See that the adapter's bytes fit; returns them. Those of removed adapters that are still
        in use count."""
        size = num_bytes(lowered)
        if size > self._max_bytes:
            raise AdapterError(
                f"adapter {name!r}: its {size / _GIB:.3g} GiB are over engine.adapters_gib, which "
                f"is {self._max_bytes / _GIB:.3g}; raise it"
            )
        while (held := self.num_bytes) + size > self._max_bytes:
            if not (evict and self._evict()):
                raise OverloadedError(
                    f"adapter {name!r}: {held / _GIB:.3g} of {self._max_bytes / _GIB:.3g} GiB "
                    f"(engine.adapters_gib) are in use, and it needs {size / _GIB:.3g}; remove an "
                    "adapter or raise it"
                )
        return size

    def _evict(self) -> bool:
        """Remove the least recently used adapter without requests, if there is one; a mix first,
        as it is summed again from its members, and anybody may ask for as many as he likes."""
        free = [name for name, held in self._named.items() if not self._users[held.name]]
        idle = next((name for name in free if is_mix(name)), free[0] if free else None)
        if idle is not None:
            self.remove(idle)
            self.evictions += 1
        return idle is not None
