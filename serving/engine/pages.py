"""The page pool: plain integers. Who uses which page and what a full one holds, by its key.

A page is a fixed number of tokens' keys and values; any number of sequences use it. A page that
nobody uses is free, but what it holds is kept: whoever wants the same content takes it as it is.
When pages run out, the kept page that was idle longest is given up.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def root_key(*parts: str) -> bytes:
    """The key of no tokens yet, in a world of its own for each `parts`."""
    return blake2b(repr(parts).encode()).digest()


def next_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page that holds `tokens` behind what `previous` stands for."""
    return blake2b(previous + array("q", tokens).tobytes()).digest()


class PagePool:
    """Pages 0 to `num_pages` - 1."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._users = [0] * num_pages
        self._empty = list(range(num_pages))
        self._kept: OrderedDict[int, None] = OrderedDict()  # idle longest first
        self._keys: list[bytes | None] = [None] * num_pages
        self._pages: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody uses, kept ones included."""
        return len(self._empty) + len(self._kept)

    def take(self, count: int) -> list[int] | None:
        """`count` pages for new content, used by the caller; None, and nothing taken, if there
        are fewer."""
        if count > self.num_free:
            return None
        pages = [self._empty.pop() if self._empty else self._give_up() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def known(self, keys: Iterable[bytes]) -> int:
        """For how many of `keys`, from the first on without a gap, there is a page."""
        count = 0
        for key in keys:
            if key not in self._pages:
                break
            count += 1
        return count

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of `keys`, which are all known, used by the caller too."""
        pages = [self._pages[key] for key in keys]
        for page in pages:
            self._users[page] += 1
            self._kept.pop(page, None)
        return pages

    def label(self, page: int, key: bytes) -> None:
        """Say what a used page holds, full and for good; of two with one content, one has it."""
        if key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key

    def give_back(self, pages: Sequence[int]) -> None:
        """End the caller's use. The last of `pages` are given up before the first."""
        for page in reversed(pages):
            assert self._users[page], f"page {page} is given back twice"
            self._users[page] -= 1
            if self._users[page]:
                continue
            if self._keys[page] is None:
                self._empty.append(page)
            else:
                self._kept[page] = None

    def check(self, used: Iterable[int]) -> None:
        """Raise AssertionError unless `used`, a page once for each of its users, is all use."""
        counts = Counter(used)
        assert self._users == [counts[page] for page in range(self.num_pages)], "users are wrong"
        free = {*self._empty, *self._kept}
        assert len(free) == self.num_free, "a page is free twice"
        assert free == {p for p, users in enumerate(self._users) if not users}, "a page is lost"
        labelled = {p: key for p, key in enumerate(self._keys) if key is not None}
        assert {key: p for p, key in labelled.items()} == self._pages, "a page and its key differ"
        assert set(self._kept) == free & set(labelled), "a page is kept for nothing"

    def _give_up(self) -> int:
        page, _ = self._kept.popitem(last=False)
        key, self._keys[page] = self._keys[page], None
        assert key is not None
        del self._pages[key]
        return page
