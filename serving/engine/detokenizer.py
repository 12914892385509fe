"""Tokens to text as they come, never taking back what was given out.

Held back are: half of a character whose other bytes are still to come, and the beginning of what
may become a stop text. Knows a tokenizer's `decode`; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one answer. `stopped` is true once a stop text was met."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # The last prompt tokens, since some decoders treat a text's first token apart.
        self._ids = list(prompt_ids[-4:])
        self._from = 0
        self._read = len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come."""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._from : self._read])
        whole = self._decode(self._ids[self._from :])
        if len(whole) > len(known) and not whole.endswith(_REPLACEMENT):
            self._from, self._read = self._read, len(self._ids)
            self._held += whole[len(known) :]
        return self._release()

    def finish(self) -> str:
        """What was still held back, at the end of the answer."""
        if self.stopped:
            return ""
        known = self._decode(self._ids[self._from : self._read])
        self._held += self._decode(self._ids[self._from :])[len(known) :]
        self._read = self._from = len(self._ids)
        released = self._release()
        rest, self._held = ("", "") if self.stopped else (self._held, "")
        return released + rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _release(self) -> str:
        """Cut at the first stop text, else keep back the longest tail that may begin one."""
        ends = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if ends:
            released, self._held, self.stopped = self._held[: min(ends)], "", True
            return released
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest tail of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
