"""Pretrain the demo's encoder-decoder: a small T5 on the exercises and with the tokenizer of base/.

    python configs/demo/pretrain_seq2seq.py [--steps 3500]

At first the encoder reads a text and the decoder copies it, which teaches the decoder to look at
what was read: without that it learns answers by heart for thousands of steps. Then the encoder
reads an exercise (pretrain.py), the decoder writes its answer. A pure function of the seed, the
corpus and the number of threads.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pretrain import (
    BATCH,
    EOS,
    HERE,
    SEED,
    exercise,
    learning_rate,
    read_corpus,
)
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

IGNORE = -100
COPY_STEPS = 800
RATE = 0.25  # of pretrain.py's learning rate: T5 divides its attention's products by nothing
Pair = tuple[str, str]


def copy_of(_: str, text: str, __: random.Random) -> Pair:
    """A text and itself, to be learned before any exercise."""
    return text, text + EOS


def batches(
    corpus: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[str, str, random.Random], Pair],
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless (sources [B, S], their mask, answers [B, T]) with rows of like length together."""
    random_ = random.Random(SEED)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        length = max(map(len, rows))
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    while True:
        pairs = [make(*random_.choice(corpus), random_) for _ in range(BATCH * 32)]
        sources, answers = (tokenizer(list(part))["input_ids"] for part in zip(*pairs, strict=True))
        rows = sorted(zip(sources, answers, strict=True), key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), BATCH))
        random_.shuffle(starts)
        for start in starts:
            own, targets = zip(*rows[start : start + BATCH], strict=True)
            mask = padded([[1] * len(row) for row in own], 0)
            yield padded(list(own), 0), mask, padded(list(targets), IGNORE)


def main() -> None:
    """Train the model and write seq2seq_base/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--output", type=Path, default=HERE / "seq2seq_base")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "base")
    end = tokenizer.convert_tokens_to_ids(EOS)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=end,
        eos_token_id=end, pad_token_id=end, n_positions=512,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    corpus, started = read_corpus(), time.monotonic()
    copies, exercises = (batches(corpus, tokenizer, make) for make in (copy_of, exercise))
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * learning_rate(step, arguments.steps)
        source, mask, labels = next(copies if step < COPY_STEPS else exercises)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=source, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == arguments.steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
