"""A file that does not hold still, and a folder that is out of reach."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path


@contextmanager
def rewritten(file: Path, *contents: bytes) -> Iterator[None]:
    """The scope in which somebody puts one after the other into its place, all the time."""
    over = threading.Event()

    def rewrite() -> None:
        for content in cycle(contents):
            with suppress(FileNotFoundError):  # the folder went
                file.with_suffix(".new").write_bytes(content)
                file.with_suffix(".new").replace(file)
            if over.wait(0.002):
                return

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def out_of_reach(folder: Path) -> Iterator[None]:
    """The scope in which whatever is asked of the folder fails, root's questions too."""
    away = folder.rename(folder.with_name(f"{folder.name}-away"))
    folder.write_text("a file where the folder was")
    try:
        yield
    finally:
        folder.unlink()
        away.rename(folder)
