"""What many adapters cost: resident, in a batch, in a store, loaded while others are answered.

    python tests/bench/adapters.py [--only flat,wide,distinct,merged,zipf,cold,scheduler]
                                   [--dtype float32] [--rounds 3] [--share 1.0]

The base, the threads and the requests (32 of 64 + 64 tokens, unless a row says otherwise) of
tests/bench/serving.py; LoRAs on every linear module, of rank 16, in `wide` of rank 8, with random
values, in files of the base's dtype. Each part is a process of its own, in which the loads that are
compared take turns; the first round warms up. Figures are medians, ratios the median of the ratios
within a round. `allowed` is the ratio that bytes alone would give: the base's and those of the
adapters that a batch reads in the mean, against the same of what it is compared with. `--share`
makes fewer adapters, for a trial. Asserts nothing about time.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# By its file: as a module it would have the name of the package that it measures.
_SPEC = importlib.util.spec_from_file_location(
    "bench_serving", Path(__file__).with_name("serving.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
bench = importlib.util.module_from_spec(_SPEC)
sys.modules["bench_serving"] = bench  # its dataclasses look for their module
_SPEC.loader.exec_module(bench)

GIB = 2**30
ROOM = 32  # adapters, in `zipf`
HIDDEN, MIDDLE = bench.CONFIG["hidden_size"], bench.CONFIG["intermediate_size"]
LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (HIDDEN, MIDDLE),
    "mlp.up_proj": (HIDDEN, MIDDLE),
    "mlp.down_proj": (MIDDLE, HIDDEN),
}
Names = Sequence[str | None]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    load: str
    figure: str
    ratio: float | None = None
    wanted: str = ""
    allowed: float | None = None


@dataclass(frozen=True)
class Place:
    """What a part is given: a folder with the base, and our options."""

    folder: Path
    dtype: str
    rounds: int
    share: float

    @property
    def base(self) -> Path:
        """The base's folder."""
        return self.folder / "base"

    def many(self, count: int) -> int:
        """So many adapters, or the share of them that was asked for."""
        return max(8, round(count * self.share))

    def adapter_bytes(self, rank: int = 16) -> int:
        """Of one adapter's tensors."""
        width = sum(i + o for i, o in LINEARS.values()) * bench.CONFIG["num_hidden_layers"]
        return rank * width * (4 if self.dtype == "float32" else 2)

    def allowed(self, adapters: float, others: float, rank: int = 16) -> float:
        """Bytes that a step reads with so many adapters in the batch, of those with `others`."""
        base = (self.base / "model.safetensors").stat().st_size
        base //= 1 if self.dtype == "float32" else 2
        one = self.adapter_bytes(rank)
        return (base + others * one) / (base + adapters * one)

    def write(self, folder: Path, number: int, rank: int = 16) -> Path:
        """A LoRA folder as PEFT saves it, its values those of `number` alone."""
        import torch
        from safetensors.torch import save_file

        folder.mkdir(exist_ok=True)
        random = torch.Generator().manual_seed(number)
        tensors: dict[str, torch.Tensor] = {}
        for layer, (name, (size_in, size_out)) in itertools.product(
            range(bench.CONFIG["num_hidden_layers"]), LINEARS.items()
        ):
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (rank, size_in)), ("B", (size_out, rank))):
                values = torch.rand(shape, generator=random).sub_(0.5).mul_(0.04)
                tensors[f"{prefix}.lora_{part}.weight"] = values.to(getattr(torch, self.dtype))
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
            "base_model_name_or_path": str(self.base), "inference_mode": True, "bias": "none",
            "target_modules": [name.split(".")[1] for name in LINEARS],
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def engine_spec(self, **options: Any) -> Any:
        """Of an engine with the benchmark's threads."""
        from serving.engine import EngineSpec

        kept: dict[str, Any] = {
            "threads": bench.THREADS, "max_running_requests": 32, "kv_cache_gib": 1
        }  # fmt: skip
        return EngineSpec(base_model=str(self.base), dtype=self.dtype, **(kept | options))

    def engine(self, numbers: Sequence[int] = (), rank: int = 16, **options: Any) -> Any:
        """An engine that holds those adapters, each named by its number."""
        from serving.engine import Engine

        room = (len(numbers) + 1) * self.adapter_bytes(rank) / GIB
        engine = Engine(self.engine_spec(**({"adapters_gib": room} | options)))
        for number in numbers:
            folder = self.write(self.folder / "one", number, rank)
            engine.add_adapter(str(number), folder)
        return engine


