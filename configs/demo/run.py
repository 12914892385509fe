"""The demo's main job: train four adapters on Ray, publish, serve them together, generate, check.

    make demo            (or: python configs/demo/run.py [--output FOLDER] [--svg PICTURE])

Everything goes through the public doors: Ray Jobs for training, the adapter store, Ray Serve's
HTTP port, the Python client. It ends by itself, stops each process that it started, and exits
non-zero if one of its own checks fails.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from cluster import jobs
from cluster.registry import AdapterVersion, Registry
from cluster.session import Session
from cluster.spec import load_spec
from training.command import submit
from training.spec import TrainingSpec

HERE = Path(__file__).parent
TASKS = {
    "category": "lora",
    "initials": "bitfit",
    "words": "prompt_tuning",
    "title": "prefix_tuning",
}
BASE = "demo-base"
MAX_TOKENS = 24
# What must hold on every run.
BASE_BELOW, GAIN_AT_LEAST, HIGH, HIGH_TASKS = 0.10, 0.40, 0.80, 3


@dataclass(frozen=True)
class Outcome:
    """One task's line of the final table; the matches are shares of the held-out rows."""

    task: str
    version: AdapterVersion
    base_match: float
    adapter_match: float


def read(path: Path) -> pa.Table:
    """An Arrow IPC file, whole."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def train(console: Console, ray: Session, output: Path) -> dict[str, AdapterVersion]:
    """Submit one Ray job per task, one after another; returns the published versions."""
    registry = Registry(str(output / "store"))
    published: dict[str, AdapterVersion] = {}
    for task, method in TASKS.items():
        started = time.monotonic()
        overrides = [f"output.store={output / 'store'}"]
        spec = load_spec(TrainingSpec, HERE / f"{method}.yaml", overrides)
        job_id = submit(spec, ray)
        console.print(f"\n[bold]{task}[/bold] by {method}: Ray job {job_id}")
        for line in jobs.logs(ray, job_id, follow=True):
            console.print(f"  {line}", style="dim", markup=False, highlight=False)
        jobs.wait(ray, job_id)
        published[task] = registry.resolve(spec.output.name)
        console.print(f"  {published[task].ref} published in {time.monotonic() - started:.0f} s")
    return published


def write_requests(path: Path, versions: dict[str, AdapterVersion]) -> None:
    """The held-out rows of all tasks, interleaved, each once for the base and once for its adapter."""
    heldout = {task: read(HERE / "data" / f"{task}-heldout.arrow").to_pylist() for task in TASKS}
    rows = [
        {"task": task, "model": model, "prompt": alpaca_prompt(row), "expected": row["output"]}
        for group in zip(*heldout.values(), strict=True)
        for task, row in zip(heldout, group, strict=True)
        for model in (BASE, versions[task].name)
    ]
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def alpaca_prompt(row: dict[str, str]) -> str:
    """The `alpaca_short` layout that the adapters were trained on."""
    return (
        f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n"
    )
