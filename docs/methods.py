"""Every preset as it stands, trained by a Ray job on the demo's data: docs/methods.md.

    python docs/methods.py [PRESET ...]

Each file of configs/training is submitted as `graft train` does it, one after another on a local
cluster; then the held-out rows of its task are answered by the base and by the published adapter
(greedily, through the engine; a classifier by plain PEFT) and matched exactly. Needs about a minute
for each preset on two cores. With arguments those rows of the page alone are made anew.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch

from cluster import jobs
from cluster.base_model import load_tokenizer
from cluster.registry import AdapterVersion, Registry
from cluster.session import Session, session
from cluster.spec import load_spec
from cluster.tables import open_table
from serving.engine import Engine, EngineSpec, GenerationRequest
from training.command import resolved, submit
from training.method_spec import DyLoraSpec
from training.spec import TrainingSpec

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
NUM_CPUS, MAX_TOKENS, CONTEXT_TOKENS = 4, 24, 512
RANKS = (None, 8, 4, 2, 1)  # at which a DyLoRA is asked; None is its own
HEAD = f"""# Methods, measured

Written by `python docs/methods.py` up to {date.today()}; do not edit. Each row is a preset of [configs/training](../configs/training) as it stands, run by `graft train` on the demo's data: two workers on {os.cpu_count()} CPU cores, no GPU, about 2,000 rows. Accuracy is the exact match of 200 held-out rows, answered greedily by the engine; a classifier is asked in plain PEFT, and the base beside it is the share of the commonest class; a DyLoRA is asked at lower ranks too. Seconds are those of the training loop, and of the job with its start-up, on a machine that had other work as well, so they compare nothing; memory is the peak of one worker, of which about 600 MiB are libraries.

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
    """Exact matches of the held-out rows, those of a base alone measured only once."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}
        self._plain: dict[tuple[str, Path, str], float] = {}

    def adapter(
        self, spec: TrainingSpec, version: AdapterVersion, store: Registry, rank: int | None
    ) -> float:
        """The share that an adapter, of which a rank may be chosen, answers as they are."""
        rows = open_table(held_out(spec)).to_pylist()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            store.download(version, path)
            if spec.task == "sequence_classification":
                names = version.card["spec"]["data"]["labels"]
                return matches(rows, classes(path, [prompt_of(row) for row in rows], names))
            engine = self._engine(spec)
            engine.add_adapter(version.name, path)
            try:
                return matches(rows, answers(engine, rows, version.name, rank))
            finally:
                engine.remove_adapter(version.name)

    def base(self, spec: TrainingSpec) -> float:
        """That of the base; of a classifier, which has no head then, of the commonest class."""
        key = (spec.base_model, held_out(spec), spec.task)
        if key not in self._plain:
            rows = open_table(held_out(spec)).to_pylist()
            if spec.task == "sequence_classification":
                commonest = statistics.mode(row["output"] for row in rows)
                self._plain[key] = matches(rows, [commonest] * len(rows))
            else:
                self._plain[key] = matches(rows, answers(self._engine(spec), rows))
        return self._plain[key]

    def _engine(self, spec: TrainingSpec) -> Engine:
        base = spec.base_model
        if base not in self._engines:
            # The demo's proxy-tuning has the base for its small base too.
            small = (base,) if spec.task == "causal_lm" else ()
            # The demo's T5 tells no context length.
            context = None if spec.task == "causal_lm" else CONTEXT_TOKENS
            self._engines[base] = Engine(
                EngineSpec(base_model=base, small_bases=small, max_context_tokens=context)
            )
        return self._engines[base]


def held_out(spec: TrainingSpec) -> Path:
    """The rows that a spec's training rows leave for this."""
    path = Path(spec.data.train)
    return path.with_name(path.name.replace("-train", "-heldout"))


def prompt_of(row: dict[str, str]) -> str:
    """What stands before a row's answer, in the layout of the presets (`alpaca_short`)."""
    head = f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}"
    return f"{head}\n\n### Response:\n"


def answers(
    engine: Engine,
    rows: list[dict[str, str]],
    adapter: str | None = None,
    rank: int | None = None,
) -> list[str]:
    """What an engine answers greedily."""
    requests = [
        GenerationRequest(
            prompt=prompt_of(row), adapter=adapter, adapter_rank=rank, max_tokens=MAX_TOKENS
        )
        for row in rows
    ]
    return [answer.text for answer in engine.generate(requests)]


def classes(path: Path, prompts: list[str], names: list[str]) -> list[str]:
    """What a classifier gives, loaded by plain PEFT."""
    auto: Any = peft.AutoPeftModelForSequenceClassification
    model = auto.from_pretrained(str(path), num_labels=len(names)).eval()
    tokenizer = load_tokenizer(str(model.peft_config["default"].base_model_name_or_path))
    with torch.no_grad():
        logits = [model(torch.tensor([tokenizer.encode(text)])).logits for text in prompts]
    return [names[int(each.argmax())] for each in logits]


def matches(rows: list[dict[str, str]], given: list[str]) -> float:
    """The share of rows whose output is what was given."""
    return sum(row["output"] == text for row, text in zip(rows, given, strict=True)) / len(rows)


def measure(preset: Path, ray: Session, store: Path, answered: HeldOut) -> Iterator[Row]:
    """Train one preset and ask each of its adapters."""
    spec = resolved(load_spec(TrainingSpec, preset, [f"output.store={store}"]))
    began = time.monotonic()
    job_id = submit(spec, ray)
    jobs.wait(ray, job_id)
    job_s = time.monotonic() - began
    registry = Registry(str(store))
    for name, own in spec.each().items():
        version = registry.resolve(name)
        task = held_out(own).name.removesuffix("-heldout.arrow")
        if own.task != "causal_lm":
            task += f" ({own.task.replace('_', ' ')})"
        label, metrics = f": {name}" if spec.adapters else "", dict(version.card["metrics"])
        for rank in RANKS if isinstance(own.method, DyLoraSpec) else (None,):
            adapter = answered.adapter(own, version, registry, rank)
            at = label if rank is None else f"{label} at rank {rank}"
            yield Row(preset.stem, at, task, answered.base(own), adapter, metrics, job_s)


def rows_of(page: Path) -> dict[str, list[str]]:
    """The rows that the page has, by preset."""
    rows: dict[str, list[str]] = {}
    for line in page.read_text().splitlines() if page.exists() else []:
        if line.startswith("| ["):
            rows.setdefault(line[3 : line.index("]")], []).append(line)
    return rows


def main() -> None:
    """Measure the presets named, or all, and write the page."""
    presets = {path.stem: path for path in (ROOT / "configs" / "training").glob("*.yaml")}
    chosen = sys.argv[1:] or sorted(presets)
    answered = HeldOut()
    with tempfile.TemporaryDirectory() as store, session(None, num_cpus=NUM_CPUS) as ray:
        for name in chosen:
            found = list(map(str, measure(presets[name], ray, Path(store), answered)))
            print(*found, sep="\n", flush=True)
            rows = {n: own for n, own in rows_of(PAGE).items() if n in presets} | {name: found}
            lines = [line for preset in sorted(rows) for line in rows[preset]]
            PAGE.write_text(HEAD + "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
