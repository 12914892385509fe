"""The engine: requests of any adapters in, tokens out, one forward pass per step.

Offline and in one thread: `generate` and `score` run to the end; a server calls `submit`, `step`
and `cancel` from the one thread that owns the engine. No Ray, no HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.base_model import encode_prompt, load_tokenizer
from cluster.errors import (
    ConflictError,
    ContextLengthError,
    EngineError,
    RequestError,
)
from serving.adapters import LoweredAdapter, lower
from serving.engine.bank import AdapterBank
from serving.engine.batch import LoadedAdapter, build
from serving.engine.detokenizer import Detokenizer
from serving.engine.pages import PagePool
from serving.engine.request import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    ScoreRequest,
    TokenOutput,
    check_generated,
    check_token_ids,
)
from serving.engine.runner import Runner
from serving.engine.sampler import Sampling, sample
from serving.engine.scheduler import Chunk, Scheduler, Sequence
from serving.spec import EngineSpec


@dataclass
class _Answer:
    """One request in progress."""

    request: GenerationRequest
    sequence: Sequence
    prompt_tokens: int
    max_tokens: int
    seed: int
    detokenizer: Detokenizer | None


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds and has done."""

    running: int
    waiting: int
    free_pages: int
    num_pages: int
    adapters: int
    steps: int
    generated_tokens: int
    preemptions: int
    outstanding_tokens: int


