"""Training speed and memory: Graft's loop, alone and in a job, the tutorials' script, and TRL.

    python tests/bench/training.py [--steps 4] [--rounds 3] [--trl PYTHON] [--dtype fp32]
                                   [--only Graft,Ray]

An 82 M-parameter Llama with random weights, rank-16 LoRA on every linear module, alpaca-shaped
rows (mean about 100, at most 256 tokens, loss on the response), 32 rows per optimiser step. Each
system runs once per round in a process of its own; figures are medians, ratios the median of the
ratios within a round. "Ray job" is what `graft train` runs with one worker, which does without
DeepSpeed; its seconds and memory are the worker's, of the training loop. Both of Graft's write a
log line behind every step, so their steps are compared one by one, and the first, which warms up,
is told apart.
`--trl` names the Python of an environment that has trl (made by tests/bench/peers.sh), `--only` the
beginnings of the systems' names. Asserts nothing about time.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

THREADS = 2
ROWS_PER_STEP, MICRO_BATCH = 32, 4
LEARNING_RATE = 2e-4
CONFIG = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Measured:
    """Seconds of a training loop; its peak memory where that is not this process's; the tokens per
    second of each step, if they are known."""

    seconds: float
    peak_mib: float | None = None
    steps: Sequence[float] = ()


def make_rows(steps: int) -> Rows:
    """Token rows with alpaca's lengths: a prompt of about 45 tokens, a response of about 60."""
    import numpy as np

    random = np.random.default_rng(0)
    rows: Rows = []
    for _ in range(steps * ROWS_PER_STEP):
        prompt = int(np.clip(random.lognormal(3.6, 0.5), 8, 128))
        response = int(np.clip(random.lognormal(3.8, 0.8), 3, 256 - prompt))
        ids = random.integers(3, CONFIG["vocab_size"], prompt + response).tolist()
        ids[-1] = CONFIG["eos_token_id"]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def make_base(folder: Path) -> None:
    """The base, saved once for all systems."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def graft_spec(base: Path, dtype: str, **other: Any) -> Any:
    """The TrainingSpec of Graft's runs."""
    from cluster.spec import parse_spec
    from training.spec import TrainingSpec

    document: dict[str, Any] = {
        "base_model": str(base),
        "method": {"kind": "lora", "r": LORA["r"], "alpha": LORA["lora_alpha"]},
        "data": {"train": "unused"}, "output": {"name": "bench"}, "zero": {"stage": 0},
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup_ratio": 0},
        "epochs": 1, "micro_batch_size": MICRO_BATCH, "precision": dtype,
        "gradient_accumulation_steps": ROWS_PER_STEP // MICRO_BATCH, "log_every_steps": 1,
    }  # fmt: skip
    return parse_spec(TrainingSpec, document | other)


def run_graft(base: Path, rows: Rows, dtype: str) -> Measured:
    """Graft's bare loop: what each Ray worker runs."""
    from cluster.memory import keep_freed_memory
    from training.assembly import assemble
    from training.loop import run
    from training.place import Place
    from training.rows import TokenRows, row_hash, write_rows

    keep_freed_memory()  # as the worker does
    spec = graft_spec(base, dtype)
    path = base.parent / "tokens"
    pairs = [(row["input_ids"], row["labels"]) for row in rows]
    write_rows(((ids, labels, row_hash(ids, labels)) for ids, labels in pairs), path)
    data = TokenRows(path)
    made = assemble(spec, Place(), data)
    speeds: list[float] = []
    began = time.perf_counter()
    run(spec, made.backend, data, course=made.course,
        on_log=lambda line: speeds.append(line.tokens_per_s))  # fmt: skip
    return Measured(time.perf_counter() - began, steps=speeds)


