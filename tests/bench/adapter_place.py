"""Where the parts of tests/bench/adapters.py measure: a base, LoRAs over it, engines, requests."""

import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
