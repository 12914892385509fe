"""Tokens per second of the engine beside vLLM, transformers and PEFT: base alone, adapters mixed.

    python tests/bench/serving.py [--dtype float32] [--rounds 3] [--vllm PYTHON] [--long]
                                  [--only "base,8 LoRAs"]

An 82 M-parameter Llama with random weights, 32 requests of 64 + 64 tokens, rank-16 LoRAs on every
linear module. Each system lives in a process of its own and runs every load once per round, in
turn, with new prompts each round; the first round warms up. Figures are medians, ratios the median
of the ratios within a round. `--vllm` names the Python of an environment that has vLLM (made by
tests/bench/peers.sh); `--long` adds long prompts and a shared prefix; `--only` takes loads by how
they begin. Asserts nothing about time.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THREADS = 2
CONFIG = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2304,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LORAS = [f"lora{number}" for number in range(32)]
METHODS = ["lora0", "dora", "ia3", "bitfit", "layernorm", "bottleneck", "prompt", "prefix"]
Prompts = list[list[int]]


@dataclass(frozen=True)
class Load:
    """Requests alike in shape; request i goes to the adapter i of `adapters`, round and round."""

    adapters: Sequence[str | None] = (None,)
    requests: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 64
    shared_tokens: int = 0  # the first of every prompt

    def prompts(self, seed: int) -> Prompts:
        """Random tokens, others for each round."""
        import numpy as np

        random = np.random.default_rng(seed)
        shared = random.integers(3, CONFIG["vocab_size"], self.shared_tokens).tolist()
        own = (self.requests, self.prompt_tokens - self.shared_tokens)
        return [shared + row for row in random.integers(3, CONFIG["vocab_size"], own).tolist()]

    def names(self) -> list[str | None]:
        """The adapter of each request."""
        return [self.adapters[i % len(self.adapters)] for i in range(self.requests)]


LOADS = {
    "base": Load(),
    "1 LoRA": Load(LORAS[:1]),
    "8 LoRAs mixed": Load(LORAS[:8]),
    "32 LoRAs mixed": Load(LORAS),
    "8 methods mixed": Load(METHODS),
}
LONG = {
    "16 x (2,048 + 32)": Load(requests=16, prompt_tokens=2048, new_tokens=32),
    "first tokens behind 1,024 shared": Load(prompt_tokens=1088, new_tokens=1, shared_tokens=1024),
}
MIXED = ("1 LoRA", "8 LoRAs mixed", "32 LoRAs mixed")
Run = Callable[[Load, Prompts], object]


def graft(folder: Path, dtype: str, *, prefix_cache: bool = True) -> Run:
    """Graft's engine with every adapter."""
    from serving.engine import Engine, EngineSpec, GenerationRequest

    engine = Engine(
        EngineSpec(
            base_model=str(folder / "base"), dtype=dtype, threads=THREADS,
            max_running_requests=32, prefix_cache=prefix_cache, kv_cache_gib=3,
        )
    )  # fmt: skip
    for name in [*LORAS, *METHODS[1:]]:
        engine.add_adapter(name, folder / name)

    def run(load: Load, prompts: Prompts) -> object:
        return engine.generate(
            [
                GenerationRequest(
                    prompt_token_ids=prompt, adapter=name, max_tokens=load.new_tokens,
                    ignore_eos=True,
                )
                for prompt, name in zip(prompts, load.names(), strict=True)
            ]
        )  # fmt: skip

    return run


