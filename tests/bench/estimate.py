"""Predicted and measured peak memory of training's workers.

    python tests/bench/estimate.py [--only 30M/lora] [--steps 2]

Bases made in memory and saved (26 M and 81 M parameters, Llama-like; a T5 of 36 M), methods, ZeRO
stages with two workers, several adapters in one run. Measured: the larger of the two processes'
peak resident memory, through assembly, steps and a checkpoint, as a Ray worker has them; in a
thread, as Ray Train runs it. Predicted: what `graft estimate` prints. Asserts nothing.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

WORLD_SIZE, VOCABULARY, ROWS = 2, 32_000, 16
SIZES: dict[str, dict[str, Any]] = {
    "30M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
            "num_attention_heads": 6, "num_key_value_heads": 6},
    "80M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
            "num_attention_heads": 12, "num_key_value_heads": 12},
}  # fmt: skip
# (base, method, rows of a micro-batch, tokens of a row, ZeRO stages, further settings)
GRID: list[tuple[str, str, int, int, tuple[int, ...], dict[str, Any]]] = [
    ("30M", "lora", 2, 256, (0, 1, 2, 3), {}),
    ("30M", "full", 2, 256, (0, 1, 2, 3), {}),
    ("30M", "bitfit", 4, 256, (2,), {}),
    ("30M", "prompt_tuning", 4, 256, (2,), {}),
    ("30M", "lora", 4, 256, (2,), {"gradient_checkpointing": True}),
    ("30M", "lora", 4, 256, (2,), {"precision": "bf16"}),
    ("30M", "lora", 2, 256, (2,), {"quantization": {"bits": 4}}),
    ("30M", "lora", 2, 256, (2,), {"quantization": {"bits": 8}}),
    ("30M", "lora", 4, 256, (2,), {"task": "sequence_classification"}),
    ("T5", "lora", 4, 256, (2, 3), {"task": "seq_2_seq_lm"}),
    ("T5", "full", 2, 256, (0, 2), {"task": "seq_2_seq_lm"}),
    ("30M", "lora", 2, 256, (0,), {"adapters": 4}),
    ("80M", "lora", 4, 256, (0, 2, 3), {}),
    ("80M", "full", 2, 128, (0, 2), {}),
    ("80M", "bitfit", 2, 128, (2,), {}),
    ("80M", "prompt_tuning", 2, 128, (2,), {}),
]


def make_base(size: str, folder: Path) -> None:
    """The base, saved once for all runs."""
    import torch
    import transformers

    torch.manual_seed(0)
    if size == "T5":
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=512, d_kv=64, d_ff=1024, num_layers=4, num_heads=8,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0,
            eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
        return
    config = transformers.LlamaConfig(
        **SIZES[size], vocab_size=VOCABULARY, max_position_embeddings=2048,
        tie_word_embeddings=True, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def document(base: Path, method: str, rows: int, stage: int, more: dict[str, Any]) -> Any:
    """The job's spec."""
    data: dict[str, Any] = {"train": "unused"}
    if count := more.get("adapters"):
        more = {**more, "adapters": {f"adapter-{n}": {"seed": n} for n in range(count)}}
    if more.get("task") == "sequence_classification":
        data["labels"] = ["even", "odd"]
    return {
        "base_model": str(base), "method": {"kind": method}, "micro_batch_size": rows,
        "data": data, "output": {"name": "unused"}, "zero": {"stage": stage},
        "workers": {"count": WORLD_SIZE}, "max_steps": 2, "log_every_steps": 1, **more,
    }  # fmt: skip


