"""docs/wave.svg: the demo's service through a wave of load, with two of its engines killed.

    python docs/wave.py [--seconds 150] [--peak 3]

On a local Ray cluster: the demo's base behind one to three engine replicas. Requests arrive at
random, ever more often and then ever less (at most IN_PROGRESS at a time); at the top an engine's
process gets SIGKILL, twice. Every answer streams, and has failed if it was refused, cut or late,
or if its text is not what an engine says that is left alone. docs/wave.csv has the figures, one
row a second; the command ends with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

from cluster.registry import Registry
from cluster.session import session
from cluster.spec import load_spec
from serving.app import checked, running
from serving.engine import Engine, GenerationRequest
from serving.spec import ServingSpec

HERE = Path(__file__).parent
SPEC = HERE.parent / "configs/demo/serving.yaml"
# So small that a laptop's load moves it; the replicas share its cores.
SETTINGS = [
    "engine.threads=1", "engine.max_running_requests=16", "replicas.min=1", "replicas.max=3",
    "replicas.cpus=1", "replicas.target_outstanding_tokens=300", "replicas.look_back_s=2",
    "replicas.upscale_delay_s=2", "replicas.downscale_delay_s=10", "gateway.port=0",
]  # fmt: skip
NUM_CPUS = 4
ADAPTERS = ("red", "green", "blue")
REQUESTS, TOKENS, IN_PROGRESS = 48, 120, 200
KILLS = (0.45, 0.6)  # of the time
LATE_S, WINDOW_S = 60.0, 5.0


@dataclass
class Wave:
    """What was seen. Times are seconds from the start; a first token's comes with that of its
    request."""

    seconds: list[float] = field(default_factory=list[float])
    replicas: list[int] = field(default_factory=list[int])
    in_progress: list[int] = field(default_factory=list[int])
    firsts: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    failures: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    kills: list[float] = field(default_factory=list[float])
    answered: int = 0

    def first_token_s(self, at: float, percent: int) -> float | None:
        """A percentile over the requests of the last WINDOW_S; None if there were none."""
        found = sorted(first for began, first in self.firsts if at - WINDOW_S < began <= at)
        return found[math.ceil(percent / 100 * len(found)) - 1] if found else None


def requests() -> list[dict[str, Any]]:
    """Of the base and of each adapter in turn, every second one drawn at random by its seed."""
    models = (None, *ADAPTERS)
    return [
        {
            "prompt": f"### Instruction:\nSay something about {number}.\n\n### Response:\n",
            "adapter": models[number % len(models)],
            "max_tokens": TOKENS,
            "temperature": float(number % 2),
            "seed": number,
            "ignore_eos": True,
        }
        for number in range(REQUESTS)
    ]


def publish_adapters(spec: ServingSpec, folder: Path) -> None:
    """LoRAs with random weights, as far from the base as trained ones."""
    import peft
    import torch
    import transformers

    for number, name in enumerate(ADAPTERS):
        torch.manual_seed(number)
        base = transformers.AutoModelForCausalLM.from_pretrained(spec.engine.base_model)
        config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(folder / name)
        Registry(spec.store).publish(name, folder / name)


def undisturbed(spec: ServingSpec, folder: Path) -> list[str]:
    """The text of each request from an engine of its own."""
    engine = Engine(spec.engine)
    for name in ADAPTERS:
        engine.add_adapter(name, folder / name)
    return [found.text for found in engine.generate([GenerationRequest(**r) for r in requests()])]


class Load:
    """Requests to the service at `url`, which must be answered as `expected`."""

    def __init__(self, http: httpx2.AsyncClient, base: str, expected: Sequence[str]) -> None:
        self._http, self._base, self._expected = http, base, expected
        self._random = random.Random(0)
        self._began = time.monotonic()
        self.wave = Wave()
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    async def arrive(self, seconds: float, peak: float) -> None:
        """Start requests at exponential distances, whose rate is `peak` per second half-way."""
        numbers = itertools.cycle(range(len(self._expected)))
        while self.now < seconds:
            rate = 0.5 + (peak - 0.5) * math.sin(math.pi * self.now / seconds) ** 2
            await asyncio.sleep(self._random.expovariate(rate))
            if len(self.tasks) < IN_PROGRESS:
                task = asyncio.create_task(self._ask(next(numbers)))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
        await asyncio.gather(*self.tasks)

    async def _ask(self, number: int) -> None:
        began = self.now
        try:
            async with asyncio.timeout(LATE_S):
                text = await self._stream(requests()[number], began)
            if text != self._expected[number]:
                raise ValueError(f"request {number} is answered by another text: {text[:200]!r}")
        except (ValueError, TimeoutError, httpx2.HTTPError) as error:
            self.wave.failures.append((began, f"{type(error).__name__}: {error}"))
        else:
            self.wave.answered += 1

    async def _stream(self, request: dict[str, Any], began: float) -> str:
        """The text of an answer. Raises ValueError if it is none, or no whole one."""
        body = {**request, "model": request["adapter"] or self._base, "stream": True}
        del body["adapter"]
        parts, last = list[str](), ""
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"{response.status_code}: {(await response.aread())[:200]!r}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "choices" not in event:
                        raise ValueError(f"the stream has {event}")
                    if not parts:
                        self.wave.firsts.append((began, self.now - began))
                    parts.append(event["choices"][0]["text"])
                last = line or last
        if last != "data: [DONE]":
            raise ValueError(f"the stream ends with {last[:200]!r}")
        return "".join(parts)


async def watch(load: Load, spec: ServingSpec, arriving: asyncio.Task[None]) -> None:
    """Once a second, how many replicas run and how many requests are in progress; until all are
    answered and only the least replicas are left, at the longest 45 seconds more."""
    from ray import serve
    from ray.serve.schema import ReplicaState

    from serving.deployment import engines_of  # imports Ray, which a session must do first

    left_s = 45
    while left_s and not (arriving.done() and load.wave.replicas[-1:] == [spec.replicas.min]):
        status = await asyncio.to_thread(serve.status)
        engines = status.applications[engines_of(spec)].deployments["engine"]
        load.wave.seconds.append(load.now)
        load.wave.replicas.append(engines.replica_states.get(ReplicaState.RUNNING, 0))
        load.wave.in_progress.append(len(load.tasks))
        left_s -= arriving.done()
        await asyncio.sleep(1.0 - load.now % 1.0)


async def kill(load: Load, at: float) -> None:
    """SIGKILL for the process of the oldest engine, which has requests."""
    await asyncio.sleep(at)
    engines = [
        process for process in psutil.Process().children(recursive=True)
        if "ServeReplica" in process.name() and "engine" in " ".join(process.cmdline())
    ]  # fmt: skip
    min(engines, key=psutil.Process.create_time).kill()
    load.wave.kills.append(load.now)


async def run(
    url: str, spec: ServingSpec, expected: Sequence[str], options: argparse.Namespace
) -> Wave:
    """The whole wave, and what comes after it until only the least replicas are left."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(
        base_url=url, timeout=None, limits=limits, trust_env=False
    ) as http:
        load = Load(http, spec.name, expected)
        arriving = asyncio.create_task(load.arrive(options.seconds, options.peak))
        killing = [kill(load, share * options.seconds) for share in KILLS]
        await asyncio.gather(arriving, watch(load, spec, arriving), *killing)
    return load.wave


