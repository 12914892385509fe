"""All that is checked and timed on a GPU, in one call.

    python -P tests/bench/gpu.py [--shape 7b] [--rounds 3] [--requests 64] [--device cuda]
                                 [--folder FOLDER]

First the tests that run on a GPU, then a table: a Llama of the shape with random weights, in
bfloat16, concurrent requests of 512 + 128 tokens; Graft's engine alone, with 8 and with 32 rank-16
LoRAs mixed, and transformers' continuous batching, in turn within a round, with new prompts each
round; the first round warms up. Each answer is timed as a whole and without its prompt (one token
of the same requests is taken off), so that decoding is seen alone. The limit of a decoding step is
the bytes of the weights and of the keys and values over the bandwidth of a large copy, measured
here. Needs what the engine needs, and neither Ray nor DeepSpeed; `--device cpu --shape tiny` tries
the script. Asserts nothing about time.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from serving.engine import Engine, EngineSpec, GenerationRequest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["tests/serving/test_gpu_kernels.py", "tests/equivalence/test_devices.py"]
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500},
}  # fmt: skip
RANK, PROMPT_TOKENS, NEW_TOKENS, NUM_LORAS = 16, 512, 128, 32
LORAS = [f"lora{number}" for number in range(NUM_LORAS)]
WEIGHTS = "adapter_model.safetensors"
Prompts = list[list[int]]
# Seconds that the answers to these prompts take, of so many tokens each.
Run = Callable[[Prompts, int], float]


def make_base(folder: Path, shape: str, device: str) -> None:
    """Random weights, made where they are made fastest."""
    config = transformers.LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def make_lora(folder: Path, base: Path, seed: int) -> None:
    """A folder as PEFT saves it, of a LoRA on every linear module of a layer."""
    import peft

    config = transformers.AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linear = {n: m for n, m in model.model.layers.named_modules() if hasattr(m, "out_features")}
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in linear.items():
        for part, shape in (
            ("A", (RANK, module.in_features)),
            ("B", (module.out_features, RANK)),
        ):
            key = f"base_model.model.model.layers.{name}.lora_{part}.weight"
            tensors[key] = torch.randn(shape, generator=random).mul_(0.02).bfloat16()
    peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK,
        target_modules=sorted({name.rpartition(".")[2] for name in linear}),
        base_model_name_or_path=str(base),
    ).save_pretrained(folder)  # fmt: skip
    save_file(tensors, folder / WEIGHTS)


def graft(engine: Engine, adapters: Sequence[str | None]) -> Run:
    """Request i goes to adapter i, round and round."""

    def run(prompts: Prompts, new_tokens: int) -> float:
        asked = [
            GenerationRequest(
                prompt_token_ids=prompt, adapter=adapters[i % len(adapters)],
                max_tokens=new_tokens, ignore_eos=True,
            )
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        began = time.perf_counter()
        engine.generate(asked)
        return time.perf_counter() - began

    return run


def continuous_batching(base: Path, device: str) -> Run:
    """transformers' own, which knows no mixed adapters."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).to(device)

    def run(prompts: Prompts, new_tokens: int) -> float:
        chosen = transformers.GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        began = time.perf_counter()
        answers = model.generate_batch(prompts, generation_config=chosen)
        seconds = time.perf_counter() - began
        lengths = {len(answer.generated_tokens) for answer in answers.values()}
        if lengths != {new_tokens}:
            raise SystemExit(f"continuous batching gave answers of {lengths} tokens")
        return seconds

    return run


def copied_bytes_s(device: str) -> float:
    """Bytes read and written in a second by a large copy, the median of ten."""
    size = 2**32 if device == "cuda" else 2**26
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(11):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size / statistics.median(seconds[1:])


def measure(chosen: argparse.Namespace, folder: Path) -> None:
    """Print the table."""
    base = folder / "base"
    make_base(base, chosen.shape, chosen.device)
    for seed, name in enumerate(LORAS):
        make_lora(folder / name, base, seed)
    engine = Engine(
        EngineSpec(
            base_model=str(base), dtype="bfloat16", device=chosen.device, prefix_cache=False,
            max_running_requests=chosen.requests, max_context_tokens=1024,
        )
    )  # fmt: skip
    for name in LORAS:
        engine.add_adapter(name, folder / name)
    systems = {
        "Graft, base": graft(engine, [None]),
        "Graft, 8 LoRAs mixed": graft(engine, LORAS[:8]),
        "Graft, 32 LoRAs mixed": graft(engine, LORAS),
        "transformers' continuous batching, base": continuous_batching(base, chosen.device),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for number in range(chosen.rounds + 1):
        random = np.random.default_rng(number)
        sizes = (chosen.requests, PROMPT_TOKENS)
        prompts = random.integers(3, SHAPES[chosen.shape]["vocab_size"], sizes).tolist()
        for name, run in systems.items():
            whole, first = run(prompts, NEW_TOKENS), run(prompts, 1)
            if number:
                times[name].append((whole, whole - first))
    step_s = limit(engine, chosen)
    print("\n| load | tokens/s | of Graft's base | decoding, tokens/s | of base | step, of limit |")
    print("|---|---|---|---|---|---|")
    for name, found in times.items():
        cells = [name]
        for part, tokens in ((0, NEW_TOKENS), (1, NEW_TOKENS - 1)):
            own, of = ([t[part] for t in times[of]] for of in (name, "Graft, base"))
            ratio = statistics.median(b / a for a, b in zip(own, of, strict=True))
            cells += [f"{chosen.requests * tokens / statistics.median(own):,.0f}", f"{ratio:.2f}"]
        decoding = statistics.median(t[1] for t in found) / (NEW_TOKENS - 1)
        print(f"| {' | '.join([*cells, f'{decoding / step_s:.2f}'])} |")


def limit(engine: Engine, chosen: argparse.Namespace) -> float:
    """Seconds of a decoding step, if all that it did were to read weights, keys and values."""
    weights = sum(p.numel() * p.itemsize for p in engine.runner.model.parameters())
    context = PROMPT_TOKENS + NEW_TOKENS // 2
    held = chosen.requests * context * engine.runner.page_bytes / engine.runner.page_tokens
    speed = copied_bytes_s(chosen.device)
    print(f"\ncopy: {speed / 1e9:,.0f} GB/s; a step reads {(weights + held) / 1e9:.2f} GB")
    return (weights + held) / speed


def main() -> None:
    """Check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="For base and adapters; else a temporary one.")
    chosen = parser.parse_args()
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else platform.processor()
    print(f"{name}, torch {torch.__version__}, {chosen}")
    if chosen.device == "cuda":
        subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, check=False)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        measure(chosen, Path(folder))


if __name__ == "__main__":
    main()