def row_lengths(longest: int) -> list[int]:
    """Of every other row the longest, of the rest any down to half of it."""
    return [longest - i % 2 * (i * 37 % (longest // 2)) for i in range(ROWS)]


def make_rows(spec: Any, longest: int) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of the job's task: everything is learned, of an encoder-decoder a quarter."""
    import numpy as np

    random = np.random.default_rng(0)
    rows = [random.integers(3, VOCABULARY, n).tolist() for n in row_lengths(longest)]
    if spec.task == "seq_2_seq_lm":
        return [(ids, ids[: len(ids) // 4]) for ids in rows]
    if spec.task == "sequence_classification":
        return [(ids, [number % 2]) for number, ids in enumerate(rows)]
    return [(ids, ids) for ids in rows]


def work(rank: int, port: int, spec: Any, tokens: int) -> None:
    """One worker's whole life in this process; prints its peak."""
    import ray.train
    import torch.distributed as dist

    import training.worker
    from cluster.memory import keep_freed_memory, peak_memory_mib
    from cluster.spec import parse_spec
    from training.place import Place
    from training.rows import TokenRows, row_hash, write_rows
    from training.spec import TrainingSpec

    assert ray.train  # a worker has them in memory
    assert training.worker
    keep_freed_memory()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= where | {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parsed = parse_spec(TrainingSpec, spec)
        rows = ((*row, row_hash(*row)) for row in make_rows(parsed, tokens))
        write_rows(rows, folder / "rows", task=parsed.task)
        data = TokenRows(folder / "rows")
        train = train_several if parsed.adapters else train_one
        train(parsed, Place(rank, WORLD_SIZE), data, folder / "checkpoint")
    print(json.dumps(peak_memory_mib()), flush=True)
    os._exit(0)  # gloo's threads may outlive the interpreter's end


def train_one(spec: Any, place: Any, rows: Any, folder: Path) -> None:
    """A run with its checkpoints."""
    from training.assembly import assemble
    from training.checkpoint import write_checkpoint
    from training.loop import run

    made = assemble(spec, place, rows)

    def keep(progress: Any) -> None:
        state = made.full_state(keep=place.rank == 0)
        if place.rank == 0:
            write_checkpoint(folder, state, progress)

    run(
        spec, made.backend, rows, course=made.course, place=place, on_log=lambda line: None,
        on_checkpoint=keep,
    )  # fmt: skip


def train_several(spec: Any, place: Any, rows: Any, folder: Path) -> None:
    """All adapters' runs in one, with their checkpoints."""
    from functools import partial

    from training.loop import as_work
    from training.several import Rows, Runner, Saved, assemble_several, run_several

    specs, saved = spec.each(), Saved(place)
    several = assemble_several(specs, place, {name: Rows(rows) for name in specs})
    runners: dict[str, Runner] = {}
    for name, made in several.runs.items():
        work = as_work(
            specs[name], made.backend, rows, course=made.course, place=place,
            on_log=lambda line: None, on_checkpoint=partial(saved.keep, name, made),
        )  # fmt: skip
        runners[name] = Runner(work, several.draws[name])

    def after_round() -> None:
        if saved.is_new and place.rank == 0:
            saved.write(folder)
        saved.is_new = False

    run_several(several.shared, runners, after_round)


def measure(spec: Any, tokens: int) -> float:
    """The larger peak of the two workers, in MiB."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # -P: this file's folder must not hide packages.
    command = [sys.executable, "-P", __file__, "--work", json.dumps([port, spec, tokens])]
    workers = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(WORLD_SIZE)
    ]
    peaks: list[float] = []
    for worker in workers:
        output, errors = worker.communicate()
        if worker.returncode:
            raise SystemExit(errors.decode()[-3000:])
        peaks.append(json.loads(output.splitlines()[-1]))
    return max(peaks)


def predict(spec: Any, tokens: int) -> float:
    """What `graft estimate` prints, in MiB."""
    from cluster.spec import parse_spec
    from training.dry_run import Shape
    from training.estimate import estimate
    from training.spec import TrainingSpec

    parsed = parse_spec(TrainingSpec, spec)
    rows = make_rows(parsed, tokens)
    shapes = {name: Shape.of_rows(own, rows) for name, own in parsed.each().items()}
    return estimate(parsed, shapes, [parsed.zero.stage]).stages[0].total


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="Part of a row's name, as 30M/lora/adapters.")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        port, spec, tokens = json.loads(chosen.work[0])
        thread = threading.Thread(target=work, args=(int(chosen.work[1]), port, spec, tokens))
        thread.start()
        thread.join()
        raise SystemExit(1)  # `work` ends the process itself
    print("| base, method | micro-batch | ZeRO | predicted, MiB | measured, MiB | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for size, method, rows, tokens, stages, more in GRID:
            base, name = Path(folder, size), "/".join((size, method, *more))
            if chosen.only not in name:
                continue
            if not base.exists():
                make_base(size, base)
            for stage in stages:
                spec = document(base, method, rows, stage, more)
                predicted, measured = predict(spec, tokens), measure(spec, tokens)
                note = "".join(f", {key} {value}" for key, value in more.items())
                print(
                    f"| {size} {method}{note} | {rows} x {tokens} | {stage} | {predicted:,.0f} "
                    f"| {measured:,.0f} | {predicted / measured:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