def rows(wave: Wave) -> list[dict[str, Any]]:
    """The figures of each second."""

    def percentile(at: float, percent: int) -> str:
        found = wave.first_token_s(at, percent)
        return "" if found is None else f"{found:.3f}"

    return [
        {
            "second": f"{at:.0f}",
            "replicas": replicas,
            "in_progress": in_progress,
            "ttft_p50_s": percentile(at, 50),
            "ttft_p99_s": percentile(at, 99),
            "failures": sum(began <= at for began, _ in wave.failures),
            "kills": sum(killed <= at for killed in wave.kills),
        }
        for at, replicas, in_progress in zip(
            wave.seconds, wave.replicas, wave.in_progress, strict=True
        )
    ]


def draw(wave: Wave, path: Path) -> None:
    """Four figures over one time, with the kills."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "wave"  # the same names of its parts each time
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots(4, sharex=True, height_ratios=(1, 1.4, 1.4, 0.8))
    told = rows(wave)
    for name, place, label in (
        ("replicas", 0, "engine replicas"),
        ("in_progress", 1, "requests\nin progress"),
        ("failures", 3, "failed\nrequests"),
    ):
        axes[place].step(wave.seconds, [row[name] for row in told], where="post")
        axes[place].set_ylabel(label)
        axes[place].set_ylim(bottom=0)
    axes[0].set_yticks(range(4))
    axes[3].set_yticks(range(0, 1 + max(1, len(wave.failures)), 1 + len(wave.failures) // 4))
    for percent in (50, 99):
        found = [wave.first_token_s(at, percent) for at in wave.seconds]
        values = [math.nan if value is None else value for value in found]
        axes[2].plot(wave.seconds, values, label=f"p{percent}")
    axes[2].set_ylabel("time to first\ntoken, s")
    axes[2].set_yscale("log")
    axes[2].legend()
    for place, each in enumerate(axes):
        each.grid(alpha=0.3)
        for killed in wave.kills:
            label = "an engine is killed" if place == 0 and killed == wave.kills[0] else None
            each.axvline(killed, color="red", linestyle="--", linewidth=1, label=label)
    axes[0].legend(loc="upper left")
    axes[3].set_xlabel(f"seconds; {wave.answered} answers, {len(wave.failures)} failed")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run, write, and exit with 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150.0, help="Of the wave.")
    parser.add_argument("--peak", type=float, default=3.0, help="Requests per second at the top.")
    parser.add_argument("--output", type=Path, default=HERE, help="Folder of wave.svg, wave.csv.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [*SETTINGS, f"store={folder / 'store'}", f"cache={folder / 'cache'}"]
        spec = checked(load_spec(ServingSpec, SPEC, settings))
        publish_adapters(spec, folder)
        expected = undisturbed(spec, folder)
        with session(num_cpus=NUM_CPUS) as ray, running(spec, ray) as url:
            wave = asyncio.run(run(url, spec, expected, options))
    draw(wave, options.output / "wave.svg")
    with (options.output / "wave.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows(wave)[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows(wave))
    for began, message in wave.failures:
        print(f"failed, asked at {began:.1f} s: {message}", file=sys.stderr)
    print(f"{wave.answered} answers, {len(wave.failures)} failed, {len(wave.kills)} kills, "
          f"up to {max(wave.replicas)} replicas: {options.output / 'wave.svg'}")  # fmt: skip
    sys.exit(1 if wave.failures else 0)


if __name__ == "__main__":
    main()
