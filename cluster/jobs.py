"""Ray Jobs: submit, list, show, follow the log, stop, wait.

The code travels with the job (Ray's `py_modules`), so a cluster needs only the dependencies and
always runs the submitter's version. Knows processes and logs; what a job does is its entrypoint.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError, JobFailedError, NotFoundError
from cluster.session import Session, our_code, store_credentials

POLL_S = 0.5
_LOG_LINES_IN_ERROR = 15
_NO_AGENT, _STARTING_S = "No available agent to submit job", 120


@dataclass(frozen=True)
class JobInfo:
    """One job as Ray knows it; `store` is where it publishes. `status` is PENDING, RUNNING,
    STOPPED, SUCCEEDED or FAILED."""

    id: str
    status: str
    name: str
    store: str
    entrypoint: str
    message: str
    started_at_s: float | None
    ended_at_s: float | None

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, one way or another."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


def submit(
    session: Session,
    module: str,
    arguments: Sequence[str],
    *,
    job_id: str,
    name: str,
    store: str,
    env: Mapping[str, str] | None = None,
) -> None:
    """Start `python -m module *arguments` on the cluster, as a job of this id.

    The job runs with this Python where its path exists on the cluster's head (the same machine or
    image), else with the head's `python`; GRAFT_PYTHON names another.
    """
    # Ray drops lines that differ from another process's only in numbers, such as those of a
    # restarted worker.
    env_vars = {"RAY_DEDUP_LOGS": "0", **store_credentials(), **(env or {})}
    runtime_env = {**our_code(), "env_vars": env_vars}
    python = shlex.quote(os.environ.get("GRAFT_PYTHON", sys.executable))
    # Where a machine is the head of several clusters, Ray gives its job the address of any.
    address = f"export RAY_ADDRESS={shlex.quote(session.address)}; " if session.address else ""
    entrypoint = (
        f'{address}P={python}; command -v "$P" >/dev/null || P=python; '
        f'exec "$P" -m {module} {shlex.join(arguments)}'
    )
    with _faults(session):
        client = _client(session)
        deadline = time.monotonic() + _STARTING_S
        while True:
            try:
                client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env=runtime_env,
                    metadata={"graft_name": name, "graft_store": store},
                )
                return
            except RuntimeError as error:  # of a cluster that has just been started
                if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)


def list_jobs(session: Session) -> list[JobInfo]:
    """Every submitted job, newest first."""
    with _faults(session):
        found = [_info(details) for details in _client(session).list_jobs()]
    found = [info for info in found if info.id]
    return sorted(found, key=lambda info: info.started_at_s or 0, reverse=True)


def show(session: Session, job_id: str) -> JobInfo:
    """One job. Raises NotFoundError."""
    with _faults(session, job_id):
        return _info(_client(session).get_job_info(job_id))


def stop(session: Session, job_id: str) -> None:
    """Ask a job to end, and wait until it has. Raises NotFoundError."""
    with _faults(session, job_id):
        _client(session).stop_job(job_id)
    while not show(session, job_id).is_over:
        time.sleep(POLL_S)


def logs(session: Session, job_id: str, *, follow: bool = False) -> Iterator[str]:
    """The job's log, line by line; with `follow`, until the job ends. Raises NotFoundError."""
    with _faults(session, job_id):
        client = _client(session)
        if not follow:
            yield from str(client.get_job_logs(job_id)).splitlines()
            return
        with asyncio.Runner() as runner:
            chunks = client.tail_job_logs(job_id)
            partial = ""
            while True:
                try:
                    chunk = runner.run(anext(chunks))
                except StopAsyncIteration:
                    break
                *lines, partial = (partial + str(chunk)).split("\n")
                yield from lines
            if partial:
                yield partial


def wait(session: Session, job_id: str) -> JobInfo:
    """Wait until the job has ended well.

    Raises:
        JobFailedError: it failed or was stopped; the message carries the end of its log.
    """
    while not (info := show(session, job_id)).is_over:
        time.sleep(POLL_S)
    if info.status == "SUCCEEDED":
        return info
    tail = "\n".join([*logs(session, job_id)][-_LOG_LINES_IN_ERROR:])
    reason = (info.message or "no reason given").splitlines()[0].split(", last available logs")[0]
    raise JobFailedError(f"job {job_id} ({info.name}): {info.status}: {reason}\n{tail}")


def _client(session: Session) -> Any:
    # Any: Ray's client is typed, but its details are optional everywhere.
    from ray.job_submission import JobSubmissionClient

    # Ray tells of every upload and every closed socket at INFO.
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return JobSubmissionClient(session.dashboard_url)


def _info(details: Any) -> JobInfo:
    metadata = details.metadata or {}
    return JobInfo(
        id=details.submission_id or "",
        status=str(getattr(details.status, "value", details.status)),
        name=metadata.get("graft_name", ""),
        store=metadata.get("graft_store", ""),
        entrypoint=details.entrypoint or "",
        message=details.message or "",
        started_at_s=details.start_time / 1000 if details.start_time else None,
        ended_at_s=details.end_time / 1000 if details.end_time else None,
    )


@contextmanager
def _faults(session: Session, job_id: str | None = None) -> Generator[None]:
    """Turn what Ray's client raises into Graft's errors."""
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (RuntimeError, OSError, ClientError, AuthenticationError) as error:
        text = str(error) or type(error).__name__
        status = re.search(r"status code (\d+)", text)
        code = status[1] if status else ""
        if job_id is not None and (code == "404" or "does not exist" in text):
            raise NotFoundError(
                f"job {job_id!r}: not on the cluster at {session.dashboard_url}; "
                "`graft jobs list` shows what is"
            ) from error
        if isinstance(error, AuthenticationError) or code in ("401", "403"):
            raise ClusterError(
                f"cluster {session.dashboard_url}: refuses our token; put the cluster's token "
                "into ~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from error
        raise ClusterError(f"cluster {session.dashboard_url}: {text.splitlines()[0]}") from error