class Engine:
    """One base model and its adapters. Not thread-safe, but for `lower`.

    Raises:
        BaseModelError: the base cannot be loaded or is of a family that cannot be served.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.runner = Runner(spec)
        self._pool = PagePool(self.runner.num_pages)
        self._scheduler = Scheduler(
            self._pool,
            page_tokens=spec.page_tokens,
            max_running=spec.max_running_requests,
            max_step_tokens=spec.max_step_tokens,
        )
        # Without tokenizer files it takes token ids alone.
        has_tokenizer = any(Path(spec.base_model).glob("tokenizer*"))
        self.tokenizer: Any = load_tokenizer(spec.base_model) if has_tokenizer else None
        self._eos = _end_tokens(self.runner.model, self.tokenizer)
        self._bank = AdapterBank(spec, self.runner, self._pool, self._scheduler)
        self._answers: dict[str, _Answer] = {}
        self._count = self._steps = self._generated = self._preemptions = 0

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that requests can name."""
        return self._bank.names

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._answers)

    @property
    def max_context_tokens(self) -> int:
        """Longest prefix + prompt + answer."""
        return self.runner.max_context_tokens

    @property
    def stats(self) -> EngineStats:
        """Counts as of now; on the thread that owns the engine."""
        left = [(a.sequence, a.prompt_tokens + a.max_tokens) for a in self._answers.values()]
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            free_pages=self._pool.num_free,
            num_pages=self._pool.num_pages,
            adapters=len(self._bank.names),
            steps=self._steps,
            generated_tokens=self._generated,
            preemptions=self._preemptions,
            outstanding_tokens=sum(end - sequence.num_computed for sequence, end in left),
        )

    def lower(self, path: str | Path) -> LoweredAdapter:
        """Read an adapter folder for this base. Safe to call from another thread, since it
        touches nothing that runs. Raises AdapterError."""
        lowered = lower(path, self.runner.target)
        self.runner.hooks.check(lowered.deltas)
        return lowered

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load the PEFT folder at `path` under `name`.

        Raises:
            AdapterError: the folder does not fit; nothing changed.
            ConflictError: the name is taken.
            OverloadedError: no room among adapters or pages.
        """
        self.install_adapter(name, self.lower(path))

    def install_adapter(self, name: str, lowered: LoweredAdapter, *, evict: bool = False) -> None:
        """Make a lowered adapter available to requests.

        Args:
            evict: Drop least recently used adapters without requests where there is no room.

        Raises:
            AdapterError: its prefix can never fit.
            ConflictError: the name is taken.
            OverloadedError: no room among adapters or pages.
        """
        self._bank.install(name, lowered, evict=evict)

    def remove_adapter(self, name: str) -> None:
        """Take an adapter away. Requests that use it finish; new ones are refused.

        Raises:
            ModelNotFoundError: there is no such adapter.
        """
        self._bank.remove(name)

    def submit(self, request: GenerationRequest, request_id: str | None = None) -> str:
        """Queue a request; it joins at the next step. Returns its id.

        Raises:
            RequestError: it asks the impossible; nothing was queued.
            ModelNotFoundError: its adapter is not loaded.
        """
        while request_id is None:
            self._count += 1
            own = f"request-{self._count}"
            request_id = None if own in self._answers else own
        answer = self._prepare(request, request_id)
        self._start(answer)
        return answer.sequence.id

    def cancel(self, request_id: str) -> bool:
        """Forget a request; its pages are free at once. False if it is over already."""
        answer = self._answers.get(request_id)
        if answer is not None:
            self._end(answer)
        return answer is not None

    def step(self) -> list[TokenOutput]:
        """Run one forward pass over what the scheduler chose; one output per request that got a
        token or ended. A request that fails, fails alone."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        self._steps += 1
        outputs: list[TokenOutput] = []
        for chunk, token in self._compute(chunks, outputs):
            chunk.sequence.num_computed += chunk.count
            if chunk.is_sampled:
                answer = self._answers[chunk.sequence.id]
                try:
                    outputs.append(self._accept(answer, token))
                except Exception as error:  # a tokenizer's decode; it must not end the engine
                    outputs.append(self._fail(answer, f"{type(error).__name__}: {error}"))
        return outputs

    def generate(self, requests: Many[GenerationRequest]) -> list[GenerationResult]:
        """Run requests to their ends; results in the order of requests.

        Raises:
            RequestError: one of them asks the impossible; none was started.
            EngineError: one of them failed on the way.
        """
        self._check_idle()
        answers = [self._prepare(r, f"generate-{i}") for i, r in enumerate(requests)]
        for answer in answers:
            self._start(answer)
        tokens: dict[str, list[int]] = {answer.sequence.id: [] for answer in answers}
        texts: dict[str, list[str]] = {answer.sequence.id: [] for answer in answers}
        reasons: dict[str, FinishReason] = {}
        try:
            while self.has_work:
                for output in self.step():
                    tokens[output.request_id] += output.token_ids
                    texts[output.request_id].append(output.text)
                    if output.finish_reason is FinishReason.ERROR:
                        raise EngineError(f"{output.request_id}: {output.error}")
                    if output.finish_reason is not None:
                        reasons[output.request_id] = output.finish_reason
        finally:
            for answer in answers:
                self.cancel(answer.sequence.id)
        return [
            GenerationResult(
                tokens[answer.sequence.id],
                "".join(texts[answer.sequence.id]),
                reasons[answer.sequence.id],
                answer.prompt_tokens,
            )
            for answer in answers
        ]

    def score(self, requests: Many[ScoreRequest]) -> list[torch.Tensor]:
        """Logits after every token of each request: float32 [tokens, vocabulary], on CPU.

        Raises:
            RequestError: one of them asks the impossible.
        """
        self._check_idle()
        scored: list[torch.Tensor] = []
        for number, request in enumerate(requests):
            answer = self._prepare(
                GenerationRequest(
                    prompt_token_ids=request.token_ids, adapter=request.adapter, max_tokens=None
                ),
                f"score-{number}",
                min_new_tokens=0,
            )
            self._start(answer)
            parts: list[torch.Tensor] = []
            try:
                while answer.sequence.num_left:
                    chunks = self._scheduler.schedule()
                    batch = build(chunks, self._bank.held, self.spec.page_tokens, all_logits=True)
                    parts.append(self.runner.forward(batch).cpu())
                    answer.sequence.num_computed += chunks[0].count
            finally:
                self._end(answer)
            scored.append(torch.cat(parts))
        return scored

    def check(self) -> None:
        """Raise AssertionError unless pages, sequences and adapters agree (for tests)."""
        self._scheduler.check()
        held = [page for loaded in self._bank.held.values() for page in loaded.pages]
        used = [page for sequence in self._scheduler for page in sequence.pages]
        assert not set(held) & set(used), "a request owns a prefix's page"
        assert len(held) + len(used) + self._pool.num_free == self._pool.num_pages

    def _prepare(
        self, request: GenerationRequest, request_id: str, *, min_new_tokens: int = 1
    ) -> _Answer:
        request.check()
        ids = self._prompt_ids(request)
        loaded: LoadedAdapter | None = None
        if request.adapter is not None:
            loaded = self._bank.get(request.adapter)
        prefix = loaded.lowered.prefix_tokens if loaded else 0
        room = self.max_context_tokens - prefix - len(ids)
        wanted = max(min_new_tokens, room) if request.max_tokens is None else request.max_tokens
        if wanted > room:
            beside = f" + {prefix} of the adapter's prefix" if prefix else ""
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens{beside} and max_tokens is "
                f"{request.max_tokens or 1}, over the context of {self.max_context_tokens}; "
                "shorten the prompt or lower max_tokens",
                param="prompt" if len(ids) + prefix >= self.max_context_tokens else "max_tokens",
            )
        if request.stop and self.tokenizer is None:
            raise RequestError("stop needs a tokenizer, and the base has none", param="stop")
        generated = check_generated(request, wanted, self.runner.vocabulary)
        detokenizer = Detokenizer(self.tokenizer, ids, request.stop) if self.tokenizer else None
        if detokenizer:
            for token in generated:
                detokenizer.add(token)  # its text was given out with it
        sequence = Sequence(request_id, ids + generated, loaded.name if loaded else "", prefix)
        return _Answer(
            request,
            sequence,
            prompt_tokens=len(ids),
            max_tokens=wanted,
            seed=secrets.randbits(63) if request.seed is None else request.seed,
            detokenizer=detokenizer,
        )

    def _prompt_ids(self, request: GenerationRequest) -> list[int]:
        if request.prompt_token_ids is not None:
            check_token_ids(request.prompt_token_ids, self.runner.vocabulary, "prompt_token_ids")
            return [int(token) for token in request.prompt_token_ids]
        if self.tokenizer is None:
            raise RequestError("the base has no tokenizer; give prompt_token_ids", param="prompt")
        ids = encode_prompt(self.tokenizer, request.prompt or "")
        check_token_ids(ids, self.runner.vocabulary, "prompt")
        return ids

    def _start(self, answer: _Answer) -> None:
        if answer.sequence.id in self._answers:
            raise ConflictError(f"request {answer.sequence.id!r}: is in progress already")
        if answer.request.adapter is not None:
            self._bank.begin_use(answer.request.adapter)
        self._answers[answer.sequence.id] = answer
        self._scheduler.add(answer.sequence)

    def _compute(
        self, chunks: list[Chunk], outputs: list[TokenOutput]
    ) -> list[tuple[Chunk, int | None]]:
        """Each chunk with the token sampled behind it. Where a pass fails, its adapters are tried
        one by one, so that only requests of the guilty one fail; their ends go to `outputs`."""
        try:
            logits_NV = self.runner.forward(build(chunks, self._bank.held, self.spec.page_tokens))
            sampled = [chunk for chunk in chunks if chunk.is_sampled]
            tokens = sample(logits_NV, [self._sampling(chunk.sequence) for chunk in sampled])
        except Exception as error:
            names = sorted({chunk.sequence.adapter for chunk in chunks})
            if len(names) == 1:
                reason = f"the forward pass failed: {type(error).__name__}: {error}"
                outputs += [self._fail(self._answers[c.sequence.id], reason) for c in chunks]
                return []
            groups = [[c for c in chunks if c.sequence.adapter == name] for name in names]
            return [pair for group in groups for pair in self._compute(group, outputs)]
        by_id = dict(zip((chunk.sequence.id for chunk in sampled), tokens, strict=True))
        return [(chunk, by_id.get(chunk.sequence.id)) for chunk in chunks]

    def _sampling(self, sequence: Sequence) -> Sampling:
        answer = self._answers[sequence.id]
        request = answer.request
        position = len(sequence.tokens) - answer.prompt_tokens
        return Sampling(request.temperature, request.top_p, request.top_k, answer.seed, position)

    def _accept(self, answer: _Answer, token: int | None) -> TokenOutput:
        if token is None:
            return self._fail(answer, "the logits are not finite; the adapter or base is damaged")
        self._generated += 1
        answer.sequence.tokens.append(token)
        count = len(answer.sequence.tokens) - answer.prompt_tokens
        is_end = token in self._eos and not answer.request.ignore_eos
        text = answer.detokenizer.add(token) if answer.detokenizer and not is_end else ""
        reason: FinishReason | None = None
        if is_end or (answer.detokenizer and answer.detokenizer.stopped):
            reason = FinishReason.STOP
        elif count >= answer.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            if answer.detokenizer:
                text += answer.detokenizer.finish()
            self._end(answer)
        return TokenOutput(answer.sequence.id, (token,), text, reason)

    def _fail(self, answer: _Answer, message: str) -> TokenOutput:
        self._end(answer)
        return TokenOutput(answer.sequence.id, (), "", FinishReason.ERROR, message)

    def _end(self, answer: _Answer) -> None:
        """Take a request out, and a removed adapter with its last request."""
        del self._answers[answer.sequence.id]
        self._preemptions += answer.sequence.preemptions
        self._scheduler.remove(answer.sequence)
        if answer.sequence.adapter:
            self._bank.end_use(answer.sequence.adapter)

    def _check_idle(self) -> None:
        if self.has_work:
            raise ConflictError(
                "submitted requests are in progress; step them to their ends, or cancel them"
            )


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, by the generation config and the tokenizer."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    found = [*found, getattr(tokenizer, "eos_token_id", None)]
    return frozenset(int(token) for token in found if token is not None)
