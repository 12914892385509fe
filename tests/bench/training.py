"""Training speed and memory: Graft's loop beside the script of the tutorials and TRL with packing.

    python tests/bench/training.py [--steps 4] [--rounds 3] [--trl PYTHON] [--dtype fp32]

An 82 M-parameter Llama with random weights, rank-16 LoRA on every linear module, alpaca-shaped
rows (mean about 100, at most 256 tokens, loss on the response), 32 rows per optimiser step. Each
system runs once per round in a process of its own; figures are medians, ratios the median of the
ratios within a round. `--trl` names the Python of an environment that has trl (made by
tests/bench/peers.sh). Asserts nothing about time.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS_PER_STEP, MICRO_BATCH = 32, 4
LEARNING_RATE = 2e-4
CONFIG = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def make_rows(steps: int) -> list[dict[str, list[int]]]:
    """Token rows with alpaca's lengths: a prompt of about 45 tokens, a response of about 60."""
    import numpy as np

    random = np.random.default_rng(0)
    rows: list[dict[str, list[int]]] = []
    for _ in range(steps * ROWS_PER_STEP):
        prompt = int(np.clip(random.lognormal(3.6, 0.5), 8, 128))
        response = int(np.clip(random.lognormal(3.8, 0.8), 3, 256 - prompt))
        ids = random.integers(3, CONFIG["vocab_size"], prompt + response).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def make_base(folder: Path) -> None:
    """The base, saved once for all systems."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(folder)


def run_graft(base: Path, rows: list[dict[str, list[int]]], dtype: str) -> float:
    """Seconds of Graft's bare loop: what each Ray worker runs."""
    from cluster.memory import keep_freed_memory
    from cluster.spec import parse_spec
    from training.assembly import assemble
    from training.loop import Place, run
    from training.rows import TokenRows, row_hash, write_rows
    from training.spec import TrainingSpec

    keep_freed_memory()  # as the worker does
    document = {
        "base_model": str(base),
        "method": {"kind": "lora", "r": LORA["r"], "alpha": LORA["lora_alpha"]},
        "data": {"train": "unused"}, "output": {"name": "unused"},
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup_ratio": 0},
        "epochs": 1, "micro_batch_size": MICRO_BATCH, "zero": {"stage": 0}, "precision": dtype,
        "gradient_accumulation_steps": ROWS_PER_STEP // MICRO_BATCH,
    }  # fmt: skip
    spec = parse_spec(TrainingSpec, document)
    path = base.parent / "tokens"
    pairs = [(row["input_ids"], row["labels"]) for row in rows]
    write_rows(((ids, labels, row_hash(ids, labels)) for ids, labels in pairs), path)
    data = TokenRows(path)
    made = assemble(spec, Place(), data)
    began = time.perf_counter()
    run(spec, made.backend, data, course=made.course)
    return time.perf_counter() - began


def run_trainer(base: Path, rows: list[dict[str, list[int]]], dtype: str) -> float:
    """Seconds of the tutorials' script: transformers' Trainer over a PEFT model, padded."""
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
    return time.perf_counter() - began


def run_trl(base: Path, rows: list[dict[str, list[int]]], dtype: str) -> float:
    """Seconds of TRL's SFTTrainer with packing: as many optimiser steps over the same rows."""
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
    return time.perf_counter() - began


def _tokenizer() -> Any:
    """TRL wants one, though the rows are tokens already."""
    import transformers
    from tokenizers import Tokenizer, models

    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(CONFIG["vocab_size"])}, "t1"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="t2", pad_token="t0", unk_token="t1"
    )


SYSTEMS = {"Graft": run_graft, "Trainer + PEFT": run_trainer, "TRL, packing": run_trl}


def one(name: str, base: Path, steps: int, dtype: str) -> None:
    """Run one system in this process; prints seconds and the process's peak memory."""
    seconds = SYSTEMS[name](base, make_rows(steps), dtype)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib}))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--trl", help="Python of an environment with trl.")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "BASE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        one(chosen.one[0], Path(chosen.one[1]), chosen.steps, chosen.dtype)
        return
    pythons = {"Graft": sys.executable, "Trainer + PEFT": sys.executable}
    if chosen.trl:
        pythons["TRL, packing"] = chosen.trl
    tokens = sum(len(row["input_ids"]) for row in make_rows(chosen.steps))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
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


if __name__ == "__main__":
    main()