def run_job(base: Path, rows: Rows, dtype: str) -> Measured:
    """The same rows as text, by `graft train` with one worker."""
    import pyarrow as pa

    from cluster import jobs
    from cluster.registry import Registry
    from cluster.session import session
    from cluster.tables import write_table
    from training.command import resolved, submit

    def text(ids: list[int]) -> str:
        return " ".join(f"t{i}" for i in ids)

    prompts = [row["labels"].count(-100) for row in rows]
    table = {
        "prompt": [text(row["input_ids"][:n]) + " " for row, n in zip(rows, prompts, strict=True)],
        # Without the end token, which Graft appends.
        "completion": [text(row["input_ids"][n:-1]) for row, n in zip(rows, prompts, strict=True)],
    }
    data = base.parent / "rows.parquet"
    write_table(pa.table(table), data)
    spec = resolved(
        graft_spec(
            base, dtype, data={"train": str(data)},
            zero={"stage": 2}, output={"name": "bench", "store": str(base.parent / "store")},
            workers={"count": 1, "cpus": THREADS, "gpus": 0},
        )
    )  # fmt: skip
    with session(None, num_cpus=THREADS + 2) as ray:
        job = submit(spec, ray)
        said = "\n".join(jobs.logs(ray, job, follow=True))
        jobs.wait(ray, job)
    speeds = [float(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens/s", said)]
    metrics = Registry(spec.output.store).resolve("bench").card["metrics"]
    tokens = sum(len(row["input_ids"]) for row in rows)
    if metrics["tokens"] != tokens:
        raise SystemExit(f"the job learned from {metrics['tokens']} tokens, not {tokens}")
    return Measured(tokens / metrics["tokens_per_s"], metrics["peak_memory_mib"], speeds)


def run_trainer(base: Path, rows: Rows, dtype: str) -> Measured:
    """The tutorials' script: transformers' Trainer over a PEFT model, padded."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": 0, "labels": -100}
        padded = {
            key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in batch])
            for key, value in fill.items()
        }
        mask = [[1] * len(r["input_ids"]) + [0] * (length - len(r["input_ids"])) for r in batch]
        return {**padded, "attention_mask": torch.tensor(mask)}

    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ROWS_PER_STEP // MICRO_BATCH,
            num_train_epochs=1, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=dtype == "bf16",
            output_dir=str(base.parent / "trainer"),
        ),
        data_collator=collate,
        train_dataset=rows,  # type: ignore[arg-type]
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    return Measured(time.perf_counter() - began)


def run_trl(base: Path, rows: Rows, dtype: str) -> Measured:
    """TRL's SFTTrainer with packing: as many optimiser steps over the same rows."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    steps = len(rows) // ROWS_PER_STEP
    data = [
        {"input_ids": r["input_ids"], "completion_mask": [int(x != -100) for x in r["labels"]]}
        for r in rows
    ]
    tokens = sum(len(row["input_ids"]) for row in rows)
    length = -(-tokens // (steps * ROWS_PER_STEP // MICRO_BATCH))  # a micro-batch's share
    trainer = trl.SFTTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        trl.SFTConfig(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=ROWS_PER_STEP // MICRO_BATCH,
            max_length=max(length, 256), packing=True, max_steps=steps,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, bf16=dtype == "bf16",
            gradient_checkpointing=False, completion_only_loss=True,
            output_dir=str(base.parent / "trl"),
        ),
        train_dataset=datasets.Dataset.from_list(data),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
        processing_class=_tokenizer(),
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    return Measured(time.perf_counter() - began)


def _tokenizer() -> Any:
    """TRL wants one, though the rows are tokens already."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    # A special token is found inside of words too, so none may be the beginning of another.
    special = {0: "<pad>", 1: "<unknown>", CONFIG["eos_token_id"]: "<end>"}
    vocabulary = {special.get(i, f"t{i}"): i for i in range(CONFIG["vocab_size"])}
    core = Tokenizer(models.WordLevel(vocabulary, "<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<pad>", unk_token="<unknown>"
    )


SYSTEMS = {
    "Graft": run_graft,
    "Ray job": run_job,
    "Trainer + PEFT": run_trainer,
    "TRL, packing": run_trl,
}


def one(name: str, base: Path, steps: int, dtype: str) -> None:
    """Run one system in this process; prints seconds and the process's peak memory."""
    found = SYSTEMS[name](base, make_rows(steps), dtype)
    own_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(asdict(replace(found, peak_mib=found.peak_mib or own_mib))))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--trl", help="Python of an environment with trl.")
    parser.add_argument("--only", default="", help="Beginnings of systems' names, by commas.")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "BASE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        one(chosen.one[0], Path(chosen.one[1]), chosen.steps, chosen.dtype)
        return
    pythons = dict.fromkeys(SYSTEMS, sys.executable) | {"TRL, packing": chosen.trl}
    wanted = ("Graft", *chosen.only.split(",")) if chosen.only else ("",)
    pythons = {n: python for n, python in pythons.items() if python and n.startswith(wanted)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        make_base(base)
        for _ in range(chosen.rounds):
            for name, python in pythons.items():
                # -P: this file's folder must not hide the package of the same name.
                command = [python, "-P", __file__, "--one", name, str(base), "--steps",
                           str(chosen.steps), "--dtype", chosen.dtype]  # fmt: skip
                output = subprocess.run(command, capture_output=True, text=True, check=False)
                if output.returncode:
                    raise SystemExit(f"{name}:\n{output.stderr[-3000:]}")
                found[name].append(json.loads(output.stdout.splitlines()[-1]))
    show(found, chosen)


def show(found: Mapping[str, Sequence[Mapping[str, Any]]], chosen: argparse.Namespace) -> None:
    """Print the table, and how the Ray job's steps compare with the bare loop's."""
    tokens = sum(len(row["input_ids"]) for row in make_rows(chosen.steps))
    print(f"{tokens:,} tokens in {chosen.steps} steps, {chosen.dtype}, {chosen.rounds} rounds")
    print("| system | tokens/s | Graft is faster by | peak memory, MiB |\n|---|---|---|---|")
    for name, runs in found.items():
        speed = tokens / statistics.median(run["seconds"] for run in runs)
        ratio = statistics.median(
            other["seconds"] / own["seconds"]
            for other, own in zip(runs, found["Graft"], strict=True)
        )
        peak = statistics.median(run["peak_mib"] for run in runs)
        print(f"| {name} | {speed:,.0f} | {ratio:.2f} | {peak:,.0f} |")
    if "Ray job" in found:
        ratios = [
            [bare / own for bare, own in zip(loop["steps"], job["steps"], strict=True)]
            for loop, job in zip(found["Graft"], found["Ray job"], strict=True)
        ]
        first = statistics.median(of[0] for of in ratios)
        rest = statistics.median(ratio for of in ratios for ratio in of[1:])
        print(f"a step of the Ray job takes {rest:.3f} of the bare loop's, the first {first:.3f}")


if __name__ == "__main__":
    main()
