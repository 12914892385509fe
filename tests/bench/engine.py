"""Tokens per second of the engine: base alone, adapters mixed, beside transformers and PEFT.

    python tests/bench/engine.py [--repeats 3] [--requests 32] [--dtype float32]

An 82 M-parameter Llama with random weights, requests of 64 + 64 tokens, rank-16 LoRA on every
linear module. Every system runs once per round, in turn; the table has medians and, for the
ratios, the median of the ratios within a round. Asserts nothing about time.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table

from serving.engine import Engine, EngineSpec, GenerationRequest
from training.method_spec import BitFitSpec
from training.methods import METHODS, trainable_parameters

PROMPT_TOKENS, NEW_TOKENS, NUM_LORAS = 64, 64, 8
CONFIG = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
CAUSAL = {"task_type": "CAUSAL_LM"}
OTHERS = {
    "prompt": peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=20),
    "prefix": peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=20),
}


def make_files(folder: Path) -> None:
    """The base, NUM_LORAS LoRAs, and one adapter of each other method."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    base.save_pretrained(folder / "base")

    def save(model: torch.nn.Module, kind: str, name: str) -> None:
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        METHODS[kind].save(model, folder / name)

    def fresh() -> transformers.PreTrainedModel:
        return transformers.AutoModelForCausalLM.from_pretrained(folder / "base")

    for number in range(NUM_LORAS):
        lora = peft.LoraConfig(**CAUSAL, r=16, lora_alpha=32, target_modules="all-linear")
        save(peft.get_peft_model(fresh(), lora), "lora", f"lora{number}")
    for name, config in OTHERS.items():
        save(peft.get_peft_model(fresh(), config), "lora", name)
    bitfit = METHODS["bitfit"].attach(fresh(), BitFitSpec(kind="bitfit"), str(folder / "base"))
    save(bitfit, "bitfit", "bitfit")


def systems(folder: Path, dtype: str, requests: int) -> dict[str, Callable[[], object]]:
    """Name -> one run of the whole load."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(
        CONFIG["vocab_size"], (requests, PROMPT_TOKENS), generator=generator
    )  # fmt: skip
    engine = Engine(
        EngineSpec(base_model=str(folder / "base"), dtype=dtype, max_running_requests=requests)
    )
    loras = [f"lora{number}" for number in range(NUM_LORAS)]
    methods = ["lora0", "bitfit", *OTHERS]
    for name in dict.fromkeys([*loras, *methods]):
        engine.add_adapter(name, folder / name)

    def graft(names: list[str | None]) -> Callable[[], object]:
        asked = [
            GenerationRequest(
                prompt_token_ids=prompt,
                adapter=names[i % len(names)],
                max_tokens=NEW_TOKENS,
                ignore_eos=True,
            )
            for i, prompt in enumerate(prompts.tolist())
        ]
        return lambda: engine.generate(asked)

    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=getattr(torch, dtype)
    )
    options = {
        "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False,
        "pad_token_id": 0, "attention_mask": torch.ones_like(prompts),
    }  # fmt: skip
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(
            folder / "base", dtype=getattr(torch, dtype)
        ),
        folder / "lora0",
        adapter_name="lora0",
        autocast_adapter_dtype=False,
    ).eval()
    for name in loras[1:]:
        adapted.load_adapter(folder / name, name, autocast_adapter_dtype=False)
    rows = [loras[i % NUM_LORAS] for i in range(requests)]
    return {
        "Graft, base only": graft([None]),
        "Graft, 1 LoRA": graft(["lora0"]),
        f"Graft, {NUM_LORAS} LoRAs mixed": graft([*loras]),
        f"Graft, {len(methods)} methods mixed": graft([*methods]),
        "transformers generate, base only": lambda: base.generate(prompts, **options),
        f"PEFT adapter_names, {NUM_LORAS} LoRAs mixed": lambda: adapted.generate(
            prompts, adapter_names=rows, **options
        ),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        make_files(Path(name))
        runs = systems(Path(name), chosen.dtype, chosen.requests)
        seconds: dict[str, list[float]] = {system: [] for system in runs}
        for repeat in range(chosen.repeats + 1):  # the first round warms up
            for system, run in runs.items():
                began = time.perf_counter()
                with torch.inference_mode():
                    run()
                if repeat:
                    seconds[system].append(time.perf_counter() - began)
    tokens = chosen.requests * NEW_TOKENS
    reference = next(iter(runs))
    table = Table("system", "tokens/s", f"of {reference}")
    for system, times in seconds.items():
        ratio = statistics.median(
            base / own for base, own in zip(seconds[reference], times, strict=True)
        )
        table.add_row(system, f"{tokens / statistics.median(times):,.0f}", f"{ratio:.2f}")
    console = Console()
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {chosen.dtype}, {chosen.requests} requests of "
        f"{PROMPT_TOKENS} + {NEW_TOKENS} tokens, {chosen.repeats} rounds"
    )
    console.print(table)


if __name__ == "__main__":
    main()