def vllm(folder: Path, dtype: str, *, lora: bool = False) -> Run:
    """vLLM without its prefix cache, which finds nothing in these loads."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {}
    if lora:
        options = {"enable_lora": True, "max_loras": 32, "max_lora_rank": 16}
    model = LLM(
        str(folder / "base"), dtype=dtype, skip_tokenizer_init=True, max_model_len=2304,
        max_num_seqs=32, enable_prefix_caching=False, **options,
    )  # fmt: skip

    def run(load: Load, prompts: Prompts) -> object:
        chosen = SamplingParams(
            temperature=0, max_tokens=load.new_tokens, ignore_eos=True, detokenize=False
        )
        adapters = [
            LoRARequest(name, LORAS.index(name) + 1, str(folder / name)) if name else None
            for name in load.names()
        ]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return model.generate(
            asked, chosen, lora_request=adapters if lora else None, use_tqdm=False
        )

    return run


def peft(folder: Path, dtype: str, *, in_turn: bool = False) -> Run:
    """PEFT over transformers' generate: rows of several adapters in a batch, or one adapter's
    requests after another's; without adapters the model alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype))
    model: Any = PeftModel.from_pretrained(
        base, folder / LORAS[0], adapter_name=LORAS[0], autocast_adapter_dtype=False
    ).eval()
    for name in LORAS[1:]:
        model.load_adapter(folder / name, name, autocast_adapter_dtype=False)

    def generate(prompts: Prompts, new_tokens: int, **options: Any) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options,
            )  # fmt: skip

    def run(load: Load, prompts: Prompts) -> object:
        names = load.names()
        if load.adapters == (None,):
            with model.disable_adapter():
                generate(prompts, load.new_tokens)
        elif not in_turn:
            generate(prompts, load.new_tokens, adapter_names=names)
        else:
            for name in load.adapters:
                model.set_adapter(name)
                own = [p for p, of in zip(prompts, names, strict=True) if of == name]
                generate(own, load.new_tokens)
        return None

    return run


SYSTEMS: dict[str, Callable[[Path, str], Run]] = {
    "Graft": graft,
    "Graft, no prefix cache": lambda folder, dtype: graft(folder, dtype, prefix_cache=False),
    "vLLM": vllm,
    "vLLM with LoRA": lambda folder, dtype: vllm(folder, dtype, lora=True),
    "PEFT": peft,
    "PEFT in turn": lambda folder, dtype: peft(folder, dtype, in_turn=True),
}


def plan(*, with_vllm: bool, with_long: bool) -> dict[str, list[str]]:
    """Which system runs which loads."""
    chosen = {
        "Graft": list(LOADS),
        "PEFT": ["base", "8 LoRAs mixed"],
        "PEFT in turn": ["8 LoRAs mixed"],
    }
    if with_vllm:
        chosen |= {"vLLM": ["base"], "vLLM with LoRA": list(MIXED)}
    if with_long:
        chosen["Graft"] += list(LONG)
        chosen["Graft, no prefix cache"] = list(LONG)[1:]
        if with_vllm:
            chosen["vLLM"] += list(LONG)[:1]
    return chosen


def make_base(folder: Path) -> None:
    """The 82 M-parameter Llama, its weights random."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(folder)


def make_files(folder: Path) -> None:
    """The base and its adapters, every trained value moved away from its start."""
    import torch
    import transformers

    from cluster.spec import parse_spec
    from training.methods import METHODS as KINDS
    from training.methods import trainable_parameters
    from training.spec import TrainingSpec

    make_base(folder / "base")
    lora = {"kind": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"}
    chosen: dict[str, dict[str, Any]] = dict.fromkeys(LORAS, lora) | {
        "dora": lora | {"use_dora": True},
        "ia3": {"kind": "ia3"},
        "bitfit": {"kind": "bitfit"},
        "layernorm": {"kind": "layernorm"},
        "bottleneck": {"kind": "bottleneck"},
        "prompt": {"kind": "prompt_tuning", "num_virtual_tokens": 20},
        "prefix": {"kind": "prefix_tuning", "num_virtual_tokens": 20},
    }
    for name, method in chosen.items():
        document = {
            "base_model": str(folder / "base"), "method": method,
            "data": {"train": "unused"}, "output": {"name": "unused"},
        }  # fmt: skip
        spec = parse_spec(TrainingSpec, document).method
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        model = KINDS[spec.kind].attach(model, spec, str(folder / "base"))
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        KINDS[spec.kind].save(model, folder / name)


def serve(system: str, folder: Path, dtype: str) -> None:
    """In a system's process: one line in per load and seed, one line out with the seconds."""
    with contextlib.redirect_stdout(sys.stderr):
        run = SYSTEMS[system](folder, dtype)
    print("ready", flush=True)
    for line in sys.stdin:
        name, seed = json.loads(line)
        load = (LOADS | LONG)[name]
        prompts = load.prompts(seed)
        began = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            run(load, prompts)
        print(time.perf_counter() - began, flush=True)


