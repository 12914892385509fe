"""Parts of tests/bench/adapters.py: adapters that are there, and what they make of a step."""

import contextlib
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from typing import Any

from adapter_place import Place, Row, bench, drawn, faster, in_turns, requests_of, speed


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
