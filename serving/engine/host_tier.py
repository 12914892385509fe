"""Adapters in host memory, behind those that the device has room for.

What was lowered once comes back from here with a copy to the device: nothing is fetched, read or
lowered again. Least recently used ones leave when the bytes run out; those on the device may leave
too, as they are there. Used from several threads: whoever loads adapters, not the engine.
"""

from __future__ import annotations

import threading

import torch

from serving.adapters import LoweredAdapter, moved, num_bytes, pinned


class HostTier:
    """At most `max_bytes` of adapters for an engine on `device`; none with 0.

    On CUDA they lie in pinned memory. (That path has never run on a GPU.) On CPU host and device
    are one memory, so that an adapter in both tiers is there once, and moving costs nothing.
    """

    def __init__(self, max_bytes: int, device: torch.device) -> None:
        self._max_bytes, self._device = max_bytes, device
        self._lock = threading.Lock()
        # By content, least recently used first: the adapter, its bytes, its reference.
        self._held: dict[str, tuple[LoweredAdapter, int, str]] = {}
        self.num_bytes = self.hits = self.evictions = 0

    @property
    def refs(self) -> list[str]:
        """What each adapter was called when it was put here. Whoever asks for the same content by
        another name finds it too."""
        with self._lock:
            return [ref for _, _, ref in self._held.values()]

    def get(self, content: str) -> LoweredAdapter | None:
        """The adapter of that content on the device, its bytes already there; None if unknown."""
        with self._lock:
            if content not in self._held:
                return None
            entry = self._held[content] = self._held.pop(content)
            self.hits += 1
        lowered = moved(entry[0], self._device)
        if self._device.type == "cuda":
            # The engine's stream must not read what is still on its way.
            torch.cuda.current_stream(self._device).synchronize()
        return lowered

    def put(self, content: str, lowered: LoweredAdapter, ref: str) -> None:
        """Keep a copy of what was lowered, if it is not larger than the whole tier."""
        if not self._max_bytes or content in self._held:
            return
        size = num_bytes(lowered)
        if size > self._max_bytes:
            return
        kept = pinned(lowered) if self._device.type == "cuda" else lowered
        with self._lock:
            if content in self._held:
                return
            self._held[content] = kept, size, ref
            self.num_bytes += size
            while self.num_bytes > self._max_bytes:
                oldest = next(iter(self._held))
                self.num_bytes -= self._held.pop(oldest)[1]
                self.evictions += 1
