"""What HTTP costs: the service beside the bare engine, on the same cores.

    python tests/bench/service.py [--rounds 5] [--firsts 40] [--dtype float32] [--threads 2]

The 82 M-parameter Llama of tests/bench/serving.py, three times, taking turns: in an engine of a
process of its own; behind Graft's gateway and uvicorn, all in one process and no Ray; and behind
`graft serve` as anybody starts it (Ray Serve's proxy, a gateway and one engine replica on
loopback). Throughput is that of 32 requests of 64 + 64 tokens at once: a list for the engine, 32
SSE streams of the others, whose ends are checked. First tokens are of one request of 64 tokens at a
time, of each in turn. What reads the streams runs on the same cores and counts against who sends
them; the second table tells whose time each token of `graft serve` took. The first round warms up.
Figures are medians, ratios and differences the median of those within a round. Asserts nothing
about time.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

# By its file: as a module it would have the name of the package that it measures.
_SPEC = importlib.util.spec_from_file_location(
    "bench_serving", Path(__file__).with_name("serving.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
bench = importlib.util.module_from_spec(_SPEC)
# Its dataclasses look themselves up there.
sys.modules[_SPEC.name] = bench
_SPEC.loader.exec_module(bench)

ROOT = Path(__file__).resolve().parents[2]
NAME = "base"
LOAD = bench.Load()
FIRST = bench.Load(requests=1, new_tokens=1)
ENGINE: dict[str, Any] = {"threads": bench.THREADS, "max_running_requests": 32, "kv_cache_gib": 1.0}
# Whose process it is, by what its title has.
PROCESSES = {":engine": "engine", ":gateway": "gateway", "ProxyActor": "proxy"}


def make_base(folder: Path) -> None:
    """The base and a tokenizer of as many tokens, which both sides turn into text."""
    import transformers
    from tokenizers import Tokenizer, decoders, models

    bench.make_base(folder)
    vocabulary = {f"\u0120{number:x}": number for number in range(bench.CONFIG["vocab_size"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.decoder = decoders.ByteLevel()
    end = f"\u0120{bench.CONFIG['eos_token_id']:x}"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end)
    tokenizer.save_pretrained(folder)


def serve_engine(base: Path, dtype: str) -> None:
    """In the engine's process: one line in per load and seed, one line out with the seconds."""
    with contextlib.redirect_stdout(sys.stderr):
        from serving.engine import Engine, EngineSpec, GenerationRequest

        engine = Engine(EngineSpec(base_model=str(base), dtype=dtype, **ENGINE))
    print("ready", flush=True)
    for line in sys.stdin:
        name, seed = json.loads(line)
        load = {"all": LOAD, "first": FIRST}[name]
        asked = [
            GenerationRequest(
                prompt_token_ids=prompt, max_tokens=load.new_tokens, ignore_eos=True, temperature=0
            )
            for prompt in load.prompts(seed)
        ]
        began = time.perf_counter()
        engine.generate(asked)
        print(time.perf_counter() - began, flush=True)


@contextlib.contextmanager
def engine_process(base: Path, dtype: str) -> Iterator[Callable[[str, int], float]]:
    """A call of it runs a load with the prompts of a seed and returns the seconds."""
    # -P: this file's folder must not hide the package of the same name.
    command = [sys.executable, "-P", __file__, "--engine", str(base), "--dtype", dtype,
               "--threads", str(bench.THREADS)]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(bench.THREADS)},
    ) as process:  # fmt: skip
        if (said := bench.answer(process)) != "ready":
            raise SystemExit(f"the engine did not start: {said!r}")

        def run(name: str, seed: int) -> float:
            assert process.stdin is not None
            print(json.dumps([name, seed]), file=process.stdin, flush=True)
            return float(bench.answer(process))

        yield run
        process.kill()


def serve_gateway(base: Path, dtype: str) -> None:
    """In the process of a gateway without Ray: its port on a line, then it serves."""
    import uvicorn

    from serving.gateway.assembly import gateway_app
    from serving.replica import Replica
    from serving.spec import ServingSpec

    with contextlib.redirect_stdout(sys.stderr):
        folder = base.parent / "gateway"
        spec = ServingSpec.model_validate(
            {"name": NAME, "store": str(folder / "store"), "cache": str(folder / "cache"),
             "engine": {"base_model": str(base), "dtype": dtype, **ENGINE}}
        )  # fmt: skip
        app = gateway_app(spec, Replica(spec))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, log_level="error", lifespan="off")
        asyncio.run(uvicorn.Server(config).serve([listening]))


@contextlib.contextmanager
def gateway_process(base: Path, dtype: str) -> Iterator[str]:
    """The URL of a gateway with an engine in its own process."""
    command = [sys.executable, "-P", __file__, "--gateway", str(base), "--dtype", dtype,
               "--threads", str(bench.THREADS)]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(bench.THREADS)},
    ) as process:  # fmt: skip
        yield bench.answer(process)
        process.kill()


@contextlib.contextmanager
def service_process(base: Path, folder: Path, dtype: str) -> Iterator[tuple[int, str]]:
    """`graft serve` of `base`; its process and its URL."""
    settings = {
        "name": NAME, "store": folder / "store", "cache": folder / "cache", "gateway.port": 0,
        "engine.base_model": base, "engine.dtype": dtype,
        **{f"engine.{key}": value for key, value in ENGINE.items()},
    }  # fmt: skip
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "serve", "configs/serving/local.yaml", *options],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"(http://\S+)/v1", line):
                break
        else:
            raise SystemExit("".join(lines))
        try:
            yield process.pid, found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)


