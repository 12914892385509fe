"""One request in progress: what it has said, what it will be sampled by, and when it ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch

from serving.engine.detokenizer import Detokenizer
from serving.engine.grammar import Grammar
from serving.engine.pooling import Pooled
from serving.engine.request import (
    FinishReason,
    GenerationRequest,
    Times,
    TokenLogprobs,
    TokenOutput,
)
from serving.engine.sampler import Sampled, Sampling, logprobs_of
from serving.engine.sequence import Chunk, Sequence


@dataclass
class Clock:
    """When a request was submitted, first in a step, and given its first token."""

    submitted_s: float
    scheduled_s: float | None = None
    first_s: float | None = None

    def schedule(self, now_s: float) -> None:
        """It is in a step that began then."""
        self.scheduled_s = now_s if self.scheduled_s is None else self.scheduled_s

    def give(self, output: TokenOutput) -> TokenOutput:
        """Note an output that is given now; the last one with the times."""
        now_s = time.perf_counter()
        self.first_s = now_s if self.first_s is None else self.first_s
        if output.finish_reason is None:
            return output
        scheduled_s = self.submitted_s if self.scheduled_s is None else self.scheduled_s
        times = Times(scheduled_s - self.submitted_s, self.first_s - scheduled_s,
                      now_s - self.first_s)  # fmt: skip
        return replace(output, times=times)


@dataclass
class Answer:
    """The state of a request. `sequence` is the scheduler's; its tokens grow here.

    `end_tokens` end the answer and are no part of its text; `max_tokens` is resolved;
    `prompt_tokens` are those of the sequence in front of the answer.
    """

    request: GenerationRequest
    sequence: Sequence
    prompt_tokens: int
    max_tokens: int
    seed: int
    end_tokens: frozenset[int]
    detokenizer: Detokenizer | None
    grammar: Grammar | None
    pooled: Pooled | None = None
    clock: Clock = field(default_factory=lambda: Clock(time.perf_counter()))
    _prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])

    @property
    def read_tokens(self) -> int:
        """Tokens of the prompt, whoever reads them."""
        return len(self.sequence.source) or self.prompt_tokens

    @property
    def sampling(self) -> Sampling:
        """How its next token is sampled."""
        allowed = self.grammar.allowed() if self.grammar else None
        return Sampling(self.request, self.seed, self.sequence.tokens, self.prompt_tokens, allowed)

    def read_prompt(self, chunk: Chunk, logits_NV: torch.Tensor) -> None:
        """Note the log probabilities of the prompt's tokens, whose predictions are the rows of
        `chunk.wanted`. They are made once: a preempted request does not ask for them again."""
        predicted = [
            self.sequence.tokens[place + 1]
            for offset in chunk.wanted
            if (place := chunk.start + offset) + 1 < self.prompt_tokens
        ]
        done = len(self._prompt_logprobs) - chunk.start
        count = self.request.prompt_logprobs or 0
        if predicted[done:]:
            rows_NV = logits_NV[done : len(predicted)]
            counts = [count] * len(rows_NV)
            self._prompt_logprobs += logprobs_of(rows_NV, predicted[done:], counts)
        if len(self._prompt_logprobs) == self.prompt_tokens - 1:
            self.sequence.scored_tokens = 0

    def pool(self, chunk: Chunk, states_MH: torch.Tensor) -> None:
        """Take the hidden states of `chunk.pooled`."""
        assert self.pooled is not None
        first = self.sequence.pooled_from
        assert first is not None
        self.pooled.add(states_MH, is_first=chunk.start <= first)

    def embed(self) -> TokenOutput | None:
        """The vector of a prompt that has been read to its end; None if it is not finite."""
        assert self.pooled is not None
        vector = self.pooled.vector()
        if vector is None:
            return None
        return TokenOutput(self.sequence.id, (), "", FinishReason.STOP, embedding=vector)

    def accept(self, sampled: Sampled) -> TokenOutput:
        """Take the next token; its output has a finish reason if it is the last. Raises EngineError
        if its grammar cannot go on."""
        is_first = len(self.sequence.tokens) == self.prompt_tokens
        prompt_logprobs = tuple(self._prompt_logprobs) if is_first else ()
        if self.max_tokens == 0:
            return TokenOutput(
                self.sequence.id, (), "", FinishReason.LENGTH, prompt_logprobs=prompt_logprobs
            )
        if self.grammar:
            self.grammar.check()
            self.grammar.accept([sampled.token])
            self.grammar.check()
        self.sequence.tokens.append(sampled.token)
        text, reason = self._say(sampled.token)
        return TokenOutput(
            self.sequence.id,
            (sampled.token,),
            text,
            reason,
            logprobs=(sampled.logprobs,) if sampled.logprobs else (),
            prompt_logprobs=prompt_logprobs,
        )

    def _say(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that is certain now, and why the answer ends here, if it does."""
        is_end = token in self.end_tokens
        text = self.detokenizer.add(token) if self.detokenizer and not is_end else ""
        reason: FinishReason | None = None
        is_complete = self.grammar is not None and self.grammar.is_complete
        if is_end or is_complete or (self.detokenizer and self.detokenizer.stopped):
            reason = FinishReason.STOP
        elif len(self.sequence.tokens) - self.prompt_tokens >= self.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None and self.detokenizer:
            text += self.detokenizer.finish()
        return text, reason
