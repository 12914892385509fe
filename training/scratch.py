"""A worker's folders on its own machine, which the worker that takes its place clears away."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path


class Scratch:
    """Folders of the worker `rank` of a job, in TMPDIR. Made once its predecessor has ended."""

    def __init__(self, job_id: str, rank: int) -> None:
        self._prefix = f"graft-{job_id}-{rank}-"
        for left in Path(tempfile.gettempdir()).glob(f"{self._prefix}*"):
            shutil.rmtree(left, ignore_errors=True)  # of one that was killed

    def folder(self) -> Path:
        """A new, empty folder, which the caller deletes."""
        return Path(tempfile.mkdtemp(prefix=self._prefix))

    def passing_folder(self) -> tempfile.TemporaryDirectory[str]:
        """A new, empty folder for a `with` block."""
        return tempfile.TemporaryDirectory(prefix=self._prefix)
