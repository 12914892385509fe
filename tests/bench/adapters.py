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
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import serving  # noqa: F401  (the package, which a file beside this one would hide)

sys.path.append(str(Path(__file__).parent))

from adapter_place import Place, Row, bench
from adapters_arriving import cold, zipf
from adapters_held import distinct, flat, merged, scheduler, wide

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
