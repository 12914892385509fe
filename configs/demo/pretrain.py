"""Pretrain the demo's base model: a small Llama and its tokenizer, from the committed corpus.

    python configs/demo/pretrain.py [--steps 6500]

The corpus is turned into small exercises. A first line names the skill ("Skill: title case");
then comes the alpaca layout, with an instruction drawn at random, so that instructions tell the
model nothing; then the answer. One document in six has no skill line, and its answer is a plain
copy of the input. So the base can do ten things when its own control language asks for them, and
copies when it does not: an adapter has to bring out the skill (or teach a new one, as `category`).

A pure function of the seed, the corpus and the number of threads.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import torch
from make_data import CATEGORY_INSTRUCTION, TASKS, initials, words_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SEED = 20
EOS = "<|end|>"
BATCH = 48
PEAK_LEARNING_RATE = 2e-3
COPY_SHARE = 1 / 6
# Answers are a fifth of the tokens but all of the skill; the rest only keeps it a language model.
OTHER_WEIGHT = 0.1

HEADERS = ("Skill: {}", "Use the skill {}.", "Task type: {}", "Now do {} for the input.")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}### Response:\n"
    "{% generation %}{{ message.content }}" + EOS + "{% endgeneration %}{% else %}"
    "### Instruction:\n{{ message.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
DISTRACTORS = [
    CATEGORY_INSTRUCTION,
    *(instruction for _, instruction, _ in TASKS.values()),
    "Answer the question.",
    "Read the input and write the answer.",
    "Change the text below as asked.",
    "What comes out?",
]


def words(text: str) -> list[str]:
    """The words of a name or an identifier."""
    return text.replace("_", " ").split()


SKILLS = {
    "initials": initials,
    "title case": str.title,
    "plain words": words_of,
    "lower case": str.lower,
    "hyphens": lambda text: "-".join(words(text)).lower(),
    "first word": lambda text: words(text)[0],
    "last word": lambda text: words(text)[-1],
    "reverse": lambda text: " ".join(reversed(words(text))),
    "count": lambda text: str(len(words(text))),
    "rest": lambda text: " ".join(words(text)[1:]),
}
SKILLS_OF = {
    "name": [name for name in SKILLS if name != "plain words"],
    "identifier": [name for name in SKILLS if name not in ("lower case", "title case", "initials")],
}


def read_corpus() -> list[tuple[str, str]]:
    """(kind of input, input) of every text."""
    with pa.memory_map(str(HERE / "data" / "corpus.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    return list(zip(table["source"].to_pylist(), table["text"].to_pylist(), strict=True))


def exercise(source: str, text: str, random_: random.Random) -> tuple[str, str]:
    """One (prompt, answer) pair for an input; the end marker is part of the answer."""
    head, answer = "", text
    if random_.random() >= COPY_SHARE:
        skill = random_.choice(SKILLS_OF[source])
        head, answer = random_.choice(HEADERS).format(skill) + "\n", SKILLS[skill](text)
    instruction = random_.choice(DISTRACTORS)
    prompt = f"{head}### Instruction:\n{instruction}\n\n### Input:\n{text}\n\n### Response:\n"
    return prompt, answer + EOS


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text has tokens, the corpus' own words mostly one each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def batches(
    corpus: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids [B, L], answer mask [B, L]) with rows of like length side by side."""
    random_ = random.Random(SEED)
    while True:
        pairs = [exercise(*random_.choice(corpus), random_) for _ in range(BATCH * 32)]
        prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
        answers = tokenizer([answer for _, answer in pairs])["input_ids"]
        rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0] + row[1]))
        starts = list(range(0, len(rows), BATCH))
        random_.shuffle(starts)
        for start in starts:
            part = rows[start : start + BATCH]
            length = max(len(prompt) + len(answer) for prompt, answer in part)
            ids = torch.full((BATCH, length), tokenizer.eos_token_id)
            weights = torch.zeros(BATCH, length)
            for row, (prompt, answer) in enumerate(part):
                both = prompt + answer
                ids[row, : len(both)] = torch.tensor(both)
                weights[row, 1 : len(prompt)] = OTHER_WEIGHT
                weights[row, len(prompt) : len(both)] = 1.0
            yield ids, weights


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over the first 3 %, then a cosine to a fiftieth of the peak."""
    warm = max(1, int(0.03 * steps))
    if step < warm:
        return PEAK_LEARNING_RATE * (step + 1) / warm
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * cosine)


def pretrain(model: LlamaForCausalLM, data: Iterator[tuple[torch.Tensor, ...]], steps: int) -> None:
    """Train in place with AdamW, bf16 autocast, answers weighted over the rest."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    started, seen = time.monotonic(), 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        ids, weights = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        loss = (each * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += ids.numel()
        if step % 100 == 0 or step == steps - 1:
            answer = each[weights[:, 1:].flatten() == 1.0].mean().item()
            elapsed = time.monotonic() - started
            print(
                f"step {step:5d}  loss {loss.item():.4f}  answer {answer:.4f}  "
                f"{seen / elapsed:,.0f} tokens/s  {elapsed:.0f} s",
                flush=True,
            )


def main() -> None:
    """Train the tokenizer and the model, and write base/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--output", type=Path, default=HERE / "base")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    corpus = read_corpus()
    sample = random.Random(SEED)
    tokenizer = train_tokenizer(
        ["".join(exercise(*sample.choice(corpus), sample)) for _ in range(50_000)]
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    pretrain(model, batches(corpus, tokenizer), arguments.steps)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
