"""A cluster that Graft starts on this machine."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import ROOT
from conftest import RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def short_folder() -> Iterator[str]:
    """Ray's socket names must fit into 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="g") as folder:
        yield folder


@pytest.mark.parametrize(("ending", "exit_code"), [("", 0), ("SIGTERM", 128 + signal.SIGTERM)])
def test_a_session_of_our_own_ends_with_us(
    tmp_path: Path, short_folder: str, ending: str, exit_code: int
) -> None:
    """A cluster that Graft starts is asked for a token, and no process of it is left."""
    code = (
        "import json, os, signal, sys, time, urllib.request, urllib.error\n"
        "from cluster.session import session\n"
        "from cluster.jobs import list_jobs\n"
        "with session(num_cpus=1) as ray:\n"
        "    assert ray.started_here and list_jobs(ray) == []\n"
        "    try: urllib.request.urlopen(ray.dashboard_url + '/api/jobs/')\n"
        "    except urllib.error.HTTPError as e: print(json.dumps([ray.dashboard_url, e.code]))\n"
        "    import psutil\n"
        "    mine = [p.pid for p in psutil.Process().children(recursive=True)]\n"
        "    print(json.dumps(mine), flush=True)\n"
        "    if sys.argv[1]:\n"
        "        os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
        "        time.sleep(100)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "TMPDIR": short_folder}
    result = subprocess.run([sys.executable, "-c", code, ending], capture_output=True, text=True,
                            timeout=120, check=False, cwd=ROOT, env=env)  # fmt: skip
    assert result.returncode == exit_code, result.stderr
    (url, status), processes = map(json.loads, result.stdout.splitlines()[-2:])
    assert url.startswith("http://127.0.0.1:")
    assert status in (401, 403)
    assert len(processes) > 3
    deadline = time.monotonic() + 10
    while left := [pid for pid in processes if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_a_job_runs_on_the_cluster_that_it_was_given_to(
    ray_cluster: RayCluster, tmp_path: Path, short_folder: str
) -> None:
    """Beside another cluster on the same machine, which Ray may take for its own."""
    code = (
        "from cluster import jobs\n"
        "from cluster.session import session\n"
        'say = \'import os; print("at", os.environ["RAY_ADDRESS"])\'\n'
        "with session(num_cpus=1) as own:\n"
        "    for name in ('a', 'b', 'c'):\n"
        "        jobs.submit(own, 'timeit', ['-n1', '-r1', say], job_id=name, name='', store='')\n"
        "        jobs.wait(own, name)\n"
        "        print(own.address, *jobs.logs(own, name), flush=True)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "TMPDIR": short_folder}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            timeout=300, check=False, cwd=ROOT, env=env)  # fmt: skip
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines()[-3:]:
        address = line.split()[0]
        assert f"at {address}" in line
        assert address != ray_cluster.address


def test_requests_that_are_over_are_not_kept(short_folder: str) -> None:
    """By Ray Serve's router, in a process that asks for adapters: a gateway would grow for ever."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    told = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kept_requests.py")], capture_output=True, text=True,
        timeout=240, check=False, cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT), "TMPDIR": short_folder},
    )  # fmt: skip
    assert "kept: 0\n" in told.stdout, told
