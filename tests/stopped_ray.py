"""A service on a cluster that `ray start` made, and then `ray stop`, which ends every Ray process
that it sees: to be run in a PID namespace of its own, as its first process.

    stopped_ray.py BASE FOLDER

Tells as JSON what the service said, its exit code, and what still runs ten seconds later.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from commands import Command, overrides, served_at

GRACE_S = 10


def ray(*arguments: str) -> None:
    command = [Path(sys.executable).with_name("ray"), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def others() -> list[str]:
    """Every process but this one; those that have ended are ours to reap, as init does."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [process.name() for process in psutil.process_iter() if process.pid != os.getpid()]


def main(base: str, folder: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray("start", "--head", f"--port={port}", "--num-cpus=6", "--dashboard-port=0",
        "--node-ip-address=127.0.0.1", "--disable-usage-stats")  # fmt: skip
    settings = (
        f"store={folder}/store", f"engine.base_model={base}", f"cache={folder}/cache",
        "gateway.port=0",
    )  # fmt: skip
    arguments = ("--address", f"127.0.0.1:{port}", *overrides(*settings))
    with Command("serve", "configs/serving/local.yaml", *arguments) as command:
        served_at(command)
        ray("stop")
        code = command.process.wait(60)
        deadline = time.monotonic() + GRACE_S
        while (left := others()) and time.monotonic() < deadline:
            time.sleep(0.2)
        print(json.dumps({"code": code, "said": command.said, "left": left}))


main(*sys.argv[1:])