async def read(http: httpx2.AsyncClient, prompt: list[int], tokens: int) -> float:
    """Seconds to the first piece of a stream, which must end as OpenAI's do, with every token."""
    body = {
        "model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    first_s, parts = 0.0, list[bytes]()
    began = time.perf_counter()
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for part in response.aiter_raw():
            first_s = first_s or time.perf_counter() - began
            parts.append(part)
    *_, usage, done, _ = b"".join(parts).split(b"\n\n")
    assert done == b"data: [DONE]", done
    found = json.loads(usage.removeprefix(b"data: "))["usage"]
    assert found["completion_tokens"] == tokens, found
    return first_s


async def read_all(http: httpx2.AsyncClient, load: Any, seed: int) -> float:
    """Seconds until the last of a load's streams has ended."""
    began = time.perf_counter()
    prompts = load.prompts(seed)
    await asyncio.gather(*(read(http, prompt, load.new_tokens) for prompt in prompts))
    return time.perf_counter() - began


def cpu_seconds(root: int) -> Counter[str]:
    """CPU time so far of a service's processes, and of this one, which reads."""
    found = Counter({"reader": time.process_time()})
    for process in psutil.Process(root).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title, times = " ".join(process.cmdline()), process.cpu_times()
            whose = next((who for part, who in PROCESSES.items() if part in title), "rest of Ray")
            found[whose] += times.user + times.system
    return found


@dataclass
class Found:
    """Of each round the seconds of the engine, the gateway and the service, for all at once and for
    first tokens, and the CPU seconds of the service by process."""

    all_at_once: list[tuple[float, ...]] = field(default_factory=list[tuple[float, ...]])
    firsts: list[tuple[float, ...]] = field(default_factory=list[tuple[float, ...]])
    cpu: list[Counter[str]] = field(default_factory=list[Counter[str]])


async def measure(
    chosen: argparse.Namespace, run: Callable[[str, int], float], pid: int, urls: Sequence[str]
) -> Found:
    """All in turn; the last of `urls` is of the service with process `pid`."""
    found = Found()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                httpx2.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False)
            )
            for url in urls
        ]
        for seed in range(chosen.rounds + 1):
            took = [run("all", seed)]
            for http in clients:
                before = cpu_seconds(pid)
                took.append(await read_all(http, LOAD, seed))
            if seed:
                found.all_at_once.append(tuple(took))
                found.cpu.append(cpu_seconds(pid) - before)
        for seed in range(1000, 1000 + chosen.firsts):  # nobody has read these prompts
            (prompt,) = FIRST.prompts(seed)
            over_http = [await read(http, prompt, 1) for http in clients]
            found.firsts.append((run("first", seed), *over_http))
    return found


def table(found: Found) -> str:
    """Markdown."""
    tokens = LOAD.requests * LOAD.new_tokens
    speeds = [
        statistics.median(tokens / s for s in side) for side in zip(*found.all_at_once, strict=True)
    ]
    firsts = [1e3 * statistics.median(side) for side in zip(*found.firsts, strict=True)]
    ratios = [
        statistics.median(took[0] / took[side] for took in found.all_at_once) for side in (1, 2)
    ]
    added = [
        1e3 * statistics.median(took[side] - took[0] for took in found.firsts) for side in (1, 2)
    ]
    cpu = {
        who: 1e3 * statistics.median(c[who] for c in found.cpu) / tokens
        for who in ("engine", "gateway", "proxy", "rest of Ray", "reader")
    }
    rows = [
        ("", "engine in process", "gateway without Ray", "`graft serve`", "wanted"),
        ("---",) * 5,
        (f"tokens/s, {LOAD.requests} at once", f"{speeds[0]:,.0f}",
         *(f"{speed:,.0f}, ratio {ratio:.2f}"
           for speed, ratio in zip(speeds[1:], ratios, strict=True)), "at least 0.75"),
        ("first token, one at a time, ms, p50", f"{firsts[0]:.1f}",
         *(f"{first:.1f}, {more:.1f} more" for first, more in zip(firsts[1:], added, strict=True)),
         "at most 10"),
        (),
        ("CPU time of the service, ms per token", *cpu),
        ("---",) * (1 + len(cpu)),
        ("", *(f"{value:.2f}" for value in cpu.values())),
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" if row else "" for row in rows)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--firsts", type=int, default=40, help="Requests alone, of either side.")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=bench.THREADS, help="Of every engine.")
    parser.add_argument("--engine", metavar="BASE", help=argparse.SUPPRESS)
    parser.add_argument("--gateway", metavar="BASE", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    bench.THREADS = ENGINE["threads"] = chosen.threads
    if chosen.engine:
        serve_engine(Path(chosen.engine), chosen.dtype)
        return
    if chosen.gateway:
        serve_gateway(Path(chosen.gateway), chosen.dtype)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base")
        with (
            engine_process(folder / "base", chosen.dtype) as run,
            gateway_process(folder / "base", chosen.dtype) as alone,
            service_process(folder / "base", folder, chosen.dtype) as (pid, url),
        ):
            found = asyncio.run(measure(chosen, run, pid, [alone, url]))
    print(
        f"{platform.machine()}, {bench.THREADS} threads, {chosen.dtype}, {chosen.rounds} rounds\n"
    )
    print(table(found))


if __name__ == "__main__":
    main()
