"""What one listing of a store saw: adapters, versions, aliases; and which one a reference means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.names import NAME

LATEST = "latest"  # the alias that always means the newest version
REFERENCE = re.compile(rf"({NAME.pattern})(?:@([0-9]{{1,8}})|:({NAME.pattern}))?")


@dataclass(frozen=True)
class Catalog:
    """Every whole version (oldest first) and alias in a store, as one listing saw them."""

    versions: Mapping[str, list[int]]
    aliases: Mapping[tuple[str, str], int]

    def aliases_by_name(self) -> dict[str, dict[str, int]]:
        """The aliases of each adapter that has some, and the versions that they mean."""
        found: dict[str, dict[str, int]] = {}
        for (name, alias), number in self.aliases.items():
            found.setdefault(name, {})[alias] = number
        return found

    def find(self, ref: str) -> tuple[str, int] | None:
        """The (name, version) that a reference means, or None; as `Registry.resolve`."""
        match = REFERENCE.fullmatch(ref)
        numbers = self.versions.get(str(match[1])) if match else None
        if match is None or numbers is None:
            return None
        name, number, alias = str(match[1]), match[2], match[3]
        if number:
            return (name, int(number)) if int(number) in numbers else None
        if alias and alias != LATEST:
            found = self.aliases.get((name, alias))
            return None if found is None else (name, found)
        return name, numbers[-1]
