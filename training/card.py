"""What stands beside a published adapter: its card, its loss curve as a picture, its events.

README.md is for people (and model hubs), `loss.png` its picture, and the events file is
TensorBoard's: `tensorboard --logdir STORE/adapters` shows every version. Knows metrics as the
worker reports them; nothing of models or of Ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from cluster.registry import EVENTS, PICTURE, README
from training.evaluation import Evaluation
from training.events import Figures, event_file


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write README, picture and events of `card` into an adapter's folder.

    Args:
        card: As it goes into the manifest: job, spec, data, libraries, metrics.
    """
    curve: list[tuple[int, float]] = json.loads(card["metrics"]["loss_curve"])
    found: list[dict[str, Any]] = json.loads(card["metrics"].get("evaluations", "[]"))
    evaluations = [Evaluation(**each) for each in found]
    (folder / README).write_text(_readme(card, evaluations))
    _draw(folder / PICTURE, curve, evaluations)
    _write_events(folder, curve, evaluations)


def _readme(card: Mapping[str, Any], evaluations: Sequence[Evaluation]) -> str:
    spec, data, metrics = card["spec"], card["data"], card["metrics"]
    front = {
        "base_model": spec["base_model"],
        "library_name": "peft",
        "tags": ["graft", spec["method"]["kind"]],
    }
    trained, total = metrics["trainable_parameters"], metrics["all_parameters"]
    facts = {
        "job": card["job"]["id"],
        "goes on from": card["job"]["continues"],
        "trained": f"{trained:,} of {total:,} parameters ({trained / total:.3%})",
        "steps": metrics["step"],
        "tokens": f"{metrics['tokens']:,}",
        "seconds": f"{metrics['train_seconds']:,}",
        "tokens/s": f"{metrics['tokens_per_s']:,}",
        "last training loss": metrics["loss"],
        "published weights are of step": metrics.get("best_step"),
        "classes, from 0": ", ".join(spec.get("data", {}).get("labels") or ()) or None,
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {spec['output']['name']}",
        _table(("", ""), [(name, value) for name, value in facts.items() if value is not None]),
        f"![loss by step]({PICTURE})",
        "## Data",
        _table(("", ""), [(name.replace("_", " "), value) for name, value in data.items()]),
    ]
    if evaluations:
        names = [name for name, value in asdict(evaluations[-1]).items() if value is not None]
        rows = [[getattr(found, name) for name in names] for found in evaluations]
        parts += ["## Evaluation", _table([name.replace("_", " ") for name in names], rows)]
    parts += [
        f"## Spec\n```yaml\n{yaml.safe_dump(spec, sort_keys=False)}```",
        "## Libraries",
        _table(
            ("", ""), [(name, value or "with the job") for name, value in card["libraries"].items()]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw(
    path: Path, curve: Sequence[tuple[int, float]], evaluations: Sequence[Evaluation]
) -> None:
    # Without pyplot, which would choose a display and keep every figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([step for step, _ in curve], [loss for _, loss in curve], label="training")
    if evaluations:
        at = [found.step for found in evaluations]
        axes.plot(at, [found.loss for found in evaluations], marker="o", label="validation")
        axes.legend()
    axes.set_xlabel("step")
    axes.set_ylabel("loss per label, nats")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _write_events(
    folder: Path, curve: Sequence[tuple[int, float]], evaluations: Sequence[Evaluation]
) -> None:
    figures: list[Figures] = [(step, {"loss/training": loss}) for step, loss in curve]
    figures += [(found.step, found.figures) for found in evaluations]
    (folder / EVENTS).write_bytes(event_file(figures))
