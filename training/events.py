"""A run's figures as TensorBoard's event files: whole ones, and parts while a job runs.

The store is create-only, so a running job writes one small file after another; TensorBoard reads
them as one. A part's name tells its steps. Knows figures by step and tag; nothing of training.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

# Here, not where they are used: that is in threads, which must not meet in the middle of an import.
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter
from tensorboardX.writer import scalar

from cluster.store import Store

proto: Any = event_pb2
# (step, figures by tag), in the order of steps.
Figures = tuple[int, Mapping[str, float]]

_PART = re.compile(r"events\.out\.tfevents\.(\d{10})-(\d{10})\.[0-9a-f]+")
# A part waits so many seconds, or this share of the run's age: some 150 files in a day.
_LEAST_WAIT_S, _WAIT_SHARE = 5.0, 0.05


def event_file(figures: Iterable[Figures], *, restart: int | None = None) -> bytes:
    """The file with these figures.

    Args:
        restart: What a reader has seen of this step and later ones does not count.
    """
    events = [proto.Event(wall_time=time.time(), file_version="brain.Event:2")]
    if restart is not None:
        start = proto.SessionLog(status=proto.SessionLog.START)
        events.append(proto.Event(wall_time=time.time(), step=restart, session_log=start))
    for step, values in figures:
        for tag, value in values.items():
            event = proto.Event(wall_time=time.time(), step=step, summary=scalar(tag, value))
            events.append(event)
    with tempfile.NamedTemporaryFile() as file:
        writer = RecordWriter(file.name)
        for event in events:
            writer.write(event.SerializeToString())
        writer.close()
        return Path(file.name).read_bytes()


class EventParts:
    """The event files of one running job, in a folder of the store. A run that goes on from step s
    takes the place of what an attempt before it told of later steps."""

    def __init__(self, store: Store, folder: str, start: int) -> None:
        self._store, self._folder, self._began = store, folder, time.monotonic()
        self._restart: int | None = None
        self._kept: list[Figures] = []
        self._due_s = 0.0
        ends = [-1]  # a method that trains nothing is measured at step 0
        for key in store.list(folder):
            match = _PART.fullmatch(key.rsplit("/", 1)[-1])
            if match is None:
                continue
            self._restart = start + 1
            if int(match[1]) > start:
                store.delete(key)
            else:
                ends.append(int(match[2]))
        self.last_step = max(ends)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep these; write them with what was kept when it is time."""
        self._kept.append((step, values))
        age_s = time.monotonic() - self._began
        if age_s >= self._due_s:
            self.flush()
            self._due_s = age_s + max(_LEAST_WAIT_S, _WAIT_SHARE * age_s)

    def flush(self) -> None:
        """Write what is kept. At every checkpoint, so that no part lies on both sides of one."""
        if not self._kept:
            return
        first, last = self._kept[0][0], self._kept[-1][0]
        name = f"events.out.tfevents.{first:010d}-{last:010d}.{uuid4().hex[:8]}"
        data = event_file(self._kept, restart=self._restart)
        self._store.create(f"{self._folder}/{name}", data)
        self._kept, self._restart = [], None

    def close(self, *, is_whole: bool) -> None:
        """Write what is left."""
        self.flush()
