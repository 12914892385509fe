"""The page pool: plain integers. Who owns which page, and nothing of what is in it.

A page is a fixed number of tokens' keys and values. Every page is either free or owned; an owner
gives back all that it took.
"""

from __future__ import annotations

from collections.abc import Sequence


class PagePool:
    """Pages 0 to `num_pages` - 1, handed out last-freed first."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))
        self._taken = [False] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, now owned by the caller; None, and nothing taken, if there are fewer."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._taken[page] = True
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        """Free pages that the caller owned."""
        for page in pages:
            assert self._taken[page], f"page {page} is given back twice"
            self._taken[page] = False
            self._free.append(page)

    def check(self) -> None:
        """Raise AssertionError unless every page is free or owned, once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        owned = {page for page, taken in enumerate(self._taken) if taken}
        assert not free & owned, "a page is free and owned"
        assert len(free) + len(owned) == self.num_pages, "a page is lost"
