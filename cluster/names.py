"""Names and places as users write them: adapter names, store URIs. Touches no storage."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cluster.errors import SpecError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
SCHEMES = ("file", "s3", "gs")
DEFAULT_STORE = "./graft-store"


def default_store() -> str:
    """Where adapters are unless a spec or an option tells: GRAFT_STORE, else DEFAULT_STORE."""
    return os.environ.get("GRAFT_STORE") or DEFAULT_STORE


def check_name(name: str, what: str) -> None:
    """Raise SpecError unless `name` is a legal name for an adapter or alias."""
    if not NAME.fullmatch(name):
        raise SpecError(
            f"{what} name {name[:120]!r}: use 1 to 100 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit"
        )


def absolute_uri(uri: str) -> str:
    """`uri` with a local folder made absolute, so that it means the same everywhere."""
    parts = urlsplit(uri)
    if not uri or (parts.scheme and parts.scheme not in SCHEMES):
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise SpecError(f"store {uri!r}: use a local folder or one of {known}")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise SpecError(f"store {uri!r}: write file:///folder, without a host")
        return str(Path(unquote(parts.path)))
    if parts.scheme:
        if not parts.netloc:
            raise SpecError(f"store {uri!r}: names no bucket; write {parts.scheme}://bucket/prefix")
        return uri.rstrip("/")
    return absolute_path(uri)


def absolute_path(path: str) -> str:
    """A local path as users write it, "~" included, made absolute."""
    return str(Path(path).expanduser().absolute())


def local_folder(uri: str) -> Path | None:
    """The folder on this machine's file system, or None for object storage."""
    return None if urlsplit(uri).scheme else Path(uri)


def is_mix(ref: str) -> bool:
    """Whether an exact reference is that of a mix."""
    return "+" in ref
