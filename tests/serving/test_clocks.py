"""Machines whose clocks are days apart share a store, and a service reads it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx2
import pytest
from adapters import make_adapter
from commands import ROOT
from service import ASK, running

from cluster.errors import ConflictError
from cluster.lease import held
from cluster.registry import Registry
from cluster.store import open_store

DAY_S = 86_400
# Between a process and its C library, as libfaketime does it.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*of)(clockid_t, struct timespec *);
    if (!of) of = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = of(id, now);
    if (code == 0 && id == CLOCK_REALTIME) now->tv_sec += atol(getenv("SKEW_S"));
    return code;
}

time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}
"""
PUBLISH = """
import sys
from pathlib import Path
from cluster.registry import Registry
from serving.keys import KeyStore
store, folder, number = sys.argv[1:]
registry = Registry(store)
assert registry.publish("bot", Path(folder)).version == int(number)
registry.set_alias("bot", "stable", int(number))
print(KeyStore(store).create("team")[1])
"""
HOLD = """
import sys
from cluster.lease import held
from cluster.store import open_store
with held(open_store(sys.argv[1]), "lease", "it", beat_s=0.2):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("shim") / "clock.c"
    source.write_text(SHIM)
    library = source.with_suffix(".so")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    return library


@contextmanager
def started(
    shim: Path, skew_s: int, script: str, *arguments: object
) -> Iterator[subprocess.Popen[str]]:
    """A script on a machine whose clock is so far ahead."""
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "LD_PRELOAD": str(shim), "SKEW_S": str(skew_s)},
    ) as process:  # fmt: skip
        yield process
        process.kill()


def test_versions_aliases_and_keys_of_machines_days_apart(
    bases: Callable[[str], Path], shim: Path, tmp_path: Path
) -> None:
    """The second to be published is the newest, though its time is the earlier one."""
    store, keys = str(tmp_path / "store"), list[str]()
    for number, (variant, skew_s) in enumerate((("lora", DAY_S), ("bitfit", -DAY_S)), 1):
        folder = make_adapter(variant, bases("llama"), tmp_path / variant)
        with started(shim, skew_s, PUBLISH, store, folder, number) as process:
            keys.append(process.communicate(timeout=60)[0].strip())
            assert process.returncode == 0
    first, second = Registry(store).versions("bot")
    made = [datetime.fromisoformat(v.created_at).timestamp() - time.time() for v in (first, second)]
    assert (made[0] > DAY_S / 2, made[1] < -DAY_S / 2) == (True, True), "the clocks are not apart"
    with running(bases("llama"), tmp_path, gateway={"keys": store}) as service:
        texts: dict[str, str] = {}
        for key in keys:
            for model in ("bot", "bot@1", "bot@2", "bot:stable"):
                found = httpx2.post(
                    f"{service.url}/v1/completions", json={**ASK, "model": model},
                    headers={"Authorization": f"Bearer {key}"}, timeout=60,
                )  # fmt: skip
                assert found.status_code == 200, found.text
                texts[model] = found.json()["choices"][0]["text"]
    assert texts["bot"] == texts["bot@2"] == texts["bot:stable"] != texts["bot@1"]


@pytest.mark.parametrize("skew_s", [DAY_S, -DAY_S])
def test_a_lease_of_a_machine_days_apart(shim: Path, tmp_path: Path, skew_s: int) -> None:
    """It is held while its holder lives, and not much longer."""
    store = open_store(str(tmp_path))
    with started(shim, skew_s, HOLD, tmp_path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConflictError), held(store, "lease", "it", beat_s=0.2):
            pass
        holder.kill()
        holder.wait()
        with held(store, "lease", "it", beat_s=0.2) as check:
            check()
