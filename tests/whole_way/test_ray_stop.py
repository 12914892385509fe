"""`ray stop` under a service: it ends with its cluster, says so, and leaves no process."""

import json
import os
import shlex
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# A world of its own for `ray stop`, which would end the Ray of everybody else on this machine.
APART = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_service_ends_with_its_cluster(bases: Callable[[str], Path], tmp_path: Path) -> None:
    if subprocess.run([*APART, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare may make no PID namespace here")
    Path("/tmp/ray").mkdir(exist_ok=True)
    program = [sys.executable, TESTS / "stopped_ray.py", bases("llama"), tmp_path]
    script = f"mount -t tmpfs tmpfs /tmp/ray && exec {shlex.join(map(str, program))}"
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    done = subprocess.run(
        [*APART, "sh", "-c", script],
        env={**os.environ, **secret}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert "has ended on this machine, and the service with it" in found["said"], found
    assert found["code"] == 1, found
    assert found["left"] == []