@contextlib.contextmanager
def processes(
    pythons: dict[str, str], folder: Path, dtype: str
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Every system loaded and waiting."""
    threads = {
        "OMP_NUM_THREADS": str(THREADS), "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    started: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, python in pythons.items():
            # -P: this file's folder must not hide the package of the same name.
            command = [python, "-P", __file__, "--serve", name, str(folder), "--dtype", dtype]
            started[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.DEVNULL if not os.environ.get("VERBOSE") else None,
                env=os.environ | threads,
            )  # fmt: skip
            if (said := answer(started[name])) != "ready":
                raise SystemExit(f"{name} did not start (VERBOSE=1 shows why): {said!r}")
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def answer(process: subprocess.Popen[str]) -> str:
    """The next line of a system."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def measure(chosen: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Seconds of each round by system and load."""
    planned = plan(with_vllm=bool(chosen.vllm), with_long=chosen.long)
    begins = tuple(chosen.only.split(","))
    wanted = {name: [o for o in loads if o.startswith(begins)] for name, loads in planned.items()}
    planned = {name: loads for name, loads in wanted.items() if loads}
    pythons = {name: chosen.vllm if "vLLM" in name else sys.executable for name in planned}
    found: dict[tuple[str, str], list[float]] = {
        (system, load): [] for load in LOADS | LONG for system in planned if load in planned[system]
    }
    with tempfile.TemporaryDirectory() as name:
        make = [sys.executable, "-P", __file__, "--make", name]
        subprocess.run(make, check=True, stderr=subprocess.DEVNULL)
        with processes(pythons, Path(name), chosen.dtype) as running:
            for number in range(chosen.rounds + 1):
                for (system, load), times in found.items():
                    process = running[system]
                    assert process.stdin is not None
                    print(json.dumps([load, number]), file=process.stdin, flush=True)
                    seconds = float(answer(process))
                    if number:
                        times.append(seconds)
    return found


def table(found: dict[tuple[str, str], list[float]]) -> str:
    """Markdown: tokens per second, and Graft's ratios to its own base and to the others."""
    ours = {load: times for (system, load), times in found.items() if system == "Graft"}

    def ratio(own: list[float], other: list[float]) -> str:
        return f"{statistics.median(o / m for m, o in zip(own, other, strict=True)):.2f}"

    lines = [
        "| load | system | tokens/s | of Graft's base | Graft is faster by |",
        "|---|---|---|---|---|",
    ]
    for (system, name), times in found.items():
        load = (LOADS | LONG)[name]
        speed = load.requests * load.new_tokens / statistics.median(times)
        of_base = (
            ratio(times, ours["base"])
            if system == "Graft" and "base" in ours and name in LOADS
            else ""
        )
        faster = "" if system == "Graft" else ratio(ours[name], times)
        lines.append(f"| {name} | {system} | {speed:,.0f} | {of_base} | {faster} |")
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--vllm", help="Python of an environment with vLLM.")
    parser.add_argument("--long", action="store_true", help="Long prompts and a shared prefix.")
    parser.add_argument("--only", default="", help="Beginnings of loads' names, by commas.")
    parser.add_argument("--make", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=2, metavar=("SYSTEM", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.make:
        make_files(Path(chosen.make))
        return
    if chosen.serve:
        serve(chosen.serve[0], Path(chosen.serve[1]), chosen.dtype)
        return
    found = measure(chosen)
    print(f"{platform.machine()}, {THREADS} threads, {chosen.dtype}, {chosen.rounds} rounds\n")
    print(table(found))


if __name__ == "__main__":
    main()
