"""Files that cannot be read, by root neither."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def out_of_reach(folder: Path) -> Iterator[None]:
    """The scope in which whatever is asked of the folder fails."""
    away = folder.rename(folder.with_name(f"{folder.name}-away"))
    folder.write_text("a file where the folder was")
    try:
        yield
    finally:
        folder.unlink()
        away.rename(folder)


@contextmanager
def as_nobody() -> Iterator[None]:
    """What files' modes forbid is forbidden to root too."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
