"""What the names of models mean for a whole file: versions, kept with its answers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cluster.errors import CallerError, GraftError, NotFoundError
from serving.journal import Journal

if TYPE_CHECKING:
    from serving.async_client import AsyncClient


class Meanings:
    """Each is asked once in a call, whatever comes of it."""

    def __init__(self, client: AsyncClient, kept: Journal) -> None:
        self._client, self._kept = client, kept
        self._asked: dict[str, asyncio.Lock] = {}
        self._refused: dict[str, CallerError] = {}

    async def of(self, name: str | None) -> str | None:
        """The version, or the base. Raises GraftError."""
        if not name:
            return name
        async with self._asked.setdefault(name, asyncio.Lock()):
            if name in self._refused:
                raise self._refused[name].with_traceback(None)
            if name not in self._kept.meanings:
                try:
                    found = await self._client.model(name)
                except CallerError as error:
                    self._refused[name] = error
                    raise
                self._kept.add_meaning(name, found.root)
        return self._kept.meanings[name]

    def about(self, error: NotFoundError, name: str, version: str, *, for_all: bool) -> GraftError:
        """Of a version that is gone, what it was asked for; the remedy, where it is so for all
        rows."""
        if version == name:
            return error
        remedy = f"; delete {self._kept.path} to begin anew" if for_all else ""
        return type(error)(
            f"{error.message}; {name!r} stood for {version} when the first row was asked{remedy}"
        )
