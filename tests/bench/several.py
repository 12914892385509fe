"""K adapters in one run beside K solo runs: what sharing the base's pass saves.

    python tests/bench/several.py [--adapters 4] [--micro-batch 1] [--rows 24] [--rows-per-step 8]
                                  [--rounds 3] [--method lora] [--dtype fp32]

The base, the rows and the LoRA of tests/bench/training.py; the adapters differ in learning rate and
seed, so each reads the rows in an order of its own. Every run is a process of its own: within a
round the shared one, then each solo one. Told are the training loops, and the whole processes with
their start-up, of which there is one instead of K. Figures are medians, a ratio the median of the
ratios within a round. Asserts nothing about time.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# By its file: as a module it would have the name of the package that it measures.
_SPEC = importlib.util.spec_from_file_location(
    "bench_training", Path(__file__).with_name("training.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
bench = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench)

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": bench.LORA["r"], "alpha": bench.LORA["lora_alpha"]},
    "ia3": {"kind": "ia3"},
}


def spec_of(base: Path, number: int, chosen: argparse.Namespace) -> Any:
    """The spec of one adapter."""
    from cluster.spec import parse_spec
    from training.spec import TrainingSpec

    document = {
        "base_model": str(base), "method": METHODS[chosen.method], "data": {"train": "unused"},
        "output": {"name": f"adapter-{number}"}, "seed": number,
        "optimizer": {"learning_rate": bench.LEARNING_RATE * (number + 1)},
        "epochs": 1, "micro_batch_size": chosen.micro_batch, "batch_size": chosen.rows_per_step,
        "zero": {"stage": 0}, "precision": chosen.dtype,
    }  # fmt: skip
    return parse_spec(TrainingSpec, document)


def run_these(base: Path, numbers: list[int], chosen: argparse.Namespace) -> float:
    """Seconds of the loop: of the shared pass for several adapters, of `run` for one."""
    from cluster.memory import keep_freed_memory
    from training.assembly import assemble
    from training.loop import as_work, run
    from training.place import Place
    from training.rows import TokenRows, row_hash, write_rows
    from training.several import Rows, Runner, assemble_several, run_several

    keep_freed_memory()
    steps = -(-chosen.rows // bench.ROWS_PER_STEP)
    pairs = [(r["input_ids"], r["labels"]) for r in bench.make_rows(steps)[: chosen.rows]]
    path = base.parent / "tokens"
    write_rows(((ids, labels, row_hash(ids, labels)) for ids, labels in pairs), path)
    rows = TokenRows(path)
    specs = {f"adapter-{number}": spec_of(base, number, chosen) for number in numbers}
    spec = next(iter(specs.values()))
    if len(specs) == 1:
        made = assemble(spec, Place(), rows)
        began = time.perf_counter()
        run(spec, made.backend, rows, course=made.course, on_log=lambda _: None)
        return time.perf_counter() - began
    several = assemble_several(specs, Place(), {name: Rows(rows) for name in specs})
    runners: dict[str, Runner] = {}
    for name, made in several.runs.items():
        work = as_work(specs[name], made.backend, rows, course=made.course, on_log=lambda _: None)
        runners[name] = Runner(work, several.draws[name])
    began = time.perf_counter()
    run_several(several.shared, runners)
    assert all(runner.end for runner in runners.values())
    return time.perf_counter() - began


def timed(base: Path, numbers: list[int]) -> tuple[float, float]:
    """(seconds of the loop, of the whole process) in a process of its own, with our options."""
    # -P: this file's folder must not hide the package of the same name.
    command = [sys.executable, "-P", __file__, *sys.argv[1:], "--these", str(base),
               json.dumps(numbers)]  # fmt: skip
    began = time.perf_counter()
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        raise SystemExit(output.stderr[-3000:])
    return float(output.stdout.splitlines()[-1]), time.perf_counter() - began


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--rows", type=int, default=24, help="Of each adapter.")
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="lora", choices=METHODS)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--these", nargs=2, metavar=("BASE", "NUMBERS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.these:
        print(run_these(Path(chosen.these[0]), json.loads(chosen.these[1]), chosen))
        return
    numbers = list(range(chosen.adapters))
    together: list[tuple[float, float]] = []
    alone: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        bench.make_base(base)
        for _ in range(chosen.rounds):
            together.append(timed(base, numbers))
            loops, wholes = zip(*(timed(base, [number]) for number in numbers), strict=True)
            alone.append((sum(loops), sum(wholes)))
    print(f"{chosen.adapters} {chosen.method} adapters, {chosen.rows} rows each, micro-batches of "
          f"{chosen.micro_batch}, {chosen.rows_per_step} rows a step, {chosen.dtype}, "
          f"{chosen.rounds} rounds")  # fmt: skip
    print(
        f"| | {chosen.adapters} solo runs, s | one run, s | of the solo runs |\n|---|---|---|---|"
    )
    for index, what in enumerate(("training loop", "whole process")):
        pairs = [(one[index], other[index]) for one, other in zip(together, alone, strict=True)]
        ratio = statistics.median(one / other for one, other in pairs)
        ones, others = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"| {what} | {others:.1f} | {ones:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
