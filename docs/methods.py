"""Every preset as it stands, trained by a Ray job on the demo's data: docs/methods.md.

    python docs/methods.py [PRESET ...]

Each file of configs/training is submitted as `graft train` does it, one after another on a local
cluster; then the held-out rows of its task are answered by the base and by the published adapter
through the engine (greedy), and matched exactly. Needs about a minute for each preset on two
cores. With arguments those rows of the page alone are made anew.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from cluster import jobs
from cluster.registry import Registry
from cluster.session import Session, session
from cluster.spec import load_spec
from cluster.tables import open_table
from serving.engine import Engine, EngineSpec, GenerationRequest
from training.command import resolved, submit
from training.spec import TrainingSpec

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
NUM_CPUS, MAX_TOKENS = 4, 24
HEAD = f"""# Methods, measured

Written by `python docs/methods.py` on {date.today()}; do not edit. 2 CPU cores, no GPU, float32. Each row is a preset of [configs/training](../configs/training) as it stands, run by `graft train` on the demo's data: two workers, about 2,000 rows. Accuracy is the exact match of 200 held-out rows, answered greedily by the engine. Seconds are those of the training loop, and of the job with its start-up; memory is the peak of one worker, of which about 650 MiB are libraries.

| preset | task | trained | of all | base | adapter | training, s | job, s | tokens/s | peak memory, MiB |
|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


@dataclass(frozen=True)
class Row:
    """One adapter's figures; `name` tells those of one preset apart."""

    preset: str
    name: str
    task: str
    base: float
    adapter: float
    metrics: dict[str, float]
    job_s: float

    def __str__(self) -> str:
        of = self.metrics
        share = of["trainable_parameters"] / of["all_parameters"]
        return (
            f"| [{self.preset}](../configs/training/{self.preset}.yaml){self.name} | {self.task} "
            f"| {of['trainable_parameters']:,.0f} | {share:.2%} | {self.base:.1%} "
            f"| {self.adapter:.1%} | {of['train_seconds']:.0f} | {self.job_s:.0f} "
            f"| {of['tokens_per_s']:,.0f} | {of['peak_memory_mib']:,.0f} |"
        )


class HeldOut:
    """The demo's held-out rows under one base, each task's under the base alone only once."""

    def __init__(self, base: str) -> None:
        # The demo's proxy-tuning has the base for its small base too.
        self.engine = Engine(EngineSpec(base_model=base, small_bases=(base,)))
        self._plain: dict[str, float] = {}

    def accuracy(self, data: Path, adapter: str | None) -> float:
        """The share of exact matches."""
        rows = open_table(data).to_pylist()
        requests = [
            GenerationRequest(
                prompt=f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}"
                "\n\n### Response:\n",
                adapter=adapter,
                max_tokens=MAX_TOKENS,
            )
            for row in rows
        ]
        answers = self.engine.generate(requests)
        return sum(a.text == row["output"] for a, row in zip(answers, rows, strict=True)) / len(
            rows
        )

    def plain(self, data: Path) -> float:
        """That of the base."""
        if data.name not in self._plain:
            self._plain[data.name] = self.accuracy(data, None)
        return self._plain[data.name]


def measure(preset: Path, ray: Session, store: Path, held_out: HeldOut) -> Iterator[Row]:
    """Train one preset and ask each of its adapters."""
    spec = resolved(load_spec(TrainingSpec, preset, [f"output.store={store}"]))
    began = time.monotonic()
    job_id = submit(spec, ray)
    jobs.wait(ray, job_id)
    job_s = time.monotonic() - began
    for name, own in spec.each().items():
        version = Registry(str(store)).resolve(name)
        data = Path(own.data.train.replace("-train", "-heldout"))
        with tempfile.TemporaryDirectory() as folder:
            path = Registry(str(store)).fetch(version, Path(folder))
            held_out.engine.add_adapter(name, path)
            adapter = held_out.accuracy(data, name)
            held_out.engine.remove_adapter(name)
        task, plain = data.name.removesuffix("-heldout.arrow"), held_out.plain(data)
        label = f": {name}" if spec.adapters else ""
        yield Row(preset.stem, label, task, plain, adapter, dict(version.card["metrics"]), job_s)


def rows_of(page: Path) -> dict[str, list[str]]:
    """The rows that the page has, by preset."""
    rows: dict[str, list[str]] = {}
    for line in page.read_text().splitlines() if page.exists() else []:
        if line.startswith("| ["):
            rows.setdefault(line[3 : line.index("]")], []).append(line)
    return rows


def main() -> None:
    """Measure the presets named, or all, and write the page."""
    presets = {
        path.stem: path
        for path in (ROOT / "configs" / "training").glob("*.yaml")
        if load_spec(TrainingSpec, path).task == "causal_lm"  # what the engine can answer with it
    }
    chosen = sys.argv[1:] or sorted(presets)
    held_out = HeldOut(str(ROOT / "configs" / "demo" / "base"))
    with tempfile.TemporaryDirectory() as store, session(None, num_cpus=NUM_CPUS) as ray:
        for name in chosen:
            found = list(map(str, measure(presets[name], ray, Path(store), held_out)))
            print(*found, sep="\n", flush=True)
            rows = {n: own for n, own in rows_of(PAGE).items() if n in presets} | {name: found}
            lines = [line for preset in sorted(rows) for line in rows[preset]]
            PAGE.write_text(HEAD + "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
