"""The demo's main job: train four adapters on Ray, publish, serve them together, generate, check.

    make demo            (or: python configs/demo/run.py [--output FOLDER] [--svg PICTURE])

Everything goes through the public doors: Ray Jobs for training, the adapter store, Ray Serve's
HTTP port, the Python client. It ends by itself, stops each process that it started, and exits
non-zero if one of its own checks fails.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Console
from rich.table import Table

from cluster import jobs
from cluster.errors import GraftError
from cluster.registry import AdapterVersion, Registry
from cluster.session import Session, session
from cluster.spec import load_spec
from cluster.tables import open_table, write_table
from serving.app import checked, running
from serving.batch_file import BatchReport
from serving.client import Client
from serving.spec import ServingSpec
from training.command import plan, readable, resolved, submit
from training.spec import TrainingSpec

HERE = Path(__file__).parent
TASKS = ("category", "initials", "words", "title")
BASE = "demo-base"
MAX_TOKENS = 24
# Two workers' cores and what the jobs' own processes ask for, whatever the machine has.
NUM_CPUS = 4
# What must hold on every run.
BASE_BELOW, GAIN_AT_LEAST, HIGH, HIGH_TASKS = 0.10, 0.40, 0.80, 3


@dataclass(frozen=True)
class Result:
    """One task's line of the final table: matches are shares of the held-out rows, answered in
    `completion_tokens` by its adapter."""

    task: str
    version: AdapterVersion
    base_match: float
    adapter_match: float
    completion_tokens: int


def train(console: Console, ray: Session, store: Path) -> dict[str, AdapterVersion]:
    """Submit one Ray job per task, one after another; returns the published versions."""
    published: dict[str, AdapterVersion] = {}
    for task in TASKS:
        started = time.monotonic()
        spec = load_spec(TrainingSpec, HERE / f"{task}.yaml", [f"output.store={store}"])
        spec = resolved(spec)
        console.rule(f"{task}: train by {spec.method.kind}", align="left")
        console.print(f"{plan(spec)}")
        job_id = submit(spec, ray)
        console.print(f"Ray job {job_id}")
        for line in jobs.logs(ray, job_id, follow=True):
            text = readable(line)
            if text is not None:
                console.print(
                    f"  {text}", style="dim", markup=False, highlight=False, soft_wrap=True
                )
        jobs.wait(ray, job_id)
        published[task] = Registry(str(store)).resolve(spec.output.name)
        took_s = time.monotonic() - started
        console.print(f"{published[task].ref} is in {store} after {took_s:.0f} s", soft_wrap=True)
    return published


def write_requests(path: Path) -> None:
    """The held-out rows of all tasks, interleaved, each for the base and for its adapter."""
    heldout = [
        [(task, row) for row in open_table(HERE / "data" / f"{task}-heldout.arrow").to_pylist()]
        for task in TASKS
    ]
    rows = [
        {"task": task, "model": model, "prompt": prompt_of(row), "expected": row["output"]}
        for group in zip(*heldout, strict=True)
        for task, row in group
        for model in (BASE, task)
    ]
    write_table(pa.Table.from_pylist(rows), path)


def prompt_of(row: Mapping[str, str]) -> str:
    """The `alpaca_short` layout that the adapters were trained on."""
    return (
        f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n"
    )


def evaluate(answers: Path, versions: Mapping[str, AdapterVersion]) -> list[Result]:
    """Exact match of every task, under the base and under its adapter."""
    table = open_table(answers)
    failed = table.filter(pc.is_valid(table["error"]))
    if failed.num_rows:
        raise SystemExit(f"{failed.num_rows} rows failed, the first: {failed['error'][0]}")

    def answered(task: str, model: str) -> list[dict[str, Any]]:
        return [row for row in table.to_pylist() if (row["task"], row["model"]) == (task, model)]

    def match(rows: list[dict[str, Any]]) -> float:
        return sum(row["completion"] == row["expected"] for row in rows) / len(rows)

    results: list[Result] = []
    for task in TASKS:
        by_base, by_adapter = answered(task, BASE), answered(task, task)
        tokens = sum(row["completion_tokens"] for row in by_adapter)
        results.append(Result(task, versions[task], match(by_base), match(by_adapter), tokens))
    return results


def show(console: Console, results: list[Result], report: BatchReport) -> None:
    """The table, and the batch's speed."""
    table = Table(
        "task", "method", "trained", "of all", "base", "adapter", "train\ntok/s", "generate\ntok/s",
        title="Parameters trained, exact match on 200 held-out rows, speed", box=box.SIMPLE,
        pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for result in results:
        metrics = result.version.card["metrics"]
        trained, total = metrics["trainable_parameters"], metrics["all_parameters"]
        table.add_row(
            result.task,
            result.version.method.lower(),
            f"{trained:,}",
            f"{trained / total:.2%}",
            f"{result.base_match:.1%}",
            f"{result.adapter_match:.1%}",
            f"{metrics['tokens_per_s']:,.0f}",
            f"{result.completion_tokens / report.seconds:,.0f}",
        )
    console.print(table)
    console.print(f"One batch over HTTP, the base and four adapters mixed: {report}")


def faults(results: list[Result]) -> list[str]:
    """What does not hold of what must."""
    found = [
        f"{r.task}: the base answers {r.base_match:.1%}, not below {BASE_BELOW:.0%}"
        for r in results
        if r.base_match >= BASE_BELOW
    ]
    found += [
        f"{r.task}: the adapter gains {r.adapter_match - r.base_match:.1%}, not {GAIN_AT_LEAST:.0%}"
        for r in results
        if r.adapter_match - r.base_match < GAIN_AT_LEAST
    ]
    high = sum(r.adapter_match > HIGH for r in results)
    if high < HIGH_TASKS:
        found.append(f"only {high} adapters are above {HIGH:.0%}, not {HIGH_TASKS}")
    return found


def run(console: Console, output: Path) -> list[str]:
    """The whole way; returns what does not hold."""
    began = time.monotonic()
    store = output / "store"
    with session(num_cpus=NUM_CPUS) as ray:
        versions = train(console, ray, store)
        trained = time.monotonic()
        console.rule("serve all four and the base, answer the held-out rows", align="left")
        overrides = [f"store={store}", f"cache={output / 'cache'}"]
        spec = load_spec(ServingSpec, HERE / "serving.yaml", overrides)
        write_requests(output / "requests.arrow")
        with running(checked(spec), ray) as url, Client(url) as client:
            names = ", ".join(model.id for model in client.models())
            console.print(f"{url}/v1 serves {names}")
            report = client.generate_file(
                output / "requests.arrow",
                output / "answers.arrow",
                adapter_column="model",
                max_tokens=MAX_TOKENS,
            )
    results = evaluate(output / "answers.arrow", versions)
    show(console, results, report)
    ended = time.monotonic()
    console.print(
        f"Trained in {trained - began:.0f} s, served and answered in {ended - trained:.0f} s. "
        f"The adapters stay in {store}."
    )
    return faults(results)


def main() -> None:
    """Parse, run, exit with 1 if a check fails."""
    parser = argparse.ArgumentParser(description="Train, publish, serve and check four adapters.")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--svg", type=Path, help="Also save the output as a picture.")
    options = parser.parse_args()
    output: Path = options.output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    console = Console(record=options.svg is not None, width=100 if options.svg else None)
    try:
        found = run(console, output)
    except GraftError as error:
        found = [error.message]
    for fault in found:
        console.print(f"FAILED: {fault}", style="bold red", markup=False)
    if not found:
        console.print("Every check holds.", style="bold green")
    if options.svg is not None:
        picture = console.export_svg(title="make demo")
        options.svg.write_text(picture.replace(f"{Path.cwd()}/", ""))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
