"""Parts of tests/bench/adapters.py: adapters from a store, coming in while others are answered."""

import asyncio
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from adapter_place import GIB, Place, Row, drawn, faster, requests_of, speed

ROOM = 32  # adapters, in `zipf`


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