def requests_of(names: Names, seed: int, prompt_tokens: int = 64, new_tokens: int = 64) -> Any:
    """One request for each name, with prompts of that seed's."""
    from serving.engine import GenerationRequest

    load = bench.Load(requests=len(names), prompt_tokens=prompt_tokens)
    return [
        GenerationRequest(
            prompt_token_ids=prompt, adapter=name, max_tokens=new_tokens, ignore_eos=True
        )
        for prompt, name in zip(load.prompts(seed), names, strict=True)
    ]


def drawn(names: Sequence[str], count: int, seed: int, power: float = 0.0) -> list[str]:
    """So many of `names`, the one at place k with a probability like 1 / k^power."""
    import numpy as np

    weights = np.arange(1, len(names) + 1) ** -power
    chosen = np.random.default_rng(seed).choice(len(names), count, p=weights / weights.sum())
    return [names[int(at)] for at in chosen]


def in_turns(rounds: int, runs: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Seconds of each run in each round but the first; a run is told the round's number."""
    times = defaultdict[str, list[float]](list)
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run(number)
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def faster(times: Sequence[float], others: Sequence[float]) -> float:
    """The speed of `times` over that of `others`."""
    return statistics.median(o / t for t, o in zip(times, others, strict=True))


def speed(times: Sequence[float], requests: int = 32, new_tokens: int = 64) -> str:
    """As it stands in the table."""
    return f"{requests * new_tokens / statistics.median(times):,.0f} tokens/s"


def resident(place: Place, part: str, count: int, rank: int, wanted: str) -> list[Row]:
    """`count` adapters held, beside an engine that holds 5."""
    few = place.engine(range(5), rank)
    many = place.engine(range(count), rank)
    five, everyone = [str(n) for n in range(5)], [str(n) for n in range(count)]

    def run(engine: Any, names: Sequence[str]) -> Callable[[int], object]:
        return lambda seed: engine.generate(requests_of(drawn(names, 32, seed), seed))

    few_name, same, all_of = (
        "5 held, requests uniform over them",
        f"{count:,} held, requests uniform over 5 of them",
        f"{count:,} held, requests uniform over all",
    )
    times = in_turns(
        place.rounds,
        {few_name: run(few, five), same: run(many, five), all_of: run(many, everyone)},
    )
    distinct = statistics.mean(len({*drawn(everyone, 32, s)}) for s in range(place.rounds))
    ratios = {name: faster(own, times[few_name]) for name, own in times.items()}
    return [
        Row(part, few_name, speed(times[few_name])),
        Row(part, same, speed(times[same]), ratios[same], wanted, 1.0),
        Row(part, f"{all_of} ({distinct:.0f} in a batch)", speed(times[all_of]), ratios[all_of],
            wanted, place.allowed(distinct, 5, rank)),
    ]  # fmt: skip


def flat(place: Place) -> list[Row]:
    """Flat in the number of adapters of rank 16."""
    return resident(place, "flat", place.many(200), 16, ">= 0.97")


def wide(place: Place) -> list[Row]:
    """Flat in the number of adapters of rank 8."""
    return resident(place, "wide", place.many(2000), 8, ">= 0.945")


def distinct(place: Place) -> list[Row]:
    """As many adapters as rows, beside PEFT's mixed batch."""
    for number, name in enumerate(bench.LORAS):
        place.write(place.folder / name, number)
    engine = place.engine(range(len(bench.LORAS)))
    peft = bench.peft(place.folder, place.dtype)
    load = bench.Load(bench.LORAS)
    names = [name.removeprefix("lora") for name in load.names()]
    times = in_turns(
        place.rounds,
        {
            "Graft": lambda seed: engine.generate(requests_of(names, seed)),
            "PEFT": lambda seed: peft(load, load.prompts(seed)),
        },
    )
    ratio = faster(times["Graft"], times["PEFT"])
    return [
        Row("distinct", "PEFT, adapter_names, 32 in a batch", speed(times["PEFT"])),
        Row("distinct", "Graft, the same batch", speed(times["Graft"]), ratio, ">= 2.5"),
    ]


def merged(place: Place) -> list[Row]:
    """One adapter, beside a base with the adapter added to its weights."""
    from safetensors.torch import load_file, save_file

    engine = place.engine([0])
    adapter = load_file(place.folder / "one" / "adapter_model.safetensors")
    weights = load_file(place.base / "model.safetensors")
    for key in [key for key in adapter if ".lora_A." in key]:
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        product = adapter[key.replace("lora_A", "lora_B")].float() @ adapter[key].float()
        weights[name] += 2 * product
    other = Place(place.folder / "merged", place.dtype, place.rounds, place.share)
    other.base.mkdir(parents=True)
    save_file(weights, other.base / "model.safetensors", {"format": "pt"})
    (other.base / "config.json").write_bytes((place.base / "config.json").read_bytes())
    alone = other.engine()
    times = in_turns(
        place.rounds,
        {
            "merged": lambda seed: alone.generate(requests_of([None] * 32, seed)),
            "adapter": lambda seed: engine.generate(requests_of(["0"] * 32, seed)),
        },
    )
    ratio = faster(times["adapter"], times["merged"])
    return [
        Row("merged", "one adapter added to the base's weights", speed(times["merged"])),
        Row("merged", "the same beside the base", speed(times["adapter"]), ratio, ">= 0.90",
            place.allowed(1, 0)),
    ]  # fmt: skip


class Service:
    """A replica without Ray over a store of `count` adapters, with room for `room` of them."""

    def __init__(self, place: Place, count: int, room: int) -> None:
        from cluster.registry import Registry
        from serving.replica import Replica
        from serving.spec import ServingSpec

        registry = Registry(str(place.folder / "store"))
        self.names = [f"a{number}" for number in range(count)]
        folders = (place.write(place.folder / "one", number) for number in range(count))
        self.versions = {
            name: registry.publish(name, folder)
            for name, folder in zip(self.names, folders, strict=True)
        }
        gib = (room + 0.5) * place.adapter_bytes() / GIB
        self.replica = Replica(
            ServingSpec(
                name="base", store=str(place.folder / "store"), cache=str(place.folder / "cache"),
                engine=place.engine_spec(adapters_gib=gib),
            )
        )  # fmt: skip

    def outputs(self, request: Any) -> AsyncGenerator[Any]:
        """The request's outputs, one token each; its adapter comes from the store."""
        version = None if request.adapter is None else self.versions[request.adapter]
        own = request if version is None else replace(request, adapter=version.ref)
        return self.replica.generate(own, version, stream=True)

    async def answer(self, request: Any) -> None:
        """Run one request to its end."""
        async for _ in self.outputs(request):
            pass

    async def crowd(self, requests: Sequence[Any], in_progress: int = 32) -> None:
        """All requests, so many at a time."""
        left = iter(requests)

        async def client() -> None:
            for request in left:
                await self.answer(request)

        await asyncio.gather(*(client() for _ in range(in_progress)))


def zipf(place: Place) -> list[Row]:
    """Requests over a store of 1,000 adapters with room for 32."""
    count, requests = place.many(1000), 192
    service = Service(place, count, ROOM)
    loads: dict[str, tuple[Sequence[str], float]] = {
        "one adapter": (service.names[:1], 0.0),
        f"Zipf(1.0) over {count:,}, room for {ROOM}": (service.names, 1.0),
        f"uniform over {ROOM}, all with room": (service.names[:ROOM], 0.0),
        f"uniform over {2 * ROOM}, twice the room": (service.names[: 2 * ROOM], 0.0),
    }
    loaded = defaultdict[str, list[int]](list)

    async def everything() -> dict[str, list[float]]:
        times = defaultdict[str, list[float]](list)
        for number, (load, (names, power)) in itertools.product(
            range(place.rounds + 1), loads.items()
        ):
            asked = requests_of(drawn(names, requests, number, power), number)
            before = (await service.replica.stats()).adapter_loads
            began = time.perf_counter()
            await service.crowd(asked)
            if number:
                times[load].append(time.perf_counter() - began)
                loaded[load].append((await service.replica.stats()).adapter_loads - before)
        return times

    times = asyncio.run(everything())
    stats = asyncio.run(service.replica.stats())
    service.replica.stop()
    one, popular, fits, twice = loads

    def row(load: str, ratio: float | None = None, wanted: str = "") -> Row:
        loads_of = statistics.median(loaded[load])
        figure = f"{speed(times[load], requests)}, {loads_of:.0f} loads"
        return Row("zipf", f"{requests} requests, {load}", figure, ratio, wanted)

    of_files = stats.adapter_bytes / (stats.adapters * place.adapter_bytes())
    return [
        row(one),
        row(popular, faster(times[popular], times[one]), ">= 0.70"),
        row(fits),
        row(twice, faster(times[twice], times[fits]), ">= 0.50"),
        Row("zipf", f"adapter_bytes of {stats.adapters} held, over their tensors' in the files",
            f"{stats.adapter_bytes / 2**20:,.0f} MiB", of_files, "0.95 to 1.05"),
    ]  # fmt: skip


def cold(place: Place) -> list[Row]:
    """The gaps between others' tokens while adapters are loaded, each for one short request."""
    loads, others, tokens = place.many(40), 16, 300
    rounds = place.rounds + 1
    service = Service(place, 1 + loads * (2 * rounds + 1), room=1 + 3 * loads)
    warm, fresh = service.names[1 : 1 + loads], iter(service.names[1 + loads :])

    async def listen(request: Any, gaps: list[float]) -> None:
        last: float | None = None
        async for _ in service.outputs(request):
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last = now

    async def gaps_beside(names: Sequence[str], every_s: float, seed: int) -> list[float]:
        """Gaps of 16 streams of one adapter, beside whose middle part come short requests."""
        gaps: list[float] = []
        background = [
            asyncio.create_task(listen(request, gaps))
            for request in requests_of(service.names[:1] * others, seed, new_tokens=tokens)
        ]
        await asyncio.sleep(1)  # until they generate
        gaps.clear()
        short: list[asyncio.Task[None]] = []
        for request in requests_of(names, seed, prompt_tokens=8, new_tokens=1):
            short.append(asyncio.create_task(service.answer(request)))
            await asyncio.sleep(every_s)
        await asyncio.gather(*background, *short)
        return gaps

    kinds = {"one every 0.2 s": 0.2, "all at once": 0.0}
    found = defaultdict[tuple[str, str], list[list[float]]](list)

    async def everything() -> None:
        await service.crowd(requests_of([service.names[0], *warm], 0, 8, 1))
        for seed, (kind, every_s) in itertools.product(range(rounds), kinds.items()):
            for state in ("held", "cold"):
                names = warm if state == "held" else [*itertools.islice(fresh, loads)]
                gaps = await gaps_beside(names, every_s, seed)
                if seed:
                    found[kind, state].append(gaps)
                # What was warm must be again: others came into the room.
                await service.crowd(requests_of(warm, seed, 8, 1))

    asyncio.run(everything())
    service.replica.stop()
    rows: list[Row] = []
    for kind in kinds:
        held, colds = (
            [_quantile(gaps, 0.99) for gaps in found[kind, state]] for state in ("held", "cold")
        )
        middle = statistics.median(gap for gaps in found[kind, "held"] for gap in gaps)
        what = f"{loads} requests beside 16 streams, {kind}: p99 between tokens"
        rows.append(
            Row("cold", f"{what}, their adapters held",
                f"{statistics.median(held) * 1e3:.1f} ms (p50 {middle * 1e3:.1f})")
        )  # fmt: skip
        ratio = statistics.median(c / h for c, h in zip(colds, held, strict=True))
        figure = f"{statistics.median(colds) * 1e3:.1f} ms"
        rows.append(Row("cold", f"{what}, each loaded", figure, ratio, "<= 1.1"))
    return rows


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


@contextlib.contextmanager
def timed(spent: list[float], *calls: tuple[Any, str]) -> Generator[None]:
    """Add up the seconds in (owner, name of a function), which must not call each other."""
    kept = [(owner, name, getattr(owner, name)) for owner, name in calls]

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[0] += time.perf_counter() - began

        return run

    for owner, name, function in kept:
        setattr(owner, name, wrapped(function))
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def scheduler(place: Place) -> list[Row]:
    """What scheduler, batch building and bank take of a step, and what those who wait cost it."""
    from serving.engine import forward
    from serving.engine.bank import AdapterBank
    from serving.engine.scheduler import Scheduler

    engine = place.engine(range(8), max_running_requests=64)
    names = [str(number) for number in range(8)]
    parts = [
        *((Scheduler, name) for name in ("schedule", "advance", "add", "remove")),
        *((AdapterBank, name) for name in ("begin_use", "end_use")),
        (forward, "build"),
    ]
    steps, spent = 24, [0.0]
    shares: list[float] = []
    times = defaultdict[str, list[float]](list)
    for number, waiting in itertools.product(range(place.rounds + 1), (0, 4096)):
        for request in requests_of([names[n % 8] for n in range(64 + waiting)], number):
            engine.submit(request)
        for _ in range(8):
            engine.step()  # until all 64 generate
        assert (engine.stats.running, engine.stats.waiting) == (64, waiting)
        spent[0] = 0.0
        began = time.perf_counter()
        with timed(spent, *parts):
            for _ in range(steps):
                engine.step()
        seconds = time.perf_counter() - began
        if number:
            times[f"{waiting:,}"].append(seconds / steps)
            if not waiting:
                shares.append(spent[0] / seconds)
        for request_id in [*engine._answers]:
            engine.cancel(request_id)
    none, crowd = times
    ratio = statistics.median(c / n for c, n in zip(times[crowd], times[none], strict=True))

    def ms(name: str) -> str:
        return f"{statistics.median(times[name]) * 1e3:.1f} ms a step"

    return [
        Row("scheduler", "64 running, 8 adapters: scheduler, batches and bank, of the step",
            ms(none), statistics.median(shares), "< 0.05"),
        Row("scheduler", f"the same with {crowd} waiting, of the step with none", ms(crowd), ratio),
    ]  # fmt: skip


PARTS: dict[str, Callable[[Place], list[Row]]] = {
    "flat": flat, "wide": wide, "distinct": distinct, "merged": merged, "zipf": zipf,
    "cold": cold, "scheduler": scheduler,
}  # fmt: skip


def make_base(folder: Path) -> None:
    """The base of tests/bench/serving.py."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**bench.CONFIG)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def line(row: Row) -> str:
    """Of a Markdown table."""
    ratio, allowed = ("" if value is None else f"{value:.3f}" for value in (row.ratio, row.allowed))
    return f"| {row.part} | {row.load} | {row.figure} | {ratio} | {row.wanted} | {allowed} |"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="Parts, by commas.")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="Of the number of adapters.")
    parser.add_argument("--part", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part:
        place = Place(Path(chosen.part[1]), chosen.dtype, chosen.rounds, chosen.share)
        with contextlib.redirect_stdout(sys.stderr):
            rows = PARTS[chosen.part[0]](place)
        print(json.dumps([asdict(row) for row in rows]))
        return
    parts = chosen.only.split(",")
    if unknown := {*parts} - {*PARTS}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    print(f"{platform.machine()}, {bench.THREADS} threads, {chosen.dtype}, {chosen.rounds} rounds")
    print("\n| part | load | | ratio | wanted | allowed |\n|---|---|---|---|---|---|", flush=True)
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            make_base(Path(folder, "base"))
            command = [sys.executable, "-P", __file__, *sys.argv[1:], "--part", part, folder]
            began = time.perf_counter()
            output = subprocess.run(command, capture_output=True, text=True, check=False)
            if output.returncode:
                raise SystemExit(output.stderr[-3000:])
            for row in json.loads(output.stdout.splitlines()[-1]):
                print(line(Row(**row)), flush=True)
            print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
